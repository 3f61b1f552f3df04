"""Features for soft tokens: which text prompted them, how strongly, and what was done against leakage.

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
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from diffprobe.conditioning import NULL, assign_prompts
from diffprobe.data.samples import Dataset, iterate
from diffprobe.extraction import extract
from diffprobe.knockout import KnockedOut
from diffprobe.mllm.captions import words
from diffprobe.mllm.projector import soft_tokens
from diffprobe.models import DiffusionModel
from diffprobe.probes.causal import fit_leace
from diffprobe.recorder import site_shapes
from diffprobe.sites import select_sites
from diffprobe.store import PENDING, StoreError, exists, open_store, prompt_texts, provenance, read_maps
from diffprobe.store import features as stored_features

TEXT = "Text-Embeddings"  # the site of the ceiling: the text encoder's output for the prompt, without any image
MITIGATIONS = ("centred", "gated", "erased")
LEAST_PROMPTS = 5  # a word that fewer prompts have, or lack, is not erased: its covariance would be noise


class Pass(NamedTuple):
    """Forward passes over a split whose output at one site must have been recorded."""

    split: str
    knockout: str
    timestep: int
    site: str
    conditioning: str


@dataclass(frozen=True)
class FeatureSpec:
    """One array of features.

    Attributes:
        split: "train", "test" or "blank".
        site: a feature site's name, or `TEXT`.
        conditioning: which text is the prompt; `NULL` for none.
        guidance: s in f_u + s (f_c - f_u).
        mitigation: one of `MITIGATIONS`, or "".
        knockout: a route that is cut, as `diffprobe.knockout` names it, or "".
    """

    split: str
    site: str
    timestep: int
    conditioning: str
    guidance: float = 1.0
    mitigation: str = ""
    knockout: str = ""

    def at(self, conditioning: str, split: str = "", site: str = "") -> Pass:
        return Pass(split or self.split, self.knockout, self.timestep, site or self.site, conditioning)

    def passes(self) -> list[Pass]:
        """What must have been recorded."""
        if self.site == TEXT:
            return []
        found = [self.at(c) for c in dict.fromkeys((NULL, self.conditioning))]
        if self.mitigation == "gated" and self.conditioning != NULL:
            found.append(self.at(self.conditioning, site=map_site(self.site)))
        if self.mitigation == "erased":
            found += [self.at(c, split="train") for c in (NULL, "mismatched")]
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
        raise ValueError(f"The mitigation 'gated' needs a site in a transformer block; {site} has no attention map of its own.")
    return f"{block}-B0-Cross-Map"


class Features:
    """The features of one model on training, test and blank images.

    Args:
        grid: places of a site are averaged to at most this many per side.
        others: more stores to look in; those that were recorded with other settings are ignored.
        batch_rows: rows of one forward pass; found by timing if None, and then not the same in two runs.
    """

    def __init__(
        self, model: DiffusionModel, data: Mapping[str, Dataset], folder: Path, grid: int = 6, seed: int = 0,
        others: Sequence[str | Path] = (), batch_rows: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.folder, self.grid, self.seed = model, dict(data), Path(folder), grid, seed
        self.others, self.batch_rows = list(others), batch_rows
        self._opened: list[xr.DataTree] | None = None
        self._eraser = lru_cache(maxsize=4)(self._fit_eraser)
        self._array = lru_cache(maxsize=8)(self._read)
        self._weights = lru_cache(maxsize=8)(lambda knockout: self._model(knockout).weights_hash())

    # --- recording --------------------------------------------------------------------------------

    def missing(self, specs: Iterable[FeatureSpec]) -> list[dict[str, Any]]:
        """The recordings to be made: split, knockout, timesteps, sites, maps, conditionings; one store each."""
        lacking = [p for p in dict.fromkeys(p for spec in specs for p in spec.passes()) if self._find(p) is None]
        recordings = []
        for split, knockout in dict.fromkeys((p.split, p.knockout) for p in lacking):
            part = [p for p in lacking if (p.split, p.knockout) == (split, knockout)]
            sites = list(dict.fromkeys(p.site for p in part))
            recordings.append(
                {
                    "split": split,
                    "knockout": knockout,
                    "timesteps": sorted({p.timestep for p in part}),
                    "sites": [s for s in sites if not s.endswith("-Map")],
                    "maps": [s for s in sites if s.endswith("-Map")],
                    "conditionings": list(dict.fromkeys([NULL, *(p.conditioning for p in part)])),
                }
            )
        return recordings

    def record(self, recording: Mapping[str, Any], dry_run: bool = False, progress: bool = True) -> float:
        """Make one recording of `missing`; gives the forecast seconds of its forward passes (0 when done)."""
        digest = hashlib.sha256(json.dumps(dict(recording), sort_keys=True).encode()).hexdigest()[:8]
        sites = list(recording["sites"])
        summary = extract(
            self._model(recording["knockout"]), self.data[recording["split"]], self.folder / f"{recording['split']}_{digest}.zarr",
            sites=sites, maps=recording["maps"], timesteps=recording["timesteps"], conditionings=recording["conditionings"],
            reduce={site: self._rule(site) for site in sites} or "none", seed=self.seed, batch_rows=self.batch_rows,
            dry_run=dry_run, progress=progress and not dry_run,
        )  # fmt: skip
        self._opened = None  # there is a new one
        return summary.forecast.seconds if summary.forecast else 0.0

    def _model(self, knockout: str) -> DiffusionModel:
        return KnockedOut(self.model, knockout) if knockout else self.model

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return site_shapes(self.model.network, self.model.latent_size(*self.model.size), self.model.prompt_tokens)

    def _rule(self, site: str) -> str:
        """The reduction to the grid while recording; small sites stay as they are."""
        height, width = self._shapes[site][-2:]
        return "none" if max(height, width) <= self.grid else f"grid:{min(self.grid, height)}x{min(self.grid, width)}"

    def site_names(self, patterns: str | Sequence[str]) -> list[str]:
        """The feature sites over places that patterns name, and `TEXT` if it is among them."""
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        rest = [p for p in given if p != TEXT]
        there = [s for s in self.model.sites if not s.is_map and not s.over_tokens]
        return [*(s.name for s in (select_sites(there, rest) if rest else [])), *([TEXT] if TEXT in given else [])]

    # --- finding ----------------------------------------------------------------------------------

    def _stores(self) -> list[xr.DataTree]:
        """The complete stores, opened once."""
        if self._opened is None:
            paths = [path for path in (*self.others, *sorted(self.folder.glob("*.zarr"))) if exists(path)]
            whole = [p for p in paths if np.all(np.asarray(open_store(p, complete=False)["status"].values) != PENDING)]
            self._opened = [open_store(path) for path in whole]
        return self._opened

    def _find(self, wanted: Pass) -> xr.DataTree | None:
        """The first complete store that holds a pass and was recorded with our settings."""
        data = self.data[wanted.split]
        ours = {
            "fingerprint": data.fingerprint(), "samples": len(data), "seed": self.seed, "noise_draws": 1,
            "weights": self._weights(wanted.knockout), "latent_rule": "mean", "fit": "crop", "resolution": list(self.model.size),
        }  # fmt: skip
        for tree in self._stores():
            request, site = provenance(tree)["request"], wanted.site
            holds = (
                site in (*request["sites"], *request["maps"])
                and wanted.timestep in request["timesteps"]
                and wanted.conditioning in request["conditionings"]
                and (site not in request["sites"] or request["reduce"].get(site, "none") in ("none", self._rule(site)))
            )
            if holds and all(request[name] == value for name, value in ours.items()):
                return tree
        return None

    # --- reading ----------------------------------------------------------------------------------

    def tokens(self, spec: FeatureSpec, ids: Sequence[str]) -> Float[torch.Tensor, "sample token channel"]:
        """Features of the named samples as tokens."""
        if spec.site == TEXT:
            return self._text(spec.split, spec.conditioning, ids)
        values = null = self._array(spec.at(NULL))
        if spec.mitigation == "gated":
            values = null * self._gate(spec, (null.sizes["y"], null.sizes["x"]))
        elif spec.conditioning != NULL and spec.guidance != 0:
            difference = self._array(spec.at(spec.conditioning)) - null
            if spec.mitigation == "centred":
                difference = difference - difference.mean(("y", "x"))
            values = null + spec.guidance * difference
        known = {name: row for row, name in enumerate(values["sample"].values.tolist())}
        tokens = soft_tokens(torch.from_numpy(np.ascontiguousarray(values.values[[known[i] for i in ids]])), self.grid)
        if spec.mitigation == "erased":
            erase = self._eraser(spec.timestep, spec.site, spec.guidance, spec.knockout)
            tokens = erase(tokens.flatten(0, 1)).view(tokens.shape)
        return tokens.contiguous()

    def ids(self, split: str) -> list[str]:
        """The samples of a split that every store of it holds complete."""
        names = [sample.id for sample in iterate(self.data[split])]
        fingerprint = self.data[split].fingerprint()
        for tree in self._stores():
            if provenance(tree)["request"]["fingerprint"] == fingerprint:
                there = set(np.asarray(tree["sample"].values).tolist())
                names = [name for name in names if name in there]
        return names

    def prompts(self, split: str, conditioning: str) -> dict[str, str]:
        """The prompt of each sample by sample id; empty for none."""
        samples = list(iterate(self.data[split]))
        texts = assign_prompts(samples, [conditioning])[conditioning]
        return {sample.id: text or "" for sample, text in zip(samples, texts, strict=True)}

    def _read(self, wanted: Pass) -> xr.DataArray:
        tree = self._find(wanted)
        if tree is None:
            raise StoreError(
                f"No store in {self.folder} holds {wanted.site} at timestep {wanted.timestep} under {wanted.conditioning!r} "
                f"for the {wanted.split} images."
            )
        found = stored_features(tree, wanted.site, timestep=wanted.timestep, conditioning=wanted.conditioning)
        return found.astype(np.float32).load().drop_vars(("conditioning", "timestep"), errors="ignore")

    def _gate(self, spec: FeatureSpec, size: tuple[int, int]) -> Float[np.ndarray, "sample 1 y x"]:
        """Where the text's words attend, of mean 1 over the places; 1 if there are no words."""
        if spec.conditioning == NULL:
            return np.ones((1, 1, 1, 1), np.float32)
        site = map_site(spec.site)
        tree = self._find(spec.at(spec.conditioning, site=site))
        assert tree is not None
        prompts = prompt_texts(tree, spec.conditioning)
        spelled = (prompts["token_end"] > prompts["token_start"]).values
        wanted = [(row, np.flatnonzero(letters).tolist()) for row, letters in enumerate(spelled)]
        maps = torch.from_numpy(read_maps(tree, site, wanted, spec.conditioning, spec.timestep, merge="sum").values[:, 0])
        maps = torch.nn.functional.adaptive_avg_pool2d(maps, size)
        mean = maps.mean((2, 3), keepdim=True)
        return torch.where(mean > 0, maps / mean.clamp(min=1e-12), 1.0).numpy()

    def _fit_eraser(self, timestep: int, site: str, guidance: float, knockout: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """LEACE (Belrose et al. 2023): the affine map that makes the prompt's words linearly unreadable and changes least.

        It is fitted under mismatched prompts, whose words say nothing of the image: it erases the text, not what was seen.
        """
        ids = self.ids("train")
        tokens = self.tokens(FeatureSpec("train", site, timestep, "mismatched", guidance, knockout=knockout), ids)
        prompts = self.prompts("train", "mismatched")
        said = [set(words(prompts[i])) for i in ids]
        counts = {word: sum(word in own for own in said) for word in sorted(set().union(*said))}
        kept = [word for word, n in counts.items() if LEAST_PROMPTS <= n <= len(ids) - LEAST_PROMPTS]
        if not kept:
            raise ValueError(
                f"The mitigation 'erased' needs words that at least {LEAST_PROMPTS} training prompts have and as many lack."
            )
        spoken = np.array([[float(word in own) for word in kept] for own in said])
        eraser = fit_leace(tokens.flatten(0, 1).numpy(), spoken.repeat(tokens.shape[1], axis=0))
        return lambda x: torch.from_numpy(eraser(x.numpy()).astype(np.float32))

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
    """One line about a recording.

    >>> describe({"split": "test", "knockout": "", "timesteps": [50], "sites": ["S"], "maps": [], "conditionings": ["null", "caption"]}, 8)
    'test images: 16 forward passes, 1 site'
    """
    passes = samples * len(recording["timesteps"]) * len(recording["conditionings"])
    count = len(recording["sites"]) + len(recording["maps"])
    cut = f" without {recording['knockout']}" if recording["knockout"] else ""
    return f"{recording['split']} images{cut}: {passes} forward passes, {count} site{'s' * (count > 1)}"
