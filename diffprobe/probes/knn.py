"""k nearest neighbours: whether samples with one label lie together, with nothing learned but k.

A probe without weights: what it reads is in the features' own geometry.  Rows, split, control, intervals and columns are
those of the linear probes, so the two tables compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import xarray as xr
from numpy.typing import ArrayLike
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from diffprobe.probes.fitting import ProbeResult, run_probes
from diffprobe.probes.task import Ids, Pool, Problem, Settings, Task, as_features, check_split, pool_features

Metric = Literal["cosine", "euclidean", "manhattan"]


def knn_probe(
    features: xr.DataArray | ArrayLike,
    label: Ids,
    *,
    k: Sequence[int] = (5, 20),
    metric: Metric = "cosine",
    task: Task | Literal["auto"] = "auto",
    pool: Pool = "mean",
    split: Ids | None = None,
    control: bool = True,
    types: Ids | None = None,
    groups: Ids | None = None,
    seed: int = 0,
    cross_fit: bool = False,
    keep_rows: bool = False,
    keep_estimators: bool = False,
    n_jobs: int | None = None,
    n_resamples: int = 2000,
) -> ProbeResult:
    """Labels every test row like its nearest neighbours among the other rows; one probe per combination.

    Features are standardised per channel, for a few massive channels would decide every distance.  Of the values of `k`
    the one that scores best on validation is taken (the larger of equals); neighbours then come from train and validation.

    Args:
        features: (sample, ..., channel) or (sample, ..., channel, y, x).
        k: Numbers of neighbours to choose from.
        metric: Distance between standardised rows.
        task: Classes are read by majority, quantities by the neighbours' mean.
        keep_estimators: Whether the result keeps the fitted estimators, which hold their training rows.
        label, pool, split, control, types, groups, seed, cross_fit, keep_rows, n_jobs, n_resamples: As for `fit_probe`.
            The control's train score is trivially high: a row is its own nearest neighbour.

    Returns:
        As `fit_probe`, with the column `k` in place of `penalty`.

    Raises:
        ValueError: as for `fit_probe`; and for a k that is not a positive number of training rows, or an unknown metric.

    >>> import numpy as np
    >>> colour = np.array(["red", "blue"] * 40)
    >>> values = np.random.default_rng(0).normal(size=(80, 8)) + 9 * (colour == "red")[:, None]
    >>> knn_probe(values, colour, k=[3, 5]).table["value"].tolist()
    [1.0]
    """
    given = as_features(features)
    if metric not in get_args(Metric):
        raise ValueError(f"Metric {metric!r} is not one of {', '.join(get_args(Metric))}.")
    problem = Problem.of(given, label, task=task, pool=pool, types=types, groups=groups, split=split, seed=seed)
    choices = tuple(sorted(map(int, k), reverse=True))
    settings = Settings("model__n_neighbors", choices, control, seed, n_resamples, cross_fit, keep_rows)
    check_split(problem, settings, split)
    fewest = min(int(problem.parts(turn)[0].sum()) for turn in range(settings.turns))
    if not choices or choices[-1] < 1 or choices[0] > fewest:
        raise ValueError(
            f"k must be whole numbers from 1 to the {fewest} training rows; got {', '.join(map(str, k)) or 'none'}."
        )
    kind: Any = KNeighborsRegressor if problem.task == "regression" else KNeighborsClassifier
    model = Pipeline([("scale", StandardScaler()), ("model", kind(metric=metric, algorithm="brute"))])
    result = run_probes(
        pool_features(given, pool), problem, settings, model, pool=pool, n_jobs=n_jobs, keep_estimators=keep_estimators
    )
    return replace(result, table=result.table.rename(columns={"n_neighbors": "k"}))
