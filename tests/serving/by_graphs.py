"""Log-probabilities of merged models by ONNX Runtime and OpenVINO, from one ONNX file each.

python by_graphs.py onnxruntime|openvino DIRECTORY ARCHITECTURE
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers


class Logits(torch.nn.Module):
    """Token ids to logits, and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        """All positions are computed; no cache."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def onnx_of(directory):
    """The model of a directory as an ONNX file for prompts of any length."""
    path = directory / "model.onnx"
    if not path.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        shapes, ids = ({1: torch.export.Dim("seq", min=1, max=64)},), torch.ones((1, 8), dtype=torch.int64)
        torch.onnx.export(Logits(model), (ids,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return path


def by_onnxruntime(directory):
    """A function from token ids to logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_of(directory), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda ids: session.run(None, {name: ids})[0]


def by_openvino(directory):
    """A function from token ids to logits, in float32."""
    import openvino

    model = openvino.Core().compile_model(onnx_of(directory), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda ids: model([ids])[0]


def by_mlx(directory):
    """A function from token ids to logits, on the processor."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    rotary = json.loads((directory / "config.json").read_text()).get("rope_parameters", {})
    model, _ = load_model(directory, model_config={"rope_theta": rotary["rope_theta"]})  # 0.32 reads it there alone
    return lambda ids: np.array(model(mx.array(ids)))


ENGINES = {"onnxruntime": by_onnxruntime, "openvino": by_openvino, "mlx": by_mlx}

if __name__ == "__main__":
    engine, folder = sys.argv[1], Path(sys.argv[2]) / sys.argv[3]
    expected, rows = json.loads((folder / "expected.json").read_text()), {}
    for case in expected["log_probs"]:
        run, rows[case] = ENGINES[engine](folder / "base" if case == "base" else folder / "merged" / case), []
        for tokens in expected["prompts"]:
            logits = np.float64(run(np.array([tokens]))[0, -1])
            rows[case].append((logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())).tolist())
    print(json.dumps({"version": version(engine), "log_probs": rows}))
