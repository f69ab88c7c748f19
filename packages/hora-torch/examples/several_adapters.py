"""Several adapters on one model: one for each sample of a batch, sums of them, and one in place of another.

`python several_adapters.py HuggingFaceTB/SmolLM2-135M-Instruct` with a model from the hub.
"""

import sys

import hora_torch
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = {"french": "Le chat est sur le tapis.", "latin": "Gallia est omnis divisa in partes tres."}


def main(base: str, steps: int = 15) -> None:
    """Teach each adapter one sentence, and see what each batch row, and their sum, make of both."""
    torch.manual_seed(0)
    tokenizer, config = AutoTokenizer.from_pretrained(base), hora_torch.HoraConfig(r=4)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name="french")
    model.add_adapter("latin", config)
    tokens = {name: tokenizer(text, return_tensors="pt").input_ids for name, text in TEXTS.items()}
    for name in TEXTS:
        model.set_adapter(name)
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-3)
        for _ in range(steps):
            model(input_ids=tokens[name], labels=tokens[name]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.add_weighted_adapter(["french", "latin"], [1.0, 1.0], "both")
    model.eval()
    for adapter in (*TEXTS, "both"):
        model.set_adapter(adapter)
        losses = {name: model(input_ids=ids, labels=ids).loss.item() for name, ids in tokens.items()}
        print(f"{adapter:7}", ", ".join(f"loss of {name} {loss:.2f}" for name, loss in losses.items()))
    rows = torch.cat([ids[:, :6] for ids in tokens.values()])
    with torch.no_grad():
        mixed = model(input_ids=rows, adapter_names=list(TEXTS)).logits
    print("one batch, two adapters:", tuple(mixed.shape))


if __name__ == "__main__":
    main(sys.argv[1])
