"""Readers of published benchmarks: the hub's layouts and local copies of them, and the drawn twins, as one small type.

A spec names a kind and a source, ``mmvp-vlm:MMVP/MMVP_VLM`` or ``winoground:copies/winoground``; a source is a folder or
a dataset id of the hub, which is downloaded or found in the hub's cache.  Ids are never built in.  Images are read
only when asked for.  Benchmarks that ask questions are in `question_benchmarks.py`.

The invariant: what stands in an annotation file is a name inside the benchmark's folder, or it is refused.

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

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from diffprobe.data import load_dataset
from diffprobe.data.drawn import spread
from diffprobe.data.files import content_digests, inside, numbered_lines, parse_json, read_text, real_path
from diffprobe.data.images import ImageError, decode_image, read_image
from diffprobe.data.samples import split_spec
from diffprobe.data.twins import TwinsDataset

Label = str | int | float
Loader = Callable[[], Image.Image]
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
    images: tuple[Loader, ...]
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
        digest = hashlib.sha256(self.protocol.encode())
        for item in self.items:
            digest.update(repr((item.id, item.captions, item.pattern, len(item.images))).encode())
        return hashlib.sha256(f"{digest.hexdigest()}{pictures_digest(self.items)}".encode()).hexdigest()[:16]


def pictures_digest(items: Sequence[Any]) -> str:
    """Hash of the files that hold the items' images, and of the pixels of drawn ones, evenly spread where they are many."""
    loaders = [load for item in items for load in item.images]
    given = [(getattr(load, "args", ()) or (None,))[0] for load in loaders]  # the file: an image, an archive or a table of them
    files = sorted({str(real_path(path)) for path in given if isinstance(path, Path)})
    root = Path(os.path.commonpath(files)) if files else Path()
    digest = hashlib.sha256(repr(content_digests(root.parent if root.is_file() else root, files)).encode())
    drawn = [load for load, path in zip(loaders, given, strict=True) if not isinstance(path, Path)]
    for number in spread(len(drawn)):
        digest.update(np.asarray(drawn[number]()).tobytes())
    return digest.hexdigest()


def load_benchmark(spec: str) -> Benchmark:
    """The benchmark that a short text names.

    ``shapes-mmvp:N`` and ``shapes-winoground:N`` are N drawn items, with the option ``seed``; ``mmvp-vlm:SOURCE``,
    ``winoground:SOURCE`` and ``sugarcrepe:SOURCE?images=FOLDER`` are published ones, SOURCE being a folder or a hub id.

    Raises:
        ValueError: the text names no benchmark, or a file, column or id of it is missing; the message names it.

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
        near = get_close_matches(kind, [*DRAWN, *READERS], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{spec!r} names no benchmark; valid are {FORMS}.{hint}")
    for name, value in options.items():
        if kind != "sugarcrepe" or name != "images" or not value:
            given = f"{name}={value}"
            raise ValueError(f"{spec!r}: {given!r} is no option of {kind}; sugarcrepe takes images=FOLDER, the others none.")
    images = Path(options["images"]).expanduser() if options else None
    items = tuple(READERS[kind](benchmark_folder(source), images))
    _check_ids(spec, [item.id for item in items])
    return Benchmark(kind, kind, spec, items)


def benchmark_folder(source: str, patterns: list[str] | None = None) -> Path:
    """A local copy's folder, or the folder of a hub dataset, downloaded or from the hub's cache.

    Args:
        source: A folder or a hub id.
        patterns: Which files are downloaded ("data/validation-*"); all of them by default.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"No benchmark at {source!r}: neither a folder, nor a dataset that the hub or its cache can give here "
            f"({type(error).__name__}). Give a folder, or for a gated dataset accept its terms and run 'hf auth login'."
        ) from error


def _check_ids(spec: str, ids: Sequence[str]) -> None:
    if not ids:
        raise ValueError(f"{spec!r} has no items: its annotation files are empty.")
    for name, times in Counter(ids).items():
        if times > 1:
            raise ValueError(f"{spec!r}: id {name!r} stands twice; noise belongs to ids, so each must be unique.")


# --- drawn twins ----------------------------------------------------------------------------------


def _twins(dataset: TwinsDataset) -> Iterator[Item]:
    for number in range(dataset.count):
        sides = [dataset[2 * number], dataset[2 * number + 1]]
        yield Item(
            f"{dataset.name}-{number:06d}",
            tuple(side.load for side in sides),
            tuple(side.captions[0].text for side in sides),
            str(sides[0].labels["pattern"]),
        )


# --- images and captions: MMVP-VLM, Winoground, SugarCrepe ----------------------------------------

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


def read_mmvp_vlm(folder: Path, images: Path | None = None) -> Iterator[Item]:
    """The pairs of MMVP-VLM, by ID; a type keeps its own words where it is not one of the nine."""
    source = folder / "Questions.csv"
    rows: dict[int, tuple[str, str]] = {}
    for line, (number, kind, statement) in enumerate(_csv_rows(source, ("Question ID", "Type", "Statement")), 2):
        where = f"'{source}', line {line}"
        if not number.isdigit() or int(number) in rows or not kind or not statement:
            raise ValueError(
                f"{where}: each row needs a Question ID of its own (found {number!r}), a Type ({kind!r}) and a "
                f"Statement ({statement!r})."
            )
        rows[int(number)] = (inside(where, kind), statement)
    for first in sorted(number for number in rows if number % 2):
        if first + 1 not in rows or rows[first + 1][0] != rows[first][0]:
            other = rows.get(first + 1)
            found = f"has the type {other[0]!r}" if other else "is missing"
            raise ValueError(
                f"'{source}': IDs {first} and {first + 1} are a pair of type {rows[first][0]!r}, but {first + 1} {found}."
            )
        kind = rows[first][0]
        paths = [_existing(folder / "MLLM_VLM Images" / kind / f"{number}.jpg", source) for number in (first, first + 1)]
        yield Item(
            f"mmvp-vlm-{(first + 1) // 2:03d}",
            tuple(partial(read_image, path) for path in paths),
            tuple(PHOTO + rows[number][1] for number in (first, first + 1)),
            MMVP_PATTERNS.get(kind.replace("_", " ").split()[0].lower(), kind.lower()),
            {"type": kind},
        )
    if odd := [number for number in rows if number % 2 == 0 and number - 1 not in rows]:
        raise ValueError(f"'{source}': ID {odd[0] - 1} is missing, the other half of the pair of {odd[0]}.")


def read_winoground(folder: Path, images: Path | None = None) -> Iterator[Item]:
    """The quadruples of Winoground, grouped by collapsed_tag (Object, Relation, Both)."""
    tables = sorted(folder.rglob("*.parquet"))
    rows = _parquet_rows(tables, folder, WINOGROUND_COLUMNS, ("image_0", "image_1")) if tables else _winoground_lines(folder)
    for row in rows:
        yield Item(
            f"winoground-{row['id']}",
            (row["image_0"], row["image_1"]),
            (str(row["caption_0"]), str(row["caption_1"])),
            str(row["collapsed_tag"]),
            {name: row[name] for name in ("tag", "secondary_tag", "num_main_preds")},
        )


def _winoground_lines(folder: Path) -> Iterator[dict[str, Any]]:
    found = [path for name in ("examples.jsonl", "metadata.jsonl") for path in sorted(folder.rglob(name))]
    if not found:
        raise ValueError(
            f"'{folder}' has neither Parquet files nor an examples.jsonl; it should be a copy of facebook/winoground."
        )
    pictures = _Pictures(found[0].parent)
    for where, row in _json_lines(found[0], WINOGROUND_COLUMNS):
        for name in ("image_0", "image_1"):
            row[name] = pictures.loader(where, str(row[name]))
        yield row


class _Pictures:
    """Images that are named by their stem: files of the folder ``images``, or entries of ``images.zip``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.archive = folder / "images", folder / "images.zip"
        self.files = {path.stem: path for path in sorted(self.folder.rglob("*")) if path.suffix} if self.folder.is_dir() else {}
        self.entries: dict[str, str] = {}
        if not self.files and self.archive.is_file():
            with zipfile.ZipFile(self.archive) as opened:
                # what the system that packed it adds (__MACOSX/._ex_0_img_0.png) begins with a dot
                entries = [name for name in opened.namelist() if not Path(name).name.startswith(".")]
            self.entries = {Path(name).stem: name for name in entries}

    def loader(self, where: str, name: str) -> Loader:
        stem = Path(inside(where, name)).stem
        if stem in self.files:
            return partial(read_image, self.files[stem])
        if stem in self.entries:
            return partial(_read_entry, self.archive, self.entries[stem])
        raise ValueError(f"{where}: there is no image {name!r} in '{self.folder}' or '{self.archive}'; copy it there.")


def _read_entry(archive: Path, name: str) -> Image.Image:
    with zipfile.ZipFile(archive) as opened:
        if opened.getinfo(name).file_size > _MAX_BYTES:
            raise ImageError(f"'{archive}/{name}' unpacks to more than {_MAX_BYTES:,} bytes; replace it by a smaller image.")
        return decode_image(opened.read(name), f"{archive}/{name}")


def read_sugarcrepe(folder: Path, images: Path | None = None) -> Iterator[Item]:
    """The seven subsets of SugarCrepe; COCO's images in `images`, or in val2017 or images beside the JSON files."""
    root = folder if (folder / f"{SUGARCREPE_SUBSETS[0]}.json").is_file() else folder / "data"
    if absent := [name for name in SUGARCREPE_SUBSETS if not (root / f"{name}.json").is_file()]:
        raise ValueError(f"'{folder}' has no {', '.join(f'{name}.json' for name in absent)}; SugarCrepe has seven such files.")
    beside = [base / name for base in (folder, root) for name in ("val2017", "images")]
    pictures = _image_folder("sugarcrepe", folder, images, "COCO val2017", beside)
    for subset in SUGARCREPE_SUBSETS:
        source = root / f"{subset}.json"
        for key, row in _json(read_text(source), f"'{source}'").items():
            where = f"'{source}', entry {key!r}"
            _check_columns(where, row, ("filename", "caption", "negative_caption"))
            path = _existing(pictures / inside(where, str(row["filename"])), source)
            texts = (str(row["caption"]), str(row["negative_caption"]))
            yield Item(f"{subset}-{key}", (partial(read_image, path),), texts, subset)


# --- files ----------------------------------------------------------------------------------------


def _existing(path: Path, source: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"'{path}', which '{source}' names, does not exist; copy the benchmark again.")
    return path


def _image_folder(kind: str, folder: Path, images: Path | None, what: str, beside: Sequence[Path]) -> Path:
    """The folder of images that the user names, or the first of some beside the annotations that there is."""
    found = images if images is not None else next((path for path in beside if path.is_dir()), None)
    if found is None or not found.is_dir():
        tried = f"'{images}' is no folder" if images is not None else f"there is no {beside[0].name} in '{folder}'"
        raise ValueError(f"{kind} needs the images of {what}, and {tried}; name them: {kind}:{folder}?images=FOLDER.")
    return found


def _csv_rows(source: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The wanted cells of each line as stripped text."""
    if not source.is_file():
        raise ValueError(f"'{source}' does not exist; is '{source.parent}' a whole copy of the benchmark?")
    try:
        frame = pd.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"'{source}' could not be read as CSV: {error}") from error
    frame.columns = frame.columns.str.strip()
    _check_columns(f"'{source}'", frame.columns, columns)
    yield from zip(*(frame[column].str.strip() for column in columns), strict=True)


def _json(text: str, where: str) -> dict[str, Any]:
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, where an object with named entries was expected.")
    return found


def _json_lines(source: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object of a JSON-lines file stands, and the object; empty lines are passed over."""
    for where, line in numbered_lines(source):
        row = _json(line, where)
        _check_columns(where, row, columns)
        yield where, row


def _check_columns(where: str, found: Any, wanted: Sequence[str]) -> None:
    """Refuse a row or table that lacks a column, naming it and those that there are."""
    names = list(found) if not isinstance(found, str) else []
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{where} has no {', '.join(missing)}; it has {', '.join(map(str, names)) or 'nothing'}.")


def _parquet_rows(
    tables: Sequence[Path], folder: Path, columns: Sequence[str], pictures: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files; a cell of an image column becomes what loads the image, so that pictures stay on the disk.

    Args:
        tables: The files.
        folder: Where images lie that the table only names.
        columns: Those that are wanted, pictures among them.
        pictures: Which of them hold images.
        optional: Which of these may be empty; the cell is None then.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"'{tables[0]}' is a Parquet file; reading it takes: pip install 'diffprobe[hub]'") from error
    # of an image that may be missing the name alone is read, which is missing with it
    wanted = [name for name in columns if name not in pictures] + [f"{name}.path" for name in optional]
    for path in tables:
        try:
            table = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow raises its own kinds on broken files
            raise ValueError(f"'{path}' could not be read as Parquet ({error}); copy it again.") from error
        with table:
            _check_columns(f"'{path}'", table.schema_arrow.names, columns)
            for group in range(table.num_row_groups):
                for row, cells in enumerate(table.read_row_group(group, wanted).to_pylist()):
                    absent = [name for name in optional if cells.get(name) is None]  # a column without any image is no struct
                    load = {name: partial(_parquet_image, path, group, row, name, folder) for name in pictures}
                    yield cells | load | dict.fromkeys(absent)


@lru_cache(maxsize=4)
def _image_column(path: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as table:
        return table.read_row_group(group, [column]).column(0)


def _parquet_image(path: Path, group: int, row: int, column: str, folder: Path) -> Image.Image:
    """An image kept as {"bytes": ..., "path": ...}; without bytes the path is a file of the benchmark's folder."""
    where = f"'{path}', row {row} of group {group}, {column}"
    cell = _image_column(path, group, column)[row].as_py()
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise ImageError(f"{where}: an image is {{'bytes': ..., 'path': ...}}; found {type(cell).__name__} without either.")
    if cell.get("bytes"):
        return decode_image(cell["bytes"], where.replace("'", ""))
    return read_image(folder / inside(where, cell["path"]))


DRAWN = {"shapes-mmvp": "mmvp-vlm", "shapes-winoground": "winoground"}
READERS: dict[str, Callable[[Path, Path | None], Iterator[Item]]] = {
    "mmvp-vlm": read_mmvp_vlm,
    "winoground": read_winoground,
    "sugarcrepe": read_sugarcrepe,
}
FORMS = (
    ", ".join([*(f"{kind}:N" for kind in DRAWN), "mmvp-vlm:SOURCE", "winoground:SOURCE", "sugarcrepe:SOURCE?images=FOLDER"])
    + " (SOURCE is a folder or a hub id)"
)
