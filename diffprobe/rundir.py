"""Folders that runs write into: a lock, atomic writes, the check of a request, and provenance; needs neither torch nor zarr.

A place is a path of this machine or a URL that fsspec knows.  The invariants: a reader sees a whole file or none, and a run
continues an earlier one only if their requests are equal.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from diffprobe.console import size_text


class StoreError(ValueError):
    """A store cannot be read, has another version, or lacks what is asked for."""


class BusyError(ValueError):
    """Another process is writing to the place."""


class TakenError(StoreError):
    """Another process has just made what this one was about to make."""


class RequestError(ValueError):
    """A folder, file or store holds another request than the one asked for."""


# --- places ---------------------------------------------------------------------------------------


def locate(path: str | Path) -> Path | str:
    """A place in its one spelling, as a path of this machine or a URL; ``file://`` and a final slash are dropped.

    >>> locate("file:///data/a.zarr/"), locate("s3://bucket/a.zarr/")
    (PosixPath('/data/a.zarr'), 's3://bucket/a.zarr')
    """
    text = str(path)
    if re.match(r"(file|local)://", text):
        return Path(LocalFileSystem._strip_protocol(text))
    return text.rstrip("/") if "://" in text else Path(text)


def is_remote(path: str | Path) -> bool:
    """Whether the place is a URL of another machine."""
    return isinstance(locate(path), str)


@contextlib.contextmanager
def reaching(path: str | Path) -> Iterator[None]:
    """Replaces errors of libraries at a remote place by one sentence.

    Raises:
        StoreError: the place did not answer.
    """
    try:
        yield
    except (ValueError, ImportError, OSError, MemoryError):  # these say what is wrong
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise StoreError(
            f"{path} does not answer as it should ({first_line(error)}). What was complete is kept; try the same command again."
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, as a part of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def refuse_unwritable(path: str | Path) -> None:
    """Raises StoreError for a place that can only be read."""
    if str(path).startswith(("http://", "https://")):
        raise StoreError(
            f"{path} can be read over HTTP and not written; give a local path or a URL such as s3://bucket/a.zarr."
        )


def free_bytes(path: str | Path) -> int | None:
    """Free bytes on the disk where the place is or will be; None for a URL."""
    place = locate(path)
    if isinstance(place, str):
        return None
    return shutil.disk_usage(next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())).free


def check_room(need: str, count: int, free: int | None, advice: str) -> None:
    """Raises ValueError where more bytes are needed than are free, but for a twentieth; `need` is as ``The store needs {}``."""
    if free is not None and count >= 0.95 * free:
        raise ValueError(
            f"{need.format(size_text(count))} and {size_text(free)} are free. {advice}; --force goes on regardless."
        )


# --- one writer -----------------------------------------------------------------------------------


@contextlib.contextmanager
def sole_writer(out: str | Path, rank: int = 0, ranks: int = 1, dry_run: bool = False) -> Iterator[None]:
    """Holds a lock beside a store or folder; the lock ends with the process.

    Each rank has its own lock, and rank 0 also checks for ranks of a larger run.  A URL has no lock.

    Raises:
        BusyError: another process holds the lock; the message names the process.
        ValueError: the place cannot be written to.
    """
    place = locate(out)
    if isinstance(place, str) or dry_run:
        refuse_unwritable(out)
        yield
        return
    place = place.resolve()
    path = place.with_name(f"{place.name}.lock-{rank}")
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(_locked(path, out))
            for other in path.parent.glob(f"{glob.escape(path.stem)}.lock-[0-9]*") if rank == 0 else ():
                if int(other.suffix.removeprefix(".lock-")) >= ranks:
                    with _locked(other, out):
                        other.unlink()
            file.truncate(0)
            file.write(f"pid {os.getpid()}")
            file.flush()
        except OSError as error:
            raise ValueError(f"{path.parent} cannot be written to: {error.strerror}.") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def shard_writer(out: str | Path, shard: int, rank: int = 0, ranks: int = 1, dry_run: bool = False) -> Iterator[None]:
    """Holds the lock of one of several independent jobs that write disjoint parts of a store.

    The same shard cannot be written twice at a time, and no `sole_writer` may hold the store meanwhile.

    Raises:
        BusyError: another process writes this shard, or the whole store.
    """
    place = locate(out)
    with contextlib.ExitStack() as held:
        held.enter_context(sole_writer(f"{place}.shard-{shard}", rank, ranks, dry_run))
        if isinstance(place, Path) and not dry_run:
            import fcntl

            path = place.resolve().with_name(f"{place.resolve().name}.lock-0")  # that of rank 0 of a sole writer
            file = held.enter_context(_locked(path, out, shared=True))
            try:
                yield
            finally:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the last shard alone removes it
                    path.unlink(missing_ok=True)
        else:
            yield


def _locked(path: Path, out: str | Path, shared: bool = False) -> IO[str]:
    """The lock file, held until it is closed; raises BusyError, which names the process that holds it."""
    import fcntl  # not on Windows, where stores can still be read

    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "a shard of it"
            file.close()
            raise BusyError(f"Another process ({holder}) is writing {out}; wait for it, or stop it.") from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()  # its holder removed it between our two calls, so we locked a removed file


# --- files and folders that appear whole ----------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields the path where to write a file, which then appears whole or not at all.

    The file is written beside its place, in a folder that is made if needed, and renamed at the end.  A URL gets one upload.
    """
    place = locate(path)
    if isinstance(place, str):
        with tempfile.TemporaryDirectory() as folder:
            beside = Path(folder) / place.rpartition("/")[2]
            yield beside
            refuse_unwritable(place)
            with reaching(place):
                files, target = url_to_fs(place)
                files.pipe_file(target, beside.read_bytes())
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        yield beside
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text as `whole_file` does."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, as `whole_file` does."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path, company: bool = False) -> Iterator[Path]:
    """Yields the path where to build a folder, which then appears whole or not at all.

    It is built beside its place and renamed at the end.  Unfinished folders of killed processes are removed first.

    Args:
        company: other processes may be building the same folder, so theirs are left alone.

    Raises:
        TakenError: there is a folder by now.
    """
    for left in () if company else path.parent.glob(f"{glob.escape(path.name)}.init-*"):
        if re.fullmatch(r"\d+", left.name.rpartition("-")[2]) and left.is_dir():
            shutil.rmtree(left)
    building = path.with_name(f"{path.name}.init-{uuid4().int if company else os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        try:
            building.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise TakenError(f"Another process has just made {path}; the same command goes on from there.") from None
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def exchange(new: Path, old: Path) -> None:
    """Swaps two folders of one file system.

    On Linux both names stand for a whole folder at every moment.  Elsewhere `old` has no folder for an instant, and a process
    that is killed in it leaves what `undo_exchange` mends.
    """
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is None or swap(here, os.fsencode(new), here, os.fsencode(old), both):
        beside = old.with_name(f"{old.name}.old")
        old.rename(beside)
        new.rename(old)
        beside.rename(new)


def undo_exchange(old: Path) -> None:
    """Puts a folder back that a killed `exchange` left without its name."""
    beside = old.with_name(f"{old.name}.old")
    if beside.exists() and not old.exists():
        beside.rename(old)


def remove_unfinished(folder: str | Path) -> None:
    """Removes unfinished files of `whole_file` that killed processes left in a folder; no process may be writing there."""
    for left in Path(folder).glob("*.tmp"):
        if re.search(r"\.\d+\.tmp$", left.name):
            left.unlink(missing_ok=True)


# --- requests -------------------------------------------------------------------------------------


def request_differences(
    kept: Mapping[str, Any], asked: Mapping[str, Any], words: tuple[str, str] = ("the store has", "you ask for")
) -> list[str]:
    """The differences of two requests, one line for each field; `words` introduce the value of either.

    >>> request_differences({"timesteps": [10], "seed": 0}, {"timesteps": [10, 50], "seed": 0})
    ['timesteps: the store has [10], you ask for [10, 50]']
    """
    missing = object()
    names = [*kept, *(name for name in asked if name not in kept)]
    pairs = ((name, kept.get(name, missing), asked.get(name, missing)) for name in names)
    show = lambda value: "nothing" if value is missing else json.dumps(value, ensure_ascii=False)  # noqa: E731
    return [f"{name}: {words[0]} {show(old)}, {words[1]} {show(new)}" for name, old, new in pairs if old != new]


def check_request(
    place: str | Path,
    kept: Mapping[str, Any],
    asked: Mapping[str, Any],
    fault: str = "holds another request; give another folder, or match it.",
) -> None:
    """Compares the request that a place holds with the one asked for.

    Args:
        asked: the request asked for; tuples count as lists.
        fault: what the message says of the place.

    Raises:
        RequestError: the requests differ; the message lists each differing field with both values.

    >>> check_request("runs/a", {"seed": 0, "grid": [4, 4]}, {"seed": 1, "grid": (4, 4)}, "was made otherwise:")
    Traceback (most recent call last):
    diffprobe.rundir.RequestError: runs/a was made otherwise: seed: the store has 0, you ask for 1.
    """
    if differences := request_differences(kept, json.loads(json.dumps(asked))):
        raise RequestError(f"{place} {fault} {'; '.join(differences)}.")


def check_or_write_request(
    path: str | Path, asked: Mapping[str, Any], fault: str = "holds another run; give another folder, or match it."
) -> None:
    """Writes the request of a folder's run; if the folder has one, compares it.

    Args:
        path: the JSON file of the request, such as ``runs/a/request.json``.
        asked, fault: as for `check_request`; the message names the file's folder.

    Raises:
        RequestError: the file holds another request, or no JSON object.
    """
    path = Path(path)
    if not path.exists():
        write_json(path, asked)
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}); give another folder, or remove this one.") from error
    if not isinstance(kept, dict):
        raise RequestError(f"{path} holds no request but {str(kept)[:40]!r}; give another folder, or remove this one.")
    check_request(path.parent, kept, asked, fault)


# --- provenance -----------------------------------------------------------------------------------


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of the packages that are installed, by name.

    >>> list(package_versions(["numpy", "no-such-package"]))
    ['numpy']
    """
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def code_commit() -> str | None:
    """The commit of the running code; None if it is no checkout of its own, or without git."""
    checkout = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    # a hook sets GIT_DIR and the like, which name another repository
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=ours)
    except OSError:
        return None
    top, _, commit = found.stdout.strip().partition("\n")
    # A virtual environment may lie in somebody else's repository, whose commit says nothing of this code.
    return commit if found.returncode == 0 and Path(top) == checkout else None


def optional(library: str, need: str) -> Any:
    """A library that is not required; raises ValueError with `need`, which says how to install it, where it is not there."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(need) from error


def file_digest(path: Path, algorithm: str | Callable[[], Any] = "sha256") -> str:
    """The hexadecimal digest of a file's content.

    Args:
        algorithm: a name in `hashlib`, or a function that makes its hash object.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
