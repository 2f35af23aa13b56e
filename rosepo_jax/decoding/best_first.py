"""Best-first search over the catalogue: finishes what a beam leaves open, until the top-k is proved or too dear."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rosepo_jax.decoding.beam import Result, excluded_ranks, longer, merge, top_k
from rosepo_jax.decoding.trie import Trie


class _Search(NamedTuple):
    node_BxF: jax.Array  # open prefixes: found, but not expanded
    score_BxF: jax.Array  # their log-probs, best first; -inf marks unused room
    items_Bxk: jax.Array
    scores_Bxk: jax.Array
    pruned_B: jax.Array  # the best log-prob of any prefix that found no room
    budget_B: jax.Array  # how many prefixes may still be expanded


class _Lines(NamedTuple):
    """Prefixes to be expanded, one a line, which are fed token by token."""

    node_BxW: jax.Array
    score_BxW: jax.Array
    depth_BxW: jax.Array  # tokens of the prefix; 0 marks an unused line
    token_BxWxT: jax.Array  # what to feed


@functools.partial(jax.jit, static_argnames=("lm", "lines", "budget"))
def best_first(
    lm: Any,
    params: Any,
    trie: Trie,
    prompt_BxP: jax.Array,
    prompt_mask_BxP: jax.Array,
    items_Bxk: jax.Array,
    scores_Bxk: jax.Array,
    *,
    lines: int,
    budget: int,
    excluded_BxX: jax.Array | None = None,
) -> Result:
    """The k best titles after each prompt, from k titles that are known already; scores and ties as in `beam_search`.

    Search:    branch and bound. A prefix is open while its log-prob reaches the k-th result, since no title beats its
               own prefixes. Each round takes the `lines` best open prefixes and feeds them to the model from their
               first tokens; each line then goes on to its best child for as long as that one is open, and leaves the
               other children to later rounds.
    Certified: no prefix is left that scores as high as the k-th result.
    Shapes:    items_Bxk, scores_Bxk as in a `Result` (all -1 and -inf where nothing is known: then the search is only
               slower); the others as in `beam_search`. Memory as in a beam search of as many beams, and 8 bytes of
               every row for each prefix of the budget.
    Budget:    prefixes expanded per row at most; the empty one, which the prompt itself expands, is free. Of open
               prefixes only the best `budget` are kept: no others could have a turn.
    Errors:    ValueError when lines or budget is below 1.
    """
    if lines < 1 or budget < 1:
        raise ValueError(f"lines and budget must be at least 1, not {lines} and {budget}")
    batch, longest = len(prompt_BxP), len(trie.branching)
    room = min(budget, trie.token_M.shape[0])
    lines = min(lines, room)
    trie = jax.tree.map(jnp.asarray, trie)
    excluded_BxX = jnp.full((batch, 0), -1) if excluded_BxX is None else excluded_BxX
    level_T, widths = trie.levels()
    expand = functools.partial(_expand, trie, excluded_ranks(trie, excluded_BxX))
    logits_BxV, prompt_cache = lm.prefill(params, prompt_BxP, prompt_mask_BxP)

    def is_open(search):
        best_B = search.score_BxF[:, 0]
        return jnp.any((best_B > -jnp.inf) & (best_B >= search.scores_Bxk[:, -1]) & (search.budget_B > 0))

    def play(search):
        def is_live(state):
            depth, _, lines, _ = state
            return jnp.any(lines.depth_BxW > depth)

        def step(state):
            depth, search, lines, suffix = state
            logits_BxWxV, suffix = lm.extend(params, prompt_cache, suffix, lines.token_BxWxT[:, :, depth], depth)
            score_BxW = jnp.where(lines.depth_BxW == depth + 1, lines.score_BxW, -jnp.inf)

            def go_on(branching, search, lines):
                search, *children = expand(branching, search, lines.node_BxW, score_BxW, logits_BxWxV)
                search, lines, score_BxWxC = _go_on(trie, search, lines, *children)
                return _push(search, children[0], score_BxWxC), lines

            ways = [functools.partial(go_on, branching) for branching in widths]
            return depth + 1, *jax.lax.switch(jnp.array(level_T)[depth], ways, search, lines), suffix

        start = (jnp.int32(0), *_take(trie, lines, search), lm.empty_suffix(batch, lines, longest))
        return jax.lax.while_loop(is_live, step, start)[1]

    search = _Search(
        node_BxF=jnp.zeros((batch, room), jnp.int32),
        score_BxF=jnp.full((batch, room), -jnp.inf),
        items_Bxk=items_Bxk,
        scores_Bxk=scores_Bxk,
        pruned_B=jnp.full(batch, -jnp.inf),
        budget_B=jnp.full(batch, budget, jnp.int32),
    )
    root = (jnp.zeros((batch, 1), jnp.int32), jnp.zeros((batch, 1)))
    search = _push(*expand(trie.branching[0], search, *root, logits_BxV[:, None]))
    search = jax.lax.while_loop(is_open, play, search)
    left_B = jnp.maximum(search.pruned_B, search.score_BxF[:, 0])
    exact_B = (left_B == -jnp.inf) | (left_B < search.scores_Bxk[:, -1])
    return Result(search.items_Bxk, search.scores_Bxk, exact_B)


def _expand(
    trie: Trie, excluded_BxX, branching: int, search: _Search, node_BxW, score_BxW, logits_BxWxV
) -> tuple[_Search, jax.Array, jax.Array]:
    """Ends the titles that can end at these prefixes (score -inf: none), and finds the children that are open."""
    (item_BxW, ended_BxW), (child_BxWxC, score_BxWxC) = longer(
        trie, excluded_BxX, branching, node_BxW, score_BxW, logits_BxWxV
    )
    # The results that the search began with are found once more.
    is_known_BxW = jnp.any(item_BxW[..., None] == search.items_Bxk[:, None], axis=-1)
    item_BxW, ended_BxW = jnp.where(is_known_BxW, -1, item_BxW), jnp.where(is_known_BxW, -jnp.inf, ended_BxW)
    items_Bxk, scores_Bxk = merge(search.items_Bxk, search.scores_Bxk, item_BxW, ended_BxW)
    score_BxWxC = jnp.where(score_BxWxC >= scores_Bxk[:, -1, None, None], score_BxWxC, -jnp.inf)
    return search._replace(items_Bxk=items_Bxk, scores_Bxk=scores_Bxk), child_BxWxC, score_BxWxC


def _push(search: _Search, node_BxWxC: jax.Array, score_BxWxC: jax.Array) -> _Search:
    """Puts prefixes among the open ones."""
    batch, room = search.node_BxF.shape
    node = jnp.concatenate([search.node_BxF, node_BxWxC.reshape(batch, -1)], axis=1)
    score = jnp.concatenate([search.score_BxF, score_BxWxC.reshape(batch, -1)], axis=1)
    best, place = top_k(score, room + 1)
    return search._replace(
        node_BxF=jnp.take_along_axis(node, place[:, :room], axis=1),
        score_BxF=best[:, :room],
        pruned_B=jnp.maximum(search.pruned_B, best[:, room]),
    )


def _take(trie: Trie, lines: int, search: _Search) -> tuple[_Search, _Lines]:
    """Takes the best open prefixes, as many as there are lines and as the budget allows."""
    node_BxW, score_BxW = search.node_BxF[:, :lines], search.score_BxF[:, :lines]
    taken_BxW = (score_BxW > -jnp.inf) & (score_BxW >= search.scores_Bxk[:, -1:])
    taken_BxW &= jnp.arange(lines)[None] < search.budget_B[:, None]
    node_BxW = jnp.where(taken_BxW, node_BxW, 0)

    longest = len(trie.branching)
    _, upwards_TxBxW = jax.lax.scan(lambda node, _: (trie.parent_M[node], node), node_BxW, length=longest)
    depth_BxW = (upwards_TxBxW > 0).sum(axis=0, dtype=jnp.int32)
    place_BxWxT = jnp.maximum(depth_BxW[..., None] - 1 - jnp.arange(longest, dtype=jnp.int32)[None, None], 0)
    path_BxWxT = jnp.take_along_axis(jnp.moveaxis(upwards_TxBxW, 0, 2), place_BxWxT, axis=2)

    search = search._replace(
        score_BxF=search.score_BxF.at[:, :lines].set(jnp.where(taken_BxW, -jnp.inf, score_BxW)),
        budget_B=search.budget_B - taken_BxW.sum(axis=1, dtype=jnp.int32),
    )
    return search, _Lines(node_BxW, score_BxW, depth_BxW, trie.token_M[path_BxWxT])


def _go_on(
    trie: Trie, search: _Search, lines: _Lines, child_BxWxC: jax.Array, score_BxWxC: jax.Array
) -> tuple[_Search, _Lines, jax.Array]:
    """Moves lines to their best open child as far as the budget allows; the scores returned are those of the others."""
    best_BxW = jnp.argmax(score_BxWxC, axis=2)
    score_BxW = jnp.take_along_axis(score_BxWxC, best_BxW[..., None], axis=2)[..., 0]
    goes_BxW = score_BxW > -jnp.inf
    goes_BxW &= jnp.cumsum(goes_BxW, axis=1) <= search.budget_B[:, None]
    node_BxW = jnp.take_along_axis(child_BxWxC, best_BxW[..., None], axis=2)[..., 0]
    slots, places = jnp.arange(child_BxWxC.shape[2]), jnp.arange(lines.token_BxWxT.shape[2])
    is_next_BxWxT = goes_BxW[..., None] & (places[None, None] == lines.depth_BxW[..., None])
    lines = _Lines(
        node_BxW=jnp.where(goes_BxW, node_BxW, lines.node_BxW),
        score_BxW=jnp.where(goes_BxW, score_BxW, lines.score_BxW),
        depth_BxW=lines.depth_BxW + goes_BxW,
        token_BxWxT=jnp.where(is_next_BxWxT, trie.token_M[node_BxW][..., None], lines.token_BxWxT),
    )
    search = search._replace(budget_B=search.budget_B - goes_BxW.sum(axis=1, dtype=jnp.int32))
    is_moved_BxWxC = goes_BxW[..., None] & (slots[None, None] == best_BxW[..., None])
    return search, lines, jnp.where(is_moved_BxWxC, -jnp.inf, score_BxWxC)
