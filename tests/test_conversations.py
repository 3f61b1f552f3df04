"""Conversations: LLaVA's layout read exactly, what does not fit refused by its entry; drawn ones balanced and apart from tests."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffprobe.data import conversations
from diffprobe.data.conversations import DrawnCaptions, DrawnInstructions, load_conversations
from diffprobe.data.question_benchmarks import load_questions


def written(folder: Path, *entries: Any) -> str:
    (folder / "images" / "coco").mkdir(parents=True, exist_ok=True)
    for name, colour in (("coco/1.png", "red"), ("2.png", "blue")):
        Image.new("RGB", (4, 3), colour).save(folder / "images" / name)
    (folder / "talk.json").write_text(json.dumps(list(entries)), encoding="utf-8")
    return f"llava:{folder / 'talk.json'}?images={folder / 'images'}"


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def test_llava_layout(tmp_path: Path) -> None:
    spec = written(
        tmp_path,
        {"id": "a", "image": "coco/1.png", "conversations": said("<image>\nWhat?", "Red.", "And now?", "Still red.")},
        {"id": 7, "conversations": said("Hello", "Hi")},
        {"id": "c", "image": ["2.png", "coco/1.png"], "conversations": said("Compare <image> and <image>", "Blue, red")},
    )
    data = load_conversations(spec)
    assert [data[k].id for k in range(3)] == ["a", "7", "c"]
    assert data[0].turns == (("What?", "Red."), ("And now?", "Still red."))
    assert data[1].images == () and data[1].turns == (("Hello", "Hi"),)
    assert [load().getpixel((0, 0)) for load in data[2].images] == [(0, 0, 255), (255, 0, 0)]
    assert data[2].turns[0][0] == "Compare  and"
    (tmp_path / "R&D, 100%?").mkdir()
    odd = written(tmp_path / "R&D, 100%?", {"image": "2.png", "conversations": said("What?", "Blue.")})
    for typed in (odd, odd.replace("%", "%25").replace("?/", "%3F/").replace("&", "%26").replace(",", "%2C")):
        assert load_conversations(typed)[0].images[0]().getpixel((0, 0)) == (0, 0, 255)
    first = load_conversations(f"{spec}&limit=1")
    assert len(first) == 1 and first.fingerprint() != data.fingerprint() == load_conversations(spec).fingerprint()


def test_white_space_is_cut_where_llava_cuts_it(tmp_path: Path) -> None:
    talk = said(" <image>\nWhat? ", " Red.\n", " And now?", "Still red. ")
    data = load_conversations(
        written(tmp_path, {"image": "2.png", "conversations": talk}, {"conversations": said(" a ", "b\n")})
    )
    assert data[0].turns == (("What?", " Red.\n"), (" And now?", "Still red. ")) and data[1].turns == ((" a ", "b\n"),)


def test_rows_that_llava_takes_as_well(tmp_path: Path) -> None:
    """No image as null or an empty name, an answer to nothing at the start, the mark as a word of a talk without images."""
    late = [{"from": "gpt", "value": "Welcome."}, *said("What?", "Red.")]
    data = load_conversations(written(
        tmp_path, {"image": None, "conversations": said("a", "b")}, {"image": "", "conversations": said("<rss><image></rss>?", "b")},
        {"image": "2.png", "conversations": late},
    ))  # fmt: skip
    assert [len(data[k].images) for k in range(3)] == [0, 0, 1]
    assert data[1].turns == (("<rss><image></rss>?", "b"),) and data[2].turns == (("What?", "Red."),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "x", "image": "../secret.png", "conversations": said("?", "!")}, r"entry 0 \(id 'x'\): '../secret.png' leaves"),
        ({"image": "/etc/passwd", "conversations": said("?", "!")}, "leaves the folder"),
        ({"image": "C:\\x.png", "conversations": said("?", "!")}, "leaves the folder"),
        ({"image": 3, "conversations": said("?", "!")}, '"image" must be a name'),
        ({"id": "x"}, 'no list "conversations"'),
        ({"conversations": said("?")}, "must be of human and gpt"),
        ({"conversations": said("?", "!")[::-1]}, "must be of human and gpt"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "!"}]}, 'needs a text "value"'),
        ({"image": "2.png", "conversations": said("<image><image>", "!")}, "names 1 images and speaks of 2"),
        ({"id": "x", "conversations": said("a \ud83d star", "!")}, r"\(id 'x'\): its text 0 is no Unicode text"),
        ({"id": "\udcff", "conversations": said("?", "!")}, "its id is no Unicode text"),
        ({"image": "\ud83d.png", "conversations": said("?", "!")}, "its image is no Unicode text"),
        ({"image": "2.png", "images": ["coco/1.png"], "conversations": said("?", "!")}, '"image" and "images" name other'),
        ({"images": [{"path": "2.png"}], "conversations": said("?", "!")}, "must be a name or a list of names"),
        ([], 'no list "conversations"'),
    ],
)
def test_entries_that_do_not_fit(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_conversations(written(tmp_path, entry))


def test_links_and_missing_images(tmp_path: Path) -> None:
    """All are found before a step is trained, and listed."""
    names = ["2.png"] * 3 + ["link.png", "absent.png", "loop.png", "gone.png"]
    spec = written(tmp_path, *({"image": name, "conversations": said("?", "!")} for name in names))
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "loop.png").symlink_to(tmp_path / "images" / "loop.png")
    message = (
        r"4 entries.*link\.png' is a link to .*entry 4.*'absent\.png' is not in.*'loop\.png' is not in.*'gone\.png' is not in"
    )
    with pytest.raises(ValueError, match=message):
        load_conversations(spec)
    data = load_conversations(f"{spec}&limit=3")
    (tmp_path / "images" / "2.png").unlink()
    (tmp_path / "images" / "2.png").symlink_to(tmp_path / "secret.png")  # later
    with pytest.raises(ValueError, match="is a link to"):
        data[0].images[0]()


def test_all_entries_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    good = {"image": "2.png", "conversations": said("?", "!")}
    with pytest.raises(ValueError, match=r"3 entries.*entry 1 \(id 1\).*entry 3 has no list.*entry 4 \(id 'z'\)"):
        load_conversations(written(tmp_path, good, good | {"image": 3}, good, 7, {"id": "z", "conversations": said("?")}))
    bad = [{"id": k, "conversations": []} for k in range(50)]
    with pytest.raises(ValueError, match=r"50 entries.*entry 19 .*; and 30 more"):
        load_conversations(written(tmp_path, *bad))


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.json"])
def test_json_lines_and_images(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path).replace("talk.json", name)
    rows = [
        {"id": "a", "images": ["2.png"], "conversations": said("<image>\nWhat\u2028now?", "Blue.")},
        {"image": "2.png", "images": ["2.png"], "conversations": said("?", "!")}, {"images": [], "conversations": said("Hello", "Hi")},
        {"images": None, "conversations": said("Hello", "Hi")},
    ]  # fmt: skip
    (tmp_path / name).write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    data = load_conversations(spec)
    assert [len(data[k].images) for k in range(4)] == [1, 1, 0, 0] and data[0].turns == (("What\u2028now?", "Blue."),)
    assert data[0].images[0]().getpixel((0, 0)) == (0, 0, 255)
    assert data.fingerprint() == load_conversations(spec).fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"), (b'{"a": ' * 100_000, "line 1 is nested too deep"), (b"[{", "is not JSON"),
        (b'{"id": 1}\n{', "line 2 is not JSON"), (b"[]", "at least one"), (b"", "at least one"), (b"7", "at least one"),
        (b'["\xff"]', "is not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    spec = written(tmp_path)
    (tmp_path / "talk.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_conversations(spec)


def test_the_fingerprint_is_of_the_pictures_too(tmp_path: Path) -> None:
    spec = written(
        tmp_path, {"image": "3.bmp", "conversations": said("?", "!")}, {"image": "3.bmp", "conversations": said("?", "!")}
    )
    found = []
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 3), colour).save(tmp_path / "images" / "3.bmp")
        found.append(load_conversations(spec).fingerprint())
    assert len(set(found)) == 2


def test_names_in_any_spelling_of_their_accents(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\xe9.png") for form in ("NFC", "NFD"))
    spec = written(tmp_path, {"image": composed, "conversations": said("?", "!")})
    Image.new("RGB", (4, 3), "red").save(tmp_path / "images" / decomposed)
    assert load_conversations(spec)[0].images[0]().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes-talk:3", "names no conversations; valid are"), ("shapes-captions", "names no conversations"),
        ("shapes-captions:0", "whole number of at least 1"), ("shapes-instruct:5?sead=1", "takes seed"), ("llava:absent.json", "say where the images"),
        ("llava:absent.json?images=.", "does not exist"),
    ],
)  # fmt: skip
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_conversations(spec)


def test_drawn_instructions_are_answerable_only_by_looking() -> None:
    data = DrawnInstructions(600)
    answers = Counter(answer for k in range(600) for text, answer in data[k].turns if text.startswith("Which image has more"))
    assert set(answers) == {"first", "second"} and min(answers.values()) > 0.2 * sum(answers.values())
    yes = [answer for k in range(600) for text, answer in data[k].turns if answer in ("yes", "no")]
    assert abs(np.mean([answer == "yes" for answer in yes]) - 0.5) < 0.12  # some 400 tosses: four standard errors and more
    assert data.fingerprint() != DrawnInstructions(600, 1).fingerprint()
    assert DrawnCaptions(8)[0].turns != DrawnCaptions(8)[4].turns


@pytest.mark.parametrize(("name", "build"), [("several_images", DrawnInstructions), ("ShapesDataset", DrawnCaptions)])
def test_fingerprints_of_drawn_conversations_are_of_all_pictures(
    monkeypatch: pytest.MonkeyPatch, name: str, build: type[DrawnInstructions | DrawnCaptions]
) -> None:
    before, made = build(20).fingerprint(), getattr(conversations, name)

    def repainted(*given: Any) -> Any:
        item = made(*given)
        if name == "several_images":
            return replace(item, images=(item.images[0],) * len(item.images)) if given[1] == 1 else item
        first, call = item[0].load, type(item).__getitem__
        monkeypatch.setattr(
            type(item), "__getitem__", lambda data, k: replace(call(data, k), load=first) if k == 19 else call(data, k)
        )
        return item

    monkeypatch.setattr(conversations, name, repainted)
    assert build(20).fingerprint() != before


def test_training_shares_no_image_with_the_benchmarks() -> None:
    data = DrawnInstructions(40)
    seen = {np.asarray(load()).tobytes() for k in range(40) for load in data[k].images}
    for kind in ("mmvp", "naturalbench", "vqa", "blink"):
        asked = load_questions(f"shapes-{kind}:20")
        assert not seen & {np.asarray(load()).tobytes() for item in asked.items for load in item.images}
