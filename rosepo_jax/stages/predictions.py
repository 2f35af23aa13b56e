"""`evaluate --predictions=FILE`: the answers of any system under a run's own frozen protocol.

It needs a complete `prepare`. Where there are more stages, the SFT model gives the title vectors of semantic metrics,
and `evaluate` the models to compare with. Artefacts in <workdir>/others/NAME: <protocol>.results.json, of the form of
`evaluate`'s, and <protocol>.predictions.jsonl, the answers in the form of ours. A report that is there is made anew.

Nothing is taken out of the answers: where our models may not answer items of the history (`catalogue`), others' are
wrong there, and counted as `history_copy`.
"""

import argparse
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import distributed, files
from rosepo_jax.data.catalogue import Catalogue, load_names
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import predictions, significance

PROTOCOLS = ("candidates", "windows", "catalogue", "generate")
COMPARED = ("HR@1", "NDCG@5")
COMPARED_WITH = ("aligned", "sft")
MANIFEST = "manifest.json"
SHOWN = ("HR@1", "HR@5", "NDCG@5", "MRR", "valid_ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Scores a file of answers (JSON lines; the form: rosepo_jax/evaluation/predictions.py)."
    parser.add_argument("--predictions", type=pathlib.Path, required=True, metavar="FILE")
    parser.add_argument("--name", help="of the system, in results; default: the name of the file")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: the first of these that fits the answers")


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    from rosepo_jax.evaluation import protocols, report, summary  # they import jax, which --help need not wait for
    from rosepo_jax.stages import runtime

    prepared, evaluated, e = args.workdir / "prepare", args.workdir / "evaluate", config.evaluate
    stem = pathlib.Path(args.predictions.name.removesuffix(".gz")).stem
    name = predictions.plain_name(stem if args.name is None else args.name, "--name")
    if name in report.MODELS:
        raise UserError(f"--name={name}: a model of the run is called so; choose another")
    if not (prepared / MANIFEST).is_file():
        raise UserError(f"{prepared}: not complete; run `rosepo prepare --workdir={args.workdir}` first")
    users, catalogue = load_names(prepared)

    protocol = args.protocol
    if protocol is None:
        listed = protocols.rows_of(config, prepared, "candidates", len(users), len(catalogue))
        protocol, reason = choose(args.predictions, listed, users, catalogue)
        runtime.say(f"{protocol} protocol: {reason} (--protocol chooses another)")
    rows = protocols.rows_of(config, prepared, protocol, len(users), len(catalogue))
    rules = protocols.PROTOCOLS[protocol]
    depth = rows.candidates_ExC.shape[1] if rules.bound else e.top
    answers = predictions.read(args.predictions, rows, users, catalogue, depth)

    embedding_IxD = title_vectors(config, args.workdir / "sft", catalogue)
    if embedding_IxD is None:
        runtime.say(f"no semantic metrics: they need the title vectors of `rosepo sft --workdir={args.workdir}`")
    ground = summary.Ground(rows, catalogue, embedding_IxD, e.neighbours, rules.bound)
    cells, by_row = summary.describe(answers, ground, e.bootstrap, config.seed)
    hash = protocols.Setting(config, catalogue, rows).hash(protocol)
    ours = same_rows(evaluated, protocol, hash)
    paths = {model: evaluated / "predictions" / f"{protocol}.{model}.jsonl" for model in COMPARED_WITH if model in ours}
    others = {
        model: summary.by_row(predictions.read(path, rows, users, catalogue, depth), ground)
        for model, path in paths.items()
        if path.is_file()
    }
    found = {
        "hash": hash,
        "n": len(rows),
        "split": rules.split,
        "semantic_space": None if embedding_IxD is None else runtime.identity(args.workdir / "sft"),
        "models": {name: cells},
    }
    results = {"protocols": {protocol: found}, "comparisons": compare(config, protocol, rows, name, by_row, others)}
    folder = args.workdir / "others" / name
    if distributed.is_primary():
        predictions.write(folder / f"{protocol}.predictions.jsonl", rows, answers, users, catalogue)
        files.write_json(folder / f"{protocol}.results.json", runtime.plain(results))
    runtime.say(f"{table({**ours, name: cells})}\n\n{folder / f'{protocol}.results.json'}")
    if (args.workdir / "report" / MANIFEST).is_file():  # it shows other systems too, and is no longer up to date
        if distributed.is_primary():
            shutil.rmtree(args.workdir / "report")
        runtime.execute(runtime.module("report"), config, args.workdir)
    return 0


def choose(path: pathlib.Path, rows: Rows, users: Sequence[str], catalogue: Catalogue) -> tuple[str, str]:
    """(protocol, why) for a file of answers; rows: those of `candidates`."""
    if predictions.kind(path) == "text":
        return "generate", "the answers are texts"
    answers = predictions.read(path, rows, users, catalogue)
    if predictions.only_candidates(answers, rows, catalogue):
        return "candidates", "every item is a candidate of its row"
    return "catalogue", "not every item is a candidate of its row"


def title_vectors(config: ConfigDict, folder: pathlib.Path, catalogue: Catalogue) -> np.ndarray | None:
    """embedding_IxD of the titles by the SFT model in `folder`; None when there is none."""
    from rosepo_jax.data.examples import TitleTable
    from rosepo_jax.decoding import rank
    from rosepo_jax.training import policy, sharding

    if not (folder / MANIFEST).is_file():
        return None
    model = policy.load(config, folder, sharding.make_mesh(config.mesh))
    return rank.title_embeddings(model, TitleTable(model.encoder, catalogue.titles))


def same_rows(folder: pathlib.Path, protocol: str, hash: str) -> dict[str, dict]:
    """What `evaluate` found for the models of the run, if it asked them exactly the same."""
    from rosepo_jax.evaluation import report

    if not (folder / MANIFEST).is_file():
        return {}
    asked = report.read(folder / "results.json")["protocols"].get(protocol, {})
    return asked["models"] if asked.get("hash") == hash else {}


def compare(
    config: ConfigDict,
    protocol: str,
    rows: Rows,
    name: str,
    by_row: Mapping[str, np.ndarray],
    others: Mapping[str, Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """Paired comparisons with the run's models, with the adjustments of `evaluate` over all of them."""
    found = [
        {"protocol": protocol, "metric": metric, "a": name, "b": model}
        | significance.compare(by_row[metric], values[metric], rows.user_E, config.evaluate.bootstrap, config.seed)
        for metric in COMPARED
        for model, values in others.items()
        if metric in by_row and metric in values
    ]
    significance.add_adjusted(found)
    return found


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics SHOWN of every model as aligned lines."""
    lines = [["", *SHOWN]]
    for model, cells in models.items():
        values = [cells.get(metric, {}).get("value") for metric in SHOWN]
        lines.append([model, *("" if value is None else f"{value:.4f}" for value in values)])
    width = max(len(line[0]) for line in lines)
    return "\n".join((line[0].ljust(width) + "".join(f"{text:>13}" for text in line[1:])).rstrip() for line in lines)
