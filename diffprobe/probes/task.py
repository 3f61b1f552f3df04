"""The task of a probe: which rows it sees, what they should say, and how its answers are scored.

Features are (sample, ..., channel) or (sample, ..., channel, y, x); one probe is fitted for every combination of the
dimensions in between (timestep, conditioning, ...).  Every kind of probe shares this file, so their tables compare.  The
invariant: a probe meets the test rows once, after every choice was made on other samples, and all combinations share one
split, so their scores are paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from diffprobe.data.labels import PARTS
from diffprobe.data.samples import did_you_mean
from diffprobe.store import LEVELS

Task = Literal["classification", "regression"]
Pool = Literal["mean", "flatten", "patches"]
Ids = str | ArrayLike | xr.DataArray  # a coordinate's name, or one value per sample
Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]

FOLDS = 5  # one to test, one to validate, three to train
FOLD_OF = {"test": 0, "validation": 1, "train": 2}  # the folds of a split by name
MOST_CLASSES = 20  # whole numbers with more distinct values than this are measured, not classified
SPACE = ("y", "x")
INNER = ("sample", "channel", "patch", *SPACE)  # the dimensions of what one probe is fitted on


# --- features -----------------------------------------------------------------------------------------


def as_features(features: xr.DataArray | ArrayLike) -> xr.DataArray:
    """Names the axes of a plain array: (sample, channel) or (sample, channel, y, x); a DataArray is checked.

    Raises:
        ValueError: the array has other axes, or lacks the dimension sample or channel.

    >>> as_features(np.ones((3, 8))).dims
    ('sample', 'channel')
    """
    if isinstance(features, xr.DataArray):
        need_dimensions(features, "sample", "channel")
        return features
    values = np.asarray(features)
    if values.ndim not in (2, 4):
        raise ValueError(
            "Features without named dimensions are (sample, channel) or (sample, channel, y, x); "
            f"got shape {values.shape}. Give an xarray.DataArray with named dimensions."
        )
    return xr.DataArray(values, dims=("sample", "channel", *SPACE)[: values.ndim])


def need_dimensions(features: xr.DataArray, *names: str) -> None:
    """Raises ValueError unless the features have these dimensions."""
    if missing := [name for name in names if name not in features.dims]:
        raise ValueError(f"Features need the dimensions {', '.join(names)}; {', '.join(missing)} is not in {features.dims}.")


def finite(values: NDArray[Any], unit: str = "samples") -> Floats:
    """The values in float64.

    Raises:
        ValueError: entries along the first axis, called `unit`, are not finite.
    """
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        bad = int((~np.isfinite(wide)).any(axis=tuple(range(1, wide.ndim))).sum())
        raise ValueError(f"{bad} of {len(wide)} {unit} are not finite; select the finished samples first.")
    return wide


def pool_features(features: xr.DataArray, pool: Pool = "mean") -> xr.DataArray:
    """Removes y and x, in float32, as `pool=` does everywhere in this package.

    Args:
        features: (..., channel, y, x).
        pool: "mean" averages the places: (..., channel).  "flatten" makes one column of every channel and place:
            (..., channel * y * x).  "patches" keeps every place as a row of its own: (..., patch, channel).

    >>> maps = xr.DataArray(np.ones((2, 3, 4, 4), np.float16), dims=("sample", "channel", "y", "x"))
    >>> pool_features(maps).shape, pool_features(maps, "flatten").shape, pool_features(maps, "patches").shape
    ((2, 3), (2, 48), (2, 16, 3))
    """
    if pool not in ("mean", "flatten", "patches"):
        raise ValueError(f"`pool` is 'mean', 'flatten' or 'patches'; got {pool!r}.")
    space = [d for d in SPACE if d in features.dims]
    wide = features.astype(np.float32)
    if pool == "patches":
        if "patch" in features.dims:
            return wide
        if len(space) < 2:
            raise ValueError(f"pool='patches' needs the dimensions y and x; these features have {features.dims}.")
        return wide.stack(patch=space, create_index=False).transpose(..., "patch", "channel")
    if pool == "mean":
        return wide.mean(space)
    if space:
        wide = wide.drop_vars(["channel", *space], errors="ignore")
        return wide.stack(column=["channel", *space], create_index=False).rename(column="channel")
    return wide


def outer_dimensions(features: xr.DataArray, inner: Sequence[str] = INNER) -> list[Hashable]:
    """The dimensions of which every combination gets a probe of its own."""
    return [d for d in features.dims if d not in inner]


def combinations(features: xr.DataArray, inner: Sequence[str] = INNER) -> Iterator[tuple[dict[str, Any], xr.DataArray]]:
    """Every block along the outer dimensions, with the scalar coordinates that say where it lies."""
    outer = outer_dimensions(features, inner)
    fixed = {str(n): c.item() for n, c in features.coords.items() if c.ndim == 0 and n not in LEVELS}
    for index in np.ndindex(*(features.sizes[d] for d in outer)):
        block = features.isel(dict(zip(outer, index, strict=True)))
        here = {str(d): block[d].item() if d in block.coords else i for d, i in zip(outer, index, strict=True)}
        yield {**fixed, **here}, block


def matrix(block: xr.DataArray) -> NDArray[np.float32]:
    """(row, column) in memory; rows run over sample, then over patch."""
    order = ("sample", *(d for d in ("patch",) if d in block.dims), "channel")
    return np.asarray(block.transpose(*order).to_numpy(), np.float32).reshape(-1, block.sizes["channel"])


def check_rows(x: NDArray[Any], place: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the place, where features (row, column) are not finite."""
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        where = ", ".join(f"{k}={v!r}" for k, v in place.items()) or "the only place"
        raise ValueError(f"Features at {where} are not finite in {bad} of {len(x)} rows; select the finished samples first.")


# --- the problem: which rows, which targets, which fold ---------------------------------------------


def split_folds(target: ArrayLike, groups: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Deals groups into `FOLDS` folds so that each fold sees the target's whole distribution.

    Groups are ordered by their most frequent (classes) or mean (quantities) target, ties at random; every run of five
    neighbours is then dealt to the five folds in random order.  Rare classes need no special case.

    Args:
        target: (row,) integers are classes, floats are quantities.
        groups: (row,) ids that stay together.

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


@dataclass(frozen=True)
class Settings:
    """How every combination is fitted.

    Attributes:
        parameter: The estimator's parameter that is chosen on validation rows; None where nothing is chosen.
        choices: Its values, the smoothest probe first; of equal scores the first is taken.
        cross_fit: Whether every fold is the test fold once.
        keep_rows: Whether the table keeps each test row's own score.
    """

    parameter: str | None
    choices: tuple[Any, ...]
    control: bool
    seed: int
    n_resamples: int
    cross_fit: bool = False
    keep_rows: bool = False

    @property
    def turns(self) -> int:
        """How many folds are the test fold in turn."""
        return FOLDS if self.cross_fit else 1


@dataclass(frozen=True)
class Problem:
    """What all combinations share.  Rows are (sample,) or, for patches, (sample * patch,)."""

    name: str
    task: Task
    target: NDArray[Any]  # (row,) class codes or floats; undefined where `keep` is False
    control: NDArray[Any]  # (row,) targets of the control task
    keep: Rows  # (row,) whether the label is known
    control_keep: Rows
    folds: NDArray[np.int64]  # (row,)
    clusters: NDArray[np.int64] | None  # (row,)
    classes: tuple[Any, ...]
    patches: bool

    def parts(self, turn: int = 0) -> tuple[Rows, Rows, Rows]:
        """Masks of the rows to train on, to validate on and to test on; `turn` is the number of the test fold."""
        folds = (self.folds - turn) % FOLDS
        there = self.keep & (self.folds >= 0)
        return there & (folds > 1), there & (folds == 1), there & (folds == 0)

    @staticmethod
    def of(
        features: xr.DataArray,
        label: Ids,
        *,
        task: Task | Literal["auto"] = "auto",
        pool: Pool = "mean",
        types: Ids | None = None,
        groups: Ids | None = None,
        split: Ids | None = None,
        seed: int = 0,
    ) -> Problem:
        """Reads labels, split and control labels; of the features only the shape and the coordinates are used."""
        n_samples = features.sizes["sample"]
        places = [features.sizes[d] for d in ("patch", *SPACE) if d in features.dims] if pool == "patches" else []
        per_sample = int(np.prod(places, dtype=int))
        name, table = _label_table(features, label, pool == "patches")  # (sample, 1 or patch)
        known = ~(pd.isna(table) | (table == "")) if table.dtype == object else np.isfinite(table)
        chosen, codes, classes = _encode(name, table, known, task)
        ids = features["sample"].to_numpy() if "sample" in features.coords else np.arange(n_samples)
        sample_index = np.unique(ids, return_inverse=True)[1]
        repeated = int(sample_index.max(initial=0)) + 1 < n_samples
        units = sample_index if groups is None else _numbered(features, groups, "groups")
        usable = known.any(axis=1)
        if split is not None:
            folds = _given_folds(features, split, units)
        elif (found := len(np.unique(units[usable]))) < 2 * FOLDS:
            raise ValueError(f"Label {name!r} is known for {found} independent samples; a split needs at least {2 * FOLDS}.")
        else:
            # a sample is dealt by its label, or by the commonest (mean) label of its patches
            own = [codes[i, known[i]] for i in np.flatnonzero(usable)]
            typical = [s[0] if s.size == 1 else s.mean() if chosen == "regression" else np.bincount(s).argmax() for s in own]
            folds = np.full(n_samples, -1)
            folds[usable] = split_folds(np.array(typical), units[usable], seed)
        kinds = None if types is None else _numbered(features, types, "types")
        control, control_known = _control_labels(codes, known, sample_index if kinds is None and repeated else kinds, seed)
        wide = (n_samples, per_sample)
        clustered = repeated or groups is not None or per_sample > 1
        return Problem(
            name=name,
            task=chosen,
            target=np.broadcast_to(codes, wide).ravel(),
            control=np.broadcast_to(control, wide).ravel(),
            keep=np.broadcast_to(known, wide).ravel(),
            control_keep=np.broadcast_to(control_known, wide).ravel(),
            folds=np.repeat(folds, per_sample),
            clusters=np.repeat(units, per_sample) if clustered else None,
            classes=classes,
            patches=per_sample > 1,
        )


def check_split(problem: Problem, settings: Settings, split: Ids | None) -> None:
    """Raises ValueError where a split of one's own does not go with the settings."""
    if split is not None and settings.cross_fit:
        raise ValueError("cross_fit=True deals the folds itself; leave out `split`.")
    if split is not None and len(settings.choices) > 1 and not problem.parts()[1].any():
        parameter = str(settings.parameter).rpartition("__")[2]
        raise ValueError(f"`split` has no 'validation' rows to choose {parameter!r} on; add some, or give one value.")


def sample_coordinate(
    features: xr.DataArray, name: str, dimensions: Sequence[tuple[str, ...]] = (("sample",),)
) -> xr.DataArray:
    """A coordinate of the samples by name.

    Raises:
        ValueError: there is none; the message lists those there are and the closest.
    """
    there = [str(n) for n, c in features.coords.items() if n not in ("sample", "status") and c.dims in dimensions]
    if name not in there:
        listed = ", ".join(sorted(there)) or "none"
        raise ValueError(f"Label {name!r} is not among the samples' labels ({listed}).{did_you_mean(name, there)}")
    return features.coords[name]


def _label_table(features: xr.DataArray, label: Ids, patches: bool) -> tuple[str, NDArray[Any]]:
    """The label's name and its values as (sample, 1), or (sample, patch) for label maps."""
    space = tuple(d for d in ("patch", *SPACE) if patches and d in features.dims)
    shapes = [("sample",), ("sample", *space)]
    if isinstance(label, str):
        label = sample_coordinate(features, label, shapes)
    name = str(getattr(label, "name", None) or "label")
    if isinstance(label, xr.DataArray):
        if "sample" in label.dims and "sample" in label.indexes and "sample" in features.coords:
            missing = set(features["sample"].to_numpy().tolist()) - set(label["sample"].to_numpy().tolist())
            if missing:
                raise ValueError(f"Label {name!r} has no entry for {len(missing)} samples, such as {sorted(missing)[0]!r}.")
            if label.indexes["sample"].is_unique:
                label = label.sel(sample=features["sample"])
        label = label.transpose(*[d for d in ("sample", "patch", *SPACE) if d in label.dims])
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
    name: str, table: NDArray[Any], known: Rows, task: Task | Literal["auto"]
) -> tuple[Task, NDArray[Any], tuple[Any, ...]]:
    """Chooses the task; codes the labels as class numbers or floats, with 0 where they are missing."""
    values = table[known]
    distinct = pd.unique(values)
    numeric = table.dtype.kind in "iuf"
    if task == "auto":
        continuous = numeric and (len(distinct) > MOST_CLASSES or bool(np.any(distinct % 1 != 0)))
        task = "regression" if continuous else "classification"
    if task not in ("classification", "regression"):
        raise ValueError(f"`task` is 'classification', 'regression' or 'auto'; got {task!r}.")
    if len(distinct) < 2:
        found = f"only {distinct[0]!r}" if len(distinct) else "nothing"
        raise ValueError(f"Label {name!r} holds {found} in {values.size} known entries; a probe needs at least two values.")
    if task == "regression":
        if not (numeric or table.dtype.kind == "b"):
            raise ValueError(
                f"Label {name!r} holds words such as {distinct[0]!r}; regression needs numbers, use task='classification'."
            )
        return task, np.where(known, table, 0).astype(np.float64), ()
    classes = tuple(sorted(distinct.tolist(), key=lambda v: (type(v).__name__, v)))
    codes = np.zeros(table.shape, np.int64)
    codes[known] = pd.Index(classes, dtype=values.dtype).get_indexer(values)
    return task, codes, classes


def _given_folds(features: xr.DataArray, split: Ids, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fold numbers of a split by the names that `PARTS` knows; samples that are in no part get -1."""
    values = _values(features, split, "split")
    parts_named = [PARTS.get(str(value).strip().lower()) for value in values.tolist()]
    folds = np.array([FOLD_OF[part] if part else -1 for part in parts_named], np.int64)
    if missing := [part for part in ("train", "test") if not (folds == FOLD_OF[part]).any()]:
        raise ValueError(
            f"`split` says 'train', 'validation' or 'test' of each sample; none is {missing[0]!r}, "
            f"it holds {', '.join(sorted({str(v) for v in values.tolist()})[:5])}."
        )
    parts = pd.Series(folds[folds >= 0]).groupby(units[folds >= 0]).nunique()
    if (parts > 1).any():
        raise ValueError(
            f"{int((parts > 1).sum())} samples or groups stand in several parts of `split`; a part's rows would be known from another."
        )
    return folds


def _control_labels(codes: NDArray[Any], known: Rows, kinds: NDArray[np.int64] | None, seed: int) -> tuple[NDArray[Any], Rows]:
    """Random labels that belong to types, or the samples' labels permuted; with the mask of known ones."""
    rng = np.random.default_rng([seed, 1])
    if kinds is not None:
        drawn = rng.choice(codes[known], size=int(kinds.max()) + 1)
        return drawn[kinds][:, None], np.asarray(known.any(axis=1, keepdims=True))
    control, control_known = codes.copy(), known.copy()
    usable = np.flatnonzero(known.any(axis=1))
    source = rng.permutation(usable)
    control[usable], control_known[usable] = codes[source], known[source]
    return control, control_known


def _values(features: xr.DataArray, ids: Ids, name: str) -> NDArray[Any]:
    """One value per sample, given as such or as a coordinate's name."""
    return one_per(sample_coordinate(features, ids) if isinstance(ids, str) else ids, features.sizes["sample"], name)


def _numbered(features: xr.DataArray, ids: Ids, name: str) -> NDArray[np.int64]:
    return number_ids(_values(features, ids, name), features.sizes["sample"], name)


def one_per(ids: ArrayLike | xr.DataArray, count: int, name: str, unit: str = "sample") -> NDArray[Any]:
    """The ids as an array.

    Raises:
        ValueError: there is not one id per unit; the message calls the ids `name`.
    """
    values = np.asarray(ids)
    if values.shape != (count,):
        raise ValueError(f"`{name}` needs one id per {unit}, shape ({count},); got shape {values.shape}.")
    return values


def number_ids(ids: ArrayLike, count: int, name: str, unit: str = "sample") -> NDArray[np.int64]:
    """Ids as numbers from 0 in the order of their first appearance; errors as for `one_per`.

    >>> number_ids(["b", "a", "b"], 3, "groups").tolist()
    [0, 1, 0]
    """
    return np.asarray(pd.factorize(one_per(ids, count, name, unit), use_na_sentinel=False)[0], dtype=np.int64)
