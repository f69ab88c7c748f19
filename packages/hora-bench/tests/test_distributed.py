"""Two processes on torch and eight devices on JAX end where one does."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hora_spec import load_adapter
from safetensors.numpy import load_file

SCRIPT = """
import sys
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
from hora_bench.torchvision_ops import declare_missing_ops
declare_missing_ops()
import numpy as np
from safetensors.numpy import save_file
from functools import partial
from hora_bench import methods
from hora_bench.data.prompts import prompts
from hora_bench.data.records import records_task
from hora_bench.models import load
from hora_bench.recipe import Recipe
from hora_bench.training import Checkpoint, fit, predict

form, model, records, out = sys.argv[1:]
task = records_task(Path(records), load.tokenizer(model))
recipe = Recipe(learning_rate=1e-2, weight_decay=1e-4, batch_size=8, steps=3, warmup_steps=1, clip_norm=0.5)
method = methods.find("hora")
if form == "mesh":
    from hora_bench.backends.jax_methods import prepare
    from hora_bench.backends.jax import JaxLearner
    learner = JaxLearner(*prepare(load.nnx_llama(model), method, seed=0), recipe, mesh={"fsdp": 4, "tp": 2})
elif form == "device":
    from hora_bench.backends.jax_methods import prepare
    from hora_bench.backends.jax import JaxLearner
    learner = JaxLearner(*prepare(load.nnx_llama(model), method, seed=0), recipe)
else:
    import torch
    from datetime import timedelta
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
    from hora_bench.backends.torch_methods import prepare
    from hora_bench.backends.torch import TorchLearner
    plugin = None
    if form == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
        )
    soon = InitProcessGroupKwargs(timeout=timedelta(seconds=90))  # a process that waits in vain is an error
    accelerator = Accelerator(cpu=True, kwargs_handlers=[soon])
    if plugin is not None:  # accelerate 1.15 offers FSDP on accelerators alone
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    assert accelerator.num_processes == (1 if form == "process" else 2)
    learner = TorchLearner(prepare(load.causal_lm(model), method, seed=0), recipe, accelerator=accelerator)
path = Path(out).with_suffix(".checkpoint")
Checkpoint(learner, path).save()
# processes whose clocks disagree must agree when to save, or they wait for each other in different places
checkpoint = Checkpoint(learner, path, every_s=0.0 if learner.is_main else 1e9)
curve = fit(learner, task, "train", recipe, members=np.arange(16), seed=0, checkpoint=checkpoint)
# before anything is scored: right after a training step no process holds whole weights
write = partial(learner.write, end=task.tokenizer.eos_token_id, new_tokens=8, beams=1)
written = predict(write, prompts(task, task.records("test"), 8))
scored = predict(learner.outputs, task.eval_batches("train", 5), checkpoint=checkpoint)
folder = Path(out).with_suffix("")
if learner.is_main:
    folder.mkdir()
learner.save(folder)
sys.setswitchinterval(1000)  # makes it likely that a thread of the last collective outlives the interpreter
arrays = {f"{i:04d}": value for i, (_, value) in enumerate(sorted(learner.state().items()))}
if learner.is_main:
    save_file({"loss": np.asarray(curve.loss), "scored": scored, "written": written, **arrays}, out)
if form in ("ddp", "fsdp"):
    from hora_bench.backends.torch import exit_if_launched
    exit_if_launched()
"""


def train(form, tmp_path, model, records, *launcher):
    out, script = tmp_path / f"{form}.safetensors", tmp_path / "train.py"
    script.write_text(SCRIPT)
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "OMP_NUM_THREADS": "1"}
    start([*launcher, str(script), form, str(model), str(records), str(out)], settings)
    return load_file(out)


def start(arguments, settings):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# what accelerate launch starts on accelerators; on CPU it would ask for MPI
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_two_torch_processes_equal_one(form, tmp_path, llama_directory, records_file):
    one = train("process", tmp_path, llama_directory, records_file)
    two = train(form, tmp_path, llama_directory, records_file, *LAUNCH)
    assert one.keys() == two.keys()
    saved = [load_adapter(tmp_path / name).layers for name in ("process", form)]
    assert saved[0].keys() == saved[1].keys()
    for name, layer in saved[0].items():
        for key, value in layer.params.items():
            np.testing.assert_allclose(saved[1][name].params[key], value, atol=1e-5, err_msg=f"{name} {key}")
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-5, err_msg=name)


def test_the_command_in_two_processes_writes_what_one_does(tmp_path, llama_directory, records_file):
    command = ["-m", "hora_bench", "run", "records", records_file, "--model", llama_directory, "--json"]
    command += ["--epochs", "2", "--batch-size", "8", "--lr", "1e-2", "--scoring", "generation"]
    found = []
    for out, launcher in (("one", []), ("two", LAUNCH)):
        said = start([*launcher, *map(str, command), "--out", str(tmp_path / out)], {"OMP_NUM_THREADS": "1"})
        (path,) = (tmp_path / out).glob("*.json")
        assert json.loads(said) == json.loads(path.read_text())
        found.append(json.loads(said))
    one, two = found
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5)
    assert (two["request"], two["scores"]) == (one["request"], one["scores"])


def test_eight_jax_devices_equal_one(tmp_path, llama_directory, records_file):
    one = train("device", tmp_path, llama_directory, records_file)
    eight = train("mesh", tmp_path, llama_directory, records_file)
    assert one.keys() == eight.keys()
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, atol=1e-5, err_msg=name)
