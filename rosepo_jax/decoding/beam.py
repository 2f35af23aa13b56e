"""Beam search over the catalogue: always valid titles, with a proof per user of when the top-k is exact."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rosepo_jax.decoding.trie import Trie

_BLOCK = 64  # numbers of a row of which `top_k` looks at the largest first


class Result(NamedTuple):
    items_Bxk: jax.Array  # int32, best first, -1 when fewer titles exist
    scores_Bxk: jax.Array  # float32, -inf where the item is -1
    certified_B: jax.Array  # bool


class _Search(NamedTuple):
    node_BxW: jax.Array  # the prefixes alive
    score_BxW: jax.Array  # their log-probs, best first; -inf marks an unused beam
    items_Bxk: jax.Array
    scores_Bxk: jax.Array
    pruned_B: jax.Array  # the best log-prob of any prefix ever dropped


@functools.partial(jax.jit, static_argnames=("lm", "beams", "k"))
def beam_search(
    lm: Any,
    params: Any,
    trie: Trie,
    prompt_BxP: jax.Array,
    prompt_mask_BxP: jax.Array,
    *,
    beams: int,
    k: int,
    excluded_BxX: jax.Array | None = None,
) -> Result:
    """The k best titles of the catalogue after each prompt.

    Formula:   score(title) = sum_t log p(token_t | prompt, token_<t), EOS included, each over the full vocabulary;
               never renormalised over the trie and not divided by length.
    Certified: log-probs only fall along a title, so no title beats its own prefixes. Where every dropped prefix scored
               below the k-th result, the top-k equals that of scoring all titles.
    Ties:      equal results are ordered by item, equal prefixes by their parents' order and then by token. A dropped
               prefix that ties with the k-th result forfeits the certificate.
    Shapes:    prompt_BxP int32, prompt_mask_BxP bool; excluded_BxX int32: items never to return, padded with -1.
               Excluding one of several items with equal tokens excludes them all: their text is the same.
    Units:     natural log, float32.
    Errors:    ValueError when beams or k is below 1.

    `lm` is static, so it must be hashable. Put `trie` on the device once (`jax.device_put`) when calling often.
    """
    if beams < 1 or k < 1:
        raise ValueError(f"beams and k must be at least 1, not {beams} and {k}")
    batch = prompt_BxP.shape[0]
    width = min(beams, trie.rank_I.shape[0])  # no depth has more prefixes than there are titles
    trie = jax.tree.map(jnp.asarray, trie)
    if excluded_BxX is None:
        excluded_BxX = jnp.full((batch, 0), -1)
    advance = functools.partial(_advance, trie, excluded_ranks(trie, excluded_BxX), width)
    level_T, widths = trie.levels()

    logits_BxV, prompt_cache = lm.prefill(params, prompt_BxP, prompt_mask_BxP)
    root = _Search(
        node_BxW=jnp.zeros((batch, 1), jnp.int32),
        score_BxW=jnp.zeros((batch, 1)),
        items_Bxk=jnp.full((batch, k), -1, jnp.int32),
        scores_Bxk=jnp.full((batch, k), -jnp.inf),
        pruned_B=jnp.full(batch, -jnp.inf),
    )
    search, _ = advance(trie.branching[0], root, logits_BxV[:, None])
    longest = len(trie.branching)
    suffix = lm.empty_suffix(batch, width, longest)
    own_BxWxT = jnp.broadcast_to(jnp.arange(width)[None, :, None], (batch, width, longest))

    def can_improve(state):
        _, search, _, _ = state
        best_B = search.score_BxW[:, 0]
        return jnp.any((best_B > -jnp.inf) & (best_B >= search.scores_Bxk[:, -1]))

    def step(state):
        depth, search, line_BxWxT, suffix = state
        token_BxW = trie.token_M[search.node_BxW]
        logits_BxWxV, suffix = lm.extend(params, prompt_cache, suffix, token_BxW, depth, line_BxWxT)
        ways = [functools.partial(advance, branching) for branching in widths]
        search, parent_BxW = jax.lax.switch(jnp.array(level_T)[depth], ways, search, logits_BxWxV)
        # A beam's tokens so far were fed where its parent's were; the next ones are fed at its own place.
        parent_BxWxT = jnp.take_along_axis(line_BxWxT, parent_BxW[..., None], axis=1)
        line_BxWxT = jnp.where(jnp.arange(longest)[None, None] <= depth, parent_BxWxT, own_BxWxT)
        return depth + 1, search, line_BxWxT, suffix

    _, search, _, _ = jax.lax.while_loop(can_improve, step, (jnp.int32(0), search, own_BxWxT, suffix))
    exact_B = (search.pruned_B == -jnp.inf) | (search.pruned_B < search.scores_Bxk[:, -1])
    return Result(search.items_Bxk, search.scores_Bxk, exact_B)


def _advance(
    trie: Trie, excluded_BxX: jax.Array, width: int, branching: int, search: _Search, logits_BxWxV: jax.Array
) -> tuple[_Search, jax.Array]:
    """Ends the titles that can end here, and replaces every prefix by its children, of which the best `width` stay.

    Returns the search and, for every new beam, the beam it came from.
    """
    ended, (child_BxWxC, child_score_BxWxC) = longer(
        trie, excluded_BxX, branching, search.node_BxW, search.score_BxW, logits_BxWxV
    )
    items_Bxk, scores_Bxk = merge(search.items_Bxk, search.scores_Bxk, *ended)

    batch, parents, slots = child_BxWxC.shape
    missing = max(0, width + 1 - parents * slots)
    flat_scores = jnp.pad(child_score_BxWxC.reshape(batch, -1), ((0, 0), (0, missing)), constant_values=-jnp.inf)
    flat_children = jnp.pad(child_BxWxC.reshape(batch, -1), ((0, 0), (0, missing)))
    best, place = top_k(flat_scores, width + 1)
    place_BxW = place[:, :width]
    search = _Search(
        node_BxW=jnp.take_along_axis(flat_children, place_BxW, axis=1),
        score_BxW=best[:, :width],
        items_Bxk=items_Bxk,
        scores_Bxk=scores_Bxk,
        pruned_B=jnp.maximum(search.pruned_B, best[:, width]),
    )
    return search, jnp.minimum(place_BxW // slots, parents - 1)


def longer(
    trie: Trie, excluded_BxX: jax.Array, branching: int, node_BxW, score_BxW, logits_BxWxV
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """What prefixes with these log-probs become by one token.

    Returns the items whose titles end, -1 for none, and their log-probs, -inf for none, both [B, W]; and the nodes one
    token longer with their log-probs, -inf where a slot is unused or all titles below are excluded, both [B, W, C].
    C is `branching`, no less than the children of any of these nodes (but at least 1).
    """
    norm_BxW = jax.nn.logsumexp(logits_BxWxV, axis=-1)
    title_BxW = trie.first_M[node_BxW]
    ends_BxW = (trie.item_M[node_BxW] >= 0) & ~_all_excluded(excluded_BxX, title_BxW, title_BxW + 1)
    ended_BxW = jnp.where(ends_BxW, score_BxW + (logits_BxWxV[..., trie.eos] - norm_BxW), -jnp.inf)
    item_BxW = jnp.where(ended_BxW > -jnp.inf, trie.item_M[node_BxW], -1)

    child_BxWxC = trie.child_start_M1[node_BxW][..., None] + jnp.arange(max(1, branching), dtype=jnp.int32)[None, None]
    is_child_BxWxC = child_BxWxC < trie.child_start_M1[node_BxW + 1][..., None]
    child_BxWxC = jnp.where(is_child_BxWxC, child_BxWxC, 0)
    is_open_BxWxC = is_child_BxWxC & ~_all_excluded(excluded_BxX, trie.first_M[child_BxWxC], trie.last_M[child_BxWxC])
    step_BxWxC = jnp.take_along_axis(logits_BxWxV, trie.token_M[child_BxWxC], axis=2) - norm_BxW[..., None]
    return (item_BxW, ended_BxW), (
        child_BxWxC,
        jnp.where(is_open_BxWxC, score_BxW[..., None] + step_BxWxC, -jnp.inf),
    )


def top_k(x_BxN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, ties included, without sorting a wide row, which costs as much as a step of a small model.

    The k best stand in the k blocks with the best maxima: each of these has one at least as good as all of any other.
    Places of -inf, where less than k are finite, may be any.
    """
    N = x_BxN.shape[1]
    blocks = -(-N // _BLOCK)
    if blocks <= 2 * k:
        return jax.lax.top_k(x_BxN, k)
    x_BxMxN = jnp.pad(x_BxN, ((0, 0), (0, blocks * _BLOCK - N)), constant_values=-jnp.inf).reshape(-1, blocks, _BLOCK)
    _, block_Bxk = jax.lax.top_k(x_BxMxN.max(axis=2), k)
    block_Bxk = jnp.sort(block_Bxk, axis=1)  # places rise, so that ties come in order
    best, place = jax.lax.top_k(jnp.take_along_axis(x_BxMxN, block_Bxk[..., None], axis=1).reshape(len(x_BxN), -1), k)
    place = jnp.take_along_axis(block_Bxk, place // _BLOCK, axis=1) * _BLOCK + place % _BLOCK
    return best, jnp.minimum(place, N - 1)


def merge(items_Bxk, scores_Bxk, item_BxW, score_BxW) -> tuple[jax.Array, jax.Array]:
    """The k best of both, by falling score, then by item."""
    k = items_Bxk.shape[1]
    scores = jnp.concatenate([scores_Bxk, score_BxW], axis=1)
    items = jnp.concatenate([items_Bxk, item_BxW], axis=1)
    falling, items = jax.lax.sort((-scores, items), num_keys=2)
    return items[:, :k], -falling[:, :k]


def excluded_ranks(trie: Trie, excluded_BxX: jax.Array) -> jax.Array:
    """The distinct title ranks of the excluded items; -1 for padding and repetitions."""
    rank_BxX = jnp.sort(jnp.where(excluded_BxX >= 0, trie.rank_I[excluded_BxX], -1), axis=1)
    repeats_BxX = jnp.pad(rank_BxX[:, 1:] == rank_BxX[:, :-1], ((0, 0), (1, 0)))[:, : rank_BxX.shape[1]]
    return jnp.where(repeats_BxX, -1, rank_BxX)


def _all_excluded(excluded_BxX: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Whether every title rank in [first, last) is excluded, so that a prefix with nothing to offer takes no beam."""
    rank = excluded_BxX.reshape(len(excluded_BxX), *(1,) * (first.ndim - 1), -1)
    within = (rank >= first[..., None]) & (rank < last[..., None])
    return jnp.sum(within, axis=-1) == last - first
