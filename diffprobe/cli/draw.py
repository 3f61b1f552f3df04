"""Commands that draw: a store's or a table's figures, the paper's figures and tables, and all of them as one page."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

import diffprobe
from diffprobe.cli import options as shared
from diffprobe.cli.entry import SHOW, app, plot_app, prepare
from diffprobe.cli.measure import COMPLETED, IMAGES, TIMESTEP
from diffprobe.cli.options import argument, option, say, several

if TYPE_CHECKING:
    import xarray as xr

SAMPLES = several([], "Sample ids.")
FIGURES = option(Path("figures"), "Folder for the figure's files.", "--out", "-o")
FIGURE_NAME = option("", "Name of the figure's files.", show_default="the store's or the table's")


def _samples(wanted: list[str], count: int) -> Callable[[xr.DataTree], list[int]]:
    """Finds the rows of the named samples in a store, or of its first."""

    def choose(tree: xr.DataTree) -> list[int]:
        ids = [str(s) for s in tree.dataset["sample"].values]
        missing = [name for name in wanted if name not in ids]
        if missing:
            raise ValueError(f"Sample {missing[0]!r} is not in this store; its first are {', '.join(ids[:3])}.")
        return [ids.index(name) for name in wanted] or list(range(min(count, len(ids))))

    return choose


@plot_app.command("pca")
def plot_pca(
    store: str = shared.STORE,
    data: str = IMAGES,
    sites: list[str] = several([], "Sites by name; all that have a grid by default.", **COMPLETED),
    timestep: int | None = TIMESTEP,
    conditioning: str = option("null", "One conditioning."),
    samples: list[str] = SAMPLES,
    count: int = option(5, "How many samples when none are named."),
    out: Path = FIGURES,
    name: str = FIGURE_NAME,
) -> None:
    """First three principal components of the features as colours, one column a site."""
    from diffprobe.figures import pca_figure

    say(f"Drew {pca_figure(store, data, sites, timestep, conditioning, _samples(samples, count), out, name)}")


@plot_app.command("heatmaps")
def plot_heatmaps(
    store: str = shared.STORE,
    words: list[str] = several([], "Words of the prompt; all its words by default."),
    data: str = IMAGES,
    site: list[str] = several([], "Map sites by name; the mean of all by default.", **COMPLETED),
    timestep: int | None = TIMESTEP,
    conditioning: str = option("caption", "One conditioning."),
    samples: list[str] = SAMPLES,
    count: int = option(3, "How many samples when none are named."),
    out: Path = FIGURES,
    name: str = FIGURE_NAME,
) -> None:
    """Where each word's cross-attention falls, laid over the image."""
    from diffprobe.figures import heatmap_figures

    for path in heatmap_figures(store, data, words, site, timestep, conditioning, _samples(samples, count), out, name):
        say(f"Drew {path}")


@plot_app.command("probe")
def plot_probe(
    table: str = argument(..., "A table that 'diffprobe probe' wrote.", "TABLE"),
    beside: list[str] = several([], "Tables of other models, drawn beside it over log-SNR, which all families share."),
    out: Path = FIGURES,
    name: str = FIGURE_NAME,
) -> None:
    """Probe scores by site and timestep, chance marked."""
    from diffprobe.figures import probe_figures

    for path in probe_figures(table, out, name, beside):
        say(f"Drew {path}")


@plot_app.command("similarity")
def plot_similarity(
    table: str = argument(..., "A table that 'diffprobe probe similarity' wrote.", "TABLE"),
    measure: str = option("", "One measure; the table's first by default."),
    out: Path = FIGURES,
    name: str = FIGURE_NAME,
) -> None:
    """Curves over timesteps or guidance with intervals and chance, or every two against each other."""
    from diffprobe.figures import similarity_figure

    say(f"Drew {similarity_figure(table, measure, out, name)}")


@plot_app.command("localization")
def plot_localization(
    table: str = argument(..., "A table that 'diffprobe probe localization' wrote.", "TABLE"),
    score: str = option("auc", "Of the curves and of the picture by head."),
    out: Path = FIGURES,
    name: str = FIGURE_NAME,
) -> None:
    """Localization by site and timestep, against controls and chance, and by head where the table has heads."""
    from diffprobe.figures import localization_figures

    for path in localization_figures(table, score, out, name):
        say(f"Drew {path}")


def _experiments() -> Any:
    """The command of the checkout's experiments, which has the options of `reproduce`."""
    root = Path(diffprobe.__file__).resolve().parents[1]
    if not (root / "experiments" / "framework.py").is_file():
        raise ValueError(
            "'diffprobe reproduce' needs a checkout of the repository, which holds the experiments: clone it, "
            "run pip install --editable . in it, and give the command again."
        )
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))
    command = typer.main.get_command(importlib.import_module("experiments.__main__").app)
    prepare(command)
    return command


class _Reproduce(TyperCommand):
    """Asks the command of the experiments what the shell can complete."""

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> list[Any]:  # type: ignore[override]
        command = _experiments()
        asked = next((one for one in command.params if ctx.args and ctx.args[-1] in one.opts), command)
        return list(asked.shell_complete(typer.Context(command, parent=ctx.parent), incomplete))


@app.command(
    cls=_Reproduce,
    rich_help_panel=SHOW,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def reproduce(
    context: typer.Context,
) -> None:
    """Measure, judge and draw every figure and table."""
    command = _experiments()
    with command.make_context(context.info_name, context.args, parent=context.parent) as inner:
        command.invoke(inner)


@app.command(rich_help_panel=SHOW)
def report(
    run: Path = argument(Path("figures"), "A folder of figures, as 'diffprobe reproduce' writes it.", "RUN"),
    out: Path = option(Path("report.html"), "The page.", "--out", "-o"),
    store: list[str] = option([], "A store with cross-attention maps to explore in the page. May be repeated."),
    samples: int = option(12, "Samples of each store in the page.", min=1),
    data: str = option("", "The stores' dataset; the one they name by default.", "--data", "-d"),
    max_mb: float = option(20.0, "Refuse an explorer that would take more than this.", min=0),
) -> None:
    """Write figures and verdicts as one offline page.

    With --store it holds an attention explorer too. It opens anywhere, without a network.
    """
    from diffprobe.report import write_report

    made = write_report(run, out, store, samples=samples, data=data, max_bytes=int(max_mb * 1e6))
    say(f"{out}: {made.figures} figures, {made.claims} claims, stores to explore: {made.stores}; {made.bytes / 1e6:.1f} MB.")
    say(f"Open {out} in a browser; it needs no network.")
    if not store:
        say("With --store and a store of cross-attention maps the page also lets one explore them.")
