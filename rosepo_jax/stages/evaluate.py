"""`evaluate`: floors, oracle, SFT, its control and the aligned model side by side on the same users."""

import functools
import pathlib

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import files, seeds
from rosepo_jax.data import batches, examples, pairs, store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.rows import SPLITS, Rows
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import protocols, significance
from rosepo_jax.evaluation.protocols import Answers
from rosepo_jax.stages import runtime, sft
from rosepo_jax.training import loop, optimizer, policy, sharding

NAME, INPUTS, RESUMABLE = "evaluate", ("prepare", "oracle", "sft", "pairs", "align"), True
KEYS = ("seed", "data", "model", "evaluate", "sft", "align", "checkpoint.every")

COMPARED = (  # (protocol, metric, models beside "aligned")
    ("candidates", "HR@1", ("sft", "sft_more", "cooccurrence", "oracle")),
    ("candidates", "NDCG@5", ("sft", "sft_more")),
    ("catalogue", "HR@5", ("sft", "sft_more")),
    ("catalogue", "popularity_lift", ("sft", "sft_more")),
    ("catalogue", "semantic_error_rate", ("sft", "sft_more")),
    ("candidates", "true_win_rate", ("sft", "sft_more")),  # worlds only
)


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    e = config.evaluate
    if unknown := set(e.protocols) - set(protocols.PROTOCOLS):
        raise UserError(f"evaluate.protocols: unknown {sorted(unknown)}; choose from {', '.join(protocols.PROTOCOLS)}")
    catalogue = Catalogue.load(inputs["prepare"] / "catalogue.jsonl")
    data = {name: store.read(inputs["prepare"] / "dataset", name) for name in SPLITS}
    if not len(data["test"]):
        raise UserError("evaluate: the test split has no rows; lower data.min_history or data.core_user")
    mesh = sharding.make_mesh(config.mesh)
    models = {"sft": policy.load(config, inputs["sft"], mesh)}
    if e.sft_more:
        more = out / "sft_more"
        if not (more / "manifest.json").exists():
            policy.hand_on(inputs["sft"], more)
            files.write_json(more / "manifest.json", train_more(config, models["sft"], catalogue, data, inputs, more))
        models["sft_more"] = policy.load(config, more, mesh)
    models["aligned"] = policy.load(config, inputs["align"], mesh)

    titles = TitleTable(models["sft"].encoder, catalogue.titles)
    embedding_IxD = rank.title_embeddings(models["sft"], titles)
    floors = protocols.floors(config, catalogue, data, inputs["oracle"])
    results: dict = {"protocols": {}, "comparisons": []}
    by_row: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    truth = protocols.Truth.load(inputs["prepare"])
    for name in e.protocols:
        rows = some(data["test"], e.max_generate, config.seed) if name == "generate" else data["test"]
        setting = protocols.Setting(config, catalogue, titles, rows, inputs["prepare"])
        runtime.say(f"evaluate: {name} protocol, {len(setting.rows)} rows")
        answers: dict[str, Answers] = protocols.PROTOCOLS[name](setting, models, floors)
        cells, by_row[name] = protocols.summarise(setting, answers, embedding_IxD)
        results["protocols"][name] = {"hash": setting.hash(name), "n": len(setting.rows), "models": cells}
        for model, answer in answers.items():
            path = out / "predictions" / f"{name}.{model}.jsonl"
            files.write_jsonl(path, protocols.predictions(setting, answer))
        if name == "candidates" and truth is not None:
            rows_of_pairs = pairs.read(inputs["pairs"] / "pairs.parquet")
            results["truth"], wins = truth.figures(setting, answers, rows_of_pairs)
            for model, win_E in wins.items():
                by_row[name][model]["true_win_rate"] = win_E
    results["comparisons"] = compare(config, by_row, data["test"].user_E)
    files.write_json(out / "results.json", runtime.plain(results))
    headline = results["protocols"].get("candidates", {"models": {}})["models"]
    return {model: cell["HR@1"]["value"] for model, cell in headline.items()}


def some(rows: Rows, limit: int, seed: int) -> Rows:
    """At most `limit` rows (0 = all), chosen by hash."""
    luck_E = seeds.uniform(seeds.key(seed, "generate"), rows.user_E, rows.position_E)
    return rows.take(np.sort(np.argsort(luck_E, kind="stable")[: limit or len(rows)]))


def train_more(config, model: policy.Policy, catalogue: Catalogue, data: dict, inputs, out: pathlib.Path) -> dict:
    """The control: SFT goes on, with its own learning rate, for alignment's steps on alignment's rows."""
    rows = pairs.read(inputs["pairs"] / "pairs.parquet")
    settings = config.sft.copy_and_resolve_references()
    settings.batch_size, settings.accumulate = config.align.batch_size, config.align.accumulate
    settings.validate, settings.patience = config.align.validate, 0
    length = optimizer.steps(config.align.length, "align.length", batch_size=config.align.batch_size, rows=len(rows))

    def encode(index_B: np.ndarray) -> dict:
        batch = examples.prompts(model.encoder, [rows.prompt[e] for e in index_B])
        batch |= examples.responses(model.encoder, [[rows.chosen[e]] for e in index_B])
        return batch | {"row_B": index_B.astype(np.int32)}

    titles = TitleTable(model.encoder, catalogue.titles)
    return loop.train(
        name="sft_more",
        config=config,
        settings=settings,
        out=out,
        mesh=model.mesh,
        task=sft.task(model.lm, seeds.key(config.seed, "sft_more", "dropout")),
        trainable=sharding.place(model.mesh, model.trainable),  # SFT's own are still to be evaluated
        frozen=model.base,
        rows=len(rows),
        stream=functools.partial(
            batches.stream, encode, len(rows), seed=seeds.key(config.seed, "align"), batch_size=settings.batch_size
        ),
        validate=sft.validation_figures(config, catalogue, titles, data["validation"], model),
        length=length,
    )


def compare(config, by_row: dict, user_E: np.ndarray) -> list[dict]:
    """Paired comparisons of the aligned model, with Holm's adjustment over all of them."""
    found = []
    for protocol, metric, others in COMPARED:
        models = by_row.get(protocol, {})
        for other in others:
            if other in models and metric in models[other] and "aligned" in models:
                test = significance.compare(
                    models["aligned"][metric], models[other][metric], user_E, config.evaluate.bootstrap, config.seed
                )
                found.append({"protocol": protocol, "metric": metric, "a": "aligned", "b": other} | test)
    tested = [row for row in found if row["p"] is not None]
    for row, adjusted in zip(tested, significance.holm([row["p"] for row in tested])):
        row["p_holm"] = adjusted
    return found
