import math

import naive
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rosepo_jax import seeds
from rosepo_jax.evaluation import metrics

ALONE = np.arange(50)  # title groups of a catalogue without duplicate titles


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


RANKED = np.array(
    [[5, 6, 1, 8, 3], [2, 7, 6, 0, 1], [1, 2, 8, 4, 5], [0, 4, 3, 9, 8], [1, 5, 4, 6, 3], [7, 4, 1, 0, 3]]
)
TARGET = np.array([5, 7, 5, 1, 4, 0])
COUNT = np.array([40, 3, 17, 1, 9, 25, 2, 13, 6, 30])


def test_ranking_metrics_equal_ranx_and_recbole():
    """Golden numbers of ranx 0.3.21 and, where both have them, RecBole 1.2.1."""
    rank = metrics.target_rank(RANKED, TARGET, ALONE)
    assert rank.tolist() == [1, 2, 5, np.inf, 3, 4]
    assert [metrics.hit_ratio(rank, k).mean() for k in (1, 3, 5)] == pytest.approx([1 / 6, 0.5, 5 / 6], abs=1e-15)
    assert metrics.ndcg(rank, 3).mean() == pytest.approx(0.3551549589285763, abs=1e-15)
    assert metrics.ndcg(rank, 5).mean() == pytest.approx(0.4914098531465654, abs=1e-15)
    assert metrics.ndcg(rank, 5)[5] == pytest.approx(0.43067655807339306, abs=1e-15)
    assert metrics.reciprocal_rank(rank).mean() == pytest.approx(0.38055555555555554, abs=1e-15)


def test_popularity_and_coverage_equal_recbole():
    """Golden numbers of RecBole 1.2.1: AveragePopularity, TailPercentage with tail_ratio 0.8, ItemCoverage, GiniIndex.

    Its tail is cut at int(0.8 items), so it agrees where five divides the number of items.
    """
    for k, popularity, tail, coverage, gini in (
        (1, 16.833333333333332, 0.833333333333333, 0.5, 0.566666666666667),
        (3, 11.111111111111112, 0.944444444444444, 0.9, 0.322222222222222),
        (5, 12.133333333333333, 0.866666666666667, 1.0, 0.2),
    ):
        top = RANKED[:, :k]
        assert metrics.average_popularity(top, COUNT).mean() == pytest.approx(popularity, abs=1e-12)
        assert metrics.long_tail(top, COUNT).mean() == pytest.approx(tail, abs=1e-12)
        assert metrics.coverage(top, 10) == coverage
        assert metrics.gini(metrics.list_counts(top, 10)) == pytest.approx(gini, abs=1e-12)


def test_cold_rows_are_those_whose_target_is_never_trained_on():
    found = metrics.on_cold(np.array([1.0, 0.0, 1.0]), np.array([0, 1, 2]), np.array([0, 3, 0]))
    np.testing.assert_array_equal(found, [1.0, np.nan, 1.0])


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


def test_a_list_without_answers_is_a_miss_and_no_example_of_what_answers_are_like():
    silent, history = np.full((1, 3), -2), np.array([[1]])
    assert np.isinf(metrics.target_rank(silent, np.array([1]), ALONE)).all()
    assert metrics.valid(silent, np.array([[1]]), ALONE) == [0.0]
    for found in (
        metrics.not_in_catalogue(silent),
        metrics.history_copy(silent, history, ALONE),
        metrics.duplicate(silent, ALONE),
        metrics.semantic_error(silent, np.array([1]), np.array([[2]]), ALONE),
        metrics.average_popularity(silent, ALONE),
    ):
        assert np.isnan(found).all()


# Format and popularity


def test_shares_are_of_the_answers_that_were_given():
    ranked = np.array([[3, -1, 3, -2, -2]])
    assert metrics.not_in_catalogue(ranked) == [1 / 3]
    assert metrics.duplicate(ranked, ALONE) == [1 / 3]
    assert metrics.history_copy(ranked, np.array([[3, 7]]), ALONE) == [2 / 3]
    assert metrics.average_popularity(ranked, 2 * ALONE) == [6.0]


def test_novelty_in_bits():
    """8 interactions: shares 1/2, 1/4, 1/8, 1/8; the item without any counts as one with one."""
    count = np.array([4, 2, 1, 1, 0])
    assert metrics.novelty(np.array([[0, 1, -2], [2, 4, -1]]), count).tolist() == [1.5, 3.0]
    assert metrics.novelty(np.array([[0]]), np.zeros(2)).tolist() == [0.0]


def test_popularity_lift_by_hand():
    count = np.array([0, 1, 3])
    found = metrics.popularity_lift(np.array([[2, 1], [0, -1]]), np.array([1, 2]), count)
    assert found == pytest.approx([(math.log(4) + math.log(2)) / 2 - math.log(2), -math.log(4)], abs=1e-15)


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


# Meaning


def test_diversity_of_known_angles():
    embedding = np.array([[2.0, 0], [0, 3], [-1, 0], [5, 0], [0, 0]])
    group = np.array([0, 1, 2, 0, 4])  # items 0 and 3 share a title
    ranked = np.array([[0, 1, 2], [0, 3, 1], [0, 3, -1], [1, -1, -2], [0, 4, -2]])
    found = metrics.intra_list_diversity(ranked, embedding, group)
    np.testing.assert_array_equal(found, [(1 + 2 + 1) / 3, 1.0, np.nan, np.nan, 1.0])


@given(st.integers(0, 2**32 - 1))
def test_vectors_add_up_exactly_in_any_order(seed):
    random = np.random.default_rng(seed)
    a, b = metrics._unit(random.standard_normal((2, 700)))
    order = random.permutation(700)
    assert a @ b == a[order] @ b[order] == math.fsum(a * b)


def test_semantic_neighbours_against_a_loop(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 2)
    random = np.random.default_rng(5)
    embedding = random.standard_normal((50, 6)) * random.uniform(0.1, 9, (50, 1))
    history = np.where(np.arange(6) < random.integers(1, 7, (5, 1)), random.integers(50, size=(5, 6)), -1)
    found = metrics.semantic_neighbours(history, embedding, 7, ALONE)
    luck = seeds.uniform(metrics.TIES, ALONE)
    for row in range(5):
        assert found[row].tolist() == naive.neighbours(history[row].tolist(), ALONE, embedding, luck, 7)


def test_a_history_title_under_another_number_is_no_neighbour():
    group, embedding = np.array([0, 0, 2, 3]), np.array([[1.0, 0], [1, 0], [1, 1], [0, 1]])
    found = metrics.semantic_neighbours(np.array([[0, -1], [0, 3]]), embedding, 3, group)
    assert found.tolist() == [[2, 3, -1], [2, -1, -1]]


def test_semantic_error_of_top_and_of_chance():
    neighbour, target = np.array([[1, 2, 3], [1, 2, 3]]), np.array([1, 9])
    assert metrics.semantic_error(np.array([[1], [1]]), target, neighbour, ALONE).tolist() == [0.0, 1.0]
    assert metrics.semantic_error(np.array([[-1], [7]]), target, neighbour, ALONE).tolist() == [0.0, 0.0]
    pool = np.tile([1, 2, 8, 9], (2, 1))
    assert metrics.semantic_error(pool, target, neighbour, ALONE).tolist() == [0.25, 0.5]


def test_semantic_error_of_a_random_item_of_the_catalogue_is_that_of_the_whole_pool():
    group = np.array([0, 1, 2, 2, 4, 5])
    history, target, neighbour = np.array([[0, 0, -1]]), np.array([4]), np.array([[2, 4]])
    found = metrics.random_semantic_error(target, neighbour, history, group)
    assert found == metrics.semantic_error(np.array([[1, 2, 3, 4, 5]]), target, neighbour, group) == [2 / 5]


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


def test_calibration_error_does_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(8)
    probability, outcome = random.random(500), random.random(500) < 0.4
    order = random.permutation(500)
    assert metrics.calibration_error(probability[order], outcome[order]) == metrics.calibration_error(
        probability, outcome
    )


def test_confidence_is_of_titles_not_of_places_in_the_list():
    log_p = np.log(np.array([[0.2, 0.1, 0.1], [0.2, 0.1, 0.2]]))
    group = np.array([0, 1, 0])
    assert metrics.confidence(log_p[:1], np.array([[0, 1, 2]]), np.arange(3)) == pytest.approx([0.5])
    assert metrics.confidence(log_p[1:], np.array([[0, 1, 2]]), group) == pytest.approx([2 / 3])
