"""Quantised bases, loaded as their users load them: train, save and export as on the floats that they stand for."""

import peft
import pytest
import torch
from hora_spec import HoraError, load_adapter
from hora_torch import export_lora, joint_a

from .oracle import config, evaluate, output, parameters
from .quantised_models import (
    BASES,
    LIBRARIES,
    MARKS,
    adapt,
    close,
    floats,
    gradients,
    in_floats,
    inputs,
    needs,
    quantised,
    row_backend,  # noqa: F401, a fixture
    save_float_model,
)

pytestmark = MARKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model on disk, which every base quantises."""
    directory = tmp_path_factory.mktemp("base")
    save_float_model(directory)
    return directory


@pytest.mark.parametrize("name", BASES)
def test_rows_and_heads_are_those_of_the_float_model(name, folder):
    plain = peft.get_peft_model(floats(folder), config(hora_alpha=0.2))
    assert adapt(name, folder).peft_config["default"].hora_layers == plain.peft_config["default"].hora_layers


@pytest.mark.parametrize("name", BASES)
def test_outputs_are_those_on_the_dequantised_weights(name, folder):
    model = adapt(name, folder)
    plain = in_floats(name, folder, model)
    base = evaluate(quantised(name, folder), inputs())
    found, expected = evaluate(model, inputs()) - base, evaluate(plain, inputs()) - base
    assert expected.norm() > 0.05
    close(found, expected, 0.2 if BASES[name].rounds_inputs else 1e-3)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, inputs()), base)


@pytest.mark.parametrize("name", BASES)
def test_gradients_are_those_on_the_dequantised_weights(name, folder):
    model = adapt(name, folder)
    found, expected = gradients(model), gradients(in_floats(name, folder, model))
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-4 * float(expected[key].abs().max()))


@pytest.mark.parametrize("name", BASES)
def test_a_joint_start_is_that_on_the_dequantised_weights(name, folder):
    def loss(model, batch):
        return output(model(**batch)).square().mean()

    fixed = {"sharing": "a", "a_source": "fixed", "init_weights": True}
    model = adapt(name, folder, **fixed)
    found, expected = (joint_a(one, [inputs()], loss) for one in (model, in_floats(name, folder, model, **fixed)))
    for layer, params in expected.params.items():
        for key, a in params.items():
            close(
                torch.from_numpy(found.params[layer][key]),
                torch.from_numpy(a),
                0.2 if BASES[name].rounds_inputs else 1e-3,
            )


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_is_saved_and_loaded_on_a_fresh_base(name, folder, tmp_path):
    model = adapt(name, folder)
    expected = evaluate(model, inputs())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantised(name, folder), tmp_path)
    assert torch.equal(evaluate(loaded, inputs()), expected)
    peft.PeftModel.from_pretrained(floats(folder), tmp_path)  # the base of an adapter is the model, not its codes


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_lora_export_computes_the_same_on_the_same_base_with_peft_alone(name, folder, tmp_path):
    model = adapt(name, folder)
    export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(quantised(name, folder), tmp_path)
    base, expected = evaluate(quantised(name, folder), inputs()), evaluate(model, inputs())
    close(evaluate(lora, inputs()) - base, expected - base, 1e-2 if BASES[name].rounds_inputs else 1e-4)


def test_peft_reports_how_a_layer_is_quantised(folder):
    model = adapt("bitsandbytes nf4", folder)
    assert model.get_model_status().quantization_backend == "bnb 4bit"
    assert peft.get_peft_model(floats(folder), config()).get_model_status().quantization_backend is None


def test_a_base_that_rounds_activations_away_from_the_gradient_is_refused_in_training(folder):
    needs("torchao int8")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = floats(folder)
    quantize_(
        base, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name[-6:] in ("q_proj", "v_proj")
    )
    model = peft.get_peft_model(base, config())
    evaluate(model, inputs())
    with pytest.raises(HoraError, match="hands the gradient on to its input"):
        gradients(model)


@pytest.mark.parametrize("name", ["bitsandbytes int8", "bitsandbytes nf4, double"])
def test_training_goes_on_after_an_evaluation(name, folder):
    model = adapt(name, folder)
    expected = gradients(model)
    evaluate(model, inputs())
    for key, grad in gradients(model).items():
        assert torch.equal(grad, expected[key]), key


def test_an_adapter_of_a_float_model_is_loaded_on_codes_and_back(folder, tmp_path):
    plain = peft.get_peft_model(floats(folder), config(hora_alpha=0.2))
    plain.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantised("packed as in GPTQ", folder), tmp_path)
    for key, value in parameters(plain).items():
        assert torch.equal(parameters(loaded)[key], value)
    assert load_adapter(tmp_path).layers.keys() == {f"model.layers.{i}.self_attn" for i in range(2)}
