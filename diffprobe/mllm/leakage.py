"""Does the language model see the image, or read the prompt?  What a run is asked, and the report from its kept files.

A run (`diffprobe.mllm.leakage_run`) trains projectors on captions (arms x sites x timesteps x guidance x seeds) with the language
model frozen.  Each then describes held-out images whose features were given another text.  Everything is kept in one folder:

- ``request.json``: what all its pieces share; another request on the same folder is refused;
- ``stores/``: features; ``projectors/``: one folder each; ``texts/``, ``likelihood/``: one file for each projector, test
  guidance and condition;
- ``texts.csv``: all texts, as `diffprobe.mllm.verdict` takes them.

Each piece is done once, so a run that was cut off goes on, and more arms or sites can be asked of a finished one.
This module reads the kept files alone and needs no torch.

An arm is ``BASE[+dropNN][/MITIGATION]``.  BASE: U trains without a prompt, M with the caption that is also the target, X with
another image's caption, Q with a question.  +drop30 shows the unconditional features to 30% of the samples of each step.  A
mitigation changes the features in training and test: centred (the difference f_c - f_u loses its mean over places), gated (f_u
times the words' attention), erased (LEACE), or a knock-out such as eos_and_padding.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffprobe.conditioning import NULL, current, former
from diffprobe.data import iterate, load_dataset
from diffprobe.mllm import verdict
from diffprobe.mllm.captions import DocumentFrequencies, caption_table, document_frequencies, installed_metrics
from diffprobe.mllm.config import TrainConfig
from diffprobe.rundir import write_whole

MAIN_SITE = "U-L1-R1-B0-Cross-Q"
NO_TEXT_SITE = "D-L0-R0-B0-Cross-Q"  # the query of the first cross-attention: computed before any text comes in
TEXT_SITE = "Text-Embeddings"  # `diffprobe.mllm.features.TEXT`, which needs torch
PROMPTS = {"U": NULL, "M": "caption", "X": "mismatched", "Q": "question"}
FED = {  # a test condition's split and conditioning
    "own": ("test", "caption"), "mismatched": ("test", "mismatched"), "mismatched_hard": ("test", "hard"), "none": ("test", NULL),
    "blank_caption": ("blank", "caption"), "blank_none": ("blank", NULL), "random_words": ("test", "words"), "paraphrase": ("test", "caption:1"),
}  # fmt: skip
BASELINES = {"blank": "blank", "no prompt": "null", "none": ""}  # of rankings, and the arrays that hold them
_ARM = re.compile(r"(?P<base>[UMXQ])(\+drop(?P<dropout>\d\d))?(/(?P<mitigation>.+))?")


class LeakageError(ValueError):
    """A run that is asked for what it cannot do, or a folder that holds none."""


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
        """Base, share of dropout, mitigation."""
        found = _ARM.fullmatch(self.arm)
        if found is None:
            raise LeakageError(
                f"Arm {self.arm!r} is not BASE[+dropNN][/MITIGATION] with a base U, M, X or Q; for example M+drop30/centred."
            )
        return found["base"], int(found["dropout"] or 0) / 100, found["mitigation"] or ""

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
        """The piece's columns in the table of texts; a control's arm and guidance are empty, for it serves all."""
        recipe = self.recipe
        arm = f"{recipe.arm} without {self.knockout}" if self.knockout else recipe.arm
        values = (recipe.control, arm, recipe.site, recipe.timestep, self.guidance)
        key = dict(zip(verdict.KEYS, values, strict=True))
        if recipe.control:
            key |= {"arm": "", "guidance": np.nan} | ({"timestep": np.nan} if recipe.control == verdict.POSITIVE else {})
        return {**key, "seed": recipe.seed, "condition": self.condition}


def _slug(*parts: str) -> str:
    return former("_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts if part))


@dataclass(frozen=True)
class Settings(TrainConfig):
    """What all pieces of a run share, beside what decides how a projector is trained.

    Attributes:
        model: The diffusion model: id, folder or embedded name.
        data, test: Datasets of the training and of the held-out images; no image may be in both.
        language_model, language_dtype, template: For `diffprobe.mllm.language.load_language_model`.
        grid: Soft tokens on a side.
        dev_share: Share of the training images that decide when training stops.
        max_new_tokens: Of a generated text.
        candidates, ranked: The fed text is ranked among so many, for so many of the test images; 0 images rank nothing.
        noise_seed: Of the features' noise.
        batch_rows: Rows of one forward pass of the diffusion model; fixed, for other batches change features in their last bits.
    """

    model: str = "shapes-sd"
    data: str = "shapes:1500?split=train"
    test: str = "shapes:100?split=test"
    language_model: str = "shapes-lm"
    language_dtype: str = "auto"
    template: str = ""
    grid: int = 6
    dev_share: float = 0.1
    max_new_tokens: int = 48
    candidates: int = 100
    ranked: int = 64
    noise_seed: int = 0
    batch_rows: int = 16


def plan(
    arms: Sequence[str], sites: Sequence[str], timesteps: Sequence[int], guidance: Sequence[float], seeds: int, conditions: Sequence[str],
    knockouts: Sequence[str] = (), controls: bool = True,
) -> list[Test]:  # fmt: skip
    """All pieces of a request: a projector for every arm, site, timestep, guidance and seed, and its tests.

    Knock-outs at test time are tried on every projector of the arms. Controls (K- at each timestep, K+ once) are
    trained as arm M.

    Raises:
        LeakageError: An arm or condition is unknown.
    """
    if unknown := [c for c in conditions if c not in FED]:
        raise LeakageError(f"Condition {unknown[0]!r} is not one of {', '.join(verdict.CONDITIONS)}.")
    tests = []
    for arm, site, timestep, scale, seed in itertools.product(arms, sites, timesteps, guidance, range(seeds)):
        recipe = Recipe(arm, site, timestep, scale, seed)
        recipe = replace(recipe, guidance=0.0) if recipe.parts[0] == "U" else recipe
        tests += [Test(recipe, scale, c, k) for k in ("", *knockouts) for c in conditions]
    wanted = [(NO_TEXT_SITE, t, verdict.NEGATIVE) for t in timesteps] + [(TEXT_SITE, timesteps[0], verdict.POSITIVE)]
    for seed, (site, timestep, name) in itertools.product(range(seeds), wanted if controls else ()):
        tests += [Test(Recipe("M", site, timestep, 1.0, seed, name), 1.0, c) for c in conditions]
    return list(dict.fromkeys(tests))


# --- kept files -------------------------------------------------------------------------------------


def read_texts(folder: str | Path, tests: Sequence[Test] | None = None) -> pd.DataFrame:
    """Texts of a run, all or those of some pieces; empty texts stay empty.

    Raises:
        LeakageError: Nothing was written there yet.
    """
    paths = [Path(folder) / "texts" / f"{t.slug}.csv" for t in tests] if tests is not None else [Path(folder) / "texts.csv"]
    if absent := [path for path in paths if not path.exists()]:
        if not (Path(folder) / "request.json").exists():
            raise LeakageError(f"{folder} is no folder that 'diffprobe leakage run' filled; its --out names one.")
        kinds = {"stores of features": "stores/*.zarr", "projectors": "projectors/*", "files of texts": "texts/*.csv"}
        there = ", ".join(f"{len(list(Path(folder).glob(pattern)))} {kind}" for kind, pattern in kinds.items())
        raise LeakageError(
            f"{absent[0]} does not exist: 'diffprobe leakage run --out {folder}' makes it, and goes on where it was cut off. "
            f"So far there are {there}."
        )
    return pd.concat([read_table(path) for path in paths], ignore_index=True)


def read_table(path: Path) -> pd.DataFrame:
    """One file of texts. Words such as "null" stay words; a timestep is an int, or "" for K+; arms are in today's spelling."""
    words_ = ("control", "arm", "site", "timestep", "condition", "sample", "fed", "source", "references", "output")
    texts = pd.read_csv(path, dtype=dict.fromkeys(words_, str), keep_default_na=False, na_values={"guidance": [""]})
    timesteps = pd.Series([int(t) if t else "" for t in texts["timestep"]], dtype=object)
    return texts.assign(timestep=timesteps, arm=texts["arm"].map(current))


def frequencies(folder: str | Path) -> DocumentFrequencies:
    """Document frequencies for CIDEr-D, from the captions of the run's training images."""
    name = json.loads((Path(folder) / "request.json").read_text(encoding="utf-8"))["data"]
    return document_frequencies(name, [[c.text for c in s.captions] for s in iterate(load_dataset(name))])


# --- tables -----------------------------------------------------------------------------------------


def score_texts(
    texts: pd.DataFrame, known: DocumentFrequencies, metrics: Sequence[str] = ("cider_d",), seed: int = 0
) -> pd.DataFrame:
    """How much of the fed text and of the references comes back, in every cell and condition.

    Returns:
        Columns control, arm, site, timestep, guidance, condition, score ("fed": against the text that was fed in, "references":
        against the image's captions that were not), those of `caption_table`, and n_seeds.  n counts images, which are
        resampled as wholes; chance is against texts of other images.
    """
    frames = []
    for key, group in texts.groupby([*verdict.KEYS, "condition"], dropna=False, sort=False):
        for score in ("fed", "references"):
            against = (
                [[f] if f else [] for f in group["fed"]] if score == "fed" else [json.loads(r) for r in group["references"]]
            )
            kept = np.array([any(own) for own in against])
            if kept.sum() < 2:
                continue
            part, against = group[kept], [own for own, keep in zip(against, kept, strict=True) if keep]
            table = caption_table(
                list(part["output"]), against, clusters=part["sample"], metrics=metrics, frequencies=known, seed=seed
            )
            about = dict(zip([*verdict.KEYS, "condition"], key, strict=True)) | {"score": score}
            table = table.assign(n=part["sample"].nunique(), n_seeds=part["seed"].nunique())
            frames.append(pd.DataFrame(about, index=table.index).join(table))
    return pd.concat(frames, ignore_index=True)


def rank_texts(folder: str | Path, seed: int = 0) -> pd.DataFrame:
    """`rank_fed` and `usable_information` of every cell that was ranked; seeds pooled, images as clusters.

    The column `baseline` says what a candidate's log-likelihood is compared with: "blank" (a blank image without a prompt),
    "no prompt" (the same image without one), or "none".  No projector has seen a blank image, so its likelihoods of texts
    there are arbitrary; the same image without a prompt is nearer to its training.
    """
    held: dict[tuple[Any, ...], list[Any]] = {}
    keys = [*verdict.KEYS, "condition"]
    named = {path.stem: path for path in sorted((Path(folder) / "texts").glob("*.csv"))}
    for path in sorted((Path(folder) / "likelihood").glob("*.npz")):
        if path.stem in named:
            row = read_table(named[path.stem]).iloc[0]
            held.setdefault(tuple(str(row[k]) for k in keys), []).append((row, np.load(path, allow_pickle=False)))
    rows = []
    for parts in held.values():
        arrays = [array for _, array in parts]
        clusters, given = (np.concatenate([a[name] for a in arrays]) for name in ("samples", "conditional"))
        zero = np.zeros_like(given)
        less = {name: np.concatenate([a[key] for a in arrays]) if key else zero for name, key in BASELINES.items()}
        found = [
            verdict.rank_fed(given, values, clusters=clusters, seed=seed).assign(baseline=name) for name, values in less.items()
        ]
        if all("unconditional" in a for a in arrays):
            alone = np.concatenate([a["unconditional"] for a in arrays])
            tokens = np.concatenate([a["tokens"][:, 0] for a in arrays])
            bits = verdict.usable_information(given[:, 0], alone, tokens, clusters=clusters, seed=seed)
            found.append(bits.assign(baseline="no prompt"))
        rows.append(pd.concat(found).assign(**{k: parts[0][0][k] for k in keys}, n_seeds=len(arrays)))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def examples(texts: pd.DataFrame, count: int = 4, conditions: Sequence[str] = ("own", "mismatched", "none")) -> pd.DataFrame:
    """Outputs of the first projector of each cell for the first samples, side by side.

    One row a sample and condition, one column a cell; "" where a cell was not tested under a condition.
    """
    first = texts[(texts["seed"] == texts["seed"].min()) & texts["condition"].isin(conditions)].copy()
    first = first[first["sample"].isin(list(dict.fromkeys(first["sample"]))[:count])]
    scale = first["guidance"].map(lambda s: "" if pd.isna(s) else f" s={s:g}")
    first["who"] = first["control"] + first["arm"] + scale + np.where(first["site"].nunique() > 1, " " + first["site"], "")
    if first[first["control"] != verdict.POSITIVE]["timestep"].nunique() > 1:
        first["who"] += first["timestep"].map(lambda t: f" t={t}" if t != "" else "")
    first["seen"] = [next(iter(json.loads(r)), "") for r in first["references"]]
    wide = first.pivot_table(
        index=["sample", "seen", "condition", "fed"], columns="who", values="output", aggfunc="first", sort=False
    )
    return wide.fillna("").reset_index().rename_axis(columns=None)


def leak_against_sight(leakage: verdict.Leakage, condition: str = "mismatched") -> pd.DataFrame:
    """One row a cell for `plot_leak_sight`: label, control, and leak and sight with their intervals."""
    chosen = leakage.table[leakage.table["condition"] == condition]
    many = {k: chosen[chosen["control"] == ""][k].nunique() > 1 for k in ("site", "timestep")}
    rows = []
    for _, part in chosen.groupby(verdict.KEYS, dropna=False, sort=False):
        first, scores = part.iloc[0], part.set_index("score")
        if {"leak", "sight"} - set(scores.index):
            continue
        label = [first["site"]] if first["control"] else [first["arm"], f"s={first['guidance']:g}"]
        label += [first["site"]] if many["site"] and not first["control"] else []
        label += [f"t={first['timestep']}"] if many["timestep"] and first["timestep"] != "" else []
        row = {"label": " ".join(label), "control": first["control"]}
        for score in ("leak", "sight"):
            row |= {score: scores.loc[score, "value"]} | {f"{score}_{end}": scores.loc[score, end] for end in ("low", "high")}
        rows.append({**row, "n": first["n"], "n_seeds": first["n_seeds"]})
    return pd.DataFrame(rows)


# --- the report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A run in words and tables.

    Attributes:
        sentences: One verdict for each arm, site, timestep and guidance.
        leakage: Scores and verdicts by content-word F1 under mismatched prompts.
        recovery: `score_texts`: how much of the fed text and of the references comes back under each condition.
        likelihood: top-1, MRR, bits and usable information of the fed text, where it was ranked.
        examples: Outputs side by side: sample, condition, fed, the first reference, one column an arm.
    """

    sentences: list[str]
    leakage: verdict.Leakage
    recovery: pd.DataFrame
    likelihood: pd.DataFrame
    examples: pd.DataFrame

    @property
    def scores(self) -> pd.DataFrame:
        """Leak, sight and CIDEr-D of every cell and condition."""
        return pd.concat([self.leakage.table, self.recovery[self.recovery["metric"] == "cider_d"]])

    def summary(self) -> pd.DataFrame:
        """`scores` with intervals as text: one row a cell and condition."""
        return _as_text(self.scores, [*verdict.KEYS, "condition"], "score", ["leak", "sight", "fed", "references"])

    def recovered(self, metrics: Sequence[str] = ("bleu", "rouge_l", "content_f1", "exact")) -> pd.DataFrame:
        """Some metrics of `recovery` with intervals as text: one row a cell, condition and text that is compared with."""
        there = [metric for metric in metrics if metric in set(self.recovery["metric"])]
        return _as_text(self.recovery, [*verdict.KEYS, "condition", "score", "n"], "metric", there)


def _as_text(rows: pd.DataFrame, keys: Sequence[str], column: str, names: Sequence[str]) -> pd.DataFrame:
    """Values with their intervals as text, one column for each of `names`; "" where there is none."""
    ends = zip(rows["value"], rows["low"], rows["high"], strict=True)
    rows = rows.assign(
        text=[f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in ends],
        guidance=["" if pd.isna(s) else f"{s:g}" for s in rows["guidance"]],
    )
    wide = rows.pivot_table(index=list(keys), columns=column, values="text", aggfunc="first", sort=False)
    return wide.reindex(columns=list(names)).fillna("").reset_index().rename_axis(columns=None)


def leakage_report(folder: str | Path, *, n_examples: int = 4, metrics: Sequence[str] | None = None, seed: int = 0) -> Report:
    """Judge a run from its kept files.

    Args:
        metrics: Of caption recovery, as for `diffprobe.mllm.captions.caption_table`; CIDEr-D and all that need no model and
            whose packages are installed by default.

    Raises:
        LeakageError: There are no texts.

    >>> leakage_report("runs/leak").sentences[0]  # doctest: +SKIP
    'The language model reads the prompt ...'
    """
    texts = read_texts(folder)
    leakage = verdict.judge_leakage(texts, seed=seed)
    chosen = installed_metrics() if metrics is None else dict.fromkeys(["cider_d", *metrics])
    return Report(
        [verdict.sentence({str(k): v for k, v in row.items()}) for row in leakage.verdicts.to_dict("records")],
        leakage,
        score_texts(texts, frequencies(folder), list(chosen), seed),
        rank_texts(folder, seed=seed),
        examples(texts, n_examples),
    )


def save_report(found: Report, folder: str | Path) -> list[Path]:
    """Write scores.csv, recovery.csv, verdicts.csv, doses.csv, likelihood.csv, examples.csv and the pictures; gives their paths."""
    from diffprobe.figures import plot_leak_examples, plot_leak_sight
    from diffprobe.plotting import save_figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "scores": found.scores, "recovery": found.recovery, "verdicts": found.leakage.verdicts, "doses": found.leakage.doses,
        "likelihood": found.likelihood, "examples": found.examples,
    }  # fmt: skip
    for name, table in tables.items():
        write_whole(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    plane, about = leak_against_sight(found.leakage), {"verdicts": found.sentences}
    alt = "Leak against sight of every arm with intervals; controls in grey, chance dotted."
    made = [save_figure(plot_leak_sight(plane), folder, "leak_against_sight", plane, about, alt)["png"]]
    alt = "Texts side by side: what was fed in, what the image shows, and what each arm wrote."
    made.append(save_figure(plot_leak_examples(found.examples), folder, "side_by_side", found.examples, about, alt)["png"])
    return [*(folder / f"{name}.csv" for name in tables), *made]
