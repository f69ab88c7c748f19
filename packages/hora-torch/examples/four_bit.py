"""Train on a base in four bits, and serve the adapter on the base in full precision (needs bitsandbytes).

`python four_bit.py HuggingFaceTB/SmolLM2-135M-Instruct out` with a model from the hub.
"""

import sys

import hora_torch
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

TEXT = "HoRA shares A over the heads of a projection and generates B from one hypernetwork."


def main(base: str, output: str, steps: int = 15) -> None:
    """Adapt the model at `base` in NF4; write the adapter to `output`, and load it on the float base."""
    torch.manual_seed(0)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(quantised), hora_torch.HoraConfig(r=8))
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-3)
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 7 == 0:
            print(f"step {step}: loss {loss.item():.3f} in four bits")
    model.save_pretrained(output)
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output).eval()
    print(f"loss {whole(input_ids=ids, labels=ids).loss.item():.3f} in full precision")


if __name__ == "__main__":
    main(*sys.argv[1:3])
