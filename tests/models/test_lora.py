"""Adapters: without effect at the start, and the same model merged or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosepo_jax.models import decoder, lora
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.preference.logprobs import response_logps

CONFIG = DecoderConfig(vocabulary=29, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=24)
LORA = LoRAConfig(rank=3, alpha=7.0, targets="attention/.*|mlp/.*")
GENERATOR = np.random.default_rng(0)
BATCH = (
    GENERATOR.integers(0, 29, (2, 5)).astype(np.int32), np.arange(5) < np.array([[5], [2]]),
    GENERATOR.integers(0, 29, (2, 3, 4)).astype(np.int32), np.arange(4) < np.array([[[4], [1], [3]], [[2], [4], [4]]]),
)  # fmt: skip

logps = jax.jit(response_logps, static_argnums=0)


def test_new_adapters_change_no_bit():
    adapted = LanguageModel(CONFIG, LORA)
    params = adapted.init(jax.random.key(0))
    base = {path: value for path, value in params.items() if not lora.is_adapter(path)}
    assert base.keys() == LanguageModel(CONFIG).init(jax.random.key(0)).keys()
    assert all(np.any(value) for path, value in params.items() if path.endswith("/lora_a"))
    np.testing.assert_array_equal(logps(adapted, params, *BATCH), logps(LanguageModel(CONFIG), base, *BATCH))
    merged = lora.merge(params, LORA)
    assert merged.keys() == base.keys() and all(np.array_equal(merged[path], base[path]) for path in base)


@pytest.mark.parametrize("targets", ["attention/.*|mlp/.*", "attention/(query|value)", "mlp/down"])
def test_merged_adapters_give_the_same_logps(targets):
    config = dataclasses.replace(LORA, targets=targets)
    adapted = LanguageModel(CONFIG, config)
    params = adapted.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    params = {
        path: 0.3 * jax.random.normal(key, value.shape) if lora.is_adapter(path) else value
        for key, (path, value) in zip(keys, params.items())
    }
    with_adapter = logps(adapted, params, *BATCH)
    merged = lora.merge(params, config)
    np.testing.assert_allclose(logps(LanguageModel(CONFIG), merged, *BATCH), with_adapter, rtol=1e-5)
    base = {path: value for path, value in params.items() if not lora.is_adapter(path)}
    assert np.abs(logps(LanguageModel(CONFIG), base, *BATCH) - with_adapter).max() > 1e-2


def test_targets_choose_the_kernels_and_the_shapes():
    shapes = jax.eval_shape(
        LanguageModel(CONFIG, dataclasses.replace(LORA, targets="attention/(query|value)|mlp/down")).init,
        jax.random.key(0),
    )
    assert {path: value.shape for path, value in shapes.items() if lora.is_adapter(path)} == {
        "blocks/attention/query/lora_a": (2, 16, 3),
        "blocks/attention/query/lora_b": (2, 3, 24),
        "blocks/attention/value/lora_a": (2, 16, 3),
        "blocks/attention/value/lora_b": (2, 3, 12),
        "blocks/mlp/down/lora_a": (2, 24, 3),
        "blocks/mlp/down/lora_b": (2, 3, 16),
    }


def test_scale_is_alpha_over_rank_and_merging_keeps_the_dtype():
    a = np.array([[[1.0], [2.0]]], np.float32)
    b = np.array([[[3.0, 5.0, 7.0]]], np.float32)
    params = {"x/kernel": jnp.ones((1, 2, 3), jnp.bfloat16), "x/lora_a": jnp.asarray(a), "x/lora_b": jnp.asarray(b)}
    merged = lora.merge(params, LoRAConfig(rank=1, alpha=0.5, targets=".*"))
    assert merged.keys() == {"x/kernel"} and merged["x/kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["x/kernel"][0], [[2.5, 3.5, 4.5], [4.0, 6.0, 8.0]])


def test_only_whole_paths_match():
    assert LoRAConfig(1, 1.0, "attention/query").matches("attention/query")
    assert not LoRAConfig(1, 1.0, "query").matches("attention/query")
    assert not LoRAConfig(1, 1.0, "attention/query").matches("attention/query_norm")


def test_gradient_reaches_the_second_factor_at_once_and_the_first_after_it():
    """B = 0 at the start: d loss / d A = 0 and d loss / d B is not, so that training can leave the start."""
    lm = LanguageModel(CONFIG, LORA)
    params = lm.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p: response_logps(lm, p, *BATCH).sum()))(params)
    for path in filter(lora.is_adapter, params):
        assert np.any(gradient[path]) == path.endswith("/lora_b"), path


def test_dropout_is_of_the_row_and_the_update_alone():
    """The same row drops the same inputs in another batch or beside more padding; another key drops others."""
    config = dataclasses.replace(LORA, dropout=0.5)
    lm = LanguageModel(CONFIG, config)
    generator = np.random.default_rng(1)
    params = {
        path: jnp.asarray(generator.normal(size=value.shape), value.dtype) if lora.is_adapter(path) else value
        for path, value in lm.init(jax.random.key(0)).items()
    }
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    dropped = logps(lm, params, *BATCH, None, keys)
    swapped = logps(lm, params, *(x[::-1] for x in BATCH), None, keys[::-1])
    np.testing.assert_allclose(swapped, dropped[::-1], rtol=1e-5)
    prompt, mask, *responses = BATCH
    wider = (np.pad(x, ((0, 0), (0, 3))) for x in (prompt, mask))
    np.testing.assert_allclose(logps(lm, params, *wider, *responses, None, keys), dropped, rtol=1e-5)
    alone = logps(lm, params, *(x[1:] for x in BATCH), None, keys[1:])
    np.testing.assert_allclose(alone, dropped[1:], rtol=1e-5)
    plain = logps(lm, params, *BATCH)
    np.testing.assert_array_equal(plain, logps(LanguageModel(CONFIG, LORA), params, *BATCH))
    assert np.abs(dropped - plain).max() > 0.1
    other = logps(lm, params, *BATCH, None, jax.vmap(jax.random.key)(jnp.arange(2) + 7))
    assert np.abs(dropped - other).max() > 0.1


def test_dropout_keeps_the_mean_and_each_map_draws_its_own():
    x = jnp.ones((3, 400, 50))
    keys = jax.vmap(jax.random.key)(jnp.arange(3 * 400)).reshape(3, 400)
    one, two = (decoder._drop(x, keys, 0.25, path) for path in ("attention/query", "attention/key"))
    assert set(np.unique(one)) == {0.0, np.float32(1 / 0.75)}
    # 60,000 draws: the mean's standard deviation is sqrt(.25 / .75 / 60000) = .0024.
    assert abs(float(one.mean()) - 1) < 5 * 0.0024
    assert 0.3 < float((one != two).mean()) < 0.45  # 2 x .25 x .75 where the draws are independent
    assert not np.array_equal(one[0], one[1])


def test_rank_stabilised_scale():
    assert LoRAConfig(16, 8.0, ".*").scale == 0.5 and LoRAConfig(16, 8.0, ".*", rslora=True).scale == 2.0
