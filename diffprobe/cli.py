"""The command line: parses, calls one function, says what to type next.

A user's mistake is one sentence on standard error and exit code 2; ``--debug`` before the command shows the traceback.
Heavy libraries are imported inside the commands, so that ``--help`` answers at once and probes run without torch.
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import os
import re
import shlex
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

import diffprobe
from diffprobe.console import Console, visible

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

PANELS = RECORD, KEEP, MEASURE, SHOW, HELP = "Record", "Look after a store", "Measure", "Show", "The installation"


class _Group(TyperGroup):
    """Lists commands in the order of the work; hands an interruption on to `main`, where typer would end without a word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _prepare(self)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        panels = {name: getattr(command, "rich_help_panel", None) for name, command in self.commands.items()}
        return sorted(panels, key=lambda name: PANELS.index(panels[name]) if panels[name] in PANELS else len(PANELS))

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(143 if stop.args else 130) from None
        except Exception as error:
            if isinstance(said := getattr(error, "message", None), str):  # typer's own, which quotes what was typed
                error.message = visible(said)  # type: ignore[attr-defined]
            raise


def _prepare(command: Any) -> None:
    """Help is text, which typer reads as markup; and a URL where a path is meant is refused, which would make a folder "s3:"."""
    for one in (command, *command.params):
        one.help = escape(one.help) if getattr(one, "help", None) else None
    inner = getattr(command, "commands", {})
    for one in inner.values():
        _prepare(one)
    if not inner:
        command.callback = _with_local_paths(command.callback)


def _with_local_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def call(**values: Any) -> Any:
        for path in values.values():
            if isinstance(path, Path) and (found := re.match(r"([a-zA-Z][\w.+-]+):/", path.as_posix())):
                raise ValueError(
                    f"{found[1]}://{path.as_posix()[found.end() :]} is a URL; stores and probes' tables can lie there, this cannot. "
                    "Give a path of this machine."
                )
        return command(**values)

    return call


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Record, probe and reuse what text-to-image diffusion models know.\n\nStart with: diffprobe extract --out runs/first.zarr",
)
probe_app = typer.Typer(no_args_is_help=True, help="Measure what features hold; writes a tidy table.")
plot_app = typer.Typer(no_args_is_help=True, help="Draw a store or a table: NAME.png, .pdf, .csv, .json.")
zoo_app = typer.Typer(no_args_is_help=True, help="The embedded models.")
app.add_typer(probe_app, name="probe", rich_help_panel=MEASURE)
app.add_typer(plot_app, name="plot", rich_help_panel=SHOW)
app.add_typer(zoo_app, name="zoo", rich_help_panel=HELP)
leakage_app = typer.Typer(no_args_is_help=True, help="Do features show the image, or only the prompt?")
app.add_typer(leakage_app, name="leakage", rich_help_panel=MEASURE)
mllm_app = typer.Typer(no_args_is_help=True, help="A language model that sees by CLIP and a diffusion model.")
app.add_typer(mllm_app, name="mllm", rich_help_panel=MEASURE)

_out = Console(soft_wrap=True)
_debug = False


class Heads(StrEnum):
    """How the heads of an attention map are kept."""

    mean = "mean"
    all = "all"


class Kept(StrEnum):
    """Which token positions of a map are kept."""

    prompt = "prompt"
    all = "all"


class Fit(StrEnum):
    """How an image that is not square is brought to the resolution."""

    crop = "crop"
    squash = "squash"
    pad = "pad"


class NotFinite(StrEnum):
    """What to do with values that are not finite."""

    stop = "raise"
    mark = "mark"
    float32 = "float32"


class StoreDtype(StrEnum):
    """Number type of the stored arrays."""

    float16 = "float16"
    float32 = "float32"


class LatentRule(StrEnum):
    """What of the image encoder's distribution is taken."""

    mean = "mean"
    mode = "mode"
    sample = "sample"


Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or embedded name.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the model.")]
StorePath = Annotated[str, typer.Argument(help="A store that 'diffprobe extract' wrote.", metavar="STORE")]
FigureFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the figure's files.")]
FigureName = Annotated[str, typer.Option(help="Name of the figure's files.", show_default="the store's or the table's")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global _debug
    _debug = debug


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, kind: type[int] | type[float], name: str) -> list[Any]:
    try:
        return [kind(part) for part in _list(text)]
    except ValueError:
        example = "10,50,100" if kind is int else "1.5,4"
        raise ValueError(f"{name} takes numbers parted by commas, such as {example}; got {text!r}.") from None


def _next(*lines: str) -> None:
    """Commands that run as they stand."""
    _out.print("Next:")
    for line in lines:
        _out.print(f"  {line}")


def _show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 200).print(table)


# --- recording ------------------------------------------------------------------------------------


@app.command(rich_help_panel=RECORD)
def sites(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or embedded name; only its config is read.")] = "shapes-sd",
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels; the model's own by default.")] = None,
    pattern: Annotated[str, typer.Option(help="Only sites that match this name, path, glob or preset.")] = "*",
    revision: Revision = None,
) -> None:
    """List the places of a model that can be recorded."""
    from diffprobe.models import load_network_config, sites_of, stated_size
    from diffprobe.recorder import site_shapes
    from diffprobe.sites import select_sites

    network, factor, tokens = load_network_config(model, revision)
    size = (resolution // factor,) * 2 if resolution else stated_size(network, model)
    chosen = select_sites(sites_of(network), pattern)
    shapes = site_shapes(network, size, tokens)
    table = Table("name", "path", "kind", "channels", "height x width", box=None, pad_edge=False)
    for site in chosen:
        shape = shapes[site.name]
        channels = f"{shape[0]} heads" if site.is_map else str(shape[0])
        place = f"{shape[1]} tokens" if site.over_tokens else " x ".join(str(n) for n in shape[-2:])
        table.add_row(site.name, site.path or ("(input)" if site.kind == "input" else "(output)"), site.kind, channels, place)
    _show(table)


@app.command(rich_help_panel=RECORD)
def extract(
    out: Annotated[
        str, typer.Option("--out", "-o", help="Where the store goes: a path or an fsspec URL. The same command resumes it.")
    ],
    model: Model = "shapes-sd",
    data: Annotated[
        str, typer.Option("--data", "-d", help="A folder of images, or shapes:N (?split=, seed=, objects=).")
    ] = "shapes:256?split=test",
    sites: Annotated[
        str,
        typer.Option(
            help="Names, paths, globs or presets (paper, blocks), parted by commas; Noised-Latent is the network's own input; empty for none."
        ),
    ] = "paper",
    maps: Annotated[str, typer.Option(help="The same for attention maps (presets: cross, self).")] = "",
    heads: Annotated[Heads, typer.Option(help="Average a map's heads or keep them.")] = Heads.mean,
    map_tokens: Annotated[
        Kept, typer.Option(help="Keep a map's positions up to the longest prompt, or all with the padding.")
    ] = Kept.prompt,
    timesteps: Annotated[
        str, typer.Option("--timesteps", "-t", help="Training timesteps, parted by commas.")
    ] = "10,50,100,250,500",
    conditioning: Annotated[
        str,
        typer.Option(
            "--conditioning", "-c", help="null, caption[:N|:STYLE], question[:N], mismatched, hard, words, fixed:TEXT."
        ),
    ] = "null,caption",
    guidance: Annotated[str, typer.Option(help="Store f_u + s (f_c - f_u) for these s too, such as 1.5,4.")] = "",
    noise_draws: Annotated[int, typer.Option(help="Average over this many noise tensors.")] = 1,
    reduce: Annotated[
        list[str] | None, typer.Option(help="none, mean, grid:HxW or project:K; or PATTERN=RULE. May be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    resolution: Annotated[str, typer.Option(help="Image side, or HEIGHTxWIDTH, in pixels; the model's own when empty.")] = "",
    fit: Annotated[Fit, typer.Option(help="How images that do not have that shape are fitted.")] = Fit.crop,
    latent_rule: Annotated[
        LatentRule, typer.Option(help="What of the image encoder's distribution is taken.")
    ] = LatentRule.mean,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="The model's number type: auto, float32, float16, bfloat16.")] = "auto",
    store_dtype: Annotated[StoreDtype, typer.Option(help="The store's number type.")] = StoreDtype.float16,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="Rows of one forward pass; found by timing by default.")] = None,
    on_nonfinite: Annotated[
        NotFinite, typer.Option(help="Stop, mark the sample and go on, or run the pass again in float32.")
    ] = NotFinite.stop,
    compress: Annotated[bool, typer.Option(help="Compress with zstd (for maps; features gain little).")] = False,
    revision: Revision = None,
    allow_pickle: Annotated[
        bool, typer.Option(help="Load weights that are not safetensors. Pickle files can run code.")
    ] = False,
    random_weights: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Draw the denoising network's weights anew from this seed, as a baseline."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the forecast and stop.")] = False,
    force: Annotated[bool, typer.Option(help="Go on although the forecast does not fit on the disk.")] = False,
) -> None:
    """Record features and attention maps into a store."""
    from diffprobe.conditioning import parse_conditionings
    from diffprobe.data import load_dataset
    from diffprobe.encoders import load_extractor
    from diffprobe.extraction import describe_forecast
    from diffprobe.extraction import extract as run

    conditionings = parse_conditionings(conditioning)
    sides = _numbers(resolution.replace("x", ","), int, "--resolution")
    if len(sides) > 2:
        raise ValueError(f"--resolution takes one side or HEIGHTxWIDTH; got {resolution!r}.")
    steps = _numbers(timesteps, int, "--timesteps")
    scales = _numbers(guidance, float, "--guidance")
    dataset = load_dataset(data)
    summary = run(
        load_extractor(model, device, dtype, revision, use_safetensors=not allow_pickle, random_weights=random_weights), dataset, out,
        sites=_list(sites), maps=_list(maps), heads=heads.value, map_tokens=map_tokens.value, timesteps=steps,
        conditionings=conditionings, guidance=scales, noise_draws=noise_draws, reduce=reduce or "none", seed=seed,
        resolution=None if not sides else (sides[0], sides[-1]), fit=fit.value, latent_rule=latent_rule.value,
        store_dtype=store_dtype.value, batch_rows=batch_rows, on_nonfinite=on_nonfinite.value, compress=compress,
        dry_run=dry_run, force=force,
    )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return
    if dry_run:
        assert summary.forecast is not None
        _out.print(describe_forecast(summary.forecast))
        return
    _out.print(f"{summary.complete} of {summary.samples} samples are in {out} ({summary.seconds:.1f} s).")
    _show_skipped(summary.skipped)
    _next(f"diffprobe info {shlex.quote(out)}", *_uses(out))


def _show_skipped(skipped: dict[str, str]) -> None:
    for name, reason in list(skipped.items())[:10]:
        _out.print(f"  left out {name}: {reason}")
    if len(skipped) > 10:
        _out.print(f"  and {len(skipped) - 10} more")


def _uses(out: str) -> list[str]:
    """The commands that can be typed next, by what is in the store: grids to draw, a label to read, words to find."""
    from diffprobe.store import open_store, provenance, site_names

    tree, place = open_store(out), shlex.quote(out)
    if tree.sizes["sample"] == 0:
        return []
    recorded = [tree[name].to_dataset() for name in site_names(tree)]
    read = [d["features"] for d in recorded if "features" in d]
    grids = [features for features in read if {"y", "x"} <= set(features.dims) and features.sizes["channel"] >= 3]
    lines, root = [], tree.to_dataset()
    labels = [str(name) for name, values in root.coords.items() if values.dims == ("sample",)] if read else []
    for label in sorted(labels, key=lambda name: name != "colour"):
        counts = Counter(str(value) for value in root[label].values)
        # Enough of two classes for every fold of a probe; a missing entry is no class.
        if sum(n >= 5 for value, n in counts.items() if value not in ("", "nan")) >= 2:
            lines.append(f"diffprobe probe linear {place} --label {shlex.quote(label)}")
            break
    first = tree["prompts"].to_dataset()["text"].values[0]
    texts = dict(zip(provenance(tree)["request"]["conditionings"], map(str, first), strict=True))
    if grids:
        lines.append(f"diffprobe plot pca {place}{_other('null', texts)}")
    if any(tree[name].attrs.get("kind") == "cross_map" for name in site_names(tree)):
        from diffprobe.figures import words_of  # with matplotlib, which takes a while

        worded = [c for c, text in texts.items() if c != "null" and words_of(text)]
        lines += [f"diffprobe plot heatmaps {place}{_other('caption', worded)}"] if worded else []
    return lines


def _other(usual: str, there: Iterable[str]) -> str:
    """The option that names a conditioning where the usual one is not there."""
    return "" if usual in there else f" --conditioning {shlex.quote(next(iter(there)))}"


@app.command(rich_help_panel=KEEP)
def info(store: StorePath) -> None:
    """Say what a store holds and where it came from."""
    from diffprobe.store import STATUS_WORDS, UNREADABLE, store_info

    found = store_info(store)
    request = found["request"]
    _out.print(f"{store}: format {found['format_version']}, {found['bytes_on_disk'] / 1e6:.1f} MB on disk")
    states = ", ".join(f"{n} {word}" for word, n in found["status"].items())
    _out.print(f"{found['samples']} samples: {states}")
    _out.print(
        f"model {request['model']} ({found['pipeline']}, {found['prediction_type']}), weights {request['weights']}"
        + ("" if found.get("random_weights") is None else f", drawn at random from seed {found['random_weights']}"),
    )
    _out.print(
        f"data {request['dataset']} ({request['fingerprint']}), seed {request['seed']}, {request['noise_draws']} noise draw(s)",
    )
    _out.print(
        f"timesteps {', '.join(map(str, request['timesteps']))}; conditionings {', '.join(request['conditionings'])}",
    )
    table = Table("site", "kind", "dimensions", "size", box=None, pad_edge=False)
    for name, site in found["sites"].items():
        dims = " x ".join(f"{d} {n}" for d, n in zip(site["dims"], site["shape"], strict=True))
        table.add_row(name, site["kind"], dims, f"{site['bytes'] / 1e6:.1f} MB")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    _out.print(f"written with {versions}; commit {found['commit'] or 'unknown'}")
    if STATUS_WORDS[UNREADABLE] in found["status"]:
        _next(f"diffprobe repair {shlex.quote(store)} --retry-unreadable")


@app.command(rich_help_panel=KEEP)
def verify(store: StorePath) -> None:
    """Check every byte of a store.

    Reads every complete unit: checksums, whole shards, finite values. Exit code 1 when something is wrong.
    """
    from diffprobe.store import store_info, verify_store

    faults = verify_store(store)
    found = store_info(store)
    for fault in faults:
        _out.print(f"unit {fault.unit}, {fault.site}: {fault.reason}")
    if not found["digests"]:
        _out.print("The store is older than digests of its units: units that were swapped or edited cannot be told.")
    pending = found["status"].get("pending", 0)
    _out.print(f"{len(faults)} faults in {found['samples'] - pending} samples; {pending} samples pending.")
    if faults:
        _next(f"diffprobe repair {shlex.quote(store)}")
        raise typer.Exit(1)


@app.command(rich_help_panel=KEEP)
def repair(
    store: StorePath,
    model: Annotated[str | None, typer.Option(help="Instead of the store's own model id.")] = None,
    data: Annotated[str | None, typer.Option(help="Instead of the store's own dataset.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The model's number type; that of the store by default.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option(help="Load weights that are not safetensors. Pickle files can run code.")
    ] = False,
    on_nonfinite: Annotated[
        NotFinite | None, typer.Option(help="As for extract; what the store was recorded with by default.")
    ] = None,
    retry_unreadable: Annotated[
        bool, typer.Option("--retry-unreadable", help="Try the images again that could not be read.")
    ] = False,
) -> None:
    """Compute what is faulty or missing in a store again.

    What is there stays until its new values are known.
    """
    from diffprobe.extraction import repair as mend

    faults, summary = mend(
        store, model, data, device=device, dtype=dtype, use_safetensors=not allow_pickle,
        on_nonfinite=on_nonfinite.value if on_nonfinite else None, retry_unreadable=retry_unreadable,
    )  # fmt: skip
    if summary is None:
        _out.print("Nothing to repair.")
        return
    _out.print(
        f"{len({f.unit for f in faults})} faulty units computed again; {summary.complete} of {summary.samples} samples are complete."
    )
    _show_skipped(summary.skipped)


# --- probing --------------------------------------------------------------------------------------


class Pooling(StrEnum):
    """How the places of a feature map are read."""

    mean = "mean"
    flatten = "flatten"
    patches = "patches"


class Metric(StrEnum):
    """Distance between standardised features."""

    cosine = "cosine"
    euclidean = "euclidean"
    manhattan = "manhattan"


ProbeLabel = Annotated[
    str,
    typer.Option(
        help="Labels to read, parted by commas; 'mask:shape' is what covers each patch. 'diffprobe info' names the store's."
    ),
]
ProbeSites = Annotated[str, typer.Option(help="Sites by name, parted by commas; all features by default.")]
ProbeConditioning = Annotated[str, typer.Option(help="Conditionings, parted by commas; all by default.")]
ProbePool = Annotated[Pooling, typer.Option(help="Average the places, lay them side by side, or read each on its own.")]
ProbeOut = Annotated[
    str, typer.Option("--out", "-o", help="The table (CSV), a path or an fsspec URL.", show_default="beside the store")
]
ProbeSeed = Annotated[int, typer.Option(help="Seed of split, control labels and bootstrap.")]
ProbeJobs = Annotated[int, typer.Option(help="Worker processes, one thread each; -1 is one a core.")]
CrossFit = Annotated[
    bool, typer.Option("--cross-fit", help="Each fold is the test fold once: five times the work and the test rows.")
]


@probe_app.command("linear")
def probe_linear(
    store: StorePath,
    label: ProbeLabel = "colour",
    sites: ProbeSites = "",
    conditioning: ProbeConditioning = "",
    pool: ProbePool = Pooling.mean,
    out: ProbeOut = "",
    seed: ProbeSeed = 0,
    jobs: ProbeJobs = -1,
    penalties: Annotated[str, typer.Option(help="Strengths of the squared norm to choose from.")] = "0.1,1,10,100,1000",
    cross_fit: CrossFit = False,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Ridge in two passes over the store, for those larger than memory.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Fit on this torch device, such as cuda (SCIPY_ARRAY_API=1 must be set).")
    ] = None,
) -> None:
    """Fit a linear probe per site, timestep and conditioning, with its control task."""
    from diffprobe.probes.linear import fit_probe
    from diffprobe.probes.streaming import stream_probe

    options: dict[str, Any] = {"penalties": _numbers(penalties, float, "--penalties"), "seed": seed}
    if streaming and (device or cross_fit):
        raise ValueError("--streaming goes with neither --device nor --cross-fit.")
    if not streaming:
        # A GPU is not shared out between processes.
        options |= {"cross_fit": cross_fit, "device": device, "n_jobs": 1 if device else jobs}
    probe = stream_probe if streaming else fit_probe
    _probe(store, "linear", probe, label, sites, conditioning, pool, out, options, lazy=streaming)


@probe_app.command("knn")
def probe_knn(
    store: StorePath,
    label: ProbeLabel = "colour",
    sites: ProbeSites = "",
    conditioning: ProbeConditioning = "",
    pool: ProbePool = Pooling.mean,
    out: ProbeOut = "",
    seed: ProbeSeed = 0,
    jobs: ProbeJobs = -1,
    k: Annotated[str, typer.Option("--k", "-k", help="Numbers of neighbours to choose from.")] = "5,20",
    metric: Annotated[Metric, typer.Option(help="Distance between features standardised per channel.")] = Metric.cosine,
    cross_fit: CrossFit = False,
) -> None:
    """Read labels off the nearest neighbours per site, timestep and conditioning, with its control task."""
    from diffprobe.probes.knn import knn_probe

    options = {"k": _numbers(k, int, "--k"), "metric": metric.value, "seed": seed, "cross_fit": cross_fit, "n_jobs": jobs}
    _probe(store, "knn", knn_probe, label, sites, conditioning, pool, out, options)


def _table_place(out: str, store: str, name: str) -> str:
    """Where a table goes; asked before the work, so that nothing is lost to a folder that is not there."""
    from diffprobe.store import is_remote

    place = out or f"{store.rstrip('/')}.{name}.csv"
    if place.endswith((".json", "/")) or (not is_remote(place) and Path(place).is_dir()):
        raise ValueError(
            f"--out {place!r} cannot be a table: give a file such as {name}.csv; its origin goes beside it as .json."
        )
    if not is_remote(place):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    return place


def _probe(
    store: str, name: str, probe: Callable[..., Any], label: str, sites: str, conditioning: str, pool: Pooling, out: str,
    options: dict[str, Any], lazy: bool = False,
) -> None:  # fmt: skip
    """Probe a store for labels of samples and of patches, save the table and its origin, show the best rows."""
    import pandas as pd

    from diffprobe.probes.fitting import probe_table, save_table
    from diffprobe.probes.labels import PREFIX, with_mask_labels
    from diffprobe.probes.task import pool_features
    from diffprobe.store import features, open_store, provenance, site_names

    tree = open_store(store)
    target = _table_place(out, store, name)
    names = _list(sites) or [n for n in site_names(tree) if "features" in tree[n].data_vars]
    masks = [x for x in _list(label) if x.startswith(PREFIX)]
    frames = []
    kinds: list[tuple[list[str], Any]] = [([x for x in _list(label) if x not in masks], pool.value), (masks, "patches")]
    for labels, pooling in kinds:
        if not labels:
            continue

        def get(site: str, labels: list[str] = labels, pooling: Any = pooling) -> xr.DataArray:
            found: xr.DataArray = features(tree, site, conditioning=_list(conditioning) or None)
            for one in labels if pooling == "patches" else []:
                found = with_mask_labels(found, tree, one) if one in masks else found
            return found if lazy else pool_features(found, pooling).compute()

        frames.append(probe_table(get, names, labels, probe, pool=pooling, **options))
    frame = pd.concat(frames, ignore_index=True)
    asked = {"probe": name, "label": label, "sites": names, "conditioning": conditioning, "pool": pool.value, **options}
    save_table(frame, target, store, provenance(tree), asked)
    _show_best(frame)
    _out.print(f"{len(frame)} probes in {target}")
    _next(f"diffprobe plot probe {shlex.quote(target)}")


def _show_best(frame: pd.DataFrame) -> None:
    """The best row of each label and conditioning, with its interval, chance and control."""
    table = Table(
        "label",
        "conditioning",
        "best site",
        "timestep",
        "score",
        "95% interval",
        "chance",
        "control",
        "n test",
        box=None,
        pad_edge=False,
    )
    for (label, conditioning), rows in frame.groupby(["label", "conditioning"], sort=False):
        best = rows.iloc[int(rows["value"].to_numpy().argmax())]
        table.add_row(
            str(label), str(conditioning), str(best["site"]), str(best["timestep"]), f"{best['value']:.3f}",
            f"{best['low']:.3f}-{best['high']:.3f}", f"{best['chance']:.3f}", f"{best['control_value']:.3f}", str(best["n_test"]),
        )  # fmt: skip
    _show(table)


@probe_app.command("alignment")
def probe_alignment(
    model: Model = "shapes-sd",
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help="shapes-mmvp:N, shapes-winoground:N, or mmvp-vlm, winoground, sugarcrepe with :FOLDER_OR_ID "
            "(sugarcrepe:FOLDER?images=COCO_FOLDER).",
        ),
    ] = "shapes-mmvp:45",
    scores: Annotated[
        str, typer.Option(help="Parted by commas; also pooled_cosine and clip_cosine. 'all' is every one.")
    ] = "attention_lse_paper,attention_lse_discffusion,denoising_loss,denoising_loss_normalised",
    timesteps: Annotated[str, typer.Option(help="Noise levels, parted by commas.")] = "189,389,589,789,989",
    draws: Annotated[int, typer.Option(min=1, help="Noise tensors at each timestep.")] = 3,
    clip: Annotated[
        str, typer.Option(help="Folder, hub id or embedded name of a CLIP model, for clip_cosine.")
    ] = "shapes-clip",
    site: Annotated[str, typer.Option(help="Site of pooled_cosine.")] = "U-L2-R1-B0-Cross-Q",
    train: Annotated[str, typer.Option(help="Captioned dataset that pooled_cosine learns from.")] = "shapes:600",
    baseline: Annotated[str, typer.Option(help="A score that the others are compared with, item by item.")] = "",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Scores (NetCDF), from which an interrupted run goes on; the table lies beside.")
    ] = Path("runs/alignment.nc"),
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Of noise and bootstrap.")] = 0,
    revision: Revision = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16; auto is float32 on a CPU, else bfloat16.")] = "auto",
) -> None:
    """Match images with texts by the model's own scores, by a benchmark's strict protocol."""
    from diffprobe.data.benchmarks import load_benchmark
    from diffprobe.matching import SCORES, alignment_score
    from diffprobe.models import load_model
    from diffprobe.probes.alignment import alignment_table, compare_scores
    from diffprobe.store import write_whole

    names = list(SCORES) if scores == "all" else _list(scores)
    if baseline and baseline not in names:
        raise ValueError(f"--baseline {baseline!r} is not one of the scores {', '.join(names)}.")
    benchmark = load_benchmark(data)  # before the model: a slip in the spec should not cost a minute
    found = alignment_score(
        load_model(model, device, dtype, revision), benchmark, scores=names, timesteps=_numbers(timesteps, int, "--timesteps"),
        draws=draws, seed=seed, batch_rows=batch_rows, site=site, train=train, clip=clip, out=out,
    )  # fmt: skip
    frame = alignment_table(found, found.attrs["protocol"], seed=seed)
    target = out.with_suffix(".csv")
    write_whole(target, frame.to_csv(index=False))
    table = Table("score", "metric", "share right", "95% interval", "chance", "n", box=None, pad_edge=False)
    for _, row in frame[frame["pattern"] == "all"].iterrows():
        shares = (f"{row['value']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}", f"{row['chance']:.3f}", str(row["n"]))
        table.add_row(row["score"], row["metric"], *shares)
    _show(table)
    if baseline:
        for _, row in compare_scores(found, found.attrs["protocol"], baseline, seed=seed).iterrows():
            _out.print(
                f"{row['score']} - {baseline}, {row['metric']}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], "
                f"p = {row['p']:.2g}, {row['p_holm']:.2g} after Holm",
            )
    _out.print(f"Scores in {out}, every pattern in {target}")


@probe_app.command("similarity")
def probe_similarity(
    store: StorePath,
    between: Annotated[
        str, typer.Option(help="pair (images a and b), conditioning, guidance, timestep, site, or store (with --other).")
    ] = "conditioning",
    other: Annotated[str, typer.Option(help="A second store of the same samples, of another model or encoder.")] = "",
    measures: Annotated[
        str,
        typer.Option(help="cosine, cosine_standardised, cka, cka_biased, mutual_knn; cosines for pairs, CKA else by default."),
    ] = "",
    sites: ProbeSites = "",
    guidance: Annotated[str, typer.Option(help="Scales s to compare with f_u.")] = "1,1.5,4,7",
    conditioning: Annotated[str, typer.Option(help="f_c of the guidance.")] = "caption",
    groups: Annotated[str, typer.Option(help="A label of samples that belong together, such as pair.")] = "",
    pool: Annotated[Pooling, typer.Option(help="A row is the whole map (flatten) or its mean.")] = Pooling.flatten,
    k: Annotated[int, typer.Option("--k", "-k", help="Neighbours of mutual_knn.")] = 10,
    out: ProbeOut = "",
    seed: Annotated[int, typer.Option(help="Of minibatches and bootstrap.")] = 0,
) -> None:
    """Compare features: cosine, CKA, mutual neighbours, each with interval and chance."""
    from diffprobe.probes.fitting import save_table
    from diffprobe.probes.similarity import store_similarity
    from diffprobe.store import open_store, provenance

    tree = open_store(store)
    target = _table_place(out, store, f"similarity-{between}")
    options: dict[str, Any] = {
        "sites": _list(sites), "conditioning": conditioning, "guidance": _numbers(guidance, float, "--guidance"),
        "groups": groups or None, "measures": _list(measures), "pool": pool.value, "k": k, "seed": seed,
    }  # fmt: skip
    frame = store_similarity(tree, between, other=open_store(other) if other else None, **options)
    origin = provenance(tree)
    save_table(frame, target, store, origin, {"probe": "similarity", "between": between, "other": other, **options})
    for reason, rows in frame[frame["reason"] != ""].groupby("reason", sort=False):
        _out.print(f"  {len(rows)} without a value: {reason}")
    _out.print(f"{len(frame)} comparisons of {frame['n'].max()} samples in {target}")
    _next(f"diffprobe plot similarity {shlex.quote(target)}")


@probe_app.command("correspondence")
def probe_correspondence(
    store: StorePath,
    spair: Annotated[
        Path | None,
        typer.Option(help="The folder SPair-71k, for a store of its JPEGImages (--fit squash); else the store's own twins."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of SPair-71k: trn, val, test.")] = "test",
    alpha: Annotated[str, typer.Option(help="Tolerances, in larger sides of the object's box.")] = "0.1",
    sites: ProbeSites = "",
    conditioning: ProbeConditioning = "",
    grid: Annotated[int, typer.Option(help="Rows of the upsampled target map.")] = 96,
    raw: Annotated[bool, typer.Option("--raw", help="Cosines of raw features, not standardised per channel.")] = False,
    by_category: Annotated[bool, typer.Option("--by-category", help="Rows for each category too.")] = False,
    out: ProbeOut = "",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Find keypoints of one image in another by their features: PCK per point and per image, with chance."""
    import pandas as pd

    from diffprobe.data import TwinsDataset, load_dataset
    from diffprobe.data.keypoints import twin_keypoints
    from diffprobe.data.spair import read_spair
    from diffprobe.probes.correspondence import correspondence
    from diffprobe.probes.fitting import save_table
    from diffprobe.store import features, open_store, provenance, site_names

    tree = open_store(store)
    target = _table_place(out, store, "correspondence")
    request = provenance(tree)["request"]
    if spair is not None:
        pairs = read_spair(spair, split, resolution=tuple(request["resolution"]), fit=request["fit"])
    else:
        dataset = load_dataset(provenance(tree)["data"])
        if not isinstance(dataset, TwinsDataset):
            raise ValueError(
                f"Keypoints are known for drawn twins (shapes-winoground:N, shapes-mmvp:N) and SPair-71k; this store holds "
                f"{provenance(tree)['data']!r}. Extract twins, or give --spair."
            )
        pairs = twin_keypoints(dataset)
    names = _list(sites) or [n for n in site_names(tree) if {"y", "x"} <= set(getattr(tree[n].get("features"), "dims", ()))]
    options: dict[str, Any] = {"alphas": _numbers(alpha, float, "--alpha"), "grid": grid, "standardise": not raw, "seed": seed}
    frames = [
        correspondence(features(tree, name, conditioning=_list(conditioning) or None), pairs, by_category=by_category, **options)
        .assign(site=name)
        for name in names
    ]  # fmt: skip
    if not frames:
        raise ValueError(f"{store} has no site with a (y, x) grid; record one with --reduce none.")
    frame = pd.concat(frames, ignore_index=True)
    origin = provenance(tree)
    save_table(
        frame, target, store, origin, {"probe": "correspondence", "split": split if spair else "", "sites": names, **options}
    )
    table = Table("site", "timestep", "conditioning", "alpha", "PCK", "95% interval", "chance", "in the box", "same place", "n",
                  box=None, pad_edge=False)  # fmt: skip
    points = frame[(frame["per"] == "point") & (frame["category"] == "all")].sort_values("value", ascending=False)
    for row in points.head(10).to_dict("records"):
        table.add_row(
            str(row["site"]), str(row.get("timestep", "")), str(row.get("conditioning", "")), f"{row['alpha']:g}", f"{row['value']:.3f}",
            f"{row['low']:.3f}-{row['high']:.3f}", f"{row['chance']:.3f}", f"{row['chance_box']:.3f}", f"{row['position']:.3f}", str(row["n"]),
        )  # fmt: skip
    _show(table)
    _out.print(f"{len(frame)} scores of {len(pairs)} pairs in {target}")


@probe_app.command("localization")
def probe_localization(
    store: StorePath,
    of: Annotated[
        str, typer.Option(help="attention (of a caption's words), or difference (|f_c - f_u| of a text).")
    ] = "attention",
    conditioning: Annotated[
        str, typer.Option(help="The caption whose words are scored; for differences captions and questions, all by default.")
    ] = "",
    data: Annotated[str, typer.Option("--data", "-d", help="The dataset, for its masks; the store's own by default.")] = "",
    sites: ProbeSites = "",
    timesteps: Annotated[str, typer.Option("--timesteps", "-t", help="All by default.")] = "",
    roles: Annotated[str, typer.Option(help="Of words: noun, colour, phrase, background.")] = "noun",
    by_head: Annotated[
        bool, typer.Option("--by-head", help="Each head beside their mean (of a store with --heads all).")
    ] = False,
    out: ProbeOut = "",
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of the halves that thresholds are tuned on.")] = 0,
) -> None:
    """Score maps against masks: pointing game, mass, IoU, ROC-AUC, AP, NSS, each with interval, chance and controls."""
    from diffprobe.probes.fitting import save_table
    from diffprobe.probes.grounding import attention_localization, difference_localization
    from diffprobe.store import open_store, provenance

    tree = open_store(store)
    target = _table_place(out, store, f"localization-{of}")
    steps: list[int] | None = _numbers(timesteps, int, "--timesteps") or None
    shared: dict[str, Any] = {"sites": _list(sites) or None, "timesteps": steps, "seed": seed}
    if of == "attention":
        shared |= {"conditioning": conditioning or "caption", "roles": _list(roles), "by_head": by_head}
        frame = attention_localization(tree, data or None, **shared)
    elif of == "difference":
        shared |= {"conditionings": _list(conditioning) or None}
        frame = difference_localization(tree, data or None, **shared)
    else:
        raise ValueError(f"--of {of!r} is not one of attention, difference.")
    origin = provenance(tree)
    save_table(frame, target, store, origin, {"probe": "localization", "of": of, "left_out": frame.attrs["left_out"], **shared})
    _show_localization(frame)
    for reason, number in frame.attrs["left_out"].items():
        _out.print(f"  left out: {number} {reason}")
    _out.print(f"{len(frame)} scores in {target}")
    _next(f"diffprobe plot localization {shlex.quote(target)}")


def _show_localization(frame: pd.DataFrame) -> None:
    """The best cell of a few scores, with chance and the lead over the control of another word or text."""
    own = str(frame["map"].iloc[0])
    by, control = ("role", "wrong word") if own == "word" else ("conditioning", "other text")
    table = Table(by, "score", "best site", "timestep", "value", "95% interval", "chance", f"lead over {control}", "n",
                  box=None, pad_edge=False)  # fmt: skip
    cell = [by, "score", "site", "timestep", *(["head"] if "head" in frame else [])]
    leads = frame[frame["map"] == control].set_index(cell)[["lead", "lead_low", "lead_high"]]
    mine = frame[(frame["map"] == own) & frame["score"].isin(["pointing", "iou_tuned", "auc"]) & frame["value"].notna()]
    for _, rows in mine.groupby([by, "score"], sort=False):
        best = rows.iloc[int(rows["value"].to_numpy().argmax())]
        lead = leads.loc[tuple(best[name] for name in cell)]
        shown = (
            f"{lead['lead']:+.3f} [{lead['lead_low']:+.3f}, {lead['lead_high']:+.3f}]"
            if lead.notna().all()
            else "none to compare"
        )
        table.add_row(
            str(best[by]), str(best["score"]), str(best["site"]), str(best["timestep"]), f"{best['value']:.3f}",
            f"{best['low']:.3f}-{best['high']:.3f}", f"{best['chance']:.3f}", shown, str(best["n"]),
        )  # fmt: skip
    _show(table)


# --- pictures -------------------------------------------------------------------------------------


def _samples(tree: xr.DataTree, wanted: str, count: int) -> list[int]:
    ids = [str(s) for s in tree.dataset["sample"].values]
    if not wanted:
        return list(range(min(count, len(ids))))
    missing = [name for name in _list(wanted) if name not in ids]
    if missing:
        raise ValueError(f"Sample {missing[0]!r} is not in this store; its first are {', '.join(ids[:3])}.")
    return [ids.index(name) for name in _list(wanted)]


@plot_app.command("pca")
def plot_pca(
    store: StorePath,
    data: Annotated[
        str, typer.Option("--data", "-d", help="The dataset, to show its images; the store's own by default.")
    ] = "",
    sites: Annotated[str, typer.Option(help="Sites by name; all that have a grid by default.")] = "",
    timestep: Annotated[int | None, typer.Option(help="The store's first by default.")] = None,
    conditioning: Annotated[str, typer.Option(help="One conditioning.")] = "null",
    samples: Annotated[str, typer.Option(help="Sample ids, parted by commas.")] = "",
    count: Annotated[int, typer.Option(help="How many samples when none are named.")] = 5,
    out: FigureFolder = Path("figures"),
    name: FigureName = "",
) -> None:
    """First three principal components of the features as colours, one column a site."""
    from diffprobe.figures import pca_figure

    paths = pca_figure(
        store, data, _list(sites), timestep, conditioning, lambda tree: _samples(tree, samples, count), out, name
    )
    _out.print(f"Drew {paths}")


@plot_app.command("heatmaps")
def plot_heatmaps(
    store: StorePath,
    words: Annotated[str, typer.Option(help="Words of the prompt, parted by commas; all its words by default.")] = "",
    data: Annotated[
        str, typer.Option("--data", "-d", help="The dataset, to show its images; the store's own by default.")
    ] = "",
    site: Annotated[str, typer.Option(help="Map sites by name; the mean of all by default.")] = "",
    timestep: Annotated[int | None, typer.Option(help="The store's first by default.")] = None,
    conditioning: Annotated[str, typer.Option(help="One conditioning.")] = "caption",
    samples: Annotated[str, typer.Option(help="Sample ids, parted by commas.")] = "",
    count: Annotated[int, typer.Option(help="How many samples when none are named.")] = 3,
    out: FigureFolder = Path("figures"),
    name: FigureName = "",
) -> None:
    """Where each word's cross-attention falls, laid over the image."""
    from diffprobe.figures import heatmap_figures

    drawn = heatmap_figures(
        store, data, _list(words), _list(site), timestep, conditioning, lambda tree: _samples(tree, samples, count), out, name
    )
    for path in drawn:
        _out.print(f"Drew {path}")


@plot_app.command("probe")
def plot_probe(
    table: Annotated[str, typer.Argument(help="A table that 'diffprobe probe' wrote.", metavar="TABLE")],
    out: FigureFolder = Path("figures"),
    name: FigureName = "",
) -> None:
    """Probe scores by site and timestep, chance marked."""
    from diffprobe.figures import probe_figures

    for path in probe_figures(table, out, name):
        _out.print(f"Drew {path}")


@plot_app.command("similarity")
def plot_similarity(
    table: Annotated[str, typer.Argument(help="A table that 'diffprobe probe similarity' wrote.", metavar="TABLE")],
    measure: Annotated[str, typer.Option(help="One measure; the table's first by default.")] = "",
    out: FigureFolder = Path("figures"),
    name: FigureName = "",
) -> None:
    """Curves over timesteps or guidance with intervals and chance, or every two against each other."""
    from diffprobe.figures import similarity_figure

    _out.print(f"Drew {similarity_figure(table, measure, out, name)}")


@plot_app.command("localization")
def plot_localization(
    table: Annotated[str, typer.Argument(help="A table that 'diffprobe probe localization' wrote.", metavar="TABLE")],
    score: Annotated[str, typer.Option(help="Of the curves and of the picture by head.")] = "auc",
    out: FigureFolder = Path("figures"),
    name: FigureName = "",
) -> None:
    """Localization by site and timestep, against controls and chance, and by head where the table has heads."""
    from diffprobe.figures import localization_figures

    for path in localization_figures(table, score, out, name):
        _out.print(f"Drew {path}")


# --- the whole analysis ---------------------------------------------------------------------------


@app.command(
    rich_help_panel=SHOW,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def reproduce(context: typer.Context) -> None:
    """Measure, judge and draw every figure and table."""
    root = Path(diffprobe.__file__).resolve().parents[1]
    if not (root / "experiments" / "framework.py").is_file():
        raise ValueError(
            "'diffprobe reproduce' needs a checkout of the repository, which holds the experiments: clone it, "
            "run pip install --editable . in it, and give the command again."
        )
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))
    command = typer.main.get_command(importlib.import_module("experiments.__main__").app)
    _prepare(command)
    with command.make_context(context.info_name, context.args, parent=context.parent) as inner:
        command.invoke(inner)


@app.command(rich_help_panel=SHOW)
def report(
    run: Annotated[Path, typer.Argument(help="A folder of figures, as 'diffprobe reproduce' writes it.", metavar="RUN")] = Path(
        "figures"
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    store: Annotated[
        list[str] | None, typer.Option(help="A store with cross-attention maps to explore in the page. May be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each store in the page.")] = 12,
    data: Annotated[str, typer.Option("--data", "-d", help="The stores' dataset; the one they name by default.")] = "",
    max_mb: Annotated[float, typer.Option(min=0, help="Refuse an explorer that would take more than this.")] = 20.0,
) -> None:
    """Write figures and verdicts as one offline page.

    With --store it holds an attention explorer too. It opens anywhere, without a network.
    """
    from diffprobe.report import write_report

    made = write_report(run, out, store or [], samples=samples, data=data, max_bytes=int(max_mb * 1e6))
    _out.print(
        f"{out}: {made.figures} figures, {made.claims} claims, stores to explore: {made.stores}; {made.bytes / 1e6:.1f} MB.",
    )
    _out.print(f"Open {out} in a browser; it needs no network.")
    if not store:
        _out.print("With --store and a store of cross-attention maps the page also lets one explore them.")


# --- leakage --------------------------------------------------------------------------------------


@leakage_app.command("run")
def leakage_run(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder. The same command goes on where it was cut off.")],
    store: Annotated[
        list[str] | None,
        typer.Argument(help="Stores of the training images, whose features are used where they fit.", metavar="[STORE]..."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Diffusion model: hub id, folder or embedded name.",
            show_default="the store's, else shapes-sd",
        ),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", help="Training images with captions.", show_default="the store's, else shapes:1500?split=train"
        ),
    ] = "",
    test: Annotated[str, typer.Option(help="Held-out images, with several captions each.")] = "shapes:100?split=test",
    language_model: Annotated[
        str, typer.Option("--language-model", "-l", help="shapes-lm, smollm2, a folder or a hub id.")
    ] = "shapes-lm",
    language_dtype: Annotated[
        str, typer.Option(help="The language model's: float32, bfloat16, float16; auto is float32 on a CPU, else bfloat16.")
    ] = "auto",
    template: Annotated[
        str, typer.Option(help="How the language model is spoken to: v1 for Vicuna; its own chat template when empty.")
    ] = "",
    arms: Annotated[
        str,
        typer.Option(
            help="BASE[+dropNN][/MITIGATION], parted by commas; BASE: U no prompt, M own caption, X mismatched, Q question; MITIGATION: centred, gated, erased, or a knock-out."
        ),
    ] = "U,M,M+drop30",
    sites: Annotated[str, typer.Option(help="Names, paths or globs, parted by commas.")] = "U-L1-R1-B0-Cross-Q",
    timesteps: Annotated[str, typer.Option("--timesteps", "-t", help="Parted by commas.")] = "50",
    guidance: Annotated[str, typer.Option(help="s of f_u + s (f_c - f_u), parted by commas.")] = "1,1.5,4",
    seeds: Annotated[
        int, typer.Option(min=1, help="Projectors of each kind; fewer than 3 say little of other projectors.")
    ] = 3,
    conditions: Annotated[str, typer.Option(help="Test conditions; all of them when empty.")] = "",
    knockouts: Annotated[
        str, typer.Option(help="Routes cut at test time: start, eos_and_padding, content, empty[@first:K|@GLOB].")
    ] = "",
    request: Annotated[str, typer.Option(help="What the language model is asked.")] = "Describe the image.",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a projector.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="The highest; it falls to zero along a cosine.")] = 1e-3,
    grid: Annotated[int, typer.Option(min=1, help="Soft tokens on a side.")] = 6,
    candidates: Annotated[int, typer.Option(min=2, help="Texts that the fed one is ranked among.")] = 100,
    ranked: Annotated[int, typer.Option(min=0, help="Test images for which it is ranked; 0 for none.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the features' noise.")] = 0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of one forward pass of the diffusion model.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the forecast and stop.")] = False,
) -> None:
    """Train projectors into a frozen language model, and let them describe images whose features were given other texts."""
    from diffprobe.mllm.leakage import Settings
    from diffprobe.mllm.leakage_run import run as start
    from diffprobe.mllm.verdict import CONDITIONS
    from diffprobe.store import store_info

    origin = store_info(store[0]) if store else {}
    settings = Settings(
        model=model or (origin["request"]["model"] if store else "shapes-sd"),
        data=data or (origin["data"] if store else "shapes:1500?split=train"),
        test=test, language_model=language_model, language_dtype=language_dtype, template=template, request=request, grid=grid, steps=steps,
        batch=batch, learning_rate=learning_rate, candidates=candidates, ranked=ranked, noise_seed=origin["request"]["seed"] if store else seed,
        batch_rows=batch_rows,
    )  # fmt: skip
    start(
        out, settings, arms=_list(arms), sites=_list(sites), timesteps=_numbers(timesteps, int, "--timesteps"),
        guidance=_numbers(guidance, float, "--guidance"), seeds=seeds, conditions=_list(conditions) or CONDITIONS,
        knockouts=_list(knockouts), stores=store or [], device=device, dry_run=dry_run,
        tell=lambda line: _out.print(line),
    )  # fmt: skip
    if not dry_run and os.environ.get("RANK", "0") == "0":
        _next(f"diffprobe leakage report {shlex.quote(str(out))}")


@leakage_app.command("report")
def leakage_report(
    run: Annotated[Path, typer.Argument(help="A folder that 'diffprobe leakage run' filled.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for tables and figures.", show_default="RUN/report")
    ] = None,
    n_examples: Annotated[int, typer.Option("--examples", min=1, help="Images whose texts are shown side by side.")] = 2,
    metrics: Annotated[
        str,
        typer.Option(
            help="Of caption recovery: cider_d, bleu, rouge_l, content_f1, exact, substring, minilm.",
            show_default="those that need no model",
        ),
    ] = "",
) -> None:
    """The verdict in a sentence, scores, caption recovery, examples and figures, from the kept files; needs no torch."""
    from diffprobe.mllm.leakage import leakage_report as judge
    from diffprobe.mllm.leakage import save_report

    found = judge(run, n_examples=n_examples, metrics=_list(metrics) or None)
    for line in found.sentences:
        _out.print(line)
    table = Table(
        "", "arm", "site", "t", "s", "condition", "leak", "sight", "CIDEr-D fed", "CIDEr-D image", box=None, pad_edge=False
    )
    for row in found.summary().to_dict("records"):
        table.add_row(*(str(cell) for cell in row.values()))
    _out.print()
    _show(table)
    recovered = found.recovered()
    table = Table(
        "", "arm", "site", "t", "s", "condition", "against", "n", *recovered.columns[8:], title="Recovery of captions",
        box=None, pad_edge=False,
    )  # fmt: skip
    for row in recovered.to_dict("records"):
        table.add_row(*(str(cell) for cell in row.values()))
    _out.print()
    _show(table)
    for row in found.examples.to_dict("records"):
        _out.print(f"\n{row.pop('condition')}, {row.pop('sample')}", style="bold")
        for name, text in row.items():
            _out.print(f"  {name:<28} {text}")
    paths = save_report(found, out or run / "report")
    _out.print("\nTables and pictures:")
    for path in paths:
        _out.print(f"  {path}")


# --- the fused model ------------------------------------------------------------------------------


@mllm_app.command("train")
def mllm_train(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the model. The same command goes on where it was cut off.")
    ],
    captions: Annotated[
        str, typer.Option(help="Stage 1: shapes-captions:N, or llava:FILE.json?images=FOLDER.")
    ] = "shapes-captions:3000",
    instructions: Annotated[
        str, typer.Option(help="Stage 2: shapes-instruct:N, or llava:FILE.json?images=FOLDER.")
    ] = "shapes-instruct:6000",
    language_model: Annotated[
        str, typer.Option("--language-model", "-l", help="shapes-lm, smollm2, a folder or a hub id.")
    ] = "shapes-lm",
    template: Annotated[
        str,
        typer.Option(
            help="How the language model is spoken to: v1 for Vicuna, or plain,v1 as LLaVA's two stages; its own chat template when empty."
        ),
    ] = "",
    encoder: Annotated[str, typer.Option(help="CLIP: hub id, folder or embedded name.")] = "shapes-clip",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Diffusion model: hub id, folder or embedded name.")
    ] = "shapes-sd",
    fusion: Annotated[
        str, typer.Option(help="clip, diffusion, concat, sequence, interleave or cross_attention.")
    ] = "cross_attention",
    sites: Annotated[
        str, typer.Option(help="Of the diffusion model: names, paths or globs, parted by commas.")
    ] = "U-L1-R1-B0-Cross-Q",
    timestep: Annotated[int, typer.Option("--timestep", "-t", min=0, help="Of the noise on the image.")] = 50,
    guidance: Annotated[float, typer.Option(help="s of f_u + s (f_c - f_u); 0 never reads the question.")] = 4.0,
    grid: Annotated[int, typer.Option(min=1, help="Tokens on a side of an image.")] = 8,
    merge: Annotated[str, typer.Option(help="Places of a token: mean, or stack (side by side).")] = "mean",
    tune: Annotated[str, typer.Option(help="Of the language model in stage 2: full, lora or none.")] = "full",
    recipe: Annotated[
        str, typer.Option(help="llava, or small for the embedded models.", show_default="small for shapes-lm, else llava")
    ] = "",
    steps: Annotated[str, typer.Option(help="Of stages 1 and 2, such as 300,600; the recipe's when empty.")] = "",
    batch: Annotated[str, typer.Option(help="Of stages 1 and 2, likewise.")] = "",
    learning_rate: Annotated[str, typer.Option(help="Of stages 1 and 2, likewise.")] = "",
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes that share a step.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Save memory: activations are computed twice.")] = False,
    precision: Annotated[
        str, typer.Option(help="no (float32), bf16 (autocast), or auto: bf16 on a GPU.", show_default="the recipe's")
    ] = "",
    cache: Annotated[bool, typer.Option(help="Keep what the encoders saw in OUT/features.")] = True,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints.", show_default="the recipe's")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the forecast and stop.")] = False,
    force: Annotated[bool, typer.Option(help="Go on although the disk is too small for the forecast.")] = False,
) -> None:
    """Two stages: the fusion on captions, with no prompt; then the language model too, on questions that are the prompt."""
    from dataclasses import replace

    from diffprobe.data.conversations import load_conversations
    from diffprobe.mllm.config import RECIPES, FusedConfig
    from diffprobe.mllm.model import FusedMLLM
    from diffprobe.mllm.stages import train_fused
    from diffprobe.mllm.streams import FeatureCache

    recipe = recipe or ("small" if language_model == "shapes-lm" else "llava")
    if recipe not in RECIPES or tune not in ("full", "lora", "none"):
        raise ValueError(f"--recipe is {' or '.join(RECIPES)} and --tune full, lora or none; got {recipe!r} and {tune!r}.")
    given = {"steps": (steps, int), "batch": (batch, int), "learning_rate": (learning_rate, float)}
    changes: list[dict[str, Any]] = [{"seed": seed, "accumulate": accumulate, "checkpointing": checkpointing} for _ in range(2)]
    for name, (text, kind) in given.items():
        values = _numbers(text, kind, f"--{name.replace('_', '-')}")
        if len(values) not in (0, 2):
            raise ValueError(f"--{name.replace('_', '-')} takes one number for each of the two stages; got {text!r}.")
        for change, value in zip(changes, values, strict=False):
            change[name] = value
    changes[1]["tune"] = "" if tune == "none" else tune
    *before, spoken = _list(template) or [""]
    changes[0]["template"] = before[0] if before else ""
    changes = [change | ({"precision": precision} if precision else {}) for change in changes]
    changes = [change | ({"evaluate_every": checkpoint_every} if checkpoint_every else {}) for change in changes]
    first, second = (replace(stage, **change) for stage, change in zip(RECIPES[recipe], changes, strict=True))
    config = FusedConfig(
        language_model=language_model, template=spoken, encoder=encoder, diffusion=model, fusion=fusion, sites=tuple(_list(sites)),
        timestep=timestep, guidance=guidance, grid=grid, merge=merge, seed=seed,
    )  # fmt: skip
    data = load_conversations(captions), load_conversations(instructions)
    fused = FusedMLLM.build(config, device, cache=FeatureCache(out / "features") if cache else None)
    main = os.environ.get("RANK", "0") == "0"
    tell = lambda line: _out.print(line) if main else None  # noqa: E731
    train_fused(fused, *data, out, (first, second), dry_run=dry_run, force=force, log=tell)
    if main and not dry_run:
        _next(f"diffprobe mllm eval {shlex.quote(str(out))}")
        _out.print(f"'diffprobe mllm chat {shlex.quote(str(out))} IMAGE QUESTION' asks about a picture of yours.")


@mllm_app.command("eval")
def mllm_eval(
    run: Annotated[Path, typer.Argument(help="A folder that 'diffprobe mllm train' filled.", metavar="RUN")],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            help="shapes-vqa:N, shapes-mmvp:N, KIND:SOURCE, ...; may be repeated.",
            show_default="the four drawn ones",
        ),
    ] = None,
    conditions: Annotated[
        str,
        typer.Option(help="own, and without looking blank, text; unprompted and irrelevant test what the prompt does."),
    ] = "own,blank,text",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the tables.", show_default="RUN/eval")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
) -> None:
    """Answer benchmarks; scores with intervals, beside chance and two blind baselines."""
    from diffprobe.data.question_benchmarks import load_questions
    from diffprobe.mllm.judging import DRAWN, judge_all
    from diffprobe.mllm.model import FusedMLLM

    benchmarks = [load_questions(spec) for spec in benchmark or DRAWN]
    model = FusedMLLM.from_pretrained(run, device)
    tell = lambda line: _out.print(line)  # noqa: E731
    folder = out or run / "eval"
    scores = judge_all(model, benchmarks, folder, _list(conditions), batch=batch, max_new_tokens=max_new_tokens, tell=tell)
    if len(scores):
        _show_scores(scores)
    if model.cut_prompts:
        tell(f"{model.cut_prompts} questions were longer than the diffusion model's text encoder takes, and were cut.")
    tell("\nWritten: " + ", ".join(str(folder / name) for name in ("scores.csv", "answers.csv")[not len(scores) :]))


@mllm_app.command("score")
def mllm_score(
    judged: Annotated[Path, typer.Argument(help="The to_judge.csv of 'mllm eval', its points filled in.", metavar="FILE")],
) -> None:
    """Scores of LLaVA-Bench from the points that a judge gave; they are written to judged_scores.csv beside the file."""
    from diffprobe.mllm.judging import score_judged
    from diffprobe.rundir import write_whole

    scores = score_judged(judged)
    _show_scores(scores)
    out = judged.with_name("judged_scores.csv")
    write_whole(out, scores.to_csv(index=False, lineterminator="\n"))
    _out.print(f"\nWritten: {out}")


def _show_scores(scores: pd.DataFrame) -> None:
    table = Table(
        "benchmark", "score", "group", "shown", "value", "95% interval", "chance", "n", "unread", box=None, pad_edge=False
    )
    for row in scores.to_dict("records"):
        cells = [row["benchmark"], row["score"], row["group"], row["condition"], f"{row['value']:.3f}",
                 f"[{row['low']:.3f}, {row['high']:.3f}]", f"{row['chance']:.3f}", row["n"], row["unparsed"]]  # fmt: skip
        table.add_row(*(str(cell) for cell in cells))
    _show(table)


@mllm_app.command("chat")
def mllm_chat(
    run: Annotated[Path, typer.Argument(help="A folder that 'diffprobe mllm train' filled.", metavar="RUN")],
    image: Annotated[Path, typer.Argument(help="A photograph or drawing.", metavar="IMAGE")],
    question: Annotated[str, typer.Argument(help="What to ask about it.", metavar="QUESTION")],
    more: Annotated[list[Path] | None, typer.Option("--image", help="More images, after the first. May be repeated.")] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Draw where the question's words attend over the first image: NAME.png.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the answer.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
) -> None:
    """Answer a question about an image, and show where the attention went."""
    from diffprobe.data.images import read_image
    from diffprobe.mllm.chat import save_attention
    from diffprobe.mllm.model import FusedMLLM

    images = [read_image(path) for path in (image, *(more or []))]
    model = FusedMLLM.from_pretrained(run, device)
    (answer,) = model.answer([images], [question], max_new_tokens=max_new_tokens)
    _out.print(answer)
    if model.cut_prompts:
        _out.print("The diffusion model's text encoder could not take the whole question; it was cut.")
    if attention:
        _out.print(f"Drew {save_attention(model, images[0], question, answer, attention)}")


# --- the installation ------------------------------------------------------------------------------


@app.command(rich_help_panel=HELP)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON, for a bug report or a script.")] = False) -> None:
    """Say what is installed and reachable, and mend the rest.

    Packages and their versions, devices, models; for what is missing the command that gets it. Exit code 1 when something
    that is needed is missing.
    """
    import json

    from diffprobe.doctor import describe, examine

    found = examine()
    _out.print(json.dumps(found, indent=2) if as_json else describe(found))
    if any(not package["fine"] for package in found["packages"].values()):
        raise typer.Exit(1)


# --- the zoo --------------------------------------------------------------------------------------


@zoo_app.command("list")
def zoo_list() -> None:
    """The embedded models, what was fetched, and where they lie."""
    from diffprobe.zoo import embedded, smollm2

    for name, folder, size in embedded():
        _out.print(f"{name:<12} {size / 1e6:6.1f} MB  {folder}")
    try:
        _out.print(f"{smollm2.NAME:<12} {'':9}  {smollm2.fetched()}")
    except ValueError as absent:
        _out.print(f"{smollm2.NAME:<12} {'':9}  {absent}")


@zoo_app.command("fetch")
def zoo_fetch(name: Annotated[str, typer.Argument(help="smollm2.")]) -> None:
    """Bring a model that is not shipped into the cache ($DIFFPROBE_CACHE, else ~/.cache/diffprobe), once."""
    from diffprobe.zoo import smollm2

    if name != smollm2.NAME:
        raise ValueError(f"{name!r} cannot be fetched; only {smollm2.NAME} can. Embedded models need no fetching.")
    _out.print(f"{name} lies in {smollm2.fetch()}")


# --- entry ----------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; mistakes become one sentence."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="Consolidated metadata is currently")
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name can hold bytes that are no text
    try:
        app()
    except _Stopped as stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asks again does not wait for the write that goes on
        _fail(f"Stopped.{_kept()}", stopped.code)
    except (ValueError, OSError, ImportError) as error:  # an import: of a package that a URL or an option asks for
        if _debug:
            raise
        _fail(_sentence(error), 2)
    except (RuntimeError, MemoryError) as error:
        if "home directory" in str(error) and not _debug:  # pathlib's word for a user who is not here
            _fail("A path begins with ~ and a name, and this machine has no such user.", 2)
        known = _known_failure(error)
        if _debug or known is None:
            raise
        _fail(known, 1)


def _kept() -> str:
    """What is true of a command that was cut off: those that write piece by piece go on, a dry run and the others kept nothing."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    resumes = {" ".join(words[:1]), " ".join(words[:2])} & RESUMED
    return " What was complete is kept; the same command goes on from there." if resumes and "--dry-run" not in sys.argv else ""


RESUMED = {"extract", "repair", "probe alignment", "reproduce", "leakage run", "mllm train", "mllm eval"}


class _Stopped(Exception):
    """Ctrl-C, or a request to terminate, with the exit code that shells expect."""

    def __init__(self, code: int) -> None:
        self.code = code


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _sentence(error: Exception) -> str:
    """One line; an error of the system without its number, with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        about = f"{error.filename}: " if error.filename else ""
        kept = _kept() if error.errno == errno.ENOSPC else ""
        return f"{about}{error.strerror}.{kept}"
    return " ".join(str(error).split()) or type(error).__name__


def _known_failure(error: RuntimeError | MemoryError) -> str | None:
    """What to say of a failure that is neither the user's mistake nor ours; None for what should show its traceback."""
    models = sys.modules.get("diffprobe.models")  # absent: nothing of torch has run
    if type(error).__name__ == "NotFiniteError":
        return _sentence(error)
    if isinstance(error, MemoryError) or (models is not None and models.out_of_memory(error)):
        return (
            "Memory ran out, and what was asked cannot be cut smaller. Choose a smaller --resolution, fewer sites, "
            f"--dtype bfloat16 or another --device.{_kept()}"
        )
    if re.search(r"gloo|nccl|connection (closed|reset) by peer", str(error), re.IGNORECASE):
        return f"Another process of this run ended early; what it said stands above.{_kept()}"
    return None


def _fail(message: str, code: int) -> None:
    print(f"diffprobe: {visible(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
