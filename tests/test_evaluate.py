"""Scorers against cases worked by hand from the official scripts' rules, and against loops written from the papers' words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from diffprobe.mllm import evaluate
from diffprobe.mllm.answers import read_choice, read_pope, read_yes_no, split_options
from diffprobe.mllm.evaluate import (
    COLUMNS,
    CONTRACTIONS,
    SCORERS,
    normalise_textvqa,
    normalise_vqa,
    score_blink,
    score_cv_bench,
    score_gqa,
    score_llava_bench,
    score_mmvp,
    score_naturalbench,
    score_pope,
    score_textvqa,
    score_vqav2,
    vqa_accuracy,
)
from diffprobe.stats import bootstrap_interval, wilson_interval


def by(rows: pd.DataFrame, name: str = "score") -> pd.Series:
    return rows.set_index(name).value


# --- reading answers ------------------------------------------------------------------------------

OPTIONS = ("The car", "The red car", "No car")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 0),
        ("b", 1),
        ("(C)", 2),
        ("B.", 1),
        ("b)", 1),
        ("(a) The car", 0),
        ("B: the red car", 1),
        ("[B] because it is red", 1),
        ("the red car", 1),
        ("The red car.", 1),
        ("I see the red car in front", 1),  # "car" alone would be another option inside it
        ("The answer is B", 1),
        ("Answer: c", 2),
        ("The correct answer is (A).", 0),
        ("I would choose option B because it is near", 1),
        ("It must be (C), I think", 2),
        ("Either (A) or (B)", None),
        ("a dog", None),  # an article
        ("A dog", None),
        ("The answer is a dog", None),
        ("D", None),  # there is no fourth option
        ("I cannot tell", None),
        ("", None),
        ("The car or no car", None),
    ],
)
def test_choices_in_free_text(text: str, expected: int | None) -> None:
    assert read_choice(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B, because it is red", 1),
        ("B - red is not it", 1),
        ("B \u2013 red is not it", 1),
        ("B because the red one is behind it", 1),
        ("A because it is dark green", 0),
        ("B\nred is wrong", 1),
        ("b, not red", 1),
        ("Answer: **B**", 1),
        ("**Answer:** B", 1),
        ("**B** - red is too bright", 1),
        ("\\boxed{B}", 1),
        ("The red one is out, so \\boxed{\\text{B}}.", 1),
        ("$\\boxed{B}$, not red", 1),
        ("<answer>B</answer> (red is wrong)", 1),
        ('{"answer": "B", "why": "red is wrong"}', 1),
        ("C is correct", 2),
        ("It looks red, yet (C) is the correct answer", 2),
        ("C is the best choice", 2),
        ("B\nExplanation: A is wrong", 1),
        ("B. Option A is wrong, it is not red.", 1),
        ("The answer is B, not A.", 1),
        ("A is incorrect: not red. The answer must be B", 1),
        ("It is red at first sight.\n\nB", 1),
        ("I choose B, though red is near", 1),
        ("The correct option is B: red is wrong", 1),
        ("red", 0),
        ("Answer: A dark green car", 1),  # an article, and the words of another option
        ("The red one. Point A is closer", 0),  # a letter in a sentence
        ("A is left and B is right", None),  # places, not judgements
        # contradictions, and letters that no option has
        ("A or B", None),
        ("A, B", None),
        ("A and B are correct", None),
        ("(A) or (B), red", None),
        ("Answer: A or B, red", None),
        ("The answer is A. The answer is B.", None),
        ("A. red\nAnswer: B", None),
        ("B, C and A", None),
        ("D, because it is red", None),
        ("The answer is E: red", None),
        ("A is wrong", None),
        ("The answer is not A", None),
    ],
)
def test_a_stated_letter_beats_the_words_of_options(text: str, expected: int | None) -> None:
    assert read_choice(text, ("red", "dark green", "blue")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b, a red car", 1),  # what the option says, not a second letter
        ("B, A red car", 1),
        ("I think it is the car", 0),
        ("e.g. the car", 0),
        ("A red car", 1),
        ("B. Unlike option A, it is red", 1),
        ("B) A red car", 1),
        ("A C-shaped car is the car", 0),
    ],
)
def test_words_that_look_like_letters(text: str, expected: int | None) -> None:
    assert read_choice(text, ("The car", "A red car", "No car")) == expected


def test_options_that_are_words_numbers_or_yes_and_no() -> None:
    assert read_choice("There are 2 dogs", ("1", "2", "12")) == 1
    assert read_choice("12", ("1", "2", "12")) == 2
    assert read_choice("Yes, there is no doubt", ("Yes", "No")) == 0
    assert read_choice("There isn't", ("No", "Yes")) == 0
    assert read_choice("This is a picture", ("A", "B")) is None  # an option that is only a letter is not looked for in words
    assert read_choice("It is reddish", ("red", "blue")) is None
    assert split_options("(a) Left side (b) Right") == ["Left side", "Right"]


def test_a_letter_is_an_answer_only_where_letters_are_shown() -> None:
    ask = {"options": ("H", "L"), "output": "A"}
    assert score_mmvp([{**ask, "answer": "H"}, {**ask, "answer": "L"}])["unparsed"].eq(2).all()
    assert score_mmvp([{**ask, "answer": "(a)"}, {**ask, "answer": "(b)"}]).set_index("score").value.to_dict()["item"] == 0.5
    group = [{"answer": answer, "output": "A"} for answer in ("Yes", "No", "No", "Yes")]
    assert score_naturalbench(group)["unparsed"].eq(4).all()


@pytest.mark.parametrize(
    ("text", "ours", "official"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("no, there is no dog", "no", "no"),
        ("Yes, there is a dog.", "yes", "yes"),
        ("There is not a dog in the image.", "no", "no"),
        ("There is no dog", "no", "no"),
        ("Yes, a dog. It is not large.", "yes", "yes"),  # only the first sentence speaks
        ("There isn't one", "no", "yes"),  # the official words are No, no and not
        ("NO", "no", "yes"),
        ("Yes, but it is not large", "yes", "no"),  # and any of them decides
        ("", None, "yes"),  # and silence is consent
        ("A nosy northern dog", None, "yes"),
    ],
)
def test_yes_and_no(text: str, ours: str | None, official: str) -> None:
    assert (read_yes_no(text), read_pope(text)) == (ours, official)


# --- pairs and groups -----------------------------------------------------------------------------


def test_mmvp_counts_pairs() -> None:
    right = [(0, 1), (1, 0), (0, 1), (1, 0), (1, 1)]
    records = [
        {
            "options": "(a) Open (b) Closed",
            "answer": "(a)" if side == 0 else "(b)",
            "output": ("(b)", "(a)")[(side == 0) == bool(hit)],
        }
        for pair in right
        for side, hit in enumerate(pair)
    ]
    rows = score_mmvp(records).set_index("score")
    assert (rows.value["pair"], rows.value["item"]) == (1 / 5, 6 / 10)
    assert (rows.n["pair"], rows.n["item"]) == (5, 10)
    assert (rows.low["pair"], rows.high["pair"]) == pytest.approx(wilson_interval(1, 5))
    assert (rows.chance["pair"], rows.chance["item"]) == (0.25, 0.5)
    # pairs are consecutive items: shifted by one they are others
    assert by(score_mmvp([*records[1:], records[0]]))["pair"] == 2 / 5
    records[-1] = {**records[-1], "output": "I do not know"}
    assert score_mmvp(records).unparsed.tolist() == [1, 1] and by(score_mmvp(records))["pair"] == 0
    with pytest.raises(ValueError, match="got 9 records"):
        score_mmvp(records[:-1])


HITS = np.array(
    [1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0]
)  # of clusters whose items are all right or all wrong
SAID = {1: {"output": "yes"}, 0: {"output": "no"}}


@pytest.mark.parametrize(
    ("score", "names", "size", "about"),
    [
        (score_mmvp, ("item",), 2, {"options": ("yes", "no"), "answer": "yes"}),
        (score_naturalbench, ("question", "image", "item"), 4, {"answer": "Yes"}),
        (score_gqa, ("accuracy",), 3, {"answer": "yes", "image": True}),
        (score_vqav2, ("accuracy",), 3, {"answers": ["yes"] * 10, "image": True}),
        (score_textvqa, ("accuracy",), 3, {"answers": ["yes"] * 10, "image": True}),
        (score_pope, ("accuracy", "yes_share"), 3, {"answer": "yes", "image": True}),
    ],
)
def test_items_of_a_cluster_are_no_independent_evidence(
    score: Callable[..., pd.DataFrame], names: tuple[str, ...], size: int, about: dict[str, Any]
) -> None:
    """Items that always agree tell as much as one of them: the interval is that of the clusters."""
    records = [
        {**about, **SAID[hit], **({"image": f"{cluster:02d}"} if "image" in about else {})}
        for cluster, hit in enumerate(HITS)
        for _ in range(size)
    ]
    rows = score(records).set_index("score")
    expected = bootstrap_interval(HITS, np.arange(len(HITS)))
    assert expected[1] - expected[0] > 1.3 * np.subtract(*bootstrap_interval(np.repeat(HITS, size))[::-1])
    for name in names:
        assert rows.value[name] == pytest.approx(HITS.mean())
        assert (rows.low[name], rows.high[name]) == pytest.approx(expected)


def official_naturalbench(yes: list[list[int]]) -> dict[str, float]:
    """From the paper's words: answers (1 yes) by group as q0 on i0, q0 on i1, q1 on i0, q1 on i1; the truth is 1, 0, 0, 1."""
    total = {"question": 0.0, "image": 0.0, "group": 0.0, "item": 0.0}
    for a, b, c, d in yes:
        q0, q1, i0, i1 = (a, b) == (1, 0), (c, d) == (0, 1), (a, c) == (1, 0), (b, d) == (0, 1)
        total["question"] += (q0 + q1) / 2
        total["image"] += (i0 + i1) / 2
        total["group"] += q0 and q1 and i0 and i1
        total["item"] += ((a == 1) + (b == 0) + (c == 0) + (d == 1)) / 4
    return {name: value / len(yes) for name, value in total.items()}


@pytest.mark.parametrize(("kind", "said"), [("yes_no", ("No", "Yes")), ("multiple_choice", ("B", "A"))])
def test_naturalbench_agrees_with_its_definition(kind: str, said: tuple[str, str]) -> None:
    yes = np.random.default_rng(0).integers(0, 2, (200, 4)).tolist()
    yes[0] = [1, 0, 0, 1]
    records = [
        {"kind": kind, "answer": said[truth], "output": said[answer]}
        for group in yes
        for truth, answer in zip((1, 0, 0, 1), group, strict=True)
    ]
    rows = score_naturalbench(records)
    assert by(rows).to_dict() == pytest.approx(official_naturalbench(yes))
    assert rows.set_index("score").chance.to_dict() == {"group": 1 / 16, "question": 1 / 4, "image": 1 / 4, "item": 1 / 2}
    assert rows.n.tolist() == [200, 400, 400, 800]
    # coin tosses: every interval holds its chance
    assert ((rows.low < rows.chance) & (rows.chance < rows.high)).all()


def test_who_always_says_yes_gains_nothing() -> None:
    records = [{"answer": answer, "output": "Yes"} for answer in ("Yes", "No", "No", "Yes")] * 10
    assert by(score_naturalbench(records)).to_dict() == {"group": 0, "question": 0, "image": 0, "item": 0.5}
    silent = [{**record, "output": ""} for record in records]
    assert by(score_naturalbench(silent))["item"] == 0 and (score_naturalbench(silent).unparsed == 40).all()
    with pytest.raises(ValueError, match="a group has four records; got 39"):
        score_naturalbench(records[1:])
    with pytest.raises(ValueError, match="record 0: the answer 'maybe'"):
        score_naturalbench([{"answer": "maybe", "output": "Yes"}] * 4)


# --- choices by task ------------------------------------------------------------------------------


def test_blink_is_the_mean_over_tasks() -> None:
    def item(task: str, options: int, right: bool) -> dict[str, Any]:
        return {
            "task": task,
            "options": [f"point {k}" for k in range(options)],
            "answer": "(A)",
            "output": "(A)" if right else "(B)",
        }

    records = [item("Counting", 4, k < 6) for k in range(8)] + [item("Depth", 2, k < 1) for k in range(2)]
    rows = score_blink(records).set_index("group")
    assert rows.value.to_dict() == {"macro": (6 / 8 + 1 / 2) / 2, "Counting": 6 / 8, "Depth": 1 / 2}
    assert rows.chance.to_dict() == {"macro": (1 / 4 + 1 / 2) / 2, "Counting": 1 / 4, "Depth": 1 / 2}
    assert rows.low["macro"] < rows.value["macro"] < rows.high["macro"]
    assert rows.n.to_dict() == {"macro": 10, "Counting": 8, "Depth": 2}


def test_cv_bench_weighs_its_sources() -> None:
    rng = np.random.default_rng(0)
    sizes = {"ADE20K": 30, "COCO": 50, "Omni3D": 80}
    share = {"ADE20K": 0.9, "COCO": 0.4, "Omni3D": 0.6}
    records = [
        {
            "source": s,
            "options": ["0", "1", "2", "3"][: 4 if s == "COCO" else 2],
            "answer": "(B)",
            "output": "AB"[int(rng.random() < share[s])],
        }
        for s, n in sizes.items()
        for _ in range(n)
    ]
    right = pd.Series([r["output"] == "B" for r in records]).groupby([r["source"] for r in records]).mean()
    rows = score_cv_bench(records).set_index("group")
    assert rows.value["all"] == pytest.approx(((right["ADE20K"] + right["COCO"]) / 2 + right["Omni3D"]) / 2)
    assert rows.value["2D"] == pytest.approx((right["ADE20K"] + right["COCO"]) / 2)
    assert rows.chance["all"] == pytest.approx(((0.5 + 0.25) / 2 + 0.5) / 2)
    assert rows.n.to_dict() == {"all": 160, "2D": 80, **sizes}
    assert (rows.low < rows.value).all() and (rows.value < rows.high).all()
    with pytest.raises(ValueError, match="needs records of ADE20K, COCO, Omni3D; found COCO"):
        score_cv_bench([r for r in records if r["source"] == "COCO"])


# --- short answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("a dog.", "dog"),
        ("The cat and the dog", "cat and dog"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # both apostrophes are missing: not in the table
        ("couldn'tve", "couldn't've"),
        ("she's", "she's"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),  # the table has "Im", which lower case never reaches
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t -shirt", "t shirt"),
        ("mother-in law-s", "mother in law s"),
        ("x-ray, y-ray", "x ray y ray"),  # the comma touches a space and vanishes; the hyphens do not
        ("10,000", "10000"),
        ("10,000 t-shirts", "10000 tshirts"),  # a comma between digits makes every mark vanish
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        ("p.m.", "pm"),
        ("what?!", "what"),
        ("100%", "100%"),
        ("two\nwords\tmore", "2 words more"),
        ("a", ""),
        ("", ""),
    ],
)
def test_the_official_normalisation(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


def test_textvqa_normalises_a_little_more() -> None:
    assert [normalise_textvqa(t) for t in ("Macy's", "a,b", "10,000 t-shirts", "WHAT?")] == [
        "macy 's",
        "ab",
        "10000 t shirts",
        "what",
    ]
    assert normalise_vqa("Macy's") == "macy's" and normalise_vqa("a,b") == "b"


def test_the_table_of_contractions() -> None:
    assert len(CONTRACTIONS) == 114  # the official table has 120, four with a capital "I" and two that change nothing
    assert all(value.replace("'", "") == key.replace("'", "") for key, value in CONTRACTIONS.items())
    assert {"hell", "well", "wed", "were", "its", "ill", "id"}.isdisjoint(CONTRACTIONS)  # words of their own


def leave_one_out(output: str, answers: list[str]) -> float:
    scores = []
    for left_out in range(10):
        others = [answer for k, answer in enumerate(answers) if k != left_out]
        scores.append(min(1.0, sum(answer == output for answer in others) / 3))
    return sum(scores) / 10


def test_vqa_accuracy_is_the_mean_over_leave_one_out_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        answers = rng.choice(["cat", "dog", "bird", "fish"], 10, p=[0.5, 0.3, 0.1, 0.1]).tolist()
        for output in ("cat", "dog", "bird", "cow"):
            expected = leave_one_out(output, answers)
            assert vqa_accuracy(output, answers, normalise_textvqa) == pytest.approx(expected)
            assert vqa_accuracy(output, answers) == pytest.approx(expected)


def test_vqav2_normalises_only_where_people_disagree() -> None:
    agreed, split = ["two dogs"] * 10, ["Two dogs"] * 9 + ["one"]
    assert vqa_accuracy("2 dogs", agreed) == 0 and vqa_accuracy("two dogs", agreed) == 1
    assert vqa_accuracy("2 dogs", split) == 1 and vqa_accuracy("The two dogs.", split) == 1
    assert vqa_accuracy("2 dogs", agreed, normalise_textvqa) == 1
    assert vqa_accuracy(" two dogs\n", agreed) == 1  # white space is stripped always


def test_vqa_tables() -> None:
    records = [
        {"answers": ["yes"] * 10, "output": "yes", "answer_type": "yes/no", "image": "a"},
        {"answers": ["no"] * 10, "output": "yes", "answer_type": "yes/no", "image": "a"},
        {"answers": ["two"] * 5 + ["three"] * 5, "output": "2", "answer_type": "number", "image": "b"},
        {"answers": ["yes"] * 10, "output": "", "answer_type": "yes/no", "image": "c"},
    ]
    rows = score_vqav2(records).set_index("group")
    assert rows.value.to_dict() == pytest.approx({"all": 0.5, "yes/no": 1 / 3, "number": 1})
    assert rows.chance["all"] == 0.5  # "yes" every time
    assert rows.unparsed.to_dict() == {"all": 1, "yes/no": 1, "number": 0}
    assert rows.n.to_dict() == {"all": 4, "yes/no": 3, "number": 1}
    assert rows.high["number"] == 1 and rows.low["number"] < 0.5  # one answer says little
    assert by(score_textvqa(records), "group")["all"] == 0.5
    with pytest.raises(ValueError, match="TextVQA, record 0: the score is defined on ten human answers; found 3"):
        score_textvqa([{"answers": ["a"] * 3, "output": "a"}])


def test_gqa_ignores_case_and_punctuation_and_nothing_else() -> None:
    said = {"Yes.": 1, "yes": 1, "YES!": 1, "yes it is": 0, "yess": 0, "": 0}
    rows = score_gqa([{"answer": "yes", "output": output} for output in said])
    assert rows.value[0] == sum(said.values()) / len(said) and rows.unparsed[0] == 1
    rows = score_gqa(
        [{"answer": a, "output": "left", "image": i} for a, i in zip(("left", "left", "right", "up"), "aabb", strict=True)]
    )
    assert (rows.value[0], rows.chance[0], rows.n[0]) == (0.5, 0.5, 4)


# --- POPE -----------------------------------------------------------------------------------------


def test_pope_agrees_with_scikit_learn_and_counts_yes_answers() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.random(300) < 0.5, rng.random(300) < 0.7
    words = np.array(["No, there is none.", "Yes, there is."])
    records = [{"answer": ("no", "yes")[int(t)], "output": str(words[int(s)])} for t, s in zip(truth, said, strict=True)]
    rows = score_pope(records)
    oracle = {
        "accuracy": (truth == said).mean(),
        "precision": precision_score(truth, said),
        "recall": recall_score(truth, said),
        "f1": f1_score(truth, said),
        "yes_share": said.mean(),  # of the answers, not of the truths
    }
    assert by(rows).to_dict() == pytest.approx(oracle)
    assert ((rows.low < rows.value) & (rows.value < rows.high)).all()
    pd.testing.assert_frame_equal(rows, score_pope(records, read_pope))
    assert by(rows)["yes_share"] > 0.6 > truth.mean()


def test_pope_silence_is_wrong_and_counted() -> None:
    records = [{"answer": answer, "output": ""} for answer in ("yes", "no") * 10]
    ours, official = score_pope(records).set_index("score"), score_pope(records, read_pope).set_index("score")
    assert (
        ours.value["accuracy"] == 0
        and ours.value["recall"] == 0
        and ours.value["yes_share"] == 0
        and (ours.unparsed == 20).all()
    )
    assert np.isnan(ours.value["precision"]) and np.isnan(ours.value["f1"])
    assert official.value["accuracy"] == 0.5 and official.value["yes_share"] == 1 and (official.unparsed == 0).all()


def test_pope_by_category_and_image() -> None:
    records = [
        {"answer": a, "output": o, "category": c, "image": i}
        for c in ("random", "adversarial")
        for i in ("x", "y", "z")
        for a, o in (("yes", "Yes"), ("no", "Yes" if c == "adversarial" else "No"))
    ]
    rows = score_pope(records)
    accuracy = rows[rows.score == "accuracy"].set_index("group")
    assert accuracy.value.to_dict() == {"all": 0.75, "random": 1.0, "adversarial": 0.5}
    assert accuracy.n.to_dict() == {"all": 12, "random": 6, "adversarial": 6}
    assert accuracy.low["random"] == pytest.approx(wilson_interval(3, 3)[0])  # three images, not six questions
    with pytest.raises(ValueError, match="record 0: the answer 'perhaps' is neither"):
        score_pope([{"answer": "perhaps", "output": "yes"}])


# --- judged answers -------------------------------------------------------------------------------


def test_llava_bench_is_a_ratio_of_means() -> None:
    points = {"conv": [(8, 6), (10, 9)], "detail": [(5, 5), (9, 3)]}
    records = [
        {"category": c, "question": "?", "output": "text" if m != 3 else " ", "points": (r, m)}
        for c, pairs in points.items()
        for r, m in pairs
    ]
    rows = score_llava_bench(records, lambda record: record["points"]).set_index("group")
    assert rows.value.to_dict() == pytest.approx({"all": 23 / 32, "conv": 15 / 18, "detail": 8 / 14})
    assert rows.value["conv"] != pytest.approx((6 / 8 + 9 / 10) / 2)  # not the mean of the ratios
    assert rows.chance.isna().all() and rows.unparsed.to_dict() == {"all": 1, "conv": 0, "detail": 1}
    with pytest.raises(ValueError, match=r"record 0: the judge must give two numbers above 0; it gave \[0.0, 5.0\]"):
        score_llava_bench(records, lambda record: (0, 5))


# --- all ------------------------------------------------------------------------------------------

EXAMPLE: dict[str, dict[str, Any]] = {
    "mmvp": {"options": "(a) Yes (b) No", "answer": "(a)"},
    "naturalbench": {"answer": "Yes"},
    "blink": {"task": "Depth", "options": ["one", "two"], "answer": "(A)"},
    "cv-bench": {"source": "COCO", "options": ["one", "two"], "answer": "(A)"},
    "gqa": {"answer": "yes"},
    "vqav2": {"answers": ["yes"] * 10},
    "textvqa": {"answers": ["yes"] * 10},
    "pope": {"answer": "yes"},
    "llava-bench": {"category": "conv", "question": "?"},
    "jsonl": {"options": ["one", "two"], "answer": "(A)"},
}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_gives_the_same_columns_and_names_what_is_missing(name: str) -> None:
    example, score = EXAMPLE[name], SCORERS[name]
    extra = (lambda record: (8, 4),) if name == "llava-bench" else ()
    outputs = ["yes", "(A)", "nonsense", ""]
    records = [{**example, "output": output} for output in outputs]
    if name == "cv-bench":
        records = [{**record, "source": source} for record in records for source in evaluate.CV_SOURCES]
    rows = score(records, *extra, seed=3)
    assert list(rows.columns) == COLUMNS and (rows.seed == 3).all() and (rows.n > 0).all()
    assert rows.unparsed.max() >= 1 and rows.value.max() <= 1
    pd.testing.assert_frame_equal(rows, score(records, *extra, seed=3))
    with pytest.raises(ValueError, match="no records"):
        score([], *extra)
    with pytest.raises(ValueError, match=r"record 1: fields .*output missing"):
        score([records[0], example], *extra)


def test_every_public_scorer_is_registered() -> None:
    named = {function for key, function in inspect.getmembers(evaluate, inspect.isfunction) if key.startswith("score_")}
    assert named == set(SCORERS.values())
