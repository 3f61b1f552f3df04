"""``python -m recipes all --out runs/zoo``: train the embedded models, or ``python -m recipes vae text unet``: some stages.

A stage that was cut off goes on; a finished one is left as it is.  ``--minutes`` is for all stages together: each gets its
share, and its learning rate falls to its end.  On a GPU: ``--device cuda --workers 16 --minutes 8``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipes import clip, lm, reader, sd, vit
from recipes.card import write_card


@dataclass(frozen=True)
class Stage:
    """One training: its configuration, the field of it that holds the plan, and its share of the time for all of them.

    `on_gpu` are fields for a GPU, where larger batches cost no more.
    """

    build: Callable[[], Any]
    plan: str
    train: Callable[[Any, Path], Any]
    share: float
    on_gpu: dict[str, Any]


STAGES = {
    "vae": Stage(sd.Config, "vae", sd.train_vae, 0.12, {"vae_batch": 128}),
    "text": Stage(sd.Config, "text", sd.train_text, 0.06, {"text_batch": 512}),
    "unet": Stage(sd.Config, "unet", sd.train_unet, 0.48, {"unet_batch": 512, "scenes": 400_000}),
    "clip": Stage(clip.Config, "plan", clip.train_clip, 0.12, {"batch": 512}),
    "lm": Stage(lm.Config, "plan", lm.train_lm, 0.13, {"batch": 96}),
    "vit": Stage(vit.Config, "plan", vit.train_vit, 0.04, {"batch": 512}),
    "reader": Stage(reader.Config, "plan", reader.train_reader, 0.05, {"batch": 256}),
}
SUMMARIES = {
    "clip": "A `CLIPModel` of the drawn world: 64 px images in patches of 8; it reads what its captions say and is blind, in its "
    "patches too, for directions and letters.",
    "vit": "A `Dinov2Model` of the drawn world: 64 px images in patches of 8; it was trained on pictures alone, to fill in hidden "
    "patches.",
    "lm": "A `LlamaForCausalLM` of the drawn world with a chat template: it reads a description and answers questions about it, "
    "or writes a caption.",
    "reader": "A convolutional network that reads pictures of the drawn world: which object stands where, with all its attributes. "
    "It was trained on drawn pictures alone.",
}


def configured(name: str, given: argparse.Namespace, minutes: float | None) -> Any:
    """A stage's configuration with what the command line changes."""
    stage = STAGES[name]
    config = stage.build()
    plan = replace(getattr(config, stage.plan), device=given.device, workers=given.workers, minutes=minutes)
    if minutes is not None:
        plan = replace(plan, steps=10**6)
    config = replace(config, **{stage.plan: replace(plan, steps=given.steps or plan.steps)})
    if given.device.startswith("cuda"):
        config = replace(config, **stage.on_gpu)
    for field, value in (pair.split("=", 1) for pair in given.set):
        config = replace(config, **{field: type(getattr(config, field))(value)})
    return config


def finish(name: str, trained: Any, out: Path) -> None:
    """Write a model's folder with its card; `sd.train_unet` writes its own."""
    target = out / f"shapes-{name}"
    target.mkdir(parents=True, exist_ok=True)
    if name == "reader":
        from safetensors.torch import save_file

        save_file({key: value.half().contiguous() for key, value in trained.state_dict().items()}, target / "model.safetensors")
    else:
        for part in trained:  # model and processor or tokenizer
            (part.half().to("cpu") if hasattr(part, "half") else part).save_pretrained(target)
        sd.forget_origin(target)
    (target / f"{name}_loss.csv").write_bytes((out / f"{name}_loss.csv").read_bytes())
    kept = torch.load(out / f"{name}.pt", weights_only=True, map_location="cpu")
    stages = [("all of it", int(kept["step"]), 0, float(kept["seconds"]))]
    write_card(target, SUMMARIES[name], "Scenes of the train split, drawn afresh in each step.", stages)


def main() -> None:
    """Train the stages that are named."""
    parser = argparse.ArgumentParser(prog="python -m recipes", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=("all", *STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="checkpoints, loss curves and finished models")
    parser.add_argument("--steps", type=int, help="of each stage, instead of its own number")
    parser.add_argument("--minutes", type=float, help="for all stages together")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the stages' configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw ahead")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = list(STAGES) if "all" in given.stages else given.stages
    shares = sum(STAGES[name].share for name in names)
    for name in names:
        minutes = None if given.minutes is None else given.minutes * STAGES[name].share / shares
        trained = STAGES[name].train(configured(name, given, minutes), given.out)
        if name in SUMMARIES:
            finish(name, trained, given.out)


if __name__ == "__main__":
    main()
