import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax.evaluation import significance


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(43, 95, 0.356, 0.553), (64, 122, 0.437, 0.611), (599, 1186, 0.477, 0.533), (0, 10, 0.0, 0.278)],
)
def test_wilson_golden(hits, n, low, high):
    assert significance.wilson(hits, n) == pytest.approx((low, high), abs=6e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy_and_is_symmetric(case):
    hits, n = case
    interval = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    low, high = significance.wilson(hits, n)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert significance.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_refuses_what_is_no_share():
    for hits, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            significance.wilson(hits, n)


def test_bootstrap_of_independent_rows_is_the_normal_interval():
    value = np.random.default_rng(0).gamma(2.0, size=2000)
    low, high = significance.mean_interval(value, np.arange(2000), resamples=8000)
    half = 1.96 * value.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((value.mean() - half, value.mean() + half), abs=0.08 * half)


def test_bootstrap_resamples_users_not_rows():
    random = np.random.default_rng(1)
    value, user = random.random(300), np.arange(300)
    once = significance.mean_interval(value, user)
    copied = significance.mean_interval(np.tile(value, 4), np.tile(user, 4))
    assert copied == pytest.approx(once, abs=1e-12)
    pretended = significance.mean_interval(np.tile(value, 4), np.arange(1200))
    assert pretended[1] - pretended[0] < 0.6 * (once[1] - once[0])


def test_bootstrap_of_a_ratio_against_a_loop():
    random = np.random.default_rng(2)
    user = np.repeat(np.arange(40), random.integers(1, 5, 40))
    value = np.stack([random.random(len(user)), random.random(len(user)) + 1], axis=1)
    found = significance.bootstrap(value, user, lambda s: s[:, 0] / s[:, 1], resamples=4000)
    sums = np.array([value[user == u].sum(0) for u in range(40)])
    draws = [sums[random.integers(40, size=40)].sum(0) for _ in range(4000)]
    assert found == pytest.approx(np.quantile([a / b for a, b in draws], [0.025, 0.975]), abs=0.01)


def test_intervals_of_several_columns_are_those_of_each():
    """Rows where a column is NaN are not its rows; resamples that draw none of its users are left out."""
    random = np.random.default_rng(9)
    user = random.integers(30, size=90)
    value = random.random((90, 3)) * [1, 1e9, 1]
    value[:, 1][random.random(90) < 0.5] = np.nan
    value[user > 1, 2] = np.nan
    found = significance.mean_intervals(value, user, 300)
    for column, interval in zip(value.T, found, strict=True):
        assert tuple(interval) == significance.mean_interval(column, user, 300)
        assert interval[0] < np.nanmean(column) < interval[1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 400))
def test_what_is_resampled_adds_up_exactly_in_any_order(seed, users):
    random = np.random.default_rng(seed)
    value = np.stack([random.standard_normal(users) * 10.0 ** random.integers(-9, 9), random.integers(0, 99, users)], 1)
    summable = significance._exactly_summable(value)
    np.testing.assert_array_equal(summable[:, 1], value[:, 1])
    np.testing.assert_allclose(summable[:, 0], value[:, 0], rtol=0, atol=np.abs(value[:, 0]).max() * users * 2.0**-51)
    order = random.integers(users, size=users)
    assert summable[order, 0].sum() == summable[np.sort(order), 0].cumsum()[-1] == math.fsum(summable[order, 0])


def test_nothing_depends_on_the_order_of_rows():
    random = np.random.default_rng(3)
    user = random.integers(0, 60, 400)
    a, b = random.random(400), random.random(400) + 0.02
    first = significance.compare(a, b, user)
    order = random.permutation(400)
    assert significance.compare(a[order], b[order], user[order]) == first
    assert significance.compare(b, a, user)["p"] == first["p"]
    assert significance.compare(b, a, user)["difference"] == -first["difference"]


def test_interval_does_not_depend_on_the_block_size(monkeypatch):
    value, user = np.random.default_rng(4).random(50), np.arange(50)
    whole = significance.mean_interval(value, user)
    monkeypatch.setattr(significance, "CHUNK", 1000)
    assert significance.mean_interval(value, user) == whole


def test_permutation_is_exact_for_few_users():
    random = np.random.default_rng(5)
    user = np.repeat(np.arange(9), 3)
    difference = random.standard_normal(27) + 0.4
    sums = [difference[user == u].sum() for u in range(9)]
    patterns = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=9)]
    expected = np.mean([value >= abs(sum(sums)) - 1e-12 for value in patterns])
    assert significance.permutation_test(difference, user) == pytest.approx(expected, abs=1e-12)


def test_permutation_closed_forms():
    user = np.arange(10)
    assert significance.permutation_test(np.zeros(10), user) == 1.0
    assert significance.permutation_test(np.ones(10), user) == 2 / 2**10
    assert significance.permutation_test(np.ones(40), np.arange(40), resamples=999) == 1 / 1000


def test_permutation_of_binary_outcomes_agrees_with_mcnemar():
    random = np.random.default_rng(6)
    a, b = random.random(600) < 0.46, random.random(600) < 0.4
    p = significance.permutation_test(a.astype(float) - b, np.arange(600), resamples=20_000)
    assert p == pytest.approx(significance.mcnemar(a, b), abs=0.01)


def test_permutation_keeps_its_level():
    random = np.random.default_rng(7)
    p = [significance.permutation_test(random.standard_normal(30), np.arange(30), 199) for _ in range(1000)]
    for level in (0.05, 0.2):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=4 * np.sqrt(level / 1000))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    a = np.array([1] * only_a + [0] * only_b + [1, 0])
    b = np.array([0] * only_a + [1] * only_b + [1, 0])
    n = only_a + only_b
    expected = scipy.stats.binomtest(only_a, n).pvalue if n else 1.0
    assert significance.mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_holm_golden():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p):
    adjusted = significance.holm(p)
    for raw, value in zip(p, adjusted, strict=True):
        assert raw <= value <= min(1.0, raw * len(p))
    ordered = [value for _, value in sorted(zip(p, adjusted, strict=True))]
    assert ordered == sorted(ordered)


def test_benjamini_hochberg_golden():
    assert significance.benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert significance.benjamini_hochberg([0.6, 0.9]) == [0.9, 0.9]
    assert significance.benjamini_hochberg([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_benjamini_hochberg_equals_scipy_and_is_milder_than_holm(p):
    adjusted = significance.benjamini_hochberg(p)
    assert adjusted == pytest.approx(scipy.stats.false_discovery_control(p), abs=1e-15)
    assert all(raw <= q <= holm + 1e-15 for raw, q, holm in zip(p, adjusted, significance.holm(p), strict=True))


def test_detectable_difference_closed_forms():
    random = np.random.default_rng(10)
    difference = random.standard_normal(50)
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    alone = z * difference.std(ddof=1) / np.sqrt(50)
    assert significance.detectable(difference, np.arange(50)) == pytest.approx(alone, rel=1e-12)
    # rows that are copies of a user's first bring nothing
    copied = significance.detectable(np.tile(difference, 7), np.tile(np.arange(50), 7))
    assert copied == pytest.approx(alone, rel=1e-12)
    # two users: sums 3 and 1 of 1 and 3 rows, so residuals 3 - 1 = 2 and 1 - 3 = -2 about the mean 4 / 4
    assert significance.detectable(np.array([3, 1, 0, 0]), np.array([7, 8, 8, 8])) == pytest.approx(
        z * math.sqrt(2 * 8) / 4
    )


def test_detectable_difference_is_unknown_without_spread_or_with_one_user():
    assert significance.detectable(np.zeros(5), np.arange(5)) is None
    assert significance.detectable(np.full(5, 0.1), np.arange(5)) is None
    assert significance.detectable(np.array([1.0, 0.0]), np.zeros(2)) is None


def test_the_detectable_difference_is_detected_in_four_of_five_experiments():
    random = np.random.default_rng(11)
    user = np.repeat(np.arange(120), random.integers(1, 8, 120))
    size = np.bincount(user)
    # users differ, so rows of one are not independent; s is the standard error over all experiments
    means = [(random.normal(0, 1, 120)[user] + random.normal(0, 2, len(user))).mean() for _ in range(4000)]
    detectable = np.mean(
        [
            significance.detectable(random.normal(0, 1, 120)[user] + random.normal(0, 2, len(user)), user)
            for _ in range(100)
        ]
    )
    s = math.sqrt((size**2).sum() + 4 * size.sum()) / size.sum()
    assert np.std(means) == pytest.approx(s, rel=0.05) and detectable == pytest.approx(2.8016 * s, rel=0.05)
    assert np.mean(np.abs(np.array(means) + detectable) > 1.96 * s) == pytest.approx(0.8, abs=0.04)


def test_over_seeds():
    found = significance.over_seeds({2: 0.3, 0: 0.1, 1: 0.2})
    assert found["mean"] == pytest.approx(0.2) and found["sd"] == pytest.approx(0.1) and found["n"] == 3
    assert list(found["values"].items()) == [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert significance.over_seeds({5: 0.4}) == {"mean": 0.4, "sd": None, "values": {5: 0.4}, "n": 1}


def test_compare_adds_mcnemar_where_it_holds():
    random = np.random.default_rng(12)
    a, b = random.random(80) < 0.6, random.random(80) < 0.4
    found = significance.compare(a, b, np.arange(80), 50)
    assert found["p_mcnemar"] == significance.mcnemar(a, b) < 1
    assert found["detectable"] == significance.detectable(a.astype(float) - b, np.arange(80))
    assert "p_mcnemar" not in significance.compare(a, b, np.arange(80) // 2, 50)
    assert "p_mcnemar" not in significance.compare(a, b * 0.5, np.arange(80), 50)
    assert "p_mcnemar" not in significance.compare(a + 1, b + 1, np.arange(80), 50)


def test_compare_leaves_out_undefined_rows():
    a, b = np.array([1.0, np.nan, 0.0, 1.0]), np.array([0.0, 1.0, np.nan, 1.0])
    found = significance.compare(a, b, np.arange(4))
    assert found["n"] == 2 and found["difference"] == 0.5
    assert significance.compare(np.full(2, np.nan), b[:2], np.arange(2))["p"] is None
