"""The fused model and its two stages: batched as alone, saved as loaded, resumed bit for bit; a planted signal is learnt."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator, DistributedType
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from diffprobe.data import shapes
from diffprobe.data.conversations import Conversation, DrawnCaptions, DrawnInstructions
from diffprobe.data.images import read_image, to_rgb
from diffprobe.data.question_benchmarks import QuestionBenchmark, QuestionItem, load_questions
from diffprobe.encoders import load_encoder
from diffprobe.mllm import train
from diffprobe.mllm.config import STAGE1, STAGE2, FusedConfig, StageConfig
from diffprobe.mllm.fusion import Fusion
from diffprobe.mllm.judging import POINTS, answer_items, judge_all, score_judged
from diffprobe.mllm.language import IGNORED, LanguageModel, build_inputs
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.stages import Learner, Sample, Samples, forecast_stage, train_fused, train_stage
from diffprobe.mllm.streams import DiffusionEncoder, FeatureCache, Picture, Streams, TruthEncoder
from diffprobe.models import load_model
from diffprobe.rundir import sole_writer

Make = Callable[..., LanguageModel]
QUESTIONS = ["is it bright?", "what is the shade of this even picture?", "?"]


@dataclass
class Planted:
    """An encoder that sees the shade of an even image, or noise of the picture's own; it remembers its prompts."""

    sees: bool
    name: str = "planted"
    sites: tuple[str, ...] = ("shade",)
    prompts_seen: list[str | None] = field(default_factory=list)

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return {"weights": self.name, "sees": self.sees}

    def encode(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, torch.Tensor]:
        self.prompts_seen += list(prompts)
        rows = []
        for picture in pictures:
            noise = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(int(picture.id[:8], 16)))
            rows.append(noise + 3 * self.sees * (float(np.asarray(picture.load()).mean()) / 127.5 - 1))
        return {"shade": torch.stack(rows)}


def shade(bright: bool, number: int) -> Image.Image:
    value = 180 + number % 60 if bright else 20 + number % 60
    return Image.new("RGB", (4, 4 + number // 60), (value,) * 3)


@dataclass(frozen=True)
class Shades:
    """Bright and dark images; the second question's answer is the same for all."""

    count: int = 48
    first: int = 0
    name: str = "shades"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        image = shade(index % 2 == 0, self.first + index)
        turns = (("is it bright?", ("yes", "no")[index % 2]), ("?", "a"))
        return Conversation(f"{index}", (lambda: image,), turns)

    def fingerprint(self) -> str:
        return f"shades-{self.count}-{self.first}"


def build(language: LanguageModel, kind: str = "cross_attention", cache: FeatureCache | None = None) -> FusedMLLM:
    encoders = {"clip": Planted(False, "blind"), "diffusion": Planted(True)}
    fusion = Fusion(kind, {"clip": 6, "diffusion": 6}, language.width, rms=language.rms, heads=2)
    needed = {name: encoder for name, encoder in encoders.items() if name in fusion.streams}
    streams = Streams(needed, 2, guidance=4.0, cache=cache)
    return FusedMLLM(FusedConfig(fusion=kind, language_model="tiny"), streams, fusion, language)


@pytest.fixture
def own_language(fresh_language: Make) -> LanguageModel:
    return fresh_language(("yes", "no"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, language: Make) -> dict[str, str]:
    """Folders of a tiny CLIP, diffusion model and language model."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("parts")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text, vision = {**small, "vocab_size": 50_000}, {**small, "image_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder / "clip")
    side = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder / "clip")
    model = language()
    model.model.save_pretrained(folder / "lm")
    model.tokenizer.save_pretrained(folder / "lm")
    return {"encoder": str(folder / "clip"), "diffusion": str(tiny_folder), "language_model": str(folder / "lm")}


# --- the model ------------------------------------------------------------------------------------


def asked() -> tuple[list[list[Image.Image]], list[str]]:
    images = [item.images[0]() for item in load_questions("shapes-mmvp:3").items]
    given = [[images[0]], [images[1], images[2]], [], [images[3]], [images[4], images[5]]]
    return given, ["Is it?", "What is in the second picture, and what in the first?", "?", "Say it all at once.", "Which?"]


@pytest.mark.parametrize("kind", ["clip", "cross_attention", "interleave"])
def test_batched_answers_are_those_of_single_questions(parts: dict[str, str], kind: str) -> None:
    model = FusedMLLM.build(FusedConfig(**parts, fusion=kind, grid=2, heads=2), "cpu")
    images, questions = asked()
    together = model.answer(images, questions, max_new_tokens=6, batch=5)
    assert together == [model.answer([i], [q], max_new_tokens=6)[0] for i, q in zip(images, questions, strict=True)]
    assert len(set(together)) > 2
    with pytest.raises(ValueError, match="5 lists of images, 1 questions and 1 prompts do not match"):
        model.answer(images, questions[:1])


def test_several_images_stand_one_after_the_other(language: Make) -> None:
    model = language()
    soft = torch.randn(3, 2, model.width)
    rows = build_inputs(model, soft, ["?", "?", "?"], images=[2, 0, 1])
    before, after = model.prompt("?")
    assert rows.mask.sum(1).tolist() == [
        len(before) + len(after) + 4,
        len(model.prompt("?", False)[1]),
        len(before) + len(after) + 2,
    ]
    start = len(before)
    assert torch.equal(rows.embeddings[0, start : start + 4], soft[:2].flatten(0, 1))
    start = rows.mask.shape[1] - len(after) - 2
    assert torch.equal(rows.embeddings[2, start : start + 2], soft[2])


def test_answers_of_a_conversation_are_the_templates_own(language: Make) -> None:
    model = language()
    turns = [("What?", "a star"), ("And now?", ""), ("Well", "no")]
    ids, labels = model.answers(turns)
    messages = [
        {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    whole = model.tokenizer.apply_chat_template(messages, tokenize=False)
    written = model.tokenizer.decode(ids)
    assert whole.replace("<|assistant|>", "", 1).removeprefix("<|user|>What?<|end|>").startswith(written[:6])
    assert f"<|user|>What?<|end|><|assistant|>{written}" == whole
    spoken = model.tokenizer.decode([label for label in labels if label != IGNORED])
    assert spoken == "a star<|end|><|end|>no<|end|>" and len(ids) == len(labels)
    assert [i for i, label in zip(ids, labels, strict=True) if label != IGNORED] == [
        label for label in labels if label != IGNORED
    ]
    assert [len(part) for part in model.answers(turns, 5)] == [5, 5]


def test_saved_and_loaded(parts: dict[str, str], tmp_path: Path) -> None:
    config = FusedConfig(**parts, grid=2, heads=2)
    images, questions = asked()
    data = DrawnInstructions(8)
    for tune in ("", "full", "lora"):
        model = FusedMLLM.build(config, "cpu")
        stage = StageConfig(steps=1, batch=4, learning_rate=0.05, tune=tune, lora_rank=2, prompted=True)  # type: ignore[arg-type]
        train_stage(model, data, tmp_path / f"tuned{tune}", stage)
        loaded = FusedMLLM.from_pretrained(tmp_path / f"tuned{tune}", "cpu")
        assert loaded.tuned == tune and loaded.config == model.config
        assert loaded.answer(images, questions, max_new_tokens=5) == model.answer(images, questions, max_new_tokens=5)
        names = {path.name for path in (tmp_path / f"tuned{tune}").rglob("*") if path.is_file()}
        assert not {name for name in names if name.endswith((".pt", ".bin", ".pkl"))}
        assert ("adapter_model.safetensors" in names) == (tune == "lora") and ("model.safetensors" in names) == (tune == "full")
        for path in (tmp_path / f"tuned{tune}").rglob("*.safetensors"):
            before = flipped(path, path.stat().st_size - 4000)
            with pytest.raises(ValueError, match=f"{path.name} is not what was written"):
                FusedMLLM.from_pretrained(tmp_path / f"tuned{tune}", "cpu")
            path.write_bytes(before)


def test_other_weights_than_in_training_are_refused(parts: dict[str, str], tmp_path: Path) -> None:
    config = FusedConfig(**parts, fusion="diffusion", grid=2)
    FusedMLLM.build(config, "cpu").save_pretrained(tmp_path)
    from diffprobe.models import load_model

    other = load_model(parts["diffusion"], "cpu", random_weights=5)
    with pytest.raises(
        ValueError, match=r"trained with other weights or settings of .*tiny-shapes-sd' than are there now \(diffusion\)"
    ):
        FusedMLLM.from_pretrained(tmp_path, "cpu", diffusion=other)
    with pytest.raises(ValueError, match="holds no fused model"):
        FusedMLLM.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="'sum' is not one of clip"):
        FusedMLLM.build(replace(config, fusion="sum"))


@pytest.mark.parametrize("tune", ["", "full", "lora"])
def test_captions_and_talk_in_llava_s_two_formats(
    fresh_language: Make, parts: dict[str, str], tmp_path: Path, tune: str
) -> None:
    """Stage 1 in one format and the model in another, which it keeps when it is loaded."""
    bare = fresh_language()
    bare.tokenizer.chat_template = None
    for name in ("model", "tokenizer"):
        getattr(bare, name).save_pretrained(tmp_path / "bare")
    config = FusedConfig(**parts | {"language_model": str(tmp_path / "bare")}, grid=2, heads=2)
    with pytest.raises(ValueError, match=r"has no chat template.*v1"):
        FusedMLLM.build(config, "cpu")
    model, seen = FusedMLLM.build(replace(config, template="v1"), "cpu"), []
    spell = model.language.tokenizer.decode

    def spy(rows: Any, language: LanguageModel, *more: Any, **options: Any) -> Any:
        seen.append(spell(language.prompt("?")[1] + language.answers([("?", "a")])[0]))
        return build_inputs(language, rows, *more, **options)

    stage = StageConfig(steps=1, batch=4, tune=tune, lora_rank=2, prompted=True)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "diffprobe.mllm.stages.build_inputs", lambda language, soft, *more, **options: spy(soft, language, *more, **options)
        )
        train_stage(model, DrawnCaptions(8), tmp_path / "1", StageConfig(steps=1, batch=4, template="plain"))
        train_stage(model, DrawnCaptions(8), tmp_path / "2", stage)
    assert seen[0] == "a\n" and seen[-1] == "\n? ASSISTANT: a<|end|>"
    loaded = FusedMLLM.from_pretrained(tmp_path / "2", "cpu")
    assert loaded.config.template == loaded.language.template == model.language.template == "v1"
    with pytest.raises(ValueError, match="one caption an image"):
        train_stage(model, DrawnInstructions(8), tmp_path / "3", StageConfig(steps=1, batch=4, template="plain"))
    assert model.language.template == "v1"


# --- the stages -----------------------------------------------------------------------------------


def share(model: FusedMLLM, condition: str = "own") -> float:
    truth = [index % 2 == 0 for index in range(20)]
    items = [
        QuestionItem(
            f"{k}", (lambda k=k, bright=bright: shade(bright, 100 + k),), "is it bright?", {"answer": ("no", "yes")[bright]}
        )  # type: ignore[misc]
        for k, bright in enumerate(truth)
    ]
    records = answer_items(model, items, condition, max_new_tokens=3)
    return float(np.mean([record["output"] == record["answer"] for record in records]))


@pytest.mark.parametrize(("kind", "learns"), [("clip", False), ("cross_attention", True), ("concat", True), ("sequence", True)])
def test_what_only_the_diffusion_stream_sees_is_learnt_by_fusions_alone(
    own_language: LanguageModel, tmp_path: Path, kind: str, learns: bool
) -> None:
    model = build(own_language, kind)
    train_stage(model, Shades(), tmp_path, StageConfig(steps=80, batch=16, learning_rate=0.01, tune="full", prompted=True))
    assert share(model) > 0.9 if learns else 0.2 < share(model) < 0.8
    if kind == "cross_attention":
        assert share(model, "irrelevant") > 0.9  # this encoder does not read, so nothing it says is read
        assert share(model, "blank") == share(model, "text") == 0.5  # one answer for all


def test_stage_1_has_no_prompt_and_stage_2_a_question_of_the_conversation(own_language: LanguageModel, tmp_path: Path) -> None:
    model = build(own_language)
    before = {name: value.clone() for name, value in own_language.model.state_dict().items()}
    encoder = model.streams.encoders["diffusion"]
    assert isinstance(encoder, Planted)
    train_stage(model, Shades(), tmp_path / "1", replace(STAGE1, steps=2, batch=8))
    assert set(encoder.prompts_seen) == {None}
    assert all(torch.equal(value, before[name]) for name, value in own_language.model.state_dict().items())
    encoder.prompts_seen.clear()
    train_stage(model, Shades(8), tmp_path / "2", replace(STAGE2, steps=8, batch=8), start="1")
    assert set(encoder.prompts_seen) == {None, "is it bright?", "?"}  # nothing only as the other half of guidance
    assert not all(torch.equal(value, before[name]) for name, value in own_language.model.state_dict().items())
    encoder.prompts_seen.clear()
    model.answer([[shade(True, 0)]], ["? now"])
    assert set(encoder.prompts_seen) == {None, "? now"}


def test_defaults_are_those_of_llava() -> None:
    assert (STAGE1.batch, STAGE1.learning_rate, STAGE1.tune, STAGE1.prompted) == (256, 1e-3, "", False)
    assert (STAGE2.batch, STAGE2.learning_rate, STAGE2.tune, STAGE2.prompted) == (128, 2e-5, "full", True)
    assert STAGE1.epochs == STAGE2.epochs == 1 and STAGE2.max_length == 2048


def test_a_batch_loses_what_its_rows_lose_alone(own_language: LanguageModel) -> None:
    model = build(own_language)
    learner = Learner(model.fusion, own_language)
    pictures = [Picture.of(shade(True, number)) for number in range(4)]
    images, questions = [1, 0, 2, 1], ["?", "What is it?", "Which of the two is it?", "Why?"]
    samples = [
        Sample(0, (lambda: None,) * count, question, None, *own_language.answers([(question, "yes"), ("And?", "no")]))
        for count, question in zip(images, questions, strict=True)
    ]
    together, read = learner(model.streams(pictures, [None] * 4), samples)
    alone, first = 0.0, 0
    for sample, count in zip(samples, images, strict=True):
        mine = pictures[first : first + count]
        streams = model.streams(mine, [None] * count) if mine else {}
        alone += float(learner(streams, [sample])[0].detach())
        first += count
    assert float(together.detach()) == pytest.approx(alone, rel=1e-4) and read > 0
    learner({}, [samples[1]])[0].backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.fusion.parameters())


def losses(folder: Path) -> list[str]:
    with (folder / "loss.csv").open(encoding="utf-8") as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_interrupted_stages_end_in_the_same_weights(fresh_language: Make, tmp_path: Path, tune: str) -> None:
    stage = StageConfig(
        steps=6, batch=8, accumulate=2, learning_rate=0.01, tune=tune, lora_rank=2, prompted=True, evaluate_every=2, dropout=0.3,  # type: ignore[arg-type]
        checkpointing=tune == "full",
    )  # fmt: skip

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        assert "tokens/s" in line
        if line.startswith("step 4"):
            raise Stop

    train_stage(build(fresh_language()), Shades(), tmp_path / "whole", stage)
    with pytest.raises(Stop):
        train_stage(build(fresh_language()), Shades(), tmp_path / "cut", stage, log=stop)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    train_stage(build(fresh_language()), Shades(), tmp_path / "cut", stage)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 6
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()
    with pytest.raises(ValueError, match="holds another training"):
        train_stage(build(fresh_language()), Shades(), tmp_path / "cut", replace(stage, seed=1))
    with sole_writer(tmp_path / "new"), pytest.raises(ValueError, match=r"Another process \(pid \d+\) is writing .*new"):
        train_stage(build(fresh_language()), Shades(), tmp_path / "new", stage)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_bfloat16_on_a_cpu_learns_the_same_to_its_accuracy(fresh_language: Make, tmp_path: Path, tune: str) -> None:
    stage = StageConfig(steps=20, batch=16, learning_rate=0.003, tune=tune, lora_rank=2, prompted=True)  # type: ignore[arg-type]
    for precision in ("no", "bf16"):
        model = build(fresh_language(), cache=FeatureCache(tmp_path / "cache"))  # its float16 rows must not meet the autocast
        before = model.language.model.config._attn_implementation
        train_stage(model, Shades(), tmp_path / precision, replace(stage, precision=precision))  # type: ignore[arg-type]
        assert model.language.model.config._attn_implementation == before
        assert {p.dtype for p in (*model.language.model.parameters(), *model.fusion.parameters())} == {torch.float32}
    exact, short = ([float(x) for x in losses(tmp_path / precision)] for precision in ("no", "bf16"))
    assert exact != short and np.allclose(exact, short, rtol=0.1)


@pytest.mark.parametrize("wrong", ["tune='none'", "precision='fp8'"])
def test_a_stage_refuses_words_that_it_does_not_know(wrong: str) -> None:
    # in a process of its own: in this one annotations are checked before
    code = f"from diffprobe.mllm.config import StageConfig; StageConfig({wrong})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    name, value = wrong.split("=")
    assert f"ValueError: {name} is one of" in done.stderr and f"; got {value}." in done.stderr


def test_a_cache_changes_what_is_computed_and_not_what_is_learnt(fresh_language: Make, tmp_path: Path) -> None:
    stage = StageConfig(steps=4, batch=8, learning_rate=0.01, tune="full", prompted=True)
    live = build(fresh_language())
    train_stage(live, Shades(8), tmp_path / "live", stage)
    cached = build(fresh_language(), cache=FeatureCache(tmp_path / "cache"))
    train_stage(cached, Shades(8), tmp_path / "kept", stage)
    encoder = cached.streams.encoders["diffusion"]
    assert isinstance(encoder, Planted)
    assert len(encoder.prompts_seen) == 8 + 16  # each image with nothing, and with each of its two questions
    assert np.allclose([float(x) for x in losses(tmp_path / "live")], [float(x) for x in losses(tmp_path / "kept")], rtol=0.02)


def test_each_turn_is_read_from_features_that_its_own_question_prompted(own_language: LanguageModel) -> None:
    """A turn whose features were prompted with another question would teach the model to ignore its prompt."""
    prompted = Samples(build(own_language), Shades(4), replace(STAGE2, batch=2, steps=1))
    assert [sample.prompt for sample in prompted.rows] == ["is it bright?", "?"] * 4
    assert all(sample.question == sample.prompt for sample in prompted.rows)
    assert [learnt(prompted, sample) for sample in prompted.rows[:2]] == ["yes", "a"]
    pictures, prompts = prompted.prompted_pictures([prompted.rows[k] for k in (0, 1, 6)])
    assert prompts == ["is it bright?", "?", "is it bright?"]
    assert pictures[0].id == pictures[1].id != pictures[2].id
    unprompted = Samples(build(own_language), Shades(4), replace(STAGE1, batch=2, steps=1))
    assert [sample.prompt for sample in unprompted.rows] == [None] * 4
    assert learnt(unprompted, unprompted.rows[0]) == "yes a"  # both turns


def learnt(samples: Samples, sample: Sample) -> str:
    """What a sample teaches to say."""
    language = samples.model.language
    return " ".join(language.tokenizer.decode([label for label in sample.labels if label != IGNORED]).split("<|end|>")).strip()


def test_forecast_learns_nothing(own_language: LanguageModel, tmp_path: Path) -> None:
    model = build(own_language, cache=FeatureCache(tmp_path))
    before = {name: value.clone() for name, value in model.fusion.state_dict().items()}
    found = forecast_stage(model, Shades(48), replace(STAGE2, batch=16, epochs=2))
    # two turns a conversation, each a sample that has its own question as prompt
    assert found.steps == 12 and found.passes == 96 and found.seconds > 0 and "12 steps of" in str(found)
    assert all(torch.equal(value, before[name]) for name, value in model.fusion.state_dict().items())
    assert not list(tmp_path.rglob("*.safetensors"))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from conftest import build_language
from test_fused import Shades, build
from diffprobe.mllm.config import StageConfig
from diffprobe.mllm.stages import train_stage
model = build(build_language())
train_stage(model, Shades(), Path({folder!r}), StageConfig(
    steps=3, batch=8, accumulate={accumulate}, learning_rate=0.01, tune="full", prompted=True
))
"""


SHARDED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from conftest import build_language
from test_fused import Shades, build, two_stages
from diffprobe.mllm import stages, train

def shard(**options):
    # accelerate reads its configuration of FSDP on GPUs alone; torch's FSDP 2 runs on CPUs all the same
    accelerator = Accelerator(**options)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=True
    )
    return accelerator

def filled(spare, learner, fill=stages._filled):
    layers = [module for module in learner.modules() if type(module).__name__.endswith("DecoderLayer")]
    assert len(layers) == 2 and all(isinstance(layer, FSDPModule) for layer in layers), "weights were not spread by layer"
    return fill(spare, learner)

def save_and_stop(folder, learner, optimizer, state, *rest, save=train.save_checkpoint):
    save(folder, learner, optimizer, state, *rest)
    if folder.name == "stage2" and state.step == 2:
        train.save_checkpoint = save
        raise InterruptedError

stages.Accelerator, stages._filled, train.save_checkpoint = shard, filled, save_and_stop
folder = Path({folder!r})
try:
    two_stages(build(build_language()), folder, {tune!r})
except InterruptedError:
    torch.distributed.barrier()
    assert (folder / "stage2" / "checkpoint.pt").exists()
model = build(build_language())
two_stages(model, folder, {tune!r})
print(model.answer([[Shades()[0].images[0]()]], ["is it bright?"], max_new_tokens=2))
"""


def two_stages(model: FusedMLLM, folder: Path, tune: str) -> None:
    second = StageConfig(
        steps=4, batch=8, accumulate=2, learning_rate=0.01, tune=tune, lora_rank=2, prompted=True, evaluate_every=2, dropout=0.3,  # type: ignore[arg-type]
    )  # fmt: skip
    train_stage(model, Shades(), folder / "stage1", replace(STAGE1, steps=2, batch=8, learning_rate=0.01))
    model.fusion.load_state_dict(load_file(folder / "stage1" / "fusion.safetensors"))
    train_stage(model, Shades(), folder / "stage2", second, start="stage1")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_processes_learn_what_one_learns(tmp_path: Path, launch: Callable[..., Any], accumulate: int) -> None:
    found = []
    for count in (1, 2):
        text = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / f"run{count}"), accumulate=accumulate)
        launch(tmp_path / f"{count}.py", text, count).check_returncode()
        found.append([float(x) for x in losses(tmp_path / f"run{count}")])
    assert np.allclose(*found, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_weights_spread_over_processes_learn_the_same(
    fresh_language: Make, tmp_path: Path, launch: Callable[..., Any], tune: str
) -> None:
    """Both stages under FSDP 2 on two gloo ranks, cut off and taken up again, end where one process ends."""
    text = SHARDED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "spread"), tune=tune)
    done = launch(tmp_path / "spread.py", text, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = build(fresh_language())
    two_stages(alone, tmp_path / "alone", tune)
    said = str(alone.answer([[Shades()[0].images[0]()]], ["is it bright?"], max_new_tokens=2))
    assert done.stdout.count(said) == 2
    for stage in ("stage1", "stage2"):
        found = [[float(x) for x in losses(tmp_path / run / stage)] for run in ("spread", "alone")]
        assert np.allclose(*found, rtol=1e-4)
        assert not (tmp_path / "spread" / stage / "checkpoint.pt").exists()
    paths = list((tmp_path / "alone").rglob("*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        mine, other = load_file(path), load_file(tmp_path / "spread" / path.relative_to(tmp_path / "alone"))
        assert mine.keys() == other.keys() and all(torch.allclose(mine[k], other[k], atol=1e-4) for k in mine)


def test_processes_that_get_too_few_samples_are_refused_before_anything_is_done(
    own_language: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = StageConfig(steps=1, batch=8), StageConfig(steps=1, batch=8, accumulate=8, tune="full")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "batch of 8 gives each of 2 processes 4 samples, too few for accumulate=8 .* a batch of 16 or accumulate=4"
    with pytest.raises(ValueError, match=message):
        train_fused(build(own_language), Shades(), Shades(), tmp_path, stages)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="A batch of 99"):  # of stage 2, before stage 1 is trained
        train_fused(build(own_language), Shades(), Shades(), tmp_path, (stages[0], StageConfig(batch=99)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tune", ["", "full", "lora"])
def test_the_disk_that_is_forecast_is_the_disk_that_is_taken(
    fresh_language: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str
) -> None:
    model, sizes = build(fresh_language(), cache=FeatureCache(tmp_path / "features")), []
    stage = StageConfig(steps=6, batch=8, tune=tune, lora_rank=2, prompted=True, evaluate_every=5)  # type: ignore[arg-type]
    data, save = Shades(16), train.save_checkpoint
    found = forecast_stage(model, data, stage)

    def weigh(value: Any) -> int:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return value.nbytes if isinstance(value, torch.Tensor) else sum(map(weigh, parts))

    def spy(folder: Path, *more: Any) -> None:
        save(folder, *more)
        sizes.append(weigh(torch.load(folder / "checkpoint.pt", weights_only=True)))

    monkeypatch.setattr(train, "save_checkpoint", spy)
    train_stage(model, data, tmp_path / "run", stage)
    assert len(sizes) == 2 and all(0.8 * found.checkpoint < size < 1.02 * found.checkpoint for size in sizes)  # and buffers
    part = {"": "fusion", "full": "model", "lora": "adapter_model"}[tune]
    paths = [p for p in (tmp_path / "run").rglob("*.safetensors") if p.stem in ("fusion", part)]
    assert sum(weigh(load_file(path)) for path in paths) == pytest.approx(found.model, rel=0.02)
    kept = sum(weigh(load_file(path)) for path in (tmp_path / "features").rglob("*.safetensors"))
    per_picture = 2 * 6 * 2 * 2
    assert found.cache == 2 * 16 * per_picture * 3  # of each turn: blind, unprompted, and prompted with its question
    assert 16 * per_picture * 3 <= kept <= found.cache
    assert f"every {found.every} steps" in str(found) and found.every == 5


def test_a_disk_that_is_too_small_is_refused_before_training(
    fresh_language: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    stages = StageConfig(steps=1, batch=8), StageConfig(steps=1, batch=8, tune="full")
    monkeypatch.setattr("diffprobe.mllm.stages.free_bytes", lambda folder: 100_000)
    with pytest.raises(ValueError, match=r"needs 1.03 MB more and 100 kB are free.*--force goes on"):
        train_fused(build(fresh_language()), Shades(), Shades(), tmp_path, stages, log=logged.append)
    assert "a checkpoint of" in logged[1] and logged[2].startswith("disk: ") and not list(tmp_path.iterdir())
    train_fused(build(fresh_language()), Shades(), Shades(), tmp_path, stages, dry_run=True)
    train_fused(build(fresh_language()), Shades(), Shades(), tmp_path, stages, force=True)
    train_fused(build(fresh_language()), Shades(), Shades(), tmp_path, stages)  # it is finished: nothing more is needed


@pytest.mark.parametrize(("engine", "version"), [(DistributedType.DEEPSPEED, 2), (DistributedType.FSDP, 1)])
def test_other_engines_are_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, own_language: LanguageModel, tmp_path: Path, engine: DistributedType, version: int
) -> None:
    class Launched(Accelerator):
        distributed_type = engine
        is_fsdp2 = version == 2

    monkeypatch.setattr("diffprobe.mllm.stages.Accelerator", Launched)
    with pytest.raises(ValueError, match="FSDP 2 alone is supported: accelerate launch --use_fsdp --fsdp_version 2"):
        train_stage(build(own_language), Shades(), tmp_path, StageConfig(steps=2, batch=8))


def test_a_run_of_one_device_is_known_on_the_other(parts: dict[str, str], tmp_path: Path) -> None:
    """A GPU holds in bfloat16 what a CPU holds in float32; other weights are refused all the same."""
    FusedMLLM.build(FusedConfig(**parts, grid=2, heads=2), "cpu").save_pretrained(tmp_path)
    encoder, diffusion = (
        load_encoder(parts["encoder"], "cpu", dtype="bfloat16"), load_model(parts["diffusion"], "cpu", dtype="bfloat16")
    )  # fmt: skip
    assert FusedMLLM.from_pretrained(tmp_path, "cpu", encoder=encoder, diffusion=diffusion).config.grid == 2
    with torch.no_grad():
        for parameter in encoder.network.parameters():
            parameter.mul_(1.1)
    with pytest.raises(ValueError, match="was trained with other weights"):
        FusedMLLM.from_pretrained(tmp_path, "cpu", encoder=encoder, diffusion=diffusion)


def test_a_forecast_of_talk_without_images(own_language: LanguageModel) -> None:
    @dataclass(frozen=True)
    class Talk(Shades):
        def __getitem__(self, index: int) -> Conversation:
            return replace(super().__getitem__(index), images=())

    assert forecast_stage(build(own_language), Talk(), StageConfig(steps=2, batch=8)).passes == 0


def test_a_cache_holds_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprobe.mllm.streams._OPEN", 2)
    cache, encoder = FeatureCache(tmp_path), Planted(True)
    pictures = [Picture.of(shade(True, number)) for number in range(5)]
    for picture in pictures:
        cache.write(encoder, [(picture.id, None)], encoder.encode([picture], [None]))
    keys = [(pictures[k].id, None) for k in (0, 1, 2, 3, 4, 0, 4, 2)]
    found = cache.read(encoder, "shade", keys)
    assert cache._open.cache_info().currsize == 2
    assert torch.allclose(
        found.float(), torch.cat([encoder.encode([pictures[k]], [None])["shade"] for k in (0, 1, 2, 3, 4, 0, 4, 2)]), atol=0.01
    )


def flipped(path: Path, first: int, count: int = 4000) -> bytes:
    """Flip a bit of each of some bytes; gives what was there."""
    before = path.read_bytes()
    values = np.frombuffer(before, np.uint8).copy()
    values[first : first + count] ^= 1
    path.write_bytes(values.tobytes())
    return before


def test_a_damaged_file_of_the_cache_is_found(tmp_path: Path) -> None:
    cache, encoder, pictures = FeatureCache(tmp_path), Planted(True), [Picture.of(shade(True, number)) for number in range(3)]
    keys = [(picture.id, None) for picture in pictures]
    cache.write(encoder, keys, encoder.encode(pictures, [None] * 3))
    (path,) = tmp_path.rglob("*.safetensors")
    whole, end = path.read_bytes(), path.stat().st_size
    for first, count in ((end - 3, 1), (end - 60, 40), (200, 10), (8, 1), (0, 2)):
        flipped(path, first, count)
        again = FeatureCache(tmp_path)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged; remove it"):
            again.read(encoder, "shade", keys)
        path.write_bytes(whole)
    flipped(path, end - 3, 1)
    other = FeatureCache(tmp_path)
    assert len(other.read(encoder, "shade", keys[:2])) == 2  # rows that are as they were
    path.write_bytes(whole)
    first, second = (json.dumps(key) for key in json.loads(safe_open(path, "pt").metadata()["keys"])[:2])
    mark = first.replace('"', "").encode(), second.replace('"', "").encode()
    swapped = whole.replace(mark[0], b"~" * len(mark[0])).replace(mark[1], mark[0]).replace(b"~" * len(mark[0]), mark[1])
    assert len(mark[0]) == len(mark[1]) and swapped != whole
    path.write_bytes(swapped)  # two pictures' names exchanged: each row's bytes are as they were
    with pytest.raises(ValueError, match=rf"{path.name} is damaged; remove it"):
        FeatureCache(tmp_path).read(encoder, "shade", keys)
    path.unlink()
    assert FeatureCache(tmp_path).lacking(encoder, keys) == keys


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_images_of_any_mode_are_read_as_files_are(language: Make, tmp_path: Path, mode: str) -> None:
    values = np.zeros((4, 4, 4), np.uint8) if mode == "RGBA" else np.full((4, 4), 30_000, np.uint16)
    image = Image.fromarray(values)
    image.save(tmp_path / "image.png")
    model, seen = build(language()), []
    encoder = model.streams.encoders["diffusion"]
    encoder.encode = lambda pictures, prompts: seen.extend(p.id for p in pictures) or Planted.encode(encoder, pictures, prompts)  # type: ignore[method-assign, arg-type, func-returns-value]
    model.answer([[image]], ["?"], max_new_tokens=1)
    assert set(seen) == {Picture.of(read_image(tmp_path / "image.png")).id} != {Picture.of(image).id}


# --- judging --------------------------------------------------------------------------------------


def test_answers_outlive_a_scorer_that_refuses_them(language: Make, tmp_path: Path) -> None:
    twins = load_questions("shapes-mmvp:2")
    item = QuestionItem("bench-1", (), "What is it?", {"category": "conv", "question": "What is it?"})
    logged: list[str] = []
    benchmarks = [QuestionBenchmark("llava-bench", "llava-bench", "", (item,)), twins,
                  QuestionBenchmark("odd", "mmvp", "", twins.items[:3])]  # fmt: skip
    with pytest.raises(ValueError, match="pairs"):
        judge_all(build(language()), benchmarks, tmp_path, ("own",), max_new_tokens=1, tell=logged.append)
    with (tmp_path / "answers.csv").open(encoding="utf-8") as file:
        assert [row["benchmark"] for row in csv.DictReader(file)] == ["llava-bench"] + [twins.name] * 4 + ["odd"] * 3
    with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
        assert {row["benchmark"] for row in csv.DictReader(file)} == {twins.name}
    assert "llava-bench: answers are kept; its score needs a judge model" in " ".join(logged)
    kept = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert kept[twins.name] == {"spec": twins.spec, "fingerprint": twins.fingerprint()} and len(kept) == 3


def test_points_of_a_judge_become_scores(language: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"category": kind, "question": f"{kind}?", "context": "a wall", "reference": "null"} for kind in ("conv", "detail")
    ]
    items = tuple(QuestionItem(f"bench-{k}", (), record["question"], record) for k, record in enumerate(records))
    judge_all(
        build(language()),
        [QuestionBenchmark("llava-bench", "llava-bench", "", items)],
        tmp_path,
        ("own", "text"),
        max_new_tokens=1,
    )
    path = tmp_path / "to_judge.csv"
    rows = pd.read_csv(path, keep_default_na=False)
    assert rows["condition"].tolist() == ["own", "own", "text", "text"] and rows["reference"].tolist() == ["null"] * 4
    with pytest.raises(
        ValueError, match=r"4 rows of .* lack reference_points or output_points, numbers above 0: bench-0 \(own\)"
    ):
        score_judged(path)
    rows[list(POINTS)] = [[8, 8], [8, 4], [10, 5], [5, 1]]
    rows.to_csv(path, index=False)
    scores = score_judged(path).set_index(["condition", "group"])["value"]
    assert scores.to_dict() == pytest.approx({("own", "all"): 12 / 16, ("own", "conv"): 1, ("own", "detail"): 0.5,
                                              ("text", "all"): 6 / 15, ("text", "conv"): 0.5, ("text", "detail"): 0.2})  # fmt: skip
    rows.loc[1, "output_points"] = 0
    rows.to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"1 rows of .*: bench-1 \(own\)\."):
        score_judged(path)
    rows.drop(columns="category").to_csv(path, index=False)
    with pytest.raises(ValueError, match="has no category; 'diffprobe mllm eval' writes"):
        score_judged(path)


def test_judged_beside_its_blind_baselines(language: Make, tmp_path: Path) -> None:
    model = build(language())
    bench = load_questions("shapes-mmvp:9")
    scores = judge_all(model, [bench], tmp_path, max_new_tokens=2)
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert scores.groupby("condition").size().to_dict() == {"own": 2, "blank": 2, "text": 2}
    pair = scores[scores["score"] == "pair"]
    assert (pair["chance"] == 0.25).all() and (pair["n"] == 9).all() and (pair["low"] <= pair["value"]).all()
    assert len(answers) == 3 * 18 and set(answers["hit"]) <= {0.0, 1.0}
    encoder = model.streams.encoders["diffusion"]
    assert isinstance(encoder, Planted)
    encoder.prompts_seen.clear()
    answer_items(model, bench.items[:2], "irrelevant", max_new_tokens=1)
    assert bench.items[0].question == bench.items[1].question  # a pair: nothing else to tell
    encoder.prompts_seen.clear()
    answer_items(model, bench.items, "irrelevant", max_new_tokens=1)
    assert len(set(encoder.prompts_seen)) == 10 and len(encoder.prompts_seen) == 36
    with pytest.raises(ValueError, match="'other' is not one of own, unprompted"):
        answer_items(model, bench.items, "other")


# --- asking ---------------------------------------------------------------------------------------


def test_attention_of_a_question_is_the_recorded_maps_mean(parts: dict[str, str], tmp_path: Path) -> None:
    from diffprobe.mllm.chat import question_attention, save_attention
    from diffprobe.recorder import Recorder

    model = FusedMLLM.build(FusedConfig(**parts, fusion="diffusion", grid=2), "cpu")
    image, question = asked()[0][0][0], "Is the red star left?"
    heat = question_attention(model, image, question)
    assert heat["word"].values.tolist() == ["red", "star", "left"] and heat.dims == ("word", "y", "x")
    assert np.allclose(heat.sum(("y", "x")), 1, atol=1e-5)
    one = question_attention(model, image, question, maps="U-L1-R1-B0-Cross-Map")
    encoder = model.streams.encoders["diffusion"]
    text = encoder.model.encode_text([question])  # type: ignore[attr-defined]
    (place,) = [k for k, (a, b) in enumerate(text.spans[0].tolist()) if question[a:b] == "red"]
    recorder = Recorder(encoder.model, maps="U-L1-R1-B0-Cross-Map", heads="all")  # type: ignore[attr-defined]
    recorded = encoder.record(recorder, [Picture.of(image)], [question])  # type: ignore[attr-defined]
    expected = recorded["U-L1-R1-B0-Cross-Map"][0, :, place].mean(0)
    assert np.allclose(one.sel(word="red"), expected / expected.sum(), atol=1e-6)
    path = save_attention(model, image, question, "no", tmp_path / "heat.png")
    assert path.is_file() and path.with_suffix(".csv").is_file()
    with pytest.raises(ValueError, match="has no word"):
        question_attention(model, image, "is it?!")
    with pytest.raises(ValueError, match="'clip' has no diffusion model"):
        question_attention(FusedMLLM.build(FusedConfig(**parts, fusion="clip", grid=2), "cpu"), image, question)


# --- controls -------------------------------------------------------------------------------------


def test_the_oracle_sees_what_the_scene_says_and_nothing_elsewhere() -> None:
    scene = shapes.random_scene(0, 3, "test", 2)
    encoder = TruthEncoder()
    seen = encoder.encode([Picture.of(shapes.picture(scene)), Picture.of(Image.new("RGB", (64, 64)))], [None, None])["truth"]
    assert seen.shape == (2, 38, 8, 8) and not seen[1].any()
    for obj in scene.objects:
        cell = seen[0, :, int(obj.y * 8), int(obj.x * 8)]
        assert cell[0] == 1 and cell[1:3].tolist() == pytest.approx([obj.x, obj.y])
        assert cell[4 + list(shapes.COLOURS).index(obj.colour)] == 1 and cell[4:].sum() == 6
    assert (seen[0, 0] > 0).sum() == len(scene.objects)
    assert to_rgb(shapes.picture(scene)).info["scene"] == scene  # what evaluation does with an image keeps it


def test_inputs_of_the_diffusion_model_stand_in_for_its_features(tiny_model: Any) -> None:
    picture = Picture.of(shade(True, 0))
    latent = DiffusionEncoder(tiny_model, "latent").encode([picture], [None])["latent"]
    assert latent.shape == (1, 4, 16, 16)
    text = DiffusionEncoder(tiny_model, "text").encode([picture, picture], ["a red star", None])["text"]
    assert text.shape == (2, 128, 8, 8)
    assert torch.equal(text[0, :, 0, 3], tiny_model.encode_text(["a red star"]).embeddings[0, 3].float())
    for site in ("latent", "text", "truth"):
        model = FusedMLLM.build(FusedConfig(fusion="diffusion", sites=(site,), grid=4), diffusion=tiny_model)
        assert set(model.streams.encoders) == {"diffusion"} and model.streams.encoders["diffusion"].sites == (site,)


def test_another_encoder_stands_in_for_the_diffusion_model(tiny_model: Any) -> None:
    pictures = [Picture.of(shade(True, 0)), Picture.of(shade(False, 1))]
    config = FusedConfig(sites=("encoder:shapes-clip",), guidance=0.0, grid=4)
    model = FusedMLLM.build(config, diffusion=tiny_model)
    own, other = (model.streams.encoders[name].encode(pictures, [None, None]) for name in ("clip", "diffusion"))
    assert own.keys() == other.keys() == {"L5"}
    assert torch.equal(own["L5"], other["L5"])
    assert "timestep" not in model.origins()["diffusion"][0], "it has no noise"
    with pytest.raises(ValueError, match="shapes-clop"):
        FusedMLLM.build(replace(config, sites=("encoder:shapes-clop",)), diffusion=tiny_model)
