"""Families of the table of what works, compiled and sharded: run by torch.distributed.run in two processes.

    python -m torch.distributed.run --nproc-per-node 2 scale.py [NAME ...]

Writes scale.json. Each family is compared with itself as it is: outputs in evaluation, and gradients of the adapter.
`compile` traces forward and backward (backend ``aot_eager``: no kernels are generated), `fsdp2` shards each block over
the processes. An answer that LoRA gets, too, says so.
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hora_bench.torchvision_ops import declare_missing_ops

declare_missing_ops()

import peft  # noqa: E402
import torch  # noqa: E402
from battery import SETTINGS  # noqa: E402
from catalogue import FAMILIES  # noqa: E402
from family import Family, outputs  # noqa: E402
from hora_torch import HoraConfig  # noqa: E402
from isolation import in_short  # noqa: E402
from torch import Tensor, distributed, nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "scale.json"
Outcome = dict[str, Tensor]


def compiled(model: nn.Module) -> nn.Module:
    """The model as torch.compile traces it."""
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def sharded(model: nn.Module) -> nn.Module:
    """The model with each block a unit, and what is left another."""
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in stack:
            if type(block).forward is not nn.Module.forward and any(True for _ in block.parameters()):
                fully_shard(block)
    return fully_shard(model)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {"compile": compiled, "fsdp2": sharded}


def outcome(model: nn.Module, inputs: Mapping[str, Any]) -> Outcome:
    """Outputs, and the whole gradient of each parameter that is trained."""
    found = outputs(model, inputs)
    found.square().mean().backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {"outputs": found.detach()} | {name.removeprefix("_orig_mod."): grad for name, grad in whole.items()}


def tried(base: nn.Module, inputs: Mapping[str, Any], config: peft.PeftConfig, way: Callable) -> str:
    """``"ok"``, or what is not: the changed model beside the model as it is."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = outcome(copy.deepcopy(model), inputs)
    try:
        found = outcome(way(model), inputs)
    except Exception as error:  # of whatever library: it becomes a cell of the table
        return f"error: {in_short(error)}"
    if found.keys() != expected.keys():
        return f"WRONG: no gradient of {min(found.keys() ^ expected.keys())}"
    off = {
        name: float((found[name] - each).abs().max() / (each.abs().max() + 1e-12)) for name, each in expected.items()
    }
    worst = max(off, key=off.__getitem__)
    return "ok" if off[worst] < 1e-3 else f"WRONG: {worst} is off by {off[worst]:.0e}"


def row(family: Family) -> dict[str, str]:
    """What each way does to one family."""
    base = family.model()
    with torch.no_grad():
        inputs = family.inputs(base)
    answers = {}
    for name, way in WAYS.items():
        answers[name] = tried(base, inputs, HoraConfig(**SETTINGS, **family.told, init_weights=False), way)
        if answers[name] != "ok":
            targets = {module.rpartition(".")[2] for module in _adapted(base, family)}
            lora = peft.LoraConfig(r=4, target_modules=sorted(targets), init_lora_weights=False)
            if tried(base, inputs, lora, way) != "ok":
                answers[name] += " (LoRA too)"
    return answers


def _adapted(base: nn.Module, family: Family) -> list[str]:
    from hora_torch import plan

    found = plan(base, HoraConfig(**SETTINGS, **family.told))
    return [site.module for layer in found.layers for site in layer.sites.values()]


def main() -> None:
    """Try those that are named, or all of the table."""
    sys.path.insert(0, str(ROOT / ".ci"))
    from pages.support import FAMILIES as SHOWN

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rows = json.loads(RESULTS.read_text())["families"] if sys.argv[1:] else {}
    for name in sys.argv[1:] or [name for names in SHOWN.values() for name in names.split()]:
        rows[name] = row(FAMILIES[name]())
        if distributed.get_rank() == 0:
            print(name, rows[name], flush=True)
    if distributed.get_rank() == 0:
        versions = {name: version(name) for name in ("torch", "transformers", "timm", "peft")}
        RESULTS.write_text(json.dumps({"versions": versions, "families": rows}, indent=0) + "\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
