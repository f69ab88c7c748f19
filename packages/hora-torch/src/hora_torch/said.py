"""What a config says of modules by name, and whether it concerns any: a name that is misspelt would do nothing."""

import copy
from collections.abc import Iterable, Mapping, Sequence

from hora_spec import HoraError
from peft.tuners.tuners_utils import check_target_module_exists

from hora_torch.config import HoraConfig
from hora_torch.roles import matches

_OF_TASKS = {"classifier", "score", "qa_outputs"}
"""What PEFT adds to ``modules_to_save`` for some tasks, without looking which of them there are."""


def check_patterns(config: HoraConfig, fields: Iterable[str], modules: Sequence[str]) -> None:
    """Raise if a field maps a pattern to something, and the pattern is that of none of the modules."""
    for field in fields:
        said = getattr(config, field)
        patterns = said if isinstance(said, Mapping) else ()  # one value for all speaks of no name
        if idle := [key for key in patterns if not any(matches(key, name) for name in modules)]:
            raise HoraError(f"{field} speaks of targets, got {idle}, which none of them is called: correct the names")


def check_layers(config: HoraConfig, modules: Sequence[str]) -> None:
    """Raise if a number in ``layers_to_transform`` is that of no layer with a target."""
    said = config.layers_to_transform
    numbers = [said] if isinstance(said, int) else list(said or ())
    for number in numbers:
        alone = copy.copy(config)
        alone.layers_to_transform = [number]
        if not any(check_target_module_exists(alone, name) for name in modules):
            raise HoraError(
                f"layers_to_transform are numbers of layers, got {number}, in which there is no target: correct the "
                "number, or name the layers' container with layers_pattern"
            )


def unmatched(config: HoraConfig, modules: Iterable[str]) -> dict[str, list[str]]:
    """Names in ``target_modules`` and ``modules_to_save`` that no module of the model has, by field."""
    modules, said = list(modules), config.target_modules
    targets = () if isinstance(said, str) or said is None else said
    whole = set(config.modules_to_save or ()) - _OF_TASKS
    found = {
        "target_modules": [name for name in targets if not any(f".{m}".endswith(f".{name}") for m in modules)],
        "modules_to_save": [name for name in whole if not any(m.endswith(name) for m in modules)],
    }
    return {field: sorted(names) for field, names in found.items() if names}
