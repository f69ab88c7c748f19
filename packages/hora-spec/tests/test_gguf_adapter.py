"""GGUF adapters, as far as they need no package gguf; tests/serving has the rest."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hora_spec import Adapter, AdapterLayer, AdapterSpec, HoraError, Layout, ProjectionShape, Site, export_gguf
from hora_spec.gguf_adapter import _Base, _order

SITE = Site("q_proj", "weight", (8, 3), Layout(), ProjectionShape(2, 4, 3))
PARAMS = {"a.q": np.ones((1, 3), np.float32), "b.q": np.ones((2, 4, 1), np.float32)}
ADAPTER = Adapter({"a": AdapterLayer(AdapterSpec(1, sharing="a"), {"q": SITE}, PARAMS)})


def test_f9_without_gguf_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(HoraError, match=r'need the package gguf: pip install "hora-spec\[gguf\]"'):
        export_gguf(ADAPTER, tmp_path / "out.gguf", base=tmp_path / "base.gguf")


def test_f9_the_halves_of_a_rotary_head_alternate():
    base = _Base(Path("base.gguf"), "llama", {"llama.attention.head_count": 2}, {})
    np.testing.assert_array_equal(_order(base, "blk.0.attn_q.weight", 2, 8), [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(_order(base, "blk.0.attn_v.weight", 2, 8), range(8))


def test_f9_heads_may_be_counted_by_block():
    base = _Base(Path("base.gguf"), "llama", {"llama.attention.head_count_kv": [4, 2]}, {})
    np.testing.assert_array_equal(_order(base, "blk.1.attn_k.weight", 2, 8), [0, 2, 1, 3, 4, 6, 5, 7])
    with pytest.raises(HoraError, match="got 2 heads in the adapter and 4 in"):
        _order(base, "blk.0.attn_k.weight", 2, 8)


def test_f9_rows_of_other_architectures_stay():
    base = _Base(Path("base.gguf"), "qwen2", {}, {})
    np.testing.assert_array_equal(_order(base, "blk.0.attn_q.weight", 2, 8), range(8))
