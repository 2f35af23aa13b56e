import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.data import statistics
from rosepo_jax.data.catalogue import Catalogue, normalise
from rosepo_jax.data.rows import Rows


def test_gini_closed_forms():
    assert statistics.gini(np.array([4, 4, 4])) == 0.0
    assert statistics.gini(np.array([1, 0, 3])) == pytest.approx(0.25)  # items that never occur do not count
    assert statistics.gini(np.array([0] * 3)) == 0.0
    x = np.random.default_rng(0).integers(1, 50, 40)
    assert statistics.gini(x) == pytest.approx(np.abs(x[:, None] - x).sum() / (2 * len(x) * x.sum()))


@settings(deadline=None)
@given(st.sets(st.text("ab é", max_size=6), max_size=25))
def test_contained_titles_equal_brute_force(titles):
    titles = sorted(titles)
    pairs = [(a, b) for a, one in enumerate(titles) for b, other in enumerate(titles) if one in other and a != b]
    assert statistics.containing(titles).tolist() == [a * len(titles) + b for a, b in pairs]
    assert np.flatnonzero(statistics.contained(titles)).tolist() == sorted({a for a, _ in pairs})


def test_what_is_easy_or_lost_in_candidate_lists():
    """Row 0: Heat stands inside the target; row 1: inside another candidate; row 2: nothing collides."""
    titles = ("Theatre", "HEAT", "Up", "Alien", "Rain")
    catalogue = Catalogue(tuple("abcde"), titles, ((),) * 5, np.array([6, 1, 2, 3, 0]))
    target, lists = np.array([0, 2, 3]), np.array([[0, 1, 4], [2, 0, 1], [3, 2, 4]])
    test = Rows(np.arange(3), np.arange(3), np.full((3, 1), -1), target, lists)
    found = statistics.candidates(catalogue, test)
    assert (found["colliding_rows"], found["lost_rows"]) == (2, 1)
    assert found["popularity_ratio"] == pytest.approx((6 + 2 + 3) / 3 / ((1 + 0 + 6 + 1 + 2 + 0) / 6))


@settings(deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=4), min_size=6, max_size=12), st.integers(0, 2**32 - 1))
def test_colliding_and_lost_rows_equal_brute_force(titles, seed):
    rng = np.random.default_rng(seed)
    catalogue = Catalogue(tuple(map(str, range(len(titles)))), tuple(titles), ((),) * len(titles), np.ones(len(titles)))
    lists = np.array([rng.permutation(len(titles))[:4] for _ in range(9)])
    test = Rows(np.arange(9), np.arange(9), np.full((9, 1), -1), lists[:, 1], lists)
    names = [[normalise(titles[item]) for item in listed] for listed in lists]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK", 2)
        found = statistics.candidates(catalogue, test)
    assert found["colliding_rows"] == sum(any(a in b and a != b for a in row for b in row) for row in names)
    assert found["lost_rows"] == sum(any(a in row[1] and a != row[1] for a in row) for row in names)


def test_defects_are_said_where_they_are():
    def rows(users):
        columns = np.array(users), np.arange(len(users)), np.zeros((len(users), 1)), np.zeros(len(users))
        return Rows(*columns, np.zeros((len(users), 2)))

    clean = {"flagged": False, "HR@1": 0.05, "chance": 0.05, "n": 600}
    probes = {name: {"negatives": clean, "slot": clean} for name in ("train", "validation")}
    lists = {"ready_made": [], "ready_made_lists": False, "colliding_rows": 0, "lost_rows": 0}
    summary = {"candidate_leak": {"flagged": False, **probes}, "candidates": lists, "cold_start": {"test": 0.0}}
    assert statistics.defects(summary, rows(range(600))) == []
    summary["candidates"] = lists | {"ready_made": ["test"], "colliding_rows": 4, "lost_rows": 1}
    summary["cold_start"] = {"test": 0.1}
    probes["train"]["slot"] = {"flagged": True, "HR@1": 0.9, "chance": 0.05, "n": 38}
    summary["candidate_leak"] = {"flagged": True, **probes}
    said = statistics.defects(summary, rows([0] * 30 + list(range(10))))
    assert [line.split()[0] for line in said] == ["The", "The", "Only", "The", "By", "4"]
    assert "90.0% of 38 test rows (chance 5.0%)" in said[0] and "one hit is 0.0250" in said[2]
    assert "40 test rows come from 10 users, 100%" in said[3] and "in 1 rows no answer" in said[4]


def test_tied_timestamps_are_counted_within_a_user():
    assert statistics.tied(np.array([0, 0, 0, 1, 1]), np.array([5.0, 6, 5, 5, 7])) == pytest.approx(2 / 5)
    assert statistics.tied(np.zeros(0, int), np.zeros(0)) == 0.0
