"""Dataset x conditioning x timestep -> recorder -> store: the request, its forecast, resuming and repairing.

`units.py` computes a unit, one shard of every array.  While one unit is computed, the images of the next are read and the
arrays of the last are written.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from diffprobe import rundir, store
from diffprobe.conditioning import NULL, check_conditioning
from diffprobe.console import Console, duration_text, size_text
from diffprobe.data import load_dataset
from diffprobe.data.files import check_unicode, listed
from diffprobe.data.labels import label_arrays
from diffprobe.data.samples import Dataset
from diffprobe.encoders import VisionEncoder, load_extractor
from diffprobe.forward import NotFiniteError as NotFiniteError
from diffprobe.layout import Request, read_array
from diffprobe.models import DiffusionModel, LatentRule, kept_name
from diffprobe.sites import select_sites
from diffprobe.units import STORE_DTYPES, Index, Policy, Run, array_specs, parse_reduce

_PACKAGES = ("diffprobe", "torch", "diffusers", "transformers", "zarr", "xarray")
TIMESTEPS = (10, 50, 100, 250, 500)
_LOOK_AT = 500  # most samples whose captions a forecast reads


@dataclass(frozen=True)
class Forecast:
    """The cost of a run, before it starts."""

    samples: int
    passes: int
    bytes_by_site: dict[str, int]
    free_bytes: int | None
    seconds: float
    batch_rows: int
    truncated_prompts: int
    looked_at: int  # samples whose captions were read

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_site.values())


@dataclass(frozen=True)
class Summary:
    """The result of a run."""

    path: str
    samples: int
    complete: int
    skipped: dict[str, str]
    seconds: float
    forecast: Forecast | None


def extract(
    model: DiffusionModel | VisionEncoder | str,
    dataset: Dataset | str,
    out: str | Path,
    *,
    sites: str | Sequence[str] = "paper",
    maps: str | Sequence[str] = (),
    heads: Literal["mean", "all"] = "mean",
    map_tokens: Literal["prompt", "all"] | int = "prompt",
    timesteps: Sequence[int] = TIMESTEPS,
    sigmas: Sequence[float] = (),
    log_snr: Sequence[float] = (),
    conditionings: Sequence[str] | None = None,
    guidance: Sequence[float] = (),
    noise_draws: int = 1,
    reduce: str | Sequence[str] | dict[str, str] = "none",
    seed: int = 0,
    resolution: int | tuple[int, int] | None = None,
    fit: Literal["crop", "squash", "pad"] = "crop",
    latent_rule: LatentRule = "mean",
    store_dtype: Literal["float16", "float32"] = "float16",
    batch_rows: int | None = None,
    unit_samples: int | None = None,
    on_nonfinite: Policy = "raise",
    compress: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: bool = True,
    units: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
) -> Summary:
    """Records a dataset's features and attention maps into a store; the same call again resumes it.

    Args:
        model: a loaded model or vision encoder, or an id, folder or embedded name for `load_extractor`.  An encoder has
            only timestep 0 and the conditioning null, which replace those given; its "paper" sites are `VisionEncoder.preset`.
        dataset: a dataset, or a folder or spec for `load_dataset`.
        out: path or fsspec URL of the Zarr store.
        sites, maps: patterns for `select_sites`; either may be empty.
        map_tokens: "prompt" keeps the token positions up to the longest prompt of the run, "all" the padding too, a number
            that many.
        timesteps: training timesteps; 1000 s of a flow.
        sigmas, log_snr: in their place, the noise; the nearest training timestep is taken (`diffprobe.noise.Levels`).
        conditionings: names that `diffprobe.conditioning` explains; by default null and, where there are captions, caption.
        guidance: store f_u + s (f_c - f_u) too, for each s and each conditioning but "null", which must be there.
        noise_draws: average features and maps over this many noise tensors.
        reduce: a rule for all sites, or PATTERN=RULE for some: none, mean, grid:HxW, project:K.
        resolution: image side in pixels, or (height, width); the model's own by default.
        batch_rows: rows of one forward pass; found by timing by default, and kept in the store for resuming.
        unit_samples: samples of one shard; chosen by default so that shards stay near 64 MiB.
        on_nonfinite: "raise", "mark" the sample and go on, or "float32": run the pass again in float32.
        dry_run: forecast only; nothing is written, and at most some hundred captions of a large dataset are read.
        force: go on although the disk's free space is too small for the forecast.
        units: compute only these units of an existing store, finished or not, as `repair` does; each is replaced once its new
            values are known.  Model and dataset may then have other names, but not other content.
        shard: (i, n): compute the i-th of n disjoint parts of the units, i from 1.  The n calls need not know of each other:
            whichever comes first lays the store out, on one machine or several.

    Returns:
        The result. On equal batches, values are bit-identical. With another batch size, order or number of processes they
        differ by one rounding of the store's dtype and, where the model computes in float32, by at most 1e-4 of the site's
        root mean square (4e-5 measured on a CPU); guided features by 1 + 2 |s| times that, maps by 1e-3 of theirs.

    Raises:
        ValueError: the request is not valid, or the store holds another request (the message lists the differences).

    >>> extract("shapes-sd", "shapes:64?split=test", "runs/demo.zarr", maps="cross", timesteps=[50]).complete  # doctest: +SKIP
    64
    """
    started = time.perf_counter()
    console = Console(stderr=True, quiet=not progress)
    log = lambda text: console.print(text)  # noqa: E731
    if sum((tuple(timesteps) != TIMESTEPS, bool(sigmas), bool(log_snr))) > 1:
        raise ValueError("Give one of timesteps, sigmas and log-SNR.")
    dataset = load_dataset(dataset) if isinstance(dataset, str) else dataset
    if conditionings is None:
        conditionings = (NULL, "caption") if getattr(dataset, "captioned", True) else (NULL,)
        if len(conditionings) == 1:
            log(
                f"{dataset.name} has no captions, so that the conditioning is null alone; 'fixed:TEXT' gives all images one text."
            )
    _check_arguments(sigmas or log_snr or timesteps, conditionings, guidance, noise_draws, store_dtype, on_nonfinite, heads)
    model = load_extractor(model) if isinstance(model, str) else model
    if isinstance(model, VisionEncoder):
        if guidance or maps or noise_draws > 1:
            raise ValueError(
                f"{model.model_id} is a vision encoder: it has no guidance, attention maps or noise draws to record."
            )
        given = sites.split(",") if isinstance(sites, str) else sites
        sites = [name for site in given for name in (model.preset if site == "paper" else [site])]
        timesteps, conditionings = (0,), (NULL,)
        log(f"{model.model_id} is a vision encoder: each image once, without noise (timestep 0) and without text (null).")
    else:
        near = [model.levels.nearest(sigma=value) for value in sigmas] + [model.levels.nearest(log_snr=v) for v in log_snr]
        if len(set(near)) < len(near):
            raise ValueError(
                f"Two of these noise levels mean the same timestep of {model.model_id}: {', '.join(map(str, near))}."
            )
        timesteps = near or timesteps
    if shard and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"Shard {shard[0]}/{shard[1]} does not exist; give i/n with i from 1 to n.")
    for timestep in timesteps:
        model.check_timestep(timestep)
    size = model.resolution if resolution is None else resolution
    height, width = (size, size) if isinstance(size, int) else size
    model.latent_size(height, width)  # refuses sides that do not fit
    features = select_sites([s for s in model.sites if not s.is_map], sites) if sites else []
    map_sites = select_sites([s for s in model.sites if s.is_map], maps) if maps else []
    chosen = [s for s in model.sites if s in features or s in map_sites]
    rules = parse_reduce(reduce, features)
    new_forecast = dry_run and not store.exists(out)  # no store's request is compared with this one
    index = Index.of(dataset, conditionings, range(0, len(dataset), -(-len(dataset) // _LOOK_AT) if new_forecast else 1))
    distinct = list(dict.fromkeys(prompt for column in index.prompts.values() for prompt in column))
    parts = [distinct[start : start + 512] for start in range(0, len(distinct), 512)]
    lengths = {prompt: n for part in parts for prompt, n in zip(part, model.tokens(part)[2], strict=True)}  # before cutting
    longest = min(model.prompt_tokens, max(lengths.values()))
    kept_tokens = map_tokens if isinstance(map_tokens, int) else model.prompt_tokens if map_tokens == "all" else longest
    if kept_tokens < longest and map_sites:
        raise ValueError(
            f"The longest prompt has {longest} tokens, and maps of {kept_tokens} are kept; record them with --map-tokens all."
        )
    request = Request(
        model=model.model_id, revision=model.revision, weights=model.weights_hash(), dataset=dataset.name,
        fingerprint="" if new_forecast else dataset.fingerprint(), samples=len(dataset),
        sites=[s.name for s in features], maps=[s.name for s in map_sites], heads=heads,
        map_tokens=list(range(kept_tokens)), timesteps=list(timesteps), conditionings=list(conditionings), guidance=list(guidance),
        noise_draws=noise_draws, reduce=rules, seed=seed, resolution=[height, width], fit=fit, latent_rule=latent_rule,
        compute_dtype=str(model.dtype).removeprefix("torch."), store_dtype=store_dtype,
        network_guidance=getattr(model, "guidance", None),
    )  # fmt: skip
    run = Run(model, dataset, request, index, on_nonfinite, log)
    shapes, seconds_per_row = run.first_pass()
    run.specs = array_specs(chosen, shapes, rules, conditionings, guidance)
    state = PartialState(cpu=model.device.type == "cpu") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    rank, ranks = (state.process_index, state.num_processes) if state else (0, 1)
    job, jobs = shard or (1, 1)
    alone = rundir.sole_writer(out, rank, ranks, dry_run)
    with alone if shard is None else rundir.shard_writer(out, job, rank, ranks, dry_run):
        resuming = store.exists(out)
        if rank == 0 and not resuming and not rundir.is_remote(out) and Path(rundir.locate(out)).exists():
            raise ValueError(f"{out} exists and is not a store; give another --out, or remove it.")
        if resuming:
            found = store.StoreWriter(out)
            _check_resumed(out, found, run, repairs=units is not None, jobs=jobs)
            if rank == 0 and units is None:
                _tell_of_labels(found, index, log)
            batch_rows = batch_rows or int(found.attributes["batch_rows"])
            units = found.pending if units is None else units
        forecast = None
        if rank == 0 and (units is None or units or dry_run):
            if batch_rows:
                run.engine.batch_rows = batch_rows
            else:
                seconds_per_row = run.find_batch(seconds_per_row)
            truncated = sum(length > model.prompt_tokens for length in lengths.values())
            passes, itemsize = len(dataset) * run.rows_per_sample, np.dtype(store_dtype).itemsize
            sizes = {s.site: s.bytes_per_sample(len(timesteps), itemsize) * len(dataset) for s in run.specs}
            forecast = Forecast(
                len(dataset), passes, sizes, rundir.free_bytes(out), seconds_per_row / ranks / jobs * passes, run.engine.batch_rows,
                truncated, len(index.ids),
            )  # fmt: skip
            if not (resuming or dry_run):  # who asked for it alone is given it
                log(describe_forecast(forecast))
            if not (force or resuming or dry_run):
                advice = "Choose fewer sites or timesteps, or --reduce"
                rundir.check_room("The store needs {}", forecast.total_bytes, forecast.free_bytes, advice)
        if dry_run:
            return Summary(str(out), len(dataset), 0, {}, time.perf_counter() - started, forecast)
        if rank == 0 and not resuming:
            even = max(1, len(dataset) // (4 * jobs)) if shard else len(dataset)  # shards of nearly equal work
            size = unit_samples or min(run.unit_samples(), even)
            with contextlib.suppress(rundir.TakenError) if shard else contextlib.nullcontext():
                _lay_out(run, out, size, compress, ranks, jobs)
        elif rank == 0 and shard is None:
            store.clear_cut_writes(out)
        if state:
            state.wait_for_everyone()
        writer = store.StoreWriter(out)
        if shard and not resuming:  # another may have laid it out meanwhile
            made = writer.attributes
            asked = request.plain() | {"shards": jobs}
            rundir.check_request(out, made["request"] | {"shards": made["shards"]}, asked, "was just begun otherwise:")
        run.engine.batch_rows = batch_rows or int(writer.attributes["batch_rows"])
        left = writer.pending if units is None else units
        mine = [unit for unit in left if unit % jobs == job - 1 and unit // jobs % ranks == rank]
        if shard:
            count = -(-len(dataset) // writer.unit_samples)
            log(f"Shard {job} of {jobs}: {len(range(job - 1, count, jobs))} of {count} units.")
        _work(run, writer, mine, console if rank == 0 else Console(quiet=True))
        if state:
            state.wait_for_everyone()
        status = writer.status
    for row in np.flatnonzero((status != store.COMPLETE) & (status != store.PENDING)):
        run.skipped.setdefault(index.ids[row], store.STATUS_WORDS[int(status[row])])  # other processes' or an earlier run's
    complete = int((status == store.COMPLETE).sum())
    return Summary(str(out), len(dataset), complete, run.skipped, time.perf_counter() - started, forecast)


def _check_arguments(
    timesteps: Sequence[float],
    conditionings: Sequence[str],
    guidance: Sequence[float],
    noise_draws: int,
    store_dtype: str,
    policy: str,
    heads: str,
) -> None:
    for what, given in (("Timesteps", timesteps), ("Conditionings", conditionings)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{what} must be given, each once; got {list(given)}.")
    for name in conditionings:
        check_conditioning(name)
        check_unicode("A conditioning", name)
    if guidance and (NULL not in conditionings or len(conditionings) < 2):
        raise ValueError(f"Guidance needs the conditioning 'null' and another one; got {', '.join(conditionings)}.")
    if not all(math.isfinite(scale) for scale in guidance):
        raise ValueError(f"Guidance scales must be finite numbers; got {', '.join(map(str, guidance))}.")
    if noise_draws < 1:
        raise ValueError(f"noise_draws must be at least 1; got {noise_draws}.")
    choices = {
        "store_dtype": (store_dtype, STORE_DTYPES),
        "on_nonfinite": (policy, get_args(Policy)),
        "heads": (heads, ("mean", "all")),
    }
    for name, (chosen, valid) in choices.items():
        if chosen not in valid:
            raise ValueError(f"{name} {chosen!r} is not one of {', '.join(valid)}.")


def _check_resumed(out: str | Path, found: store.StoreWriter, run: Run, repairs: bool, jobs: int) -> None:
    """Raise RequestError unless a store holds what is asked for; a repair may find its model and dataset under other names.

    Shards of another number would share units with those that are at work.
    """
    stored, number = found.attributes["request"], found.attributes.get("shards", 1)
    if jobs not in (1, number):
        raise rundir.RequestError(
            f"{out} was begun in {number} shard(s), and you ask for {jobs}, which would share units with them: "
            + (f"finish it with --shard i/{number}, or " if number > 1 else "finish it ")
            + "by the command without --shard."
        )
    asked = run.request.plain() | ({name: stored[name] for name in ("model", "revision", "dataset")} if repairs else {})
    another = "holds another request; give another --out, or match it."
    fault = "was recorded otherwise; nothing was changed in it:" if repairs else another
    if stored["fingerprint"] != asked["fingerprint"] and (changed := _changed_samples(found.root, run)):
        fault += f" Of the samples: {listed(changed)}. All that differs:"
    kept = stored | {"model": kept_name(stored["model"])}
    if stored["weights"] != asked["weights"]:  # adapters, which say more than a hash
        kept["loading"], asked["loading"] = found.attributes.get("loading", {}), getattr(run.model, "loading", {})
    rundir.check_request(out, kept, asked, fault)


def image_digests(dataset: Dataset) -> dict[str, NDArray[Any]]:
    """A hash of each sample's image as an array of the store, where the dataset has them."""
    digests = getattr(dataset, "image_digests", None)
    return {} if digests is None else {store.CONTENT: np.array([text[:16] for text in digests], object)}


def _changed_samples(root: Any, run: Run) -> list[str]:
    """What a store's samples, their images and prompts are, and those of a run are not; empty where that cannot be told."""
    index, rows = run.index, {name: row for row, name in enumerate(run.index.ids)}
    kept = read_array(root, "sample").tolist()
    texts, named = read_array(root, "prompts/text"), read_array(root, "prompts/conditioning").tolist()
    images = read_array(root, store.CONTENT) if store.CONTENT in root else np.zeros(0)
    now = image_digests(run.dataset).get(store.CONTENT, np.zeros(0))
    changed = [f"{name!r} is gone" for name in kept if name not in rows]
    changed += [f"{name!r} is new" for name in rows.keys() - set(kept)]
    columns = [(column, name) for column, name in enumerate(named) if name in index.prompts]
    for place, name in enumerate(kept):
        if name not in rows:
            continue
        if len(images) and len(now) and images[place] != now[rows[name]]:
            changed.append(f"{name!r} has another image")
        for column, conditioning in columns:
            new, old = index.prompts[conditioning][rows[name]] or "", str(texts[place, column])
            if new != old:
                changed.append(f"{name!r} has the {conditioning} {new!r}, where the store has {old!r}")
    return changed


def _tell_of_labels(found: store.StoreWriter, index: Index, log: Callable[[str], None]) -> None:
    """Says which labels a store has otherwise: they decide no feature, so that the store is gone on with."""
    now = label_arrays(index.labels)
    same = lambda name: name in found.root and list(map(str, read_array(found.root, name))) == list(map(str, now[name]))  # noqa: E731
    if other := [name for name in now if not same(name)]:
        log(
            f"The store keeps the labels that it was made with; {', '.join(other)} differ now. Probes read yours with "
            "--labels FILE."
        )


def _lay_out(run: Run, out: str | Path, unit_samples: int, compress: bool, ranks: int, jobs: int) -> None:
    """Creates the store with all labels, prompts and tokens; rank 0 does it before the work."""
    request, dataset, model, index = run.request, run.dataset, run.model, run.index
    kept = len(request.map_tokens)
    shape = (len(index.ids), len(request.conditionings))
    text = np.empty(shape, object)
    ids, spans = np.zeros((*shape, kept), np.int32), np.zeros((*shape, kept, 2), np.int32)
    for column, name in enumerate(request.conditionings):
        prompts = index.prompts[name]
        text[:, column] = ["" if p is None else p for p in prompts]
        for start in range(0, len(prompts), 512):
            part = slice(start, start + 512)
            token_ids, token_spans, _ = model.tokens(prompts[part])
            there = min(kept, token_ids.shape[1])
            ids[part, column, :there], spans[part, column, :there] = token_ids[:, :kept], token_spans[:, :kept]
    levels = None
    if isinstance(model, DiffusionModel):
        steps = request.timesteps
        levels = {"sigma": [*map(model.levels.sigma, steps)], "log_snr": [*map(model.levels.log_snr, steps)]}
    store.create_store(
        out,
        attributes={
            "request": request.plain(),
            "data": dataset.spec,
            "map_tokens_rule": "all" if kept == model.prompt_tokens else "prompt",
            "batch_rows": run.engine.batch_rows,
            "processes": ranks,
            "shards": jobs,
            "on_nonfinite": run.on_nonfinite,
            "pipeline": type(model.pipeline).__name__,
            "random_weights": model.random_weights,
            "loading": {} if isinstance(model, VisionEncoder) else model.loading,
            "prediction_type": "vision encoder" if isinstance(model, VisionEncoder) else model.prediction_type,
            "special_tokens": {} if isinstance(model, VisionEncoder) else model.special_tokens(),
            "versions": rundir.package_versions(_PACKAGES),
            "commit": rundir.code_commit(),
        },
        sample_ids=index.ids,
        labels=label_arrays(index.labels) | image_digests(dataset),
        timesteps=request.timesteps,
        prompts={"text": text, "token_id": ids, "token_start": spans[..., 0], "token_end": spans[..., 1]},
        conditionings=request.conditionings,
        tokens=request.map_tokens,
        specs=run.specs,
        unit_samples=unit_samples,
        dtype=request.store_dtype,
        compress=compress,
        company=jobs > 1,
        levels=levels,
    )


def _work(run: Run, writer: store.StoreWriter, units: list[int], console: Console) -> None:
    """Computes and writes units; two more threads read the next unit's images and write the last unit's arrays."""
    bounds = [writer.bounds(u) for u in units]
    with (
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as writing,
        console.progress("extract", "samples", sum(last - first for first, last in bounds)) as advance,
        run.recorder() as recorder,
    ):
        images = [reading.submit(run.load_images, *b) for b in bounds[:1]]
        written: Future[None] | None = None

        for number, (unit, (first, last)) in enumerate(zip(units, bounds, strict=True)):
            loaded = images.pop().result()
            if number + 1 < len(units):
                images.append(reading.submit(run.load_images, *bounds[number + 1]))
            arrays, status = run.compute(recorder, first, loaded)
            advance(last - first)
            if written is not None:
                written.result()  # at most two units are in memory: the one that was computed, the one being written
            written = writing.submit(writer.write_unit, unit, arrays, status)
        if written is not None:
            written.result()


def describe_forecast(forecast: Forecast) -> str:
    """The forecast as text."""
    some = "" if forecast.looked_at == forecast.samples else f" (judged by {forecast.looked_at} of them)"
    lines = [f"{forecast.samples} samples{some}, {forecast.passes} forward passes in batches of {forecast.batch_rows}"]
    lines += [f"  {name:<24} {size_text(size):>10}" for name, size in forecast.bytes_by_site.items()]
    free = "" if forecast.free_bytes is None else f", {size_text(forecast.free_bytes)} free"
    lines.append(f"  {'total':<24} {size_text(forecast.total_bytes):>10}{free}")
    lines.append(f"  about {duration_text(forecast.seconds)} of forward passes")
    if forecast.truncated_prompts:
        where = f" of those {forecast.looked_at}" if some else ""
        lines.append(
            f"  {forecast.truncated_prompts} distinct prompts{where} are longer than the text encoder takes and will be cut"
        )
    return "\n".join(lines)


def repair(
    path: str | Path,
    model: DiffusionModel | VisionEncoder | str | None = None,
    dataset: Dataset | str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    use_safetensors: bool = True,
    on_nonfinite: Policy | None = None,
    retry_unreadable: bool = False,
    progress: bool = True,
) -> tuple[list[store.Fault], Summary | None]:
    """Finds the damaged and unfinished units of a store and computes them again, from the store's own request.

    A unit stays as it is until its new values are known, so a repair that is refused or fails loses nothing.

    Args:
        model, dataset: used in place of those that the store names; their content must be equal.

    Raises:
        ValueError: the content of model or dataset, or the number type, is not the store's.
    """
    writer = store.StoreWriter(path)
    with rundir.sole_writer(path):
        faults = store.verify_store(path)
    request, again = writer.attributes["request"], {fault.unit for fault in faults}
    wanted = {store.PENDING} | ({store.UNREADABLE} if retry_unreadable else set())
    for unit in set(range(-(-request["samples"] // writer.unit_samples))) - again:
        if wanted & set(writer.unit_status(unit).tolist()):
            again.add(unit)
    if not again:
        return faults, None
    summary = extract(
        recorded_model(writer.attributes, model, device, dtype, use_safetensors),
        dataset or writer.attributes["data"],
        path,
        **{name: request[name] for name in OPTIONS},
        resolution=tuple(request["resolution"]),
        map_tokens=writer.attributes["map_tokens_rule"],
        on_nonfinite=on_nonfinite or writer.attributes.get("on_nonfinite", "raise"),
        progress=progress,
        units=sorted(again),
    )
    return faults, summary


def recorded_model(
    attributes: Mapping[str, Any],
    model: DiffusionModel | VisionEncoder | str | None,
    device: str | None,
    dtype: str | None,
    use_safetensors: bool,
) -> DiffusionModel | VisionEncoder:
    """The model that a store was recorded with, or the one that is given in its place."""
    if model is not None and not isinstance(model, str):
        return model
    request = attributes["request"]
    return load_extractor(
        model or request["model"], device, dtype or request["compute_dtype"], None if model else request["revision"],
        use_safetensors=use_safetensors, random_weights=attributes.get("random_weights"),
        guidance=request.get("network_guidance"), **attributes.get("loading", {}),
    )  # fmt: skip


OPTIONS = (  # of `extract`, which a store's request has by the same name
    "sites", "maps", "heads", "timesteps", "conditionings", "guidance", "noise_draws", "reduce", "seed", "fit", "latent_rule",
    "store_dtype",
)  # fmt: skip
