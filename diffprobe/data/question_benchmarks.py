"""Benchmarks that ask questions about images: the hub's layouts, local copies of them, and drawn ones, as one small type.

A spec names a kind and a source, ``mmvp:MMVP/MMVP`` or ``pope:copies/pope?images=coco/val2014``, as for
`diffprobe.data.benchmarks.load_benchmark`.  Each item has the whole text that is put to the model, options included as
the benchmark's own protocol words them, and a record with what its scorer wants besides the output.

The invariants: answers are the dataset's own (lmms-eval swaps MMVP's at items 99 and 100, 279 and 280, so its scores are of
another benchmark); all entries are checked before the first is asked, and a message lists all that are at fault.

What `LAYOUTS` takes from the hub's tables was checked against the published card, the official code or the harness that reads
it (but for NaturalBench's Answer); the official files of VQAv2, TextVQA and POPE are written from knowledge of their format.

- MMVP (Tong et al. 2024, hub MMVP/MMVP): ``Questions.csv``; image k is ``MMVP Images/k.jpg``; items 2k - 1 and 2k are a pair.
  Asked as the official script does: the question, a space, the options ("(a) Open (b) Closed").
- NaturalBench (Li et al. 2024, hub BaiqiL/NaturalBench-lmms-eval, test): rows 4g to 4g + 3 are question 0 on images 0 and 1,
  then question 1 on images 0 and 1.  The official sentence for the type follows the question.
- BLINK (Fu et al. 2024, hub BLINK-Benchmark/BLINK, val): a folder for each of 14 tasks.
- GQA (Hudson & Manning 2019, hub lmms-lab/GQA, testdev balanced): images and questions in two tables.
- VQAv2 (Goyal et al. 2017): hub lmms-lab/VQAv2, validation; or the two JSON files of val2014 and COCO's images.
- TextVQA (Singh et al. 2019): hub lmms-lab/textvqa, validation; or its JSON file and ``train_images``.  No OCR tokens are given.
- POPE (Li et al. 2023): hub lmms-lab/POPE, test; or ``coco_pope_{random,popular,adversarial}.json`` and val2014.
- CV-Bench (Tong et al. 2024, Cambrian-1, hub nyu-visionx/CV-Bench, test): Parquet, or JSON lines and a folder ``img``.  After
  the prompt comes the sentence of Cambrian-1's evaluation.
- LLaVA-Bench in the wild (Liu et al. 2023, hub lmms-lab/llava-bench-in-the-wild): the record holds what a judge reads.

GQA, VQAv2, TextVQA and POPE have no wording of their own; the sentence that LLaVA-1.5 appends is used.

Drawn: ``shapes-mmvp:N`` (pairs) and ``shapes-naturalbench:N`` (groups) are `diffprobe.data.twins`; ``shapes-vqa:N`` asks one
question each of N test scenes, ``shapes-blink:N`` is `diffprobe.data.several`; these two have BLINK's scorer, by category and by
task.  Their options stand in the question itself.

Your own: ``jsonl:FILE?images=FOLDER`` has a question a line (`own_questions`).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffprobe.data import ShapesDataset, TwinsDataset, iterate
from diffprobe.data.files import check_unicode, file_inside, inside, numbered_lines, read_text, real_path
from diffprobe.data.images import read_image
from diffprobe.data.questions import CATEGORIES, YES_NO
from diffprobe.data.samples import check_options, did_you_mean, split_spec, whole_number
from diffprobe.data.several import several_images
from diffprobe.data.tables import (
    Loader,
    benchmark_folder,
    check_columns,
    check_ids,
    collected,
    csv_rows,
    image_file,
    image_folder,
    items_digest,
    json_object,
    parquet_rows,
)

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5
LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5, Cambrian-1
NATURALBENCH = {
    "yes_no": " Please answer Yes or No.",
    "multiple_choice": " Please output the letter corresponding to the correct option.",
}
Row = Mapping[str, Any]
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
        texts = [(item.id, item.question, dict(item.record), len(item.images)) for item in self.items]
        return items_digest(self.scorer, texts, [load for item in self.items for load in item.images])


def load_questions(spec: str) -> QuestionBenchmark:
    """The benchmark that a short text names.

    ``shapes-mmvp:N`` (N pairs), ``shapes-naturalbench:N`` (N groups), ``shapes-vqa:N`` and ``shapes-blink:N`` (N items) are
    drawn, with the option ``seed``.  ``KIND:SOURCE`` is a published one, SOURCE being a folder or a hub id; ``limit`` takes
    its first items (of each task or source where their mean is the score); ``images`` is the folder of the images where
    official files only name them (VQAv2, TextVQA, POPE).  ``jsonl:FILE`` holds your own (`own_questions`).

    Raises:
        ValueError: The text names no benchmark, or files, columns or entries of it are missing or wrong; the message names
            all entries that are.

    >>> benchmark = load_questions("shapes-mmvp:2?seed=1")
    >>> len(benchmark), benchmark.scorer, benchmark.items[0].question
    (4, 'mmvp', 'Does the blue arrow point right or up?')
    >>> benchmark.items[0].record
    {'options': ('right', 'up'), 'answer': 'up'}
    """
    kind, source, options = split_spec(spec)
    if kind == OWN and source:
        return own_questions(spec, source, options)
    if kind in DRAWN and source:
        check_options(spec, kind, options, ("seed",))
        count = whole_number(spec, "the number after ':'", source, at_least=1)
        seed = whole_number(spec, "seed", options.get("seed", "0"))
        scorer, draw = DRAWN[kind]
        return QuestionBenchmark(f"{kind}-{seed}", scorer, f"{kind}:{count}?seed={seed}", tuple(draw(count, seed)))
    if kind not in LAYOUTS or not source:
        hint = did_you_mean(kind, [*DRAWN, *LAYOUTS, OWN])
        raise ValueError(f"{spec!r} names no benchmark of questions; valid are {FORMS}.{hint}")
    layout = LAYOUTS[kind]
    check_options(spec, kind, options, ("images", "limit") if kind in WITH_IMAGES else ("limit",))
    limit = whole_number(spec, "limit", options["limit"], at_least=1) if "limit" in options else None
    if limit and limit % layout.unit:
        raise ValueError(
            f"{spec!r}: {kind} counts {layout.unit} questions as one, so limit must be a multiple of {layout.unit}."
        )
    folder = benchmark_folder(source, layout.files)
    images = Path(options["images"]).expanduser() if "images" in options else None
    rows = islice(layout.rows(folder, images), None if layout.part else limit)
    items = collected(repr(spec), (partial(layout.item, kind, folder, row) for row in rows))
    check_ids(spec, [item.id for item in items])
    return QuestionBenchmark(kind, kind, spec, tuple(first_items(items, limit, layout.part)))


def first_items(items: Iterable[QuestionItem], limit: int | None, part: str) -> Iterator[QuestionItem]:
    """The first items, of each part where the records name one."""
    seen: Counter[str] = Counter()
    for item in items:
        name = item.record[part] if part else ""
        seen[name] += 1
        if limit is None or seen[name] <= limit:
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


DRAWN: dict[str, tuple[str, Callable[[int, int], Iterator[QuestionItem]]]] = {
    "shapes-mmvp": ("mmvp", _mmvp_twins),
    "shapes-naturalbench": ("naturalbench", _naturalbench_twins),
    "shapes-vqa": ("blink", _scene_questions),
    "shapes-blink": ("blink", _several),
}


# --- your own -------------------------------------------------------------------------------------

OWN = "jsonl"
ASKED = ("letters", "plain")


def own_questions(spec: str, source: str, options: dict[str, str]) -> QuestionBenchmark:
    """Questions of a file of JSON lines, each an object with these entries; others are left alone.

    - ``question``: what is asked;
    - ``image``: the name of a file inside the folder of images, or a list of names;
    - ``options``: the possible answers, at least two, where it is a multiple choice;
    - ``answer``: with options, one of them or its letter; "yes" or "no", which are options by themselves; or a short answer;
      or ``answers``: a list, each of which is right; ten answers of people are scored as VQAv2's are;
    - ``id``: a name of its own, by default the line's number; ``category``: is scored apart too.

    Args:
        options: ``images``, the folder, by default that of the file; ``limit``; ``ask``: "letters" shows options by letter and
            adds the sentences of LLaVA-1.5, "plain" asks the question as it stands.

    Raises:
        ValueError: The file is missing or empty, or lines are wrong; the message names each of them.
    """
    check_options(spec, OWN, options, ("images", "limit", "ask"))
    limit = whole_number(spec, "limit", options["limit"], at_least=1) if "limit" in options else None
    if (ask := options.get("ask", ASKED[0])) not in ASKED:
        raise ValueError(f"{spec!r}: ask is {ask!r}; it is one of {', '.join(ASKED)}.")
    path = Path(source).expanduser()
    folder = real_path(options.get("images", path.parent))
    if not folder.is_dir():
        raise ValueError(f"{spec!r}: the folder of images '{folder}' does not exist; name it: {OWN}:{source}?images=FOLDER.")
    places: dict[str, str] = {}

    def read(where: str, line: str) -> QuestionItem:
        row = {key: value for key, value in json_object(line, where).items() if value is not None}
        faults, loaders = _own_images(where, row.get("image"), folder)
        record, more = _own_record(row, ask)
        faults += more
        question, name = row.get("question"), str(row.get("id", where.rpartition(" ")[2]))
        if not isinstance(question, str) or not question.strip():
            faults.append(f"question is {question!r}; it must be a text")
        faults += [
            f"{key} is {row[key]!r}; it must be a text or a number"
            for key in ("id", "category")
            if not _is_word(row.get(key, 0))
        ]
        if (place := places.setdefault(name, where)) != where:
            faults.append(f"id {name!r} stands in {place.rpartition(', ')[2]} too")
        if faults:
            raise ValueError(f"{where}: {', and '.join(faults)}.")
        check_unicode(where, json.dumps(row, ensure_ascii=False))
        record["image"] = row["image"] if isinstance(row["image"], str) else " ".join(row["image"])
        if "category" in row:
            record["category"] = str(row["category"])
        return QuestionItem(name, loaders, _own_text(str(question), record, ask), record)

    items = collected(repr(spec), (partial(read, *line) for line in islice(numbered_lines(path), limit)))
    check_ids(spec, [item.id for item in items])
    return QuestionBenchmark(f"{OWN}-{path.stem}", OWN, spec, tuple(items))


def _is_word(value: Any) -> bool:
    """Whether a JSON value is a text that is not empty, or a number."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, int | float) and not isinstance(value, bool)


def _own_images(where: str, given: Any, folder: Path) -> tuple[list[str], tuple[Loader, ...]]:
    """What is wrong with the images of a line, and what loads them."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        return [f"image is {given!r}; it must be the name of a file, or a list of names"], ()
    faults, found = [], []
    for name in names:
        try:
            if (path := file_inside(folder, inside(where, name))) is None:
                raise ValueError(f"there is no image {name!r} in '{folder}'")
            found.append(partial(read_image, path))
        except ValueError as error:
            faults.append(str(error).removeprefix(f"{where}: ").rstrip("."))
    return faults, tuple(found)


def _own_record(row: Row, ask: str) -> tuple[dict[str, Any], list[str]]:
    """What the scorer wants of a line, and what is wrong with it."""
    if ("answer" in row) == ("answers" in row):
        has = "has both" if "answer" in row else f"has neither (it has {', '.join(row) or 'nothing'})"
        return {}, [f"a line needs answer or answers, and this one {has}"]
    if "options" not in row:
        given = row.get("answers", [row.get("answer")])
        if not isinstance(given, list) or not given or not all(map(_is_word, given)):
            name, kind = ("answers", "a list of texts or numbers") if "answers" in row else ("answer", "a text or a number")
            return {}, [f"{name} is {row[name]!r}; it must be {kind}"]
        texts = [str(answer).strip() for answer in given]
        if "answer" in row and texts[0].lower() in YES_NO:
            return {"options": YES_NO, "answer": texts[0].lower()}, []
        return {"answers": texts} if "answers" in row else {"answer": texts[0]}, []
    if "answers" in row:
        return {}, ["a line with options needs answer, one of them, and this one has answers"]
    options, answer = row["options"], row["answer"]
    if not isinstance(options, list) or not all(map(_is_word, options)):
        return {}, [f"options are {options!r}; they must be a list of texts or numbers"]
    texts = [str(option).strip() for option in options]
    plain, letters = [text.lower() for text in texts], string.ascii_lowercase[: len(texts)]
    if not 2 <= len(set(plain)) == len(plain) <= len(string.ascii_lowercase):
        return {}, [f"options are {options!r}; there must be from 2 to 26 of them, each once"]
    if ask == "letters" and set(plain) & set(letters) and plain != list(letters):
        return {}, [f"options {', '.join(texts)} cannot be told from their letters; ask=plain shows no letters"]
    said = str(answer).strip().lower()
    if said in plain:
        place = plain.index(said)
    elif (letter := said.strip("().")) in [*letters]:  # a list, for a text holds the empty one
        place = letters.index(letter)
    else:
        named = f"the options {', '.join(texts)}, nor a letter from A to {letters[-1].upper()}"
        return {}, [f"answer {answer!r} is none of {named}"]
    return {"options": tuple(texts), "answer": f"({letters[place].upper()})" if ask == "letters" else texts[place]}, []


def _own_text(question: str, record: Row, ask: str) -> str:
    """What is put to the model."""
    if ask == "plain":
        return question
    if "options" not in record or record["options"] == YES_NO:
        return question + SHORT
    shown = zip(string.ascii_uppercase, record["options"], strict=False)
    return question + "".join(f"\n({letter}) {option}" for letter, option in shown) + LETTER


# --- published ------------------------------------------------------------------------------------

Maker = Callable[[], Row]  # makes a row, or raises ValueError where its entry is wrong
Rows = Callable[[Path, Path | None], Iterable[Maker]]  # of a benchmark's folder and the folder of images


@dataclass(frozen=True)
class Layout:
    """How the rows of a published benchmark become items.

    Attributes:
        key: Columns that name a row; the item's id is made of them.
        question: What is asked, a template over the columns.
        record: The column of each field that the scorer wants.
        check: Says what is wrong with a record, or "".
        split: Of its Parquet files, whose names are the split's or begin with it.
        images: Columns that hold images; those that are None are left out.
        read: Rows where they are not those of the split's Parquet files.
        official: Names of official files, and what reads their rows where there is no Parquet.
        files: Which files of the hub's dataset are downloaded; all by default.
        unit: Questions that are counted as one.
        part: The field whose values' mean is the score.
    """

    key: tuple[str, ...]
    question: str
    record: Mapping[str, str]
    check: Callable[[Row], str] = lambda record: ""
    split: str = ""
    images: tuple[str, ...] = ("image",)
    read: Rows | None = None
    official: tuple[str, Rows] | None = None
    files: list[str] | None = None
    unit: int = 1
    part: str = ""

    def rows(self, folder: Path, images: Path | None) -> Iterable[Maker]:
        """What makes each row: of Parquet files, or of official files where the folder has none."""
        if self.read is not None:
            return self.read(folder, images)
        name, official = self.official or ("", None)
        if official and any(folder.glob(name)) and not parquet_files(folder, self.split, None):
            return official(folder, images)
        tables = parquet_files(folder, self.split, name)
        return (partial(dict, row) for row in parquet_rows(tables, folder, self.columns, self.images))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that an item is made of, images among them."""
        asked = re.findall(r"\{(\w+)\}", self.question)
        return tuple(dict.fromkeys([*self.key, *asked, *self.record.values(), *self.images]))

    def item(self, kind: str, folder: Path, make: Maker) -> QuestionItem:
        """One row as an item; ValueError where the row is wrong, which names it."""
        row = make()
        record = {name: _field(name, row[column]) for name, column in self.record.items()}
        loaders = tuple(row[name] for name in self.images if row[name] is not None)
        fault = self.check(record) or ("" if loaders else "there is no image; copy the benchmark again")
        if fault:
            where = ", ".join(f"{name} {row[name]!r}" for name in self.key)
            raise ValueError(f"'{folder}', {where}: {fault}.")
        return QuestionItem(
            "-".join([kind, *(str(row[name]) for name in self.key)]), loaders, self.question.format(**row), record
        )


def _field(name: str, value: Any) -> Any:
    """A cell as the scorer wants it: text, a list of answers, or a tuple of options."""
    if name == "answers":  # {"answer": ...} each in VQAv2, texts in TextVQA
        return [str(answer["answer"] if isinstance(answer, Mapping) else answer) for answer in value or ()]
    if name == "options" and not isinstance(value, str):
        return tuple(str(option) for option in value or ())
    return str(value)


def check_choice(record: Row) -> str:
    """The answer must be the letter of an option."""
    letters = [f"({chr(ord('A') + k)})" for k in range(len(record["options"]))]
    good = len(letters) > 1 and record["answer"] in letters
    return "" if good else f"the answer {record['answer']!r} is none of {', '.join(letters) or 'no choices'}"


def check_ten(record: Row) -> str:
    """VQA's score is defined on ten human answers."""
    return "" if len(record["answers"]) == 10 else f"there are {len(record['answers'])} answers; the score is defined on ten"


def check_yes_no(record: Row) -> str:
    """POPE's answers are yes and no."""
    good = record["answer"].lower() in ("yes", "no")
    return "" if good else f"the answer is {record['answer']!r}; it must be yes or no"


def parquet_files(folder: Path, split: str, other: str | None = "") -> list[Path]:
    """The Parquet files of one split, whose names are the split's or begin with it.

    Raises:
        ValueError: There are none; the message names `other`, a file that could be there instead.  None: they may be absent.
    """
    every = sorted(folder.rglob("*.parquet"))
    found = [path for path in every if path.stem == split or path.stem.startswith((f"{split}-", f"{split}_"))]
    if not found and other is not None:
        files = f"Parquet files of the split {split!r}"
        missing = f"neither {files} nor {other}" if other else f"no {files}"
        has = f"it has {every[0].relative_to(folder)}" if every else "it has none"
        raise ValueError(f"'{folder}' has {missing} ({has}); is it a whole copy of the benchmark?")
    return found


# --- layouts of their own -------------------------------------------------------------------------


def _read_mmvp(folder: Path, images: Path | None) -> Iterable[Maker]:
    """The lines of ``Questions.csv`` by Index, pairs complete."""
    source, rows = folder / "Questions.csv", {}
    columns = ("Index", "Question", "Options", "Correct Answer")

    def read(where: str, *cells: str) -> None:
        index, question, options, answer = cells
        if not index.isdigit() or int(index) in rows or not question or not answer or answer not in options:
            raise ValueError(
                f"{where}: each row needs an Index of its own (found {index!r}), a Question ({question!r}) "
                f"and a Correct Answer ({answer!r}) that is one of its Options ({options!r})."
            )
        image = image_file(where, folder / "MMVP Images" / f"{index}.jpg")
        rows[int(index)] = dict(zip(columns, cells, strict=True)) | {"number": f"{int(index):03d}", "image": image}

    collected(f"'{source}'", (partial(read, where, *cells) for where, cells in csv_rows(source, columns)))

    def paired(number: int) -> Row:
        if (other := number + 1 if number % 2 else number - 1) not in rows:
            raise ValueError(f"'{source}': Index {other} is missing, the other half of the pair of {number}.")
        return rows[number]

    return (partial(paired, number) for number in sorted(rows))


def _read_naturalbench(folder: Path, images: Path | None) -> Iterable[Maker]:
    """Groups of four rows by Index: question 0 on images 0 and 1, then question 1 on images 0 and 1."""
    rows: dict[int, dict[str, Any]] = {}

    def read(row: Row) -> None:
        where, kind = f"'{folder}', Index {row['Index']!r}", row["Question_Type"]
        if not str(row["Index"]).isdigit() or int(row["Index"]) in rows:
            raise ValueError(f"{where}: each row needs a whole number of its own.")
        if kind not in NATURALBENCH:
            raise ValueError(f"{where}: Question_Type is {kind!r}; known are {', '.join(NATURALBENCH)}.")
        group, within = divmod(int(row["Index"]), 4)
        number = f"{group:04d}-q{within // 2}-i{within % 2}"
        rows[int(row["Index"])] = {**row, "number": number, "sentence": NATURALBENCH[kind]}

    columns = ("Index", "Image", "Question", "Answer", "Question_Type")
    tables = parquet_files(folder, "test")
    collected(f"'{folder}'", (partial(read, row) for row in parquet_rows(tables, folder, columns, ("Image",))))

    def grouped(index: int) -> Row:
        if index not in rows:
            raise ValueError(f"'{folder}': Index {index} is missing; a group has four rows, 4g to 4g + 3.")
        if index % 2 and index - 1 in rows and rows[index]["Question"] != rows[index - 1]["Question"]:
            raise ValueError(
                f"'{folder}': Index {index - 1} and {index} ask one question of two images; their questions differ."
            )
        return rows[index]

    return (partial(grouped, index) for index in range(4 * -(-len(rows) // 4)))


BLINK_TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw", "Multi-view_Reasoning",
    "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
    "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


def _read_blink(folder: Path, images: Path | None) -> Iterable[Maker]:
    """The tasks of BLINK by name, all 14, whose mean is the score; their test split has no answers and is passed over."""
    tables, layout = parquet_files(folder, "val"), LAYOUTS["blink"]
    if absent := [task for task in BLINK_TASKS if task not in {path.parent.name for path in tables}]:
        raise ValueError(f"'{folder}' has no {', '.join(absent)}; BLINK's score is the mean of {len(BLINK_TASKS)} tasks.")
    rows = parquet_rows(tables, folder, layout.columns, layout.images, layout.images)
    return (partial(dict, row) for row in rows)


def _read_gqa(folder: Path, images: Path | None) -> Iterable[Maker]:
    """GQA's balanced testdev; one image has many questions."""
    asked, shown = folder / "testdev_balanced_instructions", folder / "testdev_balanced_images"
    tables = parquet_files(shown, "testdev")
    pictures = {row["id"]: row["image"] for row in parquet_rows(tables, folder, ("id", "image"), ("image",))}

    def read(row: Row) -> Row:
        if row["imageId"] not in pictures:
            raise ValueError(f"'{asked}', id {row['id']!r}: there is no image {row['imageId']!r} in '{shown}'; copy it again.")
        return {**row, "image": pictures[row["imageId"]]}

    tables = parquet_files(asked, "testdev")
    return (partial(read, row) for row in parquet_rows(tables, folder, ("id", "imageId", "question", "answer"), ()))


# --- official files -------------------------------------------------------------------------------

VQA_QUESTIONS, VQA_ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
TEXTVQA_FILE = "TextVQA_0.5.1_val.json"


def _cv_bench_lines(folder: Path, images: Path | None) -> Iterable[Maker]:
    columns = [name for name in LAYOUTS["cv-bench"].columns if name != "image"]

    def read(where: str, line: str) -> Row:
        row = json_object(line, where, [*columns, "filename"])
        name = inside(where, str(row["filename"]))
        return row | {"image": image_file(where, folder / (name if name.startswith("img/") else f"img/{name}"))}

    return (
        partial(read, where, line) for source in sorted(folder.glob("test*.jsonl")) for where, line in numbered_lines(source)
    )


def _vqav2_official(folder: Path, images: Path | None) -> Iterable[Maker]:
    answered = folder / VQA_ANSWERS
    pictures = image_folder("vqav2", folder, images, "COCO val2014", [folder / "val2014", folder / "images"])
    truths = {}

    def remember(where: str, row: Row) -> None:
        check_columns(where, row, ("question_id", "answers", "answer_type"))
        if any("answer" not in answer for answer in row["answers"]):
            raise ValueError(f"{where}: each of its answers needs an 'answer'.")
        truths[row["question_id"]] = row

    def read(where: str, row: Row) -> Row:
        check_columns(where, row, ("question_id", "image_id", "question"))
        if row["question_id"] not in truths:
            raise ValueError(f"{where}: question_id {row['question_id']!r} has no annotation in '{answered}'.")
        if not isinstance(row["image_id"], int):
            raise ValueError(f"{where}: image_id is {row['image_id']!r}; COCO's are whole numbers.")
        image = image_file(where, pictures / f"COCO_val2014_{row['image_id']:012d}.jpg")
        return {**truths[row["question_id"]], **row, "image": image}

    collected(f"'{answered}'", (partial(remember, *entry) for entry in _entries(answered, "annotations")))
    return (partial(read, *entry) for entry in _entries(folder / VQA_QUESTIONS, "questions"))


def _textvqa_official(folder: Path, images: Path | None) -> Iterable[Maker]:
    pictures = image_folder("textvqa", folder, images, "TextVQA", [folder / "train_images", folder / "images"])

    def read(where: str, row: Row) -> Row:
        check_columns(where, row, ("question_id", "image_id", "question", "answers"))
        return {**row, "image": image_file(where, pictures / f"{inside(where, str(row['image_id']))}.jpg")}

    return (partial(read, *entry) for entry in _entries(folder / TEXTVQA_FILE, "data"))


def _pope_official(folder: Path, images: Path | None) -> Iterable[Maker]:
    pictures = image_folder("pope", folder, images, "COCO val2014", [folder / "val2014", folder / "images"])

    def read(category: str, where: str, line: str) -> Row:
        row = json_object(line, where, ("question_id", "image", "text", "label"))
        name = inside(where, str(row["image"]))
        shown = {"image_source": Path(name).stem, "image": image_file(where, pictures / name)}
        return {
            **shown,
            "question_id": row["question_id"],
            "question": row["text"],
            "answer": row["label"],
            "category": category,
        }

    for category in ("random", "popular", "adversarial"):
        source = folder / f"coco_pope_{category}.json"
        for where, line in numbered_lines(source) if source.is_file() else ():
            yield partial(read, category, where, line)


def _entries(source: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Where each entry of the list `name` of a JSON file stands, and the entry."""
    if not source.is_file():
        raise ValueError(f"'{source}' does not exist; is '{source.parent}' a whole copy of the benchmark?")
    found = json_object(read_text(source), f"'{source}'", (name,))
    for number, row in enumerate(found[name]):
        yield f"'{source}', entry {number} of {name}", row


# --- by name --------------------------------------------------------------------------------------

LAYOUTS: dict[str, Layout] = {  # the name is the scorer's too
    "mmvp": Layout(
        ("number",), "{Question} {Options}", {"options": "Options", "answer": "Correct Answer"}, read=_read_mmvp, unit=2
    ),
    "naturalbench": Layout(
        ("number",), "{Question}{sentence}", {"answer": "Answer", "kind": "Question_Type"},
        images=("Image",), read=_read_naturalbench, unit=4,
    ),
    "blink": Layout(
        ("idx",), "{prompt}", {"task": "sub_task", "options": "choices", "answer": "answer"}, check_choice,
        images=("image_1", "image_2", "image_3", "image_4"), read=_read_blink, files=["*/val-*"], part="task",
    ),
    "cv-bench": Layout(
        ("idx",), "{prompt}" + LETTER, {"source": "source", "options": "choices", "answer": "answer"}, check_choice,
        split="test", official=("test*.jsonl", _cv_bench_lines), files=["test*.parquet"], part="source",
    ),
    "gqa": Layout(
        ("id",), "{question}" + SHORT, {"answer": "answer", "image": "imageId"},
        read=_read_gqa, files=["testdev_balanced_*/*"],
    ),
    "vqav2": Layout(
        ("question_id",), "{question}" + SHORT, {"answers": "answers", "image": "image_id", "answer_type": "answer_type"}, check_ten,
        split="validation", official=(VQA_QUESTIONS, _vqav2_official), files=["data/validation-*"],
    ),
    "textvqa": Layout(
        ("question_id",), "{question}" + SHORT, {"answers": "answers", "image": "image_id"}, check_ten,
        split="validation", official=(TEXTVQA_FILE, _textvqa_official), files=["data/validation-*"],
    ),
    "pope": Layout(
        ("category", "question_id"), "{question}" + SHORT, {"answer": "answer", "image": "image_source", "category": "category"},
        check_yes_no, split="test", official=("coco_pope_*.json", _pope_official), files=["data/test-*"],
    ),
    "llava-bench": Layout(
        ("question_id",), "{question}",
        {"category": "category", "question": "question", "context": "caption", "reference": "gpt_answer"}, split="train",
    ),
}  # fmt: skip
WITH_IMAGES = ("vqav2", "textvqa", "pope")
FORMS = (
    ", ".join([*(f"{kind}:N" for kind in DRAWN), *(f"{kind}:SOURCE" for kind in LAYOUTS)])
    + f", {OWN}:FILE (SOURCE is a folder or a hub id; {', '.join([*WITH_IMAGES, OWN])} take ?images=FOLDER)"
)
