"""Folders that runs write into: one writer at a time, files that appear whole, requests that must match, and where numbers
come from.

A place is a path of this machine or a URL that fsspec knows.  The invariant: whoever reads a file here sees all of it or
none of it, and a run goes on only where an earlier one was asked for the same.  Needs neither torch nor zarr.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
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

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class StoreError(ValueError):
    """A store or folder that is not one, does not answer, is of another version, or is asked for what it does not hold."""


class BusyError(ValueError):
    """Another process is writing where this one is to write."""


class RequestError(ValueError):
    """A folder, file or store holds what an earlier run was asked for, and this run is asked for something else."""


# --- places ---------------------------------------------------------------------------------------


def locate(path: str | Path) -> Path | str:
    """A place by its one name: a path on this machine, or a URL; ``file://`` and a slash at the end are spellings of it.

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
    """Turn what libraries raise when a remote place does not answer into one sentence.

    Raises:
        StoreError: the place did not answer.
    """
    try:
        yield
    except (ValueError, ImportError, OSError, MemoryError):  # ours, a URL's missing package, the system's: they say what it is
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise StoreError(
            f"{path} does not answer as it should ({first_line(error)}). What was complete is kept; try the same command again."
        ) from error


def first_line(error: Exception) -> str:
    """What an exception says, as a part of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def refuse_unwritable(path: str | Path) -> None:
    """Raise StoreError for a place that can only be read."""
    if str(path).startswith(("http://", "https://")):
        raise StoreError(
            f"{path} can be read over HTTP and not written; give a local path or a URL such as s3://bucket/a.zarr."
        )


def free_bytes(path: str | Path) -> int | None:
    """Free space where the place is or will be; None for a URL."""
    place = locate(path)
    if isinstance(place, str):
        return None
    return shutil.disk_usage(next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())).free


# --- one writer -----------------------------------------------------------------------------------


@contextlib.contextmanager
def sole_writer(out: str | Path, rank: int = 0, ranks: int = 1, dry_run: bool = False) -> Iterator[None]:
    """Hold a lock beside a store or folder for as long as this process writes there; it ends with the process.

    Each rank has its own lock; the first rank also looks for ranks of a larger run that it would not meet.  A URL has no
    lock.

    Raises:
        BusyError: another process holds it; the message names the process.
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


def _locked(path: Path, out: str | Path) -> IO[str]:
    """The lock file, held until it is closed; raises BusyError, which names the process that holds it."""
    import fcntl  # not on Windows, where stores can still be read

    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise BusyError(f"Another process ({holder}) is writing {out}; wait for it, or stop it.") from None
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()  # its holder removed it between our two calls: what we locked is no longer there


# --- files and folders that appear whole ----------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write a file that appears whole or not at all, because others read from it what is done.

    The file is written beside its place and renamed at the end; its folder is made.  A URL gets it in one upload.
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
    """Write a UTF-8 text as `whole_file` does."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, as `whole_file` does."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to build a folder that appears whole or not at all; it is built beside its place and renamed at the end.

    What a killed process left of an earlier attempt is removed; no other process may be building the same folder.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.init-*"):
        if re.fullmatch(r"\d+", left.name.rpartition("-")[2]) and left.is_dir():
            shutil.rmtree(left)
    building = path.with_name(f"{path.name}.init-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def remove_unfinished(folder: str | Path) -> None:
    """Remove the files of a folder that a killed process was writing by `whole_file`; no process may be writing there."""
    for left in Path(folder).glob("*.tmp"):
        if re.search(r"\.\d+\.tmp$", left.name):
            left.unlink(missing_ok=True)


# --- what a run was asked for ---------------------------------------------------------------------


def request_differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two requests differ in, one readable line each.

    >>> request_differences({"timesteps": [10], "seed": 0}, {"timesteps": [10, 50], "seed": 0})
    ['timesteps: the store has [10], you ask for [10, 50]']
    """
    missing = object()
    names = [*kept, *(name for name in asked if name not in kept)]
    pairs = ((name, kept.get(name, missing), asked.get(name, missing)) for name in names)
    show = lambda value: "nothing" if value is missing else json.dumps(value, ensure_ascii=False)  # noqa: E731
    return [f"{name}: the store has {show(old)}, you ask for {show(new)}" for name, old, new in pairs if old != new]


def check_request(
    place: str | Path,
    kept: Mapping[str, Any],
    asked: Mapping[str, Any],
    fault: str = "holds another request; give another folder, or match it.",
) -> None:
    """Compare what a place holds with what is asked for.

    Args:
        place: what the message names.
        kept: the request that was written there, as JSON gives it.
        asked: the request of now; tuples count as lists.
        fault: what the message says of a place whose request differs.

    Raises:
        RequestError: they differ; the message lists each field with both values.

    >>> check_request("runs/a", {"seed": 0, "grid": [4, 4]}, {"seed": 1, "grid": (4, 4)})
    Traceback (most recent call last):
    diffprobe.rundir.RequestError: runs/a holds another request; give another folder, or match it. seed: the store has 0, you ask for 1.
    """
    if differences := request_differences(kept, json.loads(json.dumps(asked))):
        raise RequestError(f"{place} {fault} {'; '.join(differences)}.")


def check_or_write_request(
    path: str | Path, asked: Mapping[str, Any], fault: str = "holds another run; give another folder, or match it."
) -> None:
    """Write down what a folder's run is asked for; where that stands already, compare it.

    Args:
        path: the JSON file that keeps the request, such as ``runs/a/request.json``.
        asked, fault: as for `check_request`; the message names the file's folder.

    Raises:
        RequestError: the file holds another request, or is no JSON object.
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


# --- where numbers come from ----------------------------------------------------------------------


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package; those that are not installed are left out.

    >>> list(package_versions(["numpy", "no-such-package"]))
    ['numpy']
    """
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def code_commit() -> str | None:
    """The commit of the code that runs; None outside a checkout of its own, or without git."""
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


def file_digest(path: Path, algorithm: str | Callable[[], Any] = "sha256") -> str:
    """The digest of a file's content, in hexadecimal.

    Args:
        algorithm: a name of `hashlib`, or what makes its hash object.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
