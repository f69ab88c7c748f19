"""Dropout means the same in both frameworks: claims about masks, seen on deltas that hand their input through.

Random streams differ, so masks do; which inputs are dropped together, how the rest is scaled, and when, do not.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hora_jax import Target, adapt
from hora_spec import AdapterSpec, HoraError, Layout, Window
from hora_torch import HoraConfig
from numpy.typing import NDArray
from torch import nn

EMBED, HEADS, RATE = 16, 4, 0.25
X = np.random.default_rng(0).uniform(1, 2, (2, 60, EMBED)).astype("float32")
NAMES = ("q_proj", "v_proj", "qkv")
Outputs = Mapping[str, NDArray[np.float32]]


class Attention(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.num_heads = HEADS
        for name in names:
            linear = nn.Linear(EMBED, (3 if name == "qkv" else 1) * EMBED, bias=False)
            self.add_module(name, linear)
            nn.init.zeros_(linear.weight)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: linear(x) for name, linear in self.named_children()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.apart, self.fused = Attention("q_proj", "v_proj"), Attention("qkv")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**self.apart(x), **self.fused(x)}


def by_torch(route: str, seed: int | None) -> Outputs:
    """Outputs in training with a seed, or in evaluation."""
    config = HoraConfig(
        r=EMBED,
        hora_alpha=EMBED,
        sharing="a",
        target_modules=list(NAMES),
        row_order={"qkv": "q k v"},
        num_heads=HEADS,
        num_kv_heads=HEADS,
        hora_dropout=RATE,
        route=route,
    )
    model = peft.get_peft_model(Model(), config).train(seed is not None)
    with torch.no_grad(), torch.random.fork_rng():
        for name, parameter in model.named_parameters():
            if "hora_hyper" in name:
                parameter.copy_(torch.eye(EMBED).reshape(parameter.shape))
        torch.manual_seed(seed or 0)
        return {name: value.numpy() for name, value in model(torch.tensor(X)).items()}


@cache
def _jax() -> tuple[Any, Any, Any]:
    params = {name: jnp.zeros((EMBED, (3 if name == "qkv" else 1) * EMBED), "float32") for name in NAMES}
    targets = [Target(f"{p}_proj", p, "d (h k)", HEADS, layer="apart") for p in "qv"]
    windows = {"q": Window(1, 0, EMBED), "v": Window(1, 2 * EMBED, 3 * EMBED)}
    targets += [Target("qkv", p, Layout("d (h k)", windows[p]), HEADS, layer="fused") for p in "qv"]
    plan = hora_jax.make_plan(params, AdapterSpec(EMBED, sharing="a", alpha=EMBED), targets)
    shapes = hora_jax.init(plan)
    phi = jax.tree.map(lambda v: jnp.broadcast_to(jnp.eye(EMBED, dtype=v.dtype).reshape(v.shape[1:]), v.shape), shapes)
    return plan, params, phi


def by_jax(route: str, seed: int | None) -> Outputs:
    plan, params, phi = _jax()
    adapted = adapt(lambda params: {name: X @ w for name, w in params.items()}, plan, route=route, dropout=RATE)
    out = jax.jit(adapted)(params, phi, dropout_key=None if seed is None else jax.random.key(seed))
    return {name: np.asarray(value) for name, value in out.items()}


BACKENDS = pytest.mark.parametrize("run", [by_torch, by_jax], ids=["torch", "jax"])
Run = Callable[[str, int | None], Outputs]


def projections(outputs: Outputs) -> dict[str, NDArray[np.float32]]:
    q, k, v = np.split(outputs["qkv"], 3, axis=-1)
    assert not k.any()  # not adapted
    return {"q": outputs["q_proj"], "v": outputs["v_proj"], "fused q": q, "fused v": v}


@BACKENDS
def test_a_branch_reads_an_input_of_which_entries_are_dropped_one_by_one(run: Run) -> None:
    for value in projections(run("branch", 1)).values():
        kept = value != 0
        np.testing.assert_allclose(value, np.where(kept, X / (1 - RATE), 0), rtol=1e-5)
        assert abs(kept.mean() - (1 - RATE)) < 0.04
        assert 0 < kept[0].mean(1).min() < kept[0].mean(1).max() <= 1  # neither tokens nor features as a whole


@BACKENDS
def test_modules_drop_on_their_own_and_projections_of_one_weight_together(run: Run) -> None:
    kept = {name: value != 0 for name, value in projections(run("branch", 1)).items()}
    assert np.array_equal(kept["fused q"], kept["fused v"])
    apart = RATE**2 + (1 - RATE) ** 2  # how often two independent masks agree
    for one, other in (("q", "v"), ("q", "fused q"), ("v", "fused q")):
        assert abs((kept[one] == kept[other]).mean() - apart) < 0.05


@BACKENDS
def test_a_seed_or_key_repeats_the_masks_and_another_one_does_not(run: Run) -> None:
    one, again, other = (projections(run("branch", seed)) for seed in (1, 1, 2))
    for name, value in one.items():
        np.testing.assert_array_equal(value, again[name])
        assert not np.array_equal(value, other[name])


@BACKENDS
def test_evaluation_drops_nothing(run: Run) -> None:
    for value in projections(run("branch", None)).values():
        np.testing.assert_allclose(value, X, rtol=1e-5)


@BACKENDS
def test_where_products_would_be_merged_a_branch_is_taken_to_drop_its_input(run: Run) -> None:
    assert X.size > EMBED**2  # `auto` merges without dropout
    assert any((value == 0).any() for value in projections(run("auto", 1)).values())


def test_a_route_without_branch_drops_on_torch_by_a_branch_and_is_refused_on_jax() -> None:
    assert any((value == 0).any() for value in projections(by_torch("merge", 1)).values())
    with pytest.raises(HoraError, match='route="merge", which has none'):
        by_jax("merge", 1)
