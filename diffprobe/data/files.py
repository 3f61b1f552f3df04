"""Reading files that others wrote: texts, JSON, names inside a folder, digests of contents.

The invariants: lines of a text end with \\n alone; a fault of a file is one sentence that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffprobe.rundir import file_digest, write_whole

LISTED = 20  # most faults that a message names; it counts the rest
_REMEMBERED = 2**26  # fewer bytes are quickly read again, so their digests are not kept on the disk
_SETTLED = 2.0  # seconds after which a later change of a file is sure to change its times
_Known = dict[str, list[Any]]


def read_text(path: Path) -> str:
    """Reads a UTF-8 text, with or without byte order mark; \\r\\n and \\r become \\n, no other character ends a line.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"'{path}' does not exist; check its name.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the place ('FILE', line N) and the text of each line that is not empty.

    `str.splitlines` would also cut at U+2028, U+0085 and U+000B, which occur inside captions.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"'{path}', line {number}", line


def parse_json(text: str, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `pairs` makes objects from lists of pairs.

    Raises:
        ValueError: the text is no JSON, has a number with too many digits, or is nested too deep.

    >>> parse_json("[" * 100_000, "x.json")
    Traceback (most recent call last):
    ValueError: x.json is nested too deep to be read; is it the right file?
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"{where} is nested too deep to be read; is it the right file?") from None
    except ValueError as error:  # also for a number with thousands of digits
        raise ValueError(f"{where} is not JSON ({error}).") from error


def check_unicode(what: str, text: object) -> None:
    r"""Raises ValueError, naming `what`, where a text holds half of a surrogate pair, from bytes or JSON that were broken.

    >>> check_unicode("A caption", "\ud800 star")
    Traceback (most recent call last):
    ValueError: A caption is no Unicode text ('\ud800 star', character 0); write it as UTF-8.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is no Unicode text ({str(text)[:40]!a}, character {error.start}); write it as UTF-8."
        ) from None


def listed(faults: Sequence[str]) -> str:
    """Joins the faults of an input into one message; those after the first `LISTED` are counted.

    >>> listed(["a is absent", "b is absent"])
    'a is absent; b is absent'
    """
    more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    return "; ".join(fault.rstrip(".") for fault in faults[:LISTED]) + more


def inside(where: str, name: str) -> str:
    """The plain form of a path relative to the folder of images.

    Raises:
        ValueError: the path leaves the folder; the message begins with `where`.

    >>> inside("captions.csv, line 2", "./cats/1.jpg")
    'cats/1.jpg'
    """
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"{where}: '{name}' leaves the folder of images; give the path relative to the folder, without '..'.")
    return path.as_posix()


def real_path(path: str | Path) -> Path:
    """The absolute path behind all links; a link that leads to itself gives a path that does not exist."""
    return Path(os.path.realpath(Path(path).expanduser()))


def spellings(name: str) -> list[str]:
    """A name as written, then composed and decomposed: systems write the accents of file names either way.

    >>> [len(form) for form in spellings("café.png")]
    [8, 8, 9]
    """
    return [name] if name.isascii() else [name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]


def file_inside(root: Path, name: str) -> Path | None:
    """The file of a folder by name, in any spelling of its accents; None where there is none.

    Args:
        root: The folder, its links followed.
        name: As `inside` returns it.

    Raises:
        ValueError: the file is a link that leaves the folder.
    """
    path = next((path for form in spellings(name) if (path := root / form).is_file()), None)
    if path is not None and (path.is_symlink() or not _real_folder(path.parent).is_relative_to(root)):
        check_inside(root, path)
    return path


def check_inside(root: Path, path: Path) -> None:
    """Raises ValueError where a link leads from a folder, whose own links are followed, to a path outside it."""
    target = real_path(path)
    if not target.is_relative_to(root):
        raise ValueError(
            f"'{path}' is a link to '{target}', outside the folder '{root}'; copy what it points to into the folder, "
            "or remove the link."
        )


@lru_cache(maxsize=1024)  # some folders have 100,000 files
def _real_folder(folder: Path) -> Path:
    return real_path(folder)


# --- contents -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder for what can be computed again: ``$DIFFPROBE_CACHE``, else ``~/.cache/diffprobe``."""
    return Path(os.environ.get("DIFFPROBE_CACHE") or Path.home() / ".cache" / "diffprobe")


def content_digests(root: Path, names: Sequence[str]) -> list[str]:
    """A hash of the content of each file of a folder.

    Those of large folders are kept in `cache_folder`.  A file is read again when its size or one of its times has
    changed, among them ctime, which programs cannot set.

    Raises:
        ValueError: files cannot be read; the message lists them.
    """
    memory = (
        cache_folder() / "digests" / f"{hashlib.sha256(str(real_path(root)).encode(errors='replace')).hexdigest()[:32]}.json"
    )
    known: _Known = {}
    with contextlib.suppress(OSError, ValueError):
        known = parse_json(read_text(memory), str(memory))

    def entry(name: str) -> Any:
        """A file's size, times and digest, or the error that reading it meets."""
        try:
            found = (root / name).stat()
            state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            return known[name] if known.get(name, [])[:3] == state else [*state, _digest(root / name)]
        except OSError as error:
            return error

    with ThreadPoolExecutor(4) as readers:  # hashing and reading release the interpreter lock
        entries = dict(zip(names, readers.map(entry, names), strict=True))
    faults = [f"'{root / name}' ({error.strerror})" for name, error in entries.items() if isinstance(error, OSError)]
    if faults:
        raise ValueError(f"{len(faults)} of {len(names)} files cannot be read: {listed(faults)}. Mend them or take them away.")
    fresh = {name: one for name, one in entries.items() if one is not known.get(name)}
    if sum(size for size, *_ in fresh.values()) >= _REMEMBERED:
        before = (time.time() - _SETTLED) * 1e9
        known |= {name: one for name, one in fresh.items() if max(one[1:3]) < before}
        with contextlib.suppress(OSError):  # without a writable cache the next run reads again
            write_whole(memory, json.dumps(known))
    return [entries[name][3] for name in names]


def _digest(path: Path) -> str:
    return file_digest(path, partial(hashlib.blake2b, digest_size=16))
