"""Which text a sample is given, and where its words stand among the tokens.

A conditioning is a name in the store's `conditioning` axis:

- ``null``: the pipeline's own unconditional input;
- ``caption``: the sample's first caption; ``caption:2`` the third, ``caption:list`` the one of that style;
- ``question``: its first question; ``question:1`` the second;
- ``mismatched``: the first caption of another sample (a fixed derangement);
- ``hard``: the most similar first caption of another sample that says something which none of its own says;
- ``words``: words of the dataset's captions, drawn at random, as many as its first caption has;
- ``fixed:TEXT``: the same text for every sample.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from diffprobe.data.samples import Sample

NULL = "null"
FORMS = "null, caption, caption:N, caption:STYLE, question, question:N, mismatched, hard, words, fixed:TEXT"


def guided_name(conditioning: str, guidance: float) -> str:
    """The name of f_u + s (f_c - f_u) on the conditioning axis.

    >>> guided_name("caption", 1.5), guided_name("caption", 4.0)
    ('caption@1.5', 'caption@4')
    """
    return f"{conditioning}@{guidance:g}"


def check_conditioning(name: str) -> None:
    """Raise ValueError, naming the valid forms, unless `name` is one."""
    if not re.fullmatch(r"null|caption(:.+)?|question(:\d+)?|mismatched|hard|words|fixed:.*", name, re.DOTALL):
        raise ValueError(f"Conditioning {name!r} is not one of: {FORMS}.")


_KINDS = "null|caption|question|mismatched|hard|words|fixed"


def parse_conditionings(text: str) -> list[str]:
    """Splits a list of conditionings at its commas; in a ``fixed:`` text only at those that a conditioning follows.

    >>> parse_conditionings("null, fixed:a star, red,caption:1")
    ['null', 'fixed:a star, red', 'caption:1']
    """
    # Without a fixed: text before it, a comma separates whatever follows, so that a misspelt name is reported.
    parts: list[str] = []
    for part in text.split(","):
        if parts and parts[-1].startswith("fixed:") and not re.match(rf"\s*({_KINDS})\s*(:|$)", part):
            parts[-1] += f",{part}"
        elif part.strip():
            parts.append(part.lstrip())
    return [part.rstrip() for part in parts]


def prompt_for(name: str, sample: Sample) -> str | None:
    """The text that a conditioning gives a sample; None is the pipeline's own unconditional input.

    Raises:
        ValueError: the sample has no such caption or question.
    """
    kind, _, which = name.partition(":")
    if kind == NULL:
        return None
    if kind == "fixed":
        return which
    if kind == "question":
        texts = {str(i): question.text for i, question in enumerate(sample.questions)}
    else:
        texts = {str(i): caption.text for i, caption in enumerate(sample.captions)}
        texts |= {caption.style: caption.text for caption in reversed(sample.captions)}
    if (which or "0") not in texts:
        raise ValueError(
            f"Sample {sample.id!r} has no {kind} {which or '0'!r} (it has: {', '.join(texts) or 'none'}); "
            "give a captions file, or use the conditionings null or fixed:TEXT."
        )
    return texts[which or "0"]


def assign_prompts(samples: Iterable[Sample], conditionings: Sequence[str]) -> dict[str, list[str | None]]:
    """The text of every sample under each conditioning, in one pass over the samples.

    Raises:
        ValueError: a name is no conditioning, or a sample lacks the text that it asks for.
    """
    for name in conditionings:
        check_conditioning(name)
    prompts: dict[str, list[str | None]] = {name: [] for name in conditionings}
    ids: list[str] = []
    captions: list[list[str]] = []
    for sample in samples:
        for name, column in prompts.items():
            column.append(prompt_for("caption" if name in ACROSS else name, sample))
        if not ACROSS.keys().isdisjoint(prompts):
            ids.append(sample.id)
            captions.append([caption.text for caption in sample.captions])
    for name in ACROSS.keys() & prompts.keys():
        prompts[name] = list(ACROSS[name](ids, captions))
    return prompts


def derange(captions: Sequence[str]) -> list[str]:
    """A caption of another sample for each caption: the first one with another text, from half the dataset further on.

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


def nearest_other(captions: Sequence[Sequence[str]]) -> list[str]:
    """For each sample the most similar first caption of another sample (Jaccard index of words) that does not describe it.

    A caption does not describe a sample if it has a word that none of the sample's own captions has.  Of equally similar
    captions the next one in the dataset is taken.

    Args:
        captions: all captions of each sample; others can be given the first of them.

    >>> nearest_other([["a red star"], ["a red circle"], ["two blue squares"]])
    ['a red circle', 'a red star', 'a red star']

    Raises:
        ValueError: for some sample every other caption could describe it.
    """
    count = len(captions)
    first = [_words(own[0]) for own in captions]
    vocabulary = {word: place for place, word in enumerate(sorted(set().union(*first)))}
    said = np.zeros((count, len(vocabulary)), np.float32)
    for row, words in enumerate(first):
        said[row, [vocabulary[word] for word in words]] = 1
    sizes, chosen = said.sum(1), []
    for row, own in enumerate(captions):
        known = [vocabulary[word] for text in own for word in _words(text) if word in vocabulary]
        unknown = np.ones(len(vocabulary), np.float32)
        unknown[known] = 0
        shared = said @ said[row]
        nearness = np.where(said @ unknown > 0, shared / np.maximum(sizes + sizes[row] - shared, 1), -1)
        further = np.roll(np.arange(count), -row - 1)
        best = int(further[np.argmax(nearness[further])])
        if nearness[best] < 0:
            raise ValueError(
                f"Conditioning 'hard' needs captions that do not describe a sample; all of them could describe {own[0]!r}."
            )
        chosen.append(captions[best][0])
    return chosen


def random_words(ids: Sequence[str], captions: Sequence[Sequence[str]]) -> list[str]:
    """Random words for each sample, as many as its first caption has and at least one, drawn from all first captions.

    The draw depends on the sample's id.

    Raises:
        ValueError: no caption has a word.
    """
    vocabulary = sorted(set().union(*(_words(own[0]) for own in captions)))
    if not vocabulary:
        raise ValueError("Conditioning 'words' draws from the captions' words, and no caption has one.")
    texts = []
    for name, own in zip(ids, captions, strict=True):
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        texts.append(" ".join(rng.choice(vocabulary, max(1, len(re.findall(r"\w+", own[0]))))))
    return texts


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


# Conditionings whose texts come from other samples: (ids, captions of each sample) -> one text a sample.
ACROSS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]] = {
    "mismatched": lambda ids, captions: derange([own[0] for own in captions]),
    "hard": lambda ids, captions: nearest_other(captions),
    "words": random_words,
}


def word_tokens(text: str, word: str, token_spans: Sequence[tuple[int, int]], occurrence: int = 0) -> list[int]:
    """Positions of the tokens that spell an occurrence of `word` in `text` as a whole word, by default the first.

    Args:
        token_spans: for each token its (start, end) in `text`; (0, 0) for start, end and padding tokens.

    >>> word_tokens("a red star", "star", [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)])
    [3, 4]
    >>> word_tokens("a red star", "blue", [(0, 0), (0, 1), (2, 5), (6, 10)])
    []
    """
    matches = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))
    if occurrence >= len(matches):
        return []
    match = matches[occurrence]
    return [i for i, (start, end) in enumerate(token_spans) if end > start and start < match.end() and end > match.start()]


# --- content words --------------------------------------------------------------------------------

FUNCTION_WORDS = frozenset(
    {
        "a", "an", "the", "this", "that", "these", "those", "of", "on", "in", "at", "to", "by", "for",
        "from", "with", "and", "or", "is", "are", "was", "were", "be", "there", "it", "its", "as",
    }
)  # fmt: skip


def content_tokens(tokens: Sequence[str], token_spans: Sequence[tuple[int, int]]) -> list[int]:
    """Positions of the tokens of all words but `FUNCTION_WORDS`.

    Args:
        tokens: the tokenizer's own strings, with its marks of a word's beginning or end.
        token_spans: for each token its (start, end) in the text; (0, 0) for start, end and padding tokens.

    >>> content_tokens(["<|s|>", "a</w>", "st", "ar</w>", "<|e|>"], [(0, 0), (0, 1), (2, 4), (4, 6), (0, 0)])
    [2, 3]
    """
    words: list[list[int]] = []
    for place, (start, end) in enumerate(token_spans):
        if end <= start:
            continue
        before = words[-1][-1] if words else -1
        fresh = before < 0 or start > token_spans[before][1] or tokens[before].endswith("</w>") or tokens[place][0] in "▁Ġ"
        if fresh:
            words.append([])
        words[-1].append(place)
    spelled = ["".join(tokens[i].removesuffix("</w>").strip("▁Ġ") for i in word).casefold() for word in words]
    return [
        i
        for word, text in zip(words, spelled, strict=True)
        if re.search(r"\w", text) and text not in FUNCTION_WORDS
        for i in word
    ]


# --- knock-outs by name ---------------------------------------------------------------------------

FORMER = {"ending": "eos_and_padding"}  # spellings of the last release, which its stores and folders of runs still have


def former(text: str) -> str:
    """A name of a store or file with knock-outs spelt as the last release did, so that what it wrote is found.

    >>> former("M-eos_and_padding")
    'M-ending'
    """
    for old, new in FORMER.items():
        text = text.replace(new, old)
    return text


def current(text: str) -> str:
    """A knock-out, or an arm that has one, in the spelling of today.

    >>> current("M/ending"), current("ending@down_blocks*"), current("M/gated")
    ('M/eos_and_padding', 'eos_and_padding@down_blocks*', 'M/gated')
    """
    for old, new in FORMER.items():
        text = re.sub(rf"\b{old}\b", new, text)
    return text
