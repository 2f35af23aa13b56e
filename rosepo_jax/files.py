"""Reading and writing files so that nothing is ever half-written, and nothing that is read can do harm."""

import contextlib
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from rosepo_jax.errors import UserError

LARGEST = 1 << 28  # bytes of a JSON file, which unlike JSON lines is read whole
DEEPEST = 100  # levels that JSON may be nested, so that functions which call themselves can follow
ROW = 1 << 20  # bytes of a line
ROW_OF_OURS = 1 << 24  # of one that this package wrote, or is given to score
BLANK = 1 << 20  # lines in a row
GROWTH, ANYHOW = 50, 1 << 22  # what a .gz may unpack to: so many times its size, or so many bytes


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content` to `path` atomically: readers see the old file or the whole new one, never a part."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp makes private files
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Any) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


# ---- Reading --------------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A file's bytes. UserError when there is no such file, and for pipes and devices, which may never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a file")
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise _unreadable(path, error) from None


def read_text(path: str | os.PathLike, limit: int = LARGEST) -> str:
    """The whole text of a UTF-8 file, without its byte-order mark."""
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes, which is too much to be what it should be")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None


def read_json(path: str | os.PathLike) -> Any:
    return parse_json(read_text(path), str(path))


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """All rows of a JSON-lines file; a bad row is named by its number (1-based)."""
    rows = []
    for number, line in lines(path, limit=ROW_OF_OURS):
        if line.strip():
            rows.append(parse_json(line, f"{path}: row {number}"))
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}: row {number} is not a JSON object")
    return rows


def parse_json(text: str, where: str, surrogates: bool = False) -> Any:
    """The value of a JSON text; UserError that begins with `where`.

    Beside what is no JSON, refused is what cannot be handled safely: numbers that are not finite, nesting deeper than
    DEEPEST, and, unless `surrogates`, halves of surrogate pairs, which could not be written again.
    """
    try:
        value = _DECODER.decode(text)
        if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        if not surrogates and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a whole number of thousands of digits
        raise UserError(f"{where} is not valid JSON ({error})") from None
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        level = [v for outer in level if isinstance(outer, dict | list) for v in _inner(outer)]
        depth += 1
    return depth


def _inner(outer: dict | list) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def lines(path: str | os.PathLike, encoding: str = "utf-8", limit: int = ROW) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of every line, the byte-order mark removed; `.gz` is unpacked.

    Memory is bounded by one line. A line longer than `limit` bytes is refused after that many bytes, so a file without
    line ends never fills memory; a .gz that unpacks to far more than its size never fills the time.
    """
    path = pathlib.Path(path)
    with open_file(path) as file:
        most = max(ANYHOW, GROWTH * os.fstat(file.fileno()).st_size)
        try:
            with gzip.open(file) if path.suffix == ".gz" else file as content:
                read = blank = 0
                for number, line in enumerate(iter(lambda: content.readline(limit + 1), b""), 1):
                    read += len(line)
                    blank = blank + 1 if len(line) < 3 and not line.strip() else 0
                    if len(line) > limit:
                        raise UserError(f"{path}: row {number} is longer than {limit} bytes; is this a text table?")
                    if blank > BLANK:
                        raise UserError(f"{path}: row {number}: over {BLANK:,} blank lines; is this a text table?")
                    if read > most:
                        raise UserError(f"{path}: unpacks to over {GROWTH} times its size; unpack it if you trust it")
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    try:
                        decoded = line.decode(encoding)
                    except UnicodeDecodeError as error:
                        where = f"byte {error.start + 1} of the row"
                        raise UserError(f"{path}: row {number} is not {encoding} ({where}); convert the file") from None
                    yield number, decoded
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from None


def _unreadable(path: str | os.PathLike, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """An array of numbers that this package wrote, never of objects. UserError for whatever else is there."""
    with _whole(path) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(path: str | os.PathLike, *names: str) -> list[np.ndarray]:
    """`read_npy` of arrays of an .npz, which this package does not compress."""
    with _whole(path) as file, zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise UserError(f"{path}: unpacks to more than its size, so rosepo did not write it")
        return [np.lib.format.read_array(archive.open(f"{name}.npy"), allow_pickle=False) for name in names]


@contextlib.contextmanager
def _whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    with open_file(path) as file:
        try:
            yield file
        except UserError:
            raise
        except Exception as error:  # headers hold Python literals and types: damage in them raises anything
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: damaged ({reason}); remove it and run the stage that wrote it again") from None


# ---- Identity -------------------------------------------------------------------------------------------------------


def hash_json(value: Any) -> str:
    """Hex SHA-256 (first 16 digits) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def hash_tree(path: str | os.PathLike) -> str:
    """Hex SHA-256 (first 16 digits) over names and contents of a file, or of every file below a directory."""
    path = pathlib.Path(path)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path.parent)).encode() + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
