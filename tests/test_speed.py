"""The benchmarks in their short form: they run, and both sides of a ratio do the same thing. Their numbers mean nothing here."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        return importlib.import_module("benchmarks.run")


@pytest.mark.parametrize(
    ("name", "rows"),
    [("storage", 4), ("streams", 3), ("stall", 1), ("probes", 2), ("captions", 1), ("training", 1)],
)
def test_a_benchmark_runs(run: Any, tmp_path: Path, name: str, rows: int) -> None:
    subject = run.MODELS["tiny"]("cpu", torch.float32, True)
    with torch.no_grad():
        found = list(run.BENCHMARKS[name](run.Setting(subject, 1, 4, 2, tmp_path, smoke=True)))
    assert len(found) == rows
    for row in found:
        assert row.n == 1 and math.isfinite(row.ratio) and row.ratio > 0 and row.detail, row
    assert {row.benchmark for row in found} == {name}
    if name == "storage":
        assert found[-1].ratio < 0.25, "one of five timesteps reads a fifth of the bytes"


def test_rows_replace_older_ones_of_the_same_benchmark(run: Any, tmp_path: Path) -> None:
    measure = importlib.import_module("benchmarks.measure")
    where = dict.fromkeys(measure.PROVENANCE, "here")
    for values in ([2.0, 3.0, 4.0], [1.0, 1.1, 1.2]):
        measure.update_results(tmp_path / "results.csv", [measure.row_of("storage", "reading", values, "<= 2")], where)
    measure.write_rows(tmp_path / "faults.csv", [{"what": "extract", "kills": 50, "equal": "yes"}])
    measure.write_report(tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "| storage | reading | 1.100 | 1.000 | 1.200 | 3 | <= 2 | yes |  |" in text and "3.000" not in text
    assert "| extract | 50 | yes |" in text
