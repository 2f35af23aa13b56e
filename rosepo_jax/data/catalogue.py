"""The items: raw ids, titles, groups (genres) and train counts. Everywhere else an item is its index 0..I-1."""

import dataclasses
import difflib
import functools
import os
import pathlib
import re
import unicodedata

import numpy as np

from rosepo_jax import files, forms
from rosepo_jax.errors import UserError

_ROW = {"item": int, "id": str, "title": str, "groups": [str], "count": int}  # of catalogue.jsonl


def normalise(title: str) -> str:
    """The form in which titles are compared: NFKC, casefold, white space collapsed and stripped. Idempotent."""
    folded = unicodedata.normalize("NFKC", title).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # folding can undo NFKC, e.g. of U+0345


def _without_year(normalised: str) -> str:
    return re.sub(r"(?<=.) \(\d{4}\)$", "", normalised)


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """All items of a data set, in index order.

    ids: raw ids of the source. titles: as shown to the model. groups: genres or categories of each item, possibly ().
    count_I: int64, interactions of each item in the train split (zeros until `prepare` counts them).
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    count_I: np.ndarray

    def __post_init__(self):
        if not len(self.ids) == len(self.titles) == len(self.groups) == len(self.count_I):
            raise ValueError("ids, titles, groups and count_I must have one entry an item")

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def title_group_I(self) -> np.ndarray:
        """int64: the smallest index of an item with an equal normalised title, so duplicates share one group."""
        return np.array([self._index_of_title[normalise(title)] for title in self.titles], np.int64)

    def index_of_id(self, id: str) -> int:
        """The index of a raw id; UserError when there is none."""
        if id not in self._index_of_id:
            raise UserError(f"item id {id!r} is not in the catalogue of {len(self)} items")
        return self._index_of_id[id]

    def find_title(self, title: str) -> int:
        """The index of a title as a user types it: case, spacing and a trailing "(year)" that only one title has may
        differ. Of items with the same title it is the lowest index. UserError with the three nearest titles otherwise.
        """
        query = normalise(title)
        if query in self._index_of_title:
            return self._index_of_title[query]
        editions = self._indices_without_year.get(query, [])
        if len(editions) == 1:
            return editions[0]
        near = [self.titles[i] for i in editions[:3]] or self._nearest(query)
        meant = ", ".join(repr(name) for name in near) or "none, it is empty"
        kind = "ambiguous" if editions else "not in the catalogue"
        raise UserError(f"title {title!r} is {kind}; nearest titles: {meant}")

    def save(self, path: str | os.PathLike) -> None:
        """Writes catalogue.jsonl: one {"item", "id", "title", "groups", "count"} a line, in index order."""
        columns = zip(self.ids, self.titles, self.groups, self.count_I.tolist(), strict=True)
        files.write_jsonl(
            path,
            (
                {"item": item, "id": id, "title": title, "groups": list(groups), "count": count}
                for item, (id, title, groups, count) in enumerate(columns)
            ),
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Catalogue":
        """Reads what `save` wrote. UserError names the row that is out of order or lacks a field, and repeated ids."""
        rows = files.read_jsonl(path)
        for item, row in enumerate(rows):
            forms.check(row, _ROW, f"{path}: row {item + 1}", "run prepare again")
            if row["item"] != item:
                raise UserError(f"{path}: row {item + 1} holds item {row['item']}, not {item}; run prepare again")
        if not rows or len({row["id"] for row in rows}) < len(rows):
            raise UserError(f"{path}: no items, or two with the same id; run prepare again")
        return cls(
            ids=tuple(row["id"] for row in rows),
            titles=tuple(row["title"] for row in rows),
            groups=tuple(tuple(row["groups"]) for row in rows),
            count_I=np.array([row["count"] for row in rows], np.int64),
        )

    @functools.cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {id: item for item, id in enumerate(self.ids)}

    @functools.cached_property
    def _index_of_title(self) -> dict[str, int]:
        """Normalised title to the smallest index."""
        first: dict[str, int] = {}
        for item, title in enumerate(self.titles):
            first.setdefault(normalise(title), item)
        return first

    @functools.cached_property
    def _indices_without_year(self) -> dict[str, list[int]]:
        """Normalised title without its trailing "(year)" to the distinct titles that have one."""
        editions: dict[str, list[int]] = {}
        for title, item in self._index_of_title.items():
            if _without_year(title) != title:
                editions.setdefault(_without_year(title), []).append(item)
        return editions

    def _nearest(self, query: str) -> list[str]:
        names = difflib.get_close_matches(query, self._index_of_title, n=3, cutoff=0.0)
        return [self.titles[self._index_of_title[name]] for name in names]


def load_names(prepared: pathlib.Path) -> tuple[list[str], Catalogue]:
    """The users' raw ids by index, and the catalogue, from the folder of `prepare`."""
    path = prepared / "users.json"
    users = forms.check(files.read_json(path), [str], path, "run prepare again")
    return users, Catalogue.load(prepared / "catalogue.jsonl")
