"""tunix takes a HoraModel as it takes its own LoRA: models, trainer, checkpoint, sampler."""

import json
import pydoc_data.topics
import runpy
from importlib import import_module
from pathlib import Path

import hora_spec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import init, make_plan, presets, verify
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import HoraError, ProjectionShape
from safetensors.numpy import save_file

from .test_libraries import RECIPES, run

TOKENS = np.arange(1, 11).reshape(2, 5)
SIZES = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 4}
LLAMA = {"vocab_size": 32, "rope_theta": 10_000, "norm_eps": 1e-5}
GEMMA = {"num_embed": 32, "sliding_window_size": 4}
CASES = {
    "llama3 Llama3": LLAMA | {"weight_tying": True},
    "qwen2 Qwen2": LLAMA,
    "qwen3 Qwen3": LLAMA,
    "gemma Gemma": GEMMA | {"final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False},
    "gemma3 Gemma3": GEMMA | {"param_dtype": jnp.float32},
    "gemma4 Gemma4": GEMMA | {"param_dtype": jnp.float32, "dtype": jnp.float32},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:tunix"),
]


def model(case: str, library, **changes):
    package, name = case.split()
    module = library(f"tunix.models.{package}.model")
    sizes = SIZES | {"num_kv_heads": 2} | CASES[case] | changes
    if package == "gemma":
        sizes["attention_types"] = (module.AttentionType.GLOBAL, module.AttentionType.LOCAL_SLIDING)
    return getattr(module, name)(module.ModelConfig(**sizes), rngs=nnx.Rngs(0))


ALL_IN_ONE = [("gemma Gemma", 4), ("gemma3 Gemma3", 4)]  # with as many groups as heads, one weight holds all three


@pytest.mark.parametrize(("case", "kv_heads"), [*((case, 2) for case in CASES), *ALL_IN_ONE])
def test_every_model_is_adapted_with_the_names_of_transformers(case, kv_heads, library, method):
    base = model(case, library, num_kv_heads=kv_heads)
    planned = make_plan(base, method, presets.tunix("qkv"))
    assert [layer.name for layer in planned.layers] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert [site.module for site in planned.layers[0].sites] == ["q_proj", "k_proj", "v_proj"]
    assert planned.layers[0].shape["q"] == ProjectionShape(4, 4, 16)
    assert planned.layers[0].shape["v"] == ProjectionShape(kv_heads, 4, 16)
    positions, mask = jnp.broadcast_to(jnp.arange(5), (2, 5)), jnp.tril(jnp.ones((2, 5, 5), bool))
    found = verify(planned, lambda base, t: base(t, positions, None, mask)[0], base, init(planned), TOKENS)
    assert found.ok, str(found)
    assert not found.uses.dense


def test_values_that_are_keys_are_no_projection_of_their_own(library, method):
    base = model("gemma4 Gemma4", library, k_eq_v_global=True, num_layers=6)
    with pytest.raises(HoraError, match=r"model.layers.5.self_attn without \['v'\]"):
        make_plan(base, method, presets.tunix())


class Letters:
    """The least that tunix asks of a tokenizer."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [2 + ord(letter) % 30 for letter in text]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 1

    eos_id = pad_id = lambda self: 0


def test_the_trainer_trains_checkpoints_and_resumes_the_adapter_alone(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("tunix, PeftTrainer", {"directory": str(tmp_path / "checkpoints")}, library)
    trained, plan, base = names["model"].adapter(), names["plan"], names["base"]
    assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (trained, names["phi"])), strict=True))

    ocp = import_module("orbax.checkpoint")
    saved = ocp.PyTreeCheckpointer().metadata(tmp_path / "checkpoints" / "3" / "model_params")
    assert len(jax.tree.leaves(saved.item_metadata.tree)) == len(jax.tree.leaves(trained))

    resumed = HoraModel(base, plan, init(plan))
    again = names["PeftTrainer"](resumed, names["optax"].adamw(1e-2), names["config"])
    assert again.train_steps == 3
    again.close()
    jax.tree.map(np.testing.assert_array_equal, resumed.adapter(), trained)
    assert len(jax.tree.leaves(nnx.state(resumed, HoraParam))) == len(jax.tree.leaves(trained))


def test_the_sampler_writes_the_same_adapted_and_merged(library, tmp_path, monkeypatch, perturbed):
    monkeypatch.chdir(tmp_path)
    names = run("tunix, PeftTrainer", {"directory": str(tmp_path / "c"), "tokenizer": Letters()}, library)
    names["model"] = HoraModel(names["base"], names["plan"], perturbed(init(names["plan"])))
    exec(RECIPES["tunix, Sampler"], names)
    adapted = names["Sampler"](names["model"], Letters(), names["cache"])("a few words", max_generation_steps=4).text
    plain = names["Sampler"](names["base"], Letters(), names["cache"])("a few words", max_generation_steps=4).text
    assert names["text"] == adapted != plain


def test_the_example_loads_a_directory_of_the_hub_and_trains(tmp_path, library, monkeypatch, capsys):
    """And writes an adapter with the names of transformers."""
    library("tunix.sft.peft_trainer")
    rope = library("tunix.models.llama3.model").apply_rope
    monkeypatch.setattr(
        rope, "__defaults__", rope.__defaults__
    )  # restored: the example sets the base of the checkpoint
    tokenizers = library("tokenizers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    config = sizes | heads | {"rope_parameters": {"rope_theta": 10_000.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"input_layernorm": (16,), "post_attention_layernorm": (16,), "mlp.down_proj": (16, 24)}
    shapes |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16)}
    shapes |= {f"self_attn.{p}_proj": (rows, 16) for p, rows in {"q": 16, "k": 8, "v": 8, "o": 16}.items()}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,)}
    draw = np.random.default_rng(0).normal
    tensors = {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    letters.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(pydoc_data.topics, "topics", {"topic": 200 * "abba"})

    example = Path(__file__).parents[1] / "examples/tunix_trainer.py"
    runpy.run_path(str(example))["main"](str(tmp_path), str(tmp_path / "out"), steps=2, length=8)
    before, after = (float(part.split()[0]) for part in capsys.readouterr().out.split("text: ")[1].split(", "))
    assert after < before
    written = hora_spec.load_adapter(tmp_path / "out/adapter")
    assert list(written.layers) == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert rope.__defaults__ == (10_000,)
