"""The Zarr layout, its writer, and its readers; runs without torch.

Format version 1.  The root has `sample` ids, labels, `status` (one number a sample) and `done` (one number a unit); the
group ``prompts`` has each (sample, conditioning)'s text and tokens; every site has a group of its own with one array:

- ``features`` (sample, conditioning, timestep, channel, y, x), fewer dimensions where it was reduced while recording;
- ``maps`` (sample, conditioning, timestep, head, token, y, x).

The invariant: a unit is a run of consecutive samples and exactly one shard of every array.  A shard is written by one
whole assignment, and `done` is set after the last of them; so two processes never share a file, and what is not done
was never there.  Absence is recorded in `status`, never guessed from fill values: a chunk that must be there and is not
is an error of whoever reads it.  The root's attribute `digests` names every object of the layout with its digest, the array
``digest`` (unit, site) holds one of what each unit wrote, bound to its place; stores older than these open all the same.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from scipy.ndimage import zoom
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, WrapperStore

from diffprobe.conditioning import NULL, guided_name, word_tokens
from diffprobe.rundir import BusyError as BusyError
from diffprobe.rundir import StoreError as StoreError
from diffprobe.rundir import code_commit as code_commit
from diffprobe.rundir import first_line, reaching, refuse_unwritable, whole_folder
from diffprobe.rundir import is_remote as is_remote
from diffprobe.rundir import locate as locate
from diffprobe.rundir import request_differences as request_differences
from diffprobe.rundir import sole_writer as sole_writer
from diffprobe.rundir import whole_file as whole_file
from diffprobe.rundir import write_whole as write_whole

FORMAT_VERSION = 1
_SLACK, _SWELL = 2**28, 100
PENDING, COMPLETE, UNREADABLE, NOT_FINITE = 0, 1, 2, 3
STATUS_WORDS = {PENDING: "pending", COMPLETE: "complete", UNREADABLE: "image unreadable", NOT_FINITE: "not finite"}
CHUNK_BYTES = 2**20
SHARD_BYTES = 64 * 2**20
UNREADABLE_BYTES = (ValueError, OSError, RuntimeError, KeyError, TypeError)  # what zarr and its codecs raise on damage
_LEADING = ("sample", "conditioning", "timestep")


@dataclass(frozen=True)
class ArraySpec:
    """One site's array: its name, where it stands in the model, and its shape after (sample, conditioning, timestep)."""

    site: str
    path: str
    kind: str
    variable: Literal["features", "maps"]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    conditionings: tuple[str, ...]
    reduce: str = "none"

    def bytes_per_sample(self, timesteps: int, itemsize: int) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * len(self.conditionings) * timesteps * itemsize


def samples_per_unit(specs: Sequence[ArraySpec], timesteps: int, itemsize: int) -> int:
    """How many samples make a unit at most: the arrays of one stay near 64 MiB together.

    Two units are in memory at a time, so this bounds the memory that a run takes, whatever its length; 64 samples at most,
    because their images wait there too.

    >>> spec = ArraySpec("s", "p", "block", "features", ("channel", "y", "x"), (1280, 16, 16), ("null",))
    >>> samples_per_unit([spec], 5, 2)
    20
    """
    together = sum(spec.bytes_per_sample(timesteps, itemsize) for spec in specs)
    return max(1, min(SHARD_BYTES // max(1, together), 64))


# --- writing --------------------------------------------------------------------------------------


def _zarr_store(path: str | Path, read_only: bool) -> Store:
    place = locate(path)
    return (
        LocalStore(place, read_only=read_only) if isinstance(place, Path) else FsspecStore.from_url(place, read_only=read_only)
    )


def exists(path: str | Path) -> bool:
    """Whether there is a store at this path or URL; only "not found" means that there is none.

    Raises:
        StoreError, OSError: the place cannot be looked at, so nobody knows.
    """
    try:
        with reaching(path):
            return sync(_zarr_store(path, True).get("zarr.json", default_buffer_prototype())) is not None
    except FileNotFoundError:
        return False


def create_store(
    path: str | Path,
    *,
    attributes: Mapping[str, Any],
    sample_ids: Sequence[str],
    labels: Mapping[str, NDArray[Any]],
    timesteps: Sequence[int],
    prompts: Mapping[str, NDArray[Any]],
    conditionings: Sequence[str],
    tokens: Sequence[int],
    specs: Sequence[ArraySpec],
    unit_samples: int,
    dtype: str,
    compress: bool = False,
) -> None:
    """Lay out an empty store, all at once: a reader sees the whole grid or no store.

    Args:
        attributes: provenance and request, JSON-ready; kept under ``diffprobe`` in the root.
        prompts: ``text`` (sample, conditioning) and ``token_id``, ``token_start``, ``token_end`` (sample, conditioning, token).
        tokens: the key positions that maps keep.
        compress: zstd instead of none; every inner chunk has a Crc32c either way.
    """
    held: dict[str, Buffer] = {}
    root = zarr.open_group(MemoryStore(held), mode="w", zarr_format=3)
    count = len(sample_ids)
    units = -(-count // unit_samples)
    flags: Any = {"dtype": "uint8", "compressors": [Crc32cCodec()], "fill_value": 0}
    _put(root, "sample", np.array(list(sample_ids), dtype=np.dtypes.StringDType()), ("sample",))
    root.create_array("status", shape=(count,), chunks=(unit_samples,), dimension_names=("sample",), **flags)
    root.create_array("done", shape=(units,), chunks=(1,), dimension_names=("unit",), **flags)
    shape = (units, len(specs), _DIGEST_BYTES)
    root.create_array("digest", shape=shape, chunks=(1, *shape[1:]), dimension_names=("unit", "site", "byte"), **flags)
    for name, values in labels.items():
        _put(root, name, values, ("sample",))
    group = root.create_group("prompts")
    _put(group, "conditioning", _strings(conditionings), ("conditioning",))
    for name, values in prompts.items():
        _put(group, name, values, ("sample", "conditioning", "token")[: values.ndim])
    for spec in specs:
        group = root.create_group(spec.site)
        group.attrs.update({"path": spec.path, "kind": spec.kind, "reduce": spec.reduce})
        _put(group, "conditioning", _strings(spec.conditionings), ("conditioning",))
        _put(group, "timestep", np.asarray(timesteps, np.int64), ("timestep",))
        if "token" in spec.dims and spec.variable == "maps" and spec.kind == "cross_map":
            _put(group, "token", np.asarray(tokens, np.int64), ("token",))
        full = (unit_samples, len(spec.conditionings), len(timesteps), *spec.shape)
        one_timestep = int(np.prod(full[1:], dtype=np.int64)) // len(timesteps) * np.dtype(dtype).itemsize
        inner = next(
            n for n in range(min(unit_samples, max(1, CHUNK_BYTES // max(1, one_timestep))), 0, -1) if unit_samples % n == 0
        )
        group.create_array(
            spec.variable,
            shape=(count, *full[1:]),
            dtype=dtype,
            shards=full,
            chunks=(inner, full[1], 1, *spec.shape),
            compressors=[ZstdCodec(level=1), Crc32cCodec()] if compress else [Crc32cCodec()],
            fill_value=np.nan,
            dimension_names=(*_LEADING, *spec.dims),
        )
    digests = {key: _digest(value.to_bytes()).hex() for key, value in held.items() if key != "zarr.json"}
    root.attrs["digests"] = digests
    root.attrs["diffprobe"] = {"format_version": FORMAT_VERSION, "unit_samples": unit_samples, **attributes}
    _put_in_place(path, {key: value.to_bytes() for key, value in held.items()})


def _put_in_place(path: str | Path, held: Mapping[str, bytes]) -> None:
    """Write a laid out store where there is none: beside its place and renamed, or object by object with the root's last.

    A layout that was cut off on a remote place is written over by an equal one.  Nothing is ever removed there.
    """
    final = locate(path)
    if isinstance(final, str):
        with reaching(final):
            sync(_upload(final, held))
        return
    with whole_folder(final) as building:
        for key, value in held.items():
            (building / key).parent.mkdir(parents=True, exist_ok=True)
            (building / key).write_bytes(value)


async def _upload(url: str, held: Mapping[str, bytes]) -> None:
    refuse_unwritable(url)
    store = FsspecStore.from_url(url)
    store.fs.invalidate_cache()
    there = {key async for key in store.list()}
    if "zarr.json" in there or (others := sorted(there - set(held))):
        what = "a store" if "zarr.json" in there else f"objects of something else ({others[0]})"
        raise StoreError(f"{url} holds {what}: nothing was written. Give another --out, or remove what is there.")
    prototype = default_buffer_prototype()
    await asyncio.gather(
        *(store.set(key, prototype.buffer.from_bytes(value)) for key, value in held.items() if key != "zarr.json")
    )
    try:
        await store.fs._pipe_file(f"{store.path}/zarr.json", held["zarr.json"], mode="create")
    except FileExistsError:
        raise StoreError(f"Another process has just made a store at {url}; the same command goes on from there.") from None


_DIGEST_BYTES = 16


def _digest(*parts: bytes | NDArray[Any]) -> bytes:
    found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return found.digest()


def clear_cut_writes(path: str | Path) -> None:
    """Remove the files that a killed process was about to put in their place; no process may be writing."""
    place = locate(path)
    if isinstance(place, Path):
        for left in place.rglob("*.partial"):
            if re.search(r"\.[0-9a-f]{32}\.partial$", left.name) and left.is_file():  # as zarr calls them; labels have folders
                left.unlink()


def _strings(values: Sequence[str]) -> NDArray[Any]:
    return np.array(list(values), dtype=np.dtypes.StringDType())


def _put(group: zarr.Group, name: str, values: NDArray[Any], dims: tuple[str, ...]) -> None:
    values = _strings(values.tolist()) if values.dtype.kind in "UO" else values
    shape = values.shape
    array = group.create_array(
        name,
        shape=shape,
        dtype=str if values.dtype.kind == "T" else values.dtype,
        chunks=tuple(max(1, n) for n in shape),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        dimension_names=dims,
    )
    array[...] = values


class _Seal:
    """The digest of one site's values in one unit, of this store alone: of its request, ids, labels and coordinates."""

    def __init__(self, root: zarr.Group) -> None:
        self.layout: Any = root.attrs.get("digests")
        self.there = isinstance(self.layout, dict)
        told = json.dumps([root.attrs.asdict().get("diffprobe", {}).get("request"), self.layout], sort_keys=True)  # type: ignore[union-attr]
        self._store = told.encode()

    def of(self, site: str, unit: int, status: NDArray[np.uint8], values: NDArray[Any]) -> NDArray[np.uint8]:
        return np.frombuffer(_digest(self._store, f"{site}/{unit}".encode(), status, values), np.uint8)


class StoreWriter:
    """Writes whole units; the only code that touches the arrays of a store."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.root = _open_group(path, "r+")
        self.attributes = _attributes(self.root, path)
        self.unit_samples = int(self.attributes["unit_samples"])
        self._seal = _Seal(self.root)

    @property
    def pending(self) -> list[int]:
        """Units that are not complete, in order."""
        return [int(u) for u in np.flatnonzero(_read(self.root, "done") == 0)]

    @property
    def status(self) -> NDArray[np.uint8]:
        """One number a sample, as `STATUS_WORDS` explains."""
        return _read(self.root, "status")

    def unit_status(self, unit: int) -> NDArray[np.uint8]:
        """`status` of one unit's samples; PENDING where it is not done, whatever its samples say."""
        first, last = self.bounds(unit)
        done = _read(self.root, "done", slice(unit, unit + 1))[0]
        return _read(self.root, "status", slice(first, last)) if done else np.full(last - first, PENDING, np.uint8)

    def bounds(self, unit: int) -> tuple[int, int]:
        """First sample of a unit and one past its last."""
        count = _array(self.root, "status").shape[0]
        return unit * self.unit_samples, min((unit + 1) * self.unit_samples, count)

    def write_unit(self, unit: int, arrays: Mapping[str, NDArray[Any]], status: NDArray[np.uint8]) -> None:
        """Mark a unit as pending, write every site's array of it, then its status and digests, then mark it done.

        A unit that is there already is replaced shard by shard: a reader who has the store open sees an old shard or a
        new one, and after a process that was killed in between the unit is pending.

        Args:
            arrays: by site name, (sample, conditioning, timestep, ...).
            status: one number a sample, COMPLETE or why not.
        """
        first, last = self.bounds(unit)
        status = np.asarray(status, np.uint8)
        names = sorted(_stored_sites(self.root))
        digests = np.zeros((len(names), _DIGEST_BYTES), np.uint8)
        self.forget_unit(unit)
        with reaching(self.path):
            for site, values in arrays.items():
                target = _site_array(self.root, site)
                if values.shape != (last - first, *target.shape[1:]):
                    raise AssertionError(
                        f"Unit {unit} of {site}: shape {values.shape} for {(last - first, *target.shape[1:])}."
                    )
                values = np.asarray(values, target.dtype)
                _replace_shard(target, unit, first, values)
                digests[names.index(site)] = self._seal.of(site, unit, status, values)
            _array(self.root, "status")[first:last] = status
            if self._seal.there:
                _array(self.root, "digest")[unit] = digests
            _array(self.root, "done")[unit] = 1

    def forget_unit(self, unit: int) -> None:
        """Mark a unit as not done, so that the next extract computes it again."""
        first, last = self.bounds(unit)
        with reaching(self.path):
            _array(self.root, "done")[unit] = 0
            _array(self.root, "status")[first:last] = PENDING


# --- opening --------------------------------------------------------------------------------------


class _Present(WrapperStore[Store]):
    """A store in which a chunk that must be there and is not is an error, where zarr would read fill values.

    Must be there: of the sites' arrays what `units` has, and every object of the layout.
    """

    def __init__(self, store: Store, units: frozenset[int] = frozenset(), layout: frozenset[str] = frozenset()) -> None:
        super().__init__(store)
        self.units, self.layout = units, layout

    def _with_store(self, store: Store) -> _Present:
        return _Present(store, self.units, self.layout)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is None and "/c/" in key:
            unit = re.search(r"/(features|maps)/c/(\d+)/", key)
            if key in self.layout or (unit and int(unit[2]) in self.units):
                raise StoreError(
                    f"{key} of the store is missing. 'diffprobe verify' says what is damaged, 'diffprobe repair' mends it."
                )
        return found


def _open_group(path: str | Path, mode: Literal["r", "r+"]) -> zarr.Group:
    place = locate(path)
    if isinstance(place, Path):
        if place.is_file():
            raise StoreError(f"{path} is a file, and a store is a folder: give the folder that 'diffprobe extract --out' made.")
        _refuse_links(place)
    try:
        with reaching(path):
            store = _zarr_store(path, mode == "r")
            root = zarr.open_group(store, mode=mode, zarr_format=3)  # format 2 has filters that run code
    except StoreError:
        raise
    except PermissionError as error:
        raise StoreError(f"{path} cannot be opened: {error}.") from error
    except ImportError:  # of what a URL needs
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{path} is not a diffprobe store: no Zarr group is there. 'diffprobe extract --out {path}' makes one."
        ) from error
    except Exception as error:  # metadata that someone edited can make zarr raise anything
        raise StoreError(f"{path} is not a diffprobe store, or its zarr.json is damaged ({first_line(error)}).") from error
    _check_arrays(root, path)
    _check_layout(root, path, lambda key: key.endswith("/zarr.json"))
    return root


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    try:
        found = group[name]
    except Exception as error:
        raise StoreError(f"The store's {name} is missing or its zarr.json is damaged ({first_line(error)}).") from error
    if not isinstance(found, zarr.Array):
        raise StoreError(f"The store's {name} is a group where an array should be.")
    return found


def _read(group: zarr.Group, name: str, part: slice = slice(None)) -> NDArray[Any]:
    """A small array that belongs to the whole store, or a part of it.

    Raises:
        StoreError: its bytes are damaged or missing.
    """
    try:
        return np.asarray(_array(group, name)[part])
    except UNREADABLE_BYTES as error:
        raise _unreadable(name, first_line(error)) from error


def _unreadable(name: str, why: str) -> StoreError:
    return StoreError(
        f"The store's {name} cannot be read ({why}). 'diffprobe repair' mends what belongs to a unit; "
        "otherwise extract it again under another name."
    )


def _stored_sites(root: zarr.Group) -> list[str]:
    request = _attributes(root, root.path).get("request", {})
    named = [*request.get("sites", ()), *request.get("maps", ())]
    return [*named, *sorted(set(root.group_keys()) - {*named, "prompts"})]


def _site_array(root: zarr.Group, site: str) -> zarr.Array[Any]:
    try:
        return _array(root, f"{site}/maps")
    except StoreError:
        return _array(root, f"{site}/features")


def _replace_shard(array: zarr.Array[Any], unit: int, first: int, values: NDArray[Any]) -> None:
    """Write a unit's shard by a single put; what stands there, damaged or not, is neither read nor removed before."""
    held: dict[str, Buffer] = {}
    made: Any = AsyncArray(array.metadata, StorePath(MemoryStore(held)), {"write_empty_chunks": True})  # type: ignore[call-overload]
    zarr.Array(made)[first : first + len(values)] = values
    (key,) = held
    sync((array.store_path / key).set(held[key]))


def _refuse_links(path: Path) -> None:
    """A store from elsewhere must not make us read files outside it."""
    if not path.is_dir():
        return
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            if (Path(folder) / name).is_symlink():
                raise StoreError(
                    f"{path} holds a symbolic link ({Path(folder) / name}); a store has none. Copy the data in its place to open it."
                )


def _check_layout(root: zarr.Group, path: str | Path, which: Callable[[str], bool]) -> None:
    """Compare objects of the layout with their digests, where the store has these.

    Raises:
        StoreError: one is missing, or is not what was written.
    """
    kept: Any = root.attrs.get("digests")
    layout: dict[str, str] = kept if isinstance(kept, dict) else {}
    keys = [key for key in layout if which(key)]
    if outside := [key for key in keys if key.startswith("/") or ".." in key.split("/")]:
        raise StoreError(f"{path} names {outside[0]!r} as a part of itself. Was it edited?")

    async def objects() -> list[Buffer | None]:
        return await asyncio.gather(*(root.store.get(key, default_buffer_prototype()) for key in keys))

    with reaching(path):
        found = sync(objects())
    for key, value in zip(keys, found, strict=True):
        if value is None or _digest(value.to_bytes()).hex() != layout[key]:
            why = "missing" if value is None else "not what was written"
            raise _unreadable(re.sub(r"(/c/.*|/c|/zarr.json)$", "", key), f"{key} is {why}")


_CODECS = {"bytes", "vlen-utf8", "zstd", "crc32c", "sharding_indexed"}
_KINDS_OF_DATA = {"uint8", "int32", "int64", "float16", "float32", "float64", "bool", "string"}


def _check_arrays(root: zarr.Group, path: str | Path) -> None:
    """Refuse a store from elsewhere that holds what diffprobe never writes, or whose few bytes ask for gigabytes of memory.

    Memory is asked for by a large shape, by chunks that swell, and by compressed frames that say how large they become.  An
    array may take `_SWELL` times the store's size on disk, and `_SLACK` besides; of the sites' arrays what is done counts.

    Raises:
        StoreError: it does.
    """
    try:
        arrays = {name: found for name, found in root.members(max_depth=None) if isinstance(found, zarr.Array)}
        told = {name: found.metadata.to_dict() for name, found in arrays.items()}
    except Exception as error:  # as in _open_group
        raise StoreError(f"{path} is not a diffprobe store, or its zarr.json is damaged ({first_line(error)}).") from error
    for name, metadata in told.items():
        if strange := sorted(_named(metadata["codecs"]) - _CODECS):
            raise StoreError(f"{path}: the array {name} uses {strange[0]!r}, which no store of diffprobe does. Was it edited?")
        if str(metadata["data_type"]) not in _KINDS_OF_DATA or metadata.get("attributes"):
            raise StoreError(
                f"{path}: the array {name} is of the type {metadata['data_type']!r} with the attributes "
                f"{metadata.get('attributes') or {}}, which no store of diffprobe has. Was it edited?"
            )
    place = locate(path)
    if not isinstance(place, Path):
        return
    on_disk = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    allowed = _SLACK + _SWELL * on_disk
    done = sum(1 for _ in (place / "done" / "c").glob("*"))
    for name, array in arrays.items():
        itemsize = max(1, getattr(array.dtype, "itemsize", 16))
        shape = (min(array.shape[0], done * array.shards[0]), *array.shape[1:]) if array.shards else array.shape
        chunk = math.prod(array.chunks) * itemsize if math.prod(shape) else 0
        frame = _frame_bytes(place / name, array) if "zstd" in _named(told[name]["codecs"]) else 0
        asked = max(math.prod(shape) * itemsize, chunk, frame)
        if asked > allowed:
            raise StoreError(
                f"{path}: the array {name} asks for {asked / 1e9:.3g} GB, and the store has {on_disk / 1e6:.3g} MB on disk. "
                "No store that diffprobe wrote does; it is damaged, or meant to fill the memory."
            )


def _named(codecs: Any) -> set[str]:
    """The names in a chain of codecs, inner ones too."""
    if isinstance(codecs, dict):
        inner = codecs.get("configuration", {})
        return {str(codecs.get("name"))} | _named([v for k, v in inner.items() if k.endswith("codecs")])
    return {name for one in codecs for name in _named(one)} if isinstance(codecs, list | tuple) else set()


def _frame_bytes(folder: Path, array: zarr.Array[Any]) -> int:
    """What the largest compressed frame of an array's chunks says that it becomes."""
    largest = 0
    for file in (folder / "c").rglob("*"):
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            starts = [0]
            if array.shards:  # the index at the end: offset and length of every inner chunk, and a checksum
                chunks = math.prod(array.shards) // math.prod(array.chunks)
                opened.seek(max(0, file.stat().st_size - 16 * chunks - 4))
                index = opened.read(16 * chunks)
                starts = np.frombuffer(index[: len(index) // 16 * 16], "<u8")[::2].tolist()
                starts = [start for start in starts if start < file.stat().st_size]
            for start in starts:
                opened.seek(start)
                largest = max(largest, _frame_size(opened.read(18)))
    return largest


def _frame_size(head: bytes) -> int:
    """The decompressed size that a zstd frame's first bytes state (RFC 8878, 3.1.1.1); none stated is none that we wrote.

    >>> _frame_size(bytes.fromhex("28b52ffd2005"))
    5
    """
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return 0  # no frame: reading it is an error, and costs nothing
    kind, single = head[4] >> 6, head[4] >> 5 & 1
    if not kind and not single:
        return 2**63
    start = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    size = (1, 2, 4, 8)[kind]
    return int.from_bytes(head[start : start + size], "little") + (256 if size == 2 else 0)


def _attributes(root: zarr.Group, path: str | Path) -> dict[str, Any]:
    found: Any = root.attrs.get("diffprobe")
    if not isinstance(found, dict):
        raise StoreError(f"{path} is not a diffprobe store: it is a Zarr group whose attribute 'diffprobe' is missing.")
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has store format {version!r}; this diffprobe reads {FORMAT_VERSION}. "
            "Open it with the diffprobe version in its attributes, or extract it again."
        )
    for name, kind in _NEEDED.items():
        if not isinstance(found.get(name), kind) or (kind is int and found[name] < 1):
            raise StoreError(
                f"{path}: the attribute {name!r} is {found.get(name)!r}; a store made by diffprobe has {_KINDS[kind]}."
            )
    request = found["request"]
    for name, value in request.items():
        kind = _REQUEST.get(name, object)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(v, str | int | float) for v in value)):
            raise StoreError(f"{path}: {name!r} of the request is {value!r}; a store made by diffprobe has {_KINDS[kind]}.")
    samples, units = (_array(root, name).shape for name in ("status", "done"))
    if samples != _array(root, "sample").shape or units != (-(-samples[0] // found["unit_samples"]),):
        raise StoreError(
            f"{path}: {samples} samples in units of {found['unit_samples']} do not fit {units} units. Was it edited?"
        )
    return _Attributes(found, path) | {"request": _Attributes(request, path)}


class _Attributes(dict[str, Any]):
    """What a store says of itself; asking for what it does not say is an error in words."""

    def __init__(self, values: Mapping[str, Any], path: str | Path) -> None:
        super().__init__(values)
        self._path = path

    def __or__(self, other: Mapping[str, Any]) -> _Attributes:  # type: ignore[override]
        return _Attributes({**self, **other}, self._path)

    def __missing__(self, name: str) -> Any:
        raise StoreError(f"{self._path}: the attribute {name!r} is missing; a store made by diffprobe has it. Was it edited?")


_NEEDED: dict[str, Any] = {"unit_samples": int, "request": dict, "data": str}
_REQUEST: dict[str, Any] = {
    **dict.fromkeys(("model", "weights", "dataset", "fingerprint", "heads", "fit", "latent_rule", "compute_dtype", "store_dtype"), str),
    **dict.fromkeys(("sites", "maps", "map_tokens", "timesteps", "conditionings", "guidance", "resolution"), list),
    **dict.fromkeys(("samples", "noise_draws", "seed"), int),
    "reduce": dict,
}  # fmt: skip
_KINDS = {int: "a number there", str: "a text there", list: "a list there", dict: "a mapping there"}


def open_store(path: str | Path, *, complete: bool = True, chunks: Literal["auto"] | None = None) -> xr.DataTree:
    """Open a store lazily as a labelled tree: one node a site, `prompts` beside them.

    Args:
        complete: only samples that were recorded without fault; False keeps all, with NaN where nothing is.
        chunks: None reads when values are asked for; "auto" gives dask arrays of whole units.

    Raises:
        StoreError: not a store, or of another format version.

    >>> tree = open_store("runs/demo.zarr")  # doctest: +SKIP
    >>> features(tree, "U-L1-R1-B0-Cross-Q", timestep=50, pool="mean").dims  # doctest: +SKIP
    ('sample', 'conditioning', 'channel')
    """
    root = _open_group(path, "r")
    attributes = _attributes(root, path)
    status, units = _recorded(root, attributes["unit_samples"])
    layout = root.attrs.get("digests")
    present = _Present(root.store, units, frozenset(layout) if isinstance(layout, dict) else frozenset())
    hidden = ["done", "digest"] if isinstance(layout, dict) else ["done"]
    try:
        found = xr.open_datatree(
            present,  # type: ignore[arg-type]  # xarray opens a zarr store too
            engine="zarr",
            chunks=None,
            consolidated=False,
            zarr_format=3,
            decode_cf=False,
            drop_variables=hidden,
        )
        rows = np.flatnonzero(status == COMPLETE) if complete and (status != COMPLETE).any() else None
        nodes = {name: _plain(node.to_dataset(inherit=False), rows) for name, node in found.subtree_with_keys}
    except StoreError:
        raise
    except Exception as error:  # as in _open_group
        raise StoreError(f"{path} cannot be read as a store ({first_line(error)}).") from error
    if chunks is not None:
        size = {"sample": int(attributes["unit_samples"])}
        nodes = {name: node.chunk(size) if {"maps", "features"} & set(node) else node for name, node in nodes.items()}
    labels = [str(n) for n, v in nodes["."].data_vars.items() if v.dims == ("sample",)]
    nodes["."] = nodes["."].set_coords(labels)
    nodes["."].attrs = {"diffprobe": json.dumps(attributes, ensure_ascii=False)}
    return xr.DataTree.from_dict(nodes)


def _recorded(root: zarr.Group, step: int) -> tuple[NDArray[np.uint8], frozenset[int]]:
    """The samples' status, and the units whose every shard must be there.

    Raises:
        StoreError: a unit is done and its samples are pending, twice in a row: a writer sets the one after the other.
    """
    for last in (False, True):
        done, status = _read(root, "done"), _read(root, "status")
        lost = [int(unit) for unit in np.flatnonzero(done) if (status[unit * step : (unit + 1) * step] == PENDING).any()]
        if not lost:
            break
        if last:
            raise StoreError(
                f"Unit {lost[0]} of the store is done, and its samples are pending: their status is lost. 'diffprobe repair' mends it."
            )
    if isinstance(root.attrs.get("digests"), dict):
        return status, frozenset(np.flatnonzero(done).tolist())
    return status, frozenset((np.flatnonzero(status == COMPLETE) // step).tolist())  # they did not write what is all NaN


def _plain(dataset: xr.Dataset, rows: NDArray[np.intp] | None) -> xr.Dataset:
    """Some samples of one node, as xarray and NumPy have it and nothing of how it was stored, so that it can be saved again."""
    if rows is not None and "sample" in dataset.dims:
        dataset = dataset.isel(sample=rows)
    dataset = dataset.drop_encoding()
    texts = {name: (v.dims, _fixed_width(v.values)) for name, v in dataset.variables.items() if v.dtype.kind in "TO"}
    return dataset.assign_coords({n: v for n, v in texts.items() if n in dataset.coords}).assign(
        {n: v for n, v in texts.items() if n not in dataset.coords}
    )


def _fixed_width(texts: NDArray[Any]) -> NDArray[Any]:
    """Texts of one width, which every library and file format takes; Python's own where that would lose or waste something."""
    plain = texts.astype(object)
    longest = max(map(len, plain.flat), default=0)
    if longest * plain.size * 4 > _SLACK or any(text.endswith("\0") for text in plain.flat):
        return plain
    return plain.astype(f"U{max(1, longest)}")


def provenance(tree: xr.DataTree) -> dict[str, Any]:
    """What a store says of itself: its request, data, versions and so on.

    It stands as JSON in the tree's attributes, whose values have to be plain for xarray to save them.
    """
    held = _Attributes(json.loads(tree.attrs.get("diffprobe", "{}")), "The store")
    return held | {"request": _Attributes(held["request"], "The store")} if "request" in held else held


def site_names(tree: xr.DataTree) -> list[str]:
    """The sites that a store holds, in the model's order, features before maps."""
    request = provenance(tree).get("request", {})
    order = {name: place for place, name in enumerate([*request.get("sites", ()), *request.get("maps", ())])}
    return sorted((name for name in tree.children if name != "prompts"), key=lambda name: (order.get(name, len(order)), name))


def known(name: str, there: Sequence[str], what: str) -> str:
    """The name itself; StoreError that lists those there are, and the closest, where it is none of them."""
    if name not in there:
        near = difflib.get_close_matches(name, list(there), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise StoreError(f"There is no {what} {name!r} in this store.{hint} It has: {', '.join(there)}.")
    return name


def _site(tree: xr.DataTree, site: str, variable: str) -> xr.DataArray:
    names = [n for n in site_names(tree) if variable in tree[n].data_vars]
    by_path = {str(tree[n].attrs.get("path")): n for n in names}
    name = by_path.get(site, site)
    if name not in names:
        near = difflib.get_close_matches(site, [*names, *by_path], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise StoreError(f"Site {site!r} has no {variable} in this store.{hint} It has: {', '.join(names) or 'none'}.")
    labels = {n: c for n, c in tree.coords.items() if c.dims == ("sample",) and n != "status"}
    array: xr.DataArray = tree[name].to_dataset()[variable]
    return array.assign_coords(labels).assign_attrs({"site": name, **tree[name].attrs})


def _choose(array: xr.DataArray, dim: str, wanted: Any) -> xr.DataArray:
    """Select by label; a single value drops the dimension, a list keeps it; an unknown one is named with those there are."""
    if wanted is None:
        return array
    there = array[dim].values.tolist()
    for value in wanted if isinstance(wanted, list | tuple) else [wanted]:
        if value not in there:
            raise StoreError(f"{dim} {value!r} is not in this store; it has {', '.join(str(v) for v in there)}.")
    index = [there.index(v) for v in wanted] if isinstance(wanted, list | tuple) else there.index(wanted)
    return array.isel({dim: index})


def features(
    tree: xr.DataTree,
    site: str,
    *,
    timestep: int | Sequence[int] | None = None,
    conditioning: str | Sequence[str] | None = None,
    guidance: float | None = None,
    pool: Literal["none", "mean", "patches"] = "none",
) -> xr.DataArray:
    """Features of one site, labelled; dimensions with one value asked for by label are dropped.

    Args:
        guidance: s in f_u + s (f_c - f_u); f_c is `conditioning` ("caption" by default), f_u is "null".
            Taken from the store where it was recorded, else computed here from the two that were.
        pool: "mean" averages places; "patches" gives (..., patch, channel).

    Returns:
        (sample, conditioning, timestep, channel, y, x) or fewer, with the samples' labels as coordinates.

    Raises:
        StoreError: the store has no such site, timestep or conditioning; the message lists those it has.

    >>> values = xr.DataArray(
    ...     np.ones((5, 2, 1, 3, 4, 4)), dims=("sample", "conditioning", "timestep", "channel", "y", "x"),
    ...     coords={"conditioning": ["null", "caption"], "timestep": [50]},
    ... )
    >>> tree = xr.DataTree.from_dict({"U-L1-Out": xr.Dataset({"features": values})})
    >>> features(tree, "U-L1-Out", timestep=50, conditioning="null").dims
    ('sample', 'channel', 'y', 'x')
    >>> features(tree, "U-L1-Out", guidance=4.0, pool="mean").shape
    (5, 1, 3)
    """
    array = _choose(_site(tree, site, "features"), "timestep", timestep)
    if guidance is None:
        array = _choose(array, "conditioning", conditioning)
    else:
        if not (conditioning is None or isinstance(conditioning, str)):
            raise StoreError("guidance takes one conditioning.")
        text = conditioning or "caption"
        if guided_name(text, guidance) in array["conditioning"].values.tolist():
            array = _choose(array, "conditioning", guided_name(text, guidance))
        else:
            unconditional = _choose(array, "conditioning", NULL).astype(np.float32)
            array = unconditional + guidance * (_choose(array, "conditioning", text).astype(np.float32) - unconditional)
            array = array.drop_vars("conditioning", errors="ignore").assign_coords(conditioning=guided_name(text, guidance))
    array.attrs["site"] = site
    places = [d for d in ("y", "x", "token") if d in array.dims]
    if pool == "mean":
        return array.astype(np.float32).mean(places, keep_attrs=True)
    if pool == "patches":
        if not places:
            raise StoreError(f"Site {site!r} was reduced while recording; it has no patches.")
        return array.stack(patch=places, create_index=False).transpose(..., "patch", "channel")
    if pool != "none":
        raise StoreError(f"pool={pool!r} is not one of none, mean, patches.")
    return array


def attention_maps(
    tree: xr.DataTree,
    word: str | None = None,
    *,
    token: int | None = None,
    site: str | Sequence[str] | None = None,
    conditioning: str = "caption",
    timestep: int | Sequence[int] | None = None,
    head: int | None = None,
    merge: Literal["mean", "sum"] = "mean",
) -> xr.DataArray:
    """Cross-attention of a word, its sub-tokens merged, or of a token position.

    Args:
        word: a whole word of the prompts; samples whose prompt lacks it are left out.
        token: a position instead: 0 is the start token.
        site: one map site, several, or all that the store has; several are brought to the finest grid and averaged.
        head: one head; the mean over heads by default.
        merge: how a word's sub-tokens become one map.

    Returns:
        (sample, timestep, y, x) float32, with the prompt as a coordinate.

    Raises:
        StoreError: no prompt has the word, or the word's tokens were not kept.

    >>> tree = open_store("runs/demo.zarr")  # doctest: +SKIP
    >>> attention_maps(tree, "star", timestep=50).dims  # doctest: +SKIP
    ('sample', 'timestep', 'y', 'x')
    """
    if (word is None) == (token is None):
        raise StoreError("Give either a word or a token position.")
    names = (
        [site]
        if isinstance(site, str)
        else list(site or (n for n in site_names(tree) if tree[n].attrs.get("kind") == "cross_map"))
    )
    if not names:
        raise StoreError("This store has no cross-attention maps; record them with --maps cross.")
    rows, positions, texts = _positions(tree, word, token, conditioning)
    wanted = list(zip(rows, positions, strict=True))
    maps = [
        read_maps(tree, name, wanted, conditioning, timestep, heads="mean" if head is None else head, merge=merge)
        for name in names
    ]
    height, width = (max(m.sizes[d] for m in maps) for d in ("y", "x"))
    merged = sum(_resize(m.isel(head=0, drop=True).rename(row="sample"), height, width) for m in maps) / len(maps)
    assert isinstance(merged, xr.DataArray)
    samples = {
        n: c.isel(sample=rows).variable for n, c in _site(tree, names[0], "maps").coords.items() if c.dims == ("sample",)
    }
    return merged.assign_coords(
        samples | {"prompt": ("sample", np.array(texts, str)), "conditioning": conditioning}
    ).assign_attrs(word=word or "", token=-1 if token is None else token, sites=", ".join(names))


def prompt_texts(tree: xr.DataTree, conditioning: str) -> xr.Dataset:
    """The texts of one conditioning and their tokens: text (sample), token_id, token_start and token_end (sample, token)."""
    prompts = tree["prompts"].to_dataset()
    there = prompts["conditioning"].values.tolist()
    return prompts.isel(conditioning=there.index(known(conditioning, there, "conditioning")))


def _positions(
    tree: xr.DataTree, word: str | None, token: int | None, conditioning: str
) -> tuple[list[int], list[list[int]], list[str]]:
    """Which samples have the word, at which token positions, in which text."""
    chosen = prompt_texts(tree, conditioning)
    texts = [str(t) for t in chosen["text"].values]
    if token is not None:
        return list(range(len(texts))), [[token]] * len(texts), texts
    starts, ends = chosen["token_start"].values, chosen["token_end"].values
    found = [
        word_tokens(t, str(word), list(zip(s.tolist(), e.tolist(), strict=True)))
        for t, s, e in zip(texts, starts, ends, strict=True)
    ]
    rows = [i for i, places in enumerate(found) if places]
    if not rows:
        example = f" A prompt reads {texts[0]!r}." if texts else ""
        raise StoreError(f"No prompt of the conditioning {conditioning!r} has the word {word!r}.{example}")
    return rows, [found[i] for i in rows], [texts[i] for i in rows]


def read_maps(
    tree: xr.DataTree,
    site: str,
    wanted: Sequence[tuple[int, Sequence[int]]],
    conditioning: str,
    timestep: int | Sequence[int] | None = None,
    *,
    heads: Literal["mean", "each"] | int = "mean",
    merge: Literal["mean", "sum"] = "mean",
) -> xr.DataArray:
    """Maps of tokens, the tokens of a row merged into one; whoever reads maps of words reads them here, in blocks of samples.

    Args:
        wanted: each row's sample and token positions; without positions a row is zero.
        heads: the mean over heads, one of them, or the mean and then each.

    Returns:
        (row, timestep, head, y, x) float32; heads are called "mean", "0", "1", ...

    Raises:
        StoreError: a position was not kept.
    """
    steps = None if timestep is None else [timestep] if isinstance(timestep, int | np.integer) else list(timestep)
    array = _choose(_choose(_site(tree, site, "maps"), "conditioning", conditioning), "timestep", steps)
    kept = array["token"].values.tolist() if "token" in array.coords else list(range(array.sizes["token"]))
    if missing := {p for _, places in wanted for p in places} - set(kept):
        raise StoreError(f"Token positions {sorted(missing)} were not kept in this store's maps; record with --map-tokens all.")
    count, number, height, width = (array.sizes[d] for d in ("timestep", "head", "y", "x"))
    names = ["mean", *map(str, range(number if number > 1 else 0))] if heads == "each" else [str(heads)]
    found = np.zeros((len(wanted), count, len(names), height, width), np.float32)
    rows = np.array([row for row, (_, places) in enumerate(wanted) for _ in places], np.intp)
    samples = np.array([sample for sample, places in wanted for _ in places], np.intp)
    tokens = np.array([kept.index(p) for _, places in wanted for p in places], np.intp)
    there = np.unique(samples)
    size = max(1, SHARD_BYTES // max(1, array.nbytes // max(1, array.sizes["sample"])))
    for block in (there[i : i + size] for i in range(0, len(there), size)):
        near = block[-1] - block[0] < 2 * len(block)  # a slice is read much faster than a list of samples
        read = array.isel(
            sample=slice(block[0], block[-1] + 1) if near else block
        ).load()  # turned lazily, it is read by points
        values = read.transpose("sample", "token", "timestep", "head", "y", "x").values
        (here,) = np.nonzero((samples >= block[0]) & (samples <= block[-1]))
        here = here[np.argsort(rows[here], kind="stable")]
        place = samples[here] - block[0] if near else np.searchsorted(block, samples[here])
        one = values[place, tokens[here]].astype(np.float32)  # (token of a row, timestep, head, y, x)
        own, starts, counts = np.unique(rows[here], return_index=True, return_counts=True)
        one = one[:, :, [heads]] if isinstance(heads, int) else one if heads == "each" else one.mean(2, keepdims=True)
        one = np.add.reduceat(one, starts, 0) / np.float32(counts if merge == "mean" else 1).reshape(-1, 1, 1, 1, 1)
        found[own] = np.concatenate([one.mean(2, keepdims=True), one], 2)[:, :, : len(names)] if heads == "each" else one
    return xr.DataArray(
        found, dims=("row", "timestep", "head", "y", "x"), coords={"timestep": array["timestep"].values, "head": names}
    )


def _resize(maps: xr.DataArray, height: int, width: int) -> xr.DataArray:
    """Bilinear, with pixel centres kept in place."""
    if (maps.sizes["y"], maps.sizes["x"]) == (height, width):
        return maps
    factors = (1, 1, height / maps.sizes["y"], width / maps.sizes["x"])
    values = zoom(maps.values, factors, order=1, mode="nearest", grid_mode=True)
    return xr.DataArray(values, dims=maps.dims, coords={n: c for n, c in maps.coords.items() if not {"y", "x"} & set(c.dims)})


# --- looking after a store ------------------------------------------------------------------------


def store_info(path: str | Path) -> dict[str, Any]:
    """What is in a store, how complete it is, where it came from, and its size: what `diffprobe info` prints."""
    root = _open_group(path, "r")
    attributes = _attributes(root, path)
    status = _read(root, "status")
    sites = {}
    for name in _stored_sites(root):
        array = _site_array(root, name)
        dims = array.metadata.dimension_names  # type: ignore[union-attr]
        sites[name] = {"kind": root[name].attrs.get("kind"), "dims": dims, "shape": array.shape, "bytes": array.nbytes}
    place = locate(path)
    on_disk = sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) if isinstance(place, Path) else 0
    own = {
        "samples": len(status),
        "status": {word: int((status == code).sum()) for code, word in STATUS_WORDS.items() if (status == code).any()},
        "sites": sites,
        "bytes_on_disk": on_disk,
        "digests": isinstance(root.attrs.get("digests"), dict),
    }
    return _Attributes({**own, **attributes}, path)


@dataclass(frozen=True)
class Fault:
    """A unit of a store that cannot be trusted, and why."""

    unit: int
    site: str
    reason: str


def verify_store(path: str | Path) -> list[Fault]:
    """Read every complete unit: checksums and digests agree, shards are whole and in their place, complete samples are finite.

    A store of before digests were kept is checked without them; `store_info` says whether it has them.

    Raises:
        StoreError: what belongs to no unit (ids, labels, prompts) is damaged, which no repair mends.
    """
    root = _open_group(path, "r")
    attributes = _attributes(root, path)
    step = int(attributes["unit_samples"])
    seal = _Seal(root)
    _check_layout(root, path, lambda key: True)
    for name in _shared_arrays(root):
        _read(root, name)
    samples, units, sites = _array(root, "status").shape[0], _array(root, "done").shape[0], _stored_sites(root)
    if seal.there:
        root = zarr.open_group(_Present(root.store, frozenset(range(units))), mode="r", zarr_format=3)
    order = sorted(sites)
    faults = []
    for unit in range(units):
        first, last = unit * step, min((unit + 1) * step, samples)
        try:
            if not _read(root, "done", slice(unit, unit + 1))[0]:
                continue
            status = _read(root, "status", slice(first, last))
            digests = _read(root, "digest", slice(unit, unit + 1))[0] if seal.there else None
        except StoreError as error:
            faults.append(Fault(unit, "status", f"unreadable: {first_line(error)}"))
            continue
        if (status == PENDING).any():
            faults.append(Fault(unit, "status", "the unit is done, and samples of it are pending"))
            continue
        for name in sites:
            try:
                values = np.asarray(_site_array(root, name)[first:last])
            except UNREADABLE_BYTES as error:
                faults.append(Fault(unit, name, f"unreadable: {first_line(error)}"))
                continue
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(1) & (status == COMPLETE)
            if bad.any():
                faults.append(
                    Fault(unit, name, f"{int(bad.sum())} complete samples hold values that are missing or not finite")
                )
            elif digests is not None and (digests[order.index(name)] != seal.of(name, unit, status, values)).any():
                faults.append(Fault(unit, name, "not what was written there: edited, or of another unit or store"))
    return faults


def _shared_arrays(root: zarr.Group) -> list[str]:
    """Paths of the arrays that belong to no unit: ids, labels, prompts, coordinates."""
    of_units = {
        "done",
        "status",
        "digest",
        *(f"{site}/{name}" for site in _stored_sites(root) for name in ("features", "maps")),
    }
    return [path for path, found in root.members(max_depth=None) if isinstance(found, zarr.Array) and path not in of_units]
