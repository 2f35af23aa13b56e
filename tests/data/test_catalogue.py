"""The catalogue: normal form of titles, title groups, look-ups with suggestions, the file."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax.data.catalogue import Catalogue, normalise
from rosepo_jax.errors import UserError


def catalogue(*titles: str, counts=None) -> Catalogue:
    return Catalogue(
        ids=tuple(f"{i:04d}" for i in range(len(titles))),
        titles=titles,
        groups=tuple(("Drama", "War") if i % 2 else () for i in range(len(titles))),
        count_I=np.array(counts if counts is not None else [0] * len(titles), np.int64),
    )


@pytest.mark.parametrize(
    ("title", "normal"),
    [
        ("  Toy   Story\t(1995) ", "toy story (1995)"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁlm ①", "film 1"),
        ("Cafe\u0301", "café"),
        ("a\u00a0b", "a b"),
        ("", ""),
    ],
)
def test_normalise(title, normal):
    assert normalise(title) == normal


@given(st.text())
def test_normalise_is_idempotent(title):
    assert normalise(normalise(title)) == normalise(title)


@given(st.lists(st.sampled_from(["Alien", "ALIEN", " alien ", "Aliens", "Heat", "heat", "É", "E\u0301"])))
def test_title_groups_are_the_first_equal_title(titles):
    group_I = catalogue(*titles).title_group_I
    assert group_I.dtype == np.int64 and group_I.shape == (len(titles),)
    for item, title in enumerate(titles):
        assert group_I[item] == [normalise(t) for t in titles].index(normalise(title))


def test_find_title():
    items = catalogue(
        "Skyfall (2012)", "Argo (2012)", "Heat (1995)", "Heat (1986)", "The Thing", "the  thing", "(2012)"
    )
    assert items.find_title("argo  (2012)") == 1
    assert items.find_title("Skyfall") == 0
    assert items.find_title("THE THING") == 4  # the lowest of two equal titles
    assert items.find_title("(2012)") == 6
    with pytest.raises(UserError, match=r"'Heat' is ambiguous; nearest titles: 'Heat \(1995\)', 'Heat \(1986\)'$"):
        items.find_title("Heat")
    with pytest.raises(UserError, match="not in the catalogue") as error:
        items.find_title("Skyfal (2012)")
    assert "nearest titles: 'Skyfall (2012)', " in str(error.value)
    assert str(error.value).count("', '") == 2 and "\n" not in str(error.value)


def test_find_title_where_one_title_has_no_year():
    items = catalogue("Heat", "Heat (1995)")
    assert items.find_title("heat") == 0


def test_index_of_id():
    items = catalogue("a", "b")
    assert items.index_of_id("0001") == 1
    with pytest.raises(UserError, match="'1' is not in the catalogue of 2 items"):
        items.index_of_id("1")


def test_save_and_load(tmp_path):
    path = tmp_path / "catalogue.jsonl"
    items = catalogue("Amélie", "Line\u2028separator", 'quote " and \\', counts=[3, 0, 7])
    items.save(path)
    again = Catalogue.load(path)
    assert (again.ids, again.titles, again.groups) == (items.ids, items.titles, items.groups)
    np.testing.assert_array_equal(again.count_I, [3, 0, 7])
    assert again.count_I.dtype == np.int64
    first = json.loads(path.read_text("utf-8").split("\n")[0])
    assert first == {"item": 0, "id": "0000", "title": "Amélie", "groups": [], "count": 3}


def test_load_names_the_bad_row(tmp_path):
    path = tmp_path / "catalogue.jsonl"
    row = {"item": 0, "id": "a", "title": "A", "groups": [], "count": 1}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "b"}) + "\n")
    with pytest.raises(UserError, match=r"catalogue.jsonl: row 2 holds item 0, not 1"):
        Catalogue.load(path)
    path.write_text(json.dumps({"item": 0, "id": "a", "groups": [], "count": 1}) + "\n")
    with pytest.raises(UserError, match="row 1: title is missing"):
        Catalogue.load(path)
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"item": 1}) + "\n")
    with pytest.raises(UserError, match="two with the same id"):
        Catalogue.load(path)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="one entry an item"):
        Catalogue(("a",), ("A", "B"), ((), ()), np.zeros(2, np.int64))
