"""Features of frozen encoders: CLIP's patches, and a diffusion model's features under a prompt.

An encoder takes pictures, each with a prompt or none, and gives features (picture, channel, y, x) for each of its sites.
Noise belongs to the picture, whose id is a hash of its pixels: batch, order and repetition do not change the features.
`FeatureCache` keeps features by (site, picture, prompt), so that each is computed once.  `Streams` brings all encoders to one
grid, applies feature-space guidance f_u + s (f_c - f_u), and is all that `FusedMLLM` knows of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
from diffprobe.data.blank import GREY
from diffprobe.encoders import EncoderRecorder, VisionEncoder
from diffprobe.forward import Engine, Row, to_pixels
from diffprobe.mllm.fusion import CLIP, to_grid
from diffprobe.models import DiffusionModel
from diffprobe.recorder import Recorder
from diffprobe.rundir import whole_file, write_json
from diffprobe.sites import select_sites

ROWS = 32  # pictures of one forward pass; a cache file holds as many
_OPEN = 1024  # cache files mapped into memory at a time; Linux gives a process 65,530 maps
_CELLS = 8  # per side of the oracle's grid

Key = tuple[str, str | None]  # a picture's id and its prompt
_Index = dict[str, tuple[Path, int, int | None]]  # file, row in it and checksum, by the name of a key


@dataclass(frozen=True)
class Picture:
    """An image that is loaded when an encoder needs it; `id` is `image_id` of it."""

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


# --- encoders ---------------------------------------------------------------------------------------


@runtime_checkable
class Encoder(Protocol):
    """A frozen encoder with its settings."""

    sites: tuple[str, ...]

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        """All that decides a site's features besides picture and prompt; `portable`: whatever dtype the weights are held in."""
        ...

    def encode(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """(picture, channel, y, x) by site, of at most `ROWS` pictures."""
        ...


class _ModelEncoder:
    """A model that sees pictures through the forward engine; `fit` says how images that are not square reach its size."""

    def __init__(
        self, model: VisionEncoder | DiffusionModel, sites: Sequence[str], fit: str, timestep: int = 0, noise_seed: int = 0
    ) -> None:
        self.sites, self.fit, self.timestep, self.noise_seed = tuple(sites), fit, timestep, noise_seed
        self.weights = lru_cache(maxsize=2)(model.weights_hash)
        self.engine = Engine(model, seed=noise_seed, batch_rows=ROWS)

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {"weights": self.weights(portable), "site": site, "fit": self.fit, "size": self.engine.model.resolution}

    def latents(self, pictures: Iterable[Picture]) -> Float[Tensor, "image channel y x"]:
        """The model's input for pictures, without noise."""
        model = self.engine.model
        pixels = np.stack([to_pixels(picture.load().convert("RGB"), model.size, self.fit) for picture in pictures])
        # an order of memory that is part of the features: another one changes their last bits
        return model.encode_image(torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last))

    def record(
        self, recorder: Recorder | EncoderRecorder, pictures: Sequence[Picture], prompts: Sequence[str | None]
    ) -> dict[str, Tensor]:
        """What a recorder hears of pictures under prompts, by site name; each picture and prompt is encoded once."""
        by_id = {picture.id: picture for picture in pictures}
        ids, latents = list(by_id), self.latents(by_id.values())
        rows = [Row(ids.index(picture.id), prompt, self.timestep) for picture, prompt in zip(pictures, prompts, strict=True)]
        with recorder:
            parts = [batch.tensors for batch in self.engine.run(recorder, latents, ids, rows)]
        return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


class ImageEncoder(_ModelEncoder):
    """One layer of a vision encoder, which reads no prompts; the second-to-last layer by default."""

    def __init__(self, model: VisionEncoder, layer: str = "", fit: str = "pad") -> None:
        names = [site.name for site in model.sites]
        layer = layer or model.preset[0]
        if layer not in names:
            raise ValueError(f"{model.model_id} has no layer {layer!r}; it has {', '.join(names)}.")
        super().__init__(model, (layer,), fit)
        self.model = model

    def encode(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        return self.record(self.model.recorder(self.sites), pictures, [None] * len(pictures))


class DiffusionEncoder(_ModelEncoder):
    """Sites of a diffusion model, by name, path or glob, in one noised pass that ends after the last of them.

    Controls in place of sites: "latent", the image without noise, or "text", the prompt without image, whose token embeddings
    stand on a square grid, row by row, so that they go through the same fusion as features.
    """

    def __init__(
        self, model: DiffusionModel, sites: str | Sequence[str], timestep: int = 50, noise_seed: int = 0, fit: str = "pad"
    ) -> None:
        model.check_timestep(timestep)
        there = [s for s in model.sites if not s.is_map and not s.over_tokens]
        given = [sites] if isinstance(sites, str) else list(sites)
        self.model, self.control = model, given[0] if given in (["latent"], ["text"]) else ""
        names = given if self.control else [s.name for s in select_sites(there, sites)]
        super().__init__(model, names, fit, timestep, noise_seed)

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        if self.control:
            return super().origin(site)  # as earlier versions kept it
        return {**super().origin(site, portable), "timestep": self.timestep, "noise_seed": self.noise_seed}

    def encode(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        if self.control == "latent":
            return {"latent": self.latents(pictures).float()}
        if self.control == "text":
            tokens = self.model.encode_text(list(prompts)).embeddings
            side = math.isqrt(tokens.shape[1])
            return {"text": tokens[:, : side * side].transpose(1, 2).unflatten(2, (side, side)).float()}
        return self.record(Recorder(self.model, self.sites, stop_early=True, keep_steps=False), pictures, prompts)


class TruthEncoder:
    """The oracle: a drawn scene's objects and attributes, one-hot in the cell of each object's centre.

    A language model that cannot answer from this cannot judge what any features hold.  Only drawn images carry their scene;
    for any other image all values are zero.
    """

    sites: tuple[str, ...] = ("truth",)

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {"site": site, "cells": _CELLS}

    def encode(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, Tensor]:
        found = [shapes.truth_grid(picture.load().info.get("scene"), _CELLS) for picture in pictures]
        return {"truth": torch.from_numpy(np.stack(found))}


# --- the cache --------------------------------------------------------------------------------------


class FeatureCache:
    """Features by (site, picture, prompt) in float16, in files of at most `ROWS` rows that appear whole or not at all.

    Several processes may write at once: each file has a name of its own, and what two processes computed alike is kept twice.
    Each row has a checksum, which is compared whenever the row is read.

    Args:
        folder: gets one subfolder for each site and settings of an encoder.

    Attributes:
        ids: image ids by fingerprint of the dataset and number of the sample; found once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.ids: dict[str, dict[int, list[str]]] = {}
        self._known: dict[str, tuple[Path, _Index]] = {}  # folder and index by origin
        self._open = lru_cache(_OPEN)(lambda path: safe_open(path, "pt"))

    def lacking(self, encoder: Encoder, keys: Iterable[Key]) -> list[Key]:
        """The keys, each once, that are missing for some site of the encoder."""
        indices = [self._site(encoder, site)[1] for site in encoder.sites]
        return [key for key in dict.fromkeys(keys) if any(_name(*key) not in index for index in indices)]

    def read(self, encoder: Encoder, site: str, keys: Sequence[Key]) -> Float[Tensor, "row channel y x"]:
        """Features of a site under keys that the cache holds.

        Raises:
            ValueError: a file is damaged.
        """
        _, index = self._site(encoder, site)
        rows = []
        for key in keys:
            path, row, checksum = index[_name(*key)]
            rows.append(self._open(path).get_slice("features")[row])
            if checksum not in (None, _checksum(_name(*key), rows[-1])):
                raise _damaged(path)
        return torch.stack(rows)

    def write(self, encoder: Encoder, keys: Sequence[Key], features: Mapping[str, Tensor]) -> None:
        """Keep an encoder's features of all its sites.

        Raises:
            ValueError: a value is not finite in float16.
        """
        names = [_name(*key) for key in keys]
        for site in encoder.sites:
            values = features[site].to("cpu", torch.float16).contiguous()
            if not torch.isfinite(values).all():
                raise ValueError(f"Features of {site} are not finite in float16; use no cache, or another dtype.")
            folder, index = self._site(encoder, site)
            path = folder / f"{hashlib.sha256(''.join(names).encode()).hexdigest()[:16]}.safetensors"
            checksums = [_checksum(name, row) for name, row in zip(names, values, strict=True)]
            with whole_file(path) as beside:
                save_file({"features": values}, beside, {"keys": json.dumps(names), "checksums": json.dumps(checksums)})
            index.update({name: (path, row, checksums[row]) for row, name in enumerate(names)})

    def refresh(self) -> None:
        """Read the folder again, for what other processes wrote."""
        self._known.clear()

    def _site(self, encoder: Encoder, site: str) -> tuple[Path, _Index]:
        """The folder of an encoder's site, and the index of what it holds."""
        origin = json.dumps(encoder.origin(site), sort_keys=True)
        if origin not in self._known:
            folder = self.folder / f"{site}_{hashlib.sha256(origin.encode()).hexdigest()[:12]}"
            if not (folder / "origin.json").exists():
                write_json(folder / "origin.json", encoder.origin(site))
            found: _Index = {}
            for path in sorted(folder.glob("*.safetensors")):
                try:
                    with safe_open(path, "pt") as file:
                        names, checksums = (json.loads(file.metadata().get(part, "null")) for part in ("keys", "checksums"))
                        checksums = checksums or [None] * len(names)  # earlier versions kept none
                        found |= {name: (path, k, total) for k, (name, total) in enumerate(zip(names, checksums, strict=True))}
                except (SafetensorError, ValueError, TypeError) as error:
                    raise _damaged(path) from error
            self._known[origin] = folder, found
        return self._known[origin]


def _checksum(name: str, row: Tensor) -> int:
    return zlib.crc32(row.numpy().tobytes(), zlib.crc32(name.encode()))


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged; remove it, and what it held is computed again.")


def _name(picture: str, prompt: str | None) -> str:
    return picture if prompt is None else f"{picture}-{hashlib.sha256(prompt.encode()).hexdigest()[:24]}"


# --- all together -----------------------------------------------------------------------------------


class Streams:
    """The features of all encoders of a model on one grid.

    Args:
        merge: what becomes of places that share a token, as in `to_grid`.
        guidance: s in f_u + s (f_c - f_u); 0 reads no prompt.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], grid: int, merge: str = "mean", guidance: float = 1.0,
        cache: FeatureCache | None = None,
    ) -> None:  # fmt: skip
        self.encoders, self.grid, self.merge, self.guidance, self.cache = dict(encoders), grid, merge, guidance, cache

    def __call__(
        self, pictures: Sequence[Picture], prompts: Sequence[str | None]
    ) -> dict[str, Float[Tensor, "picture token channel"]]:
        """The tokens of every stream, for each picture under its prompt."""
        found, by_id = {}, {picture.id: picture for picture in pictures}
        for name, encoder in self.encoders.items():
            keys = self._keys(name, pictures, prompts)
            unique = list(dict.fromkeys(key for own in keys for key in own))
            row = {key: k for k, key in enumerate(unique)}
            null, prompted = ([row[own[end]] for own in keys] for end in (0, -1))
            single = torch.tensor([len(own) == 1 for own in keys])[:, None, None]
            parts = []
            for features in self._features(encoder, unique, by_id):
                tokens = to_grid(features, self.grid, self.merge)
                unguided = tokens[null]
                guided = unguided + self.guidance * (tokens[prompted] - unguided)
                parts.append(torch.where(single.to(tokens.device), unguided, guided))
            found[name] = torch.cat(parts, -1)
        return found

    def prepare(self, pictures: Sequence[Picture], prompts: Sequence[str | None], progress: Callable[[int, int], None]) -> None:
        """Bring everything that these pictures and prompts need into the cache.

        Args:
            progress: gets the number of forward passes that are done, and of all.
        """
        if self.cache is None:
            raise ValueError("Features can be prepared only where there is a cache to keep them in.")
        by_id = {picture.id: picture for picture in pictures}
        wanted = {
            name: self.cache.lacking(encoder, (key for own in self._keys(name, pictures, prompts) for key in own))
            for name, encoder in self.encoders.items()
        }
        total, done = sum(map(len, wanted.values())), 0
        for name, keys in wanted.items():
            for start in range(0, len(keys), ROWS):
                part = keys[start : start + ROWS]
                self._encode(self.encoders[name], part, by_id)
                done += len(part)
                progress(done, total)

    def channels(self) -> dict[str, int]:
        """Channels of each stream, found by encoding an even grey image."""
        return {
            name: sum(to_grid(features, self.grid, self.merge).shape[-1] for features in encoded.values())
            for name, encoded in self._grey().items()
        }

    def cached_bytes(self, prompted: bool) -> int:
        """Bytes that a picture takes in a cache, with or without one prompt."""
        prompt = "a prompt" if prompted else None
        return sum(
            len(self.passes(name, prompt)) * sum(2 * features[0].numel() for features in encoded.values())
            for name, encoded in self._grey().items()
        )

    def _grey(self) -> dict[str, dict[str, Tensor]]:
        grey = Picture.of(Image.new("RGB", (32, 32), GREY))
        return {name: encoder.encode([grey], [None]) for name, encoder in self.encoders.items()}

    def passes(self, name: str, prompt: str | None) -> list[str | None]:
        """What a picture is encoded under: no prompt, its prompt, or both."""
        if name == CLIP or prompt is None or self.guidance == 0:
            return [None]
        return [prompt] if self.guidance == 1 else [None, prompt]

    def _keys(self, name: str, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> list[list[Key]]:
        return [[(p.id, kind) for kind in self.passes(name, prompt)] for p, prompt in zip(pictures, prompts, strict=True)]

    def _features(self, encoder: Encoder, keys: Sequence[Key], by_id: Mapping[str, Picture]) -> list[Tensor]:
        """(key, channel, y, x) of every site."""
        lacking = keys if self.cache is None else self.cache.lacking(encoder, keys)
        parts = [self._encode(encoder, lacking[k : k + ROWS], by_id) for k in range(0, len(lacking), ROWS)]
        if self.cache is None:
            return [torch.cat([part[site] for part in parts]) for site in encoder.sites]
        return [self.cache.read(encoder, site, keys) for site in encoder.sites]

    def _encode(self, encoder: Encoder, keys: Sequence[Key], by_id: Mapping[str, Picture]) -> dict[str, Tensor]:
        features = encoder.encode([by_id[name] for name, _ in keys], [prompt for _, prompt in keys])
        if self.cache is not None:
            self.cache.write(encoder, keys, features)
        return features
