"""What `diffprobe plot` draws: opens a store or a table, finds the images, and hands arrays to `plotting`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from diffprobe import plotting
from diffprobe.data import load_dataset
from diffprobe.data.images import fit_image
from diffprobe.probes.pca import pca_rgb
from diffprobe.store import StoreError, attention_maps, features, open_store, prompt_texts, provenance, site_names

Choose = Callable[[xr.DataTree], list[int]]
_SMALL_WORDS = frozenset(["a", "an", "the", "of", "and", "at", "in", "on", "to", "is", "with", "there", "picture"])


def open_with_images(store: str, data: str, choose: Choose) -> tuple[xr.DataTree, NDArray[np.uint8], list[int], list[str]]:
    """The store, the chosen samples' images as the model saw them, their positions, and their ids."""
    tree = open_store(store)
    if tree.sizes["sample"] == 0:
        raise StoreError(f"{store} has no complete sample yet; run its extract command again to go on.")
    rows = choose(tree)
    everyone = tree.dataset["sample"].values
    ids = [str(everyone[row]) for row in rows]
    request = provenance(tree)["request"]
    dataset = load_dataset(data or provenance(tree)["data"])
    wanted, images = set(ids), {}
    for index in range(len(dataset)):
        sample = dataset[index]
        if sample.id in wanted:
            images[sample.id] = np.asarray(fit_image(sample.load(), tuple(request["resolution"]), request["fit"]))
        if len(images) == len(wanted):
            break
    if missing := wanted - set(images):
        raise StoreError(
            f"The dataset {data or provenance(tree)['data']!r} has no sample {sorted(missing)[0]!r}; give the one that was extracted with --data."
        )
    return tree, np.stack([images[name] for name in ids]), rows, ids


def _timestep(tree: xr.DataTree, timestep: int | None) -> int:
    return int(provenance(tree)["request"]["timesteps"][0]) if timestep is None else timestep


def _save(figure: Any, out: Path, name: str, frame: pd.DataFrame, config: Mapping[str, Any], alt: str) -> Path:
    """Writes the figure of a store or a table, unless that name is a picture of something else."""
    kept, source = out / f"{name}.json", _source(config)
    if kept.is_file():
        was = _source(json.loads(kept.read_text(encoding="utf-8")).get("config", {}))
        if Path(was).resolve() != Path(source).resolve():
            raise ValueError(
                f"{out / name}.png shows {was or 'something else'}; choose another --name or --out for the picture of {source}."
            )
    return plotting.save_figure(figure, out, name, frame, config, alt)["png"]


def _source(config: Mapping[str, Any]) -> str:
    return str(config.get("store", config.get("table", "")))


def _origin(tree: xr.DataTree, store: str) -> dict[str, Any]:
    request = provenance(tree)["request"]
    return {
        "store": store,
        "model": request["model"],
        "data": request["dataset"],
        "seed": request["seed"],
        "commit": provenance(tree).get("commit"),
    }


def pca_figure(
    store: str, data: str, sites: Sequence[str], timestep: int | None, conditioning: str, choose: Choose, out: Path, name: str
) -> Path:
    """Principal components of each site's features as colours; the basis is shared by the shown samples.

    Returns:
        The PNG's path; PDF, CSV and JSON lie beside it.
    """
    tree, images, rows, ids = open_with_images(store, data, choose)
    timestep = _timestep(tree, timestep)
    grids = {}
    for site in sites or [n for n in site_names(tree) if "features" in tree[n].data_vars]:
        values = features(tree, site, timestep=timestep, conditioning=conditioning)
        if {"y", "x"} <= set(values.dims):
            grids[str(values.attrs["site"])] = pca_rgb(values.isel(sample=rows).astype(np.float32).load())
    if not grids:
        raise StoreError("No site of this store has a (y, x) grid to draw; record one with --reduce none or grid:HxW.")
    figure = plotting.plot_pca_grid(
        images, grids, title=f"Principal components as red, green, blue; timestep {timestep}, {conditioning}"
    )
    frame = pd.concat(
        [g.rename("value").to_dataframe().reset_index().assign(site=s) for s, g in grids.items()], ignore_index=True
    )
    kept = [c for c in ("site", "sample", "y", "x", "rgb", "value") if c in frame]
    alt = f"{len(ids)} images and, for each of {len(grids)} sites, the first three principal components of its features as colours."
    config = {**_origin(tree, store), "samples": ids, "timestep": timestep, "conditioning": conditioning}
    return _save(figure, out, name or f"{Path(store).name}.pca", frame[kept], config, alt)


def words_of(text: str) -> list[str]:
    """The words of a prompt worth a heat map, each once.

    >>> words_of("a red star left of a blue star")
    ['red', 'star', 'left', 'blue']
    """
    return [w for w in dict.fromkeys(re.findall(r"\w+", text)) if w.lower() not in _SMALL_WORDS]


def heatmap_figures(
    store: str,
    data: str,
    words: Sequence[str],
    sites: Sequence[str],
    timestep: int | None,
    conditioning: str,
    choose: Choose,
    out: Path,
    name: str,
) -> list[Path]:
    """One strip a sample: the image, then each word's cross-attention over it."""
    tree, images, rows, ids = open_with_images(store, data, choose)
    timestep = _timestep(tree, timestep)
    prompts = prompt_texts(tree, conditioning)["text"].values
    paths = []
    for number, (row, sample_id) in enumerate(zip(rows, ids, strict=True)):
        text = str(prompts[row])
        one = xr.DataTree.from_dict(
            {p: d.to_dataset(inherit=False).isel(sample=[row], missing_dims="ignore") for p, d in tree.subtree_with_keys}
        )
        one.attrs = tree.attrs
        shown = [w for w in words if re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE)] if words else words_of(text)
        if not shown:
            continue
        maps = [
            attention_maps(one, w, site=list(sites) or None, conditioning=conditioning, timestep=timestep).isel(
                sample=0, timestep=0, drop=True
            )
            for w in shown
        ]
        stacked = xr.concat(maps, pd.Index(shown, name="word"), coords="minimal", compat="override")
        figure = plotting.plot_heatmaps(images[number], stacked, title=f"“{text}”   timestep {timestep}")
        frame = stacked.rename("attention").to_dataframe().reset_index()[["word", "y", "x", "attention"]]
        alt = f"The image of “{text}” and the cross-attention of the words {', '.join(shown)} laid over it."
        stem = name or f"{Path(store).name}.heatmaps"
        config = {**_origin(tree, store), "sample": sample_id, "timestep": timestep, "sites": list(sites), "words": shown}
        paths.append(_save(figure, out, stem if len(ids) == 1 else f"{stem}_{number + 1}", frame, config, alt))
    if not paths:
        raise StoreError(f"None of the chosen samples' prompts has any of the words {', '.join(words)}.")
    return paths


def _table(path: str, kind: str) -> tuple[pd.DataFrame, str]:
    """The rows of a table, at a path or a URL, and the name of its pictures."""
    try:
        return plotting.read_rows(path), PurePosixPath(path).stem
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"No table at {path}; 'diffprobe probe {kind} STORE' writes one.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no table: {error}.") from error


def probe_figures(table: str, out: Path, name: str) -> list[Path]:
    """A site x timestep grid of scores, and curves with intervals, from a table of `diffprobe probe linear`."""
    frame, stem = _table(table, "linear")
    alt = f"Scores of {len(frame)} probes by site and timestep, with chance marked."
    drawn = {"": plotting.plot_probe_grid(frame), "_curves": plotting.plot_probe_curves(frame)}
    return [_save(figure, out, f"{name or stem}{suffix}", frame, {"table": table}, alt) for suffix, figure in drawn.items()]


def localization_figures(table: str, score: str, out: Path, name: str) -> list[Path]:
    """By site and timestep, against controls and chance, and by head, from a table of `diffprobe probe localization`."""
    frame, stem = _table(table, "localization")
    drawn = plotting.localization_figures(frame, score)
    alt = "Localization scores of maps against masks ({}) with controls, intervals and chance."
    return [
        _save(figure, out, f"{name or stem}_{suffix}", frame, {"table": table}, alt.format(suffix.replace("_", ", ")))
        for suffix, figure in drawn.items()
    ]


RESULTS = ("value", "low", "high", "chance", "excess", "excess_low", "excess_high", "n", "n_groups", "seed", "reason")


def similarity_figure(table: str, measure: str, out: Path, name: str) -> Path:
    """From a table of `diffprobe probe similarity`: matrices where timesteps or sites are compared two by two, else curves.

    Returns:
        The PNG's path; PDF, CSV and JSON lie beside it.
    """
    frame, stem = _table(table, "similarity")
    if absent := {"measure", "value"} - set(frame):
        raise ValueError(f"{table} is no table of similarities: it has no column {', '.join(sorted(absent))}.")
    if measure and measure not in set(frame["measure"]):
        raise ValueError(f"{table} has no rows of {measure!r}; it has {', '.join(dict.fromkeys(frame['measure']))}.")
    frame = frame[frame["measure"] == (measure or frame["measure"].iloc[0])]
    same = "site" in frame  # two stores may share a site's name, two sites of one store do not
    between = "timestep" if "timestep_a" in frame else "site" if "site_a" in frame and not same else None
    if not between and "site_a" in frame:
        frame = frame.assign(**{side: frame[side].where(frame[side].ne(""), frame["site"]) for side in ("site_a", "site_b")})
        frame = frame.assign(site=frame.pop("site_a"))
    x = "guidance" if "guidance" in frame else "timestep"
    taken = {*RESULTS, *((f"{between}_a", f"{between}_b") if between else ("site", x))}
    keys = [str(c) for c in frame if c not in taken and (c == "measure" or frame[c].nunique() > 1)]
    words = [frame[c].map("t = {}".format) if c == "timestep" else frame[c].astype(str) for c in keys]
    frame = frame.assign(panel=pd.concat(words, axis=1).agg(", ".join, axis=1))
    if between:
        figure = plotting.plot_similarity_matrix(frame, between)
    else:
        label = {"guidance": "guidance s"}.get(x, "timestep (noise grows to the right)")
        figure = plotting.plot_site_curves(frame, x=x, x_label=label, y_label="similarity", share_y=True)
    alt = (
        f"Similarity of features ({', '.join(dict.fromkeys(frame['measure']))}) by site, {len(frame)} comparisons, with chance."
    )
    return _save(figure, out, name or stem, frame, {"table": table}, alt)
