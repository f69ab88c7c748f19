import json
from functools import cache, partial

import numpy as np
import pytest
from hora_bench.experiments.theory import rates
from hora_bench.experiments.theory.identify import fit, identify, losses
from hora_bench.experiments.theory.model import (
    ACTIVATIONS,
    SHARINGS,
    Factors,
    Problem,
    count_params,
    jacobian,
    predict,
)
from hora_bench.experiments.theory.rates import (
    LOSSES,
    Grid,
    activations,
    gates,
    measure,
    slope_difference,
    summarise,
    theory,
)
from hora_bench.report.tables import tables
from hora_bench.store import Journal
from scipy.optimize import check_grad


@pytest.fixture
def problem():
    return Problem.draw(np.random.default_rng(0))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("sharing", "activation"), [*((s, "identity") for s in SHARINGS), *(("full", a) for a in ACTIVATIONS)]
)
def test_the_hand_written_jacobian_is_the_derivative(sharing, activation, heads):
    problem = Problem.draw(np.random.default_rng(0), activation)
    rng = np.random.default_rng(1)
    data = problem.sample(7, rng)
    weights = rng.normal(size=data.y.shape)

    def value(theta):
        return np.sum(weights * predict(problem, problem.factors(theta, sharing, heads), data))

    def slope(theta):
        return weights.ravel() @ jacobian(problem, theta, sharing, heads, data)

    assert check_grad(value, slope, rng.normal(size=count_params(sharing, heads))) < 1e-5


def test_one_head_without_tokens_that_differ_is_linear_in_the_value_update(problem):
    data = problem.sample(5, np.random.default_rng(2))
    data.x[:] = data.x[:, :1]
    value = problem.p_v + problem.truth.updates()[1, 0]
    np.testing.assert_allclose(predict(problem, problem.truth, data), data.x[:, 0] @ value.T, rtol=1e-12)


def test_losses_do_not_see_the_gauge(problem):
    rng = np.random.default_rng(3)
    test = problem.sample(50, rng)
    factors = Factors(*rng.normal(size=(4, 2, 3)))
    scaled = Factors(factors.b_q * 2, factors.a_q / 2, factors.b_v / 4, factors.a_v * 4)
    assert losses(problem, factors, test) == pytest.approx(losses(problem, scaled, test))


def test_the_truth_has_no_loss(problem):
    assert set(losses(problem, problem.truth, problem.sample(50, np.random.default_rng(4))).values()) == {0.0}


def test_a_fit_is_at_least_as_close_to_the_data_as_the_truth(problem):
    data = problem.sample(200, np.random.default_rng(5))
    found = fit(problem, "full", 2, data, np.random.default_rng(6))
    assert found.reached
    error, bound = (np.sum((predict(problem, f, data) - data.y) ** 2) for f in (found.factors, problem.truth))
    assert error <= bound


@pytest.mark.parametrize("sharing", SHARINGS)
def test_only_full_sharing_identifies_the_updates(sharing):
    found = identify(sharing)
    assert found.prediction_error < 1e-6
    if sharing == "full":
        assert found.identified
        assert found.split_order == pytest.approx(2, abs=0.1)
    else:
        assert not found.identified
        assert found.split_order is None
        assert found.value_error > 0.5


def test_slopes_and_intervals_of_an_exact_power_law():
    sizes = (100, 1000, 10_000)
    values = np.outer([1.0, 2.0, 4.0], np.array(sizes, float) ** -0.5)
    summary = summarise(sizes, values)
    for statistic in summary.values():
        assert statistic["slope"] == pytest.approx(-0.5)
        assert statistic["slope_interval"] == pytest.approx([-0.5, -0.5])
    assert summary["mean"]["value"][0] == pytest.approx(7 / 3 / 10)
    assert summary["median"]["value"][0] == pytest.approx(0.2)


SIZES = (100, 1000, 10_000)


def pieces(**slopes):
    """Trials whose losses fall as told, with a scatter; with sharing, without, and where no head is redundant."""
    rng = np.random.default_rng(0)

    def losses(slope):
        return (np.array(SIZES, float) ** slope * np.exp(rng.normal(0, slopes.get("scatter", 0.05), 3))).tolist()

    return [
        {
            "fitted_heads": heads,
            "sharing": sharing,
            "trial": trial,
            "unreached": slopes.get("unreached", 0) if sharing == "full" else 0,
            **{
                loss: losses(slopes[sharing] if (heads, loss) in ((2, "d2"), (2, "value_error")) else -0.5)
                for loss in LOSSES
            },
        }
        for trial in range(12)
        for heads in (2, 1)
        for sharing in ("full", "none")
    ]


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ({"full": -0.5, "none": -0.1}, "passed"),
        ({"full": -0.1, "none": -0.5}, "failed"),
        ({"full": -0.3, "none": -0.3, "scatter": 1.5}, "not resolved"),
        ({"full": -0.5, "none": -0.1, "unreached": 1}, "not resolved"),  # of three sizes, with sharing alone
    ],
)
def test_gates_compare_like_with_like_and_by_whole_intervals(given, outcome):
    found = gates(SIZES, pieces(**given))
    assert [gate["outcome"] for gate in found[:2]] == [outcome, outcome]
    if not {"scatter", "unreached"} & set(given):
        assert [gate["outcome"] for gate in found[2:]] == ["passed", "passed"]


def test_a_difference_of_slopes_is_that_of_the_means_and_pairs_the_trials():
    rng = np.random.default_rng(0)
    problems = np.exp(rng.normal(0, 2, (10, 1)))  # hard and easy ones, which both models meet
    shared, free = (problems * np.array(SIZES, float) ** slope for slope in (-0.5, -0.2))
    assert slope_difference(SIZES, shared, free) == pytest.approx((-0.3, -0.3, -0.3))


@pytest.fixture
def measured(monkeypatch):
    """A tiny grid whose fits are replaced by numbers from a seed; the pieces asked for."""
    asked = []

    def measure(heads, sharing, trial, *, sizes, seed, activation):
        asked.append((heads, sharing, trial))
        rng = np.random.default_rng([heads, len(sharing), trial, seed])
        return {name: rng.uniform(1, 2, len(sizes)).tolist() for name in LOSSES} | {"starts": 2, "unreached": 0}

    monkeypatch.setitem(rates.GRIDS, "quick", Grid(sizes=(60, 120), trials=2))
    monkeypatch.setattr(rates, "measure", measure)
    monkeypatch.setattr(rates, "identify", cache(partial(identify, fits=1)))
    return asked


def test_a_killed_run_goes_on_and_ends_in_the_same_result(tmp_path, measured):
    journal = tmp_path / "pieces.jsonl"
    whole = theory("quick", journal=Journal(journal))
    assert json.loads(json.dumps(whole)) == whole
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:-9])
    before, seen = list(measured), []
    assert theory("quick", journal=Journal(journal), progress=lambda *counts: seen.append(counts)) == whole
    assert measured == before + before[3:]
    assert seen[0] == (1, 8)
    assert seen[-1] == (8, 8)


def test_another_seed_does_not_take_over_pieces(tmp_path, measured):
    journal = tmp_path / "pieces.jsonl"
    first, second = (theory("quick", seed=seed, journal=Journal(journal))["pieces"] for seed in (0, 1))
    assert first != second
    assert len(measured) == 16


def test_one_trial_is_measured_at_every_size():
    found = measure(2, "full", 0, sizes=(60, 1200), seed=0)
    assert [len(found[name]) for name in LOSSES] == [2, 2, 2, 2]
    assert found["prediction_error"][1] < found["prediction_error"][0]
    assert found == measure(2, "full", 0, sizes=(60, 1200), seed=0)


@pytest.mark.parametrize("activation", sorted({*ACTIVATIONS} - {"relu"}))
def test_a_truth_that_was_generated_is_found_by_the_generator(activation):
    problem = Problem.draw(np.random.default_rng(3), activation)
    data = problem.sample(200, np.random.default_rng(4), noise=0.0)
    found = fit(problem, "full", 1, data, np.random.default_rng(5))
    assert losses(problem, found.factors, data)["value_error"] < 1e-4


def test_every_activation_is_judged_by_the_gates_of_a_redundant_head(tmp_path, monkeypatch):
    monkeypatch.setattr("hora_bench.experiments.theory.identify.MAX_STARTS", 3)  # relu uses them all
    monkeypatch.setattr(rates, "ACTIVATIONS", {name: ACTIVATIONS[name] for name in ("identity", "relu")})
    grid = Grid(sizes=(60, 120), trials=2, fitted_heads=(2,))
    journal = tmp_path / "pieces.jsonl"
    found = activations(grid=grid, journal=Journal(journal))
    relu = [gate for gate in found["gates"] if gate["activation"] == "relu"]
    assert {gate["outcome"] for gate in relu} == {"not resolved"}  # its descents end on the flat side
    assert [gate["activation"] for gate in found["gates"]] == ["identity"] * 3 + ["relu"] * 3
    before = journal.read_text()
    assert activations(grid=grid, journal=Journal(journal)) == found
    assert journal.read_text() == before
    (table,) = tables("theory-activations", found)
    assert len(table.rows) == len(found["gates"])
    same = [{k: v for k, v in one.items() if k != "activation"} for one in found["pieces"]]
    assert same[0] == {
        "fitted_heads": 2,
        "sharing": "full",
        "trial": 0,
        **measure(2, "full", 0, sizes=(60, 120), seed=0),
    }
