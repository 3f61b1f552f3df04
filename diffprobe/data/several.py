"""Drawn questions about several images at once, in the manner of BLINK (Fu et al. 2024).

Each item is a pure function of (seed, index); tasks take turns, and so do the places of the answer within a task.  The
invariant: the text does not depend on the place of the answer, so it can be found only in the images.

Tasks: match (two images that differ in one thing; which one a caption is true of), find (four images; which one shows an
object), more (two images; which one has more objects), same (a scene, then two that are arranged anew; which one keeps
its objects), jigsaw (an image without its lower right quarter, then two pieces; which one belongs there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from diffprobe.data.questions import article, name
from diffprobe.data.shapes import COLOURS, SHAPES, SIDE, Scene, held_out, picture
from diffprobe.data.twins import Rng, _cast, _stage, mmvp_pair

ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth")
GREY = (128, 128, 128)
Load = Callable[[], Image.Image]
Drawn = tuple[list[Load], str]  # the images, with the answer at its place, and the question
_STREAM = 1000  # differs from every stream of `twin_rng`


@dataclass(frozen=True)
class Several:
    """Images in order, a question about them, and the right one of the options (ordinal words)."""

    task: str
    images: tuple[Load, ...]
    text: str
    options: tuple[str, ...]
    answer: str


def _placed(right: Scene, wrong: Sequence[Scene], place: int) -> list[Scene]:
    """The wrong scenes with the right one put in at `place`."""
    return [*wrong[:place], right, *wrong[place:]]


def _shown(scenes: Sequence[Scene]) -> list[Load]:
    return [partial(picture, scene) for scene in scenes]


def _match(rng: Rng, place: int) -> Drawn:
    pair = mmvp_pair(int(rng.integers(2**31)), int(rng.integers(2**31)))
    side = int(rng.integers(2))
    scenes = _placed(pair.scenes[side], [pair.scenes[1 - side]], place)
    return _shown(scenes), f'Which image fits the words "{pair.captions[side].text}", the first or the second?'


def _find(rng: Rng, place: int) -> Drawn:
    while True:  # two colours x two shapes: neither word alone finds the object
        one, other = _cast(rng, 2)
        pairs = [(colour, shape) for colour in (one.colour, other.colour) for shape in (one.shape, other.shape)]
        if not any(held_out(*pair) for pair in pairs):
            break
    right, *wrong = (_stage(rng, [replace(one, colour=colour, shape=shape)]) for colour, shape in pairs)
    text = f"Which image shows {article(name(one))}: the first, the second, the third or the fourth?"
    return _shown(_placed(right, wrong, place)), text


def _more(rng: Rng, place: int) -> Drawn:
    fewer = int(rng.integers(1, 4))
    most, least = _stage(rng, _cast(rng, fewer + 1)), _stage(rng, _cast(rng, fewer))
    return _shown(_placed(most, [least], place)), "Which image has more objects, the first or the second?"


def _same(rng: Rng, place: int) -> Drawn:
    scene = _stage(rng, _cast(rng, 2))
    first, second = scene.objects
    free = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour != first.colour) != (shape != first.shape) and not held_out(colour, shape) and (colour, shape) != second.pair
    ]  # one attribute of one object changes
    colour, shape = free[int(rng.integers(len(free)))]
    changed = replace(scene, objects=(replace(first, colour=colour, shape=shape), second))
    anew = [_stage(rng, list(same.objects)) for same in (scene, changed)]  # elsewhere, on another background
    scenes = _placed(anew[0], anew[1:], place)
    text = "Which image shows the same two objects as the first image, the second or the third?"
    return _shown([scene, *scenes]), text


def _jigsaw(rng: Rng, place: int) -> Drawn:
    def crossed() -> Scene:
        # the cut goes through an object, so the right piece can be told even where the backgrounds are equal
        (obj,) = _cast(rng, 1, size="large")
        x, y = (float(v) for v in rng.uniform((0.42, 0.65), (0.58, 0.75)))
        return replace(_stage(rng, [obj]), objects=(replace(obj, x=x, y=y),))

    whole = other = crossed()
    while other.objects[0].colour == whole.objects[0].colour:
        other = crossed()
    pieces = [partial(_quarter, scene) for scene in _placed(whole, [other], place)]
    text = "The lower right quarter of the first image is missing. Which piece fits, the second or the third image?"
    return [partial(_without_quarter, whole), *pieces], text


def _quarter(scene: Scene) -> Image.Image:
    piece = picture(scene).crop((SIDE // 2, SIDE // 2, SIDE, SIDE))
    del piece.info["scene"]  # a piece shows only a part of it
    return piece


def _without_quarter(scene: Scene) -> Image.Image:
    image = picture(scene)
    del image.info["scene"]
    image.paste(GREY, (SIDE // 2, SIDE // 2, SIDE, SIDE))
    return image


# For each task the function that draws it, and which of its images are the options.
TASKS: dict[str, tuple[Callable[[Rng, int], Drawn], slice]] = {
    "match": (_match, slice(0, 2)),
    "find": (_find, slice(0, 4)),
    "more": (_more, slice(0, 2)),
    "same": (_same, slice(1, 3)),
    "jigsaw": (_jigsaw, slice(1, 3)),
}


def several_images(seed: int, index: int) -> Several:
    """Item `index`: task and place of the answer by turns, everything else at random.

    >>> item = several_images(0, 2)
    >>> item.task, item.options, item.answer, item.images[0]().size
    ('more', ('first', 'second'), 'first', (128, 128))
    """
    turn, number = divmod(index, len(TASKS))
    task = list(TASKS)[number]
    draw, span = TASKS[task]
    options = ORDINALS[span]
    place = turn % len(options)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=(_STREAM,)))
    images, text = draw(rng, place)
    return Several(task, tuple(images), text, options, options[place])
