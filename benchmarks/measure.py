"""Alternating measurements, and what has to be written beside their results.

The invariant: a ratio is taken within one pair of neighbouring runs, so a machine that is slow for a while is slow for both.
"""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
PACKAGES = ("diffprobe", "torch", "diffusers", "transformers", "numpy", "zarr", "attention-map-diffusers")
PROVENANCE = ("model", "machine", "versions", "date", "command")
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One result: the median of `n` ratios and their extremes."""

    benchmark: str
    what: str
    ratio: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0
    target: str = ""
    detail: str = ""
    met: str = ""


def row_of(benchmark: str, what: str, ratios: Sequence[float], target: str = "", detail: str = "") -> Row:
    """A row from its ratios; the target reads like "<= 1.02".

    >>> row_of("recorder", "blocks", [1.0, 1.01, 1.05], "<= 1.02").met
    'yes'
    """
    median = statistics.median(ratios)
    met = ""
    if target:
        sign, bound = target.split()
        met = "yes" if (median <= float(bound) if sign == "<=" else median >= float(bound)) else "no"
    return Row(benchmark, what, median, min(ratios), max(ratios), len(ratios), target, detail, met)


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call by a clock, the wall's by default; a GPU's queue is emptied before and after."""
    gc.collect()  # the garbage of the call before belongs to it
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def alternate(
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int,
    after: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Seconds of both, A B A B ..., after one pair that is thrown away; `after` clears up, untimed, behind each pair."""
    times = []
    for _ in range(pairs + 1):
        times.append((seconds(first, clock), seconds(second, clock)))
        after()
    return times[1:]


def detail_of(times: Sequence[tuple[float, float]], per: int = 1, unit: str = "s") -> str:
    """The medians behind a ratio: "0.412 s against 0.398 s", B first."""
    first, second = (statistics.median(column) / per for column in zip(*times, strict=True))
    return f"{second:.3g} {unit} against {first:.3g} {unit}"


def peak_bytes() -> int:
    """The most memory this process has held.

    Linux hands the peak of the parent, which getrusage reports, on to a child; VmHWM begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def provenance(model: str = "") -> dict[str, str]:
    """Machine, versions, date and command, for every row of a run."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    machine = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    there = {d.metadata["Name"].replace("_", "-") for d in importlib.metadata.distributions()}
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in there),
    ]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = " ".join(["python", "-m", spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]])
    return {
        "model": model,
        "machine": machine,
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


# --- the tables -----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def update_results(path: Path, rows: Sequence[Row], where: dict[str, str]) -> None:
    """Put a run's rows in place of what the table has of the same benchmarks, model and machine."""
    fresh = [{k: _text(v) for k, v in asdict(row).items()} | where for row in rows]
    key = lambda row: (row["benchmark"], row["model"], row["machine"])  # noqa: E731
    replaced = {key(row) for row in fresh}
    write_rows(path, [row for row in read_rows(path) if key(row) not in replaced] + fresh)


def _text(value: object) -> str:
    return "" if isinstance(value, float) and math.isnan(value) else f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row[c] for c in columns) + " |" for row in rows])


def write_report(out: Path) -> None:
    """RESULTS.md from the CSV files beside it: a table for every run, its machine and command above it."""
    parts = ["# Results", "Ratios within one run, alternating; README.md says how to read them."]
    for run, rows in groupby(read_rows(out.with_name("results.csv")), lambda row: tuple(row[name] for name in PROVENANCE)):
        parts.append("\n".join(f"- {name}: {value}" for name, value in zip(PROVENANCE, run, strict=True)))
        parts.append(markdown(list(rows), ("benchmark", "what", "ratio", "low", "high", "n", "target", "met", "detail")))
    full = read_rows(out.with_name("full_size.csv"))
    if full:
        parts += ["## Full size", markdown(full, list(full[0]))]
    faults = read_rows(out.with_name("faults.csv"))
    if faults:
        parts += ["## Faults", markdown(faults, list(faults[0]))]
    out.write_text("\n\n".join(parts) + "\n")
