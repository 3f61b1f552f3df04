"""How well a `FusedMLLM` answers a benchmark, beside what it scores without an image.

Every benchmark is answered under conditions that differ in the images and in the diffusion model's prompt:

- ``own``: the images, and the question as the prompt;
- ``unprompted``: the images, without a prompt;
- ``irrelevant``: the images, and a question about other images as the prompt;
- ``blank``: even grey images, and the question as the prompt;
- ``text``: no image at all, the language model alone.

``blank`` and ``text`` are the blind baselines: what they score is not sight.  A gain that ``irrelevant`` keeps does not come
from the prompt's words, and above-chance answers under ``blank`` would be read from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from diffprobe.data.blank import GREY
from diffprobe.data.files import listed
from diffprobe.data.question_benchmarks import QuestionBenchmark, QuestionItem
from diffprobe.mllm.answers import options_of, read_record
from diffprobe.mllm.evaluate import SCORERS, score_llava_bench
from diffprobe.rundir import write_json, write_whole

if TYPE_CHECKING:
    from diffprobe.mllm.model import FusedMLLM

CONDITIONS = ("own", "unprompted", "irrelevant", "blank", "text")
BLIND = ("blank", "text")
DRAWN = ("shapes-vqa:270", "shapes-mmvp:135", "shapes-naturalbench:90", "shapes-blink:100")
JUDGED = ("llava-bench",)  # a judge model, or a person, gives the points
POINTS = ("reference_points", "output_points")
_AT_ONCE = 256  # items whose images are held in memory


def answer_items(
    model: FusedMLLM,
    items: Sequence[QuestionItem],
    condition: str = "own",
    *,
    batch: int = 32,
    max_new_tokens: int = 32,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """The records of items with the model's output and the item's id, under one of `CONDITIONS`.

    Raises:
        ValueError: The condition is unknown.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"Condition {condition!r} is not one of {', '.join(CONDITIONS)}.")
    questions = [item.question for item in items]
    prompts: list[str | None] = list(other_questions(questions) if condition == "irrelevant" else questions)
    if condition == "unprompted":
        prompts = [None] * len(items)
    records: list[dict[str, Any]] = []
    for start in range(0, len(items), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        images = [_shown(item, condition) for item in items[part]]
        said = model.answer(images, questions[part], prompts=prompts[part], batch=batch, max_new_tokens=max_new_tokens)
        records += [{**item.record, "id": item.id, "output": text} for item, text in zip(items[part], said, strict=True)]
        if len(items) > _AT_ONCE:
            tell(f"{condition}: {len(records)} of {len(items)} answered")
    return records


def _shown(item: QuestionItem, condition: str) -> list[Image.Image]:
    if condition == "text":
        return []
    images = [load() for load in item.images]
    return [Image.new("RGB", image.size, GREY) for image in images] if condition == "blank" else images


def other_questions(questions: Sequence[str]) -> list[str]:
    """For each question another one of the list, the same in every run; its own only where all are alike.

    >>> other_questions(["a", "b", "a"])[1]
    'a'
    """
    unique = sorted(set(questions), key=lambda text: hashlib.sha256(text.encode()).digest())
    following = dict(zip(unique, unique[1:] + unique[:1], strict=True))
    return [following[question] for question in questions]


def judge_all(
    model: FusedMLLM,
    benchmarks: Sequence[QuestionBenchmark],
    folder: str | Path,
    conditions: Sequence[str] = ("own", *BLIND),
    *,
    batch: int = 32,
    max_new_tokens: int = 32,
    tell: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Answer several benchmarks and score them; ``answers.csv`` and ``scores.csv`` in a folder grow with each of them.

    ``benchmarks.json`` keeps the spec and the fingerprint of each.  Answers to LLaVA-Bench go to ``to_judge.csv`` for
    `score_judged`; they get no score here.

    Returns:
        The scorers' rows with a column `condition`.  ``answers.csv`` has one row for each item and condition: condition, id,
        question, answer, output, hit (NaN where no answer is right or wrong), benchmark.

    Raises:
        ValueError: Two benchmarks have one name, a condition is unknown, or a scorer refuses the records.
    """
    names = [benchmark.name for benchmark in benchmarks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{names.count(twice[0])} benchmarks are called {twice[0]!r}, and their answers could not be told apart; "
            "ask them one after the other, each with an --out of its own."
        )
    folder, scores, answers = Path(folder), pd.DataFrame(), pd.DataFrame()
    (folder / "scores.csv").unlink(missing_ok=True)  # of answers that are about to be replaced
    write_json(folder / "benchmarks.json", {b.name: {"spec": b.spec, "fingerprint": b.fingerprint()} for b in benchmarks})
    for benchmark in benchmarks:
        tell(f"{benchmark.name}: {len(benchmark)} questions, shown {', '.join(conditions)}")
        said = {
            condition: answer_items(model, benchmark.items, condition, batch=batch, max_new_tokens=max_new_tokens, tell=tell)
            for condition in conditions
        }
        rows = [
            {"condition": condition, "id": item.id, "question": item.question, "answer": str(record.get("answer", "")),
             "output": record["output"], "hit": hit(record), "benchmark": benchmark.name}
            for condition, records in said.items() for item, record in zip(benchmark.items, records, strict=True)
        ]  # fmt: skip
        answers = pd.concat([answers, pd.DataFrame(rows)], ignore_index=True)
        _write_csv(folder / "answers.csv", answers)  # before scoring, which may refuse them
        if benchmark.scorer in JUDGED:
            path = folder / "to_judge.csv"
            rows = [
                {"condition": c, **record, **dict.fromkeys(POINTS, "")} for c, records in said.items() for record in records
            ]
            _write_csv(path, pd.DataFrame(rows))
            tell(
                f"{benchmark.name}: answers are kept; its score needs a judge model. "
                f"Fill in {' and '.join(POINTS)} in {path}; 'diffprobe mllm score {path}' scores them."
            )
            continue
        for condition, records in said.items():
            rows_ = SCORERS[benchmark.scorer](records).assign(benchmark=benchmark.name, condition=condition)
            scores = pd.concat([scores, rows_], ignore_index=True)
        _write_csv(folder / "scores.csv", scores)
    return scores


def score_judged(path: str | Path) -> pd.DataFrame:
    """Scores of LLaVA-Bench from a judge's points, in the columns of `judge_all`.

    Args:
        path: ``to_judge.csv`` of `judge_all`, with the points of the reference answer and of the output filled in.

    Raises:
        ValueError: The file or a column is missing, or points are not numbers above 0; the message names the rows.
    """
    if not Path(path).is_file():
        raise ValueError(f"'{path}' does not exist; 'diffprobe mllm eval' writes to_judge.csv for LLaVA-Bench.")
    rows = pd.read_csv(path, keep_default_na=False, dtype={"output": str, "question": str})
    if absent := [name for name in ("condition", "id", "category", "question", "output", *POINTS) if name not in rows]:
        raise ValueError(f"'{path}' has no {', '.join(absent)}; 'diffprobe mllm eval' writes to_judge.csv with these columns.")
    points = rows[list(POINTS)].apply(pd.to_numeric, errors="coerce")
    bad = ~(points > 0).all(axis=1)
    if bad.any():
        named = [f"{row['id']} ({row['condition']})" for row in rows[bad].to_dict("records")]
        raise ValueError(f"{bad.sum()} rows of '{path}' lack {' or '.join(POINTS)}, numbers above 0: {listed(named)}.")
    rows[list(POINTS)] = points
    scores = []
    for condition, part in rows.groupby("condition", sort=False):
        records = [{str(name): value for name, value in row.items()} for row in part.to_dict("records")]
        found = score_llava_bench(records, lambda record: (record[POINTS[0]], record[POINTS[1]]))
        scores.append(found.assign(condition=condition))
    return pd.concat(scores, ignore_index=True)


def _write_csv(path: Path, rows: pd.DataFrame) -> None:
    write_whole(path, rows.to_csv(index=False, lineterminator="\n"))


def hit(record: Mapping[str, Any]) -> float:
    """1 where a choice, or yes or no, is right, 0 where it is not; NaN where that is not how the record is scored.

    >>> hit({"answer": "(a)", "options": "(a) Open (b) Closed", "output": "open"}), hit({"answer": "Yes", "output": "no"})
    (1.0, 0.0)
    >>> hit({"answer": "A", "kind": "multiple_choice", "output": "Yes"})  # NaturalBench's other kind of question
    0.0
    """
    truth, said = read_record(record, options_of(record))
    return np.nan if truth is None else float(said == truth)
