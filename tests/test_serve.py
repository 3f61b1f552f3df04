"""The page of 'mllm serve': what it shows is the model's own; through Gradio's client where Gradio is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffprobe.data.images import fit_image
from diffprobe.mllm.chat import question_attention
from diffprobe.mllm.config import FusedConfig
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.serve import IRRELEVANT, build_app, reply
from diffprobe.plotting import overlay
from tests.test_fused import asked, build, parts, shade  # noqa: F401 (a fixture)

QUESTION = "Is the red star left?"


@pytest.fixture(scope="module")
def fused(parts: dict[str, str]) -> FusedMLLM:  # noqa: F811
    return FusedMLLM.build(FusedConfig(**parts, grid=2, heads=2, fusion="interleave"), "cpu")


def test_a_reply_is_the_models_own(fused: FusedMLLM, language: Callable[..., Any]) -> None:
    image = asked()[0][0][0]
    answer, other, maps, note = reply(fused, image, QUESTION, max_new_tokens=6)
    assert [answer] == fused.answer([[image]], [QUESTION], max_new_tokens=6)
    assert [other] == fused.answer([[image]], [QUESTION], prompts=[IRRELEVANT], max_new_tokens=6)
    assert reply(fused, image, QUESTION, QUESTION, 6)[1] == answer and note == ""
    heat = question_attention(fused, image, QUESTION)
    assert [word for _, word in maps] == ["red", "star", "left"]
    seen = fit_image(image, (320, 320), "pad")
    np.testing.assert_array_equal(np.asarray(maps[1][0]), np.asarray(overlay(seen, heat.sel(word="star"))))
    answer, other, maps, note = reply(fused, image, "is it?", max_new_tokens=3)
    assert maps == [] and "has no word" in note
    blind = build(language(("yes", "no")), "clip")
    answer, other, maps, note = reply(blind, shade(True, 0), "is it bright?", max_new_tokens=3)
    assert answer == other and maps == [] and note.startswith("This model never reads the prompt")
    for image, question in ((None, QUESTION), (shade(True, 0), " ")):  # type: ignore[assignment]
        with pytest.raises(ValueError, match="An image and a question are needed"):
            reply(fused, image, question)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Gradio and what it stands on
def test_the_page_answers_its_client(fused: FusedMLLM, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="pip install 'diffprobe[serve]'")
    client = pytest.importorskip("gradio_client")
    image = asked()[0][0][0]
    image.save(tmp_path / "scene.png")
    app = build_app(fused, max_new_tokens=6)
    try:
        app.launch(server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False)
        page = client.Client(app.local_url, verbose=False)
        answer, other, maps, note = page.predict(
            client.handle_file(str(tmp_path / "scene.png")), QUESTION, IRRELEVANT, api_name="/ask"
        )
        expected = reply(fused, image, QUESTION, max_new_tokens=6)
        assert (answer, other, note) == (expected[0], expected[1], expected[3])
        for shown, (picture, word) in zip(maps, expected[2], strict=True):
            assert shown["caption"] == word
            np.testing.assert_array_equal(np.asarray(Image.open(shown["image"]).convert("RGB")), np.asarray(picture))
        with pytest.raises(Exception, match="An image and a question are needed"):
            page.predict(None, QUESTION, IRRELEVANT, api_name="/ask")
    finally:
        app.close()


def test_without_gradio_one_sentence_says_what_to_install(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    code, _, errors = run("mllm", "serve", tmp_path)
    assert code == 2 and "pip install 'diffprobe[serve]'" in errors and errors.count("\n") == 1
