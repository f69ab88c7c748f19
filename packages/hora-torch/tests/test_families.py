"""A sample of the families, the oracle that judges them, and the page that shows them."""

import importlib
import json
import os
import sys
from pathlib import Path

import peft
import pytest
import torch
from hora_torch import HoraConfig

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parents[1] / "families"
in_repository = pytest.mark.skipif(not (ROOT / "noxfile.py").exists(), reason="the page is in the repository")

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries; nox -s families shows none either


@pytest.fixture(scope="module", autouse=True)
def folder():
    """The modules of the session can import each other."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def load(name):
    return importlib.import_module(name)


ADAPTED = [
    "bart, unequal heads",
    "bert",
    "clip, unequal heads",
    "codegen",
    "deepseek_v3",
    "falcon, grouped",
    "gemma4_text",
    "gpt2, with cross-attention",
    "gpt_neox",
    "llama",
    "mimo_v2_flash",
    "modernbert",
    "phi3",
    "t5",
    "timm: levit_128s",
    "timm: swin_tiny_patch4_window7_224",
    "timm: tiny_vit_5m_224",
    "timm: vit_tiny_patch16_224",
    "torch.nn: MultiheadAttention, kdim and vdim",
]


@pytest.mark.parametrize("name", ADAPTED)
def test_a_family_is_adapted_by_default_and_passes_every_check(name):
    row = load("battery").examine(load("catalogue").FAMILIES[name]())
    assert not load("table").faults(row)
    assert row["built"] == row["default"] == row["default_rows"] == row["effect"] == row["merged"] == "ok"


@pytest.mark.parametrize("name", ["own: to_qkv", "own: to_qkv, rows interleaved", "mamba"])
def test_a_family_with_other_rows_or_without_heads_is_refused(name):
    row = load("battery").examine(load("catalogue").FAMILIES[name]())
    assert row["default"].startswith("refused: ")
    assert not load("table").faults(row)


TOLD = [
    "deepseek_v4, keys that are values",
    "mamba2",
    "own: to_qkv",
    "own: to_qkv, rows interleaved",
    "qwen3_next, linear attention",
    "reformer, queries that are keys",
    "rwkv",
    "wavlm",
]


@pytest.mark.parametrize("name", TOLD)
def test_a_family_is_adapted_with_the_line_that_the_page_shows(name):
    row = load("battery").examine(load("catalogue").FAMILIES[name]())
    assert not load("table").faults(row)
    assert row["told"] == row["effect"] == row["merged"] == row["exported"] == "ok"
    assert not row["verified"].startswith("alarm")
    recorded = json.loads((FOLDER / "results.json").read_text())["families"][name]
    assert (recorded["line"], recorded["told_adapts"]) == (row["line"], row["told_adapts"])


def test_a_line_is_the_config_that_was_tried():
    config = load("catalogue").FAMILIES["own: to_qkv"]().told
    line = load("battery").line(config)
    assert eval(line, {"HoraConfig": HoraConfig}) == HoraConfig(**config)
    assert "row_order={'to_qkv': 'q k v'}" in line


def test_lora_is_not_trained_either_where_an_attention_reads_weights_past_their_modules():
    wavlm = load("catalogue").FAMILIES["wavlm"]()
    model = wavlm.model()
    inputs = wavlm.inputs(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert not load("family").outputs(lora, inputs).requires_grad


Q, K, V = (("model.layers.1.self_attn." + name + "_proj.weight") for name in "qkv")
WRONG = {
    "two heads of q as one": ("q", Q, 0, 2, 24),
    "one head of q as two": ("q", Q, 0, 8, 6),
    "heads of q that begin in the middle of others": ("q", Q, 6, 3, 12),
    "two heads of v as one": ("v", V, 0, 1, 24),
    "one head of v as two": ("v", V, 0, 4, 6),
    "rows of k as v": ("v", K, 0, 2, 12),
    "rows of k as q": ("q", K, 0, 2, 12),
    "rows of v as q": ("q", V, 0, 2, 12),
    "rows of v as k": ("k", V, 0, 2, 12),
    "rows of q as k": ("k", Q, 0, 4, 12),
}


@pytest.fixture(scope="module")
def reached():
    family, oracle = load("family"), load("oracle")
    llama = load("catalogue").FAMILIES["llama"]()
    model = llama.model()
    inputs = llama.inputs(model)
    return oracle.reach(model, lambda m: family.outputs(m, inputs), "model.layers.1.self_attn", {Q, K, V})


@pytest.mark.parametrize("mistake", WRONG)
def test_the_oracle_sees(mistake, reached):
    oracle = load("oracle")
    right = [part("q", Q, 0, 4, 12), part("k", K, 0, 2, 12), part("v", V, 0, 2, 12)]
    assert oracle.verdict(reached, right) == "ok"
    assert oracle.verdict(reached, [part(*WRONG[mistake])]).startswith("WRONG")


def part(role, weight, start, heads, head_dim):
    return load("oracle").Part(role, weight, range(start, start + heads * head_dim), heads, head_dim)


def test_the_oracle_leaves_weights_and_outputs_as_they_were():
    family, oracle = load("family"), load("oracle")
    encoder = load("catalogue").FAMILIES["torch.nn: TransformerEncoder"]()
    model, other = encoder.model(), encoder.model()
    inputs = encoder.inputs(model)
    name = "encoder.layers.0.self_attn"
    oracle.reach(model, lambda m: family.outputs(m, inputs), name, {f"{name}.in_proj_weight"})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(family.outputs(model, inputs), family.outputs(other, inputs))


def die(name):
    if name == "exits":
        os._exit(3)
    if name == "loops":
        while True:
            pass
    if name == "fails":
        raise ValueError("why")
    return name


def test_a_crash_an_error_and_an_endless_loop_are_answers():
    each_alone = load("isolation").each_alone
    found = dict(each_alone(die, ["returns", "exits", "loops", "fails"], workers=2, seconds=1.0))
    assert found["returns"] == "returns"
    assert {name: str(answer) for name, answer in found.items() if name != "returns"} == {
        "exits": "exit status 3",
        "loops": "no answer in time",
        "fails": "ValueError: why",
    }


@in_repository
def test_the_page_is_that_of_the_results():
    results = json.loads((FOLDER / "results.json").read_text())
    assert load("table").page(results) == (ROOT / "docs/guide/families.md").read_text()
    assert len([row for row in results["families"].values() if "built" not in row]) > 200


def test_no_family_is_silently_wrong():
    rows = json.loads((FOLDER / "results.json").read_text())["families"]
    found = {name: [fault for fault in load("table").faults(row) if "WRONG" in fault] for name, row in rows.items()}
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_no_family_is_refused_on_which_lora_works():
    table = load("table")
    rows = json.loads((FOLDER / "results.json").read_text())["families"]
    seen = {name: row for name, row in rows.items() if row.get("built", "ok") == "ok" and table._is_attention(row)}
    assert [name for name, row in seen.items() if table._key(row) is None and table._lora(row) != "no"] == []


def test_verify_alarms_at_no_family_of_which_the_other_checks_find_everything_right():
    rows = json.loads((FOLDER / "results.json").read_text())["families"]
    assert {name: row["verified"] for name, row in rows.items() if row.get("verified", "").startswith("alarm")} == {}


def test_the_page_shows_what_is_wrong_in_red():
    table = load("table")
    row = {"model": "Model", "default_adapts": "q_proj: q 4x8", "default_rows": "WRONG: one head is taken for several"}
    page = table.page({"versions": {"torch": "2"}, "families": {"model": row, "other": {"built": "no: error"}}})
    assert "| model | default | q_proj: q 4x8 | <span" in page
    assert page.count(table.RED.format("WRONG")) >= 3
    assert page.rstrip().endswith("other")
