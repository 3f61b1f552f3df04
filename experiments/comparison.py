"""One recipe, many ways of seeing: what an encoder, a site, a timestep, a guidance or a fusion is worth to a language model.

Every arm is trained from the same language model on the same data, in the same order, once for each seed, and answers the same
questions, so arms are compared item by item and seed by seed.  Stage 1 tells the diffusion model nothing, so arms that differ
in guidance alone share it; frozen encoders encode each picture once for all arms.

A run lives in a folder and does each piece once: ``request.json`` (what its pieces share), ``features/``, ``stage1/``,
``stage2/`` (one model for each arm and seed), ``answers/`` (one file for each arm, seed and condition, in a folder that is named
for what was asked: other questions, or other images, are answered anew by the same models).
`score_rows` and `change_rows` read the answers alone and need no torch.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffprobe.data.twins import PATTERNS
from diffprobe.mllm.config import BackboneConfig, FusedConfig, Precision, StageConfig, Tuned
from diffprobe.mllm.verdict import crossed_mean
from diffprobe.rundir import BusyError, check_or_write_request, write_whole
from diffprobe.stats import wilson_interval
from experiments.framework import MAIN_SITE

if TYPE_CHECKING:
    from diffprobe.data.question_benchmarks import QuestionBenchmark
    from diffprobe.mllm.model import FusedMLLM

MAIN_TIMESTEP = 50
# in place of a site
CONTROLS = {"truth": "oracle", "latent": "VAE latent", "text": "text alone", "encoder:shapes-vit": "shapes-vit"}
WAIT = 10.0  # seconds until a folder that another process trains in is tried again
BLIND_SPOTS = ("orientation", "quantity", "position", "text")  # patterns that the captions of CLIP's training leave out


@dataclass(frozen=True)
class Arm:
    """A way of seeing; `site` may name several, separated by "+". CLIP alone uses no site, so its own does not matter."""

    fusion: str
    site: str = MAIN_SITE
    timestep: int = MAIN_TIMESTEP
    guidance: float = 0.0

    @property
    def label(self) -> str:
        """
        >>> Arm("clip").label, Arm("diffusion").label, Arm("cross_attention", guidance=4).label
        ('CLIP', 'U-L1-R1-B0-Cross-Q t=50', 'cross_attention s=4')
        """
        if self.fusion == "clip":
            return "CLIP"
        if self.fusion == "diffusion" and self.site in CONTROLS:
            return CONTROLS[self.site]
        if self.fusion == "diffusion" and self.guidance == 0:
            return f"{self.site} t={self.timestep}"
        more = f" {CONTROLS.get(self.site, self.site.removeprefix(MAIN_SITE))}" if self.site != MAIN_SITE else ""
        late = f" t={self.timestep}" if self.timestep != MAIN_TIMESTEP else ""
        return f"{self.fusion} s={self.guidance:g}{more}{late}"

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.site.split("+"))

    @property
    def slug(self) -> str:
        if self.fusion == "clip":
            return "clip"
        return re.sub(r"[^\w.+-]+", "-", f"{self.fusion}_{self.site}_t{self.timestep}_s{self.guidance:g}")


@dataclass(frozen=True)
class Settings(BackboneConfig):
    """What all pieces of a run share.

    Attributes:
        template: how the language model is spoken to, as in `FusedConfig`; two if captions are written another way.
        captions, instructions: data of the two stages, by the names of `load_conversations`.
        benchmarks: questions, by the names of `load_questions`.
        steps, batch, rates, precision: settings of the two stages, as in `StageConfig`.
        tune: what stage 2 trains of the language model.
        max_new_tokens: the longest answer.
    """

    template: tuple[str, ...] = ("",)
    captions: str = "shapes-details:6000"
    instructions: str = "shapes-instruct:6000"
    benchmarks: tuple[str, ...] = ("shapes-vqa:270", "shapes-mmvp:270", "shapes-naturalbench:135", "shapes-blink:60")
    steps: tuple[int, int] = (1200, 800)
    batch: int = 32
    rates: tuple[float, float] = (2e-3, 1e-3)
    precision: Precision = "bf16"
    tune: Tuned = "full"
    max_new_tokens: int = 6


class Comparison:
    """A folder and what it takes to fill it.

    Args:
        folder: the run's.
        settings: shared by all of its pieces.
        device: as for `load_model`.
        log: gets progress lines.

    Raises:
        ValueError: the folder holds a run with other settings or weights, or no score is known for a benchmark.
    """

    def __init__(
        self, folder: str | Path, settings: Settings, device: str | None = None, log: Callable[[str], None] = print
    ) -> None:
        from diffprobe.checkpoints import weights_hash
        from diffprobe.data.conversations import load_conversations
        from diffprobe.encoders import load_encoder
        from diffprobe.mllm.language import load_language_model
        from diffprobe.mllm.streams import FeatureCache
        from diffprobe.models import load_model

        kinds = [spec.partition(":")[0].removeprefix(DRAWN) for spec in settings.benchmarks]
        known = {kind for scored, _ in SCORES.values() for kind in scored}
        if wrong := [kind for kind in kinds if kind not in known or kinds.count(kind) > 1]:
            raise ValueError(
                f"Arms are compared on one benchmark each of {', '.join(sorted(known))}; found {', '.join(wrong)}. "
                "'diffprobe mllm eval' judges the others."
            )
        self.folder, self.settings, self.device, self.log = Path(folder), settings, device, log
        language = load_language_model(settings.language_model, device)
        self.encoder, self.diffusion = load_encoder(settings.encoder, device), load_model(settings.diffusion, device)
        self.captions, self.instructions = load_conversations(settings.captions), load_conversations(settings.instructions)
        self.cache = FeatureCache(self.folder / "features")
        request = {
            **asdict(settings), "encoder_weights": self.encoder.weights_hash(), "diffusion_weights": self.diffusion.weights_hash(),
            "language_weights": weights_hash(language.model),
            "captions_data": self.captions.fingerprint(), "instructions_data": self.instructions.fingerprint(),
        }  # fmt: skip
        check_or_write_request(self.folder / "request.json", request, "holds another run; give another folder.")

    @cached_property
    def benchmarks(self) -> list[QuestionBenchmark]:
        """The questions, images that are drawn held in memory."""
        from diffprobe.data.question_benchmarks import load_questions

        found = []
        for spec in self.settings.benchmarks:
            benchmark = load_questions(spec)
            if spec.startswith(DRAWN):  # photographs take too much memory, and are read faster than drawn
                items = [replace(item, images=tuple(_held(load()) for load in item.images)) for item in benchmark.items]
                benchmark = replace(benchmark, items=tuple(items))
            found.append(benchmark)
        return found

    def model(self, arm: Arm, seed: int) -> FusedMLLM:
        """A fresh model of an arm, with a language model of its own."""
        from diffprobe.mllm.model import FusedMLLM

        shared = {field.name: getattr(self.settings, field.name) for field in fields(BackboneConfig)}
        config = FusedConfig(
            **shared, template=self.settings.template[-1], fusion=arm.fusion, sites=arm.sites, timestep=arm.timestep,
            guidance=arm.guidance, seed=seed,
        )  # fmt: skip
        return FusedMLLM.build(config, self.device, encoder=self.encoder, diffusion=self.diffusion, cache=self.cache)

    def stages(self, seed: int) -> tuple[StageConfig, StageConfig]:
        s = self.settings
        first, second = (
            StageConfig(
                steps=steps, batch=s.batch, learning_rate=rate, precision=s.precision, evaluate_every=min(steps, 200), seed=seed
            )
            for steps, rate in zip(s.steps, s.rates, strict=True)
        )
        return replace(first, template=s.template[-2] if s.template[1:] else ""), replace(second, tune=s.tune, prompted=True)

    def trained(self, arm: Arm, seed: int) -> FusedMLLM:
        """The arm's model after both stages; what is done is loaded."""
        from safetensors.torch import load_file

        from diffprobe.mllm.model import CONFIG, WEIGHTS, FusedMLLM
        from diffprobe.mllm.stages import train_stage

        first, second = self.stages(seed)
        unprompted = replace(arm, guidance=0.0)
        before, folder = (
            self.folder / stage / f"{a.slug}_seed{seed}" for stage, a in (("stage1", unprompted), ("stage2", arm))
        )
        if not (folder / CONFIG).exists():
            while not (before / CONFIG).exists():
                fresh = self.model(unprompted, seed)
                try:
                    train_stage(fresh, self.captions, before, first, log=lambda line: self.log(f"  1 {line}"))
                except BusyError as busy:
                    # arms that differ in guidance share stage 1, and another process may have one of them
                    self.log(f"  1 {busy}")
                    time.sleep(WAIT)
            model = self.model(arm, seed)
            model.fusion.load_state_dict(load_file(before / WEIGHTS))
            train_stage(model, self.instructions, folder, second, start=before.name, log=lambda line: self.log(f"  2 {line}"))
        # loaded, also when just trained: on a GPU in another dtype, and answers must not depend on where a run was cut off
        return FusedMLLM.from_pretrained(folder, self.device, encoder=self.encoder, diffusion=self.diffusion, cache=self.cache)

    @cached_property
    def _asked(self) -> str:
        """Hash of all that the benchmarks hold."""
        return hashlib.sha256("".join(benchmark.fingerprint() for benchmark in self.benchmarks).encode()).hexdigest()[:12]

    def path(self, arm: Arm, seed: int, condition: str) -> Path:
        return self.folder / "answers" / self._asked / f"{arm.slug}_seed{seed}_{condition}.csv"

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Fill the cache with the unprompted features of every site of these arms, in one pass per picture and timestep."""
        from diffprobe.mllm.stages import Samples
        from diffprobe.mllm.streams import DiffusionEncoder, Picture, Streams

        arms = [arm for arm in arms if arm.fusion != "clip" and arm.site not in CONTROLS]
        if not arms:
            return
        pictures = []
        for data, stage in zip((self.captions, self.instructions), self.stages(0), strict=True):
            samples = Samples(self.model(arms[0], 0), data, stage)
            pictures += samples.prompted_pictures(samples.rows)[0]
        pictures += [Picture.of(load()) for benchmark in self.benchmarks for item in benchmark.items for load in item.images]
        for timestep in sorted({arm.timestep for arm in arms}):
            sites = sorted({site for arm in arms if arm.timestep == timestep for site in arm.sites})
            encoder = DiffusionEncoder(self.diffusion, sites, timestep, self.settings.noise_seed)
            streams = Streams({"diffusion": encoder}, self.settings.grid, guidance=0.0, cache=self.cache)
            streams.prepare(pictures, [None] * len(pictures), partial(self._prepared, timestep))

    def _prepared(self, timestep: int, done: int, total: int) -> None:
        if done == total or done % 640 == 0:
            self.log(f"t={timestep}: {done} of {total} pictures looked at")

    def complete(self, pieces: Mapping[Arm, Sequence[str]], seeds: Sequence[int]) -> pd.DataFrame:
        """Train and question what is left of these pieces; gives all their answers.

        Args:
            pieces: for each arm the conditions that it answers under.
            seeds: seeds of the first weights; each arm is trained once for each.

        Returns:
            One row an answer: arm (its label), seed, condition, benchmark, item, chance, output, hit.
        """
        from diffprobe.mllm.answers import options_of
        from diffprobe.mllm.judging import answer_items, hit

        wanted = [(arm, seed) for seed in seeds for arm in pieces]
        todo = [(a, s) for a, s in wanted if not all(self.path(a, s, c).exists() for c in pieces[a])]
        if todo:
            self.prepare(list(dict.fromkeys(arm for arm, _ in todo)))
        for number, (arm, seed) in enumerate(todo, start=1):
            self.log(f"{number} of {len(todo)}  {arm.label}, seed {seed}")
            model = self.trained(arm, seed)
            for condition in pieces[arm]:
                if (path := self.path(arm, seed, condition)).exists():
                    continue
                rows = []
                for benchmark in self.benchmarks:
                    said = answer_items(
                        model, benchmark.items, condition, batch=64, max_new_tokens=self.settings.max_new_tokens
                    )
                    kind = benchmark.spec.partition(":")[0]
                    rows += [
                        {"benchmark": kind, "item": k, "chance": 1 / len(options_of(record)), "output": record["output"],
                         "hit": hit(record)}
                        for k, record in enumerate(said)
                    ]  # fmt: skip
                write_whole(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
        found = [
            pd.read_csv(self.path(arm, seed, condition), keep_default_na=False, na_values={"hit": [""]}).assign(
                arm=arm.label, seed=seed, condition=condition
            )
            for arm, seed in wanted
            for condition in pieces[arm]
        ]
        return pd.concat(found, ignore_index=True)


def _held(image: Any) -> Callable[[], Any]:
    return lambda: image


def kept_answers(answers: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """All answers as a few small arrays, from which `answers_of` gives the table back and anyone can score again.

    ``hit|ARM|CONDITION|BENCHMARK`` and ``said|...`` are (seed, item); `said` numbers the texts in ``texts``; a hit that is not
    known is 255.
    """
    texts, numbers = np.unique(answers["output"].astype(str), return_inverse=True)
    found: dict[str, NDArray[Any]] = {"texts": texts}
    numbered = answers.assign(said=numbers.astype(np.uint32), hit=answers["hit"].fillna(255).astype(np.uint8))
    for (arm, condition, benchmark), part in numbered.groupby(["arm", "condition", "benchmark"], sort=False):
        wide = part.pivot(index="seed", columns="item", values=["hit", "said"])
        name = f"{arm}|{condition}|{benchmark}"
        found |= {f"hit|{name}": wide["hit"].to_numpy(np.uint8), f"said|{name}": wide["said"].to_numpy(np.uint32)}
        found |= {
            f"seeds|{name}": wide.index.to_numpy(),
            f"chance|{benchmark}": part.groupby("item")["chance"].first().to_numpy(),
        }
    return found


def answers_of(kept: Mapping[str, NDArray[Any]]) -> pd.DataFrame:
    """The table of answers, as `Comparison.complete` gives it, from what `kept_answers` kept in NAME.npz."""
    parts = []
    for name in [n.removeprefix("hit|") for n in kept if n.startswith("hit|")]:
        arm, condition, benchmark = name.split("|")
        hits, seeds = kept[f"hit|{name}"].astype(float), kept[f"seeds|{name}"]
        seed, item = (grid.ravel() for grid in np.meshgrid(seeds, np.arange(hits.shape[1]), indexing="ij"))
        columns = {"benchmark": benchmark, "item": item, "chance": kept[f"chance|{benchmark}"][item]}
        texts = kept["texts"][kept[f"said|{name}"].ravel()]
        hit = np.where(hits == 255, np.nan, hits).ravel()
        parts.append(pd.DataFrame({**columns, "output": texts, "hit": hit, "arm": arm, "seed": seed, "condition": condition}))
    return pd.concat(parts, ignore_index=True)


# --- from answers to rows -----------------------------------------------------------------------------

Floats = NDArray[np.float64]
GENERAL = ("vqa", "cv-bench", "pope")  # one question an image, answered by a choice or yes and no
SCORES: dict[str, tuple[tuple[str, ...], Callable[[Floats], Floats]]] = {
    # each: its benchmark, the published one or its drawn twin, and (item,) hits to (unit,) scores; a unit is what is counted:
    # a pair, a group, a question
    "VQA": (GENERAL, lambda hits: hits),
    "MMVP": (("mmvp",), lambda hits: hits.reshape(-1, 2).prod(1)),
    "NB question": (("naturalbench",), lambda hits: hits.reshape(-1, 2, 2).prod(2).mean(1)),
    "NB image": (("naturalbench",), lambda hits: hits.reshape(-1, 2, 2).prod(1).mean(1)),
    "NB group": (("naturalbench",), lambda hits: hits.reshape(-1, 4).prod(1)),
    "BLINK": (("blink",), lambda hits: hits),
}
ACCURACY = "accuracy"  # over all questions; a pair or group counts as one, with the share of its questions
SHARES: dict[str, tuple[tuple[str, ...], Callable[[Floats], Floats]]] = {
    "VQA": SCORES["VQA"],
    "MMVP items": (("mmvp",), lambda hits: hits.reshape(-1, 2).mean(1)),
    "NB items": (("naturalbench",), lambda hits: hits.reshape(-1, 4).mean(1)),
    "BLINK": SCORES["BLINK"],
}
DRAWN = "shapes-"
KEYS = ("arm", "condition", "against", "score", "group")  # what tells one change from another
PAIRED = {"MMVP": 2, "NB question": 4, "NB image": 4, "NB group": 4}  # items of a unit; patterns take turns over units


SAME_ANSWER = ("MMVP", "NB question", "NB group")  # whoever gives both images one answer gets none of these, and a coin some


def _of(names: pd.Series, benchmarks: Sequence[str]) -> pd.Series:
    return names.str.removeprefix(DRAWN).isin(benchmarks)


def _units(answers: pd.DataFrame, score: str, patterns: Sequence[str] = ()) -> tuple[Floats, Floats]:
    """(seed, unit) scores of one arm under one condition, and the (unit,) scores of guessing."""
    if score == ACCURACY:
        there = [name for name in SHARES if _of(answers["benchmark"], SHARES[name][0]).any()]
        parts = [_units(answers, name) for name in there]
        return np.concatenate([hits for hits, _ in parts], 1), np.concatenate([chances for _, chances in parts])
    benchmarks, combine = (SCORES | SHARES)[score]
    part = answers[_of(answers["benchmark"], benchmarks)].sort_values(["seed", "benchmark", "item"])
    rows = [(combine(g["hit"].to_numpy(float)), combine(g["chance"].to_numpy(float))) for _, g in part.groupby("seed")]
    hits, chances = np.stack([row for row, _ in rows]), rows[0][1]
    if patterns:
        kept = np.isin(np.array(PATTERNS)[np.arange(hits.shape[1]) % len(PATTERNS)], list(patterns))
        hits, chances = hits[:, kept], chances[kept]
    return hits, chances


def score_rows(answers: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Every score of every arm and condition: arm, condition, score, group, value, low, high, n, n_seeds, chance, seed.

    The interval is of a two-way layout, over questions and trainings (`crossed_mean`), cut to 0..1.  Groups: "all", and for
    paired scores "blind" (`BLIND_SPOTS`) and "other" patterns; MMVP has each pattern too.
    """
    rows = []
    for (arm, condition), part in answers.groupby(["arm", "condition"], sort=False):
        for score, group, patterns in _groups(part):
            hits, chances = _units(part, score, patterns)
            mean = crossed_mean(hits)
            if np.ptp(hits) == 0:  # all right or all wrong: the spread knows no other outcome
                mean["low"], mean["high"] = wilson_interval(mean["value"] * hits.shape[1], hits.shape[1])
            rows.append(
                {"kind": "score", "arm": arm, "condition": condition, "score": score, "group": group, "value": mean["value"],
                 "low": max(0.0, mean["low"]), "high": min(1.0, mean["high"]), "n": hits.shape[1], "n_seeds": hits.shape[0],
                 "chance": chances.mean(), "seed": seed}
            )  # fmt: skip
    return pd.DataFrame(rows)


def change_rows(answers: pd.DataFrame, pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]], seed: int = 0) -> pd.DataFrame:
    """Paired differences, question by question and seed by seed; as `score_rows`, with a column `against`.

    Args:
        pairs: ((arm, condition), (arm, condition)) each; the second is subtracted from the first.
    """
    by = dict(iter(answers.groupby(["arm", "condition"], sort=False)))
    rows = []
    for one, other in pairs:
        if one not in by or other not in by:
            continue
        for score, group, patterns in _groups(by[one]):
            difference = _units(by[one], score, patterns)[0] - _units(by[other], score, patterns)[0]
            mean = crossed_mean(difference)
            rows.append(
                {"kind": "change", "arm": one[0], "condition": one[1], "against": f"{other[0]}, {other[1]}", "score": score,
                 "group": group, **{k: mean[k] for k in ("value", "low", "high")}, "n": difference.shape[1],
                 "n_seeds": difference.shape[0], "chance": 0.0, "seed": seed}
            )  # fmt: skip
    return pd.DataFrame(
        rows, columns=None if rows else ["kind", *KEYS, "value", "low", "high", "n", "n_seeds", "chance", "seed"]
    )


def _groups(answers: pd.DataFrame) -> list[tuple[str, str, tuple[str, ...]]]:
    """(score, group, patterns) for the benchmarks that these answers are of."""
    others = tuple(pattern for pattern in PATTERNS if pattern not in BLIND_SPOTS)
    names = answers["benchmark"]
    found: list[tuple[str, str, tuple[str, ...]]] = [(ACCURACY, "all", ())]
    for score, (benchmarks, _) in SCORES.items():
        mine = names[_of(names, benchmarks)]
        if mine.empty:
            continue
        found.append((score, "all", ()))
        if mine.str.startswith(DRAWN).all():  # patterns take turns in the drawn twins alone
            found += [(score, "blind", BLIND_SPOTS), (score, "other", others)] if score in PAIRED else []
            found += [(score, pattern, (pattern,)) for pattern in PATTERNS] if score == "MMVP" else []
    return found


# --- from rows to tables ------------------------------------------------------------------------------


def table_rows(rows: pd.DataFrame, paper: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Lines of `plot_score_table`: every arm's scores beside the paper's of the same name, CLIP's on blank images last.

    Args:
        rows: what `score_rows` gives.
        paper: its index are labels of arms.
        columns: the paper's columns by our score; their order is the table's.
    """
    shown = rows[(rows["kind"] == "score") & (rows["group"] == "all") & rows["score"].isin([*columns])]
    floor = shown[(shown["condition"] == "blank") & (shown["arm"] == "CLIP")].assign(arm="CLIP, blank images")
    own = pd.concat([shown[shown["condition"] == "own"], floor], ignore_index=True)
    own["blind"] = np.where(own["score"].isin(SAME_ANSWER), 0.0, np.nan)
    published = [
        paper.loc[row["arm"], columns[row["score"]]] if row["arm"] in paper.index else np.nan for _, row in own.iterrows()
    ]
    order = {score: k for k, score in enumerate(columns)}
    return own.assign(label=own["arm"], published=published).sort_values(
        "score", key=lambda names: names.map(order), kind="stable"
    )


def pattern_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Lines of `plot_score_table`: every arm's MMVP-like pairs by pattern."""
    found = rows[
        (rows["kind"] == "score") & (rows["score"] == "MMVP") & (rows["condition"] == "own") & (rows["group"] != "all")
    ]
    return found.assign(label=found["arm"], score=found["group"], published=np.nan)
