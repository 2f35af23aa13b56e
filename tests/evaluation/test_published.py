import pytest

from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import published, significance


def test_a_printed_share_gets_the_interval_of_its_hits():
    """.4526 of 95 rows is 43 hits, [.356, .553]; .5246 of 122 is 64, [.437, .611]."""
    movies, music = published.table("llara-movielens"), published.table("llara-lastfm")
    cell = movies["rows"][-1]["HR@1"]
    assert (cell["hits"], cell["n"]) == (43, 95) and cell["ci95"] == list(significance.wilson(43, 95))
    assert cell["ci95"] == pytest.approx([0.356, 0.553], abs=5e-4)
    assert music["rows"][-1]["HR@1"]["ci95"] == pytest.approx([0.437, 0.611], abs=5e-4)


def test_a_figure_that_is_no_share_of_the_rows_has_no_interval():
    sasrec = next(row for row in published.table("llara-lastfm")["rows"] if row["model"] == "SASRec")
    assert sasrec["HR@1"] == {"value": 0.2233, "ci95": None, "n": None}  # 27 hits are .2213, 28 are .2295


def test_an_unknown_table_is_named():
    with pytest.raises(UserError, match=r"no table 'llara-lastm'; did you mean llara-lastfm|llara-lastfm"):
        published.table("llara-lastm")
