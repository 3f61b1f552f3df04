"""How well a `FusedMLLM` answers a benchmark, beside what can be had without looking.

Every benchmark is answered under conditions that differ in what the model is shown and what its diffusion model is told:

- ``own``: the images, and the question as the prompt;
- ``unprompted``: the images, the diffusion model told nothing;
- ``irrelevant``: the images, the diffusion model told a question about other images;
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
from diffprobe.data.question_benchmarks import QuestionBenchmark, QuestionItem
from diffprobe.mllm.evaluate import SCORERS, options_of, read_record
from diffprobe.rundir import write_whole

if TYPE_CHECKING:
    from diffprobe.mllm.model import FusedMLLM

CONDITIONS = ("own", "unprompted", "irrelevant", "blank", "text")
BLIND = ("blank", "text")
DRAWN = ("shapes-vqa:270", "shapes-mmvp:135", "shapes-naturalbench:90", "shapes-blink:100")
JUDGED = ("llava-bench",)  # a judge model gives the points
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
        ValueError: the condition is none.
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


def judge(
    model: FusedMLLM,
    benchmark: QuestionBenchmark,
    conditions: Sequence[str] = ("own", *BLIND),
    *,
    batch: int = 32,
    max_new_tokens: int = 32,
    level: float = 0.95,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and answers of one benchmark.

    Args:
        options: more that the scorer takes (LLaVA-Bench's judge).

    Returns:
        The scorer's rows with a column `condition`, and one row for each item and condition: condition, id, question, answer,
        output, hit (where an answer is right or wrong).

    Raises:
        ValueError: a condition is none, or the scorer lacks something.
    """
    said = _said(model, benchmark, conditions, batch=batch, max_new_tokens=max_new_tokens, tell=tell)
    return _scored(benchmark, said, level=level, seed=seed, **options), _answered(benchmark, said)


Said = Mapping[str, Sequence[Mapping[str, Any]]]  # records with outputs by condition


def _said(model: FusedMLLM, benchmark: QuestionBenchmark, conditions: Sequence[str], **options: Any) -> Said:
    return {condition: answer_items(model, benchmark.items, condition, **options) for condition in conditions}


def _scored(benchmark: QuestionBenchmark, said: Said, **options: Any) -> pd.DataFrame:
    score = SCORERS[benchmark.scorer]
    rows = [score(records, **options).assign(condition=condition) for condition, records in said.items()]
    return pd.concat(rows, ignore_index=True).assign(benchmark=benchmark.name)


def _answered(benchmark: QuestionBenchmark, said: Said) -> pd.DataFrame:
    return pd.DataFrame([
        {"condition": condition, "id": item.id, "question": item.question, "answer": str(record.get("answer", "")),
         "output": record["output"], "hit": hit(record)}
        for condition, records in said.items() for item, record in zip(benchmark.items, records, strict=True)
    ])  # fmt: skip


def judge_all(
    model: FusedMLLM,
    benchmarks: Sequence[QuestionBenchmark],
    folder: str | Path,
    conditions: Sequence[str] = ("own", *BLIND),
    *,
    batch: int = 32,
    max_new_tokens: int = 32,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> pd.DataFrame:
    """`judge` several benchmarks and give the scores; ``answers.csv`` and ``scores.csv`` in a folder grow with each of them.

    LLaVA-Bench is scored by the judge model in `options`; without one its answers are written and it gets no score.
    """
    folder, scores, answers = Path(folder), pd.DataFrame(), pd.DataFrame()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.csv").unlink(missing_ok=True)  # of answers that are about to be replaced
    for benchmark in benchmarks:
        tell(f"{benchmark.name}: {len(benchmark)} questions, shown {', '.join(conditions)}")
        said = _said(model, benchmark, conditions, batch=batch, max_new_tokens=max_new_tokens, tell=tell)
        answers = pd.concat([answers, _answered(benchmark, said).assign(benchmark=benchmark.name)], ignore_index=True)
        write_whole(
            folder / "answers.csv", answers.to_csv(index=False, lineterminator="\n")
        )  # before scoring, which may refuse them
        if benchmark.scorer in JUDGED and "judge" not in options:
            tell(
                f"{benchmark.name}: answers are kept; its score needs a judge model (diffprobe.mllm.evaluate.score_llava_bench)."
            )
            continue
        scores = pd.concat([scores, _scored(benchmark, said, **options)], ignore_index=True)
        write_whole(folder / "scores.csv", scores.to_csv(index=False, lineterminator="\n"))
    return scores


def hit(record: Mapping[str, Any]) -> float:
    """1 where a choice, or yes or no, is right, 0 where it is not; NaN where that is not how the record is scored.

    >>> hit({"answer": "(a)", "options": "(a) Open (b) Closed", "output": "open"}), hit({"answer": "Yes", "output": "no"})
    (1.0, 0.0)
    >>> hit({"answer": "A", "kind": "multiple_choice", "output": "Yes"})  # NaturalBench's other kind of question
    0.0
    """
    truth, said = read_record(record, options_of(record))
    return np.nan if truth is None else float(said == truth)


def chance(record: Mapping[str, Any]) -> float:
    """How often a guess among the options is a `hit`.

    >>> chance({"options": "(a) Open (b) Closed (c) Ajar"}), chance({"answer": "Yes"})
    (0.3333333333333333, 0.5)
    """
    return 1 / len(options_of(record))
