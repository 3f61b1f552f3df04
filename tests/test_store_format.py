"""The store's format: what version 1 wrote opens for ever, and any history of writes reads as a plain NumPy model of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffprobe import store
from diffprobe.layout import site_array
from diffprobe.store import ArraySpec, StoreError, attention_maps, features, open_store, store_info, verify_store

GOLDEN = Path(__file__).parent / "golden"
SHORT = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate)
)  # fmt: skip


def test_the_golden_store_of_version_1() -> None:
    with np.load(GOLDEN / "v1.npz", allow_pickle=False) as kept:
        arrays = dict(kept)
    words = json.loads((GOLDEN / "v1.json").read_text(encoding="utf-8"))
    tree = open_store(GOLDEN / "v1.zarr")
    rows = [0, 1, 3, 4, 5]  # the third was not finite, the last never written
    assert tree["sample"].values.tolist() == [f"photos/{row}é.png" for row in rows]
    wide = features(tree, "U-L1-Out")
    assert wide.dims == ("sample", "conditioning", "timestep", "channel", "y", "x")
    assert wide.dtype == np.float16 and wide["conditioning"].values.tolist() == ["null", "caption", "caption@4"]
    np.testing.assert_array_equal(wide.values, arrays["U-L1-Out"][rows])
    np.testing.assert_array_equal(
        features(tree, "up_blocks.1", timestep=500, guidance=4.0).values, arrays["U-L1-Out"][rows, 2, 1]
    )
    np.testing.assert_array_equal(features(tree, "D-L0-Out", conditioning="null").values, arrays["D-L0-Out"][rows, 0])
    assert wide["colour"].values.tolist() == [words["colour"][row] for row in rows]
    np.testing.assert_array_equal(wide["size"].values, np.array([0.5, np.nan, 3, 4, 5]))
    maps = attention_maps(tree, token=2, timestep=[10, 500])
    np.testing.assert_allclose(maps.values, arrays["U-L1-Cross-Map"][rows, 1, :, :, 2].astype(np.float32).mean(2), rtol=1e-6)
    assert maps["prompt"].values.tolist() == [words["texts"][row] for row in rows]
    assert attention_maps(tree, "star")["sample"].values.tolist() == ["photos/0é.png"]
    everything = open_store(GOLDEN / "v1.zarr", complete=False)
    np.testing.assert_array_equal(everything["prompts"]["token_id"].values, arrays["token_id"])
    assert np.isnan(features(everything, "D-L0-Out").values[6]).all()
    np.testing.assert_array_equal(features(everything, "D-L0-Out").values[2], arrays["D-L0-Out"][2])
    info = store_info(GOLDEN / "v1.zarr")
    assert info["status"] == {"pending": 1, "complete": 5, "not finite": 1}
    assert (info["format_version"], info["request"]["seed"], info["versions"]) == (1, 0, {"diffprobe": "0.1.0"})
    assert verify_store(GOLDEN / "v1.zarr") == []


# --- any history -----------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(["U-L1-Out", "D-L0-Out", "M-Out"]), min_size=1, unique=True))
    side = st.integers(1, 3)
    kinds = {
        name: draw(st.one_of(st.tuples(side), st.tuples(side, side, side), st.tuples(side, side, side, side))) for name in names
    }
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    count = draw(st.integers(1, 9))
    return {
        "kinds": kinds,
        "count": count,
        "unit": draw(st.integers(1, 4)),
        "timesteps": draw(st.lists(st.integers(0, 999), min_size=1, max_size=3, unique=True)),
        "conditionings": ["null", "caption"][: draw(st.integers(1, 2))],
        "dtype": draw(st.sampled_from(["float16", "float32"])),
        "compress": draw(st.booleans()),
        "ids": draw(st.lists(text.filter(bool), min_size=count, max_size=count, unique=True)),
        "labels": draw(st.lists(text, min_size=count, max_size=count)),
        "seed": draw(st.integers(0, 99)),
    }


def lay_out(path: Path, layout: dict[str, Any]) -> dict[str, np.ndarray]:
    """The store, empty, and the arrays that belong into it."""
    rng, count = np.random.default_rng(layout["seed"]), layout["count"]
    dims = {1: ("channel",), 3: ("channel", "y", "x"), 4: ("head", "token", "y", "x")}
    specs = [
        ArraySpec(name, name, "block", "maps" if len(shape) == 4 else "features", dims[len(shape)], shape, tuple(layout["conditionings"]))
        for name, shape in layout["kinds"].items()
    ]  # fmt: skip
    lead = (count, len(layout["conditionings"]), len(layout["timesteps"]))
    empty = np.zeros((*lead[:2], 2), np.int32)
    store.create_store(
        path, attributes={"request": {"sites": list(layout["kinds"])}, "data": "none"}, sample_ids=layout["ids"],
        labels={"colour": np.array(layout["labels"], object)}, timesteps=layout["timesteps"],
        prompts={"text": np.full(lead[:2], "a star", object), "token_id": empty, "token_start": empty, "token_end": empty},
        conditionings=layout["conditionings"], tokens=range(2), specs=specs, unit_samples=layout["unit"], dtype=layout["dtype"],
        compress=layout["compress"],
    )  # fmt: skip
    return {spec.site: rng.normal(size=(*lead, *spec.shape)).astype(layout["dtype"]) for spec in specs}


@SHORT
@given(layout=layouts(), data=st.data())
def test_any_history_of_writes_and_kills_reads_as_the_model(layout: dict[str, Any], data: st.DataObject) -> None:
    """Units in any order, some cut off before they were done, some written twice, some forgotten again; the model is a dict."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.zarr"
        arrays = lay_out(path, layout)
        units = -(-layout["count"] // layout["unit"])
        status = np.zeros(layout["count"], np.uint8)
        acts = st.lists(
            st.tuples(st.sampled_from(["write", "cut off", "forget"]), st.integers(0, units - 1)), max_size=2 * units
        )
        for act, unit in data.draw(acts):
            writer = store.StoreWriter(path)  # each a process of its own
            first, last = writer.bounds(unit)
            part = {name: values[first:last] for name, values in arrays.items()}
            if act == "write":
                said = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=last - first, max_size=last - first))
                writer.write_unit(unit, part, np.array(said, np.uint8))
                status[first:last] = said
            elif act == "cut off" and not status[first]:
                one = data.draw(st.sampled_from(sorted(part)))
                site_array(writer.root, one)[first:last] = part[one]
            elif act == "forget":
                writer.forget_unit(unit)
                status[first:last] = store.PENDING
        good = np.flatnonzero(status == store.COMPLETE)
        assert store.StoreWriter(path).pending == [u for u in range(units) if not status[u * layout["unit"]]]
        assert store.verify_store(path) == []
        tree = open_store(path)
        assert tree["sample"].values.tolist() == [layout["ids"][row] for row in good]
        assert tree["colour"].values.tolist() == [layout["labels"][row] for row in good]
        for name in data.draw(st.permutations(sorted(arrays))):
            stored = tree[name].to_dataset()["maps" if arrays[name].ndim == 7 else "features"]
            row = data.draw(st.integers(0, len(good) - 1)) if len(good) else slice(None)
            step = data.draw(st.integers(0, len(layout["timesteps"]) - 1))
            one = stored.isel(sample=row, timestep=step).values
            np.testing.assert_array_equal(one, arrays[name][good][:, :, step][row])
            np.testing.assert_array_equal(stored.values, arrays[name][good])


# --- edited by hand ------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=4,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in ((*path, key), *places(one, (*path, key)))]


@settings(SHORT, max_examples=25)
@given(data=st.data())
def test_attributes_edited_by_hand_are_refused_in_words_or_do_no_harm(data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(["zarr.json", "status/zarr.json", "done/zarr.json", "sample/zarr.json", "D-L0-Out/zarr.json",
                                      "D-L0-Out/features/zarr.json", "prompts/text/zarr.json"]))  # fmt: skip
    edited = json.loads((GOLDEN / "v1.zarr" / file).read_text(encoding="utf-8"))
    *way, last = data.draw(st.sampled_from(places(edited)))
    holder = edited
    for key in way:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[last] = data.draw(JSON)
    else:
        del holder[last]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.zarr"
        copy_store(GOLDEN / "v1.zarr", path)
        (path / file).write_text(json.dumps(edited), encoding="utf-8")
        for use in (verify_store, store_info, read_all):
            try:
                use(path)
            except StoreError as error:
                assert str(error)


def copy_store(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())


def read_all(path: Path) -> None:
    tree = open_store(path)
    for name in store.site_names(tree):
        if "features" in tree[name].data_vars:
            _ = features(tree, name).values


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("sample", {"shape": [10**11]}),
        ("status", {"shape": [10**11]}),
        ("done", {"shape": [10**12]}),
        ("prompts/token_id", {"shape": [10**6, 10**4, 4]}),
        ("D-L0-Out/features", {"shape": [7, 2, 2, 10**9]}),
        ("count", {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**10]}}}),
    ],
)
def test_a_store_from_elsewhere_cannot_ask_for_gigabytes(tmp_path: Path, array: str, change: dict[str, Any]) -> None:
    path = tmp_path / "s.zarr"
    copy_store(GOLDEN / "v1.zarr", path)
    metadata = json.loads((path / array / "zarr.json").read_text(encoding="utf-8"))
    (path / array / "zarr.json").write_text(json.dumps(metadata | change), encoding="utf-8")
    for use in (open_store, verify_store, store_info, store.StoreWriter):
        with pytest.raises(StoreError, match=rf"the array {array} asks for [0-9.e+]+ GB"):
            use(path)  # type: ignore[operator]


def test_a_large_store_that_is_still_empty_is_no_attack(tmp_path: Path) -> None:
    spec = ArraySpec("U-L1-Out", "u", "block", "features", ("channel", "y", "x"), (1280, 64, 64), ("null",))
    texts = np.full((1000, 1), "", object)
    empty = np.zeros((1000, 1, 1), np.int32)
    store.create_store(
        tmp_path / "s.zarr", attributes={"request": {}, "data": "none"}, sample_ids=[str(i) for i in range(1000)], labels={},
        timesteps=range(50), prompts={"text": texts, "token_id": empty, "token_start": empty, "token_end": empty},
        conditionings=["null"], tokens=[0], specs=[spec], unit_samples=1, dtype="float16",
    )  # fmt: skip
    array = zarr.open_array(tmp_path / "s.zarr/U-L1-Out/features", mode="r")
    assert array.nbytes > 5e11
    assert open_store(tmp_path / "s.zarr").sizes["sample"] == 0
