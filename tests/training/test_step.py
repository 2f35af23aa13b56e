"""One update of the alignment task: its start, accumulation, what is never differentiated, computed or lost."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rosepo_jax.models import lora
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.training.step import Task, gradients, init_state, train_step

BAG = tiny.Bag()
START = BAG.init(jax.random.key(1))
LM = tiny.decoder()
SCHEDULE = optax.constant_schedule(1e-2)
OPTIMIZER = optax.adam(SCHEDULE)


def bits_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---- The start: policy == reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["oracle", "fixed", "none", "shuffled"])
@pytest.mark.parametrize("objective", ["dpo", "rosepo"])
def test_first_loss_is_ln_2_for_every_smoothing_and_beta(objective, mode):
    for beta in (0.01, 0.5, 20.0):
        for source in ("in_step", "stored"):
            task = tiny.task(BAG, objective, mode, source, beta=beta)
            constants = task.constants(tiny.frozen(START), tiny.batch())
            _, metrics = task.loss(task.forward(START, tiny.frozen(START), tiny.batch()), constants, tiny.batch())
            assert abs(float(metrics["loss"]) - math.log(2)) < 1e-6
            assert float(metrics["rewards/margins"]) == 0.0 == float(metrics["rewards/accuracies"])


@pytest.mark.parametrize(("objective", "loss"), [("s-dpo", math.log(tiny.R)), ("dmpo", math.log(2)), ("hinge", 1.0)])
def test_first_loss_of_the_others(objective, loss):
    """With K rejected responses the softmax over them starts at log(1 + K)."""
    _, metrics = gradients(tiny.task(BAG, objective), START, tiny.frozen(START), tiny.batch(), accumulate=1)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("accumulate", "kinds", "rounding"),
    [(1, {"lora": LoRAConfig(2, 4.0, "attention/.*")}, 0.0), (2, {"remat": "full", "dtype": "bfloat16"}, 1e-6)],
)
def test_margin_starts_at_zero_in_the_decoder(accumulate, kinds, rounding):
    """Exactly so where both forwards compile alike; inside scanned, rematerialised micro-batches up to rounding."""
    lm = tiny.decoder(**kinds)
    params = lm.init(jax.random.key(2))
    learns = (lambda path: lora.is_adapter(path)) if lm.lora else (lambda path: True)
    trainable = tiny.moved({path: x for path, x in params.items() if learns(path)})
    base = {path: x for path, x in params.items() if not learns(path)}
    step = jax.jit(functools.partial(gradients, tiny.task(lm, "dpo"), accumulate=accumulate))
    gradient, metrics = step(trainable, tiny.frozen(trainable, base), tiny.batch())
    assert gradient.keys() == trainable.keys()
    assert abs(float(metrics["rewards/margins"])) <= rounding
    assert abs(float(metrics["loss"]) - math.log(2)) < 1e-6


# ---- Accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": "dpo"},
        {"objective": "rosepo", "nll": 0.3, "nll_reduction": "token"},
        {"objective": "rosepo", "mode": "shuffled", "aggregator": "lse"},
        {"objective": "s-dpo"},
        {"objective": "dr-dpo"},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_accumulation_changes_nothing(keys):
    """Also where rows are coupled (dr-dpo) and where a denominator belongs to the whole batch (NLL by tokens)."""
    task, trainable, batch = tiny.task(BAG, **keys), tiny.moved(START), tiny.batch(parts=2)
    assert task.coupled == (keys["objective"] == "dr-dpo")
    run = jax.jit(functools.partial(gradients, task), static_argnums=3)
    expected_gradient, expected = run(trainable, tiny.frozen(START), batch, 1)
    for accumulate in (2, 4) if task.coupled else (4,):
        gradient, metrics = run(trainable, tiny.frozen(START), batch, accumulate)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        for path, value in expected_gradient.items():
            assert np.linalg.norm(gradient[path] - value) <= 1e-5 * np.linalg.norm(value)


def test_a_coupled_objective_needs_all_rows_at_once():
    """Dr.DPO's gradient is not the mean of its micro-batches' gradients: the test above can fail."""
    task, trainable, batch = tiny.task(BAG, "dr-dpo", beta=1.0), tiny.moved(START), tiny.batch()
    run = jax.jit(functools.partial(gradients, task, accumulate=1))
    whole, _ = run(trainable, tiny.frozen(START), batch)
    halves = [
        run(trainable, tiny.frozen(START), jax.tree.map(lambda x, half=half: x[half::2], batch))[0]["embedding"]
        for half in (0, 1)
    ]
    assert np.linalg.norm(sum(halves) / 2 - whole["embedding"]) > 1e-3 * np.linalg.norm(whole["embedding"])


def test_gradient_is_that_of_the_loss():
    """Cutting the chain rule at the log-probs gives what differentiating straight through gives."""
    task, trainable, batch = tiny.task(BAG, "rosepo", nll=0.1), tiny.moved(START), tiny.batch()
    frozen = tiny.frozen(START)
    straight = jax.grad(lambda p: task.loss(task.forward(p, frozen, batch), task.constants(frozen, batch), batch)[0])
    np.testing.assert_allclose(
        gradients(task, trainable, frozen, batch, 1)[0]["embedding"], straight(trainable)["embedding"], rtol=1e-5
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_reference_and_oracle_get_no_gradient(accumulate):
    task, trainable, batch = tiny.task(BAG, "rosepo"), tiny.moved(START), tiny.batch()

    def through_everything(frozen):
        gradient, metrics = gradients(task, trainable, frozen, batch, accumulate)
        return metrics["loss"] + jnp.sum(gradient["embedding"])

    frozen = tiny.frozen(START)
    found = jax.jit(jax.grad(through_everything))(frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found))
    # Yet both matter to the loss.
    _, metrics = gradients(task, trainable, frozen, batch, 1)
    for other in (
        frozen | {"reference": tiny.moved(START, 0.2)},
        frozen | {"oracle": tiny.ORACLE_PARAMS | {"item": 0.0 * tiny.ORACLE_PARAMS["item"]}},
    ):
        assert gradients(task, trainable, other, batch, 1)[1]["loss"] != metrics["loss"]


def test_cached_and_stored_figures_replace_their_forwards():
    """With reference log-probs and eps in the batch the reference's and the oracle's parameters are not read."""
    trainable, batch = tiny.moved(START), tiny.batch()
    in_step = tiny.task(BAG, "rosepo")
    reference_BxR, epsilon_BxK = in_step.constants(tiny.frozen(START), batch)
    cached = batch | {"reference_BxR": reference_BxR, "epsilon_BxK": epsilon_BxK}
    gradient, metrics = gradients(
        tiny.task(BAG, "rosepo", source="stored"), trainable, {"base": {}, "reference": {}, "oracle": {}}, cached, 1
    )
    expected_gradient, expected = gradients(in_step, trainable, tiny.frozen(START), batch, 1)
    np.testing.assert_array_equal(metrics["loss"], expected["loss"])
    np.testing.assert_array_equal(gradient["embedding"], expected_gradient["embedding"])


# ---- The compiled update of a decoder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """(start, compiled update) of full tuning with the oracle's smoothing."""
    params = LM.init(jax.random.key(2))
    update = jax.jit(
        functools.partial(train_step, tiny.task(LM, "rosepo", beta=1.0), OPTIMIZER, SCHEDULE, 1), donate_argnums=0
    )
    return params, update.lower(init_state(params, OPTIMIZER), tiny.frozen(params), tiny.batch()).compile()


def fresh(params):
    return init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)


def test_updates_move_the_policy_and_never_the_reference(compiled):
    params, update = compiled
    frozen = tiny.frozen(params)
    kept = jax.device_get(frozen)
    state, losses = fresh(params), []
    donated = state.trainable["embedding"]
    for _ in range(8):
        state, metrics = update(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[-1] < losses[0] - 0.005
    assert int(state.step) == 8 and int(state.skipped) == 0
    assert donated.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert bits_equal(jax.device_get(frozen), kept)
    assert not bits_equal(state.trainable, params)


def test_first_margin_is_exactly_zero(compiled):
    params, update = compiled
    _, metrics = update(fresh(params), tiny.frozen(params), tiny.batch())
    assert float(metrics["rewards/margins"]) == 0.0
    assert float(metrics["learning_rate"]) == np.float32(1e-2) and float(metrics["grad_norm"]) > 0


def test_no_vocabulary_logits_of_prompt_positions(compiled):
    """Policy, reference, backward pass and optimiser: no array has both a prompt and a vocabulary axis."""
    _, update = compiled
    dims = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", update.as_text())
    shapes = {tuple(map(int, found.split(","))) for found in dims}
    B, P, R, T, V = tiny.B, tiny.P, tiny.R, tiny.T, tiny.V
    fed = R * (T - 1)
    assert shapes & {(B * fed, V), (B, fed, V)}
    prompt_rows = {rows * length for length in (P, P - 1, P + fed) for rows in (1, B)}
    assert not [shape for shape in shapes if V in shape and prompt_rows & set(shape)]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_update_changes_no_bit_and_is_counted(compiled, poison):
    params, update = compiled
    state, _ = update(fresh(params), tiny.frozen(params), tiny.batch())
    before = jax.device_get(state)
    reference = tiny.frozen(params)
    reference["reference"]["embedding"] = reference["reference"]["embedding"].at[0].set(poison)
    batch = tiny.batch()
    poisoned = [part | {"prompt_BxP": np.zeros_like(part["prompt_BxP"])} for part in batch["parts"]]
    after, metrics = update(state, reference, batch | {"parts": tuple(poisoned)})
    assert not metrics["taken"]
    assert bits_equal(after.trainable, before.trainable) and bits_equal(after.optimizer, before.optimizer)
    assert int(after.step) == 2 and int(after.skipped) == 1
    again, metrics = update(after, tiny.frozen(params), tiny.batch(1))
    assert metrics["taken"] and int(again.skipped) == 1 and not bits_equal(again.trainable, before.trainable)


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped():
    """sqrt(x) at 0."""
    task = Task(
        forward=lambda trainable, frozen, batch: jnp.sqrt(trainable["w"])[None],
        constants=lambda frozen, batch: batch["x"],
        loss=lambda logps, constants, batch: (logps.sum(), {"loss": logps.sum()}),
    )
    state = init_state({"w": jnp.zeros(())}, OPTIMIZER)
    after, metrics = train_step(task, OPTIMIZER, SCHEDULE, 1, state, {}, {"x": jnp.zeros((1,))})
    assert float(metrics["loss"]) == 0.0 and not metrics["taken"]
    assert float(after.trainable["w"]) == 0.0 and int(after.skipped) == 1


def losses(values, spike):
    """Runs updates whose losses are these, and says which were taken."""
    task = Task(
        forward=lambda trainable, frozen, batch: 0.0 * trainable["w"][None] + batch["x"],
        constants=lambda frozen, batch: batch["x"],
        loss=lambda logps, constants, batch: (logps.sum(), {"loss": logps.sum()}),
    )
    update = jax.jit(functools.partial(train_step, task, OPTIMIZER, SCHEDULE, 1, spike=spike))
    state, taken = init_state({"w": jnp.zeros(())}, OPTIMIZER), []
    for value in values:
        state, metrics = update(state, {}, {"x": jnp.array([value])})
        taken.append(bool(metrics["taken"]))
    return state, taken


def test_a_spike_is_far_above_the_usual_loss():
    """Mean and deviation over the updates so far that were taken, in float64; the first 20 are never spikes."""
    generator = np.random.default_rng(0)
    values = generator.normal(2.0, 0.1, 60).astype(np.float32)
    values[[5, 30, 31, 45]] = 30.0, 30.0, 9.0, -30.0  # too early; two spikes; a low loss is none
    mean = square = 0.0
    count, expected = 0, []
    for value in map(float, values):
        scale = 1 - 0.98**count
        spike = count >= 20 and value > mean / scale + 4.0 * np.sqrt(square / scale - (mean / scale) ** 2)
        expected.append(not spike)
        if not spike:
            count, mean, square = count + 1, 0.98 * mean + 0.02 * value, 0.98 * square + 0.02 * value**2
    state, taken = losses(values, spike=4.0)
    assert taken == expected
    assert taken[5] and not taken[30] and taken[45]
    assert int(state.skipped) == expected.count(False) > 0
    np.testing.assert_allclose(state.losses_2, [mean, square], rtol=1e-5)
    assert all(losses(values, spike=0.0)[1])
