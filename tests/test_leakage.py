"""The leakage detector from features to verdict: planted leaks are found, what sees is not accused, and nothing is done twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from PIL import Image

from diffprobe import cli
from diffprobe.conditioning import assign_prompts, nearest_other, random_words
from diffprobe.data import BlankDataset, Caption, Sample, load_dataset
from diffprobe.data.drawn import ShapesDataset
from diffprobe.extraction import extract
from diffprobe.knockout import KnockedOut
from diffprobe.mllm import leakage_run
from diffprobe.mllm.captions import WITHOUT_MODEL, words
from diffprobe.mllm.leakage import MAIN_SITE as MAIN
from diffprobe.mllm.leakage import NO_TEXT_SITE as FIRST
from diffprobe.mllm.leakage import (
    LeakageError,
    Recipe,
    Settings,
    examples,
    leakage_report,
    plan,
    read_table,
    read_texts,
)
from diffprobe.mllm.leakage_run import Run
from diffprobe.mllm.verdict import SCORES, judge_leakage
from diffprobe.rundir import RequestError
from diffprobe.store import features as stored
from diffprobe.store import open_store, provenance
from experiments.leakage import compare, item_scores

WORDS = ("red", "blue", "green", "pink", "cyan", "orange", "purple", "yellow")

# --- planted ----------------------------------------------------------------------------------------


Train = Callable[..., pd.DataFrame]


@pytest.fixture(scope="module")
def trained(language: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Texts of projectors trained on features that hold the fed word, the image's word, both, or neither.

    A language model of random weights says the word that its soft tokens ask for, once a projector has learnt to ask.
    """
    from diffprobe.mllm.config import TrainConfig
    from diffprobe.mllm.language import generate_texts
    from diffprobe.mllm.train import Captioned, train_projector

    model = language(WORDS, 64)

    def texts(kind: str, seed: int, projectors: int) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        seen, fed, nothing = rng.integers(8, size=160), rng.integers(8, size=160), np.array([])
        other = (rng.integers(8, size=160),) * 2
        # own: under own captions text and image agree; test: under mismatched prompts they do not
        own, test = {
            "leaks": ((nothing, seen), (nothing, fed)), "sees": ((seen, nothing), (seen, nothing)), "neither": (other, other),
        }[kind]  # fmt: skip

        def features(*words: np.ndarray) -> torch.Tensor:
            """Two tokens; one block of channels a planted word, over noise."""
            blocks = [np.eye(8)[w] if w.size else np.zeros((160, 8)) for w in words]
            values = np.repeat(np.concatenate(blocks, 1)[:, None], 2, 1)
            return torch.from_numpy((values + rng.normal(0, 0.05, values.shape)).astype(np.float32))

        shown, tested, rows = features(*own), features(*test), []
        captions, held = [WORDS[w] for w in seen], slice(120, 160)
        for projector_seed in range(projectors):
            config = TrainConfig(
                steps=40, batch=24, learning_rate=0.02, patience=0, evaluate_every=40, seed=100 * seed + projector_seed
            )
            projector = train_projector(
                model, Captioned(shown[:100], captions[:100]), Captioned(shown[100:120], captions[100:120]),
                tmp_path_factory.mktemp("planted") / "p", config,
            )  # fmt: skip
            said = generate_texts(model, projector, tested[held], max_new_tokens=3)
            rows += [
                {"arm": "M", "site": kind, "timestep": 50, "guidance": 4.0, "seed": projector_seed, "condition": "mismatched", "sample": f"image-{k}",
                 "fed": f"{WORDS[fed[k]]} thing", "references": json.dumps([f"something {WORDS[seen[k]]}"]), "output": text}
                for k, text in zip(range(120, 160), said, strict=True)
            ]  # fmt: skip
        return pd.DataFrame(rows)

    return texts


@pytest.fixture(scope="module")
def planted(trained: Train) -> dict[str, pd.DataFrame]:
    return {kind: trained(kind, seed=0, projectors=2) for kind in ("leaks", "sees", "neither")}


def verdict_of(texts: pd.DataFrame, planted: dict[str, pd.DataFrame]) -> pd.Series:
    controls = [planted["leaks"].assign(control="K+", arm=""), planted["sees"].assign(control="K-", arm="")]
    texts = pd.concat([texts.assign(control=""), *controls], ignore_index=True)
    texts = texts.assign(guidance=[np.nan if c else s for c, s in zip(texts["control"], texts["guidance"], strict=True)])
    return judge_leakage(texts, margin=0.15, n_permutations=999, n_resamples=200).verdicts.iloc[0]


@pytest.mark.parametrize("kind", ["leaks", "sees", "neither"])
def test_what_was_planted_is_found(planted: dict[str, pd.DataFrame], kind: str) -> None:
    row = verdict_of(planted[kind], planted)
    assert row["verdict"] == kind, row["why"]


@pytest.mark.slow
def test_what_no_prompt_has_reached_sees_and_never_leaks(trained: Train, planted: dict[str, pd.DataFrame]) -> None:
    """Twenty worlds from features to verdict: other images, other texts, other projectors."""
    verdicts = [verdict_of(trained("sees", seed=seed, projectors=1), planted)["verdict"] for seed in range(1, 21)]
    assert not {"leaks", "both"} & set(verdicts), verdicts
    assert verdicts.count("sees") >= 15, verdicts  # a clean bill has to be shown, which forty images do not always do


def test_item_scores_average_to_the_verdict_s_scores(planted: dict[str, pd.DataFrame]) -> None:
    texts = pd.concat([planted[k].assign(control="", source="", arm=k) for k in ("leaks", "sees")], ignore_index=True)
    items = item_scores(texts)
    table = judge_leakage(texts, n_permutations=99).table.set_index(["arm", "score"])["value"]
    for arm, part in items.groupby("arm"):
        for score in ("leak", "sight"):
            assert part[score].mean() == pytest.approx(table[arm, score])
    rows = compare(items, "arm", "leaks").set_index(["label", "score"])
    assert rows.loc[("sees", "leak"), "change"] == pytest.approx(table["sees", "leak"] - table["leaks", "leak"])
    assert rows.loc[("sees", "leak"), "change"] < 0 < rows.loc[("sees", "sight"), "change"]
    assert rows.loc[("leaks", "leak"), ["change", "change_low", "change_high"]].tolist() == [0, 0, 0]


# --- texts that are fed ----------------------------------------------------------------------------


def test_nearest_other_says_what_the_image_does_not() -> None:
    captions = [["a red star", "a large star"], ["a large star", "a red star"], ["a red circle"], ["", ""], ["赤い 星"]]
    assert nearest_other(captions)[0] == "a red circle"  # the nearer one describes it too
    assert nearest_other(captions)[2] == "a red star"
    assert nearest_other(captions)[3] != ""
    data = ShapesDataset(40)
    for own, other in zip(
        (data[k] for k in range(40)), assign_prompts([data[k] for k in range(40)], ["hard"])["hard"], strict=True
    ):
        assert set(str(other).split()) - {w.strip(",") for c in own.captions for w in c.text.split()}
    with pytest.raises(ValueError, match="all of them could describe 'a star'"):
        nearest_other([["a star"], ["a star"]])


def test_random_words_belong_to_the_sample() -> None:
    ids, captions = ["a", "b", "c"], [["a red star"], ["two dots"], [""]]
    texts = random_words(ids, captions)
    assert [len(t.split()) for t in texts] == [3, 2, 1] and set(" ".join(texts).split()) <= {"a", "red", "star", "two", "dots"}
    assert random_words(ids[::-1], captions[::-1]) == texts[::-1]
    with pytest.raises(ValueError, match="no caption has one"):
        random_words(["a"], [["..."]])


def test_blank_images_keep_ids_and_captions() -> None:
    blank, data = load_dataset("blank:shapes:3?split=test"), ShapesDataset(3, "test")
    assert [blank[k].id for k in range(3)] == [data[k].id for k in range(3)] and blank[0].captions == data[0].captions
    assert len(blank[0].load().getcolors()) == 1 and blank.spec == "blank:shapes:3?split=test&seed=0"
    assert blank.fingerprint() != data.fingerprint() and not blank[0].labels


# --- a run ------------------------------------------------------------------------------------------

SETTINGS = Settings(data="shapes:24?split=train", test="shapes:12?split=test", steps=2, batch=4, max_new_tokens=4, grid=3,
                    candidates=5, ranked=3)  # fmt: skip
ASKED: dict[str, Any] = {"arms": ("U", "M+drop30"), "guidance": (4.0,), "seeds": 1, "conditions": ("own", "mismatched", "none"),
                         "knockouts": ("start",), "tell": lambda line: None}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, language: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("leakage") / "run"
    leakage_run.run(folder, SETTINGS, **ASKED, model=tiny_model, language=language())
    return folder


def test_no_prompt_reaches_the_first_query(tiny_model: Any, tmp_path: Path) -> None:
    names = ("null", "caption", "mismatched", "hard", "words")
    extract(
        tiny_model,
        "shapes:4",
        tmp_path / "s.zarr",
        sites=[FIRST, MAIN],
        timesteps=[50],
        conditionings=names,
        batch_rows=5,
        progress=False,
    )
    tree = open_store(tmp_path / "s.zarr")
    first, main = (stored(tree, site, timestep=50).values for site in (FIRST, MAIN))
    for column in range(1, len(names)):
        assert np.array_equal(first[:, column], first[:, 0])
        assert not np.array_equal(main[:, column], main[:, 0])


def test_a_run_is_one_table_and_arrays(finished: Path) -> None:
    texts = read_texts(finished)
    assert set(texts["control"]) == {"", "K-", "K+"} and set(texts["condition"]) == set(ASKED["conditions"])
    assert set(texts["arm"]) == {"", "U", "M+drop30", "U without start", "M+drop30 without start"}
    counts = texts.groupby(["control", "arm", "condition"]).size()
    assert (counts == 12).all() and len(counts) == 6 * 3
    own = texts[texts["condition"] == "own"]
    data = ShapesDataset(12, "test")
    prompts = {data[k].id: data[k].captions[0].text for k in range(12)}
    assert (own["fed"] == own["sample"].map(prompts)).all() and (own["source"] == own["sample"]).all()
    assert not any(prompts[row["sample"]] in json.loads(row["references"]) for row in texts.to_dict("records"))
    other = texts[texts["condition"] == "mismatched"]
    assert (other["fed"] == other["source"].map(prompts)).all() and not (other["source"] == other["sample"]).any()
    assert (texts[texts["condition"] == "none"]["fed"] == "").all()
    arrays = {path.stem: np.load(path) for path in (finished / "likelihood").glob("*.npz")}
    assert len(arrays) == 4 and all(a["conditional"].shape == (3, 5) for a in arrays.values())
    assert sum("unconditional" in a for a in arrays.values()) == 2  # U and M; the controls have no such reader


def test_a_run_goes_on_and_does_nothing_twice(finished: Path, tiny_model: Any, language: Callable[..., Any]) -> None:
    held = Run(finished, SETTINGS, model=tiny_model, language=language(), tell=lambda line: None)
    tests = plan(ASKED["arms"], [MAIN], [50], [4.0], 1, ASKED["conditions"], ASKED["knockouts"])
    files = {
        path: path.stat().st_mtime_ns
        for kind in ("texts", "likelihood", "projectors")
        for path in (finished / kind).rglob("*.*")
    }
    gone = sorted((finished / "texts").glob("*.csv"))[3]
    before = gone.read_text(encoding="utf-8")
    gone.unlink()
    forecast = held.forecast(tests)
    assert (forecast.recordings, forecast.projectors, forecast.texts) == ([], 0, 12)
    held.complete(tests)
    assert gone.read_text(encoding="utf-8") == before
    assert {p: p.stat().st_mtime_ns for p in files if p != gone} == {p: t for p, t in files.items() if p != gone}


def test_another_run_in_the_folder_is_refused(finished: Path, tiny_model: Any, language: Callable[..., Any]) -> None:
    changed = Settings(**{**vars(SETTINGS), "steps": 3})
    with pytest.raises(RequestError, match="steps: the store has 2, you ask for 3"):
        Run(finished, changed, model=tiny_model, language=language())
    other = language()
    weight = next(other.model.parameters())  # all of these tests share it
    kept = weight.data.clone()
    weight.data[0] += 1
    try:
        with pytest.raises(RequestError, match="language_weights: the store has"):
            Run(finished, SETTINGS, model=tiny_model, language=other)
    finally:
        weight.data.copy_(kept)
    both = Settings(data="shapes:24?split=test", test="shapes:12?split=test")
    with pytest.raises(LeakageError, match="'shapes-test-0-000000' is in training and test"):
        Run(finished.parent / "other", both, model=tiny_model, language=language())


def test_the_batch_of_a_run_is_asked_for_and_never_timed(
    tiny_model: Any, language: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of another batch differ in their last bits, so a timed one would make two equal runs differ."""
    monkeypatch.setattr("diffprobe.units.Run.find_batch", lambda run, seconds: pytest.fail("the batch was timed"))
    for settings, rows in ((SETTINGS, 16), (replace(SETTINGS, batch_rows=3), 3)):
        folder = tmp_path / str(rows)
        asked(Run(folder, settings, model=tiny_model, language=language(), tell=lambda line: None), "M")
        assert json.loads((folder / "request.json").read_text())["batch_rows"] == rows
        assert [provenance(open_store(path))["batch_rows"] for path in (folder / "stores").glob("*.zarr")] == [rows]
    with pytest.raises(RequestError, match="batch_rows: the store has 3, you ask for 16"):
        Run(tmp_path / "3", SETTINGS, model=tiny_model, language=language())


def test_what_a_run_suggests_runs(
    finished: Path, follow: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leakage_run, "run", lambda *_, **__: None)  # all is there
    monkeypatch.setattr(sys, "argv", ["diffprobe", "leakage", "run", "--out", str(finished)])
    with pytest.raises(SystemExit):
        cli.main()
    (said,) = follow(capsys.readouterr().out)
    assert "Tables and pictures:" in said and (finished / "report" / "scores.csv").exists()


def report_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["diffprobe", "leakage", "report", str(folder), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_the_report_says_how_much_of_a_caption_comes_back(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outputs repeat the image's own caption, describe the image though another caption is fed, or are empty without one."""
    texts = read_texts(finished)
    references = [json.loads(r) for r in texts["references"]]
    said = {"own": texts["fed"], "mismatched": [own[0] for own in references], "none": [""] * len(texts)}
    texts["output"] = [said[condition][k] for k, condition in enumerate(texts["condition"])]
    (tmp_path / "texts.csv").write_text(texts.to_csv(index=False), encoding="utf-8")
    shutil.copy(finished / "request.json", tmp_path)
    report_of(tmp_path, monkeypatch)
    rows = pd.read_csv(tmp_path / "report" / "recovery.csv", keep_default_na=False)
    assert set(rows["metric"]) == set(WITHOUT_MODEL) and (rows["n"] == 12).all() and (rows["n_seeds"] == 1).all()
    rows = rows[(rows["arm"] == "U")].set_index(["condition", "score", "metric"])
    assert ("none", "fed", "bleu") not in rows.index  # nothing was fed in
    exact = {cell: rows.loc[(*cell, "exact"), "value"] for cell in {cell[:2] for cell in rows.index}}
    assert exact == {("own", "fed"): 1, ("own", "references"): 0, ("mismatched", "fed"): 0, ("mismatched", "references"): 1,
                     ("none", "references"): 0}  # fmt: skip
    mine = texts[(texts["arm"] == "U") & (texts["condition"] == "mismatched")]
    spaced = [[" ".join(words(text)) for text in column] for column in (mine["output"], mine["fed"])]
    bleu = sacrebleu.BLEU(tokenize="none", force=True).corpus_score(spaced[0], [spaced[1]]).score / 100
    row = rows.loc[("mismatched", "fed", "bleu")]
    assert row["value"] == pytest.approx(bleu) and row["low"] <= row["value"] <= row["high"] and row["low"] < row["high"]
    assert rows.loc[("own", "fed", "rouge_l"), "value"] == 1 > rows.loc[("own", "fed", "rouge_l"), "chance"] > 0
    assert (rows.loc[("none", "references"), ["value", "n_empty"]] == [0, 12]).all(axis=None)
    assert "Recovery of captions" in capsys.readouterr().out
    scores = pd.read_csv(tmp_path / "report" / "scores.csv")
    assert set(scores["score"]) == {*SCORES, "fed", "references"}


def test_a_report_does_without_packages_that_are_not_installed(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    report_of(finished, monkeypatch, "--out", str(tmp_path))
    assert set(pd.read_csv(tmp_path / "recovery.csv")["metric"]) == set(WITHOUT_MODEL) - {"bleu"}
    with pytest.raises(ValueError, match=r"pip install 'diffprobe\[captions\]'"):
        leakage_report(finished, metrics=["bleu"])


def test_examples_show_every_cell_by_its_own_name() -> None:
    rows = [
        {"control": "", "arm": arm, "site": MAIN, "timestep": t, "guidance": 4.0, "seed": 0, "condition": condition, "sample": "a", "fed": "x",
         "references": '["y"]', "output": f"{arm} at {t}, {condition}"}
        for arm in "UM" for t in (50, 500) for condition in ("own", "none") if (arm, condition) != ("U", "none")
    ]  # fmt: skip
    table = examples(pd.DataFrame(rows)).set_index("condition")
    assert list(table.columns) == ["sample", "seen", "fed", "U s=4 t=50", "U s=4 t=500", "M s=4 t=50", "M s=4 t=500"]
    assert table.loc["own", "M s=4 t=500"] == "M at 500, own" and table.loc["none", "U s=4 t=50"] == ""
    one = examples(pd.DataFrame([row for row in rows if row["timestep"] == 50]))
    assert list(one.columns)[4:] == ["U s=4", "M s=4"]


def test_report_needs_no_torch(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from diffprobe import leakage_report; from diffprobe.mllm.leakage import save_report; "
        f"found = leakage_report({str(finished)!r}); save_report(found, {str(tmp_path)!r}); "
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules); print(len(found.sentences), list(found.likelihood['score'].unique()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4 ['top1', 'mrr', 'bits', 'bits per token']"
    assert {path.name for path in tmp_path.iterdir()} >= {
        "scores.csv",
        "verdicts.csv",
        "leak_against_sight.png",
        "side_by_side.png",
    }
    with pytest.raises(LeakageError, match="is no folder that 'diffprobe leakage run' filled"):
        read_texts(tmp_path)


# --- features and cures -----------------------------------------------------------------------------


class Talkative:
    """Pictures whose captions are empty, in another script, or far beyond 77 tokens."""

    texts = ("", "赤い星と青い円", "a red star " * 60, "a blue circle")
    spec = "talkative"

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        text = self.texts[index % 4]
        image = Image.new("RGB", (64, 64), (60 * (index % 4), 90, 20))
        return Sample(f"{self.name}-{index}", lambda: image, captions=(Caption(text), Caption(f"{text} there")))

    def fingerprint(self) -> str:
        return self.name


def test_odd_captions(tiny_model: Any, language: Callable[..., Any], tmp_path: Path) -> None:
    held = Run(
        tmp_path,
        SETTINGS,
        model=tiny_model,
        language=language(),
        data=Talkative("train", 12),
        test=Talkative("test", 4),
        tell=lambda line: None,
    )
    tests = plan(["M/gated"], [MAIN], [50], [1.0], 1, ["own", "mismatched", "random_words"])
    texts = held.complete(tests)
    assert len(texts) == 3 * 3 * 4
    empty = texts[(texts["sample"] == "test-0") & (texts["condition"] == "own")]
    assert (empty["fed"] == "").all() and (empty["references"] == '[" there"]').all()
    assert held.features._text_tokens == 77


def asked(held: Run, arm: str, conditioning: str = "mismatched", split: str = "train") -> torch.Tensor:
    recipe = Recipe(arm, MAIN, 50, 4.0, 0)
    wanted = held.asked(recipe, split, conditioning, 4.0)
    for recording in held.features.missing([wanted]):
        held.features.record(recording, progress=False)
    return held.features.tokens(wanted, held.features.ids(split))


def test_cures(finished: Path, tiny_model: Any, language: Callable[..., Any]) -> None:
    held = Run(finished, SETTINGS, model=tiny_model, language=language(), tell=lambda line: None)
    plain, null, centred = asked(held, "M"), asked(held, "M", "null"), asked(held, "M/centred")
    assert torch.allclose((centred - null).mean(1), torch.zeros_like(null[:, 0]), atol=1e-3)
    spread = (plain - null) - (plain - null).mean(1, keepdim=True)
    assert torch.allclose(centred - null, spread, atol=1e-3)
    gate = asked(held, "M/gated") / null
    assert torch.allclose(gate, gate[..., :1].expand_as(gate), atol=1e-2) and (gate > 0).all()
    assert torch.allclose(gate[..., 0].mean(1), torch.ones(len(gate)), atol=1e-2) and gate.std() > 0
    assert not torch.allclose(asked(held, "M/eos_and_padding"), plain, atol=1e-3)
    with pytest.raises(ValueError, match="needs a site in a transformer block"):
        held.asked(Recipe("M/gated", "U-L2-R2-Res-Out", 50, 4.0, 0), "train", "caption", 4.0).passes()


def test_the_last_release_s_spelling_of_a_knockout_is_read_and_named(
    finished: Path, tiny_model: Any, language: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    asked = ASKED | {"arms": ("M/ending",), "knockouts": ("ending@down_blocks*",), "tell": told.append}
    monkeypatch.setattr(Run, "forecast", lambda run, tests, ranked: told.extend(t.slug for t in tests) or "")
    leakage_run.run(finished, SETTINGS, **asked, dry_run=True, model=tiny_model, language=language())
    assert told[0] == (
        "M/ending, ending@down_blocks*: today's spelling is M/eos_and_padding, eos_and_padding@down_blocks*; "
        "the next release drops the old one."
    )
    # what an earlier run wrote is found by its name, and read in today's spelling
    assert any("M-ending_" in slug and "ending-down_blocks-" in slug for slug in told[1:])
    path = finished.parent / "old.csv"
    path.write_text((finished / "texts.csv").read_text(encoding="utf-8").replace(",M+drop30,", ",M/ending,"), encoding="utf-8")
    assert "M/eos_and_padding" in set(read_table(path)["arm"])
    model = KnockedOut(tiny_model, "ending")
    assert str(model.knockout) == "eos_and_padding" and model.weights_hash().endswith(" without ending")


def test_erased_words_cannot_be_read_linearly(finished: Path, tiny_model: Any, language: Callable[..., Any]) -> None:
    held = Run(finished, SETTINGS, model=tiny_model, language=language(), tell=lambda line: None)
    prompts = held.features.prompts("train", "mismatched")
    words = np.array([["orange" in prompts[i].replace(",", "").split()] for i in held.features.ids("train")], float)
    assert 5 <= words.sum() <= 19
    covariances = []
    for arm in ("M", "M/erased"):
        tokens = asked(held, arm).double().numpy()
        flat, target = tokens.reshape(-1, tokens.shape[-1]), np.repeat(words - words.mean(), tokens.shape[1], 0)
        covariances.append(np.abs(flat.T @ target / len(flat)).max() / flat.std())
    assert covariances[1] < 1e-3 < 0.01 < covariances[0]


def test_dropout_and_seed_of_a_recipe(finished: Path, tiny_model: Any, language: Callable[..., Any]) -> None:
    held = Run(finished, SETTINGS, model=tiny_model, language=language(), tell=lambda line: None)
    config = held.train_config(Recipe("X+drop50/centred", MAIN, 50, 1.5, 2))
    assert (config.dropout, config.seed, config.steps) == (0.5, 2, SETTINGS.steps)
    shown = held.training(Recipe("X+drop50", MAIN, 50, 1.5, 2))
    assert [(a.conditioning, a.guidance) for a in shown] == [("mismatched", 1.5), ("null", 1.5)]
    with pytest.raises(LeakageError, match=r"Arm 'M\+drop' is not BASE"):
        plan(["M+drop"], [MAIN], [50], [1.0], 1, ["own"])
    with pytest.raises(LeakageError, match="Condition 'other' is not one of own, mismatched"):
        plan(["M"], [MAIN], [50], [1.0], 1, ["other"])


def test_blanks_take_a_dataset() -> None:
    assert BlankDataset(ShapesDataset(1)).name == "blank-shapes-train-0"
