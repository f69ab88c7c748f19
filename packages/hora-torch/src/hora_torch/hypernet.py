"""The hypernetwork of one layer: the module that owns its parameters and returns factors."""

import warnings
from collections.abc import Iterable

import torch
from hora_spec import AdapterSpec, Factors, HoraError, LayerShape, init_params, param_shapes
from torch import Tensor, nn

from hora_torch.functional import factors
from hora_torch.linear import autocast_enabled, has_hooks
from hora_torch.sharding import is_sharded


class _Bank(nn.Module):
    """Parameters of one kind, one per projection, handed out by being called: ``b_out.q``, ``b_out.v``."""

    def forward(self, projection: str) -> Tensor:
        return owned(self, getattr(self, projection))


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
    file. Each belongs to a module that is called whenever factors are generated, this one or one of its banks:
    whatever moves, gathers or casts the parameters of a called module then works. Nothing is kept between calls.
    """

    def __init__(self, spec: AdapterSpec, layer: LayerShape, *, name: str, seed: int = 0) -> None:
        super().__init__()
        self.spec, self.layer, self.name, self.seed = spec, layer, name, seed
        self.awaits: set[str] = set()
        self._keys = tuple(key.partition(".")[::2] for key in param_shapes(spec, layer))
        for key, shape in param_shapes(spec, layer).items():
            kind, _, projection = key.partition(".")
            if projection and kind not in self._modules:
                self.add_module(kind, _Bank())
            owner = self._modules[kind] if projection else self
            owner.register_parameter(projection or kind, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
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
            for param in self.parameters() if needed else ():
                param.fill_(torch.nan)

    def params(self) -> dict[str, Tensor]:
        """Canonical name to parameter, in canonical order."""
        return {
            f"{kind}.{p}" if p else kind: getattr(getattr(self, kind), p) if p else getattr(self, kind)
            for kind, p in self._keys
        }

    def forward(self, projections: Iterable[str] | None = None) -> dict[str, Factors]:
        """Factors of the named projections, by default of all, at least float32 whatever the autocast state.

        Raises
        ------
        HoraError
            If the parameters are sharded and were not gathered for this call, or await values that were not loaded.
        """
        wanted = tuple(self.layer if projections is None else projections)
        params = {}
        for kind, projection in self._keys:
            if not projection:
                params[kind] = self._usable(kind, getattr(self, kind))
            elif projection in wanted:
                key = f"{kind}.{projection}"
                params[key] = self._usable(key, self._modules[kind](projection))
        if not torch.compiler.is_compiling() and self.awaits:
            self._check_arrived(params)
        param = next(iter(params.values()))
        if autocast_enabled(param):
            with torch.autocast(param.device.type, enabled=False):
                return factors(self.spec, self.layer, params, wanted)
        return factors(self.spec, self.layer, params, wanted)

    def _usable(self, key: str, param: Tensor) -> Tensor:
        """The parameter in 32 bits or more, and not a tensor that a hook frees as soon as this call ends."""
        if is_sharded(param):
            raise HoraError(
                f"the parameters of {self.name!r} are gathered when its factors are generated, {key} is sharded: wrap "
                "the whole attention block, not its projections, in fully_shard, or unshard() it first"
            )
        if param.dtype in (torch.bfloat16, torch.float16):
            return param.float()
        return owned(self, param)

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


def owned(module: nn.Module, param: Tensor) -> Tensor:
    """The parameter, or a copy where it may be freed or changed while its value is in use: by a hook, or by time."""
    return param.clone() if has_hooks(module) or not torch.is_grad_enabled() else param
