"""What the second of two processes holds of a branch, told in one process: nothing is sent."""

import pytest
import torch
from hora_spec import HoraError
from hora_torch.linear import Branch
from hora_torch.sharding import check_rows_alone, is_sharded, of_this_process, part_of_weight, placed_like
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

ROWS, EMBED, RANK = 6, 4, 2


@pytest.fixture(scope="module")
def mesh():
    """Of two processes, of which this is the second."""
    distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def given(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def distributed_weight(mesh, placement, *shape, dtype=torch.float32):
    local = [size // 2 if placement.is_shard(axis) else size for axis, size in enumerate(shape)]
    return DTensor.from_local(torch.zeros(local, dtype=dtype), mesh, [placement], run_check=False)


def second(tensor, axis):
    return tensor.chunk(2, axis)[1]


def test_a_distributed_tensor_is_told_from_a_plain_one(mesh):
    assert is_sharded(distributed_weight(mesh, Shard(0), ROWS, EMBED))
    assert not is_sharded(torch.zeros(2))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_value_is_placed_like_what_is_stored(mesh, axis):
    value = given(ROWS, EMBED)
    placed = placed_like(value, distributed_weight(mesh, Shard(axis), ROWS, EMBED, dtype=torch.bfloat16))
    assert placed.placements == (Shard(axis),)
    assert placed.shape == value.shape
    assert placed.dtype == torch.bfloat16
    plain = placed_like(value, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(plain, value.double())


def test_a_weight_is_split_along_its_rows_or_not_at_all(mesh):
    for axis in (0, 1):
        for placement in (Replicate(), Shard(axis)):
            check_rows_alone(distributed_weight(mesh, placement, ROWS, EMBED), axis, "Linear")
        for placement in (Shard(1 - axis), Partial()):
            with pytest.raises(HoraError, match=rf"\(axis {axis}\), got .* for 'Linear': leave it out"):
                check_rows_alone(distributed_weight(mesh, placement, ROWS, EMBED), axis, "Linear")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)], ids=str)
def test_of_an_update_each_process_has_its_part_of_the_weight(mesh, axis, placement):
    shape = (ROWS, EMBED) if axis == 0 else (EMBED, ROWS)
    a, b = given(RANK, EMBED), given(ROWS, RANK)
    update = b @ a if axis == 0 else (b @ a).T
    own = update if placement.is_replicate() else second(update, placement.dim)
    part_a, part_b = part_of_weight(a, b, distributed_weight(mesh, placement, *shape), axis)
    torch.testing.assert_close(part_b @ part_a if axis == 0 else (part_b @ part_a).T, own)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_branch_is_computed_for_the_rows_of_this_process(mesh, axis, monkeypatch):
    summed = []
    monkeypatch.setattr(DTensor, "to_local", spied(DTensor.to_local, summed))
    shape = (ROWS, EMBED) if axis == 0 else (EMBED, ROWS)
    weight = distributed_weight(mesh, Shard(axis), *shape)
    x, a, b = given(3, EMBED), given(RANK, EMBED), given(ROWS, RANK)
    found, (branch,) = of_this_process(x, [Branch(a, b, 0.5, 0, ROWS)], weight, axis, ROWS // 2)
    assert torch.equal(found, x)
    assert torch.equal(branch.a, a)
    assert torch.equal(branch.b, second(b, 0))
    assert (branch.scaling, branch.start, branch.stop) == (0.5, 0, ROWS // 2)
    assert [placements for placements in summed if placements is not None] == [[Partial()]] * 2


def spied(real, summed):
    def to_local(self, *, grad_placements=None):
        summed.append(grad_placements)
        return real(self, grad_placements=grad_placements)

    return to_local


def test_a_weight_that_is_whole_everywhere_has_whole_branches(mesh, monkeypatch):
    summed = []
    monkeypatch.setattr(DTensor, "to_local", spied(DTensor.to_local, summed))
    x, b = given(3, EMBED), given(ROWS, RANK)
    branches = [Branch(given(RANK, EMBED), b, 1.0, 0, ROWS)]
    weight = distributed_weight(mesh, Replicate(), ROWS, EMBED)
    found, (branch,) = of_this_process(x, branches, weight, 0, ROWS // 2)
    assert torch.equal(branch.b, b)
    assert torch.equal(found, x)
    assert [placements for placements in summed if placements is not None] == [[Replicate()]] * 2
    sharded = distributed_weight(mesh, Shard(0), ROWS, EMBED)
    same, (whole,) = of_this_process(x, branches, sharded, 0, ROWS)  # whose outputs are gathered
    assert same is x
    assert whole is branches[0]


def test_parts_of_a_fused_weight_are_refused_where_they_are_gathered(mesh):
    weight = distributed_weight(mesh, Shard(0), ROWS, EMBED)
    whole = Branch(given(RANK, EMBED), given(ROWS, RANK), 1.0, 0, ROWS)
    for start, stop in ((0, 3), (3, 6)):
        part = Branch(given(RANK, EMBED), given(3, RANK), 1.0, start, stop)
        with pytest.raises(HoraError, match="a fused weight is sharded by processes that gather its output"):
            of_this_process(given(3, EMBED), [whole, part], weight, 0, ROWS // 2)
        assert of_this_process(given(3, EMBED), [part], weight, 0, ROWS)[1] == [part]
