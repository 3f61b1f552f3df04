"""Kill, stop and crowd an extract and a training, go on, and compare the end with that of an uninterrupted run.

python -m benchmarks.faults [--moments 50] [--seed 0] [--out benchmarks/faults.csv]

Each run is a child of this process, which has loaded everything before.  SIGKILL comes after a random time: while a store is
laid out, computed, written, or finished.  Then Ctrl-C, a second writer, and the death of one of two ranks, on the command
line.  The same command then goes on in what was left.  The invariant that is checked: file by file, byte by byte, nothing but
the time is different.  A minute for ten moments, one thread.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from benchmarks.measure import FOLDER, provenance, write_report, write_rows
from benchmarks.models import tiny
from diffprobe import extract, rundir
from diffprobe.cli import main as diffprobe_main
from diffprobe.data import load_dataset
from diffprobe.mllm.config import TrainConfig
from diffprobe.mllm.language import load_language_model
from diffprobe.mllm.train import Captioned, train_projector

Work = Callable[[Path], object]


def killed(work: Work, place: Path, after: float) -> bool:
    """Run in a child; whether it still worked after so many seconds, and so was killed.

    Raises:
        RuntimeError: it ended by itself with an error, which it has printed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(place)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        if ended:
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A run in {place} that was to go on ended with exit code {code}.")
    return code != 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and those beside it that begin with its name."""
    files = [
        path for beside in folder.parent.glob(f"{folder.name}*") for path in (beside, *beside.rglob("*")) if path.is_file()
    ]
    return {str(path.relative_to(folder.parent)).removeprefix(folder.name): path.read_bytes() for path in files}


def endure(name: str, work: Work, folder: Path, moments: int, seed: int) -> dict[str, Any]:
    """Kill a piece of work so many times, each run as often as it takes to end; a row of the table.

    Raises:
        AssertionError: a run that went on left other files, or files with other bytes, than one without interruption.
    """
    start = time.monotonic()
    killed(work, folder / "whole", 600.0)
    seconds = time.monotonic() - start
    expected, rng = contents(folder / "whole"), np.random.default_rng(seed)
    kills = late = number = 0
    finished = []
    while True:
        place = folder / f"run{number:03d}"
        if killed(work, place, rng.uniform(0, seconds) if kills < moments else 600.0):
            kills += 1
            late += place.exists()
            continue
        finished.append(place)
        number += 1
        if kills >= moments:
            break
    for place in finished:
        found = contents(place)
        assert found.keys() == expected.keys(), f"{name}, {place}: files differ by {sorted(found.keys() ^ expected.keys())}."
        unequal = [file for file in expected if found[file] != expected[file]]
        assert not unequal, f"{name}, {place}: {', '.join(unequal)} have other bytes than without interruption."
    return {
        "what": name, "kills": kills, "of them after the first write": late, "runs compared": len(finished),
        "files": len(expected), "equal": "yes", "seconds of a run": f"{seconds:.2f}",
    }  # fmt: skip


# --- on the command line --------------------------------------------------------------------------


class Command:
    """``diffprobe ...`` in a child of this process, which writes what it says to a file."""

    def __init__(self, arguments: Sequence[object], words: Path, **environment: object) -> None:
        self.words = words
        self.process = os.fork()
        if self.process == 0:
            file = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
            os.environ.update({name: str(value) for name, value in environment.items()})
            sys.argv = ["diffprobe", *map(str, arguments)]
            code = 1
            try:
                diffprobe_main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def signal(self, number: int) -> None:
        os.kill(self.process, number)

    def end(self) -> tuple[int, str]:
        """Exit code and words; waits for it."""
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status), self.words.read_text(encoding="utf-8")


def once(condition: Callable[[], bool], within: float = 600.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("What was waited for did not come.")
        time.sleep(0.005)


def expect(ended: tuple[int, str], code: int, *words: str) -> str:
    """A command's end is of this code, says these words, and shows no traceback."""
    found, said = ended
    if found != code or "Traceback" in said or not all(word in said for word in words):
        raise AssertionError(f"Exit code {code} and {words} were expected; found {found} and:\n{said}")
    return said.strip().splitlines()[-1]


def commands(folder: Path, model: Path) -> Iterator[dict[str, Any]]:
    """The faults that a user sees on the command line, one row each."""

    def extract_to(place: Path) -> list[object]:
        return ["extract", "--model", model, "--data", "shapes:48", "-t", "50,500", "--batch-rows", 8, "-o", place]

    def finished(place: Path, apart: Sequence[str] = ()) -> dict[str, bytes]:
        expect(Command(extract_to(place), folder / "end.txt").end(), 0, "48 of 48 samples are in")
        return {name: data for name, data in contents(place).items() if name not in apart}

    def row(what: str, said: str, same: bool) -> dict[str, Any]:
        assert same, f"{what}: the resumed store is not the uninterrupted one."
        return {"what": what, "said": said, "equal": "yes"}

    whole = finished(folder / "whole")
    for what, number, code in (("Ctrl-C", signal.SIGINT, 130), ("a request to terminate", signal.SIGTERM, 143)):
        place = folder / what.replace(" ", "-")
        running = Command(extract_to(place), folder / "words.txt")
        once(place.exists)
        running.signal(number)
        said = expect(
            running.end(), code, "diffprobe: Stopped. What was complete is kept; the same command goes on from there."
        )
        yield row(what, said, finished(place) == whole)

    place = folder / "crowded"
    first = Command(extract_to(place), folder / "first.txt")
    once(place.exists)
    first.signal(signal.SIGSTOP)
    second = Command(extract_to(place), folder / "second.txt").end()
    first.signal(signal.SIGCONT)
    said = expect(second, 2, f"Another process (pid {first.process}) is writing")
    expect(first.end(), 0)
    yield row("a second writer", said.replace(str(folder), "").replace(str(first.process), "N"), finished(place) == whole)

    for dying in (0, 1):
        place = folder / f"ranks-{dying}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            Command(extract_to(place), folder / f"rank{rank}.txt", RANK=rank, LOCAL_RANK=rank, **shared) for rank in (0, 1)
        ]
        once((place / "done" / "c").is_dir)
        ranks[dying].signal(signal.SIGKILL)
        ranks[dying].end()
        said = expect(ranks[1 - dying].end(), 1, "Another process of this run ended early")
        apart = ("/zarr.json",)  # says how many processes began it
        yield row(f"rank {dying} of 2 dies", said, finished(place, apart) == {n: d for n, d in whole.items() if n not in apart})


def show(row: dict[str, Any]) -> None:
    print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def main(moments: int = 50, seed: int = 0, out: Path | None = None) -> None:
    """Kill an extract and a training at random moments, resume, compare; then the faults of the command line."""
    torch.set_num_threads(1)  # a child of fork has no second thread to wait for
    commit = rundir.code_commit()
    rundir.code_commit = lambda: commit  # which each store notes; a commit made meanwhile is no fault of a run
    subject, language, features = tiny(), load_language_model("shapes-lm", "cpu"), torch.randn(48, 4, 6)
    train = Captioned(features, ["a red star left of a blue circle"] * 48, torch.zeros_like(features))
    dev = Captioned(features[:8], ["a red star"] * 8)
    config = TrainConfig(steps=24, batch=8, dropout=0.3, evaluate_every=2, patience=0)
    works: dict[str, Work] = {
        "extract": lambda place: extract(
            subject.model, load_dataset("shapes:16"), place, sites=subject.sites, maps="U-L1-R1-B0-Cross-Map", timesteps=(50, 500),
            batch_rows=8, unit_samples=2, progress=False,
        ),
        "projector training": lambda place: train_projector(language, train, dev, place, config),
    }  # fmt: skip
    rows = []
    for name, work in works.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(endure(name, work, Path(folder), moments, seed))
            show(rows[-1])
    with tempfile.TemporaryDirectory() as folder:
        subject.model.pipeline.save_pretrained(Path(folder) / "model")
        for row in commands(Path(folder), Path(folder) / "model"):
            rows.append(row)
            show(row)
    if out is not None:
        columns = dict.fromkeys(name for row in rows for name in row)
        write_rows(out, [{name: row.get(name, "") for name in columns} | provenance("tiny") for row in rows])
        write_report(FOLDER / "RESULTS.md")


if __name__ == "__main__":
    typer.run(main)
