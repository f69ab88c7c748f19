"""accelerate prepares, steps, checkpoints and launches what holds an adapter of HoRA."""

import subprocess
import sys

import hora_torch
import peft
import pytest
import torch
import transformers as tf
from accelerate import Accelerator

from .conftest import config

PROGRAM = """
import sys
from accelerate import PartialState
from peft import PeftConfig
state = PartialState(cpu=True)
print("rank", state.process_index, "of", state.num_processes, PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)
"""


LAUNCHERS = [
    (("accelerate.commands.launch", "--cpu", "--num_processes=1"), 1),
    (("torch.distributed.run", "--standalone", "--nproc-per-node=2"), 2),
]


def prepared(base):
    torch.manual_seed(0)
    model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), config())
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(hora_torch.param_groups(model, 0.01, ratio=4))
    return accelerator, *accelerator.prepare(model, optimizer)


def step(accelerator, model, optimizer):
    ids = torch.arange(2, 14)[None]
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(base, tmp_path):
    state = prepared(base)
    first = step(*state)
    state[0].save_state(tmp_path)
    rest = [step(*state) for _ in range(3)]
    assert rest[-1] < first
    again = prepared(base)
    again[0].load_state(tmp_path)
    assert [step(*again) for _ in range(3)] == rest


@pytest.mark.parametrize(("launcher", "processes"), LAUNCHERS)
def test_every_process_that_is_launched_knows_hora(base, tmp_path, launcher, processes):
    (tmp_path / "program.py").write_text(PROGRAM)
    peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), config()).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-m", *launcher, "-m", "hora_torch", "program.py", "adapter"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert said == [f"rank {rank} of {processes} HORA" for rank in range(processes)]
