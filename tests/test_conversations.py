"""Conversations: LLaVA's layout read exactly, what does not fit refused by its entry; drawn ones balanced and apart from tests."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    ],
)
def test_entries_that_do_not_fit(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_conversations(written(tmp_path, entry))


def test_links_and_missing_images(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    spec = written(tmp_path, *({"image": name, "conversations": said("?", "!")} for name in ("link.png", "absent.png")))
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    data = load_conversations(spec)
    with pytest.raises(ValueError, match="a link that leaves"):
        data[0].images[0]()
    with pytest.raises(ValueError, match=r"absent\.png' does not exist"):
        data[1].images[0]()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes-talk:3", "names no conversations; valid are"), ("shapes-captions", "names no conversations"),
        ("shapes-captions:0", "above 0"), ("shapes-instruct:5?sead=1", "takes seed"), ("llava:absent.json", "say where the images"),
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


def test_training_shares_no_image_with_the_benchmarks() -> None:
    data = DrawnInstructions(40)
    seen = {np.asarray(load()).tobytes() for k in range(40) for load in data[k].images}
    for kind in ("mmvp", "naturalbench", "vqa", "blink"):
        asked = load_questions(f"shapes-{kind}:20")
        assert not seen & {np.asarray(load()).tobytes() for item in asked.items for load in item.images}
