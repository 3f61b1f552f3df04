"""Labels of one's own: from folders, from the hub's metadata files, and joined to a store that is there."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

from diffprobe.data import FolderDataset, Sample, iterate, load_dataset
from diffprobe.data.labels import PARTS, read_labels
from diffprobe.extraction import extract
from diffprobe.probes.knn import knn_probe
from diffprobe.probes.labels import only_label, with_labels
from diffprobe.probes.linear import fit_probe
from diffprobe.probes.streaming import stream_probe
from diffprobe.store import features, open_store, provenance

# the hub's library leaves files open
LEFT_OPEN = (
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)
QUICK: dict[str, Any] = {"sites": "U-L2-R2-Res-Out", "timesteps": [50], "reduce": "mean", "progress": False}


def paint(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (9 * number, 90, 200)).save(root / name)
    return root


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows in the format that the file's name ends in."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows))


def hub(root: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What the hub's own library reads from a folder of images: by file, its columns, class and split."""
    datasets = pytest.importorskip("datasets")
    found = {}
    loaded = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "hub"))
    gc.collect()
    for split, part in loaded.items():
        names = getattr(part.features.get("label"), "names", None)
        for row in part.cast_column("image", datasets.Image(decode=False)):
            about = {key: value for key, value in row.items() if key not in ("image", "label")} | {"split": str(split)}
            if names:
                about["class"] = names[row["label"]]
            found[Path(row["image"]["path"]).relative_to(root).as_posix()] = about
    return found


@pytest.mark.parametrize("names", [["cat/1.png", "dog/1.png"], ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png"]])
def test_folders_are_classes_and_parts_as_the_hub_reads_them(tmp_path: Path, names: list[str]) -> None:
    root = paint(tmp_path / "photos", names)
    expected = hub(root, tmp_path)
    ours = {sample.id: dict(sample.labels) for sample in iterate(FolderDataset(root))}
    assert {name: labels["class"] for name, labels in ours.items()} == {n: row["class"] for n, row in expected.items()}
    if "val" in names[-1]:
        assert {name: labels["split"] for name, labels in ours.items()} == {n: row["split"] for n, row in expected.items()}
    else:
        assert all("split" not in labels for labels in ours.values())


@LEFT_OPEN[0]
@LEFT_OPEN[1]
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_files_are_read_as_the_hub_reads_them(tmp_path: Path, suffix: str) -> None:
    root = paint(tmp_path / "photos", ["train/1.png", "train/2.png", "test/1.png"])
    rows = [
        {"file_name": "1.png", "text": "a star", "age": 3, "mood": "glad"},
        {"file_name": "2.png", "text": "a moon", "age": 4, "mood": "sad"},
    ]
    write(root / "train" / f"metadata.{suffix}", rows)
    write(root / "test" / f"metadata.{suffix}", [{"file_name": "1.png", "text": "a sun", "age": 5, "mood": "glad"}])
    expected = hub(root, tmp_path)
    ours = {s.id: dict(s.labels) | {"text": s.captions[0].text} for s in iterate(FolderDataset(root))}
    assert ours == expected and len(ours) == 3


def test_a_file_of_labels_goes_before_folders(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", ["cat/1.png", "dog/1.png"])
    write(root / "metadata.csv", [{"file_name": "cat/1.png", "class": "lion"}])
    assert [dict(sample.labels) for sample in iterate(FolderDataset(root))] == [{"class": "lion"}, {"class": "dog"}]


def test_files_that_cannot_be_chosen_are_refused(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", ["a/1.png"])
    write(root / "a" / "metadata.csv", [{"file_name": "1.png", "x": 1}])
    write(root / "captions.csv", [{"file": "a/1.png", "caption": "x"}])
    with pytest.raises(ValueError, match=r"holds both captions.csv and a/metadata.csv; remove one"):
        FolderDataset(root)
    (root / "captions.csv").unlink()
    write(root / "a" / "metadata.csv", [{"file_name": "../1.png", "x": 1}])
    with pytest.raises(ValueError, match=r"'\.\./1\.png' leaves the folder"):
        FolderDataset(root)
    write(root / "a" / "metadata.csv", [{"name": "1.png"}])
    with pytest.raises(ValueError, match=r"has the columns name; .* a column 'file' \(or file_name\)"):
        FolderDataset(root)
    (root / "a" / "metadata.csv").rename(root / "a" / "metadata.parquet")
    with pytest.raises(ValueError, match=r"could not be read as Parquet"):
        FolderDataset(root)


def test_labels_are_outside_the_fingerprint(tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", ["1.png", "2.png"])
    write(root / "captions.csv", [{"file": "1.png", "caption": "a star", "mood": "glad"}])
    before = FolderDataset(root).fingerprint()
    write(root / "captions.csv", [{"file": "1.png", "caption": "a star", "mood": "sad", "age": 3}])
    assert FolderDataset(root).fingerprint() == before
    write(root / "captions.csv", [{"file": "1.png", "caption": "a moon", "mood": "glad"}])
    assert FolderDataset(root).fingerprint() != before
    (root / "captions.csv").unlink()
    dataset = FolderDataset(root)  # as it always was where there were no labels: stores of such folders are still gone on with
    rows = [[name, digest, [], []] for name, digest in zip(dataset.files, dataset.image_digests, strict=True)]
    assert dataset.fingerprint() == hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def test_a_store_is_gone_on_with_under_other_labels(
    tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = paint(tmp_path / "photos", [f"{number}.png" for number in range(4)])
    rows = [{"file": f"{number}.png", "caption": "a star", "mood": "glad"} for number in range(4)]
    write(root / "captions.csv", rows)
    extract(tiny_model, str(root), tmp_path / "s.zarr", **QUICK)
    write(root / "captions.csv", [row | {"mood": "sad", "age": number} for number, row in enumerate(rows)])
    assert extract(tiny_model, str(root), tmp_path / "s.zarr", **{**QUICK, "progress": True}).complete == 4
    assert "mood, age differ now. Probes read yours with --labels FILE." in " ".join(capsys.readouterr().err.split())
    assert "content_digest" not in open_store(tmp_path / "s.zarr").coords


def test_a_refusal_says_which_sample_differs_and_in_what(tiny_model: Any, tmp_path: Path) -> None:
    root = paint(tmp_path / "photos", [f"{number}.png" for number in range(5)])
    rows = [{"file": f"{number}.png", "caption": "a star"} for number in range(5)]
    write(root / "captions.csv", rows)
    extract(tiny_model, str(root), tmp_path / "s.zarr", **QUICK)
    Image.new("RGB", (64, 64), "red").save(root / "1.png")
    (root / "2.png").unlink()
    Image.new("RGB", (64, 64), "red").save(root / "new.png")
    rows[3]["caption"] = "a moon"
    write(root / "captions.csv", rows[:2] + rows[3:] + [{"file": "new.png", "caption": "a sun"}])
    with pytest.raises(ValueError, match="holds another request") as refused:
        extract(tiny_model, str(root), tmp_path / "s.zarr", **QUICK)
    said = str(refused.value)
    for part in (
        "'2.png' is gone",
        "'new.png' is new",
        "'1.png' has another image",
        "'3.png' has the caption 'a moon', where the store has 'a star'",
    ):
        assert part in said
    assert "'0.png'" not in said and "'4.png'" not in said


def test_a_folder_without_captions_is_recorded_without_text(
    tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = paint(tmp_path / "photos", ["1.png", "2.png"])
    extract(tiny_model, str(root), tmp_path / "s.zarr", **{**QUICK, "progress": True})
    assert "has no captions, so that the conditioning is null alone" in " ".join(capsys.readouterr().err.split())
    assert provenance(open_store(tmp_path / "s.zarr"))["request"]["conditionings"] == ["null"]
    with pytest.raises(ValueError, match="has no caption '0'"):
        extract(tiny_model, str(root), tmp_path / "t.zarr", conditionings=["caption"], **QUICK)


# --- labels that come later -----------------------------------------------------------------------


def planted(count: int = 60) -> xr.DataArray:
    """Features of which channel 0 is a colour."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(count, 6))
    values[:, 0] += 4 * (np.arange(count) % 2)
    return xr.DataArray(values, dims=("sample", "channel"), coords={"sample": [f"s/{n:02}.png" for n in range(count)]})


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("key", ["id", "file", "file_name", "sample"])
def test_labels_join_by_name_in_any_order(tmp_path: Path, suffix: str, key: str) -> None:
    recorded = planted()
    names = recorded["sample"].values.tolist()
    colour = {name: ("red", "blue")[number % 2] for number, name in enumerate(names)}
    rows = [{key: name, "colour": colour[name], "size": float(len(name))} for name in reversed(names[3:])]
    write(tmp_path / f"labels.{suffix}", [*rows, {key: "unknown.png", "colour": "green", "size": 1.0}])
    joined = with_labels(recorded, tmp_path / f"labels.{suffix}")
    assert joined["colour"].values.tolist() == ["", "", "", *(colour[name] for name in names[3:])]
    assert np.isnan(joined["size"].values[:3]).all() and (joined["size"].values[3:] == 8).all()
    assert fit_probe(joined, "colour").table.n_dropped[0] == 3


def test_labels_join_the_features_of_a_store(tiny_model: Any, tmp_path: Path) -> None:
    extract(tiny_model, "shapes:4", tmp_path / "s.zarr", **QUICK)
    tree = open_store(tmp_path / "s.zarr")
    ids = tree["sample"].values.tolist()
    joined = with_labels(tree, {ids[2]: {"mood": "glad", "colour": "mine"}})
    found = features(joined, "U-L2-R2-Res-Out")
    assert found["mood"].values.tolist() == ["", "", "glad", ""] and found["colour"].values.tolist() == ["", "", "mine", ""]
    assert "mood" not in tree.coords and provenance(joined) == provenance(tree)


def test_files_that_join_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [{"id": "other", "mood": "glad"}])
    with pytest.raises(ValueError, match=r"no labels for these samples: 'other' .* and 'mine' is the first of 1 samples"):
        read_labels(tmp_path / "a.csv", ["mine"])
    write(tmp_path / "a.csv", [{"id": "mine"}])
    with pytest.raises(ValueError, match="no column of labels beside their names"):
        read_labels(tmp_path / "a.csv", ["mine"])
    write(tmp_path / "a.csv", [{"id": "mine", "mood": "glad"}, {"id": "mine", "mood": "sad"}])
    with pytest.raises(ValueError, match="'mine' has mood 'glad' and 'sad'; keep one"):
        read_labels(tmp_path / "a.csv", ["mine"])
    with pytest.raises(ValueError, match=r"ends in '\.txt'"):
        read_labels(tmp_path / "a.txt", ["mine"])


def test_the_default_label_is_the_only_one() -> None:
    names = {"sample": ["a", "b", "c", "d"], "mood": ("sample", ["x", "y", "x", "y"]), "same": ("sample", ["x"] * 4)}
    own = {"title": ("sample", ["p", "q", "r", "s"])}  # a word that is each sample's own is no class
    tree = xr.DataTree(xr.Dataset(coords=names | own))
    assert only_label(tree) == "mood"
    both = xr.DataTree(xr.Dataset(coords=names | {"part": ("sample", ["train", "train", "test", "test"])}))
    assert only_label(both, ["part"]) == "mood"
    with pytest.raises(ValueError, match="There are mood, part; name one with --label"):
        only_label(both)
    with pytest.raises(ValueError, match="join some with --labels FILE"):
        only_label(both, ["mood", "part"])


# --- splits of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("train", "validation", "test"), ("Training", "dev", "eval"), ("train", "val", "testing")])
@pytest.mark.parametrize("probe", [fit_probe, knn_probe, stream_probe])
def test_every_probe_that_fits_honours_a_split(probe: Callable[..., Any], words: tuple[str, str, str]) -> None:
    """Test rows whose labels are turned round are all misread; training rows that are, make the probe wrong instead."""
    recorded, parts = planted(), np.array([words[0]] * 30 + [words[1]] * 10 + [words[2]] * 16 + ["unused"] * 4)
    right = np.array(["red", "blue"] * 30)
    turned = np.where(np.isin(parts, [words[2], "unused"]), np.roll(right, 1), right)
    for label, score in ((right, "high"), (turned, "low")):
        table = probe(recorded.assign_coords(colour=("sample", label), part=("sample", parts)), "colour", split="part").table
        assert (table.n_train[0], table.n_validation[0], table.n_test[0]) == (30, 10, 16)
        assert (table.value[0] > 0.9) if score == "high" else (table.value[0] < 0.1)


@pytest.mark.parametrize(
    ("probe", "one"), [(fit_probe, {"penalties": [1]}), (knn_probe, {"k": [3]}), (stream_probe, {"penalties": [1]})]
)
def test_a_split_without_validation_needs_no_choice(probe: Callable[..., Any], one: dict[str, Any]) -> None:
    recorded = planted().assign_coords(colour=("sample", ["red", "blue"] * 30), part=("sample", ["train"] * 40 + ["test"] * 20))
    with pytest.raises(ValueError, match=r"no 'validation' rows to choose '.*' on; add some, or give one value"):
        probe(recorded, "colour", split="part")
    row = probe(recorded, "colour", split="part", **one).table.iloc[0]
    assert (row.n_train, row.n_validation, row.n_test) == (40, 0, 20) and row.value > 0.9


def test_a_split_of_folders_is_a_label(tmp_path: Path) -> None:
    root = paint(
        tmp_path / "photos", [f"{word}/{kind}/{n}.png" for word in ("Train", "VAL", "test") for kind in "ab" for n in range(2)]
    )
    samples: list[Sample] = list(iterate(load_dataset(str(root))))
    assert {sample.labels["split"] for sample in samples} == set(PARTS.values())
    assert [sample.labels["class"] for sample in samples[:4]] == ["a", "a", "b", "b"]
