"""Linear probes: how much of a label can be read off a feature by one linear map.

scikit-learn does the fitting: logistic regression for classes, ridge for quantities.  Ridge alone, from second moments
gathered in one pass, serves stores larger than memory.  What a probe sees and how it is scored stands in
`diffprobe.probes.task`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import sklearn
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from diffprobe.probes.task import (
    SPACE,
    Floats,
    Pool,
    Problem,
    Rows,
    Settings,
    Task,
    Turn,
    best_choice,
    check_features,
    check_finite,
    combinations,
    make_row,
    matrix,
    pool_features,
    probe_table,
    run_probes,
    score,
    split_folds,
)

__all__ = [
    "SPACE",
    "GramRidge",
    "LinearModel",
    "Pool",
    "fit_probe",
    "pool_features",
    "probe_table",
    "split_folds",
    "stream_probe",
]

TOLERANCE = 1e-6  # scikit-learn's default of 1e-4 stops early enough to fake a best timestep


def fit_probe(
    features: xr.DataArray,
    label: str | ArrayLike | xr.DataArray,
    *,
    task: Task | Literal["auto"] = "auto",
    penalties: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0),
    pool: Pool = "mean",
    control: bool = True,
    types: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    cross_fit: bool = False,
    keep_rows: bool = False,
    n_jobs: int | None = None,
    n_resamples: int = 2000,
    max_iter: int = 20_000,
    device: str | None = None,
) -> pd.DataFrame:
    """Fits one linear probe per combination of the dimensions other than sample, channel, y and x.

    Split by `seed` into 60% train, 20% validation and 20% test, stratified by the label (by its rank for ridge);
    samples of one group, and rows that repeat a sample id, stay together.  Features are standardised with the
    moments of the rows that the weights are fitted on.  The penalty is the one that scores best on the validation
    rows (the strongest of equals; weaker ones are tried until two in a row score below the best); the probe is then
    refitted on train and validation and scored once on test.

    The control task (Hewitt & Liang 2019) keeps features, split and penalty, and replaces the labels:

    * with `types` (one id per sample: the word, object or scene that the sample shows), every type gets one random
      label, drawn from the labels' own frequencies and kept wherever the type appears.  This is the control of the
      paper: a probe can only score by memorising types, so `control_accuracy` measures its capacity to do so and
      `selectivity` what the features hold beyond it.  Repeated sample ids are types of their own.
    * without `types`, the labels are permuted once over the samples (whole label maps for patches).  Whole images
      do not recur: each is a type of its own, no test image was ever memorised, and the score sits at chance unless
      split, prior or position leak.  It is a check of the protocol and not of capacity; how much the probe can
      memorise then shows in `control_train_accuracy`.

    Intervals are bootstrapped over test rows, as clusters when `groups` are given or a sample has several rows
    (see `diffprobe.stats`); when all or none of the test rows are right, Wilson's interval over clusters is given.

    Args:
        features: (sample, ..., channel) or (sample, ..., channel, y, x).
        label: A coordinate on `sample` by name, or one value per sample; (sample, y, x) with `pool="patches"`.
            Missing values (NaN, None, the empty string) are left out and counted in `n_dropped`.
        task: "logistic" for classes, "ridge" for quantities; "auto" takes ridge for numbers that are not all whole
            or have more than `MOST_CLASSES` distinct values.
        penalties: Strengths of the squared norm on standardised features: alpha for ridge, 1/C for logistic.
        pool: "mean" over y and x, "flatten" to channel * y * x columns, or "patches": every position is a row.
        control: Whether to fit the control task.
        types: One id per sample for the control task.
        groups: One id per sample; a group is never split (twin scenes, views of one object).
        seed: Of split, control labels and bootstrap.
        cross_fit: Every fold is the test fold once, so every row is scored once by a probe that never saw it: five
            times the work, five times the test rows.  `penalty` is then the median of the five.
        keep_rows: Adds the column `rows`, each test row's own score in the order of the samples (1 or 0; minus the
            squared error for ridge).  Combinations of one label share their test rows: these are paired.
        n_jobs: Processes; by default one per core when there are several probes to fit.  Each uses one BLAS thread.
        n_resamples: Bootstrap resamples.
        max_iter: Iterations granted to lbfgs.  `converged` says whether they sufficed for every fit of the row.
        device: Fit on this torch device ("cuda") through scikit-learn's array API; `SCIPY_ARRAY_API=1` must be set
            before Python starts.  NumPy on the CPU by default.

    Returns:
        One row per combination: its coordinates, then label, score ("accuracy" or "r2"), value, low, high,
        balanced_accuracy, miou with miou_low, miou_high and miou_chance (patches only, over images), chance (the training majority's accuracy on test; 0 for r2),
        chance_uniform, control_accuracy and control_train_accuracy (in the unit of `score`), selectivity (value
        minus control), penalty, converged, iterations (of the refit), the row counts n_train, n_validation, n_test
        and n_dropped, n_classes, n_features, seed.

    Raises:
        ValueError: For an unknown label, fewer than two classes, too few samples, or non-finite features.

    >>> rng = np.random.default_rng(0)
    >>> colour = np.array(["red", "blue"] * 40)
    >>> values = rng.normal(size=(80, 3, 8)) + np.array([0, 1, 9])[:, None] * (colour == "red")[:, None, None]
    >>> features = xr.DataArray(values, dims=("sample", "timestep", "channel"), coords={"timestep": [500, 50, 10]})
    >>> fit_probe(features, colour, n_jobs=1)[["timestep", "value", "chance"]].query("timestep == 10").to_dict("records")
    [{'timestep': 10, 'value': 1.0, 'chance': 0.5}]
    """
    check_features(features)
    pooled = pool_features(features, pool)
    problem = Problem.of(pooled, label, task, types, groups, seed)
    settings = Settings("penalty", tuple(sorted(penalties, reverse=True)), control, seed, n_resamples, cross_fit, keep_rows)
    return run_probes(pooled, problem, settings, partial(LinearModel, problem.task, max_iter, device), n_jobs)


class LinearModel:
    """A scaler and a linear model; `converged` covers every fit that it made.

    The logistic loss is minimised by scikit-learn's lbfgs, in the basis of the rows' principal axes: with a squared
    norm as penalty a rotation changes no answer.  In that basis the curvature is nearly diagonal, which gives a start
    close to the minimum (`_near_minimum`); from the origin the same fit takes up to ten times as long.
    """

    def __init__(self, task: Task, max_iter: int = 20_000, device: str | None = None) -> None:
        self.task, self.max_iter, self.device = task, max_iter, device
        self.converged = True
        self.scaler = StandardScaler()
        self.model: Any = (
            Ridge()
            if task == "ridge"
            else LogisticRegression(solver="lbfgs", tol=TOLERANCE, max_iter=max_iter, warm_start=device is None)
        )
        self._rows: Rows | None = None  # that `_inputs` holds: the control task is fitted on the same ones
        self._inputs: Any = None
        self._axes: tuple[Floats, Floats] | None = None

    def choose(self, x: Floats, y: NDArray[Any], train: Rows, validation: Rows, choices: Sequence[float]) -> float:
        """The penalty that scores best on validation, the first (strongest) of equals."""
        if len(choices) == 1:
            return choices[0]

        def scores() -> Iterator[tuple[float, float]]:
            for penalty in choices:
                self.fit(x, y, train, penalty)
                yield penalty, score(self.task, y[validation], self.predict(x[validation]))

        return best_choice(scores())

    def fit(self, x: Floats, y: NDArray[Any], rows: Rows, choice: float) -> int:
        """Fits with one penalty and returns the iterations that it took (0 for ridge's closed form)."""
        if self._rows is None or not np.array_equal(rows, self._rows):
            self._rows = rows
            with self._dispatch():
                scaled = self.scaler.fit_transform(self._array(x[rows]))
            plain = self.task == "ridge" or self.device is not None
            self._axes = None if plain else _principal_axes(scaled)
            self._inputs = scaled if self._axes is None else scaled @ self._axes[0]
        if self.task == "ridge":
            with self._dispatch():
                self.model.set_params(alpha=choice).fit(self._inputs, self._array(y[rows]))
            return 0
        steps = 0 if self._axes is None else self._start(y[rows], choice, self._axes[1])
        with warnings.catch_warnings(record=True) as caught, self._dispatch():
            warnings.simplefilter("always", ConvergenceWarning)
            self.model.set_params(C=1 / choice).fit(self._inputs, y[rows])
        self.converged &= not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        return steps + int(self.model.n_iter_.max())

    def predict(self, x: Floats) -> NDArray[Any]:
        """Class codes or quantities, (row,)."""
        with self._dispatch():
            scaled = self.scaler.transform(self._array(x))
            answer = self.model.predict(scaled if self._axes is None else scaled @ self._axes[0])
        return np.asarray(answer.cpu() if hasattr(answer, "cpu") else answer)

    def _start(self, y: NDArray[Any], penalty: float, variance: Floats) -> int:
        """Puts scikit-learn's warm start near the minimum; the steps that it took."""
        classes, codes = np.unique(y, return_inverse=True)
        shape = (len(classes) if len(classes) > 2 else 1, self._inputs.shape[1])
        if getattr(self.model, "coef_", np.zeros(0)).shape != shape:
            self.model.coef_, self.model.intercept_ = np.zeros(shape), np.zeros(shape[0])
        found = _near_minimum(
            self._inputs,
            variance,
            np.eye(len(classes))[codes],
            penalty,
            self.model.coef_,
            self.model.intercept_,
            self.max_iter,
        )
        self.model.coef_, self.model.intercept_, steps = found
        return steps

    def _array(self, values: NDArray[Any]) -> Any:
        # By name, for probes must load where torch is not installed.
        return values if self.device is None else importlib.import_module("torch").asarray(values, device=self.device)

    def _dispatch(self) -> Any:
        if self.device is not None and os.environ.get("SCIPY_ARRAY_API") != "1":
            raise ValueError(f"Probes on {self.device!r} need scipy's array API: set SCIPY_ARRAY_API=1 before Python starts.")
        return sklearn.config_context(array_api_dispatch=self.device is not None)


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


# --- ridge in one pass -------------------------------------------------------------------------------


class GramRidge:
    """Ridge regression from one pass over data of any length, for every penalty and target at once.

    Blocks of rows are folded into the second moments of (1, X, Y) in float64; after that a penalty costs one small
    matrix product, and two accumulators (train, held out) give R2 without a second look at the rows.  Equals
    scikit-learn's `Ridge` behind a `StandardScaler`.  Moments are taken about the first block's mean, so features
    far from zero lose no digits.

    >>> rng = np.random.default_rng(0)
    >>> train, held_out = GramRidge(), GramRidge()
    >>> for gram in (train, train, held_out):
    ...     x = rng.normal(size=(500, 3))
    ...     gram.update(x, x @ [1.0, -2.0, 0.0] + 5)
    >>> weights, intercept = train.solve(penalty=0.1)
    >>> weights.round(2)[:, 0].tolist(), intercept.round(2).tolist()
    ([1.0, -2.0, 0.0], [5.0])
    >>> train.r2(0.1, held_out).round(4).tolist()
    [1.0]
    """

    def __init__(self, standardise: bool = True) -> None:
        self.standardise = standardise
        self.n_features = 0
        self._shift = np.zeros(0)
        self._moments = np.zeros((0, 0))
        self._factors: tuple[Floats, Floats, Floats, Floats] | None = None

    @property
    def n(self) -> int:
        """Rows seen so far."""
        return int(self._moments[0, 0]) if self._moments.size else 0

    def update(self, features: ArrayLike, targets: ArrayLike) -> None:
        """Adds a block: features (row, column), targets (row,) or (row, target)."""
        x = np.asarray(features, dtype=np.float64)
        y = np.asarray(targets, dtype=np.float64)
        block = np.concatenate([x, y.reshape(len(x), -1)], axis=1)
        if not np.isfinite(block).all():
            raise ValueError("A block holds non-finite numbers; once added they could not be taken out again.")
        if not self._moments.size:
            self.n_features = x.shape[1]
            self._shift = block.mean(axis=0)
            self._moments = np.zeros((block.shape[1] + 1,) * 2)
        if x.shape[1] != self.n_features or block.shape[1] != self._shift.size:
            want, got = (self.n_features, self._shift.size - self.n_features), (x.shape[1], block.shape[1] - x.shape[1])
            raise ValueError(f"Earlier blocks had (features, targets) = {want}; this one has {got}.")
        rows = np.concatenate([np.ones((len(x), 1)), block - self._shift], axis=1)
        self._moments += rows.T @ rows
        self._factors = None

    def merge(self, other: GramRidge) -> None:
        """Adds the rows that another accumulator saw.

        >>> left, right = GramRidge(), GramRidge()
        >>> left.update([[0.0], [1.0]], [0.0, 1.0]), right.update([[2.0], [3.0]], [2.0, 3.0])
        (None, None)
        >>> left.merge(right)
        >>> left.n, left.solve(1e-9)[0].round(6).item()
        (4, 1.0)
        """
        if other._shift.shape != self._shift.shape or other.n_features != self.n_features:
            raise ValueError(
                f"Cannot merge {other.n_features} features with {self.n_features}; both must have seen rows of one kind."
            )
        move = np.eye(len(self._moments))
        move[1:, 0] = other._shift - self._shift
        self._moments += move @ other._moments @ move.T
        self._factors = None

    def solve(self, penalty: float) -> tuple[Floats, Floats]:
        """Weights (column, target) on the raw features and intercepts (target,) for one penalty."""
        if penalty <= 0:
            raise ValueError(f"The penalty must be positive; got {penalty}.")
        values, vectors, projected, scale = self._decompose()
        weights = vectors @ (projected / (values + penalty)[:, None]) / scale[:, None]
        mean = self._shift + self._moments[0, 1:] / self.n
        return weights, mean[self.n_features :] - mean[: self.n_features] @ weights

    def r2(self, penalty: float, held_out: GramRidge) -> Floats:
        """R2 (target,) of this accumulator's solution on the rows that another one saw."""
        p, moments = self.n_features, held_out._moments
        total = np.diag(moments)[p + 1 :] - moments[0, p + 1 :] ** 2 / held_out.n
        return 1 - self.squared_error(penalty, held_out) / total

    def squared_error(self, penalty: float, held_out: GramRidge) -> Floats:
        """Sum of squared errors (target,) of this accumulator's solution on the rows that another one saw."""
        weights, intercept = self.solve(penalty)
        p, moments, shift = self.n_features, held_out._moments, held_out._shift
        offset = shift[p:] - shift[:p] @ weights - intercept
        residual = np.concatenate([offset[None], -weights, np.eye(len(offset))])  # applied to the rows (1, x, y)
        return np.asarray(np.einsum("ij,ik,kj->j", residual, moments, residual, optimize=True))

    def _decompose(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Eigenvalues, eigenvectors, projected X'Y and the columns' scales of the centred moments."""
        if self._factors is None:
            if self.n < 2:
                raise ValueError(f"Ridge needs at least 2 rows; {self.n} were added.")
            sums = self._moments[0, 1:]
            centred = self._moments[1:, 1:] - np.outer(sums, sums) / self.n
            p = self.n_features
            variance = np.diag(centred)[:p] / self.n
            constant = variance <= 1e-14 * np.diag(self._moments)[1 : p + 1] / self.n
            scale = np.where(constant | (not self.standardise), 1.0, np.sqrt(np.abs(variance)))
            values, vectors = np.linalg.eigh(centred[:p, :p] / np.outer(scale, scale))
            self._factors = np.maximum(values, 0), vectors, vectors.T @ (centred[:p, p:] / scale[:, None]), scale
        return self._factors


def stream_probe(
    features: xr.DataArray,
    label: str | ArrayLike | xr.DataArray,
    *,
    task: Task | Literal["auto"] = "auto",
    penalties: Sequence[float] = (1.0, 10.0, 100.0, 1000.0, 10_000.0),
    pool: Pool = "mean",
    control: bool = True,
    types: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    block: int = 64,
) -> pd.DataFrame:
    """Ridge probes of features that need not fit into memory: two passes, `block` samples at a time.

    The first pass gathers second moments (`GramRidge`), which settle penalty and weights; the second one answers.
    Classes are read by ridge regression on their indicators, the largest answer wins.  Split, control, intervals and
    columns are those of `fit_probe`; rows whose control label is missing are left out of both tasks.

    Args:
        features: As for `fit_probe`, lazy: `features(open_store(path), site)` reads only the blocks.
        penalties: alpha on standardised features; the one with the smallest squared error on validation is taken.
        block: Samples in memory at a time.
        task, pool, control, types, groups, seed, n_resamples, label: As for `fit_probe`.

    >>> colour = np.array(["red", "blue"] * 40)
    >>> values = np.random.default_rng(0).normal(size=(80, 8)) + 9 * (colour == "red")[:, None]
    >>> stream_probe(xr.DataArray(values, dims=("sample", "channel")), colour, block=32)["value"].tolist()
    [1.0]
    """
    check_features(features)
    places = [d for d in SPACE if d in features.dims]
    outline = features if pool == "patches" else features.isel(dict.fromkeys(places, 0), drop=True)
    pool_features(features.isel(sample=slice(0, 1)), pool)  # refuses a pooling that does not fit
    problem = Problem.of(outline, label, task, types, groups, seed)
    settings = Settings("penalty", tuple(sorted(penalties, reverse=True)), control, seed, n_resamples)
    outer = [d for d in outline.dims if d not in ("sample", "channel", *SPACE)]
    with threadpool_limits(limits=1):
        rows = [_stream_one(part, problem, settings, pool, block, place) for place, part in combinations(features, outer)]
    return pd.DataFrame(rows)


def _stream_one(
    part: xr.DataArray, problem: Problem, settings: Settings, pool: Pool, block: int, place: dict[str, Any]
) -> dict[str, Any]:
    per_sample = len(problem.target) // part.sizes["sample"]
    classes = len(problem.classes)

    def blocks() -> Iterator[tuple[slice, NDArray[np.float32]]]:
        for first in range(0, part.sizes["sample"], block):
            x = matrix(pool_features(part.isel(sample=slice(first, first + block)), pool))
            yield slice(first * per_sample, first * per_sample + len(x)), x

    def targets(rows: slice) -> Floats:
        kinds = [problem.target[rows], problem.control[rows]]
        return np.concatenate([np.eye(classes)[k] if classes else k[:, None] for k in kinds], axis=1)

    usable = problem.control_keep if settings.control else np.ones_like(problem.keep)
    train, validation, test = parts = tuple(p & usable for p in problem.parts())
    grams = {True: GramRidge(), False: GramRidge()}
    for rows, x in blocks():
        known = problem.keep[rows]
        check_finite(x[known], place)
        for is_train, mask in ((True, train[rows]), (False, validation[rows])):
            if mask.any():
                grams[is_train].update(x[mask], targets(rows)[mask])
    width = classes or 1
    errors = [grams[True].squared_error(p, grams[False])[:width].sum() for p in settings.choices]
    penalty = settings.choices[int(np.argmin(errors))]
    grams[True].merge(grams[False])
    weights, intercept = grams[True].solve(penalty)
    answers = np.concatenate([_answers(x @ weights + intercept, width) for _, x in blocks()])  # (row, task)
    held = [score(problem.task, problem.control[m], answers[m, 1]) for m in (test, train | validation)]
    controls = (held[0], held[1]) if settings.control else (np.nan, np.nan)
    turn = Turn((parts[0], parts[1], parts[2]), answers[test, 0], penalty, controls, True, 0)
    return make_row(problem, settings, [turn], place, len(weights))


def _answers(predicted: Floats, width: int) -> NDArray[Any]:
    """Of each task the quantity, or the class whose indicator is predicted largest: (row, 2)."""
    both = predicted.reshape(len(predicted), 2, width)
    return both[..., 0] if width == 1 else both.argmax(axis=-1)
