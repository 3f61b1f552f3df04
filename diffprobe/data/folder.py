"""A folder of photographs as a dataset, with or without captions.

Captions come from the file that is named, else from `captions.jsonl` or `captions.csv` in the folder, else from a text file
beside each image (`cat.jpg`, `cat.txt`; one caption a line).  Hidden files are left out.  The invariant: nothing outside
the folder is read, except a captions file that the caller names.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffprobe.data.files import content_digests, inside, listed, numbered_lines, parse_json, read_text, real_path, spellings
from diffprobe.data.images import read_image
from diffprobe.data.samples import Caption, IndexedDataset, Sample, join_spec

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
CAPTION_FILES = ("captions.jsonl", "captions.csv")
NOTHING = ("none", "null", "na", "n/a", "<na>")  # no value in a column of numbers; among words, "none" may be a class
Label = str | int | float


@dataclass
class _Known:
    """Captions and labels of one image."""

    captions: list[str] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)


class FolderDataset(IndexedDataset):
    """The images of a folder and of its subfolders, sorted; a sample's id is its path inside the folder.

    Args:
        root: The folder.
        captions: A `.jsonl` file of ``{"file": ..., "caption": ...}`` (or ``"captions": [...]``) or a `.csv` file
            with columns file and caption; other keys and columns become labels.  An image does not have a label that is
            empty, null or NaN or, among numbers, inf or a word such as NA.
        limit: Take only the first so many images.

    Raises:
        ValueError: the folder is missing or has no images, or its captions do not fit it.
    """

    origin = ""  # the URL that the folder is a copy of

    def __init__(self, root: str | Path, captions: str | Path | None = None, limit: int | None = None) -> None:
        self.root = real_path(root)
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "does not exist"
            raise ValueError(f"A folder of images was asked for, but '{root}' {found}; name an existing folder.")
        self.name = f"folder-{self.root.name}"
        self.files = self._scan()
        if not self.files:
            raise ValueError(
                f"'{root}' and its subfolders hold no images ({', '.join(SUFFIXES)}); add some, or name another folder."
            )
        source = self._captions_file() if captions is None else Path(captions).expanduser()
        self._known = self._sidecars() if source is None else self._read_captions(source)
        self.limit, self.files = limit, self.files[:limit]

    @property
    def spec(self) -> str:
        place = self.origin or str(self.root)
        return place if self.limit is None else f"{join_spec('', place, {})[1:]}?limit={self.limit}"

    def only(self, names: Iterable[str]) -> FolderDataset:
        """The same folder with these images alone, so that what they are can be compared with what they were."""
        part, wanted = copy.copy(self), set(names)
        part.files = [name for name in self.files if name in wanted]
        part.__dict__.pop("_fingerprint", None)
        return part

    def _scan(self) -> list[str]:
        found, nowhere = [], []
        for path in self.root.rglob("*"):
            place = path.relative_to(self.root)
            if any(part.startswith(".") for part in place.parts):
                continue
            image = path.suffix.lower() in SUFFIXES
            if path.is_symlink() and (path.is_dir() or image):
                self._refuse_outside(path)
            if image and path.is_file():
                found.append(place.as_posix())
            elif path.is_symlink() and not path.exists() and (image or path.suffix == ".txt" or path.name in CAPTION_FILES):
                nowhere.append(f"'{place.as_posix()}'")
        if nowhere:
            raise ValueError(
                f"{len(nowhere)} link(s) of the folder '{self.root}' lead nowhere: {listed(sorted(nowhere))}. Remove them, or "
                "put the files there."
            )
        return sorted(found)

    def _refuse_outside(self, path: Path) -> None:
        target = real_path(path)
        if not target.is_relative_to(self.root):
            raise ValueError(
                f"'{path}' is a link to '{target}', outside the folder '{self.root}'; copy what it points to into the folder, "
                "or remove the link."
            )

    def _captions_file(self) -> Path | None:
        found = [self.root / name for name in CAPTION_FILES if (self.root / name).is_file()]
        if len(found) > 1:
            raise ValueError(
                f"'{self.root}' holds both {' and '.join(CAPTION_FILES)}; remove one, or say which with `captions`."
            )
        for path in found:
            self._refuse_outside(path)
        return found[0] if found else None

    def _sidecars(self) -> dict[str, _Known]:
        known = {}
        for name in self.files:
            beside = [(self.root / form).with_suffix(".txt") for form in spellings(name)]
            if path := next((path for path in beside if path.is_file()), None):
                self._refuse_outside(path)
                known[name] = _Known([line.strip() for _, line in numbered_lines(path)])
        return known

    def _read_captions(self, source: Path) -> dict[str, _Known]:
        """Captions and labels by image; the file may name only images of this folder."""
        if not source.is_file():
            raise ValueError(f"The captions file '{source}' does not exist; check its name, or leave it out.")
        readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
        if source.suffix.lower() not in readers:
            raise ValueError(f"The captions file '{source}' ends in {source.suffix!r}; write it as .jsonl or .csv.")
        files, known, missing = set(self.files), dict[str, _Known](), []
        faults: list[str] = []
        rows = list(readers[source.suffix.lower()](source, faults))
        columns: dict[str, list[Any]] = {key: [row.labels.get(key) for row in rows] for row in rows for key in row.labels}
        columns = {key: known_values(column, source.suffix.lower() == ".csv") for key, column in columns.items()}
        for number, row in enumerate(rows):
            name = next((form for form in spellings(row.file) if form in files), None)
            if name is None:
                missing.append(f"'{row.file}'")
                continue
            entry = known.setdefault(name, _Known())
            for key, column in columns.items():
                value = column[number]
                if value is not None and entry.labels.setdefault(key, value) != value:
                    faults.append(f"{row.where}: '{name}' has {key} {entry.labels[key]!r} and {value!r}; keep one of them")
            entry.captions += row.captions
        if faults:
            raise ValueError(f"{listed(faults)}.")
        if missing:
            raise ValueError(
                f"'{source}' names {len(missing)} file(s) that are no images of '{self.root}': {listed(missing)}. "
                f"It has {len(files)} images, the first '{self.files[0]}'. Correct the names (they are relative to the "
                "folder), or remove those lines."
            )
        return known

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int) -> Sample:
        name = self.files[index]
        known = self._known.get(name, _Known())
        return Sample(
            id=name,
            load=partial(read_image, self.root / name),
            captions=tuple(Caption(text) for text in known.captions),
            labels=dict(known.labels),
        )

    def content(self) -> Iterator[bytes]:
        """Names, contents, captions and labels; no times, which a copy changes."""
        rows = []
        for name, content in zip(self.files, content_digests(self.root, self.files), strict=True):
            known = self._known.get(name, _Known())
            rows.append([name, content, known.captions, sorted(known.labels.items())])
        yield json.dumps(rows).encode()


# --- captions files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One line of a captions file, and its place."""

    where: str
    file: str
    captions: list[str]
    labels: dict[str, Any]


def _jsonl_rows(source: Path, faults: list[str]) -> Iterator[_Row]:
    for where, line in numbered_lines(source):
        try:
            entry = parse_json(line, where, partial(_once, where))
            if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
                raise ValueError(f'{where} names no image; write {{"file": "NAME", "caption": "TEXT"}}.')
            name, captions = inside(where, entry.pop("file")), [entry.pop("caption", None)]
            several = entry.pop("captions", None)
            captions = [c for c in captions + (several if isinstance(several, list) else [several]) if not _absent(c)]
            if not all(isinstance(text, str) for text in captions):
                raise ValueError(f"{where}: a caption is a string, and 'captions' a list of strings; found {captions!r}.")
        except ValueError as error:
            faults.append(str(error))
            continue
        labels = {key: value for key, value in entry.items() if isinstance(value, str | int | float)}
        yield _Row(where, name, [text.strip() for text in captions if text.strip()], labels)


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f'{where} has {twice!r} twice; give several captions as a list, "captions".')
    return found


def _csv_rows(source: Path, faults: list[str]) -> Iterator[_Row]:
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
    if "file" not in header:
        raise ValueError(f"'{source}' has the columns {', '.join(header) or 'none'}; its first line must name a column 'file'.")
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
            name, caption = inside(where, row.pop("file")), row.pop("caption", "")
        except ValueError as error:
            faults.append(str(error))
            continue
        yield _Row(where, name, [caption] if caption else [], row)


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
