"""Pairs at rest: Parquet, TRL's JSON lines, import of others' rows."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rosepo_jax.data import pairs
from rosepo_jax.data.pairs import Pairs
from rosepo_jax.errors import UserError

E, K, N = 5, 3, 4


@pytest.fixture
def mined():
    rng = np.random.default_rng(0)
    return Pairs(
        prompt=[f'history "{e}"\nü, ::|' for e in range(E)],
        chosen=[f"chosen {e}" for e in range(E)],
        rejected=[[f"rejected {e} {k}" for k in range(K)] for e in range(E)],
        user_E=np.arange(E) + 10,
        position_E=np.arange(E) + 20,
        history_ExN=rng.integers(-1, 50, (E, N)).astype(np.int32),
        item_ExR=rng.integers(0, 50, (E, K + 1)).astype(np.int32),
        oracle_score_ExR=rng.normal(size=(E, K + 1)).astype(np.float32),
        epsilon_ExK=rng.uniform(0, 0.5, (E, K)).astype(np.float32),
        strategy=[["self_hard", "semantic", "uniform"]] * E,
        flipped_E=np.array([True, False, False, True, False]),
    )


def test_parquet_round_trip_is_bitwise(mined, tmp_path):
    pairs.write(tmp_path / "pairs.parquet", mined)
    again = pairs.read(tmp_path / "pairs.parquet")
    for field in dataclasses.fields(Pairs):
        before, after = getattr(mined, field.name), getattr(again, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        else:
            assert before == after
    assert again.has_items and again.has_epsilon and len(again) == E


def test_trl_rows_can_be_imported(mined, tmp_path):
    """One row per rejected response; DPOTrainer needs the texts `prompt`, `chosen` and `rejected`."""
    pairs.write_trl(tmp_path / "trl.jsonl", mined)
    rows = [json.loads(line) for line in (tmp_path / "trl.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == E * K
    assert all(isinstance(row[name], str) for row in rows for name in ("prompt", "chosen", "rejected"))
    assert [(row["chosen_item"], row["rejected_item"]) for row in rows[:K]] == [
        (mined.item_ExR[0, 0], mined.item_ExR[0, k + 1]) for k in range(K)
    ]
    again = pairs.import_rows(tmp_path / "trl.jsonl")
    assert again.prompt == [prompt for prompt in mined.prompt for _ in range(K)]
    assert again.chosen == [chosen for chosen in mined.chosen for _ in range(K)]
    assert again.rejected == [[text] for row in mined.rejected for text in row]
    np.testing.assert_array_equal(again.epsilon_ExK, mined.epsilon_ExK.reshape(-1, 1))
    assert again.has_epsilon and not again.has_items


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_several_rejected_and_no_epsilon(tmp_path, suffix):
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": ["a", "b"]},
        {"prompt": "q", "chosen": "d", "rejected": ["e", "f"]},
    ]
    found = pairs.import_rows(write(tmp_path / f"rows.{suffix}", rows))
    assert found.rejected == [["a", "b"], ["e", "f"]]
    assert found.epsilon_ExK.shape == (2, 2) and not found.has_epsilon
    assert found.item_ExR.shape == (2, 3) and found.strategy == [["imported"] * 2] * 2
    pairs.write(tmp_path / "again.parquet", found)
    assert pairs.read(tmp_path / "again.parquet").rejected == found.rejected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations(tmp_path, suffix):
    def turn(role, text):
        return {"role": role, "content": text}

    row = {
        "prompt": [turn("system", "recommend"), turn("user", "Argo")],
        "chosen": [turn("assistant", "Skyfall")],
        "rejected": [turn("assistant", "Lincoln")],
    }
    found = pairs.import_rows(write(tmp_path / f"rows.{suffix}", [row]))
    assert (found.prompt, found.chosen, found.rejected) == (["recommend\nArgo"], ["Skyfall"], [["Lincoln"]])


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([GOOD, {"prompt": "p", "chosen": "c"}], "row 2 lacks rejected"),
        ([GOOD, GOOD | {"chosen": ""}], "row 2 lacks chosen"),
        ([GOOD, GOOD | {"rejected": ["a", "b"]}], "row 2 has 2 rejected, row 1 has 1"),
        ([GOOD, GOOD | {"epsilon": [0.1, 0.2]}], "row 2 has 2 epsilon"),
        ([GOOD, GOOD | {"epsilon": "high"}], "row 2"),
        ([GOOD, GOOD | {"epsilon": 1.5}], "row 2"),
        ([GOOD, GOOD | {"prompt": 7}], "row 2"),
        ([GOOD, GOOD | {"rejected": ["a", 3]}], "row 2"),
        ([GOOD, GOOD | {"rejected": [""]}], "row 2"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        pairs.import_rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_pairs_without_epsilon_are_written_too(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    pairs.write_trl(tmp_path / "trl.jsonl", pairs.import_rows(path))
    assert json.loads((tmp_path / "trl.jsonl").read_text())["epsilon"] is None
    assert np.isnan(pairs.import_rows(tmp_path / "trl.jsonl").epsilon_ExK).all()


def test_no_such_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        pairs.import_rows(tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p"\n')
    with pytest.raises(UserError, match="row 1 is not valid JSON"):
        pairs.import_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"rows\.parquet"):
        pairs.import_rows(tmp_path / "rows.parquet")
