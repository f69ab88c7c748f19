"""TRL's trainers take a HoraConfig where they take a LoraConfig, and train the adapter alone."""

import peft
import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset

from .conftest import config, logits

SENTENCES = ["the cat sat on a mat", "the dog ran on a road", "a cat ran", "the dog sat"]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "max_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "bf16": False,
}


def sft(model, tokenizer, folder):
    data = Dataset.from_list([{"text": text} for text in SENTENCES])
    args = trl.SFTConfig(output_dir=str(folder), max_length=16, **SETTINGS)
    return trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config())


def dpo(model, tokenizer, folder):
    rows = [{"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran on a road"}] * 4
    args = trl.DPOConfig(output_dir=str(folder), max_length=16, **SETTINGS)
    data = Dataset.from_list(rows)
    return trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config())


def grpo(model, tokenizer, folder):
    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    args = trl.GRPOConfig(
        output_dir=str(folder), num_generations=2, max_completion_length=4, beta=0.1, temperature=1.0, **SETTINGS
    )
    data = Dataset.from_list([{"prompt": text} for text in SENTENCES])
    return trl.GRPOTrainer(
        model, reward, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config()
    )


@pytest.mark.parametrize("trainer", [sft, dpo, grpo])
def test_a_trainer_trains_the_adapter_alone_and_what_it_saves_loads(trainer, base, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    trainer = trainer(model, tokenizer, tmp_path)
    trained = {name: param.detach().clone() for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert trained
    assert all("hora_hyper" in name for name in trained)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in trained.items())
    adapted = logits(trainer.model)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), expected)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), adapted, rtol=1e-4, atol=1e-5)
