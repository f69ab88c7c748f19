"""hora-spec alone: goldens hold, an adapter is saved, inspected, exported and verified, all without a framework."""

import subprocess
import sys
import tempfile
from pathlib import Path

from hora_spec import Adapter, AdapterLayer, AdapterSpec, LayerShape, Layout, Site, init_params, save_adapter

COMMAND = Path(sys.executable).with_name("hora")
spec, shape = AdapterSpec(rank=4), LayerShape.attention(embed_dim=32, num_heads=4)
sites = {name: Site(f"attn.{name}", "weight", (32, 32), Layout(), projection) for name, projection in shape.items()}
layer = AdapterLayer(spec, sites, init_params(spec, shape, seed=0, name="attn"))

subprocess.run([sys.executable, "-I", "-m", "hora_spec.goldens"], check=True)
with tempfile.TemporaryDirectory() as folder:
    save_adapter(Path(folder, "adapter"), Adapter({"attn": layer}))
    for words in (["inspect", "adapter"], ["export-lora", "adapter", "lora"], ["verify", "adapter", "lora"]):
        subprocess.run([COMMAND, *words], check=True, cwd=folder)
