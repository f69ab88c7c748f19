"""One process of a data-parallel run: trains a tiny adapted LLaMA for a few steps and writes its adapter.

python distributed_worker.py ddp|fsdp RENDEZVOUS_FILE OUTPUT RANK WORLD_SIZE
"""

import os
import sys

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

STEPS, BATCH = 3, 4


def build():
    """The adapted model and an optimiser, the same in every process."""
    import peft
    import transformers
    from hora_torch import HoraConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    config = HoraConfig(r=2, hidden_dim=6, head_embed_dim=5, init_weights=False)
    return peft.get_peft_model(base, config)


def batches():
    """Token batches of all processes together."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (BATCH, 6), generator=generator) for _ in range(STEPS)]


def train(model, optimizer, rank, world, backward):
    """Loss of this process's share of each batch."""
    losses = []
    for batch in batches():
        share = batch.chunk(world)[rank]
        loss = model(input_ids=share, labels=share).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    return torch.stack(losses)


def main(mode, rendezvous, output, rank, world):
    """Train in one of the modes; rank 0 writes losses and parameters."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    model = build()
    if mode == "fsdp":  # what accelerate calls; accelerate 1.15 itself shards on accelerators alone
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    backward = torch.Tensor.backward
    if mode == "ddp":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    losses = train(model, optimizer, rank, world, backward)
    torch.distributed.all_reduce(losses)
    sharded = any(isinstance(param, DTensor) for param in model.parameters())
    state = {
        name.removeprefix("module."): param.full_tensor() if isinstance(param, DTensor) else param.detach()
        for name, param in model.named_parameters()
        if "hora_hyper" in name
    }
    if rank == 0:
        found = {"losses": losses / world, "state": state, "sharded": sharded, "type": type(model).__name__}
        torch.save(found, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of Gloo that releases a tensor after the interpreter's end aborts (pytorch/pytorch#190489)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]))
