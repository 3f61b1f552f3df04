"""Conversations and drawn answers: what the language model reads is its template's own; draws follow the formula."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffprobe.mllm.chat import Chat, converse
from diffprobe.mllm.config import GREEDY, Sampling
from diffprobe.mllm.language import LanguageModel, build_inputs, generate
from diffprobe.mllm.model import FusedMLLM
from tests.test_fused import Make, build, shade

SHORT = {"max_new_tokens": 6}
HISTORY = [("Is it bright?", "yes"), ("And now?", "a star")]


def test_a_conversation_is_written_as_its_template_does(language: Make) -> None:
    """Between the first turn's soft tokens and the answer stands what the tokenizer's own template writes."""
    model = language()
    soft = torch.randn(2, 3, model.width)
    rows = build_inputs(model, soft, ["Sure?", "Sure?"], histories=[HISTORY, []])
    messages = [
        {"role": role, "content": text} for turn in HISTORY for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages[0]["content"] = "<image>\nIs it bright?"
    text = model.tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "Sure?"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (model.tokenizer(part, add_special_tokens=False).input_ids for part in text.split("<image>"))
    expected = torch.cat([model.embeddings(torch.tensor(before)), soft[0], model.embeddings(torch.tensor(after))])
    assert torch.equal(rows.embeddings[0], expected) and rows.mask[0].all() and not rows.mask[1].all()
    plain = LanguageModel(model.model, model.tokenizer, template="plain")
    with pytest.raises(ValueError, match="one caption an image; this conversation has 3 turns"):
        plain.prompt("Sure?", True, HISTORY)
    assert LanguageModel(model.model, model.tokenizer, template="v1").prompt("c", True, [("a", "b")])[1] == (
        model.tokenizer("\na ASSISTANT: b<|end|>USER: c ASSISTANT:", add_special_tokens=False).input_ids
    )


def by_hand(model: FusedMLLM, image: Image.Image, question: str, history: list[tuple[str, str]]) -> str:
    """The likeliest token again and again, each from a whole pass in float64 without a cache."""
    from diffprobe.mllm.streams import Picture

    network = model.language.model.double()
    before, after = model.language.prompt(question, True, history)
    soft = model.see([Picture.of(image)], [question])[0]
    said: list[int] = []
    for _ in range(SHORT["max_new_tokens"]):
        text = [model.language.embeddings(torch.tensor(ids)) for ids in (before, after + said)]
        logits = network(inputs_embeds=torch.cat([text[0], soft.double(), text[1]])[None]).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == model.language.tokenizer.eos_token_id:
            break
    network.float()
    return str(model.language.tokenizer.decode(said, skip_special_tokens=True)).strip()


@torch.no_grad()
def test_each_turn_sees_the_image_under_its_own_question(fresh_language: Make) -> None:
    model = build(fresh_language(("yes", "no")))
    seen = model.streams.encoders["diffusion"].prompts_seen  # type: ignore[attr-defined]
    chat, image = Chat(model, [shade(True, 3)], max_new_tokens=6), shade(True, 3)
    said: list[tuple[str, str]] = []
    for question in ("is it bright?", "and then?", "is it bright?"):
        del seen[:]
        expected = by_hand(model, image, question, said)
        assert seen == [None, question]
        del seen[:]
        said.append((question, chat.ask(question)))
        assert said[-1][1] == expected and seen == [None, question] and chat.turns == said
    assert len({answer for _, answer in said}) > 1, "the history is read"
    chat.reset()
    assert chat.ask("is it bright?") == said[0][1] and len(chat.turns) == 1
    together = model.answer([[image]] * 3, [q for q, _ in said], histories=[said[:k] for k in range(3)], **SHORT)
    assert together == [answer for _, answer in said]
    with pytest.raises(ValueError, match="1 questions and 2 histories do not match"):
        model.answer([[image]], ["?"], histories=[[], []])


def test_what_cannot_be_read_any_more_is_forgotten(fresh_language: Make) -> None:
    model = build(fresh_language(("yes", "no")))
    model.fusion.eval()
    prompt = model.language.prompt("is it bright?")
    one = sum(map(len, prompt)) + model.soft_tokens + 6
    chat = Chat(model, [shade(True, 0)], max_new_tokens=6)
    model.language.model.config.max_position_embeddings = one
    first = chat.ask("is it bright?")
    assert chat.ask("is it bright?") == first and chat.forgotten == 1 and len(chat.turns) == 1
    model.language.model.config.max_position_embeddings = 10 * one
    chat.ask("is it bright?")
    assert chat.forgotten == 1 and len(chat.turns) == 2


# --- drawn answers --------------------------------------------------------------------------------


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The probabilities of tokens, from the definition: the fewest likeliest ones whose share reaches top_p."""
    shares = np.exp((logits - logits.max()) / temperature)
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(shares[order]), top_p)) + 1]
    found = np.zeros_like(shares)
    found[kept] = shares[kept] / shares[kept].sum()
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (3.0, 0.5)])
@torch.no_grad()
def test_drawn_tokens_have_the_probabilities_of_the_formula(language: Make, temperature: float, top_p: float) -> None:
    model = language()
    row = build_inputs(model, torch.randn(1, 3, model.width, generator=torch.Generator().manual_seed(1)), ["Is it?"])
    logits = model.model.double()(inputs_embeds=row.embeddings.double()).logits[0, -1].numpy()
    model.model.float()
    expected = nucleus(4 * logits, temperature, top_p)
    n = 3000
    many = build_inputs(
        model, torch.randn(1, 3, model.width, generator=torch.Generator().manual_seed(1)).repeat(n, 1, 1), ["Is it?"] * n
    )
    head = model.model.get_output_embeddings()
    sharpened = head.register_forward_hook(lambda *parts: 4 * parts[2])  # fresh weights would give nearly even probabilities
    spoken: list[int] = []
    decode = model.tokenizer.batch_decode
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                model.tokenizer,
                "batch_decode",
                lambda ids, **options: spoken.extend(ids[:, 0].tolist()) or decode(ids, **options),
            )
            generate(model, many, 1, Sampling(temperature, top_p, seed=4))
    finally:
        sharpened.remove()
    shares = np.bincount(spoken, minlength=len(expected)) / n
    assert shares[expected == 0].sum() == 0
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all()
    assert (expected > 0).sum() > 1, "something is drawn"


def test_draws_belong_to_the_question_and_the_seed(language: Make) -> None:
    model = build(language(("yes", "no")))
    images, questions = [[shade(k % 2 == 0, k)] for k in range(4)], ["is it bright?", "?", "is it?", "and now?"]
    state = torch.get_rng_state()
    hot = Sampling(3.0, 1.0, 7)
    said = model.answer(images, questions, sampling=hot, **SHORT)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's draws change"
    assert model.answer(images[::-1], questions[::-1], sampling=hot, **SHORT) == said[::-1]
    assert model.answer(images[2:3], questions[2:3], sampling=hot, **SHORT) == said[2:3]
    assert model.answer(images, questions, sampling=Sampling(3.0, 1.0, 8), **SHORT) != said
    greedy = model.answer(images, questions, **SHORT)
    assert model.answer(images, questions, sampling=Sampling(1e-4), **SHORT) == greedy != said
    assert model.answer(images, questions, sampling=Sampling(3.0, 1e-9), **SHORT) == greedy and Sampling() == GREEDY


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, 1.1), (0.0, 0.9)]
)
def test_settings_that_draw_nothing_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match=r"temperature"):
        Sampling(temperature, top_p)


# --- typed ----------------------------------------------------------------------------------------


def test_commands_of_a_conversation(language: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, told = Chat(build(language(("yes", "no"))), [shade(True, 0)], max_new_tokens=3), []
    shade(False, 0).save(tmp_path / "dark one.png")
    drawn: list[Any] = []
    monkeypatch.setattr("diffprobe.mllm.chat.save_attention", lambda *given: drawn.append(given[1:]) or "heat.png")
    lines = [
        "/attention heat.png", "is it bright?\n", "", "and now?", "/attention heat.png", f"/image '{tmp_path / 'dark one.png'}'",
        "is it bright?", "/image absent.png", "/reset", "/imge a.png", "/image 'a", "/help", "/quit", "not asked",
    ]  # fmt: skip
    converse(chat, lines, told.append)
    fresh = Chat(chat.model, [shade(True, 0)], max_new_tokens=3)
    first, second = fresh.ask("is it bright?"), fresh.ask("and now?")
    dark = Chat(chat.model, [shade(False, 0)], max_new_tokens=3).ask("is it bright?")
    assert told[:4] == ["Nothing was asked yet; ask first, then draw.", first, second, "Drew heat.png"]
    assert told[4].endswith("dark one.png.") and told[5] == dark and "absent.png' does not exist" in told[6]
    assert told[7] == "Forgotten." and told[8].startswith("'/imge a.png' cannot be done. Did you mean '/image'?\n/image FILE")
    assert told[9] == "No closing quotation" and told[10].startswith("/image FILE ...") and len(told) == 11
    assert drawn == [(chat.images[0], "and now?", second, "heat.png")] or drawn[0][1:] == ("and now?", second, "heat.png")
    assert not chat.turns and chat.images[0].size == shade(False, 0).size


def test_a_conversation_is_read_from_a_pipe(
    language: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    model = build(language(("yes", "no")))
    monkeypatch.setattr("diffprobe.mllm.model.FusedMLLM.from_pretrained", lambda folder, device: model)
    shade(True, 0).save(tmp_path / "a.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("is it bright?\nand now?\n/reset\n"))
    code, said, _ = run("mllm", "chat", "run", tmp_path / "a.png", "--max-new-tokens", "3")
    chat = Chat(model, [shade(True, 0)], max_new_tokens=3)
    assert code == 0 and said.splitlines() == [chat.ask("is it bright?"), chat.ask("and now?"), "Forgotten."]
    hot = ("--temperature", "3", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "3")
    code, said, _ = run("mllm", "chat", "run", tmp_path / "a.png", "and now?", *hot)
    assert code == 0 and said.strip() == Chat(model, [shade(True, 0)], Sampling(3.0, 0.9, 5), 3).ask("and now?")
    for options, message in (
        (("--top-p", "0.5"), "nothing is drawn at a temperature of 0"),
        (("--attention", tmp_path / "heat.png"), "in a conversation, type /attention NAME.png"),
    ):
        code, _, errors = run("mllm", "chat", "run", tmp_path / "a.png", *options)
        assert code == 2 and message in errors and errors.count("\n") == 1
