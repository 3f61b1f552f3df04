"""Table: does the same place on an object have the same feature in another image (PCK)?  An analysis of DIFT, not of the paper.

    python -m experiments.tab_correspondence [--count 60] [--data spair:FOLDER] [--smoke] [--from-csv]

Keypoints of drawn objects that stand elsewhere in the other image (centre and four extremities) are sought there by their
features: the pixel of highest cosine.  A keypoint is right within a tenth of the larger side of the object's box (PCK@0.1), per
point.  As DIFT does, keypoints are read and sought at pixel centres of the image as the model sees it.  Rows: DIFT's setting (the
output of up block 1 at t = 261, the mean of 8 noises, raw cosines), then the paper's sites at three timesteps, one noise, channels
standardised.  Beside each stand guesses without features: any pixel, any pixel of the object's box (the object found, its parts
not), and the source's own coordinates.  `--data spair:FOLDER` reads SPair-71k instead, fitted as it is published (squashed).

Expected: DIFT's setting above the guess in the box; DIFT reports .52 per image on SPair-71k for Stable Diffusion 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffprobe.data.keypoints import KeypointPair
from experiments.figures import plot_scores
from experiments.framework import Chosen, Claim, Experiment, Options, Result, joint

TIMESTEPS = (50, 250, 500)
DIFT_SITE, DIFT_TIMESTEP, DIFT_DRAWS = "U-L1-Out", 261, 8
DIFT = f"DIFT: {DIFT_SITE}, t = {DIFT_TIMESTEP}, {DIFT_DRAWS} noises, raw"
GUESSES = {"chance": "any pixel", "chance_box": "any pixel of the object's box", "position": "the same place"}


def at_pixels(pair: KeypointPair, size: int) -> KeypointPair:
    """The pair with its source points moved to the centres of the pixels that they lie in; distances are to the true target."""
    return replace(pair, source_points=in_pixels(pair.source_points, size))


def in_pixels(points: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """
    >>> in_pixels(np.array([[0.0, 0.3], [0.99, 1.0]]), 4).tolist()
    [[0.125, 0.375], [0.875, 0.875]]
    """
    return np.asarray((np.clip(np.floor(points * size), 0, size - 1) + 0.5) / size)


def measure(options: Options) -> Result:
    from diffprobe import extract, features, load_dataset, load_model, open_store
    from diffprobe.data import TwinsDataset
    from diffprobe.data.keypoints import twin_keypoints
    from diffprobe.data.spair import read_spair
    from diffprobe.probes.correspondence import correspondence
    from diffprobe.store import site_names

    model = load_model(options.model, options.device)
    side, fit = model.size[0], "crop"
    kind, _, folder = options.data.partition(":")
    if kind == "spair":
        source, fit = load_dataset(str(Path(folder) / "JPEGImages")), "squash"
        pairs = read_spair(folder, "test", resolution=model.size, fit=fit)
    else:
        twins = load_dataset(options.data or f"shapes-winoground:{2 * options.count}?seed={options.seed}")
        if not isinstance(twins, TwinsDataset):
            raise ValueError(f"Keypoints are known for drawn twins and for spair:FOLDER; got {options.data!r}.")
        source, pairs = twins, twin_keypoints(twins)
    used = {name for pair in pairs for name in (pair.source, pair.target)}
    data = Chosen(source, [k for k in range(len(source)) if source[k].id in used], "moved")
    pairs = [at_pixels(pair, side) for pair in pairs]
    frames = []
    for what, sites, steps, draws, raw in (
        ("dift", [DIFT_SITE], (DIFT_TIMESTEP,), 1 if options.smoke else DIFT_DRAWS, True),
        ("paper", "paper", TIMESTEPS, 1, False),
    ):
        out = options.work / f"tab_correspondence_{what}_{data.name}_{len(data)}_{options.seed}.zarr"
        extract(
            model,
            data,
            out,
            sites=sites,
            timesteps=steps,
            conditionings=("null",),
            noise_draws=draws,
            seed=options.seed,
            fit=fit,
        )
        tree = open_store(out)
        for site in site_names(tree):
            found = features(tree, site, conditioning="null").load()
            table = correspondence(found, pairs, grid=side, standardise=not raw, seed=options.seed)
            frames.append(table.assign(site=site, setting=DIFT if raw else site))
    rows = pd.concat(frames, ignore_index=True)
    return Result(rows, config={"dataset": data.spec, "weights": model.weights_hash(), "images": len(data), "pixels": side})


def judge(rows: pd.DataFrame) -> list[Claim]:
    row = rows[(rows["setting"] == DIFT) & (rows["per"] == "point")].iloc[0]
    guesses = ", ".join(f"{name} {row[column]:.3f}" for column, name in GUESSES.items())
    best = max(GUESSES, key=lambda column: float(row[column]))
    decided, p = joint([(row["value"], row["low"], row["high"])], float(row[best]))
    others = rows[(rows["setting"] != DIFT) & (rows["per"] == "point")]
    top = others.loc[others["value"].idxmax()]
    evidence = (
        f"PCK@0.1 {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n = {row['n']} points of {row['n_groups']} scenes; {guesses}; "
        f"best of the paper's sites {top['site']}, t = {top['timestep']}: {top['value']:.3f} [{top['low']:.3f}, {top['high']:.3f}]"
    )
    return [
        Claim("PCK", "DIFT's setting finds keypoints better than any guess without features (ours)", decided, evidence, p, True)
    ]


def draw(result: Result) -> Mapping[str, Figure]:
    points = result.rows[result.rows["per"] == "point"]
    shown = points.assign(what=points["setting"], chance=points["chance_box"], timestep=points["timestep"].astype(int))
    title = "Keypoints found again (PCK@0.1); dashed: a guess in the object's box"
    return {"": plot_scores(shown, x_label="share of points found, 95% interval", title=title, width=4.6)}


EXPERIMENT = Experiment(
    name="tab_correspondence",
    title="Keypoints of one image found in another by their features (PCK), with DIFT's setting",
    count=60,
    smoke_count=6,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Share of keypoints found in the other image, a row a setting or site, a colour a timestep, with intervals and a guess."
    },
    needs={"PCK": ("main shape",)},
)

if __name__ == "__main__":
    EXPERIMENT.main()
