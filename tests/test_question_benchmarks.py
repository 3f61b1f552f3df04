"""Readers of benchmarks that ask questions: fixtures have exactly the published files and columns, a few rows long."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffprobe.data.question_benchmarks import (
    BLINK_TASKS,
    DRAWN,
    QuestionBenchmark,
    QuestionItem,
    first_items,
    load_questions,
)
from diffprobe.data.question_benchmarks import LAYOUTS as PUBLISHED
from diffprobe.data.questions import CATEGORIES
from diffprobe.data.several import ORDINALS, TASKS, several_images
from diffprobe.data.shapes import COLOURS as NAMED
from diffprobe.mllm.evaluate import SCORERS

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200), "green": (0, 160, 0), "grey": (90, 90, 90)}
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), COLOURS[colour]).save(data, "PNG")
    return data.getvalue()


def cell(colour: str) -> dict[str, Any]:
    return {"bytes": png(colour), "path": f"{colour}.png"}


def shown(item: QuestionItem) -> list[str]:
    """What each image of an item shows; JPEG is not exact."""
    pixels = [np.asarray(load()).reshape(-1, 3).mean(0) for load in item.images]
    return [min(COLOURS, key=lambda name: float(np.abs(COLOURS[name] - p).sum())) for p in pixels]


def save(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), COLOURS[colour]).save(path)


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2)


def perfect(benchmark: QuestionBenchmark) -> Any:
    """The scorer's rows for a model that gives the dataset's own answers."""
    truths = [item.record.get("answer", item.record.get("answers", [""])[0]) for item in benchmark.items]
    records = [{**item.record, "output": truth} for item, truth in zip(benchmark.items, truths, strict=True)]
    return SCORERS[benchmark.scorer](records)


# --- the layouts ----------------------------------------------------------------------------------

MMVP_ROWS = [
    ("3", "Is the dog awake?", "(a) Yes (b) No", "(b)"),
    ("4", "Is the dog awake?", "(a) Yes (b) No", "(a)"),
    ("1", "Are the tusks long, or short?", "(a) Long (b) Short", "(a)"),
    ("2", "Are the tusks long, or short?", "(a) Long (b) Short", "(b)"),
]


def mmvp(folder: Path, rows: Sequence[Sequence[str]] = MMVP_ROWS) -> Path:
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Index", "Question", "Options", "Correct Answer"), *rows])
    for number, colour in enumerate(COLOURS, 1):
        save(folder / "MMVP Images" / f"{number}.jpg", colour)
    return folder


NATURALBENCH_ROWS = [
    {"Index": str(4 * group + k), "Image": cell(("red", "blue")[k % 2]), "Question": f"{group}{k // 2}?", "Answer": answer,
     "Question_Type": kind, "Source": "Flickr30K"}
    for group, kind, answers in ((0, "yes_no", ("Yes", "No", "No", "Yes")), (1, "multiple_choice", ("A", "B", "B", "A")))
    for k, answer in enumerate(answers)
]  # fmt: skip


def naturalbench(folder: Path, rows: Sequence[dict[str, Any]] = NATURALBENCH_ROWS) -> Path:
    table(folder / "data" / "test-00000-of-00001.parquet", rows[::-1])
    return folder


def blink_row(idx: str, task: str, colours: Sequence[str], answer: str) -> dict[str, Any]:
    images = {f"image_{k + 1}": cell(colours[k]) if k < len(colours) else None for k in range(4)}
    prompt = f"{task}: which?\n(A) left\n(B) right"
    return {"idx": idx, "question": "which?", "sub_task": task, **images, "choices": ["left", "right"], "answer": answer,
            "prompt": prompt, "explanation": ""}  # fmt: skip


def blink(folder: Path, answer: str = "(A)", tasks: Sequence[str] = BLINK_TASKS) -> Path:
    for task in tasks:
        rows = [blink_row(f"val_{task}_1", task, ("grey",), "(B)")]
        if task == "Jigsaw":
            rows = [
                blink_row("val_Jigsaw_1", task, ("red", "blue", "green"), answer),
                blink_row("val_Jigsaw_2", task, ("red", "blue"), "(B)"),
            ]
        table(folder / task / "val-00000-of-00001.parquet", rows)
    table(folder / "Jigsaw" / "test-00000-of-00001.parquet", [blink_row("test_Jigsaw_1", "Jigsaw", ("red",), "hidden")])
    return folder


CV_ROWS = [
    {"idx": k, "type": kind, "task": "Count", "question": "How many?", "choices": ["1", "2"], "answer": "(A)",
     "prompt": f"How many? {k}\n(A) 1\n(B) 2", "filename": f"img/{kind}/{k}.png", "source": source, "source_dataset": source,
     "source_filename": "x", "target_class": None, "target_size": None, "bbox": None}
    for k, (kind, source) in enumerate((("2D", "ADE20K"), ("2D", "COCO"), ("3D", "Omni3D")))
]  # fmt: skip


def cv_bench(folder: Path, rows: Sequence[dict[str, Any]] = CV_ROWS, lines: bool = False) -> Path:
    for kind in ("2D", "3D"):
        mine = [row for row in rows if row["type"] == kind]
        if lines:
            (folder / f"test_{kind.lower()}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
        else:
            columns = ("target_class", "target_size", "bbox", "filename")
            kept = [{name: value for name, value in row.items() if name not in columns} for row in mine]
            table(folder / f"test_{kind.lower()}.parquet", [row | {"image": cell("red")} for row in kept])
    for row in CV_ROWS:
        save(folder / row["filename"], "red")
    return folder


def gqa(folder: Path, image: str = "n1") -> Path:
    rows = [{"id": str(k), "imageId": image if k else "n0", "question": f"What? {k}", "answer": "dog", "fullAnswer": "It is a dog."}
            for k in range(3)]  # fmt: skip
    table(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    pictures = [{"id": "n0", "image": cell("blue")}, {"id": "n1", "image": cell("red")}]
    table(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", pictures)
    return folder


TEN = ["cat"] * 9 + ["dog"]


def vqav2(folder: Path, official: bool = False, answers: Sequence[str] = TEN) -> Path:
    given = [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(answers, 1)]
    asked = [{"image_id": 42, "question": f"What? {k}", "question_id": 42000 + k} for k in range(2)]
    truths = [{"question_type": "what", "multiple_choice_answer": "cat", "answers": given, "image_id": 42, "answer_type": "other",
               "question_id": 42000 + k} for k in range(2)]  # fmt: skip
    if official:
        about = {"info": {}, "license": {}, "data_subtype": "val2014"}
        (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({**about, "questions": asked}))
        (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({**about, "annotations": truths[::-1]}))
        save(folder / "val2014" / "COCO_val2014_000000000042.jpg", "red")
    else:
        rows = [truth | ask | {"image": cell("red")} for truth, ask in zip(truths, asked, strict=True)]
        table(folder / "data" / "validation-00000-of-00002.parquet", rows[:1])
        table(folder / "data" / "validation-00001-of-00002.parquet", rows[1:])
        table(folder / "data" / "test-00000-of-00001.parquet", [rows[0] | {"answers": None}])
    return folder


def textvqa(folder: Path, official: bool = False, image: str = "0a1b") -> Path:
    row = {"question": "what is written?", "image_id": image, "question_id": 34602, "answers": TEN, "set_name": "val"}
    if official:
        (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": [row]}))
        save(folder / "train_images" / "0a1b.jpg", "red")
    else:
        table(folder / "data" / "validation-00000-of-00001.parquet", [row | {"image": cell("red"), "ocr_tokens": ["STOP"]}])
    return folder


def pope(folder: Path, official: bool = False, label: str = "yes") -> Path:
    asked = [(name, k, answer) for name in ("random", "popular", "adversarial") for k, answer in enumerate((label, "no"), 1)]
    if official:
        for name in ("random", "popular", "adversarial"):
            lines = [{"question_id": k, "image": "COCO_val2014_1.jpg", "text": f"Is there a dog? {k}", "label": answer}
                     for kind, k, answer in asked if kind == name]  # fmt: skip
            (folder / f"coco_pope_{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        save(folder / "val2014" / "COCO_val2014_1.jpg", "red")
        return folder
    rows = [{"id": str(number), "question_id": str(k), "question": f"Is there a dog? {k}", "answer": answer,
             "image_source": "COCO_val2014_1", "image": cell("red"), "category": name} for number, (name, k, answer) in enumerate(asked)]  # fmt: skip
    table(folder / "data" / "test-00000-of-00001.parquet", rows)
    table(folder / "Full" / "random-00000-of-00001.parquet", rows[:2])
    return folder


def llava_bench(folder: Path) -> Path:
    row = {"question_id": 0, "question": "Describe.", "image": cell("red"), "caption": "A red wall.", "gpt_answer": "It is red.",
           "category": "detail", "image_id": "001.jpg"}  # fmt: skip
    table(folder / "data" / "train-00000-of-00001.parquet", [row])
    return folder


LAYOUTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "mmvp": (mmvp, {}), "naturalbench": (naturalbench, {}), "blink": (blink, {}), "gqa": (gqa, {}), "llava-bench": (llava_bench, {}),
    "cv-bench": (cv_bench, {}), "cv-bench lines": (cv_bench, {"lines": True}),
    "vqav2": (vqav2, {}), "vqav2 official": (vqav2, {"official": True}),
    "textvqa": (textvqa, {}), "textvqa official": (textvqa, {"official": True}),
    "pope": (pope, {}), "pope official": (pope, {"official": True}),
}  # fmt: skip


def loaded(folder: Path, layout: str) -> QuestionBenchmark:
    make, options = LAYOUTS[layout]
    return load_questions(f"{layout.split()[0]}:{make(folder, **options)}")


def test_every_reader_has_a_layout() -> None:
    assert {layout.split()[0] for layout in LAYOUTS} == set(PUBLISHED)
    assert {scorer for scorer, _ in DRAWN.values()} | set(PUBLISHED) <= set(SCORERS)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("llava")])
def test_the_datasets_own_answers_score_full_marks(tmp_path: Path, layout: str) -> None:
    """So every record has the fields that its scorer wants, in the order that it wants."""
    rows = perfect(loaded(tmp_path, layout))
    assert (rows[rows.score != "yes_share"].value == 1).all() and (rows.unparsed == 0).all()


def test_mmvp_keeps_the_files_answers(tmp_path: Path) -> None:
    benchmark = load_questions(f"mmvp:{mmvp(tmp_path)}")
    first, second, third, _ = benchmark.items
    assert [item.id for item in benchmark.items] == ["mmvp-001", "mmvp-002", "mmvp-003", "mmvp-004"]
    assert first.question == "Are the tusks long, or short? (a) Long (b) Short"
    assert first.record == {"options": "(a) Long (b) Short", "answer": "(a)"} and second.record["answer"] == "(b)"
    assert [shown(item) for item in (first, second, third)] == [["red"], ["blue"], ["green"]]
    elephants = [("99", "Tusks?", "(a) Long (b) Short", "(a)"), ("100", "Tusks?", "(a) Long (b) Short", "(b)")]
    for number in (99, 100):
        save(tmp_path / "MMVP Images" / f"{number}.jpg", "red")
    kept = load_questions(f"mmvp:{mmvp(tmp_path, [*MMVP_ROWS, *elephants])}").items[-2:]
    assert [(item.id, item.record["answer"]) for item in kept] == [("mmvp-099", "(a)"), ("mmvp-100", "(b)")]


def test_naturalbench_groups(tmp_path: Path) -> None:
    items = load_questions(f"naturalbench:{naturalbench(tmp_path)}").items
    assert [item.id.removeprefix("naturalbench-") for item in items[:4]] == [
        "0000-q0-i0",
        "0000-q0-i1",
        "0000-q1-i0",
        "0000-q1-i1",
    ]
    assert items[1].question == "00? Please answer Yes or No." and items[1].record == {"answer": "No", "kind": "yes_no"}
    assert items[6].question == "11? Please output the letter corresponding to the correct option."
    assert [shown(item)[0] for item in items[:4]] == ["red", "blue", "red", "blue"]


def test_blink_has_as_many_images_as_the_row(tmp_path: Path) -> None:
    items = {item.id: item for item in load_questions(f"blink:{blink(tmp_path)}").items}
    assert len(items) == 15 and not any("test" in name for name in items)
    one, three, two = (items[f"blink-val_{name}"] for name in ("Counting_1", "Jigsaw_1", "Jigsaw_2"))
    assert [shown(item) for item in (one, two, three)] == [["grey"], ["red", "blue"], ["red", "blue", "green"]]
    assert three.question == "Jigsaw: which?\n(A) left\n(B) right"
    assert three.record == {"task": "Jigsaw", "options": ("left", "right"), "answer": "(A)"}


@pytest.mark.parametrize(
    ("layout", "question", "record"),
    [
        ("cv-bench", f"How many? 0\n(A) 1\n(B) 2{LETTER}", {"source": "ADE20K", "options": ("1", "2"), "answer": "(A)"}),
        ("cv-bench lines", f"How many? 0\n(A) 1\n(B) 2{LETTER}", {"source": "ADE20K", "options": ("1", "2"), "answer": "(A)"}),
        ("vqav2", f"What? 0{SHORT}", {"answers": TEN, "image": "42", "answer_type": "other"}),
        ("vqav2 official", f"What? 0{SHORT}", {"answers": TEN, "image": "42", "answer_type": "other"}),
        ("textvqa", f"what is written?{SHORT}", {"answers": TEN, "image": "0a1b"}),
        ("textvqa official", f"what is written?{SHORT}", {"answers": TEN, "image": "0a1b"}),
        ("pope", f"Is there a dog? 1{SHORT}", {"answer": "yes", "image": "COCO_val2014_1", "category": "random"}),
        ("pope official", f"Is there a dog? 1{SHORT}", {"answer": "yes", "image": "COCO_val2014_1", "category": "random"}),
        (
            "llava-bench",
            "Describe.",
            {"category": "detail", "question": "Describe.", "context": "A red wall.", "reference": "It is red."},
        ),
    ],
)
def test_questions_and_records(tmp_path: Path, layout: str, question: str, record: dict[str, Any]) -> None:
    benchmark = loaded(tmp_path, layout)
    item = benchmark.items[0]
    assert (item.question, item.record, shown(item)) == (question, record, ["red"])
    assert len(benchmark) == {"cv-bench": 3, "vqav2": 2, "textvqa": 1, "pope": 6, "llava-bench": 1}[layout.split()[0]]
    assert benchmark.scorer == benchmark.name == layout.split()[0]


def test_gqa_shares_images_among_questions(tmp_path: Path) -> None:
    items = load_questions(f"gqa:{gqa(tmp_path)}").items
    assert [(item.id, item.record["image"], shown(item)[0]) for item in items] == [
        ("gqa-0", "n0", "blue"),
        ("gqa-1", "n1", "red"),
        ("gqa-2", "n1", "red"),
    ]
    assert items[0].question == f"What? 0{SHORT}"


def test_llava_bench_asks_the_judge(tmp_path: Path) -> None:
    benchmark = load_questions(f"llava-bench:{llava_bench(tmp_path)}")
    seen: list[Any] = []
    SCORERS["llava-bench"]([{**benchmark.items[0].record, "output": "Red."}], lambda record: seen.append(record) or (8, 4))
    assert seen == [{**benchmark.items[0].record, "output": "Red."}]


def test_limit_and_fingerprint(tmp_path: Path) -> None:
    spec = f"vqav2:{vqav2(tmp_path)}"
    whole, part = load_questions(spec), load_questions(f"{spec}?limit=1")
    assert (len(whole), len(part), part.items[0].id) == (2, 1, "vqav2-42000")
    assert whole.fingerprint() == load_questions(spec).fingerprint() != part.fingerprint()
    vqav2(tmp_path, answers=["dog"] * 10)
    assert load_questions(spec).fingerprint() != whole.fingerprint()
    (tmp_path / "official").mkdir()
    official = f"vqav2:{vqav2(tmp_path / 'official', official=True)}"
    before = load_questions(official).fingerprint()
    save(tmp_path / "official" / "val2014" / "COCO_val2014_000000000042.jpg", "blue")
    assert load_questions(official).fingerprint() != before
    (tmp_path / "R&D?").mkdir()
    odd = load_questions(f"vqav2:{vqav2(tmp_path / 'R&D?')}?limit=1")
    assert len(odd) == 1 and load_questions(odd.spec).fingerprint() == odd.fingerprint()


def test_limits_keep_what_is_scored_together(tmp_path: Path) -> None:
    units = {kind: layout.unit for kind, layout in PUBLISHED.items() if layout.unit > 1}
    assert units == {"mmvp": 2, "naturalbench": 4}
    for kind, unit in units.items():
        with pytest.raises(ValueError, match=f"{kind} counts {unit} questions as one, so limit must be a multiple of {unit}"):
            load_questions(f"{kind}:{tmp_path}?limit=3")
    records = [{"task": task} for task in ("depth", "depth", "count", "depth", "count")]
    items = [QuestionItem(str(k), (), "?", record) for k, record in enumerate(records)]
    assert [item.id for item in first_items(items, 1, "task")] == ["0", "2"] and len(
        list(first_items(items, None, "task"))
    ) == 5


def test_only_the_answered_split_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(source: str, **options: Any) -> str:
        asked.update(options, source=source)
        return str(vqav2(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    load_questions("vqav2:lmms-lab/VQAv2")
    assert asked == {"source": "lmms-lab/VQAv2", "repo_type": "dataset", "allow_patterns": ["data/validation-*"]}


# --- what is broken -------------------------------------------------------------------------------


def without(rows: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


def changed(row: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (MMVP_ROWS[:3], "Index 2 is missing, the other half of the pair of 1"),
        (MMVP_ROWS[1:], "Index 3 is missing, the other half of the pair of 4"),
        ([*MMVP_ROWS, MMVP_ROWS[0]], r"Questions\.csv', line 6: each row needs an Index of its own \(found '3'\)"),
        (
            [("1", "x?", "(a) y (b) z", "(c)"), *MMVP_ROWS[3:]],
            r"line 2: .*Correct Answer \('\(c\)'\) that is one of its Options",
        ),
        (
            [("5", "x?", "(a) y (b) z", "(a)"), ("6", "x?", "(a) y (b) z", "(b)")],
            r"2 entries of .*Questions\.csv', line 2 names .*5\.jpg', which does not exist.*line 3 names .*6\.jpg'",
        ),
        ([], "has no items"),
    ],
)
def test_mmvp_that_is_broken(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(f"mmvp:{mmvp(tmp_path, rows)}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (without(NATURALBENCH_ROWS, "Answer"), r"test-00000-of-00001\.parquet' has no Answer; it has Index, Image, Question"),
        (NATURALBENCH_ROWS[:6], "Index 6 is missing; a group has four rows"),
        (
            [*NATURALBENCH_ROWS[:7], *changed(NATURALBENCH_ROWS[7], Index="3")],
            "Index '3': each row needs a whole number of its own",
        ),
        (
            [*NATURALBENCH_ROWS[:7], *changed(NATURALBENCH_ROWS[7], Question="x?")],
            "Index 6 and 7 ask one question of two images",
        ),
        (
            changed(NATURALBENCH_ROWS[0], Question_Type="open"),
            "Index '0': Question_Type is 'open'; known are yes_no, multiple_choice",
        ),
    ],
)
def test_naturalbench_that_is_broken(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(f"naturalbench:{naturalbench(tmp_path, rows)}")


def test_files_that_are_missing_or_leave_the_folder(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    cases: list[tuple[str, Path, str]] = [
        ("mmvp", folder("a"), r"a/Questions\.csv' does not exist"),
        ("blink", folder("b"), r"b' has no Parquet files of the split 'val' \(it has none\)"),
        (
            "vqav2",
            folder("c"),
            r"neither Parquet files of the split 'validation' nor v2_OpenEnded_mscoco_val2014_questions\.json",
        ),
        (
            "textvqa",
            textvqa(folder("d"), official=True, image="../secret"),
            r"entry 0 of data: '\.\./secret' leaves the folder",
        ),
        (
            "textvqa",
            textvqa(folder("e"), official=True, image="ffff"),
            r"TextVQA_0\.5\.1_val\.json', entry 0 of data names .*ffff\.jpg', which does not exist",
        ),
        ("gqa", gqa(folder("f"), image="n9"), "id '1': there is no image 'n9' in"),
        (
            "pope",
            pope(folder("g"), official=True, label="maybe"),
            "3 entries .*category 'random', question_id 1: the answer is 'maybe'; it must be yes or no.*category 'popular'",
        ),
        (
            "blink",
            blink(folder("n"), tasks=BLINK_TASKS[2:]),
            "has no Art_Style, Counting; BLINK's score is the mean of 14 tasks",
        ),
        ("blink", blink(folder("h"), answer="(C)"), r"idx 'val_Jigsaw_1': the answer '\(C\)' is none of \(A\), \(B\)"),
        (
            "vqav2",
            vqav2(folder("i"), official=True, answers=TEN[:9]),
            "2 entries .*question_id 42000: there are 9 answers; the score is defined on ten.*question_id 42001",
        ),
        (
            "cv-bench",
            cv_bench(folder("j"), changed(CV_ROWS[0], filename="/etc/passwd"), True),
            r"line 1: '/etc/passwd' leaves the folder",
        ),
        (
            "cv-bench",
            cv_bench(folder("k"), changed(CV_ROWS[0], filename="9.png"), True),
            r"test_2d\.jsonl', line 1 names .*img/9\.png', which does not exist",
        ),
        ("cv-bench", cv_bench(folder("l"), without(CV_ROWS, "source")), r"test_2d\.parquet' has no source; it has idx"),
    ]
    for kind, root, message in cases:
        with pytest.raises(ValueError, match=message):
            load_questions(f"{kind}:{root}")
    (vqav2(folder("m"), official=True) / "val2014").rename(tmp_path / "coco")
    with pytest.raises(
        ValueError, match=r"vqav2 needs the images of COCO val2014, and there is no val2014 in .*\?images=FOLDER"
    ):
        load_questions(f"vqav2:{tmp_path / 'm'}")
    assert len(load_questions(f"vqav2:{tmp_path / 'm'}?images={tmp_path / 'coco'}")) == 2
    (tmp_path / "m" / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match=r"entry 0 of questions: question_id 42000 has no annotation in .*annotations\.json"):
        load_questions(f"vqav2:{tmp_path / 'm'}?images={tmp_path / 'coco'}")
    (tmp_path / "m" / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"answers": []}))
    with pytest.raises(ValueError, match=r"annotations\.json' has no annotations; it has answers"):
        load_questions(f"vqav2:{tmp_path / 'm'}?images={tmp_path / 'coco'}")


def test_broken_images_are_named(tmp_path: Path) -> None:
    rows = [row | {"Image": {"bytes": b"no image", "path": "x.jpg"}} for row in NATURALBENCH_ROWS]
    benchmark = load_questions(f"naturalbench:{naturalbench(tmp_path, rows)}")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet, row 1 of group 3, Image' is not an image"):
        benchmark.items[0].images[0]()
    (mmvp(tmp_path) / "MMVP Images" / "1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.jpg' is empty"):
        load_questions(f"mmvp:{tmp_path}").items[0].images[0]()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mvp:x", r"names no benchmark of questions; valid are shapes-mmvp:N.*Did you mean 'mmvp'\?"),
        ("mmvp", "names no benchmark of questions"),
        ("shapes-vqa:0", "must be a whole number of at least 1"),
        ("shapes-blink:4?sed=1", r"unknown option 'sed'; shapes-blink takes seed\. Did you mean 'seed'\?"),
        ("mmvp:x?images=y", "unknown option 'images'; mmvp takes limit"),
        ("pope:x?limit=0", "limit is '0'; it must be a whole number of at least 1"),
        ("pope:no/such", "No benchmark at 'no/such': neither a folder, nor a dataset"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(spec)


# --- drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_benchmarks(kind: str) -> None:
    benchmark = load_questions(f"{kind}:20?seed=3")
    assert len(benchmark) == 20 * {"shapes-mmvp": 2, "shapes-naturalbench": 4}.get(kind, 1)
    assert len({item.id for item in benchmark.items}) == len(benchmark)
    assert load_questions(benchmark.spec).fingerprint() == benchmark.fingerprint() != load_questions(f"{kind}:20").fingerprint()
    assert (perfect(benchmark).value == 1).all()
    for item in benchmark.items:
        assert all(load().mode == "RGB" for load in item.images)
        assert "output" not in item.record


drawn = cache(load_questions)


def options(item: QuestionItem) -> tuple[str, ...]:
    return item.record.get("options", ("yes", "no"))


def words(item: QuestionItem) -> list[str]:
    return [f"{word} of {len(options(item))}" for word in ("", *item.question.lower().replace("?", "").split())]


def text_only(kind: str) -> Callable[[QuestionItem], str]:
    """Who has read many questions with their answers, and says what went most often with the words of this one."""
    seen: dict[str, Counter[str | int]] = defaultdict(Counter)
    for item in drawn(f"{kind}:360?seed=1").items:
        for word in words(item):
            seen[word].update([item.record["answer"], options(item).index(item.record["answer"])])

    def answer(item: QuestionItem) -> str:
        votes = [sum((seen[word][option] + seen[word][k]) / (sum(seen[word].values()) or 1) for word in words(item))
                 for k, option in enumerate(options(item))]  # fmt: skip
        return options(item)[int(np.argmax(votes))]

    return answer


GUESSES: dict[str, Callable[[QuestionItem], str]] = {
    "first": lambda item: options(item)[0],
    "last": lambda item: options(item)[-1],
    "yes": lambda item: "yes",
}


@pytest.mark.parametrize("guess", ["first", "last", "yes", "words"])
@pytest.mark.parametrize("kind", DRAWN)
def test_who_does_not_look_is_at_chance(kind: str, guess: str) -> None:
    benchmark = drawn(f"{kind}:360")
    answer = text_only(kind) if guess == "words" else GUESSES[guess]
    rows = SCORERS[benchmark.scorer]([{**item.record, "output": answer(item)} for item in benchmark.items], level=0.999)
    if benchmark.scorer in ("mmvp", "naturalbench"):
        # the same text is asked of two images with opposite answers: half of the items, and no pair, for any such guess
        values = rows.set_index("score").value.to_dict()
        assert values["item"] <= 0.5 and max(values.get("pair", 0), values.get("question", 0), values.get("group", 0)) == 0
        if guess != "yes":
            assert values["item"] == 0.5
        return
    asked = rows if guess != "yes" else rows[rows.group.isin(["existence"])]
    assert (asked.low <= asked.chance).all(), asked[["group", "value", "low", "chance"]]
    if guess in ("first", "last"):
        assert (asked.high >= asked.chance).all(), asked[["group", "value", "high", "chance"]]


def test_scenes_ask_every_category_in_turn() -> None:
    items = drawn("shapes-vqa:360").items
    assert set(Counter(item.record["task"] for item in items).values()) == {40} and len(CATEGORIES) == 9
    assert len({item.id.rpartition("-")[0] for item in items}) == 360  # one question a scene
    counted = Counter(item.record["answer"] for item in items if item.record["task"] == "count")
    assert set(counted) == {"one", "two", "three", "four"} and max(counted.values()) <= 18


def named(image: np.ndarray) -> set[str]:
    """The colours that a drawn image has, backgrounds being grey."""
    return {name for name, colour in NAMED.items() if (np.abs(image - np.array(colour)).sum(-1) < 12).sum() > 8}


def test_several_images_show_what_is_asked() -> None:
    """The answers are true of the pixels, by measures that know nothing of how the items were drawn."""
    for index in range(60):
        item = several_images(5, index)
        place = item.options.index(item.answer)
        images = [np.asarray(load()).astype(int) for load in item.images]
        shown = images[ORDINALS.index(item.options[0]) :]
        if item.task == "jigsaw":  # the piece continues the colours along the cut
            left, top = images[0][64:, 63], images[0][63, 64:]
            breaks = [np.abs(one[:, 0] - left).mean() + np.abs(one[0] - top).mean() for one in shown]
            assert np.argmin(breaks) == place, index
        elif item.task == "find":
            assert item.text.split()[4] in named(shown[place]), index
        elif item.task == "more":  # objects of one of these scenes differ in colour
            assert np.argmax([len(named(one)) for one in shown]) == place, index
        elif item.task == "same":
            assert named(shown[place]) == named(images[0]), index
        assert len(shown) == len(item.options) and len(set(map(bytes, (one.tobytes() for one in shown)))) == len(shown)


def test_answers_of_several_images_take_turns() -> None:
    places = Counter((item.task, item.answer) for item in (several_images(0, index) for index in range(80)))
    for task in TASKS:
        counts = [count for (name, _), count in places.items() if name == task]
        assert len(set(counts)) == 1 and len(counts) in (2, 4)
    texts = {task: {several_images(0, 5 * turn + list(TASKS).index(task)).text for turn in range(8)} for task in TASKS}
    assert all(len(texts[task]) == 1 for task in ("more", "same", "jigsaw"))
