"""Tiny random models and made data: no test needs a network, an asset or pretrained weights."""

# ruff: noqa: E402
from hora_bench.torchvision_ops import declare_missing_ops

declare_missing_ops()  # before timm

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import transformers
from hora_bench.data.images import Examples, ImageTask
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.llama import modeling_llama


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, so that no test finds what a developer fetched."""
    monkeypatch.setenv("HORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def vit_directory(tmp_path_factory):
    """A random timm ViT of 2 layers and 64 channels, saved as timm saves one."""
    directory = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, depth=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), directory / "model.safetensors")
    pretrained = {"num_classes": 0, "classifier": "head"}
    config = {"architecture": "test_vit", "num_classes": 0, "model_args": {"depth": 2}, "pretrained_cfg": pretrained}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory):
    """A random LLaMA with grouped queries and a tokenizer of whole words."""
    directory = tmp_path_factory.mktemp("llama")
    words = ["</s>", "<unk>", "the", "correct", "answer", "is", "true", "false", "answer1", "answer2", "answer3"]
    words += ["question", ":", ".", "?", "/", "#"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def float64(monkeypatch):
    """Both frameworks in float64 throughout, also the norms, angles and softmax that libraries keep in float32."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        angle = position_ids[..., None] * theta ** -(torch.arange(0, dim, 2).double() / dim)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def attention(q, k, v, *, mask=None):
        k, v = (part.repeat(q.shape[2] // part.shape[2], axis=2) for part in (k, v))
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bhqs,bshk->bqhk", weights, v)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    with jax.enable_x64(True):
        yield


@pytest.fixture
def image_task():
    """Noise whose mean tells its class."""
    rng = np.random.default_rng(0)

    def examples(count):
        classes = rng.integers(0, 3, count)
        noise = rng.integers(0, 60, (count, 32, 32, 3)) + 80 * classes[:, None, None, None]
        return Examples(list(noise.astype(np.uint8)), classes)

    return ImageTask("made", 3, examples(24), examples(6), examples(12), image_size=32)


@pytest.fixture
def image_folder(tmp_path):
    """The VTAB-1K layout with 120 small files of two classes."""
    folder = tmp_path / "made"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(120):
        Image.fromarray(np.full((12, 9, 3), 100 * (i % 2) + i % 7, np.uint8)).save(folder / f"images/{i}.png")
        lines.append(f"images/{i}.png {i % 2}")
    for name, part in (("train800", lines[:80]), ("val200", lines[80:100]), ("test", lines[100:])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n")
    (folder / "train800val200.txt").write_text("\n".join(lines[:100]) + "\n")
    return folder


@pytest.fixture
def records_file(tmp_path):
    """Twenty records of two kinds."""
    path = tmp_path / "made.jsonl"
    rows = []
    for i in range(20):
        if i % 2:
            answer = "true" if i % 4 == 1 else "false"
            text = f"question {i} : is the answer true ? \n\nAnswer format: true/false"
        else:
            answer = f"answer{i % 3 + 1}"
            options = "Answer1: the Answer2: is Answer3: ."
            text = f"question {i} : answer ? \n\n{options}\n\nAnswer format: answer1/answer2/answer3"
        rows.append({"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
