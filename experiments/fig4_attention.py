"""Figure 4: token-wise cross-attention over images, and how it localises as noise grows (claim A4).

    python -m experiments.fig4_attention [--count 200] [--smoke] [--from-csv]

Left, as in the paper: the words of a caption over the picture at t = 50 and t = 500.  Measured, which the paper does by eye:
ROC-AUC of object words against their objects' masks and of background words against all that no object covers, by timestep,
beside the map of another word, a centred Gaussian and chance.  "Low t localises objects better" and "high t favours
background" are paired differences, word by word, of t = 50 and t = 500.

Expected headline: object words' AUC falls with t.  About 2 minutes on two cores; tab_localization shares its store.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from diffprobe.figures import plot_localization_curves
from experiments.figures import plot_attention_strips
from experiments.framework import Claim, Experiment, Options, Result, record_words, verdict

TIMESTEPS = (10, 50, 100, 250, 500)
LOW, HIGH = 50, 500  # the paper's two pictures
PAPER_SITES = ("D-L2-R0", "U-L1-R1", "U-L1-R2", "U-L2-R1")  # where the paper takes cross-attention queries
SHOWN, MOST_WORDS = 3, 9
MERGED = "all sites"


def measure(options: Options) -> Result:
    from diffprobe import open_store
    from diffprobe.probes.grounding import attention_localization
    from diffprobe.store import provenance

    weights, data, conditioning, out = record_words(options, TIMESTEPS)
    roles = [r for r in ("noun", "colour", "background") if any(s.role == r for c in data[0].captions for s in c.spans)]
    tree = open_store(out)
    sites = [s for s in provenance(tree)["request"]["maps"] if s.startswith(PAPER_SITES)] or None
    rows = attention_localization(
        tree, data, conditioning=conditioning, roles=roles, sites=sites, against_timestep=HIGH, seed=options.seed
    )
    config = {
        "store": out.name, "dataset": data.spec, "weights": weights, "conditioning": conditioning,
        "sites": sites, "left_out": rows.attrs["left_out"],
    }  # fmt: skip
    return Result(rows, pictures(tree, data, conditioning, sites), config)


def pictures(tree: xr.DataTree, data: object, conditioning: str, sites: list[str] | None) -> dict[str, np.ndarray]:
    """Images, and (timestep, word, y, x) maps of their captions' content words, averaged over the sites."""
    from diffprobe import attention_maps
    from diffprobe.data.images import fit_image
    from diffprobe.figures import one_sample, words_of
    from diffprobe.store import provenance

    request = provenance(tree)["request"]
    texts = tree["prompts"].to_dataset()["text"].values[:, request["conditionings"].index(conditioning)]
    ids = [str(s) for s in tree.dataset["sample"].values]
    # scenes whose words differ, so that no word stands twice
    rows = [k for k, text in enumerate(texts) if len(words_of(str(text))) <= MOST_WORDS]
    rows = sorted(rows, key=lambda k: -len(words_of(str(texts[k]))))[:SHOWN]
    found: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows):
        one, words = one_sample(tree, row), words_of(str(texts[row]))
        maps = [
            attention_maps(one, word, site=sites, conditioning=conditioning, timestep=[LOW, HIGH]).isel(sample=0).to_numpy()
            for word in words
        ]
        sample = next(s for s in (data[k] for k in range(len(data))) if s.id == ids[row])  # type: ignore[index,arg-type]
        found[f"image_{number}"] = np.asarray(fit_image(sample.load(), tuple(request["resolution"]), request["fit"]))
        found[f"maps_{number}"] = np.stack(maps, axis=1).astype(np.float32)
        found[f"words_{number}"] = np.array(words)
    return found


def judge(rows: pd.DataFrame) -> list[Claim]:
    lines = rows[(rows["site"] == MERGED) & (rows["score"] == "auc") & (rows["timestep"] == LOW)].set_index(["role", "map"])
    claims = []
    for role, statement, sign in (
        ("noun", f"Low t localises objects better (AUC of nouns, t = {LOW} less t = {HIGH})", 1),
        ("background", f"High t favours background (AUC of background words, t = {HIGH} less t = {LOW})", -1),
    ):
        if (role, "word") not in lines.index:
            claims.append(Claim("A4", statement, "undecided", "these captions have no such words"))
            continue
        lead, own = lines.loc[(role, f"timestep {HIGH}")], lines.loc[(role, "word")]
        low, high = sorted((sign * float(lead["lead_low"]), sign * float(lead["lead_high"])))
        evidence = (
            f"{sign * lead['lead']:.3f} [{low:.3f}, {high:.3f}], n = {lead['n']} on {lead['n_images']} images, mean of the sites; "
            f"AUC {own['value']:.3f} at t = {LOW}, {lead['value']:.3f} at t = {HIGH}, chance .5"
        )
        claims.append(Claim("A4", statement, verdict(low, high), evidence))
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
    return {
        "": plot_attention_strips(
            [kept[f"image_{k}"] for k in range(count)], maps, title="Cross-attention of the captions' words (mean of the sites)"
        ),
        "curves": plot_localization_curves(result.rows, title="Words against the masks of what they speak of"),
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
