"""The page that the demonstration leaves behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hora_spec import Factors
from matplotlib.figure import Figure

from hora_bench.demo.stages import MODEL, Row, Size
from hora_bench.experiments.similarity.measures import cosines_of_b, off_diagonal
from hora_bench.report.writing import drawn, image, write_html
from hora_bench.report.writing import table as table_of

CAUTION = (
    "This is a demonstration, not a comparison: one learning rate for all methods, one seed, one pass over 1000 "
    "images. For a comparison use hora-bench run --tune with several seeds."
)
HEADER = ("", "accuracy before", "after", "adapter parameters", "with head", "step", "memory")
CHECKS = ("", "accuracy", "numbers", "speed")
MEMORY_NOTE = (
    "Memory: the most that one training step holds, weights included; on torch as it allocates, on JAX as XLA plans. "
    "Step: median, the first left out."
)


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the main table."""
    return [
        (
            row.label,
            f"{row.before_pct:.1f} %",
            f"{row.after_pct:.1f} %",
            f"{row.adapter_params_count:,}",
            f"{row.adapter_params_count + row.head_params_count:,}",
            f"{1000 * row.step_time_s:.0f} ms",
            f"{row.peak_bytes / 2**20:.0f} MiB",
        )
        for row in rows
    ]


def checks(rows: Sequence[Row], exchange: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """What was verified, and how far from exact it is."""
    cells = [
        (
            f"merged, {row.label}",
            f"{row.merged_pct:.1f} % (adapted {row.after_pct:.1f} %)",
            f"logits differ by at most {row.merged_difference:.1e}",
            f"forward {1000 * row.forward_s:.0f} ms, merged {1000 * row.merged_forward_s:.0f} ms",
        )
        for row in rows
        if np.isfinite(row.merged_pct)
    ]
    cells.append(("exported as LoRA, loaded by PEFT", "", f"logits differ by at most {exchange['lora']:.1e}", ""))
    same = f"{100 * exchange['same_predictions']:.1f} % equal predictions"
    cells.append(("trained on torch, loaded in JAX", same, f"logits differ by at most {exchange['jax']:.1e}", ""))
    first = abs(np.subtract(rows[0].curve.loss, rows[1].curve.loss))
    cells.append(("loss of torch and JAX", "", f"differs by at most {first.max():.1e} over {len(first)} steps", ""))
    return cells


def write(path: Path, rows: Sequence[Row], exchange: dict[str, float], size: Size, seconds: float) -> None:
    """Write ``report.html``."""
    settings = size.recipe
    lead = (
        f"A pretrained ViT-S/14 ({MODEL}) learns scikit-learn's handwritten digits: 1000 training images and "
        f"{size.test_count} test images at {size.image_size} px, {size.steps} AdamW steps of {size.batch_size}, "
        f"learning rate {settings.learning_rate:g} for every method, seed 0. Everything took {seconds:.0f} s."
    )
    lines = ["# HoRA: the demonstration", "", lead, "", "## Fine-tuning", *table_of(HEADER, table(rows))]
    lines += [*_losses(rows), *_bars(rows), MEMORY_NOTE, "", CAUTION, ""]
    lines += ["## Merging and exchange", *table_of(CHECKS, checks(rows, exchange))]
    lines += ["## How alike the heads are", *_similarity(rows)]
    lines += ["Cosine similarity between the factors B of all heads; it says nothing of accuracy."]
    write_html(path, "HoRA: the demonstration", lines)


def _losses(rows: Sequence[Row]) -> list[str]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for row, style in zip(rows, ("-", "--", ":"), strict=True):
        axes.plot(np.arange(1, len(row.curve.loss) + 1), row.curve.loss, style, label=row.label)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(frameon=False)
    caption = "Training loss. HoRA's two curves lie on each other: same start, same data, same updates."
    return image(caption, drawn(figure))


def _bars(rows: Sequence[Row]) -> list[str]:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = [row.label for row in rows]
    for axes, (title, values) in zip(
        panels,
        (
            ("accuracy, %", [row.after_pct for row in rows]),
            ("adapter parameters, thousands", [row.adapter_params_count / 1e3 for row in rows]),
            ("step, ms", [1e3 * row.step_time_s for row in rows]),
        ),
        strict=True,
    ):
        axes.barh(labels, values, color=["#2f6f9f", "#5aa469", "#9aa5b1"])
        axes.bar_label(axes.containers[0], fmt="%.3g", padding=2)
        axes.set(title=title, xlim=(0, 1.2 * max(values)))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not panels[0]:
            axes.set_yticks([])
    return image("Accuracy, size and time of a step.", drawn(figure))


def _similarity(rows: Sequence[Row]) -> list[str]:
    with_factors = [row for row in rows if row.b_factors]
    figure = Figure(figsize=(4 * len(with_factors) + 4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(with_factors) + 1)
    for axes, row in zip(panels, with_factors, strict=False):
        last_q = [name for name in row.b_factors if name.endswith(".q")][-1]
        shown = axes.imshow(_cosines(row.b_factors[last_q]), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set(title=f"{row.label}\n{last_q}", xlabel="head", ylabel="head")
    figure.colorbar(shown, ax=panels[: len(with_factors)], shrink=0.8)
    for row in with_factors:
        means = [off_diagonal(_cosines(b)).mean() for b in row.b_factors.values()]
        panels[-1].hist(means, bins=np.linspace(-1, 1, 41), alpha=0.6, label=row.label)
    panels[-1].set(xlabel="mean cosine between heads", ylabel="projections")
    panels[-1].legend(frameon=False)
    caption = "Similarity of B between heads: the last Q projection, and the mean of every projection."
    return image(caption, drawn(figure))


def _cosines(b: Any) -> Any:
    return cosines_of_b(Factors(np.empty(0), b))
