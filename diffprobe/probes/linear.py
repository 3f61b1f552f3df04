"""Linear probes: how much of a label can be read off a feature by one linear map.

scikit-learn fits them: logistic regression for classes, ridge regression for quantities.  `diffprobe.probes.task` says
which rows a probe sees, `diffprobe.probes.scoring` how it is scored.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import sklearn
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from diffprobe.probes.fitting import ProbeResult, run_probes
from diffprobe.probes.task import FOLDS, Floats, Ids, Pool, Problem, Settings, Task, as_features, check_split, pool_features

TOLERANCE = 1e-6  # scikit-learn's default of 1e-4 stops early enough to fake a best timestep


def fit_probe(
    features: xr.DataArray | ArrayLike,
    label: Ids,
    *,
    estimator: Any = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
    task: Task | Literal["auto"] = "auto",
    penalties: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0),
    pool: Pool = "mean",
    split: Ids | None = None,
    control: bool = True,
    types: Ids | None = None,
    groups: Ids | None = None,
    seed: int = 0,
    cross_fit: bool = False,
    keep_rows: bool = False,
    keep_estimators: bool = True,
    n_jobs: int | None = None,
    n_resamples: int = 2000,
    max_iter: int = 20_000,
    device: str | None = None,
) -> ProbeResult:
    """Fits one probe per combination of the dimensions other than sample, channel, y and x; a linear one by default.

    Samples are split by `seed` into 60% train, 20% validation and 20% test, stratified by the label (by its rank for
    regression).  Samples of one group, and rows that repeat a sample id, stay together.  Features are standardised with
    the moments of the rows that the weights are fitted on.  The penalty with the best validation score is taken (the
    strongest of equals; weaker ones are tried until two in a row score below the best).  The probe is then refitted on
    train and validation and scored once on test.

    The control task (Hewitt & Liang 2019) keeps features, split and penalty, and replaces the labels:

    * With `types` (one id per sample: the word, object or scene that it shows), every type gets one random label, drawn
      from the labels' own frequencies.  This is the control of the paper: a probe can only score by memorising types, so
      `control_value` measures its capacity to do so and `selectivity` what the features hold beyond it.  Repeated sample
      ids are types of their own.
    * Without `types`, the labels are permuted once over the samples (whole label maps for patches).  No image recurs, so
      the score is at chance unless split, prior or position leak: a check of the protocol, not of capacity.  How much the
      probe can memorise is `control_train_value`.

    Intervals are bootstrapped over test rows, over clusters where `groups` are given or a sample has several rows (see
    `diffprobe.stats`).  When all or none of the test rows are right, Wilson's interval over clusters is given.

    Args:
        features: (sample, ..., channel) or (sample, ..., channel, y, x); a plain array has no dimensions in between.
        label: A coordinate on `sample` by name, or one value per sample; (sample, y, x) with `pool="patches"`.
            Missing values (NaN, None, the empty string) are left out and counted in `n_dropped`.
        estimator: Fitted in place of the linear probe: any with scikit-learn's `fit(x, y)` and `predict(x)`, where y are
            class numbers or quantities.  It is cloned for every fit and scales the features itself.  Or a function that
            makes it of the `Problem` and the number of its test folds.
        choices: One parameter of `estimator` with the values to choose from, smoothest first: ``{"svc__C": (0.1, 1, 10)}``.
        task: "classification" or "regression"; "auto" takes regression for numbers that are not all whole or have more
            than `diffprobe.probes.task.MOST_CLASSES` distinct values.
        penalties: Strengths of the squared norm on standardised features: alpha of ridge, 1/C of logistic regression.
        pool: "mean" over y and x, "flatten" to channel * y * x columns, or "patches": every place is a row.
        split: In place of the drawn split a coordinate's name, or "train", "validation" or "test" per sample (or another
            word of `diffprobe.data.labels.PARTS`, such as val); other samples are left out.
        control: Whether to fit the control task.
        types: One id per sample for the control task, or a coordinate's name.
        groups: One id per sample, or a coordinate's name; a group is never split (twin scenes, views of one object).
        seed: Seed of split, control labels and bootstrap.
        cross_fit: Every fold is the test fold once, so every row is scored once by a probe that never saw it: five
            times the work, five times the test rows.  `penalty` is then the median of the five.
        keep_rows: Adds the column `rows`, each test row's own score in the order of the samples (1 or 0; minus the
            squared error for regression).  Combinations of one label share their test rows: these are paired.
        keep_estimators: Whether the result keeps the fitted estimators.
        n_jobs: Processes, one BLAS thread each; by default one per core when there are several probes to fit.
        max_iter: Iterations granted to lbfgs.  `converged` says whether they sufficed for every fit of the row.
        device: Fit on this torch device ("cuda") through scikit-learn's array API; `SCIPY_ARRAY_API=1` must be set
            before Python starts.  NumPy on the CPU by default.

    Returns:
        The probes.  Their `table` has one row per combination: its coordinates, then label, score ("accuracy" or "r2"),
        value, low, high, balanced_accuracy, miou with miou_low, miou_high and miou_chance (patches only, over images),
        chance (the training majority's accuracy on test; 0 for r2), chance_uniform, control_value and
        control_train_value (in the unit of `score`), selectivity (value minus control), penalty (or the parameter of
        `choices`), converged, iterations (of the refit), the row counts n_train, n_validation, n_test and n_dropped,
        n_classes, n_features, seed.

    Raises:
        ValueError: the label is unknown or has fewer than two values, there are too few samples, features are not
            finite, or the split leaves nothing to choose on.

    >>> rng = np.random.default_rng(0)
    >>> colour = np.array(["red", "blue"] * 40)
    >>> values = rng.normal(size=(80, 3, 8)) + np.array([0, 1, 9])[:, None] * (colour == "red")[:, None, None]
    >>> features = xr.DataArray(values, dims=("sample", "timestep", "channel"), coords={"timestep": [500, 50, 10]})
    >>> probes = fit_probe(features, colour, n_jobs=1)
    >>> probes.table[["timestep", "value", "chance"]].query("timestep == 10").to_dict("records")
    [{'timestep': 10, 'value': 1.0, 'chance': 0.5}]
    >>> probes.direction("red", timestep=10).shape, probes.predict(features).sel(timestep=10).values[:2].tolist()
    ((8,), ['red', 'blue'])
    """
    given = as_features(features)
    pooled = pool_features(given, pool)
    problem = Problem.of(given, label, task=task, pool=pool, types=types, groups=groups, split=split, seed=seed)
    if estimator is not None and not hasattr(estimator, "fit"):
        estimator = estimator(problem, FOLDS if cross_fit else 1)
    if estimator is None:
        if choices is not None:
            raise ValueError("`choices` are those of an `estimator`; the linear probe's are `penalties`.")
        estimator = LinearProbe(problem.task, max_iter=max_iter, device=device)
        choices = {"penalty": tuple(sorted(penalties, reverse=True))}
    if choices is not None and len(choices) != 1:
        raise ValueError(f"`choices` names one parameter of the estimator; got {', '.join(choices) or 'none'}.")
    parameter, values = next(iter(choices.items())) if choices else (None, ())
    if choices and not len(values):
        raise ValueError(f"There is no value of {parameter!r} to choose from; give at least one.")
    settings = Settings(parameter, tuple(values), control, seed, n_resamples, cross_fit, keep_rows)
    check_split(problem, settings, split)
    return run_probes(pooled, problem, settings, estimator, pool=pool, n_jobs=n_jobs, keep_estimators=keep_estimators)


@dataclass(frozen=True)
class LinearReadout:
    """A linear probe in the features' own units.

    Attributes:
        weights: (output, column); one output for a quantity and for two classes (of which it favours the second).
        intercept: (output,).
        codes: (class,) class numbers of the outputs; None for a quantity.
    """

    weights: Floats
    intercept: Floats
    codes: NDArray[np.int64] | None

    def scores(self, x: ArrayLike) -> Floats:
        """The outputs (row, output) for rows (row, column)."""
        return np.asarray(np.asarray(x, np.float64) @ self.weights.T + self.intercept)

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """Class numbers or quantities, (row,)."""
        scores = self.scores(x)
        if self.codes is None:
            return scores[:, 0]
        return self.codes[(scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(axis=1)]


class LinearProbe(BaseEstimator):
    """A scaler and a linear model; `n_iter_` counts the iterations of the last fit (0 for ridge's closed form).

    The logistic loss is minimised by scikit-learn's lbfgs, in the basis of the rows' principal axes: with a squared
    norm as penalty a rotation changes no answer.  In that basis the curvature is nearly diagonal, which gives a start
    close to the minimum (`_near_minimum`); from the origin the same fit takes up to ten times as long.  Fits on the same
    array `x` one after the other share scaler and axes, and start from one another.
    """

    def __init__(self, task: Task, penalty: float = 1.0, max_iter: int = 20_000, device: str | None = None) -> None:
        self.task, self.penalty, self.max_iter, self.device = task, penalty, max_iter, device

    def fit(self, x: Floats, y: NDArray[Any]) -> LinearProbe:
        """Fits on rows (row, column) and their class numbers or quantities (row,)."""
        if not hasattr(self, "model_"):
            logistic = LogisticRegression(solver="lbfgs", tol=TOLERANCE, max_iter=self.max_iter, warm_start=self.device is None)
            self.model_: Any = Ridge() if self.task == "regression" else logistic
            self._x: Any = None
        if x is not self._x:
            self._x, self.scaler_ = x, StandardScaler()
            with self._dispatch():
                scaled = self.scaler_.fit_transform(self._array(x))
            plain = self.task == "regression" or self.device is not None
            self._axes = None if plain else _principal_axes(scaled)
            self._inputs = scaled if self._axes is None else scaled @ self._axes[0]
        if self.task == "regression":
            with self._dispatch():
                self.model_.set_params(alpha=self.penalty).fit(self._inputs, self._array(y))
            self.n_iter_ = 0
            return self
        steps = 0 if self._axes is None else self._start(y, self._axes[1])
        with self._dispatch():
            self.model_.set_params(C=1 / self.penalty).fit(self._inputs, y)
        self.n_iter_ = steps + int(self.model_.n_iter_.max())
        return self

    def predict(self, x: Floats) -> NDArray[Any]:
        """Class numbers or quantities, (row,)."""
        with self._dispatch():
            scaled = self.scaler_.transform(self._array(x))
            answer = self.model_.predict(scaled if self._axes is None else scaled @ self._axes[0])
        return _on_cpu(answer)

    def readout(self) -> LinearReadout:
        """The fitted map from features that are not standardised."""
        weights = np.atleast_2d(_on_cpu(self.model_.coef_))
        weights = (weights if self._axes is None else weights @ self._axes[0].T) / _on_cpu(self.scaler_.scale_)
        intercept = np.atleast_1d(_on_cpu(self.model_.intercept_)) - weights @ _on_cpu(self.scaler_.mean_)
        return LinearReadout(weights, intercept, None if self.task == "regression" else _on_cpu(self.model_.classes_))

    def _start(self, y: NDArray[Any], variance: Floats) -> int:
        """Puts scikit-learn's warm start near the minimum; returns the steps that it took."""
        classes, codes = np.unique(y, return_inverse=True)
        shape = (len(classes) if len(classes) > 2 else 1, self._inputs.shape[1])
        model = self.model_
        if getattr(model, "coef_", np.zeros(0)).shape != shape:
            model.coef_, model.intercept_ = np.zeros(shape), np.zeros(shape[0])
        shown, start = np.eye(len(classes))[codes], (model.coef_, model.intercept_)
        found = _near_minimum(self._inputs, variance, shown, self.penalty, *start, self.max_iter)
        model.coef_, model.intercept_, steps = found
        return steps

    def _array(self, values: NDArray[Any]) -> Any:
        # by name, because probes must load where torch is not installed
        return values if self.device is None else importlib.import_module("torch").asarray(values, device=self.device)

    def _dispatch(self) -> Any:
        if self.device is not None and os.environ.get("SCIPY_ARRAY_API") != "1":
            raise ValueError(f"Probes on {self.device!r} need scipy's array API: set SCIPY_ARRAY_API=1 before Python starts.")
        return sklearn.config_context(array_api_dispatch=self.device is not None)


def _on_cpu(values: Any) -> NDArray[Any]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def _principal_axes(scaled: Floats) -> tuple[Floats, Floats]:
    """An orthonormal basis (column, axis) of the rows' span and the variance along each axis.

    >>> basis, variance = _principal_axes(np.random.default_rng(0).normal(size=(5, 8)))
    >>> basis.shape, bool(np.allclose(basis.T @ basis, np.eye(5)))
    ((8, 5), True)
    """
    rows, columns = scaled.shape
    if columns <= rows:
        values, vectors = np.linalg.eigh(scaled.T @ scaled)
        return vectors, np.maximum(values, 0) / rows
    # More columns than rows: the penalised solution lies in the span of the rows, so that many axes suffice.
    values, left = np.linalg.eigh(scaled @ scaled.T)
    kept = values > 1e-12 * values[-1]
    return scaled.T @ (left[:, kept] / np.sqrt(values[kept])), values[kept] / rows


def _near_minimum(
    inputs: Floats, variance: Floats, shown: Floats, penalty: float, weights: Floats, intercept: Floats, max_iter: int
) -> tuple[Floats, Floats, int]:
    """The logistic loss minimised in coordinates scaled by its approximate curvature, from the weights given.

    Args:
        inputs: (row, axis), along principal axes.
        variance: (axis,) of the inputs.
        shown: (row, class) one-hot labels.
        weights, intercept: (output, axis) and (output,); one output for two classes, as in scikit-learn.
    """
    rows, (outputs, axes) = len(inputs), weights.shape
    pad = np.zeros((rows, 1 if outputs == 1 else 0))

    def log_chances(logits: Floats) -> Floats:
        return np.asarray(log_softmax(np.concatenate([pad, logits], axis=1), axis=1))

    chances = np.exp(log_chances(inputs @ weights.T + intercept))
    curvature = max(float((chances * (1 - chances)).mean()), 1e-6)
    strength = penalty / rows
    unit = np.append(1 / np.sqrt(curvature * variance + strength), 1 / np.sqrt(curvature))
    scaled = inputs * unit[:axes]
    decay = np.append(strength * unit[:axes] ** 2, 0.0)  # the intercept is free

    def loss(flat: Floats) -> tuple[float, Floats]:
        point = flat.reshape(outputs, axes + 1)
        logs = log_chances(scaled @ point[:, :axes].T + point[:, axes] * unit[axes])
        errors = ((np.exp(logs) - shown) / rows)[:, -outputs:]
        decayed = decay * point
        slope = np.concatenate([errors.T @ scaled, errors.sum(axis=0)[:, None] * unit[axes]], axis=1) + decayed
        return float(-(logs * shown).sum() / rows + 0.5 * (decayed * point).sum()), slope.ravel()

    start = (np.concatenate([weights, intercept[:, None]], axis=1) / unit).ravel()
    options = {"gtol": TOLERANCE, "ftol": 0.0, "maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 20}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    point = found.x.reshape(outputs, axes + 1) * unit
    return np.ascontiguousarray(point[:, :axes]), point[:, axes].copy(), int(found.nit)
