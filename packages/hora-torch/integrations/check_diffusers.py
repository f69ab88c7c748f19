"""diffusers adds adapters of HoRA to its models, weighs them, and loads their exports as its own LoRA."""

import hora_torch
import torch
from diffusers import UNet2DConditionModel

from .conftest import config


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


def run(model):
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        return model(sample, 3, text).sample


def adapter(**kwargs):
    return config(task_type=None, init_weights=False, hora_alpha=1.0, **kwargs)


def test_adapters_are_added_weighed_and_turned_off():
    model = unet()
    base = run(model)
    model.add_adapter(adapter(), adapter_name="one")
    model.add_adapter(adapter(target_modules=["to_q", "to_v"]), adapter_name="two")
    alone = {}
    for name in ("one", "two"):
        model.set_adapters(name)
        alone[name] = run(model)
        assert not torch.allclose(alone[name], base, atol=1e-4)
    model.set_adapters(["one", "two"], weights=[0.0, 1.0])
    torch.testing.assert_close(run(model), alone["two"], rtol=1e-4, atol=1e-5)
    model.set_adapters(["one", "two"], weights=[0.0, 0.0])
    torch.testing.assert_close(run(model), base, rtol=1e-4, atol=1e-5)
    model.disable_adapters()
    torch.testing.assert_close(run(model), base)


def test_fusing_is_merging_and_unfusing_gives_the_base_back():
    model = unet()
    base = run(model)
    model.add_adapter(adapter(), adapter_name="default")
    adapted = run(model)
    model.fuse_lora()
    torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    model.disable_adapters()
    assert torch.equal(run(model), base)


def test_the_export_is_a_lora_of_diffusers(tmp_path):
    model = unet()
    model.add_adapter(adapter(), adapter_name="default")
    hora_torch.export_lora(model, tmp_path)
    lora = unet()
    lora.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors")
    torch.testing.assert_close(run(lora), run(model), rtol=1e-4, atol=1e-5)
