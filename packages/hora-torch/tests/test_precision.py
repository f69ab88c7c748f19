"""Factors and merges are of float32 whatever a program asked of products, and what it asked stays as it was."""

from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from hora_torch import precision, verify
from hora_torch.precision import exact_products
from torch.utils._python_dispatch import TorchDispatchMode

from .oracle import config

GPU, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


def legacy():
    torch.set_float32_matmul_precision("medium")


def of_the_gpu():
    GPU.fp32_precision = "tf32"


def of_the_processor():
    CPU.fp32_precision = "bf16"


def of_all():
    torch.backends.fp32_precision = "tf32"


ASKED = [legacy, of_the_gpu, of_the_processor, of_all]


def state():
    return GPU.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision


@pytest.fixture(params=ASKED, ids=lambda ask: ask.__name__)
def asked(request):
    """What a program asked for, and what torch then says."""
    GPU.fp32_precision = CPU.fp32_precision = "none"
    request.param()
    yield state()
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    GPU.fp32_precision = CPU.fp32_precision = "none"


class Products(TorchDispatchMode):
    """What torch would have rounded products of float32 to, at each of them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in NAMES:
            self.seen.append(state()[:2])
        return func(*args, **(kwargs or {}))


def exact(seen):
    return bool(seen) and all(value in precision.EXACT for one in seen for value in one)


def test_it_is_exact_inside_and_as_before_afterwards(asked):
    assert not exact([asked[:2]])
    with exact_products():
        assert exact([state()[:2]])
        with exact_products():
            assert exact([state()[:2]])
        assert exact([state()[:2]])
    assert state() == asked
    with pytest.raises(ZeroDivisionError), exact_products():
        raise ZeroDivisionError
    assert state() == asked


def test_a_thread_that_ends_first_leaves_the_others_exact(asked):
    with ThreadPoolExecutor(1) as pool:
        first, second = exact_products(), exact_products()
        pool.submit(first.__enter__).result()
        with second:
            pool.submit(first.__exit__, None, None, None).result()
            assert exact([state()[:2]])
    assert state() == asked


def test_what_follows_a_shared_setting_still_does_afterwards():
    torch.backends.fp32_precision = "tf32"
    try:
        with exact_products():
            pass
        torch.backends.fp32_precision = "ieee"
        assert exact([state()[:2]])
    finally:
        torch.backends.fp32_precision = "none"


def test_a_torch_without_a_setting_for_each_backend_does_as_well(monkeypatch):
    monkeypatch.setattr(precision, "_BY_BACKEND", False)
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_compiler_keeps_what_its_caller_asked_for(asked, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with exact_products():
        assert state() == asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["merged", "merged in place", "compared", "verified"])
def test_what_is_kept_is_made_of_exact_products(kept, dtype, asked, families):
    model = peft.get_peft_model(families["llama"].model().to(dtype), config()).eval()
    with Products() as products:
        if kept == "merged":
            model.merge_and_unload()
        elif kept == "merged in place":
            model.merge_adapter()
            model.unmerge_adapter()
        elif kept == "verified" and dtype == torch.float32:
            assert verify(model, families["llama"].inputs()).ok
        else:
            model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert exact(products.seen)
    assert state() == asked


def test_a_call_generates_exactly_and_multiplies_as_it_was_asked(asked, families):
    family = families["llama"]
    model = peft.get_peft_model(family.model(), config()).eval()
    with torch.no_grad(), Products() as products:
        model(**family.inputs())
    assert not exact(products.seen)
    generated = [one for one in products.seen if exact([one])]
    assert len(generated) >= 2
    assert state() == asked
