"""How the answers of a probe are scored: the rows of the table that every kind of probe returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from diffprobe.probes.task import Floats, Problem, Rows, Settings, Task
from diffprobe.stats import bootstrap_sums, share_interval


@dataclass(frozen=True)
class Turn:
    """One fit with one fold as the test fold: row masks, the answers on the test rows and the control's scores."""

    parts: tuple[Rows, Rows, Rows]
    guess: NDArray[Any]
    choice: Any
    control: tuple[float, float]
    converged: bool
    iterations: int
    estimator: Any = None


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
    if problem.task == "classification":
        majority = [np.bincount(y[rows]).argmax() for rows in fitted]
        usual = np.repeat(majority, [len(rows) for rows in tests])[order]
    clusters = None if problem.clusters is None else problem.clusters[test]
    scores = _scores(problem, settings, y[test], guess, clusters, usual)
    control = np.array([turn.control for turn in turns]).mean(axis=0)
    chosen = [turn.choice for turn in turns]
    row = {
        **place,
        "label": problem.name,
        **scores,
        "control_value": float(control[0]),
        "control_train_value": float(control[1]),
        "selectivity": scores["value"] - float(control[0]),
        **({settings.parameter.rpartition("__")[2]: float(np.median(chosen))} if settings.parameter else {}),
        "converged": all(turn.converged for turn in turns),
        "iterations": max(turn.iterations for turn in turns),
        "n_train": round(np.mean([turn.parts[0].sum() for turn in turns])),
        "n_validation": round(np.mean([turn.parts[1].sum() for turn in turns])),
        "n_test": len(test),
        "n_dropped": int((~problem.keep).sum()),
        "n_classes": len(problem.classes),
        "n_features": n_features,
        "seed": settings.seed,
    }
    if settings.keep_rows:
        hits = problem.task == "classification"
        row["rows"] = (y[test] == guess).astype(np.float64) if hits else -((y[test] - guess) ** 2)
    return row


def best_choice(scores: Iterator[tuple[Any, float]]) -> Any:
    """The choice with the best score, the first of equals; stops asking after two in a row that score below the best.

    >>> best_choice(iter([(100.0, 0.5), (10.0, 0.7), (1.0, 0.7), (0.1, 0.6)]))
    10.0
    """
    best, found, worse = -np.inf, None, 0
    for choice, value in scores:
        worse = worse + 1 if value < best else 0
        if value > best or found is None:
            best, found = value, choice
        if worse == 2:
            break
    return found


def score(task: Task, truth: NDArray[Any], guess: NDArray[Any]) -> float:
    """Accuracy of classes, R2 of quantities."""
    if task == "classification":
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
    """Score, interval and chance levels of the test rows; `usual` is the training majority's class of each."""
    resampling: dict[str, Any] = {"clusters": clusters, "n_resamples": settings.n_resamples, "seed": settings.seed}
    value = score(problem.task, truth, guess)
    overlap = dict.fromkeys(("miou", "miou_low", "miou_high", "miou_chance"), np.nan)
    if problem.task == "regression":
        centred = truth - truth.mean()  # about the test mean, so that the sums below lose no digits
        columns = np.stack([np.ones_like(truth), centred, centred**2, (truth - guess) ** 2], axis=1)
        low, high = bootstrap_sums(columns, _r2_of_sums, **resampling)
        extra = {"balanced_accuracy": np.nan, **overlap, "chance": 0.0, "chance_uniform": np.nan}
        return {"score": "r2", "value": value, "low": low, "high": high, **extra}
    right = truth == guess
    low, high = share_interval(right, **resampling)
    counts = confusion_matrix(truth, guess, labels=np.arange(len(problem.classes)))
    hits, shown = np.diag(counts), counts.sum(axis=1)
    present = shown > 0
    if problem.patches and clusters is not None:  # patches are always clustered by their image
        overlap = _overlap(truth, guess, np.unique(clusters, return_inverse=True)[1], present, settings)
        # Always answering the majority overlaps fully with nothing else, and with its own class as often as it is right.
        overlap["miou_chance"] = float(np.mean(truth == usual)) / int(present.sum())
    balanced = float(np.mean(hits[present] / shown[present]))
    chances = {"chance": float(np.mean(truth == usual)), "chance_uniform": 1 / len(problem.classes)}
    return {
        "score": "accuracy", "value": value, "low": low, "high": high, "balanced_accuracy": balanced, **overlap, **chances,
    }  # fmt: skip


def _overlap(
    truth: NDArray[Any], guess: NDArray[Any], images: NDArray[np.int64], present: Rows, settings: Settings
) -> dict[str, float]:
    """Mean intersection over union of the classes that are present, and its interval over images."""
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
