"""The hypernetwork of one layer: the module that owns its parameters and returns factors."""

from typing import Any

import torch
from hora_spec import AdapterSpec, Factors, LayerShape, init_params, param_shapes
from torch import Tensor, nn

from hora_torch.functional import factor_a, factor_b
from hora_torch.linear import autocast_enabled


class _Bank(nn.Module):
    """Parameters of one kind, one per projection: ``a_out.q``, ``a_out.v``."""


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
    Parameters carry the canonical names of `hora_spec.param_shapes`, float32. Every parameter is used inside
    ``forward``, where sharding hooks gather it. Without gradients, in evaluation, factors are generated once and kept
    until a parameter changes.
    """

    def __init__(self, spec: AdapterSpec, layer: LayerShape, *, name: str, seed: int = 0) -> None:
        super().__init__()
        self.spec, self.layer, self.name, self.seed = spec, layer, name, seed
        self._kept: dict[str, tuple[Any, Factors]] = {}
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

    def params(self) -> dict[str, Tensor]:
        """Canonical name to parameter, in canonical order."""
        own, modules = self._parameters, self._modules
        return {
            f"{kind}.{p}" if p else kind: modules[kind]._parameters[p] if p else own[kind] for kind, p in self._keys
        }

    def forward(self, projection: str) -> Factors:
        """Factors of one projection, at least float32 whatever the autocast state."""
        params = self.params()
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return self._generate(projection, params)
        state = tuple((param.data_ptr(), param.dtype, _version(param)) for param in params.values())
        kept = self._kept.get(projection)
        if kept is None or kept[0] != state:
            kept = self._kept[projection] = (state, self._generate(projection, params))
        return kept[1]

    def _generate(self, projection: str, params: dict[str, Tensor]) -> Factors:
        params = {
            key: param.float() if param.dtype in (torch.bfloat16, torch.float16) else param
            for key, param in params.items()
            if "." not in key or key.endswith(f".{projection}")
        }
        param = next(iter(params.values()))
        if autocast_enabled(param):
            with torch.autocast(param.device.type, enabled=False):
                return self._factors(projection, params)
        return self._factors(projection, params)

    def _factors(self, projection: str, params: dict[str, Tensor]) -> Factors:
        return Factors(factor_a(self.spec, params, projection), factor_b(self.spec, self.layer, params, projection))

    def extra_repr(self) -> str:
        """Spec and shapes."""
        return f"{self.spec}, {self.layer}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}


def _version(param: Tensor) -> Any:
    """What tells that a parameter was written to; inference tensors do not count writes, so nothing is kept."""
    return object() if param.is_inference() else param._version
