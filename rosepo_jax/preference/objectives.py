"""Preference objectives as one factorised family.

    a_j = score(policy, reference)_j                 j = 0 is the chosen response w, j = 1..K the rejected ones d
    u   = AGG_d beta (a_w - a_d)  -  beta gamma      gamma: target margin over beta (SimPO)
    l   = LINK(u, eps)                               row losses
    L   = REDUCE_rows(l)  +  nll * NLL(y_w)

| name | score | link | aggregator | source |
|---|---|---|---|---|
| dpo | sum_logratio | logistic | as configured | 2305.18290 |
| cdpo, rosepo | sum_logratio | logistic with eps (one value, one per row) | as configured | Mitchell 2023, 2410.12519 |
| robust | sum_logratio | robust | as configured | 2403.00409 |
| ipo, ipo_sum | mean_logratio, sum_logratio | squared | as configured | 2310.12036 |
| hinge | sum_logratio | hinge | as configured | 2305.10425 |
| dpo_norm | mean_logratio | logistic | as configured | 2411.15124 |
| simpo | mean_logp | logistic | as configured | 2405.14734 |
| s-dpo | sum_logratio | logistic | lse | 2406.09215 |
| dmpo | sum_logratio | logistic | mean | 2405.16127 |
| dr-dpo | sum_logratio | logistic, reduced by log-mean-exp | as configured | 2407.07880 |

RPO (2405.16436, 2404.19733) is any of these with `nll > 0`; its cumulative form is nll = eta * beta, reduction sum.
The formula of RosePO is reconstructed from the published description: L(u, eps) = softplus(-u) + eps u.

Reference log-probabilities, token counts, eps and masks never receive gradient. Row losses come first and one global
reduction after them. Under gradient accumulation the loss must be given the log-probabilities of the whole batch, from
all its micro-batches: dr-dpo couples its rows, and the NLL by tokens and ragged masks have global denominators.
"""

import dataclasses
import difflib
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rosepo_jax.errors import UserError

AGGREGATORS = ("pairs", "lse", "mean")
SMOOTHING_MODES = ("oracle", "fixed", "none", "shuffled")
NLL_REDUCTIONS = ("sum", "sequence", "token")
ROBUST_LIMIT = 0.49  # the robust link divides by 1 - 2 eps


@dataclasses.dataclass(frozen=True)
class Objective:
    """One member of the family; hashable, so it may be a static argument of `jax.jit`."""

    score: str = "sum_logratio"  # sum_logratio | mean_logratio | mean_logp
    aggregator: str = "pairs"  # pairs (K rows) | lse (softmax over the rejected) | mean
    link: str = "logistic"  # logistic | robust | hinge | squared
    reducer: str = "mean"  # mean | log_mean_exp: the latter couples the rows of a batch
    smoothed: bool = False  # whether eps acts; otherwise it is taken as 0
    beta: float = 0.1
    gamma_ratio: float = 0.0
    beta_prime: float = 1.0
    nll: float = 0.0
    nll_reduction: str = "sequence"

    @property
    def needs_reference(self) -> bool:
        return self.score != "mean_logp"


OBJECTIVES = {
    "dpo": Objective(),
    "cdpo": Objective(smoothed=True),
    "rosepo": Objective(smoothed=True),
    "robust": Objective(link="robust", smoothed=True),
    "ipo": Objective(score="mean_logratio", link="squared"),
    "ipo_sum": Objective(link="squared"),
    "hinge": Objective(link="hinge"),
    "dpo_norm": Objective(score="mean_logratio"),
    "simpo": Objective(score="mean_logp"),
    "s-dpo": Objective(aggregator="lse"),
    "dmpo": Objective(aggregator="mean"),
    "dr-dpo": Objective(reducer="log_mean_exp"),
}


def objective(align: ConfigDict) -> Objective:
    """The objective that the configuration section `align` names.

    Raises:
      UserError: an unknown name or choice, a number out of range, a combination that has no meaning.
    """
    name = align.objective
    choose("align.objective", name, tuple(OBJECTIVES))
    choose("align.aggregator", align.aggregator, AGGREGATORS)
    choose("align.nll_reduction", align.nll_reduction, NLL_REDUCTIONS)
    for key in ("beta", "beta_prime"):
        if not 0.0 < align[key] < math.inf:
            raise UserError(f"align.{key}={align[key]}: must be a positive number")
    if not 0.0 <= align.nll < math.inf:
        raise UserError(f"align.nll={align.nll}: must be 0 or a positive number")
    chosen = dataclasses.replace(
        OBJECTIVES[name],
        aggregator=OBJECTIVES[name].aggregator if name in ("s-dpo", "dmpo") else align.aggregator,
        beta=float(align.beta),
        gamma_ratio=float(align.gamma_ratio) if name == "simpo" else 0.0,
        beta_prime=float(align.beta_prime),
        nll=float(align.nll),
        nll_reduction=align.nll_reduction,
    )
    if chosen.link == "robust":
        _check_robust(align)
    return chosen


def smoothing_mode(align: ConfigDict) -> str:
    """The mode that acts: none where the objective takes no eps, fixed for cdpo, else `align.smoothing.mode`."""
    choose("align.smoothing.mode", align.smoothing.mode, SMOOTHING_MODES)
    if not objective(align).smoothed or align.smoothing.mode == "none":
        return "none"
    return "fixed" if align.objective == "cdpo" else align.smoothing.mode


def preference_loss(
    objective: Objective,
    logps_BxR: jax.Array,
    ref_logps_BxR: jax.Array,
    token_counts_BxR: jax.Array,
    epsilon: jax.Array,
    real_B: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss to differentiate (with the NLL term) and the metrics of one whole batch.

    Args:
      objective: the member of the family.
      logps_BxR: log-probabilities of the responses under the policy, summed over tokens (EOS included), nats.
      ref_logps_BxR: the same under the frozen reference.
      token_counts_BxR: number of those tokens.
      epsilon: probability that the label is flipped: [] or [B], or [B, K] with the `pairs` aggregator.
      real_B: False in padding rows, which must hold finite numbers and change nothing.

    Returns:
      The scalar loss and scalar metrics, means over real rows (names as in TRL). `loss` is without the NLL term,
      `loss/total` with it. Rewards are beta times the score, of K rejected responses the mean is taken, and
      `rewards/accuracies` counts the rows whose chosen response beats all of them. Objectives that couple the rows
      also show the plain mean of their row losses, `loss/row_mean`.
    """
    a_BxR = scores(objective, logps_BxR, ref_logps_BxR, token_counts_BxR)
    u_BxK = margins(objective, a_BxR)
    epsilon_BxK = _epsilon(objective, epsilon, u_BxK)
    losses_BxK = link(objective, u_BxK, epsilon_BxK)
    loss = reduce(objective, losses_BxK, real_B)
    nll = chosen_nll(objective, logps_BxR, token_counts_BxR, real_B)
    total = loss + objective.nll * nll
    reward_BxR, sum_BxR = objective.beta * a_BxR, logps_BxR.astype(a_BxR.dtype)
    rows = {
        "rewards/chosen": reward_BxR[:, :1],
        "rewards/rejected": reward_BxR[:, 1:],
        "rewards/margins": reward_BxR[:, :1] - reward_BxR[:, 1:],
        "rewards/accuracies": jnp.all(reward_BxR[:, :1] > reward_BxR[:, 1:], axis=1, keepdims=True),
        "logps/chosen": sum_BxR[:, :1],
        "logps/rejected": sum_BxR[:, 1:],
        "epsilon/mean": epsilon_BxK,
    }
    if objective.reducer != "mean":
        rows["loss/row_mean"] = losses_BxK
    metrics = {"loss": loss, "loss/total": total, "nll": nll}
    metrics |= {name: _masked_mean(values.astype(a_BxR.dtype), real_B) for name, values in rows.items()}
    return total, jax.lax.stop_gradient(metrics)


def scores(
    objective: Objective, logps_BxR: jax.Array, ref_logps_BxR: jax.Array, token_counts_BxR: jax.Array
) -> jax.Array:
    """The responses' scores a_BxR (implicit rewards before beta); at least float32, no gradient to the reference."""
    dtype = jnp.promote_types(logps_BxR.dtype, jnp.float32)
    a_BxR = logps_BxR.astype(dtype)
    if objective.score != "mean_logp":
        a_BxR = a_BxR - jax.lax.stop_gradient(ref_logps_BxR).astype(dtype)
    if objective.score != "sum_logratio":
        a_BxR = a_BxR / jnp.maximum(token_counts_BxR, 1).astype(dtype)  # 0 tokens: padding rows only
    return a_BxR


def margins(objective: Objective, a_BxR: jax.Array) -> jax.Array:
    """The margins u [B, K] with the `pairs` aggregator, else [B, 1]: positive where the chosen response wins."""
    difference_BxK = objective.beta * (a_BxR[:, :1] - a_BxR[:, 1:])
    match objective.aggregator:
        case "pairs":
            u_BxK = difference_BxK
        case "lse":
            u_BxK = -jax.nn.logsumexp(-difference_BxK, axis=1, keepdims=True)
        case "mean":
            u_BxK = jnp.mean(difference_BxK, axis=1, keepdims=True)
        case _:
            raise ValueError(f"aggregator {objective.aggregator!r}")
    return u_BxK - objective.beta * objective.gamma_ratio


def link(objective: Objective, u: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Row losses of margins `u` and flip probabilities `epsilon` of the same shape.

    logistic: softplus(-u) + eps u = (1 - eps) softplus(-u) + eps softplus(u), minimal at u = logit(1 - eps);
    robust: ((1 - eps) softplus(-u) - eps softplus(u)) / (1 - 2 eps), unbounded below: negative values are normal;
    hinge: max(0, 1 - u); squared: (u/beta - 1/(2 beta))^2.
    """
    match objective.link:
        case "logistic":
            return jax.nn.softplus(-u) + epsilon * u
        case "robust":
            return ((1 - epsilon) * jax.nn.softplus(-u) - epsilon * jax.nn.softplus(u)) / (1 - 2 * epsilon)
        case "hinge":
            return jax.nn.relu(1 - u)
        case "squared":
            return jnp.square(u / objective.beta - 0.5 / objective.beta)
    raise ValueError(f"link {objective.link!r}")


def reduce(objective: Objective, losses_BxK: jax.Array, real_B: jax.Array) -> jax.Array:
    """The loss of a whole batch from its row losses.

    mean: sum over real rows / their number. log_mean_exp (Dr.DPO): -beta' log mean_i exp(-l_i / beta'), so that the
    row weights are softmax(-l / beta'): rows of high loss, suspected flips, count less.
    """
    if objective.reducer == "mean":
        return _masked_mean(losses_BxK, real_B)
    real_BxK = jnp.broadcast_to(real_B[:, None], losses_BxK.shape)
    exponent_BxK = jnp.where(real_BxK, -losses_BxK / objective.beta_prime, -jnp.inf)
    count = jnp.sum(real_BxK, dtype=losses_BxK.dtype)
    return -objective.beta_prime * (jax.nn.logsumexp(exponent_BxK) - jnp.log(count))


def chosen_nll(objective: Objective, logps_BxR: jax.Array, token_counts_BxR: jax.Array, real_B: jax.Array) -> jax.Array:
    """Negative log-likelihood of the chosen responses, nats.

    sum: mean over rows of a response's summed NLL; sequence: mean over rows of its mean over tokens; token: mean over
    all tokens of all rows.
    """
    nll_B = -logps_BxR[:, 0].astype(jnp.promote_types(logps_BxR.dtype, jnp.float32))
    tokens_B = jax.lax.stop_gradient(token_counts_BxR[:, 0]).astype(nll_B.dtype)
    if objective.nll_reduction == "sequence":
        nll_B = nll_B / jnp.maximum(tokens_B, 1)
    weight_B = tokens_B if objective.nll_reduction == "token" else jnp.ones_like(nll_B)
    real_B = real_B.astype(bool)
    return jnp.sum(jnp.where(real_B, nll_B, 0)) / jnp.maximum(jnp.sum(jnp.where(real_B, weight_B, 0)), 1)


def _masked_mean(losses_BxK: jax.Array, real_B: jax.Array) -> jax.Array:
    """Mean over real rows, 0 without any. Summed around the first loss: equal losses, as at step 0, do not round."""
    real_BxK = jnp.broadcast_to(real_B[:, None], losses_BxK.shape).astype(bool)
    centre = jax.lax.stop_gradient(losses_BxK[0, 0])
    count = jnp.sum(real_BxK, dtype=losses_BxK.dtype)
    mean = centre + jnp.sum(jnp.where(real_BxK, losses_BxK - centre, 0)) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, 0)


def _epsilon(objective: Objective, epsilon: jax.Array, u_BxK: jax.Array) -> jax.Array:
    """eps in the shape of the margins, detached; 0 where the objective takes none."""
    if not objective.smoothed:
        return jnp.zeros_like(u_BxK)
    epsilon = jax.lax.stop_gradient(jnp.asarray(epsilon)).astype(u_BxK.dtype)
    if epsilon.ndim == 1:
        epsilon = epsilon[:, None]
    if epsilon.ndim == 2 and epsilon.shape[1] not in (1, u_BxK.shape[1]):
        raise ValueError(f"epsilon {epsilon.shape} for {u_BxK.shape} margins: aggregate it by smoothing.row_epsilon")
    return jnp.broadcast_to(epsilon, u_BxK.shape)


def choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError, with a suggestion, unless the value of a configuration key is one of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
        raise UserError(f"{key}={value}: unknown; {hint}")


def _check_robust(align: ConfigDict) -> None:
    """The robust link exists only for eps < 1/2."""
    mode = align.smoothing.mode
    if mode == "fixed" and not align.smoothing.value < ROBUST_LIMIT:
        raise UserError(f"align.smoothing.value={align.smoothing.value}: robust needs less than {ROBUST_LIMIT}")
    if mode in ("oracle", "shuffled"):
        if not align.smoothing.cap < ROBUST_LIMIT:
            raise UserError(f"align.smoothing.cap={align.smoothing.cap}: robust needs less than {ROBUST_LIMIT}")
        if align.aggregator == "lse":  # the eps of a row with K rejected may reach K/(K+1)
            raise UserError("align.aggregator=lse: robust with a per-pair eps needs aggregator pairs or mean")
