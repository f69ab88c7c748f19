"""PEFT's own tests, from the source distribution of the installed version, run on HoraConfig.

    python run.py [--sdist peft-0.21.2.tar.gz] [options of pytest]

The tests stay as they are; `plugin` exchanges what they are parametrised with.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)


def main() -> int:
    """Fetch, unpack and run; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="use this source distribution instead of downloading it")
    options, pytest_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tests = unpack(options.sdist or fetch(work), work)
        command = [
            *(sys.executable, "-m", "pytest", "-p", "plugin", "-q", "-rs", "--import-mode=importlib"),
            *("-p", "no:cacheprovider", "--rootdir", str(tests.parent), "-c", os.devnull),
            *(pytest_options or ["--durations=5"]),
            *(str(tests / name) for name in FILES if (tests / name).exists()),
        ]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "HORA_CONFORMANCE_MODELS": str(work / "models"),
        }
        return subprocess.run(command, cwd=tests.parent, env=environment, check=False).returncode


def fetch(work: Path) -> Path:
    """Download the source distribution of the installed PEFT with pip."""
    requirement = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", requirement]
    subprocess.run([*command, "--dest", str(work)], check=True)
    return next(work.glob("peft-*.tar.gz"))


def unpack(sdist: Path, work: Path) -> Path:
    """The folder of tests of a source distribution, as a package."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    tests = next(work.glob("peft-*/tests"))
    (tests / "__init__.py").touch()
    return tests


if __name__ == "__main__":
    sys.exit(main())
