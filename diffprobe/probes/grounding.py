"""Scores a store's maps against the regions that the words of a text name.

Two kinds of maps: cross-attention of a caption's words (claim A4 of the paper), and the difference |f_c - f_u| that a text
makes in the features (claim A5).  Both give tables of `diffprobe.probes.localization`, one line per site, timestep, map
and score.

The invariant: a word is scored only where the dataset says which objects it means; words that are left out are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from diffprobe.conditioning import NULL, prompt_for
from diffprobe.data import load_dataset
from diffprobe.data.images import fit_masks
from diffprobe.data.samples import Caption, Dataset, Sample, Span, iterate
from diffprobe.probes.localization import enlarge, localization_score, with_holm
from diffprobe.store import (
    NO_WORD_MAPS,
    StoreError,
    features,
    known,
    prompt_texts,
    provenance,
    read_maps,
    site_names,
    word_sites,
)

Bools = NDArray[np.bool_]

MOST_PIXELS = 128  # side of the grid of the scores: attention maps have at most 64, so a finer grid adds nothing
_BLOCK = 64  # samples read at once


@dataclass(frozen=True)
class Target:
    """A word of one sample's text, with all its occurrences, and the region that it names."""

    sample: int  # row of the store
    word: str
    label: str  # class, for averages
    role: str
    spans: tuple[tuple[int, int], ...]  # characters of the text
    objects: tuple[int, ...]
    mask: Bools


# --- cross-attention of words ---------------------------------------------------------------------------


def attention_localization(
    tree: xr.DataTree,
    dataset: Dataset | str | None = None,
    *,
    conditioning: str = "caption",
    sites: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    roles: Sequence[str] = ("noun",),
    by_head: bool = False,
    merged: bool = True,
    against_timestep: int | None = None,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    keep_rows: bool = False,
) -> pd.DataFrame:
    """Scores the cross-attention of a caption's words against the masks of the objects that they name.

    Sub-tokens are averaged.  Controls beside those of `localization_score`: "wrong word", the map of a word of the same
    text that names other objects, and "start token".

    Args:
        tree: From `open_store`, with cross-attention maps.
        dataset: The extracted dataset, or its spec; by default the one that the store names.
        conditioning: A conditioning by captions of the sample: "caption", "caption:STYLE" or "caption:N".
        sites: Map sites; all by default.
        timesteps: All by default.
        roles: Roles of words: noun, colour, phrase, background.  Each has its own lines.
        by_head: Score each head beside the mean over heads.
        merged: Add the site "all sites": head means enlarged to the finest grid and averaged over sites.
        against_timestep: Add the control "timestep N", the word's own map at that timestep; `lead` is then the gain over
            that timestep, paired by word.
        grid: (height, width) of the scores; by default the images' resolution, at most `MOST_PIXELS` a side.
        seed, n_resamples, keep_rows: As in `localization_score`.

    Returns:
        As `localization_score`, with the columns role, conditioning, site, timestep and head ("mean", "0", ...) in
        front.  `attrs["left_out"]` counts the words that could not be scored, by reason.

    Raises:
        StoreError: there are no such maps, the dataset lacks samples, or the texts are not its captions.
        ValueError: no word of these roles has a mask.
    """
    there = word_sites(tree)
    if not there:
        raise StoreError(NO_WORD_MAPS.format("This store"))
    names = [known(name, there, "map site") for name in sites or there]
    steps = _timesteps(tree, names[0], timesteps)
    every_word, left_out = _words(tree, dataset, conditioning, roles, grid or _grid(tree))
    targets, wanted, starts = _map_rows(tree, conditioning, every_word)
    left_out["word cut off the prompt"] += len(every_word) - len(targets)
    if not targets:
        why = (
            ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n) or "no caption says which objects its words name"
        )
        raise ValueError(
            f"No word of the role {' or '.join(roles)} can be scored: {why}. Choose other roles, or data with masks."
        )
    extra = [] if against_timestep is None else _timesteps(tree, names[0], [against_timestep])
    every = list(dict.fromkeys([*steps, *extra]))
    maps = {name: read_maps(tree, name, wanted, conditioning, every, heads="each" if by_head else "mean") for name in names}
    if merged and len(maps) > 1:
        maps["all sites"] = _average([m.sel(head=["mean"]) for m in maps.values()])
    wrong = _wrong_words(targets)
    groups = _groups(tree)
    frames = []
    for role in roles:
        mine = [k for k, target in enumerate(targets) if target.role == role]
        if not mine:
            continue
        chosen = [targets[k] for k in mine]
        order, place = _in_front(mine, len(wanted))
        controls: dict[str, Sequence[int]] = {
            "wrong word": [place.get(wrong[k], -1) for k in mine],
            "start token": [place.get(starts.get(t.sample, -1), -1) for t in chosen],
        }
        if against_timestep is not None:
            controls[f"timestep {against_timestep}"] = range(len(order), len(order) + len(mine))
        for name, found in maps.items():
            ordered = found.isel(row=order).sel(timestep=steps)
            if against_timestep is not None:
                again = found.isel(row=mine).sel(timestep=[against_timestep] * len(steps))
                ordered = xr.concat([ordered, again.assign_coords(timestep=ordered["timestep"])], "row")
            options: dict[str, Any] = {"seed": seed, "n_resamples": n_resamples, "keep_rows": keep_rows}
            frame = _score(ordered, chosen, controls, groups, **options)
            frames.append(frame.assign(role=role, conditioning=conditioning, site=name))
    return _tidy(frames, ["role", "conditioning", "site", "timestep", "head"], left_out)


def _score(
    maps: xr.DataArray, targets: Sequence[Target], controls: Mapping[str, Sequence[int]], groups: Sequence[str], **options: Any
) -> pd.DataFrame:
    """`localization_score` of maps (row, ...) whose first rows are those of the targets; `groups` has one id per sample."""
    classes, images = [t.label for t in targets], [groups[t.sample] for t in targets]
    masks = np.stack([t.mask for t in targets])
    return localization_score(maps, masks, controls=controls, classes=classes, groups=images, **options)


def word_targets(sample: Sample, caption: Caption, masks: Bools, role: str, row: int = 0) -> tuple[list[Target], Counter[str]]:
    """The words of one role with their regions, and the number of words left out, by reason.

    A word that occurs several times, or names several objects, is one target whose region is the union.  A word with an
    occurrence that no span explains is left out.  The region of a background word is what no object covers.

    Args:
        masks: (object, y, x) on the grid of the scores.
        row: The sample's row in the store.
    """
    left_out: Counter[str] = Counter()
    found: dict[str, list[Span]] = {}
    for word, span in caption.words(role):
        found.setdefault(word.lower(), []).append(span)
    explained = [span for span in caption.spans if span.role != "phrase"] if role != "phrase" else list(caption.spans)
    targets = []
    for word, spans in found.items():
        places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", caption.text, re.IGNORECASE)]
        objects = tuple(sorted({o for span in spans for o in span.objects}))
        if any(not any(s.start <= start and end <= s.end for s in explained) for start, end in places):
            left_out["word that also stands for something else"] += 1
        elif role != "background" and not 0 <= max(objects, default=-1) < len(masks):
            left_out["word without a mask"] += 1
        else:
            region = _union(masks, objects) if objects else ~_union(masks, range(len(masks)))
            label = _label(sample, objects, word) if role == "noun" else word
            targets.append(Target(row, word, label, role, tuple((s.start, s.end) for s in spans), objects, region))
    return targets, left_out


def _union(masks: Bools, objects: Sequence[int]) -> Bools:
    """The union of some masks.

    >>> _union(np.eye(3, dtype=bool)[:, None], [0, 2]).tolist()
    [[True, False, True]]
    """
    return np.asarray(masks[list(objects)].any(0), bool)


def _label(sample: Sample, objects: Sequence[int], otherwise: str) -> str:
    """The category or shape that all objects share, so that a plural has its singular's class; else `otherwise`."""
    for key in ("category", "shape"):
        kinds = {str(sample.objects[o].get(key, "")) for o in objects if o < len(sample.objects)}
        if len(kinds) == 1 and "" not in kinds:
            return kinds.pop()
    return otherwise


def _words(
    tree: xr.DataTree, dataset: Dataset | str | None, conditioning: str, roles: Sequence[str], grid: tuple[int, int]
) -> tuple[list[Target], Counter[str]]:
    """The targets of all samples, role by role within each."""
    texts = prompt_texts(tree, conditioning)["text"].values
    targets: list[Target] = []
    left_out: Counter[str] = Counter()
    for row, sample in _samples(tree, dataset):
        caption = _caption(sample, conditioning)
        _check_text(sample, conditioning, str(texts[row]))
        masks = fit_masks(sample.masks(), grid, provenance(tree)["request"]["fit"])
        for role in roles:
            found, missing = word_targets(sample, caption, masks, role, row)
            targets += found
            left_out += missing
    return targets, left_out


def _wrong_words(targets: Sequence[Target]) -> list[int]:
    """For each target the next target of its sample that names other objects, -1 where there is none.

    Both have the same role, except that a background word, which names no object, gets any object's word.
    """
    by_sample: dict[int, list[int]] = {}
    for k, target in enumerate(targets):
        by_sample.setdefault(target.sample, []).append(k)
    found = []
    for k, mine in enumerate(targets):
        others = [
            o
            for o in by_sample[mine.sample]
            if targets[o].objects
            and not set(targets[o].objects) & set(mine.objects)
            and mine.role in ("background", targets[o].role)
        ]
        found.append(next((o for o in others if o > k), others[0] if others else -1))
    return found


def _map_rows(
    tree: xr.DataTree, conditioning: str, targets: Sequence[Target]
) -> tuple[list[Target], list[tuple[int, list[int]]], dict[int, int]]:
    """The maps of a store to read: one row per target whose words were not cut off the prompt, then one per sample for its
    start token.

    Returns:
        These targets; sample and token positions of each row; by sample the row of its start token.
    """
    prompts = prompt_texts(tree, conditioning)
    starts, ends = prompts["token_start"].values, prompts["token_end"].values
    kept, wanted = [], []
    for target in targets:
        spans = zip(starts[target.sample].tolist(), ends[target.sample].tolist(), strict=True)
        places = [
            k for k, (start, end) in enumerate(spans) if end > start and any(start < b and end > a for a, b in target.spans)
        ]
        if places:
            kept.append(target)
            wanted.append((target.sample, places))
    # with a tokenizer without a start token (T5) the first token belongs to a word
    samples = [sample for sample in dict.fromkeys(t.sample for t in kept) if ends[sample, 0] == 0]
    place = {sample: len(wanted) + k for k, sample in enumerate(samples)}
    return kept, [*wanted, *((sample, [0]) for sample in samples)], place


def _average(maps: Sequence[xr.DataArray]) -> xr.DataArray:
    """The mean over sites, on the finest of their grids."""
    finest = max((m.sizes["y"], m.sizes["x"]) for m in maps)
    total = sum(enlarge(m.to_numpy(), finest) for m in maps)
    return xr.DataArray(total / np.float32(len(maps)), dims=maps[0].dims, coords=maps[0].coords)


# --- the difference that a text makes -------------------------------------------------------------------


def difference_maps(tree: xr.DataTree, site: str, conditioning: str, timesteps: Sequence[int] | None = None) -> xr.DataArray:
    """|f_c - f_u|, the norm over channels of the change that a text makes: (sample, timestep, y, x) in float32.

    Raises:
        StoreError: the site has no grid of features, or the store lacks "null" or the conditioning.
    """
    return _norms(tree, site, (conditioning, NULL), timesteps)


def difference_localization(
    tree: xr.DataTree,
    dataset: Dataset | str | None = None,
    *,
    conditionings: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    merged: bool = True,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
) -> pd.DataFrame:
    """Scores |f_c - f_u| against the masks of the objects that the text names.

    All questions of a run are pooled into the conditioning "question", all captions into "caption".  Controls beside
    those of `localization_score`: "other text", the difference that another text makes on the same image (a question
    about other objects; the mismatched caption where it was recorded), and "null features", the norm of f_u alone, which
    shows what stands out without the text.

    Args:
        tree: From `open_store`, with features under "null" and under the texts.
        dataset: The extracted dataset, or its spec; by default the one that the store names.
        conditionings: Captions and questions; by default all that the store has.
        sites: Feature sites with a grid; all by default.
        timesteps: All by default.
        merged: Add the site "all sites": maps divided by their means, enlarged to the finest grid and averaged.
        grid, seed, n_resamples: As in `attention_localization`.

    Returns:
        As `localization_score` (the own maps are called "difference"), with the columns conditioning, site and timestep
        in front.  `attrs["left_out"]` counts the texts that name no object with a mask.

    Raises:
        StoreError: there are no such features, or the dataset lacks samples.
        ValueError: no text names an object with a mask.
    """
    there = [n for n in site_names(tree) if "features" in tree[n].data_vars and {"y", "x"} <= set(tree[n]["features"].dims)]
    if not there:
        raise StoreError("No site of this store has features on a grid; record some with --sites paper --reduce none.")
    names = [known(name, there, "feature site") for name in sites or there]
    recorded = [str(c) for c in tree[names[0]].to_dataset()["conditioning"].values]
    spoken = [c for c in recorded if c.partition(":")[0] in ("caption", "question") and "@" not in c]
    texts = [known(c, recorded, "conditioning") for c in conditionings or spoken]
    steps = _timesteps(tree, names[0], timesteps)
    targets, left_out = _texts(tree, dataset, texts, grid or _grid(tree))
    if not targets:
        raise ValueError(
            f"None of the texts {', '.join(texts)} names an object with a mask; choose others, or data with masks."
        )
    columns = [*texts, *(["mismatched"] if "mismatched" in recorded else [])]
    count, groups = tree.sizes["sample"], _groups(tree)
    row_of = lambda text, sample: columns.index(text) * count + sample if text else -1  # noqa: E731
    frames = []
    maps: dict[str, xr.DataArray] = {}
    for name in names:
        maps[name] = xr.concat(
            [*(difference_maps(tree, name, c, steps) for c in columns), _norms(tree, name, (NULL,), steps)],
            "sample", coords="minimal", compat="override", join="override",
        ).rename(sample="row").reset_coords(drop=True).drop_vars("row", errors="ignore").assign_coords(timestep=steps)  # fmt: skip
    if merged and len(maps) > 1:
        # sites differ in scale by their number of channels and their training
        maps["all sites"] = _average([m / m.mean(("y", "x")).where(lambda mean: mean > 0, 1) for m in maps.values()])
    for name, stacked in maps.items():
        for kind in dict.fromkeys(t.role for t in targets):
            chosen = [t for t in targets if t.role == kind]
            order, place = _in_front([row_of(t.word, t.sample) for t in chosen], stacked.sizes["row"])
            controls = {
                "other text": [place.get(row_of(_other_text(t, chosen, columns), t.sample), -1) for t in chosen],
                "null features": [place[len(columns) * count + t.sample] for t in chosen],
            }
            options = {"own": "difference", "seed": seed, "n_resamples": n_resamples}
            frame = _score(stacked.isel(row=order), chosen, controls, groups, **options)
            frames.append(frame.assign(conditioning=kind, site=name))
    return _tidy(frames, ["conditioning", "site", "timestep"], left_out)


def _texts(
    tree: xr.DataTree, dataset: Dataset | str | None, texts: Sequence[str], grid: tuple[int, int]
) -> tuple[list[Target], Counter[str]]:
    """One target per sample and text: its word is the conditioning's name, its role the kind of text."""
    stored = {text: prompt_texts(tree, text)["text"].values for text in texts}
    targets = []
    left_out: Counter[str] = Counter()
    for row, sample in _samples(tree, dataset):
        masks = fit_masks(sample.masks(), grid, provenance(tree)["request"]["fit"])
        for text in texts:
            _check_text(sample, text, str(stored[text][row]))
            objects = _spoken_of(sample, text)
            if not 0 <= max(objects, default=-1) < len(masks):
                left_out["text about no object with a mask"] += 1
                continue
            label = _label(sample, objects, "several")
            targets.append(Target(row, text, label, text.partition(":")[0], (), objects, _union(masks, objects)))
    return targets, left_out


def _spoken_of(sample: Sample, conditioning: str) -> tuple[int, ...]:
    """The objects that a caption names or a question is about."""
    kind, _, which = conditioning.partition(":")
    if kind == "question":
        return sample.questions[int(which or 0)].objects
    return tuple(sorted({o for span in _caption(sample, conditioning).spans for o in span.objects}))


def _other_text(target: Target, targets: Sequence[Target], columns: Sequence[str]) -> str | None:
    """The conditioning of another text on the same image that names other objects."""
    if target.role == "caption" and "mismatched" in columns:
        return "mismatched"
    others = (t.word for t in targets if t.sample == target.sample and not set(t.objects) & set(target.objects))
    return next(others, None)


def _norms(tree: xr.DataTree, site: str, conditionings: tuple[str, ...], timesteps: Sequence[int] | None) -> xr.DataArray:
    """The norm over channels of one conditioning's features, or of the difference of two; read in blocks of samples."""
    arrays = [
        features(tree, site, conditioning=c, timestep=None if timesteps is None else list(timesteps)) for c in conditionings
    ]
    if missing := {"channel", "y", "x"} - set(arrays[0].dims):
        raise StoreError(f"Site {site!r} has no {', '.join(sorted(missing))} in this store; record it with --reduce none.")
    parts: list[xr.DataArray] = []
    for first in range(0, arrays[0].sizes["sample"], _BLOCK):
        blocks = [a.drop_vars("conditioning").isel(sample=slice(first, first + _BLOCK)).astype(np.float32) for a in arrays]
        parts.append(((blocks[0] - blocks[1] if len(blocks) > 1 else blocks[0]) ** 2).sum("channel") ** 0.5)
    found: xr.DataArray = xr.concat(parts, "sample").transpose("sample", "timestep", "y", "x")
    return found


# --- what both need of a store and its dataset ----------------------------------------------------------


def _timesteps(tree: xr.DataTree, site: str, timesteps: Sequence[int] | None) -> list[int]:
    there = [int(t) for t in tree[site].to_dataset()["timestep"].values]
    if missing := [t for t in timesteps or () if t not in there]:
        raise StoreError(f"There is no timestep {missing[0]} in this store. It has: {', '.join(map(str, there))}.")
    return list(timesteps or there)


def _grid(tree: xr.DataTree) -> tuple[int, int]:
    """The images' resolution, scaled down where a side has more than `MOST_PIXELS`."""
    height, width = provenance(tree)["request"]["resolution"]
    scale = min(1.0, MOST_PIXELS / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _samples(tree: xr.DataTree, dataset: Dataset | str | None) -> list[tuple[int, Sample]]:
    """The dataset's samples that the store has, each with its row."""
    chosen = dataset if dataset is not None else str(provenance(tree)["data"])
    known = load_dataset(chosen) if isinstance(chosen, str) else chosen
    rows = {str(name): row for row, name in enumerate(tree.dataset["sample"].values.tolist())}
    if not rows:
        raise StoreError("This store has no complete sample yet; run its extract command again to go on.")
    found = {rows[sample.id]: sample for sample in iterate(known) if sample.id in rows}
    if missing := [name for name, row in rows.items() if row not in found]:
        raise StoreError(f"The dataset {known.name!r} has no sample {missing[0]!r}; give the one that was extracted.")
    return sorted(found.items())


def _groups(tree: xr.DataTree) -> list[str]:
    """An image id per sample: the label `image` where samples have it (several texts on one image), else the sample's id."""
    return [str(v) for v in tree.dataset["image" if "image" in tree.dataset else "sample"].values.tolist()]


def _caption(sample: Sample, conditioning: str) -> Caption:
    """The sample's caption, with its spans, under a conditioning."""
    kind, _, which = conditioning.partition(":")
    if kind != "caption":
        raise StoreError(f"The conditioning {conditioning!r} is no caption of the sample, so nothing says what its words mean.")
    if which.isdigit() or not which:
        return sample.captions[int(which or 0)]
    return next(caption for caption in sample.captions if caption.style == which)


def _check_text(sample: Sample, conditioning: str, stored: str) -> None:
    """Raises StoreError where the dataset's text is not the extracted one: its spans would not fit."""
    if (said := prompt_for(conditioning, sample)) != stored:
        raise StoreError(
            f"Sample {sample.id!r} was extracted with the {conditioning} {stored!r}, but the dataset says {said!r}; "
            "give the dataset that was extracted."
        )


def _in_front(rows: Sequence[int], count: int) -> tuple[list[int], dict[int, int]]:
    """All of `count` row numbers with the given ones first, and the new place of each.

    >>> _in_front([2, 0], 3)
    ([2, 0, 1], {2: 0, 0: 1, 1: 2})
    """
    chosen = set(rows)
    order = [*rows, *(row for row in range(count) if row not in chosen)]
    return order, {row: place for place, row in enumerate(order)}


def _tidy(frames: Sequence[pd.DataFrame], front: Sequence[str], left_out: Counter[str]) -> pd.DataFrame:
    table = pd.concat(frames, ignore_index=True)
    table = with_holm(table[[*front, *table.columns.drop(list(front))]])
    table.attrs["left_out"] = {reason: n for reason, n in left_out.items() if n}
    return table
