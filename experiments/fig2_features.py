"""Figure 2: what the features look like, by site and by noise (claims A1, A2, A3).

    python -m experiments.fig2_features [--count 135] [--smoke] [--from-csv]

On pairs of images that differ in one thing (drawn twins of MMVP, 9 patterns x 15 by default), without a prompt:

- A1: the mean cosine of a pair's features falls with the timestep and is far higher at Cross-Q sites.  Noise alone makes any
  two features less alike, so the number is the distance to a ceiling: the same image under two noises.  The claim is that a
  pair falls further than that ceiling.  Shown are pairs whose images have noise of their own, pairs that share theirs, the
  ceiling, and images that do not belong together; raw as in the paper, and standardised per channel over all images and
  positions of one site and timestep, because a mean that all images share makes any two alike.
- A2: register-like outlier tokens: the share of positions whose norm has a robust z-score above 6 in its map, parted into those
  on objects and those where nothing is; beside it the same share in normal noise of the same shape.  Registers sit where
  nothing is.  Where no Out or Res-Out site has such outliers, the claim cannot be tested on this model.
- A3: high t keeps layout, low t keeps fine structure.  A ridge map reads two bands of the image from the features at each
  position: layout (the image in as many cells as the coarsest site has, less its mean colour) and fine structure (what
  four times as many cells show and twice as many do not).  R2 on pairs held out (each once) is one unit for both bands, needs no labels,
  and asks what the features tell rather than how they change; it starts from different heights, so the number is what
  each band keeps of its R2 from the lowest t to the highest, at sites where both can be read.  Noise alone hides fine structure
  first, whatever the network does; therefore the claim is about the difference to the noised latent, the network's own input,
  image by image.  Chance is 0 (the training mean); the control gives every image another one's features.

About 2 minutes on two cores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from diffprobe.data.samples import Dataset
from diffprobe.figures import plot_pca_grid, plot_site_curves
from diffprobe.probes.measures import cosines
from diffprobe.probes.pca import outlier_tokens, pca_rgb
from diffprobe.probes.similarity import similarity
from diffprobe.probes.streaming import GramRidge
from diffprobe.probes.task import FOLDS, split_folds
from diffprobe.sites import LATENT
from diffprobe.stats import bootstrap_interval, bootstrap_sums, wilson_interval
from experiments.figures import in_order
from experiments.framework import Chosen, Claim, Experiment, Options, Result, Verdict, joint, reference, worst

TIMESTEPS = (10, 50, 100, 250, 500)
ENDS = TIMESTEPS[:: len(TIMESTEPS) - 1]
OTHER_NOISE = 1_000_003  # added to the seed for an image's second noise
SHOWN = 5  # images of the pictures
SHOWN_AT, SHOWN_SITE = 50, "U-L2-R1-B0-Cross-Q"
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
READABLE = 0.05  # an R2 below this at low t is too little to lose a share of
PANELS = {
    "cosine": "pair cosine, raw",
    "shared noise": "... noise shared in a pair",
    "ceiling": "one image, two noises",
    "cosine_standardised": "pair cosine, standardised",
    "outliers": "share of outlier tokens",
    "layout": "layout: R²",
    "fine": "fine structure: R²",
}


def paired(data: Dataset) -> list[tuple[int, int]]:
    """Numbers of the two images of each pair, by the labels `pair` and `side`."""
    sides: dict[Any, dict[Any, int]] = {}
    for index in range(len(data)):
        labels = data[index].labels
        if "pair" not in labels or "side" not in labels:
            raise ValueError(
                f"Pairs are told by the labels 'pair' and 'side'; sample {data[index].id!r} of {data.name} lacks them."
            )
        sides.setdefault(labels["pair"], {})[labels["side"]] = index
    return [(two[first], two[second]) for two in sides.values() if len(two) == 2 for first, second in [sorted(two)]]


def measure(options: Options) -> Result:
    from diffprobe import extract, features, load_dataset, load_model, open_store
    from diffprobe.data.images import fit_image, fit_masks
    from diffprobe.store import site_names

    model = load_model(options.model, options.device)
    data = load_dataset(options.data or f"shapes-mmvp:{options.count}?seed={options.seed}")
    names, trees, numbers_of = f"fig2_features_{data.name}_{len(data)}_{options.seed}", [], paired(data)
    for side, noise in ((0, options.seed), (1, options.seed), (0, OTHER_NOISE + options.seed)):
        out = options.work / f"{names}_{'ab'[side]}{noise}.zarr"
        sites = ("paper", LATENT) if noise == options.seed else "paper"
        # noise belongs to a sample's id: under the pair's name both images get the same
        one = Chosen(data, [two[side] for two in numbers_of], "ab"[side], lambda s: replace(s, id=f"pair-{s.labels['pair']}"))
        extract(model, one, out, sites=sites, timesteps=TIMESTEPS, conditionings=("null",), seed=noise)
        trees.append(open_store(out))
    if {tree.sizes["sample"] for tree in trees} != {len(numbers_of)}:
        raise ValueError("Some images could not be recorded; pairs need both. 'diffprobe info' on the stores says which.")
    order = [two[side] for side in (0, 1) for two in numbers_of]
    images = np.stack([np.asarray(fit_image(data[i].load(), model.size, "crop")) for i in order])
    masks = [fit_masks(data[i].masks(), model.size, "crop").any(axis=0) for i in order]

    def read(tree: xr.DataTree, site: str) -> xr.DataArray:
        return features(tree, site, conditioning="null").load()

    sites = [site for site in site_names(trees[0]) if site != LATENT]
    first, second, again = ({site: read(tree, site) for site in sites} for tree in trees)
    together = lambda a, b: xr.concat([a, b], "sample", coords="minimal", compat="override")  # noqa: E731
    maps = {site: together(first[site], second[site]) for site in sites}
    pairs = np.tile(np.arange(len(numbers_of)), 2)
    maps = {s: m.assign_coords(pair=("sample", pairs), sample=np.arange(len(pairs))) for s, m in maps.items()}
    rows: list[pd.DataFrame] = []
    for site, found in maps.items():
        rows += [pair_rows(first[site], second[site], again[site], site, options.seed)]
        rows += [outlier_rows(found, site, masks, options.seed), object_rows(found, site, masks, options.seed)]
    coarsest = min(found.sizes["y"] for found in maps.values())
    inputs = in_cells(together(*(read(tree, LATENT) for tree in trees[:2])), coarsest)
    rows += [band_rows(images, {LATENT: inputs, **maps}, coarsest, pairs, options.seed)]
    rows += [site_contrasts(second, again, maps, options.seed)]
    frame = pd.concat(rows, ignore_index=True).assign(seed=options.seed)
    config = {"store": names, "dataset": data.spec, "weights": model.weights_hash(), "timesteps": list(TIMESTEPS)}
    return Result(frame, pictures(images[: len(numbers_of)], first), config)


def in_cells(maps: xr.DataArray, cells: int) -> xr.DataArray:
    """Maps cut into cells x cells parts, all of a part's values as its channels.

    A linear map of them can average noise out as far as the part goes, so layout is not hidden from it by a narrow view.
    """
    values = maps.transpose("sample", "timestep", "channel", "y", "x").to_numpy().astype(np.float32)
    count, steps, channels, height, width = values.shape
    parts = values.reshape(count, steps, channels, cells, height // cells, cells, width // cells)
    parts = parts.transpose(0, 1, 2, 4, 6, 3, 5).reshape(count, steps, -1, cells, cells)
    dims = ("sample", "timestep", "channel", "y", "x")
    return xr.DataArray(parts, dims=dims, coords={"timestep": maps["timestep"].values})


# --- A1 -------------------------------------------------------------------------------------------


def pair_rows(first: xr.DataArray, second: xr.DataArray, again: xr.DataArray, site: str, seed: int) -> pd.DataFrame:
    """Cosines of a pair at each timestep, how much they fall from the first to the last, and how much more than the ceiling's.

    Args:
        first, second: A pair's two images under the same noise.
        again: The first image under another noise.
    """
    tables, falls = [], {}
    for measure in ("cosine", "cosine_standardised"):
        standardise = measure == "cosine_standardised"
        kinds = {measure: (again, second), "shared noise": (first, second), "ceiling": (again, first)}
        for name, (a, b) in kinds.items():
            if name == measure or not standardise:
                table = similarity(a, b, measures=measure, seed=seed)
                tables.append(table.assign(what="level", site=site, measure=name))
            ends = [cosines(*(v.sel(timestep=t) for v in (a, b)), standardise=standardise)[0] for t in ENDS]
            falls[name, standardise] = ends[0] - ends[1]
            if name == measure or not standardise:
                tables.append(pd.DataFrame([contrast(falls[name, standardise], "fall", name, site, seed)]))
        more = falls[measure, standardise] - falls["ceiling", standardise]
        tables.append(pd.DataFrame([contrast(more, "fall beyond the ceiling", measure, site, seed)]))
    return pd.concat(tables, ignore_index=True)


def site_contrasts(
    first: Mapping[str, xr.DataArray], second: Mapping[str, xr.DataArray], maps: Mapping[str, xr.DataArray], seed: int
) -> pd.DataFrame:
    """Per pair of images, the mean over timesteps of the lowest Cross-Q site's cosine less the highest other site's; and
    per image the same of the shares of outlier tokens, mean over sites, others less Cross-Q."""
    rows = []
    for standardise, measure in ((False, "cosine"), (True, "cosine_standardised")):
        by_site = {
            site: np.mean(
                [
                    cosines(first[site].sel(timestep=t), second[site].sel(timestep=t), standardise=standardise)[0]
                    for t in TIMESTEPS
                ],
                axis=0,
            )
            for site in maps
        }
        low = min((s for s in maps if s.endswith("Cross-Q")), key=lambda s: by_site[s].mean())
        high = max((s for s in maps if not s.endswith("Cross-Q")), key=lambda s: by_site[s].mean())
        rows.append(contrast(by_site[low] - by_site[high], "Cross-Q less others", measure, f"{low} less {high}", seed))
    shares = {s: outlier_tokens(f).groupby("sample", sort=False)["share"].mean().to_numpy() for s, f in maps.items()}
    others, queries = ([v for s, v in shares.items() if s.endswith("Cross-Q") is q] for q in (False, True))
    difference = np.mean(others, axis=0) - np.mean(queries, axis=0)
    groups = next(iter(maps.values()))["pair"].values
    rows.append(contrast(difference, "others less Cross-Q", "outliers", "mean of sites", seed, groups))
    return pd.DataFrame(rows)


def contrast(
    values: NDArray[np.float64], what: str, measure: str, site: str, seed: int, groups: NDArray[Any] | None = None
) -> dict[str, Any]:
    """The mean of paired differences with its interval; chance is 0."""
    low, high = bootstrap_interval(values, groups, seed=seed)
    named = {"what": what, "measure": measure, "site": site}
    return {**named, "value": float(values.mean()), "low": low, "high": high, "chance": 0.0, "n": len(values)}


# --- A2 -------------------------------------------------------------------------------------------


def outlier_rows(maps: xr.DataArray, site: str, masks: list[NDArray[np.bool_]], seed: int) -> pd.DataFrame:
    """Share of outlier tokens by timestep, and of those that touch an object and of those that do not over all timesteps.

    Chance is the share in normal noise of the same shape.
    """
    noise = np.random.default_rng(seed).normal(size=(500, *(maps.sizes[d] for d in ("channel", "y", "x"))))
    chance = outlier_tokens(xr.DataArray(noise, dims=("sample", "channel", "y", "x")))["share"].mean()
    touched = xr.DataArray(touching(masks, maps.sizes["y"]), dims=("sample", "y", "x"))
    found, rows = outlier_tokens(maps, marked=touched), []
    for timestep, part in found.groupby("timestep"):
        low, high = bootstrap_interval(part["share"], maps["pair"].values, seed=seed)
        level = {"what": "level", "measure": "outliers", "site": site, "timestep": timestep, "value": part["share"].mean()}
        rows.append({**level, "low": low, "high": high, "chance": chance, "n": len(part), "n_groups": len(part) // 2})
    by_image = found.groupby("sample", sort=False)[["n_tokens", "n_outliers", "n_marked_tokens", "n_marked"]].sum()
    on, off = by_image["n_marked"], by_image["n_outliers"] - by_image["n_marked"]
    for what, hits, tokens in (
        ("on objects", on, by_image["n_marked_tokens"]),
        ("off objects", off, by_image["n_tokens"] - by_image["n_marked_tokens"]),
    ):
        if tokens.sum() and touched.any():
            sums = np.stack([hits, tokens], axis=1).astype(float)
            row = {"what": what, "measure": "outliers", "site": site, **estimate(sums, ratio, maps["pair"].values, seed)}
            rows.append({**row, "chance": chance, "n": len(by_image), "n_groups": len(by_image) // 2})
    return pd.DataFrame(rows)


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(sums[:, 0] / sums[:, 1])


def touching(masks: list[NDArray[np.bool_]], side: int) -> NDArray[np.bool_]:
    """(image, side, side): whether a position touches an object."""
    return np.stack([mask.reshape(side, mask.shape[0] // side, side, -1).any(axis=(1, 3)) for mask in masks])


def object_rows(maps: xr.DataArray, site: str, masks: list[NDArray[np.bool_]], seed: int) -> pd.DataFrame:
    """How often a map's largest outlier token touches an object; chance is the share of positions that do.

    Registers sit where there is nothing to see.  Without masks, or without outliers, there is nothing to say: no row.
    """
    found = outlier_tokens(maps)
    side, row_of = maps.sizes["y"], {name: row for row, name in enumerate(maps["sample"].values.tolist())}
    touched = touching(masks, side)
    outliers = found[found["n_outliers"] > 0]
    at = np.array([row_of[name] for name in outliers["sample"]], np.int64)
    if not touched.any() or not len(at):
        return pd.DataFrame()
    hits = touched[at, outliers["y_max"], outliers["x_max"]].astype(float)
    row = contrast(hits, "largest on an object", "outliers", site, seed, maps["pair"].values[at])
    groups = len(np.unique(maps["pair"].values[at]))
    if hits.mean() in (0, 1):  # equal values have no bootstrap interval
        row["low"], row["high"] = wilson_interval(groups * hits.mean(), groups)
    return pd.DataFrame([{**row, "chance": touched[at].mean(), "n_groups": groups}])


# --- A3 -------------------------------------------------------------------------------------------


def bands(images: NDArray[np.uint8], coarsest: int) -> dict[str, NDArray[np.float64]]:
    """Layout (image, cells, cells, 3) and fine structure (image, 4 cells, 4 cells, 3) of images, in [0, 1]."""

    def at(side: int) -> NDArray[np.float64]:
        small = [Image.fromarray(image).resize((side, side), Image.Resampling.BOX) for image in images]
        return np.stack([np.asarray(image, np.float64) / 255 for image in small])

    layout = at(coarsest)
    return {
        "layout": layout - layout.mean(axis=(1, 2), keepdims=True),
        "fine": at(4 * coarsest) - at(2 * coarsest).repeat(2, axis=1).repeat(2, axis=2),
    }


def at_positions(band: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """A band's values that lie at each of side x side positions: (image, position, value)."""
    band = band.repeat(max(1, side // band.shape[1]), axis=1).repeat(max(1, side // band.shape[2]), axis=2)
    count, cells = len(band), band.shape[1] // side
    parts = band.reshape(count, side, cells, side, cells, 3).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(count, side * side, -1)


def band_rows(
    images: NDArray[np.uint8], maps: Mapping[str, xr.DataArray], coarsest: int, pairs: NDArray[Any], seed: int
) -> pd.DataFrame:
    """R2 of each band at each site and timestep, with the control; what each band keeps from the first timestep; and how
    much more layout a site keeps in that comparison than the first of `maps` does, the network's input."""
    wanted = bands(images, coarsest)
    folds = split_folds(np.zeros(len(images), np.int64), pairs, seed)
    other = np.random.default_rng([seed, 1]).permutation(len(images))
    rows: list[dict[str, Any]] = []
    at_input: NDArray[np.float64] | None = None
    for site, found in maps.items():
        sums: dict[str, list[NDArray[np.float64]]] = {name: [] for name in wanted}
        counts = {"site": site, "chance": 0.0, "n": len(images), "n_groups": len(np.unique(pairs))}
        for timestep in TIMESTEPS:
            block = found.sel(timestep=timestep).transpose("sample", "y", "x", "channel").to_numpy().astype(np.float64)
            x = block.reshape(len(block), -1, block.shape[-1])
            for name, band in wanted.items():
                y = at_positions(band, block.shape[1])
                sums[name].append(residuals(x, y, folds))
                control = residuals(x[other], y, folds).sum(axis=0)
                level = {"what": "level", "measure": name, "timestep": timestep, "control": float(r2(control[None])[0])}
                rows.append({**level, **estimate(sums[name][-1], r2, pairs, seed), **counts})
        ends = np.concatenate([sums[name][step] for name in ("layout", "fine") for step in (0, -1)], axis=1)
        for what, statistic in (("kept layout", kept_layout), ("kept fine", kept_fine), ("layout kept less fine", kept_more)):
            rows.append({"what": what, "measure": "bands", **estimate(ends, statistic, pairs, seed), **counts})
        at_input = ends if at_input is None else at_input
        both = np.concatenate([ends, at_input], axis=1)
        more = estimate(both, kept_beyond_input, pairs, seed)
        rows.append({"what": "more than the input", "measure": "bands", **more, **counts})
    return pd.DataFrame(rows)


def estimate(sums: NDArray[np.float64], statistic: Any, pairs: NDArray[Any], seed: int) -> dict[str, float]:
    low, high = bootstrap_sums(sums, statistic, pairs, seed=seed)
    return {"value": float(statistic(sums.sum(axis=0)[None])[0]), "low": low, "high": high}


def residuals(x: NDArray[np.float64], y: NDArray[np.float64], folds: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squared error and squared distance from the training mean of each image, as a test image once: (image, 2).

    In each of five turns three folds settle the weights, one the penalty, and the last is read with both refitted on four.
    """
    grams = []
    for fold in range(FOLDS):
        grams.append(GramRidge())
        grams[fold].update(x[folds == fold].reshape(-1, x.shape[-1]), y[folds == fold].reshape(-1, y.shape[-1]))
    found = np.empty((len(x), 2))
    for turn in range(FOLDS):
        validation = (turn + 1) % FOLDS
        train = merged([g for fold, g in enumerate(grams) if fold not in (turn, validation)])
        penalty = max(PENALTIES, key=lambda p: float(train.r2(p, grams[validation]).mean()))
        train.merge(grams[validation])
        weights, intercept = train.solve(penalty)
        test = folds == turn
        found[test, 0] = np.square(y[test] - x[test] @ weights - intercept).sum(axis=(1, 2))
        found[test, 1] = np.square(y[test] - y[~test].mean(axis=(0, 1))).sum(axis=(1, 2))
    return found


def merged(parts: list[GramRidge]) -> GramRidge:
    total = copy.deepcopy(parts[0])
    for part in parts[1:]:
        total.merge(part)
    return total


def r2(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 - sums[:, 0] / sums[:, 1])


def kept_layout(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(r2(sums[:, 2:4]) / r2(sums[:, 0:2]))


def kept_fine(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(r2(sums[:, 6:8]) / r2(sums[:, 4:6]))


def kept_more(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return kept_layout(sums) - kept_fine(sums)


def kept_beyond_input(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return kept_more(sums[:, :8]) - kept_more(sums[:, 8:])


# --- pictures and verdicts ------------------------------------------------------------------------


def pictures(images: NDArray[np.uint8], maps: Mapping[str, xr.DataArray]) -> dict[str, NDArray[Any]]:
    """The first images of the first pairs, and their principal components by site and by timestep (one basis a site)."""
    chosen = np.arange(min(len(images), SHOWN))
    found: dict[str, NDArray[Any]] = {"images": images[chosen]}
    for site, values in maps.items():
        found[f"site {site}"] = pca_rgb(values.sel(timestep=SHOWN_AT).isel(sample=chosen).astype(np.float32)).values
    site = SHOWN_SITE if SHOWN_SITE in maps else next(iter(maps))
    values = maps[site].isel(sample=chosen).astype(np.float32)
    # one basis for all; what a timestep adds everywhere is no structure
    colours = pca_rgb(values - values.mean(["sample", "y", "x"])).transpose("timestep", "sample", "y", "x", "rgb")
    found |= {f"timestep t = {timestep}": colours.sel(timestep=timestep).values for timestep in TIMESTEPS}
    return found


def judge(rows: pd.DataFrame) -> list[Claim]:
    return [*judge_cosine(rows), judge_outliers(rows), *judge_bands(rows)]


def numbers(row: Any) -> str:
    return f"{row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"


def listed(rows: pd.DataFrame) -> str:
    return "; ".join(f"{r.site} {numbers(r)}" for r in rows.itertuples())


def parts(rows: pd.DataFrame) -> list[tuple[float, float, float]]:
    return list(rows[["value", "low", "high"]].itertuples(index=False, name=None))


def judge_cosine(rows: pd.DataFrame) -> list[Claim]:
    at = lambda what, measure="cosine": rows[(rows["what"] == what) & (rows["measure"] == measure)]  # noqa: E731
    beyond, raw = at("fall beyond the ceiling"), at("fall")
    standard, across = at("fall beyond the ceiling", "cosine_standardised"), at("Cross-Q less others")
    n = f"n={int(raw['n'].iloc[0])} pairs"
    decided, p = joint(parts(beyond))
    span = f"from t={TIMESTEPS[0]} to {TIMESTEPS[-1]}"
    more = (
        f"{n}; fall {span} less that of one image under two noises: {listed(beyond)}; standardised, "
        f"{int((standard['low'] > 0).sum())} of {len(standard)} sites fall further, least {numbers(standard.loc[standard['value'].idxmin()])}"
    )
    fall = f"{n}; fall {span}: {listed(raw)}; with noise shared in a pair: {listed(at('fall', 'shared noise'))}"
    paper = reference("fig2c_pair_cosine").set_index("site")["t50"]
    queries = paper.index.str.endswith("Cross-Q")
    standard_gap = at("Cross-Q less others", "cosine_standardised").iloc[0]
    gap = (
        f"{n}; lowest Cross-Q site less highest other, mean over t: {numbers(across.iloc[0])} ({across['site'].iloc[0]}); "
        f"standardised {numbers(standard_gap)}; paper at t=50 {paper[queries].min() - paper[~queries].max():+.2f}"
    )
    return [
        Claim("A1", "a pair's cosine falls as t rises by more than noise alone takes, at every site", decided, more, p, True),
        Claim("A1", "a pair's cosine falls as t rises, at every site", joint(parts(raw))[0], fall),
        Claim("A1", "a pair's cosine is far higher at Cross-Q sites than at Out and Res-Out", joint(parts(across))[0], gap),
    ]


def judge_outliers(rows: pd.DataFrame) -> Claim:
    part = rows[rows["measure"] == "outliers"]
    across = part[part["what"] == "others less Cross-Q"].iloc[0]
    by_kind = {
        what: part[part["what"] == what].set_index("site") for what in ("off objects", "on objects", "largest on an object")
    }
    off, on, largest = by_kind.values()
    others = [site for site in off.index if not site.endswith("Cross-Q")]
    # registers are where nothing is; outliers that are the objects themselves are another thing
    registers = [
        site
        for site in others
        if off.loc[site, "low"] > off.loc[site, "chance"] and site in largest.index
        and largest.loc[site, "high"] < largest.loc[site, "chance"]
    ]  # fmt: skip
    evidence = (
        f"n={int(across['n'])} images; share of outlier tokens, Out and Res-Out less Cross-Q {numbers(across)}; off and on objects "
        + "; ".join(
            f"{site} {off.loc[site, 'value']:.4f} and {on.loc[site, 'value']:.4f} (normal noise {off.loc[site, 'chance']:.4f})"
            for site in off.index
        )
        + "".join(
            f"; the largest touches an object at {r.Index} in {r.value:.2f} [{r.low:.2f}, {r.high:.2f}], chance {r.chance:.2f}, n={r.n}"
            for r in largest.itertuples()
            if r.Index in others
        )
    )
    statement = "Out and Res-Out show register-like outlier tokens (large norms away from objects), Cross-Q does not"
    if not registers:
        return Claim(
            "A2",
            statement,
            "not testable",
            f"no such site has registers, whose largest norms lie away from objects; {evidence}",
            primary=True,
        )
    found: list[Verdict] = ["held" if site in registers else "not held" for site in others]
    decided, p = joint(parts(across.to_frame().T))
    return Claim("A2", statement, worst([decided, *found]), evidence, p, True)


def judge_bands(rows: pd.DataFrame) -> list[Claim]:
    first = rows[(rows["what"] == "level") & (rows["timestep"] == TIMESTEPS[0])].pivot(
        index="site", columns="measure", values="value"
    )
    readable = first.index[(first[["layout", "fine"]] >= READABLE).all(axis=1)]
    part = rows[rows["measure"] == "bands"].set_index(["what", "site"])
    more = part.loc["layout kept less fine"]
    shown = [site for site in more.index if site in readable]
    texts = [
        f"{site} {part.loc[('kept layout', site), 'value']:.2f} and {part.loc[('kept fine', site), 'value']:.2f}, difference {numbers(more.loc[site])}"
        for site in shown
    ]
    left = [site for site in more.index if site not in readable]
    evidence = (
        f"n={int(more['n'].iloc[0])} images, each held out once; share of R2 kept from t={TIMESTEPS[0]} to {TIMESTEPS[-1]}, layout and fine: "
        f"{'; '.join(texts) or 'none'}; not readable (R2 below {READABLE}) at t={TIMESTEPS[0]}: {', '.join(left) or 'none'}"
    )
    sites = [site for site in shown if site != LATENT]
    beyond = part.loc["more than the input"].loc[sites].reset_index()
    decided, p = joint(parts(beyond))
    statement = "high t keeps layout, low t keeps fine structure: from low to high t, fine structure loses the larger share"
    paired = f"n={int(more['n'].iloc[0])} images; that difference less the noised latent's, image by image: {listed(beyond) or 'none'}"
    return [
        Claim("A3", f"{statement}, and more so than in the noised latent", decided, paired, p if sites else None, True),
        Claim("A3", statement, joint(parts(more.loc[sites]))[0], evidence),
    ]


def draw(result: Result) -> dict[str, Figure]:
    level = result.rows[result.rows["what"] == "level"].assign(panel=lambda f: f["measure"].map(PANELS))
    paper = reference("fig2c_pair_cosine").melt("site", var_name="timestep", value_name="value")
    paper = paper.assign(
        panel="paper (SD 2.1): raw", timestep=paper["timestep"].str[1:].astype(int), low=np.nan, high=np.nan, chance=np.nan
    )
    pairs = pd.concat([paper, level[level["measure"].isin([*PANELS][:4])]], ignore_index=True)
    pairs = in_order(pairs, level["site"].unique())
    pictures = {
        name: xr.DataArray(v, dims=("sample", "y", "x", "rgb")) for name, v in result.pictures.items() if name != "images"
    }
    by = lambda kind: {n.removeprefix(kind): v for n, v in pictures.items() if n.startswith(kind)}  # noqa: E731
    images = result.pictures["images"]
    return {
        "": plot_site_curves(pairs, y_label="cosine", share_y=True, chance_name="images of other pairs"),
        "sites": plot_pca_grid(images, by("site "), title=f"Principal components by site, t = {SHOWN_AT}, no prompt"),
        "timesteps": plot_pca_grid(
            images, by("timestep "), title=f"Principal components by timestep at {SHOWN_SITE}, no prompt"
        ),
        "outliers": plot_site_curves(
            level[level["measure"] == "outliers"], y_label="share of tokens", chance_name="normal noise", width=4.5
        ),
        "bands": plot_site_curves(
            level[level["measure"].isin(["layout", "fine"])],
            y_label="R² on held-out pairs",
            columns=2,
            chance_name="training mean",
        ),
    }


EXPERIMENT = Experiment(
    name="fig2_features",
    title="Features by site and noise: pair cosine, outlier tokens, what survives of layout and fine structure",
    count=135,
    smoke_count=12,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Mean cosine of the features of two images that differ in one thing, by timestep and site: the paper's curves; ours with noise of their own, with shared noise, and of one image under two noises; ours standardised; each with that of unrelated images.",
        "sites": "Images in rows; columns show the first three principal components of the features of the six sites as colours.",
        "timesteps": "Images in rows; columns show the first three principal components of one site's features at five timesteps as colours.",
        "outliers": "Share of positions with an outlying norm by timestep and site, with that of normal noise.",
        "bands": "How well layout and fine structure of the image are read from the features by a linear map, by timestep and site, beside the noised latent.",
    },
    reference="fig2c_pair_cosine",
)

if __name__ == "__main__":
    EXPERIMENT.main()
