"""A base sharded over a mesh of eight devices, fsdp x tp: equal results, and what crosses between devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import Target, adapt, functional, init, make_plan, merge, presets
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec, LayerShape, init_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

TOKENS = np.arange(8 * 16).reshape(8, 16) % 64
SPEC = AdapterSpec(8)
ROUTES = ("branch", "merge", "plain")
COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\].* (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(kind, kind))


def moved(program: jax.stages.Compiled) -> int:
    """Elements that the collectives of a program deliver to each device."""
    shapes = [match.group(1) for match in COLLECTIVE.finditer(program.as_text())]
    return sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


def projection(route: str | None, embed: int = 768):
    """Gradients of one adapted projection, 2048 tokens; `route` None is the frozen one, "dense" forms the delta."""
    layer = LayerShape.attention(embed, 12, targets=("q",))

    def loss(params, x, weight):
        f = functional.factors(SPEC, layer, params)["q"]
        if route in (None, "dense"):
            y = x @ (weight if route is None else weight + functional.dense(f, SPEC.scaling)).T
        else:
            y = functional.hora_linear(x, weight, None, f, SPEC.scaling, route=route)
        return jnp.sum(y * y) / y.size

    rng = np.random.default_rng(0)
    params = init_params(SPEC, layer, 0, "x")
    params["b_out.q"] = rng.normal(size=params["b_out.q"].shape).astype("float32")
    x, weight = (rng.normal(size=shape).astype("float32") for shape in ((8, 256, embed), layer["q"].weight_shape))
    return jax.jit(jax.value_and_grad(loss, argnums=1 if route is None else (0, 1))), (params, x, weight)


def on_mesh(args, mesh):
    params, x, weight = args
    put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))  # noqa: E731
    return jax.tree.map(put, params), put(x, "fsdp"), put(weight, "tp", "fsdp")


def close(got, expected, tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("route", ROUTES)
def test_a_sharded_projection_equals_one_device_and_moves_little(kind, route):
    run, args = projection(route)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharded = on_mesh(args, mesh)
        program = run.lower(*sharded).compile()
        close(program(*sharded), run(*args), 1e-4)
        frozen, _ = projection(None)
        base = moved(frozen.lower(*sharded).compile())
    rows, embed = args[2].shape
    thin = SPEC.rank * (rows + embed + 2 * 8 * 256)  # factors, and tokens times rank
    # merging adds the gathered weight of its backward pass once more
    assert moved(program) <= base + 2 * thin + (rows // 4 * embed if route == "merge" else 0)


def test_the_branch_moves_less_than_a_dense_delta():
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        branch, dense = (
            moved(run.lower(*on_mesh(args, mesh)).compile()) for run, args in map(projection, ("branch", "dense"))
        )
    assert branch < 0.7 * dense


def shard_llama(model, mesh) -> None:
    """Rows of q, k, v, gate and up over tp, columns over fsdp; the other way round behind them."""

    def spec(path: str, ndim: int) -> P:
        if ndim != 2 or "embed" in path:
            return P()
        return P("tp", "fsdp") if "o_proj" in path or "down_proj" in path else P("fsdp", "tp")

    state = nnx.state(model)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, spec(jax.tree_util.keystr(path), leaf.ndim))), state
    )
    nnx.update(model, placed)


def test_a_sharded_model_trains_as_one_device_does(make_llama, method, perturbed):
    def gradients(model, tokens):
        loss = lambda m: jnp.mean(jnp.square(m(tokens)))  # noqa: E731
        return nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, HoraParam)))(model)

    base = make_llama(hidden_size=32, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)
    planned = make_plan(base, method, presets.llama())
    phi = perturbed(init(planned))
    value, grads = gradients(HoraModel(base, planned, phi), TOKENS)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        shard_llama(base, mesh)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("fsdp")))
        sharded = HoraModel(base, planned, jax.device_put(phi, NamedSharding(mesh, P())))
        sharded_value, sharded_grads = gradients(sharded, tokens)
        kernel = sharded.merged().model.layers[0].self_attn.q_proj.kernel[...]
    close(sharded_value, value, 1e-5)
    close(nnx.to_pure_dict(sharded_grads), nnx.to_pure_dict(grads), 1e-5)
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", "tp")), 2)


class Attention(nnx.Module):
    """Query and value of explicitly sharded activations."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.LinearGeneral(32, (8, 4), use_bias=False, rngs=rngs)
        self.value = nnx.Linear(32, 32, use_bias=False, rngs=rngs)

    def __call__(self, x):
        q = self.query(x, out_sharding=P("fsdp", None, "tp", None))
        return q.sum((-1, -2)) + self.value(x, out_sharding=P("fsdp", None, "tp")).sum(-1)


def test_an_nnx_model_works_on_a_mesh_of_explicit_axes(method, perturbed):
    base = Attention(nnx.Rngs(0))
    targets = [Target("query.kernel", "q", "d h k", layer="a"), Target("value.kernel", "v", "d (h k)", 8, layer="a")]
    planned = make_plan(base, method, targets)
    phi, x = perturbed(init(planned)), np.random.default_rng(0).normal(size=(4, 6, 32)).astype("float32")
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        kernels = {"query": P("fsdp", "tp", None), "value": P("fsdp", "tp")}
        for name, spec in kernels.items():
            kernel = getattr(base, name).kernel
            kernel.set_value(jax.device_put(kernel.get_value(), NamedSharding(mesh, spec)))
        phi = jax.device_put(phi, NamedSharding(mesh, P()))
        model = HoraModel(base, planned, phi)
        got = nnx.jit(lambda m, x: m(x))(model, jax.device_put(x, NamedSharding(mesh, P("fsdp"))))
        merged = model.merged()(jax.device_put(x, NamedSharding(mesh, P("fsdp"))))
    close(np.asarray(got), np.asarray(merged), 1e-4)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("route", ["branch", "merge"])
def test_a_function_trains_under_shard_map_with_its_checks(where, route, method, perturbed):
    """`adapt` around a shard_map whose weight is sharded, and inside one over tokens."""
    mesh = mesh_of(AxisType.Auto)
    params = {"q": jax.random.normal(jax.random.key(0), (32, 8, 4)) / 6}
    x = jax.random.normal(jax.random.key(1), (8, 6, 32))
    planned = make_plan(params, method, Target("q", "q", "d h k", layer="a"))
    phi = perturbed(init(planned))

    def plain(params, x):
        return jnp.sin(jnp.einsum("bsd,dhk->bshk", x, params["q"])).mean()

    if where == "outside":

        def local(params, x):
            y = jax.lax.psum(jnp.einsum("bsd,dhk->bshk", x, params["q"]), "fsdp")
            return jax.lax.pmean(jnp.sin(y).mean(), "tp")

        specs = ({"q": P("fsdp", "tp")}, P(None, None, "fsdp"))
        mapped = adapt(
            jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()), planned, route=route, dense="error"
        )
    else:

        def mean(params, phi, x):
            return jax.lax.pmean(adapt(plain, planned, route=route, dense="error")(params, phi, x), ("fsdp", "tp"))

        mapped = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P(), P(("fsdp", "tp"))), out_specs=P())
    got = jax.jit(jax.value_and_grad(mapped, argnums=1))(params, phi, x)
    close(got, jax.jit(jax.value_and_grad(lambda phi: plain(merge(planned, params, phi), x)))(phi), 1e-5)
