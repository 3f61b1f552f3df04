"""Figure 7: what a question changes in the features, and whether it changes them where the question looks (claim A5, second half).

    python -m experiments.fig7_questions [--count 96] [--smoke] [--from-csv]

|f_c - f_u| at the paper's six sites, and averaged over them, for the caption and for two questions about different objects of
one image.  The paper shows such pictures; measured here against the mask of what the text asks about.  What stands out without
any text, |f_u|, and what another text changes on the same image (a question about the other object; for captions a mismatched
caption) tell a map of the text from a map of the image, so the claim asks that the difference beats both, at the main site at
t = 50; the other sites, the questions, a centred Gaussian and the mask of another image stand beside it.

Expected headline: the difference lies on objects above chance.  About 2 minutes on two cores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffprobe.data.samples import Dataset, Question, Sample
from diffprobe.figures import plot_localization_controls, plot_localization_curves, plot_localization_grid
from experiments.figures import plot_differences
from experiments.framework import MAIN_SITE, Claim, Experiment, Options, Result, joint

TIMESTEPS = (10, 50, 100, 250, 500)
TEXTS = ("caption", "question:0", "question:1")
SHOWN, SHOWN_AT, SHOWN_SITE = 3, 50, "U-L2-R1-B0-Cross-Q"
JUDGED = (MAIN_SITE, 50, "auc")  # fixed beforehand: the paper does not say which site its pictures show; this is its main one


class TwoQuestions:
    """Samples of a dataset with two questions each, about different objects; samples without such two are left out."""

    def __init__(self, source: Dataset, count: int) -> None:
        self.source, self.chosen = source, []
        for index in range(len(source)):
            pair = two_questions(source[index])
            if pair is not None and len(self.chosen) < count:
                self.chosen.append((index, pair))
        if len(self.chosen) < 2:
            raise ValueError(
                f"{source.name!r} has {len(self.chosen)} samples with questions about two different objects; this figure needs more."
            )

    @property
    def name(self) -> str:
        return f"{self.source.name}-two-questions"

    @property
    def spec(self) -> str:
        return self.source.spec

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        number, pair = self.chosen[index]
        return replace(self.source[number], questions=pair)

    def fingerprint(self) -> str:
        asked = "|".join(f"{number} {a.text} {b.text}" for number, (a, b) in self.chosen)
        return hashlib.sha256((self.source.fingerprint() + asked).encode()).hexdigest()[:16]


def two_questions(sample: Sample) -> tuple[Question, Question] | None:
    """The first two questions that are about different objects."""
    about = [q for q in sample.questions if q.objects]
    pairs = ((a, b) for k, a in enumerate(about) for b in about[k + 1 :] if not set(a.objects) & set(b.objects))
    return next(pairs, None)


def measure(options: Options) -> Result:
    from diffprobe import extract, load_dataset, load_model, open_store
    from diffprobe.probes.grounding import difference_localization

    model = load_model(options.model, options.device)
    spec = options.data or f"shapes:{4 * options.count}?split=test&objects=2&seed={options.seed}"
    data = TwoQuestions(load_dataset(spec), options.count)
    out = options.work / f"fig7_questions_{data.name}_{len(data)}_{options.seed}.zarr"
    extract(model, data, out, timesteps=TIMESTEPS, conditionings=("null", *TEXTS, "mismatched"), seed=options.seed)
    tree = open_store(out)
    rows = difference_localization(tree, data, conditionings=TEXTS, seed=options.seed)
    config = {
        "store": out.name, "dataset": data.spec, "weights": model.weights_hash(), "timesteps": list(TIMESTEPS),
        "texts": list(TEXTS), "left_out": rows.attrs["left_out"],
    }  # fmt: skip
    site = SHOWN_SITE if SHOWN_SITE in set(rows["site"]) else str(rows["site"].iloc[0])
    maps = np.stack([difference_at(tree, site, text) for text in TEXTS], axis=1)
    return Result(rows, pictures(data, model.size[0], maps), {**config, "shown_site": site})


def difference_at(tree: object, site: str, text: str) -> np.ndarray:
    """(image, y, x) of the first images."""
    from diffprobe.probes.grounding import difference_maps

    return difference_maps(tree, site, text, [SHOWN_AT]).isel(timestep=0, sample=slice(SHOWN)).to_numpy()  # type: ignore[arg-type]


def pictures(data: Dataset, side: int, maps: np.ndarray) -> dict[str, np.ndarray]:
    """Images, difference maps, and the regions and words of the texts."""
    from diffprobe.data.images import fit_image, fit_masks

    samples = [data[k] for k in range(min(SHOWN, len(data)))]
    size = (side, side)
    regions, texts = [], []
    for sample in samples:
        masks = fit_masks(sample.masks(), size)
        named = sorted({o for span in sample.captions[0].spans for o in span.objects})
        asked = [named, *(list(q.objects) for q in sample.questions)]
        regions.append([masks[objects].any(0) for objects in asked])
        texts.append([sample.captions[0].text, *(q.text for q in sample.questions)])
    images = [np.asarray(fit_image(sample.load(), size)) for sample in samples]
    return {"images": np.stack(images), "maps": maps, "regions": np.array(regions), "texts": np.array(texts)}


def judge(rows: pd.DataFrame) -> list[Claim]:
    _, timestep, score = JUDGED
    lines = rows[(rows["timestep"] == timestep) & (rows["score"] == score)]
    claims = []
    for kind, another in (("caption", "a mismatched caption"), ("question", "another question")):
        by_map = lines[lines["conditioning"] == kind].set_index(["map", "site"])
        sites = list(dict.fromkeys(by_map.index.get_level_values("site")))
        here = site_judged(lines)
        for site in [here, *(s for s in sites if s != here)]:
            own, other, null, gaussian = (
                by_map.loc[(name, site)] for name in ("difference", "other text", "null features", "centred Gaussian")
            )
            evidence = (
                f"AUC {own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}] at {site}, t = {timestep}, chance .5, "
                f"n = {own['n']} texts on {own['n_images']} images; lead over |f_u| ({null['value']:.3f}) {lead(null)}; over {another} "
                + (
                    f"({other['value']:.3f}) {lead(other)}"
                    if other["n"]
                    else "none (no other text on the same images was recorded)"
                )
                + f"; over a centred Gaussian ({gaussian['value']:.3f}) {lead(gaussian)}"
            )
            beaten = [null, other] if other["n"] else [null]
            above = tuple(float(own[end]) - 0.5 for end in ("value", "low", "high"))  # controls below chance are easily beaten
            decided, p = joint([above, *((r["lead"], r["lead_low"], r["lead_high"]) for r in beaten)])
            if not other["n"] and decided == "held":
                decided = "undecided"
            primary = kind == "caption" and site == here
            where = "the main site" if site == JUDGED[0] else site
            statement = (
                f"At {where}, the difference that a {kind} makes lights up what it speaks of, above chance, more than the features without text "
                f"do and more than {another} does"
            )
            claims.append(Claim("A5", statement, decided, evidence, p if primary else None, primary))
    return claims


def site_judged(rows: pd.DataFrame) -> str:
    return JUDGED[0] if JUDGED[0] in set(rows["site"]) else str(rows["site"].iloc[0])


def lead(line: pd.Series) -> str:
    return f"{line['lead']:.3f} [{line['lead_low']:.3f}, {line['lead_high']:.3f}]"


def draw(result: Result) -> Mapping[str, Figure]:
    rows, kept = result.rows, result.pictures
    asked = rows[rows["conditioning"] == "question"]
    site = str(result.config["shown_site"])
    return {
        "": plot_differences(
            list(kept["images"]), kept["maps"], kept["regions"], kept["texts"].tolist(),
            title=f"|f_c - f_u| at {site}, timestep {SHOWN_AT}; outlined: what the text speaks of",
        ),
        "curves": plot_localization_curves(rows, by="conditioning", title="Differences against the masks of what the text speaks of"),
        "grid": plot_localization_grid(
            asked[asked["score"].isin(["pointing", "auc"])], against="other text", title="Differences that questions make, against the object asked about"),
        "controls": plot_localization_controls(
            asked[(asked["site"] == site_judged(asked)) & asked["timestep"].isin([50, 500])],
            title=f"Questions, {site_judged(asked)}: difference, controls and chance",
        ),
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="fig7_questions",
    title="Where a caption and two questions change the features, against the object that they speak of",
    count=96,
    smoke_count=8,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Images beside maps of the change that the caption and two questions make in the features, the objects asked about outlined.",
        "curves": "ROC-AUC of the change by timestep at six sites, for captions and questions, with controls and chance.",
        "grid": "Two heat maps, pointing game and ROC-AUC, of questions' changes, six sites by five timesteps; cells above the other question framed.",
        "controls": "Nine panels of dots with intervals: scores of the change that questions make and of its controls at two timesteps.",
    },
    needs={"A5": ("pointing",)},
)

if __name__ == "__main__":
    EXPERIMENT.main()
