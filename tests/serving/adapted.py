"""Models with an adapter that matters, in every form in which they are served."""

from pathlib import Path
from typing import Any

import hora_spec
import numpy as np
import peft
import torch
from hora_spec import Adapter
from hora_torch import HoraConfig
from numpy.typing import NDArray

PROMPTS = ([5, 9, 20, 17, 26, 30, 42], [7], [60, 3, 3, 11, 59, 23, 23, 8, 15, 44, 31, 12])
"""Token ids; a prompt of one token has no attention to speak of, so that v is seen alone."""

TARGETS = {"phi3": ["qkv_proj"], "gpt2": ["c_attn"]}
"""Modules of an architecture; q_proj and v_proj of others. HoRA adapts the rows of q and v of a fused weight."""

FELT = 0.3
"""By how much each adapter here moves log-probabilities at least: a lost or misplaced part of it would be seen."""


def adapted(model: Any, arch: str, sharing: str, *, seed: int = 0) -> Any:
    """The model with a random adapter, of another scaling than 1, in PEFT."""
    torch.manual_seed(seed)
    sizes = {"r": 2, "hora_alpha": 3.0, "hidden_dim": 6, "head_embed_dim": 5}
    config = HoraConfig(
        **sizes, sharing=sharing, target_modules=TARGETS.get(arch, ["q_proj", "v_proj"]), init_weights=False
    )
    result = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if ".hora_hyper." in name:
                parameter.normal_(std=1.0 if "head_embed" in name else 0.5)
    return result


def saved(model: Any, path: Path) -> Adapter:
    """The adapter of a model, after a way over the disk."""
    model.save_pretrained(path)
    return hora_spec.load_adapter(path)


def log_probs(model: Any, tokens: list[int]) -> NDArray[np.float64]:
    """Log-probabilities of every next token, by transformers."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1].double(), -1).numpy()


def distance(one: Any, other: Any) -> float:
    """Largest difference of two functions from prompts to log-probabilities."""
    return max(float(np.abs(one(tokens) - other(tokens)).max()) for tokens in PROMPTS)
