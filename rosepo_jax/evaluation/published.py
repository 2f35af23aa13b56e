"""Published tables, as printed, with the intervals that their test sizes allow and the defects that are known."""

import importlib.resources
import json

from rosepo_jax.errors import UserError, nearest
from rosepo_jax.evaluation import significance

FIGURES = ("HR@1", "valid_ratio")


def table(name: str) -> dict:
    """The published table `name` for `results.json`: title, n, how it was measured, defects, rows with `cell`s.

    An interval is Wilson's, of the whole number of hits that the printed share stands for; where there is none, the
    figure cannot be a share of these n rows, and has no interval.
    Errors: UserError for an unknown name.
    """
    text = importlib.resources.files("rosepo_jax.evaluation").joinpath("published.json").read_text("utf-8")
    tables = json.loads(text)
    if name not in tables:
        raise UserError(f"evaluate.published: no table {name!r}{nearest(name, tables)}; there are {', '.join(tables)}")
    found = tables[name]
    rows = [row | {key: _cell(row[key], found["n"]) for key in FIGURES if key in row} for row in found["rows"]]
    return found | {"rows": rows}


def _cell(value: float, n: int) -> dict:
    hits = round(value * n)
    if round(hits / n, 4) != round(value, 4):
        return {"value": value, "ci95": None, "n": None}
    return {"value": hits / n, "ci95": list(significance.wilson(hits, n)), "hits": hits, "n": n}
