"""Rows on disk: a TFDS data set of array_record files, written and read without TensorFlow.

Any TFDS user can open the folder with `tfds.builder_from_directory`. Records are made and read here, many at a time:
all of a data set have the same bytes but for their numbers, which stand at fixed places, so that a block of records is
an array. TFDS does it one by one, in 50 µs to write a row of a large split and 80 µs to fetch it; here 1 µs and 16 µs.
"""

import collections
import functools
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from rosepo_jax import files, forms
from rosepo_jax.data.rows import SPLITS, Rows
from rosepo_jax.errors import UserError

Progress = Callable[[Iterable[int], str], Iterable[int]]
FIELDS = {
    "user": "user_E",
    "position": "position_E",
    "history": "history_ExN",
    "target": "target_E",
    "candidates": "candidates_ExC",
}
NAME, VERSION = "rosepo_rows", "1.0.0"
MOST = 1 << 16  # items of a history or list of candidates
INFO = {"splits": [{"name": str, "shardLengths?": [str]}]}  # of dataset_info.json
_SHAPE = {"tensor": {"shape": {"dimensions": [str]}}}
FEATURES = {"featuresDict": {"features": {"history": _SHAPE, "candidates": _SHAPE}}}
BLOCK = 1 << 12  # records made or read at a time: they stay in the cache
SHARD = 1 << 28  # bytes of the records of a file, at most
# Records that are groups of their own are what Grain asks for (it logs an error about others, and reads them). In a
# split of many rows groups of 64 take a tenth of the time to write and half the space, and readers of lists of records,
# such as TFDS, go through the places of all groups of a file at every call.
LARGE = 1 << 17  # rows
READER = "readahead_buffer_size:0"


class _Layout:
    """The bytes of a record: a serialised tf.train.Example, its fields in sorted order, int32 tensors as raw bytes."""

    def __init__(self, n_history: int, n_candidates: int):
        self.shapes = {name: {"history": (n_history,), "candidates": (n_candidates,)}.get(name, ()) for name in FIELDS}
        self._blank = self._record()
        places = {name: int(np.argmax(self._record(name) != self._blank)) for name in FIELDS}
        self._dtype = np.dtype(
            {
                "names": list(FIELDS),
                "formats": [("<i4", self.shapes[name]) for name in FIELDS],
                "offsets": list(places.values()),
                "itemsize": self.size,
            }
        )

    @property
    def size(self) -> int:
        return len(self._blank)

    @property
    def features(self) -> tfds.features.FeaturesDict:
        bytes_ = tfds.features.Encoding.BYTES
        return tfds.features.FeaturesDict(
            {
                name: tfds.features.Tensor(shape=shape, dtype=np.int32, encoding=bytes_)
                for name, shape in self.shapes.items()
            }
        )

    def encode(self, rows: Rows) -> list[bytes]:
        block = np.empty(len(rows), self._dtype)
        block.view(np.uint8).reshape(-1, self.size)[:] = self._blank
        for name, field in FIELDS.items():
            block[name] = getattr(rows, field)
        return block.view(f"V{self.size}").tolist()

    def decode(self, records: Sequence[bytes]) -> Rows:
        block = np.frombuffer(b"".join(records), self._dtype)
        return Rows(**{field: block[name].astype(np.int32) for name, field in FIELDS.items()})

    def _record(self, marked: str = "") -> np.ndarray:
        """The record of zeros, but for ones in every bit of the field `marked`."""
        example = tf_example_pb2.Example()
        for name, shape in self.shapes.items():
            numbers = np.full(shape, -1 if name == marked else 0, np.int32)
            example.features.feature[name].bytes_list.value.append(numbers.tobytes())
        return np.frombuffer(example.SerializeToString(deterministic=True), np.uint8)


def write(
    directory: str | os.PathLike,
    rows: dict[str, Rows],
    n_history: int,
    n_candidates: int,
    progress: Progress = lambda work, name: work,
) -> None:
    """Writes the splits into `directory`, replacing it whole once all is written. Splits without rows are left out.

    progress: passes on the items of its first argument and shows how far they are, under the name in its second.
    """
    directory, layout = pathlib.Path(directory), _Layout(n_history, n_candidates)
    for split, field in itertools.product(rows, FIELDS):
        found, wanted = getattr(rows[split], FIELDS[field]).shape, (len(rows[split]), *layout.shapes[field])
        if found != wanted:
            raise ValueError(f"{field} of split {split} has shape {found}, not {wanted}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.")
    folder = pathlib.Path(temporary) / NAME  # with the permissions of any folder, which mkdtemp's has not
    try:
        folder.mkdir()
        identity = tfds.core.DatasetIdentity(NAME, tfds.core.Version(VERSION), os.fspath(folder), __name__)
        info = tfds.core.DatasetInfo(builder=identity, features=layout.features, disable_shuffling=True)
        info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
        splits = [
            tfds.core.SplitInfo(name, _write_split(folder, name, split, layout, progress), layout.size * len(split))
            for name, split in rows.items()
            if len(split)
        ]
        info.set_splits(tfds.core.SplitDict(splits))
        info.write_to_directory(folder)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(folder, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_split(folder: pathlib.Path, split: str, rows: Rows, layout: _Layout, progress: Progress) -> list[int]:
    """Writes files of about equal size; returns how many rows each has."""
    files = -(-layout.size * len(rows) // SHARD)
    options = "group_size:1" if len(rows) < LARGE else "group_size:64,snappy"
    ends = [len(rows) * (file + 1) // files for file in range(files)]
    template = tfds.core.ShardedFileTemplate(
        folder, dataset_name=NAME, split=split, filetype_suffix=tfds.core.FileFormat.ARRAY_RECORD.file_suffix
    )
    numbers = iter(progress(range(len(rows)), f"write {split}"))
    for file, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        writer = array_record_module.ArrayRecordWriter(
            os.fspath(template.sharded_filepath(shard_index=file, num_shards=files)), options
        )
        for first in range(start, end, BLOCK):
            records = layout.encode(rows.take(slice(first, min(first + BLOCK, end))))
            collections.deque(map(writer.write, records), maxlen=0)  # the fastest loop there is
            collections.deque(itertools.islice(numbers, len(records)), maxlen=0)
        writer.close()
    next(numbers, None)  # its end
    return np.diff([0, *ends]).tolist()


class Source:
    """The rows of a split on disk: `take` reads some of them, in any order, as `Rows.take` does in memory.

    No file is opened before it is asked for. Of an open one the places of its groups of records are kept in memory.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        n_history: int,
        n_candidates: int,
        users: int | None = None,
        items: int | None = None,
    ):
        """shards: path and number of rows of each file. users, items: how many there are, for rows that name others."""
        self._layout = _Layout(n_history, n_candidates)
        self._shards, self._known = shards, (users, items, items, items)
        self._reader = functools.cache(
            lambda shard: array_record_module.ArrayRecordReader(
                shards[shard][0], options=READER, file_reader_buffer_size=1 << 15
            )
        )
        self._start = np.cumsum([0, *(rows for _, rows in shards)])

    def __len__(self) -> int:
        return int(self._start[-1])

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows of `indices`, in that order."""
        index_E = np.asarray(indices, np.int64)
        if len(index_E) and not 0 <= index_E.min() <= index_E.max() < len(self):
            raise IndexError(f"row {index_E.min()} or {index_E.max()} of a split of {len(self)} rows")
        shard_E = np.searchsorted(self._start, index_E, "right") - 1
        place_E = index_E - self._start[shard_E]
        run = np.flatnonzero((np.diff(place_E, prepend=-2) != 1) | (np.diff(shard_E, prepend=-1) != 0))
        end = np.append(run, len(index_E))[1:]
        # Not reader.read([place, ...]), which goes through the places of all records of the file each time.
        records: list[bytes] = []
        for shard, start, stop in zip(shard_E[run].tolist(), place_E[run].tolist(), (place_E[end - 1] + 1).tolist()):
            records += self._records(shard, start, stop)
        rows = self._layout.decode(records)
        for column, known in zip((rows.user_E, rows.history_ExN, rows.target_E, rows.candidates_ExC), self._known):
            if known is not None and column.size and not -1 <= column.min() <= column.max() < known:
                raise self._damaged("a row names a user or an item that is not in the lists beside it")
        return rows

    def _records(self, shard: int, start: int, stop: int) -> list[bytes]:
        try:
            records = self._reader(shard).read(start, stop)
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(" ".join(str(error).split())) from None
        if any(len(record) != self._layout.size for record in records) or len(records) != stop - start:
            raise self._damaged("records of another length")
        return records

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{pathlib.Path(self._shards[0][0]).parent}: damaged ({what}); run `rosepo prepare` again")

    def read(self) -> Rows:
        """All rows."""
        parts = [self.take(range(i, min(i + BLOCK, len(self)))) for i in range(0, max(len(self), 1), BLOCK)]
        return Rows(**{field: np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS.values()})


def source(directory: str | os.PathLike, split: str, *, users: int | None = None, items: int | None = None) -> Source:
    """The rows of a split of the data set in `directory`; none when nothing was written for that split.

    TFDS is not asked what the folder holds: it would import whatever module features.json names.
    Errors: UserError for an unknown split, and when the folder holds no such data set, or a damaged one; when rows are
    taken, also for numbers of users and items beyond how many there are.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    directory = pathlib.Path(directory)
    if not (directory / "features.json").is_file():
        raise UserError(f"{directory}: no prepared data set here; run `rosepo prepare` first")
    again = "run `rosepo prepare` again"
    features, info = (
        forms.check(files.read_json(directory / name), form, directory / name, again)
        for name, form in (("features.json", FEATURES), ("dataset_info.json", INFO))
    )
    tensors = features["featuresDict"]["features"]
    sizes = [tensors[name]["tensor"]["shape"]["dimensions"] for name in ("history", "candidates")]
    lengths: list[str] = next((each.get("shardLengths", []) for each in info["splits"] if each["name"] == split), [])
    fits = all(len(size) == 1 and 0 < _number(size[0]) <= MOST for size in sizes)
    if not fits or min(map(_number, lengths), default=1) < 1:
        raise UserError(f"{directory}: shapes or numbers of rows that no data set has; {again}")
    suffix = tfds.core.FileFormat.ARRAY_RECORD.file_suffix
    paths = [f"{NAME}-{split}.{suffix}-{shard:05}-of-{len(lengths):05}" for shard in range(len(lengths))]
    if missing := [path for path in paths if not (directory / path).is_file()]:
        raise UserError(f"{directory / missing[0]}: no such file; {again}")
    shards = [(os.fspath(directory / path), _number(length)) for path, length in zip(paths, lengths)]
    n_history, n_candidates = (_number(size) for (size,) in sizes)
    return Source(shards, n_history, n_candidates, users, items)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else -1


def read(directory: str | os.PathLike, split: str, *, users: int | None = None, items: int | None = None) -> Rows:
    """All rows of a split, in the order they were written; see `source`."""
    return source(directory, split, users=users, items=items).read()


def train_items(prepared: pathlib.Path, items: int) -> tuple[np.ndarray, np.ndarray]:
    """(indptr, items): the training items of each user, as `prepare` wrote them."""
    path = prepared / "train_items.npz"
    indptr, item = files.read_npz(path, "indptr", "items")
    whole = all(column.ndim == 1 and column.dtype.kind in "iu" for column in (indptr, item))
    if not whole or not len(indptr) or indptr[0] != 0 or indptr[-1] != len(item) or (np.diff(indptr) < 0).any():
        raise UserError(f"{path}: not lists of items; run `rosepo prepare` again")
    if len(item) and not 0 <= item.min() <= item.max() < items:
        raise UserError(f"{path}: names items that are not in the catalogue; run `rosepo prepare` again")
    return indptr, item
