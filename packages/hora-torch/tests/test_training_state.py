"""Interrupted and distributed training reproduce the plain run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from hora_torch import HoraConfig

WORKER = Path(__file__).parent / "distributed_worker.py"
PINNED = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no accelerator


class Killed(Exception):
    """Stands for a kill signal between two steps."""


class KillAfter(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trainer(family, path, *callbacks):
    model = peft.get_peft_model(family.model(), HoraConfig(r=2, hidden_dim=6, head_embed_dim=5, hora_dropout=0.2))
    generator = torch.Generator().manual_seed(2)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (24, 6), generator=generator)]
    arguments = transformers.TrainingArguments(
        str(path),
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@PINNED
def test_a_killed_and_resumed_trainer_reproduces_the_uninterrupted_run(families, tmp_path):
    whole = trainer(families["llama"], tmp_path / "whole")
    whole.train()
    killed = trainer(families["llama"], tmp_path / "killed", KillAfter(5))
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer(families["llama"], tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert sorted(losses(whole)) == list(range(1, 7))
    assert losses(resumed) == losses(whole)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def single():
    """Losses and parameters of the run in one process."""
    module = worker()
    model = module.build()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    losses = module.train(model, optimizer, 0, 1, lambda loss: loss.backward())
    return losses, {name: param.detach() for name, param in model.named_parameters() if "hora_hyper" in name}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(single, mode, tmp_path):
    arguments = [str(WORKER), mode, str(tmp_path / "rendezvous"), str(tmp_path / "result")]
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
    result = torch.load(tmp_path / "result", weights_only=True)
    losses, state = single
    assert (result["sharded"], result["type"]) == (
        (True, "FSDPPeftModel") if mode == "fsdp" else (False, "DistributedDataParallel")
    )
    torch.testing.assert_close(result["losses"], losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["state"], state, rtol=1e-4, atol=1e-6)
