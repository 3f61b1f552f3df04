"""``python -m recipes sd vae --out runs/zoo``: train the embedded models, or some stages of them, one after the other.

``--minutes`` bounds each stage (the learning rate falls to its end), ``--device cuda --workers 16`` is for a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recipes import clip, lm, reader, sd

STAGES: dict[str, tuple[Callable[[], Any], str, Callable[[Any, Path], object]]] = {
    # configuration, its field that holds the plan, training
    "vae": (sd.Config, "vae", sd.train_vae),
    "text": (sd.Config, "text", sd.train_text),
    "unet": (sd.Config, "unet", sd.train_unet),
    "clip": (clip.Config, "plan", clip.train_clip),
    "lm": (lm.Config, "plan", lm.train_lm),
    "reader": (reader.Config, "plan", reader.train_reader),
}


def main() -> None:
    """Train the stages that are named."""
    parser = argparse.ArgumentParser(prog="python -m recipes", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="checkpoints, loss curves and finished models")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--minutes", type=float, help="at most, for each stage")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the stage's configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw ahead")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for stage in given.stages:
        build, field, training = STAGES[stage]
        config = build()
        plan = replace(getattr(config, field), device=given.device, workers=given.workers)
        plan = replace(plan, steps=given.steps or plan.steps, minutes=given.minutes)
        config = replace(config, **{field: plan})
        for name, value in (pair.split("=", 1) for pair in given.set):
            config = replace(config, **{name: type(getattr(config, name))(value)})
        training(config, given.out)


if __name__ == "__main__":
    main()
