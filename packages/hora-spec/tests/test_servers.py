"""What servers reject is said before anything is written."""

import numpy as np
import pytest
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    Layout,
    ProjectionShape,
    Site,
    export_lora,
    param_shapes,
)
from hora_spec.servers import SERVERS, vllm_rank

HEADS, GROUPED = ProjectionShape(4, 2, 8), ProjectionShape(2, 2, 8)
AT = "model.layers.0.self_attn"


def q_of(module=f"{AT}.q_proj"):
    return Site(module, "weight", (8, 8), Layout(), HEADS)


def v_of(module=f"{AT}.v_proj"):
    return Site(module, "weight", (4, 8), Layout(), GROUPED)


Q, V = q_of(), v_of()
SCORED = {"modules_to_save": ["classifier", "score"]}  # as PEFT writes it for classification
SCORE = {"score.weight": np.ones((2, 8), np.float32)}
HEAD = {"lm_head.weight": np.ones((2, 8), np.float32)}
BIAS = {f"{AT}.q_proj.base_layer.bias": np.ones(8, np.float32)}


def adapter_of(*, sites=None, modules=None, config=None, rank=2, sharing="none"):
    spec = AdapterSpec(rank, sharing=sharing)
    layer = AdapterLayer(spec, sites or {"q": Q, "v": V}, {})
    params = {key: np.ones(shape, np.float32) for key, shape in param_shapes(spec, layer.shape).items()}
    return Adapter({"a": AdapterLayer(spec, layer.sites, params)}, config or {}, modules or {})


CONV1D = {"q": Site(f"{AT}.q_proj", "weight", (8, 8), Layout("d (h k)"), HEADS), "v": V}
CONVOLUTION = {"q": Site(f"{AT}.conv", "weight", (8, 8, 1, 1), Layout("(h k) d 1 1"), HEADS)}
IN_PROJ = {"q": Site(AT, "in_proj_weight", (8, 8), Layout(), HEADS)}
WHOLE = dict.fromkeys(["sglang", "llama.cpp"], "trained whole")
REFUSED = {
    "a rank": ({"rank": 129}, {"vllm": "ranks end at 512, got 516"}),
    "weights stored (in, out)": ({"sites": CONV1D}, {"vllm": "stored \\(in, out\\)"}),
    "a convolution": ({"sites": CONVOLUTION}, dict.fromkeys(SERVERS, "got a convolution of .*conv")),
    "a parameter of another name": ({"sites": IN_PROJ}, dict.fromkeys(SERVERS, "got in_proj_weight of .*self_attn")),
    "a head": (
        {"modules": HEAD},
        {"vllm": "got \\['lm_head'\\]", **dict.fromkeys(["sglang", "llama.cpp"], "lm_head")},
    ),
    "two heads": (
        {"modules": SCORE | {"b.classifier.weight": SCORE["score.weight"]}},
        {"vllm": "one of \\['classifier', 'score'\\]", **dict.fromkeys(["sglang", "llama.cpp"], "trained whole")},
    ),
    "a head that no key names": (
        {"modules": SCORE},
        WHOLE | {"vllm": "of the config names, got \\[\\]"},
    ),
    "a head that has no tensor": ({"config": {"modules_to_save": ["lm_head"]}}, {"vllm": "got \\['lm_head'\\]"}),
    "weights beside the layers": (
        {"sites": {"q": q_of("h.0.q_proj"), "v": v_of("h.0.v_proj")}},
        {"sglang": "passes over weights outside of layers.N without saying so, got h.0.q_proj"},
    ),
    "layers of two stacks": (
        {"sites": {"q": Q, "v": V, "w": q_of("vision.layers.0.q_proj"), "x": v_of("vision.layers.0.v_proj")}},
        {"sglang": "got those of \\['model.', 'vision.'\\]"},
    ),
    "a head for classes": (
        {"modules": SCORE, "config": SCORED},
        dict.fromkeys(["sglang", "llama.cpp"], "score.weight"),
    ),
    "biases": ({"modules": BIAS, "config": {"bias": "all"}}, dict.fromkeys(SERVERS, "bias")),
    "q alone": ({"sites": {"q": Q}}, {"sglang": "needs q_proj and v_proj, got \\['q_proj'\\]"}),
    "v alone": ({"sites": {"v": V}}, {"sglang": "got \\['v_proj'\\]"}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("what", REFUSED)
def test_f6_a_server_is_refused_what_it_rejects_and_nothing_else(what, server, tmp_path):
    given, expected = REFUSED[what]
    if server not in expected:
        export_lora(adapter_of(**given), tmp_path / "lora", for_server=server)
        return
    with pytest.raises(HoraError, match=f"{server} takes no such LoRA adapter.*{expected[server]}"):
        export_lora(adapter_of(**given), tmp_path / "lora", for_server=server)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("server", ["sglang", "llama.cpp"])
def test_f6_patterns_are_kept_from_servers_that_ignore_them(server, tmp_path):
    with pytest.raises(HoraError, match="ignores patterns of rank and alpha: write the portable form"):
        export_lora(adapter_of(), tmp_path / "lora", compact=True, for_server=server)
    export_lora(adapter_of(sharing="full"), tmp_path / "lora", compact=True, for_server=server)


def test_f6_all_reasons_are_named_at_once(tmp_path):
    adapter = adapter_of(sites=CONV1D, rank=200, config={"bias": "all"})
    with pytest.raises(HoraError, match=r"stored.*ranks end.*biases"):
        export_lora(adapter, tmp_path / "lora", for_server="vllm")


def test_f6_a_server_nobody_knows_is_refused(tmp_path):
    with pytest.raises(HoraError, match=r"one of vllm, sglang, llama.cpp, got 'olama'"):
        export_lora(adapter_of(), tmp_path / "lora", for_server="olama")


def test_the_rank_that_vllm_is_started_with():
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 512, 513)] == [1, 8, 8, 16, 512, None]
