"""What the embedded models can and cannot do, measured on held-out drawings; the numbers of their model cards.

    python experiments/zoo_quality.py [--only vae,samples,matching,pointing,clip,lm] [--count 256] [--smoke] [--from-csv]

shapes-sd: the autoencoder gives drawings back (PSNR); pictures generated from held-out prompts, read by an independent network
that was trained on drawn images alone, hold the asked colour and shape, both of two objects, and their relation; the true
caption has a lower denoising loss than its twin (chance 50%); a noun's cross-attention points into its object's mask
(chance: the mask's share of the image).  shapes-clip finds a scene among 100 by what its captions say, and cannot choose
between images that differ in what they leave out.  shapes-lm answers from a description.
Writes figures/zoo_quality.{png,pdf,csv,json,npz} and pictures _samples, _clip, _lm; 30 minutes on two cores, of which the
reader takes ten once (it is kept in the work folder).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffprobe.experiment import Claim, Experiment, Options, Result, verdict
from diffprobe.plotting import plot_samples, plot_scores

TIMESTEPS = (100, 250, 400, 550, 700)
SITES = ("D-L1-R1", "D-L2-R0", "D-L2-R1", "U-L1-R0", "U-L1-R1", "U-L1-R2", "U-L2-R0", "U-L2-R1", "U-L2-R2")
GUIDANCE, STEPS, BATCH = 4.0, 25, 25
SHOWN = 12  # pictures of one object, and as many of two, in the grid
SMOKE_READER_STEPS = 8
WIDTH = 5.5  # inches; the names are long
PSNR = "autoencoder: PSNR (dB)"
ONE, BOTH, HOLDS = (
    "generated: one object, colour and shape",
    "generated: both of two objects",
    "generated: relation, both there",
)

Rows = Iterator[dict[str, Any]]


# --- shapes-sd ------------------------------------------------------------------------------------


def reconstruction(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """Mean PSNR of held-out scenes through the autoencoder, in dB."""
    import torch

    from diffprobe.data import ShapesDataset
    from diffprobe.zoo.measure import mean

    dataset, values = ShapesDataset(options.count, "test", options.seed), []
    for start in range(0, options.count, 32):
        pixels = _drawn([dataset.scene(i) for i in range(start, min(start + 32, options.count))])
        values += (10 * torch.log10(4 / (_through_autoencoder(model, pixels) - pixels).square().mean((1, 2, 3)))).tolist()
    yield mean(PSNR, values)


def _drawn(scenes: Sequence[Any]) -> Any:
    import torch

    from diffprobe.zoo.recipe import drawn

    return torch.from_numpy(np.stack([drawn(scene) for scene in scenes]))


def _through_autoencoder(model: Any, pixels: Any) -> Any:
    import torch

    vae = model.pipeline.vae
    with torch.no_grad():
        return vae.decode(vae.encode(pixels.to(model.device)).latent_dist.mean).sample.clamp(-1, 1).cpu()


def samples(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """Pictures from held-out prompts, half of one object, half of two and their relation, read by `zoo.reader`.

    Beside them, the reader's own share right on drawn images and on drawn images through the autoencoder (a ceiling), and
    chance: how often a picture made for another prompt holds what this prompt asks for.
    """
    import torch

    from diffprobe.data import ShapesDataset, shapes
    from diffprobe.zoo.measure import share
    from diffprobe.zoo.reader import train_reader

    torch.manual_seed(options.seed)
    folder = options.work / ("zoo_reader_smoke" if options.smoke else "zoo_reader")
    reader = train_reader(folder, steps=SMOKE_READER_STEPS) if options.smoke else train_reader(folder)
    half = min(250, options.count)
    singles = [shapes.random_scene(options.seed, i, "test", 1) for i in range(half)]
    pairs = _related(ShapesDataset(4 * half, "test", options.seed, 2), half)
    unseen = [shapes.random_scene(options.seed, i, "compositional", 1) for i in range(max(4, half // 5))]
    for name, change in (("drawn", lambda x: x), ("drawn, autoencoded", lambda x: _through_autoencoder(model, x))):
        ones, twos = reader.read(change(_drawn(singles))), reader.read(change(_drawn(pairs)))
        yield share(f"{name}: one object, colour and shape", [_holds(f, s) for f, s in zip(ones, singles, strict=True)], np.nan)
        yield share(f"{name}: both of two objects", [_holds(f, s) for f, s in zip(twos, pairs, strict=True)], np.nan)
        both = [(f, s) for f, s in zip(twos, pairs, strict=True) if _holds(f, s)]
        if both:
            yield share(f"{name}: relation, both there", [_relation_holds(f, s) for f, s in both], 0.5)

    prompts = [shapes.caption(s, "list").text for s in singles], [shapes.caption(s, "relation").text for s in pairs]
    images = [_generated(model, texts, options.seed + place) for place, texts in enumerate(prompts)]
    ones, twos = (reader.read(made * 2 - 1) for made in images)
    hits = [_holds(f, s) for f, s in zip(ones, singles, strict=True)]
    wrong = [_holds(f, s) for f, s in zip(ones[1:] + ones[:1], singles, strict=True)]
    yield share(ONE, hits, float(np.mean(wrong)))
    for part in ("colour", "shape"):
        asked = [
            any(getattr(one, part) == getattr(s.objects[0], part) for one in f) for f, s in zip(ones, singles, strict=True)
        ]
        moved = ones[1:] + ones[:1]
        other = [
            any(getattr(one, part) == getattr(s.objects[0], part) for one in f) for f, s in zip(moved, singles, strict=True)
        ]
        yield share(f"generated: one object, its {part}", asked, float(np.mean(other)))
    alone = [hit and len(f) == 1 for hit, f in zip(hits, ones, strict=True)]
    yield share("generated: one object and nothing else", alone, np.nan)
    hits = [_holds(f, s) for f, s in zip(twos, pairs, strict=True)]
    wrong = [_holds(f, s) for f, s in zip(twos[1:] + twos[:1], pairs, strict=True)]
    yield share(BOTH, hits, float(np.mean(wrong)))
    placed = [_relation_holds(f, s) for f, s, hit in zip(twos, pairs, hits, strict=True) if hit]
    if placed:
        yield share(HOLDS, placed, 0.5)
    made = _generated(model, [shapes.caption(s, "list").text for s in unseen], options.seed + 2)
    hits = [_holds(f, s) for f, s in zip(reader.read(made * 2 - 1), unseen, strict=True)]
    yield share("generated: one object of a pair never trained on", hits, np.nan)
    shown = min(SHOWN, half)
    grid = torch.cat([found[:shown] for found in images])
    pictures["samples"] = (grid.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    pictures["prompts"] = np.array([text for texts in prompts for text in texts[:shown]])
    pictures["read"] = np.array(
        [", ".join(f"{o.colour} {o.shape}" for o in f) or "nothing" for read in (ones, twos) for f in read[:shown]]
    )


def _related(dataset: Any, count: int) -> list[Any]:
    """Scenes of two objects whose names differ, so that a prompt can say how they stand."""
    scenes = (dataset.scene(i) for i in range(len(dataset)))
    return [s for s in scenes if s.objects[0].pair != s.objects[1].pair][:count]


def _holds(found: Sequence[Any], scene: Any) -> bool:
    """Whether each object's colour and shape is among those found."""
    return all(any(one.pair == obj.pair for one in found) for obj in scene.objects)


def _relation_holds(found: Sequence[Any], scene: Any) -> bool:
    """Whether the first object lies on the asked side of the second, on the axis that was asked about."""
    from diffprobe.data import shapes
    from diffprobe.zoo.reader import place_of

    first, second = (place_of(found, obj.pair) for obj in scene.objects)
    assert first is not None and second is not None
    where = shapes.relation(*scene.objects)
    apart = first.x - second.x if where in ("left of", "right of") else first.y - second.y
    return bool(apart < 0) == (where in ("left of", "above"))


def _generated(model: Any, prompts: Sequence[str], seed: int) -> Any:
    """Pictures (prompt, 3, y, x) from 0 to 1; each has its own noise, whatever batch it is in."""
    import torch

    made = []
    for start in range(0, len(prompts), BATCH):
        texts = list(prompts[start : start + BATCH])
        noise = [torch.Generator().manual_seed(1_000_000 * seed + start + place) for place in range(len(texts))]
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
        made.append(model.pipeline(texts, generator=noise, **options).images.float().cpu())
    return torch.cat(made)


def matching(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """How often the true caption's denoising loss is below its twin's, noise shared; both images of a quadruple count."""
    import torch

    from diffprobe.data.twins import TwinsDataset
    from diffprobe.noise import sample_noise
    from diffprobe.zoo.measure import share

    twins = TwinsDataset("winoground", options.count, options.seed)
    wins: dict[str, list[bool]] = {"attribute": [], "relation": []}
    steps = torch.tensor(TIMESTEPS).repeat_interleave(2)
    for number in range(len(twins)):
        pair, sample = twins.pair(number // 2), twins[number]
        latent = model.encode_image(_drawn([pair.scenes[number % 2]]))
        text = model.encode_text([c.text for c in pair.captions])
        noise = torch.stack(
            [sample_noise(options.seed, sample.id, t, draw, latent.shape[1:]) for t in TIMESTEPS for draw in range(2)]
        ).to(latent.device)
        noised = model.add_noise(latent.expand_as(noise), noise, steps)
        errors = []
        for side in (0, 1):
            predicted = model.denoise(noised, steps, text.take([side] * len(noise)))
            errors.append(float((predicted - noise).square().mean()))
        wins[pair.pattern].append(errors[number % 2] < errors[1 - number % 2])
    for pattern, hits in wins.items():
        quadruples = np.arange(len(hits)) // 2
        yield share(f"denoising loss: true caption beats {pattern} swap", hits, 0.5, quadruples.tolist())


def pointing(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """Pointing game of the first object's noun: does the map's highest place lie in the object's mask?"""
    from diffprobe import attention_maps, extract, open_store
    from diffprobe.data import ShapesDataset
    from diffprobe.data.images import fit_masks
    from diffprobe.zoo.measure import share

    dataset = ShapesDataset(options.count, "test", options.seed, n_objects=2)
    hits: dict[tuple[str, int], list[bool]] = {}
    areas = []
    with tempfile.TemporaryDirectory() as folder:
        maps = [f"{site}-B0-Cross-Map" for site in SITES]
        out = f"{folder}/maps.zarr"
        extract(model, dataset, out, sites=(), maps=maps, timesteps=(50, 250, 500), conditionings=("caption",))
        tree = open_store(out)
        for index in range(options.count):
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
        yield share(f"pointing, {site}", found, float(np.mean(areas)), timestep=timestep)


# --- shapes-clip, shapes-lm -----------------------------------------------------------------------


def clip(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    from transformers import CLIPModel, CLIPProcessor

    from diffprobe.zoo import locate
    from diffprobe.zoo.measure import clip_rows

    folder = locate("shapes-clip")
    return clip_rows(
        CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder), options.count, options.seed
    )


def language(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from diffprobe.zoo import locate
    from diffprobe.zoo.measure import lm_rows

    folder = locate("shapes-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return lm_rows(
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).float().eval(),
        tokenizer,
        options.count,
        options.seed,
    )


# --- the experiment -------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Any, Options, dict[str, Any]], Rows]] = {
    "vae": reconstruction,
    "samples": samples,
    "matching": matching,
    "pointing": pointing,
    "clip": clip,
    "lm": language,
}


def measure(options: Options, parts: Sequence[str]) -> Result:
    from diffprobe import load_model

    model = load_model(options.model, options.device)
    pictures: dict[str, Any] = {}
    rows = []
    for part in parts:
        for row in PARTS[part](model, options, pictures):
            rows.append({"part": part, **row, "seed": options.seed})
            print(
                f"{part:9} {row['what']:58} {row['value']:7.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}", flush=True
            )
    config = {"parts": list(parts), "weights": model.weights_hash(), "guidance": GUIDANCE, "steps": STEPS}
    return Result(pd.DataFrame(rows), pictures, config)


def judge(rows: pd.DataFrame) -> list[Claim]:
    """The targets that the models were built for."""
    by_name = {row["what"]: row for _, row in rows.iterrows()}
    targets = [
        (PSNR, 28.0, "the autoencoder gives held-out drawings back with at least 28 dB"),
        (ONE, 0.85, "a single object has the asked colour and shape in at least 85% of generated pictures"),
        (BOTH, 0.60, "both of two objects are there in at least 60%"),
        ("denoising loss: true caption beats attribute swap", 0.9, "the true caption beats an attribute swap in at least 90%"),
        ("denoising loss: true caption beats relation swap", 0.7, "the true caption beats a relation swap in at least 70%"),
        ("CLIP: image from caption, of 100", 0.6, "shapes-clip finds the image among 100 in at least 60%"),
    ]
    claims = [
        Claim(f"Z{number}", text, verdict(by_name[name]["low"], by_name[name]["high"], target), _evidence(by_name[name]))
        for number, (name, target, text) in enumerate(targets, 1)
        if name in by_name
    ]
    points = rows[rows["what"].str.startswith("pointing")]
    if len(points):
        best = points.loc[points["value"].idxmax()]
        text = "a noun's cross-attention at its best site points into the object's mask at least five times as often as chance"
        claims.append(Claim("Z7", text, verdict(best["low"], best["high"], 5 * best["chance"]), _evidence(best)))
    silent = rows[(rows["part"] == "clip") & (rows.get("kind") == "silent")]
    if len(silent):
        cosines = silent[silent["what"].str.contains("cosine")]
        worst = cosines.loc[cosines["value"].idxmin()]
        text = "images that differ in what shapes-clip's captions leave out have a cosine above 0.95"
        claims.append(Claim("Z8", text, verdict(worst["low"], worst["high"], 0.95), f"lowest: {_evidence(worst)}"))
        choices = silent[silent["what"].str.contains("choice")]
        blind = bool(((choices["low"] <= 0.5) & (choices["high"] >= 0.5)).all())
        text = "between two such images shapes-clip chooses at chance (every interval holds 50%)"
        claims.append(
            Claim("Z9", text, "held" if blind else "not held", "; ".join(_evidence(r) for _, r in choices.iterrows()))
        )
    for name in ("LM: existence", "LM: colour", "LM: shape"):
        if name in by_name:
            row = by_name[name]
            text = f"shapes-lm answers questions of {name[4:]} from a description in at least 90%"
            claims.append(Claim(f"Z10 {name[4:]}", text, verdict(row["low"], row["high"], 0.9), _evidence(row)))
    return claims


def _evidence(row: Mapping[str, Any] | pd.Series) -> str:
    chance = "" if np.isnan(row["chance"]) else f", chance {row['chance']:.2f}"
    return f"{row['what']} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n {row['n']}{chance}"


def draw(result: Result) -> dict[str, Figure]:
    rows, figures = result.rows, {}
    points = rows[rows["part"] == "pointing"]
    best = points[points["what"] == points.loc[points["value"].idxmax(), "what"]] if len(points) else points
    sd = pd.concat([rows[rows["part"].isin(["samples", "matching"])], best])
    figures[""] = plot_scores(sd if len(sd) else rows[rows["high"] <= 1], width=WIDTH)
    if "samples" in result.pictures:
        texts = [
            f"{prompt}\n(read: {read})"
            for prompt, read in zip(result.pictures["prompts"], result.pictures["read"], strict=True)
        ]
        figures["samples"] = plot_samples(result.pictures["samples"], texts)
    for part in ("clip", "lm"):
        found = rows[(rows["part"] == part) & (rows["high"] <= 1)]
        if len(found):
            figures[part] = plot_scores(found, width=WIDTH)
    return figures


ALT = {
    "": "Share of correct answers of shapes-sd by test (pointing: its best site), with 95% intervals and chance.",
    "samples": "Pictures that shapes-sd generated from held-out prompts, each with its prompt and what the reader saw.",
    "clip": "shapes-clip: retrieval, cosines of pairs and choices between their images by pattern, with intervals and chance.",
    "lm": "shapes-lm: share of right answers by category of question, with 95% intervals and chance.",
}


def experiment(parts: Sequence[str] = tuple(PARTS)) -> Experiment:
    """The experiment with some of its parts.

    Raises:
        ValueError: there is no such part.
    """
    wrong = [part for part in parts if part not in PARTS]
    if wrong:
        raise ValueError(f"Part {wrong[0]!r} is not one of {', '.join(PARTS)}.")
    return Experiment(
        name="zoo_quality", title="What the embedded models can and cannot do", count=256, smoke_count=12,
        measure=lambda options: measure(options, parts), judge=judge, draw=draw, alt=ALT,
    )  # fmt: skip


EXPERIMENT = experiment()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", default=",".join(PARTS))
    given, rest = parser.parse_known_args(arguments)
    experiment(given.only.split(",")).main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
