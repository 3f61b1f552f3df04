"""COCO's segmentations (polygons and run lengths) as masks; each is checked before a decoder sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffprobe.data.images import MAX_PIXELS
from diffprobe.rundir import optional

Bools = NDArray[np.bool_]


def decode_masks(segmentations: Sequence[Any], size: tuple[int, int], where: str) -> Bools:
    """Masks (object, y, x) of one image; an empty segmentation is an empty mask.

    Args:
        segmentations: A list of polygons, or a dict of run lengths, for each object.
        size: (height, width) of the image.
        where: The image's name, for messages.

    Raises:
        ValueError: a segmentation does not fit the image.

    >>> decode_masks([{"size": [2, 2], "counts": [1, 2, 1]}], (2, 2), "x").astype(int).tolist()
    [[[0, 1], [1, 0]]]
    """
    masks = np.zeros((len(segmentations), *size), bool)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if segmentation:
            counts = checked_runs(segmentation, size, where)
            if counts is None:
                coco = optional(
                    "pycocotools.mask", "COCO's polygons need pycocotools; install it with: pip install 'diffprobe[coco]'"
                )
                mask[:] = coco.decode(coco.merge(coco.frPyObjects(segmentation, *size)))
            else:  # columns of pixels, outside first
                mask[:] = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T
    return masks


def checked_runs(segmentation: Any, size: tuple[int, int], where: str) -> list[int] | None:
    """The run lengths of a segmentation, None for polygons.

    Raises:
        ValueError: the segmentation does not fit an image of that (height, width).  The decoder of polygons, written in C,
            must not see such.
    """
    height, width = size
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"The annotations of {where} are for {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}."
        )
    if isinstance(segmentation, dict):
        if segmentation.get("size") not in ([height, width], (height, width)):
            raise ValueError(f"A mask of {where} has the size {segmentation.get('size')}; its image has {[height, width]}.")
        counts = segmentation.get("counts")
        counts = _unpacked(counts, where) if isinstance(counts, str | bytes) else counts
        if not isinstance(counts, list) or not all(isinstance(n, int) for n in counts):
            raise ValueError(f"A mask of {where} has no counts; COCO's run lengths have size and counts.")
        if min(counts, default=0) < 0 or sum(counts) != height * width:
            raise ValueError(f"A mask of {where} has runs of {sum(counts)} pixels; its image has {height * width}.")
        return counts
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        fits = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not fits or not all(isinstance(v, int | float) and -1e300 < v < 1e300 for v in polygon):
            raise ValueError(f"A polygon of {where} is not a list of at least three x, y pairs.")
        if min(polygon) < -max(size) or max(polygon) > 2 * max(size):
            raise ValueError(
                f"A polygon of {where} reaches from {min(polygon):g} to {max(polygon):g}; its image is {width} x {height}."
            )
    return None


def _unpacked(packed: str | bytes, where: str) -> list[int]:
    """Run lengths from COCO's packed text: five bits a letter; from the fourth on, differences to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in packed.encode() if isinstance(packed, str) else packed:
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"A mask of {where} has packed runs (RLE) with the byte {letter}, which stands for none.")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the number's last letter; its highest bit is the sign
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"A mask of {where} has packed runs (RLE) that are cut off.")
    return runs
