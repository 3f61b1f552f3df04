"""The recipe of the embedded ``shapes-lm``: a small `LlamaForCausalLM` that reads descriptions and answers questions.

Its text is the drawn world's: captions of every style, and conversations in which the user describes a scene, then asks
for captions or puts the questions of `data/questions.py` and `data/twins.py`.  Everything asked is settled by what was
described, in changing words, orders and completeness; so a later projector that puts soft tokens in place of the
description finds a model that already looks there for its answers.

Every assistant turn ends with the end token; the padding token is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffprobe.data import shapes
from diffprobe.data.questions import pick, questions
from diffprobe.data.samples import Question
from diffprobe.data.twins import KINDS
from diffprobe.zoo.recipe import Progress, batches, learning_rate_share, train_scene

Rng = np.random.Generator
Turn = dict[str, str]

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
ROLES = ("<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REQUESTS: dict[str, tuple[str, ...]] = {
    # what a caption of each style is asked for with
    "list": ("Describe the image briefly.", "What is in the picture?", "Name the objects."),
    "full": ("Describe the image in detail.", "Say everything about the picture."),
    "place": ("Say what is where.",),
    "relation": ("Say how the objects stand to each other.",),
    "count": ("Count the objects and name them.",),
    "web": ("Write a caption of the image.", "Describe the image."),
}
PARTS = 3  # of a batch, for each forward pass
HARD = ("existence", "relation", "comparison", "mark")  # learnt last: asked twice of a scene
REPEAT = "Repeat the description."
TWIN_SEED = 2**20  # the twins trained on; benchmarks count their seeds from 0


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    start: Path | None = None  # a folder of shapes-lm: its weights are trained further, instead of random ones
    scenes: int = 200_000
    steps: int = 1200
    batch: int = 24
    easy_share: float = 0.3  # of the steps, with one or two objects alone
    easy_repeats: float = 0.7  # of these descriptions are to be repeated: looking back into the text is learnt there
    peak: float = 2e-3
    decay_share: float = 0.4
    other_weight: float = 0.1  # of all tokens that are not the assistant's: most of them cannot be foreseen
    save_every: int = 100


# --- text -----------------------------------------------------------------------------------------


def _place(obj: shapes.Obj) -> tuple[int, int]:
    """Row and column of the 3 x 3 grid that `shapes.place_words` names."""
    return min(2, int(obj.y * 3)), min(2, int(obj.x * 3))


def _sentence(obj: shapes.Obj) -> str:
    """An object in flowing words."""
    words = [obj.size, obj.fill, obj.colour, obj.shape]
    words += ["pointing", obj.direction] if obj.shape in shapes.DIRECTED else []
    words += {"none": [], "dot": ["with a dot"]}.get(obj.mark, [f"with the letter {obj.mark}"])
    return f"{' '.join(words)} {shapes.place_words(obj)}"


def _note(obj: shapes.Obj, rng: Rng) -> str:
    """An object as its attributes in any order, as soft tokens may bring them."""
    words = [obj.size, obj.fill, obj.colour, obj.shape, shapes.place_words(obj)]
    words += [f"pointing {obj.direction}"] if obj.shape in shapes.DIRECTED else []
    words += {"none": [], "dot": ["dot"]}.get(obj.mark, [f"letter {obj.mark}"])
    return " ".join(words[i] for i in rng.permutation(len(words)))


def describe(scene: shapes.Scene, asked: Sequence[Question], rng: Rng) -> str:
    """Everything about a scene, in a random wording; relations are said where a question needs them, and some others."""
    order = [int(i) for i in rng.permutation(len(scene.objects))]
    if rng.random() < 0.5:
        parts = [_note(scene.objects[i], rng) for i in order]
    else:
        parts = [_sentence(scene.objects[i]) for i in order]
    wanted = {tuple(sorted(q.objects)) for q in asked if q.category in ("relation", "position")}
    for i in order:
        for j in order[order.index(i) + 1 :]:
            a, b = (i, j) if rng.random() < 0.5 else (j, i)
            one, other = scene.objects[a], scene.objects[b]
            where = shapes.relation(one, other)
            if where is None or one.pair == other.pair:
                continue
            axis = 1 if where in ("left of", "right of") else 0
            needed = tuple(sorted((i, j))) in wanted and _place(one)[axis] == _place(other)[axis]
            if needed or rng.random() < 0.4:
                parts.append(f"{one.colour} {one.shape} {where} {other.colour} {other.shape}")
    if len(scene.objects) > 1 and rng.random() < 0.5:
        parts.append(f"{shapes.COUNT_WORDS[len(scene.objects)]} objects")
    if scene.zoom != 1 or any(q.category == "viewpoint" for q in asked) or rng.random() < 0.1:
        parts.append("seen close" if scene.zoom == 1 else "seen from far away")
    parts.append(f"{scene.tone} background")
    return f"{pick(rng, (', ', '; ', '. '))}".join(parts) + "."


def captioned(scene: shapes.Scene, rng: Rng) -> list[Turn]:
    """A request for a caption of one style, and such a caption."""
    style = pick(rng, list(REQUESTS))
    order = [int(i) for i in rng.permutation(len(scene.objects))]
    return [
        {"role": "user", "content": pick(rng, REQUESTS[style])},
        {"role": "assistant", "content": shapes.caption(scene, style, order).text},
    ]


def scene_and_questions(index: int, seed: int, rng: Rng, n_objects: int | None = None) -> tuple[shapes.Scene, list[Question]]:
    """A training scene with the questions that suit it; a quarter are twins, with the questions of their benchmark."""
    if rng.random() < 0.25:
        pair = KINDS[pick(rng, ("mmvp", "naturalbench"))](TWIN_SEED + seed, index)
        side = int(rng.integers(2))
        return pair.scenes[side], list(pair.questions[side])
    scene = shapes.random_scene(seed, index, "train", n_objects) if n_objects else train_scene(index, seed)
    first, second = (questions(scene, int(number)) for number in rng.integers(2**31, size=2))
    more = [q for q in second if q.category in HARD and q not in first]
    return scene, [*first, *more]


def conversation(
    scene: shapes.Scene, asked: Sequence[Question], rng: Rng, captions: float = 0.35, repeats: float = 0.05
) -> list[Turn]:
    """A description, then questions about it in any order, and now and then a request to caption or to repeat it."""
    described = describe(scene, asked, rng)
    exchanges = [
        [{"role": "user", "content": q.text}, {"role": "assistant", "content": q.answer}]
        for q in (asked[int(i)] for i in rng.permutation(len(asked)))
    ]
    if not exchanges or rng.random() < captions:
        exchanges.insert(int(rng.integers(len(exchanges) + 1)), captioned(scene, rng))
    if rng.random() < repeats:
        repeated = [{"role": "user", "content": REPEAT}, {"role": "assistant", "content": described}]
        exchanges.insert(int(rng.integers(len(exchanges) + 1)), repeated)
    turns = [turn for exchange in exchanges for turn in exchange]
    turns[0] = {"role": "user", "content": f"{described}{pick(rng, (' ', chr(10)))}{turns[0]['content']}"}
    return turns


# --- the model ------------------------------------------------------------------------------------


def build_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Byte-pair tokens over the world's words, a chat template, and end and padding apart."""
    learner = Tokenizer(models.BPE())
    # with its space before every word, also the first, a word is one and the same token wherever it stands
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*SPECIAL.values(), *ROLES],
        show_progress=False,
    )
    rng = np.random.default_rng([config.seed, 4])
    learner.train_from_iterator(
        (
            turn["content"]
            for i in range(3000)
            for turn in conversation(*scene_and_questions(i, config.seed, rng), rng, captions=1.0, repeats=1.0)
        ),
        trainer,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner, **SPECIAL, extra_special_tokens=list(ROLES), model_max_length=512, padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_lm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


# --- training -------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, talks: Sequence[list[Turn] | str]) -> tuple[Tensor, Tensor]:
    """Token ids (text, token), padded on the right, and where the assistant (or a bare caption) speaks, 0 or 1."""
    rows: list[tuple[list[int], list[int]]] = []
    for talk in talks:
        if isinstance(talk, str):
            ids = tokenizer(f"{tokenizer.bos_token}{talk}{tokenizer.eos_token}").input_ids
            rows.append((ids, [0] + [1] * (len(ids) - 1)))
        else:
            found = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
            rows.append((found["input_ids"], found["assistant_masks"]))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    spoken = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (numbers, mask) in enumerate(rows):
        ids[row, : len(numbers)] = torch.tensor(numbers)
        spoken[row, : len(mask)] = torch.tensor(mask)
    return ids, spoken


def train_lm(config: Config, folder: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Next-token prediction in which the assistant's words count most; logged: their loss and accuracy on the batch just seen."""
    torch.manual_seed(config.seed + 4)
    tokenizer = build_tokenizer(config) if config.start is None else PreTrainedTokenizerFast.from_pretrained(config.start)
    model = build_lm(tokenizer)
    if config.start is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(config.start).float().state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.peak, betas=(0.9, 0.98), weight_decay=0.05)
    progress = Progress(folder, "lm", {"model": model}, optimizer)
    history: list[tuple[float, ...]] = []
    for indices in batches(config.scenes, config.batch, config.seed + 4, progress.step):
        if progress.step >= config.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.peak * learning_rate_share(progress.step, config.steps, config.decay_share)
        rng = np.random.default_rng([config.seed, 4, progress.step])
        easy = config.start is None and progress.step < config.easy_share * config.steps
        talks: list[list[Turn] | str] = []
        for index in indices:
            scene, asked = scene_and_questions(int(index), config.seed, rng, int(rng.integers(1, 3)) if easy else None)
            if rng.random() < 0.05:
                order = [int(i) for i in rng.permutation(len(scene.objects))]
                talks.append(shapes.caption(scene, pick(rng, shapes.CAPTION_STYLES), order).text)
            else:
                talks.append(conversation(scene, asked, rng, repeats=config.easy_repeats if easy else 0.05))
        ids, spoken = encode(tokenizer, talks)
        lengths = (ids != tokenizer.pad_token_id).sum(1)
        weights = torch.where(spoken.bool(), 1.0, config.other_weight) * (ids != tokenizer.pad_token_id)
        said: list[tuple[Tensor, Tensor]] = []
        for rows in lengths.argsort().chunk(PARTS):  # texts of like length together: half of the batch would be padding
            longest = int(lengths[rows].max())
            wanted, own = ids[rows, 1:longest], spoken[rows, 1:longest].bool()
            logits = model(input_ids=ids[rows, :longest]).logits[:, :-1]  # what stands before padding never sees it
            losses = functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
            ((losses * weights[rows, 1:longest]).sum() / weights[:, 1:].sum()).backward()
            said.append((losses[own].detach(), (logits.argmax(-1) == wanted)[own].float()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        history.append(tuple(torch.cat(column).mean().item() for column in zip(*said, strict=True)))
        if progress.step % 25 == 0:
            loss, accuracy = np.mean(history[-25:], axis=0)
            progress.log({"assistant_loss": loss, "assistant_accuracy": accuracy}, config.steps)
        if progress.step % config.save_every == 0 or progress.step == config.steps:
            progress.save()
    return tokenizer, model.eval()
