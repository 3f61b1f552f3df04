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

from diffprobe.probes.fitting import ProbeResult
from diffprobe.probes.linear import fit_probe
from diffprobe.probes.task import Ids, Problem

Metric = Literal["cosine", "euclidean", "manhattan"]


def knn_probe(
    features: xr.DataArray | ArrayLike,
    label: Ids,
    *,
    k: Sequence[int] = (5, 20),
    metric: Metric = "cosine",
    keep_estimators: bool = False,
    **protocol: Any,
) -> ProbeResult:
    """Labels every test row like its nearest neighbours among the other rows; one probe per combination.

    Features are standardised per channel, for a few massive channels would decide every distance.  Of the values of `k`
    the one that scores best on validation is taken (the larger of equals); neighbours then come from train and validation.

    Args:
        features: (sample, ..., channel) or (sample, ..., channel, y, x).
        k: Numbers of neighbours to choose from.
        metric: Distance between standardised rows.
        keep_estimators: Whether the result keeps the fitted estimators, which hold their training rows.
        label: As for `fit_probe`.
        **protocol: task (classes are read by majority, quantities by the neighbours' mean), pool, split, control (whose train
            score is trivially high: a row is its own nearest neighbour), types, groups, seed, cross_fit, keep_rows, n_jobs,
            n_resamples; all as for `fit_probe`.

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
    if metric not in get_args(Metric):
        raise ValueError(f"Metric {metric!r} is not one of {', '.join(get_args(Metric))}.")
    choices = sorted(map(int, k), reverse=True)

    def estimator(problem: Problem, turns: int) -> Pipeline:
        fewest = min(int(problem.parts(turn)[0].sum()) for turn in range(turns))
        if not choices or choices[-1] < 1 or choices[0] > fewest:
            raise ValueError(
                f"k must be whole numbers from 1 to the {fewest} training rows; got {', '.join(map(str, k)) or 'none'}."
            )
        kind: Any = KNeighborsRegressor if problem.task == "regression" else KNeighborsClassifier
        return Pipeline([("scale", StandardScaler()), ("model", kind(metric=metric, algorithm="brute"))])

    given = {"model__n_neighbors": choices}
    result = fit_probe(features, label, estimator=estimator, choices=given, keep_estimators=keep_estimators, **protocol)
    return replace(result, table=result.table.rename(columns={"n_neighbors": "k"}))
