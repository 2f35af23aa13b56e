"""`align`: preference optimisation. Policy, frozen reference and oracle run in one jitted step."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import distributed, files, seeds
from rosepo_jax.data import batches, examples, pairs, store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.layouts import Encoded
from rosepo_jax.data.pairs import Pairs
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.models import sasrec
from rosepo_jax.preference import objectives, smoothing
from rosepo_jax.preference.logprobs import batch_logps
from rosepo_jax.preference.objectives import Objective
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.preference.smoothing import Smoothing
from rosepo_jax.stages import sft
from rosepo_jax.training import flops, goodput, loop, policy, sharding
from rosepo_jax.training.step import Task

NAME, INPUTS, RESUMABLE = "align", ("prepare", "oracle", "sft", "pairs"), True
KEYS = ("seed", "data", "model", "align", "checkpoint.every")


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    clock, a = goodput.Clock(), config.align
    catalogue = Catalogue.load(inputs["prepare"] / "catalogue.jsonl")
    validation = store.read(inputs["prepare"] / "dataset", "validation", items=len(catalogue))
    rows = pairs.read(inputs["pairs"] / "pairs.parquet")
    objective = objectives.objective(a)
    oracle = Oracle.load(inputs["oracle"])
    factor = Smoothing(
        objectives.smoothing_mode(a), a.smoothing.temperature or oracle.tau, a.smoothing.cap, a.smoothing.value
    )
    check_sources(a, factor, rows)

    mesh = sharding.make_mesh(config.mesh)
    policy.hand_on(inputs["sft"], out)
    model = policy.load(config, inputs["sft"], mesh)
    titles = TitleTable(model.encoder, catalogue.titles)
    cached = None
    if a.reference == "cached":
        cached = cached_reference(config, model, rows, inputs, out)
    frozen = {
        "base": model.base,
        # A real copy: the policy's buffers are donated every step, the reference's never.
        "reference": {} if cached is not None else sharding.place(mesh, model.trainable),
        "oracle": jax.device_put(oracle.params, sharding.replicated(mesh)),
    }
    return loop.train(
        name=NAME,
        clock=clock,
        config=config,
        settings=a,
        out=out,
        mesh=mesh,
        task=task(model.lm, objective, factor, oracle.config, a.smoothing.source, seeds.key(config.seed, NAME)),
        trainable=model.trainable,
        frozen=frozen,
        rows=len(rows),
        stream=sft.stream(
            functools.partial(encode, model, rows, cached), len(rows), model, a, seeds.key(config.seed, NAME)
        ),
        validate=sft.validation_figures(config, catalogue, titles, validation, model),
        work=functools.partial(flops.of_batch, model.lm, reference=objective.needs_reference and cached is None),
        first=functools.partial(check_start, objective, rows.item_ExR.shape[1] - 1, config.model.dtype),
    )


def check_sources(a: ConfigDict, factor: Smoothing, rows: Pairs) -> None:
    """Refuses smoothing that the pairs cannot feed."""
    if a.smoothing.source not in ("in_step", "stored"):
        raise UserError(f"align.smoothing.source={a.smoothing.source!r}: choose in_step or stored")
    if a.reference not in ("in_step", "cached"):
        raise UserError(f"align.reference={a.reference!r}: choose in_step or cached")
    if factor.needs_oracle and a.smoothing.source == "in_step" and not rows.has_items:
        raise UserError(
            "align.smoothing.source=in_step: the pairs name no catalogue items for the oracle to score; "
            "use align.smoothing.source=stored with an epsilon column, or align.smoothing.mode=fixed or none"
        )
    if factor.needs_oracle and a.smoothing.source == "stored" and not rows.has_epsilon:
        raise UserError("align.smoothing.source=stored: the pairs have no epsilon column; use mode fixed or none")


def encode(model: policy.Policy, rows: Pairs, cached_ExR: np.ndarray | None, index_B: np.ndarray) -> Encoded:
    """Prompts with R = 1 + K responses, and what the oracle needs to know of them."""
    known = {
        "history_BxN": rows.history_ExN[index_B],
        "item_BxR": rows.item_ExR[index_B],
        "epsilon_BxK": np.nan_to_num(rows.epsilon_ExK[index_B]),
    }
    if cached_ExR is not None:
        known["reference_BxR"] = cached_ExR[index_B]
    responses = examples.responses(model.encoder, [[rows.chosen[e], *rows.rejected[e]] for e in index_B])
    return Encoded(model.encoder.prompt_ids([rows.prompt[e] for e in index_B]), *responses, known)


def task(lm, objective: Objective, factor: Smoothing, oracle_config, source: str, seed: int) -> Task:
    """The preference loss as the training step sees it."""

    def forward(trainable, frozen, batch):
        return batch_logps(lm, {**frozen["base"], **trainable}, batch)

    def constants(frozen, batch):
        if "reference_BxR" in batch:
            reference_BxR = batch["reference_BxR"]
        else:
            reference_BxR = forward(frozen["reference"], frozen, batch)
        epsilon_BxK = batch["epsilon_BxK"]
        if factor.needs_oracle and source == "in_step":
            score_BxR = sasrec.item_scores(oracle_config, frozen["oracle"], batch["history_BxN"], batch["item_BxR"])
            epsilon_BxK = smoothing.pair_epsilon(factor, score_BxR)
        return reference_BxR, epsilon_BxK

    def loss(logps_BxR, constants, batch):
        reference_BxR, epsilon_BxK = constants
        real_B = jnp.ones(logps_BxR.shape[0], bool)
        # Its number names the batch: a different permutation every step, the same after a restart.
        epsilon = smoothing.epsilon(factor, objective.aggregator, epsilon_BxK, real_B, seed, batch["update_B"][0])
        return objectives.preference_loss(objective, logps_BxR, reference_BxR, batch["count_BxR"], epsilon, real_B)

    return Task(forward, constants, loss, coupled=objective.reducer != "mean")


def check_start(objective: Objective, rejected: int, dtype: str, metrics: dict[str, float]) -> None:
    """At the first update policy and reference are the same: margins are 0 and the loss has a closed form.

    The margin is exactly 0 where both forwards are compiled alike; rematerialisation, micro-batches and cached
    reference log-probs leave rounding, which a wrong reference exceeds by orders of magnitude.
    """
    if not objective.needs_reference:
        return
    tolerance = 1e-5 if dtype == "float32" else 0.05
    if abs(metrics["rewards/margins"]) > tolerance:
        raise UserError(
            f"align: at the first update policy and reference differ (reward margin {metrics['rewards/margins']:.3g}, "
            "expected 0): the reference is not the model that alignment starts from"
        )
    if objective.link not in ("logistic", "robust"):
        return
    expected = math.log(2)
    if objective.aggregator == "lse":
        expected = math.log(1 + rejected) - metrics["epsilon/mean"] * math.log(rejected)
    if abs(metrics["loss"] - expected) > tolerance:
        raise UserError(f"align: the first loss is {metrics['loss']:.7f}, expected {expected:.7f}: not at its start")


def cached_reference(config, model: policy.Policy, rows: Pairs, inputs, out: pathlib.Path) -> np.ndarray:
    """Reference log-probs [E, R] of all pairs, kept on disk under a key of everything they depend on.

    A sample is recomputed whenever they are read, so that a stale cache is refused.
    """
    key = files.hash_json(
        [files.hash_tree(inputs["sft"] / "model"), files.hash_tree(inputs["pairs"] / "pairs.parquet"),
         model.encoder.identity, config.model.dtype]
    )  # fmt: skip
    path = out / f"reference-{key}.npy"
    size = config.align.batch_size

    def compute(index: np.ndarray) -> np.ndarray:
        responses = examples.responses(model.encoder, [[rows.chosen[e], *rows.rejected[e]] for e in index])
        return rank.logps(model, model.params, [rows.prompt[e] for e in index], *responses)

    if not path.exists():
        values = np.zeros(rows.item_ExR.shape, np.float32)
        for block, real in batches.blocks(len(rows), size):
            values[block[real]] = compute(block)[real]
        if distributed.is_primary():
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, values, allow_pickle=False)
            path.with_suffix(".part").replace(path)
        distributed.barrier("reference cached")
    values = files.read_npy(path)
    if values.shape != rows.item_ExR.shape or values.dtype != np.float32:
        raise UserError(f"{path}: not the log-probs of these pairs; remove the file")
    sample = next(iter(batches.blocks(len(rows), size)))[0]
    worst = float(np.abs(values[sample] - compute(sample)).max())
    if not worst < (1e-4 if config.model.dtype == "float32" else 0.5):
        raise UserError(f"{path}: cached reference log-probs are off by {worst:.3g}; remove the file")
    return values
