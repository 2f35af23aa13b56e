"""Batches are a pure function of (seed, step): hosts, restarts and epochs."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.data import batches

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


def run(start, stop, rows=29, batch_size=8, seed=3):
    stream = batches.stream(
        lambda index: {"row": index}, rows, seed=seed, batch_size=batch_size, start=start, stop=stop
    )
    return [batch["row"].tolist() for batch in stream]


def test_stream_is_the_order():
    assert run(0, 9) == [batches.order(3, step, 8, 29).tolist() for step in range(9)]


@pytest.mark.parametrize("start", [1, 3, 4, 8, 9])
def test_resume_at_any_step(start):
    assert run(start, 9) == run(0, 9)[start:]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_share_each_batch(monkeypatch, hosts):
    """Side by side, the parts of all hosts are the batch that one host would read."""
    alone = run(0, 6)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    parts = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        parts.append(run(0, 6))
    assert {len(batch) for part in parts for batch in part} == {8 // hosts}
    assert [[row for piece in pieces for row in piece] for pieces in zip(*parts)] == alone


@given(st.integers(0, 40), st.integers(1, 12))
def test_blocks_cover_all_rows_once_in_equal_blocks(rows, batch_size):
    found = list(batches.blocks(rows, batch_size))
    assert np.concatenate([[], *(index[real] for index, real in found)]).tolist() == list(range(rows))
    assert all(len(index) == len(real) == batch_size for index, real in found)
    assert all((index[~real] == 0).all() for index, real in found)
