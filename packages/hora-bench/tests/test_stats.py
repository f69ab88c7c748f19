"""Intervals that hold how few runs there are, and words that follow from them alone."""

import numpy as np
import pytest
from hora_bench.stats import Difference, chance_bound, mean_interval, two_way_interval
from scipy import stats


@pytest.mark.parametrize("accuracies", [[100.0], [0.0], [60.0, 70.0, 65.0]])
def test_intervals_hold_the_mean_and_stay_percentages(accuracies):
    found = mean_interval(accuracies, 200)
    assert 0 <= found["low_pct"] <= found["mean_pct"] <= found["high_pct"] <= 100
    assert mean_interval(accuracies, 20_000)["low_pct"] >= found["low_pct"]


def test_two_seeds_are_judged_by_student_and_not_by_gauss():
    found = mean_interval([24.7646, 29.4727], 1_000_000)
    expected = stats.t.interval(0.95, 1, 27.11865, stats.sem([24.7646, 29.4727]))
    assert (found["low_pct"], found["high_pct"]) == pytest.approx((max(0, expected[0]), expected[1]), abs=0.3)
    assert found["high_pct"] > 55  # by z it was 32.5


def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [
        one.low <= 1.0 <= one.high
        for one in (Difference.of(rng.normal(51, 2, 3), rng.normal(50, 2, 3)) for _ in range(600))
    ]
    assert 0.93 < np.mean(held) < 0.97


def test_differences_leave_out_what_seeds_share():
    seeds = np.array([60.0, 80.0, 70.0])
    found = Difference.of(seeds + 1, seeds)
    assert (found.mean, found.low, found.high, found.detectable) == (1.0, 1.0, 1.0, 0.0)
    found, expected = Difference.of([61.0, 83.0, 72.0], seeds), stats.ttest_rel([61.0, 83.0, 72.0], seeds)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.01)


def test_one_seed_has_no_interval_and_resolves_nothing():
    found = Difference.of([90.0], [50.0])
    assert (found.mean, found.low, found.detectable, found.word()) == (40.0, None, None, "not resolved")


def test_the_detectable_difference_is_found_in_four_of_five_experiments():
    rng, seeds, scatter = np.random.default_rng(0), 8, 2.5
    detectable = np.mean([Difference.of(rng.normal(0, scatter, seeds), np.zeros(seeds)).detectable for _ in range(300)])
    found = [Difference.of(rng.normal(detectable, scatter, seeds), np.zeros(seeds)).low > 0 for _ in range(600)]
    assert 0.75 < np.mean(found) < 0.88


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.2, 3.0, "better"),
        (-3.0, -0.2, "worse"),
        (-0.9, 0.8, "equal"),
        (-0.5, 2.0, "not resolved"),
        (0.1, 0.9, "equal"),
    ],
)
def test_words_follow_from_the_interval_and_a_margin_stated_beforehand(low, high, word):
    assert Difference.stored((low + high) / 2, low, high, 5).word(margin=1.0) == word


def test_a_stored_interval_tells_what_could_have_been_seen():
    fresh = Difference.of([61.0, 83.0, 72.0], [60.0, 80.0, 70.0])
    assert Difference.stored(fresh.mean, fresh.low, fresh.high, 3) == fresh


def test_resampling_examples_widens_what_seeds_alone_would_say():
    rng = np.random.default_rng(0)
    shared = rng.random(60) < 0.5  # examples on which one method is right with every seed, the other with none
    right = np.tile(shared, (10, 1))
    mean, low, high = two_way_interval(right, ~right)
    assert Difference.of(100 * right.mean(1), 100 * (~right).mean(1)).high - mean < 0.01
    assert high - low > 30
    assert low <= mean <= high


def test_guessing_respects_the_bound():
    rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], [60, 30, 10])
    guesses = np.zeros(100, int)  # the best guess there is
    right = [100 * np.mean(rng.permutation(labels) == guesses) for _ in range(100)]
    permuted = [100 * np.mean(rng.permutation(labels) == labels) for _ in range(1000)]
    assert max(right) < chance_bound(labels)
    assert max(permuted) < chance_bound(labels)
