"""What is said of a prompt, from what the text encoder is really given.

Pipelines rewrite prompts (textual inversion, templates, cleaning), encode them more than once, and drop, pad or join what comes
out.  So tokens, words and truncation are heard from the pipeline while it encodes: each tokenizer tells what it made of a text,
each text encoder which of that it was given, and marks in place of its output which of that the network sees.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

MARKS = 3  # channels of a mark


class StopForward(Exception):
    """Raised by a recorder inside the network once it has all it wants; `DiffusionModel.denoise` catches it."""


@dataclass(frozen=True)
class EncodedText:
    """Prompts as the network takes them, with where their tokens stand in the text.

    Attributes:
        embeddings: (prompt, token, width).
        mask: (prompt, token), 1 at real tokens, for families that mask; None for those that attend to padding.
        pooled: (prompt, width) for families that have it, else None.
        ids: (prompt, token) token numbers of the network's text tokens, from the text encoders that they come from.
        spans: (prompt, token, 2) start and end characters in the prompt as typed; (0, 0) for start, end and padding
            tokens and for words that the pipeline put in.
        truncated: for each prompt whether it was cut at the limit of all its encoders.
        more: what else a family's pipeline takes, by name, one row a prompt: a second text.
    """

    embeddings: Float[Tensor, "prompt token width"]
    mask: Int[Tensor, "prompt token"] | Bool[Tensor, "prompt token"] | Float[Tensor, "prompt token"] | None
    pooled: Float[Tensor, "prompt pooled_width"] | None
    ids: Int[Tensor, "prompt text_token"]
    spans: Int[Tensor, "prompt text_token 2"]
    truncated: tuple[bool, ...]
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The embeddings and their like, changed; for `replace`."""
        given = {"embeddings": self.embeddings, "mask": self.mask, "pooled": self.pooled}
        changed = {name: None if tensor is None else change(tensor) for name, tensor in given.items()}
        return changed | {"more": {name: change(tensor) for name, tensor in self.more.items()}}

    def take(self, rows: Sequence[int]) -> EncodedText:
        """The same for some prompts, repeated or reordered as asked."""
        index = torch.as_tensor(list(rows), device=self.embeddings.device)
        cpu = index.cpu()
        truncated = tuple(self.truncated[i] for i in cpu.tolist())
        kept = self._each(lambda tensor: tensor[index])
        return replace(self, ids=self.ids[cpu], spans=self.spans[cpu], truncated=truncated, **kept)

    def float(self) -> EncodedText:
        """The same in float32."""
        return replace(self, **self._each(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor))

    @staticmethod
    def together(texts: Sequence[EncodedText]) -> int:
        """How many of these texts, from the first on, can share a pass: without a mask only texts of one length."""
        length = texts[0].embeddings.shape[1]
        other = (n for n, text in enumerate(texts) if text.mask is None and text.embeddings.shape[1] != length)
        return next(other, len(texts))

    @staticmethod
    def concatenate(parts: Sequence[EncodedText]) -> EncodedText:
        """Several batches of prompts as one; shorter ones get tokens of zeros, which their mask leaves out."""
        first = parts[0]

        def joined(name: str) -> Any:
            return None if getattr(first, name) is None else join_tokens([getattr(part, name) for part in parts])

        pooled = None if first.pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None])
        cut = tuple(flag for part in parts for flag in part.truncated)
        more = {name: join_tokens([part.more[name] for part in parts]) for name in first.more}
        return EncodedText(joined("embeddings"), joined("mask"), pooled, joined("ids"), joined("spans"), cut, more)


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Several (row, token, ...) as one, the shorter ones with zeros behind.

    >>> join_tokens([torch.ones(1, 1), torch.ones(1, 2)]).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    longest = max(part.shape[1] for part in parts)
    padded = [
        torch.cat([p, p.new_zeros(len(p), longest - p.shape[1], *p.shape[2:])], 1) if p.shape[1] < longest else p for p in parts
    ]
    return torch.cat(padded)


@dataclass
class Heard:
    """What one tokenizer said, and its text encoder was given, while a pipeline encoded prompts.

    Attributes:
        said: each text that the tokenizer was given, with what it made of it; nothing of tokenizers that give no offsets.
        given: token numbers (row, token) of each call of the text encoder.
        masks: which of these are not padding, where the encoder was told.
    """

    tokenizer: Any
    said: list[tuple[str, Any]] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def read(self, prompts: Sequence[str], model_id: str, negative: bool = False) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Of each prompt, the last of which is empty: token numbers, spans, which tokens are not padding, and how many were cut off.

        Args:
            negative: the encoder was given other rows before these.

        Raises:
            ValueError: the text encoder was given other tokens than the tokenizer made, or not one row a prompt.
        """
        given, masks = (_newest(calls, len(prompts)) if negative else calls for calls in (self.given, self.masks))
        ids = torch.cat(given).cpu().long() if given else torch.zeros(0, 0, dtype=torch.long)
        if given and not getattr(self.tokenizer, "is_fast", True):
            real = torch.cat(masks).cpu() > 0 if masks else torch.ones_like(ids, dtype=torch.bool)
            return ids, self._spelled(prompts, ids), real, [0] * len(ids)
        made = defaultdict(list)
        for text, encoding in reversed(self.said):
            made[tuple(encoding.ids)].append((text, encoding))
        lengths = sorted({len(key) for key in made if len(key) <= ids.shape[1]}, reverse=True)
        rows = []
        for row in ids.tolist():  # a pipeline can put more padding before what the tokenizer made
            found = next((key for n in lengths if made[key := tuple(row[len(row) - n :])]), None)
            rows += [made[found].pop()] if found is not None else []
        if len(rows) != len(prompts) or len(ids) != len(rows):
            raise ValueError(
                f"The text encoder of {model_id} is given {max(0, len(ids) - 1)} rows for {len(prompts) - 1} prompts, of which "
                f"{max(0, len(rows) - 1)} come from its tokenizer, so it cannot be said which token is which word."
            )
        spans, real = torch.zeros(*ids.shape, 2, dtype=torch.long), torch.zeros(ids.shape, dtype=torch.bool)
        empty = rows[-1][0]
        for row, (typed, (text, encoding)) in enumerate(zip(prompts, rows, strict=True)):
            before = ids.shape[1] - len(encoding)
            spans[row, before:] = torch.tensor(self._spans(typed, text, empty, encoding)).view(-1, 2)
            real[row, before:] = torch.tensor(encoding.attention_mask) > 0
        return ids, spans, real, [sum(p.special_tokens_mask.count(0) for p in e.overflowing) for _, e in rows]

    def _spelled(self, prompts: Sequence[str], ids: Tensor) -> Tensor:
        """Spans of tokens whose tokenizer gives no offsets, from the text that they spell one after the other."""
        found = torch.zeros(*ids.shape, 2, dtype=torch.long)
        for row, (typed, numbers) in enumerate(zip(prompts, ids.tolist(), strict=False)):
            text, spans = spelled(self.tokenizer, numbers)
            places = typed_places(text, typed)
            for token, (start, end) in enumerate(spans):
                if at := [place for place in places[start:end] if place]:
                    found[row, token] = torch.tensor([at[0][0], max(place[1] for place in at)])
        return found

    def _spans(self, typed: str, given: str, empty: str, encoding: Any) -> list[tuple[int, int]]:
        """For each token its start and end in the prompt as typed; `empty` is what is given for the empty prompt."""
        if given == typed:
            return [(start, end) if end > start else (0, 0) for start, end in encoding.offsets]
        first, last = _put_in(typed, given, empty)
        places: list[tuple[int, int] | None] = [None] * len(given)
        places[first:last] = typed_places(given[first:last], typed)
        spans: list[tuple[int, int]] = []
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            at = [place for place in places[start:end] if place]
            span = (at[0][0], max(p[1] for p in at)) if at and (None not in places[start:end] or empty) else (0, 0)
            word, _, number = token.rpartition("_")
            # An inversion of several vectors: the pipeline writes <cat> as "<cat> <cat>_1 <cat>_2", which all stand for <cat>.
            if span == (0, 0) and number.isdigit() and {word, token} <= self.tokenizer.added_tokens_encoder.keys():
                span = spans[-1]
            spans.append(span)
        return spans


def _newest(calls: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The last calls, of so many rows together."""
    kept: list[Tensor] = []
    while len(kept) < len(calls) and sum(map(len, kept)) < rows:
        kept.insert(0, calls[-1 - len(kept)])
    return kept


def _put_in(typed: str, given: str, empty: str) -> tuple[int, int]:
    """Where a template holds the prompt, from what is given for the empty prompt; the whole text, where that does not say it.

    >>> _put_in("a user", "user: a user end", "user:  end")
    (6, 12)
    """
    more, same, behind = len(given) - len(empty), _alike(given, empty), _alike(given[::-1], empty[::-1])
    starts = range(max(0, len(empty) - behind), same + 1)
    if more < 0 or not starts:
        return 0, len(given)
    first = next((start for start in starts if given[start : start + more] == typed), starts[0])
    return first, first + more


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def spelled(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of token numbers, and for each token its start and end in it; (0, 0) for start, end and padding tokens."""
    texts = [
        tokenizer.decode(list(ids[:n]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for n in range(len(ids) + 1)
    ]
    spans = [(len(a), len(b)) if len(b) > len(a) else (0, 0) for a, b in pairwise(texts)]
    return texts[-1], spans


def typed_places(given: str, typed: str) -> list[tuple[int, int] | None]:
    """For each character of a rewritten text its start and end in the text as typed; None for what was put in.

    >>> typed_places("a Cat", " A cat")
    [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    >>> typed_places("of a", "a")
    [None, None, None, (0, 1)]
    """
    # Letter by letter, since a lower-cased text need not have as many characters (U+0130).
    ours, theirs = ([(part, place) for place, letter in enumerate(t) for part in letter.casefold()] for t in (given, typed))
    letters = [part for part, _ in ours], [part for part, _ in theirs]
    if letters[0] == letters[1]:
        blocks = [(0, 0, len(ours))]
    else:
        blocks = [(m.a, m.b, m.size) for m in SequenceMatcher(None, *letters, autojunk=False).get_matching_blocks()]
    places: list[tuple[int, int] | None] = [None] * len(given)
    for a, b, size in blocks:
        for k in range(size):
            place = theirs[b + k][1]
            places[ours[a + k][1]] = (place, place + 1)
    return places


class Ear:
    """Stands in for a text encoder: notes the tokens that it is given, and answers with marks in place of hidden states.

    A mark is a token's place (its two digits to the base 128, whole numbers that every number type holds) and its encoder.  So
    whatever a pipeline drops, selects, pads and joins, what comes out says which token of which encoder stands where.
    """

    def __init__(self, encoder: nn.Module, number: int, heard: Heard) -> None:
        self._encoder, self._number, self._heard = encoder, number, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoder: Any = self._encoder
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self._heard.given.append(ids)
        self._heard.masks += [kwargs["attention_mask"]] if isinstance(kwargs.get("attention_mask"), Tensor) else []
        # Wider than the encoders before, for Stable Diffusion 3 pads their joined channels to the last one's.
        width, places = MARKS * 2**self._number, torch.arange(ids.shape[1], device=ids.device)
        marks = torch.zeros(*ids.shape, width, dtype=encoder.dtype, device=ids.device)
        marks[..., 0], marks[..., 1], marks[..., 2] = places // 128, places % 128, self._number + 1
        marks = marks.transpose(0, 1) if type(encoder).__name__ == "ChatGLMModel" else marks
        layers: Any = (marks,) * 128
        pooled: Any = marks.new_zeros(len(ids), width)
        if type(encoder).__name__.endswith("WithProjection"):
            return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=marks, hidden_states=layers)
        return BaseModelOutputWithPooling(last_hidden_state=marks, pooler_output=pooled, hidden_states=layers)


def hear(
    pipeline: Any,
    encode: Callable[[Any, list[str]], Float[Tensor, "text token width"]],
    prompts: Sequence[str],
    model_id: str,
    negative: bool = False,
) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token 2"], list[int], list[bool]]:
    """What the network's text tokens are, without running a text encoder: numbers, spans, lengths, and whether a prompt is cut.

    Args:
        encode: embeddings of texts by a pipeline; it is given a copy whose text encoders only listen.
        negative: they are what is encoded last.

    A length counts the positions up to a prompt's last token, and the tokens that were cut off.
    """
    twin, heard = copy.copy(pipeline), list[Heard]()
    with contextlib.ExitStack() as stack:
        for suffix in ("", "_2", "_3"):
            encoder, tokenizer = (getattr(pipeline, name + suffix, None) for name in ("text_encoder", "tokenizer"))
            if encoder is not None and tokenizer is not None:
                heard.append(Heard(plain_tokenizer(tokenizer)))
                vars(twin)[f"text_encoder{suffix}"] = Ear(encoder, len(heard) - 1, heard[-1])
                stack.enter_context(_overhear(heard[-1]))
        stack.enter_context(_quiet())
        texts = [*prompts, ""]
        marks = encode(twin, list(texts))[..., :MARKS].float().round().long().cpu()
    whose, places = marks[..., 2] - 1, marks[..., 0] * 128 + marks[..., 1]
    ids, spans, used = torch.zeros_like(places), torch.zeros(*places.shape, 2, dtype=torch.long), torch.zeros_like(places)
    left_out = []
    for number in sorted(set(whose[whose >= 0].tolist())):
        own_ids, own_spans, real, beyond = heard[number].read(texts, model_id, negative)
        rows, columns = (whose == number).nonzero(as_tuple=True)
        at = places[rows, columns]
        ids[rows, columns], spans[rows, columns] = own_ids[rows, at], own_spans[rows, at]
        used[rows, columns] = real[rows, at].long()
        last = [int(places[row][whose[row] == number].max()) for row in range(len(texts))]
        left_out.append([int(real[row, last[row] + 1 :].sum()) + beyond[row] for row in range(len(texts))])
    if not left_out:
        heard[0].read(texts, model_id)  # which says what is wrong
    cut = [min(counts) for counts in zip(*left_out, strict=True)]
    ends = (used * torch.arange(1, places.shape[1] + 1)).amax(1).tolist()
    count = len(prompts)
    return ids[:count], spans[:count], [e + c for e, c in zip(ends, cut, strict=True)][:count], [c > 0 for c in cut][:count]


def plain_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer, or that of a processor, which takes images too."""
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


@contextlib.contextmanager
def _overhear(heard: Heard) -> Iterator[None]:
    """Note what a tokenizer says; it has no hooks, so for a while it is an object of a subclass of its own class."""
    tokenizer, kind = heard.tokenizer, type(heard.tokenizer)

    class Overheard(kind):  # type: ignore[misc,valid-type]
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(text, *args, **kwargs)
            heard.said.extend(zip([text] if isinstance(text, str) else text, found.encodings or (), strict=False))
            return found

    tokenizer.__class__ = Overheard
    try:
        yield
    finally:
        tokenizer.__class__ = kind


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of cut prompts, which are counted here."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
