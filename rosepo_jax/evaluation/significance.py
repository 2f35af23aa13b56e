"""Intervals and paired tests. No result depends on the order of the rows, only on (user, value) pairs and the seed.

Rows of one user are not independent, so resampling draws whole users and the permutation test flips whole users.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rosepo_jax import seeds

CHUNK = 1 << 22  # numbers drawn at a time, to bound memory
EXACT = 16  # up to this many users with a difference, all sign patterns are counted
Z_975, Z_80 = 1.959963984540054, 0.8416212335729143  # quantiles of the normal distribution


def wilson(hits: int, n: int, z: float = Z_975) -> tuple[float, float]:
    """The 95 % score interval of a share.

    Formula:   (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = hits/n
    Errors:    ValueError when n < 1 or hits is outside [0, n].
    Source:    Wilson, JASA 22 (1927).
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits={hits} of n={n} is no share")
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def user_sums(value_ExK: np.ndarray, user_E: np.ndarray) -> np.ndarray:
    """Sums of the columns over each user's rows, sum_UxK, users ascending; bitwise independent of the row order."""
    columns = [np.asarray(column, np.float64) for column in np.atleast_2d(np.asarray(value_ExK).T)]
    users, index_E = np.unique(user_E, return_inverse=True)
    sums = []
    for column_E in columns:
        order = np.lexsort((column_E, index_E))
        sums.append(np.bincount(index_E[order], column_E[order], minlength=len(users)))
    return np.stack(sums, axis=1)


def bootstrap(
    value_ExK: np.ndarray,
    user_E: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """The 95 % percentile interval of a statistic of column sums, resampling users with replacement.

    statistic: sum_BxK -> statistic_B or statistic_BxM, e.g. `lambda sum_Bx2: sum_Bx2[:, 0] / sum_Bx2[:, 1]`; resamples
    in which it is NaN are left out.
    Shapes:    returns [2] or [2, M], the low and the high ends.
    Source:    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters = users.
    """
    sum_UxK = _exactly_summable(user_sums(value_ExK, user_E))
    U = len(sum_UxK)
    random = seeds.generator(seed, "bootstrap", U)
    values = []
    for start in range(0, resamples, block := max(1, CHUNK // U)):
        pick_BxU = random.integers(U, size=(B := min(block, resamples - start), U))
        times_BxU = np.bincount((pick_BxU + U * np.arange(B)[:, None]).ravel(), minlength=B * U).reshape(B, U)
        values.append(statistic(times_BxU.astype(np.float64) @ sum_UxK))
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # all NaN gives NaN
        return np.nanquantile(np.concatenate(values), [0.025, 0.975], axis=0)


def _exactly_summable(sum_UxK: np.ndarray) -> np.ndarray:
    """The columns in multiples of so small a power of two that float64 adds any U of their numbers without rounding.

    So a matrix product gives the same sums in blocks of any size and with any number of threads. Counts stay as they
    are; other numbers move by less than U / 2^52 of the largest.
    """
    largest_K = np.maximum(np.abs(sum_UxK).max(axis=0), np.finfo(np.float64).tiny)
    grid_K = np.exp2(np.ceil(np.log2(largest_K * len(sum_UxK))) - 52)
    return np.round(sum_UxK / grid_K) * grid_K


def mean_intervals(value_ExM: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """The 95 % bootstrap intervals [M, 2] of the columns' means over the rows where they are not NaN."""
    value_ExM = np.asarray(value_ExM, np.float64)
    kept_ExM = ~np.isnan(value_ExM)
    M = value_ExM.shape[1]

    def means(sum_Bx2M: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return sum_Bx2M[:, :M] / sum_Bx2M[:, M:]

    columns = np.concatenate([np.where(kept_ExM, value_ExM, 0.0), kept_ExM], axis=1)
    return bootstrap(columns, user_E, means, resamples, seed).T


def mean_interval(value_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over rows. Of a paired difference: pass `a_E - b_E`."""
    ((low, high),) = mean_intervals(np.asarray(value_E)[:, None], user_E, resamples, seed)
    return float(low), float(high)


def permutation_test(difference_E: np.ndarray, user_E: np.ndarray, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired difference: the sign of each user's summed difference is exchangeable under H0.

    Formula:   p = (1 + #{|sum_u s_u d_u| >= |sum_u d_u|}) / (1 + resamples),   s_u = ±1
               exact over all 2^m sign patterns (no +1) when at most 16 users differ.
    Reduces to: 1 when nothing differs.
    Source:    Phipson & Smyth (arXiv 1603.05766) for the +1; Smucker et al., CIKM 2007, for the test.
    """
    sum_U = user_sums(difference_E, user_E)[:, 0]
    sum_U = sum_U[sum_U != 0]
    m = len(sum_U)
    # sums that differ by rounding only are ties
    bound = abs(sum_U.sum()) - 1e-9 * np.abs(sum_U).sum()
    if m <= EXACT:
        bits_BxM = np.arange(2**m)[:, None] >> np.arange(m) & 1
        return float((np.abs((1 - 2 * bits_BxM) @ sum_U) >= bound).mean())
    random = seeds.generator(seed, "permutation", m)
    extreme = 0
    for start in range(0, resamples, block := max(1, CHUNK // m)):
        size = min(block, resamples - start)
        flip_BxM = np.unpackbits(random.integers(256, size=(size, -(-m // 8)), dtype=np.uint8), axis=1)[:, :m]
        extreme += int((np.abs(sum_U.sum() - 2 * (flip_BxM @ sum_U)) >= bound).sum())
    return (extreme + 1) / (resamples + 1)


def mcnemar(a_E: np.ndarray, b_E: np.ndarray) -> float:
    """Exact two-sided McNemar p-value of two 0/1 outcomes on the same independent rows.

    Formula:   p = min(1, 2 P(X <= min(b, c))),   X ~ Binomial(b + c, 1/2),   b, c = rows where only one is right
    Source:    McNemar, Psychometrika 12 (1947); exact form as in Fagerland et al. (2013).
    """
    a_E, b_E = np.asarray(a_E, bool), np.asarray(b_E, bool)
    only_a, only_b = int((a_E & ~b_E).sum()), int((b_E & ~a_E).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that control the family-wise error over the whole list.

    Formula:   sorted ascending, p~_(i) = max over j <= i of min(1, (m - j + 1) p_(j))
    Source:    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    p_M = np.asarray(p, np.float64)
    order = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order] = np.maximum.accumulate(np.minimum(1.0, p_M[order] * np.arange(len(p_M), 0, -1)))
    return adjusted_M.tolist()


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's step-up adjustment: q-values that control the false discovery rate over the whole list.

    Formula:   sorted ascending, q_(i) = min over j >= i of min(1, m p_(j) / j)
    Source:    Benjamini & Hochberg, JRSS B 57 (1995), for independent or positively dependent tests.
    """
    p_M = np.asarray(p, np.float64)
    m = len(p_M)
    order = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    stepped_M = np.minimum(1.0, m / np.arange(1, m + 1) * p_M[order])
    adjusted_M[order] = np.minimum.accumulate(stepped_M[::-1])[::-1]
    return adjusted_M.tolist()


def add_adjusted(comparisons: Sequence[dict]) -> None:
    """Gives every comparison that has a "p" its "p_holm" and "q_bh" over all of them."""
    tested = [row for row in comparisons if row["p"] is not None]
    p = [row["p"] for row in tested]
    for row, family_wise, discovery in zip(tested, holm(p), benjamini_hochberg(p)):
        row |= {"p_holm": family_wise, "q_bh": discovery}


def detectable(difference_E: np.ndarray, user_E: np.ndarray) -> float | None:
    """The smallest true mean difference that a two-sided test at 5 % finds in four of five such experiments.

    Formula:   (z_0.975 + z_0.8) s,   s^2 = U / (U - 1) sum_u (sum of u's differences - n_u mean)^2 / n^2,
               the standard error of the mean over rows whose users, not rows, are independent.
    Reduces to: 2.80 sd / sqrt(n) when every user has one row. None when it is unknown: one user, or no spread at all.
    Source:    Miller, arXiv 2411.00640 (clustered standard errors, power); Cochran, Sampling Techniques (1977), 9A.
    """
    sum_Ux2 = user_sums(np.stack([difference_E, np.ones(len(difference_E))], axis=1), user_E)
    total, n = (math.fsum(column_U) for column_U in sum_Ux2.T)
    U = len(sum_Ux2)
    squares = math.fsum(np.square(sum_Ux2[:, 0] - sum_Ux2[:, 1] * (total / n)))
    # a spread that is rounding only is none
    if U < 2 or squares <= 1e-18 * math.fsum(np.square(sum_Ux2[:, 0])):
        return None
    return (Z_975 + Z_80) * math.sqrt(U / (U - 1) * squares) / n


def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    """{"mean", "sd", "values", "n"} of a figure of runs that differ in their seed; sd with n - 1, None for one run."""
    n = len(values)
    mean = math.fsum(values.values()) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values.values()) / (n - 1)) if n > 1 else None
    return {"mean": mean, "sd": sd, "values": dict(sorted(values.items())), "n": n}


def compare(a_E: np.ndarray, b_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict:
    """The paired comparison of two models on the same rows, as in `results.json`, without the rows where either is NaN.

    Returns {"difference": mean(a - b), "ci95", "p", "test", "n", "detectable"}; all None but n when no row is left.
    "p_mcnemar" too when all values are 0 or 1 and no user has two rows.
    """
    a_E, b_E = np.asarray(a_E, np.float64), np.asarray(b_E, np.float64)
    kept = ~np.isnan(a_E - b_E)
    a_E, b_E, user_E = a_E[kept], b_E[kept], np.asarray(user_E)[kept]
    n, test = len(user_E), "paired permutation"
    if not n:
        return {"difference": None, "ci95": None, "p": None, "test": test, "n": 0, "detectable": None}
    difference_E = a_E - b_E
    found = {
        "difference": math.fsum(difference_E) / n,
        "ci95": list(mean_interval(difference_E, user_E, resamples, seed)),
        "p": permutation_test(difference_E, user_E, seed=seed),
        "test": test,
        "n": n,
        "detectable": detectable(difference_E, user_E),
    }
    if np.isin([a_E, b_E], (0, 1)).all() and len(np.unique(user_E)) == n:
        found["p_mcnemar"] = mcnemar(a_E, b_E)
    return found
