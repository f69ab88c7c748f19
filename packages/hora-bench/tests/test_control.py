"""Shuffled labels: no method may learn them, and labels that leak are seen."""

import numpy as np
import pytest
from hora_bench import methods
from hora_bench.control import control
from hora_bench.data.images import Examples, ImageTask
from hora_bench.request import request, vary
from hora_bench.run import run
from hora_bench.setting import Setting
from hora_bench.stats import chance_bound

STARTED = [(method.name, backend) for method in methods.METHODS if method.start for backend in method.library]


@pytest.fixture
def shades(vit_directory, monkeypatch):
    """Three classes of brightness, enough of them to validate on that the bound means something."""

    def made(image_size, **settings):
        rng = np.random.default_rng(0)

        def examples(count):
            classes = rng.permutation(np.arange(count) % 3)
            noise = rng.integers(0, 60, (count, 32, 32, 3)) + 80 * classes[:, None, None, None]
            return Examples(list(noise.astype(np.uint8)), classes)

        return ImageTask("digits", 3, examples(48), examples(240), examples(3), image_size=image_size)

    monkeypatch.setattr("hora_bench.data.digits.digits", made)
    base = request(model=str(vit_directory), image_size_px=32, learning_rate=1e-2, steps=12, warmup_steps=2)
    return Setting(base, {})


@pytest.mark.parametrize(("method", "backend"), STARTED)
def test_shuffled_labels_are_learned_by_no_method_that_looks_at_examples_first(method, backend, shades, tmp_path):
    task = shades.load("digits-shuffled")
    asked = vary(shades.base, method=method, backend=backend, task=task.name)
    accuracy = run(asked, task, tmp_path, command="test").scores.accuracy_pct
    assert accuracy <= chance_bound(task.labels("val")) < 50


def test_a_control_compares_with_true_labels(shades, tmp_path):
    (row,) = control(shades, tmp_path, {"torch": ["lora"]})
    assert row["at_chance"]
    assert row["shuffled_pct"] <= row["chance_bound_pct"] < row["accuracy_pct"]


def test_labels_that_leak_are_seen(shades, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTask, "shuffled", lambda task: task)
    (row,) = control(shades, tmp_path, {"torch": ["lora"]})
    assert not row["at_chance"]
