"""The plug-in of lmms-eval: alone, on requests like the harness's, and inside the harness where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from diffprobe.data.question_benchmarks import QuestionItem, load_questions
from diffprobe.mllm.harness import INSTALL, HarnessModel


class Painter:
    """Stands in for a `FusedMLLM`: says the colours that it was shown, and what it was asked."""

    language = SimpleNamespace(device="cpu")
    calls: list[tuple[int, int]]

    @classmethod
    def from_pretrained(cls, folder: str, device: str | None = None) -> Painter:
        made = cls()
        made.calls = []
        return made

    def answer(
        self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str], *, max_new_tokens: int, batch: int
    ) -> list[str]:
        self.calls.append((len(questions), max_new_tokens))
        assert all(one.mode == "RGB" for several in images for one in several)
        seen = ["-".join(str(one.getpixel((0, 0))[0]) for one in several) for several in images]
        return [f"{colours} {question} END more" for colours, question in zip(seen, questions, strict=True)]


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., HarnessModel]:
    monkeypatch.setattr("diffprobe.mllm.model.FusedMLLM", Painter)

    def make(**options: Any) -> HarnessModel:
        model = HarnessModel("runs/fused", **options)
        model.task_dict = {"colours": {"test": [{"reds": [10 * k, 200][: 1 + k % 2]} for k in range(7)]}}
        return model

    return make


def reds(document: dict[str, Any]) -> list[Image.Image]:
    return [Image.new("RGBA", (4, 4), (red, 0, 0, 255)) for red in document["reds"]]


def request(k: int, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(args=(f"Q{k}", settings, reds, k, "colours", "test"))


def test_answers_keep_the_order_of_the_requests(painter: Callable[..., HarnessModel]) -> None:
    model = painter(batch_size=2)
    lengths = (16, 8, 16, 8, 16, 16, 8)
    said = model.generate_until([request(k, max_new_tokens=length) for k, length in enumerate(lengths)])
    assert said == [f"{10 * k}{'-200' if k % 2 else ''} Q{k} END more" for k in range(7)]
    assert model.model.calls == [(2, 8), (1, 8), (2, 16), (2, 16)]  # by length, no more than batch_size at a time


def test_settings_of_a_task(painter: Callable[..., HarnessModel]) -> None:
    assert painter().generate_until([request(0, until=["more", "END"]), request(2, until=" END"), request(4)]) == [
        "0 Q0 ",
        "20 Q2",
        "40 Q4 END more",
    ]
    model = painter(max_new_tokens=5)
    model.generate_until([request(0, max_new_tokens=1024), request(1, max_new_tokens=3)])
    assert model.model.calls == [(1, 3), (1, 5)]
    assert painter().generate_until([SimpleNamespace(args=("no image", {}, lambda _: None, 0, "colours", "test"))]) == [
        " no image END more"
    ]
    assert painter().device == "cpu"


def test_what_it_cannot_do_is_said(painter: Callable[..., HarnessModel]) -> None:
    with pytest.raises(ValueError, match="pretrained=FOLDER"):
        HarnessModel()
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        painter(batch_size="auto")
    film = SimpleNamespace(args=("What happens?", {}, lambda _: ["film.mp4"], 0, "colours", "test"))
    with pytest.raises(ValueError, match="'colours' shows str with 'What happens"):
        painter().generate_until([film])
    for method in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="choose tasks whose output_type is generate_until"):
            getattr(painter(), method)([])


# --- inside the harness ---------------------------------------------------------------------------

TASK = """
task: shapes_local
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {table}
test_split: test
output_type: generate_until
doc_to_visual: !function local_task.images
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
def images(doc):
    return [doc["image"].convert("RGB")]
"""


def harness_task(folder: Path, items: Sequence[QuestionItem], answers: Sequence[str]) -> Path:
    """Questions as the hub publishes a benchmark, images in Parquet, and the harness's description of the task."""
    import datasets

    rows = [
        {"question_id": item.id, "question": item.question, "answer": answer, "image": item.images[0]()}
        for item, answer in zip(items, answers, strict=True)
    ]
    text = datasets.Value("string")
    features = datasets.Features({"question_id": text, "question": text, "answer": text, "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    (folder / "local_task.py").write_text(FUNCTIONS)
    (folder / "shapes_local.yaml").write_text(TASK.format(table=folder / "test-00000-of-00001.parquet"))
    return folder


def saved_model(folder: Path, language: Any, diffusion: Path) -> Path:
    from diffprobe.mllm.config import FusedConfig
    from diffprobe.mllm.model import FusedMLLM

    language.model.save_pretrained(folder / "lm")
    language.tokenizer.save_pretrained(folder / "lm")
    config = FusedConfig(language_model=str(folder / "lm"), diffusion=str(diffusion), fusion="diffusion", grid=2)
    FusedMLLM.build(config, "cpu").save_pretrained(folder / "fused")
    return folder / "fused"


@pytest.mark.slow
def test_the_harness_evaluates_a_saved_model(tmp_path: Path, language: Callable[..., Any], tiny_folder: Path) -> None:
    """By its own command: it finds the plug-in, reads a local Parquet task offline, and logs what `answer` says."""
    for name in ("lmms_eval", "datasets", "evaluate", "loguru", "pytz", "tenacity", "pytablewriter"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; the harness takes: {INSTALL}")
    from diffprobe.mllm.model import FusedMLLM

    model, items = saved_model(tmp_path, language(), tiny_folder), load_questions("shapes-vqa:8").items
    said = FusedMLLM.from_pretrained(model, "cpu").answer(
        [[load() for load in item.images] for item in items], [item.question for item in items], max_new_tokens=4
    )
    said = [text.partition("\n\n")[0].strip() for text in said]  # the harness's own stop string and trimming
    # untrained, the model is never right: half of the task's answers are what it says, so that there is something to count
    answers = [text if k % 2 else item.record["answer"] for k, (text, item) in enumerate(zip(said, items, strict=True))]
    task = harness_task(tmp_path, items, answers)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "lmms_eval", "--model", "diffprobe", "--model_args", f"pretrained={model}", "--device", "cpu",
               "--tasks", "shapes_local", "--include_path", str(task), "--batch_size", "3", "--log_samples",
               "--output_path", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (logged,) = (tmp_path / "out").rglob("*samples_shapes_local.jsonl")
    samples = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"].strip() for sample in samples] == said
    assert [sample["input"] for sample in samples] == [item.question for item in items]
    (results,) = (tmp_path / "out").rglob("*results.json")
    share = sum(text == answer for text, answer in zip(said, answers, strict=True)) / len(items)
    assert json.loads(results.read_text())["results"]["shapes_local"]["exact_match,none"] == share >= 0.5
