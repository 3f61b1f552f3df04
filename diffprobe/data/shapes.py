"""The drawn world: scenes of one to four objects whose truth is known to the pixel.

A scene is a pure function of (seed, split, index).  Coordinates are fractions of the image's side, x to
the right and y downwards.  Masks are silhouettes: a hollow square's mask includes its inside.

The invariant that the probes rest on: what is drawn, what is said and what is asked all come from the
same `Scene`, so a caption can be incomplete but never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from diffprobe.data.samples import Caption, Span

SIDE = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (245, 225, 30),
    "green": (34, 139, 34),
    "cyan": (40, 215, 225),
    "blue": (30, 64, 220),
    "purple": (128, 30, 160),
    "pink": (255, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "arrow", "wedge")
DIRECTED = ("arrow", "wedge")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
}
FILLS = ("filled", "hollow", "striped", "dotted")
FILL_SHARES = (0.55, 0.15, 0.15, 0.15)  # how often each is drawn: an outline says less of its shape than a filled one
# Radii.  Of the embedded model's latents (16 x 16) half the side is the paper's main level, U-L1: there a small object
# covers 2 x 2 cells and a large one 3 x 3.
SIZES: dict[str, tuple[float, float]] = {"small": (0.130, 0.145), "large": (0.195, 0.210)}
LETTERS: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    # strokes (x0, y0, x1, y1) in a box from -1 to 1
    "A": ((-0.8, 1, 0, -1), (0, -1, 0.8, 1), (-0.45, 0.3, 0.45, 0.3)),
    "H": ((-0.7, -1, -0.7, 1), (0.7, -1, 0.7, 1), (-0.7, 0, 0.7, 0)),
    "L": ((-0.6, -1, -0.6, 1), (-0.6, 1, 0.7, 1)),
    "T": ((-0.8, -1, 0.8, -1), (0, -1, 0, 1)),
    "X": ((-0.8, -1, 0.8, 1), (-0.8, 1, 0.8, -1)),
    "Z": ((-0.7, -1, 0.7, -1), (0.7, -1, -0.7, 1), (-0.7, 1, 0.7, 1)),
}
MARKS = ("none", "dot", *LETTERS)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    # of an object, by its field's name, with every value
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "fill": FILLS,
    "size": tuple(SIZES),
    "direction": tuple(DIRECTIONS),
    "mark": MARKS,
}
TONES: dict[str, tuple[int, int, int]] = {"dark": (62, 62, 66), "grey": (138, 136, 132), "light": (216, 214, 208)}
TEXTURES = ("plain", "grainy", "lined")
RELATIONS: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "test", "compositional")
COUNT_WORDS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Obj:
    """One drawn object; `x`, `y` its centre and `radius` its half-extent, in image sides."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    fill: str = "filled"
    direction: str = "up"
    mark: str = "none"

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects on a background; `texture_seed` fixes the background's noise, `angle` its gradient."""

    objects: tuple[Obj, ...]
    tone: str = "grey"
    texture: str = "plain"
    angle: float = 0.0
    texture_seed: int = 0
    zoom: float = 1.0


def held_out(colour: str, shape: str) -> bool:
    """Whether a colour-shape pair is kept for the compositional split: 8 of 64, each word once.

    >>> sum(held_out(c, s) for c in COLOURS for s in SHAPES)
    8
    """
    return (list(COLOURS).index(colour) + 3 * SHAPES.index(shape)) % 8 == 5


def relation(a: Obj, b: Obj) -> str | None:
    """Where `a` is as seen from `b`, when one axis clearly dominates; None when it is diagonal.

    >>> relation(Obj("circle", "red", "small", 0.2, 0.5, 0.1), Obj("star", "blue", "small", 0.8, 0.6, 0.1))
    'left of'
    """
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.5 * abs(dy) and abs(dx) > 0.15:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx) and abs(dy) > 0.15:
        return "above" if dy < 0 else "below"
    return None


# --- drawing scenes at random ---------------------------------------------------------------------


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream that belongs to one scene; splits have streams of their own."""
    if split not in SPLITS:
        raise ValueError(f"Split {split!r} is not one of {', '.join(SPLITS)}.")
    return np.random.default_rng([seed, SPLITS.index(split), index])


def random_pair(rng: np.random.Generator) -> tuple[str, str]:
    """A (colour, shape) that is not held out, uniform over the 56 that remain."""
    while True:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if not held_out(colour, shape):
            return colour, shape


PLACING_ATTEMPTS = 2000


def place(rng: np.random.Generator, radii: Sequence[float], clear_axis: bool = False) -> list[tuple[float, float]]:
    """Centres for discs of these radii, apart from each other and inside the image.

    Args:
        clear_axis: For two discs: one lies clearly beside, above or below the other.

    Raises:
        ValueError: no place was found in `PLACING_ATTEMPTS` attempts.

    >>> place(np.random.default_rng(0), [0.4, 0.4])
    Traceback (most recent call last):
    ...
    ValueError: Objects of radii 0.40, 0.40 do not fit into the image apart from each other.
    """
    margins = [radius + 0.01 for radius in radii]
    if max(margins) < 0.5:
        for _ in range(PLACING_ATTEMPTS):
            centres: list[tuple[float, float]] = []
            for radius, margin in zip(radii, margins, strict=True):
                for x, y in rng.uniform(margin, 1 - margin, (12, 2)).tolist():
                    if all(math.hypot(x - u, y - v) > radius + r + 0.02 for (u, v), r in zip(centres, radii, strict=False)):
                        centres.append((x, y))
                        break
                else:
                    break
            if len(centres) < len(radii):
                continue
            if clear_axis:
                dx, dy = abs(centres[0][0] - centres[1][0]), abs(centres[0][1] - centres[1][1])
                if max(dx, dy) < 1.6 * min(dx, dy):
                    continue
            return centres
    raise ValueError(
        f"Objects of radii {', '.join(f'{radius:.2f}' for radius in radii)} do not fit into the image apart from each other."
    )


def random_object(rng: np.random.Generator, pair: tuple[str, str], size: str, **given: object) -> Obj:
    """An object of this colour and shape with its other attributes drawn at random; place it afterwards."""
    colour, shape = pair
    low, high = SIZES[size]
    mark = "none"
    if size == "large":  # a letter on a small object could not be read
        mark = str(rng.choice(["none", "dot", str(rng.choice(list(LETTERS)))]))
    attributes: dict[str, object] = {
        "radius": float(rng.uniform(low, high)),
        "fill": str(rng.choice(FILLS, p=FILL_SHARES)),
        "direction": str(rng.choice(list(DIRECTIONS))),
        "mark": mark,
    }
    return Obj(shape=shape, colour=colour, size=size, x=0.5, y=0.5, **{**attributes, **given})  # type: ignore[arg-type]


def random_scene(seed: int, index: int, split: str = "train", n_objects: int | None = None) -> Scene:
    """Scene `index` of a split: 1-4 objects with equal chance, a fifth of the larger scenes all alike.

    Objects of one scene differ in their (colour, shape), so that "the red star" names one object,
    except in the scenes that are all alike ("three red stars").
    """
    rng = scene_rng(seed, split, index)
    count = int(rng.integers(1, 5)) if n_objects is None else n_objects
    kept = [(c, s) for c in COLOURS for s in SHAPES if held_out(c, s)]
    pairs = [kept[int(rng.integers(len(kept)))] if split == "compositional" else random_pair(rng)]
    alike = count > 1 and rng.random() < 0.2
    while len(pairs) < count:
        pair = pairs[0] if alike else random_pair(rng)
        if alike or pair not in pairs:
            pairs.append(pair)
    sizes = [str(rng.choice(list(SIZES))) for _ in pairs]
    objects = [random_object(rng, pair, size) for pair, size in zip(pairs, sizes, strict=True)]
    if alike:
        objects = [replace(o, fill=objects[0].fill, direction=objects[0].direction) for o in objects]
    try:
        centres = place(rng, [o.radius for o in objects], clear_axis=count == 2)
    except ValueError:  # four objects of nearly the largest radius: about one scene in 100,000
        objects = [replace(o, radius=SIZES[o.size][0]) for o in objects]
        centres = place(rng, [o.radius for o in objects], clear_axis=count == 2)
    objects = [replace(o, x=x, y=y) for o, (x, y) in zip(objects, centres, strict=True)]
    return Scene(
        objects=tuple(objects),
        tone=str(rng.choice(list(TONES))),
        texture=str(rng.choice(TEXTURES)),
        angle=float(rng.uniform(0, 2 * np.pi)),
        texture_seed=int(rng.integers(2**31)),
    )


# --- drawing pixels -------------------------------------------------------------------------------


def _half_planes(u: np.ndarray, v: np.ndarray, corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Signed distance (negative inside) to a convex polygon given clockwise on screen."""
    distance = np.full(np.broadcast_shapes(u.shape, v.shape), -np.inf, np.float32)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = np.hypot(x1 - x0, y1 - y0)
        distance = np.maximum(distance, ((y1 - y0) * (u - x0) - (x1 - x0) * (v - y0)) / length)
    return distance


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _silhouette(shape: str, u: np.ndarray, v: np.ndarray, direction: str) -> np.ndarray:
    """Approximate signed distance to a unit shape at points (u, v), negative inside, in radii."""
    dx, dy = DIRECTIONS[direction]
    along, across = dx * u + dy * v, -dy * u + dx * v  # along the direction, and to its side
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "square":
        return _box(u, v, 0.82, 0.82)
    if shape == "triangle":
        return _half_planes(u, v, ((0.0, -0.95), (0.98, 0.78), (-0.98, 0.78)))
    if shape == "diamond":
        return _half_planes(u, v, ((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)))
    if shape == "cross":
        return np.minimum(_box(u, v, 0.95, 0.32), _box(u, v, 0.32, 0.95))
    if shape == "star":
        sector = 2 * np.pi / 5
        radius = np.hypot(u, v)
        angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)  # folded onto one half-point
        px, py = radius * np.sin(angle), radius * np.cos(angle)
        ix, iy = 0.45 * np.sin(sector / 2), 0.45 * np.cos(sector / 2)
        length = np.hypot(ix, 1 - iy)
        return (px * (1 - iy) + (py - 1) * ix) / length
    if shape == "arrow":
        head = np.maximum(-along, 0.77 * (np.abs(across) - 0.85 * (1 - along)))
        return np.minimum(head, _box(along + 0.45, across, 0.5, 0.28))
    if shape == "wedge":  # a slice whose tip points in the direction
        slice_ = 0.82 * np.abs(across) - 0.57 * (0.95 - along)
        return np.maximum(slice_, np.hypot(along - 0.95, across) - 1.75)
    raise ValueError(f"Shape {shape!r} is not one of {', '.join(SHAPES)}.")


def _coverage(distance: np.ndarray, pixels: float) -> np.ndarray:
    """How much of each pixel lies inside, from a signed distance in radii and a radius in pixels."""
    return np.clip(0.5 - distance * pixels, 0.0, 1.0)


def _pattern(obj: Obj, distance: np.ndarray, u: np.ndarray, v: np.ndarray, pixels: float) -> np.ndarray:
    """The object's paint: its silhouette, or an outline with stripes or dots inside it."""
    body = _coverage(distance, pixels)
    if obj.fill == "filled":
        return body
    outline = body - _coverage(distance + (0.22 if obj.size == "large" else 0.34), pixels)
    if obj.fill == "hollow":
        return outline
    if obj.fill == "striped":
        wave = np.abs(((u + v) * (1.25 if obj.size == "large" else 0.85)) % 1.0 - 0.5) - 0.27
        inside = _coverage(wave * 0.6, pixels)
    else:
        step = 0.5 if obj.size == "large" else 0.72
        inside = _coverage(np.hypot((u + step / 2) % step - step / 2, (v + step / 2) % step - step / 2) - 0.15, pixels)
    return np.maximum(outline * 0.999, body * inside)


def _draw_mark(patch: np.ndarray, obj: Obj, u: np.ndarray, v: np.ndarray, pixels: float) -> None:
    """Paint the object's mark onto its patch, in place: a dark dot or letter with a white rim, so that it shows on any colour."""
    if obj.mark == "dot":
        distance, stroke, rim = np.hypot(u, v).astype(np.float32), 0.24, 0.10
    else:
        distance, stroke, rim = np.full(np.broadcast_shapes(u.shape, v.shape), np.inf, np.float32), 0.10, 0.12
        for x0, y0, x1, y1 in (np.array(s) * 0.40 for s in LETTERS[obj.mark]):
            ex, ey = x1 - x0, y1 - y0
            part = np.clip(((u - x0) * ex + (v - y0) * ey) / (ex * ex + ey * ey), 0, 1)
            distance = np.minimum(distance, np.hypot(u - x0 - part * ex, v - y0 - part * ey))
    for reach, grey in ((stroke + rim, 250), (stroke, 20)):
        patch += _coverage(distance - reach, pixels)[..., None] * (np.float32(grey) - patch)


def _background(scene: Scene, side: int) -> np.ndarray:
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    ramp = np.cos(scene.angle) * grid[None, :] + np.sin(scene.angle) * grid[:, None]
    shade = 14 * ramp
    if scene.texture == "lined":
        shade = shade + 5 * np.sign(
            np.sin(2 * np.pi * 8 * (grid[None, :] * np.sin(scene.angle) - grid[:, None] * np.cos(scene.angle)))
        )
    elif scene.texture == "grainy":
        noise = np.random.default_rng(scene.texture_seed).standard_normal((16, 16), np.float32)
        shade = shade + 5 * noise.repeat(-(-side // 16), 0).repeat(-(-side // 16), 1)[:side, :side]
    return shade[..., None] + np.array(TONES[scene.tone], np.float32)


def render(scene: Scene, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        The image (y, x, 3) uint8 and the masks (object, y, x) bool, silhouettes that never overlap.

    >>> image, masks = render(random_scene(0, 0))
    >>> image.shape, image.dtype.name, masks.shape[1:]
    ((128, 128, 3), 'uint8', (128, 128))
    """
    canvas = _background(scene, side)
    masks = np.zeros((len(scene.objects), side, side), bool)
    for index, obj in enumerate(scene.objects):
        pixels = obj.radius * scene.zoom * side
        cx, cy = ((0.5 + (p - 0.5) * scene.zoom) * side for p in (obj.x, obj.y))
        x0, x1 = max(0, int(cx - pixels - 2)), min(side, int(cx + pixels + 3))
        y0, y1 = max(0, int(cy - pixels - 2)), min(side, int(cy + pixels + 3))
        u = ((np.arange(x0, x1, dtype=np.float32) + 0.5 - cx) / pixels)[None, :]
        v = ((np.arange(y0, y1, dtype=np.float32) + 0.5 - cy) / pixels)[:, None]
        distance = np.asarray(_silhouette(obj.shape, u, v, obj.direction), np.float32)
        paint = _pattern(obj, distance, u, v, pixels)[..., None]
        patch = canvas[y0:y1, x0:x1]
        patch += paint * (np.array(COLOURS[obj.colour], np.float32) - patch)
        if obj.mark != "none":
            _draw_mark(patch, obj, u, v, pixels)
        masks[index, y0:y1, x0:x1] = distance < 0
    return np.clip(canvas, 0, 255).astype(np.uint8), masks


def picture(scene: Scene) -> Image.Image:
    """The drawing as an image that carries its scene in `info`, for whoever needs the truth behind the pixels."""
    image = Image.fromarray(render(scene)[0])
    image.info["scene"] = scene
    return image


def truth_grid(scene: Scene | None, cells: int) -> np.ndarray:
    """(channel, cells, cells): each object's attributes one-hot in the cell of its centre, with the centre's place.

    Channels: presence, x, y, zoom, then every value of `ATTRIBUTES`.  Of no scene, as of a
    photograph or a blank image, nothing is known.

    >>> truth_grid(random_scene(0, 0, n_objects=2), 8).shape
    (38, 8, 8)
    """
    grid = np.zeros((4 + sum(map(len, ATTRIBUTES.values())), cells, cells), np.float32)
    if scene is None:
        return grid
    for obj in scene.objects:
        x, y = (0.5 + (place - 0.5) * scene.zoom for place in (obj.x, obj.y))
        cell = grid[:, min(cells - 1, int(y * cells)), min(cells - 1, int(x * cells))]
        cell[:4] = 1, x, y, scene.zoom
        start = 4
        for name, options in ATTRIBUTES.items():
            cell[start + options.index(getattr(obj, name))] = 1
            start += len(options)
    return grid


# --- saying what is there -------------------------------------------------------------------------


class _Writer:
    """Builds a sentence and notes where the words for each object stand."""

    def __init__(self) -> None:
        self.text = ""
        self.spans: list[Span] = []

    def say(self, words: str, objects: tuple[int, ...] = (), role: str | None = None) -> None:
        if self.text and not words.startswith((",", ":")):
            self.text += " "
        start = len(self.text)
        self.text += words
        if role is not None:
            self.spans.append(Span(start, len(self.text), objects, role))

    def caption(self, style: str) -> Caption:
        return Caption(self.text, tuple(self.spans), style)


def _say_object(writer: _Writer, obj: Obj, index: int, detail: str) -> None:
    """A noun phrase; `detail` is "short" (colour, shape), "web" (adds size, fill) or "full" (adds the rest)."""
    adjectives: list[tuple[str, str | None]] = [(obj.colour, "colour")]
    if detail != "short":
        adjectives = [(obj.size, None), (obj.fill, None), *adjectives]
    writer.say("an" if adjectives[0][0][0] in "aeiou" else "a")
    start = len(writer.text) + 1
    for word, role in adjectives:
        writer.say(word, (index,), role)
    writer.say(obj.shape, (index,), "noun")
    if detail == "full":
        if obj.shape in DIRECTED:
            writer.say(f"pointing {obj.direction}")
        if obj.mark == "dot":
            writer.say("with a dot")
        elif obj.mark != "none":
            writer.say(f"with the letter {obj.mark}")
    writer.spans.append(Span(start, len(writer.text), (index,), "phrase"))


def _say_list(writer: _Writer, scene: Scene, order: list[int], detail: str, places: bool = False) -> None:
    for position, index in enumerate(order):
        if position:
            writer.say("and" if position == len(order) - 1 else ",")
        _say_object(writer, scene.objects[index], index, detail)
        if places:
            writer.say(place_words(scene.objects[index]))


def place_words(obj: Obj) -> str:
    """Where an object is, in words of a 3 x 3 grid.

    >>> place_words(Obj("star", "red", "small", 0.1, 0.9, 0.1))
    'at the bottom left'
    """
    row = ("top", "", "bottom")[min(2, int(obj.y * 3))]
    column = ("left", "", "right")[min(2, int(obj.x * 3))]
    return f"at the {row} {column}".replace("  ", " ").strip() if row or column else "in the middle"


def facts(obj: Obj) -> dict[str, str]:
    """Everything that can be said of an object, by attribute, in the order in which a sentence has it.

    >>> facts(Obj("star", "red", "small", 0.1, 0.9, 0.1))
    {'size': 'small', 'fill': 'filled', 'colour': 'red', 'shape': 'star', 'place': 'at the bottom left'}
    """
    found = {"size": obj.size, "fill": obj.fill, "colour": obj.colour, "shape": obj.shape}
    found |= {"direction": obj.direction} if obj.shape in DIRECTED else {}
    found |= {"mark": obj.mark} if obj.mark != "none" else {}
    return found | {"place": place_words(obj)}


def said(known: Mapping[str, str], keys: Container[str]) -> str:
    """Some of an object's `facts` as part of a sentence.

    >>> said(facts(Obj("star", "red", "small", 0.1, 0.9, 0.1)), ("place", "size"))
    'small at the bottom left'
    """
    forms = {"direction": "pointing {}", "mark": "with a dot" if known.get("mark") == "dot" else "with the letter {}"}
    return " ".join(forms.get(key, "{}").format(value) for key, value in known.items() if key in keys)


def all_alike(scene: Scene) -> bool:
    """Whether the scene's objects share one colour and one shape ("three red stars")."""
    return len(scene.objects) > 1 and len({o.pair for o in scene.objects}) == 1


def _say_plural(writer: _Writer, scene: Scene, count: str) -> None:
    everyone = tuple(range(len(scene.objects)))
    writer.say(count)
    writer.say(scene.objects[0].colour, everyone, "colour")
    plural = {"cross": "crosses"}.get(scene.objects[0].shape, scene.objects[0].shape + "s")
    writer.say(plural, everyone, "noun")


CAPTION_STYLES = ("relation", "list", "full", "place", "count", "web", "partial")


def caption(scene: Scene, style: str, order: list[int] | None = None) -> Caption:
    """Describe a scene in one of `CAPTION_STYLES`.

    "relation" says where the first named object is, seen from the second (a plain list where that is
    diagonal or there is one object); "full" gives every attribute; "web" leaves out what captions
    on the web leave out: orientation, marks, position and counts above two; "partial" names one object.

    Args:
        order: in which order objects are named; as drawn by default.
    """
    writer = _Writer()
    order = list(range(len(scene.objects))) if order is None else order
    first = scene.objects[order[0]]
    named = relation(first, scene.objects[order[1]]) if len(order) > 1 else None
    if style not in CAPTION_STYLES:
        raise ValueError(f"Caption style {style!r} is not one of {', '.join(CAPTION_STYLES)}.")
    detail = style if style in ("web", "full") else "short"
    if style == "partial":
        writer.say("there is")
        _say_object(writer, first, order[0], "short")
    elif all_alike(scene):
        few = "two" if len(order) == 2 else "several"
        _say_plural(writer, scene, few if style == "web" else COUNT_WORDS[len(order)])
    elif named is not None and (style == "relation" or (style == "full" and len(order) == 2)):
        _say_object(writer, first, order[0], detail)
        for word, index in zip([named, *["and"] * len(order)], order[1:], strict=False):
            writer.say(word)
            _say_object(writer, scene.objects[index], index, detail)
    else:
        if style == "count":
            writer.say(f"a picture of {COUNT_WORDS[len(order)]} object{'s' if len(order) > 1 else ''}")
            writer.say(":")
        _say_list(writer, scene, order, detail, places=style == "place")
    if detail != "short":
        writer.say("on a")
        writer.say(f"{scene.tone} background", (), "background")
    return writer.caption(style)
