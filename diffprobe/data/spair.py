"""SPair-71k (Min et al. 2019): keypoints of the same object class in two photographs, read from the published folder.

``SPair-71k/PairAnnotation/{trn,val,test}/*.json`` has one file a pair, ``SPair-71k/JPEGImages/CATEGORY/*.jpg`` the images.
Features come from the images as a folder of photographs: ``diffprobe extract --data SPair-71k/JPEGImages --fit squash``;
then a sample's id is CATEGORY/NAME.jpg.  The invariant: points and boxes are those of the annotation, which is of the stored
pixels, turned as the folder turns a photograph with an EXIF note; only points that the model did not see are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffprobe.data.files import file_inside, inside, parse_json, read_text, real_path
from diffprobe.data.images import geometry, stored_size
from diffprobe.data.keypoints import KeypointPair
from diffprobe.data.tables import collected

SPLITS = ("trn", "val", "test")
FIELDS = ("category", "src_imname", "trg_imname", "src_imsize", "trg_imsize", "src_kps", "trg_kps", "trg_bndbox")


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
        fit: The store's `fit`.  Points that a crop cut off in either image are left out; "squash" keeps all, as
            published scores do.

    Raises:
        ValueError: no such folder, split or category, or a file that is not a pair's annotation.
    """
    folder = Path(root).expanduser() / "PairAnnotation"
    if not folder.is_dir():
        raise ValueError(f"'{root}' has no folder PairAnnotation; name the folder SPair-71k that was unpacked.")
    if split not in SPLITS:
        raise ValueError(f"Split {split!r} is not one of {', '.join(SPLITS)}.")
    paths = sorted((folder / split).glob("*.json"))
    read = collected(f"'{folder / split}'", (partial(_read, path) for path in paths))
    annotations = dict(zip(paths, read, strict=True))
    if not annotations:
        raise ValueError(f"'{folder / split}' holds no pair; is the dataset unpacked whole?")
    if category is not None:
        found = sorted({str(a["category"]) for a in annotations.values()})
        if category not in found:
            raise ValueError(f"Category {category!r} is not in this split; it has {', '.join(found)}.")
        annotations = {path: a for path, a in annotations.items() if a["category"] == category}
    images = real_path(Path(root) / "JPEGImages")
    turn = cache(lambda name: (0, 0, 1) if (path := file_inside(images, name)) is None else stored_size(path))
    pairs = [_pair(path, annotation, resolution, fit, turn) for path, annotation in annotations.items()]
    return [pair for pair in pairs if len(pair.source_points)]


def _read(path: Path) -> dict[str, Any]:
    annotation = parse_json(read_text(path), f"'{path}'")
    missing = [f for f in FIELDS if f not in annotation] if isinstance(annotation, dict) else list(FIELDS)
    if missing:
        raise ValueError(f"'{path}' is not an annotation of SPair-71k: it lacks {', '.join(missing)}.")
    if len(annotation["src_kps"]) != len(annotation["trg_kps"]):
        raise ValueError(
            f"'{path}' has {len(annotation['src_kps'])} source points and {len(annotation['trg_kps'])} target points."
        )
    return dict(annotation)


def _pair(
    path: Path, annotation: dict[str, Any], resolution: tuple[int, int], fit: str, turn: Callable[[str], tuple[int, int, int]]
) -> KeypointPair:
    """A pair; `turn` gives width, height and EXIF orientation of a photograph's stored pixels, (0, 0, 1) where it is absent."""
    category = str(annotation["category"])
    names, points, units = [], [], []
    for side in ("src", "trg"):
        names.append(inside(f"'{path}'", f"{category}/{annotation[f'{side}_imname']}"))
        box = annotation["trg_bndbox"] if side == "trg" else []
        given = np.concatenate([np.asarray(part, np.float64).reshape(-1, 2) for part in (annotation[f"{side}_kps"], box)])
        size, given = _upright(given, annotation[f"{side}_imsize"][:2], turn(names[-1]))
        kept, drawn, corner = geometry((size[1], size[0]), resolution, fit)
        pixels = np.array([kept[2] - kept[0], kept[3] - kept[1]]) / drawn  # photograph's pixels per pixel of the model
        units.append(pixels * resolution[::-1])  # the model's image in the photograph's pixels
        points.append((given - (np.array(kept[:2]) - np.array(corner) * pixels)) / units[-1])
    source, (target, corners) = points[0], (points[1][:-2], points[1][-2:])
    seen = np.all((source >= 0) & (source <= 1) & (target >= 0) & (target <= 1), axis=1)
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    return KeypointPair(
        source=names[0],
        target=names[1],
        source_points=source[seen],
        target_points=target[seen],
        box=(float(x0), float(y0), float(x1), float(y1)),
        size=(float(units[1][0]), float(units[1][1])),
        group=path.stem,
        category=category,
    )


def _upright(
    points: NDArray[np.float64], size: Sequence[int], stored: tuple[int, int, int]
) -> tuple[Sequence[int], NDArray[np.float64]]:
    """The size and points (point, 2) of a photograph as it is shown; annotations of the turned size stay as they are."""
    (width, height), (x, y) = size, points.T
    if list(size) != list(stored[:2]) and list(size) == [stored[1], stored[0]]:
        return size, points
    placed = {
        2: (width - x, y), 3: (width - x, height - y), 4: (x, height - y), 5: (y, x), 6: (height - y, x),
        7: (height - y, width - x), 8: (y, width - x),
    }  # fmt: skip
    turned = np.stack(placed.get(stored[2], (x, y)), axis=1)
    return (height, width) if stored[2] in (5, 6, 7, 8) else (width, height), turned
