import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rosepo_jax import seeds
from rosepo_jax.config import default
from rosepo_jax.errors import UserError
from rosepo_jax.preference import rejected


def make_rows(user, position, history, target, candidates):
    return types.SimpleNamespace(
        user_E=np.asarray(user, np.int32),
        position_E=np.asarray(position, np.int32),
        history_ExN=np.asarray(history, np.int32),
        target_E=np.asarray(target, np.int32),
        candidates_ExC=np.asarray(candidates, np.int32),
    )


def take(rows, index):
    return types.SimpleNamespace(**{name: value[index] for name, value in vars(rows).items()})


def make_pool(n_items, seen=((),), groups=None, counts=None, embedding=None):
    return rejected.Pool(
        title_group_I=np.arange(n_items) if groups is None else np.asarray(groups),
        count_I=np.ones(n_items, np.int64) if counts is None else np.asarray(counts),
        titled_I=np.ones(n_items, bool),
        indptr=np.cumsum([0] + [len(items) for items in seen]),
        items=np.concatenate([np.asarray(items, np.int64) for items in seen]),
        embedding_IxD=embedding,
    )


def pairs_of(**changes):
    pairs = default().pairs
    pairs.pool = "catalogue"
    pairs.update(changes)
    return pairs


@dataclasses.dataclass
class Case:
    pool: rejected.Pool
    rows: types.SimpleNamespace
    ranked_ExM: np.ndarray


def random_case(seed, n_items=30, n_users=8, n_rows=25, history=4, candidates=6) -> Case:
    """A small catalogue with duplicate and empty titles, users with train items, rows with short histories."""
    g = np.random.default_rng(seed)
    groups = np.arange(n_items)
    for _ in range(3):
        a, b = sorted(g.choice(n_items, 2, replace=False))
        groups[groups == groups[b]] = groups[a]
    embedding = g.normal(size=(n_items, 5)).astype(np.float32)
    embedding[n_items // 2] = embedding[0]  # a tie
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    seen = [np.sort(g.choice(n_items, g.integers(1, 9), replace=False)) for _ in range(n_users)]
    pool = make_pool(n_items, seen, groups, g.integers(0, 5, n_items), embedding)
    pool.titled_I[g.integers(n_items)] = False
    history_ExN = np.full((n_rows, history), -1)
    for row in history_ExN:
        length = g.integers(0, history + 1)
        row[:length] = g.choice(n_items, length, replace=False)
    lists = np.stack([g.choice(n_items, candidates, replace=False) for _ in range(n_rows)])
    rows = make_rows(g.integers(0, n_users, n_rows), np.arange(n_rows), history_ExN, lists[:, 0], lists)
    ranked = np.stack([g.permutation(n_items) for _ in range(n_rows)])
    ranked[:, 1] = -1  # an invalid string among the ranked
    return Case(pool, rows, ranked)


def naive(pairs, case: Case, seed, candidates_in_prompt):
    """Row by row, in plain Python: the definition that `sample` vectorises."""
    pool, rows = case.pool, case.rows
    strategy = rejected.strategies(
        rejected.mixture(pairs.strategy), seed, rows.user_E, rows.position_E, pairs.negatives
    )
    results = []
    for row, (user, position) in enumerate(zip(rows.user_E.tolist(), rows.position_E.tolist())):
        history = [i for i in rows.history_ExN[row].tolist() if i >= 0]
        listed = set(rows.candidates_ExC[row].tolist())
        taken = [*pool.items[pool.indptr[user] : pool.indptr[user + 1]].tolist(), *history, int(rows.target_E[row])]
        taken = {int(pool.title_group_I[i]) for i in taken}
        result: list[int] | None = []
        for code in strategy[row]:
            name = rejected.STRATEGIES[code]
            bound = candidates_in_prompt or (pairs.pool == "candidates" and name in ("self_hard", "uniform"))
            items = [i for i in (listed if bound else range(len(pool.count_I))) if pool.titled_I[i]]
            items = [i for i in items if int(pool.title_group_I[i]) not in taken]
            noise = {i: -np.log(-np.log(seeds.uniform(seeds.key(seed, name), user, position, i).item())) for i in items}
            if name == "self_hard":
                order = case.ranked_ExM[row].tolist()
                score = {i: -float(order.index(i)) for i in items if i in order}
            elif name == "popularity":
                score = {i: pairs.alpha * np.log(pool.count_I[i]) + noise[i] for i in items if pool.count_I[i]}
            elif name == "uniform":
                score = noise
            else:
                cosine = pool.embedding_IxD.astype(np.float64) @ pool.embedding_IxD.T.astype(np.float64)
                combine = {"max": max, "mean": lambda values: sum(values) / len(values)}[pairs.similarity]
                near = {i: np.float32(combine([cosine[h, i] for h in history])) for i in items if history}
                edge = sorted(near.values(), reverse=True)[: pairs.top][-1] if near else 0
                score = {i: near[i] / pairs.temperature + noise[i] for i in near if near[i] >= edge - 1e-7}
            free = {
                i: s
                for i, s in score.items()
                if int(pool.title_group_I[i]) not in {*map(int, chosen_groups(pool, result))}
            }
            if not free:
                result = None
                break
            result.append(max(free, key=free.__getitem__))
        results.append(result)
    return results


def chosen_groups(pool, items):
    return pool.title_group_I[np.asarray(items, np.int64)]


MIXTURES = (*rejected.STRATEGIES, "self_hard:0.5,uniform:0.5", "semantic:1,popularity:2,uniform:1")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    strategy=st.sampled_from(MIXTURES),
    negatives=st.integers(1, 4),
    pool=st.sampled_from(["candidates", "catalogue"]),
    in_prompt=st.booleans(),
    block=st.sampled_from([1, 100, 2**21]),
)
def test_invariants(seed, strategy, negatives, pool, in_prompt, block):
    case = random_case(seed)
    pairs = pairs_of(strategy=strategy, negatives=negatives, pool=pool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejected, "BLOCK", block)
        out = rejected.sample(
            pairs, case.pool, case.rows, seed, ranked_ExM=case.ranked_ExM, candidates_in_prompt=in_prompt
        )
    group = case.pool.title_group_I
    assert out.rejected_ExK.dtype == np.int32 and out.strategy_ExK.dtype == np.int8
    assert out.rejected_ExK.shape == out.strategy_ExK.shape == (len(case.rows.user_E), negatives)
    names = set(rejected.mixture(strategy))
    assert out.counters["rows"] == len(out.kept_E) and out.counters["kept"] == out.kept_E.sum()
    assert sum(out.counters["exhausted"].values()) == (~out.kept_E).sum()
    assert sum(out.counters["drawn"].values()) == out.kept_E.sum() * negatives
    assert set(out.counters["drawn"]) == set(out.counters["exhausted"]) == names
    assert (out.rejected_ExK[~out.kept_E] == -1).all()
    for row in np.flatnonzero(out.kept_E):
        items = out.rejected_ExK[row]
        user = case.rows.user_E[row]
        train = case.pool.items[case.pool.indptr[user] : case.pool.indptr[user + 1]]
        history = case.rows.history_ExN[row]
        assert ((items >= 0) & (items < len(group))).all() and case.pool.titled_I[items].all()
        assert len(set(group[items].tolist())) == negatives
        assert not set(group[items].tolist()) & set(group[train].tolist())
        assert not set(group[items].tolist()) & set(group[history[history >= 0]].tolist())
        assert group[case.rows.target_E[row]] not in group[items]
        for item, code in zip(items, out.strategy_ExK[row]):
            name = rejected.STRATEGIES[code]
            assert name in names
            if in_prompt or (pool == "candidates" and name in ("self_hard", "uniform")):
                assert item in case.rows.candidates_ExC[row]
            if name == "popularity":
                assert case.pool.count_I[item] > 0


@pytest.mark.parametrize("strategy", MIXTURES)
@pytest.mark.parametrize("pool,in_prompt", [("candidates", False), ("catalogue", False), ("catalogue", True)])
@pytest.mark.parametrize("similarity", ["max", "mean"])
def test_equals_naive_reference(strategy, pool, in_prompt, similarity):
    pairs = pairs_of(strategy=strategy, negatives=3, pool=pool, top=5, similarity=similarity, alpha=0.5)
    dropped = 0
    for seed in range(3):
        case = random_case(seed)
        out = rejected.sample(
            pairs, case.pool, case.rows, seed, ranked_ExM=case.ranked_ExM, candidates_in_prompt=in_prompt
        )
        expected = naive(pairs, case, seed, in_prompt)
        assert [None if not kept else items.tolist() for kept, items in zip(out.kept_E, out.rejected_ExK)] == expected
        dropped += sum(items is None for items in expected)
    assert dropped < 3 * 25


def test_draws_do_not_depend_on_order_batch_or_block(monkeypatch):
    case = random_case(5, n_rows=60)
    pairs = pairs_of(strategy="self_hard:1,semantic:1,popularity:1,uniform:1", negatives=2)
    whole = rejected.sample(pairs, case.pool, case.rows, 3, ranked_ExM=case.ranked_ExM)
    order = np.random.default_rng(0).permutation(60)
    monkeypatch.setattr(rejected, "BLOCK", 90)
    other = rejected.sample(pairs, case.pool, take(case.rows, order), 3, ranked_ExM=case.ranked_ExM[order])
    np.testing.assert_array_equal(other.rejected_ExK, whole.rejected_ExK[order])
    np.testing.assert_array_equal(other.strategy_ExK, whole.strategy_ExK[order])
    alone = rejected.sample(pairs, case.pool, take(case.rows, slice(7, 8)), 3, ranked_ExM=case.ranked_ExM[7:8])
    np.testing.assert_array_equal(alone.rejected_ExK[0], whole.rejected_ExK[7])
    changed = rejected.sample(pairs, case.pool, case.rows, 4, ranked_ExM=case.ranked_ExM)
    assert (changed.rejected_ExK != whole.rejected_ExK).any()


@pytest.mark.parametrize("strategy", ["semantic", "popularity", "uniform"])
def test_target_matters_only_by_exclusion(strategy):
    """Another target changes the draw of a row only where it was drawn or, for `semantic`, entered the nearest."""
    case = random_case(11, n_rows=200)
    pairs = pairs_of(strategy=strategy, top=30)
    first = rejected.sample(pairs, case.pool, case.rows, 0)
    rows = take(case.rows, slice(None))
    group = case.pool.title_group_I
    rows.target_E = ((rows.target_E + 7) % 30).astype(np.int32)
    second = rejected.sample(pairs, case.pool, rows, 0)
    hit = (group[first.rejected_ExK[:, 0]] == group[rows.target_E]) | (
        group[second.rejected_ExK[:, 0]] == group[case.rows.target_E]
    )
    assert 0 < hit.sum() < 60
    np.testing.assert_array_equal(first.rejected_ExK[~hit], second.rejected_ExK[~hit])


def test_popularity_golden():
    counts = np.array([1, 3, 0, 6, 10])
    for alpha, expected in ((1.0, [0.1, 0.3, 0, 0.6]), (0.5, [0.192993, 0.334273, 0, 0.472734])):
        p = np.exp(rejected.popularity_logits(counts, alpha)[:4])
        np.testing.assert_allclose(p / p.sum(), expected, atol=1e-6)
    np.testing.assert_array_equal(np.exp(rejected.popularity_logits(counts, 0.0)), [1, 1, 0, 1, 1])


@pytest.mark.parametrize(
    "changes,p",
    [
        ({"strategy": "popularity"}, [0.1, 0.3, 0, 0.6, 0]),
        ({"strategy": "popularity", "alpha": 0.5}, [0.192993, 0.334273, 0, 0.472734, 0]),
        ({"strategy": "popularity", "alpha": 0.0}, [1 / 3, 1 / 3, 0, 1 / 3, 0]),
        ({"strategy": "uniform"}, [0.25, 0.25, 0.25, 0.25, 0]),
    ],
)
def test_distribution_chi_square(changes, p):
    n = 20_000
    pool = make_pool(5, counts=[1, 3, 0, 6, 10])
    rows = make_rows(np.zeros(n), np.arange(n), np.full((n, 2), -1), np.full(n, 4), np.tile(np.arange(5), (n, 1)))
    out = rejected.sample(pairs_of(negatives=2, **changes), pool, rows, 0)
    p = np.array(p)
    drawn = np.bincount(out.rejected_ExK[:, 0], minlength=5)
    assert (drawn[p == 0] == 0).all()
    assert stats.chisquare(drawn[p > 0], n * p[p > 0] / p.sum()).pvalue > 1e-3
    # The second draw follows p without the first (Plackett-Luce).
    for first in np.flatnonzero(p):
        rest = np.where(np.arange(5) == first, 0, p)
        second = np.bincount(out.rejected_ExK[out.rejected_ExK[:, 0] == first, 1], minlength=5)
        assert stats.chisquare(second[rest > 0], second.sum() * (rest / rest.sum())[rest > 0]).pvalue > 1e-3


def test_semantic_stays_near_the_history_and_follows_its_softmax():
    """Items on a circle, the history at 0 degrees, the target opposite: draws are near the history."""
    n, n_items, top = 20_000, 40, 6
    angle = 2 * np.pi * np.arange(n_items) / n_items
    embedding = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    pool = make_pool(n_items, seen=[[0]], embedding=embedding)
    rows = make_rows(np.zeros(n), np.arange(n), np.tile([0, -1], (n, 1)), np.full(n, 20), np.zeros((n, 1)))
    out = rejected.sample(pairs_of(strategy="semantic", top=top, temperature=0.05), pool, rows, 0)
    nearest = [1, 39, 2, 38, 3, 37]
    logits = embedding[nearest, 0].astype(np.float64) / 0.05
    p = np.exp(logits - logits.max())
    p /= p.sum()
    drawn = np.bincount(out.rejected_ExK[:, 0], minlength=n_items)
    assert drawn.sum() == drawn[nearest].sum() == n
    assert stats.chisquare(drawn[nearest], n * p).pvalue > 1e-3


@pytest.mark.parametrize("reduce,combine", [("max", np.max), ("mean", np.mean)])
def test_similarity_equals_direct_cosines(reduce, combine):
    case = random_case(2)
    unit, history_ExN = case.pool.embedding_IxD.astype(np.float64), case.rows.history_ExN
    similarity_ExI = rejected.similarity(case.pool.embedding_IxD, history_ExN, reduce)
    for row, history in zip(similarity_ExI, history_ExN):
        history = history[history >= 0]
        if len(history):
            np.testing.assert_allclose(row, combine(unit[history] @ unit.T, axis=0), atol=1e-6)
        else:
            assert (row == -np.inf).all()


def test_self_hard_takes_the_best_wrong_items_in_order():
    pool = make_pool(8, seen=[[5]], groups=[0, 1, 2, 3, 1, 5, 6, 7])
    rows = make_rows([0], [3], [[5, -1]], [2], [[2, 3, 6, 7]])
    ranked = np.array([[2, 4, 1, -1, 5, 3, 0]])  # target, item, its duplicate title, invalid, seen, item, item
    out = rejected.sample(pairs_of(negatives=3), pool, rows, 0, ranked_ExM=ranked)
    assert out.rejected_ExK.tolist() == [[4, 3, 0]]
    bound = rejected.sample(pairs_of(negatives=1, pool="candidates"), pool, rows, 0, ranked_ExM=ranked)
    assert bound.rejected_ExK.tolist() == [[3]]


def test_exhausted_pool_drops_the_row_and_counts_the_strategy():
    pool = make_pool(4, seen=[[0, 1], [0]])
    rows = make_rows([0, 1], [2, 2], [[0, 1], [0, -1]], [2, 2], np.tile(np.arange(4), (2, 1)))
    out = rejected.sample(pairs_of(strategy="uniform", negatives=2), pool, rows, 0)
    assert out.kept_E.tolist() == [False, True]
    assert out.rejected_ExK[0].tolist() == [-1, -1] and sorted(out.rejected_ExK[1].tolist()) == [1, 3]
    assert out.counters == {"rows": 2, "kept": 1, "drawn": {"uniform": 2}, "exhausted": {"uniform": 1}}


def test_mixture_shares_and_independence_of_the_draws():
    n = 20_000
    weights = rejected.mixture("self_hard:2, uniform:1,semantic:1")
    assert weights == {"self_hard": 0.5, "uniform": 0.25, "semantic": 0.25}
    strategy_ExK = rejected.strategies(weights, 0, np.arange(n), np.zeros(n, int), 2)
    for draw in range(2):
        counts = np.bincount(strategy_ExK[:, draw], minlength=4)
        assert counts[2] == 0
        assert stats.chisquare(counts[[0, 1, 3]], n * np.array([0.5, 0.25, 0.25])).pvalue > 1e-3
    table = np.histogram2d(strategy_ExK[:, 0], strategy_ExK[:, 1], bins=[[0, 1, 3, 4]] * 2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert (rejected.strategies({"semantic": 1.0}, 0, np.arange(n), np.zeros(n, int), 1) == 1).all()


@pytest.mark.parametrize(
    "text,message",
    [
        ("hard", "no strategy 'hard'"),
        ("", "no strategy ''"),
        ("uniform:0.5,uniform:0.5", "given twice"),
        ("uniform:-1", "not a positive number"),
        ("uniform:x", "not a positive number"),
        ("uniform:", "not a positive number"),
        ("uniform:nan", "not a positive number"),
        ("uniform:inf", "not a positive number"),
    ],
)
def test_bad_mixtures(text, message):
    with pytest.raises(UserError, match=message):
        rejected.mixture(text)


@pytest.mark.parametrize(
    "changes", [{"negatives": 0}, {"pool": "all"}, {"top": 0}, {"temperature": 0.0}, {"similarity": "median"}]
)
def test_bad_settings_are_named(changes):
    case = random_case(0)
    with pytest.raises(UserError, match=next(iter(changes))):
        rejected.sample(pairs_of(**changes), case.pool, case.rows, 0, ranked_ExM=case.ranked_ExM)


def test_missing_inputs_are_errors():
    case = random_case(0)
    with pytest.raises(ValueError, match="ranked"):
        rejected.sample(pairs_of(), case.pool, case.rows, 0)
    pool = dataclasses.replace(case.pool, embedding_IxD=None)
    with pytest.raises(ValueError, match="embedding"):
        rejected.sample(pairs_of(strategy="semantic"), pool, case.rows, 0)


def test_flip_share():
    user_E, position_E = np.arange(20_000), np.full(20_000, 4)
    flipped = rejected.flip(0, user_E, position_E, 0.3)
    assert stats.binomtest(int(flipped.sum()), 20_000, 0.3).pvalue > 1e-3
    assert not rejected.flip(0, user_E, position_E, 0.0).any() and rejected.flip(0, user_E, position_E, 1.0).all()
    np.testing.assert_array_equal(rejected.flip(0, user_E[::-1], position_E, 0.3), flipped[::-1])
    assert not (flipped & ~rejected.flip(0, user_E, position_E, 0.4)).any()  # shares are nested
    with pytest.raises(UserError, match="share"):
        rejected.flip(0, user_E, position_E, 1.5)
