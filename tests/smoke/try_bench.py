"""hora-bench: a run on the embedded digits with either backend, and the experiment files that travel along."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from hora_bench.experiments.files import SHIPPED, experiment_file
from hora_bench.torchvision_ops import declare_missing_ops

declare_missing_ops()  # pip may have taken torchvision of another kind than torch

import timm  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

if "site-packages" not in str(SHIPPED) or not experiment_file("control-digits").exists():
    sys.exit(f"the wheel must hold the experiment files, got {SHIPPED}")

bench = Path(sys.executable).with_name("hora-bench")
with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    made = {"depth": 2}
    save_file(timm.create_model("test_vit", num_classes=0, **made).state_dict(), f"{folder}/model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 0, "model_args": made}
    Path(folder, "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"classifier": "head"}}))
    for backend in ("torch", "jax"):
        words = ["run", "digits", "--model", folder, "--backend", backend, "--steps", "2", "--limit", "16"]
        subprocess.run([bench, *words, "--image-size", "32", "--out", f"{folder}/{backend}"], check=True)
subprocess.run([bench, "cost", "--help"], check=True, stdout=subprocess.DEVNULL)
