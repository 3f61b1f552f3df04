"""Figures of tables and arrays, and what `diffprobe plot` draws of a store or of a table's file.

Every ``plot_*`` function takes rows or labelled arrays and returns a Figure; `title` is written above it, and `width` is in
inches.  They raise ValueError where the table lacks a column, has no rows, or has several rows for one cell.  The functions
below them open a store or a table, find the images, and save the figure with `diffprobe.plotting.save_figure`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from diffprobe import plotting
from diffprobe.data import load_dataset
from diffprobe.data.images import fit_image
from diffprobe.plotting import check_table
from diffprobe.probes.pca import pca_rgb
from diffprobe.store import StoreError, attention_maps, features, open_store, prompt_texts, provenance, site_names

Choose = Callable[[xr.DataTree], list[int]]
LOCALIZATION_NAMES = {
    "pointing": "pointing game", "mass": "mass in the mask", "lift": "mass over area", "iou_fixed": "IoU above 0.4",
    "iou_otsu": "IoU, Otsu", "iou_tuned": "IoU, tuned", "auc": "ROC-AUC", "ap": "average precision", "nss": "NSS",
}  # fmt: skip
NOISE_AXIS = "timestep (noise grows to the right)"
SNR_AXIS = "log-SNR (noise grows to the right)"


# --- pictures ------------------------------------------------------------------------------------------


@plotting.style()
def plot_pca_grid(
    images: NDArray[np.uint8],
    pca: Mapping[str, xr.DataArray],
    *,
    title: str = "",
    width: float = plotting.PAGE,
) -> Figure:
    """One row per sample: the image, then one column of PCA colours per site (or per timestep).

    Args:
        images: (sample, y, x, 3).
        pca: By column title, (sample, y, x, rgb) in [0, 1]; see `diffprobe.probes.pca.pca_rgb`.

    Raises:
        ValueError: A column has another number of samples than there are images.
    """
    for name, colours in pca.items():
        if colours.sizes["sample"] != len(images):
            raise ValueError(f"Column {name!r} has {colours.sizes['sample']} samples; there are {len(images)} images.")
    columns, rows = 1 + len(pca), len(images)
    cell, aspect = width / columns, images.shape[1] / images.shape[2]
    titles = ["image", *(plotting.wrap(name, cell) for name in pca)]
    height = rows * (cell - 0.04) * aspect + 0.13 * plotting.line_count(titles)
    figure, axes = plotting.pictures(rows, columns, width, height, (0.01, 0.01), title=title)
    components = [np.clip(c.transpose("sample", "y", "x", "rgb").to_numpy(), 0, 1) for c in pca.values()]
    for column, (text, shown) in enumerate(zip(titles, [images, *components], strict=True)):
        axes[0, column].set_title(text, pad=3)
        for axis, picture in zip(axes[:, column], shown, strict=True):
            axis.imshow(picture)
    return figure


@plotting.style()
def plot_heatmaps(
    image: NDArray[np.uint8],
    maps: xr.DataArray,
    *,
    shared_scale: bool = False,
    title: str = "",
    width: float = plotting.PAGE,
) -> Figure:
    """The image, then each word's heat map, enlarged bilinearly and laid over the greyed image.

    Every map has its own colour scale and bar, from its smallest to its largest value, because words differ in
    their total by orders of magnitude; `shared_scale` puts all on one scale with one bar, to compare amounts.

    Args:
        image: (y, x, 3).
        maps: (word, y, x) or (token, y, x); their titles are the first dimension's coordinate.
        shared_scale: One scale for all maps.

    Raises:
        ValueError: The maps have other dimensions.
    """
    first = next((d for d in maps.dims if d not in ("y", "x")), None)
    if maps.ndim != 3 or first is None:
        raise ValueError(f"Maps need one dimension beside y and x, such as word; these have {maps.dims}.")
    values = maps.transpose(first, "y", "x").to_numpy().astype(np.float32)
    rows = -(-(len(values) + 1) // 6)
    columns = -(-(len(values) + 1) // rows)  # no row much shorter than the others
    cell = (width - 0.4 * shared_scale) / columns
    height = rows * (cell * image.shape[0] / image.shape[1] + (0.17 if shared_scale else 0.37))
    figure, axes = plotting.pictures(rows, columns, width, height, (0.02, 0.02), title=title)
    shown = list(axes.flat)
    shown[0].imshow(image)
    shown[0].set_title("image", pad=3)
    for axis, name, heat in zip(shown[1:], maps[first].values, values, strict=False):
        scale = values if shared_scale else heat
        low, high = float(scale.min()), float(scale.max())
        high = high if high > low else low + 1e-12
        drawn = plotting.lay_over(axis, image, heat, (low, high), lambda share: 0.75 * (0.3 + 0.7 * share))
        axis.set_title(plotting.wrap(str(name), cell), pad=3)
        colours = ScalarMappable(drawn.norm, drawn.cmap)  # without the map's opacity
        if not shared_scale:
            bar = figure.colorbar(colours, ax=axis, location="bottom", fraction=0.06, pad=0.02, aspect=14, shrink=0.92)
            bar.outline.set_visible(False)
            # only the ends are marked, inside the bar's width
            bar.ax.set_xticks([low, high], ["0" if abs(low) < 1e-3 * abs(high) else f"{low:.2g}", f"{high:.2g}"])
            bar.ax.tick_params(length=0, pad=1, labelsize=6)
            for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
                label.set(horizontalalignment=side)
    for axis in shown:
        axis.set_anchor("N")  # the image has no bar below it
    for axis in shown[1 + len(values) :]:
        axis.set_axis_off()
    if shared_scale:
        figure.colorbar(colours, ax=axes, fraction=0.02, pad=0.01, aspect=30)
    return figure


# --- probe tables --------------------------------------------------------------------------------------


@plotting.style()
def plot_probe_grid(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Site x timestep heat maps of probe scores, with the control task beside them.

    One row of panels per label and conditioning; both panels of a row share their colours, and a line on the colour
    bar marks chance (its mean over the cells).

    Args:
        frame: Rows of `diffprobe.probes.fitting.probe_table`: site, timestep, label, score, value, chance and, for the control,
            control_value (`control` names it); one row per cell.  Numbers of rows whose column `bold` is true are bold.
    """
    frame = frame.rename(columns=plotting.OLD_COLUMNS)
    parts = _by_label(frame if "control" in frame else frame.assign(control="control task"))
    control = "control_value" in frame and bool(frame["control_value"].notna().any())
    kinds = ["value", "control_value"] if control else ["value"]
    sites, steps = list(dict.fromkeys(frame["site"])), sorted(dict.fromkeys(frame["timestep"]))
    height = len(parts) * (0.21 * len(sites) + 0.62)
    figure, axes = plotting.grid(len(parts), len(kinds), plotting.PAGE, height, title=title, pad=(0.03, 0.04))
    for row, (heading, score, part) in enumerate(parts):
        chance = float(part["chance"].mean())
        limits = plotting.limits_with(part[kinds].to_numpy(dtype=float), chance)
        bold = _table(part, "bold", "site", sites, "timestep", steps) == 1 if "bold" in part else None
        for axis, kind in zip(axes[row], kinds, strict=True):
            own = kind == "value"
            table, names = _table(part, kind, "site", sites, "timestep", steps), [f"{s:g}" for s in steps]
            drawn = plotting.cells(axis, table, names, sites if own else (), limits=limits, bold=bold if own else None)
            axis.set_title(f"{heading if own else part['control'].iloc[0]}: {score}", pad=3)
            if row == len(parts) - 1:
                axis.set_xlabel(NOISE_AXIS)
        place = {"fraction": 0.2 / plotting.PAGE, "pad": 0.01, "aspect": 2.1 * len(sites)}
        plotting.chance_bar(figure, drawn, axes[row, :], chance, **place)
    return figure


def _table(frame: pd.DataFrame, value: str, y: str, rows: list[Any], x: str, columns: list[Any]) -> NDArray[np.float64]:
    """A column's numbers (row, column); NaN where the frame has none."""
    table = frame.pivot(index=y, columns=x, values=value)
    return table.reindex(index=rows, columns=columns).to_numpy(dtype=float)


def plot_probe_curves(frame: pd.DataFrame, *, x: str = "timestep", title: str = "", width: float = plotting.PAGE) -> Figure:
    """Score against timestep, or log_snr, as `plot_site_curves` draws it, a panel per label and conditioning.

    Args:
        frame: Rows of `diffprobe.probes.fitting.probe_table`; one row per site, timestep, label and conditioning.
    """
    parts = _by_label(frame)
    scores = list(dict.fromkeys(score for _, score, _ in parts))
    several = len(scores) > 1
    rows = pd.concat([part.assign(panel=f"{heading}: {score}" if several else heading) for heading, score, part in parts])
    x_label = SNR_AXIS if x == "log_snr" else NOISE_AXIS
    return plot_site_curves(
        rows, x=x, x_label=x_label, y_label="" if several else scores[0], columns=2, title=title, width=width
    )


def _by_label(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """The table split by label and conditioning: for each part a heading and the name of its score."""
    check_table(frame, ["site", "timestep", "label", "score", "value", "chance"])
    by: list[Hashable] = ["label", *(["conditioning"] if "conditioning" in frame else [])]
    several = "conditioning" in frame and frame["conditioning"].nunique() > 1
    parts = []
    for key, part in frame.groupby(by, sort=False, dropna=False):
        words, score = [str(k) for k in key], str(part["score"].iloc[0])
        check_table(part, [], ["site", "timestep"], where=", ".join(words))
        parts.append((f"{words[0]} ({words[1]})" if several else words[0], "R²" if score == "r2" else score, part))
    return parts


# --- similarity ----------------------------------------------------------------------------------------


@plotting.style()
def plot_site_curves(
    frame: pd.DataFrame,
    *,
    x: str = "timestep",
    x_label: str = NOISE_AXIS,
    y_label: str = "",
    columns: int = 3,
    share_y: bool = False,
    chance_name: str = "chance",
    title: str = "",
    width: float = plotting.PAGE,
) -> Figure:
    """A panel per kind of number, and in it one curve per site over `x` with its interval as a band.

    Chance is a thin dotted line in the site's colour, or one grey line where all sites share it.  Rows without an interval
    (published numbers) have no band.

    Args:
        frame: Rows of panel, site, value, low, high, chance and the column `x`; one row per panel, site and x.
        x: What runs to the right.
        x_label: Below the lowest panel of each column.
        y_label: Beside the leftmost panels.
        share_y: One scale for all panels.
        chance_name: What chance is called in the legend.
    """
    check_table(frame, ["value", "low", "high", "chance"], ["panel", "site", x])
    names, sites = (list(dict.fromkeys(frame[c])) for c in ("panel", "site"))
    entries = {str(site): plotting.look_of(k) for k, site in enumerate(sites)} | {chance_name: plotting.DOTTED}
    across, below = plotting.legend_size([*map(str, sites), "chance"], width)
    columns = min(columns, len(names))
    figure, shown = plotting.panels(len(names), columns, width, min(2.2, 0.75 * width / columns + 0.3), below, title=title)
    for (axis, leftmost, lowest), name in zip(shown, names, strict=True):
        part = frame[frame["panel"] == name]
        common = part.dropna(subset="chance").groupby(x)["chance"].nunique().le(1).all()
        for k, site in enumerate(sites):
            rows = part[part["site"] == site].sort_values(x)
            plotting.curve(axis, rows, x, k, str(site))
            if not common:
                axis.plot(rows[x], rows["chance"], zorder=1, **{**plotting.DOTTED, "color": plotting.look_of(k)["color"]})
        if common and part["chance"].notna().any():
            chance = part.groupby(x)["chance"].mean()
            axis.plot(chance.index, chance, zorder=1, label=chance_name, **plotting.DOTTED)
        axis.set_title(plotting.wrap(str(name), width / columns, 5.5), pad=4)
        axis.set(xlabel=x_label if lowest else "", ylabel=y_label if leftmost else "")
        axis.xaxis.set_inverted(x == "log_snr")
        plotting.ruled(axis, "y")
    if share_y:
        plotting.one_scale(shown)
    if frame["chance"].isna().all():
        del entries[chance_name]
    plotting.legend(figure, entries, across, handlelength=2.2, columnspacing=1.2)
    return figure


@plotting.style()
def plot_similarity_matrix(frame: pd.DataFrame, between: str) -> Figure:
    """Every two timesteps, conditionings or sites against each other: a heat map for each panel, mirrored, numbers written in.

    Args:
        frame: Rows of `diffprobe.probes.similarity.similarity`: panel, BETWEEN_a, BETWEEN_b, value.
        between: What is compared, such as "timestep".
    """
    sides = [f"{between}_a", f"{between}_b"]
    check_table(frame, ["value"], ["panel", *sides])
    names, entries = (list(dict.fromkeys(values)) for values in (frame["panel"], frame[sides].to_numpy().T.flat))
    cell = plotting.PAGE / min(3, len(names))
    texts = [plotting.wrap(str(entry), cell / 4) for entry in entries]
    figure, shown = plotting.panels(len(names), 3, plotting.PAGE, 0.8 * cell + 0.2)
    low = min(0.0, float(frame["value"].min()))
    place = {entry: index for index, entry in enumerate(entries)}
    for (axis, _, _), name in zip(shown, names, strict=True):
        table = np.full((len(entries), len(entries)), np.nan)
        for a, b, value in frame.loc[frame["panel"] == name, [*sides, "value"]].itertuples(index=False):
            table[place[a], place[b]] = table[place[b], place[a]] = value
        drawn = plotting.cells(axis, table, texts, texts, limits=(low, 1), aspect="equal")
        axis.tick_params(axis="x", labelrotation=0 if max(map(len, texts)) < 6 else 90)
        axis.set_title(plotting.wrap(str(name), cell, 5.5), pad=4)
    figure.colorbar(drawn, ax=figure.axes, fraction=0.03, pad=0.01).outline.set_visible(False)
    return figure


# --- localization --------------------------------------------------------------------------------------


@plotting.style()
def plot_localization_grid(frame: pd.DataFrame, *, against: str = "wrong word", title: str = "") -> Figure:
    """Site x timestep heat maps, one panel a score; cells that beat a control are framed.

    Args:
        frame: Rows of `diffprobe.probes.grounding.attention_localization` or `difference_localization`, of one role,
            conditioning and head.
        against: The control; a cell is framed where the own map scores above it with a Holm-adjusted p below .05.
    """
    mine = _own_rows(frame, ["site", "timestep"])
    control = frame[(frame["map"] == against) & (frame["p_holm"] < 0.05)]
    beaten = set(control[["score", "site", "timestep"]].itertuples(index=False, name=None))
    scores = [score for score in LOCALIZATION_NAMES if score in set(mine["score"])]
    sites, steps = list(dict.fromkeys(mine["site"])), sorted(dict.fromkeys(mine["timestep"]))
    height, names = 0.145 * len(sites) + 0.42, [str(s).removesuffix("-Cross-Map") for s in sites]
    figure, shown = plotting.panels(len(scores), 3, plotting.PAGE, height, 0.15, title=title, pad=(0.02, 0.02))
    framed: dict[str, Any] = {"fill": False, "edgecolor": plotting.COLOURS[1], "linewidth": 1}
    for (axis, leftmost, lowest), score in zip(shown, scores, strict=True):
        part = mine[mine["score"] == score]
        table = _table(part, "value", "site", sites, "timestep", steps)
        plotting.cells(axis, table, [str(s) for s in steps] if lowest else (), names if leftmost else ())
        for (y, site), (x, step) in itertools.product(enumerate(sites), enumerate(steps)):
            if (score, site, step) in beaten:
                axis.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, **framed))
        axis.set_title(f"{LOCALIZATION_NAMES[score]} (chance {plotting.short(float(part['chance'].mean()))})", pad=3)
        axis.tick_params(labelsize=6.5)
    figure.supxlabel(f"{NOISE_AXIS}; framed: above the control “{against}”, p < .05 (Holm)")
    return figure


def _own_rows(frame: pd.DataFrame, within: list[str]) -> pd.DataFrame:
    """The rows of the maps themselves, without the controls; one for each score and cell."""
    needed = ["map", "score", "value", "low", "high", "chance", "p_holm"]
    check_table(frame, [*within, *needed])
    mine = frame[frame["map"] == frame["map"].iloc[0]]
    check_table(mine, [], ["score", *within])
    return mine


@plotting.style()
def plot_localization_controls(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Each score of the maps and of their controls as dots with intervals, coloured by timestep, chance dashed.

    Args:
        frame: Rows of one site, role, conditioning and head.
    """
    _own_rows(frame, ["timestep"])
    scores = [score for score in LOCALIZATION_NAMES if score in set(frame["score"])]
    steps = sorted(dict.fromkeys(frame["timestep"]))
    names = [name for name in dict.fromkeys(frame["map"]) if frame.loc[frame["map"] == name, "value"].notna().any()]
    colours = [plotting.look_of(k)["color"] for k in range(len(steps))]
    figure, shown = plotting.panels(len(scores), 3, plotting.PAGE, 0.19 * len(names) + 0.42, 0.25, title=title)
    for (axis, leftmost, _), score in zip(shown, scores, strict=True):
        part = frame[frame["score"] == score]
        for line, name in enumerate(names):
            for row in part[part["map"] == name].to_dict("records"):
                k = steps.index(row["timestep"])
                plotting.interval(axis, row, line + 0.5 * ((k + 0.5) / len(steps) - 0.5), colours[k], markersize=2.5)
        axis.axvline(float(part.loc[part["map"] == names[0], "chance"].mean()), zorder=1, **plotting.DASHED)
        axis.set_title(LOCALIZATION_NAMES[score], pad=3)
        plotting.forest(axis, names, written=leftmost)
    entries: dict[str, Any] = {f"timestep {s}": {"marker": "o", "color": c} for s, c in zip(steps, colours, strict=True)}
    plotting.legend(figure, entries | {"chance": plotting.DASHED}, len(steps) + 1)
    return figure


@plotting.style()
def plot_localization_heads(frame: pd.DataFrame, score: str = "auc", *, title: str = "") -> Figure:
    """Site x head heat map of one score at one timestep, the mean over heads first, chance marked on the colour bar.

    Args:
        frame: Rows of `attention_localization(by_head=True)` of one timestep, role and conditioning.
        score: One of `LOCALIZATION_NAMES`.
    """
    mine = _own_rows(frame[frame["score"] == score], ["site", "head"])
    mine = mine.assign(head=mine["head"].astype(str))
    sites, chance = list(dict.fromkeys(mine["site"])), float(mine["chance"].mean())
    heads = sorted(dict.fromkeys(mine["head"]), key=lambda h: (h != "mean", h.zfill(4)))
    table = _table(mine, "value", "site", sites, "head", heads)
    figure, axes = plotting.grid(1, 1, plotting.COLUMN, 0.17 * len(sites) + 0.55, title=title)
    names = ["mean", *(f"head {h}" for h in heads[1:])] if heads[0] == "mean" else heads
    limits, rows = plotting.limits_with(table, chance), [str(s).removesuffix("-Cross-Map") for s in sites]
    drawn = plotting.cells(axes[0, 0], table, names, rows, limits)
    plotting.chance_bar(figure, drawn, axes[0, 0], chance, fraction=0.06, pad=0.02, label=LOCALIZATION_NAMES[score])
    return figure


@plotting.style()
def plot_localization_curves(frame: pd.DataFrame, score: str = "auc", *, by: str = "role", title: str = "") -> Figure:
    """One score against timestep, a panel a site: the maps' own with bands, controls as thin lines, chance dashed.

    Args:
        frame: Rows of one head; several values of `by` share a panel.
        score: One of `LOCALIZATION_NAMES`.
        by: What the colours tell apart, such as "role" or "conditioning".
    """
    part = frame[(frame["score"] == score) & frame["value"].notna()]
    mine = _own_rows(part, ["site", "timestep", by])
    sites, kinds = list(dict.fromkeys(mine["site"])), list(dict.fromkeys(mine[by]))
    controls = [name for name in ("wrong word", "other text", "null features", "centred Gaussian") if name in set(part["map"])]
    thin: dict[str, dict[str, Any]] = {
        n: {"linestyle": s, "linewidth": 0.8} for n, s in zip(controls, (":", "-.", (0, (1, 3))), strict=False)
    }
    height = 0.62 * plotting.PAGE / min(3, len(sites)) + 0.2
    figure, shown = plotting.panels(len(sites), 3, plotting.PAGE, height, 0.3, title=title)
    for (axis, leftmost, _), site in zip(shown, sites, strict=True):
        for k, kind in enumerate(kinds):
            plotting.curve(axis, mine[(mine["site"] == site) & (mine[by] == kind)], "timestep", k, str(kind), band=0.2)
            for name, look in thin.items():
                rows = part[(part["site"] == site) & (part[by] == kind) & (part["map"] == name)].sort_values("timestep")
                axis.plot(rows["timestep"], rows["value"], color=plotting.look_of(k)["color"], **look)
        axis.axhline(float(mine["chance"].mean()), zorder=1, **plotting.DASHED)
        axis.set_title(str(site).removesuffix("-Cross-Map"), pad=3)
        axis.set(xlabel="timestep", ylabel=LOCALIZATION_NAMES[score] if leftmost else "")
        plotting.ruled(axis, "y")
    plotting.one_scale(shown)
    entries: dict[str, plotting.Look] = {str(kind): plotting.look_of(k) for k, kind in enumerate(kinds)}
    entries |= {name: {"color": "0.35", **look} for name, look in thin.items()} | {"chance": plotting.DASHED}
    plotting.legend(figure, entries, 4, handlelength=2.4)
    return figure


# --- leakage -------------------------------------------------------------------------------------------


@plotting.style()
def plot_leak_sight(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """What is read from the prompt against what is seen in the image, both above chance: a numbered point with intervals for each row.

    Args:
        frame: Columns label, leak, leak_low, leak_high, sight, sight_low, sight_high, and control ("K-", "K+" or "").
    """
    check_table(frame, ["label", "control", *(f"{s}{end}" for s in ("leak", "sight") for end in ("", "_low", "_high"))])
    figure, axes = plotting.grid(1, 1, plotting.PAGE, max(0.5 * plotting.PAGE, 0.135 * len(frame) + 0.4), title=title)
    axis, entries = axes[0, 0], {}
    number: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": "white", "fontsize": 5, "fontweight": "bold"}
    for place, row in enumerate(frame.to_dict("records")):
        colour = "0.35" if row["control"] else plotting.look_of(place)["color"]
        axis.plot([row["sight_low"], row["sight_high"]], [row["leak"]] * 2, color=colour, linewidth=0.8, alpha=0.7)
        axis.plot([row["sight"]] * 2, [row["leak_low"], row["leak_high"]], color=colour, linewidth=0.8, alpha=0.7)
        axis.plot(row["sight"], row["leak"], "o", color=colour, markersize=7)
        axis.annotate(str(place + 1), (row["sight"], row["leak"]), **number)
        name = f"{place + 1}  " + f"{row['control']} {row['label']}".strip()
        entries[name] = {"linestyle": "none", "marker": "o", "color": colour}
    axis.axhline(0, **plotting.DOTTED)
    axis.axvline(0, **plotting.DOTTED)
    axis.set(xlabel="sight: content-word F1, image's captions", ylabel="leak: content-word F1, fed text")
    plotting.legend(figure, entries, loc="outside right upper", handlelength=1, labelspacing=0.25)
    return figure


@plotting.style()
def plot_leak_examples(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Texts side by side: a block an image and condition, with what was fed in, a true caption, and what was written.

    Args:
        frame: Columns sample, seen, condition, fed, and one column of outputs an arm.
    """
    check_table(frame, ["sample", "seen", "condition", "fed"])
    arms = [c for c in frame if c not in ("sample", "seen", "condition", "fed")]
    lines: list[tuple[str, str, str]] = []
    for row in frame.to_dict("records"):
        lines.append((f"{row['condition']}, {row['sample']}", "", "0"))
        lines.append(("  fed to the diffusion model", row["fed"] or "nothing", plotting.COLOURS[1]))
        lines.append(("  the image shows", row["seen"], plotting.COLOURS[0]))
        lines += [(f"  {arm}", str(row[arm]), "0.25") for arm in arms if isinstance(row[arm], str)]
    wrapped = [(name, plotting.wrap(text, 0.66 * plotting.PAGE, 6.5), colour) for name, text, colour in lines]
    rows = sum(text.count("\n") + 1.15 for _, text, _ in wrapped)
    figure, axes = plotting.grid(1, 1, plotting.PAGE, 0.115 * rows + 0.2, title=title)
    axis, y = axes[0, 0], 0.0
    for name, text, colour in wrapped:
        look: dict[str, Any] = {"va": "top", "fontsize": 6.5, "color": colour}
        axis.text(0, y, name, fontweight="bold" if colour == "0" else "normal", **look)
        axis.text(0.3, y, text, **look)
        y += text.count("\n") + 1.15
    axis.set(xlim=(0, 1), ylim=(rows, 0))
    plotting.bare(axis)
    return figure


# --- from a store or a table's file ---------------------------------------------------------------------


def open_with_images(store: str, data: str, choose: Choose) -> tuple[xr.DataTree, NDArray[np.uint8], list[int], list[str]]:
    """The store, the chosen samples' images as the model saw them, their positions, and their ids.

    Raises:
        StoreError: The store has no complete sample, or the dataset lacks one of the chosen.
    """
    tree = open_store(store)
    if tree.sizes["sample"] == 0:
        raise StoreError(f"{store} has no complete sample yet; run its extract command again to go on.")
    rows = choose(tree)
    ids = [str(name) for name in tree.dataset["sample"].values[rows]]
    request = provenance(tree)["request"]
    dataset = load_dataset(data or provenance(tree)["data"])
    wanted, images = set(ids), {}
    for index in range(len(dataset)):
        sample = dataset[index]
        if sample.id in wanted:
            images[sample.id] = np.asarray(fit_image(sample.load(), tuple(request["resolution"]), request["fit"]))
        if len(images) == len(wanted):
            break
    if missing := wanted - set(images):
        raise StoreError(
            f"The dataset {data or provenance(tree)['data']!r} has no sample {sorted(missing)[0]!r}; give the one that was extracted with --data."
        )
    return tree, np.stack([images[name] for name in ids]), rows, ids


def _timestep(tree: xr.DataTree, timestep: int | None) -> int:
    return int(provenance(tree)["request"]["timesteps"][0]) if timestep is None else timestep


def _save(figure: Figure, out: Path, name: str, frame: pd.DataFrame, config: Mapping[str, Any], alt: str) -> Path:
    """Writes the figure of a store or a table, unless a picture of something else has that name."""
    kept, source = out / f"{name}.json", _source(config)
    if kept.is_file():
        was = _source(json.loads(kept.read_text(encoding="utf-8")).get("config", {}))
        if Path(was).resolve() != Path(source).resolve():
            raise ValueError(
                f"{out / name}.png shows {was or 'something else'}; choose another --name or --out for the picture of {source}."
            )
    return plotting.save_figure(figure, out, name, frame, config, alt)["png"]


def _source(config: Mapping[str, Any]) -> str:
    return str(config.get("store", config.get("table", "")))


def _origin(tree: xr.DataTree, store: str) -> dict[str, Any]:
    kept = provenance(tree)
    request = kept["request"]
    origin = {"model": request["model"], "data": request["dataset"], "seed": request["seed"]}
    return {"store": store, **origin, "commit": kept.get("commit")}


def pca_figure(
    store: str, data: str, sites: Sequence[str], timestep: int | None, conditioning: str, choose: Choose, out: Path, name: str
) -> Path:
    """Principal components of each site's features as colours; the basis is shared by the shown samples.

    Returns:
        The PNG's path; PDF, CSV and JSON lie beside it.
    """
    tree, images, rows, ids = open_with_images(store, data, choose)
    timestep = _timestep(tree, timestep)
    grids = {}
    for site in sites or [n for n in site_names(tree) if "features" in tree[n].data_vars]:
        values = features(tree, site, timestep=timestep, conditioning=conditioning)
        if {"y", "x"} <= set(values.dims):
            grids[str(values.attrs["site"])] = pca_rgb(values.isel(sample=rows).astype(np.float32).load())
    if not grids:
        raise StoreError("No site of this store has a (y, x) grid to draw; record one with --reduce none or grid:HxW.")
    title = f"Principal components as red, green, blue; timestep {timestep}, {conditioning}"
    frame = pd.concat([g.rename("value").to_dataframe().reset_index().assign(site=s) for s, g in grids.items()])
    kept = [c for c in ("site", "sample", "y", "x", "rgb", "value") if c in frame]
    alt = f"{len(ids)} images and, for each of {len(grids)} sites, the first three principal components of its features as colours."
    config = {**_origin(tree, store), "samples": ids, "timestep": timestep, "conditioning": conditioning}
    return _save(plot_pca_grid(images, grids, title=title), out, name or f"{Path(store).name}.pca", frame[kept], config, alt)


_SMALL_WORDS = frozenset(["a", "an", "the", "of", "and", "at", "in", "on", "to", "is", "with", "there", "picture"])


def words_of(text: str) -> list[str]:
    """The words of a prompt worth a heat map, each once.

    >>> words_of("a red star left of a blue star")
    ['red', 'star', 'left', 'blue']
    """
    return [w for w in dict.fromkeys(re.findall(r"\w+", text)) if w.lower() not in _SMALL_WORDS]


def heatmap_figures(
    store: str,
    data: str,
    words: Sequence[str],
    sites: Sequence[str],
    timestep: int | None,
    conditioning: str,
    choose: Choose,
    out: Path,
    name: str,
) -> list[Path]:
    """One strip a sample: the image, then each word's cross-attention over it."""
    tree, images, rows, ids = open_with_images(store, data, choose)
    timestep = _timestep(tree, timestep)
    prompts = prompt_texts(tree, conditioning)["text"].values
    paths = []
    for number, (row, sample_id) in enumerate(zip(rows, ids, strict=True)):
        text, one = str(prompts[row]), one_sample(tree, row)
        shown = [w for w in words if re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE)] if words else words_of(text)
        if not shown:
            continue
        chosen: dict[str, Any] = {"site": list(sites) or None, "conditioning": conditioning, "timestep": timestep}
        maps = [attention_maps(one, w, **chosen).isel(sample=0, timestep=0, drop=True) for w in shown]
        stacked = xr.concat(maps, pd.Index(shown, name="word"), coords="minimal", compat="override")
        figure = plot_heatmaps(images[number], stacked, title=f"“{text}”   timestep {timestep}")
        frame = stacked.rename("attention").to_dataframe().reset_index()[["word", "y", "x", "attention"]]
        alt = f"The image of “{text}” and the cross-attention of the words {', '.join(shown)} laid over it."
        stem = name or f"{Path(store).name}.heatmaps"
        config = {**_origin(tree, store), "sample": sample_id, "timestep": timestep, "sites": list(sites), "words": shown}
        paths.append(_save(figure, out, stem if len(ids) == 1 else f"{stem}_{number + 1}", frame, config, alt))
    if not paths:
        raise StoreError(f"None of the chosen samples' prompts has any of the words {', '.join(words)}.")
    return paths


def one_sample(tree: xr.DataTree, row: int) -> xr.DataTree:
    """A store's tree with the sample of one row only."""
    kept = {p: d.to_dataset(inherit=False).isel(sample=[row], missing_dims="ignore") for p, d in tree.subtree_with_keys}
    one = xr.DataTree.from_dict(kept)
    one.attrs = tree.attrs
    return one


def _read_table(path: str, kind: str) -> tuple[pd.DataFrame, str]:
    """The rows of a table, at a path or a URL, and the name of its pictures."""
    try:
        return plotting.read_rows(path), PurePosixPath(path).stem
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"No table at {path}; 'diffprobe probe {kind} STORE' writes one.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no table: {error}.") from error


def probe_figures(table: str, out: Path, name: str, beside: Sequence[str] = ()) -> list[Path]:
    """A site x timestep grid of scores, and curves, from a table of `diffprobe probe linear`; beside tables of other models curves alone."""
    frame, stem = _read_table(table, "linear")
    if beside:
        read = [(frame, stem), *(_read_table(other, "linear") for other in beside)]
        for part, which in read:
            check_table(part, ["log_snr"], where=f"The table {which}")
        frame = pd.concat([part.assign(site=f"{which} " + part["site"].astype(str)) for part, which in read])
        frame = frame[np.isfinite(frame["log_snr"])]
        alt = f"Scores of {len(frame)} probes of {len(read)} models by log-SNR, with chance marked."
        config = {"table": table, "beside": list(beside)}
        return [_save(plot_probe_curves(frame, x="log_snr"), out, f"{name or stem}_beside", frame, config, alt)]
    alt = f"Scores of {len(frame)} probes by site and timestep, with chance marked."
    drawn = {"": plot_probe_grid(frame), "_curves": plot_probe_curves(frame)}
    return [_save(figure, out, f"{name or stem}{suffix}", frame, {"table": table}, alt) for suffix, figure in drawn.items()]


def draw_localization(frame: pd.DataFrame, score: str = "auc") -> dict[str, Figure]:
    """What there is to draw of a table of `diffprobe probe localization`, by suffix: grids and controls, curves, heads.

    A grid and a picture of the controls for each role or conditioning; controls at the site with the highest score.
    """
    by = "role" if "role" in frame else "conditioning"
    means = frame[frame["head"].astype(str) == "mean"] if "head" in frame else frame
    own, first = str(frame["map"].iloc[0]), frame["timestep"].min()
    figures = {"curves": plot_localization_curves(means, score, by=by)}
    for kind, part in means.groupby(by, sort=False):
        best = part[(part["map"] == own) & (part["score"] == score)].sort_values("value")["site"].iloc[-1]
        against = "wrong word" if own == "word" else "other text"
        figures[str(kind)] = plot_localization_grid(part, against=against, title=f"{kind}: {own} and mask")
        figures[f"{kind}_controls"] = plot_localization_controls(part[part["site"] == best], title=f"{kind} at {best}")
        if len(means) < len(frame):
            heads = frame[(frame[by] == kind) & (frame["timestep"] == first) & (frame["site"] != "all sites")]
            figures[f"{kind}_heads"] = plot_localization_heads(heads, score, title=f"{kind}, timestep {first}")
    return figures


def localization_figures(table: str, score: str, out: Path, name: str) -> list[Path]:
    """By site and timestep, against controls and chance, and by head, from a table of `diffprobe probe localization`."""
    frame, stem = _read_table(table, "localization")
    alt = "Localization scores of maps against masks ({}) with controls, intervals and chance."
    return [
        _save(figure, out, f"{name or stem}_{suffix}", frame, {"table": table}, alt.format(suffix.replace("_", ", ")))
        for suffix, figure in draw_localization(frame, score).items()
    ]


RESULTS = ("value", "low", "high", "chance", "excess", "excess_low", "excess_high", "n", "n_groups", "seed", "reason")


def similarity_figure(table: str, measure: str, out: Path, name: str) -> Path:
    """From a table of `diffprobe probe similarity`: matrices where timesteps or sites are compared two by two, else curves.

    Returns:
        The PNG's path; PDF, CSV and JSON lie beside it.
    """
    frame, stem = _read_table(table, "similarity")
    if absent := {"measure", "value"} - set(frame):
        raise ValueError(f"{table} is no table of similarities: it has no column {', '.join(sorted(absent))}.")
    if measure and measure not in set(frame["measure"]):
        raise ValueError(f"{table} has no rows of {measure!r}; it has {', '.join(dict.fromkeys(frame['measure']))}.")
    frame = frame[frame["measure"] == (measure or frame["measure"].iloc[0])]
    same = "site" in frame  # two stores may share a site's name, two sites of one store do not
    between = "timestep" if "timestep_a" in frame else "site" if "site_a" in frame and not same else None
    if not between and "site_a" in frame:
        frame = frame.assign(**{side: frame[side].where(frame[side].ne(""), frame["site"]) for side in ("site_a", "site_b")})
        frame = frame.assign(site=frame.pop("site_a"))
    x, label = ("guidance", "guidance s") if "guidance" in frame else ("timestep", NOISE_AXIS)
    taken = {*RESULTS, "log_snr", *((f"{between}_a", f"{between}_b") if between else ("site", x))}
    keys = [str(c) for c in frame if c not in taken and (c == "measure" or frame[c].nunique() > 1)]
    words = [frame[c].map("t = {}".format) if c == "timestep" else frame[c].astype(str) for c in keys]
    frame = frame.assign(panel=pd.concat(words, axis=1).agg(", ".join, axis=1))
    if between:
        figure = plot_similarity_matrix(frame, between)
    else:
        figure = plot_site_curves(frame, x=x, x_label=label, y_label="similarity", share_y=True)
    alt = f"Similarity of features ({frame['measure'].iloc[0]}) by site, {len(frame)} comparisons, with chance."
    return _save(figure, out, name or stem, frame, {"table": table}, alt)
