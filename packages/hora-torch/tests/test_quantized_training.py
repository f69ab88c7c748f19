"""Quantised bases in training as it is done: k-bit preparation, checkpointing, autocast, Trainer; fused weights; the
page of results.
"""

import json
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError
from hora_torch import HoraConfig, export_lora, verify
from torch import nn

from .oracle import config, evaluate, parameters
from .quantised_models import (
    MARKS,
    adapt,
    assert_same,
    close,
    codes,
    gradients,
    inputs,
    layers,
    multiplies_with,
    needs,
    quantised,
    row_backend,  # noqa: F401, a fixture
    save_float_model,
)

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parents[1] / "quantised"
in_repository = pytest.mark.skipif(not (ROOT / "noxfile.py").exists(), reason="the page is in the repository")
BITSANDBYTES = ["bitsandbytes int8", "bitsandbytes nf4, double"]

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model on disk, which every base quantises."""
    directory = tmp_path_factory.mktemp("base")
    save_float_model(directory)
    return directory


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_gradients_are_the_same_after_k_bit_preparation_and_with_checkpointing(name, folder):
    model = adapt(name, folder)
    expected = gradients(model)
    base = peft.prepare_model_for_kbit_training(
        quantised(name, folder), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    prepared = peft.get_peft_model(base, config(hora_alpha=0.2))
    assert base.is_gradient_checkpointing
    for key, param in parameters(prepared).items():
        assert param.dtype == torch.float32
        param.data = parameters(model)[key].detach().clone()
    for key, grad in gradients(prepared).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-5 * float(expected[key].abs().max()))


@pytest.mark.parametrize("name", [*BITSANDBYTES, "torchao int4", "HQQ 4 bits"])
def test_training_under_autocast_keeps_float32_parameters(name, folder):
    model = adapt(name, folder)
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    close(*(torch.cat([grads[key].flatten() for key in expected]) for grads in (found, expected)), 0.1)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_trainer_trains_evaluates_and_saves(name, folder, tmp_path):
    class Sentences(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            ids = inputs()["input_ids"][index % 2]
            return {"input_ids": ids, "labels": ids}

    base = peft.prepare_model_for_kbit_training(quantised(name, folder), use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, HoraConfig(r=2, task_type="CAUSAL_LM"))
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "learning_rate": 0.05, "report_to": []}
    arguments = tf.TrainingArguments(
        str(tmp_path), **options, eval_strategy="epoch", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = tf.Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    before = codes(model)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first - 0.01
    assert_same(codes(model), before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(quantised(name, folder), tmp_path / "adapter")
    close(evaluate(loaded, inputs()), evaluate(model, inputs()), 1e-3)


def test_rows_of_k_in_a_fused_weight_of_codes_keep_theirs(tmp_path):
    """Eight bits have one scale for each row, so that the rows of q and v are rounded by themselves."""
    needs("bitsandbytes int8")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tf.Phi3ForCausalLM(tf.Phi3Config(**sizes, **heads, pad_token_id=0)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=tf.BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
        )
    model = peft.get_peft_model(base, config(hora_alpha=0.2))
    verify(model, inputs()).require()
    linear = next(iter(layers(model).values())).get_base_layer()
    assert linear.out_features == 128
    before, rows = multiplies_with(linear), linear.weight.data.clone()
    model.merge_adapter()
    k = slice(64, 96)
    assert torch.equal(linear.weight.data[k], rows[k])
    assert torch.equal(multiplies_with(linear)[k], before[k])
    for others in (slice(0, 64), slice(96, 128)):
        assert (linear.weight.data[others] != rows[others]).any(1).all()
    model.unmerge_adapter()
    assert torch.equal(linear.weight.data, rows)


def test_a_conv1d_is_transposed_by_quantising_and_its_export_fits_both(tmp_path):
    needs("bitsandbytes int8")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 16}
    special = {"bos_token_id": None, "eos_token_id": None}
    tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **special)).save_pretrained(tmp_path / "base")

    def load(**kwargs):
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu", **kwargs)

    eight_bits = tf.BitsAndBytesConfig(load_in_8bit=True)
    model = peft.get_peft_model(load(quantization_config=eight_bits), config(hora_alpha=0.2))
    verify(model, inputs()).require()
    model.save_pretrained(tmp_path / "hora")
    with pytest.raises(HoraError, match=r"must have shape \(192, 64\)"):
        peft.PeftModel.from_pretrained(load(), tmp_path / "hora")
    export_lora(model, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it transposes
        lora = peft.PeftModel.from_pretrained(load(), tmp_path / "lora")
    (path, layer), *_ = layers(model).items()
    expected = layer.get_delta_weight("default").T
    torch.testing.assert_close(lora.get_submodule(path).get_delta_weight("default"), expected, rtol=1e-4, atol=1e-7)


def test_a_packed_weight_tells_its_rows_by_its_widths(folder):
    """Two codes of four bits in a byte: neither axis of what is stored is an axis of the weight."""
    layer = next(iter(layers(adapt("bitsandbytes nf4, double", folder)).values()))
    assert layer.get_base_layer().weight.shape == (64 * 64 // 2, 1)
    assert (layer.out_features, layer.in_features) == (64, 64)


def test_a_bias_of_hqq_survives_merging_which_it_does_not_with_lora(folder, tmp_path):
    model = adapt("HQQ 4 bits", folder)
    path, layer = next(iter(layers(model).items()))
    bias = layer.get_base_layer().bias.clone()
    model.merge_adapter()
    assert torch.equal(layer.get_base_layer().bias, bias)
    lora = peft.get_peft_model(quantised("HQQ 4 bits", folder), peft.LoraConfig(target_modules=["q_proj"]))
    lora.merge_adapter()
    assert lora.get_submodule(path).get_base_layer().bias is None  # peft 0.21


@pytest.fixture
def table():
    sys.path.insert(0, str(FOLDER))
    import quantised_table

    yield quantised_table
    sys.path.remove(str(FOLDER))


def results():
    return json.loads((FOLDER / "results.json").read_text())


@in_repository
def test_the_page_is_that_of_the_results(table):
    assert table.page(results()) == (ROOT / "docs/guide/quantised.md").read_text()


def test_no_answer_of_ours_is_wrong(table):
    assert {name: table.faults(row) for name, row in results()["bases"].items()} == {
        name: [] for name in results()["bases"]
    }


def test_each_answer_that_is_wrong_is_a_fault(table):
    good = {"train": 1e-6, "merge": 0.1, "unmerge": 0.0, "save": True, "export": 1e-6}
    assert table.faults({"hora": good}) == table.faults({"hora": good | {"merge": "refused: why"}}) == []
    for column, answer in {"train": 0.1, "unmerge": 1e-9, "save": False, "export": 0.5, "merge": "error: why"}.items():
        assert len(table.faults({"hora": good | {column: answer}})) == 1, column
    for column in ("train", "unmerge", "export", "merge"):
        assert len(table.faults({"hora": good | {column: float("nan")}})) == 1, column


def test_training_reaches_every_parameter_of_a_module(folder):
    model = adapt("packed as in GPTQ", folder)
    assert isinstance(next(iter(layers(model).values())).get_base_layer(), nn.Module)
    assert all(bool((grad != 0).any()) for grad in gradients(model).values())
