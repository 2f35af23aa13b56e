import collections
import dataclasses
import itertools
import json
import math
import types

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax import seeds
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation import metrics, significance, summary
from rosepo_jax.evaluation.answers import Answers

AXES = np.array([*np.eye(3), *-np.eye(3), np.zeros(3)])  # their cosines are exact, and tie
STATUSES = ("candidate", "not_a_candidate", "history_copy", "not_in_catalogue", "empty", "truncated")


def catalogue_of(titles, groups, counts):
    return Catalogue(tuple(map(str, range(len(titles)))), tuple(titles), tuple(groups), np.array(counts, np.int64))


@st.composite
def worlds(draw):
    """(ground, answers) over a small random catalogue: shared titles, unseen items, ragged histories and lists."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, rows, window, listed, places = (draw(st.integers(1, top)) for top in (12, 9, 4, 6, 11))
    titles = [f"{random.choice(['title', 'Title '])} {number}" for number in random.integers(items + 1, size=items)]
    groups = [tuple(random.choice(["a", "b", "c"], random.integers(3), replace=False)) for _ in range(items)]
    catalogue = catalogue_of(titles, groups, random.integers(0, 6, items) * random.integers(0, 2, items))
    history = random.integers(items, size=(rows, window))
    history[np.arange(window) >= random.integers(1, window + 1, (rows, 1))] = -1
    ranked = random.integers(-1, items, (rows, places))
    ranked[np.arange(places) >= random.integers(0, places + 1, (rows, 1))] = -2
    candidates, target = random.integers(items, size=(rows, listed)), random.integers(items, size=rows)
    embedding = AXES[random.integers(7, size=items)] * random.uniform(0.5, 2, (items, 1))
    of_row = Rows(random.integers(5, size=rows), np.arange(rows), history, target, candidates)
    ground = summary.Ground(of_row, catalogue, embedding, draw(st.integers(1, 6)), draw(st.booleans()))
    return ground, Answers(ranked, np.full(ranked.shape, np.nan))


def take(ground, answers, index):
    """Ground and answers of some rows alone."""
    picked = {}
    for field in dataclasses.fields(answers):
        value = getattr(answers, field.name)
        picked[field.name] = [value[e] for e in index] if isinstance(value, list) else value
        if isinstance(value, np.ndarray):
            picked[field.name] = value[index]
    return dataclasses.replace(ground, rows=ground.rows.take(index)), Answers(**picked)


def of_rows(ground):
    """Keyword arguments and rows for `naive`."""
    c, r = ground.catalogue, ground.rows
    world = {
        "title": [" ".join(title.lower().split()) for title in c.titles],
        "count": c.count_I.tolist(),
        "vector": ground.embedding_IxD.tolist(),
        "luck": seeds.uniform(metrics.TIES, np.arange(len(c))).tolist(),
        "k": ground.neighbours,
        "bound": ground.bound,
    }
    return world, list(zip(r.target_E.tolist(), r.history_ExN.tolist(), r.candidates_ExC.tolist()))


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_every_row_metric_equals_its_formula_in_loops(case):
    ground, answers = case
    found = summary.by_row(answers, ground)
    world, rows = of_rows(ground)
    for e, (ranked, (target, history, candidates)) in enumerate(zip(answers.ranked_ExK.tolist(), rows)):
        expected = naive.by_row(ranked, target, history, candidates, **world)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            value = math.nan if value is None else value
            assert found[name][e] == pytest.approx(value, abs=1e-6 if name == "diversity" else 1e-12, nan_ok=True), name


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_metrics_over_all_rows_equal_their_formulas_in_loops(case):
    ground, answers = case
    found = summary.over_rows(answers, ground, resamples=5)
    items, top = len(ground.catalogue), answers.ranked_ExK[:, :5].tolist()
    named = collections.Counter(item for row in top for item in row if item >= 0)
    assert found["coverage"]["value"] == pytest.approx(len(named) / items)
    assert found["gini"]["value"] == pytest.approx(naive.gini([named[i] for i in range(items)]), abs=1e-12)
    genres, fifths = ground.catalogue.groups, metrics.popularity_groups(ground.catalogue.count_I).argmax(1)
    groupings = {"": ([(fifth,) for fifth in fifths], range(5)), "_genre": (genres, set(itertools.chain(*genres)))}
    for suffix, (groups, names) in groupings.items():
        if not names:
            assert "MGU_genre" not in found
            continue
        for name, value in zip(
            ("MGU", "DGU"), naive.unfairness(ground.rows.history_ExN.tolist(), top, groups, names), strict=True
        ):
            assert found[name + suffix]["value"] == (None if value is None else pytest.approx(value, abs=1e-12))


def big(seed=0, rows=150, items=40, listed=8):
    """Several rows a user, every optional field of the answers."""
    random = np.random.default_rng(seed)
    groups = [tuple(random.choice(["a", "b", "c"], 1 + i % 2, replace=False)) for i in range(items)]
    catalogue = catalogue_of([f"t{i // 2 if i < 6 else i}" for i in range(items)], groups, np.arange(items) // 3)
    history = random.integers(items, size=(rows, 6))
    history[np.arange(6) >= random.integers(1, 7, (rows, 1))] = -1
    candidates = np.array([random.permutation(items)[:listed] for _ in range(rows)])
    target = candidates[np.arange(rows), random.integers(listed, size=rows)]
    of_row = Rows(random.integers(70, size=rows), np.arange(rows), history, target, candidates)
    score = np.log(random.dirichlet(np.ones(listed) / 3, rows) * 0.9 + 1e-4)
    answers = Answers(
        ranked_ExK=metrics.ranking(score, candidates),
        score_ExK=-np.sort(-score),
        certified_E=random.random(rows) < 0.8,
        full_score_ExC=score,
        text=["…"] * rows,
        status=random.choice(STATUSES, rows).tolist(),
        ambiguous_E=random.random(rows) < 0.1,
        substring_E=random.integers(-1, listed, rows),
    )
    answers.ranked_ExK[:, 5:][random.random((rows, listed - 5)) < 0.4] = -1
    answers.ranked_ExK[random.random(rows) < 0.1] = -2
    return summary.Ground(of_row, catalogue, random.standard_normal((items, 16)).astype(np.float32), 6), answers


def test_the_summary_holds_every_name_and_is_strict_json():
    ground, answers = big()
    M, by_row = summary.describe(answers, ground, resamples=40)
    rows = """HR@1 HR@5 NDCG@5 MRR valid_ratio HR@1_of_valid HR@1_cold popularity_lift ARP APLT novelty diversity
        semantic_error_rate semantic_error_rate_random not_in_catalogue history_copy duplicate ambiguous certified
        hallucination truncated empty not_a_candidate candidate_ratio substring_valid_ratio substring_HR@1
        substring_HR@1_of_valid"""  # eight places: no HR@10
    others = "gini coverage MGU DGU MGU_genre DGU_genre ECE HR@1_by_decile HR@1_by_history"
    assert by_row.keys() == set(rows.split()) and M.keys() == {*rows.split(), *others.split()}
    assert json.loads(json.dumps(M, allow_nan=False)) == M
    for name in by_row:
        low, high = M[name]["ci95"]
        assert low <= M[name]["value"] <= high, name
    for name in ("gini", "coverage", "ECE"):
        assert M[name]["ci95"] is None and M[name]["n"] == 150
    assert M["HR@1_of_valid"]["n"] == M["valid_ratio"]["hits"]
    assert M["HR@1_cold"]["n"] == (ground.catalogue.count_I[ground.rows.target_E] == 0).sum() > 0
    for name in ("HR@1_by_decile", "HR@1_by_history"):
        assert sum(bin["hits"] for bin in M[name] if bin["n"]) == M["HR@1"]["hits"]


def test_without_vectors_or_scores_that_need_them_the_metrics_are_left_out():
    ground, answers = big()
    plain = Answers(answers.ranked_ExK, answers.score_ExK, full_score_ExC=answers.full_score_ExC + 9)
    blind = dataclasses.replace(ground, embedding_IxD=None, catalogue=catalogue_of("abc" * 14, [()] * 42, range(42)))
    M, _ = summary.describe(plain, blind, resamples=5)
    gone = "semantic_error_rate semantic_error_rate_random diversity ECE MGU_genre certified hallucination ambiguous"
    assert not M.keys() & set(gone.split()) and {"MGU", "novelty", "valid_ratio"} <= M.keys()


def test_nothing_depends_on_the_order_of_rows():
    ground, answers = big()
    assert (
        summary.describe(answers, ground, 60, seed=3)[0]
        == summary.describe(*take(ground, answers, np.random.default_rng(1).permutation(150))[::-1], 60, seed=3)[0]
    )


@pytest.mark.parametrize("size", [1, 7, 64])
def test_nothing_depends_on_how_many_rows_are_measured_together(size):
    ground, answers = big()
    whole = summary.by_row(answers, ground)
    parts = [
        summary.by_row(*take(ground, answers, np.arange(150)[start : start + size])[::-1])
        for start in range(0, 150, size)
    ]
    for name, value_E in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value_E, strict=True)


def test_ece_is_calibration_of_the_first_title_rounded_to_six_decimals():
    ground, answers = big(1)
    answers = dataclasses.replace(
        answers, ranked_ExK=metrics.ranking(answers.full_score_ExC, ground.rows.candidates_ExC)
    )
    title, rows = ground.catalogue.titles, ground.rows
    sure = [naive.confidence(*row, title) for row in zip(answers.full_score_ExC, rows.candidates_ExC)]
    right = [title[a] == title[b] for a, b in zip(answers.ranked_ExK[:, 0], rows.target_E)]
    found = summary.over_rows(answers, ground, resamples=2)["ECE"]["value"]
    assert found == pytest.approx(naive.calibration(sure, right), abs=6e-7) and found == round(found, 6)


def test_free_answers_are_counted_by_what_became_of_them():
    """Titles a, b, c, c; candidates b and a title that shares its name with item 3."""
    catalogue = catalogue_of("abcc", [()] * 4, [1, 1, 1, 1])
    rows = Rows(
        np.arange(6), np.zeros(6, int), np.array([[0]] * 6), np.array([1, 1, 3, 1, 1, 1]), np.array([[1, 2]] * 6)
    )
    answers = Answers(
        ranked_ExK=np.array([[1], [0], [2], [-1], [-1], [-1]]),
        score_ExK=np.full((6, 1), np.nan),
        text=["b", "a", "c", "zebra", "", "b b b b"],
        status=["candidate", "history_copy", "candidate", "not_in_catalogue", "empty", "truncated"],
        ambiguous_E=np.array([False, False, True, False, False, False]),
        substring_E=np.array([0, -1, 1, 0, -1, 0]),
    )
    M, _ = summary.describe(answers, summary.Ground(rows, catalogue, None, 5, bound=False), resamples=5)
    expected = {
        "HR@1": (2, 6),
        "valid_ratio": (3, 6),
        "HR@1_of_valid": (2, 3),
        "candidate_ratio": (2, 6),
        "not_in_catalogue": (3, 6),
        "history_copy": (1, 6),
        "hallucination": (1, 4),
        "empty": (1, 6),
        "truncated": (1, 6),
        "not_a_candidate": (0, 6),
        "ambiguous": (1, 6),
        "substring_valid_ratio": (4, 6),
        "substring_HR@1": (4, 6),
        "substring_HR@1_of_valid": (4, 4),
    }
    assert {name: (M[name]["hits"], M[name]["n"]) for name in expected} == expected
    assert "HR@5" not in M and "diversity" not in M


def test_what_a_random_answer_gets_depends_on_what_could_be_answered():
    """Item 0 seen; 1 is its neighbour and the target's rival. Of the candidates 1 and 3 half, of all others a third."""
    catalogue = catalogue_of("abcd", [()] * 4, [1] * 4)
    rows = Rows(np.zeros(1, int), np.zeros(1, int), np.array([[0]]), np.array([3]), np.array([[1, 3]]))
    embedding = np.array([[1.0, 0], [1, 0.1], [0, 1], [-1, 0]])
    answers = Answers(np.array([[3, 1]]), np.zeros((1, 2)))
    for bound, expected in ((True, 1 / 2), (False, 1 / 3)):
        values = summary.by_row(answers, summary.Ground(rows, catalogue, embedding, 1, bound))
        assert values["semantic_error_rate_random"] == [expected] and values["semantic_error_rate"] == [0.0]


def test_neighbours_are_found_once_for_all_models(monkeypatch):
    ground, answers = big()
    calls = []
    found = metrics.semantic_neighbours
    spy = types.SimpleNamespace(**vars(metrics))
    spy.semantic_neighbours = lambda *given: calls.append(1) or found(*given)
    monkeypatch.setattr(summary, "metrics", spy)
    for _ in range(2):
        summary.by_row(answers, ground)
    assert calls == [1]


# Cells


def test_cell_uses_wilson_for_distinct_users_and_users_otherwise():
    hits = np.array([1.0] * 43 + [0.0] * 52)
    found = summary.cell(hits, np.arange(95))
    assert found["hits"] == 43 and found["n"] == 95 and found["value"] == pytest.approx(43 / 95)
    assert found["ci95"] == list(significance.wilson(43, 95))
    clustered = summary.cell(hits, np.arange(95) // 10)
    assert clustered["value"] == found["value"]
    assert clustered["ci95"][1] - clustered["ci95"][0] > 1.5 * (found["ci95"][1] - found["ci95"][0])
    assert "hits" not in summary.cell(hits / 2, np.arange(95))


def test_cell_leaves_out_undefined_rows_and_survives_having_none():
    found = summary.cell(np.array([1.0, np.nan, 0.0]), np.arange(3))
    assert (found["value"], found["n"], found["hits"]) == (0.5, 2, 1)
    assert summary.cell(np.full(3, np.nan), np.arange(3)) == {"value": None, "ci95": None, "n": 0}


def test_a_cell_is_the_same_alone_and_among_others():
    random = np.random.default_rng(2)
    user = random.integers(40, size=200)
    values = {"gaps": np.where(random.random(200) < 0.3, np.nan, random.random(200)), "large": 1e6 * random.random(200)}
    values |= {str(i): random.random(200) for i in range(30)}
    found = summary.cells(values, user, resamples=100)
    assert all(found[name] == summary.cell(values[name], user, resamples=100) for name in values)


def test_deciles_hold_about_a_tenth_of_the_rows_each_in_order_of_popularity():
    random = np.random.default_rng(10)
    count = random.permutation(1000)[random.permutation(1000)[:600]]
    hit = (count > 500).astype(float)
    bins = summary.by_decile(hit, count, np.arange(600))
    assert [b["decile"] for b in bins] == list(range(1, 11)) and [b["n"] for b in bins] == [60] * 10
    assert all(a["counts"][1] < b["counts"][0] for a, b in itertools.pairwise(bins))
    assert bins[0]["value"] == 0.0 and bins[-1]["value"] == 1.0
    tied = summary.by_decile(hit, np.zeros(600, int), np.arange(600))
    assert sorted(b["n"] for b in tied) == [0] * 9 + [600]


def test_rows_by_history_share_a_class_with_all_of_their_length():
    length = np.repeat([2, 3, 4, 10], [10, 5, 5, 80])
    bins = summary.by_history((length > 3).astype(float), length, np.arange(100))
    assert [(b["history"], b["n"], b["hits"]) for b in bins] == [([2, 2], 10, 0), ([3, 4], 10, 5), ([10, 10], 80, 80)]
