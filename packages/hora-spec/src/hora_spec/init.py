"""Initial values, reproducible to the bit from (seed, layer name, parameter name) (spec I1 to I6).

Everything between the raw 64-bit stream and the float32 result is addition, multiplication, division, square root
and rounding, which IEEE 754 fixes to the bit; no function of a mathematics library is called on the way.
"""

import hashlib
import math
import operator

import numpy as np
from numpy.typing import NDArray

from hora_spec.activations import mean_square_uniform
from hora_spec.errors import HoraError
from hora_spec.shapes import LayerShape, param_shapes
from hora_spec.spec import AdapterSpec


def init_params(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> dict[str, NDArray[np.float32]]:
    """Initial parameters of one layer; its delta is exactly zero (spec I4, I5).

    Parameters
    ----------
    spec, layer
        Method and shape of the layer.
    seed
        Any integer of at least 0.
    name
        Name of the layer in its model: the dotted path of its attention module. Layers with other names get other
        values, so adding a layer changes no other layer.

    Returns
    -------
    dict
        Canonical name to float32 array, in the order of `param_shapes`.

    Raises
    ------
    HoraError
        If `seed` is not such an integer or `name` not a non-empty string without NUL (spec I1).
    """
    seed = _checked_seed(seed)
    if not isinstance(name, str) or not name or "\0" in name:
        raise HoraError(f"a layer name is a non-empty string without NUL, got {name!r} (spec I1)")
    return {
        key: _init_one(spec, layer, key, shape, raw_stream(seed, name, key, math.prod(shape)))
        for key, shape in param_shapes(spec, layer).items()
    }


def raw_stream(seed: int, layer_name: str, param_name: str, size: int) -> NDArray[np.uint64]:
    """First `size` 64-bit words of the Philox 4x64-10 stream keyed by three names (spec I1).

    The key is the first 16 bytes, little-endian, of SHA-256 of ``hora NUL seed NUL layer NUL parameter`` in UTF-8, the
    counter starts at zero.
    """
    digest = hashlib.sha256(f"hora\0{seed}\0{layer_name}\0{param_name}".encode()).digest()
    stream = np.random.Philox(counter=0, key=int.from_bytes(digest[:16], "little"))
    return np.asarray(stream.random_raw(size), dtype=np.uint64)


def uniform(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """``((raw >> 12) + 1/2) / 2^52``: uniform in the open unit interval, exact in float64 (spec I2)."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normals: the inverse distribution function of `uniform`, by Wichura's rational functions (spec I3)."""
    p = uniform(raw)
    q = p - 0.5
    central = _ratio(0.180625 - q * q, _CENTRAL) * q
    # distance from the nearer end of the unit interval; its logarithm matters in the tails alone
    r = np.sqrt(-_log(np.minimum(p, 1 - p)))
    tail = np.where(r <= 5, _ratio(r - 1.6, _TAIL), _ratio(r - 5, _FAR_TAIL))
    return np.where(np.abs(q) <= 0.425, central, np.copysign(tail, q))


def _init_one(
    spec: AdapterSpec, layer: LayerShape, key: str, shape: tuple[int, ...], raw: NDArray[np.uint64]
) -> NDArray[np.float32]:
    kind, _, projection = key.partition(".")
    if kind == "a_seed":
        return np.ones(shape, np.float32)
    if kind == "gate":
        return np.full(shape, spec.gate, np.float32)
    if kind in ("b_out", "b"):
        return np.zeros(shape, np.float32)
    if kind == "head_embed":
        return normal(raw).reshape(shape).astype(np.float32)
    bound = _bound(spec, kind, shape[-1] if kind == "a" else layer[projection].embed_dim if projection else 0)
    return ((2 * uniform(raw) - 1) * bound).reshape(shape).astype(np.float32)


def _bound(spec: AdapterSpec, kind: str, embed_dim: int) -> float:
    """Bound of a uniform parameter, rounded to float32 so that no last bit of a libm reaches the values (spec I5)."""
    if kind == "a_in":
        bound = spec.seed_bound
    elif kind == "b_in":
        bound = 1 / math.sqrt(spec.head_embed_dim)
    elif kind == "a":
        bound = 1 / math.sqrt(embed_dim)
    else:  # a_out: var(A) = gain_a^2 * hidden * bound^2 / 3 * E[s(u)^2] = 1 / (3 * embed)
        mean_square = mean_square_uniform(spec.activation, spec.seed_bound)
        bound = 1 / (spec.gain_a * math.sqrt(spec.hidden_dim * embed_dim * mean_square))
    return float(np.float32(bound))


def _checked_seed(seed: int) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or number < 0:
        raise HoraError(f"seed must be an integer of at least 0, got {seed!r} (spec I1)")
    return number


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm from IEEE operations alone: x = f 2^k, log f = 2 artanh((f - 1) / (f + 1)) (spec I3)."""
    f, k = np.frexp(x)
    below = f < _SQRT_HALF
    f, k = np.where(below, 2 * f, f), np.where(below, k - 1, k)
    s = (f - 1) / (f + 1)
    z = s * s
    series = np.zeros_like(z)
    for n in range(25, 0, -2):
        series = series * z + 1 / n
    return k * _LN_2 + 2 * s * series


def _ratio(x: NDArray[np.float64], coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> NDArray[np.float64]:
    numerator, denominator = (_horner(x, c) for c in coefficients)
    return numerator / denominator


def _horner(x: NDArray[np.float64], coefficients: tuple[float, ...]) -> NDArray[np.float64]:
    value = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


_LN_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476

# Wichura, "Algorithm AS 241: The percentage points of the normal distribution", Applied Statistics 37 (1988),
# function PPND16: coefficients of the rational functions, ascending powers, numerator and denominator.
_CENTRAL = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAIL = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR_TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)
