"""Preference pairs at rest: one prompt a row with its chosen and K rejected responses; Parquet, and what TRL reads."""

import dataclasses
import io
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rosepo_jax import files
from rosepo_jax.data import tables
from rosepo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pairs:
    """E prompts. Responses r = 0 is the chosen one; -1 and nan stand for what imported rows do not have."""

    prompt: list[str]
    chosen: list[str]
    rejected: list[list[str]]  # [E][K]
    user_E: np.ndarray
    position_E: np.ndarray
    history_ExN: np.ndarray  # catalogue items, -1 padded
    item_ExR: np.ndarray  # catalogue items of chosen and rejected
    oracle_score_ExR: np.ndarray  # float32
    epsilon_ExK: np.ndarray  # float32: min(sigma(-(s_w - s_l) / tau), cap)
    strategy: list[list[str]]  # [E][K]
    flipped_E: np.ndarray  # chosen and first rejected were exchanged on purpose

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def has_items(self) -> bool:
        return bool(len(self)) and bool((self.item_ExR >= 0).all())

    @property
    def has_epsilon(self) -> bool:
        return bool(np.isfinite(self.epsilon_ExK).all())


COLUMNS = {
    "prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "user": "user_E", "position": "position_E",
    "history": "history_ExN", "response_item": "item_ExR", "oracle_scores": "oracle_score_ExR",
    "epsilon": "epsilon_ExK", "strategy": "strategy", "flipped": "flipped_E",
}  # fmt: skip
_TYPES = {"history": np.int32, "response_item": np.int32, "oracle_scores": np.float32, "epsilon": np.float32}
_LISTS = ("rejected", "history", "response_item", "oracle_scores", "epsilon", "strategy")
_IS = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "strategy"), pa.types.is_string),
    **dict.fromkeys(("user", "position", "history", "response_item"), pa.types.is_integer),
    **dict.fromkeys(("oracle_scores", "epsilon"), pa.types.is_floating),
    "flipped": pa.types.is_boolean,
}


def write(path: pathlib.Path, pairs: Pairs) -> None:
    def column(value):
        return value.tolist() if isinstance(value, np.ndarray) and value.ndim == 2 else value

    table = pa.table({name: column(getattr(pairs, field)) for name, field in COLUMNS.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    files.write_bytes(path, buffer.getvalue())


def read(path: pathlib.Path) -> Pairs:
    """What `write` wrote. UserError names the column that is not as it was."""
    columns: dict[str, Any] = dict(read_some(path, COLUMNS))
    try:
        for name, dtype in _TYPES.items():
            columns[name] = np.array(columns[name], dtype).reshape(len(columns[name]), -1)
        for name in ("user", "position", "flipped"):
            columns[name] = np.array(columns[name])
    except (ValueError, OverflowError) as error:  # rows of different lengths, numbers that do not fit
        raise UserError(f"{path}: column {name}: {error}; run `rosepo pairs` again") from None
    K = columns["epsilon"].shape[1]
    wide = {columns[name].shape[1] for name in ("response_item", "oracle_scores")}
    if wide != {K + 1} or {len(row) for name in ("rejected", "strategy") for row in columns[name]} != {K} or K < 1:
        raise UserError(f"{path}: rows of different numbers of responses; run `rosepo pairs` again")
    return Pairs(**{field: columns[name] for name, field in COLUMNS.items()})


def read_some(path: pathlib.Path, names: Iterable[str] = ("epsilon", "strategy", "flipped")) -> dict[str, list]:
    """Columns of a file that `write` wrote; by default those that a report shows."""
    with tables.parquet(path) as file:
        there = file.schema_arrow.names
        if wrong := [name for name in names if there.count(name) != 1]:
            raise UserError(f"{path}: no column {', '.join(wrong)}, or two; run `rosepo pairs` again")
        table = file.read(columns=list(names))
        return {name: _checked(table.column(name), name, path) for name in names}


def _checked(column: pa.ChunkedArray, name: str, path: pathlib.Path) -> list:
    """The values of a column of the type that `write` gives it, none of them missing."""
    kind, values = column.type, column.combine_chunks()
    if name in _LISTS and pa.types.is_list(kind):
        kind, values = kind.value_type, values.flatten()
    elif name in _LISTS:
        kind = pa.null()
    if not _IS[name](kind) or column.null_count or values.null_count:
        raise UserError(f"{path}: column {name} is not what `rosepo pairs` writes; run it again")
    return column.to_pylist()


def write_trl(path: pathlib.Path, pairs: Pairs) -> None:
    """JSON lines that TRL's DPOTrainer reads unchanged: one row per rejected response, the rest as extra columns."""

    def rows() -> Iterator[dict]:
        for e, prompt in enumerate(pairs.prompt):
            for k, rejected in enumerate(pairs.rejected[e]):
                yield {
                    "prompt": prompt,
                    "chosen": pairs.chosen[e],
                    "rejected": rejected,
                    "epsilon": None if np.isnan(epsilon := pairs.epsilon_ExK[e, k]) else float(epsilon),
                    "strategy": pairs.strategy[e][k],
                    "user": int(pairs.user_E[e]),
                    "position": int(pairs.position_E[e]),
                    "chosen_item": int(pairs.item_ExR[e, 0]),
                    "rejected_item": int(pairs.item_ExR[e, k + 1]),
                }

    files.write_jsonl(path, rows())


def import_rows(path: pathlib.Path) -> Pairs:
    """Ready-made rows, JSON lines or Parquet: prompt, chosen, rejected (text or list), optionally epsilon.

    Conversational values (lists of {"role", "content"}) give their contents, joined by line ends.
    """
    found: list[tuple[str, str, list[str], list[float]]] = []
    for number, row in enumerate(_rows(path), 1):
        try:
            found.append(_row(row))
        except ValueError as error:
            raise UserError(f"{path}: row {number} {error}") from None
        if len(found[-1][2]) != len(found[0][2]):
            raise UserError(f"{path}: row {number} has {len(found[-1][2])} rejected, row 1 has {len(found[0][2])}")
    if not found:
        raise UserError(f"{path}: no rows")
    prompt, chosen, rejected, epsilon = map(list, zip(*found))
    E, K = len(rejected), len(rejected[0])
    return Pairs(
        prompt, chosen, rejected, np.full(E, -1), np.full(E, -1), np.full((E, 1), -1, np.int32),
        np.full((E, K + 1), -1, np.int32), np.full((E, K + 1), np.nan, np.float32),
        np.array(epsilon, np.float32), [["imported"] * K for _ in range(E)], np.zeros(E, bool),
    )  # fmt: skip


def _rows(path: pathlib.Path) -> list[dict]:
    if path.suffix != ".parquet":
        return files.read_jsonl(path)
    return [row for _, row in tables.records(path)]


def _row(row: dict) -> tuple[str, str, list[str], list[float]]:
    """(prompt, chosen, rejected, epsilon) of one row; ValueError says what is wrong with it."""
    missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)} (needs prompt, chosen, rejected)")
    negatives = row["rejected"]
    if not isinstance(negatives, list) or isinstance(negatives[0], dict):
        negatives = [negatives]
    given = np.nan if row.get("epsilon") is None else row["epsilon"]
    epsilon = given if isinstance(given, list) else [given] * len(negatives)
    if len(epsilon) != len(negatives):
        raise ValueError(f"has {len(epsilon)} epsilon for {len(negatives)} rejected")
    for value in epsilon:
        if not isinstance(value, float | int) or value < 0 or value > 1:
            raise ValueError(f"has epsilon {value!r}: must be a probability")
    return _text(row["prompt"]), _text(row["chosen"]), [_text(value) for value in negatives], epsilon


def _text(value) -> str:
    """Text, or the contents of a conversation's turns."""
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        value = "\n".join(str(turn["content"]) for turn in value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"has {value!r:.80} where a text or a list of turns belongs")
    return value
