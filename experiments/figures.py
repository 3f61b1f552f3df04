"""Figures that only experiments draw, in the look of `diffprobe.plotting`.

Functions take tables or arrays and return a Figure.  The invariant is the same: equal rows give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from diffprobe.plotting import COLUMN, HEAT, MARKERS, OKABE_ITO, OLD_COLUMNS, PAGE, bare, grid, pad, short, styled, wrap


@styled
def plot_probe_bars(frame: pd.DataFrame, *, name: str = "accuracy", title: str = "", width: float = PAGE) -> Figure:
    """Scores of several encoders as bars with their intervals, a group a label; chance dashed, the control task hollow.

    Args:
        frame: Rows with label, encoder, value, low, high, chance and control_value (NaN for none); one row a bar.
        name: Of the score.
        title: Above the figure.
        width: In inches.
    """
    frame = frame.rename(columns=OLD_COLUMNS)
    labels, encoders = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["encoder"]))
    figure, axes = grid(1, 1, width, 2.1 + 0.2 * bool(title))
    axis = axes[0, 0]
    step = 0.8 / len(encoders)
    top = float(frame[["high", "chance"]].to_numpy(dtype=float).max()) * 1.08
    controlled = bool(frame["control_value"].notna().any())
    for group, label in enumerate(labels):
        rows = frame[frame["label"] == label]
        for _, row in rows.iterrows():
            place = encoders.index(row["encoder"])
            shown = [e for e in encoders if e in set(rows["encoder"])]
            x = group + (shown.index(row["encoder"]) - (len(shown) - 1) / 2) * step
            axis.bar(x, row["value"], 0.9 * step, color=OKABE_ITO[place % len(OKABE_ITO)])
            axis.plot([x, x], [row["low"], row["high"]], color="black", linewidth=0.9)
            axis.plot(
                x, row["control_value"], marker="o", markersize=3, color="black", markerfacecolor="white", linestyle="none"
            )
            axis.text(x, row["high"] + 0.012 * top, short(float(row["value"])), ha="center", va="bottom", fontsize=6)
        axis.plot([group - 0.42, group + 0.42], [rows["chance"].mean()] * 2, color="0.3", linewidth=1, linestyle=(0, (3, 1.5)))
    for place, encoder in enumerate(encoders):
        axis.bar(0, 0, color=OKABE_ITO[place % len(OKABE_ITO)], label=encoder)
    axis.plot([], [], color="0.3", linewidth=1, linestyle=(0, (3, 1.5)), label="chance")
    if controlled:
        axis.plot(
            [], [], marker="o", markersize=3, color="black", markerfacecolor="white", linestyle="none", label="control task"
        )
    axis.set_xticks(range(len(labels)), [wrap(str(label), (width - 0.6) / len(labels)) for label in labels])
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(min(0.0, float(frame["low"].min())), top)
    axis.set_ylabel(f"{name}, 95% interval")
    axis.grid(axis="y", color="0.9", linewidth=0.5)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(encoders) + 1 + controlled)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_probe_differences(frame: pd.DataFrame, *, title: str = "", width: float = PAGE) -> Figure:
    """Paired differences of scores as dots with intervals: a panel a label, a line a site, a colour a comparison.

    Args:
        frame: Rows with what, label, site, value, low, high.
        title: Above the figure.
        width: In inches.
    """
    labels, sites, kinds = (list(dict.fromkeys(frame[name])) for name in ("label", "site", "what"))
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    figure, axes = grid(rows, columns, width, rows * (0.2 * len(sites) + 0.5) + 0.3 + 0.2 * bool(title))
    reach = 1.05 * max(1e-3, float(np.abs(frame[["low", "high"]].to_numpy(dtype=float)).max()))
    for place, (axis, label) in enumerate(zip(axes.flat, labels, strict=False)):
        for _, row in frame[frame["label"] == label].iterrows():
            kind = kinds.index(row["what"])
            line = sites.index(row["site"]) + 0.24 * (kind - (len(kinds) - 1) / 2)
            look: dict[str, Any] = {"color": OKABE_ITO[kind % len(OKABE_ITO)]}
            axis.plot([row["low"], row["high"]], [line, line], linewidth=1, **look)
            axis.plot(row["value"], line, marker=MARKERS[kind % len(MARKERS)], markersize=3, linestyle="none", **look)
        axis.axvline(0, color="0.35", linewidth=0.8, linestyle=(0, (3, 1.5)))
        axis.set_xlim(-reach, reach)
        axis.set_ylim(len(sites) - 0.4, -0.6)
        axis.set_yticks(range(len(sites)), sites if place % columns == 0 else [])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.set_title(label)
        axis.set_xlabel("difference in accuracy")
    for axis in list(axes.flat)[len(labels) :]:
        axis.set_axis_off()
    for kind, name in enumerate(kinds):
        axes.flat[0].plot(
            [], [], marker=MARKERS[kind % len(MARKERS)], markersize=3, color=OKABE_ITO[kind % len(OKABE_ITO)], label=name
        )
    figure.legend(loc="outside lower center", ncols=len(kinds))
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_scores(
    frame: pd.DataFrame,
    *,
    by: str = "timestep",
    x_label: str = "share correct, 95% interval",
    title: str = "",
    width: float = COLUMN,
) -> Figure:
    """Scores as dots with their intervals, one line each, a tick at each one's chance.

    Args:
        frame: Rows with what, value, low, high, chance; rows of the same `what` share a line, coloured by the column `by`.
        by: Numbers or texts; rows may lack it.
        x_label: What a share is of.
        title: Above the figure.
        width: In inches.
    """
    names = list(dict.fromkeys(frame["what"]))
    steps = sorted(frame[by].dropna().unique()) if by in frame else []
    figure, axes = grid(1, 1, width, 0.24 * len(names) + 0.55 + 0.25 * bool(steps) + 0.2 * bool(title))
    axis = axes[0, 0]
    for line, name in enumerate(names):
        rows = frame[frame["what"] == name]
        for _, found in rows.iterrows():
            place = steps.index(found[by]) if steps and found[by] in steps else None
            shift = 0.0 if place is None else 0.22 * (place - (len(steps) - 1) / 2)
            colour = "0.2" if place is None else OKABE_ITO[place % len(OKABE_ITO)]
            axis.plot([found["low"], found["high"]], [line + shift] * 2, color=colour, linewidth=1, clip_on=False)
            axis.plot(found["value"], line + shift, marker="o", markersize=3, color=colour, linestyle="none", clip_on=False)
        axis.plot([rows["chance"].mean()] * 2, [line - 0.4, line + 0.4], color="0.55", linewidth=1, linestyle=(0, (2, 1)))
    for place, step in enumerate(steps):
        axis.plot(
            [],
            [],
            marker="o",
            markersize=3,
            color=OKABE_ITO[place % len(OKABE_ITO)],
            label=f"{by}: {step}" if isinstance(step, str) else f"{by} {step:g}",
        )
    axis.plot([], [], color="0.55", linewidth=1, linestyle=(0, (2, 1)), label="chance")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.set_xlabel(x_label)
    axis.grid(axis="x", color="0.9", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_samples(
    images: NDArray[np.uint8], texts: Sequence[str], *, columns: int = 6, title: str = "", width: float = PAGE
) -> Figure:
    """Pictures in rows, each with its text below.

    Args:
        images: (image, y, x, 3).
        texts: One an image; line breaks are kept.
        columns: Pictures a row.
        title: Above the figure.
        width: In inches.
    """
    rows = -(-len(images) // columns)
    size = width / columns
    below = ["\n".join(wrap(line, size, 5.5) for line in text.split("\n")) for text in texts]
    lines = max(text.count("\n") + 1 for text in below)
    figure, axes = grid(rows, columns, width, rows * (size + 0.11 * lines) + 0.2 * bool(title))
    pad(figure, 0.02, 0.0)
    for place, axis in enumerate(axes.flat):
        bare(axis)
        if place < len(images):
            axis.imshow(images[place])
            axis.set_xlabel(below[place], fontsize=5.5, labelpad=2)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_alignment(
    frame: pd.DataFrame, names: Mapping[str, str], *, reference: str = "", title: str = "", width: float = PAGE
) -> Figure:
    """Shares of items matched right, by pattern: a panel per benchmark, a dot with its interval per score.

    Args:
        frame: Rows of `diffprobe.probes.alignment.alignment_table` with the column benchmark; rows of pattern "macro" are
            left out.  Rows whose score is `reference` are drawn hollow.
        names: What each score is called, in the order of the legend; others are not drawn.
        reference: A score that another data set's published numbers stand under.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: there is no row to draw.
    """
    shown = frame[frame["score"].isin(names) & (frame["pattern"] != "macro")]
    benchmarks = list(dict.fromkeys(shown["benchmark"]))
    scores = [name for name in names if name in set(shown["score"])]
    if not scores:
        raise ValueError(f"The table has no rows of the scores {', '.join(names)}.")
    panels = []
    for benchmark in benchmarks:
        part = shown[shown["benchmark"] == benchmark]
        several = part["metric"].nunique() > 1
        panels.append((benchmark, part, list(dict.fromkeys(zip(part["metric"], part["pattern"], strict=True))), several))
    step = 0.82 / len(scores)
    height = max(len(lines) for _, _, lines, _ in panels) * (0.085 * len(scores) + 0.08) + 0.5
    legend = 0.16 * -(-(len(scores) + 1) // 3) + 0.1
    figure, axes = grid(1, len(panels), width, height + legend + 0.2 * bool(title))
    for axis, (benchmark, part, lines, several) in zip(axes[0], panels, strict=True):
        for line, (metric, pattern) in enumerate(lines):
            here = part[(part["metric"] == metric) & (part["pattern"] == pattern)].set_index("score")
            chance = float(here["chance"].mean())
            axis.plot([chance] * 2, [line - 0.47, line + 0.47], color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
            for place, score in enumerate(scores):
                if score not in here.index:
                    continue
                row, y = here.loc[score], line + (place - (len(scores) - 1) / 2) * step
                look = _score_look(place, score == reference)
                axis.plot([row["low"], row["high"]], [y, y], color=look["color"], linewidth=0.9, zorder=2)
                axis.plot(row["value"], y, linestyle="none", zorder=3, clip_on=False, **look)
        for line in range(1, len(lines)):
            axis.axhline(line - 0.5, color="0.88", linewidth=0.5, zorder=0)
        axis.set_yticks(range(len(lines)), [f"{metric}: {pattern}" if several else pattern for metric, pattern in lines])
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlim(0, 1)
        axis.set_xlabel("share right, 95% interval")
        axis.set_title(benchmark)
        axis.grid(axis="x", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
    handles = [Line2D([], [], linestyle="none", label=names[s], **_score_look(k, s == reference)) for k, s in enumerate(scores)]
    handles.append(Line2D([], [], color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.2)
    if title:
        figure.suptitle(title)
    return figure


def _score_look(place: int, hollow: bool) -> dict[str, Any]:
    if hollow:
        return {"color": "0.35", "marker": "D", "markerfacecolor": "white", "markersize": 3}
    return {"color": OKABE_ITO[place % len(OKABE_ITO)], "marker": MARKERS[place % len(MARKERS)], "markersize": 3}


@styled
def plot_attention_strips(
    images: Sequence[NDArray[np.uint8]], maps: Sequence[xr.DataArray], *, title: str = "", width: float = PAGE
) -> Figure:
    """Token-wise attention over images: a block an image, a row a timestep, a column a word.

    A word's maps at all timesteps share one colour scale, so that rows can be compared; words do not, for their totals
    differ by orders of magnitude.

    Args:
        images: (y, x, 3) each.
        maps: (timestep, word, y, x), one an image; at most as many words as fit the page are drawn.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: there are not as many maps as images, or they have other dimensions.
    """
    if len(images) != len(maps) or any(set(m.dims) != {"timestep", "word", "y", "x"} for m in maps):
        raise ValueError(f"{len(images)} images need as many maps (timestep, word, y, x); got {[m.dims for m in maps]}.")
    columns = 1 + max(m.sizes["word"] for m in maps)
    steps = [m.sizes["timestep"] for m in maps]
    cell = width / columns
    figure, axes = grid(sum(steps), columns, width, sum(steps) * (cell - 0.02) + 0.17 * len(maps) + 0.2 * bool(title))
    pad(figure, 0.01, 0.01)
    row = 0
    for image, found in zip(images, maps, strict=True):
        grey = np.asarray(Image.fromarray(image).convert("L"))
        found = found.transpose("timestep", "word", "y", "x")
        for k, step in enumerate(found["timestep"].values):
            axes[row, 0].imshow(image)
            axes[row, 0].set_ylabel(f"t = {int(step)}")
            for column in range(1, columns):
                axis = axes[row, column]
                if column > found.sizes["word"]:
                    axis.set_axis_off()
                    continue
                values = found.isel(word=column - 1).to_numpy().astype(np.float32)
                low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-12)
                large = np.asarray(Image.fromarray(values[k]).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
                axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
                strength = 0.25 + 0.55 * np.clip((large - low) / (high - low), 0, 1)
                axis.imshow(large, cmap=HEAT, vmin=low, vmax=high, alpha=strength)
                if k == 0:
                    axis.set_title(wrap(str(found["word"].values[column - 1]), cell), pad=2, fontsize=7)
            row += 1
    for axis in axes.flat:
        bare(axis)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_differences(
    images: Sequence[NDArray[np.uint8]],
    maps: NDArray[np.float32],
    regions: NDArray[np.bool_],
    texts: Sequence[Sequence[str]],
    *,
    title: str = "",
    width: float = PAGE,
) -> Figure:
    """A row an image: the image, then the norm of what each text changes in the features, with the region it speaks of outlined.

    Args:
        images: (y, x, 3) each.
        maps: (image, text, y, x); every map has its own colour scale.
        regions: (image, text, y, x) on the images' grid.
        texts: One list an image, written above its maps.
        title: Above the figure.
        width: In inches.
    """
    columns = 1 + maps.shape[1]
    cell = width / columns
    lines = max(wrap(text, cell).count("\n") + 1 for row in texts for text in row)
    figure, axes = grid(len(images), columns, width, len(images) * (cell + 0.125 * lines) + 0.2 * bool(title))
    pad(figure, 0.02, 0.02)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        for column, text in enumerate(texts[row], start=1):
            axis, heat = axes[row, column], maps[row, column - 1]
            large = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
            axis.imshow(large, cmap=HEAT)
            axis.contour(regions[row, column - 1].astype(float), levels=[0.5], colors="white", linewidths=1.6)
            axis.contour(regions[row, column - 1].astype(float), levels=[0.5], colors=OKABE_ITO[5], linewidths=0.8)
            axis.set_title(wrap(text, cell), pad=3, fontsize=7)
    for axis in axes.flat:
        bare(axis)
        axis.set_anchor("S")
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_leak_rows(frame: pd.DataFrame, *, change: bool = False, title: str = "", width: float = PAGE) -> Figure:
    """Two panels, leak and sight; a row a label, with its interval, chance dotted.

    Args:
        frame: Rows of label, score ("leak", "sight"), value, low, high; with `change` also change, change_low,
            change_high, which are drawn instead.
        change: Draw changes from a baseline, against a line of no change.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: there are no rows, or a label has several for one score.
    """
    if frame.empty or frame.duplicated(["label", "score"]).any():
        raise ValueError("plot_leak_rows takes one row a label and score, at least one.")
    labels = list(dict.fromkeys(frame["label"]))
    names = ("change", "change_low", "change_high") if change else ("value", "low", "high")
    lines = [wrap(str(label), 0.3 * width) for label in labels]
    height = sum(0.1 + 0.12 * (line.count("\n") + 1) for line in lines) + 0.55 + 0.2 * bool(title)
    figure, axes = grid(1, 2, width, height)
    for axis, score, colour, marker in zip(axes[0], ("leak", "sight"), OKABE_ITO[1::-1], MARKERS, strict=False):
        part = frame[frame["score"] == score].set_index("label")
        for place, label in enumerate(labels):
            if label in part.index:
                value, low, high = (float(part.loc[label, name]) for name in names)
                axis.plot([low, high], [place] * 2, color=colour, linewidth=1)
                axis.plot(value, place, marker=marker, color=colour, linestyle="none")
        axis.axvline(0, color="0.35", linewidth=0.9, linestyle=(0, (1, 1.5)))
        axis.set_title(f"change of {score}" if change else score)
        axis.set_xlabel("content-word F1" + (" against nothing cut" if change else " above chance") + ", 95% interval")
        axis.set_yticks(range(len(labels)), lines if axis is axes[0, 0] else [""] * len(labels))
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(axis="x", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
    if title:
        figure.suptitle(title)
    return figure


@styled
def plot_score_table(frame: pd.DataFrame, *, title: str = "", width: float = PAGE) -> Figure:
    """A table of scores: ours with its interval in each cell, what was published below it in grey; the best of a column bold.

    Args:
        frame: Rows of label, score, value, low, high (shares), published (in percent, NaN for none); one a label and score.
            A column `chance` gives the last line.
        title: Above the figure.
        width: In inches.

    Raises:
        ValueError: there are no rows, or a label has several for one score.
    """
    if frame.empty or frame.duplicated(["label", "score"]).any():
        raise ValueError("plot_score_table takes one row a label and score, at least one.")
    labels, scores = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["score"]))
    first, lines = 0.24, 3 if frame["published"].notna().any() else 2  # the labels' share of the width; lines of a cell
    places = [first + (k + 0.5) * (1 - first) / len(scores) for k in range(len(scores))]
    tall = 0.115 * lines + 0.06
    figure, axes = grid(1, 1, width, tall * len(labels) + 0.6 + 0.2 * bool(title))
    axis, rows = axes[0, 0], frame.set_index(["label", "score"])
    best = frame.groupby("score")["value"].max()
    bottom, head = tall * len(labels), 7.5 if len(scores) <= 7 else 5.5
    for x, score in zip(places, scores, strict=True):
        axis.text(
            x,
            -0.15,
            wrap(str(score), width * (1 - first) / len(scores)),
            ha="center",
            va="center",
            fontsize=head,
            fontweight="bold",
        )
        chance = _percent(frame[frame["score"] == score]["chance"].mean())
        axis.text(x, bottom + 0.13, chance, ha="center", va="center", fontsize=6.5, color="0.45")
    axis.text(0, bottom + 0.13, "chance", va="center", fontsize=6.5, color="0.45")
    for line, label in enumerate(labels):
        top = tall * line
        axis.axhline(top, color="0.85", linewidth=0.5)
        parts = str(label).replace(" +", "\n+").split("\n")  # further sites below the first
        text = "\n".join(wrap(part, width * first, 6.2) for part in parts)
        axis.text(0, top + 0.03, text, va="top", fontsize=6.5)
        for x, score in zip(places, scores, strict=True):
            if (label, score) not in rows.index:
                continue
            row = rows.loc[(label, score)]
            value, low, high, published = (float(row[name]) for name in ("value", "low", "high", "published"))
            look: dict[str, Any] = {"ha": "center", "va": "center"}
            bold = "bold" if value == best[score] else "normal"
            axis.text(x, top + 0.1, _percent(value), fontsize=6.5, fontweight=bold, **look)
            axis.text(x, top + 0.215, f"[{_percent(low)}, {_percent(high)}]", fontsize=5, color="0.25", **look)
            if not np.isnan(published):
                axis.text(x, top + 0.33, f"{published:g}", fontsize=6, color="0.5", **look)
    axis.axhline(bottom, color="0.5", linewidth=0.7)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom + 0.25, -0.35)
    bare(axis)
    if title:
        figure.suptitle(title)
    return figure


def _percent(share: float) -> str:
    """
    >>> _percent(0.1234), _percent(float("nan"))
    ('12.3', '')
    """
    return "" if np.isnan(share) else f"{100 * share:.1f}"
