"""Adds timesteps, sites, conditionings or samples to a store; only what is new is computed.

What is new is first extracted into a store of its own beside the old one, NAME.adding, which a second call resumes.  The two
are then copied into NAME.grown, and that folder takes the old one's name in one step.  The invariants: until that step readers
see the old store whole, and the new store is the one that a single extraction of everything would have made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffprobe import compose, rundir
from diffprobe.compose import Source
from diffprobe.conditioning import NULL
from diffprobe.data import FolderDataset, PartDataset, load_dataset
from diffprobe.data.drawn import spread
from diffprobe.data.labels import label_arrays
from diffprobe.data.samples import Dataset
from diffprobe.encoders import VisionEncoder
from diffprobe.extraction import OPTIONS, extract, image_digests, recorded_model
from diffprobe.layout import COMPLETE, UNREADABLE
from diffprobe.models import DiffusionModel
from diffprobe.rundir import RequestError, StoreError
from diffprobe.sites import select_sites
from diffprobe.store import exists
from diffprobe.units import Index, parse_reduce

_LOOKED_AT = 16  # samples whose pixels are compared where no fingerprint can be


@dataclass
class _Addition:
    """What is added along one axis: how it is extracted, and what the store is afterwards."""

    values: list[Any]
    options: dict[str, Any]
    request: dict[str, Any]
    dataset: Dataset
    ids: list[str]
    labels: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)


def extend(
    path: str | Path,
    *,
    dataset: Dataset | str | None = None,
    sites: Sequence[str] = (),
    maps: Sequence[str] = (),
    timesteps: Sequence[int] = (),
    conditionings: Sequence[str] = (),
    reduce: str = "",
    model: DiffusionModel | VisionEncoder | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    use_safetensors: bool = True,
    batch_rows: int | None = None,
    progress: bool = True,
) -> dict[str, list[Any]]:
    """Adds to a store; the same call again goes on where it was stopped.

    Values equal those of one extraction of the whole as far as two extractions do: bit for bit where batches are of equal size.

    Args:
        dataset: the samples of the store and more, in any order; the new store has its order.
        sites, maps, timesteps, conditionings: as for `extract`; what the store has already is left out.
        reduce: the rule of the new sites; that of the store's sites by default, if they have one.
        model: used in place of the one that the store names; its weights must be equal.

    Returns:
        What was added, by axis.

    Raises:
        ValueError: model or samples are not the store's, or an extension of something else was left unfinished.

    >>> extend("runs/demo.zarr", timesteps=[750])  # doctest: +SKIP
    {'timesteps': [750]}
    """
    place = rundir.locate(path)
    if isinstance(place, str):
        raise StoreError(
            f"{path} is a URL, where a store cannot be swapped in one step; extract the new part there and merge the two."
        )
    part, grown = (place.with_name(f"{place.name}.{what}") for what in ("adding", "grown"))
    added: dict[str, list[Any]] = {}
    with rundir.sole_writer(path):
        rundir.undo_exchange(place)
        held = Source.open(path)
        network = recorded_model(held.attributes, model, device, dtype, use_safetensors)
        rundir.check_request(
            path, {n: held.request[n] for n in ("weights", "compute_dtype")},
            {"weights": network.weights_hash(), "compute_dtype": str(network.dtype).removeprefix("torch.")}, "was recorded otherwise:",
        )  # fmt: skip
        if isinstance(network, VisionEncoder) and (timesteps or conditionings or maps):
            raise ValueError(f"{network.model_id} is a vision encoder: it has no timesteps, conditionings or maps to add.")
        given = dataset or str(held.attributes["data"])
        data = load_dataset(given) if isinstance(given, str) else given
        asked = {"samples": data, "sites": (sites, maps, reduce), "timesteps": timesteps, "conditionings": conditionings}
        _clear(held, part, grown)
        for axis in compose.AXES:
            addition = _addition(held, network, data, axis, asked[axis], explicit=dataset is not None)
            if addition is None:
                continue
            _grow(held, network, addition, part, grown, batch_rows, progress)
            rundir.exchange(grown, place)
            added[axis] = addition.values
            held = Source.open(path)
            _clear(held, part, grown)
    return added


def _grow(
    held: Source, network: DiffusionModel | VisionEncoder, addition: _Addition, part: Path, grown: Path, batch_rows: int | None, progress: bool
) -> None:  # fmt: skip
    """Extracts what is new beside the store, and copies both into one."""
    try:
        extract(
            network, addition.dataset, part, **addition.options, unit_samples=int(held.attributes["unit_samples"]),
            batch_rows=batch_rows or int(held.attributes["batch_rows"]), on_nonfinite=held.attributes.get("on_nonfinite", "raise"),
            progress=progress,
        )  # fmt: skip
    except RequestError as error:
        raise RequestError(
            f"Another extension of {held.path} was left unfinished ({error}) Finish it by its own command, or remove {part}."
        ) from None
    new = Source.open(part)
    lost = [
        name
        for name, status in zip(new.ids, new.status, strict=True)
        if status == UNREADABLE and name in held.rows and held.status[held.rows[name]] == COMPLETE
    ]
    if lost:
        raise StoreError(
            f"{len(lost)} samples that are complete in {held.path} could not be recorded now, such as {lost[0]!r}; the store is as it "
            f"was. 'diffprobe repair {part} --retry-unreadable' tries them again, and the same command then goes on."
        )
    whole = held.request | addition.request
    if exists(grown) and any(Source.open(grown, finished=False).request[name] != whole[name] for name in addition.request):
        shutil.rmtree(grown)  # of another extension; nothing is lost, for it was a copy
    attributes = held.attributes | {"request": whole} | addition.attributes
    compose.compose([held, new], grown, attributes, addition.ids, addition.labels, progress=progress)


def _clear(held: Source, *beside: Path) -> None:
    """Removes what an extension leaves: the old store, and the part that the new one has."""
    for left in beside:
        if exists(left):
            found = Source.open(left, finished=False)
            if all(set(found.along(axis)) <= set(held.along(axis)) for axis in compose.AXES):
                shutil.rmtree(left)


def _addition(
    held: Source, network: DiffusionModel | VisionEncoder, data: Dataset, axis: str, asked: Any, explicit: bool
) -> _Addition | None:
    """What is to be added along one axis; None where the store has it already."""
    request = held.request
    options = {name: request[name] for name in OPTIONS} | {"resolution": tuple(request["resolution"])}
    options["map_tokens"] = len(request["map_tokens"]) if request["maps"] else held.attributes["map_tokens_rule"]
    addition = _Addition([], options, {}, data, held.ids, held.labels())
    if axis == "samples":
        return _more_samples(held, data, addition, explicit)
    if axis == "sites":
        return _more_sites(held, network, addition, *asked)
    addition.values = [value for value in dict.fromkeys(asked) if value not in request[axis]]
    if not addition.values:
        return None
    options[axis] = addition.values
    if axis == "conditionings" and request["guidance"]:
        options[axis] = [NULL, *addition.values]  # guided features are made of it before it is rounded
    addition.request = {axis: [*request[axis], *addition.values]}
    return addition


def _more_sites(
    held: Source, network: DiffusionModel | VisionEncoder, addition: _Addition, sites: Sequence[str], maps: Sequence[str], reduce: str
) -> _Addition | None:  # fmt: skip
    request, every = held.request, network.sites
    kinds = {"sites": [s for s in every if not s.is_map], "maps": [s for s in every if s.is_map]}
    chosen = {
        kind: [s for s in select_sites(kinds[kind], names) if s.name not in request[kind]] if names else []
        for kind, names in (("sites", sites), ("maps", maps))
    }
    addition.values = [site.name for found in chosen.values() for site in found]
    if not addition.values:
        return None
    rules = set(request["reduce"].values())
    if chosen["sites"] and not reduce and len(rules) > 1:
        raise ValueError(
            f"The sites of {held.path} are reduced by {', '.join(sorted(rules))}; say by --reduce how the new ones are."
        )
    rule = parse_reduce(reduce or next(iter(rules), "none"), chosen["sites"])
    order = {site.name: number for number, site in enumerate(every)}
    addition.options |= {kind: [site.name for site in found] for kind, found in chosen.items()} | {"reduce": rule}
    for kind in chosen:
        addition.request[kind] = sorted([*request[kind], *addition.options[kind]], key=order.__getitem__)
    reduced = request["reduce"] | rule
    addition.request["reduce"] = {name: reduced[name] for name in addition.request["sites"]}
    return addition


def _more_samples(held: Source, data: Dataset, addition: _Addition, explicit: bool) -> _Addition | None:
    request = held.request
    if data.fingerprint() == request["fingerprint"]:
        return None
    if not explicit:
        raise ValueError(
            f"{held.attributes['data']!r} is no longer what {held.path} was recorded from. If images were added there, add them "
            f"to the store first: diffprobe extend {held.path} --data {held.attributes['data']!r}."
        )
    index = Index.of(data, request["conditionings"], range(len(data)))
    rows = {name: row for row, name in enumerate(index.ids)}
    if gone := [name for name in held.ids if name not in rows]:
        raise ValueError(
            f"{data.spec!r} lacks {len(gone)} samples of {held.path}, such as {gone[0]!r}; it must have them all, and more."
        )
    old = [rows[name] for name in held.ids]
    _check_unchanged(held, data, old)
    texts = held.prompts()["text"]
    for column, name in enumerate(request["conditionings"]):
        now = ["" if text is None else text for text in (index.prompts[name][row] for row in old)]
        if now != texts[:, column].tolist():
            raise ValueError(
                f"With the new samples, the conditioning {name!r} gives old ones another text, for it takes texts from the whole "
                "dataset; extract the larger dataset into a new store."
            )
    addition.values = [name for name in index.ids if name not in held.rows]
    if not addition.values:
        raise ValueError(
            f"{data.spec!r} has the samples of {held.path} and no others, and yet another content: are labels or captions other?"
        )
    addition.dataset = PartDataset(data, [rows[name] for name in addition.values])
    addition.request = {"dataset": data.name, "fingerprint": data.fingerprint(), "samples": len(data)}
    addition.ids, addition.attributes = index.ids, {"data": data.spec}
    addition.labels = label_arrays(index.labels) | image_digests(data)
    return addition


def _check_unchanged(held: Source, data: Dataset, rows: Sequence[int]) -> None:
    """Raises RequestError unless the old samples in the new dataset are those that the store was recorded from.

    A folder's part is compared by its fingerprint.  Of other datasets the one that the store names is, and some pixels.
    """
    fingerprint = held.request["fingerprint"]
    if isinstance(data, FolderDataset):
        same = data.only(held.ids).fingerprint() == fingerprint
    else:
        old = load_dataset(held.attributes["data"])
        same = old.fingerprint() == fingerprint
        for place in spread(len(rows))[:: max(1, len(spread(len(rows))) // _LOOKED_AT)] if same else ():
            then, now = old[place], data[rows[place]]
            same &= then.id == now.id and np.array_equal(np.asarray(then.load()), np.asarray(now.load()))
    if not same:
        raise RequestError(
            f"Samples of {held.path} are not the same in {data.spec!r}: an image or its text was changed. Extract them into a new store."
        )
