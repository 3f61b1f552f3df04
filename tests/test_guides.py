"""README and guides: every fenced block of Python and shell runs as it is printed; all pages name what there is.

A page's blocks run in the order of the page, in one process and one empty folder: Python in one namespace, lines that begin
with ``diffprobe`` by the installed command's own function, other lines by the shell.  A block that needs a hub, a GPU or
another machine says so behind its language (``sh no-run: a GPU``).  It does not run, its commands are parsed all the same.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import typer.main

from diffprobe.cli import app

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
DOCS = [*PAGES, *sorted((ROOT / "docs").glob("*.md"))]
NO_RUN = {
    "README.md": ["they make an environment"],
    "docs/guides/cluster.md": ["a GPU and the hub", "a cluster", "a cluster", "a GPU and the hub"],
    "docs/guides/families.md": ["a GPU and the hub"],
    "docs/guides/leakage-audit.md": ["hours"],
    "docs/guides/own-language-model.md": [
        "it waits for what you type",
        "a GPU and the hub",
        "the harness",
        "a page that stays open",
    ],
    "docs/guides/own-model.md": ["files of yours", "a GPU and the hub"],
    "docs/overview.md": ["one line each", "the hub", "a GPU and the hub"],
}
FEW = 12  # drawn samples of a dataset in these tests; the pages have more


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, why it does not run ("" where it does), its text."""

    line: int
    language: str
    unrun: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        AssertionError: a fence is not closed, or says something else behind its language.
    """
    found: list[Block] = []
    begun: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            if begun is not None:
                begun[2].append(line)
        elif begun is None:
            begun = number, line.removeprefix("```"), []
        else:
            first, info, lines = begun
            parts = re.fullmatch(r"(\w*)(?: no-run: (.+))?", info)
            assert parts is not None, f"{page.name}, line {first}: {info!r}"
            found.append(Block(first, parts[1], parts[2] or "", "\n".join(lines) + "\n"))
            begun = None
    assert begun is None, f"{page.name}: the fence of line {begun and begun[0]} is not closed"
    return found


def commands(text: str) -> list[str]:
    """The command lines of a shell block, continued ones as one, without comments."""
    lines = [re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines()]
    return [part.strip() for line in lines if line for part in line.split(" && ")]


def shorter(text: str) -> str:
    """The same with at most `FEW` drawn samples a dataset."""
    return re.sub(r"(shapes[\w-]*:)(\d+)", lambda found: f"{found[1]}{min(int(found[2]), FEW)}", text)


CHILD = """
import importlib.metadata, json, shlex, subprocess, sys

page, blocks = json.load(sys.stdin)
(installed,) = importlib.metadata.entry_points(group="console_scripts", name="diffprobe")
main, names = installed.load(), {"__name__": "__main__"}
for line, language, text, lines in blocks:
    print(f"--- {page}, line {line}", flush=True)
    if language == "python":
        exec(compile("\\n" * line + text, page, "exec"), names)
        continue
    for command in lines:
        print(f"$ {command}", flush=True)
        if not command.startswith("diffprobe "):
            subprocess.run(["sh", "-ec", command], check=True)
            continue
        sys.argv = shlex.split(command, comments=True)
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path) -> None:
    told = [
        (block.line, block.language, text, commands(text) if block.language == "sh" else [])
        for block in blocks(page)
        if block.language in ("python", "sh") and not block.unrun
        for text in [shorter(block.text)]
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "LOKY_MAX_CPU_COUNT": "1",  # a probe of a few rows is no work for several processes
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([page.name, told]), cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


def test_blocks_that_do_not_run_are_few_and_named() -> None:
    unrun = {page.relative_to(ROOT).as_posix(): [block.unrun for block in blocks(page) if block.unrun] for page in DOCS}
    assert {name: reasons for name, reasons in unrun.items() if reasons} == NO_RUN
    assert {block.language for page in PAGES for block in blocks(page)} <= {"python", "sh", "text", "json", "mermaid"}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_commands_and_options_exist(page: Path) -> None:
    """Also those of blocks that do not run."""
    wrong = []
    for block in blocks(page):
        for line in commands(block.text) if block.language == "sh" else []:
            words = shlex.split(line, comments=True)
            if "-m" in words and words[words.index("-m") + 1 :][:1] == ["diffprobe"]:  # a launcher before it
                words = words[words.index("diffprobe") :]
            if words[:1] == ["diffprobe"]:
                wrong += [f"line {block.line}: {line}: {fault}" for fault in [parsed(words[1:])] if fault]
    assert wrong == []


def parsed(words: list[str]) -> str:
    """What is wrong with the words of a command, "" where nothing is."""
    command = typer.main.get_command(app)
    names = ["diffprobe"]
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            return f"no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
        names.append(str(command.name))
    try:
        command.make_context(" ".join(names), list(words))
    except Exception as error:  # of click, which typer has under one name or another
        return str(getattr(error, "message", "") or error)
    return ""


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [page for page in GUIDES if page.name != "README.md"], ids=lambda page: page.stem)
def test_a_guide_is_listed_and_says_where_to_go_next(page: Path) -> None:
    assert f"({page.name})" in (page.parent / "README.md").read_text(encoding="utf-8")
    last = page.read_text(encoding="utf-8").rpartition("\n## ")[2]
    assert last.startswith("Next\n") and "](" in last


def test_the_readme_is_a_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and text.count("](figures/") == 1
    for page in [*GUIDES, *(ROOT / "docs").glob("*.md")]:
        assert page.relative_to(ROOT).as_posix() in text, "where to go next"


def test_the_architecture_names_what_there_is() -> None:
    """``file.py``, ``file.py:name`` or ``file.py:Class.name``, the end of a path being enough."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"([\w/]+\.py)(?::([\w.]+\w))?", text))
    assert len(named) > 40
    files = [
        path
        for name in ("diffprobe", "experiments", "recipes", "benchmarks", "notebooks", "docs")
        for path in (ROOT / name).rglob("*.py")
    ]
    missing = []
    for path, name in sorted(named):
        sources = [file.read_text(encoding="utf-8") for file in files if f"/{file.relative_to(ROOT)}".endswith(f"/{path}")]
        wanted = [re.compile(rf"^\s*(async )?(def|class) {part}\b", re.MULTILINE) for part in name.split(".") if part]
        if not any(all(one.search(source) for one in wanted) for source in sources):
            missing.append(f"{path}:{name}")
    assert missing == []
