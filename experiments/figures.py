"""Figures that only experiments draw, made of the primitives of `diffprobe.plotting`.

Functions take tables or arrays and return a Figure; `title` is written above it, `width` is in inches.  The invariant is
that of `plotting`: equal rows give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffprobe import plotting

COLOURS, MARKERS = plotting.COLOURS, plotting.MARKERS


def in_order(frame: pd.DataFrame, sites: Sequence[str]) -> pd.DataFrame:
    """The rows of these sites for `plot_site_curves`: panels in the frame's order, within a panel sites in the given order."""
    order = {name: list(dict.fromkeys(names)) for name, names in (("panel", frame["panel"]), ("site", sites))}
    kept = frame[frame["site"].isin(order["site"])]
    return kept.iloc[np.lexsort([kept[name].map(order[name].index) for name in ("site", "panel")])]


@plotting.style()
def plot_probe_bars(frame: pd.DataFrame, *, name: str = "accuracy") -> Figure:
    """Scores of several encoders as bars with their intervals, a group a label; chance dashed, the control task hollow.

    Args:
        frame: Rows with label, encoder, value, low, high, chance and control_value (NaN for none); one row a bar.
        name: Of the score.
    """
    frame = frame.rename(columns=plotting.OLD_COLUMNS)
    labels, encoders = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["encoder"]))
    figure, axes = plotting.grid(1, 1, plotting.PAGE, 2.1)
    axis = axes[0, 0]
    step = 0.8 / len(encoders)
    top = float(frame[["high", "chance"]].to_numpy(dtype=float).max()) * 1.08
    hollow: dict[str, Any] = {"marker": "o", "color": "black", "markerfacecolor": "white", "linestyle": "none"}
    dashed: dict[str, Any] = {"color": "0.3", "linewidth": 1, "linestyle": (0, (3, 1.5))}
    for group, label in enumerate(labels):
        rows = frame[frame["label"] == label]
        shown = [e for e in encoders if e in set(rows["encoder"])]
        for row in rows.to_dict("records"):
            x = group + (shown.index(row["encoder"]) - (len(shown) - 1) / 2) * step
            axis.bar(x, row["value"], 0.9 * step, color=COLOURS[encoders.index(row["encoder"]) % len(COLOURS)])
            axis.plot([x, x], [row["low"], row["high"]], color="black", linewidth=0.9)
            axis.plot(x, row["control_value"], **hollow)
            axis.text(x, row["high"] + 0.012 * top, plotting.short(row["value"]), ha="center", va="bottom", fontsize=6)
        axis.plot([group - 0.42, group + 0.42], [rows["chance"].mean()] * 2, **dashed)
    for place, encoder in enumerate(encoders):
        axis.bar(0, 0, color=COLOURS[place % len(COLOURS)], label=encoder)
    axis.plot([], [], label="chance", **dashed)
    controlled = bool(frame["control_value"].notna().any())
    if controlled:
        axis.plot([], [], label="control task", **hollow)
    axis.set_xticks(range(len(labels)), [plotting.wrap(str(label), (plotting.PAGE - 0.6) / len(labels)) for label in labels])
    axis.tick_params(axis="x", length=0)
    axis.set(ylim=(min(0.0, float(frame["low"].min())), top), ylabel=f"{name}, 95% interval")
    plotting.ruled(axis, "y")
    figure.legend(loc="outside lower center", ncols=len(encoders) + 1 + controlled)
    return figure


@plotting.style()
def plot_probe_differences(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Paired differences of scores as dots with intervals: a panel a label, a line a site, a colour a comparison.

    Args:
        frame: Rows with what, label, site, value, low, high.
        title: Above the figure.
    """
    labels, sites, kinds = (list(dict.fromkeys(frame[name])) for name in ("label", "site", "what"))
    height = 0.2 * len(sites) + 0.5
    figure, shown = plotting.panels(len(labels), 3, plotting.PAGE, height, 0.3, title=title)
    reach = 1.05 * max(1e-3, float(np.abs(frame[["low", "high"]].to_numpy(dtype=float)).max()))
    looks: dict[str, Any] = {
        kind: {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]} for k, kind in enumerate(kinds)
    }
    for (axis, leftmost, _), label in zip(shown, labels, strict=True):
        part = frame[frame["label"] == label]
        for row in part.to_dict("records"):
            there = set(part.loc[part["site"] == row["site"], "what"])
            beside = [kind for kind in kinds if kind in there]  # what shares the line, around its middle
            line = sites.index(row["site"]) + 0.24 * (beside.index(row["what"]) - (len(beside) - 1) / 2)
            plotting.interval(axis, row, line, **looks[row["what"]])
        axis.axvline(0, color="0.35", linewidth=0.8, linestyle=(0, (3, 1.5)))
        axis.set(xlim=(-reach, reach), title=label, xlabel="difference in accuracy")
        plotting.forest(axis, sites, written=leftmost, room=0.6)
    plotting.legend(figure, looks, len(kinds))
    return figure


@plotting.style()
def plot_block_grid(frame: pd.DataFrame) -> Figure:
    """Accuracy by block and timestep: a column of panels a label, a row of panels a way to draw noise; a label has one scale.

    Args:
        frame: Rows of label, what (the noise), site, timestep, value, chance.
    """
    labels, kinds, sites = (list(dict.fromkeys(frame[name])) for name in ("label", "what", "site"))
    steps = sorted({int(t) for t in frame["timestep"]})
    columns, height = len(labels), 0.115 * len(sites) + 0.35
    figure, shown = plotting.panels(columns * len(kinds), columns, plotting.PAGE, height, 0.1, pad=(0.02, 0.02))
    for place, (axis, leftmost, lowest) in enumerate(shown):
        kind, label = kinds[place // columns], labels[place % columns]
        mine = frame[frame["label"] == label]
        part = mine[mine["what"] == kind].assign(timestep=lambda f: f["timestep"].astype(int))
        table = part.pivot(index="site", columns="timestep", values="value").reindex(index=sites, columns=steps)
        limits = plotting.limits_with(mine["value"].to_numpy(float), float(mine["chance"].mean()))
        names = [str(site).removesuffix("-Out") for site in sites] if leftmost else ()
        plotting.cells(axis, table.to_numpy(float), [str(t) for t in steps] if lowest else (), names, limits)
        axis.set_title(f"{label}, {kind}\n(chance {plotting.short(float(part['chance'].mean()))})", pad=3, fontsize=7)
        axis.tick_params(labelsize=5.5)
    figure.supxlabel("timestep")
    return figure


@plotting.style()
def plot_scores(
    frame: pd.DataFrame,
    *,
    by: str = "timestep",
    x_label: str = "share correct, 95% interval",
    title: str = "",
    width: float = plotting.COLUMN,
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
    figure, axes = plotting.grid(1, 1, width, 0.24 * len(names) + 0.55 + 0.25 * bool(steps), title=title)
    axis = axes[0, 0]
    dashed: dict[str, Any] = {"color": "0.55", "linewidth": 1, "linestyle": (0, (2, 1))}
    for line, name in enumerate(names):
        rows = frame[frame["what"] == name]
        for row in rows.to_dict("records"):
            place = steps.index(row[by]) if steps and row[by] in steps else None
            shift = 0.0 if place is None else 0.22 * (place - (len(steps) - 1) / 2)
            colour = "0.2" if place is None else COLOURS[place % len(COLOURS)]
            plotting.interval(axis, row, line + shift, colour, clip_on=False)
        axis.plot([rows["chance"].mean()] * 2, [line - 0.4, line + 0.4], **dashed)
    entries: dict[str, Any] = {
        f"{by}: {step}" if isinstance(step, str) else f"{by} {step:g}": {"marker": "o", "color": COLOURS[k % len(COLOURS)]}
        for k, step in enumerate(steps)
    }
    plotting.forest(axis, names, room=0.6)
    axis.set(xlim=(0, 1), xlabel=x_label)
    plotting.legend(figure, entries | {"chance": dashed}, 2)
    return figure


@plotting.style()
def plot_samples(images: NDArray[np.uint8], texts: Sequence[str]) -> Figure:
    """Pictures in rows of six, each with its text below.

    Args:
        images: (image, y, x, 3).
        texts: One an image; line breaks are kept.
    """
    columns, width = 6, plotting.PAGE
    rows, size = -(-len(images) // columns), width / columns
    below = ["\n".join(plotting.wrap(line, size, 5.5) for line in text.split("\n")) for text in texts]
    figure, axes = plotting.pictures(rows, columns, width, rows * (size + 0.11 * plotting.line_count(below)), (0.02, 0.0))
    for axis, image, text in zip(axes.flat, images, below, strict=False):
        axis.imshow(image)
        axis.set_xlabel(text, fontsize=5.5, labelpad=2)
    return figure


@plotting.style()
def plot_alignment(frame: pd.DataFrame, names: Mapping[str, str]) -> Figure:
    """Shares of items matched right as a table of colours: a panel a benchmark, a line a score, a column a pattern or metric.

    Args:
        frame: Rows of `diffprobe.probes.alignment.alignment_table` with the column benchmark; rows of pattern "macro" are
            left out.
        names: What each score is called, in the order of the lines; others are not drawn.

    Raises:
        ValueError: there is no row to draw.
    """
    shown = frame[frame["score"].isin(names) & (frame["pattern"] != "macro")]
    if shown.empty:
        raise ValueError(f"The table has no rows of the scores {', '.join(names)}.")
    parts = {name: shown[shown["benchmark"] == name] for name in dict.fromkeys(shown["benchmark"])}
    lines = [score for score in names if score in set(shown["score"])]
    height = 0.19 * len(lines) + 0.75
    figure, panels = plotting.panels(len(parts), 1, plotting.PAGE, height)
    for (axis, _, _), (benchmark, part) in zip(panels, parts.items(), strict=True):
        several = part["metric"].nunique() > 1
        columns = part["metric"] + ": " + part["pattern"] if several else part["pattern"]
        table = part.assign(column=columns).pivot(index="score", columns="column", values="value")
        heads = list(dict.fromkeys(columns))
        chances = part.assign(column=columns).groupby("column")["chance"].mean()
        texts = [f"{plotting.wrap(head, 0.6)}\n({plotting.short(float(chances[head]))})" for head in heads]
        values = table.reindex(index=lines, columns=heads).to_numpy(float)
        plotting.cells(axis, values, texts, [names[score] for score in lines], limits=(0, 1))
        axis.xaxis.tick_top()
        axis.tick_params(axis="x", labelsize=6, length=0)
        axis.set_xlabel(f"{benchmark}: share right (chance), n = {int(part[part['low'].notna()]['n'].max())}")
    return figure


@plotting.style()
def plot_attention_strips(images: Sequence[NDArray[np.uint8]], maps: Sequence[xr.DataArray], *, title: str = "") -> Figure:
    """Token-wise attention over images: a block an image, a row a timestep, a column a word.

    A word's maps at all timesteps share one colour scale, so that rows can be compared; words do not, for their totals
    differ by orders of magnitude.

    Args:
        images: (y, x, 3) each.
        maps: (timestep, word, y, x), one an image.
        title: Above the figure.

    Raises:
        ValueError: there are not as many maps as images, or they have other dimensions.
    """
    if len(images) != len(maps) or any(set(m.dims) != {"timestep", "word", "y", "x"} for m in maps):
        raise ValueError(f"{len(images)} images need as many maps (timestep, word, y, x); got {[m.dims for m in maps]}.")
    columns, rows = 1 + max(m.sizes["word"] for m in maps), sum(m.sizes["timestep"] for m in maps)
    cell = plotting.PAGE / columns
    height = rows * (cell - 0.02) + 0.17 * len(maps)
    figure, axes = plotting.pictures(rows, columns, plotting.PAGE, height, (0.01, 0.01), title=title)
    row = 0
    for image, found in zip(images, maps, strict=True):
        values = found.transpose("timestep", "word", "y", "x").to_numpy().astype(np.float32)
        for k, step in enumerate(found["timestep"].values):
            axes[row, 0].imshow(image)
            axes[row, 0].set_ylabel(f"t = {int(step)}")
            for axis, word, steps in zip(axes[row, 1:], found["word"].values, values.swapaxes(0, 1), strict=False):
                low, high = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1e-12)
                plotting.lay_over(axis, image, steps[k], (low, high), lambda share: 0.25 + 0.55 * share)
                if k == 0:
                    axis.set_title(plotting.wrap(str(word), cell), pad=2, fontsize=7)
            for axis in axes[row, 1 + found.sizes["word"] :]:
                axis.set_axis_off()
            row += 1
    return figure


@plotting.style()
def plot_differences(
    images: Sequence[NDArray[np.uint8]],
    maps: NDArray[np.float32],
    regions: NDArray[np.bool_],
    texts: Sequence[Sequence[str]],
    *,
    title: str = "",
) -> Figure:
    """A row an image: the image, then the norm of what each text changes in the features, with the region it speaks of outlined.

    Args:
        images: (y, x, 3) each.
        maps: (image, text, y, x); every map has its own colour scale.
        regions: (image, text, y, x) on the images' grid.
        texts: One list an image, written above its maps.
        title: Above the figure.
    """
    columns = 1 + maps.shape[1]
    cell = plotting.PAGE / columns
    titles = [[plotting.wrap(text, cell) for text in row] for row in texts]
    height = len(images) * (cell + 0.125 * plotting.line_count(text for row in titles for text in row))
    figure, axes = plotting.pictures(len(images), columns, plotting.PAGE, height, (0.02, 0.02), title=title)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        for axis, heat, region, text in zip(axes[row, 1:], maps[row], regions[row], titles[row], strict=True):
            axis.imshow(plotting.enlarged(heat.astype(np.float32), image), cmap=plotting.HEAT)
            axis.contour(region.astype(float), levels=[0.5], colors="white", linewidths=1.6)
            axis.contour(region.astype(float), levels=[0.5], colors=COLOURS[5], linewidths=0.8)
            axis.set_title(text, pad=3, fontsize=7)
    for axis in axes.flat:
        axis.set_anchor("S")
    return figure


@plotting.style()
def plot_leak_rows(frame: pd.DataFrame, *, change: bool = False, title: str = "") -> Figure:
    """Two panels, leak and sight; a row a label, with its interval, chance dotted.

    Args:
        frame: Rows of label, score ("leak", "sight"), value, low, high; with `change` also change, change_low,
            change_high, which are drawn instead.
        change: Draw changes from a baseline, against a line of no change.
        title: Above the figure.

    Raises:
        ValueError: there are no rows, or a label has several for one score.
    """
    if frame.empty or frame.duplicated(["label", "score"]).any():
        raise ValueError("plot_leak_rows takes one row a label and score, at least one.")
    if change:
        frame = frame.assign(value=frame["change"], low=frame["change_low"], high=frame["change_high"])
    labels = list(dict.fromkeys(frame["label"]))
    lines = [plotting.wrap(str(label), 0.3 * plotting.PAGE) for label in labels]
    height = sum(0.1 + 0.12 * (line.count("\n") + 1) for line in lines) + 0.55
    figure, axes = plotting.grid(1, 2, plotting.PAGE, height, title=title)
    for axis, score, colour, marker in zip(axes[0], ("leak", "sight"), COLOURS[1::-1], MARKERS, strict=False):
        for row in frame[frame["score"] == score].to_dict("records"):
            plotting.interval(axis, row, labels.index(row["label"]), colour, marker)
        axis.axvline(0, **plotting.DOTTED)
        axis.set_title(f"change of {score}" if change else score)
        axis.set_xlabel("content-word F1" + (" against nothing cut" if change else " above chance") + ", 95% interval")
        plotting.forest(axis, lines, written=score == "leak")
    return figure


@plotting.style()
def plot_score_table(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """A table of scores: ours with its interval in each cell, what was published below it in grey.

    The best of a column is bold where its interval holds no other label's value; what is within the noise is not.  A score
    of zero is a dash.

    Args:
        frame: Rows of label, score, value, low, high (shares), published (in percent, NaN for none); one a label and score.
            A column `chance` gives the last line, that of a coin; a column `blind` one more, that of who gives all images
            one answer.
        title: Above the figure.

    Raises:
        ValueError: there are no rows, or a label has several for one score.
    """
    if frame.empty or frame.duplicated(["label", "score"]).any():
        raise ValueError("plot_score_table takes one row a label and score, at least one.")
    labels, scores = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["score"]))
    width, first = plotting.PAGE, 0.24  # the labels' share of the width
    lines = 3 if frame["published"].notna().any() else 2  # of a cell
    tall = 0.115 * lines + 0.06
    bottom, head = tall * len(labels), 7.5 if len(scores) <= 7 else 5.5
    figure, axes = plotting.grid(1, 1, width, bottom + 0.6 + 0.12 * ("blind" in frame), title=title)
    axis, rows, best = axes[0, 0], frame.set_index(["label", "score"]), _clear_best(frame)
    blind = "blind" in frame
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    places = [first + (k + 0.5) * (1 - first) / len(scores) for k in range(len(scores))]
    for x, score in zip(places, scores, strict=True):
        name = plotting.wrap(str(score), width * (1 - first) / len(scores))
        axis.text(x, -0.15, name, fontsize=head, fontweight="bold", **middle)
        chance = _percent(frame[frame["score"] == score]["chance"].mean())
        axis.text(x, bottom + 0.13, chance, fontsize=6.5, color="0.45", **middle)
        if blind:
            same = _percent(frame[frame["score"] == score]["blind"].mean())
            axis.text(x, bottom + 0.26, same, fontsize=6.5, color="0.45", **middle)
    axis.text(0, bottom + 0.13, "chance (a coin)" if blind else "chance", va="center", fontsize=6.5, color="0.45")
    if blind:
        axis.text(0, bottom + 0.26, "chance (one answer)", va="center", fontsize=6.5, color="0.45")
    for line, label in enumerate(labels):
        top = tall * line
        axis.axhline(top, color="0.85", linewidth=0.5)
        parts = str(label).replace(" +", "\n+").split("\n")  # further sites below the first
        text = "\n".join(plotting.wrap(part, width * first, 6.2) for part in parts)
        axis.text(0, top + 0.03, text, va="top", fontsize=6.5)
        for x, score in zip(places, scores, strict=True):
            if (label, score) not in rows.index:
                continue
            row = rows.loc[(label, score)]
            value, low, high, published = (float(row[name]) for name in ("value", "low", "high", "published"))
            weight = "bold" if best.get(score) == label else "normal"
            axis.text(x, top + 0.1, _percent(value) if value else "-", fontsize=6.5, fontweight=weight, **middle)
            axis.text(x, top + 0.215, f"[{_percent(low)}, {_percent(high)}]", fontsize=5, color="0.25", **middle)
            if not np.isnan(published):
                axis.text(x, top + 0.33, f"{published:g}", fontsize=6, color="0.5", **middle)
    axis.axhline(bottom, color="0.5", linewidth=0.7)
    axis.set(xlim=(0, 1), ylim=(bottom + 0.25 + 0.12 * blind, -0.35))
    plotting.bare(axis)
    return figure


def _clear_best(frame: pd.DataFrame) -> dict[Any, Any]:
    """By score the label whose interval lies above all other labels' values; scores without one are left out.

    >>> table = {"label": ["a", "b"] * 2, "score": list("xxyy"), "value": [0.9, 0.5, 0.6, 0.5], "low": [0.8, 0.4, 0.4, 0.3]}
    >>> _clear_best(pd.DataFrame(table))
    {'x': 'a'}
    """
    found = {}
    for score, part in frame.groupby("score", sort=False):
        first, *others = part.sort_values("value", ascending=False).to_dict("records")
        if others and first["low"] > others[0]["value"]:
            found[score] = first["label"]
    return found


def _percent(share: float) -> str:
    """
    >>> _percent(0.1234), _percent(float("nan"))
    ('12.3', '')
    """
    return "" if np.isnan(share) else f"{100 * share:.1f}"
