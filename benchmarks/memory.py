"""Extract many samples with a tiny model and print the seconds and this process's peak memory in bytes, for `benchmarks.run`.

python -m benchmarks.memory SAMPLES OUT
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import peak_bytes
from benchmarks.models import tiny
from diffprobe import extract
from diffprobe.data import load_dataset


def main(samples: int, out: Path) -> None:
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "1")))
    subject = tiny()
    start = time.perf_counter()
    extract(
        subject.model, load_dataset(f"shapes:{samples}"), out,
        sites=subject.sites, timesteps=(50,), conditionings=("caption",), batch_rows=32, progress=False,
    )  # fmt: skip
    print(time.perf_counter() - start, peak_bytes())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
