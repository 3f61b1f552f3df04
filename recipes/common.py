"""What the trainings share: scenes and captions of the train split, and one loop that every stage runs in.

A stage is a function from a step's number to its batch, and one from a batch to its loss.  The first is pure, so a stage
that was cut off goes on with the batches it would have had, and worker processes may draw them ahead.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffprobe.data import shapes
from diffprobe.data.images import normalised_pixels

SIDE = 64
GROUP = 4  # scenes that are drawn together: one object, two, any number, and the two mirrored
RELATION, ANY = 1, 2
PAIR_STYLES = {"relation": 0.85, "place": 0.06, "full": 0.04, "list": 0.03, "count": 0.01, "web": 0.01}
STYLES = {"list": 0.3, "place": 0.3, "full": 0.14, "web": 0.1, "count": 0.1, "partial": 0.06}


# --- scenes and words -----------------------------------------------------------------------------


def mirrored(scene: shapes.Scene) -> shapes.Scene:
    """The scene with its objects' places reflected along the axis of their relation: left becomes right, above below.

    >>> one = shapes.random_scene(0, 1, n_objects=2)
    >>> shapes.relation(*one.objects), shapes.relation(*mirrored(one).objects)
    ('right of', 'left of')
    """
    a, b = scene.objects[:2]
    if abs(a.x - b.x) > abs(a.y - b.y):
        return replace(scene, objects=tuple(replace(o, x=1 - o.x) for o in scene.objects))
    return replace(scene, objects=tuple(replace(o, y=1 - o.y) for o in scene.objects))


def train_scene(index: int, seed: int) -> shapes.Scene:
    """Training scene `index`: by turns of one object, of two, of any number, and the scene of two mirrored."""
    place = index % GROUP
    if place == GROUP - 1:
        return mirrored(train_scene(index - GROUP + 1 + RELATION, seed))
    return shapes.random_scene(seed, index, "train", n_objects=None if place == ANY else place + 1)


def random_caption(scene: shapes.Scene, rng: np.random.Generator) -> str:
    """A caption of a random style that names the objects in a random order; of two objects mostly their relation."""
    styles = PAIR_STYLES if len(scene.objects) == 2 and not shapes.all_alike(scene) else STYLES
    style = str(rng.choice(list(styles), p=np.array(list(styles.values()))))
    return shapes.caption(scene, style, [int(i) for i in rng.permutation(len(scene.objects))]).text


def drawn(scene: shapes.Scene) -> np.ndarray:
    """The scene at the models' resolution (3, y, x) in [-1, 1], resized as the pipelines' preprocessors do."""
    image = Image.fromarray(shapes.render(scene)[0]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return normalised_pixels(image)


def drawn_batch(scenes: Sequence[shapes.Scene]) -> Tensor:
    """(scene, 3, y, x) in [-1, 1]."""
    return torch.from_numpy(np.stack([drawn(scene) for scene in scenes]))


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """The random stream of one step of one stage."""
    return np.random.default_rng([seed, stage, step])


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How long and on what a stage is trained.

    Attributes:
        steps: The most steps; the learning rate falls towards their end.
        minutes: The most minutes; the learning rate falls towards their end too.
        decay_share: Over which last part of the training the learning rate falls to zero.
        workers: Processes that draw batches ahead; 0 draws them in the training's own.
    """

    steps: int
    minutes: float | None = None
    decay_share: float = 0.3
    device: str = "cpu"
    workers: int = 0
    log_every: int = 25
    save_every: int = 100


def rate_share(done: float, step: int, decay_share: float) -> float:
    """The learning rate's share of its peak: warm up for 100 steps, stay, then fall to zero with the training's end.

    >>> [round(rate_share(done, step, 0.2), 2) for done, step in ((0.0, 0), (0.05, 50), (0.5, 500), (0.9, 900))]
    [0.0, 0.5, 1.0, 0.5]
    """
    return min(1.0, step / 100, (1 - done) / max(1e-9, decay_share))


class Batches(Dataset[Any]):
    """Batch number `step` of a stage, for a `DataLoader`."""

    def __init__(self, batch_of: Callable[[int], Any], steps: int) -> None:
        self.batch_of, self.steps = batch_of, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.batch_of(step)


def moved(batch: Any, device: str) -> Any:
    """The batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    return batch


def matrix_views(parameters: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each weight with a matrix (output, everything else) that shares its memory: Muon takes matrices alone."""
    return [(p, nn.Parameter(p.data.view(len(p), -1))) for p in parameters]


class Optimizers:
    """Muon for the weights inside a network, AdamW for embeddings, norms, biases and what touches input and output."""

    def __init__(
        self, module: nn.Module, peak: float, muon_peak: float, outer: Sequence[str] = (), decay: float = 0.01
    ) -> None:
        named = list(module.named_parameters())
        inside = [p for name, p in named if p.ndim > 1 and muon_peak and not any(part in name for part in outer)]
        known = {id(p) for p in inside}
        self.views = matrix_views(inside)
        outside = [p for _, p in named if id(p) not in known]
        adam = torch.optim.AdamW(outside, peak, betas=(0.9, 0.99), weight_decay=decay)
        self.pairs: list[tuple[torch.optim.Optimizer, float]] = [(adam, peak)]
        if inside:
            matrices = [view for _, view in self.views]
            muon = torch.optim.Muon(matrices, muon_peak, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self.pairs.append((muon, muon_peak))

    def step(self, share: float) -> None:
        for parameter, view in self.views:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        for optimizer, peak in self.pairs:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        for parameter, _ in self.views:
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self.pairs]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for (optimizer, _), saved in zip(self.pairs, state, strict=True):
            optimizer.load_state_dict(saved)


def train(
    name: str,
    folder: Path,
    plan: Plan,
    modules: Mapping[str, nn.Module],
    optimizers: Optimizers,
    batch_of: Callable[[int], Any],
    loss_of: Callable[[Any, float], tuple[Tensor, dict[str, Tensor]]],
    after: Callable[[int], None] = lambda step: None,
) -> tuple[int, float]:
    """Train to the plan's end, or go on from the checkpoint ``NAME.pt``; the curve is ``NAME_loss.csv``.

    Args:
        batch_of: Step number to batch, a pure function.
        loss_of: Batch and how much of the training is done (0 to 1) to the loss and what is logged, scalars.
        after: Called with the step's number when it is done, before it is saved: moving averages.

    Returns:
        Steps made and seconds spent, earlier parts of the training among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, curve = folder / f"{name}.pt", folder / f"{name}_loss.csv"
    step, before = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=plan.device)
        for part, module in modules.items():
            module.load_state_dict(saved[part])
        optimizers.load_state_dict(saved["optimizers"])
        step, before = saved["step"], saved["seconds"]
    since = time.perf_counter()

    def spent() -> float:
        return before + time.perf_counter() - since

    def save() -> None:
        kept = {part: module.state_dict() for part, module in modules.items()}
        kept |= {"optimizers": optimizers.state_dict(), "step": step, "seconds": spent()}
        torch.save(kept, state.with_suffix(".partial"))
        state.with_suffix(".partial").replace(state)

    def done() -> float:
        return max(step / plan.steps, spent() / (60 * plan.minutes) if plan.minutes else 0.0)

    parameters = [p for group in optimizers.pairs[:1] for g in group[0].param_groups for p in g["params"]]
    parameters += [p for p, _ in optimizers.views]
    logged: list[dict[str, Tensor]] = []
    loader = DataLoader(
        Batches(batch_of, plan.steps), batch_size=None, sampler=range(step, plan.steps), num_workers=plan.workers,
        pin_memory=plan.device.startswith("cuda"),
    )  # fmt: skip
    for batch in loader:
        if done() >= 1:
            break
        loss, values = loss_of(moved(batch, plan.device), done())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(rate_share(done(), step, plan.decay_share))
        step += 1
        after(step)
        logged.append({key: value.detach() for key, value in values.items()})
        if step % plan.log_every == 0 or step == plan.steps:
            means = {key: float(torch.stack([row[key].float() for row in logged]).mean()) for key in logged[0]}
            logged.clear()
            is_new = not curve.exists()
            with curve.open("a", newline="") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(["step", "seconds", *means])
                writer.writerow([step, f"{spent():.0f}", *(f"{value:.5f}" for value in means.values())])
            text = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            print(f"{name} {step}/{plan.steps}  {text}  {spent():.0f} s", flush=True)
        if step % plan.save_every == 0:
            save()
    save()
    return step, spent()
