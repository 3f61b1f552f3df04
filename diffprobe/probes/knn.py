"""k nearest neighbours: whether samples with one label lie together, with nothing learned but k.

A probe without weights: what it reads is in the features' own geometry.  Rows, split, control, intervals and columns
are those of the linear probes (`diffprobe.probes.task`), so the two tables can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from diffprobe.probes.task import (
    FOLDS,
    Floats,
    Pool,
    Problem,
    Rows,
    Settings,
    Task,
    best_choice,
    check_features,
    pool_features,
    run_probes,
    score,
)

METRICS = ("cosine", "euclidean", "manhattan")


def knn_probe(
    features: xr.DataArray,
    label: str | ArrayLike | xr.DataArray,
    *,
    k: Sequence[int] = (5, 20),
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine",
    task: Task | Literal["auto"] = "auto",
    pool: Pool = "mean",
    control: bool = True,
    types: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    cross_fit: bool = False,
    keep_rows: bool = False,
    n_jobs: int | None = None,
    n_resamples: int = 2000,
) -> pd.DataFrame:
    """Labels every test row like its nearest neighbours among the other rows; one probe per combination.

    Features are standardised per channel, for a few massive channels would decide every distance.  Of the values of `k`
    the one that scores best on validation is taken (the larger of equals); neighbours then come from train and validation.

    Args:
        features: (sample, ..., channel) or (sample, ..., channel, y, x).
        k: Numbers of neighbours to choose from.
        metric: Distance between standardised rows.
        task: "logistic" here means classes by majority, "ridge" quantities by the neighbours' mean.
        label, pool, control, types, groups, seed, cross_fit, keep_rows, n_jobs, n_resamples: As for `fit_probe`.
            The control's train score is trivially high: a row is its own nearest neighbour.

    Returns:
        The table of `fit_probe` with the column `k` in place of `penalty`.

    Raises:
        ValueError: As `fit_probe`; and for a k that is not a positive number of training rows, or an unknown metric.

    >>> colour = np.array(["red", "blue"] * 40)
    >>> values = np.random.default_rng(0).normal(size=(80, 8)) + 9 * (colour == "red")[:, None]
    >>> knn_probe(xr.DataArray(values, dims=("sample", "channel")), colour, k=[3, 5])["value"].tolist()
    [1.0]
    """
    check_features(features)
    if metric not in METRICS:
        raise ValueError(f"Metric {metric!r} is not one of {', '.join(METRICS)}.")
    pooled = pool_features(features, pool)
    problem = Problem.of(pooled, label, task, types, groups, seed)
    fewest = min(int(problem.parts(turn)[0].sum()) for turn in range(FOLDS if cross_fit else 1))
    if not k or min(k) < 1 or max(k) > fewest:
        raise ValueError(
            f"k must be whole numbers from 1 to the {fewest} training rows; got {', '.join(map(str, k)) or 'none'}."
        )
    settings = Settings("k", tuple(sorted(k, reverse=True)), control, seed, n_resamples, cross_fit, keep_rows)
    return run_probes(pooled, problem, settings, partial(NeighbourModel, problem.task, metric), n_jobs)


class NeighbourModel:
    """A scaler and scikit-learn's nearest neighbours."""

    def __init__(self, task: Task, metric: str) -> None:
        self.task, self.converged = task, True
        self.scaler = StandardScaler()
        kind = KNeighborsRegressor if task == "ridge" else KNeighborsClassifier
        self.model: Any = kind(metric=metric, algorithm="brute")

    def choose(self, x: Floats, y: NDArray[Any], train: Rows, validation: Rows, choices: Sequence[float]) -> float:
        """The k that scores best on validation, the first (largest) of equals."""
        if len(choices) == 1:
            return choices[0]
        self.fit(x, y, train, choices[0])
        held_out = self.scaler.transform(x[validation])
        answers = ((k, self.model.set_params(n_neighbors=int(k)).predict(held_out)) for k in choices)
        return best_choice((k, score(self.task, y[validation], answer)) for k, answer in answers)

    def fit(self, x: Floats, y: NDArray[Any], rows: Rows, choice: float) -> int:
        """Keeps the rows to compare with."""
        self.model.set_params(n_neighbors=int(choice)).fit(self.scaler.fit_transform(x[rows]), y[rows])
        return 0

    def predict(self, x: Floats) -> NDArray[Any]:
        """Class codes or quantities, (row,)."""
        return np.asarray(self.model.predict(self.scaler.transform(x)))
