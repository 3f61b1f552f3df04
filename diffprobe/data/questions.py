"""Questions about drawn scenes that cannot be answered from their text.

The invariant: given its text, each option of a question is equally likely.  It holds by symmetry.  A yes
or no is tossed first and the question built to fit it, so that both answers get the same texts; a choice
between two colours or shapes is asked only where the other one could as well have been drawn; sizes,
directions and positions are drawn independently of the names that the text uses.  Where a symmetry
cannot hold (the colour of a held-out pair, the mark of a small object), nothing is asked.

Why colours and shapes are symmetric: `held_out` matches each colour with one shape, and renaming colours
together with their matched shapes leaves the distribution of scenes as it is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import TypeVar

import numpy as np

from diffprobe.data import shapes as world
from diffprobe.data.samples import Question

Rng = np.random.Generator
YES_NO = ("yes", "no")
T = TypeVar("T")


def pick(rng: Rng, items: Sequence[T]) -> T:
    """One of `items`, each as likely."""
    return items[int(rng.integers(len(items)))]


def article(noun: str) -> str:
    """The noun with its article.

    >>> article("orange star"), article("red arrow")
    ('an orange star', 'a red arrow')
    """
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """
    >>> plural("red cross"), plural("star")
    ('red crosses', 'stars')
    """
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def name(obj: world.Obj) -> str:
    """What a question calls an object: its colour and shape."""
    return f"{obj.colour} {obj.shape}"


def side(where: str) -> str:
    """The answer that a relation makes: "left of" is "left", "above" is itself."""
    return where.removesuffix(" of")


def between(options: Sequence[str], where: str) -> str:
    """Two opposite sides in the order given, as a question says them.

    >>> between(("right", "left"), "left of"), between(("above", "below"), "below")
    ('right or left of', 'above or below')
    """
    return f"{options[0]} or {options[1]}{' of' if where.endswith(' of') else ''}"


def _toss(rng: Rng) -> bool:
    return bool(rng.random() < 0.5)


def _shuffled(rng: Rng, *options: str) -> tuple[str, ...]:
    return tuple(options[i] for i in rng.permutation(len(options)))


def _unique(scene: world.Scene) -> list[int]:
    """Objects that their colour and shape tell from all others."""
    times = Counter(o.pair for o in scene.objects)
    return [i for i, o in enumerate(scene.objects) if times[o.pair] == 1]


def _existence(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    index = int(rng.integers(len(scene.objects)))
    obj, yes = scene.objects[index], _toss(rng)
    form = pick(rng, ("pair", "colour", "shape"))
    if form == "pair":
        colour, shape = obj.pair if yes else _absent_pair(scene, obj, rng)
        text = f"Is there {article(f'{colour} {shape}')}?"
    else:
        absent = [value for value in world.ATTRIBUTES[form] if all(getattr(o, form) != value for o in scene.objects)]
        said = getattr(obj, form) if yes else pick(rng, absent)
        text = f"Is anything {said}?" if form == "colour" else f"Is there {article(said)}?"
    yield Question(text, YES_NO[not yes], YES_NO, "existence", (index,) if yes else ())


def _absent_pair(scene: world.Scene, obj: world.Obj, rng: Rng) -> tuple[str, str]:
    """A pair that is not in the scene but as likely to be asked about; half the time of colours and shapes that are."""
    present = {o.pair for o in scene.objects}
    # Held out or not as the object that it stands for: otherwise a held-out name would give the answer away.
    kept = world.held_out(*obj.pair)
    every = [(c, s) for c in world.COLOURS for s in world.SHAPES if world.held_out(c, s) == kept and (c, s) not in present]
    crossed = [
        (c, s) for c, s in every if any(o.colour == c for o in scene.objects) and any(o.shape == s for o in scene.objects)
    ]
    return pick(rng, crossed if crossed and _toss(rng) else every)


def _count(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    number, everyone = len(scene.objects), tuple(range(len(scene.objects)))
    if number >= len(world.COUNT_WORDS):
        return
    text = pick(rng, ("How many objects are there?", "How many shapes are in the picture?"))
    yield Question(text, world.COUNT_WORDS[number], world.COUNT_WORDS[1:], "count", everyone)
    if number > 1 and len({o.pair for o in scene.objects}) == 1:  # scenes that are all alike have two or more
        text = f"How many {plural(name(scene.objects[0]))} are there?"
        yield Question(text, world.COUNT_WORDS[number], world.COUNT_WORDS[2:], "count", everyone)


def _either(scene: world.Scene, rng: Rng, asked: str, by: str) -> Iterator[Question]:
    """Which of two colours (or shapes) an object has that its shape (or colour) tells from all others."""
    times = Counter(getattr(o, by) for o in scene.objects)
    indices = [i for i, o in enumerate(scene.objects) if times[getattr(o, by)] == 1 and not world.held_out(*o.pair)]
    if not indices:
        return
    index = pick(rng, indices)
    obj, own = scene.objects[index], getattr(scene.objects[index], asked)
    others = [v for v in world.ATTRIBUTES[asked] if v != own and not world.held_out(**{by: getattr(obj, by), asked: v})]
    nearby = [v for v in others if any(getattr(o, asked) == v for o in scene.objects)]
    options = _shuffled(rng, own, pick(rng, nearby if nearby and _toss(rng) else others))
    text = f"Is the {obj.shape} {options[0]} or {options[1]}?"
    if asked == "shape":
        text = f"Is the {obj.colour} object {article(options[0])} or {article(options[1])}?"
    yield Question(text, own, options, asked, (index,))


def _size(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    if indices := _unique(scene):
        index = pick(rng, indices)
        options = _shuffled(rng, *world.SIZES)
        text = f"Is the {name(scene.objects[index])} {options[0]} or {options[1]}?"
        yield Question(text, scene.objects[index].size, options, "size", (index,))


def _relation(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    # Ordered pairs: each order is as likely, so the first name says nothing.
    pairs = [(i, j) for i, j in permutations(_unique(scene), 2) if world.relation(scene.objects[i], scene.objects[j])]
    if not pairs:
        return
    i, j = pick(rng, pairs)
    a, b = scene.objects[i], scene.objects[j]
    true = str(world.relation(a, b))
    if _toss(rng):
        yes = _toss(rng)
        text = f"Is the {name(a)} {true if yes else world.RELATIONS[true]} the {name(b)}?"
        yield Question(text, YES_NO[not yes], YES_NO, "relation", (i, j))
    else:
        options = _shuffled(rng, side(true), side(world.RELATIONS[true]))
        text = f"Is the {name(a)} {between(options, true)} the {name(b)}?"
        yield Question(text, side(true), options, "relation", (i, j))


def _comparison(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    pairs = [(i, j) for i, j in permutations(_unique(scene), 2) if scene.objects[i].size != scene.objects[j].size]
    if not pairs:
        return
    i, j = pick(rng, pairs)
    a, b = scene.objects[i], scene.objects[j]
    alone = _toss(rng)
    word, size = pick(rng, (("larger", "large"), ("smaller", "small")))
    if alone:
        text = f"Is the {name(a)} {word} than the {name(b)}?"
        yield Question(text, YES_NO[a.size != size], YES_NO, "comparison", (i, j))
    else:
        text = f"Which is {word}, the {name(a)} or the {name(b)}?"
        yield Question(text, name(a if a.size == size else b), (name(a), name(b)), "comparison", (i, j))


def _orientation(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    if indices := [i for i in _unique(scene) if scene.objects[i].shape in world.DIRECTED]:
        index = pick(rng, indices)
        text = f"Which way does the {name(scene.objects[index])} point?"
        yield Question(text, scene.objects[index].direction, tuple(world.DIRECTIONS), "orientation", (index,))


def _mark(scene: world.Scene, rng: Rng) -> Iterator[Question]:
    """A large object has no mark, a dot or a letter, each a third of the time; small objects never have one."""
    indices = [i for i in _unique(scene) if scene.objects[i].size == "large"]
    if not indices:
        return
    index = pick(rng, indices)
    obj, form = scene.objects[index], pick(rng, ("any", "kind", "letter"))
    if form == "any" and (obj.mark == "none" or _toss(rng)):  # the toss evens one third out against two
        text = f"Is there a mark on the {name(obj)}?"
        yield Question(text, YES_NO[obj.mark == "none"], YES_NO, "mark", (index,))
    elif form == "kind" and obj.mark != "none":
        options = _shuffled(rng, "dot", "letter")
        text = f"Is there a {options[0]} or a {options[1]} on the {name(obj)}?"
        yield Question(text, "dot" if obj.mark == "dot" else "letter", options, "mark", (index,))
    elif form == "letter" and obj.mark in world.LETTERS:
        options = _shuffled(rng, obj.mark, pick(rng, [letter for letter in world.LETTERS if letter != obj.mark]))
        text = f"Which letter is on the {name(obj)}, {options[0]} or {options[1]}?"
        yield Question(text, obj.mark, options, "mark", (index,))


CATEGORIES: dict[str, Callable[[world.Scene, Rng], Iterator[Question]]] = {
    "existence": _existence,
    "count": _count,
    "colour": partial(_either, asked="colour", by="shape"),
    "shape": partial(_either, asked="shape", by="colour"),
    "size": _size,
    "relation": _relation,
    "comparison": _comparison,
    "orientation": _orientation,
    "mark": _mark,
}


def questions(scene: world.Scene, seed: int) -> tuple[Question, ...]:
    """At most one question of each category (count: two), a pure function of the scene and the seed.

    Balance is over scenes as `random_scene` draws them, with any number of objects; the answers of "count" are
    balanced only where that number is not fixed beforehand.

    >>> from diffprobe.data.shapes import random_scene
    >>> {q.category for q in questions(random_scene(0, 0), 0)} <= set(CATEGORIES)
    True
    """
    # The scene belongs in the stream: with the seed alone every scene would get the same toss.
    digest = hashlib.sha256(repr(scene).encode()).digest()[:8]
    rng = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    return tuple(question for ask in CATEGORIES.values() for question in ask(scene, rng))
