"""Comparisons of arms: what planted answers say is what the rows say; a run does each piece once; the tables run and are judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diffprobe.data.question_benchmarks import load_questions
from diffprobe.data.twins import PATTERNS
from diffprobe.mllm import language
from diffprobe.mllm.model import FusedMLLM
from diffprobe.mllm.stages import train_stage
from diffprobe.rundir import BusyError
from experiments.comparison import (
    ACCURACY,
    BLIND_SPOTS,
    Arm,
    Comparison,
    Settings,
    answers_of,
    change_rows,
    kept_answers,
    score_rows,
    table_rows,
)
from experiments.framework import FOLDER, load_experiment

PAIRS, GROUPS, SEEDS = 90, 45, 3


def planted(arm: str, blind: float, other: float, condition: str = "own", seeds: int = SEEDS) -> pd.DataFrame:
    """Answers right with a chance that depends on whether CLIP is blind to the pattern."""
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, len(arm), len(condition)])
        for benchmark, units, size in (("shapes-mmvp", PAIRS, 2), ("shapes-naturalbench", GROUPS, 4), ("shapes-vqa", 90, 1)):
            for item in range(units * size):
                chance = blind if PATTERNS[item // size % len(PATTERNS)] in BLIND_SPOTS else other
                rows.append({"arm": arm, "seed": seed, "condition": condition, "benchmark": benchmark, "item": item,
                             "chance": 0.5, "hit": float(rng.random() < chance)})  # fmt: skip
    return pd.DataFrame(rows)


def row(rows: pd.DataFrame, **wanted: Any) -> pd.Series:
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def test_scores_equal_loops_over_the_answers() -> None:
    answers = planted("CLIP", 0.6, 0.9)
    rows = score_rows(answers)
    hits = answers[answers["benchmark"] == "shapes-mmvp"].pivot(index="seed", columns="item", values="hit").to_numpy()
    pairs = [[hits[s, 2 * k] * hits[s, 2 * k + 1] for k in range(PAIRS)] for s in range(SEEDS)]
    found = row(rows, score="MMVP", group="all")
    assert found["value"] == pytest.approx(np.mean(pairs)) and found["chance"] == 0.25 and found["n"] == PAIRS
    text = [[value for k, value in enumerate(line) if PATTERNS[k % 9] == "text"] for line in pairs]
    assert row(rows, score="MMVP", group="text")["value"] == pytest.approx(np.mean(text))
    spots = [[value for k, value in enumerate(line) if PATTERNS[k % 9] in BLIND_SPOTS] for line in pairs]
    assert row(rows, score="MMVP", group="blind")["value"] == pytest.approx(np.mean(spots))
    hits = answers[answers["benchmark"] == "shapes-naturalbench"].pivot(index="seed", columns="item", values="hit").to_numpy()
    groups = hits.reshape(SEEDS, GROUPS, 2, 2)  # (question, image)
    for score, expected in (
        ("NB question", groups.all(3).mean()), ("NB image", groups.all(2).mean()), ("NB group", groups.all((2, 3)).mean()),
    ):  # fmt: skip
        assert row(rows, score=score, group="all")["value"] == pytest.approx(expected)
    assert row(rows, score="NB group", group="all")["chance"] == pytest.approx(1 / 16)
    assert row(rows, score=ACCURACY, group="all")["n"] == PAIRS + GROUPS + 90


def test_a_planted_gain_is_found_where_it_was_planted() -> None:
    answers = pd.concat([planted("CLIP", 0.5, 0.9), planted("cross_attention s=4", 0.9, 0.9)])
    rows = change_rows(answers, [(("cross_attention s=4", "own"), ("CLIP", "own")), (("absent", "own"), ("CLIP", "own"))])
    assert set(rows["against"]) == {"CLIP, own"} and set(rows["arm"]) == {"cross_attention s=4"}
    assert row(rows, score="MMVP", group="blind")["low"] > 0.3
    other = row(rows, score="MMVP", group="other")
    assert other["low"] < 0 < other["high"]
    same = change_rows(answers, [(("CLIP", "own"), ("CLIP", "own"))])
    assert (same["value"] == 0).all()


def test_arms_and_benchmarks_that_would_be_merged() -> None:
    assert Arm("cross_attention", timestep=250, guidance=4).label != Arm("cross_attention", guidance=4).label
    for wrong, named in ((("shapes-mmvp:4", "shapes-mmvp:4?seed=1"), "mmvp, mmvp"), (("gqa:folder",), "gqa")):
        with pytest.raises(ValueError, match=f"one benchmark each of .*; found {named}"):
            Comparison("unused", Settings(benchmarks=wrong))


@pytest.mark.parametrize(
    ("template", "expected"), [(("",), ("", "")), (("v1",), ("", "v1")), (("plain", "v1"), ("plain", "v1"))]
)
def test_templates_of_the_stages(template: tuple[str, ...], expected: tuple[str, str], tmp_path: Path) -> None:
    settings = Settings(captions="shapes-captions:8", instructions="shapes-instruct:8", template=template)
    run = Comparison(tmp_path, settings, "cpu")
    first, second = run.stages(0)
    assert (first.template, second.template) == (expected[0], "")
    assert run.model(Arm("clip"), 0).language.template == expected[1]


def test_an_arm_alone_is_judged() -> None:
    answers = planted("CLIP", 0.5, 0.9)
    module = load_experiment(FOLDER / "table2_fusion.py")
    assert module.judge(pd.concat([score_rows(answers), change_rows(answers, [])], ignore_index=True)) == []


def test_a_stage_that_another_process_trains_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        captions="shapes-captions:8", instructions="shapes-instruct:8", steps=(1, 1), batch=4, benchmarks=("shapes-mmvp:9",)
    )
    told: list[str] = []
    calls: list[str] = []

    def busy(model: FusedMLLM, data: Any, folder: Path, *more: Any, **options: Any) -> None:
        calls.append(folder.parent.name)
        if len(calls) == 1:
            raise BusyError("Another process (pid 7) is writing there; wait for it, or stop it.")
        train_stage(model, data, folder, *more, **options)

    monkeypatch.setattr("diffprobe.mllm.stages.train_stage", busy)
    monkeypatch.setattr("experiments.comparison.WAIT", 0.0)
    Comparison(tmp_path, settings, "cpu", told.append).trained(Arm("clip"), 0)
    assert calls == ["stage1", "stage1", "stage2"] and "pid 7" in told[0]


def test_published_benchmarks_are_scored_as_their_twins() -> None:
    twins = planted("CLIP", 0.6, 0.9)
    real = twins.assign(benchmark=twins["benchmark"].str.removeprefix("shapes-").replace("vqa", "cv-bench"))
    drawn, found = score_rows(twins), score_rows(real)
    assert set(found["group"]) == {"all"}  # patterns take turns in the twins alone
    pd.testing.assert_frame_equal(found, drawn[drawn["group"] == "all"].reset_index(drop=True))


def test_shares_of_one_have_an_interval() -> None:
    found = row(score_rows(planted("CLIP", 1.0, 1.0)), score="MMVP", group="all")
    assert found["value"] == found["high"] == 1 and 0.9 < found["low"] < 1


# --- verdicts of the tables, from rows alone ----------------------------------------------------------


@pytest.mark.parametrize(("blind", "expected"), [(0.9, "held"), (0.5, "undecided"), (0.1, "not held")])
def test_table_2_finds_the_gain_it_is_given(blind: float, expected: str) -> None:
    module = load_experiment(FOLDER / "table2_fusion.py")
    arm = "cross_attention s=4"
    answers = pd.concat(
        [planted("CLIP", 0.5, 0.9), *(planted(arm, blind, 0.9, c) for c in ("own", "irrelevant")), planted(arm, 0.5, 0.5, "blank"),
         planted("cross_attention s=0", 0.5, 0.9)]
    )  # fmt: skip
    pairs = [
        ((arm, "own"), ("CLIP", "own")),
        ((arm, "irrelevant"), ("CLIP", "own")),
        ((arm, "own"), ("cross_attention s=0", "own")),
    ]
    rows = pd.concat([score_rows(answers), change_rows(answers, pairs)], ignore_index=True)
    claims = {claim.statement: claim for claim in module.judge(rows)}
    key = "Cross-attention at s = 4 beats CLIP alone on pairs of patterns that CLIP is blind to"
    assert claims[key].id == "F2" and claims[key].verdict == expected
    assert f"n = {4 * PAIRS // 9} x 3 trainings; paper: 24.7 to 30.7" in claims[key].evidence
    assert claims[f"The gain of {arm} survives an irrelevant question as the prompt (ours)"].verdict == expected
    assert any(claim.id == "F3" for claim in claims.values())


def test_table_1_takes_the_worst_of_its_parts() -> None:
    module = load_experiment(FOLDER / "table1_single_encoder.py")
    main, names = Arm("diffusion").label, [Arm("diffusion", site).label for site in ("U-L1-R1-B0-Out", "U-L2-R1-B0-Cross-Q")]
    late = Arm("diffusion", timestep=500).label
    for best, expected in ((0.5, "held"), (0.97, "not held")):
        answers = pd.concat(
            [planted(main, 0.8, 0.8), planted(names[0], 0.5, 0.5), planted(names[1], best, best), planted(late, 0.5, 0.5)]
        )
        changes = change_rows(answers, [((main, "own"), (name, "own")) for name in (*names, late)])
        claims = module.judge(pd.concat([score_rows(answers), changes], ignore_index=True))
        assert [claim.verdict for claim in claims] == [expected, "held"] and claims[1].statement.endswith("t = 500 collapses")


def test_a_site_is_not_judged_where_it_was_chosen() -> None:
    module = load_experiment(FOLDER / "table2_fusion.py")
    arm = "cross_attention s=0 U-L2-R2-Res-Out"
    answers = pd.concat([planted("CLIP", 0.5, 0.5), planted(arm, 0.9, 0.9)])
    for seed, expected in ((0, "not testable"), (1, "held")):
        claims = module.judge(change_rows(answers, [((arm, "own"), ("CLIP", "own"))], seed))
        assert {claim.verdict for claim in claims} == {expected}
        assert ("chosen on these questions" in claims[0].evidence) == (seed == 0)


def test_one_training_an_arm_decides_nothing() -> None:
    module = load_experiment(FOLDER / "table2_fusion.py")
    arm = "cross_attention s=4"
    answers = pd.concat([planted("CLIP", 0.2, 0.2, seeds=1), planted(arm, 0.9, 0.9, seeds=1)])
    claims = module.judge(change_rows(answers, [((arm, "own"), ("CLIP", "own"))]))
    assert claims and {claim.verdict for claim in claims} == {"undecided"}
    assert all("another training may differ" in claim.evidence for claim in claims)


def test_one_training_a_site_decides_nothing() -> None:
    module = load_experiment(FOLDER / "table1_single_encoder.py")
    main, late = Arm("diffusion").label, Arm("diffusion", timestep=500).label
    other = Arm("diffusion", "U-L1-R1-B0-Out").label
    answers = pd.concat([planted(main, 0.9, 0.9, seeds=1), *(planted(name, 0.2, 0.2, seeds=1) for name in (other, late))])
    claims = module.judge(change_rows(answers, [((main, "own"), (name, "own")) for name in (other, late)]))
    assert len(claims) == 2 and {claim.verdict for claim in claims} == {"undecided"}
    assert all("another training may differ" in claim.evidence for claim in claims)


def test_kept_answers_give_the_same_scores() -> None:
    """Anyone can score the committed answers again, with texts, and with a hit that is not known."""
    answers = pd.concat(
        [planted("CLIP", 0.5, 0.9), planted("CLIP", 0.4, 0.4, "blank"), planted("concat s=4", 0.6, 0.6, seeds=2)]
    )
    answers = answers.assign(output=np.where(answers["hit"] == 1, "yes", "no, 3"))
    again = answers_of(kept_answers(answers))
    pd.testing.assert_frame_equal(score_rows(again), score_rows(answers))
    assert set(again["output"]) == {"yes", "no, 3"} and len(again) == len(answers)
    answers.iloc[3, answers.columns.get_loc("hit")] = np.nan
    assert answers_of(kept_answers(answers))["hit"].isna().sum() == 1


def test_the_table_has_a_floor_and_both_chances() -> None:
    answers = pd.concat([planted("CLIP", 0.5, 0.9), planted("CLIP", 0.1, 0.1, "blank")])
    table = table_rows(score_rows(answers), pd.DataFrame(), {"MMVP": "mmvp", "VQA": "vqa"})
    assert list(dict.fromkeys(table["label"])) == ["CLIP", "CLIP, blank images"]
    pairs = table[table["score"] == "MMVP"]
    assert pairs["blind"].tolist() == [0, 0] and pairs["chance"].tolist() == [0.25, 0.25]
    assert table[table["score"] == "VQA"]["blind"].isna().all()


# --- a run --------------------------------------------------------------------------------------------


def test_a_run_does_each_piece_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        diffusion=str(tiny_folder), captions="shapes-captions:8", instructions="shapes-instruct:8", steps=(1, 1), batch=4, grid=3,
        benchmarks=("shapes-vqa:4", "shapes-mmvp:9"), max_new_tokens=2,
    )  # fmt: skip
    told: list[str] = []
    run = Comparison(tmp_path, settings, "cpu", told.append)
    pieces = {Arm("diffusion", guidance=4.0): ("own",), Arm("diffusion"): ("own", "blank")}
    answers = run.complete(pieces, [0])
    assert answers.groupby(["arm", "condition"]).size().tolist() == [22, 22, 22]
    assert set(answers["hit"]) <= {0.0, 1.0} and len(load_questions("shapes-mmvp:9")) == 18
    assert (
        len(list((tmp_path / "stage1").iterdir())) == 1 and len(list((tmp_path / "stage2").iterdir())) == 2
    )  # shared: not told
    assert FusedMLLM.from_pretrained(run.folder / "stage2" / f"{Arm('diffusion').slug}_seed0", "cpu").tuned == "full"
    told.clear()
    again = Comparison(tmp_path, settings, "cpu", told.append).complete(pieces, [0])
    assert told == [] and again.equals(answers)
    # questions of the same name that are others, or of other images, are asked; what was trained stays
    for change in ("question", "images"):
        asked = Comparison(tmp_path, settings, "cpu", told.append)
        *first, item, last = asked.benchmarks[1].items
        other = {"question": f"{item.question} Look.", "images": last.images}[change]
        asked.benchmarks[1] = replace(asked.benchmarks[1], items=(*first, replace(item, **{change: other}), last))
        assert len(asked.complete(pieces, [0])) == 66
        assert sum("seed 0" in line for line in told) == 2 and not [line for line in told if "step" in line]
        told.clear()
    assert Comparison(tmp_path, settings, "cpu", told.append).complete(pieces, [0]).equals(answers) and told == []
    with pytest.raises(ValueError, match=r"holds another run.*batch: the store has 4, you ask for 8"):
        Comparison(tmp_path, Settings(**{**settings.__dict__, "batch": 8}), "cpu")

    def trained_on(*given: Any, **more: Any) -> Any:
        found = load_language_model(*given, **more)
        next(found.model.parameters()).data[0] += 1
        return found

    load_language_model = language.load_language_model
    monkeypatch.setattr(language, "load_language_model", trained_on)  # the same name, other weights
    with pytest.raises(ValueError, match=r"holds another run.*language_weights: the store has"):
        Comparison(tmp_path, settings, "cpu")
