"""Table: do the cross-attention maps of nouns lie on their objects, at which site, timestep and head (claim A4, first half)?

    python -m experiments.tab_localization [--count 200] [--smoke] [--from-csv]

Nine scores by site and timestep on drawn scenes of two objects, each beside chance and beside five controls: the map of the
other object's noun in the same caption, the start token's, a centred Gaussian, and the mask of another image.  The paper
shows such maps by eye; the number that tells a map of the word from a map of "something is here" is the lead over the other
noun.  Head by head at t = 50.

Expected headline: the maps find objects far above chance.  About 3 minutes on two cores; fig4_attention shares its store.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from diffprobe.figures import plot_localization_controls, plot_localization_grid, plot_localization_heads
from experiments.framework import Claim, Experiment, Options, Result, record_words, verdict

TIMESTEPS = (10, 50, 100, 250, 500)
HEADS_AT = 50
MAIN_SCORES = ("pointing", "auc")  # the others are an appendix
JUDGED = ("all sites", 50, "auc")  # fixed beforehand: the mean over all maps, as DAAM takes it, at the paper's timestep


def measure(options: Options) -> Result:
    from diffprobe import open_store
    from diffprobe.probes.grounding import attention_localization

    weights, data, conditioning, out = record_words(options, TIMESTEPS)
    tree = open_store(out)
    table = attention_localization(tree, data, conditioning=conditioning, seed=options.seed)
    heads = attention_localization(
        tree, data, conditioning=conditioning, timesteps=[HEADS_AT], by_head=True, merged=False, seed=options.seed
    )
    rows = pd.concat([table.assign(part="sites"), heads.assign(part="heads")], ignore_index=True)
    config = {
        "store": out.name, "dataset": data.spec, "weights": weights, "conditioning": conditioning,
        "timesteps": list(TIMESTEPS), "left_out": table.attrs["left_out"],
    }  # fmt: skip
    return Result(rows, config=config)


def judge(rows: pd.DataFrame) -> list[Claim]:
    site, timestep, score = JUDGED
    table = rows[rows["part"] == "sites"]
    lines = table[(table["site"] == site) & (table["timestep"] == timestep) & (table["score"] == score)].set_index("map")
    own, wrong, gaussian = (lines.loc[name] for name in ("word", "wrong word", "centred Gaussian"))
    best = table[(table["map"] == "wrong word") & (table["score"] == score)].sort_values("lead").iloc[-1]
    return [
        Claim(
            "A4",
            "Cross-attention maps of nouns sit on the nouns' objects",
            # a centred Gaussian, which looks at nothing, is above chance where objects lie near the middle
            verdict(float(gaussian["lead_low"]), float(gaussian["lead_high"])),
            f"AUC {own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}] at t = {timestep}, mean of all sites, chance .50, n = {own['n']} words on {own['n_images']} images; "
            f"lead over a centred Gaussian ({gaussian['value']:.2f}) {lead(gaussian)}",
        ),
        Claim(
            "A4",
            "The maps tell the word's own object from the other one (ours: the lead over the other noun's map)",
            verdict(float(wrong["lead_low"]), float(wrong["lead_high"])),
            f"AUC lead {lead(wrong)}, n = {wrong['n']}; largest at {best['site']}, t = {best['timestep']}: {lead(best)}, "
            f"p = {best['p_holm']:.2g} (Holm over the grid)"
            if wrong["n"]
            else "no caption has words of two objects",
        ),
    ]


def lead(line: pd.Series) -> str:
    return f"{line['lead']:.3f} [{line['lead_low']:.3f}, {line['lead_high']:.3f}]"


def draw(result: Result) -> Mapping[str, Figure]:
    table = result.rows[result.rows["part"] == "sites"]
    heads = result.rows[result.rows["part"] == "heads"]
    return {
        "": plot_localization_grid(
            table[table["score"].isin(MAIN_SCORES)], title="Cross-attention of nouns against their objects' masks"
        ),
        "scores": plot_localization_grid(table, title="All scores: nouns' cross-attention against their objects' masks"),
        "controls": plot_localization_controls(
            table[(table["site"] == JUDGED[0]) & table["timestep"].isin([50, 500])],
            title="Mean map of all sites: nouns, controls and chance",
        ),
        "heads": plot_localization_heads(heads, title=f"Head by head, timestep {HEADS_AT}"),
    }


EXPERIMENT = Experiment(
    name="tab_localization",
    title="Cross-attention of nouns against their objects' masks, by site, timestep and head",
    count=200,
    smoke_count=8,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Two heat maps, pointing game and ROC-AUC, of cross-attention sites by timestep; cells above the wrong word's map are framed.",
        "scores": "Nine heat maps, one a localization score, of cross-attention sites by timestep; cells above the wrong word's map are framed.",
        "controls": "Nine panels of dots with intervals: each score of the nouns' maps and of five controls at two timesteps, chance dashed.",
        "heads": "Heat map of ROC-AUC by site and head at one timestep, the mean over heads first, chance marked.",
    },
    needs={"A4": ("pointing",)},
)

if __name__ == "__main__":
    EXPERIMENT.main()
