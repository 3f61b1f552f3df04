"""The model card that a training writes beside its weights: data, steps, time, scores, licence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LICENCE = "Apache-2.0, as the package. Weights are float16 safetensors."


def score_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Scores as a Markdown table; a row has what, value, low, high, n and chance (NaN where there is none).

    >>> print(score_table([{"what": "a", "value": 0.5, "low": 0.41, "high": 0.6, "n": 100, "chance": math.nan}]))
    | measure | value [95% interval] | chance | n |
    |---|---|---|---|
    | a | .50 [.41, .60] |  | 100 |
    """
    lines = ["| measure | value [95% interval] | chance | n |", "|---|---|---|---|"]
    for row in rows:
        chance = "" if math.isnan(row["chance"]) else _number(row["chance"])
        interval = f"[{_number(row['low'])}, {_number(row['high'])}]"
        lines.append(f"| {row['what']} | {_number(row['value'])} {interval} | {chance} | {row['n']} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if abs(value) < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def write_card(
    folder: Path,
    summary: str,
    data: str,
    stages: Iterable[tuple[str, int, int, float]],
    scores: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Write ``README.md`` into a model's folder.

    Args:
        summary: What the model is.
        data: What it was trained on.
        stages: Name, steps, rows a step and seconds of each part of the training.
        scores: Rows as `score_table` takes them; when empty the card says how to measure.
    """
    rows = "\n".join(
        f"| {stage} | {steps}{f' x {batch}' * bool(batch)} | {seconds / 60:.0f} min |"
        for stage, steps, batch, seconds in stages
    )
    scores = list(scores)
    measured = score_table(scores) if scores else f"`python -m experiments.zoo_quality --model {folder.name}` measures them."
    text = (
        f"# {folder.name}\n\n{summary}\n\n**Data.** {data}\n\n**Training** (`python -m recipes`)\n\n"
        f"| stage | steps x rows | wall time |\n|---|---|---|\n{rows}\n\n**Scores**, on held-out scenes\n\n{measured}\n\n{LICENCE}\n"
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path
