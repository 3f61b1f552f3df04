"""The images on which latents of a sparse autoencoder are largest, and where in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffprobe import plotting
from diffprobe.figures import open_with_images

Activations = Callable[[], Iterator[tuple[NDArray[Any], NDArray[Any]]]]


def choose_latents(activations: Activations, number: int) -> list[int]:
    """The latents with the largest sums among those that at most half of the samples use, or among all where none is so."""
    total: Any = 0
    used: Any = 0
    samples = 0
    for names, values in activations():
        total, used, samples = total + values.sum((0, 1), np.float64), used + (values > 0).any(1).sum(0), samples + len(names)
    special = np.where((used > 0) & (used <= samples / 2), total, -1)
    order = np.argsort(-(special if (special > 0).any() else total), kind="stable")[:number]
    return [int(latent) for latent in order if total[latent] > 0]


@plotting.style()
def plot_latents(images: NDArray[np.uint8], maps: NDArray[np.float32], latents: Sequence[int], *, title: str = "") -> Figure:
    """One row a latent: its images from the largest down, each under its map; a row has one colour scale from 0.

    Args:
        images: (latent, image, y, x, 3).
        maps: (latent, image, y, x).
    """
    rows, columns = maps.shape[:2]
    cell = plotting.PAGE / columns
    figure, axes = plotting.pictures(
        rows, columns, plotting.PAGE, rows * cell * images.shape[2] / images.shape[3], (0.02, 0.02), title=title
    )
    for row, latent in enumerate(latents):
        top = max(float(maps[row].max()), 1e-12)
        for axis, image, heat in zip(axes[row], images[row], maps[row], strict=True):
            plotting.lay_over(axis, image, heat, (0.0, top), lambda share: 0.75 * share)
        axes[row, 0].set_ylabel(str(latent))
    return figure


def latent_figure(
    store: str, data: str, activations: Activations, ids: Sequence[str], grid: tuple[int, int], latents: Sequence[int], out: Path,
    config: dict[str, Any], number: int = 6,
) -> Path:  # fmt: skip
    """Draws the images on which each latent is largest, as ``latents.png`` in a folder.

    Args:
        activations: Gives the numbers of samples and their activations (sample, place, latent), from first to last.
        ids: The samples' ids by those numbers.
        grid: (y, x) of the places.
    """
    read = [(names, values[:, :, list(latents)]) for names, values in activations()]
    names, values = (np.concatenate(parts) for parts in zip(*read, strict=True))
    top = np.argsort(-values.max(1), axis=0, kind="stable")[:number].T  # (latent, image)
    shown = sorted({ids[names[row]] for row in top.flat})
    choose = lambda tree: [tree.to_dataset()["sample"].values.tolist().index(name) for name in shown]  # noqa: E731
    _, pictures, _, found = open_with_images(store, data, choose)
    images = np.stack([[pictures[found.index(ids[names[row]])] for row in rows] for rows in top])
    maps = np.stack([values[rows, :, n].reshape(len(rows), *grid) for n, rows in enumerate(top)]).astype(np.float32)
    frame = pd.DataFrame(
        {"latent": latent, "rank": rank, "sample": ids[names[row]], "largest": float(values[row, :, n].max())}
        for n, (latent, rows) in enumerate(zip(latents, top, strict=True))
        for rank, row in enumerate(rows)
    )
    figure = plot_latents(images, maps, latents, title=f"Latents of {config.get('site', '')} on their top images")
    alt = f"{len(latents)} latents, a row each: the {top.shape[1]} images on which it is largest, and where in them."
    return plotting.save_figure(figure, out, "latents", frame, {"store": store, **config}, alt)["png"]
