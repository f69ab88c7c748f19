"""Prepares an NNX model for a method: HoRA from hora-jax, LoRA from qwix; says which variables are trained."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hora_spec import HoraError

from hora_bench.data.base import Batch
from hora_bench.methods import Method
from hora_bench.models.llama import Llama
from hora_bench.models.surgery import split_nnx

Filter = Callable[[tuple[Any, ...], Any], bool]


def prepare(model: Any, method: Method, *, seed: int, examples: Sequence[Batch] = ()) -> tuple[Any, Filter]:
    """The model with the method's parameters injected, and a filter of the trained variables.

    Parameters
    ----------
    model
        `hora_bench.models.vit.ViT`, whose head every method trains, or `hora_bench.models.llama.Llama`.
    method
        Adapts Q and V of all layers.
    seed
        Of the initial values.
    examples
        Batches from which a method starts that starts from any. Without them, it has the sizes that it would have.

    Raises
    ------
    HoraError
        The method does not exist on JAX.
    """
    method.check_backend("jax")
    language = isinstance(model, Llama)
    match method.family:
        case "full":
            return model, lambda path, variable: isinstance(variable, nnx.Param)
        case "probe":
            if language:
                raise HoraError(
                    "linear-probe trains a classification head, got a language model: choose another method"
                )
            return model, _in_head
        case "hora":
            import hora_jax
            from hora_jax import presets
            from hora_jax.nnx import HoraModel, HoraParam

            targets = presets.llama() if language else presets.vit()
            plan = hora_jax.make_plan(model, method.spec, targets=targets)
            phi = hora_jax.init(plan, seed=seed)
            if method.start and examples:
                phi = started(model, plan, phi, method, examples, seed)
            adapted = HoraModel(model, plan, phi)
            return adapted, lambda path, variable: isinstance(variable, HoraParam) or _in_head(path, variable)
        case "lora":
            return _qwix(
                model, method, seed
            ), lambda path, variable: isinstance(variable, nnx.LoRAParam) or _in_head(path, variable)
    raise HoraError(f"{method.name} has no implementation on JAX")


def started(model: Any, plan: Any, phi: Any, method: Method, examples: Sequence[Batch], seed: int) -> Any:
    """The adapter with the A of all layers where the loss on the examples wants all heads to read."""
    import hora_jax

    from hora_bench.backends.jax import loss_of

    graph, state = nnx.split(model)
    asked = {key: value for key, value in method.start.items() if key != "batches"}

    def loss(state: Any, batch: Any) -> jax.Array:
        return loss_of(nnx.merge(graph, state), batch)

    return hora_jax.joint_a(plan, loss, state, phi, examples, seed=seed, **asked)[0]


def _qwix(model: Any, method: Method, seed: int) -> Any:
    import qwix

    options = method.options
    if isinstance(model, Llama):
        pattern, example = r".*(q_proj|v_proj)", jnp.zeros((1, 2), jnp.int32)
    else:
        split_nnx(model)
        size = model.config.image_size
        pattern, example = r".*attn/qkv/(q|v)", jnp.zeros((1, size, size, 3))
    alpha = float(options["alpha"] or options["rank"])
    # PEFT draws A from U(-1/sqrt(embed), 1/sqrt(embed)): a variance of 1 / (3 embed), of which qwix has six times
    start = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    provider = qwix.LoraProvider(module_path=pattern, rank=options["rank"], alpha=alpha, lora_a_initializer=start)
    return qwix.apply_lora_to_model(model, provider, example, rngs=nnx.Rngs(seed))


def _in_head(path: tuple[Any, ...], variable: Any) -> bool:
    return "head" in path and isinstance(variable, nnx.Param)
