"""The answer in a model's free text: yes or no, or one of several options.

The rules are ours.  The official scripts ask a language model (MMVP, BLINK), take everything that is not "no" for "yes" (POPE),
or take an article "a" for option A (NaturalBench).  The invariant: no reader guesses; a text without a clear answer gives None.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def read_yes_no(text: str) -> str | None:
    """ "yes", "no", or None where neither is said.

    The first whole word "yes" or "no" decides, in any case.  Without either, a negation ("not", "isn't") in the first
    sentence is a no.

    >>> [read_yes_no(t) for t in ("Yes.", "There is no dog", "The dog isn't there.", "Nothing", "")]
    ['yes', 'no', 'no', None, None]
    """
    if found := re.search(r"\b(yes|no)\b", text, re.IGNORECASE):
        return found[1].lower()
    return "no" if re.search(r"\bnot\b|n['’]t\b", text.partition(".")[0], re.IGNORECASE) else None  # noqa: RUF001


def read_pope(text: str) -> str | None:
    """POPE's own rule (Li et al. 2023): "no" where the first sentence has "No", "no" or "not", else "yes", even when empty.

    >>> [read_pope(t) for t in ("No, there is none.", "I cannot see. No", "NO", "")]
    ['no', 'yes', 'yes', 'yes']
    """
    return "no" if {"No", "no", "not"} & set(text.partition(".")[0].replace(",", "").split(" ")) else "yes"


def read_choice(text: str, options: Sequence[str], lettered: bool = True) -> int | None:
    """Which option a text chooses, as an index, or None.  The first of these rules that finds exactly one option decides:

    1. the whole text is an option or an option's letter: "B", "(b)", "b.", "two";
    2. it states a letter: at its beginning ("B. two", "B, because", "B - not one"), alone on a line, in LaTeX's box, after
       "answer", "the option is" or "I choose" ("Answer: **B**"), or as "B is correct";
    3. a letter follows "option" or "choice", as a capital or before a stop: "I see option B", "option b.";
    4. letters in brackets: "it must be (B)";
    5. options stand in it as whole words, those inside a longer option that is there too left out: "dark red", not "red";
    6. for options yes and no, `read_yes_no`.

    A stated letter beats any option's words: two of them ("A or B"), or one that no option has, are no answer.  Letters that
    are rejected ("A is wrong", "not A") are not read.

    A bare letter inside a sentence is no answer: "a" is an article.  Without letters, options that are letters themselves ("H",
    "L") are looked for as capitals, except A and I.

    Args:
        lettered: Whether the question shows a letter with each option (`shows_letters`); if not, rules 1 to 4 read no letters.

    >>> texts = ("(b)", "A", "It is dark red.", "the answer is: a", "The answer is A because", "the answer is a car", "A car")
    >>> [read_choice(text, ("red", "dark red")) for text in texts]
    [1, 0, 1, 0, 0, None, None]
    >>> read_choice("red and blue", ("red", "blue")) is None
    True
    >>> [read_choice(text, ("H", "L"), lettered=False) for text in ("A", "It is an L.", "h")]
    [None, 1, 0]
    """
    letters = string.ascii_lowercase[: len(options)]
    folded = [_fold(option) for option in options]
    whole = _fold(text)
    if whole and whole in folded:  # options of signs alone are folded to nothing, as an empty text is
        return folded.index(whole)
    if not lettered and all(len(option) == 1 and option.isalpha() for option in folded):
        said = {folded.index(letter) for letter in folded if letter not in "ai" and re.search(rf"\b{letter.upper()}\b", text)}
        return said.pop() if len(said) == 1 else None
    if lettered:
        if len(whole) == 1 and whole in letters:
            return letters.index(whole)
        stated, *weaker = _said_letters(text, letters, folded)
        if stated:
            return letters.index(min(stated)) if len(stated) == 1 and stated <= set(letters) else None
        if by_letter := next((found for found in weaker if len(found) == 1), None):
            return letters.index(min(by_letter))
    # an option that is itself a letter ("a") would be found in every sentence
    named = [(k, option) for k, option in enumerate(folded) if len(option) > 1 or option.isdigit()]
    spans = [(m.span(), k) for k, option in named for m in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", whole)]
    kept = {k for (a, b), k in spans if not any(c <= a and b <= d and (a, b) != (c, d) for (c, d), _ in spans)}
    if len(kept) == 1:
        return kept.pop()
    if sorted(folded) == ["no", "yes"] and (answer := read_yes_no(text)):
        return folded.index(answer)
    return None


def shows_letters(answer: str, options: Sequence[str]) -> bool:
    """Whether a benchmark names an option by its letter, as its own answer shows.

    >>> shows_letters("(a)", ("Open", "Closed")), shows_letters("A", ("A", "B")), shows_letters("Open", ("Open", "Closed"))
    (True, True, False)
    """
    folded = [_fold(option) for option in options]
    return folded == list(string.ascii_lowercase[: len(options)]) or _fold(answer) not in folded


def _said_letters(text: str, letters: str, options: Sequence[str]) -> list[set[str]]:
    """Letters that a text states, those that follow "option" or "choice", and those in brackets.

    Capitals up to H are taken for letters though no option has them, so that "D. red" is not read as "red".
    """
    capitals = max("ABCDEFGH", letters.upper(), key=len)
    capital = rf"(?<![\w'’-])[{capitals}](?!\w|['’-]\w)"  # noqa: RUF001
    small = rf"(?<![\w'’-])[{letters}](?=\s*(?:$|[)\],:;\n]|\.(?!\w)))"  # noqa: RUF001
    one = rf"[(\[]?(?:{capital}|{small})[)\]]?"
    several = rf"{one}(?:\s*(?:,?\s*\b(?:and|or)\b|[/&])\s*[(\[]?{capital}|\s*,\s*[(\[]?{capital}(?!\s+(?!and\b|or\b)[a-z]))*"
    verb = r"(?:is|are|was|would\s+be|must\s+be|should\s+be|will\s+be|seems|looks)"
    named = r"(?i:(?:the\s+)?(?:answer|option|choice|letter)\s+)?"

    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\nAnswer: \1\n", text)
    text = re.sub(r"[*`$]|(?<!\w)_|_(?!\w)", "", text)
    for option in options:  # "A" before an option's own words is an article
        if own := re.sub(r"^(?:an?|the) ", "", option):
            text = re.sub(rf"(?<!\w)[Aa] (?={re.escape(own)}(?!\w))", "", text, flags=re.IGNORECASE)
    for rejected in (
        rf"(?i:\b(?:not|nor|neither|than|instead\s+of|unlike)|n['’]t(?:\s+be)?)\s+{named}{one}",  # noqa: RUF001
        rf"{named}{several}\s+(?:{verb}\s+(?:\w+\s+)?(?:not|wrong|incorrect|false)\b|\w+n['’]t\b|(?:can|does|do)\s*not\b)",  # noqa: RUF001
    ):
        text = re.sub(rejected, ";", text)
    after = (
        rf"(?i:\banswers?\b(?:\s+{verb}\b)?|\b(?:option|choice|guess)\b(?:\s+{verb}\b|\s*(?=[:=]))"
        r"|\b(?:choose|chose|pick|select|go\s+with)\b)[\s:=>\"'–—-]*"  # noqa: RUF001
    )
    rules = (
        (
            rf"^\W*({several})(?=[^\S\n]*(?:$|[).,:;!\]\n]|[–—]|-\s|(?:because|since|as|due)\b))",  # noqa: RUF001
            rf"(?m)^[^\w\n]*({several})[^\w\n]*$",
            rf"{after}{named}({several})",
            rf"({several})\s+{verb}\s+(?:\w+\s+){{0,2}}?(?:correct|answer|(?:best|right|true)\s+(?:answer|option|choice))\b",
        ),
        (rf"(?i:\b(?:option|choice))\s*({one})",),
        (r"([(\[][A-Za-z][)\]])",),
    )
    return [
        {letter.lower() for rule in tier for said in re.findall(rule, text) for letter in re.findall(r"\b[A-Za-z]\b", said)}
        & (set(capitals.lower()) if tier is rules[0] else set(letters))
        for tier in rules
    ]


def split_options(text: str) -> list[str]:
    """The options of a string such as MMVP's.

    >>> split_options("(a) Open (b) Closed")
    ['Open', 'Closed']
    """
    return [part.strip() for part in re.split(r"\([a-zA-Z]\)", text)[1:]]


def _fold(text: str) -> str:
    """Lower case, without punctuation at the ends of words, single spaces."""
    return " ".join(word.strip(string.punctuation) for word in text.lower().split()).strip()


def options_of(record: Record) -> list[str]:
    """The possible answers; a record without options is NaturalBench's, with A and B or Yes and No.

    >>> options_of({"options": "(a) Open (b) Closed"}), options_of({"kind": "multiple_choice"}), options_of({})
    (['Open', 'Closed'], ['A', 'B'], ['Yes', 'No'])
    """
    options = record.get("options", ("A", "B") if record.get("kind") == "multiple_choice" else ("Yes", "No"))
    return split_options(options) if isinstance(options, str) else [str(option) for option in options]


def read_record(record: Record, options: Sequence[str]) -> tuple[int | None, int | None]:
    """Which options a record's answer and its output choose; letters are read where its answer shows that there are any.

    >>> read_record({"answer": "(b)", "output": "A"}, ("H", "L")), read_record({"answer": "L", "output": "A"}, ("H", "L"))
    ((1, 0), (1, None))
    """
    answer, output = str(record.get("answer", "")), str(record["output"])
    lettered = shows_letters(answer, options)
    return read_choice(answer, options, lettered), read_choice(output, options, lettered)
