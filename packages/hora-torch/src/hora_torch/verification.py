"""Whether an adapted model does what its plan says, tried on one batch."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hora_spec import HoraError
from torch import Tensor, nn

from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer, tied_weights
from hora_torch.merging import mergeable
from hora_torch.probing import recorded, rows_of_one_head
from hora_torch.targets import CONVOLUTIONS

Verdict = Literal["ok", "wrong", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question about one place."""

    question: str
    place: str
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All answers; print it."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; what could not be told does not count."""
        return not self.of("wrong")

    def of(self, verdict: Verdict) -> list[Finding]:
        """Findings with one verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def require(self) -> None:
        """Raise HoraError if anything is wrong."""
        if not self.ok:
            raise HoraError(f"an adapted model does what its plan says, but it does not:\n{self}")

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for finding in self.findings:
            groups.setdefault((finding.verdict, finding.question, finding.detail), []).append(finding.place)
        lines = []
        for (verdict, question, detail), places in sorted(groups.items(), key=lambda item: _ORDER[item[0][0]]):
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"{verdict:8}{question}: {places[0]}{more}{': ' if detail else ''}{detail}")
        return "\n".join(lines)


_ORDER = {"wrong": 0, "unknown": 1, "ok": 2}


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
    Costs about five passes. While it runs, what is zero in a new adapter is replaced by random values, so that there is
    an update to look at.

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
    with trial.prepared():
        return Report(tuple(trial.findings()))


@dataclass(frozen=True, slots=True)
class _Trial:
    model: nn.Module
    batch: Any
    layers: Mapping[str, HoraLayer]
    active: Mapping[str, list[str]]

    def findings(self) -> Iterator[Finding]:
        called = self._called()
        yield from self._gradients(called)
        yield from self._rows(called)
        yield from self._merging()
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
            for config, use_cache in reversed(caches):
                config.use_cache = use_cache
            with torch.no_grad():
                for param, value, requires_grad in kept:
                    param.copy_(value)
                    param.requires_grad_(requires_grad)

    def _hypernets(self) -> list[HoraHypernet]:
        found = [layer.hypernet(key) for name, layer in self.layers.items() for key in self.active[name]]
        return list(dict.fromkeys(found))

    def _run(self) -> Tensor:
        """All floating outputs in one row."""
        batch = self.batch
        if isinstance(batch, Mapping):
            result = self.model(**batch)
        else:
            result = self.model(*batch) if isinstance(batch, tuple) else self.model(batch)
        tensors = [tensor.flatten().float() for tensor in _floating(result)]
        if not tensors:
            raise HoraError(f"verify needs a model with a floating output, got {type(result).__name__}: wrap the model")
        return torch.cat(tensors)

    def _evaluate(self) -> Tensor:
        with torch.no_grad():
            return self._run()

    def _called(self) -> set[str]:
        called: set[str] = set()
        handles = [
            layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in self.layers.items()
        ]
        try:
            self._evaluate()
        finally:
            for handle in handles:
                handle.remove()
        return called

    def _gradients(self, called: set[str]) -> Iterator[Finding]:
        hypernets = self._hypernets()
        for hypernet in hypernets:
            hypernet.requires_grad_(True)
        params = [(h, key, param) for h in hypernets for key, param in h.params().items()]
        with torch.enable_grad():
            output = self._run()
            direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            leaves = [param for *_, param in params]
            grads = [None] * len(leaves)
            if output.requires_grad:
                grads = torch.autograd.grad((output * direction).sum(), leaves, allow_unused=True)
        dead = {h: [] for h in hypernets}
        for (hypernet, key, _), grad in zip(params, grads, strict=True):
            if grad is None or not bool((grad != 0).any()):
                dead[hypernet].append(key)
        some = any(grad is not None and bool((grad != 0).any()) for grad in grads)
        verdict: Verdict = "unknown" if some or not output.requires_grad else "wrong"
        for name, layer in self.layers.items():
            for key in self.active[name]:
                own = [p for p in dead[layer.hypernet(key)] if p.rpartition(".")[2] in layer.hora_attached[key].sites]
                if name not in called:
                    yield Finding("receives a gradient", name, "unknown", "this batch does not call it")
                elif own:
                    # an input that is zero, or a single key to choose from, gives none rightly
                    yield Finding("receives a gradient", name, verdict, f"none reaches {', '.join(own)} on this batch")
                else:
                    yield Finding("receives a gradient", name, "ok")

    def _rows(self, called: set[str]) -> Iterator[Finding]:
        question = "adapts the rows of its heads"
        attentions: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            for key in self.active[name]:
                for p, site in layer.hora_attached[key].sites.items():
                    if site.projection.num_heads == 1 and p.rpartition("_")[2] not in ("q", "k", "v"):
                        yield Finding(question, name, "ok", "by its one head")
                    elif isinstance(layer.get_base_layer(), CONVOLUTIONS):
                        yield Finding(question, name, "unknown", "the channels of a convolution are not followed")
                    elif site.parameter == "weight" and name in called:
                        attentions.setdefault(name.rpartition(".")[0], {})[p] = name.rpartition(".")[2], site
                    elif site.parameter != "weight":
                        yield Finding(question, name, "ok", "by the shape of nn.MultiheadAttention")
        children = {path: {own for own, _ in found.values()} for path, found in attentions.items()}
        with recorded(self.model, children) as records, torch.enable_grad():
            self._run()
        for path, found in attentions.items():
            sites, names = {p: site for p, (_, site) in found.items()}, {p: own for p, (own, _) in found.items()}
            with torch.enable_grad():
                fault = rows_of_one_head(records[path], sites, names)
            unseen = "its context mixes heads, or is not seen"
            yield Finding(
                question, path, *(("unknown", unseen) if fault is None else ("wrong", fault) if fault else ("ok",))
            )

    def _merging(self) -> Iterator[Finding]:
        adapted, merged = self._evaluate(), None
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            base = self._evaluate()
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False
        try:
            stored = [
                mergeable(layer.get_base_layer(), site.parameter)
                for name, layer in self.layers.items()
                for key in self.active[name]
                for site in layer.hora_attached[key].sites.values()
            ]
            before = [(param, param.detach().clone()) for param in dict.fromkeys(stored)]
            try:
                for layer in self.layers.values():
                    layer.merge()
                merged = self._evaluate()
            finally:
                for layer in self.layers.values():
                    layer.restore_merged([])
        except HoraError as error:
            yield Finding("computes the same merged", "the model", "unknown", str(error))
            return
        effect, off = (adapted - base).norm(), (merged - adapted).norm()
        half = any(param.element_size() < 4 for param, _ in before)
        right = bool(off <= (0.5 if half else 0.05) * effect)
        detail = "" if right else f"merging is off by {float(off / effect):.2g} of the update's effect"
        if not bool(effect > 0):
            right, detail = False, "the adapters change no output"
        yield Finding("computes the same merged", "the model", "ok" if right else "wrong", detail)
        restored = all(torch.equal(param, value) for param, value in before)
        yield Finding("is restored by unmerging", "the model", "ok" if restored else "wrong")


def _floating(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _floating(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _floating(value)


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
