"""Batches as a pure function of (seed, step): the same examples per step on any number of hosts, also after a restart.

grain reads ahead in threads; it decides nothing. The data position of a run is its step number.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from rosepo_jax import distributed, seeds
from rosepo_jax.data import layouts
from rosepo_jax.data.layouts import Encoded, Layout, Part

SAMPLE = 128  # updates whose lengths choose the layouts
_STREAMS = itertools.count()


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return seeds.generator(seed, "order", epoch).permutation(rows)


def order(seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """Row numbers [B] of batch `step`: consecutive pieces of one fresh permutation per epoch, without gaps."""
    position = step * batch_size + np.arange(batch_size)
    return np.array([_permutation(seed, int(p) // rows, rows)[p % rows] for p in position])


def shares_of(shares: Sequence[int], of: int, batch_size: int) -> np.ndarray:
    """Places in a batch of the rows of some of its `of` equal shares, share by share."""
    size = batch_size // of
    return (size * np.array(shares)[:, None] + np.arange(size)[None]).reshape(-1)


def stream(
    encode: Callable[[np.ndarray], Encoded],
    rows: int,
    *,
    seed: int,
    batch_size: int,
    shares: Sequence[int],
    of: int,
    accumulate: int,
    prompt_length: int,
    pad_id: int,
    start: int,
    stop: int,
) -> Iterator[dict[str, Any]]:
    """This host's `shares`, of `of`, of batches start..stop-1 of a run of `stop` updates, as `layouts.lay_out` makes
    them.

    `encode(row numbers)` tokenises rows, this host's only; hosts tell each other the lengths of the first rows, and
    which layout a batch needs. `row_B` and `update_B`, the number of the batch, stand beside it: they name every random
    draw of a row.
    """
    topic, mine_B = f"layouts {next(_STREAMS)}", shares_of(shares, of, batch_size)

    def split(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
        prompt_B, fed_B = encoded.lengths
        return prompt_B.reshape(len(shares), -1), fed_B.reshape(len(shares), -1)

    def plan() -> tuple[Layout, ...]:
        sample = [encode(order(seed, step, batch_size, rows)[mine_B]) for step in range(min(stop, SAMPLE))]
        _, R, T = sample[0].response_BxRxT.shape
        prompt_SxGxB, fed_SxGxB = (np.zeros((len(sample), of, batch_size // of), int) for _ in range(2))
        told = [list(shares), *(np.stack(x).tolist() for x in zip(*map(split, sample)))]
        for these, prompts, feds in distributed.gather(topic, 0, told):
            prompt_SxGxB[:, these], fed_SxGxB[:, these] = prompts, feds
        limit = Part(batch_size // of, prompt_length, R * (T - 1))
        return layouts.choose(prompt_SxGxB, fed_SxGxB, accumulate=accumulate, updates=stop, limit=limit)

    found = plan() if start < stop else ()

    def load(step: int) -> dict[str, Any]:
        index_B = order(seed, step, batch_size, rows)[mine_B]
        encoded = encode(index_B)
        named = {"row_B": index_B.astype(np.int32), "update_B": np.full(len(index_B), step, np.int32)}
        (number,) = distributed.maximum(topic, 1 + step, [layouts.first_fit(found, *split(encoded))])
        return layouts.lay_out(found[number], encoded._replace(rows={**encoded.rows, **named}), pad_id, len(shares))

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def blocks(rows: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All rows once, in order, in blocks of one size: (row numbers, real mask); the last one is padded with row 0."""
    for start in range(0, rows, batch_size):
        index = np.arange(start, start + batch_size)
        yield np.where(index < rows, index, 0), index < rows
