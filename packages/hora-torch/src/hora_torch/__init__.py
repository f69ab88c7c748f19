"""HoRA as a PEFT method for PyTorch: hypernetwork-shared low-rank adaptation of attention heads.

Importing this package registers the method with PEFT, so that ``peft.get_peft_model(model, HoraConfig())`` and
``peft.PeftModel.from_pretrained`` know it.
"""

from hora_torch.importing import explained

with explained():
    from hora_torch import functional
    from hora_torch.adapted_linear import HoraLinear
    from hora_torch.config import HoraConfig
    from hora_torch.export import export_lora, to_adapter
    from hora_torch.findings import Report
    from hora_torch.freezing import freeze
    from hora_torch.groups import param_groups
    from hora_torch.joint import joint_a
    from hora_torch.layer import HoraLayer
    from hora_torch.lifetime import cached_factors
    from hora_torch.lora_only import install
    from hora_torch.model import HoraModel
    from hora_torch.planning import Plan, plan
    from hora_torch.registration import add_peft_type, register
    from hora_torch.reporting import report
    from hora_torch.verification import verify

add_peft_type()
register()
install()

__version__ = "0.1.0"

__all__ = [
    "HoraConfig",
    "HoraLayer",
    "HoraLinear",
    "HoraModel",
    "Plan",
    "Report",
    "cached_factors",
    "export_lora",
    "freeze",
    "functional",
    "joint_a",
    "param_groups",
    "plan",
    "report",
    "to_adapter",
    "verify",
]
