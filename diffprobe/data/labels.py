"""Captions and labels that others wrote as CSV, JSON lines or Parquet: one row an image, which its file or its id names.

A value is absent where it is empty, null or NaN and, among numbers, where it is inf or a word such as NA.  The invariant: a
row that cannot be used is a fault that names the file and the line; all faults of a file are one message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffprobe.data.files import inside, listed, numbered_lines, parse_json, spellings
from diffprobe.data.tables import csv_lines, open_parquet

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
    if source.suffix.lower() not in FORMATS:
        raise ValueError(f"The captions file '{source}' ends in {source.suffix!r}; write it as .jsonl or .csv, or as .parquet.")
    faults: list[str] = []
    rows = []
    for where, entry in _entries(source, faults, names):
        try:
            rows.append((where, *_parts(where, entry, names, captions)))
        except ValueError as error:
            faults.append(str(error))
    every = [labels for *_, labels in rows]
    columns = {key: [labels.get(key) for labels in every] for key in dict.fromkeys(key for labels in every for key in labels)}
    columns = {key: known_values(column, source.suffix.lower() == ".csv") for key, column in columns.items()}
    known, missing = dict[str, Known](), []
    for number, (where, named, texts, _) in enumerate(rows):
        name = find(named)
        if name is None:
            missing.append(f"'{named}'")
            continue
        own = known.setdefault(name, Known())
        for key, column in columns.items():
            value = column[number]
            if value is not None and own.labels.setdefault(key, value) != value:
                faults.append(f"{where}: '{name}' has {key} {own.labels[key]!r} and {value!r}; keep one of them")
        own.captions += texts
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


def _entries(source: Path, faults: list[str], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Where each row of a file stands, and its values by name; a line that has none is noted as a fault."""
    if source.suffix.lower() == ".parquet":
        with open_parquet(source) as table:
            yield from ((f"'{source}', row {number}", row) for number, row in enumerate(table.read().to_pylist()))
    elif source.suffix.lower() == ".jsonl":
        for where, line in numbered_lines(source):
            try:
                yield where, parse_json(line, where, partial(_once, where))
            except ValueError as error:
                faults.append(str(error))
    else:
        header, lines = csv_lines(source)
        if not set(names) & set(header):
            wanted = f"'{names[0]}' (or {', '.join(names[1:])})"
            raise ValueError(
                f"'{source}' has the columns {', '.join(header) or 'none'}; its first line must name a column {wanted}."
            )
        if twice := [name for number, name in enumerate(header) if name and name in header[:number]]:
            raise ValueError(
                f"'{source}' has two columns {twice[0]!r}; name each otherwise, and give each further caption a line of its own."
            )
        for where, cells in lines:
            if len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
            else:
                faults.append(f"{where} does not have {len(header)} columns; put quotes around a caption with a comma in it.")


def _parts(where: str, entry: Any, names: Sequence[str], captions: Sequence[str]) -> tuple[str, list[str], dict[str, Any]]:
    """The image that a row names, its captions, and its other texts and numbers."""
    key = next((name for name in names if isinstance(entry, dict) and isinstance(entry.get(name), str | int)), None)
    if key is None:
        raise ValueError(f'{where} names no image; write {{"{names[0]}": "NAME", ...}} (or {", ".join(names[1:])}).')
    named = entry.pop(key)
    name = inside(where, str(named)) if key in FILE_COLUMNS else str(named)
    given = [entry.pop(column, None) for column in captions]
    given = [c for one in given for c in (one if isinstance(one, list) else [one]) if not _absent(c)]
    if not all(isinstance(text, str) for text in given):
        raise ValueError(f"{where}: a caption is a string, and 'captions' a list of strings; found {given!r}.")
    return name, [text.strip() for text in given], {k: v for k, v in entry.items() if isinstance(v, str | int | float)}


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f'{where} has {twice!r} twice; give several captions as a list, "captions".')
    return found


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
