"""A scope of kept factors belongs to the thread and the context that opened it."""

import asyncio
import contextlib
import contextvars
import threading

import hora_torch
import pytest
import torch
from hora_spec import HoraError

from .oracle import adapted, agree, current, differ, evaluate, output, parameters, truth


@pytest.fixture
def family(families):
    return families["llama"]


@pytest.fixture
def model(family):
    return adapted(family)


def scale(model):
    """A write that raises no version."""
    for param in parameters(model).values():
        param.data *= 1.2


def test_scopes_that_close_in_another_order_keep_nothing(model, family):
    """As two generators that stream tokens do."""

    def stream():
        with hora_torch.cached_factors(model):
            while True:
                yield evaluate(model, family.inputs())

    one, other = stream(), stream()
    before = next(one)
    assert torch.equal(next(other), before)
    one.close()
    assert torch.equal(next(other), before)
    other.close()
    scale(model)
    expected = truth(family, current(model))
    differ(before, expected)
    agree(evaluate(model, family.inputs()), expected)


def test_a_scope_that_is_left_in_another_context_keeps_nothing(model, family):
    """As servers do that open and close what a request needs in tasks of their own."""
    scope = hora_torch.cached_factors(model)
    scope.__enter__()
    before = evaluate(model, family.inputs())
    with contextlib.suppress(ValueError):  # contextvars may say so
        contextvars.copy_context().run(scope.__exit__, None, None, None)
    scale(model)
    expected = truth(family, current(model))
    differ(before, expected)
    agree(evaluate(model, family.inputs()), expected)


def test_a_thread_that_trains_gets_nothing_from_a_scope_of_another(family, model):
    reference = adapted(family)
    found = []

    def train(model):
        optimizer = torch.optim.SGD(parameters(model).values(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = output(model(**family.inputs())).square().mean()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
            with torch.no_grad():
                found.append(float(output(model(**family.inputs())).square().mean()))

    def apart():
        with hora_torch.cached_factors(model):
            evaluate(model, family.inputs())
            thread = threading.Thread(target=train, args=(model,))
            thread.start()
            thread.join()

    with pytest.raises(HoraError):
        apart()  # the parameters changed inside the scope
    of_the_thread = found.copy()
    found.clear()
    train(reference)
    assert of_the_thread == pytest.approx(found, rel=1e-6)
    for one, other in zip(parameters(model).values(), parameters(reference).values(), strict=True):
        assert torch.equal(one, other)


def test_a_thread_that_evaluates_gets_nothing_from_a_scope_of_another(family, model):
    other = adapted(family)
    found = []
    with hora_torch.cached_factors(other):
        thread = threading.Thread(target=lambda: found.append(evaluate(model, family.inputs())))
        thread.start()
        thread.join()
    agree(found[0], truth(family, current(model)))


def test_a_task_that_outlives_a_scope_generates_anew(family, model):
    """asyncio copies the context of a scope into every task that starts inside."""
    before = evaluate(model, family.inputs())

    async def later(closed):
        await closed.wait()
        return evaluate(model, family.inputs())

    async def main():
        closed = asyncio.Event()
        with hora_torch.cached_factors(model):
            evaluate(model, family.inputs())
            task = asyncio.ensure_future(later(closed))
            await asyncio.sleep(0)
        scale(model)
        closed.set()
        return await task

    found = asyncio.run(main())
    expected = truth(family, current(model))
    differ(before, expected)
    agree(found, expected)
