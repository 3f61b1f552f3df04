"""Output to a terminal or a log: texts unchanged, progress as a bar or as lines.

Most printed text comes from elsewhere: file names, captions, labels, answers.  The invariant: none of it is read as markup,
and none of its control characters reaches the terminal, where it could move the cursor or change the window's title.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

LINE_SECONDS = 30.0  # between two lines of progress in a log
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and lone surrogates, which file names can hold


def visible(text: str) -> str:
    r"""The text with its control characters written out; line breaks and tabs stay.

    >>> print(visible("a \x1b[31mred\x07 star"))
    a \x1b[31mred\x07 star
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def size_text(count: float) -> str:
    """A number of bytes as a person reads it.

    >>> size_text(0), size_text(1_230_000)
    ('0 B', '1.23 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration_text(seconds: float) -> str:
    """A time as a person reads it.

    >>> duration_text(42), duration_text(400), duration_text(8000)
    ('42 s', '7 min', '2.2 h')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Console(rich.console.Console):
    """rich's console without markup, emoji codes, automatic colours and control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes control characters visible; every string that is printed or put into a table passes here."""
        return super().render_str(visible(text), **options)

    @contextlib.contextmanager
    def progress(self, task: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Shows progress: a bar on a terminal; in a log a line every `LINE_SECONDS` seconds and one at the end.

        Args:
            unit: the name of the items, in the plural.
            done: the number of items that an earlier run finished.

        Yields:
            A function that takes the number of items finished since its last call.
        """
        start = told = time.monotonic()
        count = done

        def rate() -> float:
            return (count - done) / max(time.monotonic() - start, 1e-9)  # a clock may stand still

        def line() -> None:
            gone, left = time.monotonic() - start, (total - count) / max(rate(), 1e-9)
            ahead = f", about {timedelta(seconds=round(left))} left" if done < count < total else ""
            speed = f"{rate():.3g} {unit}/s, {timedelta(seconds=round(gone))} gone{ahead}"
            self.print(f"{task}: {count} of {total} {unit}, {speed}", soft_wrap=True)

        shown = self.is_terminal or self.is_jupyter
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self, refresh_per_second=2, disable=self.quiet or not shown
        ) as bar:  # fmt: skip
            place = bar.add_task(visible(task), total=total, completed=done, rate="")

            def advance(number: int) -> None:
                nonlocal count, told
                count += number
                bar.update(place, completed=count, rate=f"{rate():.3g} {unit}/s")
                if not shown and time.monotonic() - told > LINE_SECONDS:
                    told = time.monotonic()
                    line()

            yield advance
        if not shown and count > done:
            line()
