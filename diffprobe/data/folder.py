"""A folder of photographs as a dataset, with or without captions.

Captions are looked for in this order: the file that is named, `captions.jsonl` or `captions.csv` in the
folder, a text file beside each image (`cat.jpg`, `cat.txt`; one caption a line).  Hidden files are left
out.  The invariant: nothing outside the folder is ever read, whatever a captions file or a link says,
except a captions file that the caller names.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from diffprobe.data.images import read_image
from diffprobe.data.samples import Caption, Sample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CAPTION_FILES = ("captions.jsonl", "captions.csv")
Label = str | int | float


@dataclass
class _Known:
    """What a captions file says of one image."""

    captions: list[str] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)


class FolderDataset:
    """The images of a folder and of its subfolders, sorted; a sample's id is its path inside the folder.

    Args:
        captions: a `.jsonl` file of ``{"file": ..., "caption": ...}`` (or ``"captions": [...]``) or a `.csv` file
            with columns file and caption; other keys and columns become labels.

    Raises:
        ValueError: the folder is missing or has no images, or its captions do not fit it.
    """

    def __init__(self, root: str | Path, captions: str | Path | None = None) -> None:
        self.root = Path(root).expanduser().resolve()
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

    @property
    def spec(self) -> str:
        return str(self.root)

    def _scan(self) -> list[str]:
        found = []
        for path in self.root.rglob("*"):
            inside = path.relative_to(self.root)
            if any(part.startswith(".") for part in inside.parts):
                continue
            if path.is_symlink() and (path.is_dir() or path.suffix.lower() in SUFFIXES):
                self._refuse_outside(path)
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found.append(inside.as_posix())
        return sorted(found)

    def _refuse_outside(self, path: Path) -> None:
        target = path.resolve()
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
            path = (self.root / name).with_suffix(".txt")
            if path.is_file():
                self._refuse_outside(path)
                known[name] = _Known([line.strip() for line in _read_text(path).splitlines() if line.strip()])
        return known

    def _read_captions(self, source: Path) -> dict[str, _Known]:
        """Captions and labels by image, from a captions file that may name only images of this folder."""
        if not source.is_file():
            raise ValueError(f"The captions file '{source}' does not exist; check its name, or leave it out.")
        readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
        if source.suffix.lower() not in readers:
            raise ValueError(f"The captions file '{source}' ends in {source.suffix!r}; write it as .jsonl or .csv.")
        files, known, missing = set(self.files), dict[str, _Known](), []
        for where, name, captions, labels in readers[source.suffix.lower()](source):
            name = _inside(where, name)
            if name not in files:
                missing.append(name)
                continue
            entry = known.setdefault(name, _Known())
            for key, value in labels.items():
                if entry.labels.setdefault(key, value) != value:
                    raise ValueError(f"{where}: '{name}' has {key} {entry.labels[key]!r} and {value!r}; keep one of them.")
            entry.captions += captions
        if missing:
            raise ValueError(
                f"'{source}' names {len(missing)} file(s) that are no images of '{self.root}', the first '{missing[0]}'; "
                f"it has {len(files)} images, the first '{self.files[0]}'. Correct the names (they are relative to the "
                "folder), or remove those lines."
            )
        return known

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.files):
            raise IndexError(f"Image {index} of a folder of {len(self.files)}.")
        name = self.files[index]
        known = self._known.get(name, _Known())
        return Sample(
            id=name,
            load=partial(read_image, self.root / name),
            captions=tuple(Caption(text) for text in known.captions),
            labels=dict(known.labels),
        )

    def fingerprint(self) -> str:
        """Hash of names, sizes in bytes, captions and labels; no times, which a copy changes."""
        rows = []
        for name in self.files:
            known = self._known.get(name, _Known())
            rows.append([name, (self.root / name).stat().st_size, known.captions, sorted(known.labels.items())])
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


# --- captions files: rows of (where it stands, file, captions, labels) ----------------------------

Row = tuple[str, str, list[str], dict[str, Label]]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def _inside(where: str, name: str) -> str:
    """A path relative to the folder in its plain form; leaving the folder is refused.

    >>> _inside("captions.csv, line 2", "./cats/1.jpg")
    'cats/1.jpg'
    """
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"{where}: '{name}' leaves the folder of images; give the path relative to the folder, without '..'.")
    return path.as_posix()


def _jsonl_rows(source: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(source).split("\n"), 1):
        if not line.strip():
            continue
        where = f"'{source}', line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}); write one object a line.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise ValueError(f'{where} names no image; write {{"file": "NAME", "caption": "TEXT"}}.')
        single, several = entry.pop("caption", None), entry.pop("captions", [])
        captions = [*([] if single is None else [single]), *(several if isinstance(several, list) else [several])]
        if not all(isinstance(text, str) for text in captions):
            raise ValueError(f"{where}: a caption is a string, and 'captions' a list of strings; found {captions!r}.")
        name = entry.pop("file")
        labels = {key: value for key, value in entry.items() if isinstance(value, str | int | float)}
        yield where, name, [text.strip() for text in captions if text.strip()], labels


def _csv_rows(source: Path) -> Iterator[Row]:
    reader = csv.DictReader(_read_text(source).splitlines(keepends=True), skipinitialspace=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    if "file" not in header:
        raise ValueError(f"'{source}' has the columns {', '.join(header) or 'none'}; its first line must name a column 'file'.")
    rows = []
    for row in reader:
        where = f"'{source}', line {reader.line_num}"
        if None in row or None in row.values():
            raise ValueError(f"{where} does not have {len(header)} columns; put quotes around a caption with a comma in it.")
        rows.append((where, row))
    columns = {key: _numbers([row[key] for _, row in rows]) for key in header if key not in ("file", "caption")}
    for index, (where, row) in enumerate(rows):
        text = row.get("caption", "").strip()
        # an empty cell is a label that this image does not have
        labels = {key: values[index] for key, values in columns.items() if row[key].strip()}
        yield where, row["file"], [text] if text else [], labels


def _numbers(cells: list[str]) -> list[Label]:
    """A column as int or float where every cell that is filled is one; otherwise as it stands.

    >>> _numbers(["3", "", "4"]), _numbers(["1", "2.5"]), _numbers(["1", "two"])
    ([3, '', 4], [1.0, 2.5], ['1', 'two'])
    """
    for kind in (int, float):
        try:
            column = [kind(cell) if cell.strip() else "" for cell in cells]
        except ValueError:
            continue
        if all(math.isfinite(value) for value in column if value != ""):  # type: ignore[arg-type]
            return column
    return list(cells)
