"""Projector and its training: laid out as the language model would read it, resumable bit for bit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffprobe.mllm.config import TrainConfig
from diffprobe.mllm.language import (
    LanguageModel,
    answer_losses,
    build_inputs,
    generate_texts,
    load_language_model,
    log_likelihood,
)
from diffprobe.mllm.projector import Projector, soft_tokens
from diffprobe.mllm.train import Captioned, batch_of, read_checkpoint, train_projector

Make = Callable[..., LanguageModel]
TEXTS = ["a red star", "", "赤い星が左にある", "une étoile " * 30]  # empty, other scripts, long


def data(count: int = 24, seed: int = 0) -> Captioned:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(3, 2, (count, 4, 6)).astype(np.float32))
    return Captioned(features, [TEXTS[k % 4][:20] for k in range(count)], features - 1)


# --- the projector ------------------------------------------------------------------------------


def test_moments_are_those_of_numpy() -> None:
    features = data().features * torch.tensor([1, 10, 100, 1e-3, 1, 1]) + torch.tensor([0.0, 5, -900, 0, 0, 0])
    features[..., 5] = 7.0
    projector = Projector(6, 8, "linear")
    projector.standardise(features)
    flat = features.reshape(-1, 6).double().numpy()
    assert np.allclose(projector.mean, flat.mean(0), rtol=1e-5) and np.allclose(projector.std[:5], flat.std(0)[:5], rtol=1e-5)
    moved = features.clone()
    moved[..., 5] += 3  # a channel that never changed in training says nothing later
    assert torch.equal(projector(features), projector(moved))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    projector = Projector(6, 8, kind, rms=0.3)
    projector.standardise(data().features)
    projector.save(tmp_path)
    assert torch.equal(Projector.load(tmp_path)(data().features), projector(data().features))
    path = tmp_path / "projector.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"projector\.safetensors is not what was written"):
        Projector.load(tmp_path)
    assert 0.15 < float(projector(data().features).detach().square().mean().sqrt()) < 0.6  # as large as token embeddings


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mlp' is not one of linear, mlp2x_gelu"):
        Projector(6, 8, "mlp")
    with pytest.raises(ValueError, match="takes 6 channels; the features have 4"):
        Projector(6, 8)(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="holds no projector"):
        Projector.load(tmp_path)


def test_tokens_are_means_of_places_row_by_row() -> None:
    values = torch.randn(2, 3, 8, 12)
    tokens = soft_tokens(values, 4)
    naive = values.reshape(2, 3, 4, 2, 4, 3).mean((3, 5)).reshape(2, 3, 16).transpose(1, 2)
    assert torch.allclose(tokens, naive, atol=1e-6)


# --- layout against the language model itself -----------------------------------------------------


def naive_losses(language: LanguageModel, picture: list[int], request: str, caption: str) -> torch.Tensor:
    """Losses of a caption when the picture is ordinary tokens, one text alone and without padding."""
    before, after = language.prompt(request)
    answer = language.answer(caption)
    ids = torch.tensor([[*before, *picture, *after, *answer]])
    logits = language.model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[-len(answer) :]


def test_rows_equal_single_texts_without_padding(language: Make) -> None:
    model = language()
    pictures = torch.randint(3, 200, (4, 5))
    requests = ["What?", "Describe the image in many words.", "?", "What?"]
    rows = build_inputs(model, model.embeddings(pictures), requests, [model.answer(text) for text in TEXTS])
    losses = answer_losses(model, rows)
    for row, text in enumerate(TEXTS):
        alone = naive_losses(model, pictures[row].tolist(), requests[row], text)
        assert torch.allclose(losses[row, : len(alone)], alone, atol=1e-4)
        assert (losses[row, len(alone) :] == 0).all()  # padding is the end token's number, and yet not counted


def test_likelihood_equals_the_losses(language: Make) -> None:
    model, projector = language(), Projector(6, 32)
    features = data(2).features
    asked = [TEXTS, TEXTS[::-1]]
    found, lengths = log_likelihood(model, projector, features, asked, "What?", batch=3)
    for row in range(2):
        for column, text in enumerate(asked[row]):
            rows = build_inputs(model, projector(features[row : row + 1]), ["What?"], [model.answer(text)])
            assert found[row, column] == pytest.approx(-float(answer_losses(model, rows).detach().sum()), abs=1e-3)
            assert lengths[row, column] == len(model.answer(text))
    with pytest.raises(ValueError, match="equally many candidates"):
        log_likelihood(model, projector, features, [["a"], ["a", "b"]])


def test_generated_in_batches_as_one_by_one(language: Make) -> None:
    model, projector = language(), Projector(6, 32, rms=3.0)
    features = data(5).features
    requests = ["?", "Describe the image in many, many words.", "What?", "?", "Say it."]
    together = generate_texts(model, projector, features, requests, max_new_tokens=6, batch=3)
    alone = [generate_texts(model, projector, features[k : k + 1], requests[k], max_new_tokens=6)[0] for k in range(5)]
    assert together == alone and len(set(together)) > 1


def test_template_and_names(language: Make, tmp_path: Path) -> None:
    model = language()
    before, after = model.prompt("What?")
    assert model.tokenizer.decode(before) == "<|user|>" and model.tokenizer.decode(after) == "\nWhat?<|end|><|assistant|>"
    assert model.answer("", 4) == [model.tokenizer.eos_token_id] and len(model.answer("a" * 99, 4)) == 5
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path, "cpu")
    assert torch.equal(loaded.embeddings.weight, model.embeddings.weight) and loaded.prompt("What?") == model.prompt("What?")
    with pytest.raises(ValueError, match="No language model at"):
        load_language_model(tmp_path / "absent")


# --- LLaVA's formats against its own preprocessing --------------------------------------------------

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TALKS = [
    [("What is it?", "a red star")],
    [("What is it?", "a red star"), ("Where?", "on the left."), ("Sure?", "Yes")],
    [("the red", "star\n\nUSER said: the star"), ("the  star", "the\n")],
]


def vicuna(legacy: bool) -> Any:
    """A tokenizer of Vicuna's kind: pieces with their spaces in front, bytes, BOS; legacy ones put a space after </s>."""
    import string

    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *string.ascii_letters, *".,:?!'"]
    merges = []
    for word in ("\u2581red", "\u2581star", "\u2581the", "US", "ER", "ASS", "IST", "ANT"):
        for cut in range(1, len(word)):
            merges.append((word[:cut], word[cut]))
            pieces.append(word[: cut + 1])
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return LlamaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), legacy=legacy, add_bos_token=True)


def spoken(tokenizer: Any, template: str, turns: list[tuple[str, str]], image: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation as a stage lays them out; -200 stands for the image."""

    class Bare(torch.nn.Module):
        get_input_embeddings = staticmethod(lambda: torch.nn.Embedding(1, 1))

    language = LanguageModel(Bare(), tokenizer, "vicuna", template)
    before, after = language.prompt(turns[0][0], image)
    ids, labels = language.answers(turns, image=image)
    prompt = [*before, *([-200] if image else []), *after]
    return [*prompt, *ids], [*([-100] * len(prompt)), *labels]


def llava_tokens(text: str, tokenizer: Any) -> list[int]:
    """Chunks around the image, each tokenised by itself, all but the first without their BOS."""
    first, *others = [tokenizer(chunk).input_ids for chunk in text.split("<image>")]
    return [*first, *(token for chunk in others for token in (-200, *chunk[1:]))]


def llava_v1(turns: list[tuple[str, str]], tokenizer: Any, image: bool) -> tuple[list[int], list[int]]:
    """What LLaVA's preprocess_v1 does (train.py of LLaVA 1.2): rounds are counted in tokens, each with a BOS of its own."""
    asked = [f"<image>\n{turns[0][0]}" if image else turns[0][0], *(question for question, _ in turns[1:])]
    text = f"{SYSTEM} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, (_, a) in zip(asked, turns, strict=True))
    count = llava_tokens if image else lambda part, tokenizer: tokenizer(part).input_ids
    ids = count(text, tokenizer)
    labels, place = list(ids), 1
    labels[0] = -100
    for number, part in enumerate(text.split("</s>")[:-1]):
        question = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        less = number > 0 and not tokenizer.legacy  # no space follows the end token there
        asked_for = len(count(question, tokenizer)) - 2 - less
        labels[place : place + asked_for] = [-100] * asked_for
        place += len(count(part, tokenizer)) - less
    assert place == len(ids), "LLaVA would leave this conversation out"
    return ids, labels


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("turns", TALKS)
def test_v1_is_token_for_token_llava_s(turns: list[tuple[str, str]], image: bool, legacy: bool) -> None:
    tokenizer = vicuna(legacy)
    ids, labels = spoken(tokenizer, "v1", turns, image)
    assert (ids, labels) == llava_v1(turns, tokenizer, image)


def test_v1_spelt_out() -> None:
    for legacy in (True, False):
        tokenizer = vicuna(legacy)
        ids, labels = spoken(tokenizer, "v1", [("the?", "red star"), ("star", "the")], True)
        space = ["\u2581"] * legacy
        tail = [
            "\u2581", "<0x0A>", "t", "h", "e", "?", "\u2581", "ASS", "IST", "ANT", ":", "\u2581red", "\u2581star", "</s>",
            *space, "US", "ER", ":", "\u2581star", "\u2581", "ASS", "IST", "ANT", ":", "\u2581the", "</s>",
        ]  # fmt: skip
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.convert_ids_to_tokens(ids[ids.index(-200) + 1 :]) == tail
        learnt = [token for token in labels if token != -100]
        assert tokenizer.convert_ids_to_tokens(learnt) == ["\u2581red", "\u2581star", "</s>", "\u2581the", "</s>"]


@pytest.mark.parametrize("legacy", [True, False])
def test_plain_captions_are_token_for_token_llava_s(legacy: bool) -> None:
    tokenizer = vicuna(legacy)
    ids, labels = spoken(tokenizer, "plain", [("Describe it.", "the red star")], True)
    assert ids == llava_tokens("<image>the red star\n", tokenizer)
    assert labels == [-100, -100, *ids[2:]]
    with pytest.raises(ValueError, match="plain format has one caption"):
        spoken(tokenizer, "plain", TALKS[1], True)


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [LLAMA2, MISTRAL])
@pytest.mark.parametrize("turns", TALKS)
def test_templates_with_a_space_before_the_answer(template: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = vicuna(False)
    tokenizer.chat_template = template
    ids, labels = spoken(tokenizer, "", turns, False)
    said = [{"role": r, "content": text} for turn in turns for r, text in zip(("user", "assistant"), turn, strict=True)]
    assert ids == tokenizer(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False).input_ids
    learnt = "".join(tokenizer.convert_ids_to_tokens([token for token in labels if token != -100]))
    marked = "".join(
        f" {answer.strip() if template == LLAMA2 else answer}{' ' * (template == LLAMA2)}</s>" for _, answer in turns
    )
    assert learnt.replace("\u2581", " ").replace("<0x0A>", "\n") == marked


def test_a_tokenizer_without_a_template_is_refused(language: Make, tmp_path: Path) -> None:
    model = language()
    model.model.save_pretrained(tmp_path)
    vicuna(False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no chat template.*v1 .*plain"):
        load_language_model(tmp_path, "cpu")
    assert load_language_model(tmp_path, "cpu", template="v1").template == "v1"
    with pytest.raises(ValueError, match="'vicuna' is not one of v1, plain"):
        load_language_model(tmp_path, "cpu", template="vicuna")


# --- training -----------------------------------------------------------------------------------------


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "loss.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_interrupted_training_ends_in_the_same_weights(language: Make, tmp_path: Path) -> None:
    config = TrainConfig(steps=8, batch=8, accumulate=2, dropout=0.3, evaluate_every=2, patience=0)

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("step 4"):
            raise Stop

    train_projector(language(), data(), data(6, 1), tmp_path / "whole", config)
    with pytest.raises(Stop):
        train_projector(language(), data(), data(6, 1), tmp_path / "cut", config, log=stop)
    assert (tmp_path / "cut" / "checkpoint.pt").exists() and not (tmp_path / "cut" / "projector.safetensors").exists()
    train_projector(language(), data(), data(6, 1), tmp_path / "cut", config)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "cut")) == 8
    files = [(tmp_path / name / "projector.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def flat(value: Any) -> list[Any]:
    """A nested value as a list that can be compared; tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, value.shape, value.numpy().tobytes()]
    if isinstance(value, dict | list):
        return [
            part
            for one in (value.items() if isinstance(value, dict) else value)
            for part in flat(list(one) if isinstance(one, tuple) else one)
        ]
    return [repr(value)]


def test_a_damaged_checkpoint_is_found(language: Make, tmp_path: Path) -> None:
    """Whatever single byte changes, the checkpoint is refused or holds what was written."""
    config = TrainConfig(steps=4, batch=8, evaluate_every=2, patience=0)

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        train_projector(language(), data(), data(6, 1), tmp_path, config, log=stop)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    written = read_checkpoint(path)
    refused, places = 0, {*range(0, len(whole), len(whole) // 150), *range(len(whole) - 120, len(whole))}
    for place in sorted(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            held = read_checkpoint(path)
        except ValueError as error:
            assert str(error) == f"{path} is no checkpoint of a training, or is damaged; remove it."
            refused += 1
        else:
            assert flat(held) == flat(written)
    assert refused > len(places) / 2
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of a training, or is damaged; remove it"):
        train_projector(language(), data(), data(6, 1), tmp_path, config)
    path.write_bytes(whole)
    train_projector(language(), data(), data(6, 1), tmp_path, config)


def test_parts_of_a_batch_give_the_whole_batch(language: Make, tmp_path: Path) -> None:
    found = [
        train_projector(
            language(), data(), data(6, 1), tmp_path / f"{n}", TrainConfig(steps=2, batch=8, accumulate=n, patience=0)
        )
        for n in (1, 4)
    ]
    for one, other in zip(*(p.state_dict().values() for p in found), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_it_learns_and_stops_when_dev_no_longer_falls(language: Make, tmp_path: Path) -> None:
    far = Captioned(data(6, 1).features, ["zzzzzz"] * 6)  # nothing that training helps with
    config = TrainConfig(steps=400, batch=8, evaluate_every=5, patience=2, learning_rate=0.02)
    train_projector(language(), data(), far, tmp_path, config)
    rows = curve(tmp_path)
    assert len(rows) < 400 and float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])


RANKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from conftest import build_language
from test_projector import data
from diffprobe.mllm.config import TrainConfig
from diffprobe.mllm.train import train_projector
found = train_projector(
    build_language(), data(), data(8, 1), Path({folder!r}),
    TrainConfig(steps=60, batch=8, learning_rate=0.05, evaluate_every=5, patience=2),
)
sys.stdout.write(f"{{sum(float(p.detach().abs().sum()) for p in found.parameters())}}\\n")  # whole, whoever else writes
"""


@pytest.mark.slow
def test_every_process_ends_with_the_best_weights(tmp_path: Path, launch: Callable[..., Any]) -> None:
    text = RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    done = launch(tmp_path / "ranks.py", text, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = curve(tmp_path / "run")
    best = min((row for row in rows if row["dev_loss"]), key=lambda row: float(row["dev_loss"]))
    assert best is not rows[-1]
    kept = sum(float(p.detach().abs().sum()) for p in Projector.load(tmp_path / "run").parameters())
    assert [float(line) for line in done.stdout.split()] == [pytest.approx(kept, rel=1e-6)] * 2


def test_batches_cover_an_epoch_and_drop_a_share() -> None:
    config = TrainConfig(batch=5, dropout=0.3, seed=2)
    epoch = np.concatenate([batch_of(step, 20, config)[0] for step in range(4, 8)])
    assert sorted(epoch) == list(range(20)) and not np.array_equal(
        epoch, np.concatenate([batch_of(s, 20, config)[0] for s in range(4)])
    )
    dropped = np.concatenate([batch_of(step, 20, config)[1] for step in range(400)])
    assert abs(dropped.mean() - 0.3) < 0.04  # 2000 tosses: four standard errors


def test_dropout_shows_the_null_features(language: Make, tmp_path: Path) -> None:
    train = data()
    alone = TrainConfig(steps=1, batch=8, patience=0)
    swapped = Captioned(train.features, train.captions, train.features)
    same = [train_projector(language(), d, data(6, 1), tmp_path / n, c) for n, d, c in (
        ("none", train, alone), ("same", swapped, TrainConfig(steps=1, batch=8, patience=0, dropout=0.5)))]  # fmt: skip
    other = train_projector(
        language(), train, data(6, 1), tmp_path / "null", TrainConfig(steps=1, batch=8, patience=0, dropout=0.5)
    )
    weights = [p.layers[0].weight for p in (*same, other)]
    assert torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


def test_training_refuses_what_does_not_fit(language: Make, tmp_path: Path) -> None:
    train, dev = data(), data(6, 1)
    train_projector(language(), train, dev, tmp_path, TrainConfig(steps=1, batch=8))
    with pytest.raises(ValueError, match="steps: the store has 1, you ask for 2"):
        train_projector(language(), train, dev, tmp_path, TrainConfig(steps=2, batch=8))
    for config, message in (
        (TrainConfig(batch=99), "A batch of 99"), (TrainConfig(batch=8, accumulate=3), "divisible by accumulate=3"), (TrainConfig(dropout=1.0), "below 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train_projector(language(), train, dev, tmp_path / "new", config)
    with pytest.raises(ValueError, match="needs the unconditional features"):
        train_projector(
            language(), Captioned(train.features, train.captions), dev, tmp_path / "new", TrainConfig(batch=8, dropout=0.1)
        )
    broken: Any = Captioned(train.features * float("nan"), train.captions)
    with pytest.raises(ValueError, match="not finite"):
        train_projector(language(), broken, dev, tmp_path / "new", TrainConfig(batch=8))
