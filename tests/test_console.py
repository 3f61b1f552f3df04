"""Texts of others on a terminal, and progress in a log."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from diffprobe import console
from diffprobe.console import Console, visible

HOSTILE = "[/red][bold]a\x1b]0;mine\x07 \x9b31m star\r :red_circle: [link=x]"
SHOWN = r"[/red][bold]a\x1b]0;mine\x07 \x9b31m star\r :red_circle: [link=x]"


def test_texts_of_others_are_shown_as_they_are() -> None:
    assert visible(HOSTILE) == SHOWN and visible("é\tنجمة 🌟\n[1]") == "é\tنجمة 🌟\n[1]" and visible("\udcff") == r"\udcff"
    for terminal in (False, True):
        out = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
        out.print(HOSTILE)
        table = Table(HOSTILE, title=HOSTILE, box=None)
        table.add_row(HOSTILE)
        out.print(table)
        with out.progress(HOSTILE, "items", 2) as advance:
            advance(2)
        said = out.file.getvalue()  # type: ignore[attr-defined]
        assert said.count(SHOWN) >= 5 and "\x9b" not in said and "\x07" not in said and "\x1b]" not in said


def test_progress_in_a_log_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), width=40)
    with out.progress("extract", "samples", 50, done=10) as advance:
        for _ in range(10):
            now[0] += 8
            advance(4)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [
        "extract: 26 of 50 samples, 0.5 samples/s, 0:00:32 gone, about 0:00:48 left",
        "extract: 42 of 50 samples, 0.5 samples/s, 0:01:04 gone, about 0:00:16 left",
        "extract: 50 of 50 samples, 0.5 samples/s, 0:01:20 gone",
    ]


def test_no_progress_where_nothing_was_done_or_asked_for() -> None:
    for quiet, number in ((True, 1), (False, 0)):
        out = Console(file=io.StringIO(), quiet=quiet)
        with out.progress("extract", "samples", 1) as advance:
            advance(number)
        assert out.file.getvalue() == ""  # type: ignore[attr-defined]
