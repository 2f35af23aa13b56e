"""Free greedy text, for the valid ratio of the literature. Nothing but the arguments decides how it decodes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("lm", "max_tokens", "eos"))
def greedy(
    lm: Any, params: Any, prompt_BxP: jax.Array, prompt_mask_BxP: jax.Array, *, max_tokens: int, eos: int
) -> tuple[jax.Array, jax.Array]:
    """The most probable next token, again and again, until EOS or `max_tokens`.

    Shapes:    prompt_BxP int32, prompt_mask_BxP bool; returns token_BxT int32 with T = max_tokens, filled with `eos`
               after the first EOS, and logp_B float32, summed (natural log) up to and including that EOS. A row
               without EOS was cut. Equal logits: the lowest token.
    Errors:    ValueError when max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    batch = prompt_BxP.shape[0]
    logits_BxV, prompt_cache = lm.prefill(params, prompt_BxP, prompt_mask_BxP)

    def choose(t, logits_BxV, token_BxT, logp_B, done_B):
        logps_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
        token_B = jnp.where(done_B, eos, jnp.argmax(logps_BxV, axis=1))
        logp_B += jnp.where(done_B, 0.0, jnp.max(logps_BxV, axis=1))
        return t + 1, token_BxT.at[:, t].set(token_B), logp_B, done_B | (token_B == eos)

    def is_unfinished(state):
        (t, _, _, done_B), _ = state
        return (t < max_tokens) & ~jnp.all(done_B)

    def step(state):
        (t, token_BxT, logp_B, done_B), suffix = state
        logits_Bx1xV, suffix = lm.extend(params, prompt_cache, suffix, token_BxT[:, t - 1][:, None], t - 1)
        return choose(t, logits_Bx1xV[:, 0], token_BxT, logp_B, done_B), suffix

    start = (jnp.int32(0), logits_BxV, jnp.full((batch, max_tokens), eos, jnp.int32))
    written = choose(*start, jnp.zeros(batch), jnp.zeros(batch, bool))
    state = (written, lm.empty_suffix(batch, 1, max_tokens))
    (_, token_BxT, logp_B, _), _ = jax.lax.while_loop(is_unfinished, step, state)
    return token_BxT, logp_B
