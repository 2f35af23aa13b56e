import dataclasses
import hashlib
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from rosepo_jax.data import store
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError

N, C = 3, 5


def make_rows(n, seed=0):
    rng = np.random.default_rng([seed, n])
    shapes = ((), (), (N,), (), (C,))
    return Rows(*(rng.integers(-1, 2**31 - 1, (n, *shape)).astype(np.int32) for shape in shapes))


def make_splits(seed=0):
    return {"train": make_rows(70, seed), "held_out": make_rows(0), "validation": make_rows(4), "test": make_rows(9)}


def equal(one, two):
    return all(
        getattr(one, field.name).dtype == np.int32
        and np.array_equal(getattr(one, field.name), getattr(two, field.name))
        for field in dataclasses.fields(Rows)
    )


@pytest.fixture
def dataset(tmp_path):
    store.write(tmp_path / "dataset", make_splits(), N, C)
    return tmp_path / "dataset"


def test_read_gives_back_every_split_in_order(dataset):
    for name, rows in make_splits().items():
        found = store.read(dataset, name)
        assert len(found) == len(rows) and equal(found, rows) and equal(rows, found)
        assert found.history_ExN.shape == (len(rows), N) and found.candidates_ExC.shape == (len(rows), C)


def test_source_is_random_access_for_grain(dataset):
    rows, source = make_splits()["train"], store.source(dataset, "train")
    assert len(source) == 70
    some = source.take([5, 0, 69])
    for field in dataclasses.fields(some):
        np.testing.assert_array_equal(getattr(some, field.name), getattr(rows, field.name)[[5, 0, 69]])
    batches = list(grain.MapDataset.range(10).map(lambda b: source.take(range(7 * b, 7 * b + 7)).target_E))
    np.testing.assert_array_equal(np.concatenate(batches), rows.target_E)


def test_a_large_split_has_several_files_of_grouped_records(tmp_path, monkeypatch):
    rows = {"train": make_rows(700), "test": make_rows(9)}
    monkeypatch.setattr(store, "LARGE", 100)
    monkeypatch.setattr(store, "SHARD", 40_000)
    monkeypatch.setattr(store, "BLOCK", 64)
    store.write(tmp_path / "dataset", rows, N, C)
    readers = {path.name: ArrayRecordReader(str(path)) for path in sorted(tmp_path.glob("dataset/*.array_record*"))}
    options = {name: reader.writer_options_string().split(",")[0] for name, reader in readers.items()}
    assert options == {
        "rosepo_rows-test.array_record-00000-of-00001": "group_size:1",
        **{f"rosepo_rows-train.array_record-0000{file}-of-00003": "group_size:64" for file in range(3)},
    }
    assert equal(store.read(tmp_path / "dataset", "train"), rows["train"])
    some = [5, 239, *np.random.default_rng(0).integers(0, 700, 300)]  # 239 is number 6 of the second file
    source = store.source(tmp_path / "dataset", "train")
    assert equal(source.take([*some, 5, 6, 7]), rows["train"].take([*some, 5, 6, 7]))
    assert len(source.take([])) == 0
    for outside in ([-1, 5], [700]):
        with pytest.raises(IndexError, match="of a split of 700 rows"):
            source.take(outside)
    theirs = tfds.builder_from_directory(tmp_path / "dataset").as_data_source(split="train")
    assert len(theirs) == 700
    np.testing.assert_array_equal([theirs[i]["candidates"] for i in some[:20]], rows["train"].candidates_ExC[some[:20]])


def test_rows_that_name_what_is_not_there_are_refused(tmp_path):
    rows = dataclasses.replace(make_rows(9), user_E=np.arange(9, dtype=np.int32))
    rows = dataclasses.replace(
        rows, **{f: np.minimum(getattr(rows, f), 7) for f in ("history_ExN", "target_E", "candidates_ExC")}
    )
    store.write(tmp_path / "dataset", {"test": rows}, N, C)
    assert equal(store.read(tmp_path / "dataset", "test", users=9, items=8), rows)
    for bounds in ({"users": 8}, {"items": 7}):
        with pytest.raises(UserError, match="a user or an item that is not in the lists"):
            store.read(tmp_path / "dataset", "test", **bounds)


def test_shapes_and_files_that_no_data_set_has_are_refused(dataset):
    features, info = dataset / "features.json", dataset / "dataset_info.json"
    for path, old, new, message in (
        (features, '"3"', '"999999999"', "shapes or numbers of rows"),
        (features, '"3"', '"three"', "shapes or numbers of rows"),
        (features, '"3"', '"4"', "records of another length"),
        (info, '"70"', '"71"', "damaged"),
        (info, '"70"', '"-1"', "shapes or numbers of rows"),
        (info, '"70"', '"70", "1"', "train.array_record-00000-of-00002: no such file"),
        (info, '"splits"', '"slits"', "splits is missing"),
    ):
        content = path.read_text()
        path.write_text(content.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            store.read(dataset, "train")
        path.write_text(content)


def test_any_tfds_user_can_read_it(dataset):
    builder = tfds.builder_from_directory(dataset)
    rows, source = make_splits()["test"], builder.as_data_source(split="test")
    assert len(source) == 9 and set(builder.info.splits) == {"train", "validation", "test"}
    np.testing.assert_array_equal([source[i]["history"] for i in range(9)], rows.history_ExN)
    np.testing.assert_array_equal([source[i]["position"] for i in range(9)], rows.position_E)
    assert "tensorflow" not in sys.modules


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_another_process_writes_the_same_bytes(dataset, tmp_path):
    """protobuf orders the fields of a record by a hash that differs from process to process."""
    code = (
        "import sys, numpy as np; from rosepo_jax.data import store; from rosepo_jax.data.rows import SPLITS;"
        "store.write(sys.argv[2], {name: store.read(sys.argv[1], name) for name in SPLITS}, 3, 5);"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, dataset, tmp_path / "again"], capture_output=True, text=True, check=True
    )
    assert digest(dataset) == digest(tmp_path / "again")
    assert done.stdout == "" and "%|" not in done.stderr  # neither messages nor progress bars of TFDS


def test_writing_replaces_the_whole_or_nothing(dataset, tmp_path):
    before = digest(dataset)
    broken = make_splits(1)
    broken["test"] = dataclasses.replace(broken["test"], history_ExN=np.zeros((9, N + 1), np.int32))
    with pytest.raises(ValueError, match="history"):
        store.write(dataset, broken, N, C)
    assert digest(dataset) == before and [path.name for path in tmp_path.iterdir()] == ["dataset"]
    store.write(dataset, make_splits(1), N, C)
    assert equal(store.read(dataset, "train"), make_rows(70, 1)) and [p.name for p in tmp_path.iterdir()] == ["dataset"]


def test_progress_sees_every_row(tmp_path):
    seen = []

    def watch(work, name):
        for number in work:
            seen.append((name, number))
            yield number

    store.write(tmp_path / "dataset", {"test": make_rows(3), "train": make_rows(0)}, N, C, watch)
    assert seen == [("write test", 0), ("write test", 1), ("write test", 2)]


def test_missing_data_and_unknown_splits_are_named(dataset, tmp_path):
    with pytest.raises(UserError, match="run `rosepo prepare` first"):
        store.read(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match="unknown split 'dev'; use one of train, held_out, validation, test"):
        store.source(dataset, "dev")
