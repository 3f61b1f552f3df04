"""Figures: one style, readable at column width, each saved beside the rows that it shows.

The only module that knows matplotlib.  Functions take tables or labelled arrays and return a Figure; none opens a
window or touches global state.  The invariant: the same rows give the same bytes, so a figure redrawn from its CSV
is the figure.  Widths are in inches: a column is `COLUMN`, a page `PAGE`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import platform
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.cm
import matplotlib.rcsetup
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

P = ParamSpec("P")

COLUMN, PAGE = 3.35, 6.9
OKABE_ITO = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C7A00",
)  # yellow darkened for white paper
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SCORES, HEAT = "cividis", "magma"  # both even in lightness, so they survive grey printing and colour blindness
SCORE_NAMES = {"accuracy": "accuracy", "r2": "R²"}
PACKAGES = (
    "diffprobe",
    "matplotlib",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "xarray",
    "torch",
    "diffusers",
    "transformers",
)


# --- style and files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The package's look, for the length of a `with` block.

    >>> with style():
    ...     matplotlib.rcParams["savefig.dpi"]
    200.0
    """
    look: dict[Any, Any] = {  # matplotlib types the keys as one long literal
        "font.family": "DejaVu Sans",
        "font.size": 7.5,
        "axes.titlesize": 7.5,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "figure.titlesize": 8,
        "figure.dpi": 200,
        "savefig.dpi": 200,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "lines.linewidth": 1.2,
        "lines.markersize": 3,
        "axes.prop_cycle": matplotlib.rcsetup.cycler(color=OKABE_ITO),
        "image.interpolation": "nearest",
        "pdf.fonttype": 42,  # text stays text
    }
    with matplotlib.rc_context(look):
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws inside `style()`."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return inner


def save_figure(
    figure: Figure, folder: str | Path, name: str, frame: pd.DataFrame, config: Mapping[str, Any], alt: str
) -> dict[str, Path]:
    """Writes NAME.png, NAME.pdf, NAME.csv (the plotted rows) and NAME.json (config, versions, alt text).

    Nothing in the files depends on the clock or the folder: equal input gives equal bytes.

    Args:
        figure: What to save.
        folder: Made when absent.
        name: The files' common stem.
        frame: The rows that the figure shows; `read_rows` gives them back unchanged.
        config: What the figure was made from: options, seed, commit.
        alt: What a reader who cannot see the picture should know: what is drawn and what it shows.

    Returns:
        The four paths by suffix ("png", "pdf", "csv", "json").

    Raises:
        ValueError: When the alt text is empty or the name has a folder in it.
    """
    if not alt.strip():
        raise ValueError(f"Figure {name!r} needs an alt text: say what is drawn and what it shows.")
    if Path(name).name != name:
        raise ValueError(f"A figure's name is a plain file stem; got {name!r}. Give the folder as `folder`.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = {suffix: Path(folder) / f"{name}.{suffix}" for suffix in ("png", "pdf", "csv", "json")}
    with style():
        figure.savefig(paths["png"], metadata={"Software": None})
        # the PDF keeps the picture's layout; computing it again costs most of the time
        engine = figure.get_layout_engine()
        figure.set_layout_engine("none")
        figure.savefig(paths["pdf"], metadata={"Creator": None, "Producer": None, "CreationDate": None})
        figure.set_layout_engine(engine)
    frame.to_csv(paths["csv"], index=False, lineterminator="\n")
    sidecar = {"alt": alt, "config": dict(config), "rows": len(frame), "versions": _versions()}
    text = json.dumps(sidecar, indent=2, sort_keys=True, default=_plain, ensure_ascii=False)
    paths["json"].write_text(text + "\n", encoding="utf-8")
    return paths


def read_rows(path: str | Path) -> pd.DataFrame:
    """Reads a figure's CSV back.

    A column becomes numbers only where these would be written as the same text, so that no digit and no word is
    lost: the conditioning "null" stays a word (pandas alone would call it missing) and the id "007" keeps its zeros.
    """
    return pd.read_csv(path, dtype=str, keep_default_na=False).apply(_typed)


def _typed(cells: pd.Series) -> pd.Series:
    """Text as truth values, whole numbers or floats (empty cells are NaN), else as it is."""
    texts = cells.tolist()
    if texts and set(texts) <= {"True", "False"}:
        return cells == "True"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            numbers = [kind(text) if text else float("nan") for text in texts]
            if all(not text or str(number) == text for text, number in zip(texts, numbers, strict=True)):
                return pd.Series(numbers, index=cells.index, name=cells.name)
    return cells


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _plain(value: object) -> object:
    """What JSON does not know: NumPy's numbers and arrays, paths and everything else by its text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


# --- pictures ------------------------------------------------------------------------------------------


@styled
def plot_pca_grid(
    images: NDArray[np.uint8],
    pca: Mapping[str, xr.DataArray],
    *,
    sample_names: Sequence[str] | None = None,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """One row per sample: the image, then one column of PCA colours per site (or per timestep).

    Args:
        images: (sample, y, x, 3).
        pca: By column title, (sample, y, x, rgb) in [0, 1]; see `diffprobe.probes.pca.pca_rgb`.
        sample_names: Written beside the rows.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: When a column has another number of samples than there are images.
    """
    for name, colours in pca.items():
        if colours.sizes["sample"] != len(images):
            raise ValueError(f"Column {name!r} has {colours.sizes['sample']} samples; there are {len(images)} images.")
    columns, rows = 1 + len(pca), len(images)
    cell = width / columns
    titles = ["image", *(_wrap(name, cell) for name in pca)]
    lines = max(t.count("\n") + 1 for t in titles)
    aspect = images.shape[1] / images.shape[2]
    figure, axes = _grid(rows, columns, width, rows * (cell - 0.04) * aspect + 0.13 * lines + 0.2 * bool(title))
    _pad(figure, 0.01, 0.01)
    for row in range(rows):
        axes[row, 0].imshow(images[row])
        for column, colours in enumerate(pca.values(), start=1):
            picture = colours.isel(sample=row).transpose("y", "x", "rgb").to_numpy()
            axes[row, column].imshow(np.clip(picture, 0, 1))
        if sample_names is not None:
            axes[row, 0].set_ylabel(str(sample_names[row]))
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, pad=3)
    for axis in axes.flat:
        _bare(axis)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_heatmaps(
    image: NDArray[np.uint8],
    maps: xr.DataArray,
    *,
    words: Sequence[str] | None = None,
    shared_scale: bool = False,
    columns: int = 6,
    opacity: float = 0.75,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """The image, then each word's heat map, enlarged bilinearly and laid over the greyed image.

    Every map has its own colour scale and bar, from its smallest to its largest value, because words differ in
    their total by orders of magnitude; `shared_scale` puts all on one scale with one bar, to compare amounts.
    A map is drawn fainter where it is low, so that the image stays visible there.

    Args:
        image: (y, x, 3).
        maps: (word, y, x) or (token, y, x).
        words: Titles; by default the first dimension's coordinate.
        shared_scale: One scale for all maps.
        columns: Pictures in a row.
        opacity: Of the map's highest value over the image.
        title: Above the figure.
        width: In inches.
    """
    first = next((d for d in maps.dims if d not in ("y", "x")), None)
    if maps.ndim != 3 or first is None:
        raise ValueError(f"Maps need one dimension beside y and x, such as word; these have {maps.dims}.")
    values = maps.transpose(first, "y", "x").to_numpy().astype(np.float32)
    names = list(words) if words is not None else [str(w) for w in maps[first].values]
    if len(names) != len(values):
        raise ValueError(f"{len(names)} words for {len(values)} maps; each map needs one title.")
    rows = -(-(len(values) + 1) // columns)
    columns = -(-(len(values) + 1) // rows)  # no row much shorter than the others
    cell = (width - 0.4 * shared_scale) / columns
    height = rows * (cell * image.shape[0] / image.shape[1] + (0.17 if shared_scale else 0.37)) + 0.2 * bool(title)
    figure, axes = _grid(rows, columns, width, height)
    _pad(figure, 0.02, 0.02)
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("image", pad=3)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    panels = list(axes.flat)[1:]
    for axis, name, heat in zip(panels, names, values, strict=False):
        large = np.asarray(Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
        low, high = (float(values.min()), float(values.max())) if shared_scale else (float(heat.min()), float(heat.max()))
        high = high if high > low else low + 1e-12
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
        drawn = axis.imshow(
            large, cmap=HEAT, vmin=low, vmax=high, alpha=opacity * (0.3 + 0.7 * np.clip((large - low) / (high - low), 0, 1))
        )
        axis.set_title(_wrap(name, cell), pad=3)
        if not shared_scale:
            bar = figure.colorbar(_opaque(drawn), ax=axis, location="bottom", fraction=0.06, pad=0.02, aspect=14, shrink=0.92)
            bar.outline.set_visible(False)
            _ends(bar.ax, low, high)
    for axis in axes.flat:
        _bare(axis)
        axis.set_anchor("N")  # the image has no bar below it
    for axis in panels[len(values) :]:
        axis.set_axis_off()
    if shared_scale:
        figure.colorbar(_opaque(drawn), ax=axes, fraction=0.02, pad=0.01, aspect=30)
    if title:
        figure.suptitle(title)
    return figure


def _opaque(drawn: AxesImage) -> matplotlib.cm.ScalarMappable:
    return matplotlib.cm.ScalarMappable(drawn.norm, drawn.cmap)


def _ends(axis: Axes, low: float, high: float) -> None:
    """Marks only the ends of a horizontal colour bar, inside its width."""
    axis.set_xticks([low, high], ["0" if abs(low) < 1e-3 * abs(high) else f"{low:.2g}", f"{high:.2g}"])
    axis.tick_params(length=0, pad=1, labelsize=6)
    left, right = axis.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")


# --- probe tables --------------------------------------------------------------------------------------


@styled
def plot_probe_grid(frame: pd.DataFrame, *, control: bool = True, title: str = "", width: float = PAGE) -> Figure:
    """Site x timestep heat maps of probe scores, with the control task beside them.

    One row of panels per label and conditioning; both panels of a row share their colours, and a line on the colour
    bar marks chance (its mean over the cells).

    Args:
        frame: Rows of `diffprobe.probes.linear.probe_table`: site, timestep, label, score, value, chance and,
            for the control, control_accuracy; one row per cell.
        control: Whether to draw the control beside the score, where the frame has it.
        title: Above the figure.
        width: In inches.
    """
    panels = _panels(frame, ["site", "timestep"])
    control = control and "control_accuracy" in frame and bool(frame["control_accuracy"].notna().any())
    kinds = ["value", "control_accuracy"] if control else ["value"]
    sites = list(dict.fromkeys(frame["site"]))
    steps = sorted(dict.fromkeys(frame["timestep"]))
    figure, axes = _grid(len(panels), len(kinds), width, len(panels) * (0.21 * len(sites) + 0.62) + 0.2 * bool(title))
    _pad(figure, 0.03, 0.04)
    for row, (heading, part) in enumerate(panels):
        chance = float(part["chance"].mean())
        shown = part[kinds].to_numpy(dtype=float)
        low, high = min(float(np.nanmin(shown)), chance), max(float(np.nanmax(shown)), chance)
        high = high if high > low else low + 1e-6
        score = SCORE_NAMES.get(part["score"].iloc[0], part["score"].iloc[0])
        for column, kind in enumerate(kinds):
            axis = axes[row, column]
            table = part.pivot(index="site", columns="timestep", values=kind).reindex(index=sites, columns=steps)
            drawn = axis.imshow(table.to_numpy(dtype=float), cmap=SCORES, vmin=low, vmax=high, aspect="auto")
            _write_cells(axis, table.to_numpy(dtype=float), drawn)
            axis.set_xticks(range(len(steps)), [str(s) for s in steps])
            axis.set_yticks(range(len(sites)), [str(s) for s in sites] if column == 0 else [])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(f"{heading}: {score}" if column == 0 else f"control task: {score}", pad=3)
            if row == len(panels) - 1:
                axis.set_xlabel("timestep (noise grows to the right)")
        bar = figure.colorbar(drawn, ax=axes[row, :], fraction=0.2 / width, pad=0.01, aspect=2.1 * len(sites))
        bar.outline.set_visible(False)
        bar.ax.axhline(chance, color="white", linewidth=2.4)
        bar.ax.axhline(chance, color=OKABE_ITO[1], linewidth=1.2)
        _mark_chance(bar.ax, chance, low, high)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_probe_curves(
    frame: pd.DataFrame, *, control: bool = False, columns: int = 2, title: str = "", width: float = PAGE
) -> Figure:
    """Score against timestep, one curve per site with its interval as a band, and a line at chance.

    Args:
        frame: Rows of `diffprobe.probes.linear.probe_table`; one row per site, timestep, label and conditioning.
        control: Whether to add the control task, as thin lines without markers.
        columns: Panels in a row.
        title: Above the figure.
        width: In inches.
    """
    panels = _panels(frame, ["site", "timestep"])
    sites = list(dict.fromkeys(frame["site"]))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    longest = max(len(str(s)) for s in sites)
    across = max(1, min(len(sites), int(width / (0.055 * longest + 0.45))))
    legend = 0.15 * -(-(len(sites) + 2) // across) + 0.1
    figure, axes = _grid(rows, columns, width, rows * min(2.1, 0.62 * width / columns + 0.3) + legend + 0.2 * bool(title))
    thin: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.8}
    for axis, (heading, part) in zip(axes.flat, panels, strict=False):
        score = SCORE_NAMES.get(part["score"].iloc[0], part["score"].iloc[0])
        for k, site in enumerate(sites):
            curve = part[part["site"] == site].sort_values("timestep")
            look = {"color": OKABE_ITO[k % len(OKABE_ITO)], "linestyle": LINES[k // len(OKABE_ITO) % len(LINES)]}
            axis.plot(curve["timestep"], curve["value"], marker=MARKERS[k % len(MARKERS)], label=str(site), **look)
            axis.fill_between(curve["timestep"], curve["low"], curve["high"], color=look["color"], alpha=0.15, linewidth=0)
            if control and "control_accuracy" in curve:
                axis.plot(curve["timestep"], curve["control_accuracy"], **{**thin, "color": look["color"]})
        chance = part.groupby("timestep")["chance"].mean()
        axis.plot(chance.index, chance, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1, label="chance")
        axis.set_title(heading)
        axis.set_ylabel(score)
        axis.set_xlabel("timestep (noise grows to the right)")
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if control:
        handles, labels = [*handles, Line2D([], [], color="0.35", **thin)], [*labels, "control task"]
    figure.legend(handles, labels, loc="outside lower center", ncols=across, handlelength=2.2, columnspacing=1.2)
    if title:
        figure.suptitle(title)
    return figure


def _panels(frame: pd.DataFrame, within: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """The table split by label and conditioning, each part with its heading; refuses cells with several rows."""
    if absent := [c for c in (*within, "label", "score", "value", "chance") if c not in frame]:
        raise ValueError(f"The table has no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}.")
    if frame.empty:
        raise ValueError("The table has no rows; there is nothing to draw.")
    by: list[Hashable] = ["label", *(["conditioning"] if "conditioning" in frame else [])]
    panels = []
    for key, part in frame.groupby(by, sort=False, dropna=False):
        words = [str(k) for k in key] if isinstance(key, tuple) else [str(key)]
        if part.duplicated(within).any():
            varying = [str(c) for c in ("seed", "guidance", "draw", "head") if c in part and part[c].nunique() > 1]
            hint = f"; {', '.join(varying)} differ within them" if varying else ""
            raise ValueError(
                f"{', '.join(words)}: some cells of {' x '.join(within)} have several rows{hint}. Select or average first."
            )
        several = "conditioning" in frame and frame["conditioning"].nunique() > 1
        panels.append((f"{words[0]} ({words[1]})" if several else words[0], part))
    return panels


def _mark_chance(axis: Axes, chance: float, low: float, high: float) -> None:
    """Writes chance beside a vertical colour bar, in place of the ticks that would touch it."""
    near = 0.09 * (high - low)
    ticks = [float(v) for v in axis.get_yticks() if low <= v <= high and abs(v - chance) > near]
    axis.set_yticks([*ticks, chance], [*(f"{v:.2g}" for v in ticks), f"chance {_short(chance)}"])
    axis.tick_params(length=2)
    axis.get_yticklabels()[-1].set_color(OKABE_ITO[1])


def _short(value: float) -> str:
    """Two decimals without the leading zero.

    >>> _short(0.514), _short(-0.02), _short(1.0), _short(-0.001)
    ('.51', '-.02', '1.00', '.00')
    """
    text = f"{value:.2f}"
    if text == "-0.00":
        text = "0.00"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def _write_cells(axis: Axes, table: NDArray[np.float64], drawn: AxesImage) -> None:
    """Writes every number into its cell, dark on light and light on dark."""
    size = 6.5 if table.shape[1] <= 8 else 5.0
    lightness = np.asarray(drawn.cmap(drawn.norm(table)))[..., :3] @ (0.299, 0.587, 0.114)
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        dark = lightness[row, column] < 0.5
        axis.text(
            column, row, _short(float(value)), ha="center", va="center", fontsize=size, color="white" if dark else "black"
        )


# --- layout --------------------------------------------------------------------------------------------


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _pad(figure: Figure, inches: float, space: float) -> None:
    figure.get_layout_engine().set(w_pad=inches, h_pad=inches, wspace=space, hspace=space)  # type: ignore[union-attr,call-arg]


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _wrap(name: str, inches: float, points: float = 7.5) -> str:
    """Breaks a long name after its hyphens, dots, slashes and spaces so that it fits a width.

    >>> _wrap("U-L1-R1-B0-Cross-Q", 0.7).split(chr(10))
    ['U-L1-R1-B0-', 'Cross-Q']
    """
    fits = max(4, int(inches * 72 / (0.6 * points)))
    lines, current = [], ""
    for piece in _pieces(name):
        if current and len(current) + len(piece.rstrip()) > fits:
            lines.append(current.rstrip())
            current = ""
        current += piece
    return "\n".join([*lines, current.rstrip()])


def _pieces(name: str) -> Iterator[str]:
    """Parts of a name, each ending with its separator."""
    start = 0
    for index, character in enumerate(name):
        if character in "-./_ ":
            yield name[start : index + 1]
            start = index + 1
    yield name[start:]


@styled
def plot_scores(frame: pd.DataFrame, *, title: str = "", width: float = COLUMN) -> Figure:
    """Scores as dots with their intervals, one line each, a tick at each one's chance.

    Args:
        frame: Rows with what, value, low, high, chance; rows of the same `what` share a line, coloured by `timestep`.
        title: Above the figure.
        width: In inches.
    """
    names = list(dict.fromkeys(frame["what"]))
    steps = sorted(frame["timestep"].dropna().unique()) if "timestep" in frame else []
    figure, axes = _grid(1, 1, width, 0.24 * len(names) + 0.55 + 0.25 * bool(steps) + 0.2 * bool(title))
    axis = axes[0, 0]
    for line, name in enumerate(names):
        rows = frame[frame["what"] == name]
        for _, found in rows.iterrows():
            place = steps.index(found["timestep"]) if steps and found["timestep"] in steps else None
            shift = 0.0 if place is None else 0.22 * (place - (len(steps) - 1) / 2)
            colour = "0.2" if place is None else OKABE_ITO[place % len(OKABE_ITO)]
            axis.plot([found["low"], found["high"]], [line + shift] * 2, color=colour, linewidth=1)
            axis.plot(found["value"], line + shift, marker="o", markersize=3, color=colour, linestyle="none")
        axis.plot([rows["chance"].mean()] * 2, [line - 0.4, line + 0.4], color="0.55", linewidth=1, linestyle=(0, (2, 1)))
    for place, step in enumerate(steps):
        axis.plot([], [], marker="o", markersize=3, color=OKABE_ITO[place % len(OKABE_ITO)], label=f"timestep {step:g}")
    axis.plot([], [], color="0.55", linewidth=1, linestyle=(0, (2, 1)), label="chance")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share correct, 95% interval")
    axis.grid(axis="x", color="0.9", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title)
    return figure
