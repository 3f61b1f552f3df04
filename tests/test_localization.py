"""Localization: scores against scikit-learn, scikit-image, torchmetrics and plain loops; planted maps found, noise at chance."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.stats import ttest_1samp
from skimage.filters import threshold_otsu
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.classification import BinaryJaccardIndex

from diffprobe import plotting, store
from diffprobe.data import Caption, Sample, ShapesDataset, Span
from diffprobe.data.images import fit_masks
from diffprobe.figures import draw_localization, plot_localization_grid, plot_localization_heads
from diffprobe.probes.grounding import (
    attention_localization,
    difference_localization,
    difference_maps,
    word_targets,
)
from diffprobe.probes.localization import SCORES, THRESHOLDS, enlarge, localization_score
from diffprobe.stats import bootstrap_sums, holm
from diffprobe.store import ArraySpec, StoreError, open_store
from experiments import figures

SIZE = (12, 18)


def blob(y: float, x: float, size: tuple[int, int] = SIZE, width: float = 2.0) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2)).astype(np.float32)


def as_maps(values: np.ndarray, **coords: Any) -> xr.DataArray:
    return xr.DataArray(values, dims=("row", *coords, "y", "x"), coords=coords)


def random_masks(n: int, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Rectangles of random place and size."""
    rng, masks = np.random.default_rng(seed), np.zeros((n, *size), bool)
    for mask in masks:
        y, x = rng.integers(size[0] - 4), rng.integers(size[1] - 4)
        mask[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
    return masks


def lines(frame: pd.DataFrame, name: str = "word", **where: Any) -> pd.DataFrame:
    """The lines of one kind of map, by score."""
    for key, value in where.items():
        frame = frame[frame[key] == value]
    return frame[frame["map"] == name].set_index("score")


# --- each score against an oracle -----------------------------------------------------------------


def jaccard(values: np.ndarray, mask: np.ndarray, threshold: float) -> float:
    metric = BinaryJaccardIndex(validate_args=False)
    return float(metric(torch.from_numpy(values > threshold).int(), torch.from_numpy(mask).int()))


def oracle(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """One map and mask, by other people's code or a plain loop."""
    wide = values.astype(np.float64)
    best, hit, total, inside = -np.inf, [], 0.0, 0.0
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            total += wide[y, x]
            inside += wide[y, x] * mask[y, x]
            if wide[y, x] > best:
                best, hit = wide[y, x], []
            if wide[y, x] == best:
                hit.append(mask[y, x])
    low, high = values.min(), values.max()
    return {
        "pointing": float(np.mean(hit)),
        "mass": inside / total,
        "lift": inside / total / mask.mean(),
        "iou_fixed": jaccard(values, mask, float(low + np.float32(0.4) * (high - low))),
        "iou_otsu": jaccard(values, mask, float(threshold_otsu(values))),
        "auc": float(roc_auc_score(mask.ravel(), values.ravel())),
        "ap": float(average_precision_score(mask.ravel(), values.ravel())),
        "nss": float(((wide - wide.mean()) / wide.std())[mask].mean()),
    }


@pytest.mark.parametrize("levels", [0, 6], ids=["continuous", "many ties"])
def test_every_score_equals_its_oracle(levels: int) -> None:
    rng = np.random.default_rng(1)
    maps = rng.gamma(0.7, size=(10, *SIZE)).astype(np.float32)
    masks = random_masks(10)
    maps += masks * rng.random((10, 1, 1)).astype(np.float32)
    if levels:
        maps = np.round(maps * levels / maps.max()).astype(np.float32)
    expected = pd.DataFrame([oracle(m, k) for m, k in zip(maps, masks, strict=True)])
    found = lines(localization_score(as_maps(maps), masks, n_resamples=10))
    for score in expected:
        assert found.loc[score, "value"] == pytest.approx(expected[score].mean(), rel=1e-4, abs=1e-6), score
    assert (found["n"] == 10).all() and found.loc["pointing", "chance"] == pytest.approx(masks.mean())


def test_the_tuned_threshold_comes_from_the_other_half() -> None:
    """Brute force: with two images the halves are one image each, so each is cut where the other one is best."""
    masks = random_masks(2, seed=3)
    maps = np.stack([blob(*np.argwhere(m).mean(0), width=1 + 2 * k) for k, m in enumerate(masks)])
    overlap = np.array(
        [[jaccard(m, k, float(m.min() + s * np.ptp(m))) for s in THRESHOLDS] for m, k in zip(maps, masks, strict=True)]
    )
    expected = np.mean([overlap[1, overlap[0].argmax()], overlap[0, overlap[1].argmax()]])
    assert expected < overlap.max(1).mean() - 0.01, "the two images want different thresholds"
    found = lines(localization_score(as_maps(maps), masks, n_resamples=10)).loc["iou_tuned"]
    assert found["value"] == pytest.approx(expected, abs=1e-6)
    assert found["threshold"] == pytest.approx(THRESHOLDS[overlap.argmax(1)].mean())


def test_enlarging_equals_torch() -> None:
    maps = np.random.default_rng(0).random((3, 5, 7)).astype(np.float32)
    for size in ((20, 21), (5, 7), (3, 30), (1, 1)):
        found = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], size, mode="bilinear", align_corners=False)[0]
        np.testing.assert_allclose(enlarge(maps, size), found.numpy(), atol=1e-6)
    assert enlarge(np.ones((1, 1, 1)), (4, 6)).shape == (1, 4, 6)


def test_small_maps_meet_large_masks() -> None:
    rng = np.random.default_rng(2)
    maps, masks = rng.random((6, 3, 6)).astype(np.float32), random_masks(6)
    small = localization_score(as_maps(maps), masks, n_resamples=10)
    large = localization_score(as_maps(enlarge(maps, SIZE)), masks, n_resamples=10)
    pd.testing.assert_frame_equal(small, large)


# --- planted and noise ----------------------------------------------------------------------------


def planted(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    masks = random_masks(n, seed)
    return np.stack([blob(*np.argwhere(mask).mean(0)) for mask in masks]), masks


def test_a_planted_blob_wins_and_its_controls_do_not() -> None:
    maps, masks = planted(60)
    partner = np.arange(60) ^ 1
    apart = ~(masks & masks[partner]).any((1, 2))
    frame = localization_score(as_maps(maps), masks, controls={"wrong word": np.where(apart, partner, -1)}, n_resamples=200)
    own = lines(frame)
    assert own.loc["pointing", "value"] > 0.9 and own.loc["auc", "value"] > 0.97
    assert (own["low"] > own["chance"]).all() and (own["p_holm"] < 1e-3).all()
    for name in ("wrong word", "centred Gaussian", "shuffled mask"):
        control = lines(frame, name)
        assert (control["lead_low"] > 0).all() and (control["p"] < 0.01).all(), name
    wrong = lines(frame, "wrong word").loc["auc"]
    assert wrong["n"] == apart.sum() and wrong["left_out"] == f"{(~apart).sum()} no such map"


@pytest.mark.parametrize("smooth", [False, True])
def test_noise_sits_at_chance_also_where_it_is_smooth(smooth: bool) -> None:
    """Average precision and IoU of smooth noise lie above their closed forms for independent pixels."""
    size = (24, 24)
    rng = np.random.default_rng(5)
    values = rng.gamma(1.0, size=(400, *((4, 4) if smooth else size))).astype(np.float32)
    masks = random_masks(400, seed=6, size=size)
    own = lines(localization_score(as_maps(values), masks, seed=1))
    assert (np.abs(own["lead"]) < 4 * (own["lead_high"] - own["lead_low"]) / 3.92).all()
    assert (own["p"] > 0.001).all()
    assert own.loc["auc", "value"] == pytest.approx(0.5, abs=0.05)
    if smooth:
        assert own.loc["ap", "chance"] > own.loc["pointing", "chance"] + 0.005


# --- the table's statistics -----------------------------------------------------------------------


def test_intervals_are_those_of_stats_and_rows_of_one_image_stay_together() -> None:
    maps, masks = planted(30)
    maps = maps + np.random.default_rng(0).random(maps.shape).astype(np.float32)
    groups = np.arange(30) // 3
    own = lines(localization_score(as_maps(maps), masks, groups=groups, seed=4, n_resamples=300)).loc["auc"]
    values = [roc_auc_score(k.ravel(), m.ravel()) for m, k in zip(maps, masks, strict=True)]
    expected = bootstrap_sums(np.c_[values, np.ones(30)], lambda s: s[:, 0] / s[:, 1], clusters=groups, seed=4, n_resamples=300)
    assert (own["low"], own["high"]) == pytest.approx(expected, abs=1e-6)
    assert own["n"] == 30 and own["n_images"] == 10


def test_p_is_students_where_rows_are_images_and_holm_covers_the_grid() -> None:
    rng = np.random.default_rng(0)
    maps, masks = planted(20)
    noisy = maps[:, None] * np.array([0.05, 0.2, 1.0])[:, None, None] + rng.random((20, 3, *SIZE))
    frame = localization_score(as_maps(noisy.astype(np.float32), timestep=[10, 50, 500]), masks, n_resamples=10)
    for score, at in (("auc", 0.5), ("nss", 0.0)):
        p = []
        for step in range(3):
            values = [oracle(noisy[k, step].astype(np.float32), masks[k])[score] for k in range(20)]
            p.append(ttest_1samp(values, at, alternative="greater").pvalue)
        found = frame[(frame["map"] == "word") & (frame["score"] == score)]
        np.testing.assert_allclose(found["p"], p, rtol=1e-3)
        np.testing.assert_allclose(found["p_holm"], holm(found["p"]), rtol=1e-9)


def test_macro_is_the_mean_over_classes() -> None:
    maps, masks = planted(9)
    maps[:6] = blob(0, 0)
    classes = ["common"] * 6 + ["rare"] * 2 + ["rarest"]
    own = lines(localization_score(as_maps(maps), masks, classes=classes)).loc["auc"]
    values = np.array([roc_auc_score(k.ravel(), m.ravel()) for m, k in zip(maps, masks, strict=True)])
    expected = np.mean([values[:6].mean(), values[6:8].mean(), values[8]])
    assert own["macro"] == pytest.approx(expected, abs=1e-6) and own["n_classes"] == 3
    assert own["macro_low"] <= own["macro"] <= own["macro_high"] and own["value"] < own["macro"]


def test_when_all_point_right_the_interval_still_says_how_few_they_were() -> None:
    maps, masks = planted(8)
    masks = np.stack([m >= m.max() for m in maps])
    own = lines(localization_score(as_maps(maps), masks)).loc["pointing"]
    assert own["value"] == own["high"] == 1.0 and 0.5 < own["low"] < 0.8
    assert own["p"] < 0.01


# --- what cannot be scored ------------------------------------------------------------------------


def test_rows_that_mean_nothing_are_left_out_and_counted() -> None:
    maps, masks = planted(8)
    masks[0] = False
    masks[1] = True
    maps[2] = 0.5
    maps[3, 0, 0] = np.nan
    masks[4] = False
    masks[4, 5, 5] = True  # one pixel is a mask
    frame = localization_score(as_maps(maps), masks, n_resamples=50)
    own = lines(frame)
    assert (own["n"] == 4).all() and (own["n_left_out"] == 4).all()
    assert own.loc["auc", "left_out"] == "1 empty mask; 1 full mask; 1 constant map; 1 map not finite"
    assert np.isfinite(own["value"]).all()
    assert lines(frame, "centred Gaussian").loc["auc", "n"] == 6, "its map is always good"


def test_a_single_image_has_scores_but_no_interval() -> None:
    maps, masks = planted(3)
    frame = localization_score(as_maps(maps), masks, groups=["a"] * 3)
    own = lines(frame).loc["auc"]
    assert own["value"] > 0.9 and np.isnan([own["low"], own["high"], own["p"]]).all()
    assert lines(frame, "shuffled mask").loc["auc", "left_out"] == "3 no such map"


def test_other_dimensions_and_scalars_become_columns() -> None:
    maps, masks = planted(6)
    cube = as_maps(np.stack([maps, maps[::-1]], axis=1), timestep=[10, 500]).assign_coords(site="U-L1")
    frame = localization_score(cube, masks, own="difference", n_resamples=10)
    assert frame.columns[0] == "site" and set(frame["site"]) == {"U-L1"}
    assert len(frame) == 2 * 3 * len(SCORES) and set(frame["timestep"]) == {10, 500}
    assert (
        lines(frame, "difference", timestep=10).loc["auc", "value"]
        > lines(frame, "difference", timestep=500).loc["auc", "value"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": -1.0}, "negative somewhere"),
        ({"masks": np.zeros((9, *SIZE), bool)}, "a map each; got \\(9, 12, 18\\) for 4 maps"),
        ({"masks": np.zeros((0, *SIZE), bool)}, "There are no masks"),
        ({"controls": {"x": [0, 1, 2, 9]}}, "Control 'x' needs one row number per mask.* -1 to 3"),
        ({"groups": ["a"]}, "`groups` needs one id per mask"),
        ({"dims": ("sample", "y", "x")}, "row is not in"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    maps, masks = planted(4)
    given = xr.DataArray(maps * change.pop("maps", 1.0), dims=change.pop("dims", ("row", "y", "x")))
    with pytest.raises(ValueError, match=message):
        localization_score(given, change.pop("masks", masks), **change)


# --- words ----------------------------------------------------------------------------------------


def sample_of(text: str, spans: list[tuple[str, int, tuple[int, ...], str]]) -> tuple[Sample, Caption]:
    """Spans are (word, which of its places in the text, objects, role)."""
    found = []
    for word, nth, objects, role in spans:
        start = -1
        for _ in range(nth + 1):
            start = text.index(word, start + 1)
        found.append(Span(start, start + len(word), objects, role))
    objects = ({"category": "dog"}, {"category": "dog"}, {"category": "cat"})
    return Sample("s", load=lambda: None, objects=objects), Caption(text, tuple(found))  # type: ignore[arg-type,return-value]


MASKS = np.eye(3, dtype=bool)[:, None]  # three objects, a pixel each


def test_words_that_stand_twice_or_mean_several_are_joined() -> None:
    sample, caption = sample_of(
        "a dog and a cat and a dog", [("dog", 0, (0,), "noun"), ("cat", 0, (2,), "noun"), ("dog", 1, (1,), "noun")]
    )
    targets, left_out = word_targets(sample, caption, MASKS, "noun")
    assert [(t.word, t.label, t.objects) for t in targets] == [("dog", "dog", (0, 1)), ("cat", "cat", (2,))]
    assert targets[0].mask.tolist() == [[True, True, False]] and len(targets[0].spans) == 2 and not left_out
    sample, caption = sample_of("dogs and cats", [("dogs", 0, (0, 1), "noun"), ("cats", 0, (2,), "noun")])
    targets, _ = word_targets(sample, caption, MASKS, "noun")
    assert [(t.word, t.label) for t in targets] == [("dogs", "dog"), ("cats", "cat")], "a plural is of its singular's class"


def test_words_whose_meaning_is_open_are_left_out_and_counted() -> None:
    sample, caption = sample_of("a dog sees a dog", [("dog", 0, (0,), "noun")])
    targets, left_out = word_targets(sample, caption, MASKS, "noun")
    assert not targets and left_out == {"word that also stands for something else": 1}
    sample, caption = sample_of("a dog and a yak", [("dog", 0, (), "noun"), ("yak", 0, (7,), "noun")])
    targets, left_out = word_targets(sample, caption, MASKS, "noun")
    assert not targets and left_out == {"word without a mask": 2}
    sample, caption = sample_of("a hot dog and a dog", [("hot dog", 0, (2,), "noun"), ("dog", 1, (0,), "noun")])
    targets, _ = word_targets(sample, caption, MASKS, "noun")
    assert [t.objects for t in targets] == [(2,), (0,)], "the dog of the hot dog is explained"


def test_background_is_what_no_object_covers() -> None:
    sample, caption = sample_of("a dog on grass", [("dog", 0, (0,), "noun"), ("grass", 0, (), "background")])
    (target,), _ = word_targets(sample, caption, MASKS[:2], "background")
    assert target.mask.tolist() == [[False, False, True]]


# --- a store in which the truth is planted ---------------------------------------------------------

GRID, PIXELS = (12, 12), 24
MAP, FEATURE = "U-L1-R0-B0-Cross-Map", "U-L1-R0-B0-Out"
STEPS = (50, 500)


def scenes() -> ShapesDataset:
    return ShapesDataset(12, "test", n_objects=2)


def tokens_of(text: str) -> list[tuple[int, int]]:
    """A start token, then every word cut in two, as a tokenizer might."""
    spans, place = [(0, 0)], 0
    for word in text.split(" "):
        middle = place + len(word) // 2
        spans += [(place, middle), (middle, place + len(word))] if len(word) > 1 else [(place, place + 1)]
        place += len(word) + 1
    return spans


@pytest.fixture(scope="module")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maps: head 0 of every noun and colour lights up its objects at t = 50 only, all else is noise.

    Features: the caption moves the features of all its objects, question N those of the objects that it is about.
    """
    data, rng = scenes(), np.random.default_rng(0)
    names = ("null", "caption:web", "question", "question:1")
    count, kept = len(data), 1 + max(len(tokens_of(s.captions[5].text)) for s in (data[i] for i in range(len(data))))
    texts = np.full((count, len(names)), "", object)
    spans = np.zeros((count, len(names), kept, 2), np.int32)
    maps = rng.gamma(1, size=(count, len(names), 2, 2, kept, *GRID)).astype(np.float32)
    features = rng.normal(size=(count, len(names), 2, 8, *GRID)).astype(np.float32)
    features[:, 1:] = features[:, :1] + 0.1 * rng.normal(size=(count, 3, 2, 8, *GRID))
    for row in range(count):
        sample = asked(data[row])
        caption = next(c for c in sample.captions if c.style == "web")
        texts[row, 1:] = [caption.text, *(question.text for question in sample.questions)]
        places = tokens_of(caption.text)
        spans[row, 1, : len(places)] = places
        masks = fit_masks(sample.masks(), GRID).astype(np.float32)
        for span in caption.spans:
            if span.role in ("noun", "colour"):
                lit = [k for k, (a, b) in enumerate(places) if b > a and a < span.end and b > span.start]
                maps[row, 1, 0, 0, lit] += 60 * masks[list(span.objects)].max(0)
        for column, objects in ((1, (0, 1)), (2, sample.questions[0].objects), (3, sample.questions[1].objects)):
            features[row, column] += 3 * masks[list(objects)].max(0)
    path = tmp_path_factory.mktemp("localization") / "planted.zarr"
    store.create_store(
        path,
        attributes={
            "request": {"timesteps": list(STEPS), "sites": [FEATURE], "maps": [MAP], "resolution": [PIXELS, PIXELS], "fit": "crop"},
            "data": data.spec, "commit": None,
        },
        sample_ids=[data[i].id for i in range(count)], labels={}, timesteps=STEPS, conditionings=names, tokens=range(kept),
        prompts={"text": texts, "token_id": spans[..., 0], "token_start": spans[..., 0], "token_end": spans[..., 1]},
        specs=[
            ArraySpec(FEATURE, "f", "transformer_block", "features", ("channel", "y", "x"), features.shape[3:], names),
            ArraySpec(MAP, "m", "cross_map", "maps", ("head", "token", "y", "x"), maps.shape[3:], names),
        ],
        unit_samples=5, dtype="float16",
    )  # fmt: skip
    writer = store.StoreWriter(path)
    for unit in writer.pending:
        first, last = writer.bounds(unit)
        arrays = {FEATURE: features[first:last].astype(np.float16), MAP: maps[first:last].astype(np.float16)}
        writer.write_unit(unit, arrays, np.full(last - first, store.COMPLETE, np.uint8))
    return path


def asked(sample: Sample) -> Sample:
    """Two questions, the first about object 1 and the second about object 0."""
    question = replace(sample.questions[0], text="And this?", objects=(1,))
    return replace(sample, questions=(question, replace(question, text="And that?", objects=(0,))))


class Asked:
    """The scenes with questions whose objects the planted features know."""

    name, spec = "asked", "none"

    def __len__(self) -> int:
        return len(scenes())

    def __getitem__(self, index: int) -> Sample:
        return asked(scenes()[index])

    def fingerprint(self) -> str:
        return "asked"


def test_attention_of_a_store_finds_what_was_planted_where_it_was(planted_store: Path) -> None:
    frame = attention_localization(
        open_store(planted_store), conditioning="caption:web", roles=("noun", "colour", "background"), by_head=True,
        against_timestep=500, n_resamples=200,
    )  # fmt: skip
    cell = {"role": "noun", "site": MAP, "timestep": 50}
    own, noise = lines(frame, head="0", **cell), lines(frame, head="1", **cell)
    assert own.loc["auc", "value"] > 0.9 and (own["p_holm"] < 0.01).all()
    assert noise.loc["auc", "low"] < 0.5 < noise.loc["auc", "high"]
    assert lines(frame, head="mean", **cell).loc["auc", "value"] > 0.85
    assert lines(frame, "wrong word", head="0", **cell).loc["auc", "lead_low"] > 0.2
    start = lines(frame, "start token", head="0", **cell).loc["auc"]
    assert start["low"] < 0.5 < start["high"] and start["n"] == own.loc["auc", "n"]
    late = lines(frame, "timestep 500", head="0", **cell).loc["auc"]
    assert late["lead_low"] > 0.2 and late["value"] == pytest.approx(
        lines(frame, head="0", **{**cell, "timestep": 500}).loc["auc", "value"]
    )
    for role in ("colour", "background"):
        assert lines(frame, head="0", **{**cell, "role": role}).loc["auc", "n"] > 5
    assert lines(frame, head="0", **{**cell, "role": "background"}).loc["auc", "value"] == pytest.approx(0.5, abs=0.1)
    assert set(frame["n_images"]) <= set(range(13)) and (frame["conditioning"] == "caption:web").all()


def test_a_chosen_part_of_a_store_gives_the_same_lines(planted_store: Path) -> None:
    tree = open_store(planted_store)
    whole = attention_localization(tree, conditioning="caption:web", n_resamples=50)
    part = attention_localization(tree, scenes(), conditioning="caption:web", timesteps=[500], sites=[MAP], n_resamples=50)
    kept = whole[whole["timestep"] == 500].reset_index(drop=True)
    pd.testing.assert_frame_equal(part.drop(columns="p_holm"), kept.drop(columns="p_holm"))
    coarse = attention_localization(tree, conditioning="caption:web", grid=(12, 12), n_resamples=50)
    assert lines(coarse, timestep=50).loc["auc", "value"] == pytest.approx(
        lines(whole, timestep=50).loc["auc", "value"], abs=0.08
    )


def test_differences_of_a_store_are_norms_over_channels(planted_store: Path) -> None:
    tree = open_store(planted_store)
    array = tree[FEATURE]["features"].values.astype(np.float64)
    found = difference_maps(tree, FEATURE, "caption:web", [500])
    assert found.dims == ("sample", "timestep", "y", "x")
    np.testing.assert_allclose(found[:, 0], np.linalg.norm(array[:, 1, 1] - array[:, 0, 1], axis=1), rtol=1e-3)


def test_differences_light_up_what_the_text_speaks_of(planted_store: Path) -> None:
    frame = difference_localization(open_store(planted_store), Asked(), n_resamples=200)
    caption, question = (lines(frame, "difference", conditioning=c, timestep=50).loc["auc"] for c in ("caption", "question"))
    assert caption["value"] > 0.95 and question["value"] > 0.95
    assert (caption["n"], question["n"]) == (12, 24) and caption["n_images"] == question["n_images"] == 12
    other = lines(frame, "other text", conditioning="question", timestep=50).loc["auc"]
    null = lines(frame, "null features", conditioning="question", timestep=50).loc["auc"]
    assert other["n"] == 24 and other["lead_low"] > 0.3 and null["low"] < 0.5 < null["high"]
    assert lines(frame, "other text", conditioning="caption").loc["auc", "n"].tolist() == [0, 0], (
        "no mismatched caption was recorded"
    )
    one = difference_localization(open_store(planted_store), Asked(), conditionings=["question"], n_resamples=50)
    assert set(one["conditioning"]) == {"question"} and lines(one, "difference", timestep=50).loc["auc", "n"] == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: attention_localization(t), "no conditioning 'caption' in this store. Did you mean 'caption:web'"),
        (lambda t: attention_localization(t, conditioning="question"), "is no caption of the sample"),
        (lambda t: attention_localization(t, conditioning="caption:web", sites=["x"]), "no map site 'x' in this store"),
        (lambda t: attention_localization(t, conditioning="caption:web", timesteps=[7]), "no timestep 7 in this store. It has: 50, 500"),
        (lambda t: attention_localization(t, conditioning="caption:web", roles=["verb"]), "No word of the role verb can be scored"),
        (lambda t: attention_localization(t, "shapes:3", conditioning="caption:web"), "has no sample 'shapes-test-0-n2-000000'"),
        (lambda t: difference_localization(t, conditionings=["mismatched"]), "no conditioning 'mismatched'"),
        (lambda t: difference_localization(t, sites=[MAP]), "no feature site"),
    ],
)  # fmt: skip
def test_what_a_store_does_not_hold_is_named(planted_store: Path, call: Any, message: str) -> None:
    with pytest.raises((StoreError, ValueError), match=message):
        call(open_store(planted_store))


def test_another_datasets_words_are_not_read_into_the_store(planted_store: Path) -> None:
    class Renamed(Asked):
        def __getitem__(self, index: int) -> Sample:
            sample = scenes()[index]
            return replace(sample, captions=tuple(replace(c, text=c.text + " now") for c in sample.captions))

    with pytest.raises(StoreError, match=r"was extracted with the caption:web '.*', but the dataset says '.* now'"):
        attention_localization(open_store(planted_store), Renamed(), conditioning="caption:web")
    with pytest.raises(StoreError, match=r"was extracted with the question 'And this\?', but the dataset says"):
        difference_localization(open_store(planted_store), conditionings=["question"])


# --- pictures and the command line ----------------------------------------------------------------


def test_pictures_are_drawn_again_from_their_csv(planted_store: Path, tmp_path: Path) -> None:
    tree = open_store(planted_store)
    frame = attention_localization(tree, conditioning="caption:web", by_head=True, n_resamples=50)
    drawn = draw_localization(frame)
    assert set(drawn) == {"curves", "noun", "noun_controls", "noun_heads"}
    paths = plotting.save_figure(drawn["noun_heads"], tmp_path, "heads", frame, {}, "x")
    rows = plotting.read_rows(paths["csv"])
    pd.testing.assert_frame_equal(rows, frame, check_dtype=False, rtol=0, atol=0)
    heads = rows[rows["timestep"] == 50]
    again = plot_localization_heads(heads, title="noun, timestep 50")
    assert plotting.save_figure(again, tmp_path, "again", rows, {}, "x")["png"].read_bytes() == paths["png"].read_bytes()
    with pytest.raises(ValueError, match="several rows; head differ"):
        plot_localization_grid(frame)
    with pytest.raises(ValueError, match="no column site"):
        plot_localization_grid(frame.drop(columns="site"))


def test_strips_and_differences_take_what_they_say() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)] * 2
    maps = [
        xr.DataArray(rng.random((2, n, 6, 6)), dims=("timestep", "word", "y", "x"), coords={"timestep": [50, 500], "word": list("abcd"[:n])})
        for n in (4, 2)
    ]  # fmt: skip
    figure = figures.plot_attention_strips(images, maps)
    titles = [axis.get_title() for axis in figure.axes]
    assert [t for t in titles if t] == ["a", "b", "c", "d", "a", "b"]
    with pytest.raises(ValueError, match="2 images need as many maps"):
        figures.plot_attention_strips(images, maps[:1])
    regions = np.zeros((2, 3, 24, 24), bool)
    regions[..., 4:9, 4:9] = True
    figure = figures.plot_differences(images, rng.random((2, 3, 6, 6)).astype(np.float32), regions, [["x", "y", "z"]] * 2)
    assert len(figure.axes) == 8


def test_command_line(
    planted_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffprobe.cli import main

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["diffprobe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        output, errors = capsys.readouterr()
        return int(stop.value.code or 0), output + errors

    table = tmp_path / "t.csv"
    code, output = run("probe", "localization", planted_store, "--conditioning", "caption:web", "-o", table)
    assert code == 0 and "lead over wrong word" in output and f"plot localization {table}" in output
    assert len(plotting.read_rows(table)) == 2 * 5 * len(SCORES) and table.with_suffix(".json").exists()
    code, output = run("plot", "localization", table, "--out", tmp_path / "figures")
    assert code == 0 and (tmp_path / "figures" / "t_noun.png").exists()
    code, output = run("probe", "localization", planted_store, "--of", "difference", "--conditioning", "caption:web")
    assert code == 0 and (planted_store.parent / "planted.zarr.localization-difference.csv").exists()
    assert run("probe", "localization", planted_store, "--of", "x") == (
        2,
        "diffprobe: --of 'x' is not one of attention, difference.\n",
    )
    code, output = run("plot", "localization", tmp_path / "none.csv")
    assert code == 2 and "No table at" in output


@pytest.mark.parametrize(("early", "late", "expected"), [(0.3, 0.1, "held"), (0.2, 0.2, "undecided"), (0.1, 0.3, "not held")])
def test_the_interaction_of_word_and_timestep(early: float, late: float, expected: str) -> None:
    """Planted leads over the wrong word: maps that find objects equally well at both timesteps decide nothing."""
    from experiments.framework import find_experiments, load_experiment

    curves = load_experiment(find_experiments(["fig4"])[0])
    rng = np.random.default_rng(0)
    groups, lines = np.arange(60) // 2, []
    for step, lead in ((50, early), (500, late)):
        own = 0.9 - 0.2 * (step == 500) + 0.02 * rng.normal(size=60)
        for name, scores in (("word", own), ("wrong word", own - lead + 0.02 * rng.normal(size=60))):
            lines.append({"role": "noun", "site": "all sites", "timestep": step, "head": "mean", "map": name, "score": "auc",
                          "rows": scores, "row_groups": groups})  # fmt: skip
    lines[0]["rows"][3] = np.nan  # a word without a map
    found = sys.modules[curves.measure.__module__].interaction(pd.DataFrame(lines)).iloc[0]
    assert (found["n"], found["n_images"]) == (59, 30) and found["value"] == pytest.approx(early - late, abs=0.02)
    claim = curves.judge(pd.DataFrame([found]))[0]
    assert (claim.verdict, claim.primary) == (expected, True)


def test_verdicts_follow_the_rows(planted_store: Path) -> None:
    """Planted maps hold what noise does not; where the paper's sites are many, here is one that stands for all."""
    from experiments.framework import find_experiments, load_experiment

    files = {path.stem: path for path in find_experiments(["tab_localization", "fig4", "fig7"])}
    table, curves, questions = (load_experiment(files[n]) for n in ("tab_localization", "fig4_attention", "fig7_questions"))
    tree = open_store(planted_store)
    rows = attention_localization(
        tree, conditioning="caption:web", roles=("noun", "background"), by_head=True, against_timestep=500, n_resamples=200
    ).assign(site="all sites", part="sites")
    by_head = [rows[rows["head"] == head].assign(head="mean") for head in ("0", "1")]
    nouns = [part[part["role"] == "noun"] for part in by_head]
    assert [claim.verdict for claim in table.judge(nouns[0])] == ["held", "held"]
    assert [claim.verdict for claim in table.judge(nouns[1])] == ["not held", "undecided"]
    assert [claim.verdict for claim in curves.judge(by_head[0])] == ["undecided", "held", "undecided"]
    assert [claim.verdict for claim in curves.judge(nouns[1])] == ["undecided"] * 3
    asked_about = difference_localization(tree, Asked(), n_resamples=200)
    main = asked_about.assign(site="U-L1-R1-B0-Cross-Q")
    verdicts = [(claim.verdict, claim.primary) for claim in questions.judge(main)]
    assert verdicts == [("undecided", True), ("held", False)], "the first compares with no other text"
    assert not any("nan" in claim.evidence for claim in questions.judge(main))
