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


def test_a_map_of_no_attention_is_one_head_of_its_own_unless_a_user_splits_it():
    widths = {"gate": 32}
    (alone,) = attention(widths=widths).rows("gate")
    assert alone == Rows("gate", 1, 32, 0, 32, 1, "a map without heads has one", alone=True)
    (split,) = attention(widths=widths, user={"num_heads": {"gate": 4}}).rows("gate")
    source = "HoraConfig.num_heads=4: blocks of output rows, which are heads of no attention"
    assert split == Rows("gate", 4, 8, 0, 32, 1, source, alone=False)


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


def test_a_config_of_the_attention_is_outvoted_where_it_speaks_of_other_layers():
    says = Config(num_attention_heads=8)
    assert heads(attention(num_heads=4, head_dim=8, config=says)) == 4
    assert heads(attention(config=Config(num_attention_heads=4, n_head=4, head_dim=16))) == 4


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


def fused(rows, order, **says):
    """Heads and first and last row, in each block, of the parts of one weight in an order that a user tells."""
    user = {"row_order": {"mixed": order}} | {
        name: says.pop(name) for name in ("num_heads", "num_kv_heads") & says.keys()
    }
    found = attention(widths={"mixed": rows}, user=user, **{key.removeprefix("own_"): says[key] for key in says})
    return [(part.role, part.heads, part.start, part.stop, part.blocks) for part in found.rows("mixed")]


OF_QUERIES_AND_KEYS = {"own_num_heads": 4, "own_num_key_value_heads": 2}
FUSED = {
    "one after the other": (
        64,
        "q k v",
        OF_QUERIES_AND_KEYS,
        [("q", 4, 0, 32, 1), ("k", 2, 32, 48, 1), ("v", 2, 48, 64, 1)],
    ),
    "by group": (
        64,
        "[group][q k v]",
        OF_QUERIES_AND_KEYS,
        [("q", 4, 0, 16, 2), ("k", 2, 16, 24, 2), ("v", 2, 24, 32, 2)],
    ),
    "keys and values": (32, "k v", OF_QUERIES_AND_KEYS, [("k", 2, 0, 16, 1), ("v", 2, 16, 32, 1)]),
    "keys and values by head": (32, "[head][k v]", OF_QUERIES_AND_KEYS, [("k", 2, 0, 8, 2), ("v", 2, 8, 16, 2)]),
    "queries alone": (32, "q", OF_QUERIES_AND_KEYS, [("q", 4, 0, 32, 1)]),
    "by head, where keys are not counted": (
        64,
        "[head][q k]",
        {"own_num_heads": 4},
        [("q", 4, 0, 8, 4), ("k", 4, 8, 16, 4)],
    ),
    "a width, where keys are not counted": (
        64,
        "q k",
        {"own_num_heads": 4, "own_head_dim": 8},
        [("q", 4, 0, 32, 1), ("k", 4, 32, 64, 1)],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_a_told_order_have_the_heads_that_the_model_tells(name):
    rows, order, says, expected = FUSED[name]
    assert fused(rows, order, **says) == expected


UNCERTAIN = {
    "keys alone counted": (64, "q k v", {"own_num_key_value_heads": 2}),
    "keys alone counted by a user": (64, "q k v", {"num_kv_heads": 2}),
    "queries alone counted": (96, "q k v", {"own_num_heads": 4}),
    "queries alone counted by a user": (96, "q k v", {"num_heads": 4}),
    "queries alone counted, keys and values told": (32, "k v", {"own_num_heads": 4}),
    "queries alone counted, by group": (96, "[group][q k v]", {"own_num_heads": 4}),
    "another width in the config": (96, "q k v", {"own_num_heads": 8, "own_config": Config(head_dim=8)}),
    "two counts of queries": (120, "[head][q k v]", {"own_num_heads": 4, "own_config": Config(num_attention_heads=8)}),
    "none": (96, "[head][q k v]", {"num_heads": 0}),
    "fewer than none": (96, "[head][q k v]", {"num_heads": -4}),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_heads_of_a_told_order_that_may_be_others_are_refused(name):
    """Keys are fewer than queries in most models, and without a count of both each part could start anywhere."""
    rows, order, says = UNCERTAIN[name]
    with pytest.raises(HoraError, match="pass num_heads and num_kv_heads"):
        fused(rows, order, **says)


def test_the_config_of_a_model_neither_gives_an_order_its_numbers_nor_contradicts_it():
    says = Config(num_attention_heads=4)
    with pytest.raises(UnknownRowsError, match="an order of rows names attributes"):
        attention(model_config=says, user={"row_order": {"q_proj": "q:num_attention_heads*8"}}).rows("q_proj")
    (rows,) = attention(model_config=says, user={"row_order": {"q_proj": "wide:2"}}).rows("q_proj")
    assert (rows.role, rows.heads, rows.head_dim) == ("wide", 2, 16)
    with pytest.raises(HoraError, match=r"attention\.config\.num_attention_heads=4: correct one of them"):
        attention(config=says, user={"row_order": {"q_proj": "wide:2"}}).rows("q_proj")
