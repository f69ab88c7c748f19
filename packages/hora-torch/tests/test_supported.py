"""Which modules are maps that can be adapted, how they store one, and how targets are called."""

import pytest
import torch
from hora_spec import HoraError, Layout
from hora_torch.targets import is_supported, out_in, short_names, stored_form
from torch import nn
from transformers.pytorch_utils import Conv1D

from .oracle import adapted


def test_a_target_that_matches_nothing_lists_the_closest_names(families):
    with pytest.raises(HoraError, match=r"Closest module names: \['q_proj'"):
        adapted(families["llama"], target_modules=["q_prj"])
    for said in ({"layers_to_transform": [7]}, {"layers_to_transform": [0], "layers_pattern": "blocks"}):
        notes = ".*".join(
            f"you specified '{name}': {value if isinstance(value, str) else '.'}" for name, value in said.items()
        )
        with pytest.raises(HoraError, match=f"{notes}.*Closest module names"):
            adapted(families["llama"], target_modules=["q_proj"], **said)
    with pytest.raises(HoraError, match="Closest module names") as caught:
        adapted(families["llama"], target_modules=["input_layernorn"])
    assert "Note" not in str(caught.value)
    assert "input_layernorm" not in str(caught.value)


def test_modules_that_are_no_linear_maps_are_refused(families):
    with pytest.raises(HoraError, match=r"got LlamaRMSNorm at 'model\.layers\.0\.input_layernorm'$"):
        adapted(families["llama"], target_modules=["input_layernorm"])


class Codes(nn.Module):
    """As quantised maps are, which have no weight of that name."""

    def __init__(self, **sizes):
        super().__init__()
        self.register_buffer("codes", torch.zeros(3))
        for name, value in sizes.items():
            setattr(self, name, value)


class Learned(Codes):
    def __init__(self):
        super().__init__(in_features=2, out_features=3)
        del self.codes
        self.scales = nn.Parameter(torch.ones(3))


class Around(nn.Module):
    """Holds a map, whose sizes it repeats."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_features, self.out_features = inner, 2, 3


MAPS = {
    "Linear": (nn.Linear(2, 3), (3, 2)),
    "Conv1D": (Conv1D(3, 2), (3, 2)),
    "MultiheadAttention": (nn.MultiheadAttention(4, 2), (12, 4)),
    "codes in a buffer": (Codes(in_features=2, out_features=3), (3, 2)),
    "codes in a parameter": (Learned(), (3, 2)),
    "Conv1d": (nn.Conv1d(2, 3, 1), (3, 2)),
    "Conv2d": (nn.Conv2d(2, 3, 1, padding="valid"), (3, 2)),
    "Conv3d": (nn.Conv3d(2, 3, 1), (3, 2)),
    "Conv2d in groups": (nn.Conv2d(4, 6, 1, groups=2), (6, 2)),
}
NO_MAPS = {
    "a wider kernel": nn.Conv2d(2, 3, (1, 2)),
    "a kernel of two": nn.Conv1d(2, 3, 2),
    "padding": nn.Conv2d(2, 3, 1, padding=1),
    "padding and a wider kernel": nn.Conv1d(2, 3, 3, padding=1),
    "no width": Codes(out_features=3),
    "no rows": Codes(in_features=2),
    "around a map": Around(nn.Linear(2, 3)),
    "around codes": Around(Codes()),
    "LayerNorm": nn.LayerNorm(3),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_linear_map_is_known_by_its_kind_its_rows_and_columns_and_the_form_of_its_weight(name):
    module, expected = MAPS[name]
    assert is_supported(module)
    assert out_in(module) == expected
    if hasattr(module, "weight"):
        shape, pattern = stored_form(module)
        assert shape == tuple(module.weight.shape)
        assert shape[Layout(pattern).row_axis] == expected[0]
    elif name.startswith("codes"):
        assert stored_form(module) == (expected, "(h k) d")


@pytest.mark.parametrize("name", NO_MAPS)
def test_what_is_no_map_of_each_position_by_itself_is_no_target(name):
    assert not is_supported(NO_MAPS[name])


def test_targets_are_named_by_their_last_names_unless_those_are_of_others_too():
    model = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for _ in range(2))
    assert short_names(model, ["0.q", "1.q"]) == {"q"}
    assert short_names(model, ["0.q", "1.q", "0.v"]) == {"0.q", "1.q", "0.v"}
