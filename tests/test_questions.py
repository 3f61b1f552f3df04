"""Questions: true answers, and nothing to be guessed from the text alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from diffprobe.data.questions import CATEGORIES, questions
from diffprobe.data.samples import Question
from diffprobe.data.shapes import COLOURS, SHAPES, Obj, Scene, held_out, random_scene

TRAIN, TEST = range(3000), range(3000, 6000)


def asked(split: str, indices: Iterable[int], n_objects: int | None = None) -> list[Question]:
    return [q for i in indices for q in questions(random_scene(0, i, split, n_objects), 0)]


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return asked("train", TRAIN)


@pytest.fixture(scope="module")
def test() -> list[Question]:
    return asked("train", TEST)


def blind_reader(train: list[Question], test: list[Question]) -> tuple[float, float]:
    """The lower end of the 99% interval of a text-only reader's accuracy, and chance.

    The reader is a logistic regression on words and pairs of words; it chooses among the options of a question.
    """
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", min_df=2)
    features = words.fit_transform([q.text for q in train])
    model = LogisticRegression(C=0.3, max_iter=500).fit(features, [q.answer for q in train])
    scores = model.predict_log_proba(words.transform([q.text for q in test]))
    column = {answer: i for i, answer in enumerate(model.classes_)}
    right = 0
    for row, question in zip(scores, test, strict=True):
        guess = max(question.options, key=lambda option: row[column[option]] if option in column else -np.inf)
        right += guess == question.answer
    interval = binomtest(right, len(test)).proportion_ci(0.99, method="wilson")
    return float(interval.low), float(np.mean([1 / len(q.options) for q in test]))


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_answer_can_be_read_from_the_text(train: list[Question], test: list[Question], category: str) -> None:
    seen, unseen = ([q for q in split if q.category == category] for split in (train, test))
    assert len(seen) > 500 and len(unseen) > 500
    low, chance = blind_reader(seen, unseen)
    assert low <= chance, (
        f"a reader of the text alone is right in over {low:.1%} of {category} questions; chance is {chance:.1%}"
    )


def test_nor_in_the_compositional_split_or_with_two_objects() -> None:
    for split, n_objects in (("compositional", None), ("train", 2)):
        seen, unseen = asked(split, range(900), n_objects), asked(split, range(900, 1800), n_objects)
        for category in set(CATEGORIES) - ({"count"} if n_objects else set()):
            low, chance = blind_reader(
                [q for q in seen if q.category == category], [q for q in unseen if q.category == category]
            )
            assert low <= chance, (split, category)


def absent_pairs_are_held_out(scene: Scene, rng: np.random.Generator) -> Question:
    """Balanced answers, but a "no" always names a pair that is never drawn."""
    obj, yes = scene.objects[0], bool(rng.random() < 0.5)
    never = [(c, s) for c in COLOURS for s in SHAPES if held_out(c, s)]
    colour, shape = obj.pair if yes else never[int(rng.integers(len(never)))]
    return Question(f"Is there a {colour} {shape}?", "yes" if yes else "no", ("yes", "no"), "existence")


def truth_is_named_first(scene: Scene, rng: np.random.Generator) -> Question:
    """A choice whose right option comes first in six of ten questions."""
    obj = scene.objects[0]
    other = "large" if obj.size == "small" else "small"
    a, b = (obj.size, other) if rng.random() < 0.6 else (other, obj.size)
    return Question(f"Is the {obj.colour} {obj.shape} {a} or {b}?", obj.size, (a, b), "size")


def colours_of_held_out_pairs(scene: Scene, rng: np.random.Generator) -> Question:
    """A choice that sometimes offers a colour that the shape never has."""
    obj = scene.objects[0]
    others = [c for c in COLOURS if c != obj.colour]
    options = [obj.colour, others[int(rng.integers(len(others)))]]
    rng.shuffle(options)
    return Question(f"Is the {obj.shape} {options[0]} or {options[1]}?", obj.colour, tuple(options), "colour")


@pytest.mark.parametrize("unbalanced", [absent_pairs_are_held_out, truth_is_named_first, colours_of_held_out_pairs])
def test_the_blind_reader_finds_what_is_unbalanced(unbalanced: Callable[[Scene, np.random.Generator], Question]) -> None:
    rng = np.random.default_rng(0)
    seen, unseen = ([unbalanced(random_scene(0, i, n_objects=1), rng) for i in indices] for indices in (TRAIN, TEST))
    low, chance = blind_reader(seen, unseen)
    assert low > chance


def test_answers_are_balanced_by_count(train: list[Question]) -> None:
    for category in CATEGORIES:
        groups: dict[tuple[str, ...], Counter[str]] = {}
        for q in train:
            if q.category == category:
                groups.setdefault(tuple(sorted(q.options)), Counter())[q.answer] += 1
        for options, times in groups.items():
            total = sum(times.values())
            if total > 200:
                for option in options:
                    assert binomtest(times[option], total, 1 / len(options)).pvalue > 1e-4, (options, times)


# --- truth, by a reader of its own -----------------------------------------------------------------


def find(scene: Scene, words: str) -> Obj:
    colour, shape = words.split()
    (obj,) = [o for o in scene.objects if o.pair == (colour, shape)]
    return obj


def where(a: Obj, b: Obj) -> str:
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def truth(scene: Scene, text: str) -> str:
    """The answer to a question, worked out from its words and the scene."""

    def yes(so: bool) -> str:
        return "yes" if so else "no"

    if m := re.fullmatch(r"Is there an? (\w+)(?: (\w+))?\?", text):
        words = {w for w in m.groups() if w}
        return yes(any(words <= {o.colour, o.shape} for o in scene.objects))
    if m := re.fullmatch(r"Is anything (\w+)\?", text):
        return yes(any(o.colour == m[1] for o in scene.objects))
    if text.startswith("How many"):
        return ("zero", "one", "two", "three", "four")[len(scene.objects)]
    if m := re.fullmatch(r"Is the (\w+ \w+) (small|large) or (small|large)\?", text):
        return find(scene, m[1]).size
    if m := re.fullmatch(r"Is the (\w+) object an? (\w+) or an? (\w+)\?", text):
        (obj,) = [o for o in scene.objects if o.colour == m[1]]
        return obj.shape
    if m := re.fullmatch(r"Is the (\w+) (\w+) or (\w+)\?", text):
        (obj,) = [o for o in scene.objects if o.shape == m[1]]
        return obj.colour
    if m := re.fullmatch(r"Is the (\w+ \w+) (left|right|above|below)(?: of)? the (\w+ \w+)\?", text):
        return yes(where(find(scene, m[1]), find(scene, m[3])) == m[2])
    if m := re.fullmatch(r"Is the (\w+ \w+) \w+ or \w+(?: of)? the (\w+ \w+)\?", text):
        return where(find(scene, m[1]), find(scene, m[2]))
    if m := re.fullmatch(r"Is the (\w+ \w+) (larger|smaller) than the (\w+ \w+)\?", text):
        a, b = find(scene, m[1]).radius, find(scene, m[3]).radius
        return yes(a > b if m[2] == "larger" else a < b)
    if m := re.fullmatch(r"Which is (larger|smaller), the (\w+ \w+) or the (\w+ \w+)\?", text):
        return (max if m[1] == "larger" else min)(m[2], m[3], key=lambda words: find(scene, words).radius)
    if m := re.fullmatch(r"Which way does the (\w+ \w+) point\?", text):
        return find(scene, m[1]).direction
    if m := re.fullmatch(r"Is there a mark on the (\w+ \w+)\?", text):
        return yes(find(scene, m[1]).mark != "none")
    if m := re.fullmatch(r"Is there a (?:dot or a letter|letter or a dot) on the (\w+ \w+)\?", text):
        return "dot" if find(scene, m[1]).mark == "dot" else "letter"
    if m := re.fullmatch(r"Which letter is on the (\w+ \w+), [A-Z] or [A-Z]\?", text):
        return find(scene, m[1]).mark
    raise AssertionError(f"not understood: {text}")


@pytest.mark.parametrize("split", ["train", "compositional"])
def test_every_answer_is_true(split: str) -> None:
    seen = set()
    for index in range(500):
        scene = random_scene(1, index, split)
        for question in questions(scene, 5):
            assert question.answer == truth(scene, question.text), question
            assert question.answer in question.options and len(set(question.options)) == len(question.options) > 1
            assert all(0 <= i < len(scene.objects) for i in question.objects)
            seen.add(question.category)
    assert seen == set(CATEGORIES)


def test_questions_are_a_function_of_scene_and_seed() -> None:
    scenes = [random_scene(0, i) for i in range(20)]
    assert [questions(s, 0) for s in scenes] == [questions(s, 0) for s in scenes]
    assert [questions(s, 0) for s in scenes] != [questions(s, 1) for s in scenes]
