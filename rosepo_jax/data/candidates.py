"""Candidate lists: the target and C-1 sampled items, frozen before anything is trained.

The items of a list are a pure function of (seed, split, user, position), the pool and the user's past; the target is
only excluded from them. Drawing by the target, as the sample lists of S-DPO do, lets a model that ignores the history
find it (see `leak`). Targets are spread evenly over the slots of a split, so that preferring a slot earns nothing.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.errors import UserError

BLOCK = 1 << 22  # elements drawn at a time, to bound memory


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """What is drawn from. weight_I >= 0: sampling weight; group_I: title group; the rest says what users have had.

    had_key: sorted user * I + title group; had_position: where it first stands in the user's sequence.
    """

    weight_I: np.ndarray
    group_I: np.ndarray
    had_key: np.ndarray
    had_position: np.ndarray


def pool(
    user_E: np.ndarray, item_E: np.ndarray, position_E: np.ndarray, group_I: np.ndarray, weight_I: np.ndarray
) -> Pool:
    """The pool for a log in which user_E had item_E as number position_E of the user's sequence; it may be empty."""
    key_E = user_E.astype(np.int64) * len(group_I) + group_I[item_E]
    order = np.lexsort((position_E, key_E))
    had_key, first = np.unique(key_E[order], return_index=True)
    return Pool(weight_I.astype(np.float64), group_I, had_key, position_E[order][first])


class _Query(NamedTuple):
    """What decides which items a row may list."""

    user_Ex1: np.ndarray
    position_Ex1: np.ndarray
    history_ExN: np.ndarray
    target_Ex1: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "_Query":
        return _Query(*(column[rows] for column in self))


def draw(
    pool: Pool,
    user_E: np.ndarray,
    position_E: np.ndarray,
    history_ExN: np.ndarray,
    target_E: np.ndarray,
    *,
    size: int,
    seed: int,
    split: str,
) -> np.ndarray:
    """candidates_ExC int32: the target in a slot by `slots`, C-1 items drawn with p ∝ weight without replacement.

    All titles of a list differ; but for the target none is in the history or in what the user had before `position`.
    Errors: UserError when fewer than C-1 such titles have a positive weight.
    """
    candidates_ExC = np.empty((len(user_E), size), np.int32)
    queries = _Query(user_E[:, None].astype(np.int64), position_E[:, None], history_ExN, target_E[:, None])
    column = np.arange(size)
    step = max(1, BLOCK // (32 * size))
    slot_E = slots(user_E, position_E, size, seed, split)
    for start in range(0, len(user_E), step):
        block = slice(start, start + step)
        query = queries.take(block)
        others_ExK = _others(pool, query, size - 1, seed, split)
        slot_Ex1 = slot_E[block, None]
        before_ExC = np.take_along_axis(others_ExK, np.where(column > slot_Ex1, column - 1, column) % (size - 1), 1)
        candidates_ExC[block] = np.where(column == slot_Ex1, query.target_Ex1, before_ExC)
    return candidates_ExC


def slots(user_E: np.ndarray, position_E: np.ndarray, size: int, seed: int, split: str) -> np.ndarray:
    """The target's slot in each row: rows in an order by hash take the slots in turn, so all slots are as frequent."""
    luck_E = seeds.uniform(seeds.key(seed, "slot", split), user_E, position_E)
    slot_E = np.empty(len(user_E), np.int64)
    slot_E[np.lexsort((position_E, user_E, luck_E))] = np.arange(len(user_E)) % size
    return slot_E


def _others(pool: Pool, query: _Query, k: int, seed: int, split: str) -> np.ndarray:
    """K allowed items of each row: the first ones of the row's sequence of draws that are allowed and no repeats, which
    is sampling without replacement. Rows look at few draws, at many if they must, and at last at the whole catalogue.
    """
    others_ExK = np.empty((len(query.user_Ex1), k), np.int64)
    left = np.arange(len(others_ExK))
    for draws in (2 * k + 8, 32 * k + 128):
        rows = query.take(left)
        key = seeds.key(seed, "candidates", split)
        item_ExM = _by_weight(pool.weight_I, seeds.uniform(key, rows.user_Ex1, rows.position_Ex1, np.arange(draws)))
        chosen_ExM = _first_distinct(pool.group_I[item_ExM], _allowed(pool, item_ExM, rows), k)
        done = chosen_ExM.sum(1) == k
        others_ExK[left[done]] = item_ExM[done][chosen_ExM[done]].reshape(-1, k)
        left, item_ExM, chosen_ExM = left[~done], item_ExM[~done], chosen_ExM[~done]
    step = max(1, BLOCK // len(pool.weight_I))
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        rows = query.take(left[part])
        others_ExK[left[part]] = _complete(pool, rows, item_ExM[part], chosen_ExM[part], k, seed, split)
    return others_ExK


def _complete(
    pool: Pool, query: _Query, item_ExM: np.ndarray, chosen_ExM: np.ndarray, k: int, seed: int, split: str
) -> np.ndarray:
    """Completes the chosen items by an exponential race over the catalogue, which has the law of further draws."""
    item_I = np.arange(len(pool.weight_I))
    uniform_ExI = seeds.uniform(seeds.key(seed, "race", split), query.user_Ex1, query.position_Ex1, item_I)
    with np.errstate(divide="ignore", invalid="ignore"):
        finish_ExI = -np.log1p(-uniform_ExI) / pool.weight_I
    row, draw = np.nonzero(chosen_ExM)
    finish_ExI[row, item_ExM[row, draw]] = -1.0
    order_ExI = np.argsort(finish_ExI, axis=1, kind="stable")
    allowed_ExI = _allowed(pool, order_ExI, query) & (pool.weight_I[order_ExI] > 0)
    chosen_ExI = _first_distinct(pool.group_I[order_ExI], allowed_ExI, k)
    fewest = int(chosen_ExI.sum(1).min())
    if fewest < k:
        raise UserError(
            f"config.data.candidates: {k + 1} do not fit, a row of split {split} has only {fewest} other titles to "
            f"draw from (catalogue of {len(item_I)} items); lower data.candidates or data.core_item"
        )
    return order_ExI[chosen_ExI].reshape(-1, k)


def _by_weight(weight_I: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Items with p ∝ weight, one for each uniform number."""
    item = np.flatnonzero(weight_I > 0)
    if not len(item):
        raise UserError("config.data.candidate_sampling: popularity needs train interactions, and there are none")
    weight = weight_I[item]
    if (weight == weight[0]).all():
        return item[(uniform * len(item)).astype(np.int64)]
    edge = np.cumsum(weight)
    return item[np.searchsorted(edge, uniform * edge[-1], side="right").clip(max=len(item) - 1)]


def _allowed(pool: Pool, item_ExM: np.ndarray, query: _Query) -> np.ndarray:
    """bool_ExM: the title is not the target's, not in the history, and nothing that the user had before `position`."""
    group_ExM = pool.group_I[item_ExM]
    allowed_ExM = group_ExM != pool.group_I[query.target_Ex1]
    for item_E in query.history_ExN.T:  # ready-made rows may hold histories that the log does not
        allowed_ExM &= (group_ExM != pool.group_I[item_E][:, None]) | (item_E < 0)[:, None]
    if not len(pool.had_key):
        return allowed_ExM
    key_ExM = query.user_Ex1 * len(pool.group_I) + group_ExM
    at = np.searchsorted(pool.had_key, key_ExM).clip(max=len(pool.had_key) - 1)
    return allowed_ExM & ((pool.had_key[at] != key_ExM) | (pool.had_position[at] >= query.position_Ex1))


def _first_distinct(group_ExM: np.ndarray, allowed_ExM: np.ndarray, k: int) -> np.ndarray:
    """bool_ExM: in each row the first k allowed entries whose groups differ (fewer where there are fewer)."""
    key_ExM = np.where(allowed_ExM, group_ExM, -1)
    order = np.argsort(key_ExM, axis=1, kind="stable")
    sorted_ExM = np.take_along_axis(key_ExM, order, 1)
    fresh = sorted_ExM >= 0
    fresh[:, 1:] &= sorted_ExM[:, 1:] != sorted_ExM[:, :-1]
    fresh_ExM = np.empty_like(fresh)
    np.put_along_axis(fresh_ExM, order, fresh, 1)
    return fresh_ExM & (np.cumsum(fresh_ExM, axis=1) <= k)
