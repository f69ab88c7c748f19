"""``verify`` on attention of many kinds: what is right is no alarm, and what is wrong is never ``ok``."""

import hora_torch
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from .test_verify import of_heads, shifted, small, with_sites

HEADS, WIDTH, EMBED = 4, 4, 16
QUESTION = "adapts the rows of its heads"


class Plain(nn.Module):
    """Softmax attention with a fused weight; the other kinds change one thing."""

    rows, of_v, of_gates, order = 3 * EMBED, EMBED, 0, "q k v"

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = HEADS, self.of_v // WIDTH, WIDTH
        self.qkv, self.out = nn.Linear(EMBED, self.rows), nn.ModuleList([nn.Linear(EMBED, EMBED)])

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out[0](self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Grouped(Plain):
    """Two heads of keys and values; some have sinks: weights that sum to less than one."""

    rows, of_v = 2 * EMBED, EMBED // 2

    def forward(self, x):
        q, k, v = self.qkv(x).split((EMBED, EMBED // 2, EMBED // 2), -1)
        q, k, v = (y.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.repeat_interleave(2, 1).mT
        weights = torch.cat([scores, torch.ones_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        return self.out[0]((weights @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


class NormedValues(Plain):
    """As Gemma 4, by a module; norms of q and of the context run over all heads, as in OLMo 2 and BitNet."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.v_norm, self.sub_norm = nn.RMSNorm(EMBED), nn.LayerNorm(WIDTH), nn.RMSNorm(EMBED)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for y in (self.q_norm(q), k, v))
        context = F.scaled_dot_product_attention(q, k, self.v_norm(v)).transpose(1, 2).flatten(2)
        return self.out[0](self.sub_norm(context))


class NormedByFunction(Plain):
    def attend(self, q, k, v):
        return super().attend(q, k, F.normalize(v, dim=-1))


class NormedContext(Plain):
    """As YOSO."""

    def attend(self, q, k, v):
        return F.normalize(super().attend(q, k, v), dim=-1)


class GatedContext(Plain):
    """As the linear attention of Qwen3-Next: beside values that are normalised a gate acts on one column alone."""

    rows, of_gates, order = 4 * EMBED, EMBED, "q:4*4 k:4*4 v:4*4 z:4*4"

    def forward(self, x):
        q, k, v, z = (y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for y in self.qkv(x).chunk(4, -1))
        return self.out[0](self.gated(self.attend(q, k, v), z).transpose(1, 2).flatten(2))

    def gated(self, context, z):
        return F.normalize(context, dim=-1) * F.silu(z)


class NormGated(nn.RMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * F.silu(gate)


class GatedByNorm(GatedContext):
    """By a module, which is looked past."""

    def __init__(self):
        super().__init__()
        self.norm = NormGated(WIDTH)

    def gated(self, context, z):
        return self.norm(context, z)


class MaskingValues(Plain):
    """As Doge: values say what is masked."""

    def __init__(self):
        super().__init__()
        self.mask_proj = nn.Linear(EMBED, HEADS)

    def attend(self, q, k, v):
        mask = self.mask_proj(v.transpose(1, 2).flatten(2)).mT[:, :, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class PairedQueries(Plain):
    """As DiffLlama: two heads of q and k share values, and one is taken from the other."""

    def attend(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        values = torch.cat([v[:, 0::2], v[:, 1::2]], -1)
        return (weights[:, 0::2] - 0.3 * weights[:, 1::2]) @ values


class TalkingHeads(Plain):
    """As CaiT."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, q, k, v):
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class TalkingAfter(Plain):
    def __init__(self):
        super().__init__()
        self.after = nn.Linear(HEADS, HEADS)

    def attend(self, q, k, v):
        return self.after((q @ k.mT).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class Channels(Plain):
    """As XCiT and DaViT: channels attend to channels."""

    def attend(self, q, k, v):
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        return (v @ (k.mT @ q).softmax(-2)).contiguous()


class Linear(Plain):
    """No softmax: any split of q into heads is as good as any other."""

    def attend(self, q, k, v):
        return q @ (k.mT @ v)


class ConvolvedQueries(Plain):
    """As ConvBERT and MViTv2: neighbours are mixed into a query."""

    def attend(self, q, k, v):
        return super().attend(q + q.roll(1, -2), k, v)


class BesideConvolution(Plain):
    """As ConvBERT: half of the context is something else."""

    def __init__(self):
        super().__init__()
        self.out = nn.ModuleList([nn.Linear(2 * EMBED, EMBED)])

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        context = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.out[0](torch.cat([context, x], -1))


class SingleKey(Plain):
    """As attention to one embedding: nothing is chosen."""

    def attend(self, q, k, v):
        return super().attend(q, k[:, :, :1], v[:, :, :1])


class Joint(Plain):
    """As Flux and SD 3: a second stream, of which the output projection comes first."""

    def __init__(self):
        super().__init__()
        self.add_qkv, self.add_out = nn.Linear(EMBED, self.rows), nn.Linear(EMBED, EMBED)

    def forward(self, x):
        other = self.add_qkv(x.flip(-1))
        joined = torch.cat([other, self.qkv(x)], 1)
        q, k, v = (y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for y in joined.chunk(3, -1))
        context = self.attend(q, k, v).transpose(1, 2).flatten(2)
        added, own = context.split(x.shape[1], 1)
        return torch.cat([self.out[0](own), self.add_out(added)], 1)


class Gated(Plain):
    """As Qwen3-Next: a head of the query projection is half a query and half a gate."""

    def __init__(self):
        super().__init__()
        del self.qkv, self.head_dim  # of no single width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(EMBED, width * EMBED) for width in (2, 1, 2))
        self.out = nn.ModuleList([nn.Linear(2 * EMBED, EMBED)])

    def forward(self, x):
        q, gate = self.q_proj(x).unflatten(-1, (HEADS, 2 * WIDTH)).chunk(2, -1)
        k, v = (y.unflatten(-1, (HEADS, -1)) for y in (self.k_proj(x), self.v_proj(x)))
        context = self.attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        return self.out[0]((context * gate.sigmoid().repeat(1, 1, 1, 2)).flatten(2))


class Apart(Gated):
    """Queries and values meet in no one tensor that a linear map reads."""

    def forward(self, x):
        return self.q_proj(x).sum(), self.v_proj(x)


SEEN = (GatedByNorm, Plain, Grouped, NormedValues, Joint)
UNTOLD = {
    NormedByFunction: "values are normalised",
    NormedContext: "values are normalised",
    MaskingValues: "no row acts on a whole head",  # of what the mask is made of
    PairedQueries: "attentions are added",
    TalkingHeads: "no row acts on a whole head",  # of the scores, which are looked at first
    TalkingAfter: "no row acts on a whole head",
    Channels: "channels attend to channels",
    Linear: "do not share one softmax",
    ConvolvedQueries: "on its own position alone",
    SingleKey: "more than one key",
    Gated: "gates beside values",
    GatedContext: "at its own position, as that of a gate",
    Apart: "nothing in it is seen to depend on all",
}


def of_heads_of(role, factor):
    return lambda p, site: of_heads(factor if p == role else 1)(p, site)


OTHER_ROWS = {
    "k for v": lambda kind: shifted({"q": 0, "v": -kind.of_v}),
    "k for q": lambda kind: shifted({"q": EMBED, "v": 0}),
    "q and v swapped": lambda kind: shifted(
        {"q": kind.rows - kind.of_gates - EMBED, "v": kind.of_v - kind.rows + kind.of_gates}
    ),
    "half a head off": lambda kind: shifted({"q": 2, "v": 0}),
    "half a head off in v": lambda kind: shifted({"q": 0, "v": -2}),
}
OTHER_HEADS = {
    "more heads": of_heads(2),
    "fewer heads": of_heads(0.5),
    "one head of q": of_heads_of("q", 0.25),
    "one head of v": lambda p, site: of_heads(1 / site.projection.num_heads if p == "v" else 1)(p, site),
    "more heads of v": of_heads_of("v", 2),
    "fewer heads of v": of_heads_of("v", 0.5),
    "fewer heads of q": of_heads_of("q", 0.5),
}
WRONG = {
    f"{kind.__name__}, {name}": (kind, change)
    for kind in (*SEEN, *UNTOLD, BesideConvolution)
    for name, change in (
        *((name, change(kind)) for name, change in OTHER_ROWS.items() if not issubclass(kind, Gated)),
        *OTHER_HEADS.items(),
    )
}


def answer(kind, change=None):
    """The finding on the rows of an attention, after its plan was changed."""
    torch.manual_seed(0)
    if issubclass(kind, Gated):
        config = small(target_modules=["q_proj", "v_proj"], num_heads=HEADS)
    else:
        config = small(target_modules=["qkv"], row_order={"qkv": kind.order})
    model = peft.get_peft_model(nn.Sequential(kind()), config)
    if change is not None:
        with_sites(model, change)
    report = hora_torch.verify(model, torch.randn(2, 6, EMBED))
    (finding,) = [finding for finding in report.findings if finding.question == QUESTION]
    return finding


@pytest.mark.parametrize("kind", [*SEEN, BesideConvolution])
def test_the_right_rows_are_seen(kind):
    assert answer(kind).verdict == "ok", answer(kind)


@pytest.mark.parametrize(("kind", "reason"), UNTOLD.items())
def test_what_cannot_be_told_is_no_alarm_and_has_a_reason(kind, reason):
    assert answer(kind).verdict == "unknown", answer(kind)
    assert reason in answer(kind).detail


@pytest.mark.parametrize(("kind", "change"), WRONG.values(), ids=WRONG.keys())
def test_wrong_rows_are_an_alarm_where_rows_are_seen_and_nowhere_right(kind, change):
    verdict = answer(kind, change).verdict
    if kind in SEEN and change is not OTHER_HEADS["one head of q"]:  # one head looks like several that are joined
        assert verdict == "wrong"
    assert verdict != "ok"
