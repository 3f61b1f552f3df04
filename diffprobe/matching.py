"""How well texts fit images, according to a diffusion model: items -> scores (item, image, text, timestep, draw).

Noise belongs to the item: all its images and texts share the noise of each (timestep, draw), so scores are compared under
equal noise.  A larger score is a better fit.

With e the drawn noise, e(c, t) the noise that the model predicts under text c, and A the cross-attention of a head:

``attention_lse_paper``
    The attention maps pooled by log-sum-exp: log of the sum over all token positions and places of exp(P), P = softmax(A)
    over tokens; mean over heads, then over every cross-attention layer.  (arXiv 2507.07106 says no more than "LogSumExp
    pooling of the cross-attention maps".)
``attention_lse_discffusion``
    What the code of He et al., "Discffusion", computes: L(c) + |e - e(null)| - |e - e(c)|.  L is the log-sum-exp over all
    token positions of the scaled scores before the softmax, its mean over places and heads, over the cross-attentions of
    the last block that has any in the down, mid and up part (the last transformer block of each), and over the pass with
    the text and the one with the null text, which share a batch there.
``denoising_loss``
    Minus the mean squared error of the predicted noise (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot
    Classifier"); a velocity is turned into noise first.
``denoising_loss_normalised``
    The null text's squared error minus the text's (Krojer et al. 2023, DiffusionITM).  For one image it orders texts as
    `denoising_loss` does; between images it takes out how hard each is to denoise.
``pooled_cosine``
    Cosine of a site's mean feature, under the null text and linearly mapped to text embeddings, with the text's embedding:
    a learned baseline.
``clip_cosine``
    Cosine of the embeddings of a `transformers.CLIPModel`.

The last two have no timesteps and draws: (item, image, text).  `diffprobe.probes.alignment` holds the formulas and the
benchmarks' rules of choice; this file calls the models.  Items are scored one by one and kept in one small NetCDF file,
from which an interrupted run resumes.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from diffprobe.checkpoints import weights_hash
from diffprobe.console import Console
from diffprobe.data import load_dataset
from diffprobe.data.benchmarks import Benchmark, Item, load_benchmark
from diffprobe.data.samples import Dataset
from diffprobe.forward import Batch, Engine, NotFiniteError, Row, to_pixels
from diffprobe.models import DiffusionModel, load_model, quiet, resolve
from diffprobe.probes import alignment
from diffprobe.recorder import Recorder
from diffprobe.rundir import check_request, whole_file
from diffprobe.sites import PREDICTION, Site, select_sites
from diffprobe.stats import Floats

TIMESTEPS = (189, 389, 589, 789, 989)  # the ensemble of arXiv 2507.07106, with 3 draws
_SAVE_SECONDS = 20.0
_PATH = re.compile(r"(down|mid|up)_block[s.]*(\d*)\.?attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2")


# --- log-sum-exp of cross-attention ---------------------------------------------------------------


def map_lse(maps: Float[Tensor, "row head token y x"]) -> Float[Tensor, " row"]:
    """Log of the sum over tokens and places of exp(probability), mean over heads.

    Summed in float64: two texts differ in the last digits of a sum of tens of thousands of terms near 1.
    """
    return maps.float().exp().flatten(2).sum(-1, dtype=torch.float64).log().mean(1)


def score_lse(
    query: Float[Tensor, "row channel y x"], key: Float[Tensor, "row channel token"], heads: int, scale: float
) -> Float[Tensor, " row"]:
    """Mean over heads and places of the log of the sum over tokens of exp(scale q.k)."""
    means = []
    for q, k in zip(query.float().flatten(2).split(4), key.float().split(4), strict=True):  # a few rows' scores at once
        scores = torch.einsum("rhcp,rhct->rhpt", q.unflatten(1, (heads, -1)) * scale, k.unflatten(1, (heads, -1)))
        means.append(scores.logsumexp(-1).mean((1, 2), dtype=torch.float64))
    return torch.cat(means)


def discffusion_sites(sites: Sequence[Site]) -> list[str]:
    """Names, without -Cross-Q or -Cross-K, of the cross-attentions that Discffusion's code reads.

    Raises:
        ValueError: the network has no down, mid and up part with cross-attention.

    >>> from diffprobe.sites import list_sites
    >>> attention = "attentions.0.transformer_blocks.0.attn2.to_q"
    >>> paths = [f"down_blocks.{n}.{attention}" for n in range(3)] + [f"mid_block.{attention}", f"up_blocks.1.{attention}"]
    >>> discffusion_sites(list_sites(paths))
    ['D-L2-R0-B0', 'M-R0-B0', 'U-L1-R0-B0']
    """
    found: dict[str, dict[tuple[int, int], tuple[int, str]]] = {}
    for site in sites:
        match = _PATH.match(site.path)
        if match and site.kind == "cross_query":
            part, level, attention, block = match[1], int(match[2] or 0), int(match[3]), int(match[4])
            last = found.setdefault(part, {})
            last[level, attention] = max(last.get((level, attention), (-1, "")), (block, site.name.removesuffix("-Cross-Q")))
    if set(found) != {"down", "mid", "up"}:
        raise ValueError(
            f"{alignment.DISCFFUSION} is defined on the down, mid and up part of a UNet, and this network has cross-attention in "
            f"{', '.join(found) or 'none of them'}; choose other scores, such as {alignment.PAPER}."
        )
    names = []
    for places in found.values():
        deepest = max(level for level, _ in places)
        names += [name for (level, _), (_, name) in places.items() if level == deepest]
    return names


# --- scores of one item ---------------------------------------------------------------------------


def _latents(engine: Engine, request: Mapping[str, Any], images: Sequence[Image.Image], ids: Sequence[str]) -> Tensor:
    size = (request["resolution"][0], request["resolution"][1])
    return engine.encode_images([to_pixels(image, size, request["fit"]) for image in images], ids)


class _Denoising:
    """The scores that take a forward pass for every (image, text, timestep, draw)."""

    def __init__(self, model: DiffusionModel, request: Mapping[str, Any], batch_rows: int) -> None:
        self.request, self.engine = request, Engine(model, seed=request["seed"], batch_rows=batch_rows)
        wanted = set(request["scores"])
        self.null = [None] if wanted & {alignment.NORMALISED, alignment.DISCFFUSION} else []
        modules: dict[str, Any] = dict(model.network.named_modules())
        paths = {site.name: site.path.removesuffix(".to_q") for site in model.sites}
        names = discffusion_sites(model.sites) if alignment.DISCFFUSION in wanted else []
        self.attentions = {name: modules[paths[f"{name}-Cross-Q"]] for name in names}
        sites = [f"{name}-Cross-{part}" for name in names for part in "QK"]
        sites += [PREDICTION] if wanted & {alignment.LOSS, alignment.NORMALISED, alignment.DISCFFUSION} else []
        self.recorder = Recorder(
            model, sites, maps="cross" if alignment.PAPER in wanted else (), heads="all", stop_early=True, keep_steps=False, reuse=True,
            reduce=lambda site, tensor: map_lse(tensor) if site.is_map else tensor,
        )  # fmt: skip
        self.passes = 0

    @torch.no_grad()
    def __call__(self, item: Item) -> dict[str, Floats]:
        """Scores (image, text, timestep, draw)."""
        request, texts = self.request, [*item.captions, *self.null]
        ids = [item.id] * len(item.images)  # noise belongs to the item
        latents = _latents(self.engine, request, [load() for load in item.images], ids)
        shape = (len(item.images), len(texts), len(request["timesteps"]), request["draws"])
        order = itertools.product(*(range(shape[axis]) for axis in (0, 1, 3, 2)))
        places = [(image, text, step, draw) for image, text, draw, step in order]
        rows = [Row(image, texts[text], request["timesteps"][step], draw) for image, text, step, draw in places]
        raw: dict[str, Floats] = {}
        with self.recorder as recorder:
            for batch in self.engine.run(recorder, latents, ids, rows):
                index = tuple(np.array(places[batch.first : batch.first + len(batch.rows)]).T)
                for name, scalars in self._scalars(batch).items():
                    values = scalars.cpu().numpy()
                    for bad in np.flatnonzero(~np.isfinite(values)):
                        row = batch.rows[int(bad)]
                        words = "the null text" if row.prompt is None else repr(row.prompt)
                        raise NotFiniteError(
                            f"Item {item.id!r}, image {row.image}, {words}, timestep {row.timestep}: {name} is not finite in "
                            f"{request['dtype']}. Try --dtype float32."
                        )
                    raw.setdefault(name, np.full(shape, np.nan))[index] = values
        self.passes += len(rows)
        return alignment.diffusion_scores(raw, request["scores"], len(item.captions), latents[0].numel())

    def _scalars(self, batch: Batch) -> dict[str, Tensor]:
        """(row,) of the squared error and of the attention's log-sum-exps."""
        held, values = batch.tensors, dict[str, Tensor]()
        if PREDICTION in held and batch.noise is not None:
            values["error"] = (held[PREDICTION].float() - batch.noise).double().square().mean((1, 2, 3))
        if maps := [lse for name, lse in held.items() if name.endswith("-Map")]:
            values["map_lse"] = torch.stack(maps).mean(0)
        layers = [score_lse(held[f"{n}-Cross-Q"], held[f"{n}-Cross-K"], a.heads, a.scale) for n, a in self.attentions.items()]
        return values | ({"score_lse": torch.stack(layers).mean(0)} if layers else {})


class _Pooled:
    """A site's mean feature, mapped to text: the learned baseline."""

    def __init__(self, model: DiffusionModel, request: Mapping[str, Any], batch_rows: int) -> None:
        self.model, self.request, self.engine = model, request, Engine(model, seed=request["seed"], batch_rows=batch_rows)
        self.site = select_sites([s for s in model.sites if not s.is_map and not s.over_tokens], request["site"])[0].name
        self.fitted: alignment.TextMap | None = None

    def __call__(self, item: Item) -> dict[str, Floats]:
        if self.fitted is None:  # on the first item: a file that is complete needs no training
            self.fitted = self.fit(load_dataset(self.request["train"]))
        features = self.features([load() for load in item.images], [item.id] * len(item.images))
        return {alignment.POOLED: self.fitted.cosine(features, self.texts(item.captions))}

    def fit(self, dataset: Dataset) -> alignment.TextMap:
        """Each image's feature against the mean embedding of its captions."""
        features, texts = [], []
        for start in range(0, len(dataset), self.engine.batch_rows):
            samples = [dataset[row] for row in range(start, min(start + self.engine.batch_rows, len(dataset)))]
            if bare := [sample.id for sample in samples if not sample.captions]:
                raise ValueError(
                    f"Sample {bare[0]!r} of {dataset.name} has no caption, and the map to text is learned from them."
                )
            features.append(self.features([sample.load() for sample in samples], [sample.id for sample in samples]))
            embedded = self.texts([caption.text for sample in samples for caption in sample.captions])
            ends = np.cumsum([len(sample.captions) for sample in samples])
            texts += [rows.mean(0) for rows in np.split(embedded, ends[:-1])]
        return alignment.fit_text_map(np.concatenate(features), np.stack(texts))

    def features(self, images: Sequence[Image.Image], ids: Sequence[str]) -> Floats:
        """(image, channel) means of the site over places, under the null text."""
        latents = _latents(self.engine, self.request, images, ids)
        rows = [Row(place, None, self.request["site_timestep"]) for place in range(len(ids))]
        with Recorder(self.model, self.site, stop_early=True, keep_steps=False, reuse=True) as recorder:
            means = [b.tensors[self.site].float().mean((2, 3)) for b in self.engine.run(recorder, latents, ids, rows)]
        return torch.cat(means).cpu().double().numpy()

    def texts(self, captions: Sequence[str]) -> Floats:
        """(text, width) means of the text encoder's output over the text's own tokens and its end token."""
        embeddings = self.model.encode_text(captions).embeddings.float().cpu().double().numpy()
        first = 0 if self.model.family == "pixart" else 1  # T5 has no start token
        lengths = self.model.tokens(captions)[2]
        return np.stack([row[first:length].mean(0) for row, length in zip(embeddings, lengths, strict=True)])


class _Clip:
    """A CLIP model's own cosine."""

    def __init__(self, source: str, device: torch.device) -> None:
        folder = resolve(source)
        try:
            with quiet(folder):
                self.model = CLIPModel.from_pretrained(folder, use_safetensors=True).eval().to(device)
                self.processor = CLIPProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"No CLIP model at {source!r}: it should be a folder or hub id with a CLIPModel and its processor ({error})."
            ) from error
        self.limit = int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, item: Item) -> dict[str, Floats]:
        options = {"padding": True, "truncation": True, "max_length": self.limit, "return_tensors": "pt"}
        inputs = self.processor(text=list(item.captions), images=[load() for load in item.images], **options)
        output = self.model(**inputs.to(self.model.device))
        image, text = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (output.image_embeds, output.text_embeds))
        return {alignment.CLIP: (image @ text.T).cpu().numpy()}


# --- the run --------------------------------------------------------------------------------------


def alignment_score(
    model: DiffusionModel | str,
    data: Benchmark | str,
    *,
    scores: Sequence[str] = alignment.DIFFUSION_SCORES,
    timesteps: Sequence[int] = TIMESTEPS,
    draws: int = 3,
    seed: int = 0,
    resolution: int | None = None,
    fit: str = "crop",
    batch_rows: int = 16,
    site: str = "U-L2-R1-B0-Cross-Q",
    site_timestep: int = 100,
    train: str = "shapes:600",
    clip: str = "shapes-clip",
    out: str | Path | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Score every (image, text) of a benchmark; the same call again goes on from its file.

    Args:
        model: A loaded model, or an id, folder or embedded name for `load_model`.
        data: A benchmark, or a spec for `load_benchmark`.
        scores: Names from this module's docstring; the first four come from the same passes.
        draws: Noise tensors at each timestep, which an item's images and texts share.
        resolution: Side of the model's image in pixels; the model's own by default.
        site, site_timestep, train: For pooled_cosine: where the feature is taken, and the captioned dataset (for
            `load_dataset`) that the map to text is learned from.
        clip: For clip_cosine: folder, hub id or embedded name of a CLIP model.
        out: NetCDF file that is written during the run; nothing is kept without it.

    Returns:
        One variable a score, (item, image, text, timestep, draw), or (item, image, text) for the two cosines; coordinates
        item, pattern, timestep; attributes `request` (JSON), `protocol`, `truncated_captions`, `passes`.

    Raises:
        ValueError: the request makes no sense, or `out` holds another one (the message lists the differences).
        NotFiniteError: a pass gave a value that is not finite.

    >>> found = alignment_score(load_model("shapes-sd"), load_benchmark("shapes-mmvp:45"))  # doctest: +SKIP
    >>> found.sizes["item"]  # doctest: +SKIP
    45
    """
    console = Console(stderr=True, quiet=not progress)
    benchmark = load_benchmark(data) if isinstance(data, str) else data
    model = load_model(model) if isinstance(model, str) else model
    _check_arguments(model, benchmark, scores, timesteps, draws)
    size = (resolution, resolution) if resolution else model.size
    model.latent_size(*size)
    passing = any(name in alignment.DIFFUSION_SCORES for name in scores)
    contrast = _Clip(clip, model.device) if alignment.CLIP in scores else None
    request: dict[str, Any] = {
        "model": model.model_id, "weights": model.weights_hash(), "benchmark": benchmark.name, "fingerprint": benchmark.fingerprint(),
        "scores": [name for name in alignment.SCORES if name in scores], "timesteps": list(timesteps) if passing else [],
        "draws": draws if passing else 0, "seed": seed, "resolution": list(size), "fit": fit,
        "site": site if alignment.POOLED in scores else "", "site_timestep": site_timestep if alignment.POOLED in scores else 0,
        "train": train if alignment.POOLED in scores else "", "clip": clip if contrast else "",
        "clip_weights": weights_hash(contrast.model) if contrast else "",
        "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    table = _table(benchmark, request, None if out is None else Path(out))
    pending = np.flatnonzero(table["done"].values == 0)
    if len(pending) == 0:
        return table
    lengths = [n for item in benchmark.items for n in model.tokens(item.captions)[2]]
    table.attrs["truncated_captions"] = sum(n > model.prompt_tokens for n in lengths)
    if table.attrs["truncated_captions"]:
        cut = f"{table.attrs['truncated_captions']} captions are longer than {model.prompt_tokens} tokens and are cut."
        console.print(cut, soft_wrap=True)
    denoising = _Denoising(model, request, batch_rows) if passing else None
    scorers: list[Callable[[Item], dict[str, Floats]]] = [
        *([denoising] if denoising else []),
        *([_Pooled(model, request, batch_rows)] if alignment.POOLED in scores else []),
        *([contrast] if contrast else []),
    ]
    before, saved = table.attrs["passes"], time.perf_counter()
    try:
        with console.progress("score", "items", len(benchmark), len(benchmark) - len(pending)) as advance:
            for index in pending:
                for scorer in scorers:
                    for name, values in scorer(benchmark.items[index]).items():
                        table[name].values[index] = values
                table["done"].values[index] = 1
                advance(1)
                if denoising:
                    table.attrs["passes"] = before + denoising.passes
                if out is not None and time.perf_counter() - saved > _SAVE_SECONDS:
                    _save(table, Path(out))
                    saved = time.perf_counter()
    finally:  # also when the user stops the run
        if out is not None:
            _save(table, Path(out))
    return table


def _check_arguments(
    model: DiffusionModel, benchmark: Benchmark, scores: Sequence[str], timesteps: Sequence[int], draws: int
) -> None:
    if unknown := [name for name in scores if name not in alignment.SCORES]:
        raise ValueError(f"Score {unknown[0]!r} is not one of {', '.join(alignment.SCORES)}.")
    if not scores or len(set(scores)) < len(scores):
        raise ValueError(f"Scores must be given, each once; got {', '.join(scores) or 'none'}.")
    if not timesteps or len(set(timesteps)) < len(timesteps) or draws < 1:
        raise ValueError(f"Timesteps must be given, each once, with at least one draw; got {list(timesteps)} and {draws}.")
    for timestep in timesteps:
        model.check_timestep(timestep)
    shapes = {(len(item.images), len(item.captions)) for item in benchmark.items}
    if len(shapes) != 1:
        raise ValueError(
            f"Items of {benchmark.name} must have the same numbers of images and captions; found {sorted(shapes)}."
        )


def _table(benchmark: Benchmark, request: dict[str, Any], out: Path | None) -> xr.Dataset:
    """The scores so far: those of an earlier run's file, else NaN."""
    if out is not None and out.exists():
        try:
            table = xr.load_dataset(out, engine="scipy")
            known = json.loads(table.attrs["request"])
            known.pop("prune", None)  # an option of earlier versions, which changed nothing for two texts
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"{out} exists and holds no alignment scores ({error}); give another file, or remove it."
            ) from error
        check_request(out, known, request, "holds another request; give another file, or match it.")
        return table
    images, texts = len(benchmark.items[0].images), len(benchmark.items[0].captions)
    pairs = (len(benchmark), images, texts)
    draws = (*pairs, len(request["timesteps"]), request["draws"])
    dims = ("item", "image", "text", "timestep", "draw")
    variables: dict[str, Any] = {
        name: (dims, np.full(draws, np.nan)) if name in alignment.DIFFUSION_SCORES else (dims[:3], np.full(pairs, np.nan))
        for name in request["scores"]
    }
    variables["done"] = ("item", np.zeros(len(benchmark), np.int8))
    coords: dict[str, Any] = {
        "item": [item.id for item in benchmark.items],
        "pattern": ("item", np.array([item.pattern for item in benchmark.items], object)),
    }
    if request["timesteps"]:
        coords["timestep"] = np.array(request["timesteps"], np.int32)
    attributes = {
        "request": json.dumps(request), "protocol": benchmark.protocol, "data": benchmark.spec,
        "truncated_captions": 0, "passes": 0,
    }  # fmt: skip
    return xr.Dataset(variables, coords, attributes)


def _save(table: xr.Dataset, out: Path) -> None:
    with whole_file(out) as beside:
        table.to_netcdf(beside, engine="scipy")
