"""What of an adapter is trained: the part that optimisers take, and how its parameters are told apart."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
from hora_spec import AdapterSpec, HoraError, is_trained, param_shapes

from hora_jax.planning import Layer, Plan, check_plan

Params = dict[str, dict[str, jax.Array]]


def split(plan: Plan, phi: Mapping[str, Mapping[str, jax.Array]]) -> tuple[Params, Params]:
    """The trained parameters of an adapter, and those that stay: a fixed A (spec S6).

    Only the first part may be differentiated, so an optimiser never sees the second and no weight decay moves it.

    Parameters
    ----------
    plan, phi
        A plan and its adapter.

    Returns
    -------
    tuple
        Two trees with the groups of phi. The second one's are empty unless the plan has a fixed A.

    Raises
    ------
    HoraError
        If phi belongs to another plan.

    Examples
    --------
    >>> import hora_jax
    >>> from hora_spec import preset
    >>> params = {"attn": {"q": jax.numpy.ones((16, 4, 4))}}
    >>> plan = hora_jax.make_plan(params, preset("joint", 2), hora_jax.Target("*.q", "q", "d h k", layer="attn"))
    >>> trained, fixed = hora_jax.split(plan, hora_jax.init(plan))
    >>> list(trained["attn"]), list(fixed["attn"])
    (['b.q'], ['a.q'])
    >>> loss = lambda trained: hora_jax.delta(plan, hora_jax.join(trained, fixed))["attn"]["q"].sum()
    >>> list(jax.grad(loss)(trained)["attn"])
    ['b.q']
    """
    labelled = labels(plan, phi)
    parts: tuple[Params, Params] = {key: {} for key in phi}, {key: {} for key in phi}
    for key, own in phi.items():
        for name, value in own.items():
            parts[labelled[key][name] == "fixed"][key][name] = value
    return parts


def join(trained: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The adapter of both parts that `split` made."""
    parts = trained, fixed
    mappings = all(isinstance(part, Mapping) and all(isinstance(v, Mapping) for v in part.values()) for part in parts)
    if not mappings or trained.keys() != fixed.keys():
        raise HoraError(
            f"both parts have the groups of one plan, got {trained!r:.60} and {fixed!r:.60}: take what hora_jax.split "
            "makes"
        )
    return {key: {**own, **fixed[key]} for key, own in trained.items()}


def labels(plan: Plan, phi: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """``"A"`` or ``"B"`` for each parameter, the factor that it is, or generates; ``"fixed"`` for a fixed A.

    As `optax.multi_transform` takes them: for LoRA+ (arXiv 2402.12354), a higher learning rate for ``"B"``.

    Parameters
    ----------
    plan, phi
        A plan and its adapter, or the trained part of it.

    Raises
    ------
    HoraError
        If phi holds parameters that are none of the plan's.
    """
    return {key: {name: label for name, label in own.items() if name in phi[key]} for key, own in _labels(plan, phi)}


def check_groups(plan: Plan, phi: Any) -> dict[str, tuple[Layer, ...]]:
    """The groups of a plan; HoraError unless phi has the same, each a mapping."""
    groups = check_plan(plan).groups()
    if not isinstance(phi, Mapping) or not all(isinstance(own, Mapping) for own in phi.values()):
        raise HoraError(f"phi maps groups to parameters by name, got {phi!r:.60}: take hora_jax.init(plan) (spec S7)")
    if groups.keys() != phi.keys():
        raise HoraError(f"phi has the plan's groups {list(groups)}, got {list(phi)}: it belongs to another plan")
    return groups


def _labels(plan: Plan, phi: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, str]]]:
    for key, members in check_groups(plan, phi).items():
        known = param_shapes(members[0].spec, members[0].shape)
        if unknown := sorted(phi[key].keys() - known.keys()):
            raise HoraError(f"phi[{key!r}] has the parameters {list(known)}, got also {unknown} (spec S7)")
        yield key, {name: _label(members[0].spec, name) for name in known}


def _label(spec: AdapterSpec, name: str) -> str:
    if not is_trained(spec, name):
        return "fixed"
    return "A" if name.partition(".")[0] in ("a", "a_seed", "a_in", "a_out") else "B"


def undifferentiated(spec: AdapterSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a group of layers, of which those that are not trained refuse to be differentiated."""
    return {name: value if is_trained(spec, name) else _constant(value, name) for name, value in params.items()}


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _constant(value: jax.Array, name: str) -> jax.Array:
    return value


@_constant.defjvp
def _refuse(name: str, values: tuple[jax.Array], along: tuple[jax.Array]) -> Any:
    raise HoraError(
        f"a fixed A is a constant, got a derivative with respect to {name!r}: an optimiser would hold it, and weight "
        "decay move it unnoticed. Take trained, fixed = hora_jax.split(plan, phi), differentiate and optimise trained "
        "alone, and pass hora_jax.join(trained, fixed) as phi (spec S6, G7)"
    )
