"""Initial values, factors, delta and merging of whole trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import Target, delta, factors, functional, init, make_plan, merge, presets, replace_weights, weights
from hora_spec import AdapterSpec, HoraError, init_params, reference
from hora_spec.testing import REFERENCE, Case, check_merge_refuses

METHODS = [
    AdapterSpec(3, hidden_dim=4, head_embed_dim=5),
    AdapterSpec(3, hidden_dim=4, head_embed_dim=5, a_source="hypernetwork", residual=True, alpha=6.0),
    AdapterSpec(3, hidden_dim=4, head_embed_dim=5, sharing="b"),
    AdapterSpec(3, sharing="a"),
    AdapterSpec(3, sharing="none"),
]


def tree(dtype: str = "float32", *, stack: int | None = None) -> dict:
    """Three layers of query and value kernels (d, h, k) with grouped values, apart or stacked along an axis."""
    rng = np.random.default_rng(0)
    layers = [{n: rng.normal(size=(8, h, 2)).astype("float32") for n, h in (("q", 4), ("v", 2))} for _ in range(3)]
    if stack is not None:
        return {n: jnp.asarray(np.stack([layer[n] for layer in layers], stack), dtype) for n in "qv"}
    return {"block": {str(i): {n: jnp.asarray(w, dtype) for n, w in layer.items()} for i, layer in enumerate(layers)}}


def planned(spec: AdapterSpec, *, stack: int | None = None):
    if stack is None:
        return make_plan(tree(), spec, [Target(f"block.*.{p}", p, "d h k", layer="block.{0}") for p in "qv"])
    axes = ["d", "h", "k"]
    axes.insert(stack, "l")
    return make_plan(tree(stack=stack), spec, [Target(p, p, " ".join(axes), layer="block.{l}") for p in "qv"])


def per_layer(the_plan, phi) -> list[dict]:
    (params,) = phi.values()
    return [{name: np.asarray(value[i]) for name, value in params.items()} for i in range(3)]


@pytest.mark.parametrize("stack", [None, 0, 1, 2, 3])
def test_i6_initial_values_are_the_specification_s_and_independent_of_stacking(stack):
    (spec, *_) = METHODS
    the_plan = planned(spec, stack=stack)
    jax.tree.map(np.testing.assert_array_equal, init(the_plan), init(the_plan, seed=0))
    for i, layer in enumerate(per_layer(the_plan, init(the_plan, seed=7))):
        for name, expected in init_params(spec, the_plan.layers[0].shape, 7, f"block.{i}").items():
            np.testing.assert_array_equal(layer[name], expected)


@pytest.mark.parametrize("spec", METHODS, ids=str)
@pytest.mark.parametrize("stack", [None, 2])
def test_merge_adds_the_reference_s_delta(spec, stack, perturbed):
    the_plan, params = planned(spec, stack=stack), tree(stack=stack)
    phi = perturbed(init(the_plan))
    merged = merge(the_plan, params, phi)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for i, layer in enumerate(per_layer(the_plan, phi)):
        for p, update in reference.delta(spec, the_plan.layers[0].shape, layer).items():
            before, after = (
                t["block"][str(i)][p] if stack is None else jnp.moveaxis(t[p], stack, 0)[i] for t in (params, merged)
            )
            kernel = update.reshape(*before.shape[1:], before.shape[0]).transpose(2, 0, 1)
            np.testing.assert_allclose(after, before + kernel, rtol=1e-4, atol=1e-4)


def test_factors_are_named_by_module_and_keep_the_layers_axis_of_a_stack(perturbed):
    (spec, *_) = METHODS
    apart, stacked = planned(spec), planned(spec, stack=0)
    phi = perturbed(init(apart))
    one = factors(apart, phi)
    assert list(one) == ["block.0", "block.1", "block.2"]
    (together,) = factors(stacked, {"block.*": phi["block.0"]}).values()
    for i, of_layer in enumerate(one.values()):
        np.testing.assert_array_equal(together["v"].b[i], of_layer["v"].b)
    assert delta(apart, phi)["block.1"]["v"].shape == (4, 8)


def test_generation_of_separate_layers_is_one_program_however_many():
    spec = AdapterSpec(2, hidden_dim=3, head_embed_dim=4)

    def dots(layers: int) -> int:
        params = {str(i): {"q": jax.ShapeDtypeStruct((8, 4, 2), "float32")} for i in range(layers)}
        the_plan = make_plan(params, spec, Target("*.q", "q", "d h k", layer="{0}"))
        return str(jax.make_jaxpr(lambda phi: factors(the_plan, phi))(init(the_plan))).count("dot_general")

    assert dots(6) == dots(1) == 2


def test_i4_merging_the_start_changes_no_bit():
    the_plan, params = planned(METHODS[0]), tree()
    merged = merge(the_plan, params, init(the_plan))
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_m2_the_way_back_is_exact(perturbed):
    the_plan, params = planned(METHODS[0]), tree("bfloat16")
    kept = {path: np.asarray(leaf) for path, leaf in weights(the_plan, params).items()}
    merged = merge(the_plan, params, perturbed(init(the_plan)))
    back = replace_weights(merged, kept)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_merge_is_pure_and_compiles(perturbed):
    the_plan, params = planned(METHODS[0]), tree()
    phi, before = perturbed(init(the_plan)), jax.tree.map(np.asarray, params)
    compiled = jax.jit(lambda params, phi: merge(the_plan, params, phi))(params, phi)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), compiled, merge(the_plan, params, phi))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_donating_merge_reuses_the_weights_memory(perturbed):
    the_plan, params = planned(METHODS[0]), tree()
    merge(the_plan, params, perturbed(init(the_plan)), donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_an_nnx_model_merges_to_a_model_of_its_own(tower, x, perturbed):
    the_plan = make_plan(tower, METHODS[0], presets.attention())
    phi, before = perturbed(init(the_plan)), tower(x)
    merged = merge(the_plan, tower, phi)
    assert isinstance(merged, type(tower))
    assert not jnp.allclose(merged(x), before)
    np.testing.assert_array_equal(tower(x), before)
    state = merge(the_plan, nnx.state(tower), phi)
    np.testing.assert_array_equal(
        state["blocks"][0]["attn"]["query"]["kernel"][...], merged.blocks[0].attn.query.kernel
    )


def test_gradients_reach_phi_alone_through_a_merge():
    the_plan, params = planned(METHODS[0]), tree()
    grads = jax.grad(lambda phi: sum(leaf.sum() for leaf in jax.tree.leaves(merge(the_plan, params, phi))))(
        init(the_plan)
    )
    assert any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_m3_merging_refuses_what_the_specification_refuses():
    def through_a_plan(weight, delta, layout):
        embed = delta.shape[-1]
        target = Target("w", "p", layout, None if "h" in layout.axes else 1, layer="x")
        the_plan = make_plan({"w": weight}, AdapterSpec(embed, sharing="a"), target)
        shape = the_plan.layers[0].shape["p"]
        b = delta.reshape(1, shape.num_heads, shape.head_dim, embed)
        phi = {"x": {"a.p": jnp.eye(embed)[None], "b.p": jnp.asarray(b)}}
        return np.asarray(merge(the_plan, {"w": jnp.asarray(weight)}, phi)["w"])

    assert check_merge_refuses(REFERENCE._replace(name="hora_jax", merge=through_a_plan), Case(METHODS[0], SHAPE)) == 0


SHAPE = planned(METHODS[0]).layers[0].shape


def test_m3_adapters_trained_one_after_the_other_add_up(perturbed):
    the_plan, params = planned(METHODS[0]), tree()
    first, second = (perturbed(init(the_plan, seed), seed) for seed in range(2))
    both = merge(the_plan, merge(the_plan, params, first), second)
    for path, value in weights(the_plan, both).items():
        layer, p = path.rsplit(".", 1)
        update = sum(delta(the_plan, phi)[layer][p] for phi in (first, second))
        before = weights(the_plan, params)[path]
        np.testing.assert_allclose(value - before, update.reshape(*before.shape[1:], 8).transpose(2, 0, 1), atol=1e-5)


def test_nothing_is_donated_when_a_merge_is_refused():
    the_plan, params = planned(METHODS[0]), tree()
    phi = jax.tree.map(lambda v: v * jnp.nan, init(the_plan))
    with pytest.raises(HoraError, match="NaN or infinity in"):
        merge(the_plan, params, phi, donate=True)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda phi: {"other": phi["block.0"]}, "belongs to another plan"),
        (lambda phi: {"block.0": {k: v[:2] for k, v in phi["block.0"].items()}}, "has the shapes"),
        (lambda phi: {"block.0": {k: v for k, v in phi["block.0"].items() if k != "b_in"}}, "they differ in.*b_in"),
        (lambda phi: jax.tree.map(lambda v: v.astype(int), phi), "cast to float32"),
        (lambda phi: jax.tree.map(lambda v: "text", phi), "holds arrays, got .*b_in.* of another kind"),
    ],
)
@pytest.mark.parametrize("use", [factors, lambda the_plan, phi: merge(the_plan, tree(), phi)], ids=["factors", "merge"])
def test_s7_a_phi_that_does_not_fit_is_refused(change, message, use):
    the_plan = planned(METHODS[0])
    with pytest.raises(HoraError, match=message):
        use(the_plan, change(init(the_plan)))


def test_a_tree_that_does_not_fit_the_plan_is_refused():
    the_plan = planned(METHODS[0])
    with pytest.raises(HoraError, match="no such leaf: plan this tree"):
        merge(the_plan, {"other": jnp.ones(3)}, init(the_plan))
    with pytest.raises(HoraError, match=r"got \(2, 8, 4, 2\)"):
        merge(the_plan, jax.tree.map(lambda w: jnp.stack([w, w]), tree()), init(the_plan))


def test_float64_must_be_switched_on():
    the_plan = planned(METHODS[0])
    with pytest.raises(HoraError, match="jax_enable_x64"):
        init(the_plan, dtype="float64")
    with jax.enable_x64(True):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(init(the_plan, dtype="float64"))} == {"float64"}


def test_a_bad_seed_is_refused():
    with pytest.raises(HoraError, match="seed must be"):
        init(planned(METHODS[0]), seed=-1)


@pytest.mark.parametrize("dtype", ["int32", "float31", 32, None])
def test_parameters_are_floating(dtype):
    with pytest.raises(HoraError, match="parameters are floating, got dtype"):
        init(planned(METHODS[0]), dtype=dtype)


@pytest.mark.parametrize("use", [init, lambda the_plan: weights(the_plan, {})], ids=["init", "weights"])
def test_what_is_no_plan_is_refused(use):
    with pytest.raises(HoraError, match="a plan is what"):
        use({})


@pytest.mark.parametrize(("new", "got"), [({"block.0.k": jnp.ones(2)}, r"\['block\.0\.k'\]"), (3, "3"), ([], r"\[\]")])
def test_only_leaves_that_are_there_are_replaced(new, got):
    with pytest.raises(HoraError, match=f"got {got}: see"):
        replace_weights(tree(), new)


def test_a_stack_and_a_layer_alone_are_generated_together(perturbed):
    (spec, *_), params = METHODS, {"alone": tree()["block"]["0"], "stack": tree(stack=0)}
    places = {"alone": ("d h k", "b"), "stack": ("l d h k", "a.{l}")}
    targets = [Target(f"{k}.{p}", p, pattern, layer=name) for k, (pattern, name) in places.items() for p in "qv"]
    the_plan = make_plan(params, spec, targets)
    phi = perturbed(init(the_plan))
    ((_, values),) = phi.items()
    alone = functional.factors(spec, SHAPE, {name: value[3] for name, value in values.items()})
    found = factors(the_plan, phi)
    assert {name: f["q"].b.ndim for name, f in found.items()} == {"a.*": 4, "b": 3}
    for p, factor in alone.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found["b"][p], factor)
