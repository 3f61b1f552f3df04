"""The samples that every dataset yields, and the specs that name datasets.

One type serves drawn scenes, of which everything is known (masks, attributes, questions), and photographs, of which perhaps
only the file name is.  No other code asks where a sample came from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Protocol, runtime_checkable
from urllib.parse import unquote

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Span:
    """Characters ``text[start:end]`` of a caption that name some objects.

    `objects` are indices into the sample's masks (several for a plural); `role` is "noun", "colour",
    "phrase" (the whole noun phrase) or "background" (then `objects` is empty).
    """

    start: int
    end: int
    objects: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Caption:
    """One description of an image: its text, its style, and which words name which objects."""

    text: str
    spans: tuple[Span, ...] = ()
    style: str = "plain"

    def words(self, role: str = "noun") -> list[tuple[str, Span]]:
        """The words of one role, in reading order.

        >>> Caption("a red star", (Span(6, 10, (0,), "noun"),)).words()
        [('star', Span(start=6, end=10, objects=(0,), role='noun'))]
        """
        return [(self.text[s.start : s.end], s) for s in self.spans if s.role == role]


@dataclass(frozen=True)
class Question:
    """A question about an image, its answer, and the closed set of answers that it has."""

    text: str
    answer: str
    options: tuple[str, ...]
    category: str
    objects: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it.

    Attributes:
        load: Draws or reads the RGB image.
        labels: Scalars by name (``n_objects``, ``colour``, ...), the targets of probes.
        masks: Makes the boolean array (object, y, x), without objects where none are known.
        objects: Attributes of each object, in the order of the masks.
    """

    id: str
    load: Callable[[], Image.Image]
    captions: tuple[Caption, ...] = ()
    labels: Mapping[str, str | int | float] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    masks: Callable[[], np.ndarray] = lambda: np.zeros((0, 1, 1), bool)
    objects: tuple[Mapping[str, object], ...] = ()


@runtime_checkable
class Dataset(Protocol):
    """A finite, indexable collection of samples with an identity that a store can record."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> str:
        """The text from which `load_dataset` makes this dataset."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def fingerprint(self) -> str:
        """A short hash of the samples' ids and contents."""
        ...


class Fingerprinted:
    """A fingerprint that is computed once, from the pieces of bytes that a subclass's `content` yields."""

    def content(self) -> Iterator[bytes]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of SHA-256."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for piece in self.content():
            digest.update(piece)
        return digest.hexdigest()[:16]


class IndexedDataset(Fingerprinted):
    """What datasets with a length share: the check of an index, and a fingerprint.

    A subclass gives `name`, `spec`, `__len__`, `sample` (for an index that is in range) and `content`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"Sample {index} of a dataset of {len(self)}.")
        return self.sample(index)


def iterate(dataset: Dataset) -> Iterator[Sample]:
    """Yields every sample in order (type checkers do not see that ``__getitem__`` makes a protocol iterable)."""
    for index in range(len(dataset)):
        yield dataset[index]


def split_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """Splits ``kind:target?name=value&name=value`` into kind, target and options.

    %XX stands for a character, as in a URL.  A ? or & without a NAME= behind it is part of the path.

    Raises:
        ValueError: an option occurs twice.

    >>> split_spec("coco:what?/a.json?images=/data/R&D&limit=2"), split_spec("voc:/data/R%26D")
    (('coco', 'what?/a.json', {'images': '/data/R&D', 'limit': '2'}), ('voc', '/data/R&D', {}))
    """
    kind, _, rest = spec.partition(":")
    target, *query = re.split(r"\?(?=\w+=)", rest, maxsplit=1)
    options: dict[str, str] = {}
    for part in re.split(r"&(?=\w+=)", query[0]) if query else []:
        name, _, value = part.partition("=")
        if name in options:
            raise ValueError(f"{spec!r}: write option {name!r} once, as {name}=VALUE; a & inside a path is %26.")
        options[name] = unquote(value)
    return kind, unquote(target), options


def join_spec(kind: str, target: object, options: Mapping[str, object]) -> str:
    """The inverse of `split_spec`; the spec has no comma, which separates specs on the command line.

    >>> join_spec("voc", "/data/R&D", {"split": "val"})
    'voc:/data/R%26D?split=val'
    """
    plain = lambda text: re.sub("[%?&#,]", lambda found: f"%{ord(found[0]):02X}", str(text))  # noqa: E731
    query = "&".join(f"{name}={plain(value)}" for name, value in options.items())
    return f"{kind}:{plain(target)}" + (f"?{query}" if query else "")


def check_options(spec: str, kind: str, options: dict[str, str], known: Sequence[str]) -> dict[str, str]:
    """The options of a spec.

    Raises:
        ValueError: an option is not among the known ones of this kind.
    """
    for name in options:
        if name not in known:
            raise ValueError(f"{spec!r}: unknown option {name!r}; {kind} takes {', '.join(known)}.{did_you_mean(name, known)}")
    return options


def whole_number(spec: str, what: str, text: str, at_least: int = 0, at_most: int | None = None) -> int:
    """A number in a spec.

    Raises:
        ValueError: the text is no whole number in the range.
    """
    if not (text.isascii() and text.isdigit() and at_least <= int(text) and (at_most is None or int(text) <= at_most)):
        span = f"from {at_least} to {at_most}" if at_most is not None else f"of at least {at_least}"
        raise ValueError(f"{spec!r}: {what} is {text!r}; it must be a whole number {span}.")
    return int(text)


def limit_of(spec: str, options: Mapping[str, str]) -> int | None:
    """How many items a spec's option ``limit`` takes; None without it."""
    return whole_number(spec, "limit", options["limit"], at_least=1) if "limit" in options else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest valid one, if there is any.

    >>> did_you_mean("colour", ["color", "shape"]), did_you_mean("x", ["color"])
    (" Did you mean 'color'?", '')
    """
    match = get_close_matches(name, list(valid), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
