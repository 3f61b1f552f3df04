"""Does the language model see the image, or read the prompt?  From a model and pictures to a verdict.

A run trains projectors on captions (arms x sites x timesteps x guidance x seeds) with the language model frozen, lets each
describe held-out images whose features were given another text, and keeps everything in one folder:

- ``request.json``: what all its pieces share; another request on the same folder is refused;
- ``stores/``: features; ``projectors/``: one folder each; ``texts/``, ``likelihood/``: one file for each projector, test
  guidance and condition;
- ``texts.csv``: all texts, as `diffprobe.mllm.verdict` takes them.

Each piece is done once, so a run that was cut off goes on, and more arms or sites can be asked of a finished one.
`leakage_report` reads the kept files alone and needs no torch.

An arm is ``BASE[+dropNN][/CURE]``.  BASE: U trains without a prompt, M with the caption that is also the target, X with another
image's caption, Q with a question.  +drop30 shows the unconditional features to 30% of the samples of each step.  A cure changes
the features in training and test: centred (the difference f_c - f_u loses its mean over places), gated (f_u times the words'
attention), erased (LEACE), or a knock-out such as ending.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diffprobe.conditioning import NULL
from diffprobe.data import BlankDataset, Dataset, iterate, load_dataset
from diffprobe.mllm.captions import (
    DocumentFrequencies,
    Similarity,
    cider_d,
    cider_similarity,
    content_f1,
    document_frequencies,
    words,
)
from diffprobe.mllm.verdict import (
    CONDITIONS,
    NEGATIVE,
    POSITIVE,
    Leakage,
    centre,
    crossed_mean,
    judge_leakage,
    matched_candidates,
    rank_fed,
    sentence,
    usable_information,
)
from diffprobe.store import request_differences, whole_file, write_whole

if TYPE_CHECKING:
    from diffprobe.mllm.features import Asked, Features
    from diffprobe.mllm.projector import Projector
    from diffprobe.mllm.train import LanguageModel, TrainConfig
    from diffprobe.models import DiffusionModel

MAIN_SITE = "U-L1-R1-B0-Cross-Q"
NO_TEXT_SITE = "D-L0-R0-B0-Cross-Q"  # the query of the first cross-attention: computed before any text comes in
TEXT_SITE = "Text-Embeddings"  # `diffprobe.mllm.features.TEXT`, which needs torch
PROMPTS = {"U": NULL, "M": "caption", "X": "mismatched", "Q": "question"}
FED = {  # a test condition's split and conditioning
    "own": ("test", "caption"), "mismatched": ("test", "mismatched"), "mismatched_hard": ("test", "hard"), "none": ("test", NULL),
    "blank_caption": ("blank", "caption"), "blank_none": ("blank", NULL), "random_words": ("test", "words"), "paraphrase": ("test", "caption:1"),
}  # fmt: skip
BASELINES = {"blank": "blank", "no prompt": "null", "none": ""}  # of rankings, and the arrays that hold them
_ARM = re.compile(r"(?P<base>[UMXQ])(\+drop(?P<dropout>\d\d))?(/(?P<cure>.+))?")


class LeakageError(ValueError):
    """A run that is asked for what it cannot do, or a folder that holds another one."""


# --- what is asked ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One projector. `control` is "K-" or "K+" for a control; U ignores guidance, which is then 0."""

    arm: str
    site: str
    timestep: int
    guidance: float
    seed: int
    control: str = ""

    @property
    def parts(self) -> tuple[str, float, str]:
        """Base, share of dropout, cure."""
        found = _ARM.fullmatch(self.arm)
        if found is None:
            raise LeakageError(
                f"Arm {self.arm!r} is not BASE[+dropNN][/CURE] with a base U, M, X or Q; for example M+drop30/centred."
            )
        return found["base"], int(found["dropout"] or 0) / 100, found["cure"] or ""

    @property
    def slug(self) -> str:
        return _slug(self.arm, self.site, f"t{self.timestep}", f"s{self.guidance:g}", f"seed{self.seed}")


@dataclass(frozen=True)
class Test:
    """A projector on the test images: features at a guidance, with a route cut at test time alone ("" for none)."""

    recipe: Recipe
    guidance: float
    condition: str
    knockout: str = ""

    @property
    def slug(self) -> str:
        return _slug(self.recipe.slug, f"at{self.guidance:g}", self.knockout, self.condition)

    @property
    def key(self) -> dict[str, Any]:
        """How the piece is named in the table of texts; a control's arm and guidance are empty, for it serves all."""
        recipe = self.recipe
        arm = f"{recipe.arm} without {self.knockout}" if self.knockout else recipe.arm
        key = {
            "control": recipe.control,
            "arm": arm,
            "site": recipe.site,
            "timestep": recipe.timestep,
            "guidance": self.guidance,
        }
        if recipe.control:
            key |= {"arm": "", "guidance": np.nan} | ({"timestep": np.nan} if recipe.control == POSITIVE else {})
        return {**key, "seed": recipe.seed, "condition": self.condition}


def _slug(*parts: str) -> str:
    return "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts if part)


@dataclass(frozen=True)
class Settings:
    """What all pieces of a run share.

    Attributes:
        model: the diffusion model: id, folder or embedded name.
        data, test: datasets of the training and of the held-out images; no image may be in both.
        language_model, language_dtype, template: for `diffprobe.mllm.train.load_language_model`.
        request: what the user asks the language model for.
        grid: soft tokens on a side.
        steps, batch, learning_rate, kind, patience: of `TrainConfig`.
        dev_share: of the training images that decide when training stops.
        max_new_tokens: of a generated text.
        candidates, ranked: the fed text is ranked among so many, for so many of the test images; 0 images rank nothing.
        noise_seed: of the features.
        batch_rows: of one forward pass of the diffusion model; fixed, for features of other batches differ in their last bits.
    """

    model: str = "shapes-sd"
    data: str = "shapes:1500?split=train"
    test: str = "shapes:100?split=test"
    language_model: str = "shapes-lm"
    language_dtype: str = "auto"
    template: str = ""
    request: str = "Describe the image."
    grid: int = 6
    kind: str = "mlp2x_gelu"
    steps: int = 400
    batch: int = 32
    learning_rate: float = 1e-3
    patience: int = 3
    dev_share: float = 0.1
    max_new_tokens: int = 48
    candidates: int = 100
    ranked: int = 64
    noise_seed: int = 0
    batch_rows: int = 16


@dataclass(frozen=True)
class Forecast:
    """What a run will take; seconds on this machine."""

    recordings: list[str]
    projectors: int
    texts: int
    rankings: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            *self.recordings,
            f"{self.projectors} projectors to train, {self.texts} texts to write, {self.rankings} rankings of texts",
        ]
        minutes = self.seconds / 60
        return "\n".join([*lines, f"about {minutes:.0f} min" if minutes >= 2 else f"about {self.seconds:.0f} s"])


def plan(
    arms: Sequence[str], sites: Sequence[str], timesteps: Sequence[int], guidance: Sequence[float], seeds: int, conditions: Sequence[str],
    knockouts: Sequence[str] = (), controls: bool = True,
) -> list[Test]:  # fmt: skip
    """All pieces of a request: for every arm, site, timestep, seed and guidance a projector, and its tests.

    Knock-outs at test time are tried on every projector of the arms. Controls (K- at each timestep, K+ once) are
    trained as arm M.

    Raises:
        LeakageError: an arm or condition is not one.
    """
    if unknown := [c for c in conditions if c not in FED]:
        raise LeakageError(f"Condition {unknown[0]!r} is not one of {', '.join(CONDITIONS)}.")
    tests = []
    for arm in arms:
        for site in sites:
            for timestep in timesteps:
                for scale in guidance:
                    for seed in range(seeds):
                        recipe = Recipe(arm, site, timestep, scale, seed)
                        recipe = replace(recipe, guidance=0.0) if recipe.parts[0] == "U" else recipe
                        tests += [Test(recipe, scale, c, k) for k in ("", *knockouts) for c in conditions]
    if controls:
        for seed in range(seeds):
            wanted = [(NO_TEXT_SITE, t, NEGATIVE) for t in timesteps] + [(TEXT_SITE, timesteps[0], POSITIVE)]
            controlled = [Recipe("M", site, timestep, 1.0, seed, name) for site, timestep, name in wanted]
            tests += [Test(recipe, 1.0, c) for recipe in controlled for c in conditions]
    return list(dict.fromkeys(tests))


# --- the run ----------------------------------------------------------------------------------------


class Run:
    """A folder and what it takes to fill it.

    Args:
        folder: the run's.
        settings: shared by all of its pieces.
        model, data, test, language: loaded ones instead of those that the settings name.
        stores: stores to look for features in before recording them.
        device: as for `load_model`.
        tell: gets progress lines.

    Raises:
        LeakageError: the folder holds a run with other settings, or an image is in training and test.
    """

    def __init__(
        self, folder: str | Path, settings: Settings, *, model: DiffusionModel | None = None, data: Dataset | None = None,
        test: Dataset | None = None, language: LanguageModel | None = None, stores: Sequence[str | Path] = (),
        device: str | None = None, tell: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        from diffprobe.mllm.features import Features
        from diffprobe.mllm.train import load_language_model
        from diffprobe.models import load_model

        self.folder, self.settings = Path(folder), settings
        self.tell = tell if os.environ.get("RANK", "0") == "0" else lambda line: None
        self.data = data if data is not None else load_dataset(settings.data)
        self.test = test if test is not None else load_dataset(settings.test)
        if twice := {s.id for s in iterate(self.data)} & {s.id for s in iterate(self.test)}:
            raise LeakageError(
                f"Image {min(twice)!r} is in training and test ({len(twice)} are); give datasets that share none."
            )
        self.model = model or load_model(settings.model, device)
        self.language = language or load_language_model(
            settings.language_model, device, settings.language_dtype, template=settings.template
        )
        self._settle()
        splits = {"train": self.data, "test": self.test, "blank": BlankDataset(self.test)}
        self.features: Features = Features(
            self.model,
            splits,
            self.folder / "stores",
            settings.grid,
            settings.noise_seed,
            stores,
            self.tell,
            settings.batch_rows,
        )

    def _settle(self) -> None:
        """Write down what the pieces share, or refuse what differs from it."""
        datasets = {"data_fingerprint": self.data.fingerprint(), "test_fingerprint": self.test.fingerprint()}
        asked = {**asdict(self.settings), **datasets, "weights": self.model.weights_hash(), "n_test": len(self.test)}
        kept = self.folder / "request.json"
        if kept.exists():
            if differences := request_differences(json.loads(kept.read_text(encoding="utf-8")), asked):
                raise LeakageError(
                    f"{self.folder} holds another run; give another folder, or match it. {'; '.join(differences)}."
                )
            return
        write_whole(kept, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")

    # --- samples ----------------------------------------------------------------------------------

    @cached_property
    def split(self) -> tuple[list[str], list[str]]:
        """Ids of the training and of the dev images."""
        ids = self.features.ids("train")
        order = np.random.default_rng([self.settings.noise_seed, 7]).permutation(len(ids))
        count = max(1, round(self.settings.dev_share * len(ids)))
        return [ids[i] for i in sorted(order[count:])], [ids[i] for i in sorted(order[:count])]

    @cached_property
    def captions(self) -> dict[str, list[str]]:
        """All captions of each image, training and test."""
        found = {s.id: [c.text for c in s.captions] for d in (self.data, self.test) for s in iterate(d)}
        if bare := [name for name, texts in found.items() if not texts]:
            raise LeakageError(f"Image {bare[0]!r} has no caption ({len(bare)} have none); a projector is trained on captions.")
        return found

    def fed(self, condition: str) -> tuple[dict[str, str], dict[str, str]]:
        """The text that each test image is fed and the image that it describes, both by id; "" for none."""
        _, conditioning = FED[condition]
        texts = self.features.prompts("test", conditioning)
        first = {self.captions[name][0]: name for name in reversed(list(texts))}
        own = condition in ("own", "paraphrase", "blank_caption")
        return texts, {name: name if own else first.get(text, "") for name, text in texts.items()}

    # --- pieces -----------------------------------------------------------------------------------

    def asked(self, recipe: Recipe, split: str, conditioning: str, guidance: float, knockout: str = "") -> Asked:
        from diffprobe.mllm.features import CURES, Asked

        cure = recipe.parts[2]
        cut = knockout or (cure if cure not in CURES else "")
        return Asked(split, recipe.site, recipe.timestep, conditioning, guidance, cure if cure in CURES else "", cut)

    def training(self, recipe: Recipe) -> list[Asked]:
        """Features that a recipe is trained on, and those that dropout shows instead."""
        base, dropout, _ = recipe.parts
        found = [self.asked(recipe, "train", PROMPTS[base], recipe.guidance)]
        return [*found, self.asked(recipe, "train", NULL, recipe.guidance)] if dropout else found

    def testing(self, test: Test) -> Asked:
        split, conditioning = FED[test.condition]
        return self.asked(test.recipe, split, conditioning, test.guidance, test.knockout)

    def blank(self, test: Test) -> Asked:
        """What the same projector is shown of no image and no text."""
        return self.asked(test.recipe, "blank", NULL, test.guidance, test.knockout)

    def unprompted(self, test: Test) -> Asked:
        """The same image without a text."""
        return self.asked(test.recipe, "test", NULL, test.guidance, test.knockout)

    def train_config(self, recipe: Recipe) -> TrainConfig:
        from diffprobe.mllm.train import TrainConfig

        s = self.settings
        return TrainConfig(
            kind=s.kind, steps=s.steps, batch=s.batch, learning_rate=s.learning_rate, patience=s.patience, request=s.request,
            dropout=recipe.parts[1], seed=recipe.seed, evaluate_every=max(1, min(50, s.steps // 4)),
        )  # fmt: skip

    def projector(self, recipe: Recipe) -> Projector:
        """Train it, go on training it, or load it."""
        from diffprobe.mllm.projector import Projector
        from diffprobe.mllm.train import Captioned, train_projector

        folder = self.folder / "projectors" / recipe.slug
        if (folder / "projector.safetensors").exists():
            return Projector.load(folder).to(self.language.device)
        sets = []
        for ids in self.split:
            tensors = [self.features.tokens(asked, ids) for asked in self.training(recipe)]
            sets.append(Captioned(tensors[0], [self.captions[i][0] for i in ids], *tensors[1:]))
        return train_projector(
            self.language, sets[0], sets[1], folder, self.train_config(recipe), tell=lambda line: self.tell(f"  {line}")
        )

    def write(self, test: Test, projector: Projector) -> None:
        """Texts of every test image under one condition, into their own file."""
        from diffprobe.mllm.train import generate

        ids = self.features.ids("test")
        texts, sources = self.fed(test.condition)
        features = self.features.tokens(self.testing(test), ids)
        said = generate(self.language, projector, features, self.settings.request, max_new_tokens=self.settings.max_new_tokens)
        rows = [
            {**test.key, "sample": i, "fed": texts[i], "source": sources[i],
             "references": json.dumps(self.references(i, texts[i]), ensure_ascii=False), "output": output}
            for i, output in zip(ids, said, strict=True)
        ]  # fmt: skip
        write_whole(self.path(test), pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))

    def references(self, sample: str, fed: str) -> list[str]:
        """Captions that score sight: neither the one that is used as a prompt, nor what was fed in."""
        own = self.captions[sample]
        used = [words(own[0]), words(fed)] if len(own) > 1 else [words(fed)]
        return [text for text in dict.fromkeys(own) if words(text) not in used]

    def path(self, test: Test) -> Path:
        return self.folder / "texts" / f"{test.slug}.csv"

    # --- likelihood -------------------------------------------------------------------------------

    @cached_property
    def pool(self) -> list[str]:
        """Texts that a fed one is ranked among: first captions of test and training images, each once."""
        firsts = [self.captions[s.id][0] for d in (self.test, self.data) for s in iterate(d)]
        return list(dict.fromkeys(firsts))[:1000]

    def ranked_path(self, test: Test) -> Path:
        return self.folder / "likelihood" / f"{test.slug}.npz"

    def rank(self, test: Test, projector: Projector) -> None:
        """log P of length-matched candidates given the features, a blank image's, and the same image's without a prompt.

        Arrays (sample, candidate) for `rank_texts`.
        """
        from diffprobe.mllm.train import log_likelihood

        ids = self.features.ids("test")[: self.settings.ranked]
        texts, _ = self.fed(test.condition)
        fed = [texts[i] for i in ids]
        pool = [*fed, *(text for text in self.pool if text not in set(fed))]
        lengths = [len(self.language.answer(text)) for text in pool]
        chosen = matched_candidates(pool, self.settings.candidates, lengths, self.settings.noise_seed)[: len(ids)]
        asked = [[pool[k] for k in row] for row in chosen]
        request = self.settings.request
        given, tokens = log_likelihood(self.language, projector, self.features.tokens(self.testing(test), ids), asked, request)
        used, place = np.unique(chosen, return_inverse=True)
        blank_image = self.features.tokens(self.blank(test), ids[:1])
        alone, _ = log_likelihood(self.language, projector, blank_image, [[pool[k] for k in used]], request)
        unprompted = self.features.tokens(self.unprompted(test), ids)
        null, _ = log_likelihood(self.language, projector, unprompted, asked, request)
        arrays = {
            "conditional": given,
            "blank": alone[0][place].reshape(chosen.shape),
            "null": null,
            "tokens": tokens,
            "samples": np.array(ids),
        }
        arrays |= self._unconditional(test, asked, ids)
        with whole_file(self.ranked_path(test)) as beside, beside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def _unconditional(self, test: Test, asked: list[list[str]], ids: list[str]) -> dict[str, np.ndarray]:
        """log P of the fed text under the reader of unconditional features, where the run has trained it."""
        from diffprobe.mllm.projector import Projector
        from diffprobe.mllm.train import log_likelihood

        reader = replace(test.recipe, arm="U", guidance=0.0, control="")
        folder = self.folder / "projectors" / reader.slug
        if test.recipe.control or not (folder / "projector.safetensors").exists():
            return {}
        features = self.features.tokens(self.asked(reader, "test", NULL, 0.0), ids)
        projector = Projector.load(folder).to(self.language.device)
        own, _ = log_likelihood(self.language, projector, features, [row[:1] for row in asked], self.settings.request)
        return {"unconditional": own[:, 0]}

    # --- all together -----------------------------------------------------------------------------

    def forecast(self, tests: Sequence[Test], ranked: Sequence[Test] = ()) -> Forecast:
        """What is left to do, timed on a few steps."""
        from diffprobe.mllm.features import describe

        ranked = self._to_rank(ranked)
        recordings = self.features.missing(self._all_features(tests, ranked))
        seconds = sum(self.features.record(recording, dry_run=True) for recording in recordings)
        fresh = [
            r
            for r in dict.fromkeys(t.recipe for t in tests)
            if not (self.folder / "projectors" / r.slug / "projector.safetensors").exists()
        ]
        unwritten = [t for t in tests if not self.path(t).exists()]
        unranked = [t for t in ranked if not self.ranked_path(t).exists()]
        step, text = self._time() if fresh or unwritten else (0.0, 0.0)
        seconds += len(fresh) * self.settings.steps * step + len(unwritten) * len(self.test) * text
        lines = [describe(r, len(self.features.data[r["split"]])) for r in recordings]
        return Forecast(lines, len(fresh), len(unwritten) * len(self.test), len(unranked), seconds)

    def _to_rank(self, tests: Sequence[Test]) -> Sequence[Test]:
        return tests if self.settings.ranked else ()

    def _time(self) -> tuple[float, float]:
        """Seconds of a training step and of a text, on the longest captions."""
        import torch

        from diffprobe.mllm.projector import Projector
        from diffprobe.mllm.train import answer_losses, generate, lay_out

        s, language = self.settings, self.language
        features = torch.zeros(s.batch, s.grid**2, 64)
        projector = Projector(64, language.width, s.kind, language.rms).to(language.device)
        longest = sorted((texts[0] for texts in self.captions.values()), key=len)[-s.batch :]
        answers = [language.answer(text) for text in longest]
        taken = []
        for _ in range(2):  # the first pays for caches
            start = time.perf_counter()
            rows = lay_out(
                language, projector(features[: len(answers)].to(language.device)), [s.request] * len(answers), answers
            )
            answer_losses(language, rows).sum().backward()
            taken.append(time.perf_counter() - start)
        start = time.perf_counter()
        generate(language, projector, features, s.request, max_new_tokens=8)
        most = min(s.max_new_tokens, max(map(len, answers)))
        return min(taken), (time.perf_counter() - start) / len(features) * most / 8

    def _all_features(self, tests: Sequence[Test], ranked: Sequence[Test]) -> list[Asked]:
        found = [asked for recipe in dict.fromkeys(t.recipe for t in tests) for asked in self.training(recipe)]
        return [*found, *map(self.testing, tests), *map(self.blank, ranked), *map(self.unprompted, ranked)]

    def complete(self, tests: Sequence[Test], ranked: Sequence[Test] = ()) -> pd.DataFrame:
        """Do what is left of these pieces; gives their texts, which are part of ``texts.csv``.

        Args:
            ranked: those whose fed text is ranked among others as the settings say.
        """
        ranked = self._to_rank(ranked)
        for recording in self.features.missing(self._all_features(tests, ranked)):
            self.features.record(recording)
        main = os.environ.get("RANK", "0") == "0"
        recipes = list(dict.fromkeys(t.recipe for t in tests))
        recipes.sort(key=lambda r: r.parts[0] != "U")  # the reader of unconditional features comes first: rankings ask for it
        for number, recipe in enumerate(recipes, start=1):
            mine = [t for t in tests if t.recipe == recipe]
            unwritten = [t for t in mine if not self.path(t).exists()]
            unranked = [t for t in mine if t in ranked and not self.ranked_path(t).exists()]
            trained = (self.folder / "projectors" / recipe.slug / "projector.safetensors").exists()
            if trained and not unwritten and not unranked:
                continue
            self.tell(f"{number} of {len(recipes)}  {recipe.slug}")
            projector = self.projector(recipe)
            if main:
                for test in unwritten:
                    self.write(test, projector)
                for test in unranked:
                    self.rank(test, projector)
        if main:
            found = pd.concat([_read(p) for p in sorted((self.folder / "texts").glob("*.csv"))], ignore_index=True)
            write_whole(self.folder / "texts.csv", found.to_csv(index=False, lineterminator="\n"))
        return read_texts(self.folder, tests) if main else pd.DataFrame()


def run(
    out: str | Path,
    settings: Settings | None = None,
    *,
    arms: Sequence[str] = ("U", "M"),
    sites: str | Sequence[str] = MAIN_SITE,
    timesteps: Sequence[int] = (50,),
    guidance: Sequence[float] = (1.0, 1.5, 4.0),
    seeds: int = 3,
    conditions: Sequence[str] = CONDITIONS,
    knockouts: Sequence[str] = (),
    likelihood: Sequence[str] = ("mismatched",),
    stores: Sequence[str | Path] = (),
    device: str | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] = print,
    **loaded: Any,
) -> Forecast:
    """Train, test and keep everything that `leakage_report` needs; the same call again goes on where it was cut off.

    Args:
        out: the run's folder.
        settings: what all pieces share.
        arms: as the module's docstring says.
        sites: feature sites by name, path or glob.
        guidance: s; each is trained and tested by itself, except arm U, which is trained without.
        seeds: projectors of each kind.
        conditions: of `CONDITIONS`.
        knockouts: cut at test time, one after the other, beside the uncut features.
        likelihood: conditions under which fed texts are ranked among others, as the settings say.
        stores: stores whose features are used where they fit.
        dry_run: forecast only.
        loaded: model, data, test, language: loaded ones instead of the settings' names.

    Raises:
        LeakageError: an arm or condition is not one, the folder holds another run, or datasets overlap.
    """
    held = Run(out, settings or Settings(), stores=stores, device=device, tell=tell, **loaded)
    tests = plan(arms, held.features.site_names(sites), timesteps, guidance, seeds, conditions, knockouts)
    ranked = [t for t in tests if t.condition in likelihood and not t.knockout]
    forecast = held.forecast(tests, ranked)
    held.tell(str(forecast))
    if not dry_run:
        held.complete(tests, ranked)
    return forecast


# --- the report -------------------------------------------------------------------------------------


def read_texts(folder: str | Path, tests: Sequence[Test] | None = None) -> pd.DataFrame:
    """Texts of a run, all or those of some pieces; empty texts stay empty.

    Raises:
        LeakageError: nothing was written there yet.
    """
    paths = [Path(folder) / "texts" / f"{t.slug}.csv" for t in tests] if tests is not None else [Path(folder) / "texts.csv"]
    if absent := [path for path in paths if not path.exists()]:
        if not (Path(folder) / "request.json").exists():
            raise LeakageError(f"{folder} is no folder that 'diffprobe leakage run' filled; its --out names one.")
        raise LeakageError(
            f"{absent[0]} does not exist: 'diffprobe leakage run --out {folder}' makes it, and goes on where it was cut off."
        )
    return pd.concat([_read(path) for path in paths], ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    """A file of texts. Words such as "null" are words; a timestep is whole or "": K+ has none, which would make floats of all."""
    words_ = ("control", "arm", "site", "timestep", "condition", "sample", "fed", "source", "references", "output")
    texts = pd.read_csv(path, dtype=dict.fromkeys(words_, str), keep_default_na=False, na_values={"guidance": [""]})
    return texts.assign(timestep=pd.Series([int(t) if t else "" for t in texts["timestep"]], dtype=object))


def frequencies(folder: str | Path) -> DocumentFrequencies:
    """Document frequencies for CIDEr-D, from the captions of the run's training images."""
    settings = json.loads((Path(folder) / "request.json").read_text(encoding="utf-8"))
    return document_frequencies(
        settings["data"], [[c.text for c in s.captions] for s in iterate(load_dataset(settings["data"]))]
    )


@dataclass(frozen=True)
class Report:
    """A run in words and tables.

    Attributes:
        sentences: one verdict for each arm, site, timestep and guidance.
        leakage: scores and verdicts by content-word F1 under mismatched prompts.
        cider: CIDEr-D of each cell: against the fed text and against the references, with intervals.
        likelihood: top-1, MRR, bits and usable information of the fed text, where it was ranked.
        examples: outputs side by side: sample, condition, fed, references' first, one column an arm.
    """

    sentences: list[str]
    leakage: Leakage
    cider: pd.DataFrame
    likelihood: pd.DataFrame
    examples: pd.DataFrame

    def summary(self) -> pd.DataFrame:
        """One row a cell and condition: its scores with their intervals, as text."""
        scores = pd.concat([self.leakage.table, self.cider])
        scores["text"] = [
            f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(scores["value"], scores["low"], scores["high"], strict=True)
        ]
        keys = ["control", "arm", "site", "timestep", "guidance", "condition"]
        scores["guidance"] = ["" if pd.isna(s) else f"{s:g}" for s in scores["guidance"]]
        wide = scores.pivot_table(index=keys, columns="score", values="text", aggfunc="first", sort=False)
        return wide.reindex(columns=["leak", "sight", "fed", "references"]).fillna("").reset_index().rename_axis(columns=None)


def leakage_report(folder: str | Path, *, n_examples: int = 4, seed: int = 0) -> Report:
    """Judge a run from its kept files.

    Raises:
        LeakageError: there are no texts.

    >>> leakage_report("runs/leak").sentences[0]  # doctest: +SKIP
    'The language model reads the prompt ...'
    """
    texts = read_texts(folder)
    leakage = judge_leakage(texts, seed=seed)
    return Report(
        [sentence({str(k): v for k, v in row.items()}) for row in leakage.verdicts.to_dict("records")],
        leakage,
        score_texts(texts, frequencies(folder), seed=seed),
        rank_texts(folder, seed=seed),
        examples(texts, n_examples),
    )


def score_texts(texts: pd.DataFrame, known: DocumentFrequencies, seed: int = 0) -> pd.DataFrame:
    """CIDEr-D (0 to 10) of every cell: columns control ... condition, score, value, low, high, n, n_seeds, chance, seed.

    score is "fed" (against the text that was fed in) or "references"; chance is the mean over texts of other images.
    """
    from diffprobe.stats import bootstrap_interval

    rows = []
    similarity = cider_similarity(known)
    keys = ["control", "arm", "site", "timestep", "guidance", "condition"]
    for key, group in texts.groupby(keys, dropna=False, sort=False):
        for score in ("fed", "references"):
            against = [[f] for f in group["fed"]] if score == "fed" else [json.loads(r) for r in group["references"]]
            kept = np.array([bool(texts_[0]) if texts_ else False for texts_ in against])
            if kept.sum() < 2:
                continue
            part = group[kept]
            against = [a for a, keep in zip(against, kept, strict=True) if keep]
            values = cider_d(list(part["output"]), against, known)
            first = (part["seed"] == part["seed"].iloc[0]).to_numpy()
            matrix = similarity(list(part["output"][first]), [a for a, keep in zip(against, first, strict=True) if keep])
            off = matrix[~np.eye(len(matrix), dtype=bool)]
            low, high = bootstrap_interval(values, clusters=part["sample"], seed=seed)
            rows.append(
                {**dict(zip(keys, key, strict=True)), "score": score, "value": values.mean(), "low": low, "high": high,
                 "n": part["sample"].nunique(), "n_seeds": part["seed"].nunique(), "chance": off.mean(), "seed": seed}
            )  # fmt: skip
    return pd.DataFrame(rows)


def item_scores(texts: pd.DataFrame, condition: str = "mismatched", similarity: Similarity = content_f1) -> pd.DataFrame:
    """Leak and sight of every text by itself: columns control, arm, site, timestep, guidance, seed, sample, leak, sight.

    As in `diffprobe.mllm.verdict`: a similarity less its mean over the texts of other images.
    """
    rows = []
    keys = ["control", "arm", "site", "timestep", "guidance", "seed"]
    for key, group in texts[texts["condition"] == condition].groupby(keys, dropna=False, sort=False):
        names, sources = group["sample"].to_numpy(str), group["source"].to_numpy(str)
        outputs = list(group["output"])
        leak = centre(similarity(outputs, [[fed] for fed in group["fed"]]), names[:, None] == sources[None, :])
        sight = centre(similarity(outputs, [json.loads(r) for r in group["references"]]), sources[:, None] == names[None, :])
        about = dict(zip(keys, key, strict=True))
        rows.append(pd.DataFrame({**about, "sample": names, "leak": np.diag(leak), "sight": np.diag(sight)}))
    return pd.concat(rows, ignore_index=True)


def compare(items: pd.DataFrame, label: str, baseline: str) -> pd.DataFrame:
    """Mean leak and sight of each label and their change from the baseline's, on the same images and projector seeds.

    Args:
        items: of `item_scores`, with a column that names what is compared.
        label: that column.
        baseline: its value that the others are compared with.

    Returns:
        Rows of label and score with value, low, high, change, change_low, change_high, n, n_seeds, chance.
    """
    rows = []
    for score in ("leak", "sight"):
        tables = {
            name: part.pivot(index="seed", columns="sample", values=score) for name, part in items.groupby(label, sort=False)
        }
        base = tables[baseline]
        for name, table in tables.items():
            mean, change = crossed_mean(table.to_numpy()), crossed_mean((table - base[table.columns]).to_numpy())
            rows.append(
                {"label": name, "score": score, **{k: mean[k] for k in ("value", "low", "high")},
                 "change": change["value"], "change_low": change["low"], "change_high": change["high"],
                 "n": table.shape[1], "n_seeds": table.shape[0], "chance": 0.0}
            )  # fmt: skip
    return pd.DataFrame(rows)


def rank_texts(folder: str | Path, seed: int = 0) -> pd.DataFrame:
    """`rank_fed` and `usable_information` of every cell that was ranked; seeds pooled, images as clusters.

    The column `baseline` says what a candidate's log-likelihood is compared with: "blank" (a blank image without a prompt),
    "no prompt" (the same image without one), or "none".  A projector has never seen a blank image, and what it makes of one
    differs between texts for reasons of its own; the same image without a prompt lies nearer to what it knows.
    """
    held: dict[tuple[Any, ...], list[Any]] = {}
    keys = ["control", "arm", "site", "timestep", "guidance", "condition"]
    named = {path.stem: path for path in sorted((Path(folder) / "texts").glob("*.csv"))}
    for path in sorted((Path(folder) / "likelihood").glob("*.npz")):
        if path.stem in named:
            row = _read(named[path.stem]).iloc[0]
            held.setdefault(tuple(str(row[k]) for k in keys), []).append((row, np.load(path, allow_pickle=False)))
    rows = []
    for parts in held.values():
        key = {k: parts[0][0][k] for k in keys}
        arrays = [array for _, array in parts]
        clusters = np.concatenate([a["samples"] for a in arrays])
        given = np.concatenate([a["conditional"] for a in arrays])
        zero = np.zeros_like(given)
        less = {name: np.concatenate([a[key_] for a in arrays]) if key_ else zero for name, key_ in BASELINES.items()}
        found = pd.concat(
            rank_fed(given, values, clusters=clusters, seed=seed).assign(baseline=name) for name, values in less.items()
        )
        if all("unconditional" in a for a in arrays):
            alone = np.concatenate([a["unconditional"] for a in arrays])
            tokens = np.concatenate([a["tokens"][:, 0] for a in arrays])
            told = usable_information(given[:, 0], alone, tokens, clusters=clusters, seed=seed)
            found = pd.concat([found, told.assign(baseline="no prompt")])
        rows.append(found.assign(**key, n_seeds=len(arrays)))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def examples(texts: pd.DataFrame, count: int = 4, conditions: Sequence[str] = ("own", "mismatched", "none")) -> pd.DataFrame:
    """Outputs of the first projector of each arm for the first samples, side by side: one row a sample and condition."""
    first = texts[(texts["seed"] == texts["seed"].min()) & texts["condition"].isin(conditions)].copy()
    first = first[first["sample"].isin(list(dict.fromkeys(first["sample"]))[:count])]
    scale = first["guidance"].map(lambda s: "" if pd.isna(s) else f" s={s:g}")
    first["who"] = first["control"] + first["arm"] + scale + np.where(first["site"].nunique() > 1, " " + first["site"], "")
    first["seen"] = [next(iter(json.loads(r)), "") for r in first["references"]]
    wide = first.pivot_table(
        index=["sample", "seen", "condition", "fed"], columns="who", values="output", aggfunc="first", sort=False
    )
    return wide.reset_index().rename_axis(columns=None)


def save_report(found: Report, folder: str | Path) -> list[Path]:
    """Tables and figures of a report: scores.csv, verdicts.csv, likelihood.csv, examples.csv, and the pictures."""
    from diffprobe.plotting import plot_leak_examples, plot_leak_sight, save_figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "scores": pd.concat([found.leakage.table, found.cider]), "verdicts": found.leakage.verdicts, "likelihood": found.likelihood,
        "examples": found.examples,
    }  # fmt: skip
    for name, table in tables.items():
        write_whole(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    plane = leak_against_sight(found.leakage)
    about = {"verdicts": found.sentences}
    alt = "Leak against sight of every arm with intervals; controls in grey, chance dotted."
    made = [save_figure(plot_leak_sight(plane), folder, "leak_against_sight", plane, about, alt)["png"]]
    alt = "Texts side by side: what was fed in, what the image shows, and what each arm wrote."
    made.append(save_figure(plot_leak_examples(found.examples), folder, "side_by_side", found.examples, about, alt)["png"])
    return [*(folder / f"{name}.csv" for name in tables), *made]


def leak_against_sight(leakage: Leakage, condition: str = "mismatched") -> pd.DataFrame:
    """One row a cell for `plot_leak_sight`: label, control, and leak and sight with their intervals."""
    chosen = leakage.table[leakage.table["condition"] == condition]
    many = {k: chosen[chosen["control"] == ""][k].nunique() > 1 for k in ("site", "timestep")}
    rows = []
    for _, part in chosen.groupby(["control", "arm", "site", "timestep", "guidance"], dropna=False, sort=False):
        first, scores = part.iloc[0], part.set_index("score")
        if {"leak", "sight"} - set(scores.index):
            continue
        words_ = [first["site"]] if first["control"] else [first["arm"], f"s={first['guidance']:g}"]
        words_ += [f"{first['site']}"] if many["site"] and not first["control"] else []
        words_ += [f"t={first['timestep']}"] if many["timestep"] and first["timestep"] != "" else []
        row = {"label": " ".join(words_), "control": first["control"]}
        for score in ("leak", "sight"):
            row |= {score: scores.loc[score, "value"]} | {f"{score}_{end}": scores.loc[score, end] for end in ("low", "high")}
        rows.append({**row, "n": first["n"], "n_seeds": first["n_seeds"]})
    return pd.DataFrame(rows)


__all__ = [
    "LeakageError",
    "Recipe",
    "Report",
    "Run",
    "Settings",
    "Test",
    "compare",
    "item_scores",
    "leakage_report",
    "plan",
    "read_texts",
    "run",
    "save_report",
    "score_texts",
]
