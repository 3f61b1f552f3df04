"""An independent reader of pictures of the drawn world: which object stands where, with all its attributes.

A small convolutional network trained on drawn images alone, never on generated ones, so that what it finds in a generated
picture is not what a generator taught it.  It marks object centres on an 8 x 8 grid (Zhou et al. 2019, "Objects as
Points").  ``recipes/reader.py`` trains it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from diffprobe.data import shapes

CELLS = 8
FACTORS = shapes.ATTRIBUTES


@dataclass(frozen=True)
class Found:
    """An object that the reader sees; `x` and `y` in image sides, `score` from 0 to 1, the rest in the world's words."""

    x: float
    y: float
    score: float
    colour: str
    shape: str
    fill: str
    size: str
    direction: str
    mark: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(image, width, y, x) of the same shape."""
        return x + self.body(x)


class Reader(nn.Module):
    """64 px images in [-1, 1] -> (image, 3 + all values of `FACTORS`, cell y, cell x): presence, centre's offset, classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, 32, 64, 128)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [Residual(after)] if before > 3 else []
        layers += [Residual(128), Residual(128), nn.GroupNorm(8, 128), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(128, 3 + sum(map(len, FACTORS.values())), 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Presence is a logit, the offset of a centre in its cell from 0 to 1, the rest logits of each factor's values."""
        found: Tensor = self.layers(pixels)
        return found

    @torch.no_grad()
    def read(self, pixels: Tensor, threshold: float = 0.5) -> list[list[Found]]:
        """The objects of each image, surest first: cells that are surer than the threshold and than their neighbours."""
        output = torch.cat([self(part) for part in pixels.float().split(64)])
        presence = output[:, 0].sigmoid()
        peak = functional.max_pool2d(presence[:, None], 3, stride=1, padding=1)[:, 0]
        images: list[list[Found]] = [[] for _ in pixels]
        for image, y, x in ((presence == peak) & (presence > threshold)).nonzero().tolist():
            cell = output[image, :, y, x]
            dx, dy = cell[1:3].tolist()
            classes = cell[3:].split([len(values) for values in FACTORS.values()])
            read = {name: FACTORS[name][int(part.argmax())] for name, part in zip(FACTORS, classes, strict=True)}
            images[image].append(Found((x + dx) / CELLS, (y + dy) / CELLS, float(presence[image, y, x]), **read))
        return [sorted(found, key=lambda one: -one.score) for found in images]


def load_reader() -> Reader:
    """The reader that comes with the package."""
    from diffprobe.zoo import locate

    reader = Reader()
    reader.load_state_dict({k: v.float() for k, v in load_file(locate("shapes-reader") / "model.safetensors").items()})
    return reader.eval()


def place_of(found: Sequence[Found], pair: tuple[str, str]) -> Found | None:
    """The surest object of this colour and shape, or None."""
    return next((one for one in found if one.pair == pair), None)
