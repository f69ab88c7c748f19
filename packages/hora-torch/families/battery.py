"""Everything that is asked of one family; each answer is ``"ok"`` or says what is not."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from family import Family, outputs, usual_targets
from hora_spec import HoraError, Site, layer_from_json
from hora_torch import HoraConfig, HoraLayer, export_lora, plan, verify
from peft import LoraConfig, PeftModel, get_peft_model
from rows import Layers, Question, part, rows_and_heads, summary
from torch import Tensor, nn

OK = "ok"
SETTINGS: dict[str, Any] = {"r": 4, "hidden_dim": 8, "head_embed_dim": 8}


def examine(family: Family) -> dict[str, Any]:
    """All answers for one family, as JSON values."""
    base = family.model()
    with torch.no_grad():
        inputs = family.inputs(base)
        expected = outputs(base, inputs)
    if not bool(torch.isfinite(expected).all()):
        return {"built": "its outputs are not finite"}
    targets = family.targets or usual_targets(base)
    lora = {"lora": _answer(lambda: _lora(base, None)), "lora_named": _answer(lambda: _lora(base, targets))}
    answers = {"built": OK, "model": type(base).__name__, **lora}
    trials: list[Trial] = []
    answers["named"] = "none"
    asked: dict[str, Mapping[str, Any]] = {"told": family.told} if family.told else {}
    asked |= {"default": {}, "named": {"target_modules": list(targets)}} if targets else {"default": {}}
    for key, settings in asked.items():
        answers[key], layers, model = _inject(base, settings)
        if layers:
            question = Question(family, base, inputs, layers)
            answers |= {
                f"{key}_adapts": summary(layers),
                f"{key}_rows": _answer(lambda question=question: rows_and_heads(question)),
            }
        if model is not None:
            trials.append(Trial(family, base, inputs, expected, settings, layers, model))
        elif answers[key].startswith("error") and answers["lora_named"].startswith("error"):
            answers[key] = f"refused: PEFT fails itself, {answers[key].removeprefix('error: ')}"
    if trials and trials[0].settings:
        answers["line"] = line(trials[0].settings)
    if answers["default"] == OK and (left_out := plan(base, HoraConfig(**SETTINGS)).left_out):
        answers["left_out"] = {"modules": len(left_out), "why": next(iter(left_out.values()))[:300]}
    return answers | {name: _answer(lambda check=check: check(trials[0])) for name, check in CHECKS.items() if trials}


def line(settings: Mapping[str, Any]) -> str:
    """The config with these arguments as a user writes it."""
    return f"HoraConfig({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def _answer(check: Callable[[], str | None]) -> str:
    try:
        return check() or OK
    except HoraError as error:
        return f"refused: {error}"[:400]
    except Exception as error:  # of whatever library: it becomes a cell of the table
        return f"error: {_describe(error)}"


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _lora(base: nn.Module, targets: tuple[str, ...] | None) -> str:
    if targets is not None and not targets:
        return "none"
    try:
        get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=None if targets is None else list(targets)))
    except (ValueError, KeyError):  # the latter where a config has no model_type
        return "refused"
    return OK


def _inject(base: nn.Module, settings: Mapping[str, Any]) -> tuple[str, Layers, PeftModel | None]:
    """An answer, the planned sites and the adapted model, as far as it comes."""
    layers: Layers = {}
    try:
        config = HoraConfig(**SETTINGS, **settings, init_weights=False)
        layers = {layer.name: layer.sites for layer in plan(base, config).layers}
        model = get_peft_model(copy.deepcopy(base), config).eval()
        recorded = {name: sites for name, _, sites in map(layer_from_json, model.peft_config["default"].hora_layers)}
        return OK if recorded == layers else "WRONG: injection is not what was planned", layers, model
    except HoraError as error:
        return f"refused: {error}"[:400], layers, None
    except Exception as error:  # told apart from PEFT's own failures by LoraConfig beside it
        return f"error: {_describe(error)}", layers, None


@dataclass
class Trial:
    """A family with its adapter, made anew for each check."""

    family: Family
    base: nn.Module
    inputs: Mapping[str, Any]
    expected: Tensor
    settings: Mapping[str, Any]
    layers: Layers
    _model: PeftModel = field(repr=False)

    @property
    def config(self) -> HoraConfig:
        """The config after injection."""
        return self._model.peft_config["default"]

    def model(self) -> PeftModel:
        """An adapted model with factors that are not zero, in evaluation mode."""
        return copy.deepcopy(self._model)

    def fresh(self) -> nn.Module:
        """The base model."""
        return copy.deepcopy(self.base)

    def run(self, model: nn.Module) -> Tensor:
        """Outputs without gradients."""
        with torch.no_grad():
            return outputs(model, self.inputs)

    @cached_property
    def adapted(self) -> Tensor:
        """Outputs of the adapted model."""
        return self.run(self._model)

    def sites(self) -> Iterator[tuple[str, str, Site]]:
        """Layer, projection and site of all projections."""
        for layer, sites in self.layers.items():
            for projection, site in sites.items():
                yield layer, projection, site

    def differs(self, found: Tensor, expected: Tensor) -> str | None:
        """Nothing where two outputs agree up to a thousandth of what the adapter changes, else what is wrong."""
        error, change = _distance(found, expected), _distance(self.adapted, self.expected)
        bound = 1e-3 * change + 1e-5 * float(expected.abs().max())
        if error <= bound:
            return None
        return "WRONG: as if there were no adapter" if error > 0.9 * change else f"WRONG: off by {error / change:.1%}"


def _start(trial: Trial) -> str | None:
    model = get_peft_model(trial.fresh(), HoraConfig(**SETTINGS, **trial.settings)).eval()
    return None if _distance(trial.run(model), trial.expected) == 0 else trial.differs(trial.run(model), trial.expected)


def _gradients(trial: Trial) -> str | None:
    model = trial.model()
    _backward(model, trial.inputs)
    stray = [name for name, param in model.named_parameters() if param.grad is not None and ".hora_hyper." not in name]
    if stray:
        return f"WRONG: {stray[0]} has a gradient"
    still = {
        module.hora_hyper[name].name
        for module in model.modules()
        if isinstance(module, HoraLayer)
        for name in module.hora_hyper
        if not any(_moves(param) for param in module.hora_hyper[name].parameters())
    }
    idle = still - _used(trial)
    if still - idle:
        unlike = not _lora_trains(trial)
        return "unseen: nor does PEFT's LoRA train here" if unlike else f"WRONG: {min(still - idle)} trains nothing"
    if uncalled := _uncalled(trial):
        return f"WRONG: {uncalled[0]} is adapted, and its attention does not use it"
    return f"unseen: {len(idle)} of {len(trial.layers)} layers take no part in this output" if idle else None


def _uncalled(trial: Trial) -> list[str]:
    """Adapted modules that are not called, beside others of their layer that are, and whose weights do not matter."""
    base, called = trial.fresh(), set()
    sites = {site.module: layer for layer, _, site in trial.sites()}
    for name in sites:
        base.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    _backward(base, trial.inputs)
    active = {sites[name] for name in called}
    silent = [name for name, layer in sites.items() if layer in active and name not in called]
    return [name for name in silent if not any(map(_moves, base.get_submodule(name).parameters()))]


def _used(trial: Trial) -> set[str]:
    """Layers whose weights matter to the output of the base model."""
    base = trial.fresh()
    _backward(base, trial.inputs)
    return {layer for layer, _, site in trial.sites() if _moves(base.get_parameter(f"{site.module}.{site.parameter}"))}


def _backward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """In evaluation, which is the same at every call, or else in training: some models have no gradients before."""
    for mode in (False, True):
        with suppress(AssertionError):  # of Reformer
            found = outputs(model.train(mode), inputs)
            if found.requires_grad:
                found.square().mean().backward()
                return


def _moves(param: nn.Parameter) -> bool:
    return param.grad is not None and bool(param.grad.abs().sum() > 0)


def _changes(trial: Trial) -> str | None:
    with trial._model.disable_adapter():
        without = trial.run(trial._model)
    tiny = 1e-5 * float(trial.expected.abs().max())
    if _distance(trial.adapted, trial.expected) <= tiny:
        return "WRONG: no effect on the output" if _used(trial) else "unseen: no layer takes part in this output"
    return "WRONG: the adapter cannot be disabled" if _distance(without, trial.expected) > tiny else None


def _merged(trial: Trial) -> str | None:
    model = trial.model()
    before = _weights(model)
    model.merge_adapter(safe_merge=True)
    wrong = trial.differs(trial.run(model), trial.adapted) or _other_rows(trial, before, _weights(model))
    return wrong or trial.differs(trial.run(trial.model().merge_and_unload()), trial.adapted)


def _other_rows(trial: Trial, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str | None:
    expected: dict[str, set[int]] = {}
    for _, name, site in trial.sites():
        expected.setdefault(f"{site.module}.{site.parameter}", set()).update(part(name, site).rows)
    transposed = {f"{s.module}.{s.parameter}" for _, _, s in trial.sites() if s.layout.pattern.startswith("d")}
    shared = {before[name].data_ptr() for name in expected if name in before}
    for name, old in before.items():
        changed = (after[name] != old).any(0 if name in transposed else tuple(range(1, old.ndim))).nonzero().flatten()
        if set(changed.tolist()) != expected.get(name, set()) and (name in expected or old.data_ptr() not in shared):
            return f"WRONG: merging changes other rows of {name}"
    return None


def _weights(model: PeftModel) -> dict[str, Tensor]:
    """Weights of the base model by their names in it."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): param.detach().clone()
        for name, param in model.named_parameters()
        if ".hora_hyper." not in name
    }


def _unmerged(trial: Trial) -> str | None:
    model = trial.model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
    return f"WRONG: {changed[0]} is not as it was" if changed else trial.differs(trial.run(model), trial.adapted)


def _loaded(trial: Trial) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        trial.model().save_pretrained(folder)
        loaded = PeftModel.from_pretrained(trial.fresh(), folder).eval()
    return trial.differs(trial.run(loaded), trial.adapted)


def _exported(trial: Trial) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        export_lora(trial.model(), Path(folder) / "lora")
        try:
            loaded = PeftModel.from_pretrained(trial.fresh(), str(Path(folder) / "lora")).eval()
        except ValueError:
            if _lora(trial.base, tuple(site.module for _, _, site in trial.sites())) == OK:
                raise
            return "unseen: PEFT's own LoRA refuses these modules"
    wrong = trial.differs(_without_fast_path(trial, loaded), _without_fast_path(trial, trial.model()))
    return "unseen: PEFT's own LoRA does not act here" if wrong and not _lora_acts(trial) else wrong


def _lora_acts(trial: Trial) -> bool:
    """Whether LoRA on the same modules changes the outputs, and does so again when it is loaded."""
    torch.manual_seed(0)
    lora = _random_lora(trial)
    adapted = _without_fast_path(trial, lora)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_pretrained(folder)
        torch.manual_seed(1)  # values that are not loaded are others
        loaded = _without_fast_path(trial, PeftModel.from_pretrained(trial.fresh(), folder).eval())
    effect = _distance(adapted, trial.expected)
    return effect > 1e-5 * float(trial.expected.abs().max()) and _distance(loaded, adapted) < 1e-3 * effect


def _random_lora(trial: Trial) -> PeftModel:
    modules = list(dict.fromkeys(site.module for _, _, site in trial.sites()))
    return get_peft_model(trial.fresh(), LoraConfig(r=4, target_modules=modules, init_lora_weights=False)).eval()


def _lora_trains(trial: Trial) -> bool:
    lora = _random_lora(trial)
    _backward(lora, trial.inputs)
    return any(_moves(param) for param in lora.parameters())


def _without_fast_path(trial: Trial, model: nn.Module) -> Tensor:
    """PEFT's wrapper of ``nn.MultiheadAttention`` lacks what torch's fast path reads."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return trial.run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _verified(trial: Trial) -> str | None:
    """What a user would ask; `hora_torch.verify` should find nothing wrong that is right."""
    report = verify(trial.model(), trial.inputs)
    if wrong := report.of("wrong"):
        return f"alarm: {wrong[0].place}, {wrong[0].question}: {wrong[0].detail}"
    untold = [finding for finding in report.of("unknown") if finding.question == "adapts the rows of its heads"]
    return f"unseen: verify: {untold[0].detail}" if untold else None


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


CHECKS: dict[str, Callable[[Trial], str | None]] = {
    "start": _start,
    "gradients": _gradients,
    "effect": _changes,
    "merged": _merged,
    "unmerged": _unmerged,
    "loaded": _loaded,
    "exported": _exported,
    "verified": _verified,
}
