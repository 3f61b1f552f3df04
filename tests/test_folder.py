"""Folders of photographs: what is found, which captions belong to it, and what is refused."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffprobe.data import FolderDataset, ImageError, ShapesDataset, TwinsDataset, drawn, files, iterate, load_dataset


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name, colour in {"b.png": "red", "a.JPG": "lime", "sub/c.webp": "blue", ".cache/d.png": "white"}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), colour).save(path)
    (root / "notes.md").write_text("not an image")
    return root


def texts(dataset: FolderDataset) -> dict[str, list[str]]:
    return {sample.id: [c.text for c in sample.captions] for sample in iterate(dataset)}


def test_images_are_found_sorted_and_read_lazily(photos: Path) -> None:
    (photos / "z.png").write_bytes(b"broken")
    dataset = FolderDataset(photos)
    assert [s.id for s in iterate(dataset)] == ["a.JPG", "b.png", "sub/c.webp", "z.png"]
    assert dataset.name == "folder-photos" and len(dataset) == 4
    assert dataset[1].load().getpixel((0, 0)) == (255, 0, 0)
    assert dataset[1].captions == () and dataset[1].masks().shape[0] == 0
    with pytest.raises(ImageError, match=r"z\.png"):
        dataset[3].load()
    with pytest.raises(IndexError, match="Sample 4 of a dataset of 4"):
        dataset[4]


def test_jsonl_captions_and_labels(photos: Path) -> None:
    (photos / "captions.jsonl").write_text(
        '\ufeff{"file": "b.png", "caption": "a red one", "year": 1999, "tags": ["x"], "none": null}\n\n'
        '{"file": "./sub/c.webp", "captions": ["blue", " "]}\n{"file": "b.png", "caption": "again", "score": 0.5}\n',
        encoding="utf-8",
    )
    dataset = FolderDataset(photos)
    assert texts(dataset) == {"a.JPG": [], "b.png": ["a red one", "again"], "sub/c.webp": ["blue"]}
    assert dataset[1].labels == {"year": 1999, "score": 0.5}


def test_csv_captions_and_labels(photos: Path) -> None:
    (photos / "captions.csv").write_text(
        'file,caption,year,grade,place\nb.png,"red, and ""bright""\nindeed",1999,1.5,north\nsub/c.webp,,2001,2,\n'
    )
    dataset = FolderDataset(photos)
    assert texts(dataset) == {"a.JPG": [], "b.png": ['red, and "bright"\nindeed'], "sub/c.webp": []}
    assert dataset[1].labels == {"year": 1999, "grade": 1.5, "place": "north"}
    assert isinstance(dataset[1].labels["year"], int) and isinstance(dataset[2].labels["grade"], float)
    assert dataset[2].labels == {"year": 2001, "grade": 2.0}


@pytest.mark.parametrize("gap", ["", " ", "NaN", "nan", "None", "null", "NA", "inf", "-Infinity", "1e999"])
def test_a_missing_cell_leaves_a_column_of_numbers_one(photos: Path, gap: str) -> None:
    (photos / "captions.csv").write_text(f"file,size,share,mood\na.JPG,3,0.5,glad\nb.png,{gap},{gap},none\nsub/c.webp,5,2,\n")
    labels = [dict(sample.labels) for sample in iterate(FolderDataset(photos))]
    assert labels == [{"size": 3, "share": 0.5, "mood": "glad"}, {"mood": "none"}, {"size": 5, "share": 2.0}]
    assert [type(row.get("size")) for row in labels] == [int, type(None), int]


def test_a_missing_value_in_json_is_no_label(photos: Path) -> None:
    rows = [
        {"file": "a.JPG", "size": 3, "kind": "cat"}, {"file": "b.png", "size": float("nan"), "kind": float("nan"), "caption": None},
        {"file": "b.png", "size": "NaN", "kind": "", "captions": None}, {"file": "sub/c.webp", "size": float("inf"), "captions": ["x", None]},
    ]  # fmt: skip
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = FolderDataset(photos)
    assert [dict(sample.labels) for sample in iterate(dataset)] == [{"size": 3, "kind": "cat"}, {}, {}]
    assert texts(dataset) == {"a.JPG": [], "b.png": [], "sub/c.webp": ["x"]}


def test_words_and_codes_stay_words(photos: Path) -> None:
    (photos / "captions.csv").write_text("file,code,hat\na.JPG,1_2,None\nb.png,12,NaN\nsub/c.webp,3,cap\n")
    rows = [dict(sample.labels) for sample in iterate(FolderDataset(photos))]
    assert rows == [{"code": "1_2", "hat": "None"}, {"code": "12"}, {"code": "3", "hat": "cap"}]


@pytest.mark.parametrize("inner", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_end_a_line(photos: Path, inner: str) -> None:
    text = f"a red{inner}star"
    (photos / "captions.csv").write_bytes(f"file,caption\r\nb.png,{text}\r\na.JPG,x\r\n".encode())
    (photos / "sub" / "c.txt").write_bytes(f"{text}\rsecond\r\n".encode())
    assert texts(FolderDataset(photos)) == {"a.JPG": ["x"], "b.png": [text], "sub/c.webp": []}
    (photos / "captions.csv").unlink()
    assert texts(FolderDataset(photos))["sub/c.webp"] == [text, "second"]


def test_a_cell_may_be_long(photos: Path) -> None:
    (photos / "captions.csv").write_text(f"file,caption\nb.png,{'a ' * 100_000}b\n")
    assert texts(FolderDataset(photos))["b.png"] == ["a " * 100_000 + "b"]


def test_names_match_however_their_accents_are_spelt(photos: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\xe9.png") for form in ("NFC", "NFD"))
    (photos / "b.png").rename(photos / decomposed)
    (photos / "captions.csv").write_text(f"file,caption\n{composed},theirs\n", encoding="utf-8")
    assert texts(FolderDataset(photos))[decomposed] == ["theirs"]
    shutil.copy(photos / decomposed, photos / composed)  # two files then: each line names the one that it spells
    (photos / "captions.csv").write_text(f"file,caption\n{composed},one\n{decomposed},other\n", encoding="utf-8")
    found = texts(FolderDataset(photos))
    assert (found[composed], found[decomposed]) == (["one"], ["other"])
    (photos / "captions.csv").unlink()
    (photos / composed).unlink()
    (photos / composed).with_suffix(".txt").write_text("beside")
    assert texts(FolderDataset(photos))[decomposed] == ["beside"]


def test_every_name_of_a_photograph_is_found(photos: Path) -> None:
    image = Image.new("RGB", (8, 6), "red")
    image.save(photos / "d.jfif", format="JPEG")
    image.save(photos / "e.AVIF", format="AVIF")
    dataset = FolderDataset(photos)
    assert [sample.id for sample in iterate(dataset)] == ["a.JPG", "b.png", "d.jfif", "e.AVIF", "sub/c.webp"]
    assert dataset[3].load().getpixel((0, 0))[0] > 240


def test_text_files_beside_the_images(photos: Path) -> None:
    (photos / "sub" / "c.txt").write_text("one line\n\nanother line\n")
    assert texts(FolderDataset(photos))["sub/c.webp"] == ["one line", "another line"]


def test_a_named_captions_file_may_lie_elsewhere(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("file,caption\nb.png,mine\n")
    (photos / "captions.jsonl").write_text('{"file": "b.png", "caption": "theirs"}')
    assert texts(FolderDataset(photos, tmp_path / "mine.csv"))["b.png"] == ["mine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.jsonl", '{"file": "nope.png", "caption": "x"}', r"names 1 file\(s\).*'nope.png'.*3 images.*'a.JPG'"),
        ("captions.jsonl", '{"file": "../secret.png", "caption": "x"}', r"line 1: '../secret.png' leaves the folder"),
        ("captions.jsonl", '{"file": "sub/../../s.png", "caption": "x"}', "leaves the folder"),
        ("captions.jsonl", '{"file": "/etc/passwd.png", "caption": "x"}', "leaves the folder"),
        ("captions.jsonl", '{"file": "C:\\\\x.png", "caption": "x"}', "leaves the folder"),
        ("captions.jsonl", '{"file": "b.png", "caption": "x"', "line 1 is not JSON"),
        ("captions.jsonl", '{"caption": "x"}', "names no image"),
        ("captions.jsonl", '{"file": "b.png", "caption": 3}', r"a caption is a string.*found \[3\]"),
        ("captions.jsonl", '{"file": "b.png", "y": 1}\n{"file": "b.png", "y": 2}', "'b.png' has y 1 and 2"),
        (
            "captions.csv",
            "image,caption\nb.png,x\n",
            "has the columns image, caption; its first line must name a column 'file'",
        ),
        ("captions.csv", "file,caption\nb.png,red, and bright\n", "line 2 does not have 2 columns; put quotes"),
        ("captions.csv", "file,caption\n../b.png,x\n", "line 2: '../b.png' leaves the folder"),
        ("captions.csv", "file,caption,caption\nb.png,x,y\n", "two columns 'caption'.*a line of its own"),
        ("captions.jsonl", '{"file": "b.png", "caption": "x", "caption": "y"}', "line 1 has 'caption' twice"),
        ("captions.csv", 'file,caption\na.JPG,x\nb.png,"12" pipe"\n', "line 3 has a stray quote.*two quotes"),
        ("captions.csv", 'file,caption\na.JPG,"a pipe\nb.png,x\n', "line 3 has a stray quote"),
        ("captions.jsonl", '{"file": "b.png", "y": ' + "[" * 100_000, "line 1 is nested too deep"),
        ("captions.jsonl", '{"file": "b.png", "y": ' + "1" * 5000 + "}", "line 1 is not JSON"),
        ("captions.jsonl", '{"file": "x"}\n{\n{"file": "b.png", "caption": 3}\n{"file": "../y"}', "line 2.*line 3.*line 4"),
        ("captions.jsonl", '{"file": "x.png"}\n{"file": "y.png"}', "names 2.*'x.png'.*'y.png'"),
    ],
)
def test_captions_that_do_not_fit_are_refused(photos: Path, name: str, content: str, message: str) -> None:
    (photos / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        FolderDataset(photos)


def test_captions_files_that_cannot_be_chosen_or_read(photos: Path) -> None:
    (photos / "captions.csv").write_bytes("file,caption\nb.png,gr\xfcn\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions.csv' is not UTF-8 text"):
        FolderDataset(photos)
    (photos / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds both captions.jsonl and captions.csv"):
        FolderDataset(photos)
    with pytest.raises(ValueError, match=r"captions.xml' does not exist"):
        FolderDataset(photos, photos / "captions.xml")
    with pytest.raises(ValueError, match=r"notes.md' ends in '.md'; write it as .jsonl or .csv"):
        FolderDataset(photos, photos / "notes.md")


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist; name an existing folder"):
        FolderDataset(tmp_path / "nowhere")
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file.png' is a file"):
        FolderDataset(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' and its subfolders hold no images \(.jpg"):
        FolderDataset(tmp_path / "empty")


def _link_image(root: Path, outside: Path) -> None:
    (root / "link.png").symlink_to(outside / "secret.png")


def _link_folder(root: Path, outside: Path) -> None:
    (root / "linked").symlink_to(outside, target_is_directory=True)


def _link_captions(root: Path, outside: Path) -> None:
    (root / "captions.csv").symlink_to(outside / "secret.txt")


def _link_sidecar(root: Path, outside: Path) -> None:
    (root / "b.txt").symlink_to(outside / "secret.txt")


@pytest.mark.parametrize("link", [_link_image, _link_folder, _link_captions, _link_sidecar])
def test_links_out_of_the_folder_are_refused(photos: Path, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "secret.png")
    (outside / "secret.txt").write_text("file,caption\n")
    FolderDataset(photos)
    link(photos, outside)
    with pytest.raises(ValueError, match=r"is a link to '.*outside.*', outside the folder"):
        FolderDataset(photos)


def test_links_that_lead_nowhere_are_listed(photos: Path) -> None:
    (photos / "x.png").symlink_to(photos / "y.png")
    (photos / "y.png").symlink_to(photos / "x.png")
    (photos / "z.png").symlink_to(photos / "gone.png")
    with pytest.raises(ValueError, match=r"lead nowhere: 'x\.png'; 'y\.png'; 'z\.png'"):
        FolderDataset(photos)
    for name in "xyz":
        (photos / f"{name}.png").unlink()
    (photos / "captions.csv").symlink_to(photos / "captions.csv")
    with pytest.raises(ValueError, match=r"lead nowhere: 'captions\.csv'"):
        FolderDataset(photos)
    (photos / "captions.csv").unlink()
    (photos / "loop").symlink_to(photos / "loop")
    assert len(FolderDataset(photos)) == 3
    with pytest.raises(ValueError, match="loop' does not exist"):
        FolderDataset(photos / "loop")


def test_links_within_the_folder_are_kept(photos: Path) -> None:
    (photos / "link.png").symlink_to(photos / "b.png")
    dataset = FolderDataset(photos)
    assert [s.id for s in iterate(dataset)] == ["a.JPG", "b.png", "link.png", "sub/c.webp"]
    assert dataset[2].load().getpixel((0, 0)) == (255, 0, 0)


def test_fingerprint_follows_content_not_place_or_time(photos: Path, tmp_path: Path) -> None:
    before = FolderDataset(photos).fingerprint()
    shutil.copytree(photos, tmp_path / "copy" / "photos", copy_function=shutil.copyfile)
    assert FolderDataset(tmp_path / "copy" / "photos").fingerprint() == before
    (photos / "b.txt").write_text("a caption")
    with_caption = FolderDataset(photos).fingerprint()
    (photos / "b.png").rename(photos / "bb.png")
    renamed = FolderDataset(photos).fingerprint()
    Image.new("RGB", (90, 60), "blue").save(photos / "bb.png")
    assert len({before, with_caption, renamed, FolderDataset(photos).fingerprint()}) == 4


def test_fingerprint_sees_other_pictures_of_the_same_size(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def painted(colour: str) -> str:
        for name in ("a.bmp", "sub/d.bmp"):
            Image.new("RGB", (8, 6), colour).save(photos / name)
        return FolderDataset(photos).fingerprint()

    before = painted("red")
    assert painted("blue") != before == painted("red")
    # the same with digests remembered on the disk
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_REMEMBERED", 0)
    assert painted("blue") != before == painted("red") and (tmp_path / "cache").is_dir()


def test_digests_of_files_that_rest_are_not_made_again(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_REMEMBERED", 0)
    monkeypatch.setattr(files, "_SETTLED", -1)
    before, read = FolderDataset(photos).fingerprint(), []
    digest = files._digest
    monkeypatch.setattr(files, "_digest", lambda path: read.append(path.name) or digest(path))
    assert FolderDataset(photos).fingerprint() == before and not read
    Image.new("RGB", (8, 6), "white").save(photos / "b.png")
    assert FolderDataset(photos).fingerprint() != before and read == ["b.png"]
    (photos / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 files cannot be read: '.*b\.png' \(No such file"):
        files.content_digests(photos, ["a.JPG", "b.png", "sub/c.webp"])
    next((tmp_path / "cache" / "digests").iterdir()).write_text("[" * 100_000)
    assert len(files.content_digests(photos, ["a.JPG"])) == 1


@pytest.mark.parametrize("what", ["render", "caption", "questions"])
def test_the_fingerprint_of_drawn_scenes_is_of_more_than_the_first(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    dataset, made = ShapesDataset(6), getattr(drawn, what)
    before, special = dataset.fingerprint(), dataset.scene(4)

    def changed(scene: Any, *rest: Any) -> Any:
        found = made(scene, *rest)
        if scene != special:
            return found
        return (np.zeros_like(found[0]), found[1]) if what == "render" else made(dataset.scene(0), *rest)

    monkeypatch.setattr(drawn, what, changed)
    assert ShapesDataset(6).fingerprint() != before != ShapesDataset(5).fingerprint()


def test_load_dataset_knows_every_form(photos: Path) -> None:
    assert load_dataset("shapes:256") == ShapesDataset(256)
    assert load_dataset("shapes:8?split=test&seed=1&objects=2") == ShapesDataset(8, "test", 1, 2)
    assert load_dataset("shapes-winoground:5?seed=3") == TwinsDataset("winoground", 5, 3)
    assert load_dataset(str(photos)).name == "folder-photos"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "shape:256",
            "names no dataset and no folder; valid are shapes:N, shapes-mmvp:N.*folder of images. Did you mean 'shapes'?",
        ),
        ("no/such/folder", "'no/such/folder' names no dataset and no folder"),
        ("shapes", "does not say how many; write for example 'shapes:256'"),
        ("shapes:many", "the number after ':' is 'many'; it must be a whole number of at least 1"),
        ("shapes:0", "is '0'; it must be"),
        ("shapes:8?spilt=test", "unknown option 'spilt'; shapes takes split, seed, objects. Did you mean 'split'?"),
        ("shapes:8?split=tests", "unknown split 'tests'; valid are train, validation.*Did you mean 'test'?"),
        ("shapes:8?objects=5", "objects is '5'; it must be a whole number from 1 to 4"),
        ("shapes:8?seed=-1", "seed is '-1'"),
        ("shapes:8?seed=1&seed=2", "write option 'seed' once"),
        ("shapes-mmvp:9?split=test", "unknown option 'split'; shapes-mmvp takes seed"),
    ],
)
def test_load_dataset_explains_what_it_refuses(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(spec)
