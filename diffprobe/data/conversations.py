"""What a multimodal language model is taught with: images, and conversations about them.

``llava:FILE.json?images=FOLDER`` reads the layout of LLaVA ({"id", "image", "conversations": [{"from", "value"}]} in a list, or
one a line; "image" or "images" one name or a list of names); ``shapes-captions:N`` and ``shapes-instruct:N`` are drawn.  Drawn instructions are about
training scenes, twins and several images, of seeds that no benchmark counts to; answers never follow from the text.
Images are read only when asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from diffprobe.data.drawn import ShapesDataset, spread
from diffprobe.data.files import (
    check_unicode,
    content_digests,
    file_inside,
    inside,
    listed,
    numbered_lines,
    parse_json,
    read_text,
    real_path,
)
from diffprobe.data.images import read_image
from diffprobe.data.questions import pick
from diffprobe.data.samples import split_spec
from diffprobe.data.several import several_images
from diffprobe.data.shapes import Scene, picture
from diffprobe.data.twins import KINDS

MARK = "<image>"  # where LLaVA's texts name an image
TRAIN_SEED = 2**20  # of twins that are learnt from; benchmarks count theirs from 0
REQUESTS = {
    # what a drawn caption of each style is asked for with
    "full": "Describe the image in detail.",
    "place": "Say what is where.",
    "relation": "Say how the objects stand to each other.",
    "count": "Count the objects and name them.",
}
TURNS = 8  # at most, of a drawn conversation about one scene
FORMS = ("scene",) * 4 + ("mmvp",) * 3 + ("naturalbench",) * 2 + ("several",)  # of drawn instructions, by turns


@dataclass(frozen=True)
class Conversation:
    """Images by their loaders (none for talk alone), and turns of (question, answer)."""

    id: str
    images: tuple[Callable[[], Image.Image], ...]
    turns: tuple[tuple[str, str], ...]


@runtime_checkable
class Conversations(Protocol):
    """An indexable collection of conversations with an identity."""

    @property
    def name(self) -> str:
        """A short name for provenance."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def fingerprint(self) -> str:
        """A short hash that changes when a conversation does."""
        ...


def loader(scene: Scene) -> Callable[[], Image.Image]:
    """Draws a scene when called."""
    return lambda: picture(scene)


# --- drawn ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnCaptions:
    """One caption of each of `count` training scenes, in styles that take turns.

    >>> DrawnCaptions(4)[1].turns[0][0]
    'Say what is where.'
    """

    count: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"shapes-captions-{self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        sample = ShapesDataset(self.count, "train", self.seed)[index]
        style = list(REQUESTS)[index % len(REQUESTS)]
        text = next(caption.text for caption in sample.captions if caption.style == style)
        return Conversation(sample.id, (sample.load,), ((REQUESTS[style], text),))

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return _digest(self)


@dataclass(frozen=True)
class DrawnInstructions:
    """Questions about scenes (some turns each), of MMVP-like and NaturalBench-like images, and of several images.

    >>> [len(conversation.turns) for conversation in map(DrawnInstructions(10).__getitem__, range(10))]
    [3, 7, 5, 8, 1, 1, 1, 1, 1, 1]
    """

    count: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"shapes-instruct-{self.seed}"

    def __len__(self) -> int:
        return self.count

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
        return Conversation(name, (loader(pair.scenes[side]),), ((question.text, question.answer),))

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return _digest(self)


def _digest(data: DrawnCaptions | DrawnInstructions) -> str:
    """Hash of the parameters, and of turns and pixels from the first conversation to the last."""
    digest = hashlib.sha256(repr(data).encode())
    for index in spread(len(data)):
        digest.update(repr(data[index].turns).encode())
        for load in data[index].images:
            digest.update(np.asarray(load()).tobytes())
    return digest.hexdigest()[:16]


# --- LLaVA's layout ---------------------------------------------------------------------------------


_Entry = tuple[str, list[str], tuple[tuple[str, str], ...]]  # id, names of images, turns


class LlavaConversations:
    """A JSON file in LLaVA's layout with its folder of images.

    Args:
        path: the file, JSON or JSON lines.
        images: the folder that image names are relative to; names that leave it are refused.
        limit: conversations at most, the first ones.

    Raises:
        ValueError: the file is not of this layout, or images are missing; the message lists the entries.
    """

    def __init__(self, path: str | Path, images: str | Path, limit: int | None = None) -> None:
        self.path, self.folder = Path(path), real_path(images)
        if not self.path.is_file():
            raise ValueError(f"'{self.path}' does not exist; give a JSON file in LLaVA's layout.")
        if not self.folder.is_dir():
            raise ValueError(f"'{images}' is no folder; give the folder that the image names are relative to.")
        text = read_text(self.path)
        if text.lstrip()[:1] in ("{", ""):
            entries = [parse_json(line, where) for where, line in numbered_lines(self.path)]
        else:
            entries = parse_json(text, f"'{self.path}'")
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"'{self.path}' must hold a list of conversations, or one a line, at least one.")
        self._entries: list[_Entry] = []
        self._files: dict[str, Path] = {}
        faults = []
        for number, entry in enumerate(entries[:limit]):
            try:
                self._entries.append(self._read(number, entry))
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(f"{len(faults)} entries of '{self.path}' cannot be used: {listed(faults)}.")

    @property
    def name(self) -> str:
        return self.path.stem

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Conversation:
        name, images, turns = self._entries[index]
        return Conversation(name, tuple(self._loader(image) for image in images), turns)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        contents = content_digests(self.folder, [path.relative_to(self.folder).as_posix() for path in self._files.values()])
        return hashlib.sha256(json.dumps([self._entries, contents], ensure_ascii=False).encode()).hexdigest()[:16]

    def _loader(self, name: str) -> Callable[[], Image.Image]:
        def load() -> Image.Image:
            path = self._files[name]
            if not real_path(path).is_relative_to(self.folder):
                raise ValueError(f"'{path}' is a link to '{real_path(path)}', outside the folder of images.")
            return read_image(path)

        return load

    def _read(self, number: int, entry: Any) -> _Entry:
        where = f"entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise ValueError(f'{where} has no list "conversations".')
        where = f"{where} (id {entry.get('id', number)!r})"
        check_unicode(f"{where}: its id", entry.get("id", number))
        both = [entry.get(key) or [] for key in ("image", "images")]
        names, more = ([given] if isinstance(given, str) else given for given in both)
        if not all(isinstance(given, list) and all(isinstance(name, str) for name in given) for given in (names, more)):
            raise ValueError(f'{where}: "image" must be a name or a list of names; found {both[0] or both[1]!r}.')
        if names and more and names != more:
            raise ValueError(f'{where}: "image" and "images" name other files; keep one of them.')
        names = [inside(where, name) for name in names or more]
        said = entry["conversations"]
        if said and isinstance(said[0], dict) and said[0].get("from") == "gpt":
            said = said[1:]  # answers nothing; LLaVA leaves it out
        speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in said]
        if not said or len(said) % 2 or speakers != ["human", "gpt"] * (len(said) // 2):
            raise ValueError(f"{where}: turns must be of human and gpt, in turn, and end with gpt; found {speakers}.")
        texts = [turn.get("value") for turn in said]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{where}: each turn needs a text "value".')
        for kind, said_texts in (("image", names), *((f"text {k}", [text]) for k, text in enumerate(texts))):
            check_unicode(f"{where}: its {kind}", "".join(said_texts))
        marks = sum(text.count(MARK) for text in texts)
        if names and marks not in (0, len(names)):
            raise ValueError(f"{where} names {len(names)} images and speaks of {marks} ({MARK}).")
        # LLaVA moves every image to the front of the conversation, whatever the place of its mark, and cuts white space there
        # alone; in talk without an image the mark is text like any other, such as a tag of some markup
        clean = [text.replace(MARK, "").strip() if names and MARK in text else text for text in texts]
        turns = tuple(zip(clean[::2], clean[1::2], strict=True))
        for name in names:
            if name not in self._files:
                path = file_inside(self.folder, name)
                if path is None:
                    raise ValueError(
                        f"{where}: '{name}' is not in '{self.folder}'; copy it there, or name its folder with images=FOLDER."
                    )
                self._files[name] = path
        return str(entry.get("id", number)), names, turns


# --- by name ----------------------------------------------------------------------------------------

SPECS = "shapes-captions:N, shapes-instruct:N (with seed), or llava:FILE.json?images=FOLDER (with limit)"


def load_conversations(spec: str) -> Conversations:
    """The conversations that a short text names: one of `SPECS`.

    Raises:
        ValueError: the text names none; the message lists what does.

    >>> load_conversations("shapes-instruct:100?seed=1").name
    'shapes-instruct-1'
    """
    kind, target, options = split_spec(spec)
    known = {"llava": ("images", "limit"), "shapes-captions": ("seed",), "shapes-instruct": ("seed",)}
    if kind not in known or not target:
        raise ValueError(f"{spec!r} names no conversations; valid are {SPECS}.")
    if unknown := [name for name in options if name not in known[kind]]:
        raise ValueError(f"{spec!r}: unknown option {unknown[0]!r}; {kind} takes {', '.join(known[kind])}.")
    for name, text in [("the number after ':'", target if kind != "llava" else "1"), *options.items()]:
        if name != "images" and not (text.isascii() and text.isdigit() and (int(text) > 0 or name == "seed")):
            raise ValueError(f"{spec!r}: {name} is {text!r}; it must be a whole number above 0.")
    if kind == "llava":
        if "images" not in options:
            raise ValueError(f"{spec!r} does not say where the images are; add ?images=FOLDER.")
        return LlavaConversations(target, options["images"], int(options["limit"]) if "limit" in options else None)
    drawn = DrawnCaptions if kind == "shapes-captions" else DrawnInstructions
    return drawn(int(target), int(options.get("seed", "0")))
