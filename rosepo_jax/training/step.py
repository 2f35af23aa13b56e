"""One update: policy, reference and oracle forwards, the objective, its gradient and the optimiser, in one program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, jax.Array]

DECAY = 0.98  # of the running means of the loss
FAMILIAR = 20  # updates after which it is known what a usual loss is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes: update count, trainable parameters, optimiser state, updates skipped, and the running
    means of the loss and its square over the others (Adam's: from 0, to be divided by 1 - DECAY^updates)."""

    step: jax.Array
    trainable: Mapping[str, jax.Array]
    optimizer: Any
    skipped: jax.Array
    losses_2: jax.Array


def init_state(trainable: Mapping[str, jax.Array], transformation: optax.GradientTransformation) -> TrainState:
    zero = functools.partial(jnp.zeros, (), jnp.int32)  # a buffer each: the state is donated
    return TrainState(zero(), dict(trainable), transformation.init(dict(trainable)), zero(), jnp.zeros(2, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Task:
    """What SFT and alignment differ in.

    forward(trainable, frozen, batch) -> logps_BxR: differentiated.
    constants(frozen, batch) -> pytree of [B, ...] arrays (reference log-probs, smoothing), never differentiated.
    loss(logps_BxR, constants, batch) -> (scalar, metrics): over the whole batch.
    coupled: whether the loss gradient of one row depends on the log-probs of others.
    """

    forward: Callable[[Any, Any, Batch], jax.Array]
    constants: Callable[[Any, Batch], Any]
    loss: Callable[[jax.Array, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    coupled: bool = False


def gradients(task: Task, trainable, frozen, batch: Batch, accumulate: int):
    """Loss gradient and metrics of one batch, in `accumulate` micro-batches.

    The chain rule is cut at the log-probs: d loss / d params = sum_b (d loss / d logps_b) (d logps_b / d params). The
    loss always sees the log-probs of the whole batch, so accumulation changes neither it nor its gradient, whatever the
    objective. A coupled loss needs all log-probs before the first backward pass: one more forward when accumulating.
    """

    def loss_and_cotangent(logps, constants):
        (_, metrics), cotangent = jax.value_and_grad(task.loss, has_aux=True)(logps, constants, batch)
        return metrics, cotangent

    if accumulate == 1:
        constants = jax.lax.stop_gradient(task.constants(frozen, batch))
        logps, pull = jax.vjp(lambda p: task.forward(p, frozen, batch), trainable)
        metrics, cotangent = loss_and_cotangent(logps, constants)
        return pull(cotangent)[0], metrics

    # Micro-batch a takes rows a, a + A, ...: every device holds an equal part of each.
    def split(x):
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    micros = jax.tree.map(split, dict(batch))
    constants = jax.lax.stop_gradient(jax.tree.map(join, jax.lax.map(lambda m: task.constants(frozen, m), micros)))
    ahead_AxB = jax.lax.map(lambda m: task.forward(trainable, frozen, m), micros) if task.coupled else None

    def backward(total, indexed):
        index, micro = indexed
        logps, pull = jax.vjp(lambda p: task.forward(p, frozen, micro), trainable)
        # Rows of an uncoupled loss do not see each other, so the other micro-batches' entries do not matter.
        known = jnp.broadcast_to(logps[None], (accumulate, *logps.shape)) if ahead_AxB is None else ahead_AxB
        _, cotangent = loss_and_cotangent(join(known.at[index].set(logps)), constants)
        return jax.tree.map(jnp.add, total, pull(split(cotangent)[index])[0]), logps

    zero = jax.tree.map(jnp.zeros_like, trainable)
    total, logps_AxB = jax.lax.scan(backward, zero, (jnp.arange(accumulate), micros))
    _, metrics = task.loss(join(logps_AxB), constants, batch)
    return total, metrics


def train_step(
    task: Task,
    transformation: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    spike: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of `state`. A non-finite loss or gradient leaves parameters and optimiser bitwise as they were; so
    does a loss more than `spike` standard deviations above its running mean (0: none is too high)."""
    gradient, metrics = gradients(task, state.trainable, frozen, batch, accumulate)
    norm = optax.global_norm(gradient)
    taken = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    if spike:
        taken &= ~_is_spike(metrics["loss"], state, spike)
    updates, optimizer = transformation.update(gradient, state.optimizer, dict(state.trainable))
    trainable = optax.apply_updates(dict(state.trainable), updates)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)

    seen_2 = jnp.stack([metrics["loss"], metrics["loss"] ** 2]).astype(jnp.float32)
    metrics |= {"grad_norm": norm, "learning_rate": schedule(state.step), "taken": taken}
    return (
        TrainState(
            state.step + 1,
            keep(trainable, dict(state.trainable)),
            keep(optimizer, state.optimizer),
            state.skipped + jnp.where(taken, 0, 1),
            keep(DECAY * state.losses_2 + (1 - DECAY) * seen_2, state.losses_2),
        ),
        metrics,
    )


def _is_spike(loss: jax.Array, state: TrainState, spike: float) -> jax.Array:
    taken = state.step - state.skipped
    mean, square = state.losses_2 / (1 - DECAY ** jnp.maximum(taken, 1))
    return (taken >= FAMILIAR) & (loss > mean + spike * jnp.sqrt(jnp.maximum(square - mean**2, 0.0)))
