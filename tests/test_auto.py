"""A saved model through transformers' auto classes: what it generates is `FusedMLLM`'s own answers; its page; the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import hub

from diffprobe.data.conversations import DrawnCaptions, DrawnInstructions
from diffprobe.mllm.config import FusedConfig, StageConfig
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.stages import train_fused
from tests.test_fused import asked, parts  # noqa: F401 (a fixture)

SHORT = {"max_new_tokens": 6}


def trained(parts: dict[str, str], folder: Path, tune: str = "full", fusion: str = "cross_attention") -> Path:  # noqa: F811
    """A run folder as 'diffprobe mllm train' leaves it."""
    model = FusedMLLM.build(FusedConfig(**parts, fusion=fusion, grid=2, heads=2), "cpu")
    first = StageConfig(steps=1, batch=4)
    second = StageConfig(steps=1, batch=4, learning_rate=0.05, tune=tune, lora_rank=2, prompted=True)  # type: ignore[arg-type]
    train_fused(model, DrawnCaptions(8), DrawnInstructions(8), folder, (first, second))
    return folder


@pytest.fixture(scope="module")
def run_folder(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return trained(parts, tmp_path_factory.mktemp("auto") / "run")


def spoken(processor: Any, inputs: Any, generated: torch.Tensor) -> list[str]:
    """The texts behind the inputs, as every example of transformers takes them."""
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


@pytest.mark.parametrize(("tune", "fusion"), [("full", "cross_attention"), ("lora", "interleave"), ("", "clip")])
def test_generations_are_the_models_own_answers(
    parts: dict[str, str], tmp_path: Path, tune: str, fusion: str  # noqa: F811
) -> None:  # fmt: skip
    folder = trained(parts, tmp_path / "run", tune, fusion)
    own = FusedMLLM.from_pretrained(folder, "cpu")
    assert AutoConfig.from_pretrained(folder).fused["fusion"] == fusion and AutoConfig.from_pretrained(folder).tuned == tune
    processor, model = (
        AutoProcessor.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder, device_map="cpu"),
    )
    images, questions = asked()
    inputs = processor(images=images, text=questions)
    expected = own.answer(images, questions, **SHORT)
    assert spoken(processor, inputs, model.generate(**inputs, **SHORT)) == expected and len(set(expected)) > 1
    assert spoken(processor, inputs, model.generate(**inputs)) == own.answer(images, questions), "defaults too"
    told = processor(images=images, text=questions, prompts=["a dog", None, None, "", "a dog"])
    said = own.answer(images, questions, prompts=["a dog", None, None, "", "a dog"], **SHORT)
    assert spoken(processor, told, model.generate(**told, **SHORT)) == said
    one = processor(images=images[0][0], text=questions[0])
    assert spoken(processor, one, model.generate(**one, **SHORT)) == expected[:1]
    whole = model.generate(**inputs, **SHORT, return_dict_in_generate=True)
    assert torch.equal(whole.sequences, model.generate(**inputs, **SHORT))
    beams = model.generate(**inputs, **SHORT, num_beams=2, num_return_sequences=2)
    assert beams.shape[0] == 10 and torch.equal(beams[::2, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    loss = model(**inputs, labels=inputs["input_ids"].clamp(max=5)).loss
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.fusion.parameters())


def test_a_conversation_is_that_of_a_chat(run_folder: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(run_folder), AutoModelForImageTextToText.from_pretrained(run_folder)
    own = FusedMLLM.from_pretrained(run_folder)
    image = asked()[0][0][0]
    first: dict[str, Any] = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "Is it red?"}],
    }
    messages = [
        first,
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    expected = own.answer([[image]], ["Sure?"], histories=[[("Is it red?", "yes")]], **SHORT)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert inputs["prompts"] == ["Sure?"], "the last question is the prompt"
    assert spoken(processor, inputs, model.generate(**inputs, **SHORT)) == expected
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count("<image>") == 1 and text.index("<image>") < text.index("Is it red?") < text.index("Sure?")
    batch = processor.apply_chat_template([messages, [first]], tokenize=True, return_dict=True)
    both = spoken(processor, batch, model.generate(**batch, **SHORT))
    assert both == [*expected, *own.answer([[image]], ["Is it red?"], **SHORT)]
    talk = pipeline("image-text-to-text", model=str(run_folder), device="cpu")
    assert talk(text=messages, return_full_text=False, **SHORT)[0]["generated_text"].strip() == expected[0]
    for wrong, message in (
        (messages[:2], "ends with the user's question"),
        ([{"role": "system", "content": "Be kind."}, *messages], "take turns"),
        ([*messages[:2], first], "images stand in the first message"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(wrong, tokenize=True)


def test_what_a_processor_refuses(run_folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(run_folder)
    image = Image.new("L", (5, 9), 7)
    inputs = processor(images=[[image], [Image.new("RGB", (3, 4))]], text=["?", "a longer one?"])
    assert inputs["pixel_values"].shape == (2, 3, 9, 5) and inputs["image_sizes"].tolist() == [[9, 5], [4, 3]]
    assert (inputs["pixel_values"][0] == 7).all() and inputs["attention_mask"][0, 0] == 0
    for given, message in (
        ({"text": ["?", "?"], "images": [image]}, "2 texts, 1 lists of images"),
        ({"text": "<image>?", "images": image}, "leave '<image>' out"),
        ({"text": []}, "0 texts"),
        ({"text": "?", "return_tensors": "np"}, "return_tensors='pt'"),
        ({"text": ["?", "?"], "images": [[image], [image]], "padding": False}, "padding=True"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**given)
    model = AutoModelForImageTextToText.from_pretrained(run_folder)
    with pytest.raises(ValueError, match="image tokens do not fit 1 images of 4 soft tokens"):
        model.generate(**inputs | {name: inputs[name][:1] for name in ("pixel_values", "image_sizes")} | {"prompts": ["?"]})


# --- the page and the hub -------------------------------------------------------------------------


def test_the_page_says_what_the_model_is(run_folder: Path, tmp_path: Path) -> None:
    page = (run_folder / "README.md").read_text()
    for line in (
        "pipeline_tag: \"image-text-to-text\"", "| fusion | cross_attention |", "| sites | U-L1-R1-B0-Cross-Q |", "| timestep | 50 |",
        "| language model | lm, trained whole |", "| diffusion model | tiny-shapes-sd |", "Trained on: shapes-captions-0, then shapes-instruct-0.",
    ):  # fmt: skip
        assert line in page, line
    assert str(tmp_path.parent) not in page and "base_model" not in page and "## Scores" not in page
    row = {"benchmark": "shapes-mmvp-0", "score": "pair", "group": "all", "condition": "own", "value": 0.5, "low": 0.25, "high": 0.75,
           "chance": 0.25, "n": 9, "unparsed": 0, "seed": 0}  # fmt: skip
    (run_folder / "eval").mkdir()
    pd.DataFrame([row, row | {"group": "colour", "value": 0.9}]).to_csv(run_folder / "eval" / "scores.csv", index=False)
    model = FusedMLLM.from_pretrained(run_folder)
    AutoProcessor.from_pretrained(run_folder).save_pretrained(tmp_path / "copy")
    assert "processor_class" not in json.loads((tmp_path / "copy" / "processor_config.json").read_text())
    model.save_pretrained(tmp_path / "copy")
    page = (tmp_path / "copy" / "README.md").read_text()
    assert "| shapes-mmvp-0 | pair | own | 0.5 | 0.25 | 0.75 | 0.25 | 9 |" in page and "0.9" not in page
    (tmp_path / "copy" / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "my own words"
    assert FusedMLLM.from_pretrained(tmp_path / "copy").data == ["shapes-captions-0", "shapes-instruct-0"]
    model.config = FusedConfig(language_model="lmsys/vicuna-7b-v1.5", encoder="openai/clip", fusion="clip")
    assert 'base_model: ["lmsys/vicuna-7b-v1.5", "openai/clip"]' in model.card() and "sites" not in model.card()
    assert "reads each question as its prompt" in page and "reads each question" not in model.card()
    model.config = FusedConfig(guidance=0.0)
    assert "reads each question" not in model.card(), "told nothing"


@pytest.mark.parametrize("kind", ["fused", "auto"])
@pytest.mark.parametrize("written", ["", "A person's page."])
def test_what_would_go_to_the_hub(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, written: str
) -> None:
    sent: dict[str, bytes] = {}

    def load(repo: str, **options: Any) -> Any:
        if not written:
            raise EntryNotFoundError("no page")
        return huggingface_hub.ModelCard(written)

    def commit(self: Any, *, repo_id: str, operations: Any, **options: Any) -> str:
        sent.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})
        return repo_id

    monkeypatch.setattr(hub.ModelCard, "load", load)
    created = type("Repo", (), {"repo_id": "me/fused"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *given, **options: created)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    loader: Any = FusedMLLM if kind == "fused" else AutoModelForImageTextToText
    model = loader.from_pretrained(run_folder)
    assert model.push_to_hub("me/fused") == "me/fused"
    assert {"fused_mllm.json", "fusion.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= set(sent)
    assert "language/model.safetensors" in sent and json.loads(sent["config.json"])["model_type"] == "diffprobe_fused"
    assert sent["README.md"].decode().strip().endswith(written or model.card().strip())
    for name, content in sent.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("diffprobe.mllm.auto.snapshot_download", lambda repo, **options: tmp_path)
    from diffprobe.mllm.auto import FusedForImageTextToText

    images, questions = asked()
    back = FusedForImageTextToText.from_pretrained("me/fused")
    own = FusedMLLM.from_pretrained(run_folder)
    assert back.fused.answer(images, questions, **SHORT) == own.answer(images, questions, **SHORT)


FRESH = """
import sys
import diffprobe
assert not {"torch", "transformers"} & set(sys.modules), "import diffprobe is quick"
import transformers
from diffprobe.data.shapes import picture, random_scene
image = picture(random_scene(0, 3, "test", 2))
for name in sys.argv[2:]:
    print(type(getattr(transformers, name).from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [["AutoProcessor", "AutoConfig"], ["AutoModelForImageTextToText", "AutoProcessor"]])
def test_importing_diffprobe_is_enough(run_folder: Path, order: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", FRESH, str(run_folder), *order], capture_output=True, text=True, check=False)
    names = {
        "AutoConfig": "FusedAutoConfig",
        "AutoProcessor": "FusedProcessor",
        "AutoModelForImageTextToText": "FusedForImageTextToText",
    }
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [names[name] for name in order]
