"""Localization: does a map light up where its word's object is?

Maps (row, ..., y, x), not negative, are scored against masks (row, y, x) on the masks' grid.  Every combination of the
dimensions in between (timestep, head, ...) is a cell of one table.  Maps are enlarged bilinearly, which keeps their range
(bicubic enlargement would add negative mass and new peaks).

The invariant: each score comes with its chance level and with the same score of unrelated maps and masks, all on the same
rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from diffprobe.probes.cells import column_means, macro_mean, mean_interval, p_above_zero, resampling_weights
from diffprobe.probes.task import Floats, combinations, need_dimensions, number_ids
from diffprobe.stats import holm, share_interval

Bools = NDArray[np.bool_]

SCORES: dict[str, str] = {
    "pointing": "the map's highest pixel lies in the mask (Zhang et al. 2016, no tolerance; tied pixels share the point)",
    "mass": "share of the map's sum inside the mask",
    "lift": "mass over the mask's share of the image",
    "iou_fixed": "IoU of the pixels above 0.4 of the map's range (DAAM, Tang et al. 2023)",
    "iou_otsu": "IoU of the pixels above Otsu's threshold",
    "iou_tuned": "IoU above the share of the range that did best on the other half of the images",
    "auc": "area under the pixels' ROC curve",
    "ap": "average precision of the pixels",
    "nss": "normalised scanpath saliency: mean standardised value inside the mask (Peters et al. 2005)",
}
OWN, GAUSSIAN, SHUFFLED, MOVED = "word", "centred Gaussian", "shuffled mask", "moved mask"
FIXED_THRESHOLD = 0.4
THRESHOLDS = np.linspace(0.05, 0.95, 19)  # shares of a map's range that tuning chooses from
BINS = 256  # of Otsu's histogram
_BLOCK = 64  # maps enlarged and sorted at once
_DIRECT = ("pointing", "mass", "lift", "auc", "ap", "nss")
_FIXED_COLUMN = len(_DIRECT) + int(np.argmin(np.abs(THRESHOLDS - FIXED_THRESHOLD)))
_OTSU_COLUMN = len(_DIRECT) + len(THRESHOLDS)
_REASONS = ("", "empty mask", "full mask", "constant map", "map not finite", "no such map")


def localization_score(
    maps: xr.DataArray,
    masks: ArrayLike,
    *,
    controls: Mapping[str, ArrayLike] | None = None,
    classes: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    own: str = OWN,
    seed: int = 0,
    n_resamples: int = 2000,
    keep_rows: bool = False,
) -> pd.DataFrame:
    """Scores every map against its row's mask, with controls, chance and intervals.

    Two controls are always scored: a centred Gaussian (standard deviation a quarter of each side) against the row's
    mask, and the row's map against the mask of another group.  Others are given as row numbers.

    `value` is the mean over rows (micro), `macro` the mean of the classes' means; intervals resample whole groups
    (`diffprobe.stats`).  `lead` is the paired difference of the map's own score and chance or, in a control's line, of the
    map's own score and the control's.  `p` tests lead > 0 by Student's t of the groups' sums (one-sided; cluster-robust,
    Liang & Zeger 1986), `p_holm` is Holm's adjustment over all cells of one score and one comparison.

    Args:
        maps: (row, ..., y, x), not negative; rows beyond those of `masks` are maps for controls.
        masks: (row, y, x) booleans, on the grid of the scores.
        controls: Name to (row,) row numbers of `maps`: the map that is scored in place of the row's own; -1 for none.
        classes: One label per mask, for the macro average.
        groups: One id per mask, for example its image; each row is its own by default.
        own: Name of the lines of the rows' own maps.
        seed: Seed of the bootstrap and of the halves that thresholds are tuned on.
        keep_rows: Keep each line's scores (row,) in the column rows (NaN where a row has none), and the groups' ids (row,)
            in the column row_groups: differences of differences are taken row by row.

    Returns:
        One line per combination, map (`own`, then controls) and score (`SCORES`): its coordinates, map, score, value,
        low, high, macro, macro_low, macro_high, chance, lead, lead_low, lead_high, p, p_holm, threshold (mean share of
        the range, for IoU), n, n_images (groups), n_classes, n_left_out, left_out (the reasons, counted), seed.
        Chance is the mask's area share for pointing and mass, 1 for lift, 1/2 for AUC and 0 for NSS.  For AP and IoU it
        is measured: the score of the row's own map with the mask moved to a random place, wrapped at the edges, because
        the closed forms (such as the area share for AP) hold for independent pixels only.

    Raises:
        ValueError: Shapes do not fit, or a map is negative somewhere, so that shares of its sum mean nothing.

    >>> maps = xr.DataArray(np.eye(4)[[0, 1, 2, 3] * 5].reshape(20, 2, 2), dims=("row", "y", "x"))
    >>> frame = localization_score(maps, np.asarray(maps) > 0, groups=np.arange(20))
    >>> frame.set_index(["map", "score"]).loc[("word", "pointing"), ["value", "chance"]].tolist()
    [1.0, 0.25]
    """
    truth = np.asarray(masks, bool)
    need_dimensions(maps, "row", "y", "x")
    if truth.ndim != 3 or len(truth) > maps.sizes["row"]:
        raise ValueError(f"Masks need the shape (row, y, x) and a map each; got {truth.shape} for {maps.sizes['row']} maps.")
    if not len(truth):
        raise ValueError("There are no masks; nothing can be scored.")
    count = len(truth)
    images = np.arange(count) if groups is None else number_ids(groups, count, "groups", "mask")
    kinds = np.zeros(count, np.int64) if classes is None else number_ids(classes, count, "classes", "mask")
    plan = _Plan.of(truth, maps.sizes["row"], {own: np.arange(len(truth)), **(controls or {})}, images, seed)
    down, across = (np.exp(-0.5 * (((np.arange(n) + 0.5) / n - 0.5) / 0.25) ** 2) for n in plan.size)
    gaussian = _score_maps(np.outer(down, across).astype(np.float32)[None], plan, plan.of_gaussian)
    places, parts = [], []
    for place, block in combinations(maps, ("row", "y", "x")):
        scored = _score_maps(np.asarray(block.transpose("row", "y", "x"), np.float32), plan, plan.of_maps)
        scored = {**scored, GAUSSIAN: gaussian[GAUSSIAN]}
        chance = _chance(scored, plan, own)
        places += [{**place, "map": name} for name in plan.names]
        parts += [(scored[name], chance) for name in plan.names]
    frame = _summary(places, parts, plan, own, images, kinds, seed, n_resamples, keep_rows)
    if keep_rows:
        ids: Any = np.arange(count) if groups is None else np.asarray(groups)
        frame = frame.assign(row_groups=[ids] * len(frame))
    return with_holm(frame.assign(seed=seed))


def with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with `p_holm`: Holm's adjustment of `p` over all cells of one score and one comparison."""
    by = [c for c in ("role", "conditioning", "map", "score") if c in frame]
    return frame.assign(p_holm=frame.groupby(by, dropna=False)["p"].transform(lambda p: holm(p.to_numpy())))


def enlarge(maps: ArrayLike, size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps (..., y, x) brought to `size` bilinearly, pixel centres kept in place and edges continued.

    >>> enlarge([[0.0, 1.0]], (1, 4)).tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    small = np.asarray(maps, np.float32)
    if small.shape[-2:] == tuple(size):
        return small
    down, across = (
        bilinear_weights((np.arange(m) + 0.5) * n / m, n).astype(np.float32)
        for n, m in zip(small.shape[-2:], size, strict=True)
    )
    return np.asarray(down @ (small @ across.T), np.float32)


def bilinear_weights(places: Floats, cells: int) -> Floats:
    """Weights (place, cell) of linear interpolation between cell centres, constant beyond the outer ones.

    Args:
        places: (place,) in cells from the edge: the centre of the first cell is at 0.5.
        cells: Cells along the side.

    >>> bilinear_weights(np.array([0.25, 1.0, 1.5]), 2).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    at = np.clip(places - 0.5, 0, cells - 1)
    return np.asarray(np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0))


# --- which map meets which mask -----------------------------------------------------------------------

Pairs = dict[int, list[tuple[str, int, int]]]  # by map: name of the line, row, mask


@dataclass(frozen=True)
class _Plan:
    """Which maps are scored against which masks; a map is sorted once for all its masks.

    Masks are numbered: those of the rows, then the same ones moved to a random place (`MOVED`).
    """

    names: list[str]
    size: tuple[int, int]
    inside: list[NDArray[np.intp]]  # flat pixel numbers of every mask
    area: Floats  # (row,) share of the image
    halves: NDArray[np.int64]
    of_maps: Pairs
    of_gaussian: Pairs

    @classmethod
    def of(cls, masks: Bools, n_maps: int, chosen: Mapping[str, ArrayLike], images: NDArray[np.int64], seed: int) -> _Plan:
        n, height, width = masks.shape
        pairs: Pairs = {}
        for name, numbers in chosen.items():
            index = np.asarray(numbers)
            if index.shape != (n,) or index.min() < -1 or index.max() >= n_maps:
                raise ValueError(f"Control {name!r} needs one row number per mask, shape ({n},), from -1 to {n_maps - 1}.")
            for row in np.flatnonzero(index >= 0).tolist():
                pairs.setdefault(int(index[row]), []).append((name, row, row))
        flat = masks.reshape(n, -1)
        rng = np.random.default_rng([seed, 1])
        shifts = np.stack([rng.integers(height, size=n), rng.integers(width, size=n)], axis=1)
        moved = [np.roll(mask, shift, axis=(0, 1)).ravel() for mask, shift in zip(masks, shifts, strict=True)]
        usable = np.asarray(flat.any(1) & ~flat.all(1))
        for row, other in enumerate(_other_masks(images, usable).tolist()):
            pairs.setdefault(row, []).append((MOVED, row, n + row))
            if other >= 0:
                pairs[row].append((SHUFFLED, row, other))
        inside = [np.flatnonzero(mask) for mask in (*flat, *moved)]
        gaussian: Pairs = {0: [(GAUSSIAN, row, row) for row in range(n)]}
        names = [*chosen, GAUSSIAN, SHUFFLED]
        halves = np.random.default_rng([seed, 2]).permutation(int(images.max(initial=-1)) + 1) % 2  # images dealt at random
        return cls(names, (height, width), inside, flat.mean(1), halves[images], pairs, gaussian)


def _other_masks(images: NDArray[np.int64], usable: Bools) -> NDArray[np.int64]:
    """For each row a usable row of another image, sought from half the table further on; -1 where there is none."""
    n = len(images)
    found = np.full(n, -1)
    for row in range(n):
        order = (row + n // 2 + np.arange(n)) % n
        fits = usable[order] & (images[order] != images[row])
        if fits.any():
            found[row] = order[fits.argmax()]
    return found


# --- one map ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """Scores of one line of the table."""

    scores: Floats  # (row, column): `_DIRECT`, IoU at each of `THRESHOLDS`, IoU at Otsu's threshold
    otsu: Floats  # (row,) Otsu's threshold as a share of the map's range
    reasons: NDArray[np.int64]  # (row,) number in `_REASONS`: why the row has no scores


def _score_maps(maps: NDArray[np.float32], plan: _Plan, pairs: Pairs) -> dict[str, _Scored]:
    """Scores maps (map, y, x) against the masks that `pairs` names, by line of the table."""
    n = len(plan.area)
    empty = np.full((n, _OTSU_COLUMN + 1), np.nan), np.full(n, np.nan), np.full(n, _REASONS.index("no such map"))
    found = {name: _Scored(*(column.copy() for column in empty)) for name in [*plan.names, MOVED]}
    wanted = sorted(pairs)
    for start in range(0, len(wanted), _BLOCK):
        part = wanted[start : start + _BLOCK]
        native = maps[part]
        if np.nanmin(native, initial=np.inf) < 0:
            raise ValueError("A map is negative somewhere; localization scores need maps that are not (norms, probabilities).")
        finite = np.asarray(np.isfinite(native).all((1, 2)))
        constant = native.max((1, 2)) == native.min((1, 2))
        faults = np.where(~finite, _REASONS.index("map not finite"), np.where(constant, _REASONS.index("constant map"), 0))
        values = enlarge(np.where(finite[:, None, None], native, 0), plan.size).reshape(len(part), -1)
        ordered = np.sort(values, axis=1)
        cuts, otsu = _cuts(ordered)
        means = values.mean(1, dtype=np.float64)
        deviations = np.sqrt(np.square(values - means[:, None].astype(np.float32)).mean(1, dtype=np.float64))
        for k, name in enumerate(part):
            for line, row, mask in pairs[name]:
                pixels, target = plan.inside[mask], found[line]
                empty_or_full = 1 if not len(pixels) else 2 if len(pixels) == values.shape[1] else 0
                target.reasons[row] = empty_or_full or faults[k]
                if not target.reasons[row]:
                    target.otsu[row] = otsu[k]
                    target.scores[row] = _score_one(values[k], ordered[k], cuts[k], (means[k], deviations[k]), pixels)
    return found


def _score_one(
    values: NDArray[np.float32],
    ordered: NDArray[np.float32],
    cuts: NDArray[np.float32],
    moments: tuple[float, float],
    pixels: NDArray[np.intp],
) -> Floats:
    """Scores of one map for one mask, in the columns of `_Scored`, from the ranks of the mask's values among all values.

    Args:
        values: (pixel,) of the map; `ordered` has the same, sorted.
        cuts: (threshold,) from `_cuts`.
        moments: Mean and standard deviation of the map.
        pixels: Flat pixel numbers of the mask.
    """
    total, size = len(ordered), len(pixels)
    mean, deviation = moments
    own = values[pixels]
    own.sort()
    below, own_below = ordered.searchsorted(own), own.searchsorted(own)
    ranks = int(below.sum()) + int(ordered.searchsorted(own, "right").sum())
    inside = float(own.sum(dtype=np.float64))
    mass = inside / (mean * total)
    highest = ordered[-1]
    scores = np.empty(_OTSU_COLUMN + 1)
    scores[: len(_DIRECT)] = (
        (size - own.searchsorted(highest)) / (total - ordered.searchsorted(highest)),
        mass,
        mass * total / size,
        (ranks / 2 - size * size / 2) / (size * (total - size)),  # Mann-Whitney; ties count half
        ((size - own_below) / (total - below)).sum() / size,  # precision at each of the mask's values, ties together
        (inside / size - mean) / deviation,
    )
    hit = size - own.searchsorted(cuts, "right")
    scores[len(_DIRECT) :] = hit / (total - ordered.searchsorted(cuts, "right") + size - hit)
    return scores


def _cuts(ordered: NDArray[np.float32]) -> tuple[NDArray[np.float32], Floats]:
    """Thresholds (map, threshold): `THRESHOLDS` of each range, then Otsu's; and Otsu's as a share of the range (map,).

    Otsu 1979: the cut between two of `BINS` even bins with the largest variance between the two sides.
    """
    low, high = ordered[:, :1].astype(np.float64), ordered[:, -1:].astype(np.float64)
    edges = low + (high - low) * np.linspace(0, 1, BINS + 1)
    upto = np.stack([np.searchsorted(row, edge.astype(np.float32)) for row, edge in zip(ordered, edges, strict=True)])
    upto[:, -1] = ordered.shape[1]
    counts = np.diff(upto, axis=1).astype(np.float64)
    centres = (edges[:, 1:] + edges[:, :-1]) / 2
    left, right = counts.cumsum(1), counts[:, ::-1].cumsum(1)[:, ::-1]
    weighted = counts * centres
    mean_left = weighted.cumsum(1) / np.maximum(left, 1)
    mean_right = weighted[:, ::-1].cumsum(1)[:, ::-1] / np.maximum(right, 1)
    between = left[:, :-1] * right[:, 1:] * (mean_left[:, :-1] - mean_right[:, 1:]) ** 2
    otsu = np.take_along_axis(centres, between.argmax(1)[:, None], 1)
    cuts = np.concatenate([low + (high - low) * THRESHOLDS, otsu], axis=1)
    return cuts.astype(np.float32), ((otsu - low) / np.maximum(high - low, 1e-30))[:, 0]


def _tuned(scores: Floats, halves: NDArray[np.int64]) -> NDArray[np.int64]:
    """(half,) number of the threshold with the best mean IoU on the other half of the images; -1 if that is empty."""
    grid = scores[:, len(_DIRECT) : _OTSU_COLUMN]
    best = np.full(2, -1)
    for half in (0, 1):
        there = (halves != half) & ~np.isnan(grid[:, 0])
        if there.any():
            best[half] = grid[there].mean(0).argmax()
    return best


def _in_order(scores: Floats, halves: NDArray[np.int64], best: NDArray[np.int64]) -> Floats:
    """(row, score) in the order of `SCORES`, with the tuned thresholds `best` of the halves."""
    chosen = best[halves]
    tuned = np.where(chosen >= 0, scores[np.arange(len(scores)), len(_DIRECT) + np.maximum(chosen, 0)], np.nan)
    columns = dict(zip(_DIRECT, scores.T, strict=False))
    columns |= {"iou_fixed": scores[:, _FIXED_COLUMN], "iou_otsu": scores[:, _OTSU_COLUMN], "iou_tuned": tuned}
    return np.stack([columns[name] for name in SCORES], axis=1)


def _chance(scored: Mapping[str, _Scored], plan: _Plan, own: str) -> Floats:
    """(row, score) chance levels: closed forms where they hold for any map, else the score at a random place."""
    best = _tuned(scored[own].scores, plan.halves)
    chance = _in_order(scored[MOVED].scores, plan.halves, best)
    known: dict[str, Any] = {"pointing": plan.area, "mass": plan.area, "lift": 1.0, "auc": 0.5, "nss": 0.0}
    for name, level in known.items():
        chance[:, list(SCORES).index(name)] = level
    return chance


def _counted(reasons: NDArray[np.int64]) -> str:
    """
    >>> _counted(np.array([0, 1, 1, 5]))
    '2 empty mask; 1 no such map'
    """
    return "; ".join(f"{n} {_REASONS[code]}" for code, n in sorted(Counter(reasons.tolist()).items()) if code)


# --- from rows to a table -----------------------------------------------------------------------------


def _summary(
    places: Sequence[Mapping[str, Any]],
    parts: Sequence[tuple[_Scored, Floats]],
    plan: _Plan,
    own: str,
    images: NDArray[np.int64],
    classes: NDArray[np.int64],
    seed: int,
    n_resamples: int,
    keep_rows: bool,
) -> pd.DataFrame:
    """One line per place and score; each is a column of the (row, cell) tables below."""
    best = [_tuned(scored.scores, plan.halves) for scored, _ in parts]
    values = np.stack([_in_order(scored.scores, plan.halves, b) for (scored, _), b in zip(parts, best, strict=True)])
    is_own = np.array([place["map"] == own for place in places])
    home = np.maximum.accumulate(np.where(is_own, np.arange(len(places)), 0))  # the own line comes first in its place
    wide = lambda cube: cube.transpose(1, 0, 2).reshape(len(plan.area), -1)  # noqa: E731
    table, chance, reference = wide(values), wide(np.stack([c for _, c in parts])), wide(values[home])
    lead = np.where(np.repeat(is_own, len(SCORES)), table - chance, reference - table)
    weights = resampling_weights(int(images.max()) + 1, seed, n_resamples)
    low, high = mean_interval(table, images, weights)
    lead_low, lead_high = mean_interval(lead, images, weights)
    macro, macro_low, macro_high = macro_mean(table, images, classes, weights)
    known = np.isfinite(table)
    rows = pd.DataFrame([{**place, "score": score} for place in places for score in SCORES])
    for cell in np.flatnonzero(rows["score"] == "pointing"):
        hits = table[known[:, cell], cell]
        if len(hits) and hits.min() == hits.max() and hits[0] in (0, 1):  # resampling equal values says nothing
            low[cell], high[cell] = share_interval(hits, images[known[:, cell]])
    used = np.full((len(places), len(SCORES)), np.nan)
    names = list(SCORES)
    used[:, names.index("iou_fixed")] = FIXED_THRESHOLD
    used[:, names.index("iou_otsu")] = [column_means(scored.otsu[:, None])[0] for scored, _ in parts]
    used[:, names.index("iou_tuned")] = [column_means(np.where(b >= 0, THRESHOLDS[b], np.nan)[:, None])[0] for b in best]
    if keep_rows:
        rows = rows.assign(rows=list(table.T))
    return rows.assign(
        value=column_means(table), low=low, high=high, macro=macro, macro_low=macro_low, macro_high=macro_high,
        chance=column_means(np.where(known, chance, np.nan)), lead=column_means(lead), lead_low=lead_low, lead_high=lead_high,
        p=p_above_zero(lead, images), threshold=used.ravel(), n=known.sum(0),
        n_images=[len(np.unique(images[k])) for k in known.T], n_classes=[len(np.unique(classes[k])) for k in known.T],
        n_left_out=(~known).sum(0), left_out=np.repeat([_counted(scored.reasons) for scored, _ in parts], len(SCORES)),
    )  # fmt: skip
