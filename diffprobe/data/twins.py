"""Drawn twins of the benchmarks MMVP, Winoground and NaturalBench: two images that differ in one thing.

Each item is a pure function of (seed, index) and comes as a `Pair`; side 0 is image "a", side 1 image "b".
The invariant: what is said and asked of one image is wrong of the other, so whoever treats both images
alike gets no pair right.

Sources: MMVP (Tong et al. 2024, nine visual patterns), Winoground (Thrush et al. 2022, the same words in
another order), NaturalBench (Li et al. 2024, two images x two questions with opposite answers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from diffprobe.data import shapes as world
from diffprobe.data.questions import YES_NO, article, between, name, pick, plural, side
from diffprobe.data.samples import Caption, IndexedDataset, Question, Sample

Rng = np.random.Generator
# Objects whose inside is wide enough to see how it is filled; in small ones it is next to nothing.
ROOMY = ("circle", "square", "triangle", "diamond", "wedge")
FAR = 0.67  # zoom of the distant view: a large object then looks as small ones do


@dataclass(frozen=True)
class Pair:
    """Two images, a caption of each that is false of the other, and the questions asked of both.

    `questions[side]` holds the same texts on both sides with the answers of that side (none for Winoground).
    """

    pattern: str
    scenes: tuple[world.Scene, world.Scene]
    captions: tuple[Caption, Caption]
    questions: tuple[tuple[Question, ...], tuple[Question, ...]] = ((), ())


@dataclass(frozen=True)
class _Contrast:
    """What differs between two scenes and how it is asked; `options` and `checks` are in the order of the scenes."""

    scenes: tuple[world.Scene, world.Scene]
    captions: tuple[Caption, Caption]
    ask: str  # with {0} and {1} where the options stand
    options: tuple[str, str]
    checks: tuple[str, str]  # yes of its own scene, no of the other
    objects: tuple[int, ...] = (0,)


# --- scenes ---------------------------------------------------------------------------------------


def twin_rng(seed: int, kind: str, index: int) -> Rng:
    """The random stream of one item; a spawn key keeps it apart from every stream of `scene_rng`."""
    return np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=(list(KINDS).index(kind),)))


def _cast(rng: Rng, count: int, shapes: tuple[str, ...] = world.SHAPES, **given: Any) -> list[world.Obj]:
    """Objects that differ in colour and in shape, the first of one of `shapes`; no marks unless given."""
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        colour, shape = world.random_pair(rng)
        allowed = shapes if not chosen else world.SHAPES
        if shape in allowed and all(colour != c and shape != s for c, s in chosen):
            chosen.append((colour, shape))
    return [
        world.random_object(rng, pair, **{"size": pick(rng, list(world.SIZES)), "mark": "none", **given}) for pair in chosen
    ]


def _stage(rng: Rng, objects: list[world.Obj]) -> world.Scene:
    """Place objects on a random background; where one of two lies is always clear."""
    centres = world.place(rng, [o.radius for o in objects], clear_axis=len(objects) == 2)
    return world.Scene(
        objects=tuple(replace(o, x=x, y=y) for o, (x, y) in zip(objects, centres, strict=True)),
        tone=pick(rng, list(world.TONES)),
        texture=pick(rng, world.TEXTURES),
        angle=float(rng.uniform(0, 2 * np.pi)),
        texture_seed=int(rng.integers(2**31)),
    )


def _edited(scene: world.Scene, **changes: object) -> world.Scene:
    """The scene with attributes of its first object changed."""
    return replace(scene, objects=(replace(scene.objects[0], **changes), *scene.objects[1:]))  # type: ignore[arg-type]


def _one_or_two(rng: Rng) -> int:
    return int(rng.integers(1, 3))


def _two_of(rng: Rng, values: tuple[str, ...]) -> tuple[str, str]:
    first, second = rng.permutation(len(values))[:2]
    return values[first], values[second]


def _described(scenes: tuple[world.Scene, world.Scene], style: str) -> tuple[Caption, Caption]:
    return world.caption(scenes[0], style), world.caption(scenes[1], style)


# --- the nine patterns ----------------------------------------------------------------------------


def _vary(scene: world.Scene, attribute: str, values: tuple[str, str], style: str, ask: str, check: str) -> _Contrast:
    """Two scenes whose first object differs in one attribute; `check` has {0} where the value stands."""
    scenes = (_edited(scene, **{attribute: values[0]}), _edited(scene, **{attribute: values[1]}))
    return _Contrast(scenes, _described(scenes, style), ask, values, (check.format(values[0]), check.format(values[1])))


def _orientation(rng: Rng) -> _Contrast:
    scene = _stage(rng, _cast(rng, _one_or_two(rng), world.DIRECTED))
    subject = name(scene.objects[0])
    ask = f"Does the {subject} point {{0}} or {{1}}?"
    return _vary(scene, "direction", _two_of(rng, tuple(world.DIRECTIONS)), "full", ask, f"Does the {subject} point {{0}}?")


def _presence(rng: Rng) -> _Contrast:
    scene = _stage(rng, _cast(rng, 2))
    scenes = (scene, replace(scene, objects=scene.objects[:1]))
    first, second = (name(o) for o in scene.objects)
    ask = f"Is there {article(second)}?"
    # "count" captions say how many there are: "a red star" alone would be true of both images
    return _Contrast(scenes, _described(scenes, "count"), ask, YES_NO, (ask, f"Is the {first} the only object?"), ())


def _fill(rng: Rng, fills: tuple[str, str]) -> _Contrast:
    scene = _stage(rng, _cast(rng, _one_or_two(rng), ROOMY, size="large"))
    subject = name(scene.objects[0])
    return _vary(scene, "fill", fills, "web", f"Is the {subject} {{0}} or {{1}}?", f"Is the {subject} {{0}}?")


def _quantity(rng: Rng) -> _Contrast:
    fewer = int(rng.integers(2, len(world.COUNT_WORDS) - 1))
    first = _cast(rng, 1)[0]
    crowd = [
        world.random_object(
            rng, first.pair, pick(rng, list(world.SIZES)), fill=first.fill, direction=first.direction, mark="none"
        )
        for _ in range(fewer + 1)
    ]
    scene = _stage(rng, crowd)
    scenes = (replace(scene, objects=scene.objects[:fewer]), scene)
    subjects, options = plural(name(first)), (world.COUNT_WORDS[fewer], world.COUNT_WORDS[fewer + 1])
    checks = (f"Are there exactly {options[0]} {subjects}?", f"Are there exactly {options[1]} {subjects}?")
    return _Contrast(scenes, _described(scenes, "list"), f"Are there {{0}} or {{1}} {subjects}?", options, checks, ())


def _mirrored(rng: Rng) -> tuple[tuple[world.Scene, world.Scene], str]:
    """Two objects of one size, then with their places exchanged; and where the first is in the first scene."""
    first, second = _cast(rng, 2, size=pick(rng, list(world.SIZES)))
    scene = _stage(rng, [first, replace(second, radius=first.radius)])
    a, b = scene.objects
    swapped = replace(scene, objects=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))
    return (scene, swapped), str(world.relation(a, b))


def _position(rng: Rng) -> _Contrast:
    scenes, where = _mirrored(rng)
    first, second = (name(o) for o in scenes[0].objects)
    places = (where, world.RELATIONS[where])
    ask = f"Is the {first} {between(('{0}', '{1}'), where)} the {second}?"
    checks = (f"Is the {first} {places[0]} the {second}?", f"Is the {first} {places[1]} the {second}?")
    return _Contrast(scenes, _described(scenes, "relation"), ask, (side(where), side(places[1])), checks, (0, 1))


def _colour(rng: Rng) -> _Contrast:
    scene = _stage(rng, _cast(rng, _one_or_two(rng)))
    first, taken = scene.objects[0], {o.colour for o in scene.objects}
    other = pick(rng, [c for c in world.COLOURS if c not in taken and not world.held_out(c, first.shape)])
    ask = f"Is the {first.shape} {{0}} or {{1}}?"
    return _vary(scene, "colour", (first.colour, other), "list", ask, f"Is the {first.shape} {{0}}?")


def _text(rng: Rng) -> _Contrast:
    scene = _stage(rng, _cast(rng, _one_or_two(rng), size="large"))
    subject = name(scene.objects[0])
    ask = f"Which letter is on the {subject}, {{0}} or {{1}}?"
    return _vary(scene, "mark", _two_of(rng, tuple(world.LETTERS)), "full", ask, f"Is the letter {{0}} on the {subject}?")


def _viewpoint(rng: Rng) -> _Contrast:
    scene = _stage(rng, _cast(rng, _one_or_two(rng), size="large"))
    scenes = (scene, replace(scene, zoom=FAR))
    close, far = (world.caption(scene, "list") for scene in scenes)
    captions = (replace(close, text=f"{close.text} seen close"), replace(far, text=f"{far.text} seen from far away"))
    checks = ("Is the scene seen close?", "Is the scene seen from far away?")
    return _Contrast(scenes, captions, "Is the scene seen {0} or {1}?", ("close", "from far away"), checks, ())


_BUILDERS: dict[str, Callable[[Rng], _Contrast]] = {
    "orientation": _orientation,
    "presence": _presence,
    "state": partial(_fill, fills=("filled", "hollow")),
    "quantity": _quantity,
    "position": _position,
    "colour": _colour,
    "structure": partial(_fill, fills=("striped", "dotted")),
    "text": _text,
    "viewpoint": _viewpoint,
}
PATTERNS = tuple(_BUILDERS)


# --- the benchmarks -------------------------------------------------------------------------------


def _contrast(seed: int, kind: str, index: int) -> tuple[str, _Contrast, Rng]:
    """The contrast of one item, its sides in random order, and the stream to go on with."""
    rng = twin_rng(seed, kind, index)
    pattern = PATTERNS[index % len(PATTERNS)]
    made = _BUILDERS[pattern](rng)
    if rng.random() < 0.5:
        made = replace(
            made,
            scenes=made.scenes[::-1],
            captions=made.captions[::-1],
            options=made.options[::-1],
            checks=made.checks[::-1],
        )
    return pattern, made, rng


def mmvp_pair(seed: int, index: int) -> Pair:
    """Two scenes that differ in one thing, their captions, and a question with two options; patterns take turns.

    >>> pair = mmvp_pair(0, 2)
    >>> pair.pattern, sorted(questions[0].answer for questions in pair.questions)
    ('state', ['filled', 'hollow'])
    """
    pattern, made, rng = _contrast(seed, "mmvp", index)
    options = made.options if rng.random() < 0.5 else made.options[::-1]
    text = made.ask.format(*options)
    a, b = ((Question(text, answer, options, pattern, made.objects),) for answer in made.options)
    return Pair(pattern, made.scenes, made.captions, (a, b))


def naturalbench_group(seed: int, index: int) -> Pair:
    """Two scenes and two yes/no questions: the first is yes of the first scene only, the second of the second only.

    >>> [[q.answer for q in questions] for questions in naturalbench_group(0, 0).questions]
    [['yes', 'no'], ['no', 'yes']]
    """
    pattern, made, _ = _contrast(seed, "naturalbench", index)
    a, b = (
        tuple(Question(text, YES_NO[image != own], YES_NO, pattern, made.objects) for own, text in enumerate(made.checks))
        for image in range(2)
    )
    return Pair(pattern, made.scenes, made.captions, (a, b))


def winoground_quad(seed: int, index: int) -> Pair:
    """Two scenes and two captions of the same words: attributes exchanged (even index) or the relation turned (odd).

    >>> a, b = winoground_quad(0, 0).captions
    >>> a.text != b.text, sorted(a.text.split()) == sorted(b.text.split())
    (True, True)
    """
    rng = twin_rng(seed, "winoground", index)
    if index % 2:
        scenes, _ = _mirrored(rng)
        return Pair(
            "relation", scenes, (world.caption(scenes[0], "relation", [0, 1]), world.caption(scenes[1], "relation", [1, 0]))
        )
    while True:
        first, second = _cast(rng, 2)
        if not world.held_out(second.colour, first.shape) and not world.held_out(first.colour, second.shape):
            break
    scene = _stage(rng, [first, second])
    a, b = scene.objects
    scenes = (scene, replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour))))
    return Pair("attribute", scenes, _described(scenes, "list"))


KINDS: dict[str, Callable[[int, int], Pair]] = {
    "mmvp": mmvp_pair,
    "winoground": winoground_quad,
    "naturalbench": naturalbench_group,
}


@dataclass(frozen=True)
class TwinsDataset(IndexedDataset):
    """The images of `count` pairs, a and b in turn; ``shapes-mmvp:90`` on the command line.

    A sample has the caption that is true of it; `pair` gives both.

    >>> dataset = TwinsDataset("mmvp", 9)
    >>> len(dataset), dataset[3].id, dataset[3].labels["pattern"]
    (18, 'shapes-mmvp-0-000001-b', 'presence')
    """

    kind: str
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Twins of {self.kind!r} are not drawn; choose one of {', '.join(KINDS)}.")

    @property
    def name(self) -> str:
        return f"shapes-{self.kind}-{self.seed}"

    @property
    def spec(self) -> str:
        return f"shapes-{self.kind}:{self.count}?seed={self.seed}"

    def __len__(self) -> int:
        return 2 * self.count

    def pair(self, index: int) -> Pair:
        """Pair `index`, whose images are samples 2 * index and 2 * index + 1."""
        return KINDS[self.kind](self.seed, index)

    def sample(self, index: int) -> Sample:
        number, image = divmod(index, 2)
        pair = self.pair(number)
        scene = pair.scenes[image]
        return Sample(
            id=f"{self.name}-{number:06d}-{'ab'[image]}",
            load=lambda: world.picture(scene),
            masks=lambda: world.render(scene)[1],
            captions=(pair.captions[image],),
            labels={"pattern": pair.pattern, "pair": number, "side": "ab"[image]},
            questions=pair.questions[image],
            objects=tuple(vars(o) for o in scene.objects),
        )

    def content(self) -> Iterator[bytes]:
        """The parameters and one pair of each pattern: the fingerprint changes when the drawing code or the words do."""
        yield repr(self).encode()
        for pair in map(partial(KINDS[self.kind], self.seed), range(len(PATTERNS))):
            yield repr(pair).encode()
            for scene in pair.scenes:
                yield world.render(scene)[0].tobytes()
