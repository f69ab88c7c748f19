"""Shard a model and its adapter over processes with FSDP2, and save what they trained together.

`torchrun --nproc-per-node 2 fsdp2.py HuggingFaceTB/SmolLM2-135M-Instruct out` with a model from the hub.
"""

import pydoc_data.topics
import sys

import hora_torch
import peft
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base: str, output: str, steps: int = 8) -> None:
    """Adapt the model at `base`, each process on its own text; the first one writes the adapter to `output`."""
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), hora_torch.HoraConfig(r=8))
    for block in model.base_model.model.model.layers:  # a block, or an attention; never a projection alone
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    text = pydoc_data.topics.topics["class" if rank else "import"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"][:64])[None].to(model.device)
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(mean := loss.detach() / world)
        if rank == 0 and step % 3 == 0:
            print(f"step {step}: mean loss of {world} processes {mean.item():.3f}")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(output, state_dict=state)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
