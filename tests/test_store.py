"""The layout, checked against a plain NumPy array of what was put in."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr

from diffprobe import layout, rundir, store
from diffprobe.store import ArraySpec, StoreError

TIMESTEPS = (10, 500)
BASE = ("null", "caption")
SPECS = [
    ArraySpec("U-L1-Out", "up_blocks.1", "block", "features", ("channel", "y", "x"), (3, 2, 4), BASE),
    ArraySpec("D-L0-Out", "down_blocks.0", "block", "features", ("channel",), (5,), BASE, "mean"),
    ArraySpec("U-L1-R0-B0-Cross-Map", "u1.map", "cross_map", "maps", ("head", "token", "y", "x"), (2, 6, 2, 4), BASE),
    ArraySpec("U-L2-R0-B0-Cross-Map", "u2.map", "cross_map", "maps", ("head", "token", "y", "x"), (2, 6, 4, 8), BASE),
]
REQUEST = {
    "timesteps": list(TIMESTEPS),
    "sites": [spec.site for spec in SPECS if spec.variable == "features"],
    "maps": [spec.site for spec in SPECS if spec.variable == "maps"],
}
TEXTS = ["a red star", "a blue circle", "a red circle", "a starfish", "a red star"]
SPANS = [  # two letters a token from the third on, so that words have sub-tokens
    [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)],
    [(0, 0), (0, 1), (2, 6), (7, 9), (9, 13), (0, 0)],
    [(0, 0), (0, 1), (2, 5), (6, 8), (8, 12), (0, 0)],
    [(0, 0), (0, 1), (2, 6), (6, 10), (0, 0), (0, 0)],
    [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)],
]


def make(path: str | Path, units: int = 2, compress: bool = False) -> dict[str, np.ndarray]:
    """A written store of five samples, and the arrays that went in."""
    texts = np.array([["", text] for text in TEXTS], object)
    spans = np.array([[[(0, 0)] * 6, row] for row in SPANS], np.int32)
    store.create_store(
        path,
        attributes={"request": REQUEST, "batch_rows": 1, "data": "none"},
        sample_ids=[f"s{i}" for i in range(5)],
        labels={"colour": np.array(["red", "blue", "red", "", "red"], object), "count": np.arange(5)},
        timesteps=TIMESTEPS,
        prompts={"text": texts, "token_id": spans[..., 0], "token_start": spans[..., 0], "token_end": spans[..., 1]},
        conditionings=BASE,
        tokens=range(6),
        specs=SPECS,
        unit_samples=2,
        dtype="float16",
        compress=compress,
    )
    rng = np.random.default_rng(0)
    arrays = {s.site: rng.random((5, 2, 2, *s.shape)).astype(np.float16) for s in SPECS}
    writer = store.StoreWriter(path)
    for unit in range(units):
        first, last = writer.bounds(unit)
        writer.write_unit(unit, {n: a[first:last] for n, a in arrays.items()}, np.full(last - first, store.COMPLETE, np.uint8))
    return arrays


def test_what_is_written_is_read_by_name(tmp_path: Path) -> None:
    arrays = make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    got = store.features(tree, "U-L1-Out", timestep=500, conditioning="caption")
    assert got.dims == ("sample", "channel", "y", "x")
    np.testing.assert_array_equal(got.values, arrays["U-L1-Out"][:, 1, 1])
    assert got["colour"].values.tolist() == ["red", "blue", "red", "", "red"]
    by_path = store.features(tree, "up_blocks.1", timestep=[500, 10])
    np.testing.assert_array_equal(by_path.values, arrays["U-L1-Out"][:, :, ::-1])


@pytest.mark.parametrize("backwards", [False, True])
def test_sites_come_in_the_order_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool) -> None:
    """However the file system lists a folder."""
    make(tmp_path / "s.zarr")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listed(folder), reverse=backwards)))
    tree = store.open_store(tmp_path / "s.zarr")
    assert [name for name in tree.children if name != "prompts"] == store.site_names(tree) == [spec.site for spec in SPECS]


def test_a_selection_of_a_site_keeps_the_labels(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    for chunks in (None, "auto"):
        tree = store.open_store(tmp_path / "s.zarr", chunks=chunks)
        for site, variable in (("U-L1-Out", "features"), ("U-L2-R0-B0-Cross-Map", "maps")):
            found = tree[site][variable].sel(timestep=500, conditioning="caption")
            assert found["colour"].values.tolist() == ["red", "blue", "red", "", "red"]
            assert found.sel(sample=found["colour"] == "blue")["sample"].values.tolist() == ["s1"]
            assert "status" not in found.coords


def test_a_label_may_be_called_as_an_array_is(tmp_path: Path) -> None:
    names, texts = {"features": np.arange(2), "maps": np.arange(2)}, np.array([["", "a"]] * 2, object)
    store.create_store(
        tmp_path / "s.zarr", attributes={"request": {}, "data": "none"}, sample_ids=["a", "b"], labels=names, timesteps=TIMESTEPS,
        prompts={"text": texts}, conditionings=BASE, tokens=[], specs=SPECS[:1], unit_samples=2, dtype="float16",
    )  # fmt: skip
    values = np.ones((2, 2, 2, *SPECS[0].shape), np.float16)
    store.StoreWriter(tmp_path / "s.zarr").write_unit(0, {"U-L1-Out": values}, np.ones(2, np.uint8))
    tree = store.open_store(tmp_path / "s.zarr")
    assert tree["U-L1-Out"].features.shape == values.shape and "maps" not in tree["U-L1-Out"]
    assert tree["features"].values.tolist() == [0, 1]
    assert store.features(tree, "U-L1-Out", timestep=10, conditioning="null").shape == (2, 3, 2, 4)


def test_pooling_and_patches(tmp_path: Path) -> None:
    arrays = make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    mean = store.features(tree, "U-L1-Out", pool="mean")
    np.testing.assert_allclose(mean.values, arrays["U-L1-Out"].astype(np.float32).mean((-1, -2)), rtol=1e-6)
    patches = store.features(tree, "U-L1-Out", timestep=10, conditioning="null", pool="patches")
    assert patches.dims == ("sample", "patch", "channel")
    np.testing.assert_array_equal(patches.values[0, 5], arrays["U-L1-Out"][0, 0, 0, :, 1, 1])
    with pytest.raises(StoreError, match="was reduced while recording"):
        store.features(tree, "D-L0-Out", pool="patches")


def test_guidance_is_the_formula(tmp_path: Path) -> None:
    arrays = make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    null, text = (arrays["U-L1-Out"][:, c].astype(np.float64) for c in (0, 1))
    for scale in (0.0, 1.0, 4.0):
        got = store.features(tree, "U-L1-Out", guidance=scale)
        np.testing.assert_allclose(got.values, null + scale * (text - null), rtol=1e-5, atol=1e-5)
    assert str(got["conditioning"].values) == "caption@4"


def test_a_word_is_the_mean_of_its_sub_tokens_over_heads_and_sites(tmp_path: Path) -> None:
    arrays = make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    maps = store.attention_maps(tree, "star", site="U-L2-R0-B0-Cross-Map", timestep=10)
    assert maps.dims == ("sample", "timestep", "y", "x")
    assert maps["sample"].values.tolist() == ["s0", "s4"], "'starfish' is another word"
    expected = arrays["U-L2-R0-B0-Cross-Map"].astype(np.float64)[0, 1, 0][:, [3, 4]].mean((0, 1))
    np.testing.assert_allclose(maps.values[0, 0], expected, rtol=1e-5)
    summed = store.attention_maps(tree, "star", site="U-L2-R0-B0-Cross-Map", timestep=10, merge="sum", head=1)
    np.testing.assert_allclose(
        summed.values[0, 0], arrays["U-L2-R0-B0-Cross-Map"].astype(np.float64)[0, 1, 0, 1, [3, 4]].sum(0), rtol=1e-5
    )
    both = store.attention_maps(tree, "star", timestep=10)
    assert both.shape == (2, 1, 4, 8)
    start = store.attention_maps(tree, token=0, site="U-L1-R0-B0-Cross-Map")
    assert start.shape == (5, 2, 2, 4)


def test_missing_things_are_named(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    with pytest.raises(StoreError, match=r"Did you mean 'U-L1-Out'\?"):
        store.features(tree, "U-L1-Ou")
    with pytest.raises(StoreError, match="timestep 50 is not in this store; it has 10, 500"):
        store.features(tree, "U-L1-Out", timestep=50)
    with pytest.raises(StoreError, match="conditioning 'question' is not in this store; it has null, caption"):
        store.features(tree, "U-L1-Out", conditioning="question")
    with pytest.raises(StoreError, match="has the word 'green'"):
        store.attention_maps(tree, "green")
    with pytest.raises(StoreError, match="either a word or a token"):
        store.attention_maps(tree)


def test_absence_is_recorded_and_never_read_as_data(tmp_path: Path) -> None:
    arrays = make(tmp_path / "s.zarr", units=1)
    assert store.StoreWriter(tmp_path / "s.zarr").pending == [1, 2]
    tree = store.open_store(tmp_path / "s.zarr")
    assert tree["sample"].values.tolist() == ["s0", "s1"]
    np.testing.assert_array_equal(store.features(tree, "U-L1-Out").values, arrays["U-L1-Out"][:2])
    everything = store.open_store(tmp_path / "s.zarr", complete=False)
    assert np.isnan(store.features(everything, "U-L1-Out").values[2:]).all()


def test_the_labels_of_incomplete_stores_belong_to_their_samples(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    writer = store.StoreWriter(tmp_path / "s.zarr")
    status = writer.root["status"]
    assert isinstance(status, zarr.Array)
    status[1] = store.NOT_FINITE
    got = store.features(store.open_store(tmp_path / "s.zarr"), "U-L1-Out")
    assert got["sample"].values.tolist() == ["s0", "s2", "s3", "s4"]
    assert got["count"].values.tolist() == [0, 2, 3, 4]


def test_one_shard_a_unit_and_one_chunk_a_timestep(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    array = zarr.open_group(tmp_path / "s.zarr", mode="r")["U-L1-Out/features"]
    assert isinstance(array, zarr.Array)
    assert array.shards == (2, 2, 2, 3, 2, 4)
    assert array.chunks[2] == 1, "reading one timestep must not read the rest"
    shards = [p for p in (tmp_path / "s.zarr/U-L1-Out/features/c").rglob("*") if p.is_file()]
    assert len(shards) == 3


def test_lazy_and_dask(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr", chunks="auto")
    values = tree["U-L1-Out"]["features"]
    assert values.chunks is not None
    assert values.chunks[0] == (2, 2, 1)
    plain = store.open_store(tmp_path / "s.zarr")["U-L1-Out"]["features"]
    assert not isinstance(plain.variable._data, np.ndarray), "nothing is read before it is asked for"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_verify_finds_damage(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "s.zarr", units=3)
    assert store.verify_store(tmp_path / "s.zarr") == []
    shard = sorted(p for p in (tmp_path / "s.zarr/U-L1-Out/features/c").rglob("*") if p.is_file())[1]
    raw = bytearray(shard.read_bytes())
    if damage == "flip":
        raw[17] ^= 1
        shard.write_bytes(bytes(raw))
    elif damage == "truncate":
        shard.write_bytes(bytes(raw[: len(raw) // 2]))
    else:
        shard.unlink()
    faults = store.verify_store(tmp_path / "s.zarr")
    assert [(f.unit, f.site) for f in faults] == [(1, "U-L1-Out")]


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    shard = sorted(p for p in (tmp_path / "s.zarr/D-L0-Out/features/c").rglob("*") if p.is_file())[0]
    raw = shard.read_bytes()
    rng = np.random.default_rng(1)
    for place in rng.choice(len(raw), 25, replace=False):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(rng.integers(8))
        shard.write_bytes(bytes(damaged))
        assert store.verify_store(tmp_path / "s.zarr"), f"byte {place} of {len(raw)}"
    shard.write_bytes(raw)
    assert store.verify_store(tmp_path / "s.zarr") == []


def test_what_is_not_a_store_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a diffprobe store: no Zarr group"):
        store.open_store(tmp_path / "nothing.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(StoreError, match="attribute 'diffprobe' is missing"):
        store.open_store(tmp_path / "other.zarr")
    make(tmp_path / "s.zarr")
    root = zarr.open_group(tmp_path / "s.zarr", mode="r+")
    root.attrs["diffprobe"] = {**root.attrs["diffprobe"], "format_version": 99}  # type: ignore[dict-item]
    with pytest.raises(StoreError, match="store format 99; this diffprobe reads 1"):
        store.open_store(tmp_path / "s.zarr")


def test_links_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "s.zarr" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="symbolic link"):
        store.open_store(tmp_path / "s.zarr")


def test_a_store_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s.zarr")
    assert not store.exists(tmp_path / "s.zarr")


def test_info(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=2)
    found = store.store_info(tmp_path / "s.zarr")
    assert found["status"] == {"pending": 1, "complete": 4}
    assert found["sites"]["D-L0-Out"]["shape"] == (5, 2, 2, 5)
    assert found["sites"]["D-L0-Out"]["dims"] == ("sample", "conditioning", "timestep", "channel")


def test_a_remote_store(tmp_path: Path) -> None:
    arrays = make("memory://tests/remote.zarr", units=3)
    tree = store.open_store("memory://tests/remote.zarr")
    assert isinstance(tree, xr.DataTree)
    np.testing.assert_array_equal(store.features(tree, "U-L1-Out").values, arrays["U-L1-Out"])
    assert store.verify_store("memory://tests/remote.zarr") == []


def test_maps_are_enlarged_with_pixel_centres_in_place():
    coarse = xr.DataArray(np.array([[[[0.0, 1.0], [0.0, 1.0]]]], np.float32), dims=("sample", "timestep", "y", "x"))
    fine = store._resize(coarse, 4, 4)
    # the fine cells' centres lie at -.25, .25, .75 and 1.25 coarse cells from the first centre
    np.testing.assert_allclose(fine.values[0, 0], np.tile([0.0, 0.25, 0.75, 1.0], (4, 1)), atol=1e-6)
    wide = store._resize(coarse.transpose("sample", "timestep", "x", "y").rename(x="y", y="x"), 6, 2)
    np.testing.assert_allclose(wide.values[0, 0, :, 0], [0, 0, 1 / 3, 2 / 3, 1, 1], atol=1e-6)


# --- remote places: nothing is lost by a fault that passes ------------------------------------------


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An empty folder of fsspec's memory, and what lies in it by name."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def held(files: Any) -> dict[str, bytes]:
    return {name: files.cat_file(name) for name in files.find("/")}


class Unavailable(Exception):
    """What a client library raises for a 503."""


def unavailable(monkeypatch: pytest.MonkeyPatch, error: Exception) -> pytest.MonkeyPatch:
    def down(*_: object, **__: object) -> None:
        raise error

    for verb in ("cat_file", "info", "find", "ls"):
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem." + verb, down)
    return monkeypatch


@pytest.mark.parametrize("error", [Unavailable("503, slow down"), TimeoutError("timed out"), KeyError("Code")])
def test_only_not_found_means_that_there_is_no_store(bucket: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    make("memory://tests/a.zarr", units=3)
    before = held(bucket)
    with monkeypatch.context() as patch:
        unavailable(patch, error)
        for call in (store.exists, store.open_store, store.StoreWriter, make):
            with pytest.raises((StoreError, OSError)):
                call("memory://tests/a.zarr")
    assert held(bucket) == before
    assert store.exists("memory://tests/a.zarr") and not store.exists("memory://tests/b.zarr")


def test_what_a_remote_place_holds_is_never_cleared(bucket: Any) -> None:
    for name, start in (
        ("a.zarr", lambda: make("memory://tests/a.zarr", units=3)),
        ("b", lambda: bucket.pipe_file("/tests/b/notes.txt", b"mine")),
    ):
        start()
        before = held(bucket)
        with pytest.raises(StoreError, match="nothing was written"):
            make(f"memory://tests/{name}")
        assert held(bucket) == before
    bucket.rm_file("/tests/a.zarr/zarr.json")  # lost, with every shard still there
    before = held(bucket)
    with pytest.raises(StoreError, match="holds objects of something else"):
        make("memory://tests/a.zarr")
    assert held(bucket) == before


def test_a_remote_layout_that_was_killed_is_laid_out_again(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make("memory://tests/whole.zarr", units=0)
    count = len(bucket.find("/tests/whole.zarr"))
    write = type(bucket).pipe_file
    for number in range(count):
        bucket.store.clear()
        left = iter(range(number))

        def killed(self: Any, *rest: Any, left: Iterator[int] = left, **options: Any) -> None:
            if next(left, None) is None:
                raise Unavailable
            write(self, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(type(bucket), "pipe_file", killed)
            with pytest.raises(StoreError):
                make("memory://tests/a.zarr", units=0)
        assert not store.exists("memory://tests/a.zarr")
    arrays = make("memory://tests/a.zarr", units=3)
    np.testing.assert_array_equal(
        store.features(store.open_store("memory://tests/a.zarr"), "U-L1-Out").values, arrays["U-L1-Out"]
    )


def test_of_two_that_create_one_store_the_second_is_told(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = store._upload

    async def overtaken(url: str, layout: Any) -> None:
        monkeypatch.setattr(store, "_upload", put)
        await asyncio.to_thread(bucket.pipe_file, "/tests/a.zarr/zarr.json", b"of another")
        monkeypatch.setattr(type(bucket), "find", lambda *_, **__: [])  # it was not there yet when we looked
        await put(url, layout)

    monkeypatch.setattr(store, "_upload", overtaken)
    with pytest.raises(StoreError, match="Another process has just made a store"):
        make("memory://tests/a.zarr", units=0)
    assert bucket.cat_file("/tests/a.zarr/zarr.json") == b"of another"


def test_a_store_over_http_is_read_and_not_written(tmp_path: Path) -> None:
    arrays = make(tmp_path / "a.zarr", units=3)
    broken = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *rest: Any) -> None:
            super().__init__(*rest, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            pass

        def send_head(self) -> Any:
            if broken.is_set():
                self.send_error(503)
                return io.BytesIO()
            return super().send_head()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.zarr"
        assert store.exists(url) and not store.exists(url + "s")
        np.testing.assert_array_equal(store.features(store.open_store(url), "U-L1-Out").values, arrays["U-L1-Out"])
        broken.set()
        for call in (store.exists, store.open_store):
            with pytest.raises(StoreError, match="does not answer as it should"):
                call(url)
        for start in (make, lambda place: rundir.sole_writer(place).__enter__()):
            with pytest.raises(StoreError, match="can be read over HTTP and not written"):
                start(f"http://127.0.0.1:{server.server_port}/new.zarr")
        server.shutdown()


# --- one place, many spellings ----------------------------------------------------------------------


def test_the_lock_is_of_the_place_and_not_of_its_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "a.zarr")
    monkeypatch.chdir(tmp_path)
    spellings = [f"{tmp_path}/a.zarr", "a.zarr/", "./a.zarr", f"file://{tmp_path}/a.zarr", "link.zarr"]
    for held in spellings:
        for other in spellings:
            with rundir.sole_writer(held), pytest.raises(rundir.BusyError), rundir.sole_writer(other):
                raise AssertionError(f"two writers: {held} and {other}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "link.zarr"]


def test_a_slash_at_the_end_makes_no_other_store(tmp_path: Path) -> None:
    with rundir.sole_writer(f"{tmp_path}/new.zarr/"):
        make(f"{tmp_path}/new.zarr/")
    assert store.exists(tmp_path / "new.zarr") and [path.name for path in tmp_path.iterdir()] == ["new.zarr"]


def test_a_file_url_is_guarded_as_its_path_is(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/s.zarr"
    make(url)
    assert (tmp_path / "s.zarr" / "zarr.json").is_file() and store.store_info(url)["bytes_on_disk"] > 0
    (tmp_path / "s.zarr" / "link").symlink_to("/etc")
    with pytest.raises(StoreError, match="symbolic link"):
        store.open_store(url)


def test_cleaning_removes_only_what_a_killed_process_left(tmp_path: Path) -> None:
    for name in ("a.zarr.init-notes", "a.zarr.init-12345"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.zarr.init-7").write_text("a file")
    make(tmp_path / "a.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "a.zarr.init-7", "a.zarr.init-notes"]
    shard = next(path for path in (tmp_path / "a.zarr/U-L1-Out/features/c").rglob("*") if path.is_file())
    cut = shard.with_name(f"{shard.name}.{'0' * 32}.partial")
    cut.write_bytes(b"half")
    (tmp_path / "a.zarr" / "x.partial").mkdir()  # of a label
    (tmp_path / "a.zarr" / "x.partial" / "zarr.json").write_text("{}")
    store.clear_cut_writes(f"file://{tmp_path}/a.zarr")
    assert not cut.exists() and shard.exists() and (tmp_path / "a.zarr" / "x.partial" / "zarr.json").exists()


# --- what is missing, misplaced or edited -----------------------------------------------------------


def arrays_of(path: Path, *parts: str) -> list[Path]:
    return [file for part in parts for file in sorted((path / part / "c").rglob("*")) if file.is_file()]


@pytest.mark.parametrize(
    "array",
    [
        "sample",
        "colour",
        "count",
        "prompts/text",
        "prompts/token_start",
        "U-L1-Out/timestep",
        "U-L1-R0-B0-Cross-Map/token",
        "prompts/conditioning",
    ],
)
def test_a_missing_chunk_is_an_error_and_no_fill_value(tmp_path: Path, array: str) -> None:
    path = tmp_path / "s.zarr"
    make(path, units=3)
    shutil.rmtree(path / array / "c")
    with pytest.raises(StoreError, match=rf"The store's {array} cannot be read \(.* is missing"):
        store.verify_store(path)
    with pytest.raises(StoreError, match="is missing"):
        tree = store.open_store(path)
        _ = [value.values for node in tree.subtree for value in node.dataset.variables.values()]


def test_a_missing_status_is_a_fault_and_loses_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    make(path, units=3)
    (path / "status/c/1").unlink()
    assert [(fault.unit, fault.site) for fault in store.verify_store(path)] == [(1, "status")]
    with pytest.raises(StoreError, match="Unit 1 of the store is done, and its samples are pending"):
        store.open_store(path)


def test_a_missing_shard_is_an_error_for_a_reader_too(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    make(path, units=2)
    tree = store.open_store(path, complete=False)
    assert np.isnan(store.features(tree, "D-L0-Out").values[4]).all(), "nothing was written there yet"
    arrays_of(path, "D-L0-Out/features")[1].unlink()
    assert np.isfinite(store.features(tree, "D-L0-Out").isel(sample=slice(2)).values).all()
    with pytest.raises(StoreError, match="D-L0-Out/features/c/1/0/0/0 of the store is missing"):
        _ = store.features(tree, "D-L0-Out").values


@pytest.mark.parametrize("how", ["swapped", "copied", "with their digests", "of another store"])
def test_shards_in_another_place_are_found(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s.zarr"
    make(path, units=3)
    one, two, _ = arrays_of(path, "U-L1-Out/features")
    raw = one.read_bytes(), two.read_bytes()
    if how == "of another store":
        make(tmp_path / "other.zarr", units=3)
        kept = zarr.open_group(tmp_path / "other.zarr", mode="r+")
        kept.attrs["diffprobe"] = {**kept.attrs["diffprobe"], "request": {"seed": 1}}  # type: ignore[dict-item]
        writer = store.StoreWriter(tmp_path / "other.zarr")
        writer.write_unit(0, {s.site: np.ones((2, 2, 2, *s.shape), np.float16) for s in SPECS}, np.ones(2, np.uint8))
        for part in ("features/c/0", "maps/c/0", "digest/c/0"):
            for file in (tmp_path / "other.zarr").rglob(f"{part}*/**/*"):
                if file.is_file():
                    shutil.copy(file, path / file.relative_to(tmp_path / "other.zarr"))
    else:
        two.write_bytes(raw[0])
        if how != "copied":
            one.write_bytes(raw[1])
        if how == "with their digests":
            digests = arrays_of(path, "digest")[:2]
            kept_digests = [file.read_bytes() for file in digests]
            for file, content in zip(digests, reversed(kept_digests), strict=True):
                file.write_bytes(content)
    found = store.verify_store(path)
    assert found and all("not what was written there" in fault.reason for fault in found)
    assert "U-L1-Out" in {fault.site for fault in found}


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("U-L1-Out/features", {"attributes": {"scale_factor": 2.0}}),
        ("U-L1-Out/timestep", {"attributes": {"units": "days since 1970-01-01"}}),
        ("count", {"attributes": {"_FillValue": 3}}),
        ("U-L1-Out/features", {"data_type": "int16", "fill_value": 0}),
        ("prompts/token_id", {"data_type": "float32", "fill_value": 0.0}),
        ("status", {"data_type": "bool", "fill_value": False}),
    ],
)
def test_an_edit_that_would_change_the_values_is_a_fault(tmp_path: Path, array: str, change: dict[str, Any]) -> None:
    path = tmp_path / "s.zarr"
    make(path, units=3)
    metadata = json.loads((path / array / "zarr.json").read_text())
    (path / array / "zarr.json").write_text(json.dumps(metadata | change))
    for call in (store.verify_store, store.open_store):
        with pytest.raises(StoreError, match=array):
            call(path)


def test_a_marked_sample_may_hold_anything_and_a_complete_one_may_not(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    make(path, units=3)
    writer = store.StoreWriter(path)
    values = {s.site: np.full((2, 2, 2, *s.shape), np.nan, np.float16) for s in SPECS}
    writer.write_unit(0, values, np.array([store.NOT_FINITE, store.UNREADABLE], np.uint8))
    assert store.verify_store(path) == []
    assert len(arrays_of(path, "U-L1-Out/features")) == 3, "a unit of nothing but NaN is written too"
    arrays_of(path, "U-L1-Out/features")[0].unlink()
    assert [(fault.unit, fault.site) for fault in store.verify_store(path)] == [(0, "U-L1-Out")]
    writer.write_unit(0, values, np.array([store.NOT_FINITE, store.COMPLETE], np.uint8))
    assert {fault.reason for fault in store.verify_store(path)} == {
        "1 complete samples hold values that are missing or not finite"
    }


def test_a_reader_sees_the_old_unit_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.zarr"
    arrays = make(path, units=3)
    tree = store.open_store(path)
    replace = store._replace_shard
    seen: list[np.ndarray] = []

    def watched(*rest: Any) -> None:
        seen.append(store.features(tree, "U-L1-Out").values)
        replace(*rest)
        seen.append(store.features(tree, "U-L1-Out").values)

    monkeypatch.setattr(store, "_replace_shard", watched)
    store.StoreWriter(path).write_unit(0, {"U-L1-Out": np.ones((2, 2, 2, 3, 2, 4), np.float16)}, np.ones(2, np.uint8))
    np.testing.assert_array_equal(seen[0], arrays["U-L1-Out"])
    assert (seen[1][:2] == 1).all() and np.isfinite(seen[1]).all()


# --- hostile stores ---------------------------------------------------------------------------------


def test_a_store_of_an_older_zarr_is_refused_before_its_filters_run(tmp_path: Path) -> None:
    make(tmp_path / "s.zarr", units=3)
    for place, kind in ((tmp_path / "s.zarr" / "evil", "array"), (tmp_path / "old.zarr", "group")):
        place.mkdir()
        if kind == "group":
            (place / ".zgroup").write_text('{"zarr_format": 2}')
            (place / ".zattrs").write_text(json.dumps({"diffprobe": {"format_version": 1}}))
            place = place / "sample"
            place.mkdir()
        (place / ".zarray").write_text(json.dumps({
            "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C", "compressor": None,
            "filters": [{"id": "pickle", "protocol": 4}],
        }))  # fmt: skip
        (place / "0").write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR.")
    with pytest.raises(StoreError, match="no Zarr group is there"):
        store.open_store(tmp_path / "old.zarr")
    shutil.rmtree(tmp_path / "s.zarr" / "evil")
    metadata = json.loads((tmp_path / "s.zarr/colour/zarr.json").read_text())
    metadata["codecs"] = [{"name": "vlen-utf8"}, {"name": "gzip", "configuration": {"level": 1}}]
    (tmp_path / "s.zarr/colour/zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="the array colour uses 'gzip'"):
        store.open_store(tmp_path / "s.zarr")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stated", [True, False])
def test_a_frame_that_swells_is_refused_before_it_does(tmp_path: Path, stated: bool) -> None:
    make(tmp_path / "s.zarr", units=3)
    (chunk,) = arrays_of(tmp_path / "s.zarr", "colour")
    size = 4 * 10**9
    head = bytes([0xE0]) + struct.pack("<Q", size) if stated else bytes([0x00, 0x58])
    chunk.write_bytes(b"\x28\xb5\x2f\xfd" + head + bytes(1000))
    for call in (store.open_store, store.verify_store):
        for place in (tmp_path / "s.zarr", f"file://{tmp_path}/s.zarr"):
            with pytest.raises(StoreError, match=r"the array colour asks for [0-9.e+]+ GB"):
                call(place)


def test_a_frame_within_a_shard_that_swells_is_refused(tmp_path: Path) -> None:
    arrays = make(tmp_path / "s.zarr", units=3, compress=True)
    found = store.features(store.open_store(tmp_path / "s.zarr"), "U-L1-Out")
    np.testing.assert_array_equal(found.values, arrays["U-L1-Out"])
    shard = arrays_of(tmp_path / "s.zarr", "U-L1-Out/features")[1]
    raw = bytearray(shard.read_bytes())
    second = max(np.frombuffer(raw[-36:-4], "<u8")[::2])  # the index at the end: offset and length of both chunks, a checksum
    raw[second : second + 13] = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 4 * 10**9)
    shard.write_bytes(bytes(raw))
    with pytest.raises(StoreError, match=r"the array U-L1-Out/features asks for 4 GB"):
        store.open_store(tmp_path / "s.zarr")


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 65535, 65792, 10**6])
def test_the_size_that_a_frame_states_is_read(count: int) -> None:
    frame = bytes(numcodecs.Zstd(1).encode(bytes(count)))
    assert layout.frame_size(frame[:18]) == count


# --- plain xarray -----------------------------------------------------------------------------------


def plain_things(path: Path) -> dict[str, Callable[[], Any]]:
    tree = store.open_store(path)
    return {
        "tree": lambda: tree,
        "part": lambda: tree.isel(sample=slice(1, 4)),
        "site": lambda: tree["U-L1-Out"].to_dataset(),
        "features": lambda: store.features(tree, "U-L1-Out", timestep=500).to_dataset(name="f"),
        "guided": lambda: store.features(tree, "U-L1-Out", guidance=4.0).to_dataset(name="f"),
        "patches": lambda: store.features(tree, "U-L1-Out", pool="patches").to_dataset(name="f"),
        "maps": lambda: store.attention_maps(tree, "star").to_dataset(name="m"),
    }


@pytest.mark.parametrize("what", ["tree", "part", "site", "features", "guided", "patches", "maps"])
@pytest.mark.parametrize("form", ["zarr", "netcdf"])
def test_what_is_read_can_be_saved_and_read_again(tmp_path: Path, what: str, form: str) -> None:
    make(tmp_path / "s.zarr", units=3)
    writer = store.StoreWriter(tmp_path / "s.zarr")
    writer.write_unit(
        1,
        {s.site: np.full((2, 2, 2, *s.shape), np.nan, np.float16) for s in SPECS},
        np.array([store.NOT_FINITE, store.COMPLETE], np.uint8),
    )
    found = plain_things(tmp_path / "s.zarr")[what]()
    target = tmp_path / f"copy.{form}"
    if form == "netcdf":
        found.to_netcdf(target, engine="h5netcdf")
    else:
        found.to_zarr(target)
    options: dict[str, Any] = {"engine": "h5netcdf" if form == "netcdf" else "zarr"}
    again = (xr.open_datatree if isinstance(found, xr.DataTree) else xr.open_dataset)(target, **options).load()  # type: ignore[operator]
    pairs = [(found, again)]
    if isinstance(found, xr.DataTree):
        pairs = [
            (node.to_dataset(inherit=False), again[name].to_dataset(inherit=False)) for name, node in found.subtree_with_keys
        ]
        assert set(again.groups) == set(found.groups)
    for left, right in pairs:
        assert set(left.variables) == set(right.variables) and left.attrs == right.attrs
        for name, variable in left.variables.items():
            assert variable.dtype.kind in "fiuU" and "chunks" not in variable.encoding
            np.testing.assert_array_equal(right[name].values.astype(variable.dtype), variable.values)
    if what == "tree":
        assert store.provenance(again) == store.provenance(found)
        np.testing.assert_array_equal(store.features(again, "U-L1-Out").values, store.features(found, "U-L1-Out").values)


def test_what_is_read_is_plain_numpy(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    make(tmp_path / "s.zarr", units=3)
    found = store.features(store.open_store(tmp_path / "s.zarr"), "D-L0-Out", timestep=10, conditioning="null")
    np.savez(tmp_path / "a.npz", features=found.values, **{str(n): c.values for n, c in found.coords.items()})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as again:
        assert again["colour"].tolist() == ["red", "blue", "red", "", "red"] and again["sample"].tolist()[0] == "s0"
    assert LogisticRegression().fit(found.values, found["colour"]).classes_.tolist() == ["", "blue", "red"]


def test_ids_that_end_in_a_null_are_kept() -> None:
    kept = store._fixed_width(np.array(["a\0", "b"], np.dtypes.StringDType()))
    assert kept.tolist() == ["a\0", "b"]


# --- reading no more than is asked ------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were read, in order; one twice where it was read twice."""
    seen: list[str] = []
    get = layout.Present.get

    async def noted(self: Any, key: str, *rest: Any, **options: Any) -> Any:
        if "/c/" in key and "maps" in key:
            seen.append(key)
        return await get(self, key, *rest, **options)

    monkeypatch.setattr(layout.Present, "get", noted)
    return seen


def test_maps_of_a_word_are_read_in_blocks(tmp_path: Path, reads: list[str]) -> None:
    arrays = make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    site = "U-L1-R0-B0-Cross-Map"
    wanted: list[tuple[int, list[int]]] = [(4, [2, 3]), (0, [1]), (2, []), (4, [5, 0, 1])]
    found = store.read_maps(tree, site, wanted, "caption", [500, 10], heads="each", merge="sum")
    assert found.dims == ("row", "timestep", "head", "y", "x") and found["head"].values.tolist() == ["mean", "0", "1"]
    exact = arrays[site].astype(np.float64)[:, 1, ::-1]
    for row, (sample, places) in enumerate(wanted):
        each = exact[sample][:, :, places].sum(2)
        np.testing.assert_allclose(found.values[row, :, 1:], each, rtol=1e-5)
        np.testing.assert_allclose(found.values[row, :, 0], each.mean(1), rtol=1e-5)
    reads.clear()
    assert store.attention_maps(tree, "star", site=site, timestep=10).sizes["sample"] == 2
    assert len(reads) <= 2 * 3, f"samples 0 and 4 lie in two shards; {len(reads)} reads of index and chunks"


def test_a_figure_of_one_sample_reads_one_sample(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffprobe import figures

    make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    monkeypatch.setattr(figures, "open_with_images", lambda *_: (tree, np.zeros((1, 8, 8, 3), np.uint8), [4], ["s4"]))
    monkeypatch.setattr(figures, "_origin", lambda *_: {})  # the store names no model
    monkeypatch.setattr(figures, "_save", lambda figure, out, name, *_, **__: out / name)
    assert figures.heatmap_figures("", "", ["star"], (), 10, "caption", lambda _: [4], tmp_path, "h") == [tmp_path / "h"]
    assert {key.split("/c/")[1].split("/")[0] for key in reads} == {"2"}


def test_a_shard_of_maps_is_read_once_and_never_by_points(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s.zarr", units=3)
    tree = store.open_store(tmp_path / "s.zarr")
    monkeypatch.setattr(zarr.Array, "vindex", property(lambda _: pytest.fail("read point by point")))
    asked: tuple[tuple[dict[str, Any], str], ...] = (({"word": "star"}, "02"), ({"token": 0}, "012"))
    for what, shards in asked:
        reads.clear()
        store.attention_maps(tree, site="U-L1-R0-B0-Cross-Map", timestep=[10, 500], **what)
        read = [key.split("/c/")[1].split("/")[0] for key in reads]
        assert {shard: read.count(shard) for shard in read} == dict.fromkeys(shards, 1), "whole, and once"
