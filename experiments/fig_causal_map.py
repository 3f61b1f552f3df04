"""Where is a colour used, and where can it only be read? Activation patching between twins, beside linear probes (ours).

    python -m experiments.fig_causal_map [--count 16] [--smoke] [--from-csv]

Twins that differ in the colour of one object are denoised with the same noise and no prompt.  At each site and timestep one's
activation in the object's cells replaces the other's: how much of the way to the twin does the network's output go, and the logit of
a linear probe at the last block?  Controls: a random direction of the same length in the same cells, the twin's activation in as many
other cells.  Probes of the same means over the object's cells say what can be read there.  Intervals by pair, Holm over the grid.

Expected was that the deep blocks hold the colour.  About 6 minutes on one core.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffprobe import plotting
from diffprobe.figures import plot_probe_grid
from experiments.framework import Claim, Experiment, Options, Result, verdict

SITES, TIMESTEPS, PATTERN = ("blocks", "*-Res-Out"), (50, 250, 500), "colour"
DRAWN = ("prediction", "colour")


def measure(options: Options) -> Result:
    from diffprobe import load_model
    from diffprobe.patching import causal_map

    model = load_model(options.model, options.device)
    sites, times = (("blocks",), TIMESTEPS[:1]) if options.smoke else (SITES, TIMESTEPS)
    found = causal_map(
        model, PATTERN, sites, times, pairs=options.count, train_pairs=20 if options.smoke else 160, seed=options.seed
    )
    agreement = [{"kind": "agreement", "label": name, **row} for name, row in found.agreement.items()]
    rows = pd.concat([found.table.assign(kind="map"), pd.DataFrame(agreement)], ignore_index=True)
    return Result(rows.assign(seed=options.seed), config={"weights": model.weights_hash(), "pattern": PATTERN})


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Both maps: a causal cell is bold where the patch beats the random direction after Holm, a probe's where its interval is above chance."""
    shown = rows[(rows["kind"] == "map") & rows["label"].isin(DRAWN)]
    bold = np.where(shown["label"] == DRAWN[1], shown["low"] > shown["chance"], shown["p_holm"] < 0.05)
    control = np.where(shown["label"] == DRAWN[1], "control task", "random direction")
    return shown.assign(bold=bold, control=control, timestep=shown["timestep"].astype(int))


def judge(rows: pd.DataFrame) -> list[Claim]:
    claims = []
    for row in rows[rows["kind"] == "agreement"].to_dict("records"):
        claims.append(
            Claim("C1", f"Sites rank alike by what a probe reads of a colour and by what a patch moves, of the {row['label']} (ours)", verdict(row["low"], row["high"]),
                  f"rank correlation of effect and accuracy {row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] over {row['n']:.0f} cells before the last block")
        )  # fmt: skip
    both = cells(rows).pivot(index=["site", "timestep"], columns="label", values=["value", "low", "high", "chance"])
    last = str(cells(rows)["site"].iloc[-1])
    before = both[both.index.get_level_values("site") != last]
    readable = before[before[("low", "colour")] > before[("chance", "colour")]]
    if len(readable):
        unused = readable[readable[("high", "prediction")] < 0.1]
        site, timestep = (unused if len(unused) else readable)[("value", "colour")].idxmax()
        cell = both.loc[site, timestep]
        claims.append(
            Claim("C2", "A colour is readable at places of which the network uses next to nothing (ours)", "held" if len(unused) else "not held",
                  f"in {len(unused)} of {len(readable)} cells where a probe is above chance the patch moves the prediction by less than .10 (upper end); most readable of them {site}, t = {timestep}: "
                  f"accuracy {cell['value', 'colour']:.2f} [{cell['low', 'colour']:.2f}, {cell['high', 'colour']:.2f}], effect {cell['value', 'prediction']:+.3f} [{cell['low', 'prediction']:+.3f}, {cell['high', 'prediction']:+.3f}]")
        )  # fmt: skip
    return claims


@plotting.style()
def scatter(rows: pd.DataFrame) -> Figure:
    """Effect against accuracy, a dot a cell; named are the strongest, and the most readable of which next to nothing is used."""
    shown = cells(rows)
    last = str(shown["site"].iloc[-1])
    both = shown[shown["site"] != last].pivot(index=["site", "timestep"], columns="label", values=["value", "low", "high"])
    figure, axes = plotting.grid(1, 1, plotting.COLUMN, 2.6)
    axis, steps = axes[0, 0], sorted(shown["timestep"].unique())
    for (_, timestep), row in both.iterrows():
        look = plotting.look_of(steps.index(timestep))
        x, y = row["value", "colour"], row["value", "prediction"]
        axis.plot([x, x], [row["low", "prediction"], row["high", "prediction"]], color=look["color"], linewidth=0.6)
        axis.plot(x, y, color=look["color"], marker=look["marker"], linestyle="none")
    unused = both["value", "colour"][both["value", "prediction"] < 0.1]
    for site, timestep in {both["value", "prediction"].idxmax(), unused.idxmax()}:
        x, y = both.loc[(site, timestep), ("value", "colour")], both.loc[(site, timestep), ("value", "prediction")]
        left = x > 0.5
        axis.annotate(
            site, (x, y), (-4 if left else 4, 5), textcoords="offset points", ha="right" if left else "left", fontsize=6
        )
    axis.axvline(float(shown.loc[shown["label"] == "colour", "chance"].mean()), **plotting.DASHED)
    axis.axhline(0, **plotting.DASHED)
    axis.set(xlabel="a linear probe's accuracy (dashed: chance)", ylabel="share of the way the patch moves")
    plotting.legend(
        figure, {f"timestep {step}": {**plotting.look_of(k), "linestyle": "none"} for k, step in enumerate(steps)}, 3
    )
    return figure


def draw(result: Result) -> Mapping[str, Figure]:
    return {
        "": plot_probe_grid(cells(result.rows), title="What a patch from the twin moves (above) and what a probe reads (below); bold: after Holm, above chance"),
        "scatter": scatter(result.rows),
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="fig_causal_map",
    title="Where a colour is used: activation patching between twins beside linear probes",
    count=16,
    smoke_count=3,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Heat maps by site and timestep: the share of the way to the twin that a patch moves the prediction beside a random direction's, and a linear probe's accuracy beside its control task's.",
        "scatter": "Effect of the patch against the probe's accuracy, one dot a site and timestep, with intervals of the effect.",
    },
)

if __name__ == "__main__":
    EXPERIMENT.main()
