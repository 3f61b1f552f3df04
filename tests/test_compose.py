"""Stores that grow, are merged, cut and written in shards, each against one extraction of the whole, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import xarray as xr
import zarr
from PIL import Image
from safetensors.numpy import load_file

from diffprobe import rundir, store
from diffprobe.compose import merge, subset
from diffprobe.data import FolderDataset, JoinedDataset, ShapesDataset, load_dataset
from diffprobe.export import export
from diffprobe.extend import extend
from diffprobe.extraction import extract, repair
from diffprobe.models import DiffusionModel

SITES = ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"]
MAP = "U-L1-R1-B0-Cross-Map"
# One row a pass: a row's values do then not depend on the rows beside it.
BASE: dict[str, Any] = {"sites": SITES, "timesteps": (50, 500), "batch_rows": 1, "progress": False, "unit_samples": 2}


def contents(path: Path) -> dict[str, Any]:
    """Every array of a store but digests, which are bound to the request, and the request."""
    root = zarr.open_group(path, mode="r")
    arrays = {name: np.asarray(found[...]) for name, found in root.members(max_depth=None) if isinstance(found, zarr.Array)}
    arrays.pop("digest")
    told: Any = root.attrs["diffprobe"]
    return {**arrays, "request": told["request"], "data": told["data"], "rule": told["map_tokens_rule"]}


def assert_equal_stores(left: Path, right: Path, but: tuple[str, ...] = ()) -> None:
    a, b = contents(left), contents(right)
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        if isinstance(a[name], np.ndarray):
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
            same = a[name].tobytes() == b[name].tobytes() if a[name].dtype.kind in "iuf" else (a[name] == b[name]).all()
            assert same, name
        else:
            assert a[name] == b[name], name
    assert store.verify_store(left) == []


# --- extend ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five scenes with everything that the tests below add, in one extraction."""
    out = tmp_path_factory.mktemp("whole") / "s.zarr"
    more = {"conditionings": ("null", "caption", "question"), "guidance": [3.0], "maps": [MAP], "map_tokens": "all"}
    extract(tiny_model, ShapesDataset(5, "test"), out, **BASE, **more)
    return out


def smaller(model: DiffusionModel, out: Path, **options: Any) -> Path:
    given = {"conditionings": ("null", "caption", "question"), "guidance": [3.0], "maps": [MAP], "map_tokens": "all"}
    extract(model, options.pop("dataset", ShapesDataset(5, "test")), out, **BASE | given | options)
    return out


ADDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what the first extraction has, what is added
    "timesteps": ({"timesteps": (50,)}, {"timesteps": [500]}),
    "a site": ({"sites": SITES[1:]}, {"sites": SITES}),
    "maps": ({"maps": []}, {"maps": [MAP]}),
    "conditionings": ({"conditionings": ("null", "caption")}, {"conditionings": ["question"]}),
    "samples": ({"dataset": ShapesDataset(3, "test")}, {"dataset": "shapes:5?split=test"}),
    "several": (
        {"dataset": ShapesDataset(3, "test"), "timesteps": (50,), "sites": SITES[1:], "conditionings": ("null", "caption")},
        {"dataset": "shapes:5?split=test", "timesteps": [500], "sites": SITES[:1], "conditionings": ["question"]},
    ),
}


@pytest.mark.parametrize("what", ADDED)
def test_an_extended_store_is_the_store_of_one_extraction(
    tiny_model: DiffusionModel, tmp_path: Path, whole: Path, what: str
) -> None:
    before, more = ADDED[what]
    path = smaller(tiny_model, tmp_path / "s.zarr", **before)
    calls: list[int] = []
    handle = tiny_model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    added = extend(path, model=tiny_model, progress=False, **more)
    handle.remove()
    assert_equal_stores(path, whole)
    assert added and sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr"], "nothing is left beside it"
    # a first pass finds the shapes; beside it only what is new is computed (null again, for guided features)
    passes = {"timesteps": 15, "a site": 30, "maps": 30, "conditionings": 20, "samples": 12}
    if what in passes:
        assert len(calls) == passes[what] + 1
    assert extend(path, model=tiny_model, progress=False, **more) == {}, "all is there already"
    assert_equal_stores(path, whole)


def test_what_was_extracted_in_one_go_is_resumed_by_its_command(
    tiny_model: DiffusionModel, tmp_path: Path, whole: Path
) -> None:
    path = smaller(tiny_model, tmp_path / "s.zarr", timesteps=(50,))
    extend(path, timesteps=[500], model=tiny_model, progress=False)
    store.StoreWriter(path).forget_unit(1)
    smaller(tiny_model, path)  # accepts it as its own, and finishes it
    assert_equal_stores(path, whole)


def test_prompts_of_another_length(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """Without maps the kept tokens grow; maps that lack a token are refused before anything is computed."""
    options = BASE | {"conditionings": ("null", "caption")}
    for dataset in (ShapesDataset(8), ShapesDataset(1)):
        extract(tiny_model, dataset, tmp_path / f"{len(dataset)}.zarr", **options)
    assert (
        contents(tmp_path / "1.zarr")["prompts/token_id"].shape[2] < contents(tmp_path / "8.zarr")["prompts/token_id"].shape[2]
    )
    extend(tmp_path / "1.zarr", dataset=ShapesDataset(8), model=tiny_model, progress=False)
    assert_equal_stores(tmp_path / "1.zarr", tmp_path / "8.zarr")
    extract(tiny_model, ShapesDataset(1), tmp_path / "maps.zarr", maps=[MAP], **options)
    with pytest.raises(ValueError, match="--map-tokens all"):
        extend(tmp_path / "maps.zarr", dataset=ShapesDataset(8), model=tiny_model, progress=False)
    assert extend(tmp_path / "maps.zarr", timesteps=[10], model=tiny_model, progress=False) == {"timesteps": [10]}


def photographs(folder: Path, names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        noise = np.random.default_rng(ord(name)).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a picture of {name}")
    return folder


def test_a_folder_that_grew(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", "bdf")
    options = BASE | {"conditionings": ("null", "caption"), "timesteps": (50,)}
    extract(tiny_model, FolderDataset(folder), tmp_path / "s.zarr", **options)
    extract(tiny_model, FolderDataset(folder), tmp_path / "old.zarr", **options)
    photographs(folder, "ace")  # between the others
    with pytest.raises(ValueError, match="add them to the store first"):
        extend(tmp_path / "s.zarr", timesteps=[10], model=tiny_model, progress=False)
    tree = store.open_store(tmp_path / "s.zarr")
    added = extend(tmp_path / "s.zarr", dataset=str(folder), model=tiny_model, progress=False)
    assert added == {"samples": ["a.png", "c.png", "e.png"]}
    extract(tiny_model, FolderDataset(folder), tmp_path / "whole.zarr", **options)
    assert_equal_stores(tmp_path / "s.zarr", tmp_path / "whole.zarr")
    with pytest.raises(store.StoreError, match="open it again"):
        store.features(tree, SITES[0]).load()  # rows would now be others'
    Image.new("RGB", (9, 9)).save(folder / "b.png")
    with pytest.raises(ValueError, match="an image or its text was changed"):
        extend(tmp_path / "old.zarr", dataset=str(folder), model=tiny_model, progress=False)


def test_texts_from_other_samples(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    extract(tiny_model, ShapesDataset(3), tmp_path / "s.zarr", conditionings=("mismatched",), **BASE)
    with pytest.raises(ValueError, match="'mismatched' gives old ones another text"):
        extend(tmp_path / "s.zarr", dataset=ShapesDataset(6), model=tiny_model, progress=False)


def test_limits_and_parts_of_a_folder(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "pho?tos", "abcd")
    some = load_dataset(f"{folder}?limit=2")
    assert [some[i].id for i in range(len(some))] == ["a.png", "b.png"] and len(load_dataset(some.spec)) == 2
    assert (
        FolderDataset(folder).only(["a.png", "b.png"]).fingerprint()
        == some.fingerprint()
        != FolderDataset(folder).fingerprint()
    )
    with pytest.raises(ValueError, match=r"limt.*limit"):
        load_dataset(f"{folder}?limt=2")


# --- faults ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a test raises where a process would die; no handler of errors catches it."""


MOMENTS: list[tuple[Any, str, int]] = [  # where it dies: before the n-th call
    (store.StoreWriter, "write_unit", 1),  # the second unit of the part is being written
    (store.StoreWriter, "write_unit", 3),  # the part is whole, nothing is copied
    (store.StoreWriter, "write_unit", 5),  # two units are copied
    (rundir, "exchange", 0),  # all is copied
    (shutil, "rmtree", 0),  # swapped, and nothing cleared
    (shutil, "rmtree", 1),
]


@pytest.mark.parametrize(("home", "name", "number"), MOMENTS)
def test_an_extension_that_dies_leaves_a_whole_store_and_goes_on(
    tiny_model: DiffusionModel, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, home: Any, name: str, number: int
) -> None:
    path = smaller(tiny_model, tmp_path / "s.zarr", timesteps=(50,))
    before, call, left = contents(path), getattr(home, name), iter(range(number))

    def dies(*given: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return call(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, dies)
        with pytest.raises(Killed):
            extend(path, timesteps=[500], model=tiny_model, progress=False)
    now = contents(path)
    if name == "rmtree":
        assert_equal_stores(path, whole)
    else:
        assert now.keys() == before.keys() and now["request"] == before["request"], "readers see the old store whole"
        np.testing.assert_array_equal(now[f"{SITES[0]}/features"], before[f"{SITES[0]}/features"])
        with pytest.raises(rundir.RequestError, match=r"left unfinished.*timesteps.*remove .*s\.zarr\.adding"):
            extend(path, timesteps=[7], model=tiny_model, progress=False)
    calls: list[int] = []
    handle = tiny_model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    extend(path, timesteps=[500], model=tiny_model, progress=False)
    handle.remove()
    assert_equal_stores(path, whole)
    assert len(calls) <= {1: 10, 3: 1}.get(number, 1), "what was computed is not computed again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr"]


def test_a_swap_without_the_systems_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir.ctypes, "CDLL", lambda *_: object())
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "what").write_text(name)
    rundir.exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "what").read_text() == "new" and (tmp_path / "new" / "what").read_text() == "old"
    (tmp_path / "old").rename(tmp_path / "old.old")  # killed in between
    rundir.undo_exchange(tmp_path / "old")
    assert (tmp_path / "old" / "what").read_text() == "new"


def test_an_extension_is_refused_while_another_writes_and_for_another_model(
    tiny_model: DiffusionModel, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    path = smaller(tiny_model, tmp_path / "s.zarr", timesteps=(50,))
    with rundir.sole_writer(path), pytest.raises(rundir.BusyError):
        extend(path, timesteps=[500], model=tiny_model)
    with pytest.raises(rundir.RequestError, match="weights: the store has"):
        extend(path, timesteps=[500], model=tiny("sd2"))
    store.StoreWriter(path).forget_unit(0)
    with pytest.raises(store.StoreError, match="2 pending samples; finish it"):
        extend(path, timesteps=[500], model=tiny_model)
    assert repair(path, tiny_model, progress=False)[1] is not None


# --- merge and subset -----------------------------------------------------------------------------


def test_merged_stores_are_the_store_of_one_extraction(tiny_model: DiffusionModel, tmp_path: Path, whole: Path) -> None:
    splits = {
        "timesteps": ({"timesteps": (50,)}, {"timesteps": (500,)}),
        "sites": ({"maps": []}, {"sites": []}),
        "conditionings": ({"conditionings": ("null", "caption")}, {"conditionings": ("null", "question")}),
    }
    for axis, (one, other) in splits.items():
        parts = [smaller(tiny_model, tmp_path / f"{axis}-{n}.zarr", **options) for n, options in enumerate((one, other))]
        assert merge(parts, tmp_path / f"{axis}.zarr", progress=False) == axis
        assert_equal_stores(tmp_path / f"{axis}.zarr", whole)


def test_samples_of_two_datasets(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    data = [ShapesDataset(3, "test"), FolderDataset(photographs(tmp_path / "photos", "abc"))]
    options = BASE | {"conditionings": ("null", "caption")}
    for number, dataset in enumerate(data):
        extract(tiny_model, dataset, tmp_path / f"{number}.zarr", **options)
    merge([tmp_path / "0.zarr", tmp_path / "1.zarr"], tmp_path / "both.zarr", progress=False)
    extract(tiny_model, JoinedDataset(data), tmp_path / "whole.zarr", **options)
    assert_equal_stores(tmp_path / "both.zarr", tmp_path / "whole.zarr")
    store.StoreWriter(tmp_path / "both.zarr").forget_unit(1)  # with samples of both
    repair(tmp_path / "both.zarr", tiny_model, progress=False)
    assert_equal_stores(tmp_path / "both.zarr", tmp_path / "whole.zarr")


def test_what_cannot_be_merged_is_refused_with_the_differences(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    paths = {}
    for name, options in {
        "a": {}, "seed": {"seed": 1}, "two": {"timesteps": (7,), "sites": SITES[:1]}, "late": {"timesteps": (7,)},
        "late seed": {"timesteps": (7,), "seed": 1}, "overlap": {"timesteps": (500, 7)},
    }.items():  # fmt: skip
        paths[name] = tmp_path / f"{name}.zarr"
        extract(tiny_model, ShapesDataset(2), paths[name], **BASE | options)
    for other, words in {
        "seed": "have the same samples, sites, timesteps",
        "two": "differ in their sites and timesteps",
        "late seed": "seed: .*a.zarr has 0, .*late seed.zarr has 1",
        "overlap": "share 1 of their timesteps, such as 500",
    }.items():
        with pytest.raises(ValueError, match=words):
            merge([paths["a"], paths[other]], tmp_path / "out.zarr", progress=False)
    assert not (tmp_path / "out.zarr").exists()
    merge([paths["a"], paths["late"]], tmp_path / "out.zarr", progress=False)
    store.StoreWriter(tmp_path / "out.zarr").forget_unit(0)
    merge([paths["a"], paths["late"]], tmp_path / "out.zarr", progress=False)  # goes on
    assert store.verify_store(tmp_path / "out.zarr") == [] and not store.StoreWriter(tmp_path / "out.zarr").pending
    with pytest.raises(rundir.RequestError, match="holds another store"):
        merge([paths["late"], paths["a"]], tmp_path / "out.zarr", progress=False)


def test_a_part_of_a_store(tmp_path: Path, whole: Path) -> None:
    tree = store.open_store(whole)
    chosen = {"timesteps": [500], "conditionings": ["null", "caption"], "sites": [SITES[1]]}
    colour = str(tree["colour"].values[0])
    count = subset(whole, tmp_path / "part.zarr", where={"colour": colour}, progress=False, **chosen)
    part = store.open_store(tmp_path / "part.zarr")
    rows = np.flatnonzero(tree["colour"].values == colour)
    assert count == len(rows) == part.sizes["sample"] and store.site_names(part) == [SITES[1]]
    old, new = (store.features(one, SITES[1]) for one in (tree, part))
    assert new["conditioning"].values.tolist() == ["null", "caption", "caption@3"]
    xr.testing.assert_identical(
        new.drop_attrs(), old.isel(sample=rows).sel(timestep=[500], conditioning=new["conditioning"].values).drop_attrs()
    )
    assert store.verify_store(tmp_path / "part.zarr") == []
    with pytest.raises(store.StoreError, match=r"No sample .* is left"):
        subset(whole, tmp_path / "none.zarr", where={"colour": "none"})
    with pytest.raises(store.StoreError, match=r"There is no label 'color'.*colour"):
        subset(whole, tmp_path / "none.zarr", where={"color": "red"})


def test_marked_samples_stay_marked(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", "abc")
    (folder / "b.png").write_bytes(b"no picture")
    for number, timestep in enumerate((50, 500)):
        extract(tiny_model, FolderDataset(folder), tmp_path / f"{number}.zarr", **BASE | {"timesteps": (timestep,)})
    merge([tmp_path / "0.zarr", tmp_path / "1.zarr"], tmp_path / "both.zarr", progress=False)
    extract(tiny_model, FolderDataset(folder), tmp_path / "whole.zarr", **BASE)
    assert_equal_stores(tmp_path / "both.zarr", tmp_path / "whole.zarr")
    assert store.open_store(tmp_path / "both.zarr").sizes["sample"] == 2


# --- shards ---------------------------------------------------------------------------------------


def test_shards_make_the_store_of_one_extraction(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    options = {name: value for name, value in BASE.items() if name != "unit_samples"}
    for shard in (3, 1):
        extract(tiny_model, ShapesDataset(7), tmp_path / "s.zarr", shard=(shard, 3), **options)
    found = store.store_info(tmp_path / "s.zarr")
    assert {unit % 3 for unit in found["written"]} == {0, 2} and found["shards"] == 3
    with pytest.raises(rundir.RequestError, match=r"begun in 3 shard.*you ask for 2"):
        extract(tiny_model, ShapesDataset(7), tmp_path / "s.zarr", shard=(2, 2), **options)
    extract(tiny_model, ShapesDataset(7), tmp_path / "s.zarr", shard=(2, 3), **options)
    extract(tiny_model, ShapesDataset(7), tmp_path / "whole.zarr", **BASE)
    extract(tiny_model, ShapesDataset(7), tmp_path / "units.zarr", unit_samples=int(found["unit_samples"]), **options)
    assert_equal_stores(tmp_path / "s.zarr", tmp_path / "units.zarr")
    assert not store.StoreWriter(tmp_path / "s.zarr").pending


def test_a_shard_that_never_ran_is_named_and_any_command_finishes(
    run: Any, tiny_model: DiffusionModel, tiny_folder: Path, tmp_path: Path
) -> None:
    extract(tiny_model, ShapesDataset(8), tmp_path / "s.zarr", shard=(2, 4), **BASE)
    code, said, _ = run("info", tmp_path / "s.zarr")
    assert code == 0 and "1 of 4 units done (25%)" in said
    assert all(f"shard {shard}/4: 0 of 1 units" in said for shard in (1, 3, 4)) and "shard 2/4" not in said
    extract(tiny_model, ShapesDataset(8), tmp_path / "s.zarr", **BASE)
    assert "units done" not in run("info", tmp_path / "s.zarr")[1]


def test_a_remote_place(tiny_model: DiffusionModel, tmp_path: Path, run: Any) -> None:
    fsspec.filesystem("memory").store.clear()
    for shard in (1, 2):
        extract(tiny_model, ShapesDataset(5), "memory://tests/s.zarr", shard=(shard, 2), **BASE)
        assert ("units done" in run("info", "memory://tests/s.zarr")[1]) == (shard == 1)
    extract(tiny_model, ShapesDataset(5), tmp_path / "late.zarr", **BASE | {"timesteps": (7,)})
    assert merge(["memory://tests/s.zarr", tmp_path / "late.zarr"], "memory://tests/both.zarr", progress=False) == "timesteps"
    assert store.verify_store("memory://tests/both.zarr") == []
    extract(tiny_model, ShapesDataset(5), tmp_path / "whole.zarr", **BASE | {"timesteps": (50, 500, 7)})
    whole, both = (store.features(store.open_store(p), SITES[0]) for p in (tmp_path / "whole.zarr", "memory://tests/both.zarr"))
    np.testing.assert_array_equal(whole.values, both.values)
    with pytest.raises(store.StoreError, match="is a URL"):
        extend("memory://tests/s.zarr", timesteps=[7], model=tiny_model)


def test_locks_of_shards(tmp_path: Path) -> None:
    with rundir.shard_writer(tmp_path / "s.zarr", 1):
        with rundir.shard_writer(tmp_path / "s.zarr", 2):
            pass
        for writer in (lambda: rundir.shard_writer(tmp_path / "s.zarr", 1), lambda: rundir.sole_writer(tmp_path / "s.zarr")):
            with pytest.raises(rundir.BusyError), writer():
                pass
    with rundir.sole_writer(tmp_path / "s.zarr"), pytest.raises(rundir.BusyError), rundir.shard_writer(tmp_path / "s.zarr", 1):
        pass
    assert not list(tmp_path.iterdir())


def test_two_shards_that_lay_the_store_out_at_once(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds the first's store where its own should go, and goes on from there."""
    put = rundir.whole_folder

    def overtaken(path: Path, company: bool = False) -> Any:
        monkeypatch.setattr(store, "whole_folder", put)
        extract(tiny_model, ShapesDataset(5), tmp_path / "s.zarr", shard=(1, 2), **BASE)
        return put(path, company)

    monkeypatch.setattr(store, "whole_folder", overtaken)
    extract(tiny_model, ShapesDataset(5), tmp_path / "s.zarr", shard=(2, 2), **BASE)
    extract(tiny_model, ShapesDataset(5), tmp_path / "whole.zarr", **BASE)
    assert_equal_stores(tmp_path / "s.zarr", tmp_path / "whole.zarr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr", "whole.zarr"]


@pytest.mark.slow
def test_jobs_that_start_at_once_one_of_them_killed(tiny_folder: Path, tmp_path: Path) -> None:
    def command(out: str, *more: str) -> list[str]:
        words = ["extract", "--model", str(tiny_folder), "--data", "shapes:24", "--sites", ",".join(SITES), "--timesteps", "50"]
        return [sys.executable, "-m", "diffprobe", *words, "--batch-rows", "2", "--out", str(tmp_path / out), *more]

    jobs = [
        subprocess.Popen(command("s.zarr", "--shard", f"{n}/3"), stdout=-3, stderr=subprocess.PIPE, text=True)
        for n in (1, 2, 3)
    ]
    while not (tmp_path / "s.zarr").exists() and jobs[1].poll() is None:
        time.sleep(0.02)
    jobs[1].send_signal(signal.SIGKILL)
    said = [job.communicate()[1] for job in jobs]
    assert [jobs[0].returncode, jobs[2].returncode] == [0, 0], said
    subprocess.run(command("s.zarr", "--shard", "2/3"), check=True, capture_output=True)
    subprocess.run(command("whole.zarr"), check=True, capture_output=True)
    left, right = contents(tmp_path / "s.zarr"), contents(tmp_path / "whole.zarr")
    for site in SITES:
        np.testing.assert_array_equal(left[f"{site}/features"], right[f"{site}/features"])
    assert store.verify_store(tmp_path / "s.zarr") == [] and (left["status"] == store.COMPLETE).all()


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "safetensors", "parquet", "hf"])
def test_what_is_exported_is_what_the_store_holds(
    tmp_path: Path, whole: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffprobe.export.SHARD_BYTES", 100_000)  # several blocks
    tree = store.open_store(whole)
    out = tmp_path / f"out.{form}"
    assert export(whole, out, form, sites=[*SITES, MAP], conditionings=["caption", "null"]) == 5
    pick = {"conditioning": ["caption", "null"]}
    wanted = {site: tree[site].to_dataset()["maps" if site == MAP else "features"].sel(pick).values for site in (*SITES, MAP)}
    ids, colours = tree["sample"].values.tolist(), tree["colour"].values.tolist()
    texts = store.prompt_texts(tree, "caption")["text"].values.tolist()
    if form == "npz":
        found = np.load(out)
        assert [found[n].tolist() for n in ("id", "colour", "prompt/caption")] == [ids, colours, texts]
        assert found[f"{MAP}/conditioning"].tolist() == ["caption", "null"]
        got = {site: found[site] for site in wanted}
    elif form == "safetensors":
        files = sorted(out.glob("*.safetensors"))
        parts = [load_file(file) for file in files]
        assert len(files) > 1 and pd.read_csv(out / "samples.csv")["id"].tolist() == ids
        got = {site: np.concatenate([part[site] for part in parts]) for site in wanted}
    else:
        if form == "parquet":
            table = pyarrow.parquet.read_table(out)
            rows: Any = table.to_pydict()
            shapes = {f.name: f.metadata[b"shape"].decode() for f in table.schema if f.metadata and b"shape" in f.metadata}
        else:
            rows = datasets.load_from_disk(str(out)).with_format("numpy")[:]
        assert [list(rows[n]) for n in ("id", "colour", "prompt/caption")] == [ids, colours, texts]
        got = {site: np.empty(values.shape, values.dtype) for site, values in wanted.items()}
        for site, values in got.items():
            for i, c in enumerate(("caption", "null")):
                for j, t in enumerate((50, 500)):
                    cell = np.asarray(rows[f"{site}/{c}/{t}"])
                    shape = [int(n) for n in shapes[f"{site}/{c}/{t}"].split(",")] if form == "parquet" else cell.shape[1:]
                    values[:, i, j] = cell.reshape(5, *shape)
    for site, values in wanted.items():
        np.testing.assert_array_equal(got[site], values)
    with pytest.raises(ValueError, match="exists; give a new path"):
        export(whole, out, form)
    with pytest.raises(store.StoreError, match=r"timestep 7 is not in this store; it has 50, 500"):
        export(whole, tmp_path / "other", form, timesteps=[7])


# --- the command line -----------------------------------------------------------------------------


def test_commands(run: Any, follow: Any, tiny_model: DiffusionModel, tiny_folder: Path, tmp_path: Path) -> None:
    extract(tiny_model, ShapesDataset(12), tmp_path / "a.zarr", **BASE | {"timesteps": (50,)})
    given = ("--model", tiny_folder, "-t", "50,500")
    code, said, errors = run("extend", tmp_path / "a.zarr", *given)
    assert code == 0 and "1 timesteps were added: 500." in said, errors
    follow(said)
    code, said, _ = run("extend", tmp_path / "a.zarr", *given)
    assert code == 0 and "nothing was added" in said
    code, said, _ = run("subset", tmp_path / "a.zarr", "-o", tmp_path / "b.zarr", "-t", "50", "--limit", "6")
    assert code == 0 and "6 samples are in" in said
    follow(said)
    assert run("subset", tmp_path / "a.zarr", "-o", tmp_path / "c.zarr", "-t", "500", "--limit", "6")[0] == 0
    code, said, _ = run("merge", tmp_path / "b.zarr", tmp_path / "c.zarr", "-o", tmp_path / "d.zarr")
    assert code == 0 and "The timesteps of 2 stores are in" in said
    follow(said)
    code, said, _ = run("export", tmp_path / "d.zarr", "-o", tmp_path / "d.npz", "--sites", SITES[0])
    assert code == 0 and np.load(tmp_path / "d.npz")[SITES[0]].shape[:3] == (6, 2, 2)
    for words, told in {
        ("merge", "a.zarr", "-o", "x"): "merge takes two stores or more",
        ("merge", "a.zarr", "b.zarr", "-o", "x"): "differ in their samples and timesteps",
        ("subset", "a.zarr", "-o", "x", "--where", "red"): "--where takes LABEL=VALUE",
        ("extract", "-o", "x", "--shard", "3"): "--shard takes i/n",
        ("extract", "-o", "x", "--shard", "3/2"): "Shard 3/2 does not exist",
    }.items():
        code, _, errors = run(*(tmp_path / word if word.endswith((".zarr", "x")) else word for word in words))
        assert code == 2 and told in errors and errors.count("\n") == 1, errors
