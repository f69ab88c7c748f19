"""Counts of any method on torch: the model on the meta device, under torch's FLOP counter."""

from typing import Any

import torch

from hora_bench.backends.torch import Logits
from hora_bench.backends.torch_methods import prepare
from hora_bench.dry_run.plan import Counts, Workload
from hora_bench.flops import counter
from hora_bench.methods import Method
from hora_bench.models import load


def count_llama(architecture: dict[str, Any], method: Method, work: Workload) -> Counts:
    """Counts of one step of a language model with the architecture of a Hugging Face ``config.json``."""
    model = load.abstract_causal_lm(architecture)
    picked = torch.zeros(work.batch_size, work.outputs // architecture["vocab_size"], dtype=torch.long, device="meta")
    tokens = torch.zeros(work.batch_size, work.seq, dtype=torch.long, device="meta")
    # without a mask transformers 5.23 looks for packed sequences in values, and abstract tensors have none
    masked = {"attention_mask": torch.ones_like(tokens)}
    model.base_model.register_forward_pre_hook(lambda _, args, given: (args, {**given, **masked}), with_kwargs=True)
    return _count(model, method, {"tokens": tokens, "at": picked})


def count_vit(model: Any, method: Method, batch_size: int, image_size: int) -> Counts:
    """Counts of one step of an abstract timm ViT with a new head."""
    image = torch.zeros(batch_size, image_size, image_size, 3, device="meta")
    return _count(model, method, {"image": image})


def _count(model: Any, method: Method, batch: dict[str, torch.Tensor]) -> Counts:
    with torch.device("meta"):
        adapted = Logits(prepare(model, method, seed=0)).train()
    with counter() as counted:
        adapted(batch).sum().backward()
    named = [(name, p) for name, p in adapted.named_parameters() if ".original_module." not in name]
    return Counts(
        params_count=sum(p.numel() for _, p in named),
        trained_count=sum(p.numel() for _, p in named if p.requires_grad),
        step_flops=float(counted.get_total_flops()),
        counted_by="torch",
    )
