"""Names in a config that no module has: refused where they would decide something, told where PEFT lets them be."""

import pytest
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.said import check_layers, check_patterns, unmatched

MODULES = ["m.layers.0.attn.q_proj", "m.layers.0.attn.v_proj", "m.layers.1.attn.q_proj", "head"]


@pytest.mark.parametrize(
    "said", [{"q_proj": 2}, {"attn.q_proj": 2, "layers.1.attn.q_proj": 2}, {r".*\.0\..*": 2}, 2, None]
)
def test_patterns_of_targets_and_numbers_for_all_are_taken(said):
    check_patterns(HoraConfig(num_heads=said), ("num_heads", "rank_pattern"), MODULES)


@pytest.mark.parametrize("said", [{"k_proj": 2}, {"q_proj": 2, "proj": 2}, {"layers.0": 2}])
def test_a_pattern_of_no_target_is_refused(said):
    with pytest.raises(HoraError, match=rf"num_heads speaks of targets, got \['{list(said)[-1]}'\]"):
        check_patterns(HoraConfig(num_heads=said), ("rank_pattern", "num_heads"), MODULES)


@pytest.mark.parametrize(
    ("said", "missing"), [(0, None), ([0, 1], None), (2, 2), ([0, 3], 3), ([4, 0], 4), (None, None)]
)
def test_a_number_of_no_layer_with_a_target_is_refused(said, missing):
    config = HoraConfig(target_modules=["q_proj"], layers_to_transform=said)
    if missing is None:
        check_layers(config, MODULES)
    else:
        with pytest.raises(HoraError, match=f"got {missing}, in which there is no target"):
            check_layers(config, MODULES)
    assert config.layers_to_transform == said


UNMATCHED = {
    "all there": ({"target_modules": ["q_proj", "attn.v_proj", "head"], "modules_to_save": ["head"]}, {}),
    "a target": ({"target_modules": ["q_proj", "k_proj", "proj"]}, {"target_modules": ["k_proj", "proj"]}),
    "an expression": ({"target_modules": "k_proj"}, {}),
    "no targets": ({}, {}),
    "a module trained whole": ({"modules_to_save": ["ead", "hood", "tail"]}, {"modules_to_save": ["hood", "tail"]}),
    "what PEFT adds for a task": ({"modules_to_save": ["classifier", "score"]}, {}),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_names_that_no_module_has_are_told_by_field(case):
    said, expected = UNMATCHED[case]
    assert unmatched(HoraConfig(**said), MODULES) == expected
