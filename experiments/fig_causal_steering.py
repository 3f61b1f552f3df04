"""Does a direction that a probe reads also steer? A colour's direction added at a site while the model samples (ours).

    python -m experiments.fig_causal_steering [--count 18] [--smoke] [--from-csv]

Pictures are sampled from prompts of one object in one colour, with a direction of another colour added at a site in every step, where
the reader finds the object in the picture that nothing was added to (a disc of a fifth of the side).  Directions: the linear probe's weights, the difference of class means, and a random one, each at the same lengths; a dose of 1
is the distance of the asked colour's mean from that of all, along the difference of means.  `zoo.reader`, which never saw a generated
picture, reads the asked colour (dose and response), the shape (off target) and gives its confidence in the object.

Expected was that the difference of means steers and the probe's weights less so; found: either drives the prompt's colour out no better
than a random direction does, the difference of means reaches the asked colour in a sixth of pictures and costs their shapes, and the
probe's weights never reach it.  About 10 minutes on a shared core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.causal import interval_row, plot_lines
from experiments.figures import plot_samples
from experiments.framework import Claim, Experiment, Options, Result, verdict

SITE, DOSES, STEPS, GUIDANCE, REACH = "U-L2-R1-Res-Out", (0.0, 2.0, 4.0, 8.0), 12, 4.0, 0.2
MEANS, PROBE, RANDOM = "difference of means", "probe's weights", "random direction"
READ = {
    "asked": "asked colour read",
    "kept": "prompt's colour read",
    "shape": "prompt's shape read",
    "confidence": "reader's confidence",
}
SHOWN = 6


def measure(options: Options) -> Result:
    from diffprobe import load_model
    from diffprobe.data import shapes

    model = load_model(options.model, options.device)
    scenes = [shapes.random_scene(options.seed, number, "test", 1) for number in range(options.count)]
    colours = list(shapes.COLOURS)
    asked = [colours[(colours.index(s.objects[0].colour) + 3) % len(colours)] for s in scenes]
    vectors = directions(model, options)
    doses = (0.0, DOSES[-1]) if options.smoke else DOSES
    rows, images, texts, places = [], {}, [], np.ones((len(scenes), 1, 1), bool)
    for what in (MEANS, PROBE, RANDOM):
        for dose in doses:
            if dose == 0 and images:
                made = images[MEANS, 0.0]
            else:
                made = steered(model, scenes, np.stack([vectors[what, colour] * dose for colour in asked]), places, options)
            if not images:
                places = where_objects_are(made)
            images[what, dose] = made
            rows += read(made, scenes, asked, what, dose, options.seed)
    shown = [(MEANS, dose) for dose in doses] + [(RANDOM, doses[-1])]
    picture, number = [], min(SHOWN, len(scenes))
    for what, dose in shown:
        picture += [(images[what, dose][k] * 255).round().astype(np.uint8).transpose(1, 2, 0) for k in range(number)]
        for k in range(number):
            kind = "as prompted" if not dose else f"+ {dose:g} {asked[k]}" if what == MEANS else f"+ {dose:g} random"
            texts.append(f"{scenes[k].objects[0].colour} {scenes[k].objects[0].shape}\n{kind}")
    config = {"weights": model.weights_hash(), "site": SITE, "steps": STEPS, "guidance": GUIDANCE}
    return Result(pd.DataFrame(rows).assign(seed=options.seed), {"images": np.stack(picture), "texts": np.array(texts)}, config)


def directions(model: Any, options: Options) -> dict[tuple[str, str], Any]:
    """Vectors (channel,) of a dose of 1, by kind and colour, all of the length of that colour's difference of means."""
    import torch

    from diffprobe import fit_probe
    from diffprobe.data import shapes
    from diffprobe.patching import cells_of, load_twins, passes, pooled

    twins = load_twins(model, "colour", 40 if options.smoke else 160, options.seed + 1)
    means, values = [], []
    for timestep in (100, 400, 700):  # one direction for all steps
        for batch, some in passes(model, twins, timestep, [SITE], options.seed, 16):
            feature = batch.tensors[SITE]
            means.append(pooled(feature, cells_of(twins.masks[some], feature.shape[-2:])).float().cpu())
            values += [twins.values[image] for image in some]
    x, labels = torch.cat(means).numpy(), np.array(values)
    fitted = fit_probe(
        x, labels, groups=np.tile(np.repeat(np.arange(len(twins.pairs)), 2), 3), control=False, seed=options.seed, n_jobs=1
    )
    rng = np.random.default_rng(options.seed)
    found = {}
    for colour in shapes.COLOURS:
        shift = x[labels == colour].mean(0) - x.mean(0)
        unit = rng.normal(size=len(shift))
        found[MEANS, colour] = shift
        found[PROBE, colour] = fitted.direction(colour) * np.linalg.norm(shift)
        found[RANDOM, colour] = unit / np.linalg.norm(unit) * np.linalg.norm(shift)
    return found


def where_objects_are(images: Any) -> Any:
    """Discs (prompt, y, x) around the surest object that the reader finds; the whole picture where it finds none."""
    import torch

    from diffprobe.zoo.reader import load_reader

    found = load_reader().read(torch.from_numpy(images) * 2 - 1, threshold=0.05)
    side = (np.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    discs = [
        np.hypot(side[:, None] - some[0].y, side - some[0].x) < REACH if some else np.ones((len(side),) * 2, bool)
        for some in found
    ]
    return np.stack(discs)


def steered(model: Any, scenes: Sequence[Any], vectors: Any, places: Any, options: Options) -> Any:
    """Pictures (prompt, 3, y, x) from 0 to 1 with each one's vector (channel,) added at the site, in its places."""
    import torch

    from diffprobe.data import shapes
    from diffprobe.edit import Edit

    prompts = [shapes.caption(scene, "list").text for scene in scenes]
    noise = [torch.Generator().manual_seed(1_000_000 * options.seed + place) for place in range(len(prompts))]
    added = torch.from_numpy(vectors).float().to(model.device)[..., None, None]
    change = lambda x: x + torch.cat([added] * (len(x) // len(added))).to(x)  # noqa: E731
    with Edit(model.pipeline, SITE, change, places=np.concatenate([places, places])):  # guidance runs each prompt twice
        made = model.pipeline(
            prompts,
            generator=noise,
            num_inference_steps=4 if options.smoke else STEPS,
            guidance_scale=GUIDANCE,
            output_type="pt",
        ).images
    return made.float().cpu().numpy()


def read(images: Any, scenes: Sequence[Any], asked: Sequence[str], what: str, dose: float, seed: int) -> list[dict[str, Any]]:
    """What the reader finds: its surest object's colour and shape, and how sure it is (0 where it finds none)."""
    import torch

    from diffprobe.zoo.reader import load_reader

    found = load_reader().read(torch.from_numpy(images) * 2 - 1, threshold=0.05)
    first = [some[0] if some else None for some in found]
    scores = {
        "asked": [float(one is not None and one.colour == colour) for one, colour in zip(first, asked, strict=True)],
        "kept": [float(one is not None and one.colour == s.objects[0].colour) for one, s in zip(first, scenes, strict=True)],
        "shape": [float(one is not None and one.shape == s.objects[0].shape) for one, s in zip(first, scenes, strict=True)],
        "confidence": [one.score if one else 0.0 for one in first],
    }
    return [{"what": what, "dose": dose, "score": name, **interval_row(values, seed=seed)} for name, values in scores.items()]


def judge(rows: pd.DataFrame) -> list[Claim]:
    claims = []
    asked = rows[rows["score"] == "asked"].set_index(["what", "dose"])
    for what in (MEANS, PROBE):
        best = rows[(rows["score"] == "asked") & (rows["what"] == what)].sort_values("value").iloc[-1]
        dose = best["dose"]
        other, start = asked.loc[(RANDOM, dose)], asked.loc[(what, 0.0)]
        shape, kept = (rows[(rows["score"] == s) & (rows["what"] == what)].set_index("dose") for s in ("shape", "kept"))
        sure = rows[(rows["score"] == "confidence") & (rows["what"] == what)].set_index("dose")
        claims.append(
            Claim("C4", f"Adding a colour's direction while sampling gives that colour: {what} (ours)", verdict(best["low"], best["high"], max(float(other["high"]), float(start["high"]))),
                  f"asked colour read in {best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}] at dose {dose:g}, {start['value']:.2f} without, {other['value']:.2f} [{other['low']:.2f}, {other['high']:.2f}] along a random direction; "
                  f"prompt's colour kept in {kept.loc[dose, 'value']:.2f}, shape kept in {shape.loc[dose, 'value']:.2f} ({shape.loc[0.0, 'value']:.2f} without), confidence {sure.loc[dose, 'value']:.2f} ({sure.loc[0.0, 'value']:.2f}); n = {best['n']:.0f} prompts")
        )  # fmt: skip
    return claims


def draw(result: Result) -> Mapping[str, Figure]:
    frame = result.rows.assign(panel=result.rows["score"].map(READ))
    return {
        "": plot_lines(frame, x="dose", x_label="dose", title=f"Another colour's direction added to the object at {SITE} in every step"),
        "samples": plot_samples(result.pictures["images"], [str(text) for text in result.pictures["texts"]]),
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="fig_causal_steering",
    title="Does a direction that a probe reads also steer? A colour added while sampling",
    count=18,
    smoke_count=3,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "Against the dose of an added direction: how often the asked colour is read, how often the prompt's colour and shape, and the reader's confidence, for three kinds of direction, with intervals.",
        "samples": "Generated pictures, one column a prompt and one row a dose of another colour's direction, the last row along a random direction.",
    },
)

if __name__ == "__main__":
    EXPERIMENT.main()
