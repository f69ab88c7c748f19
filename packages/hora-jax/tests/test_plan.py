"""Planning: layouts, names, determinism, and every refusal."""

from dataclasses import replace

import hora_jax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hora_jax import Target, make_plan, presets
from hora_jax.planning import check_plan
from hora_spec import AdapterSpec, HoraError, Layout, ProjectionShape, Window
from hora_spec.testing import merging

SPEC = AdapterSpec(2, hidden_dim=4, head_embed_dim=3)
SHAPE = ProjectionShape(num_heads=2, head_dim=3, embed_dim=5)


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32")


def blocks(count: int, *, kernel: tuple[int, ...] = (8, 4, 2)) -> dict:
    return {
        "blocks": {str(i): {"attn": {n: {"kernel": leaf(*kernel)} for n in ("query", "value")}} for i in range(count)}
    }


QV = [Target(f"blocks.*.attn.{name}.kernel", p, "d h k") for name, p in (("query", "q"), ("value", "v"))]


@pytest.mark.parametrize(("layout", "shape"), merging.stored_forms(SHAPE), ids=lambda v: getattr(v, "pattern", str(v)))
def test_l1_every_stored_form_gives_the_same_projection(layout: Layout, shape):
    layer = "block.{l}" if layout.stacked else "block"
    heads = None if "h" in layout.axes else SHAPE.num_heads
    found = make_plan({"w": leaf(*shape)}, SPEC, Target("w", "q", layout, heads, layer=layer)).layers[0]
    assert found.shape["q"] == SHAPE
    assert found.names == (("block.0", "block.1") if layout.stacked else ("block",))
    assert found.stacked is layout.stacked


def test_layers_are_in_natural_order_and_named_by_their_attention_module():
    planned = make_plan(blocks(11), SPEC, QV)
    assert [layer.name for layer in planned.layers] == [f"blocks.{i}.attn" for i in range(11)]
    assert list(planned.groups()) == ["blocks.0.attn"]


def test_a_model_its_state_its_shapes_and_a_dict_give_equal_plans(tower):
    targets = presets.attention()
    plans = [
        make_plan(tree, SPEC, targets)
        for tree in (
            tower,
            nnx.state(tower),
            nnx.to_pure_dict(nnx.state(tower)),
            nnx.eval_shape(lambda: type(tower)(nnx.Rngs(0))),
        )
    ]
    assert len(set(plans)) == 1


class Wrapped(nnx.Module, pytree=False):
    def __init__(self, inner):
        self.inner = inner


def test_a_module_that_is_no_pytree_is_planned_as_its_state_is(tower):
    planned = make_plan(Wrapped(tower), SPEC, presets.attention())
    assert planned == make_plan(nnx.state(Wrapped(tower)), SPEC, presets.attention())
    assert planned.layers[0].name == "inner.blocks.0.attn"


def test_planning_reads_no_values():
    traced = []

    def step(x):
        traced.append(make_plan({"w": x}, SPEC, Target("w", "q", "(h k) d", 2, layer="w")))
        return x

    jax.jit(step)(jnp.ones((4, 5)))
    assert traced == [make_plan({"w": leaf(4, 5)}, SPEC, Target("w", "q", "(h k) d", 2, layer="w"))]


def test_a_stack_names_its_layers_by_place():
    target = Target("**.layers.q.kernel", "q", "l d h k", layer="{0}.layers.{l}.self_attn")
    (layer,) = make_plan({"model": {"layers": {"q": {"kernel": leaf(3, 8, 4, 2)}}}}, SPEC, target).layers
    assert layer.name == "model.layers.*.self_attn"
    assert layer.names == tuple(f"model.layers.{i}.self_attn" for i in range(3))
    assert layer.stacked


def test_layers_of_different_shape_or_method_are_different_groups():
    tree = blocks(3)
    tree["blocks"]["1"]["attn"]["query"]["kernel"] = leaf(8, 2, 2)
    assert list(make_plan(tree, SPEC, QV).groups()) == ["blocks.0.attn", "blocks.1.attn"]
    specs = {f"blocks.{i}.attn": SPEC.replace(rank=1 + i // 2) for i in range(3)}
    assert [len(group) for group in make_plan(blocks(3), specs, QV).groups().values()] == [2, 1]


def test_fused_parts_are_windows_of_one_leaf():
    targets = [Target("attn.qkv.kernel", p, "d (h k)", 2, ("qkv".index(p), 3)) for p in "qv"]
    (layer,) = make_plan({"attn": {"qkv": {"kernel": leaf(8, 24)}}}, SPEC, targets).layers
    assert [site.layout.window for site in layer.sites] == [Window(1, 0, 8), Window(1, 16, 24)]


def test_parts_of_each_head_are_windows_of_blocks():
    targets = [Target("attn.qkv.kernel", p, "d (h k)", 2, ("qkv".index(p), 3, 2)) for p in "qkv"]
    (layer,) = make_plan({"attn": {"qkv": {"kernel": leaf(8, 24)}}}, SPEC, targets).layers
    windows = [Window(1, 0, 4, 2), Window(1, 4, 8, 2), Window(1, 8, 12, 2)]
    assert [site.layout.window for site in layer.sites] == windows
    assert (
        "4:8 of each 12 of 24 of axis 1"
        in make_plan({"attn": {"qkv": {"kernel": leaf(8, 24)}}}, SPEC, targets).report()
    )


def test_heads_in_groups_are_counted_together():
    target = Target("attn.q.kernel", "q", "d g h k")
    assert make_plan({"attn": {"q": {"kernel": leaf(8, 2, 3, 4)}}}, SPEC, target).layers[0].shape["q"].num_heads == 6


def test_the_report_counts_layers_and_parameters():
    report = make_plan(blocks(11), SPEC, QV).report()
    assert "blocks.0.attn ... blocks.10.attn: layers=11 rank=2" in report
    assert "q: heads=4 head_dim=2 embed=8, 'd h k' in blocks.0.attn.query.kernel (8, 4, 2)" in report
    count = sum(value.size for value in jax.tree.leaves(hora_jax.init(make_plan(blocks(11), SPEC, QV))))
    assert report.endswith(f"total: layers=11 params={count:,}")
    assert make_plan(blocks(1), SPEC, QV).report().startswith("blocks.0.attn: layers=1 ")
    assert make_plan(blocks(2), SPEC, QV).report().startswith("blocks.0.attn ... blocks.1.attn: layers=2 ")


REFUSED = {
    "a pattern that matches nothing, with the nearest paths": (
        blocks(2),
        [Target("blocks.*.attention.query.kernel", "q", "d h k")],
        r"got none for \['blocks.\*.attention.query.kernel'\].*blocks.\*.attn.query.kernel",
    ),
    "one projection of two that matches nothing": (
        blocks(2),
        [QV[0], Target("blocks.*.attn.values.kernel", "v", "d h k")],
        "every projection matches a leaf, got none for",
    ),
    "two targets for one leaf": (
        blocks(2),
        [QV[0], Target("**.query.kernel", "v", "d h k")],
        "a part of a leaf is adapted once",
    ),
    "overlapping windows": (
        {"a": {"w": leaf(12, 5)}},
        [Target("a.w", p, Layout("(h k) d", Window(0, s, s + 4)), 2, layer="a") for p, s in (("q", 0), ("v", 2))],
        "a part of a leaf is adapted once",
    ),
    "two leaves for one projection of a layer": (
        blocks(1),
        [Target("blocks.*.attn.*.kernel", "q", "d h k")],
        "a projection of a layer is matched once",
    ),
    "a layer without one of the projections": (
        blocks(2) | {"extra": {"attn": {"query": {"kernel": leaf(8, 4, 2)}}}},
        [Target("**.attn.query.kernel", "q", "d h k"), QV[1]],
        r"got extra.attn without \['v'\]",
    ),
    "a layout with other axes": (
        blocks(1),
        [Target("**.query.kernel", "q", "d (h k)", 4)],
        "a layout names every axis",
    ),
    "heads that do not divide": (
        blocks(1, kernel=(8, 10)),
        [Target("**.query.kernel", "q", "d (h k)", 4)],
        "heads must divide the 10 rows",
    ),
    "heads that contradict the leaf": (
        blocks(1),
        [Target("**.query.kernel", "q", "d h k", 2)],
        "is the weight transposed",
    ),
    "no head count": (
        blocks(1, kernel=(8, 8)),
        [Target("**.query.kernel", "q", "d (h k)")],
        "does not show the head count",
    ),
    "a head count that only the model knows": (
        blocks(1, kernel=(8, 8)),
        [Target("**.query.kernel", "q", "d (h k)", "num_heads")],
        "plan the model itself",
    ),
    "fused parts that do not divide": (
        blocks(1, kernel=(8, 8)),
        [Target("**.query.kernel", "q", "d (h k)", 2, (0, 3))],
        "give a Layout with a Window",
    ),
    "a stack without a place in its name": (
        blocks(1),
        [Target("**.query.kernel", "q", "l h k", layer="x")],
        "a pattern names",
    ),
    "a layer without a name": (
        {"query": {"kernel": leaf(8, 4, 2)}},
        [Target("query.kernel", "q", "d h k")],
        "has a name",
    ),
    "stacks of different depth": (
        {"q": leaf(2, 8, 4, 2), "v": leaf(3, 8, 4, 2)},
        [Target(p, p, "l d h k", layer="x.{l}") for p in "qv"],
        "stack equally many layers",
    ),
    "one name for a layer of a stack and a layer alone": (
        {"stack": leaf(2, 8, 4, 2), "alone": leaf(8, 4, 2)},
        [Target("stack", "q", "l d h k", layer="x.{l}"), Target("alone", "q", "d h k", layer="x.0")],
        r"layers have names of their own, got \['x\.0'\] twice",
    ),
    "parts that divide an axis only without its blocks": (
        {"a": {"w": leaf(12, 5)}},
        [Target("a.w", "q", "(h k) d", 1, (0, 4, 2), layer="a")],
        "needs parts in blocks to divide the axis",
    ),
    "integers of unknown scale": (
        {"w": {"qvalue": jax.ShapeDtypeStruct((8, 4, 2), "int8")}},
        [Target("w.qvalue", "q", "d h k", layer="a")],
        r"w\.qvalue of dtype int8, whose scale is unknown",
    ),
    "head counts that do not divide each other": (
        {"q": leaf(8, 6, 2), "v": leaf(8, 4, 2)},
        [Target(p, p, "d h k", layer="x") for p in "qv"],
        "every head count divides the largest",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    tree, targets, message = REFUSED[name]
    with pytest.raises(HoraError, match=message):
        make_plan(tree, SPEC, targets)


def test_s8_one_a_for_projections_of_different_widths_is_refused_by_the_plan():
    tree, targets = {"q": leaf(8, 4, 2), "v": leaf(6, 4, 2)}, [Target(p, p, "d h k", layer="x") for p in "qv"]
    with pytest.raises(HoraError, match="spec S8"):
        make_plan(tree, AdapterSpec(2, sharing="a", tie_a=True), targets)


def test_specs_by_layer_must_fit_the_layers_found():
    names = [f"blocks.{i}.attn" for i in range(2)]
    with pytest.raises(HoraError, match=r"got none for \['blocks.1.attn'\]"):
        make_plan(blocks(2), {names[0]: SPEC}, QV)
    with pytest.raises(HoraError, match=r"got also \['blocks.7.attn'\]"):
        make_plan(blocks(2), dict.fromkeys([*names, "blocks.7.attn"], SPEC), QV)
    target = Target("w", "q", "l d h k", layer="x.{l}")
    with pytest.raises(HoraError, match="stacked layers share one spec"):
        make_plan({"w": leaf(2, 8, 4, 2)}, {"x.0": SPEC, "x.1": SPEC.replace(rank=1)}, target)


@pytest.mark.parametrize("spec", [3, None, {"blocks.0.attn": 3}])
def test_what_is_no_method_plans_nothing(spec):
    with pytest.raises(HoraError, match="the method is an AdapterSpec"):
        make_plan(blocks(1), spec, QV)


def test_what_is_no_plan_is_refused():
    with pytest.raises(HoraError, match="a plan is what"):
        check_plan(blocks(1))


def test_codes_beside_their_scale_are_planned_where_the_weight_was():
    codes = {"array": {"qvalue": jax.ShapeDtypeStruct((8, 4, 2), "int8"), "scale": leaf(1, 4, 2)}}
    (layer,) = make_plan({"attn": {"q": {"kernel": codes}}}, SPEC, Target("*.q.kernel", "q", "d h k")).layers
    assert (layer.name, layer.sites[0].path) == ("attn", "attn.q.kernel")


@pytest.mark.parametrize("heads", ["width", "count"])
def test_a_head_count_that_a_module_holds_is_an_integer_of_at_least_one(heads):
    class Attention(nnx.Module):
        def __init__(self):
            self.q, self.width, self.count = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 2.0, 0

    with pytest.raises(HoraError, match="a head count is an integer of at least 1, got"):
        make_plan(nnx.Sequential(Attention()), SPEC, Target("layers.*.q.kernel", "q", "d (h k)", heads))


def test_a_stack_of_blocks_numbers_its_layers(method):
    shapes = {"block": {str(i): {"q": jax.ShapeDtypeStruct((3, 16, 4, 4), "float32")} for i in range(2)}}
    targets = [Target(f"block.{i}.q", "q", "l d h k", layer=f"layers.{{l*2+{i}}}.attn") for i in range(2)]
    planned = make_plan(shapes, method, targets)
    assert [layer.names for layer in planned.layers] == [
        tuple(f"layers.{2 * i + j}.attn" for i in range(3)) for j in range(2)
    ]
    assert [layer.name for layer in planned.layers] == ["layers.l*2+0.attn", "layers.l*2+1.attn"]
    same = [replace(target, layer="layers.{l}.attn", projection=p) for target, p in zip(targets, "qv", strict=True)]
    assert len(make_plan(shapes, method, same).layers) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"heads": heads, "layout": "d (h k)"}, "a number of at least 1") for heads in (0, -1, True, 2.0, "")),
        ({"heads": "n", "layout": "d (h k)"}, "is the attribute 'n' of its attention module"),
        *(
            ({"fused": fused}, r"fused must be \(index, parts\) or")
            for fused in ((), (1,), (0, 2, 3, 4), (0, 0), (2, 2), (-1, 2), (0, 2, 0), ("0", 2), (0, 2.0), [0, 2], 3)
        ),
        ({"layout": "d h"}, "a pattern names"),
        ({"layout": None}, "layout must be a Layout or a pattern"),
        *(({name: ""}, "are texts, got a wrong") for name in ("path", "projection", "layer", "module")),
        ({"layer": "{1}"}, "wildcards of its path"),
        ({"layer": "{0.x}"}, "wildcards of its path"),
        ({"layer": "{0[x]}"}, "wildcards of its path"),
        ({"layer": "{0:9.}"}, "wildcards of its path"),
        ({"layer": "{name}"}, "wildcards of its path"),
        ({"layer": "{"}, "wildcards of its path"),
    ],
)
def test_what_a_target_cannot_mean_is_refused(method, change, message):
    shapes = {"attn": {"q": jax.ShapeDtypeStruct((16, 16) if "heads" in change else (16, 4, 4), "float32")}}
    with pytest.raises(HoraError, match=message):
        make_plan(shapes, method, replace(Target("*.q", "q", "d h k", layer="{0}"), **change))


def test_a_plan_without_targets_is_refused(method):
    with pytest.raises(HoraError, match=r"got \[\]: pass those of a preset"):
        make_plan({}, method, [])


def test_the_old_name_of_make_plan_warns(method):
    shapes = {"attn": {"q": jax.ShapeDtypeStruct((16, 4, 4), "float32")}}
    with pytest.warns(DeprecationWarning, match="make_plan"):
        hora_jax.plan(shapes, method, Target("*.q", "q", "d h k", layer="{0}"))
