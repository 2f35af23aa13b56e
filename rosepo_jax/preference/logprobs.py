"""Log-probability of each response: the quantity every objective, score and ranking is made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rosepo_jax.models.decoder import LanguageModel, Params, all_fed, take_fed


def response_logps(
    lm: LanguageModel,
    params: Params,
    prompt_BxP,
    prompt_mask_BxP,
    response_BxRxT,
    response_mask_BxRxT,
    fed_BxQ: jax.Array | None = None,
    drop_B: jax.Array | None = None,
) -> jax.Array:
    """log pi(y | x) of R responses of each prompt, from one shared-prefix pass.

    Formula:   s_r = sum_t log softmax(logits_t)[y_t] over real response tokens, EOS included, prompt excluded
    Shapes:    prompts right-padded [B, P]; responses right-padded [B, R, T]; returns logps_BxR float32
    Packing:   `fed_BxQ` names the tokens that are fed, as in `LanguageModel.states`; every real token but the first of
               a response must follow one of them. None feeds all R (T - 1).
    Units:     natural log
    Dropout:   of the adapters' inputs, where `drop_B` gives each prompt a key
    """
    fed_BxQ = all_fed(response_BxRxT) if fed_BxQ is None else fed_BxQ
    first_BxD, later_BxQxD = lm.states(params, prompt_BxP, prompt_mask_BxP, response_BxRxT, fed_BxQ, drop_B)
    # The first tokens of all responses of a prompt are read from one row of logits.
    first_BxR = _token_logps(lm.logits(params, first_BxD), response_BxRxT[:, :, 0])
    first_BxR = jnp.where(response_mask_BxRxT[:, :, 0], first_BxR, 0.0)

    R, T = response_BxRxT.shape[1:]
    which_BxQ = fed_BxQ // max(T - 1, 1)
    label_BxQ = take_fed(response_BxRxT[:, :, 1:], fed_BxQ)
    is_real_BxQ = take_fed(response_mask_BxRxT[:, :, 1:], fed_BxQ) & (which_BxQ < R)
    later_BxQ = jnp.where(is_real_BxQ, later_logps(lm, params, later_BxQxD, label_BxQ), 0.0)
    of_response_BxQxR = which_BxQ[:, :, None] == jnp.arange(R)[None, None]
    return first_BxR + jnp.where(of_response_BxQxR, later_BxQ[:, :, None], 0.0).sum(axis=1)


def later_logps(lm: LanguageModel, params: Params, later_BxQxD: jax.Array, label_BxQ: jax.Array) -> jax.Array:
    """log softmax(logits)[label] at Q positions of each row, `lm.logits_chunk` of them at a time.

    In chunks the backward pass computes the logits again, so that [B, chunk, V] is all there ever is of them.
    """

    def logps(later_BxQxD, label_BxQ):
        return _token_logps(lm.logits(params, later_BxQxD), label_BxQ[..., None])[..., 0]

    (B, Q), chunk = label_BxQ.shape, lm.logits_chunk
    if not 0 < chunk < Q:
        return logps(later_BxQxD, label_BxQ)
    chunks = -(-Q // chunk)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - Q), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, chunks, chunk, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(lambda _, inputs: (None, logps(*inputs)), prevent_cse=False)
    _, later_CxBxQ = jax.lax.scan(one, None, (split(later_BxQxD), split(label_BxQ)))
    return jnp.moveaxis(later_CxBxQ, 0, 1).reshape(B, -1)[:, :Q]


def batch_logps(lm: LanguageModel, params: Params, batch: Mapping[str, Any], drop_B: jax.Array | None = None):
    """logps_BxR of a batch's parts, one after the other (`data.layouts`); what is put together lies on one device."""
    G, logps, start = lm.shares, [], 0
    for part in batch["parts"]:
        rows = part["prompt_BxP"].shape[0]
        stop = start + rows // G
        keys = None if drop_B is None else drop_B.reshape(G, -1)[:, start:stop].reshape(-1)
        logps.append(response_logps(lm, params, **part, drop_B=keys))
        start = stop
    R = logps[0].shape[1]
    return jnp.concatenate([x.reshape(G, -1, R) for x in logps], axis=1).reshape(-1, R)


def _token_logps(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[token] of M tokens: logits [..., V], tokens [..., M]; float32."""
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
