"""Products of float32 in float32, where a program asked torch to round them (TF32 on a GPU, bfloat16 on some CPUs)."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch

EXACT: Final = ("ieee", "none", "highest")
_BACKENDS: Final = tuple(
    backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(backend, "matmul")
)
_BY_BACKEND: Final = all(hasattr(matmul, "fp32_precision") for matmul in _BACKENDS)  # torch 2.9


def exact_products() -> AbstractContextManager[None]:
    """Inside, nothing is rounded; afterwards all is as before. What is compiled keeps what its caller asked for.

    Factors are generated and added in it: they are merged, exported and compared, and a wish for faster products of the
    base must not be seen there (spec M1).
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if not _BY_BACKEND:
        return nullcontext() if torch.get_float32_matmul_precision() in EXACT else _legacy()
    rounded = [matmul for matmul in _BACKENDS if matmul.fp32_precision not in EXACT]
    return _without(rounded) if rounded else nullcontext()


@contextmanager
def _without(rounded: list[Any]) -> Generator[None]:
    shared = torch.backends.fp32_precision
    before = [matmul.fp32_precision for matmul in rounded]
    for matmul in rounded:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, value in zip(rounded, before, strict=True):
            matmul.fp32_precision = "none" if value == shared else value  # what follows the shared setting goes on so


@contextmanager
def _legacy() -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
