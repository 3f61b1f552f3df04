"""What shapes-clip and shapes-lm can do, on scenes that they never saw: rows with n, 95% interval and chance.

A row is a dict of what, value, low, high, n and chance; rows of a model's card and of ``experiments/zoo_quality.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, LlamaForCausalLM, PreTrainedTokenizerFast

from diffprobe.data import ShapesDataset, shapes
from diffprobe.data.questions import questions
from diffprobe.data.samples import Question
from diffprobe.data.twins import PATTERNS, Pair, mmvp_pair
from diffprobe.stats import bootstrap_interval, wilson_interval
from recipes import clip, lm

Row = dict[str, Any]
SILENT = ("orientation", "quantity", "position", "text")
"""Patterns of which shapes-clip's captions say nothing (quantity: of more than two)."""


def share(what: str, hits: Sequence[bool], chance: float, clusters: Sequence[int] | None = None, **more: Any) -> Row:
    """A share of hits with Wilson's interval, or the clustered bootstrap's where decisions belong together."""
    together = clusters is not None and len(set(clusters)) < len(hits)
    low, high = bootstrap_interval(hits, clusters) if together else wilson_interval(sum(hits), len(hits))
    return {"what": what, "value": float(np.mean(hits)), "low": low, "high": high, "n": len(hits), "chance": chance, **more}


def mean(what: str, values: Sequence[float], clusters: Sequence[int] | None = None, **more: Any) -> Row:
    """A mean without a chance level, with its bootstrap interval."""
    low, high = bootstrap_interval(values, clusters)
    found = {"value": float(np.mean(values)), "low": low, "high": high}
    return {"what": what, **found, "n": len(values), "chance": math.nan, **more}


# --- shapes-clip ----------------------------------------------------------------------------------


@torch.no_grad()
def clip_images(model: CLIPModel, processor: CLIPProcessor, scenes: Sequence[shapes.Scene]) -> np.ndarray:
    """Unit image vectors (scene, width)."""
    parts = []
    for start in range(0, len(scenes), 64):
        images = [Image.fromarray(shapes.render(scene)[0]) for scene in scenes[start : start + 64]]
        found = model.get_image_features(**processor.image_processor(images, return_tensors="pt").to(model.device))
        parts.append(found.pooler_output.float().cpu().numpy())
    vectors = np.concatenate(parts)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@torch.no_grad()
def clip_texts(model: CLIPModel, processor: CLIPProcessor, texts: Sequence[str]) -> np.ndarray:
    """Unit text vectors (text, width)."""
    tokens = processor.tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    found = model.get_text_features(**tokens.to(model.device)).pooler_output.float().cpu().numpy()
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def distinct_scenes(count: int, seed: int, first: int = 0) -> list[shapes.Scene]:
    """Held-out scenes, from index `first` on, of which captions of style "web" say different things."""
    found: dict[tuple[object, ...], shapes.Scene] = {}
    index = first
    while len(found) < count:
        scene = shapes.random_scene(seed, index, "test")
        found.setdefault(clip.web_facts(scene), scene)
        index += 1
    return list(found.values())


def silent_pair(pattern: str, seed: int, index: int) -> Pair:
    """MMVP-like pair number `index` of a pattern; those of quantity have more than two objects on both sides."""
    if pattern != "quantity":
        return mmvp_pair(seed, PATTERNS.index(pattern) + len(PATTERNS) * index)
    many: list[Pair] = []
    number = 0
    while len(many) <= index:
        pair = mmvp_pair(seed, PATTERNS.index(pattern) + len(PATTERNS) * number)
        many += [pair] if min(len(scene.objects) for scene in pair.scenes) > 2 else []
        number += 1
    return many[index]


def clip_rows(model: CLIPModel, processor: CLIPProcessor, count: int, seed: int = 0) -> Iterator[Row]:
    """Retrieval among 100 scenes, cosines of pairs that differ in one thing, and the choice between their images.

    Args:
        count: Scenes for retrieval (in galleries of 100), and pairs a pattern.
    """
    to_text, to_image = [], []
    for gallery in range(max(1, count // 100)):
        scenes = distinct_scenes(100, seed, 1000 * gallery)
        captions = clip_texts(model, processor, [shapes.caption(scene, "web").text for scene in scenes])
        scores = clip_images(model, processor, scenes) @ captions.T
        to_text += (scores.argmax(1) == np.arange(100)).tolist()
        to_image += (scores.argmax(0) == np.arange(100)).tolist()
    yield share("CLIP: image from caption, of 100", to_image, 0.01)
    yield share("CLIP: caption from image, of 100", to_text, 0.01)
    for pattern in PATTERNS:
        pairs = [silent_pair(pattern, seed, index) for index in range(count)]
        a, b = (clip_images(model, processor, [pair.scenes[side] for pair in pairs]) for side in (0, 1))
        said = "silent" if pattern in SILENT else "said or seen"
        yield mean(f"CLIP: cosine of images, {pattern}", (a * b).sum(1).tolist(), kind=said)
        hits: list[bool] = []
        for side in (0, 1):
            words = clip_texts(model, processor, [pair.captions[side].text for pair in pairs])
            own, other = ((a, b), (b, a))[side]
            hits += ((own * words).sum(1) > (other * words).sum(1)).tolist()
        clusters = [*range(count), *range(count)]
        yield share(f"CLIP: choice of image, {pattern}", hits, 0.5, clusters, kind=said)


# --- shapes-lm ------------------------------------------------------------------------------------


@torch.no_grad()
def token_losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, talks: Sequence[Any]) -> list[np.ndarray]:
    """Natural-log losses of the tokens that the assistant speaks, or of a bare caption's, for each text."""
    ids, spoken = lm.encode(tokenizer, talks)
    losses = torch.nn.functional.cross_entropy(
        model(input_ids=ids.to(model.device)).logits[:, :-1].float().transpose(1, 2).cpu(), ids[:, 1:], reduction="none"
    )
    return [row[own].numpy() for row, own in zip(losses, spoken[:, 1:].bool(), strict=True)]


def perplexity(what: str, losses: Sequence[np.ndarray]) -> Row:
    """exp of the mean loss a token, its interval by resampling texts."""
    values = np.concatenate(losses)
    found = mean(what, values.tolist(), np.repeat(np.arange(len(losses)), [len(text) for text in losses]).tolist())
    return {**found, **{end: math.exp(found[end]) for end in ("value", "low", "high")}}


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], longest: int = 12
) -> list[tuple[str, bool]]:
    """Greedy answers to user turns, and whether each came to its end."""
    found: list[tuple[str, bool]] = []
    for start in range(0, len(prompts), 64):
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 64]]
        tokens = tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        tokens.pop("token_type_ids", None)
        output = model.generate(**tokens, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for row in output[:, tokens["input_ids"].shape[1] :]:
            found.append((tokenizer.decode(row, skip_special_tokens=True).strip(), bool((row == tokenizer.eos_token_id).any())))
    return found


def held_out_questions(count: int, seed: int) -> Iterator[tuple[int, shapes.Scene, Question]]:
    """Scene number, scene and question: `count` test scenes with all that is asked of them, then as many twins."""
    dataset = ShapesDataset(count, "test", seed)
    for index in range(count):
        scene = dataset.scene(index)
        for question in questions(scene, seed):
            yield index, scene, question
    for index in range(count):
        pair = mmvp_pair(seed, index)
        for question in pair.questions[index % 2]:
            yield count + index, pair.scenes[index % 2], replace(question, category=f"MMVP-like {question.category}")


def lm_rows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> Iterator[Row]:
    """Perplexity, and greedy answers to questions about a full description: right ones by category, and well-formed ones.

    Chance is one over the options; the control reads the description of another scene.

    Args:
        count: Held-out scenes, and twins.
    """
    rng = np.random.default_rng([seed, 5])
    scenes = [shapes.random_scene(seed, index, "test") for index in range(count)]
    captions = [shapes.caption(scene, style).text for scene in scenes for style in shapes.CAPTION_STYLES]
    losses = token_losses(model, tokenizer, captions)
    grouped = [np.concatenate(losses[i : i + 7]) for i in range(0, len(losses), len(shapes.CAPTION_STYLES))]
    yield perplexity("LM: perplexity of captions", grouped)
    asked = list(held_out_questions(count, seed))
    described = [lm.describe(scene, [question], rng) for _, scene, question in asked]
    talks = [
        [{"role": "user", "content": f"{text} {q.text}"}, {"role": "assistant", "content": q.answer}]
        for text, (_, _, q) in zip(described, asked, strict=True)
    ]
    numbers = [number for number, _, _ in asked]
    losses = [loss for start in range(0, len(talks), 64) for loss in token_losses(model, tokenizer, talks[start : start + 64])]
    by_scene = [np.concatenate([x for x, n in zip(losses, numbers, strict=True) if n == one]) for one in dict.fromkeys(numbers)]
    yield perplexity("LM: perplexity of answers", by_scene)
    said = answers(model, tokenizer, [f"{text} {q.text}" for text, (_, _, q) in zip(described, asked, strict=True)])
    shapely = [ended and text in q.options for (text, ended), (_, _, q) in zip(said, asked, strict=True)]
    yield share("LM: answer is one of the options and ends", shapely, math.nan, numbers)
    right = [text == q.answer for (text, _), (_, _, q) in zip(said, asked, strict=True)]
    categories = list(dict.fromkeys(q.category for _, _, q in asked))
    for category in categories:
        rows = [i for i, (_, _, q) in enumerate(asked) if q.category == category]
        chance = float(np.mean([1 / len(asked[i][2].options) for i in rows]))
        # counts ask up to twice about a scene; all other categories once
        yield share(f"LM: {category}", [right[i] for i in rows], chance, [numbers[i] for i in rows])
    turned = described[len(described) // 2 :] + described[: len(described) // 2]
    wrong = answers(model, tokenizer, [f"{text} {q.text}" for text, (_, _, q) in zip(turned, asked, strict=True)])
    hits = [text == q.answer for (text, _), (_, _, q) in zip(wrong, asked, strict=True)]
    chance = float(np.mean([1 / len(q.options) for _, _, q in asked]))
    yield share("LM: all, given another scene's description", hits, chance, numbers)
