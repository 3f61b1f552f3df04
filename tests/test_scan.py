"""The scan of sites and noise levels: planted data whose best cell is known, and noise, on which the choice must gain nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from diffprobe.probes.cells import resampling_weights
from diffprobe.probes.knn import knn_probe
from diffprobe.probes.linear import fit_probe
from diffprobe.probes.scan import _judged, choose_held_out, scan_maps, scan_probes
from diffprobe.probes.task import FOLDS

SITES = [f"T-B{block}-Out" for block in range(4)]


def planted(strength: dict[tuple[str, int], float], seed: int, samples: int = 60, channels: int = 4) -> tuple[Any, np.ndarray]:
    """Noise features of sites at two timesteps, in some of which a class shifts the first channel; the classes are random."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(samples) % 2)
    values = {site: rng.normal(size=(samples, 2, channels)) for site in SITES}
    for (site, when), size in strength.items():
        values[site][:, when, 0] += size * label
    coords = {"timestep": [50, 500], "label": ("sample", np.array(["a", "b"])[label])}
    return lambda site: xr.DataArray(values[site], dims=("sample", "timestep", "channel"), coords=coords), label


@pytest.mark.parametrize("probe", [fit_probe, knn_probe])
def test_the_planted_site_is_found_and_judged(probe: Any) -> None:
    get, _ = planted({(SITES[3], 1): 4.0, (SITES[2], 1): 1.0}, 0)
    found = scan_probes(get, SITES, "label", probe, n_jobs=1)
    best = found[found["bold"]]
    assert len(found) == 8 and len(best) == 1
    assert tuple(best.iloc[0][["site", "timestep", "chosen"]]) == (SITES[3], 500, FOLDS)
    # Chosen in every turn, the cell's own cross-fitted score is what judges it.
    assert best["held_out"].item() == best["value"].item() > 0.9
    assert best["held_out_low"].item() <= best["held_out"].item() <= best["held_out_high"].item()
    assert found["chosen"].sum() == FOLDS and found["held_out"].nunique() == 1


def test_quantities_are_judged_by_r2() -> None:
    get, _ = planted({(SITES[1], 0): 0.0}, 1, samples=80)
    site = get(SITES[1])
    target = site.values[:, 0, 0] + 0.1 * np.random.default_rng(2).normal(size=80)
    with_target = lambda name: get(name).assign_coords(depth=("sample", target))  # noqa: E731
    found = scan_probes(with_target, SITES, "depth", fit_probe, n_jobs=1)
    best = found[found["bold"]].iloc[0]
    assert (best["site"], best["timestep"], best["score"]) == (SITES[1], 50, "r2") and best["held_out"] > 0.9


def test_a_choice_among_noise_gains_nothing() -> None:
    held, naive = [], []
    for seed in range(12):
        get, _ = planted({}, seed, samples=40)
        found = scan_probes(get, SITES, "label", fit_probe, n_jobs=1, penalties=(10.0, 1000.0), n_resamples=100)
        held.append(found["held_out"].iloc[0])
        naive.append(found["value"].max())
    error = np.std(held, ddof=1) / len(held) ** 0.5
    assert np.mean(held) < 0.5 + 2.5 * error, (np.mean(held), error)
    assert np.mean(naive) > 0.5 + 0.06, "the highest score of a table is lifted by the choice"


def test_maps_chosen_among_noise_gain_nothing_and_are_covered() -> None:
    """Tables of 30 cells that all have the mean .5: rows of one image share a part, as words of one image do."""
    held, naive, covered = [], [], 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(25), 2)
        table = 0.5 + 0.1 * rng.normal(size=(25, 30))[groups] + 0.1 * rng.normal(size=(50, 30))
        chosen, folds = choose_held_out(table, groups, seed)
        own = table[np.arange(50), chosen[folds]][:, None]
        judged = _judged(own, groups, resampling_weights(25, seed, 400))
        held.append(judged["value"])
        naive.append(table.mean(0).max())
        covered += bool(judged["low"] <= 0.5 <= judged["high"])
    error = np.std(held, ddof=1) / len(held) ** 0.5
    assert abs(np.mean(held) - 0.5) < 3 * error, (np.mean(held), error)
    assert np.mean(naive) > 0.5 + 0.03
    assert 0.9 < covered / 300 < 0.99


def test_the_choice_is_made_on_other_rows() -> None:
    """A cell that is best in one fold alone is never chosen for that fold."""
    groups = np.arange(20)
    _, folds = choose_held_out(np.zeros((20, 2)), groups, 3)
    for fold in range(FOLDS):
        table = np.stack([np.where(folds == fold, 100.0, 0.0), np.full(20, 0.5)], axis=1)
        chosen, _ = choose_held_out(table, groups, 3)
        assert chosen[fold] == 1 and set(np.delete(chosen, fold)) == {0}
    with pytest.raises(ValueError, match="at least 5"):
        choose_held_out(np.zeros((8, 2)), np.arange(8) // 2)


def test_a_store_is_scanned_for_labels_and_for_maps(tmp_path: Path, output: Callable[..., str]) -> None:
    from diffprobe.extraction import extract
    from diffprobe.store import open_store

    store = str(tmp_path / "words.zarr")
    extract(
        "shapes-sd", "shapes:20?split=test&objects=2", store, sites="blocks", maps="U-L2-*-Cross-Map", timesteps=[50, 500],
        conditionings=["null", "caption"], reduce="mean", progress=False,
    )  # fmt: skip

    said = output("probe", "scan", store, "--label", "relation", "--jobs", "1")
    assert "held out" in said and f"plot probe {store}.scan.csv" in said
    frame = pd.read_csv(f"{store}.scan.csv", keep_default_na=False)  # a conditioning is called null
    assert frame.groupby("conditioning")["chosen"].sum().to_dict() == {"null": 5, "caption": 5}
    assert frame.groupby("conditioning")["bold"].sum().to_dict() == {"null": 1, "caption": 1}
    assert "Drew" in output("plot", "probe", f"{store}.scan.csv", "--out", str(tmp_path / "figures"))
    output("probe", "scan", store, "--of", "localization")
    frame = pd.read_csv(f"{store}.scan-localization.csv")
    assert frame["chosen"].sum() == 5 and (frame["label"] == "localization of nouns").all()
    assert frame["held_out"].iloc[0] <= frame["value"].max() + 1e-9
    # The same, by a loop over the words' own rows.
    from diffprobe.probes.grounding import attention_localization

    tree = open_store(store)
    whole = attention_localization(tree, merged=False, keep_rows=True)
    own = whole[(whole["map"] == "word") & (whole["score"] == "auc")]
    rows, images = np.stack(own["rows"].tolist()), pd.factorize(own["row_groups"].iloc[0])[0]
    _, folds = choose_held_out(rows.T, images)
    judged = []
    for fold in range(FOLDS):
        best = max(range(len(rows)), key=lambda cell: np.nanmean(rows[cell][folds != fold]))
        judged += rows[best][folds == fold].tolist()
    assert frame["held_out"].iloc[0] == pytest.approx(np.nanmean(judged))
    assert scan_maps(tree)["held_out_lead"].iloc[0] > 0
    assert "Drew" in output("plot", "probe", f"{store}.scan-localization.csv", "--out", str(tmp_path / "figures"))


def test_a_unets_site_in_a_transformers_store_is_not_applicable() -> None:
    from diffprobe.sites import NotApplicableError
    from diffprobe.store import known

    blocks = [f"T-B{number}-Out" for number in range(9)]
    with pytest.raises(NotApplicableError, match=r"U-L1-R1-B0-Cross-Q' is a place of a UNet.*--sites T-B6-Out"):
        known("U-L1-R1-B0-Cross-Q", blocks, "map site")


def test_a_score_that_is_none_is_refused_before_the_work() -> None:
    with pytest.raises(ValueError, match=r"Score 'acu' is not one that a scan can choose by: pointing.*[Dd]id you mean"):
        scan_maps(xr.DataTree(), score="acu")
    with pytest.raises(ValueError, match="'iou_tuned' is not one"):
        scan_maps(xr.DataTree(), score="iou_tuned")
