"""Which text a sample is given, and which tokens spell a word."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffprobe.conditioning import assign_prompts, check_conditioning, guided_name, parse_conditionings, prompt_for, word_tokens
from diffprobe.data.samples import Caption, Question, Sample
from diffprobe.models import DiffusionModel


def sample(name: str, captions: Sequence[str] = (), styles: Sequence[str] = (), questions: Sequence[str] = ()) -> Sample:
    styles = styles or ["plain"] * len(captions)
    return Sample(
        id=name,
        load=lambda: Image.new("RGB", (2, 2)),
        captions=tuple(Caption(text, style=style) for text, style in zip(captions, styles, strict=True)),
        questions=tuple(Question(text, "yes", ("yes", "no"), "presence") for text in questions),
    )


def prompts_of(samples: Sequence[Sample], name: str) -> list[str | None]:
    return assign_prompts(samples, [name])[name]


def captioned(*texts: str) -> list[Sample]:
    return [sample(f"{i}", [text]) for i, text in enumerate(texts)]


RICH = sample(
    "rich", ["a red star", "stars: 1", "a star there"], ["full", "list", "list"], ["is there a star?", "what colour?"]
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("null", None),
        ("caption", "a red star"),
        ("caption:0", "a red star"),
        ("caption:2", "a star there"),
        ("caption:full", "a red star"),
        ("caption:list", "stars: 1"),  # the first of that style
        ("question", "is there a star?"),
        ("question:1", "what colour?"),
        ("fixed:", ""),
        ("fixed:a photo: of\na cat", "a photo: of\na cat"),
    ],
)
def test_texts_by_name(name: str, text: str | None) -> None:
    check_conditioning(name)
    assert prompt_for(name, RICH) == text
    assert prompts_of([RICH, RICH], name) == [text, text]


@pytest.mark.parametrize(
    "name", ["", "Null", "captions", "caption:", "question:x", "question:", "fixed", "mismatched:1", "null:1"]
)
def test_other_names_are_refused_with_the_valid_forms(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Conditioning {name!r} is not one of: null, caption, .*fixed:TEXT"):
        check_conditioning(name)
    with pytest.raises(ValueError, match="is not one of: null"):
        prompts_of(captioned("a", "b"), name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("caption:3", r"Sample 'rich' has no caption '3' \(it has: 0, 1, 2, list, full\)"),
        ("caption:web", "Sample 'rich' has no caption 'web'"),
        ("question:2", r"Sample 'rich' has no question '2' \(it has: 0, 1\)"),
    ],
)
def test_texts_that_a_sample_lacks(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prompt_for(name, RICH)
    assert "captions file" in str(error.value)
    with pytest.raises(ValueError, match=r"Sample 'bare' has no (caption|question) .*\(it has: none\)"):
        prompts_of([RICH, sample("bare")], name.partition(":")[0])


@given(st.lists(st.text("abc", min_size=1, max_size=2), min_size=2, max_size=9).filter(lambda texts: len(set(texts)) > 1))
def test_mismatched_is_always_another_text_of_the_set(texts: list[str]) -> None:
    found = prompts_of(captioned(*texts), "mismatched")
    assert len(found) == len(texts)
    assert all(other in texts and other != own for own, other in zip(texts, found, strict=True))
    assert found == prompts_of(captioned(*texts), "mismatched")


@given(st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=2, max_size=9, unique=True))
def test_mismatched_is_a_derangement_where_texts_differ(texts: list[str]) -> None:
    found = prompts_of(captioned(*texts), "mismatched")
    assert sorted(str(text) for text in found) == sorted(texts)


def test_mismatched_is_the_caption_half_the_set_further_on() -> None:
    assert prompts_of(captioned(*"abcdef"), "mismatched") == list("defabc")
    assert prompts_of(captioned(*"abca"), "mismatched") == ["c", "a", "a", "b"]


@pytest.mark.parametrize("texts", [("a",), ("a", "a", "a")])
def test_mismatched_needs_two_texts(texts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="needs at least two samples whose captions differ"):
        prompts_of(captioned(*texts), "mismatched")


def test_guided_names() -> None:
    assert [guided_name("caption:list", s) for s in (0, 1.0, 1.5, 4, 7.25)] == [
        f"caption:list@{s}" for s in ("0", "1", "1.5", "4", "7.25")
    ]


SPANS = [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (11, 13), (14, 17), (18, 20), (20, 22), (0, 0), (0, 0)]
TEXT = "a red star on red stars"


@pytest.mark.parametrize(
    ("word", "tokens"),
    [
        ("star", [3, 4]),  # both sub-tokens, and not "stars"
        ("STAR", [3, 4]),
        ("red", [2]),  # where it first stands
        ("red star", [2, 3, 4]),
        ("a", [1]),  # not the letter in "star"
        ("tar", []),
        ("blue", []),
        ("star.", []),
    ],
)
def test_word_tokens(word: str, tokens: list[int]) -> None:
    assert word_tokens(TEXT, word, SPANS) == tokens


def test_word_tokens_take_a_word_with_signs_literally() -> None:
    assert word_tokens("a (red) star?", "(red)", [(0, 0), (0, 1), (2, 3), (3, 6), (6, 7), (8, 12), (12, 13)]) == [2, 3, 4]
    assert word_tokens("ared", ".red", [(0, 4)]) == []


def test_words_are_found_among_the_real_tokens_of_every_family(model: DiffusionModel) -> None:
    text = "On the left of a Red star, a blue circle"
    ids, spans, _ = model.tokens([text])
    pairs = [(int(a), int(b)) for a, b in spans[0]]
    for word, pieces in {"star": ["st", "ar"], "red": ["red"], "circle": ["circle"], "on": ["on"]}.items():
        found = model.pipeline.tokenizer.convert_ids_to_tokens(ids[0, word_tokens(text, word, pairs)].tolist())
        assert [piece.strip("▁").removesuffix("</w>") for piece in found] == pieces
    assert word_tokens(text, "square", pairs) == []


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("fixed:a red star,null", ["fixed:a red star", "null"]),
        ("null, fixed:a red star, on the left ,caption:list", ["null", "fixed:a red star, on the left", "caption:list"]),
        ("fixed:a,fixed:b, c", ["fixed:a", "fixed:b, c"]),
        ("caption, null,", ["caption", "null"]),
        ("captoin,null", ["captoin", "null"]),
        ("fixed:,null", ["fixed:", "null"]),
    ],
)
def test_conditionings_of_one_text(given: str, wanted: list[str]) -> None:
    assert parse_conditionings(given) == wanted
