"""The page is well-formed, self-contained, safe and reproducible, and shows every number of the results."""

import copy
import html.parser
import itertools
import re
from html import escape

import numpy as np
import pytest
import reported
from reported import cell, compare, metrics, results

from rosepo_jax.evaluation import page as pages
from rosepo_jax.evaluation import plots, report

HOSTILE = "<script>alert(\"x\")</script> & 'Sons' $x^2$"
HEADINGS = [
    "Paired tests",
    "Beside published figures",
    "All metrics",
    "True preferences",
    "Which rows are hit",
    "Does it read its prompt?",
    "Biases",
    "Calibration",
    "Examples",
    "Learning curves",
    "Speed and memory",
    "Preference pairs",
    "Data",
    "How it was made",
]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is closed out of order or never; keeps every attribute and all text."""

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: list[str | None] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def material():
    titles = (HOSTILE, *reported.TITLES[1:3], HOSTILE.upper(), *reported.TITLES[4:])
    statistics = {"users": 40, "repairs": {HOSTILE: 2}}
    return reported.material(catalogue=reported.catalogue(titles), statistics=statistics)


@pytest.fixture(scope="module")
def page(material):
    return pages.html(material)


@pytest.fixture(scope="module")
def parsed(page):
    return Balanced(page)


@pytest.fixture(scope="module")
def words(parsed):
    return " ".join(" ".join(parsed.text).replace("\u00a0", " ").split())


def test_page_is_well_formed(page, parsed):
    assert page.startswith("<!DOCTYPE html>")
    assert {"h1", "nav", "table", "svg", "figure", "mark", "details"} <= set(parsed.tags)
    assert len(parsed.ids) == len(set(parsed.ids)) > 0


def test_page_is_self_contained(page, parsed):
    assert not set(parsed.tags) & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video"}
    for name, value in parsed.attributes:
        if name in ("href", "src", "xlink:href", "action", "data"):
            assert (value or "").startswith("#") and value[1:] in parsed.ids
        assert not name.startswith("on")
        assert "url(" not in (value or "").replace("url(#", "")
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_headings_are_in_order_and_every_picture_has_a_name(parsed):
    levels = [int(tag[1]) for tag in parsed.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - level <= 1 for level, later in itertools.pairwise(levels))
    names = [value for name, value in parsed.attributes if name == "aria-label" and value != "table"]
    pictures = parsed.tags.count("svg")
    assert pictures >= 15 and len(set(names)) == len(names) == pictures + 1  # and the contents


def test_contents_lead_to_every_section(page, parsed):
    links = [value[1:] for name, value in parsed.attributes if name == "href"]
    sections = re.findall(r'<section>\n<h2 id="(s\d+)">([^<]+)</h2>', page)
    assert [id for id in links if id in dict(sections)] == list(dict(sections))
    assert [heading for _, heading in sections] == HEADINGS


def test_hostile_text_is_escaped(page, parsed):
    assert "<script" not in page.lower()
    assert escape(HOSTILE) in page and HOSTILE in "".join(parsed.text)
    assert "<b>25" in "".join(parsed.text)  # a user


def test_hostile_model_and_protocol_names_are_escaped():
    found = results()
    found["protocols"] = {
        "<i>": {"hash": "<u>", "n": 2, "models": {"<s>": {"HR@1": cell(0.5, 2), "<em>": cell(0.1, 2)}}},
        "candidates": {"hash": "c", "n": 2290, "models": {"$<s>$": metrics(0.1, 1.0)}},
    }
    found["comparisons"] = [compare("<em>", "<s>", 0.1, 0.5, "<i>") | {"test": "<q>"}]
    found["protocols"]["<i>"]["models"]["<s>"]["MRR"] = {"value": 0.1, "ci95": ["<sub>", "<sup>"], "n": "<kbd>"}
    found |= {"defects": ["<del>"], "notes": ["<ins>"], "probes": {"<s>": {}}}
    parsed = Balanced(pages.html(reported.material(results=found, metrics={}, pairs={})))
    assert not set(parsed.tags) & {"i", "u", "s", "em", "q", "del", "ins", "sub", "sup", "kbd"}


def test_same_material_gives_the_same_bytes(material, page):
    assert pages.html(copy.deepcopy(material)) == page


def test_only_results_are_needed():
    found = {"protocols": {"generate": results()["protocols"]["generate"]}}
    page = pages.html(report.Material(found))
    Balanced(page)
    assert [heading for heading in HEADINGS if f">{heading}</h2>" in page] == ["All metrics", "How it was made"]


def test_page_holds_the_numbers_of_the_results(words):
    for text in (
        "0.448 [0.428, 0.468]",
        "+0.041 [+0.022, +0.060] 0.0002 0.0008 0.0002 2,290 0.027",
        "p: paired permutation test. Same rows",
        "−0.300 [−0.319, −0.281]",
        "certified lists proved equal to scoring every title 0.985",
        "0.742",
        "0.513 [0.493, 0.533]",
        "hash c4nd",
        "0.10.2",
        "candidates , n = 2,290: every title of the row's frozen list is scored (20 titles, drawn uniform)",
        "0.050 [0.030, 0.070] n = 31",  # a metric of fewer rows
        "43,510",
        "0.448 · 0.440 · 0.452 · 0.446",
        "align 300.0 5,000.0 0.930 2.000 0.400 0.009 1.500 12.500 Median of the log lines",
    ):
        assert text in words, text


def test_defects_come_before_any_number_of_a_model(words):
    assert words.index("one hit is 0.0082") < words.index("0.380 [0.360, 0.400]")


def test_published_rows_are_apart_from_ours(words):
    theirs = words.index("LLaRA (SASRec) 0.451 [0.365, 0.539] 1.000 [1.000, 1.000] 122 arXiv 2312.02445")
    ours = words.index("aligned 0.075 [0.055, 0.095] 0.910 [0.890, 0.930] 1,000 generate: free answer, substring rule")
    assert words.index("LLaRA, LastFM, as printed (n = 122)") < theirs < words.index("This run", theirs) < ours


def test_page_says_which_users_the_examples_are(words):
    chosen, _ = report.examples(
        reported.predictions(lambda u: u % 2), reported.predictions(lambda u: u // 2 % 2), reported.catalogue()
    )
    assert f"Shown are users {', '.join(row['user'] for row in chosen)}: of every kind the first two by" in words


def test_a_table_leaves_out_columns_that_say_nothing_and_sets_numbers_right():
    table = pages.table(["a", "b", "c", "d"], [["x", "-", "1", "y"], ["z", "-", "-", "2"]])
    assert table.count("<th scope") == 5 and ">b<" not in table
    assert table.count('class="n"') == 3 and '<td class="n">1</td>' in table and "<td>2</td>" in table
    assert pages.table(["a", "b"], []) == ""


def test_plots_survive_empty_points():
    empty = {"sft": [{"value": None, "n": 0}] * 10}
    ticks = [str(place) for place in range(10)]
    assert "<svg" in plots.by_class({**empty, "aligned": [cell(0.4)] * 10}, ticks, report.MODELS, "d", "x")
    assert "<svg" in plots.curves([{"step": 0, "loss": None}], ["loss"], "c")
    assert "<svg" in plots.epsilons({"all": np.zeros(3)}, "e")
    assert plots.intervals({"HR@1": {}}, {}, "i") == plots.slots({}, {}, "s") == ""
