"""Modules that share a weight: merging is right for every one of them, or refused with the names of two."""

import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError
from torch import nn

from .conftest import TEXT, ids, noise
from .oracle import agree, config, differ, evaluate


class Block(nn.Module):
    """Attention with one head per eight features."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.readout = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def shared_parameter():
    """Two modules, one Parameter."""
    model = Blocks()
    model.blocks[1].v_proj.weight = model.blocks[0].v_proj.weight
    return model


def shared_module():
    """One module under two names, of which PEFT finds the first."""
    model = Blocks()
    model.blocks[1].v_proj = model.blocks[0].v_proj
    return model


def shared_with_a_module_that_is_no_target():
    model = Blocks()
    model.readout.weight = model.blocks[1].q_proj.weight
    return model


def shared_memory():
    """Two Parameters, one storage."""
    model = Blocks()
    model.blocks[1].v_proj.weight = nn.Parameter(model.blocks[0].v_proj.weight.detach())
    return model


def zamba():
    """One attention block at three depths, each with modules of its own."""
    sizes = {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8}
    kinds = {"layers_block_type": ["mamba", "hybrid"] * 3, "num_mem_blocks": 1, "use_mem_rope": False}
    return tf.Zamba2ForCausalLM(tf.Zamba2Config(**(TEXT | {"num_hidden_layers": 6} | sizes | kinds)))


BASES = {
    "parameter": (shared_parameter, "blocks.0.v_proj", "blocks.1.v_proj"),
    "module": (shared_module, "blocks.0.v_proj", "blocks.1.v_proj"),
    "other": (shared_with_a_module_that_is_no_target, "blocks.1.q_proj", "readout"),
    "memory": (shared_memory, "blocks.0.v_proj", "blocks.1.v_proj"),
    "zamba": (zamba, "layers.1.shared_transformer.self_attn", "layers.3.shared_transformer.self_attn"),
}


@pytest.fixture(params=BASES)
def tied(request):
    """A base, its input, and parts of the names of two modules that share a weight."""
    build, *names = BASES[request.param]
    torch.manual_seed(0)
    return build().eval(), {"input_ids": ids()} if request.param == "zamba" else {"x": noise(2, 5, 32)}, names


def bits(model):
    """Value and identity of every parameter under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace("base_layer.", ""): (param, param.detach().clone()) for name, param in named}


def assert_unchanged(model, before):
    after = bits(model)
    assert after.keys() == before.keys()
    for name, (param, value) in before.items():
        assert after[name][0] is param, f"{name} is another Parameter"
        assert torch.equal(after[name][1], value), f"{name} has other values"


def refusal(act, names):
    """Whether `act` was refused, which must name both modules."""
    try:
        act()
    except HoraError as error:
        message = str(error)
    else:
        return False
    assert all(name in message for name in names), f"{message} does not name {names}"
    return True


def test_zamba_shares_the_weights_that_are_adapted():
    model = zamba().model
    assert model.layers[1].shared_transformer is not model.layers[3].shared_transformer
    assert (
        model.layers[1].shared_transformer.self_attn.q_proj.weight
        is model.layers[3].shared_transformer.self_attn.q_proj.weight
    )


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.1\..*\.?v_proj|.*\.1\.q_proj"], ids=["all", "some"])
def test_merging_is_right_or_refused_and_loses_no_bit(tied, targets):
    base, inputs, names = tied
    plain, whole = evaluate(base, inputs), bits(base)
    built = []
    settings = {} if hasattr(base, "config") else {"num_heads": 4}
    if refusal(lambda: built.append(peft.get_peft_model(base, config(target_modules=targets, **settings))), names):
        assert torch.equal(evaluate(base, inputs), plain)
        assert_unchanged(base, whole)
        return
    model = built[0]
    expected, before = evaluate(model, inputs), bits(model)
    differ(expected, plain)
    if not refusal(model.merge_adapter, names):
        agree(evaluate(model, inputs), expected)
        model.unmerge_adapter()
    assert_unchanged(model, before)
    assert torch.equal(evaluate(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, inputs), plain)
    if refusal(model.merge_and_unload, names):
        assert torch.equal(evaluate(model, inputs), expected)
    else:
        agree(evaluate(model.base_model.model, inputs), expected)


def test_a_block_that_is_called_many_times_is_merged():
    """ALBERT: one module, one name, one weight, several calls."""
    torch.manual_seed(0)
    base = tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16)).eval()
    inputs = {"input_ids": ids()}
    model = peft.get_peft_model(base, config())
    expected, before = evaluate(model, inputs), bits(model)
    model.merge_adapter()
    agree(evaluate(model, inputs), expected)
    model.unmerge_adapter()
    assert_unchanged(model, before)


def test_tied_embeddings_are_no_reason_to_refuse(families):
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)).eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    inputs = families["llama"].inputs()
    model = peft.get_peft_model(base, config())
    expected, before = evaluate(model, inputs), bits(model)
    model.merge_adapter()
    agree(evaluate(model, inputs), expected)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    agree(evaluate(model.merge_and_unload(), inputs), expected)
