"""The report says what results.json says, no more."""

import json
import re

import pytest
import reported
from reported import cell, compare, predictions, results

from rosepo_jax import config, files
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import report
from rosepo_jax.stages import report as stage


def said(found):
    """All verdicts as one list of (outcome, sentence)."""
    return [(outcome, sentence) for outcome, sentences in report.verdicts(found).items() for sentence in sentences]


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
    assert "valid ratio: generate, n = 1,000" in lines[9]


def test_text_holds_every_part():
    text = report.text(reported.whole())
    assert text.startswith("Known defects of these data:\n- Only 122 test rows: one hit is 0.0082.\n")
    assert (
        "aligned - SFT, HR@1 (candidates): +0.041 [+0.022, +0.060], p = 0.0002, p_holm = 0.0008, q_bh = 0.0002, "
        "paired permutation\n"
    ) in text
    for heading in report.OUTCOMES.values():
        assert f"\n\n{heading}:\n- " in text


def test_text_says_how_small_a_difference_can_be_found():
    found = results([compare("HR@1", "oracle", 0, 1) | {"detectable": 0.9}, compare("HR@1", "sft", 0, 1)])
    assert report.detectable(found) == (
        "With n = 2,290 rows a true difference between aligned and SFT of 0.027 in HR@1 is found in 4 of 5 such "
        "experiments; a smaller one is missed more often."
    )
    found["comparisons"].append(compare("NDCG@5", "sft", 0, 1) | {"detectable": 0.0211})
    assert "of 0.027 in HR@1 or 0.021 in NDCG@5 is found" in report.detectable(found)
    assert report.detectable(found) in report.table(found)
    assert report.detectable(results()) == ""


def test_published_figures_stand_beside_ours_and_apart():
    text = report.text(reported.whole())
    block = text[text.index("Published, LLaRA, LastFM, n = 122") :].splitlines()
    theirs = next(line for line in block if line.startswith("LLaRA (SASRec)"))
    assert re.findall(r"[\d.]+", theirs)[:7] == ["0.451", "0.365", "0.539", "1.000", "1.000", "1.000", "122"]
    assert next(line for line in block if line.startswith("GRU4Rec")).split()[1:4] == ["0.262", "-", "-"]  # no share
    ours = [line for line in block if line.startswith("here: aligned")]
    assert "0.448" in ours[0] and ours[0].endswith("candidates: every title scored")
    assert "0.075" in ours[1] and "0.910" in ours[1] and ours[1].endswith("generate: free answer, substring rule")
    ruled = [place for place, line in enumerate(block) if line.startswith("---")]
    assert len(ruled) == 2 and block.index(theirs) < ruled[1] < block.index(ours[0])
    assert block[-2:] == ["- The candidates were drawn unseeded.", "- n = 122: one hit is .0082."]


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
        report.text(found)
    with pytest.raises(UserError, match="no protocols"):
        report.text({})


def test_another_system_joins_the_same_protocol_only():
    rank = {"hash": "c4nd", "n": 2290, "models": {"BM25": {"HR@1": cell(0.3)}}}
    other = {"candidates": rank, "catalogue": rank | {"hash": "0ther"}, "windows": rank}
    tested = [compare("HR@1", "sft", 0.1, 0.2, a="BM25"), compare("HR@1", "sft", 0.1, 0.2, "catalogue", a="BM25")]
    ours = results([compare("HR@1", "sft", 0.041, 2e-4)])
    found = report.with_others(ours, {"others/bm25": {"protocols": other, "comparisons": tested}})
    assert [report.cell(found, p, "BM25", "HR@1").get("value") for p in found["protocols"]] == [0.3, None, None]
    assert report.models(found)[-1] == "BM25" and "BM25" not in report.models(ours)
    assert found["comparisons"] == [*ours["comparisons"], tested[0]]
    hashes, absent = found["notes"]
    assert "BM25 (others/bm25) is left out of catalogue" in hashes and "0ther" in hashes and "c4ta" in hashes
    assert "left out of windows" in absent
    assert report.text(found).endswith(f"Left out:\n- {hashes}\n- {absent}")


def test_another_system_cannot_take_the_place_of_a_model():
    other = {"protocols": {"candidates": {"hash": "c4nd", "n": 2290, "models": {"sft": {"HR@1": cell(0.99)}}}}}
    found = report.with_others(results(), {"o": other})
    assert report.cell(found, "candidates", "sft", "HR@1")["value"] == 0.407 and len(found["notes"]) == 1


def test_every_known_metric_has_its_group():
    groups = report.grouped(["ECE", "MRR", "made_up", "HR@1", "gini"])
    assert groups == {
        "Ranking": ["HR@1", "MRR"],
        "Popularity and groups": ["gini"],
        "Calibration": ["ECE"],
        "Other": ["made_up"],
    }


@pytest.mark.parametrize(
    ("sft", "more", "expected"),
    [
        ((0.041, 2e-4), (0.019, 0.01), {"shown": ["beats SFT", "beats the control", "is more than the additional"]}),
        (
            (0.041, 2e-4),
            (0.019, 0.2),
            {"shown": ["beats SFT"], "not shown": ["alignment beats the control", "is more than the additional"]},
        ),
        ((0.041, 2e-4), (-0.03, 0.01), {"shown": ["beats SFT", "worse than the control", "is less than the addit"]}),
        ((0.010, 0.3), (0.010, 0.3), {"not shown": ["That alignment beats SFT", "That alignment beats the control"]}),
        ((-0.04, 1e-5), (-0.04, 1e-5), {"shown": ["is worse than SFT", "is worse than the control"]}),
    ],
)
def test_verdict_on_alignment(sft, more, expected):
    found = report.verdicts(results([compare("HR@1", "sft", *sft), compare("HR@1", "sft_more", *more)]))
    for outcome in ("shown", "not shown"):
        assert len(found.get(outcome, ())) == len(expected.get(outcome, ()))
        for sentence, words in zip(found.get(outcome, ()), expected.get(outcome, ())):
            assert words in sentence
    against_sft = next(s for sentences in found.values() for s in sentences if "SFT on HR@1" in s)
    assert "0.448 against 0.407" in against_sft and f"{sft[0]:+.3f} [" in against_sft and "n = 2,290" in against_sft


def test_verdict_uses_the_corrected_p():
    sentences = said(results([compare("HR@1", "sft", 0.02, 0.03, p_holm=0.06)]))
    assert [o for o, s in sentences if "p = 0.03, Holm-corrected p = 0.06" in s] == ["not shown"]


def test_verdict_turns_a_comparison_round():
    turned = compare("HR@1", "aligned", -0.041, 2e-4, a="sft")
    straight = compare("HR@1", "sft", 0.041, 2e-4)
    assert report.verdicts(results([turned])) == report.verdicts(results([straight]))


def test_verdict_claims_nothing_untested():
    found = report.verdicts(results())
    assert list(found) == ["not tested"]
    assert found["not tested"][0] == "Aligned and SFT on HR@1: 0.448 against 0.407 (+0.041)."


def test_an_empty_comparison_is_no_test():
    empty = compare("HR@1", "sft", 0.0, 1.0) | {"difference": None, "ci95": None, "p": None, "p_holm": None, "n": 0}
    found = results([empty])
    assert list(report.verdicts(found)) == ["not tested"] and "HR@1 (candidates): -, " in report.text(found)


def test_verdict_without_control_or_alignment():
    found = results([compare("HR@1", "sft", 0.041, 2e-4)])
    for protocol in found["protocols"].values():
        protocol["models"].pop("sft_more", None)
    assert report.verdicts(found)["not tested"][0].startswith("Without a control")
    for protocol in found["protocols"].values():
        protocol["models"].pop("aligned")
    assert said(found) == [
        ("not tested", "No aligned model was evaluated."),
        ("not tested", "HR@1: SFT 0.407, popularity 0.380, co-occurrence 0.434, oracle 0.478."),
    ]


def test_verdict_places_the_model_among_floors_and_oracle():
    against = [compare("HR@1", "cooccurrence", 0.014, 0.21), compare("HR@1", "oracle", -0.071, 1e-6)]
    found = report.verdicts(results(against))
    assert found["shown"] == [
        "Aligned is below oracle on HR@1: 0.448 against 0.478, -0.071 [-0.090, -0.052], p < 0.0001, "
        "Holm-corrected p < 0.0001, n = 2,290."
    ]
    assert found["not shown"][0].startswith(
        "That aligned and co-occurrence differ on HR@1: 0.448 against 0.434, +0.014"
    )
    assert "HR@1: aligned 0.448, popularity 0.380." in found["not tested"]


@pytest.mark.parametrize(
    ("difference", "p", "outcome", "words"),
    [
        (-0.3, 1e-4, "shown", "Popularity lift falls from"),
        (0.3, 1e-4, "shown", "Popularity lift rises from"),
        (-0.3, 0.4, "not shown", "That popularity lift changes: from"),
    ],
)
def test_verdict_on_popularity_lift(difference, p, outcome, words):
    found = report.verdicts(results([compare("popularity_lift", "sft", difference, p, "catalogue")]))
    assert any(s.startswith(f"{words} 1.593 to 1.552") for s in found[outcome])


def test_verdict_says_what_the_probes_found():
    sentences = report.verdicts(reported.whole())["not tested"]
    assert any(
        s.startswith("HR@1 with the history of another user: SFT 0.210 [0.170, 0.250] instead of 0.448")
        for s in sentences
    )
    assert any("change with the order of the list: SFT 0.310 [0.270, 0.350]" in s for s in sentences)
    found = results() | {"probes": {"sft": {}}}
    assert report.verdicts(found) == report.verdicts(results())


def test_examples_are_sorted_into_kinds_and_chosen_by_hash():
    sft, aligned = predictions(lambda u: u % 2), predictions(lambda u: u // 2 % 2)  # item 0 is the target
    chosen, sizes = report.examples(sft, aligned, reported.catalogue())
    assert sizes == {"gain": 10, "loss": 10, "both": 10, "neither": 10}
    assert [row["kind"] for row in chosen] == ["gain"] * 2 + ["loss"] * 2 + ["both"] * 2 + ["neither"] * 2
    for row in chosen:
        assert (row["sft"][0] == "i0", row["aligned"][0] == "i0") == (
            row["kind"] in ("loss", "both"),
            row["kind"] in ("gain", "both"),
        )
    assert report.examples(sft[::-1], aligned[::-1], reported.catalogue())[0] == chosen
    assert report.examples(sft[:3], aligned[3:], reported.catalogue())[1] == dict.fromkeys(sizes, 0)


def test_an_equal_title_is_a_hit_and_no_item_is_none():
    sft, aligned = predictions(lambda u: None), predictions(lambda u: 3)  # Heat and HEAT
    assert report.examples(sft, aligned, reported.catalogue())[1]["gain"] == 40
    other = reported.catalogue(("Heat", "Skyfall", "Argo", "Heat 2", "Lincoln"))
    assert report.examples(sft, aligned, other)[1]["neither"] == 40


def test_summary_is_the_headline():
    found = report.summary(reported.material())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["models"]["aligned"]["HR@1"] == {k: cell(0.448)[k] for k in ("value", "ci95", "n")} | {
        "protocol": "candidates"
    }
    assert found["models"]["sft"]["valid_ratio"]["n"] == 1000 and "valid_ratio" not in found["models"]["oracle"]
    assert found["config_hash"] == "feed" and found["versions"] == {"code": "0.1.0+abc", "jax": "0.10.2"}
    assert found["verdicts"]["shown"] and found["comparisons"] and found["protocol_hashes"]["catalogue"] == "c4ta"
    assert len(found["defects"]) == 2 and found["left_out"] == []


def test_speed_is_the_median_line_the_mean_stall_the_most_memory_and_all_compilation():
    curve = reported.material().metrics["align"]
    found = report.speed([*curve, {"step": 30, "compile_seconds": 1.5}, {"step": 30, "pairs_per_second": None}])
    assert found == {
        "pairs_per_second": 300.0,
        "tokens_per_second": 5000.0,
        "tokens_useful": 0.93,
        "flops_per_second": 2e12,
        "mfu": 0.4,
        "input_stall": pytest.approx(9 * 0.03 / 29),
        "memory/peak_bytes": 1.5 * 2**30,
        "compile_seconds": 14.0,
    }
    assert report.speed([{"step": 1, "loss": 0.5}]) == {}
    assert list(report.summary(reported.material())["training"]) == ["align"]


def test_flags_are_the_settings_that_are_no_defaults():
    c = config.default()
    assert report.flags(reported.material()) == []
    c.align.beta, c.evaluate.protocols, c.data.path = 0.3, ("candidates",), "a b"
    found = report.flags(reported.material(config=c.to_dict()))
    assert set(found) == {
        "--config.align.beta=0.3",
        "--config.evaluate.protocols=candidates",
        "'--config.data.path=a b'",
    }


def test_numbers_are_written_plainly():
    written = [report.number(x) for x in (0.41, 1234, 1234.56, None, float("nan"), True, 0)]
    assert written == ["0.410", "1,234", "1,234.6", "-", "-", "True", "0"]
    assert report.probability(3e-6) == "p < 0.0001" and report.probability(0.0499) == "p = 0.0499"


def test_stage_reads_what_is_there(tmp_path, capsys):
    found = reported.material(results=results([compare("HR@1", "sft", 0.041, 2e-4)]), metrics={})
    evaluate = tmp_path / "a" / "evaluate"
    files.write_json(evaluate / "results.json", found.results)
    files.write_json(evaluate / "manifest.json", found.manifests["evaluate"])
    files.write_json(
        tmp_path / "a" / "others" / "bm25" / "candidates.results.json",
        {"protocols": {"candidates": {"hash": "c4nd", "n": 2290, "models": {"BM25": {"HR@1": cell(0.3)}}}}},
    )
    (tmp_path / "a" / "report").mkdir()
    table = stage.run(config.default(), {"evaluate": evaluate}, tmp_path / "a" / "report")["table"]
    assert "\nBM25 " in table and table in capsys.readouterr().out
    alone = (tmp_path / "a" / "report" / "report.html").read_text()
    assert "Examples" not in alone and "BM25" in alone

    evaluate = reported.write(tmp_path / "b", reported.material())
    (tmp_path / "b" / "report").mkdir()
    stage.run(config.default(), {"evaluate": evaluate}, tmp_path / "b" / "report")
    page = (tmp_path / "b" / "report" / "report.html").read_text()
    assert "<ol><li>Argo</li><li>Skyfall</li></ol>" in page  # a history, oldest first
    assert "<mark>✓ Heat</mark>" in page and "98,765" in page and "Histogram of the smoothing factor" in page
    assert files.read_json(tmp_path / "b" / "report" / "summary.json")["models"]["sft"]["HR@1"]["value"] == 0.407
    assert len(Catalogue.load(tmp_path / "b" / "prepare" / "catalogue.jsonl")) == len(reported.TITLES)
