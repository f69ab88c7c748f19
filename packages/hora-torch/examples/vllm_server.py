"""Train an adapter, write it for vLLM, and ask vLLM's server for the base and for the adapter, each by its name.

`python vllm_server.py HuggingFaceTB/SmolLM2-135M-Instruct lora PYTHON`: PYTHON has vLLM, often in an environment of its
own. The address is that of this machine.
"""

import json
import subprocess
import sys
import urllib.request

import hora_torch
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT, PORT = "The quick brown fox jumps over the sleeping cat, and the cat does not mind at all.", "8123"


def main(base: str, output: str, python: str, steps: int = 25) -> None:
    """Teach the model at `base` one sentence, and let vLLM go on from its beginning."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), hora_torch.HoraConfig(r=8))
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hora_torch.export_lora(model, output, for_server="vllm")

    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", "base"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"hora={output}", "--max-model-len", "128"]
    with subprocess.Popen([*command, "--port", PORT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        for line in server.stdout:
            print(line.decode(), end="", file=sys.stderr)
            if b"startup complete" in line:
                break
        for name in ("base", "hora"):
            asked = {"model": name, "prompt": TEXT[:20], "max_tokens": 16, "temperature": 0}
            request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(asked).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request) as answer:
                print(f"{name}: {TEXT[:20]!r} -> {json.load(answer)['choices'][0]['text']!r}")
        server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:4])
