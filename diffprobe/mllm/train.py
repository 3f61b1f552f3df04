"""The resumable training loop, and the training of a projector on captions.

The invariant: what step n does depends on (config, data, n) only, so a run that was interrupted ends in the same weights.
Under ``accelerate launch`` or torchrun each process takes its share of every batch.
"""

from __future__ import annotations

import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, DistributedType
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict

from diffprobe.mllm.config import Schedule, TrainConfig
from diffprobe.mllm.language import LanguageModel, answer_losses, build_inputs
from diffprobe.mllm.projector import WEIGHTS, Projector
from diffprobe.rundir import check_or_write_request, remove_unfinished, sole_writer, whole_file, write_whole

REQUEST, CHECKPOINT = "training.json", "checkpoint.pt"
ANOTHER = "holds another training; give another folder."  # what is said of a folder whose request differs
_GATHERED = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@dataclass(frozen=True)
class Captioned:
    """Features with one caption per sample, and the unconditional features of the same samples for dropout."""

    features: Float[Tensor, "sample token channel"]
    captions: Sequence[str]
    null: Float[Tensor, "sample token channel"] | None = None


@dataclass
class _State:
    """How far a training has come; what a checkpoint holds besides weights and optimizer."""

    step: int = 0
    best: float = math.inf
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


Losses = Callable[[nn.Module, Int[np.ndarray, " row"], Bool[np.ndarray, " row"]], tuple[Tensor, int]]


# --- the loop ---------------------------------------------------------------------------------------


def fit(
    learner: nn.Module,
    losses: Losses,
    sizes: Sequence[int],
    folder: str | Path,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    dev_loss: Callable[[nn.Module], float] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train the parameters that are not frozen, or resume where an earlier call was interrupted.

    Args:
        learner: trained in place; with several processes through accelerate's wrapper (DDP, or FSDP 2, which leaves it sharded).
        losses: called with (learner, samples, which of them drop their prompt); returns the sum over answer tokens, and
            the number of positions that the language model read.
        sizes: answer tokens of each training sample.
        folder: gets ``checkpoint.pt`` and ``loss.csv``.
        dev_loss: if given, the weights that are best by it are returned, else the last ones.
        log: gets a line at each checkpoint: step, loss, tokens a second, minutes to go.

    Returns:
        The trained weights and buffers, gathered from all processes into the first; empty in the others.  The caller saves them.
    """
    folder = Path(folder)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=0.0)
    wrapped, stepper = accelerator.prepare(learner, optimizer)
    state, best = load_checkpoint(folder, wrapped, optimizer, accelerator)
    started, read, first = time.perf_counter(), 0, state.step
    while state.step < schedule.steps and not (schedule.patience and state.stale >= schedule.patience):
        rate = schedule.learning_rate * _share(state.step, schedule.steps)
        for group in stepper.param_groups:
            group["lr"] = rate
        loss, positions = _step(accelerator, wrapped, stepper, losses, sizes, schedule, state.step)
        state.step += 1
        read += positions
        state.history.append({"step": state.step, "loss": loss, "dev_loss": math.nan, "learning_rate": rate})
        if state.step % schedule.evaluate_every and state.step != schedule.steps:
            continue
        said = ""
        if dev_loss is not None:
            found = dev_loss(accelerator.unwrap_model(wrapped))
            state.history[-1]["dev_loss"] = found
            state.stale = 0 if found < state.best else state.stale + 1
            said = f", dev {found:.3f} (best {min(found, state.best):.3f})"
            if found < state.best:
                state.best, best = found, _weights(wrapped)
        save_checkpoint(folder, wrapped, optimizer, state, best, accelerator.is_main_process)
        if accelerator.is_main_process:
            recent = np.mean([row["loss"] for row in state.history[-schedule.evaluate_every :]])
            seconds = time.perf_counter() - started
            left = seconds / (state.step - first) * (schedule.steps - state.step) / 60
            later = f", at most {left:.0f} min to go" if left >= 1 else ""
            speed = f"{read * accelerator.num_processes / seconds:,.0f} tokens/s"
            log(f"step {state.step} of {schedule.steps}: loss {recent:.3f}{said}, {speed}{later}")
    if state.best < math.inf:
        state_dict.set_model_state_dict(wrapped, best, options=_scattered(accelerator))
    return _weights(wrapped)


def _step(
    accelerator: Accelerator, learner: nn.Module, optimizer: Any, losses: Losses, sizes: Sequence[int], schedule: Schedule,
    step: int,
) -> tuple[float, int]:  # fmt: skip
    """One optimizer step.

    Returns:
        The mean loss per token over the whole batch, however it is split, and the positions that this process read.
    """
    chosen, dropped = batch_of(step, len(sizes), schedule)
    tokens, positions = sum(sizes[i] for i in chosen), 0
    total = torch.zeros((), device=accelerator.device)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    for part in np.array_split(np.arange(schedule.batch)[mine], schedule.accumulate):
        with accelerator.autocast():
            loss, read = losses(learner, chosen[part], dropped[part])
        loss = loss / tokens
        accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        total += loss.detach()
        positions += read
    accelerator.clip_grad_norm_(learner.parameters(), 1.0)  # all parameters, or accelerate takes shards for wholes
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(total, "sum")), positions


def _share(step: int, steps: int) -> float:
    """Share of the learning rate, 0 to 1: a warm-up over 3% of the steps, then a cosine."""
    warm = max(1, round(0.03 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batch_of(step: int, samples: int, config: Schedule) -> tuple[Int[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """The samples of a step, each once an epoch, and which of them are shown their unconditional features."""
    epoch, place = divmod(step, samples // config.batch)
    order = np.random.default_rng([config.seed, epoch]).permutation(samples)
    dropped = np.random.default_rng([config.seed, step, 1]).random(config.batch) < config.dropout
    return order[place * config.batch : (place + 1) * config.batch], dropped


def check_schedule(config: Schedule, samples: int) -> None:
    """Raise ValueError if a batch or a share of dropout is impossible with the samples and the launched processes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= config.dropout < 1:
        raise ValueError(f"Caption dropout is a share from 0 to below 1; got {config.dropout}.")
    if config.batch % config.accumulate or config.batch > samples:
        raise ValueError(
            f"A batch of {config.batch} must be divisible by accumulate={config.accumulate} and not exceed the "
            f"{samples} training samples."
        )
    if config.batch // ranks < config.accumulate:
        raise ValueError(
            f"A batch of {config.batch} gives each of {ranks} processes {config.batch // ranks} samples, too few for "
            f"accumulate={config.accumulate} forward passes; a batch of {ranks * config.accumulate} or "
            f"accumulate={max(1, config.batch // ranks)} would do."
        )


def sharded(accelerator: Accelerator) -> bool:
    """Whether weights are spread over processes.

    Raises:
        ValueError: by an engine whose weights cannot be gathered and resumed here.
    """
    engine = accelerator.distributed_type
    if engine == DistributedType.DEEPSPEED or (engine == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            "Of accelerate's engines that spread weights over GPUs, FSDP 2 alone is supported: "
            "accelerate launch --use_fsdp --fsdp_version 2 -m diffprobe ..."
        )
    return bool(engine == DistributedType.FSDP)


# --- the folder of a training -----------------------------------------------------------------------


@contextmanager
def training_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Lock a folder while a training runs and saves its result; the checkpoint goes when all is saved."""
    with sole_writer(folder, accelerator.process_index, accelerator.num_processes):
        yield
        if accelerator.is_main_process:
            (folder / CHECKPOINT).unlink(missing_ok=True)
        accelerator.wait_for_everyone()


def save_checkpoint(
    folder: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, state: _State, best: dict[str, Any], main: bool
) -> None:
    """Write ``loss.csv`` and then ``checkpoint.pt``, each whole or not at all; every process must call this."""
    held = {
        "learner": _weights(learner),
        "optimizer": state_dict.get_optimizer_state_dict(learner, optimizer, options=_GATHERED),
        "best": best,
        "state": asdict(state),
    }
    if not main:
        return
    curve = pd.DataFrame(state.history)
    curve["dev_loss"] = curve["dev_loss"].astype(object).where(curve["dev_loss"].notna(), "")
    write_whole(folder / "loss.csv", curve.to_csv(index=False, lineterminator="\n", na_rep="nan"))
    with whole_file(folder / CHECKPOINT) as beside:  # the last, because it says what is done
        torch.save(held, beside)


def load_checkpoint(
    folder: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[_State, dict[str, Any]]:
    """Put a folder's checkpoint, if there is one, into learner and optimizer.

    Returns:
        How far the training has come, and its best weights.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    if accelerator.is_main_process:
        remove_unfinished(folder)
    if not (folder / CHECKPOINT).exists():
        return _State(), {}
    held = read_checkpoint(folder / CHECKPOINT)
    state_dict.set_model_state_dict(learner, held["learner"], options=_scattered(accelerator))
    state_dict.set_optimizer_state_dict(learner, optimizer, held["optimizer"], options=_scattered(accelerator))
    return _State(**held["state"]), held["best"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; raises ValueError if it is damaged.

    `torch.save` writes a zip archive with a checksum of every part; `torch.load` does not compare them.
    """
    damaged = f"{path} is no checkpoint of a training, or is damaged; remove it."
    with path.open("rb") as file:
        try:
            if zipfile.ZipFile(file).testzip() is None:
                held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                return held
        except MemoryError:
            raise
        except Exception as error:  # of zip, pickle or torch, whichever reads the changed byte first
            raise ValueError(damaged) from error
    raise ValueError(damaged)


def _scattered(accelerator: Accelerator) -> state_dict.StateDictOptions:
    """For weights that the first process holds whole: each process gets the parts that it keeps."""
    return state_dict.StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=accelerator.num_processes > 1)


def _weights(learner: nn.Module) -> dict[str, Any]:
    """Trained weights, and buffers, gathered from all processes onto the CPU of the first."""
    state: dict[str, Any] = state_dict.get_model_state_dict(learner, options=_GATHERED)
    # torch leaves frozen weights in where two names share one, as tied embeddings do
    frozen = {
        name.removeprefix("module.") for name, p in learner.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    # on a CPU they would go on changing
    return {name: value.detach().clone() for name, value in state.items() if name not in frozen}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the faster of two calls, because the first pays for what is made once, and the second call's result."""
    seconds, found = [], None
    for _ in range(2):
        started = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), found


# --- a projector ------------------------------------------------------------------------------------


def train_projector(
    language: LanguageModel,
    train: Captioned,
    dev: Captioned,
    folder: str | Path,
    config: TrainConfig | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> Projector:
    """Train a projector on captions, or resume where an earlier call was interrupted; the best one on the dev split is kept.

    Args:
        folder: gets ``projector.safetensors``, ``config.json``, ``loss.csv`` and, until the end, ``checkpoint.pt``.

    Raises:
        ValueError: the data do not fit together, another process trains in the folder, or it holds another run (the message
            lists the differences), or accelerate is set up to shard weights.
    """
    config, folder = config or TrainConfig(), Path(folder)
    _check(train, dev, config)
    request = {**asdict(config), "language_model": language.name, "samples": len(train.captions)}
    check_or_write_request(folder / REQUEST, request, ANOTHER)
    if (folder / WEIGHTS).exists():
        (folder / CHECKPOINT).unlink(missing_ok=True)  # left there if a process was killed between the two
        return Projector.load(folder).to(language.device)
    accelerator = Accelerator(cpu=language.device.type == "cpu")
    if sharded(accelerator):
        raise ValueError("A projector is too small to be sharded: leave FSDP out (accelerate launch --num_processes N).")
    projector = Projector(train.features.shape[-1], language.width, config.kind, language.rms, config.seed)
    projector.standardise(train.features)
    answers = [language.answer(text) for text in train.captions]
    dev_answers = [language.answer(text) for text in dev.captions]

    def losses(learner: nn.Module, features: Tensor, wanted: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        inputs = build_inputs(language, learner(features.to(language.device)), [config.request] * len(wanted), wanted)
        return answer_losses(language, inputs).sum(), inputs.mask.numel()

    def train_losses(
        learner: nn.Module, chosen: Int[np.ndarray, " row"], dropped: Bool[np.ndarray, " row"]
    ) -> tuple[Tensor, int]:
        features = train.features[chosen]
        if dropped.any():
            assert train.null is not None
            features = torch.where(torch.from_numpy(dropped)[:, None, None], train.null[chosen], features)
        return losses(learner, features, [answers[i] for i in chosen])

    @torch.no_grad()
    def dev_loss(learner: nn.Module) -> float:
        parts = [slice(start, start + 2 * config.batch) for start in range(0, len(dev_answers), 2 * config.batch)]
        total = sum(float(losses(learner, dev.features[part], dev_answers[part])[0]) for part in parts)
        return total / sum(len(answer) for answer in dev_answers)

    with training_in(folder, accelerator):
        sizes = [len(answer) for answer in answers]
        fit(projector, train_losses, sizes, folder, config, accelerator, dev_loss=dev_loss, log=log)
        if accelerator.is_main_process:
            projector.save(folder)
    return projector.eval()


def _check(train: Captioned, dev: Captioned, config: TrainConfig) -> None:
    for name, part in (("training", train), ("dev", dev)):
        if len(part.features) != len(part.captions) or not len(part.captions):
            raise ValueError(f"The {name} split has {len(part.features)} features and {len(part.captions)} captions.")
        if not torch.isfinite(part.features).all():
            raise ValueError(f"The {name} split's features hold values that are not finite.")
    check_schedule(config, len(train.captions))
    if config.dropout and (train.null is None or train.null.shape != train.features.shape):
        raise ValueError("Caption dropout needs the unconditional features of the training samples.")
