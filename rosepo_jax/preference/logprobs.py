"""Log-probability of each response: the quantity every objective, score and ranking is made of."""

import jax
import jax.numpy as jnp

from rosepo_jax.models.decoder import LanguageModel, Params


def response_logps(
    lm: LanguageModel,
    params: Params,
    prompt_BxP,
    prompt_mask_BxP,
    response_BxRxT,
    response_mask_BxRxT,
    drop_B: jax.Array | None = None,
) -> jax.Array:
    """log pi(y | x) of R responses of each prompt, from one shared-prefix pass.

    Formula:   s_r = sum_t log softmax(logits_t)[y_t] over real response tokens, EOS included, prompt excluded
    Shapes:    prompts right-padded [B, P]; responses right-padded [B, R, T]; returns logps_BxR float32
    Units:     natural log
    Dropout:   of the adapters' inputs, where `drop_B` gives each prompt a key
    """
    first_BxD, later_BxRxSxD = lm.states(params, prompt_BxP, prompt_mask_BxP, response_BxRxT, drop_B)
    # The first tokens of all responses of a prompt are read from one row of logits.
    logps_BxR = _token_logps(lm.logits(params, first_BxD), response_BxRxT[:, :, 0])
    logps_BxR = jnp.where(response_mask_BxRxT[:, :, 0], logps_BxR, 0.0)
    later_BxRxSx1 = _token_logps(lm.logits(params, later_BxRxSxD), response_BxRxT[:, :, 1:, None])
    return logps_BxR + jnp.where(response_mask_BxRxT[:, :, 1:], later_BxRxSx1[..., 0], 0.0).sum(axis=-1)


def _token_logps(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[token] of M tokens: logits [..., V], tokens [..., M]; float32."""
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
