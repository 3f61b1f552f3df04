"""Tables of how alike features are: between conditionings, guidance scales, sites, timesteps, stores, or paired images.

Both sets of features describe the same samples, matched by id.  The measures are those of `diffprobe.probes.measures`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from diffprobe.probes.measures import (
    BATCH,
    UndefinedError,
    cka_of_batches,
    cosines,
    jackknife_interval,
    minibatches,
    mutual_knn,
)
from diffprobe.probes.task import SPACE, Floats, Pool, finite, one_per, pool_features, sample_coordinate
from diffprobe.stats import bootstrap_interval
from diffprobe.store import LEVELS, features, site_names

Measure = Literal["cosine", "cosine_standardised", "cka", "cka_biased", "mutual_knn"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
BETWEEN = ("pair", "conditioning", "guidance", "timestep", "site", "store")


def similarity(
    first: xr.DataArray,
    other: xr.DataArray | None = None,
    *,
    along: str | None = None,
    measures: Measure | Sequence[Measure] = ("cka", "cka_biased"),
    groups: str | ArrayLike | None = None,
    pool: Pool = "flatten",
    batch: int = BATCH,
    k: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares two sets of features of the same samples, or every two entries of one set along a dimension.

    Samples are matched by id; those that only one side has are left out.  Dimensions that both sides have (timestep,
    conditioning, ...) are matched by label; each entry of a dimension that one side has is compared with the other side.

    Measures:
        cosine: of the two feature vectors at the same position, averaged over positions, then over samples (needs
            equal sites).  Chance is the same with the other samples' features.
        cosine_standardised: the same after every channel is brought to mean 0 and deviation 1 over all samples and
            positions of both sides, because a few channels with large means make any two raw vectors alike.
        cka: linear CKA with the unbiased estimator of HSIC; see `cka`.
        cka_biased: the same with the plain estimator, which rises towards 1 when there are more features than samples.
        mutual_knn: the share of `k` nearest neighbours that a sample has in both sets; see `mutual_knn`.

    Args:
        first: (sample, ..., channel) or (sample, ..., channel, y, x).
        other: The same; other channels and places are fine except for cosines.  Absent when `along` is given.
        along: A dimension of `first` whose entries are compared two by two.
        measures: One or several of `MEASURES`.
        groups: A coordinate on `sample`, or one id a sample of `first`: samples that belong together (twin images).
            Intervals leave out, and chance passes over, whole groups.
        pool: How a map becomes a sample's row for CKA and neighbours: "flatten" or "mean", as in `pool_features`.
        batch: Rows of one Gram matrix; with more samples, CKA is averaged over random minibatches.
        k: Neighbours.
        seed: Seed of minibatches and bootstrap.

    Returns:
        One row per comparison and measure.  A coordinate that both sides share stands once (timestep), one that
        differs twice (timestep_a, timestep_b); then measure, value, low, high (95%), chance, excess (value minus
        chance) with excess_low and excess_high where chance was itself measured, n (samples), n_groups, seed, and the
        reason where a value is NaN because the measure is not defined there.

    Raises:
        ValueError: For an unknown measure, no samples in common, or too few.

    >>> rng = np.random.default_rng(0)
    >>> maps = xr.DataArray(rng.normal(size=(40, 2, 8)), dims=("sample", "conditioning", "channel"))
    >>> turned = maps.copy(data=maps.values @ np.linalg.qr(rng.normal(size=(8, 8)))[0])
    >>> frame = similarity(maps, turned, measures="cka")
    >>> frame[["conditioning", "measure"]].to_numpy().tolist(), frame["value"].round(3).tolist()
    ([[0, 'cka'], [1, 'cka']], [1.0, 1.0])
    >>> bool(similarity(maps, along="conditioning", measures="cka").loc[0, "value"] < 0.3)
    True
    """
    chosen = [measures] if isinstance(measures, str) else list(measures)
    if unknown := [m for m in chosen if m not in MEASURES]:
        raise ValueError(f"Measure {unknown[0]!r} is not one of {', '.join(MEASURES)}.")
    if (other is None) == (along is None):
        raise ValueError("Give either a second set of features or a dimension `along` which to compare.")
    if along is not None and along not in first.dims:
        raise ValueError(f"`along` names a dimension of the features, which has {first.dims}; got {along!r}.")
    if pool not in ("flatten", "mean"):
        raise ValueError(f"`pool` is 'flatten' or 'mean': a row is a sample; got {pool!r}.")
    ids = _group_ids(first, groups)
    rows = []
    for place, a, b, members in _comparisons(first, other, along, ids):
        for measure in chosen:
            reason = ""
            try:
                if measure.startswith("cosine"):
                    found = _cosine_row(a, b, members, measure == "cosine_standardised", seed)
                elif measure == "mutual_knn":
                    found = _neighbour_row(_matrix(a, pool), _matrix(b, pool), members, k, seed)
                else:
                    estimate = cka_of_batches(_blocks(a, b, members, batch, pool, seed), unbiased=measure == "cka")
                    found = _row(estimate.value, estimate.low, estimate.high, estimate.chance)
            except UndefinedError as error:
                found, reason = _row(np.nan, np.nan, np.nan, np.nan), str(error)
            counts = {"n": a.sizes["sample"], "n_groups": len(np.unique(members)), "seed": seed, "reason": reason}
            rows.append({**place, "measure": measure, **found, **counts})
    return pd.DataFrame(rows)


def split_pairs(both: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Splits image pairs into two arrays, one per side, whose samples are the pairs; incomplete pairs are left out.

    Args:
        both: (sample, ...) with coordinates `pair` and `side` on the samples, as twins have them.

    Raises:
        ValueError: the labels are missing, or there are not two sides.

    >>> both = xr.DataArray([[1.0], [2.0], [3.0]], dims=("sample", "channel"))
    >>> both = both.assign_coords(pair=("sample", [7, 7, 8]), side=("sample", ["a", "b", "a"]))
    >>> a, b = split_pairs(both)
    >>> a.values.tolist(), b.values.tolist(), a["sample"].values.tolist()
    ([[1.0]], [[2.0]], [7])
    """
    if absent := [name for name in ("pair", "side") if name not in both.coords]:
        raise ValueError(
            f"Pairs are told by the labels 'pair' and 'side'; {absent[0]!r} is not among this store's. "
            "Datasets such as shapes-mmvp:N have them; for photographs write them into captions.jsonl."
        )
    labels = pd.DataFrame({name: both[name].values for name in ("pair", "side")})
    labels = labels[labels.notna().all(axis=1) & (labels != "").all(axis=1)].rename_axis("row").reset_index()
    sides = sorted(set(labels["side"]))
    if len(sides) != 2:
        raise ValueError(f"Pairs have two sides; the label 'side' has {', '.join(map(str, sides))}.")
    if labels.duplicated(["pair", "side"]).any():
        raise ValueError("A pair has one image of each side; some value of 'pair' has several.")
    first, second = (labels[labels["side"] == side] for side in sides)
    pairs = first.merge(second, on="pair")  # in the order of the first side
    kept = both.drop_vars(["pair", "side"])
    a, b = (kept.isel(sample=pairs[row]).assign_coords(sample=pairs["pair"].tolist()) for row in ("row_x", "row_y"))
    return a, b


def _cosine_row(a: xr.DataArray, b: xr.DataArray, members: NDArray[Any], standardise: bool, seed: int) -> dict[str, float]:
    own, met = cosines(a, b, standardise=standardise, groups=members)
    if bare := int(np.isnan(own).sum()):
        kind = "constant over all samples and positions" if standardise else "zero"
        raise UndefinedError(f"{bare} of {len(own)} samples have no cosine: their features are {kind} on one side")
    grouped = len(np.unique(members)) < len(members)
    low, high = bootstrap_interval(own, members if grouped else None, seed=seed)
    index, counts = np.unique(members, return_inverse=True, return_counts=True)[1:]
    n, groups = len(own), len(counts)
    # Chance is a mean over pairs of samples: its interval, and that of the difference, must know that a sample is in
    # many of them, so they leave a group out of all of its pairs (the jackknife of a U-statistic).
    strangers = n - counts[index]
    by_group = np.bincount(index, met * strangers, groups)
    meetings = float(strangers.sum())
    chance = float(by_group.sum() / meetings) if groups > 1 else np.nan
    excess = float(own.mean()) - chance
    if groups < 3:
        return _row(float(own.mean()), low, high, chance)
    left = (own.sum() - np.bincount(index, own, groups)) / (n - counts)
    left -= (by_group.sum() - 2 * by_group) / (meetings - 2 * counts * (n - counts))
    return _row(float(own.mean()), low, high, chance, *jackknife_interval(excess, left))


def _neighbour_row(x: Floats, y: Floats, members: NDArray[Any], k: int, seed: int) -> dict[str, float]:
    overlap = mutual_knn(x, y, k)
    if bare := int(np.isnan(overlap).sum()):
        raise UndefinedError(
            f"{bare} of {len(x)} samples have no nearest neighbours: the features of one side are constant or zero"
        )
    low, high = bootstrap_interval(overlap, members if len(np.unique(members)) < len(members) else None, seed=seed)
    return _row(float(overlap.mean()), low, high, k / (len(x) - 1))


# --- from a store ---------------------------------------------------------------------------------


def store_similarity(
    tree: xr.DataTree,
    between: str,
    *,
    other: xr.DataTree | None = None,
    sites: Sequence[str] = (),
    conditioning: str = "caption",
    guidance: Sequence[float] = (1.0, 1.5, 4.0, 7.0),
    groups: str | None = None,
    measures: Sequence[Measure] = (),
    **options: Any,
) -> pd.DataFrame:
    """Compares the features of a store, site by site.

    Args:
        tree: An opened store.
        between: "pair" (the two images of a pair), "conditioning" or "timestep" (every two), "guidance" (f_u + s (f_c - f_u)
            with f_u), "site" (every two), or "store" (every site of `tree` with every site of `other`, at the same noise).
        other: The second store, over the same samples.
        sites: By default all that have features.
        conditioning: f_c of the guidance.
        guidance: The scales s.
        groups: The label of samples that belong together.
        measures: By default both cosines for pairs, and both CKAs otherwise.
        **options: The other options of `similarity`.

    Returns:
        The tables of `similarity`, with the columns site (or site_a, site_b) and, for guidance, `guidance`.
    """
    if between not in BETWEEN:
        raise ValueError(f"Similarity between {between!r} is not known; choose one of {', '.join(BETWEEN)}.")
    if (between == "store") != (other is not None):
        raise ValueError("Give a second store, and only with between='store'.")
    usual: tuple[Measure, ...] = ("cosine", "cosine_standardised") if between == "pair" else ("cka", "cka_biased")
    settings: dict[str, Any] = {"measures": tuple(measures) or usual, "groups": groups, **options}
    names = list(sites) or _sites(tree)
    frames = []
    if between == "pair":
        frames = [similarity(*split_pairs(features(tree, name)), **settings) for name in names]
    elif between in ("conditioning", "timestep"):
        frames = [similarity(features(tree, name), along=between, **settings) for name in names]
    elif between == "guidance":
        for name in names:
            plain = features(tree, name, conditioning="null")
            for s in guidance:
                guided = features(tree, name, conditioning=conditioning, guidance=s)
                found = similarity(guided, plain, **settings).drop(columns=["conditioning_a", "conditioning_b"])
                frames.append(found.assign(conditioning=conditioning, guidance=s))
    elif between == "site":
        frames = [similarity(features(tree, a), features(tree, b), **settings) for a, b in itertools.combinations(names, 2)]
    else:
        assert other is not None
        pairs = itertools.product(names, _sites(other))
        frames = [similarity(*same_noise(features(tree, a), features(other, b)), **settings) for a, b in pairs]
    if not frames:
        raise ValueError(f"Similarity between {between}s needs at least two; there is only {', '.join(names) or 'nothing'}.")
    return pd.concat(frames, ignore_index=True)


SAME_NOISE = 0.25  # of log-SNR; neighbours among the usual timesteps are 1 and more apart


def same_noise(a: xr.DataArray, b: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The timesteps of two models at which the noise is the same, under the first one's timesteps.

    A timestep means another noise in another schedule; the logarithm of the signal-to-noise ratio is what they share.

    Raises:
        ValueError: there is none; the message has both models' noise levels.

    >>> a = xr.DataArray(np.zeros(2), dims="timestep", coords={"timestep": [10, 50], "log_snr": ("timestep", [4.6, 3.0])})
    >>> b = xr.DataArray(np.ones(1), dims="timestep", coords={"timestep": [184], "log_snr": ("timestep", [2.98])})
    >>> [side["timestep"].values.tolist() for side in same_noise(a, b)]
    [[50], [50]]
    """
    if not all("timestep" in side.dims and "log_snr" in side.coords for side in (a, b)):
        return a, b
    mine, theirs = (side["log_snr"].values for side in (a, b))
    equal = mine[:, None] == theirs[None]  # pure noise, too, whose logarithm is infinite
    with np.errstate(invalid="ignore"):
        apart = np.where(equal, 0, np.abs(mine[:, None] - theirs[None]))
    pairs = [(row, int(apart[row].argmin())) for row in range(len(mine)) if apart[row].min() <= SAME_NOISE]
    if not pairs:
        raise ValueError(
            f"The two stores share no noise level: their log-SNRs are {', '.join(f'{v:.3g}' for v in mine)} and "
            f"{', '.join(f'{v:.3g}' for v in theirs)}. Extract both with the same --log-snr."
        )
    rows, columns = ([pair[side] for pair in pairs] for side in (0, 1))
    left, right = a.isel(timestep=rows), b.isel(timestep=columns)
    return left, right.assign_coords(timestep=left["timestep"].values)


def _sites(tree: xr.DataTree) -> list[str]:
    return [n for n in site_names(tree) if "features" in tree[n].data_vars]


# --- what is compared with what -------------------------------------------------------------------


def _group_ids(array: xr.DataArray, groups: str | ArrayLike | None) -> xr.DataArray:
    """One group number per sample, with the sample ids as coordinate."""
    count = array.sizes["sample"]
    given = sample_coordinate(array, groups) if isinstance(groups, str) else groups
    values = np.arange(count) if given is None else one_per(given, count, "groups")
    coords = {"sample": array["sample"].values} if "sample" in array.coords else {}
    return xr.DataArray(np.unique(values, return_inverse=True)[1], dims="sample", coords=coords)


Comparison = tuple[dict[str, Any], xr.DataArray, xr.DataArray, NDArray[np.int64]]


def _comparisons(first: xr.DataArray, other: xr.DataArray | None, along: str | None, ids: xr.DataArray) -> Iterator[Comparison]:
    """Pairs of blocks (sample, channel, y, x) to compare, with their place and their samples' groups."""
    if along is not None:
        for i, j in itertools.combinations(range(first.sizes[along]), 2):
            yield from _comparisons(first.isel({along: i}), first.isel({along: j}), None, ids)
        return
    assert other is not None
    a, b, ids = _aligned(first, other, ids)
    row = ("sample", "channel", *SPACE)
    outer = [d for d in dict.fromkeys([*a.dims, *b.dims]) if d not in row]
    sizes = [a.sizes[d] if d in a.dims else b.sizes[d] for d in outer]
    for index in np.ndindex(*sizes):
        at = dict(zip(outer, index, strict=True))
        left = a.isel({d: i for d, i in at.items() if d in a.dims})
        right = b.isel({d: i for d, i in at.items() if d in b.dims})
        free = {str(d): i for d, i in at.items()}  # number of an entry whose dimension has no labels
        yield {**free, **_place(left, right)}, left, right, ids.values


def _aligned(a: xr.DataArray, b: xr.DataArray, ids: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    if "sample" in a.indexes and "sample" in b.indexes:
        for array in (a, b):
            if not array.indexes["sample"].is_unique:
                raise ValueError("Samples are matched by id, and some ids stand twice; select one row of each.")
        shared = [s for s in a["sample"].values.tolist() if s in set(b["sample"].values.tolist())]
        if not shared:
            raise ValueError(
                f"The two sets of features have no sample in common: one has {str(a['sample'].values[0])!r}, the other "
                f"{str(b['sample'].values[0])!r}. Extract both from the same dataset."
            )
    apart = [d for d in ("channel", *SPACE) if d in a.dims or d in b.dims]
    try:
        left, right = xr.align(a, b, join="inner", exclude=apart)
    except ValueError as error:
        raise ValueError(f"The two sets of features do not fit: sizes {dict(a.sizes)} and {dict(b.sizes)}.") from error
    if empty := [str(d) for d in left.dims if left.sizes[d] == 0]:
        raise ValueError(f"The two sets of features have no {empty[0]} in common.")
    return left, right, ids.sel(sample=left["sample"]) if "sample" in ids.indexes else ids


def _place(a: xr.DataArray, b: xr.DataArray) -> dict[str, Any]:
    """Scalar coordinates and sites of two blocks: NAME where they agree or one has none, NAME_a and NAME_b where not."""
    left, right = (
        # the site is an attribute of what a store gives: a coordinate of that name may be a label of the samples
        {str(n): c.item() for n, c in block.coords.items() if c.ndim == 0 and n not in LEVELS}
        | {k: block.attrs[k] for k in ("site",) if k in block.attrs}
        for block in (a, b)
    )
    place: dict[str, Any] = {}
    for name in dict.fromkeys([*left, *right]):
        if name in left and name in right and left[name] != right[name]:
            place |= {f"{name}_a": left[name], f"{name}_b": right[name]}
        else:
            place[name] = left.get(name, right.get(name))
    return place


def _row(
    value: float, low: float, high: float, chance: float, excess_low: float = np.nan, excess_high: float = np.nan
) -> dict[str, float]:
    ends = {"excess": value - chance, "excess_low": excess_low, "excess_high": excess_high}
    return {"value": value, "low": low, "high": high, "chance": chance, **ends}


def _blocks(
    a: xr.DataArray, b: xr.DataArray, members: NDArray[np.int64], batch: int, pool: Pool, seed: int
) -> Iterator[tuple[Floats, Floats, NDArray[Any]]]:
    """Reads one minibatch at a time, so that a store may be larger than memory."""
    for rows in minibatches(members, batch, seed):
        yield _matrix(a.isel(sample=rows), pool), _matrix(b.isel(sample=rows), pool), members[rows]


def _matrix(block: xr.DataArray, pool: Pool) -> Floats:
    """(sample, column) in memory."""
    return finite(pool_features(block, pool).transpose("sample", "channel").to_numpy())
