"""results.json as a page of the documentation."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

_PAGE = """# Quantised bases

<!-- written by nox -s quantised: do not edit -->

An adapter is trained, saved, exported and loaded on a quantised base as on any other: the base computes by itself, and
the adapter adds a branch in the dtype of the activations. Rows and heads are known from widths, not from how codes are
packed, and the adapter's files are those of the unquantised model: what is trained on one loads on the other. An
error says the exception: Transformers' `Conv1D` (GPT-2) is transposed where bitsandbytes quantises it, so that there
the LoRA export alone passes from one to the other.

```py
base = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
model = get_peft_model(prepare_model_for_kbit_training(base), HoraConfig())
```

## Merging into codes

`merge_adapter` reads the weight, adds the update in float32, and rounds the sum to codes again, one layer after the
other; nothing else stays in memory as floats. Before a layer is written, the new codes are compared with the sum and
tried on an input. A base whose codes cannot be read or written, or are not what it multiplies with, is refused, and
then no layer is merged.

- **What is lost is said.** A warning tells how much of the update the rounding of the worst layer costs; each layer has
  the numbers in `rounding`. Four bits often cost more than a small update is worth. `safe_merge=True` refuses to lose
  more than half of it.
- **Unmerging restores the codes**, every bit, since they are kept. A LoRA layer subtracts the update and rounds again.
- `merge_and_unload` leaves a quantised model, as PEFT does. For a merge without loss load the base in its full dtype,
  or keep the adapter apart: `hora_torch.export_lora` writes a LoRA that PEFT loads on the same quantised base.
- Everything else of a module stays: PEFT's LoRA loses the bias of an HQQ layer when it merges.

Bases that quantise activations outside of autograd (torchao's dynamic int8) pass no gradient on: training on one is an
error. On CPUs with AVX512-BF16, bitsandbytes packs four bits in another order when it first evaluates, rounds them
anew, and passes no gradient from then on; attaching an adapter switches that off.

## What was tried

Measured on {versions}, on a CPU, with float32 activations,
on a LLaMA of two layers with a width of {width}. The LoRA beside it is the export of the same adapter, loaded by PEFT,
so that both add the same update, whose norm is {update:.0%} of that of the weights.

- **train**: largest difference between the gradients and those on a float model with the weights that the base
  multiplies with, relative to the largest gradient
- **merge**: the norm of what rounding to codes loses, relative to that of the update; at 100% the merged weight is no
  closer to the sum than the weight without the adapter
- **unmerge**: by how much the weight differs from what it was before merging, relative to the update
- **save**: the adapter, loaded on a fresh base, computes the same
- **export**: the LoRA export, loaded by PEFT on a fresh base, changes the outputs by the same, up to the part shown

{table}

*Packed as in GPTQ* is a module without a `weight`, as GPTQ, AWQ and AQLM have: PEFT cannot write their codes, and its
LoRA does not adapt this one, whose class it does not know. *By hand* is `torchao.quantize_` without the config that
Transformers keeps and PEFT asks for. The table is of processors; on a GPU, bitsandbytes with 4 and 8 bits trains,
exports and loads as here (`test_gpu.py`), and the others were not tried.
"""


def page(results: Mapping[str, Any]) -> str:
    """The whole page, from the versions of the libraries and the rows by base."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    columns = ("train", "merge", "unmerge", "save", "export")
    lines = [
        "| base | " + " | ".join(columns) + " | LoRA: " + " | LoRA: ".join(columns[:4]) + " |",
        "|" + "---|" * (len(columns) + 5),
    ]
    for name, row in results["bases"].items():
        cells = [_cell(row["hora"].get(column)) for column in columns]
        cells += [_cell(row["lora"].get(column)) for column in columns[:4]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return _PAGE.format(versions=versions, width=results["width"], update=results["update"], table="\n".join(lines))


def faults(row: Row) -> list[str]:
    """What must not be: an answer of ours that is neither a refusal nor as good as it has to be."""
    limits = {"train": 1e-3, "merge": 2.0, "unmerge": 0.0, "export": 1e-2}
    found = []
    for column, answer in row["hora"].items():
        if isinstance(answer, float) and not answer <= limits[column]:
            found.append(f"{column} is {answer:.2g}")
        elif answer is False or (isinstance(answer, str) and answer.startswith("error")):
            found.append(f"{column}: {answer}")
    return found


def _cell(answer: Any) -> str:
    if answer is None:
        return ""
    if isinstance(answer, bool):
        return "✓" if answer else "**no**"
    if isinstance(answer, float):
        return "0" if answer == 0 else f"{answer:.1%}" if answer >= 1e-3 else f"{answer:.0e}"
    return answer.partition(":")[0]
