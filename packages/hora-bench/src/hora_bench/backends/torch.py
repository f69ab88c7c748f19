"""The learner on torch."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, patch_environment
from einops import rearrange
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from hora_bench.backends import torch_starts
from hora_bench.data.base import Batch
from hora_bench.models.surgery import PathDrop
from hora_bench.recipe import Recipe
from hora_bench.training import Arrays

QUIET = "9"  # above every level of the profiler's own log


@final
class Logits(nn.Module):
    """A batch to logits: of images and sentences ``(batch, classes)``, of responses ``(batch, response, vocab)``.

    Parameters
    ----------
    model
        Any of the benchmark's.
    autocast
        Dtype in which images and sentences are multiplied with weights that stay as they are; None: in theirs.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits in float32."""
        if "at" not in batch:
            return self._classified(batch).float()
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = causal.base_model(input_ids=batch["tokens"].long(), use_cache=False).last_hidden_state
        picked = hidden.gather(1, batch["at"].long()[..., None].expand(-1, -1, hidden.shape[-1]))
        return causal.get_output_embeddings()(picked).float()

    def _classified(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        given = batch["image"].permute(0, 3, 1, 2) if "image" in batch else batch["tokens"]
        cast = torch.autocast(given.device.type, self.autocast) if self.autocast else nullcontext()
        with cast, PathDrop.following(self.model, batch.get("paths")):
            return self.model(given) if "image" in batch else self.model(given, batch["valid"], batch["types"])

    def generate(self, **settings: Any) -> torch.Tensor:
        """Ids ``(batch, prompt + new)`` that the model writes after prompts."""
        return self.model.generate(**settings)


@final
class TorchLearner:
    """AdamW on the parameters that require grad.

    Parameters
    ----------
    model
        Prepared by `hora_bench.backends.torch_methods.prepare`.
    recipe
        Rates and moments.
    accelerator
        An `accelerate.Accelerator` to run on its device and, under ``accelerate launch``, in several processes: each
        takes its rows of every batch, the loss is weighted so that the sum equals one process, and all get all outputs.
    autocast
        As `Logits` takes it.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, accelerator: Any, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.clip_norm = recipe.clip_norm
        moments = (recipe.beta1, recipe.beta2)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=recipe.learning_rate, betas=moments, eps=recipe.eps, weight_decay=recipe.weight_decay
        )
        self.logits, self.optimizer = accelerator.prepare(Logits(model, autocast), optimizer)
        register_fsdp_forward_method(self.logits, "generate")  # gathers the weights first, as a forward pass does

    @property
    def depth(self) -> int:
        """Number of blocks of a vision transformer."""
        return len(self.model.blocks)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        module = self.accelerator.unwrap_model(self.logits).model
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    @property
    def params_count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.trained.values())

    @property
    def total_params_count(self) -> int:
        """Number of all values, trained, fixed and frozen; PEFT's spare copy of a module trained whole is left out."""
        named = [*self.accelerator.unwrap_model(self.logits).named_parameters(), *self.fixed.items()]
        return sum(p.numel() for name, p in named if ".original_module." not in name)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    def decided(self, answer: bool) -> bool:
        """The main process's answer, in every process."""
        return broadcast_object_list([answer])[0]

    def step(self, batch: Batch, learning_rate: float, step: int) -> float:
        """One optimiser step; the loss before it. A loss that is not finite changes nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(step)
        self.logits.train()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        self.accelerator.backward(loss)
        before = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if isfinite(before):
            if self.clip_norm is not None:
                self.accelerator.clip_grad_norm_(self.trained.values(), self.clip_norm)
            self.optimizer.step()
        return before

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted mean cross-entropy, 0 where all weights are; the mean over processes is that of the whole batch."""
        local = self.local(batch)
        return summed_loss(self.logits(local), local) * (self.accelerator.num_processes / total_weight(batch))

    @torch.no_grad()
    def outputs(self, batch: Batch) -> np.ndarray:
        """Logits ``(rows, classes)`` of images and sentences, or summed log-likelihoods ``(rows,)`` of responses."""
        self.logits.eval()
        local = self.local(batch)
        logits = self.logits(local)
        if "at" not in batch:
            return self.gathered(logits, len(batch["label"]))
        chosen = logits.log_softmax(-1).gather(-1, local["label"].long()[..., None])[..., 0]
        return self.gathered((chosen * local["weight"]).sum(-1), len(batch["tokens"]))

    @torch.no_grad()
    def write(self, batch: Batch, *, end: int, new_tokens: int, beams: int) -> np.ndarray:
        """Ids ``(rows, new_tokens)`` that are written after prompts, `end` from the end on."""
        module = self.accelerator.unwrap_model(self.logits)
        module.eval()
        local = self.local(batch)
        written = module.generate(
            input_ids=local["tokens"].long(),
            attention_mask=local["valid"].long(),
            num_beams=beams,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
            synced_gpus=self.accelerator.num_processes > 1,  # processes that share weights stop together
        )
        ids = written[:, batch["tokens"].shape[1] :]
        ids = nn.functional.pad(ids, (0, new_tokens - ids.shape[1]), value=end)
        return self.gathered(ids, len(batch["tokens"]))

    def save(self, directory: Path) -> str:
        """Write what was trained into an empty directory, and say in which format; the main process writes."""
        whole = {name: torch.from_numpy(_whole(parameter)) for name, parameter in self.trained.items()}
        if not self.is_main:
            return ""
        model = self.accelerator.unwrap_model(self.logits).model
        if hasattr(model, "peft_config") and not torch_starts.changes_base(model):
            sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
            given = {"state_dict": whole} if sharded else {}
            model.save_pretrained(directory, save_embedding_layers=False, **given)
            return "adapter of PEFT"
        save_file(whole, directory / "trained.safetensors")
        changed = ", whose base its start has changed" if hasattr(model, "peft_config") else ""
        return f"trained parameters by their names in the model{changed}"

    def local(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows of a batch for this process, every n-th of n; rows are added so that all have equally many."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index

        def own(name: str, value: np.ndarray) -> torch.Tensor:
            added = value[-1:].repeat(-len(value) % count, axis=0)
            added = np.zeros_like(added) if name == "weight" else added
            return torch.from_numpy(np.concatenate([value, added])[rank::count]).to(self.accelerator.device)

        return {name: own(name, value) for name, value in batch.items()}

    def gathered(self, rows: torch.Tensor, count: int) -> np.ndarray:
        """What all processes made of their rows, in the order of the batch, which had `count`."""
        gathered = self.accelerator.gather(rows.contiguous())
        ordered = rearrange(gathered, "(process row) ... -> (row process) ...", process=self.accelerator.num_processes)
        return ordered[:count].cpu().numpy()

    def peak_bytes(self, batch: Batch) -> int:
        """Most bytes that a training step holds at once, weights and moments included; the learner stays as it is."""
        state = self.state()
        self.optimizer.zero_grad()  # allocated anew in the step that is measured
        held = _storage_bytes(self._held())
        growth = _device_growth if self.accelerator.device.type == "cuda" else _host_growth
        peak = held + growth(partial(self.step, batch, 0.0, 0))
        self.restore(state)
        return peak

    def _held(self) -> Iterator[torch.Tensor]:
        """Tensors that live between steps."""
        yield from self.logits.parameters()
        yield from self.logits.buffers()
        for moments in self.optimizer.optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, torch.Tensor))

    def device_peak_bytes(self) -> int:
        """Largest memory allocated so far on an accelerator; 0 on CPU."""
        return torch.cuda.max_memory_allocated() if self.accelerator.device.type == "cuda" else 0

    @property
    def fixed(self) -> dict[str, torch.Tensor]:
        """What an adapter holds beside its parameters, by name: an A that is not trained."""
        module = self.accelerator.unwrap_model(self.logits).model
        return {name: b for name, b in module.named_buffers() if ".hora_hyper." in name}

    def state(self) -> Arrays:
        """Trained parameters and optimiser moments, and the A that does not train: another start may differ in bits."""
        arrays = {f"param.{name}": _whole(p) for name, p in self.trained.items()}
        arrays |= {f"fixed.{name}": _whole(b) for name, b in self.fixed.items()}
        for index, p in enumerate(self.trained.values()):
            moments = self.optimizer.optimizer.state.get(p, {})
            arrays |= {f"moment.{index}.{key}": _whole(value) for key, value in moments.items()}
        return arrays

    def restore(self, state: Arrays) -> None:
        """Go back to an earlier `state`."""
        with torch.no_grad():
            for name, buffer in self.fixed.items():
                buffer.copy_(_like(state[f"fixed.{name}"], buffer))
            for index, (name, parameter) in enumerate(self.trained.items()):
                parameter.copy_(_like(state[f"param.{name}"], parameter))
                prefix = f"moment.{index}."
                moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                self.optimizer.optimizer.state[parameter] = {
                    key: _like(value, parameter if value.ndim else None) for key, value in moments.items()
                }

    @torch.no_grad()
    def first_nonfinite(self, batch: Batch) -> str:
        """The first trained parameter, or else the first module in the order of the calls, that is not finite."""
        for name, parameter in self.trained.items():
            if not torch.isfinite(parameter).all():
                return f"first in {name}"
        found: list[str] = []

        def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name or "the model")

        modules = self.accelerator.unwrap_model(self.logits).model.named_modules()
        hooks = [module.register_forward_hook(partial(look, name)) for name, module in modules]
        try:
            self.loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return f"first in the output of {found[0]}" if found else "all parameters and all modules' outputs are finite"


def summed_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted sum of the cross-entropies."""
    each = nn.functional.cross_entropy(logits.flatten(0, -2), batch["label"].flatten().long(), reduction="none")
    return (each * batch["weight"].flatten()).sum()


def total_weight(batch: Mapping[str, Any]) -> float:
    """What a sum of losses is divided by."""
    return max(1.0, float(batch["weight"].sum()))


def start_loss(autocast: torch.dtype | None) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:
    """The loss of a whole batch as a function of the model: what a start from examples differentiates."""
    return lambda model, batch: summed_loss(Logits(model, autocast)(batch), batch) / total_weight(batch)


def placed(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """All rows of a batch, on a device."""
    return {name: torch.from_numpy(value).to(device) for name, value in batch.items()}


def make_accelerator(device: str = "auto") -> Accelerator:
    """An accelerator on a device that is there; ``"auto"`` takes a GPU where there is one."""
    # without saying so, several processes on CPUs would not know of each other
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    return Accelerator(cpu=on_cpu)


def exit_if_launched() -> None:
    """End this process here, successfully, if it is one of several that `accelerate launch` or `torchrun` started.

    Gloo's threads may release tensors after the interpreter has ended, which aborts the process and lets the launcher
    kill the others (pytorch/pytorch#190489). Destroying the group joins the threads only once nothing refers to it,
    and FSDP2's caches do.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _device_growth(run: Callable[[], Any]) -> int:
    """How many more bytes of the GPU are allocated at the worst moment of `run` than before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _host_growth(run: Callable[[], Any]) -> int:
    """The same on CPU, which keeps no such count: the running sum of the profiler's allocations and frees."""
    with (
        patch_environment(kineto_log_level=QUIET),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes), default=0)


def _whole(tensor: torch.Tensor) -> np.ndarray:
    """All of a tensor, also where processes hold parts of it; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return np.array((tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().numpy())


def _like(value: np.ndarray, tensor: torch.Tensor | None) -> torch.Tensor:
    """An array as a tensor of another one's dtype and place; None leaves it on the CPU, as Adam keeps its count."""
    new = torch.from_numpy(np.array(value))
    if isinstance(tensor, DTensor):
        return distribute_tensor(new.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
    return new if tensor is None else new.to(tensor.device, tensor.dtype)
