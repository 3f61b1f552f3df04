"""Rows of published benchmarks: CSV, JSON and Parquet files, and the images that they name.

The invariants: what stands in an annotation file is a name inside the benchmark's folder, or it is refused; images are read
only when asked for.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from diffprobe.data.drawn import spread
from diffprobe.data.files import content_digests, inside, listed, parse_json, read_text, real_path
from diffprobe.data.images import ImageError, decode_image, read_image
from diffprobe.rundir import optional

Loader = Callable[[], Image.Image]
Made = TypeVar("Made")


def benchmark_folder(source: str, patterns: list[str] | None = None) -> Path:
    """A local copy's folder, or the folder of a hub dataset, downloaded or from the hub's cache.

    Args:
        source: A folder or a hub id.
        patterns: Which files are downloaded ("data/validation-*"); all of them by default.

    Raises:
        ValueError: There is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the hub raises are kinds of these
        raise ValueError(
            f"No benchmark at {source!r}: neither a folder, nor a dataset that the hub or its cache can give here "
            f"({type(error).__name__}). Give a folder, or for a gated dataset accept its terms and run 'hf auth login'."
        ) from error


def check_ids(spec: str, ids: Sequence[str]) -> None:
    """Raise ValueError where there are no items, or two with one id."""
    if not ids:
        raise ValueError(f"{spec!r} has no items: its annotation files are empty.")
    for name, times in Counter(ids).items():
        if times > 1:
            raise ValueError(f"{spec!r}: id {name!r} stands twice; noise belongs to ids, so each must be unique.")


def collected(what: str, makers: Iterable[Callable[[], Made]]) -> list[Made]:
    """What each of the functions makes, in order; all of them are called before a fault is raised.

    Raises:
        ValueError: Some raised ValueError; the message lists all of their faults.

    >>> collected("numbers.txt", [lambda: int("1"), lambda: int("b"), lambda: int("c")])
    Traceback (most recent call last):
    ValueError: 2 entries of numbers.txt cannot be used: invalid literal for int() with base 10: 'b'; invalid literal for int() with base 10: 'c'.
    """
    made, faults = [], []
    for make in makers:
        try:
            made.append(make())
        except ValueError as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        raise ValueError(f"{len(faults)} entries of {what} cannot be used: {listed(faults)}.")
    return made


def items_digest(about: str, texts: Sequence[Any], loaders: Sequence[Loader]) -> str:
    """A short hash of a benchmark: its texts, the files of its images, and the pixels of drawn ones.

    Of many drawn images some are hashed, evenly spread.
    """
    digest = hashlib.sha256(about.encode())
    for text in texts:
        digest.update(repr(text).encode())
    given = [(getattr(load, "args", ()) or (None,))[0] for load in loaders]  # the file: an image, an archive or a table of them
    files = sorted({str(real_path(path)) for path in given if isinstance(path, Path)})
    root = Path(os.path.commonpath(files)) if files else Path()
    pictures = hashlib.sha256(repr(content_digests(root.parent if root.is_file() else root, files)).encode())
    drawn = [load for load, path in zip(loaders, given, strict=True) if not isinstance(path, Path)]
    for number in spread(len(drawn)):
        pictures.update(np.asarray(drawn[number]()).tobytes())
    return hashlib.sha256(f"{digest.hexdigest()}{pictures.hexdigest()}".encode()).hexdigest()[:16]


# --- images ---------------------------------------------------------------------------------------


def image_file(where: str, path: Path) -> Loader:
    """What reads an image file; ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{where} names '{path}', which does not exist; copy the benchmark again.")
    return partial(read_image, path)


def image_folder(kind: str, folder: Path, images: Path | None, what: str, beside: Sequence[Path]) -> Path:
    """The folder of images that the user names, or the first of `beside` that exists."""
    found = images if images is not None else next((path for path in beside if path.is_dir()), None)
    if found is None or not found.is_dir():
        tried = f"'{images}' is no folder" if images is not None else f"there is no {beside[0].name} in '{folder}'"
        raise ValueError(f"{kind} needs the images of {what}, and {tried}; name them: {kind}:{folder}?images=FOLDER.")
    return found


# --- rows -----------------------------------------------------------------------------------------


def check_columns(where: str, found: Any, wanted: Sequence[str]) -> None:
    """Refuse a row or table that lacks a column, naming the column and those that it has."""
    names = list(found) if not isinstance(found, str) else []
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{where} has no {', '.join(missing)}; it has {', '.join(map(str, names)) or 'nothing'}.")


def csv_lines(source: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The columns of a CSV file; and where each further line stands, with its cells as stripped text.

    Raises:
        ValueError: the file is missing or no UTF-8, or a quote in it stands where none can.
    """
    text = read_text(source)
    limit = csv.field_size_limit(len(text) + 1)  # 131,072 characters by default
    # strict: otherwise a quote that is not closed takes in the rest of the file
    reader = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        lines = [(f"'{source}', line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(
            f"'{source}', line {reader.line_num} has a stray quote ({error}); a quote within a quoted cell is written as two quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return (lines[0][1] if lines else []), lines[1:]


def csv_rows(source: Path, columns: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where each line of a CSV file stands, and its wanted cells."""
    header, lines = csv_lines(source)
    check_columns(f"'{source}'", header, columns)
    for where, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{where} does not have {len(header)} columns; put quotes around a cell with a comma in it.")
        yield where, tuple(cells[header.index(column)] for column in columns)


def json_object(text: str, where: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object that has the wanted names."""
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, where an object with named entries was expected.")
    check_columns(where, found, columns)
    return found


def open_parquet(path: Path) -> Any:
    """pyarrow's `ParquetFile`, for a ``with`` block.

    Raises:
        ValueError: the file is missing or broken, or pyarrow is not installed.
    """
    parquet = optional("pyarrow.parquet", f"'{path}' is a Parquet file; reading it takes: pip install 'diffprobe[hub]'")
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError as error:
        raise ValueError(f"'{path}' does not exist; check its name.") from error
    except Exception as error:  # pyarrow raises its own kinds on broken files
        raise ValueError(f"'{path}' could not be read as Parquet ({error}); copy it again.") from error


def parquet_rows(
    tables: Sequence[Path], folder: Path, columns: Sequence[str], pictures: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of Parquet files, in which a cell of an image column is replaced by what loads the image.

    Args:
        tables: The files.
        folder: Where images lie that the table only names.
        columns: The wanted ones, pictures among them.
        pictures: Which of them hold images.
        optional: Which of these may be empty; the cell is None then.
    """
    # of an image that may be missing the name alone is read, which is missing with it
    wanted = [name for name in columns if name not in pictures] + [f"{name}.path" for name in optional]
    for path in tables:
        with open_parquet(path) as table:
            check_columns(f"'{path}'", table.schema_arrow.names, columns)
            for group in range(table.num_row_groups):
                for row, cells in enumerate(table.read_row_group(group, wanted).to_pylist()):
                    absent = [name for name in optional if cells.get(name) is None]  # a column without any image is no struct
                    load = {name: partial(_parquet_image, path, group, row, name, folder) for name in pictures}
                    yield cells | load | dict.fromkeys(absent)


@lru_cache(maxsize=4)
def _image_column(path: Path, group: int, column: str) -> Any:
    with open_parquet(path) as table:
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
