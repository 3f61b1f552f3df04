"""What the embedded models can and cannot do, measured on held-out drawings; the numbers of their model cards.

    python -m experiments.zoo_quality [--only vae,samples,matching,pointing,clip,lm] [--count 256] [--smoke] [--from-csv]

shapes-sd: the autoencoder gives drawings back (PSNR); pictures generated from held-out prompts, read by an independent network
that was trained on drawn images alone, hold the asked colour and shape, both of two objects, and their relation; the true
caption has a lower denoising loss than its twin (chance 50%); a noun's cross-attention points into its object's mask
(chance: the mask's share of the image).  shapes-clip finds a scene among 100 by what its captions say, and cannot choose
between images that differ in what they leave out.  shapes-lm answers from a description, and from the truth as soft tokens.
Writes figures/zoo_quality.{png,pdf,csv,json,npz} and pictures _samples, _clip, _lm; 30 minutes on two cores, of which the
reader takes ten once (it is kept in the work folder).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.figures import plot_samples, plot_scores
from experiments.framework import Claim, Experiment, Options, Result, record_words, verdict

TIMESTEPS = (100, 250, 400, 550, 700, 900)
LATE = 900  # the prompt decides here; an attribute swap is scored at it alone too
GUIDANCE, STEPS, BATCH = 4.0, 25, 25
SHOWN = 12  # pictures of one object, and as many of two, in the grid
MAIN_SITE = "U-L1-R1-B0-Cross-Q"
PROBED = 2000  # scenes for the probes around objects
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
    """Mean PSNR of held-out scenes through the autoencoder, in dB, and what the reader reads in what it gives back.

    An attribute is read of every object that a question may ask it of: directions of arrows and wedges, marks of large
    objects, fills of large ones that are wide enough.
    """
    import torch

    from diffprobe.data import ShapesDataset
    from diffprobe.zoo.reader import FACTORS, load_reader
    from recipes.measure import mean, share

    dataset, values = ShapesDataset(options.count, "test", options.seed), []
    reader, right = load_reader(), {"count": [], **{name: [] for name in FACTORS}}
    owners: dict[str, list[int]] = {name: [] for name in right}
    for start in range(0, options.count, 32):
        scenes = [dataset.scene(i) for i in range(start, min(start + 32, options.count))]
        pixels = _drawn(scenes)
        given = _through_autoencoder(model, pixels)
        values += (10 * torch.log10(4 / (given - pixels).square().mean((1, 2, 3)))).tolist()
        for number, (scene, found) in enumerate(zip(scenes, reader.read(given), strict=True), start):
            right["count"].append(len(found) == len(scene.objects))
            owners["count"].append(number)
            for obj in scene.objects:
                near = min(found, key=lambda one: np.hypot(one.x - obj.x, one.y - obj.y), default=None)
                for name in FACTORS:
                    if _can_be_asked(obj, name):
                        right[name].append(near is not None and getattr(near, name) == getattr(obj, name))
                        owners[name].append(number)
    yield mean(PSNR, values)
    for name, hits in right.items():
        yield share(f"autoencoder: {name} read in what it gives back", hits, np.nan, owners[name])


def _can_be_asked(obj: Any, attribute: str) -> bool:
    from diffprobe.data.shapes import DIRECTED
    from diffprobe.data.twins import ROOMY

    if attribute == "direction":
        return obj.shape in DIRECTED
    if attribute in ("mark", "fill"):
        return obj.size == "large" and (attribute == "mark" or obj.shape in ROOMY)
    return True


def _drawn(scenes: Sequence[Any]) -> Any:
    import torch

    from recipes.common import drawn

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
    from diffprobe.zoo.reader import load_reader
    from recipes.measure import share

    reader = load_reader()
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
    """How often the true caption's denoising loss is below its twin's, noise shared; both images of a quadruple count.

    Over all timesteps, each counting the same, and at the last alone.
    """
    import torch

    from diffprobe.data.twins import TwinsDataset
    from diffprobe.noise import sample_noise
    from recipes.measure import share

    twins = TwinsDataset("winoground", options.count, options.seed)
    wins: dict[tuple[str, bool], list[bool]] = {}
    draws = 4
    steps = torch.tensor(TIMESTEPS).repeat_interleave(draws)
    for number in range(len(twins)):
        pair, sample = twins.pair(number // 2), twins[number]
        latent = model.encode_image(_drawn([pair.scenes[number % 2]]))
        text = model.encode_text([c.text for c in pair.captions])
        noise = torch.stack(
            [sample_noise(options.seed, sample.id, t, draw, latent.shape[1:]) for t in TIMESTEPS for draw in range(draws)]
        ).to(latent.device)
        noised = model.add_noise(latent.expand_as(noise), noise, steps)
        errors = []
        for side in (0, 1):
            predicted = model.denoise(noised, steps, text.take([side] * len(noise)))
            errors.append((predicted - noise).square().mean((1, 2, 3)).double())
        difference = errors[number % 2] - errors[1 - number % 2]
        scale = (errors[0] + errors[1]).clamp(min=1e-12)  # an error grows many times as noise falls
        wins.setdefault((pair.pattern, False), []).append(bool((difference / scale).sum() < 0))
        wins.setdefault((pair.pattern, True), []).append(bool(difference[steps == LATE].sum() < 0))
    for (pattern, late), hits in wins.items():
        quadruples = (np.arange(len(hits)) // 2).tolist()
        where = f" at t = {LATE}" if late else ""
        yield share(f"denoising loss: true caption beats {pattern} swap{where}", hits, 0.5, quadruples)


def pointing(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """Pointing game of nouns in "web" captions on scenes of two: does the map's highest pixel lie in the object's mask?

    By `probes.localization`, as in tab_localization; each cross-attention site, and the mean over all of them.
    """
    from diffprobe import open_store
    from diffprobe.probes.grounding import attention_localization

    _, data, conditioning, out = record_words(options, (50, 250, 500))
    table = attention_localization(open_store(out), data, conditioning=conditioning, seed=options.seed)
    for row in table[(table["map"] == "word") & (table["score"] == "pointing")].to_dict("records"):
        kept = {name: row[name] for name in ("value", "low", "high", "n", "chance", "timestep")}
        yield {"what": f"pointing, {row['site'].removesuffix('-B0-Cross-Map')}, t = {row['timestep']}", **kept}


# --- what can be read around an object ------------------------------------------------------------


def main_site(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """Linear probes on 3 x 3 places around each object, at the paper's main site, t = 50, without a prompt."""
    return _object_probes(options, options.model, model.weights_hash(), MAIN_SITE, 50)


def blindness(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """The same on shapes-clip's patches, at the layer that a fused model takes: what captions leave out is not to be read."""
    return _tower_probes(options, "shapes-clip")


def vit(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """The same on the patches of shapes-vit, which learnt from pictures alone."""
    return _tower_probes(options, "shapes-vit")


def _tower_probes(options: Options, name: str) -> Rows:
    from diffprobe.encoders import load_encoder

    encoder = load_encoder(name, "cpu")
    return _object_probes(options, name, encoder.weights_hash(), encoder.preset[0], None)


def _object_probes(options: Options, model: str, weights: str, site: str, timestep: int | None) -> Rows:
    import xarray as xr

    from diffprobe import extract, features, open_store
    from diffprobe.data import ShapesDataset
    from diffprobe.probes.linear import fit_probe

    dataset = ShapesDataset(PROBED if options.count > 100 else 8 * options.count, "test", options.seed)
    out = options.work / f"objects_{weights}_{len(dataset)}_{options.seed}.zarr"
    step = {} if timestep is None else {"timesteps": (timestep,), "conditionings": ("null",)}
    extract(model, dataset, out, sites=(site,), seed=options.seed, **step)  # type: ignore[arg-type]
    values = features(open_store(out), site).squeeze(drop=True).transpose("sample", "channel", "y", "x").to_numpy()
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    crops, objects, scenes = [], [], []
    for number in range(len(dataset)):
        for obj in dataset.scene(number).objects:
            y, x = int(obj.y * values.shape[2]), int(obj.x * values.shape[3])
            crops.append(padded[number, :, y : y + 3, x : x + 3].ravel())
            objects.append(obj)
            scenes.append(number)
    from diffprobe.data import shapes

    truths: dict[str, list[str | None]] = {
        "colour": [o.colour for o in objects],
        "shape": [o.shape for o in objects],
        "direction": [o.direction if o.shape in shapes.DIRECTED else None for o in objects],
        "letter": [o.mark if o.mark in shapes.LETTERS else None for o in objects],
    }
    for name, truth in truths.items():
        rows = [i for i, one in enumerate(truth) if one is not None]
        array = xr.DataArray(np.stack([crops[i] for i in rows]).astype(np.float32), dims=("sample", "channel"))
        table = fit_probe(
            array, [truth[i] for i in rows], groups=[scenes[i] for i in rows], seed=options.seed, control=False,
            penalties=(100.0, 1000.0, 10_000.0, 100_000.0),
        ).table  # fmt: skip
        row = table.iloc[0]
        kept = {"value": row["value"], "low": row["low"], "high": row["high"], "n": int(row["n_test"])}
        yield {"what": f"{model}, {site}: {name} of an object", **kept, "chance": row["chance"]}


# --- shapes-clip, shapes-lm -----------------------------------------------------------------------


def clip(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    from transformers import CLIPModel, CLIPProcessor

    from diffprobe.zoo import locate
    from recipes.measure import clip_rows

    folder = locate("shapes-clip")
    return clip_rows(
        CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder), options.count, options.seed
    )


def language(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from diffprobe.zoo import locate
    from recipes.measure import lm_rows

    folder = locate("shapes-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return lm_rows(
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).float().eval(),
        tokenizer,
        options.count,
        options.seed,
    )


def oracle(model: Any, options: Options, pictures: dict[str, Any]) -> Rows:
    """A fused model whose vision stream is the truth, trained as in table 2: what no arm can be better than.

    Each place shows the attributes of the object it lies on, one-hot; what shapes-lm then answers wrong, it would answer
    wrong whatever an encoder sees.
    """
    from dataclasses import replace

    from experiments.comparison import Arm, score_rows
    from experiments.framework import fused_run

    # two pairs of each of the nine patterns at least: one has no spread
    run = fused_run(replace(options, work=options.work / "oracle", count=max(18, options.count)))
    answers = run.complete({Arm("diffusion", "truth"): ("own",)}, [options.seed])
    rows = score_rows(answers, options.seed)
    for row in rows[rows["score"].isin(["VQA", "MMVP"])].to_dict("records"):
        name = "oracle: " + ("questions" if row["score"] == "VQA" else "MMVP-like pairs")
        what = name if row["group"] == "all" else f"{name}, {row['group']}"
        yield {"what": what, **{key: row[key] for key in ("value", "low", "high", "n", "chance")}}


# --- the experiment -------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Any, Options, dict[str, Any]], Rows]] = {
    "vae": reconstruction,
    "samples": samples,
    "matching": matching,
    "pointing": pointing,
    "main site": main_site,
    "blindness": blindness,
    "clip": clip,
    "lm": language,
    "vit": vit,
    "oracle": oracle,
}

# whose weights decide a part's rows; shapes-sd's, if it is not named
OWNERS = {"clip": "shapes-clip", "blindness": "shapes-clip", "lm": "shapes-lm", "oracle": "shapes-lm", "vit": "shapes-vit"}


def measure(options: Options, parts: Sequence[str]) -> Result:
    """Each part is kept in the work folder under its model's weights, so a run that was cut off goes on."""
    from diffprobe import load_model
    from experiments.comparison import Settings

    model = load_model(options.model, options.device)
    weights = {name: _weights(model, name) for name in ("shapes-sd", "shapes-clip", "shapes-lm", "shapes-vit")}
    pictures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for part in parts:
        own = weights[OWNERS.get(part, "shapes-sd")]
        if part == "oracle":  # its training decides its rows too
            own = hashlib.sha256(f"{own} {Settings()} {options.set} {options.data}".encode()).hexdigest()[:16]
        kept = options.work / f"zoo_{part}_{own}{'_smoke' * options.smoke}"
        if not kept.with_suffix(".json").exists():
            seen: dict[str, Any] = {}
            found = [{"part": part, **row, "seed": options.seed} for row in PARTS[part](model, options, seen)]
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(kept.with_suffix(".npz"), **seen)
            kept.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        pictures |= dict(np.load(kept.with_suffix(".npz"), allow_pickle=False))
        rows += json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))
    for row in rows:
        print(f"{row['part']:9} {row['what']:58} {row['value']:7.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}")
    config = {"parts": list(parts), "weights": weights, "guidance": GUIDANCE, "steps": STEPS}
    return Result(with_gates(pd.DataFrame(rows)), pictures, config)


def _weights(model: Any, name: str) -> str:
    """Which weights a part measured: the diffusion model's own hash, of the others their file's."""
    from diffprobe.zoo import locate

    if name == "shapes-sd":
        return str(model.weights_hash())
    return hashlib.sha256((locate(name) / "model.safetensors").read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Gate:
    """What a model must be able to do before a claim can be tested on it: a row's value, and how far it must reach.

    `what` is the row's name; with `of_chance` the threshold counts in multiples of the row's chance, and a gate "at most" is
    passed below chance plus the threshold.
    """

    id: str
    what: str
    threshold: float
    text: str
    of_chance: bool = False
    at_most: bool = False

    def limit(self, row: Mapping[str, Any] | pd.Series) -> float:
        """The threshold in the row's own unit."""
        return float(
            self.threshold * row["chance"]
            if self.of_chance
            else row["chance"] + self.threshold
            if self.at_most
            else self.threshold
        )


_OBJECT, _PATCH = f"shapes-sd, {MAIN_SITE}: {{}} of an object", "shapes-clip, L5: {} of an object"
LM_CATEGORIES = (
    "existence", "count", "colour", "shape", "size", "relation", "comparison", "orientation", "mark", "MMVP-like position",
    "MMVP-like orientation", "MMVP-like presence", "MMVP-like state", "MMVP-like quantity", "MMVP-like colour",
    "MMVP-like structure", "MMVP-like text", "MMVP-like viewpoint",
)  # fmt: skip
GATES = (
    Gate("psnr", PSNR, 28.0, "the autoencoder gives held-out drawings back with at least 28 dB"),
    *(
        Gate(f"visible {name}", f"autoencoder: {name} read in what it gives back", 0.97, f"{name} can be seen in what the autoencoder gives back")
        for name in ("count", "colour", "shape", "fill", "size", "direction", "mark")
    ),
    Gate("one object", ONE, 0.9, "a generated picture shows the asked object"),
    Gate("both objects", BOTH, 0.6, "a generated picture shows both of two objects"),
    Gate("relation", "denoising loss: true caption beats relation swap", 0.7, "the true caption beats a relation swap"),
    Gate("attribute late", f"denoising loss: true caption beats attribute swap at t = {LATE}", 0.75, "the true caption beats an attribute swap where the prompt decides"),
    Gate("pointing", "pointing, U-L1-R1, t = 50", 5.0, "a noun's attention at U-L1 points into its object", of_chance=True),
    Gate("main colour", _OBJECT.format("colour"), 0.8, "an object's colour can be read at the paper's main site"),
    Gate("main shape", _OBJECT.format("shape"), 0.6, "an object's shape can be read at the paper's main site"),
    Gate("main direction", _OBJECT.format("direction"), 0.6, "an object's direction can be read at the paper's main site"),
    Gate("clip finds", "CLIP: image from caption, of 100", 0.6, "shapes-clip finds the image of a caption among 100"),
    Gate("clip colour", _PATCH.format("colour"), 0.85, "an object's colour can be read in shapes-clip's patches"),
    Gate("clip shape", _PATCH.format("shape"), 0.85, "an object's shape can be read in shapes-clip's patches"),
    Gate("clip blind to direction", _PATCH.format("direction"), 0.05, "an object's direction cannot be read in shapes-clip's patches", at_most=True),
    Gate("clip blind to letters", _PATCH.format("letter"), 0.05, "an object's letter cannot be read in shapes-clip's patches", at_most=True),
    *(Gate(f"lm {name}", f"LM: {name}", 0.95, f"shapes-lm answers questions of {name} from a perfect description") for name in LM_CATEGORIES),
    Gate("oracle questions", "oracle: questions", 0.9, "a fused model that is shown the truth answers questions"),
    Gate("oracle pairs", "oracle: MMVP-like pairs", 0.8, "a fused model that is shown the truth answers MMVP-like pairs"),
)  # fmt: skip


def with_gates(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with columns gate, threshold and passed, where a row is a gate's."""
    by_name = {gate.what: gate for gate in GATES}
    gates = [by_name.get(what) for what in rows["what"]]
    limits = [np.nan if gate is None else gate.limit(row) for gate, (_, row) in zip(gates, rows.iterrows(), strict=True)]
    passed = [
        None if gate is None else bool(value <= limit if gate.at_most else value >= limit)
        for gate, value, limit in zip(gates, rows["value"], limits, strict=True)
    ]
    return rows.assign(gate=[None if gate is None else gate.id for gate in gates], threshold=limits, passed=passed)


def judge(rows: pd.DataFrame) -> list[Claim]:
    """Which gates are passed: by the whole interval (held), by none of it (not held), or by part of it (undecided)."""
    claims = []
    for gate in GATES:
        for _, row in rows[rows["what"] == gate.what].iterrows():
            limit = gate.limit(row)
            low, high = (-row["high"], -row["low"]) if gate.at_most else (row["low"], row["high"])
            decided = verdict(low, high, -limit if gate.at_most else limit)
            claims.append(
                Claim(
                    f"Z {gate.id}",
                    f"{gate.text} ({'at most' if gate.at_most else 'at least'} {limit:.2f})",
                    decided,
                    _evidence(row),
                )
            )
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
        found = rows[(rows["part"] == part) & (rows["high"] <= 1) & ~rows["what"].str.contains("cosine")]  # shares alone
        if len(found):
            figures[part] = plot_scores(found, width=WIDTH)
    return figures


ALT = {
    "": "Share of correct answers of shapes-sd by test (pointing: its best site), with 95% intervals and chance.",
    "samples": "Pictures that shapes-sd generated from held-out prompts, each with its prompt and what the reader saw.",
    "clip": "shapes-clip: retrieval, and choices between the images of a pair by pattern, with intervals and chance.",
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
