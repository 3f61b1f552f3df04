"""``torchrun --nproc-per-node 2 -m diffprobe.zoo --stage unet --out FOLDER``: one stage of the recipe, for many processes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from diffprobe.zoo import recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("vae", "text", "unet", "export"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number of steps")
    parser.add_argument("--from", dest="start", type=Path, help="a pipeline's folder whose weights are trained further")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = recipe.Config(start=arguments.start)
    if arguments.steps:
        config = replace(config, **{f"{arguments.stage}_steps": arguments.steps})
    if arguments.stage == "export":
        recipe.export(arguments.out, arguments.out / "shapes-sd")
    else:
        recipe.STAGES[arguments.stage](config, arguments.out)


if __name__ == "__main__":
    main()
