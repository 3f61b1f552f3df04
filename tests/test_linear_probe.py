"""Linear probes on planted signals, against plain scikit-learn, and their refusals."""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, jaccard_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from diffprobe.data import fit_masks, iterate, load_dataset
from diffprobe.data.samples import Sample
from diffprobe.probes.fitting import fit_quietly, probe_table, save_table
from diffprobe.probes.labels import patch_labels, with_mask_labels
from diffprobe.probes.linear import LinearProbe, fit_probe
from diffprobe.probes.scoring import Turn, _overlap, best_choice, make_row
from diffprobe.probes.streaming import GramRidge, stream_probe
from diffprobe.probes.task import FOLDS, Problem, Settings, pool_features, split_folds

N = 200
COLOURS = np.array(["red", "green", "blue"])


def planted(n=N, channels=6, timesteps=(10, 900), strength=(3.0, 0.0), side=None, seed=0):
    """Features whose first channels tell the colour at the first timestep and nothing at the second."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(3, size=n)
    shape = (n, len(timesteps), channels) + ((side, side) if side else ())
    values = rng.normal(size=shape) * (side or 1)
    for k, s in enumerate(strength):
        values[np.arange(n), k, colour] += s
    dims = ("sample", "timestep", "channel") + (("y", "x") if side else ())
    coords = {
        "sample": [f"s{i:03d}" for i in range(n)],
        "timestep": list(timesteps),
        "colour": ("sample", COLOURS[colour]),
        "area": ("sample", values[:, 0, 3].reshape(n, -1).mean(1) * 2 + 0.5 * rng.normal(size=n)),
        "one": ("sample", np.full(n, "same")),
    }
    return xr.DataArray(values, dims=dims, coords=coords)


def split(features, name, groups=None, seed=0):
    """The split that `fit_probe` promises: rows to fit on, rows to test."""
    values = features[name].values
    target = values if values.dtype.kind == "f" else np.unique(values, return_inverse=True)[1]
    folds = split_folds(target, np.arange(len(values)) if groups is None else groups, seed)
    return folds != 0, folds == 0


def test_planted_direction_is_found_and_noise_is_at_chance():
    frame = fit_probe(planted(), "colour").table.set_index("timestep")
    strong, noise = frame.loc[10], frame.loc[900]
    assert strong.value > 0.9
    assert strong.low <= strong.value <= strong.high
    assert strong.low > strong.chance
    assert noise.low <= 1 / 3 <= noise.high + 0.05
    assert noise.value < 0.55
    assert strong.chance_uniform == pytest.approx(1 / 3)
    assert (frame.label == "colour").all() and (frame.score == "accuracy").all() and frame.converged.all()
    assert (frame.n_train + frame.n_validation + frame.n_test == N).all() and (frame.n_test == N / 5).all()


def test_permuted_control_is_at_chance_and_shows_memory_on_train():
    frame = fit_probe(planted(channels=150, strength=(4.0, 0.0)), "colour", penalties=[1e-3]).table
    assert (frame.control_value < 0.6).all()
    assert (frame.control_train_value > 0.9).all()  # 150 columns, 160 rows: everything can be memorised
    assert frame.selectivity.to_list() == pytest.approx((frame.value - frame.control_value).to_list())
    without = fit_probe(planted(), "colour", control=False).table
    assert without.control_value.isna().all() and without.selectivity.isna().all()


def test_control_by_types_measures_capacity():
    """A probe that sees which type it has can memorise any labelling of the types."""
    rng = np.random.default_rng(0)
    types = rng.integers(12, size=400)
    values = np.eye(12)[types] + 0.05 * rng.normal(size=(400, 12))
    features = xr.DataArray(values, dims=("sample", "channel"), coords={"parity": ("sample", types % 2)})
    by_type = fit_probe(features, "parity", types=types, penalties=[0.1]).table.iloc[0]
    permuted = fit_probe(features, "parity", penalties=[0.1]).table.iloc[0]
    assert by_type.value == 1 and by_type.control_value == 1 and by_type.selectivity == 0
    assert permuted.control_value < 0.7


def test_agrees_with_a_plain_pipeline():
    features = planted(strength=(1.0, 0.3))
    frame = fit_probe(features, "colour", penalties=[2.0], seed=3).table
    fitted, test = split(features, "colour", seed=3)
    for _, row in frame.iterrows():
        x, y = features.sel(timestep=row.timestep).values, features.colour.values
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-8, max_iter=5000)).fit(x[fitted], y[fitted])
        guess = plain.predict(x[test])
        assert row.value == pytest.approx(np.mean(guess == y[test]))
        assert row.balanced_accuracy == pytest.approx(balanced_accuracy_score(y[test], guess))
        majority = pd.Series(y[fitted]).mode()[0]
        assert row.chance == pytest.approx(np.mean(y[test] == majority))


def test_penalty_is_chosen_on_validation_only():
    features = planted(n=150, channels=60, strength=(1.2, 0.0))
    penalties = [1e-3, 1.0, 1e3]
    row = fit_probe(features, "colour", penalties=penalties).table.set_index("timestep").loc[10]
    folds = split_folds(np.unique(features.colour, return_inverse=True)[1], np.arange(150))
    x, y = features.sel(timestep=10).values, features.colour.values
    scores = {
        p: make_pipeline(StandardScaler(), LogisticRegression(C=1 / p, tol=1e-8, max_iter=5000))
        .fit(x[folds > 1], y[folds > 1])
        .score(x[folds == 1], y[folds == 1])
        for p in penalties
    }
    assert row.penalty == max(p for p in penalties if scores[p] == max(scores.values()))
    assert len(set(scores.values())) > 1
    # what happens to the test rows cannot move the choice
    x[folds == 0] = 1e6
    assert fit_probe(features, "colour", penalties=penalties).table.set_index("timestep").loc[10].penalty == row.penalty


def test_ridge_for_quantities():
    features = planted()
    frame = fit_probe(features, "area", penalties=[5.0]).table.set_index("timestep")
    assert (frame.score == "r2").all() and (frame.chance == 0).all()
    fitted, test = split(features, "area")
    for step in frame.index:
        x, y = features.sel(timestep=step).values, features.area.values
        plain = make_pipeline(StandardScaler(), Ridge(alpha=5.0)).fit(x[fitted], y[fitted])
        assert frame.value[step] == pytest.approx(r2_score(y[test], plain.predict(x[test])))
    assert frame.low[10] > 0.8 and frame.low[10] < frame.value[10] < frame.high[10]
    assert frame.value[900] < 0.15 and frame.control_value.max() < 0.15


def test_auto_takes_whole_numbers_for_classes_even_with_gaps():
    features = planted()
    counts = np.random.default_rng(0).integers(1, 4, size=N).astype(float)
    counts[:5] = np.nan
    frame = fit_probe(features, counts).table
    assert (frame.score == "accuracy").all() and (frame.n_classes == 3).all() and (frame.label == "label").all()
    assert (fit_probe(features, np.arange(N)).table.score == "r2").all()
    assert (fit_probe(features, counts, task="regression").table.score == "r2").all()


@pytest.mark.parametrize("missing", [None, "", np.nan])
def test_missing_labels_are_dropped_and_counted(missing):
    features = planted()
    labels = features.colour.values.astype(object)
    labels[::4] = missing
    frame = fit_probe(features, labels).table
    kept = features.isel(sample=np.arange(N) % 4 != 0)
    assert (frame.n_dropped == 50).all()
    assert (frame.n_train + frame.n_validation + frame.n_test == 150).all()
    assert frame.value.to_list() == fit_probe(kept, "colour").table.value.to_list()


@pytest.mark.parametrize("missing", [None, "", np.nan, np.inf, -np.inf])
def test_a_gap_leaves_numbers_numbers(missing):
    features = planted()
    area = features.area.values.astype(object)
    area[::4] = missing
    frame = fit_probe(features, area).table
    kept = features.isel(sample=np.arange(N) % 4 != 0)
    assert (frame.score == "r2").all() and (frame.n_dropped == 50).all()
    assert frame.value.to_list() == fit_probe(kept, "area").table.value.to_list()


def test_objects_without_the_attribute_are_no_class():
    masks = np.zeros((3, 8, 8), bool)
    masks[0, :4, :4] = masks[1, 4:, 4:] = masks[2, :4, 4:] = True
    objects = ({"kind": "cat"}, {"kind": None}, {"name": "x"})
    found = patch_labels([Sample("a", lambda: None, masks=lambda: masks, objects=objects)], "kind", (2, 2), (8, 8))
    assert found.tolist() == [[["cat", ""], ["background", ""]]]


def test_label_array_is_aligned_by_sample():
    features = planted()
    shuffled = features.colour.isel(sample=np.random.default_rng(0).permutation(N))
    pd.testing.assert_frame_equal(fit_probe(features, shuffled).table, fit_probe(features, "colour").table)
    with pytest.raises(ValueError, match="no entry for 1 samples, such as 's000'"):
        fit_probe(features, features.colour[1:])


def test_groups_are_never_split_and_widen_the_interval():
    groups = np.repeat(np.arange(60), 4)
    colour = np.random.default_rng(0).integers(3, size=60)[groups]
    folds = split_folds(colour, groups)
    assert all(len(np.unique(folds[groups == g])) == 1 for g in range(60))
    for fold in range(5):
        assert np.bincount(colour[folds == fold]).min() >= 8
    # each scene four times: ungrouped, the test scenes were seen in training
    scenes = np.random.default_rng(1).normal(size=(60, 100))
    features = xr.DataArray(scenes[groups], dims=("sample", "channel"), coords={"colour": ("sample", colour)})
    leaked, honest = fit_probe(features, "colour").table.iloc[0], fit_probe(features, "colour", groups=groups).table.iloc[0]
    assert leaked.value > 0.9 and honest.value < 0.65
    assert honest.high - honest.low > 0.3


def test_repeated_sample_ids_stay_together():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(60), 4)
    features = xr.DataArray(rng.normal(size=(60, 100))[ids], dims=("sample", "channel"), coords={"sample": ids})
    assert fit_probe(features, rng.integers(3, size=60)[ids]).table.value[0] < 0.65


def test_repeated_ids_are_types_of_the_control():
    features = planted(n=40).isel(timestep=0).assign_coords(sample=np.repeat(np.arange(20), 2))
    control = Problem.of(features, "colour").control.reshape(20, 2)
    assert (control[:, 0] == control[:, 1]).all() and len(np.unique(control)) > 1


def test_folds_are_stratified_and_follow_the_seed():
    target = np.repeat([0, 1, 2], [50, 25, 3])
    folds = split_folds(target, np.arange(78), seed=1)
    assert sorted(np.bincount(folds)) == [15, 15, 16, 16, 16]
    for kind, expected in ((0, 10), (1, 5)):
        assert np.abs(np.bincount(folds[target == kind], minlength=5) - expected).max() <= 1
    assert (folds == split_folds(target, np.arange(78), seed=1)).all()
    assert (folds != split_folds(target, np.arange(78), seed=2)).any()
    quantity = np.random.default_rng(0).exponential(size=500)
    means = [quantity[split_folds(quantity, np.arange(500)) == k].mean() for k in range(5)]
    assert np.ptp(means) < 0.1


def test_pooling():
    features = planted(side=4, strength=(20.0, 0.0))
    mean = fit_probe(features, "colour").table
    pd.testing.assert_frame_equal(mean, fit_probe(features.mean(("y", "x")).astype(np.float32), "colour").table)
    assert (mean.n_features == 6).all()
    flat = fit_probe(features, "colour", pool="flatten", penalties=[100.0]).table
    assert (flat.n_features == 96).all()
    matrix = pool_features(features, "flatten").transpose("sample", "timestep", "channel").values
    np.testing.assert_array_equal(matrix, features.values.reshape(N, 2, -1).astype(np.float32))
    with pytest.raises(ValueError, match="'mean', 'flatten' or 'patches'"):
        fit_probe(features, "colour", pool="max")
    with pytest.raises(ValueError, match="needs the dimensions y and x"):
        fit_probe(planted(), "colour", pool="patches")


def segmentation(n=30, side=5, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=(n, side, side))
    values = rng.normal(size=(n, 4, side, side)) + 2.0 * np.eye(4)[truth].transpose(0, 3, 1, 2)
    return xr.DataArray(values, dims=("sample", "channel", "y", "x")), truth


def test_patches_are_rows_of_their_sample():
    features, truth = segmentation()
    row = fit_probe(features, truth, pool="patches", penalties=[1.0]).table.iloc[0]
    assert row.n_test == 6 * 25 and row.n_features == 4
    strata = np.array([np.bincount(t.ravel()).argmax() for t in truth])
    folds = np.repeat(split_folds(strata, np.arange(30)), 25)
    x, y = features.transpose("sample", "y", "x", "channel").values.reshape(-1, 4), truth.ravel()
    plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8)).fit(x[folds > 0], y[folds > 0])
    guess = plain.predict(x[folds == 0])
    assert row.value == pytest.approx(np.mean(guess == y[folds == 0]))
    assert row.miou == pytest.approx(jaccard_score(y[folds == 0], guess, average="macro"))
    majority = np.full_like(guess, np.bincount(y[folds > 0]).argmax())
    assert row.miou_chance == pytest.approx(jaccard_score(y[folds == 0], majority, average="macro"))
    # the interval over images, by drawing images and scoring each draw with scikit-learn
    images, rng = np.repeat(np.arange(6), 25), np.random.default_rng(0)
    drawn = [np.concatenate([np.flatnonzero(images == i) for i in rng.integers(6, size=6)]) for _ in range(300)]
    draws = [jaccard_score(y[folds == 0][rows], guess[rows], average="macro") for rows in drawn]
    assert (row.miou_low, row.miou_high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.015)
    # unlabelled patches are dropped one by one, and the axes are read by name
    holed = truth.astype(float)
    holed[:, 0, :] = np.nan
    turned = fit_probe(features.transpose("x", "sample", "channel", "y"), holed, pool="patches").table.iloc[0]
    assert turned.n_dropped == 30 * 5 and turned.value > 0.75
    whole = fit_probe(features, np.arange(30) % 2, pool="patches").table.iloc[0]
    assert whole.n_test == 150 and whole.value < 0.7


def test_intervals_of_patches_are_clustered():
    """Patches that are right or wrong together make a wider interval than as many independent ones."""
    rng = np.random.default_rng(0)
    easy = rng.normal(size=(40, 1, 1, 1)) > 0
    truth = rng.integers(2, size=(40, 6, 6))
    values = np.where(easy, 8.0 * (truth[:, None] - 0.5), 0) + 0.1 * rng.normal(size=(40, 1, 6, 6))
    row = fit_probe(xr.DataArray(values, dims=("sample", "channel", "y", "x")), truth, pool="patches").table.iloc[0]
    independent = 2 * 1.96 * np.sqrt(row.value * (1 - row.value) / row.n_test)
    assert row.high - row.low > 2 * independent


def test_all_right_has_wilsons_interval():
    features = planted(strength=(50.0, 50.0))
    row = fit_probe(features, "colour").table.iloc[0]
    assert row.value == 1 and row.high == 1 and row.low == pytest.approx(40 / (40 + 1.959964**2))


def test_workers_have_one_blas_thread(monkeypatch):
    seen = []
    inner = LinearProbe.fit

    def spy(self, x, y):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return inner(self, x, y)

    monkeypatch.setattr(LinearProbe, "fit", spy)
    with threadpool_limits(limits=2):
        before = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        fit_probe(planted(), "colour", n_jobs=1)
    if before == {1}:
        pytest.skip("this BLAS cannot have two threads, so one proves nothing")
    assert seen and set(seen) == {1}


def test_processes_change_nothing():
    features = planted(n=80, timesteps=(1, 2, 3, 4), strength=(2.0, 1.0, 0.5, 0.0))
    pd.testing.assert_frame_equal(fit_probe(features, "colour", n_jobs=2).table, fit_probe(features, "colour", n_jobs=1).table)


def test_workers_end_with_their_parent(tmp_path):
    code = f"""
import os, pathlib, time
import numpy as np, xarray as xr
from diffprobe import fit_probe

class Slow:
    def fit(self, x, y):
        (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()
        time.sleep(60)

features = xr.DataArray(np.ones((40, 4, 2), np.float32), dims=("sample", "timestep", "channel"))
fit_probe(features, np.arange(40) % 2, estimator=Slow(), n_jobs=2)
"""

    def alive():
        found = []
        for path in tmp_path.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name), 0)
                found.append(path.name)
        return found

    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        assert within(120, lambda: len(alive()) == 2)
        parent.kill()
        parent.wait(10)
        assert within(30, lambda: not alive()), alive()


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_probe_on_one_core_goes_on():
    code = """
import time
import numpy as np, xarray as xr
from diffprobe import fit_probe
x = xr.DataArray(np.random.default_rng(0).normal(size=(40, 3)), dims=("sample", "channel"))
print(len(fit_probe(x, np.arange(40) % 2, n_jobs=-1).table))
time.sleep(0.7)
print("here")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"LOKY_MAX_CPU_COUNT": "1"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "here"], done.stderr


def test_every_combination_is_a_row_and_lazy_arrays_are_read():
    features = planted(n=60).expand_dims(conditioning=["null", "caption"]).chunk(sample=30)
    frame = fit_probe(features.assign_coords(guidance=7.5), "colour", n_jobs=1).table
    places = {("null", 10), ("null", 900), ("caption", 10), ("caption", 900)}
    assert set(zip(frame.conditioning, frame.timestep, strict=True)) == places
    assert (frame.guidance == 7.5).all()
    single = fit_probe(planted(n=60).sel(timestep=10), "colour").table
    assert len(single) == 1 and single.timestep[0] == 10


def test_non_convergence_is_a_column_not_a_warning():
    frame = fit_probe(planted(), "colour", max_iter=2).table
    assert not frame.converged.any() and (frame.iterations <= 4).all()


def test_seed_repeats_and_matters():
    features = planted(strength=(1.0, 0.0))
    pd.testing.assert_frame_equal(fit_probe(features, "colour", seed=5).table, fit_probe(features, "colour", seed=5).table)
    assert (
        fit_probe(features, "colour", seed=5).table.value.to_list()
        != fit_probe(features, "colour", seed=6).table.value.to_list()
    )


def test_table_over_sites_and_labels():
    sites = {"down.0": planted(n=80), "mid": planted(n=80, strength=(0.0, 0.0))}
    frame = probe_table(sites.__getitem__, list(sites), ["colour", "area"], fit_probe, n_jobs=1)
    assert frame.columns[0] == "site"
    assert frame.groupby(["site", "label"], sort=False).size().to_dict() == {
        (site, label): 2 for site in sites for label in ("colour", "area")
    }
    alone = fit_probe(sites["mid"], "colour", n_jobs=1).table
    pd.testing.assert_series_equal(
        frame[(frame.site == "mid") & (frame.label == "colour")].value.reset_index(drop=True), alone.value
    )


def test_unknown_label_names_the_closest():
    message = r"Label 'color' is not among the samples' labels \(area, colour, one\)\. Did you mean 'colour'\?"
    with pytest.raises(ValueError, match=message):
        fit_probe(planted(), "color")
    told = planted()
    told = told.assign_coords(status=("sample", np.ones(told.sizes["sample"], np.uint8)))  # as a store has it beside its labels
    for name in ("color", "status"):
        with pytest.raises(ValueError, match=r"samples' labels \(area, colour, one\)"):
            fit_probe(told, name)


def test_other_refusals():
    features = planted()
    with pytest.raises(ValueError, match="holds only 'same' in 200 known entries"):
        fit_probe(features, "one")
    with pytest.raises(ValueError, match=r"shape \(3,\); these features need \(200,\)"):
        fit_probe(features, [1, 2, 3])
    with pytest.raises(ValueError, match="holds words such as"):
        fit_probe(features, "colour", task="regression")
    with pytest.raises(ValueError, match="'classification', 'regression' or 'auto'"):
        fit_probe(features, "colour", task="tree")
    with pytest.raises(ValueError, match="known for 6 independent samples; a split needs at least 10"):
        fit_probe(features[:6], "colour")
    with pytest.raises(ValueError, match="sample is not in"):
        fit_probe(features.rename(sample="image"), "colour")
    with pytest.raises(ValueError, match=r"`groups` needs one id per sample, shape \(200,\); got shape \(2,\)"):
        fit_probe(features, "colour", groups=[1, 2])
    features[3, 1, 0] = np.nan
    with pytest.raises(ValueError, match="timestep=900 are not finite in 1 of 200 rows"):
        fit_probe(features, "colour")


@pytest.mark.parametrize("standardise", [True, False])
def test_gram_ridge_is_sklearns(standardise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)) + 1000  # far from zero: moments must be taken with care
    x[:, 4] = 7.0  # a constant column
    y = x[:, :3] + 5 * rng.normal(size=(400, 3))
    train, held_out = GramRidge(standardise), GramRidge(standardise)
    for rows in np.array_split(np.arange(300), 7):
        train.update(x[rows], y[rows])
    held_out.update(x[300:], y[300:])
    assert train.n == 300
    for penalty in (0.01, 1.0, 300.0):
        plain = make_pipeline(StandardScaler(with_std=standardise), Ridge(alpha=penalty)).fit(x[:300], y[:300])
        weights, intercept = train.solve(penalty)
        np.testing.assert_allclose(x[300:] @ weights + intercept, plain.predict(x[300:]), atol=1e-6)
        oracle = r2_score(y[300:], plain.predict(x[300:]), multioutput="raw_values")
        np.testing.assert_allclose(train.r2(penalty, held_out), oracle, atol=1e-6)


def test_gram_ridge_takes_more_rows_after_a_solution():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 3)), rng.normal(size=100)
    grown, whole = GramRidge(), GramRidge()
    grown.update(x[:50], y[:50])
    first = grown.solve(1.0)[0]
    grown.update(x[50:], y[50:])
    whole.update(x, y)
    np.testing.assert_allclose(grown.solve(1.0)[0], whole.solve(1.0)[0], atol=1e-10)
    assert np.abs(first - grown.solve(1.0)[0]).max() > 1e-3


def test_every_fold_is_the_test_fold_once():
    features = planted(strength=(1.5, 0.0)).sel(timestep=10)
    row = fit_probe(features, "colour", penalties=[10.0], cross_fit=True, keep_rows=True).table.iloc[0]
    x, y = features.values, features.colour.values
    folds = split_folds(np.unique(y, return_inverse=True)[1], np.arange(N))
    right = np.zeros(N)
    for fold in range(5):
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)).fit(
            x[folds != fold], y[folds != fold]
        )
        right[folds == fold] = plain.predict(x[folds == fold]) == y[folds == fold]
    assert row.n_test == N and row.value == pytest.approx(right.mean())
    np.testing.assert_array_equal(row.rows, right)
    one = fit_probe(features, "colour", penalties=[10.0]).table.iloc[0]
    assert row.high - row.low < 0.7 * (one.high - one.low)
    area = fit_probe(features, "area", cross_fit=True, keep_rows=True).table.iloc[0]
    assert area.value > 0.8 and (area.rows <= 0).all() and area.control_value < 0.1


def test_more_columns_than_rows_change_no_answer():
    """The fit runs along the rows' principal axes; with a squared norm that is the same problem."""
    features = planted(channels=300, strength=(2.0, 0.0), n=100).sel(timestep=10)
    for label in (features.colour.values, np.where(features.colour == "red", "red", "not")):  # three classes and two
        fitted, test = (np.isin(np.arange(100), rows) for rows in (np.arange(70), np.arange(70, 100)))
        codes = np.unique(label, return_inverse=True)[1]
        model = LinearProbe("classification", 3.0)
        assert fit_quietly(model, features.values[fitted], codes[fitted])
        plain = LogisticRegression(C=1 / 3, tol=1e-9, max_iter=20_000)
        plain = make_pipeline(StandardScaler(), plain).fit(features.values[fitted], codes[fitted])
        assert (model.predict(features.values[test]) == plain.predict(features.values[test])).all()
        readout = model.readout()
        assert (readout.predict(features.values[test]) == plain.predict(features.values[test])).all()
        weights = readout.weights * plain[0].scale_
        np.testing.assert_allclose(weights, plain[-1].coef_, atol=2e-4)
        np.testing.assert_allclose(readout.intercept + readout.weights @ plain[0].mean_, plain[-1].intercept_, atol=2e-4)


def test_weaker_penalties_are_tried_until_two_score_below_the_best():
    asked = []
    curve = {100.0: 0.5, 10.0: 0.8, 1.0: 0.7, 0.1: 0.75, 0.01: 0.9}
    assert best_choice((asked.append(p) or (p, v)) for p, v in curve.items()) == 10.0
    assert asked == [100.0, 10.0, 1.0, 0.1]


def test_streaming_is_ridge_on_indicators_and_reads_blocks_only(monkeypatch):
    from diffprobe.probes import streaming

    features = planted(side=3, strength=(6.0, 0.0))
    held = []
    inner = streaming.protocol.matrix

    def spy(block):
        held.append(block.sizes["sample"])
        return inner(block)

    monkeypatch.setattr(streaming.protocol, "matrix", spy)
    frame = stream_probe(features, "colour", penalties=[20.0], block=16).table.set_index("timestep")
    assert max(held) == 16, "never more than a block is in memory"
    fitted, test = split(features, "colour")
    for step in (10, 900):
        x, y = features.sel(timestep=step).mean(("y", "x")).values.astype(np.float32), features.colour.values
        classes = np.unique(y)
        plain = make_pipeline(StandardScaler(), Ridge(alpha=20.0)).fit(x[fitted], y[fitted][:, None] == classes)
        right = classes[plain.predict(x[test]).argmax(1)] == y[test]
        assert frame.value[step] == pytest.approx(right.mean())
    assert frame.low[10] > frame.chance[10] and frame.value[900] < 0.6 and (frame.control_value < 0.6).all()
    assert list(frame.reset_index().columns) == list(fit_probe(features, "colour", n_jobs=1).table.columns)
    area = stream_probe(features, "area", penalties=[5.0]).table.set_index("timestep")
    pooled = fit_probe(features, "area", penalties=[5.0], n_jobs=1).table.set_index("timestep")
    np.testing.assert_allclose(area.value, pooled.value, atol=1e-6)
    np.testing.assert_allclose(area.control_value, pooled.control_value, atol=1e-6)


def test_streaming_chooses_its_penalty_and_reads_patches():
    features, truth = segmentation(n=60)
    row = stream_probe(features, truth, pool="patches", block=7).table.iloc[0]
    assert row.value > 0.75 and row.n_test == 12 * 25 and row.miou > 0.6
    weak = planted(channels=100, strength=(1.0, 0.0))
    assert (stream_probe(weak, "colour").table.penalty >= 100).all()
    bad = planted()
    bad[5, 0, 0] = np.inf
    with pytest.raises(ValueError, match="timestep=10 are not finite in 1 of"):
        stream_probe(bad, "colour")


def test_torch_tensors_give_the_same_probe():
    """scikit-learn's array API, whose switch scipy reads when it is first imported: hence a process of its own."""
    code = """
import numpy as np, xarray as xr
from diffprobe.probes.linear import fit_probe
rng = np.random.default_rng(0)
y = rng.integers(3, size=150)
x = xr.DataArray(rng.normal(size=(150, 8)) + 2 * np.eye(3, 8)[y], dims=("sample", "channel"))
for label in (y, y * 1.5 + rng.normal(size=150)):
    plain, torch = (fit_probe(x, label, device=d, penalties=[1.0], n_jobs=1).table.iloc[0] for d in (None, "cpu"))
    assert abs(plain.value - torch.value) < 1e-6 and torch.converged, (plain, torch)
"""
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
    if os.environ.get("SCIPY_ARRAY_API") != "1":
        with pytest.raises(ValueError, match="set SCIPY_ARRAY_API=1 before Python starts"):
            fit_probe(planted(), "colour", device="cpu", n_jobs=1)


def test_patches_are_labelled_by_what_covers_most_of_them():
    masks = np.zeros((3, 8, 8), bool)
    masks[0, :4, :4] = True  # a star fills the upper left patch
    masks[1, 0, 4:] = True  # another star: a quarter of the upper right patch
    masks[2, 1:4, 4:7] = True  # a circle: 9 / 16 of it
    masks[1, 4:, :1] = True  # a quarter of the lower left patch: background
    objects = ({"shape": "star"}, {"shape": "star"}, {"shape": "circle"})
    sample = Sample("a", lambda: None, masks=lambda: masks, objects=objects)
    labels = patch_labels([sample], "shape", (2, 2), (8, 8))
    assert labels.tolist() == [[["star", "circle"], ["background", "background"]]]
    with pytest.raises(ValueError, match=r"Objects have no 'shap'; they have shape\. Did you mean 'shape'"):
        patch_labels([sample], "shap", (2, 2), (8, 8))
    with pytest.raises(ValueError, match="0 masks and 3 described objects"):
        patch_labels([Sample("a", lambda: None, objects=objects)], "shape", (2, 2), (8, 8))


def test_drawn_masks_are_read_from_the_pixels_themselves():
    """Features that are the object masks give the patches' classes; the store's dataset and size are used."""
    dataset = load_dataset("shapes:40?objects=1")
    size = (64, 64)
    truth = np.array([s.objects[0]["shape"] for s in iterate(dataset)])
    covered = np.stack([fit_masks(s.masks(), size)[0] for s in iterate(dataset)]).reshape(40, 8, 8, 8, 8).mean((2, 4))
    codes = np.unique(truth, return_inverse=True)[1]
    values = np.einsum("sc,syx->scyx", np.eye(codes.max() + 1)[codes], covered)
    features = xr.DataArray(values, dims=("sample", "channel", "y", "x"), coords={"sample": [s.id for s in iterate(dataset)]})
    request = {"fingerprint": dataset.fingerprint(), "dataset": dataset.name, "resolution": list(size), "fit": "crop"}
    tree = xr.DataTree()
    tree.attrs["diffprobe"] = json.dumps({"data": dataset.spec, "request": request})
    found = with_mask_labels(features, tree, "shape")
    assert found.equals(with_mask_labels(features, tree, "mask:shape")) and "shape" not in found.coords
    share = (found["mask:shape"].values != "background").mean()
    assert 0.02 < share < 0.3
    assert ((covered > 0.5) == (found["mask:shape"].values != "background")).mean() > 0.999  # but for ties at one half
    row = fit_probe(found, "mask:shape", pool="patches", penalties=[0.01], n_jobs=1).table.iloc[0]
    assert row.label == "mask:shape" and row.miou > 0.8
    tree.attrs["diffprobe"] = json.dumps({"data": dataset.spec, "request": {**request, "fingerprint": "other"}})
    with pytest.raises(ValueError, match="its content differs"):
        with_mask_labels(features, tree, "mask:shape")


def test_a_table_keeps_its_origin(tmp_path):
    frame = fit_probe(planted(n=60), "colour", n_jobs=1).table
    attributes = {"request": {"model": "m", "weights": "w", "seed": 0}, "random_weights": 7}
    path = tmp_path / "a.zarr.linear.csv"
    save_table(frame, path, "/somewhere/a.zarr", attributes, {"label": "colour"})
    origin = json.loads((tmp_path / "a.zarr.linear.json").read_text())
    assert len(pd.read_csv(path)) == len(frame)
    assert origin["store"] == "a.zarr" and origin["random_weights"] == 7 and origin["options"] == {"label": "colour"}
    other = {"request": {**attributes["request"], "seed": 1}}
    save_table(frame, tmp_path / "b.csv", "a.zarr", other, {})
    assert json.loads((tmp_path / "b.json").read_text())["request"] != origin["request"]


def test_a_row_of_several_turns_speaks_for_all_of_them():
    features = planted(n=40).isel(timestep=0)
    problem = Problem.of(features, "colour")
    turns = [
        Turn(problem.parts(k), problem.target[problem.parts(k)[2]], 10.0**k, (0.1 * k, 0.2 * k), k != 1, k)
        for k in range(FOLDS)
    ]
    row = make_row(problem, Settings("penalty", (1.0,), True, 0, 50), turns, {}, 6)
    assert row["converged"] is False and row["iterations"] == FOLDS - 1 and row["penalty"] == 100
    assert (row["control_value"], row["control_train_value"]) == (pytest.approx(0.2), pytest.approx(0.4))
    assert row["value"] == 1 and row["n_test"] == 40


def test_one_fit_that_did_not_converge_is_remembered():
    """The choice among penalties did not converge; the refit did."""
    fits = []

    class Late(BaseEstimator):
        def __init__(self, c=1.0):
            self.c = c

        def fit(self, x, y):
            fits.append(self.c)
            if len(fits) == 1:
                warnings.warn("not yet", ConvergenceWarning, stacklevel=1)

        def predict(self, x):
            return np.zeros(len(x), np.int64)

    table = fit_probe(planted(n=60).sel(timestep=10), "colour", estimator=Late(), choices={"c": (2.0, 1.0)}, n_jobs=1).table
    assert fits == [2.0, 1.0, 2.0, 2.0] and not table.converged[0] and table.c[0] == 2.0


def test_the_control_is_fitted_on_known_labels_only():
    seen = []

    class Spy:
        def fit(self, x, y):
            seen.append(x[:, 0].tolist())

        def predict(self, x):
            return np.zeros(len(x), np.int64)

    labels = np.random.default_rng(0).integers(3, size=(40, 4, 4)).astype(float)
    labels[:, 0] = np.nan  # of every image other patches are unknown in the control than in the task
    labels[::2, 1] = np.nan
    numbers = np.arange(40 * 16).reshape(40, 1, 4, 4).astype(float)  # every row says which one it is
    features = xr.DataArray(numbers, dims=("sample", "channel", "y", "x"))
    fit_probe(features, labels, estimator=Spy(), pool="patches", n_jobs=1)
    problem = Problem.of(features, labels, pool="patches")
    fitted = problem.parts()[0] | problem.parts()[1]
    assert (problem.keep != problem.control_keep).any()
    assert seen == [np.flatnonzero(fitted).tolist(), np.flatnonzero(fitted & problem.control_keep).tolist()]


def test_the_result_predicts_and_points():
    features = planted(strength=(6.0, 0.0))
    probes = fit_probe(features, "colour", n_jobs=1)
    assert len(probes.estimators_) == len(probes.table) == 2
    answers = probes.predict(features)
    assert answers.dims == ("sample", "timestep") and answers.name == "colour"
    assert (answers.sel(timestep=10) == features.colour).mean() > 0.95
    # one timestep's probe on every timestep, and features in other units
    one = fit_probe(1000 * features.sel(timestep=10) + 5, "colour")
    assert (one.predict(1000 * features + 5).sel(timestep=10) == answers.sel(timestep=10)).mean() > 0.98
    for code, name in enumerate(one.classes):  # "blue", "green" and "red" lie on the channels 2, 1 and 0
        assert one.direction(name).argmax() == 2 - code and np.linalg.norm(one.direction(name)) == pytest.approx(1)
    two = fit_probe(features.sel(timestep=10), np.where(features.colour == "red", "red", "not"))
    np.testing.assert_array_equal(two.direction("red"), -two.direction("not"))
    np.testing.assert_array_equal(two.direction(), two.direction("red"))
    area = fit_probe(features, "area", n_jobs=1)
    np.testing.assert_allclose(area.direction(timestep=10)[3], 1, atol=0.02)
    plain = stream_probe(features, "area", penalties=[1.0]).predict(features)
    np.testing.assert_allclose(fit_probe(features, "area", penalties=[1.0], n_jobs=1).predict(features), plain, atol=1e-3)
    streamed = stream_probe(features, "colour", penalties=[1.0]).predict(features)
    assert (streamed.sel(timestep=10) == features.colour).mean() > 0.95
    alone = fit_probe(features.expand_dims(conditioning=["null"]), "colour", n_jobs=1)
    np.testing.assert_array_equal(alone.direction("red", timestep=10), probes.direction("red", timestep=10))
    with pytest.raises(ValueError, match="'pink' is not one of 'blue', 'green', 'red'"):
        one.direction("pink")
    with pytest.raises(ValueError, match="2 probes were fitted at the place that is not named; there are: timestep=10"):
        probes.direction("red")
    with pytest.raises(ValueError, match=r"0 probes were fitted at .*50"):
        probes.predict(features.assign_coords(timestep=[10, 50]))
    with pytest.raises(ValueError, match="keep_estimators=True"):
        fit_probe(features, "colour", n_jobs=1, keep_estimators=False).predict(features)


def test_patches_are_predicted_in_their_places():
    features, truth = segmentation(n=60)
    probes = fit_probe(features, truth, pool="patches", penalties=[1.0])
    answers = probes.predict(features)
    assert answers.dims == ("sample", "y", "x") and (answers.values.astype(int) == truth).mean() > 0.8
    # a store's own patches are the same rows
    patches = pool_features(features, "patches")
    again = fit_probe(patches, truth.reshape(60, -1), pool="patches", penalties=[1.0])
    pd.testing.assert_frame_equal(again.table, probes.table)


def test_plain_arrays_are_features():
    features = planted(side=2).sel(timestep=10)
    label = features.colour.values
    pd.testing.assert_frame_equal(
        fit_probe(features.values, label).table, fit_probe(features.drop_vars(["timestep", "sample"]), label).table
    )
    with pytest.raises(ValueError, match=r"\(sample, channel\) or \(sample, channel, y, x\); got shape \(3, 4, 5\)"):
        fit_probe(np.zeros((3, 4, 5)), [1, 2, 3])


def test_a_split_of_ones_own():
    features = planted().sel(timestep=10)
    folds = split_folds(np.unique(features.colour, return_inverse=True)[1], np.arange(N))
    names = np.array(["test", "validation", "train", "train", "train"])[folds]
    drawn = fit_probe(features, "colour").table
    pd.testing.assert_frame_equal(fit_probe(features, "colour", split=names).table, drawn)
    kept = features.assign_coords(part=("sample", np.where(folds == 4, "", names)))
    row = fit_probe(kept, "colour", split="part").table.iloc[0]
    assert row.n_train == drawn.n_train[0] - (folds == 4).sum() and row.n_test == drawn.n_test[0]
    without = np.where(folds == 1, "train", names)
    assert fit_probe(features, "colour", split=without, penalties=[1.0]).table.n_validation[0] == 0
    with pytest.raises(ValueError, match="no 'validation' rows to choose 'penalty' on"):
        fit_probe(features, "colour", split=without)
    with pytest.raises(ValueError, match="none is 'test', it holds train, validation"):
        fit_probe(features, "colour", split=np.where(folds == 0, "train", names))
    with pytest.raises(ValueError, match="samples or groups stand in several parts"):
        fit_probe(features, "colour", split=names, groups=np.arange(N) // 4)
    with pytest.raises(ValueError, match="cross_fit=True deals the folds itself"):
        fit_probe(features, "colour", split=names, cross_fit=True)


def test_an_estimator_of_ones_own():
    features = planted(strength=(2.0, 0.0))
    plain = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000))
    options = {"seed": 3, "n_jobs": 1, "keep_rows": True}
    mine = fit_probe(features, "colour", estimator=plain, choices={"logisticregression__C": (0.1, 1.0, 10.0)}, **options)
    ours = fit_probe(features, "colour", penalties=[10.0, 1.0, 0.1], **options)
    same = ["value", "low", "high", "chance", "control_value", "control_train_value", "n_test"]
    pd.testing.assert_frame_equal(mine.table[same], ours.table[same])
    assert mine.table.C.to_list() == (1 / ours.table.penalty).to_list()
    assert (mine.predict(features) == ours.predict(features)).all() and not hasattr(plain, "classes_")
    fixed = fit_probe(features, "colour", estimator=plain, n_jobs=1).table
    assert "C" not in fixed and fixed.value[0] > 0.7
    with pytest.raises(ValueError, match="A direction needs a linear probe; Pipeline has no `weights`"):
        mine.direction("red", timestep=10)
    with pytest.raises(ValueError, match="names one parameter of the estimator; got a, b"):
        fit_probe(features, "colour", estimator=plain, choices={"a": (1,), "b": (2,)})
    with pytest.raises(ValueError, match="the linear probe's are `penalties`"):
        fit_probe(features, "colour", choices={"C": (1,)})


def test_a_class_that_a_resample_lacks_does_not_count_there():
    truth, images = np.array([0] * 12 + [1, 1]), np.repeat(np.arange(7), 2)  # one image alone has the second class
    found = _overlap(truth, truth, images, np.array([True, True]), Settings("k", (1,), False, 0, 200))
    assert found == {"miou": 1.0, "miou_low": 1.0, "miou_high": 1.0}


def test_a_table_is_written_whole_and_to_a_url(tmp_path, monkeypatch):
    files = fsspec.filesystem("memory")
    frame = fit_probe(planted(n=60), "colour", n_jobs=1).table
    monkeypatch.chdir(tmp_path)
    save_table(frame, "memory://bucket/a.csv", "memory://bucket/a.zarr", {"request": {}}, {})
    assert files.cat_file("/bucket/a.csv").decode() == frame.to_csv(index=False)
    assert json.loads(files.cat_file("/bucket/a.json"))["store"] == "a.zarr" and list(tmp_path.iterdir()) == []
    files.rm("/bucket", recursive=True)
    save_table(frame, tmp_path / "a.csv", "a.zarr", {"request": {}}, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: "cut " * 9)
        patch.setattr(Path, "write_text", full_after(1))
        save_table(frame, tmp_path / "a.csv", "a.zarr", {"request": {"seed": 1}}, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def full_after(count):
    """`Path.write_text` on a disk that is full after some files."""
    write, left = Path.write_text, iter(range(count))

    def written(self, *rest, **options):
        if next(left, None) is None:
            raise OSError("full")
        return write(self, *rest, **options)

    return written


def test_gram_ridge_refuses():
    gram = GramRidge()
    with pytest.raises(ValueError, match="at least 2 rows; 0"):
        gram.solve(1.0)
    gram.update(np.eye(3), np.ones(3))
    with pytest.raises(ValueError, match=r"\(features, targets\) = \(3, 1\); this one has \(2, 1\)"):
        gram.update(np.ones((4, 2)), np.ones(4))
    with pytest.raises(ValueError, match="non-finite"):
        gram.update(np.full((1, 3), np.inf), [1.0])
    with pytest.raises(ValueError, match="must be positive"):
        gram.solve(0.0)
