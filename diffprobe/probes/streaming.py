"""Ridge probes of features that need not fit into memory: second moments in one pass over blocks of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from diffprobe.probes import task as protocol
from diffprobe.probes.fitting import ProbeResult
from diffprobe.probes.linear import LinearReadout
from diffprobe.probes.scoring import Turn, make_row, score


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
        self._factors: tuple[protocol.Floats, protocol.Floats, protocol.Floats, protocol.Floats] | None = None

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

    def solve(self, penalty: float) -> tuple[protocol.Floats, protocol.Floats]:
        """Weights (column, target) on the raw features and intercepts (target,) for one penalty."""
        if penalty <= 0:
            raise ValueError(f"The penalty must be positive; got {penalty}.")
        values, vectors, projected, scale = self._decompose()
        weights = vectors @ (projected / (values + penalty)[:, None]) / scale[:, None]
        mean = self._shift + self._moments[0, 1:] / self.n
        return weights, mean[self.n_features :] - mean[: self.n_features] @ weights

    def r2(self, penalty: float, held_out: GramRidge) -> protocol.Floats:
        """R2 (target,) of this accumulator's solution on the rows that another one saw."""
        p, moments = self.n_features, held_out._moments
        total = np.diag(moments)[p + 1 :] - moments[0, p + 1 :] ** 2 / held_out.n
        return 1 - self.squared_error(penalty, held_out) / total

    def squared_error(self, penalty: float, held_out: GramRidge) -> protocol.Floats:
        """Sum of squared errors (target,) of this accumulator's solution on the rows that another one saw."""
        weights, intercept = self.solve(penalty)
        p, moments, shift = self.n_features, held_out._moments, held_out._shift
        offset = shift[p:] - shift[:p] @ weights - intercept
        residual = np.concatenate([offset[None], -weights, np.eye(len(offset))])  # applied to the rows (1, x, y)
        return np.asarray(np.einsum("ij,ik,kj->j", residual, moments, residual, optimize=True))

    def _decompose(self) -> tuple[protocol.Floats, protocol.Floats, protocol.Floats, protocol.Floats]:
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
    features: xr.DataArray | ArrayLike,
    label: protocol.Ids,
    *,
    task: protocol.Task | Literal["auto"] = "auto",
    penalties: Sequence[float] = (1.0, 10.0, 100.0, 1000.0, 10_000.0),
    pool: protocol.Pool = "mean",
    split: protocol.Ids | None = None,
    control: bool = True,
    types: protocol.Ids | None = None,
    groups: protocol.Ids | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    block: int = 64,
) -> ProbeResult:
    """Ridge probes of features that need not fit into memory: two passes, `block` samples at a time.

    The first pass gathers second moments (`GramRidge`), which settle penalty and weights; the second one predicts.
    Classes are read by ridge regression on their indicators, the largest answer wins.  Split, control, intervals and
    columns are those of `fit_probe`; rows whose control label is missing are left out of both tasks.

    Args:
        features: As for `fit_probe`, lazy: `features(open_store(path), site)` reads only the blocks.
        penalties: alpha on standardised features; the one with the smallest squared error on validation is taken.
        block: Samples in memory at a time.
        task, pool, split, control, types, groups, seed, n_resamples, label: As for `fit_probe`.

    >>> colour = np.array(["red", "blue"] * 40)
    >>> values = np.random.default_rng(0).normal(size=(80, 8)) + 9 * (colour == "red")[:, None]
    >>> stream_probe(values, colour, block=32).table["value"].tolist()
    [1.0]
    """
    given = protocol.as_features(features)
    protocol.pool_features(given.isel(sample=slice(0, 1)), pool)  # refuses a pooling that does not fit
    problem = protocol.Problem.of(given, label, task=task, pool=pool, types=types, groups=groups, split=split, seed=seed)
    settings = protocol.Settings("penalty", tuple(sorted(penalties, reverse=True)), control, seed, n_resamples)
    protocol.check_split(problem, settings, split)
    with threadpool_limits(limits=1):
        done = [_stream_place(part, problem, settings, pool, block, place) for place, part in protocol.combinations(given)]
    places = tuple({str(d): row[str(d)] for d in protocol.outer_dimensions(given)} for row, _ in done)
    return ProbeResult(pd.DataFrame([row for row, _ in done]), tuple(fit for _, fit in done), places, problem.classes, pool)


def _stream_place(
    part: xr.DataArray,
    problem: protocol.Problem,
    settings: protocol.Settings,
    pool: protocol.Pool,
    block: int,
    place: dict[str, Any],
) -> tuple[dict[str, Any], LinearReadout]:
    """The table's row of one combination, and its probe."""
    per_sample = len(problem.target) // part.sizes["sample"]
    classes = len(problem.classes)

    def blocks() -> Iterator[tuple[slice, NDArray[np.float32]]]:
        for first in range(0, part.sizes["sample"], block):
            x = protocol.matrix(protocol.pool_features(part.isel(sample=slice(first, first + block)), pool))
            yield slice(first * per_sample, first * per_sample + len(x)), x

    def targets(rows: slice) -> protocol.Floats:
        kinds = [problem.target[rows], problem.control[rows]]
        return np.concatenate([np.eye(classes)[k] if classes else k[:, None] for k in kinds], axis=1)

    usable = problem.control_keep if settings.control else np.ones_like(problem.keep)
    train, validation, test = (p & usable for p in problem.parts())
    fitted, held_out = GramRidge(), GramRidge()
    for rows, x in blocks():
        protocol.check_rows(x[problem.keep[rows]], place)
        for gram, mask in ((fitted, train[rows]), (held_out, validation[rows])):
            if mask.any():
                gram.update(x[mask], targets(rows)[mask])
    width = classes or 1
    penalty = settings.choices[0]
    if held_out.n:
        errors = [fitted.squared_error(p, held_out)[:width].sum() for p in settings.choices]
        penalty = settings.choices[int(np.argmin(errors))]
        fitted.merge(held_out)
    weights, intercept = fitted.solve(penalty)
    answers = np.concatenate([_answers(x @ weights + intercept, width) for _, x in blocks()])  # (row, task)
    control = (np.nan, np.nan)
    if settings.control:
        held, seen = (score(problem.task, problem.control[m], answers[m, 1]) for m in (test, train | validation))
        control = (held, seen)
    # one output would be a threshold at 0, so two classes keep both of theirs
    readout = LinearReadout(weights[:, :width].T, intercept[:width], np.arange(classes) if classes else None)
    turn = Turn((train, validation, test), answers[test, 0], penalty, control, True, 0)
    return make_row(problem, settings, [turn], place, len(weights)), readout


def _answers(predicted: protocol.Floats, width: int) -> NDArray[Any]:
    """(row, task): for each task the quantity, or the class whose indicator is predicted largest."""
    both = predicted.reshape(len(predicted), 2, width)
    return both[..., 0] if width == 1 else both.argmax(axis=-1)
