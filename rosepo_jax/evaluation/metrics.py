"""What is measured, one number per row wherever the metric is a mean over rows. Plain numpy.

Lists are item indices, best first; -1 is an answer that is no item of the catalogue (or no answer). Two items with
equal normalised titles are the same answer: pass `Catalogue.title_group_I`. NaN marks a row to which a metric does not
apply; `summary` leaves it out, and "n" counts the rest.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.evaluation import significance

TIES = seeds.key("ties")
BLOCK = 64  # rows whose similarities to the whole catalogue are held at a time


# Ranking


def ranking(score_ExC: np.ndarray, item_ExC: np.ndarray, k: int | None = None) -> np.ndarray:
    """The items by descending score, ranked_ExK; ties by `seeds.uniform` of the item index, ascending.

    So a tie favours neither the target's slot nor low indices, and a constant score is a random ranking.
    Errors:    ValueError on a NaN score.
    """
    score_ExC, item_ExC = np.broadcast_arrays(score_ExC, item_ExC)
    if np.isnan(score_ExC).any():
        raise ValueError("a score is NaN")
    order_ExC = np.lexsort((seeds.uniform(TIES, item_ExC), -score_ExC), axis=-1)
    return np.take_along_axis(item_ExC, order_ExC[..., :k], axis=-1)


def target_rank(ranked_ExK: np.ndarray, target_E: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """rank_E: the place (from 1) of the first item with the target's title; inf when it is not in the list."""
    match_ExK = _titles(ranked_ExK, title_group_I) == title_group_I[target_E][:, None]
    return np.where(match_ExK.any(axis=1), match_ExK.argmax(axis=1) + 1.0, np.inf)


def _titles(item: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    return np.where(item >= 0, title_group_I[item], -1)


def hit_ratio(rank_E: np.ndarray, k: int) -> np.ndarray:
    """HR@k = 1[rank <= k]."""
    return (rank_E <= k).astype(np.float64)


def ndcg(rank_E: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k = 1[rank <= k] / log2(1 + rank): one relevant item, so the ideal gain is 1."""
    return np.where(rank_E <= k, 1 / np.log2(1 + rank_E), 0.0)


def reciprocal_rank(rank_E: np.ndarray) -> np.ndarray:
    """1 / rank, 0 when the target is not in the list; its mean is MRR."""
    return 1 / rank_E


# Format: what is wrong with a list whatever the target. Shares of the list's answers (-1 included)


def not_in_catalogue(ranked_ExK: np.ndarray) -> np.ndarray:
    """Share of the answers that are no item (RecLM-gen's NonExistRate, arXiv 2403.05063)."""
    return (ranked_ExK < 0).mean(axis=1)


def history_copy(ranked_ExK: np.ndarray, history_ExN: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """Share of the answers whose title stands in the history (InHistoryRate)."""
    return _among(ranked_ExK, history_ExN, title_group_I).mean(axis=1)


def duplicate(ranked_ExK: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """Share of the answers whose title stands earlier in the same list (RepeatRate)."""
    title_ExK = _titles(ranked_ExK, title_group_I)
    same_ExKxK = (title_ExK[:, :, None] == title_ExK[:, None, :]) & (title_ExK >= 0)[:, :, None]
    return np.tril(same_ExKxK, -1).any(axis=2).mean(axis=1)


def valid(ranked_ExK: np.ndarray, candidates_ExC: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """1[the first answer has a candidate's title]; its mean is the literature's valid ratio."""
    return _among(ranked_ExK[:, :1], candidates_ExC, title_group_I)[:, 0].astype(np.float64)


def _among(item_ExK: np.ndarray, set_ExM: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    title_ExK, title_ExM = _titles(item_ExK, title_group_I), _titles(set_ExM, title_group_I)
    return (title_ExK >= 0) & (title_ExK[:, :, None] == title_ExM[:, None, :]).any(axis=2)


# Popularity


def average_popularity(ranked_ExK: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """ARP: mean train count of the listed items (Yin et al., VLDB 2012); NaN for a list without items."""
    return _mean_over_items(np.asarray(count_I, np.float64), ranked_ExK)


def popularity_lift(ranked_ExK: np.ndarray, target_E: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """mean over the list of log(1 + count) - log(1 + count of the target); > 0: more popular than what users take."""
    level_I = np.log1p(np.asarray(count_I, np.float64))
    return _mean_over_items(level_I, ranked_ExK) - level_I[target_E]


def _mean_over_items(value_I: np.ndarray, ranked_ExK: np.ndarray) -> np.ndarray:
    item_ExK = ranked_ExK >= 0
    with np.errstate(invalid="ignore"):
        return np.where(item_ExK, value_I[ranked_ExK], 0.0).sum(axis=1) / item_ExK.sum(axis=1)


def list_counts(ranked_ExK: np.ndarray, items: int) -> np.ndarray:
    """count_I: in how many places of the lists each item stands."""
    return np.bincount(ranked_ExK[ranked_ExK >= 0], minlength=items)


def coverage(ranked_ExK: np.ndarray, items: int) -> float:
    """Share of the catalogue that stands in at least one list."""
    return float((list_counts(ranked_ExK, items) > 0).mean())


def gini(count_I: np.ndarray) -> float:
    """Inequality of counts: 0 = all equal, 1 - 1/I = all on one item; of lists, pass `list_counts`.

    Formula:   G = sum_i (2 i - I - 1) x_(i) / (I sum_i x_i),   x ascending, i from 1;  0 when all counts are 0
    """
    x = np.sort(np.asarray(count_I, np.float64))
    I = len(x)
    return float(((2 * np.arange(1, I + 1) - I - 1) * x).sum() / (I * x.sum())) if x.sum() else 0.0


# Group fairness (IFairLRS, arXiv 2402.15215)


def popularity_groups(count_I: np.ndarray, groups: int = 5) -> np.ndarray:
    """member_IxG: `groups` bins of equally many items by train count (0 = least popular), ties by hash of the index."""
    items = len(count_I)
    order = np.lexsort((seeds.uniform(TIES, np.arange(items)), count_I))
    bin_I = np.empty(items, np.int64)
    bin_I[order] = np.arange(items) * groups // items
    return np.eye(groups)[bin_I]


def named_groups(groups: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, member_IxG) of labels such as genres; an item with several labels counts in each."""
    names = tuple(sorted({name for row in groups for name in row}))
    return names, np.array([[name in row for name in names] for row in groups], np.float64).reshape(-1, len(names))


def group_counts(item_ExN: np.ndarray, member_IxG: np.ndarray) -> np.ndarray:
    """count_ExG: memberships of the row's items in each group, -1 ignored."""
    count_ExG = np.zeros((len(item_ExN), member_IxG.shape[1]))
    for item_E in item_ExN.T:
        count_ExG += np.where(item_E >= 0, 1.0, 0.0)[:, None] * member_IxG[item_E]
    return count_ExG


def group_unfairness(history_count_G: np.ndarray, list_count_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(MGU, DGU): how far the lists' shares of the groups are from the histories' shares, over all users together.

    Formula:   GU(G) = list share of G - history share of G;  MGU = mean_G |GU|,  DGU = max_G GU - min_G GU
               share of G = memberships in G / memberships in all groups, so shares sum to 1 with several labels too
               (the denominator is our reading).
    Shapes:    [..., G] counts summed over rows; returns [...] each.
    Source:    arXiv 2402.15215, equations of MGU@K and DGU@K.
    """
    history_count_G, list_count_G = np.asarray(history_count_G), np.asarray(list_count_G)
    with np.errstate(invalid="ignore"):
        GU = list_count_G / list_count_G.sum(-1, keepdims=True) - history_count_G / history_count_G.sum(
            -1, keepdims=True
        )
    return np.abs(GU).mean(-1), GU.max(-1) - GU.min(-1)


# Semantic error (our own metric): a wrong answer that only looks like the history


def semantic_neighbours(history_ExN: np.ndarray, embedding_IxD: np.ndarray, k: int) -> np.ndarray:
    """neighbour_ExK: the k items outside the history with the largest max-cosine to a history item, ties by hash."""
    unit_IxD = embedding_IxD / np.maximum(np.linalg.norm(embedding_IxD, axis=1, keepdims=True), 1e-12)
    neighbours = []
    for history_BxN in np.split(history_ExN, range(BLOCK, len(history_ExN), BLOCK)):
        cosine_BxNxI = unit_IxD[history_BxN] @ unit_IxD.T
        score_BxI = np.where(history_BxN[:, :, None] >= 0, cosine_BxNxI, -np.inf).max(axis=1)
        row, slot = np.nonzero(history_BxN >= 0)
        score_BxI[row, history_BxN[row, slot]] = -np.inf
        neighbours.append(ranking(score_BxI, np.arange(len(unit_IxD)), k))
    return np.concatenate(neighbours)


def semantic_error(
    item_ExK: np.ndarray, target_E: np.ndarray, neighbour_ExM: np.ndarray, title_group_I: np.ndarray
) -> np.ndarray:
    """Share of the items that are wrong and among the history's nearest neighbours.

    On `ranked_ExK[:, :1]` it is 1[top-1 wrong and a neighbour], whose mean is the semantic error rate; on
    `candidates_ExC` it is what a random candidate would get. A copy of a history item is no neighbour:
    `history_copy` counts it.
    """
    wrong_ExK = _titles(item_ExK, title_group_I) != title_group_I[target_E][:, None]
    near_ExK = (item_ExK[:, :, None] == neighbour_ExM[:, None, :]).any(axis=2)
    return (wrong_ExK & near_ExK).mean(axis=1)


# True preferences, known in the embedded world only


def true_win_rate(top_E: np.ndarray, candidates_ExC: np.ndarray, utility_ExC: np.ndarray) -> np.ndarray:
    """Share of the other candidates that the user truly likes less than the model's first; ties count half.

    Errors:    ValueError when a first item is not among its row's candidates.
    """
    is_top_ExC = candidates_ExC == np.asarray(top_E)[:, None]
    if not (is_top_ExC.sum(axis=1) == 1).all():
        raise ValueError("the first item of a row must be one of its candidates")
    utility_Ex1 = utility_ExC[is_top_ExC][:, None]
    win_ExC = (utility_ExC < utility_Ex1) + 0.5 * (utility_ExC == utility_Ex1)
    return (win_ExC.sum(axis=1) - 0.5) / (candidates_ExC.shape[1] - 1)


def true_pair_accuracy(score_ExC: np.ndarray, utility_ExC: np.ndarray) -> np.ndarray:
    """Share of candidate pairs of distinct utility that the scores order as the utility does; equal scores count half.

    Reduces to: (1 + Kendall's tau) / 2 without ties; NaN when all utilities are equal.
    """
    first, second = np.triu_indices(score_ExC.shape[1], 1)
    score_ExP = np.sign(score_ExC[:, first] - score_ExC[:, second])
    utility_ExP = np.sign(utility_ExC[:, first] - utility_ExC[:, second])
    with np.errstate(invalid="ignore"):
        return ((1 + score_ExP * utility_ExP) / 2 * (utility_ExP != 0)).sum(axis=1) / (utility_ExP != 0).sum(axis=1)


# Epsilon against the true label flips


def auc(score_E: np.ndarray, positive_E: np.ndarray) -> float | None:
    """P(score of a positive > score of a negative) + P(equal)/2; None without positives or negatives."""
    _, index_E, count = np.unique(score_E, return_inverse=True, return_counts=True)
    rank_E = (np.cumsum(count) - (count - 1) / 2)[index_E]
    positive_E = np.asarray(positive_E, bool)
    P, N = int(positive_E.sum()), int((~positive_E).sum())
    return float((rank_E[positive_E].sum() - P * (P + 1) / 2) / (P * N)) if P and N else None


def brier(probability_E: np.ndarray, outcome_E: np.ndarray) -> np.ndarray:
    """(probability - outcome)^2 of each row; its mean is the Brier score."""
    return np.square(np.asarray(probability_E, np.float64) - outcome_E)


def calibration_error(probability_E: np.ndarray, outcome_E: np.ndarray, bins: int = 10) -> float:
    """ECE over bins of equal width: sum over bins of (n_b / n) |mean outcome - mean probability|."""
    probability_E = np.asarray(probability_E, np.float64)
    bin_E = np.minimum((probability_E * bins).astype(np.int64), bins - 1)
    gap = np.bincount(bin_E, np.asarray(outcome_E, np.float64) - probability_E, minlength=bins)
    return float(np.abs(gap).sum() / len(probability_E))


def epsilon_quality(epsilon_E: np.ndarray, flipped_E: np.ndarray) -> dict[str, float | None]:
    """How well epsilon, read as the probability of a flipped label, matches the true flips: AUC, Brier, ECE."""
    return {
        "AUC": auc(epsilon_E, flipped_E),
        "Brier": float(brier(epsilon_E, flipped_E).mean()),
        "ECE": calibration_error(epsilon_E, flipped_E),
        "mean": float(np.mean(epsilon_E)),
        "flipped": float(np.mean(flipped_E)),
    }


# Summaries


def by_row(
    ranked_ExK: np.ndarray,
    target_E: np.ndarray,
    history_ExN: np.ndarray,
    candidates_ExC: np.ndarray,
    title_group_I: np.ndarray,
    count_I: np.ndarray,
    neighbour_ExM: np.ndarray,
) -> dict[str, np.ndarray]:
    """Every row metric of `results.json` under its name there."""
    rank_E = target_rank(ranked_ExK, target_E, title_group_I)
    valid_E = valid(ranked_ExK, candidates_ExC, title_group_I)
    return {
        "HR@1": hit_ratio(rank_E, 1),
        "HR@5": hit_ratio(rank_E, 5),
        "NDCG@5": ndcg(rank_E, 5),
        "MRR": reciprocal_rank(rank_E),
        "valid_ratio": valid_E,
        "HR@1_of_valid": np.where(valid_E > 0, hit_ratio(rank_E, 1), np.nan),
        "popularity_lift": popularity_lift(ranked_ExK[:, :5], target_E, count_I),
        "ARP": average_popularity(ranked_ExK[:, :5], count_I),
        "semantic_error_rate": semantic_error(ranked_ExK[:, :1], target_E, neighbour_ExM, title_group_I),
        "not_in_catalogue": not_in_catalogue(ranked_ExK[:, :5]),
        "history_copy": history_copy(ranked_ExK[:, :5], history_ExN, title_group_I),
        "duplicate": duplicate(ranked_ExK[:, :5], title_group_I),
    }


def over_rows(
    ranked_ExK: np.ndarray,
    history_ExN: np.ndarray,
    user_E: np.ndarray,
    member_IxG: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict]:
    """The metrics that are no mean over rows, of the top 5: gini, coverage (no interval), MGU, DGU (bootstrap)."""
    items = len(member_IxG)
    ranked_ExK = ranked_ExK[:, :5]
    counts = np.concatenate([group_counts(history_ExN, member_IxG), group_counts(ranked_ExK, member_IxG)], axis=1)
    n = len(ranked_ExK)
    found: dict[str, dict] = {
        "gini": {"value": gini(list_counts(ranked_ExK, items)), "ci95": None, "n": n},
        "coverage": {"value": coverage(ranked_ExK, items), "ci95": None, "n": n},
    }
    for place, name in enumerate(("MGU", "DGU")):
        value = float(_unfairness(counts.sum(axis=0), place))
        defined = not np.isnan(value)
        interval = significance.bootstrap(counts, user_E, functools.partial(_unfairness, place=place), resamples, seed)
        found[name] = {"value": value if defined else None, "ci95": list(interval) if defined else None, "n": n}
    return found


def _unfairness(count_x2G: np.ndarray, place: int) -> np.ndarray:
    return group_unfairness(*np.split(count_x2G, 2, axis=-1))[place]


def cell(value_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict:
    """{"value", "ci95", "n"[, "hits"]} of one metric; "hits" when every value is 0 or 1.

    The interval is Wilson's for 0/1 values of distinct users, else the bootstrap over users.
    """
    kept = ~np.isnan(value_E)
    value_E, user_E = np.sort(value_E[kept]), np.asarray(user_E)[kept][np.argsort(value_E[kept], kind="stable")]
    n = len(value_E)
    if not n:
        return {"value": None, "ci95": None, "n": 0}
    found = {"value": float(value_E.mean()), "n": n}
    binary = bool(np.isin(value_E, (0, 1)).all())
    if binary and len(np.unique(user_E)) == n:
        interval = significance.wilson(int(value_E.sum()), n)
    else:
        interval = significance.mean_interval(value_E, user_E, resamples, seed)
    return found | {"ci95": list(interval)} | ({"hits": int(value_E.sum())} if binary else {})


def summary(value_E: Mapping[str, np.ndarray], user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict:
    """The object M of `results.json` from row metrics, e.g. those of `by_row`."""
    return {name: cell(np.asarray(value, np.float64), user_E, resamples, seed) for name, value in value_E.items()}


def by_decile(
    value_E: np.ndarray, target_E: np.ndarray, count_I: np.ndarray, user_E: np.ndarray, resamples: int = 2000
) -> list[dict]:
    """A metric by the popularity of the target: ten bins of about equally many rows, 1 = least popular targets.

    Rows whose targets have the same train count share a bin, so a bin may be empty ("value" None). Each bin is a `cell`
    with "decile" and the "counts" [lowest, highest] of its targets.
    """
    count_E = np.asarray(count_I)[target_E]
    middle_E = (np.searchsorted(s := np.sort(count_E), count_E, "left") + np.searchsorted(s, count_E, "right")) / 2
    bin_E = np.minimum((10 * middle_E / max(len(count_E), 1)).astype(np.int64), 9)
    bins = []
    for decile in range(10):
        here = bin_E == decile
        counts = [int(count_E[here].min()), int(count_E[here].max())] if here.any() else None
        bins.append({"decile": decile + 1, "counts": counts} | cell(value_E[here], user_E[here], resamples))
    return bins
