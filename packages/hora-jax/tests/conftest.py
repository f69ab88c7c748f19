"""Eight CPU devices, float64 on request, this package as a backend of the conformance kit, and small models."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import functional
from hora_spec import AdapterSpec, Factors, LayerShape, init_params
from hora_spec.testing import Backend, LinearGrads
from hora_spec.testing.profiles import use_fast

use_fast()
jax.config.update("jax_default_matmul_precision", "highest")  # what a GPU needs to be compared with anything


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@cache
def make_backend(route: functional.Route = "branch") -> Backend:
    """`hora_jax.functional` behind NumPy arrays, every function compiled."""
    generate = jax.jit(functional.factors, static_argnums=(0, 1))
    update = jax.jit(functional.delta, static_argnums=(0, 1))
    linear = jax.jit(partial(functional.hora_linear, route=route), static_argnums=4)
    add = jax.jit(functional.merge, static_argnums=2)

    @partial(jax.jit, static_argnums=(0, 1))
    def pull(spec: AdapterSpec, layer: LayerShape, params: Any, cotangents: Any) -> Any:
        return jax.vjp(partial(functional.delta, spec, layer), params)[1](cotangents)[0]

    @partial(jax.jit, static_argnums=4)
    def pull_linear(x: Any, weight: Any, bias: Any, factors: Factors, scaling: float, g: Any) -> LinearGrads:
        _, pullback = jax.vjp(lambda x, f: functional.hora_linear(x, weight, bias, f, scaling, route=route), x, factors)
        grad_x, grads = pullback(g)
        return LinearGrads(grad_x, *grads)

    def on_host(function: Any) -> Any:
        def call(*args: Any) -> Any:
            return jax.tree.map(np.asarray, function(*(dict(a) if _is_dict(a) else a for a in args)))

        return call

    names = (generate, update, linear, pull_linear, add, pull)
    return Backend(f"hora_jax {route}", init_params, *map(on_host, names))


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and not isinstance(value, LayerShape)


@pytest.fixture
def backends() -> Any:
    return make_backend


@pytest.fixture
def backend() -> Backend:
    return make_backend()


class Block(nnx.Module):
    """Attention with normalisation statistics, dropout and a key-value cache: every kind of state a base can have."""

    def __init__(self, rngs: nnx.Rngs, *, decode: bool = False) -> None:
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, 16, decode=decode, dropout_rate=0.0, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(self.attn(self.norm(x)))


class Tower(nnx.Module):
    """A stack of blocks in a list."""

    def __init__(self, rngs: nnx.Rngs, *, depth: int = 2, decode: bool = False) -> None:
        self.blocks = nnx.List([Block(rngs, decode=decode) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def make_llama() -> Callable[..., nnx.Module]:
    """A small LLaMA with grouped queries, and changes of its configuration."""
    models = pytest.importorskip("hora_bench.models.llama", reason="hora-bench is not installed", exc_type=ImportError)
    config = models.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    return lambda **changes: models.Llama(config.replace(**changes), rngs=nnx.Rngs(0))


@pytest.fixture
def make_vit() -> Callable[..., nnx.Module]:
    """A small ViT with fused projections, and changes of its configuration."""
    models = pytest.importorskip("hora_bench.models.vit", reason="hora-bench is not installed", exc_type=ImportError)
    config = models.ViTConfig(
        image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, mlp_dim=24, num_classes=3
    )
    return lambda **changes: models.ViT(config.replace(**changes), rngs=nnx.Rngs(0))


@pytest.fixture
def tower() -> Tower:
    model = Tower(nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 5, 16))


SINCE = {"maxtext": (3, 12)}
"""Python from which on a library is there."""


@pytest.fixture
def library() -> Callable[[str], Any]:
    """Import a library of users; where it is missing the test is skipped, but in the session that installs them all."""
    if os.environ.get("HORA_TEST_LIBRARIES"):
        return _import
    return lambda name: pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def _import(name: str) -> Any:
    if sys.version_info < (since := SINCE.get(name, (3,))):
        pytest.skip(f"{name} needs Python {'.'.join(map(str, since))}")
    return import_module(name)


def perturbed(phi: Any, seed: int = 0) -> Any:
    """The adapter with every value moved, so that no delta is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: v + jnp.asarray(0.3 * rng.normal(size=v.shape), v.dtype), phi)


@pytest.fixture(name="perturbed")
def _perturbed() -> Any:
    return perturbed


@pytest.fixture
def method() -> AdapterSpec:
    return AdapterSpec(4, hidden_dim=6, head_embed_dim=5)
