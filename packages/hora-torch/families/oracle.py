"""The true rows and heads of an attention module, from gradients alone: nothing is read from names or counts.

One position of the attention's context, before its output projection, is differentiated by the outputs of the
projections inside. A row *reaches* a column of the context if that gradient is not zero. Softmax joins the width of
one head and nothing else, so rows of q and k reach all columns of their heads, rows of v one column in each, and q
alone reaches no position but its own.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Call = Callable[[nn.Module], Any]


@dataclass(frozen=True, slots=True)
class Reach:
    """Rows of one weight: the columns that each reaches, and whether it does from another position."""

    columns: Tensor
    elsewhere: Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a weight that are said to be one projection, heads after heads."""

    role: str | None
    weight: str
    rows: Sequence[int]
    num_heads: int
    head_dim: int


def verdict(reach: Mapping[str, Reach], parts: Sequence[Part]) -> str:
    """``"ok"``, ``"unseen: ..."`` where gradients do not tell, or ``"WRONG: ..."``."""
    wide = {name: found.columns.sum(1) > 1 for name, found in reach.items()}
    local = any(bool((wide[name] & ~found.elsewhere).any()) for name, found in reach.items())
    blocks = _blocks([found.columns[wide[name] & ~(found.elsewhere & local)] for name, found in reach.items()])
    if blocks is None:
        return "unseen: no rows reach the columns of one head alone"
    if not all(bool(reach[part.weight].columns[part.rows].any()) for part in parts):
        return "unseen: some rows reach no column at all"
    return next((fault for part in parts if (fault := _fault(part, reach[part.weight], blocks, local))), "ok")


def _fault(part: Part, reach: Reach, blocks: Tensor, local: bool) -> str:
    columns, elsewhere = reach.columns[part.rows], reach.elsewhere[part.rows]
    counts = columns.float() @ blocks.float().T
    heads = (counts > 0).view(part.num_heads, part.head_dim, -1)
    what = part.role or part.weight
    if bool((heads != heads[:, :1]).any()):
        return f"WRONG: rows of one head of {what} belong to several heads"
    if bool((heads[1:, 0] == heads[:-1, 0]).all(-1).any()):
        return f"WRONG: one head of {what} is taken for several"
    if part.role == "q" and local and bool(elsewhere.any()):
        return "WRONG: rows said to be q are read from other positions"
    if part.role == "v" and not (bool(elsewhere.all()) and counts.amax() <= 1):
        return "WRONG: rows said to be v are not carried to the output"
    if part.role == "k" and not (bool(elsewhere.any()) and counts.amax() > 1):
        return "WRONG: rows said to be k choose no positions"
    return ""


def _blocks(columns: list[Tensor]) -> Tensor | None:
    """Columns of each head: the smallest sets that rows reach together; heads x columns."""
    sets = torch.cat(columns).unique(dim=0)
    inside = (sets[:, None] & ~sets[None]).any(-1) | torch.eye(len(sets), dtype=torch.bool)
    smallest = sets[(inside.T).all(1)] if len(sets) else sets
    return smallest if len(sets) and bool((smallest.sum(0) == 1).all()) else None


@dataclass
class _Record:
    """What happened in the last call of an attention module."""

    query: Tensor | None = None
    context: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


def reach(model: nn.Module, call: Call, attention: str, parts: Collection[str]) -> dict[str, Reach]:
    """Which rows of the weights inside one attention module reach which columns of its context.

    Parameters
    ----------
    model
        In evaluation mode; its weights are as they were afterwards.
    call
        Runs the model.
    attention
        Path of the attention module.
    parts
        Paths of the weights that the position should depend on.

    Returns
    -------
    dict
        By the path of each weight in `model`.
    """
    owner = model.get_submodule(attention)
    weights = {f"{attention}.{name}".lstrip("."): weight for name, weight in _weights(owner)}
    with torch.enable_grad(), _recorded(owner, attention) as record, _identity_outputs(owner):
        call(model)
        if record.context is None:
            return {}
        read = {name: weight for name, weight in weights.items() if name not in record.inputs}
        sources = [record.outputs[name] if name in record.outputs else [weights[name]] for name in parts]
        context = _context(record, sources).flatten(0, -2)
        queries, found = record.query.detach().flatten(0, -2), {}
        count = len(context)
        for index in (count - 1, count // 2, count // 4, 0):  # some may be padding, the first may see itself alone
            found = {name: _from_outputs(context[index], tensors) for name, tensors in record.outputs.items()}
            query = queries[min(index, len(queries) - 1)]
            found |= {name: _from_weight(context[index], weight, query) for name, weight in read.items()}
            if all(bool(found[name].columns.any()) for name in parts if name in found):
                break
        return found


def attend(attention: nn.Module, hidden: Tensor) -> Any:
    """Call an attention module alone, where no input of the model reaches it; rotations are by zero."""
    tokens = hidden.shape[1]
    one, zero = torch.ones(1, tokens, 1), torch.zeros(1, tokens, 1)
    names = list(inspect.signature(attention.forward).parameters)
    if "cu_seqlens" in names:
        packed = {"cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32), "max_seqlen": tokens}
        packed |= {"position_embeddings": (one[0], zero[0])}
        return attention(hidden[0], **{name: value for name, value in packed.items() if name in names})
    known = dict.fromkeys(("query", "key", "value", "hidden_states", "key_value_states", "x", "context"), hidden)
    known |= {"attention_mask": None, "past_key_values": None, "use_cache": False, "cos": one, "sin": zero}
    known |= {"position_embeddings": (one, zero), "position_ids": torch.arange(tokens)[None]}
    first = () if names[0] in known else (hidden,)
    return attention(*first, **{name: value for name, value in known.items() if name in names[len(first) :]})


def _context(record: _Record, sources: list[list[Tensor]]) -> Tensor:
    """Input of the first projection behind all sources, or else the output of the whole module."""
    for name, value in record.inputs.items():
        if all(_depends(value, source) for source in sources):
            for later in list(record.inputs)[list(record.inputs).index(name) :]:
                record.outputs.pop(later)
            return value
    return record.context


def _from_outputs(position: Tensor, outputs: list[Tensor]) -> Reach:
    rows = outputs[0].shape[-1]
    columns, elsewhere = torch.zeros(rows, len(position), dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    for grad in _jacobians(position, outputs):
        used = grad.flatten(1, -2) != 0
        columns |= used.any(1).T
        elsewhere |= (used.sum(1) > 1).any(0)
    return Reach(columns, elsewhere)


def _from_weight(position: Tensor, weight: Tensor, query: Tensor) -> Reach:
    """The same for a weight that is read past its module: q alone has gradients along the input of its own position."""
    columns = torch.zeros(len(weight), len(position), dtype=torch.bool)
    elsewhere = torch.zeros(len(weight), dtype=torch.bool)
    for grad in _jacobians(position, [weight]):
        used = (grad != 0).any(-1)
        columns |= used.T
        if grad.shape[-1] == len(query):
            used &= nn.functional.cosine_similarity(grad, query[None, None], dim=-1).abs() < 0.995
        elsewhere |= used.any(0)
    return Reach(columns, elsewhere)


def _jacobians(position: Tensor, tensors: list[Tensor]) -> Iterator[Tensor]:
    """Derivative of all columns of a position by each tensor, where there is one: columns x shape of the tensor."""
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not (tensors and position.requires_grad):
        return
    settings: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        grads = torch.autograd.grad(position, tensors, torch.eye(len(position)), is_grads_batched=True, **settings)
    except RuntimeError:  # an operation that cannot be batched
        each = [torch.autograd.grad(value, tensors, **settings) for value in position]
        grads = [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
    yield from (grad.nan_to_num() for grad in grads if grad is not None)


def _depends(value: Tensor, tensors: list[Tensor]) -> bool:
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not (tensors and value.requires_grad) or any(value is tensor for tensor in tensors):
        return False
    grads = torch.autograd.grad(value.sum(), tensors, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)


@contextmanager
def _recorded(owner: nn.Module, attention: str) -> Iterator[_Record]:
    """Inputs and outputs of the projections in the last call of `owner`, and its own; norms are left out."""
    record = _Record()

    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.__init__()
        record.query = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def finish(_: nn.Module, __: Any, output: Any) -> None:
        record.context = output if isinstance(output, Tensor) else output[0]

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            record.inputs[name] = args[0]
            record.outputs.setdefault(name, []).append(output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(owner.register_forward_pre_hook(start, with_kwargs=True))
        for name, module in owner.named_modules():
            if _is_linear(module):
                path = f"{attention}.{name}.weight".lstrip(".")
                stack.enter_context(module.register_forward_hook(keep(path)))
            elif "norm" in name.rpartition(".")[2].lower() and not any(map(_is_linear, module.modules())):
                stack.enter_context(module.register_forward_hook(lambda _, args, __: args[0]))
        stack.enter_context(owner.register_forward_hook(finish))
        yield record


@contextmanager
def _identity_outputs(owner: nn.Module) -> Iterator[None]:
    """Output projections that a function reads past their module pass the context on as it is."""
    owners = [module for module in owner.modules() if isinstance(getattr(module, "out_proj", None), nn.Linear)]
    read = [module.out_proj for module in owners if isinstance(module, nn.MultiheadAttention) or _reads_weights(module)]
    kept = [(param, param.detach().clone()) for module in read for param in module.parameters()]
    with torch.no_grad():
        for module in read:
            nn.init.eye_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in kept:
                param.copy_(value)


def _reads_weights(module: nn.Module) -> bool:
    functions = [value for value in vars(type(module)).values() if isinstance(value, FunctionType)]
    return any("multi_head_attention_forward" in function.__code__.co_names for function in functions)


def _weights(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in owner.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            for own in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if getattr(module, own) is not None:
                    yield f"{prefix}{own}", getattr(module, own)
        elif isinstance(module, nn.Linear):
            yield f"{prefix}weight", module.weight


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
