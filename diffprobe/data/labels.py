"""Captions and labels that others wrote as CSV, JSON lines or Parquet: one row an image, which its file or its id names.

A value is absent where it is empty, null or NaN and, among numbers, where it is inf or a word such as NA.  The invariant: a
row that cannot be used is a fault that names the file and the line; all faults of a file are one message.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffprobe.data.files import inside, listed, numbered_lines, parse_json, read_text, spellings

NOTHING = ("none", "null", "na", "n/a", "<na>")  # no value in a column of numbers; among words, "none" may be a class
FILE_COLUMNS = ("file", "file_name")  # of a path inside the folder; the second is the hub's
ID_COLUMNS = ("id", "sample", *FILE_COLUMNS)
CAPTION_COLUMNS = ("caption", "captions")
FORMATS = (".jsonl", ".csv", ".parquet")
# Words for the parts of a split, as image folders and columns have them; the hub reads the same ones.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Names of what else stands beside labels in a store.
TAKEN = {
    "sample", "status", "done", "digest", "prompts", "conditioning", "timestep", "sigma", "log_snr", "channel", "y", "x", "token", "head", "unit", "patch",
    "content_digest", "zarr.json",
}  # fmt: skip
Label = str | int | float


@dataclass
class Known:
    """Captions and labels of one image."""

    captions: list[str] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)


def read_known(
    source: Path,
    find: Callable[[str], str | None],
    names: Sequence[str] = FILE_COLUMNS,
    captions: Sequence[str] = CAPTION_COLUMNS,
) -> tuple[dict[str, Known], list[str]]:
    """What a file says of images, and the names in it that are no images.

    Args:
        source: A `.jsonl`, `.csv` or `.parquet` file.
        find: The image that a name in the file means; None where it means none.
        names: Columns that may name the image; the first one that is there does.
        captions: Columns that are captions; all others with texts or numbers are labels.

    Raises:
        ValueError: the file cannot be read, or rows of it cannot be used.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if source.suffix.lower() not in readers:
        raise ValueError(f"The captions file '{source}' ends in {source.suffix!r}; write it as .jsonl or .csv, or as .parquet.")
    faults: list[str] = []
    rows = list(readers[source.suffix.lower()](source, faults, names, captions))
    columns: dict[str, list[Any]] = {key: [row.labels.get(key) for row in rows] for row in rows for key in row.labels}
    columns = {key: known_values(column, source.suffix.lower() == ".csv") for key, column in columns.items()}
    known, missing = dict[str, Known](), []
    for number, row in enumerate(rows):
        name = find(row.file)
        if name is None:
            missing.append(f"'{row.file}'")
            continue
        entry = known.setdefault(name, Known())
        for key, column in columns.items():
            value = column[number]
            if value is not None and entry.labels.setdefault(key, value) != value:
                faults.append(f"{row.where}: '{name}' has {key} {entry.labels[key]!r} and {value!r}; keep one of them")
        entry.captions += row.captions
    if faults:
        raise ValueError(f"{listed(faults)}.")
    return known, missing


def read_labels(source: str | Path, ids: Sequence[str]) -> dict[str, dict[str, Label]]:
    """Labels of samples from a file, by sample id; of samples that the file does not name there is no entry.

    Args:
        source: A file with a column id, sample, file or file_name; each other column is a label.
        ids: The ids of the samples.  Rows of others are left out.

    Raises:
        ValueError: the file cannot be read, names none of the samples, or has no label of them.
    """
    path, there = Path(source).expanduser(), set(ids)
    find = lambda name: next((form for form in spellings(name) if form in there), None)  # noqa: E731
    known, missing = read_known(path, find, ID_COLUMNS, ())
    if not known:
        named = f"{missing[0]} is its first of {len(missing)} names" if missing else "it has no rows"
        raise ValueError(
            f"'{path}' has no labels for these samples: {named}, and {ids[0]!r} is the first of {len(ids)} samples."
        )
    if not any(entry.labels for entry in known.values()):
        raise ValueError(f"'{path}' names samples and has no column of labels beside their names; add one.")
    return {name: entry.labels for name, entry in known.items()}


def label_arrays(labels: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """An array for each label; a sample without the label has NaN among numbers and "" among texts."""
    arrays: dict[str, NDArray[Any]] = {}
    for name in dict.fromkeys(key for row in labels for key in row):
        given = [row.get(name) for row in labels]
        values = known_values([value.item() if isinstance(value, np.generic) else value for value in given])
        if name in TAKEN or name.startswith((".", "__")) or not name.strip() or "/" in name:
            why = "the store uses that name" if name in TAKEN else "a name in a store has letters, and no slash or dot in front"
            raise ValueError(f"A label cannot be called {name!r}: {why}. Rename it in the captions file.")
        if all(isinstance(v, int) and abs(v) < 2**63 for v in values):
            arrays[name] = np.array(values, np.int64)
        elif all(v is None or isinstance(v, int | float) for v in values):
            arrays[name] = np.array([np.nan if v is None else v for v in values], np.float64)
        else:
            arrays[name] = np.array(["" if v is None else str(v) for v in values], object)
    return arrays


def folder_labels(files: Sequence[str]) -> list[dict[str, Label]]:
    """What the folders of images say of them: their class, and their part of a split.

    Folders such as train and test, where all images lie in one, are the label ``split``.  The next folders, where no image lies
    beside them and there are two or more, are the label ``class``.

    >>> folder_labels(["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/a/2.jpg"])[2]
    {'split': 'validation', 'class': 'cat'}
    >>> folder_labels(["cat/1.jpg", "dog/1.jpg"]), folder_labels(["cat/1.jpg", "2.jpg"]), folder_labels(["a/1.jpg", "a/2.jpg"])
    ([{'class': 'cat'}, {'class': 'dog'}], [{}, {}], [{}, {}])
    """
    found: list[dict[str, Label]] = [{} for _ in files]
    folders = [name.split("/")[:-1] for name in files]
    if all(parts and parts[0].lower() in PARTS for parts in folders):
        for labels, parts in zip(found, folders, strict=True):
            labels["split"] = PARTS[parts.pop(0).lower()]
    if all(folders) and len({parts[0] for parts in folders}) > 1:
        for labels, parts in zip(found, folders, strict=True):
            labels["class"] = parts[0]
    return found


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One line of a file, and its place."""

    where: str
    file: str
    captions: list[str]
    labels: dict[str, Any]


def _jsonl_rows(source: Path, faults: list[str], names: Sequence[str], captions: Sequence[str]) -> Iterator[_Row]:
    def entries() -> Iterator[tuple[str, Any]]:
        for where, line in numbered_lines(source):
            try:
                yield where, parse_json(line, where, partial(_once, where))
            except ValueError as error:
                faults.append(str(error))

    yield from _entry_rows(entries(), faults, names, captions)


def _parquet_rows(source: Path, faults: list[str], names: Sequence[str], captions: Sequence[str]) -> Iterator[_Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"'{source}' is a Parquet file; reading it takes: pip install 'diffprobe[hub]'") from error
    try:
        rows = parquet.ParquetFile(source).read().to_pylist()
    except FileNotFoundError as error:
        raise ValueError(f"'{source}' does not exist; check its name.") from error
    except Exception as error:  # pyarrow raises its own kinds on broken files
        raise ValueError(f"'{source}' could not be read as Parquet ({error}); copy it again.") from error
    yield from _entry_rows(((f"'{source}', row {n}", row) for n, row in enumerate(rows)), faults, names, captions)


def _entry_rows(
    entries: Iterator[tuple[str, Any]], faults: list[str], names: Sequence[str], captions: Sequence[str]
) -> Iterator[_Row]:
    """Rows from objects with named values."""
    for where, entry in entries:
        try:
            key = next((name for name in names if isinstance(entry, dict) and isinstance(entry.get(name), str | int)), None)
            if key is None:
                raise ValueError(f'{where} names no image; write {{"{names[0]}": "NAME", ...}} (or {", ".join(names[1:])}).')
            named = entry.pop(key)
            name = inside(where, str(named)) if key in FILE_COLUMNS else str(named)
            given = [entry.pop(column, None) for column in captions]
            given = [c for one in given for c in (one if isinstance(one, list) else [one]) if not _absent(c)]
            if not all(isinstance(text, str) for text in given):
                raise ValueError(f"{where}: a caption is a string, and 'captions' a list of strings; found {given!r}.")
        except ValueError as error:
            faults.append(str(error))
            continue
        labels = {key: value for key, value in entry.items() if isinstance(value, str | int | float)}
        yield _Row(where, name, [text.strip() for text in given if text.strip()], labels)


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f'{where} has {twice!r} twice; give several captions as a list, "captions".')
    return found


def _csv_rows(source: Path, faults: list[str], names: Sequence[str], captions: Sequence[str]) -> Iterator[_Row]:
    text = read_text(source)
    limit = csv.field_size_limit(len(text) + 1)  # 131,072 characters by default
    # strict: otherwise a quote that is not closed takes in the rest of the file
    reader = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(
            f"'{source}', line {reader.line_num} has a stray quote ({error}); a quote within a quoted cell is written as two quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = [name.strip() for name in lines[0][1]] if lines else []
    key = next((name for name in names if name in header), None)
    if key is None:
        wanted = f"'{names[0]}' (or {', '.join(names[1:])})"
        raise ValueError(
            f"'{source}' has the columns {', '.join(header) or 'none'}; its first line must name a column {wanted}."
        )
    if twice := [name for number, name in enumerate(header) if name and name in header[:number]]:
        raise ValueError(
            f"'{source}' has two columns {twice[0]!r}; name each otherwise, and give each further caption a line of its own."
        )
    for number, cells in lines[1:]:
        where = f"'{source}', line {number}"
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        try:
            if len(cells) != len(header):
                raise ValueError(
                    f"{where} does not have {len(header)} columns; put quotes around a caption with a comma in it."
                )
            named = row.pop(key)
            name = inside(where, named) if key in FILE_COLUMNS else named
        except ValueError as error:
            faults.append(str(error))
            continue
        given = [row.pop(column, "") for column in captions]
        yield _Row(where, name, [text for text in given if text], row)


def _absent(value: object) -> bool:
    """Whether a value is null, NaN or an empty text."""
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def known_values(values: Sequence[Any], table: bool = False) -> list[Any]:
    """One label of all images, None where an image lacks it; words for nothing (`NOTHING`) do not make numbers words.

    Args:
        values: Texts and numbers; None, NaN or an empty text where there is none.
        table: Whether the values are cells of a table, where numbers are texts too.

    >>> known_values(["3", "", "inf"], True), known_values(["1", "2.5", "NA"], True), known_values(["1", "two", "none"], True)
    ([3, None, None], [1.0, 2.5, None], ['1', 'two', 'none'])
    """
    known = [None if _absent(value) else value for value in values]
    try:
        numbers = [None if value is None else _number(value, table) for value in known]
    except (ValueError, OverflowError):
        return known
    if all(value is None for value in numbers):
        return known if any(isinstance(value, str) for value in known) else numbers
    if table and any(isinstance(value, float) for value in numbers):
        return [None if value is None else float(value) for value in numbers]
    return numbers


def _number(value: Label, table: bool) -> int | float | None:
    """A number, or None for a word of `NOTHING`; ValueError for other words."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in NOTHING:
            return None
        if not table or "_" in text:  # Python reads 1_2 as 12
            raise ValueError(value)
        value = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else float(text)
    return value if isinstance(value, int) or math.isfinite(value) else None
