"""Fill the folder of a leakage audit: record features, train projectors, write and rank texts.

`diffprobe.mllm.leakage` says what a run is, and reads its files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diffprobe.checkpoints import weights_hash
from diffprobe.conditioning import NULL, current
from diffprobe.console import duration_text
from diffprobe.data import BlankDataset, Dataset, iterate, load_dataset
from diffprobe.mllm.captions import words
from diffprobe.mllm.config import TrainConfig
from diffprobe.mllm.features import MITIGATIONS, Features, FeatureSpec, describe
from diffprobe.mllm.language import (
    LanguageModel,
    answer_losses,
    build_inputs,
    generate_texts,
    load_language_model,
    log_likelihood,
)
from diffprobe.mllm.leakage import FED, MAIN_SITE, PROMPTS, LeakageError, Recipe, Settings, Test, plan, read_table, read_texts
from diffprobe.mllm.projector import Projector
from diffprobe.mllm.train import Captioned, timed, train_projector
from diffprobe.mllm.verdict import CONDITIONS, matched_candidates
from diffprobe.models import DiffusionModel, load_model
from diffprobe.rundir import check_or_write_request, whole_file, write_whole

OWN = ("accumulate", "dropout", "seed", "evaluate_every")  # of a training, which its recipe decides


@dataclass(frozen=True)
class Forecast:
    """What a run will take; seconds on this machine."""

    recordings: list[str]
    projectors: int
    texts: int
    rankings: int
    seconds: float

    def __str__(self) -> str:
        work = f"{self.projectors} projectors to train, {self.texts} texts to write, {self.rankings} rankings of texts"
        return "\n".join([*self.recordings, work, f"about {duration_text(self.seconds)}"])


class Run:
    """A folder and what it takes to fill it.

    Args:
        model, data, test, language: Loaded ones instead of those that the settings name.
        stores: Stores to look for features in before recording them.

    Raises:
        RequestError: The folder holds a run with other settings.
        LeakageError: An image is in training and test.
    """

    def __init__(
        self, folder: str | Path, settings: Settings, *, model: DiffusionModel | None = None, data: Dataset | None = None,
        test: Dataset | None = None, language: LanguageModel | None = None, stores: Sequence[str | Path] = (),
        device: str | None = None, tell: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.folder, self.settings = Path(folder), settings
        self.is_main = os.environ.get("RANK", "0") == "0"
        self.tell = tell if self.is_main else lambda line: None
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
        datasets = {"data_fingerprint": self.data.fingerprint(), "test_fingerprint": self.test.fingerprint()}
        weights = {"weights": self.model.weights_hash(), "language_weights": weights_hash(self.language.model)}
        about = datasets | weights | {"n_test": len(self.test)}
        shared = {name: value for name, value in asdict(settings).items() if name not in OWN}
        check_or_write_request(self.folder / "request.json", shared | about)
        splits = {"train": self.data, "test": self.test, "blank": BlankDataset(self.test)}
        where = self.folder / "stores"
        self.features = Features(self.model, splits, where, settings.grid, settings.noise_seed, stores, settings.batch_rows)

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

    def references(self, sample: str, fed: str) -> list[str]:
        """Captions that score sight: neither the one that is used as a prompt, nor what was fed in."""
        own = self.captions[sample]
        used = [words(own[0]), words(fed)] if len(own) > 1 else [words(fed)]
        return [text for text in dict.fromkeys(own) if words(text) not in used]

    # --- features ---------------------------------------------------------------------------------

    def asked(self, recipe: Recipe, split: str, conditioning: str, guidance: float, knockout: str = "") -> FeatureSpec:
        mitigation = recipe.parts[2]
        changed, cut = (mitigation, "") if mitigation in MITIGATIONS else ("", mitigation)
        return FeatureSpec(split, recipe.site, recipe.timestep, conditioning, guidance, changed, knockout or cut)

    def training(self, recipe: Recipe) -> list[FeatureSpec]:
        """Features that a recipe is trained on, and those that dropout shows instead."""
        base, dropout, _ = recipe.parts
        found = [self.asked(recipe, "train", PROMPTS[base], recipe.guidance)]
        return [*found, self.asked(recipe, "train", NULL, recipe.guidance)] if dropout else found

    def testing(self, test: Test, split: str = "", conditioning: str = "") -> FeatureSpec:
        """Features of a test: its condition's, or those of the same projector on another split and conditioning."""
        shown, fed = FED[test.condition]
        return self.asked(test.recipe, split or shown, conditioning or fed, test.guidance, test.knockout)

    def _all_features(self, tests: Sequence[Test], ranked: Sequence[Test]) -> list[FeatureSpec]:
        found = [asked for recipe in dict.fromkeys(t.recipe for t in tests) for asked in self.training(recipe)]
        found += [self.testing(test) for test in tests]
        return [*found, *(self.testing(test, split, NULL) for split in ("blank", "test") for test in ranked)]

    # --- pieces -----------------------------------------------------------------------------------

    def projector_folder(self, recipe: Recipe) -> Path:
        return self.folder / "projectors" / recipe.slug

    def is_trained(self, recipe: Recipe) -> bool:
        return (self.projector_folder(recipe) / "projector.safetensors").exists()

    def path(self, test: Test) -> Path:
        return self.folder / "texts" / f"{test.slug}.csv"

    def ranked_path(self, test: Test) -> Path:
        return self.folder / "likelihood" / f"{test.slug}.npz"

    def train_config(self, recipe: Recipe) -> TrainConfig:
        own = {"dropout": recipe.parts[1], "seed": recipe.seed, "evaluate_every": max(1, min(50, self.settings.steps // 4))}
        return TrainConfig(**{field.name: getattr(self.settings, field.name) for field in fields(TrainConfig)} | own)

    def projector(self, recipe: Recipe) -> Projector:
        """The recipe's projector: loaded, or trained from the start or from its last checkpoint."""
        folder = self.projector_folder(recipe)
        if self.is_trained(recipe):
            return Projector.load(folder).to(self.language.device)
        sets = []
        for ids in self.split:
            tensors = [self.features.tokens(asked, ids) for asked in self.training(recipe)]
            sets.append(Captioned(tensors[0], [self.captions[i][0] for i in ids], *tensors[1:]))
        return train_projector(
            self.language, sets[0], sets[1], folder, self.train_config(recipe), log=lambda line: self.tell(f"  {line}")
        )

    def write(self, test: Test, projector: Projector) -> None:
        """Write the texts of every test image under one condition into a file of their own."""
        ids = self.features.ids("test")
        texts, sources = self.fed(test.condition)
        features = self.features.tokens(self.testing(test), ids)
        said = generate_texts(
            self.language, projector, features, self.settings.request, max_new_tokens=self.settings.max_new_tokens
        )
        rows = [
            {**test.key, "sample": i, "fed": texts[i], "source": sources[i],
             "references": json.dumps(self.references(i, texts[i]), ensure_ascii=False), "output": output}
            for i, output in zip(ids, said, strict=True)
        ]  # fmt: skip
        write_whole(self.path(test), pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))

    @cached_property
    def pool(self) -> list[str]:
        """Texts that a fed one is ranked among: first captions of test and training images, each once."""
        firsts = [self.captions[s.id][0] for d in (self.test, self.data) for s in iterate(d)]
        return list(dict.fromkeys(firsts))[:1000]

    def rank(self, test: Test, projector: Projector) -> None:
        """Keep log P of length-matched candidates given the features, a blank image's, and the same image's without a prompt.

        Arrays (sample, candidate) for `diffprobe.mllm.leakage.rank_texts`.
        """
        ids = self.features.ids("test")[: self.settings.ranked]
        texts, _ = self.fed(test.condition)
        fed = [texts[i] for i in ids]
        pool = [*fed, *(text for text in self.pool if text not in set(fed))]
        lengths = [len(self.language.answer(text)) for text in pool]
        chosen = matched_candidates(pool, self.settings.candidates, lengths, self.settings.noise_seed)[: len(ids)]
        asked = [[pool[k] for k in row] for row in chosen]
        used, place = np.unique(chosen, return_inverse=True)

        def likelihood(features: FeatureSpec, ids: Sequence[str], texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
            return log_likelihood(self.language, projector, self.features.tokens(features, ids), texts, self.settings.request)

        given, tokens = likelihood(self.testing(test), ids, asked)
        alone, _ = likelihood(self.testing(test, "blank", NULL), ids[:1], [[pool[k] for k in used]])
        null, _ = likelihood(self.testing(test, "test", NULL), ids, asked)
        blank = alone[0][place].reshape(chosen.shape)
        arrays = {"conditional": given, "blank": blank, "null": null, "tokens": tokens, "samples": np.array(ids)}
        reader = replace(test.recipe, arm="U", guidance=0.0, control="")
        if not test.recipe.control and self.is_trained(
            reader
        ):  # log P of the fed text under the reader of unconditional features
            projector = self.projector(reader)
            own, _ = likelihood(self.asked(reader, "test", NULL, 0.0), ids, [row[:1] for row in asked])
            arrays["unconditional"] = own[:, 0]
        with whole_file(self.ranked_path(test)) as beside, beside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    # --- all together -----------------------------------------------------------------------------

    def _left(self, tests: Sequence[Test], ranked: Sequence[Test]) -> tuple[list[Recipe], list[Test], list[Test]]:
        """Recipes to train, tests to write and tests to rank."""
        untrained = [recipe for recipe in dict.fromkeys(t.recipe for t in tests) if not self.is_trained(recipe)]
        unwritten = [t for t in tests if not self.path(t).exists()]
        return untrained, unwritten, [t for t in ranked if not self.ranked_path(t).exists()]

    def forecast(self, tests: Sequence[Test], ranked: Sequence[Test] = ()) -> Forecast:
        """What is left to do, timed on a few steps."""
        ranked = ranked if self.settings.ranked else ()
        recordings = self.features.missing(self._all_features(tests, ranked))
        seconds = sum(self.features.record(recording, dry_run=True) for recording in recordings)
        untrained, unwritten, unranked = self._left(tests, ranked)
        step, text = self._time() if untrained or unwritten else (0.0, 0.0)
        texts = len(unwritten) * len(self.test)
        seconds += len(untrained) * self.settings.steps * step + texts * text
        lines = [describe(r, len(self.features.data[r["split"]])) for r in recordings]
        return Forecast(lines, len(untrained), texts, len(unranked), seconds)

    def _time(self) -> tuple[float, float]:
        """Seconds of a training step and of a text, on the longest captions."""
        s, language = self.settings, self.language
        features = torch.zeros(s.batch, s.grid**2, 64)
        projector = Projector(64, language.width, s.kind, language.rms).to(language.device)
        longest = sorted((texts[0] for texts in self.captions.values()), key=len)[-s.batch :]
        answers = [language.answer(text) for text in longest]
        shown = features[: len(answers)].to(language.device)
        inputs = lambda: build_inputs(language, projector(shown), [s.request] * len(answers), answers)  # noqa: E731
        stepping, _ = timed(lambda: answer_losses(language, inputs()).sum().backward())
        writing, _ = timed(lambda: generate_texts(language, projector, features, s.request, max_new_tokens=8))
        return stepping, writing / len(features) * min(s.max_new_tokens, max(map(len, answers))) / 8

    def complete(self, tests: Sequence[Test], ranked: Sequence[Test] = ()) -> pd.DataFrame:
        """Do what is left of these pieces; gives their texts, which are part of ``texts.csv``.

        Args:
            ranked: Those of them whose fed text is ranked among others as the settings say.
        """
        ranked = ranked if self.settings.ranked else ()
        for recording in self.features.missing(self._all_features(tests, ranked)):
            self.features.record(recording)
        untrained, unwritten, unranked = self._left(tests, ranked)
        recipes = list(dict.fromkeys(t.recipe for t in tests))
        recipes.sort(key=lambda r: r.parts[0] != "U")  # the reader of unconditional features comes first: rankings ask for it
        for number, recipe in enumerate(recipes, start=1):
            texts, rankings = ([t for t in left if t.recipe == recipe] for left in (unwritten, unranked))
            if recipe not in untrained and not texts and not rankings:
                continue
            self.tell(f"{number} of {len(recipes)}  {recipe.slug}")
            projector = self.projector(recipe)
            if self.is_main:
                for test in texts:
                    self.write(test, projector)
                for test in rankings:
                    self.rank(test, projector)
        if not self.is_main:
            return pd.DataFrame()
        found = pd.concat([read_table(p) for p in sorted((self.folder / "texts").glob("*.csv"))], ignore_index=True)
        write_whole(self.folder / "texts.csv", found.to_csv(index=False, lineterminator="\n"))
        return read_texts(self.folder, tests)


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
        arms: As the docstring of `diffprobe.mllm.leakage` says.
        sites: Feature sites by name, path or glob.
        guidance: s; each is trained and tested by itself, except arm U, which is trained without.
        knockouts: Cut at test time, one after the other, beside the uncut features.
        likelihood: Conditions under which fed texts are ranked among others, as the settings say.
        stores: Stores whose features are used where they fit.
        loaded: `model`, `data`, `test` or `language` of `Run`.

    Raises:
        RequestError: The folder holds another run.
        LeakageError: An arm or condition is unknown, or datasets overlap.
    """
    if old := [text for text in (*arms, *knockouts) if current(text) != text]:
        tell(f"{', '.join(old)}: today's spelling is {', '.join(map(current, old))}; the next release drops the old one.")
    arms, knockouts = list(map(current, arms)), list(map(current, knockouts))
    held = Run(out, settings or Settings(), stores=stores, device=device, tell=tell, **loaded)
    tests = plan(arms, held.features.site_names(sites), timesteps, guidance, seeds, conditions, knockouts)
    ranked = [t for t in tests if t.condition in likelihood and not t.knockout]
    forecast = held.forecast(tests, ranked)
    held.tell(str(forecast))
    if not dry_run:
        held.complete(tests, ranked)
    return forecast
