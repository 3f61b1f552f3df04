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
import warnings
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
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from diffprobe.console import visible
from diffprobe.store import whole_file

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
OLD_COLUMNS = {"control_accuracy": "control_value"}  # of tables written before the name was changed
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
        "text.parse_math": False,  # a dollar in a caption is a dollar
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
    paths = {suffix: Path(folder) / f"{name}.{suffix}" for suffix in ("png", "pdf", "csv", "json")}
    sidecar = {"alt": alt, "config": dict(config), "rows": len(frame), "versions": package_versions()}
    text = json.dumps(sidecar, indent=2, sort_keys=True, default=_plain, ensure_ascii=False)
    with contextlib.ExitStack() as held, style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box; the rows have the words
        for label in figure.findobj(Text):
            label.set_text(visible(label.get_text()))
        # all four are written before one takes its place; the sidecar is the last
        parts = {suffix: held.enter_context(whole_file(paths[suffix])) for suffix in reversed(paths)}
        figure.savefig(parts["png"], format="png", metadata={"Software": None})
        # the PDF keeps the picture's layout; computing it again costs most of the time
        engine = figure.get_layout_engine()
        figure.set_layout_engine("none")
        figure.savefig(parts["pdf"], format="pdf", metadata={"Creator": None, "Producer": None, "CreationDate": None})
        figure.set_layout_engine(engine)
        frame.to_csv(parts["csv"], index=False, lineterminator="\n")
        parts["json"].write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # a name can be no text
    return paths


def read_rows(path: str | Path) -> pd.DataFrame:
    """Reads a figure's CSV back.

    A column becomes numbers only where these would be written as the same text, so that no digit and no word is
    lost: the conditioning "null" stays a word (pandas alone would call it missing) and the id "007" keeps its zeros.
    """
    return pd.read_csv(path, dtype=str, keep_default_na=False).apply(_typed)


def read_sidecars(out: Path) -> dict[str, dict[str, Any]]:
    """The JSON of every figure in a folder by the figure's name; files that are something else are left out."""
    found = {}
    for path in sorted(out.glob("*.json")):
        with contextlib.suppress(ValueError):
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(sidecar, dict) and "alt" in sidecar and path.with_suffix(".png").is_file():
                found[path.stem] = sidecar
    return found


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


def package_versions() -> dict[str, str]:
    """Of Python and of the packages that numbers and pictures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _plain(value: object) -> object:
    """What JSON does not know: NumPy's numbers and arrays, paths and everything else by its text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def heat_colours() -> NDArray[np.uint8]:
    """The colours of heat maps from lowest to highest, (256, 3), for pages that draw them on their own."""
    return (np.asarray(matplotlib.colormaps[HEAT](np.linspace(0, 1, 256)))[:, :3] * 255).round().astype(np.uint8)


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
    titles = ["image", *(wrap(name, cell) for name in pca)]
    lines = max(t.count("\n") + 1 for t in titles)
    aspect = images.shape[1] / images.shape[2]
    figure, axes = grid(rows, columns, width, rows * (cell - 0.04) * aspect + 0.13 * lines + 0.2 * bool(title))
    pad(figure, 0.01, 0.01)
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
        bare(axis)
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
    figure, axes = grid(rows, columns, width, height)
    pad(figure, 0.02, 0.02)
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
        axis.set_title(wrap(name, cell), pad=3)
        if not shared_scale:
            bar = figure.colorbar(_opaque(drawn), ax=axis, location="bottom", fraction=0.06, pad=0.02, aspect=14, shrink=0.92)
            bar.outline.set_visible(False)
            _ends(bar.ax, low, high)
    for axis in axes.flat:
        bare(axis)
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
        frame: Rows of `diffprobe.probes.fitting.probe_table`: site, timestep, label, score, value, chance and,
            for the control, control_value; one row per cell.
        control: Whether to draw the control beside the score, where the frame has it.
        title: Above the figure.
        width: In inches.
    """
    frame = frame.rename(columns=OLD_COLUMNS)
    panels = _panels(frame, ["site", "timestep"])
    control = control and "control_value" in frame and bool(frame["control_value"].notna().any())
    kinds = ["value", "control_value"] if control else ["value"]
    sites = list(dict.fromkeys(frame["site"]))
    steps = sorted(dict.fromkeys(frame["timestep"]))
    figure, axes = grid(len(panels), len(kinds), width, len(panels) * (0.21 * len(sites) + 0.62) + 0.2 * bool(title))
    pad(figure, 0.03, 0.04)
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
            bold = None
            if "bold" in part and kind == "value":
                marked = part.pivot(index="site", columns="timestep", values="bold").reindex(index=sites, columns=steps)
                bold = marked.eq(True).to_numpy()  # a cell that is not there is not bold
            _write_cells(axis, table.to_numpy(dtype=float), drawn, bold)
            axis.set_xticks(range(len(steps)), [f"{s:g}" for s in steps])
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
        frame: Rows of `diffprobe.probes.fitting.probe_table`; one row per site, timestep, label and conditioning.
        control: Whether to add the control task, as thin lines without markers.
        columns: Panels in a row.
        title: Above the figure.
        width: In inches.
    """
    frame = frame.rename(columns=OLD_COLUMNS)
    panels = _panels(frame, ["site", "timestep"])
    sites = list(dict.fromkeys(frame["site"]))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    longest = max(len(str(s)) for s in sites)
    across = max(1, min(len(sites), int(width / (0.055 * longest + 0.45))))
    legend = 0.15 * -(-(len(sites) + 2) // across) + 0.1
    figure, axes = grid(rows, columns, width, rows * min(2.1, 0.62 * width / columns + 0.3) + legend + 0.2 * bool(title))
    thin: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.8}
    for axis, (heading, part) in zip(axes.flat, panels, strict=False):
        score = SCORE_NAMES.get(part["score"].iloc[0], part["score"].iloc[0])
        for k, site in enumerate(sites):
            curve = part[part["site"] == site].sort_values("timestep")
            look = {"color": OKABE_ITO[k % len(OKABE_ITO)], "linestyle": LINES[k // len(OKABE_ITO) % len(LINES)]}
            axis.plot(curve["timestep"], curve["value"], marker=MARKERS[k % len(MARKERS)], label=str(site), **look)
            axis.fill_between(curve["timestep"], curve["low"], curve["high"], color=look["color"], alpha=0.15, linewidth=0)
            if control and "control_value" in curve:
                axis.plot(curve["timestep"], curve["control_value"], **{**thin, "color": look["color"]})
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
    axis.set_yticks([*ticks, chance], [*(f"{v:.2g}" for v in ticks), f"chance {short(chance)}"])
    axis.tick_params(length=2)
    axis.get_yticklabels()[-1].set_color(OKABE_ITO[1])


def short(value: float) -> str:
    """Two decimals without the leading zero.

    >>> short(0.514), short(-0.02), short(1.0), short(-0.001)
    ('.51', '-.02', '1.00', '.00')
    """
    text = f"{value:.2f}"
    if text == "-0.00":
        text = "0.00"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def _write_cells(axis: Axes, table: NDArray[np.float64], drawn: AxesImage, bold: NDArray[np.bool_] | None = None) -> None:
    """Writes every number into its cell, dark on light and light on dark."""
    size = 6.5 if table.shape[1] <= 8 else 5.0
    lightness = np.asarray(drawn.cmap(drawn.norm(table)))[..., :3] @ (0.299, 0.587, 0.114)
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        dark = lightness[row, column] < 0.5
        axis.text(
            column, row, short(float(value)), ha="center", va="center", fontsize=size, color="white" if dark else "black",
            fontweight="bold" if bold is not None and bold[row, column] else "normal",
        )  # fmt: skip


# --- layout --------------------------------------------------------------------------------------------


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def pad(figure: Figure, inches: float, space: float) -> None:
    figure.get_layout_engine().set(w_pad=inches, h_pad=inches, wspace=space, hspace=space)  # type: ignore[union-attr,call-arg]


def bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def wrap(name: str, inches: float, points: float = 7.5) -> str:
    """Breaks a long name after its hyphens, dots, slashes and spaces so that it fits a width.

    >>> wrap("U-L1-R1-B0-Cross-Q", 0.7).split(chr(10))
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


# --- similarity ----------------------------------------------------------------------------------------


@styled
def plot_site_curves(
    frame: pd.DataFrame,
    *,
    x: str = "timestep",
    x_label: str = "timestep (noise grows to the right)",
    y_label: str = "",
    columns: int = 3,
    share_y: bool = False,
    chance_name: str = "chance",
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """A panel per kind of number, and in it one curve per site over `x` with its interval as a band.

    Chance is a thin dotted line in the site's colour, or one grey line where all sites share it.  Rows without an interval
    (published numbers) have no band.

    Args:
        frame: Rows of panel, site, value, low, high, chance and the column `x`; one row per panel, site and x.
        x: What runs to the right.
        x_label: Below the lowest panel of each column.
        y_label: Beside the leftmost panels.
        columns: Panels in a row.
        share_y: One scale for all panels.
        chance_name: What chance is called in the legend.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: columns are missing, there are no rows, or a place has several.
    """
    if absent := [c for c in ("panel", "site", x, "value", "low", "high", "chance") if c not in frame]:
        raise ValueError(f"The table has no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}.")
    if frame.empty or frame.duplicated(["panel", "site", x]).any():
        found = "no rows" if frame.empty else f"several rows for some panel, site and {x}; select or average first"
        raise ValueError(f"The table has {found}.")
    names, sites = (list(dict.fromkeys(frame[c])) for c in ("panel", "site"))
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    across = max(1, min(len(sites) + 1, int(width / (0.055 * max(len(str(s)) for s in sites) + 0.45))))
    legend = 0.15 * -(-(len(sites) + 1) // across) + 0.1
    figure, axes = grid(rows, columns, width, rows * min(2.2, 0.75 * width / columns + 0.3) + legend + 0.2 * bool(title))
    dotted: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (1, 1.5))}
    for place, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        part = frame[frame["panel"] == name]
        common = part.dropna(subset="chance").groupby(x)["chance"].nunique().le(1).all()
        for k, site in enumerate(sites):
            curve = part[part["site"] == site].sort_values(x)
            look = {"color": OKABE_ITO[k % len(OKABE_ITO)], "linestyle": LINES[k // len(OKABE_ITO) % len(LINES)]}
            axis.plot(curve[x], curve["value"], marker=MARKERS[k % len(MARKERS)], label=str(site), **look)
            axis.fill_between(curve[x], curve["low"], curve["high"], color=look["color"], alpha=0.18, linewidth=0)
            if not common:
                axis.plot(curve[x], curve["chance"], zorder=1, **{**dotted, "color": look["color"]})
        if common and part["chance"].notna().any():
            line = part.groupby(x)["chance"].mean()
            axis.plot(line.index, line, color="0.35", zorder=1, **dotted)
        axis.set_title(wrap(str(name), width / columns, 5.5), pad=4)
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        if place + columns >= len(names):
            axis.set_xlabel(x_label)
        if place % columns == 0:
            axis.set_ylabel(y_label)
    shown = list(axes.flat)[: len(names)]
    for axis in list(axes.flat)[len(names) :]:
        axis.set_axis_off()
    if share_y:
        ends = [axis.get_ylim() for axis in shown]
        for axis in shown:
            axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    handles, labels = shown[0].get_legend_handles_labels()
    if frame["chance"].notna().any():
        handles, labels = [*handles, Line2D([], [], color="0.35", **dotted)], [*labels, chance_name]
    figure.legend(handles, labels, loc="outside lower center", ncols=across, handlelength=2.2, columnspacing=1.2)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_similarity_matrix(
    frame: pd.DataFrame, between: str, *, columns: int = 3, title: str = "", width: float = PAGE
) -> Figure:
    """Every two timesteps, conditionings or sites against each other: a heat map for each panel, mirrored, numbers written in.

    Args:
        frame: Rows of `diffprobe.probes.similarity.similarity`: panel, BETWEEN_a, BETWEEN_b, value.
        between: What is compared, such as "timestep".
        columns: Panels in a row.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: columns are missing, there are no rows, or a cell has several.
    """
    first, second = f"{between}_a", f"{between}_b"
    if absent := [c for c in ("panel", first, second, "value") if c not in frame]:
        raise ValueError(f"The table has no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}.")
    if frame.empty or frame.duplicated(["panel", first, second]).any():
        found = "no rows" if frame.empty else f"several rows for some panel and two {between}s; select or average first"
        raise ValueError(f"The table has {found}.")
    names = list(dict.fromkeys(frame["panel"]))
    entries = list(dict.fromkeys([*frame[first], *frame[second]]))
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    cell = width / columns
    figure, axes = grid(rows, columns, width, rows * (0.8 * cell + 0.2) + 0.2 * bool(title))
    low = min(0.0, float(frame["value"].min()))
    place = {entry: index for index, entry in enumerate(entries)}
    for axis, name in zip(axes.flat, names, strict=False):
        table = np.full((len(entries), len(entries)), np.nan)
        for a, b, value in frame.loc[frame["panel"] == name, [first, second, "value"]].itertuples(index=False):
            table[place[a], place[b]] = table[place[b], place[a]] = value
        drawn = axis.imshow(table, cmap=SCORES, vmin=low, vmax=1)
        _write_cells(axis, table, drawn)
        texts = [wrap(str(entry), cell / 4) for entry in entries]
        axis.set_xticks(range(len(entries)), texts, rotation=0 if max(map(len, texts)) < 6 else 90)
        axis.set_yticks(range(len(entries)), texts)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(wrap(str(name), cell, 5.5), pad=4)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_axis_off()
    figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01).outline.set_visible(False)
    if title:
        figure.suptitle(title)
    return figure


# --- localization --------------------------------------------------------------------------------------

LOCALIZATION_NAMES = {
    "pointing": "pointing game",
    "mass": "mass in the mask",
    "lift": "mass over area",
    "iou_fixed": "IoU above 0.4",
    "iou_otsu": "IoU, Otsu",
    "iou_tuned": "IoU, tuned",
    "auc": "ROC-AUC",
    "ap": "average precision",
    "nss": "NSS",
}


@styled
def plot_localization_grid(
    frame: pd.DataFrame, *, against: str = "wrong word", columns: int = 3, title: str = "", width: float = PAGE
) -> Figure:
    """Site x timestep heat maps, one panel a score; cells that beat a control are framed.

    Args:
        frame: Rows of `diffprobe.probes.grounding.attention_localization` or `difference_localization`, of one role,
            conditioning and head.
        against: The control; a cell is framed where the own map scores above it with a Holm-adjusted p below .05.
        columns: Panels in a row.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: columns or rows are missing, or a cell has several rows.
    """
    mine = _own_lines(frame, ["site", "timestep"])
    control = frame[frame["map"] == against].set_index(["score", "site", "timestep"])["p_holm"]
    scores = [score for score in LOCALIZATION_NAMES if score in set(mine["score"])]
    sites, steps = list(dict.fromkeys(mine["site"])), sorted(dict.fromkeys(mine["timestep"]))
    columns = min(columns, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = grid(rows, columns, width, rows * (0.145 * len(sites) + 0.42) + 0.15 + 0.2 * bool(title))
    pad(figure, 0.02, 0.02)
    for place, (axis, score) in enumerate(zip(axes.flat, scores, strict=False)):
        part = mine[mine["score"] == score]
        table = part.pivot(index="site", columns="timestep", values="value").reindex(index=sites, columns=steps)
        drawn = axis.imshow(table.to_numpy(dtype=float), cmap=SCORES, aspect="auto")
        _write_cells(axis, table.to_numpy(dtype=float), drawn)
        for y, site in enumerate(sites):
            for x, step in enumerate(steps):
                if control.get((score, site, step), 1.0) < 0.05:
                    axis.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=OKABE_ITO[1], linewidth=1))
        axis.set_title(f"{LOCALIZATION_NAMES[score]} (chance {short(float(part['chance'].mean()))})", pad=3)
        axis.set_xticks(range(len(steps)), [str(s) for s in steps] if place + columns >= len(scores) else [])
        axis.set_yticks(range(len(sites)), [_site_name(s) for s in sites] if place % columns == 0 else [])
        axis.tick_params(length=0, labelsize=6.5)
        axis.spines[:].set_visible(False)
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    figure.supxlabel(
        f"timestep (noise grows to the right); framed: above the control “{against}”, p < .05 (Holm)", fontsize=7.5
    )
    if title:
        figure.suptitle(title)
    return figure


def _site_name(site: object) -> str:
    """
    >>> _site_name("U-L2-R1-B0-Cross-Map"), _site_name("all sites")
    ('U-L2-R1-B0', 'all sites')
    """
    return str(site).removesuffix("-Cross-Map")


def _own_lines(frame: pd.DataFrame, within: list[str]) -> pd.DataFrame:
    """The lines of the maps themselves, one for each score and cell."""
    needed = [*within, "map", "score", "value", "low", "high", "chance", "p_holm"]
    if absent := [c for c in needed if c not in frame]:
        raise ValueError(f"The table has no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}.")
    if frame.empty:
        raise ValueError("The table has no rows; there is nothing to draw.")
    mine = frame[frame["map"] == frame["map"].iloc[0]]
    if mine.duplicated(["score", *within]).any():
        varying = [c for c in ("role", "conditioning", "head", "seed") if c in mine and mine[c].nunique() > 1]
        raise ValueError(f"Some cells have several rows; {', '.join(varying) or 'they'} differ within them. Select first.")
    return mine


def localization_figures(frame: pd.DataFrame, score: str = "auc") -> dict[str, Figure]:
    """What there is to draw of a table of `diffprobe probe localization`, by suffix: grids and controls, curves, heads.

    A grid and a picture of the controls for each role or conditioning; controls at the site with the highest score.
    """
    by = "role" if "role" in frame else "conditioning"
    means = frame[frame["head"].astype(str) == "mean"] if "head" in frame else frame
    own = str(frame["map"].iloc[0])
    figures = {"curves": plot_localization_curves(means, score, by=by)}
    for kind, part in means.groupby(by, sort=False):
        best = part[(part["map"] == own) & (part["score"] == score)].sort_values("value")["site"].iloc[-1]
        against = "wrong word" if own == "word" else "other text"
        figures[str(kind)] = plot_localization_grid(part, against=against, title=f"{kind}: {own} and mask")
        figures[f"{kind}_controls"] = plot_localization_controls(part[part["site"] == best], title=f"{kind} at {best}")
        if len(means) < len(frame):
            heads = frame[(frame[by] == kind) & (frame["timestep"] == frame["timestep"].min()) & (frame["site"] != "all sites")]
            figures[f"{kind}_heads"] = plot_localization_heads(
                heads, score, title=f"{kind}, timestep {frame['timestep'].min()}"
            )
    return figures


@styled
def plot_localization_controls(frame: pd.DataFrame, *, columns: int = 3, title: str = "", width: float = PAGE) -> Figure:
    """Each score of the maps and of their controls as dots with intervals, coloured by timestep, chance dashed.

    Args:
        frame: Rows of one site, role, conditioning and head.
        columns: Panels in a row.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: columns or rows are missing, or a cell has several rows.
    """
    _own_lines(frame, ["timestep"])
    scores = [score for score in LOCALIZATION_NAMES if score in set(frame["score"])]
    steps = sorted(dict.fromkeys(frame["timestep"]))
    names = [name for name in dict.fromkeys(frame["map"]) if frame.loc[frame["map"] == name, "value"].notna().any()]
    columns = min(columns, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = grid(rows, columns, width, rows * (0.19 * len(names) + 0.42) + 0.25 + 0.2 * bool(title))
    for place, (axis, score) in enumerate(zip(axes.flat, scores, strict=False)):
        part = frame[frame["score"] == score]
        for line, name in enumerate(names):
            for _, found in part[part["map"] == name].iterrows():
                k = steps.index(found["timestep"])
                height = line + 0.5 * ((k + 0.5) / len(steps) - 0.5)
                colour = OKABE_ITO[k % len(OKABE_ITO)]
                axis.plot([found["low"], found["high"]], [height] * 2, color=colour, linewidth=1)
                axis.plot(found["value"], height, marker="o", markersize=2.5, color=colour, linestyle="none")
        chance = float(part.loc[part["map"] == names[0], "chance"].mean())
        axis.axvline(chance, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axis.set_title(LOCALIZATION_NAMES[score], pad=3)
        axis.set_yticks(range(len(names)), names if place % columns == 0 else [])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], marker="o", markersize=3, color=OKABE_ITO[k % len(OKABE_ITO)]) for k in range(len(steps))]
    handles.append(Line2D([], [], color="0.35", linewidth=0.9, linestyle=(0, (4, 2))))
    figure.legend(handles, [*(f"timestep {s}" for s in steps), "chance"], loc="outside lower center", ncols=len(steps) + 1)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_localization_heads(frame: pd.DataFrame, score: str = "auc", *, title: str = "", width: float = COLUMN) -> Figure:
    """Site x head heat map of one score at one timestep, the mean over heads first, chance marked on the colour bar.

    Args:
        frame: Rows of `attention_localization(by_head=True)` of one timestep, role and conditioning.
        score: One of `LOCALIZATION_NAMES`.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: columns or rows are missing, or a cell has several rows.
    """
    mine = _own_lines(frame[frame["score"] == score], ["site", "head"])
    sites = list(dict.fromkeys(mine["site"]))
    heads = sorted(dict.fromkeys(mine["head"].astype(str)), key=lambda h: (h != "mean", h.zfill(4)))
    table = mine.assign(head=mine["head"].astype(str)).pivot(index="site", columns="head", values="value")
    values = table.reindex(index=sites, columns=heads).to_numpy(dtype=float)
    chance = float(mine["chance"].mean())
    low, high = min(float(np.nanmin(values)), chance), max(float(np.nanmax(values)), chance)
    figure, axes = grid(1, 1, width, 0.17 * len(sites) + 0.55 + 0.2 * bool(title))
    axis = axes[0, 0]
    drawn = axis.imshow(values, cmap=SCORES, vmin=low, vmax=high if high > low else low + 1e-6, aspect="auto")
    _write_cells(axis, values, drawn)
    axis.set_xticks(range(len(heads)), ["mean", *(f"head {h}" for h in heads[1:])] if heads[0] == "mean" else heads)
    axis.set_yticks(range(len(sites)), [_site_name(s) for s in sites])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=axis, fraction=0.06, pad=0.02, label=LOCALIZATION_NAMES[score])
    bar.outline.set_visible(False)
    bar.ax.axhline(chance, color="white", linewidth=2.4)
    bar.ax.axhline(chance, color=OKABE_ITO[1], linewidth=1.2)
    _mark_chance(bar.ax, chance, low, high)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_localization_curves(
    frame: pd.DataFrame, score: str = "auc", *, by: str = "role", columns: int = 3, title: str = "", width: float = PAGE
) -> Figure:
    """One score against timestep, a panel a site: the maps' own with bands, controls as thin lines, chance dashed.

    Args:
        frame: Rows of one head; several values of `by` share a panel.
        score: One of `LOCALIZATION_NAMES`.
        by: What the colours tell apart, such as "role" or "conditioning".
        columns: Panels in a row.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: columns or rows are missing, or a cell has several rows.
    """
    part = frame[(frame["score"] == score) & frame["value"].notna()]
    mine = _own_lines(part, ["site", "timestep", by])
    sites, kinds = list(dict.fromkeys(mine["site"])), list(dict.fromkeys(mine[by]))
    controls = [name for name in ("wrong word", "other text", "null features", "centred Gaussian") if name in set(part["map"])]
    columns = min(columns, len(sites))
    rows = -(-len(sites) // columns)
    figure, axes = grid(rows, columns, width, rows * (0.62 * width / columns + 0.2) + 0.3 + 0.2 * bool(title))
    styles: dict[str, Any] = dict(zip(controls, (":", "-.", (0, (1, 3))), strict=False))
    for place, (axis, site) in enumerate(zip(axes.flat, sites, strict=False)):
        for k, kind in enumerate(kinds):
            colour = OKABE_ITO[k % len(OKABE_ITO)]
            curve = mine[(mine["site"] == site) & (mine[by] == kind)].sort_values("timestep")
            axis.plot(curve["timestep"], curve["value"], color=colour, marker=MARKERS[k % len(MARKERS)], label=str(kind))
            axis.fill_between(curve["timestep"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
            for name, line in styles.items():
                thin = part[(part["site"] == site) & (part[by] == kind) & (part["map"] == name)].sort_values("timestep")
                axis.plot(thin["timestep"], thin["value"], color=colour, linestyle=line, linewidth=0.8)
        axis.axhline(float(mine["chance"].mean()), color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axis.set_title(_site_name(site), pad=3)
        if place % columns == 0:
            axis.set_ylabel(LOCALIZATION_NAMES[score])
        axis.set_xlabel("timestep")
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
    ends = [axis.get_ylim() for axis in list(axes.flat)[: len(sites)]]
    for axis in list(axes.flat)[: len(sites)]:
        axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    for axis in list(axes.flat)[len(sites) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    handles += [Line2D([], [], color="0.35", linestyle=line, linewidth=0.8) for line in styles.values()]
    handles.append(Line2D([], [], color="0.35", linewidth=0.9, linestyle=(0, (4, 2))))
    figure.legend(handles, [*labels, *styles, "chance"], loc="outside lower center", ncols=4, handlelength=2.4)
    if title:
        figure.suptitle(title)
    return figure


# --- leakage -------------------------------------------------------------------------------------------


@styled
def plot_leak_sight(frame: pd.DataFrame, *, unit: str = "content-word F1", title: str = "", width: float = COLUMN) -> Figure:
    """What is read from the prompt against what is seen in the image, both above chance: a numbered point with intervals for each row.

    Args:
        frame: Columns label, leak, leak_low, leak_high, sight, sight_low, sight_high, and control ("K-", "K+" or "").
        unit: Of both scores.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: there are no rows.
    """
    if frame.empty:
        raise ValueError("There is nothing to draw: the table has no rows.")
    names = 0.135 * len(frame) + 0.1
    figure, axes = grid(1, 1, width, 0.8 * width + names + 0.2 * bool(title))
    axis, handles = axes[0, 0], []
    for place, row in enumerate(frame.to_dict("records")):
        colour = "0.35" if row["control"] else OKABE_ITO[place % len(OKABE_ITO)]
        axis.plot([row["sight_low"], row["sight_high"]], [row["leak"]] * 2, color=colour, linewidth=0.8, alpha=0.7)
        axis.plot([row["sight"]] * 2, [row["leak_low"], row["leak_high"]], color=colour, linewidth=0.8, alpha=0.7)
        axis.plot(row["sight"], row["leak"], "o", color=colour, markersize=7)
        axis.annotate(
            str(place + 1),
            (row["sight"], row["leak"]),
            ha="center",
            va="center_baseline",
            color="white",
            fontsize=5,
            fontweight="bold",
        )
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker="o",
                color=colour,
                label=f"{place + 1}  " + f"{row['control']} {row['label']}".strip(),
            )
        )
    axis.axhline(0, color="0.35", linewidth=0.9, linestyle=(0, (1, 1.5)))
    axis.axvline(0, color="0.35", linewidth=0.9, linestyle=(0, (1, 1.5)), label="chance")
    axis.set_xlabel(f"sight: {unit}, image's captions")
    axis.set_ylabel(f"leak: {unit}, fed text")
    figure.legend(handles=handles, loc="outside lower left", handlelength=1, labelspacing=0.25)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_leak_examples(frame: pd.DataFrame, *, title: str = "", width: float = PAGE) -> Figure:
    """Texts side by side: a block an image and condition, with what was fed in, a true caption, and what was written.

    Args:
        frame: Columns sample, seen, condition, fed, and one column of outputs an arm.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: there are no rows.
    """
    if frame.empty:
        raise ValueError("There is nothing to draw: the table has no rows.")
    arms = [c for c in frame if c not in ("sample", "seen", "condition", "fed")]
    lines: list[tuple[str, str, str]] = []
    for row in frame.to_dict("records"):
        lines.append((f"{row['condition']}, {row['sample']}", "", "0"))
        lines.append(("  fed to the diffusion model", row["fed"] or "nothing", OKABE_ITO[1]))
        lines.append(("  the image shows", row["seen"], OKABE_ITO[0]))
        lines += [(f"  {arm}", str(row[arm]), "0.25") for arm in arms if isinstance(row[arm], str)]
    wrapped = [(name, wrap(text, 0.66 * width, 6.5), colour) for name, text, colour in lines]
    rows = sum(text.count("\n") + 1.15 for _, text, _ in wrapped)
    figure, axes = grid(1, 1, width, 0.115 * rows + 0.2 + 0.2 * bool(title))
    axis, y = axes[0, 0], 0.0
    for name, text, colour in wrapped:
        axis.text(0, y, name, va="top", fontsize=6.5, fontweight="bold" if colour == "0" else "normal", color=colour)
        axis.text(0.3, y, text, va="top", fontsize=6.5, color=colour)
        y += text.count("\n") + 1.15
    axis.set_xlim(0, 1)
    axis.set_ylim(rows, 0)
    bare(axis)
    if title:
        figure.suptitle(title)
    return figure
