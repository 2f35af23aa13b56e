"""Reading tables row by row: memory bounded by one row, every error named by file and row (the line number, from 1).
Columns of Parquet tables are also read whole.

A row longer than `files.ROW` bytes is refused after that many bytes, so a file without line ends never fills memory.
"""

import contextlib
import csv
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from rosepo_jax import files
from rosepo_jax.errors import UserError

Record = tuple[int, dict[str, Any]]  # row number, columns


def lines(path: pathlib.Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(row, text without its line end) of every line that is not blank; `.gz` is unpacked."""
    for row, line in _lines(path, encoding):
        if text := line.rstrip("\r\n"):
            yield row, text


def fields(path: pathlib.Path, separator: str, count: int, encoding: str = "utf-8") -> Iterator[tuple[int, list[str]]]:
    """(row, fields) of a table without header; every row must have `count` fields."""
    for row, line in lines(path, encoding):
        values = line.split(separator)
        if len(values) != count:
            raise UserError(f"{path}: row {row} has {len(values)} fields separated by {separator!r}, expected {count}")
        yield row, values


def unquoted(path: pathlib.Path) -> Iterator[Record]:
    """(row, {column: value}) of a tab-separated table with a header in which a quote is an ordinary character."""
    header: list[str] = []
    for row, line in lines(path):
        values = line.split("\t")
        if not header:
            header = values
        elif len(values) != len(header):
            raise UserError(f"{path}: row {row} has {len(values)} fields, the header has {len(header)}")
        else:
            yield row, dict(zip(header, values))


def records(path: pathlib.Path) -> Iterator[Record]:
    """(row, {column: value}) of a .csv, .tsv, .jsonl, .json (one object a line) or .parquet file; text also as .gz."""
    suffix = pathlib.Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in (".jsonl", ".json"):
        return json_lines(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    raise UserError(f"{path}: unknown kind of file; use .csv, .tsv, .jsonl, .json or .parquet")


def parquet_column(path: pathlib.Path, name: str) -> Any:
    """A whole column of a .parquet file as a pyarrow.ChunkedArray; None when it is no Parquet file or has no such one.
    Whatever else is wrong with a file is left to `records`, which names the row.
    """
    if path.suffix != ".parquet":
        return None
    try:
        with parquet(path) as file:
            return file.read([name]).column(name) if file.schema_arrow.names.count(name) == 1 else None
    except UserError:
        return None


def json_lines(path: pathlib.Path) -> Iterator[Record]:
    """(row, object) of a JSON-lines file."""
    for row, line in lines(path):
        value = files.parse_json(line, f"{path}: row {row}", surrogates=True)  # `log.clean` repairs them
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {row} is not a JSON object")
        yield row, value


def field(record: dict[str, Any], name: str, path: pathlib.Path, row: int, hint: str = "") -> Any:
    """A column of a record; UserError lists the columns there are when it is missing."""
    if name not in record:
        there = ", ".join(map(str, list(record)[:12]))
        raise UserError(f"{path}: row {row} has no column {name!r} (it has: {there}){hint and '; ' + hint}")
    return record[name]


def number(value: Any, name: str, path: pathlib.Path, row: int) -> float:
    """A finite number; UserError otherwise."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise UserError(f"{path}: row {row}: {name} {str(value)[:60]!r} is not a finite number")
    return result


def text(value: Any, name: str, path: pathlib.Path, row: int) -> str:
    """An id or title as text: strings stay as they are (leading zeros too), whole numbers become digits."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: row {row}: {name} is not UTF-8") from None
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__index__")):
        raise UserError(f"{path}: row {row}: {name} {str(value)[:60]!r} is neither text nor a whole number")
    return str(value)


def _lines(path: pathlib.Path, encoding: str) -> Iterator[tuple[int, str]]:
    """`files.lines` of a file that is not empty."""
    empty = True
    for row, line in files.lines(path, encoding):
        empty = empty and not line.strip()
        yield row, line
    if empty:
        raise UserError(f"{path}: the file is empty")


def _csv(path: pathlib.Path, separator: str) -> Iterator[Record]:
    csv.field_size_limit(files.ROW)  # an unclosed quote ends here, not at the end of the file
    reader = csv.reader((line for _, line in _lines(path, "utf-8")), delimiter=separator, strict=True)
    header: list[str] = []
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: row {reader.line_num}: two columns have the same name")
            elif len(values) != len(header):
                raise UserError(f"{path}: row {reader.line_num} has {len(values)} fields, the header has {len(header)}")
            else:
                yield reader.line_num, dict(zip(header, values))
    except csv.Error as error:
        raise UserError(f"{path}: row {reader.line_num} is not valid CSV ({error})") from None


@contextlib.contextmanager
def parquet(path: pathlib.Path) -> Iterator[Any]:
    """An open pyarrow.parquet.ParquetFile. UserError for what goes wrong while it is read, and for one that would
    unpack to far more than its size.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with files.open_file(path) as content, pyarrow.parquet.ParquetFile(content) as file:
            rows, most = file.metadata.num_rows, max(files.ANYHOW, files.GROWTH * path.stat().st_size)
            groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
            if rows > most or sum(group.total_byte_size for group in groups) > most:
                raise UserError(f"{path}: unpacks to over {files.GROWTH} times its size; unpack it if you trust it")
            yield file
    except (OSError, ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from None


def _parquet(path: pathlib.Path) -> Iterator[Record]:
    with parquet(path) as file:
        row = 0
        for batch in file.iter_batches(batch_size=4096):
            for row, record in enumerate(batch.to_pylist(), row + 1):  # noqa: B020
                yield row, record
