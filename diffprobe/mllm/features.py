"""Features for soft tokens: which text was fed, how strongly, and what was done against leaking.

`Features` reads them from the stores of a folder (and any other that fits), and records into new ones what none of them holds.
Arrays are (sample, channel, y, x) float32 until they become tokens.  The invariant: every store has the same noise for the same
sample and timestep, so conditions differ in the text alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray

from diffprobe.conditioning import NULL, assign_prompts
from diffprobe.data.samples import Dataset, iterate
from diffprobe.extraction import extract
from diffprobe.knockout import KnockedOut
from diffprobe.mllm.captions import words
from diffprobe.mllm.projector import soft_tokens
from diffprobe.models import DiffusionModel
from diffprobe.recorder import site_shapes
from diffprobe.sites import select_sites
from diffprobe.store import PENDING, StoreError, exists, open_store, provenance, read_maps
from diffprobe.store import features as stored_features

TEXT = "Text-Embeddings"  # the site of the ceiling: what the text encoder makes of the prompt, no image at all
CURES = ("centred", "gated", "erased")
LEAST_PROMPTS = 5  # a word that fewer prompts have (or lack) is not erased: its covariance would be noise

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """One array of features.

    Attributes:
        split: "train", "test" or "blank".
        site: a feature site's name, or `TEXT`.
        conditioning: of the text; `NULL` for none.
        guidance: s in f_u + s (f_c - f_u).
        cure: one of `CURES`, or "".
        knockout: as `diffprobe.knockout` says, or "".
    """

    split: str
    site: str
    timestep: int
    conditioning: str
    guidance: float = 1.0
    cure: str = ""
    knockout: str = ""

    def passes(self) -> list[tuple[str, str, int, str, str]]:
        """What must have been recorded: (split, knockout, timestep, site, conditioning)."""
        if self.site == TEXT:
            return []
        found = [(self.split, self.knockout, self.timestep, self.site, c) for c in dict.fromkeys((NULL, self.conditioning))]
        if self.cure == "gated" and self.conditioning != NULL:
            found.append((self.split, self.knockout, self.timestep, map_site(self.site), self.conditioning))
        if self.cure == "erased":
            found += [("train", self.knockout, self.timestep, self.site, c) for c in (NULL, "mismatched")]
        return found


def map_site(site: str) -> str:
    """The cross-attention map of the transformer block that a site lies in.

    >>> map_site("U-L1-R1-B0-Cross-Q")
    'U-L1-R1-B0-Cross-Map'

    Raises:
        ValueError: it lies in none.
    """
    block, found, _ = site.partition("-B0")
    if not found:
        raise ValueError(f"The cure 'gated' needs a site in a transformer block; {site} has no attention map of its own.")
    return f"{block}-B0-Cross-Map"


class Features:
    """The features of one model on training, test and blank images.

    Args:
        model: records what is missing.
        data: the dataset of each split.
        folder: where stores are kept.
        grid: places of a site are averaged to at most this many on a side.
        seed: of the noise.
        others: more stores to look in; those that were recorded otherwise are passed over.
        tell: gets a line before each recording.
        batch_rows: of one forward pass; found by timing when None, and then not alike in two runs.
    """

    def __init__(
        self, model: DiffusionModel, data: Mapping[str, Dataset], folder: Path, grid: int = 6, seed: int = 0,
        others: Sequence[str | Path] = (), tell: Callable[[str], None] = lambda line: None, batch_rows: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.folder, self.grid, self.seed = model, dict(data), Path(folder), grid, seed
        self.others, self.tell, self.batch_rows = list(others), tell, batch_rows
        self._eraser = lru_cache(maxsize=4)(self._fit_eraser)
        self._array = lru_cache(maxsize=8)(self._read)

    # --- recording --------------------------------------------------------------------------------

    def missing(self, asked: Iterable[Asked]) -> list[dict[str, Any]]:
        """The recordings to be made: split, knockout, timesteps, sites, maps, conditionings; one store each."""
        wanted = dict.fromkeys(p for one in asked for p in one.passes())
        lacking = [p for p in wanted if self._find(p) is None]
        recordings = []
        for split, knockout in dict.fromkeys(p[:2] for p in lacking):
            part = [p for p in lacking if p[:2] == (split, knockout)]
            sites = list(dict.fromkeys(p[3] for p in part))
            recordings.append(
                {
                    "split": split,
                    "knockout": knockout,
                    "timesteps": sorted({p[2] for p in part}),
                    "sites": [s for s in sites if not s.endswith("-Map")],
                    "maps": [s for s in sites if s.endswith("-Map")],
                    "conditionings": list(dict.fromkeys([NULL, *(p[4] for p in part)])),
                }
            )
        return recordings

    def record(self, recording: Mapping[str, Any], dry_run: bool = False, progress: bool = True) -> float:
        """Make one recording of `missing`; gives the seconds that its forward passes take, as forecast (0 when done)."""
        digest = hashlib.sha256(json.dumps(dict(recording), sort_keys=True).encode()).hexdigest()[:8]
        sites = list(recording["sites"])
        summary = extract(
            self._model(recording["knockout"]), self.data[recording["split"]], self.folder / f"{recording['split']}_{digest}.zarr",
            sites=sites, maps=recording["maps"], timesteps=recording["timesteps"], conditionings=recording["conditionings"],
            reduce={site: self._rule(site) for site in sites} or "none", seed=self.seed, batch_rows=self.batch_rows,
            dry_run=dry_run, progress=progress and not dry_run,
        )  # fmt: skip
        self.__dict__.pop("_stores", None)
        return (summary.forecast.seconds or 0.0) if summary.forecast else 0.0

    def _model(self, knockout: str) -> DiffusionModel:
        return KnockedOut(self.model, knockout) if knockout else self.model

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return site_shapes(self.model.network, self.model.latent_size(*self.model.size), self.model.prompt_tokens)

    def _rule(self, site: str) -> str:
        """A reduction to the grid while recording; small sites stay as they are."""
        height, width = self._shapes[site][-2:]
        return "none" if max(height, width) <= self.grid else f"grid:{min(self.grid, height)}x{min(self.grid, width)}"

    def site_names(self, patterns: str | Sequence[str]) -> list[str]:
        """The feature sites over places that patterns name, `TEXT` as it is."""
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        rest = [p for p in given if p != TEXT]
        there = [s for s in self.model.sites if not s.is_map and not s.over_tokens]
        return [*(s.name for s in (select_sites(there, rest) if rest else [])), *([TEXT] if TEXT in given else [])]

    # --- finding ----------------------------------------------------------------------------------

    @cached_property
    def _stores(self) -> list[xr.DataTree]:
        paths = [path for path in (*self.others, *sorted(self.folder.glob("*.zarr"))) if exists(path)]
        trees = [open_store(path, complete=False) for path in paths]
        whole = [path for path, tree in zip(paths, trees, strict=True) if np.all(np.asarray(tree["status"].values) != PENDING)]
        return [open_store(path) for path in whole]

    def _find(self, wanted: tuple[str, str, int, str, str]) -> xr.DataTree | None:
        """The first complete store that holds a pass and was recorded as ours are."""
        split, knockout, timestep, site, conditioning = wanted
        ours = {
            "fingerprint": self.data[split].fingerprint(), "samples": len(self.data[split]), "seed": self.seed, "noise_draws": 1,
            "weights": self._model(knockout).weights_hash() if knockout else self._weights, "latent_rule": "mean", "fit": "crop",
            "resolution": list(self.model.size),
        }  # fmt: skip
        for tree in self._stores:
            request = provenance(tree)["request"]
            holds = (
                site in (*request["sites"], *request["maps"])
                and timestep in request["timesteps"]
                and conditioning in request["conditionings"]
                and (request["reduce"].get(site, "none") in ("none", self._rule(site)) if site in request["sites"] else True)
            )
            if holds and all(request[name] == value for name, value in ours.items()):
                return tree
        return None

    @cached_property
    def _weights(self) -> str:
        return self.model.weights_hash()

    # --- reading ----------------------------------------------------------------------------------

    def tokens(self, asked: Asked, ids: Sequence[str]) -> Float[torch.Tensor, "sample token channel"]:
        """Soft tokens' features of the named samples."""
        if asked.site == TEXT:
            return self._text(asked.split, asked.conditioning, ids)
        null = self._array(asked.split, asked.knockout, asked.timestep, asked.site, NULL)
        if asked.cure == "gated":
            values = null * self._gate(asked, (null.sizes["y"], null.sizes["x"]))
        elif asked.conditioning == NULL or asked.guidance == 0:
            values = null
        else:
            text = self._array(asked.split, asked.knockout, asked.timestep, asked.site, asked.conditioning)
            difference = text - null
            if asked.cure == "centred":
                difference = difference - difference.mean(("y", "x"))
            values = null + asked.guidance * difference
        known = {name: row for row, name in enumerate(values["sample"].values.tolist())}
        tokens = soft_tokens(torch.from_numpy(np.ascontiguousarray(values.values[[known[i] for i in ids]])), self.grid)
        if asked.cure == "erased":
            tokens = self._eraser(asked.timestep, asked.site, asked.guidance, asked.knockout)(tokens.flatten(0, 1)).view(
                tokens.shape
            )
        return tokens.contiguous()

    def ids(self, split: str) -> list[str]:
        """The samples of a split that every store of it holds complete."""
        names = [sample.id for sample in iterate(self.data[split])]
        fingerprint = self.data[split].fingerprint()
        for tree in self._stores:
            if provenance(tree)["request"]["fingerprint"] == fingerprint:
                there = set(np.asarray(tree["sample"].values).tolist())
                names = [name for name in names if name in there]
        return names

    def prompts(self, split: str, conditioning: str) -> dict[str, str]:
        """The text that each sample is fed, by sample id; empty for none."""
        samples = list(iterate(self.data[split]))
        texts = assign_prompts(samples, [conditioning])[conditioning]
        return {sample.id: text or "" for sample, text in zip(samples, texts, strict=True)}

    def _read(self, split: str, knockout: str, timestep: int, site: str, conditioning: str) -> xr.DataArray:
        tree = self._find((split, knockout, timestep, site, conditioning))
        if tree is None:
            raise StoreError(
                f"No store in {self.folder} holds {site} at timestep {timestep} under {conditioning!r} for the {split} images."
            )
        found = stored_features(tree, site, timestep=timestep, conditioning=conditioning)
        return found.astype(np.float32).load().drop_vars(("conditioning", "timestep"), errors="ignore")

    def _gate(self, asked: Asked, size: tuple[int, int]) -> NDArray[np.float32]:
        """Where the text's words attend, (sample, 1, y, x), of mean 1 over the places; 1 where there are no words."""
        if asked.conditioning == NULL:
            return np.ones((1, 1, 1, 1), np.float32)
        site = map_site(asked.site)
        tree = self._find((asked.split, asked.knockout, asked.timestep, site, asked.conditioning))
        assert tree is not None
        prompts = tree["prompts"].to_dataset()
        column = prompts["conditioning"].values.tolist().index(asked.conditioning)
        spelled = (prompts["token_end"] > prompts["token_start"]).isel(conditioning=column).values
        wanted = [(row, np.flatnonzero(letters).tolist()) for row, letters in enumerate(spelled)]
        looked = torch.from_numpy(read_maps(tree, site, wanted, asked.conditioning, asked.timestep, merge="sum").values[:, 0])
        looked = torch.nn.functional.adaptive_avg_pool2d(looked, size)
        mean = looked.mean((2, 3), keepdim=True)
        return torch.where(mean > 0, looked / mean.clamp(min=1e-12), 1.0).numpy()

    def _fit_eraser(self, timestep: int, site: str, guidance: float, knockout: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """LEACE (Belrose et al. 2023): the affine map that makes the fed-in words linearly unreadable and changes least.

        It is fitted under mismatched prompts, whose words say nothing of the image: what is erased is the text, not what was seen.
        """
        try:
            from concept_erasure import LeaceEraser
        except ImportError as error:
            raise ValueError("The cure 'erased' needs concept-erasure: pip install --no-deps concept-erasure==0.2.4") from error
        ids = self.ids("train")
        tokens = self.tokens(Asked("train", site, timestep, "mismatched", guidance, knockout=knockout), ids)
        prompts = self.prompts("train", "mismatched")
        said = [set(words(prompts[i])) for i in ids]
        counts = {word: sum(word in own for own in said) for word in sorted(set().union(*said))}
        kept = [word for word, n in counts.items() if LEAST_PROMPTS <= n <= len(ids) - LEAST_PROMPTS]
        if not kept:
            raise ValueError(
                f"The cure 'erased' needs words that at least {LEAST_PROMPTS} training prompts have and as many lack."
            )
        spoken = torch.tensor([[float(word in own) for word in kept] for own in said])
        flat = tokens.flatten(0, 1).double()
        eraser = LeaceEraser.fit(flat, spoken.double().repeat_interleave(tokens.shape[1], 0))
        return lambda x: eraser(x.double()).float()

    # --- the ceiling ------------------------------------------------------------------------------

    @cached_property
    def _text_tokens(self) -> int:
        """Tokens of the longest caption, at most as many as the text encoder takes."""
        texts = [c.text for split in ("train", "test") for sample in iterate(self.data[split]) for c in sample.captions]
        lengths = [n for k in range(0, len(texts), 512) for n in self.model.tokens(texts[k : k + 512])[2]]
        return min(self.model.prompt_tokens, max(lengths))

    def _text(self, split: str, conditioning: str, ids: Sequence[str]) -> torch.Tensor:
        prompts = self.prompts(split, conditioning)
        given = [None if conditioning == NULL else prompts[i] for i in ids]
        rows = [self.model.encode_text(given[k : k + 64]).embeddings[:, : self._text_tokens] for k in range(0, len(given), 64)]
        return torch.cat(rows).float().cpu()


def describe(recording: Mapping[str, Any], samples: int) -> str:
    """One line a recording.

    >>> describe({"split": "test", "knockout": "", "timesteps": [50], "sites": ["S"], "maps": [], "conditionings": ["null", "caption"]}, 8)
    'test images: 16 forward passes, 1 site'
    """
    passes = samples * len(recording["timesteps"]) * len(recording["conditionings"])
    count = len(recording["sites"]) + len(recording["maps"])
    cut = f" without {recording['knockout']}" if recording["knockout"] else ""
    return f"{recording['split']} images{cut}: {passes} forward passes, {count} site{'s' * (count > 1)}"


__all__ = ["CURES", "TEXT", "Asked", "Features", "describe", "map_site"]
