"""The specification's own checks, laws and stored cases, run on every way this package computes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hora_spec import Factors
from hora_spec.testing import (
    Backend,
    LinearGrads,
    check_delta,
    check_factors,
    check_grads,
    check_init,
    check_linear,
    check_linear_grads,
    corpus,
    laws,
)
from hora_torch import functional
from hora_torch.hypernet import HoraHypernet
from hora_torch.merging import merged_weight

CORPUS = corpus()


def to_torch(array: Any) -> Any:
    """A tensor of the array's dtype; NumPy has bfloat16 from ml_dtypes."""
    if array is None:
        return None
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def init_params(spec, layer, seed, name):
    return {key: to_numpy(value) for key, value in HoraHypernet(spec, layer, name=name, seed=seed).params().items()}


def generator(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (spec, layer, params) on NumPy arrays."""

    def wrapped(spec, layer, params):
        result = function(spec, layer, {key: to_torch(value) for key, value in params.items()})
        return {
            p: Factors(*map(to_numpy, value)) if isinstance(value, tuple) else to_numpy(value)
            for p, value in result.items()
        }

    return wrapped


def module_factors(spec, layer, params):
    """The factors as the module in a model generates them."""
    module = HoraHypernet(spec, layer, name="x").to(next(iter(params.values())).dtype)
    with torch.no_grad():
        for key, param in module.params().items():
            param.copy_(params[key])
    return module()


def linear(route: str, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of one route on NumPy arrays."""

    def run(x, weight, bias, a, b, scaling):
        return functional.hora_linear(x, weight, bias, Factors(a, b), scaling, route=route)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")

    def forward(x, weight, bias, factors, scaling):
        return to_numpy(run(*map(to_torch, (x, weight, bias, *factors)), scaling))

    def backward(x, weight, bias, factors, scaling, cotangent):
        leaves = [to_torch(value).requires_grad_() for value in (x, *factors)]
        y = run(leaves[0], to_torch(weight), to_torch(bias), *leaves[1:], scaling)
        return LinearGrads(*map(to_numpy, torch.autograd.grad(y, leaves, to_torch(cotangent))))

    return forward, backward


def merge(weight, delta, layout):
    delta = to_torch(np.ascontiguousarray(delta))
    return to_numpy(merged_weight(to_torch(weight), [(layout, torch.eye(delta.shape[1]).to(delta), delta, 1.0)]))


def grads(spec, layer, params, cotangents):
    leaves = {key: to_torch(value).requires_grad_() for key, value in params.items()}
    delta = functional.delta(spec, layer, leaves)
    torch.autograd.backward([delta[p] for p in layer], [to_torch(cotangents[p]) for p in layer])
    nothing = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}  # of what is fixed
    return {key: to_numpy(nothing[key] if leaf.grad is None else leaf.grad) for key, leaf in leaves.items()}


def backend(
    name: str, route: str, *, compiled: bool = False, factors: Callable[..., Any] = functional.factors
) -> Backend:
    forward, backward = linear(route, compiled)
    return Backend(
        f"torch {name}", init_params, generator(factors), generator(functional.delta), forward, backward, merge, grads
    )


BRANCH = backend("branch", "branch")
MERGE = backend("merge", "merge")
MODULE = backend("module", "auto", factors=module_factors)
COMPILED = backend("compiled", "branch", compiled=True)
CHECKS = [check_init, check_factors, check_delta, check_linear, check_linear_grads, check_grads]
LAWS = [
    laws.law_start,
    laws.law_permutation,
    laws.law_scale_and_shift,
    laws.law_merged_forward,
    laws.law_finite_differences,
]


def test_the_corpus_is_not_empty():
    assert len(CORPUS) > 40


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", [BRANCH, MERGE, MODULE], ids=lambda backend: backend.name)
def test_every_case_of_the_corpus_is_computed_as_specified(backend, check, dtype):
    for case in CORPUS:
        assert check(backend, case, dtype) <= 1


@pytest.mark.parametrize("check", [check_linear, check_linear_grads], ids=lambda check: check.__name__)
def test_sixteen_bit_activations_keep_within_their_rounding(check):
    for case in CORPUS:
        assert check(BRANCH, case, "bfloat16") <= 1


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_hold(law):
    for case in CORPUS:
        assert law(BRANCH, case, "float32") <= 1


@pytest.mark.parametrize("check", [check_linear, check_linear_grads], ids=lambda check: check.__name__)
def test_compiled_is_as_exact_as_eager(check):
    for case in CORPUS[:2]:
        assert check(COMPILED, case, "float32") <= 1
