"""The Zarr layout, its writer, and its readers; runs without torch.

Format version 1.  The root has `sample` ids, labels, `status` (one number a sample) and `done` (one number a unit); the
group ``prompts`` has each (sample, conditioning)'s text and tokens; every site has a group of its own with one array:

- ``features`` (sample, conditioning, timestep, channel, y, x), fewer dimensions where it was reduced while recording;
- ``maps`` (sample, conditioning, timestep, head, token, y, x).

The invariant: a unit is a run of consecutive samples and exactly one shard of every array.  A shard is written by one
whole assignment, and `done` is set after the last of them; so two processes never share a file, and what is not done
was never there.  Absence is recorded in `status`, never guessed from fill values.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from scipy.ndimage import zoom
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync

from diffprobe.conditioning import NULL, guided_name, word_tokens

FORMAT_VERSION = 1
_SLACK, _SWELL = 2**28, 100
PENDING, COMPLETE, UNREADABLE, NOT_FINITE = 0, 1, 2, 3
STATUS_WORDS = {PENDING: "pending", COMPLETE: "complete", UNREADABLE: "image unreadable", NOT_FINITE: "not finite"}
CHUNK_BYTES = 2**20
SHARD_BYTES = 64 * 2**20
UNREADABLE_BYTES = (ValueError, OSError, RuntimeError, KeyError, TypeError)  # what zarr and its codecs raise on damage
_LEADING = ("sample", "conditioning", "timestep")


class StoreError(ValueError):
    """A store that is not one, is of another version, or is asked for what it does not hold."""


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


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def exists(path: str | Path) -> bool:
    """Whether there is a store at this path or URL."""
    try:
        zarr.open_group(str(path), mode="r")
    except (ImportError, PermissionError):  # of what a URL needs; of what this user may not see
        raise
    except Exception:  # as in _open_group
        return False
    return True


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
    with _whole(path) as place:
        root = zarr.open_group(place, mode="w", zarr_format=3)
        count = len(sample_ids)
        units = -(-count // unit_samples)
        keep: Any = {"write_empty_chunks": True}
        flags: Any = {"dtype": "uint8", "compressors": [Crc32cCodec()], "fill_value": 0, "config": keep}
        _put(root, "sample", np.array(list(sample_ids), dtype=np.dtypes.StringDType()), ("sample",))
        root.create_array("status", shape=(count,), chunks=(unit_samples,), dimension_names=("sample",), **flags)
        root.create_array("done", shape=(units,), chunks=(1,), dimension_names=("unit",), **flags)
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
                config=keep,
            )
        root.attrs["diffprobe"] = {"format_version": FORMAT_VERSION, "unit_samples": unit_samples, **attributes}


@contextlib.contextmanager
def _whole(path: str | Path) -> Iterator[str]:
    """Where to build what shall appear at `path` all at once: beside it, on a local disk."""
    if is_remote(path):
        yield str(path)
        return
    final = Path(path)
    for left in final.parent.glob(f"{glob.escape(final.name)}.init-*"):  # by a process that was killed in this place
        shutil.rmtree(left)
    building = final.with_name(f"{final.name}.init-{os.getpid()}")
    try:
        yield str(building)
        building.rename(final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def clear_cut_writes(path: str | Path) -> None:
    """Remove the shards that a killed process was about to put in their place; no process may be writing."""
    if not is_remote(path):
        for left in Path(path).rglob("*.partial"):
            left.unlink()


def write_whole(path: str | Path, text: str) -> None:
    """Write a file that appears whole or not at all, because others read from it what is done; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class BusyError(ValueError):
    """Another process is writing where this one is to write."""


@contextlib.contextmanager
def sole_writer(out: str | Path, rank: int = 0, ranks: int = 1, dry_run: bool = False) -> Iterator[None]:
    """Hold a lock beside a store or folder for as long as this process writes there; the kernel lets go of it if we die.

    Each rank has its own; the first one also looks for ranks of a larger run that it would not meet.

    Raises:
        BusyError: another process holds it; the message names it.
        ValueError: the place cannot be written to.
    """
    if is_remote(out) or dry_run:
        yield
        return
    path = Path(f"{out}.lock-{rank}")
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
    """The lock file, held until it is closed; BusyError that names the process which holds it now."""
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
        file.close()  # who held it removed it between our two calls: what we locked is no longer there


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


def code_commit() -> str | None:
    """The commit of the code that ran, when it ran from a checkout of its own and git is there to ask."""
    checkout = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # a hook's name another repository
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=ours)
    except OSError:
        return None
    top, _, commit = found.stdout.strip().partition("\n")
    # A virtual environment may lie in somebody else's repository, whose commit says nothing of this code.
    return commit if found.returncode == 0 and Path(top) == checkout else None


class StoreWriter:
    """Writes whole units; the only code that touches the arrays of a store."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.root = _open_group(path, "r+")
        self.attributes = _attributes(self.root, path)
        self.unit_samples = int(self.attributes["unit_samples"])

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
        """Write every site's array of one unit, then its status, then mark it done.

        Args:
            arrays: by site name, (sample, conditioning, timestep, ...).
            status: one number a sample, COMPLETE or why not.
        """
        first, last = self.bounds(unit)
        for site, values in arrays.items():
            target = _site_array(self.root, site)
            if values.shape != (last - first, *target.shape[1:]):
                raise AssertionError(f"Unit {unit} of {site}: shape {values.shape} for {(last - first, *target.shape[1:])}.")
            _remove_shard(target, unit)  # zarr reads what it replaces, and a damaged shard cannot be read
            target[first:last] = values
        _array(self.root, "status")[first:last] = status
        _array(self.root, "done")[unit] = 1

    def forget_unit(self, unit: int) -> None:
        """Mark a unit as not done, so that the next extract computes it again."""
        first, last = self.bounds(unit)
        _array(self.root, "done")[unit] = 0
        _array(self.root, "status")[first:last] = PENDING

    def set_attribute(self, name: str, value: Any) -> None:
        """Change one entry of the root's ``diffprobe`` attributes."""
        self.attributes[name] = value
        self.root.attrs["diffprobe"] = self.attributes


def request_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two requests differ in, one readable line each.

    >>> request_differences({"timesteps": [10], "seed": 0}, {"timesteps": [10, 50], "seed": 0})
    ['timesteps: the store has [10], you ask for [10, 50]']
    """
    missing = object()
    names = [*stored, *(name for name in asked if name not in stored)]
    pairs = ((name, stored.get(name, missing), asked.get(name, missing)) for name in names)
    show = lambda value: "nothing" if value is missing else json.dumps(value, ensure_ascii=False)  # noqa: E731
    return [f"{name}: the store has {show(old)}, you ask for {show(new)}" for name, old, new in pairs if old != new]


# --- opening --------------------------------------------------------------------------------------


def _open_group(path: str | Path, mode: Literal["r", "r+"]) -> zarr.Group:
    if not is_remote(path):
        if Path(path).is_file():
            raise StoreError(f"{path} is a file, and a store is a folder: give the folder that 'diffprobe extract --out' made.")
        _refuse_links(Path(path))
    try:
        root = zarr.open_group(str(path), mode=mode)
    except PermissionError as error:
        raise StoreError(f"{path} cannot be opened: {error}.") from error
    except ImportError:  # of what a URL needs
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{path} is not a diffprobe store: no Zarr group is there. 'diffprobe extract --out {path}' makes one."
        ) from error
    except Exception as error:  # metadata that someone edited can make zarr raise anything
        raise StoreError(f"{path} is not a diffprobe store, or its zarr.json is damaged ({_first_line(error)}).") from error
    if not is_remote(path):
        _check_budget(root, path)
    return root


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    try:
        found = group[name]
    except Exception as error:
        raise StoreError(f"The store's {name} is missing or its zarr.json is damaged ({_first_line(error)}).") from error
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
        raise StoreError(
            f"The store's {name} cannot be read ({_first_line(error)}). 'diffprobe repair' mends what belongs to a unit; "
            "otherwise extract it again under another name."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _stored_sites(root: zarr.Group) -> list[str]:
    request = _attributes(root, root.path).get("request", {})
    named = [*request.get("sites", ()), *request.get("maps", ())]
    return [*named, *sorted(set(root.group_keys()) - {*named, "prompts"})]


def _site_array(root: zarr.Group, site: str) -> zarr.Array[Any]:
    try:
        return _array(root, f"{site}/maps")
    except StoreError:
        return _array(root, f"{site}/features")


def _remove_shard(array: zarr.Array[Any], unit: int) -> None:
    """Delete a unit's shard, where there is one."""
    key = array.metadata.encode_chunk_key((unit, *[0] * (array.ndim - 1)))
    sync((array.store_path / key).delete())


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


def _check_budget(root: zarr.Group, path: str | Path) -> None:
    """Refuse a store from elsewhere whose few bytes ask for gigabytes of memory: by a large shape, or by chunks that swell.

    An array may take `_SWELL` times the store's size on disk, and `_SLACK` besides; of the sites' arrays what is done counts.

    Raises:
        StoreError: it asks for more.
    """
    on_disk = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    allowed = _SLACK + _SWELL * on_disk
    try:
        arrays = {name: found for name, found in root.members(max_depth=None) if isinstance(found, zarr.Array)}
    except Exception as error:  # as in _open_group
        raise StoreError(f"{path} is not a diffprobe store, or its zarr.json is damaged ({_first_line(error)}).") from error
    done = sum(1 for _ in (Path(path) / "done" / "c").glob("*"))
    for name, array in arrays.items():
        itemsize = max(1, getattr(array.dtype, "itemsize", 16))
        shape = (min(array.shape[0], done * array.shards[0]), *array.shape[1:]) if array.shards else array.shape
        asked = max(math.prod(shape), math.prod(array.chunks) if math.prod(shape) else 0) * itemsize
        if asked > allowed:
            raise StoreError(
                f"{path}: the array {name} asks for {asked / 1e9:.3g} GB, and the store has {on_disk / 1e6:.3g} MB on disk. "
                "No store that diffprobe wrote does; it is damaged, or meant to fill the memory."
            )


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
    attributes = _attributes(_open_group(path, "r"), path)
    try:
        tree = xr.open_datatree(str(path), engine="zarr", chunks=None, consolidated=False)
        labels = [str(n) for n, v in tree.ds.data_vars.items() if v.dims == ("sample",) and n != "status"]
        tree.dataset = tree.to_dataset().set_coords([*labels, "status"])
    except Exception as error:  # as above
        raise StoreError(f"{path} cannot be read as a store ({_first_line(error)}).") from error
    if chunks is not None:
        for site in site_names(tree):
            name = "maps" if "maps" in tree[site].data_vars else "features"
            tree[site][name] = tree[site][name].chunk({"sample": int(attributes["unit_samples"])})
    if complete:
        good = np.flatnonzero(tree["status"].values == COMPLETE)
        if len(good) < tree.sizes["sample"]:
            tree = xr.DataTree.from_dict({p: _pick(node.to_dataset(inherit=False), good) for p, node in tree.subtree_with_keys})
    tree.attrs = attributes
    return tree


def _pick(dataset: xr.Dataset, rows: NDArray[np.intp]) -> xr.Dataset:
    return dataset.isel(sample=rows) if "sample" in dataset.dims else dataset


def site_names(tree: xr.DataTree) -> list[str]:
    """The sites that a store holds, in the model's order, features before maps."""
    request = tree.attrs.get("request", {})
    order = {name: place for place, name in enumerate([*request.get("sites", ()), *request.get("maps", ())])}
    return sorted((name for name in tree.children if name != "prompts"), key=lambda name: (order.get(name, len(order)), name))


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
        return array.stack(patch=places).transpose(..., "patch", "channel")
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
    maps = [_word_maps(_site(tree, name, "maps"), rows, positions, conditioning, timestep, head, merge) for name in names]
    height, width = (max(m.sizes[d] for m in maps) for d in ("y", "x"))
    merged = sum(_resize(m, height, width) for m in maps) / len(maps)
    assert isinstance(merged, xr.DataArray)
    return merged.assign_coords(prompt=("sample", texts)).assign_attrs(
        word=word or "", token=-1 if token is None else token, sites=names
    )


def _positions(
    tree: xr.DataTree, word: str | None, token: int | None, conditioning: str
) -> tuple[list[int], list[list[int]], list[str]]:
    """Which samples have the word, at which token positions, in which text."""
    prompts = tree["prompts"].to_dataset()
    there = prompts["conditioning"].values.tolist()
    if conditioning not in there:
        raise StoreError(f"Conditioning {conditioning!r} has no prompts in this store; it has {', '.join(there)}.")
    chosen = prompts.isel(conditioning=there.index(conditioning))
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


def _word_maps(
    array: xr.DataArray,
    rows: list[int],
    positions: list[list[int]],
    conditioning: str,
    timestep: Any,
    head: int | None,
    merge: str,
) -> xr.DataArray:
    array = _choose(
        _choose(array, "conditioning", conditioning), "timestep", [timestep] if isinstance(timestep, int) else timestep
    )
    kept = array["token"].values.tolist() if "token" in array.coords else list(range(array.sizes["token"]))
    missing = {p for places in positions for p in places} - set(kept)
    if missing:
        raise StoreError(f"Token positions {sorted(missing)} were not kept in this store's maps; record with --map-tokens all.")
    array = array.isel(sample=rows)
    array = array.isel(head=head) if head is not None else array
    merged = []
    for row, places in enumerate(positions):
        one = array.isel(sample=row, token=[kept.index(p) for p in places]).astype(np.float32)
        one = one.mean("head") if "head" in one.dims else one
        merged.append(one.mean("token") if merge == "mean" else one.sum("token"))
    return xr.concat(merged, "sample", coords="different", compat="equals").transpose("sample", "timestep", "y", "x")


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
    on_disk = 0 if is_remote(path) else sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
    own = {
        "samples": len(status),
        "status": {word: int((status == code).sum()) for code, word in STATUS_WORDS.items() if (status == code).any()},
        "sites": sites,
        "bytes_on_disk": on_disk,
    }
    return _Attributes({**own, **attributes}, path)


@dataclass(frozen=True)
class Fault:
    """A unit of a store that cannot be trusted, and why."""

    unit: int
    site: str
    reason: str


def verify_store(path: str | Path) -> list[Fault]:
    """Read every complete unit: checksums agree, shards are whole, complete samples are finite.

    Raises:
        StoreError: what belongs to no unit (ids, labels, prompts) is damaged, which no repair mends.
    """
    root = _open_group(path, "r")
    attributes = _attributes(root, path)
    step = int(attributes["unit_samples"])
    faults = []
    for name in _shared_arrays(root):
        _read(root, name)
    samples, units, sites = _array(root, "status").shape[0], _array(root, "done").shape[0], _stored_sites(root)
    for unit in range(units):
        first, last = unit * step, min((unit + 1) * step, samples)
        try:
            if not _read(root, "done", slice(unit, unit + 1))[0]:
                continue
            status = _read(root, "status", slice(first, last))
        except StoreError as error:
            faults.append(Fault(unit, "status", f"unreadable: {_first_line(error)}"))
            continue
        for name in sites:
            try:
                values = np.asarray(_site_array(root, name)[first:last])
            except UNREADABLE_BYTES as error:
                faults.append(Fault(unit, name, f"unreadable: {_first_line(error)}"))
                continue
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(1) & (status == COMPLETE)
            if bad.any():
                faults.append(
                    Fault(unit, name, f"{int(bad.sum())} complete samples hold values that are missing or not finite")
                )
    return faults


def _shared_arrays(root: zarr.Group) -> list[str]:
    """Paths of the arrays that belong to no unit: ids, labels, prompts, coordinates."""
    of_units = {"done", "status", *(f"{site}/{name}" for site in _stored_sites(root) for name in ("features", "maps"))}
    return [path for path, found in root.members(max_depth=None) if isinstance(found, zarr.Array) and path not in of_units]
