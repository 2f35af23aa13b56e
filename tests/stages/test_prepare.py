import hashlib
import json
import time

import numpy as np
import pytest

from rosepo_jax import config as defaults
from rosepo_jax.configuration import flatten
from rosepo_jax.data import store, world
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import baselines
from rosepo_jax.stages import prepare, runtime


def small_config():
    c = defaults.default()
    c.data.world.update({"users": 60, "titles": 80, "series": 16, "length": 10})
    c.data.core_item = 2
    return c


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepare")
    return workdir, runtime.execute(prepare, small_config(), workdir)


def test_artefacts(done):
    _, out = done
    names = {"dataset", "catalogue.jsonl", "users.json", "train_items.npz", "statistics.json", "truth.npz"}
    assert {path.name for path in out.iterdir()} == names | {"manifest.json"}
    statistics = json.loads((out / "statistics.json").read_text())
    catalogue, users = Catalogue.load(out / "catalogue.jsonl"), json.loads((out / "users.json").read_text())
    assert statistics["users"] == len(users) and statistics["items"] == len(catalogue)
    for split, n in statistics["rows"].items():
        rows = store.read(out / "dataset", split)
        assert len(rows) == n and rows.candidates_ExC.shape == (n, 20) and rows.history_ExN.shape == (n, 10)
        assert rows.user_E.max(initial=0) < len(users) and rows.candidates_ExC.max(initial=0) < len(catalogue)
    train = np.load(out / "train_items.npz", allow_pickle=False)
    assert len(train["indptr"]) == len(users) + 1 and train["indptr"][-1] == len(train["items"])
    np.testing.assert_array_equal(np.bincount(train["items"], minlength=len(catalogue)), catalogue.count_I)
    assert json.loads((out / "manifest.json").read_text())["result"]["rows"] == statistics["rows"]


def test_truth_is_renumbered_with_users_and_items(done):
    _, out = done
    config = small_config()
    original = world.generate(config.data.world, config.seed)
    catalogue, users = Catalogue.load(out / "catalogue.jsonl"), json.loads((out / "users.json").read_text())
    truth = np.load(out / "truth.npz", allow_pickle=False)
    user_U = [original.log.users.index(user) for user in users]
    item_I = [original.log.catalogue.ids.index(id) for id in catalogue.ids]
    assert user_U != sorted(user_U) or len(item_I) < 80  # the numbers did change
    np.testing.assert_array_equal(truth["utility_UxI"], original.utility_UxI[np.ix_(user_U, item_I)])
    np.testing.assert_array_equal(truth["flipped_UxI"], original.flipped_UxI[np.ix_(user_U, item_I)])


def test_the_same_settings_give_the_same_bytes(done, tmp_path):
    _, out = done
    again = runtime.execute(prepare, small_config(), tmp_path)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) >= 9
    for name in files:
        one, two = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (out, again))
        assert one == two, name


def test_up_to_date_unless_a_setting_of_the_rows_changes(done, capsys):
    workdir, _ = done
    config = small_config()
    config.data.template, config.align.beta = "other", 0.5
    runtime.execute(prepare, config, workdir)
    assert "up to date" in capsys.readouterr().out
    config.data.history = 7
    with pytest.raises(UserError, match=r"data\.history"):
        runtime.execute(prepare, config, workdir)


def test_keys_are_config_keys():
    keys = flatten(defaults.default())
    for name in prepare.KEYS:
        assert any(key == name or key.startswith(f"{name}.") for key in keys)
    assert {"data.seed", "data.path", "data.world", "data.candidates"} <= set(prepare.KEYS)


def test_the_table_says_what_was_kept_dropped_and_leaked(done, tmp_path, capsys):
    _, out = done
    statistics = json.loads((out / "statistics.json").read_text())
    text = prepare.table(statistics)
    for part in (f"{statistics['interactions']:,}", "leave_one_out", "Gini", "short history", "by (timestamp, row"):
        assert part in text
    assert "Only 60 test rows: one hit is 0.0167" in text
    statistics["repairs"] = {"titles mended": 3}
    assert "repaired 3" in prepare.table(statistics)


def test_a_refusal_leaves_nothing_behind(tmp_path):
    config = small_config()
    config.data.candidates = 500
    with pytest.raises(UserError, match="do not fit"):
        runtime.execute(prepare, config, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_data
def test_movietweetings(real_data, tmp_path):
    """The figures of the core with users >= 10 and items >= 5, and the floors on 1 + 19 fresh uniform candidates."""
    config = defaults.default()
    config.data.update({"source": "movielens", "path": str(real_data / "movietweetings-100k"), "core_user": 10})
    started = time.process_time()
    out = runtime.execute(prepare, config, tmp_path)
    assert time.process_time() - started < 15
    statistics = json.loads((out / "statistics.json").read_text())
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (2290, 2146, 53556)
    assert statistics["rows"] == {"train": 42106, "held_out": 0, "validation": 2290, "test": 2290}
    assert statistics["gini"] == pytest.approx(0.612, abs=5e-4) and statistics["duplicate_titles"] == 0
    assert statistics["length"] == {"min": 10, "median": 17.0, "mean": pytest.approx(23.4, abs=0.05), "max": 269}
    assert not statistics["candidate_leak"]["flagged"]

    train, test = (store.read(out / "dataset", split) for split in ("train", "test"))
    catalogue = Catalogue.load(out / "catalogue.jsonl")
    slot_E = (test.candidates_ExC == test.target_E[:, None]).argmax(1)
    popularity = catalogue.count_I[test.candidates_ExC].argmax(1) == slot_E
    count_IxI = baselines.cooccurrence_counts(train.history_ExN, train.target_E, len(catalogue))
    cooccurrence = baselines.cooccurrence_scores(count_IxI, test.history_ExN, test.candidates_ExC).argmax(1) == slot_E
    assert popularity.mean() == pytest.approx(0.380, abs=0.03)
    assert cooccurrence.mean() == pytest.approx(0.434, abs=0.04)
