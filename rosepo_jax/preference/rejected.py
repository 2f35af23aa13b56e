"""Rejected items: which wrong titles a preference pair is built from.

Every strategy turns a row into scored proposals; the best eligible ones are taken. Random strategies perturb log p
with Gumbel noise, so that the K best are K draws without replacement from p (Plackett-Luce). The noise of an item is a
hash of (run seed, strategy, user, position, item): no draw depends on the target, on other rows, their order or blocks.

Eligible is an item with a title that is, by id and by normalised title, neither the chosen one, nor in the prompt's
history, nor among the user's training interactions. Validation and test interactions exclude nothing: that would leak
the future into training.

Source: the strategies of RosePO (arXiv 2410.12519); pools, temperature and mixtures are our own choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.errors import UserError

if TYPE_CHECKING:
    from rosepo_jax.data.rows import Rows

STRATEGIES = ("self_hard", "semantic", "popularity", "uniform")  # a strategy's code is its index
BLOCK = 2**21  # elements of the largest [rows, catalogue] array held at a time


@dataclasses.dataclass(frozen=True)
class Pool:
    """What the samplers know of the catalogue and of the users; train split and frozen models only.

    Attributes:
      title_group_I: int, equal for items whose normalised titles are equal, in [0, I).
      count_I: int, interactions in the train split.
      titled_I: bool, False for an item with an empty title.
      indptr, items: the train items of user u are items[indptr[u]:indptr[u + 1]].
      embedding_IxD: unit-norm title embeddings; needed by `semantic` only.
    """

    title_group_I: np.ndarray
    count_I: np.ndarray
    titled_I: np.ndarray
    indptr: np.ndarray
    items: np.ndarray
    embedding_IxD: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rejected:
    """K distinct rejected items a row. Rows with kept_E False ran out of eligible items: their entries are -1."""

    rejected_ExK: np.ndarray  # int32
    strategy_ExK: np.ndarray  # int8, index into STRATEGIES
    kept_E: np.ndarray  # bool
    counters: dict[str, Any]  # {"rows", "kept", "drawn": {strategy: items}, "exhausted": {strategy: rows}}


def mixture(text: str) -> dict[str, float]:
    """Weights, summing to 1, of "self_hard" or of "self_hard:0.5,uniform:0.5"."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in STRATEGIES:
            raise UserError(f"config.pairs.strategy: no strategy {name!r}; choose from {', '.join(STRATEGIES)}")
        if name in weights:
            raise UserError(f"config.pairs.strategy: {name} is given twice; name each strategy once")
        try:
            weights[name] = float(number) if colon else 1.0
        except ValueError:
            weights[name] = np.nan
        if not 0 < weights[name] < np.inf:
            raise UserError(f"config.pairs.strategy: weight {number!r} of {name} is not a positive number")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def strategies(
    weights: Mapping[str, float], seed: int, user_E: np.ndarray, position_E: np.ndarray, n: int
) -> np.ndarray:
    """strategy_ExK, int8: the strategy of each of the n draws of a row, by hash with the weights of `mixture`."""
    uniform_ExK = seeds.uniform(seeds.key(seed, "strategy"), user_E[:, None], position_E[:, None], np.arange(n)[None])
    names = sorted(weights, key=STRATEGIES.index)
    edges = np.cumsum([weights[name] for name in names])[:-1]
    codes = np.array([STRATEGIES.index(name) for name in names], np.int8)
    return codes[np.searchsorted(edges, uniform_ExK, side="right")]


def flip(seed: int, user_E: np.ndarray, position_E: np.ndarray, share: float) -> np.ndarray:
    """flip_E, bool: the rows whose chosen and first rejected are exchanged, a `share` of all, chosen by hash."""
    if not 0 <= share <= 1:
        raise UserError(f"config.pairs.flip: {share} is not a share; give a number from 0 to 1")
    return seeds.uniform(seeds.key(seed, "flip"), user_E, position_E) < share


def popularity_logits(count_I: np.ndarray, alpha: float) -> np.ndarray:
    """log of p(i) ∝ count(i)^alpha over the items with a count, -inf for the others; alpha = 0 is uniform over them."""
    with np.errstate(divide="ignore"):
        log_count_I = np.log(count_I.astype(np.float64))
    return np.where(count_I > 0, alpha * np.where(count_I > 0, log_count_I, 0.0), -np.inf)


def similarity(embedding_IxD: np.ndarray, history_ExN: np.ndarray, reduce: str) -> np.ndarray:
    """similarity_ExI, float32: `max` or `mean` cosine of every item to the history; -inf for an empty history."""
    # The last bit of a matrix product depends on the size of the block. Computed in float64 and rounded, equal items
    # stay tied, so that the edge of the nearest items falls the same way in any block.
    unit_IxD = embedding_IxD.astype(np.float64)
    item_U, at_ExN = np.unique(history_ExN, return_inverse=True)
    cosine_UxI = (unit_IxD[item_U] @ unit_IxD.T).astype(np.float32)
    at_ExN = at_ExN.reshape(history_ExN.shape)
    known_ExN = history_ExN >= 0
    total_ExI = np.full((len(history_ExN), len(unit_IxD)), -np.inf if reduce == "max" else 0.0, np.float32)
    for at_E, known_E in zip(at_ExN.T, known_ExN.T):
        if reduce == "max":
            total_ExI[known_E] = np.maximum(total_ExI[known_E], cosine_UxI[at_E[known_E]])
        else:
            total_ExI[known_E] += cosine_UxI[at_E[known_E]]
    if reduce == "mean":
        total_ExI /= np.maximum(known_ExN.sum(1), 1).astype(np.float32)[:, None]
        total_ExI[~known_ExN.any(1)] = -np.inf
    return total_ExI


def sample(
    pairs: Any,
    pool: Pool,
    rows: Rows,
    seed: int,
    *,
    ranked_ExM: np.ndarray | None = None,
    candidates_in_prompt: bool = False,
) -> Rejected:
    """K = pairs.negatives distinct rejected items of every row, by the strategies of `pairs` (config.pairs).

    Strategies: `self_hard` takes the best ranked eligible items; `semantic` draws from the pairs.top eligible items
    nearest to the history (ties at the edge included) with p ∝ exp(similarity / temperature); `popularity` with
    p ∝ count^alpha; `uniform` evenly. A row whose proposals run out is dropped and counted under the strategy that
    failed; no other strategy steps in.

    Args:
      rows: user_E, position_E, history_ExN (-1 = padding), target_E and candidates_ExC are read.
      ranked_ExM: items by the SFT model's score, best first, -1 = none; needed by `self_hard` only, and only in the
        rows to which `strategies` gives it.
      candidates_in_prompt: every rejected item comes from the row's candidates, since otherwise the model would learn
        which titles are listed. Else pairs.pool = "candidates" binds `self_hard` and `uniform` only.
    Errors: UserError for settings out of range; ValueError when the ranking or the embeddings are missing.
    """
    _check(pairs)
    weights = mixture(pairs.strategy)
    if "self_hard" in weights and ranked_ExM is None:
        raise ValueError("self_hard needs ranked_ExM")
    if "semantic" in weights and pool.embedding_IxD is None:
        raise ValueError("semantic needs pool.embedding_IxD")
    n_rows, n_items = len(rows.user_E), len(pool.count_I)
    strategy_ExK = strategies(weights, seed, rows.user_E, rows.position_E, pairs.negatives)
    rejected_ExK = np.full(strategy_ExK.shape, -1, np.int32)
    failed_E = np.full(n_rows, -1, np.int8)  # code of the strategy that ran out

    step = max(1, BLOCK // max(n_items, 1))
    for start in range(0, n_rows, step):
        block = slice(start, start + step)
        user_E, position_E, history_ExN = rows.user_E[block], rows.position_E[block], rows.history_ExN[block]
        candidates_ExC = rows.candidates_ExC[block]
        eligible_ExI = _eligible(pool, user_E, history_ExN, rows.target_E[block])
        proposals = {}
        for name in weights:
            bound = candidates_in_prompt or (pairs.pool == "candidates" and name in ("self_hard", "uniform"))
            items = candidates_ExC if bound else np.arange(n_items)[None]
            if name == "self_hard":
                assert ranked_ExM is not None
                items = ranked_ExM[block]
                score = np.broadcast_to(-np.arange(items.shape[1], dtype=np.float64), items.shape)
                if bound:
                    score = np.where((items[:, :, None] == candidates_ExC[:, None]).any(2), score, -np.inf)
            else:
                noise = _gumbel(seeds.uniform(seeds.key(seed, name), user_E[:, None], position_E[:, None], items))
                if name == "semantic":
                    assert pool.embedding_IxD is not None
                    near_ExI = similarity(pool.embedding_IxD, history_ExN, pairs.similarity)
                    near = _nearest(np.where(_at(eligible_ExI, items), _at(near_ExI, items), -np.inf), pairs.top)
                    score = near / pairs.temperature + noise
                elif name == "popularity":
                    score = popularity_logits(pool.count_I, pairs.alpha)[items] + noise
                else:
                    score = noise
            usable = _at(eligible_ExI, items) & (items >= 0)
            proposals[STRATEGIES.index(name)] = items, np.where(usable, score, -np.inf)
        rejected_ExK[block], failed_E[block] = _pick(proposals, strategy_ExK[block], pool.title_group_I)

    kept_E = failed_E < 0
    names = [name for name in STRATEGIES if name in weights]
    counters = {
        "rows": n_rows,
        "kept": int(kept_E.sum()),
        "drawn": {name: int((strategy_ExK[kept_E] == STRATEGIES.index(name)).sum()) for name in names},
        "exhausted": {name: int((failed_E == STRATEGIES.index(name)).sum()) for name in names},
    }
    rejected_ExK[~kept_E] = -1
    return Rejected(rejected_ExK, strategy_ExK, kept_E, counters)


def _check(pairs: Any) -> None:
    for name, good, hint in (
        ("negatives", pairs.negatives >= 1, "at least 1"),
        ("pool", pairs.pool in ("candidates", "catalogue"), "candidates or catalogue"),
        ("top", pairs.top >= 1, "at least 1"),
        ("temperature", pairs.temperature > 0, "greater than 0"),
        ("similarity", pairs.similarity in ("max", "mean"), "max or mean"),
    ):
        if not good:
            raise UserError(f"config.pairs.{name}: {pairs[name]!r} is not allowed; it must be {hint}")


def _eligible(pool: Pool, user_E: np.ndarray, history_ExN: np.ndarray, target_E: np.ndarray) -> np.ndarray:
    """eligible_ExI, bool."""
    group_I, n_rows = pool.title_group_I, len(user_E)
    start_E = pool.indptr[user_E]
    length_E = pool.indptr[user_E + 1] - start_E
    offset_E = np.cumsum(length_E) - length_E
    seen = pool.items[np.arange(length_E.sum()) + np.repeat(start_E - offset_E, length_E)]
    taken_ExG = np.zeros((n_rows, len(group_I)), bool)  # by title group
    taken_ExG[np.repeat(np.arange(n_rows), length_E), group_I[seen]] = True
    taken_ExG[np.arange(n_rows), group_I[target_E]] = True
    known_ExN = history_ExN >= 0
    taken_ExG[np.nonzero(known_ExN)[0], group_I[history_ExN[known_ExN]]] = True
    return ~taken_ExG[:, group_I] & pool.titled_I


def _at(value_ExI: np.ndarray, items: np.ndarray) -> np.ndarray:
    """value_ExM of the items [E, M]; items [1, I] stand for the whole catalogue."""
    whole = len(items) < len(value_ExI)
    return value_ExI if whole else np.take_along_axis(value_ExI, items.clip(0), axis=1)


def _gumbel(uniform: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(np.maximum(uniform, 2.0**-54)))


def _nearest(near_ExM: np.ndarray, top: int) -> np.ndarray:
    """near_ExM with everything below the top-th largest value of a row set to -inf."""
    if top >= near_ExM.shape[1]:
        return near_ExM
    edge_Ex1 = np.partition(near_ExM, -top, axis=1)[:, -top, None]
    return np.where(near_ExM >= edge_Ex1, near_ExM, -np.inf)


def _pick(
    proposals: Mapping[int, tuple[np.ndarray, np.ndarray]], strategy_ExK: np.ndarray, group_I: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """rejected_ExK and failed_E: draw after draw the best proposal of its strategy whose title is not yet taken."""
    rejected_ExK = np.full(strategy_ExK.shape, -1, np.int32)
    failed_E = np.full(len(strategy_ExK), -1, np.int8)
    for draw, code_E in enumerate(strategy_ExK.T):
        for code, (items, score) in proposals.items():
            at = np.flatnonzero((failed_E < 0) & (code_E == code))
            best = score[at].argmax(1)
            found = score[at, best] > -np.inf
            failed_E[at[~found]] = code
            rejected_ExK[at[found], draw] = np.broadcast_to(items, score.shape)[at[found], best[found]]
        for items, score in proposals.values():
            score[group_I[items] == group_I[rejected_ExK[:, draw, None]]] = -np.inf
    return rejected_ExK, failed_E
