"""Small language models whose linear maps are quantised, loaded as their users load them: no downloads."""

import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,  # rows of 64, the least that four bits are packed in
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


tf.utils.logging.disable_progress_bar()


class Base(NamedTuple):
    """A way to quantise, and what is known of it."""

    load: Callable[[Path], nn.Module]
    library: str | None = None
    rounds_inputs: bool = False
    """Whether evaluation rounds activations, too."""
    copies: bool = True
    """Whether the library's own modules survive ``copy.deepcopy``."""
    pickles: bool = True
    """Whether the library's own modules can be pickled."""
    merges: bool = True


def save_float_model(directory: Path) -> None:
    """The model that every base quantises; biases are not zero."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(param, std=0.1)
    model.save_pretrained(directory)


def inputs() -> dict[str, Tensor]:
    """Two sequences of seven tokens."""
    return {"input_ids": torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))}


def missing(name: str) -> str | None:
    """The library that a base needs and that is not installed."""
    library = BASES[name].library
    return library if library is not None and find_spec(library.partition(".")[0]) is None else None


def load(name: str, directory: Path, *, packs: bool = False) -> nn.Module:
    """The model of `save_float_model`, quantised; with `packs` bitsandbytes may choose other codes in evaluation."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that look for accelerators
        model = BASES[name].load(directory).eval()
    for module in model.modules():
        if not packs and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and module of every linear map of an attention or a feed-forward."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("proj"):
                yield parent, name, child


def floats(directory: Path, **kwargs: Any) -> nn.Module:
    """The model in full precision."""
    return tf.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", dtype=torch.float32, **kwargs)


def _configured(config: str, **options: Any) -> Callable[[Path], nn.Module]:
    def load(directory: Path) -> nn.Module:
        return floats(directory, quantization_config=getattr(tf, config)(**options))

    return load


def _torchao(setting: str, group: int | None = None, *, by_hand: bool = False) -> Callable[[Path], nn.Module]:
    def load(directory: Path) -> nn.Module:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        options = {} if group is None else {"weight_dtype": torch.int4, "granularity": PerGroup(group)}
        config = getattr(quantization, setting)(**options)
        if not by_hand:
            return floats(directory, quantization_config=tf.TorchAoConfig(quant_type=config))
        model = floats(directory)
        quantization.quantize_(model, config, filter_fn=lambda _, name: name.endswith("proj"))
        return model

    return load


def _hqq(directory: Path) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = floats(directory)
    for parent, name, linear in projections(model):
        config = BaseQuantizeConfig(nbits=4, group_size=64)
        with torch.no_grad():  # else the bias remembers where it came from
            setattr(parent, name, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


class PackedLinear(nn.Module):
    """A linear map as GPTQ and AWQ keep it: integers, zeros and scales in buffers, and no ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach()
        low, high = weight.amin(1), weight.amax(1)
        self.register_buffer("scales", (high - low) / 15)
        self.register_buffer("qzeros", (-low / self.scales).round().to(torch.int8))
        codes = ((weight / self.scales[:, None]).round() + self.qzeros[:, None]).clamp(0, 15).to(torch.uint8)
        self.register_buffer("qweight", codes[:, ::2] + codes[:, 1::2] * 16)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias``."""
        codes = torch.stack([self.qweight % 16, self.qweight // 16], -1).flatten(1)
        weight = (codes - self.qzeros[:, None].float()) * self.scales[:, None]
        return nn.functional.linear(x, weight, self.bias)


def _packed(directory: Path) -> nn.Module:
    model = floats(directory)
    for parent, name, linear in projections(model):
        setattr(parent, name, PackedLinear(linear))
    return model


def _four_bits(**options: Any) -> Callable[[Path], nn.Module]:
    return _configured("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


BASES: dict[str, Base] = {
    "bitsandbytes int8": Base(_configured("BitsAndBytesConfig", load_in_8bit=True), "bitsandbytes", rounds_inputs=True),
    "bitsandbytes nf4": Base(_four_bits(bnb_4bit_quant_type="nf4"), "bitsandbytes"),
    "bitsandbytes nf4, double": Base(
        _four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), "bitsandbytes"
    ),
    "bitsandbytes fp4": Base(_four_bits(bnb_4bit_quant_type="fp4"), "bitsandbytes"),
    "torchao int8": Base(_torchao("Int8WeightOnlyConfig"), "torchao", pickles=False),
    "torchao int4": Base(_torchao("IntxWeightOnlyConfig", 32), "torchao", pickles=False),
    "torchao float8": Base(_torchao("Float8WeightOnlyConfig"), "torchao", pickles=False),
    "torchao int8, by hand": Base(_torchao("Int8WeightOnlyConfig", by_hand=True), "torchao", pickles=False),
    "torchao int4, by hand": Base(_torchao("IntxWeightOnlyConfig", 32, by_hand=True), "torchao", pickles=False),
    "torchao float8, by hand": Base(_torchao("Float8WeightOnlyConfig", by_hand=True), "torchao", pickles=False),
    "HQQ 4 bits": Base(_hqq, "hqq"),
    "quanto int8": Base(_configured("QuantoConfig", weights="int8"), "optimum.quanto", copies=False),
    "quanto int4": Base(_configured("QuantoConfig", weights="int4"), "optimum.quanto", copies=False),
    "packed as in GPTQ": Base(_packed, merges=False),
}
