"""Does the same place on an object have the same feature in another image?  Percentage of correct keypoints (PCK).

A keypoint's feature in the source image is looked for in the target image: the predicted place is the target position of
highest cosine.  It is correct within alpha times the larger side of the object's box (Yang & Ramanan 2013; for diffusion
features Tang et al. 2023).  The invariant: each score comes with the scores of guesses without features: a random position
in the image, a random position in the object's box, and the source's own coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from diffprobe.data.keypoints import KeypointPair
from diffprobe.probes.localization import bilinear_weights
from diffprobe.probes.measures import ROUNDING, standardised
from diffprobe.probes.task import SPACE, Floats, combinations, finite, need_dimensions
from diffprobe.stats import share_interval

STRIP = 16  # rows of the upsampled map in memory at once


def correspondence(
    features: xr.DataArray,
    pairs: Sequence[KeypointPair],
    *,
    alphas: Sequence[float] = (0.1,),
    grid: int = 96,
    standardise: bool = True,
    by_category: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """PCK of nearest-neighbour matches: two rows (per point, per image) for each timestep, conditioning, ...

    "point" is the share of correct points over all pairs; "image" is the mean of the pairs' own shares, so that images
    with many points weigh no more.  Intervals are bootstrapped over groups of pairs (Wilson's over groups where all or
    none are correct).

    Args:
        features: (sample, ..., channel, y, x) with sample ids.
        pairs: From `diffprobe.data.keypoints` or `diffprobe.data.spair`; pairs whose images are not among the samples
            are left out.
        alphas: Tolerances, as a share of the larger side of the target object's box.
        grid: Rows and columns of the target's upsampled (bilinear) map: the resolution of predicted places.
        standardise: Bring channels to mean 0 and deviation 1 over all samples and positions first, because a few with
            large means decide a raw cosine.  Published scores of diffusion features (DIFT) do not.
        by_category: Adds rows for each category.

    Returns:
        The coordinates of the dimensions in between, per ("point" or "image"), category ("all" or one), alpha, value,
        low, high, chance (a random position in the image), chance_box (a random position in the object's box, as if the
        object were found and its parts not), position (the source's coordinates) with position_low and position_high,
        n (points or pairs), n_groups, seed, and the reason where value is NaN because some point has no nearest place.

    Raises:
        ValueError: no pair's images are among the samples, missing dimensions, or non-finite features.

    >>> tree = open_store("runs/twins.zarr")  # doctest: +SKIP
    >>> pairs = twin_keypoints(load_dataset(provenance(tree)["data"]))  # doctest: +SKIP
    >>> correspondence(features(tree, "U-L1-Out"), pairs)[["timestep", "per", "value", "chance"]]  # doctest: +SKIP
    """
    need_dimensions(features, "sample", "channel", *SPACE)
    if not alphas or min(alphas) <= 0 or grid < 2:
        raise ValueError(f"Tolerances are positive and the grid has at least 2 rows; got {list(alphas)} and {grid}.")
    ids = [str(s) for s in features["sample"].values] if "sample" in features.coords else []
    rows_of = {name: row for row, name in enumerate(ids)}
    known = [p for p in pairs if p.source in rows_of and p.target in rows_of]
    if not known:
        example = f"the first pair is {pairs[0].source!r} and {pairs[0].target!r}" if pairs else "there are no pairs"
        raise ValueError(f"No pair has both images among the samples: {example}; the samples begin with {ids[:2]}.")
    blind = pd.concat([_blind(p, number, alphas, grid) for number, p in enumerate(known)], ignore_index=True)
    tables = []
    for place, block in combinations(features):
        maps = _maps(block, standardise)
        found = [match(maps[rows_of[p.source]], maps[rows_of[p.target]], p.source_points, grid) for p in known]
        errors = np.concatenate([_distances(p, guess) / p.box_side for p, guess in zip(known, found, strict=True)])
        for alpha in alphas:
            points = blind[blind["alpha"] == alpha].assign(right=np.where(np.isnan(errors), np.nan, errors <= alpha))
            kinds = ["all", *(sorted(set(points["category"])) if by_category else [])]
            for kind in kinds:
                part = points if kind == "all" else points[points["category"] == kind]
                for per in ("point", "image"):
                    tables.append({**place, "per": per, "category": kind, "alpha": alpha, **_scores(part, per, seed)})
    return pd.DataFrame(tables)


def match(source: Floats, target: Floats, points: Floats, grid: int = 96) -> Floats:
    """The target positions whose features have the highest cosine with the source's features at some points.

    Both maps are interpolated bilinearly with pixel centres in place: the source at the points, the target on a
    grid x grid raster whose cell centres are the candidates.

    Args:
        source: (channel, y, x).
        target: (channel, y, x); its own height and width.
        points: (point, 2), x and y as fractions.
        grid: Rows and columns of candidates.

    Returns:
        (point, 2), x and y as fractions; NaN where the source is zero or all target positions have the same cosine.

    >>> source = np.eye(4).reshape(4, 2, 2)
    >>> match(source, source[:, :, ::-1], np.array([[0.25, 0.25]]), grid=2)  # what was left is right
    array([[0.75, 0.25]])
    """
    points = np.asarray(points, np.float64)
    across, down = (bilinear_weights(points[:, k] * source.shape[2 - k], source.shape[2 - k]) for k in (0, 1))
    asked = np.einsum("cyx,py,px->pc", source, down, across, optimize=True)
    length = np.linalg.norm(asked, axis=1, keepdims=True)
    asked /= np.where(length > 0, length, 1)
    centres = (np.arange(grid) + 0.5) / grid
    across, down = (bilinear_weights(centres * target.shape[2 - k], target.shape[2 - k]) for k in (0, 1))
    wide = target @ across.T  # (channel, y, grid)
    best, worst, where = np.full(len(asked), -np.inf), np.full(len(asked), np.inf), np.zeros(len(asked), np.int64)
    for start in range(0, grid, STRIP):
        strip = (down[start : start + STRIP] @ wide).reshape(len(target), -1)
        norms = np.linalg.norm(strip, axis=0)
        cosine = asked @ strip / np.where(norms > 0, norms, 1)
        likeness = np.where(norms > 0, cosine, -np.inf)  # zeros are like nothing
        worst = np.minimum(worst, np.where(norms > 0, cosine, np.inf).min(axis=1))
        place = likeness.argmax(axis=1)
        value = likeness[np.arange(len(asked)), place]
        better = value > best
        best[better], where[better] = value[better], place[better] + start * grid
    found = np.stack([centres[where % grid], centres[where // grid]], axis=1)
    return np.where((best - worst > ROUNDING)[:, None], found, np.nan)


def _distances(pair: KeypointPair, points: Floats) -> Floats:
    return np.asarray(np.hypot(*((points - pair.target_points) * pair.size).T))


def _blind(pair: KeypointPair, number: int, alphas: Sequence[float], grid: int) -> pd.DataFrame:
    """The scores of guesses without features: one row per point and tolerance, in the order of the points."""
    centres = (np.arange(grid) + 0.5) / grid
    y, x = np.meshgrid(centres, centres, indexing="ij")
    raster = np.stack([x.ravel(), y.ravel()], axis=1)
    x0, y0, x1, y1 = pair.box
    tables = []
    for alpha in alphas:
        reach = alpha * pair.box_side
        shares = []
        for candidates in (raster, raster * (x1 - x0, y1 - y0) + (x0, y0)):
            apart = np.linalg.norm((candidates[None] - pair.target_points[:, None]) * pair.size, axis=2)
            shares.append((apart <= reach).mean(axis=1))
        table = {"chance": shares[0], "chance_box": shares[1], "position": _distances(pair, pair.source_points) <= reach}
        tables.append(pd.DataFrame(table).assign(alpha=alpha, pair=number, group=pair.group, category=pair.category))
    return pd.concat(tables, ignore_index=True)


def _scores(points: pd.DataFrame, per: str, seed: int) -> dict[str, Any]:
    columns = ["right", "chance", "chance_box", "position"]
    rows = points[[*columns, "group"]].astype(dict.fromkeys(columns, float))
    if per == "image":
        rows = rows.assign(pair=points["pair"]).groupby("pair").agg({**dict.fromkeys(columns, "mean"), "group": "first"})
    means = rows[columns].mean()
    lost = int(points["right"].isna().sum())
    low, high = (np.nan, np.nan) if lost else share_interval(rows["right"], rows["group"], seed=seed)
    position_low, position_high = share_interval(rows["position"], rows["group"], seed=seed)
    return {
        "value": np.nan if lost else float(means["right"]),
        "low": low,
        "high": high,
        "chance": float(means["chance"]),
        "chance_box": float(means["chance_box"]),
        "position": float(means["position"]),
        "position_low": position_low,
        "position_high": position_high,
        "n": len(rows),
        "n_groups": rows["group"].nunique(),
        "seed": seed,
        "reason": f"{lost} of {len(points)} points have no nearest place: the features are zero or constant" if lost else "",
    }


def _maps(block: xr.DataArray, standardise: bool) -> Floats:
    """(sample, channel, y, x) in memory."""
    values = finite(block.transpose("sample", "channel", *SPACE).to_numpy())
    return standardised(values, axis=(0, 2, 3)) if standardise else values
