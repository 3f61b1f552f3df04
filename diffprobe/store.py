"""The writer and the readers of a store; needs no torch.  `layout.py` opens and checks stores.

Format version 1.  The root has `sample` ids, labels, `status` (one number a sample) and `done` (one number a unit); the
group ``prompts`` has each (sample, conditioning)'s text and tokens; every site has a group of its own with one array:

- ``features`` (sample, conditioning, timestep, channel, y, x), fewer dimensions where it was reduced while recording;
- ``maps`` (sample, conditioning, timestep, head, token, y, x).

The invariant: a unit is a run of consecutive samples and exactly one shard of every array.  Each shard is written by one
put, and `done` is set after the last of them, so two processes never share a file and an unfinished unit reads as absent.
Absence is recorded in `status` and never guessed from fill values: reading a chunk that should exist and is missing raises
an error.  The root's attribute `digests` has a digest of every object that belongs to no unit; the array ``digest``
(unit, site) has one of what each unit wrote, bound to its place.  Older stores, which have no digests, open too.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from scipy.ndimage import zoom
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, MemoryStore, StorePath

from diffprobe import layout
from diffprobe.conditioning import NULL, guided_name, word_tokens
from diffprobe.data.samples import did_you_mean
from diffprobe.layout import COMPLETE, NOT_FINITE, PENDING, STATUS_WORDS, UNREADABLE, Fault, exists, store_info, verify_store
from diffprobe.rundir import StoreError, TakenError, first_line, locate, reaching, refuse_unwritable, whole_folder  # fmt: skip
from diffprobe.sites import refuse_unet_sites

__all__ = [
    "COMPLETE", "LEVELS", "NOT_FINITE", "NO_WORD_MAPS", "PENDING", "STATUS_WORDS", "UNREADABLE", "ArraySpec", "Fault", "StoreError",
    "StoreWriter", "attention_maps", "clear_cut_writes", "create_store", "exists", "features", "known", "open_store", "prompt_texts",
    "provenance", "read_maps", "samples_per_unit", "site_names", "store_info", "verify_store", "word_sites",
]  # fmt: skip

CHUNK_BYTES = 2**20
SHARD_BYTES = 64 * 2**20
CONTENT = "content_digest"  # an array of the root: a hash of each sample's image, no label
_VARIABLES = frozenset(("features", "maps"))
_LEADING = ("sample", "conditioning", "timestep")
LEVELS = ("sigma", "log_snr")  # coordinates of the timesteps, where the model has noise
WORD_MAPS = ("cross_map", "joint_map")  # kinds of maps that show where in the image a text token is attended to
_OVER_WORDS = frozenset((*WORD_MAPS, "joint_text_map", "joint_back_map", "joint_output_map"))


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
    """The most samples of a unit: its arrays stay near 64 MiB together, and it has at most 64 images.

    Two units are in memory at a time, so this bounds the memory of a run of any length.

    >>> spec = ArraySpec("s", "p", "block", "features", ("channel", "y", "x"), (1280, 16, 16), ("null",))
    >>> samples_per_unit([spec], 5, 2)
    20
    """
    together = sum(spec.bytes_per_sample(timesteps, itemsize) for spec in specs)
    return max(1, min(SHARD_BYTES // max(1, together), 64))


# --- writing --------------------------------------------------------------------------------------


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
    company: bool = False,
    levels: Mapping[str, Sequence[float] | NDArray[Any]] | None = None,
) -> None:
    """Creates an empty store in one step: a reader sees all of its layout or no store.

    Args:
        attributes: provenance and request as plain values; kept under ``diffprobe`` in the root.
        prompts: ``text`` (sample, conditioning) and ``token_id``, ``token_start``, ``token_end`` (sample, conditioning, token).
        compress: use zstd; every inner chunk has a Crc32c either way.
        company: other processes may be creating the same store.
        levels: ``sigma`` and ``log_snr`` of the timesteps.

    Raises:
        TakenError: another process was first.
    """
    held: dict[str, Buffer] = {}
    root = zarr.open_group(MemoryStore(held), mode="w", zarr_format=3)
    count = len(sample_ids)
    units = -(-count // unit_samples)
    flags: Any = {"dtype": "uint8", "compressors": [Crc32cCodec()], "fill_value": 0}
    _put(root, "sample", np.array(list(sample_ids), dtype=np.dtypes.StringDType()), ("sample",))
    root.create_array("status", shape=(count,), chunks=(unit_samples,), dimension_names=("sample",), **flags)
    root.create_array("done", shape=(units,), chunks=(1,), dimension_names=("unit",), **flags)
    shape = (units, len(specs), layout.DIGEST_BYTES)
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
        for name, numbers in (levels or {}).items():
            _put(group, name, np.asarray(numbers, np.float64), ("timestep",))
        if "token" in spec.dims and spec.variable == "maps" and spec.kind in _OVER_WORDS:
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
    digests = {key: layout.digest(value.to_bytes()).hex() for key, value in held.items() if key != "zarr.json"}
    root.attrs["digests"] = digests
    root.attrs["diffprobe"] = {"format_version": layout.FORMAT_VERSION, "unit_samples": unit_samples, **attributes}
    final, objects = locate(path), {key: value.to_bytes() for key, value in held.items()}
    if isinstance(final, str):  # the rest of an earlier attempt is overwritten by an equal layout
        with reaching(final):
            sync(_upload(final, objects))
        return
    with whole_folder(final, company) as building:
        for key, content in objects.items():
            (building / key).parent.mkdir(parents=True, exist_ok=True)
            (building / key).write_bytes(content)


async def _upload(url: str, held: Mapping[str, bytes]) -> None:
    """Writes the objects of a new store, the root's last, and removes nothing."""
    refuse_unwritable(url)
    store = FsspecStore.from_url(url)
    store.fs.invalidate_cache()
    there = {key async for key in store.list()}
    if "zarr.json" in there or (others := sorted(there - set(held))):
        what = "a store" if "zarr.json" in there else f"objects of something else ({others[0]})"
        kind = TakenError if "zarr.json" in there else StoreError
        raise kind(f"{url} holds {what}: nothing was written. Give another --out, or remove what is there.")
    prototype = default_buffer_prototype()
    await asyncio.gather(
        *(store.set(key, prototype.buffer.from_bytes(value)) for key, value in held.items() if key != "zarr.json")
    )
    try:
        await store.fs._pipe_file(f"{store.path}/zarr.json", held["zarr.json"], mode="create")
    except FileExistsError:
        raise TakenError(f"Another process has just made a store at {url}; the same command goes on from there.") from None


def clear_cut_writes(path: str | Path) -> None:
    """Removes temporary files of killed processes; no process may be writing."""
    place = locate(path)
    if isinstance(place, Path):
        for left in place.rglob("*.partial"):
            if (
                re.search(r"\.[0-9a-f]{32}\.partial$", left.name) and left.is_file()
            ):  # zarr's temporary name; a label may be called so too
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


class StoreWriter:
    """Writes whole units; no other code writes into the arrays of a store."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.root = layout.open_group(path, "r+")
        self.attributes = layout.attributes_of(self.root, path)
        self.unit_samples = int(self.attributes["unit_samples"])
        self._seal = layout.Seal(self.root)

    @property
    def pending(self) -> list[int]:
        """Units that are not done, in order."""
        return [int(u) for u in np.flatnonzero(layout.read_array(self.root, "done") == 0)]

    @property
    def status(self) -> NDArray[np.uint8]:
        """A status number for each sample; `STATUS_WORDS` explains them."""
        return layout.read_array(self.root, "status")

    def unit_status(self, unit: int) -> NDArray[np.uint8]:
        """`status` of one unit's samples; PENDING for all of a unit that is not done."""
        first, last = self.bounds(unit)
        done = layout.read_array(self.root, "done", slice(unit, unit + 1))[0]
        return layout.read_array(self.root, "status", slice(first, last)) if done else np.full(last - first, PENDING, np.uint8)

    def bounds(self, unit: int) -> tuple[int, int]:
        """The first sample of a unit and the one after its last."""
        count = layout.array_of(self.root, "status").shape[0]
        return unit * self.unit_samples, min((unit + 1) * self.unit_samples, count)

    def write_unit(self, unit: int, arrays: Mapping[str, NDArray[Any]], status: NDArray[np.uint8]) -> None:
        """Marks a unit as pending, writes its part of every site's array, its status and digests, and marks it as done.

        Shards of an earlier unit are replaced one by one: a reader that has the store open sees the old or the new shard.
        If the process is killed in between, the unit stays pending.

        Args:
            arrays: by site name, (sample, conditioning, timestep, ...).
            status: COMPLETE or another status number for each sample.
        """
        first, last = self.bounds(unit)
        status = np.asarray(status, np.uint8)
        names = sorted(layout.stored_sites(self.root))
        digests = np.zeros((len(names), layout.DIGEST_BYTES), np.uint8)
        self.forget_unit(unit)
        with reaching(self.path):
            for site, values in arrays.items():
                target = layout.site_array(self.root, site)
                assert values.shape == (last - first, *target.shape[1:]), f"unit {unit} of {site}: {values.shape}"
                values = np.asarray(values, target.dtype)
                _replace_shard(target, unit, first, values)
                digests[names.index(site)] = self._seal.of(site, unit, status, values)
            layout.array_of(self.root, "status")[first:last] = status
            if self._seal.there:
                layout.array_of(self.root, "digest")[unit] = digests
            layout.array_of(self.root, "done")[unit] = 1

    def forget_unit(self, unit: int) -> None:
        """Marks a unit as not done, so that the next extract computes it again."""
        first, last = self.bounds(unit)
        with reaching(self.path):
            layout.array_of(self.root, "done")[unit] = 0
            layout.array_of(self.root, "status")[first:last] = PENDING


def _replace_shard(array: zarr.Array[Any], unit: int, first: int, values: NDArray[Any]) -> None:
    """Writes a unit's shard by a single put; an earlier shard, damaged or not, is neither read nor removed first."""
    held: dict[str, Buffer] = {}
    made: Any = AsyncArray(array.metadata, StorePath(MemoryStore(held)), {"write_empty_chunks": True})  # type: ignore[call-overload]
    zarr.Array(made)[first : first + len(values)] = values
    (key,) = held
    sync((array.store_path / key).set(held[key]))


# --- reading --------------------------------------------------------------------------------------


def open_store(path: str | Path, *, complete: bool = True, chunks: Literal["auto"] | None = None) -> xr.DataTree:
    """Opens a store lazily as a labelled tree with one node for each site, and `prompts`.

    The samples' labels are coordinates of the root and of every site, so that a selection keeps them.

    Args:
        complete: keep only samples that were recorded without fault; False keeps all, with NaN for missing values.
        chunks: None reads values when they are used; "auto" gives dask arrays of whole units.

    Raises:
        StoreError: not a store, or of another format version.

    >>> tree = open_store("runs/demo.zarr")  # doctest: +SKIP
    >>> features(tree, "U-L1-R1-B0-Cross-Q", timestep=50, pool="mean").dims  # doctest: +SKIP
    ('sample', 'conditioning', 'channel')
    >>> tree["U-L1-R1-B0-Cross-Q"].features.sel(timestep=50, conditioning="caption")["colour"].dims  # doctest: +SKIP
    ('sample',)
    """
    root = layout.open_group(path, "r")
    attributes = layout.attributes_of(root, path)
    status, units = layout.recorded(root, attributes["unit_samples"])
    kept = root.attrs.get("digests")
    present = layout.Present(root.store, units, frozenset(kept) if isinstance(kept, dict) else frozenset())
    hidden = ["done", "digest", CONTENT] if isinstance(kept, dict) else ["done"]
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
        keyed = dict(found.subtree_with_keys)
        nodes = {name: _plain(keyed[name].to_dataset(inherit=False), rows) for name in _in_order(keyed, attributes)}
    except StoreError:
        raise
    except Exception as error:  # as in open_group
        raise StoreError(f"{path} cannot be read as a store ({first_line(error)}).") from error
    if chunks is not None:
        size = {"sample": int(attributes["unit_samples"])}
        nodes = {name: node.chunk(size) if _VARIABLES & set(node) else node for name, node in nodes.items()}
    root_node = nodes["."] = nodes["."].set_coords([str(n) for n, v in nodes["."].data_vars.items() if v.dims == ("sample",)])
    own = {"sample", "status", *_VARIABLES}  # a label that is called as an array of a site stays at the root
    labels = {name: label.variable for name, label in root_node.coords.items() if name not in own}
    for name, node in nodes.items():
        if _VARIABLES & set(node):
            nodes[name] = node.set_coords([n for n in LEVELS if n in node]).assign_coords(labels)
    nodes["."].attrs = {"diffprobe": json.dumps(attributes, ensure_ascii=False)}
    return xr.DataTree.from_dict(nodes)


def _plain(dataset: xr.Dataset, rows: NDArray[np.intp] | None) -> xr.Dataset:
    """Some samples of one node, without the store's encodings, so that it can be saved again."""
    if rows is not None and "sample" in dataset.dims:
        dataset = dataset.isel(sample=rows)
    dataset = dataset.drop_encoding()
    texts = {name: (v.dims, _fixed_width(v.values)) for name, v in dataset.variables.items() if v.dtype.kind in "TO"}
    return dataset.assign_coords({n: v for n, v in texts.items() if n in dataset.coords}).assign(
        {n: v for n, v in texts.items() if n not in dataset.coords}
    )


def _fixed_width(texts: NDArray[Any]) -> NDArray[Any]:
    """Texts in NumPy's fixed-width type, which all formats take; as objects where that would lose characters or waste memory."""
    plain = texts.astype(object)
    longest = max(map(len, plain.flat), default=0)
    if longest * plain.size * 4 > layout.SLACK or any(text.endswith("\0") for text in plain.flat):
        return plain
    return plain.astype(f"U{max(1, longest)}")


def provenance(tree: xr.DataTree) -> dict[str, Any]:
    """A store's request, data, versions and other attributes; and ``log_snr`` by timestep, in stores that have it.

    The tree's attributes hold them as JSON, for xarray saves only plain values.
    """
    held = layout.Attributes(json.loads(tree.attrs.get("diffprobe", "{}")), "The store")
    leveled = next((node.to_dataset() for node in tree.children.values() if "log_snr" in node.coords), None)
    if leveled is not None:
        held |= {"log_snr": dict(zip(leveled["timestep"].values.tolist(), leveled["log_snr"].values.tolist(), strict=True))}
    return held | {"request": layout.Attributes(held["request"], "The store")} if "request" in held else held


def site_names(tree: xr.DataTree) -> list[str]:
    """The sites of a store in the model's order, features before maps."""
    return _in_order([name for name in tree.children if name != "prompts"], provenance(tree))


def _in_order(names: Iterable[str], attributes: Mapping[str, Any]) -> list[str]:
    """Names in the order of a store's request; others first, as they come.

    A folder lists its entries in an order that is the file system's own, and so would a tree list its sites.
    """
    request = attributes.get("request", {})
    order = {name: place for place, name in enumerate([*request.get("sites", ()), *request.get("maps", ())])}
    return sorted(names, key=lambda name: order.get(name, -1))


NO_WORD_MAPS = "{} has no cross-attention maps; record them with --maps cross, or joint where image and text attend together."


def word_sites(tree: xr.DataTree) -> list[str]:
    """The sites whose maps show where a word is attended to."""
    return [name for name in site_names(tree) if tree[name].attrs.get("kind") in WORD_MAPS]


def sample_labels(tree: xr.DataTree | xr.Dataset) -> list[str]:
    """The names of the labels that a store's samples have."""
    return [str(name) for name, c in tree.coords.items() if c.dims == ("sample",) and name not in ("sample", "status")]


def known(name: str, there: Sequence[str], what: str) -> str:
    """Returns the name; raises StoreError, which lists all names and the closest one, if it is unknown."""
    if name not in there:
        refuse_unet_sites(there, name, [name])
        raise StoreError(f"There is no {what} {name!r} in this store.{did_you_mean(name, there)} It has: {', '.join(there)}.")
    return name


def _site(tree: xr.DataTree, site: str, variable: str) -> xr.DataArray:
    names = [n for n in site_names(tree) if variable in tree[n].data_vars]
    by_path = {str(tree[n].attrs.get("path")): n for n in names}
    name = by_path.get(site, site)
    if name not in names:
        refuse_unet_sites(names, site, [site])
        hint = did_you_mean(site, [*names, *by_path])
        raise StoreError(f"Site {site!r} has no {variable} in this store.{hint} It has: {', '.join(names) or 'none'}.")
    labels = {n: c for n, c in tree.coords.items() if c.dims == ("sample",) and n != "status"}
    array: xr.DataArray = tree[name].to_dataset()[variable]
    return array.assign_coords(labels).assign_attrs({"site": name, **tree[name].attrs})


def choose(array: xr.DataArray, dim: str, wanted: Any) -> xr.DataArray:
    """Selects by label; a single value drops the dimension, a list keeps it.  An unknown label raises StoreError."""
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
    """Features of one site with their labels; a dimension is dropped if a single value of it is asked for.

    Args:
        guidance: s in f_u + s (f_c - f_u); f_c is `conditioning` ("caption" by default), f_u is "null".
            Read from the store if it was recorded, else computed in float32 from the two conditionings.
        pool: "mean" averages over places; "patches" gives (..., patch, channel).

    Returns:
        (sample, conditioning, timestep, channel, y, x) or fewer, with the samples' labels as coordinates.

    Raises:
        StoreError: the store lacks the site, timestep or conditioning; the message lists those it has.

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
    array = choose(_site(tree, site, "features"), "timestep", timestep)
    if guidance is None:
        array = choose(array, "conditioning", conditioning)
    else:
        if not (conditioning is None or isinstance(conditioning, str)):
            raise StoreError("guidance takes one conditioning.")
        text = conditioning or "caption"
        if guided_name(text, guidance) in array["conditioning"].values.tolist():
            array = choose(array, "conditioning", guided_name(text, guidance))
        else:
            unconditional = choose(array, "conditioning", NULL).astype(np.float32)
            array = unconditional + guidance * (choose(array, "conditioning", text).astype(np.float32) - unconditional)
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
    """Cross-attention or joint maps of a word, with its sub-tokens merged, or of a token position.

    Args:
        word: a whole word of the prompts; samples without it are left out.
        token: a token position in place of a word; 0 is the start token.
        site: one map site, several, or all by default; the maps of several are averaged on the finest grid.
        head: one head; the mean over heads by default.
        merge: how the maps of a word's sub-tokens are merged.

    Returns:
        (sample, timestep, y, x) float32, with the prompt as a coordinate.

    Raises:
        StoreError: no prompt has the word, or its tokens were not kept.

    >>> tree = open_store("runs/demo.zarr")  # doctest: +SKIP
    >>> attention_maps(tree, "star", timestep=50).dims  # doctest: +SKIP
    ('sample', 'timestep', 'y', 'x')
    """
    if (word is None) == (token is None):
        raise StoreError("Give either a word or a token position.")
    names = [site] if isinstance(site, str) else list(site or word_sites(tree))
    if not names:
        raise StoreError(NO_WORD_MAPS.format("This store"))
    rows, positions, texts = _positions(tree, word, token, conditioning)
    wanted = list(zip(rows, positions, strict=True))
    maps = [
        read_maps(tree, name, wanted, conditioning, timestep, heads="mean" if head is None else head, merge=merge)
        for name in names
    ]
    merged = mean_over_sites(maps).isel(head=0, drop=True).rename(row="sample")
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
    """The samples that have the word, its token positions in each, and their texts."""
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
    """Maps of tokens, one for each row; the one reader of maps by word, which reads blocks of samples.

    Args:
        wanted: the sample and the token positions of each row; their maps are merged, and without positions a row is zero.
        heads: "mean" over heads, one head, or "each": the mean and then every head.

    Returns:
        (row, timestep, head, y, x) float32; heads are called "mean", "0", "1", ...

    Raises:
        StoreError: a position was not kept.
    """
    steps = None if timestep is None else [timestep] if isinstance(timestep, int | np.integer) else list(timestep)
    array = choose(choose(_site(tree, site, "maps"), "conditioning", conditioning), "timestep", steps)
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


def mean_over_sites(maps: Sequence[xr.DataArray]) -> xr.DataArray:
    """The mean of several sites' maps (row, timestep, head, y, x) of one head, on the finest of their grids."""
    height, width = (max(m.sizes[d] for m in maps) for d in ("y", "x"))
    total = sum(_resize(m, height, width) for m in maps)
    assert isinstance(total, xr.DataArray)
    return total / len(maps)


def _resize(maps: xr.DataArray, height: int, width: int) -> xr.DataArray:
    """Bilinear interpolation that keeps pixel centres in place."""
    if (maps.sizes["y"], maps.sizes["x"]) == (height, width):
        return maps
    factors = (*[1] * (maps.ndim - 2), height / maps.sizes["y"], width / maps.sizes["x"])
    values = zoom(maps.values, factors, order=1, mode="nearest", grid_mode=True)
    return xr.DataArray(values, dims=maps.dims, coords={n: c for n, c in maps.coords.items() if not {"y", "x"} & set(c.dims)})
