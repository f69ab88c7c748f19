"""Two processes, or two replicas, that share a model come to the numbers of one, or to a HoraError."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hora_spec import HoraError

from .conftest import FAMILIES
from .oracle import adapted, agree, current, differ, evaluate, output, parameters, truth

WORKER = Path(__file__).parent / "parallel_worker.py"

EQUAL = [
    "sharded before",
    "sharded after",
    "loaded by heads",
    "two adapters",
    "head by head",
    "fsdp blocks",
    "fsdp whole",
    "fsdp attentions",
    "fsdp blocks, checkpoints",
    "fsdp blocks, reentrant checkpoints",
    "fsdp blocks, joint start",
    "joint start, fsdp blocks",
]
EQUAL_OR_REFUSED = ["gathered", "fused", "rows of inputs of q", "fsdp linears", "fsdp adapted", "fsdp hypernets"]
REFUSED = ["rows of inputs", "sequence"]
MERGED = ["merged", "fsdp merged", "head by head, merged"]


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(path):
    """What each of two processes found."""
    arguments = [str(WORKER), str(path / "rendezvous"), str(path / "found")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER.with_name("launched.py")), *arguments, str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    failed = [output[-3000:] for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failed, failed
    return [torch.load(path / f"found.{rank}", weights_only=True) for rank in range(2)]


def assert_equal(found, expected):
    """Losses, gradients and parameters are those of one process."""
    assert "failed" not in found, found.get("failed")
    assert "refused" not in found, found.get("refused")
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["evaluated"], expected["evaluated"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-4, atol=1e-6)


def assert_refused(found):
    assert "failed" not in found, found.get("failed")
    assert "refused" in found, "a layout that gives wrong numbers must be refused before the first step"


def assert_merged(found, expected):
    """The loss stays what it was, during and after a merge."""
    assert "failed" not in found, found.get("failed")
    if "refused" not in found:
        loss = expected["evaluated"][:1].expand(3)
        torch.testing.assert_close(found["evaluated"], loss, rtol=1e-5, atol=1e-6)


def _started(worker):
    return worker.jointly_started(worker.adapt(worker.base(), **worker.JOINT), worker.batches())


def test_two_processes_compute_as_one(worker, tmp_path, subtests):
    one = worker.train(worker.adapt(worker.base()))
    other = {
        "two adapters": worker.train(worker.with_second(worker.adapt(worker.base()))),
        "fused": worker.train(worker.adapt(worker.base("phi3"))),
        "head by head": (heads := worker.train(worker.adapt(worker.base("gpt_neox")))),
        "head by head, merged": heads,
        "fsdp blocks, joint start": (joint := worker.train(_started(worker))),
        "joint start, fsdp blocks": joint,
    }
    ranks = launch(tmp_path)
    named = {*EQUAL, *EQUAL_OR_REFUSED, *REFUSED, *MERGED}
    assert named == set(ranks[0]) == set(ranks[1])
    for name in worker.CHECKS:
        for rank, found in enumerate(ranks):
            with subtests.test(name, rank=rank):
                if name in EQUAL or (name in EQUAL_OR_REFUSED and "refused" not in found[name]):
                    assert_equal(found[name], other.get(name, one))
                elif name in REFUSED:
                    assert_refused(found[name])
                elif name in MERGED:
                    assert name != "head by head, merged" or "evaluated" in found[name], found[name]
                    assert_merged(found[name], other.get(name, one))


def replicate(module, copies):
    """One replica as ``nn.DataParallel`` makes it, with these copies of the parameters."""
    made = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, replica in made.items():
        for key, child in part._modules.items():
            replica._modules[key] = None if child is None else made[child]
        for key, param in part._parameters.items():
            if param is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, copies[param])
    return made[module]


@pytest.mark.parametrize("name", ["llama", "vit", "timm-vit", "mha"])
def test_a_replica_computes_with_its_own_copies_or_is_refused(name):
    family = FAMILIES[name]
    model = adapted(family)
    own = {id(param) for param in parameters(model).values()}
    copies = {param: param.detach() * (1.2 if id(param) in own else 1.0) for param in model.parameters()}
    try:
        result = evaluate(replicate(model, copies), family.inputs())
    except HoraError:
        return
    before = truth(family, current(model))
    for param in parameters(model).values():
        param.data *= 1.2
    expected = truth(family, current(model))
    differ(before, expected)
    agree(result, expected)


def test_gradients_of_replicas_reach_the_parameters_through_the_copies_or_are_refused():
    family = FAMILIES["llama"]
    model = adapted(family).train()
    output(model(**family.inputs())).square().sum().backward()
    expected = {name: param.grad.clone() for name, param in parameters(model).items()}
    model.zero_grad()
    copies = {param: param.clone() for param in model.parameters()}  # of which autograd knows the source
    seen = [torch.zeros(()) for _ in copies]
    for part, copy in zip(seen, copies.values(), strict=True):
        if copy.requires_grad:
            copy.register_hook(lambda grad, part=part: part.add_(1) and None)
    try:
        output(replicate(model, copies)(**family.inputs())).square().sum().backward()
    except HoraError:
        return
    torch.testing.assert_close({n: p.grad for n, p in parameters(model).items()}, expected)
    assert sum(seen) == len(expected)
