"""Planted leaks, planted sight and nothing at all, judged from simulated captions; each statistic against a plain oracle."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from diffprobe.data import shapes
from diffprobe.mllm.captions import cider_similarity, content_f1, content_words, document_frequencies
from diffprobe.mllm.verdict import (
    COLUMNS,
    Leakage,
    crossed_mean,
    equivalence_p,
    judge_leakage,
    matched_candidates,
    normalised_index,
    permutation_p,
    rank_fed,
    sentence,
    usable_information,
)
from diffprobe.stats import holm

WORDS = (
    ("red", "blue", "green", "yellow", "purple", "orange"),
    ("circle", "square", "star", "triangle", "cross", "moon"),
    ("left", "right", "top", "bottom", "middle", "corner"),
)
FORMS = ("a {0} {1} at the {2}", "the {1} at the {2} is {0}", "there is a {0} {1} in the {2}")
FAST = {"n_permutations": 399, "n_resamples": 50}
Scene = tuple[int, ...]


def say(scene: Scene, form: int) -> str:
    return FORMS[form].format(*(words[k] for words, k in zip(WORDS, scene, strict=True)))


def cell(
    rng: np.random.Generator, scenes: list[Scene], leak: float, sight: float, seeds: int = 3, **key: Any
) -> list[dict[str, Any]]:
    """Outputs under mismatched prompts: each word is the prompt's, the image's or a guess, with the given shares."""
    n = len(scenes)
    order = rng.permutation(n)
    source = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    place = {"arm": "M", "site": "up", "timestep": 50, "guidance": 4.0, "control": "", "condition": "mismatched", **key}
    rows = []
    for seed, i in itertools.product(range(seeds), range(n)):
        fed, own = scenes[source[i]], scenes[i]
        draws = rng.random(3)
        said = tuple(
            f if u < leak else o if u < leak + sight else int(rng.integers(6)) for u, f, o in zip(draws, fed, own, strict=True)
        )
        texts = {
            "fed": say(fed, 0),
            "references": json.dumps([say(own, 1)] * (fed != own)),
            "output": say(said, int(rng.integers(3))),
        }
        rows.append({**place, "seed": seed, "sample": f"image {i}", "source": f"image {source[i]}", **texts})
    return rows


def world(
    seed: int, n: int, leak: float, sight: float, seeds: int = 3, negative: float = 0.0, positive: float = 0.9
) -> pd.DataFrame:
    """One site with its controls; K- sees a little, as an early site does."""
    rng = np.random.default_rng(seed)
    scenes = [tuple(int(k) for k in rng.integers(6, size=3)) for _ in range(n)]
    rows = cell(rng, scenes, leak, sight, seeds)
    rows += cell(rng, scenes, negative, 0.3, seeds, site="first", control="K-")
    rows += cell(rng, scenes, positive, 0.0, seeds, site="text", control="K+", arm="", timestep=None, guidance=None)
    return pd.DataFrame(rows)


def only(found: Leakage) -> pd.Series:
    assert len(found.verdicts) == 1
    return found.verdicts.iloc[0]


# --- planted --------------------------------------------------------------------------------------


def test_a_planted_leak_leaks() -> None:
    found = judge_leakage(world(0, 100, leak=0.6, sight=0.0), seed=1)
    row = only(found)
    assert row.verdict == "leaks" and row.leak_low > 0.3 and abs(row.sight) < 0.1
    assert 0.5 < row.index_low < row["index"] < row.index_high < 0.85  # 0.6 of 0.9 of the words
    assert row.leak_p_holm == 2e-4 and (row.n, row.n_seeds) == (100, 3)
    text = sentence(row)
    assert (
        text.startswith("M at up, t = 50, s = 4 (100 images, 3 projectors: a leak of 0.0")
        and "): leaks (leak 0." in text
        and "no leak" not in text
    )


def test_planted_sight_is_seen_and_never_called_a_leak() -> None:
    rows = [only(judge_leakage(world(seed, 110, leak=0.0, sight=0.6), **FAST)) for seed in range(20)]
    verdicts = [row.verdict for row in rows]
    assert "leaks" not in verdicts and "both" not in verdicts
    assert verdicts.count("sees") >= 12  # the rest: leak not yet shown absent, or K- by chance at 5%
    assert np.mean([row.sight_low for row in rows]) > 0.3
    assert abs(np.mean([row.leak for row in rows])) < 0.02 and all(
        "no leak beyond 0.05" in row.why for row in rows if row.verdict == "sees"
    )


def test_both_neither_and_too_few() -> None:
    assert only(judge_leakage(world(0, 60, leak=0.4, sight=0.4), **FAST)).verdict == "both"
    row = only(judge_leakage(world(1, 200, leak=0.0, sight=0.0), **FAST))
    assert row.verdict == "neither" and "no leak beyond 0.05" in row.why and "no sight beyond 0.05" in row.why
    few = only(judge_leakage(world(2, 12, leak=0.0, sight=0.0), **FAST))
    assert few.verdict == "inconclusive" and few.leak_detectable > 0.1
    assert f"leak unclear: {few.leak:.3f}" in few.why and f"{few.leak_detectable:.3f} could have been found" in few.why
    # sight is found, a leak is neither found nor excluded: nothing is said
    assert only(judge_leakage(world(3, 12, leak=0.0, sight=0.8), **FAST)).verdict == "inconclusive"


def test_outputs_that_are_all_alike_prove_nothing_in_a_handful_of_images() -> None:
    texts = world(0, 8, 0.0, 0.0)
    texts.loc[texts.control == "", "output"] = ""
    row = only(judge_leakage(texts, **FAST))
    assert (row.leak, row.leak_low, row.leak_high) == (0, 0, 0) and row.verdict == "inconclusive"


def test_what_is_smaller_than_the_margin_is_not_called_a_leak() -> None:
    found = judge_leakage(world(0, 60, leak=0.6, sight=0.0), margin=0.6, **FAST)
    row = only(found)
    assert row.leak_p_holm < 0.01 and row.leak_low > 0.3 and row.leak_high < 0.6
    assert row.verdict == "neither" and "no leak beyond 0.6" in row.why


def test_shuffled_outputs_lose_what_was_there() -> None:
    texts = world(0, 200, leak=0.4, sight=0.4)
    asked = texts.control == ""
    assert only(judge_leakage(texts, **FAST)).verdict == "both"
    shuffled = texts.copy()
    order = np.random.default_rng(0).permutation(200)
    for seed in range(3):  # one permutation for all projectors
        mine = asked & (texts.seed == seed)
        shuffled.loc[mine, "output"] = texts.loc[mine, "output"].to_numpy()[order]
    assert only(judge_leakage(shuffled, **FAST)).verdict == "neither"


def test_nothing_planted_is_found_at_most_as_often_as_alpha_says() -> None:
    """Family-wise over three sites, controls in order: Holm and the permutation test together."""
    rng = np.random.default_rng(0)
    runs, found = 30, {"leak": 0, "sight": 0}
    for _ in range(runs):
        scenes = [tuple(int(k) for k in rng.integers(6, size=3)) for _ in range(16)]
        rows = [row for site in "abc" for row in cell(rng, scenes, 0.0, 0.0, 2, site=site)]
        table = judge_leakage(pd.DataFrame(rows), n_permutations=199, n_resamples=20).table
        for score in found:
            found[score] += bool((table[table.score == score].found == "yes").any())
    assert max(found.values()) <= 5  # of 30 at 5%: more than 5 three times in 1000


def test_permutation_p_is_uniform_where_nothing_is_planted() -> None:
    rng = np.random.default_rng(0)
    p = np.array([permutation_p(rng.normal(size=(14, 14)) + rng.normal(size=(14, 1)), 199, seed=k) for k in range(800)])
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / 800)


# --- planted in the drawn world -------------------------------------------------------------------

PLANTED = 120
Writer = Callable[[shapes.Scene, shapes.Scene, np.random.Generator], str]  # image, fed scene -> output


def listed(scene: shapes.Scene, kept: Sequence[int] | None = None) -> str:
    return shapes.caption(scene, "list", None if kept is None else list(kept)).text


def guess(rng: np.random.Generator, n_objects: int | None = None) -> shapes.Scene:
    return shapes.random_scene(77, int(rng.integers(10**6)), "test", n_objects)


def coloured(scene: shapes.Scene, colour: str) -> shapes.Scene:
    return replace(scene, objects=(replace(scene.objects[0], colour=colour), *scene.objects[1:]))


def chosen_by(image: shapes.Scene, fed: shapes.Scene) -> str:
    """True things alone: the objects of the image whose colour or shape the prompt names; all where it names none."""
    words = set(listed(fed).split())
    kept = [i for i, o in enumerate(image.objects) if {o.colour, o.shape} & {w.strip(",") for w in words}]
    return " and ".join(f"a {image.objects[i].colour} {image.objects[i].shape}" for i in kept or range(len(image.objects)))


def turned(fed: shapes.Scene, rng: np.random.Generator) -> str:
    """Always the same words, the world's colours; those that the prompt has too stand in the prompt's order."""
    said = list(rng.permutation(list(shapes.COLOURS)))
    named = iter(dict.fromkeys(o.colour for o in fed.objects))
    there = {o.colour for o in fed.objects}
    return " ".join(next(named) if colour in there else colour for colour in said)


PLANTS: dict[str, tuple[Writer, str]] = {
    "a perfect seer that never sees the prompt": (lambda image, fed, rng: listed(image), "sees"),
    "true things alone, of which the prompt chooses": (
        lambda image, fed, rng: chosen_by(image, fed),
        "sees, steered by the prompt",
    ),
    "blind, reads the number of objects": (lambda image, fed, rng: listed(guess(rng, len(fed.objects))), "leaks"),
    "blind, reads one colour": (lambda image, fed, rng: listed(coloured(guess(rng), fed.objects[0].colour)), "leaks"),
    "blind, reads an order": (lambda image, fed, rng: turned(fed, rng), "leaks"),
    "blind, reads one prompt in ten": (lambda image, fed, rng: listed(fed if rng.random() < 0.1 else guess(rng)), "leaks"),
    "blind, reads nothing": (lambda image, fed, rng: listed(guess(rng)), "neither"),
    "sees, reads everything too": (lambda image, fed, rng: f"{listed(image)} and {listed(fed)}", "both"),
}


def planted(write: Writer, seed: int, n: int = PLANTED) -> pd.DataFrame:
    """Three projectors that write by a rule about drawn scenes, with K- that guesses and K+ that reads all."""
    rng = np.random.default_rng(seed)
    scenes = [shapes.random_scene(seed, index, "test") for index in range(n)]
    cells: list[tuple[dict[str, Any], Writer]] = [
        ({"control": "", "site": "up"}, write),
        ({"control": "K-", "site": "first"}, PLANTS["blind, reads nothing"][0]),
        ({"control": "K+", "site": "text"}, lambda image, fed, rng: listed(fed)),
    ]
    rows = []
    for (key, rule), projector, i in itertools.product(cells, range(3), range(n)):
        other = (i + 1) % n  # scenes are independent, so any derangement is a random one
        references = [shapes.caption(scenes[i], style).text for style in shapes.CAPTION_STYLES]
        fed = listed(scenes[other])
        texts = {"fed": fed, "references": [r for r in references if r != fed], "output": rule(scenes[i], scenes[other], rng)}
        place = {"arm": "M", "timestep": 50, "guidance": 4.0, "condition": "mismatched", "seed": projector}
        rows.append({**place, **key, "sample": f"image {i}", "source": f"image {other}", **texts})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_is_what_the_verdict_says(name: str) -> None:
    write, expected = PLANTS[name]
    row = only(judge_leakage(planted(write, 0, 300 if expected == "neither" else PLANTED), n_permutations=999, n_resamples=20))
    assert row.verdict == expected, row.why
    if expected.startswith("sees"):
        assert (row.leak, row.leak_low, row.leak_high) == (0, 0, 0)  # what is true is no leak, whoever chose it


def test_a_dose_says_how_small_a_leak_is_found() -> None:
    found = judge_leakage(planted(PLANTS["blind, reads nothing"][0], 0), n_permutations=99, n_resamples=20)
    doses = found.doses.set_index("dose")
    assert doses.power.is_monotonic_increasing and doses.power[1.0] == 1 and doses.power[0.02] < 0.2
    assert doses.value[0.5] == pytest.approx(doses.value[1.0] / 2, abs=0.05)
    assert doses.power[0.1] > 0.5  # what reads one prompt in ten whole is usually found
    assert f"a leak of {only(found).leak_detectable:.3f} is found in 80%" in sentence(only(found))


def test_a_hard_mismatch_counts_where_it_was_tried() -> None:
    """A model that reads only prompts which nearly fit its image."""
    seer, reader = (
        planted(PLANTS[name][0], 1) for name in ("a perfect seer that never sees the prompt", "sees, reads everything too")
    )
    hard = reader[reader.control == ""].assign(condition="mismatched_hard")
    assert only(judge_leakage(seer, n_permutations=399, n_resamples=20)).verdict == "sees"
    row = only(judge_leakage(pd.concat([seer, hard]), n_permutations=399, n_resamples=20))
    assert row.verdict == "both" and "leak (hard)" in row.why


# --- controls -------------------------------------------------------------------------------------


def test_no_verdict_without_controls_in_order() -> None:
    leaking = only(judge_leakage(world(0, 60, leak=0.6, sight=0.0, negative=0.4), **FAST))
    assert leaking.verdict == "no verdict" and leaking.why.startswith("K- leaks (leak 0.")
    deaf = only(judge_leakage(world(0, 60, leak=0.0, sight=0.6, positive=0.0), **FAST))
    assert deaf.verdict == "no verdict" and deaf.why.startswith("K+ fails (leak ")
    texts = world(0, 60, leak=0.6, sight=0.0)
    for control in ("K-", "K+"):
        row = only(judge_leakage(texts[texts.control != control], **FAST))
        assert row.verdict == "no verdict" and row.why.startswith(f"{control} was not run") and np.isnan(row["index"])
    without = texts[texts.control == ""].drop(columns="control")
    assert only(judge_leakage(without, **FAST)).why.startswith("K- was not run")


def test_a_control_serves_the_cells_it_names() -> None:
    rng = np.random.default_rng(0)
    scenes = [tuple(int(k) for k in rng.integers(6, size=3)) for _ in range(50)]
    rows = cell(rng, scenes, 0.6, 0.0, arm="M") + cell(rng, scenes, 0.6, 0.0, arm="X")
    rows += cell(rng, scenes, 0.9, 0.0, control="K+", arm="", site="text", timestep=None, guidance=None)
    rows += cell(rng, scenes, 0.0, 0.3, control="K-", arm="", site="first", timestep=None, guidance=None)
    rows += cell(rng, scenes, 0.5, 0.3, control="K-", arm="X", site="first")  # arm X has one of its own, which leaks
    verdicts = judge_leakage(pd.DataFrame(rows), **FAST).verdicts.set_index("arm").verdict
    assert verdicts.to_dict() == {"M": "leaks", "X": "no verdict"}
    other = [{**row, "arm": "M", "guidance": 1.0} if row["control"] == "K-" and row["arm"] == "" else row for row in rows]
    assert judge_leakage(pd.DataFrame(other), **FAST).verdicts.set_index("arm").why["M"].startswith("K- was not run")


# --- the table ------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_loop() -> None:
    texts = world(0, 20, leak=0.4, sight=0.3)
    asked = texts[texts.control == ""]
    table = judge_leakage(texts, **FAST).table
    expected: dict[str, list[float]] = {"leak": [], "sight": []}
    for seed in range(3):
        part = asked[asked.seed == seed].reset_index(drop=True)
        for i, row in part.iterrows():
            if json.loads(row.references):
                told = [j for j in part.index if json.loads(part.references[j])]
                false = {j: " ".join(set(part.fed[j].split()) - set(row.references.strip('[]"').split())) for j in told}
                similar = {j: content_f1([row.output], [[false[j]]])[0, 0] for j in told if content_words(false[j])}
                others = [similar[j] for j in similar if j != i and part.source[j] != row["sample"]]
                expected["leak"].append(similar[i] - np.mean(others) if i in similar else 0)
                seen = {
                    j: content_f1([row.output], [json.loads(part.references[j])])[0, 0]
                    for j in part.index
                    if json.loads(part.references[j])
                }
                others = [value for j, value in seen.items() if j != i and part["sample"][j] != row.source]
                expected["sight"].append(seen[i] - np.mean(others))
    rows = table[table.control == ""].set_index("score")
    for score, values in expected.items():
        assert rows.value[score] == pytest.approx(np.mean(values))
        assert rows.text[score] - rows.chance[score] == pytest.approx(rows.value[score])


def test_every_condition_has_the_scores_that_its_texts_allow() -> None:
    rng = np.random.default_rng(0)
    scenes = [tuple(int(k) for k in rng.integers(6, size=3)) for _ in range(30)]
    texts = world(0, 30, leak=0.5, sight=0.0)
    unfed = [{**row, "fed": "", "source": ""} for row in cell(rng, scenes, 0.0, 0.5, condition="none")]
    unseen = [{**row, "references": []} for row in cell(rng, scenes, 0.5, 0.0, condition="random_words")]
    found = judge_leakage(pd.concat([texts, pd.DataFrame(unfed + unseen)]), **FAST)
    scores = found.table[found.table.control == ""].groupby("condition").score.apply(list).to_dict()
    assert scores == {
        "mismatched": ["leak", "leak_order", "steering", "sight"],
        "none": ["sight"],
        "random_words": ["leak", "leak_count", "leak_order"],
    }
    assert only(found).condition == "mismatched"
    row = found.table[(found.table.condition == "none") & (found.table.score == "sight")].iloc[0]
    assert row.found == "yes" and row.p == row.p_holm


def test_holm_runs_over_the_cells_of_one_arm_and_score() -> None:
    rng = np.random.default_rng(0)
    scenes = [tuple(int(k) for k in rng.integers(6, size=3)) for _ in range(20)]
    rows = [
        row
        for arm, site, s in itertools.product("MX", "ab", (1.0, 4.0))
        for row in cell(rng, scenes, 0.08, 0.0, 2, arm=arm, site=site, guidance=s)
    ]
    table = judge_leakage(pd.DataFrame(rows), **FAST).table
    kinds = table.score.where(~table.score.isin(["leak", "leak_count", "leak_order"]), "leak")
    for (_, kind), family in table.groupby(["arm", kinds]):
        assert len(family) == (8 if kind == "leak" else 4)  # words and order; these texts name no number
        np.testing.assert_allclose(family.p_holm, holm(family.p))
        assert (family.detectable >= np.maximum(family.margin, family.value - family.low)).all()
    assert (table.p_holm >= table.p).all() and (table.p_holm > table.p).any()


def test_a_table_survives_a_csv_file() -> None:
    texts = pd.concat(
        [
            world(0, 20, 0.5, 0.2),
            pd.DataFrame(cell(np.random.default_rng(0), [(0, 0, 0), (1, 1, 1)], 0, 0, condition="none", fed="")),
        ]
    )
    texts.loc[texts.condition == "none", ["fed", "source"]] = ""
    texts.iloc[0, texts.columns.get_loc("output")] = ""
    again = pd.read_csv(io.StringIO(texts.to_csv(index=False)))
    one, other = judge_leakage(texts, **FAST), judge_leakage(again, **FAST)
    pd.testing.assert_frame_equal(one.verdicts, other.verdicts, check_dtype=False)


def test_other_scripts_and_other_similarities() -> None:
    russian = {"red": "красный", "blue": "синий", "star": "звезда", "left": "слева", "circle": "круг", "top": "сверху"}
    texts = world(0, 40, leak=0.6, sight=0.0)
    for column in ("fed", "output", "references"):
        for word, translated in russian.items():
            texts[column] = texts[column].str.replace(word, translated)
    assert only(judge_leakage(texts, **FAST)).verdict == "leaks"
    texts = world(0, 24, leak=0.6, sight=0.0)
    frequencies = document_frequencies("scenes", [json.loads(r) or ["none"] for r in texts.references])
    row = only(judge_leakage(texts, cider_similarity(frequencies), margin=0.5, **FAST))
    assert row.verdict == "leaks" and row.leak > 0.5 and row.margin == 0.5


def test_what_is_wrong_with_a_table_is_named() -> None:
    texts = world(0, 12, 0.5, 0.0)
    cases = {
        "output missing": texts.drop(columns="output"),
        "the table is empty": texts.iloc[:0],
        "Column 'condition' has 'wrong'": texts.assign(condition="wrong"),
        "Column 'control' has 'K0'": texts.assign(control="K0"),
        "sample 'image 0' of seed 0 stands twice": pd.concat([texts, texts.iloc[:1]]),
        r"rows by seed are \{0: 11, 1: 12, 2: 12\} of 12 samples": texts.iloc[1:],
        "is among its references; leave it out": texts.assign(references=[json.dumps([fed.upper()]) for fed in texts.fed]),
        "There are no texts of condition 'mismatched'; found own": texts.assign(condition="own"),
        "there is nothing to judge": texts.assign(fed=""),
        "fewer than two samples with a fed text": texts.assign(fed="", references="[]"),
    }
    for message, broken in cases.items():
        with pytest.raises(ValueError, match=message):
            judge_leakage(broken, **FAST)
    with pytest.raises(ValueError, match="condition mismatched or random_words; got 'own'"):
        judge_leakage(texts, condition="own")  # there who sees and who reads write the same
    with pytest.raises(ValueError, match="`margin` must be positive"):
        judge_leakage(texts, margin=0)
    assert set(COLUMNS) <= set(texts)


# --- statistics -----------------------------------------------------------------------------------


def test_permutation_p_agrees_with_every_permutation() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        matrix = rng.normal(size=(5, 5)) + 0.5 * np.eye(5)
        sums = [matrix[range(5), order].sum() for order in itertools.permutations(range(5))]
        exact = np.mean(np.array(sums) >= np.trace(matrix) - 1e-9)
        assert permutation_p(matrix, 9999) == pytest.approx(exact, abs=0.015)
    assert permutation_p(np.zeros((6, 6)), 99) == 1.0


def test_one_seed_is_students_interval_over_images() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, (1, 30))
    found = crossed_mean(values)
    oracle = ttest_1samp(values[0], 0).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((oracle.low, oracle.high))
    for margin in (0.1, 0.5, 1.0):
        upper, lower = (
            ttest_1samp(values[0], margin, alternative="less"),
            ttest_1samp(values[0], -margin, alternative="greater"),
        )
        assert equivalence_p(found["value"], found["se"], found["df"], margin) == pytest.approx(max(upper.pvalue, lower.pvalue))


@pytest.mark.parametrize("number", [52, 199, *range(20)])  # the first two lie where each term decides a degree of freedom
def test_the_two_way_layout_is_that_of_an_analysis_of_variance(number: int) -> None:
    rng = np.random.default_rng(number)
    values = rng.normal(size=(4, 9)) + 0.6 * rng.normal(size=(1, 9)) + 0.3 * rng.normal(size=(4, 1))
    mean, total = values.mean(), ((values - values.mean()) ** 2).sum()
    image = sum(4 * (column.mean() - mean) ** 2 for column in values.T)
    seed = sum(9 * (row.mean() - mean) ** 2 for row in values)
    squares = {"image": (image, 8), "seed": (seed, 3), "rest": (total - image - seed, 24)}
    means = {name: of / free for name, (of, free) in squares.items()}
    variance = means["image"] + max(0.0, means["seed"] - means["rest"])
    df = int(variance**2 / sum(means[name] ** 2 / free for name, (_, free) in squares.items()))  # Satterthwaite's
    found = crossed_mean(values)
    assert (found["value"], found["se"]) == pytest.approx((mean, np.sqrt(variance / 36))) and found["df"] == max(3, df)


@pytest.mark.parametrize(("image", "seed"), [(0.0, 0.0), (0.7, 0.0), (0.5, 0.1), (0.3, 1.0)])
def test_intervals_cover_other_images_and_other_projectors(image: float, seed: float) -> None:
    rng = np.random.default_rng(0)
    runs, covered, naive = 400, 0, 0
    for _ in range(runs):
        values = rng.normal(0, image, (1, 40)) + rng.normal(0, seed, (3, 1)) + rng.normal(size=(3, 40))
        found = crossed_mean(values)
        covered += found["low"] <= 0 <= found["high"]
        se = values.std(ddof=1) / np.sqrt(values.size)
        naive += abs(values.mean()) < 1.96 * se
    assert covered / runs > 0.92
    if seed == 1.0:
        assert naive / runs < 0.5  # rows are not independent


def test_the_index_lies_between_its_controls_and_is_resampled_jointly() -> None:
    rng = np.random.default_rng(0)
    names = [f"image {i}" for i in range(300)]
    shared = rng.normal(0, 0.5, 300)  # images that are easy to read are so everywhere
    low, middle, high = (
        pd.DataFrame(mean + shared * slope + 0.05 * rng.normal(size=(3, 300)), columns=names)
        for mean, slope in ((0, 0), (0.3, 0.5), (0.6, 1))
    )
    found = normalised_index(middle, low, high)
    assert found["index"] == pytest.approx(0.5, abs=0.02) and found["index_low"] < 0.5 < found["index_high"]
    assert found["index_high"] - found["index_low"] < 0.06
    # resampled apart, the two would differ; the same images give the same ratio
    one = high.iloc[:1]
    same = normalised_index(one, low.iloc[:1] * 0, one)
    assert (same["index"], same["index_low"], same["index_high"]) == pytest.approx((1, 1, 1))
    assert np.isnan(normalised_index(middle, high, low)["index"])  # K+ below K-
    assert np.isnan(normalised_index(middle, low, high.rename(columns=str.upper))["index"])  # no image in common
    wobbly = high + np.array([[-0.3], [0.0], [0.3]])  # projectors that differ
    assert normalised_index(middle, low, wobbly)["index_high"] - found["index_low"] > 0.15


@pytest.mark.parametrize("spread", [[-0.1, 0.1], [-0.3, 0.0, 0.3]])
def test_the_index_knows_the_whole_variance_of_its_seeds(spread: list[float]) -> None:
    """A bootstrap of R seeds has (R - 1) / R of their variance: its deviations are stretched by sqrt(R / (R - 1))."""
    images = [f"image-{k}" for k in range(6)]
    leak = pd.DataFrame([[0.5 + one] * 6 for one in spread], columns=images)
    zero, one = (pd.DataFrame([[value] * 6], columns=images) for value in (0.0, 1.0))
    found, reach = normalised_index(leak, zero, one), spread[-1] * np.sqrt(len(spread) / (len(spread) - 1))
    assert found["index"] == pytest.approx(0.5)
    assert (found["index_low"], found["index_high"]) == pytest.approx(
        (0.5 - reach, 0.5 + reach)
    )  # all draws the lowest seed: 4% or 25%


# --- without decoding -----------------------------------------------------------------------------


def test_ranks_agree_with_a_loop() -> None:
    rng = np.random.default_rng(0)
    conditional, blank, fed = rng.integers(-8, 0, (40, 12)).astype(float), rng.normal(size=12), rng.integers(0, 12, 40)
    top, reciprocal, bits = [], [], []
    for row, own in zip(conditional, fed, strict=True):
        gain = [float(a - b) for a, b in zip(row, blank, strict=True)]
        others = [g for k, g in enumerate(gain) if k != own]
        top.append(all(gain[own] > g for g in others))
        reciprocal.append(1 / (1 + sum(g > gain[own] for g in others) + sum(g == gain[own] for g in others) / 2))
        bits.append(np.log2(12 * np.exp(gain[own]) / sum(np.exp(gain))))
    rows = rank_fed(conditional, blank, fed).set_index("score")
    assert rows.value.to_dict() == pytest.approx({"top1": np.mean(top), "mrr": np.mean(reciprocal), "bits": np.mean(bits)})
    assert (rows.n == 40).all() and (rows.n_candidates == 12).all()


def test_ranks_find_a_planted_text_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.normal(size=(600, 100))
    none = rank_fed(noise, np.zeros(100)).set_index("score")
    assert none.chance.to_dict() == pytest.approx({"top1": 0.01, "mrr": np.sum(1 / np.arange(1, 101)) / 100, "bits": 0})
    assert ((none.low < none.chance) & (none.chance < none.high + 0.02)).all()
    planted = noise.copy()
    planted[:, 0] += 1000  # and no overflow
    found = rank_fed(planted, np.zeros(100)).set_index("score")
    assert found.value.to_dict() == pytest.approx({"top1": 1, "mrr": 1, "bits": np.log2(100)})
    # likely texts are likely without features too: blank likelihoods take that away
    prior = np.zeros(100)
    prior[0] = 50
    assert rank_fed(noise + prior, prior).value[0] < 0.05 and rank_fed(noise + prior, np.zeros(100)).value[0] == 1
    # features that no text has reached: all candidates tie, which is no hit
    tied = rank_fed(np.zeros((5, 100)), np.zeros(100)).set_index("score").value
    assert tied["top1"] == 0 and tied["mrr"] == pytest.approx(1 / 50.5) and abs(tied["bits"]) < 1e-12
    clustered = rank_fed(np.repeat(noise[:30], 20, axis=0), np.zeros(100), clusters=np.repeat(np.arange(30), 20)).set_index(
        "score"
    )
    plain = rank_fed(np.repeat(noise[:30], 20, axis=0), np.zeros(100)).set_index("score")
    assert (clustered.high - clustered.low)["bits"] > 2 * (plain.high - plain.low)["bits"]
    with pytest.raises(ValueError, match=r"got \(5, 100\) and \(5,\)"):
        rank_fed(np.zeros((5, 100)), np.zeros(5))
    with pytest.raises(ValueError, match="1 of 10 log-likelihoods are not finite"):
        rank_fed([[0, 0, 0, 0, -np.inf], [0] * 5], np.zeros(5))


def test_candidates_are_of_nearly_the_same_length_and_all_different() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefg"), rng.integers(1, 12))) for _ in range(150)]
    texts[7] = texts[3].upper()  # the same words
    chosen = matched_candidates(texts, n=20)
    assert chosen.shape == (150, 20) and (chosen[:, 0] == np.arange(150)).all()
    lengths = np.array([len(text.split()) for text in texts])
    for row in chosen:
        assert len({texts[k].lower() for k in row}) == 20
    gap = np.abs(lengths[chosen] - lengths[:, None])
    assert gap.mean() < 1 < np.abs(lengths[:, None] - lengths[None]).mean()
    assert (np.diff(gap[:, 1:], axis=1) >= 0).all()
    by_tokens = matched_candidates(["a", "b c", "d e f"], n=2, lengths=[5, 1, 6])
    assert by_tokens[0].tolist() == [0, 2]
    with pytest.raises(ValueError, match="Text 0 has 1 different others; 3 candidates need 2"):
        matched_candidates(["a", "A", "b"], n=3)


def test_usable_information_is_the_information_of_a_known_channel() -> None:
    """A word out of four; conditional features show it right with 0.7, unconditional ones not at all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 9, 800)
    conditional = np.array([np.log(np.where(rng.random(k) < 0.7, 0.7, 0.1)).sum() for k in tokens])
    unconditional = tokens * np.log(1 / 4)
    truth = 2 + 0.7 * np.log2(0.7) + 3 * 0.1 * np.log2(0.1)
    row = usable_information(conditional, unconditional, tokens).iloc[0]
    assert row.low < truth < row.high and row.p < 0.001 and row.n_tokens == tokens.sum()
    assert row.value == pytest.approx((conditional - unconditional).sum() / np.log(2) / tokens.sum())
    nothing = usable_information(unconditional + rng.normal(size=800), unconditional, tokens).iloc[0]
    assert nothing.low < 0 < nothing.high and nothing.p > 0.01
    images = np.repeat(np.arange(100), 8)
    wide, narrow = (
        usable_information(
            np.repeat(conditional[:100], 8), np.repeat(unconditional[:100], 8), np.repeat(tokens[:100], 8), clusters=c
        ).iloc[0]
        for c in (images, None)
    )
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    with pytest.raises(ValueError, match="at least one token"):
        usable_information([-1.0], [-2.0], [0])
