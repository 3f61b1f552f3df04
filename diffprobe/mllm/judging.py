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
from diffprobe.mllm.evaluate import SCORERS, read_choice, split_options

if TYPE_CHECKING:
    from diffprobe.mllm.model import FusedMLLM

CONDITIONS = ("own", "unprompted", "irrelevant", "blank", "text")
BLIND = ("blank", "text")
DRAWN = ("shapes-vqa:270", "shapes-mmvp:135", "shapes-naturalbench:90", "shapes-blink:100")
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
    scores, answers = [], []
    for condition in conditions:
        records = answer_items(model, benchmark.items, condition, batch=batch, max_new_tokens=max_new_tokens, tell=tell)
        scores.append(SCORERS[benchmark.scorer](records, level=level, seed=seed, **options).assign(condition=condition))
        answers += [
            {"condition": condition, "id": item.id, "question": item.question, "answer": str(record.get("answer", "")),
             "output": record["output"], "hit": hit(record)}
            for item, record in zip(benchmark.items, records, strict=True)
        ]  # fmt: skip
    return pd.concat(scores, ignore_index=True).assign(benchmark=benchmark.name), pd.DataFrame(answers)


def judge_all(
    model: FusedMLLM,
    benchmarks: Sequence[QuestionBenchmark],
    folder: str | Path,
    conditions: Sequence[str] = ("own", *BLIND),
    *,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> pd.DataFrame:
    """`judge` several benchmarks; writes ``scores.csv`` and ``answers.csv`` into a folder and gives the scores."""
    folder, scores, answers = Path(folder), [], []
    for benchmark in benchmarks:
        tell(f"{benchmark.name}: {len(benchmark)} questions, shown {', '.join(conditions)}")
        found, said = judge(model, benchmark, conditions, tell=tell, **options)
        scores.append(found)
        answers.append(said.assign(benchmark=benchmark.name))
    folder.mkdir(parents=True, exist_ok=True)
    for name, tables in (("scores", scores), ("answers", answers)):
        pd.concat(tables, ignore_index=True).to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    return pd.concat(scores, ignore_index=True)


def hit(record: Mapping[str, Any]) -> float:
    """1 where a choice, or yes or no, is right, 0 where it is not; NaN where that is not how the record is scored.

    >>> hit({"answer": "(a)", "options": "(a) Open (b) Closed", "output": "open"}), hit({"answer": "Yes", "output": "no"})
    (1.0, 0.0)
    """
    options = _options(record)
    truth = read_choice(str(record.get("answer", "")), options)
    return np.nan if truth is None else float(read_choice(str(record["output"]), options) == truth)


def chance(record: Mapping[str, Any]) -> float:
    """How often a guess among the options is a `hit`.

    >>> chance({"options": "(a) Open (b) Closed (c) Ajar"}), chance({"answer": "Yes"})
    (0.3333333333333333, 0.5)
    """
    return 1 / len(_options(record))


def _options(record: Mapping[str, Any]) -> list[str]:
    options = record.get("options", ("Yes", "No"))
    return split_options(options) if isinstance(options, str) else list(options)
