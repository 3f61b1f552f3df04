"""The two stages of LLaVA's recipe for a `FusedMLLM`.

Stage 1 trains the fusion alone, on captions, and gives the diffusion model no prompt: a language model could read a caption that
is both prompt and target, instead of seeing the image (`leakage`).  Stage 2 trains fusion and language model (all of it, an
adapter, or none) on instructions; each turn's question is the prompt of its features.

The invariant is that of `train.fit`: what a step does depends on (config, data, step) only, so a run that was interrupted ends
in the same weights.  Features that a cache holds are not computed again; without a cache the encoders run in every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffprobe.console import duration_text, size_text
from diffprobe.data.conversations import Conversations
from diffprobe.mllm.config import STAGE1, STAGE2, Precision, StageConfig
from diffprobe.mllm.fusion import Fusion
from diffprobe.mllm.language import LanguageModel, answer_losses, build_inputs
from diffprobe.mllm.model import CONFIG, WEIGHTS, FusedMLLM
from diffprobe.mllm.streams import FeatureCache, Picture, image_id
from diffprobe.mllm.train import ANOTHER, REQUEST, check_schedule, fit, sharded, timed, training_in
from diffprobe.rundir import check_or_write_request, check_room, free_bytes

MOMENT_PICTURES = 512  # that a fusion's moments are taken from
_READERS = 4  # threads that load images: decoders release the interpreter's lock


# --- training ---------------------------------------------------------------------------------------


def train_fused(
    model: FusedMLLM,
    captions: Conversations,
    instructions: Conversations,
    folder: str | Path,
    stages: tuple[StageConfig, StageConfig] = (STAGE1, STAGE2),
    *,
    dry_run: bool = False,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train both stages of a fresh model, or what is left of them; the same call resumes.

    Args:
        model: trained in place.  If `folder` is finished already, the model does not get its weights:
            `FusedMLLM.from_pretrained` loads them.
        folder: gets the finished model; stage 1 goes into its subfolder ``stage1``.

    Raises:
        ValueError: the folder holds another training, stage 1 has prompts or tunes the language model, a batch does not go with
            the data or the processes, or the disk is too small.
    """
    first, second = stages
    if first.prompted or first.tune:
        raise ValueError(
            "Stage 1 teaches the fusion alone and tells the diffusion model nothing: a prompt would be read, not seen."
        )
    both = ((captions, first), (instructions, second))
    for data, stage in both:  # both before either begins
        check_schedule(_with_steps(stage, data), count_samples(stage, data))
    forecasts = [forecast_stage(model, data, stage) for data, stage in both]
    for number, ((data, _), forecast) in enumerate(zip(both, forecasts, strict=True), start=1):
        log(f"stage {number}, {data.name}: {forecast}")
    _check_room(forecasts, Path(folder), model.streams.cache, log, waived=force or dry_run)
    if dry_run:
        return
    before = Path(folder) / "stage1"
    train_stage(model, captions, before, first, log=lambda line: log(f"stage 1  {line}"))
    model.fusion.load_state_dict(load_file(before / WEIGHTS))
    train_stage(model, instructions, folder, second, start="stage1", log=lambda line: log(f"stage 2  {line}"))


def train_stage(
    model: FusedMLLM,
    data: Conversations,
    folder: str | Path,
    stage: StageConfig = STAGE1,
    *,
    start: str = "",
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train one stage in place and save the model, or resume where an earlier call was interrupted.

    Under ``accelerate launch`` or torchrun each process takes its share of every batch.  FSDP 2, if accelerate is configured for
    it, spreads weights and optimizer over the GPUs; the model is whole again afterwards.

    Args:
        model: with a fresh fusion, or that of an earlier stage.
        folder: gets the model as `FusedMLLM.save_pretrained` writes it, ``training.json``, ``loss.csv`` and, until the end,
            ``checkpoint.pt``.  If it is finished already, nothing is done, and `model` does not get its weights.
        start: where the model comes from, for the record.

    Raises:
        ValueError: the folder holds another training, another process trains there, a batch is larger than the data, or
            accelerate is set up for another engine than DDP and FSDP 2.
    """
    folder = Path(folder)
    model.data = [*model.data, data.name]
    stage, count = _with_steps(stage, data), count_samples(stage, data)
    check_schedule(stage, count)
    about = {f"model.{name}": value for name, value in asdict(model.config).items()}
    about |= {f"origin.{name}": value for name, value in model.origins().items()}
    request = {**asdict(stage), **about, "data": data.fingerprint(), "samples": count, "start": start}
    check_or_write_request(folder / REQUEST, request, ANOTHER)
    if (folder / CONFIG).exists():
        return
    accelerator = accelerated(model.language, stage.precision)
    _unfreeze(model, stage)
    with _for_a_while(model.language, template=stage.template or model.language.template):
        samples = Samples(model, data, stage)
        samples.prepare(accelerator, log)
        if not model.fusion.standardised:
            samples.standardise()
        learner = Learner(model.fusion, model.language, stage.precision)
        spare = _hollow(learner) if sharded(accelerator) else None
        learner.train()
        with training_in(folder, accelerator), _plain_attention(model.language, learner.short):
            sizes = [sum(label >= 0 for label in sample.labels) for sample in samples.rows]
            weights = fit(learner, samples.losses, sizes, folder, stage, accelerator, log=log)
            learner.eval()
            if spare is not None:
                learner = _filled(spare, learner)
                model.fusion, model.language = learner.fusion, learner.reader
            if accelerator.is_main_process:
                model.save_pretrained(folder, {
                    part: {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}
                    for part in (("fusion", "language") if stage.tune else ("fusion",))
                })  # fmt: skip
    if model.cut_prompts:
        log(f"{model.cut_prompts} questions were longer than the diffusion model's text encoder takes, and were cut.")


def count_samples(stage: StageConfig, data: Conversations) -> int:
    """Samples that a stage makes of conversations: one each, or, where the question is a prompt, one per turn."""
    return sum(len(data[index].turns) for index in range(len(data))) if stage.prompted else len(data)


def _with_steps(stage: StageConfig, data: Conversations) -> StageConfig:
    """The stage with its number of steps, if it gives epochs."""
    return replace(stage, steps=stage.steps or max(1, stage.epochs * (count_samples(stage, data) // stage.batch)))


def accelerated(language: LanguageModel, precision: Precision = "auto") -> Accelerator:
    """Accelerate's own configuration; bfloat16 on a GPU, where nothing else is configured."""
    cpu = language.device.type == "cpu"
    accelerator = Accelerator(cpu=cpu, mixed_precision=None if cpu else "bf16" if precision == "auto" else precision)
    if sharded(accelerator):
        # every process has its weights; accelerate would fetch them from the first, and fails on buffers (1.15)
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


@contextmanager
def _for_a_while(thing: Any, **values: Any) -> Iterator[None]:
    """Other values of a thing's attributes inside a 'with' block."""
    before = {name: getattr(thing, name) for name in values}
    vars(thing).update(values)
    try:
        yield
    finally:
        vars(thing).update(before)


@contextmanager
def _plain_attention(language: LanguageModel, plain: bool) -> Iterator[None]:
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


def _unfreeze(model: FusedMLLM, stage: StageConfig) -> None:
    """Make the language model's parameters that a stage trains trainable, in float32, whatever they were loaded in."""
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

    On a GPU accelerate sees to the precision; on a CPU the forward pass does, because accelerate has one precision a process.
    """

    def __init__(self, fusion: Fusion, language: LanguageModel, precision: Precision = "auto") -> None:
        super().__init__()
        self.fusion, self.language = fusion, language.model
        self.short = precision == "bf16" and language.device.type == "cpu"
        self.reader = language  # no module, so its model stands in the state once, as `language`
        self._no_split_modules = language.model._no_split_modules  # FSDP shards each of these layers by itself

    def forward(self, streams: Mapping[str, Tensor], samples: Sequence[Sample]) -> tuple[Tensor, int]:
        """Sum of the losses of answer tokens, and the number of positions that were read.

        Args:
            streams: features of the samples' images, one after the other; empty if there is none.
        """
        # entered anew in each pass: autocast keeps its copies of the weights until it is left
        with torch.autocast("cpu", torch.bfloat16) if self.short else nullcontext():
            soft = self.fusion(streams) if streams else torch.zeros(0, 0, self.reader.width, device=self.reader.device)
            # talk without images leaves the fusion a gradient of zero, not none, or processes would wait for each other
            total = soft.sum() * 0.0 if streams else torch.stack([p.sum() for p in self.fusion.parameters()]).sum() * 0.0
            counts = [len(sample.images) for sample in samples]
            first, read = np.cumsum([0, *counts]), 0
            for count in sorted(set(counts)):  # rows with equally many images: little of them is padding
                rows = [row for row, held in enumerate(counts) if held == count]
                mine = [samples[row] for row in rows]
                inputs = build_inputs(
                    self.reader, soft[[first[row] + k for row in rows for k in range(count)]], [one.question for one in mine],
                    [one.answer for one in mine], images=[count] * len(rows), labels=[one.labels for one in mine],
                )  # fmt: skip
                total = total + answer_losses(self.reader, inputs).sum()
                read += inputs.mask.numel()
        return total, read


# --- samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A conversation, or one turn of it, as a stage reads it.

    Attributes:
        source: number of the conversation in the data.
        images: what loads its images.
        question: the first question.
        prompt: the diffusion model's prompt, or none.
        answer, labels: what `LanguageModel.answers` gives.
    """

    source: int
    images: Sequence[Callable[[], Image.Image]]
    question: str
    prompt: str | None
    answer: list[int]
    labels: list[int]


class Samples:
    """Conversations as a stage reads them; where the question is the diffusion model's prompt, each turn is a sample of its own.

    A turn read from features that were prompted with another turn's question would teach the language model to ignore
    what the prompt brings out.

    Args:
        limit: use only so many conversations, the first ones.
    """

    def __init__(self, model: FusedMLLM, data: Conversations, stage: StageConfig, limit: int | None = None) -> None:
        self.model, self.data = model, data
        self.rows: list[Sample] = []
        for index in range(len(data))[:limit]:
            talk = data[index]
            for turns in [(turn,) for turn in talk.turns] if stage.prompted else [talk.turns]:
                question = turns[0][0]
                written = model.language.answers(turns, stage.max_length, bool(talk.images))
                self.rows.append(Sample(index, talk.images, question, question if stage.prompted else None, *written))

    def pictures(self, samples: Sequence[Sample]) -> list[list[Picture]]:
        """The pictures of samples; with a cache each image's id is found once."""
        cache = self.model.streams.cache
        known = {} if cache is None else cache.ids.setdefault(self.data.fingerprint(), {})

        def read(sample: Sample) -> list[Picture]:
            if cache is None:
                return [Picture.of(load()) for load in sample.images]
            if sample.source not in known:
                known[sample.source] = [image_id(load()) for load in sample.images]
            return [Picture(name, load) for name, load in zip(known[sample.source], sample.images, strict=True)]

        if all(sample.source in known for sample in samples):
            return [read(sample) for sample in samples]
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(read, samples))

    def prompted_pictures(
        self, samples: Sequence[Sample], dropped: Bool[np.ndarray, " row"] | None = None
    ) -> tuple[list[Picture], list[str | None]]:
        """The pictures of samples one after the other, and each picture's prompt; samples that are dropped have none."""
        dropped = np.zeros(len(samples), bool) if dropped is None else dropped
        pictures: list[Picture] = []
        prompts: list[str | None] = []
        for sample, found, drop in zip(samples, self.pictures(samples), dropped, strict=True):
            pictures += found
            prompts += [None if drop else sample.prompt] * len(found)
        return pictures, prompts

    def prepare(self, accelerator: Accelerator, log: Callable[[str], None]) -> None:
        """Fill the cache, if there is one, each process with its share of the samples."""
        cache = self.model.streams.cache
        if cache is None:
            return
        started, said = time.perf_counter(), 0.0

        def report(done: int, total: int) -> None:
            nonlocal said
            now = time.perf_counter()
            if now - said > 20 or done == total:
                said, seconds = now, now - started
                log(f"features: {done} of {total} passes, about {seconds / done * (total - done):.0f} s to go")

        mine = self.rows[accelerator.process_index :: accelerator.num_processes]
        self.model.streams.prepare(*self.prompted_pictures(mine), report)
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1:
            cache.refresh()

    def standardise(self) -> None:
        """Fix the fusion's moments on the first pictures as this stage sees them; alike in every process."""
        chosen = [sample for sample in self.rows if sample.images][:MOMENT_PICTURES]
        if not chosen:
            raise ValueError("No conversation of this data has an image, so there is nothing that a fusion could learn from.")
        parts = [self.model.streams(*self.prompted_pictures(chosen[k : k + 32])) for k in range(0, len(chosen), 32)]
        device = self.model.language.device
        self.model.fusion.standardise({name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]})

    def losses(
        self, learner: nn.Module, chosen: Int[np.ndarray, " row"], dropped: Bool[np.ndarray, " row"]
    ) -> tuple[Tensor, int]:
        """What `fit` asks for: the summed loss of samples, and the number of positions that were read."""
        samples = [self.rows[index] for index in chosen]
        pictures, prompts = self.prompted_pictures(samples, dropped)
        device = self.model.language.device
        with torch.autocast(device.type, enabled=False):  # features are those of the cache, whatever the training computes in
            streams = self.model.streams(pictures, prompts) if pictures else {}
        found: tuple[Tensor, int] = learner({name: tokens.to(device) for name, tokens in streams.items()}, samples)
        return found


# --- forecast ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take on this machine.

    Attributes:
        steps, step_seconds: steps of the training, and seconds for each.
        passes, pass_seconds: pictures through the encoders, and seconds for each.
        cache: bytes of features, at most.
        checkpoint: bytes of a checkpoint, of which two exist while one replaces the other.
        every: steps between two checkpoints.
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
        return (
            f"{self.steps} steps of {self.step_seconds:.2f} s and {self.passes} pictures of "
            f"{1000 * self.pass_seconds:.0f} ms each through the encoders: about {duration_text(self.seconds)}; on disk "
            + (f"features {size_text(self.cache)}, " if self.cache else "")
            + f"a checkpoint of {size_text(self.checkpoint)} every {self.every} steps, the model {size_text(self.model)}"
        )


def forecast_stage(model: FusedMLLM, data: Conversations, stage: StageConfig) -> StageForecast:
    """Time the encoders on one batch and two steps of the language model, without a cache and without learning anything.

    Bytes are counted: features of every sample without a prompt and with its question, as far as the guidance needs them; of
    every trained weight its value and Adam's two moments, in float32.
    """
    stage, streams, cache = _with_steps(stage, data), model.streams, model.streams.cache
    spoken = stage.template or model.language.template
    with (
        _for_a_while(streams, cache=None),
        _for_a_while(model.language, template=spoken),
    ):  # features that are timed are not kept
        samples = Samples(model, data, stage, limit=8)
        chosen = samples.rows[:8]
        pictures, prompts = samples.prompted_pictures(chosen)
        encoding, found = timed(lambda: streams(pictures, prompts) if pictures else {})
        features = {name: tokens.to(model.language.device) for name, tokens in found.items()}
        learner = Learner(model.fusion, model.language, stage.precision)
        stepping, _ = timed(lambda: learner(features, chosen)[0].backward())
        model.fusion.zero_grad(set_to_none=True)
    total = len(pictures) / len(chosen) * (stage.steps * stage.batch if cache is None else count_samples(stage, data))
    held = 0.0 if cache is None else total * streams.cached_bytes(stage.prompted)
    trained = 4 * _trained(model, stage)
    return StageForecast(
        stage.steps, stepping / len(chosen) * stage.batch, round(total), encoding / max(1, len(pictures)), round(held),
        3 * trained, stage.evaluate_every, trained,
    )  # fmt: skip


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
    forecasts: Sequence[StageForecast], folder: Path, cache: FeatureCache | None, log: Callable[[str], None], waived: bool
) -> None:
    """Log what both stages need of the disk, less what an earlier call has left there; refuse what does not fit."""
    needed = sum(f.cache + f.model for f in forecasts) + 2 * max(f.checkpoint for f in forecasts)
    folders = {folder.resolve(), *([] if cache is None else [cache.folder.resolve()])}
    there = sum(path.stat().st_size for path in {p for f in folders for p in f.rglob("*")} if path.is_file())
    free = free_bytes(folder) or 0
    log(f"disk: {size_text(needed)} at most, {size_text(there)} of it there, {size_text(free)} free")
    if not waived and not (folder / CONFIG).exists():
        advice = "Keep no features (--no-cache), train an adapter (--tune lora) or choose another disk"
        check_room("The training needs {} more", needed - there, free, advice)
