"""The trainings of the embedded models: against plain loops and planted answers; cut off, they go on to the same weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffprobe.data import ShapesDataset, shapes
from diffprobe.data.conversations import REQUESTS, load_conversations
from diffprobe.data.questions import CATEGORIES, YES_NO, questions
from diffprobe.data.twins import FAR
from diffprobe.zoo import locate
from diffprobe.zoo.reader import FACTORS, Reader
from recipes import card, clip, common, lm, measure, reader, sd


@pytest.fixture(scope="module")
def speaker() -> tuple[Any, Any]:
    folder = locate("shapes-lm")
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


# --- scenes ---------------------------------------------------------------------------------------


def test_mirrored_scenes_hold_the_same_objects_in_the_opposite_relation() -> None:
    for group in range(30):
        one, other = (common.train_scene(group * common.GROUP + place, 0) for place in (common.RELATION, common.GROUP - 1))
        assert [o.pair for o in one.objects] == [o.pair for o in other.objects]
        where = str(shapes.relation(*one.objects))
        assert shapes.relation(*other.objects) == shapes.RELATIONS[where]
        assert all(o.radius <= o.x <= 1 - o.radius and o.radius <= o.y <= 1 - o.radius for o in other.objects)


def test_two_fifths_of_the_captions_name_a_relation() -> None:
    rng = np.random.default_rng(0)
    texts = [common.random_caption(common.train_scene(i, 0), rng) for i in range(2000)]
    named = np.mean([any(f" {where} " in text for where in shapes.RELATIONS) for text in texts])
    assert named >= 0.4


def test_timesteps_lean_to_high_noise_and_stay_in_range() -> None:
    drawn = sd.draw_timesteps(np.random.default_rng(0), 20_000, 0.6)
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert np.median(drawn) > 600 and (drawn < 100).mean() > 0.03


# --- the loop -------------------------------------------------------------------------------------


def test_muon_moves_the_networks_own_weights() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4))
    optimizers = common.Optimizers(module, 1e-2, 1e-2, outer=("0.",))
    before = [p.detach().clone() for p in module.parameters()]
    module[1](module[0](torch.ones(2, 3, 3, 3)).flatten(1)).sum().backward()
    optimizers.step(1.0)
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert len(optimizers.views) == 1  # the convolution is an outer part here
    assert all(p.grad is None for p in module.parameters())


def test_a_training_ends_with_its_minutes(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    plan = common.Plan(steps=10**6, minutes=0.01, log_every=1000)

    def loss_of(batch: torch.Tensor, done: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = module(batch).square().mean()
        return loss, {"loss": loss}

    optimizers = common.Optimizers(module, 1e-3, 0)
    steps, seconds = common.train("x", tmp_path, plan, {"m": module}, optimizers, lambda step: torch.ones(4, 2), loss_of)
    assert 0.6 <= seconds < 5 and steps > 10
    assert (tmp_path / "x.pt").exists()


STAGES: list[tuple[str, Callable[[Any, Path], object], Any]] = [
    ("vae", sd.train_vae, sd.Config(vae_batch=2, vae=common.Plan(steps=4, save_every=2))),
    ("text", sd.train_text, sd.Config(text_batch=4, text_relation_steps=2, text=common.Plan(steps=4, save_every=2))),
    ("unet", sd.train_unet, sd.Config(scenes=64, unet_batch=4, unet=common.Plan(steps=4, save_every=2))),
    ("clip", clip.train_clip, clip.Config(batch=4, plan=common.Plan(steps=4, save_every=2))),
    (
        "lm",
        lm.train_lm,
        lm.Config(
            batch=2, two_until=1, restated_until=1, pairs_until=2, compared_until=3, plan=common.Plan(steps=4, save_every=2)
        ),
    ),
    ("reader", reader.train_reader, reader.Config(batch=4, plan=common.Plan(steps=4, save_every=2))),
]


@pytest.mark.slow
def test_every_stage_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill right after a checkpoint, then the same call again."""
    replace_file = Path.replace

    def killed(path: Path, target: Path) -> Path:
        replace_file(path, target)
        raise KeyboardInterrupt

    for name, training, config in STAGES:
        training(config, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                training(config, tmp_path / "cut")
        training(config, tmp_path / "cut")
        whole, cut = (torch.load(tmp_path / f / f"{name}.pt", weights_only=True) for f in ("whole", "cut"))
        assert whole["step"] == cut["step"] == 4
        for part in set(whole) - {"optimizers", "step", "seconds"}:
            for key, tensor in whole[part].items():
                torch.testing.assert_close(cut[part][key], tensor, msg=f"{name} {part} {key}")
    assert (tmp_path / "whole" / "shapes-sd" / "model_index.json").exists()


@pytest.mark.slow
def test_a_finished_model_is_trained_further(tmp_path: Path) -> None:
    """The first step of the warm-up has a rate of zero: the weights that it began with come out."""
    start = locate("shapes-sd")
    config = sd.Config(start=str(start), scenes=64, unet_batch=4, unet=common.Plan(steps=1))
    trained = sd.train_unet(config, tmp_path)
    began = UNet2DConditionModel.from_pretrained(start / "unet").float().state_dict()
    assert all(torch.equal(tensor, began[name]) for name, tensor in trained.state_dict().items())


def test_the_tokenizer_pads_as_stable_diffusion_2_does_and_loses_nothing() -> None:
    tokenizer = sd.build_tokenizer(sd.Config())
    ids = sd.tokenize(tokenizer, ["a red star", "Überraschung, 雪!"])
    assert ids.shape == (2, 77)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "!"
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace("!", "").split() == ["a", "red", "star"]
    assert "雪" in tokenizer.decode(tokenizer("雪").input_ids, skip_special_tokens=True)


# --- shapes-clip ----------------------------------------------------------------------------------


def test_exchanged_scenes_differ_only_where_captions_are_silent() -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for index in range(60):
        scene = shapes.random_scene(0, index, "test")
        other = clip.exchanged(scene, rng)
        assert clip.web_facts(scene) == clip.web_facts(other)
        for a, b in zip(scene.objects, other.objects, strict=True):
            assert (a.x, a.y, a.pair, a.fill, a.size) == (b.x, b.y, b.pair, b.fill, b.size)
            assert a.direction != b.direction and (a.mark in shapes.LETTERS) == (b.mark in shapes.LETTERS)
            changed += a.mark != b.mark
    assert changed > 5


def test_crops_are_the_patches_around_an_object() -> None:
    tokens = torch.arange(clip.CELLS**2, dtype=torch.float32).view(1, -1, 1)
    found = clip.crops(tokens, torch.tensor([[0, 2, 3], [0, 0, 0]]))
    middle = 2 * clip.CELLS + 3
    wanted = [middle + dy * clip.CELLS + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert found[0].tolist() == wanted
    assert found[1].tolist() == [0, 0, 0, 0, 0, 1, 0, clip.CELLS, clip.CELLS + 1]


def test_a_difference_of_drawings_counts_by_its_axis_own_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(64, clip.CELLS**2, 6, generator=generator)
    other = scene.clone()
    other[..., 5] = torch.randn(scene.shape[:2], generator=generator)  # one axis that tells the drawings apart, and no scene
    objects = torch.tensor([[image, 3, 4, 0, 0] for image in range(64)])
    for scale in (1.0, 0.1):  # an axis of a hundredth of the others' variance is read as well by a linear probe
        size = torch.tensor([1.0] * 5 + [scale])
        share = float(clip.told_apart(torch.cat([scene, other]) * size, objects))
        assert 0.45 < share < 0.55, "of two independent values half of the variance lies within the pair"
    leaning = torch.cat([scene, other]) @ torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert float(clip.told_apart(leaning, objects)) == pytest.approx(
        float(clip.told_apart(torch.cat([scene, other]), objects)), rel=1e-3
    )
    assert float(clip.told_apart(torch.cat([scene, scene]), objects)) == 0
    size = torch.ones(6, requires_grad=True)
    clip.told_apart(torch.cat([scene, other]) * size, objects).backward()
    assert size.grad is not None and size.grad.abs().max() < 0.01, "shrinking an axis does not hide what it tells"


def test_a_reversed_gradient_is_turned_round() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (clip.Reversed.apply(x, 0.5) * torch.tensor([3.0, 4.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [-1.5, -2.0]


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
    found = clip.contrastive_loss(torch.from_numpy(logits), torch.from_numpy(true))
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_a_caption_is_true_of_scenes_that_differ_only_in_what_it_leaves_out() -> None:
    pair = measure.silent_pair("orientation", 0, 3)
    said = clip.say(pair.scenes[0], np.random.default_rng(1))
    assert said.is_true_of(pair.scenes[1])
    for pattern in measure.SILENT:
        a, b = measure.silent_pair(pattern, 0, 0).scenes
        assert clip.web_facts(a) == clip.web_facts(b), pattern
    for pattern in ("colour", "state", "structure", "presence"):
        a, b = measure.silent_pair(pattern, 0, 0).scenes
        assert clip.web_facts(a) != clip.web_facts(b), pattern
    partial = clip.Said("there is a red star", ("red", "star"))
    scenes = [shapes.random_scene(0, i) for i in range(300)]
    assert {partial.is_true_of(s) for s in scenes} == {True, False}
    assert all(partial.is_true_of(s) == any(o.colour == "red" and o.shape == "star" for o in s.objects) for s in scenes)


def test_patches_are_named_after_the_object_that_covers_them() -> None:
    for index in range(20):
        scene = shapes.random_scene(0, index, "test")
        target = clip.PatchNames.target(scene).reshape(4, clip.CELLS, clip.CELLS)
        masks = shapes.render(scene)[1]
        centres = ((np.arange(clip.CELLS) + 0.5) / clip.CELLS * shapes.SIDE).astype(int)
        covered = masks[:, centres][:, :, centres].any(0)
        assert not covered[target[0] == 0].any(), index
        for obj in scene.objects:
            colour = target[0][int(obj.y * clip.CELLS), int(obj.x * clip.CELLS)]
            assert colour in (-100, list(shapes.COLOURS).index(obj.colour) + 1)
        assert (target[0] > 0).sum() >= len(scene.objects) / 2


# --- shapes-lm ------------------------------------------------------------------------------------


def test_chat_template_marks_the_assistants_words(speaker: tuple[Any, Any]) -> None:
    tokenizer = speaker[1]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    talk = [
        {"role": "user", "content": "a red star.\nIs the star red or blue?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Is there a cross?"},
        {"role": "assistant", "content": "no"},
    ]
    ids, spoken = lm.encode(tokenizer, [talk, "a red star"])
    assert tokenizer.decode(ids[0][spoken[0].bool()]) == "red<|eos|> no<|eos|>"
    assert tokenizer.decode(ids[1][spoken[1].bool()], skip_special_tokens=True) == "a red star"
    prompt = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    assert ids[0, : len(prompt)].tolist() == prompt
    assert tokenizer.decode(prompt, skip_special_tokens=True) == talk[0]["content"]


def test_branches_in_one_row_are_read_as_talks_of_their_own(speaker: tuple[Any, Any]) -> None:
    """Tokens are the chat template's, and what a branch is told does not depend on the branches beside it."""
    model, tokenizer = speaker
    rng = np.random.default_rng(0)
    talks = [lm.talk(*lm.scene_and_questions(i, 0, rng), rng, repeats=1.0) for i in range(4)]
    for between in lm.BETWEEN:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm, "BETWEEN", (between,))
            packed = lm.pack(tokenizer, [*talks, "a red star"], rng, 0.1)
        with torch.no_grad():
            together = model(input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.attention()).logits
        for row, talk in enumerate(talks):
            for branch in (0, len(talk.branches) // 2, len(talk.branches) - 1):
                ids, spoken = lm.encode(tokenizer, [lm.turns(talk, branch, between)])
                own = (packed.branch[row] == 0) | (packed.branch[row] == branch + 1)
                assert packed.ids[row, own].tolist() == ids[0].tolist()
                assert packed.spoken[row, own].tolist() == spoken[0].bool().tolist()
                with torch.no_grad():
                    alone = model(input_ids=ids).logits[0]
                torch.testing.assert_close(together[row, own], alone, atol=1e-3, rtol=1e-3)
        ids, _ = lm.encode(tokenizer, ["a red star"])
        assert packed.ids[4, packed.branch[4] == 0].tolist() == ids[0].tolist()


def test_turns_count_by_the_root_of_their_length_and_no_branch_is_told_the_next(speaker: tuple[Any, Any]) -> None:
    tokenizer = speaker[1]
    talk = lm.Talk("red star.", [[("Is it?", "yes"), ("Which?", "red star")], [("Is it?", "no")]])
    packed = lm.pack(tokenizer, [talk, "a red star"], np.random.default_rng(0), 0.1)
    answers = [packed.weights[0, packed.spoken[0] & (packed.branch[0] == b)].tolist() for b in (1, 2)]
    assert answers == [pytest.approx([2**-0.5] * 2 + [3**-0.5] * 3), pytest.approx([2**-0.5] * 2)]
    assert packed.weights[1, packed.spoken[1]].tolist() == pytest.approx([0.5] * 4)
    for branch in (1, 2):  # the token before it in the row belongs to another text
        assert packed.weights[0, int((packed.branch[0] == branch).int().argmax())] == 0
    assert (packed.weights[1, 5:] == 0).all() and (packed.branch[1, 5:] == -1).all()


def test_what_a_lookup_finds_is_in_the_scene() -> None:
    rng = np.random.default_rng(0)
    nothing = 0
    for index in range(300):
        scene = shapes.random_scene(0, index)
        asked, found = lm.lookup(scene, rng)
        colours = [c for c in shapes.COLOURS if f" {c}" in asked]
        kinds = [s for s in shapes.SHAPES if s in asked]
        named = [o for o in scene.objects if o.colour in (colours or [o.colour]) and o.shape in (kinds or [o.shape])]
        assert colours or kinds
        if found == lm.NOTHING:
            nothing += 1
            assert not named, asked
            assert not (colours and kinds and shapes.held_out(colours[0], kinds[0])), "known by its name"
        else:
            obj = named[0]
            assert len(named) == 1
            assert found == (obj.size if colours and kinds else obj.shape if colours else obj.colour)
    assert 0.4 < nothing / 300 < 0.7


def test_what_is_restated_and_compared_is_true_and_settled() -> None:
    rng = np.random.default_rng(0)
    parts = 0
    answers: list[str] = []
    for index in range(200):
        scene = shapes.random_scene(0, index)
        for part in filter(None, lm.restated(scene, rng).split("; ")):
            name, rest = part.removeprefix("the ").split(": ")
            said = f" {name} {rest} "
            fits = [obj for obj in scene.objects if all(f" {value} " in said for value in shapes.facts(obj).values())]
            assert fits, (scene, part)
            assert sum(set(name.split()) <= set(" ".join(shapes.facts(obj).values()).split()) for obj in scene.objects) >= 1
            parts += 1
        talk = lm.studied(scene, rng, compare=True, checked=0.5)
        request, told = talk.branches[0][0]
        for part in told.split("; ") if request == lm.COMPARE else ():
            names, said = part.split(": ")
            if said in YES_NO:
                one, side, other = re.fullmatch(r"the (.*) (left of|right of|above|below) the (.*)", names).groups()  # type: ignore[union-attr]
                sides, size = [side if said == "yes" else shapes.RELATIONS[side]], ""
                answers.append(said)
            else:
                one, other = names.removeprefix("the ").split(" to the ")
                *sides, size = said.split(", ")
            one, other = (" ".join(name.split()[:2]) for name in (one, other))
            (a,), (b,) = ([o for o in scene.objects if f"{o.colour} {o.shape}" == name] for name in (one, other))
            assert size in ("", "as large" if a.size == b.size else "larger" if a.size == "large" else "smaller")
            for side in sides:
                axis, less = ("x", "left of") if side in ("left of", "right of") else ("y", "above")
                assert (side == less) == (getattr(a, axis) < getattr(b, axis))
                stated = any(
                    text in talk.described for text in (f"{one} {side} {other}", f"{other} {shapes.RELATIONS[side]} {one}")
                )
                cells = [int(getattr(o, axis) * 3) for o in (a, b)]
                assert stated or cells[0] != cells[1], "nothing is asked that the description leaves open"
            parts += 1
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
    assert parts > 500


def test_answers_asked_in_training_are_balanced() -> None:
    """Yes as often as no where that is all there is to say, also after drawing again and weighting."""
    rng = np.random.default_rng(0)
    yes: dict[str, list[bool]] = {}
    for index in range(400):
        scene, asked = lm.scene_and_questions(index, 0, rng)
        texts = [pair for branch in lm.talk(scene, asked, rng).branches for pair in branch]
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
            text = lm.describe(scene, [question], rng)
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


def test_a_linear_projector_teaches_the_frozen_lm_four_captions(speaker: tuple[Any, Any]) -> None:
    """Soft tokens from random features stand where the description stood; only the projector learns."""
    model, tokenizer = speaker
    torch.manual_seed(0)
    captions = [shapes.caption(shapes.random_scene(0, i, "test", 2), "relation").text for i in range(4)]
    features = torch.randn(4, 6, 32)  # six soft tokens an image
    projector = torch.nn.Linear(32, model.config.hidden_size)
    talks = [[{"role": "user", "content": "What is in the picture?"}, {"role": "assistant", "content": c}] for c in captions]
    ids, spoken = lm.encode(tokenizer, talks)
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
    assert loss.item() < 0.1  # .90 a token; what counts is that the captions come, below
    start = int(spoken[0].argmax()) + 6
    assert bool((spoken.argmax(1) == start - 6).all())
    said = model.generate(inputs_embeds=joined()[:, :start], max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert [tokenizer.decode(row, skip_special_tokens=True).strip() for row in said] == captions
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_perplexity_is_that_of_the_librarys_loss(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
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
    assert len({clip.web_facts(scene) for scene in scenes}) == 100
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
    assert "zoo_quality --model" in card.write_card(folder, "A model.", "Scenes.", []).read_text()


# --- reader ---------------------------------------------------------------------------------------


def test_reading_a_perfect_answer_gives_the_scene_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [shapes.random_scene(0, i, "test") for i in range(12)]
    wanted = torch.from_numpy(np.stack([reader.target(scene) for scene in scenes]))
    perfect = torch.zeros(len(scenes), 3 + sum(map(len, FACTORS.values())), *wanted.shape[2:])
    perfect[:, 0] = torch.where(wanted[:, 0] == 1, 8.0, -8.0)
    perfect[:, 1:3] = wanted[:, 1:3]
    start = 3
    for row, values in enumerate(FACTORS.values(), 3):
        perfect[:, start : start + len(values)].scatter_(1, wanted[:, row : row + 1].long().clamp(min=0), 9.0)
        start += len(values)
    network = Reader()
    monkeypatch.setattr(network, "forward", lambda pixels: perfect)
    for scene, found in zip(scenes, network.read(torch.zeros(12, 3, 64, 64)), strict=True):
        assert len(found) == len(scene.objects)
        for obj in scene.objects:
            near = min(found, key=lambda one: abs(one.x - obj.x) + abs(one.y - obj.y))
            assert abs(near.x - obj.x) + abs(near.y - obj.y) < 1e-5
            assert (near.colour, near.shape, near.fill, near.size, near.mark) == (
                obj.colour, obj.shape, obj.fill, obj.size, obj.mark,
            )  # fmt: skip
            assert near.direction == obj.direction or obj.shape not in shapes.DIRECTED
    losses = [float(reader.reading_loss(output, wanted)) for output in (perfect, torch.zeros_like(perfect))]
    assert losses[0] < 0.05 < losses[1]


def test_roughened_images_stay_images_and_differ() -> None:
    pixels = common.drawn_batch([shapes.random_scene(0, i) for i in range(3)])
    for seed in range(4):
        rough = reader.roughened(pixels, np.random.default_rng(seed))
        assert rough.shape == pixels.shape
        assert rough.abs().max() <= 1
        assert 0 < float((rough - pixels).abs().mean()) < 0.3


def test_drawn_details_are_restatements() -> None:
    """A language model reads them as it learnt to, so they must come in its words and their order."""
    data, scenes = load_conversations("shapes-details:60"), ShapesDataset(60, "train")
    said = 0
    for index in range(60):
        ((request, text),) = data[index].turns
        if request != lm.RESTATE:
            assert shapes.all_alike(scenes.scene(index)) or request in REQUESTS.values()
            continue
        every = [shapes.facts(obj) for obj in scenes.scene(index).objects]
        pairs = [(one["colour"], one["shape"]) for one in every]
        wanted = {
            f"the {one['colour']} {one['shape']}: {shapes.said(one, one.keys() - {'colour', 'shape'})}"
            for one, pair in zip(every, pairs, strict=True)
            if pairs.count(pair) == 1
        }
        assert set(text.split("; ")) == wanted
        said += len(wanted)
    assert said > 60


def test_how_a_scene_is_seen_is_asked_in_two_ways() -> None:
    rng = np.random.default_rng(0)
    asked = [lm.viewpoint_question(replace(shapes.random_scene(0, 0), zoom=zoom), rng) for zoom in (1.0, FAR) * 40]
    for question, zoom in zip(asked, (1.0, FAR) * 40, strict=True):
        seen = "close" if zoom == 1 else "from far away"
        assert question.answer in question.options
        if question.options == YES_NO:
            assert (question.answer == "yes") == question.text.endswith(f"seen {seen}?")
        else:
            assert question.answer == seen and all(option in question.text for option in question.options)
    assert {question.answer for question in asked} == {"yes", "no", "close", "from far away"}
