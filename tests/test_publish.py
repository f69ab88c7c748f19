"""`.ci/publish`: versions of the site beside each other on a branch, whoever published before, from any machine.

mike itself runs in `nox -s docs -- mike`; in its place stands what it does to the branch.
"""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a script for bash")
PUBLISH = Path(__file__).parents[1] / ".ci/publish"
PYTHON = """#!/usr/bin/env bash
# python3 run parity, python3 run docs -- mike deploy [--update-aliases] VERSION [ALIAS], ... mike set-default VERSION
set -euo pipefail
[ "$*" = "run parity" ] && exit
shift 4
add() { # PLACE TEXT
  export GIT_INDEX_FILE="$PWD/.git/pages-index"
  rm -f "$GIT_INDEX_FILE"
  git rev-parse --quiet --verify gh-pages > parent || true
  [ -s parent ] && git read-tree gh-pages
  git update-index --add --cacheinfo "100644,$(echo "$2" | git hash-object -w --stdin),$1"
  git update-ref refs/heads/gh-pages "$(git commit-tree "$(git write-tree)" $(sed 's/^/-p /' parent) -m "$1")"
}
case "$1 $2" in
  "deploy --update-aliases") add "$3/index.html" "$3"; add "$4" "$3" ;;
  "deploy $2") add "$2/index.html" "$2" ;;
  "set-default $2") add index.html "$2" ;;
esac
"""


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """A function that publishes a reference from a fresh clone, and returns the pages by their place."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["git", "init", "--quiet", "--bare", tmp_path / "remote"], check=True)

    def run(reference: str) -> dict[str, str]:
        clone = tmp_path / f"clone-{len(list(tmp_path.iterdir()))}"
        (clone / ".ci").mkdir(parents=True)
        (clone / ".ci/publish").write_bytes(PUBLISH.read_bytes())
        subprocess.run(["git", "init", "--quiet", clone], check=True)
        env = os.environ | {"REMOTE": str(tmp_path / "remote"), "GITHUB_ACTOR": "somebody", "GITHUB_REF": reference}
        done = subprocess.run(["bash", ".ci/publish"], cwd=clone, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pages = clone / "results/pages"
        files = [path for path in pages.rglob("*") if path.is_file()]
        return {path.relative_to(pages).as_posix(): path.read_text().strip() for path in files}

    return run


def test_versions_lie_beside_each_other_and_the_newest_release_is_what_readers_meet(publish):
    dev = {"dev/index.html": "dev", "index.html": "dev"}
    assert publish("refs/heads/main") == dev
    first = dev | {"0.1/index.html": "0.1", "latest": "0.1", "index.html": "latest"}
    assert publish("refs/tags/v0.1.0") == first
    assert publish("refs/heads/main") == first  # a commit does not take the front page from the release
    assert publish("refs/tags/v0.1.1") == first
    second = first | {"0.2/index.html": "0.2", "latest": "0.2"}
    assert publish("refs/tags/v0.2.0") == second
    assert publish("refs/tags/v0.1.2") == second
    assert publish("refs/tags/v0.10.0")["latest"] == "0.10"
