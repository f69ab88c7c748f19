"""Write tiny models with adapters in every form in which servers load them, and what transformers computes.

    python prepare.py DIRECTORY

For each architecture a folder with the base, its GGUF file and its GGUF adapters, LoRA directories, merged models, and
`expected.json`: the log-probabilities after each prompt by case, which is ``base`` or a sharing.
"""

import json
import sys
from pathlib import Path

from hora_bench.torchvision_ops import declare_missing_ops

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
declare_missing_ops()

from hora_spec import export_gguf, export_lora, save_merged  # noqa: E402
from serving.adapted import PROMPTS, adapted, log_probs, saved  # noqa: E402
from serving.tiny import ARCHITECTURES, language_model, write_gguf  # noqa: E402

SHARINGS = ("full", "a", "b", "none")
SIZES = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention on processors knows heads of width 32 and more."""


def prepare(arch: str, folder: Path) -> None:
    """All files of one architecture."""
    sizes = {"hidden_size": 128} if arch == "gpt2" else SIZES
    base = language_model(arch, **sizes)
    base.save_pretrained(folder / "base")
    gguf = write_gguf(folder / "base.gguf", base)
    expected = {"base": [log_probs(base, tokens).tolist() for tokens in PROMPTS]}
    for sharing in SHARINGS:
        model = adapted(language_model(arch, **sizes), arch, sharing)
        expected[sharing] = [log_probs(model, tokens).tolist() for tokens in PROMPTS]
        adapter = saved(model, folder / "hora" / sharing)
        export_lora(adapter, folder / "lora" / sharing, for_server=None if arch == "gpt2" else "vllm")
        export_gguf(adapter, folder / "gguf" / f"{sharing}.gguf", base=gguf, weights=folder / "base")
        save_merged(adapter, folder / "base", folder / "merged" / sharing)
    (folder / "expected.json").write_text(json.dumps({"prompts": PROMPTS, "log_probs": expected}))


if __name__ == "__main__":
    for name in ARCHITECTURES:
        prepare(name, Path(sys.argv[1]) / name)
