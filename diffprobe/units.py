"""One unit of an extraction: its images and prompts go through the engine, and recorded tensors become the unit's arrays.

A unit is one shard of every array of the store.  Each image is encoded once and each prompt once for a unit; every (sample,
timestep, conditioning, noise draw) is then a row of `diffprobe.forward`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from diffprobe import store
from diffprobe.conditioning import NULL, assign_prompts, guided_name
from diffprobe.data.files import check_unicode
from diffprobe.data.images import ImageError, UnavailableError
from diffprobe.data.join import PartDataset
from diffprobe.data.samples import Dataset, Sample
from diffprobe.encoders import VisionEncoder
from diffprobe.forward import Batch, Engine, Listener, NotFiniteError, Pixels, Row, rows_not_finite, to_pixels
from diffprobe.layout import Request
from diffprobe.models import DiffusionModel, out_of_memory
from diffprobe.noise import noise_seed
from diffprobe.recorder import Recorder
from diffprobe.sites import Site, select_sites

Policy = Literal["raise", "mark", "float32"]
STORE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_LONGEST_TRIAL = 4.0  # seconds; a batch that takes longer is not doubled


# --- reductions -----------------------------------------------------------------------------------


def parse_reduce(given: str | Sequence[str] | dict[str, str], sites: Sequence[Site]) -> dict[str, str]:
    """The rule of every feature site, from ``RULE`` for all sites and ``PATTERN=RULE`` for some; later ones win.

    Rules: none, mean (over places), grid:HxW (average pooling), project:K (a seeded random projection of channels).
    """
    if isinstance(given, dict):
        given = [f"{pattern}={rule}" for pattern, rule in given.items()]
    rules = {site.name: "none" for site in sites}
    for entry in [given] if isinstance(given, str) else given:
        pattern, _, rule = entry.rpartition("=")
        if not re.fullmatch(r"none|mean|grid:0*[1-9]\d*x0*[1-9]\d*|project:0*[1-9]\d*", rule):
            raise ValueError(f"Reduction {rule!r} is not one of none, mean, grid:HxW, project:K.")
        for site in select_sites(sites, pattern) if pattern else sites:
            if site.over_tokens and rule not in ("none", "mean") and not rule.startswith("project"):
                raise ValueError(f"Reduction {rule!r} needs a (y, x) grid; {site.name} runs over tokens.")
            rules[site.name] = rule
    return rules


def projection(site: str, seed: int, channels: int, kept: int) -> Tensor:
    """The random projection (kept, channel) of a site with rows of variance 1/kept; it depends on seed and site alone."""
    generator = torch.Generator("cpu").manual_seed(noise_seed(seed, f"projection of {site}", channels, kept))
    return torch.randn(kept, channels, generator=generator) / kept**0.5


def make_reduce(rules: dict[str, str], seed: int) -> Callable[[Site, Tensor], Tensor]:
    """The function that a recorder applies to each tensor at once; maps stay unchanged."""
    matrices: dict[str, Tensor] = {}

    def reduce(site: Site, tensor: Tensor) -> Tensor:
        kind, _, number = rules.get(site.name, "none").partition(":")
        if kind == "mean":
            return tensor.float().mean(tuple(range(2, tensor.ndim)))
        if kind == "grid":
            height, width = (int(s) for s in number.split("x"))
            return torch.nn.functional.adaptive_avg_pool2d(tensor.float(), (height, width))
        if kind == "project":
            if site.name not in matrices:
                matrices[site.name] = projection(site.name, seed, tensor.shape[1], int(number)).to(tensor.device)
            return torch.einsum("kc,rc...->rk...", matrices[site.name], tensor.float())
        return tensor

    return reduce


def array_specs(
    sites: Sequence[Site],
    shapes: dict[str, tuple[int, ...]],
    rules: dict[str, str],
    conditionings: Sequence[str],
    guidance: Sequence[float],
) -> list[store.ArraySpec]:
    """Every site's array after reduction.

    Args:
        shapes: the shape of one recorded row of each site, before reduction.
    """
    guided = [guided_name(c, s) for c in conditionings if c != NULL for s in guidance]
    specs = []
    for site in sites:
        own, shape, names = (site.name, site.path, site.kind), shapes[site.name], tuple(conditionings)
        if site.is_map:
            specs.append(store.ArraySpec(*own, "maps", ("head", "token", "y", "x"), shape, names))
            continue
        rule = rules[site.name]
        kind, _, number = rule.partition(":")
        dims: tuple[str, ...] = ("channel", "token") if site.over_tokens else ("channel", "y", "x")
        if kind == "mean":
            dims, shape = ("channel",), shape[:1]
        elif kind == "grid":
            shape = (shape[0], *(int(s) for s in number.split("x")))
        elif kind == "project":
            shape = (int(number), *shape[1:])
        specs.append(store.ArraySpec(*own, "features", dims, shape, (*names, *guided), rule))
    return specs


# --- the samples ----------------------------------------------------------------------------------


@dataclass
class Index:
    """Ids, labels and prompts of all samples, which a run keeps; images, questions and masks it does not."""

    ids: list[str]
    labels: list[Mapping[str, Any]]
    prompts: dict[str, list[str | None]]

    @classmethod
    def of(cls, dataset: Dataset, conditionings: Sequence[str], rows: Sequence[int]) -> Index:
        """Reads the given rows of a dataset in one pass."""
        if isinstance(dataset, PartDataset):  # whose texts may come from samples outside of it
            whole, chosen = cls.of(dataset.whole, conditionings, range(len(dataset.whole))), [dataset.rows[row] for row in rows]
            ids, labels = [whole.ids[i] for i in chosen], [whole.labels[i] for i in chosen]
            return cls(ids, labels, {name: [column[i] for i in chosen] for name, column in whole.prompts.items()})
        index = cls([], [], {})

        def noted() -> Iterator[Sample]:
            for sample in map(dataset.__getitem__, rows):
                texts = {"id": sample.id, **{f"label {name!r}": value for name, value in sample.labels.items()}}
                texts |= {f"caption {number}": caption.text for number, caption in enumerate(sample.captions)}
                for what, text in texts.items():
                    check_unicode(f"The {what} of sample {sample.id!r}", text)
                index.ids.append(sample.id)
                index.labels.append(sample.labels)
                yield sample

        index.prompts = assign_prompts(noted(), conditionings)
        if len(set(index.ids)) < len(index.ids):
            twice = next(name for name, n in Counter(index.ids).items() if n > 1)
            raise ValueError(
                f"Sample id {twice!r} stands twice in {dataset.name}; noise and labels belong to ids, so each must be unique."
            )
        return index


class Run:
    """The request of an extraction with its model, dataset and engine; computes units."""

    def __init__(
        self, model: DiffusionModel | VisionEncoder, dataset: Dataset, request: Request, index: Index, on_nonfinite: Policy, log: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.model, self.dataset, self.request, self.index = model, dataset, request, index
        self.on_nonfinite = on_nonfinite
        self.specs: list[store.ArraySpec] = []
        rule: Any = request.latent_rule
        self.engine = Engine(model, seed=request.seed, latent_rule=rule, log=log)
        height, width = request.resolution
        self.latent_size = model.latent_size(height, width)
        self.store_dtype = STORE_DTYPES[request.store_dtype]
        self.exact = bool(request.guidance) or request.noise_draws > 1  # rounded once, after all that is computed from passes
        self.skipped: dict[str, str] = {}

    def recorder(self, reduce: bool = True) -> Listener:
        request, heads = self.request, cast(Literal["mean", "all"], self.request.heads)
        reduction = make_reduce(request.reduce, request.seed) if reduce else None
        if isinstance(self.model, VisionEncoder):
            return self.model.recorder(request.sites, reduction)
        # rows are copied into the unit's buffers before the next pass, so tensors are reused
        return Recorder(
            self.model, request.sites, maps=request.maps, heads=heads, tokens=request.map_tokens, stop_early=True, reduce=reduction,
            keep_steps=False, reuse=True,
        )  # fmt: skip

    def load_images(self, first: int, last: int) -> list[Pixels | str]:
        """Images (3, height, width) in [-1, 1], or the reason why one could not be read; NumPy alone, as `to_pixels` says."""
        height, width = self.request.resolution
        loaded: list[Pixels | str] = []
        for index in range(first, last):
            try:
                loaded.append(to_pixels(self.dataset[index].load(), (height, width), self.request.fit))
            except UnavailableError as error:  # a fault of the machine, which must not be noted as one of the image
                raise UnavailableError(f"{error} What was complete is kept; the same command goes on from there.") from error
            except ImageError as error:
                loaded.append(str(error))
        return loaded

    # one batch

    def checked(self, recorder: Listener, batch: Batch) -> tuple[dict[str, Tensor], Bool[np.ndarray, " row"]]:
        """The tensors on the CPU in the buffers' dtype, and the rows with a value that is not finite in the store's dtype."""
        dtype = torch.float32 if self.exact else self.store_dtype
        for found in (lambda: batch, lambda: self.engine.in_float32(recorder, batch)):
            kept = {name: tensor.to("cpu", dtype) for name, tensor in found().tensors.items()}
            bad = rows_not_finite(kept, self.store_dtype)
            if not bad.any() or self.on_nonfinite != "float32" or self.model.dtype == torch.float32:
                break
        return kept, bad

    def leave_out(self, name: str, site: str, timestep: int, conditioning: str) -> int:
        """The status of a sample with values that the store cannot hold; NotFiniteError unless `on_nonfinite` is "mark"."""
        where = f"Sample {name!r}, site {site}, timestep {timestep}, conditioning {conditioning!r}"
        reason = f"{where}: a value is not finite in {self.request.store_dtype}."
        if self.on_nonfinite != "mark":
            hint = "Try --store-dtype float32 or --dtype float32, or --on-nonfinite mark to leave such samples out."
            raise NotFiniteError(f"{reason} {hint}")
        self.skipped[name] = reason
        return store.NOT_FINITE

    # one unit

    def compute(
        self, recorder: Listener, first: int, images: list[Pixels | str]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        """The arrays of one unit by site, (sample, conditioning, timestep, ...), and the status of its samples."""
        request, count = self.request, len(images)
        ids = self.index.ids[first : first + count]
        readable: dict[int, Pixels] = {}
        status = np.full(count, store.COMPLETE, np.uint8)
        for index, image in enumerate(images):
            if isinstance(image, str):
                status[index] = store.UNREADABLE
                self.skipped[ids[index]] = image
            else:
                readable[index] = image
        dtype = np.float32 if self.exact else np.dtype(request.store_dtype)
        before = (count, len(request.conditionings), len(request.timesteps))
        buffers = {s.site: np.full((*before, *s.shape), np.nan, dtype) for s in self.specs}
        for values in buffers.values() if request.noise_draws > 1 else ():
            values[list(readable)] = 0  # draws are added up
        if readable:
            latents = self.engine.encode_images(list(readable.values()), [ids[i] for i in readable])
            prompts = [self.index.prompts[name][first : first + count] for name in request.conditionings]
            self.engine.encode_prompts([prompt for column in prompts for prompt in column])
            steps, columns, draws = (range(n) for n in (len(request.timesteps), len(prompts), request.noise_draws))
            places = [(i, c, t, draw) for i in readable for t in steps for c in columns for draw in draws]
            rows = [Row(i, prompts[c][i], request.timesteps[t], draw) for i, c, t, draw in places]
            for batch in self.engine.run(recorder, dict(zip(readable, latents, strict=True)), ids, rows):
                here = places[batch.first : batch.first + len(batch.rows)]
                kept, bad = self.checked(recorder, batch)
                for row in np.flatnonzero(bad):
                    i, c, t, _ = here[int(row)]
                    site = next(name for name, tensor in kept.items() if not tensor[row].to(self.store_dtype).isfinite().all())
                    status[i] = self.leave_out(ids[i], site, request.timesteps[t], request.conditionings[c])
                at = tuple(np.array(here).T[:3])
                for name, tensor in kept.items():
                    if request.noise_draws == 1:
                        buffers[name][at] = tensor.numpy()
                    else:
                        np.add.at(buffers[name], at, tensor.numpy() / request.noise_draws)
        return self.finish(buffers, status, ids), status

    def finish(
        self, buffers: dict[str, NDArray[Any]], status: NDArray[np.uint8], ids: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Adds the guided conditionings, f_u + s (f_c - f_u) in float32, and casts to the store's dtype."""
        request, finished, conditionings = self.request, {}, self.request.conditionings
        for spec in self.specs:
            values = buffers[spec.site]
            if spec.variable == "features" and request.guidance:
                null = values[:, conditionings.index(NULL)]
                differences = [values[:, place] - null for place, name in enumerate(conditionings) if name != NULL]
                guided = [null + s * difference for difference in differences for s in request.guidance]
                values = np.concatenate([values, np.stack(guided, axis=1)], axis=1)
            with np.errstate(over="ignore"):  # what does not fit is found below
                finished[spec.site] = values = values.astype(request.store_dtype, copy=False)
            if self.exact:  # what came from the model was checked; what was computed from it was not
                bad = ~np.isfinite(values).all(tuple(range(3, values.ndim))) & (status == store.COMPLETE)[:, None, None]
                for i in np.flatnonzero(bad.any((1, 2))):
                    c, t = np.argwhere(bad[i])[0]
                    status[i] = self.leave_out(ids[int(i)], spec.site, request.timesteps[t], spec.conditionings[c])
        return finished

    # before the work

    def unit_samples(self) -> int:
        """Samples of one unit: its arrays, and its images, stay near 64 MiB.

        A small run has about 16 units, so that a resume loses little, but at least 32 rows in each, so that batches are large.
        """
        height, width = self.request.resolution
        itemsize = np.dtype(self.request.store_dtype).itemsize
        samples = self.request.samples
        most = store.samples_per_unit(self.specs, len(self.request.timesteps), itemsize)
        images = store.SHARD_BYTES // (3 * height * width * 4)
        return max(1, min(images, most, samples, max(-(-samples // 16), -(-32 // self.rows_per_sample))))

    @property
    def rows_per_sample(self) -> int:
        return len(self.request.timesteps) * len(self.request.conditionings) * self.request.noise_draws

    def first_pass(self) -> tuple[dict[str, tuple[int, ...]], float]:
        """Runs one row; returns the shape of every site before reduction, and the seconds."""
        with self.recorder(reduce=False) as recorder:
            seconds = self._time_batch(1)
        return {name: tuple(tensor.shape[1:]) for name, tensor in recorder.last.items()}, seconds

    def find_batch(self, seconds: float) -> float:
        """Finds the number of rows of a batch; returns the seconds per row.

        Starts at one row, which takes `seconds`, and doubles while throughput grows by a tenth, a batch is fast and fits into
        memory, and a unit has as many rows.
        """
        best, rows = seconds, 1
        largest = self.unit_samples() * self.rows_per_sample
        while rows < largest and rows < 128 and best * 2 * rows < _LONGEST_TRIAL:
            rows *= 2
            try:
                with self.recorder():
                    seconds = min(self._time_batch(rows), self._time_batch(rows)) / rows  # the first pass pays for caches
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                break
            if seconds < best / 1.1:
                self.engine.batch_rows = rows
            if seconds > best * 1.2:
                break
            best = min(best, seconds)
        return best

    def _time_batch(self, rows: int) -> float:
        prompt = next(iter(self.index.prompts.values()))[0]
        text = self.engine.encode_prompts([prompt])[prompt].take([0] * rows)
        noised = torch.zeros(
            rows, self.model.latent_channels, *self.latent_size, device=self.model.device, dtype=self.model.dtype
        )
        timesteps = torch.full((rows,), self.request.timesteps[0])
        start = time.perf_counter()
        self.model.forward(noised, timesteps, text)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
