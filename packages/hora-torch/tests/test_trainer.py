"""The stock Trainer, with its default optimiser, reports and keeps what it trained."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers

from .conftest import FAMILIES
from .oracle import adapted, agree, current, differ, evaluate, merged, truth, written

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no accelerator

STEPS = 4


def rows(count, seed):
    tokens = torch.randint(0, 64, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


HELD_OUT = rows(8, seed=5)


class Trained:
    """One finished run: its log, its model, its checkpoints."""

    def __init__(self, family, path, *, keep_best):
        arguments = transformers.TrainingArguments(
            str(path),
            max_steps=STEPS,
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
            save_steps=1,
            logging_steps=1,
            load_best_model_at_end=keep_best,
            metric_for_best_model="eval_loss",
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            learning_rate=0.3,  # so that losses rise again and the best is not the last
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        assert arguments.optim == "adamw_torch_fused"
        self.family, self.path = family, Path(path)
        self.model = adapted(family, init_weights=True)  # its first evaluation is that of the bare base
        trainer = transformers.Trainer(self.model, arguments, train_dataset=rows(16, seed=2), eval_dataset=HELD_OUT)
        self.start = current(self.model)
        trainer.train()
        log = trainer.state.log_history
        self.losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
        self.best = min(range(1, STEPS + 1), key=self.losses.get)
        assert Path(trainer.state.best_model_checkpoint) == self.checkpoint(self.best)
        self.kept = self.best if keep_best else STEPS
        self.final = trainer.evaluate()["eval_loss"]

    def checkpoint(self, step):
        return self.path / f"checkpoint-{step}"


@pytest.fixture(scope="module", params=[False, True], ids=["last", "best"])
def trained(request, tmp_path_factory):
    return Trained(FAMILIES["llama"], tmp_path_factory.mktemp("run"), keep_best=request.param)


def loss(model):
    """Mean loss of the held-out rows."""
    batch = {key: torch.stack([row[key] for row in HELD_OUT]) for key in HELD_OUT[0]}
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def test_reported_losses_are_those_of_the_checkpoints(trained):
    base = trained.family.model()
    expected = {0: loss(merged(base, trained.start))}
    for step in range(1, STEPS + 1):
        expected[step] = loss(merged(base, written(trained.checkpoint(step))))
    assert trained.losses == pytest.approx(expected, rel=1e-5)
    assert len(set(trained.losses.values())) == STEPS + 1


def test_checkpoints_load_into_fresh_models(trained):
    for step in range(1, STEPS + 1):
        model = peft.PeftModel.from_pretrained(trained.family.model(), trained.checkpoint(step))
        assert loss(model) == pytest.approx(trained.losses[step], rel=1e-5)


def test_what_remains_is_the_checkpoint_that_was_asked_for(trained):
    assert trained.best < STEPS
    assert trained.final == pytest.approx(trained.losses[trained.kept], rel=1e-5)
    expected = truth(trained.family, written(trained.checkpoint(trained.kept)))
    agree(evaluate(trained.model, trained.family.inputs()), expected)


def test_the_merged_model_is_that_checkpoint(trained):
    inputs = trained.family.inputs()
    expected = truth(trained.family, written(trained.checkpoint(trained.kept)))
    differ(expected, evaluate(trained.family.model(), inputs))
    trained.model.merge_adapter()
    agree(evaluate(trained.model, inputs), expected)
    trained.model.unmerge_adapter()
    agree(evaluate(copy.deepcopy(trained.model).merge_and_unload(), inputs), expected)
