"""Does the language model see the image, or read the prompt?  From generated texts to a verdict.

Leak is how much closer an output is to the text that conditioned its features than to the texts fed to other images.  Only
what the text says FALSELY of the image counts: a model that says true things alone has leak 0, whatever it was fed.  Three kinds
of leak are told apart: words, the number of things, and the order in which words stand.  Sight is how much closer an output is
to its image's references than to other images' references.  Steering is how much more of the image's truth an output says where
the fed text says it too: a model that sees may let its prompt choose what it speaks of, which is no leak.  All are 0 by chance.
They are measured under mismatched prompts; under an image's own caption nothing is false, and nothing can be told apart.

The invariants: "no leak" is said only after an equivalence test, never because nothing was found; and there is no verdict where
the negative control (a site that no text has reached) leaks, or where the positive control (the prompt's own embeddings) is not
read.

Projector seeds are a random factor, crossed with images: a score is the mean over both, and its variance is that of a two-way
table without repeats, (MS_image + MS_seed - MS_rest) / (images x seeds), with Satterthwaite's (1946) degrees of freedom rounded
down.  So an interval covers other images and other projectors; with one seed (n_seeds of the table) it covers other images only.

Sources: the set-up is that of arXiv 2507.07106; permutation p values as in Phipson & Smyth 2010, Holm 1979, two one-sided tests
as in Schuirmann 1987; usable information as in Xu et al. 2020 and Hewitt et al. 2021.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import t as student

from diffprobe.mllm.captions import Similarity, content_f1, content_words, number_of_things, words
from diffprobe.stats import Floats, bootstrap_interval, bootstrap_sums, holm, paired_permutation_test, wilson_interval

KEYS = ["control", "arm", "site", "timestep", "guidance"]
COLUMNS = ("arm", "site", "timestep", "guidance", "seed", "condition", "sample", "fed", "references", "output")
CONDITIONS = ("own", "mismatched", "mismatched_hard", "none", "blank_caption", "blank_none", "random_words", "paraphrase")
JUDGED = ("mismatched", "random_words")  # where the fed text says nothing of the image, and there is one
NEGATIVE, POSITIVE = "K-", "K+"
HARD = "mismatched_hard"  # a text that is nearly true of the image; where it was tried, its leak counts too
VERDICTS = ("sees", "sees, steered by the prompt", "leaks", "both", "neither", "inconclusive", "no verdict")
LEAKS = ("leak", "leak_count", "leak_order")  # words, the number of things, the order of words
SCORES = (*LEAKS, "steering", "sight")
DOSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LEAST_IMAGES = 10  # with fewer, a t interval of bounded scores cannot show that something is absent
POWER = 0.8

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Leakage:
    """What `judge_leakage` found.

    Attributes:
        table: One row per control, arm, site, timestep, guidance, condition and score (of `SCORES`, where the texts allow
            it): text (mean similarity), chance (the same with texts permuted over images), value (their difference), low,
            high, n (images), n_seeds, p (one-sided permutation test), p_holm (over the sites, timesteps and guidances of one
            arm and score, all kinds of leak and mismatched conditions together; a control's over its kinds of leak),
            p_equivalence (that the value lies outside +-margin), detectable (smallest true value that is found with 80%
            power at Holm's strictest level), margin, found, seed.
        verdicts: One row per arm, site, timestep and guidance: leak (of words) and sight with their intervals and smallest
            detectable values, steering, index with its interval, n, n_seeds, verdict, why.
        doses: One row per verdict and dose, where both controls were run: the share of images that K+ answers while K-
            answers the others, the leak of words of such a mixture, and power, how often it would be found.
    """

    table: pd.DataFrame
    verdicts: pd.DataFrame
    doses: pd.DataFrame


@dataclass(frozen=True)
class _Cell:
    """One place and condition: its rows of the table, and by score the values (seed, image) behind them."""

    key: Mapping[str, Any]
    values: Mapping[str, pd.DataFrame]
    rows: Sequence[dict[str, Any]]


def judge_leakage(
    generated: pd.DataFrame,
    similarity: Similarity = content_f1,
    *,
    condition: str = "mismatched",
    margin: float = 0.05,
    alpha: float = 0.05,
    level: float = 0.95,
    n_permutations: int = 9999,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Leakage:
    """Scores and verdicts from a table of generated texts.

    Columns of `generated`, one row per text:

    - arm: How the projector was trained ("U", "M s=4", "X", ...).
    - site, timestep, guidance: Where the features come from; guidance is the test's.
    - seed: The projector's.
    - condition: What the features were conditioned on, of `CONDITIONS`.
    - sample: The image's id; every seed of a cell has the same samples, each once.
    - fed: The text that conditioned the features, or "".  Rows without a text have no leak score.
    - references: JSON list (or a list) of texts that describe the image, never the fed text itself; rows with an empty
      list have no sight score.
    - output: What the language model wrote.
    - control (optional): "" for what is asked about, "K-" for the negative and "K+" for the positive control.  A
      control's arm, timestep and guidance name the cells that it serves; a missing one (NaN, None or "") serves all.
    - source (optional): The sample that the fed text describes, or "".  Pairs of that image and that text are then left out
      where texts are permuted; without this column a model that only sees has a leak of about -1/n instead of 0.

    A score is found ("yes") where it is at least the margin and its permutation test, after Holm, is below `alpha`.  It is
    absent ("no") where two one-sided tests show it within +-margin.  Otherwise it is "unclear".  A leak is found where one of
    its kinds is, and absent where all are.  Verdicts: "both" where leak and sight are found; "leaks" where only leak is; where
    leak is absent, "sees" if sight is found ("sees, steered by the prompt" if steering is found too) and "neither" if it is
    absent; the rest is "inconclusive".

    Args:
        similarity: Of outputs and texts; content-word F1 by default, else `cider_similarity(...)`.
        condition: The verdict's, of `JUDGED`; the table has all conditions.
        margin: What is too small to matter, in units of the similarity (F1: 0.05; CIDEr-D: about 0.5).
        alpha: Of every test; family-wise over the cells of an arm.
        n_permutations: Permutations of texts over images; the smallest p is 1 / (n_permutations + 1).
        n_resamples: Bootstrap resamples of images and seeds, for the index.

    Raises:
        ValueError: A column is missing, a value unknown, a cell incomplete, or a reference is the fed text.

    >>> judge_leakage(pd.read_csv("texts.csv", keep_default_na=False)).verdicts["verdict"].tolist()  # doctest: +SKIP
    ['sees', 'leaks']
    """
    if condition not in JUDGED:
        raise ValueError(
            f"A verdict needs an image and a text that says nothing of it, condition {' or '.join(JUDGED)}; got {condition!r}."
        )
    if not margin > 0 or not 0 < alpha < 0.5:
        raise ValueError(f"`margin` must be positive and `alpha` between 0 and 0.5; got {margin} and {alpha}.")
    texts = _checked(generated)
    cells = [
        _measure(dict(zip([*KEYS, "condition"], key, strict=True)), group, similarity, n_permutations, level, seed)
        for key, group in texts.groupby([*KEYS, "condition"], dropna=False, sort=False)
    ]
    table = pd.DataFrame([row for cell in cells for row in cell.rows])
    if condition not in set(table["condition"]):
        raise ValueError(
            f"There are no texts of condition {condition!r}; found {', '.join(dict.fromkeys(table['condition']))}."
        )
    table = _tested(table, margin, alpha)
    asked = [cell for cell in cells if cell.key["condition"] == condition and {"leak", "sight"} <= set(cell.values)]
    records = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    rows = {_name(row): row for row in records}
    judged = [cell for cell in asked if cell.key["control"] == ""]
    if not judged:
        raise ValueError(f"No cell of condition {condition!r} has both fed texts and references: there is nothing to judge.")
    verdicts = [_verdict(cell, asked, rows, level, n_resamples, seed) for cell in judged]
    doses = [row for cell in judged for row in _doses(cell, asked, margin, alpha / len(judged), seed)]
    return Leakage(table, pd.DataFrame(verdicts), pd.DataFrame(doses))


# --- scores ---------------------------------------------------------------------------------------


def _checked(generated: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in COLUMNS if name not in generated]
    if missing:
        raise ValueError(f"Generated texts need the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing.")
    if generated.empty:
        raise ValueError("There are no generated texts: the table is empty.")
    texts = generated.reset_index(drop=True).copy()
    for name, allowed in (("control", ("", NEGATIVE, POSITIVE)), ("condition", CONDITIONS)):
        texts[name] = texts[name].fillna("") if name in texts else ""
        if unknown := set(texts[name]) - set(allowed):
            raise ValueError(f"Column {name!r} has {sorted(unknown)[0]!r}; it takes {', '.join(map(repr, allowed))}.")
    for name in ("arm", "fed", "output", "source"):  # an empty text comes back from a CSV file as NaN
        texts[name] = texts[name].fillna("").astype(str) if name in texts else ""
    texts["references"] = [json.loads(r) if isinstance(r, str) else list(r) for r in texts["references"]]
    for row in texts.to_dict("records"):
        if row["fed"] and any(words(row["fed"]) == words(text) for text in row["references"]):
            raise ValueError(
                f"Sample {row['sample']!r}, {row['condition']}: the fed text {row['fed']!r} is among its references; leave it out."
            )
    return texts


def _measure(
    key: Mapping[str, Any], group: pd.DataFrame, similarity: Similarity, n_permutations: int, level: float, seed: int
) -> _Cell:
    """Leak and sight of one cell, where its texts allow them."""
    samples = _crossed(key, group)
    by_seed = [part.set_index("sample").loc[samples].reset_index() for _, part in group.groupby("seed", sort=True)]
    rows: list[dict[str, Any]] = []
    values: dict[str, pd.DataFrame] = {}
    fed, told = (np.all([part[column].map(bool) for part in by_seed], axis=0) for column in ("fed", "references"))
    # Of an image without references nothing is known to be false; where no image has any, all that was fed is.
    falsely = fed & told if told.any() else fed
    for score in SCORES:
        kept = told if score == "sight" else fed & told if score == "steering" else falsely
        if kept.sum() < 2:
            continue
        found = [score_matrix(part[kept], score, similarity) for part in by_seed]
        if not all(matrix.size for matrix, _ in found):
            continue
        matrices, centred = zip(*found, strict=True)
        own = np.stack([np.diag(matrix) for matrix in centred])
        values[score] = pd.DataFrame(own, columns=by_seed[0]["sample"][kept].astype(str))
        mean = crossed_mean(own, level)
        whole = np.mean(matrices, axis=0)
        text, p = float(np.diag(whole).mean()), permutation_p(whole, n_permutations, seed)
        about = {"score": score, "text": text, "chance": text - mean["value"], **mean, "p": p}
        rows.append({**key, **about, "n": own.shape[1], "n_seeds": own.shape[0], "seed": seed})
    if not values:
        raise ValueError(f"{_place(key)}: fewer than two samples with a fed text, and fewer than two with references.")
    return _Cell(key, values, rows)


def score_matrix(texts: pd.DataFrame, score: str, similarity: Similarity) -> tuple[Floats, Floats]:
    """Similarities of one projector's outputs with the texts of all its samples, as they are and centred: (output, text) each.

    Where a text has nothing that a score looks at (nothing false of the image, say), the output's mean over the other texts
    stands; where no text has, both are empty.

    Args:
        texts: Columns sample, source, fed, references (lists), output.
        score: Of `SCORES`.  "leak" compares with the fed text less the content words of the image's references; "leak_count"
            is 1 where the output names as many things as a fed text with a wrong number of them; "leak_order" is the share of
            pairs of words, in both texts and in this order in no reference, that stand in the fed text's order; "steering" is
            the share of the image's true words that the output says among those that were fed, less the share among those
            that were not; "sight" compares with references.
        similarity: Of outputs and texts, for "leak" and "sight".
    """
    names, sources = texts["sample"].to_numpy(dtype=str), texts["source"].to_numpy(dtype=str)
    describes = names[:, None] == sources[None, :]  # (sample, fed text)
    outputs, fed, told = (list(texts[column]) for column in ("output", "fed", "references"))
    if score == "sight":
        matrix, excluded = similarity(outputs, told), describes.T
    else:
        compare = {"leak": _false_words, "leak_count": _false_numbers, "leak_order": _false_orders, "steering": _chosen}[score]
        rows = [compare(output, own, fed, similarity) for output, own in zip(outputs, told, strict=True)]
        matrix, excluded = np.array(rows), describes
    unknown = np.isnan(matrix)
    if unknown.all():
        return np.empty((0, 0)), np.empty((0, 0))
    others = ~unknown & ~excluded & ~np.eye(len(matrix), dtype=bool)
    means = np.where(others, matrix, 0).sum(1) / np.maximum(others.sum(1), 1)
    matrix = np.where(unknown, means[:, None], matrix)
    return matrix, centre(matrix, excluded | unknown)


def _true_words(references: Sequence[str]) -> set[str]:
    return set[str]().union(*map(content_words, references))


def _false_words(output: str, references: Sequence[str], fed: Sequence[str], similarity: Similarity) -> Floats:
    """Similarity of an output with what each fed text says falsely of its image, (text,); NaN where it says nothing false."""
    true = _true_words(references)
    false = [" ".join(word for word in content_words(text) if word not in true) for text in fed]
    return np.where([not text for text in false], np.nan, similarity([output], [[text] for text in false])[0])


def _false_numbers(output: str, references: Sequence[str], fed: Sequence[str], similarity: Similarity) -> Floats:
    """1 where an output names as many things as a text that names a wrong number of them, else 0; NaN where the number is right."""
    true, said = {number_of_things(text) for text in references} - {0}, number_of_things(output)
    if references and not true:
        return np.full(len(fed), np.nan)
    numbers = map(number_of_things, fed)
    return np.array([np.nan if number == 0 or number in true else float(said == number) for number in numbers])


def _false_orders(output: str, references: Sequence[str], fed: Sequence[str], similarity: Similarity) -> Floats:
    """Of the pairs of words in an output and a text, in whose order no reference has them: the share in the text's order."""
    true, said = frozenset[tuple[str, str]]().union(*map(_ordered_pairs, references)), _ordered_pairs(output)
    turned = {(b, a) for a, b in said}
    counts = [(len(pairs & said), len(pairs & turned)) for pairs in (_ordered_pairs(text) - true for text in fed)]
    return np.array([same / (same + other) if same + other else np.nan for same, other in counts])


@lru_cache(2**14)
def _ordered_pairs(text: str) -> frozenset[tuple[str, str]]:
    """Content words with every other one that stands after them, each at its first place."""
    return frozenset(combinations(dict.fromkeys(content_words(text)), 2))


def _chosen(output: str, references: Sequence[str], fed: Sequence[str], similarity: Similarity) -> Floats:
    """Share of an image's true words that an output says, among those in the text, less the share among the others."""
    true, said = _true_words(references), set(content_words(output))
    split = [(named, true - named) for named in (true & set(content_words(text)) for text in fed)]
    share = lambda words: len(words & said) / len(words)  # noqa: E731
    return np.array([share(named) - share(others) if named and others else np.nan for named, others in split])


def _crossed(key: Mapping[str, Any], group: pd.DataFrame) -> list[Any]:
    """The samples of a cell, which every seed must have once."""
    if group.duplicated(["seed", "sample"]).any():
        twice = group[group.duplicated(["seed", "sample"])].iloc[0]
        raise ValueError(f"{_place(key)}: sample {twice['sample']!r} of seed {twice['seed']} stands twice.")
    seeds, samples = sorted(set(group["seed"])), list(dict.fromkeys(group["sample"]))
    if len(group) != len(seeds) * len(samples):
        counts = group.groupby("seed").size().to_dict()
        raise ValueError(
            f"{_place(key)}: every seed needs the same samples; rows by seed are {counts} of {len(samples)} samples."
        )
    return samples


def _place(key: Mapping[str, Any]) -> str:
    parts = [str(key["control"]), str(key["arm"]), str(key["site"])]
    return " ".join([*filter(None, parts), f"t={key['timestep']} s={key['guidance']} {key.get('condition', '')}"]).strip()


def centre(matrix: Floats, excluded: Bools | None = None) -> Floats:
    """Similarities (output, text) less each output's mean over the other images' texts; excluded pairs become 0.

    >>> centre(np.array([[1.0, 0.5, 0.1], [0.2, 0.2, 0.2], [0.0, 0.0, 0.9]])).round(2).tolist()[0]
    [0.7, 0.2, -0.2]
    """
    excluded = np.zeros(matrix.shape, bool) if excluded is None else excluded & ~np.eye(len(matrix), dtype=bool)
    others = ~np.eye(len(matrix), dtype=bool) & ~excluded
    means = (matrix * others).sum(1) / np.maximum(others.sum(1), 1)
    return np.asarray(np.where(excluded, 0, matrix - means[:, None]))


def permutation_p(similarity: Floats, n_permutations: int = 9999, seed: int = 0) -> float:
    """One-sided p of the mean of the diagonal of (output, text), when texts are permuted over outputs.

    It is exact where outputs do not depend on the texts.  Several projectors enter as the mean of their matrices, since under
    the hypothesis one permutation holds for each of them.  Pairs that `centre` excludes stay in: they can only make p larger.

    >>> permutation_p(np.eye(8), 999)
    0.001
    """
    n, rng = len(similarity), np.random.default_rng(seed)
    observed = np.trace(similarity) - 1e-12 * n  # rounding must not hide a tie
    reached, step = 0, max(1, 2**20 // n)
    for start in range(0, n_permutations, step):
        drawn = rng.permuted(np.tile(np.arange(n), (min(step, n_permutations - start), 1)), axis=1)
        reached += int((similarity[np.arange(n), drawn].sum(1) >= observed).sum())
    return (reached + 1) / (n_permutations + 1)


def crossed_mean(values: Floats, level: float = 0.95) -> dict[str, float]:
    """Mean of (seed, image) values with the interval of a two-way random layout: value, low, high, se, df.

    >>> found = crossed_mean(np.array([[0.0, 1.0, 2.0, 3.0]]))
    >>> found["value"], round(found["se"], 3), found["df"]
    (1.5, 0.645, 3)
    """
    seeds, images = values.shape
    mean = float(values.mean())
    by_image = seeds * values.mean(0).var(ddof=1)
    variance, df = by_image, images - 1
    if seeds > 1:
        by_seed = images * values.mean(1).var(ddof=1)
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + mean
        left = float((rest**2).sum()) / ((images - 1) * (seeds - 1))
        variance = by_image + max(0.0, by_seed - left)
        spread = by_image**2 / (images - 1) + by_seed**2 / (seeds - 1) + left**2 / ((images - 1) * (seeds - 1))
        df = max(seeds - 1, int(variance**2 / spread)) if spread > 0 else df
    se = float(np.sqrt(variance / values.size))
    half = float(student.ppf((1 + level) / 2, df)) * se
    return {"value": mean, "low": mean - half, "high": mean + half, "se": se, "df": df}


def equivalence_p(value: float, se: float, df: float, margin: float) -> float:
    """p of two one-sided tests: small where the value is shown to lie within +-margin.

    >>> equivalence_p(0.0, 0.01, 50, 0.05) < 0.001, equivalence_p(0.0, 0.1, 50, 0.05) > 0.05, equivalence_p(0.06, 0.01, 50, 0.05) > 0.5
    (True, True, True)
    """
    if se == 0:
        return float(abs(value) >= margin)
    return float(max(student.sf((margin - value) / se, df), student.sf((margin + value) / se, df)))


def _tested(table: pd.DataFrame, margin: float, alpha: float) -> pd.DataFrame:
    """Add Holm's p values, the equivalence test, the smallest detectable value and what was found."""
    table = table.copy()
    together = {"score": table["score"].where(~table["score"].isin(LEAKS), "leak")}
    together["condition"] = table["condition"].where(table["condition"] != HARD, "mismatched")
    # A control's cell is a family of its own.
    alone = [
        "" if row["control"] == "" else _place({str(name): value for name, value in row.items()})
        for row in table.to_dict("records")
    ]
    family = table.assign(**together, alone=alone).groupby(["arm", "alone", "condition", "score"], sort=False)["p"]
    table["p_holm"] = family.transform(lambda p: holm(p.to_numpy()))
    size = family.transform("size")
    table["p_equivalence"] = [equivalence_p(row["value"], row["se"], row["df"], margin) for row in table.to_dict("records")]
    least = np.maximum(margin, table["se"] * student.isf(alpha / size, table["df"]))
    table["detectable"] = least + table["se"] * student.ppf(POWER, table["df"])
    present = (table["p_holm"] < alpha) & (table["value"] >= margin)
    absent = (table["p_equivalence"] < alpha) & (table["n"] >= LEAST_IMAGES)
    table["found"] = np.select([present, absent], ["yes", "no"], "unclear")
    table["margin"] = margin
    first = [*KEYS, "condition", "score", "text", "chance", "value", "low", "high", "n", "n_seeds"]
    return table[[*first, "p", "p_holm", "p_equivalence", "detectable", "margin", "found", "seed"]]


# --- verdicts -------------------------------------------------------------------------------------


def _verdict(
    cell: _Cell, cells: Sequence[_Cell], rows: Mapping[str, dict[str, Any]], level: float, n_resamples: int, seed: int
) -> dict[str, Any]:
    def measured(score: str, condition: str = cell.key["condition"], of: _Cell = cell) -> dict[str, Any] | None:
        return rows.get(_name({**of.key, "condition": condition, "score": score}))

    leak, sight = rows[_name({**cell.key, "score": "leak"})], rows[_name({**cell.key, "score": "sight"})]
    conditions = (cell.key["condition"], HARD) if cell.key["condition"] == "mismatched" else (cell.key["condition"],)
    kinds = ((f"{score}{' (hard)' * (c == HARD)}", measured(score, c)) for c in conditions for score in LEAKS)
    leaks = {name: row for name, row in kinds if row}
    steering = measured("steering")
    controls = {name: _control(cell, cells, name) for name in (NEGATIVE, POSITIVE)}
    negative, positive = controls.values()
    index = {"index": np.nan, "index_low": np.nan, "index_high": np.nan}
    if negative and positive:
        own, low, high = (c.values["leak"] for c in (cell, negative, positive))
        index = normalised_index(own, low, high, level, n_resamples, seed)
    row = {name: cell.key[name] for name in [*KEYS[1:], "condition"]}
    for score, mine in {"leak": leak, "sight": sight}.items():
        row |= {score: mine["value"], f"{score}_low": mine["low"], f"{score}_high": mine["high"]}
        row |= {f"{score}_p_holm": mine["p_holm"], f"{score}_detectable": mine["detectable"]}
    row["steering"] = steering["value"] if steering else np.nan
    row |= {**index, "n": min(leak["n"], sight["n"]), "n_seeds": leak["n_seeds"], "margin": leak["margin"], "seed": seed}
    tested = {name: [r for score in LEAKS if (r := measured(score, of=c))] if c else [] for name, c in controls.items()}
    if why := _objection(tested):
        return {**row, "verdict": "no verdict", "why": why}
    found = [mine["found"] for mine in leaks.values()]
    leaking = "yes" if "yes" in found else "no" if set(found) == {"no"} else "unclear"
    # What decided is said: the kinds of leak that were found, else those that could not be excluded, else words alone.
    shown = {name: mine for name, mine in leaks.items() if mine["found"] == leaking} if leaking != "no" else {"leak": leak}
    verdict = _word(leaking, sight["found"])
    if verdict == "sees" and steering and steering["found"] == "yes":
        verdict, shown = "sees, steered by the prompt", {**shown, "steering": steering}
    reasons = "; ".join(_finding(score.replace("_", " of "), mine) for score, mine in {**shown, "sight": sight}.items())
    return {**row, "verdict": verdict, "why": reasons}


def _doses(
    cell: _Cell, cells: Sequence[_Cell], margin: float, alpha: float, seed: int, draws: int = 200
) -> list[dict[str, Any]]:
    """How often a leak is found where K+ answers a share of the images and K- the others, for each of `DOSES`."""
    negative, positive = _control(cell, cells, NEGATIVE), _control(cell, cells, POSITIVE)
    if negative is None or positive is None:
        return []
    zero, one = negative.values["leak"], positive.values["leak"]
    shared, seeds = [name for name in one.columns if name in zero.columns], min(len(zero), len(one))
    if len(shared) < 2:
        return []
    without, read = (frame[shared].to_numpy()[:seeds] for frame in (zero, one))
    rng, n = np.random.default_rng(seed), len(shared)
    rows = []
    for dose in DOSES:
        mixed = [np.where(rng.permutation(n) < round(dose * n), read, without) for _ in range(draws)]
        means = [crossed_mean(values) for values in mixed]
        hits = [m["value"] >= margin and m["value"] > m["se"] * student.isf(alpha, m["df"]) for m in means]
        about = {name: cell.key[name] for name in KEYS[1:]}
        value, power = float(np.mean([m["value"] for m in means])), float(np.mean(hits))
        rows.append({**about, "dose": dose, "value": value, "power": power, "n": n, "n_seeds": seeds, "margin": margin})
    return rows


def _name(row: Mapping[str, Any]) -> str:
    """A cell's name; NaN is equal to NaN in text only."""
    return repr([str(row[name]) for name in [*KEYS, "condition", "score"]])


def _control(cell: _Cell, cells: Sequence[_Cell], name: str) -> _Cell | None:
    """The control that serves a cell: the one that names most of its arm, timestep and guidance, and no other."""
    serving: list[tuple[int, _Cell]] = []
    for other in cells:
        named = {k: other.key[k] for k in ("arm", "timestep", "guidance") if not (pd.isna(other.key[k]) or other.key[k] == "")}
        if other.key["control"] == name and all(cell.key[k] == value for k, value in named.items()):
            serving.append((len(named), other))
    return max(serving, key=lambda item: item[0])[1] if serving else None


def _objection(controls: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Why there is no verdict, from each control's kinds of leak (words first); empty where the controls are in order."""
    for name, kinds in controls.items():
        if not kinds:
            return f"{name} was not run for this arm, timestep and guidance"
        found = [row for row in kinds if row["found"] == "yes"]
        row = found[0] if found else kinds[0]
        what = row["score"].replace("_", " of ")
        text = f"{what} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], p = {row['p_holm']:.2g}, n = {row['n']}"
        if name == NEGATIVE and found:
            return f"K- leaks ({text}): a site that no text has reached cannot, so something else carries the prompt"
        if name == POSITIVE and kinds[0]["found"] != "yes":
            return f"K+ fails ({text}): even the prompt's own embeddings are not read, so a leak could not be found"
    return ""


def _word(leak: str, sight: str) -> str:
    """The verdict from what was found of leak and sight; "sees" needs the leak shown absent.

    >>> [_word("yes", "no"), _word("yes", "unclear"), _word("no", "yes"), _word("unclear", "yes")]
    ['leaks', 'leaks', 'sees', 'inconclusive']
    """
    if leak == "yes":
        return "both" if sight == "yes" else "leaks"
    if leak == "no" and sight != "unclear":
        return "sees" if sight == "yes" else "neither"
    return "inconclusive"


def _finding(score: str, row: Mapping[str, Any]) -> str:
    text = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    if row["found"] == "yes":
        return f"{score} {text}, p = {row['p_holm']:.2g}"
    if row["found"] == "no":
        return f"no {score} beyond {row['margin']:g}: {text}"
    return f"{score} unclear: {text}; {row['detectable']:.3f} could have been found"


def sentence(verdict: Mapping[str, Any]) -> str:
    """A row of verdicts in one sentence, what the test could have found before what it found."""
    where = f"{verdict['arm']} at {verdict['site']}, t = {verdict['timestep']:g}, s = {verdict['guidance']:g}"
    power = (
        f"{verdict['n']} images, {verdict['n_seeds']} projectors: a leak of {verdict['leak_detectable']:.3f} is found in 80%"
    )
    return f"{where} ({power}): {verdict['verdict']} ({verdict['why']})."


def normalised_index(
    leak: pd.DataFrame,
    negative: pd.DataFrame,
    positive: pd.DataFrame,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Where a leak lies between the controls, (L - L_K-) / (L_K+ - L_K-): index, index_low, index_high.

    Each frame is (seed, image) with images as columns; images that all three have are resampled jointly.  Seeds are resampled
    apart, their deviations stretched by sqrt(R / (R - 1)), since a bootstrap of R values has only (R - 1) / R of their variance.
    NaN where fewer than two images are shared, or where K+ does not exceed K-; resamples where it does not are left out.
    """
    shared = [name for name in leak.columns if name in negative.columns and name in positive.columns]
    unknown = {"index": np.nan, "index_low": np.nan, "index_high": np.nan}
    if len(shared) < 2:
        return unknown
    blocks = [frame[shared].to_numpy() for frame in (leak, negative, positive)]
    ends = np.cumsum([len(block) for block in blocks])[:-1]
    rng = np.random.default_rng(seed)

    def ratio(sums: Floats, resample: bool = True) -> Floats:
        means = []
        for part in np.split(sums, ends, axis=1):  # (resample, seed); several seeds are drawn anew with each resample
            mean, seeds = part.mean(1), part.shape[1]
            if resample and seeds > 1:
                drawn = np.take_along_axis(part, rng.integers(seeds, size=part.shape), axis=1).mean(1)
                mean = mean + np.sqrt(seeds / (seeds - 1)) * (drawn - mean)
            means.append(mean)
        low, zero, one = means
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(one > zero, (low - zero) / (one - zero), np.nan))

    columns = np.concatenate(blocks).T
    value = float(ratio(columns.sum(0, keepdims=True), resample=False)[0])
    if np.isnan(value):
        return unknown
    low, high = bootstrap_sums(columns, ratio, None, level, n_resamples, seed)
    return {"index": value, "index_low": low, "index_high": high}


# --- without decoding -----------------------------------------------------------------------------


def matched_candidates(texts: Sequence[str], n: int = 100, lengths: ArrayLike | None = None, seed: int = 0) -> NDArray[np.intp]:
    """For each text, `n` texts of nearly its length, itself first: indices (text, candidate).

    Args:
        texts: Fed texts; no row has two candidates with the same words.
        n: Candidates, with the text itself.
        lengths: One length per text, in the language model's tokens; in words by default.

    Raises:
        ValueError: A text has fewer than n - 1 others.

    >>> matched_candidates(["a", "a b c d", "b c", "e"], n=2).tolist()[0]
    [0, 3]
    """
    tokens = [tuple(words(text)) for text in texts]
    sizes = np.asarray([len(t) for t in tokens] if lengths is None else lengths, np.float64)
    groups = {t: k for k, t in enumerate(dict.fromkeys(tokens))}
    kind = np.array([groups[t] for t in tokens])
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(len(texts)):
        order = rng.permutation(len(texts))
        order = order[np.argsort(np.abs(sizes[order] - sizes[index]), kind="stable")]
        _, first = np.unique(kind[order], return_index=True)
        others = [int(j) for j in order[np.sort(first)] if kind[j] != kind[index]]
        if len(others) < n - 1:
            raise ValueError(f"Text {index} has {len(others)} different others; {n} candidates need {n - 1}.")
        rows.append([index, *others[: n - 1]])
    return np.array(rows, dtype=np.intp)


def rank_fed(
    conditional: ArrayLike, baseline: ArrayLike, fed: ArrayLike = 0, *, clusters: ArrayLike | None = None, seed: int = 0
) -> pd.DataFrame:
    """Whether the fed text is the likeliest of its candidates, given the features.

    Candidates are ranked by log P(text | features) - log P(text | baseline).  top1 is the share ranked first (a tie is a
    miss); mrr the mean of 1 / rank (equal candidates have their middle rank); bits is log2 of the softmax of the differences
    at the fed text, relative to 1 / candidates: a lower bound of the features' information on which text was fed, negative
    where they mislead.

    Args:
        conditional: (item, candidate) natural log-likelihoods of whole texts.
        baseline: The same given a blank image, or no prompt: (item, candidate) or (candidate,).
        fed: Column of each item's fed candidate; `matched_candidates` puts it at 0.
        clusters: One id per item, for example its image where several projectors score it.

    Returns:
        Rows top1, mrr, bits; columns score, value, low, high (95% intervals), chance, n, n_candidates, seed.

    Raises:
        ValueError: Shapes do not fit, or a value is not finite.

    >>> rank_fed([[-1.0, -9.0], [-2.0, -2.0]], [-5.0, -5.0]).value.round(2).tolist()
    [0.5, 0.83, 0.5]
    """
    given, empty = np.asarray(conditional, np.float64), np.asarray(baseline, np.float64)
    if given.ndim != 2 or given.shape[1] < 2 or empty.shape not in (given.shape, given.shape[1:]):
        raise ValueError(
            f"Log-likelihoods are (item, candidate) with two candidates or more, the baseline the same or (candidate,); "
            f"got {given.shape} and {empty.shape}."
        )
    gain = given - empty
    if not np.isfinite(gain).all():
        raise ValueError(f"{int((~np.isfinite(gain)).sum())} of {gain.size} log-likelihoods are not finite.")
    items, n = gain.shape
    own = gain[np.arange(items), np.broadcast_to(fed, items)][:, None]
    above, equal = (gain > own).sum(1), (gain == own).sum(1) - 1
    bits = np.log2(n) - logsumexp(gain - own, axis=1) / np.log(2)
    scores = {
        "top1": ((above + equal == 0).astype(float), 1 / n),
        "mrr": (1 / (1 + above + equal / 2), float(np.sum(1 / np.arange(1, n + 1)) / n)),
        "bits": (bits, 0.0),
    }
    rows = []
    for score, (values, chance) in scores.items():
        if score == "top1" and clusters is None:
            low, high = wilson_interval(values.sum(), items)
        else:
            low, high = bootstrap_interval(values, clusters, seed=seed)
        rows.append({"score": score, "value": values.mean(), "low": low, "high": high, "chance": chance, "n": items})
    return pd.DataFrame(rows).assign(n_candidates=n, seed=seed)


def usable_information(
    conditional: ArrayLike, unconditional: ArrayLike, n_tokens: ArrayLike, *, clusters: ArrayLike | None = None, seed: int = 0
) -> pd.DataFrame:
    """Information on the prompt in conditional features beyond the same image's unconditional ones, in bits per token.

    Conditional V-information (Xu et al. 2020; conditional probing, Hewitt et al. 2021): the drop in the prompt's
    cross-entropy from a reader of the unconditional features to a reader of both.  Both readers are trained alike and scored on
    held-out images; a reader that does not use all of its input makes the value too small, even negative.

    Args:
        conditional: (text,) natural log-likelihood of each fed text, all its tokens, under the reader of both.
        unconditional: The same under the reader of unconditional features.
        n_tokens: Tokens of each text.
        clusters: One id per text (its image), where several projectors read it.

    Returns:
        One row: score, value, low, high (95% interval), chance (0), p (sign flips of the texts' differences), n, n_tokens, seed.

    Raises:
        ValueError: Shapes differ, or a text has no token.

    >>> usable_information([-2.0, -4.0], [-4.0, -8.0], [3, 3]).value.round(3).tolist()
    [1.443]
    """
    gain = (np.asarray(conditional, np.float64) - np.asarray(unconditional, np.float64)) / np.log(2)
    tokens = np.asarray(n_tokens, np.float64)
    if gain.shape != tokens.shape or gain.ndim != 1 or not (tokens > 0).all():
        raise ValueError(
            f"Each text needs two log-likelihoods and at least one token; got shapes {gain.shape} and {tokens.shape}."
        )
    columns = np.stack([gain, tokens], axis=1)
    low, high = bootstrap_sums(columns, lambda sums: sums[:, 0] / sums[:, 1], clusters, seed=seed)
    _, p = paired_permutation_test(gain, np.zeros_like(gain), seed, clusters=clusters)
    row = {"score": "bits per token", "value": gain.sum() / tokens.sum(), "low": low, "high": high, "chance": 0.0, "p": p}
    return pd.DataFrame([{**row, "n": len(gain), "n_tokens": int(tokens.sum()), "seed": seed}])
