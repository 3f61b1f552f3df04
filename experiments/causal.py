"""What the interventions share, and all four of them by one command: python -m experiments.causal [--smoke] [--from-csv].

`fig_causal_map` patches twins, `fig_causal_erasure` takes a colour out, `fig_causal_steering` puts one in, `fig_causal_skips` leaves
blocks and tokens out.  The options are those of one experiment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffprobe import plotting
from diffprobe.stats import bootstrap_interval, holm, paired_permutation_test, wilson_interval

NAMES = ("fig_causal_map", "fig_causal_erasure", "fig_causal_steering", "fig_causal_skips")


def interval_row(values: Sequence[float], clusters: Sequence[Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """A mean with its bootstrap interval and n; a share of independent hits has Wilson's, which is right at 0 and 1 too."""
    shares = clusters is None and set(map(float, values)) <= {0.0, 1.0}
    low, high = (
        wilson_interval(float(np.sum(values)), len(values)) if shares else bootstrap_interval(values, clusters, seed=seed)
    )
    return {"value": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def tested(rows: list[dict[str, Any]], drops: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> pd.DataFrame:
    """The rows with p of a sign-flip test of each one's two columns, and the same after Holm over all."""
    frame = pd.DataFrame(rows)
    frame["p"] = [paired_permutation_test(a, b, seed)[1] for a, b in drops]
    return frame.assign(p_holm=holm(frame["p"]))


@plotting.style()
def plot_lines(frame: pd.DataFrame, *, x: str, x_label: str, title: str = "") -> Figure:
    """Shares: a panel for each `panel`, a line with its band for each `what`.

    Args:
        frame: Rows with panel, what, the column `x`, value, low, high.
    """
    names, kinds = (list(dict.fromkeys(frame[column])) for column in ("panel", "what"))
    figure, shown = plotting.panels(len(names), 4, plotting.PAGE, 1.7, 0.25, title=title)
    for panel, name in zip(shown, names, strict=True):
        part = frame[frame["panel"] == name]
        for kind in kinds:
            plotting.curve(panel.axis, part[part["what"] == kind], x, kinds.index(kind), kind, band=0.12)
        panel.axis.set(title=name, xlabel=x_label if panel.lowest else "", ylim=(-0.03, 1.03))
        plotting.ruled(panel.axis, "y")
    plotting.legend(figure, {kind: plotting.look_of(number) for number, kind in enumerate(kinds)}, len(kinds))
    return figure


@plotting.style()
def plot_effects(frame: pd.DataFrame, *, x_label: str, title: str = "", columns: int = 3) -> Figure:
    """Intervals on named lines: a panel for each `panel`, a line for each `line`, a colour for each `what`; 0 is dashed.

    Args:
        frame: Rows with panel, line, what, value, low, high.
    """
    names, kinds = (list(dict.fromkeys(frame[column])) for column in ("panel", "what"))
    lines = list(dict.fromkeys(frame["line"]))
    height = 0.19 * len(lines) + 0.5
    figure, shown = plotting.panels(len(names), columns, plotting.PAGE, height, 0.3, title=title)
    looks: dict[str, Any] = {
        kind: {"color": plotting.COLOURS[k], "marker": plotting.MARKERS[k]} for k, kind in enumerate(kinds)
    }
    for panel, name in zip(shown, names, strict=True):
        for row in frame[frame["panel"] == name].to_dict("records"):
            shift = 0.22 * (kinds.index(row["what"]) - (len(kinds) - 1) / 2)
            plotting.interval(panel.axis, row, lines.index(row["line"]) + shift, **looks[row["what"]])
        panel.axis.axvline(0, **plotting.DASHED)
        panel.axis.set(title=name, xlabel=x_label if panel.lowest else "")
        plotting.forest(panel.axis, lines, written=panel.leftmost, room=0.6)
    plotting.legend(figure, {kind: {**look, "linestyle": "none"} for kind, look in looks.items()}, len(kinds))
    return figure


def main(arguments: Sequence[str]) -> None:
    """Runs all four with the same options, one after the other."""
    from experiments.framework import FOLDER, load_experiment

    run: Callable[[str], None] = lambda name: load_experiment(FOLDER / f"{name}.py").main(arguments)  # noqa: E731
    for name in NAMES:
        run(name)


if __name__ == "__main__":
    main(sys.argv[1:])
