"""Log-probabilities of responses: what they add up to, what they never see, and what is never computed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosepo_jax.data import layouts
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.preference.logprobs import batch_logps, response_logps

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


# ---- Packed responses, parts and chunks ------------------------------------------------------------------------------


def packed(Q):
    """The tokens that are fed, Q of them."""
    return layouts.padded([[0]] * 2, RESPONSE, RESPONSE_MASK, 1, Q, 0)["fed_BxQ"]


@jax.jit
def value_and_gradient(fed_BxQ):
    weight_BxR = jnp.array([[1.0, -0.7, 0.3, 0.4], [-0.2, 0.9, 0.5, -1.1]])

    def weighted(params):
        return (weight_BxR * response_logps(LM, params, PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK, fed_BxQ)).sum()

    return jax.value_and_grad(weighted)(PARAMS)


def close(found, expected):
    """Equal but for rounding: values to 1e-6 of their size, gradients to 1e-5 of each array's norm."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for path, want in expected[1].items():
        assert np.linalg.norm(found[1][path] - want) <= 1e-5 * np.linalg.norm(want), path


@pytest.mark.parametrize("Q", [8, 11])
def test_packed_responses_equal_padded_ones(Q):
    """7 and 8 of 16 tokens are real: the packed program never sees the others."""
    assert (packed(Q) < 16).sum(axis=1).tolist() == [7, 8]
    close(value_and_gradient(packed(Q)), value_and_gradient(np.tile(np.arange(16), (2, 1))))


def test_many_responses_are_taken_a_block_at_a_time():
    """40 responses of up to 4 fed tokens are more than a block of 64 queries: each equals its own lone computation."""
    responses = GENERATOR.integers(0, 23, (2, 40, 5)).astype(np.int32)
    mask = np.arange(5) < GENERATOR.integers(1, 6, (2, 40, 1))
    part = layouts.padded([[0]] * 2, responses, mask, 1, int(mask[:, :, 1:].sum(axis=(1, 2)).max()), 0)
    assert part["fed_BxQ"].shape[1] > 64
    found = logps(LM, PARAMS, PROMPT, PROMPT_MASK, responses, mask, part["fed_BxQ"])
    alone = [
        logps(LM, PARAMS, PROMPT, PROMPT_MASK, responses[:, r : r + 4], mask[:, r : r + 4]) for r in range(0, 40, 4)
    ]
    np.testing.assert_allclose(found, np.concatenate(alone, axis=1), rtol=1e-5)


@pytest.mark.parametrize("config", ["window", "sandwich"])
def test_packing_with_windows_caps_and_norms(config):
    lm = LanguageModel(dataclasses.replace(CONFIG, **KINDS[config]))
    params = lm.init(jax.random.key(1))
    batch = (PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK)
    np.testing.assert_allclose(logps(lm, params, *batch, packed(9)), logps(lm, params, *batch), rtol=1e-5)


KINDS = {
    "window": {"sliding": (True, False), "window": 4, "local_rope_theta": 100.0},
    "sandwich": {"post_norms": True, "query_key_norm": True, "attention_cap": 5.0, "logit_cap": 3.0},
}


def test_chunks_of_logits_change_no_number():
    fed_BxQ, batch = packed(8), (PROMPT, PROMPT_MASK, RESPONSE, RESPONSE_MASK)

    def run(lm):
        return jax.jit(jax.value_and_grad(lambda p: (response_logps(lm, p, *batch, fed_BxQ) ** 2).sum()))(PARAMS)

    whole = run(LM)
    for chunk in (1, 3, 8, 100):
        close(run(dataclasses.replace(LM, logits_chunk=chunk)), whole)


def test_parts_of_a_batch_equal_one_padded_batch():
    """Rows cut into two parts of other widths, with a key each for dropout: as if they had been padded alike."""
    lm = LanguageModel(CONFIG, LoRAConfig(rank=2, alpha=4.0, targets=".*", dropout=0.5))
    params = {path: x + 0.1 for path, x in lm.init(jax.random.key(0)).items()}
    prompts = [row[mask].tolist() for row, mask in zip(PROMPT, PROMPT_MASK)]
    encoded = layouts.Encoded(prompts, RESPONSE[:, :1], RESPONSE_MASK[:, :1], {"row_B": np.arange(2)})
    keys_B = jax.vmap(jax.random.key)(jnp.arange(2))

    def run(layout):
        batch = layouts.lay_out(layout, encoded, pad_id=0)
        return jax.jit(batch_logps, static_argnums=0)(lm, params, batch, keys_B[batch["row_B"]])

    parts = run((layouts.Part(1, 3, 3), layouts.Part(1, 6, 4)))
    np.testing.assert_allclose(parts, run((layouts.Part(2, 9, 4),)), rtol=1e-5)


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


@pytest.mark.parametrize("caps", [{}, {"logit_cap": 30.0}, {"logit_cap": 30.0, "attention_cap": 50.0}])
def test_policy_and_reference_start_bit_for_bit_equal(caps):
    """In one program, where one of them has a gradient taken and the other has not: a difference of rounding would be
    a reward margin before the first update."""
    lm = LanguageModel(dataclasses.replace(CONFIG, vocabulary=199, **caps))
    generator = np.random.default_rng(1)
    prompt, response = (generator.integers(0, 199, shape).astype(np.int32) for shape in ((4, 13), (4, 2, 7)))
    response_mask = np.arange(7) < generator.integers(1, 8, (4, 2, 1))

    @jax.jit
    def step(policy, reference):
        def forward(params):
            return response_logps(lm, params, prompt, np.ones_like(prompt, bool), response, response_mask)

        logps_BxR, pull = jax.vjp(forward, policy)
        margin_BxR = logps_BxR - forward(reference)
        return margin_BxR, pull(1.0 + margin_BxR)

    for seed in range(12):
        params = lm.init(jax.random.key(seed))
        params["embedding"] = 8.0 * params["embedding"]  # far enough from 0 for the cap to bend
        margin_BxR, _ = step(params, jax.tree.map(jnp.copy, params))
        assert not margin_BxR.any(), seed
