"""CKA against centring matrices in float64, neighbours against scikit-learn, cosines against a loop, planted signals."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sklearn.neighbors import NearestNeighbors

from diffprobe.probes.measures import cka, cosines, jackknife_interval, minibatches, mutual_knn
from diffprobe.probes.similarity import MEASURES, similarity, split_pairs, store_similarity
from experiments import fig2_features as fig2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def maps(values, **coords):
    dims = ("sample", "timestep", "channel", "y", "x")
    ids = {"sample": [f"s{i}" for i in range(len(values))], "timestep": [10, 500][: values.shape[1]]}
    return xr.DataArray(values, dims=dims, coords=ids | coords)


# --- oracles --------------------------------------------------------------------------------------


def plain_hsic(x, y):
    n = len(x)
    h = np.eye(n) - 1 / n
    return np.trace(x @ x.T @ h @ y @ y.T @ h) / (n - 1) ** 2


def unbiased_hsic(x, y):
    """Song et al. 2012, equation 5, with vectors of ones."""
    n = len(x)
    k, gram = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(gram, 0)
    one = np.ones(n)
    mixed = one @ k @ gram @ one
    return (np.trace(k @ gram) + (one @ k @ one) * (one @ gram @ one) / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (
        n * (n - 3)
    )


def naive(hsic, x, y):
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize(("unbiased", "hsic"), [(True, unbiased_hsic), (False, plain_hsic)])
def test_cka_and_each_left_out_value_agree_with_the_centring_matrix(unbiased, hsic):
    x = normal(23, 7) + 50  # a large common mean costs the oracle digits, not us
    y = x[:, :4] ** 2 / 50 + normal(23, 4, seed=1)
    found = cka(x, y, unbiased=unbiased)
    assert found.value == pytest.approx(naive(hsic, x, y), abs=1e-7)
    left_out = [naive(hsic, np.delete(x, i, axis=0), np.delete(y, i, axis=0)) for i in range(23)]
    np.testing.assert_allclose(found.left_out, left_out, atol=1e-7)
    groups = np.repeat(["p", "q", "r", "s", "t", "u", "v", "w"], 3)[:23]
    by_group = [naive(hsic, x[groups != g], y[groups != g]) for g in np.unique(groups)]
    np.testing.assert_allclose(cka(x, y, unbiased=unbiased, groups=groups).left_out, by_group, atol=1e-7)


def test_minibatches_average_the_unbiased_estimator():
    x = normal(60, 5)
    y = x @ normal(5, 3, seed=2) + normal(60, 3, seed=3)
    parts = minibatches(np.arange(60), 20, seed=4)
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    assert max(len(part) for part in parts) == 20

    def averaged(keep):
        chosen = [part[np.isin(part, keep)] for part in parts]
        terms = [[unbiased_hsic(a[p], b[p]) for a, b in ((x, y), (x, x), (y, y))] for p in chosen]
        xy, xx, yy = np.mean(terms, axis=0)
        return xy / np.sqrt(xx * yy)

    found = cka(x, y, batch=20, seed=4)
    assert found.value == pytest.approx(averaged(np.arange(60)))
    order = [int(i) for part in parts for i in part]
    np.testing.assert_allclose(found.left_out, [averaged(np.delete(np.arange(60), i)) for i in order], atol=1e-9)
    with pytest.raises(ValueError, match="depends on the batch size"):
        cka(x, y, unbiased=False, batch=20)


def test_minibatches_keep_groups_whole():
    groups = np.arange(100) // 4
    for part in minibatches(groups, 30):
        assert all(np.isin(np.flatnonzero(groups == g), part).all() for g in groups[part])


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_ignores_rotation_and_scale_and_not_a_skew(unbiased):
    x, y = normal(40, 6), normal(40, 6, seed=1)
    y = x + y
    turn = np.linalg.qr(normal(6, 6, seed=2))[0]
    expected = cka(x, y, unbiased=unbiased).value
    assert cka(x @ turn, -7.5 * y + 3, unbiased=unbiased).value == pytest.approx(expected)
    assert cka(x, x @ turn, unbiased=unbiased).value == pytest.approx(1)
    assert cka(x * [1, 1, 1, 1, 1, 20], y, unbiased=unbiased).value < expected - 0.1


def test_independent_sides_with_more_columns_than_rows():
    """The plain estimator is near 1 there, as its chance level says; the unbiased one is at 0."""
    pairs = [(normal(30, 400, seed=s), normal(30, 400, seed=s + 100)) for s in range(40)]
    unbiased = [cka(x, y) for x, y in pairs]
    plain = [cka(x, y, unbiased=False) for x, y in pairs]
    assert abs(np.mean([e.value for e in unbiased])) < 3 * np.std([e.value for e in unbiased]) / np.sqrt(40)
    assert min(e.value for e in plain) > 0.9
    assert np.mean([e.value for e in plain]) == pytest.approx(np.mean([e.chance for e in plain]), abs=0.002)
    rng = np.random.default_rng(0)
    x, y = pairs[0]
    shuffled = [cka(x, y[rng.permutation(30)], unbiased=False).value for _ in range(200)]
    assert plain[0].chance == pytest.approx(np.mean(shuffled), abs=0.002)


def test_the_jackknife_covers_the_population_where_the_bootstrap_would_not():
    """The population's CKA is known for a linear map: with unit covariance of x, |A|^2 / (sqrt(p) |A'A|)."""
    a = np.diag([1.0, 0.8, 0.6, 0.4])
    truth = np.sum(a**2) / np.sqrt(4 * np.sum((a.T @ a) ** 2))
    covered = []
    for seed in range(100):
        x = normal(80, 4, seed=seed)
        found = cka(x, x @ a)
        covered.append(found.low <= truth <= found.high)
        assert found.low < found.value < found.high <= 1
    assert np.mean(covered) >= 0.88
    x = normal(80, 300)
    y = normal(80, 300, seed=1)
    drawn = np.random.default_rng(0).integers(80, size=80)
    assert cka(x[drawn], y[drawn]).value > 0.3  # why rows are never drawn twice
    assert abs(cka(x, y).value) < 0.1


def test_equal_sides_have_similarity_one_without_spread():
    x = normal(20, 5)
    found = cka(x, x)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1), abs=1e-12)


def test_mutual_neighbours_agree_with_sklearn():
    x, y = normal(50, 6) + 1, normal(50, 9, seed=1)
    near = [NearestNeighbors(metric="cosine", n_neighbors=7).fit(v).kneighbors(return_distance=False) for v in (x, y)]
    shared = [len(set(a) & set(b)) / 7 for a, b in zip(*near, strict=True)]
    np.testing.assert_allclose(mutual_knn(x, y, 7), shared)


def test_mutual_neighbours_of_independent_sets_are_at_chance():
    shares = [mutual_knn(normal(60, 5, seed=s), normal(60, 5, seed=s + 50), 6).mean() for s in range(40)]
    assert np.mean(shares) == pytest.approx(6 / 59, abs=0.01)


@pytest.mark.parametrize("standardise", [False, True])
def test_cosines_agree_with_a_loop(standardise):
    a, b = (normal(5, 3, 2, 2, seed=s) + np.array([9.0, 0, 0])[:, None, None] for s in (0, 1))
    groups = [0, 0, 1, 2, 2]
    x, y = a, b
    if standardise:
        both = np.concatenate([a, b])
        mean, std = both.mean((0, 2, 3), keepdims=True), both.std((0, 2, 3), keepdims=True)
        x, y = (a - mean) / std, (b - mean) / std

    def cosine(i, j):
        values = [
            x[i, :, r, c] @ y[j, :, r, c] / np.linalg.norm(x[i, :, r, c]) / np.linalg.norm(y[j, :, r, c])
            for r in range(2)
            for c in range(2)
        ]
        return np.mean(values)

    dims = ("sample", "channel", "y", "x")
    found = cosines(xr.DataArray(a, dims=dims), xr.DataArray(b, dims=dims), standardise=standardise, groups=groups)
    np.testing.assert_allclose(found[0], [cosine(i, i) for i in range(5)])
    strangers = [[j for j in range(5) if groups[j] != groups[i]] for i in range(5)]
    met = [np.mean([(cosine(i, j) + cosine(j, i)) / 2 for j in others]) for i, others in enumerate(strangers)]
    np.testing.assert_allclose(found[1], met)


# --- tables ---------------------------------------------------------------------------------------


def pairs_planted(count=40, shared=2.0, offset=0.0, channels=16):
    """Images a and b of a pair share a direction; all images share an offset in the first channel."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(count, 1, channels, 1, 1)) * shared
    values = np.repeat(common, 2, axis=0) + rng.normal(size=(2 * count, 1, channels, 3, 3))
    values[:, :, 0] += offset
    labels = {"pair": ("sample", np.arange(2 * count) // 2), "side": ("sample", ["a", "b"] * count)}
    return maps(values, **labels)


def test_planted_pairs_are_alike_and_strangers_are_not():
    row = similarity(*split_pairs(pairs_planted()), measures="cosine").iloc[0]
    assert row.value == pytest.approx(0.8, abs=0.05)  # 4 / (4 + 1)
    assert row.low < row.value < row.high
    assert abs(row.chance) < 0.05
    assert row.excess_low > 0.7
    assert (row.timestep, row.n, row.n_groups, row.seed) == (10, 40, 40, 0)


def test_a_common_offset_fools_the_raw_cosine_alone():
    table = similarity(*split_pairs(pairs_planted(shared=0, offset=30)), measures=("cosine", "cosine_standardised"))
    raw, standard = table.set_index("measure").loc[["cosine", "cosine_standardised"]].itertuples()
    assert raw.value > 0.95 and raw.chance > 0.95
    assert raw.excess_low < 0 < raw.excess_high
    assert abs(standard.value) < 0.05 and standard.excess_low < 0 < standard.excess_high


def test_the_interval_of_the_excess_covers_as_it_should():
    """Strangers share samples, so their mean has about twice the deviation that independent ones would have."""
    covered = []
    for seed in range(120):
        a = xr.DataArray(normal(20, 3, seed=seed) + np.array([0.7, 0, 0]), dims=("sample", "channel"))
        b = xr.DataArray(normal(20, 3, seed=seed + 500) + np.array([0.7, 0, 0]), dims=("sample", "channel"))
        row = similarity(a, b, measures="cosine").iloc[0]
        covered.append(row.excess_low < 0 < row.excess_high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_comparisons_match_samples_and_labels_and_name_what_differs():
    a = maps(normal(12, 2, 3, 2, 2)).assign_coords(conditioning="null", site="U")
    b = a.isel(sample=slice(None, None, -1), timestep=[1]).assign_coords(conditioning="caption")
    table = similarity(a, b, measures=("cka", "cka_biased", "mutual_knn"), k=3)
    assert table["value"].tolist() == pytest.approx([1, 1, 1])
    assert table["timestep"].tolist() == [500] * 3
    row = table.iloc[0]
    assert (row.conditioning_a, row.conditioning_b, row.site, row.n) == ("null", "caption", "U", 12)
    assert table["chance"].iloc[2] == pytest.approx(3 / 11)
    along = similarity(a, along="timestep", measures="cka")
    assert along[["timestep_a", "timestep_b"]].to_numpy().tolist() == [[10, 500]]
    fewer = similarity(a, b.isel(sample=slice(0, 7)), measures="cka")
    assert fewer["n"].tolist() == [7]


def test_features_of_another_encoder_are_crossed_with_every_timestep():
    a = maps(normal(12, 2, 3, 2, 2))
    encoder = xr.DataArray(normal(12, 5, seed=3), dims=("sample", "channel"), coords={"sample": a.sample})
    table = similarity(a, encoder, measures="cka")
    assert table["timestep"].tolist() == [10, 500]
    expected = cka(a.values[:, 1].reshape(12, -1), encoder.values).value
    assert table["value"].iloc[1] == pytest.approx(expected, abs=1e-6)
    assert similarity(a, encoder, measures="cka", batch=6)["value"].iloc[1] == pytest.approx(
        cka(a.values[:, 1].reshape(12, -1), encoder.values, batch=6).value, abs=1e-6
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory, tiny_model):
    from diffprobe import extract, open_store

    out = tmp_path_factory.mktemp("stores") / "twins.zarr"
    sites = ("U-L2-R1-B0-Cross-Q", "U-L2-R2-Res-Out")
    extract(tiny_model, "shapes-mmvp:9", out, sites=sites, timesteps=(10, 500), progress=False)
    found = open_store(out)
    found.encoding["source"] = str(out)
    return found


def test_every_comparison_of_a_store(tree):
    pair = store_similarity(tree, "pair")
    assert len(pair) == 2 * 2 * 2 * 2  # sites, conditionings, timesteps, measures
    assert set(pair["n"]) == {9}
    guided = store_similarity(tree, "guidance", guidance=(0.0, 4.0), measures=("cka",), groups="pair")
    assert guided.query("guidance == 0")["value"].tolist() == pytest.approx([1] * 4)
    assert (guided.query("guidance == 4")["value"] < 1).all()
    assert set(guided["n_groups"]) == {9} and set(guided["n"]) == {18}
    assert store_similarity(tree, "conditioning", measures=("cka",))["conditioning_b"].unique().tolist() == ["caption"]
    assert len(store_similarity(tree, "timestep", measures=("cka",))) == 4
    sites = store_similarity(tree, "site", measures=("cka",))
    assert sites[["site_a", "site_b"]].drop_duplicates().to_numpy().tolist() == [["U-L2-R1-B0-Cross-Q", "U-L2-R2-Res-Out"]]
    same = store_similarity(tree, "store", other=tree, measures=("cka",))
    assert same.dropna(subset="site")["value"].tolist() == pytest.approx([1] * 8)


def test_a_label_may_be_called_site():
    """Of where a photograph was taken, beside the site in the network."""
    import diffprobe.probes.similarity as module

    a = maps(normal(12, 2, 3, 2, 2)).assign_coords(site=("sample", np.repeat(["farm", "wood", "town"], 4)))
    names = {"U": a, "V": a + 1}
    tree = xr.DataTree.from_dict({name: xr.Dataset({"features": values}) for name, values in names.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "site_names", lambda tree: list(names))
        patch.setattr(module, "features", lambda tree, site, **choice: names[site].assign_attrs(site=site))
        rows = store_similarity(tree, "timestep", measures=("cka",), groups="site")
        between = store_similarity(tree, "site", measures=("cka",), groups="site")
    assert set(rows["n_groups"]) == {3} and rows["site"].unique().tolist() == ["U", "V"]
    assert between[["site_a", "site_b"]].drop_duplicates().to_numpy().tolist() == [["U", "V"]]
    assert set(between["n_groups"]) == {3} and "site" not in between


@pytest.mark.parametrize("gap", ["", np.nan, None])
def test_samples_without_pair_or_side_are_left_out(gap):
    both = xr.DataArray(normal(5, 3), dims=("sample", "channel"))
    pair, side = [7.0, 7.0, 8.0, 8.0, np.nan], np.array(["a", "b", "a", gap, "a"], object)
    first, second = split_pairs(both.assign_coords(pair=("sample", pair), side=("sample", side)))
    np.testing.assert_array_equal(first, both[:1])
    np.testing.assert_array_equal(second, both[1:2])
    assert first["sample"].values.tolist() == [7]


@pytest.mark.parametrize("level", [0.0, 0.1, -7.3])
@pytest.mark.parametrize("measure", MEASURES)
def test_constant_features_have_no_similarity_and_say_why(level, measure):
    constant, other = maps(np.full((30, 1, 3, 2, 2), level)), maps(normal(30, 1, 3, 2, 2))
    for pair in ((constant, other), (other, constant), (constant, constant)):
        (row,) = similarity(*pair, measures=measure, k=3).to_dict("records")
        if measure == "cosine" and level:  # of the raw vectors a constant is one like any other
            assert np.isfinite(row["value"]) and row["reason"] == ""
        elif measure == "cosine_standardised" and pair[0] is not pair[1]:
            assert np.isfinite(row["value"]) and row["reason"] == "", "the other side's spread gives the channels a scale"
        else:
            assert np.isnan([row[name] for name in ("value", "low", "high", "chance", "excess")]).all(), row
            assert row["reason"], row
    assert similarity(other, other, measures=measure, k=3)["reason"].tolist() == [""]


def test_a_vector_of_zeros_has_no_direction():
    x, y = normal(12, 1, 3, 2, 2), normal(12, 1, 3, 2, 2)
    x[4, 0, :, 0, 1] = 0  # one position of four
    y[4, 0, :, 1, 1] = 0
    own, met = cosines(maps(x).isel(timestep=0), maps(y).isel(timestep=0))
    flat = [v[:, 0].transpose(0, 2, 3, 1).reshape(12, 4, 3) for v in (x, y)]
    unit = [v / np.where((n := np.linalg.norm(v, axis=2, keepdims=True)) > 0, n, np.nan) for v in flat]
    assert own == pytest.approx(np.nanmean((unit[0] * unit[1]).sum(2), axis=1))
    pairs = [(unit[0][4] * unit[1][j]).sum(1) for j in range(12) if j != 4]
    pairs += [(unit[0][j] * unit[1][4]).sum(1) for j in range(12) if j != 4]
    assert met[4] == pytest.approx(np.nanmean(pairs))
    x[4] = 0
    row = similarity(maps(x), maps(y), measures="cosine").iloc[0]
    assert np.isnan(row["value"]) and row["reason"].startswith("1 of 12 samples have no cosine")


def test_neighbours_that_nothing_tells_apart_are_none():
    x = normal(12, 4)
    x[5] = 0
    shares = mutual_knn(x, x, 3)
    assert np.isnan(shares[5]) and (np.delete(shares, 5) == 1).all()
    assert np.isnan(mutual_knn(np.eye(6), normal(6, 3), 2)).all(), "every other is equally near"
    assert np.isnan(mutual_knn(x, normal(12, 4), 11)).all(), "k takes the one without direction too"
    assert (mutual_knn(np.ones((6, 2)), normal(6, 3), 5) == 1).all(), "all others are neighbours, whatever the order"


# --- errors ---------------------------------------------------------------------------------------


def test_errors_say_what_was_asked_and_found(tree):
    a = maps(normal(12, 2, 3, 2, 2))
    with pytest.raises(ValueError, match="'ckaa' is not one of cosine"):
        similarity(a, a, measures="ckaa")
    with pytest.raises(ValueError, match="either a second set"):
        similarity(a)
    with pytest.raises(ValueError, match="got 'layer'"):
        similarity(a, along="layer")
    with pytest.raises(ValueError, match="no sample in common: one has 's0'"):
        similarity(a, a.assign_coords(sample=[f"t{i}" for i in range(12)]))
    with pytest.raises(ValueError, match="no timestep in common"):
        similarity(a, a.assign_coords(timestep=[1, 2]))
    with pytest.raises(ValueError, match="ids stand twice"):
        similarity(a.assign_coords(sample=["s"] * 12), a)
    with pytest.raises(ValueError, match="at least 5 samples"):
        similarity(a.isel(sample=slice(4)), a)
    with pytest.raises(ValueError, match="same in all of them"):
        cka(np.ones((8, 2)), normal(8, 2))
    with pytest.raises(ValueError, match=r"less than the number of samples, 8; got 8"):
        mutual_knn(normal(8, 2), normal(8, 2), 8)
    with pytest.raises(ValueError, match="one shape"):
        similarity(a, a.isel(channel=[0]), measures="cosine")
    broken = a.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match="1 of 12 samples"):
        similarity(a, broken, measures="cosine")
    with pytest.raises(ValueError, match="'pair' is not among"):
        split_pairs(a)
    with pytest.raises(ValueError, match="'sites' is not known"):
        store_similarity(tree, "sites")
    with pytest.raises(ValueError, match="second store"):
        store_similarity(tree, "store")
    with pytest.raises(ValueError, match=r"'group' is not among the samples' labels \("):
        store_similarity(tree, "conditioning", groups="group")
    assert all(np.isnan(jackknife_interval(1.0, [1.0])))


# --- command line, figures, figure 2's bands ------------------------------------------------------


def run(monkeypatch, capsys, *arguments):
    from diffprobe import cli

    monkeypatch.setattr("sys.argv", ["diffprobe", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("between", "measures"), [("pair", ""), ("guidance", "cka"), ("timestep", "mutual_knn"), ("site", "cka")]
)
def test_command_line_writes_a_table_and_draws_it(tree, tmp_path, monkeypatch, capsys, between, measures):
    store, table = tree.encoding["source"], tmp_path / "table.csv"
    options = [
        "--between",
        between,
        "--measures",
        measures,
        "--groups",
        "" if between == "pair" else "pair",
        "--out",
        table,
        "-k",
        3,
    ]
    code, said = run(monkeypatch, capsys, "probe", "similarity", store, *options)
    assert code == 0, said.err
    assert "diffprobe plot similarity" in said.out
    assert json.loads(table.with_suffix(".json").read_text())["options"]["between"] == between
    code, said = run(monkeypatch, capsys, "plot", "similarity", table, "--out", tmp_path, "--name", "drawn")
    assert code == 0, said.err
    assert {p.name for p in tmp_path.glob("drawn.*")} == {"drawn.png", "drawn.pdf", "drawn.csv", "drawn.json"}


def test_command_line_correspondence_and_mistakes(tree, tmp_path, monkeypatch, capsys):
    store = tree.encoding["source"]
    code, said = run(monkeypatch, capsys, "probe", "correspondence", store, "--alpha", "0.1,0.5", "--out", tmp_path / "pck.csv")
    assert code == 0, said.err
    assert set(pd.read_csv(tmp_path / "pck.csv")["alpha"]) == {0.1, 0.5}
    code, said = run(monkeypatch, capsys, "probe", "similarity", store, "--between", "layers")
    assert code == 2 and "choose one of pair, conditioning" in said.err
    code, said = run(monkeypatch, capsys, "plot", "similarity", tmp_path / "pck.csv")
    assert code == 2 and "no table of similarities" in said.err
    code, said = run(monkeypatch, capsys, "plot", "similarity", tmp_path / "none.csv")
    assert code == 2 and "No table at" in said.err


def test_plots_refuse_what_they_cannot_draw():
    from diffprobe.figures import plot_similarity_matrix, plot_site_curves

    row = {"panel": "p", "site": "s", "timestep": 10, "value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.0}
    frame = pd.DataFrame([row, {**row, "timestep": 50}])
    assert len(plot_site_curves(frame).axes[0].lines) == 2  # the site and chance
    with pytest.raises(ValueError, match="no column chance"):
        plot_site_curves(frame.drop(columns="chance"))
    with pytest.raises(ValueError, match="some cells of panel x site x timestep have several rows"):
        plot_site_curves(pd.concat([frame, frame]))
    with pytest.raises(ValueError, match="has no rows"):
        plot_similarity_matrix(pd.DataFrame(columns=["panel", "site_a", "site_b", "value"]), "site")


def test_bands_are_read_from_features_that_hold_them():
    """Features that are one band of the image read that band and not the other; shuffled, they read nothing."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, size=(60, 4, 4, 3)).repeat(24, axis=1).repeat(24, axis=2)
    fine = rng.integers(0, 55, size=(60, 16, 16, 3)).repeat(6, axis=1).repeat(6, axis=2)
    images = (coarse + fine).astype(np.uint8)
    bands = fig2.bands(images, 4)
    assert bands["layout"].shape == (60, 4, 4, 3) and bands["fine"].shape == (60, 16, 16, 3)
    folds = np.arange(60) % 5
    for name, other in (("layout", "fine"), ("fine", "layout")):
        x = fig2.at_positions(bands[name], 4) + 1e-4 * rng.normal(size=(60, 16, 3 if name == "layout" else 48))
        own, cross = (fig2.residuals(x, fig2.at_positions(bands[b], 4), folds).sum(axis=0)[None] for b in (name, other))
        assert fig2.r2(own)[0] > 0.99
        assert abs(fig2.r2(cross)[0]) < 0.1
    # every position gets the pixels that lie at it
    parts = fig2.at_positions(bands["fine"], 8)
    np.testing.assert_array_equal(parts[5, 8 * 2 + 3].reshape(2, 2, 3), bands["fine"][5, 4:6, 6:8])
    np.testing.assert_array_equal(fig2.at_positions(bands["layout"], 8)[5, 8 * 2 + 3], bands["layout"][5, 1, 1])


def test_images_keep_what_noise_leaves():
    sums = np.array([[1.0, 10, 2, 10, 5, 10, 9, 10]])  # R2 .9 and .8 of layout, .5 and .1 of fine structure
    assert fig2.kept_layout(sums)[0] == pytest.approx(0.8 / 0.9)
    assert fig2.kept_more(sums)[0] == pytest.approx(0.8 / 0.9 - 0.1 / 0.5)
