"""Batches as a pure function of (seed, step): the same examples per step on any number of hosts, also after a restart.

grain reads ahead in threads; it decides nothing. The data position of a run is its step number.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data import layouts
from rosepo_jax.data.layouts import Encoded, Layout, Part

SAMPLE = 128  # updates whose lengths choose the layouts


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
    encode: Callable[[np.ndarray], Encoded],
    rows: int,
    *,
    seed: int,
    batch_size: int,
    unit: int,
    prompt_length: int,
    pad_id: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, Any]]:
    """This host's part of batches start..stop-1 of a run of `stop` updates, as `layouts.lay_out` makes them.

    `encode(row numbers)` tokenises rows. Every host tokenises the whole batch, so that all agree on its layout.
    `row_B` and `update_B`, the number of the batch, stand beside it: they name every random draw of a row.
    """

    def plan() -> tuple[Layout, ...]:
        sample = [encode(order(seed, step, batch_size, rows)) for step in range(min(stop, SAMPLE))]
        lengths = (np.stack(x) for x in zip(*(encoded.lengths for encoded in sample)))
        _, R, T = sample[0].response_BxRxT.shape
        return layouts.choose(*lengths, unit=unit, updates=stop, limit=Part(batch_size, prompt_length, R * (T - 1)))

    found = plan() if start < stop else ()

    def load(step: int) -> dict[str, Any]:
        index_B = order(seed, step, batch_size, rows)
        encoded = encode(index_B)
        named = {"row_B": index_B.astype(np.int32), "update_B": np.full(batch_size, step, np.int32)}
        batch = layouts.lay_out(found, encoded._replace(rows={**encoded.rows, **named}), pad_id)
        return jax.tree.map(lambda x: x[mine(len(x))], batch)

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def blocks(rows: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All rows once, in order, in blocks of one size: (row numbers, real mask); the last one is padded with row 0."""
    for start in range(0, rows, batch_size):
        index = np.arange(start, start + batch_size)
        yield np.where(index < rows, index, 0), index < rows
