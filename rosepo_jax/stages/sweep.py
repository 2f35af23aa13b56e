"""Many runs of one config with other settings, one after the other; what they share is computed once."""

import argparse
import itertools
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rosepo_jax import configuration, files
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import significance
from rosepo_jax.stages import STAGES, runtime

CHOSEN_BY = "validation HR@1 of the aligned model, over the candidate lists"
FIGURES = {  # key in sweep.json -> heading and format in the table; test figures of the candidates protocol
    "validation_hr1": ("validation HR@1", ".4f"),
    "hr1": ("test HR@1", ".4f"),
    "over_sft": ("minus SFT", "+.4f"),
    "ndcg5": ("test NDCG@5", ".4f"),
    "true_win_rate": ("true win rate", ".4f"),
}
RUN_STAGES = STAGES[:-1]  # a report of one run: rosepo report --workdir=<the run's folder>


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs a config with every combination of settings and prints a table, best first."
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="values of one config key; several --sweep are multiplied. Default: the config's get_sweep()",
    )


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    runs = product(args.sweep) if args.sweep else configuration.get_sweep(args.config)
    if not runs:
        raise UserError(f"{args.config} has no get_sweep(); give --sweep=align.beta=0.1,0.3")
    rows = sweep(config, runs, args.workdir)
    groups = over_seeds(rows)
    found = {"chosen_by": CHOSEN_BY, "runs": rows, "over_seeds": groups}
    files.write_json(args.workdir / "sweep" / "sweep.json", found)
    runtime.say(table(rows) + (f"\n\n{seeds_table(groups)}" if groups else ""))
    return 1 if any(row["error"] for row in rows) else 0


def product(flags: Sequence[str]) -> list[dict[str, str]]:
    """["align.beta=0.1,0.3", "seed=0,1"] -> the four combinations as overrides, the last key changing fastest."""
    axes = []
    for flag in flags:
        key, separator, values = flag.partition("=")
        if not separator or not all(values.split(",")):
            raise UserError(f"--sweep={flag}: write --sweep=KEY=V1,V2")
        axes.append([(key, value) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def run_id(overrides: Mapping[str, Any]) -> str:
    """A readable folder name that is a pure function of the settings, whatever their order."""
    words = (f"{key.rpartition('.')[2]}={value}" for key, value in sorted(overrides.items()))
    readable = re.sub(r"[^\w.=+-]", "-", "_".join(words))[:80]
    return f"{readable}-{files.hash_json(overrides)[:6]}"


def sweep(config: ConfigDict, runs: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Runs every combination below `workdir`/sweep and returns one row a run, best first, failed ones last."""
    planned = {}
    for overrides in runs:
        changed = config.copy_and_resolve_references()
        for key, value in overrides.items():
            configuration.override(changed, key, value)
        before, after = configuration.flatten(config), configuration.flatten(changed)
        swept = {key: after[key] for key in after if key in overrides or after[key] != before[key]}
        planned[run_id(runtime.plain(swept))] = (swept, changed)  # settings that are listed twice run once
    pool = complete_stages(workdir)
    rows = []
    for number, (name, (swept, changed)) in enumerate(planned.items(), 1):
        runtime.say(f"sweep: run {number} of {len(planned)}: {name}")
        folder, error = workdir / "sweep" / name, None
        try:
            for verb in RUN_STAGES:
                runtime.execute(runtime.module(verb), changed, folder, pool)
        except UserError as mistake:
            error = str(mistake)
        except Exception as bug:  # one broken run must not cost the others
            traceback.print_exc(file=sys.stderr)
            error = f"{type(bug).__name__}: {bug}"
        measured = figures(folder) if error is None else dict.fromkeys(FIGURES)
        rows.append({"run": name, "settings": runtime.plain(swept), "error": error, **measured})
    return sorted(rows, key=_rank)


def _rank(row: Mapping[str, Any]) -> tuple:
    chosen_by = row["validation_hr1"]
    return row["error"] is not None, chosen_by is None, -(chosen_by or 0.0), row["run"]


def complete_stages(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """identity -> folder of every complete stage of `workdir` itself and of the runs of its earlier sweeps."""
    manifests = sorted([*workdir.glob(f"*/{runtime.MANIFEST}"), *workdir.glob(f"sweep/*/*/{runtime.MANIFEST}")])
    return {files.read_json(path)["identity"]: path.parent.resolve() for path in manifests}


def figures(folder: pathlib.Path) -> dict[str, float | None]:
    """The figures of a run's table row; None where the run does not measure one."""
    align = files.read_json(folder / "align" / runtime.MANIFEST)["result"]
    results = files.read_json(folder / "evaluate" / "results.json")
    models = results["protocols"].get("candidates", {}).get("models", {})
    aligned, sft = (models.get(model, {}) for model in ("aligned", "sft"))
    hr1, sft_hr1 = _value(aligned, "HR@1"), _value(sft, "HR@1")
    truth = results.get("truth", {})
    return {
        "validation_hr1": _value(align, "HR@1"),
        "hr1": hr1,
        "over_sft": None if hr1 is None or sft_hr1 is None else hr1 - sft_hr1,
        "ndcg5": _value(aligned, "NDCG@5"),
        "true_win_rate": _value(truth.get("models", {}).get("aligned", truth), "true_win_rate"),
    }


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone, together and best first: their settings, seeds, and mean and sd of figures.

    Empty when no seed was swept.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["error"] is None and "seed" in row["settings"]:
            groups.setdefault(files.hash_json(_but_seed(row)), []).append(row)
    found = []
    for group in groups.values():
        measured = {}
        for name in FIGURES:
            values = {row["settings"]["seed"]: row[name] for row in group}
            known = None not in values.values()
            measured[name] = significance.over_seeds(values) if known else None
        seeds = sorted(row["settings"]["seed"] for row in group)
        found.append({"settings": _but_seed(group[0]), "seeds": seeds, **measured})
    return sorted(found, key=lambda row: -row["validation_hr1"]["mean"] if row["validation_hr1"] else 0.0)


def _but_seed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["settings"].items() if key != "seed"}


def seeds_table(groups: Sequence[Mapping[str, Any]]) -> str:
    """`over_seeds` as text: settings, seeds, then mean ± standard deviation of the figures that some group has."""
    shown = [name for name in FIGURES if any(row[name] is not None for row in groups)]
    settings = sorted({key for row in groups for key in row["settings"]})
    lines = [[*settings, "seeds", *(FIGURES[name][0] for name in shown)]]
    for row in groups:
        cells = [_mean_and_sd(row[name], FIGURES[name][1]) for name in shown]
        lines.append([*(str(row["settings"][key]) for key in settings), " ".join(map(str, row["seeds"])), *cells])
    return "\n".join(["mean ± standard deviation over seeds", *_aligned(lines)])


def _mean_and_sd(figure: Mapping[str, Any] | None, format_: str) -> str:
    if figure is None:
        return "-"
    return format(figure["mean"], format_) + ("" if figure["sd"] is None else f" ± {figure['sd']:.4f}")


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines]


def _value(cell: Mapping[str, Any], name: str) -> float | None:
    """A metric that is either a number or {"value": number, ...}."""
    found = cell.get(name)
    return found.get("value") if isinstance(found, Mapping) else found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text: settings, then the figures that some run has."""
    shown = [name for name in FIGURES if any(row[name] is not None for row in rows)]
    settings = sorted({key for row in rows for key in row["settings"]})
    head = [*settings, *(FIGURES[name][0] for name in shown)]
    lines = [head]
    for row in rows:
        numbers = ["-" if row[name] is None else format(row[name], FIGURES[name][1]) for name in shown]
        lines.append([*(str(row["settings"].get(key, "")) for key in settings), *numbers])
    failed = [f"{row['run']}: failed: {row['error']}" for row in rows if row["error"] is not None]
    return "\n".join([f"best first by {CHOSEN_BY}", *_aligned(lines), *failed])
