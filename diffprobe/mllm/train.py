"""Teach a projector to speak to a language model, and let the model speak.

A picture is a run of soft tokens in the place of its description: first thing in the user's turn, before the request.  Rows of
a batch are laid out as [padding, before, soft tokens, after | caption, end, padding]: prompts end, and captions begin, at one
place.  Padding is told by the attention mask alone, never by token numbers (a padding token can be the end token).

The invariant: what step n does depends on (config, data, n) only, so a run that was cut off ends in the same weights.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from diffprobe.mllm.projector import Projector
from diffprobe.models import as_dtype, choose_device, quiet, resolve
from diffprobe.store import request_differences, sole_writer, whole_file, write_whole
from diffprobe.zoo import smollm2

IMAGE = "<image>"  # where the soft tokens stand while a conversation is still text
REQUEST = "Describe the image."
IGNORED = -100  # the label that cross-entropy leaves out


# How LLaVA writes conversations (Liu et al. 2023, conversation.py and preprocess_v1, preprocess_plain of train.py): a template
# as tokenizers have them, and the text that ends an answer ("" is the end token).  Tokens begin as the tokenizer's own texts do.
FORMATS = {
    "v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "",
    ),
    "plain": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + '\n' }}"
        "{% elif '<image>' in m.content %}<image>{% endif %}{% endfor %}",
        "\n",
    ),
}


# --- the language model -----------------------------------------------------------------------------


class LanguageModel:
    """A frozen causal language model with its tokenizer.

    Args:
        model: any `AutoModelForCausalLM`; its parameters are frozen.
        tokenizer: its own.
        name: for provenance.
        template: how conversations are written: "" is the tokenizer's chat template, "v1" LLaVA's for Vicuna, "plain" LLaVA's for
            captions, which asks nothing (`FORMATS`).

    Raises:
        ValueError: the template is none of these, or the tokenizer has none of its own.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", template: str = "") -> None:
        self.model, self.tokenizer, self.name, self.template = model.eval().requires_grad_(False), tokenizer, name, template
        self.embeddings: nn.Embedding = model.get_input_embeddings()
        if template and template not in FORMATS:
            raise ValueError(f"Template {template!r} is not one of {', '.join(FORMATS)}; '' is the tokenizer's own.")
        if not template and not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {name or 'this model'} has no chat template, so how it was taught to converse is not known; "
                "name a template: v1 (Vicuna, and LLaVA-1.5 on it) or plain (captions alone, as in LLaVA's stage 1)."
            )

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    @property
    def width(self) -> int:
        return int(self.embeddings.weight.shape[1])

    @property
    def rms(self) -> float:
        """Root mean square of the token embeddings."""
        return float(self.embeddings.weight.detach().float().square().mean().sqrt())

    def prompt(self, request: str, image: bool = True) -> tuple[list[int], list[int]]:
        """Token numbers before and after the soft tokens, up to where the answer begins; all are "after" without an image."""
        before, after = self._parted(self._written([(request, "")], image)[0], image)
        first = self.tokenizer("").input_ids if self.template else []  # a tokenizer's own template writes its first token
        first = first[: first[:1] == [self.tokenizer.bos_token_id]]
        return ([*first, *self._ids(before)], self._ids(after)) if image else ([], [*first, *self._ids(after)])

    def answers(self, turns: Sequence[tuple[str, str]], limit: int = 2048, image: bool = True) -> tuple[list[int], list[int]]:
        """What follows the prompt of a conversation's first question: answers, and the questions between them.

        The conversation is tokenised as one text, for many tokenizers write a word otherwise where a text begins.

        Returns:
            Token numbers, and the same as labels, `IGNORED` where the user speaks; both cut at `limit`.

        Raises:
            ValueError: the chat template writes a conversation otherwise once it goes on.
        """
        if self.template == "plain" and len(turns) > 1:
            raise ValueError(f"LLaVA's plain format has one caption an image; this conversation has {len(turns)} turns.")
        text, spans = self._spans(turns, image)
        _, talk = self._parted(text, image)
        shift = len(text) - len(talk)
        spans = [(start - shift, end - shift) for start, end in spans]
        begin = spans[0][0]
        head, (ids, ends) = self._ids(talk[:begin]), self._placed(talk)
        if ids[: len(head)] != head:  # a token reaches over the end of the prompt, which is a text of its own where it is asked
            spans = [(start - begin, end - begin) for start, end in spans]
            head, (ids, ends) = [], self._placed(talk[begin:])
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            said = slice(*np.searchsorted(ends, (start, end), side="right"))
            labels[said] = ids[said]
        return ids[len(head) :][:limit], labels[len(head) :][:limit]

    def _spans(self, turns: Sequence[tuple[str, str]], image: bool) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, up to its last answer's end, and where each answer stands, its end token included."""
        *prompts, whole = self._written(turns, image)
        close = (FORMATS[self.template][1] if self.template else "") or self.tokenizer.eos_token
        text, spans, place = "", [], 0
        for (_, answer), prompt in zip(turns, prompts, strict=True):
            said = re.compile(rf"\s*{re.escape(answer.strip())}").match(whole, len(prompt))
            if not whole.startswith(prompt) or said is None:
                raise ValueError(f"The chat template of {self.name or 'this tokenizer'} rewrites turns that are over.")
            closed = re.compile(rf"\s*?{re.escape(close)}").match(whole, said.end())
            end = closed.end() if closed else said.end()
            text += whole[place : len(prompt)]
            start = len(text)
            # templates may end an answer otherwise; what is learnt, and stops an answer, is the end token
            text += whole[len(prompt) : end] + ("" if closed else close)
            spans.append((start, len(text)))
            place = end
        return text, spans

    def _written(self, turns: Sequence[tuple[str, str]], image: bool) -> list[str]:
        """The conversation as text, up to where each answer begins, and as a whole."""
        messages: list[dict[str, str]] = []
        texts = []
        template = FORMATS[self.template][0] if self.template else None

        def write(**options: bool) -> str:
            try:
                written = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
            except Exception as error:  # a template is a program that others wrote
                raise ValueError(f"The chat template of {self.name or 'this tokenizer'} cannot be filled ({error}).") from error
            return str(written)

        for number, (question, answer) in enumerate(turns):
            content = f"{IMAGE}\n{question}".strip() if image and number == 0 else question
            messages.append({"role": "user", "content": content})
            texts.append(write(add_generation_prompt=True))
            messages.append({"role": "assistant", "content": answer})
        return [*texts, write()]

    def _parted(self, text: str, image: bool) -> tuple[str, str]:
        if not image:
            return "", text
        before, found, after = text.partition(IMAGE)
        if not found:
            raise ValueError(f"The chat template of {self.name or 'this tokenizer'} drops the user's words.")
        return before, after

    def answer(self, text: str, limit: int = 256) -> list[int]:
        """Token numbers of an answer, cut at `limit`, with the end token after it."""
        return [*self._ids(text)[:limit], self.tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _placed(self, text: str) -> tuple[list[int], list[int]]:
        """Token numbers, and where in the text each of them ends."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found.input_ids), [end for _, end in found.offset_mapping]


def load_language_model(
    id_or_dir: str | Path = "shapes-lm",
    device: str | torch.device | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    template: str = "",
) -> LanguageModel:
    """Load a causal language model by hub id, folder or name: "shapes-lm" (embedded) or "smollm2" (`diffprobe zoo fetch`).

    Args:
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 elsewhere.
        template: as `LanguageModel` takes it.

    Raises:
        ValueError: nothing is there, it is no causal language model with a tokenizer, or it has no chat template.
    """
    source = str(smollm2.fetched()) if str(id_or_dir) == smollm2.NAME else resolve(id_or_dir)
    place = choose_device(device)
    try:
        with quiet(source):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=as_dtype(dtype, place), revision=revision, trust_remote_code=False, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"No language model at {source!r}: neither a folder that transformers reads as a causal language model with its "
            f"tokenizer, nor an id that the hub or its cache can give here ({reason})."
        ) from error
    return LanguageModel(model.to(place), tokenizer, str(id_or_dir), template)


@dataclass(frozen=True)
class Rows:
    """A batch as the language model takes it, (row, position); the last `answer` positions are the captions'."""

    embeddings: Tensor
    mask: Tensor
    labels: Tensor
    answer: int

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def lay_out(
    language: LanguageModel,
    soft: Float[Tensor, "image token width"],
    requests: Sequence[str],
    answers: Sequence[Sequence[int]] = (),
    *,
    images: Sequence[int] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
) -> Rows:
    """Soft tokens within their conversations; answers, if any, behind them.

    Args:
        soft: images in the order of their rows.
        requests: one a row; prompts of different lengths are padded on the left.
        answers: token numbers of each row's answer, padded on the right.
        images: how many images each row has, their tokens one after the other; one by default.
        labels: the answers, with `IGNORED` for tokens that are not to be learnt; the answers themselves by default.
    """
    counts = [1] * len(requests) if images is None else list(images)
    known = {key: language.prompt(key[0], key[1] > 0) for key in dict.fromkeys(zip(requests, counts, strict=True))}
    prompts = [known[key] for key in zip(requests, counts, strict=True)]
    held = [count * soft.shape[1] for count in counts]
    longest = max(len(before) + len(after) + count for (before, after), count in zip(prompts, held, strict=True))
    most = max((len(answer) for answer in answers), default=0)
    ids = torch.zeros(len(requests), longest + most, dtype=torch.long)
    mask, is_soft, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORED)
    for row, ((before, after), count) in enumerate(zip(prompts, held, strict=True)):
        start = longest - len(before) - len(after) - count
        image = start + len(before)
        ids[row, start:image] = torch.tensor(before, dtype=torch.long)
        is_soft[row, image : image + count] = True
        ids[row, image + count : longest] = torch.tensor(after, dtype=torch.long)
        mask[row, start:longest] = 1
        if answers:
            end = longest + len(answers[row])
            ids[row, longest:end] = torch.tensor(list(answers[row]), dtype=torch.long)
            wanted[row, longest:end] = torch.tensor(list((labels or answers)[row]), dtype=torch.long)
            mask[row, longest:end] = 1
    ids, mask, wanted, is_soft = (x.to(language.device) for x in (ids, mask, wanted, is_soft))
    embeddings = language.embeddings(ids).masked_scatter(is_soft[..., None], soft.to(language.device, language.dtype))
    return Rows(embeddings, mask, wanted, most)


def answer_losses(language: LanguageModel, rows: Rows) -> Float[Tensor, "row position"]:
    """Minus the log probability of each answer token, in nats; zero at padding."""
    output = language.model(
        inputs_embeds=rows.embeddings, attention_mask=rows.mask, position_ids=rows.positions, logits_to_keep=rows.answer + 1,
        use_cache=False,
    )  # fmt: skip
    wanted = rows.labels[:, -rows.answer :]
    return nn.functional.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )


# --- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """What decides the steps of a training.

    Attributes:
        steps: optimizer steps at most.
        batch: samples of a step, over all processes.
        accumulate: forward passes of each process that share a step.
        learning_rate: after a warm-up over 3% of the steps; it then falls to zero along a cosine.
        dropout: share of samples that are shown their unconditional features instead, drawn anew in each step.
        evaluate_every: steps between checkpoints, and looks at the dev split where there is one.
        patience: looks without a better dev loss after which training ends; 0 never ends it.
        seed: of the weights, the order of the samples and the dropout.
    """

    steps: int = 400
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    dropout: float = 0.0
    evaluate_every: int = 50
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """Everything but the data that decides a projector's weights; defaults follow LLaVA-1.5's stage 1.

    Attributes:
        kind: of `Projector`.
        request: what the user asks for.
    """

    kind: str = "mlp2x_gelu"
    request: str = REQUEST


@dataclass(frozen=True)
class Captioned:
    """Features (sample, token, channel) with a caption each, and the unconditional features of the same samples for dropout."""

    features: Float[Tensor, "sample token channel"]
    captions: Sequence[str]
    null: Float[Tensor, "sample token channel"] | None = None


@dataclass
class _State:
    """How far a run has come; all that a checkpoint holds besides weights and optimizer."""

    step: int = 0
    best: float = math.inf
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


Losses = Callable[[nn.Module, int, Int[np.ndarray, " row"], np.ndarray], tuple[Tensor, int]]


def fit(
    learner: nn.Module,
    losses: Losses,
    sizes: Sequence[int],
    folder: str | Path,
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    dev_loss: Callable[[nn.Module], float] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train what is not frozen, or go on where an earlier call was cut off.

    Args:
        learner: trained in place; under several processes through accelerate's wrapper (DDP, or FSDP 2, which leaves it sharded).
        losses: of (learner, epoch, samples, which of them drop their prompt): the sum over answer tokens, and how many
            positions the language model read.
        sizes: answer tokens of each training sample.
        folder: gets ``checkpoint.pt`` and ``loss.csv``.
        dev_loss: where given, the weights that are best by it are kept, else the last.
        tell: gets a line at each checkpoint: step, loss, tokens a second, minutes to go.

    Returns:
        The trained weights (and buffers), which the learner holds too, gathered from all processes; in all processes but the
        first it is empty.  The caller keeps them and removes the checkpoint.
    """
    folder = Path(folder)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=0.0)
    wrapped, stepper = accelerator.prepare(learner, optimizer)
    state, best = _resume(folder, wrapped, optimizer, accelerator)
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
        _save(folder, wrapped, optimizer, state, best, accelerator.is_main_process)
        if accelerator.is_main_process:
            recent = np.mean([row["loss"] for row in state.history[-schedule.evaluate_every :]])
            seconds = time.perf_counter() - started
            left = seconds / (state.step - first) * (schedule.steps - state.step) / 60
            speed = read * accelerator.num_processes / seconds
            tell(
                f"step {state.step} of {schedule.steps}: loss {recent:.3f}{said}, {speed:,.0f} tokens/s"
                + (f", at most {left:.0f} min to go" if left >= 1 else "")
            )
    if state.best < math.inf:
        set_model_state_dict(wrapped, best, options=_whole(accelerator))
    return _weights(wrapped)


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


def train_projector(
    language: LanguageModel,
    train: Captioned,
    dev: Captioned,
    folder: str | Path,
    config: TrainConfig | None = None,
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> Projector:
    """Train a projector on captions, or go on where an earlier call was cut off; the best one on the dev split is kept.

    Under ``accelerate launch`` or torchrun each process takes its share of every batch.

    Args:
        folder: gets ``projector.safetensors``, ``config.json``, ``loss.csv`` and, until the end, ``checkpoint.pt``.
        tell: gets a line at each look at the dev split.

    Raises:
        ValueError: the data do not fit together, another process trains in the folder, or it holds another run (the message
            lists the differences), or accelerate is set up to shard weights.
    """
    config, folder = config or TrainConfig(), Path(folder)
    _check(train, dev, config)
    request = {**asdict(config), "language_model": language.name, "samples": len(train.captions)}
    settle(folder, request)
    if (folder / "projector.safetensors").exists():
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # where a process was killed between the two
        return Projector.load(folder).to(language.device)
    accelerator = Accelerator(cpu=language.device.type == "cpu")
    if sharded(accelerator):
        raise ValueError("A projector is too small to be sharded: leave FSDP out (accelerate launch --num_processes N).")
    projector = Projector(train.features.shape[-1], language.width, config.kind, language.rms, config.seed)
    projector.standardise(train.features)
    answers = [language.answer(text) for text in train.captions]
    dev_answers = [language.answer(text) for text in dev.captions]

    def losses(learner: nn.Module, epoch: int, chosen: Int[np.ndarray, " row"], dropped: np.ndarray) -> tuple[Tensor, int]:
        features = train.features[chosen]
        if dropped.any():
            assert train.null is not None
            features = torch.where(torch.from_numpy(dropped)[:, None, None], train.null[chosen], features)
        soft = learner(features.to(language.device))
        rows = lay_out(language, soft, [config.request] * len(chosen), [answers[i] for i in chosen])
        return answer_losses(language, rows).sum(), rows.mask.numel()

    with sole_writer(folder, accelerator.process_index, accelerator.num_processes):
        fit(
            projector, losses, [len(answer) for answer in answers], folder, config, accelerator,
            dev_loss=lambda learner: _dev_loss(language, learner, dev.features, dev_answers, config), tell=tell,
        )  # fmt: skip
        if accelerator.is_main_process:
            projector.save(folder)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return projector.eval()


def settle(folder: str | Path, request: Mapping[str, Any]) -> None:
    """Write down what a training is, once; refuse a folder that holds another.

    Raises:
        ValueError: the folder's ``training.json`` says otherwise; the message lists the differences.
    """
    kept, asked = Path(folder) / "training.json", json.loads(json.dumps(dict(request)))
    if kept.exists():
        if differences := request_differences(json.loads(kept.read_text(encoding="utf-8")), asked):
            raise ValueError(f"{folder} holds another training; give another folder. {'; '.join(differences)}.")
        return
    write_whole(kept, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")


def _check(train: Captioned, dev: Captioned, config: TrainConfig) -> None:
    for name, part in (("training", train), ("dev", dev)):
        if len(part.features) != len(part.captions) or not len(part.captions):
            raise ValueError(f"The {name} split has {len(part.features)} features and {len(part.captions)} captions.")
        if not torch.isfinite(part.features).all():
            raise ValueError(f"The {name} split's features hold values that are not finite.")
    check_schedule(config, len(train.captions))
    if config.dropout and (train.null is None or train.null.shape != train.features.shape):
        raise ValueError("Caption dropout needs the unconditional features of the training samples.")


def check_schedule(config: Schedule, samples: int) -> None:
    """Raise ValueError where a batch or a share of dropout cannot be; the processes are those that were launched."""
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


def _share(step: int, steps: int) -> float:
    """Of the learning rate, 0 to 1: a warm-up over 3% of the steps, then a cosine."""
    warm = max(1, round(0.03 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batch_of(step: int, samples: int, config: Schedule) -> tuple[Int[np.ndarray, " row"], np.ndarray]:
    """The samples of a step, each once an epoch, and which of them are shown their unconditional features."""
    steps_an_epoch = samples // config.batch
    epoch, place = divmod(step, steps_an_epoch)
    order = np.random.default_rng([config.seed, epoch]).permutation(samples)
    dropped = np.random.default_rng([config.seed, step, 1]).random(config.batch) < config.dropout
    return order[place * config.batch : (place + 1) * config.batch], dropped


def _step(
    accelerator: Accelerator, learner: nn.Module, optimizer: Any, losses: Losses, sizes: Sequence[int], schedule: Schedule,
    step: int,
) -> tuple[float, int]:  # fmt: skip
    """One optimizer step; the mean loss a token over the whole batch, whatever its parts and processes, and positions read."""
    chosen, dropped = batch_of(step, len(sizes), schedule)
    epoch, tokens, positions = step // (len(sizes) // schedule.batch), sum(sizes[i] for i in chosen), 0
    total = torch.zeros((), device=accelerator.device)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    for part in np.array_split(np.arange(schedule.batch)[mine], schedule.accumulate):
        with accelerator.autocast():
            loss, read = losses(learner, epoch, chosen[part], dropped[part])
        loss = loss / tokens
        accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        total += loss.detach()
        positions += read
    accelerator.clip_grad_norm_(learner.parameters(), 1.0)  # of all its parameters, or accelerate takes shards for wholes
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(total, "sum")), positions


@torch.no_grad()
def _dev_loss(
    language: LanguageModel, projector: nn.Module, features: Tensor, answers: Sequence[Sequence[int]], config: TrainConfig
) -> float:
    total, size = 0.0, 2 * config.batch
    for start in range(0, len(answers), size):
        part = slice(start, start + size)
        soft = projector(features[part].to(language.device))
        total += float(answer_losses(language, lay_out(language, soft, [config.request] * len(soft), answers[part])).sum())
    return total / sum(len(answer) for answer in answers)


def _whole(accelerator: Accelerator) -> StateDictOptions:
    """How weights that the first process holds whole are given to all, in the parts that each keeps."""
    return StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=accelerator.num_processes > 1)


def _weights(learner: nn.Module) -> dict[str, Any]:
    """Weights that are trained, and buffers, gathered from all processes onto the CPU of the first."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(learner, options=options)
    # torch leaves frozen weights in where two names share one, as tied embeddings do
    frozen = {
        name.removeprefix("module.") for name, p in learner.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    # on a CPU they would go on changing
    return {name: value.detach().clone() for name, value in state.items() if name not in frozen}


def _save(
    folder: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, state: _State, best: dict[str, Any], main: bool
) -> None:
    """The loss curve and a checkpoint, each whole or not at all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    held = {
        "learner": _weights(learner),
        "optimizer": get_optimizer_state_dict(learner, optimizer, options=options),
        "best": best,
        "state": asdict(state),
    }
    if not main:
        return
    # the checkpoint last, for it says what is done
    with whole_file(folder / "loss.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "loss", "dev_loss", "learning_rate"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "dev_loss": "" if math.isnan(row["dev_loss"]) else row["dev_loss"]} for row in state.history)
    with whole_file(folder / "checkpoint.pt") as beside:
        torch.save(held, beside)


def _resume(
    folder: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[_State, dict[str, Any]]:
    if accelerator.is_main_process:
        for left in folder.glob("*.tmp"):  # what a killed process was about to put in its place; no other one trains here
            left.unlink(missing_ok=True)
    if not (folder / "checkpoint.pt").exists():
        return _State(), {}
    try:
        held: dict[str, Any] = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{folder / 'checkpoint.pt'} is no checkpoint of a training, or is damaged; remove it.") from error
    options = _whole(accelerator)
    set_model_state_dict(learner, held["learner"], options=options)
    set_optimizer_state_dict(learner, optimizer, held["optimizer"], options=options)
    return _State(**held["state"]), held["best"]


# --- speaking ---------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    language: LanguageModel,
    projector: Projector,
    features: Float[Tensor, "sample token channel"],
    requests: str | Sequence[str] = REQUEST,
    *,
    max_new_tokens: int = 48,
    batch: int = 64,
) -> list[str]:
    """The most likely words one after the other (greedy), for each sample.

    Args:
        requests: one for all samples, or one for each.
    """
    asked = [requests] * len(features) if isinstance(requests, str) else list(requests)
    texts: list[str] = []
    for start in range(0, len(asked), batch):
        soft = projector(features[start : start + batch].to(language.device))
        texts += speak(language, lay_out(language, soft, asked[start : start + batch]), max_new_tokens)
    return texts


@torch.no_grad()
def speak(language: LanguageModel, rows: Rows, max_new_tokens: int) -> list[str]:
    """The most likely words one after the other (greedy) behind each row's prompt."""
    tokenizer = language.tokenizer
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )  # fmt: skip
    said = language.model.generate(inputs_embeds=rows.embeddings, attention_mask=rows.mask, generation_config=settings)
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


@torch.no_grad()
def log_likelihood(
    language: LanguageModel,
    projector: Projector,
    features: Float[Tensor, "sample token channel"],
    candidates: Sequence[Sequence[str]],
    request: str = REQUEST,
    *,
    batch: int = 128,
) -> tuple[Float[np.ndarray, "sample candidate"], Int[np.ndarray, "sample candidate"]]:
    """log P(caption and its end | features) of each sample's candidates, in nats, and their numbers of tokens.

    A sample's soft tokens are read once, its candidates share what was read.

    Args:
        candidates: as many for each sample.
    """
    sizes = {len(texts) for texts in candidates}
    if len(sizes) != 1 or len(candidates) != len(features):
        raise ValueError(
            f"Each of {len(features)} samples needs equally many candidates; got {len(candidates)} lists of {sorted(sizes)}."
        )
    known = {text: language.answer(text) for text in dict.fromkeys(text for texts in candidates for text in texts)}
    lengths = np.array([[len(known[text]) for text in texts] for texts in candidates])
    found = np.zeros(lengths.shape)
    for sample, texts in enumerate(candidates):
        rows = lay_out(language, projector(features[sample : sample + 1].to(language.device)), [request])
        for start in range(0, len(texts), batch):
            part = [known[text] for text in texts[start : start + batch]]
            found[sample, start : start + batch] = _continued(language, rows, part)
    return found, lengths


def _continued(language: LanguageModel, rows: Rows, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """log P of answers to one conversation, which is read once."""
    read = language.model(
        inputs_embeds=rows.embeddings, attention_mask=rows.mask, position_ids=rows.positions, logits_to_keep=1, use_cache=True
    )
    longest, width = max(len(answer) for answer in answers), rows.mask.shape[1]
    ids = torch.zeros(len(answers), longest, dtype=torch.long)
    said = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(list(answer))
        said[row, : len(answer)] = 1
    ids, said = ids.to(language.device), said.to(language.device)
    cache = read.past_key_values
    cache.batch_repeat_interleave(len(answers))
    mask = torch.cat([rows.mask.expand(len(answers), -1), said], 1)
    positions = torch.arange(width, width + longest, device=ids.device).expand_as(ids)
    logits = language.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits
    logits = torch.cat([read.logits.expand(len(answers), -1, -1), logits[:, :-1]], 1).float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return -(losses * said).sum(1).double().cpu().numpy()
