"""The page that the demonstration leaves behind, and what it does not overwrite."""

import re

import numpy as np
import pytest
from hora_bench.demo import command, page
from hora_bench.demo.stages import QUICK, Row
from hora_bench.training import Curve
from hora_spec import HoraError


def row(label, **more):
    rng = np.random.default_rng(0)
    factors = {f"blocks.{i}.attn.{p}": rng.standard_normal((6, 64, 8)) for i in range(2) for p in "qv"}
    curve = Curve([2.0, 1.5, 1.0], [0.1, 0.1, 0.1])
    return Row(label, 10.0, 90.0, 1000, 3850, 0.1, 2**28, curve, np.zeros((4, 10)), b_factors=factors, **more)


def test_the_page_holds_every_number_and_asks_nobody(tmp_path):
    merged = {"forward_s": 0.1, "merged_forward_s": 0.1, "merged_pct": 89.9, "merged_difference": 1e-6}
    rows = [row("HoRA · torch", **merged), row("HoRA · JAX", **merged), row("LoRA (PEFT) · torch")]
    exchange = {"lora": 1e-5, "jax": 1.3e-5, "same_predictions": 1.0}
    page.write(tmp_path / "report.html", rows, exchange, QUICK, 31.4)
    text = (tmp_path / "report.html").read_text()
    for cells in (page.table(rows), page.checks(rows, exchange)):
        for cell in (cell for line in cells for cell in line if cell):
            assert f"<td>{cell}</td>" in text
    assert page.CAUTION in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert text.count("<img ") == 3
    assert text.count("<table>") == text.count("</table>") == 2


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/mine").touch()
    with pytest.raises(HoraError, match=r"replaces what an earlier one wrote, got .*adapter of something else"):
        command.command(quick=True, out=tmp_path)
    assert (tmp_path / "adapter/mine").exists()
