"""Commands that record a store and look after it, and those of the installation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal

import typer

from diffprobe.cli import options as shared
from diffprobe.cli.entry import HELP, KEEP, RECORD, app, zoo_app
from diffprobe.cli.options import argument, completes, option, say, say_next, several, show

COMPLETED = {"autocompletion": completes(shared.model_sites)}
NotFinite = Literal["raise", "mark", "float32"]
CONDITIONINGS = "null, caption[:N|:STYLE], question[:N], mismatched, hard, words, fixed:TEXT."


@app.command(rich_help_panel=RECORD)
def sites(
    model: str = argument("shapes-sd", "Hub id, folder, or embedded name; only its config is read."),
    resolution: int | None = option(None, "Image side in pixels; the model's own by default."),
    pattern: str = option("*", "Only sites that match this name, path, glob or preset."),
    revision: str | None = shared.REVISION,
) -> None:
    """List the places of a model that can be recorded."""
    from diffprobe.models import load_network_config, sites_of, stated_size
    from diffprobe.recorder import site_shapes
    from diffprobe.sites import select_sites

    network, factor, tokens = load_network_config(model, revision)
    size = (resolution // factor,) * 2 if resolution else stated_size(network, model)
    chosen = select_sites(sites_of(network), pattern)
    shapes = site_shapes(network, size, tokens)
    rows = []
    for site in chosen:
        shape = shapes[site.name]
        path = site.path or ("(input)" if site.kind == "input" else "(output)")
        place = f"{shape[1]} tokens" if site.over_tokens else " x ".join(map(str, shape[-2:]))
        rows.append({"site": site, "path": path, "channels": f"{shape[0]}{' heads' * site.is_map}", "place": place})
    columns = {"name": "{site.name}", "path": "{path}", "kind": "{site.kind}", "channels": "{channels}"}
    show(rows, columns | {"height x width": "{place}"})


@app.command(rich_help_panel=RECORD)
@shared.in_panels(
    what="data sites maps heads map_tokens timesteps sigmas log_snr conditioning guidance noise_draws reduce seed resolution fit latent_rule",
    where="out store_dtype compress",
    how="model variant lora config revision random_weights network_guidance allow_pickle device dtype batch_rows on_nonfinite",
    start="shard dry_run force",
)
def extract(
    out: str = option(..., "The store: a path or an fsspec URL. The same command resumes it.", "--out", "-o"),
    model: str = shared.MODEL,
    data: str = option("shapes:256?split=test", "A folder of images, or shapes:N (?split=, seed=, objects=).", "--data", "-d"),
    sites: list[str] = several(
        ["paper"], "Names, paths, globs, presets (paper, blocks), or Noised-Latent; '' for none.", **COMPLETED
    ),
    maps: list[str] = several([], "Attention maps likewise (presets: cross, self, joint).", **COMPLETED),
    heads: Literal["mean", "all"] = option("mean", "A map's heads: averaged or kept."),
    map_tokens: Literal["prompt", "all"] = option("prompt", "Positions up to the longest prompt, or with the padding."),
    timesteps: list[int] = several([10, 50, 100, 250, 500], "Training timesteps.", "--timesteps", "-t"),
    sigmas: list[float] = several([], "Instead: noise over signal (a flow: s), nearest timesteps."),
    log_snr: list[float] = several([], "Instead: log-SNR, the axis that all families share."),
    conditioning: list[str] = option(
        [], CONDITIONINGS, "--conditioning", "-c", show_default="null, caption (where there are any)"
    ),
    guidance: list[float] = several([], "Store f_u + s (f_c - f_u) for these s too, such as 1.5,4."),
    noise_draws: int = option(1, "Average over this many noise tensors."),
    reduce: list[str] = option(["none"], "none, mean, grid:HxW or project:K; or PATTERN=RULE. May be repeated."),
    seed: int = option(0, "Seed of the noise."),
    resolution: str = option("", "Image side, or HEIGHTxWIDTH, in pixels; the model's own when empty."),
    fit: Literal["crop", "squash", "pad"] = option("crop", "How images that do not have that shape are fitted."),
    latent_rule: Literal["mean", "mode", "sample"] = option("mean", "What of the image encoder's distribution is taken."),
    device: str | None = shared.DEVICE,
    dtype: str = option("auto", "The model's number type: auto, float32, float16, bfloat16."),
    store_dtype: Literal["float16", "float32"] = option("float16", "The store's number type."),
    batch_rows: int | None = option(None, "Rows of one forward pass; found by timing by default.", min=1),
    on_nonfinite: NotFinite = option("raise", "Stop, mark the sample and go on, or run the pass again in float32."),
    compress: bool = option(False, "Compress with zstd (for maps; features gain little).", "--compress"),
    revision: str | None = shared.REVISION,
    allow_pickle: bool = shared.ALLOW_PICKLE,
    variant: str | None = shared.VARIANT,
    lora: list[str] = shared.LORA,
    config: str | None = shared.CONFIG,
    random_weights: int | None = option(None, "Draw the network's weights from this seed, as a baseline.", metavar="SEED"),
    shard: str | None = option(None, "Compute part i of n, as 3/8; n independent jobs write one store.", metavar="i/n"),
    network_guidance: float | None = option(None, "Guidance as an input of Flux or LCM; else their own."),
    dry_run: bool = shared.DRY_RUN,
    force: bool = shared.FORCE,
) -> None:
    """Record features and attention maps into a store.

    Lists may be repeated, or parted by commas: -t 50 -t 500 is -t 50,500.
    """
    from diffprobe.conditioning import parse_conditionings
    from diffprobe.data import load_dataset
    from diffprobe.encoders import load_extractor
    from diffprobe.extraction import describe_forecast
    from diffprobe.extraction import extract as run

    conditionings = [one for text in conditioning for one in parse_conditionings(text)]
    sides = shared.numbers(resolution.split("x"), int, "--resolution")
    if len(sides) > 2:
        raise ValueError(f"--resolution takes one side or HEIGHTxWIDTH; got {resolution!r}.")
    part = shared.numbers((shard or "").split("/"), int, "--shard")
    if shard and len(part) != 2:
        raise ValueError(f"--shard takes i/n, such as 3/8 for the third of eight jobs; got {shard!r}.")
    dataset = load_dataset(data)
    summary = run(
        load_extractor(
            model, device, dtype, revision, use_safetensors=not allow_pickle, random_weights=random_weights, variant=variant,
            loras=lora, config=config, guidance=network_guidance,
        ), dataset, out, sites=sites, maps=maps, heads=heads, map_tokens=map_tokens,
        timesteps=timesteps, sigmas=sigmas, log_snr=log_snr, conditionings=conditionings or None,
        guidance=guidance, noise_draws=noise_draws, reduce=reduce, seed=seed,
        resolution=None if not sides else (sides[0], sides[-1]), fit=fit, latent_rule=latent_rule, store_dtype=store_dtype,
        batch_rows=batch_rows, on_nonfinite=on_nonfinite, compress=compress, dry_run=dry_run, force=force,
        shard=(part[0], part[1]) if shard else None,
    )  # fmt: skip
    if not shared.is_first_process():
        return
    if dry_run:
        assert summary.forecast is not None
        say(describe_forecast(summary.forecast))
        return
    say(f"{summary.complete} of {summary.samples} samples are in {out} ({summary.seconds:.1f} s).")
    _say_skipped(summary.skipped)
    say_next(["info", out], *_uses(out))


def _say_skipped(skipped: dict[str, str]) -> None:
    for name, reason in list(skipped.items())[:10]:
        say(f"  left out {name}: {reason}")
    if len(skipped) > 10:
        say(f"  and {len(skipped) - 10} more")


def _uses(out: str) -> list[list[str]]:
    """The commands that can be typed next, by what is in the store: grids to draw, a label to read, words to find."""
    from diffprobe.store import open_store, provenance, sample_labels, site_names, word_sites

    tree = open_store(out)
    if tree.sizes["sample"] == 0:
        return []
    recorded = [tree[name].to_dataset() for name in site_names(tree)]
    read = [d["features"] for d in recorded if "features" in d]
    grids = [features for features in read if {"y", "x"} <= set(features.dims) and features.sizes["channel"] >= 3]
    lines, root = [], tree.to_dataset()
    labels = sample_labels(root) if read else []
    for label in sorted(labels, key=lambda name: (name == "split", name != "colour")):
        counts = Counter(str(value) for value in root[label].values)
        # Enough of two classes for every fold of a probe; a missing entry is no class.
        if sum(n >= 5 for value, n in counts.items() if value not in ("", "nan")) >= 2:
            lines.append(["probe", "linear", out, "--label", label])
            break
    first = tree["prompts"].to_dataset()["text"].values[0]
    texts = dict(zip(provenance(tree)["request"]["conditionings"], map(str, first), strict=True))
    if grids:
        lines.append(["plot", "pca", out, *_other("null", texts)])
    if word_sites(tree):
        from diffprobe.figures import words_of  # with matplotlib, which takes a while

        worded = [c for c, text in texts.items() if c != "null" and words_of(text)]
        lines += [["plot", "heatmaps", out, *_other("caption", worded)]] if worded else []
    return lines


def _other(usual: str, there: Iterable[str]) -> list[str]:
    """The option that names a conditioning where the usual one is not there."""
    return [] if usual in there else ["--conditioning", next(iter(there))]


@app.command(rich_help_panel=KEEP)
def info(
    store: str = shared.STORE,
) -> None:
    """Say what a store holds and where it came from."""
    from diffprobe.store import STATUS_WORDS, UNREADABLE, store_info

    found = store_info(store)
    request = found["request"]
    say(f"{store}: format {found['format_version']}, {found['bytes_on_disk'] / 1e6:.1f} MB on disk")
    say(f"{found['samples']} samples: {', '.join(f'{n} {word}' for word, n in found['status'].items())}")
    _say_progress(found)
    drawn = found.get("random_weights")
    say(
        f"model {request['model']} ({found['pipeline']}, {found['prediction_type']}), weights {request['weights']}"
        + ("" if drawn is None else f", drawn at random from seed {drawn}")
        + "".join(
            f", {name} {', '.join([value] if isinstance(value, str) else value)}"
            for name, value in found.get("loading", {}).items()
        )
    )
    say(f"data {request['dataset']} ({request['fingerprint']}), seed {request['seed']}, {request['noise_draws']} noise draw(s)")
    if (given := request.get("network_guidance")) is not None:
        say(f"guidance given to the network {given:g}")
    say(f"timesteps {', '.join(map(str, request['timesteps']))}; conditionings {', '.join(request['conditionings'])}")
    for name, values in found["levels"].items():
        say(f"{name} {', '.join(f'{value:.3g}' for value in values)}")
    rows = [
        site | {"site": name, "axes": " x ".join(f"{d} {n}" for d, n in zip(site["dims"], site["shape"], strict=True)),
                "mb": site["bytes"] / 1e6}
        for name, site in found["sites"].items()
    ]  # fmt: skip
    show(rows, {"site": "{site}", "kind": "{kind}", "dimensions": "{axes}", "size": "{mb:.1f} MB"}, width=160)
    say(f"written with {', '.join(f'{k} {v}' for k, v in found['versions'].items())}; commit {found['commit'] or 'unknown'}")
    if STATUS_WORDS[UNREADABLE] in found["status"]:
        say_next(["repair", store, "--retry-unreadable"])


def _say_progress(found: dict[str, Any]) -> None:
    """The share of an unfinished store that is done, its rate, and the shards that are behind."""
    units, written, step = found["units"], found["written"], found["unit_samples"]
    if len(written) == units:
        return
    times = sorted(mark for mark in written.values() if mark == mark)[-32:]  # of its present pace
    seconds = times[-1] - times[0] if times else 0.0
    rate = f", {(len(times) - 1) * step / seconds:.3g} samples/s" if seconds > 0 else ""
    last = f", the last {_ago(times[-1])}" if times else ""
    say(f"{len(written)} of {units} units done ({len(written) / units:.0%}){rate}{last}")
    shards = found.get("shards", 1)
    own = {shard: range(shard - 1, units, shards) for shard in range(1, shards + 1)} if shards > 1 else {}
    behind = {shard: [u for u in mine if u in written] for shard, mine in own.items() if not set(mine) <= set(written)}
    for shard, there in sorted(behind.items(), key=lambda item: len(item[1]) / len(own[item[0]]))[:10]:
        marks = [written[unit] for unit in there if written[unit] == written[unit]]
        say(
            f"  shard {shard}/{shards}: {len(there)} of {len(own[shard])} units"
            + (f", the last {_ago(max(marks))}" if marks else "")
        )
    if len(behind) > 10:
        say(f"  and {len(behind) - 10} more unfinished shards, which are further")


def _ago(mark: float) -> str:
    return f"{timedelta(seconds=round(max(0.0, time.time() - mark)))} ago"


@app.command(rich_help_panel=KEEP)
def verify(
    store: str = shared.STORE,
) -> None:
    """Check every byte of a store.

    Reads every complete unit: checksums, whole shards, finite values. Exit code 1 when something is wrong.
    """
    from diffprobe.store import store_info, verify_store

    faults = verify_store(store)
    found = store_info(store)
    for fault in faults:
        say(f"unit {fault.unit}, {fault.site}: {fault.reason}")
    if not found["digests"]:
        say("The store is older than digests of its units: units that were swapped or edited cannot be told.")
    pending = found["status"].get("pending", 0)
    say(f"{len(faults)} faults in {found['samples'] - pending} samples; {pending} samples pending.")
    if faults:
        say_next(["repair", store])
        raise typer.Exit(1)


@app.command(rich_help_panel=KEEP)
def repair(
    store: str = shared.STORE,
    model: str | None = option(None, "Instead of the store's own model id."),
    data: str | None = option(None, "Instead of the store's own dataset."),
    device: str | None = shared.DEVICE,
    dtype: str | None = option(None, "The model's number type; that of the store by default."),
    allow_pickle: bool = shared.ALLOW_PICKLE,
    on_nonfinite: NotFinite | None = option(None, "As for extract; what the store was recorded with by default."),
    retry_unreadable: bool = option(False, "Try the images again that could not be read.", "--retry-unreadable"),
) -> None:
    """Compute what is faulty or missing in a store again.

    What is there stays until its new values are known.
    """
    from diffprobe.extraction import repair as mend

    faults, summary = mend(
        store, model, data, device=device, dtype=dtype, use_safetensors=not allow_pickle, on_nonfinite=on_nonfinite,
        retry_unreadable=retry_unreadable,
    )  # fmt: skip
    if summary is None:
        say("Nothing to repair.")
        return
    units = len({fault.unit for fault in faults})
    say(f"{units} faulty units computed again; {summary.complete} of {summary.samples} samples are complete.")
    _say_skipped(summary.skipped)


@app.command(rich_help_panel=KEEP)
def extend(
    store: str = shared.STORE,
    data: str | None = option(None, "A dataset with the store's samples and more, such as its folder, grown.", "--data", "-d"),
    sites: list[str] = several([], "Sites to add, as for extract."),
    maps: list[str] = several([], "Attention maps to add, as for extract."),
    timesteps: list[int] = several([], "Timesteps to add.", "--timesteps", "-t"),
    conditioning: list[str] = option([], "Conditionings to add, as for extract.", "--conditioning", "-c"),
    reduce: str = option("", "The rule of new sites; that of the store's sites by default."),
    model: str | None = option(None, "Instead of the store's own model id."),
    device: str | None = shared.DEVICE,
    dtype: str | None = option(None, "The model's number type; that of the store by default."),
    allow_pickle: bool = shared.ALLOW_PICKLE,
    batch_rows: int | None = option(None, "Rows of one forward pass; as the store was recorded by default.", min=1),
) -> None:
    """Add timesteps, sites, conditionings or samples to a store.

    Only what is new is computed. Until it is there as a whole, the store stays as it is; the same command goes on.
    """
    from diffprobe.conditioning import parse_conditionings
    from diffprobe.extend import extend as run

    added = run(
        store, dataset=data, sites=sites, maps=maps, timesteps=timesteps, reduce=reduce, model=model, device=device, dtype=dtype,
        conditionings=[one for text in conditioning for one in parse_conditionings(text)], use_safetensors=not allow_pickle, batch_rows=batch_rows,
    )  # fmt: skip
    for axis, values in added.items():
        say(f"{len(values)} {axis} were added: {', '.join(map(str, values[:10]))}{', ...' if len(values) > 10 else ''}.")
    if not added:
        say("The store has all of that; nothing was added.")
    say_next(["info", store], *_uses(store))


@app.command(rich_help_panel=KEEP)
def merge(
    stores: list[str] = argument(..., "Two stores or more, which differ in one of these.", "STORE..."),
    out: str = option(..., "The new store. The same command resumes it.", "--out", "-o"),
) -> None:
    """Join stores of other samples, sites or timesteps into one."""
    from diffprobe.compose import merge as run

    say(f"The {run(stores, out)} of {len(stores)} stores are in {out}.")
    say_next(["info", out], *_uses(out))


@app.command(rich_help_panel=KEEP)
def subset(
    store: str = shared.STORE,
    out: str = option(..., "The new store. The same command resumes it.", "--out", "-o"),
    samples: list[str] = several([], "Sample ids."),
    where: list[str] = option([], "LABEL=VALUE that a sample has to have. May be repeated."),
    limit: int | None = option(None, "The first so many samples of those.", min=1),
    sites: list[str] = several([], "Sites by name."),
    timesteps: list[int] = several([], "Timesteps.", "--timesteps", "-t"),
    conditioning: list[str] = several([], "Conditionings.", "--conditioning", "-c"),
) -> None:
    """Copy a part of a store into a new one.

    What is not given is kept whole.
    """
    from diffprobe.compose import subset as run

    if wrong := [text for text in where if "=" not in text]:
        raise ValueError(f"--where takes LABEL=VALUE, such as colour=red; got {wrong[0]!r}.")
    labels = dict(text.split("=", 1) for text in where)
    count = run(
        store, out, samples=samples, where=labels, limit=limit, sites=sites, timesteps=timesteps, conditionings=conditioning
    )  # fmt: skip
    say(f"{count} samples are in {out}.")
    say_next(["info", out], *_uses(out))


@app.command(rich_help_panel=KEEP)
def export(
    store: str = shared.STORE,
    out: str = option(..., "A new file, or a new folder for safetensors and hf.", "--out", "-o"),
    format: Literal["npz", "safetensors", "parquet", "hf"] = option("npz", "hf is a folder for datasets.load_from_disk."),
    sites: list[str] = several([], "Sites by name."),
    timesteps: list[int] = several([], "Timesteps.", "--timesteps", "-t"),
    conditioning: list[str] = several([], "Conditionings.", "--conditioning", "-c"),
) -> None:
    """Write a store for other tools, with ids, labels and prompts.

    What is not given is written whole.
    """
    from diffprobe.export import export as run

    count = run(store, out, format, sites=sites, timesteps=timesteps, conditionings=conditioning)
    say(f"{count} samples are in {out}.")


@app.command(rich_help_panel=HELP)
def doctor(
    as_json: bool = option(False, "As JSON, for a bug report or a script.", "--json"),
) -> None:
    """Say what is installed and reachable, and mend the rest.

    Packages and their versions, devices, models; for what is missing the command that gets it. Exit code 1 when something
    that is needed is missing.
    """
    import json

    from diffprobe.doctor import describe, examine

    found = examine()
    say(json.dumps(found, indent=2) if as_json else describe(found))
    if any(not package["fine"] for package in found["packages"].values()):
        raise typer.Exit(1)


@zoo_app.command("list")
def zoo_list() -> None:
    """The embedded models, what was fetched, and where they lie."""
    from diffprobe.zoo import embedded, smollm2

    for name, folder, size in embedded():
        say(f"{name:<12} {size / 1e6:6.1f} MB  {folder}")
    try:
        say(f"{smollm2.NAME:<12} {'':9}  {smollm2.fetched()}")
    except ValueError as absent:
        say(f"{smollm2.NAME:<12} {'':9}  {absent}")


@zoo_app.command("fetch")
def zoo_fetch(
    name: str = argument(..., "smollm2."),
) -> None:
    """Bring a model that is not shipped into the cache ($DIFFPROBE_CACHE, else ~/.cache/diffprobe), once."""
    from diffprobe.zoo import smollm2

    if name != smollm2.NAME:
        raise ValueError(f"{name!r} cannot be fetched; only {smollm2.NAME} can. Embedded models need no fetching.")
    say(f"{name} lies in {smollm2.fetch()}")
