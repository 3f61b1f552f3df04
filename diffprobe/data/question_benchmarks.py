"""Benchmarks that ask questions about images: the hub's layouts, local copies of them, and drawn twins, as one small type.

A spec names a kind and a source, ``mmvp:MMVP/MMVP`` or ``pope:copies/pope?images=coco/val2014``, as for
`diffprobe.data.benchmarks.load_benchmark`.  Each item has the whole text that is put to the model, options included as
the benchmark's own protocol words them, and a record with what its scorer wants besides the output.

The invariant: answers are the dataset's own.  Harnesses correct some of them (lmms-eval swaps MMVP's at items 99 and 100,
279 and 280); their scores are of another benchmark then.

Layouts and protocols ("seen": columns and file names were checked against the published card, the official code or the
harness that reads it; "known": written from knowledge of the format):

- MMVP (Tong et al. 2024, hub MMVP/MMVP; seen): ``Questions.csv`` with Index, Question, Options ("(a) Open (b) Closed"),
  Correct Answer ("(a)"); image k is ``MMVP Images/k.jpg``; items 2k - 1 and 2k are a pair.  Asked as the official script
  does: the question, a space, the options.
- NaturalBench (Li et al. 2024, hub BaiqiL/NaturalBench-lmms-eval, test; seen but for Answer): Parquet with Index, Image,
  Question, Answer, Question_Type (yes_no or multiple_choice); rows 4g to 4g + 3 are question 0 on images 0 and 1, then
  question 1 on images 0 and 1.  The official sentence for the type follows the question.
- BLINK (Fu et al. 2024, hub BLINK-Benchmark/BLINK, val; seen): a folder of Parquet for each of 14 tasks with idx,
  sub_task, image_1 to image_4 (empty where there are fewer), choices, answer ("(A)"), prompt, which is what is asked.
- GQA (Hudson & Manning 2019, hub lmms-lab/GQA, testdev balanced; seen): ``testdev_balanced_images`` (id, image) and
  ``testdev_balanced_instructions`` (id, imageId, question, answer), Parquet.
- VQAv2 (Goyal et al. 2017): hub lmms-lab/VQAv2, validation (seen): question_id, image_id, question, answers ({answer, ...}
  ten times), answer_type, image.  Official (known): the two JSON files of val2014 and COCO's images.
- TextVQA (Singh et al. 2019): hub lmms-lab/textvqa, validation (seen): question_id, image_id, question, answers (ten
  texts), image.  Official (known): ``TextVQA_0.5.1_val.json`` and ``train_images``.  No OCR tokens are given.
- POPE (Li et al. 2023): hub lmms-lab/POPE, test (seen): question_id, question, answer, image_source, image, category.
  Official (known): ``coco_pope_{random,popular,adversarial}.json``, lines of question_id, image, text, label; val2014.
- CV-Bench (Tong et al. 2024, Cambrian-1, hub nyu-visionx/CV-Bench, test; seen): ``test_2d`` and ``test_3d`` as Parquet, or
  JSON lines and a folder ``img``, with idx, choices, answer ("(A)"), prompt, source, filename.  After the prompt comes the
  sentence of Cambrian-1's evaluation.
- LLaVA-Bench in the wild (Liu et al. 2023, hub lmms-lab/llava-bench-in-the-wild; seen): Parquet with question_id, question,
  image, caption, gpt_answer, category.  The record holds what a judge reads: context and reference.

GQA, VQAv2, TextVQA and POPE have no wording of their own; the sentence that LLaVA-1.5 appends is used.

Drawn: ``shapes-mmvp:N`` (pairs) and ``shapes-naturalbench:N`` (groups) are `diffprobe.data.twins`; ``shapes-vqa:N`` asks one
question each of N test scenes, ``shapes-blink:N`` is `diffprobe.data.several`; these two have BLINK's scorer, by
category and by task.  Their options stand in the question itself.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffprobe.data import ShapesDataset, TwinsDataset, iterate
from diffprobe.data.benchmarks import (
    Loader,
    _check_columns,
    _check_ids,
    _csv_rows,
    _existing,
    _image_folder,
    _json,
    _json_lines,
    _parquet_rows,
    benchmark_folder,
    pictures_digest,
)
from diffprobe.data.files import inside, read_text
from diffprobe.data.images import read_image
from diffprobe.data.questions import CATEGORIES
from diffprobe.data.samples import check_options, split_spec, whole_number
from diffprobe.data.several import several_images

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5
LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5, Cambrian-1
NATURALBENCH = {
    "yes_no": " Please answer Yes or No.",
    "multiple_choice": " Please output the letter corresponding to the correct option.",
}


_SCENES = 10**9  # as many as anybody asks for; they are drawn when their turn comes


@dataclass(frozen=True)
class QuestionItem:
    """One question about one or more images.

    Attributes:
        id: Unique in its benchmark.
        images: What reads or draws each image, RGB, in the order of the question.
        question: The whole text that is put to the model.
        record: What the scorer wants besides `output`.
    """

    id: str
    images: tuple[Loader, ...]
    question: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class QuestionBenchmark:
    """Items in the order that the scorer wants them, and its name, a key of `diffprobe.mllm.evaluate.SCORERS`."""

    name: str
    scorer: str
    spec: str
    items: tuple[QuestionItem, ...]

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Hash of every id, question and record, and of the pictures."""
        digest = hashlib.sha256(self.scorer.encode())
        for item in self.items:
            digest.update(repr((item.id, item.question, dict(item.record), len(item.images))).encode())
        return hashlib.sha256(f"{digest.hexdigest()}{pictures_digest(self.items)}".encode()).hexdigest()[:16]


def load_questions(spec: str) -> QuestionBenchmark:
    """The benchmark that a short text names.

    ``shapes-mmvp:N`` (N pairs), ``shapes-naturalbench:N`` (N groups), ``shapes-vqa:N`` and ``shapes-blink:N`` (N items) are
    drawn, with the option ``seed``;
    ``KIND:SOURCE`` is a published one, SOURCE being a folder or a hub id, of which ``limit`` takes the first items (of each
    task or source where their mean is the score);
    ``images`` is the folder of the images where the official files of VQAv2, TextVQA and POPE name them only.

    Raises:
        ValueError: the text names no benchmark, or a file, column or id of it is missing; the message names it.

    >>> benchmark = load_questions("shapes-mmvp:2?seed=1")
    >>> len(benchmark), benchmark.scorer, benchmark.items[0].question
    (4, 'mmvp', 'Does the blue arrow point right or up?')
    >>> benchmark.items[0].record
    {'options': ('right', 'up'), 'answer': 'up'}
    """
    kind, source, given = split_spec(spec)
    if kind in DRAWN and source:
        count = whole_number(spec, "the number after ':'", source, at_least=1)
        seed = whole_number(spec, "seed", check_options(spec, kind, given, ("seed",)).get("seed", "0"))
        scorer, draw = DRAWN[kind]
        return QuestionBenchmark(f"{kind}-{seed}", scorer, f"{kind}:{count}?seed={seed}", tuple(draw(count, seed)))
    if kind not in READERS or not source:
        near = get_close_matches(kind, [*DRAWN, *READERS], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{spec!r} names no benchmark of questions; valid are {FORMS}.{hint}")
    options = check_options(spec, kind, given, ("images", "limit") if kind in WITH_IMAGES else ("limit",))
    limit = whole_number(spec, "limit", options["limit"], at_least=1) if "limit" in options else None
    images = Path(options["images"]).expanduser() if "images" in options else None
    read, patterns = READERS[kind]
    if limit and limit % UNITS.get(kind, 1):
        raise ValueError(
            f"{spec!r}: {kind} counts {UNITS[kind]} questions as one, so limit must be a multiple of {UNITS[kind]}."
        )
    items = tuple(_first(read(benchmark_folder(source, patterns), images), limit, PARTS.get(kind, "")))
    _check_ids(spec, [item.id for item in items])
    return QuestionBenchmark(kind, kind, spec, items)


def _first(items: Iterable[QuestionItem], limit: int | None, part: str) -> Iterator[QuestionItem]:
    """The first items, of each part where the records name one."""
    if not part or limit is None:
        yield from islice(items, limit)
        return
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.record[part]] += 1
        if seen[item.record[part]] <= limit:
            yield item


# --- drawn ----------------------------------------------------------------------------------------


def _mmvp_twins(count: int, seed: int) -> Iterator[QuestionItem]:
    """Two items a pair: the same question of either image."""
    dataset = TwinsDataset("mmvp", count, seed)
    for number in range(len(dataset)):
        sample = dataset[number]
        (question,) = sample.questions
        record = {"options": question.options, "answer": question.answer}
        yield QuestionItem(sample.id, (sample.load,), question.text, record)


def _naturalbench_twins(count: int, seed: int) -> Iterator[QuestionItem]:
    """Four items a group: question 0 on images 0 and 1, then question 1 on images 0 and 1."""
    dataset = TwinsDataset("naturalbench", count, seed)
    for number in range(count):
        sides = [dataset[2 * number], dataset[2 * number + 1]]
        for asked in range(2):
            for sample in sides:
                question = sample.questions[asked]
                record = {"answer": question.answer, "kind": "yes_no"}
                yield QuestionItem(f"{sample.id}-q{asked}", (sample.load,), question.text, record)


def _scene_questions(count: int, seed: int) -> Iterator[QuestionItem]:
    """One question a scene, so that items are independent; categories take turns.

    A scene that has no question of the category whose turn it is is passed over, not asked something else: the answers of
    a category are balanced over the scenes that have it, not over those that lack another.
    """
    dataset, turns = ShapesDataset(_SCENES, "test", seed), list(CATEGORIES)
    samples = iterate(dataset)
    for number in range(count):
        category = turns[number % len(turns)]
        sample, question = next(
            (sample, question) for sample in samples for question in sample.questions if question.category == category
        )
        record = {"task": category, "options": question.options, "answer": question.answer}
        yield QuestionItem(f"{sample.id}-{category}", (sample.load,), question.text, record)


def _several(count: int, seed: int) -> Iterator[QuestionItem]:
    for number in range(count):
        item = several_images(seed, number)
        record = {"task": item.task, "options": item.options, "answer": item.answer}
        yield QuestionItem(f"shapes-blink-{seed}-{number:06d}", item.images, item.text, record)


# --- multiple choice ------------------------------------------------------------------------------


def read_mmvp(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """The items of MMVP by Index, pairs complete."""
    source = folder / "Questions.csv"
    rows: dict[int, tuple[str, str, str]] = {}
    columns = ("Index", "Question", "Options", "Correct Answer")
    for line, (index, question, options, answer) in enumerate(_csv_rows(source, columns), 2):
        if not index.isdigit() or int(index) in rows or not question or not answer or answer not in options:
            raise ValueError(
                f"'{source}', line {line}: each row needs an Index of its own (found {index!r}), a Question ({question!r}) "
                f"and a Correct Answer ({answer!r}) that is one of its Options ({options!r})."
            )
        rows[int(index)] = (question, options, answer)
    for number in sorted(rows):
        if (other := number + 1 if number % 2 else number - 1) not in rows:
            raise ValueError(f"'{source}': Index {other} is missing, the other half of the pair of {number}.")
        question, options, answer = rows[number]
        path = _existing(folder / "MMVP Images" / f"{number}.jpg", source)
        record = {"options": options, "answer": answer}
        yield QuestionItem(f"mmvp-{number:03d}", (partial(read_image, path),), f"{question} {options}", record)


def read_naturalbench(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """The groups of NaturalBench, four items each, by Index."""
    columns = ("Index", "Image", "Question", "Answer", "Question_Type")
    rows: dict[int, dict[str, Any]] = {}
    for row in _parquet_rows(_tables(folder, "test"), folder, columns, ("Image",)):
        where = f"'{folder}', Index {row['Index']!r}"
        if not str(row["Index"]).isdigit() or int(row["Index"]) in rows:
            raise ValueError(f"{where}: each row needs a whole number of its own.")
        if row["Question_Type"] not in NATURALBENCH:
            raise ValueError(f"{where}: Question_Type is {row['Question_Type']!r}; known are {', '.join(NATURALBENCH)}.")
        rows[int(row["Index"])] = row
    for index in range(4 * -(-len(rows) // 4)):
        if index not in rows:
            raise ValueError(f"'{folder}': Index {index} is missing; a group has four rows, 4g to 4g + 3.")
        row, (group, within) = rows[index], divmod(index, 4)
        if within % 2 and row["Question"] != rows[index - 1]["Question"]:
            raise ValueError(
                f"'{folder}': Index {index - 1} and {index} ask one question of two images; their questions differ."
            )
        record = {"answer": str(row["Answer"]), "kind": row["Question_Type"]}
        text = f"{row['Question']}{NATURALBENCH[row['Question_Type']]}"
        yield QuestionItem(f"naturalbench-{group:04d}-q{within // 2}-i{within % 2}", (row["Image"],), text, record)


BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw", "Multi-view_Reasoning",
    "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
    "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip
BLINK_IMAGES = ("image_1", "image_2", "image_3", "image_4")


def read_blink(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """The tasks of BLINK by name, all 14, whose mean is the score; their test split has no answers and is passed over."""
    tables = _tables(folder, "val")
    if absent := [task for task in BLINK_TASKS if task not in {path.parent.name for path in tables}]:
        raise ValueError(f"'{folder}' has no {', '.join(absent)}; BLINK's score is the mean of {len(BLINK_TASKS)} tasks.")
    columns = ("idx", "sub_task", *BLINK_IMAGES, "choices", "answer", "prompt")
    for row in _parquet_rows(tables, folder, columns, BLINK_IMAGES, BLINK_IMAGES):
        options = _choices(f"'{folder}', idx {row['idx']!r}", row)
        loaders = tuple(row[name] for name in BLINK_IMAGES if row[name] is not None)
        if not loaders:
            raise ValueError(f"'{folder}', idx {row['idx']!r} has no image; copy the benchmark again.")
        record = {"task": str(row["sub_task"]), "options": options, "answer": str(row["answer"])}
        yield QuestionItem(f"blink-{row['idx']}", loaders, str(row["prompt"]), record)


def read_cv_bench(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """CV-Bench from Parquet, or from JSON lines and the folder ``img``."""
    columns = ("idx", "choices", "answer", "prompt", "source")
    tables, lines = _tables(folder, "test", absent_ok=True), sorted(folder.glob("test*.jsonl"))
    if lines and not tables:
        rows = _cv_bench_lines(folder, lines, (*columns, "filename"))
    else:
        rows = _parquet_rows(_tables(folder, "test", "test_2d.jsonl"), folder, (*columns, "image"), ("image",))
    for row in rows:
        options = _choices(f"'{folder}', idx {row['idx']!r}", row)
        record = {"source": str(row["source"]), "options": options, "answer": str(row["answer"])}
        yield QuestionItem(f"cv-bench-{row['idx']}", (row["image"],), f"{row['prompt']}{LETTER}", record)


def _cv_bench_lines(folder: Path, sources: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for source in sources:
        for where, row in _json_lines(source, columns):
            name = inside(where, str(row["filename"]))
            path = _existing(folder / (name if name.startswith("img/") else f"img/{name}"), source)
            yield row | {"image": partial(read_image, path)}


def _choices(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of a row, among which its lettered answer must be."""
    options = tuple(str(choice) for choice in row["choices"] or ())
    letters = [f"({chr(ord('A') + k)})" for k in range(len(options))]
    if len(options) < 2 or row["answer"] not in letters:
        raise ValueError(f"{where}: the answer {row['answer']!r} is none of {', '.join(letters) or 'no choices'}.")
    return options


# --- short answers --------------------------------------------------------------------------------


def read_gqa(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """GQA's balanced testdev; one image has many questions."""
    asked, shown = folder / "testdev_balanced_instructions", folder / "testdev_balanced_images"
    pictures = {
        row["id"]: row["image"] for row in _parquet_rows(_tables(shown, "testdev"), folder, ("id", "image"), ("image",))
    }
    for row in _parquet_rows(_tables(asked, "testdev"), folder, ("id", "imageId", "question", "answer"), ()):
        if row["imageId"] not in pictures:
            raise ValueError(f"'{asked}', id {row['id']!r}: there is no image {row['imageId']!r} in '{shown}'; copy it again.")
        record = {"answer": row["answer"], "image": row["imageId"]}
        yield QuestionItem(f"gqa-{row['id']}", (pictures[row["imageId"]],), f"{row['question']}{SHORT}", record)


VQA_QUESTIONS, VQA_ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def read_vqav2(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """VQAv2's validation questions from Parquet, or from the official JSON files."""
    columns = ("question_id", "image_id", "question", "answers", "answer_type", "image")
    if (folder / VQA_QUESTIONS).is_file():
        rows = _vqav2_official(folder, images)
    else:
        rows = _parquet_rows(_tables(folder, "validation", VQA_QUESTIONS), folder, columns, ("image",))
    for row in rows:
        answers = [str(answer["answer"]) for answer in row["answers"] or ()]
        record = {"answers": answers, "image": str(row["image_id"]), "answer_type": row["answer_type"]}
        yield _ten_answers("vqav2", folder, row, record)


def _vqav2_official(folder: Path, images: Path | None) -> Iterator[dict[str, Any]]:
    asked, answered = folder / VQA_QUESTIONS, folder / VQA_ANSWERS
    pictures = _image_folder("vqav2", folder, images, "COCO val2014", [folder / "val2014", folder / "images"])
    truths = {}
    for where, row in _entries(answered, "annotations", ("question_id", "answers", "answer_type")):
        if any("answer" not in answer for answer in row["answers"]):
            raise ValueError(f"{where}: each of its answers needs an 'answer'.")
        truths[row["question_id"]] = row
    for where, row in _entries(asked, "questions", ("question_id", "image_id", "question")):
        if row["question_id"] not in truths:
            raise ValueError(f"{where}: question_id {row['question_id']!r} has no annotation in '{answered}'.")
        if not isinstance(row["image_id"], int):
            raise ValueError(f"{where}: image_id is {row['image_id']!r}; COCO's are whole numbers.")
        path = _existing(pictures / f"COCO_val2014_{row['image_id']:012d}.jpg", asked)
        yield truths[row["question_id"]] | row | {"image": partial(read_image, path)}


TEXTVQA_FILE = "TextVQA_0.5.1_val.json"


def read_textvqa(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """TextVQA's validation questions from Parquet, or from the official JSON file."""
    columns = ("question_id", "image_id", "question", "answers")
    if (folder / TEXTVQA_FILE).is_file():
        rows = _textvqa_official(folder, images, columns)
    else:
        rows = _parquet_rows(_tables(folder, "validation", TEXTVQA_FILE), folder, (*columns, "image"), ("image",))
    for row in rows:
        record = {"answers": [str(answer) for answer in row["answers"] or ()], "image": str(row["image_id"])}
        yield _ten_answers("textvqa", folder, row, record)


def _textvqa_official(folder: Path, images: Path | None, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    source = folder / TEXTVQA_FILE
    pictures = _image_folder("textvqa", folder, images, "TextVQA", [folder / "train_images", folder / "images"])
    for where, row in _entries(source, "data", columns):
        path = _existing(pictures / f"{inside(where, str(row['image_id']))}.jpg", source)
        yield row | {"image": partial(read_image, path)}


def _ten_answers(kind: str, folder: Path, row: Mapping[str, Any], record: Mapping[str, Any]) -> QuestionItem:
    if len(record["answers"]) != 10:
        raise ValueError(
            f"'{folder}', question_id {row['question_id']!r} has {len(record['answers'])} answers; the score is defined on ten."
        )
    return QuestionItem(f"{kind}-{row['question_id']}", (row["image"],), f"{row['question']}{SHORT}", record)


POPE_CATEGORIES = ("random", "popular", "adversarial")


def read_pope(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """POPE's three categories from Parquet, or from the official files about COCO."""
    lines = [path for name in POPE_CATEGORIES if (path := folder / f"coco_pope_{name}.json").is_file()]
    if lines:
        rows = _pope_official(folder, images, lines)
    else:
        columns = ("question_id", "question", "answer", "image_source", "image", "category")
        rows = _parquet_rows(_tables(folder, "test", "coco_pope_random.json"), folder, columns, ("image",))
    for row in rows:
        record = {"answer": row["answer"], "image": row["image_source"], "category": row["category"]}
        where = f"'{folder}', {row['category']}, question_id {row['question_id']!r}"
        if str(row["answer"]).lower() not in ("yes", "no"):
            raise ValueError(f"{where}: the answer is {row['answer']!r}; it must be yes or no.")
        yield QuestionItem(f"pope-{row['category']}-{row['question_id']}", (row["image"],), f"{row['question']}{SHORT}", record)


def _pope_official(folder: Path, images: Path | None, sources: Sequence[Path]) -> Iterator[dict[str, Any]]:
    pictures = _image_folder("pope", folder, images, "COCO val2014", [folder / "val2014", folder / "images"])
    for source in sources:
        for where, row in _json_lines(source, ("question_id", "image", "text", "label")):
            name = inside(where, str(row["image"]))
            yield {
                "question_id": row["question_id"],
                "question": str(row["text"]),
                "answer": row["label"],
                "image_source": Path(name).stem,
                "image": partial(read_image, _existing(pictures / name, source)),
                "category": source.stem.removeprefix("coco_pope_"),
            }


def read_llava_bench(folder: Path, images: Path | None = None) -> Iterator[QuestionItem]:
    """LLaVA-Bench in the wild; its scorer asks the user's judge."""
    columns = ("question_id", "question", "image", "caption", "gpt_answer", "category")
    for row in _parquet_rows(_tables(folder, "train"), folder, columns, ("image",)):
        record = {
            "category": row["category"],
            "question": row["question"],
            "context": row["caption"],
            "reference": row["gpt_answer"],
        }
        yield QuestionItem(f"llava-bench-{row['question_id']}", (row["image"],), str(row["question"]), record)


# --- files ----------------------------------------------------------------------------------------


def _tables(folder: Path, split: str, other: str = "", absent_ok: bool = False) -> list[Path]:
    """The Parquet files of one split, whose names are the split's or begin with it."""
    every = sorted(folder.rglob("*.parquet"))
    found = [path for path in every if path.stem == split or path.stem.startswith((f"{split}-", f"{split}_"))]
    if not found and not absent_ok:
        missing = (
            f"neither Parquet files of the split {split!r} nor {other}" if other else f"no Parquet files of the split {split!r}"
        )
        has = f"it has {every[0].relative_to(folder)}" if every else "it has none"
        raise ValueError(f"'{folder}' has {missing} ({has}); is it a whole copy of the benchmark?")
    return found


def _entries(source: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in the list `name` of a JSON file, and where each stands."""
    if not source.is_file():
        raise ValueError(f"'{source}' does not exist; is '{source.parent}' a whole copy of the benchmark?")
    found = _json(read_text(source), f"'{source}'")
    _check_columns(f"'{source}'", found, (name,))
    for number, row in enumerate(found[name]):
        where = f"'{source}', entry {number} of {name}"
        _check_columns(where, row, columns)
        yield where, row


Reader = Callable[[Path, Path | None], Iterator[QuestionItem]]
DRAWN: dict[str, tuple[str, Callable[[int, int], Iterator[QuestionItem]]]] = {
    "shapes-mmvp": ("mmvp", _mmvp_twins),
    "shapes-naturalbench": ("naturalbench", _naturalbench_twins),
    "shapes-vqa": ("blink", _scene_questions),
    "shapes-blink": ("blink", _several),
}
# What reads a benchmark, and which files of the hub's dataset it needs; the name is the scorer's too.
READERS: dict[str, tuple[Reader, list[str] | None]] = {
    "mmvp": (read_mmvp, None),
    "naturalbench": (read_naturalbench, None),
    "blink": (read_blink, ["*/val-*"]),
    "cv-bench": (read_cv_bench, ["test*.parquet"]),
    "gqa": (read_gqa, ["testdev_balanced_*/*"]),
    "vqav2": (read_vqav2, ["data/validation-*"]),
    "textvqa": (read_textvqa, ["data/validation-*"]),
    "pope": (read_pope, ["data/test-*"]),
    "llava-bench": (read_llava_bench, None),
}
WITH_IMAGES = ("vqav2", "textvqa", "pope")
UNITS = {"mmvp": 2, "naturalbench": 4}  # questions that are counted as one
PARTS = {"blink": "task", "cv-bench": "source"}  # whose mean is the score
FORMS = (
    ", ".join([*(f"{kind}:N" for kind in DRAWN), *(f"{kind}:SOURCE" for kind in READERS)])
    + f" (SOURCE is a folder or a hub id; {', '.join(WITH_IMAGES)} take ?images=FOLDER)"
)
