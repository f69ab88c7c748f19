"""Train an adapter, write it for llama.cpp, and ask a llama.cpp server with and without it (needs xllamacpp, gguf).

`python llama_cpp.py BASE BASE.gguf`: the directory of a model that transformers loads, and the same model as GGUF.
"""

import json
import sys
import urllib.request

import hora_spec
import hora_torch
import peft
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The quick brown fox jumps over the sleeping cat, and the cat does not mind at all."


def main(base: str, gguf: str, steps: int = 25) -> None:
    """Teach the model at `base` one sentence, and let llama.cpp go on from its beginning."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), hora_torch.HoraConfig(r=8))
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hora_spec.export_gguf(hora_torch.to_adapter(model), "adapter.gguf", base=gguf, weights=base)

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = gguf, 128, -1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("adapter.gguf", 1.0)]
    server = xllamacpp.Server(params)
    for scale in (0.0, 1.0):
        asked = {"prompt": TEXT[:20], "n_predict": 16, "temperature": 0, "lora": [{"id": 0, "scale": scale}]}
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            print(f"adapter at {scale}: {TEXT[:20]!r} -> {json.load(answer)['content']!r}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
