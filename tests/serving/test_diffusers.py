"""diffusers loads a LoRA export, by its prefix and the name of its file."""

import hora_torch
import peft
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is beside hora-torch in tests(libraries) alone")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["full", "none"])
def test_f6_diffusers_computes_the_same(sharing, tmp_path):
    config = {"r": 2, "hora_alpha": 3.0, "sharing": sharing, "target_modules": ["to_q", "to_v"], "init_weights": False}
    model, base = peft.get_peft_model(unet(), hora_torch.HoraConfig(**config)).eval(), unet()
    hora_torch.export_lora(model, tmp_path)
    loaded = unet()
    loaded.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors")
    inputs = torch.randn(1, 4, 16, 16), 3, torch.randn(1, 5, 32)
    expected = model(*inputs).sample
    assert not torch.allclose(base(*inputs).sample, expected, atol=1e-2)
    torch.testing.assert_close(loaded(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
