"""Smoothing factors: golden values, optima that equal the oracle's margins, permutations, calibration."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize

from rosepo_jax.errors import UserError
from rosepo_jax.preference import objectives, smoothing
from rosepo_jax.preference.smoothing import Smoothing


@pytest.mark.parametrize(
    ("chosen", "rejected", "tau", "free", "capped"),
    [
        (2, 0.5, 1, 0.182426, 0.182426),
        (0.5, 2, 1, 0.817574, 0.5),
        (3, -1, 2, 0.119203, 0.119203),
        (-0.3, 0.2, 0.5, 0.731059, 0.5),
    ],
)
def test_golden(chosen, rejected, tau, free, capped):
    scores = jnp.array([[chosen, rejected]], jnp.float32)
    np.testing.assert_allclose(smoothing.pair_epsilon(Smoothing(temperature=tau, cap=1.0), scores), free, atol=1.01e-6)
    np.testing.assert_allclose(smoothing.pair_epsilon(Smoothing(temperature=tau), scores), capped, atol=1.01e-6)


gaps = hnp.arrays(np.float64, (2, 3), elements=st.floats(-6, 6, width=32))


@given(gap=gaps, aggregator=st.sampled_from(objectives.AGGREGATORS))
@settings(max_examples=60, deadline=None)
def test_optimum_of_a_row_is_the_oracle_margin_aggregated(gap, aggregator):
    """With implicit rewards equal to the oracle's scores (beta = 1, tau = 1), every row loss is at its minimum."""
    with jax.enable_x64(True):
        scores = jnp.concatenate([jnp.zeros((len(gap), 1)), -jnp.asarray(gap)], 1)
        pair = smoothing.pair_epsilon(Smoothing(cap=1.0), scores)
        row = smoothing.row_epsilon(pair, aggregator)
        objective = objectives.Objective(aggregator=aggregator, beta=1.0, smoothed=True)
        margins = objectives.margins(objective, scores)
        epsilon = row if aggregator == "pairs" else row[:, None]
        slope = jax.grad(lambda u: objectives.link(objective, u, epsilon).sum())(margins)
        np.testing.assert_allclose(slope, 0, atol=1e-12)


@given(epsilon=hnp.arrays(np.float64, (2, 4), elements=st.floats(0, 0.5)))
@settings(max_examples=60, deadline=None)
def test_capped_pairs_never_reverse_a_row_at_step_zero(epsilon):
    with jax.enable_x64(True):
        rejected = epsilon.shape[1]
        for aggregator in ("lse", "mean"):
            objective = objectives.Objective(aggregator=aggregator, smoothed=True)
            row = smoothing.row_epsilon(jnp.asarray(epsilon), aggregator)[:, None]
            u = objectives.margins(objective, jnp.zeros((len(epsilon), 1 + rejected)))
            slope = jax.grad(lambda u, o=objective, e=row: objectives.link(o, u, e).sum())(u)
            assert np.all(slope <= 1e-12)
            bound = rejected / (1 + rejected) if aggregator == "lse" else 0.5
            at_cap = smoothing.row_epsilon(jnp.full((1, rejected), 0.5), aggregator)
            np.testing.assert_allclose(at_cap, bound, rtol=1e-12)


def test_row_epsilon_formulas():
    with jax.enable_x64(True):
        epsilon = jnp.array([[0.1, 0.3, 0.5], [0.02, 0.2, 0.4]])
        odds = np.asarray(epsilon / (1 - epsilon)).sum(1)
        np.testing.assert_allclose(smoothing.row_epsilon(epsilon, "lse"), odds / (1 + odds), rtol=1e-12)
        mean = np.log((1 - epsilon) / epsilon).mean(1)
        np.testing.assert_allclose(smoothing.row_epsilon(epsilon, "mean"), 1 / (1 + np.exp(mean)), rtol=1e-12)
        np.testing.assert_array_equal(smoothing.row_epsilon(epsilon, "pairs"), epsilon)
    for aggregator in ("lse", "mean"):
        ends = smoothing.row_epsilon(jnp.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], jnp.float32), aggregator)
        assert np.all(np.isfinite(ends))
        np.testing.assert_allclose(ends[:2], [0, 1], atol=1e-6)


@given(real=hnp.arrays(bool, 9), seed=st.integers(0, 3), step=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_shuffle_permutes_the_real_rows(real, seed, step):
    epsilon = np.arange(18, dtype=np.float32).reshape(9, 2)
    once = np.asarray(smoothing.shuffle(jnp.asarray(epsilon), jnp.asarray(real), seed, step))
    again = jax.jit(smoothing.shuffle, static_argnums=2)(jnp.asarray(epsilon), jnp.asarray(real), seed, step)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once[~real], epsilon[~real])
    np.testing.assert_array_equal(once[real][np.argsort(once[real][:, 0])], epsilon[real])  # whole rows, each once


def test_shuffle_is_uniform_and_depends_on_seed_and_step():
    epsilon, real = jnp.arange(4.0)[:, None], jnp.ones(4, bool)
    draws = jax.vmap(lambda step: smoothing.shuffle(epsilon, real, 3, step)[:, 0])(jnp.arange(4000))
    counts = np.stack([(np.asarray(draws) == value).sum(0) for value in range(4)])
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001
    assert np.any(
        np.asarray(draws) != jax.vmap(lambda s: smoothing.shuffle(epsilon, real, 4, s)[:, 0])(jnp.arange(4000))
    )


@pytest.mark.parametrize("aggregator", objectives.AGGREGATORS)
def test_modes(aggregator):
    pair = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.05]], jnp.float32)
    real = jnp.ones(3, bool)

    def epsilon(mode, step=0):
        return smoothing.epsilon(Smoothing(mode=mode, value=0.15), aggregator, pair, real, 0, step)

    shape = (3, 2) if aggregator == "pairs" else (3,)
    np.testing.assert_array_equal(epsilon("none"), np.zeros(shape))
    np.testing.assert_array_equal(epsilon("fixed"), np.full(shape, np.float32(0.15)))
    oracle = np.asarray(epsilon("oracle"))
    np.testing.assert_array_equal(oracle, smoothing.row_epsilon(pair, aggregator))
    shuffled = [np.asarray(epsilon("shuffled", step)) for step in range(20)]
    assert all(np.allclose(np.sort(s, 0), np.sort(oracle, 0)) for s in shuffled)  # the same marginal
    assert any(not np.allclose(s, oracle) for s in shuffled)


def test_no_gradient_to_the_oracle():
    def total(scores):
        pair = smoothing.pair_epsilon(Smoothing(), scores)
        return smoothing.epsilon(Smoothing(), "lse", pair, jnp.ones(2, bool), 0, 0).sum()

    assert not np.any(jax.grad(total)(jnp.array([[1.0, 0.5, 0.2], [0.3, 0.1, 0.0]])))


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_fitted_temperature_recovers_the_true_one(tau):
    generator = np.random.default_rng(0)
    score = generator.normal(size=(40_000, 2)) * 2
    first = generator.uniform(size=len(score)) < 1 / (1 + np.exp(-(score[:, 0] - score[:, 1]) / tau))
    chosen, rejected = np.where(first, score.T, score.T[::-1])
    fitted = smoothing.fit_temperature(chosen, rejected)
    np.testing.assert_allclose(fitted, tau, rtol=0.05)
    gap = chosen - rejected
    best = optimize.minimize_scalar(lambda log_tau: np.logaddexp(0, -gap / math.exp(log_tau)).mean(), (-1, 1))
    np.testing.assert_allclose(fitted, math.exp(best.x), rtol=1e-5)


def test_degenerate_temperatures():
    low, high = smoothing.TEMPERATURES
    assert smoothing.fit_temperature(np.array([2.0, 3.0]), np.array([1.0, 1.0])) == low  # separable
    assert smoothing.fit_temperature(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == high  # worse than chance
    assert smoothing.fit_temperature(np.ones(3), np.ones(3)) == 1
    with pytest.raises(UserError, match="no validation pairs"):
        smoothing.fit_temperature(np.zeros(0), np.zeros(0))
    with pytest.raises(UserError, match="not finite"):
        smoothing.fit_temperature(np.array([np.nan]), np.zeros(1))
    spread = np.linspace(-1, 3, 9)[:, None]
    assert smoothing.fit_temperature(spread, np.zeros((9, 4))) == smoothing.fit_temperature(spread[:, 0], np.zeros(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "orakel"}, "did you mean oracle"),
        ({"temperature": 0.0}, "temperature"),
        ({"cap": 0.0}, "cap"),
        ({"cap": 1.5}, "cap"),
        ({"value": -0.1}, "value"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        Smoothing(**changes)
