"""Whether an adapted model does what its plan says, tried on one batch."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hora_spec import HoraError, Site
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hora_torch.comparing import Outputs, one_rounding_away
from hora_torch.findings import Finding, Report, Verdict
from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer
from hora_torch.precision import exact_products
from hora_torch.probing import UntoldError, recorded
from hora_torch.rows import rows_of_one_head
from hora_torch.sites import attention_of
from hora_torch.targets import CONVOLUTIONS
from hora_torch.tied import tied_weights
from hora_torch.tracing import Trace, floating, traced

_NO_PART = "no adapted layer takes part in this output"


def verify(model: nn.Module, batch: Any) -> Report:
    """Try the active adapters of a model on one batch, before a long run or after loading.

    Asked are: does every layer receive a gradient; do the planned rows belong to the planned heads (a head of the
    attention depends on the rows of one planned head of q and k, and on one row of v); does the merged model compute
    what the adapted one does; does unmerging restore every bit; does an adapted weight belong to one module alone. The
    model is left as it was.

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which adapters were injected; not merged.
    batch
        What the model takes: a mapping (keyword arguments), a tuple (positional ones), or one tensor. A small one will
        do; layers that it does not reach cannot be judged.

    Returns
    -------
    Report
        ``report.ok`` and ``report.require()``; print it for the details.

    Raises
    ------
    HoraError
        If there is no active adapter, one is merged, or the model returns no floating tensor.

    Notes
    -----
    Costs six or seven passes of the model, one of them backward too, and some twenty derivatives of each attention.
    While it runs, what is zero in a new adapter is replaced by random values, so that there is an update to look at,
    and each pass starts from one seed; generators of random numbers are left as they were. Products of float32 are not
    rounded to TF32 meanwhile, whatever a program asked for.

    Examples
    --------
    >>> import hora_torch, peft, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=1))
    >>> model = peft.get_peft_model(model, hora_torch.HoraConfig(r=2))
    >>> report = hora_torch.verify(model, {"input_ids": torch.arange(6)[None]})
    >>> report.ok
    True
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HoraLayer)}
    if torch.is_inference_mode_enabled() or any(layer.disable_adapters for layer in layers.values()):
        raise HoraError("verify tries adapters that are enabled, outside inference_mode, got neither: call it there")
    if any(param.is_meta for param in model.parameters()):
        raise HoraError("verify tries a model that is in memory, got offloaded parameters: call it before offloading")
    active = {
        name: [key for key in layer.active_adapters if key in layer.hora_attached] for name, layer in layers.items()
    }
    layers = {name: layer for name, layer in layers.items() if active[name]}
    if not layers or any(layer.merged for layer in layers.values()):
        raise HoraError(f"verify tries active adapters that are not merged, got {len(layers)} layers: unmerge first")
    trial = _Trial(model, batch, layers, {name: active[name] for name in layers})
    with exact_products(), trial.prepared():
        return Report(tuple(trial.findings()))


@dataclass(frozen=True, slots=True)
class _Trial:
    model: nn.Module
    batch: Any
    layers: Mapping[str, HoraLayer]
    active: Mapping[str, list[str]]

    def findings(self) -> Iterator[Finding]:
        trace = self._trace()
        yield from self._gradients(trace)
        yield from self._rows(trace)
        yield from self._merging(any(trace.takes_part(name) for name in self.layers))
        tied = tied_weights(self.model)
        for name in self.layers:
            detail = f"shared by {', '.join(tied[name])}: it trains, and cannot be merged" if name in tied else ""
            yield Finding("has a weight of its own", name, "unknown" if detail else "ok", detail)

    @contextmanager
    def prepared(self) -> Generator[None, None, None]:
        """Evaluation mode, no cache, and updates that are not zero; all is put back."""
        modes = [(module, module.training) for module in self.model.modules()]
        kept = [
            (param, param.detach().clone(), param.requires_grad) for h in self._hypernets() for param in h.parameters()
        ]
        configs = [c for m in self.model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")]
        caches = [(config, config.use_cache) for config in configs]
        try:
            self.model.eval()
            for config, _ in caches:
                config.use_cache = False
            for hypernet in self._hypernets():
                _stir(hypernet)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for config, use_cache in caches:
                config.use_cache = use_cache
            with torch.no_grad():
                for param, value, requires_grad in kept:
                    param.copy_(value)
                    param.requires_grad_(requires_grad)

    def _hypernets(self) -> list[HoraHypernet]:
        found = [layer.hypernet(key) for name, layer in self.layers.items() for key in self.active[name]]
        return list(dict.fromkeys(found))

    def _run(self) -> Tensor:
        """All floating outputs in one row, from one seed: some models draw in evaluation, too."""
        batch, devices = self.batch, {param.device for param in self.model.parameters()}
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            torch.manual_seed(0)
            if isinstance(batch, Mapping):
                result = self.model(**batch)
            else:
                result = self.model(*batch) if isinstance(batch, tuple) else self.model(batch)
        tensors = [tensor.flatten().float() for tensor in floating(result)]
        if not tensors:
            raise HoraError(f"verify needs a model with a floating output, got {type(result).__name__}: wrap the model")
        return torch.cat(tensors)

    def _evaluate(self) -> Tensor:
        with torch.no_grad():
            return self._run()

    def _trace(self) -> Trace:
        hypernets = self._hypernets()
        for hypernet in hypernets:
            hypernet.requires_grad_(True)
        return traced(self._run, self.layers, [param for h in hypernets for param in h.params().values()])

    def _gradients(self, trace: Trace) -> Iterator[Finding]:
        """A projection that has an input, on whose output the model's depends, moves its parameters."""
        for name, layer in self.layers.items():
            for key in self.active[name]:
                params, sites = layer.hypernet(key).params(), layer.hora_attached[key].sites
                dead = [p for p, param in params.items() if p.rpartition(".")[2] in sites and not trace.moves(param)]
                wrong = [p for p in dead if trace.takes_part(name, sites[p.rpartition(".")[2]])]
                verdict: Verdict = "wrong" if wrong else "unknown" if dead or not trace.called(name) else "ok"
                detail = f"none reaches {', '.join(wrong or dead)} on this batch" if dead else ""
                detail = detail if trace.called(name) else "this batch does not call it"
                yield Finding("receives a gradient", name, verdict, detail)

    def _rows(self, trace: Trace) -> Iterator[Finding]:
        question = "adapts the rows of its heads"
        attentions: dict[str, dict[str, tuple[str, Site]]] = {}
        for name, layer in self.layers.items():
            for key in self.active[name]:
                for p, site in layer.hora_attached[key].sites.items():
                    if site.projection.num_heads == 1 and p.rpartition("_")[2] not in ("q", "k", "v"):
                        yield Finding(question, name, "ok", "by its one head")
                    elif isinstance(layer.get_base_layer(), CONVOLUTIONS):
                        yield Finding(question, name, "unknown", "the channels of a convolution are not followed")
                    elif site.parameter == "weight" and trace.called(name):
                        attention, own = attention_of(self.model, name)
                        attentions.setdefault(attention, {})[p] = own, site
                    elif site.parameter != "weight":
                        yield Finding(question, name, "ok", "by the shape of nn.MultiheadAttention")
        untold = self._probed(attentions, norms=True)
        again = {path: attentions[path] for path, found in untold.items() if isinstance(found, UntoldError)}
        seen = untold | {path: f for path, f in self._probed(again, norms=False).items() if isinstance(f, str)}
        for path, fault in seen.items():
            verdict: Verdict = "unknown" if isinstance(fault, UntoldError) else "wrong" if fault else "ok"
            yield Finding(question, path, verdict, str(fault))

    def _probed(
        self, attentions: Mapping[str, dict[str, tuple[str, Site]]], *, norms: bool
    ) -> dict[str, str | UntoldError]:
        """What is wrong with each attention, or why nothing is told."""
        if not attentions:
            return {}
        children = {path: {own for own, _ in found.values()} for path, found in attentions.items()}
        probed: dict[str, str | UntoldError] = {}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            with recorded(self.model, children, norms=norms) as records:
                self._run()
            for path, found in attentions.items():
                sites, names = {p: site for p, (_, site) in found.items()}, {p: own for p, (own, _) in found.items()}
                try:
                    probed[path] = rows_of_one_head(records[path], sites, names)
                except UntoldError as why:
                    probed[path] = why
        return probed

    def _of_rounding(self, adapted: Tensor) -> float:
        """How far the output moves when those of the adapted modules move by one rounding each."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.register_forward_hook(one_rounding_away))
            return float((self._evaluate() - adapted).norm())

    def _merging(self, matters: bool) -> Iterator[Finding]:
        adapted, again = self._evaluate(), self._evaluate()
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            base = self._evaluate()
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False
        try:
            places = {
                (layer, site.parameter): layer.stored(site.parameter)
                for name, layer in self.layers.items()
                for key in self.active[name]
                for site in layer.hora_attached[key].sites.values()
            }.values()
            before = [(place, place.bits().clone()) for place in places]
            lost = 0.0
            try:
                for layer in self.layers.values():
                    layer.merge_silently()
                    lost = max([lost, *(rounding.delta for rounding in layer.rounding.values())])
                merged = self._evaluate()
            finally:
                for layer in self.layers.values():
                    layer.restore_merged([])
        except HoraError as error:
            yield Finding("computes the same merged", "the model", "unknown", str(error))
            return
        half = any(bits.element_size() < 4 for _, bits in before)
        restored = all(torch.equal(place.bits(), bits) for place, bits in before)
        compared: tuple[Verdict, str] = ("wrong", "the adapters change no output") if matters else ("unknown", _NO_PART)
        if not torch.equal(base, adapted):
            outputs = Outputs(base, adapted, again, merged, half, restored, lost)
            compared = outputs.compared(lambda: self._of_rounding(adapted))
        yield Finding("computes the same merged", "the model", *compared)
        yield Finding("is restored by unmerging", "the model", "ok" if restored else "wrong")


def _stir(hypernet: HoraHypernet) -> None:
    """Random values for what is zero, so large that the update is a tenth of a usual weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, param in hypernet.params().items():
            if key.startswith(("b.", "b_out.")) and not bool((param != 0).any()):
                param.copy_(torch.randn(param.shape, generator=generator))
        for p, (a, b) in hypernet().items():
            typical = hypernet.spec.scaling * float((b @ a).square().mean().sqrt()) * a.shape[-1] ** 0.5
            for key in (f"b.{p}", f"b_out.{p}"):
                if key in hypernet.params() and typical > 0:
                    hypernet.params()[key].mul_(0.1 / typical)
