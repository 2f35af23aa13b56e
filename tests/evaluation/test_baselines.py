import csv
import json

import numpy as np
import pytest

from rosepo_jax.evaluation import baselines, metrics


def padded(histories, n):
    return np.array([np.pad(h[-n:], (0, n - min(len(h), n)), constant_values=-1) for h in histories])


def windows(rows, n=10):
    pairs = [(row[:t], row[t]) for row in rows for t in range(1, len(row))]
    return padded([history for history, _ in pairs], n), np.array([target for _, target in pairs])


@pytest.fixture(scope="module")
def small_log():
    random = np.random.default_rng(0)
    return [random.permutation(30)[: random.integers(2, 25)] for _ in range(40)]


def test_counts_equal_a_loop_over_sequences(small_log):
    expected = np.zeros((30, 30))
    for row in small_log:
        for t in range(len(row)):
            for s in range(max(0, t - 5), t):
                expected[row[s], row[t]] += 1
    found = baselines.cooccurrence_counts(*windows(small_log), items=30)
    np.testing.assert_array_equal(found.toarray(), expected)


def test_counts_of_one_step_are_bigrams(small_log):
    expected = np.zeros((30, 30))
    for row in small_log:
        np.add.at(expected, (row[:-1], row[1:]), 1)
    found = baselines.cooccurrence_counts(*windows(small_log, n=3), items=30, steps=1)
    np.testing.assert_array_equal(found.toarray(), expected)


def test_scores_equal_a_loop_and_do_not_depend_on_blocks(small_log, monkeypatch):
    random = np.random.default_rng(1)
    count_IxI = baselines.cooccurrence_counts(*windows(small_log), items=30)
    history_ExN = padded([random.permutation(30)[: random.integers(0, 12)] for _ in range(50)], 10)
    candidates_ExC = np.array([random.permutation(30)[:7] for _ in range(50)])
    dense = count_IxI.toarray()
    expected = np.array([dense[history[history >= 0]].sum(axis=0) for history in history_ExN])
    np.testing.assert_array_equal(baselines.cooccurrence_scores(count_IxI, history_ExN), expected)
    monkeypatch.setattr(baselines, "CHUNK", 7)
    found = baselines.cooccurrence_scores(count_IxI, history_ExN, candidates_ExC)
    np.testing.assert_array_equal(found, np.take_along_axis(expected, candidates_ExC, axis=1))
    assert baselines.cooccurrence_scores(count_IxI, history_ExN[:0], candidates_ExC[:0]).shape == (0, 7)


def test_popularity_scores_are_counts():
    np.testing.assert_array_equal(
        baselines.popularity_scores(np.array([5, 0, 2]), np.array([[2, 0], [1, 1]])), [[2.0, 5.0], [0.0, 0.0]]
    )


def floors(train, tests, items, repeats=20):
    """HR@1 of popularity and co-occurrence over the target and 19 fresh uniform items outside the history."""
    histories, target_E = padded([h for h, _ in tests], 10), np.array([t for _, t in tests])
    count_I = np.bincount(np.concatenate(train), minlength=items)
    cooccurrence_ExI = baselines.cooccurrence_scores(baselines.cooccurrence_counts(*windows(train), items), histories)
    found = []
    for repeat in range(repeats):
        random = np.random.default_rng(repeat)
        candidates = []
        for history, target in tests:
            free = np.setdiff1d(np.arange(items), [*history, target])
            candidates.append([target, *random.choice(free, 19, replace=False)])
        candidates_ExC = np.array(candidates)
        found.append([])
        for score_ExC in (
            baselines.popularity_scores(count_I, candidates_ExC),
            np.take_along_axis(cooccurrence_ExI, candidates_ExC, axis=1),
        ):
            rank_E = metrics.target_rank(metrics.ranking(score_ExC, candidates_ExC), target_E, np.arange(items))
            found[-1].append(metrics.hit_ratio(rank_E, 1).mean())
    return np.mean(found, axis=0)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "sessions", "items", "popularity", "cooccurrence"),
    [
        ("llara-lastfm", "sessions.tsv", 4606, 0.058, 0.194),
        ("llara-movielens", "sessions_reconstructed.tsv", 1682, 0.193, 0.365),
    ],
)
def test_floors_on_real_rows(real_data, folder, sessions, items, popularity, cooccurrence):
    with open(real_data / folder / sessions, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    train = [np.array(row["items"].split(), int) for row in rows if row["split"] == "train"]
    with open(real_data / folder / "test.jsonl", encoding="utf-8") as file:
        tests = [(row["seq"], row["next"]) for row in map(json.loads, file)]
    # the published floors are means of 50 other draws, whose standard deviation is about .02
    assert floors(train, tests, items) == pytest.approx([popularity, cooccurrence], abs=0.02)
