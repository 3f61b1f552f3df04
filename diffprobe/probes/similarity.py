"""How alike two sets of features are: cosine, centred kernel alignment (CKA), mutual nearest neighbours.

Both sets describe the same samples, matched by id; what is compared differs (two conditionings, guidance scales, sites,
timesteps, encoders, or the two images of a pair).  The invariant: an interval never comes from resampling rows with
replacement where the measure compares rows with one another.  A row that is drawn twice is its own perfect neighbour,
which pulls CKA and neighbourhoods towards 1; there the interval is a jackknife over samples (or over groups of samples
that belong together), which only ever leaves rows out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.stats
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from diffprobe.probes.task import SPACE, Pool, pool_features
from diffprobe.stats import bootstrap_interval
from diffprobe.store import features, site_names

Floats = NDArray[np.float64]
Measure = Literal["cosine", "cosine_standardised", "cka", "cka_biased", "mutual_knn"]
MEASURES: tuple[Measure, ...] = ("cosine", "cosine_standardised", "cka", "cka_biased", "mutual_knn")
BETWEEN = ("pair", "conditioning", "guidance", "timestep", "site", "store")

BATCH = 1024  # rows of one Gram matrix: 8 MB, and an exact result for stores up to this size
FEWEST = 5  # the unbiased estimator needs four rows, and the jackknife leaves one out
ROUNDING = 1e-14  # cosines that differ by less are equal
_ONE = 1 - 1e-15  # Fisher's z of 1 is infinite


@dataclass(frozen=True)
class Estimate:
    """A similarity with its interval.

    Attributes:
        value: The similarity.
        low: Lower end of its 95% interval.
        high: Upper end.
        chance: Its expectation when the second set's samples are dealt out at random.
        n: Samples compared.
        left_out: (group,) the value without each group in turn; `jackknife_interval` makes an interval of any
            difference of two estimates over the same groups from them.
    """

    value: float
    low: float
    high: float
    chance: float
    n: int
    left_out: Floats


def similarity(
    first: xr.DataArray,
    other: xr.DataArray | None = None,
    *,
    along: str | None = None,
    measures: Measure | Sequence[Measure] = ("cka", "cka_biased"),
    groups: str | ArrayLike | None = None,
    pool: Pool = "flatten",
    batch: int = BATCH,
    k: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares two sets of features of the same samples, or every two entries of one set along a dimension.

    Samples are matched by id; those that only one side has are left out.  Dimensions that both sides have (timestep,
    conditioning, ...) are matched by label, and those that one side has are gone through.

    Measures:
        cosine: of the two feature vectors at the same position, averaged over positions, then over samples (needs
            equal sites).  Chance is the same with the other samples' features.
        cosine_standardised: after every channel is brought to mean 0 and deviation 1 over all samples and positions of
            both sides (of one timestep and conditioning).  A few channels with large means make any two raw vectors
            alike; this is the cosine without them.
        cka: linear CKA with the unbiased estimator of HSIC; see `cka`.
        cka_biased: the same with the plain estimator, which rises towards 1 when there are more features than samples.
        mutual_knn: the share of `k` nearest neighbours that a sample has in both sets; see `mutual_knn`.

    Args:
        first: (sample, ..., channel) or (sample, ..., channel, y, x).
        other: The same; other channels and places are fine except for cosines.  Absent when `along` is given.
        along: A dimension of `first` whose entries are compared two by two.
        measures: One or several of `MEASURES`.
        groups: A coordinate on `sample`, or one id a sample of `first`: samples that belong together (twin images).
            Intervals leave out, and chance passes over, whole groups.
        pool: What makes a sample's row for CKA and neighbours: "flatten" (channel * y * x columns) or "mean".
        batch: Rows of one Gram matrix; with more samples, CKA is averaged over random minibatches.
        k: Neighbours.
        seed: Of minibatches and bootstrap.

    Returns:
        One row per comparison and measure.  A coordinate that both sides share stands once (timestep), one that
        differs twice (timestep_a, timestep_b); then measure, value, low, high (95%), chance, excess (value minus
        chance) with excess_low and excess_high where chance was itself measured, n (samples), n_groups, seed, and the
        reason where a value is NaN because the measure is not defined there.

    Raises:
        ValueError: For an unknown measure, no samples in common, or too few.

    >>> rng = np.random.default_rng(0)
    >>> maps = xr.DataArray(rng.normal(size=(40, 2, 8)), dims=("sample", "conditioning", "channel"))
    >>> turned = maps.copy(data=maps.values @ np.linalg.qr(rng.normal(size=(8, 8)))[0])
    >>> frame = similarity(maps, turned, measures="cka")
    >>> frame[["conditioning", "measure"]].to_numpy().tolist(), frame["value"].round(3).tolist()
    ([[0, 'cka'], [1, 'cka']], [1.0, 1.0])
    >>> bool(similarity(maps, along="conditioning", measures="cka").loc[0, "value"] < 0.3)
    True
    """
    chosen = [measures] if isinstance(measures, str) else list(measures)
    if unknown := [m for m in chosen if m not in MEASURES]:
        raise ValueError(f"Measure {unknown[0]!r} is not one of {', '.join(MEASURES)}.")
    if (other is None) == (along is None):
        raise ValueError("Give either a second set of features or a dimension `along` which to compare.")
    if along is not None and along not in first.dims:
        raise ValueError(f"`along` names a dimension of the features, which has {first.dims}; got {along!r}.")
    if pool not in ("flatten", "mean"):
        raise ValueError(f"`pool` is 'flatten' or 'mean': a row is a sample; got {pool!r}.")
    ids = _group_ids(first, groups)
    rows = []
    for place, a, b, members in _comparisons(first, other, along, ids):
        for measure in chosen:
            reason = ""
            try:
                if measure.startswith("cosine"):
                    found = _cosine_row(a, b, members, measure == "cosine_standardised", seed)
                elif measure == "mutual_knn":
                    found = _neighbour_row(_matrix(a, pool), _matrix(b, pool), members, k, seed)
                else:
                    estimate = _cka_of(_blocks(a, b, members, batch, pool, seed), unbiased=measure == "cka")
                    found = _row(estimate.value, estimate.low, estimate.high, estimate.chance)
            except UndefinedError as error:
                found, reason = _row(np.nan, np.nan, np.nan, np.nan), str(error)
            counts = {"n": a.sizes["sample"], "n_groups": len(np.unique(members)), "seed": seed, "reason": reason}
            rows.append({**place, "measure": measure, **found, **counts})
    return pd.DataFrame(rows)


class UndefinedError(ValueError):
    """Features of which a measure says nothing: a vector of zeros has no direction, equal rows have no nearest one."""


def split_pairs(both: xr.DataArray, pair: str = "pair", side: str = "side") -> tuple[xr.DataArray, xr.DataArray]:
    """The two sides of image pairs as two arrays whose samples are the pairs; pairs that lack a side are left out.

    Args:
        both: (sample, ...) with the coordinates `pair` and `side` on the samples, as twins have them.

    Raises:
        ValueError: the labels are missing, or there are not two sides.

    >>> both = xr.DataArray([[1.0], [2.0], [3.0]], dims=("sample", "channel"))
    >>> both = both.assign_coords(pair=("sample", [7, 7, 8]), side=("sample", ["a", "b", "a"]))
    >>> a, b = split_pairs(both)
    >>> a.values.tolist(), b.values.tolist(), a["sample"].values.tolist()
    ([[1.0]], [[2.0]], [7])
    """
    if absent := [name for name in (pair, side) if name not in both.coords]:
        raise ValueError(
            f"Pairs are told by the labels {pair!r} and {side!r}; {absent[0]!r} is not among this store's. "
            "Datasets such as shapes-mmvp:N have them; for photographs write them into captions.jsonl."
        )
    known = [not (pd.isna(value) or value == "") for name in (pair, side) for value in both[name].values.tolist()]
    both = both.isel(sample=np.reshape(known, (2, -1)).all(axis=0))
    sides = sorted(set(both[side].values.tolist()))
    if len(sides) != 2:
        raise ValueError(f"Pairs have two sides; the label {side!r} has {', '.join(map(str, sides))}.")
    numbers = [both[pair].values[both[side].values == s] for s in sides]
    if any(len(set(n.tolist())) < len(n) for n in numbers):
        raise ValueError(f"A pair has one image of each side; some value of {pair!r} has several.")
    shared = [n for n in numbers[0].tolist() if n in set(numbers[1].tolist())]
    halves = []
    for name in sides:
        where = {
            n: row for row, (n, s) in enumerate(zip(both[pair].values.tolist(), both[side].values, strict=True)) if s == name
        }
        halves.append(both.isel(sample=[where[n] for n in shared]).assign_coords(sample=shared).drop_vars([pair, side]))
    return halves[0], halves[1]


# --- cosine ---------------------------------------------------------------------------------------


def cosines(a: xr.DataArray, b: xr.DataArray, *, standardise: bool = False, groups: ArrayLike | None = None) -> Floats:
    """Cosine of each sample's two feature vectors, and of a sample's with all other samples', averaged over positions.

    Args:
        a: (sample, channel) or (sample, channel, y, x).
        b: Of the same shape, in the same order.
        standardise: Bring every channel to mean 0 and deviation 1 over the samples and positions of both first.
        groups: One id a sample; samples of one group are not each other's strangers.

    Returns:
        (2, sample): with its own partner, and the mean with the partners of all samples outside its group.  Every
        stranger is met, so no random shuffle enters.  Positions where a side is zero have no cosine and are left out;
        NaN where none is left, or there is no stranger.

    >>> a = xr.DataArray([[1.0, 0.0], [0.0, 1.0]], dims=("sample", "channel"))
    >>> cosines(a, a).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    x, y = _positions(a), _positions(b)
    if x.shape != y.shape:
        raise ValueError(f"Cosines need features of one shape (position, channel); got {x.shape[1:]} and {y.shape[1:]}.")
    if standardise:
        x, y = standardised(np.stack([x, y]), axis=(0, 1, 2))
    lengths = [np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y)]
    x, y = (v / np.where(length > 0, length, 1) for v, length in zip((x, y), lengths, strict=True))
    there = [(length > 0).astype(np.float64) for length in lengths]  # (sample, position, 1): a direction
    index, counts = np.unique(
        np.arange(len(x)) if groups is None else np.asarray(groups), return_inverse=True, return_counts=True
    )[1:]

    def sums(a: Floats, b: Floats) -> Floats:
        """(2, sample): the products of each sample's two sides, and of each with all others' sides."""
        # the sum of the products with many is the product with their sum
        outside = [np.stack([v[index == g].sum(axis=0) for g in range(len(counts))]) for v in (a, b)]
        others = [(v.sum(axis=0)[None] - part)[index] for v, part in zip((a, b), outside, strict=True)]
        met = np.einsum("npc,npc->n", a, others[1]) + np.einsum("npc,npc->n", others[0], b)
        return np.stack([np.einsum("npc,npc->n", a, b), met])

    meetings = sums(*there)
    return sums(x, y) / np.where(meetings > 0, meetings, np.nan)


def standardised(values: Floats, axis: tuple[int, ...]) -> Floats:
    """Mean 0 and deviation 1 along some axes; what is the same everywhere but for rounding becomes zero.

    >>> standardised(np.full((30, 1), 0.1), axis=(0,)).any()
    np.False_
    """
    mean, scale = values.mean(axis=axis, keepdims=True), values.std(axis=axis, keepdims=True)
    flat = scale <= 1e-13 * np.abs(mean)
    return np.asarray(np.where(flat, 0, (values - mean) / np.where(flat, 1, scale)))


def _cosine_row(a: xr.DataArray, b: xr.DataArray, members: NDArray[Any], standardise: bool, seed: int) -> dict[str, float]:
    own, met = cosines(a, b, standardise=standardise, groups=members)
    if bare := int(np.isnan(own).sum()):
        kind = "constant over all samples and positions" if standardise else "zero"
        raise UndefinedError(f"{bare} of {len(own)} samples have no cosine: their features are {kind} on one side")
    grouped = len(np.unique(members)) < len(members)
    low, high = bootstrap_interval(own, members if grouped else None, seed=seed)
    index, counts = np.unique(members, return_inverse=True, return_counts=True)[1:]
    n, groups = len(own), len(counts)
    # Chance is a mean over pairs of samples: its interval, and that of the difference, must know that a sample is in
    # many of them, so they leave a group out of all of its pairs (the jackknife of a U-statistic).
    strangers = n - counts[index]
    by_group = np.bincount(index, met * strangers, groups)
    meetings = float(strangers.sum())
    chance = float(by_group.sum() / meetings) if groups > 1 else np.nan
    excess = float(own.mean()) - chance
    if groups < 3:
        return _row(float(own.mean()), low, high, chance)
    left = (own.sum() - np.bincount(index, own, groups)) / (n - counts)
    left -= (by_group.sum() - 2 * by_group) / (meetings - 2 * counts * (n - counts))
    return _row(float(own.mean()), low, high, chance, *jackknife_interval(excess, left))


# --- centred kernel alignment ---------------------------------------------------------------------


def cka(
    x: ArrayLike, y: ArrayLike, *, unbiased: bool = True, groups: ArrayLike | None = None, batch: int = BATCH, seed: int = 0
) -> Estimate:
    """Linear centred kernel alignment of two representations of the same rows (Kornblith et al. 2019).

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the Gram matrices K = X X' and L = Y Y'.  It does not change
    under rotation or isotropic scaling of either side.  The plain estimator of HSIC is tr(K H L H) / (n - 1)^2; it
    grows with the number of columns.  The unbiased one (Song et al. 2012, equation 5) is a sum over distinct rows, 0 in
    expectation for independent sides.  It is an inner product too (Szekely & Rizzo 2014), so CKA stays within [-1, 1].

    With more than `batch` rows, HSIC is averaged over random minibatches, which keeps it unbiased (Nguyen et al. 2021,
    equation 3); the plain estimator is not comparable across batch sizes and is refused there.

    The interval is a jackknife over groups on Fisher's z scale (exact leave-one-out values from row sums, no second
    look at the columns); a bootstrap would repeat rows, and a row's likeness to its own copy counts as agreement.

    Args:
        x: (row, column).
        y: (row, column), any number of columns.
        unbiased: Which estimator of HSIC.
        groups: One id a row; rows of one group are left out together.
        batch: Rows of one minibatch at most (a group stays whole).
        seed: Of the minibatches.

    Raises:
        ValueError: fewer than `FEWEST` rows, or a side that is the same in all rows.

    >>> x = np.random.default_rng(0).normal(size=(50, 6))
    >>> round(cka(x, 3 * x[:, ::-1]).value, 6), abs(cka(x, np.roll(x, 7, axis=0)).value) < 0.2
    (1.0, True)
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(first) != len(second):
        raise ValueError(f"CKA compares the same rows; got {len(first)} and {len(second)} of them.")
    ids = np.arange(len(first)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    blocks = ((first[rows], second[rows], ids[rows]) for rows in minibatches(ids, batch, seed))
    return _cka_of(blocks, unbiased)


def minibatches(groups: ArrayLike, batch: int, seed: int = 0) -> list[NDArray[np.intp]]:
    """Rows dealt at random into batches of nearly equal size; a group stays whole.

    >>> [rows.tolist() for rows in minibatches(["a", "a", "b", "c"], 4)]
    [[0, 1, 2, 3]]
    >>> sorted(len(rows) for rows in minibatches(np.arange(25), 10))
    [8, 8, 9]
    """
    ids = np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(ids) <= batch:
        return [np.arange(len(ids))]
    dealt = np.array_split(np.random.default_rng(seed).permutation(int(ids.max()) + 1), -(-len(ids) // batch))
    return [np.flatnonzero(np.isin(ids, part)) for part in dealt]


def _cka_of(blocks: Iterable[tuple[Floats, Floats, NDArray[Any]]], unbiased: bool) -> Estimate:
    """CKA from (x, y, group ids) of each minibatch."""
    n, totals, changes, traces = 0, np.zeros(3), [], []
    for number, (x, y, ids) in enumerate(blocks):
        if number == 1 and not unbiased:
            raise ValueError("The plain estimator of CKA depends on the batch size; ask for 'cka', or for a larger `batch`.")
        if len(x) < FEWEST:
            raise ValueError(f"CKA needs at least {FEWEST} samples (in a batch); got {len(x)}.")
        members = np.unique(ids, return_inverse=True)[1]
        kept = np.concatenate([np.ones((len(x), 1)), 1.0 - (members[:, None] == np.arange(members.max() + 1))], axis=1)
        if len(x) - np.bincount(members).max() < FEWEST - 1:
            raise ValueError(f"A group of {np.bincount(members).max()} among {len(x)} samples leaves too few without it.")
        k, gram = _gram(x), _gram(y)
        terms = np.stack([_hsic(k, gram, kept, unbiased), _hsic(k, k, kept, unbiased), _hsic(gram, gram, kept, unbiased)])
        totals += terms[:, 0]
        changes.append(terms[:, 1:] - terms[:, :1])
        traces.append(np.trace(k) * np.trace(gram) / (len(x) - 1) ** 3)
        n += len(x)
    if min(totals[1:]) <= 0:
        raise UndefinedError("CKA needs features that differ between samples; one side is the same in all of them")
    value = _ratio(totals)
    left_out = _ratio(totals[:, None] + np.concatenate(changes, axis=1))
    # under a random matching the mean of tr(K H L H) is tr(KH) tr(LH) / (n - 1), and that of the unbiased sum is 0
    chance = 0.0 if unbiased else float(traces[0] / np.sqrt(totals[1] * totals[2]))
    return Estimate(float(value), *jackknife_interval(float(value), left_out, fisher=True), chance, n, left_out)


def _gram(x: Floats) -> Floats:
    mean = x.mean(axis=0)
    centred = x - mean  # changes no HSIC, and keeps its digits
    centred[:, np.abs(centred).max(axis=0) <= 1e-13 * np.abs(mean)] = 0  # the same everywhere but for rounding
    return np.asarray(centred @ centred.T, np.float64)


def _ratio(hsic: Floats) -> Any:
    with np.errstate(invalid="ignore"):
        return hsic[0] / np.sqrt(hsic[1] * hsic[2])


def _hsic(k: Floats, gram: Floats, kept: Floats, unbiased: bool) -> Floats:
    """HSIC of two Gram matrices for every choice of rows: kept is (row, choice) of zeros and ones, the result (choice,)."""
    if unbiased:
        k, gram = k - np.diag(np.diag(k)), gram - np.diag(np.diag(gram))
    n = kept.sum(axis=0)
    rows_k, rows_l = k @ kept, gram @ kept
    trace = np.sum(kept * ((k * gram) @ kept), axis=0)
    total = np.sum(kept * rows_k, axis=0) * np.sum(kept * rows_l, axis=0)
    mixed = np.sum(kept * rows_k * rows_l, axis=0)
    if unbiased:
        return np.asarray((trace + total / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (n * (n - 3)))
    return np.asarray((trace - 2 * mixed / n + total / n**2) / (n - 1) ** 2)


def jackknife_interval(value: float, left_out: ArrayLike, fisher: bool = False, level: float = 0.95) -> tuple[float, float]:
    """Student interval from the values without each group in turn (Tukey 1958).

    Args:
        value: The estimate from all groups.
        left_out: (group,) the estimate without each.
        fisher: On the scale of artanh, for values that end at -1 and 1.
        level: Coverage.

    >>> x = np.array([1.0, 2.0, 3.0, 4.0])
    >>> low, high = jackknife_interval(x.mean(), [np.delete(x, i).mean() for i in range(4)])
    >>> oracle = scipy.stats.t.interval(0.95, 3, x.mean(), scipy.stats.sem(x))
    >>> bool(np.allclose([low, high], oracle))
    True
    """
    values = np.asarray(left_out, np.float64)
    groups = len(values)
    if groups < 2 or not np.isfinite(values).all():
        return np.nan, np.nan
    centre = float(value)
    if fisher:
        values, centre = np.arctanh(np.clip(values, -_ONE, _ONE)), float(np.arctanh(np.clip(centre, -_ONE, _ONE)))
    half = scipy.stats.t.ppf((1 + level) / 2, groups - 1) * np.sqrt(
        (groups - 1) / groups * np.sum((values - values.mean()) ** 2)
    )
    ends = np.array([centre - half, centre + half])
    low, high = np.tanh(ends) if fisher else ends
    return float(low), float(high)


# --- neighbours -----------------------------------------------------------------------------------


def mutual_knn(x: ArrayLike, y: ArrayLike, k: int = 10) -> Floats:
    """For each row, the share of its `k` nearest neighbours (by cosine) that are the same in both sets (Huh et al. 2024).

    The mean over rows is the alignment; under a random matching it is k / (rows - 1).  Neighbours are looked up among
    all rows, so an interval over these shares speaks of other rows asked within the same pool.

    Args:
        x: (row, column).
        y: (row, column), any number of columns.
        k: Neighbours, fewer than there are rows.

    Returns:
        (row,) shares; NaN where a side has no nearest neighbours: a row of zeros, fewer than `k` others that are not,
        or others that are all equally near.

    >>> x = np.random.default_rng(0).normal(size=(30, 4))
    >>> mutual_knn(x, -2 * x, 5).mean()
    np.float64(1.0)
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(first) != len(second):
        raise ValueError(f"Neighbours are compared over the same rows; got {len(first)} and {len(second)} of them.")
    if not 1 <= k < len(first):
        raise ValueError(f"`k` is at least 1 and less than the number of samples, {len(first)}; got {k}.")
    near = [_neighbours(v, k) for v in (first, second)]
    shares = (near[0][:, :, None] == near[1][:, None, :]).any(axis=2).mean(axis=1)
    return np.where((near[0][:, 0] < 0) | (near[1][:, 0] < 0), np.nan, shares)


def _neighbours(x: Floats, k: int) -> NDArray[np.intp]:
    """(row, k) of the nearest other rows by cosine; -1 where nothing tells them apart."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit, empty = x / np.where(length > 0, length, 1), length[:, 0] == 0
    found = []
    for start in range(0, len(unit), BATCH):
        likeness = unit[start : start + BATCH] @ unit.T
        likeness[:, empty] = -np.inf  # no direction, nobody's neighbour
        likeness[np.arange(len(likeness)), start + np.arange(len(likeness))] = -np.inf
        near = np.argpartition(-likeness, k - 1, axis=1)[:, :k]
        lowest = np.where(np.isinf(likeness), np.inf, likeness).min(axis=1)
        level = likeness.max(axis=1) - lowest <= ROUNDING
        few = np.isinf(np.take_along_axis(likeness, near, axis=1)).any(axis=1)
        near[empty[start : start + BATCH] | few | (level & (k < len(unit) - 1))] = -1
        found.append(near)
    return np.concatenate(found)


def _neighbour_row(x: Floats, y: Floats, members: NDArray[Any], k: int, seed: int) -> dict[str, float]:
    overlap = mutual_knn(x, y, k)
    if bare := int(np.isnan(overlap).sum()):
        raise UndefinedError(
            f"{bare} of {len(x)} samples have no nearest neighbours: the features of one side are constant or zero"
        )
    low, high = bootstrap_interval(overlap, members if len(np.unique(members)) < len(members) else None, seed=seed)
    return _row(float(overlap.mean()), low, high, k / (len(x) - 1))


# --- from a store ---------------------------------------------------------------------------------


def store_similarity(
    tree: xr.DataTree,
    between: str,
    *,
    other: xr.DataTree | None = None,
    sites: Sequence[str] = (),
    conditioning: str = "caption",
    guidance: Sequence[float] = (1.0, 1.5, 4.0, 7.0),
    groups: str | None = None,
    measures: Sequence[Measure] = (),
    **options: Any,
) -> pd.DataFrame:
    """The comparisons that a store allows, site by site.

    Args:
        tree: An opened store.
        between: "pair" (the two images of a pair), "conditioning" or "timestep" (every two), "guidance" (f_u + s (f_c - f_u)
            with f_u), "site" (every two), or "store" (every site of `tree` with every site of `other`).
        other: The second store, over the same samples.
        sites: All that have features by default.
        conditioning: f_c of the guidance.
        guidance: The scales s.
        groups: A label of samples that belong together.
        measures: Cosines for pairs, both CKAs else, by default.
        **options: The other options of `similarity`.

    Returns:
        The tables of `similarity`, with the columns site (or site_a, site_b) and, for guidance, `guidance`.
    """
    if between not in BETWEEN:
        raise ValueError(f"Similarity between {between!r} is not known; choose one of {', '.join(BETWEEN)}.")
    if (between == "store") != (other is not None):
        raise ValueError("Give a second store, and only with between='store'.")
    usual: tuple[Measure, ...] = ("cosine", "cosine_standardised") if between == "pair" else ("cka", "cka_biased")
    settings: dict[str, Any] = {"measures": tuple(measures) or usual, "groups": groups, **options}
    names = list(sites) or _sites(tree)
    frames = []
    if between == "pair":
        frames = [similarity(*split_pairs(features(tree, name)), **settings) for name in names]
    elif between in ("conditioning", "timestep"):
        frames = [similarity(features(tree, name), along=between, **settings) for name in names]
    elif between == "guidance":
        for name in names:
            plain = features(tree, name, conditioning="null")
            for s in guidance:
                guided = features(tree, name, conditioning=conditioning, guidance=s)
                found = similarity(guided, plain, **settings).drop(columns=["conditioning_a", "conditioning_b"])
                frames.append(found.assign(conditioning=conditioning, guidance=s))
    elif between == "site":
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        frames = [similarity(features(tree, a), features(tree, b), **settings) for a, b in pairs]
    else:
        assert other is not None
        frames = [similarity(features(tree, a), features(other, b), **settings) for a in names for b in _sites(other)]
    if not frames:
        raise ValueError(f"Similarity between {between}s needs at least two; there is only {', '.join(names) or 'nothing'}.")
    return pd.concat(frames, ignore_index=True)


def _sites(tree: xr.DataTree) -> list[str]:
    return [n for n in site_names(tree) if "features" in tree[n].data_vars]


# --- what is compared with what -------------------------------------------------------------------


def _group_ids(array: xr.DataArray, groups: str | ArrayLike | None) -> xr.DataArray:
    """One group number a sample, labelled as the samples are."""
    count = array.sizes["sample"]
    if groups is None:
        values: NDArray[Any] = np.arange(count)
    elif isinstance(groups, str):
        if groups not in array.coords or array[groups].dims != ("sample",):
            there = [str(n) for n, c in array.coords.items() if c.dims == ("sample",) and n != "sample"]
            raise ValueError(f"Label {groups!r} is not among the samples' labels ({', '.join(there) or 'none'}).")
        values = array[groups].values
    else:
        values = np.asarray(groups)
    if values.shape != (count,):
        raise ValueError(f"`groups` needs one id per sample, shape ({count},); got shape {values.shape}.")
    coords = {"sample": array["sample"].values} if "sample" in array.coords else {}
    return xr.DataArray(np.unique(values, return_inverse=True)[1], dims="sample", coords=coords)


Comparison = tuple[dict[str, Any], xr.DataArray, xr.DataArray, NDArray[np.int64]]


def _comparisons(first: xr.DataArray, other: xr.DataArray | None, along: str | None, ids: xr.DataArray) -> Iterator[Comparison]:
    """Every two blocks (sample, channel, y, x) to compare, where they stand, and their samples' groups."""
    if along is not None:
        for i in range(first.sizes[along]):
            for j in range(i + 1, first.sizes[along]):
                yield from _comparisons(first.isel({along: i}), first.isel({along: j}), None, ids)
        return
    assert other is not None
    a, b, ids = _aligned(first, other, ids)
    row = ("sample", "channel", *SPACE)
    outer = [d for d in dict.fromkeys([*a.dims, *b.dims]) if d not in row]
    sizes = [a.sizes[d] if d in a.dims else b.sizes[d] for d in outer]
    for index in np.ndindex(*sizes):
        at = dict(zip(outer, index, strict=True))
        left = a.isel({d: i for d, i in at.items() if d in a.dims})
        right = b.isel({d: i for d, i in at.items() if d in b.dims})
        free = {str(d): i for d, i in at.items()}  # a dimension without labels is told by its number
        yield {**free, **_place(left, right)}, left, right, ids.values


def _aligned(a: xr.DataArray, b: xr.DataArray, ids: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    if "sample" in a.indexes and "sample" in b.indexes:
        for array in (a, b):
            if not array.indexes["sample"].is_unique:
                raise ValueError("Samples are matched by id, and some ids stand twice; select one row of each.")
        shared = [s for s in a["sample"].values.tolist() if s in set(b["sample"].values.tolist())]
        if not shared:
            raise ValueError(
                f"The two sets of features have no sample in common: one has {str(a['sample'].values[0])!r}, the other "
                f"{str(b['sample'].values[0])!r}. Extract both from the same dataset."
            )
    apart = [d for d in ("channel", *SPACE) if d in a.dims or d in b.dims]
    try:
        left, right = xr.align(a, b, join="inner", exclude=apart)
    except ValueError as error:
        raise ValueError(f"The two sets of features do not fit: sizes {dict(a.sizes)} and {dict(b.sizes)}.") from error
    if empty := [str(d) for d in left.dims if left.sizes[d] == 0]:
        raise ValueError(f"The two sets of features have no {empty[0]} in common.")
    return left, right, ids.sel(sample=left["sample"]) if "sample" in ids.indexes else ids


def _place(a: xr.DataArray, b: xr.DataArray) -> dict[str, Any]:
    """Scalar coordinates and sites of two blocks: one entry where they agree or one side has none, two where they differ."""
    left, right = (
        # the site is an attribute of what a store gives: a coordinate of that name may be a label of the samples
        {str(n): c.item() for n, c in block.coords.items() if c.ndim == 0}
        | {k: block.attrs[k] for k in ("site",) if k in block.attrs}
        for block in (a, b)
    )
    place: dict[str, Any] = {}
    for name in dict.fromkeys([*left, *right]):
        if name in left and name in right and left[name] != right[name]:
            place |= {f"{name}_a": left[name], f"{name}_b": right[name]}
        else:
            place[name] = left.get(name, right.get(name))
    return place


def _row(
    value: float, low: float, high: float, chance: float, excess_low: float = np.nan, excess_high: float = np.nan
) -> dict[str, float]:
    ends = {"excess": value - chance, "excess_low": excess_low, "excess_high": excess_high}
    return {"value": value, "low": low, "high": high, "chance": chance, **ends}


def _blocks(
    a: xr.DataArray, b: xr.DataArray, members: NDArray[np.int64], batch: int, pool: Pool, seed: int
) -> Iterator[tuple[Floats, Floats, NDArray[Any]]]:
    """Minibatches in memory one after the other, so that a store may be larger than it."""
    for rows in minibatches(members, batch, seed):
        yield _matrix(a.isel(sample=rows), pool), _matrix(b.isel(sample=rows), pool), members[rows]


def _matrix(block: xr.DataArray, pool: Pool) -> Floats:
    """(sample, column) in memory."""
    return _finite(pool_features(block, pool).transpose("sample", "channel").to_numpy())


def _positions(block: xr.DataArray) -> Floats:
    """(sample, position, channel) in memory."""
    space = [d for d in SPACE if d in block.dims]
    values = block.transpose("sample", *space, "channel").to_numpy()
    return _finite(values.reshape(len(values), -1, values.shape[-1]))


def _finite(values: NDArray[Any]) -> Floats:
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        bad = int((~np.isfinite(wide)).any(axis=tuple(range(1, wide.ndim))).sum())
        raise ValueError(f"{bad} of {len(wide)} samples are not finite; select the finished samples first.")
    return wide
