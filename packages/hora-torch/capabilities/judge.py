"""What a method of PEFT can do, found by doing it on tiny models.

The questions are those of PEFT's own ``scripts/generate_method_capabilities.py``, which is in its repository and not in
its wheel. Where that looks for the name of a class or of a function, this does the thing and compares numbers.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hora_torch
import peft
import torch
import transformers as tf
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH = 16


@dataclass(frozen=True)
class Method:
    """A config class, and the arguments with which its new adapters change the output."""

    name: str
    config_class: type[peft.PeftConfig]
    not_idle: Mapping[str, Any]

    def config(self, **kwargs: Any) -> peft.PeftConfig:
        """A small adapter that is not zero."""
        return self.config_class(**{"r": 4, **self.not_idle, **kwargs})


LORA = Method("LoRA", peft.LoraConfig, {"init_lora_weights": False})
HORA = Method("HoRA", hora_torch.HoraConfig, {"init_weights": False, "hidden_dim": 8, "head_embed_dim": 6})


class Host(nn.Module):
    """One layer that a method may take as its target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.attends = layer, isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0] if self.attends else self.layer(x)


def host(build: Callable[[], nn.Module]) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Host(build()).eval()


def decoder() -> nn.Module:
    """A tiny language model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_hidden_layers=2)).eval()


TOKENS = {"input_ids": torch.arange(6).view(2, 3)}
QV = ["q_proj", "v_proj"]


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    """Output of a language model."""
    with torch.no_grad():
        return model(**TOKENS, **kwargs).logits


def adapted(method: Method, **kwargs: Any) -> peft.PeftModel:
    """A language model with one adapter, called default."""
    return peft.get_peft_model(decoder(), method.config(target_modules=QV, **kwargs)).eval()


def same(one: Tensor, other: Tensor) -> bool:
    """Equal up to float32."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def takes(build: Callable[[], nn.Module], x: Tensor) -> Callable[[Method], bool]:
    """Whether a layer is adapted, and merging it computes the same."""

    def ask(method: Method) -> bool:
        base, config = host(build), method.config(target_modules=["layer"])
        with torch.no_grad():
            before = base(x)
            model = peft.get_peft_model(base, config).eval()
            wrapped = any(isinstance(module, BaseTunerLayer) for module in model.modules())
            after = model(x)
            merged = model.merge_and_unload()(x)
        return wrapped and not same(before, after) and same(merged, after)

    return ask


def parts_of_fused(method: Method) -> bool:
    """q and v of GPT-2's c_attn are adapted, k is not touched."""
    torch.manual_seed(0)
    base = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=WIDTH, n_layer=1, n_head=4, n_positions=8))
    before = base.transformer.h[0].attn.c_attn.weight.detach().clone()
    stored = {"fan_in_fan_out": True} if method is LORA else {}
    merged = peft.get_peft_model(base, method.config(target_modules=["c_attn"], **stored)).merge_and_unload()
    q, k, v = (merged.transformer.h[0].attn.c_attn.weight.detach() - before).chunk(3, -1)
    return bool(q.any() and v.any() and not k.any())


def several(method: Method) -> bool:
    """A second adapter is added, used, and the first is as it was."""
    model = adapted(method)
    first = logits(model)
    model.add_adapter("other", method.config(target_modules=["v_proj"]))
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    return not same(first, other) and torch.equal(logits(model), first)


def mixed_batches(method: Method) -> bool:
    """Samples of one batch have adapters of their own."""
    model = adapted(method)
    model.add_adapter("other", method.config(target_modules=QV))
    mixed = logits(model, adapter_names=["default", "other"])
    first = logits(model)
    model.set_adapter("other")
    return same(mixed[0], first[0]) and same(mixed[1], logits(model)[1]) and not same(mixed[1], first[1])


def mixed_models(method: Method) -> bool:
    """Adapters of several methods act together in a PeftMixedModel."""
    model = peft.get_peft_model(decoder(), method.config(target_modules=QV), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=QV))
    model.set_adapter(["default", "other"])
    return True


def unmerging(method: Method) -> bool:
    """Merging and unmerging a bfloat16 base leaves every bit as it was."""
    model = peft.get_peft_model(decoder().bfloat16(), method.config(target_modules=QV))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    return all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def converting(method: Method) -> bool:
    """The adapter becomes a plain LoRA adapter that computes the same."""
    model = adapted(method)
    with TemporaryDirectory() as folder:
        if method is HORA:
            hora_torch.export_lora(model, folder)
        else:
            model.save_pretrained(folder)
        return same(logits(peft.PeftModel.from_pretrained(decoder(), folder).eval()), logits(model))


def weighted_sums(method: Method) -> bool:
    """A sum of adapters is an adapter, exactly."""
    model = adapted(method)
    model.add_adapter("other", method.config(target_modules=QV))
    model.base_model.set_adapter(["default", "other"])
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("other", 0.5)
    together = logits(model)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("other", 1.0)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    return same(logits(model), together)


def hotswapping(method: Method) -> bool:
    """The values of another adapter take the place of those in use."""
    model, other = adapted(method), adapted(method)
    with torch.no_grad():
        for param in other.parameters():
            if param.requires_grad:
                param.mul_(-1.5)
    with TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder, "default", torch_device="cpu")
    return same(logits(model), logits(other))


def scaling(method: Method) -> bool:
    """PEFT's context manager makes an adapter act less."""
    model = adapted(method)
    with rescale_adapter_scale(model, 0.0):
        off = logits(model)
    with model.disable_adapter():
        return same(off, logits(model))


def injecting(method: Method) -> bool:
    """Transformers adds, saves and loads an adapter without a PeftModel."""
    model = decoder()
    model.add_adapter(method.config(target_modules=QV), adapter_name="default")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = decoder()
        loaded.load_adapter(folder)
    return same(logits(loaded.eval()), logits(model.eval()))


def saved(**kwargs: Any) -> Callable[[Method], bool]:
    """Whether what is trained beside the adapter comes back from a file."""

    def ask(method: Method) -> bool:
        model = adapted(method, **kwargs)
        own = [p for name, p in model.named_parameters() if p.requires_grad and ".self_attn." not in name]
        with torch.no_grad():
            for param in own:
                param.add_(0.5)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return bool(own) and same(logits(peft.PeftModel.from_pretrained(decoder(), folder).eval()), logits(model))

    return ask


def has(**kwargs: Any) -> Callable[[Method], bool]:
    """Whether an option acts: the adapted model computes or trains something else than without it."""

    def ask(method: Method) -> bool:
        alpha = {"lora_alpha": 8} if method is LORA else {"hora_alpha": 8.0}
        models = []
        for options in ({}, kwargs):
            torch.manual_seed(1)
            models.append(adapted(method, **alpha, **options))
        sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
        return sizes[0] != sizes[1] or not same(*map(logits, models))

    return ask


def bare_parameters(method: Method) -> bool:
    """A parameter that is no module's weight is adapted."""
    config = method.config(target_modules=[], target_parameters=["mlp.up_proj.weight"])
    model = peft.get_peft_model(decoder(), config).eval()
    return not same(logits(model), logits(decoder()))


def conv(dims: int, size: int, **kwargs: Any) -> Callable[[Method], bool]:
    """A convolution of `dims` dimensions with a kernel of `size`."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return takes(lambda: kind(WIDTH, WIDTH, size, **kwargs), torch.randn(2, WIDTH, *(4,) * dims))


QUESTIONS: Mapping[str, Callable[[Method], bool]] = {
    "target: Linear": takes(lambda: nn.Linear(WIDTH, WIDTH), torch.randn(2, WIDTH)),
    "target: Conv1D (transformers)": takes(lambda: Conv1D(WIDTH, WIDTH), torch.randn(2, WIDTH)),
    "target: MultiheadAttention": takes(
        lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True), torch.randn(2, 3, WIDTH)
    ),
    "target: Conv1d, kernel 1": conv(1, 1),
    "target: Conv2d, kernel 1": conv(2, 1),
    "target: Conv1d, kernel 1, groups": conv(1, 1, groups=4),
    "target: Conv1d, kernel 3": conv(1, 3),
    "target: Conv2d, kernel 3": conv(2, 3),
    "target: Conv3d, kernel 3": conv(3, 3),
    "target: Embedding": takes(lambda: nn.Embedding(8, WIDTH), torch.arange(4)),
    "target: LayerNorm": takes(lambda: nn.LayerNorm(WIDTH), torch.randn(2, WIDTH)),
    "target: a bare parameter": bare_parameters,
    "q and v alone of a fused weight": parts_of_fused,
    "several adapters": several,
    "one adapter per sample of a batch": mixed_batches,
    "adapters of several methods (PeftMixedModel)": mixed_models,
    "unmerging restores every bit": unmerging,
    "an exact LoRA adapter": converting,
    "add_weighted_adapter, exact": weighted_sums,
    "hotswap_adapter": hotswapping,
    "rescale_adapter_scale": scaling,
    "add_adapter, load_adapter of Transformers": injecting,
    "modules_to_save": saved(modules_to_save=["lm_head"]),
    "trainable_token_indices": saved(trainable_token_indices=[0, 2]),
    "rank_pattern": has(rank_pattern={"layers.0.self_attn.[qv]_proj": 2}),
    "alpha_pattern": has(alpha_pattern={"layers.0.self_attn.[qv]_proj": 32}),
    "use_rslora": has(use_rslora=True),
    "use_dora": has(use_dora=True),
    "layer_replication": has(layer_replication=[[0, 2], [1, 2]]),
}


def judge(method: Method) -> dict[str, bool]:
    """The answer to every question; what raises is a no."""
    answers = {}
    for name, ask in QUESTIONS.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                answers[name] = ask(method)
            except Exception as error:
                answers[name] = False
                REFUSALS[method.name, name] = f"{type(error).__name__}: {error}"
    return answers


REFUSALS: dict[tuple[str, str], str] = {}
"""What was raised for a no, by method and question."""

REASONS: Mapping[str, str] = {
    "target: Conv1d, kernel 3": "layouts have no axis for a kernel (spec L1), and attention has no such maps",
    "target: Conv2d, kernel 3": "as above",
    "target: Conv3d, kernel 3": "as above",
    "target: Embedding": "a look-up has no heads; its rows are trained by trainable_token_indices",
    "target: LayerNorm": "a vector has no low-rank update; modules_to_save trains it whole",
    "target: a bare parameter": "stacked experts are many maps in one, and PEFT's wrapper of parameters is LoRA's",
    "adapters of several methods (PeftMixedModel)": "PEFT keeps a closed list of methods for it",
    "use_dora": "DoRA learns norms of the summed weight beside its factors; it is another method",
    "layer_replication": "the replicas are one weight, into which each adapter would merge its own update",
}
"""Why HoRA says no."""


def page(lora: Mapping[str, bool], hora: Mapping[str, bool]) -> str:
    """The answers as a page of the documentation."""
    rows = [
        f"| {name} | {_word(lora[name])} | {_word(hora[name])} | {'' if hora[name] else REASONS[name]} |"
        for name in QUESTIONS
    ]
    return "\n".join([_HEAD, *rows, ""])


def _word(answer: bool) -> str:
    return "yes" if answer else "no"


_HEAD = """# What works, beside LoRA

Found by doing it on tiny models, with the questions of PEFT's own `generate_method_capabilities.py`; a target counts if
its adapted output changes, and merging computes the same. Written by `nox -s capabilities`, and tested to be true.
Quantised bases have [a page of their own](quantised.md).

| | LoRA | HoRA | why not |
|---|---|---|---|"""


def write(path: Path) -> None:
    """Ask both methods and write the page."""
    path.write_text(page(judge(LORA), judge(HORA)))
