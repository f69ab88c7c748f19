"""The hypernetwork of one layer: the module that owns its parameters and returns factors."""

import warnings
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from hora_spec import AdapterSpec, Factors, HoraError, LayerShape, init_params, is_trained, param_shapes
from torch import Tensor, nn

from hora_torch.functional import factors
from hora_torch.linear import autocast_enabled, has_hooks
from hora_torch.precision import exact_products
from hora_torch.sharding import is_sharded


class _Bank(nn.Module):
    """Parameters of one kind, one per projection, handed out by being called: ``b_out.q``, ``b_out.v``."""

    def forward(self, projections: Iterable[str]) -> list[Tensor]:
        params = [getattr(self, p) for p in projections]
        return [param.clone() for param in params] if has_hooks(self) else params  # hooks may free them after the call


class HoraHypernet(nn.Module):
    """Generator of the factors of all projections of one attention layer (paper section 4; spec G1 to G6).

    Parameters
    ----------
    spec, layer
        Method and shapes.
    name
        Layer name, which together with `seed` decides the initial values (spec I1).
    seed
        Any integer of at least 0.

    Notes
    -----
    Parameters carry the canonical names of `hora_spec.param_shapes`, float32, so that paths in a model are paths in a
    file; a fixed A is a buffer, which no optimiser sees. Each belongs to a module that is called whenever factors are
    generated, this one or one of its banks: whatever moves, gathers or casts the parameters of a called module then
    works. Nothing is kept between calls.
    """

    def __init__(self, spec: AdapterSpec, layer: LayerShape, *, name: str, seed: int = 0) -> None:
        super().__init__()
        self.spec, self.layer, self.name, self.seed = spec, layer, name, seed
        self.awaits: set[str] = set()
        self._shapes = param_shapes(spec, layer)
        self._keys = tuple((key, *key.partition(".")[::2]) for key in self._shapes)
        for key, shape in self._shapes.items():
            kind, _, projection = key.partition(".")
            if projection and kind not in self._modules:
                self.add_module(kind, _Bank())
            owner = self._modules[kind] if projection else self
            value = torch.empty(shape, dtype=torch.float32)
            if is_trained(spec, key):
                owner.register_parameter(projection or kind, nn.Parameter(value))
            else:
                owner.register_buffer(projection or kind, value)
        self.gain, self._ungained = _apart(spec)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the spec, in place; parameters on the meta device stay empty."""
        params = self.params()
        if any(param.is_meta for param in params.values()):
            return
        with torch.no_grad():
            for key, value in init_params(self.spec, self.layer, self.seed, self.name).items():
                params[key].copy_(torch.from_numpy(value))

    def randomize(self) -> None:
        """Draw what starts at zero from torch's generator, so that delta is not zero; for tests."""
        with torch.no_grad():
            for key, param in self.params().items():
                if key.startswith("b_out."):
                    param.normal_()
                elif key.startswith("b."):
                    param.normal_(std=0.25)

    def await_values(self, *, needed: bool) -> None:
        """The parameters are those of a file that is yet to be read; if `needed`, nothing is computed before."""
        self.awaits, self._needed = set(self.params()), needed
        with torch.no_grad():
            for param in self.params().values() if needed else ():
                param.fill_(torch.nan)

    def params(self) -> dict[str, Tensor]:
        """Canonical name to parameter, in canonical order, a fixed A included."""
        return {
            key: getattr(self._modules[kind], projection) if projection else getattr(self, kind)
            for key, kind, projection in self._keys
        }

    @property
    def at_hand(self) -> bool:
        """Whether the parameters are here, whole, loaded and left alone by hooks, so that any call will do."""
        if self.awaits or any(map(has_hooks, (self, *self._modules.values()))):
            return False
        return all(
            type(param) is nn.Parameter and not param.is_meta and param.shape == self._shapes[key]
            for key, param in self.params().items()
        )

    def registered(self) -> list[Tensor] | None:
        """Parameter objects; None where something else stands in the place of one (a parametrization, a replica)."""
        modules = (self, *self._modules.values())
        found = [value for module in modules for value in (*module._parameters.values(), *module._buffers.values())]
        return found if len(found) == len(self._keys) else None

    def forward(self, projections: Iterable[str] | None = None, *, gained: bool = True) -> dict[str, Factors]:
        """Factors of the named projections, by default of all, in float32 or better whatever autocast or TF32 would do.

        Parameters
        ----------
        projections
            Names.
        gained
            False leaves the constant `gain` out, for callers that scale the product anyway.

        Raises
        ------
        HoraError
            If the parameters are sharded and were not gathered for this call, or await values that were not loaded.
        """
        wanted = tuple(self.layer if projections is None else projections)
        params = {key: getattr(self, key) for key, _, projection in self._keys if not projection}
        for kind, bank in self._modules.items():
            params.update(zip([f"{kind}.{p}" for p in wanted], bank(wanted), strict=True))
        params = self._usable(params)
        if not torch.compiler.is_compiling() and self.awaits:
            self._check_arrived(params)
        spec, param = self.spec if gained else self._ungained, next(iter(params.values()))
        half = torch.autocast(param.device.type, enabled=False) if autocast_enabled(param) else nullcontext()
        with exact_products(), half:
            return factors(spec, self.layer, params, wanted)

    def _usable(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters in 32 bits or more, and none that a hook frees, or somebody changes, after this call."""
        fleeting = has_hooks(self) or not torch.is_grad_enabled()
        for key, param in params.items():
            if type(param) is not nn.Parameter and is_sharded(param):
                raise HoraError(
                    f"the parameters of {self.name!r} are gathered when its factors are generated, {key} is sharded: "
                    "wrap the whole attention block, not its projections, in fully_shard, or unshard() it first"
                )
            if param.dtype in (torch.bfloat16, torch.float16):
                params[key] = param.float()
            elif fleeting:
                params[key] = param.clone()
        return params

    def _check_arrived(self, params: dict[str, Tensor]) -> None:
        missing = [key for key in self.awaits & params.keys() if not torch.isfinite(params[key]).all()]
        if missing:
            raise HoraError(
                f"an adapter that its config describes has its values from a file, {sorted(missing)} of {self.name!r} "
                "were not loaded or are not finite: load the adapter again, or for a new one write a new HoraConfig"
            )
        if self._needed:
            self.awaits -= params.keys()
            return
        self.awaits.clear()
        warnings.warn(
            "the config of this adapter describes one that was saved, of which no values were loaded: it starts anew. "
            "Load them, or write a new HoraConfig",
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        """Spec and shapes."""
        return f"{self.spec}, {self.layer}"


def _apart(spec: AdapterSpec) -> tuple[float, AdapterSpec]:
    """Gain of every delta, and the spec of what it multiplies; a residual must not be multiplied."""
    if spec.residual or not (spec.generates_a or spec.generates_b):
        return 1.0, spec
    gains = spec.gain_a if spec.generates_a else 1.0, spec.gain_b if spec.generates_b else 1.0
    return gains[0] * gains[1], spec.replace(gain=1.0)
