"""Principal components against scikit-learn, and planted outliers."""

import numpy as np
import pytest
import xarray as xr
from sklearn.decomposition import PCA

from diffprobe.probes.pca import outlier_tokens, pca_rgb


def maps(shape, seed=0, dims=("sample", "channel", "y", "x")):
    return xr.DataArray(np.random.default_rng(seed).normal(size=shape), dims=dims)


def planted(n=3, side=12, channels=16):
    """Left half, top half and a diagonal, each along its own channel direction, strongest first."""
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.normal(size=(channels, 3)))[0].T
    y, x = np.mgrid[:side, :side] / (side - 1)
    patterns = np.stack([(x < 0.5) * 6.0, (y < 0.5) * 3.0, np.sin(np.pi * x) * np.sin(np.pi * y)])
    clean = np.einsum("kyx,kc->cyx", patterns, directions)
    noisy = clean + 0.01 * rng.normal(size=(n, channels, side, side))
    return xr.DataArray(noisy, dims=("sample", "channel", "y", "x"), coords={"sample": [f"s{i}" for i in range(n)]}), patterns


def test_planted_patterns_become_the_colours_in_order():
    features, patterns = planted()
    colours = pca_rgb(features)
    assert colours.dims == ("sample", "y", "x", "rgb")
    assert colours.sample.values.tolist() == ["s0", "s1", "s2"]
    for k in range(2):
        correlation = np.corrcoef(colours[0, ..., k].values.ravel(), patterns[k].ravel())[0, 1]
        assert abs(correlation) > 0.99
    assert colours.attrs["explained"][0] > colours.attrs["explained"][1] > colours.attrs["explained"][2]


def test_agrees_with_sklearn_up_to_the_stretch():
    features = maps((4, 10, 6, 6)) * xr.DataArray(np.arange(10, 0, -1.0), dims="channel")
    tokens = features.transpose("sample", "y", "x", "channel").values.reshape(-1, 10)
    oracle = PCA(3).fit(tokens)
    colours = pca_rgb(features, percentiles=(0, 100))
    scores = oracle.transform(tokens) * np.sign(oracle.components_[np.arange(3), np.abs(oracle.components_).argmax(1)])
    stretched = (scores - scores.min(0)) / np.ptp(scores, axis=0)
    np.testing.assert_allclose(colours.values.reshape(-1, 3), stretched, atol=1e-6)
    assert colours.attrs["explained"] == pytest.approx(oracle.explained_variance_ratio_.tolist())


def test_sign_and_order_of_samples_do_not_change_colours():
    features, _ = planted()
    turned = pca_rgb(features.isel(sample=[2, 0, 1])).isel(sample=[1, 2, 0])
    np.testing.assert_allclose(turned.values, pca_rgb(features).values, atol=1e-5)
    # the axes' order is read from their names
    shuffled = pca_rgb(features.transpose("y", "channel", "sample", "x"))
    np.testing.assert_allclose(shuffled.transpose("sample", "y", "x", "rgb").values, pca_rgb(features).values, atol=1e-5)


def test_shared_basis_and_own_basis():
    features = maps((2, 6, 5, 5))
    features[1] += 40 * features[1].mean("channel")  # the second map alone would use another basis
    own = pca_rgb(features, shared=False)
    for i in range(2):
        np.testing.assert_allclose(own[i].values, pca_rgb(features[i]).values, atol=1e-6)
    assert np.abs(pca_rgb(features)[0] - own[0]).max() > 0.1


def test_percentiles_clip_an_outlier_and_flat_maps_are_grey():
    features = maps((1, 4, 20, 20))
    features[0, :, 0, 0] = 1e4
    assert np.ptp(pca_rgb(features)[0, 5:, 5:, 0].values) > 0.5
    assert np.ptp(pca_rgb(features, percentiles=(0, 100))[0, 5:, 5:, 0].values) < 0.1
    assert (pca_rgb(xr.ones_like(features)) == 0.5).all()


def test_outliers_are_counted_where_they_are_planted():
    features = maps((3, 32, 16, 16)).assign_coords(sample=["a", "b", "c"])
    features[1, :, 3, 4] *= 10
    features[1, :, 9, 9] *= 12
    features[2, :, 5, 5] = 0  # small norms are no registers
    frame = outlier_tokens(features).set_index("sample")
    assert frame.n_outliers.to_dict() == {"a": 0, "b": 2, "c": 0}
    assert frame.loc["b", ["y_max", "x_max"]].tolist() == [9, 9]
    assert frame.loc["b", "share"] == 2 / 256
    assert outlier_tokens(features, threshold=1.0).n_outliers.min() > 10


def test_z_scores_follow_the_stated_rule():
    features = maps((1, 8, 7, 7))
    norm = np.sqrt((features.values[0] ** 2).sum(0))
    median = np.median(norm)
    z = (norm - median) / (1.4826 * np.median(np.abs(norm - median)))
    assert outlier_tokens(features).max_z[0] == pytest.approx(z.max())
    assert outlier_tokens(xr.ones_like(features)).n_outliers[0] == 0


def test_outliers_keep_every_dimension_in_front():
    features = maps((2, 3, 4, 5, 5), dims=("sample", "timestep", "channel", "y", "x")).assign_coords(timestep=[1, 50, 800])
    frame = outlier_tokens(features)
    assert frame[["sample", "timestep"]].to_numpy().tolist() == [[0, 1], [0, 50], [0, 800], [1, 1], [1, 50], [1, 800]]


def test_errors_say_what_was_found():
    with pytest.raises(ValueError, match="at least 3 channels; these features have 2"):
        pca_rgb(maps((1, 2, 4, 4)))
    with pytest.raises(ValueError, match="channel is not in"):
        pca_rgb(maps((4, 4), dims=("y", "x")))
    broken = maps((2, 4, 4, 4))
    broken[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 2 maps"):
        outlier_tokens(broken)
    with pytest.raises(ValueError, match="positive robust z-score"):
        outlier_tokens(maps((1, 4, 4, 4)), threshold=0)
