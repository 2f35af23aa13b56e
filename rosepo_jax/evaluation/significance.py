"""Intervals and paired tests. No result depends on the order of the rows, only on (user, value) pairs and the seed.

Rows of one user are not independent, so resampling draws whole users and the permutation test flips whole users.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from rosepo_jax import seeds

CHUNK = 1 << 22  # numbers drawn at a time, to bound memory
EXACT = 16  # up to this many users with a difference, all sign patterns are counted


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
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
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of column sums, resampling users with replacement.

    statistic: sum_BxK -> statistic_B, e.g. `lambda sum_Bx2: sum_Bx2[:, 0] / sum_Bx2[:, 1]` for a ratio.
    Source:    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; clusters = users.
    """
    sum_UxK = user_sums(value_ExK, user_E)
    U = len(sum_UxK)
    random = seeds.generator(seed, "bootstrap", U)
    values = []
    for start in range(0, resamples, block := max(1, CHUNK // U)):
        pick_BxU = random.integers(U, size=(min(block, resamples - start), U))
        values.append(statistic(np.stack([column_U[pick_BxU].sum(axis=1) for column_U in sum_UxK.T], axis=1)))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(value_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over rows. Of a paired difference: pass `a_E - b_E`."""
    return bootstrap(np.stack([value_E, np.ones(len(value_E))], axis=1), user_E, _ratio, resamples, seed)


def _ratio(sum_Bx2: np.ndarray) -> np.ndarray:
    return sum_Bx2[:, 0] / sum_Bx2[:, 1]


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


def compare(a_E: np.ndarray, b_E: np.ndarray, user_E: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict:
    """The paired comparison of two models on the same rows, as in `results.json`, without the rows where either is NaN.

    Returns {"difference": mean(a - b), "ci95", "p", "test", "n"}; all None but n when no row is left.
    """
    difference_E = np.asarray(a_E, np.float64) - np.asarray(b_E, np.float64)
    kept = ~np.isnan(difference_E)
    difference_E, user_E = difference_E[kept], np.asarray(user_E)[kept]
    if not len(difference_E):
        return {"difference": None, "ci95": None, "p": None, "test": "paired permutation", "n": 0}
    return {
        "difference": math.fsum(difference_E) / len(difference_E),
        "ci95": list(mean_interval(difference_E, user_E, resamples, seed)),
        "p": permutation_test(difference_E, user_E, seed=seed),
        "test": "paired permutation",
        "n": len(difference_E),
    }
