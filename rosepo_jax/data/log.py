"""The interaction log as every source delivers it, and the repairs and checks that all sources share."""

import array
import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.columns import order
from rosepo_jax.errors import UserError

TRAIN, VALIDATION, TEST, CONTEXT = 0, 1, 2, -1


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """One entry an interaction, in the order of the source.

    user_E, item_E: int64 indices. timestamp_E: float64, in the source's unit; the position in the sequence where the
    source knows only the order. row_E: int64 row of the source file, which breaks ties of time.
    rating_E: float64 or None. split_E: int8 or None; the split in which the interaction is a target where the source
    ships one: 0 train, 1 validation, 2 test, -1 never a target (history only).
    """

    user_E: np.ndarray
    item_E: np.ndarray
    timestamp_E: np.ndarray
    row_E: np.ndarray
    rating_E: np.ndarray | None = None
    split_E: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_E)

    def take(self, kept: np.ndarray) -> "Interactions":
        """The interactions that a mask or indices select."""
        columns: dict[str, Any] = {name: value[kept] for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(self, **columns)


class FrozenRow(NamedTuple):
    """A ready-made evaluation row: history (oldest first) and target as item indices, candidates with the target."""

    user: int
    history: tuple[int, ...]
    target: int
    candidates: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class RawLog:
    """What a source holds. users: raw ids by index. repairs: how often each repair was made; no entry means never.

    frozen_rows: split name ("validation", "test") to the rows that the source ships for it; None where it ships none.
    timed: whether the timestamps are times, comparable between users.
    """

    interactions: Interactions
    users: tuple[str, ...]
    catalogue: Catalogue
    repairs: dict[str, int]
    frozen_rows: dict[str, list[FrozenRow]] | None = None
    timed: bool = True


class Event(NamedTuple):
    """One row of a log, before indexing. `timestamp` None: the source knows only the order."""

    row: int
    user: str
    item: str
    timestamp: float | None = None
    rating: float | None = None
    split: int | None = None


class Items:
    """Collects the title table, repairing and counting; items are numbered in the order of their first row."""

    def __init__(self, source: object):
        self.source = source
        self.repairs: collections.Counter[str] = collections.Counter()
        self.index: dict[str, int] = {}
        self.titles: list[str] = []
        self.groups: list[tuple[str, ...]] = []

    def add(self, row: int, id: str, title: str, groups: Iterable[str] = ()) -> None:
        check_id(id, "item id", self.source, row)
        cleaned = clean(title)
        if id in self.index:
            named = cleaned or f"untitled {id}"
            self.repairs["other titles of an item: the first kept"] += named != self.titles[self.index[id]]
            return
        self.repairs["titles with stray white space or control characters: cleaned"] += cleaned != title
        self.repairs['empty titles: now "untitled ID"'] += not cleaned
        self.index[id] = len(self.titles)
        self.titles.append(cleaned or f"untitled {id}")
        self.groups.append(tuple(cleaned for group in groups if (cleaned := clean(group))))

    def catalogue(self) -> Catalogue:
        return Catalogue(
            tuple(self.index), tuple(self.titles), tuple(self.groups), np.zeros(len(self.titles), np.int64)
        )


def check_id(id: str, name: str, source: object, row: int) -> None:
    if not id.strip():
        raise UserError(f"{source}: row {row}: the {name} is empty")
    if not id.isascii():
        try:
            id.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{source}: row {row}: the {name} holds half a surrogate pair") from None


def assemble(events: Iterable[Event], items: Items, source: object) -> RawLog:
    """Indexes the events and makes the repairs that concern interactions. `items` may grow while events are read."""
    users: dict[str, int] = {}
    user, item, row, split = array.array("q"), array.array("q"), array.array("q"), array.array("b")
    timestamp, rating = array.array("d"), array.array("d")
    unknown = 0
    for event in events:
        if event.user not in users:
            check_id(event.user, "user id", source, event.row)
        if event.item not in items.index:
            check_id(event.item, "item id", source, event.row)
            unknown += 1
            continue
        user.append(users.setdefault(event.user, len(users)))
        item.append(items.index[event.item])
        row.append(event.row)
        if event.timestamp is not None:
            timestamp.append(event.timestamp)
        if event.rating is not None:
            rating.append(event.rating)
        if event.split is not None:
            split.append(event.split)
    columns = {
        "user_E": np.array(user, np.int64),
        "item_E": np.array(item, np.int64),
        "timestamp_E": np.array(timestamp, np.float64) if timestamp else None,
        "row_E": np.array(row, np.int64),
        "rating_E": np.array(rating, np.float64) if rating else None,
        "split_E": np.array(split, np.int8) if split else None,
    }
    return _repaired(columns, tuple(users), items, unknown, source)


class Coded(NamedTuple):
    """A column of ids: the distinct ones by first appearance, and the number of the one that each row has."""

    ids: tuple[str, ...]
    code_E: np.ndarray


def assemble_columns(
    user: Coded, item: Coded, timestamp_E: np.ndarray | None, rating_E: np.ndarray | None, items: Items, source: object
) -> RawLog:
    """What `assemble` makes of rows 1, 2, ... of a table, from its whole columns; no id may be blank."""
    item_E = np.array([items.index.get(id, -1) for id in item.ids], np.int64)[item.code_E]
    known = np.flatnonzero(item_E >= 0)
    unknown = len(item_E) - len(known)
    columns = {"user_E": user.code_E, "item_E": item_E, "timestamp_E": timestamp_E, "rating_E": rating_E}
    if unknown:
        columns = {name: None if column is None else column[known] for name, column in columns.items()}
        user_E = user.code_E[known]
        first_U = np.full(len(user.ids), len(known))
        first_U[user_E[::-1]] = np.arange(len(known))[::-1]
        left = np.argsort(first_U)[: np.count_nonzero(first_U < len(known))]
        number_U = np.empty(len(user.ids), np.int64)
        number_U[left] = np.arange(len(left))
        columns["user_E"], user = number_U[user_E], Coded(tuple(user.ids[u] for u in left.tolist()), user_E)
    return _repaired(columns | {"row_E": known + 1}, user.ids, items, unknown, source)


def _repaired(columns: dict[str, Any], users: tuple[str, ...], items: Items, unknown: int, source: object) -> RawLog:
    repairs, timed = items.repairs, columns["timestamp_E"] is not None
    if not len(columns["user_E"]):
        reason = f"none of {unknown} has an item of {items.source}" if unknown else "it has no rows"
        raise UserError(f"{source}: no interactions; {reason}")
    repairs["interactions with items that have no title: dropped"] += unknown
    if not timed:
        columns["timestamp_E"] = _position(columns["user_E"])
    interactions = Interactions(**columns)
    if timed:
        interactions = _timed(interactions, repairs)
    catalogue = items.catalogue()
    repairs["users with one interaction: kept"] += int((np.bincount(interactions.user_E) == 1).sum())
    group_I = catalogue.title_group_I
    repairs["items with the title of an earlier item: kept"] += int((group_I != np.arange(len(group_I))).sum())
    made = {name: n for name, n in repairs.items() if n}
    return RawLog(interactions, users, catalogue, made, timed=timed)


def _timed(log: Interactions, repairs: collections.Counter[str]) -> Interactions:
    """Drops repeated (user, item, timestamp), keeping the first; counts steps back in time, which are sorted later."""
    if (log.timestamp_E[1:] < log.timestamp_E[:-1]).any():
        by_user = order(log.user_E)
        user, time = log.user_E[by_user], log.timestamp_E[by_user]
        back = (user[1:] == user[:-1]) & (time[1:] < time[:-1])
        repairs["interactions earlier than the user's row before: sorted by time"] += int(back.sum())

    pair_E = log.user_E * (int(log.item_E.max()) + 1) + log.item_E
    by_pair = order(pair_E, log.timestamp_E)  # stable: equal rows stay in the order of the source
    pair, time = pair_E[by_pair], log.timestamp_E[by_pair]
    again = by_pair[1:][(pair[1:] == pair[:-1]) & (time[1:] == time[:-1])]
    repairs["repeated interactions (same user, item and time): dropped"] += len(again)
    if not len(again):
        return log
    first = np.ones(len(log), bool)
    first[again] = False
    return log.take(first)


def _position(user_E: np.ndarray) -> np.ndarray:
    """float64: how many earlier interactions the user of each interaction has."""
    by_user = order(user_E)
    count = np.bincount(user_E)
    position_E = np.empty(len(user_E), np.float64)
    position_E[by_user] = np.arange(len(user_E)) - np.repeat(np.cumsum(count) - count, count)
    return position_E


def clean(title: str) -> str:
    """Runs of white space, control characters and half surrogates become one blank; the ends are stripped."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", title).strip()
