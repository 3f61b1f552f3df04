"""Datasets: the drawn world, drawn twins of benchmarks, folders of photographs; all yield `Sample`.

samples.py    what every dataset yields, and the specs that name datasets
files.py      texts, JSON, names and contents of files that others wrote
images.py     reading photographs safely, and fitting images and masks to a size
shapes.py     the drawn world: scenes, pixels, masks and captions
drawn.py      its scenes as a dataset
questions.py  questions about drawn scenes
twins.py      pairs of drawn scenes in the manner of MMVP, Winoground and NaturalBench
keypoints.py  points that show the same thing in two images of a twin; spair.py those of SPair-71k
several.py    questions about several drawn images at once, in the manner of BLINK
folder.py     a folder of photographs, with or without captions; labels.py reads captions and labels from files and folders
blank.py      any dataset with grey images
rows.py       datasets of the hub saved on disk, WebDataset shards, folders behind a URL
join.py       several datasets as one, and some samples of one
annotations.py  photographs with masks: COCO, RefCOCO, Pascal VOC
segmentations.py  COCO's polygons and run lengths as masks; categories.py names of categories in captions
benchmarks.py published benchmarks of images and texts, from the hub or a folder
tables.py     their files: rows of CSV, JSON and Parquet, and the images that they name
question_benchmarks.py  those that ask questions, published and drawn
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

ANNOTATED = {  # a path stands after the colon, where drawn datasets have a number
    "coco": ("images", "captions", "limit"),
    "refcoco": ("images", "instances", "split", "limit"),
    "voc": ("split", "limit"),
}
ROWS = {"hf": ("split", "limit"), "tar": ("limit",)}
OPTIONS = {"shapes": ("split", "seed", "objects"), **{f"shapes-{kind}": ("seed",) for kind in KINDS}, **ANNOTATED, **ROWS}
_FILES = ("coco:INSTANCES.json?images=FOLDER", "refcoco:REFS.json?images=FOLDER", "voc:FOLDER", "hf:FOLDER", "tar:FILES.tar")
FORMS = ", ".join(
    ["shapes:N", *(f"shapes-{kind}:N" for kind in KINDS), *_FILES, "blank:SPEC", "or the path or URL of a folder of images"]
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
            limit = whole_number(spec, "limit", given["limit"], at_least=1) if given else None
            return folder_at(folder, limit) if "://" in spec else FolderDataset(folder, limit=limit)
        raise ValueError(f"{spec!r} names no dataset and no folder; valid are {FORMS}.{did_you_mean(kind, OPTIONS)}")
    _, target, given = split_spec(spec)
    options = check_options(spec, kind, given, OPTIONS[kind])
    if not target:
        example = (
            f"'{kind}:256'"
            if kind not in (*ANNOTATED, *ROWS)
            else next(f"'{form}'" for form in _FILES if form.startswith(kind))
        )
        raise ValueError(
            f"{spec!r} does not say {'how many' if kind not in (*ANNOTATED, *ROWS) else 'where'}; write for example {example}."
        )
    if kind in ROWS:
        limit = whole_number(spec, "limit", options["limit"], at_least=1) if "limit" in options else None
        return RowsDataset(kind, target, options.get("split"), limit)
    if kind in ANNOTATED:
        return _annotated(spec, kind, target, options)
    count = whole_number(spec, "the number after ':'", target, at_least=1)
    seed = whole_number(spec, "seed", options.get("seed", "0"))
    if kind != "shapes":
        return TwinsDataset(kind.removeprefix("shapes-"), count, seed)
    split = options.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"{spec!r}: unknown split {split!r}; valid are {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
    most = len(COUNT_WORDS) - 1
    objects = whole_number(spec, "objects", options["objects"], at_least=1, at_most=most) if "objects" in options else None
    return ShapesDataset(count, split, seed, objects)


def _annotated(spec: str, kind: str, path: str, options: dict[str, str]) -> Dataset:
    """A dataset of annotated photographs from the path after the colon and its options."""
    limit = whole_number(spec, "limit", options["limit"], at_least=1) if "limit" in options else None
    if kind == "voc":
        return VocDataset(path, options.get("split", "val"), limit)
    if "images" not in options:
        raise ValueError(f"{spec!r} does not say where the images are; add images=FOLDER.")
    if kind == "coco":
        return coco_dataset(path, options["images"], options.get("captions"), limit)
    return refcoco_dataset(path, options["images"], options.get("instances"), options.get("split"), limit)
