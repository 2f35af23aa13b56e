"""What is worth knowing about a data set before a model is trained on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data.catalogue import Catalogue, normalise

if TYPE_CHECKING:
    from rosepo_jax.data.rows import Events, Rows


def describe(catalogue: Catalogue, n_users: int, events: "Events", rows: dict[str, "Rows"]) -> dict[str, Any]:
    """Numbers of a prepared log, JSON-ready. Shares are of the rows of a split, of all interactions, or of all titles.

    `cold_start`: share of targets that never occur in train. `history_repeat`: share of targets whose title (under
    another id) stands in the row's history. `tied_timestamps`: share of interactions whose user has another one in the
    same second. `duplicate_titles`: items whose title another item has; `contained_titles`: distinct titles that stand
    inside another title, which substring matching cannot tell apart.
    """
    length_U = np.unique(events.user_E, return_counts=True)[1]
    group_I = catalogue.title_group_I
    named = {name: split for name, split in rows.items() if len(split)}
    return {
        "users": n_users,
        "items": len(catalogue),
        "interactions": len(events.user_E),
        "length": {
            "min": int(length_U.min()),
            "median": float(np.median(length_U)),
            "mean": float(length_U.mean()),
            "max": int(length_U.max()),
        },
        "rows": {name: len(split) for name, split in rows.items()},
        "gini": gini(np.bincount(events.item_E, minlength=len(catalogue))),
        "duplicate_titles": int((np.bincount(group_I)[group_I] > 1).sum()),
        "contained_titles": int(contained(sorted({normalise(title) for title in catalogue.titles})).sum()),
        "tied_timestamps": tied(events.user_E, events.timestamp_E),
        "cold_start": {name: float((catalogue.count_I[split.target_E] == 0).mean()) for name, split in named.items()},
        "history_repeat": {
            name: float(
                ((group_I[split.history_ExN] == group_I[split.target_E][:, None]) & (split.history_ExN >= 0))
                .any(1)
                .mean()
            )
            for name, split in named.items()
        },
    }


def gini(count_I: np.ndarray) -> float:
    """Inequality of popularity over the n items that occur, in [0, 1).

    Formula: sum_r (2r - n - 1) x_r / (n sum x), x ascending, r = 1..n.
    """
    x = np.sort(count_I[count_I > 0]).astype(np.float64)
    rank = np.arange(1, len(x) + 1)
    return float(((2 * rank - len(x) - 1) * x).sum() / (len(x) * x.sum())) if len(x) else 0.0


def tied(user_E: np.ndarray, timestamp_E: np.ndarray) -> float:
    """Share of interactions that share user and timestamp with another one."""
    order = np.lexsort((timestamp_E, user_E))
    same = (np.diff(user_E[order]) == 0) & (np.diff(timestamp_E[order]) == 0)
    tie_E = np.zeros(len(user_E), bool)
    tie_E[1:] |= same
    tie_E[:-1] |= same
    return float(tie_E.mean()) if len(tie_E) else 0.0


def contained(titles: Sequence[str]) -> np.ndarray:
    """bool: which of the distinct titles stand inside a longer one, at any position.

    All windows of each length are compared at once by a polynomial hash mod 2^64 over randomised characters, because
    comparing every pair of titles does not scale to large catalogues.
    """
    length = np.array([len(title) for title in titles], np.int64)
    inside = np.zeros(len(titles), bool)
    inside[length == 0] = len(titles) > 1
    text = np.frombuffer("".join(titles).encode("utf-32-le"), np.uint32)
    if not len(text):
        return inside
    end = np.repeat(np.cumsum(length), length)  # of the title in which a character stands
    whole = np.repeat(length, length)
    start = np.cumsum(length) - length
    symbol = (seeds.uniform(seeds.key("contained"), text) * 2**53).astype(np.uint64)
    base = 0x9E3779B97F4A7C15
    power = np.cumprod(np.full(len(text), base, np.uint64))
    inverse = np.cumprod(np.full(len(text), pow(base, -1, 2**64), np.uint64))
    prefix = np.concatenate([[np.uint64(0)], np.cumsum(symbol * power)])
    for size in np.unique(length[length > 0]):
        window = np.flatnonzero((whole > size) & (np.arange(len(text)) + size <= end))
        names = np.flatnonzero(length == size)
        title_hash, window_hash = ((prefix[at + size] - prefix[at]) * inverse[at] for at in (start[names], window))
        inside[names] = np.isin(title_hash, window_hash)
    return inside
