"""The evaluation harness evaluates an adapter of HoRA, from Python and from its command line."""

import json
import subprocess
import sys

import peft
import pytest
import transformers as tf
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from .conftest import config

TASK = """
task: cats
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["sat", "ran"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def adapter(base, tmp_path):
    model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), config(init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter"


def likelihoods(model):
    requests = [
        Instance("loglikelihood", {}, ("the cat", " sat on a mat"), 0),
        Instance("loglikelihood", {}, ("a", " dog"), 0),
    ]
    return [value for value, _ in model.loglikelihood(requests)]


def test_likelihoods_are_those_of_the_merged_model(base, adapter):
    options = {"tokenizer": str(base), "device": "cpu", "batch_size": 1}
    adapted = likelihoods(HFLM(pretrained=str(base), peft=str(adapter), **options))
    assert adapted == pytest.approx(likelihoods(HFLM(pretrained=str(adapter.parent / "merged"), **options)), abs=1e-4)
    assert adapted != pytest.approx(likelihoods(HFLM(pretrained=str(base), **options)), abs=1e-2)


def test_the_command_line_evaluates_it_when_the_launcher_starts_it(base, adapter, tmp_path):
    rows = [{"prompt": "the cat", "answer": 0}, {"prompt": "the dog", "answer": 1}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "cats.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    command = [
        *("lm_eval", "--model", "hf", "--model_args", f"pretrained={base},peft={adapter}"),
        *("--tasks", "cats", "--include_path", str(tmp_path), "--device", "cpu"),
    ]
    done = subprocess.run([sys.executable, "-m", "hora_torch", "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|cats |" in done.stdout
    bare = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert bare.returncode != 0
    assert "KeyError: 'HORA'" in bare.stderr
