"""Cures compared on one plane: how much of the prompt is read, how much of the image is seen.

    python -m experiments.fig_leakage_cures [--count 1200] [--smoke] [--from-csv]

Every cure is applied in training and test, at guidance s = 4 where it has one, and tested with mismatched prompts: caption dropout
(10, 30, 50%), training without a prompt (the paper's), lower s, other sites, masking the end and padding tokens, removing the mean
over places of f_c - f_u, unconditional features gated by the words' attention, linear erasure (LEACE, fitted under mismatched
prompts), and training with mismatched prompts.  A good cure lies low and far to the right.

Expected headline: training without a prompt sees most and leaks least.  About 12 minutes on two cores after the other two.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from diffprobe.mllm.leakage import MAIN_SITE, plan, read_texts
from experiments.figures import plot_leak_rows
from experiments.framework import Claim, Experiment, Options, Result, leakage_run, verdict
from experiments.leakage import compare, item_scores

TIMESTEP, SCALE = 50, 4.0
NO_CURE = "no cure"
CURES = {  # label: arm, site, guidance
    NO_CURE: ("M", MAIN_SITE, SCALE),
    "dropout 10%": ("M+drop10", MAIN_SITE, SCALE),
    "dropout 30%": ("M+drop30", MAIN_SITE, SCALE),
    "dropout 50%": ("M+drop50", MAIN_SITE, SCALE),
    "no prompt in training": ("U", MAIN_SITE, SCALE),
    "s = 1.5": ("M", MAIN_SITE, 1.5),
    "s = 1": ("M", MAIN_SITE, 1.0),
    "site D-L2-R0-B0-Cross-Q": ("M", "D-L2-R0-B0-Cross-Q", SCALE),
    "site U-L2-R1-B0-Cross-Q": ("M", "U-L2-R1-B0-Cross-Q", SCALE),
    "end and padding masked": ("M/eos_and_padding", MAIN_SITE, SCALE),
    "mean of f_c - f_u removed": ("M/centred", MAIN_SITE, SCALE),
    "gated by attention": ("M/gated", MAIN_SITE, SCALE),
    "words erased (LEACE)": ("M/erased", MAIN_SITE, SCALE),
    "mismatched prompts": ("X", MAIN_SITE, SCALE),
}
SHORT = (NO_CURE, "no prompt in training", "mean of f_c - f_u removed", "gated by attention")


def measure(options: Options) -> Result:
    run = leakage_run(options)
    chosen = {label: CURES[label] for label in (SHORT if options.smoke else CURES)}
    tests = {
        label: plan([arm], [site], [TIMESTEP], [scale], options.seeds, ["mismatched"], controls=False)
        for label, (arm, site, scale) in chosen.items()
    }
    controls = [t for t in plan(["M"], [MAIN_SITE], [TIMESTEP], [SCALE], options.seeds, ["mismatched"]) if t.recipe.control]
    for name in dict.fromkeys(t.recipe.control for t in controls):
        tests[name] = [t for t in controls if t.recipe.control == name]
    run.complete(list(dict.fromkeys(t for part in tests.values() for t in part)))
    items = pd.concat([item_scores(read_texts(run.folder, part)).assign(label=label) for label, part in tests.items()])
    rows = compare(items, "label", NO_CURE).assign(condition="mismatched", timestep=TIMESTEP, seed=options.seed)
    for column, place in (("arm", 0), ("site", 1), ("guidance", 2)):
        rows[column] = [chosen[label][place] if label in chosen else "" for label in rows["label"]]
    return Result(rows, config={"site": MAIN_SITE, "timestep": TIMESTEP, "guidance": SCALE})


def judge(rows: pd.DataFrame) -> list[Claim]:
    table = rows.set_index(["label", "score"])
    leak, sight = table.loc[("no prompt in training", "leak")], table.loc[("no prompt in training", "sight")]

    def change(row: pd.Series) -> str:
        return f"{row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}]"

    claims = [
        Claim(
            "L4", "Training without a prompt cures: the leak falls", verdict(-leak["change_high"], -leak["change_low"]),
            f"leak {change(leak)}, sight {change(sight)} content-word F1 against no cure (leak {table.loc[(NO_CURE, 'leak')]['value']:.3f}), "
            f"n = {leak['n']:.0f} images x {leak['n_seeds']:.0f} projectors",
        )
    ]  # fmt: skip
    others = [label for label in dict.fromkeys(rows["label"]) if label not in (NO_CURE, "no prompt in training", "K-", "K+")]
    for label in others:
        leak, sight = table.loc[(label, "leak")], table.loc[(label, "sight")]
        claims.append(
            Claim("L6", f"A cure: {label} lowers the leak (ours)", verdict(-leak["change_high"], -leak["change_low"]), f"leak {change(leak)}, sight {change(sight)}, n = {leak['n']:.0f} x {leak['n_seeds']:.0f}")
        )  # fmt: skip
    return claims


def draw(result: Result) -> Mapping[str, Figure]:
    where = f"{result.config['site']}, t = {result.config['timestep']}, s = {result.config['guidance']:g}"
    return {
        "": plot_leak_rows(result.rows, title=f"Leak and sight of each cure ({where}; mismatched prompts)"),
    }


EXPERIMENT = Experiment(
    name="fig_leakage_cures",
    title="Cures against leaking: what is still read from the prompt, what is seen in the image",
    count=1200,
    smoke_count=36,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Leak and sight of each cure with intervals, one row a cure.",
    },
)

if __name__ == "__main__":
    EXPERIMENT.main()
