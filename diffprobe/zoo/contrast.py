"""The recipe of the embedded ``shapes-clip``: a `CLIPModel` that is blind where its captions are silent.

Captions are of the styles "web" and "partial": colour, shape, size, fill, the background's tone, and whether things that
are all alike are two or several.  Orientation, marks, positions and counts above two are never said, so nothing rewards the
towers for telling them apart, and images that differ only there end up at nearly the same place, as in CLIP (Tong et al.
2024, "Eyes Wide Shut").

A short training sees few images, so for its first part each patch also learns to name the object it shows, in words that
the captions use; that loss fades out and its head is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffprobe.data import shapes
from diffprobe.zoo import WEIGHTS
from diffprobe.zoo.recipe import SIDE, Progress, batches, drawn, learning_rate_share, tokenize, train_scene

PATCH = 8
PARTIAL_SHARE = 0.25


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    start: Path | None = None  # a folder of shapes-clip: its weights are trained further, instead of random ones
    scenes: int = 200_000
    steps: int = 700
    batch: int = 64
    peak: float = 1e-3
    decay_share: float = 0.5
    naming_share: float = 0.7  # of the steps, over which the naming of patches fades to nothing
    save_every: int = 50


# --- what a caption says --------------------------------------------------------------------------


def web_facts(scene: shapes.Scene) -> tuple[object, ...]:
    """All that a caption of style "web" says of a scene, whatever the order it names objects in.

    >>> a, b = shapes.random_scene(0, 0), shapes.random_scene(0, 1)
    >>> web_facts(a) == web_facts(a), web_facts(a) == web_facts(b)
    (True, False)
    """
    if shapes.all_alike(scene):
        return scene.tone, scene.objects[0].pair, len(scene.objects) == 2
    return scene.tone, *sorted((o.size, o.fill, o.colour, o.shape) for o in scene.objects)


@dataclass(frozen=True)
class Said:
    """A caption with what it claims: facts as of `web_facts`, or the colour and shape of one object."""

    text: str
    facts: tuple[object, ...]

    def is_true_of(self, scene: shapes.Scene) -> bool:
        return self.facts == web_facts(scene) or any(self.facts == o.pair for o in scene.objects)


def say(scene: shapes.Scene, rng: np.random.Generator) -> Said:
    """A random caption of the kind that shapes-clip reads."""
    order = [int(i) for i in rng.permutation(len(scene.objects))]
    if rng.random() < PARTIAL_SHARE:
        return Said(shapes.caption(scene, "partial", order).text, scene.objects[order[0]].pair)
    return Said(shapes.caption(scene, "web", order).text, web_facts(scene))


# --- the model ------------------------------------------------------------------------------------


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**tower, "image_size": SIDE, "patch_size": PATCH}, projection_dim=128)
    )


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Brings images to what `drawn` gives: 96 px by Lanczos, values from -1 to 1."""
    half = [0.5, 0.5, 0.5]
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPProcessor(CLIPImageProcessorPil(**size, resample=1, image_mean=half, image_std=half), tokenizer)


class PatchNames(nn.Module):
    """Reads from each patch's token the colour, shape, fill and size of the object it shows. Thrown away after training."""

    FACTORS = (
        ("colour", tuple(shapes.COLOURS)),
        ("shape", shapes.SHAPES),
        ("fill", shapes.FILLS),
        ("size", tuple(shapes.SIZES)),
    )

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(values) + 1) for _, values in self.FACTORS)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of (image, patch, width) tokens against (image, factor, patch) classes; empty patches count little."""
        losses = []
        for row, head in enumerate(self.heads):
            weight = torch.ones(len(self.FACTORS[row][1]) + 1)  # class 0 is an empty patch
            weight[0] = 0.05
            losses.append(functional.cross_entropy(head(tokens).transpose(1, 2), target[:, row], weight=weight))
        return torch.stack(losses).mean()

    @classmethod
    def target(cls, scene: shapes.Scene) -> np.ndarray:
        """(factor, patch) class numbers; 0 is empty, -100 a patch of which an object covers a little."""
        side = SIDE // PATCH
        centres = (np.arange(side) + 0.5) / side
        grid = np.zeros((len(cls.FACTORS), side, side), np.int64)
        for obj in scene.objects:
            distance = np.hypot(centres[None, :] - obj.x, centres[:, None] - obj.y)
            near, inside = distance < obj.radius + 0.06, distance < max(0.75 * obj.radius, 0.05)
            for row, (name, values) in enumerate(cls.FACTORS):
                grid[row][near & (grid[row] == 0)] = -100
                grid[row][inside] = list(values).index(getattr(obj, name)) + 1
        return grid.reshape(len(cls.FACTORS), -1)


# --- training -------------------------------------------------------------------------------------


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Symmetric cross-entropy of (image, text) logits, own pairs on the diagonal.

    A caption that is `true` of another image of the batch is no wrong answer for it: it is left out there.
    """
    own = torch.eye(len(logits), dtype=torch.bool)
    kept = logits.masked_fill(true & ~own, float("-inf"))
    wanted = torch.arange(len(logits))
    return (functional.cross_entropy(kept, wanted) + functional.cross_entropy(kept.T, wanted)) / 2


def train_clip(config: Config, folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Both towers together; the retrieval logged is that of the batch just seen (image to text, of `batch`)."""
    torch.manual_seed(config.seed + 3)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "shapes-sd" / "tokenizer")
    model, names = build_clip(tokenizer), PatchNames()
    if config.start is not None:
        model.load_state_dict(CLIPModel.from_pretrained(config.start).float().state_dict())
    parameters = [*model.parameters(), *names.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.peak, betas=(0.9, 0.98), weight_decay=0.05)
    progress = Progress(folder, "clip", {"model": model, "names": names}, optimizer)
    history: list[tuple[float, float, float]] = []
    for indices in batches(config.scenes, config.batch, config.seed + 3, progress.step):
        if progress.step >= config.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.peak * learning_rate_share(progress.step, config.steps, config.decay_share)
        rng = np.random.default_rng([config.seed, 3, progress.step])
        scenes = [train_scene(int(i), config.seed) for i in indices]
        captions = [say(scene, rng) for scene in scenes]
        tokens = tokenize(tokenizer, [said.text for said in captions])
        tokens = tokens[:, : int((tokens != tokenizer.pad_token_id).sum(1).max())]
        pixels = torch.from_numpy(np.stack([drawn(scene) for scene in scenes]))
        output = model(input_ids=tokens, pixel_values=pixels)
        true = torch.tensor([[said.is_true_of(scene) for said in captions] for scene in scenes])
        matching = contrastive_loss(output.logits_per_image, true)
        target = torch.from_numpy(np.stack([PatchNames.target(scene) for scene in scenes]))
        naming = names(output.vision_model_output.last_hidden_state[:, 1:], target)
        share = max(0.0, 1 - progress.step / (config.naming_share * config.steps))
        (matching + 2 * share * naming).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        progress.step += 1
        hit = (output.logits_per_image.masked_fill(true, -1e9).amax(1) < output.logits_per_image.diagonal()).float().mean()
        history.append((matching.item(), naming.item(), hit.item()))
        if progress.step % 25 == 0:
            loss, naming_loss, hits = np.mean(history[-25:], axis=0)
            progress.log({"matching": loss, "naming": naming_loss, "retrieval": hits}, config.steps)
        if progress.step % config.save_every == 0 or progress.step == config.steps:
            progress.save()
    return model.eval(), build_processor(tokenizer)
