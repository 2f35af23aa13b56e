"""`evaluate`: floors, oracle, SFT, its control and the aligned model side by side on the same users."""

import functools
import pathlib

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import distributed, files, seeds
from rosepo_jax.data import examples, pairs, store
from rosepo_jax.data.catalogue import Catalogue, load_names
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.layouts import Encoded
from rosepo_jax.data.rows import SPLITS, Rows
from rosepo_jax.decoding import rank
from rosepo_jax.evaluation import predictions, probes, protocols, published, significance, summary
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.stages import oracle, runtime, sft
from rosepo_jax.training import flops, goodput, loop, optimizer, policy, sharding

NAME, INPUTS, RESUMABLE = "evaluate", ("prepare", "oracle", "sft", "pairs", "align"), True
KEYS = ("seed", "data", "model", "evaluate", "sft", "align", "checkpoint.every")

COMPARED = (  # (protocol, metric, models beside "aligned")
    ("candidates", "HR@1", ("sft", "sft_more", "cooccurrence", "oracle")),
    ("candidates", "NDCG@5", ("sft", "sft_more")),
    ("windows", "HR@1", ("sft", "sft_more", "cooccurrence", "oracle")),
    ("catalogue", "HR@5", ("sft", "sft_more")),
    ("catalogue", "popularity_lift", ("sft", "sft_more")),
    ("catalogue", "semantic_error_rate", ("sft", "sft_more")),
    ("candidates", "true_win_rate", ("sft", "sft_more")),  # worlds only
)


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    e, prepared = config.evaluate, inputs["prepare"]
    asked = {name: protocols.rows_of(config, prepared, name) for name in e.protocols}  # mistakes come up at once
    results: dict = {"protocols": {}, "comparisons": [], "probes": {}}
    if e.published:
        results["published"] = published.table(e.published)
    users, catalogue = load_names(prepared)
    known = {"users": len(users), "items": len(catalogue)}
    data = {name: store.read(prepared / "dataset", name, **known) for name in SPLITS}
    mesh = sharding.make_mesh(config.mesh)
    models = {"sft": policy.load(config, inputs["sft"], mesh)}
    if e.sft_more:
        more = out / "sft_more"
        if not (more / "manifest.json").exists():
            policy.hand_on(inputs["sft"], more)
            kept = train_more(config, models["sft"], catalogue, data, inputs, more)
            if distributed.is_primary():
                files.write_json(more / "manifest.json", kept)
            distributed.barrier("control trained")
        models["sft_more"] = policy.load(config, more, mesh)
    models["aligned"] = policy.load(config, inputs["align"], mesh)

    titles = TitleTable(models["sft"].encoder, catalogue.titles)
    embedding_IxD = rank.title_embeddings(models["sft"], titles)
    floors = protocols.floors(config, catalogue, data, inputs["oracle"])
    by_row: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    truth = protocols.Truth.load(prepared)
    for name, rows in asked.items():
        protocol, setting = protocols.PROTOCOLS[name], protocols.Setting(config, catalogue, rows, titles)
        ground = summary.Ground(rows, catalogue, embedding_IxD, e.neighbours, protocol.bound)
        runtime.say(f"evaluate: {name} protocol, {len(rows)} rows")
        answers = protocol.ask(setting, models, floors)
        cells = {}
        by_row[name] = {}
        for model, answer in answers.items():
            cells[model], by_row[name][model] = summary.describe(answer, ground, e.bootstrap, config.seed)
            if distributed.is_primary():
                path = out / "predictions" / f"{name}.{model}.jsonl"
                predictions.write(path, rows, answer, users, catalogue)
        results["protocols"][name] = {
            "hash": setting.hash(name),
            "n": len(rows),
            "split": protocol.split,
            "semantic_space": runtime.identity(inputs["sft"]),
            **setting.facts(name),
            "models": cells,
        }
        if name == "candidates":
            if truth is not None:
                results["truth"], wins = truth.figures(setting, answers, pairs.read(inputs["pairs"] / "pairs.parquet"))
                for model, win_E in wins.items():
                    by_row[name][model]["true_win_rate"] = win_E
            results["probes"] = probes.run(setting, {name: models[name] for name in ("sft", "aligned")})
    results["oracle"] = calibration(inputs["oracle"], data["test"])
    results["defects"] = files.read_json(prepared / "statistics.json")["defects"]
    results["comparisons"] = compare(config, by_row, {name: rows.user_E for name, rows in asked.items()})
    if distributed.is_primary():
        files.write_json(out / "results.json", runtime.plain(results))
    headline = results["protocols"].get("candidates", {"models": {}})["models"]
    return {model: cell["HR@1"]["value"] for model, cell in headline.items()}


def calibration(folder: pathlib.Path, rows: Rows) -> dict:
    """Of the oracle's pairwise probabilities, hence of epsilon, over (target, other candidate) pairs of test rows."""
    scorer = Oracle.load(folder)
    gaps = oracle.pair_gaps(scorer, rows)
    return {
        "tau": scorer.tau,
        "ECE": oracle.calibration_error(*gaps, scorer.tau),
        "ECE_at_tau_1": oracle.calibration_error(*gaps, 1.0),
        "pairs": len(gaps[0]),
    }


def train_more(config, model: policy.Policy, catalogue: Catalogue, data: dict, inputs, out: pathlib.Path) -> dict:
    """The control: SFT goes on, with its own learning rate, for alignment's steps on alignment's rows."""
    clock = goodput.Clock()
    rows = pairs.read(inputs["pairs"] / "pairs.parquet")
    settings = config.sft.copy_and_resolve_references()
    settings.batch_size, settings.accumulate = config.align.batch_size, config.align.accumulate
    settings.validate, settings.patience = config.align.validate, 0
    length = optimizer.steps(config.align.length, "align.length", batch_size=config.align.batch_size, rows=len(rows))

    def encode(index_B: np.ndarray) -> Encoded:
        responses = examples.responses(model.encoder, [[rows.chosen[e]] for e in index_B])
        return Encoded(model.encoder.prompt_ids([rows.prompt[e] for e in index_B]), *responses, {})

    titles = TitleTable(model.encoder, catalogue.titles)
    return loop.train(
        name="sft_more",
        clock=clock,
        config=config,
        settings=settings,
        out=out,
        mesh=model.mesh,
        task=sft.task(model.lm, seeds.key(config.seed, "sft_more", "dropout")),
        trainable=sharding.place(model.mesh, model.trainable),  # SFT's own are still to be evaluated
        frozen=model.base,
        rows=len(rows),
        stream=sft.stream(encode, len(rows), model, settings, seeds.key(config.seed, "align")),
        validate=sft.validation_figures(config, catalogue, titles, data["validation"], model),
        length=length,
        work=functools.partial(flops.of_batch, model.lm, reference=False),
    )


def compare(config: ConfigDict, by_row: dict, user_E: dict[str, np.ndarray]) -> list[dict]:
    """Paired comparisons of the aligned model, with Holm's and Benjamini and Hochberg's adjustment over all of them."""
    found = []
    for protocol, metric, others in COMPARED:
        models = by_row.get(protocol, {})
        for other in others:
            if other in models and metric in models[other] and "aligned" in models:
                test = significance.compare(
                    models["aligned"][metric],
                    models[other][metric],
                    user_E[protocol],
                    config.evaluate.bootstrap,
                    config.seed,
                )
                found.append({"protocol": protocol, "metric": metric, "a": "aligned", "b": other} | test)
    significance.add_adjusted(found)
    return found
