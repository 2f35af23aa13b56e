"""8- and 4-bit kernels: error bounds, packing, and a model that computes with the restored kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.errors import UserError
from rosepo_jax.models import lora, quantize
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.preference.logprobs import response_logps

# The 16 levels of NF4 (arXiv 2305.14314, appendix E).
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_int8_rounds_to_the_nearest_of_255_steps_of_each_output(inputs, outputs, seed):
    kernel = np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)
    stored, scale = quantize.quantize(jnp.asarray(kernel), "int8")
    assert stored.dtype == jnp.int8 and stored.shape == kernel.shape and scale.shape == (1, outputs)
    step = np.abs(kernel).max(axis=0) / 127
    error = np.abs(quantize.dequantize(stored, scale, "int8") - kernel)
    assert (error <= step * 0.502).all()  # half a step, and the scale's own rounding


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 100), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_nf4_takes_the_nearest_level_of_each_block(half, outputs, seed):
    inputs = 2 * half
    kernel = np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)
    stored, scale = quantize.quantize(jnp.asarray(kernel), "nf4")
    block = np.gcd(inputs, 64)
    assert stored.dtype == jnp.uint8 and stored.shape == (inputs // 2, outputs)
    assert scale.shape == (inputs // block, outputs)
    blocks = kernel.reshape(-1, block, outputs)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    distance = np.abs(blocks[..., None] / largest[..., None] - np.array(NF4))
    nearest = np.array(NF4)[distance.argmin(axis=-1)] * largest
    restored = np.asarray(quantize.dequantize(stored, scale, "nf4")).reshape(blocks.shape)
    best, worst = np.abs(nearest - blocks), np.abs(restored - blocks)
    np.testing.assert_allclose(worst, best, atol=1e-5 * largest.max())  # the same level, or one as near


def test_nf4_packs_pairs():
    with pytest.raises(UserError, match="a kernel has 3; use int8"):
        quantize.quantize(jnp.ones((3, 2)), "nf4")


def test_another_format_is_refused_by_every_model():
    config = DecoderConfig(vocabulary=29, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=24)
    with pytest.raises(UserError, match=r"model\.quantize='int4': choose one of none, int8, nf4"):
        LanguageModel(config, quantize="int4")


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantised_model_with_adapters_computes_what_its_merged_form_does(how):
    """Every family feature at once; gradients reach the adapters alone and equal those on the restored base."""
    config = DecoderConfig(vocabulary=29, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=24)
    config = dataclasses.replace(config, biases=("attention/query",), post_norms=True, window=3, sliding=(True, False))
    adapter = LoRAConfig(rank=3, alpha=7.0, targets="attention/.*|mlp/down")
    lm = LanguageModel(config, adapter, quantize=how)
    generator = np.random.default_rng(0)
    params = {
        path: jnp.asarray(0.3 * generator.normal(size=value.shape), jnp.float32) if lora.is_adapter(path) else value
        for path, value in lm.init(jax.random.key(0)).items()
    }
    batch = (
        generator.integers(0, 29, (2, 5)).astype(np.int32), np.ones((2, 5), bool),
        generator.integers(0, 29, (2, 3, 4)).astype(np.int32), np.ones((2, 3, 4), bool),
    )  # fmt: skip
    restored = lora.merge({p: v for p, v in params.items() if not lora.is_adapter(p)}, None, how)
    plain = LanguageModel(config, adapter)
    assert restored.keys() | set(filter(lora.is_adapter, params)) == plain.init(jax.random.key(0)).keys()

    def loss(trainable, base, lm):
        return response_logps(lm, {**base, **trainable}, *batch).sum()

    trainable = {path: value for path, value in params.items() if lora.is_adapter(path)}
    step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    value, gradient = step(trainable, params, lm)
    expected, expected_gradient = step(trainable, restored, plain)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for path in trainable:
        np.testing.assert_allclose(gradient[path], expected_gradient[path], rtol=1e-4, atol=1e-5)
    merged = lora.merge(params, adapter, how)
    whole = jax.jit(response_logps, static_argnums=0)(LanguageModel(config), merged, *batch).sum()
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
