"""The recipe of the embedded ``shapes-lm``: a small `LlamaForCausalLM` that reads descriptions and answers questions.

Its text is the drawn world's: captions of every style, and conversations in which the user describes a scene, then asks
for captions or puts the questions of `data/questions.py` and `data/twins.py`.  Everything asked is settled by what was
described, in changing words, orders and completeness; so a later projector that puts soft tokens in place of the
description finds a model that already looks there for its answers.

A row holds one description and many branches, each a question that does not see the others: as turns of one talk, a name
asked about before would pass for one described, and short descriptions would be read again for every question.

What belongs to one object is learnt first, from descriptions that are said again object by object; then how two objects lie,
from scenes of two and then of more.  There nearly every word is settled by finding an object.  Questions follow.

Every assistant turn ends with the end token; the padding token is another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffprobe.data import shapes
from diffprobe.data.conversations import DETAILS
from diffprobe.data.questions import YES_NO, pick, questions
from diffprobe.data.samples import Question
from diffprobe.data.twins import FAR, KINDS
from recipes.common import Optimizers, Plan, step_rng, train, train_scene
from recipes.sd import autocast

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
HARD = ("relation", "comparison", "mark")  # learnt last
HARD_WEIGHT = 3.0  # how much more often these are asked
DRAWS = 3  # of each category's questions, for a scene
ASKED, LOOKUPS = 10, 4  # branches of a talk
LOOKUP_FORMS = {
    # what is named: how it is asked for, and which attribute is the answer
    "{colour}": ("What is {}?", "shape"),
    "{shape}": ("Which {} is there?", "colour"),
    "{colour} {shape}": ("How large is the {}?", "size"),
}
NAMING = ("size", "fill", "colour", "shape", "place")  # attributes that a name is made of, in the order in which they are said
NOTHING = "nothing"
BETWEEN = (" ", "\n", " \n")  # description and question; the last is what stands after a projector's soft tokens
REPEAT = "Repeat the description."
RESTATE = DETAILS
COMPARE = "Compare the objects two by two."
STUDIED = 0.2  # of the talks have a branch of either kind
TWIN_SEED = 2**20  # the twins trained on; benchmarks count their seeds from 0


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights."""

    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan(steps=20000, decay_share=0.3))
    start: str = ""  # a folder of weights to begin from
    batch: int = 12
    width: int = 128
    layers: int = 5
    two_until: int = 400  # at steps below this a scene has one object or two
    restated_until: int = 3000  # below this objects are restated, and nothing is asked
    pairs_until: int = 5500  # below this two objects are compared, in scenes of these two
    compared_until: int = 14000  # below this up to four are
    repeats: float = 0.05  # of the descriptions are to be repeated
    captions: float = 0.05  # of the texts are a caption alone
    peak: float = 2e-3
    muon_peak: float = 3e-3
    other_weight: float = 0.02  # of all tokens that are not the assistant's: most of them cannot be foreseen


# --- text -----------------------------------------------------------------------------------------


def _place(obj: shapes.Obj) -> tuple[int, int]:
    """Row and column of the 3 x 3 grid that `shapes.place_words` names."""
    return min(2, int(obj.y * 3)), min(2, int(obj.x * 3))


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
        parts = [shapes.said(every, every) for every in (shapes.facts(scene.objects[i]) for i in order)]
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


def viewpoint_question(scene: shapes.Scene, rng: Rng) -> Question:
    """Whether a scene is seen close or from far away, as twins ask it."""
    names = ("close", "from far away")
    options = tuple(names[i] for i in rng.permutation(2))
    if rng.random() < 0.5:
        return Question(f"Is the scene seen {options[0]} or {options[1]}?", names[scene.zoom != 1], options, "viewpoint", ())
    return Question(
        f"Is the scene seen {options[0]}?", YES_NO[(options[0] == "close") != (scene.zoom == 1)], YES_NO, "viewpoint", ()
    )


def scene_and_questions(index: int, seed: int, rng: Rng) -> tuple[shapes.Scene, list[Question]]:
    """A training scene with the questions that suit it; a quarter are twins, whose benchmark's questions come first."""
    own: tuple[Question, ...] = ()
    twin = rng.random() < 0.25
    if twin:
        pair = KINDS[pick(rng, ("mmvp", "naturalbench"))](TWIN_SEED + seed, index)
        side = int(rng.integers(2))
        scene, own = pair.scenes[side], pair.questions[side]
    else:
        scene = train_scene(index, seed)
        if rng.random() < 0.15:  # twins alone would ask this too seldom
            scene = replace(scene, zoom=FAR if rng.random() < 0.5 else 1.0)
            own = (viewpoint_question(scene, rng),)
    # Drawn again, the same question comes again; taking it out would leave more "no" than "yes", for absent things are many.
    more = [q for number in rng.integers(2**31, size=DRAWS) for q in questions(scene, int(number))]
    # twins have marks for a reason, or none
    return scene, [*own, *(q for q in more if not twin or q.category != "mark")]


def lookup(scene: shapes.Scene, rng: Rng) -> tuple[str, str]:
    """What stands with a name, as often one that is not there: then "nothing".

    A yes or no is one bit, from which a model learns little before it can look for a name; here the same look is rewarded
    by a word that stands in one place only.
    """
    present = rng.random() < 0.5
    form = pick(rng, tuple(LOOKUP_FORMS))
    asked, attribute = LOOKUP_FORMS[form]
    names = [form.format(**vars(o)) for o in scene.objects]
    single = [i for i, name in enumerate(names) if names.count(name) == 1]
    if present and single:
        index = pick(rng, single)
        return asked.format(names[index]), str(getattr(scene.objects[index], attribute))

    def absent(colours: Iterable[str], kinds: Iterable[str]) -> list[str]:
        # no pair that is held out: those are never there in training, and would be known by their name
        pairs = [(c, s) for c in colours for s in kinds if not shapes.held_out(c, s)]
        every = dict.fromkeys(form.format(colour=c, shape=s) for c, s in pairs)
        return [name for name in every if name not in names]

    crossed = absent([o.colour for o in scene.objects], [o.shape for o in scene.objects])
    choices = crossed if crossed and rng.random() < 0.5 else absent(shapes.COLOURS, shapes.SHAPES)
    return asked.format(pick(rng, choices)), NOTHING


def _name(every: Sequence[dict[str, str]], index: int, rng: Rng) -> tuple[str, ...]:
    """Two attributes that name one object of a scene, mostly colour and shape; none where the drawn ones name several."""
    for _ in range(6):
        named = ("colour", "shape") if rng.random() < 0.6 else tuple(rng.choice(NAMING, 2, replace=False))
        if sum(all(other[key] == every[index][key] for key in named) for other in every) == 1:
            return named
    return ()


def restated(scene: shapes.Scene, rng: Rng) -> str:
    """Every object that two attributes name, with all its others.

    Nearly every word is settled by the description, and only by finding the object there.  An answer to a question is one
    such word in twenty tokens: from questions alone the same was not learnt in thousands of steps.
    """
    every = [shapes.facts(o) for o in scene.objects]
    parts = []
    for index in rng.permutation(len(every)):
        if named := _name(every, int(index), rng):
            own = every[int(index)]
            parts.append(f"the {shapes.said(own, named)}: {shapes.said(own, own.keys() - set(named))}")
    return "; ".join(parts)


def _pairs(objects: Sequence[shapes.Obj], rng: Rng) -> list[tuple[shapes.Obj, shapes.Obj]]:
    """All pairs in any order, either object first; not both ways, for one would give the other away."""
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in combinations(objects, 2)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def compared(scene: shapes.Scene, rng: Rng, placed: float = 0.3, checked: float = 0.0) -> str:
    """Pairs of objects that their colour and shape name: where the first is, seen from the second, and whether it is larger.

    Only what a description settles is said: a side where their places differ on its axis, or where it is their relation,
    which `describe` states then.  The grid's cells do not tell which axis dominates.

    Args:
        placed: share of the names that are followed by the object's place.  Two places that stand side by side are compared
            within minutes, and a name then learns to bring its place along unsaid; without this neither was learnt.
        checked: share of the pairs of which a side is said, true or not, to be answered by yes or no.
    """
    names = [o.pair for o in scene.objects]
    single = [o for o in scene.objects if names.count(o.pair) == 1]
    parts = []
    for a, b in _pairs(single, rng):
        where = shapes.relation(a, b)
        (row, column), (other_row, other_column) = _place(a), _place(b)
        sides = ["left of" if column < other_column else "right of"] if column != other_column else []
        sides += ["above" if row < other_row else "below"] if row != other_row else []
        sides = [where] * (where is not None and where not in sides) + sides
        size = "as large" if a.size == b.size else "larger" if a.size == "large" else "smaller"
        one, other = (f"the {o.colour} {o.shape}" + f" {shapes.place_words(o)}" * (rng.random() < placed) for o in (a, b))
        if sides and rng.random() < checked:
            true, asked = pick(rng, sides), rng.random() < 0.5
            parts.append(f"{one} {true if asked else shapes.RELATIONS[true]} {other}: {YES_NO[not asked]}")
        else:
            parts.append(f"{one} to {other}: {', '.join([*sides, size])}")
    return "; ".join(parts)


def _every_pair(scene: shapes.Scene) -> list[Question]:
    """What makes `describe` state every relation that the places do not show."""
    return [Question("", "", (), "relation", pair) for pair in combinations(range(len(scene.objects)), 2)]


@dataclass(frozen=True)
class Talk:
    """A description, and branches that each go on from it and do not know of each other.

    A branch is a list of exchanges: what the user says, and what the assistant answers.
    """

    described: str
    branches: list[list[tuple[str, str]]]


def talk(scene: shapes.Scene, asked: Sequence[Question], rng: Rng, repeats: float = 0.05) -> Talk:
    """A description and what is asked about it: `ASKED` questions, `LOOKUPS`, a caption, and now and then to repeat it.

    The first two questions are always asked: what suits a twin comes first.
    """
    weights = np.array([HARD_WEIGHT if q.category in HARD else 1.0 for q in asked[2:]])
    drawn = rng.choice(len(weights), min(ASKED - 2, len(weights)), replace=False, p=weights / weights.sum())
    chosen = [*asked[:2], *(asked[2 + int(i)] for i in drawn)]
    restate, compare = rng.random(2) < STUDIED
    described = describe(scene, [*chosen, *_every_pair(scene)] if compare else chosen, rng)
    branches: list[list[tuple[str, str]]] = []
    for number in rng.permutation(len(chosen)):
        exchange = (chosen[int(number)].text, chosen[int(number)].answer)
        if branches and rng.random() < 0.15:
            branches[-1].append(exchange)
        else:
            branches.append([exchange])
    branches += [[lookup(scene, rng)] for _ in range(LOOKUPS)]
    request, said = captioned(scene, rng)
    branches.append([(request["content"], said["content"])])
    if rng.random() < repeats:
        branches.append([(REPEAT, described)])
    branches += [[(RESTATE, told)] for told in [restated(scene, rng)] if restate and told]
    branches += [[(COMPARE, told)] for told in [compared(scene, rng)] if compare and told]
    return Talk(described, branches)


def turns(text: Talk, branch: int, between: str = " ") -> list[Turn]:
    """One branch of a talk as the chat template takes it."""
    found: list[Turn] = []
    for asked, answered in text.branches[branch]:
        asked = asked if found else f"{text.described}{between}{asked}"
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return found


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
    talks = (talk(*scene_and_questions(i, config.seed, rng), rng) for i in range(1500))
    learner.train_from_iterator(
        (turn["content"] for t in talks for i in range(len(t.branches)) for turn in turns(t, i)), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner, **SPECIAL, extra_special_tokens=list(ROLES), model_max_length=512, padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_lm(tokenizer: PreTrainedTokenizerFast, config: Config) -> LlamaForCausalLM:
    if config.start:
        return LlamaForCausalLM.from_pretrained(config.start, dtype=torch.float32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=config.width, intermediate_size=3 * config.width,
            num_hidden_layers=config.layers, num_attention_heads=config.width // 32, num_key_value_heads=config.width // 32, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
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


@dataclass(frozen=True)
class Packed:
    """Talks as rows of tokens: a description once, then its branches one after the other.

    Attributes:
        ids: (row, token), padded on the right.
        positions: (row, token); every branch goes on counting where the description ended.
        branch: (row, token), 0 for the description, then 1, 2, ...; -1 where padded.
        spoken: (row, token), whether the assistant says it.
        weights: (row, token), what its prediction from the token before counts.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    spoken: Tensor
    weights: Tensor

    def attention(self) -> Tensor:
        """What each token sees (row, 1, token, token): what stands before it in its own branch and in the description."""
        own, other = self.branch[:, :, None], self.branch[:, None, :]
        return ((own == other) | (other == 0)).tril()[:, None]


Token = tuple[int, int, int, bool, float]  # its number, position, branch, whether spoken, weight


def _tokens(ids: Sequence[int], position: int, branch: int, weight: float, spoken: bool = False) -> list[Token]:
    """Tokens one after the other from `position` on."""
    return [(number, position + i, branch, spoken, weight) for i, number in enumerate(ids)]


def pack(tokenizer: PreTrainedTokenizerFast, talks: Sequence[Talk | str], rng: Rng, other_weight: float) -> Packed:
    """Lay talks and bare captions out; each token has the number that `encode` gives it, branch by branch.

    A turn of n assistant's tokens counts as sqrt(n) tokens: counted by the token, one caption outweighs ten answers of
    yes or no, and counted by the turn it would hardly be learnt.

    Args:
        other_weight: What each token of a description or a question counts.
    """
    user, assistant = (int(number) for number in tokenizer.convert_tokens_to_ids(list(ROLES)))
    bos, eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    texts: list[str] = []  # one call for all of them: a call a text would take longer than the training step
    for one in talks:
        texts.append(one if isinstance(one, str) else one.described)
        between = pick(rng, BETWEEN)
        for exchanges in [] if isinstance(one, str) else one.branches:
            for number, (asked, answered) in enumerate(exchanges):
                texts += [asked if number else f".{between}{asked}", answered]
    stop, *said = tokenizer([".", *texts], add_special_tokens=False).input_ids
    numbers = iter(said)
    rows: list[list[Token]] = []
    for one in talks:
        first = next(numbers)
        if isinstance(one, str):
            share = (len(first) + 1) ** -0.5
            rows.append([*_tokens([bos], 0, 0, 0.0), *_tokens([*first, eos], 1, 0, share, spoken=True)])
            continue
        row = _tokens([bos, user, *first], 0, 0, other_weight)
        end = len(row)
        for branch, exchanges in enumerate(one.branches, 1):
            place, begins = end, len(row)
            for number in range(len(exchanges)):
                request = next(numbers)
                request = [user, *request] if number else request[len(stop) :]  # as it stands after a description's full stop
                answer = [*next(numbers), eos]
                row += _tokens([*request, assistant], place, branch, other_weight)
                place += len(request) + 1
                row += _tokens(answer, place, branch, len(answer) ** -0.5, spoken=True)
                place += len(answer)
            row[begins] = (*row[begins][:4], 0.0)  # what stands before it in the row is not what it follows
        rows.append(row)
    longest = max(map(len, rows))
    padded = [row + [(int(tokenizer.pad_token_id), 0, -1, False, 0.0)] * (longest - len(row)) for row in rows]
    return Packed(*(torch.tensor([[token[k] for token in row] for row in padded]) for k in range(5)))


def studied(scene: shapes.Scene, rng: Rng, compare: bool, checked: float = 0.0) -> Talk:
    """A description whose objects are restated, or restated or compared, with some of the comparisons `checked`."""
    described = describe(scene, _every_pair(scene) if compare else (), rng)
    told = compared(scene, rng, checked=checked) if compare and rng.random() < 0.75 else ""
    return Talk(described, [[(COMPARE, told) if told else (RESTATE, restated(scene, rng))]])


def talks_of(indices: Sequence[int], step: int, config: Config, rng: Rng) -> list[Talk | str]:
    """The texts of one step: objects restated, then compared, then talks, half of which ask only what is learnt last.

    A quarter of the texts go on comparing, which is forgotten otherwise.
    """
    found: list[Talk | str] = []
    for number, index in enumerate(indices):
        if step < config.compared_until or number % 4 == 0:
            compare = step >= config.restated_until
            most = 2 if step < config.two_until or config.restated_until <= step < config.pairs_until else 4
            scene = shapes.random_scene(config.seed, index, "train", int(rng.integers(1 + compare, most + 1)))
            found.append(studied(scene, rng, compare, 0.0 if step < config.compared_until else 0.5))
            continue
        if number % 2:
            scene = shapes.random_scene(config.seed, index, "train", int(rng.integers(2, 5)))
            asked = [q for k in rng.integers(2**31, size=12) for q in questions(scene, int(k)) if q.category in HARD]
            if len(asked) > 2:
                found.append(talk(scene, asked, rng, 0.0))
                continue
        scene, asked = scene_and_questions(index, config.seed, rng)
        if rng.random() < config.captions:
            order = [int(i) for i in rng.permutation(len(scene.objects))]
            found.append(shapes.caption(scene, pick(rng, shapes.CAPTION_STYLES), order).text)
        else:
            found.append(talk(scene, asked, rng, config.repeats))
    return found


def train_lm(config: Config, folder: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Next-token prediction in which the assistant's turns count most; logged: their loss and accuracy on the batch just seen."""
    torch.manual_seed(config.seed + 4)
    device = config.plan.device
    kept = folder / "lm_tokenizer"
    if not kept.exists() and not config.start:  # learning the same words again can number them otherwise
        build_tokenizer(config).save_pretrained(kept)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.start or kept)
    model = build_lm(tokenizer, config).to(device)

    def batch_of(step: int) -> dict[str, Tensor]:
        rng = step_rng(config.seed, 5, step)
        indices = [int(i) for i in rng.integers(10**7, size=config.batch)]
        packed = pack(tokenizer, talks_of(indices, step, config, rng), rng, config.other_weight)
        return {part.name: getattr(packed, part.name) for part in fields(packed)}

    def loss_of(batch: dict[str, Tensor], done: float) -> tuple[Tensor, dict[str, Tensor]]:
        packed = Packed(**batch)
        wanted, own = packed.ids[:, 1:], packed.spoken[:, 1:]
        with autocast(device):
            logits = model(input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.attention()).logits
        logits = logits[:, :-1].flatten(0, 1).float()
        losses = functional.cross_entropy(logits, wanted.flatten(), reduction="none").unflatten(0, wanted.shape)
        weights = packed.weights[:, 1:]
        right = (logits.argmax(-1).unflatten(0, wanted.shape) == wanted)[own].float().mean()
        logs = {"assistant_loss": losses[own].mean(), "assistant_accuracy": right}
        return (losses * weights).sum() / weights.sum(), logs

    optimizers = Optimizers(model, config.peak, config.muon_peak, outer=("embed",), decay=0.01)
    train("lm", folder, config.plan, {"model": model}, optimizers, batch_of, loss_of)
    return tokenizer, model.eval()
