"""Photographs with annotated objects: COCO instances, RefCOCO expressions, Pascal VOC segmentation.

All yield `Sample` with masks, and captions whose spans say which objects a word speaks of.  The layouts are those of the
published files; nothing is downloaded.  The invariants: masks and images are those of the stored pixels, whatever note
about turning them a photograph carries; an annotation file can name only images of the folder that is given, and reading
one never runs code (RefCOCO's pickles are refused).

Sources: Lin et al. 2014 (COCO), Yu et al. 2016 (RefCOCO), Everingham et al. 2010 (VOC).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffprobe.data.files import content_digests, file_inside, inside, listed, numbered_lines, parse_json, read_text, real_path
from diffprobe.data.images import MAX_PIXELS, ImageError, read_image, refusal
from diffprobe.data.questions import article
from diffprobe.data.samples import Caption, Sample, Span, join_spec

Bools = NDArray[np.bool_]
PICKLES = (".p", ".pkl", ".pickle")
IRREGULAR = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_WORDS = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
VOC_VOID = 255


@dataclass(frozen=True)
class Record:
    """What an annotation file says of one sample; `size` is the annotated image's (height, width)."""

    id: str
    file: str
    size: tuple[int, int]
    captions: tuple[Caption, ...]
    categories: tuple[str, ...]
    segmentations: tuple[Any, ...]
    labels: Mapping[str, str | int] = field(default_factory=dict)


class AnnotatedDataset:
    """Samples of an annotation file, whose images lie in one folder.

    Args:
        name: For provenance.
        spec: What `load_dataset` makes it from.
        images: Folder that the records' files are relative to.
        records: In order.

    Raises:
        ValueError: there are no records, or images are missing, or masks cannot be read; all are listed.
    """

    def __init__(self, name: str, spec: str, images: str | Path, records: Sequence[Record]) -> None:
        self.name, self.spec, self.records = name, spec, list(records)
        self.root = real_path(images)
        if not self.root.is_dir():
            raise ValueError(f"The folder of images '{images}' does not exist; name it with images=FOLDER.")
        if not self.records:
            raise ValueError(f"{spec!r} holds no samples; check the file, or its split.")
        named = dict.fromkeys(record.file for record in self.records)
        self._paths = {file: path for file in named if (path := file_inside(self.root, file)) is not None}
        missing = [f"'{record.file}'" for record in self.records if record.file not in self._paths]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(self.records)} annotated images are not in '{self.root}': {listed(missing)}; "
                "name their folder with images=FOLDER, or take fewer with limit=N."
            )
        faults = [fault for record in self.records for fault in _faults(record)]
        if faults:
            raise ValueError(f"{len(faults)} segmentations of {spec!r} cannot be read: {listed(faults)}.")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.records):
            raise IndexError(f"Sample {index} of a dataset of {len(self.records)}.")
        record = self.records[index]
        return Sample(
            id=record.id,
            load=partial(_load, self._paths[record.file], record.size),
            masks=partial(decode_masks, record.segmentations, record.size, record.id),
            captions=record.captions,
            labels=dict(record.labels),
            objects=tuple({"category": c} for c in record.categories),
        )

    def fingerprint(self) -> str:
        """Hash of names, contents, texts, categories and segmentations."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        found = {file: path.relative_to(self.root).as_posix() for file, path in self._paths.items()}
        contents = dict(zip(found, content_digests(self.root, list(found.values())), strict=True))
        digest = hashlib.sha256()
        for record in self.records:
            texts = [c.text for c in record.captions]
            row = [record.id, record.file, contents[record.file], texts, record.categories, record.segmentations]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()[:16]


def _load(path: Path, size: tuple[int, int]) -> Image.Image:
    """The image as its pixels are stored, which is what was annotated; upright where the annotated size fits only so.

    Of any other size it is not used: the masks would lie elsewhere.
    """
    image = read_image(path, upright=False)
    if (image.height, image.width) != size:
        image = read_image(path)
    if (image.height, image.width) != size:
        raise ImageError(
            f"'{path}' has {image.width} x {image.height} pixels, its annotations are for {size[1]} x {size[0]}; "
            "use the images that the annotations belong to."
        )
    return image


# --- COCO ---------------------------------------------------------------------------------------------


def coco_dataset(
    annotations: str | Path, images: str | Path, captions: str | Path | None = None, limit: int | None = None
) -> AnnotatedDataset:
    """COCO's ``instances_*.json`` with, if there is one, ``captions_*.json``; images in the order of their ids.

    Categories that a caption names, as whole words in singular or plural, become noun spans that speak of all the
    image's instances of the category.  Without a captions file each image gets the caption "a photo of a dog and a cat".

    Args:
        annotations: The instances' file.
        images: Folder of the images.
        captions: The captions' file.
        limit: The first images only.

    Raises:
        ValueError: a file is not in COCO's layout; the message says where.
    """
    path = Path(annotations).expanduser()
    data = _json(path, dict)
    names = {_get(c, "id", int, path): _get(c, "name", str, path) for c in _list(data, "categories", path)}
    entries = sorted(_list(data, "images", path), key=lambda entry: _get(entry, "id", int, path))[:limit]
    files = {_get(e, "id", int, path): e for e in entries}
    if len(files) < len(entries):
        raise ValueError(f"'{path}': an image id stands twice among its images; each must be unique.")
    instances: dict[int, list[tuple[str, Any]]] = {number: [] for number in files}
    known = {_get(e, "id", int, path) for e in _list(data, "images", path)}
    for entry in _list(data, "annotations", path):
        number, category = _get(entry, "image_id", int, path), _get(entry, "category_id", int, path)
        if number not in known or category not in names:
            raise ValueError(
                f"'{path}': an annotation names image {number} and category {category}; one of them is not listed."
            )
        if number in instances:
            instances[number].append((names[category], entry.get("segmentation", [])))
    texts = _coco_captions(Path(captions).expanduser(), set(files)) if captions is not None else {}
    records = []
    for number, entry in files.items():
        categories = tuple(name for name, _ in instances[number])
        objects = _by_category(categories)
        said = texts.get(number, [])
        written = tuple(Caption(text, category_spans(text, objects), "coco") for text in said) if captions is not None else ()
        labels: dict[str, str | int] = {"n_objects": len(categories)}
        records.append(
            Record(
                id=inside(f"'{path}'", _get(entry, "file_name", str, path)), file=inside(f"'{path}'", entry["file_name"]),
                size=(_get(entry, "height", int, path), _get(entry, "width", int, path)),
                captions=written or (listing(objects),), categories=categories,
                segmentations=tuple(s for _, s in instances[number]), labels=labels,
            )
        )  # fmt: skip
    options = {
        "images": _absolute(images),
        **({"captions": _absolute(captions)} if captions else {}),
        **({"limit": limit} if limit else {}),
    }
    return AnnotatedDataset(f"coco-{path.stem}", join_spec("coco", path.resolve(), options), images, records)


def _coco_captions(path: Path, wanted: set[int]) -> dict[int, list[str]]:
    texts: dict[int, list[str]] = {}
    for entry in _list(_json(path, dict), "annotations", path):
        if "caption" not in entry:
            raise ValueError(f"'{path}' holds annotations without a caption; give COCO's captions_*.json as captions=FILE.")
        if entry.get("image_id") in wanted:
            texts.setdefault(entry["image_id"], []).append(" ".join(_get(entry, "caption", str, path).split()))
    return texts


def _by_category(categories: Iterable[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for index, name in enumerate(categories):
        found.setdefault(name, []).append(index)
    return {name: tuple(indices) for name, indices in found.items()}


def plural_forms(name: str) -> tuple[str, ...]:
    """A category's name and its plurals, as captions write them.

    >>> plural_forms("bus"), plural_forms("wine glass"), plural_forms("person")
    (('bus', 'buses'), ('wine glass', 'wine glasses'), ('person', 'people', 'persons'))
    """
    head, _, last = name.rpartition(" ")
    front, small = f"{head} " if head else "", last.lower()
    if small.endswith(("s", "x", "ch", "sh")):
        regular = f"{last}es"
    elif small.endswith("y") and small[-2:-1] not in "aeiou":
        regular = f"{last[:-1]}ies"
    else:
        regular = f"{last}s"
    irregular = IRREGULAR.get(small)
    plurals = (regular,) if irregular is None else (irregular, regular) if small == "person" else (irregular,)
    return tuple(dict.fromkeys([name, *(front + plural for plural in plurals)]))


def category_spans(text: str, objects: Mapping[str, tuple[int, ...]]) -> tuple[Span, ...]:
    """Where a text names categories, as whole words in singular or plural and any case; "hot dog" is no dog.

    >>> category_spans("Dogs eat a hot dog", {"dog": (0, 1), "hot dog": (2,)})
    (Span(start=0, end=4, objects=(0, 1), role='noun'), Span(start=11, end=18, objects=(2,), role='noun'))
    """
    words = sorted(((form, name) for name in objects if name.strip() for form in plural_forms(name)), key=lambda w: -len(w[0]))
    if not words:
        return ()
    # a group for each form, the longest first: which one matched is then no question of how case is folded
    pattern = rf"(?<!\w)(?:{'|'.join(f'({re.escape(form)})' for form, _ in words)})(?!\w)"
    return tuple(
        Span(*match.span(), objects[words[(match.lastindex or 1) - 1][1]], "noun")
        for match in re.finditer(pattern, text, re.IGNORECASE)
    )


def listing(objects: Mapping[str, tuple[int, ...]], words: Mapping[str, str] | None = None) -> Caption:
    """A caption for an image that has none: what is in it.

    >>> listing({"dog": (0, 2), "apple": (1,)}).text
    'a photo of dogs and an apple'
    """
    text, spans = "a photo", []
    for position, (name, indices) in enumerate(objects.items()):
        word = (words or {}).get(name, name)
        several = len(indices) > 1
        phrase = plural_forms(word)[-1 if word.lower() != "person" else 1] if several else article(word)
        text += " of " if position == 0 else " and " if position == len(objects) - 1 else ", "
        text += phrase
        start = len(text) - len(phrase) if several else len(text) - len(word)
        spans.append(Span(start, len(text), indices, "noun"))
    return Caption(text, tuple(spans), "listing")


# --- RefCOCO ------------------------------------------------------------------------------------------


def refcoco_dataset(
    refs: str | Path,
    images: str | Path,
    instances: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> AnnotatedDataset:
    """RefCOCO, RefCOCO+ or RefCOCOg: one sample per referred object, its expressions as captions of role "phrase".

    Two layouts of rows, as .json (a list), .jsonl or .parquet: the original refs (``ref_id, image_id, ann_id, split,
    sentences``), whose masks lie in `instances`, or the hub's, which bring them along (``raw_anns, raw_image_info``).
    The label `image` tells which samples share an image, so that intervals can be clustered by it.

    Raises:
        ValueError: the file is a pickle, or in no known layout.
    """
    path = Path(refs).expanduser()
    rows = _rows(path)
    if split is not None:
        there = sorted({str(row.get("split")) for row in rows})
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise ValueError(f"'{path}' has no split {split!r}; it has {', '.join(there)}.")
    source = _Instances(Path(instances).expanduser()) if instances is not None else None
    records = []
    for row in rows[:limit]:
        annotation, image, category = source.of(row, path) if source else _from_row(row, path)
        file = inside(f"'{path}'", _get(image, "file_name", str, path))
        said = [" ".join(str(s.get("sent") or s.get("raw")).split()) for s in row["sentences"]]
        nouns = {category: (0,)} if category else {}
        captions = tuple(
            Caption(text, (Span(0, len(text), (0,), "phrase"), *category_spans(text, nouns)), "expression") for text in said
        )
        labels = {"image": file, "split": str(row.get("split", "")), **({"category": category} if category else {})}
        size = (_get(image, "height", int, path), _get(image, "width", int, path))
        segmentation = annotation.get("segmentation", [])
        name = f"{Path(file).stem}-{_get(row, 'ref_id', int, path)}"
        records.append(Record(name, file, size, captions, (category or "object",), (segmentation,), labels))
    options = {
        "images": _absolute(images), **({"instances": _absolute(instances)} if instances else {}),
        **({"split": split} if split else {}), **({"limit": limit} if limit else {}),
    }  # fmt: skip
    return AnnotatedDataset(f"refcoco-{path.stem}", join_spec("refcoco", path.resolve(), options), images, records)


class _Instances:
    """RefCOCO's instances.json by annotation and image."""

    def __init__(self, path: Path) -> None:
        data = _json(path, dict)
        self.path = path
        self.annotations = {_get(a, "id", int, path): a for a in _list(data, "annotations", path)}
        self.images = {_get(i, "id", int, path): i for i in _list(data, "images", path)}
        self.categories = {_get(c, "id", int, path): _get(c, "name", str, path) for c in _list(data, "categories", path)}

    def of(self, row: Mapping[str, Any], refs: Path) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
        annotation, image = _get(row, "ann_id", int, refs), _get(row, "image_id", int, refs)
        if annotation not in self.annotations or image not in self.images:
            raise ValueError(f"'{refs}' names annotation {annotation} of image {image}, which '{self.path}' does not have.")
        found = self.annotations[annotation]
        return found, self.images[image], self.categories.get(found.get("category_id"), "")


def _from_row(row: Mapping[str, Any], path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    """Annotation, image and (unknown) category of a row that brings them as JSON texts."""
    if "raw_anns" not in row or "raw_image_info" not in row:
        raise ValueError(
            f"'{path}' has refs without masks (no column raw_anns); give RefCOCO's instances.json as instances=FILE."
        )
    found = [parse_json(str(row[name]), f"'{path}', {name} of a row") for name in ("raw_anns", "raw_image_info")]
    if not all(isinstance(value, dict) for value in found):
        raise ValueError(f"'{path}': raw_anns and raw_image_info of a row must be objects; found {found}.")
    return found[0], found[1], ""


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix in PICKLES:
        raise ValueError(
            f"'{path}' is a pickle, and opening one runs whatever code it holds. Where you trust it, write its list of refs as "
            "JSON (json.dump) or take the hub's Parquet file; then name that file."
        )
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"'{path}' does not exist; check its name.")
        import pandas as pd  # only here: slow to load

        rows: list[Any] = pd.read_parquet(path).to_dict("records")
    elif path.suffix == ".jsonl":
        rows = [parse_json(line, where) for where, line in numbered_lines(path)]
    else:
        rows = _json(path, list)
    for row in rows:
        said = row.get("sentences") if isinstance(row, dict) else None
        if not isinstance(said, list | np.ndarray) or not all(isinstance(sentence, dict) for sentence in said):
            raise ValueError(f"'{path}': a row has no sentences; rows of RefCOCO have ref_id, image_id, ann_id and sentences.")
    return rows


# --- Pascal VOC ---------------------------------------------------------------------------------------


class VocDataset:
    """A folder in Pascal VOC's layout (``VOC2012``), one sample per image of a segmentation split.

    Each instance of ``SegmentationObject`` is an object, of the class that most of its pixels have in
    ``SegmentationClass``; void pixels (255) belong to none.  The caption is a `listing` of the classes.

    Args:
        root: The folder that holds JPEGImages, SegmentationClass, SegmentationObject and ImageSets.
        split: A file of ``ImageSets/Segmentation``: train, val, trainval.
        limit: The first images only.

    Raises:
        ValueError: the folder is not laid out so.
    """

    def __init__(self, root: str | Path, split: str = "val", limit: int | None = None) -> None:
        self.root = real_path(root)
        self.split, self.limit = split, limit
        lists = self.root / "ImageSets" / "Segmentation"
        there = sorted(p.stem for p in lists.glob("*.txt"))
        if split not in there:
            found = f"it has {', '.join(there)}" if there else "that folder has no lists; name the folder VOC2012 itself"
            raise ValueError(f"'{lists}' has no split {split!r}; {found}.")
        lines = [line.strip() for _, line in numbered_lines(lists / f"{split}.txt")][:limit]
        self.ids = [inside(f"'{lists / split}.txt'", line) for line in lines]
        if not self.ids:
            raise ValueError(f"'{lists / split}.txt' lists no images.")
        paths = [path for name in self.ids for path in self._paths(name)]
        bad = [f"'{path}'" for path in paths if not path.is_file() or not real_path(path).is_relative_to(self.root)]
        if bad:
            raise ValueError(
                f"{len(bad)} file(s) that the split {split} lists are not in the folder, or links out of it: {listed(bad)}."
            )
        self._categories: dict[str, tuple[str, ...]] = {}

    @property
    def name(self) -> str:
        return f"voc-{self.root.name}-{self.split}"

    @property
    def spec(self) -> str:
        return join_spec("voc", self.root.resolve(), {"split": self.split, **({"limit": self.limit} if self.limit else {})})

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """Image, classes, instances."""
        folders = (("JPEGImages", "jpg"), ("SegmentationClass", "png"), ("SegmentationObject", "png"))
        image, classes, instances = (self.root / folder / f"{name}.{suffix}" for folder, suffix in folders)
        return image, classes, instances

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.ids):
            raise IndexError(f"Image {index} of a dataset of {len(self.ids)}.")
        name = self.ids[index]
        image, classes, instances = self._paths(name)
        if name not in self._categories:
            self._categories[name] = _voc_categories(classes, instances)
        categories = self._categories[name]
        objects = _by_category(categories)
        return Sample(
            id=name,
            load=partial(_load, image, _png_size(classes)),
            masks=partial(_voc_masks, instances),
            captions=(listing(objects, VOC_WORDS),),
            labels={"n_objects": len(categories)},
            objects=tuple({"category": c} for c in categories),
        )

    def fingerprint(self) -> str:
        """Hash of names and contents of images and segmentations."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        paths = [path.relative_to(self.root).as_posix() for name in self.ids for path in self._paths(name)]
        rows = [self.ids, content_digests(self.root, paths)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _indices(path: Path) -> NDArray[np.uint8]:
    """The palette's numbers of an indexed PNG (y, x)."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("P", "L") or image.width * image.height > MAX_PIXELS:
                raise ImageError(f"'{path}' is a {image.mode} image of {image.width} x {image.height}; VOC's are indexed PNGs.")
            return np.asarray(image, np.uint8)
    except (OSError, SyntaxError) as error:
        raise refusal(path, error) from error


def _png_size(path: Path) -> tuple[int, int]:
    with Image.open(path, formats=("PNG",)) as image:
        return image.height, image.width


def _voc_numbers(instances: NDArray[np.uint8]) -> list[int]:
    return [int(n) for n in np.unique(instances) if n not in (0, VOC_VOID)]


def _voc_categories(classes: Path, instances: Path) -> tuple[str, ...]:
    kinds, numbers = _indices(classes), _indices(instances)
    if kinds.shape != numbers.shape:
        raise ImageError(f"'{classes}' and '{instances}' differ in size; copy them again.")
    found = []
    for number in _voc_numbers(numbers):
        votes = np.bincount(kinds[(numbers == number) & (kinds != 0) & (kinds != VOC_VOID)], minlength=1)
        code = int(votes.argmax())
        if not 0 < code < len(VOC_CLASSES):
            raise ImageError(
                f"'{classes}' gives instance {number} no class of VOC's {len(VOC_CLASSES) - 1}; copy the file again."
            )
        found.append(VOC_CLASSES[code])
    return tuple(found)


def _voc_masks(instances: Path) -> Bools:
    numbers = _indices(instances)
    found = [numbers == number for number in _voc_numbers(numbers)]
    return np.stack(found) if found else np.zeros((0, *numbers.shape), bool)


# --- segmentations ------------------------------------------------------------------------------------


def decode_masks(segmentations: Sequence[Any], size: tuple[int, int], where: str) -> Bools:
    """COCO's segmentations, polygons or run lengths, as (object, y, x)."""
    masks = np.zeros((len(segmentations), *size), bool)
    for index, segmentation in enumerate(segmentations):
        if segmentation:
            masks[index] = _decode(segmentation, size, where)
    return masks


def _faults(record: Record) -> list[str]:
    """What is wrong with a record's segmentations."""
    found = []
    for segmentation in record.segmentations:
        try:
            if segmentation:
                _checked(segmentation, record.size, record.id)
        except ValueError as error:
            found.append(str(error))
    return found


def _checked(segmentation: Any, size: tuple[int, int], where: str) -> Any:
    """The segmentation, its runs unpacked; what does not fit the image is refused before the decoder, written in C, sees it.

    The decoder would fill what packed runs leave open with whatever lay in the memory.
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
        return {"size": [height, width], "counts": counts}
    for polygon in segmentation if isinstance(segmentation, list) else [segmentation]:
        fits = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not fits or not all(isinstance(v, int | float) and -1e300 < v < 1e300 for v in polygon):
            raise ValueError(f"A polygon of {where} is not a list of at least three x, y pairs.")
        if min(polygon) < -max(size) or max(polygon) > 2 * max(size):
            raise ValueError(
                f"A polygon of {where} reaches from {min(polygon):g} to {max(polygon):g}; its image is {width} x {height}."
            )
    return segmentation


def _unpacked(packed: str | bytes, where: str) -> list[int]:
    """Run lengths from COCO's packed form: numbers of five bits a letter, from the fourth on as differences to the last but one."""
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


def _decode(segmentation: Any, size: tuple[int, int], where: str) -> Bools:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ValueError("COCO's masks need pycocotools; install it with: pip install 'diffprobe[coco]'") from error
    encoded = coco.frPyObjects(_checked(segmentation, size, where), *size)
    return np.asarray(coco.decode(coco.merge(encoded) if isinstance(encoded, list) else encoded), bool)


# --- files --------------------------------------------------------------------------------------------


def _json(path: Path, kind: type[Any]) -> Any:
    data = parse_json(read_text(path), f"'{path}'")
    if not isinstance(data, kind):
        raise ValueError(f"'{path}' holds a {type(data).__name__} where a {kind.__name__} was expected; is it the right file?")
    return data


def _list(data: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"'{path}' has no list {key!r}; it has {', '.join(data) or 'nothing'}. Is it COCO's layout?")
    return found


def _get(entry: Mapping[str, Any], key: str, kind: type[Any], path: Path) -> Any:
    value = entry.get(key)
    if not isinstance(value, (kind, np.integer) if kind is int else kind) or isinstance(value, bool):
        raise ValueError(f"'{path}': {key} is {value!r} where {kind.__name__} was expected.")
    return kind(value)


def _absolute(path: str | Path) -> str:
    return str(real_path(path))
