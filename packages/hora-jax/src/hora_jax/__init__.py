"""HoRA for any JAX pytree and Flax NNX: hypernetwork-shared low-rank adaptation of attention heads."""

import warnings
from importlib import import_module
from typing import Any

from hora_jax import functional, presets
from hora_jax.adapted import Adapted, Report, adapt, adapt_each
from hora_jax.adapter import delta, factors, init, merge, replace_weights, weights
from hora_jax.checkpoint import save_merged
from hora_jax.files import export_lora, from_adapter, load_adapter, load_specs, plan_from, save_adapter, to_adapter
from hora_jax.joint import joint_a
from hora_jax.planning import Layer, Plan, make_plan
from hora_jax.targets import Site, Target
from hora_jax.trained import join, labels, split
from hora_jax.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Layer",
    "Plan",
    "Report",
    "Site",
    "Target",
    "Verification",
    "adapt",
    "adapt_each",
    "delta",
    "export_lora",
    "factors",
    "from_adapter",
    "functional",
    "init",
    "join",
    "joint_a",
    "labels",
    "load_adapter",
    "load_specs",
    "make_plan",
    "merge",
    "nnx",
    "plan",
    "plan_from",
    "presets",
    "replace_weights",
    "save_adapter",
    "save_merged",
    "split",
    "to_adapter",
    "verify",
    "weights",
]


def plan(params: Any, spec: Any, targets: Any) -> Plan:
    """Another name of `make_plan`, until version 0.2: a plan is what it returns."""
    warnings.warn("hora_jax.plan is called hora_jax.make_plan", DeprecationWarning, stacklevel=2)
    return make_plan(params, spec, targets)


def __getattr__(name: str) -> Any:
    if name == "nnx":  # imports flax, which takes seconds
        return import_module("hora_jax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
