import numpy as np
import pytest

from rosepo_jax.data import candidates, leak
from rosepo_jax.data.rows import Rows

ITEMS, SIZE = 200, 20


def rows(n, split, lists):
    """Rows with random targets and the lists that `lists(row numbers, targets, split)` makes."""
    number, target = np.arange(n), np.random.default_rng([n, len(split)]).integers(0, ITEMS, n)
    return Rows(number, number, np.full((n, 1), -1), target, lists(number, target, split))


def fresh(number, target, split):
    pool = candidates.pool(np.array([0]), np.array([0]), np.array([10**6]), np.arange(ITEMS), np.ones(ITEMS))
    return candidates.draw(pool, number, number, np.full((len(number), 1), -1), target, size=SIZE, seed=0, split=split)


def seeded_by_target(number, target, split):
    """As S-DPO does it: the generator of a list is seeded with its target."""
    return np.array([_seeded(t) for t in target])


def _seeded(target):
    rng = np.random.default_rng(target)
    others = rng.choice(np.delete(np.arange(ITEMS), target), SIZE - 1, replace=False)
    return rng.permutation([target, *others])


def slot_by_target(number, target, split):
    """Fresh negatives, but the place in the list follows from the target."""
    lists = fresh(number, target, split)
    for row, item in zip(lists, target, strict=True):
        at, slot = int(np.flatnonzero(row == item)[0]), item % SIZE
        row[at], row[slot] = row[slot], row[at]
    return lists


def probe(lists):
    return leak.check(
        {name: rows(n, name, lists) for name, n in (("train", 3000), ("validation", 2000), ("test", 1500))}
    )


def test_our_lists_pass():
    found = probe(fresh)
    assert not found["flagged"]
    for name in ("train", "validation"):
        for kind in ("negatives", "slot"):
            assert found[name][kind]["chance"] == pytest.approx(1 / SIZE, abs=1e-3)
            assert found[name][kind]["HR@1"] < found[name][kind]["bound"] < 0.07


def test_lists_seeded_by_their_target_fail():
    found = probe(seeded_by_target)
    assert found["flagged"] and found["train"]["negatives"]["HR@1"] == 1.0 and found["train"]["slot"]["HR@1"] > 0.5


def test_a_slot_that_follows_the_target_fails_though_the_negatives_are_fresh():
    found = probe(slot_by_target)
    assert found["flagged"] and found["train"]["slot"]["flagged"] and not found["train"]["negatives"]["flagged"]


def test_overlaps_are_those_of_sets(monkeypatch):
    monkeypatch.setattr(leak, "BLOCK", 10 * SIZE)  # several blocks
    memory, test = rows(150, "train", seeded_by_target), rows(60, "test", fresh)
    seen = {}
    for target, listed in zip(memory.target_E[::-1], memory.candidates_ExC[::-1]):
        seen[target] = set(listed)
    hits, same, known = [], [], []
    for target, listed in zip(test.target_E, test.candidates_ExC):
        if target in seen:
            score = {item: len(seen[item] & set(listed) - {item}) for item in listed if item in seen}
            best = [item for item in score if score[item] == max(score.values())]
            hits.append((target in best) / len(best))
            same.append(len(seen[target] & set(listed) - {target}))
            known.append(1 / len(score))
    found = leak.memoriser(memory, test)
    assert found["HR@1"] == pytest.approx(np.mean(hits)) and found["chance"] == pytest.approx(np.mean(known))
    assert found["n"] == len(hits) > 20 and leak.overlap(memory, test)["same"] == pytest.approx(np.mean(same))


def test_items_without_a_remembered_list_do_not_compete():
    """One row: of its candidates only the target and one other item have been targets, so chance is a half."""
    memory = Rows(*(np.zeros(2),) * 2, np.zeros((2, 1)), np.array([0, 1]), np.array([[0, 5, 6], [7, 1, 8]]))
    test = Rows(*(np.zeros(1),) * 2, np.zeros((1, 1)), np.array([0]), np.array([[0, 1, 9]]))
    found = leak.memoriser(memory, test)
    assert (found["HR@1"], found["chance"], found["n"]) == (0.5, 0.5, 1)
    assert leak.slot_memoriser(memory, test)["HR@1"] == 0.5  # both stand in their slots


def test_targets_never_seen_before_leave_nothing_to_test():
    memory = Rows(*(np.zeros(1),) * 2, np.zeros((1, 1)), np.array([3]), np.array([[3, 5, 6]]))
    test = Rows(*(np.zeros(1),) * 2, np.zeros((1, 1)), np.array([0]), np.array([[0, 1, 9]]))
    assert leak.memoriser(memory, test) == {"HR@1": 0.0, "chance": 0.0, "bound": 0.0, "n": 0, "flagged": False}
