"""Weights stored as models store them: forward, gradients and merge of both frameworks, in every layout."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hora_jax.nnx import HoraModel
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    LayerShape,
    Layout,
    Site,
    Window,
    param_shapes,
    reference,
    save_adapter,
)
from hora_spec.goldens.stored import StoredGolden, load_stored_goldens
from hora_spec.testing import check_stored
from torch import nn
from transformers.pytorch_utils import Conv1D

from .report import LOGITS_BOUND

GOLDENS = load_stored_goldens()
FORWARD = {name: golden for name, golden in GOLDENS.items() if not any(x.stacked for x in golden.layouts.values())}
SPECS = {
    "generated": AdapterSpec(rank=2, hidden_dim=3, head_embed_dim=4, alpha=3.0, residual=True),
    "a_per_head": AdapterSpec(rank=2, hidden_dim=3, head_embed_dim=4, sharing="b"),
}
EINSUMS = {
    "(h k) d": "nd,od->no",
    "d (h k)": "nd,do->no",
    "d h k": "nd,dhk->nhk",
    "d g h k": "nd,dghk->nghk",
}

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """An adapted weight, its input, and a gradient with respect to its output (tokens, rows), all float64."""

    golden: StoredGolden
    spec: AdapterSpec

    @cached_property
    def pattern(self) -> str:
        return next(iter(self.golden.layouts.values())).pattern

    @cached_property
    def layer(self) -> LayerShape:
        return LayerShape(self.golden.shapes)

    @cached_property
    def params(self) -> Arrays:
        shapes = param_shapes(self.spec, self.layer)
        drawn = {key: self._draw(i, *shape) for i, (key, shape) in enumerate(shapes.items())}
        return {key: value.astype(np.float32).astype(np.float64) for key, value in drawn.items()}  # as files hold them

    @cached_property
    def x(self) -> Any:
        return self._draw(100, 7, next(iter(self.layer.values())).embed_dim)

    @cached_property
    def matrix(self) -> Any:
        """The whole weight as (rows, embed)."""
        return Layout(self.pattern).read(self.golden.weight.astype(np.float64))

    @cached_property
    def grad_y(self) -> Any:
        return self._draw(101, 7, len(self.matrix))

    @cached_property
    def places(self) -> dict[str, Any]:
        """Rows of each projection in the matrix, told by the weights that went into it."""
        return {p: [_row(self.matrix, row) for row in part] for p, part in self.golden.parts.items()}

    @cached_property
    def expected(self) -> tuple[Any, Arrays]:
        """Output and gradients of the parameters, by the reference."""
        total = self.matrix.copy()
        for p, delta in reference.delta(self.spec, self.layer, self.params).items():
            total[self.places[p]] += delta
        of_deltas = {p: self.grad_y[:, rows].T @ self.x for p, rows in self.places.items()}
        return self.x @ total.T, reference.grads(self.spec, self.layer, self.params, of_deltas)

    def _draw(self, key: int, *shape: int) -> Any:
        return np.random.default_rng((11, key)).standard_normal(shape)


def _row(matrix: Any, row: Any) -> int:
    (found,) = np.flatnonzero((matrix == row).all(1))
    return int(found)


def on_torch(problem: Problem, route: str) -> tuple[Any, Arrays]:
    """Through PEFT, on a Linear or Conv1D that holds the same rows."""
    golden, transposed = problem.golden, problem.pattern == "d (h k)"
    rows, embed = problem.matrix.shape
    base = Conv1D(rows, embed) if transposed else nn.Linear(embed, rows, bias=False)
    base.weight.data = torch.from_numpy(problem.matrix.T.copy() if transposed else problem.matrix.copy())
    sites = {}
    for p, layout in golden.layouts.items():
        span, axis = layout.rows(golden.weight.shape), int(transposed)
        window = None if len(span) == span.size else Window(axis, span.start, span.stop, span.blocks)
        stored = Layout("d (h k)" if transposed else "(h k) d", window)
        sites[p] = Site("map", "weight", tuple(base.weight.shape), stored, golden.shapes[p])
    with tempfile.TemporaryDirectory() as folder:
        params = {key: value.astype(np.float32) for key, value in problem.params.items()}
        save_adapter(folder, Adapter({"layer": AdapterLayer(problem.spec, sites, params)}))
        model = peft.PeftModel.from_pretrained(nn.ModuleDict({"map": base.double()}), folder, is_trainable=True)
    adapted = model.base_model.model["map"]
    adapted.hora_attached["default"] = replace(adapted.hora_attached["default"], route=route)
    hypernet = adapted.hora_hyper["default"].double()
    y = adapted(torch.from_numpy(problem.x))
    y.backward(torch.from_numpy(problem.grad_y))
    return y.detach().numpy(), {key: value.grad.numpy() for key, value in hypernet.params().items()}


class Map(nnx.Module):
    """A linear map with a weight in any order of axes."""

    def __init__(self, weight: Any, einsum: str) -> None:
        self.weight, self.einsum = nnx.Param(jnp.asarray(weight)), einsum

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum, x, self.weight[...])


class Owner(nnx.Module):
    """An attention without the rest."""

    def __init__(self, inner: Map) -> None:
        self.map = inner

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.map(x)


def on_jax(problem: Problem, route: str) -> tuple[Any, Arrays]:
    """Through NNX, on the weight as it is stored."""
    golden = problem.golden
    base = Owner(Map(golden.weight.astype(np.float64), EINSUMS[problem.pattern]))
    targets = [
        hora_jax.Target("map.weight", p, layout, heads=golden.shapes[p].num_heads, layer="layer", module="map")
        for p, layout in golden.layouts.items()
    ]
    plan = hora_jax.make_plan(base, problem.spec, targets)
    assert plan.layers[0].shape == problem.layer
    phi = {"layer": {key: jnp.asarray(value)[None] for key, value in problem.params.items()}}

    def y(phi: Any) -> jax.Array:
        return HoraModel(base, plan, phi, route=route)(jnp.asarray(problem.x)).reshape(len(problem.x), -1)

    value, pull_back = jax.vjp(y, phi)
    return value, {key: grad[0] for key, grad in pull_back(jnp.asarray(problem.grad_y))[0]["layer"].items()}


FRAMEWORKS: dict[str, Callable[[Problem, str], tuple[Any, Arrays]]] = {"torch": on_torch, "jax": on_jax}


@pytest.mark.parametrize(("spec", "route"), [("generated", "branch"), ("generated", "merge"), ("a_per_head", "branch")])
@pytest.mark.parametrize("name", FORWARD)
def test_l2_outputs_and_gradients_of_every_stored_form(name, spec, route, tally):
    problem = Problem(FORWARD[name], SPECS[spec])
    expected, expected_grads = problem.expected
    for framework, run in FRAMEWORKS.items():
        y, grads = run(problem, route)
        ratios = [np.abs(np.asarray(y) - expected).max() / np.abs(expected).max() / LOGITS_BOUND]
        assert grads.keys() == expected_grads.keys()
        for key, value in expected_grads.items():
            ratios.append(np.abs(np.asarray(grads[key]) - value).max() / np.abs(value).max() / LOGITS_BOUND)
        tally.add("model", f"stored weights, {framework}", {"L1", "L2", "D3", "G7"}, max(ratios))
        assert max(ratios) < 1, framework


@pytest.mark.parametrize("name", GOLDENS)
def test_l4_merged_weights_of_every_stored_form(name, backends, tally):
    for framework in FRAMEWORKS:
        tally.add("merge", f"{framework} stored", {"L1", "L2", "L4"}, check_stored(backends[framework], GOLDENS[name]))
