"""Free text is matched exactly; what is no answer says why; the substring rule of the literature stays apart."""

import numpy as np
import pytest

from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation import matching

TITLES = ("Alien", "Aliens", "Heat", "HEAT ", "Café", "Up", "Supper")
CATALOGUE = Catalogue(tuple("abcdefg"), TITLES, ((),) * 7, np.zeros(7, np.int64))


def rows(n):
    """The history holds Up; the candidates are Aliens (the target), Alien, Heat and Café."""
    one = np.ones(n, np.int32)
    return Rows(one, one, np.array([[5, -1]] * n), one, np.array([[1, 0, 2, 4]] * n))


def read(*texts, ended=True):
    return matching.read(texts, [ended] * len(texts), CATALOGUE, rows(len(texts)))


@pytest.mark.parametrize(
    ("text", "item", "status"),
    [
        ("Aliens", 1, "candidate"),
        ("  aLIENS  \nand more", 1, "candidate"),
        ("Cafe\u0301", 4, "candidate"),
        ("heat", 2, "candidate"),
        ("Supper", 6, "not_a_candidate"),
        ("Up", 5, "history_copy"),
        ("Aliens!", -1, "not_in_catalogue"),
        ("the film Alien", -1, "not_in_catalogue"),
        ("", -1, "empty"),
        (" \nAlien", -1, "empty"),
    ],
)
def test_an_answer_is_its_normalised_first_line(text, item, status):
    found = read(text)
    assert (found.ranked_ExK.tolist(), found.status) == ([[item]], [status])
    assert status in matching.STATUSES


def test_what_was_cut_off_is_no_answer_though_its_beginning_is_a_title():
    assert read("Alien", ended=False).status == ["truncated"]
    assert read("Alien", ended=False).ranked_ExK.tolist() == [[-1]]
    assert read("Alien\nAnd", ended=False).status == ["candidate"]  # the line had ended


def test_a_title_of_several_items_is_ambiguous_and_the_lowest_stands_for_all():
    found = read("HEAT", "Alien", "nothing")
    assert found.ambiguous_E.tolist() == [True, False, False] and found.ranked_ExK[0, 0] == 2


@pytest.mark.parametrize(
    ("text", "slot"),
    [
        ("I would say Alien.", 1),
        ("Aliens", -1),  # holds Alien too: the literature cannot find it right
        ("Heat or Café", -1),
        ("theatre", 2),  # Heat stands inside it
        ("no title", -1),
        ("first line\nHeat", -1),
    ],
)
def test_the_substring_rule_is_the_literatures_with_its_faults(text, slot):
    assert read(text).substring_E.tolist() == [slot]
