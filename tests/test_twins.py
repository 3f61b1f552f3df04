"""Twins of benchmarks: pairs that differ in one thing, which words and questions tell apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from diffprobe.data import iterate
from diffprobe.data.samples import Dataset
from diffprobe.data.shapes import SPLITS, Scene, held_out, random_scene, render, scene_rng
from diffprobe.data.twins import KINDS, PATTERNS, Pair, TwinsDataset, mmvp_pair, naturalbench_group, twin_rng, winoground_quad

NUMBERS = ("zero", "one", "two", "three", "four")
# what may differ between the two scenes of a pair
CHANGES = {
    "orientation": {"0.direction"},
    "presence": {"objects"},
    "state": {"0.fill"},
    "quantity": {"objects"},
    "position": {"0.x", "0.y", "1.x", "1.y"},
    "colour": {"0.colour"},
    "structure": {"0.fill"},
    "text": {"0.mark"},
    "viewpoint": {"zoom"},
    "attribute": {"0.colour", "1.colour"},
    "relation": {"0.x", "0.y", "1.x", "1.y"},
}


def changes(a: Scene, b: Scene) -> set[str]:
    """The names of everything that differs between two scenes."""
    found = {key for key in asdict(a) if key != "objects" and getattr(a, key) != getattr(b, key)}
    if len(a.objects) != len(b.objects):
        shorter, longer = sorted((a.objects, b.objects), key=len)
        return found | ({"objects"} if longer[:-1] == shorter else {"several objects"})
    for index, (one, other) in enumerate(zip(a.objects, b.objects, strict=True)):
        found |= {f"{index}.{key}" for key, value in vars(one).items() if vars(other)[key] != value}
    return found


def where(scene: Scene) -> str:
    a, b = scene.objects[:2]
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def fact(pattern: str, scene: Scene) -> str:
    """The words that only a caption of this scene, of the two of its pair, may have."""
    first = scene.objects[0]
    return {
        "orientation": f"{first.colour} {first.shape} pointing {first.direction}",
        "presence": f"a picture of {NUMBERS[len(scene.objects)]} object",
        "state": f"{first.fill} {first.colour} {first.shape}",
        "quantity": f"{NUMBERS[len(scene.objects)]} {first.colour} {first.shape}",
        "position": f"{first.colour} {first.shape} {where(scene) if len(scene.objects) > 1 else ''}",
        "colour": f"{first.colour} {first.shape}",
        "structure": f"{first.fill} {first.colour} {first.shape}",
        "text": f"with the letter {first.mark}",
        "viewpoint": "seen close" if scene.zoom == 1 else "seen from far away",
    }[pattern]


def answer(pattern: str, scene: Scene) -> str:
    first = scene.objects[0]
    return {
        "orientation": first.direction,
        "presence": "yes" if len(scene.objects) == 2 else "no",
        "state": first.fill,
        "quantity": NUMBERS[len(scene.objects)],
        "position": where(scene).split()[0] if len(scene.objects) > 1 else "",
        "colour": first.colour,
        "structure": first.fill,
        "text": first.mark,
        "viewpoint": "close" if scene.zoom == 1 else "from far away",
    }[pattern]


@pytest.mark.parametrize("make", [mmvp_pair, naturalbench_group, winoground_quad])
def test_scenes_differ_in_exactly_one_thing(make: Callable[[int, int], Pair]) -> None:
    for index in range(90):
        pair = make(1, index)
        found = changes(*pair.scenes)
        assert found and found <= CHANGES[pair.pattern], (pair.pattern, found)
        assert not any(held_out(*o.pair) for scene in pair.scenes for o in scene.objects)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_stay_inside_and_apart(kind: str) -> None:
    for index in range(90):
        for scene in KINDS[kind](0, index).scenes:
            assert all(o.radius < min(o.x, o.y) and max(o.x, o.y) < 1 - o.radius for o in scene.objects), index
            for a, b in combinations(scene.objects, 2):
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_only_what_differs_is_drawn_differently() -> None:
    for index in range(2 * len(PATTERNS)):
        pair = mmvp_pair(0, index)
        (image_a, masks_a), (image_b, masks_b) = (render(scene) for scene in pair.scenes)
        differing = (image_a != image_b).any(-1)
        common = min(len(masks_a), len(masks_b))
        same = [i for i in range(common) if pair.scenes[0].objects[i] == pair.scenes[1].objects[i]]
        if pair.pattern != "viewpoint":
            for i in same:
                assert not (differing & masks_a[i]).any()
            # a letter with its rim reaches a little over the arms of a cross or the points of a star
            beyond = 11 if pair.pattern == "text" else 2
            everything = binary_dilation(masks_a.any(0) | masks_b.any(0), iterations=beyond)
            assert not (differing & ~everything).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_difference_can_be_seen(kind: str) -> None:
    for index in range(126):
        pair = KINDS[kind](0, index)
        image_a, image_b = (render(scene)[0].astype(int) for scene in pair.scenes)
        assert (np.abs(image_a - image_b).max(-1) > 50).sum() >= 60, (index, pair.pattern)


def test_mmvp_patterns_take_turns() -> None:
    assert len(PATTERNS) == 9
    assert [mmvp_pair(0, i).pattern for i in range(18)] == [*PATTERNS, *PATTERNS]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_mmvp_captions_and_answers_fit_their_own_image_only(pattern: str) -> None:
    for index in range(PATTERNS.index(pattern), 270, len(PATTERNS)):
        pair = mmvp_pair(3, index)
        own = [fact(pattern, scene) for scene in pair.scenes]
        for side, caption in enumerate(pair.captions):
            assert own[side] in caption.text and own[1 - side] not in caption.text
        (a,), (b,) = pair.questions
        assert a.text == b.text and a.options == b.options == tuple(dict.fromkeys(a.options))
        assert {a.answer, b.answer} == set(a.options)
        assert [a.answer, b.answer] == [answer(pattern, scene) for scene in pair.scenes]
        if pattern != "presence":
            assert a.text.index(f" {a.options[0]}") < a.text.index(f" {a.options[1]}")


@pytest.mark.parametrize("kind", KINDS)
def test_caption_spans_cover_their_words(kind: str) -> None:
    for index in range(18):
        pair = KINDS[kind](0, index)
        for scene, caption in zip(pair.scenes, pair.captions, strict=True):
            nouns = caption.words("noun")
            assert {i for _, span in nouns for i in span.objects} == set(range(len(scene.objects)))
            assert all(word.startswith(scene.objects[i].shape) for word, span in nouns for i in span.objects)


def test_neither_side_nor_order_gives_the_answer_away() -> None:
    for pattern in range(len(PATTERNS)):
        pairs = [mmvp_pair(0, index) for index in range(pattern, 900, len(PATTERNS))]
        first = Counter(pair.questions[0][0].answer == pair.questions[0][0].options[0] for pair in pairs)
        assert 28 < first[True] < 72, PATTERNS[pattern]
    for name, word in (("state", "hollow"), ("viewpoint", "close"), ("presence", "yes")):
        pairs = [mmvp_pair(0, index) for index in range(PATTERNS.index(name), 900, len(PATTERNS))]
        assert 28 < sum(pair.questions[0][0].answer == word for pair in pairs) < 72, name


def test_distant_objects_are_told_from_close_ones() -> None:
    for index in range(PATTERNS.index("viewpoint"), 180, len(PATTERNS)):
        close, far = sorted(mmvp_pair(0, index).scenes, key=lambda scene: -scene.zoom)
        assert min(o.radius * close.zoom for o in close.objects) > max(o.radius * far.zoom for o in far.objects)


def test_winoground_captions_are_the_same_words_and_true() -> None:
    for index in range(60):
        quad = winoground_quad(2, index)
        a, b = quad.captions
        assert a.text != b.text and sorted(a.text.split()) == sorted(b.text.split())
        assert quad.pattern == ("attribute", "relation")[index % 2]
        for side, scene in enumerate(quad.scenes):
            own, other = quad.captions[side].text, quad.captions[1 - side].text
            phrases = [f"{o.colour} {o.shape}" for o in scene.objects]
            assert all(phrase in own for phrase in phrases)
            if quad.pattern == "attribute":
                assert not any(phrase in other for phrase in phrases)
            else:  # the caption names the objects in turn; the relation is of the first named to the second
                turned = own.index(phrases[0]) > own.index(phrases[1])
                opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
                assert (opposite[where(scene)] if turned else where(scene)) in own


def test_naturalbench_answers_are_opposite_and_true() -> None:
    for index in range(180):
        group = naturalbench_group(4, index)
        assert [[q.answer for q in side] for side in group.questions] == [["yes", "no"], ["no", "yes"]]
        assert [q.text for q in group.questions[0]] == [q.text for q in group.questions[1]]
        for side, scene in enumerate(group.scenes):
            asked = group.questions[0][side].text
            if group.pattern == "presence":
                assert asked.startswith("Is there a" if len(scene.objects) == 2 else "Is the ") and asked.endswith("?")
            else:
                words = {"viewpoint": fact("viewpoint", scene), "position": where(scene) if len(scene.objects) > 1 else ""}
                assert words.get(group.pattern, answer(group.pattern, scene)) in asked
                assert f" {answer(group.pattern, group.scenes[1 - side])}" not in asked


def test_twins_are_functions_of_seed_and_index() -> None:
    for make in KINDS.values():
        assert [make(0, i) for i in range(9)] == [make(0, i) for i in range(9)]
        assert len({repr(make(seed, i).scenes) for seed in range(2) for i in range(27)}) == 54


def test_streams_never_meet_those_of_the_splits() -> None:
    draws = [twin_rng(seed, kind, i).random() for seed in range(5) for kind in KINDS for i in range(40)]
    draws += [scene_rng(seed, split, i).random() for seed in range(5) for split in SPLITS for i in range(40)]
    assert len(set(draws)) == len(draws) == 5 * 40 * (len(KINDS) + len(SPLITS))
    drawn = {o for i in range(200) for o in random_scene(0, i).objects}
    assert not drawn & {o for i in range(100) for scene in mmvp_pair(0, i).scenes for o in scene.objects}


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_hold_both_images_of_every_pair(kind: str) -> None:
    dataset = TwinsDataset(kind, 9, seed=2)
    as_protocol: Dataset = dataset
    samples = list(iterate(as_protocol))
    assert len(samples) == len(dataset) == 18
    assert samples[5].id == f"shapes-{kind}-2-000002-b"
    assert [(s.labels["pair"], s.labels["side"]) for s in samples] == [(i // 2, "ab"[i % 2]) for i in range(18)]
    pair = dataset.pair(2)
    assert samples[5].captions == (pair.captions[1],) and samples[5].questions == pair.questions[1]
    assert samples[5].labels["pattern"] == pair.pattern
    image, masks = render(pair.scenes[1])
    assert np.array_equal(np.asarray(samples[5].load()), image) and np.array_equal(samples[5].masks(), masks)
    with pytest.raises(IndexError, match="Sample 18 of a dataset of 18"):
        dataset[18]


def test_fingerprints_tell_twins_apart() -> None:
    variants = [TwinsDataset("mmvp", 9), TwinsDataset("mmvp", 10), TwinsDataset("mmvp", 9, 1), TwinsDataset("winoground", 9)]
    assert len({v.fingerprint() for v in variants}) == len(variants)
    assert TwinsDataset("mmvp", 9).fingerprint() == variants[0].fingerprint()


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'mmpv' are not drawn; choose one of mmvp, winoground, naturalbench"):
        TwinsDataset("mmpv", 3)
