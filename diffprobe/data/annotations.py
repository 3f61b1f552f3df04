"""Photographs with annotated objects: COCO instances, RefCOCO expressions, Pascal VOC segmentation.

All yield `Sample` with masks, and captions whose spans tell which objects a word names.  The layouts are those of
the published files; nothing is downloaded.  The invariants: masks and images are those of the stored pixels, whatever its
EXIF note says about turning a photograph; an annotation file can name only images of the folder that is given; reading one
never runs code (RefCOCO's pickles are refused); a file is checked as a whole before anything is used.

Sources: Lin et al. 2014 (COCO), Yu et al. 2016 (RefCOCO), Everingham et al. 2010 (VOC).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffprobe.data.categories import by_category, category_spans, listing
from diffprobe.data.files import content_digests, file_inside, inside, listed, numbered_lines, parse_json, read_text, real_path
from diffprobe.data.images import MAX_PIXELS, ImageError, read_image, refusal
from diffprobe.data.samples import Caption, IndexedDataset, Sample, Span, join_spec
from diffprobe.data.segmentations import Bools, checked_runs, decode_masks
from diffprobe.data.tables import collected, open_parquet

PICKLES = (".p", ".pkl", ".pickle")
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


class AnnotatedDataset(IndexedDataset):
    """Samples of an annotation file, whose images lie in one folder.

    Args:
        spec: The text from which `load_dataset` makes this dataset.
        images: Folder that the records' files are relative to.
        records: One per sample, in order.

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
        checks = [
            partial(checked_runs, segmentation, record.size, record.id)
            for record in self.records
            for segmentation in record.segmentations
            if segmentation
        ]
        collected(f"the segmentations of {spec!r}", checks)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Sample:
        record = self.records[index]
        return Sample(
            id=record.id,
            load=partial(_load, self._paths[record.file], record.size),
            masks=partial(decode_masks, record.segmentations, record.size, record.id),
            captions=record.captions,
            labels=dict(record.labels),
            objects=tuple({"category": c} for c in record.categories),
        )

    def content(self) -> Iterator[bytes]:
        """Names, contents, texts, categories and segmentations."""
        for r, content in zip(self.records, self.image_digests, strict=True):
            texts = [caption.text for caption in r.captions]
            yield json.dumps([r.id, r.file, content, texts, r.categories, r.segmentations]).encode()

    @cached_property
    def image_digests(self) -> list[str]:
        """A hash of each sample's image file, by which a store can say which image was changed."""
        found = {file: path.relative_to(self.root).as_posix() for file, path in self._paths.items()}
        contents = dict(zip(found, content_digests(self.root, list(found.values())), strict=True))
        return [contents[r.file] for r in self.records]


def _load(path: Path, size: tuple[int, int]) -> Image.Image:
    """The image as its pixels are stored, which is what was annotated; turned upright where only that fits the size.

    Raises:
        ImageError: the image has another size, so the masks would lie elsewhere.
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


# --- checked files ------------------------------------------------------------------------------------


class _Checked:
    """An annotation file whose entries are checked while they are read; `finish` raises all faults together."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.faults: list[str] = []

    def json(self, kind: type[Any]) -> Any:
        """The file's value, of a type.

        Raises:
            ValueError: the file is not there, no JSON, or of another type.
        """
        data = parse_json(read_text(self.path), f"'{self.path}'")
        if not isinstance(data, kind):
            wanted, found = kind.__name__, type(data).__name__
            raise ValueError(f"'{self.path}' holds a {found} where a {wanted} was expected; is it the right file?")
        return data

    def entries(self, data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        """A list of objects in COCO's layout.

        Raises:
            ValueError: there is none of that name.
        """
        found = data.get(key)
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise ValueError(f"'{self.path}' has no list {key!r}; it has {', '.join(data) or 'nothing'}. Is it COCO's layout?")
        return found

    def get(self, entry: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
        """A value of a type; another is noted as a fault, and the type's empty value returned."""
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, kind):
            self.faults.append(f"'{self.path}': {key} is {value!r} where {kind.__name__} was expected")
            return kind()
        return kind(value)

    def image(self, entry: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
        """The file inside the folder of images and the (height, width) of an entry of COCO's images."""
        size = (self.get(entry, "height", int), self.get(entry, "width", int))
        name = self.get(entry, "file_name", str)
        try:
            return inside(f"'{self.path}'", name), size
        except ValueError as error:
            self.faults.append(str(error))
            return name, size

    def by_id(self, entries: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        return {self.get(entry, "id", int): entry for entry in entries}

    def finish(self) -> None:
        """Raises ValueError if anything was noted."""
        if self.faults:
            raise ValueError(f"{listed(list(dict.fromkeys(self.faults)))}.")


# --- COCO ---------------------------------------------------------------------------------------------


def coco_dataset(
    annotations: str | Path, images: str | Path, captions: str | Path | None = None, limit: int | None = None
) -> AnnotatedDataset:
    """COCO's ``instances_*.json`` with, if there is one, ``captions_*.json``; images in the order of their ids.

    Categories that a caption names, as whole words in singular or plural, become noun spans of all the image's
    instances of the category.  Without a captions file each image gets the caption "a photo of a dog and a cat".

    Args:
        annotations: The file of instances.
        images: Folder of the images.
        captions: The file of captions.

    Raises:
        ValueError: a file is not in COCO's layout; the message lists the places.
    """
    file = _Checked(annotations)
    data = file.json(dict)
    names = {number: file.get(entry, "name", str) for number, entry in file.by_id(file.entries(data, "categories")).items()}
    every = file.entries(data, "images")
    known = file.by_id(every)
    if len(known) < len(every) and not file.faults:
        file.faults.append(f"'{file.path}': an image id occurs twice among its images; each must be unique")
    chosen = dict(sorted(known.items())[:limit])
    instances: dict[int, list[tuple[str, Any]]] = {number: [] for number in chosen}
    for entry in file.entries(data, "annotations"):
        before = len(file.faults)
        number, category = file.get(entry, "image_id", int), file.get(entry, "category_id", int)
        if len(file.faults) == before and (number not in known or category not in names):
            file.faults.append(
                f"'{file.path}': an annotation names image {number} and category {category}; one of them is not listed"
            )
        elif number in instances:
            instances[number].append((names.get(category, ""), entry.get("segmentation", [])))
    places = {number: file.image(entry) for number, entry in chosen.items()}
    file.finish()
    texts = None if captions is None else _coco_captions(_Checked(captions), set(chosen))
    records = []
    for number, (name, size) in places.items():
        categories = tuple(category for category, _ in instances[number])
        objects = by_category(categories)
        written = tuple(Caption(text, category_spans(text, objects), "coco") for text in (texts or {}).get(number, []))
        segmentations = tuple(segmentation for _, segmentation in instances[number])
        labels: dict[str, str | int] = {"n_objects": len(categories)}
        records.append(Record(name, name, size, written or (listing(objects),), categories, segmentations, labels))
    options = {"images": images, "captions": captions, "limit": limit}
    return AnnotatedDataset(f"coco-{file.path.stem}", _spec("coco", file.path, options), images, records)


def _coco_captions(file: _Checked, wanted: set[int]) -> dict[int, list[str]]:
    texts: dict[int, list[str]] = {}
    for entry in file.entries(file.json(dict), "annotations"):
        if "caption" not in entry:
            raise ValueError(
                f"'{file.path}' holds annotations without a caption; give COCO's captions_*.json as captions=FILE."
            )
        if entry.get("image_id") in wanted:
            texts.setdefault(entry["image_id"], []).append(" ".join(file.get(entry, "caption", str).split()))
    file.finish()
    return texts


def _spec(kind: str, path: Path, options: Mapping[str, str | Path | int | None]) -> str:
    """The spec of a dataset, with absolute paths; options that are not given are left out."""
    given = {
        name: value if isinstance(value, int) or name == "split" else real_path(value)
        for name, value in options.items()
        if value
    }
    return join_spec(kind, path.resolve(), given)


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
        ValueError: the file is a pickle, or in no known layout; the message lists the places.
    """
    file = _Checked(refs)
    rows = _rows(file)
    if split is not None:
        there = sorted({str(row.get("split")) for row in rows})
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise ValueError(f"'{file.path}' has no split {split!r}; it has {', '.join(there)}.")
    find = _from_row if instances is None else _instances(_Checked(instances))
    records = []
    for row in rows[:limit]:
        found = find(row, file)
        if found is None:
            continue
        annotation, image, category = found
        name, size = file.image(image)
        said = [" ".join(str(s.get("sent") or s.get("raw")).split()) for s in row["sentences"]]
        nouns = {category: (0,)} if category else {}
        captions = tuple(
            Caption(text, (Span(0, len(text), (0,), "phrase"), *category_spans(text, nouns)), "expression") for text in said
        )
        labels = {"image": name, "split": str(row.get("split", "")), **({"category": category} if category else {})}
        key = f"{Path(name).stem}-{file.get(row, 'ref_id', int)}"
        records.append(
            Record(key, name, size, captions, (category or "object",), (annotation.get("segmentation", []),), labels)
        )
    file.finish()
    options = {"images": images, "instances": instances, "split": split, "limit": limit}
    return AnnotatedDataset(f"refcoco-{file.path.stem}", _spec("refcoco", file.path, options), images, records)


_Found = tuple[Mapping[str, Any], Mapping[str, Any], str] | None  # annotation, image and category ("" where not known)


def _instances(file: _Checked) -> Callable[[Mapping[str, Any], _Checked], _Found]:
    """Finds a row's annotation, image and category in RefCOCO's instances.json."""
    data = file.json(dict)
    annotations, images = (file.by_id(file.entries(data, key)) for key in ("annotations", "images"))
    categories = {n: file.get(entry, "name", str) for n, entry in file.by_id(file.entries(data, "categories")).items()}
    file.finish()

    def find(row: Mapping[str, Any], refs: _Checked) -> _Found:
        annotation, image = refs.get(row, "ann_id", int), refs.get(row, "image_id", int)
        if annotation not in annotations or image not in images:
            refs.faults.append(
                f"'{refs.path}' names annotation {annotation} of image {image}, which '{file.path}' does not have"
            )
            return None
        found = annotations[annotation]
        return found, images[image], categories.get(found.get("category_id", -1), "")

    return find


def _from_row(row: Mapping[str, Any], file: _Checked) -> _Found:
    """Annotation and image of a row that brings them as JSON texts."""
    if "raw_anns" not in row or "raw_image_info" not in row:
        raise ValueError(
            f"'{file.path}' has refs without masks (no column raw_anns); give RefCOCO's instances.json as instances=FILE."
        )
    try:
        found = [parse_json(str(row[name]), f"'{file.path}', {name} of a row") for name in ("raw_anns", "raw_image_info")]
        if not all(isinstance(value, dict) for value in found):
            raise ValueError(f"'{file.path}': raw_anns and raw_image_info of a row must be objects; found {found}")
    except ValueError as error:
        file.faults.append(str(error))
        return None
    return found[0], found[1], ""


def _rows(file: _Checked) -> list[Mapping[str, Any]]:
    path = file.path
    if path.suffix in PICKLES:
        raise ValueError(
            f"'{path}' is a pickle, and opening one runs whatever code it holds. Where you trust it, write its list of refs as "
            "JSON (json.dump) or take the hub's Parquet file; then name that file."
        )
    if path.suffix == ".parquet":
        with open_parquet(path) as table:
            rows: list[Any] = table.read().to_pylist()
    elif path.suffix == ".jsonl":
        rows = [parse_json(line, where) for where, line in numbered_lines(path)]
    else:
        rows = file.json(list)
    for row in rows:
        said = row.get("sentences") if isinstance(row, dict) else None
        if not isinstance(said, list) or not all(isinstance(sentence, dict) for sentence in said):
            raise ValueError(f"'{path}': a row has no sentences; rows of RefCOCO have ref_id, image_id, ann_id and sentences.")
    return rows


# --- Pascal VOC ---------------------------------------------------------------------------------------


class VocDataset(IndexedDataset):
    """A folder in Pascal VOC's layout (``VOC2012``), one sample per image of a segmentation split.

    Each instance of ``SegmentationObject`` is an object, of the class that most of its pixels have in
    ``SegmentationClass``; void pixels (255) belong to none.  The caption is a `listing` of the classes.

    Args:
        root: The folder that holds JPEGImages, SegmentationClass, SegmentationObject and ImageSets.
        split: A file of ``ImageSets/Segmentation``: train, val, trainval.

    Raises:
        ValueError: the folder is not laid out so.
    """

    def __init__(self, root: str | Path, split: str = "val", limit: int | None = None) -> None:
        self.root = real_path(root)
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
        self.name = f"voc-{self.root.name}-{split}"
        self.spec = _spec("voc", self.root, {"split": split, "limit": limit})
        self._categories: dict[str, tuple[str, ...]] = {}

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        """Image, classes, instances."""
        folders = (("JPEGImages", "jpg"), ("SegmentationClass", "png"), ("SegmentationObject", "png"))
        image, classes, instances = (self.root / folder / f"{name}.{suffix}" for folder, suffix in folders)
        return image, classes, instances

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int) -> Sample:
        name = self.ids[index]
        image, classes, instances = self._paths(name)
        if name not in self._categories:
            self._categories[name] = _voc_categories(classes, instances)
        categories = self._categories[name]
        with Image.open(classes, formats=("PNG",)) as annotated:
            size = annotated.height, annotated.width
        return Sample(
            id=name,
            load=partial(_load, image, size),
            masks=partial(_voc_masks, instances),
            captions=(listing(by_category(categories), VOC_WORDS),),
            labels={"n_objects": len(categories)},
            objects=tuple({"category": c} for c in categories),
        )

    def content(self) -> Iterator[bytes]:
        """Names and contents of images and segmentations."""
        paths = [path.relative_to(self.root).as_posix() for name in self.ids for path in self._paths(name)]
        yield json.dumps([self.ids, content_digests(self.root, paths)]).encode()


def _indices(path: Path) -> NDArray[np.uint8]:
    """The palette's numbers of an indexed PNG (y, x)."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("P", "L") or image.width * image.height > MAX_PIXELS:
                raise ImageError(f"'{path}' is a {image.mode} image of {image.width} x {image.height}; VOC's are indexed PNGs.")
            return np.asarray(image, np.uint8)
    except (OSError, SyntaxError) as error:
        raise refusal(path, error) from error


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
