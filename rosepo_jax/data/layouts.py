"""Layouts: how the rows of an update are laid out so that little of what a device computes is padding.

A batch is split into G equal shares, one for each device that holds rows of its own. The B rows of a share are sorted
by length and cut into a few parts, each padded to widths of its own; which rows make up an update is not touched. A
layout is the sizes and widths of the parts, the same for all shares. Few are chosen for a whole run, from the lengths
of its first updates, so that few programs are compiled: one that fits nearly all batches, if that saves more than it
costs, one that fits all of those updates, one with a quarter more room, one that fits all the limits allow.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rosepo_jax.data.prompts import pad

MOST_PARTS = 4
USEFUL = 0.92  # parts are added until this share of the processed tokens is useful
UPDATES_PER_PART = 100  # a further part means a longer compilation: a run must have that many updates for each
UPDATES_PER_PROGRAM = 50  # what a further layout saves, in updates, to be worth the compilation of its own program
LEAST_TOKENS = 256  # of a part, on a device: with fewer, matrix products wait for the weights
FITTING = 0.95  # share of batches that the first layout should fit


class Part(NamedTuple):
    """Rows of a batch that are padded alike."""

    rows: int  # of each share
    P: int  # prompt tokens
    Q: int  # response tokens that are fed, over all responses of a row

    @property
    def tokens(self) -> int:
        return self.rows * (self.P + self.Q)


Layout = tuple[Part, ...]


class Encoded(NamedTuple):
    """Tokenised rows: prompts, responses [B, R, T] with the same T in every batch, and what else is known of each."""

    prompts: list[list[int]]
    response_BxRxT: np.ndarray
    response_mask_BxRxT: np.ndarray
    rows: Mapping[str, np.ndarray]

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt tokens, and response tokens that are fed, of each row."""
        prompt_B = np.array([len(ids) for ids in self.prompts])
        return prompt_B, self.response_mask_BxRxT[:, :, 1:].sum(axis=(1, 2))


def width(longest: int) -> int:
    """The narrowest width for `longest` tokens: exact up to 32, then in sixteenths of a power of two."""
    step = max(1, 2 ** (int(longest - 1).bit_length() - 5)) if longest > 1 else 1
    return max(1, -(-int(longest) // step) * step)


def choose(
    prompt_SxGxB: np.ndarray, fed_SxGxB: np.ndarray, *, accumulate: int, updates: int, limit: Part
) -> tuple[Layout, ...]:
    """Layouts for a run of `updates`, from the lengths of the rows of its first S: cheapest first, the last fits all.

    Each fits whatever the one before it fits. Sizes of parts are multiples of `accumulate`, the micro-batches.
    """
    S, G, B = prompt_SxGxB.shape
    order = np.argsort(prompt_SxGxB + fed_SxGxB, axis=2, kind="stable")
    shape = (S, G, B // accumulate, accumulate)
    # The longest rows of every size that a part can grow by, in each batch.
    prompt_SxU, fed_SxU = (
        np.take_along_axis(x, order, axis=2).reshape(shape).max(axis=(1, 3)) for x in (prompt_SxGxB, fed_SxGxB)
    )
    useful = (prompt_SxGxB.sum() + fed_SxGxB.sum()) / (S * G)

    def layout(edges: Sequence[int], share: float) -> Layout:
        """Parts between `edges` that hold their rows in that share of the batches."""
        parts = []
        for start, stop in itertools.pairwise(edges):
            P, Q = (
                width(int(np.quantile(need[:, start:stop].max(axis=1), share, method="higher")))
                for need in (prompt_SxU, fed_SxU)
            )
            parts.append(Part((stop - start) * accumulate, P, Q))
        return _joined(parts)

    def layouts(edges: Sequence[int]) -> tuple[float, list[Layout]]:
        """The layouts of these parts, and how many tokens a batch takes then on average."""
        most_fit, all_fit = layout(edges, FITTING), layout(edges, 1.0)
        fewer = FITTING * (_tokens(all_fit) - _tokens(most_fit))
        if updates * fewer < UPDATES_PER_PROGRAM * _tokens(all_fit):
            return _tokens(all_fit), [all_fit]
        return _tokens(all_fit) - fewer, [most_fit, all_fit]

    cost, found = layouts([0, B // accumulate])
    for parts in range(2, 1 + min(MOST_PARTS, 1 + updates // UPDATES_PER_PART)):
        edges = _cuts(prompt_SxU, fed_SxU, accumulate, parts)
        if useful >= USEFUL * cost or edges is None:
            break
        cost, found = min((cost, found), layouts(edges), key=lambda way: way[0])
    # Rows longer than any of the sample are rare, and seldom much longer: the limits would be dear for all of a batch.
    P, Q = (width(-(-5 * int(need.max()) // 4)) for need in (prompt_SxU, fed_SxU))
    roomy = Part(B, min(P, limit.P), min(Q, limit.Q))
    return tuple(dict.fromkeys([*found, (roomy,), (limit._replace(rows=B),)]))


def first_fit(layouts: Sequence[Layout], prompt_GxB: np.ndarray, fed_GxB: np.ndarray) -> int:
    """The number of the first layout that holds these shares of a batch."""
    order_GxB = np.argsort(prompt_GxB + fed_GxB, axis=1, kind="stable")
    prompt_B, fed_B = (np.take_along_axis(x, order_GxB, axis=1).max(axis=0) for x in (prompt_GxB, fed_GxB))
    for number, layout in enumerate(layouts):
        starts = np.cumsum([0] + [part.rows for part in layout])[:-1]
        longest = zip(np.maximum.reduceat(prompt_B, starts), np.maximum.reduceat(fed_B, starts))
        if all(P <= part.P and Q <= part.Q for part, (P, Q) in zip(layout, longest)):
            return number
    raise ValueError(f"rows of up to {prompt_B.max()} + {fed_B.max()} tokens fit no layout of {layouts}")


def lay_out(layout: Layout, encoded: Encoded, pad_id: int, shares: int = 1) -> dict[str, Any]:
    """What devices see of so many shares of a batch: `parts`, and beside them the rows' figures.

    Rows stand share by share, within a share in the order of its parts; a part holds its rows of every share.
    """
    prompt_GxB, fed_GxB = (x.reshape(shares, -1) for x in encoded.lengths)
    first_Gx1 = prompt_GxB.shape[1] * np.arange(shares)[:, None]
    order_GxB = first_Gx1 + np.argsort(prompt_GxB + fed_GxB, axis=1, kind="stable")
    parts, start = [], 0
    for part in layout:
        index = order_GxB[:, start : start + part.rows].reshape(-1)
        start += part.rows
        parts.append(
            padded(
                [encoded.prompts[b] for b in index],
                encoded.response_BxRxT[index],
                encoded.response_mask_BxRxT[index],
                part.P,
                part.Q,
                pad_id,
            )
        )
    order_B = order_GxB.reshape(-1)
    rows = {name: x[order_B] for name, x in encoded.rows.items()}
    return {"parts": tuple(parts), "count_BxR": encoded.response_mask_BxRxT[order_B].sum(axis=2), **rows}


def padded(prompts: Sequence[Sequence[int]], response_BxRxT, response_mask_BxRxT, P: int, Q: int, pad_id: int) -> dict:
    """One part of a batch: prompts of P tokens, and the numbers r (T - 1) + t of Q response tokens that are fed."""
    prompt_BxP, prompt_mask_BxP = pad(prompts, P, pad_id)
    is_fed_BxF = response_mask_BxRxT[:, :, 1:].reshape(len(prompts), -1)  # the last token of a response never is
    order_BxF = np.argsort(~is_fed_BxF, axis=1, kind="stable")[:, :Q]
    fed_BxF = np.where(np.take_along_axis(is_fed_BxF, order_BxF, axis=1), order_BxF, is_fed_BxF.shape[1])
    fed_BxQ = np.pad(fed_BxF, ((0, 0), (0, Q - fed_BxF.shape[1])), constant_values=is_fed_BxF.shape[1])
    return {
        "prompt_BxP": prompt_BxP,
        "prompt_mask_BxP": prompt_mask_BxP,
        "response_BxRxT": response_BxRxT,
        "response_mask_BxRxT": response_mask_BxRxT,
        "fed_BxQ": fed_BxQ.astype(np.int32),
    }


def tokens(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(processed, useful) tokens of a batch."""
    processed = sum(part[name].size for part in batch["parts"] for name in ("prompt_BxP", "fed_BxQ"))
    useful = sum(int(part["prompt_mask_BxP"].sum()) for part in batch["parts"])
    return processed, useful + int(np.maximum(batch["count_BxR"] - 1, 0).sum())


def _tokens(layout: Layout) -> int:
    return sum(part.tokens for part in layout)


def _joined(parts: Sequence[Part]) -> Layout:
    """Neighbours of equal widths as one."""
    joined = [parts[0]]
    for part in parts[1:]:
        same = part[1:] == joined[-1][1:]
        joined[-1:] = [joined[-1]._replace(rows=joined[-1].rows + part.rows)] if same else [joined[-1], part]
    return tuple(joined)


def _cuts(prompt_SxU: np.ndarray, fed_SxU: np.ndarray, accumulate: int, parts: int) -> list[int] | None:
    """Edges [0, ..., U] of that many parts with the fewest tokens where every batch fits; None: no room.

    Dynamic programme over at most 32 places to cut.
    """
    U = prompt_SxU.shape[1]
    edges = np.unique(np.linspace(0, U, min(U, 32) + 1).round().astype(int))
    # Rows are sorted by length, so that the longest of a part stand near its end; widths are maxima all the same.
    cost: dict[tuple[int, int], float] = {}
    for i, start in enumerate(edges[:-1]):
        for j, stop in enumerate(edges[i + 1 :], i + 1):
            wide = sum(int(need[:, start:stop].max()) for need in (prompt_SxU, fed_SxU))
            enough = parts == 1 or (stop - start) * wide >= LEAST_TOKENS
            cost[i, j] = (stop - start) * accumulate * wide if enough else np.inf
    last = len(edges) - 1
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for n in range(1, parts + 1):
        for j in range(1, last + 1):
            ways = ((best[n - 1, i][0] + cost[i, j], i) for i in range(j) if (n - 1, i) in best)
            total, i = min(ways, default=(np.inf, -1))
            if np.isfinite(total):
                best[n, j] = (total, [*best[n - 1, i][1], j])
    if (parts, last) not in best:
        return None
    return [int(edges[j]) for j in best[parts, last][1]]
