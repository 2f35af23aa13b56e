"""Reads an interaction log and its titles from any supported source into one `RawLog`.

Sources (`data.source`), what `data.path` holds, and where the titles come from:

- world         nothing; the embedded generative model (data/world.py)
- movielens     a folder with u.data + u.item, ratings.dat + movies.dat (MovieLens-1M/10M, MovieTweetings) or
                ratings.csv + movies.csv. u.item, and the movies.dat of MovieLens-1M, are latin-1; all else is UTF-8
- recbole       a folder with one atomic .inter and one .item file (typed headers such as `user_id:token`)
- table         a .csv, .tsv, .jsonl or .parquet file, its columns named in `data.columns`; the titles in the same
                file, or in a second one named in `data.titles`
- amazon        reviews as JSON lines of the 2018 or 2023 release and the meta file (meta*), .gz or not, in a folder
- llara         a folder with sessions.tsv (or sessions_reconstructed.tsv), id2name.txt / id2title.tsv and ready rows:
                val.jsonl, test.jsonl (LLaRA) or *val.json, *test.json (S-DPO: historyList, itemList, trueSelection)
- sequences     a folder with sequences.tsv (PatchRec: user, train_idx, val_idx, test_idx, items) or sessions.tsv
                (split, user, items), and id2title.txt / id2name.txt / id2title.tsv
- tfds:NAME     a TensorFlow Datasets builder prepared as array_record (read without TensorFlow) in the data_dir
                `data.path`; features named in `data.columns`

Ids are text: leading zeros count. The catalogue holds every item of the title table in its order; users are numbered
by first appearance. Repairs, each counted in `RawLog.repairs` under the name it has here:

- titles with stray white space or control characters: cleaned
- empty titles: now "untitled ID"
- items with the title of an earlier item: kept (evaluation treats equal titles as one)
- other titles of an item: the first kept
- interactions with items that have no title: dropped
- history items of a ready-made evaluation row that have no title: dropped
- repeated interactions (same user, item and time): dropped
- interactions earlier than the user's row before: sorted by time
- users with one interaction: kept (the k-core filter of `prepare` may remove them)

Errors, each one line with file and row: a missing, unreadable or empty file; a missing column; a row with too few or
too many fields; broken UTF-8; invalid JSON, CSV or Parquet; a row longer than 1 MiB; a .gz or Parquet file that would
unpack to over 50 times its size; an empty id; a timestamp or rating that is not a finite number; an unknown target or
candidate in a ready-made evaluation row; no interaction left.
Blank lines, CRLF line ends, byte-order marks and quoted commas are read as what they mean and are no repair.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rosepo_jax.data import published, tables
from rosepo_jax.data.log import Coded, Event, FrozenRow, Interactions, Items, RawLog, assemble, assemble_columns
from rosepo_jax.errors import UserError

__all__ = ["FrozenRow", "Interactions", "RawLog", "read"]


def read(data: Any, seed: int) -> RawLog:
    """The log that the config section `data` names; `seed` (`data.seed`) matters to the embedded world only.

    Errors: UserError as listed in the module's docstring.
    """
    raw = _read(data, seed)
    if data.split == "global_time" and not raw.timed:
        raise UserError(f"data.split: global_time needs timestamps, but {data.path} holds only the order of each user")
    return raw


def _read(data: Any, seed: int) -> RawLog:
    if data.source == "world":
        from rosepo_jax.data import world  # it builds on RawLog, hence on this module

        return world.generate(data.world, seed).log
    if data.source.startswith("tfds:"):
        return _tfds(data.source.removeprefix("tfds:"), data)
    if data.source not in _READERS:
        names = ", ".join(["world", *_READERS, "tfds:NAME"])
        raise UserError(f"data.source: unknown source {data.source!r}; use one of {names}")
    if not data.path:
        raise UserError(f"data.path is empty; source {data.source!r} needs the folder or file of the log")
    path = pathlib.Path(data.path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; set data.path")
    return _READERS[data.source](path, data)


# --- MovieLens -------------------------------------------------------------------------------------------------------

_ML100K_GENRES = (  # of the flags from the second on; the first means unknown
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def _movielens(path: pathlib.Path, data: Any) -> RawLog:
    layouts = {"u.data": _ml_100k, "ratings.dat": _ml_dat, "ratings.csv": _ml_csv}
    for name, layout in layouts.items():
        if (path / name).is_file():
            return layout(path)
    raise UserError(f"{path}: no {', '.join(layouts)} here; set data.path to the folder of the MovieLens files")


def _ml_100k(path: pathlib.Path) -> RawLog:
    items = Items(path / "u.item")
    for row, values in tables.fields(path / "u.item", "|", 6 + len(_ML100K_GENRES), "latin-1"):
        groups = (genre for genre, flag in zip(_ML100K_GENRES, values[6:]) if flag == "1")
        items.add(row, values[0], values[1], groups)
    return assemble(_ratings(path / "u.data", "\t"), items, path / "u.data")


def _ml_dat(path: pathlib.Path) -> RawLog:
    titles = path / "movies.dat"
    items = Items(titles)
    for row, line in tables.lines(titles, "latin-1" if _is_ml_1m(path) else "utf-8"):
        id, _, rest = line.partition("::")
        title, separator, genres = rest.rpartition("::")  # a title may hold the separator
        if not separator:
            raise UserError(f"{titles}: row {row} is not ID::TITLE::GENRES")
        items.add(row, id, title, genres.split("|"))
    return assemble(_ratings(path / "ratings.dat", "::"), items, path / "ratings.dat")


def _is_ml_1m(path: pathlib.Path) -> bool:
    """MovieLens-1M alone has a users.dat of five fields; its titles are latin-1."""
    users = path / "users.dat"
    return users.is_file() and next(tables.lines(users, "latin-1"))[1].count("::") == 4


def _ml_csv(path: pathlib.Path) -> RawLog:
    titles, log = path / "movies.csv", path / "ratings.csv"
    items = Items(titles)
    for row, record in tables.records(titles):
        id, title, genres = (tables.field(record, name, titles, row) for name in ("movieId", "title", "genres"))
        items.add(row, id, title, () if genres == "(no genres listed)" else genres.split("|"))

    def events() -> Iterator[Event]:
        for row, record in tables.records(log):
            names = ("userId", "movieId", "rating", "timestamp")
            user, item, rating, timestamp = (tables.field(record, name, log, row) for name in names)
            yield _event(log, row, user, item, timestamp, rating)

    return assemble(events(), items, log)


def _ratings(path: pathlib.Path, separator: str) -> Iterator[Event]:
    for row, (user, item, rating, timestamp) in tables.fields(path, separator, 4):
        yield _event(path, row, user, item, timestamp, rating)


def _event(path: pathlib.Path, row: int, user: str, item: str, timestamp: Any, rating: Any) -> Event:
    number = tables.number
    return Event(row, user, item, number(timestamp, "timestamp", path, row), number(rating, "rating", path, row))


# --- tables with named columns ---------------------------------------------------------------------------------------


def _table(path: pathlib.Path, data: Any) -> RawLog:
    titles = pathlib.Path(data.titles).expanduser() if data.titles else None
    title_table = (titles, tables.records(titles)) if titles else None
    return _columns(path, tables.records(path), data.columns, title_table)


def _columns(
    path: pathlib.Path,
    log: Iterable[tables.Record],
    columns: Mapping[str, str],
    title_table: tuple[pathlib.Path, Iterable[tables.Record]] | None,
    group_separator: str = "|",
) -> RawLog:
    """Reads records by the column map: user, item and title are required; timestamp, rating, groups absent when ""."""
    columns = dict(columns)  # looked at for every row
    for role in ("user", "item", "title"):
        if not columns[role]:
            raise UserError(f"data.columns.{role} is empty; name the column of {path} that holds it")
    items = Items(title_table[0] if title_table else path)

    def get(role: str, record: dict, source: pathlib.Path, row: int) -> Any:
        return tables.field(record, columns[role], source, row, f"set data.columns.{role}")

    def text(role: str, record: dict, source: pathlib.Path, row: int) -> str:
        return tables.text(get(role, record, source, row), columns[role], source, row)

    def number(role: str, record: dict, row: int) -> float | None:
        return tables.number(get(role, record, path, row), columns[role], path, row) if columns[role] else None

    def add(record: dict, source: pathlib.Path, row: int) -> None:
        title = get("title", record, source, row)
        title = "" if title is None else tables.text(title, columns["title"], source, row)
        groups = get("groups", record, source, row) if columns["groups"] else None
        if isinstance(groups, str | bytes):
            groups = tables.text(groups, columns["groups"], source, row).split(group_separator)
        if groups is not None and not isinstance(groups, Iterable):
            raise UserError(f"{source}: row {row}: {columns['groups']} {groups!r:.60} is neither text nor a list")
        groups = [tables.text(group, columns["groups"], source, row) for group in (() if groups is None else groups)]
        items.add(row, text("item", record, source, row), title, groups)

    def events() -> Iterator[Event]:
        for row, record in log:
            if not title_table:
                add(record, path, row)
            user, item = text("user", record, path, row), text("item", record, path, row)
            yield Event(row, user, item, number("timestamp", record, row), number("rating", record, row))

    if title_table:
        for row, record in title_table[1]:
            add(record, title_table[0], row)
        if whole := _whole(path, columns):
            return assemble_columns(*whole, items, path)
    return assemble(events(), items, path)


def _whole(
    path: pathlib.Path, columns: Mapping[str, str]
) -> tuple[Coded, Coded, np.ndarray | None, np.ndarray | None] | None:
    """User, item, timestamp and rating of a Parquet table for `assemble_columns`. None where any value may have to be
    refused, or converted with care: the rows are then read one by one, and the error names its row.
    """
    user, item = (_coded(tables.parquet_column(path, columns[role])) for role in ("user", "item"))
    names = [columns[role] for role in ("timestamp", "rating")]
    timestamp_E, rating_E = (_finite(tables.parquet_column(path, name)) if name else None for name in names)
    if not (user and item) or any(name and x is None for name, x in zip(names, (timestamp_E, rating_E))):
        return None
    return user, item, timestamp_E, rating_E


def _coded(column: Any) -> Coded | None:
    import pyarrow.types as types

    if column is None or column.null_count or not len(column):
        return None
    if not (types.is_integer(column.type) or types.is_string(column.type) or types.is_large_string(column.type)):
        return None
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    try:
        ids = tuple(map(str, chunks[0].dictionary.to_pylist()))
    except UnicodeDecodeError:
        return None
    code_E = np.concatenate([chunk.indices.to_numpy() for chunk in chunks]).astype(np.int64)
    return Coded(ids, code_E) if all(map(str.strip, ids)) else None


def _finite(column: Any) -> np.ndarray | None:
    import pyarrow.types as types

    if column is None or column.null_count or not (types.is_integer(column.type) or types.is_floating(column.type)):
        return None
    number_E = column.to_numpy().astype(np.float64)
    return number_E if np.isfinite(number_E).all() else None


# --- RecBole ---------------------------------------------------------------------------------------------------------


def _recbole(path: pathlib.Path, data: Any) -> RawLog:
    log, titles = _one(path, "*.inter"), _one(path, "*.item")
    fields, item_fields = _header(log), _header(titles)
    columns = {
        "user": _typed(fields, log, "user_id"),
        "item": _typed(fields, log, "item_id"),
        "timestamp": _typed(fields, log, "timestamp", default=""),
        "rating": _typed(fields, log, "rating", default=""),
        "title": _typed(item_fields, titles, "title", "movie_title", "name", "item_name"),
        "groups": _typed(item_fields, titles, "class", "genre", "genres", "categories", "category", default=""),
    }
    if columns["item"] not in item_fields:
        raise UserError(f"{titles}: row 1 has no field {columns['item']!r}, which {log.name} has")
    return _columns(log, tables.unquoted(log), columns, (titles, tables.unquoted(titles)), group_separator=" ")


def _one(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{folder}: expected exactly one {pattern} file, found {names}")
    return found[0]


def _header(path: pathlib.Path) -> list[str]:
    row, line = next(tables.lines(path))
    names = line.split("\t")
    if bare := [name for name in names if name.partition(":")[2] not in ("token", "token_seq", "float", "float_seq")]:
        raise UserError(f"{path}: row {row}: field {bare[0]!r} has no type; expected NAME:token, :float or :…_seq")
    return names


def _typed(fields: list[str], path: pathlib.Path, *names: str, default: str | None = None) -> str:
    """The field, type included, of the first of `names` that there is."""
    typed = {field.partition(":")[0]: field for field in fields}
    found = next((typed[name] for name in names if name in typed), default)
    if found is None:
        raise UserError(f"{path}: row 1 has no field {' or '.join(names)} (it has: {', '.join(fields)})")
    return found


# --- Amazon reviews --------------------------------------------------------------------------------------------------

_AMAZON_2018 = {
    "user": "reviewerID",
    "item": "asin",
    "timestamp": "unixReviewTime",
    "rating": "overall",
    "title": "title",
    "groups": "category",
}
_AMAZON_2023 = {
    "user": "user_id",
    "item": "parent_asin",
    "timestamp": "timestamp",
    "rating": "rating",
    "title": "title",
    "groups": "categories",
}


def _amazon(path: pathlib.Path, data: Any) -> RawLog:
    files = [file for file in path.iterdir() if ".json" in file.name] if path.is_dir() else []
    meta = [file for file in files if file.name.startswith("meta")]
    reviews = [file for file in files if file not in meta]
    if len(meta) != 1 or len(reviews) != 1:
        raise UserError(f"{path}: expected one file of reviews (.json, .jsonl, .gz) and one meta* file in this folder")
    first = next(tables.json_lines(reviews[0]))[1]
    columns = _AMAZON_2023 if "parent_asin" in first else _AMAZON_2018
    blank = {columns["title"]: None, columns["groups"]: None}  # the meta files leave out what they do not know
    titles = ((row, blank | record) for row, record in tables.json_lines(meta[0]))
    return _columns(reviews[0], tables.json_lines(reviews[0]), columns, (meta[0], titles))


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


def _tfds(name: str, data: Any) -> RawLog:
    import tensorflow_datasets as tfds  # slow to import

    advice = (
        f"prepare it once where TensorFlow is installed (tfds build {name} --file_format=array_record) and set "
        "data.path to its data_dir"
    )
    try:
        builder = tfds.builder(name, data_dir=data.path or None, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")  # returns at once when it is prepared
        examples = builder.as_data_source(split="all")
    except Exception as error:  # builders raise anything, from AssertionError to what an absent module causes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"data.source: tfds:{name} cannot be read ({reason}); {advice}") from None
    log = ((row, examples[row - 1]) for row in range(1, len(examples) + 1))
    return _columns(pathlib.Path(f"tfds:{name}"), log, data.columns, None)


_READERS: dict[str, Callable[[pathlib.Path, Any], RawLog]] = {
    "movielens": _movielens,
    "recbole": _recbole,
    "table": _table,
    "amazon": _amazon,
    "llara": lambda path, data: published.llara(path),
    "sequences": lambda path, data: published.sequences(path),
}
