"""Models with known habits: the probes find out which of them read the history, and which of them read the place."""

import types

import numpy as np
import pytest

from rosepo_jax import config as defaults
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation import probes
from rosepo_jax.evaluation.protocols import Setting

USERS, ITEMS, SIZE = 400, 100, 8


@pytest.fixture
def setting():
    """Two rows a user. The target is the item after the last of the history, and no more popular than the others."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), 2)
    last = rng.integers(0, ITEMS, 2 * USERS)
    target = (last + 1) % ITEMS
    lists = np.stack(
        [rng.choice(np.delete(np.arange(ITEMS), [t, h]), SIZE, replace=False) for t, h in zip(target, last)]
    )
    lists[np.arange(2 * USERS), rng.integers(0, SIZE, 2 * USERS)] = target
    rows = Rows(user, np.tile([5, 6], USERS), last[:, None], target, lists)
    c = defaults.default()
    c.evaluate.probe_rows, c.evaluate.bootstrap = 300, 50
    names = tuple(f"item {i}" for i in range(ITEMS))
    return Setting(c, Catalogue(names, names, ((),) * ITEMS, rng.integers(1, 50, ITEMS)), rows)


def reader(setting, model, rows):
    return (rows.candidates_ExC == (rows.history_ExN[:, :1] + 1) % ITEMS).astype(float)


def first_slot(setting, model, rows):
    return np.tile(np.arange(SIZE, 0, -1.0), (len(rows), 1))


def blind(setting, model, rows):
    """Knows the target whatever the history is."""
    return (rows.candidates_ExC == rows.target_E[:, None]).astype(float)


def model(lists: bool):
    return types.SimpleNamespace(encoder=types.SimpleNamespace(template=types.SimpleNamespace(uses_candidates=lists)))


def test_a_reader_falls_to_the_floor_with_foreign_histories_and_a_blind_one_does_not(setting, monkeypatch):
    monkeypatch.setattr(probes, "candidate_scores", reader)
    found = probes.run(setting, {"aligned": model(lists=False)})["aligned"]["foreign_history"]
    assert found["n"] == 300 and found["HR@1_own"]["value"] == 1.0
    assert found["HR@1"]["value"] < 0.25 and found["popularity"]["value"] < 0.25
    monkeypatch.setattr(probes, "candidate_scores", blind)
    assert probes.run(setting, {"aligned": model(False)})["aligned"]["foreign_history"]["HR@1"]["value"] == 1.0


def test_order_is_probed_where_the_prompt_lists_candidates(setting, monkeypatch):
    monkeypatch.setattr(probes, "candidate_scores", reader)
    assert "order" not in probes.run(setting, {"a": model(lists=False)})["a"]
    found = probes.run(setting, {"a": model(lists=True)})["a"]["order"]
    assert found["HR@1"] == [1.0] * probes.TURNS and found["changed"]["value"] == 0.0
    monkeypatch.setattr(probes, "candidate_scores", first_slot)
    found = probes.run(setting, {"a": model(lists=True)})["a"]["order"]
    assert found["changed"]["value"] == 1.0 and found["slot_share"] == [1.0] + [0.0] * (SIZE - 1)
    assert np.mean(found["HR@1"]) < 0.25


def test_one_row_a_user_whatever_their_order(setting):
    rows = setting.rows
    some = probes.one_a_user(rows, 300, 0)
    assert len(some) == len(set(some.user_E)) == 300
    shuffled = rows.take(np.random.default_rng(1).permutation(len(rows)))
    np.testing.assert_array_equal(probes.one_a_user(shuffled, 300, 0).target_E, some.target_E)
    assert len(probes.one_a_user(rows, 10**6, 0)) == USERS


def test_none_when_none_are_asked_for(setting):
    setting.config.evaluate.probe_rows = 0
    assert probes.run(setting, {"a": model(False)}) == {}
