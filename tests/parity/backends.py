"""torch and JAX as backends of the conformance kit: NumPy in, NumPy out, every number computed by the framework.

Importing this module switches JAX to 64 bits; float32 arrays stay float32.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import hora_jax
import hora_jax.functional
import hora_torch.functional
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from hora_spec import AdapterSpec, Factors, LayerShape, Layout
from hora_spec.testing import Backend, LinearGrads
from hora_torch.hypernet import HoraHypernet
from hora_torch.merging import merged_weight

jax.config.update("jax_enable_x64", True)
torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096  # one for each case

COMPILER = "aot_eager"  # all that torch.compile does before inductor, which needs a C++ compiler and minutes


def torch_backend(route: str = "branch", *, compiler: str | None = None) -> Backend:
    """`hora_torch` on CPU; `compiler` is a backend of `torch.compile`."""
    compiled = partial(torch.compile, backend=compiler, fullgraph=True, dynamic=False) if compiler else lambda f: f

    @cache
    def bound(name: str, *static: Any) -> Callable[..., Any]:
        return compiled(partial(getattr(hora_torch.functional, name), *static))

    linear = compiled(partial(hora_torch.functional.hora_linear, route=route))

    def factors(spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Any]) -> dict[str, Factors]:
        generated = bound("factors", spec, layer)(_tensors(params))
        return {p: Factors(*map(from_torch, pair)) for p, pair in generated.items()}

    def delta(spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Any]) -> dict[str, Any]:
        return {p: from_torch(value) for p, value in bound("delta", spec, layer)(_tensors(params)).items()}

    def grads(
        spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Any], cotangents: Mapping[str, Any]
    ) -> dict[str, Any]:
        leaves = {key: value.requires_grad_() for key, value in _tensors(params).items()}
        deltas = bound("delta", spec, layer)(leaves)
        torch.autograd.backward([deltas[p] for p in layer], [to_torch(cotangents[p]) for p in layer])
        nothing = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}  # of what is fixed
        return {key: from_torch(nothing[key] if leaf.grad is None else leaf.grad) for key, leaf in leaves.items()}

    def hora_linear(x: Any, weight: Any, bias: Any, factors: Factors, scaling: float) -> Any:
        return from_torch(linear(*map(to_torch, (x, weight, bias)), _factors(factors), scaling))

    def linear_grads(x: Any, weight: Any, bias: Any, factors: Factors, scaling: float, cotangent: Any) -> LinearGrads:
        x, weight, bias = map(to_torch, (x, weight, bias))
        leaves = (x, *_factors(factors))
        for leaf in leaves:
            leaf.requires_grad_()
        linear(x, weight, bias, Factors(*leaves[1:]), scaling).backward(to_torch(cotangent))
        return LinearGrads(*(from_torch(leaf.grad) for leaf in leaves))

    return Backend(
        f"torch {route} {compiler or 'eager'}",
        _torch_init,
        factors,
        delta,
        hora_linear,
        linear_grads,
        _torch_merge,
        grads,
    )


def to_torch(value: Any) -> Any:
    """A tensor that holds the bits of an array; None stays None."""
    if value is None:
        return None
    if value.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def from_torch(tensor: torch.Tensor) -> Any:
    """An array that holds the bits of a tensor."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensors(params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: to_torch(value) for key, value in params.items()}


def _factors(factors: Factors) -> Factors:
    return Factors(*map(to_torch, factors))


def _torch_init(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> dict[str, Any]:
    hypernet = HoraHypernet(spec, layer, name=name, seed=seed)
    return {key: from_torch(param) for key, param in hypernet.params().items()}


def _torch_merge(weight: Any, delta: Any, layout: Layout) -> Any:
    """Through the merge of an adapted module; forms that no torch module stores are read and written by layout."""
    if len(layout.axes) == 2 and (layout.window is None or layout.axes[layout.window.axis] == "hk"):
        identity = torch.eye(delta.shape[1], dtype=to_torch(delta).dtype)
        return from_torch(merged_weight(to_torch(weight), [(layout, identity, to_torch(delta), 1.0)]))
    canonical = layout.read(weight)
    merged = _torch_merge(*(part.reshape(-1, delta.shape[-1]) for part in (canonical, delta)), Layout())
    result = weight.copy()
    result[layout.index(weight.shape)] = layout.write(merged.reshape(canonical.shape), weight.shape)
    return result


def jax_backend(route: str = "branch", *, jit: bool = True) -> Backend:
    """`hora_jax` on CPU, traced or operation by operation."""
    functional = hora_jax.functional
    compiled = jax.jit if jit else lambda function, **_: function

    def everything(spec: AdapterSpec, layer: LayerShape, params: Any, cotangents: Any) -> Any:
        deltas, pull_back = jax.vjp(partial(functional.delta, spec, layer), params)
        return functional.factors(spec, layer, params), deltas, pull_back(cotangents)[0]

    def linear_vjp(x: Any, weight: Any, bias: Any, factors: Any, scaling: float, cotangent: Any) -> Any:
        def y(x: Any, factors: Any) -> Any:
            return functional.hora_linear(x, weight, bias, factors, scaling, route=route)

        return jax.vjp(y, x, factors)[1](cotangent)

    run_generation = compiled(everything, static_argnums=(0, 1))  # one program for each shape: compiling is the cost
    run_linear = compiled(partial(functional.hora_linear, route=route), static_argnums=4)
    run_linear_vjp = compiled(linear_vjp, static_argnums=4)

    def generate(spec: AdapterSpec, layer: LayerShape, params: Any, cotangents: Any = None) -> Any:
        dtype = next(iter(params.values())).dtype
        cotangents = cotangents or {p: np.zeros(shape.weight_shape, dtype) for p, shape in layer.items()}
        return _to_numpy(run_generation(spec, layer, *map(_on_device, (dict(params), dict(cotangents)))))

    def linear_grads(*args: Any) -> LinearGrads:
        x, factors = run_linear_vjp(*_on_device(args[:4]), args[4], _on_device(args[5]))
        return LinearGrads(*_to_numpy((x, *factors)))

    return Backend(
        f"jax {route} {'jit' if jit else 'eager'}",
        _jax_init,
        lambda *of: generate(*of)[0],
        lambda *of: generate(*of)[1],
        lambda *args: _to_numpy(run_linear(*_on_device(args[:4]), args[4])),
        linear_grads,
        _jax_merge,
        lambda *of: generate(*of)[2],
    )


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _jax_init(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> dict[str, Any]:
    """Through a plan of canonical weights whose layer is called `name`."""
    tree = {p: jnp.zeros(shape.weight_shape) for p, shape in layer.items()}
    targets = [hora_jax.Target(p, p, "(h k) d", shape.num_heads, layer=name) for p, shape in layer.items()]
    phi = hora_jax.init(hora_jax.make_plan(tree, spec, targets), seed)
    return {key: np.asarray(value[0]) for key, value in phi[name].items()}


def _jax_merge(weight: Any, delta: Any, layout: Layout) -> Any:
    """Through `hora_jax.merge`: any delta is an adapter of full rank, with A = 1 and free B = delta."""
    embed = delta.shape[-1]
    name = "layer.{l}" if layout.stacked else "layer"
    sizes = dict(zip(layout.axes, layout.window_shape(weight.shape), strict=True))
    heads = None if "h" in sizes else sizes.get("g", 1)  # that of a free B changes nothing
    target = hora_jax.Target("weight", "p", layout, heads=heads, layer=name)
    plan = hora_jax.make_plan({"weight": weight}, AdapterSpec(embed, sharing="a"), target)
    shape, layers = plan.layers[0].shape["p"], plan.layers[0].names
    a = np.broadcast_to(np.eye(embed, dtype=delta.dtype), (len(layers), embed, embed))
    b = delta.reshape(len(layers), shape.num_heads, shape.head_dim, embed)
    phi = {plan.layers[0].name: {"a.p": jnp.asarray(a), "b.p": jnp.asarray(b)}}
    return np.asarray(hora_jax.merge(plan, {"weight": jnp.asarray(weight)}, phi)["weight"])
