"""Nearest-neighbour probes on planted signals and against plain scikit-learn."""

import numpy as np
import pytest
import xarray as xr
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffprobe.probes.knn import knn_probe
from diffprobe.probes.linear import fit_probe
from diffprobe.probes.task import split_folds


def planted(n=200, seed=0):
    """Timestep 10 clusters by colour, 900 is noise; one channel is a thousand times larger than the others."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(3, size=n)
    values = rng.normal(size=(n, 2, 6))
    values[np.arange(n), 0, colour] += 4
    values[..., 5] *= 1000
    coords = {
        "sample": [f"s{i:03d}" for i in range(n)],
        "timestep": [10, 900],
        "colour": ("sample", np.array(["red", "green", "blue"])[colour]),
        "area": ("sample", values[:, 0, 0] + 0.1 * rng.normal(size=n)),
    }
    return xr.DataArray(values, dims=("sample", "timestep", "channel"), coords=coords)


def test_planted_clusters_are_found_and_noise_is_at_chance():
    frame = knn_probe(planted(), "colour", n_jobs=1).table.set_index("timestep")
    assert frame.value[10] > 0.85 and frame.low[10] > frame.chance[10]
    assert frame.value[900] < 0.55
    assert (frame.control_value < 0.55).all() and frame.converged.all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_agrees_with_a_plain_pipeline(metric):
    features = planted()
    row = knn_probe(features, "colour", k=[7], metric=metric, seed=2, n_jobs=1).table.set_index("timestep").loc[10]
    x, y = features.sel(timestep=10).values, features.colour.values
    folds = split_folds(np.unique(y, return_inverse=True)[1], np.arange(200), 2)
    plain = make_pipeline(StandardScaler(), KNeighborsClassifier(7, metric=metric)).fit(x[folds > 0], y[folds > 0])
    assert row.value == pytest.approx(plain.score(x[folds == 0], y[folds == 0])) and row.k == 7


def test_k_is_chosen_on_validation():
    features = planted().sel(timestep=10)
    ks = [1, 5, 80]
    row = knn_probe(features, "colour", k=ks).table.iloc[0]
    x, y = features.values, features.colour.values
    folds = split_folds(np.unique(y, return_inverse=True)[1], np.arange(200))
    scores = {}
    for k in ks:
        plain = make_pipeline(StandardScaler(), KNeighborsClassifier(k, metric="cosine")).fit(x[folds > 1], y[folds > 1])
        scores[k] = plain.score(x[folds == 1], y[folds == 1])
    assert len(set(scores.values())) > 1
    assert row.k == max(k for k in ks if scores[k] == max(scores.values()))


def test_quantities_are_the_neighbours_mean():
    features = planted().sel(timestep=10)
    row = knn_probe(features, "area", k=[5], metric="euclidean").table.iloc[0]
    folds = split_folds(features.area.values, np.arange(200))
    x, y = features.values, features.area.values
    plain = make_pipeline(StandardScaler(), KNeighborsRegressor(5)).fit(x[folds > 0], y[folds > 0])
    assert row.score == "r2" and row.value == pytest.approx(plain.score(x[folds == 0], y[folds == 0]))


def test_table_and_test_rows_are_those_of_the_linear_probe():
    near, linear = knn_probe(planted(), "colour", keep_rows=True).table, fit_probe(planted(), "colour", keep_rows=True).table
    assert [c for c in near.columns if c != "k"] == [c for c in linear.columns if c != "penalty"]
    for column in ("n_train", "n_validation", "n_test", "chance"):
        assert near[column].to_list() == linear[column].to_list()
    assert all(len(rows) == 40 for rows in near["rows"])


def test_refusals():
    features = planted()
    with pytest.raises(ValueError, match="'hamming' is not one of cosine, euclidean, manhattan"):
        knn_probe(features, "colour", metric="hamming")
    for k in ([], [0], [121]):
        with pytest.raises(ValueError, match="from 1 to the 120 training rows"):
            knn_probe(features, "colour", k=k)
