"""One pair of factors for each stored weight: its product is the delta of all projections, in the weight's own form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target, make_plan
from hora_jax.pairs import pairs
from hora_spec import AdapterSpec, Factors, HoraError, Layout, ProjectionShape, Window
from hora_spec.testing import merging

SHAPE = ProjectionShape(num_heads=4, head_dim=3, embed_dim=5)
ROWS = SHAPE.num_heads * SHAPE.head_dim
FORMS = [
    *merging.stored_forms(SHAPE),
    (Layout("d l h k"), (5, 2, 4, 3)),
    (Layout("(h k) d", Window(1, 2, 7)), (ROWS, 9)),
    (Layout("d h k", Window(0, 0, 5, blocks=1)), (8, 4, 3)),
]
OWN = pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])


def spec_of(own: bool) -> AdapterSpec:
    return AdapterSpec(2, sharing="none" if own else "a", alpha=6.0)


def some(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("float32")


def drawn(own: bool, layers: int, number: int = 0) -> Factors:
    a = (SHAPE.num_heads, 2, SHAPE.embed_dim) if own else (2, SHAPE.embed_dim)
    b = (SHAPE.num_heads, SHAPE.head_dim, 2)
    return Factors(*(jnp.asarray(some(layers, *shape) + number) for shape in (a, b)))


def stored(factors: Factors, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """Delta of a weight, by the equation; of stacked layers, or of one."""
    a, b = map(np.asarray, factors)
    product = np.einsum("lhkr,lhrd->lhkd" if a.ndim == b.ndim else "lhkr,lrd->lhkd", b, a)
    delta = 3.0 * product.reshape(len(b), ROWS, -1)
    whole = np.zeros(shape, "float32")
    whole[layout.index(shape)] = layout.write(delta if layout.stacked else delta[0], shape)
    return whole


def planned(spec, targets, **shapes):
    leaves = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    (members,) = make_plan(leaves, spec, targets).groups().values()
    return members


def assert_pairs(members, stacked, expected):
    found = {path: (a, b) for path, a, b in pairs(members, stacked)}
    assert found.keys() == expected.keys()
    for path, (a, b) in found.items():
        assert all(len(set(sizes) - {1}) <= 1 for sizes in zip(a.shape, b.shape, expected[path].shape, strict=False))
        np.testing.assert_allclose((a * b).sum(-1), expected[path], rtol=1e-5, atol=1e-5)


@OWN
@pytest.mark.parametrize(("layout", "shape"), FORMS, ids=str)
def test_the_product_of_a_pair_is_the_delta_in_every_stored_form(layout, shape, own):
    names, heads = ["w"] if layout.stacked else ["w", "x"], None if "h" in layout.axes else SHAPE.num_heads
    targets = [Target(n, "q", layout, heads, layer=f"{n}.{{l}}" if layout.stacked else n) for n in names]
    members = planned(spec_of(own), targets, **dict.fromkeys(names, shape))
    factors = drawn(own, 2)
    if layout.stacked:
        expected = {"w": stored(factors, layout, shape)}
    else:
        expected = {n: stored(Factors(*(f[i : i + 1] for f in factors)), layout, shape) for i, n in enumerate(names)}
    assert_pairs(members, {"q": factors}, expected)


@OWN
def test_projections_of_one_weight_stand_one_after_the_other(own):
    parts = {p: Layout("d (h k)", Window(1, i * 3, i * 3 + 3, blocks=4)) for i, p in enumerate("qkv")}
    members = planned(spec_of(own), [Target("w", p, parts[p], 4, layer="a") for p in "qv"], w=(5, 3 * ROWS))
    factors = {p: drawn(own, 1, i) for i, p in enumerate("qv")}
    assert_pairs(members, factors, {"w": sum(stored(factors[p], parts[p], (5, 3 * ROWS)) for p in "qv")})


@pytest.mark.parametrize("first", ["alone", "stack"])
def test_layers_of_a_stack_share_a_group_with_layers_alone(first):
    apart, stack = Layout("d h k"), Layout("l d h k")
    layers = {"alone": "b", "stack": "a.{l}" if first == "stack" else "c.{l}"}
    targets = [Target("alone", "q", apart, layer=layers["alone"]), Target("stack", "q", stack, layer=layers["stack"])]
    members = planned(spec_of(False), targets, alone=(5, 4, 3), stack=(2, 5, 4, 3))
    assert [layer.stacked for layer in members] == ([True, False] if first == "stack" else [False, True])
    factors, at = drawn(False, 3), 2 if first == "stack" else 0
    expected = {
        "alone": stored(Factors(*(f[at : at + 1] for f in factors)), apart, (5, 4, 3)),
        "stack": stored(Factors(*(np.delete(f, at, 0) for f in factors)), stack, (2, 5, 4, 3)),
    }
    assert_pairs(members, {"q": factors}, expected)


def test_projections_of_one_weight_agree_about_its_axes():
    layouts = (Layout("d h k", Window(1, 0, 4)), Layout("k h d", Window(1, 4, 8)))
    targets = [Target("w", p, w, layer="a") for p, w in zip("qv", layouts, strict=True)]
    members = planned(spec_of(False), targets, w=(4, 8, 4))
    factors = Factors(jnp.ones((1, 2, 4)), jnp.ones((1, 4, 4, 2)))
    with pytest.raises(HoraError, match="one order of axes"):
        list(pairs(members, {"q": factors, "v": factors}))


@OWN
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pairs_have_the_dtype_of_the_factors(own, dtype):
    members = planned(spec_of(own), Target("w", "q", "d h k", layer="a"), w=(5, 4, 3))
    ((_, a, b),) = pairs(members, {"q": Factors(*(f.astype(dtype) for f in drawn(own, 1)))})
    assert (a.dtype, b.dtype) == (dtype, dtype)
