"""From correlation to cause: tables of interventions, their agreement with probes, and erasure.

`diffprobe.patching` runs the model; here are arrays and tables only.  An effect is the share of the way from one image's outcome to
its twin's: sum of ``moved`` over sum of ``whole``, so pairs that differ more weigh more.

The invariant: both directions of a pair, and all that was measured of it, are resampled together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from diffprobe.stats import Floats, bootstrap_sums, holm, paired_permutation_test

PATCH, DIRECTION, ELSEWHERE = "patch", "random direction", "other places"
CHANGES = (PATCH, DIRECTION, ELSEWHERE)
SHARE = "share of the way to the twin"
_COLUMNS = {
    PATCH: ("value", "low", "high"), DIRECTION: ("control_value", "control_low", "control_high"),
    ELSEWHERE: ("other_places", "other_places_low", "other_places_high"),
}  # fmt: skip


def _shares(sums: Floats) -> Floats:
    return np.asarray(sums[:, 0] / sums[:, 1])


def causal_table(effects: xr.Dataset, *, seed: int = 0) -> pd.DataFrame:
    """The effect of a patch at each site and timestep beside its controls; a row is also one for `diffprobe plot probe`.

    Args:
        effects: ``moved`` and ``whole`` (outcome, change, site, timestep, pair), as `diffprobe.patching.activation_patching` gives.

    Returns:
        Columns label (the outcome), site, timestep, score, value with low and high over pairs, chance (0), control_value (the random
        direction, as `control` says) and other_places, each with its interval; p of a sign-flip test of the patch against the random direction
        by pair, and p_holm, the same after Holm over the grid of an outcome; n (pairs), seed.

    >>> moved = np.array([1.0, 2.0, 3.0, 0.0, 0.1, -0.1, 0.0, 0.0, 0.0]).reshape(1, 3, 1, 1, 3)
    >>> dims = ("outcome", "change", "site", "timestep", "pair")
    >>> coords = {"outcome": ["prediction"], "change": list(CHANGES), "site": ["M-Out"], "timestep": [50]}
    >>> data = xr.Dataset({"moved": (dims, moved), "whole": (dims, np.full(moved.shape, 4.0))}, coords)
    >>> causal_table(data)[["value", "control_value", "p"]].round(2).to_dict("records")
    [{'value': 0.5, 'control_value': 0.0, 'p': 0.25}]
    """
    rows = []
    for outcome, site, timestep in itertools.product(*(effects[d].values for d in ("outcome", "site", "timestep"))):
        cell = effects.sel(outcome=outcome, site=site, timestep=timestep)
        row: dict[str, Any] = {"label": str(outcome), "site": str(site), "timestep": int(timestep)}
        row |= {"score": SHARE, "chance": 0.0, "control": DIRECTION}
        for change, (value, low, high) in _COLUMNS.items():
            columns = np.stack([cell[name].sel(change=change).to_numpy() for name in ("moved", "whole")], 1)
            row[value] = float(_shares(columns.sum(0, keepdims=True))[0])
            row[low], row[high] = bootstrap_sums(columns, _shares, seed=seed)
        a, b = (cell["moved"].sel(change=change).to_numpy() for change in (PATCH, DIRECTION))
        rows.append(row | {"p": paired_permutation_test(a, b, seed)[1], "n": len(a), "seed": seed})
    frame = pd.DataFrame(rows)
    return frame.assign(p_holm=frame.groupby("label", sort=False)["p"].transform(lambda p: holm(p.to_numpy())))


def rank_agreement(
    effects: xr.Dataset, hits: xr.DataArray, outcome: str = "prediction", *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Spearman's rank correlation over cells of the patch's effect with a probe's accuracy: is what can be read what is used?

    Args:
        effects: As for `causal_table`.
        hits: (site, timestep, row) of the probe, 1 where a test row was right.

    Returns:
        value, low, high, n (cells): pairs and test rows are both resampled, so the interval holds the noise of both maps.
    """
    cells = effects.sel(outcome=outcome, change=PATCH)
    moved, whole = (cells[name].transpose("site", "timestep", "pair").to_numpy() for name in ("moved", "whole"))
    right = hits.sel(site=cells["site"], timestep=cells["timestep"]).transpose("site", "timestep", ...).to_numpy()
    pairs, tests = moved.shape[-1], right.shape[-1]

    def correlation(some: NDArray[np.int64], others: NDArray[np.int64]) -> float:
        share = moved[..., some].sum(-1) / whole[..., some].sum(-1)
        read = right[..., others].mean(-1)
        return float(spearmanr(share.ravel(), read.ravel()).statistic) if np.ptp(share) and np.ptp(read) else np.nan

    rng = np.random.default_rng(seed)
    drawn = [correlation(rng.choice(pairs, (pairs,)), rng.choice(tests, (tests,))) for _ in range(n_resamples)]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    value = correlation(np.arange(pairs), np.arange(tests))
    return {"value": value, "low": float(low), "high": float(high), "n": moved.shape[0] * moved.shape[1]}


# --- erasure ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eraser:
    """An affine map x - P (x - mean) that takes out what a linear classifier could read; `fit_leace` makes one.

    Attributes:
        mean: (channel,) of the rows that it was fitted on.
        projection: P, (channel, channel), of the rank of what is taken out.
    """

    mean: Floats
    projection: Floats

    @property
    def rank(self) -> int:
        return int(np.linalg.matrix_rank(self.projection))

    def __call__(self, x: ArrayLike) -> Floats:
        """Rows (row, channel) without the concept."""
        given = np.asarray(x, np.float64)
        return np.asarray(given - (given - self.mean) @ self.projection.T)


def fit_leace(x: ArrayLike, z: ArrayLike) -> Eraser:
    """LEACE, the least change in the mean squared norm after which no linear classifier of z beats a constant.

    P = W^+ Q W, where W is the root of the inverse covariance of x and Q projects on the columns of W cov(x, z)
    (Belrose et al. 2023, theorem 4.3).

    Args:
        x: (row, channel).
        z: (row,) classes, or (row, column) numbers.

    Raises:
        ValueError: there is one class, or rows and classes are not equally many.

    >>> rng = np.random.default_rng(0)
    >>> z = rng.integers(2, size=400)
    >>> x = rng.normal(size=(400, 5)) + 3 * z[:, None]
    >>> erased = fit_leace(x, z)(x)
    >>> bool(np.abs(erased[z == 0].mean(0) - erased[z == 1].mean(0)).max() < 1e-9)
    True
    """
    rows, labels = np.asarray(x, np.float64), np.asarray(z)
    if labels.ndim == 1:
        labels = (labels[:, None] == np.unique(labels)).astype(np.float64)
    if len(rows) != len(labels) or np.ptp(labels, axis=0).max(initial=0) == 0:
        raise ValueError(f"Erasure needs a label for each of {len(rows)} rows, and two that differ; got {len(labels)}.")
    mean = rows.mean(0)
    centred = rows - mean
    values, axes = np.linalg.eigh(centred.T @ centred / len(rows))
    kept = values > 1e-10 * values[-1]  # directions in which nothing varies hold nothing to erase
    axes, root = axes[:, kept], np.sqrt(values[kept])
    whitened = (axes / root) @ axes.T @ (centred.T @ (labels - labels.mean(0)) / len(rows))
    left, sizes, _ = np.linalg.svd(whitened, full_matrices=False)
    span = left[:, sizes > 1e-9 * max(1e-300, float(sizes[0]))]
    projection = (axes * root) @ axes.T @ span @ span.T @ (axes / root) @ axes.T
    return Eraser(mean, np.asarray(projection))
