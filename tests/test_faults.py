"""What goes wrong on real machines, injected: the run says so in a sentence, loses nothing, and goes on to the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from diffprobe import cli, store
from diffprobe.data import FolderDataset, ImageError, Sample, ShapesDataset
from diffprobe.extraction import extract, repair
from diffprobe.models import DiffusionModel, load_model, out_of_memory
from diffprobe.rundir import sole_writer
from diffprobe.store import StoreError, features, open_store

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


# --- repair --------------------------------------------------------------------------------------


def damage_one_byte(out: Path, site: str = SITES[0], unit: int = 1) -> None:
    shard = next(path for path in (out / site / "features" / "c" / str(unit)).rglob("*") if path.is_file())
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 1
    shard.write_bytes(bytes(raw))


def test_a_repair_that_is_refused_or_fails_changes_nothing(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.zarr"
    extract(tiny_model, ShapesDataset(6), out, **QUICK)
    damage_one_byte(out)
    before = files(out)
    with pytest.raises(ValueError, match=r"nothing was changed in it:.* samples: the store has 6, you ask for 7"):
        repair(out, tiny_model, ShapesDataset(7), progress=False)
    with pytest.raises(ValueError, match="names no dataset"):
        repair(out, tiny_model, "nowhere", progress=False)
    monkeypatch.setattr(tiny_model, "denoise", lambda *_: (_ for _ in ()).throw(RuntimeError("a GPU fell off the bus")))
    with pytest.raises(RuntimeError, match="fell off"):
        repair(out, tiny_model, progress=False)
    assert files(out) == before


def test_a_repair_that_is_killed_leaves_each_unit_old_or_new_or_pending(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.zarr"
    extract(tiny_model, ShapesDataset(6), out, **QUICK)
    whole = files(out)
    for unit in (0, 1, 2):
        damage_one_byte(out, unit=unit)
    put, shards = store._replace_shard, []

    def dies(*given: Any) -> None:
        shards.append(1)
        if len(shards) == len(SITES) + 2:
            raise SystemExit("killed between two shards of the second unit")
        put(*given)

    monkeypatch.setattr(store, "_replace_shard", dies)
    with pytest.raises(SystemExit):
        repair(out, tiny_model, progress=False)
    monkeypatch.undo()
    assert store.StoreWriter(out).pending == [1]
    assert open_store(out).sizes["sample"] == 4, "the new unit and the one that was not begun; the half unit is not read"
    assert {fault.unit for fault in store.verify_store(out)} == {2}
    assert repair(out, tiny_model, progress=False)[1] is not None
    assert files(out) == whole


def test_repair_computes_in_the_stores_own_number_type(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    extract(load_model(tiny_folder, "cpu", "bfloat16"), ShapesDataset(4), out, **QUICK)
    whole = files(out)
    damage_one_byte(out)
    hurt = files(out)
    with pytest.raises(
        ValueError, match=r'nothing was changed in it:.* compute_dtype: the store has "bfloat16", you ask for "float32"'
    ):
        repair(out, dtype="float32", progress=False)
    assert files(out) == hurt
    assert repair(out, device="cpu", progress=False)[1] is not None
    assert files(out) == whole


def test_repair_finds_a_model_that_was_moved_and_keeps_what_was_marked(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "s.zarr", tmp_path / "moved"
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    extract("model", ShapesDataset(4), out, guidance=[1e6], on_nonfinite="mark", **QUICK)
    extract("model", ShapesDataset(4), tmp_path / "t.zarr", **QUICK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (out, tmp_path / "t.zarr"):
        assert store.store_info(path)["request"]["model"] == str(tmp_path / "model"), "known from everywhere"
        whole = files(path)
        damage_one_byte(path)
        assert repair(path, progress=False)[1] is not None, "found from another folder"
        assert files(path) == whole
    (tmp_path / "model").rename(moved)
    damage_one_byte(tmp_path / "t.zarr")
    with pytest.raises(ValueError, match="No model at"):
        repair(tmp_path / "t.zarr", progress=False)
    _, summary = repair(tmp_path / "t.zarr", str(moved), progress=False)
    assert summary is not None and summary.complete == 4 and files(tmp_path / "t.zarr") == whole


class Unsteady(ShapesDataset):
    """Drawn scenes of which one cannot be read for now."""

    fault: Exception | None = None

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)

        def load() -> Image.Image:
            if index == 3 and Unsteady.fault is not None:
                raise Unsteady.fault
            return sample.load()

        return replace(sample, load=load)


def test_unreadable_images_are_tried_again_when_asked(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "s.zarr", Unsteady(6)
    extract(tiny_model, data, tmp_path / "whole.zarr", **QUICK)
    monkeypatch.setattr(Unsteady, "fault", ImageError("'3.png' is broken"))
    assert extract(tiny_model, data, out, **QUICK).complete == 5
    assert repair(out, tiny_model, data, progress=False) == ([], None)
    faults, summary = repair(out, tiny_model, data, retry_unreadable=True, progress=False)
    assert summary is not None and summary.skipped == {data[3].id: "'3.png' is broken"}, "still so"
    monkeypatch.setattr(Unsteady, "fault", None)
    times = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    faults, summary = repair(out, tiny_model, data, retry_unreadable=True, progress=False)
    assert faults == [] and summary is not None and (summary.complete, summary.skipped) == (6, {})
    assert files(out) == files(tmp_path / "whole.zarr")
    changed = {name for name in times if (out / name).stat().st_mtime_ns != times[name]}
    assert {name.split("/c/")[-1].split("/")[0] for name in changed} == {"1"}, "the unit of that image alone"


# --- images that are there, and cannot be read now -------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        ShapesDataset(6)[index].load().save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("fault", ["away", errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES, "memory", "in the middle"])
def test_a_fault_of_the_machine_is_no_broken_image(
    tiny_model: DiffusionModel, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, fault: str | int
) -> None:
    out = tmp_path / "s.zarr"
    given: dict[str, Any] = {**QUICK, "conditionings": ("null",)}
    extract(tiny_model, FolderDataset(photographs), tmp_path / "whole.zarr", **given)
    data, opened, loaded = FolderDataset(photographs), Image.open, PngImageFile.load

    def failing(path: Any, *rest: Any, **options: Any) -> Image.Image:
        if Path(path).name == "4.png":
            if fault == "away":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            if fault == "memory":
                raise MemoryError
            if isinstance(fault, int):
                raise OSError(fault, os.strerror(fault), str(path))
        return opened(path, *rest, **options)

    def load(image: PngImageFile) -> Any:
        if fault == "in the middle" and Path(image.filename).name == "4.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return loaded(image)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", failing)
        patch.setattr(PngImageFile, "load", load)
        with pytest.raises(ImageError, match=r"4\.png'.*What was complete is kept; the same command goes on from there"):
            extract(tiny_model, data, out, **given)
    assert store.store_info(out)["status"] == {"complete": 4, "pending": 2}
    assert extract(tiny_model, data, out, **given).complete == 6
    assert files(out) == files(tmp_path / "whole.zarr")


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
