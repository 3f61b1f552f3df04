"""shapes-vit, a small vision transformer that was trained on pictures alone: no captions, no noise, no labels.

It is the independent encoder of the comparisons: what a network learns of the drawn world without being asked anything.
Blocks of patches are hidden, and their pixels are predicted from the others' tokens (Xie et al. 2022, "SimMIM"); the head
that predicts them is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from recipes.clip import image_processor
from recipes.common import SIDE, Optimizers, Plan, drawn_batch, step_rng, train, train_scene
from recipes.sd import autocast

PATCH = 8
CELLS = SIDE // PATCH
BLOCK = 2  # patches a side that are hidden together: a hidden one alone is seen in its neighbours
FLAT = 1e-2  # added to the variance of a patch, so that plain background counts little


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan(steps=4000, decay_share=0.4))
    batch: int = 64
    peak: float = 1e-3
    muon_peak: float = 2e-3
    hidden: float = 0.5  # of the blocks


def build_vit() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=128, mlp_ratio=3, num_hidden_layers=6, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
        )
    )  # fmt: skip


def patches_of(pixels: Tensor) -> Tensor:
    """(image, 3, y, x) to (image, patch, value), row by row, each patch with mean 0 and variance 1 where it is not flat."""
    flat = functional.unfold(pixels, PATCH, stride=PATCH).mT
    return (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True) + FLAT).sqrt()


def hidden_patches(count: int, share: float, rng: np.random.Generator) -> Tensor:
    """(image, patch) True where a patch is hidden; as many blocks in every image, at random."""
    side = CELLS // BLOCK
    order = rng.random((count, side * side)).argsort(1)
    blocks = (order < round(share * side * side)).reshape(count, side, side)
    return torch.from_numpy(blocks.repeat(BLOCK, 1).repeat(BLOCK, 2).reshape(count, -1).copy())


def train_vit(config: Config, folder: Path) -> tuple[Dinov2Model, CLIPImageProcessorPil]:
    """Train it, or go on, or give the finished one; its checkpoint and loss curve lie in `folder`."""
    torch.manual_seed(config.seed + 7)
    device = config.plan.device
    model, head = build_vit().to(device), nn.Linear(128, 3 * PATCH**2).to(device)

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 7, step)
        scenes = [train_scene(int(i), config.seed) for i in rng.integers(10**7, size=config.batch)]
        return {"pixels": drawn_batch(scenes), "hidden": hidden_patches(config.batch, config.hidden, rng)}

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(device):
            tokens = model(batch["pixels"], bool_masked_pos=batch["hidden"]).last_hidden_state[:, 1:]
            guessed = head(tokens[batch["hidden"]])
        loss = (guessed.float() - patches_of(batch["pixels"])[batch["hidden"]]).abs().mean()
        return loss, {"loss": loss}

    both = nn.ModuleDict({"model": model, "head": head})
    optimizers = Optimizers(both, config.peak, config.muon_peak, outer=("embeddings", "head"))
    train("vit", folder, config.plan, {"model": model, "head": head}, optimizers, batch_of, loss_of)
    return model.eval(), image_processor()
