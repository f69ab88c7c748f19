"""The range of good rates is the planted one, also under luck; its ends are honest; curvature is that of the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hora_bench import screen
from hora_bench.experiments.rates import run as rates_run
from hora_bench.experiments.rates import widths
from hora_bench.experiments.rates.explain import explained
from hora_bench.experiments.rates.plot import plot
from hora_bench.experiments.rates.run import rates, word_of
from hora_bench.experiments.rates.sharpness import ADAPTER, ALL, KINDS, STEPPED, is_head, largest, sharpness
from hora_bench.experiments.rates.widths import bounds, cut, draws_of, level_of, one_peak, range_of
from hora_bench.recipe import batch_indices
from hora_bench.report.comparisons import widths_of
from hora_bench.report.page import write_page
from hora_bench.report.tables import tables
from hora_bench.report.verdicts import verdicts
from hora_bench.request import Inputs, request, vary
from hora_bench.search import trials_of
from hora_bench.setting import Setting
from hora_bench.stats import Difference
from hora_bench.store import write_experiment
from hora_spec import HoraError
from torch import nn

GRID = 5e-4 * 1.5 ** np.arange(13)
FLAT = np.interp(np.log2(GRID), np.log2([5e-4, 1e-3, 2e-3, 1.2e-2, 2e-2, 7e-2]), [40, 46, 48, 48, 20, 10])
STEEP = np.interp(np.log2(GRID), np.log2([5e-4, 1.5e-3, 6e-3, 1.2e-2, 7e-2]), [33, 45, 48, 15, 8])
MARGINS = {"margin": 1.0, "fall": 10.0}


def seen(truth, rng, seeds=8):
    """Accuracies of so many seeds as they scatter on a screen: each has a level of its own, and luck at every rate."""
    return truth + 3 * rng.normal(size=(seeds, 1)) + 2.7 * rng.normal(size=(seeds, len(truth)))


def test_without_luck_a_range_ends_where_accuracy_crosses_the_margin():
    curve = np.array([[56.0, 58.0, 60.0, 58.0, 40.0]] * 2)
    found = range_of(curve, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], **MARGINS)
    assert 2**found.low == pytest.approx(4e-3 / 2**0.5)  # a point below on either side, half a doubling
    assert 2**found.high == pytest.approx(4e-3 * 2**0.5)
    assert found.fall == pytest.approx(np.log2(8e-3) + 8 / 18)
    assert (found.level, found.width, found.open_low, found.open_high, found.open_fall) == (60, 1, False, False, False)


def test_an_end_of_the_grid_is_said_to_be_one():
    rising, falling = np.array([[1.0, 20.0, 40.0, 60.0]] * 2), np.array([[60.0, 40.0, 20.0, 1.0]] * 2)
    grid = [1e-3, 2e-3, 4e-3, 8e-3]
    up, down, level = (range_of(one, grid, **MARGINS) for one in (rising, falling, np.full((2, 4), 50.0)))
    assert (up.open_low, up.open_high, up.open_fall) == (False, True, True)
    assert (down.open_low, down.open_high, down.open_fall) == (True, False, False)
    assert (level.open_low, level.open_high, level.width) == (True, True, 3)


@pytest.mark.parametrize("truth", [FLAT, STEEP], ids=["flat", "steep"])
def test_the_planted_width_is_found_where_the_best_of_few_seeds_would_narrow_it(truth):
    rng, exact = np.random.default_rng(0), range_of(np.tile(truth, (2, 1)), GRID, **MARGINS).width
    drawn = [seen(truth, rng) for _ in range(200)]
    ours = np.mean([range_of(one, GRID, **MARGINS).width for one in drawn])
    naive = []
    for means in (one.mean(0) for one in drawn):
        best, good = int(means.argmax()), means >= means.max() - 1
        low = best - int(np.argmin(good[best::-1])) if not good[: best + 1].all() else -1
        high = best + int(np.argmin(good[best:])) if not good[best:].all() else len(means)
        naive.append(np.log2(1.5) * (high - low - 1))  # at most a step too much
    assert abs(ours - exact) < 0.7
    assert np.mean(naive) < ours
    assert truth is STEEP or np.mean(naive) < exact - 1.2


def test_an_interval_holds_the_planted_width_and_a_paired_one_the_ratio(monkeypatch):
    monkeypatch.setattr(widths, "DRAWS", 100)
    rng, draws, held = np.random.default_rng(1), draws_of(8), []
    exact = [range_of(np.tile(truth, (2, 1)), GRID, **MARGINS).width for truth in (FLAT, STEEP)]
    for _ in range(15):
        shared, both = 3 * rng.normal(size=(8, 1)), []
        for truth in (FLAT, STEEP):
            accuracies = truth + shared + 2.7 * rng.normal(size=(8, len(truth)))
            both.append(np.array([range_of(accuracies, GRID, **MARGINS, counts=one).width for one in draws]))
        for values, true in zip([*both, both[0] - both[1]], [*exact, exact[0] - exact[1]], strict=True):
            low, high = bounds(values)
            held.append(low <= true <= high)
    assert np.mean(held) > 0.85


def test_a_curve_of_one_peak_is_the_nearest_one():
    rng = np.random.default_rng(0)
    for means in rng.normal(size=(20, 6)):
        found = one_peak(means)
        peak = int(found.argmax())
        assert (np.diff(found[: peak + 1]) >= 0).all()
        assert (np.diff(found[peak:]) <= 0).all()
        for place in range(6):  # no other curve of one peak is nearer
            others = np.sort(rng.normal(size=(200, 6)), axis=1)
            others[:, place:] = others[:, place:][:, ::-1]
            assert (((others - means) ** 2).sum(1) > ((found - means) ** 2).sum() - 1e-9).all()


def test_no_copy_of_a_seed_chooses_the_rate_that_it_values():
    accuracies = np.array([[90.0, 0.0, 0.0], [10.0, 20.0, 10.0], [10.0, 20.0, 10.0]])
    assert level_of(accuracies, np.array([1, 1, 1])) == pytest.approx((0 + 10 + 10) / 3)
    assert level_of(accuracies, np.array([2, 1, 0])) == pytest.approx((0 + 0 + 10) / 3)
    assert level_of(accuracies, np.array([3, 0, 0])) == 90  # the only seed has no others
    assert {tuple(one) for one in draws_of(2)} == {(2, 0), (1, 1), (0, 2)}
    assert cut(np.arange(100) < 3)
    assert not cut(np.arange(100) < 2)


def test_the_largest_eigenvalue_is_that_of_the_dense_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    hidden, label = torch.randn(20, 3).double(), torch.randint(4, (20,))
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values):
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (hidden,)), label)

    scales = {name: torch.rand_like(value) + 0.1 for name, value in values.items()}
    for names in (list(values), ["0.weight"], ["2.bias"]):
        assert largest(loss, values, names) == pytest.approx(dense(loss, values, names), rel=1e-2)
        scaled = largest(loss, values, names, scales=scales)
        assert scaled == pytest.approx(dense(loss, values, names, scales), rel=1e-2)
    assert largest(lambda values: -loss(values), values, ["2.weight"]) < 1e-3  # with its sign, not by its size
    with pytest.raises(HoraError, match="a method that trains none"):
        largest(loss, values, [])
    with pytest.raises(HoraError, match="a finite loss"):
        largest(lambda values: loss(values) / 0, values, ["2.bias"])


def dense(loss, values, names, scales=None):
    """Largest eigenvalue of the Hessian that is written out."""
    sizes = [values[name].numel() for name in names]

    def flat(vector):
        parts = zip(names, vector.split(sizes), strict=True)
        return loss({**values, **{name: part.reshape(values[name].shape) for name, part in parts}})

    matrix = torch.func.jacrev(torch.func.grad(flat))(torch.cat([values[name].ravel() for name in names])).double()
    roots = torch.cat([scales[name].ravel() for name in names]).double().sqrt() if scales else torch.ones(sum(sizes))
    return float(torch.linalg.eigvalsh(matrix / roots / roots[:, None])[-1])


@pytest.fixture
def base(vit_directory):
    sizes = {"image_size_px": 32, "batch_size": 4, "steps": 4, "warmup_steps": 3, "last_blocks": 1, "device": "cpu"}
    one = request(model=str(vit_directory), task="made", method="lora", fraction=0.5, **sizes)
    return vary(one, rank=1)


def test_the_curvature_is_that_of_the_run_at_its_start_and_after_its_warm_up(base, image_task):
    asked = base.replace(seed=3, learning_rate=1e-2)
    found = sharpness(asked, image_task, inputs := Inputs.of(asked, image_task))
    assert found.keys() == KINDS.keys()
    cached = screen.Cached(inputs.data_sha256, asked.model, 32, 1, "train", torch.device("cpu"), image_task)
    members = screen.subset(image_task.labels("train"), 0.5, 3)
    data, rows = screen.tokens(cached), torch.from_numpy(members)
    model = screen.model_of(asked, image_task, data, members).eval()

    def loss(values, rows=rows):
        logits = torch.func.functional_call(model, values, (data.hidden[rows],))
        return nn.functional.cross_entropy(logits, data.label[rows])

    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}
    adapter = [name for name in start if not is_head(name)]
    assert 0 < len(adapter) == len(start) - 2
    assert found[ADAPTER] == pytest.approx(dense(loss, start, adapter), rel=1e-2)
    assert found[ALL] == pytest.approx(dense(loss, start, list(start)), rel=1e-2)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=asked.weight_decay)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 3
        optimizer.zero_grad()
        loss(trained, torch.from_numpy(members[batch_indices(len(members), 4, step, 3)])).backward()
        optimizer.step()
    scales = {
        name: (optimizer.state[value]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for name, value in trained.items()
    }
    now = {name: value.detach() for name, value in trained.items()}
    assert found[STEPPED] == pytest.approx(dense(loss, now, list(now), scales), rel=2e-2)


def spread(values, scatter=0.0):
    """Values of one task, and 200 resamplings of them."""
    values = np.array([values], float)
    return values, values + scatter * np.random.default_rng(0).normal(size=(200, *values.shape))


@pytest.mark.parametrize(
    ("ends", "scatter", "word"),
    [
        ([6, 5, 4, 3, 2, 1], 0.1, "explains"),
        ([1, 2, 3, 4, 5, 6], 0.1, "does not explain"),
        ([6, 5, 4, 3, 2, 1], 9.0, "not resolved"),  # other seeds might say otherwise
        ([5, 6, 2, 4, 1, 3], 0.0, "not resolved"),  # -0.66: too likely by luck
        ([1, 1, 1, 1, 1, 1], 0.0, "not resolved"),
        ([1, 2, 3], 0.0, "not resolved"),  # three choices could not have said yes
    ],
)
def test_an_eigenvalue_explains_rates_where_neither_seeds_nor_luck_could_say_otherwise(ends, scatter, word):
    (values, drawn_values), (rates, drawn) = spread(range(len(ends))), spread(ends, scatter)
    found = explained(values, rates, (drawn_values, drawn))
    assert found.word == word
    if len(set(ends)) == 6:
        assert found.needed == pytest.approx(-0.829, abs=1e-3)  # Spearman's table: 5 %, one-sided, six pairs


@pytest.mark.parametrize(
    ("low", "high", "own", "other", "word"),
    [
        (0.9, 2.0, False, False, "wider"),
        (0.9, 2.0, True, False, "wider"),  # at least
        (0.9, 2.0, False, True, "not resolved"),  # LoRA's true width may be larger
        (-2.0, -0.9, False, True, "narrower"),
        (-2.0, -0.9, True, False, "not resolved"),
        (-0.3, 0.3, False, False, "equal"),
        (-0.3, 0.3, True, False, "not resolved"),
        (-0.3, 2.0, False, False, "not resolved"),
    ],
)
def test_a_range_that_ends_with_the_grid_leaves_certain_what_a_lower_bound_does(low, high, own, other, word):
    assert word_of(Difference.stored((low + high) / 2, low, high, 8), 0.585, own=own, other=other) == word


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(widths, "DRAWS", 20)
    monkeypatch.setattr(Setting, "load", lambda _, name: replace(made, name=name))
    made = None

    def on(task):
        nonlocal made
        made = task

    return on


def test_ranges_are_measured_by_pieces_resumed_tabulated_drawn_and_on_the_page(
    base, image_task, small, tmp_path, monkeypatch
):
    small(image_task)
    asked = {"rates": [1e-3, 3e-3, 9e-3, 2.7e-2], "seeds": [4, 5], "hessian_seeds": 1, "variants": {"two": {"rank": 2}}}
    asked |= {"methods": ["lora"]}
    for task in ("made", "other"):
        rates(Setting(base), tmp_path / "runs", tasks=(task,), **asked)
    monkeypatch.setattr(screen, "Stack", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(rates_run, "sharpness", lambda *_: pytest.fail("measured again"))
    result = rates(Setting(base), tmp_path / "runs", tasks=("made", "other"), **asked)
    assert [(row["task"], row["value"]) for row in result["rows"]] == [
        (task, name) for task in ("made", "other") for name in ("lora", "two")
    ]
    assert ["word" in row for row in result["rows"]] == [False, True] * 2  # LoRA is not compared with itself
    assert [one["registered"] for one in result["explained"]] == [True] + 5 * [False]
    assert {one["seed"] for one in result["eigenvalues"]} == {4}
    assert "a proxy: the last 1 blocks" in result["notes"][0]
    line = next(line for line in result["curves"] if line["learning_rate"] == 9e-3)
    trials = trials_of(base.replace(learning_rate=9e-3), [4, 5], image_task, tmp_path / "runs", command="")
    assert line["accuracies_pct"] == pytest.approx([one.accuracy_pct for one in trials], abs=0.01)
    assert len(tables("rates", result)) == 4
    for path in plot(result, tmp_path / "plots"):
        assert path.read_text().startswith("<?xml")
    write_experiment(tmp_path / "results/rates.json", "rates", "test", seconds=1.0, result=result)
    pages = [write_page(tmp_path / "results", tmp_path / name / "page.md") for name in "ab"]
    assert [one.read_bytes() for one in pages[0]] == [one.read_bytes() for one in pages[1]]
    assert "# How wide is the range of rates?" in (tmp_path / "a/page/rates.md").read_text()


def test_no_rate_is_run_above_two_at_which_no_seed_is_above_chance(base, image_task, small, tmp_path, monkeypatch):
    small(image_task)
    tried = []

    def at(asked, seeds, *_, **__):
        tried.append(asked.learning_rate)
        value = 100.0 if asked.learning_rate < 1e-2 else None
        return [replaced(asked, seed, value) for seed in seeds]

    def replaced(asked, seed, value):
        return rates_run.Trial(
            learning_rate=asked.learning_rate,
            weight_decay=0.0,
            seed=seed,
            accuracy_pct=value,
            final_loss=None,
            file=None,
        )

    monkeypatch.setattr(rates_run, "trials_of", at)
    monkeypatch.setattr(rates_run, "_eigenvalues", lambda *_: [dict.fromkeys(KINDS, 1.0)])
    grid = [1e-3, 5e-3, 2e-2, 4e-2, 8e-2, 1.6e-1]
    result = rates(Setting(base), tmp_path, rates=grid, seeds=[0, 1], hessian_seeds=1)
    assert tried == grid[:4]
    (row,) = result["rows"]
    assert (row["rates_count"], row["ends_with_grid"], row["low_rate"]) == (4, ["low"], 1e-3)
    assert [line["diverged_count"] for line in result["curves"]] == [0, 0, 2, 2]


def test_the_verdicts_on_ranges_state_their_power():
    which = {"task": "made", "factor": "variant"}
    over = {"over_lora": {"mean": 2.0, "low": 1.6, "high": 2.5}, "could_have_seen": 1.4}
    rows = [{**which, "value": name, **over, "word": "wider"} for name in ("default", "gain-1")]
    rows[1]["ratio_is"] = "at least"
    rows.insert(0, {**which, "factor": "method", "value": "lora"})
    found = {"rho": -0.9, "low": -1.0, "high": -0.7, "p_value": 0.01, "needed": -0.829, "word": "explains"}
    result = {
        "setting": {"tasks": ["made"], "seeds": [0, 1]},
        "rows": rows,
        "explained": [{"registered": True, **found}],
    }
    said = [one for one in verdicts([("r.json", {"experiment": "rates", "result": result})]) if one.file]
    assert [one.word for one in said] == ["confirmed", "confirmed"]
    assert "default 2.0 (1.6 to 2.5), wider; 2 seeds would have shown 1.4 times; gain-1 at least 2.0" in said[0].why
    assert "-0.9 (-1.0 to -0.7), 3 choices on made; 1.0 % of their orders" in said[1].why
    assert "-0.829 or less would be no luck" in said[1].why


def test_the_ranges_of_a_search_end_where_accuracy_crosses_the_margin():
    which = {"task": "made", "factor": "method", "value": "lora", "fraction": 1.0}
    curve = {1e-3: 56.0, 2e-3: 58.0, 4e-3: 60.0, 8e-3: 58.0, 1.6e-2: None}
    trials = [{**which, "learning_rate": rate, "accuracy_pct": value} for rate, value in curve.items()]
    setting = {"task": "made", "fraction": 1.0, "seeds": [0]}
    rows = [{**which, "mean_pct": 50.0, "accuracies_pct": [50.0], "test_loss": 1.0, "learning_rate": 4e-3}]

    def found(trials):
        return [line[2:] for line in widths_of({"setting": setting, "rows": rows, "search": trials})]

    assert found(trials) == [("0.004", "0.0028", "0.0057", "2.0")]  # a point below on either side, half a doubling
    assert found(trials[1:]) == []  # of four rates
    flat = [{**trial, "accuracy_pct": 60.0} for trial in trials]
    assert found(flat) == [("0.001", "at most 0.001", "at least 0.016", "at least 16.0")]
