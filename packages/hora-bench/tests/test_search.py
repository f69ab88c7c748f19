"""Rates: grids that go on until the best is inside, equal trials, means over seeds, and what diverges."""

import math

import pytest
from hora_bench.request import request
from hora_bench.search import Grid, best_of, edge_of, next_rate, search
from hora_bench.store import Trial
from hora_spec import HoraError

START = {"rates": [1e-3, 2e-3, 4e-3]}


def trial(rate, accuracy, seed=0):
    return Trial(learning_rate=rate, weight_decay=0.0, seed=seed, accuracy_pct=accuracy, final_loss=None, file=None)


def peaked(peak, diverges=math.inf):
    """Accuracy that falls with the distance from a rate, in factors of two."""
    return lambda rate: None if rate >= diverges else 80 - 5 * abs(math.log2(rate / peak))


def searched(*curves, grid=START):
    """Every curve's best rate and the rates it tried."""
    asked = [request(options={"rank": rank}) for rank in range(1, len(curves) + 1)]
    by_rank = dict(enumerate(curves, 1))
    found = search(asked, lambda one, rate: [trial(rate, by_rank[one.options["rank"]](rate))], Grid.of(grid))
    return [(one.learning_rate, [t.learning_rate for t in trials]) for one, trials in found]


def test_a_search_refines_so_often_once_every_best_is_inside():
    found = searched(peaked(2e-3), peaked(8e-3), grid={**START, "refine": 2})
    assert [len(tried) for _, tried in found] == [3 + 2 + 2] * 2  # two outwards for the second, then two between
    (_, tried), _ = found
    assert {1.41e-3, 2.83e-3} <= set(tried)


@pytest.mark.parametrize("peak", [1e-4, 2.5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 3.2e-2])
def test_a_search_goes_on_until_the_best_rate_is_inside(peak):
    ((best, tried),) = searched(peaked(peak))
    assert min(tried) < best < max(tried)
    assert max(best / peak, peak / best) <= math.sqrt(2) + 0.01


def test_choices_that_are_compared_try_equally_many_rates():
    found = searched(peaked(2e-3), peaked(6.4e-2), peaked(2.5e-4))
    assert len({len(tried) for _, tried in found}) == 1
    assert all(min(tried) < best < max(tried) for best, tried in found)
    assert all(len(set(tried)) == len(tried) for _, tried in found)  # the others refine


def test_beyond_a_rate_that_diverges_lies_nothing():
    ((best, tried),) = searched(peaked(1.0, diverges=6e-3))
    assert (best, max(tried)) == (4e-3, 8e-3)
    ((best, tried),) = searched(peaked(1e-4, diverges=5e-4))  # every rate of the start diverges
    assert best < 5e-4
    assert min(tried) < best


def test_a_search_that_may_not_go_on_far_enough_ends_at_a_marked_edge():
    ((best, tried),) = searched(peaked(1.0), grid={**START, "most": 5})
    assert len(tried) == 5
    assert edge_of([trial(rate, 0.0) for rate in tried], best) == "highest"
    ((best, tried),) = searched(peaked(1.0), grid=START["rates"])
    assert tried == START["rates"]  # a list is tried as it is


def test_the_mean_over_seeds_decides_and_a_seed_that_diverges_rules_a_rate_out():
    trials = [trial(1e-3, 50.0, 0), trial(1e-3, 60.0, 1), trial(2e-3, 90.0, 0), trial(2e-3, 10.0, 1)]
    assert best_of(trials) == (1e-3, 0.0)
    assert best_of([*trials, trial(3e-3, 99.0, 0), trial(3e-3, None, 1)]) == (1e-3, 0.0)
    assert best_of([trial(4e-3, 55.0), *trials]) == (1e-3, 0.0)  # of equals the lower


def test_where_everything_diverges_the_next_rate_is_lower_and_in_the_end_the_error_names_them():
    assert next_rate([trial(1e-3, None), trial(2e-3, None)], 2) == 5e-4
    with pytest.raises(HoraError, match=r"got none of 0\.001, 0\.002: search lower ones"):
        best_of([trial(1e-3, None), trial(2e-3, None)])


@pytest.mark.parametrize(
    "given",
    [
        [1e-3, 1e-3],
        [0.0],
        [-1.0],
        [math.nan],
        ["high"],
        {"rates": [1e-3]},
        {"rates": []},
        {},
        {**START, "factor": 1},
        {**START, "most": 3},
        {**START, "trials": 3},
        {**START, "refine": 10},
    ],
)
def test_a_search_that_cannot_be_one_is_refused(given):
    with pytest.raises(HoraError, match="search"):
        Grid.of(given)
