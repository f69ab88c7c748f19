"""Fine-tune a language model on real text with the Trainer, and make of it what servers load.

The text is Python's own documentation of its topics, which comes with Python. With a model from the hub:
`python llama_trainer.py HuggingFaceTB/SmolLM2-135M-Instruct out`.
"""

import pydoc_data.topics
import sys

import hora_torch
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

LENGTH = 128


def main(base: str, output: str, steps: int = 20) -> None:
    """Adapt the model at `base`; write the adapter, its LoRA form and the merged model under `output`."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), hora_torch.HoraConfig(r=8))
    print(hora_torch.report(model))

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:200_000]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    train, held_out = ([{"input_ids": row, "labels": row} for row in part] for part in (rows[:-16], rows[-16:]))

    settings = {"max_steps": steps, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(output, **settings, per_device_train_batch_size=4, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss on held-out text: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {steps} steps")

    model.save_pretrained(f"{output}/adapter")
    hora_torch.export_lora(model, f"{output}/lora")  # what vLLM and others serve
    model.merge_and_unload().save_pretrained(f"{output}/merged")
    tokenizer.save_pretrained(f"{output}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:3])
