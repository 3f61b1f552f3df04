"""Activation patching between twins: what of one image, put into its twin's pass, moves the twin's outcome?

Both images of a drawn pair differ in one attribute of one object and are denoised with the same noise.  At one site and timestep, in
the cells of that object, one's activation takes the place of the other's (`diffprobe.edit.patch`).  Two outcomes are followed: the
network's own output, and the logit of a linear probe at the last block.  `diffprobe.probes.causal` makes tables of them.

Controls at every cell: a random direction of the same length in the same places, and the twin's own activation in as many other
places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffprobe.console import Console
from diffprobe.data.shapes import picture, render
from diffprobe.data.twins import PATTERNS, Pair, mmvp_pair
from diffprobe.edit import Change, Edit, patch
from diffprobe.forward import Batch, Engine, Row, to_pixels
from diffprobe.models import DiffusionModel
from diffprobe.probes.causal import CHANGES, DIRECTION, ELSEWHERE, PATCH, causal_table, rank_agreement
from diffprobe.probes.linear import fit_probe
from diffprobe.recorder import Recorder
from diffprobe.sites import select_sites

# Patterns of twins whose images differ in one attribute of the first object, which stays where it is.
ATTRIBUTES = {"colour": "colour", "state": "fill", "structure": "fill", "orientation": "direction", "text": "mark"}
OUTCOMES = ("prediction", "probe logit")


@dataclass(frozen=True)
class Twins:
    """Pairs of one pattern, encoded.

    Attributes:
        pairs: with their scenes and captions.
        latents: (image, channel, y, x), both images of a pair one after the other.
        masks: (image, y, x), the object that differs; that of both for each.
        values: of each image, the attribute in which it differs.
    """

    pairs: Sequence[Pair]
    latents: Tensor
    masks: Bool[Tensor, "image y x"]
    values: Sequence[str]

    @property
    def ids(self) -> list[str]:
        """One a pair, so that both images share their noise."""
        return [f"twins-{row // 2}" for row in range(len(self.values))]


def load_twins(model: DiffusionModel, pattern: str, count: int, seed: int = 0, batch_rows: int = 16) -> Twins:
    """The first pairs of a pattern.

    Raises:
        ValueError: twins of the pattern differ in more than one attribute.
    """
    if pattern not in ATTRIBUTES:
        raise ValueError(
            f"Twins of {pattern!r} do not differ in one attribute in place; choose one of {', '.join(ATTRIBUTES)}."
        )
    first, step = PATTERNS.index(pattern), len(PATTERNS)
    pairs = [mmvp_pair(seed, first + step * number) for number in range(count)]
    scenes = [scene for pair in pairs for scene in pair.scenes]
    engine = Engine(model, seed=seed, batch_rows=batch_rows)
    pixels = [to_pixels(picture(scene), model.size, "crop") for scene in scenes]
    covered = [np.logical_or(*(render(scene)[1][0] for scene in pair.scenes)) for pair in pairs]
    masks = torch.from_numpy(np.repeat(np.stack(covered), 2, axis=0))
    values = [str(getattr(scene.objects[0], ATTRIBUTES[pattern])) for scene in scenes]
    return Twins(pairs, engine.encode_images(pixels, [str(row) for row in range(len(scenes))]), masks, values)


def cells_of(masks: Bool[Tensor, "image y x"], grid: tuple[int, ...]) -> Bool[Tensor, "image y x"]:
    """The cells of a grid that masks touch, as an edit's `places` are."""
    return functional.adaptive_max_pool2d(masks[:, None].float(), grid)[:, 0].bool()


def passes(
    model: DiffusionModel, twins: Twins, timestep: int, sites: Sequence[str], seed: int, batch_rows: int
) -> Iterator[tuple[Batch, list[int]]]:
    """Unedited passes without a prompt with their recorded sites, in whole pairs, and which images they are of."""
    engine = Engine(model, seed=seed, batch_rows=max(2, batch_rows // 2 * 2))
    with Recorder(model, sites, keep_steps=False) as recorder:
        for start in range(0, len(twins.values), engine.batch_rows):
            rows = [Row(row, None, timestep) for row in range(start, min(start + engine.batch_rows, len(twins.values)))]
            for batch in engine.run(recorder, twins.latents, twins.ids, rows):
                if len(batch.rows) % 2:
                    raise MemoryError("Twins share a batch, and two rows do not fit into memory.")
                yield batch, [row.image for row in batch.rows]


def pooled(feature: Float[Tensor, "row channel y x"], cells: Bool[Tensor, "row y x"]) -> Float[Tensor, "row channel"]:
    """Means over an object's cells."""
    weights = (cells / cells.sum((1, 2), keepdim=True)).to(feature)
    return torch.einsum("rcyx,ryx->rc", feature, weights)


def probe_twins(
    model: DiffusionModel, twins: Twins, sites: Sequence[str], timesteps: Sequence[int], *, seed: int = 0, batch_rows: int = 16
) -> tuple[pd.DataFrame, dict[tuple[str, int], Any], tuple[Any, ...]]:
    """Linear probes of the attribute in the means over the object's cells, at each site and timestep.

    Returns:
        The table of `fit_probe` with sites and the test rows' own scores, the fitted readouts, and the classes.
    """
    tables, readouts, classes = [], {}, ()
    gathered: dict[tuple[str, int], list[Tensor]] = {}
    for timestep in timesteps:
        for batch, images in passes(model, twins, timestep, sites, seed, batch_rows):
            for site in sites:
                feature = batch.tensors[site]
                cells = cells_of(twins.masks[images], feature.shape[-2:]).to(feature.device)
                gathered.setdefault((site, timestep), []).append(pooled(feature, cells).float().cpu())
    for (site, timestep), parts in gathered.items():
        fitted = fit_probe(torch.cat(parts).numpy(), twins.values, groups=twins.ids, seed=seed, keep_rows=True, n_jobs=1)
        tables.append(fitted.table.assign(site=site, timestep=timestep))
        readouts[site, timestep], classes = fitted.estimators_[0], fitted.classes
    return pd.concat(tables, ignore_index=True), readouts, classes


def activation_patching(
    model: DiffusionModel,
    twins: Twins,
    sites: Sequence[str],
    timesteps: Sequence[int],
    readouts: dict[tuple[str, int], Any],
    classes: Sequence[Any],
    *,
    seed: int = 0,
    batch_rows: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Patch each site of each image from its twin, with both controls.

    Args:
        sites: places of features with a (y, x) grid, by name.
        readouts: linear probes of the attribute by (site, timestep), as `probe_twins` gives; that of the last site is followed.

    Returns:
        ``moved`` and ``whole`` (outcome, change, site, timestep, pair): how far a change moved an outcome towards the twin's, and how
        far that is, summed over both directions of a pair.
    """
    count = len(twins.pairs)
    moved = np.zeros((len(OUTCOMES), len(CHANGES), len(sites), len(timesteps), count))
    whole = np.zeros_like(moved)
    generator = torch.Generator().manual_seed(seed)
    console = Console(stderr=True, quiet=not progress)
    with console.progress("patch", "passes", len(timesteps) * len(sites) * len(CHANGES) * len(twins.values)) as advance:
        for when, timestep in enumerate(timesteps):
            last = sites[-1]
            for batch, images in passes(model, twins, timestep, sites, seed, batch_rows):
                partner = [row ^ 1 for row in range(len(images))]
                outcome = _Outcome(model, batch, twins, images, readouts[last, timestep], classes)
                start = outcome.of(batch.prediction, batch.tensors[last])
                ends = outcome.of(batch.prediction, batch.tensors[last], partner)
                for where, site in enumerate(sites):
                    for what, (change, places) in enumerate(
                        _changes(batch.tensors[site], twins.masks[images], partner, generator)
                    ):
                        with Edit(model, site, change, places=places), Recorder(model, last, keep_steps=False) as recorder:
                            prediction = model.denoise(batch.inputs, batch.timesteps, batch.text)
                        found = outcome.of(prediction, recorder.last[last])
                        for kind, (a, b, c) in enumerate(zip(start, ends, found, strict=True)):
                            cell = (kind, what, where, when)
                            np.add.at(moved[cell], np.array(images) // 2, ((c - a) * (b - a)).sum(1).double().cpu().numpy())
                            np.add.at(whole[cell], np.array(images) // 2, ((b - a) ** 2).sum(1).double().cpu().numpy())
                        advance(len(images))
    dims = ("outcome", "change", "site", "timestep", "pair")
    coords = {"outcome": list(OUTCOMES), "change": list(CHANGES), "site": list(sites), "timestep": list(timesteps)}
    return xr.Dataset({"moved": (dims, moved), "whole": (dims, whole)}, coords)


def own_output(model: DiffusionModel, batch: Batch, prediction: Tensor | None) -> Float[Tensor, "row channel y x"]:
    """What the network itself gives: a velocity is turned back from the predicted noise, which holds the input too."""
    assert prediction is not None
    levels = (model.levels.signal, model.levels.spread)
    signal, spread = (level[batch.timesteps].to(prediction.device).view(-1, 1, 1, 1) for level in levels)
    if model.kind.flow:
        return (prediction.float() - batch.inputs.float()) / (signal * model.kind.sign)
    if model.prediction_type != "v_prediction":
        return prediction.float()
    return (prediction.float() - spread * batch.inputs.float()) / signal


class _Outcome:
    """What is followed of a pass: the network's own output, and the difference of the twins' logits at the last site."""

    def __init__(
        self, model: DiffusionModel, batch: Batch, twins: Twins, images: Sequence[int], readout: Any, classes: Sequence[Any]
    ) -> None:
        self.model, self.batch, self.masks = model, batch, twins.masks[list(images)]
        weights = torch.from_numpy(readout.weights).float()
        weights = weights if len(weights) > 1 else torch.cat([-weights / 2, weights / 2])
        every = torch.zeros(len(classes) + 1, weights.shape[1])  # a value that the probe never saw has no logit
        every[list(readout.codes)] = weights
        numbers = {value: number for number, value in enumerate(classes)}
        own, other = ([numbers.get(twins.values[image ^ side], len(classes)) for image in images] for side in (0, 1))
        self.direction = every[other] - every[own]

    def of(self, prediction: Tensor | None, feature: Tensor, take: Sequence[int] | None = None) -> list[Tensor]:
        """Both outcomes (row, number), of the rows or of those to take in their place."""
        output, rows = own_output(self.model, self.batch, prediction), list(take) if take else slice(None)
        means = pooled(feature, cells_of(self.masks, feature.shape[-2:]).to(feature.device)).float().cpu()
        return [output[rows].flatten(1).cpu(), (means[rows] * self.direction).sum(1, keepdim=True)]


def _changes(
    feature: Tensor, masks: Tensor, partner: Sequence[int], generator: torch.Generator
) -> Iterator[tuple[Change, Bool[Tensor, "row y x"]]]:
    """The patch and its controls at one site, each with its places, in the order of `CHANGES`."""
    cells = cells_of(masks, feature.shape[-2:])
    twin = feature[list(partner)]
    length = (twin - feature).float().norm(dim=1, keepdim=True)
    noise = torch.randn(len(feature), feature.shape[1], 1, 1, generator=generator).to(length)
    moved = feature + (length * noise / noise.norm(dim=1, keepdim=True)).to(feature)
    order = torch.rand(cells.flatten(1).shape, generator=generator).masked_fill(cells.flatten(1), 2.0).argsort(1)
    others = torch.zeros_like(cells.flatten(1))
    for row, (chosen, size) in enumerate(zip(order, cells.flatten(1).sum(1), strict=True)):
        others[row, chosen[: min(int(size), others.shape[1] - int(size))]] = True
    by_name = {
        PATCH: (patch(twin), cells),
        DIRECTION: (patch(moved), cells),
        ELSEWHERE: (patch(twin), others.view(cells.shape)),
    }
    for name in CHANGES:
        yield by_name[name]


@dataclass(frozen=True)
class CausalMap:
    """What is held where, by intervention and by probe.

    Attributes:
        effects: as `activation_patching` gives them.
        table: rows of `causal_table`, then those of the linear probe, whose label is the attribute.
        agreement: of each outcome over all sites but the last, as `rank_agreement` gives it.
    """

    effects: xr.Dataset
    table: pd.DataFrame
    agreement: dict[str, dict[str, float]]


def causal_map(
    model: DiffusionModel,
    pattern: str = "colour",
    sites: str | Sequence[str] = "blocks",
    timesteps: Sequence[int] = (50, 250, 500),
    *,
    pairs: int = 16,
    train_pairs: int = 120,
    seed: int = 0,
    batch_rows: int = 16,
    progress: bool = True,
) -> CausalMap:
    """Where an attribute is causally held, beside where a linear probe reads it.

    Args:
        pattern: of drawn twins, a key of `ATTRIBUTES`.
        sites: features with a (y, x) grid; the network's last block, where the probe's logit is followed, is added.
        pairs: of twins that are patched; `train_pairs` others are for the probes.
        seed: of twins, noise, splits and bootstrap.

    Raises:
        ValueError: the pattern is unknown, a site matches nothing or has no grid, or a timestep is none of the model's.
    """
    for timestep in timesteps:
        model.check_timestep(timestep)
    names = grid_sites(model, sites)
    training = load_twins(model, pattern, train_pairs, seed + 1, batch_rows)
    probed, readouts, classes = probe_twins(model, training, names, timesteps, seed=seed, batch_rows=batch_rows)
    twins = load_twins(model, pattern, pairs, seed, batch_rows)
    effects = activation_patching(
        model, twins, names, timesteps, readouts, classes, seed=seed, batch_rows=batch_rows, progress=progress
    )
    places = pd.MultiIndex.from_frame(probed[["site", "timestep"]], names=("site", "timestep"))
    hits = xr.DataArray(np.stack(probed["rows"].tolist()), {"cell": places}, ("cell", "row")).unstack("cell")
    read = probed.drop(columns="rows").assign(label=ATTRIBUTES[pattern], n=probed["n_test"], control="control task")
    table = pd.concat([causal_table(effects, seed=seed), read], ignore_index=True)
    before = effects.isel(site=slice(-1))  # at the last block the way is over: its patch moves the logit whole
    return CausalMap(effects, table, {name: rank_agreement(before, hits, name, seed=seed) for name in OUTCOMES})


def grid_sites(model: DiffusionModel, sites: str | Sequence[str]) -> list[str]:
    """Names of the sites that can be patched, in the order in which they run; the network's last block is among them.

    Raises:
        ValueError: a pattern matches nothing, or only what has no place in the image.
    """
    able = [s for s in model.sites if s.path and not s.is_map and not s.over_tokens and s.kind not in ("input", "modulated")]
    outer = "block" if hasattr(model.network, "down_blocks") else "transformer_block"
    last = [s.name for s in able if s.kind == outer and not s.name.startswith("M-")][-1]
    chosen = {s.name for s in select_sites(able, sites)} | {last}
    stages = ("D", "M", "U", "T", "S")
    ordered = sorted(
        (s for s in able if s.name != last), key=lambda site: stages.index(site.name[0]) if site.name[0] in stages else 0
    )
    return [*(site.name for site in ordered if site.name in chosen), last]
