"""Names that other methods of PEFT give to arguments, and what HoRA says to them."""

import difflib
from collections.abc import Iterable, Mapping

from hora_spec import HoraError

_RENAMED = {
    "lora_alpha": "hora_alpha",
    "alpha": "hora_alpha",
    "lora_dropout": "hora_dropout",
    "dropout": "hora_dropout",
    "rank": "r",
    "init_lora_weights": "init_weights",
}
_NO_INITIAL_VALUES = "initial values are part of the specification (spec I1 to I5), use seed for others"
_NO_VARIANT = "it changes LoRA into another method, which HoRA is not combined with, leave it out"
_REFUSED = {
    "fan_in_fan_out": "the class of a module tells how it stores its weight, leave it out",
    "layer_replication": "replicated layers are one weight, of which each adapter would merge its own update, copy the "
    "layers instead",
    "target_parameters": "stacked experts are many maps in one, and PEFT's wrapper of parameters is LoRA's, name "
    "modules in target_modules",
    "lora_bias": "B has no bias, train those of the base with bias='hora_only'",
    "ensure_weight_tying": "adapted weights are not tied, give each module a weight of its own",
    "runtime_config": "HoRA keeps nothing in other places than its base, leave it out",
    "megatron_config": "Megatron's layers are not supported, shard with torch's DTensor",
    "megatron_core": "Megatron's layers are not supported, shard with torch's DTensor",
    "loftq_config": _NO_INITIAL_VALUES,
    "eva_config": _NO_INITIAL_VALUES,
    "corda_config": _NO_INITIAL_VALUES,
    "lora_ga_config": _NO_INITIAL_VALUES,
    "use_dora": _NO_VARIANT,
    "velora_config": _NO_VARIANT,
    "alora_invocation_tokens": _NO_VARIANT,
    "use_qalora": _NO_VARIANT,
    "qalora_group_size": _NO_VARIANT,
    "monteclora_config": _NO_VARIANT,
    "use_bdlora": _NO_VARIANT,
    "arrow_config": _NO_VARIANT,
    "kasa_config": _NO_VARIANT,
}


class UnknownArgumentError(HoraError, TypeError):
    """An argument that HoRA does not have; also what Python raises for one."""


def check_arguments(given: Mapping[str, object], known: Iterable[str]) -> None:
    """Raise for the first argument that is not known, with the name it has here or the reason why it has none.

    The words are those of Python's own error, by which PEFT tells files of newer versions.
    """
    known = list(known)
    for name in given:
        if name in known:
            continue
        if name in _RENAMED:
            hint = f"it is called {_RENAMED[name]} here"
        elif name in _REFUSED:
            hint = _REFUSED[name]
        else:
            close = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean one of {close}?" if close else f"the arguments are {known}"
        raise UnknownArgumentError(f"HoraConfig got an unexpected keyword argument {name!r}: {hint}")
