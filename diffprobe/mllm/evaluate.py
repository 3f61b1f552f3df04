"""Scores of published question benchmarks: pure functions of plain records, equal to the official definitions.

A record is a mapping with the model's text in `output`, the truth in `answer` (or `answers`), and what the benchmark
groups by; each scorer names its fields.  Every scorer gives one row per score: benchmark, score, group, value (a share,
0 to 1), low, high, n (what is counted: items, pairs or groups), chance, unparsed (outputs in which no answer was found),
seed (of the bootstrap).

The invariant: an output in which no answer is found is wrong and is counted.  `diffprobe.mllm.answers` reads the answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffprobe.mllm.answers import Record, options_of, read_record, read_yes_no
from diffprobe.stats import Floats, bootstrap_interval, bootstrap_sums, wilson_interval

COLUMNS = ["benchmark", "score", "group", "value", "low", "high", "n", "chance", "unparsed", "seed"]
ALL, MACRO = "all", "macro"


# --- records --------------------------------------------------------------------------------------


def _choice_hits(
    records: Sequence[Record], benchmark: str, fields: Sequence[str] = ("options", "answer", "output")
) -> tuple[Floats, Floats, Floats]:
    """(item,) hits and guessing chances of multiple-choice records, and which outputs have no answer."""
    hits, chances, unparsed = [], [], []
    for index, record in enumerate(_given(records, benchmark, fields)):
        options = options_of(record)
        truth, said = read_record(record, options)
        if truth is None or len(options) < 2:
            raise ValueError(f"{benchmark}, record {index}: the answer {record['answer']!r} is none of the options {options}.")
        unparsed.append(said is None)
        hits.append(said == truth)
        chances.append(1 / len(options))
    return np.array(hits, np.float64), np.array(chances), np.array(unparsed)


def _given(records: Sequence[Record], benchmark: str, fields: Sequence[str]) -> Sequence[Record]:
    if not records:
        raise ValueError(f"{benchmark}: there are no records to score.")
    for index, record in enumerate(records):
        if missing := [name for name in fields if name not in record]:
            raise ValueError(f"{benchmark}, record {index}: fields {', '.join(missing)} missing; it has {', '.join(record)}.")
    return records


def _groups(names: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """All items, then each group of them: its name and which items are of it."""
    for group in dict.fromkeys([ALL, *names]):
        yield group, (names == group) | (group == ALL)


# --- rows -----------------------------------------------------------------------------------------


def _share(
    hits: Floats, level: float, clusters: NDArray[Any] | None = None, seed: int = 0, whole: bool = True
) -> dict[str, float]:
    """A share with its interval: Wilson's; by bootstrap of clusters or of hits that are not `whole`, unless all are alike."""
    n = len(hits) if clusters is None else len(np.unique(clusters))
    value = float(hits.mean())
    if (clusters is not None or not whole) and 0 < value < 1:
        low, high = bootstrap_interval(hits, clusters, level, seed=seed)
    else:
        low, high = wilson_interval(value * n, n, level)
    return {"value": value, "low": low, "high": high, "n": n}


def _from_sums(
    columns: Floats, statistic: Callable[[Floats], Floats], level: float, seed: int, n: int | None = None
) -> dict[str, float]:
    """A statistic of column sums with its bootstrap interval; resamples in which it is undefined are left out."""

    def quiet(sums: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return statistic(sums)

    value = float(quiet(columns.sum(0, keepdims=True))[0])
    if np.isnan(value):
        return {"value": value, "low": np.nan, "high": np.nan, "n": n or len(columns)}
    low, high = bootstrap_sums(columns, quiet, level=level, seed=seed)
    return {"value": value, "low": low, "high": high, "n": n or len(columns)}


def _table(benchmark: str, rows: Sequence[Mapping[str, Any]], seed: int) -> pd.DataFrame:
    return pd.DataFrame([{"group": ALL, "unparsed": 0, **row} for row in rows]).assign(benchmark=benchmark, seed=seed)[COLUMNS]


# --- multiple choice ------------------------------------------------------------------------------


def score_mmvp(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """MMVP (Tong et al. 2024): items 2k and 2k + 1 are a pair, which counts when both are right.

    Records, in the benchmark's order: options ("(a) Open (b) Closed" or a list), answer ("(a)"), output.

    >>> ask = {"options": "(a) Open (b) Closed"}
    >>> rows = score_mmvp([{**ask, "answer": "(a)", "output": "open"}, {**ask, "answer": "(b)", "output": "(b)"}])
    >>> rows[["score", "value", "chance", "n"]].values.tolist()
    [['pair', 1.0, 0.25, 1], ['item', 1.0, 0.5, 2]]
    """
    hits, chances, unparsed = _choice_hits(records, "MMVP")
    if len(hits) % 2:
        raise ValueError(f"MMVP: items come in pairs; got {len(hits)} records.")
    pairs = hits.reshape(-1, 2)
    rows = [
        {"score": "pair", **_share(pairs.all(1).astype(float), level), "chance": chances.reshape(-1, 2).prod(1).mean()},
        {"score": "item", **_share(hits, level, np.arange(len(hits)) // 2, seed), "n": len(hits), "chance": chances.mean()},
    ]
    return _table("MMVP", [{**row, "unparsed": int(unparsed.sum())} for row in rows], seed)


def score_naturalbench(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """NaturalBench (Li et al. 2024): groups of two questions and two images, with opposite answers.

    Records, four a group in the hub's order, question 0 on images 0 and 1, then question 1 on images 0 and 1: answer
    ("Yes", "No", "A", "B"), output, and kind ("yes_no" by default, or "multiple_choice", whose options are A and B by default).
    A question counts when it is right on both images, an image when both its questions are right, a group when all four are.

    >>> group = [{"answer": a, "output": o} for a, o in zip(("Yes", "No", "No", "Yes"), ("Yes", "No", "No", "No"))]
    >>> score_naturalbench(group).set_index("score").value.to_dict()
    {'group': 0.0, 'question': 0.5, 'image': 0.5, 'item': 0.75}
    """
    hits, _, unparsed = _choice_hits(records, "NaturalBench", ("answer", "output"))
    if len(hits) % 4:
        raise ValueError(f"NaturalBench: a group has four records; got {len(hits)}.")
    right = hits.reshape(-1, 2, 2)  # (group, question, image)
    groups = np.arange(len(right))
    rows: list[dict[str, Any]] = [{"score": "group", **_share(right.all((1, 2)).astype(float), level), "chance": 1 / 16}]
    for score, each, chance in (("question", right.all(2), 1 / 4), ("image", right.all(1), 1 / 4), ("item", right, 1 / 2)):
        flat = each.reshape(len(right), -1)
        share = _share(flat.ravel().astype(float), level, np.repeat(groups, flat.shape[1]), seed)
        rows.append({"score": score, **share, "n": flat.size, "chance": chance})
    return _table("NaturalBench", [{**row, "unparsed": int(unparsed.sum())} for row in rows], seed)


def score_blink(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """BLINK (Fu et al. 2024): accuracy of each task, and their mean ("macro"), which is the benchmark's score.

    Records: task, options, answer ("(A)"), output.  The official script has a language model match outputs to options.

    >>> ask = {"options": ("left", "right"), "answer": "(A)"}
    >>> rows = score_blink([{**ask, "task": "Depth", "output": "A"}, {**ask, "task": "Jigsaw", "output": "(B)"}])
    >>> rows.set_index("group").value.to_dict()
    {'macro': 0.5, 'Depth': 1.0, 'Jigsaw': 0.0}
    """
    tasks = [str(record["task"]) for record in _given(records, "BLINK", ("task", "options", "answer", "output"))]
    names = list(dict.fromkeys(tasks))
    return _by_class(records, "BLINK", tasks, names, {MACRO: [1] * len(names)}, level, seed)


def _by_class(
    records: Sequence[Record], benchmark: str, classes: Sequence[str], names: Sequence[str],
    means: Mapping[str, Sequence[int]], level: float, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Accuracies: weighted means over the classes of records, by the mean's name, then that of each class."""
    hits, chances, lost = _choice_hits(records, benchmark)
    shown = (np.array(classes)[:, None] == np.array(names)).astype(np.float64)
    columns, guesses = (np.c_[shown * values[:, None], shown] for values in (hits, chances))
    rows: list[dict[str, Any]] = []
    for group, weights in means.items():

        def mean(sums: Floats, weights: Sequence[int] = weights) -> Floats:
            return np.asarray((sums[:, : len(names)] / sums[:, len(names) :]) @ weights) / sum(weights)

        mine = shown[:, np.array(weights) > 0].any(1)
        chance = float(mean(guesses.sum(0, keepdims=True))[0])
        rows.append({"group": group, **_from_sums(columns, mean, level, seed, int(mine.sum())), "chance": chance, "mine": mine})
    for name, mine in zip(names, shown.T > 0, strict=True):
        rows.append({"group": name, **_share(hits[mine], level), "chance": chances[mine].mean(), "mine": mine})
    found = [{"score": "accuracy", **row, "unparsed": int(lost[row["mine"]].sum())} for row in rows]
    return _table(benchmark, found, seed)


CV_SOURCES = ("ADE20K", "COCO", "Omni3D")


def score_cv_bench(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """CV-Bench (Tong et al. 2024, Cambrian-1): the mean of 2D, itself the mean of ADE20K and COCO, and 3D (Omni3D).

    Records: source (of `CV_SOURCES`), options, answer ("(A)"), output.  Groups: all, 2D, and the three sources (Omni3D is 3D).

    >>> ask = {"options": ("1", "2"), "answer": "(A)"}
    >>> said = {"ADE20K": "A", "COCO": "B", "Omni3D": "A"}
    >>> score_cv_bench([{**ask, "source": s, "output": o} for s, o in said.items()]).set_index("group").value.to_dict()
    {'all': 0.75, '2D': 0.5, 'ADE20K': 1.0, 'COCO': 0.0, 'Omni3D': 1.0}
    """
    sources = [str(record["source"]) for record in _given(records, "CV-Bench", ("source", "options", "answer", "output"))]
    if set(sources) != set(CV_SOURCES):
        raise ValueError(
            f"CV-Bench: its score needs records of {', '.join(CV_SOURCES)}; found {', '.join(sorted(set(sources)))}."
        )
    means = {ALL: (1, 1, 2), "2D": (1, 1, 0)}
    return _by_class(records, "CV-Bench", sources, CV_SOURCES, means, level, seed)


# --- short answers --------------------------------------------------------------------------------


def score_gqa(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """GQA (Hudson & Manning 2019): exact match, case and punctuation ignored.

    Records: answer, output, and optionally image (records of one image are resampled together).  An empty output is
    unparsed.  Chance is what the most frequent answer scores.

    >>> score_gqa([{"answer": "yes", "output": "Yes."}, {"answer": "left", "output": "to the left"}]).value.tolist()
    [0.5]
    """
    return _score_exact(_given(records, "GQA", ("answer", "output")), "GQA", level, seed)


def _score_exact(records: Sequence[Record], benchmark: str, level: float, seed: int) -> pd.DataFrame:
    """Exact match with the answer, or with one of several."""
    truths = [{_plain(str(text)) for text in record.get("answers", [record.get("answer")])} for record in records]
    said = [_plain(str(record["output"])) for record in records]
    hits = np.array([output in right for right, output in zip(truths, said, strict=True)], np.float64)
    chance = Counter(text for right in truths for text in right).most_common(1)[0][1] / len(truths)
    share = {**_share(hits, level, _images(records), seed), "n": len(hits)}
    return _table(benchmark, [{"score": "accuracy", **share, "chance": chance, "unparsed": sum(not s for s in said)}], seed)


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _images(records: Sequence[Record]) -> NDArray[Any] | None:
    if not all("image" in record for record in records):
        return None
    images = np.array([str(record["image"]) for record in records])
    return images if len(set(images)) < len(images) else None


# The official table of contractions is the full forms with any one apostrophe left out; the last entry is its misprint.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
"""
CONTRACTIONS = {
    full[:k] + full[k + 1 :]: full for full in _CONTRACTED.split() for k, letter in enumerate(full) if letter == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise_vqa(text: str) -> str:
    """The official normalisation of VQA answers: punctuation, number words, articles, contractions, case.

    A punctuation mark is dropped where it touches a space anywhere in the text or the text has a comma between digits,
    and becomes a space otherwise; full stops go unless a digit follows.

    >>> [normalise_vqa(t) for t in ("Two dogs.", "the red-ish", "dont", "1,000", "3.5", "U.S.A.", "a, b")]
    ['2 dogs', 'red ish', "don't", '1000', '3.5', 'usa', 'b']
    """
    text = _spaced(text)
    drop = re.search(r"\d,\d", text) is not None
    kept = text
    for mark in _PUNCTUATION:
        kept = kept.replace(mark, "" if drop or f"{mark} " in text or f" {mark}" in text else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    numbered = [_NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ("a", "an", "the"))


def normalise_textvqa(text: str) -> str:
    """TextVQA's: commas and question marks go first and "'s" becomes a word, then as `normalise_vqa`.

    >>> normalise_textvqa("The Dog's, 2?")
    "dog 's 2"
    """
    return normalise_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(output: str, answers: Sequence[str], normalise: Callable[[str], str] | None = None) -> float:
    """Mean over the leave-one-out sets of min(1, matches / 3).

    VQAv2 by default: output and answers are normalised only where the answers are not all equal.  With `normalise`
    (TextVQA) always.

    >>> [round(vqa_accuracy("two", ["two"] * k + ["three"] * (10 - k)), 2) for k in (0, 1, 2, 3, 4)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    >>> vqa_accuracy("Two", ["two"] * 10)
    0.0
    """
    output, answers = _spaced(output), [_spaced(answer) for answer in answers]
    if normalise is None and len(set(answers)) > 1:
        normalise = normalise_vqa
    if normalise is not None:
        output, answers = normalise(output), [normalise(answer) for answer in answers]
    matches = sum(answer == output for answer in answers)
    return sum(min(1, (matches - (answer == output)) / 3) for answer in answers) / len(answers)


def _spaced(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def score_vqav2(
    records: Sequence[Record], *, level: float = 0.95, seed: int = 0, benchmark: str = "VQAv2",
    normalise: Callable[[str], str] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """VQAv2 (Antol et al. 2015, Goyal et al. 2017).

    Records: answers (ten texts), output, and optionally image and answer_type (then also scored by it).  Chance is what the
    most frequent answer would score if it were always given.  An empty output is unparsed.

    >>> score_vqav2([{"answers": ["cat"] * 9 + ["dog"], "output": "a cat"}]).value.tolist()
    [1.0]
    """
    _given(records, benchmark, ("answers", "output"))
    answers = [[str(answer) for answer in record["answers"]] for record in records]
    for index, given in enumerate(answers):
        if len(given) != 10:
            raise ValueError(f"{benchmark}, record {index}: the score is defined on ten human answers; found {len(given)}.")
    usual = Counter(answer for given in answers for answer in given).most_common(1)[0][0]
    outputs = [str(record["output"]) for record in records]
    scores, constant = (
        np.array([vqa_accuracy(text, given, normalise) for text, given in zip(texts, answers, strict=True)])
        for texts in (outputs, [usual] * len(outputs))
    )
    silent = np.array([not _plain(output) for output in outputs])
    types = np.array([str(record.get("answer_type", ALL)) for record in records])
    images = _images(records)
    rows: list[dict[str, Any]] = []
    for group, mine in _groups(types):
        share = _share(scores[mine], level, None if images is None else images[mine], seed, whole=False)
        row = {"score": "accuracy", "group": group, **share, "n": int(mine.sum()), "chance": constant[mine].mean()}
        rows.append({**row, "unparsed": int(silent[mine].sum())})
    return _table(benchmark, rows, seed)


def score_textvqa(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """TextVQA (Singh et al. 2019); fields as for `score_vqav2`, normalised always."""
    return score_vqav2(records, level=level, seed=seed, benchmark="TextVQA", normalise=normalise_textvqa)


def score_pope(
    records: Sequence[Record], read: Callable[[str], str | None] = read_yes_no, *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """POPE (Li et al. 2023): accuracy, precision, recall and F1 of "yes", and the share of yes among the model's ANSWERS.

    Records: answer ("yes" or "no"), output, and optionally image and category (random, popular, adversarial; then also
    scored by it).  An unparsed output is neither yes nor no: wrong, a miss where the truth is yes, no yes-answer.  With
    `read_pope` the numbers are the official script's, which takes such outputs for yes.  Chance is a fair coin's,
    given the truths; precision and F1 are NaN where the model never says yes.

    >>> truth = ("yes", "yes", "no", "no")
    >>> rows = score_pope([{"answer": a, "output": o} for a, o in zip(truth, ("Yes", "No.", "Yes, a dog", "no"))])
    >>> rows.set_index("score").value.to_dict()
    {'accuracy': 0.5, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'yes_share': 0.5}
    """
    _given(records, "POPE", ("answer", "output"))
    truths = [read_yes_no(str(record["answer"])) for record in records]
    if None in truths:
        index = truths.index(None)
        raise ValueError(f"POPE, record {index}: the answer {records[index]['answer']!r} is neither yes nor no.")
    said = [read(str(record["output"])) for record in records]
    yes = np.array([s == "yes" for s in said], np.float64)
    true = np.array([t == "yes" for t in truths], np.float64)
    right = np.array([s == t for s, t in zip(said, truths, strict=True)], np.float64)
    unparsed = np.array([s is None for s in said])
    groups = np.array([str(record.get("category", ALL)) for record in records])
    images = _images(records)
    rows: list[dict[str, Any]] = []
    for group, mine in _groups(groups):
        clusters = None if images is None else images[mine]
        columns = np.stack([yes * true, yes, true], axis=1)[mine]
        base = float(true[mine].mean())
        ratios: dict[str, tuple[Callable[[Floats], Floats], float]] = {
            "precision": (lambda sums: sums[:, 0] / sums[:, 1], base),
            "recall": (lambda sums: sums[:, 0] / sums[:, 2], 0.5),
            "f1": (
                lambda sums: np.where(sums[:, 1] > 0, 2 * sums[:, 0] / (sums[:, 1] + sums[:, 2]), np.nan),
                base / (base + 0.5),
            ),
        }
        about = {"group": group, "unparsed": int(unparsed[mine].sum())}
        n = int(mine.sum())
        rows.append({**about, "score": "accuracy", **_share(right[mine], level, clusters, seed), "n": n, "chance": 0.5})
        for score, (ratio, chance) in ratios.items():
            sums = columns
            if clusters is not None:
                sums = np.stack([columns[clusters == name].sum(0) for name in np.unique(clusters)])
            rows.append({**about, "score": score, **_from_sums(sums, ratio, level, seed, n), "chance": chance})
        rows.append({**about, "score": "yes_share", **_share(yes[mine], level, clusters, seed), "n": n, "chance": 0.5})
    return _table("POPE", rows, seed)


# --- your own -------------------------------------------------------------------------------------


def score_own(records: Sequence[Record], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Questions of a file of your own: choices, exact matches and VQA's accuracy, each scored apart, and in each category.

    Records: output, with options and answer (choice: as BLINK's tasks), with ten answers (vqa: as `score_vqav2`), or with answer
    or answers (exact: as `score_gqa`, any of the answers is right); optionally category, and image (records of one image are
    resampled together).

    >>> own = [{"answer": "(A)", "options": ("left", "right"), "output": "Left."}, {"answers": ["cat", "kitten"], "output": "A cat"}]
    >>> score_own(own)[["score", "value", "chance"]].values.tolist()
    [['choice', 1.0, 0.5], ['exact', 0.0, 1.0]]
    """
    kinds = [
        "choice" if "options" in record else "vqa" if len(record.get("answers", ())) == 10 else "exact"
        for record in _given(records, "Questions", ("output",))
    ]
    scorers: dict[str, Callable[..., pd.DataFrame]] = {
        "choice": _score_choice,
        "exact": _score_exact,
        "vqa": score_vqav2,
    }
    frames = []
    for kind in dict.fromkeys(kinds):
        mine = [record for record, own in zip(records, kinds, strict=True) if own == kind]
        for group, chosen in _groups(np.array([str(record.get("category", ALL)) for record in mine])):
            part = [record for record, kept in zip(mine, chosen, strict=True) if kept]
            frames.append(scorers[kind](part, benchmark="Questions", level=level, seed=seed).assign(score=kind, group=group))
    return pd.concat(frames, ignore_index=True)


def _score_choice(records: Sequence[Record], benchmark: str, level: float, seed: int) -> pd.DataFrame:
    hits, chances, unparsed = _choice_hits(records, benchmark)
    share = {**_share(hits, level, _images(records), seed), "n": len(hits)}
    return _table(benchmark, [{"score": "accuracy", **share, "chance": chances.mean(), "unparsed": int(unparsed.sum())}], seed)


# --- judged answers -------------------------------------------------------------------------------


def score_llava_bench(
    records: Sequence[Record], judge: Callable[[Record], tuple[float, float]], *, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """LLaVA-Bench (Liu et al. 2023): the judge's points for the model over those for the reference answer.

    Records: category (conv, detail, complex), question, output, and what the judge reads (context, the reference
    answer).  The score is the ratio of the mean points, 0.665 where the official script prints 66.5.  There is no chance; the
    blind baselines stand in for it.

    Args:
        judge: Gives the points of the reference answer and of the output, in this order, each above 0.

    Raises:
        ValueError: The judge's points are not two positive numbers.

    >>> said = [{"category": "conv", "question": "?", "output": text} for text in ("good", "bad")]
    >>> score_llava_bench(said, lambda record: (8, 8 if record["output"] == "good" else 4)).value.tolist()
    [0.75, 0.75]
    """
    _given(records, "LLaVA-Bench", ("category", "question", "output"))
    points = []
    for index, record in enumerate(records):
        pair = np.asarray(judge(record), np.float64)
        if pair.shape != (2,) or not (np.isfinite(pair).all() and (pair > 0).all()):
            raise ValueError(f"LLaVA-Bench, record {index}: the judge must give two numbers above 0; it gave {pair.tolist()}.")
        points.append(pair)
    table = np.array(points)
    categories = np.array([str(record["category"]) for record in records])
    rows = []
    for group, mine in _groups(categories):
        row = {"score": "relative", "group": group} | _from_sums(table[mine], lambda sums: sums[:, 1] / sums[:, 0], level, seed)
        empty = sum(not str(record["output"]).strip() for record, kept in zip(records, mine, strict=True) if kept)
        rows.append({**row, "chance": np.nan, "unparsed": empty})
    return _table("LLaVA-Bench", rows, seed)


SCORERS: dict[str, Callable[..., pd.DataFrame]] = {
    "mmvp": score_mmvp,
    "naturalbench": score_naturalbench,
    "blink": score_blink,
    "cv-bench": score_cv_bench,
    "gqa": score_gqa,
    "vqav2": score_vqav2,
    "textvqa": score_textvqa,
    "pope": score_pope,
    "llava-bench": score_llava_bench,
    "jsonl": score_own,
}
