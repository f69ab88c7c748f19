"""Preferences with trl: supervised fine-tuning and then DPO, each given a HoraConfig in place of a LoraConfig.

`python trl_dpo.py HuggingFaceTB/SmolLM2-135M-Instruct out` with a model from the hub.
"""

import sys

import hora_torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo"}
SETTINGS = {"per_device_train_batch_size": 2, "learning_rate": 5e-4, "report_to": "none", "save_strategy": "no"}
SETTINGS |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 5, "max_length": 64}


def main(base: str, output: str, steps: int = 10) -> None:
    """Teach the model at `base` to answer with a capital, then to prefer the short answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    asked = {country: f"The capital of {country} is" for country in CAPITALS}
    model = AutoModelForCausalLM.from_pretrained(base)
    data = Dataset.from_list([{"prompt": asked[key], "completion": f" {city}."} for key, city in CAPITALS.items()])
    config = trl.SFTConfig(output_dir=output, max_steps=steps, **SETTINGS)
    given = {"processing_class": tokenizer, "peft_config": hora_torch.HoraConfig(r=8, task_type="CAUSAL_LM")}
    trainer = trl.SFTTrainer(model, args=config, train_dataset=data, **given)
    print(f"SFT: loss {trainer.train().training_loss:.3f} over {steps} steps")

    model = trainer.model.merge_and_unload()
    rows = [
        {"prompt": asked[country], "chosen": f" {city}.", "rejected": f" {city}, as everybody knows by now."}
        for country, city in CAPITALS.items()
    ]
    config = trl.DPOConfig(output_dir=output, max_steps=steps, **SETTINGS)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), **given)
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"DPO: the chosen answer leads by {margins[0]:.3f}, then {margins[-1]:.3f}")
    trainer.save_model(f"{output}/adapter")


if __name__ == "__main__":
    main(*sys.argv[1:3])
