"""Claim A7: matching images and texts straight from the diffusion model beats CLIP on pairs that differ in one thing.

    python -m experiments.tab_alignment [--count 135] [--data mmvp-vlm:FOLDER] [--smoke] [--from-csv]

Each score of `diffprobe.matching` on drawn twins of MMVP-VLM (nine patterns in turn) and of Winoground (attributes, then
relations, exchanged), beside shapes-clip where it is there; another benchmark with --data, then without the learned
baseline and CLIP ("diffprobe probe alignment --clip ID" has them).  The claim has two primary statements, declared for scores
that measure a match: Discffusion's, and the denoising loss less the null text's, against CLIP on pairs by McNemar's exact test.
The score as the paper words it has no term for the image alone, so one image may win for both texts; how often it does stands
beside each score (chance .5), and no such item can be right.  Scores of the diffusion model are kept in the work folder and not
computed again.  Half an hour on an idle core; --smoke half a minute.

Expected: the paper finds .346 of MMVP-VLM's pairs for SD 2.1 against .193-.200 for CLIP-L (chance .25).
Writes figures/tab_alignment.{png,pdf,csv,json}.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from diffprobe.probes.alignment import ALL, DIMS, PROTOCOLS, alignment_table, compare_scores, over_draws
from diffprobe.stats import wilson_interval
from experiments.figures import plot_alignment
from experiments.framework import Claim, Experiment, Options, Result, exact_verdict, reference, verdict

PAIRS, QUADRUPLES = "shapes-mmvp", "shapes-winoground"
ONE_IMAGE = "one image"
PAPER_SCORE, CLIP, PUBLISHED = "attention_lse_paper", "clip_cosine", "published"
PRIMARY = {"attention_lse_discffusion": "A7 Discffusion", "denoising_loss_normalised": "A7 loss"}
NAMES = {
    PAPER_SCORE: "attention LSE, as the paper words it",
    "attention_lse_discffusion": "attention LSE, as Discffusion's code",
    "denoising_loss": "denoising loss",
    "denoising_loss_normalised": "denoising loss, less the null text's",
    "pooled_cosine": "pooled feature mapped to text (learned)",
    CLIP: "CLIP cosine",
    PUBLISHED: "SD 2.1 on the real benchmark (paper)",
}
COLUMNS = (
    "benchmark", "kind", "score", "baseline", "metric", "pattern", "value", "low", "high", "n", "chance", "p", "p_holm", "seed"
)  # fmt: skip
PUBLISHED_TABLES = {
    PAIRS: "mmvp_vlm_alignment", "mmvp-vlm": "mmvp_vlm_alignment", QUADRUPLES: "winoground", "winoground": "winoground",
}  # fmt: skip


def concentration(scores: xr.Dataset) -> pd.DataFrame:
    """How often one image of an item is chosen by every text: a score that measures the image, and not the match, does that.

    Returns:
        Columns score, metric ("one image"), pattern ("all"), value, low, high, n, chance (of random scores).
    """
    rows = []
    for name, values in scores.data_vars.items():
        if not set(DIMS) <= set(values.dims) or min(values.sizes["image"], values.sizes["text"]) < 2:
            continue
        pooled = over_draws(values)
        chosen = pooled.argmax(1)  # (item, text)
        strict = (pooled == pooled.max(1, keepdims=True)).sum(1) == 1
        same = (chosen == chosen[:, :1]).all(1) & strict.all(1)
        low, high = wilson_interval(int(same.sum()), len(same))
        chance = pooled.shape[1] ** (1.0 - pooled.shape[2])
        row = {"score": str(name), "metric": ONE_IMAGE, "pattern": ALL, "value": same.mean(), "low": low, "high": high}
        rows.append({**row, "n": len(same), "chance": chance})
    return pd.DataFrame(rows)


def measure(options: Options) -> Result:
    """Rows of kind "score" (shares right), "difference" (paired, against CLIP) and "paper" (published numbers)."""
    from diffprobe.data.benchmarks import Benchmark, load_benchmark
    from diffprobe.matching import alignment_score
    from diffprobe.models import EMBEDDED, load_model

    model = load_model(options.model, options.device)
    own = f"?seed={options.seed}"
    specs = (
        [options.data] if options.data else [f"{PAIRS}:{options.count}{own}", f"{QUADRUPLES}:{-(-3 * options.count // 2)}{own}"]
    )
    drawn = all(spec.startswith("shapes-") for spec in specs)
    learned = ("pooled_cosine", CLIP) if (EMBEDDED / "shapes-clip").is_dir() else ("pooled_cosine",)
    noise: dict[str, Any] = {"timesteps": (189, 589), "draws": 1} if options.smoke else {}
    benchmarks = [load_benchmark(spec) for spec in specs]
    baselines = None
    if drawn:  # of all items at once: the map to text is learned once
        items = tuple(item for benchmark in benchmarks for item in benchmark.items)
        train = f"shapes:{60 if options.smoke else 600}?seed={options.seed}"
        together = Benchmark("twins", "winoground", " ".join(specs), items)
        baselines = alignment_score(model, together, scores=learned, seed=options.seed, train=train)
    parts, config = [], {"weights": model.weights_hash()}
    for spec, benchmark in zip(specs, benchmarks, strict=True):
        kept = options.work / f"tab_alignment_{benchmark.fingerprint()}_{model.weights_hash()}_{options.seed}_{len(noise)}.nc"
        scores = alignment_score(model, benchmark, seed=options.seed, out=kept, **noise)
        config[f"request of {benchmark.name}"] = scores.attrs["request"]
        if baselines is not None:
            scores = scores.merge(baselines.sel(item=scores["item"]), compat="override")
        name = spec.partition(":")[0]
        shares = alignment_table(scores, benchmark.protocol, seed=options.seed).assign(kind="score")
        parts.append(shares.assign(benchmark=name))
        parts.append(concentration(scores).assign(benchmark=name, kind="concentration", seed=options.seed))
        if CLIP in scores:
            compared = compare_scores(scores, benchmark.protocol, CLIP, seed=options.seed)
            parts.append(compared.assign(kind="difference", benchmark=name, pattern=ALL, chance=0.0))
        parts.append(published(name))
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True)
    rows = rows.reindex(columns=list(COLUMNS))
    rows["baseline"] = rows["baseline"].fillna("")
    return Result(rows, config=config)


def published(benchmark: str) -> pd.DataFrame:
    """The paper's numbers for a benchmark, or for the one that a drawn one is a twin of, as shares; n is what each rests on."""
    if benchmark not in PUBLISHED_TABLES:
        return pd.DataFrame()
    table = reference(PUBLISHED_TABLES[benchmark]).set_index("model")
    row = table[table.index.str.startswith("SD2.1")].iloc[0] / 100
    metrics = PROTOCOLS["winoground" if "winoground" in benchmark else "mmvp-vlm"]
    if "pair" in metrics:
        cells = [
            ("pair", ALL if name == "mean" else str(name), value, 135 if name == "mean" else 15) for name, value in row.items()
        ]
    else:
        cells = [(str(name), ALL, value, 400) for name, value in row.items()]
    rows = [
        {"metric": m, "pattern": p, "value": v, "low": np.nan, "high": np.nan, "n": n, "chance": metrics[m].chance}
        for m, p, v, n in cells
    ]
    return pd.DataFrame(rows).assign(kind="paper", benchmark=benchmark, score=PUBLISHED)


def judge(rows: pd.DataFrame) -> list[Claim]:
    """A7 by the two primary scores and by the paper's own, on pairs; whether that one is above chance, and what it measures."""
    pairs = rows[(rows["metric"] == "pair") & (rows["pattern"] == ALL)]
    if pairs.empty:
        return []
    shares = pairs[pairs["kind"] == "score"].set_index("score")
    differences = pairs[pairs["kind"] == "difference"].set_index("score")
    theirs = "paper: SD 2.1 .346 on MMVP-VLM, CLIP-L .193 and .200"
    claims = []
    for name in [n for n in (*PRIMARY, PAPER_SCORE) if n in shares.index]:
        number, primary = PRIMARY.get(name, "A7"), name in PRIMARY
        statement = f"Matching straight from the diffusion model ({NAMES[name]}) beats CLIP on pairs that differ in one thing"
        shown = f"{NAMES[name]} {_share(shares.loc[name])} of n = {shares.loc[name, 'n']:.0f} pairs"
        if name not in differences.index:
            why = "there is no CLIP to compare with (shapes-clip is not there)"
            claims.append(Claim(number, statement, "undecided", f"{shown}; {why}; {theirs}", None, primary))
            continue
        gap = differences.loc[name]
        evidence = (
            f"{shown}, CLIP {_share(shares.loc[CLIP])}, paired difference {_share(gap)} (McNemar p = {gap['p']:.2g}); {theirs}"
        )
        claims.append(Claim(number, statement, exact_verdict(gap["value"], gap["p"]), evidence, float(gap["p"]), primary))
    mine = shares.loc[PAPER_SCORE] if PAPER_SCORE in shares.index else None
    if mine is not None:
        others = "; ".join(f"{NAMES[name]} {_share(row)}" for name, row in shares.iterrows() if name not in (PAPER_SCORE, CLIP))
        claims.append(
            Claim(
                "A7, chance (ours)", "Matching as the paper words it is above chance on pairs",
                verdict(mine["low"], mine["high"], mine["chance"]),
                f"{_share(mine)} of n = {mine['n']:.0f} pairs, chance {mine['chance']:.2f}; other scores: {others}",
            )
        )  # fmt: skip
    one = rows[(rows["metric"] == ONE_IMAGE) & (rows["benchmark"] == pairs["benchmark"].iloc[0])].set_index("score")
    if PAPER_SCORE in one.index:
        row = one.loc[PAPER_SCORE]
        claims.append(
            Claim(
                "A7, concentration (ours)", "As the paper words it, the score measures the image: one image wins for both texts "
                "more often than for random scores", verdict(row["low"], row["high"], row["chance"]),
                f"in {_share(row)} of n = {row['n']:.0f} pairs, chance {row['chance']:.2f}; others: "
                + "; ".join(f"{NAMES[name]} {_share(r)}" for name, r in one.iterrows() if name != PAPER_SCORE),
            )
        )  # fmt: skip
    return claims


def _share(row: pd.Series) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def draw(result: Result) -> dict[str, Any]:
    """Alignment by pattern."""
    rows = result.rows[result.rows["kind"].isin(["score", "paper"])]
    return {"": plot_alignment(rows, NAMES)}


EXPERIMENT = Experiment(
    name="tab_alignment",
    title="Image-text matching straight from the diffusion model, by pattern (claim A7)",
    count=135,
    smoke_count=9,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Table of colours: share of image-text pairs matched right, by visual pattern, for scores of the diffusion model, a "
        "learned map from its features and CLIP, with chance above and the paper's number for Stable Diffusion 2.1 below."
    },
    reference="mmvp_vlm_alignment.csv",
    needs={"A7": ("attribute late", "relation")},
)

if __name__ == "__main__":
    EXPERIMENT.main()
