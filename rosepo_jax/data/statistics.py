"""What is worth knowing about a data set before a model is trained on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data.catalogue import Catalogue, normalise
from rosepo_jax.data.columns import Table, by_blocks, order

if TYPE_CHECKING:
    from rosepo_jax.data.rows import Events, Rows

BLOCK = 1 << 13  # rows looked at at a time: they stay in the cache


def describe(catalogue: Catalogue, n_users: int, events: "Events", rows: dict[str, "Rows"]) -> dict[str, Any]:
    """Numbers of a prepared log, JSON-ready. Shares are of the rows of a split, of all interactions, or of all titles.

    `cold_start`: share of targets that never occur in train. `history_repeat`: share of targets whose title (under
    another id) stands in the row's history. `tied_timestamps`: share of interactions whose user has another one in the
    same second. `duplicate_titles`: items whose title another item has; `contained_titles`: distinct titles that stand
    inside another title, which substring matching cannot tell apart.
    """
    length_U = np.bincount(events.user_E)
    length_U = length_U[length_U > 0]
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
            name: _repeats(group_I.astype(np.int32), split) / len(split) for name, split in named.items()
        },
    }


def _repeats(group_I: np.ndarray, rows: "Rows") -> int:
    """How many targets have the title of an item of their history."""

    def count(block: slice) -> int:
        history_ExN = rows.history_ExN[block]
        same_ExN = group_I[history_ExN] == group_I[rows.target_E[block]][:, None]
        return int((same_ExN & (history_ExN >= 0)).any(1).sum())

    return sum(by_blocks(count, len(rows), BLOCK))


def candidates(catalogue: Catalogue, test: "Rows") -> dict[str, Any]:
    """What is easy about the test lists. JSON-ready.

    `popularity_ratio`: mean train count of the targets over that of the other candidates; above 1, popularity helps.
    `colliding_rows`: rows in which one candidate's title stands inside another's; `lost_rows`: rows in which another
    candidate's title stands inside the target's, so that no answer is right by the literature's substring rule.
    """
    target_ExC = test.candidates_ExC == test.target_E[:, None]
    count_ExC = catalogue.count_I[test.candidates_ExC]
    others = count_ExC[~target_ExC].mean()
    names = [normalise(title) for title in catalogue.titles]
    distinct = {name: number for number, name in enumerate(sorted(set(names)))}
    name_I, key = np.array([distinct[name] for name in names]), containing(list(distinct))
    pairs, inside_I = Table(key), np.isin(name_I, key // len(distinct))

    def count(block: slice) -> tuple[int, int]:
        lists_ExC = test.candidates_ExC[block]
        row, slot = np.nonzero(inside_I[lists_ExC])
        short = name_I[lists_ExC[row, slot]] * len(distinct)
        in_list, _ = pairs.find(short[:, None] + name_I[lists_ExC[row]])
        in_target, _ = pairs.find(short + name_I[test.target_E[block][row]])
        return len(np.unique(row[in_list // lists_ExC.shape[1]])), len(np.unique(row[in_target]))

    colliding, lost = np.sum(by_blocks(count, len(test), BLOCK), axis=0, dtype=int).tolist()
    return {
        "popularity_ratio": float(count_ExC[target_ExC].mean() / others) if others else None,
        "colliding_rows": colliding,
        "lost_rows": lost,
    }


def defects(summary: dict[str, Any], test: "Rows") -> list[str]:
    """What a reader must know before believing a figure on these test rows; sentences from the measured `summary`."""
    n, found = len(test), []
    leak, lists = summary["candidate_leak"], summary["candidates"]
    if leak["flagged"]:
        probes = [leak[name][kind] for name in ("train", "validation") for kind in ("negatives", "slot")]
        worst = max((probe for probe in probes if probe["flagged"]), key=lambda probe: probe["HR@1"] - probe["chance"])
        found.append(
            f"The candidate lists betray their targets: a predictor that never reads a history is right on "
            f"{worst['HR@1']:.1%} of {worst['n']:,} test rows (chance {worst['chance']:.1%}). Figures on these lists "
            "stand for these lists only."
        )
    if "test" in lists["ready_made"] and not lists["ready_made_lists"]:
        found.append(
            "The source ships test rows without candidates: these lists are drawn afresh, so figures compare only "
            "loosely with published ones."
        )
    if n < 500:
        half = 1.96 * 0.5 / n**0.5
        found.append(f"Only {n} test rows: one hit is {1 / n:.4f}, a 95 % interval spans up to ±{half:.3f}.")
    size_U = np.sort(np.unique(test.user_E, return_counts=True)[1])[::-1]
    if n > len(size_U):
        found.append(
            f"The {n:,} test rows come from {len(size_U):,} users, {size_U[:10].sum() / n:.0%} of them from ten: rows "
            "are not independent, so intervals and tests resample users."
        )
    if lists["colliding_rows"]:
        lost = f", and in {lists['lost_rows']:,} rows no answer can be right" if lists["lost_rows"] else ""
        found.append(
            f"By the literature's substring rule the titles of {lists['colliding_rows']:,} test rows collide{lost}: "
            "one candidate's title stands inside another's."
        )
    if cold := round(summary["cold_start"]["test"] * n):
        found.append(f"{cold:,} of {n:,} test targets never occur in training.")
    return found


def gini(count_I: np.ndarray) -> float:
    """Inequality of popularity over the n items that occur, in [0, 1).

    Formula: sum_r (2r - n - 1) x_r / (n sum x), x ascending, r = 1..n.
    """
    x = np.sort(count_I[count_I > 0]).astype(np.float64)
    rank = np.arange(1, len(x) + 1)
    return float(((2 * rank - len(x) - 1) * x).sum() / (len(x) * x.sum())) if len(x) else 0.0


def tied(user_E: np.ndarray, timestamp_E: np.ndarray) -> float:
    """Share of interactions that share user and timestamp with another one."""
    by_user = order(user_E, timestamp_E)
    same = (np.diff(user_E[by_user]) == 0) & (np.diff(timestamp_E[by_user]) == 0)
    tie_E = np.zeros(len(user_E), bool)
    tie_E[1:] |= same
    tie_E[:-1] |= same
    return float(tie_E.mean()) if len(tie_E) else 0.0


def contained(titles: Sequence[str]) -> np.ndarray:
    """bool: which of the distinct titles stand inside a longer one, at any position."""
    inside = np.zeros(len(titles), bool)
    inside[containing(titles) // max(len(titles), 1)] = True
    return inside


def containing(titles: Sequence[str]) -> np.ndarray:
    """int64: a * (number of titles) + b, ascending, for all pairs of distinct titles of which a stands inside b.

    All windows of each length are compared at once by a polynomial hash mod 2^64 over randomised characters, because
    comparing every pair of titles does not scale to large catalogues.
    """
    length = np.array([len(title) for title in titles], np.int64)
    empty, others = np.flatnonzero(length == 0), np.flatnonzero(length)
    pairs = [(empty[:, None] * len(titles) + others).ravel()]
    text = np.frombuffer("".join(titles).encode("utf-32-le"), np.uint32)
    title = np.repeat(np.arange(len(titles)), length)  # in which a character stands
    end, start = np.cumsum(length)[title], np.cumsum(length) - length
    symbol = (seeds.uniform(seeds.key("contained"), text) * 2**53).astype(np.uint64)
    base = 0x9E3779B97F4A7C15
    power = np.cumprod(np.full(len(text), base, np.uint64))
    inverse = np.cumprod(np.full(len(text), pow(base, -1, 2**64), np.uint64))
    prefix = np.concatenate([[np.uint64(0)], np.cumsum(symbol * power)])
    for size in np.unique(length[others]):
        names = np.flatnonzero(length == size)
        window = np.flatnonzero((length[title] > size) & (np.arange(len(text)) + size <= end))
        name_hash, window_hash = ((prefix[at + size] - prefix[at]) * inverse[at] for at in (start[names], window))
        by_hash = np.argsort(name_hash)
        found, at = Table(name_hash[by_hash]).find(window_hash)
        pairs.append(names[by_hash[at]] * len(titles) + title[window[found]])
    return np.unique(np.concatenate(pairs))
