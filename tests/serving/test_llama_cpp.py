"""llama.cpp computes what was trained: the base, adapters as GGUF files chosen by each request, merged models."""

from functools import partial

import pytest
import transformers
from gguf import GGMLQuantizationType
from hora_spec import HoraError, export_gguf, gguf_adapter, save_merged

from .adapted import FELT, adapted, distance, log_probs, saved
from .llama_cpp import LlamaCpp
from .tiny import ARCHITECTURES, language_model, rewritten, write_gguf

BOUND = 1e-3
"""By how much an adapted model may be further from transformers than its base is."""

SHARINGS = ("full", "a", "b", "none")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By architecture: the GGUF file, the directory, and how far llama.cpp is from transformers on it."""
    made = {}

    def get(arch):
        if arch not in made:
            folder, model = tmp_path_factory.mktemp(arch), language_model(arch)
            model.save_pretrained(folder / "base")
            file = write_gguf(folder / "base.gguf", model)
            made[arch] = file, folder / "base", distance(LlamaCpp(file).log_probs, partial(log_probs, model))
        return made[arch]

    return get


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_base_is_computed_alike(arch, bases):
    assert bases(arch)[2] < BOUND


def test_every_architecture_that_is_written_is_tried():
    assert set(gguf_adapter.ARCHITECTURES) == set(ARCHITECTURES)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_f9_an_adapter_as_gguf_is_computed_alike(arch, sharing, bases, tmp_path):
    file, base, floor = bases(arch)
    plain = partial(log_probs, language_model(arch))
    model = adapted(language_model(arch), arch, sharing)
    export_gguf(saved(model, tmp_path / "hora"), tmp_path / "hora.gguf", base=file, weights=base)
    served = partial(LlamaCpp(file, [tmp_path / "hora.gguf"]).log_probs, scales={0: 1.0})
    assert distance(plain, partial(log_probs, model)) > FELT
    assert distance(served, partial(log_probs, model)) < floor + BOUND


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0])
def test_f9_an_adapter_on_a_base_of_fewer_bits_is_as_near_as_that_is(kind, bases, tmp_path, monkeypatch):
    file, base, _ = bases("llama")
    file = rewritten(file, tmp_path / "base.gguf", quantised=kind)
    floor = distance(LlamaCpp(file).log_probs, partial(log_probs, language_model()))
    model = adapted(language_model(), "llama", "full")
    adapter = saved(model, tmp_path / "hora")
    export_gguf(adapter, tmp_path / "hora.gguf", base=file, weights=base)
    monkeypatch.setattr(gguf_adapter, "_ROTARY", {})
    export_gguf(adapter, tmp_path / "wrong.gguf", base=file)
    server = LlamaCpp(file, [tmp_path / "hora.gguf", tmp_path / "wrong.gguf"])
    assert distance(partial(server.log_probs, scales={0: 1.0}), partial(log_probs, model)) < 3 * floor
    assert distance(partial(server.log_probs, scales={1: 1.0}), partial(log_probs, model)) > 20 * floor


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2"])
def test_m4_a_merged_checkpoint_is_computed_alike(arch, sharing, bases, tmp_path):
    _, base, floor = bases(arch)
    model = adapted(language_model(arch), arch, sharing)
    save_merged(saved(model, tmp_path / "hora"), base, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert distance(partial(log_probs, merged), partial(log_probs, model)) < 1e-5
    served = LlamaCpp(write_gguf(tmp_path / "merged.gguf", merged)).log_probs
    assert distance(served, partial(log_probs, model)) < floor + BOUND


def test_f9_each_request_chooses_its_adapter(bases, tmp_path):
    file, _, floor = bases("llama")
    models = {None: language_model()}
    for number, sharing in enumerate(("full", "none")):
        models[number] = adapted(language_model(), "llama", sharing, seed=number)
        export_gguf(saved(models[number], tmp_path / f"{number}"), tmp_path / f"{number}.gguf", base=file)
    server = LlamaCpp(file, [tmp_path / "0.gguf", tmp_path / "1.gguf"])
    for number in (None, 0, 1, 0, None, 1):
        scales = {0: float(number == 0), 1: float(number == 1)}
        assert distance(partial(server.log_probs, scales=scales), partial(log_probs, models[number])) < floor + BOUND


@pytest.mark.parametrize("sharing", SHARINGS)
def test_f9_meta_without_the_order_of_rotary_rows_the_tests_fail(sharing, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_adapter, "_ROTARY", {})
    file, base, floor = bases("llama")
    model = adapted(language_model(), "llama", sharing)
    adapter = saved(model, tmp_path / "hora")
    export_gguf(adapter, tmp_path / "hora.gguf", base=file)
    served = partial(LlamaCpp(file, [tmp_path / "hora.gguf"]).log_probs, scales={0: 1.0})
    assert distance(served, partial(log_probs, model)) > 20 * (floor + BOUND)
    with pytest.raises(HoraError, match="converted in another order of rows"):
        export_gguf(adapter, tmp_path / "other.gguf", base=file, weights=base)


def test_f9_meta_with_a_rank_and_alpha_per_module_the_tests_fail(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_adapter, "portable", dict)
    monkeypatch.setattr(gguf_adapter, "check_server", lambda *args: None)
    file, _, floor = bases("llama")
    model = adapted(language_model(), "llama", "none")
    export_gguf(saved(model, tmp_path / "hora"), tmp_path / "hora.gguf", base=file)
    served = partial(LlamaCpp(file, [tmp_path / "hora.gguf"]).log_probs, scales={0: 1.0})
    assert distance(served, partial(log_probs, model)) > 20 * (floor + BOUND)
