"""Attention over a prompt, over responses that share it, and over one decoding step. One softmax each, in float32.

Grouped-query heads: query head h = k * G + g reads key-value head k, G = H / K. Head axes stay split as [K, G] inside.
`scale` multiplies the dot products; `cap` > 0 bounds them smoothly, cap * tanh(score / cap) (arXiv 2408.00118). Where
`window` is given, a query sees the last `window` positions only, its own included; it may be a traced number.
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row without any visible key gives finite (unused) values and gradients


def causal(
    query_BxPxHxE: jax.Array,
    key_BxPxKxE: jax.Array,
    value_BxPxKxE: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """The prompt attends causally to itself. Prompts are right-padded, so real positions never see padding."""
    B, P, H, E = query_BxPxHxE.shape
    K = key_BxPxKxE.shape[2]
    grouped = query_BxPxHxE.reshape(B, P, K, H // K, E)
    scores = jnp.einsum("bskge,buke->bkgsu", grouped, key_BxPxKxE, preferred_element_type=jnp.float32)
    visible_PxP = _own_visible(jnp.arange(P), P, window)
    scores = jnp.where(visible_PxP[None, None, None], _bounded(scores, scale, cap), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BxPxKxE.dtype)
    return jnp.einsum("bkgsu,buke->bskge", weights, value_BxPxKxE).reshape(B, P, H, E)


def shared_prefix(
    query_BxRxTxHxE: jax.Array,
    prompt_key_BxPxKxE: jax.Array,
    prompt_value_BxPxKxE: jax.Array,
    prompt_mask_BxP: jax.Array,
    key_BxRxUxKxE: jax.Array,
    value_BxRxUxKxE: jax.Array,
    step_T: jax.Array,
    *,
    scale: float,
    cap: float = 0.0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """R responses attend to their prompt and to themselves, never to each other.

    The softmax runs over the concatenated keys (prompt, own response): partial softmaxes are never merged. Query t is
    token `step_T[t]` of its response, so it stands `step_T[t]` positions behind the prompt's end and sees the own keys
    0..step_T[t]; `key` and `value` may hold more (a decoding cache).
    """
    B, R, T, H, E = query_BxRxTxHxE.shape
    P, K = prompt_key_BxPxKxE.shape[1:3]
    U = key_BxRxUxKxE.shape[2]
    grouped = query_BxRxTxHxE.reshape(B, R, T, K, H // K, E)
    to_prompt = jnp.einsum("brtkge,bpke->bkgrtp", grouped, prompt_key_BxPxKxE, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("brtkge,bruke->bkgrtu", grouped, key_BxRxUxKxE, preferred_element_type=jnp.float32)
    visible_BxTxP = prompt_mask_BxP[:, None]
    if window is not None:
        length_B = prompt_mask_BxP.sum(axis=1)
        distance_BxTxP = length_B[:, None, None] + step_T[None, :, None] - jnp.arange(P)[None, None]
        visible_BxTxP = visible_BxTxP & (distance_BxTxP < window)
    to_prompt = jnp.where(visible_BxTxP[:, None, None, None], _bounded(to_prompt, scale, cap), _MASKED)
    visible_TxU = _own_visible(step_T, U, window)
    to_self = jnp.where(visible_TxU[None, None, None, None], _bounded(to_self, scale, cap), _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_self], axis=-1), axis=-1).astype(prompt_value_BxPxKxE.dtype)
    from_prompt = jnp.einsum("bkgrtp,bpke->brtkge", weights[..., :P], prompt_value_BxPxKxE)
    from_self = jnp.einsum("bkgrtu,bruke->brtkge", weights[..., P:], value_BxRxUxKxE)
    return (from_prompt + from_self).reshape(B, R, T, H, E)


def _bounded(scores: jax.Array, scale: float, cap: float) -> jax.Array:
    scores = scores * scale
    return cap * jnp.tanh(scores / cap) if cap else scores


def _own_visible(step_T: jax.Array, keys: int, window: jax.Array | int | None) -> jax.Array:
    """Which of the keys 0..keys-1 the queries at `step_T` see [T, keys]: none that comes later, none too far back."""
    distance_TxU = step_T[:, None] - jnp.arange(keys)[None]
    visible_TxU = distance_TxU >= 0
    return visible_TxU if window is None else visible_TxU & (distance_TxU < window)
