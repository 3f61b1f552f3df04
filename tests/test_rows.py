"""Datasets saved on disk, WebDataset shards, folders behind a URL: every row against what was put in."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from diffprobe.data import ImageError, load_dataset


def picture(number: int) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 9, 3), np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return pixels, held.getvalue()


def test_a_dataset_saved_on_disk(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": picture(n)[1], "path": None} for n in range(4)]
    images[2] = {"bytes": b"no picture", "path": None}
    images[3] = {"bytes": None, "path": "/etc/passwd"}
    columns = {
        "photo": images,
        "caption": ["a", "b", "c", "d"],
        "kind": [0, 1, 0, 1],
        "brightness": [0.5, 1.5, 2.5, 3.5],
        "file_name": [f"x{n}" for n in range(4)],
    }
    kinds = {
        "photo": datasets.Image(),
        "caption": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["sea", "wood"]),
        "brightness": datasets.Value("float64"),
        "file_name": datasets.Value("string"),
    }
    saved = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    saved.cast_column("photo", datasets.Image(decode=False)).cast_column("photo", datasets.Image()).save_to_disk(
        tmp_path / "one"
    )
    found = load_dataset(f"hf:{tmp_path / 'one'}")
    assert [found[n].id for n in range(4)] == ["x0", "x1", "x2", "x3"]
    assert dict(found[1].labels) == {"kind": "wood", "brightness": 1.5} and found[1].captions[0].text == "b"
    np.testing.assert_array_equal(np.asarray(found[1].load()), picture(1)[0])
    for broken in (2, 3):
        with pytest.raises(ImageError):
            found[broken].load()
    again = load_dataset(f"{found.spec}?limit=2")
    assert len(again) == 2 and again.fingerprint() == load_dataset(again.spec).fingerprint() != found.fingerprint()
    datasets.DatasetDict({"a": saved, "b": saved.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load_dataset(f"hf:{tmp_path / 'two'}?split=b")) == 1
    for spec, words in {"two": "the splits a, b; choose one", "none": "is not a dataset that save_to_disk wrote"}.items():
        with pytest.raises(ValueError, match=words):
            load_dataset(f"hf:{tmp_path / spec}")


def test_shards_of_a_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as archive:
            for number in range(3 * shard, 3 * shard + 3):
                for ending, data in {
                    "png": picture(number)[1],
                    "txt": f"text {number}".encode(),
                    "json": json.dumps({"size": number}).encode(),
                }.items():
                    entry = tarfile.TarInfo(f"{number:03}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    found = load_dataset(f"tar:{tmp_path}/s-*.tar")
    assert [found[n].id for n in range(6)] == [f"{n:03}" for n in range(6)]
    assert found[4].captions[0].text == "text 4" and dict(found[4].labels) == {"size": 4}
    np.testing.assert_array_equal(np.asarray(found[4].load()), picture(4)[0])
    with pytest.raises(ValueError, match="is not tar files"):
        load_dataset(f"tar:{tmp_path}/none.tar")


def test_a_folder_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path))
    files = fsspec.filesystem("memory")
    files.store.clear()
    for number in range(3):
        files.pipe_file(f"/bucket/photos/in/{number}.png", picture(number)[1])
    files.pipe_file("/bucket/photos/captions.csv", b"file,caption,kind\nin/1.png,a star,x\n")
    found = load_dataset("memory://bucket/photos")
    assert [found[n].id for n in range(3)] == ["in/0.png", "in/1.png", "in/2.png"] and found.spec == "memory://bucket/photos"
    assert found[1].captions[0].text == "a star" and dict(found[1].labels) == {"kind": "x"}
    np.testing.assert_array_equal(np.asarray(found[2].load()), picture(2)[0])
    monkeypatch.setattr(type(files), "get", None)  # it is there already
    some = load_dataset("memory://bucket/photos?limit=2")
    assert len(some) == 2 and len(load_dataset(some.spec)) == 2
    with pytest.raises(ValueError, match="holds no images"):
        load_dataset("memory://bucket/none")
