"""A sentence encoder with a new linear head on the mean of its tokens."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn


@final
class SentenceClassifier(nn.Module):
    """``head(mean over tokens of encoder(tokens))``, padding left out of the mean.

    The mean, since sentence encoders such as MiniLM are pretrained to say what a sentence means by it; a pooler of the
    checkpoint, which next-sentence prediction trained, is left out.

    Parameters
    ----------
    encoder
        Of transformers.
    head
        Kernel ``(features, classes)`` and bias.
    """

    def __init__(self, encoder: Any, head: tuple[np.ndarray, np.ndarray]) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.head = nn.Linear(*head[0].shape)
        if not self.head.weight.is_meta:
            with torch.no_grad():
                self.head.weight.copy_(torch.from_numpy(head[0].T.copy()))
                self.head.bias.copy_(torch.from_numpy(head[1]))

    def forward(
        self,
        tokens: Int[torch.Tensor, "batch seq"],
        valid: Int[torch.Tensor, "batch seq"],
        types: Int[torch.Tensor, "batch seq"],
    ) -> Float[torch.Tensor, "batch classes"]:
        """Logits; `valid` is 0 for padding, `types` 1 in the second of a pair, where the encoder knows pairs."""
        given = {"token_type_ids": types.long()} if getattr(self.config, "type_vocab_size", 0) > 1 else {}
        hidden = self.encoder(input_ids=tokens.long(), attention_mask=valid.long(), **given).last_hidden_state
        weight = valid[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))
