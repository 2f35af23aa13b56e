"""Lengths in natural units, schedules against their closed forms, what AdamW decays and clips."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax import config as defaults
from rosepo_jax.errors import UserError
from rosepo_jax.training import optimizer


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("300 steps", 300),
        ("1 step", 1),
        ("2 epochs", 62),
        ("0.5 epochs", 16),
        ("6400 examples", 200),
        ("1 example", 1),
        ("5 %", 20),
        ("12.5%", 50),
        (" 7steps ", 7),
        ("0 steps", 0),
        ("0 %", 0),
        ("0.001 %", 1),
    ],
)
def test_lengths(length, expected):
    found = optimizer.steps(length, "sft.length", batch_size=32, rows=1000, total=400)
    assert abs(found - expected) <= (1 if "epochs" in length else 0)


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 10**7))
def test_units_agree(epochs, batch_size, rows):
    found = optimizer.steps(f"{epochs} epochs", "k", batch_size=batch_size, rows=rows)
    assert found == optimizer.steps(f"{epochs * rows} examples", "k", batch_size=batch_size, rows=rows)
    assert abs(found - epochs * rows / batch_size) <= max(0.5, 1e-9 * found) or found == 1


@pytest.mark.parametrize("length", ["300", "steps", "-3 steps", "3 weeks", "1e3 steps", "", "3 steps 4", "5 %"])
def test_bad_lengths_name_key_and_units(length):
    with pytest.raises(UserError, match=r"sft\.length=.*steps, epochs or examples"):
        optimizer.steps(length, "sft.length", batch_size=32, rows=1000)


def settings(**keys):
    section = defaults.default().sft
    section.update(keys)
    return section


def rates(total, **keys):
    _, schedule = optimizer.make(settings(learning_rate=0.5, **keys), "sft", total, 1000)
    return np.array([schedule(step) for step in range(total)], np.float64)


def test_warm_up_is_a_ramp_that_ends_at_the_peak():
    for unit in ("10 steps", "10 %", "640 examples"):
        found = rates(100, warmup=unit, schedule="constant")
        np.testing.assert_allclose(found[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
        np.testing.assert_allclose(found[10:], 0.5, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_decays_against_their_closed_forms(warmup):
    share = np.arange(100 - warmup) / (100 - warmup)
    closed = {"cosine": 0.25 * (1 + np.cos(math.pi * share)), "linear": 0.5 * (1 - share), "constant": 0.5 + 0 * share}
    for name, expected in closed.items():
        found = rates(100, warmup=f"{warmup} steps", schedule=name)
        np.testing.assert_allclose(found[warmup:], expected, rtol=1e-5, atol=1e-7)
        assert found.min() > 0, "every update moves"


def test_a_warm_up_as_long_as_the_run():
    np.testing.assert_allclose(rates(4, warmup="100 %", schedule="cosine"), [0.125, 0.25, 0.375, 0.5], rtol=1e-6)


def test_bad_settings_are_named():
    with pytest.raises(UserError, match=r"align\.schedule='step': choose one of cosine, linear, constant"):
        optimizer.make(settings(schedule="step"), "align", 10, 100)
    with pytest.raises(UserError, match=r"align\.warmup='3 days'"):
        optimizer.make(settings(warmup="3 days"), "align", 10, 100)


def test_decay_touches_matrices_only():
    """With a zero gradient an update is the decay alone: - learning rate * decay * parameter."""
    transformation, _ = optimizer.make(
        settings(weight_decay=0.1, learning_rate=0.5, warmup="0 steps", schedule="constant"), "sft", 10, 100
    )
    params = {
        "embedding": jnp.full((2, 3), 2.0),
        "blocks/attention/query/lora_a": jnp.full((2, 3, 1), 2.0),
        "blocks/attention_norm/scale": jnp.full((2, 3), 2.0),
        "blocks/attention/query/bias": jnp.full((2, 3), 2.0),
        "norm/scale": jnp.full((3,), 2.0),
    }
    updates, _ = transformation.update({path: 0 * x for path, x in params.items()}, transformation.init(params), params)
    for path, value in updates.items():
        np.testing.assert_allclose(
            value, 0.0 if path.endswith(("norm/scale", "bias")) else -0.5 * 0.1 * 2.0, rtol=1e-6, err_msg=path
        )


def test_gradients_are_clipped_by_their_global_norm():
    """AdamW's first moment after one update is (1 - b1) times the clipped gradient."""
    transformation, _ = optimizer.make(settings(clip=1.0), "sft", 10, 100)
    params = {"embedding": jnp.zeros((1, 1)), "norm/scale": jnp.zeros((1,))}
    for factor, norm in ((1.0, 1.0), (0.01, 0.05)):
        gradient = {"embedding": jnp.full((1, 1), 3.0 * factor), "norm/scale": jnp.full((1,), 4.0 * factor)}
        _, state = transformation.update(gradient, transformation.init(params), params)
        moment = optax.tree_utils.tree_get(state, "mu")
        np.testing.assert_allclose(float(optax.global_norm(moment)) / 0.1, norm, rtol=1e-6)
