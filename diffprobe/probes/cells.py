"""Means, intervals and p values of many cells at once: tables (row, cell), in which NaN marks a missing value.

Rows of one image are one cluster.  The invariant: all cells share their resamples, so the intervals of thousands of cells
are one matrix product.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from diffprobe.probes.task import Floats


@lru_cache(maxsize=4)
def resampling_weights(clusters: int, seed: int, n_resamples: int) -> Floats:
    """How often each resample of `diffprobe.stats.bootstrap_sums` takes each cluster: (resample, cluster)."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(clusters, size=clusters) for _ in range(n_resamples if clusters > 1 else 0))
    return np.array([np.bincount(rows, minlength=clusters) for rows in drawn], np.float64).reshape(-1, clusters)


def column_means(table: Floats) -> Floats:
    """Column means over finite values; NaN where there are none."""
    known = np.isfinite(table)
    count = known.sum(0)
    return np.where(count, np.where(known, table, 0).sum(0) / np.maximum(count, 1), np.nan)


def _sums(table: Floats, images: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Sums and counts of finite values, (image, column)."""
    known = np.isfinite(table)
    sums = np.zeros((int(images.max()) + 1, table.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, images, np.where(known, table, 0))
    np.add.at(counts, images, known)
    return sums, counts


def _ratios(sums: Floats, counts: Floats, weights: Floats) -> Floats:
    """(resample, column) means; NaN where a resample has no row."""
    drawn, size = weights @ sums, weights @ counts
    return np.where(size > 0, drawn / np.maximum(size, 1), np.nan)


def _quantiles(drawn: Floats) -> tuple[Floats, Floats]:
    """Ends of the middle 95% of each column; NaN where nothing was drawn."""
    if not len(drawn):
        return np.full(drawn.shape[1], np.nan), np.full(drawn.shape[1], np.nan)
    ends = np.full((2, drawn.shape[1]), np.nan)
    whole = np.isfinite(drawn).all(0)
    ends[:, whole] = np.quantile(drawn[:, whole], [0.025, 0.975], axis=0)
    for column in np.flatnonzero(~whole & np.isfinite(drawn).any(0)):
        ends[:, column] = np.nanquantile(drawn[:, column], [0.025, 0.975])
    return ends[0], ends[1]


def mean_interval(table: Floats, images: NDArray[np.int64], weights: Floats) -> tuple[Floats, Floats]:
    """95% interval of each column's mean; NaN for a single image."""
    sums, counts = _sums(table, images)
    low, high = _quantiles(_ratios(sums, counts, weights))
    lonely = (counts > 0).sum(0) < 2
    return np.where(lonely, np.nan, low), np.where(lonely, np.nan, high)


def macro_mean(
    table: Floats, images: NDArray[np.int64], classes: NDArray[np.int64], weights: Floats
) -> tuple[Floats, Floats, Floats]:
    """Mean of the classes' means, with its interval; a resample's mean is over the classes that it has."""
    total, present = np.zeros(table.shape[1]), np.zeros(table.shape[1])
    drawn_total, drawn_present = np.zeros((2, len(weights), table.shape[1]))
    for code in range(int(classes.max()) + 1):
        rows = classes == code
        here, index = np.unique(images[rows], return_inverse=True)
        mean = column_means(table[rows])
        total += np.nan_to_num(mean)
        present += np.isfinite(mean)
        drawn = _ratios(*_sums(table[rows], index), weights[:, here])
        drawn_total += np.nan_to_num(drawn)
        drawn_present += np.isfinite(drawn)
    share = lambda top, below: np.where(below > 0, top / np.maximum(below, 1), np.nan)  # noqa: E731
    low, high = _quantiles(share(drawn_total, drawn_present))
    lonely = (_sums(table, images)[1] > 0).sum(0) < 2
    return share(total, present), np.where(lonely, np.nan, low), np.where(lonely, np.nan, high)


def p_above_zero(table: Floats, images: NDArray[np.int64]) -> Floats:
    """(column,) one-sided p of mean > 0, rows of one image as one cluster.

    Where all images have the same value, Student's t is not defined; p is then that of the exact sign test, 0.5 ** images.
    """
    sums, counts = _sums(table, images)
    there, size = (counts > 0).sum(0), counts.sum(0)
    mean = sums.sum(0) / np.maximum(size, 1)
    spread = np.sqrt((there / np.maximum(there - 1, 1)) * ((sums - mean * counts) ** 2).sum(0)) / np.maximum(size, 1)
    flat = spread <= 1e-12 * np.abs(mean)
    p = np.where(
        flat, np.where(mean > 0, 0.5**there, 1.0), student.sf(mean / np.where(flat, 1, spread), np.maximum(there - 1, 1))
    )
    return np.where(there < 2, np.nan, p)
