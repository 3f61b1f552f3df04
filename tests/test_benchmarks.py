"""Readers of published layouts: fixtures have exactly the hub's files and columns, a few rows long."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffprobe.data.benchmarks import SUGARCREPE_SUBSETS, Item, load_benchmark
from diffprobe.data.images import ImageError
from diffprobe.data.twins import TwinsDataset
from diffprobe.probes.alignment import PROTOCOLS

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}


def png(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), COLOURS[colour]).save(data, "PNG")
    return data.getvalue()


def colours(item: Item) -> list[str]:
    """What each image of an item shows; JPEG is not exact."""
    pixels = [np.asarray(load()).reshape(-1, 3).mean(0) for load in item.images]
    return [min(COLOURS, key=lambda name: float(np.abs(COLOURS[name] - p).sum())) for p in pixels]


# --- MMVP-VLM -------------------------------------------------------------------------------------

MMVP_ROWS = [
    ("3", "Color", "a red door"),
    ("4", "Color", "a blue door, closed"),
    ("1", "Camera Perspective", "seen from above"),
    ("2", "Camera Perspective", "seen from below"),
]


def mmvp(folder: Path, rows: Sequence[tuple[str, str, str]] = MMVP_ROWS, header: str = "Question ID,Type,Statement") -> Path:
    lines = [header, *(f'{number},{kind},"{text}"' for number, kind, text in rows)]
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    for number, kind, _ in MMVP_ROWS:
        path = folder / "MLLM_VLM Images" / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), COLOURS["red" if int(number) % 2 else "blue"]).save(path)
    return folder


def test_mmvp_vlm(tmp_path: Path) -> None:
    benchmark = load_benchmark(f"mmvp-vlm:{mmvp(tmp_path)}")
    assert (benchmark.protocol, len(benchmark)) == ("mmvp-vlm", 2)
    first, second = benchmark.items
    assert (first.id, first.pattern, second.id, second.pattern) == ("mmvp-vlm-001", "viewpoint", "mmvp-vlm-002", "colour")
    assert second.captions == ("a photo of a red door", "a photo of a blue door, closed")
    assert colours(first) == colours(second) == ["red", "blue"]
    assert second.labels == {"type": "Color"}


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (MMVP_ROWS, "Question ID,Kind,Statement", "has no Type; it has Question ID, Kind, Statement"),
        (MMVP_ROWS[:3], "Question ID,Type,Statement", "but 2 is missing"),
        (MMVP_ROWS[1:], "Question ID,Type,Statement", "ID 3 is missing"),
        ([*MMVP_ROWS[:3], ("2", "Color", "x")], "Question ID,Type,Statement", "but 2 has the type 'Color'"),
        ([*MMVP_ROWS, ("4", "Color", "x")], "Question ID,Type,Statement", "line 6: each row needs a Question ID of its own"),
        ([*MMVP_ROWS[:3], ("2", "Camera Perspective", "")], "Question ID,Type,Statement", "line 5.*Statement"),
        (
            [("1", "../secret", "x"), ("2", "../secret", "y")],
            "Question ID,Type,Statement",
            "line 2: '../secret' leaves the folder",
        ),
        (
            [("5", "Color", "x"), ("6", "Color", "y")],
            "Question ID,Type,Statement",
            r"2 entries of .*line 2 names .*5\.jpg', which does not exist.*line 3 names .*6\.jpg",
        ),
        ([], "Question ID,Type,Statement", "has no items"),
    ],
)
def test_mmvp_vlm_that_is_broken(tmp_path: Path, rows: Any, header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_benchmark(f"mmvp-vlm:{mmvp(tmp_path, rows, header)}")


def test_mmvp_vlm_without_its_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Questions\.csv' does not exist"):
        load_benchmark(f"mmvp-vlm:{tmp_path}")
    (tmp_path / "Questions.csv").write_text("Question ID,Type,Statement\n1,Color,a red door\n2,Color,red, and a door\n")
    with pytest.raises(ValueError, match=r"Questions\.csv', line 3 does not have 3 columns; put quotes"):
        load_benchmark(f"mmvp-vlm:{tmp_path}")
    (tmp_path / "Questions.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Questions.csv' has no Question ID, Type, Statement; it has nothing"):
        load_benchmark(f"mmvp-vlm:{tmp_path}")


def test_an_id_is_looked_up_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds links to files outside the snapshot's folder; they are the hub's own and are followed."""
    repository, real = tmp_path / "datasets--MMVP--MMVP_VLM", tmp_path / "blobs"
    real.mkdir()
    mmvp(real)
    snapshot = repository / "snapshots" / ("0" * 40)
    for path in [p for p in real.rglob("*") if p.is_file()]:
        link = snapshot / path.relative_to(real)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    benchmark = load_benchmark("mmvp-vlm:MMVP/MMVP_VLM")
    assert len(benchmark) == 2 and colours(benchmark.items[0]) == ["red", "blue"]
    with pytest.raises(ValueError, match=r"No benchmark at 'MMVP/OTHER': neither a folder, nor a dataset"):
        load_benchmark("mmvp-vlm:MMVP/OTHER")


# --- Winoground -----------------------------------------------------------------------------------

WINOGROUND_ROW = {
    "id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "red on blue", "caption_1": "blue on red",
    "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object",
}  # fmt: skip
PICTURES = {"ex_0_img_0": "red", "ex_0_img_1": "blue", "ex_1_img_0": "blue", "ex_1_img_1": "red"}
WINOGROUND = [
    WINOGROUND_ROW,
    WINOGROUND_ROW | {"id": 1, "image_0": "ex_1_img_0", "image_1": "ex_1_img_1", "collapsed_tag": "Relation"},
]


def winoground_lines(folder: Path, rows: Sequence[dict[str, Any]] = WINOGROUND, zipped: bool = False) -> Path:
    data = folder / "data"
    data.mkdir()
    (data / "examples.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    if zipped:
        with zipfile.ZipFile(data / "images.zip", "w") as archive:
            for name, colour in PICTURES.items():
                archive.writestr(f"images/{name}.png", png(colour))
                archive.writestr(f"__MACOSX/images/._{name}.png", b"resource fork")
    else:
        (data / "images").mkdir()
        for name, colour in PICTURES.items():
            (data / "images" / f"{name}.png").write_bytes(png(colour))
    return folder


def winoground_table(folder: Path, images: dict[str, Any], rows: Sequence[dict[str, Any]] = WINOGROUND) -> Path:
    """As the hub embeds images: a struct of bytes and path; one row group a row."""
    table = [row | {name: images[row[name]] for name in ("image_0", "image_1") if name in row} for row in rows]
    (folder / "data").mkdir()
    path = folder / "data" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=1)
    return folder


EMBEDDED = {name: {"bytes": png(colour), "path": f"{name}.png"} for name, colour in PICTURES.items()}


@pytest.mark.parametrize("layout", ["folder", "zip", "parquet"])
def test_winoground(tmp_path: Path, layout: str) -> None:
    if layout == "parquet":
        winoground_table(tmp_path, EMBEDDED)
    else:
        winoground_lines(tmp_path, zipped=layout == "zip")
    benchmark = load_benchmark(f"winoground:{tmp_path}")
    assert (benchmark.protocol, [item.id for item in benchmark.items]) == ("winoground", ["winoground-0", "winoground-1"])
    first, second = benchmark.items
    assert (first.pattern, second.pattern) == ("Object", "Relation")
    assert first.captions == ("red on blue", "blue on red")
    assert first.labels == {"tag": "Noun", "secondary_tag": "", "num_main_preds": 1}
    assert (colours(first), colours(second)) == (["red", "blue"], ["blue", "red"])


def test_winoground_parquet_with_images_beside(tmp_path: Path) -> None:
    for name, colour in PICTURES.items():
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    winoground_table(tmp_path, {name: {"bytes": None, "path": f"{name}.png"} for name in PICTURES})
    assert colours(load_benchmark(f"winoground:{tmp_path}").items[1]) == ["blue", "red"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": None, "path": "../secret.png"}, "row 0 of group 0, image_0: '../secret.png' leaves the folder"),
        ({"bytes": b"no image", "path": "x.png"}, "row 0 of group 0, image_0' is not an image"),
        ({"bytes": png("red")[:40], "path": "x.png"}, "image_0' is (broken or cut off|not an image)"),
        ({"bytes": b"", "path": None}, "found dict without either"),
    ],
)
def test_winoground_parquet_with_a_bad_image(tmp_path: Path, cell: dict[str, Any], message: str) -> None:
    benchmark = load_benchmark(f"winoground:{winoground_table(tmp_path, EMBEDDED | {'ex_0_img_0': cell})}")
    with pytest.raises(ValueError, match=message):
        benchmark.items[0].images[0]()
    assert colours(benchmark.items[1]) == ["blue", "red"]


def test_winoground_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    with pytest.raises(ValueError, match=r"neither Parquet files nor an examples\.jsonl"):
        load_benchmark(f"winoground:{folder('empty')}")
    short = {name: value for name, value in WINOGROUND_ROW.items() if name != "collapsed_tag"}
    with pytest.raises(ValueError, match=r"examples\.jsonl', line 1 has no collapsed_tag; it has id, image_0"):
        load_benchmark(f"winoground:{winoground_lines(folder('a'), [short])}")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet' has no collapsed_tag"):
        load_benchmark(f"winoground:{winoground_table(folder('b'), EMBEDDED, [short])}")
    with pytest.raises(ValueError, match="line 1: there is no image 'ex_9_img_0'"):
        load_benchmark(f"winoground:{winoground_lines(folder('c'), [WINOGROUND_ROW | {'image_0': 'ex_9_img_0'}])}")
    with pytest.raises(ValueError, match=r"line 1: '/etc/passwd' leaves the folder"):
        load_benchmark(f"winoground:{winoground_lines(folder('d'), [WINOGROUND_ROW | {'image_0': '/etc/passwd'}])}")
    with pytest.raises(ValueError, match="id 'winoground-0' stands twice"):
        load_benchmark(f"winoground:{winoground_lines(folder('e'), [WINOGROUND_ROW] * 2)}")
    (folder("f") / "examples.jsonl").write_text("{'id': 0}")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        load_benchmark(f"winoground:{tmp_path / 'f'}")
    (tmp_path / "f" / "examples.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1 is nested too deep"):
        load_benchmark(f"winoground:{tmp_path / 'f'}")
    (tmp_path / "f" / "examples.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_benchmark(f"winoground:{tmp_path / 'f'}")
    (folder("g") / "x.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match=r"x\.parquet' could not be read as Parquet"):
        load_benchmark(f"winoground:{tmp_path / 'g'}")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"reading it takes: pip install 'diffprobe\[hub\]'"):
        load_benchmark(f"winoground:{tmp_path / 'g'}")


# --- SugarCrepe -----------------------------------------------------------------------------------


def sugarcrepe(folder: Path, filename: str = "000000000001.jpg", pictures: str = "val2017") -> Path:
    for number, name in enumerate(SUGARCREPE_SUBSETS):
        entry = {"filename": filename, "caption": f"true {number}", "negative_caption": f"false {number}"}
        (folder / f"{name}.json").write_text(json.dumps({"0": entry, "7": entry}))
    (folder / pictures).mkdir()
    Image.new("RGB", (8, 6), COLOURS["blue"]).save(folder / pictures / "000000000001.jpg")
    return folder


def test_sugarcrepe(tmp_path: Path) -> None:
    benchmark = load_benchmark(f"sugarcrepe:{sugarcrepe(tmp_path)}")
    assert (benchmark.protocol, len(benchmark)) == ("sugarcrepe", 14)
    item = benchmark.items[3]
    assert (item.id, item.pattern, item.captions) == ("add_obj-7", "add_obj", ("true 1", "false 1"))
    assert colours(item) == ["blue"]
    assert list(dict.fromkeys(i.pattern for i in benchmark.items)) == list(SUGARCREPE_SUBSETS)


def test_sugarcrepe_with_images_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "clone" / "data").mkdir(parents=True)
    sugarcrepe(tmp_path / "clone" / "data", pictures="pictures")
    (tmp_path / "clone" / "data" / "pictures").rename(tmp_path / "coco")
    spec = f"sugarcrepe:{tmp_path / 'clone'}"
    assert colours(load_benchmark(f"{spec}?images={tmp_path / 'coco'}").items[0]) == ["blue"]
    (tmp_path / "coco").rename(tmp_path / "R&D?")
    for place in (f"{tmp_path}/R&D?", f"{tmp_path}/R%26D%3F"):
        assert colours(load_benchmark(f"{spec}?images={place}").items[0]) == ["blue"]
    with pytest.raises(ValueError, match=r"needs the images of COCO val2017, and there is no val2017"):
        load_benchmark(spec)
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        load_benchmark(f"{spec}?images=/nowhere")


def test_sugarcrepe_that_is_broken(tmp_path: Path) -> None:
    sugarcrepe(tmp_path)
    (tmp_path / "swap_obj.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match=r"has no swap_obj\.json; SugarCrepe has seven"):
        load_benchmark(f"sugarcrepe:{tmp_path}")
    entry = {"filename": "000000000001.jpg", "caption": "x", "negative_caption": "y"}
    for entries, message in (
        ({"0": entry | {"filename": "../../x.jpg"}}, r"swap_obj\.json', entry '0': '\.\./\.\./x\.jpg' leaves the folder"),
        ({"0": entry | {"filename": "2.jpg"}}, r"swap_obj\.json', entry '0' names .*2\.jpg', which does not exist"),
        ({"0": {"filename": "x", "caption": "y"}}, "entry '0' has no negative_caption; it has filename, caption"),
        ([entry], "holds a list"),
    ):
        (tmp_path / "swap_obj.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=message):
            load_benchmark(f"sugarcrepe:{tmp_path}")


def test_all_absent_images_are_named_before_the_first_is_read(tmp_path: Path) -> None:
    sugarcrepe(tmp_path)
    entry = {"filename": "000000000001.jpg", "caption": "x", "negative_caption": "y"}
    names = [f"absent {k}.jpg" for k in range(25)]
    entries = {str(k): entry | {"filename": name} for k, name in enumerate([*names[:12], "000000000001.jpg", *names[12:]])}
    (tmp_path / "swap_att.json").write_text(json.dumps(entries))
    (tmp_path / "swap_obj.json").write_text(json.dumps({"0": entry | {"filename": "last.jpg"}}))
    with pytest.raises(ValueError, match=r"26 entries of .* cannot be used") as caught:
        load_benchmark(f"sugarcrepe:{tmp_path}")
    assert all(f"{name}'" in str(caught.value) for name in names[:20]) and "; and 6 more" in str(caught.value)


# --- drawn twins and specs ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mmvp", "winoground"])
def test_drawn_twins(kind: str) -> None:
    benchmark, twins = load_benchmark(f"shapes-{kind}:9?seed=3"), TwinsDataset(kind, 9, 3)
    assert benchmark.protocol in PROTOCOLS and len(benchmark) == 9
    for number, item in enumerate(benchmark.items):
        pair = twins.pair(number)
        assert item.captions == tuple(caption.text for caption in pair.captions)
        assert item.pattern == pair.pattern
        for side, load in enumerate(item.images):
            np.testing.assert_array_equal(np.asarray(load()), np.asarray(twins[2 * number + side].load()))
    assert len({item.id for item in benchmark.items}) == 9


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    mmvp(tmp_path)
    before = load_benchmark(f"mmvp-vlm:{tmp_path}").fingerprint()
    assert before == load_benchmark(f"mmvp-vlm:{tmp_path}").fingerprint()
    Image.new("RGB", (8, 6), COLOURS["blue"]).save(tmp_path / "MLLM_VLM Images" / "Camera Perspective" / "1.jpg")
    repainted = load_benchmark(f"mmvp-vlm:{tmp_path}").fingerprint()
    mmvp(tmp_path, [*MMVP_ROWS[:3], ("2", "Camera Perspective", "other words")])
    reworded = load_benchmark(f"mmvp-vlm:{tmp_path}").fingerprint()
    Image.new("RGB", (8, 6), "white").save(tmp_path / "MLLM_VLM Images" / "Color" / "4.jpg")  # of the last item
    assert len({before, repainted, reworded, load_benchmark(f"mmvp-vlm:{tmp_path}").fingerprint()}) == 4


def test_fingerprint_of_drawn_items_is_of_more_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark("shapes-mmvp:9")
    last = dataclasses.replace(benchmark.items[-1], images=benchmark.items[0].images)
    assert dataclasses.replace(benchmark, items=(*benchmark.items[:-1], last)).fingerprint() != benchmark.fingerprint()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("winogrond:x", r"names no benchmark; valid are shapes-mmvp:N.* Did you mean 'winoground'\?"),
        ("winoground", "names no benchmark"),
        ("shapes-mmvp:0", "must be a whole number of at least 1"),
        ("winoground:x?images=y", "'images=y' is no option of winoground"),
        ("sugarcrepe:x?pictures=y", "'pictures=y' is no option of sugarcrepe; sugarcrepe takes images=FOLDER"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_benchmark(spec)


def test_zip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark(f"winoground:{winoground_lines(tmp_path, zipped=True)}")
    monkeypatch.setattr("diffprobe.data.benchmarks._MAX_BYTES", 20)
    with pytest.raises(ImageError, match="unpacks to more than 20 bytes"):
        benchmark.items[0].images[0]()
