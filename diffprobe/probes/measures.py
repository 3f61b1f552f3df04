"""How alike two representations of the same rows are: cosine, centred kernel alignment (CKA), mutual nearest neighbours.

Pure functions of arrays (row, column).  The invariant: where a measure compares rows with one another, its interval never
comes from a bootstrap.  A row that is drawn twice is its own perfect neighbour, which pulls CKA and neighbourhoods towards
1; the jackknife, over rows or over groups of rows that belong together, only leaves rows out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from diffprobe.probes.task import SPACE, Floats, finite

BATCH = 1024  # rows of one Gram matrix: 8 MB, and an exact result for stores up to this size
FEWEST = 5  # the unbiased estimator needs four rows, and the jackknife leaves one out
ROUNDING = 1e-14  # cosines that differ by less are equal
_ONE = 1 - 1e-15  # Fisher's z of 1 is infinite


@dataclass(frozen=True)
class Estimate:
    """A similarity with its interval.

    Attributes:
        value: The similarity.
        low, high: Its 95% interval.
        chance: Its expectation when the second side's rows are in random order.
        n: Rows compared.
        left_out: (group,) the value without each group in turn.  From these of two estimates over the same groups
            `jackknife_interval` makes the interval of their difference.
    """

    value: float
    low: float
    high: float
    chance: float
    n: int
    left_out: Floats


class UndefinedError(ValueError):
    """A measure is not defined for these features: zeros have no direction, equal rows no nearest one."""


# --- cosine ---------------------------------------------------------------------------------------


def cosines(a: xr.DataArray, b: xr.DataArray, *, standardise: bool = False, groups: ArrayLike | None = None) -> Floats:
    """Cosine of each sample's two feature vectors, and with those of all other samples, averaged over positions.

    Args:
        a: (sample, channel) or (sample, channel, y, x).
        b: Features of the same samples, of equal shape.
        standardise: Bring every channel to mean 0 and deviation 1 over the samples and positions of both sides first.
        groups: One id per sample; samples of one group are not compared with each other.

    Returns:
        (2, sample): the cosine with its own partner, and the mean with the partners of all samples outside its group (all
        of them, not a random shuffle).  Positions where a side is zero have no cosine and are left out; NaN where none is
        left, or no other group.

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
    """Brings values to mean 0 and deviation 1 along some axes; values that are constant but for rounding become zero.

    >>> standardised(np.full((30, 1), 0.1), axis=(0,)).any()
    np.False_
    """
    mean, scale = values.mean(axis=axis, keepdims=True), values.std(axis=axis, keepdims=True)
    flat = scale <= 1e-13 * np.abs(mean)
    return np.asarray(np.where(flat, 0, (values - mean) / np.where(flat, 1, scale)))


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
    look at the columns).

    Args:
        x: (row, column).
        y: (row, column), any number of columns.
        unbiased: Which estimator of HSIC.
        groups: One id per row; rows of one group are left out together.
        batch: Rows of one minibatch at most (a group stays whole).

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
    return cka_of_batches(blocks, unbiased)


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


def cka_of_batches(blocks: Iterable[tuple[Floats, Floats, NDArray[Any]]], unbiased: bool) -> Estimate:
    """CKA from the minibatches, each (x, y, group ids); see `cka`."""
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


def jackknife_interval(value: float, left_out: ArrayLike, fisher: bool = False) -> tuple[float, float]:
    """95% Student interval from the values without each group in turn (Tukey 1958).

    Args:
        value: The estimate from all groups.
        left_out: (group,) the estimate without each.
        fisher: On the scale of artanh, for values that end at -1 and 1.

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
    half = scipy.stats.t.ppf(0.975, groups - 1) * np.sqrt((groups - 1) / groups * np.sum((values - values.mean()) ** 2))
    ends = np.array([centre - half, centre + half])
    low, high = np.tanh(ends) if fisher else ends
    return float(low), float(high)


# --- neighbours -----------------------------------------------------------------------------------


def mutual_knn(x: ArrayLike, y: ArrayLike, k: int = 10) -> Floats:
    """For each row, the share of its `k` nearest neighbours (by cosine) that are the same in both sets (Huh et al. 2024).

    The mean over rows is the alignment; under a random matching it is k / (rows - 1).  Neighbours come from all rows, so an
    interval over these shares is conditional on this set of rows.

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
    """(row, k) numbers of the nearest other rows by cosine; -1 where the order is not defined."""
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


def _positions(block: xr.DataArray) -> Floats:
    """(sample, position, channel) in memory."""
    space = [d for d in SPACE if d in block.dims]
    values = block.transpose("sample", *space, "channel").to_numpy()
    return finite(values.reshape(len(values), -1, values.shape[-1]))
