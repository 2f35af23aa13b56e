"""Forms of JSON: what fits, and where it says that something does not."""

import dataclasses
from typing import Any

import pytest

from rosepo_jax import forms
from rosepo_jax.errors import UserError

FORM = {"name": str, "sizes": [int, 2], "cell?": (None, float, {"value": float}), "rows": {str: [{"id": (None, str)}]}}
FITS = {"name": "a", "sizes": [1, -2], "rows": {"x": [{"id": None, "more": 1}], "y": []}, "more": [[]]}


@pytest.mark.parametrize("more", [{}, {"cell": None}, {"cell": 2}, {"cell": 0.5}, {"cell": {"value": 1}}])
def test_what_fits(more):
    assert forms.check(FITS | more, FORM, "f.json", "again") == FITS | more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name is not a text"),
        ({"sizes": [1]}, "sizes is not a list of 2"),
        ({"sizes": [1, True]}, r"sizes\[1\] is not a whole number"),
        ({"sizes": [1, 2**63]}, r"sizes\[1\] is not a whole number"),
        ({"sizes": {}}, "sizes is not a list"),
        ({"cell": {"value": None}}, "cell.value is not a number"),
        ({"cell": 1e200}, "cell is not"),
        ({"cell": 10**400}, "cell is not"),
        ({"rows": {"x": [{}]}}, r"rows.x\[0\].id is missing"),
        ({"rows": []}, "rows is not an object"),
    ],
)
def test_what_does_not_is_named(change, message):
    with pytest.raises(UserError, match=rf"^f.json: {message}.*; again$"):
        forms.check(FITS | change, FORM, "f.json", "again")


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"f.json: name is missing; again"):
        forms.check({}, FORM, "f.json", "again")


@dataclasses.dataclass
class Shape:
    width: int
    scale: float = 1.0
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[str, Any], ...] | None = None


def test_the_form_of_a_dataclass():
    form = forms.of(Shape)
    assert forms.misfit({"width": 1}, form) == ""
    assert forms.misfit({"width": 1, "scale": 2, "names": ["a"], "pairs": [["k", 1]]}, form) == ""
    assert forms.misfit({"scale": 1.0}, form) == "width is missing"
    assert forms.misfit({"width": 1, "height": 2}, form) == "height is not known"
    assert forms.misfit({"width": 1, "pairs": [["k"]]}, form) == "pairs[0] is not a list of 2"
