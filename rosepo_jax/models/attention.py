"""Attention over a prompt, over responses that share it, and over one decoding step. One softmax each, in float32.

Grouped-query heads: query head h = k * G + g reads key-value head k, G = H / K. Head axes stay split as [K, G] inside.
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row without any visible key gives finite (unused) values and gradients


def _scores(query_BxSxHxE: jax.Array, key_BxUxKxE: jax.Array) -> jax.Array:
    """Scaled dot products [B, K, G, S, U] in float32; E is the head dimension."""
    B, S, H, E = query_BxSxHxE.shape
    K = key_BxUxKxE.shape[2]
    grouped = query_BxSxHxE.reshape(B, S, K, H // K, E) * E**-0.5
    return jnp.einsum("bskge,buke->bkgsu", grouped, key_BxUxKxE, preferred_element_type=jnp.float32)


def causal(query_BxPxHxE: jax.Array, key_BxPxKxE: jax.Array, value_BxPxKxE: jax.Array) -> jax.Array:
    """The prompt attends causally to itself. Prompts are right-padded, so real positions never see padding."""
    B, P, H, E = query_BxPxHxE.shape
    visible_PxP = jnp.tril(jnp.ones((P, P), bool))
    scores = jnp.where(visible_PxP[None, None, None], _scores(query_BxPxHxE, key_BxPxKxE), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BxPxKxE.dtype)
    return jnp.einsum("bkgsu,buke->bskge", weights, value_BxPxKxE).reshape(B, P, H, E)


def shared_prefix(
    query_BxRxTxHxE: jax.Array,
    prompt_key_BxPxKxE: jax.Array,
    prompt_value_BxPxKxE: jax.Array,
    prompt_mask_BxP: jax.Array,
    key_BxRxTxKxE: jax.Array,
    value_BxRxTxKxE: jax.Array,
    visible_TxU: jax.Array,
) -> jax.Array:
    """R responses attend to their prompt and to themselves, never to each other.

    The softmax runs over the concatenated keys (prompt, own response): partial softmaxes are never merged. `key` and
    `value` may hold U >= T own positions (a decoding cache); `visible_TxU` says which of them each query sees.
    """
    B, R, T, H, E = query_BxRxTxHxE.shape
    P, K = prompt_key_BxPxKxE.shape[1:3]
    G = H // K
    to_prompt = _scores(query_BxRxTxHxE.reshape(B, R * T, H, E), prompt_key_BxPxKxE).reshape(B, K, G, R, T, P)
    to_prompt = jnp.where(prompt_mask_BxP[:, None, None, None, None], to_prompt, _MASKED)
    grouped = query_BxRxTxHxE.reshape(B, R, T, K, G, E) * E**-0.5
    to_self = jnp.einsum("brtkge,bruke->bkgrtu", grouped, key_BxRxTxKxE, preferred_element_type=jnp.float32)
    to_self = jnp.where(visible_TxU[None, None, None, None], to_self, _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_self], axis=-1), axis=-1).astype(prompt_value_BxPxKxE.dtype)
    from_prompt = jnp.einsum("bkgrtp,bpke->brtkge", weights[..., :P], prompt_value_BxPxKxE)
    from_self = jnp.einsum("bkgrtu,bruke->brtkge", weights[..., P:], value_BxRxTxKxE)
    return (from_prompt + from_self).reshape(B, R, T, H, E)
