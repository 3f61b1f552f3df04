"""A page for every command, made from the command line's own code.

python -m docs.pages [FOLDER]     writes docs/commands/*.md; from the checkout's root

The invariant: a page says nothing that the code does not say; `tests/test_docs.py` compares the committed pages with this.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo

from diffprobe import cli
from diffprobe.cli.entry import GROUPS
from diffprobe.cli.options import parts
from experiments import __main__ as experiments

FOLDER = Path("docs") / "commands"


def pages() -> dict[str, str]:
    """The text of every page by its file's name; README.md lists the others."""
    found = {f"{'-'.join(words)}.md": _page(words, function) for words, function in commands()}
    first = "# Commands\n\nMade from the code by `make docs`. `diffprobe --debug COMMAND` shows the traceback of an error.\n\n"
    rows = [
        f"| [`diffprobe {' '.join(words)}`]({'-'.join(words)}.md) | {_cell(_summary(function))} |"
        for words, function in commands()
    ]
    return {"README.md": first + "| command | what it does |\n|---|---|\n" + "\n".join(rows) + "\n", **found}


def commands(group: typer.Typer = cli.app, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Callable[..., Any]]]:
    """Every command: its words after `diffprobe`, and its function."""
    panels = {panel: place for place, panel in enumerate(GROUPS)}
    for one in sorted(group.registered_commands, key=lambda one: panels.get(str(one.rich_help_panel), 0)):
        assert one.callback is not None
        function = experiments.reproduce if one.callback is cli.draw.reproduce else one.callback  # which hands its options on
        yield (*words, one.name or function.__name__.replace("_", "-")), function
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, (*words, str(inner.name)))


def _summary(function: Callable[..., Any]) -> str:
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _page(words: tuple[str, ...], function: Callable[..., Any]) -> str:
    arguments, options = [], []
    usage = ["diffprobe", *words]
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, info, default = parameter.annotation, parameter.default, parameter.default.default
        shown = info.metavar or (f"{_type(kind)},..." if info.parser is parts else _type(kind))
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or name.upper()
            usage.append(shown if default is ... or shown.startswith("[") else f"[{shown}]")
            arguments.append((shown, _type(kind), _default(default, info), info.help or ""))
            continue
        word = name.replace("_", "-")
        spelled = info.param_decls or ([f"--{word}", f"--no-{word}"] if kind is bool else [f"--{word}"])
        usage += [f"{spelled[0]} {_type(kind)}"] if default is ... else []
        stands = "required" if default is ... else _default(default, info)
        options.append((", ".join(spelled), "" if kind is bool else shown, stands, info.help or ""))
    blocks = [
        f"# diffprobe {' '.join(words)}",
        inspect.cleandoc(function.__doc__ or ""),
        f"```\n{' '.join([*usage, '[OPTIONS]'])}\n```",
    ]
    for title, rows in (("argument", arguments), ("option", options)):
        if rows:
            lines = [
                f"| {_code(name)} | {_cell(kind)} | {_code(default)} | {_cell(text)} |" for name, kind, default, text in rows
            ]
            blocks.append("\n".join([f"| {title} | value | default | |", "|---|---|---|---|", *lines]))
    return "\n\n".join(blocks) + "\n"


def _type(kind: Any) -> str:
    """What is typed: a word for a type, or the choices.

    >>> _type(int), _type(list[str] | None), _type(Path)
    ('NUMBER', 'TEXT', 'PATH')
    """
    if get_origin(kind) in (list, Union, UnionType):
        return _type(next(one for one in get_args(kind) if one is not type(None)))
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(kind, "")


def _default(value: Any, info: Any) -> str:
    if isinstance(info.show_default, str):
        return info.show_default
    if value is False or value in (..., None, "", []):
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    """Text inside a table: a bar would end the cell, a tag would be one.

    >>> _cell("a|b <c>")
    'a\\\\|b &lt;c>'
    """
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text and text != "required" else text


def main(folder: Path = FOLDER) -> None:
    """Write the pages, and remove those of commands that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{len(written)} pages in {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
