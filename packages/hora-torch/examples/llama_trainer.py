"""Fine-tune a causal language model with HoRA and the Hugging Face Trainer, then merge and export it."""

import sys

import hora_torch
import peft
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main(base: str, output: str, steps: int = 20) -> None:
    """Adapt the model at `base`; write the adapter, its LoRA form and the merged model under `output`."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), hora_torch.HoraConfig(r=8))
    print(hora_torch.report(model))

    generator = torch.Generator().manual_seed(0)  # stands for tokenised text
    tokens = torch.randint(0, model.config.vocab_size, (64, 32), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]

    arguments = TrainingArguments(output, max_steps=steps, learning_rate=1e-3, report_to="none", logging_steps=5)
    Trainer(model, arguments, train_dataset=data).train()

    model.save_pretrained(f"{output}/adapter")
    hora_torch.export_lora(model, f"{output}/lora")  # what vLLM and others serve
    model.merge_and_unload().save_pretrained(f"{output}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:3])
