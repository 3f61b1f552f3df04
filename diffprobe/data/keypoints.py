"""Points that show the same thing in two images: what correspondence is scored against.

Coordinates are (x, y) fractions of the image as the model saw it.  The invariant: distances are measured in the pixels of
the target image, never in fractions, because a squashed image's fractions are not equal along x and y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from diffprobe.data.shapes import SIDE, Obj, Scene, _silhouette
from diffprobe.data.twins import TwinsDataset

PLACE = ("x", "y", "radius")  # the attributes in which an object may differ between the two scenes


@dataclass(frozen=True)
class KeypointPair:
    """One object in two images.

    Attributes:
        source: Sample id of the image whose points are given.
        target: Sample id of the image in which they are sought.
        source_points: (point, 2), x and y.
        target_points: (point, 2), the true places.
        box: The object's box in the target, x0, y0, x1, y1.
        size: Width and height of the target image in pixels; the unit of distances.
        group: Pairs that share images or objects, which intervals resample together.
        category: For tables by class.
    """

    source: str
    target: str
    source_points: NDArray[np.float64]
    target_points: NDArray[np.float64]
    box: tuple[float, float, float, float]
    size: tuple[float, float]
    group: str
    category: str

    @property
    def box_side(self) -> float:
        """The larger side of the object's box, in pixels of the target."""
        x0, y0, x1, y1 = self.box
        return max((x1 - x0) * self.size[0], (y1 - y0) * self.size[1])


def twin_keypoints(dataset: TwinsDataset, moved: float = 0.05) -> list[KeypointPair]:
    """Centre and extremities of every object that both scenes of a twin show at different places, in both directions.

    Two objects are the same when all attributes but their place are equal and neither scene has another such object.
    Extremities are the highest, lowest, leftmost and rightmost points of the outline.  No twin turns an object, so an
    arrow's tip stays its tip.  Objects move in mmvp's "position" and "viewpoint", where the distant view also makes them
    smaller, and in winoground's "relation".

    Args:
        moved: Least distance between the two centres, in image sides; position alone would find an object that stays.

    >>> pairs = twin_keypoints(TwinsDataset("winoground", 2))
    >>> [(p.source[-8:], p.target[-8:], p.source_points.shape) for p in pairs][:2]
    [('000001-a', '000001-b', (5, 2)), ('000001-b', '000001-a', (5, 2))]
    """
    pairs = []
    for number in range(dataset.count):
        scenes = dataset.pair(number).scenes
        names = [dataset[2 * number + side].id for side in (0, 1)]
        places = [_unlike_objects(scene) for scene in scenes]
        for kind, obj in places[0].items():
            if kind not in places[1]:
                continue
            points = [_points(obj, scenes[0]), _points(places[1][kind], scenes[1])]
            if np.linalg.norm(points[0][0] - points[1][0]) < moved:
                continue
            for source, target in ((0, 1), (1, 0)):
                (x0, y0), (x1, y1) = points[target].min(axis=0), points[target].max(axis=0)
                box, size = (float(x0), float(y0), float(x1), float(y1)), (float(SIDE), float(SIDE))
                ends = (names[source], names[target], points[source], points[target])
                pairs.append(KeypointPair(*ends, box, size, group=str(number), category=obj.shape))
    return pairs


def _unlike_objects(scene: Scene) -> dict[tuple[object, ...], Obj]:
    """The objects without an equal in the scene, by all attributes but their place."""
    kinds = [tuple(v for k, v in sorted(vars(o).items()) if k not in PLACE) for o in scene.objects]
    return {kind: obj for kind, obj in zip(kinds, scene.objects, strict=True) if kinds.count(kind) == 1}


def _points(obj: Obj, scene: Scene) -> NDArray[np.float64]:
    """Centre, top, bottom, left and right of an object as fractions of the image: (5, 2)."""
    drawn = np.array([obj.x, obj.y]) + obj.radius * _landmarks(obj.shape, obj.direction)
    return np.asarray(0.5 + (drawn - 0.5) * scene.zoom)


@cache
def _landmarks(shape: str, direction: str) -> NDArray[np.float64]:
    """The same five points relative to the centre, in radii.

    They come from the silhouette, not from pixels: a star has two lowest tips, and rounding would pick one at random.
    """
    side = np.linspace(-1.2, 1.2, 481)
    y, x = np.nonzero(_silhouette(shape, side[None, :], side[:, None], direction) <= 0)
    ties = [np.flatnonzero(v == end) for v, end in ((y, y.min()), (y, y.max()), (x, x.min()), (x, x.max()))]
    ends = [tie[len(tie) // 2] for tie in ties]  # the middle of a level edge; one of two tips
    return np.stack([np.append(0.0, side[x[ends]]), np.append(0.0, side[y[ends]])], axis=1)
