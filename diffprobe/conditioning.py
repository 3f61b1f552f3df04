"""Which text a sample is given, and where its words stand among the tokens.

A conditioning is a name in the store's `conditioning` axis:

- ``null``: the pipeline's own unconditional input;
- ``caption``: the sample's first caption; ``caption:2`` the third, ``caption:list`` the one of that style;
- ``question``: its first question; ``question:1`` the second;
- ``mismatched``: the first caption of another sample (a fixed derangement);
- ``fixed:TEXT``: the same text for every sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffprobe.data.samples import Dataset, Sample

NULL = "null"
FORMS = "null, caption, caption:N, caption:STYLE, question, question:N, mismatched, fixed:TEXT"


def guided_name(conditioning: str, guidance: float) -> str:
    """The name of f_u + s (f_c - f_u) on the conditioning axis.

    >>> guided_name("caption", 1.5), guided_name("caption", 4.0)
    ('caption@1.5', 'caption@4')
    """
    return f"{conditioning}@{guidance:g}"


def check_conditioning(name: str) -> None:
    """Raise ValueError, naming the valid forms, unless `name` is one."""
    if not re.fullmatch(r"null|caption(:.+)?|question(:\d+)?|mismatched|fixed:.*", name, re.DOTALL):
        raise ValueError(f"Conditioning {name!r} is not one of: {FORMS}.")


def prompt_for(name: str, sample: Sample, other: Sample | None = None) -> str | None:
    """The text that a conditioning gives a sample; None is the pipeline's own unconditional input.

    Raises:
        ValueError: the sample has no such caption or question.
    """
    kind, _, which = name.partition(":")
    if kind == NULL:
        return None
    if kind == "fixed":
        return which
    source = other if kind == "mismatched" else sample
    assert source is not None
    if kind == "question":
        texts = {str(i): question.text for i, question in enumerate(source.questions)}
    else:
        texts = {str(i): caption.text for i, caption in enumerate(source.captions)}
        texts |= {caption.style: caption.text for caption in reversed(source.captions)}
    if (which or "0") not in texts:
        raise ValueError(
            f"Sample {source.id!r} has no {kind} {which or '0'!r} (it has: {', '.join(texts) or 'none'}); "
            "give a captions file, or use the conditionings null or fixed:TEXT."
        )
    return texts[which or "0"]


def prompts_of(dataset: Dataset, conditioning: str) -> list[str | None]:
    """The text of every sample under one conditioning, in order."""
    check_conditioning(conditioning)
    if conditioning == "mismatched":
        return list(derange([prompt_for("caption", dataset[i]) or "" for i in range(len(dataset))]))
    return [prompt_for(conditioning, dataset[i]) for i in range(len(dataset))]


def derange(captions: Sequence[str]) -> list[str]:
    """For each caption one of another sample: half the dataset further on, the first whose text differs.

    >>> derange(["a star", "a star", "a circle"])
    ['a circle', 'a circle', 'a star']

    Raises:
        ValueError: all captions are the same.
    """
    count = len(captions)
    if len(set(captions)) < 2:
        raise ValueError("Conditioning 'mismatched' needs at least two samples whose captions differ.")
    shifts = range(count // 2, count // 2 + count)
    return [next(other for s in shifts if (other := captions[(i + s) % count]) != text) for i, text in enumerate(captions)]


def word_tokens(text: str, word: str, token_spans: Sequence[tuple[int, int]]) -> list[int]:
    """Token positions that spell `word` where it first stands in `text` as a whole word; sub-tokens together.

    Args:
        token_spans: for each token its (start, end) in `text`; (0, 0) for start, end and padding tokens.

    >>> word_tokens("a red star", "star", [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)])
    [3, 4]
    >>> word_tokens("a red star", "blue", [(0, 0), (0, 1), (2, 5), (6, 10)])
    []
    """
    match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    if match is None:
        return []
    return [i for i, (start, end) in enumerate(token_spans) if end > start and start < match.end() and end > match.start()]
