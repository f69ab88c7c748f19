"""Weights that torch distributes, told in one process; several processes are in `test_parallel.py`."""

import hora_torch
import peft
import pytest
import torch
from hora_spec import AdapterSpec, HoraError, LayerShape
from hora_torch import HoraConfig
from hora_torch.hypernet import HoraHypernet
from hora_torch.merging import merged_weight
from hora_torch.stored import stored_weight
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from .test_merge import FORMS, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_distributed_weight_is_merged_in_place(form, dtype, one_process):
    layout, shape = FORMS[form]
    weight, a, b = given(shape, dtype)
    expected = merged_weight(weight, [(layout, a, b, 0.5)])
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(weight.clone(), one_process, [Shard(layout.row_axis)]))
    stored = stored_weight(module, "weight")
    before, local = stored.value(), stored.bits().data_ptr()
    merged, _ = stored.plus(before, [(layout, a, b, 0.5)], check=True, name="default")
    stored.write(merged)
    unit = torch.finfo(dtype).eps  # a padded product may be summed in another order
    torch.testing.assert_close(module.weight.full_tensor().detach(), expected, rtol=unit, atol=4e-7)
    assert stored.bits().data_ptr() == local
    again, _ = stored.plus(before, [(layout, a, b, 0.5)], check=True, name="default")
    assert torch.equal(again, merged)
    stored.write(before)
    assert torch.equal(module.weight.full_tensor(), weight)


def test_a_parameter_that_is_still_sharded_is_refused(one_process):
    hypernet = HoraHypernet(AdapterSpec(2), LayerShape.attention(32, 4), name="x")
    hypernet.b_in = nn.Parameter(distribute_tensor(hypernet.b_in.detach(), one_process, [Shard(0)]))
    with pytest.raises(HoraError, match="b_in is sharded"):
        hypernet()


def test_an_adapter_of_which_a_process_has_a_part_is_not_taken_out(one_process):
    config = HoraConfig(r=2, target_modules=["0"], num_heads=2)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    hypernet = model.base_model.model[0].hora_hyper["default"]
    hypernet.b_in = nn.Parameter(distribute_tensor(hypernet.b_in.detach(), one_process, [Shard(0)]))
    with pytest.raises(HoraError, match=r"b_in is sharded: gather"):
        hora_torch.to_adapter(model)
