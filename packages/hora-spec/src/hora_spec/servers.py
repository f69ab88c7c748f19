"""What a server rejects or misreads in a LoRA adapter, said before one is written (spec F6)."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hora_spec.errors import HoraError
from hora_spec.lora import LoraModule

Modules = Mapping[str, LoraModule]
"""Module path to factors, in the form in which they are to be written."""

Whole = Iterable[str]
"""Names of the tensors of modules that were trained whole, biases among them."""

Config = Mapping[str, Any]
"""An adapter's other keys, as `hora_spec.Adapter.config`."""


def check_server(server: str, modules: Modules, whole: Whole, config: Config) -> None:
    """Raise unless a server takes a LoRA adapter and computes with it what was trained (spec F6).

    Parameters
    ----------
    server
        One of `SERVERS`.
    modules, whole, config
        What would be written.

    Raises
    ------
    HoraError
        If the server is none of those known, or takes no such adapter; all reasons are named.
    """
    if not isinstance(server, str) or server not in SERVERS:
        raise HoraError(f"a server is one of {', '.join(SERVERS)}, got {server!r}: choose one, or none (spec F6)")
    if reasons := list(SERVERS[server](modules, whole, config)):
        raise HoraError(f"{server} takes no such LoRA adapter: {'; '.join(reasons)} (spec F6)")


def vllm_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM that holds a rank, None if there is none."""
    return next((limit for limit in _VLLM_RANKS if limit >= rank), None)


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks, 0.32
_VLLM_HEADS = {"classifier", "score"}


def _vllm(modules: Modules, whole: Whole, config: Config) -> Iterator[str]:
    yield from _linear_maps(modules)
    if any(module.fan_in_fan_out for module in modules.values()):
        yield "it knows no LoRA of weights stored (in, out), as GPT-2 has them: merge"
    if vllm_rank(rank := max(module.rank for module in modules.values())) is None:
        yield f"its ranks end at {_VLLM_RANKS[-1]}, got {rank}: merge"
    if config.get("bias", "none") != "none":
        yield f"it loads no biases, got bias={config['bias']!r}: merge"
    heads = {name.rpartition(".")[0].rpartition(".")[2] for name in whole}
    named = {*(config.get("modules_to_save") or ())}
    if (heads | named) - _VLLM_HEADS or len(heads) > 1:
        yield f"of modules trained whole it loads one of {sorted(_VLLM_HEADS)}, got {sorted(heads | named)}: merge"
    elif heads - named:
        yield f"it loads heads that modules_to_save of the config names, got {sorted(named)}: name {sorted(heads)}"


_SGLANG_LAYER = re.compile(r"(?P<stack>(.*\.)?)layers\.\d+\.")  # sglang.srt.layers.utils.common.get_layer_id


def _sglang(modules: Modules, whole: Whole, config: Config) -> Iterator[str]:
    yield from _llama_cpp(modules, whole, config)
    places = {path: _SGLANG_LAYER.match(path) for path in modules}
    if outside := [path for path, place in places.items() if place is None]:
        yield f"it passes over weights outside of layers.N without saying so, got {outside[0]}: merge"
    stacks = {place["stack"] for place in places.values() if place is not None}
    if len(stacks) > 1:
        yield f"it tells layers apart by their number alone, got those of {sorted(stacks)}: merge"
    blocks: dict[str, set[str]] = {}
    for path in modules:
        block, _, name = path.rpartition(".")
        blocks.setdefault(block, set()).add(name)
    for names in blocks.values():
        if names & {"q_proj", "k_proj", "v_proj"} and not {"q_proj", "v_proj"} <= names:
            yield f"it stacks q, k and v and needs q_proj and v_proj, got {sorted(names)}: merge"
            return


def _llama_cpp(modules: Modules, whole: Whole, config: Config) -> Iterator[str]:
    yield from _linear_maps(modules)
    if len({(module.rank, module.alpha) for module in modules.values()}) > 1:
        yield "it ignores patterns of rank and alpha: write the portable form, compact=False"
    if names := sorted(whole):
        yield f"it loads nothing but LoRA factors, got {names[:3]}, which were trained whole: merge"


def _linear_maps(modules: Modules) -> Iterator[str]:
    for path, module in modules.items():
        if module.parameter != "weight" or module.kernel_axes:
            kind = "a convolution" if module.kernel_axes else module.parameter
            yield f"it adapts the weights of linear maps, got {kind} of {path}: merge"
            return


SERVERS: Mapping[str, Callable[[Modules, Whole, Config], Iterator[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
"""Servers whose limits are known, each read in its source.

vLLM 0.32.0
    ``config/lora.py`` (ranks), ``lora/peft_helper.py`` (biases, heads), ``lora/lora_model.py`` (one head, by name).
SGLang 0.5.23
    ``srt/lora/lora.py`` (layers by number, stacked q, k and v, one scaling), ``srt/layers/utils/common.py``.
llama.cpp b11434
    ``convert_lora_to_gguf.py`` (LoRA factors alone, one alpha), ``src/llama-adapter.cpp`` (alpha over each rank).
"""
