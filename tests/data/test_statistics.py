import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax.data import statistics


def test_gini_closed_forms():
    assert statistics.gini(np.array([4, 4, 4])) == 0.0
    assert statistics.gini(np.array([1, 0, 3])) == pytest.approx(0.25)  # items that never occur do not count
    assert statistics.gini(np.array([0] * 3)) == 0.0
    x = np.random.default_rng(0).integers(1, 50, 40)
    assert statistics.gini(x) == pytest.approx(np.abs(x[:, None] - x).sum() / (2 * len(x) * x.sum()))


@given(st.sets(st.text("ab é", max_size=6), max_size=25))
def test_contained_titles_equal_brute_force(titles):
    titles = sorted(titles)
    wanted = [any(title in other and title != other for other in titles) for title in titles]
    assert statistics.contained(titles).tolist() == wanted


def test_tied_timestamps_are_counted_within_a_user():
    assert statistics.tied(np.array([0, 0, 0, 1, 1]), np.array([5.0, 6, 5, 5, 7])) == pytest.approx(2 / 5)
    assert statistics.tied(np.zeros(0, int), np.zeros(0)) == 0.0
