"""From a raw log to rows: k-core, order in time, split, windows of history, frozen candidate lists.

Every choice is a pure function of (seed, split, user, position), so rows do not depend on workers, hosts or the order
in which users stand in the source.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data import candidates, leak, statistics
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.columns import by_blocks, order
from rosepo_jax.data.log import CONTEXT, TEST, TRAIN, VALIDATION, FrozenRow, Interactions, RawLog
from rosepo_jax.data.rows import SPLITS, Events, Rows
from rosepo_jax.errors import UserError

ORDER_RULE = "by (timestamp, row of the source)"
SPLIT_RULES = {
    "leave_one_out": "the last item of each user is test, the second last validation, the rest train",
    "global_time": "by time over all users; interactions of the second of a cut all go to the later split",
    "user_ratio": "users by their first timestamp (ties: by id); of validation and test users the last item only",
    "given": "as the source says",
}
BLOCK = 1 << 13  # rows made at a time: they stay in the cache


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What `prepare` stores. Users and items are numbered anew: those that remain, users by raw id, items as before."""

    catalogue: Catalogue  # with train counts
    users: tuple[str, ...]  # raw ids
    rows: dict[str, Rows]  # by SPLITS
    train_items: tuple[np.ndarray, np.ndarray]  # see `seen_train`
    statistics: dict[str, Any]
    raw_user_U: np.ndarray  # index in the source of each user and item
    raw_item_I: np.ndarray


def build(raw: RawLog, config: Any, seed: int) -> Prepared:
    """Rows, catalogue, train items and statistics of a log; `config` is `config.data`.

    Errors: UserError for settings out of range, splits without rows, and candidate lists that cannot be filled.
    """
    _check(config, raw)
    frozen = dict(raw.frozen_rows or {}) if config.split == "given" else {}
    log, dropped_interactions = _clean(raw.interactions, config.min_rating)
    kept_E = k_core(log.user_E, log.item_E, config.core_user, config.core_item)
    users_outside = _distinct(log.user_E) - _distinct(log.user_E[kept_E])
    dropped_interactions["interactions_outside_core"] = len(log) - int(kept_E.sum())
    log = log if kept_E.all() else log.take(kept_E)

    raw_user_U, user_map = _kept_users(raw, log.user_E, frozen)
    raw_item_I, item_map = _kept_items(raw, log.item_E, frozen, config.core_item)
    events = _events(log, user_map, item_map, config)
    del log
    raw = dataclasses.replace(raw, interactions=raw.interactions.take(np.zeros(0, np.int64)))  # large, as `log` was
    users = tuple(raw.users[user] for user in raw_user_U)
    train_E = _train_mask(events)
    catalogue = Catalogue(
        ids=tuple(raw.catalogue.ids[item] for item in raw_item_I),
        titles=tuple(raw.catalogue.titles[item] for item in raw_item_I),
        groups=tuple(raw.catalogue.groups[item] for item in raw_item_I),
        count_I=np.bincount(events.item_E[train_E], minlength=len(raw_item_I)).astype(np.int64),
    )

    weight_I = np.ones(len(catalogue)) if config.candidate_sampling == "uniform" else catalogue.count_I
    had = slice(None if config.candidate_exclude == "past" else 0)
    pool = candidates.pool(
        events.user_E[had], events.item_E[had], events.position_E[had], catalogue.title_group_I, weight_I
    )
    rows: dict[str, Rows] = {}
    targets: dict[str, np.ndarray] = {}
    dropped: dict[str, dict[str, int]] = {}
    for name, role in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if name in frozen:
            found = _frozen_rows(name, frozen[name], events, user_map, item_map, config)
            length_E = (found.history_ExN >= 0).sum(1)
            kept, dropped[name] = _usable(found.user_E, found.position_E, length_E, name, config, seed)
            rows[name] = found.take(kept)
        else:
            targets[name], dropped[name] = _targets(events, events.role_E == role, name, config, seed)
        if not len(rows[name] if name in frozen else targets[name]):
            raise UserError(
                f"split {name} has no rows ({config.split} of {len(events.user_E)} interactions of {len(users)} users, "
                f"dropped: {dropped[name]}); lower data.min_history or data.core_user, or choose another data.split"
            )
    if config.windows:
        tested_E = rows["test"].user_E if "test" in frozen else events.user_E[targets["test"]]
        steps_E = _untouched(events, tested_E)
        targets["windows"], dropped["windows"] = _targets(events, steps_E, "windows", config, seed)
    train = targets["train"]
    luck_E = seeds.uniform(seeds.key(seed, "held_out"), events.user_E[train], events.position_E[train])
    held_out_E = luck_E < config.held_out_share
    targets["train"], targets["held_out"] = train[~held_out_E], train[held_out_E]
    rows |= {name: _windows(events, index, config.history) for name, index in targets.items()}
    rows = {name: _with_candidates(rows[name], pool, config.candidates, seed, name) for name in SPLITS if name in rows}

    summary = {
        **statistics.describe(catalogue, len(users), events, rows),
        "order": ORDER_RULE,
        "split": {"name": config.split, "rule": SPLIT_RULES[config.split]},
        "candidates": {
            "size": config.candidates,
            "sampling": config.candidate_sampling,
            "exclude": config.candidate_exclude,
            "ready_made": sorted(frozen),
            "ready_made_lists": any(row.candidates for row in frozen.get("test", ())),
            **statistics.candidates(catalogue, rows["test"]),
        },
        "candidate_leak": leak.check(rows),
        "repairs": dict(raw.repairs),
        "dropped": {
            **dropped_interactions,
            "users_outside_core": users_outside,
            "items_outside_core": len(raw.catalogue) - len(catalogue),
            "rows": dropped,
        },
    }
    summary["defects"] = statistics.defects(summary, rows["test"])
    return Prepared(catalogue, users, rows, seen_train(events, train_E, len(users)), summary, raw_user_U, raw_item_I)


def k_core(user_E: np.ndarray, item_E: np.ndarray, core_user: int, core_item: int) -> np.ndarray:
    """bool_E: the largest set of interactions in which every user has >= core_user and every item >= core_item."""
    kept_E = np.ones(len(user_E), bool)
    while True:
        user_U = np.bincount(user_E[kept_E], minlength=user_E.max(initial=-1) + 1)
        item_I = np.bincount(item_E[kept_E], minlength=item_E.max(initial=-1) + 1)
        fit_E = kept_E & (user_U[user_E] >= core_user) & (item_I[item_E] >= core_item)
        if (fit_E == kept_E).all():
            return kept_E
        kept_E = fit_E


def roles(events: Events, given_E: np.ndarray | None, config: Any) -> np.ndarray:
    """int8_E: the split of which each interaction is a target (SPLIT_RULES); CONTEXT = history only."""
    back_E = events.length_E - 1 - events.position_E  # 0 = last of the user
    if config.split == "leave_one_out":
        return np.select([back_E == 0, back_E == 1], [TEST, VALIDATION], TRAIN).astype(np.int8)
    if config.split == "global_time":
        time_E = np.sort(events.timestamp_E)
        role_E = np.full(len(time_E), TRAIN, np.int8)
        for role, share in (
            (VALIDATION, config.validation_share + config.test_share),
            (TEST, config.test_share),
        ):
            cut = len(time_E) - round(share * len(time_E))
            if cut < len(time_E):
                role_E[events.timestamp_E >= time_E[cut]] = role
        return role_E
    if config.split == "user_ratio":
        first_E = events.position_E == 0
        user_U = events.user_E[first_E][np.argsort(events.timestamp_E[first_E], kind="stable")]
        kind_U = np.zeros(user_U.max(initial=-1) + 1, np.int8)
        kind_U[user_U] = TEST
        kind_U[user_U[: int(len(user_U) * (1 - config.test_share) + 1e-9)]] = VALIDATION
        kind_U[user_U[: int(len(user_U) * (1 - config.test_share - config.validation_share) + 1e-9)]] = TRAIN
        kind_E = kind_U[events.user_E]
        return np.where((kind_E == TRAIN) | (back_E == 0), kind_E, CONTEXT).astype(np.int8)
    assert given_E is not None
    return given_E.astype(np.int8)


def seen_train(events: Events, train_E: np.ndarray, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted train items of every user u, items[indptr[u]:indptr[u+1]]: (indptr_U+1 int64, items int32)."""
    user_E, item_E = events.user_E[train_E].astype(np.int64), events.item_E[train_E]
    count_U, n_items = np.bincount(user_E, minlength=n_users), int(events.item_E.max()) + 1
    return np.concatenate([[0], np.cumsum(count_U)]), (np.sort(user_E * n_items + item_E) % n_items).astype(np.int32)


def _check(config: Any, raw: RawLog) -> None:
    shares = config.validation_share > 0 and config.test_share > 0 and config.validation_share + config.test_share < 1
    for name, good, hint in (
        ("split", config.split in SPLIT_RULES, "one of " + ", ".join(SPLIT_RULES)),
        ("candidate_sampling", config.candidate_sampling in ("uniform", "popularity"), "uniform or popularity"),
        ("candidate_exclude", config.candidate_exclude in ("past", "history"), "past or history"),
        ("candidates", config.candidates >= 2, "at least 2"),
        ("history", config.history >= 1, "at least 1"),
        ("min_history", 0 <= config.min_history <= config.history, "between 0 and data.history"),
        ("held_out_share", 0 <= config.held_out_share < 1, "in [0, 1)"),
        ("max_validation", config.max_validation >= 0, "0 (all) or more"),
        ("max_test", config.max_test >= 0, "0 (all) or more"),
        (
            "test_share",
            shares or config.split not in ("global_time", "user_ratio"),
            "above 0, and validation_share too, with a sum below 1",
        ),
    ):
        if not good:
            raise UserError(f"config.data.{name}: {config[name]!r} is not allowed; it must be {hint}")
    if config.split == "given" and raw.interactions.split_E is None and not raw.frozen_rows:
        raise UserError(f"config.data.split: source {config.source!r} has no split of its own; use leave_one_out")


def _clean(log: Interactions, min_rating: float) -> tuple[Interactions, dict[str, int]]:
    """The log without low ratings and without a user's later interactions with the same item, which are counted."""
    if min_rating > 0 and log.rating_E is None:
        raise UserError("config.data.min_rating: the log has no ratings; set it to 0 or name data.columns.rating")
    good_E = np.ones(len(log.user_E), bool) if log.rating_E is None else ~(log.rating_E < min_rating)
    good = np.flatnonzero(good_E)
    pair_E = log.user_E[good] * (int(log.item_E.max()) + 1) + log.item_E[good]
    by_pair = order(pair_E, log.timestamp_E[good], log.row_E[good])
    again = good[by_pair[1:][np.diff(pair_E[by_pair]) == 0]]
    counts = {"interactions_rated_lower": len(log) - len(good), "repeated_interactions": len(again)}
    good_E[again] = False
    return log if good_E.all() else log.take(good_E), counts


def _distinct(index_E: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(index_E)))


def _renumber(kept: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(raw index of each kept one, new index of each raw one or -1)."""
    new = np.full(size, -1, np.int64)
    new[kept] = np.arange(len(kept))
    return kept, new


def _kept_users(raw: RawLog, user_E: np.ndarray, frozen: dict[str, list[FrozenRow]]) -> tuple[np.ndarray, np.ndarray]:
    kept_U = np.bincount(user_E, minlength=len(raw.users)) > 0
    kept_U[[row.user for rows in frozen.values() for row in rows]] = True
    by_id = sorted(
        np.flatnonzero(kept_U).tolist(), key=raw.users.__getitem__
    )  # the order of the source does not matter
    return _renumber(np.array(by_id, np.int64), len(raw.users))


def _kept_items(
    raw: RawLog, item_E: np.ndarray, frozen: dict[str, list[FrozenRow]], core_item: int
) -> tuple[np.ndarray, np.ndarray]:
    kept_I = np.bincount(item_E, minlength=len(raw.catalogue)) >= core_item
    for rows in frozen.values():
        for row in rows:
            kept_I[[*row.history, row.target, *(() if row.candidates is None else row.candidates)]] = True
    return _renumber(np.flatnonzero(kept_I), len(raw.catalogue))


def _events(log: Interactions, user_map: np.ndarray, item_map: np.ndarray, config: Any) -> Events:
    user_E, item_E = user_map.astype(np.int32)[log.user_E], item_map.astype(np.int32)[log.item_E]
    by_user = order(user_E, log.timestamp_E, log.row_E)
    user_E = user_E[by_user]
    length_U = np.bincount(user_E, minlength=len(user_map)).astype(np.int32)
    start_U = np.cumsum(length_U) - length_U
    events = Events(
        user_E=user_E,
        item_E=item_E[by_user],
        timestamp_E=log.timestamp_E[by_user],
        position_E=(np.arange(len(user_E)) - start_U[user_E]).astype(np.int32),
        length_E=length_U[user_E],
        role_E=np.zeros(len(user_E), np.int8),
    )
    given_E = None if log.split_E is None else log.split_E[by_user]
    return dataclasses.replace(events, role_E=roles(events, given_E, config))


def _train_mask(events: Events) -> np.ndarray:
    """bool_E: what training may see: its targets, and the history-only interactions that lead up to one."""
    train_E, context_E = events.role_E == TRAIN, events.role_E == CONTEXT
    if not context_E.any():
        return train_E
    last_U = np.full(events.user_E.max(initial=-1) + 1, -1)
    last_U[events.user_E[train_E]] = events.position_E[train_E]  # events of a user come by position
    return train_E | (context_E & (events.position_E < last_U[events.user_E]))


def _untouched(events: Events, user_E: np.ndarray) -> np.ndarray:
    """bool_E: interactions of these users that are neither seen in training nor targets of validation."""
    return np.isin(events.user_E, user_E) & ~_train_mask(events) & (events.role_E != VALIDATION)


def _windows(events: Events, index: np.ndarray, n: int) -> Rows:
    """The rows (without candidates) whose targets are the events `index`."""
    history_ExN = np.empty((len(index), n), np.int32)

    def fill(block: slice) -> None:
        target = index[block, None]
        length = np.minimum(events.position_E[target], n)
        item = events.item_E[np.minimum(target - length + np.arange(n), len(events.item_E) - 1)]
        history_ExN[block] = np.where(np.arange(n) < length, item, -1)

    by_blocks(fill, len(index), BLOCK)
    return _rows(events.user_E[index], events.position_E[index], history_ExN, events.item_E[index])


def _rows(user_E: Any, position_E: Any, history_ExN: np.ndarray, target_E: Any, candidates_ExC: Any = None) -> Rows:
    if candidates_ExC is None:
        candidates_ExC = np.zeros((len(history_ExN), 0))
    return Rows(*(np.asarray(x, np.int32) for x in (user_E, position_E, history_ExN, target_E, candidates_ExC)))


def _frozen_rows(
    name: str, frozen: Sequence[FrozenRow], events: Events, user_map: np.ndarray, item_map: np.ndarray, config: Any
) -> Rows:
    """Ready-made rows, in their order. position: of the target in the user's sequence, else the history's length."""
    user_E = user_map[[row.user for row in frozen]]
    target_E = item_map[[row.target for row in frozen]]
    history_ExN = np.full((len(frozen), config.history), -1)
    for history, row in zip(history_ExN, frozen, strict=True):
        recent = row.history[-config.history :]
        history[: len(recent)] = item_map[list(recent)]
    key, wanted = events.user_E.astype(np.int64) * len(item_map) + events.item_E, user_E * len(item_map) + target_E
    by_key = order(key)
    at = by_key[np.searchsorted(key[by_key], wanted).clip(max=len(key) - 1)]
    length_E = [len(row.history) for row in frozen]
    position_E = np.where(key[at] == wanted, events.position_E[at], length_E)
    if all(row.candidates is None for row in frozen):
        return _rows(user_E, position_E, history_ExN, target_E)
    for number, row in enumerate(frozen, 1):
        items = row.candidates or ()
        if len(items) != config.candidates:
            raise UserError(
                f"split {name}, row {number}: the source lists {len(items)} candidates, the config asks "
                f"for {config.candidates}; set data.candidates={len(items)}"
            )
        if len(set(items)) != len(items) or row.target not in items:
            raise UserError(f"split {name}, row {number}: its candidates must be distinct and hold the target")
    candidates_ExC = item_map[np.array([row.candidates for row in frozen], np.int64)]
    return _rows(user_E, position_E, history_ExN, target_E, candidates_ExC)


def _targets(
    events: Events, wanted_E: np.ndarray, name: str, config: Any, seed: int
) -> tuple[np.ndarray, dict[str, int]]:
    """The events that can be targets of a split, and how many of `wanted_E` could not, by reason."""
    index = np.flatnonzero(wanted_E)
    position_E = events.position_E[index]
    length_E = np.minimum(position_E, config.history)
    kept, dropped = _usable(events.user_E[index], position_E, length_E, name, config, seed)
    return index[kept], dropped


def _usable(
    user_E: np.ndarray, position_E: np.ndarray, length_E: np.ndarray, name: str, config: Any, seed: int
) -> tuple[np.ndarray, dict[str, int]]:
    """The rows, with histories of these lengths, that can be used, and how many could not, by reason."""
    kept = np.flatnonzero(length_E >= config.min_history)
    dropped = {"short_history": len(length_E) - len(kept)}
    limit = {"validation": config.max_validation, "test": config.max_test, "windows": config.max_test}.get(name, 0)
    dropped["beyond_maximum"] = max(0, len(kept) - limit) if limit else 0
    if dropped["beyond_maximum"]:
        luck_E = seeds.uniform(seeds.key(seed, "maximum", name), user_E[kept], position_E[kept])
        kept = kept[np.sort(np.argsort(luck_E, kind="stable")[:limit])]
    return kept, dropped


def _with_candidates(rows: Rows, pool: candidates.Pool, size: int, seed: int, split: str) -> Rows:
    if rows.candidates_ExC.shape[1]:
        return rows  # ready-made lists are used as they are
    columns = rows.user_E, rows.position_E, rows.history_ExN, rows.target_E
    return Rows(*columns, candidates.draw(pool, *columns, size=size, seed=seed, split=split))
