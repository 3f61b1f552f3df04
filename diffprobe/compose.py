"""Stores made of stores: merged from disjoint parts, or cut down to one; needs no torch.

A store runs along four axes: samples, sites, timesteps, conditionings.  Merged stores differ along exactly one of them.  The
invariant: every value, status, prompt and label is copied as it is, so a merged store holds what one extraction of the whole
would hold.  Copying goes unit by unit; a killed copy is an unfinished store, which the same call finishes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from diffprobe import layout
from diffprobe.conditioning import ACROSS, NULL, guided_name
from diffprobe.console import Console, size_text
from diffprobe.data.join import joined_fingerprint
from diffprobe.data.samples import did_you_mean, join_spec
from diffprobe.rundir import RequestError, StoreError, check_request, free_bytes, request_differences, sole_writer
from diffprobe.store import LEVELS, ArraySpec, StoreWriter, create_store, exists, known

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
    _coordinates: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    @classmethod
    def open(cls, path: str | Path, finished: bool = True) -> Source:
        """Opens a store.

        Raises:
            StoreError: it is damaged, or has to be `finished` and is not.
        """
        root = layout.open_group(path, "r")
        attributes = layout.attributes_of(root, path)
        layout.check_layout(root, path, lambda key: True)
        status, units = layout.recorded(root, int(attributes["unit_samples"]))
        if finished and (number := int((status == layout.PENDING).sum())):
            raise StoreError(
                f"{path} has {number} pending samples; finish it with the command that began it, or 'diffprobe repair {path}'."
            )
        whole = zarr.open_group(layout.Present(root.store, units), mode="r", zarr_format=3)
        return cls(str(path), whole, attributes, [str(name) for name in layout.read_array(root, "sample")], status)

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
        return {name: layout.read_array(self.root, name) for name in sorted(set(self.root.array_keys()) - _OF_NO_UNIT)}

    def prompts(self) -> dict[str, NDArray[Any]]:
        """`text` (sample, conditioning) and the tokens (sample, conditioning, token)."""
        return {
            name: layout.read_array(self.root, f"prompts/{name}") for name in ("text", "token_id", "token_start", "token_end")
        }

    def coordinate(self, site: str, name: str) -> list[Any]:
        path = f"{site}/{name}"
        if path not in self._coordinates:
            self._coordinates[path] = layout.read_array(self.root, path).tolist()
        return self._coordinates[path]


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
    first = sources[0]
    axes = {_axis(first, other) for other in sources[1:]}
    if len(axes) > 1:
        raise StoreError(f"The stores differ in {' and '.join(sorted(axes))}; merge along one of them at a time.")
    (axis,) = axes
    for number, source in enumerate(sources):
        for other in sources[:number]:
            there = set(other.along(axis)) - ({NULL} if axis == "conditionings" else set())
            if shared := [value for value in source.along(axis) if value in there]:
                raise StoreError(
                    f"{other.path} and {source.path} share {len(shared)} of their {axis}, such as {shared[0]!r}; "
                    "'diffprobe subset' takes a part of one."
                )
    requests = [source.request for source in sources]
    attributes = first.attributes | {"merged": [source.path for source in sources]}
    ids, labels, whole = first.ids, first.labels(), dict(first.request)
    if axis == "samples":
        if across := [name for name in whole["conditionings"] if name in ACROSS]:
            raise StoreError(
                f"The texts of {across[0]!r} come from a whole dataset, so its parts cannot be joined; take the other conditionings "
                "with 'diffprobe subset'."
            )
        ids = [name for source in sources for name in source.ids]
        labels = _joined_labels([source.labels() for source in sources], [len(source.ids) for source in sources])
        attributes["data"] = join_spec("join", "", {f"part{n}": s.attributes["data"] for n, s in enumerate(sources)})
        whole |= {"dataset": "+".join(r["dataset"] for r in requests), "samples": len(ids)}
        whole["fingerprint"] = joined_fingerprint([request["fingerprint"] for request in requests])
    else:
        for name in ("sites", "maps") if axis == "sites" else (axis,):
            whole[name] = list(dict.fromkeys(value for request in requests for value in request[name]))
        whole["reduce"] = {site: rule for request in requests for site, rule in request["reduce"].items()}
    with sole_writer(out):
        compose(sources, out, attributes | {"request": whole}, ids, labels, progress=progress)
    return axis


def _axis(one: Source, other: Source) -> str:
    """The axis along which two stores differ.

    Raises:
        StoreError: they differ along more, or nowhere.
        RequestError: they differ in something else, which the message lists.
    """
    differing = [axis for axis in AXES if one.along(axis) != other.along(axis)]
    if len(differing) != 1:
        what = "differ in their " + " and ".join(differing) if differing else f"have the same {', '.join(AXES)}"
        raise StoreError(f"{one.path} and {other.path} {what}; stores can be merged that differ in exactly one of these.")
    left, right = one.request, other.request
    free = AXES[differing[0]]
    free += ("model", "revision") if left["weights"] == right["weights"] else ()  # a folder may have been moved
    free += ("dataset",) if left["fingerprint"] == right["fingerprint"] else ()
    free += () if left["maps"] or right["maps"] else ("map_tokens",)
    kept, asked = ({k: v for k, v in request.items() if k not in free} for request in (left, right))
    if differences := request_differences(kept, asked, (f"{one.path} has", f"{other.path} has")):
        raise RequestError(f"{one.path} and {other.path} cannot be merged: {'; '.join(differences)}.")
    return differing[0]


def _joined_labels(labels: Sequence[dict[str, NDArray[Any]]], counts: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The labels of all samples: where a store lacks one, NaN among numbers and "" among texts."""
    joined = {}
    for name in dict.fromkeys(name for own in labels for name in own):
        numbers = all(own[name].dtype.kind in "if" for own in labels if name in own)
        nothing: Any = np.nan if numbers else ""
        parts = [own.get(name, np.full(n, nothing, None if numbers else object)) for own, n in zip(labels, counts, strict=True)]
        if name == "content_digest" and not all(name in own for own in labels):
            continue  # no label: a hash of each image, which joined datasets have if all of them do
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
        where: label: value; a sample has to have all of them.
        limit: the first so many of the samples that are left.

    Returns:
        The number of samples.

    Raises:
        StoreError: the store lacks something that is asked for, or nothing is left.
    """
    source = Source.open(path)
    request, labels = source.request, source.labels()
    wanted = set(samples) or set(source.ids)
    if unknown := sorted(wanted - set(source.ids)):
        raise StoreError(f"{path} has no sample {unknown[0]!r}.{did_you_mean(unknown[0], source.ids)}")
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
            if absent := [value for value in values if value not in request[axis]]:
                raise StoreError(f"{path} has no {absent[0]!r} among its {axis}; it has {', '.join(map(str, request[axis]))}.")
            part[axis] = [value for value in request[axis] if value in values]
    part["reduce"] = {site: rule for site, rule in request["reduce"].items() if site in chosen}
    part["samples"] = len(ids)
    if len(ids) < len(source.ids):
        part["fingerprint"] = hashlib.sha256(repr((request["fingerprint"], ids)).encode()).hexdigest()[:16]
    rows = [source.rows[name] for name in ids]
    labels = {name: values[rows] for name, values in labels.items()}
    with sole_writer(out):
        compose([source], out, source.attributes | {"request": part}, ids, labels, progress=progress)
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
        first = layout.site_array(sources[0].root, sources[0].sites[0])
        create_store(
            out, attributes=attributes, sample_ids=ids, labels=labels, timesteps=request["timesteps"], prompts=prompts,
            conditionings=request["conditionings"], tokens=request["map_tokens"], specs=specs, unit_samples=int(attributes["unit_samples"]),
            dtype=request["store_dtype"], compress="zstd" in str(first.metadata.to_dict()["codecs"]),
            levels=_levels(sources, request["timesteps"]),
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
        array, told = layout.site_array(having[0].root, site), having[0].root[site].attrs
        there = {name for source in having for name in source.coordinate(site, "conditioning")}
        dims: Any = array.metadata.dimension_names  # type: ignore[union-attr]
        variable: Any = array.basename
        names = tuple(name for name in [*request["conditionings"], *scales] if name in there)
        own = (site, str(told["path"]), str(told["kind"]), variable)
        specs.append(ArraySpec(*own, tuple(dims[3:]), tuple(array.shape[3:]), names, str(told["reduce"])))
    return specs


def _levels(sources: Sequence[Source], timesteps: Sequence[int]) -> dict[str, NDArray[Any]] | None:
    """The noise of the timesteps, as the sources keep it; None where one was written before stores kept it."""
    held: dict[str, dict[int, float]] = {name: {} for name in LEVELS}
    for source in sources:
        site = source.sites[0]
        for name in LEVELS:
            if name in source.root[site]:  # type: ignore[operator]
                held[name] |= dict(zip(source.coordinate(site, "timestep"), source.coordinate(site, name), strict=True))
    if any(step not in values for values in held.values() for step in timesteps):
        return None
    return {name: np.array([values[step] for step in timesteps]) for name, values in held.items()}


def _prompts(sources: Sequence[Source], ids: Sequence[str], conditionings: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Texts and tokens of all samples; where one source keeps fewer tokens, padding fills the rest."""
    read = [source.prompts() for source in sources]
    width = max(own["token_id"].shape[2] for own in read)
    shape = (len(ids), len(conditionings))
    padding = sources[0].attributes.get("special_tokens", {}).get("padding", 0)
    joined = {name: np.full((*shape, width), padding if name == "token_id" else 0, np.int32) for name in read[0]}
    joined["text"] = np.full(shape, None, object)
    for source, own in zip(sources, read, strict=True):
        (to, rows), (columns, theirs) = _places(ids, source.rows), _places(conditionings, source.request["conditionings"])
        here, there = np.ix_(to, columns), np.ix_(rows, theirs)
        before, texts = joined["text"][here], own["text"][there].astype(object)
        if (differing := np.argwhere((before != None) & (before != texts))).size:  # noqa: E711
            row, column = differing[0]
            raise StoreError(
                f"{sources[0].path} and {source.path} have different prompts for {ids[to[row]]!r} under "
                f"{conditionings[columns[column]]!r}; they were not made from the same captions."
            )
        joined["text"][here] = texts
        for name in read[0].keys() - {"text"}:
            joined[name][..., : own[name].shape[2]][here] = own[name][there]
    return joined


def _places(wanted: Sequence[Any], there: Sequence[Any] | dict[str, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The places of the values that both have, in either."""
    place = there if isinstance(there, dict) else {value: number for number, value in enumerate(there)}
    pairs = [(number, place[value]) for number, value in enumerate(wanted) if value in place]
    mine, theirs = np.array(pairs, np.intp).reshape(-1, 2).T
    return mine, theirs


def _unit(
    sources: Sequence[Source], specs: Sequence[ArraySpec], ids: Sequence[str], request: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """The arrays and the status of some samples; a sample is complete if it is so in every source."""
    steps, status = request["timesteps"], np.full(len(ids), layout.PENDING, np.uint8)
    arrays = {
        spec.site: np.full((len(ids), len(spec.conditionings), len(steps), *spec.shape), np.nan, request["store_dtype"])
        for spec in specs
    }
    for source in reversed(sources):
        to, rows = _places(ids, source.rows)
        status[to] = np.where(status[to] > layout.COMPLETE, status[to], source.status[rows])
        for spec in specs if len(to) else ():
            if spec.site in source.sites:
                columns, own_columns = _places(spec.conditionings, source.coordinate(spec.site, "conditioning"))
                times, own_times = _places(steps, source.coordinate(spec.site, "timestep"))
                values = _read(layout.site_array(source.root, spec.site), rows)[:, own_columns][:, :, own_times]
                arrays[spec.site][np.ix_(to, columns, times)] = values
    return arrays, status


def _read(array: zarr.Array[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
    """Samples of a site's array; a run of them by one slice, which is read much faster than a list."""
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= 2 * len(rows):
        return np.asarray(array[first:last])[rows - first]
    return np.asarray(array.oindex[rows])
