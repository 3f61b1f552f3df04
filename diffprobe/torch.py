"""A store as data for training in PyTorch: `StoreDataset` by index, `StoreStream` shuffled and fast.

A unit of a store is one file of an array, so reading single samples in random order reads every file many times.
`StoreStream` shuffles whole units, holds some of them, and shuffles the rows inside.  The invariant: in one epoch the streams
of all ranks and workers yield every row once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from diffprobe.data.samples import did_you_mean
from diffprobe.store import COMPLETE, StoreError, features, known, open_store, provenance, sample_labels

Rows = Literal["none", "mean", "tokens"]
Batch = dict[str, torch.Tensor]


class _Reader:
    """What both classes read: one site at some timesteps and conditionings, with a label; opened when first used."""

    def __init__(
        self, path: str | Path, site: str, *, timestep: int | Sequence[int] | None = None, conditioning: str | Sequence[str] | None = None,
        rows: Rows = "none", label: str | None = None, samples: Sequence[str] | None = None, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if rows not in ("none", "mean", "tokens"):
            raise ValueError(f"rows={rows!r} is not one of none, mean, tokens.")
        self.path, self.site, self.rows, self.dtype = path, site, rows, dtype
        self.timestep, self.conditioning = timestep, conditioning
        tree = open_store(path, complete=False)
        self.step = int(provenance(tree)["unit_samples"])
        root = tree.to_dataset()
        names = [str(name) for name in root["sample"].values]
        wanted = set(names if samples is None else samples)
        if unknown := sorted(wanted - set(names)):
            raise StoreError(f"{path} has no sample {unknown[0]!r}.{did_you_mean(unknown[0], names)}")
        there = (root["status"].values == COMPLETE) & np.array([name in wanted for name in names])
        self._places = np.flatnonzero(there)  # of the samples in the store's arrays
        if not len(self._places):
            raise StoreError(f"{path} has none of the samples yet.")
        self.ids = [names[place] for place in self._places]
        self._labels: torch.Tensor | None = None
        self.classes: list[str] = []
        if label:
            self._labels, self.classes = self._encode(root, label)
        self.shape = tuple(self._read(slice(0, 0)).shape[1:])

    def _encode(self, root: xr.Dataset, label: str) -> tuple[torch.Tensor, list[str]]:
        """One number a sample: a quantity, or the number of its class."""
        values = root[known(label, sample_labels(root), "label")].values  # of all samples: a part of them has the same classes
        if values.dtype.kind == "f":
            return torch.from_numpy(values[self._places].astype(np.float32)), []
        classes, codes = np.unique(values.astype(str) if values.dtype.kind in "UO" else values, return_inverse=True)
        return torch.from_numpy(codes[self._places]), [str(name) for name in classes]

    @cached_property
    def _array(self) -> xr.DataArray:
        tree = open_store(self.path, complete=False)
        return features(tree, self.site, timestep=self.timestep, conditioning=self.conditioning)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_array"}  # a worker opens its own

    def _read(self, part: slice) -> torch.Tensor:
        """Consecutive samples of the store, in its number type: themselves, places averaged, or every place a row."""
        values, dims = torch.from_numpy(self._array.isel(sample=part).values), list(self._array.dims)
        if self.rows == "none":
            return values
        places = [n for n, dim in enumerate(dims) if dim in ("y", "x", "token")]
        if self.rows == "mean" and places:
            values, dims = values.float().mean(places), [d for n, d in enumerate(dims) if n not in places]
        return values.movedim(dims.index("channel"), -1).reshape(-1, values.shape[dims.index("channel")])

    def _batch(self, values: torch.Tensor, numbers: torch.Tensor) -> Batch:
        found = {"features": values.to(self.dtype), "sample": numbers}
        return found if self._labels is None else found | {"label": self._labels[numbers]}


class StoreDataset(_Reader, Dataset[Batch]):
    """The complete samples of a store by index, each as {"features", "sample", "label"}.

    For reading in order or a few at a time; a shuffled epoch is many times faster with `StoreStream`.

    Args:
        path, site, timestep, conditioning: as for `open_store` and `features`; a single value drops its axis.
        rows: "none" gives a sample's array as it is, "mean" averages its places.
        label: a label of the samples: a float, or the number of its class in `classes`.
        samples: ids; all by default.
        dtype: of the features; they are converted after reading.

    Attributes:
        ids: the sample's id by its number, which "sample" gives.

    >>> data = StoreDataset("runs/demo.zarr", "U-L1-R1-B0-Cross-Q", timestep=50, conditioning="null")  # doctest: +SKIP
    >>> data[0]["features"].shape  # doctest: +SKIP
    torch.Size([96, 16, 16])
    """

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        if self.rows == "tokens":
            raise ValueError("A sample has many tokens; read them with StoreStream.")
        place = int(self._places[index])
        found = self._batch(self._read(slice(place, place + 1)), torch.tensor([index]))
        return {name: value[0] for name, value in found.items()}


class StoreStream(_Reader, IterableDataset[Batch]):
    """Batches of rows, shuffled: whole units in random order, and rows in random order within some units at a time.

    Ranks and workers each get units of their own: every row comes once an epoch, in one of them.  Give a `DataLoader`
    `batch_size=None`, for the batches are made here.

    Args:
        path, site, timestep, conditioning, label, samples, dtype: as for `StoreDataset`.
        rows: "tokens" makes a row (channel,) of every place, timestep and conditioning, "mean" of every timestep and
            conditioning; "none" gives samples as they are.
        batch_size: rows of a batch; the last of an epoch may have fewer.
        shuffle: False keeps the store's order.
        buffer: units in memory together, among which rows are mixed.  As many again are read ahead.
        seed: of the order, which `set_epoch` changes.
        rank, ranks: of this process; those of torch.distributed by default, where it runs.
    """

    def __init__(
        self, path: str | Path, site: str, *, batch_size: int = 256, shuffle: bool = True, buffer: int = 8, seed: int = 0,
        rank: int | None = None, ranks: int | None = None, **chosen: Any,
    ) -> None:  # fmt: skip
        super().__init__(path, site, **chosen)
        told = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if told else 0
        self.ranks = ranks if ranks is not None else torch.distributed.get_world_size() if told else 1
        self.batch_size, self.shuffle, self.buffer, self.seed, self.epoch = batch_size, shuffle, max(1, buffer), seed, 0
        if batch_size < 1 or not 0 <= self.rank < self.ranks:
            raise ValueError(f"batch_size {batch_size} and rank {self.rank} of {self.ranks} do not fit.")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the same seed and epoch give the same order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        number, count = self.rank * workers + own, self.ranks * workers
        units = np.unique(self._places // self.step)
        order = np.random.default_rng((self.seed, self.epoch))
        units = (order.permutation(units) if self.shuffle else units)[number::count]
        mixing = torch.Generator().manual_seed(int(order.integers(2**62)) + number)
        groups = [units[n : n + self.buffer].tolist() for n in range(0, len(units), self.buffer)]
        held: list[list[torch.Tensor]] = [[], []]  # one is read into while the other is shuffled; pages are touched once
        left = torch.zeros(0, *self.shape, dtype=self.dtype), torch.zeros(0, dtype=torch.int64)
        with ThreadPoolExecutor(1) as ahead:
            waiting = [ahead.submit(self._group, group, held[0]) for group in groups[:1]]
            for place in range(len(groups)):
                values, numbers = waiting.pop().result()
                if place + 1 < len(groups):
                    waiting.append(ahead.submit(self._group, groups[place + 1], held[(place + 1) % 2]))
                count = len(numbers)
                mixed = torch.randperm(count, generator=mixing) if self.shuffle else torch.arange(count)
                start = 0
                while start < count:
                    rows = mixed[start : start + self.batch_size - len(left[1])]
                    start += len(rows)
                    batch = values[rows].to(self.dtype), numbers[rows]
                    if len(left[1]):
                        batch = torch.cat([left[0], batch[0]]), torch.cat([left[1], batch[1]])
                    left = batch[0][:0], batch[1][:0]
                    if len(batch[1]) < self.batch_size:
                        left = batch
                    else:
                        yield self._batch(*batch)
        if len(left[1]):
            yield self._batch(*left)

    def _group(self, units: Sequence[int], held: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of some units together, in memory that is kept in `held`, and the numbers of their samples."""
        filled, numbers = 0, []
        for unit in units:
            first = unit * self.step
            chosen = np.flatnonzero((self._places >= first) & (self._places < first + self.step))
            length = min(first + self.step, self._array.sizes["sample"]) - first
            values = self._read(slice(first, first + length))
            each = len(values) // length
            if len(chosen) < length:
                values = values.unflatten(0, (length, each))[torch.from_numpy(self._places[chosen] - first)].flatten(0, 1)
            if not held:
                held.append(torch.empty(self.buffer * self.step * each, *self.shape, dtype=values.dtype))
            held[0][filled : filled + len(values)] = values
            filled += len(values)
            numbers.append(torch.from_numpy(chosen).repeat_interleave(each))
        return held[0][:filled], torch.cat(numbers)
