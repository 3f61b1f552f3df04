"""Stores made of stores: merged from disjoint parts, or cut down to one; needs no torch.

A store runs along four axes: samples, sites, timesteps, conditionings.  Merged stores differ along exactly one of them.  The
invariant: every value, status, prompt and label is copied as it is, so a merged store holds what one extraction of the whole
would hold.  Copying goes unit by unit; a killed copy is an unfinished store, which the same call finishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from diffprobe.conditioning import NULL, guided_name
from diffprobe.console import Console, size_text
from diffprobe.data.join import joined_fingerprint
from diffprobe.data.samples import join_spec
from diffprobe.layout import (
    COMPLETE,
    PENDING,
    Present,
    attributes_of,
    check_layout,
    open_group,
    read_array,
    recorded,
    site_array,
)
from diffprobe.rundir import RequestError, StoreError, check_request, free_bytes, request_differences, sole_writer
from diffprobe.store import ArraySpec, StoreWriter, create_store, exists, known

AXES = {  # what of a request belongs to an axis
    "samples": ("dataset", "fingerprint", "samples"),
    "sites": ("sites", "maps", "reduce"),
    "timesteps": ("timesteps",),
    "conditionings": ("conditionings",),
}
_OF_NO_UNIT = {"sample", "status", "done", "digest"}


@dataclass
class Source:
    """A finished store that is copied from."""

    path: str
    root: zarr.Group
    attributes: dict[str, Any]
    ids: list[str]
    status: NDArray[np.uint8]
    rows: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {name: row for row, name in enumerate(self.ids)}

    @classmethod
    def open(cls, path: str | Path, finished: bool = True) -> Source:
        """Opens a store.

        Raises:
            StoreError: it is damaged, or has to be `finished` and is not.
        """
        root = open_group(path, "r")
        attributes = attributes_of(root, path)
        check_layout(root, path, lambda key: True)
        status, units = recorded(root, int(attributes["unit_samples"]))
        if finished and (number := int((status == PENDING).sum())):
            raise StoreError(
                f"{path} has {number} pending samples; finish it with the command that began it, or 'diffprobe repair {path}'."
            )
        whole = zarr.open_group(Present(root.store, units), mode="r", zarr_format=3)
        return cls(str(path), whole, attributes, [str(name) for name in read_array(root, "sample")], status)

    @property
    def request(self) -> dict[str, Any]:
        found: dict[str, Any] = self.attributes["request"]
        return found

    @property
    def sites(self) -> list[str]:
        return [*self.request["sites"], *self.request["maps"]]

    def along(self, axis: str) -> list[Any]:
        """What stands along an axis."""
        return {"samples": sorted(self.ids), "sites": self.sites}.get(axis) or list(self.request[axis])

    def labels(self) -> dict[str, NDArray[Any]]:
        """By name, one value a sample."""
        return {name: read_array(self.root, name) for name in sorted(set(self.root.array_keys()) - _OF_NO_UNIT)}

    def prompts(self) -> dict[str, NDArray[Any]]:
        """`text` (sample, conditioning) and the tokens (sample, conditioning, token)."""
        return {name: read_array(self.root, f"prompts/{name}") for name in ("text", "token_id", "token_start", "token_end")}

    def coordinate(self, site: str, name: str) -> list[Any]:
        found: list[Any] = read_array(self.root, f"{site}/{name}").tolist()
        return found


# --- merging --------------------------------------------------------------------------------------


def merge(paths: Sequence[str | Path], out: str | Path, *, progress: bool = True) -> str:
    """Joins stores that differ in their samples, sites, timesteps or conditionings into a new one.

    The new store has the values of the first along the axis, then those of the second, and so on.  Conditionings may share
    "null", which is taken from the first store.

    Returns:
        The axis.

    Raises:
        StoreError: the stores differ in something else, or share what they should not.
    """
    if len(paths) < 2:
        raise StoreError("merge takes two stores or more.")
    sources = [Source.open(path) for path in paths]
    axes = {_axis(sources[0], other) for other in sources[1:]}
    if len(axes) > 1:
        raise StoreError(f"The stores differ in {' and '.join(sorted(axes))}; merge along one of them at a time.")
    (axis,) = axes
    for number, source in enumerate(sources):
        for other in sources[:number]:
            shared = [v for v in source.along(axis) if v in set(other.along(axis))]
            if axis == "conditionings":
                shared = [name for name in shared if name != NULL]
            if shared:
                raise StoreError(
                    f"{other.path} and {source.path} share {len(shared)} of their {axis}, such as {shared[0]!r}; "
                    "'diffprobe subset' takes a part of one."
                )
    whole = dict(sources[0].request)
    for other in sources[1:]:
        whole |= _joined(whole, other.request, axis)
    attributes = sources[0].attributes | {"request": whole, "merged": [source.path for source in sources]}
    ids = sources[0].ids
    labels = sources[0].labels()
    if axis == "samples":
        ids = [name for source in sources for name in source.ids]
        labels = _joined_labels([source.labels() for source in sources], [len(source.ids) for source in sources])
        attributes["data"] = join_spec("join", "", {f"part{n}": s.attributes["data"] for n, s in enumerate(sources)})
        whole["fingerprint"] = joined_fingerprint([source.request["fingerprint"] for source in sources])
    with sole_writer(out):
        compose(sources, out, attributes, ids, labels, progress=progress)
    return axis


def _axis(one: Source, other: Source) -> str:
    """The axis along which two stores differ; StoreError where they differ in more, or nowhere."""
    differing = [axis for axis in AXES if one.along(axis) != other.along(axis)]
    if len(differing) != 1:
        what = (
            f"differ in their {' and '.join(differing)}"
            if differing
            else "have the same samples, sites, timesteps and conditionings"
        )
        raise StoreError(f"{one.path} and {other.path} {what}; stores can be merged that differ in exactly one of these.")
    check_alike(one, other, differing[0])
    return differing[0]


def check_alike(one: Source, other: Source, axis: str) -> None:
    """Raises RequestError, which lists the differences, unless two requests are equal but for one axis."""
    left, right = one.request, other.request
    free = {"sites": ("reduce",), "samples": AXES["samples"]}.get(axis, ()) + AXES[axis]
    if left["weights"] == right["weights"]:
        free += ("model", "revision")  # a folder may have been moved
    if left["fingerprint"] == right["fingerprint"]:
        free += ("dataset",)
    if not left["maps"] and not right["maps"]:
        free += ("map_tokens",)
    kept, asked = ({k: v for k, v in request.items() if k not in free} for request in (left, right))
    if differences := request_differences(kept, asked, (f"{one.path} has", f"{other.path} has")):
        raise RequestError(f"{one.path} and {other.path} cannot be merged: {'; '.join(differences)}.")


def _joined(left: dict[str, Any], right: dict[str, Any], axis: str) -> dict[str, Any]:
    """What the request of two merged stores has along an axis."""
    if axis == "samples":
        return {"dataset": f"{left['dataset']}+{right['dataset']}", "samples": left["samples"] + right["samples"]}
    if axis == "sites":
        return {name: left[name] + right[name] for name in ("sites", "maps")} | {"reduce": left["reduce"] | right["reduce"]}
    return {axis: [*left[axis], *(value for value in right[axis] if value not in left[axis])]}


def _joined_labels(labels: Sequence[dict[str, NDArray[Any]]], counts: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The labels of all samples: where a store lacks one, NaN among numbers and "" among texts."""
    joined = {}
    for name in dict.fromkeys(name for own in labels for name in own):
        numbers = all(own[name].dtype.kind in "if" for own in labels if name in own)
        nothing: Any = np.nan if numbers else ""
        parts = [own.get(name, np.full(n, nothing, None if numbers else object)) for own, n in zip(labels, counts, strict=True)]
        joined[name] = np.concatenate(parts if numbers else [np.array([str(v) for v in part], object) for part in parts])
    return joined


# --- a part of a store ----------------------------------------------------------------------------


def subset(
    path: str | Path,
    out: str | Path,
    *,
    samples: Sequence[str] = (),
    where: Mapping[str, str] | None = None,
    limit: int | None = None,
    sites: Sequence[str] = (),
    timesteps: Sequence[int] = (),
    conditionings: Sequence[str] = (),
    progress: bool = True,
) -> int:
    """Copies a part of a store into a new one; what is not given is kept whole.

    Args:
        samples: ids.
        where: label: value; a sample has to have all of them.
        limit: the first so many of the samples that are left.

    Returns:
        The number of samples.

    Raises:
        StoreError: the store lacks something that is asked for, or nothing is left.
    """
    source = Source.open(path)
    request, labels = source.request, source.labels()
    wanted = {known(name, source.ids, "sample") for name in samples} or set(source.ids)
    for name, value in (where or {}).items():
        column = labels[known(name, list(labels), "label")]
        wanted &= {one for one, found in zip(source.ids, column, strict=True) if str(found) == value}
    ids = [name for name in source.ids if name in wanted][:limit]
    chosen = {known(name, source.sites, "site") for name in sites} or set(source.sites)
    if not ids:
        raise StoreError(f"No sample of {path} is left; nothing was written.")
    part = request | {name: [site for site in request[name] if site in chosen] for name in ("sites", "maps")}
    for axis, values in (("timesteps", timesteps), ("conditionings", conditionings)):
        if values:
            unknown = [value for value in values if value not in request[axis]]
            if unknown:
                raise StoreError(f"{path} has no {unknown[0]!r} among its {axis}; it has {', '.join(map(str, request[axis]))}.")
            part[axis] = [value for value in request[axis] if value in values]
    part["reduce"] = {site: rule for site, rule in request["reduce"].items() if site in chosen}
    part["samples"] = len(ids)
    if len(ids) < len(source.ids):
        part["fingerprint"] = hashlib.sha256(repr((request["fingerprint"], ids)).encode()).hexdigest()[:16]
    rows = [source.rows[name] for name in ids]
    with sole_writer(out):
        compose(
            [source],
            out,
            source.attributes | {"request": part},
            ids,
            {n: v[rows] for n, v in labels.items()},
            progress=progress,
        )
    return len(ids)


# --- the copy -------------------------------------------------------------------------------------


def compose(
    sources: Sequence[Source],
    out: str | Path,
    attributes: Mapping[str, Any],
    ids: Sequence[str],
    labels: Mapping[str, NDArray[Any]],
    *,
    progress: bool = True,
) -> None:
    """Writes a store whose values stand in the sources; what several have is taken from the first of them.

    Args:
        attributes: of the new store; its request says what stands along the axes.

    Raises:
        RequestError: `out` holds another store.
        StoreError: the disk is too small, or the sources have different prompts for a sample.
    """
    request = dict(attributes["request"])
    prompts = _prompts(sources, ids, request["conditionings"])
    request["map_tokens"] = list(range(prompts["token_id"].shape[2]))
    attributes = {name: value for name, value in attributes.items() if name != "format_version"} | {"request": request}
    specs = _specs(sources, request)
    if exists(out):
        check_request(
            out, StoreWriter(out).attributes["request"], request, "holds another store; give another --out, or remove it."
        )
    else:
        itemsize = np.dtype(request["store_dtype"]).itemsize
        needed = sum(spec.bytes_per_sample(len(request["timesteps"]), itemsize) for spec in specs) * len(ids)
        free = free_bytes(out)
        if free is not None and needed > free:
            raise StoreError(f"{out} needs {size_text(needed)}, and {size_text(free)} are free; nothing was written.")
        first = site_array(sources[0].root, sources[0].sites[0])
        create_store(
            out, attributes=attributes, sample_ids=ids, labels=labels, timesteps=request["timesteps"], prompts=prompts,
            conditionings=request["conditionings"], tokens=request["map_tokens"], specs=specs, unit_samples=int(attributes["unit_samples"]),
            dtype=request["store_dtype"], compress="zstd" in str(first.metadata.to_dict()["codecs"]),
        )  # fmt: skip
    writer = StoreWriter(out)
    with Console(stderr=True, quiet=not progress).progress("copy", "units", -(-len(ids) // writer.unit_samples)) as advance:
        for unit in writer.pending:
            first_row, last = writer.bounds(unit)
            writer.write_unit(unit, *_unit(sources, specs, ids[first_row:last], request))
            advance(1)


def _specs(sources: Sequence[Source], request: Mapping[str, Any]) -> list[ArraySpec]:
    """Every site's array, as the first source that has the site keeps it."""
    scales = [guided_name(c, s) for c in request["conditionings"] if c != NULL for s in request["guidance"]]
    specs = []
    for site in [*request["sites"], *request["maps"]]:
        having = [source for source in sources if site in source.sites]
        array, told = site_array(having[0].root, site), having[0].root[site].attrs
        there = {name for source in having for name in source.coordinate(site, "conditioning")}
        dims: Any = array.metadata.dimension_names  # type: ignore[union-attr]
        variable: Any = array.basename
        names = tuple(name for name in [*request["conditionings"], *scales] if name in there)
        own = (site, str(told["path"]), str(told["kind"]), variable)
        specs.append(ArraySpec(*own, tuple(dims[3:]), tuple(array.shape[3:]), names, str(told["reduce"])))
    return specs


def _prompts(sources: Sequence[Source], ids: Sequence[str], conditionings: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Texts and tokens of all samples; where one source keeps fewer tokens, padding fills the rest."""
    read = [source.prompts() for source in sources]
    width = max(own["token_id"].shape[2] for own in read)
    shape = (len(ids), len(conditionings))
    padding = sources[0].attributes.get("special_tokens", {}).get("padding", 0)
    joined = {
        name: np.full((*shape, width), padding if name == "token_id" else 0, np.int32) for name in read[0] if name != "text"
    }
    joined["text"] = np.full(shape, None, object)
    for source, own in zip(sources, read, strict=True):
        to, rows = _rows(source, ids)
        columns = [
            (c, source.request["conditionings"].index(name))
            for c, name in enumerate(conditionings)
            if name in source.request["conditionings"]
        ]
        for column, theirs in columns:
            fresh = np.array([joined["text"][row, column] is None for row in to], bool)
            texts = own["text"][rows, theirs].astype(object)
            differing = np.flatnonzero(~fresh & (joined["text"][to, column] != texts))
            if len(differing):
                raise StoreError(
                    f"{sources[0].path} and {source.path} have different prompts for {ids[to[differing[0]]]!r} under "
                    f"{conditionings[column]!r}; they were not made from the same captions."
                )
            for name, values in own.items():
                place = (to[fresh], column) if name == "text" else (to[fresh], column, slice(values.shape[2]))
                joined[name][place] = values[rows[fresh], theirs]
    return joined


def _rows(source: Source, ids: Sequence[str]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where among the ids the samples of a source stand, and where in the source."""
    pairs = [(place, source.rows[name]) for place, name in enumerate(ids) if name in source.rows]
    to, rows = np.array(pairs, np.intp).reshape(-1, 2).T
    return to, rows


def _unit(
    sources: Sequence[Source], specs: Sequence[ArraySpec], ids: Sequence[str], request: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """The arrays and the status of some samples; a sample is complete if it is so in every source."""
    steps, status = request["timesteps"], np.full(len(ids), PENDING, np.uint8)
    arrays = {
        spec.site: np.full((len(ids), len(spec.conditionings), len(steps), *spec.shape), np.nan, request["store_dtype"])
        for spec in specs
    }
    for source in reversed(sources):
        to, rows = _rows(source, ids)
        if not len(to):
            continue
        status[to] = np.where(status[to] > COMPLETE, status[to], source.status[rows])
        for spec in specs:
            if spec.site not in source.sites:
                continue
            values = _read(site_array(source.root, spec.site), rows)
            columns, times = source.coordinate(spec.site, "conditioning"), source.coordinate(spec.site, "timestep")
            c = [(n, columns.index(name)) for n, name in enumerate(spec.conditionings) if name in columns]
            t = [(n, times.index(step)) for n, step in enumerate(steps) if step in times]
            theirs = values[:, [there for _, there in c]][:, :, [there for _, there in t]]
            arrays[spec.site][np.ix_(to, [here for here, _ in c], [here for here, _ in t])] = theirs
    return arrays, status


def _read(array: zarr.Array[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
    """Samples of a site's array; a run of them by one slice, which is read much faster than a list."""
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= 2 * len(rows):
        return np.asarray(array[first:last])[rows - first]
    return np.asarray(array.oindex[rows])


__all__ = ["AXES", "Source", "compose", "merge", "subset"]
