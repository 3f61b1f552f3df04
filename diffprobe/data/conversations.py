"""What a multimodal language model is taught with: images, and conversations about them.

``llava:FILE.json?images=FOLDER`` reads the layout of LLaVA: {"id", "image", "conversations": [{"from", "value"}]} in a list, or
one a line, where "image" or "images" is a name or a list of names.  ``shapes-captions:N``, ``shapes-details:N`` and
``shapes-instruct:N`` are drawn.
Drawn instructions are about training scenes, twins and several images, of seeds that no benchmark reaches; their answers never
follow from the text.  Images are read only when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from diffprobe.data import files
from diffprobe.data.drawn import ShapesDataset, spread
from diffprobe.data.images import read_image
from diffprobe.data.questions import pick
from diffprobe.data.samples import Fingerprinted, check_options, limit_of, split_spec, whole_number
from diffprobe.data.several import several_images
from diffprobe.data.shapes import facts, picture, said
from diffprobe.data.tables import collected
from diffprobe.data.twins import KINDS

MARK = "<image>"  # where LLaVA's texts name an image
TRAIN_SEED = 2**20  # first seed of twins for training; benchmarks count theirs from 0
REQUESTS = {  # the question of a drawn caption, by its style
    "full": "Describe the image in detail.",
    "place": "Say what is where.",
    "relation": "Say how the objects stand to each other.",
    "count": "Count the objects and name them.",
}
NAMED = {"colour", "shape"}  # what names an object
DETAILS = "Describe the objects one by one."
TURNS = 8  # at most, of a drawn conversation about one scene
FORMS = ("scene",) * 4 + ("mmvp",) * 3 + ("naturalbench",) * 2 + ("several",)  # of drawn instructions, in turn


@dataclass(frozen=True)
class Conversation:
    """Images by their loaders (none for talk alone), and turns of (question, answer)."""

    id: str
    images: tuple[Callable[[], Image.Image], ...]
    turns: tuple[tuple[str, str], ...]


@runtime_checkable
class Conversations(Protocol):
    """An indexable collection of conversations with an identity, of any class."""

    @property
    def name(self) -> str:
        """A short name for provenance."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def fingerprint(self) -> str:
        """A short hash that changes when a conversation does."""
        ...


# --- drawn ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn(Fingerprinted):
    """`count` drawn conversations."""

    count: int
    seed: int = 0
    kind: ClassVar[str]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        raise NotImplementedError

    def content(self) -> Iterator[bytes]:
        """The parameters, and turns and pixels of some conversations from the first to the last."""
        yield repr(self).encode()
        for index in spread(len(self)):
            yield repr(self[index].turns).encode()
            yield from (np.asarray(load()).tobytes() for load in self[index].images)


@dataclass(frozen=True)
class DrawnCaptions(_Drawn):
    """One caption of each of `count` training scenes, in styles that take turns.

    >>> DrawnCaptions(4)[1].turns[0][0]
    'Say what is where.'
    """

    kind = "shapes-captions"

    def __getitem__(self, index: int) -> Conversation:
        sample = ShapesDataset(self.count, "train", self.seed)[index]
        style = list(REQUESTS)[index % len(REQUESTS)]
        text = next(caption.text for caption in sample.captions if caption.style == style)
        return Conversation(sample.id, (sample.load,), ((REQUESTS[style], text),))


@dataclass(frozen=True)
class DrawnDetails(_Drawn):
    """Everything about each object of `count` training scenes that its colour and shape name, in any order.

    Nearly every word depends on the image: a caption of `DrawnCaptions` says a direction or a letter once in thirty words.

    >>> DrawnDetails(4)[2].turns[0][1]
    'the cyan triangle: small dotted at the left'
    """

    kind = "shapes-details"

    def __getitem__(self, index: int) -> Conversation:
        scenes = ShapesDataset(self.count, "train", self.seed)
        sample, objects, rng = scenes[index], scenes.scene(index).objects, np.random.default_rng([self.seed, index, 12])
        pairs = [obj.pair for obj in objects]
        named = [facts(obj) for obj in objects if pairs.count(obj.pair) == 1]
        if not named:
            return DrawnCaptions(self.count, self.seed)[index]
        parts = [
            f"the {said(obj, NAMED)}: {said(obj, obj.keys() - NAMED)}"
            for obj in (named[i] for i in rng.permutation(len(named)))
        ]
        return Conversation(sample.id, (sample.load,), ((DETAILS, "; ".join(parts)),))


@dataclass(frozen=True)
class DrawnInstructions(_Drawn):
    """Questions about scenes (some turns each), about MMVP-like and NaturalBench-like images, and about several images.

    >>> [len(conversation.turns) for conversation in map(DrawnInstructions(10).__getitem__, range(10))]
    [3, 7, 5, 8, 1, 1, 1, 1, 1, 1]
    """

    kind = "shapes-instruct"

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < self.count:
            raise IndexError(f"Conversation {index} of {self.count}.")
        form, rng = FORMS[index % len(FORMS)], np.random.default_rng([self.seed, index, 11])
        name = f"{self.name}-{index:06d}"
        if form == "scene":
            sample = ShapesDataset(self.count, "train", self.seed)[index]
            asked = [sample.questions[k] for k in rng.permutation(len(sample.questions))[:TURNS]]
            return Conversation(name, (sample.load,), tuple((q.text, q.answer) for q in asked))
        if form == "several":
            item = several_images(TRAIN_SEED + self.seed, index // len(FORMS))
            return Conversation(name, item.images, ((item.text, item.answer),))
        pair = KINDS[form](TRAIN_SEED + self.seed, index)
        side = int(rng.integers(2))
        question = pick(rng, pair.questions[side])
        return Conversation(name, (partial(picture, pair.scenes[side]),), ((question.text, question.answer),))


# --- LLaVA's layout ---------------------------------------------------------------------------------

_Entry = tuple[str, list[str], tuple[tuple[str, str], ...]]  # id, names of images, turns


class LlavaConversations(Fingerprinted):
    """A JSON file in LLaVA's layout with its folder of images.

    Args:
        path: The file, JSON or JSON lines.
        images: The folder that image names are relative to; names that leave it are refused.

    Raises:
        ValueError: The file is not of this layout, or images are missing; the message lists the entries.
    """

    def __init__(self, path: str | Path, images: str | Path, limit: int | None = None) -> None:
        self.path, self.folder = Path(path), files.real_path(images)
        self.name = self.path.stem
        if not self.path.is_file():
            raise ValueError(f"'{self.path}' does not exist; give a JSON file in LLaVA's layout.")
        if not self.folder.is_dir():
            raise ValueError(f"'{images}' is no folder; give the folder that the image names are relative to.")
        text = files.read_text(self.path)
        if text.lstrip()[:1] in ("{", ""):
            entries = [files.parse_json(line, where) for where, line in files.numbered_lines(self.path)]
        else:
            entries = files.parse_json(text, f"'{self.path}'")
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"'{self.path}' must hold a list of conversations, or one a line, at least one.")
        self._files: dict[str, Path] = {}
        read = (partial(self._read, number, entry) for number, entry in enumerate(entries[:limit]))
        self._entries: list[_Entry] = collected(f"'{self.path}'", read)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Conversation:
        name, images, turns = self._entries[index]
        return Conversation(name, tuple(partial(self._load, image) for image in images), turns)

    def content(self) -> Iterator[bytes]:
        contents = files.content_digests(
            self.folder, [path.relative_to(self.folder).as_posix() for path in self._files.values()]
        )
        yield json.dumps([self._entries, contents], ensure_ascii=False).encode()

    def _load(self, name: str) -> Image.Image:
        files.check_inside(self.folder, self._files[name])
        return read_image(self._files[name])

    def _read(self, number: int, entry: Any) -> _Entry:
        """An entry's id, images and turns; its images are there."""
        where = f"entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise ValueError(f'{where} has no list "conversations".')
        where = f"{where} (id {entry.get('id', number)!r})"
        files.check_unicode(f"{where}: its id", entry.get("id", number))
        names, texts = _image_names(where, entry), _texts(where, entry["conversations"])
        for kind, text in (("image", "".join(names)), *((f"text {k}", text) for k, text in enumerate(texts))):
            files.check_unicode(f"{where}: its {kind}", text)
        marks = sum(text.count(MARK) for text in texts)
        if names and marks not in (0, len(names)):
            raise ValueError(f"{where} names {len(names)} images and speaks of {marks} ({MARK}).")
        # LLaVA moves every image to the front of the conversation, whatever the place of its mark, and cuts white space there
        # alone; in talk without an image the mark is text like any other, such as a tag of some markup
        clean = [text.replace(MARK, "").strip() if names and MARK in text else text for text in texts]
        for name in names:
            if name not in self._files:
                path = files.file_inside(self.folder, name)
                if path is None:
                    raise ValueError(
                        f"{where}: '{name}' is not in '{self.folder}'; copy it there, or name its folder with images=FOLDER."
                    )
                self._files[name] = path
        return str(entry.get("id", number)), names, tuple(zip(clean[::2], clean[1::2], strict=True))


def _image_names(where: str, entry: Mapping[str, Any]) -> list[str]:
    """Names in "image" or "images", each a name or a list of names; none may leave the folder."""
    both = [entry.get(key) or [] for key in ("image", "images")]
    names, more = ([given] if isinstance(given, str) else given for given in both)
    if not all(isinstance(given, list) and all(isinstance(name, str) for name in given) for given in (names, more)):
        raise ValueError(f'{where}: "image" must be a name or a list of names; found {both[0] or both[1]!r}.')
    if names and more and names != more:
        raise ValueError(f'{where}: "image" and "images" name other files; keep one of them.')
    return [files.inside(where, name) for name in names or more]


def _texts(where: str, turns: list[Any]) -> list[str]:
    """What human and gpt say in turn; an answer at the start answers nothing and is left out, as LLaVA does."""
    if turns and isinstance(turns[0], dict) and turns[0].get("from") == "gpt":
        turns = turns[1:]
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if not turns or len(turns) % 2 or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"{where}: turns must be of human and gpt, in turn, and end with gpt; found {speakers}.")
    texts = [turn.get("value") for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: each turn needs a text "value".')
    return texts


# --- by name ----------------------------------------------------------------------------------------

SPECS = "shapes-captions:N, shapes-details:N, shapes-instruct:N (with seed), or llava:FILE.json?images=FOLDER (with limit)"
_DRAWN = {drawn.kind: drawn for drawn in (DrawnCaptions, DrawnDetails, DrawnInstructions)}


def load_conversations(spec: str) -> Conversations:
    """The conversations that a short text names: one of `SPECS`.

    Raises:
        ValueError: The text names none; the message lists what does.

    >>> load_conversations("shapes-instruct:100?seed=1").name
    'shapes-instruct-1'
    """
    kind, target, options = split_spec(spec)
    if kind not in (*_DRAWN, "llava") or not target:
        raise ValueError(f"{spec!r} names no conversations; valid are {SPECS}.")
    check_options(spec, kind, options, ("images", "limit") if kind == "llava" else ("seed",))
    if kind in _DRAWN:
        count = whole_number(spec, "the number after ':'", target, at_least=1)
        return _DRAWN[kind](count, whole_number(spec, "seed", options.get("seed", "0")))
    if "images" not in options:
        raise ValueError(f"{spec!r} does not say where the images are; add ?images=FOLDER.")
    return LlavaConversations(target, options["images"], limit_of(spec, options))
