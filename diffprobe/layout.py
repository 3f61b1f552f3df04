"""Opening a store, checking it, and refusing one that was damaged, edited or made to do harm; `store.py` describes the layout.

The invariant: links, codecs, sizes and attributes of a store are checked before values are read, and so are the digests of
all objects that belong to no unit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from diffprobe.rundir import StoreError, first_line, locate, reaching

FORMAT_VERSION = 1
PENDING, COMPLETE, UNREADABLE, NOT_FINITE = 0, 1, 2, 3
STATUS_WORDS = {PENDING: "pending", COMPLETE: "complete", UNREADABLE: "image unreadable", NOT_FINITE: "not finite"}
UNREADABLE_BYTES = (ValueError, OSError, RuntimeError, KeyError, TypeError)  # what zarr and its codecs raise on damage
DIGEST_BYTES = 16
SLACK, _SWELL = 2**28, 100


# --- opening --------------------------------------------------------------------------------------


def zarr_store(path: str | Path, read_only: bool) -> Store:
    place = locate(path)
    return (
        LocalStore(place, read_only=read_only) if isinstance(place, Path) else FsspecStore.from_url(place, read_only=read_only)
    )


def exists(path: str | Path) -> bool:
    """Whether there is a store at this path or URL.

    Raises:
        StoreError, OSError: the place cannot be read, so this is unknown.
    """
    try:
        with reaching(path):
            return sync(zarr_store(path, True).get("zarr.json", default_buffer_prototype())) is not None
    except FileNotFoundError:
        return False


def open_group(path: str | Path, mode: Literal["r", "r+"]) -> zarr.Group:
    place = locate(path)
    if isinstance(place, Path):
        if place.is_file():
            raise StoreError(f"{path} is a file, and a store is a folder: give the folder that 'diffprobe extract --out' made.")
        _refuse_links(place)
    try:
        with reaching(path):
            store = zarr_store(path, mode == "r")
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
    check_layout(root, path, lambda key: key.endswith("/zarr.json"))
    return root


class Present(WrapperStore[Store]):
    """A store in which a missing chunk is an error; zarr alone would read fill values.

    Args:
        units: units whose chunks of the sites' arrays have to exist.
        layout: keys of other objects that have to exist.
    """

    def __init__(self, store: Store, units: frozenset[int] = frozenset(), layout: frozenset[str] = frozenset()) -> None:
        super().__init__(store)
        self.units, self.layout = units, layout
        self._root = store.root / "zarr.json" if isinstance(store, LocalStore) else None
        self._opened = self._root and self._root.stat().st_ino

    def _with_store(self, store: Store) -> Present:
        return Present(store, self.units, self.layout)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if self._root and "/c/" in key and self._root.stat().st_ino != self._opened:  # asked after the read, which it judges
            raise StoreError("The store was extended since it was opened; open it again.")
        if found is None and "/c/" in key:
            unit = re.search(r"/(features|maps)/c/(\d+)/", key)
            if key in self.layout or (unit and int(unit[2]) in self.units):
                raise StoreError(
                    f"{key} of the store is missing. 'diffprobe verify' says what is damaged, 'diffprobe repair' mends it."
                )
        return found


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    try:
        found = group[name]
    except Exception as error:
        raise StoreError(f"The store's {name} is missing or its zarr.json is damaged ({first_line(error)}).") from error
    if not isinstance(found, zarr.Array):
        raise StoreError(f"The store's {name} is a group where an array should be.")
    return found


def read_array(group: zarr.Group, name: str, part: slice = slice(None)) -> NDArray[Any]:
    """Reads a small array that belongs to no site, or a part of it.

    Raises:
        StoreError: its bytes are damaged or missing.
    """
    try:
        return np.asarray(array_of(group, name)[part])
    except UNREADABLE_BYTES as error:
        raise unreadable(name, first_line(error)) from error


def unreadable(name: str, why: str) -> StoreError:
    return StoreError(
        f"The store's {name} cannot be read ({why}). 'diffprobe repair' mends what belongs to a unit; "
        "otherwise extract it again under another name."
    )


def stored_sites(root: zarr.Group) -> list[str]:
    request = attributes_of(root, root.path).get("request", {})
    named = [*request.get("sites", ()), *request.get("maps", ())]
    return [*named, *sorted(set(root.group_keys()) - {*named, "prompts"})]


def site_array(root: zarr.Group, site: str) -> zarr.Array[Any]:
    try:
        return array_of(root, f"{site}/maps")
    except StoreError:
        return array_of(root, f"{site}/features")


def recorded(root: zarr.Group, step: int) -> tuple[NDArray[np.uint8], frozenset[int]]:
    """The status of all samples, and the units whose shards have to exist.

    Raises:
        StoreError: a unit is done and its samples are pending in two reads; a writer may change them between one read.
    """
    for last in (False, True):
        done, status = read_array(root, "done"), read_array(root, "status")
        lost = [int(unit) for unit in np.flatnonzero(done) if (status[unit * step : (unit + 1) * step] == PENDING).any()]
        if not lost:
            break
        if last:
            raise StoreError(
                f"Unit {lost[0]} of the store is done, and its samples are pending: their status is lost. 'diffprobe repair' mends it."
            )
    if isinstance(root.attrs.get("digests"), dict):
        return status, frozenset(np.flatnonzero(done).tolist())
    return status, frozenset(
        (np.flatnonzero(status == COMPLETE) // step).tolist()
    )  # older stores have no chunks of nothing but NaN


# --- attributes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Everything that decides the values in a store; two runs with equal requests may share one.

    See `extract` for the meaning of the fields.
    """

    model: str
    revision: str | None
    weights: str
    dataset: str
    fingerprint: str
    samples: int
    sites: list[str]
    maps: list[str]
    heads: str
    map_tokens: list[int]
    timesteps: list[int]
    conditionings: list[str]
    guidance: list[float]
    noise_draws: int
    reduce: dict[str, str]
    seed: int
    resolution: list[int]
    fit: str
    latent_rule: str
    compute_dtype: str
    store_dtype: str
    network_guidance: float | None = None

    def plain(self) -> dict[str, Any]:
        """As a store keeps it; a guidance that no network is given is left out, as in older stores."""
        return {name: value for name, value in asdict(self).items() if name != "network_guidance" or value is not None}


_NEEDED: dict[str, Any] = {"unit_samples": int, "request": dict, "data": str}
_REQUEST: dict[str, Any] = {
    name: get_origin(kind) or kind
    for name, kind in get_type_hints(Request).items()
    if name not in ("revision", "network_guidance")
}
_KINDS = {int: "a number there", str: "a text there", list: "a list there", dict: "a mapping there"}


def attributes_of(root: zarr.Group, path: str | Path) -> dict[str, Any]:
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
    samples, units = (array_of(root, name).shape for name in ("status", "done"))
    if samples != array_of(root, "sample").shape or units != (-(-samples[0] // found["unit_samples"]),):
        raise StoreError(
            f"{path}: {samples} samples in units of {found['unit_samples']} do not fit {units} units. Was it edited?"
        )
    return Attributes(found, path) | {"request": Attributes(request, path)}


class Attributes(dict[str, Any]):
    """The attributes of a store; a missing one raises StoreError, which names it."""

    def __init__(self, values: Mapping[str, Any], path: str | Path) -> None:
        super().__init__(values)
        self._path = path

    def __or__(self, other: Mapping[str, Any]) -> Attributes:  # type: ignore[override]
        return Attributes({**self, **other}, self._path)

    def __missing__(self, name: str) -> Any:
        raise StoreError(f"{self._path}: the attribute {name!r} is missing; a store made by diffprobe has it. Was it edited?")


# --- digests --------------------------------------------------------------------------------------


def digest(*parts: bytes | NDArray[Any]) -> bytes:
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return found.digest()


class Seal:
    """Digests of a site's values in a unit, which are bound to the store's request, ids, labels and coordinates."""

    def __init__(self, root: zarr.Group) -> None:
        self.layout: Any = root.attrs.get("digests")
        self.there = isinstance(self.layout, dict)
        told = json.dumps([root.attrs.asdict().get("diffprobe", {}).get("request"), self.layout], sort_keys=True)  # type: ignore[union-attr]
        self._store = told.encode()

    def of(self, site: str, unit: int, status: NDArray[np.uint8], values: NDArray[Any]) -> NDArray[np.uint8]:
        return np.frombuffer(digest(self._store, f"{site}/{unit}".encode(), status, values), np.uint8)


def check_layout(root: zarr.Group, path: str | Path, which: Callable[[str], bool]) -> None:
    """Compares the objects of a store whose key `which` accepts with their digests, if the store has digests.

    Raises:
        StoreError: an object is missing or was changed.
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
        if value is None or digest(value.to_bytes()).hex() != layout[key]:
            why = "missing" if value is None else "not what was written"
            raise unreadable(re.sub(r"(/c/.*|/c|/zarr.json)$", "", key), f"{key} is {why}")


# --- refusing -------------------------------------------------------------------------------------

_CODECS = {"bytes", "vlen-utf8", "zstd", "crc32c", "sharding_indexed"}
_KINDS_OF_DATA = {"uint8", "int32", "int64", "float16", "float32", "float64", "bool", "string"}


def _refuse_links(path: Path) -> None:
    """Raises StoreError for a store with symbolic links, which could lead out of its folder."""
    if not path.is_dir():
        return
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            if (Path(folder) / name).is_symlink():
                raise StoreError(
                    f"{path} holds a symbolic link ({Path(folder) / name}); a store has none. Copy the data in its place to open it."
                )


def _check_arrays(root: zarr.Group, path: str | Path) -> None:
    """Checks a store for what diffprobe never writes, and for few bytes that would fill gigabytes of memory.

    Large shapes, large chunks and compressed frames with a large stated size need memory.  An array may need `_SWELL` times
    the store's size on disk plus `SLACK`; of the sites' arrays only finished units count.

    Raises:
        StoreError: the store fails a check.
    """
    try:
        arrays = {name: found for name, found in root.members(max_depth=None) if isinstance(found, zarr.Array)}
        told = {name: found.metadata.to_dict() for name, found in arrays.items()}
    except Exception as error:  # as in open_group
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
    allowed = SLACK + _SWELL * on_disk
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
    """The names of the codecs in a chain, with inner ones."""
    if isinstance(codecs, dict):
        inner = codecs.get("configuration", {})
        return {str(codecs.get("name"))} | _named([v for k, v in inner.items() if k.endswith("codecs")])
    return {name for one in codecs for name in _named(one)} if isinstance(codecs, list | tuple) else set()


def _frame_bytes(folder: Path, array: zarr.Array[Any]) -> int:
    """The largest decompressed size that a frame of an array's chunks states."""
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
                largest = max(largest, frame_size(opened.read(18)))
    return largest


def frame_size(head: bytes) -> int:
    """The decompressed size in a zstd frame's header (RFC 8878, 3.1.1.1); 2**63 without one, for our frames have it.

    >>> frame_size(bytes.fromhex("28b52ffd2005"))
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


# --- verifying ------------------------------------------------------------------------------------


def store_info(path: str | Path) -> dict[str, Any]:
    """A store's sites, completeness, size and attributes, as `diffprobe info` prints them.

    `written` has the finished units and when each was written, in seconds since 1970; NaN where the place does not say.
    """
    root = open_group(path, "r")
    attributes = attributes_of(root, path)
    status = read_array(root, "status")
    sites = {}
    for name in stored_sites(root):
        array = site_array(root, name)
        dims = array.metadata.dimension_names  # type: ignore[union-attr]
        sites[name] = {"kind": root[name].attrs.get("kind"), "dims": dims, "shape": array.shape, "bytes": array.nbytes}
    steps = next((root[name] for name in sites if "log_snr" in root[name]), None)  # type: ignore[operator]
    levels = {} if steps is None else {name: read_array(steps, name).tolist() for name in ("sigma", "log_snr")}  # type: ignore[arg-type]
    place, done = locate(path), read_array(root, "done")
    on_disk = sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) if isinstance(place, Path) else 0
    marks = {int(f.name): f.stat().st_mtime for f in (place / "done" / "c").glob("*")} if isinstance(place, Path) else {}
    own = {
        "units": len(done),
        "written": {int(unit): marks.get(int(unit), math.nan) for unit in np.flatnonzero(done)},
        "samples": len(status),
        "status": {word: int((status == code).sum()) for code, word in STATUS_WORDS.items() if (status == code).any()},
        "sites": sites,
        "levels": levels,
        "bytes_on_disk": on_disk,
        "digests": isinstance(root.attrs.get("digests"), dict),
    }
    return Attributes({**own, **attributes}, path)


@dataclass(frozen=True)
class Fault:
    """A unit of a store that cannot be trusted, and why."""

    unit: int
    site: str
    reason: str


def verify_store(path: str | Path) -> list[Fault]:
    """Reads every finished unit and compares it with its checksums and digests; values of complete samples must be finite.

    `store_info` says whether a store has digests; an older one is checked without them.

    Raises:
        StoreError: ids, labels, prompts or coordinates are damaged, which no repair mends.
    """
    root = open_group(path, "r")
    attributes = attributes_of(root, path)
    step = int(attributes["unit_samples"])
    seal = Seal(root)
    check_layout(root, path, lambda key: True)
    samples, units, sites = array_of(root, "status").shape[0], array_of(root, "done").shape[0], stored_sites(root)
    of_units = {"done", "status", "digest", *(f"{site}/{name}" for site in sites for name in ("features", "maps"))}
    for name, found in root.members(max_depth=None):
        if isinstance(found, zarr.Array) and name not in of_units:
            read_array(root, name)
    if seal.there:
        root = zarr.open_group(Present(root.store, frozenset(range(units))), mode="r", zarr_format=3)
    order = sorted(sites)
    faults = []
    for unit in range(units):
        first, last = unit * step, min((unit + 1) * step, samples)
        try:
            if not read_array(root, "done", slice(unit, unit + 1))[0]:
                continue
            status = read_array(root, "status", slice(first, last))
            digests = read_array(root, "digest", slice(unit, unit + 1))[0] if seal.there else None
        except StoreError as error:
            faults.append(Fault(unit, "status", f"unreadable: {first_line(error)}"))
            continue
        if (status == PENDING).any():
            faults.append(Fault(unit, "status", "the unit is done, and samples of it are pending"))
            continue
        for name in sites:
            try:
                values = np.asarray(site_array(root, name)[first:last])
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
