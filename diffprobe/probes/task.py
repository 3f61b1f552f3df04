"""The task of a probe: which rows it sees, what they should say, and how its answers are scored.

Features are (sample, ..., channel, y, x); one probe is fitted for every combination of the dimensions in between
(timestep, conditioning, ...).  Shared by every kind of probe, so that their tables can be laid side by side.  The
invariant: the test rows meet a probe once, after all that it could choose was settled on other samples, and all
combinations share one split, so their scores are paired.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import joblib
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix
from threadpoolctl import threadpool_limits

from diffprobe.stats import bootstrap_interval, bootstrap_sums, wilson_interval
from diffprobe.store import whole_file

Task = Literal["logistic", "ridge"]
Pool = Literal["mean", "flatten", "patches"]
Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]

FOLDS = 5  # one to test, one to validate, three to train
MOST_CLASSES = 20  # whole numbers with more distinct values than this are measured, not classified
SPACE = ("y", "x")


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


def check_features(features: xr.DataArray) -> None:
    """Raise ValueError unless the features have the dimensions that a probe needs."""
    if unknown := {"sample", "channel"} - set(features.dims):
        raise ValueError(
            f"Features need the dimensions sample and channel; {', '.join(sorted(unknown))} is not in {features.dims}."
        )


# --- the problem: which rows, which targets, which fold ---------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How every combination is fitted.

    Attributes:
        strength: What the probe can choose, and the column that says what it chose: "penalty" or "k".
        choices: Its values, the smoothest probe first: of equals the first is taken.
        cross_fit: Whether every fold is the test fold once.
        keep_rows: Whether the table keeps each test row's own score.
    """

    strength: str
    choices: tuple[float, ...]
    control: bool
    seed: int
    n_resamples: int
    cross_fit: bool = False
    keep_rows: bool = False


class Model(Protocol):
    """What a probe must be able to do; `converged` covers every fit that it made."""

    converged: bool

    def choose(self, x: Floats, y: NDArray[Any], train: Rows, validation: Rows, choices: Sequence[float]) -> float:
        """The choice that scores best on the validation rows."""
        ...

    def fit(self, x: Floats, y: NDArray[Any], rows: Rows, choice: float) -> int:
        """Fits on some rows; the iterations that it took."""
        ...

    def predict(self, x: Floats) -> NDArray[Any]:
        """The answer for every row."""
        ...


@dataclass(frozen=True)
class Problem:
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

    def parts(self, turn: int = 0) -> tuple[Rows, Rows, Rows]:
        """Rows to train on, to validate on and to test on, as masks; `turn` says which fold is the test fold."""
        folds = (self.folds - turn) % FOLDS
        return self.keep & (folds > 1), self.keep & (folds == 1), self.keep & (folds == 0)

    @staticmethod
    def of(
        features: xr.DataArray,
        label: str | ArrayLike | xr.DataArray,
        task: Task | Literal["auto"],
        types: ArrayLike | None,
        groups: ArrayLike | None,
        seed: int,
    ) -> Problem:
        n_samples = features.sizes["sample"]
        per_sample = features.sizes["y"] * features.sizes["x"] if "y" in features.dims else 1
        name, table = _label_table(features, label)  # (sample, 1 or y * x)
        known = ~(pd.isna(table) | (table == "")) if table.dtype == object else np.isfinite(table)
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
        return Problem(
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
        missing = pd.isna(values) | (values == "")
        if pd.api.types.infer_dtype(values[~missing]) in ("integer", "floating", "mixed-integer-float"):
            values = np.where(missing, np.nan, values).astype(np.float64)  # numbers with gaps are no words
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


def combinations(features: xr.DataArray, outer: Sequence[Hashable]) -> Iterator[tuple[dict[str, Any], xr.DataArray]]:
    """Every place along the outer dimensions, with the scalar coordinates that say where all of them lie."""
    fixed = {str(n): c.item() for n, c in features.coords.items() if c.ndim == 0}
    shape = tuple(features.sizes[d] for d in outer)
    for index in np.ndindex(*shape):
        block = features.isel(dict(zip(outer, index, strict=True)))
        here = {str(d): block[d].item() if d in block.coords else i for d, i in zip(outer, index, strict=True)}
        yield {**fixed, **here}, block


def matrix(block: xr.DataArray) -> NDArray[np.float32]:
    """(row, column) in memory; rows run over sample, then y, then x."""
    order = ("sample", *(d for d in SPACE if d in block.dims), "channel")
    return np.asarray(block.transpose(*order).to_numpy(), np.float32).reshape(-1, block.sizes["channel"])


# --- one probe ---------------------------------------------------------------------------------------


def run_probes(
    features: xr.DataArray, problem: Problem, settings: Settings, make: Callable[[], Model], n_jobs: int | None
) -> pd.DataFrame:
    """One row per combination of the outer dimensions.

    Args:
        features: As `pool_features` gives them.
        make: A fresh probe; it travels to worker processes.
        n_jobs: Processes, one BLAS thread each; by default one per core when there are several probes to fit.
    """
    outer = [d for d in features.dims if d not in ("sample", "channel", *SPACE)]
    count = int(np.prod([features.sizes[d] for d in outer]))
    n_jobs = n_jobs if n_jobs is not None else (min(count, joblib.cpu_count()) if count >= 4 else 1)
    job, parent = joblib.delayed(_fit_in_worker if n_jobs != 1 else _fit_combination), [os.getpid()] * (n_jobs != 1)
    jobs = (job(*parent, matrix(block), problem, settings, make, place) for place, block in combinations(features, outer))
    return pd.DataFrame(list(joblib.Parallel(n_jobs=n_jobs, backend="loky" if n_jobs != 1 else "sequential")(jobs)))


def _fit_in_worker(parent: int, *arguments: Any) -> dict[str, Any]:
    if os.getpid() != parent:  # joblib stays in this process where it finds one core only
        _end_with(parent)
    return _fit_combination(*arguments)


@functools.cache
def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone; joblib's workers would go on for minutes, with nobody to tell."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fit_combination(
    x: NDArray[np.float32], problem: Problem, settings: Settings, make: Callable[[], Model], place: dict[str, Any]
) -> dict[str, Any]:
    """Chooses, refits and scores, once or with every fold as the test fold; one row of the table."""
    check_finite(x, place)
    # one thread: oversubscribed BLAS made the same sweep 12-18 times slower on two cores
    with threadpool_limits(limits=1):
        wide = x.astype(np.float64)
        turns = [_turn(wide, problem, settings, make(), turn) for turn in range(FOLDS if settings.cross_fit else 1)]
    return make_row(problem, settings, turns, place, x.shape[1])


@dataclass(frozen=True)
class Turn:
    """One fit with one fold as the test fold: row masks, the answers on the test rows and the control's scores."""

    parts: tuple[Rows, Rows, Rows]
    guess: NDArray[Any]
    choice: float
    control: tuple[float, float]
    converged: bool
    iterations: int


def _turn(x: Floats, problem: Problem, settings: Settings, model: Model, turn: int) -> Turn:
    y = problem.target
    parts = train, validation, test = problem.parts(turn)
    choice = model.choose(x, y, train, validation, settings.choices)
    iterations = model.fit(x, y, train | validation, choice)
    guess = model.predict(x[test])
    converged, control = model.converged, (np.nan, np.nan)
    if settings.control:
        fitted, held_out = (rows & problem.control_keep for rows in (train | validation, test))
        z = problem.control
        if len(np.unique(z[fitted])) > 1 and held_out.any():
            model.fit(x, z, fitted, choice)
            answers = [(z[rows], model.predict(x[rows])) for rows in (held_out, fitted)]
            control = score(problem.task, *answers[0]), score(problem.task, *answers[1])
    return Turn(parts, guess, choice, control, converged, iterations)


def make_row(
    problem: Problem, settings: Settings, turns: Sequence[Turn], place: Mapping[str, Any], n_features: int
) -> dict[str, Any]:
    """The table's row of one combination; with several turns every row's score comes from the turn that tested it."""
    y, fitted = problem.target, [turn.parts[0] | turn.parts[1] for turn in turns]
    tests = [np.flatnonzero(turn.parts[2]) for turn in turns]
    order = np.argsort(np.concatenate(tests), kind="stable")
    test = np.concatenate(tests)[order]
    guess = np.concatenate([turn.guess for turn in turns])[order]
    usual = np.zeros(len(test), np.int64)
    if problem.task == "logistic":
        majority = [np.bincount(y[rows]).argmax() for rows in fitted]
        usual = np.repeat(majority, [len(rows) for rows in tests])[order]
    clusters = None if problem.clusters is None else problem.clusters[test]
    scores = _scores(problem, settings, y[test], guess, clusters, usual)
    control = np.array([turn.control for turn in turns]).mean(axis=0)
    row = {
        **place,
        "label": problem.name,
        **scores,
        "control_accuracy": float(control[0]),
        "control_train_accuracy": float(control[1]),
        "selectivity": scores["value"] - float(control[0]),
        settings.strength: float(np.median([turn.choice for turn in turns])),
        "converged": all(turn.converged for turn in turns),
        "iterations": max(turn.iterations for turn in turns),
        "n_train": round(np.mean([turn.parts[0].sum() for turn in turns])),
        "n_validation": round(np.mean([turn.parts[1].sum() for turn in turns])),
        "n_test": len(test),
        "n_dropped": problem.n_dropped,
        "n_classes": len(problem.classes),
        "n_features": n_features,
        "seed": settings.seed,
    }
    if settings.keep_rows:
        row["rows"] = (y[test] == guess).astype(np.float64) if problem.task == "logistic" else -((y[test] - guess) ** 2)
    return row


def check_finite(x: NDArray[Any], place: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the place, where features are not finite."""
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        where = ", ".join(f"{k}={v!r}" for k, v in place.items()) or "the only place"
        raise ValueError(f"Features at {where} are not finite in {bad} of {len(x)} rows; select the finished samples first.")


def best_choice(scores: Iterator[tuple[float, float]]) -> float:
    """The choice with the best score, the first of equals; stops asking after two in a row that score below the best.

    >>> best_choice(iter([(100.0, 0.5), (10.0, 0.7), (1.0, 0.7), (0.1, 0.6)]))
    10.0
    """
    best, found, worse = -np.inf, np.nan, 0
    for choice, value in scores:
        worse = worse + 1 if value < best else 0
        if value > best or np.isnan(found):
            best, found = value, choice
        if worse == 2:
            break
    return found


def score(task: Task, truth: NDArray[Any], guess: NDArray[Any]) -> float:
    """Accuracy of classes, R2 of quantities."""
    if task == "logistic":
        return float(np.mean(truth == guess))
    total = float(np.sum((truth - truth.mean()) ** 2))
    return 1 - float(np.sum((truth - guess) ** 2)) / total if total > 0 else np.nan


def _scores(
    problem: Problem,
    settings: Settings,
    truth: NDArray[Any],
    guess: NDArray[Any],
    clusters: NDArray[np.int64] | None,
    usual: NDArray[np.int64],
) -> dict[str, Any]:
    """Score, interval and chance levels of the test rows."""
    resampling: dict[str, Any] = {"clusters": clusters, "n_resamples": settings.n_resamples, "seed": settings.seed}
    value = score(problem.task, truth, guess)
    if problem.task == "ridge":
        centred = truth - truth.mean()  # about the test mean, so that the sums below lose no digits
        columns = np.stack([np.ones_like(truth), centred, centred**2, (truth - guess) ** 2], axis=1)
        low, high = bootstrap_sums(columns, _r2_of_sums, **resampling)
        absent = dict.fromkeys(("balanced_accuracy", "miou", "miou_low", "miou_high", "miou_chance"), np.nan)
        extra = {**absent, "chance": 0.0, "chance_uniform": np.nan}
        return {"score": "r2", "value": value, "low": low, "high": high, **extra}
    right = truth == guess
    if right.all() or not right.any():
        units = len(right) if clusters is None else len(np.unique(clusters))
        low, high = wilson_interval(units if right.all() else 0, units)
    else:
        low, high = bootstrap_interval(right, **resampling)
    counts = confusion_matrix(truth, guess, labels=np.arange(len(problem.classes)))
    hits, shown = np.diag(counts), counts.sum(axis=1)
    present = shown > 0
    overlap = dict.fromkeys(("miou", "miou_low", "miou_high", "miou_chance"), np.nan)
    if problem.patches and clusters is not None:  # patches are always clustered by their image
        overlap = _overlap(truth, guess, np.unique(clusters, return_inverse=True)[1], present, settings)
        # Always answering the majority overlaps fully with nothing else, and with its own class as often as it is right.
        overlap["miou_chance"] = float(np.mean(truth == usual)) / int(present.sum())
    return {
        "score": "accuracy",
        "value": value,
        "low": low,
        "high": high,
        "balanced_accuracy": float(np.mean(hits[present] / shown[present])),
        **overlap,
        "chance": float(np.mean(truth == usual)),
        "chance_uniform": 1 / len(problem.classes),
    }


def _overlap(
    truth: NDArray[Any], guess: NDArray[Any], images: NDArray[np.int64], present: Rows, settings: Settings
) -> dict[str, float]:
    """Mean intersection over union of the classes that are there, and its interval over images."""
    classes = len(present)
    table = np.zeros((int(images.max()) + 1, 3, classes))  # (image, hit / shown / said, class)
    np.add.at(table[:, 0], (images, truth), truth == guess)
    np.add.at(table[:, 1], (images, truth), 1)
    np.add.at(table[:, 2], (images, guess), 1)

    def mean_iou(sums: Floats) -> Floats:
        hits, shown, said = sums.reshape(len(sums), 3, classes)[:, :, present].transpose(1, 0, 2)
        union = shown + said - hits
        seen = shown > 0  # a class may be missing from a resample
        return np.asarray(np.where(seen, hits / np.maximum(union, 1), 0).sum(axis=1) / seen.sum(axis=1))

    flat = table.reshape(len(table), -1)
    low, high = bootstrap_sums(flat, mean_iou, n_resamples=settings.n_resamples, seed=settings.seed)
    return {"miou": float(mean_iou(flat.sum(axis=0)[None])[0]), "miou_low": low, "miou_high": high}


def _r2_of_sums(sums: Floats) -> Floats:
    """R2 from the sums of 1, y, y squared and the squared residual; NaN where a resample has one value only."""
    n, first, second, residual = sums.T
    total = second - first**2 / n
    return np.where(total > 0, 1 - residual / np.where(total > 0, total, 1), np.nan)


# --- tables ------------------------------------------------------------------------------------------


def probe_table(
    get: Callable[[str], xr.DataArray],
    sites: Sequence[str],
    labels: str | Sequence[str],
    probe: Callable[..., pd.DataFrame],
    *,
    pool: Pool = "mean",
    **options: Any,
) -> pd.DataFrame:
    """Probes of every label at every site, as one table with the column `site` in front.

    Args:
        get: Gives the features (sample, ..., channel, y, x) of a site, asked once a site.  Where there are several
            labels, give what `pool_features` makes of them, so that they are not pooled once a label.
        sites: Names that `get` understands.
        labels: Coordinates on `sample`, or on (sample, y, x) with `pool="patches"`.
        probe: `fit_probe`, `stream_probe` or `knn_probe`.
        pool: As in `fit_probe`.
        **options: The other options of the probe.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    frames = []
    for site in sites:
        features = get(site)
        for name in names:
            frame = probe(features, name, pool=pool, **options)
            frames.append(frame.assign(site=site)[["site", *frame.columns.drop("site", errors="ignore")]])
    return pd.concat(frames, ignore_index=True)


def save_table(
    frame: pd.DataFrame, path: str | Path, store: str | Path, attributes: Mapping[str, Any], options: Mapping[str, Any]
) -> str | Path:
    """Writes a table and, beside it as .json, where it comes from: store, request, options, versions.

    Args:
        path: Of the table: a path or an fsspec URL.
        store: Path of the store that the features came from; only its name is kept.
        attributes: The store's own, as `open_store` gives them.
        options: Those of the probe.
    """
    request = attributes.get("request", {})
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    kept = {name: request.get(name) for name in ("model", "revision", "weights", "dataset", "fingerprint")}
    kept["random_weights"] = attributes.get("random_weights")
    versions = {name: importlib.metadata.version(name) for name in ("diffprobe", "numpy", "scikit-learn", "scipy", "xarray")}
    origin = {"store": Path(str(store)).name, "request": digest, **kept, "options": dict(options), "versions": versions}
    sidecar = re.sub(r"(\.[^./]*)?$", ".json", str(path), count=1)
    with whole_file(sidecar) as beside, whole_file(path) as table:  # both are written before the table, and then it, is there
        table.write_text(frame.to_csv(index=False), encoding="utf-8", newline="")
        beside.write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
