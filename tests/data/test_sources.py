"""Every source and layout, every repair and every error of bad input; the real logs against their published counts."""

import gzip
import json
import pathlib
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosepo_jax.config import default
from rosepo_jax.data import sources
from rosepo_jax.data.log import Event, Items, assemble, clean
from rosepo_jax.errors import UserError

DROPPED_UNKNOWN = "interactions with items that have no title: dropped"
DROPPED_REPEATED = "repeated interactions (same user, item and time): dropped"
BACK_IN_TIME = "interactions earlier than the user's row before: sorted by time"
ONE_ITEM = "users with one interaction: kept"
EMPTY = 'empty titles: now "untitled ID"'
CLEANED = "titles with stray white space or control characters: cleaned"
DUPLICATE = "items with the title of an earlier item: kept"
OTHER_TITLE = "other titles of an item: the first kept"


def write(folder: pathlib.Path, **files) -> pathlib.Path:
    """Writes files; `__` in a name stands for a dot."""
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def read(source: str, path: pathlib.Path | str, **settings) -> sources.RawLog:
    data = default().data
    data.update({"source": source, "path": str(path), **settings})
    return sources.read(data, 0)


def events(raw: sources.RawLog) -> list[tuple[str, str, float]]:
    log = raw.interactions
    return [
        (raw.users[user], raw.catalogue.ids[item], time)
        for user, item, time in zip(log.user_E, log.item_E, log.timestamp_E)
    ]


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def dat(tmp_path) -> pathlib.Path:
    """A small, clean log in the .dat layout."""
    return write(
        tmp_path,
        ratings__dat="1::0010::7::100\n1::0002::8::200\n2::0010::5::150\n2::0002::9::50\n",
        movies__dat="0002::Amélie (2001)::Comedy|Romance\n0010::Heat: a::b (1995)::\n0011::Seen by none (1990)::War\n",
    )


# --- MovieLens -------------------------------------------------------------------------------------------------------


def test_dat_layout(dat):
    raw = read("movielens", dat)
    assert raw.users == ("1", "2")
    assert raw.catalogue.ids == ("0002", "0010", "0011")  # text with leading zeros, order of the title table
    assert raw.catalogue.titles == ("Amélie (2001)", "Heat: a::b (1995)", "Seen by none (1990)")
    assert raw.catalogue.groups == (("Comedy", "Romance"), (), ("War",))
    assert events(raw) == [("1", "0010", 100), ("1", "0002", 200), ("2", "0010", 150), ("2", "0002", 50)]
    log = raw.interactions
    np.testing.assert_array_equal(log.row_E, [1, 2, 3, 4])
    np.testing.assert_array_equal(log.rating_E, [7, 8, 5, 9])
    assert (log.user_E.dtype, log.item_E.dtype, log.timestamp_E.dtype) == (np.int64, np.int64, np.float64)
    assert log.split_E is None and raw.frozen_rows is None and raw.timed
    np.testing.assert_array_equal(raw.catalogue.count_I, [0, 0, 0])
    assert raw.repairs == {BACK_IN_TIME: 1}


def test_only_the_1m_release_is_read_as_latin_1(tmp_path):
    write(tmp_path, ratings__dat="1::1::5::1\n", movies__dat="1::Amélie (2001)::Comedy\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"movies.dat: row 1 is not utf-8 \(byte 6 of the row\)"):
        read("movielens", tmp_path)
    write(tmp_path, users__dat="1::F::1::10::48067\n")
    assert read("movielens", tmp_path).catalogue.titles == ("Amélie (2001)",)
    write(tmp_path, users__dat="1::177651718\n", movies__dat="1::Amélie (2001)::Comedy\n")
    assert read("movielens", tmp_path).catalogue.titles == ("Amélie (2001)",)


def test_100k_layout(tmp_path):
    flags = ["0"] * 19
    flags[1] = flags[18] = "1"
    unknown = ["1"] + ["0"] * 18
    rows = [["1", "Misérables, Les (1995)", "", "", "", *flags], ["2", "unknown", "", "", "", *unknown]]
    write(
        tmp_path,
        u__item="".join("|".join(row) + "\n" for row in rows).encode("latin-1"),
        u__data="196\t2\t3\t881250949\n196\t1\t4\t881250950\n",
    )
    raw = read("movielens", tmp_path)
    assert raw.catalogue.titles == ("Misérables, Les (1995)", "unknown")
    assert raw.catalogue.groups == (("Action", "Western"), ())
    assert events(raw) == [("196", "2", 881250949), ("196", "1", 881250950)]


def test_csv_layout_with_crlf_quoted_commas_and_a_byte_order_mark(tmp_path):
    write(
        tmp_path,
        ratings__csv="\ufeffuserId,movieId,rating,timestamp\r\n1,2,4.5,100\r\n\r\n1,1,3.0,200\r\n",
        movies__csv='movieId,title,genres\r\n1,"American President, The ""uncut"" (1995)",Comedy|Drama\r\n'
        "2,Toy Story (1995) ,(no genres listed)\r\n",
    )
    raw = read("movielens", tmp_path)
    assert raw.catalogue.titles == ('American President, The "uncut" (1995)', "Toy Story (1995)")
    assert raw.catalogue.groups == (("Comedy", "Drama"), ())
    assert events(raw) == [("1", "2", 100), ("1", "1", 200)]
    np.testing.assert_array_equal(raw.interactions.row_E, [2, 4])  # line numbers, as an editor shows them
    assert raw.repairs == {CLEANED: 1}


# --- repairs ---------------------------------------------------------------------------------------------------------


def test_repairs_are_made_and_counted(dat):
    write(
        dat,
        ratings__dat="1::1::7::300\n1::2::8::200\n1::2::9::200\n1::2::9::201\n1::99::5::1\n2::3::5::7\n3::99::5::7\n",
        movies__dat="1:: Two\x00 \t lines\x85::\n2::  ::\n3::THE THING::\n4::The Thing::\n3::The other thing::\n",
    )
    raw = read("movielens", dat)
    assert raw.catalogue.titles == ("Two lines", "untitled 2", "THE THING", "The Thing")
    assert events(raw) == [("1", "1", 300), ("1", "2", 200), ("1", "2", 201), ("2", "3", 7)]
    np.testing.assert_array_equal(raw.interactions.rating_E, [7, 8, 9, 5])  # the first of a repetition stays
    assert raw.users == ("1", "2")
    assert raw.repairs == {
        CLEANED: 2,
        EMPTY: 1,
        DUPLICATE: 1,
        OTHER_TITLE: 1,
        DROPPED_UNKNOWN: 2,
        DROPPED_REPEATED: 1,
        BACK_IN_TIME: 1,
        ONE_ITEM: 1,
    }
    for name in raw.repairs:
        assert name.split(": ")[0] in sources.__doc__.replace("\n  ", "")


@given(st.text(st.characters()))
def test_clean_is_idempotent_printable_and_loses_no_letter(title):
    cleaned = clean(title)
    assert clean(cleaned) == cleaned == cleaned.strip()
    assert "  " not in cleaned and "\n" not in cleaned
    cleaned.encode("utf-8")
    assert [c for c in cleaned if c.isalnum()] == [c for c in title if c.isalnum()]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2)), min_size=1), st.integers(1, 6))
def test_every_event_is_kept_or_counted(rows, known):
    items = Items("titles")
    for item in range(known):
        items.add(item + 1, str(item), f"Title {item}")
    log = [Event(row, f"u{user}", str(item), float(time)) for row, (user, item, time) in enumerate(rows, 1)]
    wanted = [event for event in log if int(event.item) < known]
    distinct = {(event.user, event.item, event.timestamp): event.row for event in reversed(wanted)}  # first row of each
    if not wanted:
        with pytest.raises(UserError, match="no interactions"):
            assemble(log, items, "log")
        return
    raw = assemble(log, items, "log")
    assert raw.interactions.row_E.tolist() == sorted(distinct.values())
    assert events(raw) == [
        (log[row - 1].user, log[row - 1].item, log[row - 1].timestamp) for row in sorted(distinct.values())
    ]
    assert raw.repairs.get(DROPPED_UNKNOWN, 0) == len(log) - len(wanted)
    assert raw.repairs.get(DROPPED_REPEATED, 0) == len(wanted) - len(distinct)
    assert list(raw.users) == list(dict.fromkeys(event.user for event in wanted))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ratings__dat": ""}, "ratings.dat: the file is empty"),
        ({"ratings__dat": "\r\n\n"}, "ratings.dat: the file is empty"),
        ({"movies__dat": ""}, "movies.dat: the file is empty"),
        ({"ratings__dat": "1::0010::7\n"}, "ratings.dat: row 1 has 3 fields separated by '::', expected 4"),
        ({"ratings__dat": "1::0010::7::5\n1::2::7::yesterday\n"}, "ratings.dat: row 2: timestamp 'yesterday' is not"),
        ({"ratings__dat": "1::0010::7::nan\n"}, "ratings.dat: row 1: timestamp 'nan' is not a finite number"),
        ({"ratings__dat": "1::0010::good::1\n"}, "ratings.dat: row 1: rating 'good' is not a finite number"),
        ({"ratings__dat": "::0010::7::1\n"}, "ratings.dat: row 1: the user id is empty"),
        ({"ratings__dat": "1::::7::1\n"}, "ratings.dat: row 1: the item id is empty"),
        ({"ratings__dat": "1::77::7::1\n"}, "ratings.dat: no interactions; none of 1 has an item of .*movies.dat"),
        ({"movies__dat": "0010 Heat\n"}, "movies.dat: row 1 is not ID::TITLE::GENRES"),
        ({"movies__dat": "::Heat::War\n"}, "movies.dat: row 1: the item id is empty"),
        ({"movies__dat": b"1::Heat::\n2::Am\xe9lie::\n"}, r"movies.dat: row 2 is not utf-8 \(byte 6 of the row\)"),
        ({"ratings__dat": b"\xff\xfe1\x00"}, r"ratings.dat: row 1 is not utf-8 \(byte 1 of the row\)"),
    ],
)
def test_bad_dat_files(dat, files, message):
    with pytest.raises(UserError, match=message) as error:
        read("movielens", write(dat, **files))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "userId,movieId,rating,when\n1,1,2,3\n",
            "ratings.csv: row 2 has no column 'timestamp' .it has: userId, movieId",
        ),
        ("userId,movieId,rating,timestamp\n1,1,2\n", "ratings.csv: row 2 has 3 fields, the header has 4"),
        ("userId,movieId,rating,timestamp\n", "ratings.csv: no interactions; it has no rows"),
        ("userId,userId,rating,timestamp\n", "ratings.csv: row 1: two columns have the same name"),
        ('userId,movieId,rating,timestamp\n1,"1"x,2,3\n', "ratings.csv: row 2 is not valid CSV"),
        ('userId,movieId,rating,timestamp\n1,"1,2,3\n', "ratings.csv: row 2 is not valid CSV"),
        ("userId,movieId,rating,timestamp\n1,1,4,5\n1,2,4,soon\n", "ratings.csv: row 3: timestamp 'soon'"),
    ],
)
def test_bad_csv_files(tmp_path, content, message):
    write(tmp_path, ratings__csv=content, movies__csv="movieId,title,genres\n1,Heat,War\n2,Heat,War\n")
    with pytest.raises(UserError, match=message):
        read("movielens", tmp_path)


def test_a_quote_that_is_never_closed_is_bounded(tmp_path):
    rows = 'movieId,title,genres\n1,"Heat,War\n' + "2,Heat,War\n" * 200_000
    write(tmp_path, ratings__csv="userId,movieId,rating,timestamp\n1,1,4,5\n", movies__csv=rows)
    with pytest.raises(UserError, match=r"movies.csv: row \d+ is not valid CSV \(field larger than field limit"):
        read("movielens", tmp_path)


@pytest.mark.parametrize("name", ["ratings.dat", "ratings.csv", "log.jsonl", "log.csv"])
def test_a_two_gigabyte_line_is_never_loaded(dat, name):
    path = dat / name
    if name == "ratings.csv":
        (dat / "ratings.dat").unlink()
        write(dat, movies__csv="movieId,title,genres\n1,Heat,War\n")
    with open(path, "wb") as file:
        file.truncate(2 << 30)  # sparse: takes no disk
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{name}: row 1 is longer than 1048576 bytes"):
        read("movielens", dat) if name.startswith("ratings") else read("table", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert peak < 16 << 20 and time.monotonic() - started < 2


def test_paths_and_names(tmp_path, dat):
    for source, path, message in [
        ("movielense", dat, "unknown source 'movielense'; use one of world, movielens, recbole"),
        ("movielens", tmp_path / "nowhere", "nowhere: no such file or folder"),
        ("table", tmp_path, "unknown kind of file; use .csv"),
        ("recbole", dat, r"expected exactly one \*.inter file, found none"),
        ("amazon", dat, "expected one file of reviews"),
        ("llara", dat, "no title table"),
        ("sequences", dat, "no title table"),
    ]:
        with pytest.raises(UserError, match=message):
            read(source, path)
    with pytest.raises(UserError, match=r"data.path is empty"):
        read("movielens", "")
    (dat / "ratings.dat").unlink()
    with pytest.raises(UserError, match=r"no u.data, ratings.dat, ratings.csv here"):
        read("movielens", dat)
    write(dat, u__data="1\t1\t1\t1\n")
    with pytest.raises(UserError, match=r"u.item: no such file"):
        read("movielens", dat)


# --- RecBole ---------------------------------------------------------------------------------------------------------

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\t02\t4\t20\nu1\t01\t5\t10\nu2\t01\t3\t30\n"
ITEM = 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n01\t"Great" Cats\tDrama War\n02\tHeat\t\n'


def test_recbole(tmp_path):
    raw = read("recbole", write(tmp_path, x__inter=INTER, x__item=ITEM))
    assert raw.catalogue.titles == ('"Great" Cats', "Heat")  # quotes are ordinary characters here
    assert raw.catalogue.groups == (("Drama", "War"), ())
    assert events(raw) == [("u1", "02", 20), ("u1", "01", 10), ("u2", "01", 30)]
    np.testing.assert_array_equal(raw.interactions.rating_E, [4, 5, 3])
    write(tmp_path, x__inter="user_id:token\titem_id:token\nu1\t02\nu1\t01\n")
    raw = read("recbole", tmp_path)
    assert raw.interactions.rating_E is None and not raw.timed


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x__inter": INTER.replace("user_id:token", "user_id")}, "x.inter: row 1: field 'user_id' has no type"),
        ({"x__inter": INTER.replace("user_id:", "uid:")}, r"x.inter: row 1 has no field user_id \(it has: uid:token"),
        ({"x__item": ITEM.replace("movie_title", "headline")}, "x.item: row 1 has no field title or movie_title"),
        ({"x__item": ITEM.replace("item_id", "movie")}, "x.item: row 1 has no field 'item_id:token'"),
        ({"x__inter": INTER + "u3\t01\n"}, "x.inter: row 5 has 2 fields, the header has 4"),
        ({"x__inter": INTER + "u3\t01\t1\tlate\n"}, "x.inter: row 5: timestamp:float 'late' is not a finite number"),
        ({"y__inter": INTER}, r"expected exactly one \*.inter file, found x.inter, y.inter"),
    ],
)
def test_bad_recbole_files(tmp_path, files, message):
    write(tmp_path, x__inter=INTER, x__item=ITEM)
    with pytest.raises(UserError, match=message):
        read("recbole", write(tmp_path, **files))


# --- tables ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"user": "007", "item": 2, "timestamp": 30, "title": 'Comma, "quote"', "stars": 4.0, "kinds": "a|b"},
    {"user": "007", "item": 1, "timestamp": 10, "title": "Zwölf", "stars": 5.0, "kinds": ""},
    {"user": "8", "item": 2, "timestamp": 20.5, "title": 'Comma, "quote"', "stars": 1.0, "kinds": "a|b"},
]


def as_csv(rows, separator=",") -> str:
    quoted = [['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "\r\n".join(separator.join(values) for values in [list(rows[0]), *quoted]) + "\r\n"


def write_table(path: pathlib.Path, rows) -> pathlib.Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = jsonl(*rows) if ".json" in path.name else as_csv(rows, "\t" if ".tsv" in path.name else ",")
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize(
    "name", ["log.csv", "log.tsv", "log.jsonl", "log.json", "log.parquet", "log.csv.gz", "log.jsonl.gz"]
)
def test_table(tmp_path, name):
    path = write_table(tmp_path / name, ROWS)
    raw = read("table", path, columns={"rating": "stars", "groups": "kinds"})
    assert raw.users == ("007", "8")
    assert raw.catalogue.ids == ("2", "1")
    assert raw.catalogue.titles == ('Comma, "quote"', "Zwölf")
    assert raw.catalogue.groups == (("a", "b"), ())
    assert events(raw) == [("007", "2", 30), ("007", "1", 10), ("8", "2", 20.5)]
    np.testing.assert_array_equal(raw.interactions.rating_E, [4, 5, 1])
    assert raw.repairs == {BACK_IN_TIME: 1, ONE_ITEM: 1}


def test_table_with_a_title_table_and_without_timestamps(tmp_path):
    log = write_table(
        tmp_path / "log.csv", [{"who": "a", "what": "x"}, {"who": "a", "what": "y"}, {"who": "b", "what": "x"}]
    )
    titles = tmp_path / "titles.jsonl"
    titles.write_text(jsonl({"what": "y", "name": None, "tags": ["p", "q"]}, {"what": "x", "name": "X", "tags": None}))
    columns = {"user": "who", "item": "what", "title": "name", "timestamp": "", "groups": "tags"}
    raw = read("table", log, titles=str(titles), columns=columns)
    assert raw.catalogue.titles == ("untitled y", "X")
    assert raw.catalogue.groups == (("p", "q"), ())
    assert events(raw) == [("a", "x", 0), ("a", "y", 1), ("b", "x", 0)]  # only the order is known
    assert not raw.timed
    with pytest.raises(UserError, match="global_time needs timestamps"):
        read("table", log, titles=str(titles), columns=columns, split="global_time")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", "user,item,timestamp\n1,1,1\n", "row 2 has no column 'title' .*; set data.columns.title"),
        ("log.jsonl", '{"user": 1\n', "log.jsonl: row 1 is not valid JSON"),
        ("log.jsonl", '{"user": ' + "1" * 5000 + "}", "log.jsonl: row 1 is not valid JSON"),
        ("log.jsonl", "\n[1]\n", "log.jsonl: row 2 is not a JSON object"),
        ("log.jsonl", "[" * 100_000, "log.jsonl: row 1 is not valid JSON"),
        (
            "log.jsonl",
            jsonl(ROWS[0], ROWS[1] | {"user": None}),
            "row 2: user 'None' is neither text nor a whole number",
        ),
        ("log.jsonl", jsonl(ROWS[0] | {"item": 1.5}), "row 1: item '1.5' is neither text nor a whole number"),
        ("log.jsonl", jsonl(ROWS[0] | {"item": ["a"]}), "row 1: item .* is neither text nor a whole number"),
        ("log.jsonl", jsonl(ROWS[0] | {"timestamp": None}), "row 1: timestamp 'None' is not a finite number"),
        ("log.jsonl", jsonl(ROWS[0] | {"timestamp": 10**400}), "row 1: timestamp '1000.*' is not a finite number"),
        ("log.jsonl", jsonl(ROWS[0] | {"user": "\ud800"}), "row 1: the user id holds half a surrogate pair"),
        ("log.parquet", "PAR1 no", "log.parquet: cannot be read as Parquet"),
        ("log.csv.gz", "not packed", "log.csv.gz: cannot be read"),
        ("log.csv.gz", gzip.compress(as_csv(ROWS * 99).encode())[:-20], "log.csv.gz: cannot be read"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read("table", path)
    assert "\n" not in str(error.value)


def test_an_empty_column_name_is_an_error(tmp_path):
    path = write_table(tmp_path / "log.csv", ROWS)
    with pytest.raises(UserError, match=r"data.columns.title is empty"):
        read("table", path, columns={"title": ""})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_titles_survive_csv_and_json_alike(tmp_path, titles):
    rows = [{"user": "u", "item": i, "timestamp": i, "title": title} for i, title in enumerate(titles)]
    csv, json_lines = (read("table", write_table(tmp_path / name, rows)).catalogue for name in ("a.csv", "a.jsonl"))
    assert csv.titles == json_lines.titles == tuple(clean(t) or f"untitled {i}" for i, t in enumerate(titles))


def outcome(path: pathlib.Path, **settings):
    """What is read, or the error's text without the file's name."""
    try:
        raw = read("table", path, titles=str(path.parent / "titles.jsonl"), **settings)
    except UserError as error:
        return str(error).replace(path.name, "log")
    columns = [None if column is None else column.tolist() for column in vars(raw.interactions).values()]
    return columns, raw.users, raw.catalogue.ids, raw.repairs, raw.timed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.sampled_from([int, str]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2), st.integers(1, 5)), min_size=1),
    st.integers(1, 6),
)
def test_whole_columns_of_parquet_are_what_rows_one_by_one_are(tmp_path, monkeypatch, kind, rows, known):
    monkeypatch.setattr(sources.tables, "_parquet", lambda path: iter(()))  # reads rows one by one
    (tmp_path / "titles.jsonl").write_text(jsonl(*({"item": kind(i), "title": f"Title {i}"} for i in range(known))))
    records = [
        {"user": kind(7 - user), "item": kind(item), "timestamp": time + 0.5, "stars": stars}
        for user, item, time, stars in rows
    ]
    paths = [write_table(tmp_path / f"log.{name}", records) for name in ("parquet", "jsonl")]
    for columns in ({"rating": "stars"}, {"timestamp": ""}):
        by_column, by_row = (outcome(path, columns=columns) for path in paths)
        assert by_column == by_row


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"user": None}, "row 3: user 'None' is neither text nor a whole number"),
        ({"user": " "}, "row 3: the user id is empty"),
        ({"item": ""}, "row 3: the item id is empty"),
        ({"timestamp": float("nan")}, "row 3: timestamp 'nan' is not a finite number"),
        ({"timestamp": None}, "row 3: timestamp 'None' is not a finite number"),
        ({"rating": float("inf")}, "row 3: rating 'inf' is not a finite number"),
    ],
)
def test_a_bad_value_of_a_parquet_column_is_named_by_its_row(tmp_path, bad, message):
    good = {"user": "u", "item": "i", "timestamp": 1.0, "rating": 2.0}
    path = write_table(tmp_path / "log.parquet", [good, good, good | bad])
    (tmp_path / "titles.jsonl").write_text(jsonl({"item": "i", "title": "Title"}))
    assert message in outcome(path, columns={"rating": "rating"})
    assert "row 1 has no column 'stars'" in outcome(path, columns={"rating": "stars"})


# --- Amazon ----------------------------------------------------------------------------------------------------------


def test_amazon_2018_and_2023(tmp_path):
    old, new = tmp_path / "2018", tmp_path / "2023"
    old.mkdir(), new.mkdir()
    write(
        old,
        Toys_5__json__gz=gzip.compress(
            jsonl(
                {"reviewerID": "A1", "asin": "0001", "overall": 5.0, "unixReviewTime": 20, "reviewText": "fine"},
                {"reviewerID": "A1", "asin": "0002", "overall": 4.0, "unixReviewTime": 10},
                {"reviewerID": "A1", "asin": "0002", "overall": 4.0, "unixReviewTime": 10},
                {"reviewerID": "A2", "asin": "0009", "overall": 4.0, "unixReviewTime": 10},
            ).encode()
        ),
        meta_Toys__json=jsonl({"asin": "0001", "title": "A\ntoy", "category": ["Toys", "Cars|Vans"]}, {"asin": "0002"}),
    )
    raw = read("amazon", old)
    assert events(raw) == [("A1", "0001", 20), ("A1", "0002", 10)]
    assert raw.catalogue.titles == ("A toy", "untitled 0002")
    assert raw.catalogue.groups == (("Toys", "Cars|Vans"), ())
    assert (raw.repairs[DROPPED_UNKNOWN], raw.repairs[DROPPED_REPEATED], raw.repairs[EMPTY]) == (1, 1, 1)
    review = {"user_id": "U", "asin": "variant", "parent_asin": "P", "rating": 3.0, "timestamp": 1588687728923}
    write(
        new,
        Toys__jsonl=jsonl(review),
        meta_Toys__jsonl=jsonl({"parent_asin": "P", "title": "Parent", "categories": ["Toys"], "main_category": "x"}),
    )
    raw = read("amazon", new)
    assert events(raw) == [("U", "P", 1588687728923)]
    assert raw.catalogue.groups == (("Toys",),)


# --- LLaRA, S-DPO, sequences -----------------------------------------------------------------------------------------


@pytest.fixture
def sessions(tmp_path) -> pathlib.Path:
    return write(
        tmp_path,
        id2name__txt="".join(f"{i}::Name {i}\n" for i in range(9)),
        sessions__tsv="split\tuser\titems\ntrain\ta\t0 1 2\nval\tb\t3 4 5 6\ntest\tc\t6 7 8 0\ntest\td\t1 2 3\n",
    )


def splits(raw: sources.RawLog) -> dict[str, list[int]]:
    log = raw.interactions
    return {user: log.split_E[log.user_E == i].tolist() for i, user in enumerate(raw.users)}


def test_llara_without_ready_rows_takes_the_last_step(sessions):
    raw = read("llara", sessions)
    assert splits(raw) == {"a": [0, 0, 0], "b": [-1, -1, -1, 1], "c": [-1, -1, -1, 2], "d": [-1, -1, 2]}
    assert events(raw)[3:7] == [("b", "3", 0), ("b", "4", 1), ("b", "5", 2), ("b", "6", 3)]
    assert raw.frozen_rows is None and not raw.timed


def test_llara_ready_rows(sessions):
    write(
        sessions,
        val__jsonl=jsonl({"seq": [3, 4, 99], "next": 5}),
        test__jsonl=jsonl({"seq": [1, 2], "next": 3}, {"seq": [8], "next": 0}, {"user": "a", "seq": [5], "next": 6}),
    )
    raw = read("llara", sessions)
    assert splits(raw) == {"a": [0, 0, 0], "b": [-1] * 4, "c": [-1] * 4, "d": [-1] * 3, "test:2": []}
    assert raw.frozen_rows["validation"] == [(1, (3, 4), 5, None)]  # without the unknown 99
    assert raw.frozen_rows["test"] == [(3, (1, 2), 3, None), (4, (8,), 0, None), (0, (5,), 6, None)]
    assert raw.repairs == {"history items of a ready-made evaluation row that have no title: dropped": 1}


def test_llara_without_sessions_reads_train_rows_as_sequences(sessions):
    (sessions / "sessions.tsv").unlink()
    with pytest.raises(UserError, match=r"no sessions.tsv"):
        read("llara", sessions)
    write(sessions, train_sample__jsonl=jsonl({"seq": [0, 1], "next": 2}, {"seq": [], "next": 3}))
    raw = read("llara", sessions)
    assert splits(raw) == {"train:1": [-1, -1, 0], "train:2": [0]}


def test_sdpo_rows(sessions):
    rows = [
        {"historyList": "Name 6::Name 7", "itemList": ["Name 1", " Name  8", "Name 2"], "trueSelection": "Name 8"},
        {"historyList": "Name 1", "itemList": ["Name 2", "Name 3"], "trueSelection": "Name 2"},
    ]
    write(sessions, **{"x-test__json": json.dumps(rows, indent=1)})
    raw = read("llara", sessions)
    assert raw.frozen_rows == {"test": [(2, (6, 7), 8, (1, 8, 2)), (3, (1,), 2, (2, 3))]}
    assert splits(raw)["b"] == [-1, -1, -1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.jsonl", jsonl({"seq": [1], "next": 99}), "test.jsonl: row 1: item '99' is not in .*id2name.txt"),
        ("test.jsonl", jsonl({"seq": [1]}), "test.jsonl: row 1 has no column 'next'"),
        ("test.jsonl", jsonl({"seq": "1 2", "next": 1}), "test.jsonl: row 1: seq is not a list"),
        ("x-test.json", "{}", "x-test.json: not a JSON list of objects with historyList"),
        ("x-test.json", "[3]", "x-test.json: row 1 is not a JSON object"),
        ("x-test.json", '[{"prompt": "a"}]', "row 1 has no column 'historyList' .it has: prompt"),
        (
            "x-test.json",
            json.dumps([{"historyList": "Name 1", "itemList": ["Name 2"], "trueSelection": "Nome"}]),
            "x-test.json: row 1: title 'Nome' is not in .*id2name.txt",
        ),
        (
            "x-test.json",
            json.dumps([{"historyList": "", "itemList": ["Name 2"], "trueSelection": "Name 3"}]),
            "x-test.json: row 1: the candidates are not distinct items with the target among them",
        ),
        ("id2name.txt", "0:Name\n", "id2name.txt: row 1 is not ID::TITLE"),
        ("sessions.tsv", "split\tuser\n", "no interactions; it has no rows"),
        ("sessions.tsv", "split\tuser\ntrain\ta\n", "sessions.tsv: row 2 has no column 'items'"),
        ("sessions.tsv", "split\tuser\titems\ndev\ta\t1\n", "row 2: split 'dev' is none of train, val, test"),
        ("sessions.tsv", "split\tuser\titems\ntrain\ta\t1\ntest\ta\t1\n", "row 3: user 'a' has a sequence already"),
        ("sessions.tsv", "split\tuser\titems\ttimestamps\ntrain\ta\t1 2\t5\n", "row 2 has 1 timestamps for 2 items"),
        ("sessions.tsv", "split\tuser\titems\ttimestamps\ntrain\ta\t1 2\t5 x\n", "row 2: timestamps 'x' is not"),
    ],
)
def test_bad_llara_files(sessions, name, content, message):
    (sessions / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read("llara", sessions)


def test_two_files_of_ready_rows_are_refused(sessions):
    write(sessions, test__jsonl=jsonl({"seq": [1], "next": 2}), **{"x-test__json": "[]"})
    with pytest.raises(UserError, match=r"several files of test rows: test.jsonl, x-test.json; keep one"):
        read("llara", sessions)


def test_sequences(sessions):
    raw = read("sequences", sessions)  # sessions.tsv: every step of a user belongs to the user's split
    assert splits(raw) == {"a": [0, 0, 0], "b": [1] * 4, "c": [2] * 4, "d": [2] * 3}
    (sessions / "sessions.tsv").unlink()
    (sessions / "id2name.txt").unlink()
    header = "user\ttrain_idx\tval_idx\ttest_idx\titems\n"
    write(
        sessions,
        id2title__txt="0||A || B\n1||\n2||C\n",
        sequences__tsv=header + "u\t0,1\t\t2,2\t0 1 2\nv\t\t1,1\t\t2 1 0\n",
    )
    raw = read("sequences", sessions)
    assert splits(raw) == {"u": [0, 0, 2], "v": [-1, 1, -1]}
    assert raw.catalogue.titles == ("A || B", "untitled 1", "C")
    for bounds in ("0", "0,3", "2,1", "-1,1", "a,b"):
        write(sessions, sequences__tsv=header + f"u\t{bounds}\t\t\t0 1 2\n")
        with pytest.raises(UserError, match=r"row 2: train_idx .* is not START,END with both among 0..2"):
            read("sequences", sessions)
    (sessions / "sequences.tsv").unlink()
    with pytest.raises(UserError, match=r"no sequences.tsv or sessions.tsv here"):
        read("sequences", sessions)


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------

TFDS = """
import sys
import numpy as np, tensorflow_datasets as tfds
from rosepo_jax.config import default
from rosepo_jax.data import sources
from rosepo_jax.errors import UserError

class TinyLog(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"user_id": tfds.features.Text(), "movie_id": tfds.features.Scalar(np.int64),
                    "movie_title": tfds.features.Text(), "timestamp": tfds.features.Scalar(np.int64),
                    "user_rating": tfds.features.Scalar(np.float32),
                    "genres": tfds.features.Sequence(tfds.features.Text())}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, dl):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(4):
            yield i, {"user_id": f"0{i % 2}", "movie_id": i // 2, "movie_title": f"Café {i // 2}", "timestamp": 10 + i,
                      "user_rating": float(i), "genres": ["War", "Art"][: i // 2]}

data = default().data
data.source, data.path = "tfds:tiny_log", sys.argv[1]
data.columns.update({"user": "user_id", "item": "movie_id", "title": "movie_title", "rating": "user_rating",
                     "groups": "genres"})
for _ in range(2):  # the first prepares, the second reads
    raw = sources.read(data, 0)
    log = raw.interactions
    rows = sorted((raw.users[u], raw.catalogue.ids[i], t, r) for u, i, t, r in
                  zip(log.user_E, log.item_E, log.timestamp_E.tolist(), log.rating_E.tolist()))
    assert rows == [("00", "0", 10, 0), ("00", "1", 12, 2), ("01", "0", 11, 1), ("01", "1", 13, 3)], rows
    assert dict(zip(raw.catalogue.titles, raw.catalogue.groups)) == {"Café 0": (), "Café 1": ("War",)}
for name in ("tiny_log/none", "no_such_set"):
    data.source = "tfds:" + name
    try:
        sources.read(data, 0)
    except UserError as error:
        assert f"data.source: tfds:{name} cannot be read" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(name)
assert "tensorflow" not in sys.modules
"""


def test_tfds(tmp_path):
    result = subprocess.run([sys.executable, "-c", TFDS, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


# --- the real logs ---------------------------------------------------------------------------------------------------


def role_counts(raw: sources.RawLog) -> dict[int, int]:
    roles, counts = np.unique(raw.interactions.split_E, return_counts=True)
    return dict(zip(roles.tolist(), counts.tolist()))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("source", "folder", "users", "items", "interactions"),
    [
        ("movielens", "movietweetings-100k", 16_554, 10_506, 100_000),
        ("movielens", "ml-latest-small", 610, 9_742, 100_836),
        ("llara", "llara-movielens", 943, 1_682, 82_520),
        ("llara", "llara-lastfm", 1_220, 4_606, 56_794),
    ],
)
def test_real_logs_have_their_published_size(real_data, source, folder, users, items, interactions):
    raw = read(source, real_data / folder)
    assert (len(raw.users), len(raw.catalogue), len(raw.interactions)) == (users, items, interactions)
    assert len(np.unique(raw.interactions.user_E)) == users


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "users", "items", "targets"),
    [
        ("patchrec-goodreads", 2_090, 8_793, {0: 156_037, 1: 3_251, 2: 3_251}),
        ("patchrec-ml-1m", 6_038, 3_883, {0: 552_269, 1: 11_506, 2: 11_506}),
    ],
)
def test_real_sequences_have_their_published_size(real_data, folder, users, items, targets):
    raw = read("sequences", real_data / folder)
    assert (len(raw.users), len(raw.catalogue), role_counts(raw)) == (users, items, targets)


@pytest.mark.real_data
def test_movietweetings_is_read_in_two_seconds(real_data):
    started = time.process_time()
    raw = read("movielens", real_data / "movietweetings-100k")
    assert time.process_time() - started < 2
    again = read("movielens", real_data / "movietweetings-100k")
    assert (again.users, again.catalogue.ids, again.repairs) == (raw.users, raw.catalogue.ids, raw.repairs)
    np.testing.assert_array_equal(again.interactions.item_E, raw.interactions.item_E)
    assert raw.repairs[DUPLICATE] == 5 and all(len(id) == 7 for id in raw.catalogue.ids)
    assert raw.catalogue.find_title("Skyfall") == raw.catalogue.index_of_id("1074638")


@pytest.mark.real_data
def test_real_splits(real_data):
    movielens = read("llara", real_data / "llara-movielens")
    assert role_counts(movielens)[0] == 68_389 and movielens.timed
    assert {name: len(rows) for name, rows in movielens.frozen_rows.items()} == {"validation": 94, "test": 95}
    assert movielens.repairs[EMPTY] == 1 and movielens.catalogue.titles[266] == "untitled 266"
    lastfm = read("llara", real_data / "llara-lastfm")
    assert role_counts(lastfm)[0] == 50_800
    assert [row.user for row in lastfm.frozen_rows["test"]] == list(
        range(1_098, 1_220)
    )  # one row a test user, in order
    sdpo = read("llara", real_data / "sdpo-lastfm")
    assert {name: len(rows) for name, rows in sdpo.frozen_rows.items()} == {"validation": 2_767, "test": 2_495}
    assert {len(row.candidates) for row in sdpo.frozen_rows["test"]} == {20}
    assert len(np.unique([row.user for row in sdpo.frozen_rows["test"]])) <= 122
    steam = read("llara", real_data / "llara-steam")
    assert role_counts(steam)[0] == 1_000 and len(steam.frozen_rows["test"]) == 1_194


@pytest.mark.real_data
def test_u_item_of_the_real_100k(real_data, tmp_path):
    (tmp_path / "u.item").write_bytes((real_data / "llara-movielens" / "u.item").read_bytes())
    write(tmp_path, u__data="1\t1\t5\t10\n")
    raw = read("movielens", tmp_path)
    assert len(raw.catalogue) == 1_682
    assert raw.catalogue.titles[0] == "Toy Story (1995)"
    assert raw.catalogue.groups[0] == ("Animation", "Children's", "Comedy")
