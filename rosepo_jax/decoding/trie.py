"""The catalogue's titles as a prefix tree of tokens, in arrays that live on the device."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Trie:
    """The prefixes of all titles as nodes. Ending a title takes its EOS edge, which costs log p(EOS) like any other.

    Nodes are numbered breadth first and, within a depth, in the order of their tokens: the children of node n are the
    nodes `child_start[n] .. child_start[n + 1] - 1`, and memory is O(total title tokens).
    Distinct titles are ranked in the order of their tokens: the titles below node n are the ranks `first[n]` to
    `last[n] - 1`, and a title that ends at n has rank `first[n]`. Items with equal tokens share a rank; the lowest of
    them stands for all.

    Shapes:    M nodes (0 = root), I items; int32. `branching[d]` is the largest number of children of a node at depth
               d, so its length is that of the longest title without EOS (at least 1). `eos` and `branching` are static
               under jit.
    Source:    tries as CSR arrays follow STATIC (youtube/static-constraint-decoding); breadth-first numbering and title
               ranks are our own choice.
    """

    child_start_M1: np.ndarray
    parent_M: np.ndarray  # 0 for the root too
    token_M: np.ndarray
    item_M: np.ndarray  # the item whose title ends here, -1 for none
    first_M: np.ndarray
    last_M: np.ndarray
    rank_I: np.ndarray
    eos: int
    branching: tuple[int, ...]

    def levels(self) -> tuple[list[int], list[int]]:
        """(level_T, widths): prefixes of d + 1 tokens have at most `widths[level_T[d]]` children.

        Below the first tokens a trie has few children, so that searching all depths with the room of the widest would
        mostly sort padding. A level ends where a quarter of its width is enough for all that is deeper.
        """
        level_T: list[int] = []
        widths: list[int] = []
        for depth in range(len(self.branching)):
            needed = max(self.branching[depth + 1 :], default=0)
            if not widths or 4 * needed <= widths[-1]:
                widths.append(needed)
            level_T.append(len(widths) - 1)
        return level_T, widths


jax.tree_util.register_dataclass(
    Trie,
    data_fields=["child_start_M1", "parent_M", "token_M", "item_M", "first_M", "last_M", "rank_I"],
    meta_fields=["eos", "branching"],
)


def compile_trie(titles: Sequence[Sequence[int]], eos: int) -> Trie:
    """Builds the trie of I token sequences; item i is `titles[i]`, which ends with its only `eos`.

    Errors:    ValueError when there are no titles, when one does not end with its only EOS, or has a negative token.
    """
    if not titles:
        raise ValueError("no titles to decode")
    length_I = np.fromiter(map(len, titles), np.int64, len(titles)) - 1
    tokens = np.fromiter(itertools.chain.from_iterable(titles), np.int64, int(length_I.sum()) + len(titles))
    ends = np.cumsum(length_I + 1) - 1
    if length_I.min() < 0 or not np.array_equal(np.flatnonzero(tokens == eos), ends) or tokens.min() < 0:
        raise ValueError(f"every title must be tokens >= 0 that end with the EOS {eos}, which occurs nowhere else")

    depth = max(1, int(length_I.max()))  # a catalogue of empty titles only keeps one unused column
    token_IxT = np.full((len(titles), depth), -1, np.int32)
    token_IxT[np.arange(depth)[None] < length_I[:, None]] = np.delete(tokens, ends)
    # Stable, so that the lowest item leads its group; -1 puts a title before the titles it begins.
    order = np.lexsort(token_IxT.T[::-1])
    sorted_IxT = token_IxT[order]
    is_first_I = np.append(True, (sorted_IxT[1:] != sorted_IxT[:-1]).any(axis=1))
    rank_I = np.empty(len(titles), np.int64)
    rank_I[order] = np.cumsum(is_first_I) - 1

    # From here one row per distinct title. A node is born in the first row that has its prefix.
    title_RxT, item_R = sorted_IxT[is_first_I], order[is_first_I]
    length_R = length_I[item_R]
    differs_RxT = np.ones(title_RxT.shape, bool)
    differs_RxT[1:] = np.logical_or.accumulate(title_RxT[1:] != title_RxT[:-1], axis=1)
    is_born_RxT = differs_RxT & (title_RxT >= 0)
    column, row = np.nonzero(is_born_RxT.T)
    nodes = len(row) + 1
    node_RxT1 = np.zeros((len(item_R), depth + 1), np.int64)
    node_RxT1[:, 1:] = np.cumsum(is_born_RxT.T).reshape(depth, -1).T
    parent = node_RxT1[row, column]

    child_start_M1 = 1 + np.searchsorted(parent, np.arange(nodes + 1))
    item_M = np.full(nodes, -1)
    item_M[node_RxT1[np.arange(len(item_R)), length_R]] = item_R
    first_M = np.append(0, row)
    has_prefix_RxT1 = np.arange(depth + 1)[None] <= length_R[:, None]
    last_M = first_M + np.bincount(node_RxT1[has_prefix_RxT1], minlength=nodes)
    widest = np.zeros(depth, np.int64)
    np.maximum.at(widest, column, np.diff(child_start_M1)[parent])
    return Trie(
        child_start_M1=child_start_M1.astype(np.int32),
        parent_M=np.append(0, parent).astype(np.int32),
        token_M=np.append(eos, title_RxT[row, column]).astype(np.int32),
        item_M=item_M.astype(np.int32),
        first_M=first_M.astype(np.int32),
        last_M=last_M.astype(np.int32),
        rank_I=rank_I.astype(np.int32),
        eos=int(eos),
        branching=tuple(widest.tolist()),
    )
