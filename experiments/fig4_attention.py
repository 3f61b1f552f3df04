"""Figure 4: token-wise cross-attention over images, and how it localises as noise grows (claim A4).

    python -m experiments.fig4_attention [--count 200] [--smoke] [--from-csv]

Left, as in the paper: the words of a caption over the picture at t = 50 and t = 500.  Measured, which the paper does by eye:
ROC-AUC of object words against their objects' masks and of background words against all that no object covers, by timestep,
beside the map of another word, a centred Gaussian and chance.  A map that finds whatever stands in the image localises objects
too, so the claim is about the lead over the wrong word's map, and about how much of it is left at t = 500: the interaction of
word and timestep, word by word.  The map is the mean of all sites, as in tab_localization, whose store this shares.

Expected headline: the lead falls with t.  About 2 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from diffprobe.figures import plot_localization_curves
from diffprobe.stats import bootstrap_interval, paired_permutation_test
from experiments.figures import plot_attention_strips
from experiments.framework import Claim, Experiment, Options, Result, exact_verdict, record_words, verdict

TIMESTEPS = (10, 50, 100, 250, 500)
LOW, HIGH = 50, 500  # the paper's two pictures
DRAWN_SITES = ("all sites", "D-L2-R0", "U-L1-R1", "U-L1-R2", "U-L2-R1")  # beside the mean, where the paper takes queries
SHOWN, MOST_WORDS = (0.25, 0.5, 0.75), 9  # quantiles of the images by how well their nouns point
MERGED, INTERACTION = "all sites", "word less wrong word, low less high t"


def measure(options: Options) -> Result:
    from diffprobe import open_store
    from diffprobe.probes.grounding import attention_localization

    weights, data, conditioning, out = record_words(options, TIMESTEPS)
    roles = [r for r in ("noun", "colour", "background") if any(s.role == r for c in data[0].captions for s in c.spans)]
    tree = open_store(out)
    rows = attention_localization(
        tree, data, conditioning=conditioning, roles=roles, against_timestep=HIGH, seed=options.seed, keep_rows=True
    )
    config = {
        "store": out.name, "dataset": data.spec, "weights": weights, "conditioning": conditioning,
        "left_out": rows.attrs["left_out"],
    }  # fmt: skip
    rows = pd.concat([rows, interaction(rows, options.seed)], ignore_index=True)
    shown = pictures(tree, data, conditioning, by_pointing(rows))
    return Result(rows.drop(columns=["rows", "row_groups"]), shown, config)


def by_pointing(rows: pd.DataFrame) -> list[str]:
    """Ids of the images whose nouns can be scored, from the worst to the best pointing game at low t; AUC decides ties."""
    part = rows[(rows["role"] == "noun") & (rows["map"] == "word") & (rows["site"] == MERGED) & (rows["timestep"] == LOW)]
    lines = part.set_index("score")
    scores = pd.DataFrame({name: lines.loc[name, "rows"] for name in ("pointing", "auc")})
    means = scores.groupby(lines["row_groups"].iloc[0]).mean().dropna()
    return [str(name) for name in means.sort_values(["pointing", "auc"], kind="stable").index]


def interaction(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How much more a word's map leads the wrong word's at t = 50 than at t = 500: a line a site and role, paired by word.

    Args:
        rows: Of `attention_localization` with `keep_rows`.
    """
    lines = []
    aucs = rows[(rows["score"] == "auc") & (rows["head"] == "mean") & rows["timestep"].isin([LOW, HIGH])]
    for (role, site), part in aucs.groupby(["role", "site"], sort=False):
        by = part.set_index(["map", "timestep"])
        lead = {t: by.loc[("word", t), "rows"] - by.loc[("wrong word", t), "rows"] for t in (LOW, HIGH)}
        change, groups = lead[LOW] - lead[HIGH], part["row_groups"].iloc[0]
        known = np.isfinite(change)
        if known.sum() < 2:
            continue
        low, high = bootstrap_interval(change[known], groups[known], seed=seed)
        lines.append(
            {"role": role, "site": site, "timestep": LOW, "head": "mean", "map": INTERACTION, "score": "auc",
             "value": float(np.mean(change[known])), "low": low, "high": high, "chance": 0.0, "n": int(known.sum()),
             "n_images": len(np.unique(groups[known])), "seed": seed,
             "p": paired_permutation_test(change[known], np.zeros(known.sum()), seed, clusters=groups[known])[1],
             "lead": float(np.mean(lead[LOW][known])), "threshold": float(np.mean(lead[HIGH][known]))}
        )  # fmt: skip
    return pd.DataFrame(lines)


def pictures(tree: xr.DataTree, data: object, conditioning: str, ranked: list[str]) -> dict[str, np.ndarray]:
    """Images at the quartiles of a ranking, and (timestep, word, y, x) maps of their captions' words, averaged over the sites."""
    from diffprobe import attention_maps
    from diffprobe.data.images import fit_image
    from diffprobe.figures import one_sample, words_of
    from diffprobe.store import provenance

    request = provenance(tree)["request"]
    texts = tree["prompts"].to_dataset()["text"].values[:, request["conditionings"].index(conditioning)]
    ids = [str(s) for s in tree.dataset["sample"].values]
    narrow = [ids.index(name) for name in ranked if len(words_of(str(texts[ids.index(name)]))) <= MOST_WORDS]
    rows = [narrow[round(share * (len(narrow) - 1))] for share in SHOWN]
    found: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows):
        one, words = one_sample(tree, row), words_of(str(texts[row]))
        maps = [
            attention_maps(one, word, conditioning=conditioning, timestep=[LOW, HIGH]).isel(sample=0).to_numpy()
            for word in words
        ]
        sample = next(s for s in (data[k] for k in range(len(data))) if s.id == ids[row])  # type: ignore[index,arg-type]
        found[f"image_{number}"] = np.asarray(fit_image(sample.load(), tuple(request["resolution"]), request["fit"]))
        found[f"maps_{number}"] = np.stack(maps, axis=1).astype(np.float32)
        found[f"words_{number}"] = np.array(words)
    return found


def judge(rows: pd.DataFrame) -> list[Claim]:
    merged = rows[(rows["site"] == MERGED) & (rows["score"] == "auc") & (rows["timestep"] == LOW)]
    lines = merged.set_index(["role", "map"])
    statement = f"Low t localises the word's own object better (AUC, word less wrong word, t = {LOW} less t = {HIGH})"
    claims = []
    if ("noun", INTERACTION) in lines.index:
        row = lines.loc[("noun", INTERACTION)]
        evidence = (
            f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n = {row['n']:.0f} words on {row['n_images']:.0f} images, mean "
            f"of all sites; lead over the wrong word {row['lead']:.3f} at t = {LOW}, {row['threshold']:.3f} at t = {HIGH}"
        )
        claims.append(Claim("A4", statement, exact_verdict(row["value"], row["p"]), evidence, float(row["p"]), True))
    else:
        claims.append(Claim("A4", statement, "undecided", "no caption has words of two objects", None, True))
    for role, said, sign in (
        ("noun", f"Low t localises objects better (AUC of nouns, t = {LOW} less t = {HIGH})", 1),
        ("background", f"High t favours background (AUC of background words, t = {HIGH} less t = {LOW})", -1),
    ):
        if (role, "word") not in lines.index:
            claims.append(Claim("A4", said, "undecided", "these captions have no such words"))
            continue
        lead, own = lines.loc[(role, f"timestep {HIGH}")], lines.loc[(role, "word")]
        low, high = sorted((sign * float(lead["lead_low"]), sign * float(lead["lead_high"])))
        evidence = (
            f"{sign * lead['lead']:.3f} [{low:.3f}, {high:.3f}], n = {lead['n']} on {lead['n_images']} images, mean of all sites; "
            f"AUC {own['value']:.3f} at t = {LOW}, {lead['value']:.3f} at t = {HIGH}, chance .5"
        )
        claims.append(Claim("A4", said, verdict(low, high), evidence))
    return claims


def draw(result: Result) -> Mapping[str, Figure]:
    kept = result.pictures
    count = sum(name.startswith("image_") for name in kept)
    maps = [
        xr.DataArray(
            kept[f"maps_{k}"], dims=("timestep", "word", "y", "x"), coords={"timestep": [LOW, HIGH], "word": kept[f"words_{k}"]}
        )
        for k in range(count)
    ]
    curves = result.rows[(result.rows["map"] != INTERACTION) & result.rows["site"].str.startswith(DRAWN_SITES)]
    return {
        "": plot_attention_strips(
            [kept[f"image_{k}"] for k in range(count)],
            maps,
            title="Cross-attention of the captions' words, mean of all sites; images at the quartiles of how well nouns point",
        ),
        "curves": plot_localization_curves(curves, title="Words against the masks of what they speak of"),
    }


EXPERIMENT = Experiment(
    name="fig4_attention",
    title="Token-wise attention over images, and its localisation of objects and background by timestep",
    count=200,
    smoke_count=8,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Images with the cross-attention of each caption word laid over them, at timesteps 50 and 500.",
        "curves": "ROC-AUC of nouns, colour words and background words against their regions by timestep, with intervals, controls and chance.",
    },
    needs={"A4": ("pointing",)},
)

if __name__ == "__main__":
    EXPERIMENT.main()
