"""What is said of a prompt, from what the text encoder is really given.

Pipelines rewrite prompts (textual inversion, templates, cleaning), so tokens, words and truncation are heard from the pipeline
while it encodes: its first tokenizer tells what it made of each text, its first text encoder which of that it was given.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from jaxtyping import Float, Int
from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a recorder inside the network once it has all it wants; `DiffusionModel.denoise` catches it."""


@dataclass(frozen=True)
class EncodedText:
    """Prompts as the network takes them, with where their tokens stand in the text.

    Attributes:
        embeddings: (prompt, token, width).
        mask: (prompt, token), 1 at real tokens, for families that mask; None for those that attend to padding.
        pooled: (prompt, width) for SDXL, else None.
        ids: (prompt, token) token numbers that the first text encoder was given.
        spans: (prompt, token, 2) start and end characters in the prompt as typed; (0, 0) for start, end and padding
            tokens and for words that the pipeline put in.
        truncated: for each prompt whether it was cut at the encoder's limit.
    """

    embeddings: Float[Tensor, "prompt token width"]
    mask: Int[Tensor, "prompt token"] | None
    pooled: Float[Tensor, "prompt pooled_width"] | None
    ids: Int[Tensor, "prompt token"]
    spans: Int[Tensor, "prompt token 2"]
    truncated: tuple[bool, ...]

    def take(self, rows: Sequence[int]) -> EncodedText:
        """The same for some prompts, repeated or reordered as asked."""
        index = torch.as_tensor(list(rows), device=self.embeddings.device)
        cpu = index.cpu()
        return EncodedText(
            self.embeddings[index],
            None if self.mask is None else self.mask[index],
            None if self.pooled is None else self.pooled[index],
            self.ids[cpu],
            self.spans[cpu],
            tuple(self.truncated[i] for i in cpu.tolist()),
        )

    @staticmethod
    def concatenate(parts: Sequence[EncodedText]) -> EncodedText:
        """Several batches of prompts as one."""
        first = parts[0]
        return EncodedText(
            torch.cat([p.embeddings for p in parts]),
            None if first.mask is None else torch.cat([p.mask for p in parts if p.mask is not None]),
            None if first.pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None]),
            torch.cat([p.ids for p in parts]),
            torch.cat([p.spans for p in parts]),
            tuple(flag for p in parts for flag in p.truncated),
        )


@dataclass
class Heard:
    """What a pipeline's first tokenizer said, and what its first text encoder was given, while it encoded prompts.

    Attributes:
        prompts: as typed.
        said: each text that the tokenizer was given, with what it made of it.
        given: token numbers (row, token) of each call of the text encoder.
    """

    model_id: str
    prompts: list[str]
    tokenizer: Any
    said: list[tuple[str, Any]] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)

    def tokens(self) -> tuple[Int[Tensor, "prompt token"], Int[Tensor, "prompt token 2"], list[int]]:
        """As `DiffusionModel.tokens`.

        Raises:
            ValueError: the text encoder was given other tokens than the tokenizer made, or not one row a prompt.
        """
        ids = torch.cat(self.given).cpu().long() if self.given else torch.zeros(0, 0, dtype=torch.long)
        made = defaultdict(list)
        for text, encoding in reversed(self.said):
            if len(encoding) == ids.shape[1]:
                made[tuple(encoding.ids)].append((text, encoding))
        rows = [made[tuple(row)].pop() for row in ids.tolist() if made[tuple(row)]]
        if len(rows) != len(self.prompts) or len(ids) != len(rows):
            raise ValueError(
                f"The text encoder of {self.model_id} is given {len(ids)} rows for {len(self.prompts)} prompts, of which "
                f"{len(rows)} come from its tokenizer, so it cannot be said which token is which word."
            )
        spans = [self._spans(typed, text, encoding) for typed, (text, encoding) in zip(self.prompts, rows, strict=True)]
        lengths = [
            sum(encoding.attention_mask) + sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
            for _, encoding in rows
        ]
        return ids, torch.tensor(spans).view(*ids.shape, 2), lengths

    def _spans(self, typed: str, given: str, encoding: Any) -> list[tuple[int, int]]:
        """For each token its start and end in the prompt as typed."""
        if given == typed:
            return [(start, end) if end > start else (0, 0) for start, end in encoding.offsets]
        places = typed_places(given, typed)
        spans: list[tuple[int, int]] = []
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            at = places[start:end]
            span = (0, 0) if not at or None in at else (min(p[0] for p in at if p), max(p[1] for p in at if p))
            word, _, number = token.rpartition("_")
            # An inversion of several vectors: the pipeline writes <cat> as "<cat> <cat>_1 <cat>_2", which all stand for <cat>.
            if span == (0, 0) and number.isdigit() and {word, token} <= self.tokenizer.added_tokens_encoder.keys():
                span = spans[-1]
            spans.append(span)
        return spans


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


@contextlib.contextmanager
def overhear(pipeline: Any, heard: Heard, stop: bool) -> Iterator[None]:
    """Note what the first tokenizer says and the first text encoder is given, and end there if asked.

    A tokenizer has no hooks, so for a while it is an object of a subclass of its own class.
    """
    tokenizer, kind = pipeline.tokenizer, type(pipeline.tokenizer)

    class Overheard(kind):  # type: ignore[misc,valid-type]
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(text, *args, **kwargs)
            heard.said.extend(zip([text] if isinstance(text, str) else text, found.encodings or (), strict=False))
            return found

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.given.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        if stop and sum(map(len, heard.given)) >= len(heard.prompts):
            raise StopForward

    logs = (diffusers.utils.logging, transformers.utils.logging)  # they warn of cut prompts, which are counted here
    levels = [log.get_verbosity() for log in logs]
    handle = pipeline.text_encoder.register_forward_pre_hook(note, with_kwargs=True)
    tokenizer.__class__ = Overheard
    try:
        for log in logs:
            log.set_verbosity_error()
        yield
    except StopForward:
        pass
    finally:
        tokenizer.__class__ = kind
        handle.remove()
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
