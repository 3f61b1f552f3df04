"""Strict protocols against plain loops, intervals against their definitions, a planted map that is found.

The oracles are written case by case, with `if`s, as the benchmarks' papers word them.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.stats import binomtest
from sklearn.linear_model import Ridge

from diffprobe.data.twins import PATTERNS
from diffprobe.probes.alignment import (
    PROTOCOLS,
    alignment_table,
    compare_scores,
    fit_text_map,
    group_right,
    images_right,
    item_hits,
    protocol_metrics,
    texts_right,
)
from diffprobe.stats import wilson_interval
from experiments.framework import Result, find_experiments, load_experiment
from experiments.tab_alignment import concentration

NAN = math.nan
EXPERIMENT = load_experiment(find_experiments(["tab_alignment"])[0])


def naive_winoground(s: Any) -> tuple[bool, bool, bool]:
    """Text, image and group score of one item; s[image][text]."""
    text = bool(s[0][0] > s[0][1] and s[1][1] > s[1][0])
    image = bool(s[0][0] > s[1][0] and s[1][1] > s[0][1])
    return text, image, text and image


CASES = [
    # scores[image][text], text, image, group
    ([[0.9, 0.1], [0.2, 0.8]], True, True, True),
    ([[0.9, 0.1], [0.95, 0.97]], True, False, False),  # image 1 is liked better by both texts
    ([[0.9, 0.95], [0.2, 0.97]], False, True, False),
    ([[0.5, 0.5], [0.2, 0.8]], False, True, False),  # a tie between texts
    ([[0.5, 0.1], [0.5, 0.8]], True, False, False),  # between images
    ([[0.5, 0.5], [0.5, 0.5]], False, False, False),
    ([[NAN, 0.1], [0.2, 0.8]], False, False, False),  # an own score that is no number loses both choices
    ([[0.9, NAN], [0.2, 0.8]], False, False, False),  # ... and a rival that is none is not beaten
    ([[math.inf, 0.1], [0.2, math.inf]], False, False, False),
    ([[0.1, 0.9], [0.8, 0.2]], False, False, False),
]


@pytest.mark.parametrize(("scores", "text", "image", "group"), CASES)
def test_cases_written_by_hand(scores: list[list[float]], text: bool, image: bool, group: bool) -> None:
    array = np.array([scores])
    assert (texts_right(array)[0], images_right(array)[0], group_right(array)[0]) == (text, image, group)


def test_random_scores_with_ties_and_gaps_agree_with_loops() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (400, 2, 2)).astype(float)
    scores[rng.random(scores.shape) < 0.05] = NAN
    expected = np.array([naive_winoground(s) for s in scores])
    assert 0 < expected[:, 2].sum() < 400
    for column, right in enumerate((texts_right, images_right, group_right)):
        np.testing.assert_array_equal(right(scores), expected[:, column])


def test_one_image_and_several_texts() -> None:
    scores = np.array([[[0.9, 0.1, 0.3]], [[0.9, 0.1, 0.9]], [[0.2, 0.1, 0.9]]])
    assert texts_right(scores).tolist() == [True, False, False]


def as_dataset(values: dict[str, np.ndarray], patterns: list[str]) -> xr.Dataset:
    dims = ("item", "image", "text", "timestep", "draw")
    ids = [f"i{k}" for k in range(len(patterns))]
    return xr.Dataset(
        {name: (dims[: v.ndim], v) for name, v in values.items()} | {"done": ("item", np.ones(len(ids)))},
        {"item": ids, "pattern": ("item", patterns)},
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_chance_is_what_random_scores_reach(protocol: str) -> None:
    images = 1 if protocol == "sugarcrepe" else 2
    scores = np.random.default_rng(1).random((4000, images, 2))
    frame = alignment_table(as_dataset({"random": scores}, ["p"] * 4000), protocol).set_index("metric")
    for name, metric in protocol_metrics(protocol).items():
        assert frame.loc[name, "chance"] == metric.chance
        assert binomtest(round(frame.loc[name, "value"] * 4000), 4000, metric.chance).pvalue > 1e-3


def test_planted_matches_are_found_and_image_bias_is_not_rewarded() -> None:
    rng = np.random.default_rng(2)
    planted = np.eye(2) + rng.normal(0, 0.1, (60, 2, 2))
    biased = planted + np.array([0.0, 5.0])[None, :, None]  # one image that every text prefers
    frame = alignment_table(as_dataset({"planted": planted, "biased": biased}, ["p"] * 60), "mmvp-vlm").set_index("score")
    assert frame.loc["planted", "value"] == 1 and frame.loc["biased", "value"] == 0


def test_table_against_loops() -> None:
    rng = np.random.default_rng(3)
    patterns = ["colour"] * 30 + ["text"] * 10
    scores = rng.integers(0, 3, (40, 2, 2)).astype(float)
    frame = alignment_table(as_dataset({"s": scores}, patterns), "winoground", seed=5)
    assert list(frame.columns) == ["score", "metric", "pattern", "value", "low", "high", "n", "chance", "seed"]
    assert len(frame) == 3 * 4 and set(frame["seed"]) == {5}
    expected = np.array([naive_winoground(s) for s in scores])
    for column, metric in enumerate(("text", "image", "group")):
        rows = frame[frame["metric"] == metric].set_index("pattern")
        parts = {"all": slice(None), "colour": slice(0, 30), "text": slice(30, None)}
        for pattern, part in parts.items():
            right = expected[part, column]
            interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
            row = rows.loc[pattern]
            assert row["n"] == len(right) and row["value"] == pytest.approx(right.mean())
            assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
        macro = rows.loc["macro"]
        assert macro["value"] == pytest.approx((expected[:30, column].mean() + expected[30:, column].mean()) / 2)
        assert macro["low"] < macro["value"] < macro["high"] and macro["n"] == 40


def test_macro_of_items_that_are_all_right_has_the_interval_of_the_items() -> None:
    frame = alignment_table(as_dataset({"s": np.stack([np.eye(2)] * 8)}, ["a"] * 4 + ["b"] * 4), "mmvp-vlm").set_index(
        "pattern"
    )
    assert tuple(frame.loc["macro", ["value", "low", "high"]]) == pytest.approx((1, *wilson_interval(8, 8)))


def test_draws_are_averaged() -> None:
    """The mean over draws decides: single draws disagree with it, and so would any one of them alone."""
    scores = np.random.default_rng(4).normal(size=(60, 2, 2, 3, 2))
    hits = item_hits(as_dataset({"s": scores}, ["p"] * 60), "winoground")["s"]
    means = item_hits(as_dataset({"s": scores.mean((3, 4))}, ["p"] * 60), "winoground")["s"]
    first = item_hits(as_dataset({"s": scores[..., 0, 0]}, ["p"] * 60), "winoground")["s"]
    assert (hits == means).all() and not (hits == first).all()
    assert hits["pattern"].values.tolist() == ["p"] * 60


def test_equal_scores_stay_equal_when_pooled() -> None:
    """A tie is a miss; rounding must not turn one into a win."""
    draws = np.random.default_rng(5).normal(size=(200, 1, 1, 3, 5))
    scores = np.broadcast_to(draws, (200, 2, 2, 3, 5)).copy()
    scores[:, 0, 0] += 1  # text 0 is clear, for text 1 both images are alike
    hits = item_hits(as_dataset({"s": scores}, ["p"] * 200), "mmvp-vlm")["s"]
    assert not hits.any()


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(6)
    good, base = np.eye(2) + rng.normal(0, 0.45, (80, 2, 2)), rng.normal(size=(80, 2, 2))
    data = as_dataset({"good": good, "base": base, "same": base}, ["p"] * 80)
    frame = compare_scores(data, "winoground", "base", seed=1)
    assert set(frame["score"]) == {"good", "same"} and len(frame) == 6
    hits = {name: np.array([naive_winoground(s) for s in v]) for name, v in (("good", good), ("base", base))}
    for column, metric in enumerate(("text", "image", "group")):
        row = frame[(frame["score"] == "good") & (frame["metric"] == metric)].iloc[0]
        difference = hits["good"][:, column].astype(float) - hits["base"][:, column]
        assert row["value"] == pytest.approx(difference.mean()) and row["n"] == 80
        assert 0 < row["low"] < row["value"] < row["high"] and row["p"] <= row["p_holm"] < 0.01
        none = frame[(frame["score"] == "same") & (frame["metric"] == metric)].iloc[0]
        assert (none["value"], none["p"]) == (0, 1)


def test_errors_say_what_there_is() -> None:
    data = as_dataset({"s": np.zeros((2, 1, 2))}, ["p"] * 2)
    with pytest.raises(ValueError, match="Protocol 'mmvp' is not one of mmvp-vlm, winoground, sugarcrepe"):
        alignment_table(data, "mmvp")
    with pytest.raises(ValueError, match="cannot score items of 1 images and 2 texts"):
        alignment_table(data, "winoground")
    with pytest.raises(ValueError, match="no scores over item, image, text; found done"):
        alignment_table(data[["done"]], "sugarcrepe")
    with pytest.raises(ValueError, match="Baseline 'clip' is not one of the scores s"):
        compare_scores(data, "sugarcrepe", "clip")


# --- the learned map ------------------------------------------------------------------------------


def test_map_is_ridge_on_standardised_features() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(3, [1, 5, 0.1, 2], (60, 4)), rng.normal(size=(60, 3))
    found = fit_text_map(x, y)
    standard = (x - x.mean(0)) / x.std(0)
    oracle = Ridge(alpha=found.ridge.alpha_, fit_intercept=False).fit(standard, y - y.mean(0))
    mapped, texts = oracle.predict(standard[:5]), y[5:7] - y.mean(0)
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in texts] for a in mapped]
    np.testing.assert_allclose(found.cosine(x[:5], y[5:7]), expected, rtol=1e-6)


def test_planted_map_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(8)
    direction = rng.normal(size=(6, 5))
    features = rng.normal(size=(300, 6))
    texts = features @ direction + rng.normal(0, 0.3, (300, 5)) + 10  # a common offset, as text embeddings have
    scores: dict[str, list[np.ndarray]] = {"planted": [], "noise": []}
    for name, x in (("planted", features), ("noise", rng.permutation(features))):
        found = fit_text_map(x[:200], texts[:200])
        scores[name] = [found.cosine(x[i : i + 2], texts[i : i + 2]) for i in range(200, 300, 2)]
    data = as_dataset({name: np.stack(values) for name, values in scores.items()}, ["p"] * 50)
    frame = alignment_table(data, "winoground").set_index(["score", "metric"])
    assert frame.loc[("planted", "group"), "value"] > 0.9
    assert frame.loc[("noise", "text"), "low"] < 0.25 < frame.loc[("noise", "text"), "high"]


def test_map_edges() -> None:
    x, y = np.random.default_rng(9).normal(size=(2, 12, 3))
    with pytest.raises(ValueError, match="at least 10 samples"):
        fit_text_map(x[:5], y[:5])
    with pytest.raises(ValueError, match="not finite"):
        fit_text_map(np.where(x > 1, NAN, x), y)
    x[:, 1] = 4.0  # a dead channel
    cosine = fit_text_map(x, y).cosine(x[:2], np.stack([y[0], y.mean(0)]))
    assert np.isfinite(cosine).all() and cosine[0, 1] == 0  # the mean text says nothing


# --- the experiment: verdicts and figure from rows alone --------------------------------------------


def rows_of(pair_hits: dict[str, float], clip: float | None, n: int = 60) -> pd.DataFrame:
    """The experiment's table for planted shares of right pairs."""
    rng = np.random.default_rng(0)
    shares = pair_hits if clip is None else pair_hits | {"clip_cosine": clip}
    scores = {
        name: np.where(rng.permutation(n)[:, None, None] < share * n, np.eye(2), np.eye(2)[::-1])
        for name, share in shares.items()
    }
    data = as_dataset(scores, [PATTERNS[k % len(PATTERNS)] for k in range(n)])
    parts = [alignment_table(data, "mmvp-vlm").assign(kind="score")]
    if clip is not None:
        parts.append(compare_scores(data, "mmvp-vlm", "clip_cosine").assign(kind="difference", pattern="all"))
    return pd.concat(parts).assign(benchmark="shapes-mmvp")


@pytest.mark.parametrize(
    ("ours", "clip", "beats", "above"),
    [
        (0.8, 0.2, "held", "held"),
        (0.1, 0.7, "not held", "not held"),
        (0.3, 0.3, "undecided", "undecided"),
        (0.9, None, "undecided", "held"),
    ],
)
def test_verdicts(ours: float, clip: float | None, beats: str, above: str) -> None:
    planted = dict.fromkeys(("attention_lse_paper", "attention_lse_discffusion", "denoising_loss_normalised"), ours)
    claims = EXPERIMENT.judge(rows_of(planted, clip))
    assert [claim.verdict for claim in claims] == [beats, beats, beats, above]
    assert [claim.id for claim in claims if claim.primary] == ["A7 Discffusion", "A7 loss"]
    assert "n = 60 pairs" in claims[0].evidence and "paper: SD 2.1 .346" in claims[0].evidence
    assert ("no CLIP" in claims[0].evidence) == (clip is None)


def test_an_image_that_wins_for_both_texts_is_counted() -> None:
    """Nine of twelve items have an image that both texts choose; a tie is no choice."""
    same, right, tie = [[2.0, 3.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]
    table = concentration(as_dataset({"planted": np.array([same] * 9 + [right] * 2 + [tie])}, ["a"] * 12)).iloc[0]
    assert (table["value"], table["n"], table["chance"]) == (0.75, 12, 0.5)
    assert table["low"] < 0.75 < table["high"]


def test_figure_shows_every_row_and_the_published_numbers() -> None:
    rows = pd.concat(
        [
            rows_of({"attention_lse_paper": 0.4, "denoising_loss": 0.5}, 0.2),
            sys.modules[EXPERIMENT.measure.__module__].published("shapes-mmvp"),
        ]
    )
    assert rows[rows["kind"] == "paper"].set_index("pattern")["value"]["colour"] == pytest.approx(0.467)
    axis = EXPERIMENT.draw(Result(rows))[""].axes[0]
    assert [label.get_text().split("\n")[0] for label in axis.get_xticklabels()] == ["all", *PATTERNS]
    assert len(axis.get_yticklabels()) == 4 and len(axis.texts) == 4 * 10
    with pytest.raises(ValueError, match="no rows of the scores"):
        EXPERIMENT.draw(Result(rows[rows["kind"] == "nothing"]))
