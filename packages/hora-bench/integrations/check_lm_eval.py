"""The commonsense records, ten a task: both backends score them as the evaluation harness does."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from hora_bench import assets, backends
from hora_bench.data.base import Score
from hora_bench.data.commonsense import TASKS, commonsense
from hora_bench.data.records import CUTOFF, by_length
from hora_bench.request import request
from hora_bench.run import EVAL_BATCH
from hora_spec import HoraError
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

EACH = 10
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{responses}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def records() -> Any:
    """Ten test records of each task, with a tokenizer of their words.

    Words end where white space is, as the prompt does: the harness, which moves that space to the response and
    tokenises both in one, reads the same tokens.
    """
    try:
        assets.find("commonsense").get()
    except HoraError as error:
        pytest.skip(str(error))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    task = commonsense(tokenizer).cut(EACH * len(TASKS))
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["</s>", "<unk>"])
    texts = [record.prompt + record.response(option) for record in task.test for option in record.options]
    words.train_from_iterator(texts, trainer)
    task.tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    return task


@pytest.fixture(scope="module")
def model(records: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random LLaMA whose likelihoods are far apart."""
    directory = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlamaConfig(vocab_size=len(records.tokenizer), eos_token_id=0, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(directory)
    records.tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def harness(records: Any, model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness makes of the records, a task of its own for each of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        own = [record for record in records.test if record.group == name]
        docs = [
            {
                "prompt": record.prompt,
                "responses": [record.response(option) for option in record.options],
                "gold": record.options.index(record.answer),
            }
            for record in own
        ]
        assert len(docs) == EACH
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, docs)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"our_{name}", data=data))
    served = HFLM(pretrained=model, device="cpu", batch_size=8, max_length=CUTOFF - 1)
    names = [f"our_{name}" for name in TASKS]
    return lm_eval.simple_evaluate(
        served, tasks=names, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
    )


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_response_has_the_likelihood_and_every_task_the_accuracy_of_lm_eval(
    backend: str, records: Any, model: str, harness: dict[str, Any]
) -> None:
    asked = request(task="commonsense", model=model, backend=backend, image_size_px=None, scoring="log-likelihood")
    learner = backends.build(asked, records)
    rows = np.concatenate([learner.outputs(one) for one in records.eval_batches("test", EVAL_BATCH["text"])])
    ours, start = {}, 0
    for i in by_length(records.test):
        record = records.test[i]
        ours[record.group, record.prompt] = rows[start : start + len(record.options)]
        start += len(record.options)
    score = Score.of(records.judge("test", rows))
    for name in TASKS:
        samples = harness["samples"][f"our_{name}"]
        for sample in samples:
            theirs = [likelihood for ((likelihood, _),) in sample["resps"]]
            np.testing.assert_allclose(ours[name, sample["doc"]["prompt"]], theirs, rtol=1e-4)
            assert np.ptp(theirs) > 1e-2  # what is compared differs
        assert score.groups_pct[name] == pytest.approx(100 * harness["results"][f"our_{name}"]["acc,none"])
