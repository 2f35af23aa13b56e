"""The report says what results.json says, no more; its page is well-formed, self-contained, safe and reproducible."""

import copy
import html.parser
import json
import re
from html import escape

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from rosepo_jax import config, files
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import plots, report
from rosepo_jax.stages import report as stage

HOSTILE = "<script>alert(\"x\")</script> & 'Sons' $x^2$"
HR = {"popularity": 0.38, "cooccurrence": 0.434, "oracle": 0.478, "sft": 0.407, "sft_more": 0.429, "aligned": 0.448}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def cell(value, n=2290, half=0.02):
    return {"value": value, "ci95": [value - half, value + half], "hits": round(value * n), "n": n}


def metrics(hit_ratio, lift):
    return {
        "HR@1": cell(hit_ratio),
        "NDCG@5": cell(hit_ratio + 0.15),
        "popularity_lift": cell(lift),
        "semantic_error_rate": cell(0.12),
        "gini": {"value": 0.6, "ci95": None, "n": 2290},
        "HR@1_of_valid": {"value": None, "ci95": None, "n": 0},
        "HR@1_by_decile": [
            {"decile": d + 1, "counts": [d, d + 1], **cell(hit_ratio + d / 100, 229)} for d in range(10)
        ],
    }


def compare(metric, b, difference, p, protocol="candidates", p_holm=None, a="aligned"):
    ci95 = [difference - 0.019, difference + 0.019]
    row = {"protocol": protocol, "metric": metric, "a": a, "b": b, "difference": difference, "ci95": ci95, "p": p}
    return row | {"test": "paired permutation", "p_holm": p if p_holm is None else p_holm}


def results(comparisons=()):
    generated = {name: {"valid_ratio": cell(0.97, 1000), "HR@1": cell(0.08, 1000)} for name in ("sft", "aligned")}
    return {
        "protocols": {
            "candidates": {"hash": "c4nd", "n": 2290, "models": {name: metrics(hr, 1.5) for name, hr in HR.items()}},
            "catalogue": {
                "hash": "c4ta",
                "n": 2290,
                "certified": 0.985,
                "models": {name: metrics(hr / 5, 2 - hr) for name, hr in HR.items()},
            },
            "generate": {"hash": "g3n", "n": 1000, "models": generated},
        },
        "comparisons": list(comparisons),
    }


def rows(first):
    """Predictions of 40 users whose target is item 0; `first(user)` is ranked first, the target otherwise second."""
    return [
        {
            "row": u,
            "user": u,
            "position": 7,
            "target": 0,
            "ranked": list(dict.fromkeys([first(u), 0, 3, 4])),
            "scores": [],
        }
        for u in range(40)
    ]


def material(**changes):
    curve = [{"step": s, "loss": 1 / (s + 1), "rewards/margins": s / 9, "validation/HR@1": None} for s in range(30)]
    everything = {
        "results": results([compare("HR@1", "sft", 0.041, 2e-4)])
        | {"truth": {"epsilon_auc": 0.7421, "models": {"sft": {"true_win_rate": cell(0.513)}}}},
        "predictions": {"candidates": {"sft": rows(lambda u: u % 2), "aligned": rows(lambda u: u // 2 % 2)}},
        "titles": [HOSTILE, "Skyfall", "Argo", HOSTILE.upper(), "Lincoln"],
        "users": [f"<b>{u}" for u in range(40)],
        "histories": {(u, 7): [0, 1, 2] for u in range(40)},
        "statistics": {"users": 40, "repairs": {HOSTILE: 2}},
        "metrics": {"sft": curve, "align": curve},
        "pairs": {
            "epsilon": [[0.1, 0.5], [0.2, 0.3]],
            "strategy": [["self_hard", "uniform"]] * 2,
            "flipped": [True, False],
        },
        "manifests": {"evaluate": {"code": "0.1.0+abc", "resolved_config_hash": "feed", "packages": {"jax": "0.10.2"}}},
        "config": config.default().to_dict(),
    }
    return report.Material(**everything | changes)


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is closed out of order or never; keeps every attribute and all text."""

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
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
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return report.html(material())


def test_page_is_well_formed(page):
    parsed = Balanced(page)
    assert page.startswith("<!DOCTYPE html>")
    assert {"h1", "table", "svg", "figure", "mark", "details"} <= parsed.tags
    assert page.count("<svg") == 6  # intervals, deciles, biases, the curves of two stages, epsilon
    assert len(parsed.ids) == len(set(parsed.ids)) > 0


def test_page_is_self_contained(page):
    parsed = Balanced(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for name, value in parsed.attributes:
        if name in ("href", "src", "xlink:href", "action", "data"):
            assert (value or "").startswith("#")
        assert not name.startswith("on")
        assert "url(" not in (value or "").replace("url(#", "")
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_hostile_text_is_escaped(page):
    parsed = Balanced(page)
    assert "<script" not in page.lower()
    assert escape(HOSTILE) in page and HOSTILE in "".join(parsed.text)
    assert "b" not in parsed.tags and "<b>" in "".join(parsed.text)


def test_hostile_model_and_protocol_names_are_escaped():
    found = results()
    found["protocols"]["<i>"] = {"hash": "<u>", "n": 2, "models": {"<s>": {"HR@1": cell(0.5, 2), "<em>": cell(0.1, 2)}}}
    found["protocols"]["candidates"]["models"]["$<s>$"] = metrics(0.1, 1.0)
    found["comparisons"] = [compare("<em>", "<s>", 0.1, 0.5, "<i>") | {"test": "<q>"}]
    parsed = Balanced(report.html(material(results=found)))
    assert not parsed.tags & {"i", "u", "s", "em", "q"}


def test_same_material_gives_the_same_bytes(page):
    assert report.html(copy.deepcopy(material())) == page


def test_only_results_are_needed():
    page = report.html(report.Material(results()))
    Balanced(page)
    assert "Learning curves" not in page and "Examples" not in page


def test_table_numbers_are_those_of_the_results():
    found = results([compare("HR@1", "sft", 0.041, 2e-4, p_holm=8e-4)])
    lines = report.table(found).splitlines()
    row = {line.split("  ")[0]: re.findall(r"[\d.,]+ \[[\d., ]+\]|(?<= )-(?= )|[\d,]+$", line) for line in lines[2:8]}
    assert list(row) == ["popularity", "co-occurrence", "oracle", "SFT", "SFT more", "aligned"]
    for name, label in report.MODELS.items():
        candidates, catalogue = (found["protocols"][p]["models"][name] for p in ("candidates", "catalogue"))
        cells = [
            candidates["HR@1"],
            candidates["NDCG@5"],
            catalogue["popularity_lift"],
            catalogue["semantic_error_rate"],
        ]
        for text, expected in zip(row[label][:4], cells, strict=True):
            value, low, high = map(float, re.findall(r"[\d.]+", text))
            assert [value, low, high] == pytest.approx([expected["value"], *expected["ci95"]], abs=5e-4)
        assert row[label][-1] == "2,290"
    assert "0.970 [0.950, 0.990]" in lines[5] and "0.970" not in lines[6]
    assert lines[-1] == (
        "aligned - SFT, HR@1 (candidates): +0.041 [+0.022, +0.060], p = 0.0002, p_holm = 0.0008, paired permutation"
    )
    assert "valid ratio: generate, n = 1,000" in lines[9]


def test_page_holds_the_numbers_of_the_results(page):
    text = " ".join("".join(Balanced(page).text).split())
    assert "0.448 [0.428, 0.468]" in text and "+0.041 [+0.022, +0.060]" in text
    assert "certified: 0.985" in text and "0.742" in text and "0.513 [0.493, 0.533]" in text
    assert "hash: c4nd" in text and "0.10.2" in text


def test_a_column_never_mixes_protocols():
    found = results()
    del found["protocols"]["catalogue"]
    assert report.headline(found)["popularity_lift"] == "candidates"
    found = results()
    del found["protocols"]["catalogue"]["models"]["sft"]["popularity_lift"]
    assert report.headline(found)["popularity_lift"] == "catalogue"
    assert report.table(found).splitlines()[5].split("]  ")[2].startswith("- ")


def test_different_rows_in_one_protocol_are_refused():
    found = results()
    found["protocols"]["candidates"]["models"]["aligned"]["HR@1"]["n"] = 2000
    with pytest.raises(UserError, match="different rows"):
        report.html(report.Material(found))
    with pytest.raises(UserError, match="no protocols"):
        report.table({})


@pytest.mark.parametrize(
    ("sft", "more", "expected"),
    [
        ((0.041, 2e-4), (0.019, 0.01), ["beats SFT", "beats the control", "is more than the additional"]),
        ((0.041, 2e-4), (0.019, 0.2), ["beats SFT", "not beat the control", "not shown to be more than"]),
        ((0.041, 2e-4), (-0.03, 0.01), ["beats SFT", "worse than the control", "is less than the additional"]),
        ((0.010, 0.3), (0.010, 0.3), ["does not beat SFT significantly", "does not beat the control"]),
        ((-0.04, 1e-5), (-0.04, 1e-5), ["is worse than SFT", "is worse than the control"]),
    ],
)
def test_verdict_on_alignment(sft, more, expected):
    sentences = report.verdicts(results([compare("HR@1", "sft", *sft), compare("HR@1", "sft_more", *more)]))
    for sentence, words in zip(sentences, expected, strict=False):
        assert words in sentence
    assert "0.448 against 0.407" in sentences[0] and f"{sft[0]:+.3f}" in sentences[0] and "n = 2,290" in sentences[0]
    assert "0.448 against 0.429" in sentences[1]
    claims = [s for s in sentences if "additional steps" in s]
    assert len(claims) == (len(expected) == 3)


def test_verdict_uses_the_corrected_p():
    sentences = report.verdicts(results([compare("HR@1", "sft", 0.02, 0.03, p_holm=0.06)]))
    assert "does not beat SFT significantly" in sentences[0] and "p = 0.03, Holm-corrected p = 0.06" in sentences[0]


def test_verdict_turns_a_comparison_round():
    turned = compare("HR@1", "aligned", -0.041, 2e-4, a="sft")
    straight = compare("HR@1", "sft", 0.041, 2e-4)
    assert report.verdicts(results([turned])) == report.verdicts(results([straight]))


def test_verdict_claims_nothing_untested():
    sentences = report.verdicts(results())
    assert "no paired test was made" in sentences[0] and "(+0.041)" in sentences[0]
    assert not any("beat" in sentence for sentence in sentences)


def test_verdict_without_control_or_alignment():
    found = results([compare("HR@1", "sft", 0.041, 2e-4)])
    for protocol in found["protocols"].values():
        protocol["models"].pop("sft_more", None)
    assert "No control was evaluated" in report.verdicts(found)[1]
    for protocol in found["protocols"].values():
        protocol["models"].pop("aligned")
    assert report.verdicts(found)[0] == "No aligned model was evaluated."


def test_verdict_places_both_models_among_floors_and_oracle():
    against = [compare("HR@1", "cooccurrence", 0.014, 0.21), compare("HR@1", "oracle", -0.071, 1e-6, a="sft")]
    sentences = {sentence.split(" has ")[0]: sentence for sentence in report.verdicts(results(against))}
    assert sentences["Co-occurrence"] == (
        "Co-occurrence has HR@1 0.434: SFT is 0.027 below it at 0.407 (not tested); "
        "aligned is 0.014 above it at 0.448 (p = 0.21, Holm-corrected p = 0.21, not significant)."
    )
    assert "SFT is 0.071 below it at 0.407 (p < 0.0001, Holm-corrected p < 0.0001);" in sentences["Oracle"]
    assert "SFT is 0.027 above it" in sentences["Popularity"]


@pytest.mark.parametrize(
    ("difference", "p", "words"), [(-0.3, 1e-4, "falls from"), (0.3, 1e-4, "rises"), (-0.3, 0.4, "does not change")]
)
def test_verdict_on_popularity_lift(difference, p, words):
    sentences = report.verdicts(results([compare("popularity_lift", "sft", difference, p, "catalogue")]))
    assert any(s.startswith(f"Popularity lift {words}") and "1.593 to 1.552" in s for s in sentences)


def test_examples_are_sorted_into_kinds_and_chosen_by_hash():
    sft, aligned = rows(lambda u: u % 2), rows(lambda u: u // 2 % 2)  # item 0 is the target
    chosen, sizes = report.examples(sft, aligned)
    assert sizes == {"gain": 10, "loss": 10, "both": 10, "neither": 10}
    assert [row["kind"] for row in chosen] == ["gain"] * 2 + ["loss"] * 2 + ["both"] * 2 + ["neither"] * 2
    for row in chosen:
        assert (row["sft"][0] == 0, row["aligned"][0] == 0) == (
            row["kind"] in ("loss", "both"),
            row["kind"] in ("gain", "both"),
        )
    assert report.examples(sft[::-1], aligned[::-1])[0] == chosen
    assert report.examples(sft[:3], aligned[3:])[1] == dict.fromkeys(sizes, 0)


def test_an_equal_title_is_a_hit():
    sft, aligned = rows(lambda u: 0), rows(lambda u: 3)
    assert report.examples(sft, aligned)[1]["loss"] == 40
    assert report.examples(sft, aligned, title_group_I=[0, 1, 2, 0, 4])[1]["both"] == 40


def test_summary_is_the_headline():
    found = report.summary(material())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["models"]["aligned"]["HR@1"] == {k: cell(0.448)[k] for k in ("value", "ci95", "n")} | {
        "protocol": "candidates"
    }
    assert found["models"]["sft"]["valid_ratio"]["n"] == 1000 and "valid_ratio" not in found["models"]["oracle"]
    assert found["config_hash"] == "feed" and found["versions"] == {"code": "0.1.0+abc", "jax": "0.10.2"}
    assert found["verdicts"] and found["comparisons"] and found["protocol_hashes"]["catalogue"] == "c4ta"


def test_numbers_are_written_plainly():
    written = [report.number(x) for x in (0.41, 1234, 1234.56, None, float("nan"), True, 0)]
    assert written == ["0.410", "1,234", "1,234.6", "-", "-", "True", "0"]
    assert report.probability(3e-6) == "p < 0.0001" and report.probability(0.0499) == "p = 0.0499"


def test_plots_survive_empty_points():
    empty = {"sft": [{"value": None, "n": 0}] * 10}
    assert "<svg" in plots.deciles({**empty, "aligned": [cell(0.4)] * 10}, report.MODELS, "d")
    assert "<svg" in plots.curves([{"step": 0, "loss": None}], ["loss"], "c")
    assert "<svg" in plots.epsilons({"all": np.zeros(3)}, "e")


def test_stage_reads_what_is_there(tmp_path, capsys):
    found = material()
    evaluate = tmp_path / "evaluate"
    files.write_json(evaluate / "results.json", found.results)
    files.write_json(evaluate / "manifest.json", found.manifests["evaluate"])
    (tmp_path / "report").mkdir()
    assert stage.run(config.default(), {"evaluate": evaluate}, tmp_path / "report")["table"] == report.table(
        found.results
    )
    alone = (tmp_path / "report" / "report.html").read_text()
    assert "Examples" not in alone and "aligned - SFT, HR@1" in capsys.readouterr().out

    count = np.arange(5)
    Catalogue(tuple("abcde"), ("Heat", "Skyfall", "Argo", "Brave", "Lincoln"), ((),) * 5, count).save(
        tmp_path / "prepare" / "catalogue.jsonl"
    )
    users = np.arange(40, dtype=np.int32)
    zeros = np.zeros(40, np.int32)
    history = np.tile(np.array([2, 1, -1], np.int32), (40, 1))
    test = Rows(users, zeros + 7, history, zeros, np.tile(np.arange(4, dtype=np.int32), (40, 1)))
    store.write(tmp_path / "prepare" / "dataset", {"test": test}, 3, 4)
    files.write_json(tmp_path / "prepare" / "users.json", [f"user {u}" for u in range(40)])
    files.write_json(tmp_path / "prepare" / "statistics.json", {"interactions": 98765})
    files.write_jsonl(tmp_path / "align" / "metrics.jsonl", found.metrics["align"])
    (tmp_path / "pairs").mkdir()
    pyarrow.parquet.write_table(pa.table(found.pairs), tmp_path / "pairs" / "pairs.parquet")
    for model, predictions in found.predictions["candidates"].items():
        files.write_jsonl(evaluate / "predictions" / f"candidates.{model}.jsonl", predictions)
    for verb in ("prepare", "align", "pairs"):
        files.write_json(tmp_path / verb / "manifest.json", {"code": "x"})
    stage.run(config.default(), {"evaluate": evaluate}, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    Balanced(page)
    assert "<ol><li>Argo</li><li>Skyfall</li></ol>" in page  # a history, oldest first, without its padding
    assert "<mark>✓ Heat</mark>" in page and "98,765" in page and "Histogram of the smoothing factor" in page
    assert files.read_json(tmp_path / "report" / "summary.json")["models"]["sft"]["HR@1"]["value"] == 0.407
