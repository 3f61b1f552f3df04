"""Figure 6: does the language model read the prompt? CIDEr-D against guidance s (claims L1-L4).

    python -m experiments.fig6_leakage [--count 1200] [--smoke] [--from-csv]

Projectors are trained on captions with features that were conditioned on those captions, at guidance s; with and without
30% caption dropout; and without any prompt (the stated cure).  Held-out images are then described from features that were given
no text, the image's own caption, or a mismatched one.  Output is scored against the image's other captions, and under mismatched
captions against the text that was fed in.  CIDEr-D times 100, document frequencies from the training captions; the paper's is CIDEr on
COCO, of another language model: levels cannot be compared, directions can.

Without decoding: the fed-in caption of 40 images is ranked among 100 of its length by its likelihood, less that of a blank image, or
of the same image without a prompt, or of nothing.

Expected headline: with own captions CIDEr rises with s; the mismatched caption comes back, the more so the larger s.
Took 21 minutes on one of two busy cores; the leakage experiments share projectors.  The same with a real language model:
--trainings 1 --arms "U,M s=" --set language_model=smollm2 --set language_dtype=bfloat16 --set steps=120 --set batch=16, and
--set ranked=20 --set candidates=50 --set max_new_tokens=32: an hour on one core.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffprobe.figures import plot_leak_examples, plot_site_curves
from diffprobe.mllm.leakage import (
    MAIN_SITE,
    Recipe,
    Test,
    examples,
    frequencies,
    leak_against_sight,
    plan,
    rank_texts,
    read_texts,
    score_texts,
)
from diffprobe.mllm.verdict import CONDITIONS, judge_leakage, sentence
from experiments.figures import plot_leak_rows, plot_scores
from experiments.framework import (
    Claim,
    Experiment,
    Options,
    Result,
    Verdict,
    chosen_arms,
    joint,
    leakage_run,
    reference,
    verdict,
)
from experiments.leakage import item_scores

if TYPE_CHECKING:
    from diffprobe.mllm.leakage_run import Run

TIMESTEP, SCALES, DROPPED = 50, (1.0, 1.5, 4.0), (1.5, 4.0)
FED = ("none", "own", "mismatched")
ARMS = {"M": "prompt: its caption", "M+drop30": "caption dropout 30%", "U": "no prompt"}
PAPER = {
    "no_dropout": ARMS["M"],
    "caption_dropout": ARMS["M+drop30"],
    "llava15_7b_pretrain": "paper: CLIP in place of diffusion",
}


def pieces(run: Run, seeds: int, smoke: bool) -> list[Test]:
    scales, dropped = ((4.0,), (4.0,)) if smoke else (SCALES, DROPPED)
    tests = plan(["U", "M"], [MAIN_SITE], [TIMESTEP], scales, seeds, FED)
    tests += plan(["M+drop30"], [MAIN_SITE], [TIMESTEP], dropped, seeds, FED, controls=False)
    if smoke:
        return list(dict.fromkeys(tests))
    # every condition once, where a leak is strongest
    return list(dict.fromkeys([*tests, *plan(["M"], [MAIN_SITE], [TIMESTEP], [4.0], seeds, CONDITIONS, controls=False)]))


def label(recipe: Recipe) -> str:
    """What ``--arms`` chooses by: U, "M s=4", "M+drop30 s=1.5"."""
    return recipe.arm if recipe.parts[0] == "U" else f"{recipe.arm} s={recipe.guidance:g}"


def ranked(tests: list[Test]) -> list[Test]:
    """Mismatched prompts at the least and the largest s, and both controls."""
    mine = [t for t in tests if t.condition == "mismatched"]
    scales = {min(t.guidance for t in mine), max(t.guidance for t in mine)}
    return [t for t in mine if t.recipe.control or t.guidance in scales]


def measure(options: Options) -> Result:
    run = leakage_run(options)
    tests = pieces(run, options.seeds, options.smoke)
    arms = chosen_arms(list(dict.fromkeys(t.recipe for t in tests if not t.recipe.control)), label, options)
    tests = [t for t in tests if t.recipe.control or t.recipe in arms]
    run.complete(tests, ranked(tests))
    texts = read_texts(run.folder, tests)
    ranks = rank_texts(run.folder, options.seed)
    scores = score_texts(texts, frequencies(run.folder), seed=options.seed)
    scaled = scores.assign(**{c: 100 * scores[c] for c in ("value", "low", "high", "chance")}, kind="CIDEr-D x 100")
    judged = judge_leakage(texts, seed=options.seed)
    parts = [scaled, judged.table.assign(kind="content-word F1"), changes(texts), ranks.assign(kind="ranking")]
    rows = pd.concat(parts, ignore_index=True)
    shown = examples(texts[texts["arm"].isin(["M", "U"]) & (texts["guidance"] == 4.0) | (texts["control"] == "K+")], 3)
    config = {
        "settings": json.loads((run.folder / "request.json").read_text(encoding="utf-8")),
        "verdicts": [sentence(row) for row in judged.verdicts.to_dict("records")],
        "examples": shown.astype(object).where(shown.notna(), "").to_dict("list"),
    }
    return Result(rows, config=config)


def changes(texts: pd.DataFrame) -> pd.DataFrame:
    """Paired changes of leak and sight that the claims speak of, by image and projector seed."""
    from diffprobe.mllm.verdict import crossed_mean

    rows = []
    for condition in ("own", "mismatched"):
        items = item_scores(texts[texts["control"] == ""], condition)
        scales = sorted(items["guidance"].unique())
        cells = dict(iter(items.groupby(["arm", "guidance"])))
        pairs = [("M", scales[-1], "M", scales[0], "s")] if len(scales) > 1 else []
        pairs += [(arm, scales[-1], "M", scales[-1], arm) for arm in ("M+drop30", "U")]
        for arm, scale, base, base_scale, name in pairs:
            if {(arm, scale), (base, base_scale)} - set(cells):
                continue  # of an arm that was not asked for
            for score in ("leak", "sight"):
                a, b = (
                    cells[key].pivot(index="seed", columns="sample", values=score) for key in ((arm, scale), (base, base_scale))
                )
                mean = crossed_mean((a - b[a.columns]).to_numpy())
                rows.append({"kind": "change", "arm": arm, "condition": condition, "score": score, "site": MAIN_SITE, "timestep": TIMESTEP,
                             "guidance": scale, "against": f"{base} s={base_scale:g}", "name": name, "chance": 0.0,
                             **{k: mean[k] for k in ("value", "low", "high")}, "n": a.shape[1], "n_seeds": a.shape[0]})  # fmt: skip
    return pd.DataFrame(rows)


def judge(rows: pd.DataFrame) -> list[Claim]:
    paper = reference("fig6_leakage").set_index(["training", "inference", "metric"])
    change = rows[rows["kind"] == "change"].set_index(["name", "condition", "score"])
    leaks = rows[(rows["kind"] == "content-word F1") & (rows["condition"] == "mismatched") & (rows["control"].fillna("") == "")]
    claims = []

    def say(number: str, statement: str, name: tuple[str, str, str], sign: int, published: str, primary: bool = False) -> None:
        if name not in change.index:
            return
        row = change.loc[name]
        low, high = sorted((sign * row["low"], sign * row["high"]))
        evidence = (
            f"content-word F1 {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] of {row['arm']} s={row['guidance']:g} against "
            f"{row['against']}, n = {row['n']:.0f} images x {row['n_seeds']:.0f} projectors; {published}"
        )
        decided, p = joint([(sign * row["value"], low, high)])
        claims.append(Claim(number, statement, decided, evidence, p if primary else None, primary))

    own, mismatched = (paper.loc[("no_dropout", kind, "cider")] for kind in ("own_caption", "mismatched_caption"))
    say(
        "L1",
        "With own captions recovery of the captions rises with s",
        ("s", "own", "sight"),
        1,
        f"paper: CIDEr {own['s1']} to {own['s4']}",
        primary=True,
    )
    for scale, row in leaks[leaks["arm"] == "M"].set_index(["guidance", "score"]).iterrows():
        if scale[1] == "leak":
            claims.append(
                Claim(
                    "L2", f"The mismatched caption is recovered at s = {scale[0]:g}", detected(row),
                    f"leak {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] content-word F1 above chance ({row['chance']:.3f}), n = {row['n']:.0f} images "
                    f"x {row['n_seeds']:.0f} projectors, margin {row['margin']:g}; paper: CIDEr {mismatched[f's{scale[0]:g}']}",
                    *((float(row["p_holm"]), True) if scale[0] == SCALES[-1] else ()),
                )
            )  # fmt: skip
    say(
        "L2",
        "... the more so the larger s",
        ("s", "mismatched", "leak"),
        1,
        f"paper: CIDEr {mismatched['s1']} to {mismatched['s4']}",
    )
    ranks = ranking(rows)
    ranks = ranks[(ranks["arm"] == "M") & (ranks["control"] == "") & (ranks["baseline"] == "no prompt")]
    for row in ranks.to_dict("records"):
        claims.append(
            Claim(
                "L2", f"... and without decoding at s = {row['guidance']:g}: it is the likeliest of {row['n_candidates']:.0f} captions (ours)",
                verdict(row["low"], row["high"], row["chance"]),
                f"first in {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}], chance {row['chance']:.2f}, n = {row['n']:.0f} texts of {row['n_seeds']:.0f} projectors",
            )
        )  # fmt: skip
    less = paper.loc[("caption_dropout", "mismatched_caption", "cider")]["s4"]
    say(
        "L3",
        "Caption dropout lowers the leak",
        ("M+drop30", "mismatched", "leak"),
        -1,
        f"paper: CIDEr {mismatched['s4']} to {less}",
        primary=True,
    )
    say(
        "L3",
        "... and lifts sight under mismatched captions (ours)",
        ("M+drop30", "mismatched", "sight"),
        1,
        "paper: without a caption CIDEr 24.2 to 31.4",
    )
    say("L4", "Training without a prompt lowers the leak", ("U", "mismatched", "leak"), -1, "paper: stated, not measured", True)
    say(
        "L4",
        "... and lifts sight under mismatched captions (ours)",
        ("U", "mismatched", "sight"),
        1,
        "paper: stated, not measured",
    )
    return claims


def detected(row: pd.Series) -> Verdict:
    """The detector's own rule, so that both say the same: a leak is found at the margin, or shown to be within it, or neither."""
    words: dict[str, Verdict] = {"yes": "held", "no": "not held"}
    return words.get(str(row["found"]), "undecided")


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Ours and the paper's as panels: what is fed; curves: how the projector was trained."""
    ours = rows[
        (rows["kind"] == "CIDEr-D x 100")
        & (rows["control"].fillna("") == "")
        & rows["arm"].isin(list(ARMS))
        & rows["condition"].isin(FED)
    ]
    ours = ours[np.where(ours["condition"] == "mismatched", ours["score"] == "fed", ours["score"] == "references")]
    titles = {"none": "fed: nothing", "own": "fed: its own caption", "mismatched": "fed: mismatched, scored against it"}
    theirs = {
        name: f"paper: {title.removeprefix('fed: ').removesuffix(', scored against it')}" for name, title in titles.items()
    }
    ours = ours.assign(panel=ours["condition"].map(titles), site=ours["arm"].map(ARMS))
    # without a text s changes nothing for arm U, and one test serves all s; drawn once a scale all the same
    published = []
    table = reference("fig6_leakage")
    for row in table[(table["metric"] == "cider") & table["training"].isin(list(PAPER))].to_dict("records"):
        condition = row["inference"].removesuffix("_caption")
        for name in ("s0", "s1", "s1.5", "s4"):
            if not np.isnan(row[name]):
                published.append({"panel": theirs[condition], "site": PAPER[row["training"]], "guidance": float(name[1:]),
                                  "value": row[name], "low": np.nan, "high": np.nan, "chance": np.nan})  # fmt: skip
    order = {title: k for k, title in enumerate([names[c] for names in (titles, theirs) for c in FED])}
    both = pd.concat([ours, pd.DataFrame(published)], ignore_index=True)
    return both.sort_values("panel", key=lambda names: names.map(order), kind="stable")


def ranking(rows: pd.DataFrame) -> pd.DataFrame:
    """Lines of `plot_scores`: the share of fed-in captions that are the likeliest of their candidates; none with ranked=0."""
    rows = rows.reindex(columns=rows.columns.union(["baseline", "n_candidates"], sort=False))
    found = rows[(rows["kind"] == "ranking") & (rows["score"] == "top1")].fillna({"control": "", "arm": ""})
    names = [
        {"K-": "K-: site before any text", "K+": "K+: the prompt's embeddings"}.get(row["control"], f"{row['arm']}, s = {row['guidance']:g}")
        for row in found.to_dict("records")
    ]  # fmt: skip
    return found.assign(what=names).sort_values(["control", "arm"], kind="stable")


def draw(result: Result) -> Mapping[str, Figure]:
    rows = result.rows
    table = rows[rows["kind"] == "content-word F1"].fillna({"control": "", "arm": ""})
    from diffprobe.mllm.verdict import Leakage

    wide = leak_against_sight(Leakage(table, pd.DataFrame(), pd.DataFrame()))
    wide["label"] = np.where(wide["control"] == "", wide["label"], wide["control"] + " " + wide["label"])
    plane = pd.concat(
        [wide.rename(columns={s: "value", f"{s}_low": "low", f"{s}_high": "high"}).assign(score=s) for s in ("leak", "sight")]
    )
    shown = pd.DataFrame(result.config["examples"])
    return {
        "": plot_site_curves(
            curves(rows), x="guidance", x_label="guidance s", y_label="CIDEr-D x 100 (paper: CIDEr)", share_y=True, chance_name="chance: another image's text",
            title="What comes back, by what was fed in and how the projector was trained",
        ),
        **({} if (ranks := ranking(rows)).empty else {"ranks": plot_scores(
            ranks, by="baseline", width=4.6, x_label=f"share of fed-in captions ranked first of {ranks['n_candidates'].max():.0f}, 95% interval",
            title="Which caption was fed in, without decoding (mismatched prompts)",
        )}),
        "plane": plot_leak_rows(plane, title="Mismatched prompts: read or seen?"),
        "texts": plot_leak_examples(shown, title="What projectors wrote (first seed)"),
    }  # fmt: skip


def texts(result: Result) -> dict[str, dict[str, Any]]:
    """What projectors wrote as a table: a row an image and what was fed in, a column a projector."""
    shown = pd.DataFrame(result.config["examples"])
    arms = [name for name in shown if name not in ("sample", "seen", "condition", "fed")]
    rows = [
        [f"{row['condition']}, {row['sample']}", *([str(row[name]) or "nothing"] for name in ("fed", "seen", *arms))]
        for row in shown.to_dict("records")
    ]
    return {"texts": {"columns": ["", "fed to the diffusion model", "the image shows", *arms], "rows": rows, "best": []}}


EXPERIMENT = Experiment(
    name="fig6_leakage",
    title="Does the language model see the image or read the prompt: recovery against guidance",
    count=1200,
    smoke_count=36,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Six panels of CIDEr against guidance: ours above, the paper's below; fed nothing, the own caption, a mismatched one; curves by training.",
        "ranks": "Share of fed-in captions that are the likeliest of all candidates, by training and baseline, with intervals and chance.",
        "plane": "Leak and sight of every projector kind and guidance under mismatched prompts, with intervals and controls.",
        "texts": "Texts side by side: what was fed in, what the image shows, and what projectors wrote.",
    },
    tables=texts,
    reference="fig6_leakage",
)

if __name__ == "__main__":
    EXPERIMENT.main()
