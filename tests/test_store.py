"""The layout, checked against a plain NumPy array of what was put in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from diffprobe import store
from diffprobe.store import ArraySpec, StoreError

TIMESTEPS = (10, 500)
BASE = ("null", "caption")
SPECS = [
    ArraySpec("U-L1-Out", "up_blocks.1", "block", "features", ("channel", "y", "x"), (3, 2, 4), BASE),
    ArraySpec("D-L0-Out", "down_blocks.0", "block", "features", ("channel",), (5,), BASE, "mean"),
    ArraySpec("U-L1-R0-B0-Cross-Map", "u1.map", "cross_map", "maps", ("head", "token", "y", "x"), (2, 6, 2, 4), BASE),
    ArraySpec("U-L2-R0-B0-Cross-Map", "u2.map", "cross_map", "maps", ("head", "token", "y", "x"), (2, 6, 4, 8), BASE),
]
TEXTS = ["a red star", "a blue circle", "a red circle", "a starfish", "a red star"]
SPANS = [  # two letters a token from the third on, so that words have sub-tokens
    [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)],
    [(0, 0), (0, 1), (2, 6), (7, 9), (9, 13), (0, 0)],
    [(0, 0), (0, 1), (2, 5), (6, 8), (8, 12), (0, 0)],
    [(0, 0), (0, 1), (2, 6), (6, 10), (0, 0), (0, 0)],
    [(0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (0, 0)],
]


def make(path: str | Path, units: int = 2) -> dict[str, np.ndarray]:
    """A written store of five samples, and the arrays that went in."""
    texts = np.array([["", text] for text in TEXTS], object)
    spans = np.array([[[(0, 0)] * 6, row] for row in SPANS], np.int32)
    store.create_store(
        path,
        attributes={"request": {"timesteps": list(TIMESTEPS)}, "batch_rows": 1, "data": "none"},
        sample_ids=[f"s{i}" for i in range(5)],
        labels={"colour": np.array(["red", "blue", "red", "", "red"], object), "count": np.arange(5)},
        timesteps=TIMESTEPS,
        prompts={"text": texts, "token_id": spans[..., 0], "token_start": spans[..., 0], "token_end": spans[..., 1]},
        conditionings=BASE,
        tokens=range(6),
        specs=SPECS,
        unit_samples=2,
        dtype="float16",
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
        monkeypatch.setattr(store, "__file__", str(place / "diffprobe" / "store.py"))
        for variable in (None, tmp_path / "project" / ".git"):  # which a hook of that project would set
            monkeypatch.delenv("GIT_DIR", raising=False)
            if variable:
                monkeypatch.setenv("GIT_DIR", str(variable))
            assert store.code_commit() == expected, (name, variable)
    monkeypatch.setattr(store, "__file__", str(places["checkout"] / "diffprobe" / "store.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert store.code_commit() is None, "no git on this machine"


def test_maps_are_enlarged_with_pixel_centres_in_place():
    coarse = xr.DataArray(np.array([[[[0.0, 1.0], [0.0, 1.0]]]], np.float32), dims=("sample", "timestep", "y", "x"))
    fine = store._resize(coarse, 4, 4)
    # the fine cells' centres lie at -.25, .25, .75 and 1.25 coarse cells from the first centre
    np.testing.assert_allclose(fine.values[0, 0], np.tile([0.0, 0.25, 0.75, 1.0], (4, 1)), atol=1e-6)
    wide = store._resize(coarse.transpose("sample", "timestep", "x", "y").rename(x="y", y="x"), 6, 2)
    np.testing.assert_allclose(wide.values[0, 0, :, 0], [0, 0, 1 / 3, 2 / 3, 1, 1], atol=1e-6)
