"""Mutants of the adapted projection, of its backward pass, and of merging."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.layout import Layout, Window
from hora_spec.reference import Factors
from hora_spec.testing.backend import Backend, LinearGrads
from hora_spec.testing.checks import check_linear, check_linear_grads
from hora_spec.testing.merging import check_merge, check_merge_refuses
from hora_spec.testing.mutants.mutant import mutant

Array = NDArray[Any]


@mutant("D1", check_linear)
def unscaled_linear(backend: Backend) -> Backend:
    """The adapted projection forgets the scaling."""
    return backend._replace(hora_linear=lambda x, w, bias, factors, _: backend.hora_linear(x, w, bias, factors, 1.0))


@mutant("D3", check_linear)
def no_bias(backend: Backend) -> Backend:
    """The adapted projection forgets the bias."""
    return backend._replace(hora_linear=lambda x, w, _, factors, s: backend.hora_linear(x, w, None, factors, s))


@mutant("D3", check_linear)
def linear_heads_reversed(backend: Backend) -> Backend:
    """The adapted projection takes heads in reverse."""

    def hora_linear(x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float) -> Array:
        a, b = factors
        reverse = Factors(a if a.ndim == 2 else a[::-1].copy(), b[::-1].copy())
        return backend.hora_linear(x, weight, bias, reverse, scaling)

    return backend._replace(hora_linear=hora_linear)


@mutant("D3", check_linear)
def first_token(backend: Backend) -> Backend:
    """The update of the first token of a sequence is added to all of them."""

    def hora_linear(x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float) -> Array:
        frozen = backend.hora_linear(x, weight, bias, factors, 0.0)
        update = backend.hora_linear(x, weight, bias, factors, scaling) - frozen
        return frozen + update[:, :1]

    return backend._replace(hora_linear=hora_linear)


@mutant("G7", check_linear_grads)
def base_gradient_alone(backend: Backend) -> Backend:
    """The gradient of x leaves out the adapter."""

    def linear_grads(
        x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float, cotangent: Array
    ) -> LinearGrads:
        honest = backend.linear_grads(x, weight, bias, factors, scaling, cotangent)
        return honest._replace(x=backend.linear_grads(x, weight, bias, factors, 0.0, cotangent).x)

    return backend._replace(linear_grads=linear_grads)


@mutant("G7", check_linear_grads)
def unscaled_factor_gradients(backend: Backend) -> Backend:
    """The gradients of the factors forget the scaling."""

    def linear_grads(
        x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float, cotangent: Array
    ) -> LinearGrads:
        honest = backend.linear_grads(x, weight, bias, factors, scaling, cotangent)
        return honest._replace(a=honest.a / scaling, b=honest.b / scaling)

    return backend._replace(linear_grads=linear_grads)


@mutant("G7", check_linear_grads)
def last_batch_alone(backend: Backend) -> Backend:
    """The gradients of the factors come from the last of the batch alone."""

    def linear_grads(
        x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float, cotangent: Array
    ) -> LinearGrads:
        honest = backend.linear_grads(x, weight, bias, factors, scaling, cotangent)
        return backend.linear_grads(x[-1:], weight, bias, factors, scaling, cotangent[-1:])._replace(x=honest.x)

    return backend._replace(linear_grads=linear_grads)


@mutant("M1", check_merge, "float16")
def narrow_merge(backend: Backend) -> Backend:
    """The delta is rounded to the weight's dtype, then added in it."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        return backend.merge(weight, delta.astype(weight.dtype).astype(delta.dtype), layout)

    return backend._replace(merge=merge)


@mutant("M1", check_merge, "float16")
def biased_merge(backend: Backend) -> Backend:
    """The merged weight is rounded towards zero."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        exact = backend.merge(weight.astype(np.float64), delta.astype(np.float64), layout)
        merged = exact.astype(weight.dtype)
        return np.where(np.abs(merged) > np.abs(exact), np.nextafter(merged, np.zeros_like(merged)), merged)

    return backend._replace(merge=merge)


@mutant("M1", check_merge)
def double_rounding(backend: Backend) -> Backend:
    """The merged weight is rounded to half precision, then to the weight's dtype."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        index, merged = layout.index(weight.shape), backend.merge(weight, delta, layout)
        merged = np.array(merged)
        merged[index] = merged[index].astype(np.float16).astype(weight.dtype)
        return merged

    return backend._replace(merge=merge)


@mutant("M1", check_merge)
def merged_twice(backend: Backend) -> Backend:
    """The delta is added twice."""
    return backend._replace(
        merge=lambda weight, delta, layout: backend.merge(backend.merge(weight, delta, layout), delta, layout)
    )


@mutant("L2", check_merge)
def window_at_the_start(backend: Backend) -> Backend:
    """The window of a fused weight starts at 0."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        if layout.window is not None:
            axis, start, stop = layout.window.axis, layout.window.start, layout.window.stop
            layout = Layout(layout.pattern, Window(axis, 0, stop - start))
        return backend.merge(weight, delta, layout)

    return backend._replace(merge=merge)


@mutant("L2", check_merge)
def blocks_as_one(backend: Backend) -> Backend:
    """A window of blocks is read as one range that begins in the first block."""
    return _on_blocks(backend, lambda w: Window(w.axis, w.start, w.start + w.blocks * (w.stop - w.start)))


@mutant("L2", check_merge)
def parts_before_blocks(backend: Backend) -> Backend:
    """Rows stored as [head][q k v] are read as [q k v][head]."""
    return _on_blocks(backend, lambda w: Window(w.axis, w.blocks * w.start, w.blocks * w.stop))


@mutant("L2", check_merge)
def blocks_backwards(backend: Backend) -> Backend:
    """The blocks of a window follow each other in the opposite order."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        if layout.window is not None and layout.window.blocks > 1 and "hk" in layout.axes:
            blocks = delta.reshape(layout.window.blocks, -1, delta.shape[-1])
            delta = blocks[::-1].reshape(delta.shape)
        return backend.merge(weight, delta, layout)

    return backend._replace(merge=merge)


@mutant("L1", check_merge)
def groups_within_heads(backend: Backend) -> Backend:
    """Heads stored in groups are numbered across the groups."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        if "g" in layout.axes:
            groups = dict(zip(layout.axes, layout.window_shape(weight.shape), strict=True))["g"]
            width = layout.window_shape(weight.shape)[layout.axes.index("k")] if "k" in layout.axes else 1
            rows = delta.reshape(*delta.shape[:-2], groups, -1, width, delta.shape[-1])
            delta = rows.swapaxes(-4, -3).reshape(delta.shape)
        return backend.merge(weight, delta, layout)

    return backend._replace(merge=merge)


@mutant("L4", check_merge)
def first_layer_for_all(backend: Backend) -> Backend:
    """The delta of the first stacked layer is added to all layers."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        return backend.merge(weight, np.stack([delta[0]] * len(delta)) if layout.stacked else delta, layout)

    return backend._replace(merge=merge)


@mutant("M2", check_merge)
def merged_in_place(backend: Backend) -> Backend:
    """Merging changes the weight that it is given."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        weight[...] = backend.merge(weight, delta, layout)
        return weight

    return backend._replace(merge=merge)


@mutant("M3", check_merge_refuses)
def careless_merge(backend: Backend) -> Backend:
    """What cannot be merged is merged silently."""

    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        try:
            return backend.merge(weight, delta, layout)
        except HoraError:
            return weight

    return backend._replace(merge=merge)


def _on_blocks(backend: Backend, change: Callable[[Window], Window]) -> Backend:
    def merge(weight: Array, delta: Array, layout: Layout) -> Array:
        if layout.window is not None and layout.window.blocks > 1:
            layout = Layout(layout.pattern, change(layout.window))
        return backend.merge(weight, delta, layout)

    return backend._replace(merge=merge)
