"""Fits an estimator at every place of the features under one protocol, and keeps table and estimators together."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from diffprobe.probes import task as protocol
from diffprobe.probes.scoring import Turn, best_choice, make_row, score
from diffprobe.rundir import package_versions, whole_file

# --- the result ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeResult:
    """Fitted probes and their scores.

    Attributes:
        table: One row per combination of the outer dimensions; see `diffprobe.probes.linear.fit_probe`.
        estimators_: One fitted estimator per row of the table, fitted on train and validation; its answers to rows
            (row, column) are class numbers or quantities.  Those of the linear probes are
            `diffprobe.probes.linear.LinearReadout`.  With `cross_fit` they are those of the first turn.
        places: The coordinates along the outer dimensions, one dict per row of the table.
        classes: The labels that class numbers stand for; empty for regression.
        pool: How y and x were removed.
    """

    table: pd.DataFrame
    estimators_: tuple[Any, ...]
    places: tuple[dict[str, Any], ...]
    classes: tuple[Any, ...]
    pool: protocol.Pool

    def predict(self, features: xr.DataArray | ArrayLike) -> xr.DataArray:
        """Answers for other samples: labels or quantities, (sample, ...), or (sample, ..., y, x) for patches.

        A dimension that the probes were fitted along is matched by label; the one probe of a place is applied to every
        place of other dimensions, for example a probe of one timestep to all of them.

        Raises:
            ValueError: no probe was fitted at a place of the features.
        """
        given = protocol.as_features(features)
        answers, outer = [], protocol.outer_dimensions(given)
        for place, block in protocol.combinations(given):
            x = protocol.matrix(protocol.pool_features(block, self.pool))
            protocol.check_rows(x, place)
            codes = np.asarray(self._at(place).predict(x.astype(np.float64)))
            answers.append(np.array(self.classes, object)[codes] if self.classes else codes)
        space = [d for d in ("patch", *protocol.SPACE) if self.pool == "patches" and d in given.dims]
        sizes = [given.sizes[d] for d in (*outer, "sample", *space)]
        values = np.stack(answers).reshape(sizes)
        kept = {n: c for n, c in given.coords.items() if set(c.dims) <= {"sample", *outer, *space}}
        found = xr.DataArray(values, dims=(*outer, "sample", *space), coords=kept, name=str(self.table["label"].iloc[0]))
        return found.transpose("sample", *outer, *space)

    def direction(self, label: Any = None, **place: Any) -> protocol.Floats:
        """The unit vector (column,), in the features' own units, along which a linear probe's score grows fastest.

        Args:
            label: A class; not given for regression, nor needed for the second of two classes.
            **place: The coordinates of one probe, such as ``timestep=50``; none where there is only one.

        Raises:
            ValueError: there is no such class or place, or the probe is not linear.
        """
        estimator = self._at(place)
        if not hasattr(estimator, "weights"):
            raise ValueError(f"A direction needs a linear probe; {type(estimator).__name__} has no `weights`.")
        weights = estimator.weights
        if self.classes:
            label = self.classes[1] if label is None and len(self.classes) == 2 else label
            if label not in self.classes:
                raise ValueError(f"Class {label!r} is not one of {', '.join(map(repr, self.classes))}.")
            code = self.classes.index(label)
            weights = weights[code] if len(weights) > 1 else weights[0] * (1 if code else -1)
        vector = np.asarray(weights).reshape(-1)
        return np.asarray(vector / np.linalg.norm(vector))

    def _at(self, place: Mapping[str, Any]) -> Any:
        """The estimator of a place, of which other coordinates may be given too."""
        if not self.estimators_:
            raise ValueError("The estimators were not kept; fit with keep_estimators=True.")
        found = [
            e for e, p in zip(self.estimators_, self.places, strict=True) if all(place.get(k, v) == v for k, v in p.items())
        ]
        if len(found) == 1:
            return found[0]
        there = "; ".join(", ".join(f"{k}={v!r}" for k, v in p.items()) or "the only place" for p in self.places[:8])
        raise ValueError(
            f"{len(found)} probes were fitted at {dict(place) or 'the place that is not named'}; there are: {there}."
        )


# --- fitting ------------------------------------------------------------------------------------------


def run_probes(
    features: xr.DataArray,
    problem: protocol.Problem,
    settings: protocol.Settings,
    estimator: Any,
    *,
    pool: protocol.Pool,
    n_jobs: int | None = None,
    keep_estimators: bool = True,
) -> ProbeResult:
    """Fits a clone of an estimator at every combination of the outer dimensions.

    Args:
        features: Pooled by `pool_features`.
        estimator: Has `fit(x, y)` and `predict(x)`; where `settings` has choices also scikit-learn's `set_params`.  With a
            method `readout()`, what that returns is kept in its place.
        n_jobs: Processes, one BLAS thread each; by default one per core when there are several probes to fit.
    """
    outer = protocol.outer_dimensions(features)
    count = int(np.prod([features.sizes[d] for d in outer]))
    n_jobs = n_jobs if n_jobs is not None else (min(count, joblib.cpu_count()) if count >= 4 else 1)
    job, parent = joblib.delayed(_fit_in_worker if n_jobs != 1 else _fit_place), [os.getpid()] * (n_jobs != 1)
    jobs = (
        job(*parent, protocol.matrix(block), problem, settings, clone(estimator, safe=False), place, keep_estimators)
        for place, block in protocol.combinations(features)
    )
    done = list(joblib.Parallel(n_jobs=n_jobs, backend="loky" if n_jobs != 1 else "sequential")(jobs))
    rows, fitted = [row for row, _ in done], tuple(estimator for _, estimator in done)
    places = tuple({str(d): row[str(d)] for d in outer} for row in rows)
    return ProbeResult(pd.DataFrame(rows), fitted if keep_estimators else (), places, problem.classes, pool)


def _fit_in_worker(parent: int, *arguments: Any) -> tuple[dict[str, Any], Any]:
    if os.getpid() != parent:  # joblib stays in this process where it finds one core only
        _end_with(parent)
    return _fit_place(*arguments)


@functools.cache
def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone; joblib's workers would go on for minutes without anyone to report to."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fit_place(
    x: NDArray[np.float32],
    problem: protocol.Problem,
    settings: protocol.Settings,
    estimator: Any,
    place: dict[str, Any],
    keep: bool,
) -> tuple[dict[str, Any], Any]:
    """The table's row of one combination, and its estimator."""
    protocol.check_rows(x, place)
    # one thread: oversubscribed BLAS made the same sweep 12-18 times slower on two cores
    with threadpool_limits(limits=1):
        wide = x.astype(np.float64)
        turns = [_turn(wide, problem, settings, clone(estimator, safe=False), turn) for turn in range(settings.turns)]
    return make_row(problem, settings, turns, place, x.shape[1]), turns[0].estimator if keep else None


def _turn(x: protocol.Floats, problem: protocol.Problem, settings: protocol.Settings, model: Any, turn: int) -> Turn:
    """Chooses on validation, refits on train and validation, answers the test rows, and fits the control task."""
    y, parts = problem.target, problem.parts(turn)
    train, validation, test = parts
    fitted = train | validation
    converged, choice = True, settings.choices[0] if settings.choices else None
    if len(settings.choices) > 1:
        rows, held_out = x[train], x[validation]

        def scores() -> Any:
            nonlocal converged
            for value in settings.choices:
                model.set_params(**{str(settings.parameter): value})
                converged &= fit_quietly(model, rows, y[train])
                yield value, score(problem.task, y[validation], np.asarray(model.predict(held_out)))

        choice = best_choice(scores())
    if settings.parameter:
        model.set_params(**{settings.parameter: choice})
    rows = x[fitted]
    converged &= fit_quietly(model, rows, y[fitted])
    iterations = int(np.max(getattr(model, "n_iter_", 0)))
    guess, control = np.asarray(model.predict(x[test])), (np.nan, np.nan)
    kept = model.readout() if hasattr(model, "readout") else model
    if settings.control:
        known, held_rows = fitted & problem.control_keep, test & problem.control_keep
        z = problem.control
        if len(np.unique(z[known])) > 1 and held_rows.any():
            other = clone(model, safe=False) if kept is model else model
            fit_quietly(other, rows if np.array_equal(known, fitted) else x[known], z[known])
            answers = [(z[part], np.asarray(other.predict(x[part]))) for part in (held_rows, known)]
            control = score(problem.task, *answers[0]), score(problem.task, *answers[1])
    return Turn(parts, guess, choice, control, converged, iterations, kept)


def fit_quietly(model: Any, x: protocol.Floats, y: NDArray[Any]) -> bool:
    """Fits, and returns whether the fit converged; scikit-learn's warning that it did not becomes this answer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    for other in caught:
        if not issubclass(other.category, ConvergenceWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return not any(issubclass(w.category, ConvergenceWarning) for w in caught)


# --- tables -------------------------------------------------------------------------------------------


def probe_table(
    get: Callable[[str], xr.DataArray],
    sites: Sequence[str],
    labels: str | Sequence[str],
    probe: Callable[..., ProbeResult],
    *,
    pool: protocol.Pool = "mean",
    **options: Any,
) -> pd.DataFrame:
    """Probes of every label at every site, as one table with the column `site` in front.

    Args:
        get: Gives the features (sample, ..., channel, y, x) of a site, asked once a site.  For several labels it should
            give what `pool_features` makes of them, so that they are not pooled once a label.
        sites: Names that `get` understands.
        labels: Coordinates on `sample`, or on (sample, y, x) with `pool="patches"`.
        probe: `fit_probe`, `stream_probe` or `knn_probe`; with `functools.partial`, one of your own estimator.
        pool: As in `pool_features`.
        **options: The other options of the probe.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    frames = []
    for site in sites:
        features = get(site)
        for name in names:
            frame = probe(features, name, pool=pool, **options).table
            frames.append(frame.assign(site=site)[["site", *frame.columns.drop("site", errors="ignore")]])
    return pd.concat(frames, ignore_index=True)


def save_table(
    frame: pd.DataFrame, path: str | Path, store: str | Path, attributes: Mapping[str, Any], options: Mapping[str, Any]
) -> str | Path:
    """Writes a table and, beside it as .json, where it comes from: store, request, options, versions.

    Timesteps get their ``log_snr`` beside them, where the store has it.

    Args:
        path: A path or an fsspec URL.
        store: Path of the store that the features came from; only its name is kept.
        attributes: The store's provenance, as `diffprobe.store.provenance` gives it.
        options: Options of the probe.
    """
    if "timestep" in frame and "log_snr" not in frame and "log_snr" in attributes:
        at = int(frame.columns.get_loc("timestep")) + 1  # type: ignore[arg-type]
        frame = frame.copy()
        frame.insert(at, "log_snr", frame["timestep"].map(attributes["log_snr"]))
    request = attributes.get("request", {})
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    kept = {name: request.get(name) for name in ("model", "revision", "weights", "dataset", "fingerprint")}
    kept["random_weights"] = attributes.get("random_weights")
    versions = package_versions(("diffprobe", "numpy", "scikit-learn", "scipy", "xarray"))
    origin = {"store": Path(str(store)).name, "request": digest, **kept, "options": dict(options), "versions": versions}
    sidecar = re.sub(r"(\.[^./]*)?$", ".json", str(path), count=1)
    with whole_file(sidecar) as beside, whole_file(path) as table:  # both files are complete before either gets its name
        table.write_text(frame.to_csv(index=False), encoding="utf-8", newline="")
        beside.write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
