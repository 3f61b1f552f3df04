"""The store against safetensors files of the same batches on the same disk, what writing costs an extract, maps of words.

Arrays run over (sample, conditioning, timestep, channel, y, x), those of two sites of Stable Diffusion 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from benchmarks.measure import Row, alternate, detail_of, row_of
from diffprobe import attention_maps, extract, features, open_store
from diffprobe.store import COMPLETE, ArraySpec, StoreWriter, create_store
from diffprobe.torch import StoreDataset, StoreStream

if TYPE_CHECKING:
    from benchmarks.run import Setting

CONDITIONINGS, TIMESTEPS = ("null", "caption"), (10, 50, 100, 250, 500)
UNIT = 4


class Batches:
    """The same units of arrays for both ways of keeping them."""

    def __init__(self, folder: Path, units: int, channels: int) -> None:
        self.folder, self.units = folder, units
        sizes = {"U-L1-R1-B0-Cross-Q": (channels, 16, 16), "U-L2-R2-Res-Out": (channels // 2, 32, 32)}
        self.specs = [
            ArraySpec(site, site, "block", "features", ("channel", "y", "x"), shape, CONDITIONINGS)
            for site, shape in sizes.items()
        ]
        rng = np.random.default_rng(0)
        lead = (UNIT, len(CONDITIONINGS), len(TIMESTEPS))
        self.arrays = {
            site: rng.standard_normal((*lead, *shape), np.float32).astype(np.float16) for site, shape in sizes.items()
        }

    @property
    def megabytes(self) -> float:
        return sum(array.nbytes for array in self.arrays.values()) * self.units / 1e6

    def write_store(self, path: Path | None = None) -> None:
        """Into a new store, its layout included."""
        path, count = path or self.folder / "s.zarr", UNIT * self.units
        tokens = np.zeros((count, len(CONDITIONINGS), 1), np.int32)
        create_store(
            path, attributes={"request": {"sites": list(self.arrays)}, "data": "none"}, sample_ids=[str(i) for i in range(count)],
            labels={}, timesteps=TIMESTEPS, conditionings=CONDITIONINGS, tokens=[0], specs=self.specs, unit_samples=UNIT, dtype="float16",
            prompts={"text": np.full(tokens.shape[:2], "", object), "token_id": tokens, "token_start": tokens, "token_end": tokens},
        )  # fmt: skip
        writer = StoreWriter(path)
        for unit in range(self.units):
            writer.write_unit(unit, self.arrays, np.full(UNIT, COMPLETE, np.uint8))

    def write_files(self, path: Path | None = None) -> None:
        path = path or self.folder / "files"
        path.mkdir(parents=True)
        for unit in range(self.units):
            save_file(self.arrays, path / f"{unit}.safetensors")

    def read_store(self, timestep: int | None = None) -> dict[str, Any]:
        tree = open_store(self.folder / "kept.zarr")
        return {site: features(tree, site, timestep=timestep).values for site in self.arrays}

    def read_files(self) -> dict[str, Any]:
        parts = [load_file(self.folder / "kept" / f"{unit}.safetensors") for unit in range(self.units)]
        return {site: np.concatenate([part[site] for part in parts]) for site in self.arrays}


def bytes_read(call: Callable[[], object]) -> int:
    """What the calls of a function read from files, cached by the system or not (Linux)."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    start = so_far()
    call()
    return so_far() - start


def storage(setting: Setting) -> Iterator[Row]:
    """Writing, reading all, reading one timestep; first it is checked that both give the same numbers."""
    batches = Batches(setting.folder / "kept-batches", 2 if setting.smoke else 4, 64 if setting.smoke else 1280)
    batches.folder.mkdir()
    batches.write_store(batches.folder / "kept.zarr")
    batches.write_files(batches.folder / "kept")
    stored, plain = batches.read_store(), batches.read_files()
    for site in plain:
        np.testing.assert_array_equal(stored[site], plain[site])
    del stored, plain
    size = batches.megabytes

    def speeds(times: list[tuple[float, float]]) -> str:
        theirs, ours = (sorted(size / seconds for seconds in column)[len(times) // 2] for column in zip(*times, strict=True))
        return f"{ours:.0f} MB/s against {theirs:.0f} MB/s, {size:.0f} MB"

    written = Batches(setting.folder / "written", batches.units, 64 if setting.smoke else 1280)

    def clear() -> None:
        for path in sorted(written.folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()

    times = alternate(written.write_files, written.write_store, setting.repeats, clear)
    yield row_of("storage", "writing the store / safetensors files, seconds", [b / a for a, b in times], "", speeds(times))
    times = alternate(batches.read_files, batches.read_store, setting.repeats)
    yield row_of(
        "storage", "reading all of the store / safetensors files, seconds", [b / a for a, b in times], "<= 2", speeds(times)
    )
    times = alternate(batches.read_store, lambda: batches.read_store(50), setting.repeats)
    what = f"one of {len(TIMESTEPS)} timesteps / the whole store, seconds"
    yield row_of("storage", what, [b / a for a, b in times], "", detail_of(times))
    if Path("/proc/self/io").exists():
        pair = (bytes_read(batches.read_store), bytes_read(lambda: batches.read_store(50)))
        what = f"one of {len(TIMESTEPS)} timesteps / the whole store, bytes read"
        yield row_of("storage", what, [pair[1] / pair[0]], "<= 0.25", f"{pair[1] / 1e6:.1f} MB against {pair[0] / 1e6:.1f} MB")


def words(setting: Setting) -> Iterator[Row]:
    """`attention_maps` of a word at 16 sites against one read of all samples' tokens a site; equal numbers first."""
    path, count = setting.folder / "words.zarr", 50 if setting.smoke else 400
    sites = [f"M{number}" for number in range(2 if setting.smoke else 16)]
    specs = [ArraySpec(s, s, "cross_map", "maps", ("head", "token", "y", "x"), (1, 8, 16, 16), CONDITIONINGS) for s in sites]
    spans = np.zeros((count, 2, 8, 2), np.int32)
    spans[:, 1, 1:5] = [(0, 1), (2, 5), (6, 8), (8, 10)]  # a | red | st ar
    create_store(
        path, attributes={"request": {"maps": sites}, "data": "none"}, sample_ids=[str(i) for i in range(count)], labels={},
        timesteps=[50], conditionings=CONDITIONINGS, tokens=range(8), specs=specs, unit_samples=25, dtype="float16",
        prompts={"text": np.tile(np.array(["", "a red star"], object), (count, 1)), "token_id": spans[..., 0],
                 "token_start": spans[..., 0], "token_end": spans[..., 1]},
    )  # fmt: skip
    writer, rng = StoreWriter(path), np.random.default_rng(0)
    for unit in range(count // 25):
        arrays = {s.site: rng.random((25, 2, 1, *s.shape), np.float32).astype(np.float16) for s in specs}
        writer.write_unit(unit, arrays, np.full(25, COMPLETE, np.uint8))
    tree = open_store(path)

    def plain() -> Any:
        read = (tree[s].to_dataset()["maps"].isel(conditioning=1, token=[3, 4]).values.astype(np.float32) for s in sites)
        return sum(values.mean((2, 3)) for values in read) / len(sites)

    np.testing.assert_allclose(attention_maps(tree, "star").values, plain(), rtol=1e-5)
    times = alternate(plain, lambda: attention_maps(tree, "star"), setting.repeats)
    what = f"maps of a word at {len(sites)} sites of {count} samples / one read a site, seconds"
    yield row_of("words", what, [b / a for a, b in times], "<= 2", detail_of(times))


def streams(setting: Setting) -> Iterator[Row]:
    """A shuffled epoch of `StoreStream` against reading the same samples in order; equal rows first, a `DataLoader` by index last.

    One site and timestep of the store's two conditionings, in units of 16 samples; the system may keep files in its cache.
    """
    path, count, unit = setting.folder / "streams.zarr", 64 if setting.smoke else 1024, 16
    spec = ArraySpec(
        "S", "s", "block", "features", ("channel", "y", "x"), (64 if setting.smoke else 320, 16, 16), CONDITIONINGS
    )
    tokens = np.zeros((count, 2, 1), np.int32)
    create_store(
        path, attributes={"request": {"sites": ["S"]}, "data": "none"}, sample_ids=[str(i) for i in range(count)], labels={},
        timesteps=[50], conditionings=CONDITIONINGS, tokens=[0], specs=[spec], unit_samples=unit, dtype="float16",
        prompts={"text": np.full((count, 2), "", object), "token_id": tokens, "token_start": tokens, "token_end": tokens},
    )  # fmt: skip
    writer, rng = StoreWriter(path), np.random.default_rng(0)
    for number in range(count // unit):
        values = rng.random((unit, 2, 1, *spec.shape), np.float32).astype(np.float16)
        writer.write_unit(number, {"S": values}, np.full(unit, COMPLETE, np.uint8))
    array = features(open_store(path), "S", timestep=50)
    stream = StoreStream(path, "S", timestep=50, batch_size=32)
    found = {int(n): x for batch in stream for n, x in zip(batch["sample"], batch["features"], strict=True)}
    np.testing.assert_array_equal(found[count // 2], array.isel(sample=count // 2).values)
    assert len(found) == count

    def in_order() -> None:
        for first in range(0, count, unit):
            torch.from_numpy(array.isel(sample=slice(first, first + unit)).values).float()

    def shuffled() -> None:
        stream.set_epoch(stream.epoch + 1)
        for _ in stream:
            pass

    times = alternate(in_order, shuffled, max(setting.repeats, 1 if setting.smoke else 9))
    rates = f"{count / np.median([b for _, b in times]):.0f} samples/s against {count / np.median([a for a, _ in times]):.0f}"
    yield row_of(
        "streams", f"a shuffled epoch / reading in order, speed, {count} samples", [a / b for a, b in times], ">= 0.5", rates
    )
    tokens_of = StoreStream(path, "S", timestep=50, rows="tokens", batch_size=4096)
    times = alternate(in_order, lambda: [None for _ in tokens_of], setting.repeats)
    yield row_of(
        "streams", "the same as shuffled tokens / reading in order, speed", [a / b for a, b in times], "", detail_of(times)
    )
    some = StoreDataset(path, "S", timestep=50)
    chosen = rng.permutation(count)[: count // 8].tolist()
    times = alternate(in_order, lambda: [some[index] for index in chosen], setting.repeats)
    yield row_of(
        "streams", "samples by index in random order / in order, speed", [a / b / 8 for a, b in times], "", detail_of(times)
    )


def stall(setting: Setting) -> Iterator[Row]:
    """`extract` as it is against `extract` whose arrays are thrown away where they would be written."""
    dataset = setting.dataset

    def run() -> None:
        extract(
            setting.subject.model, dataset, setting.folder / "stall.zarr", sites=setting.subject.sites, timesteps=TIMESTEPS,
            conditionings=CONDITIONINGS, resolution=setting.subject.resolution, batch_rows=setting.batch, progress=False,
        )  # fmt: skip
        setting.clear()

    write = StoreWriter.write_unit

    def without() -> None:
        with patch.object(StoreWriter, "write_unit", lambda writer, unit, arrays, status: write(writer, unit, {}, status)):
            run()

    times = alternate(without, run, setting.repeats)
    what = f"extract / extract without writing, seconds, {setting.scenes} scenes"
    yield row_of("stall", what, [b / a for a, b in times], "<= 1.03", detail_of(times))
