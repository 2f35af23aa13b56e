"""The object M of `results.json`: every metric of one model's answers to the rows of a protocol, with its interval.

Shares, popularity, novelty, diversity and groups are about the TOP first places of a list.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation import metrics, significance
from rosepo_jax.evaluation.answers import Answers

TOP = 5
BINS = 10
CUTS = (1, 5, 10)  # k of HR@k and NDCG@k


@dataclasses.dataclass(frozen=True, eq=False)
class Ground:
    """What the answers of all models of a protocol are measured against.

    embedding_IxD: vectors of the titles; None leaves out what needs them: semantic errors and diversity.
    neighbours: how many items next to the history a semantic error may name.
    bound: whether the answer was to be one of the row's candidates. Else any title of the catalogue is a valid one, and
    a random one is drawn from those outside the history.
    """

    rows: Rows
    catalogue: Catalogue
    embedding_IxD: np.ndarray | None
    neighbours: int
    bound: bool = True

    @functools.cached_property
    def neighbour_ExM(self) -> np.ndarray:
        assert self.embedding_IxD is not None
        return metrics.semantic_neighbours(
            self.rows.history_ExN, self.embedding_IxD, self.neighbours, self.catalogue.title_group_I
        )

    @functools.cached_property
    def random_error_E(self) -> np.ndarray:
        """The semantic error of a random one of the items that a model was to choose from."""
        rows, group_I = self.rows, self.catalogue.title_group_I
        if self.bound:
            return metrics.semantic_error(rows.candidates_ExC, rows.target_E, self.neighbour_ExM, group_I)
        return metrics.random_semantic_error(rows.target_E, self.neighbour_ExM, rows.history_ExN, group_I)

    @functools.cached_property
    def groupings(self) -> dict[str, np.ndarray]:
        """The member_IxG of MGU and DGU: fifths by popularity; "_genre": the catalogue's labels, if it has any."""
        genre_IxG = metrics.named_groups(self.catalogue.groups)[1]
        found = {"": metrics.popularity_groups(self.catalogue.count_I)}
        return found | ({"_genre": genre_IxG} if genre_IxG.shape[1] else {})


def describe(
    answers: Answers, ground: Ground, resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, dict | list[dict]], dict[str, np.ndarray]]:
    """(M, metric -> its values by row); NaN where a metric does not apply to a row.

    resamples, seed: of the bootstrap. M depends on neither the order of the rows nor how they were batched.
    """
    rows, count_I = ground.rows, ground.catalogue.count_I
    values = by_row(answers, ground)
    length_E = (rows.history_ExN >= 0).sum(axis=1)
    M: dict[str, dict | list[dict]] = {
        **cells(values, rows.user_E, resamples, seed),
        **over_rows(answers, ground, resamples, seed),
        "HR@1_by_decile": by_decile(values["HR@1"], count_I[rows.target_E], rows.user_E, resamples, seed),
        "HR@1_by_history": by_history(values["HR@1"], length_E, rows.user_E, resamples, seed),
    }
    return M, values


def by_row(answers: Answers, ground: Ground) -> dict[str, np.ndarray]:
    """Every metric that is a mean over rows, under its name in `results.json`. Formulas: `metrics`.

    valid_ratio: the first answer is one that the model was to choose from, by title. HR@1_of_valid: over those rows.
    Of free answers: candidate_ratio, a candidate's title; hallucination, no title of the catalogue, among the answers
    that are neither empty nor cut off; substring_*, by the literature's rule (`matching.substring`).
    """
    rows, group_I, count_I = ground.rows, ground.catalogue.title_group_I, ground.catalogue.count_I
    ranked_ExK = answers.ranked_ExK
    first_Ex1, top_ExK = ranked_ExK[:, :1], ranked_ExK[:, :TOP]
    rank_E = metrics.target_rank(ranked_ExK, rows.target_E, group_I)
    hit_E = metrics.hit_ratio(rank_E, 1)
    cuts = [k for k in CUTS if k <= ranked_ExK.shape[1]]
    candidate_E = metrics.valid(ranked_ExK, rows.candidates_ExC, group_I)
    valid_E = candidate_E if ground.bound else (ranked_ExK[:, 0] >= 0).astype(np.float64)
    values = {f"HR@{k}": metrics.hit_ratio(rank_E, k) for k in cuts}
    values |= {f"NDCG@{k}": metrics.ndcg(rank_E, k) for k in cuts if k > 1}
    values |= {
        "MRR": metrics.reciprocal_rank(rank_E),
        "valid_ratio": valid_E,
        "HR@1_of_valid": np.where(valid_E > 0, hit_E, np.nan),
        "HR@1_cold": metrics.on_cold(hit_E, rows.target_E, count_I),
        "popularity_lift": metrics.popularity_lift(top_ExK, rows.target_E, count_I),
        "ARP": metrics.average_popularity(top_ExK, count_I),
        "APLT": metrics.long_tail(top_ExK, count_I),
        "novelty": metrics.novelty(top_ExK, count_I),
        "not_in_catalogue": metrics.not_in_catalogue(top_ExK),
        "history_copy": metrics.history_copy(top_ExK, rows.history_ExN, group_I),
        "duplicate": metrics.duplicate(top_ExK, group_I),
    }
    if ground.embedding_IxD is not None:
        values |= {
            "diversity": metrics.intra_list_diversity(top_ExK, ground.embedding_IxD, group_I),
            "semantic_error_rate": metrics.semantic_error(first_Ex1, rows.target_E, ground.neighbour_ExM, group_I),
            "semantic_error_rate_random": ground.random_error_E,
        }
    if answers.certified_E is not None:
        values["certified"] = answers.certified_E.astype(np.float64)
    if answers.ambiguous_E is not None:
        values["ambiguous"] = answers.ambiguous_E.astype(np.float64)
    if answers.status is not None:
        status_E = np.array(answers.status)
        values |= {kind: (status_E == kind).astype(np.float64) for kind in ("truncated", "empty", "not_a_candidate")}
        values["hallucination"] = np.where(
            np.isin(status_E, ("truncated", "empty")), np.nan, status_E == "not_in_catalogue"
        )
        values["candidate_ratio"] = candidate_E
    if answers.substring_E is not None:
        said_E = answers.substring_E >= 0
        item_E = rows.candidates_ExC[np.arange(len(rows)), answers.substring_E]
        said_hit_E = (said_E & (group_I[item_E] == group_I[rows.target_E])).astype(np.float64)
        values |= {
            "substring_valid_ratio": said_E.astype(np.float64),
            "substring_HR@1": said_hit_E,
            "substring_HR@1_of_valid": np.where(said_E, said_hit_E, np.nan),
        }
    return values


def over_rows(answers: Answers, ground: Ground, resamples: int = 2000, seed: int = 0) -> dict[str, dict]:
    """The metrics that are no mean over rows: gini, coverage, MGU, DGU, and ECE where the scores are log-probs.

    No interval for gini, coverage and ECE. A resample of users repeats some of their lists, so it covers fewer items
    than as many new users would: its percentiles lie to one side of the truth and would pass for precision. ECE sums
    absolute gaps, which resampling widens likewise. ECE is given to 6 decimals: below that, rounding of log-probs
    decides. Scores that can be positive (counts, logits) are no log-probs.
    """
    rows, group_I = ground.rows, ground.catalogue.title_group_I
    ranked_ExK = answers.ranked_ExK[:, :TOP]
    n, items = len(rows), len(ground.catalogue)

    def figure(value: float, ci95: list[float] | None = None) -> dict:
        return {"value": None if math.isnan(value) else value, "ci95": ci95, "n": n}

    found = {
        "gini": figure(metrics.gini(metrics.list_counts(ranked_ExK, items))),
        "coverage": figure(metrics.coverage(ranked_ExK, items)),
    }
    for suffix, member_IxG in ground.groupings.items():
        histories, lists = (metrics.group_counts(item, member_IxG) for item in (rows.history_ExN, ranked_ExK))
        values = metrics.group_unfairness(histories.sum(axis=0), lists.sum(axis=0))
        columns = np.concatenate([histories, lists], axis=1)
        bounds_2x2 = significance.bootstrap(columns, rows.user_E, _unfairness, resamples, seed)
        for name, value, bounds_2 in zip(("MGU", "DGU"), map(float, values), bounds_2x2.T):
            found[name + suffix] = figure(value, _interval(bounds_2))
    score_ExC = answers.full_score_ExC
    if score_ExC is not None and score_ExC.max() <= 0 and score_ExC.min() < 0:
        hit_E = metrics.hit_ratio(metrics.target_rank(ranked_ExK, rows.target_E, group_I), 1)
        confidence_E = metrics.confidence(score_ExC, rows.candidates_ExC, group_I)
        found["ECE"] = figure(round(metrics.calibration_error(confidence_E, hit_E), 6))
    return found


def _interval(bounds_2: np.ndarray) -> list[float] | None:
    return None if np.isnan(bounds_2).any() else bounds_2.tolist()


def _unfairness(count_Bx2G: np.ndarray) -> np.ndarray:
    return np.stack(metrics.group_unfairness(*np.split(count_Bx2G, 2, axis=1)), axis=1)


def cells(
    value_E: Mapping[str, np.ndarray], user_E: np.ndarray, resamples: int = 2000, seed: int = 0
) -> dict[str, dict]:
    """name -> {"value", "ci95", "n"[, "hits"]} of row metrics, over the rows where they are not NaN.

    "hits" when every value is 0 or 1. The interval is Wilson's for 0/1 values of distinct users, else the bootstrap
    over all users; "value" and "ci95" are None when no row is left.
    """
    user_E, found, pending = np.asarray(user_E), {}, {}
    for name, column in value_E.items():
        column_E = np.asarray(column, np.float64)
        kept_E = ~np.isnan(column_E)
        found[name], settled = _cell(column_E[kept_E], user_E[kept_E])
        if not settled:
            pending[name] = column_E
    if pending:
        bounds_Mx2 = significance.mean_intervals(np.stack(list(pending.values()), axis=1), user_E, resamples, seed)
        for name, bounds_2 in zip(pending, bounds_Mx2):
            found[name]["ci95"] = _interval(bounds_2)
    return found


def _cell(value_E: np.ndarray, user_E: np.ndarray) -> tuple[dict, bool]:
    """The cell, and whether it has the interval that it is to have."""
    n = len(value_E)
    if not n:
        return {"value": None, "ci95": None, "n": 0}, True
    found = {"value": math.fsum(value_E) / n, "ci95": None, "n": n}
    if not np.isin(value_E, (0, 1)).all():
        return found, False
    found["hits"] = hits = int(value_E.sum())
    if len(np.unique(user_E)) < n:
        return found, False
    return found | {"ci95": list(significance.wilson(hits, n))}, True


def cell(value_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict:
    """`cells` of one metric."""
    return cells({"": value_E}, user_E, resamples, seed)[""]


def by_decile(
    value_E: np.ndarray, count_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0
) -> list[dict]:
    """A metric by the popularity of the target: ten bins of about equally many rows, 1 = least popular targets.

    Rows whose targets have the same train count count_E share a bin, so a bin may be empty ("value" None). Each bin is
    a `cell` with "decile" and the "counts" [lowest, highest] of its targets.
    """
    return [
        {"decile": bin + 1, "counts": bounds} | found
        for bin, (bounds, found) in enumerate(_by_bin(value_E, count_E, user_E, resamples, seed))
    ]


def by_history(
    value_E: np.ndarray, length_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0
) -> list[dict]:
    """A metric by the number of history items: at most ten bins, shortest first, as `by_decile` makes them.

    Each is a `cell` with "history" [fewest, most]; empty ones are left out, since most rows have the full window.
    """
    bins = _by_bin(value_E, length_E, user_E, resamples, seed)
    return [{"history": bounds} | found for bounds, found in bins if bounds]


def _by_bin(
    value_E: np.ndarray, key_E: np.ndarray, user_E: np.ndarray, resamples: int, seed: int
) -> list[tuple[list[int] | None, dict]]:
    """([lowest key, highest key], cell) of BINS classes by key; a key belongs where the middle of its rows falls."""
    sorted_E = np.sort(key_E)
    middle_E = (np.searchsorted(sorted_E, key_E, "left") + np.searchsorted(sorted_E, key_E, "right")) / 2
    bin_E = np.minimum((BINS * middle_E / max(len(key_E), 1)).astype(np.int64), BINS - 1)
    found = cells({str(bin): np.where(bin_E == bin, value_E, np.nan) for bin in range(BINS)}, user_E, resamples, seed)
    keys = [key_E[bin_E == bin] for bin in range(BINS)]
    return [([int(key.min()), int(key.max())] if len(key) else None, found[str(bin)]) for bin, key in enumerate(keys)]
