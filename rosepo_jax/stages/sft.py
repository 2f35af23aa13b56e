"""`sft`: supervised fine-tuning on interaction histories; its result is the reference model of all that follows."""

import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import seeds
from rosepo_jax.data import batches, examples, store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.layouts import Encoded
from rosepo_jax.data.rows import Rows
from rosepo_jax.data.store import Source
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import metrics
from rosepo_jax.preference.logprobs import batch_logps
from rosepo_jax.training import flops, goodput, loop, policy, sharding
from rosepo_jax.training.step import Task

NAME, INPUTS, RESUMABLE = "sft", ("prepare",), True
KEYS = ("seed", "data", "model", "sft", "checkpoint.every")


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    clock = goodput.Clock()
    catalogue = Catalogue.load(inputs["prepare"] / "catalogue.jsonl")
    rows = store.source(inputs["prepare"] / "dataset", "train", items=len(catalogue))
    validation = store.read(inputs["prepare"] / "dataset", "validation", items=len(catalogue))
    if not len(rows):
        raise UserError("sft: the train split has no rows; lower data.min_history or data.core_user, data.core_item")
    model = policy.create(config, out, sharding.make_mesh(config.mesh), tokenizer_texts(catalogue))
    titles = TitleTable(model.encoder, catalogue.titles)
    encode = functools.partial(encode_rows, model, catalogue, titles, rows)
    figures = loop.train(
        name=NAME,
        clock=clock,
        config=config,
        settings=config.sft,
        out=out,
        mesh=model.mesh,
        task=task(model.lm, seeds.key(config.seed, NAME, "dropout")),
        trainable=model.trainable,
        frozen=model.base,
        rows=len(rows),
        stream=stream(encode, len(rows), model, config.sft, seeds.key(config.seed, NAME)),
        validate=validation_figures(config, catalogue, titles, validation, model),
        work=functools.partial(flops.of_batch, model.lm, reference=False),
    )
    return figures | {"base": policy.describe(out)["base"]}


def tokenizer_texts(catalogue: Catalogue) -> Iterator[str]:
    """Titles as often as they occur in the training histories, and at least once."""
    for title, count in zip(catalogue.titles, catalogue.count_I):
        yield from [title] * max(int(count), 1)


def stream(encode, rows: int, model: policy.Policy, settings: ConfigDict, seed: int):
    """(start=, stop=) -> this host's batches of those updates, of rows that `encode` tokenises."""
    return functools.partial(
        batches.stream,
        encode,
        rows,
        seed=seed,
        batch_size=settings.batch_size,
        shares=sharding.shares(model.mesh),
        of=sharding.ways(model.mesh),
        accumulate=settings.accumulate,
        prompt_length=model.encoder.prompt_length,
        pad_id=model.encoder.pad,
    )


def nll(logps_BxR, constants, batch):
    """Mean negative log-likelihood of a completion token, over the whole batch."""
    loss = -logps_BxR.sum() / batch["count_BxR"].sum()
    return loss, {"loss": loss}


def task(lm, dropout_seed: int = 0) -> Task:
    """The language-model loss as the training step sees it; adapters drop inputs by (seed, update, row)."""

    def drop_keys(batch):
        if lm.lora is None or not lm.lora.dropout:
            return None
        start = jax.random.key(dropout_seed >> 33)
        return jax.vmap(lambda update, row: jax.random.fold_in(jax.random.fold_in(start, update), row))(
            batch["update_B"], batch["row_B"]
        )

    def forward(trainable, frozen, batch):
        return batch_logps(lm, {**frozen, **trainable}, batch, drop_keys(batch))

    return Task(forward, lambda frozen, batch: jnp.zeros((batch["row_B"].shape[0],)), nll)


def encode_rows(
    model: policy.Policy, catalogue: Catalogue, titles: TitleTable, rows: Source, index_B: np.ndarray
) -> Encoded:
    """Prompt and true title of some rows: R = 1."""
    some = rows.take(index_B)
    texts = examples.prompt_texts(model.encoder, catalogue, some.history_ExN, some.candidates_ExC)
    return Encoded(model.encoder.prompt_ids(texts), *titles.take(some.target_E[:, None]), {})


def validation_figures(config, catalogue, titles, validation: Rows, model: policy.Policy):
    """HR@1 and NDCG@5 on the frozen candidate lists of the validation rows."""

    def validate(trainable) -> dict[str, float]:
        scores_ExC = rank.item_scores(
            model, {**model.base, **trainable}, catalogue, titles, validation, validation.candidates_ExC,
            config.evaluate.batch_size,
        )  # fmt: skip
        ranked_ExC = metrics.ranking(scores_ExC, validation.candidates_ExC)
        rank_E = metrics.target_rank(ranked_ExC, validation.target_E, catalogue.title_group_I)
        return {"HR@1": float(metrics.hit_ratio(rank_E, 1).mean()), "NDCG@5": float(metrics.ndcg(rank_E, 5).mean())}

    return validate
