"""An adapter of a tunix model is, in PEFT, the same adapter of the model in transformers that tunix loaded."""

import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import init, make_plan, presets, save_adapter
from hora_jax.nnx import HoraModel

TOKENS = np.arange(1, 11).reshape(2, 5)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
TUNIX = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
CASES = {  # name in transformers, its settings; module and loader of tunix, and the same settings there
    "Qwen3": (
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
        ("qwen3.model", "qwen3.params"),
        {"vocab_size": 32, "rope_theta": 1_000_000, "norm_eps": 1e-6},
    ),
    "Gemma3Text": (
        {"query_pre_attn_scalar": 4, "sliding_window": 8},
        ("gemma3.model", "gemma3.params_safetensors"),
        {"num_embed": 32, "sliding_window_size": 8, "global_base_frequency": 1_000_000, "param_dtype": jnp.float32},
    ),
}


@pytest.mark.filterwarnings("ignore")  # of three libraries
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_tunix_computes_the_same_in_peft(name, library, method, perturbed, tmp_path):
    ours, (module, loader), theirs = CASES[name]
    models, params = library(f"tunix.models.{module}"), library(f"tunix.models.{loader}")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("hora_torch", reason="hora-torch is not installed")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **ours)
    source = transformers.AutoModelForCausalLM.from_config(config).eval()
    source.save_pretrained(tmp_path / "base")
    base = params.create_model_from_safe_tensors(str(tmp_path / "base"), models.ModelConfig(**TUNIX, **theirs))
    positions, mask = jnp.broadcast_to(jnp.arange(5), (2, 5)), jnp.tril(jnp.ones((2, 5, 5), bool))

    def here(model) -> np.ndarray:
        return np.asarray(model(jnp.asarray(TOKENS), positions, None, mask)[0])

    def there(model) -> np.ndarray:
        with torch.no_grad():
            return model(torch.as_tensor(TOKENS)).logits.numpy()

    before = there(source)
    np.testing.assert_allclose(here(base), before, atol=1e-4)
    plan = make_plan(base, method, presets.tunix())
    phi = perturbed(init(plan))
    save_adapter(tmp_path / "adapter", plan, phi)
    adapted = here(HoraModel(base, plan, phi))
    assert np.abs(adapted - before).max() > 0.01
    np.testing.assert_allclose(there(peft.PeftModel.from_pretrained(source, tmp_path / "adapter")), adapted, atol=1e-4)
