"""Rows on disk: a TFDS data set of array_record files, written and read without TensorFlow.

Any TFDS user can open the folder with `tfds.builder_from_directory`. Reading decodes the records here, since the
generic decoder of TFDS takes 60 µs a row and this one a fifth of it.
"""

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer as tfds_writer
from tensorflow_datasets.proto import tf_example_pb2

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


class RosepoRows(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder: one example a row, int32 tensors as raw bytes, in the order of the rows."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, rows: dict[str, Rows], n_history: int, n_candidates: int, progress: Progress, data_dir: str):
        self._rows, self._n_history, self._n_candidates, self._progress = rows, n_history, n_candidates, progress
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        def tensor(*shape: int) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=shape, dtype=np.int32, encoding=tfds.features.Encoding.BYTES)

        shapes = {"history": (self._n_history,), "candidates": (self._n_candidates,)}
        features = tfds.features.FeaturesDict({name: tensor(*shapes.get(name, ())) for name in FIELDS})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {name: self._generate_examples(name, rows) for name, rows in self._rows.items() if len(rows)}

    def _generate_examples(self, name: str, rows: Rows) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        columns = [getattr(rows, field) for field in FIELDS.values()]
        for number in self._progress(range(len(rows)), f"write {name}"):
            yield number, {name: column[number] for name, column in zip(FIELDS, columns, strict=True)}

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return _SameBytes(self.info.file_format)


class _SameBytes(tfds_writer.ExampleWriter):
    """Writes the fields of a record in sorted order; protobuf's own order differs from process to process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        def sort(record: bytes) -> bytes:
            return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)

        return super().write(path, ((key, sort(record)) for key, record in examples))


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
    directory = pathlib.Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.")
    try:
        with _quiet():
            builder = RosepoRows(rows, n_history, n_candidates, progress, temporary)
            builder.download_and_prepare()
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(builder.data_dir, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Source:
    """The rows of a split on disk: `take` reads some of them, in any order, as `Rows.take` does in memory."""

    def __init__(self, records: Any, n_history: int, n_candidates: int):
        self._records = records
        self._shapes = {"history": (n_history,), "candidates": (n_candidates,)}

    def __len__(self) -> int:
        return len(self._records)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows of `indices`, in that order."""
        records = self._records.__getitems__([int(index) for index in indices]) if len(indices) else []
        columns = self._decode(records)
        return Rows(**{field: columns[name] for name, field in FIELDS.items()})

    def read(self) -> Rows:
        """All rows."""
        parts = [self.take(range(i, min(i + (1 << 16), len(self)))) for i in range(0, max(len(self), 1), 1 << 16)]
        return Rows(**{field: np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS.values()})

    def _decode(self, records: Sequence[bytes]) -> dict[str, np.ndarray]:
        features = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
        return {
            name: np.frombuffer(b"".join([row[name].bytes_list.value[0] for row in features]), np.int32).reshape(
                len(records), *self._shapes.get(name, ())
            )
            for name in FIELDS
        }


def source(directory: str | os.PathLike, split: str) -> Source:
    """The rows of a split of the data set in `directory`; none when nothing was written for that split.

    Errors: UserError for an unknown split, and when the folder holds no such data set.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    if not (pathlib.Path(directory) / "features.json").is_file():
        raise UserError(f"{directory}: no prepared data set here; run `rosepo prepare` first")
    builder = tfds.builder_from_directory(directory)
    features = builder.info.features
    shapes = features["history"].shape[0], features["candidates"].shape[0]
    records = builder.as_data_source(split=split).data_source if split in builder.info.splits else []
    return Source(records, *shapes)


def read(directory: str | os.PathLike, split: str) -> Rows:
    """All rows of a split, in the order they were written; see `source`."""
    return source(directory, split).read()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints to stdout and shows progress bars of its own."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
