"""Batches as a pure function of (seed, step): the same examples per step on any number of hosts, also after a restart.

grain reads ahead in threads; it decides nothing. The data position of a run is its step number.
"""

import functools
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from rosepo_jax import seeds


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return seeds.generator(seed, "order", epoch).permutation(rows)


def order(seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """Row numbers [B] of batch `step`: consecutive pieces of one fresh permutation per epoch, without gaps."""
    position = step * batch_size + np.arange(batch_size)
    return np.array([_permutation(seed, int(p) // rows, rows)[p % rows] for p in position])


def mine(batch_size: int) -> slice:
    """This host's part of a batch."""
    host, hosts = jax.process_index(), jax.process_count()
    return slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)


def stream(
    encode: Callable[[np.ndarray], dict[str, np.ndarray]],
    rows: int,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of batches start..stop-1; `encode(row numbers)` makes the arrays (leading axis: rows).

    `update_B`, the number of the batch, stands beside them: with the row number it names every random draw of a row.
    """
    here = mine(batch_size)

    def load(step: int) -> dict[str, np.ndarray]:
        index_B = order(seed, step, batch_size, rows)[here]
        return encode(index_B) | {"update_B": np.full(len(index_B), step, np.int32)}

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def blocks(rows: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All rows once, in order, in blocks of one size: (row numbers, real mask); the last one is padded with row 0."""
    for start in range(0, rows, batch_size):
        index = np.arange(start, start + batch_size)
        yield np.where(index < rows, index, 0), index < rows
