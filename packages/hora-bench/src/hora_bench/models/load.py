"""Pretrained models by name on either backend: an asset, a directory, or a name of timm or the hub."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hora_spec import HoraError

from hora_bench import assets
from hora_bench.asset_table import ASSETS
from hora_bench.data.images import View
from hora_bench.torchvision_ops import declare_missing_ops

Head = tuple[np.ndarray, np.ndarray]
SEEN = ("mean", "std", "interpolation")


def resolve(name: str) -> str | Path:
    """The directory of an asset or path, else the name itself, which then belongs to timm or the hub."""
    if name in {asset.name for asset in ASSETS}:
        return assets.find(name).get()
    return Path(name) if Path(name).is_dir() else name


def directory(name: str) -> Path:
    """The directory with a model's files: an asset's, a path, or the hub's snapshot of a name of timm or the hub."""
    found = resolve(name)
    if isinstance(found, Path):
        return found
    declare_missing_ops()
    from huggingface_hub import snapshot_download
    from timm.models import get_pretrained_cfg

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with _loading(name, "a name of timm or of the hub"):
        known = get_pretrained_cfg(found, allow_unregistered=True)
        repository = known.hf_hub_id if known is not None and known.hf_hub_id else found
        return Path(snapshot_download(repository, allow_patterns=patterns))


def view(name: str) -> View:
    """How a checkpoint of timm normalises images; ImageNet's mean and deviation where it does not say."""
    with _loading(name, "a timm model"):
        stored = json.loads((directory(name) / "config.json").read_text()).get("pretrained_cfg", {})
    given: dict[str, Any] = {**asdict(View()), **{key: value for key, value in stored.items() if key in SEEN}}
    return View(tuple(given["mean"]), tuple(given["std"]), given["interpolation"])


def source(name: str) -> dict[str, Any]:
    """What a result file records about the weights."""
    if name in {asset.name for asset in ASSETS}:
        return {"name": name, **(assets.find(name).origin or {})}
    return {"name": Path(name).name if Path(name).is_dir() else name}


@contextmanager
def _loading(name: str, kind: str) -> Generator[None]:
    """Raise HoraError where a library does not find or understand a model."""
    try:
        yield
    except HoraError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise HoraError(
            "--model must be an asset (hora-bench assets list), a directory with config.json and model.safetensors, "
            f"or {kind}, got {name!r} ({why}): without a network fetch it elsewhere and pass its directory"
        ) from error


def timm_vit(name: str, image_size: int, head: Head | None = None, *, drop_path: float = 0.0) -> Any:
    """A pretrained timm model for square images, in evaluation mode.

    Parameters
    ----------
    name
        Asset, directory (``config.json`` and ``model.safetensors`` as timm saves them) or timm name.
    image_size
        Height and width in pixels; positions are resized.
    head
        New kernel ``(features, classes)`` and bias; None leaves pooled features.
    drop_path
        Above 0, branches of blocks follow the batch's ``paths`` in training.

    Raises
    ------
    HoraError
        There is no such model, or it has no patches of this size.
    """
    declare_missing_ops()
    import timm

    with _loading(name, "a timm model"):
        model = timm.create_model(f"local-dir:{directory(name)}", pretrained=True, img_size=image_size, num_classes=0)
    _check_patches(model, name, image_size)
    if drop_path:
        from hora_bench.models.surgery import PathDrop

        PathDrop.into(model)
    if head is not None:
        set_head(model, head)
    return model.eval()


def set_head(model: Any, head: Head) -> None:
    """Give a timm model a new classification head."""
    import torch

    model.reset_classifier(head[0].shape[1])
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(head[0].T.copy()))
        model.head.bias.copy_(torch.from_numpy(head[1]))


def _check_patches(model: Any, name: str, image_size: int) -> None:
    """Timm cuts off what does not fill a patch, and says nothing."""
    if not hasattr(model, "patch_embed") or not hasattr(model, "blocks"):
        raise HoraError(f"images are classified by vision transformers, got {name}: pass another --model")
    patch = model.patch_embed.patch_size[0]
    if image_size % patch:
        near = max(patch, round(image_size / patch) * patch)
        raise HoraError(f"--image-size is a multiple of the patches of {name}, {patch}, got {image_size}: pass {near}")


def abstract_vit(name: str, image_size: int | None = None, num_classes: int = 0) -> Any:
    """A timm model on the meta device: shapes without weights."""
    declare_missing_ops()
    import timm
    import torch

    found = resolve(name)
    size = {} if image_size is None else {"img_size": image_size}
    with _loading(name, "a timm model"), torch.device("meta"):
        stored: dict[str, Any] = (
            json.loads((found / "config.json").read_text()) if isinstance(found, Path) else {"architecture": found}
        )
        return timm.create_model(
            stored["architecture"], num_classes=num_classes, **{**stored.get("model_args", {}), **size}
        )


def num_features(name: str, kind: str = "images") -> int:
    """Width of the features of images, or of sentences, that a new head reads, without weights."""
    return _encoder_config(name).hidden_size if kind == "sentences" else abstract_vit(name).num_features


def nnx_vit(name: str, image_size: int, head: Head | None = None, **changes: Any) -> Any:
    """The NNX ViT with the weights of `timm_vit`; `changes` are fields of its config (``scan_layers``, ``remat``)."""
    from hora_bench.models.checkpoint import load_vit, vit_config

    model = timm_vit(name, image_size, head)
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    return load_vit(vit_config(model).replace(**changes), tensors)


def causal_lm(name: str, *, dtype: str = "float32") -> Any:
    """A causal language model of transformers, in evaluation mode."""
    declare_missing_ops()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _loading(name, "a causal language model of the hub"):
        return _whole(name, AutoModelForCausalLM, dtype=getattr(torch, dtype))


def _whole(name: str, kind: Any, **settings: Any) -> Any:
    """A model of transformers that has all of its weights from the checkpoint, none that were drawn."""
    model, found = kind.from_pretrained(directory(name), output_loading_info=True, **settings)
    if drawn := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
        raise HoraError(
            f"a pretrained {type(model).__name__} has all its weights in the checkpoint, got {name} without "
            f"{drawn[0]}: pass a --model of this kind"
        )
    return model.eval()


def sentence_classifier(name: str, head: Head) -> Any:
    """An encoder of transformers with a new head on the mean of its tokens, in evaluation mode; it has no dropout.

    Parameters
    ----------
    name
        Asset, directory or hub name of an encoder that was trained on masked words.
    head
        Kernel ``(features, classes)`` and bias.

    Raises
    ------
    HoraError
        There is no such encoder, or its checkpoint lacks weights.
    """
    config = _encoder_config(name)
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _loading(name, "an encoder of the hub"):
        return _classifier(_whole(name, AutoModel, config=config), head)


def abstract_sentence_classifier(name: str, classes: int) -> Any:
    """The same on the meta device; attention as plain products, which counters see."""
    config = _encoder_config(name)
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        encoder = AutoModel.from_config(config, attn_implementation="eager")
        return _classifier(encoder, (np.zeros((config.hidden_size, classes)), np.zeros(classes)))


def _classifier(encoder: Any, head: Head) -> Any:
    from hora_bench.models.encoder import SentenceClassifier

    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return SentenceClassifier(encoder, head).eval()


def _encoder_config(name: str) -> Any:
    """Of an encoder, without dropout: a mean over everything that a decoder saw would be something else."""
    declare_missing_ops()
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    with _loading(name, "an encoder of the hub"):
        config = AutoConfig.from_pretrained(directory(name))
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise HoraError(f"sentences are classified by encoders, got {name}, a {config.model_type}: pass --model minilm")
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def abstract_causal_lm(architecture: dict[str, Any]) -> Any:
    """A causal language model of transformers on the meta device; attention as plain products, which counters see."""
    declare_missing_ops()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), attn_implementation="eager")


def nnx_llama(name: str, *, dtype: str = "float32", **changes: Any) -> Any:
    """The NNX LLaMA with the weights of `causal_lm`; `changes` are fields of its config."""
    from hora_bench.models.checkpoint import load_llama

    with _loading(name, "a LLaMA of the hub"):
        return load_llama(directory(name), dtype=dtype, **changes)


def tokenizer(name: str) -> Any:
    """The tokenizer of a language model, the same for both backends."""
    declare_missing_ops()
    from transformers import AutoTokenizer

    with _loading(name, "a language model of the hub"):
        return AutoTokenizer.from_pretrained(directory(name))
