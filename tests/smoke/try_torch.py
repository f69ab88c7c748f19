"""hora-torch alone: a model is adapted, trained for a step, saved, loaded and merged."""

import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
from hora_torch import HoraConfig, plan, verify
from transformers import LlamaConfig, LlamaForCausalLM

COMMAND = Path(sys.executable).with_name("hora")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(**SIZES))
base.save_pretrained(folder := tempfile.mkdtemp())
batch = {"input_ids": (ids := torch.randint(0, 64, (2, 7))), "labels": ids}

print(plan(base, HoraConfig(r=4)))
model = peft.get_peft_model(base, HoraConfig(r=4))
optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
for _ in range(2):
    model(**batch).loss.backward()
    optimizer.step()
print(verify(model, batch))
with torch.no_grad():
    trained = model.eval()(ids).logits
    model.save_pretrained(f"{folder}/adapter")
    again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), f"{folder}/adapter").eval()
    torch.testing.assert_close(again(ids).logits, trained, rtol=0, atol=0)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, trained, rtol=1e-4, atol=1e-5)
subprocess.run([COMMAND, "inspect", f"{folder}/adapter"], check=True)
