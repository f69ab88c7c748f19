"""The same update: torch and JAX train the same model to the same parameters, and may hand it over in between."""

from itertools import pairwise

import numpy as np
import pytest
from hora_spec import AdapterSpec

from .models import MODELS, Model
from .report import LOSS_BOUND, PARAMS_BOUND
from .runs import JaxRun, Params, TorchRun

SPECS = {
    "vit": AdapterSpec(rank=3, hidden_dim=6, head_embed_dim=5, alpha=6, residual=True),
    "llama": AdapterSpec(rank=3, hidden_dim=6, head_embed_dim=5, a_source="hypernetwork", activation="tanh"),
}
UPDATE = {"G2", "G4", "G7", "D1", "D3"}  # what decides a step

models = pytest.mark.parametrize("model", MODELS, ids=repr)


def run_of(framework: str, model: Model, monkeypatch: pytest.MonkeyPatch, *, wide: bool = True) -> TorchRun | JaxRun:
    spec = SPECS[model.name]
    return TorchRun(model, spec, wide) if framework == "torch" else JaxRun(model, spec, wide, monkeypatch)


def distance(one: Params, other: Params) -> float:
    """Largest difference of two sets of parameters, each relative to the largest entry of its array."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, params in one.items():
        assert params.keys() == other[name].keys()
        for key, value in params.items():
            assert value.dtype == other[name][key].dtype
            worst = max(worst, np.abs(value - other[name][key]).max() / np.abs(value).max())
    return worst


@models
def test_g7_fifty_steps_in_float64_give_the_same_parameters(model, monkeypatch, tally):
    torch, jax = (run_of(framework, model, monkeypatch) for framework in ("torch", "jax"))
    start = torch.params()
    losses = [run.train(range(50)) for run in (torch, jax)]
    ratio = distance(torch.params(), jax.params()) / PARAMS_BOUND
    tally.add("training, float64", f"{model}, torch against JAX", UPDATE, ratio)
    assert ratio < 1
    assert np.abs(np.divide(*losses) - 1).max() < PARAMS_BOUND
    assert distance(torch.params(), start) > 0.01, "nothing was trained"


@models
def test_g7_fifty_steps_in_float32_give_the_same_losses(model, monkeypatch, tally):
    losses = [run_of(framework, model, monkeypatch, wide=False).train(range(50)) for framework in ("torch", "jax")]
    ratio = np.abs(np.divide(*losses) - 1).max() / LOSS_BOUND
    tally.add("training, float32", f"{model}, torch against JAX", UPDATE, ratio)
    assert ratio < 1


@models
def test_f1_training_handed_over_between_frameworks(model, monkeypatch, tmp_path, tally):
    """Three times ten steps, each by a framework that reads what the one before has written.

    An adapter's files hold no state of an optimiser, so everyone, who hands over to himself as well, starts a new one.
    Parameters pass through float32 files; equal files are what makes the next ten steps comparable in float64.
    """
    runs = {framework: run_of(framework, model, monkeypatch) for framework in ("torch", "jax")}
    relays = (("torch", "jax", "torch"), ("jax", "torch", "jax"), ("torch",) * 3, ("jax",) * 3)
    ends, files = [], []
    for number, relay in enumerate(relays):
        folders = [tmp_path / f"{number}{leg}" for leg in range(3)]
        for leg, framework in enumerate(relay):
            if leg:
                runs[framework].load(folders[leg - 1])
            else:
                runs[framework].restart()
            runs[framework].train(range(10 * leg, 10 * leg + 10))
            end = runs[framework].params()
            runs[framework].save(folders[leg])
        ends.append(end)
        files.append([(folder / "adapter_model.safetensors").read_bytes() for folder in folders])
    for (relay, other), (end, other_end) in zip(pairwise(relays), pairwise(ends), strict=True):
        ratio = distance(end, other_end) / PARAMS_BOUND
        name = f"{model}, {'-'.join(relay)} against {'-'.join(other)}"
        tally.add("exchange", name, UPDATE | {"F1", "F2"}, ratio)
        assert ratio < 1
    assert len({tuple(written) for written in files}) == 1, "equal parameters must give equal files"
    tally.add("files", f"{model}, all relays", {"F1", "F2"})
