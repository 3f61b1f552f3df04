"""How much diffprobe costs: every number is a ratio of two things done in turn in one run.

python -m benchmarks.run [--smoke] [--repeats 5] [--only NAME] [--out benchmarks/RESULTS.md]

Each benchmark is a function that yields rows; `BENCHMARKS` lists them.  A run takes about an hour and a half on two idle cores.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from benchmarks.compute import caption_scores, probe_grid, training
from benchmarks.measure import FOLDER, Row, alternate, detail_of, provenance, row_of, update_results, write_report
from benchmarks.models import MODELS, Subject
from benchmarks.storage import stall, storage, streams, words
from benchmarks.transformers import joint_peers, transformers
from diffprobe import extract
from diffprobe.data import fit_image, load_dataset
from diffprobe.data.samples import Dataset
from diffprobe.prompts import EncodedText
from diffprobe.recorder import Recorder

TIMESTEPS = (10, 50, 100, 250, 500)


@dataclass(frozen=True)
class Setting:
    """What is measured and how often."""

    subject: Subject
    repeats: int
    batch: int
    scenes: int
    folder: Path
    smoke: bool = False

    @property
    def dataset(self) -> Dataset:
        return load_dataset(f"shapes:{self.scenes}")

    def clear(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def rows(self, count: int, timestep: int = 50) -> tuple[Tensor, Tensor, EncodedText]:
        """Latents, timesteps and null prompts of one batch."""
        model = self.subject.model
        size = model.latent_size(self.subject.resolution, self.subject.resolution)
        noised = torch.randn(count, 4, *size).to(model.device, model.dtype)
        return noised, torch.full((count,), timestep, device=model.device), model.encode_text([None]).take([0] * count)


class _Stop(Exception):
    """Ends a bare pass where extract ends it."""


def stopped(network: nn.Module, path: str) -> Callable[..., Tensor]:
    """The network as a function that computes nothing after a module, and returns that module's output."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output)
        raise _Stop

    def call(*args: Any, **kwargs: Any) -> Tensor:
        handle = network.get_submodule(path).register_forward_hook(hook)
        try:
            network(*args, **kwargs)
        except _Stop:
            return kept.pop()
        finally:
            handle.remove()
        raise AssertionError(f"{path} was never reached.")

    return call


# --- the recorder ---------------------------------------------------------------------------------


def recorder(setting: Setting) -> Iterator[Row]:
    """A bare forward pass against the same pass recorded, the hooks' coming and going included."""
    model, (noised, timesteps, text) = setting.subject.model, setting.rows(setting.batch)
    arguments = model.network_arguments(noised, text)
    wanted: list[tuple[str, dict[str, Any], str]] = [
        ("outputs of the {} blocks", {"sites": "blocks"}, "<= 1.02"),
        ("the {} paper sites", {"sites": setting.subject.sites}, ""),
        ("all {} cross-attention maps, head mean", {"maps": "cross"}, "<= 1.08"),
    ]

    def bare() -> None:
        model.network(noised, timestep=timesteps, return_dict=False, **arguments)

    for what, request, target in wanted:
        hooks = Recorder(model, **request, keep_steps=False)

        def recorded(hooks: Recorder = hooks) -> None:
            with hooks:
                bare()

        times = alternate(bare, recorded, 4 * setting.repeats)  # a hundredth is looked for, and a pass is short
        yield row_of("recorder", what.format(len(hooks.sites)), [b / a for a, b in times], target, detail_of(times))


def early_exit(setting: Setting) -> Iterator[Row]:
    """A full denoising call against one that a recorder ends after up_blocks.1."""
    model, batch = setting.subject.model, setting.rows(setting.batch)
    hooks = Recorder(model, "up_blocks.1", stop_early=True, keep_steps=False)

    def short() -> None:
        with hooks:
            model.denoise(*batch)

    times = alternate(lambda: model.denoise(*batch), short, 2 * setting.repeats)
    yield row_of("early_exit", "stopped after up_blocks.1 / full pass", [b / a for a, b in times], "<= 0.6", detail_of(times))


# --- the whole way --------------------------------------------------------------------------------


def pixels_of(setting: Setting, index: int) -> Tensor:
    """One image (3, height, width) in [-1, 1]."""
    side = setting.subject.resolution
    image = np.asarray(fit_image(setting.dataset[index].load(), (side, side), "crop"), np.float32)
    return torch.from_numpy(image.copy()).permute(2, 0, 1) / 127.5 - 1


def bare_calls(setting: Setting) -> Callable[[], None]:
    """Exactly the model calls that six sites x five timesteps x two conditionings need; their inputs are made beforehand."""
    model, batch = setting.subject.model, setting.batch
    images = torch.stack([pixels_of(setting, i) for i in range(setting.scenes)]).to(model.device, model.pipeline.vae.dtype)
    prompts = [None, *dict.fromkeys(setting.dataset[i].captions[0].text for i in range(setting.scenes))]
    network = stopped(model.network, setting.subject.last)
    total = 2 * len(TIMESTEPS) * setting.scenes
    noised, timesteps, text = setting.rows(batch)
    arguments = model.network_arguments(noised, text)
    short = setting.rows(total % batch or batch)
    short_arguments = model.network_arguments(short[0], short[2])

    @torch.no_grad()
    def run() -> None:
        for part in images.split(batch):
            _ = model.pipeline.vae.encode(part).latent_dist.mean
        for start in range(0, len(prompts), 64):
            model.encode_text(prompts[start : start + 64])
        for _ in range(total // batch):
            network(noised, timestep=timesteps, **arguments)
        if total % batch:
            network(short[0], timestep=short[1], **short_arguments)

    return run


def whole_extract(setting: Setting) -> Callable[[], None]:
    """`extract` of the same into a new store at every call, its start and the writing included."""
    dataset = setting.dataset

    def run() -> None:
        extract(
            setting.subject.model, dataset, setting.folder / "whole.zarr", sites=setting.subject.sites, timesteps=TIMESTEPS,
            conditionings=("null", "caption"), resolution=setting.subject.resolution, batch_rows=setting.batch, progress=False,
        )  # fmt: skip

    return run


def end_to_end(setting: Setting) -> Iterator[Row]:
    """Speed of extract as a share of the bare model calls'."""
    times = alternate(bare_calls(setting), whole_extract(setting), setting.repeats, setting.clear)
    what = f"extract's speed / bare calls' speed, {setting.scenes} scenes x 5 timesteps x 2 conditionings"
    yield row_of("end_to_end", what, [a / b for a, b in times], ">= 0.90", detail_of(times, setting.scenes, "s/image"))


# --- peers ----------------------------------------------------------------------------------------

DRAWS, DIFT_TIMESTEP, DIFT_SITE = 8, 261, "up_blocks.1"


def dift_loop(setting: Setting) -> Callable[[], None]:
    """One site, one timestep; an image is repeated once a noise draw, features are averaged, one file an image."""
    model = setting.subject.model
    pipeline, dataset = model.pipeline, setting.dataset
    network, side = stopped(model.network, DIFT_SITE), setting.subject.resolution

    @torch.no_grad()
    def run() -> None:
        text = model.encode_text([None]).take([0] * DRAWS)
        timestep = torch.tensor(DIFT_TIMESTEP, device=model.device)
        for index in range(len(dataset)):
            image = np.asarray(fit_image(dataset[index].load(), (side, side), "crop"), np.float32)
            pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1).to(model.device, model.dtype)
            clean = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            clean = clean.repeat(DRAWS, 1, 1, 1)
            noised = pipeline.scheduler.add_noise(clean, torch.randn_like(clean), timestep)
            features = network(noised, timestep=timestep, **model.network_arguments(noised, text))
            torch.save(features.mean(0, keepdim=True).cpu(), setting.folder / f"dift-{index}.pt")

    return run


def dift(setting: Setting) -> Iterator[Row]:
    dataset = setting.dataset

    def ours() -> None:
        extract(
            setting.subject.model, dataset, setting.folder / "dift.zarr", sites=DIFT_SITE, timesteps=(DIFT_TIMESTEP,),
            conditionings=("null",), noise_draws=DRAWS, resolution=setting.subject.resolution, batch_rows=DRAWS, progress=False,
        )  # fmt: skip

    times = alternate(dift_loop(setting), ours, setting.repeats, setting.clear)
    what = f"extract / DIFT-style loop, seconds, {setting.scenes} scenes x {DRAWS} noise draws"
    yield row_of("peers", what, [b / a for a, b in times], "", detail_of(times, setting.scenes, "s/image"))


def eager_maps(setting: Setting, call: Callable[[], None]) -> Callable[[], dict[str, Tensor]]:
    """Maps in plain diffusers: AttnProcessor everywhere, its probabilities kept on the way through cross-attention."""
    network = setting.subject.model.network

    def keep(name: str, attention: Attention, maps: dict[str, Tensor]) -> Callable[..., Tensor]:
        def scores(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
            probabilities = Attention.get_attention_scores(attention, query, key, mask)
            maps[name] = probabilities.unflatten(0, (-1, attention.heads)).mean(1)
            return probabilities

        return scores

    def run() -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        cross = {n: m for n, m in network.named_modules() if isinstance(m, Attention) and n.endswith("attn2")}
        network.set_attn_processor(AttnProcessor())
        for name, attention in cross.items():
            attention.get_attention_scores = keep(name, attention, maps)
        try:
            call()
        finally:
            network.set_attn_processor(AttnProcessor2_0())
            for attention in cross.values():
                del attention.get_attention_scores
        return maps

    return run


def captured_maps(setting: Setting, call: Callable[[], None], mode: str) -> Callable[[], dict[str, Tensor]]:
    """attention-map-diffusers: "exact" computes maps in the pass, "fast" (its default) keeps queries and keys and computes after it."""
    capture_class = importlib.import_module("attention_map_diffusers").AttentionCapture
    device = str(setting.subject.model.device)

    def run() -> dict[str, Tensor]:
        capture = capture_class(
            setting.subject.model.pipeline, relations=("image->text",), timesteps="all", heads="mean", mode=mode, offload=device
        )
        with capture:
            call()
        return {record.layer_id.removeprefix("unet."): record.data[:, 0] for record in capture.compute().records}

    return run


def map_peers(setting: Setting) -> Iterator[Row]:
    """The head-mean cross-attention maps of one pass, all sites, computed three ways; first it is checked that they agree."""
    model, (noised, timesteps, text) = setting.subject.model, setting.rows(setting.batch)
    arguments = model.network_arguments(noised, text)
    hooks = Recorder(model, maps="cross", keep_steps=False)

    def call() -> None:
        with torch.no_grad():
            model.network(noised, timestep=timesteps, return_dict=False, **arguments)

    def ours() -> None:
        with hooks:
            call()

    peers = {"diffusers with AttnProcessor everywhere": eager_maps(setting, call)}
    if importlib.util.find_spec("attention_map_diffusers"):
        peers |= {f"attention-map-diffusers, mode {mode}": captured_maps(setting, call, mode) for mode in ("fast", "exact")}
    else:
        yield Row(
            "peers",
            "maps beside the fused call / attention-map-diffusers",
            detail="not installed: pip install attention-map-diffusers",
        )
    ours()
    recorded = {site.module_path: hooks.last[site.name].flatten(3)[:, 0].transpose(1, 2) for site in hooks.sites}
    for name, theirs in peers.items():
        maps = theirs()
        if maps.keys() != recorded.keys():
            raise AssertionError(f"{name} has maps of {sorted(maps)}, the recorder of {sorted(recorded)}.")
        apart = max(float((maps[path].float() - recorded[path]).abs().max()) for path in recorded)
        times = alternate(theirs, ours, 2 * setting.repeats)
        yield row_of(
            "peers",
            f"maps beside the fused call / {name}, seconds",
            [b / a for a, b in times],
            "",
            f"{detail_of(times)}; apart by {apart:.0e}",
        )


def peers(setting: Setting) -> Iterator[Row]:
    """Against other code on the same weights."""
    yield from dift(setting)
    if isinstance(setting.subject.model.pipeline, StableDiffusionPipeline):
        yield from map_peers(setting)


# --- growth ---------------------------------------------------------------------------------------


def growth(setting: Setting) -> Iterator[Row]:
    """Seconds a sample and peak memory of ten times as many samples, a process each; the tiny model, whichever is measured elsewhere."""
    sizes = (20, 40, 80) if setting.smoke else (100, 1_000, 10_000)
    environment = {**os.environ, "BENCHMARK_THREADS": str(torch.get_num_threads())}
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for _ in range(setting.repeats):
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.memory", str(size), str(setting.folder / "growth.zarr")]
            done = subprocess.run(command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            seconds, peak = map(float, done.stdout.split()[-2:])
            found[size].append((seconds / size, peak / 1e6))
            setting.clear()
    for small, large in itertools.pairwise(sizes):
        pairs = list(zip(found[small], found[large], strict=True))
        for column, what, unit, target in ((0, "seconds a sample", "s", "<= 1.1"), (1, "peak memory", "MB", "<= 1.1")):
            values = [(one[column], other[column]) for one, other in pairs]
            row = f"tiny model, {what} of {large} scenes / {small} scenes"
            yield row_of("growth", row, [b / a for a, b in values], target, detail_of(values, unit=unit))


BENCHMARKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "recorder": recorder, "transformers": transformers, "joint_peers": joint_peers, "early_exit": early_exit, "end_to_end": end_to_end, "stall": stall, "peers": peers, "storage": storage,
    "words": words, "streams": streams, "probes": probe_grid, "captions": caption_scores, "training": training, "growth": growth,
}  # fmt: skip


def main(
    smoke: bool = False, repeats: int = 5, only: str = "", out: Path | None = None, threads: int = 0,
    model: str = "small", device: str = "cpu", dtype: str = "float32", batch: int = 8, scenes: int = 96,
) -> None:  # fmt: skip
    """Run the benchmarks; --smoke runs a toy form of each, and writes nothing unless --out says where."""
    for name, known in ((only, BENCHMARKS), (model, MODELS)):
        if name and name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}.")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.manual_seed(0)
    subject = MODELS[model](device, getattr(torch, dtype), smoke)
    network = sum(p.numel() for p in subject.model.network.parameters())
    where = provenance(
        f"{model}: network of {network / 1e6:.1f}M parameters, {subject.resolution} px, {dtype}, batch {batch}, {device}"
    )
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    rows: list[Row] = []
    for name, benchmark in BENCHMARKS.items():
        if only in ("", name):
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                setting = Setting(subject, 1 if smoke else max(5, repeats), batch, 3 if smoke else scenes, Path(folder), smoke)
                for row in benchmark(setting):
                    rows.append(row)
                    print(
                        f"{name}: {row.what}: {row.ratio:.3f} ({row.low:.3f}-{row.high:.3f}, n={row.n}) {row.target} {row.met}  {row.detail}",
                        flush=True,
                    )
    out = out or (None if smoke else FOLDER / "RESULTS.md")
    if out is not None:
        update_results(out.with_name("results.csv"), rows, where)
        write_report(out)


if __name__ == "__main__":
    typer.run(main)
