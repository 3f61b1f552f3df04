"""Datasets: the drawn world, drawn twins of benchmarks, photographs; all yield `Sample`.

`docs/architecture.md` says which file holds what.
"""

from __future__ import annotations

from pathlib import Path

from diffprobe.data.annotations import AnnotatedDataset, VocDataset, coco_dataset, refcoco_dataset
from diffprobe.data.blank import BlankDataset
from diffprobe.data.drawn import ShapesDataset
from diffprobe.data.folder import FolderDataset
from diffprobe.data.images import ImageError, fit_image, fit_masks, read_image
from diffprobe.data.join import JoinedDataset, PartDataset
from diffprobe.data.rows import RowsDataset, folder_at
from diffprobe.data.samples import (
    Caption,
    Dataset,
    Question,
    Sample,
    Span,
    check_options,
    did_you_mean,
    iterate,
    limit_of,
    split_spec,
    whole_number,
)
from diffprobe.data.shapes import COUNT_WORDS, SPLITS
from diffprobe.data.twins import KINDS, TwinsDataset

__all__ = [
    "AnnotatedDataset",
    "BlankDataset",
    "Caption",
    "Dataset",
    "FolderDataset",
    "ImageError",
    "JoinedDataset",
    "PartDataset",
    "Question",
    "RowsDataset",
    "Sample",
    "ShapesDataset",
    "Span",
    "TwinsDataset",
    "VocDataset",
    "coco_dataset",
    "fit_image",
    "fit_masks",
    "iterate",
    "load_dataset",
    "read_image",
    "refcoco_dataset",
]

OPTIONS = {
    "shapes": ("split", "seed", "objects"), **{f"shapes-{kind}": ("seed",) for kind in KINDS},
    "coco": ("images", "captions", "limit"), "refcoco": ("images", "instances", "split", "limit"), "voc": ("split", "limit"),
    "hf": ("split", "limit"), "tar": ("limit",),
}  # fmt: skip
_FILES = {
    "coco": "coco:INSTANCES.json?images=FOLDER", "refcoco": "refcoco:REFS.json?images=FOLDER", "voc": "voc:FOLDER", "hf": "hf:FOLDER",
    "tar": "tar:FILES.tar",
}  # fmt: skip
FORMS = ", ".join(
    ["shapes:N", *(f"shapes-{k}:N" for k in KINDS), *_FILES.values(), "blank:SPEC", "or the path or URL of a folder of images"]
)


def load_dataset(spec: str) -> Dataset:
    """Makes a dataset from its spec.

    ``shapes:N`` is N drawn scenes, with options ``split`` (train, validation, test, compositional), ``seed`` and
    ``objects`` (1-4, any number by default); ``shapes-mmvp:N``, ``shapes-winoground:N`` and ``shapes-naturalbench:N``
    are N pairs of drawn images, with the option ``seed``.  ``coco:INSTANCES.json?images=FOLDER`` (with ``captions``),
    ``refcoco:REFS.json?images=FOLDER`` (with ``instances``, ``split``) and ``voc:FOLDER`` (with ``split``) are annotated
    photographs, of which ``limit`` takes the first; ``blank:SPEC`` is any of them with grey images, ``join:?part0=SPEC&part1=SPEC``
    several, one after the other; ``hf:FOLDER`` (with ``split``) is a dataset that `datasets` saved on disk, ``tar:FILES.tar``
    are WebDataset shards; anything else is the path of a folder of photographs, of which ``?limit=N`` behind it takes
    the first.  In a path after a colon or an equals sign, %26 stands for &, and so on.

    Raises:
        ValueError: the text names no dataset; the message lists what does.

    >>> dataset = load_dataset("shapes:256?split=test&seed=1&objects=2")
    >>> len(dataset), dataset[0].id
    (256, 'shapes-test-1-n2-000000')
    >>> len(load_dataset("shapes-mmvp:90"))
    180
    >>> load_dataset("shapes:256?spilt=test")
    Traceback (most recent call last):
    ValueError: 'shapes:256?spilt=test': unknown option 'spilt'; shapes takes split, seed, objects. Did you mean 'split'?
    """
    kind = spec.partition(":")[0]
    if kind == "blank":
        return BlankDataset(load_dataset(spec.removeprefix("blank:")))
    if kind == "join":
        return JoinedDataset([load_dataset(part) for part in split_spec(spec)[2].values()])
    if kind not in OPTIONS:
        if Path(spec).expanduser().is_dir():
            return FolderDataset(spec)
        _, folder, given = split_spec(f"folder:{spec}")
        if "://" in spec or (given and Path(folder).expanduser().is_dir()):
            check_options(spec, "a folder", given, ("limit",))
            limit = limit_of(spec, given)
            return folder_at(folder, limit) if "://" in spec else FolderDataset(folder, limit=limit)
        raise ValueError(f"{spec!r} names no dataset and no folder; valid are {FORMS}.{did_you_mean(kind, OPTIONS)}")
    _, target, given = split_spec(spec)
    options = check_options(spec, kind, given, OPTIONS[kind])
    if not target:
        what, example = ("where", _FILES[kind]) if kind in _FILES else ("how many", f"{kind}:256")
        raise ValueError(f"{spec!r} does not say {what}; write for example '{example}'.")
    limit, split = limit_of(spec, options), options.get("split")
    if kind in ("hf", "tar"):
        return RowsDataset(kind, target, split, limit)
    if kind == "voc":
        return VocDataset(target, split or "val", limit)
    if kind in _FILES and "images" not in options:
        raise ValueError(f"{spec!r} does not say where the images are; add images=FOLDER.")
    if kind == "coco":
        return coco_dataset(target, options["images"], options.get("captions"), limit)
    if kind == "refcoco":
        return refcoco_dataset(target, options["images"], options.get("instances"), split, limit)
    count = whole_number(spec, "the number after ':'", target, at_least=1)
    seed = whole_number(spec, "seed", options.get("seed", "0"))
    if kind != "shapes":
        return TwinsDataset(kind.removeprefix("shapes-"), count, seed)
    split = split or "train"
    if split not in SPLITS:
        raise ValueError(f"{spec!r}: unknown split {split!r}; valid are {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
    most = len(COUNT_WORDS) - 1
    objects = whole_number(spec, "objects", options["objects"], at_least=1, at_most=most) if "objects" in options else None
    return ShapesDataset(count, split, seed, objects)
