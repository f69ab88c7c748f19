"""The joint start of A: torch and JAX measure the same products, so that they find the same A."""

import hora_jax
import hora_torch
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hora_jax import Target
from hora_spec import PRESETS, joint, preset
from torch import nn

from .report import JOINT_BOUND

EMBED, HEADS, KV_HEADS = 16, 4, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads = HEADS, KV_HEADS
        self.q_proj = nn.Linear(EMBED, EMBED, bias=False)
        self.v_proj = nn.Linear(EMBED, EMBED // 2, bias=False)

    def forward(self, x):
        return torch.tanh(torch.cat([self.q_proj(x), self.v_proj(x)], -1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": Attention()})


@pytest.fixture(scope="module")
def batches():
    return [torch.randn(40, EMBED, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def of_torch(model, batches, **options):
    config = hora_torch.HoraConfig(r=3, num_heads=HEADS, num_kv_heads=KV_HEADS, **PRESETS["joint"].fields)
    adapted = peft.get_peft_model(nn.ModuleDict({"attn": Attention()}), config)
    for key, value in model.state_dict().items():
        name, _, _ = key.rpartition(".")
        adapted.base_model.model.get_submodule(name).base_layer.weight.data.copy_(value)
    start = hora_torch.joint_a(
        adapted, batches, lambda model, x: model.base_model.model["attn"](x).square().mean(), **options
    )
    return start.params["attn"]


def of_jax(model, batches, **options):
    params = {key: jnp.asarray(value.numpy()) for key, value in model.state_dict().items()}
    targets = [Target(f"attn.{p}_proj.weight", p, "(h k) d", heads, layer="attn") for p, heads in (("q", 4), ("v", 2))]

    def loss(params, x):
        parts = [x @ params[f"attn.{p}_proj.weight"].T for p in "qv"]
        return jnp.square(jnp.tanh(jnp.concatenate(parts, -1))).mean()

    plan = hora_jax.make_plan(params, preset("joint", 3), targets)
    found, _ = hora_jax.joint_a(
        plan, loss, params, hora_jax.init(plan), [jnp.asarray(x.numpy()) for x in batches], **options
    )
    return {name: np.asarray(value[0]) for name, value in found["attn"].items() if name.startswith("a")}


@pytest.mark.parametrize("options", [{}, {"of": "inputs"}, {"together": True, "scale": "rows"}], ids=str)
def test_i7_both_backends_find_the_same_a(model, batches, options, tally):
    one, other = of_torch(model, batches, **options), of_jax(model, batches, **options)
    assert one.keys() == other.keys()
    for name, a in one.items():
        worst = np.abs(a - other[name]).max() / (JOINT_BOUND * np.abs(a).max())
        tally.add("joint start", "torch and JAX", {"I7"}, worst)
        assert worst < 1


MISTAKES = {
    "a basis of the first head alone": ("_stacked", lambda own: lambda unit, parts: own(unit, parts)[:4]),
    "the last directions in place of the first": ("_taken", lambda own: lambda unit, s, d: own(unit, s, d[::-1])),
    "another scale": ("_kaiming", lambda own: lambda *args: 3 * own(*args)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_i7_a_mistake_shows(model, batches, mistake, monkeypatch):
    """Against the exact basis, so that a mistake that both backends share shows as well."""
    name, planted = MISTAKES[mistake]
    weights = {p: model["attn"].get_submodule(f"{p}_proj").weight for p in "qv"}
    loss = sum(model["attn"](x).square().mean() for x in batches) / len(batches)
    grads = dict(zip("qv", torch.autograd.grad(loss, list(weights.values())), strict=True))
    x = torch.cat(batches).double()

    def right():
        for p, a in ((key[2:], a) for key, a in of_torch(model, batches, power=3).items()):
            best = torch.linalg.svd(grads[p].double()).Vh[:3]
            square = 3 * x.square().sum(1).mean() / (3 * EMBED)
            scale = (square / (x @ best.T).square().sum(1).mean()).sqrt()
            exact = scale * best
            if np.abs(a.T @ a - (exact.T @ exact).detach().numpy()).max() > 1e-2 * float(scale) ** 2:
                return False
        return True

    assert right()
    monkeypatch.setattr(joint, name, planted(getattr(joint, name)))
    if name == "_stacked":  # rows of other heads are cut off, whose factors then have no place
        monkeypatch.setattr(
            joint,
            "_split",
            lambda unit, rows: {
                p: np.pad(rows, ((0, s.weight_shape[0] - len(rows)), (0, 0))) for p, s in unit.shapes.items()
            },
        )
    assert not right()
