"""`report RUN RUN ...`: runs side by side, those that differ in their seed together."""

import argparse
import math
import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from rosepo_jax import configuration, files, forms
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import comparison, report

MANIFEST = "manifest.json"
MADE = {"resolved_config": {"seed": int, "evaluate?": {"bootstrap?": int}}}  # of manifest.json
ANSWERED = {"row": int, "user": str, "position": int, "target": str, "ranked": [(None, str)]}
MOST_RESAMPLES = 1_000_000
AGAIN = "run `rosepo evaluate` again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compares evaluated runs: one table, tests between them, comparison.html and comparison.json."
    parser.add_argument("runs", nargs="+", metavar="RUN", type=pathlib.Path, help="folders of runs (or of a sweep's)")
    parser.add_argument("--output", metavar="DIR", type=pathlib.Path, help="default: comparison, beside the runs")
    parser.add_argument("--protocols", default="", metavar="P,P", help="only these; default: all that the runs have")


def main(config: ConfigDict | None, args: argparse.Namespace) -> int:
    """Writes comparison.html and comparison.json and prints the table."""
    folders = list({folder.resolve(): folder for folder in args.runs}.values())
    if len(folders) < 2:
        raise UserError(f"give at least two runs; the report of one: rosepo report --workdir={folders[0]}")
    wanted = [name for name in args.protocols.split(",") if name]
    found = comparison.compare(read(folders), wanted)
    output = args.output or pathlib.Path(os.path.commonpath([f.resolve().parent for f in folders])) / "comparison"
    files.write_text(output / "comparison.html", comparison.html(found))
    files.write_json(output / "comparison.json", found)
    print(f"{comparison.text(found)}\n\n{output / 'comparison.html'}", flush=True)
    return 0


def read(folders: Sequence[pathlib.Path]) -> list[comparison.Run]:
    """The runs, named by as much of their paths as tells them apart.

    Errors: UserError for a folder in which `evaluate` is not complete.
    """
    names = [os.path.relpath(f.resolve(), os.path.commonpath([f.resolve().parent for f in folders])) for f in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: pathlib.Path, name: str) -> comparison.Run:
    evaluated = folder / "evaluate"
    if not (evaluated / MANIFEST).is_file():
        raise UserError(f"{folder}: no complete evaluation there; run `rosepo run --workdir={folder}` first")
    made = forms.check(files.read_json(evaluated / MANIFEST), MADE, evaluated / MANIFEST, AGAIN)
    settings = configuration.flatten(made["resolved_config"])
    seed = settings.pop("seed")
    if not 0 < settings.get("evaluate.bootstrap", 1) <= MOST_RESAMPLES:
        raise UserError(f"{evaluated / MANIFEST}: evaluate.bootstrap must be 1 to {MOST_RESAMPLES:,}; {AGAIN}")
    results = report.read(evaluated / "results.json")
    report.check(results)
    return comparison.Run(name, seed, settings, results, _ranks(folder))


def _ranks(folder: pathlib.Path) -> dict[tuple[str, str], dict[comparison.Row, float]]:
    """Of every prediction file of the models that are compared; without a catalogue, titles cannot be told apart."""
    listed = folder / "prepare" / "catalogue.jsonl"
    paths = sorted((folder / "evaluate" / "predictions").glob("*.jsonl")) if listed.is_file() else []
    if not paths:
        return {}
    catalogue = Catalogue.load(listed)
    group = dict(zip(catalogue.ids, catalogue.title_group_I.tolist(), strict=True))
    ranks = {}
    for path in paths:
        protocol, _, model = path.stem.partition(".")
        if model in comparison.BETWEEN and protocol in comparison.TESTED:
            rows = [forms.check(row, ANSWERED, path, AGAIN) for row in files.read_jsonl(path)]
            ranks[protocol, model] = {
                (row["row"], row["user"], row["position"], row["target"]): _rank(row, group, path) for row in rows
            }
    return ranks


def _rank(row: dict, group: dict[str, int], path: pathlib.Path) -> float:
    """The place of the first answer that has the target's title."""
    if row["target"] not in group:
        raise UserError(f"{path}: target {row['target']!r} is not in the catalogue of that run; {AGAIN}")
    places = (place for place, item in enumerate(row["ranked"], 1) if group.get(item, -1) == group[row["target"]])
    return next(places, math.inf)
