"""The drawn world: repeatable scenes, separate splits, masks and words that say what is drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from diffprobe.data import ShapesDataset, shapes
from diffprobe.data.shapes import (
    CAPTION_STYLES,
    COLOURS,
    SHAPES,
    SIZES,
    SPLITS,
    Obj,
    Scene,
    caption,
    held_out,
    place,
    random_scene,
    render,
    scene_rng,
)

SCENES = [random_scene(0, index, split) for split in SPLITS for index in range(60)]


# --- scenes ---------------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    for split in SPLITS:
        assert random_scene(3, 7, split) == random_scene(3, 7, split)
    assert np.array_equal(render(random_scene(3, 7))[0], render(random_scene(3, 7))[0])
    assert len({random_scene(s, i) for s in range(3) for i in range(3)}) == 9


def test_splits_never_share_a_scene() -> None:
    everything = {
        split: {random_scene(seed, index, split) for seed in range(2) for index in range(120)}
        | {random_scene(seed, index, split, n_objects=2) for seed in range(2) for index in range(40)}
        for split in SPLITS
    }
    assert all(len(scenes) == 320 for scenes in everything.values())
    assert len(set().union(*everything.values())) == 320 * len(SPLITS)


def test_streams_differ_between_splits() -> None:
    draws = {scene_rng(seed, split, index).random() for seed in range(4) for split in SPLITS for index in range(50)}
    assert len(draws) == 4 * len(SPLITS) * 50
    with pytest.raises(ValueError, match="'dev' is not one of train, validation, test, compositional"):
        scene_rng(0, "dev", 0)


def test_the_compositional_split_holds_out_pairs_but_no_word() -> None:
    trained = {o.pair for i in range(600) for o in random_scene(0, i).objects}
    assert not any(held_out(*pair) for pair in trained) and len(trained) == 56
    assert {c for c, _ in trained} == set(COLOURS) and {s for _, s in trained} == set(SHAPES)
    tested = [random_scene(0, i, "compositional") for i in range(200)]
    assert all(any(held_out(*o.pair) for o in scene.objects) for scene in tested)
    assert len({scene.objects[0].pair for scene in tested}) == 8


def test_objects_cover_cells_of_the_main_site() -> None:
    """Of the embedded model's 16 x 16 latents half the side is U-L1: two cells across when small, three when large."""
    cells = 8
    for name, least in (("small", 2), ("large", 3)):
        assert 2 * SIZES[name][0] * cells >= least
    for scene in SCENES:
        for one in scene.objects:
            assert one.radius <= one.x <= 1 - one.radius and one.radius <= one.y <= 1 - one.radius
            for other in scene.objects:
                assert one is other or np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_placing_ends_where_nothing_fits() -> None:
    rng = np.random.default_rng(0)
    for radii in ([0.3, 0.3, 0.3], [0.6], [0.26] * 4):
        with pytest.raises(ValueError, match="do not fit into the image apart from each other"):
            place(rng, radii)
    assert len(place(rng, [0.21] * 4)) == 4, "four large objects nearly always find a place"


def test_a_scene_whose_objects_find_no_place_has_the_smallest_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scene in some 100,000; a dataset of that many images must not end there."""
    smallest = {size: low for size, (low, _) in SIZES.items()}

    def unlucky(rng: np.random.Generator, radii: Sequence[float], clear_axis: bool = False) -> list[tuple[float, float]]:
        if set(radii) - set(smallest.values()):
            raise ValueError("no place")
        return place(rng, radii, clear_axis)

    before = [random_scene(0, index, n_objects=4) for index in range(20)]
    monkeypatch.setattr(shapes, "place", unlucky)
    for index, lucky in enumerate(before):
        scene = random_scene(0, index, n_objects=4)
        assert [o.pair for o in scene.objects] == [o.pair for o in lucky.objects]
        assert all(o.radius == smallest[o.size] for o in scene.objects)


# --- pixels ---------------------------------------------------------------------------------------


def test_masks_match_what_is_drawn() -> None:
    for scene in SCENES[::3]:
        plain = replace(scene, objects=tuple(replace(o, fill="filled", mark="none") for o in scene.objects))
        image, masks = render(plain)
        empty, _ = render(replace(plain, objects=()))
        change = image.astype(float) - empty
        for obj, mask in zip(plain.objects, masks, strict=True):
            x, y, reach = int(128 * obj.x), int(128 * obj.y), int(128 * obj.radius) + 3
            near = np.s_[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            full = np.array(COLOURS[obj.colour], float) - empty[near]
            # how much of each pixel has the object's colour, from the picture alone
            cover = (change[near] * full).sum(-1) / (full**2).sum(-1)
            own = mask[near] | ~masks.any(0)[near]  # leaves out its neighbours
            wrong = own & (mask[near] != (cover > 0.5))
            assert not (wrong & (np.abs(cover - 0.5) > 0.03)).any()  # 0.03: colours are whole numbers
            assert mask.sum() == mask[near].sum() > 40


def test_masks_are_silhouettes_that_never_overlap() -> None:
    for scene in SCENES:
        _, masks = render(scene)
        assert masks.sum(0).max() == 1 and masks.any((1, 2)).all()
        hollow = replace(scene, objects=tuple(replace(o, fill="hollow", mark="none") for o in scene.objects))
        assert np.array_equal(render(hollow)[1], masks)


def test_every_attribute_changes_the_picture() -> None:
    obj = Obj("arrow", "red", "large", 0.5, 0.5, 0.18)
    edits = [{}, {"fill": "hollow"}, {"fill": "striped"}, {"fill": "dotted"}, {"direction": "left"}, {"mark": "dot"}]
    edits += [{"mark": "A"}, {"mark": "H"}, {"shape": "wedge"}, {"colour": "blue"}, {"radius": 0.09}, {"x": 0.3}]
    pictures = {render(Scene((replace(obj, **edit),)))[0].tobytes() for edit in edits}  # type: ignore[arg-type]
    assert len(pictures) == len(edits)


# --- words: a reader that knows nothing of the writer ----------------------------------------------

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
ONE = re.compile(
    r"\ban? (?:(?P<size>small|large) (?P<fill>filled|hollow|striped|dotted) )?(?P<colour>"
    + "|".join(COLOURS)
    + ") (?P<shape>"
    + "|".join(SHAPES)
    + r")\b(?: pointing (?P<direction>\w+))?(?: with (?:a (?P<dot>dot)|the letter (?P<letter>[A-Z])))?"
    + r"(?: (?:at the (?P<place>(?:top|bottom)?(?: ?(?:left|right))?)|in the (?P<middle>middle)))?"
)
MANY = re.compile(rf"\b(two|three|four|several) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})e?s\b")


def agrees(said: re.Match[str], obj: Obj) -> bool:
    """Whether everything that a noun phrase says is so of an object."""
    words = said.groupdict()
    if any(words[key] not in (None, getattr(obj, key)) for key in ("size", "fill", "colour", "shape", "direction")):
        return False
    if (words["dot"] and obj.mark != "dot") or (words["letter"] and obj.mark != words["letter"]):
        return False
    row, column = (
        ("top" if obj.y < 1 / 3 else "bottom" if obj.y >= 2 / 3 else ""),
        ("left" if obj.x < 1 / 3 else "right" if obj.x >= 2 / 3 else ""),
    )
    if words["middle"]:
        return not row and not column
    return words["place"] is None or words["place"].split() == [word for word in (row, column) if word]


def lies(text: str, scene: Scene) -> str | None:
    """What is wrong with a caption, or None; every word must be understood."""
    rest, named = text, []
    if many := MANY.search(rest):
        number, colour, shape = many.groups()
        count = len(scene.objects)
        if any(o.pair != (colour, shape) for o in scene.objects) or (
            count < 3 if number == "several" else count != NUMBERS[number]
        ):
            return "plural"
        rest = rest.replace(many.group(), "")
    for said in ONE.finditer(rest):
        fitting = [o for o in scene.objects if agrees(said, o) and o not in named]
        if not fitting:
            return f"no {said.group()!r}"
        named.append(fitting[0])
    between = ONE.split(rest)
    rest = ONE.sub("#", rest)
    if where := re.search(r"# (left of|right of|above|below) #", rest):
        first, second = named[:2]
        dx, dy = first.x - second.x, first.y - second.y
        seen = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        if where[1] != seen:
            return f"{where[1]}, not {seen}"
        rest = rest.replace(where[0], "# #", 1)
    if tone := re.search(r"on a (\w+) background$", rest):
        if tone[1] != scene.tone:
            return "background"
        rest = rest.replace(tone[0], "")
    if number_of := re.search(r"a picture of (\w+) objects?:", rest):
        if NUMBERS[number_of[1]] != len(scene.objects):
            return "count"
        rest = rest.replace(number_of[0], "")
    if not many and not rest.startswith("there is") and len(named) != len(scene.objects):
        return f"{len(named)} objects named"
    left = re.sub(r"#|there is|\band\b|,|\s", "", rest)
    return f"not understood: {left!r} in {between!r}" if left else None


@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_every_caption_is_true_of_its_scene(style: str) -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES:
        order = [int(i) for i in rng.permutation(len(scene.objects))]
        for said in (caption(scene, style), caption(scene, style, order)):
            assert lies(said.text, scene) is None, f"{said.text!r}: {lies(said.text, scene)}"


def test_the_reader_finds_lies() -> None:
    scene = Scene(
        (Obj("star", "red", "small", 0.2, 0.5, 0.09), Obj("arrow", "blue", "large", 0.8, 0.5, 0.17, direction="left"))
    )
    assert lies("a red star left of a blue arrow", scene) is None
    for false in (
        "a red star right of a blue arrow",
        "a blue star and a red arrow",
        "a red star",
        "two red stars",
        "a picture of three objects: a red star and a blue arrow",
        "a large filled red star and a large filled blue arrow on a grey background",
        "a small filled red star left of a large filled blue arrow pointing up on a grey background",
        "a red star at the top and a blue arrow at the right",
        "a small filled red star and a large filled blue arrow on a dark background",
        "a red star and a blue arrow dancing",
    ):
        assert lies(false, scene), false


def test_full_captions_leave_nothing_out() -> None:
    for scene in SCENES:
        text = caption(scene, "full").text
        if MANY.search(text):
            continue
        assert all(o.size in text and o.fill in text and o.shape in text for o in scene.objects)
        assert text.count("pointing") == sum(o.shape in ("arrow", "wedge") for o in scene.objects)
        assert text.count(" with ") == sum(o.mark != "none" for o in scene.objects)


def test_web_captions_leave_out_what_the_web_leaves_out() -> None:
    hidden = re.compile(r"pointing|with|left|right|above|below|top|bottom|middle|three|four")
    assert not any(hidden.search(caption(scene, "web").text) for scene in SCENES)


@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_spans_cover_their_words(style: str) -> None:
    for scene in SCENES:
        said = caption(scene, style)
        for span in said.spans:
            words = said.text[span.start : span.end]
            objects = [scene.objects[i] for i in span.objects]
            before, after = said.text[: span.start][-1:], said.text[span.end :][:1]
            assert before in ("", " ") and after in ("", " ", ",", ":") and words == words.strip()
            if span.role == "noun":
                plural = len(objects) > 1
                assert objects and all(re.fullmatch(o.shape + ("e?s" if plural else ""), words) for o in objects)
            elif span.role == "colour":
                assert objects and all(o.colour == words for o in objects)
            elif span.role == "phrase":
                (obj,) = objects
                assert f"{obj.colour} {obj.shape}" in words and sum(words.count(c) for c in COLOURS) == 1
            else:
                assert span.role == "background" and words == f"{scene.tone} background" and not objects
        named = {i for span in said.spans if span.role == "noun" for i in span.objects}
        assert named == ({0} if style == "partial" else set(range(len(scene.objects))))


# --- the dataset ----------------------------------------------------------------------------------


def test_samples_carry_the_whole_truth() -> None:
    dataset = ShapesDataset(5, "test", seed=2, n_objects=2)
    sample = dataset[4]
    assert sample.id == "shapes-test-2-n2-000004" and len(dataset) == 5
    assert sample.load().size == (128, 128) and sample.masks().shape == (2, 128, 128)
    assert sample.labels["colour"] == sample.objects[0]["colour"] and sample.labels["n_objects"] == 2
    assert sample.questions and all(q.category != "count" for q in sample.questions)
    assert any(q.category == "count" for q in ShapesDataset(1)[0].questions)
    with pytest.raises(IndexError, match="Sample 5 of a dataset of 5"):
        dataset[5]


def test_fingerprints_tell_datasets_apart() -> None:
    variants = [
        ShapesDataset(5),
        ShapesDataset(6),
        ShapesDataset(5, "test"),
        ShapesDataset(5, seed=1),
        ShapesDataset(5, n_objects=1),
    ]
    assert len({v.fingerprint() for v in variants}) == len(variants)
    assert ShapesDataset(5).fingerprint() == variants[0].fingerprint()
