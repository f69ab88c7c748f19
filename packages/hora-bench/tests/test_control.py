"""Shuffled labels: chance accuracy for every method, by a bound that guessing respects."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from hora_bench import methods, runs
from hora_bench.experiments.control import chance_bound, control
from hora_bench.experiments.setting import SHUFFLED, Setting, request, vary
from hora_bench.tasks.images import Examples, ImageTask

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
EVERYWHERE = [(method.name, backend) for method in methods.METHODS for backend in method.library]


@pytest.fixture
def setting(vit_directory, monkeypatch):
    """Three classes of brightness, enough of them to validate on that the bound means something."""

    def shades(image_size):
        rng = np.random.default_rng(0)

        def examples(count):
            classes = rng.permutation(np.arange(count) % 3)
            noise = rng.integers(0, 60, (count, 32, 32, 3)) + 80 * classes[:, None, None, None]
            return Examples(list(noise.astype(np.uint8)), classes)

        return ImageTask("digits", 3, examples(48), examples(240), examples(3), image_size=image_size)

    monkeypatch.setattr("hora_bench.experiments.setting.digits", shades)
    base = request(model=str(vit_directory), image_size_px=32, learning_rate=1e-2, steps=12, warmup_steps=2)
    return Setting(base, {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls what flax 0.12 deprecates
@pytest.mark.parametrize(("method", "backend"), EVERYWHERE)
def test_shuffled_labels_are_learned_by_no_method(method, backend, setting, tmp_path):
    task = setting.load("digits" + SHUFFLED)
    asked = vary(setting.base, method=method, backend=backend, task=task.name)
    accuracy = runs.run(asked, task, tmp_path, command="test").scores.accuracy_pct
    assert accuracy <= chance_bound(task.labels("val")) < 50


def test_a_control_compares_with_true_labels(setting, tmp_path):
    (row,) = control(setting, tmp_path, {"torch": ["lora"]})
    assert row["at_chance"]
    assert row["shuffled_pct"] <= row["chance_bound_pct"] < row["accuracy_pct"]


def test_labels_that_leak_are_seen(setting, tmp_path, monkeypatch):
    monkeypatch.setattr("hora_bench.experiments.control.SHUFFLED", "")
    (row,) = control(setting, tmp_path, {"torch": ["lora"]})
    assert not row["at_chance"]


def test_guessing_respects_the_bound():
    rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], [60, 30, 10])
    guesses = np.zeros(100, int)  # the best guess there is
    right = [100 * np.mean(rng.permutation(labels) == guesses) for _ in range(100)]
    permuted = [100 * np.mean(rng.permutation(labels) == labels) for _ in range(1000)]
    assert max(right) < chance_bound(labels)
    assert max(permuted) < chance_bound(labels)


def test_the_experiment_names_every_method():
    controls = tomllib.loads((EXPERIMENTS / "control-digits.toml").read_text())["vary"]["controls"]
    named = [(method, backend) for backend, names in controls.items() for method in names]
    assert sorted(named) == sorted(EVERYWHERE)
