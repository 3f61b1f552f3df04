"""Questions of a file of one's own: read, each fault named with its line, and scored as the published benchmarks are."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffprobe.data.question_benchmarks import load_questions
from diffprobe.mllm.evaluate import SCORERS, score_blink, score_gqa, score_own, score_vqav2
from diffprobe.mllm.judging import hit, judge_all

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
VALUES = ["value", "low", "high", "n", "chance", "unparsed"]


def written(folder: Path, rows: Sequence[Any], name: str = "mine.jsonl") -> str:
    for colour in ("red", "blue"):
        (folder / "shots").mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), colour).save(folder / "shots" / f"{colour}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"jsonl:{folder / name}?images={folder / 'shots'}"


ROWS: list[dict[str, Any]] = [
    {"question": "Which?", "image": "red.png", "options": ["left", "right"], "answer": "right", "category": "side"},
    {"id": "second", "question": "Which?", "image": "blue.png", "options": ["left", "right", "up"], "answer": "(a)"},
    {"question": "Is it red?", "image": ["red.png", "blue.png"], "answer": "Yes", "source": "a note of one's own"},
    {"question": "What colour?", "image": "red.png", "answer": "dark red"},
    {"question": "How many?", "image": "red.png", "answer": 3, "options": None, "id": None, "category": None},
    {"question": "What colour?", "image": "red.png", "answers": ["red", "crimson"]},
    {"question": "What is it?", "image": "blue.png", "answers": ["cat"] * 9 + ["dog"]},
]


def test_what_is_asked_and_what_is_right(tmp_path: Path) -> None:
    benchmark = load_questions(written(tmp_path, ROWS))
    assert (benchmark.name, benchmark.scorer) == ("jsonl-mine", "jsonl") and benchmark.scorer in SCORERS
    first, second, third, fourth, fifth, sixth, last = benchmark.items
    assert [item.id for item in benchmark.items] == ["1", "second", "3", "4", "5", "6", "7"]
    assert first.question == f"Which?\n(A) left\n(B) right{LETTER}" and fourth.question == f"What colour?{SHORT}"
    assert first.record == {"options": ("left", "right"), "answer": "(B)", "image": "red.png", "category": "side"}
    assert second.record["answer"] == "(A)" and third.record["options"] == ("yes", "no")
    assert third.question == f"Is it red?{SHORT}" and third.record["image"] == "red.png blue.png"
    assert fifth.record["answer"] == "3" and sixth.record["answers"] == ["red", "crimson"] and len(last.record["answers"]) == 10
    assert [load().getpixel((0, 0)) for load in third.images] == [(255, 0, 0), (0, 0, 255)]
    assert len(load_questions(f"{benchmark.spec}&limit=2")) == 2
    plain = load_questions(f"{benchmark.spec}&ask=plain").items[1]
    assert (plain.question, plain.record["answer"]) == ("Which?", "left")
    before = benchmark.fingerprint()
    assert load_questions(benchmark.spec).fingerprint() == before
    Image.new("RGB", (8, 6), "green").save(tmp_path / "shots" / "red.png")
    assert load_questions(benchmark.spec).fingerprint() != before
    (tmp_path / "mine.jsonl").rename(tmp_path / "shots" / "mine.jsonl")
    assert len(load_questions(f"jsonl:{tmp_path / 'shots' / 'mine.jsonl'}")) == 7, "images lie beside the file"


def test_scores_are_those_of_the_published_benchmarks(tmp_path: Path) -> None:
    """The same outputs through BLINK's, GQA's and VQAv2's own scorers."""
    rng = np.random.default_rng(0)
    choices = [
        {"question": "?", "image": ("red.png", "blue.png")[k % 2], "options": ["left", "right"], "answer": "left",
         "category": ("one", "two")[k > 20]} for k in range(30)
    ]  # fmt: skip
    exact = [
        {"question": "?", "image": ("red.png", "blue.png")[k % 2], "answer": ("cat", "dog")[k % 3 == 0]} for k in range(12)
    ]
    ten = [{"question": "?", "image": "red.png", "answers": ["cat"] * 8 + ["dog", "cow"]} for _ in range(9)]
    items = load_questions(written(tmp_path, [*choices, *exact, *ten])).items
    said = [
        *rng.choice(["A", "(B)", "right", "maybe"], 30),
        *rng.choice(["Cat.", "dog", ""], 12),
        *rng.choice(["cat", "a cow"], 9),
    ]
    records = [{**item.record, "output": str(text)} for item, text in zip(items, said, strict=True)]
    found = score_own(records, seed=3).set_index(["score", "group"])
    assert list(found.index) == [("choice", "all"), ("choice", "one"), ("choice", "two"), ("exact", "all"), ("vqa", "all")]

    def same(mine: tuple[str, str], published: pd.DataFrame, names: Sequence[str] = VALUES) -> None:
        np.testing.assert_array_equal(found.loc[[mine], list(names)], published[list(names)].iloc[:1])

    same(("exact", "all"), score_gqa(records[30:42], seed=3))
    same(("vqa", "all"), score_vqav2(records[42:], seed=3))
    blink = score_blink([{**record, "task": record["category"]} for record in records[:30]], seed=3)
    shares = ["value", "n", "chance", "unparsed"]  # BLINK knows nothing of images that have several questions
    same(("choice", "one"), blink[blink["group"] == "one"], shares)
    same(("choice", "two"), blink[blink["group"] == "two"], shares)
    alone = [{**record, "image": str(k), "task": "one"} for k, record in enumerate(records[:30])]
    uncategorised = [{name: value for name, value in record.items() if name != "category"} for record in alone]
    np.testing.assert_array_equal(score_own(uncategorised)[VALUES], score_blink(alone)[VALUES].iloc[1:])
    by_hand = np.mean([text in ("A",) for text in said[:30]])
    assert found.loc[("choice", "all"), "value"] == by_hand and found.loc[("choice", "all"), "unparsed"] == said.count("maybe")
    signs = {"options": ("+", "-"), "answer": "(A)"}
    assert [hit({**signs, "output": text}) for text in ("", "A", "(B)")] == [0, 1, 0], "an empty text is no sign"
    assert [hit(record) for record in records[:30]] == [float(text == "A") for text in said[:30]]


FAULTS: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ("[1]", "holds a list, where an object with named entries was expected"),
    ({"image": "red.png", "answer": "no"}, "question is None; it must be a text"),
    ({"question": "?", "answer": "no"}, "image is None; it must be the name of a file"),
    ({"question": "?", "image": "green.png", "answer": "no"}, "there is no image 'green.png' in"),
    ({"question": "?", "image": "../mine.jsonl", "answer": "no"}, "leaves the folder of images"),
    ({"question": "?", "image": "red.png", "choices": ["a", "b"]}, "has neither (it has question, image, choices)"),
    ({"question": "?", "image": "red.png", "answer": "a", "answers": ["a"]}, "this one has both"),
    ({"question": "?", "image": "red.png", "answer": True}, "answer is True; it must be a text or a number"),
    ({"question": "?", "image": "red.png", "answers": []}, "answers is []; it must be a list of texts or numbers"),
    ({"question": "?", "image": "red.png", "options": ["up"], "answer": "up"}, "there must be from 2 to 26"),
    ({"question": "?", "image": "red.png", "options": ["Up", "up"], "answer": "up"}, "there must be from 2 to 26"),
    ({"question": "?", "image": "red.png", "options": "up or down", "answer": "up"}, "they must be a list"),
    ({"question": "?", "image": "red.png", "options": ["up", "down"], "answer": "C"}, "'C' is none of the options up, down, nor a"),
    ({"question": "?", "image": "red.png", "options": ["up", "down"], "answer": ""}, "'' is none of the options up, down"),
    ({"question": "?", "image": "red.png", "options": ["up", "down"], "answers": ["up"]}, "needs answer, one of them"),
    ({"question": "?", "image": "red.png", "options": ["B", "A"], "answer": "A"}, "ask=plain shows no letters"),
    ({"question": "?", "image": "red.png", "answer": "no", "category": ["a"]}, "category is ['a']; it must be a text or a number"),
    ({"id": {}, "question": "?", "image": "red.png", "answer": "no"}, "id is {}; it must be a text or a number"),
    ({"id": "good", "question": "?", "image": "red.png", "answer": "no"}, "id 'good' stands in line 1 too"),
    ('{"question": "\\ud800", "image": "red.png", "answer": "no"}', "is no Unicode text"),
]  # fmt: skip
GOOD = {"id": "good", "question": "?", "image": "red.png", "answer": "no"}


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_a_fault_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"mine\.jsonl', line 3.*{re.escape(message)}"):
        load_questions(written(tmp_path, [GOOD, "", row]))


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    both = {"question": "", "image": "green.png", "options": [], "answer": "a"}
    with pytest.raises(ValueError, match="2 entries of") as caught:
        load_questions(written(tmp_path, [both, GOOD, "{"]))
    told = str(caught.value)
    for part in ("line 1: there is no image 'green.png'", ", and question is ''", ", and options are []", "line 3 is not JSON"):
        assert part in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?images=absent", "the folder of images .*absent' does not exist; name it"),
        ("?ask=loud", "ask is 'loud'; it is one of letters, plain"),
        ("?img=x", "unknown option 'img'; jsonl takes images, limit, ask"),
        (".jsonx", "does not exist"),
    ],
)
def test_specs_that_are_wrong(tmp_path: Path, options: str, message: str) -> None:
    spec = written(tmp_path, [GOOD]).partition("?")[0]
    with pytest.raises(ValueError, match=message):
        load_questions(f"{spec}{options}")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no items"):
        load_questions(f"jsonl:{tmp_path / 'none.jsonl'}")
    with pytest.raises(ValueError, match="Did you mean 'jsonl'"):
        load_questions(f"json:{tmp_path / 'none.jsonl'}")


def test_two_files_of_one_name_are_refused_before_anything_is_answered(tmp_path: Path) -> None:
    benchmarks = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        benchmarks.append(load_questions(written(tmp_path / folder, ROWS)))
    with pytest.raises(ValueError, match=r"2 benchmarks are called 'jsonl-mine'.*--out of its own"):
        judge_all(None, benchmarks, tmp_path / "eval")  # type: ignore[arg-type]
    assert not (tmp_path / "eval").exists()
