"""Products of float32 in float32, where a program asked torch to round them (TF32 on a GPU, bfloat16 on some CPUs)."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any, Final

import torch

EXACT: Final = ("ieee", "none", "highest")
_BACKENDS: Final = tuple(
    backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(backend, "matmul")
)
_BY_BACKEND: Final = all(hasattr(matmul, "fp32_precision") for matmul in _BACKENDS)  # torch 2.9


_CHANGING = Lock()
_inside: list[None] = []  # one for each block that is open, in whatever thread
_before: list[tuple[Any, str]] = []  # settings that the first of them took back, and what they were


def exact_products() -> AbstractContextManager[None]:
    """Inside, nothing is rounded; afterwards all is as before. What is compiled keeps what its caller asked for.

    Factors are generated and added in it: they are merged, exported and compared, and a wish for faster products of the
    base must not be seen there (spec M1). Settings are of the process: the first block of all threads takes them back,
    and the last one restores them.
    """
    return nullcontext() if torch.compiler.is_compiling() else _exact()


@contextmanager
def _exact() -> Generator[None]:
    with _CHANGING:
        if not _inside:
            _before[:] = _take_back()
        _inside.append(None)
    try:
        yield
    finally:
        with _CHANGING:
            _inside.pop()
            if not _inside:
                _restore(_before)


def _take_back() -> list[tuple[Any, str]]:
    if not _BY_BACKEND:
        value = torch.get_float32_matmul_precision()
        if value in EXACT:
            return []
        torch.set_float32_matmul_precision("highest")
        return [(None, value)]
    found = [(matmul, value) for matmul in _BACKENDS if (value := matmul.fp32_precision) not in EXACT]
    for matmul, _ in found:
        matmul.fp32_precision = "ieee"
    return found


def _restore(before: list[tuple[Any, str]]) -> None:
    for matmul, value in before:
        if matmul is None:
            torch.set_float32_matmul_precision(value)
        else:  # what follows the shared setting goes on so
            matmul.fp32_precision = "none" if value == torch.backends.fp32_precision else value
