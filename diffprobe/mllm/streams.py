"""What frozen encoders see of an image: CLIP's patches, and a diffusion model's features under a prompt.

An eye looks at pictures, each with a prompt or none, and gives features (picture, channel, y, x) for each of its sites.
Noise belongs to the picture, whose id is a hash of its pixels: neither batch nor order nor a second run changes what is seen.
`FeatureCache` keeps what was seen under (site, picture, prompt), so that it is computed once; `Streams` brings all eyes to one
grid, applies feature-space guidance f_u + s (f_c - f_u), and is all that `FusedMLLM` knows of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffprobe.data import shapes
from diffprobe.data.images import fit_image
from diffprobe.encoders import VisionEncoder
from diffprobe.mllm.fusion import CLIP, to_grid
from diffprobe.models import DiffusionModel, EncodedText
from diffprobe.noise import sample_noise
from diffprobe.recorder import Recorder
from diffprobe.sites import select_sites
from diffprobe.store import whole_file, write_whole

ROWS = 32  # pictures of one forward pass; a cache file holds as many
_OPEN = 1024  # cache files mapped into memory at a time; Linux gives a process 65,530 maps


@dataclass(frozen=True)
class Picture:
    """An image that is loaded when it has to be looked at; `id` is `image_id` of it."""

    id: str
    load: Callable[[], Image.Image]

    @staticmethod
    def of(image: Image.Image) -> Picture:
        return Picture(image_id(image), lambda: image)


def image_id(image: Image.Image) -> str:
    """A hash of an image's size and RGB pixels.

    >>> image_id(Image.new("RGB", (2, 2))) == image_id(Image.new("L", (2, 2))) != image_id(Image.new("RGB", (1, 4)))
    True
    """
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()[:24]


def to_pixels(images: Sequence[Image.Image], size: tuple[int, int], fit: str) -> Float[Tensor, "image 3 y x"]:
    """Images at one size, in [-1, 1]."""
    fitted = [np.asarray(fit_image(image.convert("RGB"), size, fit), np.float32) for image in images]
    return torch.from_numpy(np.stack(fitted).transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1))


# --- eyes -------------------------------------------------------------------------------------------


@runtime_checkable
class Eye(Protocol):
    """A frozen encoder with its settings."""

    sites: tuple[str, ...]

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        """All that decides a site's features besides picture and prompt; `portable`: whatever dtype the weights are held in."""
        ...

    def look(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """(picture, channel, y, x) by site, at most `ROWS` pictures."""
        ...


class EncoderEye:
    """One layer of a vision encoder; prompts are not read.

    Args:
        encoder: CLIP or another.
        layer: of `VisionEncoder.sites`; the second-to-last by default.
        fit: how images that are not square are brought to the encoder's size.
    """

    def __init__(self, encoder: VisionEncoder, layer: str = "", fit: str = "pad") -> None:
        names = [site.name for site in encoder.sites]
        layer = layer or encoder.preset[0]
        if layer not in names:
            raise ValueError(f"{encoder.model_id} has no layer {layer!r}; it has {', '.join(names)}.")
        self.sites: tuple[str, ...] = (layer,)
        self.encoder, self.fit = encoder, fit

    @cached_property
    def _weights(self) -> tuple[str, str]:
        return self.encoder.weights_hash(), self.encoder.weights_hash(portable=True)

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {"weights": self._weights[portable], "site": site, "fit": self.fit, "size": list(self.encoder.resolution)}

    def look(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        images = [picture.load() for picture in pictures]
        pixels = self.encoder.encode_image(to_pixels(images, self.encoder.resolution, self.fit))
        with self.encoder.recorder(self.sites) as recorder:
            self.encoder.forward(pixels)
        return dict(recorder.last)


class DiffusionEye:
    """Sites of a diffusion model, one noised forward pass that ends after the last of them.

    Args:
        model: the diffusion model.
        sites: feature sites by name, path or glob.
        timestep: of the noise.
        noise_seed: of the noise.
        fit: how images that are not square are brought to the model's size.

    Attributes:
        cut: prompts that were longer than the text encoder takes and were cut.
    """

    def __init__(
        self, model: DiffusionModel, sites: str | Sequence[str], timestep: int = 50, noise_seed: int = 0, fit: str = "pad"
    ) -> None:
        model.check_timestep(timestep)
        there = [s for s in model.sites if not s.is_map and not s.over_tokens]
        self.model, self.timestep, self.noise_seed, self.fit = model, timestep, noise_seed, fit
        self.sites = tuple(s.name for s in select_sites(there, sites))
        self.cut: set[str] = set()

    @cached_property
    def _weights(self) -> tuple[str, str]:
        return self.model.weights_hash(), self.model.weights_hash(portable=True)

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {
            "weights": self._weights[portable], "site": site, "timestep": self.timestep, "noise_seed": self.noise_seed, "fit": self.fit,
            "size": self.model.resolution,
        }  # fmt: skip

    def look(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        with Recorder(self.model, self.sites, stop_early=True, keep_steps=False) as recorder:
            self.pass_through(pictures, prompts)
        return dict(recorder.last)

    def pass_through(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> None:
        """One forward pass, for whoever is recording."""
        model, unique = self.model, list({picture.id: picture for picture in pictures}.values())
        latents = model.encode_image(to_pixels([picture.load() for picture in unique], model.size, self.fit))
        noise = torch.stack(
            [sample_noise(self.noise_seed, picture.id, self.timestep, 0, latents.shape[1:]) for picture in unique]
        )
        steps = torch.full((len(unique),), self.timestep)
        noised = model.add_noise(latents, noise.to(latents.device), steps)
        place = {picture.id: row for row, picture in enumerate(unique)}
        rows = [place[picture.id] for picture in pictures]
        model.denoise(noised[rows], steps[:1].expand(len(rows)), self._encode(prompts))

    def _encode(self, prompts: Sequence[str | None]) -> EncodedText:
        unique = list(dict.fromkeys(prompts))
        text = self.model.encode_text(unique)
        self.cut |= {str(prompt) for prompt, cut in zip(unique, text.truncated, strict=True) if cut}
        return text.take([unique.index(prompt) for prompt in prompts])


class InputEye:
    """What goes into a diffusion model, as a control: "latent", the image without noise, or "text", the prompt without image.

    The text's token embeddings stand on a square grid, row by row, so that they go through the same fusion as features.
    """

    def __init__(self, model: DiffusionModel, site: str, fit: str = "pad") -> None:
        self.sites: tuple[str, ...] = (site,)
        self.model, self.fit = model, fit

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {"weights": self.model.weights_hash(), "site": site, "fit": self.fit, "size": self.model.resolution}

    def look(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        if self.sites == ("text",):
            tokens = self.model.encode_text(list(prompts)).embeddings
            side = math.isqrt(tokens.shape[1])
            return {"text": tokens[:, : side * side].transpose(1, 2).unflatten(2, (side, side)).float()}
        pixels = to_pixels([picture.load() for picture in pictures], self.model.size, self.fit)
        return {"latent": self.model.encode_image(pixels).float()}


class TruthEye:
    """The oracle: what stands where in a drawn image, as its scene says, one-hot in the cell of each object's centre.

    A language model that cannot answer from this cannot judge what any features hold.  Only drawn images carry their scene;
    any other image shows nothing.
    """

    sites: tuple[str, ...] = ("truth",)

    def __init__(self, cells: int = 8) -> None:
        self.cells = cells

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {"site": site, "cells": self.cells}

    def look(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        found = [shapes.truth_grid(picture.load().info.get("scene"), self.cells) for picture in pictures]
        return {"truth": torch.from_numpy(np.stack(found))}


# --- the cache --------------------------------------------------------------------------------------


class FeatureCache:
    """Features by (site, picture, prompt), in float16, in files of at most `ROWS` that appear whole or not at all.

    Several processes may write at once: each file has a name of its own, and what two computed alike is kept twice.  Every row
    has a checksum, which is looked at whenever the row is read.

    Args:
        folder: one subfolder for each eye's site and settings.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._known: dict[str, dict[str, tuple[Path, int, int | None]]] = {}
        self._open: dict[Path, Any] = {}
        self.ids: dict[str, dict[int, list[str]]] = {}  # of images by dataset and sample, found once

    def lacking(self, eye: Eye, keys: Iterable[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
        """Those of the (picture id, prompt) that a site of the eye was not seen under."""
        indices = [self._index(eye, site) for site in eye.sites]
        return [key for key in dict.fromkeys(keys) if any(_name(*key) not in index for index in indices)]

    def read(self, eye: Eye, site: str, keys: Sequence[tuple[str, str | None]]) -> Float[Tensor, "row channel y x"]:
        """Features of a site under keys that the cache holds.

        Raises:
            ValueError: a file is damaged.
        """
        index = self._index(eye, site)
        rows = []
        for key in keys:
            path, row, total = index[_name(*key)]
            file = self._open.pop(path, None) or safe_open(path, "pt")
            self._open[path] = file  # the last one used stands last
            if len(self._open) > _OPEN:
                del self._open[next(iter(self._open))]
            rows.append(file.get_slice("features")[row])
            if total not in (None, _checksum(_name(*key), rows[-1])):
                raise _damaged(path)
        return torch.stack(rows)

    def write(self, eye: Eye, keys: Sequence[tuple[str, str | None]], seen: Mapping[str, Tensor]) -> None:
        """Keep what an eye saw, unless it is not finite in float16.

        Raises:
            ValueError: a value is not finite.
        """
        names = [_name(*key) for key in keys]
        for site in eye.sites:
            values = seen[site].to("cpu", torch.float16).contiguous()
            if not torch.isfinite(values).all():
                raise ValueError(f"Features of {site} are not finite in float16; use no cache, or another dtype.")
            folder = self._folder(eye, site)
            path = folder / f"{hashlib.sha256(''.join(names).encode()).hexdigest()[:16]}.safetensors"
            totals = [_checksum(name, row) for name, row in zip(names, values, strict=True)]
            with whole_file(path) as beside:
                save_file({"features": values}, beside, {"keys": json.dumps(names), "checksums": json.dumps(totals)})
            self._index(eye, site).update({name: (path, row, totals[row]) for row, name in enumerate(names)})

    def refresh(self) -> None:
        """Look at the folder again, for what other processes wrote."""
        self._known.clear()

    def _folder(self, eye: Eye, site: str) -> Path:
        origin = eye.origin(site)
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.folder / f"{site}_{digest}"
        if not (folder / "origin.json").exists():
            write_whole(folder / "origin.json", json.dumps(origin, indent=2) + "\n")
        return folder

    def _index(self, eye: Eye, site: str) -> dict[str, tuple[Path, int, int | None]]:
        key = json.dumps(eye.origin(site), sort_keys=True)
        if key not in self._known:
            found: dict[str, tuple[Path, int, int | None]] = {}
            for path in sorted(self._folder(eye, site).glob("*.safetensors")):
                try:
                    with safe_open(path, "pt") as file:
                        names, totals = (json.loads(file.metadata().get(part, "null")) for part in ("keys", "checksums"))
                        totals = totals or [None] * len(names)  # earlier versions kept none
                        found |= {name: (path, row, total) for row, (name, total) in enumerate(zip(names, totals, strict=True))}
                except (SafetensorError, ValueError, TypeError) as error:
                    raise _damaged(path) from error
            self._known[key] = found
        return self._known[key]


def _checksum(name: str, row: Tensor) -> int:
    return zlib.crc32(row.numpy().tobytes(), zlib.crc32(name.encode()))


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged; remove it, and what it held is computed again.")


def _name(picture: str, prompt: str | None) -> str:
    return picture if prompt is None else f"{picture}-{hashlib.sha256(prompt.encode()).hexdigest()[:24]}"


# --- all together -----------------------------------------------------------------------------------


class Streams:
    """The eyes of a model on one grid.

    Args:
        eyes: by the name of their stream.
        grid: tokens on a side.
        merge: of places that share a token, as `to_grid` takes it.
        guidance: s in f_u + s (f_c - f_u); 0 reads no prompt.
        cache: where features are kept; none by default.
    """

    def __init__(
        self,
        eyes: Mapping[str, Eye],
        grid: int,
        merge: str = "mean",
        guidance: float = 1.0,
        cache: FeatureCache | None = None,
    ) -> None:
        self.eyes, self.grid, self.merge, self.guidance, self.cache = dict(eyes), grid, merge, guidance, cache

    def __call__(
        self, pictures: Sequence[Picture], prompts: Sequence[str | None]
    ) -> dict[str, Float[Tensor, "picture token channel"]]:
        """Every stream's tokens, of each picture under its prompt."""
        found = {}
        for name, eye in self.eyes.items():
            passes = [self.passes(name, prompt) for prompt in prompts]
            keys = [(p, prompt) for p, kinds in zip(pictures, passes, strict=True) for prompt in kinds]
            seen = self._look(eye, [p for p, _ in keys], [prompt for _, prompt in keys])
            sizes = [len(kinds) for kinds in passes]
            found[name] = torch.cat([self._guided(tokens, sizes) for tokens in seen], -1)
        return found

    def prepare(self, pictures: Sequence[Picture], prompts: Sequence[str | None], tell: Callable[[int, int], None]) -> None:
        """Bring everything that these pictures and prompts need into the cache.

        Args:
            tell: gets how many forward passes are done, and of how many.
        """
        if self.cache is None:
            raise ValueError("Features can be prepared only where there is a cache to keep them in.")
        by_id = {picture.id: picture for picture in pictures}
        wanted = {
            name: self.cache.lacking(
                eye, [(p.id, k) for p, prompt in zip(pictures, prompts, strict=True) for k in self.passes(name, prompt)]
            )
            for name, eye in self.eyes.items()
        }
        total, done = sum(map(len, wanted.values())), 0
        for name, keys in wanted.items():
            for start in range(0, len(keys), ROWS):
                part = keys[start : start + ROWS]
                self._see(self.eyes[name], [by_id[i] for i, _ in part], [prompt for _, prompt in part])
                done += len(part)
                tell(done, total)

    def channels(self) -> dict[str, int]:
        """Of each stream, found by looking at an even grey image."""
        grey = Picture.of(Image.new("RGB", (32, 32), (128, 128, 128)))
        seen = {name: eye.look([grey], [None]) for name, eye in self.eyes.items()}
        return {
            name: sum(to_grid(features, self.grid, self.merge).shape[-1] for features in sites.values())
            for name, sites in seen.items()
        }

    def passes(self, name: str, prompt: str | None) -> list[str | None]:
        """What a picture has to be looked at under: nothing, its prompt, or both."""
        if name == CLIP or prompt is None or self.guidance == 0:
            return [None]
        return [prompt] if self.guidance == 1 else [None, prompt]

    def _guided(self, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
        rows, start = [], 0
        for size in sizes:
            null, text = tokens[start], tokens[start + size - 1]
            rows.append(null if size == 1 else null + self.guidance * (text - null))
            start += size
        return torch.stack(rows)

    def _look(self, eye: Eye, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> list[Tensor]:
        """Tokens of every site, each pass computed once."""
        keys = [(picture.id, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        by_id, unique = {picture.id: picture for picture in pictures}, list(dict.fromkeys(keys))
        lacking = unique if self.cache is None else self.cache.lacking(eye, unique)
        parts = [lacking[start : start + ROWS] for start in range(0, len(lacking), ROWS)]
        seen = [self._see(eye, [by_id[i] for i, _ in part], [prompt for _, prompt in part]) for part in parts]
        place = {key: row for row, key in enumerate(unique)}
        found = []
        for site in eye.sites:
            raw = torch.cat([part[site] for part in seen]) if self.cache is None else self.cache.read(eye, site, unique)
            found.append(to_grid(raw, self.grid, self.merge)[[place[key] for key in keys]])
        return found

    def _see(self, eye: Eye, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        seen = eye.look(pictures, prompts)
        if self.cache is not None:
            self.cache.write(eye, [(p.id, prompt) for p, prompt in zip(pictures, prompts, strict=True)], seen)
        return seen
