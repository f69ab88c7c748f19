"""Numbers and judgements in prose are those of the committed results, or of a count."""

import json
import re
from pathlib import Path

import pytest
from hora_spec import LayerShape, count_params, preset

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "packages/hora-bench/results"
VERDICTS = (ROOT / "docs/benchmarks.md").read_text()  # written from the results, as a test of hora-bench asks


def prose(page: str) -> str:
    """The words of a page, each a space apart."""
    return " ".join((ROOT / page).read_text().split())


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["result"]


SCREENED = {  # name of a setting to the choice of a screen that has it at LoRA's number of parameters
    "hora": "default",
    "paper": "paper-equal",
    "residual": "residual",
    "gated": "gated",
    "tied-lora": "tied",
    "joint": "joint",
    "multi-head-lora": "mh-lora",
}


def screened(setting: str) -> list[dict]:
    """What the screens with 100 images say of a setting, a row a task."""
    rows = [row for path in sorted(RESULTS.glob("screen-*.json")) for row in result(path.stem)["rows"]]
    return [row for row in rows if row.get("value") == SCREENED[setting] and row["fraction"] < 1]


def test_the_flops_of_the_readme():
    (row,) = re.findall(r"^\| about 6 times LoRA's FLOPs \|.*$", VERDICTS, re.MULTILINE)
    assert "6.24 times, if one token is counted and a dense update formed" in row
    (branch,) = re.findall(r"by branch ([\d.]+) times at one token", row)
    assert f"by a branch, as few tokens go here, it is {branch} times" in prose("README.md")


def test_how_alike_heads_are():
    text = prose("docs/guide/method.md")
    leaky, lora = re.search(
        r"cosine of two heads' updates ([\d.]+) with HoRA \(leaky_relu\), ([\d.]+) with LoRA", VERDICTS
    ).groups()
    (tanh,) = re.findall(r"cosine of two heads' updates ([\d.]+) with HoRA \(tanh\)", VERDICTS)
    assert f"have a mean cosine of {lora} after training; with a generated B it is {leaky} with leaky ReLU" in text
    assert f"and {tanh} with tanh. That is one task and one seed" in text


def test_how_much_of_the_signal_a_common_a_reads():
    rows = [row for row in result("signal")["summary"] if row["state"] == "start"]
    found = {(row["projection"], row["measure"]): f"{row['mean']:.2f}" for row in rows}
    shared, own = (" and ".join(found[p, f"inputs_{which}"] for p in "qv") for which in ("one", "own"))
    text = prose("docs/guide/method.md")
    assert result("signal")["setting"]["rank"] == 8
    assert f"lies to {shared} in 8 input directions that all heads share, and to {own} in 8 of each head's own" in text


def test_what_screens_say_of_settings_with_a_name():
    text, said = prose("docs/guide/settings.md"), {"better": [], "worse": [], "not resolved": []}
    for name in SCREENED:
        found = {row["word"] for row in screened(name)} - {"equal"}
        (word,) = found - {"not resolved"} or {"not resolved"}  # nothing is better on one and worse on another
        said[word].append(f"`{name}`")
    better, worse, neither = (" and ".join(", ".join(names).rsplit(", ", 1)) for names in said.values())
    assert f"- more accurate than LoRA on a task, and less accurate on none: {better};" in text
    assert f"- less accurate on a task, and more accurate on none: {worse};" in text
    assert f"- no difference in accuracy was resolved: {neither}." in text
    assert all(row["loss_over_lora"]["low"] > 0 for row in screened("joint") if row["word"] == "better")
    assert f"100 images of up to {('one', 'two', 'three', 'four', 'five')[len(screened('hora')) - 1]} tasks" in text


def test_what_whole_models_say_of_settings_with_a_name():
    text, page = prose("docs/guide/settings.md"), prose("docs/design/0018-the-default.md")
    said = {"better": "more accurate", "worse": "less accurate", "equal": "equal within a point"}
    whole = {task: result(f"confirm-default-{task.replace('_', '-')}") for task in ("sign_digits", "cifar10")}
    for choice, name in (("default", "`hora`, the default"), ("residual", "`residual`")):
        found = {task: word_of(one, choice) for task, one in whole.items()}
        assert not {"better", "worse"} & set(found.values())
        assert f"- {name}: {', '.join(f'{said.get(w, w)} on {task}' for task, w in found.items())}." in text
    joint = [word_of(result(name), "joint") for name in ("confirm-sign-digits", "confirm-flower-photos")]
    assert joint == ["better", "not resolved"]
    assert "more accurate than LoRA on sign_digits, not resolved on flower_photos" in text
    (control,) = re.findall(r"### confirm\n.*?\| joint over a random A \|([^\n]*)", VERDICTS, re.DOTALL)[:1]
    flowers, digits = (cell for cell in control.split(" | ") if "resolved" in cell or "better" in cell)
    assert ", better" in flowers
    assert ", not resolved" in digits
    assert "Nothing changes. With 32 paired seeds on each of two tasks neither is better or worse than LoRA" in page
    assert all(row["over_lora_pct"]["seeds_count"] == 32 for one in whole.values() for row in one["rows"])
    assert max(row["over_lora_pct"]["detectable_pct"] for row in whole["cifar10"]["rows"]) < 1.2
    assert [row["word"] for row in screened("paper")] == ["worse"] * 4


def test_what_a_thousand_images_say_of_settings_with_a_name():
    text = prose("docs/guide/settings.md")
    digits, flowers = (
        {choice: word_of(result(f"screen-1000-{task}"), choice) for choice in ("default", "joint", "residual")}
        for task in ("sign-digits", "flower-photos")
    )
    assert digits == {"default": "worse", "joint": "not resolved", "residual": "not resolved"}
    assert set(flowers.values()) == {"not resolved"}
    assert "With all 1,000 images of sign_digits `hora` was less accurate than LoRA on a screen, `joint` and" in text


def word_of(found: dict, choice: str) -> str:
    return next(row["word"] for row in found["rows"] if row["value"] == choice)


def test_which_rates_were_best():
    rates = {row["value"]: row["learning_rate"] for row in result("screen-sign-digits")["rows"]}
    assert rates["default"] == rates["lora"]
    rates = {row["value"]: row["learning_rate"] for row in result("screen-forms-sign-digits")["rows"]}
    assert [rates[form] / rates["lora"] for form in ("paper-equal", "paper")] == [0.5, 0.25]
    text = prose("docs/guide/settings.md")
    assert (
        "both were best at the same rate, and the paper's form, whose gain is 1.0, at a half or a quarter of it" in text
    )


def test_how_high_a_rate_may_be():
    found = result("rates")
    fall = {(row["value"], row["task"]): row["fall_rate"] for row in found["rows"]}
    page, setting = (ROOT / "docs/guide/settings.md").read_text(), found["setting"]
    tasks, highest = setting["tasks"], max(setting["rates"])
    assert f"| | {' | '.join(tasks)} |" in page
    assert setting["fall"] == 10
    names = {"LoRA": "lora", "`hora`": "default", "`hora` with `gain=1.0`": "gain-1", "`joint`": "joint"}
    for name, choice in names.items():
        rates = (f"{fall[choice, task] or f'above {highest:g}'}" for task in tasks)
        assert f"| {name} | {' | '.join(rates)} |" in page


def test_what_a_joint_start_costs():
    found, text = result("speed-joint-vit-s14"), prose("docs/guide/settings.md")
    torch, jax = found["starts"]
    assert round(torch["over_step"]["ratio"] / torch["batches_count"]) == 4
    assert "on PyTorch the time of some four training steps a batch, in JAX two compilations besides" in text
    compiling = next(step["compile_s"] for step in found["steps"] if step["backend"] == "jax")
    assert jax["median_s"] > compiling
    assert all(step["over_lora"]["ratio"] <= 1 for step in found["steps"])
    assert "Afterwards a step is as fast as LoRA's or faster" in text


def test_what_a_step_costs_on_a_gpu():
    page = (ROOT / "docs/guide/scale.md").read_text()
    named = {
        ("speed-vit-s14-224px", "torch"): "ViT-S/14, 64 images of 257 tokens, PyTorch",
        ("speed-vit-s14-224px", "jax"): "the same, JAX",
        ("speed-llama-7b", "torch"): "LLaMA-7B in bfloat16, 4 sequences of 256 tokens, PyTorch",
    }
    for (name, backend), what in named.items():
        found = result(name)
        assert found["setting"]["device"] == "NVIDIA H200"
        (step,) = (one for one in found["steps"] if (one["backend"], one["method"]) == (backend, "hora"))
        assert f"| {what} | {step['over_lora']['ratio']:.2f} | {step['peak_over_lora']:.2f} |" in page


def test_how_many_parameters_a_small_model_trains():
    layer = LayerShape.attention(embed_dim=384, num_heads=6)
    ours, lora = (count_params(preset(name, 8), layer) for name in ("hora", "lora"))
    assert f"At rank 8, a ViT-S/14 takes {ours / lora:.1f} times those of LoRA" in prose("docs/help/faq.md")


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_our_packages_are_installed_from_the_clone_as_long_as_no_index_has_them(page):
    for line in re.findall(r"pip install[^`\n]*", page.read_text()):
        for asked in re.findall(r"\S*hora-\w+\S*", line):
            assert "packages/hora-" in asked, f"{page.name}: {line}"
