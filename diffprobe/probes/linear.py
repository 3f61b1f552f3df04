"""Linear probes: how much of a label can be read off a feature by one linear map.

Features are (sample, ..., channel, y, x); one probe is fitted for every combination of the dimensions in between
(timestep, conditioning, ...).  The invariant: the test rows meet a probe once, after its scaling, its penalty and
its weights were settled on other samples, and all combinations share one split, so their scores are paired.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import joblib
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import confusion_matrix
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from diffprobe.stats import bootstrap_interval, bootstrap_sums, wilson_interval

Task = Literal["logistic", "ridge"]
Pool = Literal["mean", "flatten", "patches"]
Floats = NDArray[np.float64]

TOLERANCE = 1e-6  # scikit-learn's default of 1e-4 stops early enough to fake a best timestep
FOLDS = 5  # one to test, one to validate, three to train
MOST_CLASSES = 20  # whole numbers with more distinct values than this are measured, not classified
SPACE = ("y", "x")


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
    n_jobs: int | None = None,
    n_resamples: int = 2000,
    max_iter: int = 20_000,
) -> pd.DataFrame:
    """Fits one linear probe per combination of the dimensions other than sample, channel, y and x.

    Split by `seed` into 60% train, 20% validation and 20% test, stratified by the label (by its rank for ridge);
    samples of one group, and rows that repeat a sample id, stay together.  Features are standardised with the
    moments of the rows that the weights are fitted on.  The penalty is the one that scores best on the validation
    rows (the strongest of equals); the probe is then refitted on train and validation and scored once on test.

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
        n_jobs: Processes; by default one per core when there are several probes to fit.  Each uses one BLAS thread.
        n_resamples: Bootstrap resamples.
        max_iter: Iterations granted to lbfgs.  `converged` says whether they sufficed for every fit of the row.

    Returns:
        One row per combination: its coordinates, then label, score ("accuracy" or "r2"), value, low, high,
        balanced_accuracy, miou (patches only), chance (the training majority's accuracy on test; 0 for r2),
        chance_uniform, control_accuracy and control_train_accuracy (in the unit of `score`), selectivity (value
        minus control), penalty, converged, iterations (of the refit), the row counts n_train, n_validation, n_test
        and n_dropped, n_classes, n_features, seed.

    Raises:
        ValueError: For an unknown label, fewer than two classes, too few samples, or non-finite features.
    """
    if unknown := {"sample", "channel"} - set(features.dims):
        raise ValueError(
            f"Features need the dimensions sample and channel; {', '.join(sorted(unknown))} is not in {features.dims}."
        )
    pooled = pool_features(features, pool)
    problem = _Problem.of(pooled, label, task, types, groups, seed)
    job = joblib.delayed(_fit_combination)
    settings = _Settings(tuple(sorted(penalties, reverse=True)), control, seed, n_resamples, max_iter)
    outer = [d for d in pooled.dims if d not in ("sample", "channel", *SPACE)]
    count = int(np.prod([pooled.sizes[d] for d in outer]))
    n_jobs = n_jobs if n_jobs is not None else (min(count, joblib.cpu_count()) if count >= 4 else 1)
    jobs = (job(_matrix(block), problem, settings, place) for place, block in _combinations(pooled, outer))
    rows = list(joblib.Parallel(n_jobs=n_jobs, backend="loky" if n_jobs != 1 else "sequential")(jobs))
    return pd.DataFrame(rows)


def probe_table(
    get: Callable[[str], xr.DataArray],
    sites: Sequence[str],
    labels: str | Sequence[str],
    *,
    pool: Pool = "mean",
    **options: Any,
) -> pd.DataFrame:
    """Probes of every label at every site, as one table with the column `site` in front.

    Each site is read and pooled once, whatever the number of labels.

    Args:
        get: Gives the features (sample, ..., channel, y, x) of a site.
        sites: Names that `get` understands.
        labels: Coordinates on `sample`.
        pool: As in `fit_probe`.
        **options: The other options of `fit_probe`.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    frames = []
    for site in sites:
        pooled = get(site)
        if pool == "mean":
            pooled = pool_features(pooled, pool).compute()
        for name in names:
            frame = fit_probe(pooled, name, pool=pool, **options)
            frames.append(frame.assign(site=site)[["site", *frame.columns.drop("site", errors="ignore")]])
    return pd.concat(frames, ignore_index=True)


def pool_features(features: xr.DataArray, pool: Pool = "mean") -> xr.DataArray:
    """Brings features to (..., channel), or (..., channel, y, x) for patches, in float32.

    >>> maps = xr.DataArray(np.ones((2, 3, 4, 4), np.float16), dims=("sample", "channel", "y", "x"))
    >>> pool_features(maps).shape, pool_features(maps, "flatten").shape, pool_features(maps, "patches").shape
    ((2, 3), (2, 48), (2, 3, 4, 4))
    """
    if pool not in ("mean", "flatten", "patches"):
        raise ValueError(f"`pool` is 'mean', 'flatten' or 'patches'; got {pool!r}.")
    space = [d for d in SPACE if d in features.dims]
    wide = features.astype(np.float32)
    if pool == "patches" and len(space) < 2:
        raise ValueError(f"pool='patches' needs the dimensions y and x; these features have {features.dims}.")
    if pool == "mean":
        return wide.mean(space)
    if pool == "flatten" and space:
        wide = wide.drop_vars(["channel", *space], errors="ignore")
        return wide.stack(column=["channel", *space], create_index=False).rename(column="channel")
    return wide


def split_folds(target: ArrayLike, groups: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Deals groups into `FOLDS` folds so that each fold sees the target's whole distribution.

    Groups are ordered by their most frequent (classes) or mean (quantities) target, ties at random, and every run of
    five neighbours is dealt to the five folds in random order.  Rare classes need no special case.

    Args:
        target: (row,) integers are classes, floats are quantities.
        groups: (row,) ids that stay together.
        seed: Of the dealing.

    Returns:
        (row,) fold numbers.

    >>> folds = split_folds([0] * 10 + [1] * 5, np.arange(15))
    >>> np.bincount(folds[:10]).tolist(), np.bincount(folds[10:]).tolist()
    ([2, 2, 2, 2, 2], [1, 1, 1, 1, 1])
    """
    values = pd.Series(np.asarray(target))
    ids, index = np.unique(np.asarray(groups), return_inverse=True)
    by_group = values.groupby(index)
    if values.dtype.kind == "f":
        key = by_group.mean().to_numpy()
    elif len(ids) == len(values):
        key = by_group.first().to_numpy()
    else:
        key = by_group.agg(lambda g: g.mode().iloc[0]).to_numpy()
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(ids)), key))
    dealt = np.concatenate([rng.permutation(FOLDS) for _ in range(-(-len(ids) // FOLDS))])[: len(ids)]
    folds = np.empty(len(ids), np.int64)
    folds[order] = dealt
    return folds[index]


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
        weights, intercept = self.solve(penalty)
        p, moments, shift = self.n_features, held_out._moments, held_out._shift
        offset = shift[p:] - shift[:p] @ weights - intercept
        residual = np.concatenate([offset[None], -weights, np.eye(len(offset))])  # applied to the rows (1, x, y)
        squared_error = np.einsum("ij,ik,kj->j", residual, moments, residual, optimize=True)
        total = np.diag(moments)[p + 1 :] - moments[0, p + 1 :] ** 2 / held_out.n
        return 1 - squared_error / total

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


# --- the problem: which rows, which targets, which fold ---------------------------------------------


@dataclass(frozen=True)
class _Settings:
    penalties: tuple[float, ...]  # strongest first: each fit starts from a smoother one
    control: bool
    seed: int
    n_resamples: int
    max_iter: int


@dataclass(frozen=True)
class _Problem:
    """What all combinations share.  Rows are (sample,) or, for patches, (sample * y * x,)."""

    name: str
    task: Task
    target: NDArray[Any]  # (row,) class codes or floats; what `keep` leaves out is undefined
    control: NDArray[Any]  # (row,) targets of the control task
    keep: NDArray[np.bool_]  # (row,) rows whose label is known
    control_keep: NDArray[np.bool_]
    folds: NDArray[np.int64]  # (row,)
    clusters: NDArray[np.int64] | None  # (row,)
    classes: tuple[Any, ...]
    patches: bool
    n_dropped: int = field(default=0)

    @staticmethod
    def of(
        features: xr.DataArray,
        label: str | ArrayLike | xr.DataArray,
        task: Task | Literal["auto"],
        types: ArrayLike | None,
        groups: ArrayLike | None,
        seed: int,
    ) -> _Problem:
        n_samples = features.sizes["sample"]
        per_sample = features.sizes["y"] * features.sizes["x"] if "y" in features.dims else 1
        name, table = _label_table(features, label)  # (sample, 1 or y * x)
        known = ~(pd.isna(table) | (table == "")) if table.dtype == object else ~pd.isna(table)
        chosen, codes, classes = _encode(name, table, known, task)
        ids = features["sample"].to_numpy() if "sample" in features.coords else np.arange(n_samples)
        sample_index = np.unique(ids, return_inverse=True)[1]
        repeated = int(sample_index.max(initial=0)) + 1 < n_samples
        units = sample_index if groups is None else _per_sample(groups, n_samples, "groups")
        usable = known.any(axis=1)
        if len(np.unique(units[usable])) < 2 * FOLDS:
            found = len(np.unique(units[usable]))
            raise ValueError(f"Label {name!r} is known for {found} independent samples; a split needs at least {2 * FOLDS}.")
        # a sample's stratum: its label, or the commonest (mean) of its patches'
        strata = [codes[i, known[i]] for i in np.flatnonzero(usable)]
        typical = np.array(
            [s[0] if s.size == 1 else s.mean() if chosen == "ridge" else np.bincount(s).argmax() for s in strata]
        )
        folds = np.full(n_samples, -1)
        folds[usable] = split_folds(typical, units[usable], seed)
        kinds = sample_index if types is None and repeated else types
        control, control_known = _control_labels(codes, known, kinds, seed)
        wide = (n_samples, per_sample)
        clustered = repeated or groups is not None or per_sample > 1
        keep = np.broadcast_to(known, wide).ravel()
        return _Problem(
            name=name,
            task=chosen,
            target=np.broadcast_to(codes, wide).ravel(),
            control=np.broadcast_to(control, wide).ravel(),
            keep=keep,
            control_keep=np.broadcast_to(control_known, wide).ravel(),
            folds=np.repeat(folds, per_sample),
            clusters=np.repeat(units, per_sample) if clustered else None,
            classes=classes,
            patches=per_sample > 1,
            n_dropped=int((~keep).sum()),
        )


def _label_table(features: xr.DataArray, label: str | ArrayLike | xr.DataArray) -> tuple[str, NDArray[Any]]:
    """The label's name and its values as (sample, 1), or (sample, y * x) for label maps."""
    space = tuple(d for d in SPACE if d in features.dims)
    shapes = [("sample",), ("sample", *space)]
    if isinstance(label, str):
        available = [str(n) for n, c in features.coords.items() if n != "sample" and c.dims in shapes]
        if label not in available:
            close = difflib.get_close_matches(label, available, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"Label {label!r} is not among the samples' labels ({', '.join(sorted(available)) or 'none'}){hint}"
            )
        label = features.coords[label]
    name = str(getattr(label, "name", None) or "label")
    if isinstance(label, xr.DataArray):
        if "sample" in label.dims and "sample" in label.indexes and "sample" in features.coords:
            missing = set(features["sample"].to_numpy().tolist()) - set(label["sample"].to_numpy().tolist())
            if missing:
                raise ValueError(f"Label {name!r} has no entry for {len(missing)} samples, such as {sorted(missing)[0]!r}.")
            if label.indexes["sample"].is_unique:
                label = label.sel(sample=features["sample"])
        label = label.transpose(*[d for d in ("sample", *SPACE) if d in label.dims])
    values = np.asarray(label)
    allowed = [tuple(features.sizes[d] for d in shape) for shape in shapes]
    if values.shape not in allowed:
        raise ValueError(
            f"Label {name!r} has shape {values.shape}; these features need {' or '.join(map(str, dict.fromkeys(allowed)))}."
        )
    if values.dtype.kind not in "biuf":
        values = values.astype(object)
    return name, values.reshape(len(values), -1)


def _encode(
    name: str, table: NDArray[Any], known: NDArray[np.bool_], task: Task | Literal["auto"]
) -> tuple[Task, NDArray[Any], tuple[Any, ...]]:
    """Chooses the task; codes the labels as class numbers or floats, with 0 where they are missing."""
    values = table[known]
    distinct = pd.unique(values)
    numeric = table.dtype.kind in "iuf"
    if task == "auto":
        continuous = numeric and (len(distinct) > MOST_CLASSES or bool(np.any(distinct % 1 != 0)))
        task = "ridge" if continuous else "logistic"
    if task not in ("logistic", "ridge"):
        raise ValueError(f"`task` is 'logistic', 'ridge' or 'auto'; got {task!r}.")
    if len(distinct) < 2:
        found = f"only {distinct[0]!r}" if len(distinct) else "nothing"
        raise ValueError(f"Label {name!r} holds {found} in {values.size} known entries; a probe needs at least two values.")
    if task == "ridge":
        if not (numeric or table.dtype.kind == "b"):
            raise ValueError(f"Label {name!r} holds words such as {distinct[0]!r}; ridge needs numbers, use task='logistic'.")
        return task, np.where(known, table, 0).astype(np.float64), ()
    classes = tuple(sorted(distinct.tolist(), key=lambda v: (type(v).__name__, v)))
    codes = np.zeros(table.shape, np.int64)
    codes[known] = pd.Index(classes, dtype=values.dtype).get_indexer(values)
    return task, codes, classes


def _control_labels(
    codes: NDArray[Any], known: NDArray[np.bool_], types: ArrayLike | None, seed: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Random labels that belong to types, or the samples' labels permuted; with the mask of known ones."""
    rng = np.random.default_rng([seed, 1])
    if types is not None:
        kinds = _per_sample(types, len(codes), "types")
        drawn = rng.choice(codes[known], size=int(kinds.max()) + 1)
        return drawn[kinds][:, None], np.asarray(known.any(axis=1, keepdims=True))
    control, control_known = codes.copy(), known.copy()
    usable = np.flatnonzero(known.any(axis=1))
    source = rng.permutation(usable)
    control[usable], control_known[usable] = codes[source], known[source]
    return control, control_known


def _per_sample(ids: ArrayLike, n_samples: int, name: str) -> NDArray[np.int64]:
    values = np.asarray(ids)
    if values.shape != (n_samples,):
        raise ValueError(f"`{name}` needs one id per sample, shape ({n_samples},); got shape {values.shape}.")
    return np.asarray(pd.factorize(values, use_na_sentinel=False)[0], dtype=np.int64)


def _combinations(features: xr.DataArray, outer: Sequence[Hashable]) -> Iterator[tuple[dict[str, Any], xr.DataArray]]:
    """Every place along the outer dimensions, with the scalar coordinates that say where all of them lie."""
    fixed = {str(n): c.item() for n, c in features.coords.items() if c.ndim == 0}
    shape = tuple(features.sizes[d] for d in outer)
    for index in np.ndindex(*shape):
        block = features.isel(dict(zip(outer, index, strict=True)))
        here = {str(d): block[d].item() if d in block.coords else i for d, i in zip(outer, index, strict=True)}
        yield {**fixed, **here}, block


def _matrix(block: xr.DataArray) -> NDArray[np.float32]:
    """(row, column) in memory; rows run over sample, then y, then x."""
    order = ("sample", *(d for d in SPACE if d in block.dims), "channel")
    return np.asarray(block.transpose(*order).to_numpy(), np.float32).reshape(-1, block.sizes["channel"])


# --- one probe ---------------------------------------------------------------------------------------


def _fit_combination(x: NDArray[np.float32], problem: _Problem, settings: _Settings, place: dict[str, Any]) -> dict[str, Any]:
    """Chooses the penalty, refits, scores; one row of the table."""
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        where = ", ".join(f"{k}={v!r}" for k, v in place.items()) or "the only place"
        raise ValueError(f"Features at {where} are not finite in {bad} of {len(x)} rows; select the finished samples first.")
    # one thread: oversubscribed BLAS made the same sweep 12-18 times slower on two cores
    with threadpool_limits(limits=1):
        probe = _Probe(problem.task, settings.max_iter)
        x64, y, keep = x.astype(np.float64), problem.target, problem.keep
        train, validation, test = (keep & part for part in _parts(problem.folds))
        penalty = probe.choose(x64, y, train, validation, settings.penalties)
        iterations = probe.fit(x64, y, train | validation, penalty)
        guess = probe.predict(x64[test])
        clusters = None if problem.clusters is None else problem.clusters[test]
        scores = _scores(problem, settings, y[test], guess, clusters, y[train | validation])
        control = _control_scores(problem, settings, x64, penalty) if settings.control else (np.nan, np.nan)
    return {
        **place,
        "label": problem.name,
        **scores,
        "control_accuracy": control[0],
        "control_train_accuracy": control[1],
        "selectivity": scores["value"] - control[0],
        "penalty": penalty,
        "converged": probe.converged,
        "iterations": iterations,
        "n_train": int(train.sum()),
        "n_validation": int(validation.sum()),
        "n_test": int(test.sum()),
        "n_dropped": problem.n_dropped,
        "n_classes": len(problem.classes),
        "n_features": x.shape[1],
        "seed": settings.seed,
    }


def _parts(folds: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    return folds > 1, folds == 1, folds == 0


class _Probe:
    """A scaler and a linear model; `converged` covers every fit that it made."""

    def __init__(self, task: Task, max_iter: int) -> None:
        self.task = task
        self.converged = True
        self.scaler = StandardScaler()
        self.model = (
            Ridge()
            if task == "ridge"
            else LogisticRegression(solver="lbfgs", tol=TOLERANCE, max_iter=max_iter, warm_start=True)
        )

    def choose(
        self,
        x: Floats,
        y: NDArray[Any],
        train: NDArray[np.bool_],
        validation: NDArray[np.bool_],
        penalties: Sequence[float],
    ) -> float:
        """The penalty that scores best on validation, the earliest (strongest) of equals."""
        if len(penalties) == 1:
            return penalties[0]
        scaled, held_out = self.scaler.fit_transform(x[train]), self.scaler.transform(x[validation])
        scores = []
        for penalty in penalties:
            self._fit_scaled(scaled, y[train], penalty)
            scores.append(self.model.score(held_out, y[validation]))
        return penalties[int(np.argmax(scores))]

    def fit(self, x: Floats, y: NDArray[Any], rows: NDArray[np.bool_], penalty: float) -> int:
        """Fits on the rows given and returns the iterations that it took (0 for ridge's closed form)."""
        return self._fit_scaled(self.scaler.fit_transform(x[rows]), y[rows], penalty)

    def predict(self, x: Floats) -> NDArray[Any]:
        return np.asarray(self.model.predict(self.scaler.transform(x)))

    def _fit_scaled(self, scaled: Floats, y: NDArray[Any], penalty: float) -> int:
        if self.task == "ridge":
            self.model.set_params(alpha=penalty).fit(scaled, y)
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            self.model.set_params(C=1 / penalty).fit(scaled, y)
        self.converged &= not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        return int(self.model.n_iter_.max())


def _control_scores(problem: _Problem, settings: _Settings, x: Floats, penalty: float) -> tuple[float, float]:
    """The control task's score on test and on the rows that it was fitted on."""
    keep, y = problem.keep & problem.control_keep, problem.control
    train, validation, test = (keep & part for part in _parts(problem.folds))
    fitted = train | validation
    if len(np.unique(y[fitted])) < 2 or not test.any():
        return np.nan, np.nan
    probe = _Probe(problem.task, settings.max_iter)
    probe.fit(x, y, fitted, penalty)
    return _score(problem.task, y[test], probe.predict(x[test])), _score(problem.task, y[fitted], probe.predict(x[fitted]))


def _score(task: Task, truth: NDArray[Any], guess: NDArray[Any]) -> float:
    if task == "logistic":
        return float(np.mean(truth == guess))
    total = float(np.sum((truth - truth.mean()) ** 2))
    return 1 - float(np.sum((truth - guess) ** 2)) / total if total > 0 else np.nan


def _scores(
    problem: _Problem,
    settings: _Settings,
    truth: NDArray[Any],
    guess: NDArray[Any],
    clusters: NDArray[np.int64] | None,
    fitted: NDArray[Any],
) -> dict[str, Any]:
    """Score, interval and chance levels of the test rows."""
    resampling: dict[str, Any] = {"clusters": clusters, "n_resamples": settings.n_resamples, "seed": settings.seed}
    value = _score(problem.task, truth, guess)
    if problem.task == "ridge":
        centred = truth - truth.mean()  # about the test mean, so that the sums below lose no digits
        columns = np.stack([np.ones_like(truth), centred, centred**2, (truth - guess) ** 2], axis=1)
        low, high = bootstrap_sums(columns, _r2_of_sums, **resampling)
        extra = {"balanced_accuracy": np.nan, "miou": np.nan, "chance": 0.0, "chance_uniform": np.nan}
        return {"score": "r2", "value": value, "low": low, "high": high, **extra}
    right = truth == guess
    if right.all() or not right.any():
        units = len(right) if clusters is None else len(np.unique(clusters))
        low, high = wilson_interval(units if right.all() else 0, units)
    else:
        low, high = bootstrap_interval(right, **resampling)
    counts = confusion_matrix(truth, guess, labels=np.arange(len(problem.classes)))
    hits, shown, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    present = shown > 0
    union = (shown + said - hits)[present]
    return {
        "score": "accuracy",
        "value": value,
        "low": low,
        "high": high,
        "balanced_accuracy": float(np.mean(hits[present] / shown[present])),
        "miou": float(np.mean(hits[present] / union)) if problem.patches else np.nan,
        "chance": float(np.mean(truth == np.bincount(fitted).argmax())),
        "chance_uniform": 1 / len(problem.classes),
    }


def _r2_of_sums(sums: Floats) -> Floats:
    """R2 from the sums of 1, y, y squared and the squared residual; NaN where a resample has one value only."""
    n, first, second, residual = sums.T
    total = second - first**2 / n
    return np.where(total > 0, 1 - residual / np.where(total > 0, total, 1), np.nan)
