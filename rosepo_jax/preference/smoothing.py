"""The smoothing factor eps: how likely a preference oracle holds a label to be flipped.

A pair's eps = min(sigma(-(s_w - s_l) / tau), cap) from the oracle's scores of the chosen item w and the rejected item
l for the same history (reconstructed from the description of RosePO, arXiv 2410.12519; its formula was not available).
The optimum of the smoothed loss, h* = logit(1 - eps), is then the oracle's own margin (s_w - s_l) / tau.

With K rejected items and an aggregator that makes one row of them, the row's eps is such that its optimum u* is the
oracle's margins put through the same aggregator, m_d = logit(1 - eps_d):

    lse:  u* = -logsumexp_d(-m_d)  =>  odds_row = sum_d odds_d,  odds = eps / (1 - eps)
    mean: u* = mean_d m_d          =>  eps_row = sigma(-mean_d logit(1 - eps_d))

The row's eps needs no cap of its own. With cap 1/2 each odds_d <= 1, so lse gives eps_row <= K/(K+1). At step 0 the
margin is u = -log K and the slope sigma(u) - (1 - eps_row) = eps_row - K/(K+1) <= 0: the oracle may silence a row, it
never reverses the observed preference. A cap of 1/2 on eps_row would only bias rows. For mean eps_row <= 1/2 anyway.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from rosepo_jax import seeds
from rosepo_jax.errors import UserError
from rosepo_jax.preference.objectives import SMOOTHING_MODES, choose

TEMPERATURES = (1e-2, 1e2)  # the range of fitted temperatures, in units of the oracle's scores


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """How eps is made; hashable, so it may be a static argument of `jax.jit`.

    mode: oracle (eps of each pair), fixed (`value` for all), none (0), shuffled (the oracle's eps permuted over the
    rows of a batch: the control with the same marginal that knows nothing of the pair).
    """

    mode: str = "oracle"
    temperature: float = 1.0
    cap: float = 0.5
    value: float = 0.1

    def __post_init__(self) -> None:
        choose("align.smoothing.mode", self.mode, SMOOTHING_MODES)
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"align.smoothing.temperature={self.temperature}: must be positive (0 = the fitted one)")
        if not 0.0 < self.cap <= 1.0:
            raise UserError(f"align.smoothing.cap={self.cap}: must be above 0 and at most 1")
        if not 0.0 <= self.value <= 1.0:
            raise UserError(f"align.smoothing.value={self.value}: must be a probability")

    @property
    def needs_oracle(self) -> bool:
        return self.mode in ("oracle", "shuffled")


def pair_epsilon(smoothing: Smoothing, scores_BxR: jax.Array) -> jax.Array:
    """eps_BxK = min(sigma(-(s_w - s_l) / tau), cap) from the oracle's scores of the responses' items (index 0 = w)."""
    gap_BxK = (scores_BxR[:, :1] - scores_BxR[:, 1:]) / smoothing.temperature
    return jnp.minimum(jax.nn.sigmoid(-gap_BxK), smoothing.cap)


def epsilon(
    smoothing: Smoothing,
    aggregator: str,
    epsilon_BxK: jax.Array,
    real_B: jax.Array,
    seed: int,
    step: jax.Array | int,
) -> jax.Array:
    """The eps that the objective takes: [B, K] with the `pairs` aggregator, else [B]; no gradient passes.

    Args:
      smoothing: the mode and its numbers.
      aggregator: pairs | lse | mean, as in the objective.
      epsilon_BxK: the pairs' eps, from `pair_epsilon` or from the stored pairs (not read in modes fixed and none).
      real_B: False in padding rows.
      seed: of the run; with `step` it determines the permutation of mode shuffled.
      step: number of the batch.
    """
    if not smoothing.needs_oracle:
        value = smoothing.value if smoothing.mode == "fixed" else 0.0
        return jnp.full(epsilon_BxK.shape if aggregator == "pairs" else epsilon_BxK.shape[:1], value, epsilon_BxK.dtype)
    epsilon_BxK = jax.lax.stop_gradient(epsilon_BxK)
    if smoothing.mode == "shuffled":
        epsilon_BxK = shuffle(epsilon_BxK, real_B, seed, step)
    return row_epsilon(epsilon_BxK, aggregator)


def row_epsilon(epsilon_BxK: jax.Array, aggregator: str) -> jax.Array:
    """The eps of rows from the eps of their pairs: [B, K] for `pairs`, [B] for `lse` and `mean` (formulas above)."""
    if aggregator == "pairs":
        return epsilon_BxK
    limits = jnp.finfo(epsilon_BxK.dtype)
    clipped_BxK = jnp.clip(epsilon_BxK, limits.tiny, 1 - limits.eps)  # 0 and 1 would have infinite margins
    log_odds_BxK = jnp.log(clipped_BxK) - jnp.log1p(-clipped_BxK)
    combine = jax.nn.logsumexp if aggregator == "lse" else jnp.mean
    return jax.nn.sigmoid(combine(log_odds_BxK, axis=1))


def shuffle(epsilon_BxK: jax.Array, real_B: jax.Array, seed: int, step: jax.Array | int) -> jax.Array:
    """The rows of eps permuted over the real rows, a pure function of (seed, step); padding rows keep theirs."""
    key = jax.random.fold_in(jax.random.key(seeds.key(seed, "shuffled") & 0x7FFFFFFF), step)
    rows_B = jnp.arange(real_B.shape[0])
    drawn_B = jax.random.uniform(key, real_B.shape)
    from_B = jnp.lexsort((rows_B, jnp.where(real_B, drawn_B, 0), ~real_B))  # real rows by their draws, then padding
    to_B = jnp.lexsort((rows_B, ~real_B))
    return jnp.zeros_like(epsilon_BxK).at[to_B].set(epsilon_BxK[from_B])


def fit_temperature(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """tau that calibrates sigma((s_w - s_l) / tau) as the probability that w is preferred, by maximum likelihood.

    The NLL, mean softplus(-gap / tau), is convex in 1/tau, so the root of its derivative is the minimum. `chosen` and
    `rejected` are the oracle's scores, broadcast against each other. The result lies in `TEMPERATURES`: its lower end
    if every gap is positive, its upper end if the oracle is no better than chance; 1 if all gaps are 0.

    Raises:
      UserError: no pairs, or scores that are not finite.
    """
    gap = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    if gap.size == 0:
        raise UserError("oracle: no validation pairs to fit the temperature on; raise data.validation_share")
    if not np.all(np.isfinite(gap)):
        raise UserError("oracle: scores are not finite; lower oracle.learning_rate")
    if not np.any(gap):
        return 1.0

    def slope(inverse: float) -> float:
        return -float(np.mean(gap * special.expit(-gap * inverse)))

    lowest, highest = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(lowest) >= 0:
        return TEMPERATURES[1]
    if slope(highest) <= 0:
        return TEMPERATURES[0]
    return float(1 / optimize.brentq(slope, lowest, highest, xtol=1e-12, rtol=1e-10))
