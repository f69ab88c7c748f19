"""Merged checkpoints hold under PyTorch's names what the tree merges to, and only of weights it was trained on."""

import json

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target, init, make_plan, merge, presets, save_merged
from hora_spec import AdapterSpec, HoraError, Layout, Window
from safetensors.numpy import load_file, save_file

SPEC = AdapterSpec(3, hidden_dim=5, head_embed_dim=4, alpha=6.0)
D, H, G, K, LAYERS = 16, 4, 2, 4, 3


def tensors(dtype="float32"):
    """A checkpoint in PyTorch's orientation, (rows, embed)."""
    rng = np.random.default_rng(0)
    made = {}
    for i in range(LAYERS):
        block = f"model.layers.{i}.self_attn"
        made |= {f"{block}.q_proj.weight": (H * K, D), f"{block}.k_proj.weight": (G * K, D)}
        made |= {f"{block}.v_proj.weight": (G * K, D), f"model.layers.{i}.qkv.weight": (3 * H * K, D)}
    made |= {"model.norm.weight": (D,), "model.embed_tokens.weight": (32, D), "lm_head.weight": (32, D)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in made.items()}


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def base(request, tmp_path):
    directory, made = tmp_path / "base", tensors()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"vocab_size": 32, "tie_word_embeddings": False}))
    (directory / "tokenizer.json").write_text("{}")
    if request.param == 1:
        save_file(made, directory / "model.safetensors")
        return directory
    places = {name: f"model-{i % request.param + 1:05}-of-00003.safetensors" for i, name in enumerate(made)}
    for file in set(places.values()):
        save_file({name: made[name] for name in made if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def read(directory):
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def of(made, layer, name):
    return made[f"model.layers.{layer}.self_attn.{name}_proj.weight"]


def apart(made):
    """One dict for each layer, linear kernels (embed, rows), as Flax has them."""
    blocks = {str(i): {p: {"kernel": of(made, i, p).T} for p in "qv"} for i in range(LAYERS)}
    heads = {"q": H, "v": G}
    targets = [
        Target(f"*.{p}.kernel", p, "d (h k)", heads[p], layer="model.layers.{0}.self_attn", module=f"{p}_proj")
        for p in "qv"
    ]
    return blocks, targets


def stacked(made):
    """All layers in one leaf, heads apart, the stack in the middle."""
    heads = {"q": H, "v": G}
    tree = {p: np.stack([of(made, i, p).T.reshape(D, heads[p], K) for i in range(LAYERS)], 1) for p in "qv"}
    name = "model.layers.{l}.self_attn"
    return tree, [Target(p, p, "d l h k", layer=name, module=f"{p}_proj") for p in "qv"]


def fused(made):
    """q, k and v side by side in one leaf of all layers, which is one module in PyTorch, too."""
    tree = {"qkv": np.stack([made[f"model.layers.{i}.qkv.weight"].T for i in range(LAYERS)])}
    windows = {p: Layout("l d (h k)", Window(2, i * D, (i + 1) * D)) for i, p in ((0, "q"), (2, "v"))}
    return tree, [Target("qkv", p, windows[p], H, layer="model.layers.{l}", module="qkv") for p in "qv"]


@pytest.fixture(params=[apart, stacked, fused], ids=lambda make: make.__name__)
def trained(request, perturbed):
    params, targets = request.param(tensors())
    plan = make_plan(params, SPEC, targets)
    return request.param, plan, params, perturbed(init(plan))


def test_the_checkpoint_holds_the_merged_tree_and_all_else_as_it_was(trained, base, tmp_path):
    make, plan, params, phi = trained
    changed = save_merged(tmp_path / "out", plan, params, phi, base=base)
    merged, before = read(tmp_path / "out"), tensors()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        make(merged)[0],
        merge(plan, params, phi),
    )
    assert changed == [f"model.layers.{i}.{m}.weight" for i in range(LAYERS) for m in modules(plan)]
    for name, value in merged.items():
        assert np.array_equal(value, before[name]) == (name not in changed), name
    others = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == others


def modules(plan):
    names = [
        f"{layer.names[0]}.{site.module}".removeprefix("model.layers.0.")
        for layer in plan.layers[:1]
        for site in layer.sites
    ]
    return list(dict.fromkeys(names))


def test_a_tree_in_a_narrower_dtype_is_the_checkpoint_too(trained, base, tmp_path):
    make, plan, params, phi = trained
    narrow = jax.tree.map(lambda v: jnp.asarray(v, "bfloat16"), params)
    save_merged(tmp_path / "out", make_plan(narrow, SPEC, make(tensors())[1]), narrow, phi, base=base)
    save_merged(tmp_path / "wide", plan, params, phi, base=base)
    for name, value in read(tmp_path / "wide").items():
        np.testing.assert_array_equal(read(tmp_path / "out")[name], value)  # sums start from the checkpoint's values


def heads_in_another_order(params):
    return jax.tree.map(lambda v: np.roll(v, 1, -1 if v.shape[-1] != K else -2), params)


def one_value_moved(params):
    leaves, tree = jax.tree.flatten(jax.tree.map(np.array, params))
    leaves[0].flat[-1] += 1e-3
    return tree.unflatten(leaves)


def layers_in_another_order(params):
    leaves, tree = jax.tree.flatten(params)
    if len(leaves) > 2:
        return tree.unflatten(leaves[2:] + leaves[:2])
    axis = [v.shape.index(LAYERS) for v in leaves]
    return tree.unflatten([np.roll(v, 1, a) for v, a in zip(leaves, axis, strict=True)])


OTHERS = [heads_in_another_order, one_value_moved, layers_in_another_order]


@pytest.mark.parametrize("change", [*OTHERS, "merged"], ids=lambda v: getattr(v, "__name__", v))
def test_weights_that_are_not_those_of_the_checkpoint_are_refused(change, trained, base, tmp_path):
    _, plan, params, phi = trained
    other = merge(plan, params, phi) if change == "merged" else change(params)
    with pytest.raises(HoraError, match="trained on the weights of the checkpoint, got others in model"):
        save_merged(tmp_path / "out", plan, other, phi, base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_refusal_says_how_far_the_weights_are_and_progress_how_much_is_written(trained, base, tmp_path):
    _, plan, params, phi = trained
    with pytest.raises(HoraError, match=r"by up to 1\.0e-03"):
        save_merged(tmp_path / "out", plan, one_value_moved(params), phi, base=base)
    seen = []
    save_merged(tmp_path / "out", plan, params, phi, base=base, progress=lambda *counts: seen.append(counts))
    assert seen[-1][0] == seen[-1][1] > 0


def test_codes_are_refused_with_the_way_out(base, tmp_path):
    params = {"w": jnp.zeros((D, H, K), "float8_e4m3fn")}
    plan = make_plan(params, SPEC, Target("w", "q", "d h k", layer="model.layers.0.self_attn", module="q_proj"))
    with pytest.raises(HoraError, match="before it was quantised"):
        save_merged(tmp_path / "out", plan, params, init(plan), base=base)


def test_modules_trained_whole_go_along(trained, base, tmp_path):
    _, plan, params, phi = trained
    whole = {"lm_head.weight": np.ones((32, D), "float32")}
    assert "lm_head.weight" in save_merged(tmp_path / "out", plan, params, phi, base=base, modules=whole)
    assert (read(tmp_path / "out")["lm_head.weight"] == 1).all()


@pytest.mark.parametrize("scan", [False, True])
def test_transformers_runs_what_a_flax_model_was_trained_to(scan, tmp_path, perturbed):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    checkpoint = pytest.importorskip("hora_bench.models.checkpoint", exc_type=ImportError, reason="no hora-bench")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="8KB")
    base = checkpoint.load_llama(tmp_path / "base", scan_layers=scan)
    plan = make_plan(base, SPEC, presets.llama())
    phi, tokens = perturbed(init(plan)), np.arange(12).reshape(2, 6)
    adapted = hora_jax.nnx.HoraModel(base, plan, phi)(tokens)
    save_merged(tmp_path / "out", plan, base, phi, base=tmp_path / "base")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    served = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = served(torch.tensor(tokens)).logits
    np.testing.assert_allclose(logits.numpy(), adapted, rtol=1e-3, atol=1e-4)
    assert not np.allclose(adapted, base(tokens), atol=1e-2)
