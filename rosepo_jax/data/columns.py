"""Columns of tens of millions of rows: their order, look-ups, and work on them in blocks."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying loses nothing; its high bits mix (Knuth, TAOCP 6.4)


def by_blocks(work: Callable[[slice], T], rows: int, step: int) -> list[T]:
    """`work` on blocks of `step` rows, so that they stay in the cache, on all cores; its results, block by block."""
    step = max(step, 1)
    blocks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets other threads run
        return list(pool.map(work, blocks))


def order(*keys: np.ndarray) -> np.ndarray:
    """int64: the stable order by the first key, then the second, ... (`np.lexsort` takes them the other way round).

    Keys that are in order as they stand cost a comparison and no sort; logs often come by time or by user.
    """
    sorted_from = next((i for i in range(len(keys)) if _in_order(keys[i:])), len(keys))
    found = None
    for key in reversed(keys[:sorted_from]):
        found = _stable(key) if found is None else found[_stable(key[found])]
    return np.arange(len(keys[0])) if found is None else found


def _in_order(keys: tuple[np.ndarray, ...]) -> bool:
    """Whether the rows of these columns ascend."""
    tied = np.ones(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        if (tied & (key[1:] < key[:-1])).any():
            return False
        tied &= key[1:] == key[:-1]
    return True


def _stable(key: np.ndarray) -> np.ndarray:
    """np.argsort(key, kind="stable"); where key and place fit into one word, sorting such words is twice as fast."""
    bits = len(key).bit_length()
    if key.dtype.kind == "i" and len(key) and key.min() >= 0 and int(key.max()) < 1 << (63 - bits):
        word = key.astype(np.int64)  # and all in place, since fresh memory costs more than the arithmetic
        word <<= bits
        word |= np.arange(len(key))
        word.sort()
        word &= (1 << bits) - 1
        return word
    return np.argsort(key, kind="stable")


class Table:
    """Which of many numbers stand in a sorted array of distinct ones (int64 >= 0, or uint64), when few do.

    Before any search most of the absent ones fall through a sieve: about as many words as the array has numbers, each
    for a range of numbers, in which each number sets two of 64 bits by its hash. Neighbours meet in the cache.
    """

    def __init__(self, sorted_K: np.ndarray):
        self._sorted_K = sorted_K
        number_K = sorted_K.view(np.uint64)
        self._low = number_K[:1].sum()
        span = int(number_K[-1:].sum() - self._low)
        self._width = np.uint64((span // (len(sorted_K) + 1)).bit_length())
        self._words = np.zeros((span >> int(self._width)) + 1, np.uint64)
        word_K, *bits_K = self._place(sorted_K)
        for bit_K in bits_K:
            np.bitwise_or.at(self._words, word_K, np.uint64(1) << bit_K)

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(flat places in `wanted` of the numbers that are there, ascending; where each stands in the array)."""
        word, one, two = self._place(wanted)
        bits = self._words[word]
        found = np.flatnonzero(((bits >> one) & (bits >> two) & np.uint64(1)).astype(bool))
        number = wanted.ravel()[found]
        at = np.searchsorted(self._sorted_K, number)
        there = self._sorted_K[at.clip(max=len(self._sorted_K) - 1)] == number if len(self._sorted_K) else at < 0
        return found[there], at[there]

    def _place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        number = numbers.view(np.uint64)
        word = np.minimum((number - self._low) >> self._width, np.uint64(len(self._words) - 1)).view(np.int64)
        hashed = number * _SPREAD
        return word, hashed >> np.uint64(58), (hashed >> np.uint64(52)) & np.uint64(63)
