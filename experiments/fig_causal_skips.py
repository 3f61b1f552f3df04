"""Which blocks does a prediction need, and by which tokens does a prompt reach it? Blocks and tokens left out (ours).

    python -m experiments.fig_causal_skips [--count 16] [--smoke] [--from-csv]

Vital layers: each block whose output has its input's shape is made the identity in turn (`diffprobe.edit.skip`); what changes of the
network's output is given in shares of the output's length.  The control exchanges the block's output with another image's: a block
that matters less skipped than exchanged adds little of its own.

Routes of the prompt: the start token, the end and padding tokens, the content words, or as many tokens as these drawn at random from the
padding are cut from the cross-attentions of one stage; what changes is given in shares of what leaving the prompt out changes.

About 4 minutes on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.causal import interval_row, plot_effects
from experiments.framework import Claim, Experiment, Options, Result, verdict

TIMESTEPS = (50, 500, 900)
SKIPPED, EXCHANGED = "skipped", "another image's"
TOKENS = {
    "start": "start token",
    "eos_and_padding": "end and padding tokens",
    "content": "content words",
    "random": "random padding tokens",
}
STAGES = {"*": "everywhere", "down_blocks*": "down", "mid_block*": "middle", "up_blocks*": "up"}


def measure(options: Options) -> Result:
    import torch

    from diffprobe import load_model
    from diffprobe.data import ShapesDataset
    from diffprobe.data.shapes import picture
    from diffprobe.edit import Edit, scale_token, skip, swap
    from diffprobe.forward import Engine, Row, to_pixels
    from diffprobe.knockout import KnockedOut, chosen_attentions
    from diffprobe.patching import own_output
    from diffprobe.recorder import Recorder

    model = load_model(options.model, options.device)
    data = ShapesDataset(options.count, "test", options.seed, 1)
    samples = [data[number] for number in range(options.count)]
    engine = Engine(model, seed=options.seed, batch_rows=12)
    latents = engine.encode_images(
        [to_pixels(picture(data.scene(k)), model.size, "crop") for k in range(options.count)], data_ids(samples)
    )
    texts = [sample.captions[0].text for sample in samples]
    blocks = skippable(model)
    blocks = blocks[:2] if options.smoke else blocks
    stages = dict(list(STAGES.items())[:1]) if options.smoke else STAGES
    found: dict[tuple[Any, ...], list[float]] = {}
    with Recorder(model, "Noise", keep_steps=False, reuse=True) as nothing:
        for timestep in TIMESTEPS[:1] if options.smoke else TIMESTEPS:
            for batch in engine.run(
                nothing, latents, data_ids(samples), [Row(k, texts[k], timestep) for k in range(options.count)]
            ):
                plain = own_output(model, batch, batch.prediction)

                def changed(by: Any = model, text: Any = batch.text, batch: Any = batch, plain: Any = plain) -> Any:
                    output = own_output(model, batch, by.denoise(batch.inputs, batch.timesteps, text))
                    return (output - plain).flatten(1).norm(dim=1).cpu().numpy()

                size = plain.flatten(1).norm(dim=1).cpu().numpy()
                turned = [*range(1, len(size)), 0]
                for block in blocks:
                    for what, change in ((SKIPPED, skip()), (EXCHANGED, swap(turned))):
                        with Edit(model, block, change):
                            found.setdefault(("block", timestep, block, what), []).extend(changed() / size)
                whole = changed(text=model.encode_text([None] * len(size)))
                for where, stage in stages.items():
                    maps = [f"{path}.map" for path in chosen_attentions(model.network, where)]
                    for what, name in TOKENS.items():
                        if what != "random":
                            far = changed(KnockedOut(model, f"{what}@{where}"))
                        else:
                            cut = random_tokens(KnockedOut(model, "content"), batch.text, options.seed)
                            with Edit(model, maps, scale_token(torch.from_numpy(cut), 0.0)):
                                far = changed()
                        found.setdefault(("route", timestep, name, stage), []).extend(far / whole)
    rows = [
        {"kind": kind, "timestep": timestep, "line": line, "what": what, **interval_row(values, seed=options.seed)}
        for (kind, timestep, line, what), values in found.items()
    ]
    return Result(pd.DataFrame(rows).assign(seed=options.seed), config={"weights": model.weights_hash(), "dataset": data.spec})


def data_ids(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


def skippable(model: Any) -> list[str]:
    """Transformer blocks and residual blocks that keep their input's shape, stage by stage."""
    modules = dict(model.network.named_modules())
    kept = [
        site for site in model.sites
        if site.kind == "transformer_block"
        or (site.kind == "resnet" and modules[site.path].in_channels == modules[site.path].out_channels)
    ]  # fmt: skip
    return [site.name for site in sorted(kept, key=lambda site: "DMU".index(site.name[0]) if site.name[0] in "DMU" else 0)]


def random_tokens(cutting: Any, text: Any, seed: int) -> Any:
    """As many tokens of each prompt as it has content words, drawn from its end and padding tokens."""
    from diffprobe.knockout import KnockedOut

    rng = np.random.default_rng(seed)
    content, padding = cutting.cut_tokens(text).numpy(), KnockedOut(cutting, "eos_and_padding").cut_tokens(text).numpy()
    drawn = np.zeros_like(content)
    for row, (own, able) in enumerate(zip(content, padding, strict=True)):
        drawn[row, rng.permutation(np.flatnonzero(able))[: own.sum()]] = True
    return drawn


def judge(rows: pd.DataFrame) -> list[Claim]:
    claims = []
    blocks = rows[(rows["kind"] == "block") & (rows["what"] == SKIPPED)]
    mean = blocks.groupby("line", sort=False)["value"].mean()
    most = blocks[blocks["line"] == mean.idxmax()].sort_values("value").iloc[-1]
    rest = blocks[(blocks["line"] != mean.idxmax()) & (blocks["timestep"] == most["timestep"])].sort_values("value").iloc[-1]
    claims.append(
        Claim("C5", "One block is more vital than all others (ours)", verdict(most["low"], most["high"], float(rest["high"])),
              f"skipping {most['line']} changes {most['value']:.2f} [{most['low']:.2f}, {most['high']:.2f}] of the output at t = {most['timestep']}, {rest['line']} {rest['value']:.2f} [{rest['low']:.2f}, {rest['high']:.2f}]; "
              f"least vital on average {mean.idxmin()} ({mean.min():.3f}); n = {most['n']:.0f} images")
    )  # fmt: skip
    routes = rows[(rows["kind"] == "route") & (rows["what"] == STAGES["*"])]
    last = routes[routes["timestep"] == routes["timestep"].max()].set_index("line")
    content, padding, random = (last.loc[TOKENS[name]] for name in ("content", "eos_and_padding", "random"))
    claims.append(
        Claim("C6", "A prompt reaches the prediction by its content words more than by its end and padding tokens (ours)", verdict(float(content["low"]) - float(padding["high"]), float(content["high"]) - float(padding["low"])),
              f"at t = {content['timestep']}, cut everywhere, in shares of what no prompt changes: content {content['value']:.2f} [{content['low']:.2f}, {content['high']:.2f}], end and padding {padding['value']:.2f} [{padding['low']:.2f}, {padding['high']:.2f}], "
              f"as many padding tokens as words {random['value']:.2f} [{random['low']:.2f}, {random['high']:.2f}]; n = {content['n']:.0f} images")
    )  # fmt: skip
    return claims


def draw(result: Result) -> Mapping[str, Figure]:
    rows = result.rows.assign(panel=[f"timestep {step}" for step in result.rows["timestep"]])
    return {
        "": plot_effects(rows[rows["kind"] == "block"], x_label="change, in shares of the output", title="What leaving a block out changes of the network's output"),
        "routes": plot_effects(rows[rows["kind"] == "route"], x_label="change, in shares of no prompt's", title="What cutting tokens of the prompt changes, by the stage whose cross-attentions are cut"),
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="fig_causal_skips",
    title="Vital blocks and routes of the prompt: blocks and tokens left out of the pass",
    count=16,
    smoke_count=3,
    measure=measure,
    judge=judge,
    draw=draw,
    alt={
        "": "By block, how far the output changes when it is skipped and when it is given another image's, with intervals, at three timesteps.",
        "routes": "By class of token and stage, how far the output changes when their attention is cut, in shares of what leaving the prompt out changes.",
    },
)

if __name__ == "__main__":
    EXPERIMENT.main()
