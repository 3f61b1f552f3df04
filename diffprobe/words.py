"""Words on a recorder: what a pipeline's text encoders were given while it recorded, and where a word of that attends.

Text is heard by hooks on the pipeline's own text encoders, and read back from the token numbers, so that it is what the model
was told, whatever the pipeline made of the prompt.  The invariant: of each encoder the first call after a forward pass holds
the prompts; negative prompts are encoded after them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from diffprobe.conditioning import word_tokens
from diffprobe.data.samples import did_you_mean
from diffprobe.prompts import EncodedText, spelled
from diffprobe.sites import Site, select_sites

if TYPE_CHECKING:
    from diffprobe.recorder import Recorder, Step

# Maps whose tokens are words, the ones that are taken where several kinds were recorded first.
WORDED = ("cross_map", "joint_map", "joint_text_map", "joint_back_map", "joint_output_map")
_SUFFIXES = ("", "_2", "_3")
# Token numbers (row, token) of each call of a text encoder before a pass, by the encoder's suffix.
Told = dict[str, list[Tensor]]


class Ear:
    """Listens to a pipeline's text encoders."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._told, self._passed = Told(), False

    def attach(self) -> list[Any]:
        """Hooks on the encoders; the caller removes them."""

        def note(suffix: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                ids = kwargs.get("input_ids", args[0] if args else None)
                if self._passed:  # a new prompt after the passes of another
                    self._told, self._passed = Told(), False
                if isinstance(ids, Tensor) and ids.ndim == 2:
                    self._told.setdefault(suffix, []).append(ids.detach().cpu())

            return hook

        found = {suffix: getattr(self.pipeline, f"text_encoder{suffix}", None) for suffix in _SUFFIXES}
        encoders = {suffix: encoder for suffix, encoder in found.items() if isinstance(encoder, nn.Module)}
        return [encoder.register_forward_pre_hook(note(suffix), with_kwargs=True) for suffix, encoder in encoders.items()]

    def told(self) -> Told:
        """What was heard before the pass that begins now."""
        self._passed = True
        return self._told


def find_word(text: str, word: str, spans: Sequence[tuple[int, int]], occurrence: int) -> tuple[list[int], int]:
    """Positions of the tokens of one occurrence of a word, and how many occurrences there are.

    Raises:
        ValueError: the text does not have the word, or not so often; the message lists its words.
    """
    times = len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))
    if not times:
        words = list(dict.fromkeys(re.findall(r"\w+", text)))
        listed = ", ".join(words) or "no words"
        raise ValueError(f"The prompt does not have the word {word!r}; it has {listed}.{did_you_mean(word.lower(), words)}")
    if not 0 <= occurrence < times:
        raise ValueError(f"The prompt has the word {word!r} {times} time(s); occurrence {occurrence} (from 0) is not there.")
    return word_tokens(text, word, spans, occurrence), times


def word_attention(
    recorder: Recorder, word: str, image: int = 0, steps: Literal["mean"] | int | Sequence[int] = "mean", *,
    site: str | Sequence[str] | None = None, size: tuple[int, int] | None = None, occurrence: int = 0, text: EncodedText | None = None,
) -> xr.DataArray:  # fmt: skip
    """Where a word of the prompt attends: the mean over its sub-tokens, heads and sites; unconditional rows are left out.

    Args:
        image: which of the pipeline's images, from 0.
        steps: the mean over all kept passes; one pass by its number; or several, which become an axis.
        site: recorded map sites; all of the first kind of `WORDED` that was recorded by default.
        size: (height, width) that the maps are brought to, bilinearly; the finest of them by default.
        occurrence: which one, from 0, of a word that the prompt has several times.
        text: the encoded prompts, a row each, where they were not encoded inside the 'with' block.

    Returns:
        (y, x), or (step, y, x), in float32; named as the word, with prompt, tokens, sites and occurrence in its attributes.

    Raises:
        ValueError: no maps of words were recorded, the prompt does not have the word, or is not known.
    """
    passes = recorder.kept_steps()
    sites = _worded_sites(recorder, site)
    count = len(passes)
    chosen = list(range(count)) if steps == "mean" else [steps] if isinstance(steps, int) else list(steps)
    if not chosen or not all(-count <= number < count for number in chosen):
        raise ValueError(f"Steps {steps} were asked for, where {count} were kept, counted from 0.")
    kept = [passes[number] for number in chosen]
    more = any(len(calls) > 1 for calls in kept[0].told.values())  # something was encoded after the prompts
    apart = more and "negative" not in kept[0].rows
    if steps == "mean" and apart and any(a.timesteps == b.timesteps for a, b in pairwise(kept)):
        raise ValueError(
            "This pipeline guides by a pass of its own for the negative prompt, so that not all passes are the prompt's; name those "
            f"that are, such as steps=range(0, {count}, 2)."
        )
    found = [_of_step(recorder, step, sites, word, image, size, occurrence, text) for step in kept]
    maps = torch.stack([values for values, _ in found])
    dims = ("step", *("frame", "y", "x")[3 - (maps.ndim - 1) :])
    about = {**found[0][1], "sites": ", ".join(one.name for one in sites), "steps": str(steps)}
    array = xr.DataArray(maps.numpy(), dims=dims, name=word, attrs=about)
    if steps == "mean":
        array = array.mean("step", keep_attrs=True)
    elif isinstance(steps, int):
        array = array.isel(step=0)
    else:
        array = array.assign_coords(step=chosen, timestep=("step", [_time(step) for step in kept]))
    return array.assign_coords(word=word, occurrence=occurrence)


def _time(step: Step) -> float:
    return step.timesteps[0] if step.timesteps else float("nan")


def _worded_sites(recorder: Recorder, site: str | Sequence[str] | None) -> list[Site]:
    """The recorded maps over words that are meant, all of one kind."""
    there = [one for one in recorder.sites if one.kind in WORDED]
    if not there or recorder.call:
        raise ValueError("No maps of words were recorded here; record them with maps='cross' (a UNet, PixArt) or maps='joint'.")
    if site is not None:
        return select_sites(there, site)
    kind = next(kind for kind in WORDED if any(one.kind == kind for one in there))
    return [one for one in there if one.kind == kind]


def _of_step(
    recorder: Recorder, step: Step, sites: Sequence[Site], word: str, image: int, size: tuple[int, int] | None, occurrence: int,
    text: EncodedText | None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """A word's map (y, x) in one pass, in float32, and what it is of."""
    rows = [row for row, name in enumerate(step.rows) if name == "prompt"]
    if not 0 <= image < len(rows):
        raise ValueError(f"Image {image} was asked for, where there are {len(rows)}, counted from 0.")
    length = step.tensors[sites[0].name].shape[2] if recorder.tokens is None else None
    prompt, places, times = "", list[int](), 0
    for offset, tokenizer, ids in _sequences(recorder, step, image, len(rows), length, text):
        prompt, spans = spelled(tokenizer, ids)
        found, times = find_word(prompt, word, spans, occurrence)
        places += [offset + place for place in found]
    kept = places if recorder.tokens is None else [list(recorder.tokens).index(p) for p in places if p in recorder.tokens]
    if not kept or len(kept) < len(places):
        raise ValueError(f"The tokens of {word!r} ({', '.join(map(str, places)) or 'cut off'}) were not all recorded.")
    maps = [step.tensors[site.name][rows[image]].float().mean(0)[kept].mean(0).cpu() for site in sites]
    finest = size or max((tuple(one.shape[-2:]) for one in maps), key=lambda shape: shape[0] * shape[1])
    scaled = [
        nn.functional.interpolate(one.reshape(1, -1, *one.shape[-2:]), finest, mode="bilinear").view(*one.shape[:-2], *finest)
        for one in maps
    ]
    return torch.stack(scaled).mean(0), {"occurrence": f"{occurrence + 1} of {times}", "prompt": prompt, "tokens": places}


def _sequences(
    recorder: Recorder, step: Step, image: int, images: int, length: int | None, text: EncodedText | None
) -> list[tuple[int, Any, list[int]]]:
    """The token sequences that the network's text consists of: where each begins, its tokenizer, and its token numbers.

    Most networks are given one encoder's tokens; Stable Diffusion 3 and Hunyuan-DiT those of two, one behind the other.
    """
    pipeline = recorder.ear.pipeline
    calls = {"": [text.ids]} if text is not None else step.told
    if not calls:
        raise ValueError(
            "What the model was told was not heard: let the pipeline encode its prompt inside the 'with' block, or give "
            "text=model.encode_text([...]) as it was given to the network."
        )
    known = {}
    for suffix, told in calls.items():
        ids = told[0]
        if images % len(ids):
            raise ValueError(
                f"{len(ids)} prompts were heard for {images} images, so that it is not known which is whose; give text=."
            )
        known[suffix] = (getattr(pipeline, f"tokenizer{suffix}"), ids[image // (images // len(ids))].tolist())
    sizes = {suffix: len(ids) for suffix, (_, ids) in known.items()}
    alone = [suffix for suffix in sizes if length is None or sizes[suffix] == length]
    pairs = [(a, b) for a in sizes for b in sizes if a < b and sizes[a] + sizes[b] == length]
    layout: Sequence[str] = alone[-1:] if length is not None else alone[:1]
    layout = layout or next(iter(pairs), ())
    if not layout:
        here = ", ".join(map(str, sizes.values()))
        raise ValueError(
            f"The network was given {length} text tokens where its encoders had {here}, so that it is not known which token is which "
            "word; take maps by their position."
        )
    starts = np.cumsum([0, *(sizes[suffix] for suffix in layout)])
    return [(int(start), *known[suffix]) for start, suffix in zip(starts, layout, strict=False)]


def as_tree(recorder: Recorder) -> xr.DataTree:
    """All that was kept, one node a site: ``features`` (step, row, channel, y, x) or ``maps`` (step, row, head, token, y, x)."""
    steps = recorder.kept_steps()
    rows = {step.rows for step in steps}
    if len(rows) > 1:
        raise ValueError(
            f"Passes of this recording have {', '.join(str(len(names)) for names in rows)} rows; take them from `steps`."
        )
    coords = {"timestep": ("step", [_time(step) for step in steps]), "row": list(steps[0].rows)}
    nodes = {}
    for site in recorder.sites:
        values = np.stack([step.tensors[site.name].float().cpu().numpy() for step in steps])
        fixed = ("head", "token") if site.is_map else ("channel", "token") if site.over_tokens else ("channel",)
        places = values.ndim - 2 - len(fixed)
        if not 0 <= places <= 3:
            raise ValueError(f"{site.name} was reduced to the shape {values.shape[1:]}, whose axes have no names here.")
        dims = ("step", "row", *fixed, *("frame", "y", "x")[3 - places :])
        array = xr.DataArray(values, dims=dims, coords=coords, attrs={"path": site.path, "kind": site.kind})
        nodes[site.name] = xr.Dataset({"maps" if site.is_map else "features": array})
    return xr.DataTree.from_dict(nodes)
