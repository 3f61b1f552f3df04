"""SPair-71k (Min et al. 2019): keypoints of the same object class in two photographs, read from the published folder.

``SPair-71k/PairAnnotation/{trn,val,test}/*.json`` has one file a pair, ``SPair-71k/JPEGImages/CATEGORY/*.jpg`` the images.
Features come from the images as a folder of photographs: ``diffprobe extract --data SPair-71k/JPEGImages --fit squash``;
then a sample's id is CATEGORY/NAME.jpg.  The invariant: points and boxes are those of the annotation; nothing is dropped
unless the model did not see it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffprobe.data.images import _geometry
from diffprobe.data.keypoints import KeypointPair

SPLITS = ("trn", "val", "test")
FIELDS = (
    "category",
    "src_imname",
    "trg_imname",
    "src_imsize",
    "trg_imsize",
    "src_kps",
    "trg_kps",
    "trg_bndbox",
)


def read_spair(
    root: str | Path,
    split: str = "test",
    category: str | None = None,
    *,
    resolution: tuple[int, int] = (512, 512),
    fit: str = "squash",
) -> list[KeypointPair]:
    """The pairs of one split, with points as fractions of the images as the model saw them.

    Args:
        root: The folder that holds PairAnnotation.
        split: trn, val or test.
        category: Only this class.
        resolution: Height and width of the model's image.
        fit: How images were brought there (the store's `fit`).  Points that a crop cut off, in either image, are left
            out; "squash" keeps all, as published scores do.

    Raises:
        ValueError: no such folder, split or category, or a file that is not a pair's annotation.
    """
    folder = Path(root).expanduser() / "PairAnnotation"
    if not folder.is_dir():
        raise ValueError(f"'{root}' has no folder PairAnnotation; name the folder SPair-71k that was unpacked.")
    if split not in SPLITS:
        raise ValueError(f"Split {split!r} is not one of {', '.join(SPLITS)}.")
    annotations = {path: _read(path) for path in sorted((folder / split).glob("*.json"))}
    if not annotations:
        raise ValueError(f"'{folder / split}' holds no pair; is the dataset unpacked whole?")
    if category is not None:
        found = sorted({str(a["category"]) for a in annotations.values()})
        if category not in found:
            raise ValueError(f"Category {category!r} is not in this split; it has {', '.join(found)}.")
        annotations = {path: a for path, a in annotations.items() if a["category"] == category}
    pairs = [_pair(path, annotation, resolution, fit) for path, annotation in annotations.items()]
    return [pair for pair in pairs if len(pair.source_points)]


def _read(path: Path) -> dict[str, Any]:
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is not JSON ({error}).") from error
    missing = [f for f in FIELDS if f not in annotation] if isinstance(annotation, dict) else list(FIELDS)
    if missing:
        raise ValueError(f"'{path}' is not an annotation of SPair-71k: it lacks {', '.join(missing)}.")
    if len(annotation["src_kps"]) != len(annotation["trg_kps"]):
        raise ValueError(
            f"'{path}' has {len(annotation['src_kps'])} source points and {len(annotation['trg_kps'])} target points."
        )
    return dict(annotation)


def _pair(path: Path, annotation: dict[str, Any], resolution: tuple[int, int], fit: str) -> KeypointPair:
    source, target = (np.asarray(annotation[key], np.float64).reshape(-1, 2) for key in ("src_kps", "trg_kps"))
    corners = np.asarray(annotation["trg_bndbox"], np.float64).reshape(2, 2)
    shift, unit = _seen_through(annotation["src_imsize"], resolution, fit)
    source = (source - shift) / unit
    shift, unit = _seen_through(annotation["trg_imsize"], resolution, fit)
    target, corners = (target - shift) / unit, (corners - shift) / unit
    seen = np.all((source >= 0) & (source <= 1) & (target >= 0) & (target <= 1), axis=1)
    category = str(annotation["category"])
    return KeypointPair(
        source=f"{category}/{annotation['src_imname']}",
        target=f"{category}/{annotation['trg_imname']}",
        source_points=source[seen],
        target_points=target[seen],
        box=(float(corners[0, 0]), float(corners[0, 1]), float(corners[1, 0]), float(corners[1, 1])),
        size=(float(unit[0]), float(unit[1])),
        group=path.stem,
        category=category,
    )


def _seen_through(
    size: Sequence[int], resolution: tuple[int, int], fit: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The corner of the model's image, and its width and height, (x, y) in the photograph's pixels."""
    width, height = size[:2]
    box, drawn, corner = _geometry((height, width), resolution, fit)
    pixels = np.array([box[2] - box[0], box[3] - box[1]]) / drawn  # of the photograph in one of the model's
    return np.array(box[:2]) - np.array(corner) * pixels, pixels * resolution[::-1]
