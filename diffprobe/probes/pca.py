"""Principal components as colours, and the tokens whose norm stands out.

Features are (..., channel, y, x); each combination of the dimensions in front (sample, timestep, ...) is one map.  The
invariant: the same features give the same colours, because signs do not depend on the linear algebra library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from diffprobe.probes.task import combinations, finite, need_dimensions, outer_dimensions

MAP = ("channel", "y", "x")
MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826


def pca_rgb(features: xr.DataArray, shared: bool = True, percentiles: tuple[float, float] = (1.0, 99.0)) -> xr.DataArray:
    """Draws the three leading principal components of the channels as red, green and blue.

    A component's sign makes its largest loading positive.  Its scores between the lower and the upper percentile are
    stretched onto [0, 1] and clipped, so that a few outliers do not take all contrast; a component without spread is 0.5.

    Args:
        features: (..., channel, y, x) with at least three channels.
        shared: One basis and one stretch for all maps, so that colours compare across maps; else one for each map.
        percentiles: Lower and upper end of the stretch.

    Returns:
        (..., y, x, rgb) in float32.  The attribute `explained` holds the three components' shares of the variance
        (the mean over maps when the basis is not shared).

    Raises:
        ValueError: For missing dimensions, fewer than three channels, or non-finite features.

    >>> maps = xr.DataArray(np.random.default_rng(0).normal(size=(2, 5, 4, 4)), dims=("sample", "channel", "y", "x"))
    >>> colours = pca_rgb(maps)
    >>> colours.dims, colours.shape, float(colours.min()), float(colours.max())
    (('sample', 'y', 'x', 'rgb'), (2, 4, 4, 3), 0.0, 1.0)
    """
    outer, tokens = _tokens(features)
    if tokens.shape[-1] < 3:
        raise ValueError(f"Three colours need at least 3 channels; these features have {tokens.shape[-1]}.")
    maps, height, width, channels = tokens.shape
    parts = tokens.reshape(1, -1, channels) if shared else tokens.reshape(maps, -1, channels)
    drawn = [_components(part, percentiles) for part in parts]
    colours = np.stack([d[0] for d in drawn]).reshape(*(features.sizes[d] for d in outer), height, width, 3)
    coords = {name: c for name, c in features.coords.items() if "channel" not in c.dims}
    result = xr.DataArray(colours.astype(np.float32), dims=(*outer, "y", "x", "rgb"), coords=coords, name="pca")
    explained = np.mean([d[1] for d in drawn], axis=0)
    return result.assign_coords(rgb=["r", "g", "b"]).assign_attrs(explained=[float(e) for e in explained], shared=shared)


def outlier_tokens(features: xr.DataArray, threshold: float = 6.0, marked: xr.DataArray | None = None) -> pd.DataFrame:
    """Counts register-like tokens: positions whose norm is far above the map's median (Darcet et al. 2024).

    A token is an outlier when the robust z-score of its norm over channels, `(norm - median) / (1.4826 * MAD)` with median
    and MAD over the positions of the same map, exceeds `threshold`.  Normally distributed norms exceed 6 once in a billion
    tokens.  The scale is at least a millionth of the median, so a constant map has no outliers.

    Args:
        features: (..., channel, y, x).
        threshold: The robust z-score from which a token is an outlier.
        marked: Booleans over y, x and dimensions in front: positions whose outliers are counted apart, such as objects.

    Returns:
        One row per map: the coordinates of the dimensions in front, n_tokens, n_outliers, share, median_norm,
        max_norm, max_z, and the position (y, x) of the largest norm as y_max and x_max; with `marked` also n_marked_tokens
        and n_marked, the outliers among these.

    >>> maps = np.random.default_rng(0).normal(size=(8, 6, 6))
    >>> maps[:, 2, 5] *= 20
    >>> row = outlier_tokens(xr.DataArray(maps, dims=("channel", "y", "x"))).iloc[0]
    >>> int(row.n_outliers), int(row.y_max), int(row.x_max)
    (1, 2, 5)
    """
    if threshold <= 0:
        raise ValueError(f"`threshold` is a positive robust z-score; got {threshold}.")
    outer, tokens = _tokens(features)
    norms = np.linalg.norm(tokens, axis=-1)
    flat = norms.reshape(len(norms), -1)
    median = np.median(flat, axis=1)
    deviation = MAD_TO_SIGMA * np.median(np.abs(flat - median[:, None]), axis=1)
    spread = np.maximum(np.maximum(deviation, 1e-6 * median), np.finfo(np.float32).tiny)
    scores = (flat - median[:, None]) / spread[:, None]
    outliers = scores > threshold
    y_max, x_max = np.unravel_index(flat.argmax(axis=1), norms.shape[1:])
    places = [{str(d): place[str(d)] for d in outer} for place, _ in combinations(features, MAP)]
    frame = pd.DataFrame(places, index=range(len(places))).assign(
        n_tokens=flat.shape[1], n_outliers=outliers.sum(axis=1), share=outliers.mean(axis=1), median_norm=median,
        max_norm=flat.max(axis=1), max_z=scores.max(axis=1), y_max=y_max, x_max=x_max,
    )  # fmt: skip
    if marked is not None:
        wide = marked.broadcast_like(features.isel(channel=0, drop=True))
        marks = wide.transpose(*outer, "y", "x").to_numpy().reshape(flat.shape).astype(bool)
        frame = frame.assign(n_marked_tokens=marks.sum(axis=1), n_marked=(marks & outliers).sum(axis=1))
    return frame


def _tokens(features: xr.DataArray) -> tuple[list[Any], NDArray[np.float64]]:
    """The dimensions in front, and the features as (map, y, x, channel)."""
    need_dimensions(features, *MAP)
    outer = outer_dimensions(features, MAP)
    values = features.transpose(*outer, "y", "x", "channel").to_numpy()
    return outer, finite(values.reshape(-1, *values.shape[-3:]), "maps")


def _components(
    tokens: NDArray[np.float64], percentiles: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stretched scores (token, 3) and shares of variance (3,) of the tokens (token, channel)."""
    centred = tokens - tokens.mean(axis=0)
    # the covariance is exact and small: (channel, channel), for any number of tokens
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, vectors = values[::-1][:3], vectors[:, ::-1][:, :3]
    total = float(np.square(centred).sum())
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(3)]
    scores = centred @ (vectors * np.sign(largest))
    low, high = np.percentile(scores, percentiles, axis=0)
    # a spread below the rounding of the largest component is no structure
    flat = (high - low) <= 1e-7 * np.sqrt(max(float(values[0]), 0.0) / len(tokens) + 1e-300)
    stretched = np.clip((scores - low) / np.where(flat, 1.0, high - low), 0.0, 1.0)
    return np.where(flat, 0.5, stretched), np.maximum(values, 0) / total if total > 0 else np.zeros(3)
