"""An independent reader of pictures: which colour and shape stands where.

A small convolutional network trained on drawn images alone, never on generated ones, so that what it finds in a generated
picture is not what a generator taught it.  It marks object centres on a 12 x 12 grid (Zhou et al. 2019, "Objects as
Points").  Its training images are blurred, shrunk and noised at random, since generated ones come out of an autoencoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprobe.data import shapes
from diffprobe.zoo.recipe import Progress, batches, drawn, learning_rate_share, train_scene

CELLS = 12
COLOURS = tuple(shapes.COLOURS)


@dataclass(frozen=True)
class Found:
    """An object that the reader sees; `x` and `y` in image sides, `score` from 0 to 1."""

    colour: str
    shape: str
    x: float
    y: float
    score: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Reader(nn.Module):
    """96 px images in [-1, 1] -> (image, 3 + colour + shape, cell y, cell x): presence, centre's offset, classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [Residual(widths[-1]) for _ in range(3)]
        layers += [nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3 + len(COLOURS) + len(shapes.SHAPES), 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.layers(pixels)
        return found

    @torch.no_grad()
    def read(self, pixels: Tensor, threshold: float = 0.5) -> list[list[Found]]:
        """The objects of each image, surest first: cells that are surer than the threshold and than their neighbours."""
        output = torch.cat([self(part) for part in pixels.float().split(64)])
        presence = output[:, 0].sigmoid()
        peak = functional.max_pool2d(presence[:, None], 3, stride=1, padding=1)[:, 0]
        centres = (presence == peak) & (presence > threshold)
        images: list[list[Found]] = [[] for _ in pixels]
        for image, y, x in centres.nonzero().tolist():
            cell = output[image, :, y, x]
            dx, dy = cell[1:3].tolist()
            colour = COLOURS[int(cell[3 : 3 + len(COLOURS)].argmax())]
            shape = shapes.SHAPES[int(cell[3 + len(COLOURS) :].argmax())]
            images[image].append(Found(colour, shape, (x + dx) / CELLS, (y + dy) / CELLS, float(presence[image, y, x])))
        return [sorted(found, key=lambda f: -f.score) for found in images]


def target(scene: shapes.Scene) -> np.ndarray:
    """(5, cell y, cell x): presence (-1 next to a centre: does not count), offset x and y, colour and shape numbers."""
    grid = np.zeros((5, CELLS, CELLS), np.float32)
    cells = [(int(o.y * CELLS), int(o.x * CELLS)) for o in scene.objects]
    for y, x in cells:
        grid[0, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = -1
    for obj, (y, x) in zip(scene.objects, cells, strict=True):
        grid[:, y, x] = 1, obj.x * CELLS - x, obj.y * CELLS - y, COLOURS.index(obj.colour), shapes.SHAPES.index(obj.shape)
    return grid


def roughened(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """The images less sharp, each batch in its own way: smaller and back, brighter or darker, noisy."""
    if rng.random() < 0.75:
        side = int(rng.integers(40, 96))
        small = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        pixels = functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(pixels), 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.1, 0.1, (len(pixels), 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)) * float(rng.uniform(0, 0.08))
    return (pixels * gain + shift + noise).clamp(-1, 1)


def reading_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """Presence on every counted cell; offset, colour and shape at the centres."""
    presence, centre = wanted[:, 0], wanted[:, 0] == 1
    # 2.5 of 144 cells hold a centre
    seen = functional.binary_cross_entropy_with_logits(
        output[:, 0], presence.clamp(min=0), weight=(presence >= 0).float(), pos_weight=torch.tensor(8.0)
    )
    cells, truth = output.permute(0, 2, 3, 1)[centre], wanted.permute(0, 2, 3, 1)[centre]
    colour = functional.cross_entropy(cells[:, 3 : 3 + len(COLOURS)], truth[:, 3].long())
    shape = functional.cross_entropy(cells[:, 3 + len(COLOURS) :], truth[:, 4].long())
    return 5 * seen + functional.l1_loss(cells[:, 1:3], truth[:, 1:3]) + colour + shape


def train_reader(folder: Path, steps: int = 700, batch: int = 48, seed: int = 0, peak: float = 2e-3) -> Reader:
    """Train it, or go on, or give the finished one; its checkpoint and loss curve lie in `folder`."""
    torch.manual_seed(seed + 6)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=peak, weight_decay=0.01)
    progress = Progress(folder, "reader", {"reader": reader}, optimizer)
    history: list[float] = []
    for indices in batches(200_000, batch, seed + 6, progress.step):
        if progress.step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate_share(progress.step, steps, 0.4)
        rng = np.random.default_rng([seed, 6, progress.step])
        scenes = [train_scene(int(i), seed) for i in indices]
        pixels = roughened(torch.from_numpy(np.stack([drawn(scene) for scene in scenes])), rng)
        loss = reading_loss(reader(pixels), torch.from_numpy(np.stack([target(scene) for scene in scenes])))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        history.append(loss.item())
        if progress.step % 25 == 0:
            progress.log({"loss": float(np.mean(history[-25:]))}, steps)
        if progress.step % 100 == 0 or progress.step == steps:
            progress.save()
    return reader.eval()


def place_of(found: Sequence[Found], pair: tuple[str, str]) -> Found | None:
    """The surest object of this colour and shape, or None."""
    return next((one for one in found if one.pair == pair), None)
