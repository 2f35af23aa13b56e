"""What is measured, one number per row wherever the metric is a mean over rows. Plain numpy.

Lists are item indices, best first; NOT_AN_ITEM (-1) is an answer that is no item of the catalogue, NO_ANSWER (-2) a
place after the list's end. Two items with equal normalised titles are the same answer: pass `Catalogue.title_group_I`.
NaN marks a row to which a metric does not apply; `summary` leaves it out, and "n" counts the rest. So a list without
answers is a miss to the ranking metrics, which count every row, and NaN to those that ask what the answers are like:
silence improves nothing.

No number depends on which other rows are measured with a row, nor on their order.
"""

from collections.abc import Sequence

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.evaluation import significance
from rosepo_jax.evaluation.answers import NOT_AN_ITEM

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
    return np.where(item >= 0, title_group_I[np.maximum(item, 0)], NOT_AN_ITEM)


def hit_ratio(rank_E: np.ndarray, k: int) -> np.ndarray:
    """HR@k = 1[rank <= k]; with one relevant item it is Recall@k too."""
    return (rank_E <= k).astype(np.float64)


def ndcg(rank_E: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k = 1[rank <= k] / log2(1 + rank): one relevant item, so the ideal gain is 1.

    Source:    Järvelin & Kekäläinen, TOIS 20 (2002).
    """
    return np.where(rank_E <= k, 1 / np.log2(1 + rank_E), 0.0)


def reciprocal_rank(rank_E: np.ndarray) -> np.ndarray:
    """1 / rank, 0 when the target is not in the list that is there; its mean is MRR (Voorhees, TREC-8, 1999)."""
    return 1 / rank_E


def on_cold(value_E: np.ndarray, target_E: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """A metric on cold rows, those whose target never occurs in training (count 0); NaN on the others."""
    return np.where(np.asarray(count_I)[target_E] == 0, value_E, np.nan)


# Format: what is wrong with a list whatever the target. Shares of the list's answers, NOT_AN_ITEM included


def not_in_catalogue(ranked_ExK: np.ndarray) -> np.ndarray:
    """Share of the answers that are no item (RecLM-gen's NonExistRate, arXiv 2403.05063)."""
    return _share_of_answers(ranked_ExK == NOT_AN_ITEM, ranked_ExK)


def history_copy(ranked_ExK: np.ndarray, history_ExN: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """Share of the answers whose title stands in the history (InHistoryRate of arXiv 2403.05063)."""
    return _share_of_answers(_among(ranked_ExK, history_ExN, title_group_I), ranked_ExK)


def duplicate(ranked_ExK: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """Share of the answers whose title stands earlier in the same list (RepeatRate of arXiv 2403.05063)."""
    return _share_of_answers(_repeated(_titles(ranked_ExK, title_group_I)), ranked_ExK)


def valid(ranked_ExK: np.ndarray, candidates_ExC: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """1[the first answer has a candidate's title], 0 without an answer; its mean is the literature's valid ratio."""
    return _among(ranked_ExK[:, :1], candidates_ExC, title_group_I)[:, 0].astype(np.float64)


def _share_of_answers(flag_ExK: np.ndarray, ranked_ExK: np.ndarray) -> np.ndarray:
    """NaN for a list without answers: neither a share of 0, which would praise it, nor a fault that it has not."""
    return _ratio(flag_ExK.sum(axis=1), (ranked_ExK >= NOT_AN_ITEM).sum(axis=1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


def _among(item_ExK: np.ndarray, set_ExM: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    title_ExK, title_ExM = _titles(item_ExK, title_group_I), _titles(set_ExM, title_group_I)
    return (title_ExK >= 0) & (title_ExK[:, :, None] == title_ExM[:, None, :]).any(axis=2)


def _repeated(title_ExK: np.ndarray) -> np.ndarray:
    same_ExKxK = (title_ExK[:, :, None] == title_ExK[:, None, :]) & (title_ExK >= 0)[:, :, None]
    return np.tril(same_ExKxK, -1).any(axis=2)


# Popularity. Means over the items of a list, NaN for a list without items


def average_popularity(ranked_ExK: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """ARP: mean train count of the listed items (Yin et al., VLDB 2012, arXiv 1205.6700)."""
    return _mean_over_items(np.asarray(count_I, np.float64), ranked_ExK)


def popularity_lift(ranked_ExK: np.ndarray, target_E: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """mean over the list of log(1 + count) - log(1 + count of the target); > 0: more popular than what users take."""
    level_I = np.log1p(np.asarray(count_I, np.float64))
    return _mean_over_items(level_I, ranked_ExK) - level_I[target_E]


def long_tail(ranked_ExK: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """APLT: share of the listed items outside the most popular fifth of the catalogue by train count.

    Source:    Abdollahpouri et al., FLAIRS 2019 (arXiv 1901.07555); the threshold, `popularity_groups`' last, is ours.
    """
    return _mean_over_items(1 - popularity_groups(count_I)[:, -1], ranked_ExK)


def novelty(ranked_ExK: np.ndarray, count_I: np.ndarray) -> np.ndarray:
    """Mean self-information of the listed items, in bits.

    Formula:   mean over the list of -log2(count / sum of all counts), where a count of 0 is taken as 1: an item never
               seen is as novel as one seen once.
    Source:    Zhou et al., PNAS 107 (2010), with the share of interactions for the share of users, as in Castells,
               Hurley & Vargas, Recommender Systems Handbook (2015).
    """
    count_I = np.asarray(count_I, np.float64)
    return _mean_over_items(np.log2(max(count_I.sum(), 1.0)) - np.log2(np.maximum(count_I, 1)), ranked_ExK)


def _mean_over_items(value_I: np.ndarray, ranked_ExK: np.ndarray) -> np.ndarray:
    item_ExK = ranked_ExK >= 0
    return _ratio(np.where(item_ExK, value_I[np.maximum(ranked_ExK, 0)], 0.0).sum(axis=1), item_ExK.sum(axis=1))


def list_counts(ranked_ExK: np.ndarray, items: int) -> np.ndarray:
    """count_I: in how many places of the lists each item stands."""
    return np.bincount(ranked_ExK[ranked_ExK >= 0], minlength=items)


def coverage(ranked_ExK: np.ndarray, items: int) -> float:
    """Share of the catalogue that stands in at least one list (Ge et al., RecSys 2010).

    It grows with the number of rows: compare it on the same rows only.
    """
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
    member = np.array([[name in row for name in names] for row in groups], np.float64)
    return names, member.reshape(len(groups), len(names))


def group_counts(item_ExN: np.ndarray, member_IxG: np.ndarray) -> np.ndarray:
    """count_ExG: memberships of the row's items in each group; what is no item is ignored."""
    count_ExG = np.zeros((len(item_ExN), member_IxG.shape[1]))
    for item_E in item_ExN.T:
        count_ExG += (item_E >= 0)[:, None] * member_IxG[np.maximum(item_E, 0)]
    return count_ExG


def group_unfairness(history_count_G: np.ndarray, list_count_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(MGU, DGU): how far the lists' shares of the groups are from the histories' shares, over all users together.

    Formula:   GU(G) = list share of G - history share of G;  MGU = mean_G |GU|,  DGU = max_G GU - min_G GU
               share of G = memberships in G / memberships in all groups, so shares sum to 1 with several labels too
               (the denominator is our reading).
    Shapes:    [..., G] counts summed over rows; returns [...] each.
    Source:    arXiv 2402.15215, equations of MGU@K and DGU@K.
    """
    list_share_G, history_share_G = (
        _ratio(count_G, count_G.sum(-1, keepdims=True)) for count_G in map(np.asarray, (list_count_G, history_count_G))
    )
    GU = list_share_G - history_share_G
    return np.abs(GU).mean(-1), GU.max(-1) - GU.min(-1)


# Meaning, by vectors of the titles


def intra_list_diversity(ranked_ExK: np.ndarray, embedding_IxD: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """Mean of 1 - cosine over the pairs of items with different titles in the list; NaN for fewer than two.

    Source:    Smyth & McClave, ICCBR 2001; Ziegler et al., WWW 2005 (intra-list similarity).
    """
    unit_IxD, title_ExK = _unit(embedding_IxD), _titles(ranked_ExK, title_group_I)
    counts_ExK = (title_ExK >= 0) & ~_repeated(title_ExK)
    distance = []
    for start in range(0, len(ranked_ExK), BLOCK):
        counts_BxK = counts_ExK[start : start + BLOCK]
        vector_BxKxD = unit_IxD[np.maximum(ranked_ExK[start : start + BLOCK], 0)]
        pair_BxKxK = np.triu(counts_BxK[:, :, None] & counts_BxK[:, None, :], 1)
        distance_BxKxK = 1 - vector_BxKxD @ vector_BxKxD.swapaxes(1, 2)
        distance.append(_ratio((distance_BxKxK * pair_BxKxK).sum(axis=(1, 2)), pair_BxKxK.sum(axis=(1, 2))))
    return np.concatenate(distance)


def _unit(embedding_IxD: np.ndarray) -> np.ndarray:
    """Unit vectors in multiples of 2^-24, float64: the products of two add up without rounding, so a cosine depends on
    no order of summation, equal titles tie, and the result is the same with any number of rows or threads."""
    embedding_IxD = np.asarray(embedding_IxD, np.float64)
    norm_Ix1 = np.maximum(np.linalg.norm(embedding_IxD, axis=1, keepdims=True), 1e-12)
    return np.round(embedding_IxD / norm_Ix1 * 2.0**24) / 2.0**24


# Semantic error (our own metric): a wrong answer that only looks like the history


def semantic_neighbours(
    history_ExN: np.ndarray, embedding_IxD: np.ndarray, k: int, title_group_I: np.ndarray
) -> np.ndarray:
    """neighbour_ExM: the k items with the largest max-cosine to a history item, ties by hash; -1 where there are fewer.

    Items whose title stands in the history are no neighbours: `history_copy` counts those. M = min(k, I).
    """
    unit_IxD = _unit(embedding_IxD)
    items = len(unit_IxD)
    lucky_I = np.argsort(seeds.uniform(TIES, np.arange(items)))  # in this order argmax takes the right one of equals
    neighbours = []
    for history_BxN in np.split(history_ExN, range(BLOCK, len(history_ExN), BLOCK)):
        seen_S, slot_BxN = np.unique(history_BxN, return_inverse=True)
        cosine_SxI = np.where(seen_S[:, None] >= 0, unit_IxD[seen_S] @ unit_IxD[lucky_I].T, -np.inf)
        slot_BxN = slot_BxN.reshape(history_BxN.shape)
        score_BxI = cosine_SxI[slot_BxN[:, 0]]
        for slot_B in slot_BxN.T[1:]:
            np.maximum(score_BxI, cosine_SxI[slot_B], out=score_BxI)
        rows_B = np.arange(len(history_BxN))
        known_BxI = np.zeros(score_BxI.shape, bool)  # by title group
        row, slot = np.nonzero(history_BxN >= 0)
        known_BxI[row, title_group_I[history_BxN[row, slot]]] = True
        score_BxI[known_BxI[:, title_group_I[lucky_I]]] = -np.inf
        neighbour_BxM = np.full((len(history_BxN), min(k, items)), NOT_AN_ITEM)
        for place in range(min(k, items)):
            best_B = score_BxI.argmax(axis=1)
            neighbour_BxM[:, place] = np.where(np.isneginf(score_BxI[rows_B, best_B]), NOT_AN_ITEM, lucky_I[best_B])
            score_BxI[rows_B, best_B] = -np.inf
        neighbours.append(neighbour_BxM)
    return np.concatenate(neighbours)


def semantic_error(
    item_ExK: np.ndarray, target_E: np.ndarray, neighbour_ExM: np.ndarray, title_group_I: np.ndarray
) -> np.ndarray:
    """Share of the answers that are wrong and among the history's nearest neighbours, by title.

    On `ranked_ExK[:, :1]` it is 1[top-1 wrong and a neighbour], whose mean is the semantic error rate; on
    `candidates_ExC` it is what a random candidate would get.
    """
    wrong_ExK = _titles(item_ExK, title_group_I) != title_group_I[target_E][:, None]
    return _share_of_answers(wrong_ExK & _among(item_ExK, neighbour_ExM, title_group_I), item_ExK)


def random_semantic_error(
    target_E: np.ndarray, neighbour_ExM: np.ndarray, history_ExN: np.ndarray, title_group_I: np.ndarray
) -> np.ndarray:
    """`semantic_error` of an item drawn uniformly from the catalogue without the history's titles: its expectation.

    Formula:   (items with the title of a neighbour, but not the target's) / (items with no title of the history)
    """
    title_ExM = _titles(neighbour_ExM, title_group_I)
    wrong_ExM = np.where(title_ExM == title_group_I[target_E][:, None], NOT_AN_ITEM, title_ExM)
    known_E = _items_titled(_titles(history_ExN, title_group_I), title_group_I)
    return _ratio(_items_titled(wrong_ExM, title_group_I), len(title_group_I) - known_E)


def _items_titled(title_ExN: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """How many items of the catalogue have one of the row's titles."""
    title_ExN = np.sort(title_ExN, axis=1)
    distinct_ExN = np.diff(title_ExN, axis=1, prepend=NOT_AN_ITEM) != 0
    items_I = np.bincount(title_group_I, minlength=len(title_group_I))
    return (distinct_ExN * items_I[np.maximum(title_ExN, 0)]).sum(axis=1)


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
    right_ExP = (1 + score_ExP * utility_ExP) / 2 * (utility_ExP != 0)
    return _ratio(right_ExP.sum(axis=1), (utility_ExP != 0).sum(axis=1))


# Calibration, and epsilon against the true label flips


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


def confidence(score_ExC: np.ndarray, item_ExC: np.ndarray, title_group_I: np.ndarray) -> np.ndarray:
    """Probability of the first candidate: the largest of the softmax over the log-probs of the list's titles.

    A title that stands twice in a list is one answer, and counts once.
    """
    score_ExC = np.where(_repeated(_titles(item_ExC, title_group_I)), -np.inf, score_ExC)
    return 1 / np.exp(score_ExC - score_ExC.max(axis=1, keepdims=True)).sum(axis=1)


def calibration_error(probability_E: np.ndarray, outcome_E: np.ndarray, bins: int = 10) -> float:
    """ECE over bins of equal width: sum over bins of (n_b / n) |mean outcome - mean probability|.

    Source:    Naeini et al., AAAI 2015; Guo et al., ICML 2017 (arXiv 1706.04599).
    """
    probability_E = np.asarray(probability_E, np.float64)
    bin_E = np.minimum((probability_E * bins).astype(np.int64), bins - 1)
    gaps = significance.user_sums(np.asarray(outcome_E, np.float64) - probability_E, bin_E)
    return float(np.abs(gaps).sum() / len(probability_E))


def epsilon_quality(epsilon_E: np.ndarray, flipped_E: np.ndarray) -> dict[str, float | None]:
    """How well epsilon, read as the probability of a flipped label, matches the true flips: AUC, Brier, ECE."""
    return {
        "AUC": auc(epsilon_E, flipped_E),
        "Brier": float(brier(epsilon_E, flipped_E).mean()),
        "ECE": calibration_error(epsilon_E, flipped_E),
        "mean": float(np.mean(epsilon_E)),
        "flipped": float(np.mean(flipped_E)),
    }
