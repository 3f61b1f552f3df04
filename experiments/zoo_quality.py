"""What the embedded shapes-sd can and cannot do, measured on held-out drawings; the numbers of its model card.

    python experiments/zoo_quality.py [--count 256]

Claims: the autoencoder gives drawings back (PSNR); the true caption has a lower denoising loss than one whose attributes, or
whose relation, are swapped (chance 50%); a noun's cross-attention points into its object's mask (chance: the mask's
share of the image).  Reading generated images by an independent reader is not measured yet.
Writes figures/zoo_quality.{png,pdf,csv,json}; about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diffprobe import attention_maps, extract, load_model, open_store
from diffprobe.data import ShapesDataset
from diffprobe.data.images import fit_masks
from diffprobe.data.twins import TwinsDataset
from diffprobe.models import DiffusionModel, EncodedText
from diffprobe.noise import sample_noise
from diffprobe.plotting import plot_scores, save_figure
from diffprobe.stats import bootstrap_interval, wilson_interval
from diffprobe.zoo.recipe import drawn

TIMESTEPS = (100, 250, 400, 550, 700)
SITES = ("D-L1-R1", "D-L2-R0", "D-L2-R1", "U-L1-R0", "U-L1-R1", "U-L1-R2", "U-L2-R0", "U-L2-R1", "U-L2-R2")


def row(what: str, value: float, low: float, high: float, n: int, chance: float, **more: Any) -> dict[str, Any]:
    return {"what": what, "value": value, "low": low, "high": high, "n": n, "chance": chance, **more}


@torch.no_grad()
def reconstruction(model: DiffusionModel, count: int) -> Iterator[dict[str, Any]]:
    """Mean PSNR of held-out scenes through the autoencoder, in dB."""
    dataset, values = ShapesDataset(count, "test"), []
    for start in range(0, count, 32):
        pixels = torch.from_numpy(np.stack([drawn(dataset.scene(i)) for i in range(start, min(start + 32, count))]))
        decoded = model.pipeline.vae.decode(model.pipeline.vae.encode(pixels).latent_dist.mean).sample
        values += (10 * torch.log10(4 / (decoded.clamp(-1, 1) - pixels).square().mean((1, 2, 3)))).tolist()
    yield row("PSNR (dB)", float(np.mean(values)), *bootstrap_interval(values), count, np.nan)


def matching(model: DiffusionModel, count: int) -> Iterator[dict[str, Any]]:
    """How often the true caption's denoising loss is below its twin's, noise shared; each image of a quadruple counts once."""
    twins = TwinsDataset("winoground", count // 2)
    wins: dict[str, list[bool]] = {"attribute": [], "relation": []}
    for number in range(len(twins)):
        pair = twins.pair(number // 2)
        sample = twins[number]
        latent = model.encode_image(torch.from_numpy(drawn(pair.scenes[number % 2]))[None])
        text = model.encode_text([c.text for c in pair.captions])
        noise = torch.stack([sample_noise(0, sample.id, t, draw, latent.shape[1:]) for t in TIMESTEPS for draw in range(2)])
        steps = torch.tensor(TIMESTEPS).repeat_interleave(2)
        errors = [loss(model, latent.expand_as(noise), noise, steps, text.take([side] * len(noise))) for side in (0, 1)]
        wins[pair.pattern].append(errors[number % 2] < errors[1 - number % 2])
    for pattern, hits in wins.items():
        yield row(
            f"true caption beats {pattern} swap", float(np.mean(hits)), *wilson_interval(sum(hits), len(hits)), len(hits), 0.5
        )


def loss(model: DiffusionModel, latents: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, text: EncodedText) -> float:
    predicted = model.denoise(model.add_noise(latents, noise, steps), steps, text)
    assert predicted is not None
    return float((predicted - noise).square().mean())


def pointing(model: DiffusionModel, count: int) -> Iterator[dict[str, Any]]:
    """Pointing game of the first object's noun: does the map's highest place lie in the object's mask?"""
    dataset = ShapesDataset(count, "test", n_objects=2)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "maps.zarr"
        maps = [f"{site}-B0-Cross-Map" for site in SITES]
        extract(model, dataset, out, sites=(), maps=maps, timesteps=(50, 250, 500), conditionings=("caption",))
        tree = open_store(out)
        hits: dict[tuple[str, int], list[bool]] = {}
        areas = []
        for index in range(count):
            sample = dataset[index]
            if len({o["shape"] for o in sample.objects}) < 2:
                continue  # "a red star left of a blue star": which star a map means is not ours to say
            side = model.resolution
            mask = fit_masks(sample.masks(), (side, side))[0]
            areas.append(mask.mean())
            one = tree.isel(sample=[index])
            one.attrs = tree.attrs
            for name in maps:
                for heat in attention_maps(one, str(sample.objects[0]["shape"]), site=name).isel(sample=0):
                    y, x = np.unravel_index(int(heat.values.argmax()), heat.shape)
                    scale = side / heat.shape[0]
                    hit = bool(mask[int((y + 0.5) * scale), int((x + 0.5) * scale)])
                    hits.setdefault((name.removesuffix("-B0-Cross-Map"), int(heat["timestep"])), []).append(hit)
    for (site, timestep), found in hits.items():
        interval = wilson_interval(sum(found), len(found))
        yield row(f"pointing, {site}", float(np.mean(found)), *interval, len(found), float(np.mean(areas)), timestep=timestep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-sd")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    parts = (reconstruction, matching, pointing)
    frame = pd.DataFrame([found for part in parts for found in part(model, arguments.count)]).assign(seed=0)
    print(frame.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    config = {"model": arguments.model, "count": arguments.count, "weights": model.weights_hash(), "seed": 0}
    alt = "Share of correct answers of shapes-sd by test, with 95% intervals and chance."
    save_figure(plot_scores(frame[frame["what"] != "PSNR (dB)"]), arguments.out, "zoo_quality", frame, config, alt)


if __name__ == "__main__":
    main()
