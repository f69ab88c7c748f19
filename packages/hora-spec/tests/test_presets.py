"""Named settings."""

import re
from pathlib import Path

import pytest
from hora_spec import PRESETS, AdapterSpec, HoraError, LayerShape, count_params, param_shapes, preset

ROOT = Path(__file__).parents[3]
in_repository = pytest.mark.skipif(not (ROOT / "noxfile.py").exists(), reason="the page is in the repository")
LAYER = LayerShape.attention(embed_dim=24, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_is_valid_and_unlike_the_others(name):
    spec = preset(name, 4)
    assert spec.rank == 4
    assert [other for other in PRESETS if preset(other, 4) == spec] == [name]
    assert param_shapes(spec, LAYER)


def test_s1_the_paper_s_reading_has_two_ways_to_be_written():
    assert preset("paper", 32) == AdapterSpec.paper(32)


def test_changes_go_on_top():
    assert preset("residual", 8, residual=False) == preset("hora", 8)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(HoraError, match="'qlora'") as refused:
        preset("qlora", 8)
    assert all(name in str(refused.value) for name in PRESETS)


@in_repository
def test_the_guide_s_table_has_every_setting_with_its_parameters():
    """Those of q and v in a ViT-S/14 at rank 8, trained and stored."""
    guide = (ROOT / "docs/guide/settings.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| ([\d,]+) / ([\d,]+) \|", guide, re.MULTILINE)
    layer = LayerShape.attention(embed_dim=384, num_heads=6)
    counts = {
        name: tuple(12 * count_params(preset(name, 8), layer, trained=trained) for trained in (True, False))
        for name in PRESETS
    }
    assert {name: tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in rows} == counts
