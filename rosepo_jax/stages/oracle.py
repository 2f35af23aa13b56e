"""`oracle`: trains the preference oracle on the train split, and fits its temperature on validation."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from scipy import special

from rosepo_jax import distributed, seeds
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import metrics
from rosepo_jax.models import sasrec
from rosepo_jax.preference import smoothing
from rosepo_jax.preference.objectives import choose
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.stages import runtime
from rosepo_jax.training import optimizer
from rosepo_jax.training.metrics import MetricWriter, progress

NAME, INPUTS, RESUMABLE = "oracle", ("prepare",), False
KEYS = ("seed", "oracle")


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    catalogue = Catalogue.load(inputs["prepare"] / "catalogue.jsonl")
    train, validation = (
        store.read(inputs["prepare"] / "dataset", split, items=len(catalogue)) for split in ("train", "validation")
    )
    for rows, name in ((train, "train"), (validation, "validation")):
        if not len(rows):
            raise UserError(f"oracle: the {name} split has no rows; lower data.min_history or data.core_user")
    with MetricWriter(out, config.log.tensorboard, resume_step=-1) as writer:
        oracle, figures = fit(config.oracle, config.seed, catalogue, train, validation, writer)
    gaps = pair_gaps(oracle, validation)
    oracle = dataclasses.replace(oracle, tau=smoothing.fit_temperature(*gaps))
    figures |= {
        "tau": oracle.tau,
        "ECE_before": calibration_error(*gaps, 1.0),
        "ECE_after": calibration_error(*gaps, oracle.tau),
        "n": len(validation),
    }
    if distributed.is_primary():
        data = runtime.identity(inputs["prepare"])
        sasrec.save(out, oracle.config, oracle.params, tau=oracle.tau, data=data)
    return figures


def fit(
    settings: ConfigDict, seed: int, catalogue: Catalogue, train: Rows, validation: Rows, writer: MetricWriter
) -> tuple[Oracle, dict[str, float]]:
    """The oracle of the epoch with the best validation NDCG@10, its temperature still 1, and that epoch's figures.

    An epoch is one compiled scan over its batches; their order is a pure function of (seed, epoch).
    """
    choose("oracle.loss", settings.loss, ("ce", "bce"))
    choose("oracle.positions", settings.positions, ("all", "last"))
    architecture = sasrec.SASRecConfig(
        items=len(catalogue),
        positions=train.history_ExN.shape[1],
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        dropout=settings.dropout,
    )
    size = min(settings.batch_size, len(train))
    per_epoch = math.ceil(len(train) / size)
    total = optimizer.steps(settings.length, "oracle.length", batch_size=size, rows=per_epoch * size)
    transformation = optax.adamw(
        settings.learning_rate,
        b2=0.98,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree.map(lambda value: value.ndim >= 2, params),
    )
    params = sasrec.init(architecture, jax.random.key(seeds.key(seed, NAME, "init") >> 33))
    state, dropout_key = (params, transformation.init(params)), jax.random.key(seeds.key(seed, NAME, "dropout") >> 33)
    scan = epoch_function(architecture, transformation, settings.loss, settings.positions)
    history, target = jnp.asarray(train.history_ExN), jnp.asarray(train.target_E)

    best, figures = Oracle(architecture, jax.device_get(params), 1.0), {"NDCG@10": -1.0, "epoch": 0}
    for epoch in progress(range(1, math.ceil(total / per_epoch) + 1), "oracle epochs"):
        start = (epoch - 1) * per_epoch
        order = batch_order(seed, epoch, len(train), size)[: total - start]
        state, loss = scan(state, history, target, jnp.asarray(order), jax.random.fold_in(dropout_key, epoch))
        if not math.isfinite(loss):
            raise UserError(f"oracle: the loss of epoch {epoch} is not finite; lower oracle.learning_rate")
        oracle = Oracle(architecture, jax.device_get(state[0]), 1.0)
        found = {"epoch": epoch, "loss": float(loss), **ranking_figures(oracle, validation, catalogue.title_group_I)}
        writer.scalars(start + len(order), found)
        runtime.say(
            f"oracle: epoch {epoch}: loss {found['loss']:.3f}, validation HR@1 {found['HR@1']:.3f}, "
            f"NDCG@10 {found['NDCG@10']:.4f}"
        )
        if found["NDCG@10"] > figures["NDCG@10"]:
            best, figures = oracle, found
        elif settings.patience and epoch - figures["epoch"] >= settings.patience:
            break
    return best, figures


def batch_order(seed: int, epoch: int, rows: int, size: int) -> np.ndarray:
    """Row numbers [steps, B] of an epoch: a permutation of all rows; -1 fills the last batch."""
    order_E = seeds.generator(seed, NAME, "order", epoch).permutation(rows).astype(np.int32)
    return np.pad(order_E, (0, -rows % size), constant_values=-1).reshape(-1, size)


def epoch_function(
    architecture: sasrec.SASRecConfig, transformation: optax.GradientTransformation, loss: str, positions: str
) -> Callable[..., Any]:
    """(state, history_ExN, target_E, order_SxB, key) -> (state, mean loss): one epoch, the state donated."""
    losses = {"ce": sasrec.cross_entropy, "bce": sasrec.binary_cross_entropy}

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state, history_ExN, target_E, order_SxB, key):
        def step(state, batch):
            params, optimizer_state = state
            row_B, number = batch
            history_BxN = history_ExN[row_B]
            place_BxM, next_BxM = sasrec.next_items(history_BxN, target_E[row_B], positions)
            next_BxM = jnp.where(row_B[:, None] >= 0, next_BxM, -1)
            value, gradient = jax.value_and_grad(losses[loss], argnums=1)(
                architecture, params, history_BxN, place_BxM, next_BxM, jax.random.fold_in(key, number)
            )
            updates, optimizer_state = transformation.update(gradient, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), value

        state, value_S = jax.lax.scan(step, state, (order_SxB, jnp.arange(len(order_SxB))))
        return state, value_S.mean()

    return scan


def ranking_figures(oracle: Oracle, rows: Rows, title_group_I: np.ndarray) -> dict[str, float]:
    """HR@1 and NDCG@10 on the frozen candidate lists."""
    ranked_ExC = metrics.ranking(oracle.scores(rows.history_ExN, rows.candidates_ExC), rows.candidates_ExC)
    rank_E = metrics.target_rank(ranked_ExC, rows.target_E, title_group_I)
    return {"HR@1": float(metrics.hit_ratio(rank_E, 1).mean()), "NDCG@10": float(metrics.ndcg(rank_E, 10).mean())}


def pair_gaps(oracle: Oracle, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the target and of the sampled candidate in each of the pairs that the candidate lists hold, flat."""
    score_ExC = oracle.scores(rows.history_ExN, rows.candidates_ExC)
    target_ExC = rows.candidates_ExC == rows.target_E[:, None]
    chosen_ExC = np.broadcast_to(np.max(score_ExC, axis=1, where=target_ExC, initial=-np.inf)[:, None], score_ExC.shape)
    return chosen_ExC[~target_ExC], score_ExC[~target_ExC]


def calibration_error(chosen: np.ndarray, rejected: np.ndarray, tau: float) -> float:
    """ECE of the pairwise probabilities: confidence sigma(|gap| / tau) in the item that the oracle prefers.

    Arguments as in `smoothing.fit_temperature`; a tie counts as half right.
    """
    gap = np.asarray(chosen, np.float64) - rejected
    return metrics.calibration_error(special.expit(np.abs(gap) / tau), (np.sign(gap) + 1) / 2, bins=20)
