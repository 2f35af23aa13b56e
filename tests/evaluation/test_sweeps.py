"""A sweep's rows as a table, means over seeds, and a page whose plots read without colour."""

import re

import numpy as np
import pytest
from test_page import Balanced

from rosepo_jax import config as defaults
from rosepo_jax.evaluation import plots, sweeps

HOSTILE = "<script>alert(1)</script> & $x^2$"


def row(settings, validation, error=None, **figures):
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    empty = dict.fromkeys(sweeps.FIGURES)
    return {"run": name, "settings": settings, "error": error, **empty, "validation_hr1": validation, **figures}


def grid(betas=(0.05, 0.1, 1.0), modes=("oracle", "none")):
    return [
        row({"align.beta": b, "align.smoothing.mode": m}, 0.3 + 0.01 * i + 0.002 * j, hr1=0.4 - 0.01 * i)
        for i, b in enumerate(betas)
        for j, m in enumerate(modes)
    ]


def page(rows):
    return sweeps.html(sweeps.summary(rows), defaults.default().to_dict())


def test_best_first_failed_last():
    rows = [*grid(), row({"align.beta": 9}, None, "unlucky"), row({"align.beta": 8}, None)]
    found = sweeps.summary(rows)
    assert found["best"] == {"align.beta": 1.0, "align.smoothing.mode": "none"}
    assert [r["validation_hr1"] for r in found["runs"][:3]] == [pytest.approx(v) for v in (0.322, 0.320, 0.312)]
    assert [r["settings"]["align.beta"] for r in found["runs"][-2:]] == [8, 9]
    lines = sweeps.text(found).splitlines()
    assert lines[1].split("  ")[0] == "align.beta" and "true win rate" not in lines[1]
    assert lines[-1] == "align.beta=9: failed: unlucky"
    assert sweeps.summary([row({}, None, "unlucky")])["best"] is None


def test_runs_that_differ_in_their_seed_alone_are_averaged():
    def seeded(beta, seed, hr1, error=None):
        return row({"align.beta": beta, "seed": seed}, hr1 - 0.1, error, hr1=hr1)

    rows = [seeded(0.1, 1, 0.30), seeded(0.1, 0, 0.34), seeded(0.5, 0, 0.50), seeded(0.5, 1, 0.54)]
    rows.append(seeded(0.5, 2, 0.0, "unlucky"))
    found = sweeps.summary(rows)
    groups = found["over_seeds"]
    assert [(group["settings"], group["seeds"]) for group in groups] == [
        ({"align.beta": 0.5}, [0, 1]),
        ({"align.beta": 0.1}, [0, 1]),
    ]
    assert found["best"] == {"align.beta": 0.5}
    assert groups[1]["hr1"]["mean"] == pytest.approx(0.32) and groups[1]["hr1"]["sd"] == pytest.approx(0.02 * 2**0.5)
    assert groups[1]["hr1"]["values"] == {0: 0.34, 1: 0.30} and groups[0]["ndcg5"] is None
    words = sweeps.seeds_table(groups).splitlines()[3].split()
    assert words == ["0.5", "0", "1", "0.4200", "±", "0.0283", "0.5200", "±", "0.0283"]
    assert sweeps.over_seeds([{**rows[0], "settings": {"align.beta": 0.1}}]) == []
    assert "0.4200 ± 0.0283" in page(rows)


def test_the_page_is_self_contained_and_safe():
    rows = [*grid(modes=("oracle", HOSTILE)), row({"align.beta": HOSTILE}, None, HOSTILE)]
    text = page(rows)
    parsed = Balanced(text)
    assert not set(parsed.tags) & {"script", "link", "img", "image", "iframe"} and HOSTILE not in text
    assert "http://" not in text and "https://" not in text and "url(" not in text.replace("url(#", "")
    assert len(parsed.ids) == len(set(parsed.ids)) and not any(name.startswith("on") for name, _ in parsed.attributes)
    assert text == page(rows)


def test_two_settings_are_a_heat_map_with_its_values_in_words():
    text = page(grid())
    parsed = Balanced(text)
    names = [value for name, value in parsed.attributes if name == "aria-label" and value.startswith("Heat map")]
    assert len(names) == 2  # validation and test; nothing has a true win rate
    assert "Heat map of validation HR@1. align.beta 0.05, align.smoothing.mode none: 0.302;" in names[0]
    assert names[0].count(": 0.3") == 6
    drawn = [word for word in parsed.text if re.fullmatch(r"0\.3\d\d", word)]
    assert {"0.300", "0.302", "0.310", "0.312", "0.320", "0.322"} <= set(drawn)
    assert "Best settings: align.beta = 1.0, align.smoothing.mode = none." in text.replace("\u00a0", " ")


def test_words_in_cells_can_be_read_on_their_colours():
    svg = plots.heat_map("f", "x", "y", {(x, 0): x / 20 for x in range(21)})
    cells = [luminance(colour) for colour in re.findall(r"fill: #(\w{6}); stroke: #\1", svg)[:21]]
    styles = re.findall(r'<text style="([^"]*)"[^>]*>[01]\.\d{3}<', svg)
    inks = [luminance((re.findall(r"fill: #(\w{6})", style) or ["000000"])[0]) for style in styles]
    assert len(cells) == len(inks) == 21
    assert cells == sorted(cells) and cells[-1] - cells[0] > 0.5  # in grey too
    for cell, ink in zip(cells, inks):
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) > 4.4


def luminance(colour):
    """As WCAG defines it; contrast 4.5 is its level AA."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (0, 2, 4)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def test_places_without_a_figure_say_so():
    cells = {(0.1, "a"): 0.3, (0.1, "b"): None, (1.0, "b"): 0.3}
    svg = plots.heat_map("f", "x", "y", cells)
    assert "no figure" in svg and "not run" in svg and svg.count("0.300") >= 2
    assert plots.heat_map("f", "x", "y", {(1, 2): None, (2, 2): None}).count("no figure") == 2


def test_one_setting_is_a_line_and_words_are_dots():
    numbers = plots.against("f", "beta", [(0.1, 0.3), (0.1, 0.4), (3.0, 0.5)], line=True)
    words = plots.against("f", "mode", [("none", 0.3), ("oracle", 0.5)], line=True)
    assert 'aria-label="f by beta. 0.1: 0.350; 3: 0.500"' in numbers and 'none: 0.300; oracle: 0.500"' in words
    assert numbers.count("stroke-width: 1.1") == 1 and "stroke-width: 1.1" not in words
    assert plots.against("f", "beta", [], line=True) == ""
    many = plots.against("f", "beta", [(10.0**-n, 0.3) for n in range(12)], line=False)
    assert "mathdefault" not in many and "1e-05" in many
    text = page([row({"align.beta": b}, 0.3, true_win_rate=0.8) for b in (0.1, 0.2)])
    assert text.count("<svg") == 2 and "true win rate by align.beta" in text


def test_axes_leave_out_seeds_and_join_what_moves_together():
    rows = [
        row({"align.beta": b, "sft.learning_rate": b / 1000, "sft.length": "9 steps", "seed": s}, 0.3)
        for b in (0.1, 0.3)
        for s in (0, 1)
    ]
    axes = sweeps.axes_of(rows)
    assert list(axes) == ["align.beta, sft.learning_rate"]
    assert set(axes["align.beta, sft.learning_rate"].values()) == {"0.1 : 0.0001", "0.3 : 0.0003"}
    mixed = [row({"align.smoothing.mode": "none"}, 0.3), row({"align.smoothing.mode": "fixed", "x": 0.1}, 0.3)]
    assert set(sweeps.axes_of(mixed)["x"].values()) == {"as configured", 0.1}
    assert sweeps.axes_of(rows[:1]) == {}


def test_many_or_scattered_settings_are_dots():
    drawn = [row({"a": 0.1 * n, "b": (7 * n) % 10}, 0.3) for n in range(10)]
    assert list(sweeps.axes_of(drawn)) == ["a", "b"]  # no value comes twice: nothing says that they move together
    assert page(drawn).count("<svg") == 2 and "Heat map" not in page(drawn)
    three = [row({"a": a, "b": b, "c": c}, 0.3) for a in (1, 2) for b in (1, 2) for c in (1, 2)]
    assert page(three).count("<svg") == 3 and "Heat map" not in page(three)
    assert page([row({}, 0.3)]).count("<svg") == 0
    assert page([row({"a": 1}, None, "bad"), row({"a": 2}, None, "bad")]).count("<svg") == 0
