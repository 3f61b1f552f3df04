"""Published benchmarks of images and captions, and the drawn twins, as one small type.

A spec names a kind and a source, ``mmvp-vlm:MMVP/MMVP_VLM`` or ``winoground:copies/winoground``; a source is a folder or
a dataset id of the hub, which is downloaded or found in the hub's cache.  Ids are never built in.  Images are read
only when asked for.  Benchmarks that ask questions are in `question_benchmarks.py`.

The invariants: what stands in an annotation file is a name inside the benchmark's folder, or it is refused; all entries are
checked before the first is used, and a message lists all that are at fault.

Layouts as published:

- MMVP-VLM (Tong et al. 2024, hub MMVP/MMVP_VLM): ``Questions.csv`` with columns Question ID, Type, Statement; image ID of
  a type lies in ``MLLM_VLM Images/TYPE/ID.jpg``.  IDs 2k - 1 and 2k are a pair: each statement is true of the image
  with its own ID.  9 types x 15 pairs; the official script puts "a photo of " before each statement.
- Winoground (Thrush et al. 2022, hub facebook/winoground, gated): ``data/examples.jsonl`` and ``data/images.zip``, where
  image_0 and image_1 are file stems; or Parquet, where they are {"bytes", "path"}.
- SugarCrepe (Hsieh et al. 2023, github RAIVNLab/sugar-crepe): seven JSON files, each {KEY: {filename, caption,
  negative_caption}}; the images are COCO's val2017.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffprobe.data import load_dataset, tables
from diffprobe.data.files import inside, numbered_lines, read_text
from diffprobe.data.images import ImageError, decode_image, read_image
from diffprobe.data.samples import did_you_mean, split_spec
from diffprobe.data.twins import TwinsDataset

Label = str | int | float
PHOTO = "a photo of "
_MAX_BYTES = 2**28  # that one picture of an archive may unpack to


@dataclass(frozen=True)
class Item:
    """Images and captions that belong together: caption i is true of image i and of no other image.

    Where there are more captions than images (SugarCrepe: one image, two captions), the others are true of none.

    Attributes:
        id: Unique in its benchmark.
        images: What reads or draws each image, RGB.
        captions: Candidate texts.
        pattern: The benchmark's own grouping: visual pattern, kind of swap, subset.
        labels: What else the benchmark says of it.
    """

    id: str
    images: tuple[tables.Loader, ...]
    captions: tuple[str, ...]
    pattern: str
    labels: Mapping[str, Label] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Items with the protocol by which they are scored (a key of `diffprobe.probes.alignment.PROTOCOLS`)."""

    name: str
    protocol: str
    spec: str
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Hash of every id, caption and pattern, and of the pictures."""
        texts = [(item.id, item.captions, item.pattern, len(item.images)) for item in self.items]
        return tables.items_digest(self.protocol, texts, [load for item in self.items for load in item.images])


def load_benchmark(spec: str) -> Benchmark:
    """The benchmark that a short text names.

    ``shapes-mmvp:N`` and ``shapes-winoground:N`` are N drawn items, with the option ``seed``; ``mmvp-vlm:SOURCE``,
    ``winoground:SOURCE`` and ``sugarcrepe:SOURCE?images=FOLDER`` are published ones, SOURCE being a folder or a hub id.

    Raises:
        ValueError: The text names no benchmark, or files, columns or entries of it are missing or wrong; the message names
            all entries that are.

    >>> benchmark = load_benchmark("shapes-winoground:4")
    >>> len(benchmark), benchmark.protocol, [item.pattern for item in benchmark.items[:2]]
    (4, 'winoground', ['attribute', 'relation'])
    """
    kind, source, options = split_spec(spec)
    if kind in DRAWN:
        dataset = load_dataset(spec)
        assert isinstance(dataset, TwinsDataset)
        return Benchmark(dataset.name, DRAWN[kind], dataset.spec, tuple(_twins(dataset)))
    if kind not in READERS or not source:
        raise ValueError(f"{spec!r} names no benchmark; valid are {FORMS}.{did_you_mean(kind, [*DRAWN, *READERS])}")
    for name, value in options.items():
        if kind != "sugarcrepe" or name != "images" or not value:
            given = f"{name}={value}"
            raise ValueError(f"{spec!r}: {given!r} is no option of {kind}; sugarcrepe takes images=FOLDER, the others none.")
    images = Path(options["images"]).expanduser() if options else None
    items = tuple(tables.collected(repr(spec), READERS[kind](tables.benchmark_folder(source), images)))
    tables.check_ids(spec, [item.id for item in items])
    return Benchmark(kind, kind, spec, items)


def _twins(dataset: TwinsDataset) -> Iterator[Item]:
    for number in range(dataset.count):
        sides = [dataset[2 * number], dataset[2 * number + 1]]
        yield Item(
            f"{dataset.name}-{number:06d}",
            tuple(side.load for side in sides),
            tuple(side.captions[0].text for side in sides),
            str(sides[0].labels["pattern"]),
        )


# --- published ------------------------------------------------------------------------------------

# First word of a type, in the annotation file or in the paper's figure -> this package's name of the pattern.
MMVP_PATTERNS = {
    "orientation": "orientation", "presence": "presence", "state": "state", "quantity": "quantity", "spatial": "position",
    "positional": "position", "color": "colour", "structural": "structure", "text": "text", "texts": "text",
    "camera": "viewpoint", "viewpoint": "viewpoint",
}  # fmt: skip
WINOGROUND_COLUMNS = (
    "id", "image_0", "image_1", "caption_0", "caption_1", "tag", "secondary_tag", "num_main_preds", "collapsed_tag"
)  # fmt: skip
SUGARCREPE_SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


Makers = Iterable[Callable[[], Item]]  # each makes one item, or raises ValueError where its entry is wrong


def read_mmvp_vlm(folder: Path, images: Path | None = None) -> Makers:
    """The pairs of MMVP-VLM, by ID; a type keeps its own words where it is not one of the nine."""
    source = folder / "Questions.csv"
    rows: dict[int, tuple[str, str, str]] = {}  # by ID: where, type, statement

    def read(where: str, number: str, kind: str, statement: str) -> None:
        if not number.isdigit() or int(number) in rows or not kind or not statement:
            raise ValueError(
                f"{where}: each row needs a Question ID of its own (found {number!r}), a Type ({kind!r}) and a "
                f"Statement ({statement!r})."
            )
        rows[int(number)] = (where, inside(where, kind), statement)

    def pair(first: int) -> Item:
        if first not in rows:
            raise ValueError(f"'{source}': ID {first} is missing, the other half of the pair of {first + 1}.")
        kind, other = rows[first][1], rows.get(first + 1)
        if other is None or other[1] != kind:
            found = f"has the type {other[1]!r}" if other else "is missing"
            raise ValueError(f"'{source}': IDs {first} and {first + 1} are a pair of type {kind!r}, but {first + 1} {found}.")
        both = {f"{first + side}.jpg": rows[first + side] for side in (0, 1)}
        shown = (partial(tables.image_file, row[0], folder / "MLLM_VLM Images" / kind / name) for name, row in both.items())
        loaders = tuple(tables.collected(f"'{source}'", shown))
        pattern = MMVP_PATTERNS.get(kind.replace("_", " ").split()[0].lower(), kind.lower())
        captions = tuple(PHOTO + statement for *_, statement in both.values())
        return Item(f"mmvp-vlm-{(first + 1) // 2:03d}", loaders, captions, pattern, {"type": kind})

    lines = tables.csv_rows(source, ("Question ID", "Type", "Statement"))
    tables.collected(f"'{source}'", (partial(read, where, *cells) for where, cells in lines))
    return (partial(pair, first) for first in sorted({number - 1 + number % 2 for number in rows}))


def read_winoground(folder: Path, images: Path | None = None) -> Makers:
    """The quadruples of Winoground, grouped by collapsed_tag (Object, Relation, Both)."""
    if found := sorted(folder.rglob("*.parquet")):
        rows = tables.parquet_rows(found, folder, WINOGROUND_COLUMNS, ("image_0", "image_1"))
        return (partial(_winoground_item, row) for row in rows)
    found = [path for name in ("examples.jsonl", "metadata.jsonl") for path in sorted(folder.rglob(name))]
    if not found:
        raise ValueError(
            f"'{folder}' has neither Parquet files nor an examples.jsonl; it should be a copy of facebook/winoground."
        )
    pictures = _pictures(found[0].parent)
    return (partial(_winoground_line, pictures, where, line) for where, line in numbered_lines(found[0]))


def _winoground_line(pictures: Mapping[str, tables.Loader], where: str, line: str) -> Item:
    row = tables.json_object(line, where, WINOGROUND_COLUMNS)
    for name in ("image_0", "image_1"):
        if (stem := Path(inside(where, str(row[name]))).stem) not in pictures:
            raise ValueError(f"{where}: there is no image {row[name]!r} in 'images' or 'images.zip' beside it; copy it there.")
        row[name] = pictures[stem]
    return _winoground_item(row)


def _winoground_item(row: Mapping[str, Any]) -> Item:
    return Item(
        f"winoground-{row['id']}",
        (row["image_0"], row["image_1"]),
        (str(row["caption_0"]), str(row["caption_1"])),
        str(row["collapsed_tag"]),
        {name: row[name] for name in ("tag", "secondary_tag", "num_main_preds")},
    )


def _pictures(folder: Path) -> dict[str, tables.Loader]:
    """Images by their stem: files of the folder ``images``, or entries of ``images.zip``."""
    files, archive = (folder / "images").rglob("*"), folder / "images.zip"
    found: dict[str, tables.Loader] = {path.stem: partial(read_image, path) for path in sorted(files) if path.suffix}
    if not found and archive.is_file():
        with zipfile.ZipFile(archive) as opened:
            # what the system that packed it adds (__MACOSX/._ex_0_img_0.png) begins with a dot
            names = [name for name in opened.namelist() if not Path(name).name.startswith(".")]
        found = {Path(name).stem: partial(_read_entry, archive, name) for name in names}
    return found


def _read_entry(archive: Path, name: str) -> Image.Image:
    with zipfile.ZipFile(archive) as opened:
        if opened.getinfo(name).file_size > _MAX_BYTES:
            raise ImageError(f"'{archive}/{name}' unpacks to more than {_MAX_BYTES:,} bytes; replace it by a smaller image.")
        return decode_image(opened.read(name), f"{archive}/{name}")


def read_sugarcrepe(folder: Path, images: Path | None = None) -> Makers:
    """The seven subsets of SugarCrepe; COCO's images in `images`, or in val2017 or images beside the JSON files."""
    root = folder if (folder / f"{SUGARCREPE_SUBSETS[0]}.json").is_file() else folder / "data"
    if absent := [name for name in SUGARCREPE_SUBSETS if not (root / f"{name}.json").is_file()]:
        raise ValueError(f"'{folder}' has no {', '.join(f'{name}.json' for name in absent)}; SugarCrepe has seven such files.")
    beside = [base / name for base in (folder, root) for name in ("val2017", "images")]
    pictures = tables.image_folder("sugarcrepe", folder, images, "COCO val2017", beside)
    for subset in SUGARCREPE_SUBSETS:
        source = root / f"{subset}.json"
        for key, row in tables.json_object(read_text(source), f"'{source}'").items():
            yield partial(_sugarcrepe_item, f"'{source}', entry {key!r}", f"{subset}-{key}", subset, pictures, row)


def _sugarcrepe_item(where: str, name: str, subset: str, pictures: Path, row: Any) -> Item:
    tables.check_columns(where, row, ("filename", "caption", "negative_caption"))
    image = tables.image_file(where, pictures / inside(where, str(row["filename"])))
    return Item(name, (image,), (str(row["caption"]), str(row["negative_caption"])), subset)


DRAWN = {"shapes-mmvp": "mmvp-vlm", "shapes-winoground": "winoground"}
READERS: dict[str, Callable[[Path, Path | None], Makers]] = {
    "mmvp-vlm": read_mmvp_vlm,
    "winoground": read_winoground,
    "sugarcrepe": read_sugarcrepe,
}
FORMS = (
    ", ".join([*(f"{kind}:N" for kind in DRAWN), "mmvp-vlm:SOURCE", "winoground:SOURCE", "sugarcrepe:SOURCE?images=FOLDER"])
    + " (SOURCE is a folder or a hub id)"
)
