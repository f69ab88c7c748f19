"""One training run per framework, behind the same few methods: what the training and exchange tests compare.

A run trains the adapter of a small model with AdamW in float64 or float32. `train` starts a new optimiser, as a user
does who has received an adapter from elsewhere: files carry parameters, not the state of an optimiser.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import hora_jax
import hora_spec
import hora_torch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from hora_jax.nnx import HoraModel
from hora_spec import AdapterSpec
from hora_torch import HoraConfig
from torch.nn.functional import cross_entropy

from .models import Model, widen_jax, widen_torch

ADAMW = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
LEARNING_RATE = 5e-3

Params = dict[str, dict[str, Any]]


def config(spec: AdapterSpec, **more: Any) -> HoraConfig:
    """The PEFT configuration of a method."""
    values = spec.to_dict()
    return HoraConfig(r=values.pop("rank"), hora_alpha=values.pop("alpha"), **values, **more)


@dataclass(slots=True)
class TorchRun:
    """timm's or transformers' model under `peft.get_peft_model`."""

    model: Model
    spec: AdapterSpec
    wide: bool
    adapted: peft.PeftModel = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Go back to the initial adapter."""
        self._adapt(lambda base: peft.get_peft_model(base, config(self.spec)))

    def _adapt(self, adapt: Any) -> None:
        base = self.model.torch()
        self.adapted = adapt(widen_torch(base) if self.wide else base)
        self._widen()

    def _widen(self) -> None:
        for hypernet in self._hypernets().values() if self.wide else ():
            hypernet.double()

    def _hypernets(self) -> dict[str, hora_torch.hypernet.HoraHypernet]:
        found = (m for m in self.adapted.modules() if isinstance(m, hora_torch.hypernet.HoraHypernet))
        return {module.name: module for module in found}

    def params(self) -> Params:
        """Layer to canonical parameter to array."""
        return {
            name: {key: value.detach().numpy().copy() for key, value in hypernet.params().items()}
            for name, hypernet in self._hypernets().items()
        }

    def logits(self, inputs: Any) -> Any:
        """Output of the adapted model."""
        return self.apply(self.adapted, inputs)

    def apply(self, module: torch.nn.Module, inputs: Any) -> Any:
        """Output of any form of the model."""
        with torch.no_grad():
            return self.model.logits(module, self._tensor(inputs)).numpy()

    def train(self, steps: Iterable[int]) -> list[float]:
        """Train on these batches with a new optimiser; the loss of each."""
        optimizer = torch.optim.AdamW(
            [param for param in self.adapted.parameters() if param.requires_grad],
            lr=LEARNING_RATE,
            betas=(ADAMW["b1"], ADAMW["b2"]),
            eps=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
        )
        losses = []
        for step in steps:
            inputs, labels = map(self._tensor, self.model.batch(step))
            loss = cross_entropy(self.model.logits(self.adapted, inputs).flatten(0, -2), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def save(self, directory: Path) -> None:
        """Write the adapter, whose parameters are float32 numbers from then on."""
        for hypernet in self._hypernets().values():
            hypernet.float()
        self.adapted.save_pretrained(directory)
        self._widen()

    def load(self, directory: Path) -> None:
        """Continue from an adapter, whichever framework wrote it."""
        self._adapt(lambda base: peft.PeftModel.from_pretrained(base, directory, is_trainable=True))

    def export_lora(self, directory: Path) -> None:
        """Write the adapter as LoRA, in the dtype of the run."""
        hora_torch.export_lora(self.adapted, directory, dtype=np.float64 if self.wide else np.float32)

    def _tensor(self, values: Any) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.to(torch.float64 if self.wide else torch.float32) if tensor.is_floating_point() else tensor


@dataclass
class JaxRun:
    """The NNX model with the same weights, trained through plain optax."""

    model: Model
    spec: AdapterSpec
    wide: bool
    monkeypatch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        base = self.model.jax(self.model.torch())
        self.base = widen_jax(base, self.monkeypatch) if self.wide else base
        self.dtype = jnp.float64 if self.wide else jnp.float32
        self.plan = hora_jax.make_plan(self.base, self.spec, self.model.targets)
        self.optimizer = optax.adamw(LEARNING_RATE, **ADAMW)
        self.restart()

    def restart(self) -> None:
        """Go back to the initial adapter."""
        self.phi = hora_jax.init(self.plan, dtype=self.dtype)

    def params(self) -> Params:
        """Layer to canonical parameter to array."""
        return {
            layer.name: {key: np.asarray(value[i]) for key, value in self.phi[group].items()}
            for group, members in self.plan.groups().items()
            for i, layer in enumerate(members)
        }

    def logits(self, inputs: Any) -> Any:
        """Output of the adapted model."""
        return self.apply(HoraModel(self.base, self.plan, self.phi), inputs)

    def apply(self, module: Any, inputs: Any) -> Any:
        """Output of any form of the model."""
        return np.asarray(jax.jit(lambda module, inputs: module(inputs))(module, self._array(inputs)))

    def train(self, steps: Iterable[int]) -> list[float]:
        """Train on these batches with a new optimiser; the loss of each."""
        state, losses = self.optimizer.init(self.phi), []
        for step in steps:
            inputs, labels = self.model.batch(step)
            self.phi, state, loss = self._step(self.phi, state, self._array(inputs), jnp.asarray(labels))
            losses.append(float(loss))
        return losses

    @cached_property
    def _step(self) -> Any:
        def loss(phi: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
            logits = HoraModel(self.base, self.plan, phi)(inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(phi: Any, state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(phi, inputs, labels)
            updates, state = self.optimizer.update(grads, state, phi)
            return optax.apply_updates(phi, updates), state, value

        return jax.jit(step)

    def save(self, directory: Path) -> None:
        """Write the adapter, whose parameters are float32 numbers from then on."""
        hora_jax.save_adapter(directory, self.plan, self._narrow())
        self.phi = jax.tree.map(lambda leaf: leaf.astype(self.dtype), self._narrow())

    def load(self, directory: Path) -> None:
        """Continue from an adapter, whichever framework wrote it."""
        loaded = hora_jax.load_adapter(directory, self.plan)
        self.phi = jax.tree.map(lambda leaf: leaf.astype(self.dtype), loaded)

    def export_lora(self, directory: Path) -> None:
        """Write the adapter as LoRA, in the dtype of the run."""
        if self.wide:
            hora_spec.export_lora(hora_jax.to_adapter(self.plan, self._narrow()), directory, dtype=np.float64)
        else:
            hora_jax.export_lora(self.plan, self.phi, directory)

    def _narrow(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.phi)

    def _array(self, values: Any) -> jax.Array:
        return jnp.asarray(values, self.dtype) if np.issubdtype(values.dtype, np.floating) else jnp.asarray(values)
