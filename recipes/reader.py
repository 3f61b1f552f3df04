"""The training of `diffprobe.zoo.reader.Reader`, on drawn images that are blurred, shrunk and noised at random.

Roughened so because generated pictures come out of an autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffprobe.data import shapes
from diffprobe.zoo.reader import CELLS, FACTORS, Reader
from recipes.common import SIDE, Optimizers, Plan, drawn_batch, step_rng, train, train_scene


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan(steps=2000))
    batch: int = 64
    peak: float = 2e-3
    muon_peak: float = 3e-3


def target(scene: shapes.Scene) -> np.ndarray:
    """(3 + factor, cell y, cell x): presence (-1 next to a centre: does not count), offset x and y, class numbers.

    What an object cannot show, the direction of a circle, is -100.
    """
    grid = np.zeros((3 + len(FACTORS), CELLS, CELLS), np.float32)
    cells = [(int(o.y * CELLS), int(o.x * CELLS)) for o in scene.objects]
    for y, x in cells:
        grid[0, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = -1
    for obj, (y, x) in zip(scene.objects, cells, strict=True):
        classes = [values.index(getattr(obj, name)) for name, values in FACTORS.items()]
        if obj.shape not in shapes.DIRECTED:
            classes[list(FACTORS).index("direction")] = -100
        grid[:, y, x] = 1, obj.x * CELLS - x, obj.y * CELLS - y, *classes
    return grid


def roughened(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """The images less sharp, each batch in its own way: smaller and back, brighter or darker, noisy."""
    if rng.random() < 0.6:
        side = int(rng.integers(36, SIDE))
        small = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        pixels = functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(pixels), 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.1, 0.1, (len(pixels), 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)) * float(rng.uniform(0, 0.08))
    return (pixels * gain + shift + noise).clamp(-1, 1)


def reading_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """Presence on every counted cell; offset and classes at the centres."""
    presence, centre = wanted[:, 0], wanted[:, 0] == 1
    # about 2 of 64 cells hold a centre
    seen = functional.binary_cross_entropy_with_logits(
        output[:, 0], presence.clamp(min=0), weight=(presence >= 0).float(), pos_weight=torch.tensor(8.0, device=output.device)
    )
    cells, truth = output.permute(0, 2, 3, 1)[centre], wanted.permute(0, 2, 3, 1)[centre]
    classes = cells[:, 3:].split([len(values) for values in FACTORS.values()], 1)
    named = [functional.cross_entropy(part, truth[:, 3 + k].long()) for k, part in enumerate(classes)]
    return 5 * seen + functional.l1_loss(cells[:, 1:3], truth[:, 1:3]) + torch.stack(named).sum()


def train_reader(config: Config, folder: Path) -> Reader:
    """Train it, or go on, or give the finished one; its checkpoint and loss curve lie in `folder`."""
    torch.manual_seed(config.seed + 6)
    reader = Reader().to(config.plan.device)

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 6, step)
        scenes = [train_scene(int(i), config.seed) for i in rng.integers(10**7, size=config.batch)]
        pixels = roughened(drawn_batch(scenes), rng)
        return {"pixels": pixels, "wanted": torch.from_numpy(np.stack([target(scene) for scene in scenes]))}

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss = reading_loss(reader(batch["pixels"]), batch["wanted"])
        return loss, {"loss": loss}

    train(
        "reader",
        folder,
        config.plan,
        {"reader": reader},
        Optimizers(reader, config.peak, config.muon_peak, outer=("layers.0.",)),
        batch_of,
        loss_of,
    )
    return reader.eval()
