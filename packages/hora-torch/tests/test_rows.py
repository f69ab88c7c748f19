"""A plan is held against an attention that is written out by hand: right, wrong with its reason, or untold."""

import pytest
import torch
from hora_spec import Layout, ProjectionShape, Site, Window
from hora_torch.probing import Record, UntoldError
from hora_torch.rows import rows_of_one_head
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from .test_probing import BATCH, LENGTH, drawn

HEADS, WIDTH, EMBED = 4, 2, 5
ROWS = HEADS * WIDTH


def site(heads=HEADS, width=WIDTH, *, start=0, of=ROWS):
    """A plan for some of `of` rows."""
    window = Window(0, start, start + heads * width)
    return Site("attention", "weight", (of, EMBED), Layout("(h k) d", window), ProjectionShape(heads, width, EMBED))


def split(y, widths=(WIDTH,) * HEADS):
    return y.split(widths, -1)


def of_heads(q, k, v, widths):
    """Attention whose heads have widths of their own."""
    heads = zip(split(q, widths), split(k, widths), split(v, widths), strict=True)
    return torch.cat([F.softmax(q @ k.mT, -1) @ v for q, k, v in heads], -1)


def told(plan, widths=(WIDTH,) * HEADS, attend=of_heads, beside=0):
    """The answer for projections that are modules of their own; `beside` columns of the context are something else."""
    q, k, v = (drawn(BATCH, LENGTH, sum(widths)) for _ in range(3))
    leaves = {"query": [q], "key": [k], "value": [v]}
    context = torch.cat([attend(q, k, v, widths), drawn(BATCH, LENGTH, beside)], -1)
    names = {"q": "query", "k": "key", "v": "value", "cross_q": "query", "cross_v": "value", "gate": "value"}
    return rows_of_one_head(Record(leaves, [context]), plan, {p: names[p] for p in plan})


RIGHT = {
    "q, k and v": {"q": site(), "k": site(), "v": site()},
    "q and v": {"q": site(), "v": site()},
    "q and k": {"q": site(), "k": site()},
    "q alone": {"q": site()},
    "another attention's": {"cross_q": site(), "cross_v": site()},
    "no part of it": {"q": site(), "v": site(), "gate": site(ROWS, 1)},
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_plan_is_told_right(case):
    assert told(RIGHT[case]) == ""
    assert "v" not in RIGHT[case] or told(RIGHT[case], beside=3) == ""


def test_heads_of_another_width_are_told_right():
    assert told({"q": site(3, 3, of=9), "k": site(3, 3, of=9), "v": site(3, 3, of=9)}, (3, 3, 3)) == ""


def test_a_planned_head_that_is_wider_than_the_context_is_wrong():
    q, k, v = drawn(BATCH, LENGTH, ROWS), drawn(BATCH, LENGTH, ROWS), drawn(BATCH, LENGTH, 2 * ROWS)
    record = Record({"query": [q], "value": [v]}, [of_heads(q, k, v[..., :ROWS], (WIDTH,) * HEADS)])
    fault = rows_of_one_head(record, {"q": site(), "v": site(1, 16, of=16)}, {"q": "query", "v": "value"})
    assert fault == "the heads of the attention have another width than a planned head of v, 16"


WRONG = {
    "more heads of q": ({"q": site(8, 1)}, "1 rows of q in one planned head, got 2 in 2"),
    "fewer heads of q": ({"q": site(2, 4)}, "4 rows of q in one planned head, got 2 in 1"),
    "more heads of k": ({"q": site(), "k": site(8, 1)}, "1 rows of k in one planned head, got 2 in 2"),
    "more heads of v": ({"q": site(), "v": site(8, 1)}, "q and v of one head are planned as different heads"),
    "fewer heads of v": ({"q": site(), "v": site(2, 4)}, "another width than a planned head of v, 4"),
    "one head of v": ({"q": site(), "v": site(1, 8)}, "another width than a planned head of v, 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_told_with_what_is_wrong(case):
    plan, fault = WRONG[case]
    assert fault in told(plan)


@pytest.mark.parametrize("beside", [0, 3])
def test_heads_are_looked_at_to_the_last(beside):
    plan = {"q": site(), "v": site()}
    assert "2 rows of q in one planned head, got 4 in 2" in told(plan, (2, 2, 4), beside=beside)


def fused(plan):
    """The answer for one module: q, k and v of all heads, one after the other."""
    qkv = drawn(BATCH, LENGTH, 3 * ROWS)
    context = of_heads(*qkv.chunk(3, -1), (WIDTH,) * HEADS)
    plan = {p: site(start=start, of=3 * ROWS) for p, start in plan.items()}
    return rows_of_one_head(Record({"qkv": [qkv]}, [context]), plan, dict.fromkeys(plan, "qkv"))


FUSED = {
    "right": ({"q": 0, "k": 8, "v": 16}, ""),
    "k for q": ({"q": 8, "v": 16}, "q act on other positions than their own, as those of a planned head of k do"),
    "v for q": ({"q": 16, "v": 16}, "2 rows of q in one planned head, got 1 in 1"),
    "k for v": ({"q": 0, "v": 8}, "1 rows of v in one planned head, got 2 in 1"),
    "v for k": ({"q": 0, "k": 16}, "2 rows of k in one planned head, got 1 in 1"),
    "half a head of q off": ({"q": 1, "v": 16}, "2 rows of q in one planned head, got 2 in 2"),
    "a head of k off": ({"q": 0, "k": 6, "v": 16}, "q and k of one head are planned as different heads"),
    "half a head of v off": ({"q": 0, "v": 15}, "q and v of one head are planned as different heads"),
    "a head of v off": ({"q": 0, "v": 14}, "q and v of one head are planned as different heads"),
}


@pytest.mark.parametrize("case", FUSED)
def test_rows_of_a_fused_weight_are_told(case):
    plan, fault = FUSED[case]
    assert fused(plan) == fault if not fault else fault in fused(plan)


def test_queries_that_share_keys_and_values_are_told():
    q, k, v = drawn(BATCH, LENGTH, ROWS), drawn(BATCH, LENGTH, ROWS // 2), drawn(BATCH, LENGTH, ROWS // 2)
    shared = (y.unflatten(-1, (2, 1, WIDTH)).expand(-1, -1, -1, 2, -1).flatten(2) for y in (k, v))
    record = Record({"query": [q], "key": [k], "value": [v]}, [of_heads(q, *shared, (WIDTH,) * HEADS)])
    names = {"q": "query", "k": "key", "v": "value"}
    assert rows_of_one_head(record, {"q": site(), "k": site(2, of=4), "v": site(2, of=4)}, names) == ""
    fault = rows_of_one_head(record, {"q": site(), "v": site(4, 1, of=4)}, {"q": "query", "v": "value"})
    assert "another width" in fault or "different heads" in fault


UNTOLD = {
    "q is not adapted": ({"v": site()}, of_heads),
    "one head looks like several": ({"q": site(1, 8), "v": site()}, of_heads),
    "values are normalised": ({"q": site(), "v": site()}, lambda q, k, v, w: of_heads(q, k, F.normalize(v, dim=-1), w)),
    "joined, by a norm": ({"q": site(), "v": site()}, lambda q, k, v, w: of_heads(F.normalize(q, dim=-1), k, v, w)),
    "nothing in it is seen": ({"q": site(), "v": site()}, lambda q, k, v, w: of_heads(q, k, v.detach(), w)),
}


@pytest.mark.parametrize("reason", UNTOLD)
def test_what_cannot_be_told_has_a_reason(reason):
    plan, attend = UNTOLD[reason]
    with pytest.raises(UntoldError, match=reason):
        told(plan, attend=attend)


def test_of_what_may_be_the_context_the_first_that_tells_is_asked_and_the_first_reason_given():
    q, k, v = (drawn(BATCH, LENGTH, ROWS) for _ in range(3))
    leaves, plan = {"query": [q], "key": [k], "value": [v]}, {"q": site(), "v": site()}
    names, widths = {"q": "query", "v": "value"}, (WIDTH,) * HEADS
    rolled = of_heads(q + q.roll(1, 1), k, v, widths)
    normed = F.normalize(of_heads(q, k, v, widths), dim=-1)
    with pytest.raises(UntoldError, match="on its own position alone"):
        rows_of_one_head(Record(leaves, [rolled, normed]), plan, names)
    assert rows_of_one_head(Record(leaves, [rolled, of_heads(q, k, v, widths), normed]), plan, names) == ""
