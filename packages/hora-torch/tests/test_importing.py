"""What an import says where torchvision was built for another torch."""

import os
import subprocess
import sys

import pytest
from hora_torch.importing import _version, explained

TWICE = """
for attempt in range(2):
    try:
        import hora_torch
    except ImportError as error:
        print(error)
"""


@pytest.fixture
def path(tmp_path):
    """A torchvision of another kind, before whatever is installed."""
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.99.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99\n")
    return os.pathsep.join([str(tmp_path), *sys.path])


def test_every_attempt_names_the_versions_and_the_cure(path):
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("PEFT imports torchvision")]
    assert len(answers) == 2, done.stdout
    for answer in answers:
        assert "torchvision 0.99 beside torch" in answer
        assert "pip uninstall torchvision" in answer


def test_a_second_attempt_of_torchvision_itself_is_known():
    text = "partially initialized module 'torchvision' has no attribute 'extension'"
    with pytest.raises(ImportError, match="install both in one command"), explained():
        raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'") from AttributeError(text)


def test_other_failures_pass_unchanged():
    with pytest.raises(KeyError, match="other"), explained():
        raise KeyError("other")


def test_a_package_without_metadata_has_an_unknown_version():
    assert _version("no-such-package") == "of unknown version"
