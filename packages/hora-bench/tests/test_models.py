"""The NNX models equal timm's and transformers' on tiny random models of every shape that they promise."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import transformers
from flax import nnx
from hora_bench.models import load
from hora_bench.models.checkpoint import load_llama, load_vit, read_safetensors, vit_config
from hora_bench.models.vit import ViT
from hora_spec import HoraError
from safetensors.torch import save_file

TOLERANCE = 1e-5  # of the largest logit
EXACT = 1e-12  # in float64

VITS = {
    "plain": {},
    "layer_scale": {"init_values": 0.3},
    "registers": {"init_values": 0.3, "reg_tokens": 2, "no_embed_class": True},
    "average": {"global_pool": "avg", "class_token": False},
    "no_bias": {"qkv_bias": False, "patch_size": 7},
}


def tiny_timm(image_size=28, **changes):
    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**(shape | changes | {"img_size": image_size}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", VITS)
def test_vit_is_exactly_that_of_timm_in_float64(kind, scan, float64):
    theirs = tiny_timm(**VITS[kind])
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    ours = load_vit(vit_config(theirs).replace(scan_layers=scan, remat=scan), state)
    images = np.random.default_rng(0).standard_normal((2, 3, 28, 28))
    close(ours(jnp.asarray(images.transpose(0, 2, 3, 1))), theirs.double()(torch.from_numpy(images)), EXACT)


@pytest.mark.parametrize("size", [14, 42, 70])
def test_position_resize_is_that_of_timm(size):
    source = tiny_timm(depth=1)
    state = source.state_dict()
    theirs = tiny_timm(depth=1, image_size=size)
    resized = timm.layers.resample_abs_pos_embed(source.pos_embed, [size // 14] * 2, num_prefix_tokens=1)
    theirs.load_state_dict(state | {"pos_embed": resized})
    arrays = {name: value.detach().numpy() for name, value in state.items()}
    ours = load_vit(vit_config(theirs), arrays)
    images = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    close(ours(jnp.asarray(images.transpose(0, 2, 3, 1))), theirs(torch.from_numpy(images)))


def test_vit_parameters_carry_the_names_of_timm():
    theirs = tiny_timm(init_values=0.1)
    ours = nnx.to_flat_state(nnx.state(ViT(vit_config(theirs), rngs=nnx.Rngs(0))))
    leaves = {"kernel": "weight", "scale": "weight"}
    names = {".".join(map(str, (*path[:-1], leaves.get(path[-1], path[-1])))) for path, _ in ours}
    assert names == set(theirs.state_dict())
    assert sum(value.get_value().size for _, value in ours) == sum(p.numel() for p in theirs.parameters())


def test_an_unknown_block_is_refused():
    with pytest.raises(HoraError, match="normalised queries"):
        vit_config(tiny_timm(qk_norm=True))


LLAMAS = {
    "multi_head": {"num_key_value_heads": 4},
    "grouped_tied": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "llama3": {
        "num_key_value_heads": 1,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def tiny_llama(directory, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**(shape | {"num_attention_heads": 4} | changes))
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", LLAMAS)
def test_llama_is_exactly_that_of_transformers_in_float64(kind, scan, tmp_path, request):
    exact = kind != "llama3"  # whose frequencies transformers rescales in float32
    theirs, dtype = tiny_llama(tmp_path, **LLAMAS[kind]), "float64" if exact else "float32"
    if exact:
        request.getfixturevalue("float64")
    ours = load_llama(tmp_path, dtype=dtype, scan_layers=scan, remat=scan)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    theirs = theirs.to(getattr(torch, dtype))
    close(ours(jnp.asarray(tokens)), theirs(torch.from_numpy(tokens)).logits, EXACT if exact else TOLERANCE)


@pytest.mark.parametrize("scan", [False, True])
def test_weights_in_bfloat16_make_activations_in_bfloat16(scan, tmp_path):
    theirs = tiny_llama(tmp_path, **LLAMAS["grouped_tied"]).bfloat16()
    ours = load_llama(tmp_path, dtype="bfloat16", scan_layers=scan)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 8))
    logits, cache = ours(jnp.asarray(tokens), cache=ours.init_cache(2, 8))
    assert logits.dtype == cache.k.dtype == jnp.bfloat16
    expected = theirs(torch.from_numpy(tokens)).logits
    close(logits.astype("float32"), expected.float(), 0.05)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_steps_equal_one_pass_with_padding_on_the_left(scan, tmp_path):
    tiny_llama(tmp_path, num_key_value_heads=2)
    model = load_llama(tmp_path, scan_layers=scan)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))
    valid = jnp.asarray([[False] * 3 + [True] * 6, [True] * 9])
    whole = model(tokens, valid=valid)
    first, cache = model(tokens[:, :5], valid=valid, cache=model.init_cache(2, 9))
    steps = [first]
    for i in range(5, 9):
        logits, cache = model(tokens[:, i : i + 1], valid=valid, cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1)[valid], whole[valid], atol=1e-4)
    alone = model(tokens[:1, 3:])
    np.testing.assert_allclose(whole[0, 3:], alone[0], atol=1e-4)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    tiny_llama(tmp_path)
    tensors = {name: torch.tensor(value) for name, value in read_safetensors(tmp_path).items()}
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HoraError, match=r"model\.norm\.weight"):
        load_llama(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(HoraError, match="model_type"):
        load_llama(tmp_path)


@pytest.mark.parametrize(
    "build",
    [lambda name: load.timm_vit(name, 32), load.num_features, load.causal_lm, load.nnx_llama, load.tokenizer],
)
@pytest.mark.parametrize("name", ["none/such", "a directory without files"])
def test_a_model_that_is_not_there_says_what_may_be_passed(build, name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if " " in name:
        name = str(tmp_path)
    with pytest.raises(HoraError, match=r"--model must be an asset.*pass its directory") as error:
        build(name)
    assert "\n" not in str(error.value)
