"""One of two processes that share models in many ways; each writes the numbers it came to.

python parallel_worker.py RENDEZVOUS_FILE OUTPUT RANK WORLD_SIZE
"""

import os
import shutil
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import partial

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS, BATCH, WORLD = 3, 4, 2
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def base(kind="llama", **kwargs):
    """A base with grouped queries, the same in every process."""
    import transformers

    torch.manual_seed(0)
    if kind == "phi3":
        return transformers.Phi3ForCausalLM(
            transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0, **kwargs)
        )
    if kind == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **kwargs))


def adapt(model, **kwargs):
    """The same adapter in every process, with an update that is not zero."""
    import peft
    from hora_torch import HoraConfig

    torch.manual_seed(1)
    small = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}
    return peft.get_peft_model(model, HoraConfig(**(small | kwargs)))


def batches():
    """Token batches of all processes together."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 32, (BATCH, 6), generator=generator) for _ in range(STEPS)]


def whole(tensor):
    """A detached copy of all of a tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def hyper(model):
    """Parameters of the hypernetworks by name."""
    return {name: param for name, param in model.named_parameters() if "hora_hyper" in name}


def train(model, rank=0, world=1):
    """Losses, first gradients, trained parameters, and the loss in evaluation before and after."""
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.5)
    found = {"losses": [], "evaluated": [evaluated(model, rank, world)]}
    for batch in batches():
        share = batch.chunk(world)[rank]
        loss = model.train()(input_ids=share, labels=share).loss
        loss.backward()
        if not found["losses"]:
            found["gradients"] = {name: whole(param.grad) for name, param in hyper(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.detach().clone())
        found["evaluated"].append(evaluated(model, rank, world))
    found["parameters"] = {name: whole(param) for name, param in hyper(model).items()}
    for key in ("losses", "evaluated"):
        found[key] = torch.stack(found[key])
        if world > 1:
            torch.distributed.all_reduce(found[key])
            found[key] /= world
    return found


def evaluated(model, rank, world):
    """Loss in evaluation."""
    share = batches()[0].chunk(world)[rank]
    with torch.no_grad():
        return model.eval()(input_ids=share, labels=share).loss.clone()


def attentions(model):
    """The attention of every block, adapted or not."""
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


def by_heads(model, mesh, inner="", outputs=None):
    """Heads of q, k and v spread over the processes, by torch's own tensor parallelism."""
    columns = {} if outputs is None else {"output_layouts": outputs}
    plan = {name: ColwiseParallel(**columns) for name in ("q_proj" + inner, "k_proj", "v_proj" + inner)}
    if outputs is None:
        plan["o_proj"] = RowwiseParallel()
    for attention in attentions(model):
        parallelize_module(attention, mesh, plan)
    return model


def sharded_before(mesh, rank):
    """Tensor parallelism, then the adapter."""
    return train(adapt(by_heads(base(), mesh)))


def sharded_after(mesh, rank):
    """The adapter, then tensor parallelism of the layers that it wraps."""
    return train(by_heads(adapt(base()), mesh, inner=".base_layer"))


def gathered(mesh, rank):
    """Each process ends with the rows of all heads."""
    return train(adapt(by_heads(base(), mesh, outputs=Replicate())))


def two_adapters(mesh, rank):
    """Both act."""
    model = adapt(by_heads(base(), mesh))
    return train(with_second(model))


def with_second(model):
    """A model with a second adapter, on v alone, both active."""
    from hora_torch import HoraConfig

    torch.manual_seed(3)
    second = HoraConfig(r=3, hidden_dim=6, head_embed_dim=5, init_weights=False, target_modules=["v_proj"])
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    return model


def loaded_by_heads(mesh, rank):
    """Tensor parallelism as transformers sets it up."""
    import transformers

    path = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(path)
    if rank == 0:
        base().save_pretrained(path[0])
    torch.distributed.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(path[0], tp_plan="auto", device_mesh=mesh)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(path[0])
    return train(adapt(model))


def merged(mesh, rank):
    """The loss of the merged model, and after the way back."""
    return merging(adapt(by_heads(base(), mesh)))


def merging(model):
    """Losses before, during and after a merge."""
    before = evaluated(model, 0, 1)
    model.merge_adapter()
    during = evaluated(model, 0, 1)
    model.unmerge_adapter()
    return {"evaluated": torch.stack([before, during, evaluated(model, 0, 1)])}


def rows_of_inputs(mesh, rank):
    """An adapted o_proj whose input features are spread over the processes."""
    model = adapt(by_heads(base(), mesh), target_modules=["q_proj", "o_proj"], num_heads=4)
    return train(model)


def rows_of_inputs_of_q(mesh, rank):
    """An adapted q_proj whose input features are spread, and whose output is whole."""
    model = base()
    for attention in attentions(model):
        parallelize_module(attention, mesh, {"q_proj": RowwiseParallel(input_layouts=Replicate())})
    return train(adapt(model))


def sequence(mesh, rank):
    """Each process has some of the tokens, and after the layer some of the heads of all tokens."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    parallelize_module(model, mesh, {"0": ColwiseParallel(input_layouts=Shard(0))})
    model = adapt(model, target_modules=["0"], num_heads=2)
    model(torch.ones(3, 8))
    return {}


def fused(mesh, rank):
    """Rows of q, k and v in one weight, cut in the middle, and put together again."""
    model = base("phi3")
    for attention in attentions(model):
        parallelize_module(attention, mesh, {"qkv_proj": ColwiseParallel(output_layouts=Replicate())})
    return train(adapt(model))


def head_by_head(mesh, rank):
    """Rows of q, k and v of each head together, so that each process has all rows of its heads."""
    return train(adapt(_cut_between_heads(base("gpt_neox"), mesh)))


def head_by_head_merged(mesh, rank):
    """The loss of the merged model, and after the way back."""
    return merging(adapt(_cut_between_heads(base("gpt_neox"), mesh)))


def _cut_between_heads(model, mesh):
    for layer in model.gpt_neox.layers:
        plan = {"query_key_value": ColwiseParallel(), "dense": RowwiseParallel()}
        parallelize_module(layer.attention, mesh, plan)
    return model


def plain_layers(model):
    """Every adapted and every other linear layer."""
    from hora_torch import HoraLinear

    adapted = [module for module in model.modules() if isinstance(module, HoraLinear)]
    inside = {id(part) for module in adapted for part in module.modules()}
    others = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in inside]
    return adapted + others


def hypernets(model):
    """Every hypernetwork."""
    return [module for name, module in model.named_modules() if name.endswith("hora_hyper.default")]


UNITS = {
    "blocks": lambda model: model.base_model.model.model.layers,
    "whole": lambda model: [],
    "attentions": attentions,
    "linears": plain_layers,
    "adapted": lambda model: plain_layers(model)[:4],
    "hypernets": lambda model: [
        module for name, module in model.named_modules() if name.endswith("hora_hyper.default")
    ],
}


def spread(model, units):
    """Parameters spread over the processes, gathered unit by unit."""
    for unit in UNITS[units](model):
        fully_shard(unit)
    fully_shard(model)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return model


def fsdp(units, mesh, rank, checkpointing=None):
    """Data and parameters shared by both processes."""
    model = adapt(base())
    if checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return train(spread(model, units), rank, WORLD)


JOINT = {"r": 2, "sharing": "a", "a_source": "fixed", "init_weights": True}


def jointly_started(model, given):
    """The model with an A that all processes found together, each from the batches that it was given."""
    from hora_torch import joint_a

    joint_a(model, given, lambda model, batch: model(input_ids=batch, labels=batch).loss)
    return model


def fsdp_joint(mesh, rank):
    """A fixed A, which is no parameter and so is whole in both processes; half of each batch."""
    shares = [batch.chunk(WORLD)[rank] for batch in batches()]
    return train(jointly_started(spread(adapt(base(), **JOINT), "blocks"), shares), rank, WORLD)


def joint_fsdp(mesh, rank):
    """More batches in one process than in the other, while the model is whole."""
    model = jointly_started(adapt(base(), **JOINT), batches()[rank::WORLD])
    return train(spread(model, "blocks"), rank, WORLD)


def fsdp_merged(mesh, rank):
    """The same input in both processes."""
    return merging(spread(adapt(base()), "blocks"))


CHECKS = {
    "sharded before": sharded_before,
    "sharded after": sharded_after,
    "loaded by heads": loaded_by_heads,
    "gathered": gathered,
    "two adapters": two_adapters,
    "merged": merged,
    "rows of inputs": rows_of_inputs,
    "rows of inputs of q": rows_of_inputs_of_q,
    "sequence": sequence,
    "fused": fused,
    "head by head": head_by_head,
    "head by head, merged": head_by_head_merged,
    **{f"fsdp {units}": partial(fsdp, units) for units in UNITS},
    "fsdp merged": fsdp_merged,
    "fsdp blocks, joint start": fsdp_joint,
    "joint start, fsdp blocks": joint_fsdp,
    "fsdp blocks, checkpoints": partial(fsdp, "blocks", checkpointing=False),
    "fsdp blocks, reentrant checkpoints": partial(fsdp, "blocks", checkpointing=True),
}


def outcome(check, mesh, rank):
    """What a check found, or how it was refused or failed."""
    from hora_spec import HoraError

    try:
        return check(mesh, rank)
    except HoraError as error:
        return {"refused": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()[-2000:]}


def main(rendezvous, output, rank, world):
    """Run every check and write what each found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    found = {}
    for name, check in CHECKS.items():
        found[name] = outcome(check, mesh, rank)
        torch.save(found, f"{output}.{rank}")
    torch.distributed.barrier()
    os._exit(0)  # a thread of Gloo that releases a tensor after the interpreter's end aborts (pytorch/pytorch#190489)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]))
