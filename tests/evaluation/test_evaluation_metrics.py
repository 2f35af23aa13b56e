import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax.evaluation import metrics, significance

ALONE = np.arange(50)  # title groups of a catalogue without duplicate titles


def lists(seed=0, rows=60, items=50, k=8, invalid=0.1):
    """Lists with duplicates and invalid answers, targets, histories and candidates."""
    random = np.random.default_rng(seed)
    ranked = np.where(random.random((rows, k)) < invalid, -1, random.integers(items, size=(rows, k)))
    target = random.integers(items, size=rows)
    history = np.where(np.arange(6) < random.integers(1, 7, (rows, 1)), random.integers(items, size=(rows, 6)), -1)
    candidates = np.array([random.permutation(np.append(np.delete(np.arange(items), t)[:9], t)) for t in target])
    return ranked, target, history, candidates


# Ranking


def test_ranking_sorts_by_score_whatever_the_order_of_candidates():
    random = np.random.default_rng(0)
    items = np.array([random.permutation(50)[:20] for _ in range(30)])
    scores = random.integers(0, 5, (30, 20)).astype(float)
    ranked = metrics.ranking(scores, items)
    order = random.permutation(20)
    np.testing.assert_array_equal(metrics.ranking(scores[:, order], items[:, order]), ranked)
    for row in range(30):
        score = dict(zip(items[row], scores[row], strict=True))
        assert sorted(ranked[row]) == sorted(items[row])
        assert (np.diff([score[item] for item in ranked[row]]) <= 0).all()
    np.testing.assert_array_equal(metrics.ranking(scores, items, 3), ranked[:, :3])


def test_constant_scores_hit_at_chance_in_every_slot():
    random = np.random.default_rng(1)
    items = np.array([random.permutation(5000)[:20] for _ in range(4000)])
    first = metrics.ranking(np.zeros((4000, 20)), items, 1)
    hits = (first == items).mean(axis=0)  # by slot
    assert np.abs(hits - 0.05).max() < 4.5 * math.sqrt(0.05 * 0.95 / 4000)


def test_ranking_keeps_impossible_items_last_and_refuses_nan():
    assert metrics.ranking(np.array([[-np.inf, 0.0, 1.0]]), np.array([[7, 8, 9]])).tolist() == [[9, 8, 7]]
    with pytest.raises(ValueError, match="NaN"):
        metrics.ranking(np.array([[np.nan, 1.0]]), np.array([[1, 2]]))


def test_rank_metrics_against_loops():
    ranked, target, _, _ = lists()
    rank = metrics.target_rank(ranked, target, ALONE)
    for row in range(len(ranked)):
        place = ranked[row].tolist().index(target[row]) + 1 if target[row] in ranked[row] else None
        assert rank[row] == (place or np.inf)
        for k in (1, 5):
            assert metrics.hit_ratio(rank, k)[row] == float(place is not None and place <= k)
            expected = 1 / math.log2(1 + place) if place and place <= k else 0.0
            assert metrics.ndcg(rank, k)[row] == pytest.approx(expected, abs=1e-15)
        assert metrics.reciprocal_rank(rank)[row] == (1 / place if place else 0.0)


def test_items_with_the_same_title_are_the_same_answer():
    group = np.array([0, 1, 0, 3])  # items 0 and 2 share a title
    ranked = np.array([[2, 1], [1, 2], [3, 1], [-1, 0]])
    assert metrics.target_rank(ranked, np.zeros(4, int), group).tolist() == [1, 2, np.inf, 2]
    assert metrics.duplicate(np.array([[0, 2, 1, 2]]), group).tolist() == [0.5]
    assert metrics.history_copy(np.array([[0, 1]]), np.array([[2, -1]]), group).tolist() == [0.5]
    assert metrics.valid(np.array([[2]]), np.array([[0, 1]]), group).tolist() == [1.0]
    assert metrics.semantic_error(np.array([[2]]), np.array([0]), np.array([[2]]), group).tolist() == [0.0]


def test_an_invalid_answer_matches_nothing_not_even_padding_or_the_last_item():
    ranked, last = np.array([[-1, -1]]), 49
    assert metrics.target_rank(ranked, np.array([last]), ALONE).tolist() == [np.inf]
    assert metrics.history_copy(ranked, np.array([[last, -1]]), ALONE).tolist() == [0.0]
    assert metrics.duplicate(ranked, ALONE).tolist() == [0.0]
    assert metrics.valid(ranked, np.array([[last]]), ALONE).tolist() == [0.0]
    assert metrics.not_in_catalogue(ranked).tolist() == [1.0]
    assert np.isnan(metrics.average_popularity(ranked, np.arange(50)))
    assert metrics.list_counts(ranked, 50).sum() == 0


# Format and popularity


def test_format_and_popularity_metrics_against_loops():
    ranked, target, history, candidates = lists(2)
    count = np.random.default_rng(3).integers(0, 90, 50)
    for row in range(len(ranked)):
        answers = ranked[row].tolist()
        items = [item for item in answers if item >= 0]
        seen = set(history[row].tolist()) - {-1}
        repeats = sum(item >= 0 and item in answers[:place] for place, item in enumerate(answers))
        level = np.mean([math.log(1 + count[item]) for item in items]) - math.log(1 + count[target[row]])
        expected = {
            metrics.not_in_catalogue: ((), answers.count(-1) / 8),
            metrics.history_copy: ((history, ALONE), sum(item in seen for item in answers) / 8),
            metrics.duplicate: ((ALONE,), repeats / 8),
            metrics.valid: ((candidates, ALONE), float(answers[0] in candidates[row])),
            metrics.average_popularity: ((count,), np.mean([count[item] for item in items])),
            metrics.popularity_lift: ((target, count), level),
        }
        for metric, (arguments, value) in expected.items():
            assert metric(ranked, *arguments)[row] == pytest.approx(value, abs=1e-12), metric.__name__


def test_gini_closed_forms():
    assert metrics.gini(np.full(7, 3)) == pytest.approx(0)
    assert metrics.gini(np.array([0, 0, 0, 9])) == pytest.approx(1 - 1 / 4)
    assert metrics.gini(np.zeros(4)) == 0.0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_gini_is_half_the_relative_mean_difference(counts):
    x = np.array(counts, float)
    expected = np.abs(x[:, None] - x[None]).mean() / (2 * x.mean())
    assert metrics.gini(x) == pytest.approx(expected, abs=1e-12)


def test_coverage_counts_distinct_items():
    assert metrics.coverage(np.array([[0, 1], [1, -1]]), 8) == 2 / 8


# Group fairness


def test_group_unfairness_golden():
    """The worked example: histories {A,A,B}, {A,B,B,B}; top-2 {A,A}, {A,B}."""
    member = np.eye(2)
    history = np.array([[0, 0, 1, -1], [0, 1, 1, 1]])
    ranked = np.array([[0, 0], [0, 1]])
    counts = metrics.group_counts(history, member).sum(0), metrics.group_counts(ranked, member).sum(0)
    assert counts[0].tolist() == [3, 4] and counts[1].tolist() == [3, 1]
    mgu, dgu = metrics.group_unfairness(*counts)
    assert mgu == pytest.approx(0.321429, abs=1e-6) and dgu == pytest.approx(0.642857, abs=1e-6)
    found = metrics.over_rows(ranked, history, np.arange(2), member, resamples=50)
    assert found["MGU"]["value"] == pytest.approx(mgu) and found["DGU"]["value"] == pytest.approx(dgu)


def test_group_unfairness_is_zero_when_lists_mirror_histories():
    counts = np.array([3.0, 5.0, 2.0])
    assert np.allclose(metrics.group_unfairness(counts, 4 * counts), 0)


def test_group_counts_with_several_labels_against_a_loop():
    names, member = metrics.named_groups([("a", "b"), ("b",), (), ("c",)])
    assert names == ("a", "b", "c")
    item = np.array([[0, 1, -1], [3, 3, 2], [-1, -1, -1]])
    assert metrics.group_counts(item, member).tolist() == [[1, 2, 0], [0, 0, 2], [0, 0, 0]]


def test_popularity_groups_are_equal_bins_in_order_of_count():
    count = np.random.default_rng(4).integers(0, 20, 53)
    member = metrics.popularity_groups(count)
    assert (member.sum(axis=1) == 1).all() and member.sum(axis=0).min() >= 10
    bins = member.argmax(axis=1)
    assert all(count[bins == b].max() <= count[bins == b + 1].min() for b in range(4))


# Semantic error


def test_semantic_neighbours_against_a_loop(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 2)
    random = np.random.default_rng(5)
    embedding = random.standard_normal((50, 6)) * random.uniform(0.1, 9, (50, 1))
    _, _, history, _ = lists(5)
    found = metrics.semantic_neighbours(history, embedding, 7)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    for row in range(5):
        taken = {int(item) for item in history[row] if item >= 0}
        score = {i: max(cosine(embedding[i], embedding[h]) for h in taken) for i in range(50) if i not in taken}
        assert found[row].tolist() == sorted(score, key=lambda i: -score[i])[:7]


def test_semantic_error_of_top_and_of_chance():
    neighbour, target = np.array([[1, 2, 3], [1, 2, 3]]), np.array([1, 9])
    assert metrics.semantic_error(np.array([[1], [1]]), target, neighbour, ALONE).tolist() == [0.0, 1.0]
    assert metrics.semantic_error(np.array([[-1], [7]]), target, neighbour, ALONE).tolist() == [0.0, 0.0]
    pool = np.tile([1, 2, 8, 9], (2, 1))
    assert metrics.semantic_error(pool, target, neighbour, ALONE).tolist() == [0.25, 0.5]


# True preferences and epsilon


def test_true_win_rate_closed_forms():
    candidates = np.array([[4, 5, 6, 7]] * 3)
    utility = np.array([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 1.0, 0.0]])
    assert metrics.true_win_rate(np.array([7, 5, 4]), candidates, utility) == pytest.approx([1, 1 / 3, 2 / 3])
    with pytest.raises(ValueError):
        metrics.true_win_rate(np.array([9, 5, 4]), candidates, utility)


def test_true_pair_accuracy_is_kendall_without_ties_and_a_loop_with_them():
    random = np.random.default_rng(6)
    score, utility = random.standard_normal((20, 9)), random.standard_normal((20, 9))
    expected = [(1 + scipy.stats.kendalltau(s, u).statistic) / 2 for s, u in zip(score, utility, strict=True)]
    np.testing.assert_allclose(metrics.true_pair_accuracy(score, utility), expected, atol=1e-12)
    assert (metrics.true_pair_accuracy(utility, utility) == 1).all()
    tied = metrics.true_pair_accuracy(np.array([[1.0, 1.0, 0.0]]), np.array([[2.0, 1.0, 1.0]]))
    assert tied.tolist() == [(0.5 + 1.0) / 2]  # pairs 0-1 (equal scores) and 0-2; 1-2 has equal utility
    assert np.isnan(metrics.true_pair_accuracy(np.array([[1.0, 2.0]]), np.zeros((1, 2))))[0]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_auc_against_all_pairs(rows):
    positive = [score for score, label in rows if label]
    negative = [score for score, label in rows if not label]
    found = metrics.auc(np.array([score for score, _ in rows]), np.array([label for _, label in rows]))
    if not positive or not negative:
        assert found is None
    else:
        wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert found == pytest.approx(np.mean(wins))


def test_epsilon_quality_knows_a_calibrated_epsilon_from_a_shuffled_one():
    random = np.random.default_rng(7)
    epsilon = random.uniform(0, 0.5, 20_000)
    flipped = random.random(20_000) < epsilon
    good = metrics.epsilon_quality(epsilon, flipped)
    bad = metrics.epsilon_quality(random.permutation(epsilon), flipped)
    assert good["AUC"] > 0.65 and bad["AUC"] == pytest.approx(0.5, abs=0.02)
    assert good["Brier"] < bad["Brier"] and good["ECE"] < 0.015 < bad["ECE"]
    perfect = metrics.epsilon_quality(flipped.astype(float), flipped)
    assert (perfect["AUC"], perfect["Brier"], perfect["ECE"]) == (1.0, 0.0, 0.0)


def test_calibration_error_by_hand():
    probability, outcome = np.array([0.05, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1])
    assert metrics.calibration_error(probability, outcome) == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)


# Summaries


def test_cell_uses_wilson_for_distinct_users_and_users_otherwise():
    hits = np.array([1.0] * 43 + [0.0] * 52)
    found = metrics.cell(hits, np.arange(95))
    assert found["hits"] == 43 and found["n"] == 95 and found["value"] == pytest.approx(43 / 95)
    assert found["ci95"] == list(significance.wilson(43, 95))
    clustered = metrics.cell(hits, np.arange(95) // 10)
    assert clustered["value"] == found["value"]
    assert clustered["ci95"][1] - clustered["ci95"][0] > 1.5 * (found["ci95"][1] - found["ci95"][0])
    assert "hits" not in metrics.cell(hits / 2, np.arange(95))


def test_cell_leaves_out_undefined_rows_and_survives_having_none():
    found = metrics.cell(np.array([1.0, np.nan, 0.0]), np.arange(3))
    assert (found["value"], found["n"], found["hits"]) == (0.5, 2, 1)
    assert metrics.cell(np.full(3, np.nan), np.arange(3)) == {"value": None, "ci95": None, "n": 0}


def everything(seed=8, order=slice(None)):
    ranked, target, history, candidates = (array[order] for array in lists(seed))
    user = (np.arange(60) // 2)[order]
    count = np.arange(50) * 3
    neighbour = metrics.semantic_neighbours(history, np.random.default_rng(0).standard_normal((50, 4)), 10)
    rows = metrics.by_row(ranked, target, history, candidates, ALONE, count, neighbour)
    member = metrics.popularity_groups(count)
    return {
        **metrics.summary(rows, user, resamples=100),
        **metrics.over_rows(ranked, history, user, member, resamples=100),
        "HR@5_by_decile": metrics.by_decile(rows["HR@5"], target, count, user, resamples=100),
    }


def test_summary_holds_every_name_and_is_strict_json():
    found = everything()
    names = "HR@1 HR@5 NDCG@5 MRR valid_ratio HR@1_of_valid popularity_lift ARP gini coverage MGU DGU"
    names += " semantic_error_rate not_in_catalogue history_copy duplicate"
    assert set(names.split()) <= set(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name in names.split():
        if found[name]["ci95"]:
            low, high = found[name]["ci95"]
            assert low <= found[name]["value"] <= high or name in ("MGU", "DGU"), name
    assert found["HR@1_of_valid"]["n"] == found["valid_ratio"]["hits"]


def test_summary_does_not_depend_on_the_order_of_rows():
    first, second = everything(), everything(order=np.random.default_rng(9).permutation(60))

    def compare(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    compare(first, second)


def test_deciles_hold_about_a_tenth_of_the_rows_each_in_order_of_popularity():
    random = np.random.default_rng(10)
    count = random.permutation(1000)
    target = random.permutation(1000)[:600]
    hit = (count[target] > 500).astype(float)
    bins = metrics.by_decile(hit, target, count, np.arange(600))
    assert [b["decile"] for b in bins] == list(range(1, 11)) and [b["n"] for b in bins] == [60] * 10
    assert all(a["counts"][1] < b["counts"][0] for a, b in itertools.pairwise(bins))
    assert bins[0]["value"] == 0.0 and bins[-1]["value"] == 1.0
    tied = metrics.by_decile(hit, target, np.zeros(1000, int), np.arange(600))
    assert sorted(b["n"] for b in tied) == [0] * 9 + [600]
