"""Log-probabilities of responses: what they add up to, what they never see, and what is never computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.preference.logprobs import response_logps

CONFIG = DecoderConfig(vocabulary=23, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24)
LM = LanguageModel(CONFIG)
PARAMS = LM.init(jax.random.key(0))
GENERATOR = np.random.default_rng(0)
PROMPT = GENERATOR.integers(0, 23, (2, 6)).astype(np.int32)
PROMPT_MASK = np.arange(6) < np.array([[6], [3]])
RESPONSE = GENERATOR.integers(0, 23, (2, 4, 5)).astype(np.int32)
RESPONSE_MASK = np.arange(5) < np.array([[[5], [1], [3], [2]], [[4], [5], [2], [1]]])

logps = jax.jit(response_logps, static_argnums=0)


def test_one_token_responses_are_a_distribution():
    """Over all V responses of one token the probabilities sum to 1."""
    every = np.broadcast_to(np.arange(23, dtype=np.int32)[None, :, None], (2, 23, 1))
    logps_BxR = logps(LM, PARAMS, PROMPT, PROMPT_MASK, every, np.ones_like(every, bool))
    np.testing.assert_allclose(np.exp(logps_BxR).sum(axis=1), 1.0, rtol=1e-5)


def test_chain_rule_over_tokens():
    """log p(first two tokens) summed over all second tokens is log p(first token)."""
    second = np.broadcast_to(np.arange(23, dtype=np.int32)[None, :], (2, 23))
    both = np.stack([np.full((2, 23), 7, np.int32), second], axis=2)
    joint = logps(LM, PARAMS, PROMPT, PROMPT_MASK, both, np.ones_like(both, bool))
    first = logps(LM, PARAMS, PROMPT, PROMPT_MASK, both[:, :1, :1], np.ones((2, 1, 1), bool))
    np.testing.assert_allclose(jax.nn.logsumexp(joint, axis=1), first[:, 0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changing_one_response_changes_no_bit_of_the_others(dtype):
    lm = LanguageModel(CONFIG, dtype=dtype)
    before = np.asarray(logps(lm, PARAMS, PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK))
    changed = RESPONSE.copy()
    changed[0, 2] = (changed[0, 2] + 1) % 23
    after = np.asarray(logps(lm, PARAMS, PROMPT, PROMPT_MASK, changed, RESPONSE_MASK))
    assert before[0, 2] != after[0, 2]
    others = np.ones((2, 4), bool)
    others[0, 2] = False
    np.testing.assert_array_equal(before[others], after[others])


def test_content_of_padding_changes_no_bit():
    before = logps(LM, PARAMS, PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK)
    prompt = np.where(PROMPT_MASK, PROMPT, 22 - PROMPT)
    response = np.where(RESPONSE_MASK, RESPONSE, 22 - RESPONSE)
    np.testing.assert_array_equal(before, logps(LM, PARAMS, prompt, PROMPT_MASK, response, RESPONSE_MASK))


def test_order_of_responses_and_rows_is_free():
    before = logps(LM, PARAMS, PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK)
    order = [2, 0, 3, 1]
    after = logps(
        LM, PARAMS, PROMPT[::-1].copy(), PROMPT_MASK[::-1], RESPONSE[::-1][:, order], RESPONSE_MASK[::-1][:, order]
    )
    np.testing.assert_allclose(after, before[::-1][:, jnp.array(order)], rtol=1e-5)


def test_float32_whatever_the_parameters():
    lm = LanguageModel(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    params = lm.init(jax.random.key(0))
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: response_logps(lm, p, PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK).sum())
    )(params)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(g.dtype == jnp.bfloat16 and np.isfinite(g.astype(jnp.float32)).all() for g in gradient.values())


def array_shapes(text):
    """Dimensions of every array that a compiled program names."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}


def test_no_vocabulary_logits_of_prompt_positions():
    """In the optimised program of value and gradient no array has both a prompt and a vocabulary axis."""
    B, P, R, T, V = 3, 37, 2, 5, 101
    lm = LanguageModel(DecoderConfig(V, 16, 2, 4, 2, 4, 24), dtype="float32")
    params = lm.init(jax.random.key(0))
    batch = (jnp.ones((B, P), int), jnp.ones((B, P), bool), jnp.ones((B, R, T), int), jnp.ones((B, R, T), bool))
    compiled = jax.jit(jax.value_and_grad(lambda p, b: response_logps(lm, p, *b).sum())).lower(params, batch).compile()
    shapes = array_shapes(compiled.as_text())
    response_logits = {(B, R, T - 1, V), (B * R * (T - 1), V), (B, R * (T - 1), V)}
    assert shapes & response_logits, "the search finds the logits that are there"
    rows = {P, P - 1, B * P, B * (P - 1), P + R * (T - 1), B * (P + R * (T - 1))}
    assert not [shape for shape in shapes if V in shape and rows & set(shape)]
