"""One figure or table of the project: what it measures, which claims it tests, how it is drawn and kept.

A file in ``experiments/`` builds one `Experiment` from three functions: `measure` (options -> numbers; the only one that may
need a model), `judge` (rows -> verdicts on claims) and `draw` (numbers -> figures).  Everything that is drawn or judged comes
from what `measure` returned and is kept beside the picture, so ``--from-csv`` draws and judges again without torch.
`reproduce` runs several, one after the other.

The invariant: a verdict is a function of the saved rows alone, and ``claims.csv`` is the sum of the sidecars beside it, where
the primary statements share one error rate (Holm).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import norm

from diffprobe.data.samples import Dataset, Sample
from diffprobe.plotting import package_versions, read_rows, save_figure
from diffprobe.report import collect_claims
from diffprobe.rundir import code_commit, whole_file, write_whole
from diffprobe.sites import NotApplicableError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from diffprobe.mllm.leakage_run import Run
    from experiments.comparison import Comparison

T = TypeVar("T", bound="DataclassInstance")
A = TypeVar("A")
Verdict = Literal["held", "not held", "undecided", "not testable"]
FOLDER = Path(__file__).parent
MAIN_SITE = "U-L1-R1-B0-Cross-Q"  # the paper's best single site


READER = (
    "oracle questions", "oracle pairs", "lm relation", "lm MMVP-like position", "lm MMVP-like orientation", "lm MMVP-like text"
)  # fmt: skip
"""Gates of a language model that can answer from what it is shown."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper (A1, L2, F3, ...) or of our own, and what this run says about it.

    `evidence` gives the deciding numbers with n and interval, in one line.

    Attributes:
        p: Two-sided p value of the verdict; None where the verdict rests on an interval alone.
        primary: Whether this is the one statement by which the claim stands or falls, declared before it is measured.  All
            others are exploratory.
    """

    id: str
    statement: str
    verdict: Verdict
    evidence: str
    p: float | None = None
    primary: bool = False


def verdict(low: float, high: float, threshold: float = 0.0) -> Verdict:
    """Whether an interval lies above a threshold: held, below it: not held, or has it inside: undecided.

    >>> verdict(0.1, 0.3), verdict(-0.2, -0.1), verdict(-0.1, 0.3), verdict(0.5, 0.7, 0.25)
    ('held', 'not held', 'undecided', 'held')
    """
    return "held" if low > threshold else "not held" if high < threshold else "undecided"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim about all holds when each part does, and fails when one does; without parts nothing is decided.

    >>> worst(["held", "undecided"]), worst(["held", "not held", "undecided"]), worst(["held"]), worst([])
    ('undecided', 'not held', 'held', 'undecided')
    """
    return "not held" if "not held" in verdicts else "undecided" if "undecided" in verdicts or not verdicts else "held"


def p_of(value: float, low: float, high: float, threshold: float = 0.0) -> float:
    """Two-sided p of a value against a threshold, from its 95% interval as that of a normal estimate.

    >>> round(p_of(0.2, 0.0, 0.4), 3), round(p_of(0.4, 0.2, 0.6, 0.25), 2), p_of(0.5, 0.5, 0.5)
    (0.05, 0.14, 0.0)
    """
    side = value - low if value > threshold else high - value  # the half that points to the threshold
    if not side > 0:
        return 1.0 if np.isnan(side) else float(value == threshold)
    return float(2 * norm.sf(abs(value - threshold) / (side / norm.ppf(0.975))))


def joint(parts: Sequence[tuple[float, float, float]], threshold: float = 0.0) -> tuple[Verdict, float]:
    """Verdict and p of "each of these (value, low, high) lies above the threshold", as in `worst`.

    All parts must be shown, so the largest p counts; one part refutes, and then Bonferroni's smallest does.

    >>> joint([(0.2, 0.1, 0.3), (0.1, 0.05, 0.15)])[0], joint([(0.2, 0.1, 0.3), (-0.2, -0.3, -0.1)])[0], joint([])
    ('held', 'not held', ('undecided', 1.0))
    """
    decided = worst([verdict(low, high, threshold) for _, low, high in parts])
    if decided == "not held":
        below = [p_of(*part, threshold) for part in parts if part[2] < threshold]
        return decided, min(1.0, len(parts) * min(below))
    return decided, max((p_of(*part, threshold) for part in parts), default=1.0)


def settled(decided: Verdict, evidence: str, trainings: float) -> tuple[Verdict, str]:
    """A verdict on trained arms with its evidence; one training an arm decides nothing.

    >>> settled("held", "n = 9", 3), settled("held", "n = 9", 1)[0]
    (('held', 'n = 9'), 'undecided')
    """
    if trainings > 1:
        return decided, evidence
    return "undecided", f"the interval is over questions alone, and another training may differ; {evidence}"


def exact_verdict(value: float, p: float) -> Verdict:
    """The verdict of an exact paired test: the sign of the difference where p is below .05.

    >>> exact_verdict(0.1, 0.03), exact_verdict(-0.1, 0.03), exact_verdict(0.1, 0.2)
    ('held', 'not held', 'undecided')
    """
    return "undecided" if not p < 0.05 else "held" if value > 0 else "not held"


def gated(claims: Sequence[Claim], needs: Mapping[str, Sequence[str]], gates: pd.DataFrame | None) -> list[Claim]:
    """The claims, those that failed or stayed open on a model too weak to test them as "not testable".

    Args:
        needs: Gates by the beginning of a claim's id: what a model must be able to do before the claim says anything of it.
        gates: Rows of ``zoo_quality.csv`` (gate, what, value, threshold, passed), or None where none were measured.

    >>> gates = pd.DataFrame([{"gate": "shape", "what": "shape", "value": 0.2, "threshold": 0.6, "passed": False}])
    >>> [one] = gated([Claim("F1", "It is the best.", "not held", "n = 9")], {"F": ["shape"]}, gates)
    >>> one.verdict, one.evidence
    ('not testable', 'shape is 0.20, and 0.60 is needed; n = 9')
    """
    if gates is None:
        return list(claims)
    failed = {str(row["gate"]): row for _, row in gates.iterrows() if row["passed"] in (False, "False")}
    found = []
    for claim in claims:
        wanted = [gate for start, names in needs.items() if claim.id.startswith(start) for gate in names]
        weak = [failed[gate] for gate in wanted if gate in failed]
        if weak and claim.verdict in ("not held", "undecided"):
            reasons = ", ".join(f"{row['what']} is {row['value']:.2f}, and {row['threshold']:.2f} is needed" for row in weak)
            claim = replace(claim, verdict="not testable", evidence=f"{reasons}; {claim.evidence}")
        found.append(claim)
    return found


def measured_gates(out: Path, config: Mapping[str, Any]) -> pd.DataFrame | None:
    """The gates that were measured on the weights that an experiment was run on; None where there are none in `out`."""
    table, sidecar = out / "zoo_quality.csv", out / "zoo_quality.json"
    if not table.exists() or not sidecar.exists():
        return None
    weights = json.loads(sidecar.read_text(encoding="utf-8"))["config"].get("weights", {})
    if config.get("weights") not in weights.values():
        return None
    rows = read_rows(table)
    return rows[rows["gate"].fillna("") != ""] if "gate" in rows else None


class OptionError(ValueError):
    """An option that the experiment cannot take: what was asked is wrong, not what was found."""


@dataclass(frozen=True)
class Options:
    """What a user may change about a run.

    Attributes:
        model: Hub id, folder or embedded name.
        data: A dataset as `load_dataset` takes it; empty for the experiment's own.
        count: Samples (or pairs, or quadruples) to measure on.
        seed: Of noise, splits and bootstrap.
        smoke: Whether this is the short form that only shows that everything runs.
        work: Folder for stores; a run that was cut off goes on from them. `Experiment.run` gives every choice of what decides
            them a folder of its own inside, for a store holds one request.
        device: As for `load_model`.
        trainings: Of each arm, from other first weights, where something is trained; the experiment's own number when 0.
        arms: Labels of arms that a table is to have, or their beginnings, parted by commas; all when empty.
        set: NAME=VALUE each, for `diffprobe.mllm.leakage.Settings` or `experiments.comparison.Settings`, where an
            experiment trains: the language model, the encoder, steps, batch and the rest.
    """

    model: str = "shapes-sd"
    data: str = ""
    count: int = 0
    seed: int = 0
    smoke: bool = False
    work: Path = Path("runs/reproduce")
    device: str | None = None
    trainings: int = 0
    arms: str = ""
    set: tuple[str, ...] = ()

    @property
    def seeds(self) -> int:
        """Trainings of each arm: three where nothing else is asked for, one in the short form."""
        return self.trainings or (1 if self.smoke else 3)

    @property
    def training_seeds(self) -> range:
        """Seeds of the first weights; another `seed` shares none of them.

        >>> Options().training_seeds, Options(seed=1).training_seeds
        (range(0, 3), range(1000, 1003))
        """
        first = 1000 * self.seed
        return range(first, first + self.seeds)


@dataclass(frozen=True)
class Result:
    """What was measured: a tidy table, and arrays that only a picture needs (images, maps), by name."""

    rows: pd.DataFrame
    pictures: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One file of ``experiments/``.

    Attributes:
        name: Stem of every file it writes.
        title: One line for lists and the report.
        count: Samples of a full run.
        smoke_count: Samples of the short form.
        measure: Runs the model; the only part that needs one.
        judge: Verdicts, from the rows alone.
        draw: Figures by suffix: "" is NAME.png, "pca" is NAME_pca.png.
        alt: What each figure shows, by the same suffixes, for readers who cannot see it.
        tables: By the same suffixes what a figure that is a table says, as `experiments.figures.score_cells` gives it.
        reference: CSV in ``experiments/reference/`` with the paper's numbers, or empty.
        needs: Gates of ``zoo_quality`` that a claim needs, by the beginning of the claim's id.
    """

    name: str
    title: str
    count: int
    smoke_count: int
    measure: Callable[[Options], Result]
    judge: Callable[[pd.DataFrame], list[Claim]]
    draw: Callable[[Result], Mapping[str, Figure]]
    alt: Mapping[str, str]
    tables: Callable[[Result], Mapping[str, Mapping[str, Any]]] = lambda result: {}
    reference: str = ""
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def run(self, options: Options, out: Path = Path("figures")) -> list[Claim]:
        """Measure, keep, draw and judge; gives the verdicts."""
        started = time.perf_counter()
        given, options = options, replace(options, count=options.count or (self.smoke_count if options.smoke else self.count))
        result = self.measure(replace(options, work=options.work / _own_folder(options)))
        chosen = {name: value for name, value in asdict(options).items() if name != "work"}
        origin = {
            "command": command([self.name], given),
            "commit": code_commit(),
            "seconds": round(time.perf_counter() - started),
            "measured_with": package_versions(),
        }
        return self._keep(Result(result.rows, result.pictures, {**chosen, **result.config, **origin}), out)

    def redraw(self, out: Path = Path("figures")) -> list[Claim]:
        """Judge and draw again from the files of an earlier run.

        Raises:
            ValueError: there is no earlier run in `out`.
        """
        table, sidecar, arrays = (out / f"{self.name}.{suffix}" for suffix in ("csv", "json", "npz"))
        if not table.exists() or not sidecar.exists():
            raise ValueError(
                f"{table} does not exist: run the experiment once without --from-csv, or name its folder with --out."
            )
        pictures = dict(np.load(arrays, allow_pickle=False)) if arrays.exists() else {}
        config = json.loads(sidecar.read_text(encoding="utf-8"))["config"]
        return self._keep(Result(read_rows(table), pictures, config), out)

    def _keep(self, result: Result, out: Path) -> list[Claim]:
        claims = gated(self.judge(result.rows), self.needs, measured_gates(out, result.config))
        drawn = dict(self.draw(result))
        if "" not in drawn or set(drawn) - set(self.alt):
            raise ValueError(
                f"{self.name} drew {sorted(drawn)} and has alt texts for {sorted(self.alt)}; "
                "its first figure has the suffix '', and each needs an alt text."
            )
        config = {
            **result.config,
            "claims": [asdict(claim) for claim in claims],
            "title": self.title,
            "figures": [_file_name(self.name, suffix) for suffix in drawn],
        }
        if tables := self.tables(result):
            config["tables"] = {_file_name(self.name, suffix): table for suffix, table in tables.items()}
        out.mkdir(parents=True, exist_ok=True)
        arrays = out / f"{self.name}.npz"
        arrays.unlink(missing_ok=True)  # an earlier run's pictures do not belong to these rows
        if result.pictures:
            with whole_file(arrays) as beside, beside.open("wb") as file:
                np.savez_compressed(file, **result.pictures)  # type: ignore[arg-type]  # the stub has no **arrays
        for suffix, figure in drawn.items():
            paths = save_figure(figure, out, _file_name(self.name, suffix), result.rows, config, self.alt[suffix])
            if suffix:  # rows and origin are kept once
                paths["csv"].unlink()
                told = {"alt": self.alt[suffix], "rows": f"{self.name}.csv"}
                told |= {"title": title} if (title := figure.get_suptitle()) else {}
                write_whole(paths["json"], json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        write_whole(out / "claims.csv", collect_claims(out).to_csv(index=False, lineterminator="\n"))
        return claims

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of one experiment file."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--model", default=Options.model, help="hub id, folder or embedded name")
        parser.add_argument("--data", default="", help="dataset; the experiment's own by default")
        parser.add_argument(
            "--count", type=int, default=0, help=f"samples; {self.count} by default, {self.smoke_count} with --smoke"
        )
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--smoke", action="store_true", help="the short form: does everything run?")
        parser.add_argument("--work", type=Path, default=Options.work, help="folder for stores")
        parser.add_argument("--device")
        parser.add_argument("--trainings", type=int, default=0, help="of each arm, where something is trained; 3 by default")
        parser.add_argument("--arms", default="", help="beginnings of the labels of a table's arms, parted by commas")
        parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of what is trained")
        parser.add_argument("--out", type=Path, default=Path("figures"))
        parser.add_argument("--from-csv", action="store_true", help="draw and judge again from an earlier run, without a model")
        given = vars(parser.parse_args(arguments))
        out, again = given.pop("out"), given.pop("from_csv")
        try:
            claims = self.redraw(out) if again else self.run(Options(**{**given, "set": tuple(given["set"])}), out)
        except ValueError as error:
            if not again:  # a fault of the measurement, to be seen in full
                raise
            parser.exit(2, f"{parser.prog}: {error}\n")
        print(describe(self, claims, out))


class Chosen:
    """Some samples of a dataset, each perhaps changed; a dataset of its own for stores.

    Args:
        source: The dataset.
        rows: Numbers of its samples.
        what: Stands in the name, and tells two choices with equal rows apart.
        change: Applied to each sample.
    """

    def __init__(
        self, source: Dataset, rows: Sequence[int], what: str, change: Callable[[Sample], Sample] = lambda sample: sample
    ) -> None:
        self.source, self.rows, self.what, self.change = source, rows, what, change

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.what}"

    @property
    def spec(self) -> str:
        return self.source.spec

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.change(self.source[self.rows[index]])

    def fingerprint(self) -> str:
        chosen = f"{self.source.fingerprint()} {self.what} {','.join(map(str, self.rows))}"
        return hashlib.sha256(chosen.encode()).hexdigest()[:16]


def describe(experiment: Experiment, claims: Sequence[Claim], out: Path) -> str:
    """What a person reads after a run: the verdicts and where the files are."""
    lines = [f"{experiment.name}: {experiment.title}"]
    lines += [f"  {claim.id} {claim.verdict}: {claim.statement}\n      {claim.evidence}" for claim in claims]
    return "\n".join([*lines, f"  {out / experiment.name}.png"])


def record_words(options: Options, timesteps: Sequence[int]) -> tuple[str, Dataset, str, Path]:
    """Cross-attention, or joint attention, of captions on scenes of two, every head, in one store for equal options.

    Captions of the "web" style where the data has them: they name a background, and only what captions on the web name.

    Returns:
        The weights' hash, the dataset, the conditioning, and the store.
    """
    from diffprobe import extract, load_dataset, load_model

    model = load_model(options.model, options.device)
    data = load_dataset(options.data or f"shapes:{options.count}?split=test&objects=2&seed={options.seed}")
    conditioning = "caption:web" if any(c.style == "web" for c in data[0].captions) else "caption"
    out = options.work / f"words_{data.name}_{len(data)}_{options.seed}.zarr"
    extract(
        model, data, out, sites=(), maps="words", heads="all", timesteps=timesteps, conditionings=(conditioning,),
        seed=options.seed,
    )  # fmt: skip
    return model.weights_hash(), data, conditioning, out


def leakage_run(options: Options) -> Run:
    """The run that the leakage experiments share: projectors of one are not trained again for the next.

    `options.count` images are trained on, and a twelfth as many (24 at least) held out; `options.data` names two datasets
    instead, parted by a comma.

    Raises:
        ValueError: the data are one dataset, or a setting is none.
    """
    from diffprobe.mllm.leakage import Settings
    from diffprobe.mllm.leakage_run import Run

    count, seed = options.count, options.seed
    drawn = f"shapes:{count}?split=train&seed={seed},shapes:{max(24, count // 12)}?split=test&seed={seed}"
    train, test = two(options.data or drawn, "TRAINING,HELD-OUT")
    settings = Settings(
        model=options.model, data=train, test=test, request="Say how the objects stand to each other.", learning_rate=2e-3,
        steps=200, batch=24, ranked=40, noise_seed=seed,
    )  # fmt: skip
    if options.smoke:
        settings = replace(settings, steps=4, batch=8, max_new_tokens=8, candidates=8, ranked=8)
    return Run(options.work / f"leakage{'_smoke' * options.smoke}", changed(settings, options.set), device=options.device)


def fused_run(options: Options) -> Comparison:
    """The run that both tables of fused models share: what one has trained the other does not train again.

    `options.count` MMVP-like pairs are asked about, as many questions of scenes, half as many NaturalBench-like groups;
    `options.data` names captions and instructions to train on instead of the drawn ones, parted by a comma.

    Raises:
        ValueError: the data are one set, or a setting is none.
    """
    from experiments.comparison import Comparison, Settings

    drawn = "shapes-captions:24,shapes-instruct:40" if options.smoke else f"{Settings.captions},{Settings.instructions}"
    captions, instructions = two(options.data or drawn, "CAPTIONS,INSTRUCTIONS")
    count = options.count
    tests = {"vqa": count, "mmvp": count, "naturalbench": max(9, count // 2), "blink": max(5, count // 5)}
    settings = Settings(
        diffusion=options.model, captions=captions, instructions=instructions, noise_seed=options.seed,
        benchmarks=tuple(f"shapes-{kind}:{number}?seed={options.seed}" for kind, number in tests.items()),
    )  # fmt: skip
    if options.smoke:
        settings = replace(settings, steps=(2, 2), batch=4)
    return Comparison(options.work / f"fused{'_smoke' * options.smoke}", changed(settings, options.set), options.device)


def two(data: str, names: str) -> tuple[str, str]:
    """
    >>> two("a,b", "TRAINING,HELD-OUT")
    ('a', 'b')
    """
    first, comma, second = data.partition(",")
    if not comma:
        raise OptionError(f"This experiment needs two sets of data, {names}; got {data!r}.")
    return first, second


def changed(settings: T, given: Sequence[str]) -> T:
    """A dataclass of settings with NAME=VALUE texts applied; a value is read as what stands there now.

    Raises:
        OptionError: no such setting, or its value is of another kind.

    >>> from experiments.comparison import Settings
    >>> changed(Settings(), ["language_model=smollm2", "steps=60,120"]).steps
    (60, 120)
    """
    known = {f.name: getattr(settings, f.name) for f in fields(settings)}
    found: dict[str, Any] = {}
    for text in given:
        name, value = _setting(text, known, "this experiment; its settings")
        now = known[name]
        try:
            if isinstance(now, tuple):
                found[name] = tuple(type(now[0])(part) for part in value.split(","))
                right = len(found[name]) == len(now) or isinstance(now[0], str)
            else:
                found[name], right = type(now)(value), True
        except ValueError:
            right = False
        if not right:
            raise OptionError(f"--set {text}: {name} is {now!r} now, and {value!r} is not of that kind.")
    return replace(settings, **found)


def check_settings(given: Sequence[str]) -> None:
    """Refuse what is a setting of no experiment, before anything is computed.

    Raises:
        OptionError: a text is no NAME=VALUE, or nothing has such a setting.
    """
    for text in given:
        _setting(text, setting_names(), "an experiment; settings")


def setting_names() -> list[str]:
    """The names of all settings of what is trained."""
    from diffprobe.mllm import leakage
    from experiments import comparison

    return list(dict.fromkeys(f.name for kind in (leakage.Settings, comparison.Settings) for f in fields(kind)))


def _setting(text: str, known: Iterable[str], whose: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if name not in known or not equals:
        raise OptionError(f"--set {text} is no NAME=VALUE of {whose} are {', '.join(known)}.")
    return name, value


def chosen_arms(arms: Sequence[A], label: Callable[[A], str], options: Options) -> list[A]:
    """The arms whose labels are, or begin, as the options ask; a whole label means that arm alone.

    Raises:
        OptionError: a text fits none; the message lists them.

    >>> chosen_arms(["concat s=4", "concat s=4 finer"], str, Options(arms="concat s=4"))
    ['concat s=4']
    """
    wanted = [part.strip() for part in options.arms.split(",") if part.strip()]
    labels = [label(arm) for arm in arms]
    fits = {part: {part} if part in labels else {name for name in labels if name.startswith(part)} for part in wanted}
    if missing := [part for part in wanted if not fits[part]]:
        raise OptionError(f"No arm begins with {missing[0]!r}; there are {', '.join(labels)}.")
    kept = set().union(*fits.values()) if wanted else set(labels)
    return [arm for arm, name in zip(arms, labels, strict=True) if name in kept]


def reference(name: str) -> pd.DataFrame:
    """A table of the paper's numbers from ``experiments/reference/``; its comment lines say how they were read."""
    return pd.read_csv(FOLDER / "reference" / f"{name}.csv", comment="#")


def find_experiments(patterns: Sequence[str] = ("all",), where: Path = FOLDER) -> list[Path]:
    """The files of the experiments whose names begin with one of the patterns ("fig2", "tab"), or of all of them.

    Args:
        patterns: Beginnings of file names, or "all".
        where: The folder of the experiments.

    Raises:
        ValueError: a pattern fits no file; the message lists those there are.
    """
    files = sorted(path for path in where.glob("*_*.py") if path.stem.startswith(("fig", "tab")))
    if not files:
        raise ValueError(f"{where} holds no experiment: no file there is called fig*_*.py or tab*_*.py.")
    chosen: list[Path] = []
    for pattern in patterns:
        hits = files if pattern == "all" else [path for path in files if path.stem.startswith(pattern)]
        if not hits or not pattern:
            raise ValueError(f"No experiment begins with {pattern!r}; there are {', '.join(p.stem for p in files)}, or all.")
        chosen += [path for path in hits if path not in chosen]
    return chosen


def load_experiment(path: Path) -> Experiment:
    """The `Experiment` of a file.

    Raises:
        ValueError: the file has none.
    """
    spec = importlib.util.spec_from_file_location(f"experiments.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look it up there
    spec.loader.exec_module(module)
    found = getattr(module, "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise ValueError(f"{path} has no EXPERIMENT = Experiment(...).")
    return found


def list_experiments(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Name and title of each file; of one that does not load, why."""
    found = []
    for path in files:
        try:
            found.append((path.stem, load_experiment(path).title))
        except Exception as fault:
            found.append((path.stem, f"does not load: {_first_line(fault)}"))
    return found


@dataclass(frozen=True)
class Outcome:
    """How one experiment of `reproduce` went: its verdicts, or why there are none.

    Attributes:
        error: What failed.
        skipped: Why its claims make no sense of this model; nothing failed then.
    """

    name: str
    seconds: float
    claims: tuple[Claim, ...] = ()
    error: str = ""
    skipped: str = ""


def reproduce(
    files: Sequence[Path],
    options: Options,
    out: Path = Path("figures"),
    *,
    from_csv: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run experiments one after the other; one that fails is named and the others go on.

    Args:
        files: Of `find_experiments`.
        options: For all of them.
        out: Folder of the figures.
        from_csv: Draw and judge again what lies in `out`; nothing is measured.
        tell: Gets a line when an experiment starts and when it ends.

    Returns:
        One outcome a file. A failure's traceback lies in ``options.work / NAME.error.txt``.

    Raises:
        OptionError: an experiment cannot take an option; what ran before it is kept.
    """
    outcomes = []
    for number, path in enumerate(files, start=1):
        started, claims, error, skipped = time.perf_counter(), [], "", ""
        log = options.work / f"{path.stem}.error.txt"
        tell(f"{number} of {len(files)}  {path.stem}")
        try:
            experiment = load_experiment(path)
            tell(f"        {experiment.title}")
            claims = experiment.redraw(out) if from_csv else experiment.run(options, out)
            log.unlink(missing_ok=True)
        except OptionError:
            raise
        except NotApplicableError as fault:
            skipped = str(fault)
        except Exception as fault:
            error = _first_line(fault)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(traceback.format_exc(), encoding="utf-8")
        seconds = time.perf_counter() - started
        told = (
            f"failed after {seconds:.0f} s: {error}"
            if error
            else f"not applicable: {skipped}"
            if skipped
            else f"{seconds:.0f} s"
        )
        tell(f"        {told}")
        outcomes.append(Outcome(path.stem, seconds, tuple(claims), error, skipped))
    return outcomes


def _first_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {(str(fault).strip() or 'no message').splitlines()[0]}"


def command(names: Sequence[str], options: Options) -> str:
    """What to type to run experiments with these options again.

    >>> command(["fig2_features"], Options(count=8, seed=1, smoke=True))
    'diffprobe reproduce fig2_features --count 8 --seed 1 --smoke'
    """
    words = ["diffprobe", "reproduce", *names]
    for option in fields(Options):
        value = getattr(options, option.name)
        if value == option.default or option.name == "work":
            continue
        for one in value if isinstance(value, tuple) else [value]:
            words += [f"--{option.name}", *([] if one is True else [str(one)])]
    return shlex.join(words)


def _own_folder(options: Options) -> str:
    """A folder name for what a choice of options records; a store of one choice refuses another.

    >>> _own_folder(Options(model="maker/model", data="shapes:9?split=test", count=9))
    'model_shapes-9-split-test_n9_seed0'
    """
    parts = [Path(options.model).name, Path(options.data).name, f"n{options.count}", f"seed{options.seed}", *options.set]
    return "_".join(re.sub(r"[^\w.]+", "-", part) for part in parts if part)


def _file_name(name: str, suffix: str) -> str:
    return f"{name}_{suffix}" if suffix else name
