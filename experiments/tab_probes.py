"""What can be read off the features by a linear map: where, at which noise, and how much of it the prompt wrote.

Labels: colour and shape of scenes with one object, the number of objects, and the relation of two ("left of", ...; which of
the two is named first is not in the image, so an image alone allows at most about one half).  Features are averaged over
places; for the relation over each cell of a 3 x 3 grid.  Every fold is the test fold once, so every scene is scored by a
probe that never saw it, and differences are paired by scene.  The paper's six sites x its five timesteps x the prompts
null, caption and mismatched; beside them the same network with random weights, its input (the noised latent), a CLIP
and a vision transformer that was trained on pictures alone.  At t = 50 also: the class of each patch (shape or background); colour and shape from the mean over
the object's own cells, since a mean over all places is mostly background; and the bits that a label costs once the features are
known (online codelength), which says how soon a label is read.  All blocks' outputs x all timesteps, from one noise and from the
mean of eight, show where else a label lies.

The paper has one table near to this (its Table 1: a whole language model trained on one site's features; the best site is
U-L1-R1-B0-Cross-Q at t = 50, and t = 500 collapses).  Claims of our own:

P1 training shows: the trained network's features beat those of the same network with random weights.
P2 a wrong prompt hides the image: the mismatched caption lowers the accuracy of the image's colour and shape.
P3 the prompt is written into the features: its colour and shape can be read where the image has others.
P4 the paper's best site is the best here too.    P5 its features hold less at t = 500 than at t = 50.

    python -m experiments.tab_probes            # 2,000 scenes: some hours of one core
    python -m experiments.tab_probes --smoke
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffprobe.figures import plot_probe_grid
from diffprobe.plotting import OLD_COLUMNS
from diffprobe.probes.codelength import label_bits
from diffprobe.probes.labels import with_mask_labels
from diffprobe.probes.linear import fit_probe
from diffprobe.sites import LATENT
from diffprobe.stats import bootstrap_interval
from diffprobe.store import features, open_store, site_names
from experiments.figures import plot_block_grid, plot_probe_bars, plot_probe_differences
from experiments.framework import Claim, Experiment, Options, Result, joint

TIMESTEPS = (10, 50, 100, 250, 500)
CONDITIONINGS = ("null", "caption", "mismatched")
PENALTIES = (10.0, 100.0, 1000.0)
SETS = {("colour", "shape"): "&objects=1", ("n_objects",): "", ("relation",): "&objects=2"}
BEST_SITE, BEST_TIMESTEP, LATE_TIMESTEP = "U-L1-R1-B0-Cross-Q", 50, 500
GRID = 3
ENSEMBLE = 8  # noises of the heat maps over all blocks
RANDOM, INPUT = "random weights", "noised latent"
TOWERS = ("shapes-clip", "shapes-vit")  # encoders without noise or text


# --- measuring ------------------------------------------------------------------------------------


def measure(options: Options) -> Result:
    """Record every encoder's features, probe every cell, and compare encoders and prompts scene by scene."""
    from diffprobe.encoders import load_extractor
    from diffprobe.models import EMBEDDED

    encoders: dict[str, Any] = {
        options.model: load_extractor(options.model, options.device),
        RANDOM: load_extractor(options.model, options.device, random_weights=options.seed),
    }
    encoders |= {name: load_extractor(name, options.device) for name in TOWERS if (EMBEDDED / name).is_dir()}
    specs = {labels: f"shapes:{options.count}?split=test{objects}" for labels, objects in SETS.items()}
    if options.data:
        specs = {tuple(name for labels in SETS for name in labels): options.data}
    cells: list[pd.DataFrame] = []
    for labels, spec in specs.items():
        for encoder, model in encoders.items():
            tree = _record(options, encoder, model, spec)
            cells += [_probe(tree, encoder, label, options) for label in labels if label in tree.coords]
            if encoder == options.model:
                cells += [
                    _probe_prompt(tree, encoder, label, options)
                    for label in labels
                    if label in ("colour", "shape") and label in tree.coords
                ]
            if "n_objects" in labels and "n_objects" in tree.coords:  # drawn scenes, whose masks are known
                cells.append(_probe_patches(tree, encoder, options))
            if "colour" in labels and "colour" in tree.coords and not options.data:
                cells += [_probe_objects(tree, spec, encoder, label, options) for label in labels]
        cells += [_probe_blocks(encoders[options.model], spec, labels, draws, options) for draws in (1, ENSEMBLE)]
    table = pd.concat(cells, ignore_index=True)
    rows = pd.concat([table.drop(columns="rows"), _comparisons(table, options)], ignore_index=True)
    weights = encoders[options.model].weights_hash()
    return Result(
        rows, config={"weights": weights, "penalties": PENALTIES, "grid": GRID, "split": "test", "cross_fit": not options.smoke}
    )


def _probe_objects(tree: xr.DataTree, spec: str, encoder: str, label: str, options: Options) -> pd.DataFrame:
    """Colour or shape from the mean over the object's own cells, at one timestep, without a prompt."""
    from diffprobe.data import load_dataset
    from diffprobe.data.images import fit_masks
    from diffprobe.store import provenance

    data, frames = load_dataset(spec), []
    size = tuple(provenance(tree)["request"]["resolution"])
    masks = np.stack([fit_masks(data[k].masks(), size, "crop").any(axis=0) for k in range(len(data))]).astype(np.float32)
    for site in site_names(tree):
        step = 0 if encoder in TOWERS else BEST_TIMESTEP
        found = features(tree, site, timestep=[step], conditioning=["null"]).astype(np.float32).load()
        height, width = found.sizes["y"], found.sizes["x"]
        share = masks.reshape(len(masks), height, size[0] // height, width, -1).mean(axis=(2, 4))
        weights = xr.DataArray(share, dims=("sample", "y", "x")) / share.sum(axis=(1, 2))[:, None, None]
        pooled = (found * weights).sum(["y", "x"]).expand_dims(y=1, x=1).transpose("sample", ..., "channel", "y", "x")
        frames.append(_fit(encoder, "object", pooled.assign_attrs(found.attrs), label, options, pool="flatten"))
    return pd.concat(frames)


def _probe_blocks(model: Any, spec: str, labels: tuple[str, ...], draws: int, options: Options) -> pd.DataFrame:
    """Every block's output at every timestep without a prompt, from one noise or the mean of several."""
    from diffprobe.data import load_dataset
    from diffprobe.extraction import extract

    data, frames = load_dataset(spec), []
    out = options.work / f"tab_probes_blocks{draws}_{data.name}_{len(data)}.zarr"
    steps = (BEST_TIMESTEP,) if options.smoke else TIMESTEPS
    kept = {
        "noise_draws": 1 if options.smoke else draws,
        "reduce": f"grid:{GRID}x{GRID}",
        "progress": False,
        "seed": options.seed,
    }
    extract(model, data, out, sites=["*-B0-Out", "*-Res-Out"], timesteps=steps, conditionings=("null",), **kept)
    tree = open_store(out)
    for site in site_names(tree):
        found = features(tree, site)
        for label in [name for name in labels if name in tree.coords]:
            frame = _fit(options.model, "blocks", _pooled(found, label), label, options, pool="flatten")
            frames.append(frame.assign(what=f"{draws} noise{'s' * (draws > 1)}"))
    return pd.concat(frames, ignore_index=True)


def _bits(found: xr.DataArray, label: str, encoder: str, site: str, options: Options) -> dict[str, Any]:
    """Bits a scene that a label costs at one timestep without a prompt; chance is the even code."""
    step = BEST_TIMESTEP if BEST_TIMESTEP in found["timestep"].values else found["timestep"].values[0]
    x = found.sel(timestep=step, conditioning="null").transpose("sample", ...).to_numpy()
    labels = found[label].values
    bits = label_bits(x.reshape(len(x), -1), labels, seed=options.seed)
    place = {"kind": "codelength", "label": label, "encoder": encoder, "site": site, "timestep": int(step), "score": "bits"}
    return {**place, **_mean(bits, options), "chance": float(np.log2(len(np.unique(labels)))), "seed": options.seed}


def _record(options: Options, encoder: str, model: Any, spec: str) -> xr.DataTree:
    from diffprobe.data import load_dataset
    from diffprobe.extraction import extract

    dataset = load_dataset(spec)
    out = options.work / f"tab_probes_{encoder.replace('/', '-').replace(' ', '-')}_{dataset.name}_{len(dataset)}.zarr"
    extract(
        model,
        dataset,
        out,
        sites=["paper"] if encoder in (RANDOM, *TOWERS) else [LATENT, "paper"],
        timesteps=(BEST_TIMESTEP,) if options.smoke else TIMESTEPS,
        conditionings=("null",) if encoder == RANDOM else CONDITIONINGS,
        seed=options.seed,
        batch_rows=8 if options.smoke else None,  # timing batches would take longer than the work
        progress=False,
    )
    return open_store(out)


def _fit(encoder: str, kind: str, found: xr.DataArray, label: Any, options: Options, **more: Any) -> pd.DataFrame:
    settings = {"penalties": PENALTIES, "seed": options.seed, "cross_fit": not options.smoke, "keep_rows": True}
    frame = fit_probe(found, label, n_jobs=1 if options.smoke else 2, **{**settings, **more}).table
    site = found.attrs["site"]
    return frame.assign(kind=kind, encoder=INPUT if site == LATENT else encoder, site=site)


def _probe(tree: xr.DataTree, encoder: str, label: str, options: Options) -> pd.DataFrame:
    """Every site, timestep and prompt; the network's input does not know the prompt."""
    frames = []
    for site in site_names(tree):
        found = features(tree, site, conditioning=["null"] if site == LATENT else None)
        pooled = _pooled(found, label)
        frames.append(_fit(encoder, "probe", pooled, label, options, pool="flatten"))
        bits = _bits(pooled, label, INPUT if site == LATENT else encoder, site, options)
        frames.append(pd.DataFrame([bits]))
    return pd.concat(frames)


def _pooled(found: xr.DataArray, label: str) -> xr.DataArray:
    """(..., channel, y, x) averaged over all places, or over the cells of a grid where it matters which place is where."""
    found = found.astype(np.float32)
    cells = GRID if label == "relation" else 1
    for axis in ("y", "x"):
        parts = np.array_split(np.arange(found.sizes[axis]), cells)
        found = xr.concat([found.isel({axis: part}).mean(axis, keep_attrs=True) for part in parts], axis)
    return found.compute()


def _probe_prompt(tree: xr.DataTree, encoder: str, label: str, options: Options) -> pd.DataFrame:
    """The label of the scene that the mismatched caption was taken from, read with that caption and with none."""
    prompts = tree["prompts"].to_dataset()
    text = {str(c): prompts["text"].values[:, i].tolist() for i, c in enumerate(prompts["conditioning"].values)}
    said = dict(zip(text["caption"], tree[label].values.tolist(), strict=True))
    fed = xr.DataArray([said[t] for t in text["mismatched"]], dims="sample", name=f"{label} of the prompt")
    frames = []
    for site in site_names(tree):
        if site != LATENT:
            found = features(tree, site, timestep=BEST_TIMESTEP, conditioning=["null", "mismatched"])
            frames.append(_fit(encoder, "prompt", _pooled(found, label), fed, options, pool="flatten"))
    return pd.concat(frames)


def _probe_patches(tree: xr.DataTree, encoder: str, options: Options) -> pd.DataFrame:
    """Which shape covers each patch, at one timestep, without a prompt."""
    frames = []
    for site in site_names(tree):
        step = 0 if encoder in TOWERS else BEST_TIMESTEP
        found = features(tree, site, timestep=[step], conditioning=["null"])
        found = with_mask_labels(found, tree, "mask:shape")
        more = {"pool": "patches", "cross_fit": False, "penalties": PENALTIES[1:2]}
        frames.append(_fit(encoder, "patches", found, "mask:shape", options, **more))
    return pd.concat(frames)


# --- comparing scene by scene ---------------------------------------------------------------------


def held_out_best(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best cell's scores (scene,), where the cell is chosen on the other half of the scenes.

    Choosing and scoring on the same scenes would flatter whoever has most cells to choose from.

    >>> held_out_best(np.array([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    odd = np.arange(scores.shape[1]) % 2 == 1
    chosen = np.empty(scores.shape[1])
    for half in (odd, ~odd):
        chosen[half] = scores[scores[:, ~half].mean(axis=1).argmax()][half]
    return chosen


def _comparisons(table: pd.DataFrame, options: Options) -> pd.DataFrame:
    """Rows of kind "best" (each encoder's best cell) and "difference" (paired by scene)."""
    probes = table[table["kind"] == "probe"]
    null = probes[probes["conditioning"] == "null"]
    rows: list[dict[str, Any]] = []
    for (label, encoder), cells in null.groupby(["label", "encoder"], sort=False):
        place = cells.iloc[int(cells["value"].to_numpy().argmax())]
        kept = {k: place[k] for k in ("site", "timestep", "chance", "control_value", "score", "n_classes", "seed")}
        rows.append(
            {
                "kind": "best",
                "label": label,
                "encoder": encoder,
                **kept,
                **_mean(held_out_best(np.stack(cells["rows"])), options),
            }
        )
    trained = null[null["encoder"] == options.model]
    for label, cells in trained.groupby("label", sort=False):
        other = null[(null["label"] == label) & (null["encoder"] == RANDOM)]
        gain = held_out_best(np.stack(cells["rows"])) - held_out_best(np.stack(other["rows"]))
        rows.append(_difference("P1", str(label), "", gain, options))
        paper = (cells["site"] == BEST_SITE) & (cells["timestep"] == BEST_TIMESTEP)
        late = (cells["site"] == BEST_SITE) & (cells["timestep"] == LATE_TIMESTEP)
        if paper.any():
            here = cells[paper]["rows"].iloc[0]
            rows.append(_difference("P4", str(label), "", here - held_out_best(np.stack(cells[~paper]["rows"])), options))
            if late.any():
                rows.append(_difference("P5", str(label), "", here - cells[late]["rows"].iloc[0], options))
    keys = ["label", "site", "timestep"]
    wide = probes[probes["encoder"] == options.model].pivot(index=keys, columns="conditioning", values="rows")
    for prompt in [c for c in CONDITIONINGS[1:] if c in wide]:
        both = wide.dropna()
        rows += _by_site(f"{prompt} - null", both[prompt] - both["null"], options)
    fed = table[table["kind"] == "prompt"].pivot(index=["label", "site"], columns="conditioning", values="rows")
    if len(fed):
        rows += _by_site("prompt read", fed["mismatched"] - fed["null"], options)
    return pd.DataFrame(rows)


def _by_site(what: str, differences: pd.Series[Any], options: Options) -> list[dict[str, Any]]:
    """For each label the mean difference at every site, and over all sites (site "all"), both over timesteps."""
    rows = []
    for label, cells in differences.groupby("label", sort=False):
        for site, some in [*cells.groupby("site", sort=False), ("all", cells)]:
            rows.append(_difference(what, str(label), str(site), np.mean(np.stack(list(some)), axis=0), options))
    return rows


def _difference(what: str, label: str, site: str, values: NDArray[np.float64], options: Options) -> dict[str, Any]:
    found = {"kind": "difference", "what": what, "label": label, "site": site, "seed": options.seed}
    return {**found, **_mean(values, options)}


def _mean(values: NDArray[np.float64], options: Options) -> dict[str, Any]:
    low, high = bootstrap_interval(values, seed=options.seed)
    return {"value": float(values.mean()), "low": low, "high": high, "n_test": len(values)}


# --- judging and drawing --------------------------------------------------------------------------

STATEMENTS = {
    "P1": "The trained network's best cell beats the best cell of the same network with random weights.",
    "P2": "A mismatched caption lowers the accuracy with which the image's colour and shape are read (mean over sites and timesteps).",
    "P3": f"The mismatched caption's colour and shape can be read from the features at t = {BEST_TIMESTEP} (mean over sites, against no prompt).",
    "P4": f"{BEST_SITE} at t = {BEST_TIMESTEP} is the best cell (the best of the paper's Table 1: MMVP 22.7).",
    "P5": f"{BEST_SITE} holds less at t = {LATE_TIMESTEP} than at t = {BEST_TIMESTEP} (paper's Table 1: MMVP 12.7 against 22.7).",
}


def judge(rows: pd.DataFrame) -> list[Claim]:
    """P1 to P5.  A claim holds where it holds for every label, and fails where it fails for one."""
    differences = rows[rows["kind"] == "difference"]
    objects = differences["label"].str.startswith(("colour", "shape"))
    lines = {
        "P1": differences[differences["what"] == "P1"],
        "P2": differences[(differences["what"] == "mismatched - null") & (differences["site"] == "all") & objects],
        "P3": differences[(differences["what"] == "prompt read") & (differences["site"] == "all") & objects],
        "P4": differences[differences["what"] == "P4"],
        "P5": differences[differences["what"] == "P5"],
    }
    claims = []
    for name, found in lines.items():
        if found.empty:
            continue
        ends = ["value", "high", "low"] if name == "P2" else ["value", "low", "high"]
        sign = -1 if name == "P2" else 1
        decided, p = joint([(a, b, c) for a, b, c in (sign * found[ends]).itertuples(index=False, name=None)])
        numbers = [
            f"{r['label']} {r['value']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}], n {r['n_test']:.0f}"
            for _, r in found.iterrows()
        ]
        claims.append(Claim(name, STATEMENTS[name], decided, "paired difference in accuracy: " + "; ".join(numbers), p, True))
    return claims


def draw(result: Result) -> dict[str, Figure]:
    """Best of each encoder; every cell without a prompt; what a prompt changes."""
    rows = result.rows
    cells = rows[(rows["kind"] == "probe") & (rows["conditioning"] == "null") & ~rows["encoder"].isin([RANDOM, *TOWERS])]
    best = rows[rows["kind"] == "best"]
    return {
        "": plot_probe_bars(best.sort_values("encoder", key=lambda e: e.isin([RANDOM, INPUT, *TOWERS]), kind="stable")),
        "cells": plot_probe_grid(cells.astype({"timestep": int})),
        "patches": plot_probe_bars(_overlap(rows[rows["kind"] == "patches"]), name="mean IoU"),
        **({"blocks": plot_block_grid(blocks)} if len(blocks := rows[rows["kind"] == "blocks"]) else {}),
        "text": plot_probe_differences(rows[(rows["kind"] == "difference") & (rows["site"] != "") & rows["site"].notna()]),
    }


def _overlap(patches: pd.DataFrame) -> pd.DataFrame:
    """Mean IoU a site; who calls everything background gets the background's share in one class and nothing in the others."""
    shown = {"value": "miou", "low": "miou_low", "high": "miou_high", "chance": "miou_chance"}
    patches = patches.rename(columns=OLD_COLUMNS)
    return patches.assign(label=patches["site"], control_value=np.nan, **{k: patches[v] for k, v in shown.items()})


EXPERIMENT = Experiment(
    name="tab_probes",
    title="What linear probes read off each site, timestep and prompt, beside random weights, the input, CLIP and a ViT",
    count=2000,
    smoke_count=20,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Bars with intervals: for each label the accuracy of each encoder's best cell, chance and control marked.",
        "cells": "Heat maps of site by timestep for each label without a prompt, the control task beside them.",
        "patches": "Bars with intervals: mean IoU of the class of each patch at each site; the level of calling all background is marked.",
        "blocks": "Heat maps of block by timestep for each label without a prompt, from one noise and from the mean of eight.",
        "text": "Dots with intervals: how much a caption, right or mismatched, changes the accuracy of each label at each site.",
    },
    reference="table1_diffusion_only",
    needs={"P": ("main colour", "main shape")},
)

if __name__ == "__main__":
    EXPERIMENT.main()
