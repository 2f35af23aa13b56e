import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rosepo_jax.data.columns import Table, by_blocks, order

KEYS = st.integers(0, 40).flatmap(
    lambda n: st.lists(
        st.sampled_from([np.int8, np.int32, np.int64, np.float64]).flatmap(
            lambda kind: arrays.arrays(kind, n, elements=st.integers(-3, 3).map(kind))
        ),
        min_size=1,
        max_size=3,
    )
)


@settings(deadline=None)
@given(KEYS, st.integers(0, 3))
def test_order_is_that_of_lexsort(keys, sorted_keys):
    """Also where some of the last keys are in order already, which saves their sorts."""
    if tail := keys[len(keys) - sorted_keys :]:
        keys = [*keys[: len(keys) - sorted_keys], *np.stack(tail)[:, np.lexsort(tail[::-1])]]
    np.testing.assert_array_equal(order(*keys), np.lexsort(keys[::-1]))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**62), max_size=6), st.integers(1, 6))
def test_order_of_numbers_too_large_to_share_a_word_with_their_place(numbers, times):
    key = np.array(numbers * times, np.int64)
    np.testing.assert_array_equal(order(key), np.argsort(key, kind="stable"))


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
@settings(deadline=None)
@given(st.sets(st.integers(0, 60) | st.integers(0, 2**62)), st.lists(st.integers(0, 60) | st.integers(0, 2**62)))
def test_a_table_finds_what_a_search_finds(kind, numbers, others):
    sorted_K = np.array(sorted(numbers), kind)
    wanted = np.array([*others, *numbers, *others], kind)
    for shaped in (wanted, wanted[::-1].reshape(1, -1)):
        found, at = Table(sorted_K).find(shaped)
        np.testing.assert_array_equal(found, np.flatnonzero(np.isin(shaped, sorted_K)))
        np.testing.assert_array_equal(sorted_K[at], shaped.ravel()[found])


def test_a_table_holds_no_negative_number():
    for sorted_K in (np.arange(5), np.zeros(0, np.int64)):
        found, at = Table(sorted_K).find(np.array([-1, -(2**62), 5]))
        assert not len(found) and not len(at)


def test_blocks_cover_the_rows_once_and_answer_in_their_order():
    def work(block):
        time.sleep(0.001 * (block.start == 0))  # the first one ends last
        return range(block.start, block.stop)

    for rows, step in ((0, 4), (7, 3), (9, 3), (5, 0)):
        assert list(itertools.chain(*by_blocks(work, rows, step))) == list(range(rows))
    with pytest.raises(ZeroDivisionError):
        by_blocks(lambda block: 1 // block.start, 4, 2)
