"""``hora-bench run --dry-run``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hora_spec import HoraError

from hora_bench.dry_run.plan import Counts, Workload, show
from hora_bench.methods import Method
from hora_bench.models import load

RESPONSE_TOKENS = 8  # of an answer with its end token, rounded up as batches do


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What of a run decides its cost.

    Attributes
    ----------
    model, architecture
        A name or directory, and the Hugging Face configuration of a model that is not here, or None.
    backend, method, batch_size, dtype, mesh
        As in a run.
    image_size, num_classes
        Of an image task; both None for text.
    """

    model: str
    architecture: dict[str, Any] | None
    backend: str
    method: Method
    batch_size: int
    dtype: str
    mesh: dict[str, int]
    image_size: int | None
    num_classes: int | None


def plan(setting: Setting, console: Any) -> None:
    """Print parameters, FLOPs and memory per device.

    HoRA and full fine-tuning of language models on JAX are counted by XLA, everything else by torch; the numbers of
    a method depend little on the framework.

    Raises
    ------
    HoraError
        The model's configuration is not here, or the method cannot be counted.
    """
    if setting.method.family == "vblora":
        raise HoraError(
            "--dry-run counts methods on weights without values, got vblora, whose forward looks at its values: "
            "run a few steps of a small model instead"
        )
    counts, work = _vit(setting) if setting.image_size else _language_model(setting)
    show(console, f"{setting.model}, {setting.method.name}", counts, work, mesh=setting.mesh, dtype=setting.dtype)


def _vit(setting: Setting) -> tuple[Counts, Workload]:
    from hora_bench.dry_run import by_torch

    size = setting.image_size or 0
    model = load.abstract_vit(setting.model, size, setting.num_classes or 0)
    block = model.blocks[0]
    work = Workload(
        batch_size=setting.batch_size,
        seq=model.patch_embed.num_patches + model.num_prefix_tokens,
        depth=len(model.blocks),
        embed=model.embed_dim,
        mlp=block.mlp.fc1.out_features,
        heads=block.attn.num_heads,
        outputs=model.num_classes,
    )
    return by_torch.count_vit(model, setting.method, setting.batch_size, size), work


def _language_model(setting: Setting) -> tuple[Counts, Workload]:
    from hora_bench.data.records import CUTOFF

    stored = setting.architecture or _stored_config(setting.model)
    work = Workload(
        batch_size=setting.batch_size,
        seq=CUTOFF,
        depth=stored["num_hidden_layers"],
        embed=stored["hidden_size"],
        mlp=stored["intermediate_size"],
        heads=stored["num_attention_heads"],
        outputs=RESPONSE_TOKENS * stored["vocab_size"],
    )
    if setting.backend == "jax" and setting.method.family in ("hora", "full"):
        from hora_bench.dry_run import by_xla
        from hora_bench.models.llama import LlamaConfig

        return by_xla.count_llama(LlamaConfig.from_hf(stored), setting.method, work, dtype=setting.dtype), work
    from hora_bench.dry_run import by_torch

    return by_torch.count_llama(stored, setting.method, work), work


def _stored_config(model: str) -> dict[str, Any]:
    found = load.resolve(model)
    if not isinstance(found, Path) or not (found / "config.json").exists():
        raise HoraError(f"--dry-run needs a configuration, got the name {model!r}: pass --config or a directory")
    return json.loads((found / "config.json").read_text())
