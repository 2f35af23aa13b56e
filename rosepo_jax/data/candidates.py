"""Candidate lists: the target and C-1 sampled items, frozen before anything is trained.

The items of a list are a pure function of (seed, split, user, position), the pool and the user's past; the target is
only excluded from them. Drawing by the target, as the sample lists of S-DPO do, lets a model that ignores the history
find it (see `leak`). Targets are spread evenly over the slots of a split, so that preferring a slot earns nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data.columns import Table, by_blocks, order
from rosepo_jax.errors import UserError

BLOCK = 1 << 18  # numbers drawn at a time: what is made of them stays in the cache of a core
RACE_BLOCK = 1 << 22  # and where a row looks at the whole catalogue, to bound memory


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
    by_key = order(key_E, user_E, position_E)  # the user adds nothing, but logs come by user and position
    key_E = key_E[by_key]
    first = np.flatnonzero(np.diff(key_E, prepend=-1))
    return Pool(weight_I.astype(np.float64), group_I.astype(np.int32), key_E[first], position_E[by_key[first]])


class _Query(NamedTuple):
    """What decides which items a row may list."""

    user_E: np.ndarray
    position_E: np.ndarray
    history_ExN: np.ndarray
    target_E: np.ndarray

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
    query = _Query(user_E.astype(np.int64), position_E, history_ExN, target_E)
    slot_E = slots(user_E, position_E, size, seed, split)
    pick = _sampler(pool.weight_I)
    key = seeds.key(seed, "candidates", split)

    def draws(rows: _Query, n: int) -> np.ndarray:
        return pick(seeds.uniform(key, rows.user_E, rows.position_E, np.arange(n)[:, None]))

    def listed(rows: np.ndarray | slice, others_ExK: np.ndarray) -> np.ndarray:
        target_ExC = np.arange(size) == slot_E[rows, None]
        found_ExC = np.empty(target_ExC.shape, np.int32)
        found_ExC[~target_ExC], found_ExC[target_ExC] = others_ExK.ravel(), target_E[rows]
        return found_ExC

    def fill(block: slice) -> np.ndarray:
        """Of a large catalogue hardly any row draws an item twice or one that it may not list: then the first K are it.
        Returns the numbers of the other rows.
        """
        rows = query.take(block)
        others_KxE = draws(rows, size - 1)
        candidates_ExC[block] = listed(block, others_KxE.T)
        group_KxE = pool.group_I[others_KxE]
        fit_E = _allowed(pool, group_KxE, rows).all(0)
        for shift in range(1, size - 1):
            fit_E &= (group_KxE[shift:] != group_KxE[:-shift]).all(0)
        return block.start + np.flatnonzero(~fit_E)

    left = np.concatenate([np.zeros(0, np.int64), *by_blocks(fill, len(user_E), BLOCK // size)])

    def search(block: slice) -> None:
        rows = left[block]
        candidates_ExC[rows] = listed(rows, _others(pool, query.take(rows), draws, size - 1, seed, split))

    by_blocks(search, len(left), BLOCK // (32 * size))
    return candidates_ExC


def slots(user_E: np.ndarray, position_E: np.ndarray, size: int, seed: int, split: str) -> np.ndarray:
    """The target's slot in each row: rows in an order by hash take the slots in turn, so all slots are as frequent."""
    luck_E = seeds.uniform(seeds.key(seed, "slot", split), user_E, position_E)
    slot_E = np.empty(len(user_E), np.int64)
    slot_E[order(luck_E, user_E, position_E)] = np.arange(len(user_E)) % size
    return slot_E


def _others(
    pool: Pool, query: _Query, draws: Callable[[_Query, int], np.ndarray], k: int, seed: int, split: str
) -> np.ndarray:
    """K allowed items of each row: the first ones of the row's sequence of draws that are allowed and no repeats, which
    is sampling without replacement. Rows look at few draws, at many if they must, and at last at the whole catalogue.
    """
    others_ExK = np.empty((len(query.user_E), k), np.int32)
    left = np.arange(len(others_ExK))
    for n in (2 * k + 8, 32 * k + 128):
        rows = query.take(left)
        item_ExM = draws(rows, n).T
        group_ExM = pool.group_I[item_ExM]
        chosen_ExM = _first_distinct(group_ExM, _allowed(pool, group_ExM.T, rows).T, k)
        done = chosen_ExM.sum(1) == k
        others_ExK[left[done]] = item_ExM[done][chosen_ExM[done]].reshape(-1, k)
        left, item_ExM, chosen_ExM = left[~done], item_ExM[~done], chosen_ExM[~done]
    step = max(1, RACE_BLOCK // len(pool.weight_I))
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
    uniform_ExI = seeds.uniform(
        seeds.key(seed, "race", split), query.user_E[:, None], query.position_E[:, None], item_I
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        finish_ExI = -np.log1p(-uniform_ExI) / pool.weight_I
    row, draw = np.nonzero(chosen_ExM)
    finish_ExI[row, item_ExM[row, draw]] = -1.0
    order_ExI = np.argsort(finish_ExI, axis=1, kind="stable")
    group_ExI = pool.group_I[order_ExI]
    allowed_ExI = _allowed(pool, group_ExI.T, query).T & (pool.weight_I[order_ExI] > 0)
    chosen_ExI = _first_distinct(group_ExI, allowed_ExI, k)
    fewest = int(chosen_ExI.sum(1).min())
    if fewest < k:
        raise UserError(
            f"config.data.candidates: {k + 1} do not fit, a row of split {split} has only {fewest} other titles to "
            f"draw from (catalogue of {len(item_I)} items); lower data.candidates or data.core_item"
        )
    return order_ExI[chosen_ExI].reshape(-1, k)


def _sampler(weight_I: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Items with p ∝ weight, one for each uniform number."""
    item = np.flatnonzero(weight_I > 0).astype(np.int32)
    if not len(item):
        raise UserError("config.data.candidate_sampling: popularity needs train interactions, and there are none")
    weight = weight_I[item]
    if (weight == weight[0]).all():
        return lambda uniform: item[(uniform * len(item)).astype(np.int32)]
    edge = np.cumsum(weight)
    return lambda uniform: item[np.searchsorted(edge, uniform * edge[-1], side="right").clip(max=len(item) - 1)]


def _allowed(pool: Pool, group_MxE: np.ndarray, query: _Query) -> np.ndarray:
    """bool_MxE: the title is not the target's, not in the history, and nothing that the user had before `position`.

    Rows stand in the last axis, so that each comparison is one long loop.
    """
    allowed_MxE = group_MxE != pool.group_I[query.target_E]
    for item_E in query.history_ExN.T:  # ready-made rows may hold histories that the log does not
        allowed_MxE &= group_MxE != np.where(item_E < 0, -1, pool.group_I[item_E])
    user_U = np.unique(query.user_E)
    start_U, stop_U = (np.searchsorted(pool.had_key, user * len(pool.group_I)) for user in (user_U, user_U + 1))
    count_U = stop_U - start_U
    had = np.arange(count_U.sum()) + np.repeat(start_U - np.cumsum(count_U) + count_U, count_U)  # all of these users
    found, at = Table(pool.had_key[had]).find(query.user_E * len(pool.group_I) + group_MxE)
    before = pool.had_position[had][at] < query.position_E[found % len(query.user_E)]
    np.put(allowed_MxE, found[before], False)
    return allowed_MxE


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
