"""Push an adapter to the hub, and load it from there by its name.

`python hub.py HuggingFaceTB/SmolLM2-135M-Instruct USER/NAME`, after `hf auth login` or with `HF_TOKEN` set.
"""

import sys

import hora_torch
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "HoRA shares A over the heads of a projection and generates B from one hypernetwork."


def main(base: str, repository: str, steps: int = 15) -> None:
    """Adapt the model at `base`, push the adapter to `repository`, and load it as anybody would."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), hora_torch.HoraConfig(r=8))
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-3)
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 7 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.push_to_hub(repository, private=True)

    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repository).eval()
    with torch.no_grad():
        found, expected = (each(input_ids=ids).logits for each in (loaded, model.eval()))
    print(f"by way of {repository}: logits differ by {(found - expected).abs().max().item():.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
