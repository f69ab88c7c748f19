"""What cannot be written as GGUF for a base is refused, by name, with nothing written."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantised
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    Layout,
    ProjectionShape,
    Site,
    export_gguf,
    verify_export,
)
from hora_spec import param_shapes as shapes_of

from .adapted import adapted, saved
from .tiny import ARCHITECTURES, language_model, rewritten, write_gguf

BLOCK = "model.layers.{}.self_attn"


def adapter_of(*, heads=4, kv_heads=2, embed=64, block=BLOCK, layers=2, modules=None):
    made, draw = {}, np.random.default_rng(0)
    for i in range(layers):
        q, v = ProjectionShape(heads, 64 // heads, embed), ProjectionShape(kv_heads, 32 // kv_heads, embed)
        sites = {
            "q": Site(f"{block.format(i)}.q_proj", "weight", (64, embed), Layout(), q),
            "v": Site(f"{block.format(i)}.v_proj", "weight", (32, embed), Layout(), v),
        }
        layer = AdapterLayer(AdapterSpec(2), sites, {})
        params = {key: np.float32(draw.normal(size=s)) for key, s in shapes_of(layer.spec, layer.shape).items()}
        made[f"layer.{i}"] = AdapterLayer(layer.spec, sites, params)
    return Adapter(made, modules=modules or {})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("base") / "base.gguf", language_model())


UINT = gguf.GGUFValueType.UINT32
STRING = gguf.GGUFValueType.STRING
BASES = {
    "another architecture": (
        {"fields": {"general.architecture": "qwen2moe"}},
        "was tested, got 'qwen2moe'",
    ),
    "an adapter": ({"fields": {"general.type": ("adapter", STRING)}}, "the base is a model, got the adapter"),
    "one part of many": ({"fields": {"split.count": (3, UINT)}}, "got one of 3: join them"),
    "no head count": (
        {"fields": {"llama.attention.head_count": None}},
        "head_count, which is absent",
    ),
    "another head count": ({"fields": {"llama.attention.head_count": 8}}, "got 4 heads in the adapter and 8 in"),
    "a tensor less": (
        {"dropped": ["blk.1.attn_v.weight"]},
        r"got none for .*v_proj \(blk.1.attn_v",
    ),
}


@pytest.mark.parametrize("what", BASES)
def test_f9_a_base_that_does_not_fit_is_refused(what, base, tmp_path):
    changes, match = BASES[what]
    other = rewritten(base, tmp_path / "other.gguf", **changes)
    with pytest.raises(HoraError, match=match):
        export_gguf(adapter_of(), tmp_path / "out.gguf", base=other)
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


ADAPTERS = {
    "another width": ({"embed": 32}, r"has shape \(64, 64\).*got \(64, 32\)"),
    "another head count": ({"heads": 8}, "got 8 heads in the adapter and 4 in"),
    "another model": ({"block": "encoder.stages.{}.attn"}, "no name known"),
    "more layers": ({"layers": 3}, "got none for model.layers.2"),
    "a module trained whole": ({"modules": {"lm_head.weight": np.ones((64, 64), np.float32)}}, "nothing but LoRA"),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_f9_an_adapter_that_does_not_fit_is_refused(what, base, tmp_path):
    given, match = ADAPTERS[what]
    with pytest.raises(HoraError, match=match):
        export_gguf(adapter_of(**given), tmp_path / "out.gguf", base=base)
    assert list(tmp_path.iterdir()) == []


def test_f9_what_is_no_gguf_file_is_refused(base, tmp_path):
    (tmp_path / "text").write_text("text")
    (tmp_path / "cut").write_bytes(base.read_bytes()[:2000])
    for name in ("text", "cut", "absent"):
        with pytest.raises(HoraError, match=r"a GGUF file can be read|must be a whole GGUF file"):
            export_gguf(adapter_of(), tmp_path / "out.gguf", base=tmp_path / name)


def test_f9_nothing_is_overwritten(base, tmp_path):
    export_gguf(adapter_of(), tmp_path / "out.gguf", base=base)
    written = (tmp_path / "out.gguf").read_bytes()
    with pytest.raises(HoraError, match="nothing is overwritten silently"):
        export_gguf(adapter_of(layers=1), tmp_path / "out.gguf", base=base)
    assert (tmp_path / "out.gguf").read_bytes() == written
    assert len(list(tmp_path.iterdir())) == 1


def test_f9_other_dtypes_are_refused_and_small_ones_are_written(base, tmp_path):
    with pytest.raises(HoraError, match="float16 or float32, got float64"):
        export_gguf(adapter_of(), tmp_path / "out.gguf", base=base, dtype=np.float64)
    names = export_gguf(adapter_of(), tmp_path / "out.gguf", base=base, dtype=np.float16)
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert {tensor.tensor_type.name for tensor in tensors} == {"F16"}
    assert {tensor.name for tensor in tensors} == {f"{name}.lora_{factor}" for name in names for factor in "ab"}


@pytest.mark.parametrize("kind", [None, Quantised.F16, Quantised.BF16, Quantised.Q8_0, Quantised.Q4_0])
def test_f9_weights_prove_what_a_base_is_whatever_its_quantisation(kind, base, tmp_path):
    file = rewritten(base, tmp_path / "base.gguf", quantised=kind)
    language_model().save_pretrained(tmp_path / "right")
    language_model(seed=1).save_pretrained(tmp_path / "wrong")
    export_gguf(adapter_of(), tmp_path / "out.gguf", base=file, weights=tmp_path / "right")
    with pytest.raises(HoraError, match="the file is of another model"):
        export_gguf(adapter_of(), tmp_path / "other.gguf", base=file, weights=tmp_path / "wrong")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_f10_a_gguf_export_is_its_adapter_and_no_other(arch, dtype, tmp_path):
    base = write_gguf(tmp_path / "base.gguf", language_model(arch))
    adapters = [saved(adapted(language_model(arch), arch, "full", seed=i), tmp_path / f"{i}") for i in range(2)]
    export_gguf(adapters[0], tmp_path / "out.gguf", base=base, dtype=dtype)
    assert max(verify_export(adapters[0], tmp_path / "out.gguf").values()) < 2 * np.finfo(dtype).eps
    with pytest.raises(HoraError, match="got a distance of"):
        verify_export(adapters[1], tmp_path / "out.gguf")


def test_f10_a_base_is_no_adapter(base):
    with pytest.raises(HoraError, match="of the types adapter and lora, got"):
        verify_export(adapter_of(), base)


def test_f10_a_gguf_adapter_of_other_modules_is_seen(base, tmp_path):
    export_gguf(adapter_of(layers=1), tmp_path / "out.gguf", base=base)
    with pytest.raises(HoraError, match="difference in"):
        verify_export(adapter_of(layers=2), tmp_path / "out.gguf")


def test_f9_the_same_adapter_gives_the_same_file(base, tmp_path):
    adapter = saved(adapted(language_model(), "llama", "full"), tmp_path / "hora")
    for name in ("one", "two"):
        export_gguf(adapter, tmp_path / name, base=base)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
