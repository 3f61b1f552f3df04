"""What goes wrong on real machines, injected: the run says so in a sentence, loses nothing, and goes on to the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffprobe import cli, store
from diffprobe.data import ShapesDataset
from diffprobe.extraction import extract, repair
from diffprobe.models import DiffusionModel, out_of_memory
from diffprobe.store import StoreError, features, open_store, sole_writer

ROOT = Path(__file__).parent.parent
SITES = ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"]
QUICK: dict[str, Any] = {"sites": SITES, "timesteps": (50,), "batch_rows": 4, "unit_samples": 2, "progress": False}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fails(arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one sentence of a command that fails."""
    monkeypatch.setattr(sys, "argv", ["diffprobe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffprobe: ")]
    assert len(said) == 1, said
    return int(stop.value.code or 0), said[0]


# --- killed, stopped, crowded: real processes ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute of work, on machines that have other work too
def test_killed_stopped_and_crowded_runs_end_as_if_nothing_had_been() -> None:
    """`benchmarks.faults` asserts what it prints; FAULT_MOMENTS=50 is the full form."""
    command = [sys.executable, "-m", "benchmarks.faults", "--moments", os.environ.get("FAULT_MOMENTS", "6")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.partition(", ")[0].removeprefix("what: ") for line in done.stdout.splitlines() if "equal: yes" in line]
    assert rows == [
        "extract", "projector training", "Ctrl-C", "a request to terminate", "a second writer", "rank 0 of 2 dies", "rank 1 of 2 dies",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_second_interruption_ends_it_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    command = [sys.executable, "-m", "diffprobe", "extract", "--model", str(tiny_folder), "--data", "shapes:99"]
    process = subprocess.Popen(
        [*command, "--batch-rows", "2", "-o", str(out)], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell has its background jobs ignore it
    )  # fmt: skip
    while not (out / "done" / "c").exists() and process.poll() is None:
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert store.verify_store(out) == []


def test_a_rank_of_a_larger_run_is_another_writer(tmp_path: Path) -> None:
    out = tmp_path / "a [1].zarr"  # brackets mean something to a glob
    with (
        sole_writer(out, rank=3, ranks=4),
        pytest.raises(ValueError, match=rf"Another process \(pid {os.getpid()}\) is writing"),
        sole_writer(out),
    ):
        raise AssertionError("two writers")
    (tmp_path / "a [1].zarr.lock-2").write_text("pid 1")  # of one that was killed
    with sole_writer(out):
        assert [path.name for path in tmp_path.iterdir()] == ["a [1].zarr.lock-0"]
    assert list(tmp_path.iterdir()) == []


# --- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], None] | None]:
    """`small_disk(options)` mounts memory at tmp_path/disk, or mounts it anew; None where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True) and None
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(
    tiny_model: DiffusionModel, tiny_folder: Path, tmp_path: Path, small_disk: Callable[[str], None] | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["extract", "--model", tiny_folder, "--data", "shapes:48", "--sites", ",".join(SITES), "-t", "50", "--force"]
    arguments += ["--batch-rows", "8", "--store-dtype", "float32", "--out"]
    if small_disk is None:
        write = store.StoreWriter.write_unit

        def full(self: store.StoreWriter, unit: int, *rest: Any) -> None:
            if unit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
            write(self, unit, *rest)

        monkeypatch.setattr(store.StoreWriter, "write_unit", full)
    out = tmp_path / "disk" / "s.zarr"
    code, said = fails([*arguments, out], monkeypatch, capsys)
    assert code == 2
    assert "No space left on device. What was complete is kept; the same command goes on from there." in said
    assert 0 < open_store(out).sizes["sample"] < 48
    assert store.verify_store(out) == []
    if small_disk is None:
        monkeypatch.setattr(store.StoreWriter, "write_unit", write)
    else:
        small_disk("size=20m")
    for place in (out, tmp_path / "whole.zarr"):
        monkeypatch.setattr(sys, "argv", ["diffprobe", *map(str, arguments), str(place)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    assert files(out) == files(tmp_path / "whole.zarr")


def test_a_disk_that_is_full_before_the_store_is_laid_out(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        extract(tiny_model, ShapesDataset(2), tmp_path / "s.zarr", **QUICK)
    assert list(tmp_path.iterdir()) == [], "no half of a store, no lock"


def test_a_folder_that_cannot_be_written_to(
    tiny_model: DiffusionModel, tiny_folder: Path, tmp_path: Path, small_disk: Callable[[str], None] | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    disk = tmp_path / "disk"
    extract(tiny_model, ShapesDataset(2), disk / "old.zarr", **QUICK)
    if small_disk:
        small_disk("ro")
    elif os.geteuid():
        disk.chmod(0o555)
    else:
        pytest.skip("root, and nothing can be mounted here: no folder is read-only")
    arguments = ["extract", "--model", tiny_folder, "--data", "shapes:2", "--out"]
    for command in ([*arguments, disk / "new.zarr"], [*arguments, disk / "old.zarr"], ["repair", disk / "old.zarr"]):
        code, said = fails(command, monkeypatch, capsys)
        assert code == 2 and f"{disk} cannot be written to" in said, said
    assert open_store(disk / "old.zarr").sizes["sample"] == 2, "reading needs no writing"
    code, said = fails(["plot", "pca", disk / "old.zarr", "--out", disk / "figures"], monkeypatch, capsys)
    assert code == 2 and "figures" in said, said


def test_a_clock_that_goes_back_and_one_that_stands_still(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tiny_model, ShapesDataset(6), tmp_path / "a.zarr", **QUICK)
    past = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(past)))
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    extract(tiny_model, ShapesDataset(6), tmp_path / "b.zarr", **{**QUICK, "progress": True})
    assert files(tmp_path / "a.zarr") == files(tmp_path / "b.zarr")
    extract(tiny_model, ShapesDataset(6), tmp_path / "c.zarr", **{**QUICK, "batch_rows": None})
    assert store.verify_store(tmp_path / "c.zarr") == []


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated shard", "corrupted byte", "corrupted status", "corrupted done"])
def test_only_what_is_damaged_is_made_again(tiny_model: DiffusionModel, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "s.zarr"
    extract(tiny_model, ShapesDataset(6), out, **QUICK)
    before = files(out)
    array = {"corrupted status": "status", "corrupted done": "done"}.get(damage, f"{SITES[1]}/features")
    hurt = sorted(name for name in before if name.startswith(f"{array}/c/"))[1]
    raw = before[hurt]
    place = len(raw) // 3
    (out / hurt).write_bytes(
        raw[:place] if damage.startswith("trunc") else raw[:place] + bytes([raw[place] ^ 2]) + raw[place + 1 :]
    )
    assert {fault.unit for fault in store.verify_store(out)} == {1}
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    _, summary = repair(out, tiny_model, progress=False)
    assert summary is not None and summary.complete == 6
    assert files(out) == before
    changed = {name for name in before if (out / name).stat().st_mtime_ns != times[name]}
    assert all(name.split("/c/")[-1].split("/")[0] == "1" for name in changed), changed


@pytest.mark.parametrize("array", ["sample", "colour", "prompts/text", "prompts/token_id", f"{SITES[0]}/timestep"])
def test_damage_to_what_belongs_to_no_unit_is_named(tiny_model: DiffusionModel, tmp_path: Path, array: str) -> None:
    out = tmp_path / "s.zarr"
    extract(tiny_model, "shapes:3?objects=1", out, **QUICK)
    hurt = next(path for path in (out / array / "c").rglob("*") if path.is_file())
    raw = bytearray(hurt.read_bytes())
    raw[len(raw) // 2] ^= 16
    hurt.write_bytes(bytes(raw))
    with pytest.raises(StoreError, match=rf"The store's {array} cannot be read"):
        store.verify_store(out)


def test_what_a_killed_write_left_is_gone_after_the_next_run(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    extract(tiny_model, ShapesDataset(2), out, **QUICK)
    before = files(out)
    cut = out / SITES[0] / "features" / "c" / f"0.{'f' * 32}.partial"
    cut.write_bytes(b"half")
    store.StoreWriter(out).forget_unit(0)
    extract(tiny_model, ShapesDataset(2), f"{out}/", **QUICK)
    assert files(out) == before


# --- memory and numbers --------------------------------------------------------------------------


def test_images_that_do_not_fit_are_encoded_by_fewer(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tiny_model, ShapesDataset(8), tmp_path / "a.zarr", **{**QUICK, "unit_samples": 8, "batch_rows": 16})
    encode = tiny_model.encode_image

    def small(images: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(images) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")
        return encode(images, *rest)

    monkeypatch.setattr(tiny_model, "encode_image", small)
    options = {**QUICK, "unit_samples": 8, "batch_rows": 16, "progress": True}
    extract(tiny_model, ShapesDataset(8), tmp_path / "b.zarr", **options)
    assert "Encoding 4 images at once did not fit into memory; going on with 2." in capsys.readouterr().err
    for site in SITES:
        left, right = (features(open_store(tmp_path / f"{name}.zarr"), site).values.astype(float) for name in "ab")
        np.testing.assert_allclose(left, right, atol=2e-3, rtol=2e-3)


def test_torchs_own_words_for_no_memory_are_known() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert out_of_memory(found.value)
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_failures_that_are_nobodys_mistake_are_sentences_with_exit_code_1(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["extract", "--model", tiny_folder, "--data", "shapes:2", "-t", "50", "-c", "null", "--out"]

    def exhausted(self: DiffusionModel, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def poisoned(self: DiffusionModel, clean: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full_like(clean, torch.nan)

    for name, fault, words in (
        ("denoise", exhausted, ["Memory ran out", "--resolution"]),
        ("add_noise", poisoned, ["Sample 'shapes-train-0-000000'", "site ", "timestep 50", "--on-nonfinite mark"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(DiffusionModel, name, fault)
            code, said = fails([*arguments, tmp_path / f"{name}.zarr"], monkeypatch, capsys)
        assert code == 1 and all(word in said for word in words), said

    def broken(self: DiffusionModel, *_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(DiffusionModel, "denoise", broken)
    monkeypatch.setattr(sys, "argv", ["diffprobe", *map(str, arguments), str(tmp_path / "broken.zarr")])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        cli.main()  # a fault of ours keeps its traceback
