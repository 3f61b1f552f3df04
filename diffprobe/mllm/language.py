"""A causal language model that reads soft tokens: how conversations are written, its inputs, its losses, its answers.

The soft tokens of an image stand first in the user's turn, before the request.  A batch is laid out as
[padding, before, soft tokens, after | answer, end, padding]: all prompts end, and all answers begin, at one position.  Padding
is known by the attention mask alone, never by token numbers, because a padding token can be the end token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from diffprobe.mllm.config import GREEDY, REQUEST, Sampling
from diffprobe.mllm.projector import Projector
from diffprobe.models import as_dtype, choose_device, quiet, resolve
from diffprobe.rundir import first_line
from diffprobe.zoo import smollm2

IMAGE = "<image>"  # stands for the soft tokens while a conversation is still text
IGNORED = -100  # the label that cross-entropy leaves out
_SOFT, _PADDING = -1, -2  # in place of token numbers
Turn = tuple[str, str]  # a question and its answer

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


class ChatFormat:
    """How conversations are written for a language model, whose tokenizer is all that is needed.

    Args:
        tokenizer: the language model's tokenizer.
        name: for messages and provenance.
        template: how conversations are written: "" is the tokenizer's chat template, "v1" LLaVA's for Vicuna, "plain" LLaVA's for
            captions, which asks nothing (`FORMATS`).

    Raises:
        ValueError: the template is none of these, or the tokenizer has none of its own.
    """

    def __init__(self, tokenizer: Any, name: str = "", template: str = "") -> None:
        self.tokenizer, self.name, self.template = tokenizer, name, template
        if template and template not in FORMATS:
            raise ValueError(f"Template {template!r} is not one of {', '.join(FORMATS)}; '' is the tokenizer's own.")
        if not template and not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {name or 'this model'} has no chat template, so how it was taught to converse is not known; "
                "name a template: v1 (Vicuna, and LLaVA-1.5 on it) or plain (captions alone, as in LLaVA's stage 1)."
            )

    def prompt(self, request: str, image: bool = True, history: Sequence[Turn] = ()) -> tuple[list[int], list[int]]:
        """Token numbers before and after the soft tokens, up to where the answer begins; without an image all are "after".

        Args:
            history: questions and answers before the request.
        """
        before, after = self._around_image(self.text([*history, (request, "")], image), image)
        first = self.tokenizer("").input_ids if self.template else []  # a tokenizer's own template writes its first token
        first = first[: first[:1] == [self.tokenizer.bos_token_id]]
        return ([*first, *self._ids(before)], self._ids(after)) if image else ([], [*first, *self._ids(after)])

    def text(self, turns: Sequence[Turn], image: bool = True) -> str:
        """A conversation up to where its last answer begins."""
        return self._write(turns, image)[len(turns) - 1]

    def answer(self, text: str, limit: int = 256) -> list[int]:
        """Token numbers of an answer, cut at `limit`, followed by the end token."""
        return [*self._ids(text)[:limit], self.tokenizer.eos_token_id]

    def answers(self, turns: Sequence[Turn], limit: int = 2048, image: bool = True) -> tuple[list[int], list[int]]:
        """What follows the prompt of a conversation's first question: its answers, and the questions between them.

        The conversation is tokenised as one text, because many tokenizers write a word differently at the start of a text.

        Returns:
            Token numbers, and the same as labels, `IGNORED` where the user speaks; both cut at `limit`.

        Raises:
            ValueError: the chat template rewrites earlier turns when the conversation goes on.
        """
        text, spans = self._answer_spans(turns, image)
        _, talk = self._around_image(text, image)
        shift = len(text) - len(talk)
        spans = [(start - shift, end - shift) for start, end in spans]
        begin = spans[0][0]
        head, (ids, ends) = self._ids(talk[:begin]), self._ids_and_ends(talk)
        if ids[: len(head)] != head:  # a token crosses the end of the prompt, which is tokenised alone when it is asked
            spans = [(start - begin, end - begin) for start, end in spans]
            head, (ids, ends) = [], self._ids_and_ends(talk[begin:])
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            said = slice(*np.searchsorted(ends, (start, end), side="right"))
            labels[said] = ids[said]
        return ids[len(head) :][:limit], labels[len(head) :][:limit]

    def _answer_spans(self, turns: Sequence[Turn], image: bool) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text up to its last answer's end, and the (start, end) of each answer with its end token."""
        *prompts, whole = self._write(turns, image)
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
            # a template may end an answer otherwise; what is learnt, and stops an answer, is the end token
            text += whole[len(prompt) : end] + ("" if closed else close)
            spans.append((start, len(text)))
            place = end
        return text, spans

    def _write(self, turns: Sequence[Turn], image: bool) -> list[str]:
        """The conversation as text up to where each answer begins, and then as a whole."""
        if self.template == "plain" and len(turns) > 1:
            raise ValueError(f"LLaVA's plain format has one caption an image; this conversation has {len(turns)} turns.")
        template = FORMATS[self.template][0] if self.template else None
        messages: list[dict[str, str]] = []
        texts = []

        def write(**options: bool) -> str:
            try:
                return str(self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))
            except Exception as error:  # a template is a program that others wrote
                raise ValueError(f"The chat template of {self.name or 'this tokenizer'} cannot be filled ({error}).") from error

        for number, (question, answer) in enumerate(turns):
            content = f"{IMAGE}\n{question}".strip() if image and number == 0 else question
            messages.append({"role": "user", "content": content})
            texts.append(write(add_generation_prompt=True))
            messages.append({"role": "assistant", "content": answer})
        return [*texts, write()]

    def _around_image(self, text: str, image: bool) -> tuple[str, str]:
        before, found, after = text.partition(IMAGE) if image else ("", IMAGE, text)
        if not found:
            raise ValueError(f"The chat template of {self.name or 'this tokenizer'} drops the user's words.")
        return before, after

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token numbers, and where in the text each token ends."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found.input_ids), [end for _, end in found.offset_mapping]


class LanguageModel(ChatFormat):
    """A frozen causal language model with its tokenizer.

    Args:
        model: any `AutoModelForCausalLM`; its parameters are frozen.
        tokenizer, name, template: as in `ChatFormat`.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", template: str = "") -> None:
        super().__init__(tokenizer, name, template)
        self.model = model.eval().requires_grad_(False)
        self.embeddings: nn.Embedding = model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def width(self) -> int:
        return int(self.embeddings.weight.shape[1])

    @property
    def rms(self) -> float:
        """Root mean square of the token embeddings."""
        return float(self.embeddings.weight.detach().float().square().mean().sqrt())


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
        raise ValueError(
            f"No language model at {source!r}: neither a folder that transformers reads as a causal language model with its "
            f"tokenizer, nor an id that the hub or its cache can give here ({first_line(error)})."
        ) from error
    return LanguageModel(model.to(place), tokenizer, str(id_or_dir), template)


# --- inputs and losses ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A batch as the language model takes it; the last `answer` positions are the answers'."""

    embeddings: Float[Tensor, "row position width"]
    mask: Int[Tensor, "row position"]
    labels: Int[Tensor, "row position"]
    answer: int

    @property
    def positions(self) -> Int[Tensor, "row position"]:
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def build_inputs(
    language: LanguageModel,
    soft: Float[Tensor, "image token width"],
    requests: Sequence[str],
    answers: Sequence[Sequence[int]] = (),
    *,
    images: Sequence[int] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    histories: Sequence[Sequence[Turn]] | None = None,
) -> Inputs:
    """Soft tokens inside their conversations, followed by the answers, if any.

    Args:
        soft: images in the order of their rows.
        requests: one per row; prompts of different lengths are padded on the left.
        answers: token numbers of each row's answer, padded on the right.
        images: number of images of each row, whose tokens stand one after the other; one by default.
        labels: the answers with `IGNORED` for tokens that are not learnt; the answers themselves by default.
        histories: what was said before each row's request; nothing by default.
    """
    counts = [1] * len(requests) if images is None else images
    prompt_of, rows = cache(language.prompt), []
    for request, count, said in zip(requests, counts, histories or [()] * len(requests), strict=True):
        before, after = prompt_of(request, count > 0, tuple(said))
        rows.append([*before, *[_SOFT] * (count * soft.shape[1]), *after])
    prompts, nothing = padded(rows, _PADDING, "left"), [()] * len(rows)
    ids = torch.cat([prompts, padded(answers or nothing, _PADDING)], 1)
    wanted = torch.cat([torch.full_like(prompts, IGNORED), padded(labels or answers or nothing, IGNORED)], 1)
    ids, wanted = ids.to(language.device), wanted.to(language.device)
    embeddings = language.embeddings(ids.clamp(min=0))
    embeddings = embeddings.masked_scatter((ids == _SOFT)[..., None], soft.to(embeddings))
    return Inputs(embeddings, (ids != _PADDING).long(), wanted, ids.shape[1] - prompts.shape[1])


def padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Int[Tensor, "row position"]:
    """Rows of numbers as one tensor, filled with `value`."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)


def answer_losses(language: LanguageModel, inputs: Inputs) -> Float[Tensor, "row position"]:
    """Minus the log probability of each answer token, in nats; zero at padding."""
    output = language.model(
        inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, position_ids=inputs.positions,
        logits_to_keep=inputs.answer + 1, use_cache=False,
    )  # fmt: skip
    wanted = inputs.labels[:, -inputs.answer :]
    return nn.functional.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )


# --- answers ----------------------------------------------------------------------------------------


@torch.no_grad()
def generate(language: LanguageModel, inputs: Inputs, max_new_tokens: int, sampling: Sampling = GREEDY) -> list[str]:
    """The continuation of each row's prompt, greedy by default; a drawn one depends on the other rows."""
    tokenizer, draws = language.tokenizer, sampling.temperature > 0
    # top_k is the library's own, which would leave out most tokens
    drawing = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if draws else {}
    settings = GenerationConfig(
        do_sample=draws, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id, **drawing,
    )  # fmt: skip
    with torch.random.fork_rng([language.device] if language.device.type == "cuda" else [], enabled=draws):
        if draws:
            torch.manual_seed(sampling.seed)
        said = language.model.generate(inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, generation_config=settings)
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


@torch.no_grad()
def generate_texts(
    language: LanguageModel,
    projector: Projector,
    features: Float[Tensor, "sample token channel"],
    requests: str | Sequence[str] = REQUEST,
    *,
    max_new_tokens: int = 48,
    batch: int = 64,
) -> list[str]:
    """Greedy texts about projected features, one per sample."""
    requests = [requests] * len(features) if isinstance(requests, str) else requests
    texts: list[str] = []
    for start in range(0, len(requests), batch):
        soft = projector(features[start : start + batch].to(language.device))
        texts += generate(language, build_inputs(language, soft, requests[start : start + batch]), max_new_tokens)
    return texts


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
    """log P(candidate and its end | features) in nats, and the candidates' numbers of tokens.

    The prompt of a sample is read once; its candidates share the keys and values.

    Args:
        candidates: equally many for each sample.
    """
    sizes = {len(texts) for texts in candidates}
    if len(sizes) != 1 or len(candidates) != len(features):
        raise ValueError(
            f"Each of {len(features)} samples needs equally many candidates; got {len(candidates)} lists of {sorted(sizes)}."
        )
    answer_of = cache(language.answer)
    lengths = np.array([[len(answer_of(text)) for text in texts] for texts in candidates])
    found = np.zeros(lengths.shape)
    for sample, texts in enumerate(candidates):
        inputs = build_inputs(language, projector(features[sample : sample + 1].to(language.device)), [request])
        for start in range(0, len(texts), batch):
            answers = [answer_of(text) for text in texts[start : start + batch]]
            found[sample, start : start + batch] = _continuations(language, inputs, answers)
    return found, lengths


def _continuations(language: LanguageModel, inputs: Inputs, answers: Sequence[Sequence[int]]) -> Float[np.ndarray, " answer"]:
    """log P of several answers to one prompt, which is read once."""
    read = language.model(
        inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, position_ids=inputs.positions, logits_to_keep=1,
        use_cache=True,
    )  # fmt: skip
    ids = padded(answers, _PADDING).to(language.device)
    said, width = (ids != _PADDING).long(), inputs.mask.shape[1]
    ids = ids.clamp(min=0)
    read.past_key_values.batch_repeat_interleave(len(answers))
    logits = language.model(
        input_ids=ids, attention_mask=torch.cat([inputs.mask.expand(len(answers), -1), said], 1),
        position_ids=torch.arange(width, width + ids.shape[1], device=ids.device).expand_as(ids),
        past_key_values=read.past_key_values, use_cache=True,
    ).logits  # fmt: skip
    logits = torch.cat([read.logits.expand(len(answers), -1, -1), logits[:, :-1]], 1).float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return -(losses * said).sum(1).double().cpu().numpy()
