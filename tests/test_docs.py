"""The public names, the command line's help and its pages: documented, typed, current, readable."""

from __future__ import annotations

import importlib.resources
import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import diffprobe
from diffprobe import cli
from diffprobe.cli.entry import GROUPS
from diffprobe.cli.options import PANELS
from diffprobe.doctor import describe, examine
from docs import pages

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", diffprobe.__all__)
def test_a_public_name_is_documented_typed_and_shown(name: str) -> None:
    found = getattr(diffprobe, name)
    text = inspect.getdoc(found) or ""
    signature = inspect.signature(found.__init__ if inspect.isclass(found) else found)
    assert ">>>" in text, "an example"
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.name == "self" or parameter.annotation is not parameter.empty, parameter.name


def test_the_types_are_shipped() -> None:
    assert (importlib.resources.files("diffprobe") / "py.typed").is_file()
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"][
        "diffprobe"
    ]
    assert "py.typed" in shipped
    names = set(diffprobe.__all__)
    assert names == set(diffprobe._HOMES) and names <= set(dir(diffprobe))


@pytest.mark.slow
def test_an_installed_wheel_works_without_checkout_and_git(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT / "diffprobe", tmp_path / "source" / "diffprobe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", "."]
    subprocess.run([*build, "./source"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("diffprobe-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shutil.rmtree(tmp_path / "source")
    files = [path.relative_to(ROOT) for path in (ROOT / "diffprobe").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert [str(path) for path in files if not (tmp_path / "site" / path).is_file()] == []
    code = """
import sys
import diffprobe
from diffprobe.cli import main
from diffprobe.rundir import code_commit

assert diffprobe.__file__.startswith(sys.path[1]), diffprobe.__file__
assert code_commit() is None
for words in (["zoo", "list"], ["report", "--help"], ["reproduce", "--list"]):
    sys.argv = ["diffprobe", *words]
    try:
        main()
    except SystemExit as stop:
        print(words[0], stop.code)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout and "report 0" in done.stdout and "reproduce 2" in done.stdout
    assert done.stderr.startswith("diffprobe: ") and done.stderr.count("\n") == 1, "the experiments lie in the checkout"


# --- the command line -------------------------------------------------------------------------------


def test_the_committed_pages_are_what_the_code_says() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / pages.FOLDER).glob("*.md")}
    assert written == pages.pages(), "make docs"


def test_pages_name_every_option() -> None:
    page = pages.pages()["extract.md"]
    for option in (
        "`--out, -o`",
        "`--timesteps, -t`",
        "| `--dry-run` |  |  |",
        "| mean or all | `mean` |",
        "diffprobe extract --out TEXT [OPTIONS]",
    ):
        assert option in page, option
    assert "`STORE`" in pages.pages()["info.md"] and "`--cache, --no-cache`" in pages.pages()["mllm-train.md"]


def test_every_option_says_what_it_is_for() -> None:
    silent = [
        (" ".join(words), line) for words, _ in pages.commands() for line in pages.pages()[f"{'-'.join(words)}.md"].splitlines()
        if line.startswith("| `-") and line.endswith("|  |")
    ]  # fmt: skip
    assert silent == []


def shown(*arguments: str, **environment: str) -> str:
    """What the command line prints on a screen of eighty columns."""
    words = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **environment}
    command = [
        sys.executable,
        "-c",
        "from diffprobe.cli import main; import sys; sys.argv[0] = 'diffprobe'; main()",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | words, check=True).stdout


def test_help_fits_a_screen_and_every_command_a_line() -> None:
    lines = shown("--help").splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 48
    titles = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert titles == ["Options", *GROUPS]
    body = [
        line.strip("│ ")
        for line in lines[lines.index(next(line for line in lines if f"─ {GROUPS[0]} ─" in line)) :]
        if line.startswith("│")
    ]
    known = {words[0] for words, _ in pages.commands()}
    assert {line.split()[0] for line in body} == known, "a description runs over its line"


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` of every command and group prints, by one process that answers as many would."""
    words = [list(words) for words, _ in pages.commands()]
    groups = {tuple(one[:length]) for one in words for length in range(len(one))}
    code = f"""
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from diffprobe.cli import main

said = {{}}
for words in {[*words, *map(list, groups)]!r}:
    sys.argv = ["diffprobe", *words, "--help"]
    with redirect_stdout(StringIO()) as out:
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, words
    said[" ".join(words)] = " ".join(out.getvalue().split())
print(json.dumps(said))
"""
    environment = os.environ | {"TERMINAL_WIDTH": "1000", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


COMMANDS = dict(pages.commands())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_all_that_the_code_says(helps: dict[str, str], words: tuple[str, ...]) -> None:
    function = COMMANDS[words]
    said = helps[" ".join(words)]
    texts = [inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]]
    texts += [one.default.help for one in inspect.signature(function).parameters.values()]
    for text in texts:
        assert " ".join(text.split()) in said, text
    assert all(" ".join(words[:length]) in helps for length in range(len(words)))


def test_help_of_extract_is_read_at_80_columns_from_what_to_how() -> None:
    lines = shown("extract", "--help").splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines), "nothing is cut off"
    assert [line.strip("╭─╮ ") for line in lines if line.startswith("╭")] == ["Options", *PANELS.values()]
    help_columns = [line.strip("│ ").split("  ")[-1] for line in lines if line.startswith("│")]
    assert len(lines) < 110 and max(map(len, help_columns)) >= 28


def test_the_shell_completes_commands_and_options() -> None:
    said = shown(_DIFFPROBE_COMPLETE="complete_bash", COMP_WORDS="diffprobe extr", COMP_CWORD="1")
    assert said.split() == ["extract"]
    said = shown(_DIFFPROBE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="diffprobe extract --time")
    assert "--timesteps" in said


# --- doctor -----------------------------------------------------------------------------------------


def test_doctor_says_what_is_missing_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path / "fetched"))
    (tmp_path / "models--someone--some-model").mkdir()
    real = diffprobe.doctor.package_versions

    def versions(names: Sequence[str]) -> dict[str, str]:
        there = {**real(names), "zarr": "2.18.0"}
        return {name: there[name] for name in names if name in there and name != "pyarrow"}

    monkeypatch.setattr("diffprobe.doctor.package_versions", versions)
    found = examine()
    assert json.loads(json.dumps(found)) == found
    assert {"shapes-sd", "shapes-clip", "shapes-lm"} <= set(found["models"]["embedded"])
    assert found["models"]["cached"] == ["someone/some-model"] and found["models"]["fetched"] == []
    assert found["devices"][0]["name"] == "cpu" and found["devices"][0]["cores"] >= 1
    assert found["packages"]["torch"]["fine"] and not found["packages"]["zarr"]["fine"]
    assert found["extras"]["hub"] == {
        "for": "benchmarks in Parquet",
        "missing": ["pyarrow"],
        "command": "pip install 'diffprobe[hub]'",
    }
    said = describe(found)
    for words in (
        "✗ zarr",
        "missing or too old: zarr",
        "pip install 'zarr>=3.1.3'",
        "diffprobe zoo fetch smollm2",
        "unset HF_HUB_OFFLINE",
    ):
        assert words in said, words
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    assert examine()["hub"] == {
        "address": "127.0.0.1", "offline": False, "reachable": False, "token": bool(os.environ.get("HF_TOKEN")), "cache": str(tmp_path),
    }  # fmt: skip


def test_doctor_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, check in (
        (["--json"], lambda text: json.loads(text)["system"]["diffprobe"]),
        ([], lambda text: "devices" in text),
    ):
        monkeypatch.setattr(sys, "argv", ["diffprobe", "doctor", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and check(capsys.readouterr().out)
