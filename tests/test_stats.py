"""Statistics against scipy, against cases worked by hand, and against the coverage that they promise."""

import itertools

import numpy as np
import pytest
import scipy.stats

from diffprobe import stats


def test_unclustered_interval_is_scipys_bca():
    values = np.random.default_rng(0).exponential(size=60)
    oracle = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    low, high = stats.bootstrap_interval(values, seed=3)
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    # a skewed sample: BCa leans to the right, where the percentile interval does not
    percentile = stats.bootstrap_sums(values[:, None] / values.size, lambda sums: sums[:, 0], seed=3)
    assert high > percentile[1]


@pytest.mark.parametrize(("extra", "method"), [(0, "BCa"), (1, "percentile")])
def test_the_correction_ends_where_it_costs_more_than_it_tells(monkeypatch, extra, method):
    assert stats.BCA_LIMIT == 5000
    monkeypatch.setattr(stats, "BCA_LIMIT", 50)
    values = np.random.default_rng(0).exponential(size=50 + extra)
    oracle = scipy.stats.bootstrap((values,), np.mean, n_resamples=2000, method=method, rng=np.random.default_rng(0))
    ends = oracle.confidence_interval
    assert stats.bootstrap_interval(values) == pytest.approx((ends.low, ends.high), abs=1e-12)


@pytest.mark.parametrize("clustered", [False, True])
def test_sums_are_over_rows_and_keep_columns_apart(clustered):
    """Every resample is the sum of whole clusters, column by column, from a plain loop over the same draws."""
    table = np.random.default_rng(0).integers(1, 9, size=(9, 3)).astype(float)
    ids = np.array([4, 4, 0, 7, 0, 2, 2, 2, 9]) if clustered else np.arange(9)
    units = [[sum(float(table[row, k]) for row in np.flatnonzero(ids == one)) for k in range(3)] for one in sorted(set(ids))]
    drawn = np.random.default_rng(5).integers(len(units), size=(300, len(units)))
    values = []
    for resample in drawn:
        sums = [sum(units[unit][k] for unit in resample) for k in range(3)]
        values.append(sums[0] / (sums[1] + 2 * sums[2]))
    seen = []

    def statistic(sums):
        seen.append(sums.shape)
        return sums[:, 0] / (sums[:, 1] + 2 * sums[:, 2])

    found = stats.bootstrap_sums(table, statistic, ids if clustered else None, 0.9, 300, seed=5)
    assert seen == [(300, 3)] and found == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])))


def test_a_mean_of_clustered_rows_is_their_sum_by_their_number():
    values, ids = [1.0, 2, 3, 10], np.array(["a", "b", "a", "c"])
    drawn = np.random.default_rng(1).integers(3, size=(200, 3))
    sums, counts = np.array([4.0, 2, 10]), np.array([2, 1, 1])
    means = [sums[one].sum() / counts[one].sum() for one in drawn]
    assert stats.bootstrap_interval(values, ids, 0.8, 200, seed=1) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))


def test_clusters_of_one_agree_with_the_percentile_bootstrap():
    values = np.random.default_rng(1).normal(size=200)
    oracle = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    mine = stats.bootstrap_interval(values, clusters=np.arange(200), n_resamples=20_000)
    assert mine == pytest.approx((oracle.low, oracle.high), abs=0.01)


def test_clustered_interval_covers_where_the_naive_one_does_not():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(40), 8)
    clustered = naive = 0
    runs = 200
    for _ in range(runs):
        values = rng.normal(size=40)[clusters] + 0.3 * rng.normal(size=320)
        low, high = stats.bootstrap_interval(values, clusters, n_resamples=300)
        clustered += low <= 0 <= high
        low, high = stats.bootstrap_interval(values, np.arange(320), n_resamples=300)
        naive += low <= 0 <= high
    assert 0.88 <= clustered / runs <= 0.99
    assert naive / runs < 0.7


def test_unequal_clusters_weigh_by_their_rows():
    # two clusters: a resample is (a, a), (a, b) or (b, b), with means 0, 1/4 and 1
    low, high = stats.bootstrap_interval([0, 0, 0, 1], clusters=[0, 0, 0, 1], level=0.6)
    assert (low, high) == (0.0, 1.0)
    assert stats.bootstrap_interval([0, 0, 0, 1], clusters=[0, 0, 0, 1], level=0.2) == (0.25, 0.25)


def test_blocks_change_nothing_but_memory(monkeypatch):
    values, clusters = np.random.default_rng(0).normal(size=50), np.arange(50)
    whole = stats.bootstrap_interval(values, clusters)
    monkeypatch.setattr(stats, "_BLOCK", 700)
    assert stats.bootstrap_interval(values, clusters) == whole


def test_degenerate_intervals():
    assert stats.bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert np.isnan(stats.bootstrap_interval([0.5])).all()
    assert np.isnan(stats.bootstrap_interval([0.1, 0.9], clusters=["a", "a"])).all()
    with pytest.raises(ValueError, match="1 non-finite entries of 2"):
        stats.bootstrap_interval([0.1, np.nan])
    with pytest.raises(ValueError, match=r"one id per row, shape \(2,\)"):
        stats.bootstrap_interval([0.1, 0.2], clusters=[1])
    with pytest.raises(ValueError, match="coverage between 0 and 1"):
        stats.bootstrap_interval([0.1, 0.2], level=95)
    with pytest.raises(ValueError, match="`values` is empty"):
        stats.bootstrap_interval([])


def mean_difference(x, y, axis):
    return np.mean(x - y, axis=axis)


@pytest.mark.parametrize("n", [7, 40])
def test_paired_test_agrees_with_scipy(n):
    rng = np.random.default_rng(n)
    a = rng.normal(size=n) + 0.35
    b = rng.normal(size=n)
    oracle = scipy.stats.permutation_test(
        (a, b),
        mean_difference,
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=0,
    )
    difference, p = stats.paired_permutation_test(a, b, n_resamples=20_000)
    assert difference == pytest.approx(np.mean(a - b))
    assert p == pytest.approx(oracle.pvalue, abs=1e-12 if n == 7 else 0.01)


def test_paired_test_by_enumeration_with_clusters():
    a, b, clusters = np.array([2.0, 1, 3, -1, 2, 4]), np.zeros(6), np.array([0, 0, 1, 1, 2, 2])
    sums = np.array([3.0, 2.0, 6.0])
    flips = [abs(np.dot(signs, sums)) >= 11 for signs in itertools.product([-1, 1], repeat=3)]
    assert stats.paired_permutation_test(a, b, clusters=clusters) == (11 / 6, np.mean(flips))
    assert stats.paired_permutation_test(a, b)[1] < np.mean(flips)


def test_paired_test_is_uniform_under_the_hypothesis_and_never_zero():
    rng = np.random.default_rng(0)
    p = np.array([stats.paired_permutation_test(*rng.normal(size=(2, 20)), n_resamples=199, seed=i)[1] for i in range(400)])
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert stats.paired_permutation_test(np.arange(1, 51), np.zeros(50), n_resamples=99)[1] == 1 / 100
    right, wrong = np.repeat([1, 0, 1], [30, 12, 40]), np.repeat([0, 1, 1], [30, 12, 40])  # McNemar's, exact: 30 of 42 changes
    expected = scipy.stats.binomtest(30, 42).pvalue
    assert stats.paired_permutation_test(right, wrong, n_resamples=99) == (pytest.approx(18 / 82), pytest.approx(expected))
    with pytest.raises(ValueError, match="one shape"):
        stats.paired_permutation_test([1, 2], [1])


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.9 times 4, 3, 2, 1, then made monotone
    assert stats.holm([0.03, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert stats.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    grid = stats.holm([[0.01, np.nan], [0.04, 0.5]])
    np.testing.assert_allclose(grid, [[0.03, np.nan], [0.08, 0.5]])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stats.holm([1.2])


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 12, 0.95), (12, 12, 0.95), (7, 12, 0.9), (340, 1000, 0.99)])
def test_wilson_is_scipys(successes, n, level):
    oracle = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert stats.wilson_interval(successes, n, level) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_wilson_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="5 of 4"):
        stats.wilson_interval(5, 4)
    with pytest.raises(ValueError, match="0 of 0"):
        stats.wilson_interval(0, 0)


def test_ties_of_the_paired_test_survive_rounding_at_every_scale():
    # only all pluses and all minuses reach the sum, whose terms round differently in every order
    assert stats.paired_permutation_test([0.6, 0.3, 0.6, 0.3], np.zeros(4)) == (pytest.approx(0.45), 0.125)
    for scale in (1e-17, 1.0, 1000.1, 1e15):
        differences = scale * np.array([0.6, 0.3, 0.6, 0.3])
        assert stats.paired_permutation_test(differences, np.zeros(4))[1] == 0.125, scale
        cancelled = scale * np.array([0.1, 0.2, -0.3, 0.7, -0.7])
        assert stats.paired_permutation_test(cancelled, np.zeros(5))[1] == 1.0, scale
        drawn = np.tile(scale * np.array([0.1, 0.2, -0.3]), 8)
        assert stats.paired_permutation_test(drawn, np.zeros(24), n_resamples=99)[1] == 1.0, scale


def test_values_that_differ_by_rounding_have_an_interval():
    values = 1 - np.spacing(1.0) * np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 0])
    low, high = stats.bootstrap_interval(values)
    assert 1 - 1e-15 <= low <= high <= 1
    assert stats.bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    assert stats.bootstrap_interval([0.0] * 9) == (0.0, 0.0)


def test_equal_scores_differ_by_nothing_however_many():
    for n in (5, 40):
        assert stats.paired_permutation_test(np.ones(n), np.ones(n)) == (0.0, 1.0)


def test_all_patterns_are_visited_up_to_the_number_of_resamples():
    assert stats.paired_permutation_test([3, 4, 5, 6], np.ones(4), n_resamples=16) == (3.5, 0.125)
    assert stats.paired_permutation_test([3, 4, 5, 6], np.ones(4), n_resamples=15)[1] * 16 % 1 == 0, "drawn: a share of 16"


def test_a_p_value_of_zero_is_one():
    assert stats.holm([0.0, 0.5]).tolist() == [0.0, 0.5]


def test_a_resample_without_a_value_is_left_out():
    columns = np.c_[[1.0, 0, 0, 0], [1.0, 0, 0, 1]]  # a third of the resamples has nothing to divide by
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = stats.bootstrap_sums(columns, lambda sums: sums[:, 0] / sums[:, 1])
    assert (low, high) == (0.0, 1.0)


def test_drawn_signs_follow_the_seed():
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    found = [stats.paired_permutation_test(a, b, seed=seed, n_resamples=500)[1] for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len(set(found)) > 1
