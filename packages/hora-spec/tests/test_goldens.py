"""Stored cases are complete, small, typed, and what the reference computes today."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hora_spec import ACTIVATIONS, AdapterSpec, HoraError, Layout, load_goldens, param_shapes
from hora_spec.goldens import VERSION, build
from hora_spec.goldens.__main__ import main
from hora_spec.goldens.stored import load_stored_goldens
from hora_spec.testing import REFERENCE, REGIMES, VECTORIZED, check_golden, check_stored

GOLDENS, STORED = load_goldens(), load_stored_goldens()
EACH = pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)

CASE_BYTES = 16_000
ALL_BYTES = 1_000_000


def heads(golden):
    return {shape.num_heads for shape in golden.layer.values()}


def several(golden, name):
    return len({getattr(shape, name) for shape in golden.layer.values()}) > 1


COVERAGE = {
    "residual": lambda g: g.spec.residual,
    "a gate": lambda g: g.spec.gate not in (None, 1) and g.spec.gain == "transfer",
    "a gate of one": lambda g: g.spec.gate == 1 and g.spec.gain == "transfer",
    "a gate without a gain": lambda g: g.spec.gate is not None and g.spec.gain != "transfer",
    "one A for all projections": lambda g: g.spec.tie_a and g.spec.trains_a,
    "one fixed A for all projections": lambda g: g.spec.tie_a and not g.spec.trains_a,
    "no residual": lambda g: g.spec.generates_b and not g.spec.residual,
    "residual beside a generated A": lambda g: g.spec.residual and g.spec.generates_a,
    "equal heads": lambda g: heads(g) == {g.layer.num_heads} and g.layer.num_heads > 1,
    "one head": lambda g: g.layer.num_heads == 1,
    "2:1 grouped queries": lambda g: heads(g) == {4, 2},
    "3:1 grouped queries": lambda g: heads(g) == {6, 2},
    "multi-query": lambda g: min(heads(g)) == 1 < g.layer.num_heads,
    "q, k and v": lambda g: set(g.layer) == {"q", "k", "v"},
    "several head_dim": lambda g: several(g, "head_dim"),
    "several embed": lambda g: several(g, "embed_dim"),
    "hidden < rank": lambda g: g.spec.hidden_dim < g.spec.rank and (g.spec.generates_a or g.spec.generates_b),
    "rank = head_dim": lambda g: any(shape.head_dim == g.spec.rank for shape in g.layer.values()),
    "a square delta": lambda g: any(len(set(shape.weight_shape)) == 1 for shape in g.layer.values()),
    "no normalisation": lambda g: g.spec.generates_b and not g.spec.normalize,
    "scaling": lambda g: g.spec.scaling != 1,
    "no scaling": lambda g: g.spec.scaling == 1,
    "a bias": lambda g: any(bias is not None for bias in g.bias.values()),
    "no bias": lambda g: any(bias is None for bias in g.bias.values()),
}
COVERAGE |= {f"regime {name}": lambda g, name=name: g.regime == name for name in REGIMES}


@pytest.mark.parametrize("what", COVERAGE)
def test_the_corpus_covers(what):
    assert any(COVERAGE[what](golden) for golden in GOLDENS.values())


def test_every_valid_method_is_covered():
    present = {(g.spec.sharing, g.spec.a_source, g.spec.activation, g.spec.gain) for g in GOLDENS.values()}
    valid = set()
    fixed = product(("full", "a", "b", "none"), ("fixed",), ("leaky_relu",), ("transfer",))
    trained = product(("full", "a", "b", "none"), ("direct", "hypernetwork"), ACTIVATIONS, ("transfer", 1.0))
    for method in (*fixed, *trained):
        try:
            AdapterSpec(**dict(zip(("sharing", "a_source", "activation", "gain"), method, strict=True)))
        except HoraError:
            continue
        valid.add(method)
    assert valid <= present
    assert len(GOLDENS) >= 40


def test_the_corpus_is_small():
    sizes = [len(build.serialized(golden)) for golden in GOLDENS.values()]
    assert max(sizes) <= CASE_BYTES
    assert sum(sizes) <= ALL_BYTES


@EACH
def test_a_golden_is_reproduced(golden):
    _, ratio = build.verify(golden)
    assert ratio <= 1


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_g4_d2_d3_m1_g7_an_honest_backend_matches(golden, dtype):
    assert 0 < check_golden(VECTORIZED, golden, dtype) <= 1


@EACH
def test_s6_arrays_have_their_shapes_and_dtypes(golden):
    shapes = param_shapes(golden.spec, golden.layer)
    for arrays, dtype in ((golden.params, np.float32), (golden.grads, np.float64)):
        assert {key: value.shape for key, value in arrays.items()} == shapes
        assert {value.dtype for value in arrays.values()} == {np.dtype(dtype)}
    for p, shape in golden.layer.items():
        assert golden.delta[p].shape == golden.merged[p].shape == golden.weight[p].shape == shape.weight_shape
        assert golden.delta[p].dtype == golden.y[p].dtype == np.float64
        assert golden.merged[p].dtype == golden.x[p].dtype == np.float32
        assert golden.factors[p].b.shape == (shape.num_heads, shape.head_dim, golden.spec.rank)


def test_names_and_representation():
    for name, golden in GOLDENS.items():
        assert golden.name == name
        assert repr(golden) == f"load_goldens()[{name!r}]"


def test_a_failure_names_the_golden():
    golden = next(iter(GOLDENS.values()))
    wrong = REFERENCE._replace(delta=lambda *args: {p: -d for p, d in REFERENCE.delta(*args).items()})
    with pytest.raises(AssertionError, match=r"replay: check_golden\(backend, load_goldens\(\)\["):
        check_golden(wrong, golden)


def test_a_changed_output_is_seen():
    golden = next(iter(GOLDENS.values()))
    with pytest.raises(AssertionError, match="delta"):
        build.verify(replace(golden, delta={p: value * (1 + 1e-12) for p, value in golden.delta.items()}))


def test_a_changed_input_is_seen():
    golden = next(iter(GOLDENS.values()))
    with pytest.raises(HoraError, match="never change"):
        build.verify(replace(golden, params={key: value + 1 for key, value in golden.params.items()}))


def test_goldens_are_float32_or_float64_alone():
    with pytest.raises(HoraError, match="float16"):
        check_golden(REFERENCE, next(iter(GOLDENS.values())), "float16")


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_no_goldens_are_an_error(version):
    with pytest.raises(HoraError, match="got none"):
        load_goldens(version)


def test_the_command_proves_them_unchanged(capsys):
    main([])
    said = capsys.readouterr().out
    for version in range(1, VERSION + 1):
        count = len(load_goldens(version))
        assert f"v{version}: {count} of {count} goldens unchanged" in said
    assert f"{len(STORED)} of {len(STORED)} stored weights unchanged" in said


def test_writing_is_deterministic_and_never_overwrites(tmp_path, capsys):
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        main(["--write", str(folder)])
    files = [file for file in folders[0].rglob("*") if file.is_file()]
    assert len(files) == len(GOLDENS) + len(STORED)
    for file in files:
        assert file.read_bytes() == (folders[1] / file.relative_to(folders[0])).read_bytes()
    with pytest.raises(HoraError, match="which exists"):
        main(["--write", str(folders[0])])
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize("backend", [REFERENCE, VECTORIZED], ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", STORED)
def test_l4_weights_stored_as_models_store_them_are_read_and_merged(name, backend):
    check_stored(backend, STORED[name])


def test_stored_weights_cover_every_kind_of_layout():
    layouts = [layout for golden in STORED.values() for layout in golden.layouts.values()]
    windows = [layout.window for layout in layouts if layout.window is not None]
    assert {layout.pattern for layout in layouts} == {"(h k) d", "d (h k)", "d h k", "d g h k", "d l g h k"}
    assert {window.blocks for window in windows} == {1, 2, 3, 4}
    assert all(golden.merged.shape == golden.weight.shape for golden in STORED.values())


def test_a_stored_weight_that_is_read_otherwise_is_seen():
    golden = STORED["gpt_neox"]
    wrong = {p: Layout(layout.pattern, replace(layout.window, blocks=1)) for p, layout in golden.layouts.items()}
    with pytest.raises((AssertionError, HoraError)):
        check_stored(REFERENCE, replace(golden, layouts=wrong))
