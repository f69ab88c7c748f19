"""What gradients say of rows, on attentions written out by hand, without a model or a plan."""

import itertools

import pytest
import torch
from hora_torch.probing import Probe, Record, UntoldError, probes, recorded
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, LENGTH, HEADS, WIDTH = 2, 4, 3, 2
ROWS = HEADS * WIDTH


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def projections(*names):
    """One output of each projection, (batch, length, rows)."""
    return {name: [drawn(BATCH, LENGTH, ROWS) + i] for i, name in enumerate(names)}


def split(y):
    return y.unflatten(-1, (HEADS, WIDTH)).transpose(-2, -3)


def joined(context):
    return context.transpose(-2, -3).flatten(-2)


def attention(q, k, v, mask=None, sinks=0):
    """Weights of a position sum to less than one where there are sinks."""
    scores = split(q) @ split(k).mT
    scores = torch.cat([scores + (0 if mask is None else mask), torch.ones_like(scores[..., :sinks])], -1)
    return joined(scores.softmax(-1)[..., : k.shape[-2]] @ split(v))


def probe(context, leaves):
    return Probe(Record(leaves), context)


def attended(**kwargs):
    leaves = projections("q", "k", "v")
    return probe(attention(*(leaf for (leaf,) in leaves.values()), **kwargs), leaves)


def rows(masks):
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


def of_head(index):
    start = index // WIDTH * WIDTH
    return [*range(start, start + WIDTH)]


@pytest.mark.parametrize("index", range(ROWS))
def test_a_column_depends_on_the_rows_of_its_head_and_on_one_of_v(index):
    seen = attended()
    wide, narrow = seen.column(index)
    assert seen.width == ROWS
    assert rows(wide) == {"q": of_head(index), "k": of_head(index), "v": []}
    assert rows(narrow) == {"q": [], "k": [], "v": [index]}
    assert rows(seen.local(index)) == {"q": of_head(index), "k": [], "v": []}


def keys_before(count):
    """Each position sees itself and those before it, `count` in all."""
    ones = torch.ones(LENGTH, LENGTH)
    return torch.where(ones.tril().bool() & ~ones.tril(-count).bool(), 0.0, -torch.inf)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_queries_are_told_from_keys_where_few_positions_see_others(count):
    """The first sees itself alone, and says nothing of who is at its own position."""
    seen = attended(mask=keys_before(count), sinks=1)
    assert rows(seen.local(0)) == {"q": of_head(0), "k": [], "v": []}


def test_a_model_in_which_each_position_sees_itself_alone_tells_nothing():
    with pytest.raises(UntoldError, match="more than one key"):
        attended(mask=keys_before(1)).column(0)


@pytest.mark.parametrize("position", [7, 4, 2])
def test_one_position_that_is_no_padding_is_enough(position):
    leaves = projections("q", "k", "v")
    context = attention(*(leaf for (leaf,) in leaves.values()))
    kept = F.one_hot(torch.tensor(position), BATCH * LENGTH).view(BATCH, LENGTH, 1)
    seen = probe(context * kept, leaves)
    assert rows(seen.local(1)) == {"q": of_head(1), "k": [], "v": []}


def test_outputs_of_a_module_that_is_called_twice_are_taken_together():
    """Of each row the halves of a sequence, or as windows of an image, with more axes."""
    (q,), (k,), (v,) = projections("q", "k", "v").values()
    halves = [half.detach().requires_grad_() for half in k.chunk(2, 1)]
    windows = v.detach().unflatten(1, (2, 2)).requires_grad_()
    leaves = {"q": [q], "k": halves, "v": [windows]}
    seen = probe(attention(q, torch.cat(halves, 1), windows.flatten(1, 2)), leaves)
    assert rows(seen.column(4)[0]) == {"q": of_head(4), "k": of_head(4), "v": []}
    assert rows(seen.local(4)) == {"q": of_head(4), "k": [], "v": []}
    first = probe(attention(q, torch.cat([halves[0], k[:, 2:]], 1), windows.flatten(1, 2)), leaves)
    assert rows(first.column(4)[0]) == {"q": of_head(4), "k": of_head(4), "v": []}


def test_fused_rows_are_told_apart():
    (fused,) = [drawn(BATCH, LENGTH, 3 * ROWS)]
    seen = probe(attention(*fused.chunk(3, -1)), {"qkv": [fused]})
    wide, narrow = seen.column(ROWS - 1)
    assert rows(wide) == {"qkv": [*of_head(ROWS - 1), *(row + ROWS for row in of_head(ROWS - 1))]}
    assert rows(narrow) == {"qkv": [3 * ROWS - 1]}
    assert rows(seen.local(ROWS - 1)) == {"qkv": of_head(ROWS - 1)}


def test_one_query_of_many_keys_is_enough():
    leaves = projections("q", "k", "v")
    leaves["q"] = [drawn(1, 1, ROWS)]
    leaves |= {name: [leaves[name][0][:1].detach().requires_grad_()] for name in "kv"}
    seen = probe(attention(*(leaf for (leaf,) in leaves.values())), leaves)
    assert rows(seen.local(0)) == {"q": of_head(0), "k": [], "v": []}


def test_rows_of_a_query_into_which_others_are_mixed_are_not_local():
    leaves = projections("q", "k", "v")
    (q,), (k,), (v,) = leaves.values()
    seen = probe(attention(torch.cat([q[..., :1], (q + q.roll(1, 1))[..., 1:]], -1), k, v), leaves)
    assert rows(seen.local(0)) == {"q": [0], "k": [], "v": []}


def test_the_generator_of_others_is_left_alone():
    state = torch.get_rng_state()
    attended().column(0)
    assert torch.equal(torch.get_rng_state(), state)


def fused_kernel(q, k, v):
    """Whose backward has no derivative."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return joined(F.scaled_dot_product_attention(split(q), split(k), split(v)))


UNTOLD = {
    "more than one key": lambda q, k, v, z: v + 0 * q + 0 * k,
    "gates beside values": lambda q, k, v, z: attention(q, k, v) * z,
    "at its own position, as that of a gate": lambda q, k, v, z: attention(q, k, v.detach()) * z,
    "on its own position alone": lambda q, k, v, z: attention(q + q.roll(1, -2), k, v),
    "do not share one softmax": lambda q, k, v, z: joined(split(q) @ (split(k).mT @ split(v))),
    "differentiated twice": lambda q, k, v, z: fused_kernel(q, k, v),
}


@pytest.mark.parametrize("reason", UNTOLD)
def test_an_attention_of_another_kind_is_untold_with_its_reason(reason):
    leaves = projections("q", "k", "v", "z")
    seen = probe(UNTOLD[reason](*(leaf for (leaf,) in leaves.values())), leaves)
    with pytest.raises(UntoldError, match=reason):
        seen.local(1)


def test_attentions_that_share_values_do_not_share_a_softmax():
    leaves = projections("q", "k", "v", "other_q", "other_k")
    q, k, v, other_q, other_k = (leaf for (leaf,) in leaves.values())
    weights = (split(q) @ split(k).mT).softmax(-1) - 0.3 * (split(other_q) @ split(other_k).mT).softmax(-1)
    seen = probe(joined(weights @ split(v)), leaves)
    assert rows(seen.column(0)[0]) == {name: of_head(0) if name != "v" else [] for name in leaves}
    with pytest.raises(UntoldError, match="attentions are added"):
        seen.local(0)


def test_only_what_depends_on_each_projection_may_be_the_context():
    leaves = projections("q", "k", "v")
    (q,), (k,), (v,) = leaves.values()
    first, second = attention(q, k, v), 2 * attention(q, k, v)
    record = Record(leaves, [torch.ones(2), q, attention(q, k, v.detach()), first, second])
    assert [probe.width for probe in probes(record)] == [ROWS, ROWS]
    assert [probe.column(0)[1]["v"].sum() for probe in probes(record)] == [1, 1]
    assert not [*probes(Record({}, [first]))]


class Recorded(nn.Module):
    """An attention with norms; writes into what its projections return, and names the arguments of some."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out, self.bias = (nn.Linear(ROWS, ROWS) for _ in range(5))
        self.q_norm, self.mixed = nn.LayerNorm(ROWS), nn.Sequential(nn.LayerNorm(ROWS))

    def forward(self, x):
        q, k, v = self.mixed(self.q_norm(self.q(x))), self.k(x).mul_(2), self.v(x)
        return {"weights": None}, self.out(attention(q, k, v) + self.bias(input=x))


def test_a_record_is_of_the_last_call_alone_and_takes_its_hooks_along():
    model = nn.Sequential(Recorded())
    with recorded(model, {"0": {"q", "k", "v"}}, norms=True) as records:
        for length in (LENGTH, LENGTH + 1):
            model(drawn(BATCH, length, ROWS))
    record = records["0"]
    assert [(name, leaf.shape[1]) for name, leaf in record.outputs()] == [(n, LENGTH + 1) for n in "qkv"]
    assert [tensor.shape[1] for tensor in record.candidates] == [LENGTH + 1] * 2
    count = len(record.candidates)
    model(drawn(BATCH, LENGTH, ROWS))
    assert len(record.candidates) == count
    assert len({id(tensor) for tensor in record.candidates}) == count


@pytest.mark.parametrize("norms", [True, False])
def test_norms_are_looked_past_where_they_are_to_be(norms):
    model = nn.Sequential(Recorded())
    with recorded(model, {"0": {"q", "k", "v"}}, norms=norms) as records:
        model(drawn(BATCH, LENGTH, ROWS))
    (context, result) = probes(records["0"])
    assert rows(context.column(0)[0])["q"] == ([*range(ROWS)] if norms else of_head(0))
    assert rows(result.column(0)[0])["v"] == [*range(ROWS)]


class ConvNorm(nn.Module):
    """Called a norm, and a map."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(2 * torch.eye(ROWS))

    def forward(self, x):
        return x @ self.weight


class PairNorm(nn.Module):
    """Called a norm, and holds another module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return x + self.inner(x)


class Shift(nn.Module):
    """Not called a norm."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(ROWS))

    def forward(self, x):
        return x + self.bias


@pytest.mark.parametrize("module", [ConvNorm(), PairNorm(), Shift()], ids=lambda module: type(module).__name__)
def test_what_may_be_more_than_a_norm_is_called_as_it_is(module):
    model, changed = Recorded(), []
    model.q_norm = module
    with recorded(model, {"": {"q", "k", "v"}}, norms=False):
        module.register_forward_hook(lambda _, args, y: changed.append(not torch.equal(y, args[0])))
        model(drawn(BATCH, LENGTH, ROWS))
    assert changed == [True]


def test_the_first_tensor_of_an_output_may_be_the_context():
    for output in (lambda x: x, lambda x: (None, x, 2 * x), lambda x: (None,)):
        attend = nn.Linear(ROWS, ROWS)
        model = nn.Module()
        model.q, model.forward = attend, lambda x, output=output, attend=attend: output(attend(x))
        with recorded(model, {"": {"q"}}, norms=True) as records:
            result = model(drawn(BATCH, LENGTH, ROWS))
        expected = [x for x in result if isinstance(x, torch.Tensor)][:1] if isinstance(result, tuple) else [result]
        assert all(a is b for a, b in itertools.zip_longest(records[""].candidates, expected))
