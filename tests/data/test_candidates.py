import itertools

import numpy as np
import pytest

from rosepo_jax import seeds
from rosepo_jax.data import candidates
from rosepo_jax.errors import UserError


def make_pool(weight, group=None, had=()):
    """had: (user, item, position) of the log."""
    user, item, position = (np.array(column, np.int64) for column in zip(*(had or [(0, 0, 10**6)]), strict=True))
    group = np.arange(len(weight)) if group is None else np.array(group)
    return candidates.pool(user, item, position, group, np.array(weight, float))


def draw(pool, rows, target=0, size=6, history=-1, seed=0, split="test", user=None):
    user_E = np.arange(rows) if user is None else np.full(rows, user)
    columns = user_E, np.arange(rows), np.full((rows, 1), history), np.broadcast_to(target, rows)
    return candidates.draw(pool, *columns, size=size, seed=seed, split=split)


def test_changing_the_target_changes_only_what_it_excludes():
    """Lists of two targets share the slot and all negatives but the ones that either target displaces."""
    pool = make_pool(np.ones(50))
    one, two = draw(pool, 300, target=3), draw(pool, 300, target=4)
    np.testing.assert_array_equal((one == 3).argmax(1)[(one != 4).all(1)], (two == 4).argmax(1)[(one != 4).all(1)])
    same = 0
    for a, b in zip(one, two, strict=True):
        a, b = set(a) - {3}, set(b) - {4}
        assert len(a ^ b) <= 2 and (a ^ b == set() or (a ^ b) & {3, 4})
        same += a == b
    assert same > 200


def test_lists_differ_between_rows_splits_and_seeds_but_not_with_the_company():
    pool = make_pool(np.ones(1000))
    base = draw(pool, 200)
    assert len({tuple(sorted(row)) for row in base}) == 200
    assert (draw(pool, 200, split="train") != base).mean() > 0.7 and (draw(pool, 200, seed=1) != base).mean() > 0.7
    some = np.array([150, 3, 77])
    alone = candidates.draw(pool, some, some, np.full((3, 1), -1), np.zeros(3, np.int64), size=6, seed=0, split="test")
    np.testing.assert_array_equal(np.sort(alone), np.sort(base[some]))


@pytest.mark.parametrize("rows", [1, 95, 122, 2400])
def test_every_slot_holds_the_target_equally_often(rows):
    """In any order of the rows, and whatever the targets are."""
    user = np.random.default_rng(rows).permutation(rows)
    slot_E = candidates.slots(user, user, 20, 0, "test")
    count_C = np.bincount(slot_E, minlength=20)
    assert count_C.max() - count_C.min() <= 1
    np.testing.assert_array_equal(slot_E[np.argsort(user)], candidates.slots(*2 * [np.arange(rows)], 20, 0, "test"))
    assert rows < 95 or abs(np.corrcoef(user, slot_E)[0, 1]) < 3 / rows**0.5


def test_negatives_are_uniform_over_items_and_slots():
    lists = draw(make_pool(np.ones(21)), 20000)
    count_I = np.bincount(lists[lists != 0], minlength=21)[1:]
    assert np.abs(count_I / 20000 - 5 / 20).max() < 4 * np.sqrt(0.25 * 0.75 / 20000)
    slot_C = np.bincount((lists == 7).argmax(1)[(lists == 7).any(1)], minlength=6) / 20000
    assert np.abs(slot_C - 1 / 24).max() < 4 * np.sqrt(1 / 24 * 23 / 24 / 20000)


@pytest.mark.parametrize("items", [40, 3000])
def test_lists_are_the_first_draws_that_may_be_listed(items, monkeypatch):
    """With equal titles, a past and a history; of few items most rows draw one twice, of many hardly any."""
    monkeypatch.setattr(candidates, "BLOCK", 100)  # several blocks
    rng = np.random.default_rng(items)
    group_I = np.minimum(np.arange(items), items - 5)
    user, item, position = rng.integers(0, 9, 100), rng.integers(0, items, 100), rng.integers(0, 30, 100)
    pool = candidates.pool(user, item, position, group_I, np.ones(items))
    user_E, position_E, target_E = rng.integers(0, 9, 120), np.arange(120) % 30, rng.integers(0, items, 120)
    history_ExN = rng.integers(-1, items, (120, 3))
    columns = user_E, position_E, history_ExN, target_E
    lists = candidates.draw(pool, *columns, size=8, seed=5, split="test")
    key = seeds.key(5, "candidates", "test")
    for listed, u, p, history, target in zip(lists, *columns, strict=True):
        banned = {group_I[target], *group_I[history[history >= 0]], *group_I[item[(user == u) & (position < p)]]}
        wanted = {}
        for uniform in seeds.uniform(key, u, p, np.arange(400)):
            if (group := group_I[int(uniform * items)]) not in banned:
                wanted.setdefault(group, int(uniform * items))
        assert listed[listed != target].tolist() == list(wanted.values())[:7]


def inclusion(weight, k):
    """P(item among the first k of successive sampling without replacement), by enumeration."""
    total, p_I = sum(weight), np.zeros(len(weight))
    for order in itertools.permutations(range(len(weight)), k):
        p, left = 1.0, total
        for item in order:
            p, left = p * weight[item] / left, left - weight[item]
        p_I[list(order)] += p
    return p_I


@pytest.mark.parametrize("weight", [[8, 4, 2, 1, 1], [5000, 5000, 1, 2, 3]])
def test_popularity_is_successive_sampling_also_when_draws_run_out(weight):
    """With the second weights hardly any row finds three items in few draws, so that the race must complete it."""
    rows = 20000
    lists = draw(make_pool([*weight, 0, 0]), rows, target=5, size=4)
    found_I = np.bincount(lists[lists != 5], minlength=7) / rows
    wanted_I = inclusion(weight, 3)
    np.testing.assert_array_less(np.abs(found_I[:5] - wanted_I), 4.5 * np.sqrt(wanted_I * (1 - wanted_I) / rows) + 1e-9)
    assert found_I[6] == 0


def test_titles_of_target_history_and_past_are_left_out_whatever_their_id():
    group = [0, 0, 2, 2, 4, 4, 6, 7, 8, 9, 10]
    pool = make_pool(np.ones(11), group, had=[(7, 4, 5), (7, 6, 60)])
    lists = draw(pool, 100, target=0, history=3, size=4, user=7)  # positions 0..99
    for position, row in enumerate(lists):
        others = set(row) - {0}
        assert len(others) == 3 and not others & {1, 2, 3}
        assert position <= 5 or not others & {4, 5}  # item 5 has the title of item 4, had at position 5
        assert not {4, 5} <= others
        assert position <= 60 or 6 not in others
    assert any(6 in row for row in lists[:61])


def test_an_exhausted_pool_is_refused():
    assert sorted(draw(make_pool(np.ones(6)), 1)[0]) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="6 do not fit, a row of split test has only 4 other titles"):
        draw(make_pool([1, 1, 1, 1, 1, 0]), 3)
    with pytest.raises(UserError, match="popularity needs train interactions"):
        draw(make_pool(np.zeros(6)), 1)
