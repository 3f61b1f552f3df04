"""Folders that runs write into: the lock, files and folders that appear whole, requests, versions and commits."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diffprobe import rundir


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An empty folder of fsspec's memory, and what lies in it by name."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


# --- one writer -------------------------------------------------------------------------------------


def test_a_rank_just_past_the_last_is_another_run(tmp_path: Path) -> None:
    with (
        rundir.sole_writer(tmp_path / "a.zarr", 2, 3),
        pytest.raises(rundir.BusyError),
        rundir.sole_writer(tmp_path / "a.zarr", 0, 2),
    ):
        raise AssertionError("rank 2 of three beside a run of two")


# --- files that appear whole ------------------------------------------------------------------------


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path, bucket: Any) -> None:
    for place in (tmp_path / "new" / "a.csv", "memory://tests/a.csv", f"file://{tmp_path}/b.csv"):
        rundir.write_whole(place, "1,é\n")
        with pytest.raises(OSError, match="full"), rundir.whole_file(place) as beside:
            beside.write_text("2,")
            raise OSError("full")
    assert (
        (tmp_path / "new" / "a.csv").read_bytes()
        == (tmp_path / "b.csv").read_bytes()
        == bucket.cat_file("/tests/a.csv")
        == "1,é\n".encode()
    )
    assert {path.name for path in tmp_path.rglob("*")} == {"a.csv", "b.csv", "new"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "[a]" / "model"
    for name in ("model.init-7", "model.init-notes", "model2.init-7"):
        (place.parent / name).mkdir(parents=True)
    with pytest.raises(OSError, match="full"), rundir.whole_folder(place) as building:
        (building / "half").write_text("")
        assert not place.exists()
        raise OSError("full")
    assert sorted(path.name for path in place.parent.iterdir()) == ["model.init-notes", "model2.init-7"]
    with rundir.whole_folder(place) as building:
        (building / "whole").write_text("")
    assert [path.name for path in place.iterdir()] == ["whole"]


def test_only_files_that_a_killed_process_was_writing_are_removed(tmp_path: Path) -> None:
    for name in ("loss.csv.71.tmp", "notes.tmp", "loss.csv"):
        (tmp_path / name).write_text("")
    rundir.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.csv", "notes.tmp"]


# --- requests ---------------------------------------------------------------------------------------


def test_a_request_is_written_once_and_then_compared(tmp_path: Path) -> None:
    path, asked = tmp_path / "run" / "request.json", {"grid": (4, 4), "name": "é", "scale": 1.5, "none": None}
    rundir.check_or_write_request(path, asked)
    written = path.read_bytes()
    assert written == (json.dumps({**asked, "grid": [4, 4]}, indent=2, ensure_ascii=False) + "\n").encode()
    rundir.check_or_write_request(path, asked)
    for other, difference in (
        ({**asked, "grid": (4, 5)}, r"grid: the store has \[4, 4\], you ask for \[4, 5\]"),
        ({**asked, "seed": 1}, "seed: the store has nothing, you ask for 1"),
        ({k: v for k, v in asked.items() if k != "none"}, "none: the store has null, you ask for nothing"),
    ):
        with pytest.raises(rundir.RequestError, match=rf"run holds another run; .*{difference}\.$"):
            rundir.check_or_write_request(path, other)
        with pytest.raises(rundir.RequestError, match=rf"run was trained otherwise: {difference}\.$"):
            rundir.check_or_write_request(path, other, "was trained otherwise:")
    assert path.read_bytes() == written
    for damaged, complaint in (("{", "is not JSON"), ("[1]", "holds no request")):
        path.write_text(damaged)
        with pytest.raises(rundir.RequestError, match=rf"request.json {complaint}.*give another folder"):
            rundir.check_or_write_request(path, asked)


# --- where numbers come from ------------------------------------------------------------------------


def test_the_commit_is_that_of_this_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repository(folder: Path) -> str:
        git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@example.org"]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", folder.name]):
            subprocess.run([*git, *command], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    places = {name: tmp_path / name for name in ("project/.venv/lib/site-packages", "checkout", "unversioned")}
    for place in places.values():
        (place / "diffprobe").mkdir(parents=True)
    commits = [repository(tmp_path / name) for name in ("project", "checkout")]
    assert commits[0] != commits[1]
    for (name, place), expected in zip(places.items(), (None, commits[1], None), strict=True):
        monkeypatch.setattr(rundir, "__file__", str(place / "diffprobe" / "rundir.py"))
        for variable in (None, tmp_path / "project" / ".git"):  # which a hook of that project would set
            monkeypatch.delenv("GIT_DIR", raising=False)
            if variable:
                monkeypatch.setenv("GIT_DIR", str(variable))
            assert rundir.code_commit() == expected, (name, variable)
    monkeypatch.setattr(rundir, "__file__", str(places["checkout"] / "diffprobe" / "rundir.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rundir.code_commit() is None, "no git on this machine"


def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"star" * 100_000)
    assert rundir.file_digest(tmp_path / "a") == hashlib.sha256(b"star" * 100_000).hexdigest()
    assert rundir.file_digest(tmp_path / "a", hashlib.blake2b) == hashlib.blake2b(b"star" * 100_000).hexdigest()


def test_free_space_is_that_of_the_disk_where_a_place_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or real(path))
    assert rundir.free_bytes(f"file://{tmp_path}/new/s.zarr")
    assert asked == [tmp_path] and rundir.free_bytes("s3://bucket/a.zarr") is None
