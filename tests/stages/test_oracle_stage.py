"""The oracle stage: it learns a log with an order, stops early, is deterministic, calibrates, and refuses bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rosepo_jax import config, files
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import SPLITS, Rows
from rosepo_jax.errors import UserError
from rosepo_jax.models import sasrec
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.stages import oracle

ITEMS, HISTORY, CANDIDATES = 24, 4, 6


def rows(n: int, seed: int) -> Rows:
    """Histories that walk through the catalogue in steps of one; one in four targets is a random item."""
    generator = np.random.default_rng(seed)
    start = generator.integers(ITEMS, size=n)
    history = (start[:, None] + np.arange(HISTORY)) % ITEMS
    target = np.where(generator.uniform(size=n) < 0.25, generator.integers(ITEMS, size=n), (start + HISTORY) % ITEMS)
    candidates = np.argsort(generator.uniform(size=(n, ITEMS)), axis=1)
    candidates = candidates[candidates != target[:, None]].reshape(n, ITEMS - 1)[:, :CANDIDATES].copy()
    candidates[np.arange(n), generator.integers(CANDIDATES, size=n)] = target
    columns = np.arange(n), np.full(n, HISTORY), history, target, candidates
    return Rows(*(column.astype(np.int32) for column in columns))


def catalogue() -> Catalogue:
    names = tuple(f"Item {i}" for i in range(ITEMS))
    return Catalogue(names, names, ((),) * ITEMS, np.ones(ITEMS, np.int64))


def settings(**changes):
    c = config.default()
    c.log.tensorboard = False
    with c.oracle.unlocked():
        c.oracle.update(
            {"width": 16, "batch_size": 64, "learning_rate": 1e-2, "dropout": 0.0, "length": "4 epochs", **changes}
        )
    return c


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    splits = {name: rows(500 if name == "train" else 150, seed) for seed, name in enumerate(SPLITS)}
    store.write(folder / "dataset", splits, HISTORY, CANDIDATES)
    catalogue().save(folder / "catalogue.jsonl")
    files.write_json(folder / "manifest.json", {"identity": "0123"})
    return {"prepare": folder}


@pytest.mark.parametrize("changes", [{}, {"loss": "bce"}, {"positions": "last", "length": "20 epochs"}])
def test_it_learns_and_calibrates(prepared, tmp_path, changes):
    result = oracle.run(settings(**changes), prepared, tmp_path)
    assert result["HR@1"] > 0.6 and result["NDCG@10"] > 0.7  # chance: 1/6; three targets of four can be known
    assert result["ECE_after"] <= result["ECE_before"] + 0.02 and result["n"] == 150
    loaded = Oracle.load(tmp_path)
    assert loaded.tau == result["tau"] > 0 and loaded.config.items == ITEMS
    assert files.read_json(tmp_path / "config.json")["data"] == "0123"
    # The stored weights are those of the best epoch, not of the last.
    validation = store.read(prepared["prepare"] / "dataset", "validation")
    figures = oracle.ranking_figures(loaded, validation, catalogue().title_group_I)
    assert figures == {name: result[name] for name in ("HR@1", "NDCG@10")}
    log = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert max(row["NDCG@10"] for row in log) == result["NDCG@10"]
    assert [row["step"] for row in log] == [8 * row["epoch"] for row in log]


def test_two_runs_are_equal(prepared, tmp_path):
    changed = settings(dropout=0.2, length="5 steps")
    first, second = (oracle.run(changed, prepared, tmp_path / name) for name in "ab")
    assert first == second
    a, b = (sasrec.load(tmp_path / name)[1] for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert files.read_jsonl(tmp_path / "a" / "metrics.jsonl")[-1]["step"] == 5
    changed.seed = 1
    assert oracle.run(changed, prepared, tmp_path / "c")["loss"] != first["loss"]


def test_it_stops_after_patience(prepared, tmp_path):
    result = oracle.run(settings(length="40 epochs", patience=2), prepared, tmp_path)
    log = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert len(log) == result["epoch"] + 2 < 40


def test_batch_order_is_a_permutation_of_seed_and_epoch():
    order = oracle.batch_order(0, 3, 10, 4)
    assert order.shape == (3, 4)
    np.testing.assert_array_equal(np.sort(order.ravel()), [-1, -1, *range(10)])
    np.testing.assert_array_equal(order, oracle.batch_order(0, 3, 10, 4))
    assert np.any(order != oracle.batch_order(0, 4, 10, 4)) and np.any(order != oracle.batch_order(1, 3, 10, 4))


@pytest.mark.parametrize("positions", ["all", "last"])
def test_fill_of_the_last_batch_is_inert(positions):
    architecture = sasrec.SASRecConfig(ITEMS, HISTORY, 8, 1, 1, 0.0)
    data = rows(5, 0)
    history, target = jnp.asarray(data.history_ExN), jnp.asarray(data.target_E)
    transformation = optax.sgd(0.1)
    scan = oracle.epoch_function(architecture, transformation, "ce", positions)

    def after(order):
        params = sasrec.init(architecture, jax.random.key(0))
        (params, _), loss = scan((params, transformation.init(params)), history, target, order, jax.random.key(1))
        return params, loss

    (a, loss_a), (b, loss_b) = after(jnp.arange(5)[None]), after(jnp.array([[0, 1, 2, 3, 4, -1, -1, -1]]))
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), a, b)


def test_calibration_error_by_hand():
    gap = np.log(np.array([4.0, 4, 4, 4, 9, 9]))  # confidence .8 four times, .9 twice
    chosen = gap * np.array([1, 1, 1, -1, 1, -1])  # accuracy .75 and .5
    expected = (4 * abs(0.75 - 0.8) + 2 * abs(0.5 - 0.9)) / 6
    np.testing.assert_allclose(oracle.calibration_error(chosen, np.zeros(6), 1.0), expected, rtol=1e-12)
    assert oracle.calibration_error(np.zeros(5), np.zeros(5), 1.0) == 0  # ties: half right at confidence 1/2


def test_pair_gaps_hold_every_candidate_but_the_target():
    data = rows(3, 1)
    scorer = Oracle(sasrec.SASRecConfig(ITEMS, HISTORY, 8, 1, 1, 0.0), None, 1.0)
    scorer = dataclasses.replace(scorer, params=sasrec.init(scorer.config, jax.random.key(0)))
    chosen, rejected = oracle.pair_gaps(scorer, data)
    every = np.asarray(sasrec.scores(scorer.config, scorer.params, jnp.asarray(data.history_ExN)))
    others = [[item for item in row if item != target] for row, target in zip(data.candidates_ExC, data.target_E)]
    np.testing.assert_allclose(chosen, np.repeat(every[np.arange(3), data.target_E], CANDIDATES - 1), rtol=1e-5)
    np.testing.assert_allclose(rejected, np.take_along_axis(every, np.array(others), 1).ravel(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "cee"}, "did you mean ce"),
        ({"positions": "first"}, "oracle.positions"),
        ({"heads": 3}, "oracle.heads"),
        ({"learning_rate": 1e30}, "not finite"),
        ({"length": "ten"}, "oracle.length"),
    ],
)
def test_refusals(prepared, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        oracle.run(settings(**changes), prepared, tmp_path)


def test_empty_splits_are_refused(tmp_path):
    catalogue().save(tmp_path / "catalogue.jsonl")
    store.write(tmp_path / "dataset", {"train": rows(5, 0)}, HISTORY, CANDIDATES)
    with pytest.raises(UserError, match="validation split has no rows"):
        oracle.run(settings(), {"prepare": tmp_path}, tmp_path / "oracle")
