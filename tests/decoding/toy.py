"""A language model small enough to check by hand: its suffix cache holds what was fed at each place in each step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.preference.logprobs import response_logps

EOS = 0
SMALL = {  # catalogues of fewer titles than beams and results
    "one item": [[3, EOS]],
    "an empty title": [[EOS]],
    "empty and not": [[EOS], [2, EOS]],
    "Alien and Aliens": [[1, 2, EOS], [1, 2, 3, EOS]],
    "duplicates": [[1, 2, 3, EOS], [1, 2, EOS], [1, 2, 3, EOS], [1, 2, EOS]],
    "long and short": [[4, 4, 4, 4, EOS], [5, EOS]],
}
VOCABULARY, DEPTH, NODES = 6, 5, 256  # of random catalogues: tokens, the longest title, nodes of the trie


@dataclasses.dataclass(frozen=True)
class ToyModel:
    """logits = sharpness * tanh(prompt vector + sum over tokens t of weight_t * embedding[token_t]) @ head.

    The token weights differ by step, so a token taken from the wrong beam or written at the wrong depth shows.
    """

    sharpness: float = 3.0

    def prefill(self, params, prompt_BxP, prompt_mask_BxP):
        place_P = jnp.cos(jnp.arange(prompt_BxP.shape[1], dtype=jnp.float32))
        tokens = jnp.where(prompt_mask_BxP[..., None], params["embedding"][prompt_BxP] * place_P[None, :, None], 0.0)
        prompt_BxD = tokens.sum(axis=1)
        return self._logits(params, prompt_BxD), prompt_BxD

    def empty_suffix(self, B, W, T):
        return jnp.full((B, W, T), EOS, jnp.int32)

    def extend(self, params, prompt_BxD, fed_BxWxT, token_BxW, depth, line_BxWxT=None):
        fed_BxWxT = fed_BxWxT.at[:, :, depth].set(token_BxW)
        own_BxWxT = fed_BxWxT if line_BxWxT is None else jnp.take_along_axis(fed_BxWxT, line_BxWxT, axis=1)
        step_T = jnp.arange(own_BxWxT.shape[-1])
        weight_T = jnp.where(step_T <= depth, jnp.sin(1.0 + step_T), 0.0)
        state = prompt_BxD[:, None] + (params["embedding"][own_BxWxT] * weight_T[None, None, :, None]).sum(axis=2)
        return self._logits(params, state), fed_BxWxT

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


def same_shape(trie):
    """The trie in arrays of one size, so that many random catalogues share one compilation."""

    def grow(array, value):
        return np.pad(array, (0, NODES - len(array)), constant_values=value)

    return dataclasses.replace(
        trie,
        child_start_M1=grow(trie.child_start_M1, trie.child_start_M1[-1]),
        parent_M=grow(trie.parent_M, 0),
        token_M=grow(trie.token_M, EOS),
        item_M=grow(trie.item_M, -1),
        first_M=grow(trie.first_M, 0),
        last_M=grow(trie.last_M, 0),
        rank_I=grow(trie.rank_I, 0),
        branching=(VOCABULARY,) * DEPTH,
    )


def random_titles(rng, count, vocabulary=VOCABULARY, depth=DEPTH):
    """Short tokens from few letters: prefixes, duplicates and shared beginnings are common."""
    return [[*rng.integers(1, vocabulary, rng.integers(1, depth + 1)).tolist(), EOS] for _ in range(count)]


def random_prompts(rng, count, vocabulary=VOCABULARY):
    return [rng.integers(1, vocabulary, rng.integers(1, 7)).tolist() for _ in range(count)]


def brute_force(params, prompt, titles, excluded=()):
    """All distinct titles and their scores, best first; the lowest item of equal titles stands for all."""
    banned = {tuple(titles[item]) for item in excluded if item >= 0}
    lowest = {tuple(title): item for item, title in reversed(list(enumerate(titles)))}
    scored = [(-title_score(params, prompt, title), item) for title, item in lowest.items() if title not in banned]
    return [(item, -score) for score, item in sorted(scored)]


def assert_is(items, scores, ranking):
    """Items and scores are the first of the ranking and nothing follows; what ties to rounding may change places."""
    n, score = min(len(items), len(ranking)), dict(ranking)
    assert (items[n:] == -1).all()
    assert (scores[n:] == -np.inf).all()
    assert len(set(items[:n].tolist())) == n
    for found in (scores[:n], [score[item] for item in items[:n].tolist()]):
        np.testing.assert_allclose(found, [score for _, score in ranking[:n]], rtol=1e-5, atol=1e-5)


def assert_sound(items, scores, prompt, params, titles, excluded=()):
    """Whatever the certificate: items of the catalogue, none twice or excluded, exact scores, best first."""
    real = items[items >= 0].tolist()
    assert (items[len(real) :] == -1).all()
    texts = [tuple(titles[item]) for item in real]
    assert len(set(texts)) == len(texts)
    assert all(titles.index(list(text)) == item for text, item in zip(texts, real))
    assert not {tuple(titles[item]) for item in excluded if item >= 0} & set(texts)
    expected = [title_score(params, prompt, titles[item]) for item in real]
    np.testing.assert_allclose(scores[: len(real)], expected, rtol=1e-5, atol=1e-5)
    assert (np.diff(scores[: len(real)]) <= 0).all()


@functools.cache
def scored_by_decoder():
    """The real decoder with a catalogue without duplicates: ((lm, params, titles, prompts, mask), every_BxI).

    All titles are scored by the shared-prefix pass, which shares no code with the cached path that searches take.
    """
    rng = np.random.default_rng(7)
    config = DecoderConfig(vocabulary=20, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24)
    lm = LanguageModel(config)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    params = {path: rng.standard_normal(x.shape, np.float32) * 0.5 + ("norm" in path) for path, x in shapes.items()}
    titles = list(map(list, dict.fromkeys(map(tuple, random_titles(rng, 50, 20, 6)))))
    prompts, mask = pad_prompts(random_prompts(rng, 5, 20), 9)
    responses, responses_mask = pad_prompts(titles, max(map(len, titles)))
    responses, responses_mask = (np.broadcast_to(x, (5, *x.shape)) for x in (responses, responses_mask))
    score = jax.jit(response_logps, static_argnums=0)
    every_BxI = np.asarray(score(lm, params, prompts, mask, responses, responses_mask))
    return (lm, params, titles, prompts, mask), every_BxI
