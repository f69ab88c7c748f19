"""The table of fine-tuning methods: HoRA and its variants, and peers from their own libraries."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from hora_spec import PRESETS, AdapterSpec, HoraError, preset
from hora_spec.joint import Scale, Source

Family = Literal["hora", "lora", "dora", "vera", "vblora", "eva", "lora-ga", "probe", "full"]


@dataclass(frozen=True, slots=True)
class Method:
    """A named way of fine-tuning.

    Attributes
    ----------
    name
        As given to ``--method``.
    library
        Who implements it on each backend; a missing backend cannot run it.
    description
        For ``hora-bench methods``.
    family
        How `hora_bench.backends.torch_methods` and `jax_methods` prepare a model for it.
    options
        Defaults that ``--option key=value`` changes. Those named ``start_...`` say how A starts from examples.
    preset
        Of HoRA's methods: the name in `hora_spec.PRESETS` of what it is, where it has one.
    """

    name: str
    library: dict[str, str]
    description: str
    family: Family
    options: dict[str, Any] = field(default_factory=dict)
    preset: str = ""

    def configured(self, changes: dict[str, Any]) -> "Method":
        """The same method with other options.

        Raises
        ------
        HoraError
            The method has no such option, or not with such a value.
        """
        if unknown := sorted(set(changes) - set(self.options)):
            known = ", ".join(self.options) or "none"
            raise HoraError(f"the options of {self.name} are {known}, got {', '.join(unknown)}: see hora-bench methods")
        method = replace(self, options={**self.options, **changes})
        if method.family == "hora":
            _ = method.spec  # the specification checks it
        for key, value in method.options.items():
            _check(method, key, value)
        return method

    def check_backend(self, backend: str) -> None:
        """Raise HoraError unless the method exists on a backend."""
        if backend not in self.library:
            raise HoraError(
                f"{self.name} exists on {', '.join(self.library)}, got --backend {backend}: see hora-bench methods"
            )

    @property
    def spec(self) -> AdapterSpec:
        """The adapter of a HoRA method."""
        return AdapterSpec(**{key: value for key, value in self.options.items() if not key.startswith(START)})

    @property
    def start(self) -> dict[str, Any]:
        """How A starts from examples: arguments of ``joint_a`` and ``batches``, a number; nothing where it does not."""
        return {key.removeprefix(START): value for key, value in self.options.items() if key.startswith(START)}


def _check(method: Method, key: str, value: Any) -> None:
    """Sizes are whole numbers in bounds, words known; the scale of an update is a positive number, or None."""
    if low := LEAST.get(key):
        if type(value) is not int or not low <= value <= MOST:
            raise HoraError(f"{key} of {method.name} is a whole number from {low} to {MOST}, got {value!r}: change it")
    elif (words := WORDS.get(key)) and value not in words:
        raise HoraError(f"{key} of {method.name} is one of {', '.join(words)}, got {value!r}: change it")
    elif key == "alpha" and value is not None:
        number = type(value) in (int, float) and isfinite(value) and value > 0
        if not number:
            raise HoraError(f"alpha of {method.name} is a positive number or null, got {value!r}: change it")
    elif key == "rho" and not (type(value) in (int, float) and isfinite(value) and value >= 1):
        raise HoraError(f"rho of {method.name} is a number from 1, got {value!r}: change it")


def _hora(name: str, description: str, *, start: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> Method:
    spec = AdapterSpec().replace(**changes)
    library = {"torch": "hora-torch", "jax": "hora-jax"}
    of_preset = [known for known in PRESETS if preset(known, spec.rank) == spec and bool(start) == (known == "joint")]
    options = {**spec.to_dict(), **{f"{START}{key}": value for key, value in start.items()}}
    return Method(name, library, description, "hora", options, *of_preset)


START: Final = "start_"
LEAST: Final = {"rank": 1, "vectors": 2, "hidden_dim": 1, "head_embed_dim": 1, "start_batches": 1}
MOST: Final = 4096
WORDS: Final = {"start_of": get_args(Source), "start_scale": get_args(Scale)}
_JOINT: Final = {"batches": 4, "of": "gradient", "scale": "kaiming"}
_LORA: Final = {"rank": 8, "alpha": None}  # as in HoRA, alpha None is the rank: scaling 1
_STARTED: Final = {**_LORA, "start_batches": 4}

METHODS: Final = (
    _hora("hora", "the recommended form: A direct and shared, B generated for all heads"),
    _hora("hora-residual", "B generated plus a free part", residual=True),
    _hora("hora-generated-a", "A and B both generated", a_source="hypernetwork"),
    _hora("hora-paper", "the paper's reading: A and B generated, hidden 20, gain 1", **PRESETS["paper"].fields),
    _hora("hora-gated", "B generated plus a free part that a learned gate weighs", **PRESETS["gated"].fields),
    _hora(
        "hora-joint", "sharing a: A computed once for all heads, then fixed", start=_JOINT, **PRESETS["joint"].fields
    ),
    _hora("hora-tied", "sharing a: one A for Q and V", **PRESETS["tied-lora"].fields),
    _hora("hora-a", "sharing a: A shared over heads, B free per head", sharing="a"),
    _hora("hora-b", "sharing b: A free per head, B generated", sharing="b"),
    _hora("mh-lora", "sharing none: multi-head LoRA, the paper's baseline", sharing="none"),
    Method("lora", {"torch": "peft", "jax": "qwix"}, "low-rank adaptation of Q and V", "lora", _LORA),
    Method("dora", {"torch": "peft"}, "LoRA with a learned magnitude for each output", "dora", _LORA),
    Method(
        "eva",
        {"torch": "peft"},
        "LoRA whose A starts from the inputs, ranks redistributed up to rho times; 1 leaves them equal",
        "eva",
        {**_STARTED, "rho": 2.0},
    ),
    Method("lora-ga", {"torch": "peft"}, "LoRA that starts from a gradient, base shifted", "lora-ga", _STARTED),
    Method("vera", {"torch": "peft"}, "frozen random factors, learned scales", "vera", {"rank": 256}),
    Method("vblora", {"torch": "peft"}, "factors mixed from one bank of vectors", "vblora", {"rank": 8, "vectors": 90}),
    Method("linear-probe", {"torch": "torch", "jax": "flax"}, "the new head alone", "probe"),
    Method("full", {"torch": "torch", "jax": "flax"}, "every parameter", "full"),
)


def find(name: str) -> Method:
    """The method of that name.

    Raises
    ------
    HoraError
        There is none.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise HoraError(f"a method is one of {', '.join(m.name for m in METHODS)}, got {name!r}: see hora-bench methods")
