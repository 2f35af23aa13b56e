"""Data sets of published benchmarks as sequences with ready splits: LLaRA (2312.02445), S-DPO (2406.09215), PatchRec.

These know only the order inside a user, unless a column `timestamps` says more.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from rosepo_jax import files
from rosepo_jax.data import tables
from rosepo_jax.data.log import (
    CONTEXT,
    TEST,
    TRAIN,
    VALIDATION,
    Event,
    FrozenRow,
    Items,
    RawLog,
    assemble,
    check_id,
    clean,
)
from rosepo_jax.errors import UserError

_SPLITS = {"train": TRAIN, "val": VALIDATION, "test": TEST}
_NAMES = {"val": "validation", "test": "test"}
_TITLES = ("id2name.txt", "id2title.txt", "id2title.tsv")
_SESSIONS = ("sessions.tsv", "sessions_reconstructed.tsv")


class _Sequence(NamedTuple):
    row: int
    user: str
    items: list[str]
    split: str  # of the user: train | val | test
    timestamps: list[float] | None
    ratings: list[float] | None


class _Ready(NamedTuple):
    """A ready-made row by raw ids; `user` None when the file does not say."""

    row: int
    user: str | None
    history: tuple[str, ...]
    target: str
    candidates: tuple[str, ...] | None


def llara(path: pathlib.Path) -> RawLog:
    """Users are split into train, validation and test. Every step of a train user is a target.

    The validation and test rows are the ready-made ones, kept in `frozen_rows`; without them, the last step of each
    user of that split. Without a sessions file, each row of train*.jsonl or *train.json becomes a sequence of its own,
    whose last item is the target.
    """
    items = _titles(path)
    ready = {split: rows for split in _NAMES if (rows := _ready_rows(path, split, items))}
    log = next((path / name for name in _SESSIONS if (path / name).is_file()), None)
    if log:
        sequences = list(_sessions(log))
    else:
        windows = _ready_rows(path, "train", items)
        if not windows:
            raise UserError(f"{path}: no {', '.join(_SESSIONS)}, train*.jsonl or *train.json here; set data.path")
        sequences = [
            _Sequence(row.row, f"train:{row.row}", [*row.history, row.target], "train", None, None) for row in windows
        ]

    def splits(sequence: _Sequence) -> list[int]:
        if log and sequence.split == "train":
            return [TRAIN] * len(sequence.items)
        last = CONTEXT if sequence.split in ready else _SPLITS[sequence.split]
        return [CONTEXT] * (len(sequence.items) - 1) + [last]

    raw = assemble(_events(log or path, ((sequence, splits(sequence)) for sequence in sequences)), items, log or path)
    users = {user: index for index, user in enumerate(raw.users)}
    frozen = {
        _NAMES[split]: _frozen(rows, [s for s in sequences if s.split == split], split, users, items)
        for split, rows in ready.items()
    }
    return dataclasses.replace(raw, users=tuple(users), frozen_rows=frozen or None)


def sequences(path: pathlib.Path) -> RawLog:
    """sequences.tsv: each user's targets of a split are an inclusive range of positions; sessions.tsv: all of a user's
    positions belong to the user's split.
    """
    items = _titles(path)
    log = path / "sequences.tsv"
    if log.is_file():
        return assemble(_events(log, _ranges(log)), items, log)
    log = path / "sessions.tsv"
    if log.is_file():
        return assemble(_events(log, ((s, [_SPLITS[s.split]] * len(s.items)) for s in _sessions(log))), items, log)
    raise UserError(f"{path}: no sequences.tsv or sessions.tsv here; set data.path to the folder that holds one")


def _titles(path: pathlib.Path) -> Items:
    titles = next((path / name for name in _TITLES if (path / name).is_file()), None)
    if titles is None:
        raise UserError(f"{path}: no title table ({', '.join(_TITLES)}) here; set data.path to the folder")
    items = Items(titles)
    if titles.suffix == ".tsv":
        for row, record in tables.unquoted(titles):
            items.add(row, *(tables.field(record, name, titles, row) for name in ("item", "title")))
        return items
    separator = "::" if titles.name == "id2name.txt" else "||"
    for row, line in tables.lines(titles):
        id, found, title = line.partition(separator)
        if not found:
            raise UserError(f"{titles}: row {row} is not ID{separator}TITLE")
        items.add(row, id, title)
    return items


def _sessions(path: pathlib.Path) -> Iterator[_Sequence]:
    seen: set[str] = set()
    for row, record in tables.unquoted(path):
        split, user, items = (tables.field(record, name, path, row) for name in ("split", "user", "items"))
        if split not in _SPLITS:
            raise UserError(f"{path}: row {row}: split {split!r} is none of {', '.join(_SPLITS)}")
        _refuse_repeated(user, seen, path, row)
        numbers = {
            name: [tables.number(value, name, path, row) for value in record[name].split()] if name in record else None
            for name in ("timestamps", "ratings")
        }
        yield _Sequence(row, user, items.split(), split, **numbers)


def _ranges(path: pathlib.Path) -> Iterator[tuple[_Sequence, list[int]]]:
    seen: set[str] = set()
    for row, record in tables.unquoted(path):
        user, items = (tables.field(record, name, path, row) for name in ("user", "items"))
        _refuse_repeated(user, seen, path, row)
        sequence = _Sequence(row, user, items.split(), "", None, None)
        splits = [CONTEXT] * len(sequence.items)
        for name, split in _SPLITS.items():
            bounds = tables.field(record, f"{name}_idx", path, row)
            if not bounds:
                continue
            start, _, end = bounds.partition(",")
            if not (start.isdecimal() and end.isdecimal() and int(start) <= int(end) < len(splits)):
                raise UserError(
                    f"{path}: row {row}: {name}_idx {bounds!r} is not START,END with both among 0..{len(splits) - 1}"
                )
            splits[int(start) : int(end) + 1] = [split] * (int(end) + 1 - int(start))
        yield sequence, splits


def _refuse_repeated(user: str, seen: set[str], path: pathlib.Path, row: int) -> None:
    if user in seen:
        raise UserError(f"{path}: row {row}: user {user!r} has a sequence already")
    seen.add(user)


def _events(path: pathlib.Path, sequences: Iterator[tuple[_Sequence, list[int]]]) -> Iterator[Event]:
    for sequence, splits in sequences:
        columns: list[list] = []
        for name, values in (("timestamps", sequence.timestamps), ("ratings", sequence.ratings)):
            if values is not None and len(values) != len(sequence.items):
                count = f"{len(values)} {name} for {len(sequence.items)} items"
                raise UserError(f"{path}: row {sequence.row} has {count}")
            columns.append(values or [None] * len(sequence.items))
        for item, timestamp, rating, split in zip(sequence.items, *columns, splits):
            yield Event(sequence.row, sequence.user, item, timestamp, rating, split)


def _ready_rows(path: pathlib.Path, split: str, items: Items) -> list[_Ready]:
    """The rows that the folder ships for a split; empty when there are none. Their targets and candidates must be
    known; an unknown item in a history (LLaRA's padding id) is left out.
    """
    found = sorted([*path.glob(f"{split}*.jsonl"), *path.glob(f"*{split}.json")])
    if not found:
        return []
    if len(found) > 1:
        raise UserError(f"{path}: several files of {split} rows: {', '.join(file.name for file in found)}; keep one")
    file = found[0]
    rows = list(_llara_rows(file) if file.suffix == ".jsonl" else _sdpo_rows(file, items))
    for number, row in enumerate(rows):
        known = tuple(item for item in row.history if item in items.index)
        items.repairs["history items of a ready-made evaluation row that have no title: dropped"] += len(
            row.history
        ) - len(known)
        rows[number] = row._replace(history=known)
        for item in (row.target, *(row.candidates or ())):
            if item not in items.index:
                raise UserError(f"{file}: row {row.row}: item {item!r} is not in {items.source}")
        if row.candidates and (len(set(row.candidates)) < len(row.candidates) or row.target not in row.candidates):
            raise UserError(f"{file}: row {row.row}: the candidates are not distinct items with the target among them")
    return rows


def _llara_rows(file: pathlib.Path) -> Iterator[_Ready]:
    for row, record in tables.json_lines(file):
        history, target = (tables.field(record, name, file, row) for name in ("seq", "next"))
        if not isinstance(history, list):
            raise UserError(f"{file}: row {row}: seq is not a list of item ids")
        user = tables.text(record["user"], "user", file, row) if "user" in record else None
        if user is not None:
            check_id(user, "user id", file, row)
        ids = [tables.text(item, "item id", file, row) for item in (*history, target)]
        yield _Ready(row, user, tuple(ids[:-1]), ids[-1], None)


def _sdpo_rows(file: pathlib.Path, items: Items) -> Iterator[_Ready]:
    """A JSON list, its rows counted from 1; names become ids by exact title, the first of equal ones."""
    id_of_title: dict[str, str] = {}
    for id, index in items.index.items():
        id_of_title.setdefault(items.titles[index], id)
    rows: Any = files.read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: not a JSON list of objects with historyList, itemList and trueSelection")
    for row, record in enumerate(rows, 1):
        if not isinstance(record, dict):
            raise UserError(f"{file}: row {row} is not a JSON object")
        history, names, target = (
            tables.field(record, name, file, row) for name in ("historyList", "itemList", "trueSelection")
        )
        if not (isinstance(history, str) and isinstance(names, list) and isinstance(target, str)):
            raise UserError(f"{file}: row {row}: historyList and trueSelection must be text, itemList a list")
        titles = [clean(str(title)) for title in (*(history.split("::") if history else ()), target, *names)]
        for title in titles:
            if title not in id_of_title:
                raise UserError(f"{file}: row {row}: title {title!r} is not in {items.source}")
        ids = [id_of_title[title] for title in titles]
        past = len(ids) - len(names) - 1
        yield _Ready(row, None, tuple(ids[:past]), ids[past], tuple(ids[past + 1 :]))


def _frozen(
    rows: list[_Ready], sequences: list[_Sequence], split: str, users: dict[str, int], items: Items
) -> list[FrozenRow]:
    """Gives each row its user: the one it names, else the one whose sequence holds this window, else a new one."""
    longest = max(len(row.history) for row in rows)
    owner: dict[tuple[str, ...], str] = {}
    for sequence in sequences:
        for end in range(1, len(sequence.items) + 1):
            owner.setdefault(tuple(sequence.items[max(0, end - 1 - longest) : end]), sequence.user)
    frozen = []
    for row in rows:
        user = row.user if row.user is not None else owner.get((*row.history, row.target), f"{split}:{row.row}")
        candidates = None if row.candidates is None else tuple(items.index[item] for item in row.candidates)
        history = tuple(items.index[item] for item in row.history)
        frozen.append(FrozenRow(users.setdefault(user, len(users)), history, items.index[row.target], candidates))
    return frozen
