"""The two stages of LLaVA's recipe for a `FusedMLLM`.

Stage 1 teaches the fusion alone, on captions, with nothing told to the diffusion model: a caption that is prompt and target
at once would be read and not seen (`leakage`).  Stage 2 teaches fusion and language model (all of it, an adapter, or none)
on instructions, with one question of the conversation as the prompt, drawn anew in each epoch.

The invariant is that of `train.fit`: what a step does depends on (config, data, step) only, so a run that was cut off ends in
the same weights.  Features that a cache holds are not computed again; without a cache encoders run in every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffprobe.console import size_text
from diffprobe.data.blank import GREY
from diffprobe.data.conversations import Conversations
from diffprobe.mllm.fusion import Fusion
from diffprobe.mllm.model import CONFIG, WEIGHTS, FusedMLLM, Tuned
from diffprobe.mllm.streams import FeatureCache, Picture, Streams, image_id
from diffprobe.mllm.train import FORMATS, LanguageModel, Schedule, answer_losses, check_schedule, fit, lay_out, settle, sharded
from diffprobe.rundir import free_bytes, sole_writer

Precision = Literal["auto", "no", "bf16"]
MOMENT_PICTURES = 512  # that a fusion's moments are taken from
_READERS = 4  # threads that load images: decoders let go of the interpreter


@dataclass(frozen=True)
class StageConfig(Schedule):
    """One stage; `STAGE1` and `STAGE2` have LLaVA-1.5's values.

    Attributes:
        steps: 0 is `epochs` times through the data.
        epochs: where `steps` is 0.
        tune: of the language model: "" leaves it frozen, "full" or "lora".
        prompted: whether the diffusion model is told a question.
        template: how conversations are written in this stage, as `LanguageModel` takes it; "" is the model's own way.
        max_length: tokens of a conversation behind its first question; longer ones are cut.
        lora_rank, lora_alpha: of the adapter.
        checkpointing: compute the language model's activations again in the backward pass, to save memory.
        precision: "no" computes in float32, "bf16" in bfloat16 where torch's autocast does (weights stay float32); "auto" is
            accelerate's own configuration, else bf16 on a GPU and no on a CPU.
    """

    steps: int = 0
    epochs: int = 1
    patience: int = 0
    tune: Tuned = ""
    prompted: bool = False
    template: str = ""
    max_length: int = 2048
    lora_rank: int = 128
    lora_alpha: int = 256
    checkpointing: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name, kinds in (
            ("tune", get_args(Tuned)),
            ("precision", get_args(Precision)),
            ("template", ("", *FORMATS)),
        ):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is one of {', '.join(map(repr, kinds))}; got {getattr(self, name)!r}.")


STAGE1 = StageConfig(batch=256, learning_rate=1e-3)
STAGE2 = StageConfig(batch=128, learning_rate=2e-5, tune="full", prompted=True)
SMALL1 = StageConfig(steps=300, batch=24, learning_rate=2e-3, precision="bf16")
SMALL2 = StageConfig(steps=1000, batch=24, learning_rate=1e-3, tune="full", prompted=True, precision="bf16")
RECIPES = {"llava": (STAGE1, STAGE2), "small": (SMALL1, SMALL2)}  # "small" is made for the embedded models


def train_fused(
    model: FusedMLLM,
    captions: Conversations,
    instructions: Conversations,
    folder: str | Path,
    stages: tuple[StageConfig, StageConfig] = (STAGE1, STAGE2),
    *,
    dry_run: bool = False,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Both stages of a fresh model, or what is left of them: stage 1 into ``folder/stage1``, the finished model into `folder`.

    Args:
        model: with a fresh fusion; trained in place.  Of a folder that was finished before it does not get the weights:
            `FusedMLLM.from_pretrained` loads them.
        captions: for stage 1.
        instructions: for stage 2.
        folder: the same again goes on where it was cut off.
        stages: what to do in each.
        dry_run: say what each stage will take, and stop.
        force: go on although the disk's free space is too small for the forecast.
        tell: gets progress lines.

    Raises:
        ValueError: the folder holds another training, stage 1 is told prompts, a batch does not go with the data or the
            processes, or the disk is too small.
    """
    first, second = stages
    if first.prompted or first.tune:
        raise ValueError(
            "Stage 1 teaches the fusion alone and tells the diffusion model nothing: a prompt would be read, not seen."
        )
    asked = ((captions, first), (instructions, second))
    for data, stage in asked:  # both before either begins
        check_schedule(_counted(stage, data), samples_of(stage, data))
    forecasts = [forecast_stage(model, data, stage) for data, stage in asked]
    for number, ((data, _), forecast) in enumerate(zip(asked, forecasts, strict=True), start=1):
        tell(f"stage {number}, {data.name}: {forecast}")
    _check_room(forecasts, Path(folder), model.streams.cache, tell, waived=force or dry_run)
    if dry_run:
        return
    before = Path(folder) / "stage1"
    train_stage(model, captions, before, first, tell=lambda line: tell(f"stage 1  {line}"))
    model.fusion.load_state_dict(load_file(before / WEIGHTS))
    train_stage(model, instructions, folder, second, start="stage1", tell=lambda line: tell(f"stage 2  {line}"))


def train_stage(
    model: FusedMLLM,
    data: Conversations,
    folder: str | Path,
    stage: StageConfig = STAGE1,
    *,
    start: str = "",
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Train one stage in place and save the model, or go on where an earlier call was cut off.

    Under ``accelerate launch`` or torchrun each process takes its share of every batch; FSDP 2, where accelerate is set up for
    it, spreads weights and optimizer over the GPUs, and the model is whole again afterwards.

    Args:
        model: with a fresh fusion, or that of an earlier stage.
        data: captions or instructions.
        folder: gets the model as `FusedMLLM.save_pretrained` writes it, ``training.json``, ``loss.csv`` and, until the end,
            ``checkpoint.pt``.  A folder that is finished is left as it is, and its weights are not loaded into `model`.
        stage: what to do.
        start: where the model comes from, for the record.
        tell: gets progress lines.

    Raises:
        ValueError: the folder holds another training, another process trains there, a batch is larger than the data, or
            accelerate is set up for another engine than DDP and FSDP 2.
    """
    folder = Path(folder)
    stage, count = _counted(stage, data), samples_of(stage, data)
    check_schedule(stage, count)
    settle(folder, {**asdict(stage), **_of(model), "data": data.fingerprint(), "samples": count, "start": start})
    if (folder / CONFIG).exists():
        return
    accelerator = accelerated(model.language, stage.precision)
    _tune(model, stage)
    with _writing(model, stage.template):
        samples = Samples(model, data, stage)
        samples.prepare(accelerator, tell)
        if fresh(model.fusion):
            samples.standardise()
        learner = Learner(model.fusion, model.language, short := _short(model.language, stage.precision))
        spare = _hollow(learner) if sharded(accelerator) else None
        learner.train()
        with sole_writer(folder, accelerator.process_index, accelerator.num_processes), _attention(model.language, plain=short):
            weights = fit(learner, samples.losses, samples.sizes, folder, stage, accelerator, tell=tell)
            learner.eval()
            if spare is not None:
                learner = _filled(spare, learner)
                model.fusion, (model.language,) = learner.fusion, learner._speaker
            if accelerator.is_main_process:
                parts = {
                    name: {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
                    for name in ("fusion", "language")
                }
                model.save_pretrained(folder, parts if stage.tune else {"fusion": parts["fusion"]})
                (folder / "checkpoint.pt").unlink(missing_ok=True)
            accelerator.wait_for_everyone()
    if model.cut_prompts:
        tell(f"{model.cut_prompts} questions were longer than the diffusion model's text encoder takes, and were cut.")


def samples_of(stage: StageConfig, data: Conversations) -> int:
    """How many samples a stage makes of conversations: one each, or one a turn where the diffusion model is told the question."""
    return sum(len(data[index].turns) for index in range(len(data))) if stage.prompted else len(data)


def _counted(stage: StageConfig, data: Conversations) -> StageConfig:
    """The stage with its number of steps."""
    return replace(stage, steps=stage.steps or max(1, stage.epochs * (samples_of(stage, data) // stage.batch)))


def _of(model: FusedMLLM) -> dict[str, Any]:
    """What a training is of, in parts that a message can name one by one."""
    found = {f"model.{name}": value for name, value in asdict(model.config).items()}
    return {**found, **{f"origin.{name}": value for name, value in model.origins().items()}}


def accelerated(language: LanguageModel, precision: Precision = "auto") -> Accelerator:
    """Accelerate's own configuration; bfloat16 on a GPU, where nothing else is configured.

    Accelerate has one precision a process, and a process may train more than one thing: on a CPU `Learner` sees to it.
    """
    cpu = language.device.type == "cpu"
    accelerator = Accelerator(cpu=cpu, mixed_precision=None if cpu else "bf16" if precision == "auto" else precision)
    if sharded(accelerator):
        # every process has its weights; accelerate would fetch them from the first, and fails on buffers (1.15)
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


def _short(language: LanguageModel, precision: Precision) -> bool:
    return precision == "bf16" and language.device.type == "cpu"


@contextmanager
def _uncached(streams: Streams) -> Iterator[None]:
    """Streams that neither read nor write their cache."""
    cache, streams.cache = streams.cache, None
    try:
        yield
    finally:
        streams.cache = cache


@contextmanager
def _writing(model: FusedMLLM, template: str) -> Iterator[None]:
    """Conversations written as a stage writes them."""
    before = model.language.template
    model.language.template = template or before
    try:
        yield
    finally:
        model.language.template = before


@contextmanager
def _attention(language: LanguageModel, plain: bool) -> Iterator[None]:
    """Plain attention while a CPU trains in bfloat16: the fused kernel's backward pass is slow there.

    A step of shapes-lm on 20 rows of 86 tokens, one core (Zen 5): 57 ms plain, 88 ms fused; 140 ms in float32.
    """
    before = language.model.config._attn_implementation
    if plain:
        language.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.model.set_attn_implementation(before)


def fresh(fusion: Fusion) -> bool:
    """Whether no moments were fixed yet."""
    return all(bool((p.mean == 0).all() and (p.std == 1).all()) for p in fusion.projectors.values())  # type: ignore[union-attr]


def _tune(model: FusedMLLM, stage: StageConfig) -> None:
    """Make ready what of the language model is trained; its trained weights are float32, whatever it was loaded in."""
    language = model.language
    if stage.tune and model.tuned not in ("", stage.tune):
        raise ValueError(f"This model's language model was tuned as {model.tuned!r}; it cannot be tuned as {stage.tune!r} now.")
    if stage.tune == "full":
        language.model.float().requires_grad_(True)
    elif stage.tune == "lora" and model.tuned != "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            options = LoraConfig(
                r=stage.lora_rank, lora_alpha=stage.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            language.model = get_peft_model(language.model, options)
    elif stage.tune == "lora":
        for name, parameter in language.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model.tuned = stage.tune or model.tuned
    if stage.checkpointing:
        language.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _hollow(learner: Learner) -> Learner:
    """A copy without weights (buffers are kept), because what FSDP has sharded cannot be made whole in place."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in learner.parameters()}
    return deepcopy(learner, empty)


def _filled(spare: Learner, learner: Learner) -> Learner:
    """The copy with the weights of the sharded one, gathered into every process."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in learner.state_dict().items()}
    spare.load_state_dict(whole, assign=True)
    spare.language.tie_weights()
    return spare.eval()


class Learner(nn.Module):
    """Fusion and language model as one module, so that accelerate wraps what is trained; its forward pass is the loss.

    Args:
        short: compute in bfloat16 on a CPU.
    """

    def __init__(self, fusion: Fusion, language: LanguageModel, short: bool = False) -> None:
        super().__init__()
        self.fusion, self.language, self.short = fusion, language.model, short
        self._speaker = [language]  # no module: kept out of the state
        self._no_split_modules = language.model._no_split_modules  # FSDP shares the weights of each of these layers apart

    def forward(
        self, streams: Mapping[str, Tensor], questions: Sequence[str], images: Sequence[int],
        answers: Sequence[Sequence[int]], labels: Sequence[Sequence[int]],
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Sum of the losses of answer tokens, and how many positions were read."""
        # entered anew in each pass: autocast keeps its copies of the weights until it is left
        with torch.autocast("cpu", torch.bfloat16) if self.short else nullcontext():
            return self._losses(streams, questions, images, answers, labels)

    def _losses(
        self, streams: Mapping[str, Tensor], questions: Sequence[str], images: Sequence[int],
        answers: Sequence[Sequence[int]], labels: Sequence[Sequence[int]],
    ) -> tuple[Tensor, int]:  # fmt: skip
        (language,) = self._speaker
        soft = self.fusion(streams) if streams else torch.zeros(0, 0, language.width, device=language.device)
        # talk without images leaves the fusion a gradient of zero, not none, or processes would wait for each other
        total = soft.sum() * 0.0 if streams else torch.stack([p.sum() for p in self.fusion.parameters()]).sum() * 0.0
        first, read = np.cumsum([0, *images]), 0
        for count in sorted(set(images)):  # rows with as many images: little of them is padding
            rows = [row for row, held in enumerate(images) if held == count]
            mine = [place for row in rows for place in range(first[row], first[row + 1])]
            laid = lay_out(
                language, soft[mine], [questions[row] for row in rows], [answers[row] for row in rows],
                images=[count] * len(rows), labels=[labels[row] for row in rows],
            )  # fmt: skip
            total = total + answer_losses(language, laid).sum()
            read += laid.mask.numel()
        return total, read


class Samples:
    """Conversations as a stage reads them; where the diffusion model is told a question, each turn is a sample of its own.

    A turn read from features that were prompted with another turn's question would teach the language model to ignore
    what the prompt brings out.
    """

    def __init__(self, model: FusedMLLM, data: Conversations, stage: StageConfig) -> None:
        self.model, self.data, self.stage = model, data, stage
        given = [(index, data[index]) for index in range(len(data))]
        parts = [
            (index, turns, one.images)
            for index, one in given
            for turns in ([(turn,) for turn in one.turns] if stage.prompted else [one.turns])
        ]
        self.source = [index for index, _, _ in parts]  # the conversation that a sample belongs to
        self.turns, self.images = [turns for _, turns, _ in parts], [images for _, _, images in parts]
        told = [
            model.language.answers(turns, stage.max_length, bool(images))
            for turns, images in zip(self.turns, self.images, strict=True)
        ]
        self.answers, self.labels = [ids for ids, _ in told], [labels for _, labels in told]
        self.sizes = [sum(label >= 0 for label in labels) for labels in self.labels]

    def prompt(self, index: int) -> str | None:
        """What the diffusion model is told of a sample: its own question."""
        return self.turns[index][0][0] if self.stage.prompted else None

    def pictures(self, indices: Sequence[int]) -> list[list[Picture]]:
        """The pictures of conversations; with a cache each image's id is found once."""
        cache = self.model.streams.cache
        known = {} if cache is None else cache.ids.setdefault(self.data.fingerprint(), {})

        def look(index: int) -> list[Picture]:
            loaders = self.images[index]
            if cache is None:
                return [Picture.of(load()) for load in loaders]
            own = self.source[index]
            if own not in known:
                known[own] = [image_id(load()) for load in loaders]
            return [Picture(name, load) for name, load in zip(known[own], loaders, strict=True)]

        unknown = [index for index in indices if self.source[index] not in known]
        with ThreadPoolExecutor(_READERS) as readers:
            found = dict(zip(unknown, readers.map(look, unknown), strict=True))
        return [found[index] if index in found else look(index) for index in indices]

    def prepare(self, accelerator: Accelerator, tell: Callable[[str], None]) -> None:
        """Fill the cache, each process with its share of the conversations."""
        cache = self.model.streams.cache
        if cache is None:
            return
        mine = range(accelerator.process_index, len(self.turns), accelerator.num_processes)
        pictures, prompts = [], []
        for index, found in zip(mine, self.pictures(mine), strict=True):
            pictures += found
            prompts += [self.prompt(index)] * len(found)
        started, said = time.perf_counter(), 0.0

        def report(done: int, total: int) -> None:
            nonlocal said
            now = time.perf_counter()
            if now - said > 20 or done == total:
                said, seconds = now, now - started
                tell(f"features: {done} of {total} passes, about {seconds / done * (total - done):.0f} s to go")

        self.model.streams.prepare(pictures, prompts, report)
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1:
            cache.refresh()

    def standardise(self) -> None:
        """Fix the fusion's moments on the first pictures as this stage sees them; alike in every process."""
        chosen = [index for index, images in enumerate(self.images) if images][:MOMENT_PICTURES]
        if not chosen:
            raise ValueError("No conversation of this data has an image, so there is nothing that a fusion could learn from.")
        device, parts = self.model.language.device, []
        for start in range(0, len(chosen), 32):
            pictures, prompts = self._told(chosen[start : start + 32], np.zeros(32, bool))
            parts.append(self.model.streams(pictures, prompts))
        self.model.fusion.standardise({name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]})

    def losses(
        self, learner: nn.Module, epoch: int, chosen: Int[np.ndarray, " row"], dropped: np.ndarray
    ) -> tuple[Tensor, int]:
        indices = [int(index) for index in chosen]
        pictures, prompts = self._told(indices, dropped)
        device = self.model.language.device
        with torch.autocast(device.type, enabled=False):  # features are those of the cache, whatever the training computes in
            streams = self.model.streams(pictures, prompts) if pictures else {}
        found: tuple[Tensor, int] = learner(
            {name: tokens.to(device) for name, tokens in streams.items()},
            [self.turns[index][0][0] for index in indices],
            [len(self.images[index]) for index in indices],
            [self.answers[index] for index in indices],
            [self.labels[index] for index in indices],
        )
        return found

    def _told(self, indices: Sequence[int], dropped: np.ndarray) -> tuple[list[Picture], list[str | None]]:
        """Pictures of a batch one after the other, and each one's prompt."""
        pictures: list[Picture] = []
        prompts: list[str | None] = []
        for index, found, drop in zip(indices, self.pictures(indices), dropped, strict=False):
            pictures += found
            prompts += [None if drop else self.prompt(index)] * len(found)
        return pictures, prompts


# --- forecast ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take on this machine.

    Attributes:
        steps, step_seconds: of the training.
        passes, pass_seconds: of the encoders.
        cache: bytes of features, at most.
        checkpoint, every: bytes of a checkpoint, of which two lie there while one takes the other's place, and steps between two.
        model: bytes of the finished model.
    """

    steps: int
    step_seconds: float
    passes: int
    pass_seconds: float
    cache: int
    checkpoint: int
    every: int
    model: int

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.passes * self.pass_seconds

    def __str__(self) -> str:
        minutes = self.seconds / 60
        total = f"about {minutes:.0f} min" if minutes >= 2 else f"about {self.seconds:.0f} s"
        return (
            f"{self.steps} steps of {self.step_seconds:.2f} s and {self.passes} pictures of "
            f"{1000 * self.pass_seconds:.0f} ms each through the encoders: {total}; on disk "
            + (f"features {size_text(self.cache)}, " if self.cache else "")
            + f"a checkpoint of {size_text(self.checkpoint)} every {self.every} steps, the model {size_text(self.model)}"
        )


def forecast_stage(model: FusedMLLM, data: Conversations, stage: StageConfig) -> StageForecast:
    """Time the encoders on one batch and a few steps of the language model, without a cache and without learning anything.

    Bytes are counted: features of every sample under nothing and under its question, as far as the guidance asks for
    them; of every trained weight its value and Adam's two moments, in float32.
    """
    stage = _counted(stage, data)
    steps = stage.steps
    everything = samples_of(stage, data)
    with _writing(model, stage.template), _uncached(model.streams):
        samples = Samples(model, _First(data, min(8, len(data))), replace(stage, steps=1))
        chosen = list(range(min(8, len(samples.turns))))
        count = len(chosen)
        pictures, prompts = samples._told(chosen, np.zeros(count, bool))
        taken = []
        for _ in range(2):  # the first pays for what is made once
            started = time.perf_counter()
            streams = model.streams(pictures, prompts) if pictures else {}
            taken.append(time.perf_counter() - started)
        learner = Learner(model.fusion, model.language, _short(model.language, stage.precision))
        spent = []
        for _ in range(2):
            started = time.perf_counter()
            loss, _ = learner(
                {name: tokens.to(model.language.device) for name, tokens in streams.items()},
                [samples.turns[k][0][0] for k in chosen], [len(images) for images in samples.images[:count]],
                samples.answers[:count], samples.labels[:count],
            )  # fmt: skip
            loss.backward()
            spent.append(time.perf_counter() - started)
        model.fusion.zero_grad(set_to_none=True)
    cache = model.streams.cache
    each = min(taken) / max(1, len(pictures))
    total = len(pictures) / count * (everything if cache is not None else steps * stage.batch)
    held = 0.0 if cache is None else total * _bytes_per_picture(model.streams, stage.prompted)
    trained = 4 * _trained(model, stage)
    return StageForecast(
        steps, min(spent) / count * stage.batch, round(total), each, round(held), 3 * trained, stage.evaluate_every, trained
    )


def _bytes_per_picture(streams: Streams, prompted: bool) -> int:
    """Of a picture in the cache, with what it is seen under for one question."""
    found = 0
    grey = Picture.of(Image.new("RGB", (32, 32), GREY))
    for name, eye in streams.eyes.items():
        found += len(streams.passes(name, "a prompt" if prompted else None)) * sum(
            2 * features[0].numel() for features in eye.look([grey], [None]).values()
        )
    return found


def _trained(model: FusedMLLM, stage: StageConfig) -> int:
    """Numbers that a stage trains; weights that two layers share are kept twice."""
    language = model.language.model
    numbers = sum(p.numel() for p in model.fusion.parameters())
    if stage.tune == "full":
        numbers += sum(p.numel() for _, p in language.named_parameters(remove_duplicate=False))
    if stage.tune == "lora":
        layers = [m for m in language.modules() if isinstance(m, nn.Linear) and m is not language.get_output_embeddings()]
        numbers += stage.lora_rank * sum(layer.in_features + layer.out_features for layer in layers)
    return numbers


def _check_room(
    forecasts: Sequence[StageForecast], folder: Path, cache: FeatureCache | None, tell: Callable[[str], None], waived: bool
) -> None:
    """Say what both stages need of the disk; refuse what does not fit, less what an earlier call has left there."""
    needed = sum(f.cache + f.model for f in forecasts) + 2 * max(f.checkpoint for f in forecasts)
    folders = {folder.resolve(), *([] if cache is None else [cache.folder.resolve()])}
    there = sum(path.stat().st_size for path in {p for f in folders for p in f.rglob("*")} if path.is_file())
    free = free_bytes(folder) or 0
    tell(f"disk: {size_text(needed)} at most, {size_text(there)} of it there, {size_text(free)} free")
    if not waived and needed - there >= 0.95 * free and not (folder / CONFIG).exists():
        raise ValueError(
            f"The training needs {size_text(needed - there)} more and {size_text(free)} are free. Keep no features (--no-cache), train "
            "an adapter (--tune lora) or choose another disk; --force goes on regardless."
        )


@dataclass(frozen=True)
class _First:
    """The first conversations of another collection."""

    source: Conversations
    count: int

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.source[index]

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}-first{self.count}"
