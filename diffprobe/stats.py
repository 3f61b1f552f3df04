"""Intervals and tests for scores: bootstrap, sign-flip permutation, Holm, Wilson.

The first axis of an array is the row, one score per row.  The invariant: rows that share a cluster (patches of one image,
questions about one image) are never treated as independent; a resample takes or leaves them as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BCA_LIMIT = 5000  # BCa's jackknife is quadratic in n; beyond this its correction is far below the interval's own noise
_BLOCK = 2**22  # numbers drawn at once, so that memory does not grow with the number of resamples


def bootstrap_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a mean.

    Without clusters: bias-corrected and accelerated (Efron 1987, `scipy.stats.bootstrap`), percentile beyond `BCA_LIMIT`
    values.  With clusters: whole clusters are resampled and the percentile interval of the rows' mean is returned (Davison
    & Hinkley 1997, section 3.8), so a cluster weighs as much as it has rows.

    Equal values give an interval of width zero, which says nothing about the next sample; `share_interval` knows.

    Args:
        values: One finite number per row.
        clusters: One id per row, for example the image that the row came from.

    Returns:
        Lower and upper end; both NaN for a single value or a single cluster, which has no interval.

    >>> low, high = bootstrap_interval([0, 1, 1, 1, 0, 1, 1, 0, 1, 1])
    >>> low < 0.7 < high
    True
    >>> paired = bootstrap_interval([0, 0, 1, 1, 0, 0, 1, 1], clusters=["a", "a", "b", "b", "c", "c", "d", "d"])
    >>> paired == (0.0, 1.0)
    True
    """
    rows = _finite(values, "values")
    if clusters is not None:
        columns = np.column_stack([rows, np.ones_like(rows)])
        return bootstrap_sums(columns, lambda sums: sums[:, 0] / sums[:, 1], clusters, level, n_resamples, seed)
    _check_level(level)
    if rows.size < 2:
        return np.nan, np.nan
    if np.ptp(rows) <= 1e-13 * np.abs(rows).max():  # equal but for rounding, of which BCa's skewness is not a number
        return float(rows.min()), float(rows.max())
    result = scipy.stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=n_resamples,
        batch=max(1, _BLOCK // rows.size),
        confidence_level=level,
        method="BCa" if rows.size <= BCA_LIMIT else "percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def share_interval(
    hits: ArrayLike, clusters: ArrayLike | None = None, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_interval`, or Wilson's over clusters where all are 0 or all are 1: resampling equal values says nothing.

    >>> share_interval([1, 1, 1, 1], clusters=["a", "a", "b", "b"]) == wilson_interval(2, 2)
    True
    """
    rows = np.asarray(hits, np.float64)
    if rows.min(initial=1) == rows.max(initial=0) and rows[0] in (0, 1):
        n = len(rows) if clusters is None else len(np.unique(np.asarray(clusters)))
        return wilson_interval(float(rows[0]) * n, n, level)
    return bootstrap_interval(rows, clusters, level, n_resamples, seed)


def bootstrap_sums(
    columns: ArrayLike,
    statistic: Callable[[Floats], Floats],
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of column sums (R2, balanced accuracy, mean IoU, a ratio).

    Args:
        columns: (row, column) numbers whose sums the statistic needs.
        statistic: Maps sums (resample, column) to values (resample,); a resample whose value is NaN is left out.
        clusters: One id per row, resampled as wholes; each row is its own cluster when absent.

    Returns:
        Lower and upper end; both NaN for a single cluster.

    >>> hits, shown = [1, 0, 2, 2], [2, 2, 2, 3]
    >>> low, high = bootstrap_sums(np.c_[hits, shown], lambda sums: sums[:, 0] / sums[:, 1])
    >>> low < 5 / 9 < high
    True
    """
    _check_level(level)
    table = _finite(columns, "columns")
    if clusters is not None:
        table = _cluster_sums(table, clusters)
    if len(table) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(table[rng.integers(len(table), size=(size, len(table)))].sum(axis=1))
        for size in _block_sizes(n_resamples, table.size)
    ]
    tail = (1 - level) / 2
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def paired_permutation_test(
    a: ArrayLike, b: ArrayLike, seed: int = 0, n_resamples: int = 10_000, clusters: ArrayLike | None = None
) -> tuple[float, float]:
    """Two-sided sign-flip test of equal means of paired scores (Fisher 1935, section 21).

    All sign patterns are visited when there are at most `n_resamples` of them.  Where all differences but the zeros have one
    size, as those of right and wrong answers, p is the exact binomial one (McNemar 1947).  Otherwise patterns are drawn and
    the observed one is counted in, so p is never zero (Phipson & Smyth 2010).

    Args:
        a: One score per row.
        b: The other method's score of the same row.
        n_resamples: Most sign patterns to try.
        clusters: One id per row; rows of one cluster are swapped together.

    Returns:
        The mean of `a - b` and its p value.

    >>> paired_permutation_test([3, 4, 5, 6], [1, 1, 1, 1])
    (3.5, 0.125)
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"Paired scores need one shape; `a` has {first.shape}, `b` has {second.shape}.")
    differences = (first - second)[:, None]
    mean = float(differences.mean())
    if clusters is not None:
        differences = _cluster_sums(differences, clusters)
    flat = differences[:, 0]
    n = flat.size
    # rounding must not hide a tie with the observed pattern; it grows with the terms, not with what is left of their sum
    observed = abs(flat.sum()) - 1e-12 * np.abs(flat).sum()
    if 2**n <= n_resamples:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return mean, float(np.mean(np.abs((2 * patterns - 1) @ flat) >= observed))
    sizes = np.unique(np.abs(flat[flat != 0]))
    if sizes.size == 1:
        positive, changed = int((flat > 0).sum()), int((flat != 0).sum())
        return mean, float(scipy.stats.binomtest(positive, changed).pvalue)
    rng = np.random.default_rng(seed)
    extreme = sum(
        int(np.sum(np.abs((2 * rng.integers(2, size=(size, n)) - 1) @ flat) >= observed))
        for size in _block_sizes(n_resamples, n)
    )
    return mean, (extreme + 1) / (n_resamples + 1)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment for the family-wise error rate (Holm 1979), in the shape of the input.

    All values are one family; NaN stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03, 0.005]).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    adjusted = np.array(p_values, dtype=np.float64)
    known = ~np.isnan(adjusted)
    tests = adjusted[known]
    if np.any((tests < 0) | (tests > 1)):
        raise ValueError(f"p values lie in [0, 1]; found {tests.min():g} to {tests.max():g}.")
    order = np.argsort(tests, kind="stable")
    stepped = np.maximum.accumulate(tests[order] * np.arange(tests.size, 0, -1))
    tests[order] = np.minimum(stepped, 1.0)
    adjusted[known] = tests
    return adjusted


def wilson_interval(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), sensible also when all or none succeed.

    `scipy.stats.binomtest` has it for whole numbers; here a success may be a fraction, such as the mean of a cluster.

    >>> low, high = wilson_interval(10, 10)
    >>> round(low, 3), high
    (0.722, 1.0)
    """
    _check_level(level)
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"A share needs 0 <= successes <= n and n > 0; got {successes} of {n}.")
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    # the ends are exact when none or all succeed; the formula would miss them by rounding
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def _finite(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"`{name}` is empty; at least one row is needed.")
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"`{name}` has {bad} non-finite entries of {array.size}; drop them first.")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` is a coverage between 0 and 1, such as 0.95; got {level}.")


def _cluster_sums(table: Floats, clusters: ArrayLike) -> Floats:
    """Sums of the (row, column) table over the rows of each cluster: (cluster, column)."""
    ids = np.asarray(clusters)
    if ids.shape != (len(table),):
        raise ValueError(f"`clusters` needs one id per row, shape ({len(table)},); got shape {ids.shape}.")
    _, index = np.unique(ids, return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, table.shape[1]))
    np.add.at(sums, index, table)
    return sums


def _block_sizes(total: int, width: int) -> Iterator[int]:
    """Splits `total` resamples of `width` numbers each into blocks that fit into memory."""
    step = max(1, _BLOCK // width)
    return (min(step, total - start) for start in range(0, total, step))
