"""Exact scores of given items, and of texts, for many rows: the same shared-prefix pass that training uses."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rosepo_jax.data import batches, examples
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.prompts import pad
from rosepo_jax.decoding.beam import beam_search
from rosepo_jax.decoding.best_first import best_first
from rosepo_jax.decoding.greedy import greedy
from rosepo_jax.decoding.trie import compile_trie
from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.training import sharding
from rosepo_jax.training.policy import Policy


@functools.partial(jax.jit, static_argnums=0)
def part_logps(lm, params, part):
    """logps_BxR of a part of a batch (`data.layouts`), as one program."""
    return response_logps(lm, params, **part)


def logps(
    policy: Policy, params: Mapping[str, jax.Array], texts: Sequence[str], response_BxRxT, response_mask_BxRxT
) -> np.ndarray:
    """logps_BxR of R responses to each of B prompts."""
    mine_B = mine(policy, len(texts))
    part = examples.scored(
        policy.encoder, [texts[b] for b in mine_B], response_BxRxT[mine_B], response_mask_BxRxT[mine_B]
    )
    return sharding.to_host(part_logps(policy.lm, params, sharding.to_device(policy.mesh, part)))


def mine(policy: Policy, batch_size: int) -> np.ndarray:
    """Places of this host's rows in a batch."""
    return batches.shares_of(sharding.shares(policy.mesh), sharding.ways(policy.mesh), batch_size)


def item_scores(
    policy: Policy,
    params: Mapping[str, jax.Array],
    catalogue: Catalogue,
    titles: TitleTable,
    rows,
    items_ExC: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """log pi(title | prompt) of C items for each row, [E, C] float32.

    Rows are scored in order of their tokens, so that short ones are not padded to the longest of all; results do not
    depend on it.
    """
    sharding.check_batch(policy.mesh, "evaluate.batch_size", batch_size)
    history_E = np.where(rows.history_ExN >= 0, titles.length_I[rows.history_ExN], 0).sum(axis=1)
    by_length = np.argsort(history_E + titles.length_I[items_ExC].sum(axis=1), kind="stable")
    scores_ExC = np.zeros(items_ExC.shape, np.float32)
    for block, real in batches.blocks(len(items_ExC), batch_size):
        index = by_length[block]
        texts = prompt_texts(policy, catalogue, rows, index)
        scores_ExC[index[real]] = logps(policy, params, texts, *titles.take(items_ExC[index]))[real]
    return scores_ExC


class Top(NamedTuple):
    """The k best catalogue items of each row: items [E, k] (-1: none), scores [E, k], certified [E]."""

    items: np.ndarray
    scores: np.ndarray
    certified: np.ndarray


def catalogue_top(
    policy: Policy,
    params: Mapping[str, jax.Array],
    catalogue: Catalogue,
    titles: TitleTable,
    rows,
    *,
    beams: int,
    k: int,
    batch_size: int,
    excluded_ExX: np.ndarray | None = None,
    budget: int = 0,
) -> Top:
    """The best titles of the whole catalogue for each row, by trie-constrained beam search.

    Rows whose beams prove nothing are searched on, best prefix first, up to `budget` prefixes each; 0 leaves them.
    """
    sharding.check_batch(policy.mesh, "batch_size", batch_size)
    trie = jax.device_put(compile_trie(titles.ids, policy.encoder.eos), sharding.replicated(policy.mesh))
    top = Top(
        np.full((len(rows), k), -1, np.int32),
        np.full((len(rows), k), -np.inf, np.float32),
        np.zeros(len(rows), bool),
    )

    def search(index_E: np.ndarray, find, **known: np.ndarray) -> None:
        for block, real in batches.blocks(len(index_E), batch_size):
            index = index_E[block]
            here = index[mine(policy, batch_size)]
            batch = prompt_batch(policy, catalogue, rows, here) | {name: x[here] for name, x in known.items()}
            if excluded_ExX is not None:
                batch["excluded_BxX"] = excluded_ExX[here]
            result = find(policy.lm, params, trie, **sharding.to_device(policy.mesh, batch))
            for kept, value in zip(top, result):
                kept[index[real]] = sharding.to_host(value)[real]

    search(np.arange(len(rows)), functools.partial(beam_search, beams=beams, k=k))
    if budget:
        # The lower the k-th result, the longer the search: rows of a batch should take equally long.
        index_E = np.flatnonzero(~top.certified)
        index_E = index_E[np.argsort(-top.scores[index_E, -1], kind="stable")]
        complete = functools.partial(best_first, lines=beams, budget=budget)
        search(index_E, complete, items_Bxk=top.items, scores_Bxk=top.scores)
    return top


def greedy_texts(
    policy: Policy, params: Mapping[str, jax.Array], catalogue: Catalogue, rows, *, batch_size: int, max_tokens: int
) -> list[tuple[str, bool]]:
    """Free greedy text of each row, and whether it ended by itself."""
    texts: list[tuple[str, bool]] = []
    for block, real in batches.blocks(len(rows), batch_size):
        here = block[mine(policy, batch_size)]
        batch = sharding.to_device(policy.mesh, prompt_batch(policy, catalogue, rows, here))
        eos = policy.encoder.eos
        tokens_BxT, _ = greedy(policy.lm, params, **batch, max_tokens=max_tokens, eos=eos)
        for tokens in sharding.to_host(tokens_BxT)[real]:
            ends = np.flatnonzero(tokens == eos)
            text = policy.encoder.decode(tokens[: ends[0]] if len(ends) else tokens)
            texts.append((text, len(ends) > 0))
    return texts


def prompt_batch(policy: Policy, catalogue: Catalogue, rows, block: np.ndarray) -> dict[str, np.ndarray]:
    return examples.prompts(policy.encoder, prompt_texts(policy, catalogue, rows, block))


def prompt_texts(policy: Policy, catalogue: Catalogue, rows, block: np.ndarray) -> list[str]:
    return examples.prompt_texts(policy.encoder, catalogue, rows.history_ExN[block], rows.candidates_ExC[block])


@functools.partial(jax.jit, static_argnums=0)
def _states(lm, params, tokens_BxP, mask_BxP):
    return lm.prompt_states(params, tokens_BxP, mask_BxP)


def title_embeddings(policy: Policy, titles: TitleTable, batch_size: int = 256) -> np.ndarray:
    """Unit vectors [I, D] of all titles by the language model itself: mean last-layer state, centred over all titles.

    Centring removes the direction all titles share, which would make every cosine large.
    """
    ids = [[*policy.encoder.before, *title[:-1]] for title in titles.ids]
    tokens, mask = pad(ids, max(map(len, ids)), policy.encoder.pad)
    vectors = np.zeros((len(ids), policy.lm.config.width), np.float32)
    batch_size = -(-batch_size // policy.mesh.size) * policy.mesh.size  # every device gets as many rows
    for block, real in batches.blocks(len(ids), batch_size):
        vectors[block[real]] = sharding.to_host(_states(policy.lm, policy.params, tokens[block], mask[block]))[real]
    vectors -= vectors.mean(axis=0, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
