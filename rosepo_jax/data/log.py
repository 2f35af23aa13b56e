"""The interaction log as every source delivers it, and the repairs and checks that all sources share."""

import array
import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from rosepo_jax.data.catalogue import Catalogue
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
        self.groups.append(tuple(group for group in groups if group))

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
    repairs = items.repairs
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
    if not user:
        reason = f"none of {unknown} has an item of {items.source}" if unknown else "it has no rows"
        raise UserError(f"{source}: no interactions; {reason}")
    repairs["interactions with items that have no title: dropped"] += unknown

    interactions = Interactions(
        user_E=np.array(user, np.int64),
        item_E=np.array(item, np.int64),
        timestamp_E=np.array(timestamp, np.float64),
        row_E=np.array(row, np.int64),
        rating_E=np.array(rating, np.float64) if rating else None,
        split_E=np.array(split, np.int8) if split else None,
    )
    if timestamp:
        interactions = _timed(interactions, repairs)
    else:
        interactions = dataclasses.replace(interactions, timestamp_E=_position(interactions.user_E))
    catalogue = items.catalogue()
    repairs["users with one interaction: kept"] += int((np.bincount(interactions.user_E) == 1).sum())
    group_I = catalogue.title_group_I
    repairs["items with the title of an earlier item: kept"] += int((group_I != np.arange(len(group_I))).sum())
    made = {name: n for name, n in repairs.items() if n}
    return RawLog(interactions, tuple(users), catalogue, made, timed=bool(timestamp))


def _timed(log: Interactions, repairs: collections.Counter[str]) -> Interactions:
    """Drops repeated (user, item, timestamp), keeping the first; counts steps back in time, which are sorted later."""
    by_user = np.argsort(log.user_E, kind="stable")
    user, time = log.user_E[by_user], log.timestamp_E[by_user]
    back = (user[1:] == user[:-1]) & (time[1:] < time[:-1])
    repairs["interactions earlier than the user's row before: sorted by time"] += int(back.sum())

    order = np.lexsort((log.timestamp_E, log.item_E, log.user_E))  # stable: equal rows stay in the order of the source
    columns = (log.user_E[order], log.item_E[order], log.timestamp_E[order])
    repeated = np.zeros(len(log), bool)
    repeated[order[1:]] = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    repairs["repeated interactions (same user, item and time): dropped"] += int(repeated.sum())
    return log.take(~repeated)


def _position(user_E: np.ndarray) -> np.ndarray:
    """float64: how many earlier interactions the user of each interaction has."""
    order = np.argsort(user_E, kind="stable")
    count = np.bincount(user_E)
    position_E = np.empty(len(user_E), np.float64)
    position_E[order] = np.arange(len(user_E)) - np.repeat(np.cumsum(count) - count, count)
    return position_E


def clean(title: str) -> str:
    """Runs of white space, control characters and half surrogates become one blank; the ends are stripped."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", title).strip()
