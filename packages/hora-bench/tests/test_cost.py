from dataclasses import replace

import pytest
from hora_bench.experiments.cost.architectures import MODELS, Workload
from hora_bench.experiments.cost.counted import adapted, build, count_layer_macs, count_macs, trainable
from hora_bench.experiments.cost.formulas import (
    Macs,
    Peer,
    adapter_macs,
    generation_macs,
    layer_macs,
    methods,
    params_count,
    routes,
)
from hora_bench.experiments.cost.run import cost, paper
from hora_spec import AdapterSpec

PEERS = ("lora", "dora", "vera")
LLAMA = MODELS["llama-7b"]


@pytest.fixture(scope="module", params=["vit-b-16", "llama-70b"])
def shallow(request):
    """An architecture cut to two layers, and its model on the meta device."""
    model = replace(MODELS[request.param], num_layers=2)
    return model, build(model)


def test_the_papers_reading_has_its_parameters_on_llama_7b():
    count = params_count(AdapterSpec.paper(32), LLAMA)
    assert count == 6_096_384
    assert round(100 * count / LLAMA.params_count, 4) == 0.0905


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit-b-16", 85_798_656),
        ("vit-l-16", 303_301_632),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
    ],
)
def test_frozen_models_have_the_published_sizes(name, count):
    assert MODELS[name].params_count == count


def test_the_papers_macs_come_from_one_token_and_a_dense_delta():
    by_step = {step["step"]: step for step in paper()}
    stated = [step for step in by_step.values() if step.get("paper_macs")]
    assert len(stated) == 2
    for step in stated:
        assert step["macs"] == pytest.approx(step["paper_macs"], rel=1e-3)
    one = Workload(1, 1)
    dense = adapter_macs(AdapterSpec.paper(32), LLAMA, one, "dense").forward
    generation = 32 * generation_macs(AdapterSpec.paper(32), LLAMA.layer)
    assert dense - generation == 32 * 2 * 32 * 4096 * 4096
    assert round(generation / 1e9, 2) == 0.35


def test_generation_is_paid_once_however_many_tokens():
    spec, lora = AdapterSpec.paper(32), Peer("lora", 32)
    for load in LLAMA.workloads:
        extra = adapter_macs(spec, LLAMA, load).forward - adapter_macs(lora, LLAMA, load).forward
        assert extra == 32 * generation_macs(spec, LLAMA.layer)


def test_one_small_projection_by_hand():
    model = replace(MODELS["vit-b-16"], embed_dim=6, num_heads=3, num_kv_heads=3, num_layers=1)
    spec = AdapterSpec(2, hidden_dim=5, head_embed_dim=4, a_source="hypernetwork")
    first_layer, second_layer, generated_a = 3 * 5 * 4 * 2, 2 * (3 * 2 * 5 * 2), 2 * (6 * 5 * 2)
    assert generation_macs(spec, model.layer) == first_layer + second_layer + generated_a
    low_rank = 2 * (7 * 2 * 6)  # x A^T of Q and V, 7 tokens; the same for (x A^T) B^T
    found = layer_macs(spec, model.layer, 7, "branch", input_grad=True)
    generation = generation_macs(spec, model.layer)
    assert found == Macs(generation + 2 * low_rank, 2 * generation + 4 * low_rank)


def test_frozen_models_agree_with_transformers_and_torch(shallow):
    model, base = shallow
    assert sum(param.numel() for param in base.parameters()) == model.params_count
    for load in model.workloads[:2]:
        assert count_macs(base, load) == Macs(model.forward_macs(load), 0)


@pytest.mark.parametrize("name", methods(16))
def test_parameters_and_macs_by_hand_are_those_of_peft_and_torch(shallow, name):
    model, base = shallow
    method, load = methods(16)[name], model.workloads[1]
    for route in (route for route in routes(method) if route != "dense"):
        with adapted(base, method, route) as tuned:
            assert trainable(tuned) == params_count(method, model)
            found = count_macs(tuned, load)
        hand = adapter_macs(method, model, load, route)
        added = Macs(found.forward - model.forward_macs(load), found.backward - model.backward_macs(load))
        if name in PEERS or "share-a" in name:
            assert added == hand
        elif method.shares_a:  # torch repeats the generator's first layer for each projection
            assert hand <= added
            assert added == pytest.approx(hand, rel=0.02)
        else:  # and lays an A per head out as a block-diagonal matrix
            assert hand.train <= added.train


def test_unloading_leaves_the_base_as_it_was(shallow):
    model, base = shallow
    with adapted(base, Peer("lora", 4)):
        pass
    assert trainable(base) == 0
    assert count_macs(base, model.workloads[0]).forward == model.forward_macs(model.workloads[0])


@pytest.mark.parametrize("name", [name for name in methods(16) if name not in PEERS])
@pytest.mark.parametrize("route", ["branch", "merge"])
def test_macs_by_hand_are_those_of_xla(name, route):
    spec, tokens, layer = methods(16)[name], 2048, MODELS["llama-70b"].layer
    found = count_layer_macs(spec, layer, tokens, route)
    added = layer_macs(spec, layer, tokens, route, input_grad=True)
    base = tokens * sum(shape.weight_shape[0] * shape.weight_shape[1] for shape in layer.values())
    assert found.forward == pytest.approx(base + added.forward, rel=1e-3)
    if route == "branch":
        assert found.backward == pytest.approx(base + added.backward, rel=1e-3)


def test_every_variant_of_the_specification_is_there():
    found = [method for name, method in methods(8).items() if name not in (*PEERS, "hora-paper")]
    assert len(found) == len(set(found)) == 9
    assert {spec.sharing for spec in found} == {"full", "a", "b", "none"}


def test_the_result_has_a_record_for_every_method_route_and_workload():
    result = cost(["vit-b-16"], rank=4, torch=False, xla=False)
    chosen = methods(4)
    assert [record["method"] for record in result["params"]] == list(chosen)
    loads = len(MODELS["vit-b-16"].workloads)
    assert len(result["macs"]) == loads * (1 + sum(len(routes(method)) for method in chosen.values()))
    assert all(record["added_train_pct"] > 0 for record in result["macs"] if record["method"] != "frozen")
