"""Runs side by side: one question a column, seeds together, tests over the same rows."""

import dataclasses

import numpy as np
import pytest
from reported import cell

from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import comparison, published, significance

USERS, RESAMPLES = 40, 100


def protocol(hits, hash="c4nd", space="5pace", **models):
    """Results of `aligned`, right on `hits` users of 40, and of SFT, right on ten."""
    rates = {"aligned": hits, "sft": 10, "popularity": 8}
    figures = {
        name: {"HR@1": cell(right / USERS, USERS), "semantic_error_rate": cell(0.1, USERS)}
        for name, right in rates.items()
    }
    return {"hash": hash, "n": USERS, "semantic_space": space, "models": figures | models}


def ranks(hits, users=USERS):
    """The true item is first for the first `hits` users, third for the others."""
    return {(u, f"u{u}", 7, "i0"): 1.0 if u < hits else 3.0 for u in range(users)}


def run(name, hits=20, seed=0, beta=0.1, protocols=None, **settings):
    return comparison.Run(
        name=name,
        seed=seed,
        settings={"align.beta": beta, "evaluate.bootstrap": RESAMPLES, **settings},
        results={"protocols": {"candidates": protocol(hits)} if protocols is None else protocols},
        rank={("candidates", "aligned"): ranks(hits), ("candidates", "sft"): ranks(10)},
    )


def test_runs_that_differ_in_their_seed_are_one_group_with_every_value():
    found = comparison.compare([run("a", 20), run("b", 26, seed=7), run("c", 20, beta=0.3)])
    assert [(g["label"], g["runs"], g["seeds"]) for g in found["groups"]] == [
        ("beta=0.1", ["a", "b"], [0, 7]),
        ("beta=0.3", ["c"], [0]),
    ]
    together, alone = (g["protocols"]["candidates"]["aligned"]["HR@1"] for g in found["groups"])
    interval = together.pop("ci95")
    assert together == {"value": 0.575, "sd": pytest.approx(0.15 / 2**0.5), "values": {0: 0.5, 7: 0.65}, "n": USERS}
    mean_E = np.mean([np.arange(USERS) < hits for hits in (20, 26)], axis=0)  # of a user, over the seeds
    assert interval == list(significance.mean_interval(mean_E, [f"u{u}" for u in range(USERS)], RESAMPLES))
    assert alone == cell(0.5, USERS)
    assert found["settings"] == ["align.beta"]


def test_floors_keep_their_interval_and_trained_models_their_seeds():
    floors = [{"popularity": {"HR@1": cell(0.38, USERS, half)}} for half in (0.02, 0.021)]  # resampled anew
    runs = [run(n, 20, seed, protocols={"candidates": protocol(20, **floors[seed])}) for seed, n in enumerate("ab")]
    found = comparison.compare(runs)["groups"][0]["protocols"]["candidates"]
    assert found["popularity"]["HR@1"] == floors[0]["popularity"]["HR@1"]
    aligned = found["aligned"]["HR@1"]
    assert (aligned["value"], aligned["sd"], aligned["values"]) == (0.5, 0.0, {0: 0.5, 1: 0.5})


def test_a_seed_that_comes_twice_starts_another_group():
    assert [[r.name for r in group] for group in comparison.grouped([run("a"), run("b"), run("c", seed=1)])] == [
        ["a", "c"],
        ["b"],
    ]
    found = comparison.compare([run("a"), run("b")])
    assert [group["label"] for group in found["groups"]] == ["a", "b"]


def test_labels_are_as_short_as_they_are_clear():
    runs = [
        run("a", **{"sft.length": "1", "align.length": "9", "evaluate.protocols": ("x", "y")}),
        run("b", **{"sft.length": "2", "align.length": "8", "evaluate.protocols": ("x",)}),
        run("c", **{"sft.length": "2", "align.length": "8"}),
    ]
    labels = [group["label"] for group in comparison.compare(runs)["groups"]]
    assert labels == [
        "sft.length=1, align.length=9, protocols=x,y",
        "sft.length=2, align.length=8, protocols=x",
        "sft.length=2, align.length=8, protocols=-",
    ]


def test_different_questions_are_refused_in_one_line():
    runs = [run("a"), run("b", protocols={"candidates": protocol(9, hash="0ther")}), run("c")]
    with pytest.raises(UserError) as refusal:
        comparison.compare(runs)
    message = str(refusal.value)
    assert "\n" not in message and message.startswith("candidates: ")
    assert "c4nd in a, c" in message and "0ther in b" in message and "--protocols=" in message


def test_a_protocol_that_is_left_out_is_not_refused():
    both = {"candidates": protocol(20), "catalogue": protocol(9)}
    other = {"candidates": protocol(20), "catalogue": protocol(9, hash="0ther")}
    runs = [run("a", protocols=both), run("b", beta=0.3, protocols=other)]
    with pytest.raises(UserError, match="catalogue: the runs answer"):
        comparison.compare(runs)
    assert list(comparison.compare(runs, ["candidates"])["protocols"]) == ["candidates"]
    with pytest.raises(UserError, match="no run has it; there are candidates, catalogue"):
        comparison.compare(runs, ["windows"])


def test_a_run_without_a_protocol_shows_a_dash():
    both = {"candidates": protocol(20), "catalogue": protocol(9, sft_more={"HR@5": cell(0.3, USERS)})}
    both["catalogue"]["models"]["aligned"]["HR@5"] = cell(0.6, USERS)
    found = comparison.compare([run("a", protocols=both), run("b", beta=0.3)])
    assert found["groups"][1]["protocols"]["catalogue"] == {} and found["notes"] == ["b has no catalogue protocol."]
    assert ("catalogue", "HR@5") in comparison.columns(found)
    line = next(line for line in comparison.text(found).splitlines() if line.startswith("aligned [beta=0.3] "))
    assert line.split()[-1] == "-"


def test_semantic_metrics_are_compared_in_one_space_only():
    other = {"candidates": protocol(20, space="0ther")}
    found = comparison.compare([run("a"), run("b", beta=0.3), run("c", beta=1.0, protocols=other)])
    shown = ["semantic_error_rate" in group["protocols"]["candidates"]["aligned"] for group in found["groups"]]
    assert shown == [True, True, False]
    assert any("not compared for beta=1.0 (candidates)" in note for note in found["notes"])
    floors = {model: row[0][1] for model, row in comparison.lines(found).items() if row[0][0] == comparison.SAME}
    assert [bool(cell) for cell in floors["popularity"]] == [True, False]  # HR@1, semantic error rate
    found = comparison.compare([run("a"), run("c", beta=1.0, protocols=other)])  # no two share a space
    assert not any("semantic_error_rate" in group["protocols"]["candidates"]["sft"] for group in found["groups"])
    assert any("not compared for beta=0.1, beta=1.0 (candidates)" in note for note in found["notes"])
    assert comparison.compare([run("a"), run("b", beta=0.3)])["notes"] == []


def test_seeds_are_measured_each_in_the_space_of_its_own():
    """Two betas on the same two SFT models can be compared; another SFT model for one of the seeds cannot."""

    def two(name, beta, *spaces):
        return [
            run(f"{name}{seed}", 20, seed, beta, protocols={"candidates": protocol(20, space=space)})
            for seed, space in enumerate(spaces)
        ]

    def shown(*runs):
        groups = comparison.compare(runs)["groups"]
        return [group["protocols"]["candidates"]["aligned"].get("semantic_error_rate") for group in groups]

    assert all(shown(*two("a", 0.1, "x", "y"), *two("b", 0.3, "x", "y")))
    assert not any(shown(*two("a", 0.1, "x", "y"), *two("b", 0.3, "x", "z")))
    alone = comparison.compare(two("a", 0.1, "x", "y"))
    assert alone["notes"] == [] and [group["label"] for group in alone["groups"]] == ["2 seeds"]


def test_tests_are_those_of_the_paired_rows():
    found = comparison.compare([run("a", 20), run("b", 30, beta=0.3)])
    by_name = {(row["metric"], row["a"], row["b"]): row for row in found["comparisons"]}
    between = by_name["HR@1", "aligned [beta=0.3]", "aligned [beta=0.1]"]
    a_E, b_E = (np.arange(USERS) < hits for hits in (30, 20))
    users = np.unique([f"u{u}" for u in range(USERS)], return_inverse=True)[1]
    expected = significance.compare(a_E, b_E, users, 100, 0)
    assert {key: between[key] for key in expected} == expected and between["difference"] == 0.25
    assert by_name["NDCG@5", "aligned [beta=0.1]", "SFT [beta=0.1]"]["difference"] == pytest.approx(10 * 0.5 / USERS)
    assert len(found["comparisons"]) == 6  # aligned against aligned, and twice against SFT, on two metrics
    p = [row["p"] for row in found["comparisons"]]
    assert [row["p_holm"] for row in found["comparisons"]] == significance.holm(p)
    assert [row["q_bh"] for row in found["comparisons"]] == significance.benjamini_hochberg(p)


def test_models_that_agree_in_every_row_are_not_tested():
    found = comparison.compare([run("a", 20), run("b", 20, beta=0.3)])
    assert all("SFT" in row["b"] and "aligned" in row["a"] for row in found["comparisons"])
    assert (
        found["untested"][0]
        == "HR@1 (candidates): 2 of the pairs of models agree in every row, so there is nothing to test."
    )


def test_a_row_of_several_seeds_is_their_mean():
    found = comparison.compare([run("a", 10), run("b", 30, seed=1), run("c", 40, beta=0.3)])
    row = next(row for row in found["comparisons"] if (row["metric"], row["a"]) == ("HR@1", "aligned [beta=0.3]"))
    difference_E = 1 - (np.arange(USERS) < np.array([[10], [30]])).mean(axis=0)  # 0, 1/2 and 1
    assert row["difference"] == difference_E.mean() == 0.5
    users = np.unique([f"u{u}" for u in range(USERS)], return_inverse=True)[1]
    assert row["p"] == significance.permutation_test(difference_E, users)


def test_different_rows_are_refused():
    short = dataclasses.replace(run("b", beta=0.3), rank={("candidates", "aligned"): ranks(20, 39)})
    with pytest.raises(UserError, match="hold different rows"):
        comparison.compare([run("a"), short])
    with pytest.raises(UserError, match="of c and a hold different rows"):
        comparison.compare([run("a"), dataclasses.replace(short, name="c", seed=1, settings=run("a").settings)])


def test_no_predictions_no_tests():
    found = comparison.compare([run("a"), dataclasses.replace(run("b", beta=0.3), rank={})])
    assert [row["a"] for row in found["comparisons"]] == ["aligned [beta=0.1]"] * 2  # within the first run


def test_text_shows_means_seeds_and_what_is_the_same_once():
    floor = {"popularity": {"HR@1": cell(0.38, USERS)}}
    runs = [
        run(name, hits, seed, beta, {"candidates": protocol(hits, **floor)})
        for name, hits, seed, beta in (("a", 20, 0, 0.1), ("b", 26, 7, 0.1), ("c", 30, 0, 0.3))
    ]
    lines = comparison.text(comparison.compare(runs)).splitlines()
    start = {line.split("  ")[0]: " ".join(line.split()) for line in lines}
    assert start["aligned [beta=0.1]"].startswith("aligned [beta=0.1] 0.575 ± 0.106 ")
    assert start["aligned [beta=0.3]"].startswith("aligned [beta=0.3] 0.750 [0.730, 0.770] ")
    assert [line for line in start if line.startswith("popularity")] == ["popularity [the same in all runs]"]
    assert "aligned [beta=0.1], HR@1 by seed: 0: 0.500, 7: 0.650" in lines
    assert (
        sum(line.startswith("aligned [beta=0.3] - aligned [beta=0.1], HR@1 (candidates): +0.175 [") for line in lines)
        == 1
    )


def test_a_published_table_stands_beside_runs_that_all_stand_beside_it():
    printed = published.table("llara-lastfm")

    def page(*tables):
        runs = [run(name, 20, seed) for seed, name in enumerate("ab")]
        runs = [dataclasses.replace(r, results={**r.results, "published": t}) for r, t in zip(runs, tables)]
        return comparison.html(comparison.compare(runs))

    assert "LLaRA (SASRec)" in page(printed, printed) and "0.451" in page(printed, printed)
    assert "LLaRA (SASRec)" not in page(printed, None)
