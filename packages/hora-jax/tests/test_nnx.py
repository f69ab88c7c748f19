"""`HoraModel`: the same numbers as merging, in every way NNX models are run and trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hora_jax import init, make_plan, merge, presets
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec, HoraError, preset


@pytest.fixture
def route() -> str:
    return "branch"


@pytest.fixture
def model(tower, method, perturbed, route) -> HoraModel:
    planned = make_plan(tower, method, presets.attention())
    return HoraModel(tower, planned, perturbed(init(planned)), route=route)


BOTH = pytest.mark.parametrize("route", ["branch", "merge"])


def close(a, b, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def loss_of(model, x):
    return jnp.mean(jnp.square(model(x)))


def only_adapter(loss):
    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, HoraParam))


def test_i4_a_fresh_adapter_changes_no_bit(tower, method, x):
    planned = make_plan(tower, method, presets.attention())
    np.testing.assert_array_equal(HoraModel(tower, planned, init(planned))(x), tower(x))


@BOTH
def test_adapted_is_merged(model, x):
    assert not jnp.allclose(model(x), model.base(x))
    close(model(x), model.merged()(x))


@BOTH
@pytest.mark.parametrize("method", [AdapterSpec(2, sharing="none"), AdapterSpec(2, sharing="b", alpha=4.0)], ids=str)
def test_an_a_per_head_works_too(model, x):
    close(model(x), model.merged()(x))


def test_jit_equals_eager(model, x):
    close(nnx.jit(lambda m, x: m(x))(model, x), model(x))
    close(jax.jit(lambda x: model(x))(x), model(x))


def test_it_trains_in_graph_mode_with_an_nnx_optimizer(model, x):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=HoraParam)
    frozen = jax.tree.map(jnp.copy, nnx.state(model.base, nnx.Param))

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = only_adapter(loss_of)(model, x)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model.base, nnx.Param), frozen)


@BOTH
def test_it_trains_in_tree_mode_with_a_donated_step(model, x):
    graph, params, rest = nnx.split(model, HoraParam, ..., graph=False)
    optimizer = optax.adam(1e-2)

    def step(params, state, rest, x):
        value, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, rest), x))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step, state, losses = jax.jit(step, donate_argnums=(0, 1)), optimizer.init(params), []
    for _ in range(5):
        params, state, value = step(params, state, rest, x)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1


@BOTH
def test_it_runs_where_tree_mode_is_the_default(model, x):
    expected = model(x)
    with nnx.set_graph_mode(False):
        close(model(x), expected)
        close(nnx.jit(lambda m, x: m(x))(model, x), expected)


@pytest.mark.parametrize("method", [preset("joint", 2)], ids=["joint"])
def test_s6_a_fixed_a_is_left_alone_by_an_optimizer_that_decays(model, x):
    before = model.adapter()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.5), wrt=HoraParam)
    optimizer.update(model, only_adapter(loss_of)(model, x)[1])
    for key, params in model.adapter().items():
        for name, value in params.items():
            assert np.array_equal(value, before[key][name]) == name.startswith("a."), name
    held = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if leaf.ndim]
    assert sum(leaf.size for leaf in held) == 2 * model.plan.params_count
    close(model(x), model.merged()(x))


def test_routes_are_chosen_by_tokens_and_dtype(model, x):
    """``auto`` merges float32 when tokens outnumber the embed width; 16 bits take the branch whatever was asked."""

    def merges(route, x):
        adapted = HoraModel(model.base, model.plan, model.adapter(), route=route)
        program = jax.make_jaxpr(lambda x: adapted(x))(x)
        made = {var.aval.shape for eqn in program.eqns for var in eqn.outvars if eqn.primitive.name == "dot_general"}
        return any(sorted(shape) == sorted(kernel) for shape in made)

    kernel = model.base.blocks[0].attn.query.kernel.shape
    many, few = jnp.tile(x, (16, 1, 1)), x[:1, :3]
    assert (merges("auto", many), merges("auto", few)) == (True, False)
    assert (merges("merge", few), merges("branch", many), merges("plain", many)) == (True, False, False)
    nnx.update(
        model.base,
        jax.tree.map(lambda v: v.astype("bfloat16") if v.dtype == "float32" else v, nnx.state(model.base)),
    )
    assert not merges("merge", many.astype("bfloat16"))


def test_both_modes_compute_the_same_gradients(model, x):
    graph, params, rest = nnx.split(model, HoraParam, ..., graph=False)
    tree = jax.grad(lambda p: loss_of(nnx.merge(graph, p, rest), x))(params)
    _, grads = only_adapter(loss_of)(model, x)
    close(nnx.to_pure_dict(tree), nnx.to_pure_dict(grads))


def test_frozen_weights_have_no_gradient_and_no_optimizer_state(model, x):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=HoraParam)
    _, grads = only_adapter(loss_of)(model, x)
    adapter = model.plan.params_count
    assert sum(leaf.size for leaf in jax.tree.leaves(grads)) == adapter
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer))) == 2 * adapter + 2  # moments, two counters

    graph, params, rest = nnx.split(model, HoraParam, ...)
    program = jax.make_jaxpr(jax.grad(lambda p: loss_of(nnx.merge(graph, p, rest), x)))(params)
    kernel = model.base.blocks[0].attn.query.kernel.shape
    made = [var.aval.shape for eqn in program.eqns for var in eqn.outvars if eqn.primitive.name == "dot_general"]
    assert made
    assert kernel not in made  # no product has the shape of a weight: neither a delta nor a dense gradient is formed


def test_no_route_forms_a_dense_gradient(model, x):
    tokens = x.size // x.shape[-1]
    kernel = model.base.blocks[0].attn.query.kernel.shape
    for route in ("branch", "merge"):
        adapted = HoraModel(model.base, model.plan, model.adapter(), route=route)
        graph, params, rest = nnx.split(adapted, HoraParam, ...)
        program = jax.make_jaxpr(jax.grad(lambda p: loss_of(nnx.merge(graph, p, rest), x)))(params)  # noqa: B023
        contracted = [
            np.prod([eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][0][0]])
            for eqn in program.eqns
            if eqn.primitive.name == "dot_general" and sorted(eqn.outvars[0].aval.shape) == sorted(kernel)
        ]
        assert tokens not in contracted  # what has a weight's shape is a sum over ranks, never over tokens


@BOTH
def test_gradients_equal_those_through_a_merge(model, x):
    _, grads = only_adapter(loss_of)(model, x)
    through = jax.grad(lambda phi: loss_of(merge(model.plan, model.base, phi), x))(model.adapter())
    for key, params in through.items():
        for name, value in params.items():
            close(grads["phi"][key][name][...], value, 1e-4)


def test_the_filter_for_lora_parameters_selects_the_adapter(model):
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == len(jax.tree.leaves(model.adapter()))


def test_gradients_accumulate_over_microbatches(model, x):
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2), wrt=HoraParam)
    _, whole = only_adapter(loss_of)(model, x)
    before = model.adapter()
    for half in x[:1], x[1:]:
        _, grads = only_adapter(loss_of)(model, half)
        optimizer.update(model, grads)
    moved = jax.tree.map(lambda a, b: a - b, before, model.adapter())
    close(moved, {key: {n: v[...] for n, v in p.items()} for key, p in whole["phi"].items()}, 1e-4)


@BOTH
def test_statistics_of_the_base_are_updated(model, x):
    model.train()
    mean = model.base.blocks[0].norm.mean[...]
    nnx.jit(lambda m, x: m(x))(model, x)
    assert not jnp.allclose(model.base.blocks[0].norm.mean[...], mean)


def test_random_streams_of_the_base_advance_as_without_adapter(tower, method, x):
    planned = make_plan(tower, method, presets.attention())
    model = HoraModel(nnx.clone(tower), planned, init(planned))
    for each in (tower, model):
        each.train()
    first, second = model(x), model(x)
    assert not jnp.allclose(first, second)
    np.testing.assert_array_equal(first, tower(x))
    np.testing.assert_array_equal(second, tower(x))


def test_a_key_value_cache_is_filled_as_without_adapter(tower, method, perturbed, x):
    base = type(tower)(nnx.Rngs(0), decode=True)
    base.eval()
    planned = make_plan(base, method, presets.attention())
    phi = perturbed(init(planned))
    model, merged = HoraModel(base, planned, phi), merge(planned, base, phi)
    for each in (base, merged):
        for block in each.blocks:
            block.attn.init_cache(x.shape)
    step = nnx.jit(lambda m, token: m(token))
    for i in range(x.shape[1]):
        close(step(model, x[:, i : i + 1]), step(merged, x[:, i : i + 1]))
    assert int(base.blocks[0].attn.cache_index[...]) == x.shape[1]


def test_what_the_base_sows_is_captured(model, x):
    class Sower(nnx.Module):
        def __init__(self, block):
            self.block = block

        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return self.block(x)

    base = Sower(model.base.blocks[0])  # flax 0.12.8 cannot merge an nnx.List while it captures
    planned = make_plan(base, model.plan.layers[0].spec, presets.attention())
    sowing = HoraModel(base, planned, init(planned))
    y, captured = nnx.capture(sowing, nnx.Intermediate)(x)
    (seen,) = captured["base"]["seen"].get_value()
    np.testing.assert_array_equal(seen, x)
    np.testing.assert_array_equal(y, base.block(x))


def test_other_methods_of_the_base_are_called_through_apply(model, x):
    close(model.apply(lambda base, x: base.blocks[0].attn(x), x), model.merged().blocks[0].attn(x))
    with pytest.raises(HoraError, match=r"model\.apply"):
        model.bind()


def stacked_tower(depth: int, axis: int):
    """Attention kernels with their layers axis anywhere, run by a scan."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: axis}),), out_axes=nnx.StateAxes({...: axis}))
    def make(rngs):
        return nnx.MultiHeadAttention(4, 16, decode=False, use_bias=False, keep_rngs=False, rngs=rngs)

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            scan = nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
            return scan(x, self.layers)

    return Scanned(nnx.Rngs(0))


@BOTH
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scan_over_stacked_layers_slices_the_factors(axis, route, method, perturbed, x):
    base = stacked_tower(3, axis)
    (target_q, target_v) = presets.attention(stack_axis=axis)
    planned = make_plan(base, method, (target_q, target_v))
    assert planned.layers[0].names == ("layers.0", "layers.1", "layers.2")
    model = HoraModel(base, planned, perturbed(init(planned)), route=route)
    close(nnx.jit(lambda m, x: m(x))(model, x), model.merged()(x))


@BOTH
def test_remat_gives_the_same_gradients(model, route, x):
    class Remat(nnx.Module):
        def __init__(self, tower):
            self.blocks = tower.blocks

        def __call__(self, x):
            for block in self.blocks:
                x = nnx.remat(lambda block, x: block(x))(block, x)
            return x

    again = HoraModel(Remat(model.base), model.plan, model.adapter(), route=route)
    (value, grads), (expected_value, expected) = only_adapter(loss_of)(again, x), only_adapter(loss_of)(model, x)
    close(value, expected_value)
    close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected))


@BOTH
def test_forward_mode_works_on_the_plain_route_and_else_says_so(model, x):
    plain = HoraModel(model.base, model.plan, model.adapter(), route="plain")
    jax.jvp(lambda x: plain(x), (x,), (x,))
    with pytest.raises(HoraError, match='route="plain"'):
        jax.jvp(lambda x: model(x), (x,), (x,))


def test_bfloat16_activations_stay_bfloat16_and_the_adapter_float32(model, x):
    base = jax.tree.map(lambda v: v.astype("bfloat16") if v.dtype == "float32" else v, nnx.state(model.base))
    nnx.update(model.base, base)
    narrow = HoraModel(model.base, model.plan, model.adapter())
    y = narrow(x.astype("bfloat16"))
    assert y.dtype == jnp.bfloat16
    _, grads = only_adapter(lambda m, x: jnp.mean(m(x).astype("float32") ** 2))(narrow, x.astype("bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
    close(y.astype("float32"), model.merged()(x.astype("bfloat16")).astype("float32"), 0.1)


def test_an_adapted_model_is_merged_before_it_is_adapted_again(model, method, perturbed, x):
    with pytest.raises(HoraError, match=r"adapt its merged\(\)"):
        HoraModel(model, make_plan(model, method, presets.attention()), {})
    again = HoraModel(model.merged(), model.plan, perturbed(init(model.plan, seed=1), 1))
    close(again(x), again.merged()(x))


def test_a_model_that_does_not_fit_is_refused(model, method):
    with pytest.raises(HoraError, match="plan this tree"):
        HoraModel(model.base.blocks[0], model.plan, model.adapter())
    with pytest.raises(HoraError, match="belongs to another plan"):
        HoraModel(model.base, model.plan, {})
    with pytest.raises(HoraError, match="route must be one of auto, branch, merge, plain"):
        HoraModel(model.base, model.plan, model.adapter(), route="dense")
