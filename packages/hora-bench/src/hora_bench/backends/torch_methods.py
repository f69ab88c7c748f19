"""Prepares a torch model for a method: HoRA from hora-torch, peers from PEFT; what is to be trained requires grad."""

import warnings
from math import gcd
from typing import Any

from hora_spec import HoraError

from hora_bench.backends.torch_starts import Examples, Loss, eva_config, lora_ga_config
from hora_bench.methods import Method
from hora_bench.models.surgery import split_torch
from hora_bench.torchvision_ops import declare_missing_ops


def prepare(model: Any, method: Method, *, seed: int, examples: Examples = (), loss: Loss | None = None) -> Any:
    """The model with the method's parameters injected and everything else frozen.

    Parameters
    ----------
    model
        A timm ViT or a `SentenceClassifier` with a new ``head``, which every method trains, or a causal language model;
        also on the meta device.
    method
        Adapts Q and V of all layers, in the peers too: a fused qkv is split for them.
    seed
        Of the initial values.
    examples, loss
        Batches from which a method starts that starts from any, and ``loss(model, batch)``, a mean. Without them, it
        has the sizes that it would have.

    Raises
    ------
    HoraError
        The method does not exist on torch, or cannot adapt this model.
    """
    method.check_backend("torch")
    declare_missing_ops()
    import torch

    from hora_bench.backends import torch_starts

    torch.manual_seed(seed)
    saved = ["head"] if hasattr(model, "head") else None
    if method.family in ("full", "probe"):
        model.requires_grad_(method.family == "full")
        if method.family == "probe":
            if saved is None:
                raise HoraError(
                    "linear-probe trains a classification head, got a language model: choose another method"
                )
            model.head.requires_grad_(True)
        return model
    if method.family == "hora":
        import hora_torch

        options = method.spec.to_dict()
        rank, alpha = options.pop("rank"), options.pop("alpha")
        config = hora_torch.HoraConfig(r=rank, hora_alpha=alpha, seed=seed, modules_to_save=saved, **options)
        adapted = _adapted(model, config)
        if method.start and loss is not None:
            torch_starts.joint(adapted, method.start, examples, loss)
        return adapted
    targets = split_torch(model) or _whole_maps(model, method)
    given = {"target_modules": targets, "modules_to_save": saved}
    config = _peer(method, given, model, targets)
    if method.family == "lora-ga" and loss is not None:
        torch_starts.lora_ga(model, config, examples, loss)
    adapted = _adapted(model, config)
    if method.family == "eva" and loss is not None:
        torch_starts.eva(adapted, examples, loss)
    return adapted


def _whole_maps(model: Any, method: Method) -> list[str]:
    """Names of the modules that HoRA adapts, none of which may hold more than a projection that it adapts."""
    import hora_torch

    sites = [site for layer in hora_torch.plan(model, hora_torch.HoraConfig()).layers for site in layer.sites.values()]
    for site in sites:
        rows = site.projection.num_heads * site.projection.head_dim
        if rows != site.weight_shape[0]:
            raise HoraError(
                f"{method.name} adapts whole maps, Q and V as HoRA does, got {site.module}, of whose "
                f"{site.weight_shape[0]} rows they are {rows}: choose a method of HoRA"
            )
    return sorted({site.module.rpartition(".")[2] for site in sites})


def _adapted(model: Any, config: Any) -> Any:
    import peft

    abstract = next(model.parameters()).is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers 5 deprecates
        warnings.filterwarnings("ignore", "lora with eva initialization", UserWarning)  # advice on memory
        return peft.get_peft_model(model, config, low_cpu_mem_usage=abstract)


def _peer(method: Method, given: dict[str, Any], model: Any, targets: list[str]) -> Any:
    import peft

    options = method.options
    match method.family:
        case "lora" | "dora" | "eva" | "lora-ga":
            form: dict[str, Any] = {}
            if method.family == "dora":
                form = {"use_dora": True}
            elif method.family == "eva":
                form = eva_config(options["rho"])
            elif method.family == "lora-ga":
                form = lora_ga_config()
            rank = options["rank"]
            return peft.LoraConfig(r=rank, lora_alpha=options["alpha"] or rank, **form, **given)
        case "vera":
            return peft.VeraConfig(r=options["rank"], **given)
        case "vblora":
            sizes = [m.weight.shape for n, m in model.named_modules() if any(n.endswith(t) for t in targets)]
            length = gcd(256, *(side for shape in sizes for side in shape))
            return peft.VBLoRAConfig(r=options["rank"], num_vectors=options["vectors"], vector_length=length, **given)
    raise HoraError(f"{method.name} has no implementation on torch")
