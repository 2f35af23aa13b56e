"""Randomness as a pure function of names and numbers, so that no draw depends on workers, hosts, batches or order."""

import hashlib

import numpy as np


def key(*parts: str | int) -> int:
    """A 64-bit key from any names and numbers, e.g. `key(config.seed, "candidates", "test")`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(*parts: str | int) -> np.random.Generator:
    """A numpy generator for the key of `parts`."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): a bijection of 64-bit words that avalanches."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniform(seed: int, *coordinates: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1), one per broadcast element of the integer `coordinates`.

    `uniform(key(seed, "flip"), user, position)` gives every (user, position) its own number, the same in any order,
    on any host and in any batch.
    """
    state = np.asarray(np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    with np.errstate(over="ignore"):
        for coordinate in coordinates:
            word = np.asarray(coordinate).astype(np.int64).astype(np.uint64)
            state = np.asarray(_mix(state + np.uint64(0x9E3779B97F4A7C15) * (word + np.uint64(1))))
        state = np.asarray(_mix(state + np.uint64(0x9E3779B97F4A7C15)))
    return np.asarray((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)
