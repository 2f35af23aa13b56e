import itertools
import time

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
    assert found == pytest.approx(tuple(np.quantile([a / b for a, b in draws], [0.025, 0.975])), abs=0.01)


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


def test_compare_leaves_out_undefined_rows():
    a, b = np.array([1.0, np.nan, 0.0, 1.0]), np.array([0.0, 1.0, np.nan, 1.0])
    found = significance.compare(a, b, np.arange(4))
    assert found["n"] == 2 and found["difference"] == 0.5
    assert significance.compare(np.full(2, np.nan), b[:2], np.arange(2))["p"] is None


def test_intervals_and_tests_of_a_real_size_take_less_than_half_a_second():
    random = np.random.default_rng(8)
    a, b = (random.random(2300) < 0.4).astype(float), (random.random(2300) < 0.4).astype(float)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        significance.compare(a, b, np.arange(2300))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
