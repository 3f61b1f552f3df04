"""Rules of the analyses' verdicts on planted data: what noise alone does decides nothing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from experiments.framework import find_experiments, load_experiment


def module_of(name: str) -> Any:
    experiment = load_experiment(find_experiments([name])[0])
    return sys.modules[experiment.measure.__module__]


FEATURES, CONDITIONING, QUESTIONS, PROBES = map(module_of, ("fig2", "fig5", "fig7", "tab_probes"))
DIMS = ("sample", "timestep", "channel", "y", "x")


def planted(rng: np.random.Generator, content: np.ndarray, strength: np.ndarray, noise: np.ndarray) -> xr.DataArray:
    """Content (sample, channel, y, x) that fades with the timestep by `strength`, under its own noise."""
    steps = [content * s + n * rng.normal(size=content.shape) for s, n in zip(strength, noise, strict=True)]
    values, names = np.stack(steps, axis=1), np.arange(len(content))
    return xr.DataArray(values, dims=DIMS, coords={"sample": names, "timestep": list(FEATURES.TIMESTEPS)})


def test_a_fall_that_noise_explains_is_no_fall() -> None:
    """Equal images under independent noise fall with t, and by no more than the ceiling; images that part do fall further."""
    rng, shape, noise = np.random.default_rng(0), (40, 16, 4, 4), np.linspace(0.1, 1.0, 5)
    one, other = rng.normal(size=shape), rng.normal(size=shape)
    for share, expected in ((np.zeros(5), "undecided"), (np.linspace(0.0, 0.8, 5), "held")):
        first, again = (planted(rng, one, np.ones(5), noise) for _ in range(2))
        second = planted(rng, one, 1 - share, noise) + planted(rng, other, share, 0 * noise)
        rows = [FEATURES.pair_rows(first, second, again, site, 0) for site in ("a-Cross-Q", "b-Out")]
        low_high = {"value": 0.1, "low": 0.0, "high": 0.2, "n": 40, "site": "a less b"}
        across = [{**low_high, "what": "Cross-Q less others", "measure": m} for m in ("cosine", "cosine_standardised")]
        claims = FEATURES.judge_cosine(pd.concat([*rows, pd.DataFrame(across)], ignore_index=True))
        assert [claim.verdict for claim in claims[:2]] == [expected, "held"]
        assert [claim.primary for claim in claims] == [True, False, False]


@pytest.mark.parametrize(("place", "expected"), [("off", "held"), ("on", "not testable"), (None, "not testable")])
def test_registers_lie_where_nothing_is(place: str | None, expected: str) -> None:
    """Large norms on objects are no registers, and a model without registers cannot show them."""
    rng, count = np.random.default_rng(0), 40
    masks = [np.zeros((32, 32), bool) for _ in range(count)]
    for mask in masks:
        mask[:16, :16] = True
    rows, maps = [], {}
    for site in ("a-Cross-Q", "b-Out"):
        values = rng.normal(size=(count, 5, 16, 8, 8))
        if place and site == "b-Out":
            at = (2, 2) if place == "on" else (6, 5)
            values[:, :, :, at[0], at[1]] *= 20
        coords = {"sample": np.arange(count), "timestep": list(FEATURES.TIMESTEPS), "pair": ("sample", np.arange(count) // 2)}
        maps[site] = xr.DataArray(values, dims=DIMS, coords=coords)
        rows += [FEATURES.outlier_rows(maps[site], site, masks, 0), FEATURES.object_rows(maps[site], site, masks, 0)]
    halves = [{s: m.isel(sample=slice(k, None, 2)).drop_vars("sample") for s, m in maps.items()} for k in (0, 1)]
    rows.append(FEATURES.site_contrasts(*halves, maps, 0))
    claim = FEATURES.judge_outliers(pd.concat(rows, ignore_index=True))
    assert (claim.verdict, claim.primary) == (expected, True)


def test_what_the_input_keeps_alike_is_not_the_networks() -> None:
    """A site that is the noised latent loses as much of both bands, in every resample."""
    rng, pairs = np.random.default_rng(0), np.arange(40) // 2
    sums = rng.uniform(0.5, 1.0, (40, 8)) * [0.2, 1, 0.4, 1, 0.3, 1, 0.8, 1]
    same = FEATURES.estimate(np.concatenate([sums, sums], axis=1), FEATURES.kept_beyond_input, pairs, 0)
    assert same == {"value": 0, "low": 0, "high": 0}
    better = sums * [1, 1, 0.5, 1, 1, 1, 1, 1]  # keeps more layout than the input does
    assert FEATURES.estimate(np.concatenate([better, sums], axis=1), FEATURES.kept_beyond_input, pairs, 0)["low"] > 0


def difference_rows(caption: float, other: float, null: float) -> pd.DataFrame:
    line = {"site": "U-L1-R1-B0-Cross-Q", "timestep": 50, "score": "auc", "n": 30, "n_images": 30}
    rows = []
    for kind in ("caption", "question"):
        for name, value in (("difference", caption), ("other text", other), ("null features", null), ("centred Gaussian", 0.7)):
            lead = caption - value
            ends = {"low": value - 0.01, "high": value + 0.01, "lead": lead, "lead_low": lead - 0.01, "lead_high": lead + 0.01}
            rows.append({**line, "conditioning": kind, "map": name, "value": value, **ends})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("caption", "other", "null", "expected"),
    [
        (0.5, 0.4, 0.4, "undecided"),
        (0.9, 0.8, 0.8, "held"),
        (0.9, 0.9, 0.8, "undecided"),
        (0.9, 0.8, 0.95, "not held"),
        (0.9, 0.95, 0.8, "not held"),
    ],
)
def test_a_caption_must_beat_another_and_none(caption: float, other: float, null: float, expected: str) -> None:
    claim = QUESTIONS.judge(difference_rows(caption, other, null))[0]
    assert (claim.id, claim.verdict, claim.primary) == ("A5", expected, True)
    assert "the main site" in claim.statement


def test_the_curve_of_a_mismatched_caption_is_told_apart() -> None:
    """Changes of one size and direction fall alike under both captions; a smaller one falls less."""
    rng = np.random.default_rng(0)
    place = {"sample": np.arange(80), "timestep": list(CONDITIONING.TIMESTEPS)}
    plain, text = (xr.DataArray(rng.normal(size=(80, 2, 8, 2, 2)), dims=DIMS, coords=place) for _ in range(2))
    given = plain + text
    for other, alike in ((given, True), (plain + 0.02 * text, False)):
        rows = pd.DataFrame(CONDITIONING.guidance_rows(plain, given, other, "a", 0))
        beyond = rows[(rows["what"] == "fall beyond mismatched") & (rows["measure"] == "cka") & (rows["timestep"] == 50)].iloc[
            0
        ]
        assert (beyond["value"] == 0) == alike and bool(beyond["low"] <= 0 <= beyond["high"]) == alike
