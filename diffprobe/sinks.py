"""Attention sinks: which share of an image's attention each class of tokens takes, at every block and noise level.

A place of the image spreads one over all keys of an attention: the start token, words, what a template put in, the end token, padding,
the image's own places, and others (registers, and what a network pads its sequence with).  The invariant: these shares add up to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, cat, ones_like

from diffprobe.conditioning import assign_prompts
from diffprobe.console import Console
from diffprobe.data import load_dataset
from diffprobe.data.samples import Dataset, iterate
from diffprobe.forward import Engine, Row, to_pixels
from diffprobe.models import DiffusionModel
from diffprobe.probes.cells import column_means, mean_interval, resampling_weights
from diffprobe.prompts import EncodedText, plain_tokenizer
from diffprobe.recorder import Recorder
from diffprobe.sites import Site
from diffprobe.tap import ALL, Call, Index, probabilities, take

CLASSES = ("start", "words", "template", "end", "padding", "image", "other")
_AT_ONCE = 16  # images whose latents are held


def attention_mass(
    model: DiffusionModel,
    dataset: Dataset | str,
    timesteps: Sequence[int],
    *,
    maps: str | Sequence[str] = "words",
    conditionings: Sequence[str] = ("caption",),
    draws: int = 1,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    batch_rows: int = 4,
    n_resamples: int = 2000,
    progress: bool = True,
) -> pd.DataFrame:
    """The share of an image's attention that each class of tokens takes, on the mean over its places and heads.

    Computed from each attention's own query and key while the network runs, so that no map is kept.

    Args:
        dataset: Its images and their captions.
        maps: Names, globs or presets of map sites: "words" are those that text takes part in; in "self" the image is alone.
        conditionings: As for `extract`.
        size: (height, width) of the images in pixels; the model's own by default.
        draws: Noise tensors at each timestep, averaged.
        seed: Of noise and bootstrap.

    Returns:
        One line per site, timestep, conditioning and class of `CLASSES`, called `label`: score, value with low and high (bootstrap
        over images), chance (the class's share of the keys, which is what even attention would give it; masked keys count), peak
        (the most that one of its keys takes, over what even attention gives a key), keys (their mean number), n (images), log_snr, seed.

    Raises:
        ValueError: a site or a conditioning is not there, a timestep is none of the model's, or there are no images.
    """
    data = load_dataset(dataset) if isinstance(dataset, str) else dataset
    for timestep in timesteps:
        model.check_timestep(timestep)
    samples = list(iterate(data))
    if not samples:
        raise ValueError(f"The dataset {data.name!r} has no images; give one that has.")
    prompts, special = assign_prompts(samples, conditionings), special_tokens(model.pipeline)
    engine = Engine(model, seed=seed, batch_rows=batch_rows)
    recorder = _KeyMass(model, maps=maps, keep_steps=False, stop_early=True)
    stages = "DMU"  # of a UNet, whose middle is listed last
    sites = sorted((site.name for site in recorder.sites), key=lambda name: stages.find(name[0]))
    # (mass, number of keys, peak), each a mean over draws
    found = np.zeros((3, len(samples), len(sites), len(timesteps), len(conditionings), len(CLASSES)))
    total = len(samples) * len(timesteps) * len(conditionings) * draws
    with recorder, Console(stderr=True, quiet=not progress).progress("attention", "passes", total) as advance:
        for first in range(0, len(samples), _AT_ONCE):
            chosen = samples[first : first + _AT_ONCE]
            names = [sample.id for sample in chosen]
            latents = engine.encode_images([to_pixels(sample.load(), size or model.size, "crop") for sample in chosen], names)
            # Rows of one prompt stand together, since some families' prompts differ in length.
            rows, places = [], list[Any]()
            for kind, name in enumerate(conditionings):
                for image, when, draw in itertools.product(range(len(chosen)), range(len(timesteps)), range(draws)):
                    rows.append(Row(image, prompts[name][first + image], timesteps[when], draw))
                    places.append((slice(None), first + image, slice(None), when, kind))
            place = iter(places)
            for batch in engine.run(recorder, latents, names, rows):
                for number, kinds in enumerate(token_classes(batch.text, special)):
                    taken = [recorder.shares(site, batch.tensors[site][number], kinds) for site in sites]
                    found[next(place)] += np.stack(taken, axis=1) / draws
                advance(len(batch.rows))
    mass, keys, peak = found
    wide, weights = mass.reshape(len(mass), -1), resampling_weights(len(mass), seed, n_resamples)
    low, high = mean_interval(wide, np.arange(len(mass)), weights)
    axes = {"site": sites, "timestep": timesteps, "conditioning": conditionings, "label": CLASSES}
    frame = pd.MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)
    frame.insert(2, "log_snr", frame["timestep"].map(model.levels.log_snr))
    frame = frame.assign(
        score="attention mass", value=column_means(wide), low=low, high=high, keys=keys.mean(0).ravel(), peak=peak.mean(0).ravel(),
        chance=(keys / keys.sum(-1, keepdims=True)).mean(0).ravel(), n=len(mass), seed=seed,
    )  # fmt: skip
    return frame[frame.groupby("label")["keys"].transform("max") > 0].reset_index(drop=True)


def special_tokens(pipeline: Any) -> dict[str, set[int]]:
    """Numbers of the start, end and padding tokens of all of a pipeline's tokenizers, by those names."""
    tokenizers = [plain_tokenizer(getattr(pipeline, f"tokenizer{suffix}", None)) for suffix in ("", "_2", "_3")]
    words = {"start": ("bos", "cls"), "end": ("eos", "sep"), "padding": ("pad",)}
    numbers: Any = lambda names: {getattr(one, f"{name}_token_id", None) for one in tokenizers for name in names}  # noqa: E731
    return {kind: numbers(names) - {None} for kind, names in words.items()}


def token_classes(text: EncodedText, special: Mapping[str, Collection[int]]) -> list[list[str]]:
    """The class of every text token of each prompt, one of the first five of `CLASSES`.

    A token that spells the prompt is a word.  Of the others, numbers of a start, end or padding token are so called; where end and
    padding have one number, the first one behind the text is the end.  What else stands there, a template put in.

    Args:
        special: As from `special_tokens`.
    """
    masked = text.mask if text.mask is not None and text.mask.shape == text.ids.shape else ones_like(text.ids)
    found = []
    for numbers, spans, seen in zip(text.ids.tolist(), text.spans.tolist(), masked.tolist(), strict=True):
        kinds = [""]
        for number, (start, end), attended in zip(numbers, spans, seen, strict=True):
            ends, pads = number in special["end"], number in special["padding"]
            if not attended:
                kind = "padding"
            elif end > start:
                kind = "words"
            elif number in special["start"]:
                kind = "start"
            elif pads and (not ends or kinds[-1] in ("", "end", "padding")):
                kind = "padding"
            else:
                kind = "end" if ends else "template"
            kinds.append(kind)
        found.append(kinds[1:])
    return found


class _KeyMass(Recorder):
    """Keeps what an attention gives each key on the mean over image places and heads, where a recorder keeps its map.

    Kept tensors are (row, key): the text's keys in its order, then the image's, then others.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts: dict[str, tuple[int, int]] = {}  # of each site's text and image keys

    def _map_of(self, site: Site, call: Call) -> Float[Tensor, "row key"]:
        if len(call.query) != len(self._sample):
            self._refuse(f"Site {site.name} attends to one row after the other, so that rows are mixed up; give batch_rows=1.")

        def stands(what: str, sequence: Tensor, stream: str) -> Index:
            if self._in_unet:
                return ALL
            return self._find_stream(site, site.module_path, f"{what}{call.index}", [sequence.shape[2]], stream)[1]

        mass = probabilities(call, stands("query", call.query, "image"))[:, 0].mean(-1)
        cross = site.kind == "cross_map"
        text = ALL if cross else stands("key", call.key, "text") if site.kind.startswith("joint") else slice(0, 0)
        image = slice(0, 0) if cross else stands("key", call.key, "image")
        others = ones_like(mass)
        for index in (text, image):
            for row, keys in enumerate(others):
                keys[index if isinstance(index, slice) else index[min(row, len(index) - 1)]] = 0
        parts = [take(mass, text, 1), take(mass, image, 1), mass[others > 0].view(len(mass), -1)]
        self._counts[site.name] = (parts[0].shape[1], parts[1].shape[1])
        return cat(parts, 1)

    def shares(self, site: str, mass: Float[Tensor, " key"], kinds: Sequence[str]) -> NDArray[np.float64]:
        """Mass, number of keys and peak (3, class) of one row."""
        texts, images = self._counts[site]
        # Where rows of several lengths share a batch, the shorter prompts are padded.
        own = [*kinds[:texts], *["padding"] * (texts - len(kinds))]
        names = np.array([*own, *["image"] * images, *["other"] * (len(mass) - texts - images)])
        values = mass.double().cpu().numpy()
        chosen = [values[names == kind] for kind in CLASSES]
        tops = [part.max(initial=0.0) * len(values) for part in chosen]
        return np.array([[part.sum() for part in chosen], [len(part) for part in chosen], tops])
