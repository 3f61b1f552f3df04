"""The look of every figure, what figures are made of, and how they are saved beside the rows that they show.

Four primitives draw into axes: `cells` (a grid of numbers), `curve` (a line with its band), `interval` (a dot with its
interval on a line of a `forest`), `lay_over` (a heat map over its image, in a strip of `pictures`).  `grid` and `panels` lay
the axes out, `legend` writes one legend for all.  The package knows matplotlib here and in `diffprobe.figures` only; nothing
opens a window or touches global state.

The invariant: the same rows give the same bytes, so a figure redrawn from its CSV is the figure.  Widths and heights are
in inches: a column is `COLUMN`, a page `PAGE`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.rcsetup
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from diffprobe import rundir
from diffprobe.console import visible
from diffprobe.rundir import whole_file

Look = Mapping[str, Any]  # matplotlib's properties of a line

COLUMN, PAGE = 3.35, 6.9
# Okabe and Ito's colours, the yellow darkened for white paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C7A00")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHED: Look = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (4, 2))}
DOTTED: Look = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (1, 1.5))}
SCORES, HEAT = "cividis", "magma"  # both even in lightness, so they survive grey printing and colour blindness
OLD_COLUMNS = {"control_accuracy": "control_value"}  # of tables written before the name was changed
PACKAGES = (
    "diffprobe", "matplotlib", "numpy", "pandas", "scikit-learn", "scipy", "xarray", "torch", "diffusers", "transformers"
)  # fmt: skip


# --- style and files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The package's look, for the length of a `with` block or, as ``@style()``, of a function.

    >>> with style():
    ...     matplotlib.rcParams["savefig.dpi"]
    200.0
    """
    look: dict[Any, Any] = {  # matplotlib types the keys as one long literal
        "font.family": "DejaVu Sans",
        **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.labelsize"), 7.5),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7),
        "figure.titlesize": 8,
        **dict.fromkeys(("figure.dpi", "savefig.dpi"), 200),
        **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        "grid.color": "0.9",
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.2,
        "lines.markersize": 3,
        "axes.prop_cycle": matplotlib.rcsetup.cycler(color=COLOURS),
        "image.interpolation": "nearest",
        "pdf.fonttype": 42,  # text stays text
        "text.parse_math": False,  # a dollar in a caption is a dollar
    }
    with matplotlib.rc_context(look):
        yield


def save_figure(
    figure: Figure, folder: str | Path, name: str, frame: pd.DataFrame, config: Mapping[str, Any], alt: str
) -> dict[str, Path]:
    """Writes NAME.png, NAME.pdf, NAME.csv (the plotted rows) and NAME.json (config, versions, alt text).

    Nothing in the files depends on the clock or the folder: equal input gives equal bytes.

    Args:
        folder: Made when absent.
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
    """The JSON files of a folder's figures, by the figures' names; other JSON files are left out."""
    found = {}
    for path in sorted(out.glob("*.json")):
        with contextlib.suppress(ValueError):
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(sidecar, dict) and "alt" in sidecar and path.with_suffix(".png").is_file():
                found[path.stem] = sidecar
    return found


def _typed(cells: pd.Series) -> pd.Series:
    """A column of texts as truth values, whole numbers or floats (empty cells are NaN), or as it is."""
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
    """The versions of Python and of the packages that numbers and pictures depend on."""
    return {"python": platform.python_version(), **rundir.package_versions(PACKAGES)}


def _plain(value: object) -> object:
    """NumPy's numbers and arrays as lists and numbers; paths and all else as text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def heat_colours() -> NDArray[np.uint8]:
    """The colours of heat maps from lowest to highest, (256, 3), for pages that draw them on their own."""
    return (np.asarray(matplotlib.colormaps[HEAT](np.linspace(0, 1, 256)))[:, :3] * 255).round().astype(np.uint8)


# --- layout --------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One of several panels; whether it is the first of its row, and whether none stands below it."""

    axis: Axes
    leftmost: bool
    lowest: bool


def grid(
    rows: int, columns: int, width: float, height: float, *, title: str = "", pad: tuple[float, float] | None = None
) -> tuple[Figure, NDArray[Any]]:
    """A figure with rows x columns axes; its title, if any, adds to the height.

    `pad` is the space around each axis in inches, and that between two as a share of their size.
    """
    gap = 0.06 if title and pad else 0.0  # with little space around axes the title would touch the headings below it
    height += 0.2 * bool(title) + gap
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if pad:
        inches, space = pad
        room = {"w_pad": inches, "h_pad": inches, "wspace": space, "hspace": space, "rect": (0, 0, 1, 1 - gap / height)}
        figure.get_layout_engine().set(**room)  # type: ignore[union-attr]
    if title:
        figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels(
    count: int, columns: int, width: float, height: float, below: float = 0.0, **options: Any
) -> tuple[Figure, list[Panel]]:
    """A figure with `count` panels, at most `columns` in a row.

    `height` is that of a row, `below` that of what stands below all panels; the other options are those of `grid`.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = grid(rows, columns, width, rows * height + below, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, [Panel(axis, k % columns == 0, k + columns >= count) for k, axis in enumerate(axes.flat[:count])]


def one_scale(shown: Sequence[Panel]) -> None:
    """Gives all panels the vertical scale that holds each one's."""
    ends = [panel.axis.get_ylim() for panel in shown]
    for panel in shown:
        panel.axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def legend(figure: Figure, entries: Mapping[str, Look], columns: int = 1, **options: Any) -> None:
    """One legend for all panels: a name and the look of its line, in so many columns."""
    handles = [Line2D([], [], label=name, **look) for name, look in entries.items()]
    figure.legend(handles=handles, ncols=columns, **{"loc": "outside lower center", **options})


def legend_size(names: Sequence[str], width: float) -> tuple[int, float]:
    """How many columns of a legend fit a width, and how high it is then."""
    columns = max(1, min(len(names), int(width / (0.055 * max(map(len, names)) + 0.45))))
    return columns, 0.15 * -(-len(names) // columns) + 0.1


def ruled(axis: Axes, which: str) -> None:
    """Thin grid lines for the values of the axis "x" or "y", below what is drawn."""
    axis.grid(axis=which)  # type: ignore[arg-type]
    axis.set_axisbelow(True)


def wrap(name: str, inches: float, points: float = 7.5) -> str:
    """Breaks a long name after its hyphens, dots, slashes and spaces so that it fits a width.

    >>> wrap("U-L1-R1-B0-Cross-Q", 0.7).split(chr(10))
    ['U-L1-R1-B0-', 'Cross-Q']
    """
    fits = max(4, int(inches * 72 / (0.6 * points)))
    lines, current = [], ""
    for piece in re.split(r"(?<=[-./_ ])", name):
        if current and len(current) + len(piece.rstrip()) > fits:
            lines.append(current.rstrip())
            current = ""
        current += piece
    return "\n".join([*lines, current.rstrip()])


def line_count(texts: Iterable[str]) -> int:
    """Lines of the longest text.

    >>> line_count(["a", "b" + chr(10) + "c"])
    2
    """
    return max(text.count("\n") + 1 for text in texts)


def short(value: float) -> str:
    """Two decimals without the leading zero.

    >>> short(0.514), short(-0.02), short(1.0), short(-0.001)
    ('.51', '-.02', '1.00', '.00')
    """
    text = f"{value:.2f}"
    if text == "-0.00":
        text = "0.00"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def look_of(number: int) -> dict[str, Any]:
    """Colour, line and marker of the curve with this number."""
    colour = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
    return {**colour, "marker": MARKERS[number % len(MARKERS)]}


# --- what figures are made of --------------------------------------------------------------------------


def cells(
    axis: Axes,
    table: NDArray[np.float64],
    x_names: Sequence[str],
    y_names: Sequence[str],
    limits: tuple[float | None, float | None] = (None, None),
    bold: NDArray[np.bool_] | None = None,
    **options: Any,
) -> AxesImage:
    """A table (row, column) as cells coloured by value, each with its number, dark on light or light on dark; NaN stays empty.

    Columns and rows have no names where these are empty.  `limits` are the values of the lowest and the highest colour, the
    table's own by default; `bold` (row, column) says which numbers are bold; the other options are `imshow`'s.
    """
    drawn = axis.imshow(table, cmap=SCORES, vmin=limits[0], vmax=limits[1], **{"aspect": "auto", **options})
    size = 6.5 if table.shape[1] <= 8 else 5.0
    lightness = np.asarray(drawn.cmap(drawn.norm(table)))[..., :3] @ (0.299, 0.587, 0.114)
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        colour = "white" if lightness[row, column] < 0.5 else "black"
        weight = "bold" if bold is not None and bold[row, column] else "normal"
        look: dict[str, Any] = {"fontsize": size, "color": colour, "fontweight": weight}
        axis.text(column, row, short(float(value)), ha="center", va="center", **look)
    axis.set_xticks(range(table.shape[1]), x_names)
    axis.set_yticks(range(table.shape[0]), y_names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return drawn


def limits_with(values: NDArray[np.float64], chance: float) -> tuple[float, float]:
    """The lowest and the highest of the values and chance, at least a little apart."""
    low, high = min(float(np.nanmin(values)), chance), max(float(np.nanmax(values)), chance)
    return low, high if high > low else low + 1e-6


def chance_bar(figure: Figure, drawn: AxesImage, axes: Any, chance: float, **options: Any) -> None:
    """A colour bar with a line at chance, whose name stands in place of the ticks that it would touch."""
    bar = figure.colorbar(drawn, ax=axes, **options)
    bar.outline.set_visible(False)
    bar.ax.axhline(chance, color="white", linewidth=2.4)
    bar.ax.axhline(chance, color=COLOURS[1], linewidth=1.2)
    low, high = drawn.get_clim()
    ticks = [float(v) for v in bar.ax.get_yticks() if low <= v <= high and abs(v - chance) > 0.09 * (high - low)]
    bar.ax.set_yticks([*ticks, chance], [*(f"{v:.2g}" for v in ticks), f"chance {short(chance)}"])
    bar.ax.tick_params(length=2)
    bar.ax.get_yticklabels()[-1].set_color(COLOURS[1])


def check_table(frame: pd.DataFrame, columns: Sequence[str], cell: Sequence[str] = (), where: str = "The table") -> None:
    """Raises ValueError if a column of either list is missing, there are no rows, or several agree in all columns of `cell`.

    `where` names the part of a table for the message about several rows.
    """
    if frame.empty:
        raise ValueError(f"{where} has no rows; there is nothing to draw.")
    if absent := [c for c in (*cell, *columns) if c not in frame]:
        raise ValueError(f"{where} has no column {', '.join(absent)}; it has {', '.join(map(str, frame.columns))}.")
    if cell and frame.duplicated(list(cell)).any():
        others = ("seed", "guidance", "draw", "head", "role", "conditioning")
        varying = [c for c in others if c in frame and c not in cell and frame[c].nunique() > 1]
        hint = f"; {', '.join(varying)} differ within them" if varying else ""
        raise ValueError(f"{where}: some cells of {' x '.join(cell)} have several rows{hint}. Select or average first.")


def curve(axis: Axes, rows: pd.DataFrame, x: str, number: int, name: str, *, band: float = 0.18) -> None:
    """A line of `value` over the column x, with a band of that opacity from `low` to `high`."""
    rows, look = rows.sort_values(x), look_of(number)
    axis.plot(rows[x], rows["value"], label=name, **look)
    axis.fill_between(rows[x], rows["low"], rows["high"], color=look["color"], alpha=band, linewidth=0)


def interval(
    axis: Axes, row: Mapping[Any, Any], line: float, color: str, marker: str = "o", *, clip_on: bool = True, **options: Any
) -> None:
    """A marker at `value`, and its interval from `low` to `high`, at this height of a forest."""
    axis.plot([row["low"], row["high"]], [line, line], color=color, linewidth=1, clip_on=clip_on)
    axis.plot(row["value"], line, color=color, marker=marker, linestyle="none", clip_on=clip_on, **options)


def forest(axis: Axes, names: Sequence[str], *, written: bool = True, room: float = 0.5) -> None:
    """Lines for `interval`, the first on top: their names, where written, and room above and below."""
    axis.set_yticks(range(len(names)), names if written else [])
    axis.set_ylim(len(names) - 1 + room, -room)
    axis.tick_params(axis="y", length=0)
    ruled(axis, "x")


def pictures(
    rows: int, columns: int, width: float, height: float, pad: tuple[float, float], **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A `grid` of axes without ticks or frame."""
    figure, axes = grid(rows, columns, width, height, pad=pad, **options)
    for axis in axes.flat:
        bare(axis)
    return figure, axes


def bare(axis: Axes) -> None:
    """Takes ticks and frame away."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def enlarged(heat: NDArray[np.float32], image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A map (y, x) in the size of an image (y, x, 3), bilinearly."""
    return np.asarray(Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.BILINEAR))


def overlay(image: Image.Image, heat: ArrayLike, strength: float = 0.75) -> Image.Image:
    """A map (y, x) of any size over the greyed image, in colours from its lowest to its highest value.

    Args:
        strength: the opacity of the highest value; the lowest is transparent.

    >>> overlay(Image.new("RGB", (64, 48)), np.eye(4)).size
    (64, 48)
    """
    pixels = np.asarray(image.convert("L").convert("RGB"), np.float32)
    large = enlarged(np.asarray(heat, np.float32), pixels.astype(np.uint8))
    low, high = float(large.min()), float(large.max())
    share = (large - low) / (high - low) if high > low else np.zeros_like(large)
    colours = heat_colours()[(share * 255).round().astype(np.uint8)].astype(np.float32)
    opacity = strength * share[..., None]
    return Image.fromarray((opacity * colours + (1 - opacity) * pixels).round().astype(np.uint8))


def save_gif(path: str | Path, frames: Sequence[Image.Image], seconds: float = 0.2) -> Path:
    """Writes images of one size, such as those of `overlay`, as an endless animation.

    Args:
        seconds: how long each is shown.

    Raises:
        ValueError: there are no images.
    """
    if not frames:
        raise ValueError("An animation needs at least one image.")
    with whole_file(path) as beside:
        frames[0].save(
            beside, format="GIF", save_all=True, append_images=list(frames[1:]), duration=round(1000 * seconds), loop=0
        )
    return Path(path)


def lay_over(
    axis: Axes,
    image: NDArray[np.uint8],
    heat: NDArray[np.float32],
    limits: tuple[float, float],
    opacity: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> AxesImage:
    """A heat map (y, x) over the greyed image (y, x, 3).

    `limits` are the values of the lowest and the highest colour; `opacity` is given the share of the way between them.
    """
    low, high = limits
    large = enlarged(heat, image)
    axis.imshow(np.asarray(Image.fromarray(image).convert("L")), cmap="gray", vmin=0, vmax=255)
    return axis.imshow(large, cmap=HEAT, vmin=low, vmax=high, alpha=opacity(np.clip((large - low) / (high - low), 0, 1)))
