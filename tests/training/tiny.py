"""A tiny preference problem: policies, a SASRec oracle and batches of the alignment task."""

import jax
import jax.numpy as jnp
import numpy as np

from rosepo_jax import config as defaults
from rosepo_jax.data import layouts
from rosepo_jax.models import sasrec
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.preference import objectives
from rosepo_jax.preference.smoothing import Smoothing
from rosepo_jax.stages import align

B, P, R, T, V = 8, 11, 4, 5, 37
ORACLE = sasrec.SASRecConfig(items=13, positions=6, width=8, layers=1, heads=2)
ORACLE_PARAMS = sasrec.init(ORACLE, jax.random.key(5))
DECODER = DecoderConfig(vocabulary=V, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24)


class Bag:
    """A language model that compiles at once: tanh(mean of the prompt + sum of earlier response tokens)."""

    def init(self, key):
        return {"embedding": jax.random.normal(key, (V, 16))}

    logits_chunk, shares = 0, 1

    def states(self, params, prompt_BxP, prompt_mask_BxP, response_BxRxT, fed_BxQ, drop_B=None):
        prompt_BxPxD = jnp.where(prompt_mask_BxP[..., None], params["embedding"][prompt_BxP], 0.0)
        mean_BxD = prompt_BxPxD.sum(axis=1) / prompt_mask_BxP.sum(axis=1, keepdims=True)
        earlier_BxRxSxD = jnp.cumsum(params["embedding"][response_BxRxT[:, :, :-1]], axis=2)
        earlier_BxFxD = earlier_BxRxSxD.reshape(len(fed_BxQ), -1, earlier_BxRxSxD.shape[-1])
        fed_BxQxD = jnp.take_along_axis(earlier_BxFxD, fed_BxQ[..., None], axis=1, mode="clip")
        return jnp.tanh(mean_BxD), jnp.tanh(mean_BxD[:, None] + fed_BxQxD)

    def logits(self, params, hidden):
        return hidden @ params["embedding"].T


def decoder(lora=None, **kinds) -> LanguageModel:
    return LanguageModel(DECODER, lora, **kinds)


def batch(seed=0, parts=1):
    """Ragged prompts and responses, ragged histories; in one part, or two of other widths."""
    generator = np.random.default_rng(seed)

    def lengths(shape, width):
        return np.arange(width) < generator.integers(1, width + 1, shape)[..., None]

    prompt_BxP = generator.integers(0, V, (B, P)).astype(np.int32)
    prompts = [row[mask].tolist() for row, mask in zip(prompt_BxP, lengths((B,), P))]
    response_BxRxT = generator.integers(0, V, (B, R, T)).astype(np.int32)
    response_mask_BxRxT = lengths((B, R), T)
    rows = {
        "row_B": np.arange(B, dtype=np.int32) + 100 * seed,
        "update_B": np.full(B, seed, np.int32),
        "history_BxN": np.where(lengths((B,), 6), generator.integers(0, 13, (B, 6)), -1).astype(np.int32),
        "item_BxR": np.argsort(generator.random((B, 13)), axis=1)[:, :R].astype(np.int32),
        "epsilon_BxK": generator.uniform(0, 0.5, (B, R - 1)).astype(np.float32),
    }
    encoded = layouts.Encoded(prompts, response_BxRxT, response_mask_BxRxT, rows)
    part = layouts.Part(B // parts, P, R * (T - 1))
    return layouts.lay_out((part._replace(Q=part.Q - 1), part) if parts == 2 else (part,), encoded, pad_id=0)


def task(lm, objective="rosepo", mode="oracle", source="in_step", **keys):
    """The task of `align` as its stage makes it."""
    section = defaults.default().align
    section.objective, section.smoothing.mode = objective, mode
    section.update(keys)
    factor = Smoothing(objectives.smoothing_mode(section), 0.1, 0.5, 0.1)
    return align.task(lm, objectives.objective(section), factor, ORACLE, source, seed=3)


def frozen(reference, base=None):
    """What the step never changes; the reference in buffers of its own."""
    return {"base": base or {}, "reference": jax.tree.map(jnp.copy, dict(reference)), "oracle": ORACLE_PARAMS}


def moved(params, scale=0.1):
    """Parameters some way off, as after some training."""
    keys = jax.random.split(jax.random.key(9), len(params))
    return {path: x + scale * jax.random.normal(key, x.shape, x.dtype) for key, (path, x) in zip(keys, params.items())}
