"""The groups of commands, and `main`: the one place where an error becomes a sentence and an exit code.

A user's mistake is one sentence on standard error and exit code 2; ``--debug`` before the command shows the traceback.
"""

from __future__ import annotations

import errno
import functools
import inspect
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer
from rich.markup import escape
from typer.core import TyperGroup

from diffprobe.cli.options import PANELS, numbers, option, parts
from diffprobe.console import visible

GROUPS = RECORD, KEEP, MEASURE, SHOW, HELP = "Record", "Look after a store", "Measure", "Show", "The installation"
RESUMED = {
    "extract",
    "extend",
    "merge",
    "subset",
    "repair",
    "probe alignment",
    "reproduce",
    "leakage run",
    "mllm train",
    "mllm eval",
}
# Spellings of the last release, which say what is the default; to go with the next one.
OLD_SPELLINGS = {f"--no-{name}" for name in ("allow-pickle", "checkpointing", "compress", "dry-run", "force")}
_UsageError: type[Any] = typer.BadParameter.__mro__[1]  # click's, for what was typed; typer has it under one name or another
_debug = False


class _Stopped(Exception):
    """Ctrl-C, or a request to terminate, with the exit code that shells expect."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Group(TyperGroup):
    """Lists commands in the order of the work; hands an interruption on to `main`, where typer would end without a word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        prepare(self)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        panels = {name: getattr(command, "rich_help_panel", None) for name, command in self.commands.items()}
        return sorted(panels, key=lambda name: GROUPS.index(panels[name]) if panels[name] in GROUPS else len(GROUPS))

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(143 if stop.args else 130) from None


def prepare(command: Any) -> None:
    """Shows help as plain text, which typer reads as markup, and in its panels; checks what a command is given."""
    panels = getattr(command.callback, "panels", {})
    for one in (command, *command.params):
        one.help = escape(one.help) if getattr(one, "help", None) else None
    for one in command.params:
        one.rich_help_panel = panels.get(one.name, getattr(one, "rich_help_panel", None))
    order = [None, *PANELS.values()]
    command.params.sort(key=lambda one: order.index(panels.get(one.name)))
    inner = getattr(command, "commands", {})
    for one in inner.values():
        prepare(one)
    if not inner:
        command.callback = _checked(command.callback)


def _checked(command: Callable[..., None]) -> Callable[..., None]:
    """The command with lists taken apart; a URL where a path is meant is refused, which would make a folder "s3:"."""
    parameters = inspect.signature(command, eval_str=True).parameters
    lists = {
        name: get_args(one.annotation)[0] for name, one in parameters.items() if getattr(one.default, "parser", 0) is parts
    }

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, kind in lists.items():
            values[name] = [part for given in values[name] for part in given]
            if kind is not str:
                values[name] = numbers(values[name], kind, f"--{name.replace('_', '-')}")
        for path in values.values():
            if isinstance(path, Path) and (found := re.match(r"([a-zA-Z][\w.+-]+):/", path.as_posix())):
                raise ValueError(
                    f"{found[1]}://{path.as_posix()[found.end() :]} is a URL; stores and probes' tables can lie there, this cannot. "
                    "Give a path of this machine."
                )
        command(**values)

    return call


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Record, probe and reuse what text-to-image diffusion models know.\n\nStart with: diffprobe extract --out runs/first.zarr",
)


def _group(name: str, panel: str, help: str) -> typer.Typer:
    inner = typer.Typer(no_args_is_help=True, help=help)
    app.add_typer(inner, name=name, rich_help_panel=panel)
    return inner


probe_app = _group("probe", MEASURE, "Measure what features hold; writes a tidy table.")
plot_app = _group("plot", SHOW, "Draw a store or a table: NAME.png, .pdf, .csv, .json.")
zoo_app = _group("zoo", HELP, "The embedded models.")
leakage_app = _group("leakage", MEASURE, "Do features show the image, or only the prompt?")
mllm_app = _group("mllm", MEASURE, "A language model that sees by CLIP and a diffusion model.")


@app.callback()
def _options(debug: bool = option(False, "Show the traceback of an error.", "--debug")) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Run the command line; mistakes become one sentence."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="Consolidated metadata is currently")
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name can hold bytes that are no text
    try:
        sys.exit(app(_without_old_spellings(sys.argv[1:]), standalone_mode=False))
    except _UsageError as error:
        _fail(_usage(error), 2)
    except _Stopped as stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who asks again does not wait for the write that goes on
        _fail(f"Stopped.{_kept()}", stopped.code)
    except (ValueError, OSError, ImportError) as error:  # an import: of a package that a URL or an option asks for
        if _debug:
            raise
        _fail(_sentence(error), 2)
    except (RuntimeError, MemoryError) as error:
        if "home directory" in str(error) and not _debug:  # pathlib's word for a user who is not here
            _fail("A path begins with ~ and a name, and this machine has no such user.", 2)
        known = _known_failure(error)
        if _debug or known is None:
            raise
        _fail(known, 1)


def _without_old_spellings(words: list[str]) -> list[str]:
    """The command line in today's spelling.

    >>> _without_old_spellings(["info", "a.zarr", "--", "--no-force"])
    ['info', 'a.zarr', '--', '--no-force']
    """
    end = words.index("--") if "--" in words else len(words)
    found: list[str] = []
    for word in words[:end]:
        if word not in OLD_SPELLINGS:
            found.append(word)
            continue
        why = f"{word} is an old spelling that the next release drops; leave it out, it is the default."
        print(f"diffprobe: warning: {why}", file=sys.stderr)
        found = [kept for kept in found if kept != word.replace("--no-", "--")]
    return found + words[end:]


def _kept() -> str:
    """What is true of a command that was cut off: those that write piece by piece go on, a dry run and the others kept nothing."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    resumes = {" ".join(words[:1]), " ".join(words[:2])} & RESUMED
    return " What was complete is kept; the same command goes on from there." if resumes and "--dry-run" not in sys.argv else ""


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _usage(error: Any) -> str:
    """What is wrong with the words of a command; nothing where a group was named alone, whose help stands already."""
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.exit(2)
    said = " ".join(error.format_message().split()).replace(": Value error, ", ": ").rstrip(".")
    return f"{said}. '{error.ctx.command_path} --help' shows what there is." if error.ctx else f"{said}."


def _sentence(error: Exception) -> str:
    """One line; an error of the system without its number, with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        about = f"{error.filename}: " if error.filename else ""
        kept = _kept() if error.errno == errno.ENOSPC else ""
        return f"{about}{error.strerror}.{kept}"
    return " ".join(str(error).split()) or type(error).__name__


def _known_failure(error: RuntimeError | MemoryError) -> str | None:
    """What to say of a failure that is neither the user's mistake nor ours; None for what should show its traceback."""
    models = sys.modules.get("diffprobe.models")  # absent: nothing of torch has run
    if type(error).__name__ == "NotFiniteError":
        return _sentence(error)
    if isinstance(error, MemoryError) or (models is not None and models.out_of_memory(error)):
        return (
            "Memory ran out, and what was asked cannot be cut smaller. Choose a smaller --resolution, fewer sites, "
            f"--dtype bfloat16 or another --device.{_kept()}"
        )
    if re.search(r"gloo|nccl|connection (closed|reset) by peer", str(error), re.IGNORECASE):
        return f"Another process of this run ended early; what it said stands above.{_kept()}"
    return None


def _fail(message: str, code: int) -> None:
    print(f"diffprobe: {visible(message)}", file=sys.stderr)
    sys.exit(code)
