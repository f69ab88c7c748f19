"""HoRA's entry in PEFT's registry of methods."""

from peft.utils import peft_types
from peft.utils.peft_types import PeftType


def add_peft_type(name: str = "HORA") -> None:
    """Make `name` a member of ``PeftType``, once.

    `peft.utils.register_peft_method` accepts members of the enumeration alone, and PEFT has no entry point for methods
    from outside (huggingface/peft#2273, as of 0.21).
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


def register() -> None:
    """Register the method with PEFT, unless it is registered already."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from hora_torch.config import HoraConfig
    from hora_torch.model import HoraModel

    if PeftType.HORA not in PEFT_TYPE_TO_TUNER_MAPPING:
        peft_types.register_peft_method(name="hora", config_cls=HoraConfig, model_cls=HoraModel)
