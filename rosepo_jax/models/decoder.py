"""A decoder of the Llama family in Flax NNX, and the pure functions the rest of the package calls.

Parameters are one flat dict `path -> array` ("blocks/attention/query/kernel": [L, D, H*E]); the layers are stacked on
axis 0 and scanned. A batch is one prompt with R responses: the prompt is encoded once, the responses attend to its keys
and values and causally to themselves, never to each other. RoPE positions of every response restart at the prompt's
real length, and its first token is predicted from the prompt's last real position. This equals R separate sequences to
float rounding and costs P + R T tokens instead of R (P + T).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rosepo_jax.models import attention
from rosepo_jax.models.lora import LoRAConfig

Params = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of the network; what a Hugging Face `config.json` of llama type says."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None  # sorted items of the Hugging Face dict
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 4096


def rope_frequencies(config: DecoderConfig) -> jax.Array:
    """Angular frequency of each rotated pair, [E/2] float32, with linear or llama3 scaling (arXiv 2407.21783)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = dict(config.rope_scaling or ())
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones are kept, those between are interpolated.
        ratio = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = jnp.clip((ratio - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    return frequency


def rotate(x_BxSxHxE: jax.Array, angle_BxSxF: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + E/2) of every head by the position's angles; float32 inside."""
    cos, sin = jnp.cos(angle_BxSxF)[:, :, None], jnp.sin(angle_BxSxF)[:, :, None]
    first, second = jnp.split(x_BxSxHxE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxSxHxE.dtype)


class Linear(nnx.Module):
    """x W without bias; with an adapter, x W + scale (x A) B."""

    def __init__(self, path: str, inputs: int, outputs: int, lora: LoRAConfig | None, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_normal(rngs, (inputs, outputs), inputs**-0.5, dtype))
        self.scale = lora.scale if lora and lora.matches(path) else None
        if lora and lora.matches(path):
            self.lora_a = nnx.Param(_normal(rngs, (inputs, lora.rank), inputs**-0.5, dtype))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, outputs), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.scale is not None:
            y += self.scale * (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
        return y


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467), float32 inside."""

    def __init__(self, width: int, epsilon: float, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, c: DecoderConfig, lora: LoRAConfig | None, dtype, rngs: nnx.Rngs):
        self.head_dim = c.head_dim
        linear = functools.partial(Linear, lora=lora, dtype=dtype, rngs=rngs)
        self.query = linear("attention/query", c.width, c.heads * c.head_dim)
        self.key = linear("attention/key", c.width, c.kv_heads * c.head_dim)
        self.value = linear("attention/value", c.width, c.kv_heads * c.head_dim)
        self.output = linear("attention/output", c.heads * c.head_dim, c.width)

    def __call__(self, x_BxSxD: jax.Array, angle_BxSxF: jax.Array, attend: Callable) -> tuple[jax.Array, Any]:
        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query = rotate(heads(self.query(x_BxSxD)), angle_BxSxF)
        key = rotate(heads(self.key(x_BxSxD)), angle_BxSxF)
        mixed, kept = attend(query, key, heads(self.value(x_BxSxD)))
        return self.output(mixed.reshape(*x_BxSxD.shape[:2], -1)), kept


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c: DecoderConfig, lora: LoRAConfig | None, dtype, rngs: nnx.Rngs):
        self.gate = Linear("mlp/gate", c.width, c.mlp_width, lora, dtype, rngs)
        self.up = Linear("mlp/up", c.width, c.mlp_width, lora, dtype, rngs)
        self.down = Linear("mlp/down", c.mlp_width, c.width, lora, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm transformer block. `attend(query, key, value) -> (mixed, kept)` decides who sees whom."""

    def __init__(self, c: DecoderConfig, lora: LoRAConfig | None, dtype, rngs: nnx.Rngs):
        self.attention_norm = Norm(c.width, c.norm_epsilon, dtype)
        self.attention = Attention(c, lora, dtype, rngs)
        self.mlp_norm = Norm(c.width, c.norm_epsilon, dtype)
        self.mlp = MLP(c, lora, dtype, rngs)

    def __call__(self, x_BxSxD: jax.Array, angle_BxSxF: jax.Array, attend: Callable) -> tuple[jax.Array, Any]:
        mixed, kept = self.attention(self.attention_norm(x_BxSxD), angle_BxSxF, attend)
        x_BxSxD = x_BxSxD + mixed
        return x_BxSxD + self.mlp(self.mlp_norm(x_BxSxD)), kept


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, head (the transposed embedding when tied)."""

    def __init__(self, c: DecoderConfig, lora: LoRAConfig | None, dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs, (c.vocabulary, c.width), c.width**-0.5, dtype))

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(c, lora, dtype, rngs)

        self.blocks = stack(rngs.fork(split=c.layers))
        self.norm = Norm(c.width, c.norm_epsilon, dtype)
        if not c.tie_embeddings:
            self.head = Linear("head", c.width, c.vocabulary, None, dtype, rngs)

    def layers(self, x_BxSxD, angle_BxSxF, attend: Callable, caches: Any, remat: str) -> tuple[jax.Array, Any]:
        """Runs all blocks; `attend(cache, query, key, value)` gets each layer's slice of `caches`."""
        graph, stacked = nnx.split(self.blocks)

        def layer(x, inputs):
            block, cache = inputs
            return nnx.merge(graph, block)(x, angle_BxSxF, functools.partial(attend, cache))

        if remat != "none":
            policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
            layer = jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)
        return jax.lax.scan(layer, x_BxSxD, (stacked, caches))

    def logits(self, x: jax.Array) -> jax.Array:
        """Vocabulary logits in float32 for already normed hidden states."""
        kernel = self.head.kernel[...] if hasattr(self, "head") else self.embedding[...].T
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _normal(rngs: nnx.Rngs, shape, scale, dtype) -> jax.Array:
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The decoder as pure functions over flat parameters. Prompts are right-padded; every prompt has a real token."""

    config: DecoderConfig
    lora: LoRAConfig | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    @functools.cached_property
    def _graph(self):
        return nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))[0]

    def _build(self, key: jax.Array) -> Decoder:
        return Decoder(self.config, self.lora, jnp.dtype(self.param_dtype), nnx.Rngs(params=key))

    def _module(self, params: Params) -> Decoder:
        return nnx.merge(self._graph, nnx.from_flat_state([(tuple(p.split("/")), v) for p, v in params.items()]))

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """New parameters: normal with standard deviation 1/sqrt(fan in), adapters at zero effect."""
        state = nnx.state(self._build(key))
        return {"/".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(state)}

    def _embed(self, module: Decoder, tokens_BxS: jax.Array, position_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BxSxD = module.embedding[...][tokens_BxS].astype(self.dtype)
        return x_BxSxD, position_BxS[..., None].astype(jnp.float32) * rope_frequencies(self.config)[None, None]

    def hidden(self, params: Params, prompt_BxP, prompt_mask_BxP, response_BxRxT) -> jax.Array:
        """Normed hidden states [B, R, T, D] that predict each response token."""
        first_BxD, later_BxRxSxD = self.states(params, prompt_BxP, prompt_mask_BxP, response_BxRxT)
        B, R, _, D = later_BxRxSxD.shape
        return jnp.concatenate([jnp.broadcast_to(first_BxD[:, None, None], (B, R, 1, D)), later_BxRxSxD], axis=2)

    def states(self, params: Params, prompt_BxP, prompt_mask_BxP, response_BxRxT) -> tuple[jax.Array, jax.Array]:
        """One pass over prompts and responses: the normed hidden states that predict response tokens.

        Returns first_BxD, which predicts the first token of all R responses of a prompt, and later_BxRxSxD, S = T - 1,
        which predict the others. The last response token is never fed: nothing is predicted from it.
        """
        module = self._module(params)
        B, P = prompt_BxP.shape
        R, T = response_BxRxT.shape[1:]
        S = T - 1
        length_B = prompt_mask_BxP.sum(axis=1)
        tokens = jnp.concatenate([prompt_BxP, response_BxRxT[:, :, :S].reshape(B, R * S)], axis=1)
        own_BxS = jnp.broadcast_to(length_B[:, None, None] + jnp.arange(S)[None, None], (B, R, S)).reshape(B, R * S)
        position = jnp.concatenate([jnp.broadcast_to(jnp.arange(P)[None], (B, P)), own_BxS], axis=1)

        def attend(_, query, key, value):
            prompt = attention.causal(query[:, :P], key[:, :P], value[:, :P])

            def own(y):
                return y[:, P:].reshape(B, R, S, *y.shape[2:])

            response = attention.shared_prefix(
                own(query), key[:, :P], value[:, :P], prompt_mask_BxP, own(key), own(value),
                jnp.tril(jnp.ones((S, S), bool)),
            )  # fmt: skip
            return jnp.concatenate([prompt, response.reshape(B, R * S, *query.shape[2:])], axis=1), None

        x, angle = self._embed(module, tokens, position)
        x, _ = module.layers(x, angle, attend, None, self.remat)
        last_BxD = jnp.take_along_axis(x[:, :P], (length_B - 1)[:, None, None], axis=1)[:, 0]
        return module.norm(last_BxD), module.norm(x[:, P:].reshape(B, R, S, x.shape[-1]))

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Vocabulary logits in float32 for normed hidden states."""
        return self._module(params).logits(hidden)

    def prefill(self, params: Params, prompt_BxP, prompt_mask_BxP) -> tuple[jax.Array, Any]:
        """Logits [B, V] of the first response token, and the prompt's cache (keys and values [L, B, P, K, E], mask)."""
        module = self._module(params)
        B, P = prompt_BxP.shape

        def attend(_, query, key, value):
            return attention.causal(query, key, value), (key, value)

        x, angle = self._embed(module, prompt_BxP, jnp.broadcast_to(jnp.arange(P)[None], (B, P)))
        x, keys_values = module.layers(x, angle, attend, None, "none")
        last = jnp.take_along_axis(x, (prompt_mask_BxP.sum(axis=1) - 1)[:, None, None], axis=1)[:, 0]
        return module.logits(module.norm(last)), (keys_values, prompt_mask_BxP)

    def empty_suffix(self, B: int, W: int, T: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of W partial responses of up to T tokens: leaves [L, B, W, T, K, E]."""
        c = self.config
        empty = jnp.zeros((c.layers, B, W, T, c.kv_heads, c.head_dim), self.dtype)
        return empty, empty

    def extend(self, params: Params, prompt_cache, suffix_cache, token_BxW, depth) -> tuple[jax.Array, Any]:
        """Feeds token number `depth` (from 0) of W partial responses; logits [B, W, V] of the next, and the cache."""
        module = self._module(params)
        keys_values, prompt_mask_BxP = prompt_cache
        B, W = token_BxW.shape
        T = suffix_cache[0].shape[3]
        position = jnp.broadcast_to((prompt_mask_BxP.sum(axis=1) + depth)[:, None], (B, W))

        def attend(cache, query, key, value):
            (prompt_key, prompt_value), (own_key, own_value) = cache
            own_key = jax.lax.dynamic_update_slice_in_dim(own_key, key[:, :, None], depth, axis=2)
            own_value = jax.lax.dynamic_update_slice_in_dim(own_value, value[:, :, None], depth, axis=2)
            mixed = attention.shared_prefix(
                query[:, :, None], prompt_key, prompt_value, prompt_mask_BxP, own_key, own_value,
                (jnp.arange(T) <= depth)[None],
            )  # fmt: skip
            return mixed[:, :, 0], (own_key, own_value)

        x, angle = self._embed(module, token_BxW, position)
        x, suffix_cache = module.layers(x, angle, attend, (keys_values, suffix_cache), "none")
        return module.logits(module.norm(x)), suffix_cache

    def prompt_states(self, params: Params, tokens_BxP, mask_BxP) -> jax.Array:
        """Mean of the normed last-layer states over real tokens [B, D]: a text's vector by the model itself."""
        module = self._module(params)
        B, P = tokens_BxP.shape

        def attend(_, query, key, value):
            return attention.causal(query, key, value), None

        x, angle = self._embed(module, tokens_BxP, jnp.broadcast_to(jnp.arange(P)[None], (B, P)))
        x, _ = module.layers(x, angle, attend, None, "none")
        x = jnp.where(mask_BxP[..., None], module.norm(x).astype(jnp.float32), 0.0)
        return x.sum(axis=1) / mask_BxP.sum(axis=1, keepdims=True)
