"""By which routes text enters the features: leak by site and timestep, and knock-outs in the forward pass (open in the paper).

    python -m experiments.fig_leakage_routes [--count 1200] [--smoke] [--from-csv]

Leak and sight of projectors trained at each of the paper's sites and four timesteps (own caption as prompt, s = 4), with Holm's
correction over all of these and the main site's other scales.  Then the main site's projectors are tested with routes cut while the features are computed: the start token,
the end and padding tokens, or the content words masked in the cross-attentions, everywhere or in one stage, or the empty prompt fed
to the first K cross-attentions.  Mismatched prompts throughout.  Where all cross-attentions before the site are cut,
no text is left: that row must have no leak.

Expected was that the leak enters through the content words; found: through the end and padding tokens.  About 30 minutes on one
core after fig6_leakage, whose projectors it shares.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from diffprobe.figures import plot_probe_grid
from diffprobe.mllm.leakage import MAIN_SITE, Test, plan, read_texts
from diffprobe.mllm.verdict import POSITIVE, judge_leakage
from experiments.figures import plot_leak_rows
from experiments.framework import Claim, Experiment, Options, Result, Verdict, leakage_run, verdict
from experiments.leakage import compare, item_scores

SCALE, TIMESTEP, OTHER_TIMESTEPS, OTHER_SCALES = 4.0, 50, (10, 250, 500), (1.0, 1.5)
CUTS = {
    "start": "start token", "eos_and_padding": "end and padding tokens", "content": "content words", "content@down_blocks*": "content words, down only",
    "eos_and_padding@down_blocks*": "end and padding, down only", "empty@first:2": "all text, first 2 cross-attentions",
    "empty@first:4": "all text, first 4", "empty@first:6": "all text, first 6", "empty@first:7": "all text, first 7 (with mid)",
    "empty": "all text, everywhere",
}  # fmt: skip
NOTHING = "nothing cut"


def measure(options: Options) -> Result:
    run = leakage_run(options)
    sites = [MAIN_SITE] if options.smoke else run.features.site_names("paper")
    cuts = [*list(CUTS)[:2], "empty"] if options.smoke else list(CUTS)
    times, scales = ((), ()) if options.smoke else (OTHER_TIMESTEPS, OTHER_SCALES)
    placed = plan(["M"], sites, [TIMESTEP], [SCALE], options.seeds, ["mismatched"])
    spread = plan(["M"], sites, times, [SCALE], options.seeds, ["mismatched"]) if times else []
    scaled = plan(["M"], [MAIN_SITE], [TIMESTEP], scales, options.seeds, ["mismatched"], controls=False)
    cut = plan(["M"], [MAIN_SITE], [TIMESTEP], [SCALE], options.seeds, ["mismatched"], cuts, controls=False)
    spread = [t for t in spread if t.recipe.control != POSITIVE]  # K+ has no timestep: one serves all
    grid = list(dict.fromkeys([*placed, *spread, *scaled]))
    run.complete(list(dict.fromkeys([*grid, *cut])))

    def labelled(chosen: list[Test], label: str, baseline: str, kind: str) -> pd.DataFrame:
        items = item_scores(read_texts(run.folder, chosen))
        named = items["arm"].map(lambda arm: CUTS.get(arm.removeprefix("M without "), NOTHING))
        sited = items["control"].map(lambda c: f"{c} " if c else "") + items["site"]
        return compare(items.assign(label=named if label == "arm" else sited), "label", baseline).assign(kind=kind)

    judged = judge_leakage(read_texts(run.folder, grid), seed=options.seed).table
    parts = [labelled(cut, "arm", NOTHING, "cut"), labelled(placed, "site", MAIN_SITE, "site"), judged.assign(kind="grid")]
    return Result(
        pd.concat(parts, ignore_index=True).assign(seed=options.seed),
        config={"site": MAIN_SITE, "guidance": SCALE, "timestep": TIMESTEP, "condition": "mismatched"},
    )


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Lines of `plot_probe_grid`: leak and sight of every site and timestep at `SCALE`, found ones in bold."""
    grid = rows[(rows["kind"] == "grid") & (rows["control"].fillna("") == "") & (rows["guidance"] == SCALE)]
    return grid.assign(label=grid["score"], score="content-word F1 above chance", chance=0.0, bold=grid["found"] == "yes")


def judge(rows: pd.DataFrame) -> list[Claim]:
    cut = rows[rows["kind"] == "cut"].set_index(["label", "score"])
    claims = []
    for label in ("start token", "end and padding tokens", "content words"):
        if (label, "leak") in cut.index:
            leak, sight = cut.loc[(label, "leak")], cut.loc[(label, "sight")]
            claims.append(
                Claim("L5", f"Text reaches the main site by way of: {label} (ours)", verdict(-leak["change_high"], -leak["change_low"]),
                      f"cutting it changes leak by {leak['change']:+.3f} [{leak['change_low']:+.3f}, {leak['change_high']:+.3f}] from {cut.loc[(NOTHING, 'leak')]['value']:.3f}, "
                      f"sight by {sight['change']:+.3f} [{sight['change_low']:+.3f}, {sight['change_high']:+.3f}]; content-word F1, n = {leak['n']:.0f} images x {leak['n_seeds']:.0f} projectors")
            )  # fmt: skip
    grid = rows[(rows["kind"] == "grid") & (rows["control"].fillna("") == "")]
    leaks = grid[grid["score"] == "leak"]
    if len(leaks) > 1:
        found, most = leaks[leaks["found"] == "yes"], leaks.loc[leaks["value"].idxmax()]
        kept: Verdict = "held" if len(found) == len(leaks) else "not held" if (leaks["found"] == "no").any() else "undecided"
        claims.append(
            Claim("L5", "Every site after the first text leaks, at every timestep and scale tried (ours)", kept,
                  f"leak found in {len(found)} of {len(leaks)} cells after Holm over all of them; most at {most['site']}, t = {most['timestep']:.0f}, s = {most['guidance']:g}: "
                  f"{most['value']:.3f} [{most['low']:.3f}, {most['high']:.3f}], n = {most['n']:.0f} images x {most['n_seeds']:.0f} projectors")
        )  # fmt: skip
    return claims


def draw(result: Result) -> Mapping[str, Figure]:
    rows, where = result.rows, f"{result.config['site']}, t = {result.config['timestep']}, s = {result.config['guidance']:g}"
    cut = rows[(rows["kind"] == "cut") & (rows["label"] != NOTHING)]
    return {
        "": plot_leak_rows(cut, change=True, title=f"What cutting a route changes ({where}; mismatched prompts)"),
        "sites": plot_leak_rows(rows[rows["kind"] == "site"], title=f"Leak and sight by site (t = {result.config['timestep']}, s = {result.config['guidance']:g})"),
        "grid": plot_probe_grid(cells(rows), title=f"Leak and sight by site and timestep (s = {result.config['guidance']:g}; bold: found, after Holm over all cells)"),
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="fig_leakage_routes",
    title="By which tokens and layers the prompt enters the features: knock-outs, sites and timesteps",
    count=1200,
    smoke_count=36,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Changes of leak and of sight with intervals when a route of the text is cut, one row a route.",
        "sites": "Leak and sight with intervals of projectors at each of the paper's sites and of both controls.",
        "grid": "Heat maps of leak and of sight, sites by timesteps, with the numbers; those found after Holm's correction in bold.",
    },
)

if __name__ == "__main__":
    EXPERIMENT.main()
