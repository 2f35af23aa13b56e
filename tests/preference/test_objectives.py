"""Objectives against closed forms, golden values (float64), gradients and the invariances of batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from rosepo_jax import config
from rosepo_jax.errors import UserError
from rosepo_jax.preference import objectives
from rosepo_jax.preference.objectives import OBJECTIVES, Objective

LN2 = 0.6931471805599453

S = np.array([[-6, -9, -10, -7], [-8, -7, -9, -8.5], [-5, -8, -6, -9], [-7.5, -7.5, -8, -9]])
REF = np.array([[-6.5, -8, -9.5, -7.5], [-7.8, -7.2, -9, -8], [-6, -7, -6.5, -8.5], [-7.5, -7.5, -8.2, -9]])
N = np.array([[4, 5, 5, 5], [5, 4, 4, 4], [3, 4, 4, 4], [6, 6, 6, 6]])
EPSILON = np.array([0, 0.1, 0.3, 0.5])
ROSEPO = OBJECTIVES["rosepo"]


def with_(name: str, **changes) -> Objective:
    return dataclasses.replace(OBJECTIVES[name], **changes)


GOLDEN = [  # objective, eps, rejected items, row losses or None, batch loss
    (with_("dpo", beta=0.1), 0, 1, (0.620957, 0.713347, 0.598139, 0.693147), 0.656398),
    (with_("dpo", beta=1.0), 0, 1, (0.201413, 0.913015, 0.126928, 0.693147), 0.483626),
    (with_("cdpo", beta=1.0), 0.1, 1, (0.351413, 0.873015, 0.326928, 0.693147), 0.561126),
    (with_("rosepo", beta=1.0), EPSILON, 1, (0.201413, 0.873015, 0.726928, 0.693147), 0.623626),
    (with_("rosepo", beta=0.1), EPSILON, 1, (0.620957, 0.709347, 0.658139, 0.693147), 0.670398),
    (with_("rosepo", beta=1.0, aggregator="lse"), EPSILON, 3, (0.952048, 1.369858, 0.686180, 0.855259), 0.965836),
    (with_("robust", beta=1.0), 0.1, 1, (0.013913, 0.963015, -0.123072, 0.693147), 0.386751),
    (with_("hinge", beta=1.0), 0, 1, (0, 1.4, 0, 1), 0.6),
    (with_("ipo_sum", beta=0.1), 0, 1, (12.25, 29.16, 9, 25), 18.8525),
    (with_("ipo", beta=0.1), 0, 1, (21.855625, 25.9081, 19.506944, 25), 23.067667),
    (with_("dpo_norm", beta=1.0), 0, 1, (0.543793, 0.739159, 0.443426, 0.693147), 0.604881),
    (with_("simpo", beta=2.0, gamma_ratio=0.5), 0, 1, (0.913015, 1.103186, 0.873639, 1.313262), 1.050775),
    (with_("s-dpo", beta=1.0), 0, 3, (0.952048, 1.493813, 0.675490, 1.440167), 1.140380),
    (with_("dmpo", beta=1.0), 0, 3, (0.360885, 0.744397, 0.233963, 0.727036), 0.516570),
    (with_("dr-dpo", beta=1.0), 0, 1, None, 0.430905),
    (with_("dr-dpo", beta=1.0, beta_prime=0.5), 0, 1, None, 0.384129),
    (with_("dpo", beta=1.0, nll=0.005, nll_reduction="sum"), 0, 1, None, 0.516751),
    (with_("dpo", beta=1.0, nll=0.005, nll_reduction="token"), 0, 1, None, 0.490987),
]
ALL = sorted(OBJECTIVES)


def batch(rejected: int, dtype=np.float64):
    keep = slice(0, 1 + rejected)
    return jnp.asarray(S[:, keep], dtype), jnp.asarray(REF[:, keep], dtype), jnp.asarray(N[:, keep])


def row_losses(objective, logps, ref, counts, epsilon) -> jax.Array:
    """The loss of every row alone [B]; K pairs of one row are averaged."""
    epsilon = jnp.asarray(epsilon, logps.dtype)
    epsilon = epsilon if epsilon.ndim else jnp.broadcast_to(epsilon, len(logps))
    alone = lambda *row: objectives.preference_loss(objective, *(x[None] for x in row), real(1))[0]  # noqa: E731
    return jax.vmap(alone)(logps, ref, counts, epsilon)


def real(n: int) -> jax.Array:
    return jnp.ones(n, bool)


@pytest.mark.parametrize(("objective", "epsilon", "rejected", "rows", "loss"), GOLDEN)
@pytest.mark.parametrize("x64", [True, False])
def test_golden(objective, epsilon, rejected, rows, loss, x64):
    with jax.enable_x64(x64):
        tolerance = 1.01e-6 if x64 else 2e-5
        logps, ref, counts = batch(rejected, np.float64 if x64 else np.float32)
        total, metrics = objectives.preference_loss(objective, logps, ref, counts, jnp.asarray(epsilon), real(4))
        np.testing.assert_allclose(total, loss, atol=tolerance)
        np.testing.assert_allclose(metrics["loss/total"], loss, atol=tolerance)
        if rows is not None:
            losses = row_losses(objective, logps, ref, counts, jnp.asarray(epsilon))
            np.testing.assert_allclose(losses, rows, atol=tolerance)


@pytest.mark.parametrize(
    ("pi_w", "pi_l", "ref_w", "ref_l", "beta", "epsilon", "dpo", "rosepo", "robust", "slope"),
    [
        (-4, -6, -4.5, -5, 0.1, 0, 0.620957048, 0.620957048, 0.620957048, -0.462570155),
        (-4, -6, -4.5, -5, 0.1, 0.2, 0.620957048, 0.650957048, 0.570957048, -0.262570155),
        (-8, -3, -6, -5, 1.0, 0.3, 4.018149928, 2.818149928, 7.018149928, -0.682013790),
        (-8, -3, -6, -5, 1.0, 0.7, 4.018149928, 1.218149928, None, -0.282013790),
        (-5, -5, -5, -5, 1.0, 0.4, 0.693147181, 0.693147181, 0.693147181, -0.1),
    ],
)
def test_golden_scalars(pi_w, pi_l, ref_w, ref_l, beta, epsilon, dpo, rosepo, robust, slope):
    with jax.enable_x64(True):
        logps, ref = jnp.array([[pi_w, pi_l]], float), jnp.array([[ref_w, ref_l]], float)

        def loss(name, logps):
            return row_losses(with_(name, beta=beta), logps, ref, jnp.ones((1, 2), int), epsilon)[0]

        np.testing.assert_allclose(loss("dpo", logps), dpo, atol=1e-9)
        np.testing.assert_allclose(loss("rosepo", logps), rosepo, atol=1e-9)
        if robust is not None:
            np.testing.assert_allclose(loss("robust", logps), robust, atol=1e-9)
        gradient = jax.grad(loss, argnums=1)("rosepo", logps)
        np.testing.assert_allclose(gradient, [[beta * slope, -beta * slope]], atol=1e-9)


def test_golden_gradients_and_weights():
    with jax.enable_x64(True):
        logps, ref, counts = batch(1)
        for beta, expected in ((1.0, (-0.182426, -0.498688, 0.180797, 0)), (0.1, (-0.462570, -0.409999, -0.150166, 0))):
            gradient = jax.grad(
                lambda x, beta=beta: row_losses(with_("rosepo", beta=beta), x, ref, counts, jnp.asarray(EPSILON)).sum()
            )(logps)
            np.testing.assert_allclose(gradient[:, 0] / beta, expected, atol=1.01e-6)
        objective = with_("dr-dpo", beta=1.0)
        losses = row_losses(objective, logps, ref, counts, 0)
        weights = jax.grad(lambda rows: objectives.reduce(objective, rows, real(4)))(losses[:, None])
        np.testing.assert_allclose(weights[:, 0], (0.314490, 0.154370, 0.338809, 0.192331), atol=1.01e-6)


def test_softmax_gradient_is_the_multinomial_one():
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        objective = with_("s-dpo", beta=1.0)
        gradient = jax.grad(lambda x: row_losses(objective, x, ref, counts, 0).sum())(logps)
        p = jax.nn.softmax(logps - ref, axis=1)
        np.testing.assert_allclose(p[0], (0.385950, 0.086117, 0.141983, 0.385950), atol=1.01e-6)
        np.testing.assert_allclose(gradient, p - jnp.eye(4)[:1].repeat(4, 0), atol=1e-12)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 6.625), ("sequence", 1.504167), ("token", 1.472222)])
def test_nll_reductions(reduction, expected):
    with jax.enable_x64(True):
        logps, ref, counts = batch(1)
        objective = with_("dpo", beta=1.0, nll=0.3, nll_reduction=reduction)
        loss, metrics = objectives.preference_loss(objective, logps, ref, counts, 0, real(4))
        np.testing.assert_allclose(metrics["nll"], expected, atol=1.01e-6)
        np.testing.assert_allclose(loss, metrics["loss"] + 0.3 * metrics["nll"], rtol=1e-15)


def test_dr_dpo_over_one_batch_not_over_micro_batches():
    with jax.enable_x64(True):
        delta = np.array([1.5, -0.4, 2, 0, -1, 0.5, 3, -2])
        logps = jnp.stack([jnp.asarray(delta), jnp.zeros(8)], 1)
        objective = with_("dr-dpo", beta=1.0)

        def loss(rows):
            zeros, ones = jnp.zeros_like(logps[rows]), jnp.ones(logps[rows].shape, int)
            return objectives.preference_loss(objective, logps[rows], zeros, ones, 0, real(len(zeros)))

        np.testing.assert_allclose(loss(slice(0, 8))[0], 0.561492, atol=1.01e-6)
        halves = [loss(slice(0, 4))[0], loss(slice(4, 8))[0]]
        np.testing.assert_allclose(np.mean(halves), 0.571317, atol=1.01e-6)  # what must not be done
        np.testing.assert_allclose(loss(slice(0, 8))[1]["loss/row_mean"], 0.737170, atol=1.01e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
def test_step_zero(epsilon, beta):
    """Policy = reference: the fp32 values that the first logged loss of a run must show."""
    logps, _, counts = batch(3, np.float32)

    def loss(name, rejected=3, **changes):
        x = logps[:, : 1 + rejected]
        objective = with_(name, beta=beta, **changes)
        return float(objectives.preference_loss(objective, x, x, counts[:, : 1 + rejected], epsilon, real(4))[0])

    for name in ("dpo", "cdpo", "rosepo", "dmpo", "dpo_norm"):
        assert loss(name) == np.float32(LN2), name
    assert abs(loss("dr-dpo") - LN2) < 1e-6
    if epsilon < 0.5:
        assert abs(loss("robust") - LN2) < 1e-6
    for rejected in (1, 2, 3):
        assert abs(loss("s-dpo", rejected) - math.log(1 + rejected)) < 1e-6
        expected = math.log(1 + rejected) - epsilon * math.log(rejected)
        assert abs(loss("rosepo", rejected, aggregator="lse") - expected) < 1e-6
    assert loss("hinge") == 1
    for name in ("ipo", "ipo_sum"):
        np.testing.assert_allclose(loss(name), 1 / (4 * beta**2), rtol=1e-6)


real_number = st.floats(-20, 20)
probability = st.floats(0, 1)


def logistic(h: float, epsilon: float) -> jax.Array:
    return objectives.link(ROSEPO, jnp.asarray(h, float), jnp.asarray(epsilon, float))


@given(h=real_number, epsilon=probability)
@settings(max_examples=100, deadline=None)
def test_identities_of_smoothing(h, epsilon):
    with jax.enable_x64(True):
        loss = logistic(h, epsilon)
        assert float(logistic(h, 0.0)) == float(jax.nn.softplus(-jnp.asarray(h, float)))  # 1: eps = 0 is DPO
        two_terms = (1 - epsilon) * np.logaddexp(0, -h) + epsilon * np.logaddexp(0, h)
        np.testing.assert_allclose(loss, two_terms, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(loss, logistic(-h, 1 - epsilon), rtol=1e-12, atol=1e-12)  # 2: swap
        sigma = 1 / (1 + math.exp(-h))
        np.testing.assert_allclose(jax.grad(logistic)(h, epsilon), sigma - (1 - epsilon), atol=1e-12)  # 3
        curvature = jax.grad(jax.grad(logistic))(h, epsilon)
        np.testing.assert_allclose(curvature, sigma * (1 - sigma), atol=1e-12)


@pytest.mark.parametrize(
    ("epsilon", "h", "loss"), [(0.05, 2.944439, 0.198515), (0.1, 2.197225, 0.325083), (0.3, 0.847298, 0.610864)]
)
def test_minimum_is_the_entropy_of_the_label(epsilon, h, loss):
    with jax.enable_x64(True):
        minimum = math.log((1 - epsilon) / epsilon)
        np.testing.assert_allclose(minimum, h, atol=1.01e-6)
        np.testing.assert_allclose(logistic(minimum, epsilon), loss, atol=1.01e-6)
        np.testing.assert_allclose(jax.grad(logistic)(minimum, epsilon), 0, atol=1e-12)


@given(gap=st.floats(-8, 8), tau=st.floats(0.2, 5))
@settings(max_examples=50, deadline=None)
def test_training_distils_the_oracle_margin(gap, tau):
    with jax.enable_x64(True):  # identity 5
        epsilon = jax.nn.sigmoid(-jnp.asarray(gap / tau))
        np.testing.assert_allclose(jax.grad(logistic)(gap / tau, epsilon), 0, atol=1e-12)


def test_cap_keeps_the_observed_order():
    with jax.enable_x64(True):  # identities 6 and 7
        for epsilon in (0.0, 0.2, 0.5, 0.8):
            np.testing.assert_allclose(jax.grad(logistic)(0.0, epsilon), epsilon - 0.5, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [(name, OBJECTIVES[name].aggregator) for name in ALL] + [("rosepo", "lse"), ("rosepo", "mean"), ("dr-dpo", "lse")],
)
def test_gradients(name, aggregator):
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        epsilon = jnp.full((4,), 0.2)
        objective = with_(name, beta=0.7, nll=0.1, aggregator=aggregator)
        loss = lambda x: objectives.preference_loss(objective, x, ref, counts, epsilon, real(4))[0]  # noqa: E731
        check_grads(loss, (logps + 0.01,), order=2, modes=["rev"])
        to_ref, to_epsilon = jax.grad(
            lambda ref, epsilon: objectives.preference_loss(objective, logps, ref, counts, epsilon, real(4))[0],
            argnums=(0, 1),
        )(ref, epsilon)
        assert not np.any(to_ref) and not np.any(to_epsilon)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_finite_at_extreme_margins(name, h):
    objective = with_(name, beta=1.0)
    logps = jnp.array([[h, 0, -h], [0, 0, 0]], jnp.float32)
    loss, gradient = jax.value_and_grad(
        lambda x: objectives.preference_loss(objective, x, jnp.zeros((2, 3)), jnp.ones((2, 3)), 0.3, real(2))[0]
    )(logps)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("order", "rows"), [((3, 1, 2), (2, 0, 3, 1)), ((2, 1, 3), (3, 2, 1, 0))])
def test_order_of_rejected_and_of_rows_is_free(name, order, rows):
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        columns = np.array([0, *order])
        for aggregator in objectives.AGGREGATORS:
            objective = with_(name, beta=0.7, aggregator=aggregator)
            a, _ = objectives.preference_loss(objective, logps, ref, counts, 0.2, real(4))
            permuted = [x[np.array(rows)][:, columns] for x in (logps, ref, counts)]
            b, _ = objectives.preference_loss(objective, *permuted, 0.2, real(4))
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_padding_rows_are_inert(name):
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        objective = with_(name, beta=0.7, nll=0.1, nll_reduction="token")
        padded = [
            jnp.concatenate([x, jnp.full((3, 4), fill, x.dtype)]) for x, fill in zip((logps, ref, counts), (9, 4, 0))
        ]
        mask = jnp.arange(7) < 4
        epsilon = jnp.concatenate([jnp.asarray(EPSILON) / 2, jnp.full(3, 0.4)])
        loss = lambda *a: objectives.preference_loss(objective, *a)  # noqa: E731
        (a, metrics_a), grad_a = jax.value_and_grad(loss, has_aux=True)(logps, ref, counts, epsilon[:4], real(4))
        (b, metrics_b), grad_b = jax.value_and_grad(loss, has_aux=True)(*padded, epsilon, mask)
        np.testing.assert_allclose(a, b, rtol=1e-14)
        np.testing.assert_allclose(grad_b[:4], grad_a, rtol=1e-12, atol=1e-15)
        assert not np.any(grad_b[4:])
        for key, value in metrics_a.items():
            np.testing.assert_allclose(metrics_b[key], value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", ["rosepo", "s-dpo", "dr-dpo"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_changes_nothing(name, micro_batches):
    """The chain rule cut at the log-probs: micro-batches pulled back by the gradient of the whole batch's loss."""
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        mask, epsilon = jnp.array([True, True, True, False]), jnp.asarray(EPSILON) * 0.8
        objective = with_(name, beta=0.7, nll=0.2, nll_reduction="token")
        policy = lambda scale, rows: logps[rows] * scale  # noqa: E731
        loss = lambda x: objectives.preference_loss(objective, x, ref, counts, epsilon, mask)[0]  # noqa: E731
        whole = jax.grad(lambda scale: loss(policy(scale, slice(0, 4))))(1.1)
        parts = [slice(i, i + 4 // micro_batches) for i in range(0, 4, 4 // micro_batches)]
        cotangent = jax.grad(loss)(jnp.concatenate([policy(1.1, rows) for rows in parts]))
        pulled = [jax.vjp(lambda scale, rows=rows: policy(scale, rows), 1.1)[1](cotangent[rows])[0] for rows in parts]
        np.testing.assert_allclose(sum(pulled), whole, rtol=1e-12)


def test_metrics():
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        objective = with_("rosepo", beta=0.5)
        _, metrics = objectives.preference_loss(objective, logps, ref, counts, jnp.asarray(EPSILON), real(4))
        reward = 0.5 * (S - REF)
        np.testing.assert_allclose(metrics["rewards/chosen"], reward[:, 0].mean(), rtol=1e-12)
        np.testing.assert_allclose(metrics["rewards/rejected"], reward[:, 1:].mean(), rtol=1e-12)
        margin = reward[:, 0].mean() - reward[:, 1:].mean()
        np.testing.assert_allclose(metrics["rewards/margins"], margin, rtol=1e-12)
        wins = (reward[:, 0] > reward[:, 1:].max(1)).mean()  # a tie with one rejected item is no win
        assert 0 < wins < 1 and metrics["rewards/accuracies"] == wins
        np.testing.assert_allclose(metrics["logps/chosen"], S[:, 0].mean())
        np.testing.assert_allclose(metrics["logps/rejected"], S[:, 1:].mean())
        np.testing.assert_allclose(metrics["epsilon/mean"], EPSILON.mean())


@pytest.mark.parametrize("aggregator", objectives.AGGREGATORS)
def test_one_rejected_item_is_the_same_for_all_aggregators(aggregator):
    with jax.enable_x64(True):
        logps, ref, counts = batch(1)
        a = row_losses(with_("rosepo", aggregator=aggregator), logps, ref, counts, jnp.asarray(EPSILON))
        b = row_losses(ROSEPO, logps, ref, counts, jnp.asarray(EPSILON))
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_equal_rejected_items_shift_the_softmax_by_log_k():
    with jax.enable_x64(True):
        logps, ref = jnp.array([[1.0, -2, -2, -2]]), jnp.zeros((1, 4))
        loss = row_losses(with_("s-dpo", beta=1.0), logps, ref, jnp.ones((1, 4), int), 0)
        np.testing.assert_allclose(loss, np.logaddexp(0, -(3 - math.log(3))), rtol=1e-12)


def test_pairs_are_rows():
    """K pairs of one prompt: each has its own eps, and the loss is their mean."""
    with jax.enable_x64(True):
        logps, ref, counts = batch(3)
        epsilon = jnp.linspace(0, 0.5, 12).reshape(4, 3)
        loss, _ = objectives.preference_loss(ROSEPO, logps, ref, counts, epsilon, real(4))
        one = [
            row_losses(ROSEPO, logps[:, [0, k]], ref[:, [0, k]], counts[:, [0, k]], epsilon[:, k - 1]).mean()
            for k in (1, 2, 3)
        ]
        np.testing.assert_allclose(loss, np.mean(one), rtol=1e-12)
        with pytest.raises(ValueError, match="row_epsilon"):
            objectives.preference_loss(with_("rosepo", aggregator="lse"), logps, ref, counts, epsilon, real(4))


@pytest.mark.parametrize("name", ALL)
def test_epsilon_acts_exactly_where_it_is_said_to(name):
    logps, ref, counts = batch(1, np.float32)
    a, b = (objectives.preference_loss(OBJECTIVES[name], logps, ref, counts, e, real(4)) for e in (0.0, 0.3))
    assert (float(a[0]) != float(b[0])) == OBJECTIVES[name].smoothed
    assert float(b[1]["epsilon/mean"]) == (np.float32(0.3) if OBJECTIVES[name].smoothed else 0)


def test_reference_is_read_unless_the_score_has_none():
    logps, ref, counts = batch(1, np.float32)
    for name, objective in OBJECTIVES.items():
        a, b = (objectives.preference_loss(objective, logps, r, counts, 0.0, real(4))[0] for r in (ref, ref * 1.1))
        assert (float(a) != float(b)) == objective.needs_reference, name


def align(**changes):
    section = config.default().align
    section.smoothing.cap = 0.4
    with section.unlocked():
        section.update(changes)
    return section


def test_configuration():
    for name in ALL:
        made = objectives.objective(align(objective=name, beta=0.3, aggregator="mean", nll=0.2, nll_reduction="token"))
        assert made.beta == 0.3 and made.nll == 0.2 and made.nll_reduction == "token"
        assert made.aggregator == ("lse" if name == "s-dpo" else "mean")
        assert made.gamma_ratio == (0.25 if name == "simpo" else 0)
        assert hash(made) == hash(dataclasses.replace(made))
    assert objectives.objective(align(objective="dr-dpo", beta_prime=0.5)).beta_prime == 0.5


def test_smoothing_mode_that_acts():
    def mode(name, mode):
        return objectives.smoothing_mode(align(objective=name, smoothing={"mode": mode}))

    assert [mode("rosepo", m) for m in ("oracle", "fixed", "none", "shuffled")] == [
        "oracle",
        "fixed",
        "none",
        "shuffled",
    ]
    assert mode("dpo", "oracle") == "none" and mode("cdpo", "oracle") == "fixed" and mode("cdpo", "none") == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "rospo"}, "did you mean rosepo"),
        ({"objective": "xyz"}, "choose one of"),
        ({"aggregator": "max"}, "align.aggregator=max"),
        ({"nll_reduction": "tokens"}, "did you mean token"),
        ({"beta": 0.0}, "align.beta"),
        ({"beta": float("nan")}, "align.beta"),
        ({"beta_prime": -1.0}, "align.beta_prime"),
        ({"nll": -0.1}, "align.nll"),
        ({"objective": "robust", "smoothing": {"cap": 0.5}}, "align.smoothing.cap"),
        ({"objective": "robust", "smoothing": {"mode": "fixed", "value": 0.49}}, "align.smoothing.value"),
        ({"objective": "robust", "aggregator": "lse"}, "align.aggregator"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        objectives.objective(align(**changes))
