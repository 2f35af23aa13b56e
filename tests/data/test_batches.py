"""Batches are a pure function of (seed, step): hosts, restarts and epochs."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax import distributed
from rosepo_jax.data import batches
from rosepo_jax.data.layouts import Encoded

sizes = st.integers(1, 40)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**62), sizes, sizes, st.integers(1, 4))
def test_every_epoch_is_a_permutation(seed, rows, batch_size, epochs):
    steps = -(-rows * epochs // batch_size)
    seen = np.concatenate([batches.order(seed, step, batch_size, rows) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_differ():
    first, second = (batches.order(7, step, 50, 50).tolist() for step in (0, 1))
    assert first != second and first != batches.order(8, 0, 50, 50).tolist()
    assert first == batches.order(7, 0, 50, 50).tolist()


def encode(index_B):
    """Row e: a prompt of 1 + e % 7 tokens, and two responses whose first has 2 tokens, the second 1 + e % 3."""
    mask_BxRxT = np.arange(4) < np.stack([np.full(len(index_B), 2), 1 + index_B % 3], axis=1)[..., None]
    return Encoded([[e] * (1 + e % 7) for e in index_B], mask_BxRxT * 5, mask_BxRxT, {"copy_B": index_B.copy()})


def run(start, stop, rows=29, batch_size=8, seed=3, shares=(0,), of=1):
    keys = {"seed": seed, "batch_size": batch_size, "shares": shares, "of": of, "accumulate": 1}
    return list(batches.stream(encode, rows, **keys, prompt_length=9, pad_id=0, start=start, stop=stop))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_stream_is_the_order():
    """Up to the order within an update, which is by length; what is known of a row stays with it."""
    for step, batch in enumerate(run(0, 9)):
        index_B = batches.order(3, step, 8, 29)
        assert sorted(batch["row_B"]) == sorted(index_B) and (batch["update_B"] == step).all()
        np.testing.assert_array_equal(batch["copy_B"], batch["row_B"])
        assert (np.diff(2 + batch["row_B"] % 7 + batch["row_B"] % 3) >= 0).all()


@pytest.mark.parametrize("start", [1, 3, 4, 8, 9])
def test_resume_at_any_step(start):
    same(run(start, 9), run(0, 9)[start:])


def test_a_run_has_few_shapes():
    """At most one for most batches, one for the others of the sample, one with more room and one for the limits."""
    shapes = {
        tuple((part["prompt_BxP"].shape, part["fed_BxQ"].shape) for part in batch["parts"]) for batch in run(0, 600)
    }
    assert 1 <= len(shapes) <= 4


def some(shares, x):
    """The rows of some of four shares."""
    return x.reshape(4, -1, *x.shape[1:])[shares].reshape(-1, *x.shape[1:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_batch(monkeypatch, hosts):
    """Of four devices each gets the same, whatever host it belongs to."""
    alone, told = run(0, 40, shares=range(4), of=4), {}

    def gather(topic, number, value):
        told.setdefault(number, {})[host] = value
        return list(told[number].values())

    monkeypatch.setattr(distributed, "gather", gather)
    for turn in range(3):  # until all have heard what the others say of the sample, and then of each batch
        for host in range(hosts):
            shares = range(4 * host // hosts, 4 * (host + 1) // hosts)
            for batch, whole in zip(run(0, 40, shares=shares, of=4), alone, strict=True):
                if turn == 2:
                    same(batch, jax.tree.map(functools.partial(some, list(shares)), whole))


@given(st.integers(0, 40), st.integers(1, 12))
def test_blocks_cover_all_rows_once_in_equal_blocks(rows, batch_size):
    found = list(batches.blocks(rows, batch_size))
    assert np.concatenate([[], *(index[real] for index, real in found)]).tolist() == list(range(rows))
    assert all(len(index) == len(real) == batch_size for index, real in found)
    assert all((index[~real] == 0).all() for index, real in found)
