"""Does the real thing fit? One image through `extract` with Stable Diffusion 2.1's or XL's own configuration, random weights.

python -m benchmarks.full_size [--sdxl] [--device cuda --dtype bfloat16] [--smoke]

On a GPU it also measures images/s of the whole way (six sites, five timesteps, two conditionings) against the bare model calls.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import typer

from benchmarks.measure import FOLDER, alternate, peak_bytes, provenance, read_rows, write_report, write_rows
from benchmarks.models import MODELS
from benchmarks.run import Setting, bare_calls, whole_extract
from diffprobe import extract
from diffprobe.data import load_dataset
from diffprobe.store import features, open_store


def main(
    sdxl: bool = False, smoke: bool = False, device: str = "cpu", dtype: str = "", threads: int = 0,
    batch: int = 16, images: int = 16, repeats: int = 5, out: Path | None = None,
) -> None:  # fmt: skip
    """Build, run, print and append a row; --smoke shrinks everything, and writes nothing unless --out says where."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.manual_seed(0)
    dtype = dtype or ("bfloat16" if sdxl or device != "cpu" else "float32")
    start = time.perf_counter()
    subject = MODELS["sdxl" if sdxl else "sd21"](device, getattr(torch, dtype), smoke)
    built = time.perf_counter() - start
    network = sum(p.numel() for p in subject.model.network.parameters())
    row = {
        "model": subject.name,
        "network_M": f"{network / 1e6:.0f}",
        "pipeline_M": f"{subject.parameters / 1e6:.0f}",
        "resolution": f"{subject.resolution}",
    }
    row |= {"dtype": dtype, "device": device, "build_s": f"{built:.1f}"}
    print(row, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "one.zarr"
        summary = extract(
            subject.model, load_dataset("shapes:1"), store, sites=subject.sites, timesteps=(50,), conditionings=("null",),
            resolution=subject.resolution, batch_rows=1, progress=False,
        )  # fmt: skip
        if summary.complete != 1:
            raise AssertionError(f"The image was not recorded: {summary.skipped}.")
        tree = open_store(store)
        print("; ".join(f"{site} {features(tree, site).shape}" for site in subject.sites), flush=True)
        row |= {"one_image_s": f"{summary.seconds:.1f}", "peak_GB": f"{peak_bytes() / 1e9:.2f}", "gpu_peak_GB": ""}
        row |= {"images_per_s": "", "bare_images_per_s": "", "share": ""}
        if device != "cpu":
            setting = Setting(subject, repeats, batch, images, Path(folder), smoke)
            times = alternate(bare_calls(setting), whole_extract(setting), 1 if smoke else repeats, setting.clear)
            bare, ours = (images / statistics.median(column) for column in zip(*times, strict=True))
            row |= {
                "gpu_peak_GB": f"{torch.cuda.max_memory_allocated() / 1e9:.2f}",
                "images_per_s": f"{ours:.2f}",
                "bare_images_per_s": f"{bare:.2f}",
            }
            row["share"] = f"{statistics.median(a / b for a, b in times):.3f}"
    where = provenance()
    row |= {name: where[name] for name in ("machine", "versions", "date", "command")}
    print(row)
    out = out or (None if smoke else FOLDER / "RESULTS.md")
    if out is not None:
        path = out.with_name("full_size.csv")
        write_rows(path, [*read_rows(path), row])
        write_report(out)


if __name__ == "__main__":
    typer.run(main)
