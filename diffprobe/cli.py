"""The command line: parses, calls one function, says what to type next.

A user's mistake is one sentence on standard error and exit code 2; ``--debug`` before the command shows the traceback.
Heavy libraries are imported inside the commands, so that ``--help`` answers at once and probes run without torch.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Record, probe and reuse what text-to-image diffusion models know. Start with: diffprobe extract --out runs/first.zarr",
)
probe_app = typer.Typer(no_args_is_help=True, help="Measure what a store's features hold; writes a tidy table.")
plot_app = typer.Typer(no_args_is_help=True, help="Draw from a store or a table; writes NAME.png, .pdf, .csv and .json.")
zoo_app = typer.Typer(no_args_is_help=True, help="The embedded models and the recipe that trained them.")
app.add_typer(probe_app, name="probe")
app.add_typer(plot_app, name="plot")
app.add_typer(zoo_app, name="zoo")

_out = Console(highlight=False)
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
    _out.print("Next:")
    for line in lines:
        _out.print(f"  {line}", markup=False, soft_wrap=True)


# --- recording ------------------------------------------------------------------------------------


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or embedded name; only its config is read.")] = "shapes-sd",
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels; the model's own by default.")] = None,
    pattern: Annotated[str, typer.Option(help="Only sites that match this name, path, glob or preset.")] = "*",
    revision: Revision = None,
) -> None:
    """List each place of a model that can be recorded, with its shape."""
    from diffprobe.models import load_network_config
    from diffprobe.recorder import site_shapes
    from diffprobe.sites import list_sites, select_sites

    network, factor, tokens = load_network_config(model, revision)
    side = resolution // factor if resolution else int(network.config.sample_size)  # type: ignore[union-attr,arg-type]
    available = list_sites(name for name, _ in network.named_modules())
    chosen = select_sites(available, pattern)
    shapes = site_shapes(network, (side, side), tokens)
    table = Table("name", "path", "kind", "channels", "height x width", box=None, pad_edge=False)
    for site in chosen:
        shape = shapes[site.name]
        channels = f"{shape[0]} heads" if site.is_map else str(shape[0])
        place = f"{shape[1]} tokens" if site.over_tokens else " x ".join(str(n) for n in shape[-2:])
        table.add_row(site.name, site.path or "(output)", site.kind, channels, place)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


@app.command()
def extract(
    out: Annotated[
        str, typer.Option("--out", "-o", help="Where the store goes: a path or an fsspec URL. The same command resumes it.")
    ],
    model: Model = "shapes-sd",
    data: Annotated[
        str, typer.Option("--data", "-d", help="A folder of images, or shapes:N (?split=, seed=, objects=).")
    ] = "shapes:256?split=test",
    sites: Annotated[
        str, typer.Option(help="Names, paths, globs or presets (paper, blocks), parted by commas; empty for none.")
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
        str, typer.Option("--conditioning", "-c", help="null, caption[:N|:STYLE], question[:N], mismatched, fixed:TEXT.")
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
    dry_run: Annotated[bool, typer.Option(help="Print the forecast and stop.")] = False,
    force: Annotated[bool, typer.Option(help="Go on although the forecast does not fit on the disk.")] = False,
) -> None:
    """Record features and attention maps of a dataset into a store."""
    from diffprobe.data import load_dataset
    from diffprobe.extraction import describe_forecast
    from diffprobe.extraction import extract as run
    from diffprobe.models import load_model

    conditionings = [conditioning] if conditioning.startswith("fixed:") else _list(conditioning)
    sides = _numbers(resolution.replace("x", ","), int, "--resolution")
    if len(sides) > 2:
        raise ValueError(f"--resolution takes one side or HEIGHTxWIDTH; got {resolution!r}.")
    steps = _numbers(timesteps, int, "--timesteps")
    scales = _numbers(guidance, float, "--guidance")
    dataset = load_dataset(data)
    summary = run(
        load_model(model, device, dtype, revision, use_safetensors=not allow_pickle), dataset, out,
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
        _out.print(describe_forecast(summary.forecast), markup=False)
        return
    _out.print(f"{summary.complete} of {summary.samples} samples are in {out} ({summary.seconds:.1f} s).", markup=False)
    for name, reason in list(summary.skipped.items())[:10]:
        _out.print(f"  left out {name}: {reason}", markup=False)
    if len(summary.skipped) > 10:
        _out.print(f"  and {len(summary.skipped) - 10} more")
    place = shlex.quote(out)
    lines = [f"diffprobe info {place}"]
    lines += [f"diffprobe probe linear {place} --label colour"] if data.startswith("shapes") and sites else []
    lines += [f"diffprobe plot pca {place}"] if sites else []
    lines += [f"diffprobe plot heatmaps {place}"] if maps else []
    _next(*lines)


@app.command()
def info(store: StorePath) -> None:
    """Say what is in a store, how complete it is, and where it came from."""
    from diffprobe.store import store_info

    found = store_info(store)
    request = found["request"]
    _out.print(f"{store}: format {found['format_version']}, {found['bytes_on_disk'] / 1e6:.1f} MB on disk", markup=False)
    states = ", ".join(f"{n} {word}" for word, n in found["status"].items())
    _out.print(f"{found['samples']} samples: {states}")
    _out.print(
        f"model {request['model']} ({found['pipeline']}, {found['prediction_type']}), weights {request['weights']}",
        markup=False,
    )
    _out.print(
        f"data {request['dataset']} ({request['fingerprint']}), seed {request['seed']}, {request['noise_draws']} noise draw(s)",
        markup=False,
    )
    _out.print(
        f"timesteps {', '.join(map(str, request['timesteps']))}; conditionings {', '.join(request['conditionings'])}",
        markup=False,
    )
    table = Table("site", "kind", "dimensions", "size", box=None, pad_edge=False)
    for name, site in found["sites"].items():
        dims = " x ".join(f"{d} {n}" for d, n in zip(site["dims"], site["shape"], strict=True))
        table.add_row(name, site["kind"], dims, f"{site['bytes'] / 1e6:.1f} MB")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    _out.print(f"written with {versions}; commit {found['commit'] or 'unknown'}", markup=False)


@app.command()
def verify(store: StorePath) -> None:
    """Read every complete unit of a store: checksums, whole shards, finite values. Exit code 1 when something is wrong."""
    from diffprobe.store import store_info, verify_store

    faults = verify_store(store)
    found = store_info(store)
    for fault in faults:
        _out.print(f"unit {fault.unit}, {fault.site}: {fault.reason}", markup=False)
    pending = found["status"].get("pending", 0)
    _out.print(f"{len(faults)} faults in {found['samples'] - pending} samples; {pending} samples pending.")
    if faults:
        _next(f"diffprobe repair {shlex.quote(store)}")
        raise typer.Exit(1)


@app.command()
def repair(
    store: StorePath,
    model: Annotated[str | None, typer.Option(help="Instead of the store's own model id.")] = None,
    data: Annotated[str | None, typer.Option(help="Instead of the store's own dataset.")] = None,
) -> None:
    """Compute the faulty or missing units of a store again, and only those."""
    from diffprobe.extraction import repair as mend

    faults, summary = mend(store, model, data)
    if summary is None:
        _out.print("Nothing to repair.")
        return
    _out.print(
        f"{len({f.unit for f in faults})} faulty units computed again; {summary.complete} of {summary.samples} samples are complete."
    )


# --- probing --------------------------------------------------------------------------------------


@probe_app.command("linear")
def probe_linear(
    store: StorePath,
    label: Annotated[
        str, typer.Option(help="Labels to read, parted by commas; 'diffprobe info' names the store's.")
    ] = "colour",
    sites: Annotated[str, typer.Option(help="Sites by name, parted by commas; all features by default.")] = "",
    conditioning: Annotated[str, typer.Option(help="Conditionings, parted by commas; all by default.")] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The table (CSV); beside the store by default.")] = Path(),
    seed: Annotated[int, typer.Option(help="Seed of split, control labels and bootstrap.")] = 0,
    jobs: Annotated[int, typer.Option(help="Worker processes, one thread each; -1 is one a core.")] = -1,
) -> None:
    """Fit a linear probe per site, timestep and conditioning, with its control task."""
    from diffprobe.probes.linear import probe_table
    from diffprobe.store import features, open_store, site_names

    tree = open_store(store)
    names = _list(sites) or [n for n in site_names(tree) if "features" in tree[n].data_vars]

    def get(site: str) -> xr.DataArray:
        found: xr.DataArray = features(tree, site, conditioning=_list(conditioning) or None, pool="mean")
        return found

    frame: pd.DataFrame = probe_table(get, names, _list(label), seed=seed, n_jobs=jobs)
    target = out if out != Path() else Path(f"{store.rstrip('/')}.linear.csv")
    target.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(target, index=False)
    _show_best(frame)
    _out.print(f"{len(frame)} probes in {target}", markup=False)
    _next(f"diffprobe plot probe {shlex.quote(str(target))}")


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
            f"{best['low']:.3f}-{best['high']:.3f}", f"{best['chance']:.3f}", f"{best['control_accuracy']:.3f}", str(best["n_test"]),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


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
    name: Annotated[str, typer.Option(help="Name of the figure's files.")] = "pca",
) -> None:
    """First three principal components of the features as colours, one column a site."""
    from diffprobe.gallery import pca_figure

    paths = pca_figure(
        store, data, _list(sites), timestep, conditioning, lambda tree: _samples(tree, samples, count), out, name
    )
    _out.print(f"Drew {paths}", markup=False)


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
    name: Annotated[str, typer.Option(help="Name of the figure's files.")] = "heatmaps",
) -> None:
    """Where each word's cross-attention falls, laid over the image."""
    from diffprobe.gallery import heatmap_figures

    drawn = heatmap_figures(
        store, data, _list(words), _list(site), timestep, conditioning, lambda tree: _samples(tree, samples, count), out, name
    )
    for path in drawn:
        _out.print(f"Drew {path}", markup=False)


@plot_app.command("probe")
def plot_probe(
    table: Annotated[Path, typer.Argument(help="A table that 'diffprobe probe' wrote.", metavar="TABLE")],
    out: FigureFolder = Path("figures"),
    name: Annotated[str, typer.Option(help="Name of the figure's files.")] = "probe",
) -> None:
    """Probe scores by site and timestep, chance marked."""
    from diffprobe.gallery import probe_figures

    for path in probe_figures(table, out, name):
        _out.print(f"Drew {path}", markup=False)


# --- the zoo --------------------------------------------------------------------------------------


@zoo_app.command("list")
def zoo_list() -> None:
    """The embedded models and where they lie."""
    from diffprobe.zoo import embedded

    for name, folder, size in embedded():
        _out.print(f"{name:<12} {size / 1e6:6.1f} MB  {folder}", markup=False)


@zoo_app.command("train")
def zoo_train(
    stage: Annotated[str, typer.Argument(help="vae, text, unet, or all.")] = "all",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for checkpoints, loss curves and the finished model.")
    ] = Path("runs/zoo"),
) -> None:
    """Train shapes-sd again from its recipe; a run that was cut off goes on. Hours on two cores, minutes on a GPU."""
    from diffprobe.zoo import recipe

    stages = ("vae", "text", "unet") if stage == "all" else (stage,)
    for one in stages:
        if one not in recipe.STAGES:
            raise ValueError(f"Stage {one!r} is not one of {', '.join(recipe.STAGES)}, all.")
        recipe.STAGES[one](recipe.Config(), out)
    _next(
        f"diffprobe sites {out / 'shapes-sd'}",
        "accelerate launch -m diffprobe.zoo --stage unet spreads the last stage over processes",
    )


# --- entry ----------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; mistakes become one sentence."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="Consolidated metadata is currently")
    try:
        app()
    except KeyboardInterrupt:
        _fail("Stopped. What was complete is kept; the same command goes on from there.", 130)
    except (ValueError, OSError) as error:
        if _debug:
            raise
        _fail(str(error), 2)
    except RuntimeError as error:
        if _debug or type(error).__name__ != "NotFiniteError":
            raise
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"diffprobe: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
