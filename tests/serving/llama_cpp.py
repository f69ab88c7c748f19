"""llama.cpp as a server, by the wheel of xllamacpp."""

import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xllamacpp
from numpy.typing import NDArray


class LlamaCpp:
    """A server of one GGUF model and some adapters, in float32 on one thread.

    Parameters
    ----------
    model
        A GGUF file.
    adapters
        GGUF adapters; each request says which of them it wants.
    """

    def __init__(self, model: Path, adapters: Sequence[Path] = ()) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = params.fit_params = params.cache_prompt = False
        params.verbosity = -1
        params.lora_init_without_apply = True
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        self._server = xllamacpp.Server(params)

    def log_probs(self, tokens: Sequence[int], scales: Mapping[int, float] | None = None) -> NDArray[np.float64]:
        """Log-probabilities of every next token after a prompt, with adapters by number and scale."""
        asked = {
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": 1_000_000,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": [{"id": number, "scale": scale} for number, scale in (scales or {}).items()],
        }
        address, header = f"{self._server.listening_address}/completion", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(asked).encode(), header)) as answer:
            top = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        result = np.full(len(top), np.nan)
        result[[one["id"] for one in top]] = [one["logprob"] for one in top]
        return result
