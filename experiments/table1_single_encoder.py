"""Table 1: a language model that sees through one frozen encoder: CLIP, or one site of the diffusion model (claim F1).

    python -m experiments.table1_single_encoder [--count 270] [--smoke] [--from-csv]

The two-stage recipe of LLaVA with shapes-lm, in place of Vicuna, three times from other first weights: the truth about the
picture (an oracle, the ceiling); CLIP's second-to-last layer, and the same asked about blank images (the floor); each of the paper's six sites at t = 50; its main site at five timesteps.  The diffusion model is told nothing in both stages
and in the test: what the question adds is table 2's.  Every arm answers the same drawn questions, and is compared with the
main site question by question and training by training.  The paper's benchmarks are of photographs and of a model of 7B
parameters, so levels cannot be compared, the order of the rows can.

Expected headline: U-L1-R1-B0-Cross-Q at t = 50 is the best single site, and t = 500 collapses.
About an hour on one of two busy cores after table 2, which shares CLIP's and the main site's trainings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.comparison import (
    ACCURACY,
    MAIN_TIMESTEP,
    Arm,
    change_rows,
    kept_answers,
    pattern_rows,
    score_rows,
    table_rows,
)
from experiments.figures import plot_probe_differences, plot_score_table, score_cells
from experiments.framework import (
    MAIN_SITE,
    READER,
    Claim,
    Experiment,
    Options,
    Result,
    chosen_arms,
    fused_run,
    joint,
    reference,
    settled,
    verdict,
)

SITES = (
    "D-L2-R0-B0-Cross-Q", MAIN_SITE, "U-L1-R1-B0-Out", "U-L1-R2-B0-Cross-Q", "U-L2-R1-B0-Cross-Q", "U-L2-R2-Res-Out",
)  # fmt: skip
TIMESTEPS = (10, 50, 100, 250, 500)
ORACLE = Arm("diffusion", "truth")
MAIN, CLIP, NOISIEST = Arm("diffusion"), Arm("clip"), Arm("diffusion", timestep=TIMESTEPS[-1])
SCORES = {  # ours, the paper's column
    "VQA": "llava_bench", "MMVP": "mmvp", "BLINK": "blink_val", "NB question": "nb_q", "NB image": "nb_i", "NB group": "nb_g",
}  # fmt: skip


def arms(smoke: bool) -> list[Arm]:
    if smoke:
        return [CLIP, MAIN, NOISIEST]
    by_site = [Arm("diffusion", site) for site in SITES]
    return [ORACLE, CLIP, *by_site, *(Arm("diffusion", MAIN_SITE, t) for t in TIMESTEPS if t != MAIN_TIMESTEP)]


def measure(options: Options) -> Result:
    run = fused_run(options)
    chosen = chosen_arms(arms(options.smoke), lambda arm: arm.label, options)
    condition = {arm: ("own", "blank", "text") if arm in (CLIP, MAIN) else ("own",) for arm in chosen}
    answers = run.complete(condition, options.training_seeds)
    others = [arm for arm in chosen if arm not in (MAIN, ORACLE)]
    changes = change_rows(answers, [((MAIN.label, "own"), (arm.label, "own")) for arm in others], options.seed)
    rows = pd.concat([score_rows(answers, options.seed), changes], ignore_index=True)
    return Result(
        rows, kept_answers(answers), config={"settings": run.settings.__dict__, "weights": run.diffusion.weights_hash()}
    )


def judge(rows: pd.DataFrame) -> list[Claim]:
    changes: Any = rows[(rows["kind"] == "change") & (rows["score"] == ACCURACY) & (rows["group"] == "all")]
    changes = changes.assign(other=changes["against"].str.removesuffix(", own")).set_index("other")
    paper: Any = reference("table1_diffusion_only").set_index(["encoder", "timestep"])

    def said(name: str) -> str:
        row = changes.loc[name]
        return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] against {name}"

    def about(names: list[str]) -> str:
        row = changes.loc[names[0]]
        return f"accuracy of {MAIN.label} on all questions, n = {row['n']:.0f} x {row['n_seeds']:.0f} trainings: " + "; ".join(
            map(said, names)
        )

    sites = [arm.label for site in SITES if site != MAIN_SITE and (arm := Arm("diffusion", site)).label in changes.index]
    claims, trainings = [], float(changes["n_seeds"].min())
    if sites:
        decided, p = joint(list(changes.loc[sites, ["value", "low", "high"]].itertuples(index=False, name=None)))
        claims.append(
            Claim(
                "F1", f"{MAIN_SITE} at t = {MAIN_TIMESTEP} is the best single site",
                *settled(decided, f"{about(sites)}; paper: LLaVA-Bench 45.3 against 33.4 to 42.2", trainings), p, True,
            )
        )  # fmt: skip
    low, high = (paper.loc[(MAIN_SITE, t), "mmvp"] for t in (TIMESTEPS[-1], MAIN_TIMESTEP))
    if NOISIEST.label in changes.index:
        row = changes.loc[NOISIEST.label]
        claims.append(
            Claim(
                "F1", f"... and t = {TIMESTEPS[-1]} collapses",
                *settled(verdict(row["low"], row["high"]), f"{about([NOISIEST.label])}; paper: MMVP {high} to {low}", trainings),
            )
        )  # fmt: skip
    if CLIP.label in changes.index:
        row = changes.loc[CLIP.label]
        claims.append(
            Claim(
                "F1", "... and CLIP alone answers more than any single site (table 1)",
                *settled(
                    verdict(-row["high"], -row["low"]),
                    f"{about([CLIP.label])}; paper: LLaVA-Bench 66.5 against 45.3, MMVP 24.7 against 22.7", trainings,
                ),
            )
        )  # fmt: skip
    return claims


def published() -> pd.DataFrame:
    """The paper's rows by the label of our arm."""
    paper = reference("table1_diffusion_only")
    names = ["CLIP" if pd.isna(row["timestep"]) else f"{row['encoder']} t={row['timestep']:g}" for _, row in paper.iterrows()]
    return paper.assign(label=names).set_index("label")


def score_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of each figure that is a table."""
    found = {"": table_rows(rows, published(), SCORES), "patterns": pattern_rows(rows)}
    return {suffix: frame for suffix, frame in found.items() if len(frame)}


def draw(result: Result) -> Mapping[str, Figure]:
    rows = result.rows
    changes = rows[(rows["kind"] == "change") & (rows["group"] == "all") & rows["score"].isin([ACCURACY, "MMVP"])]
    shown = changes.assign(
        label=changes["score"], site=changes["against"].str.removesuffix(", own"), what=f"{MAIN.label} less the other"
    )
    titles = {
        "": "One frozen encoder (percent; in grey the paper's, whose VQA is LLaVA-Bench)",
        "patterns": "Pairs right by pattern (percent); blind: orientation, quantity, position, text",
    }
    drawn = {suffix: plot_score_table(frame, title=titles[suffix]) for suffix, frame in score_tables(rows).items()}
    return {**drawn, "changes": plot_probe_differences(shown, title="Paired differences of scores")}


EXPERIMENT = Experiment(
    name="table1_single_encoder",
    title="A language model that sees through one frozen encoder: CLIP or a diffusion site",
    count=270,
    smoke_count=18,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Table of scores with intervals: a row an encoder, a column a benchmark, the paper's numbers in grey below ours.",
        "patterns": "Table of pairs right by visual pattern: a row an encoder, a column a pattern, chance below.",
        "changes": "Paired differences between the main site and every other encoder with intervals, a panel a score.",
    },
    tables=lambda result: {suffix: score_cells(frame) for suffix, frame in score_tables(result.rows).items()},
    reference="table1_diffusion_only",
    needs={"F1": ("main colour", "main shape", "main direction", *READER)},
)

if __name__ == "__main__":
    EXPERIMENT.main()
