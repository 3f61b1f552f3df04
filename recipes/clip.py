"""shapes-clip, a `CLIPModel` that is blind where its captions are silent, in its patches too.

Captions are of the styles "web" and "partial": colour, shape, size, fill, the background's tone, and whether things that
are all alike are two or several.  Orientation, letters, positions and counts above two are never said (Tong et al. 2024,
"Eyes Wide Shut").  Silence alone blinds only what is pooled: patch tokens keep what nothing asks them to lose.  So each
scene is drawn a second time with its directions and letters exchanged, both drawings must give the same patch tokens at
the layer that a fused model takes, and a head that tries to read direction and letter there is trained against.  What the
two drawings' tokens differ by is measured along each axis against that axis' own variance (`told_apart`): a difference that
is small on the whole can hide in axes that hold nothing else, and a linear probe scales these up.

Each patch also learns to name the object it shows, in words that the captions use; that head is thrown away.  Sameness
counts in the second half only: a tower that had to keep it from the first step never learnt shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffprobe.data import shapes
from recipes.common import SIDE, Optimizers, Plan, drawn_batch, step_rng, train, train_scene
from recipes.sd import autocast, tokenize

PATCH = 8
CELLS = SIDE // PATCH
LAYER = -2  # of the hidden states: what a fused model takes
PARTIAL_SHARE = 0.25
LETTERS = tuple(shapes.LETTERS)
DIRECTIONS = tuple(shapes.DIRECTIONS)


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan(steps=3800, decay_share=0.4))
    batch: int = 64
    peak: float = 1e-3
    muon_peak: float = 2e-3
    sameness: float = 3.0  # what the difference of a scene's two drawings counts in the second half
    reversal: float = 1.0  # what the head that reads directions and letters counts against the tower
    naming: float = 3.0  # what the naming of patches counts


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


def exchanged(scene: shapes.Scene, rng: np.random.Generator) -> shapes.Scene:
    """The scene with other directions, and other letters in place of letters: no caption of `say` tells the two apart."""
    objects = []
    for obj in scene.objects:
        letter = str(rng.choice([one for one in LETTERS if one != obj.mark])) if obj.mark in LETTERS else obj.mark
        direction = str(rng.choice([one for one in DIRECTIONS if one != obj.direction]))
        objects.append(replace(obj, direction=direction, mark=letter))
    return replace(scene, objects=tuple(objects))


# --- the model ------------------------------------------------------------------------------------


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**tower, "num_hidden_layers": 6, "image_size": SIDE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def image_processor() -> CLIPImageProcessorPil:
    """Brings images to what `drawn` gives: 64 px by Lanczos, values from -1 to 1."""
    half = [0.5, 0.5, 0.5]
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPImageProcessorPil(**size, resample=1, image_mean=half, image_std=half)


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    return CLIPProcessor(image_processor(), tokenizer)


class PatchNames(nn.Module):
    """Reads from each patch's token the colour, shape, fill and size of the object it shows.  Thrown away after training."""

    FACTORS = tuple((name, shapes.ATTRIBUTES[name]) for name in ("colour", "shape", "fill", "size"))

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(values) + 1) for _, values in self.FACTORS)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of (image, patch, width) tokens against (image, factor, patch) classes; empty patches count little."""
        losses = []
        for row, head in enumerate(self.heads):
            weight = torch.ones(len(self.FACTORS[row][1]) + 1, device=tokens.device)  # class 0 is an empty patch
            weight[0] = 0.05
            losses.append(functional.cross_entropy(head(tokens).transpose(1, 2), target[:, row], weight=weight))
        return torch.stack(losses).mean()

    @classmethod
    def target(cls, scene: shapes.Scene) -> np.ndarray:
        """(factor, patch) class numbers; 0 is empty, -100 a patch of which an object covers a little."""
        centres = (np.arange(CELLS) + 0.5) / CELLS
        grid = np.zeros((len(cls.FACTORS), CELLS, CELLS), np.int64)
        for obj in scene.objects:
            distance = np.hypot(centres[None, :] - obj.x, centres[:, None] - obj.y)
            near, inside = distance < obj.radius + 0.06, distance < max(0.75 * obj.radius, 0.05)
            for row, (name, values) in enumerate(cls.FACTORS):
                grid[row][near & (grid[row] == 0)] = -100
                grid[row][inside] = list(values).index(getattr(obj, name)) + 1
        return grid.reshape(len(cls.FACTORS), -1)


class Reversed(torch.autograd.Function):
    """Passes values on and turns their gradient round."""

    @staticmethod
    def forward(context: Any, values: Tensor, share: float) -> Tensor:
        context.share = share
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -context.share * gradient, None


def crops(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens of 3 x 3 patches around places: (image, patch, width), (object, 3) of image, row, column -> (object, 9 width)."""
    grid = functional.pad(tokens.unflatten(1, (CELLS, CELLS)), (0, 0, 1, 1, 1, 1))
    image, row, column = places.unbind(1)
    return torch.cat([grid[image, row + dy, column + dx] for dy in range(3) for dx in range(3)], 1)


def places(scenes: list[shapes.Scene]) -> np.ndarray:
    """(object, 5): image, row and column of the patch at its centre, direction and letter numbers (-100 where it has none)."""
    rows = []
    for image, scene in enumerate(scenes):
        for obj in scene.objects:
            direction = DIRECTIONS.index(obj.direction) if obj.shape in shapes.DIRECTED else -100
            letter = LETTERS.index(obj.mark) if obj.mark in LETTERS else -100
            rows.append((image, int(obj.y * CELLS), int(obj.x * CELLS), direction, letter))
    return np.array(rows, np.int64)


def told_apart(tokens: Tensor, objects: Tensor, floor: float = 1e-3) -> Tensor:
    """How much of the variance of tokens around objects is the difference of a scene's two drawings, summed over all axes.

    An axis counts by its share, whatever its scale, as it does for a linear probe; 0 where the drawings give the same tokens.

    Args:
        tokens: (image, patch, width); the second half of the images are the other drawings of the first half.
        objects: (object, 5) of the first half, as `places` gives them.
        floor: Share of the mean variance, far below which an axis no longer counts.

    >>> tokens, where = torch.randn(4, CELLS**2, 8), torch.tensor([[0, 2, 3, 0, 0], [1, 5, 5, 0, 0]])
    >>> float(told_apart(tokens[[0, 1, 0, 1]], where)), bool(told_apart(tokens, where) > 2)
    (0.0, True)
    """
    one, other = (crops(half, objects[:, :3]).unflatten(1, (9, -1)).flatten(0, 1) for half in tokens.chunk(2))
    both = torch.cat([one, other])
    centred = both - both.mean(0)
    total = centred.T @ centred / len(both)
    within = (one - other).T @ (one - other) / (2 * len(both))
    eye = torch.eye(len(total), device=total.device)
    return torch.linalg.solve(total + floor * total.diagonal().mean() * eye, within).trace()


class Peeker(nn.Module):
    """Tries to read direction and letter from the 3 x 3 patches around an object.  Thrown away after training."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.body = nn.Sequential(nn.Linear(9 * width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())
        self.direction, self.letter = nn.Linear(256, len(DIRECTIONS)), nn.Linear(256, len(LETTERS))
        self.straight = nn.Linear(9 * width, len(DIRECTIONS) + len(LETTERS))  # what a linear probe would read

    def forward(self, tokens: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the share of directions read right."""
        found = crops(self.norm(tokens), objects[:, :3])
        hidden, straight = self.body(found), self.straight(found)
        directions, letters = straight.split((len(DIRECTIONS), len(LETTERS)), 1)
        loss = torch.stack([
            functional.cross_entropy(self.direction(hidden), objects[:, 3]), functional.cross_entropy(directions, objects[:, 3]),
            functional.cross_entropy(self.letter(hidden), objects[:, 4]), functional.cross_entropy(letters, objects[:, 4]),
        ]).mean()  # fmt: skip
        asked = objects[:, 3] >= 0
        return loss, (self.direction(hidden)[asked].argmax(1) == objects[asked, 3]).float().mean()


# --- training -------------------------------------------------------------------------------------


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Symmetric cross-entropy of (image, text) logits, own pairs on the diagonal.

    A caption that is `true` of another image of the batch is no wrong answer for it: it is left out there.
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    kept = logits.masked_fill(true & ~own, float("-inf"))
    wanted = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(kept, wanted) + functional.cross_entropy(kept.T, wanted)) / 2


def train_clip(config: Config, folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Both towers together; the retrieval logged is that of the batch just seen (image to text, of `batch`)."""
    torch.manual_seed(config.seed + 3)
    device = config.plan.device
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model, names, peeker = build_clip(tokenizer).to(device), PatchNames().to(device), Peeker().to(device)
    if device == "cpu":
        model.set_attn_implementation("eager")  # on CPUs the backward pass of the fused attention is slower than its formula
    together = nn.ModuleDict({"model": model, "names": names, "peeker": peeker})

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 4, step)
        scenes = [train_scene(int(i), config.seed) for i in rng.integers(10**7, size=config.batch)]
        captions = [say(scene, rng) for scene in scenes]
        others = [exchanged(scene, rng) for scene in scenes]
        tokens = tokenize(tokenizer, [said.text for said in captions])
        return {
            "tokens": tokens[:, : int((tokens != tokenizer.pad_token_id).sum(1).max())],
            "pixels": drawn_batch([*scenes, *others]),
            "true": torch.tensor([[said.is_true_of(scene) for said in captions] for scene in scenes]),
            "target": torch.from_numpy(np.stack([PatchNames.target(scene) for scene in scenes])),
            "objects": torch.from_numpy(places([*scenes, *others])),
        }

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(device):
            seen = model.vision_model(pixel_values=batch["pixels"], output_hidden_states=True)
            image = model.visual_projection(seen.pooler_output[: config.batch])
            text = model.text_projection(model.text_model(input_ids=batch["tokens"]).pooler_output)
        image, text = functional.normalize(image.float(), dim=-1), functional.normalize(text.float(), dim=-1)
        logits = model.logit_scale.clamp(max=np.log(100)).exp() * image @ text.T
        matching = contrastive_loss(logits, batch["true"])
        patches = seen.hidden_states[LAYER][:, 1:].float()
        naming = names(patches[: config.batch], batch["target"])
        # the logarithm presses on small shares, too, and does not drown the other losses while the share is large
        sameness = torch.log1p(10 * told_apart(patches, batch["objects"][: len(batch["objects"]) // 2]))
        peeking, read = peeker(Reversed.apply(patches, config.reversal * min(1.0, 4 * done)), batch["objects"])
        hit = (logits.masked_fill(batch["true"], -1e9).amax(1) < logits.diagonal()).float().mean()
        logs = {"matching": matching, "naming": naming, "sameness": sameness, "direction": read, "retrieval": hit}
        return matching + config.naming * naming + config.sameness * (done > 0.5) * sameness + peeking, logs

    optimizers = Optimizers(
        together, config.peak, config.muon_peak, outer=("embed", "projection", "names", "peeker"), decay=0.05
    )
    train("clip", folder, config.plan, together, optimizers, batch_of, loss_of)
    return model.eval(), build_processor(tokenizer)
