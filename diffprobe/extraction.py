"""Dataset x conditioning x timestep -> recorder -> store: the main job.

Work goes unit by unit (a unit is one shard of every array).  An image is encoded once, a prompt once a unit; then every
(sample, timestep, conditioning, noise draw) is a row, and rows share batches.  While one unit is computed, the next
one's images are read and the last one's arrays are written.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from diffprobe import rundir, store
from diffprobe.conditioning import NULL, assign_prompts, check_conditioning, guided_name
from diffprobe.console import Console, size_text
from diffprobe.data import load_dataset
from diffprobe.data.files import check_unicode
from diffprobe.data.folder import known_values
from diffprobe.data.images import ImageError, UnavailableError, fit_image
from diffprobe.data.samples import Dataset, Sample
from diffprobe.encoders import EncoderRecorder, VisionEncoder, load_extractor
from diffprobe.models import DiffusionModel, EncodedText, LatentRule, kept_name, out_of_memory
from diffprobe.noise import noise_seed, sample_noise
from diffprobe.recorder import Recorder
from diffprobe.sites import Site, select_sites

Policy = Literal["raise", "mark", "float32"]
Pixels = NDArray[np.float32]
Listener: TypeAlias = Recorder | EncoderRecorder
_PACKAGES = ("diffprobe", "torch", "diffusers", "transformers", "zarr", "xarray")
STORE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_LOOK_AT = 500  # samples whose captions a forecast reads, of a larger dataset
_LONGEST_TRIAL = 4.0  # seconds: a batch that takes longer than this is not doubled to find a better one


class NotFiniteError(RuntimeError):
    """The model gave a value that is not finite, or that the store's dtype cannot hold."""


@dataclass(frozen=True)
class Request:
    """Everything that decides the values in a store; two runs with equal requests may share one.

    See `extract` for the meaning of the fields.
    """

    model: str
    revision: str | None
    weights: str
    dataset: str
    fingerprint: str
    samples: int
    sites: list[str]
    maps: list[str]
    heads: str
    map_tokens: list[int]
    timesteps: list[int]
    conditionings: list[str]
    guidance: list[float]
    noise_draws: int
    reduce: dict[str, str]
    seed: int
    resolution: list[int]
    fit: str
    latent_rule: str
    compute_dtype: str
    store_dtype: str


@dataclass(frozen=True)
class Forecast:
    """What a run will take, before it starts."""

    samples: int
    passes: int
    bytes_by_site: dict[str, int]
    free_bytes: int | None
    seconds: float | None
    batch_rows: int
    truncated_prompts: int
    looked_at: int  # samples whose captions were read for it

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_site.values())


@dataclass(frozen=True)
class Summary:
    """What a run left behind."""

    path: str
    samples: int
    complete: int
    skipped: dict[str, str]
    seconds: float
    forecast: Forecast | None


# --- reductions -----------------------------------------------------------------------------------


def parse_reduce(given: str | Sequence[str] | dict[str, str], sites: Sequence[Site]) -> dict[str, str]:
    """A rule for every feature site, from ``RULE`` for all and ``PATTERN=RULE`` for some; later ones win.

    Rules: none, mean (over places), grid:HxW (average pooling), project:K (a seeded random projection of channels).
    """
    if isinstance(given, dict):
        given = [f"{pattern}={rule}" for pattern, rule in given.items()]
    rules = {site.name: "none" for site in sites}
    for entry in [given] if isinstance(given, str) else given:
        pattern, _, rule = entry.rpartition("=")
        _check_rule(rule)
        for site in select_sites(sites, pattern) if pattern else sites:
            if site.over_tokens and rule not in ("none", "mean") and not rule.startswith("project"):
                raise ValueError(f"Reduction {rule!r} needs a (y, x) grid; {site.name} runs over tokens.")
            rules[site.name] = rule
    return rules


def _check_rule(rule: str) -> None:
    kind, _, number = rule.partition(":")
    sizes = number.split("x")
    fine = rule in ("none", "mean") or (kind == "grid" and len(sizes) == 2 and all(s.isdigit() and int(s) for s in sizes))
    if not fine and not (kind == "project" and number.isdigit() and int(number)):
        raise ValueError(f"Reduction {rule!r} is not one of none, mean, grid:HxW, project:K.")


def projection(site: str, seed: int, channels: int, kept: int) -> Tensor:
    """The random projection (kept, channel) of one site, rows of variance 1/kept; named by (seed, site) alone."""
    generator = torch.Generator("cpu").manual_seed(noise_seed(seed, f"projection of {site}", channels, kept))
    return torch.randn(kept, channels, generator=generator) / kept**0.5


def make_reduce(rules: dict[str, str], seed: int) -> Callable[[Site, Tensor], Tensor]:
    """The function that a recorder applies to each tensor as it appears; maps pass unchanged."""
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
    """What every site's array looks like after reduction, from the shape that one row of it was recorded with."""
    guided = [guided_name(c, s) for c in conditionings if c != NULL for s in guidance]
    specs = []
    for site in sites:
        shape = shapes[site.name]
        if site.is_map:
            specs.append(
                store.ArraySpec(
                    site.name, site.path, site.kind, "maps", ("head", "token", "y", "x"), shape, tuple(conditionings)
                )
            )
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
        specs.append(store.ArraySpec(site.name, site.path, site.kind, "features", dims, shape, (*conditionings, *guided), rule))
    return specs


# --- the run --------------------------------------------------------------------------------------


@dataclass
class _Index:
    """What is kept of every sample for the whole run: no images, no questions, no masks."""

    ids: list[str]
    labels: list[Mapping[str, Any]]
    prompts: dict[str, list[str | None]]

    @classmethod
    def of(cls, dataset: Dataset, conditionings: Sequence[str], rows: Sequence[int]) -> _Index:
        """One pass over the dataset, or over some rows of it."""
        index = cls([], [], {})

        def noted() -> Iterator[Sample]:
            for sample in map(dataset.__getitem__, rows):
                _check_texts(sample)
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


def _check_texts(sample: Sample) -> None:
    """Raise ValueError where a text is no Unicode (half of a surrogate pair), which neither tokenizer nor store takes."""
    texts = {"id": sample.id, **{f"label {name!r}": value for name, value in sample.labels.items()}}
    texts |= {f"caption {number}": caption.text for number, caption in enumerate(sample.captions)}
    for what, text in texts.items():
        check_unicode(f"The {what} of sample {sample.id!r}", text)


@dataclass
class _Unit:
    """One unit while it is computed; rows of its lists and arrays are its samples.

    `prompts` holds one column a conditioning, `texts` each distinct prompt's encoding, `latents` those of readable images.
    """

    ids: list[str]
    status: NDArray[np.uint8]
    buffers: dict[str, NDArray[Any]]
    latents: dict[int, Tensor] = field(default_factory=dict)
    prompts: list[list[str | None]] = field(default_factory=list)
    texts: dict[str | None, EncodedText] = field(default_factory=dict)


class _Run:
    """One extraction: the request resolved against a model and a dataset, and the loop over units."""

    def __init__(
        self, model: DiffusionModel | VisionEncoder, dataset: Dataset, request: Request, index: _Index, on_nonfinite: Policy, tell: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.model, self.dataset, self.request, self.index = model, dataset, request, index
        self.on_nonfinite, self.tell = on_nonfinite, tell
        self.specs: list[store.ArraySpec] = []
        self.batch_rows = 1
        height, width = request.resolution
        self.latent_size = model.latent_size(height, width)
        self.store_dtype = STORE_DTYPES[request.store_dtype]
        self.exact = bool(request.guidance) or request.noise_draws > 1  # rounded once, after all that is computed from passes
        self.skipped: dict[str, str] = {}
        self._encoder_rows = 0  # images of one encoder pass, once more did not fit
        self._texts: dict[str | None, EncodedText] = {}

    def recorder(self, reduce: bool = True) -> Listener:
        request = self.request
        reduction = make_reduce(request.reduce, request.seed) if reduce else None
        if isinstance(self.model, VisionEncoder):
            return self.model.recorder(request.sites, reduction)
        return Recorder(
            self.model,
            request.sites,
            maps=request.maps,
            heads=request.heads,  # type: ignore[arg-type]
            tokens=request.map_tokens,
            stop_early=True,
            reduce=reduction,
            keep_steps=False,
            reuse=True,  # each row is copied into the unit's buffers before the next pass
        )

    # images and text

    def load_images(self, first: int, last: int) -> list[Pixels | str]:
        """Images (3, height, width) in [-1, 1], or the reason why one could not be read.

        NumPy alone: this runs in a thread beside the model's, and a torch operation there would start a second team of
        OpenMP threads, after which the model's own team no longer spins at its barriers (a third slower on two cores).
        """
        height, width = self.request.resolution
        loaded: list[Pixels | str] = []
        for index in range(first, last):
            try:
                image = fit_image(self.dataset[index].load(), (height, width), self.request.fit)
            except UnavailableError as error:  # a fault of the machine, which must not be noted as one of the image
                raise UnavailableError(f"{error} What was complete is kept; the same command goes on from there.") from error
            except ImageError as error:
                loaded.append(str(error))
            else:
                loaded.append(np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1))
        return loaded

    def encode_images(self, images: Sequence[Pixels], ids: Sequence[str]) -> Tensor:
        rows: list[Tensor] = []
        step = self._encoder_rows or max(1, self.batch_rows // 4)  # an encoder's activations are larger than the network's
        while sum(map(len, rows)) < len(images):
            start = sum(map(len, rows))
            part = slice(start, start + step)
            generators = [torch.Generator("cpu").manual_seed(noise_seed(self.request.seed, name, -1)) for name in ids[part]]
            pixels = torch.from_numpy(np.stack(images[part]))
            try:
                rows.append(self.model.encode_image(pixels, self.request.latent_rule, generators))  # type: ignore[arg-type]
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or step == 1:
                    raise
                self._encoder_rows = step = step // 2
                self.tell(f"Encoding {len(images[part])} images at once did not fit into memory; going on with {step}.")
        return torch.cat(rows)

    def encode_prompts(self, prompts: Sequence[str | None]) -> dict[str | None, EncodedText]:
        """Each distinct prompt once; those of the unit before are kept, older ones are not."""
        known = {p: text for p, text in self._texts.items() if p in prompts}
        fresh = [p for p in dict.fromkeys(prompts) if p not in known]
        for start in range(0, len(fresh), 64):
            part = fresh[start : start + 64]
            encoded = self.model.encode_text(part)
            known |= {prompt: encoded.take([row]) for row, prompt in enumerate(part)}
        self._texts = known
        return known

    # one batch

    def forward(self, recorder: Listener, noised: Tensor, timesteps: Tensor, text: EncodedText) -> dict[str, Tensor]:
        """One pass; a batch that does not fit is halved, and the smaller size is kept."""
        try:
            self.model.denoise(noised, timesteps, text)
            return recorder.last
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or len(noised) == 1:
                raise
        half = len(noised) // 2
        self.batch_rows = min(self.batch_rows, half)
        self.tell(f"A batch of {len(noised)} did not fit into memory; going on with {half}.")
        parts: list[dict[str, Tensor]] = []
        for rows in (range(half), range(half, len(noised))):
            index = list(rows)
            parts.append(dict(self.forward(recorder, noised[index], timesteps[index], text.take(index))))
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def checked(
        self, tensors: dict[str, Tensor], again: Callable[[], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
        """The tensors on the CPU in the buffers' dtype, and which rows hold a value that is not finite in the store's."""
        dtype = torch.float32 if self.exact else self.store_dtype
        kept = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        bad = self.rows_not_finite(kept)
        if bad.any() and self.on_nonfinite == "float32" and self.model.dtype != torch.float32:
            kept = {name: tensor.to("cpu", dtype) for name, tensor in again().items()}
            bad = self.rows_not_finite(kept)
        return kept, bad

    def rows_not_finite(self, tensors: dict[str, Tensor]) -> NDArray[np.bool_]:
        """A row's sum is finite only where all its values are; one pass, no mask of the tensor's size."""
        sums = torch.stack([t.to(self.store_dtype).flatten(1).sum(1, dtype=torch.float32) for t in tensors.values()])
        return (~sums.isfinite().all(0)).numpy()

    def leave_out(self, unit: _Unit, sample: int, site: str, timestep: int, conditioning: str) -> None:
        """Mark a sample whose values the store cannot hold, or raise NotFiniteError, as the run was told."""
        where = f"Sample {unit.ids[sample]!r}, site {site}, timestep {timestep}, conditioning {conditioning!r}"
        reason = f"{where}: a value is not finite in {self.request.store_dtype}."
        if self.on_nonfinite != "mark":
            hint = "Try --store-dtype float32 or --dtype float32, or --on-nonfinite mark to leave such samples out."
            raise NotFiniteError(f"{reason} {hint}")
        unit.status[sample] = store.NOT_FINITE
        self.skipped[unit.ids[sample]] = reason

    # one unit

    def compute(
        self, recorder: Listener, first: int, images: list[Pixels | str]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        """Every site's array of one unit, (sample, conditioning, timestep, ...), and the status of its samples."""
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
        unit = _Unit(ids, status, self.empty_buffers(count, list(readable)))
        if readable:
            encoded = self.encode_images(list(readable.values()), [ids[i] for i in readable])
            unit.latents = dict(zip(readable, encoded, strict=True))
            unit.prompts = [self.index.prompts[c][first : first + count] for c in request.conditionings]
            unit.texts = self.encode_prompts([p for column in unit.prompts for p in column])
        rows = [
            (i, t, c, draw)
            for i in readable
            for t in range(len(request.timesteps))
            for c in range(len(request.conditionings))
            for draw in range(request.noise_draws)
        ]
        while rows:  # batches of nearly equal size; batch_rows can shrink on the way
            size = -(-len(rows) // -(-len(rows) // self.batch_rows))
            batch, rows = rows[:size], rows[size:]
            self.compute_batch(recorder, unit, batch)
        return self.finish_buffers(unit), status

    def compute_batch(self, recorder: Listener, unit: _Unit, batch: list[tuple[int, int, int, int]]) -> None:
        """Run rows (sample, timestep, conditioning, draw) through the model and put what was recorded into the buffers."""
        request = self.request
        shape = (self.model.latent_channels, *self.latent_size)
        noise = torch.stack(
            [sample_noise(request.seed, unit.ids[i], request.timesteps[t], draw, shape) for i, t, _, draw in batch]
        )
        timesteps = torch.tensor([request.timesteps[t] for _, t, _, _ in batch])
        clean = torch.stack([unit.latents[i] for i, _, _, _ in batch])
        noised = self.model.add_noise(clean, noise.to(clean.device), timesteps)
        text = EncodedText.concatenate([unit.texts[unit.prompts[c][i]] for i, _, c, _ in batch])
        tensors = self.forward(recorder, noised, timesteps, text)
        kept, bad = self.checked(tensors, lambda: self.in_float32(recorder, noised, timesteps, text))
        for row in np.flatnonzero(bad):
            i, t, c, _ = batch[row]
            site = next(name for name, tensor in kept.items() if not tensor[row].to(self.store_dtype).isfinite().all())
            self.leave_out(unit, i, site, request.timesteps[t], request.conditionings[c])
        index = tuple(np.array(column) for column in zip(*((i, c, t) for i, t, c, _ in batch), strict=True))
        for name, tensor in kept.items():
            if request.noise_draws == 1:
                unit.buffers[name][index] = tensor.numpy()
            else:
                np.add.at(unit.buffers[name], index, tensor.numpy() / request.noise_draws)

    def in_float32(self, recorder: Listener, noised: Tensor, timesteps: Tensor, text: EncodedText) -> dict[str, Tensor]:
        """The same pass with the network raised to float32 for as long as it takes."""
        dtype = self.model.dtype
        network = self.model.network.float()
        try:
            raised = EncodedText(
                text.embeddings.float(),
                text.mask,
                None if text.pooled is None else text.pooled.float(),
                text.ids,
                text.spans,
                text.truncated,
            )
            self.model.denoise(noised.float(), timesteps, raised)
            return dict(recorder.last)
        finally:
            network.to(dtype)

    def empty_buffers(self, count: int, readable: list[int]) -> dict[str, NDArray[Any]]:
        """NaN everywhere; zero in the samples whose noise draws will be added up."""
        dtype = np.float32 if self.exact else np.dtype(self.request.store_dtype)
        before = (count, len(self.request.conditionings), len(self.request.timesteps))
        buffers = {s.site: np.full((*before, *s.shape), np.nan, dtype) for s in self.specs}
        for values in buffers.values() if self.request.noise_draws > 1 else ():
            values[readable] = 0
        return buffers

    def finish_buffers(self, unit: _Unit) -> dict[str, NDArray[Any]]:
        """Add the guided conditionings, f_u + s (f_c - f_u) from one pair of passes, and cast to the store's dtype."""
        conditionings = self.request.conditionings
        finished = {}
        for spec in self.specs:
            values = unit.buffers[spec.site]
            if spec.variable == "features" and self.request.guidance:
                null = values[:, conditionings.index(NULL)]
                guided = [
                    null + s * (values[:, conditionings.index(c)] - null)
                    for c in conditionings
                    if c != NULL
                    for s in self.request.guidance
                ]
                values = np.concatenate([values, np.stack(guided, axis=1)], axis=1)
            with np.errstate(over="ignore"):  # what does not fit is found below
                finished[spec.site] = values = values.astype(self.request.store_dtype, copy=False)
            if self.exact:  # what came from the model was checked; what was computed from it was not
                bad = ~np.isfinite(values).all(tuple(range(3, values.ndim))) & (unit.status == store.COMPLETE)[:, None, None]
                for i in np.flatnonzero(bad.any((1, 2))):
                    c, t = np.argwhere(bad[i])[0]
                    self.leave_out(unit, int(i), spec.site, self.request.timesteps[t], spec.conditionings[c])
        return finished

    # before the work

    def unit_samples(self) -> int:
        """Samples of one unit: its arrays, and the images that wait to be encoded, stay near 64 MiB.

        Below that a run has about 16 units, so that a resume loses little, but none of fewer than 32 rows, which would
        leave the batches too small.
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
        """Run one row: the shape of every site before reduction, and the seconds that it took."""
        with self.recorder(reduce=False) as recorder:
            seconds = self._time_batch(1)
        return {name: tuple(tensor.shape[1:]) for name, tensor in recorder.last.items()}, seconds

    def find_batch(self, seconds: float) -> float:
        """Choose how many rows share a batch; seconds per row.

        Doubles from one row, which takes `seconds`, while throughput grows by a tenth, a batch takes less than some
        seconds, memory is there, and a unit has that many rows.
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
                self.batch_rows = rows
            if seconds > best * 1.2:
                break
            best = min(best, seconds)
        return best

    def _time_batch(self, rows: int) -> float:
        text = self.encode_prompts([None])[None].take([0] * rows)
        noised = torch.zeros(
            rows, self.model.latent_channels, *self.latent_size, device=self.model.device, dtype=self.model.dtype
        )
        timesteps = torch.full((rows,), self.request.timesteps[0])
        start = time.perf_counter()
        self.model.denoise(noised, timesteps, text)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def extract(
    model: DiffusionModel | VisionEncoder | str,
    dataset: Dataset | str,
    out: str | Path,
    *,
    sites: str | Sequence[str] = "paper",
    maps: str | Sequence[str] = (),
    heads: Literal["mean", "all"] = "mean",
    map_tokens: Literal["prompt", "all"] = "prompt",
    timesteps: Sequence[int] = (10, 50, 100, 250, 500),
    conditionings: Sequence[str] = (NULL, "caption"),
    guidance: Sequence[float] = (),
    noise_draws: int = 1,
    reduce: str | Sequence[str] | dict[str, str] = "none",
    seed: int = 0,
    resolution: int | tuple[int, int] | None = None,
    fit: Literal["crop", "squash", "pad"] = "crop",
    latent_rule: LatentRule = "mean",
    store_dtype: Literal["float16", "float32"] = "float16",
    batch_rows: int | None = None,
    unit_samples: int | None = None,
    on_nonfinite: Policy = "raise",
    compress: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: bool = True,
    units: Sequence[int] | None = None,
) -> Summary:
    """Record a dataset's features and attention maps into a store; the same call again resumes it.

    Args:
        model: a loaded model or vision encoder, or an id, folder or embedded name for `load_extractor`.  An encoder has
            one timestep, 0, and one conditioning, null, whatever is asked; its "paper" sites are `VisionEncoder.preset`.
        dataset: a dataset, or a folder or spec for `load_dataset`.
        out: path or fsspec URL of the Zarr store.
        sites, maps: patterns for `select_sites`; either may be empty.
        map_tokens: "prompt" keeps a map's positions up to the longest prompt of the run, "all" the padding too.
        conditionings: names that `diffprobe.conditioning` explains.
        guidance: store f_u + s (f_c - f_u) too, for each s and each conditioning but "null", which must be there.
        noise_draws: average features and maps over this many noise tensors.
        reduce: a rule for all sites, or PATTERN=RULE for some: none, mean, grid:HxW, project:K.
        resolution: image side in pixels, or (height, width); the model's own by default.
        batch_rows: rows of one forward pass; found by timing when None, and kept by the store for resuming.
        unit_samples: samples of one shard; chosen so that shards stay near 64 MiB when None.
        on_nonfinite: "raise", "mark" the sample and go on, or "float32" to run the pass again so.
        dry_run: forecast only; nothing is written, and of a large dataset only some captions are read.
        force: go on although the disk's free space is too small for the forecast.
        units: of a store that is there, compute these and no others, whether they are done or not (as `repair` does);
            each is replaced once its new values are known.  Model and dataset may have other names then, not other content.

    Returns:
        What was done. On equal batches, values are bit-identical. Under another batch size, order or number of processes
        they differ by one rounding of the store's dtype and, where the model computes in float32, by at most 1e-4 of the
        site's root mean square (4e-5 measured on a CPU); of guided features 1 + 2 |s| times that, of maps 1e-3 of theirs.

    Raises:
        ValueError: the request is off, or the store holds another request (the message lists the differences).

    >>> extract("shapes-sd", "shapes:64?split=test", "runs/demo.zarr", maps="cross", timesteps=[50]).complete  # doctest: +SKIP
    64
    """
    started = time.perf_counter()
    console = Console(stderr=True, quiet=not progress)
    tell = lambda text: console.print(text)  # noqa: E731
    _check_arguments(timesteps, conditionings, guidance, noise_draws, store_dtype, on_nonfinite, heads)
    dataset = load_dataset(dataset) if isinstance(dataset, str) else dataset
    model = load_extractor(model) if isinstance(model, str) else model
    if isinstance(model, VisionEncoder):
        if guidance or maps or noise_draws > 1:
            raise ValueError(
                f"{model.model_id} is a vision encoder: it has no guidance, attention maps or noise draws to record."
            )
        tell(f"{model.model_id} is a vision encoder: each image once, without noise (timestep 0) and without text (null).")
        timesteps, conditionings = (0,), (NULL,)
        sites = [
            name
            for s in (sites.split(",") if isinstance(sites, str) else sites)
            for name in (model.preset if s == "paper" else [s])
        ]
    for timestep in timesteps:
        model.check_timestep(timestep)
    size = model.resolution if resolution is None else resolution
    height, width = (size, size) if isinstance(size, int) else size
    model.latent_size(height, width)  # refuses sides that do not fit
    available = model.sites
    features = select_sites([s for s in available if not s.is_map], sites) if sites else []
    map_sites = select_sites([s for s in available if s.is_map], maps) if maps else []
    chosen = [s for s in available if s in features or s in map_sites]
    rules = parse_reduce(reduce, features)
    new_forecast = dry_run and not store.exists(out)  # which no request of a store is compared with
    index = _Index.of(dataset, conditionings, range(0, len(dataset), -(-len(dataset) // _LOOK_AT) if new_forecast else 1))
    lengths = _prompt_lengths(model, index.prompts)
    kept_tokens = model.prompt_tokens if map_tokens == "all" else min(model.prompt_tokens, max(lengths.values()))
    tokens = list(range(kept_tokens))
    request = Request(
        model=model.model_id, revision=model.revision, weights=model.weights_hash(), dataset=dataset.name,
        fingerprint="" if new_forecast else dataset.fingerprint(), samples=len(dataset), sites=[s.name for s in features], maps=[s.name for s in map_sites],
        heads=heads, map_tokens=tokens, timesteps=list(timesteps), conditionings=list(conditionings), guidance=list(guidance),
        noise_draws=noise_draws, reduce=rules, seed=seed, resolution=[height, width], fit=fit, latent_rule=latent_rule,
        compute_dtype=str(model.dtype).removeprefix("torch."), store_dtype=store_dtype,
    )  # fmt: skip
    run = _Run(model, dataset, request, index, on_nonfinite, tell)
    shapes, seconds_per_row = run.first_pass()
    specs = run.specs = array_specs(chosen, shapes, rules, conditionings, guidance)
    state = PartialState(cpu=model.device.type == "cpu") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    rank, ranks = (state.process_index, state.num_processes) if state else (0, 1)
    with rundir.sole_writer(out, rank, ranks, dry_run):
        resuming = store.exists(out)
        if rank == 0 and not resuming and not rundir.is_remote(out) and Path(rundir.locate(out)).exists():
            raise ValueError(f"{out} exists and is not a store; give another --out, or remove it.")
        if resuming:
            found = store.StoreWriter(out)
            stored = found.attributes["request"]
            asked = asdict(request)
            if units is not None:
                asked |= {name: stored[name] for name in ("model", "revision", "dataset")}
            other = "holds another request; give another --out, or match it."
            other = other if units is None else "was recorded otherwise; nothing was changed in it:"
            rundir.check_request(out, stored | {"model": kept_name(stored["model"])}, asked, other)
            batch_rows = batch_rows or int(found.attributes["batch_rows"])
            units = found.pending if units is None else units
        forecast = None
        if rank == 0 and (units is None or units or dry_run):
            if batch_rows:
                run.batch_rows = batch_rows
            else:
                seconds_per_row = run.find_batch(seconds_per_row)
            itemsize = np.dtype(store_dtype).itemsize
            passes = len(dataset) * len(timesteps) * len(conditionings) * noise_draws
            forecast = Forecast(
                samples=len(dataset),
                passes=passes,
                bytes_by_site={s.site: s.bytes_per_sample(len(timesteps), itemsize) * len(dataset) for s in specs},
                free_bytes=rundir.free_bytes(out),
                seconds=seconds_per_row * passes / ranks,
                batch_rows=run.batch_rows,
                truncated_prompts=sum(length > model.prompt_tokens for length in lengths.values()),
                looked_at=len(index.ids),
            )
            if not (resuming or dry_run):  # who asked for it alone is given it
                tell(describe_forecast(forecast))
            _check_room(forecast, force, resuming or dry_run)
        if dry_run:
            return Summary(str(out), len(dataset), 0, {}, time.perf_counter() - started, forecast)
        if rank == 0 and not resuming:
            _lay_out(run, out, unit_samples or run.unit_samples(), compress, ranks)
        elif rank == 0:
            store.clear_cut_writes(out)
        if state:
            state.wait_for_everyone()
        writer = store.StoreWriter(out)
        run.batch_rows = batch_rows or int(writer.attributes["batch_rows"])
        mine = [unit for unit in (writer.pending if units is None else units) if unit % ranks == rank]
        _work(run, writer, mine, console if rank == 0 else Console(quiet=True))
        if state:
            state.wait_for_everyone()
        status = writer.status
    for row in np.flatnonzero((status != store.COMPLETE) & (status != store.PENDING)):
        run.skipped.setdefault(index.ids[row], store.STATUS_WORDS[int(status[row])])  # other processes' or an earlier run's
    complete = int((status == store.COMPLETE).sum())
    return Summary(str(out), len(dataset), complete, run.skipped, time.perf_counter() - started, forecast)


def _check_arguments(
    timesteps: Sequence[int],
    conditionings: Sequence[str],
    guidance: Sequence[float],
    noise_draws: int,
    store_dtype: str,
    policy: str,
    heads: str,
) -> None:
    if not timesteps or len(set(timesteps)) < len(timesteps):
        raise ValueError(f"Timesteps must be given, each once; got {list(timesteps)}.")
    if not conditionings or len(set(conditionings)) < len(conditionings):
        raise ValueError(f"Conditionings must be given, each once; got {list(conditionings)}.")
    for name in conditionings:
        check_conditioning(name)
    if guidance and (NULL not in conditionings or len(conditionings) < 2):
        raise ValueError(f"Guidance needs the conditioning 'null' and another one; got {', '.join(conditionings)}.")
    if not all(math.isfinite(scale) for scale in guidance):
        raise ValueError(f"Guidance scales must be finite numbers; got {', '.join(map(str, guidance))}.")
    for name in conditionings:
        check_unicode("A conditioning", name)
    if noise_draws < 1:
        raise ValueError(f"noise_draws must be at least 1; got {noise_draws}.")
    for name, given, valid in (
        ("store_dtype", store_dtype, tuple(STORE_DTYPES)), ("on_nonfinite", policy, ("raise", "mark", "float32")), ("heads", heads, ("mean", "all"))
    ):  # fmt: skip
        if given not in valid:
            raise ValueError(f"{name} {given!r} is not one of {', '.join(valid)}.")


def _prompt_lengths(model: DiffusionModel | VisionEncoder, prompts: dict[str, list[str | None]]) -> dict[str | None, int]:
    """Tokens of each distinct prompt, before cutting."""
    distinct = list(dict.fromkeys(p for column in prompts.values() for p in column))
    parts = [distinct[i : i + 512] for i in range(0, len(distinct), 512)]
    return {p: n for part in parts for p, n in zip(part, model.tokens(part)[2], strict=True)}


def _lay_out(run: _Run, out: str | Path, unit_samples: int, compress: bool, ranks: int) -> None:
    """Rank 0's part before the work: every label, prompt and token is written, every array allocated."""
    request, dataset, model, index = run.request, run.dataset, run.model, run.index
    kept = len(request.map_tokens)
    shape = (len(index.ids), len(request.conditionings))
    text = np.empty(shape, object)
    ids, spans = np.zeros((*shape, kept), np.int32), np.zeros((*shape, kept, 2), np.int32)
    for column, name in enumerate(request.conditionings):
        prompts = index.prompts[name]
        text[:, column] = ["" if p is None else p for p in prompts]
        for start in range(0, len(prompts), 512):
            part = slice(start, start + 512)
            token_ids, token_spans, _ = model.tokens(prompts[part])
            ids[part, column], spans[part, column] = token_ids[:, :kept], token_spans[:, :kept]
    store.create_store(
        out,
        attributes={
            "request": asdict(request),
            "data": dataset.spec,
            "map_tokens_rule": "all" if kept == model.prompt_tokens else "prompt",
            "batch_rows": run.batch_rows,
            "processes": ranks,
            "on_nonfinite": run.on_nonfinite,
            "pipeline": type(model.pipeline).__name__,
            "random_weights": model.random_weights,
            "prediction_type": model.prediction_type,
            "special_tokens": model.special_tokens(),
            "versions": rundir.package_versions(_PACKAGES),
            "commit": rundir.code_commit(),
        },
        sample_ids=index.ids,
        labels=_label_arrays(index.labels),
        timesteps=request.timesteps,
        prompts={"text": text, "token_id": ids, "token_start": spans[..., 0], "token_end": spans[..., 1]},
        conditionings=request.conditionings,
        tokens=request.map_tokens,
        specs=run.specs,
        unit_samples=unit_samples,
        dtype=request.store_dtype,
        compress=compress,
    )


_TAKEN = {
    "sample", "status", "done", "digest", "prompts", "conditioning", "timestep", "channel", "y", "x", "token", "head", "unit", "patch", "zarr.json"
}  # fmt: skip


def _label_arrays(labels: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """One array a label: numbers with NaN, texts with "" where a sample has none."""
    arrays: dict[str, NDArray[Any]] = {}
    for name in dict.fromkeys(key for row in labels for key in row):
        given = [row.get(name) for row in labels]
        values = known_values([value.item() if isinstance(value, np.generic) else value for value in given])
        if name in _TAKEN or name.startswith((".", "__")) or not name.strip() or "/" in name:
            why = (
                "the store uses that name" if name in _TAKEN else "a name in a store has letters, and no slash or dot in front"
            )
            raise ValueError(f"A label cannot be called {name!r}: {why}. Rename it in the captions file.")
        if all(isinstance(v, int) and abs(v) < 2**63 for v in values):
            arrays[name] = np.array(values, np.int64)
        elif all(v is None or isinstance(v, int | float) for v in values):
            arrays[name] = np.array([np.nan if v is None else v for v in values], np.float64)
        else:
            arrays[name] = np.array(["" if v is None else str(v) for v in values], object)
    return arrays


def _work(run: _Run, writer: store.StoreWriter, units: list[int], console: Console) -> None:
    """Compute and write units; the next one's images and the last one's arrays travel in two threads beside."""
    bounds = [writer.bounds(u) for u in units]
    with (
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as writing,
        console.progress("extract", "samples", sum(last - first for first, last in bounds)) as advance,
        run.recorder() as recorder,
    ):
        images = [reading.submit(run.load_images, *b) for b in bounds[:1]]
        written: Future[None] | None = None

        for number, (unit, (first, last)) in enumerate(zip(units, bounds, strict=True)):
            loaded = images.pop().result()
            if number + 1 < len(units):
                images.append(reading.submit(run.load_images, *bounds[number + 1]))
            arrays, status = run.compute(recorder, first, loaded)
            advance(last - first)
            if written is not None:
                written.result()  # at most two units are in memory: the one that was computed, the one being written
            written = writing.submit(writer.write_unit, unit, arrays, status)
        if written is not None:
            written.result()


def _check_room(forecast: Forecast, force: bool, waived: bool) -> None:
    if force or waived or forecast.free_bytes is None or forecast.total_bytes < 0.95 * forecast.free_bytes:
        return
    raise ValueError(
        f"The store needs {size_text(forecast.total_bytes)} and {size_text(forecast.free_bytes)} are free. "
        "Choose fewer sites or timesteps, or --reduce; --force goes on regardless."
    )


def describe_forecast(forecast: Forecast) -> str:
    """The forecast as a person reads it."""
    some = "" if forecast.looked_at == forecast.samples else f" (judged by {forecast.looked_at} of them)"
    lines = [f"{forecast.samples} samples{some}, {forecast.passes} forward passes in batches of {forecast.batch_rows}"]
    lines += [f"  {name:<24} {size_text(size):>10}" for name, size in forecast.bytes_by_site.items()]
    free = "" if forecast.free_bytes is None else f", {size_text(forecast.free_bytes)} free"
    lines.append(f"  {'total':<24} {size_text(forecast.total_bytes):>10}{free}")
    if forecast.seconds is not None:
        lines.append(f"  about {_duration(forecast.seconds)} of forward passes")
    if forecast.truncated_prompts:
        where = f" of those {forecast.looked_at}" if some else ""
        lines.append(
            f"  {forecast.truncated_prompts} distinct prompts{where} are longer than the text encoder takes and will be cut"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def repair(
    path: str | Path,
    model: DiffusionModel | VisionEncoder | str | None = None,
    dataset: Dataset | str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    use_safetensors: bool = True,
    on_nonfinite: Policy | None = None,
    retry_unreadable: bool = False,
    progress: bool = True,
) -> tuple[list[store.Fault], Summary | None]:
    """Find the units of a store that cannot be trusted or are not done, and compute only those, from the store's own request.

    A unit stays as it is until its new values are known, so a repair that is refused or fails loses nothing.

    Args:
        model, dataset: in the place of those that the store names; where they lie may differ, not what they are.
        device, dtype: as for `load_extractor`; the number type that the store was computed in by default.
        on_nonfinite: as for `extract`; what the store was recorded with by default.
        retry_unreadable: try again the images that could not be read.

    Raises:
        ValueError: the model, its number type or the dataset is not what the store was recorded from.
    """
    writer = store.StoreWriter(path)
    with rundir.sole_writer(path):
        faults = store.verify_store(path)
    request, again = writer.attributes["request"], {fault.unit for fault in faults}
    wanted = {store.PENDING} | ({store.UNREADABLE} if retry_unreadable else set())
    for unit in set(range(-(-request["samples"] // writer.unit_samples))) - again:
        if wanted & set(writer.unit_status(unit).tolist()):
            again.add(unit)
    if not again:
        return faults, None
    if model is None or isinstance(model, str):
        model = load_extractor(
            model or request["model"], device, dtype or request["compute_dtype"], request["revision"] if model is None else None,
            use_safetensors=use_safetensors, random_weights=writer.attributes.get("random_weights"),
        )  # fmt: skip
    summary = extract(
        model, dataset or writer.attributes["data"], path,
        sites=request["sites"], maps=request["maps"], heads=request["heads"],
        map_tokens=writer.attributes["map_tokens_rule"],
        timesteps=request["timesteps"], conditionings=request["conditionings"], guidance=request["guidance"],
        noise_draws=request["noise_draws"], reduce=request["reduce"], seed=request["seed"], resolution=tuple(request["resolution"]),
        fit=request["fit"], latent_rule=request["latent_rule"], store_dtype=request["store_dtype"], progress=progress,
        on_nonfinite=on_nonfinite or writer.attributes.get("on_nonfinite", "raise"), units=sorted(again),
    )  # fmt: skip
    return faults, summary


__all__ = ["Forecast", "NotFiniteError", "Request", "Summary", "describe_forecast", "extract", "repair"]
