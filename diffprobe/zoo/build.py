"""From a recipe to a finished folder: train (or go on), export in float16, measure, write the card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffprobe.zoo import contrast, language, recipe
from diffprobe.zoo.card import write_card
from diffprobe.zoo.measure import clip_rows, lm_rows

NAMES = ("shapes-sd", "shapes-clip", "shapes-lm")
SPLIT = "the train split leaves out 8 of 64 colour-shape pairs"


def _spent(out: Path, stage: str, batch: int, what: str) -> tuple[str, int, int, float]:
    """A stage's row of the card, from its checkpoint."""
    saved = torch.load(out / f"{stage}.pt", weights_only=True, map_location="cpu")
    return what, int(saved["step"]), batch, float(saved["seconds"])


def _export(target: Path, model: Any, *parts: Any) -> None:
    """Float16 safetensors and configs, without the folder that they came from."""
    for part in (model.half(), *parts):
        part.save_pretrained(target)
    recipe.forget_origin(target)
    model.float()


def build_sd(out: Path, stage: str = "all", steps: int | None = None, start: Path | None = None) -> Path | None:
    """One stage of shapes-sd, or all; the finished pipeline's folder, `out`/shapes-sd, after the last."""
    if stage not in (*recipe.STAGES, "all"):
        raise ValueError(f"Stage {stage!r} is not one of {', '.join(recipe.STAGES)}, all.")
    if steps is not None and stage == "all":
        raise ValueError("--steps belongs to one stage of shapes-sd: name it with --stage.")
    config = recipe.Config(start=start)
    if steps is not None:
        config = replace(config, **{f"{stage}_steps": steps})  # type: ignore[arg-type]
    for one in recipe.STAGES if stage == "all" else (stage,):
        recipe.STAGES[one](config, out)
    if stage not in ("unet", "all"):
        return None
    target = out / "shapes-sd"
    batches = {"vae": config.vae_batch, "text": config.text_batch, "unet": config.unet_batch}
    # a stage that was taken over from another folder has no checkpoint here
    stages = [_spent(out, one, batch, one) for one, batch in batches.items() if (out / f"{one}.pt").exists()]
    summary = (
        "A small Stable Diffusion for diffprobe's drawn world: 96 px images, 24x24x4 latents, noise prediction, the topology "
        "of Stable Diffusion 2.1 with narrow widths."
    )
    data = f"{config.scenes} drawn scenes with captions of seven styles, {config.empty_prompts:.0%} empty; {SPLIT}."
    write_card(target, summary, data, stages)
    return target


def build_clip(out: Path, steps: int | None = None, start: Path | None = None) -> Path:
    """shapes-clip, finished in `out`/shapes-clip."""
    config = contrast.Config(start=start)
    config = config if steps is None else replace(config, steps=steps)
    model, processor = contrast.train_clip(config, out)
    target = out / "shapes-clip"
    _export(target, model, processor)
    summary = (
        f"A CLIPModel for diffprobe's drawn world: {recipe.SIDE} px images, patches of {contrast.PATCH}, two towers of four layers "
        "of width 128. It reads what its captions say, and is blind for orientation, marks, positions and counts above two."
    )
    data = f"Scenes drawn afresh, with captions of the styles web and partial; {SPLIT}."
    stages = [_spent(out, "clip", config.batch, "both towers, patches named at first")]
    write_card(target, summary, data, stages, clip_rows(model, processor, 100))
    return target


def build_lm(out: Path, steps: int | None = None, start: Path | None = None) -> Path:
    """shapes-lm, finished in `out`/shapes-lm."""
    config = language.Config(start=start)
    config = config if steps is None else replace(config, steps=steps)
    tokenizer, model = language.train_lm(config, out)
    target = out / "shapes-lm"
    _export(target, model, tokenizer)
    summary = (
        "A LlamaForCausalLM for diffprobe's drawn world, with a chat template: it reads a description and answers questions "
        "about it, or writes a caption."
    )
    data = f"Descriptions, questions and captions of drawn scenes and twins; {SPLIT}."
    stages = [_spent(out, "lm", config.batch, "next token, answers weighted")]
    write_card(target, summary, data, stages, lm_rows(model, tokenizer, 100))
    return target
