"""The examples run, and train."""

import inspect
import pydoc_data.topics
import runpy
from pathlib import Path

import hora_spec
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"tunix_trainer"}  # where tunix is: test_tunix.py


def test_every_example_is_run():
    tested = {"train_nnx", "train_pytree", "maxtext_tree", "equinox_digits", "vit_on_a_mesh"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested | ELSEWHERE


@pytest.mark.parametrize("name", ["train_nnx", "train_pytree"])
def test_an_example_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    losses = runpy.run_path(str(EXAMPLES / f"{name}.py"))["losses"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_maxtext_example_finds_stacked_layers(monkeypatch, capsys):
    monkeypatch.setattr(pydoc_data.topics, "topics", {"topic": 4000 * "the quick brown "})
    monkeypatch.setattr(inspect, "getsource", lambda _: 4000 * "def fox(quick): ")
    runpy.run_path(str(EXAMPLES / "maxtext_tree.py"))["main"](steps=2)
    printed = capsys.readouterr().out
    assert "decoder.layers_3.self_attention: layers=4" in printed
    before, after = (float(part.split()[0]) for part in printed.splitlines()[-1].split(": ")[1].split(", ")[:2])
    assert before != after


def test_the_equinox_example_adapts_to_other_digits(capsys):
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLES / "equinox_digits.py"))["main"](steps=100)
    before, after = (float(line.split(": ")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines())
    assert after > before + 20


def test_the_example_on_a_mesh_takes_all_devices(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    load = pytest.importorskip("hora_bench.models.load")
    vit = pytest.importorskip("hora_bench.models.vit")
    config = vit.ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, mlp_dim=16, num_classes=10)
    monkeypatch.setattr(load, "num_features", lambda _: 16)
    monkeypatch.setattr(load, "nnx_vit", lambda *_: vit.ViT(config, rngs=nnx.Rngs(0)))
    runpy.run_path(str(EXAMPLES / "vit_on_a_mesh.py"))["main"]("a name", str(tmp_path), steps=2, size=16)
    assert capsys.readouterr().out.startswith("8 devices: ")
    assert list(hora_spec.load_adapter(tmp_path).layers) == ["blocks.0.attn", "blocks.1.attn"]
