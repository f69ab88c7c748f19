"""Who is believed about head counts: every source is asked, none is preferred for want of others."""

import pytest
import transformers as tf
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.heads import Attention, DisagreeError, Rows, UnknownRowsError, identifier
from torch import nn


class Config:
    """A config that says what a test wants it to."""

    def __init__(self, **values):
        self.__dict__.update(values)


class Module(nn.Module):
    """An attention module that says of itself what a test wants it to."""

    def __init__(self, **says):
        super().__init__()
        for name, value in says.items():
            setattr(self, name, value)


def attention(*, path="a", widths=None, model_config=None, user=None, **says):
    """4 query heads and 2 of keys and values, of width 8, unless told otherwise."""
    widths = {"q_proj": 32, "k_proj": 16, "v_proj": 16} if widths is None else widths
    return Attention(Module(**says), path, widths, model_config, HoraConfig(r=2, **(user or {})))


def heads(found, own="q_proj"):
    return found.rows(own)[0].heads


def test_a_projection_of_its_own_is_all_rows_of_its_module():
    assert attention(num_heads=4).rows("q_proj") == [Rows("q", 4, 8, 0, 32, 1, "attention.num_heads=4")]


def test_the_config_of_a_model_alone_proves_nothing():
    says = Config(num_attention_heads=4, head_dim=8)
    with pytest.raises(UnknownRowsError, match=r"model\.config\.num_attention_heads=4, model\.config\.head_dim=8"):
        attention(model_config=says).rows("q_proj")
    assert heads(attention(model_config=says, num_heads=4)) == 4
    assert heads(attention(config=says)) == 4


def test_the_attention_is_not_outvoted():
    says = Config(num_attention_heads=4, head_dim=8)
    with pytest.raises(DisagreeError, match=r"attention\.num_heads=2"):
        attention(num_heads=2, config=says).rows("q_proj")


def test_a_tie_between_two_counts_is_not_decided():
    with pytest.raises(DisagreeError):
        attention(config=Config(num_attention_heads=4, head_dim=16)).rows("q_proj")


def test_one_source_that_does_not_fit_is_no_disagreement():
    with pytest.raises(UnknownRowsError) as caught:
        attention(num_heads=5).rows("q_proj")
    assert not isinstance(caught.value, DisagreeError)


@pytest.mark.parametrize("nothing", [0, -8, True, None, "8", 8.0])
def test_what_is_no_positive_integer_says_nothing(nothing):
    assert heads(attention(num_heads=4, head_dim=nothing)) == 4


def test_one_head_of_keys_and_values_is_a_count():
    assert heads(attention(num_heads=4, num_key_value_heads=1, widths={"q_proj": 32, "v_proj": 8}), "v_proj") == 1
    with pytest.raises(DisagreeError, match="num_key_value_heads=1"):
        attention(num_heads=4, num_key_value_heads=1).rows("v_proj")


def test_a_config_that_cannot_say_for_all_layers_says_nothing():
    class Raising:
        @property
        def head_dim(self):
            raise RuntimeError("layers differ")

    assert heads(attention(num_heads=4, config=Raising())) == 4


@pytest.mark.parametrize("path", ["", "a", "a.b"])
def test_a_count_by_name_is_that_of_the_module_with_this_path(path):
    whole = f"{path}.q_proj" if path else "q_proj"
    assert heads(attention(path=path, user={"num_heads": {whole: 4}})) == 4
    assert heads(attention(path=path, user={"num_heads": {"q_proj": 4}})) == 4
    with pytest.raises(UnknownRowsError):
        attention(path=path, user={"num_heads": {f"x.{whole}": 4}}, num_heads=5).rows("q_proj")


def test_a_count_by_the_user_that_the_attention_contradicts_is_the_users_mistake():
    with pytest.raises(HoraError) as caught:
        attention(num_heads=4, user={"num_heads": 2}).rows("q_proj")
    assert not isinstance(caught.value, UnknownRowsError)


def test_widths_of_one_role_go_before_the_common_one():
    says = {"num_heads": 4, "head_dim": 5, "qk_head_dim": 8, "v_head_dim": 4}
    assert heads(attention(**says)) == 4
    assert heads(attention(**says, widths={"q_proj": 32, "k_proj": 32, "v_proj": 16}), "v_proj") == 4
    with pytest.raises(DisagreeError, match="qk_head_dim=16"):
        attention(num_heads=4, qk_head_dim=16).rows("q_proj")


def test_counts_of_one_role_go_before_the_common_one():
    says = {"num_heads": 7, "num_k_heads": 4, "num_v_heads": 2}
    assert heads(attention(**says)) == 4
    assert heads(attention(**says), "v_proj") == 2


def test_a_gated_query_has_heads_of_twice_the_width():
    config = tf.Qwen3NextConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    module = tf.models.qwen3_next.modeling_qwen3_next.Qwen3NextAttention(config, 0)
    widths = {"q_proj": 32, "k_proj": 8, "v_proj": 8}
    assert heads(Attention(module, "a", widths, config, HoraConfig(r=2))) == 4


@pytest.mark.parametrize(("name", "expected"), [("q", "q"), ("1x", "_1x"), ("12", "_12"), ("a1", "a1"), ("a-b", "a_b")])
def test_names_of_modules_become_names_of_projections(name, expected):
    assert identifier(name) == expected
