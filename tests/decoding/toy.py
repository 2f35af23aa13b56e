"""A language model small enough to check by hand: its suffix cache holds the tokens fed so far, and nothing else."""

import dataclasses

import jax.numpy as jnp
import numpy as np

EOS = 0


@dataclasses.dataclass(frozen=True)
class ToyModel:
    """logits = sharpness * tanh(prompt vector + sum over tokens t of weight_t * embedding[token_t]) @ head.

    The token weights differ by place, so a cache gathered from the wrong beam or written at the wrong depth shows.
    """

    sharpness: float = 3.0

    def prefill(self, params, prompt_BxP, prompt_mask_BxP):
        place_P = jnp.cos(jnp.arange(prompt_BxP.shape[1], dtype=jnp.float32))
        tokens = jnp.where(prompt_mask_BxP[..., None], params["embedding"][prompt_BxP] * place_P[None, :, None], 0.0)
        prompt_BxD = tokens.sum(axis=1)
        return self._logits(params, prompt_BxD), prompt_BxD

    def empty_suffix(self, B, W, T):
        return {"tokens": jnp.full((1, B, W, T), EOS, jnp.int32), "vectors": jnp.zeros((2, B, W, T, 3))}

    def extend(self, params, prompt_BxD, suffix, token_BxW, depth):
        tokens = suffix["tokens"].at[0, :, :, depth].set(token_BxW)
        place_T = jnp.arange(tokens.shape[-1])
        weight_T = jnp.where(place_T <= depth, jnp.sin(1.0 + place_T), 0.0)
        state = prompt_BxD[:, None] + (params["embedding"][tokens[0]] * weight_T[None, None, :, None]).sum(axis=2)
        return self._logits(params, state), {"tokens": tokens, "vectors": suffix["vectors"]}

    def _logits(self, params, state):
        return self.sharpness * jnp.tanh(state) @ params["head"]


def random_params(rng, vocabulary, width=8):
    normal = rng.standard_normal((2, vocabulary, width)).astype(np.float32)
    return {"embedding": normal[0], "head": normal[1].T}


def logps(params, prompt, tokens, sharpness=3.0):
    """log p of every next token after each prefix of `tokens` [T + 1, V], in float64."""
    embedding, head = (params[name].astype(np.float64) for name in ("embedding", "head"))
    state = (embedding[prompt] * np.cos(np.arange(len(prompt)))[:, None]).sum(axis=0)
    terms = embedding[tokens] * np.sin(1.0 + np.arange(len(tokens)))[:, None]
    states = state + np.concatenate([np.zeros((1, len(state))), np.cumsum(terms, axis=0)])
    logits = sharpness * np.tanh(states) @ head
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def title_score(params, prompt, title):
    return logps(params, prompt, np.array(title[:-1], int))[np.arange(len(title)), title].sum()


def pad_prompts(prompts, width, fill=1):
    """Right-padded prompts and their mask."""
    tokens, mask = np.full((len(prompts), width), fill, np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    return tokens, mask
