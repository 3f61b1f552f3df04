"""Names of annotated categories in captions: singular and plural, where a text has them, and captions that list them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from diffprobe.data.questions import article
from diffprobe.data.samples import Caption, Span

IRREGULAR = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}


def by_category(categories: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The objects of each category.

    >>> by_category(["dog", "cat", "dog"])
    {'dog': (0, 2), 'cat': (1,)}
    """
    found: dict[str, list[int]] = {}
    for index, name in enumerate(categories):
        found.setdefault(name, []).append(index)
    return {name: tuple(indices) for name, indices in found.items()}


def plural_forms(name: str) -> tuple[str, ...]:
    """A category's name and its plurals, as captions write them.

    >>> plural_forms("bus"), plural_forms("wine glass"), plural_forms("person")
    (('bus', 'buses'), ('wine glass', 'wine glasses'), ('person', 'people', 'persons'))
    """
    head, _, last = name.rpartition(" ")
    front, small = f"{head} " if head else "", last.lower()
    if small.endswith(("s", "x", "ch", "sh")):
        regular = f"{last}es"
    elif small.endswith("y") and small[-2:-1] not in "aeiou":
        regular = f"{last[:-1]}ies"
    else:
        regular = f"{last}s"
    irregular = IRREGULAR.get(small)
    plurals = (regular,) if irregular is None else (irregular, regular) if small == "person" else (irregular,)
    return tuple(dict.fromkeys([name, *(front + plural for plural in plurals)]))


def category_spans(text: str, objects: Mapping[str, tuple[int, ...]]) -> tuple[Span, ...]:
    """Where a text names categories: whole words, singular or plural, in any case; "hot dog" is no dog.

    >>> category_spans("Dogs eat a hot dog", {"dog": (0, 1), "hot dog": (2,)})
    (Span(start=0, end=4, objects=(0, 1), role='noun'), Span(start=11, end=18, objects=(2,), role='noun'))
    """
    words = sorted(((form, name) for name in objects if name.strip() for form in plural_forms(name)), key=lambda w: -len(w[0]))
    if not words:
        return ()
    # one group per form, the longest first, tells which form matched without comparing case
    pattern = rf"(?<!\w)(?:{'|'.join(f'({re.escape(form)})' for form, _ in words)})(?!\w)"
    return tuple(
        Span(*match.span(), objects[words[(match.lastindex or 1) - 1][1]], "noun")
        for match in re.finditer(pattern, text, re.IGNORECASE)
    )


def listing(objects: Mapping[str, tuple[int, ...]], words: Mapping[str, str] | None = None) -> Caption:
    """A caption that lists what is in an image, for images without one.

    >>> listing({"dog": (0, 2), "apple": (1,)}).text
    'a photo of dogs and an apple'
    """
    text, spans = "a photo", []
    for position, (name, indices) in enumerate(objects.items()):
        word = (words or {}).get(name, name)
        several = len(indices) > 1
        phrase = plural_forms(word)[-1 if word.lower() != "person" else 1] if several else article(word)
        text += " of " if position == 0 else " and " if position == len(objects) - 1 else ", "
        text += phrase
        start = len(text) - len(phrase) if several else len(text) - len(word)
        spans.append(Span(start, len(text), indices, "noun"))
    return Caption(text, tuple(spans), "listing")
