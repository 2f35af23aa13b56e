"""Log-probability of each response: the quantity every objective, score and ranking is made of."""

import jax
import jax.numpy as jnp

from rosepo_jax.models.decoder import LanguageModel, Params


def response_logps(
    lm: LanguageModel, params: Params, prompt_BxP, prompt_mask_BxP, response_BxRxT, response_mask_BxRxT
) -> jax.Array:
    """log pi(y | x) of R responses of each prompt, from one shared-prefix pass.

    Formula:   s_r = sum_t log softmax(logits_t)[y_t] over real response tokens, EOS included, prompt excluded
    Shapes:    prompts right-padded [B, P]; responses right-padded [B, R, T]; returns logps_BxR float32
    Units:     natural log
    """
    hidden = lm.hidden(params, prompt_BxP, prompt_mask_BxP, response_BxRxT)
    logits_BxRxTxV = lm.logits(params, hidden)
    chosen = jnp.take_along_axis(logits_BxRxTxV, response_BxRxT[..., None], axis=-1)[..., 0]
    logps_BxRxT = chosen - jax.nn.logsumexp(logits_BxRxTxV, axis=-1)
    return jnp.where(response_mask_BxRxT, logps_BxRxT, 0.0).sum(axis=-1)
