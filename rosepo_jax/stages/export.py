"""rosepo export: what a run made, for other tools.

A checkpoint as a Hugging Face directory, adapters merged, or its adapter for PEFT, with a model card; the rows that
models are asked about, for any system or for RecBole; rankings in the format of TREC.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import distributed, files, forms
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import load_names
from rosepo_jax.data.prompts import Template
from rosepo_jax.data.rows import Rows
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import predictions, protocols, report
from rosepo_jax.models import checkpoints_hf, hub, peft
from rosepo_jax.models import lora as adapters
from rosepo_jax.stages import runtime
from rosepo_jax.training import policy, sharding

MODELS = {"align": "aligned", "sft": "sft"}  # stage -> the name of its model in results.json
# What the model card says of a manifest.json
MADE = {
    "identity": str, "code": str, "python": str, "packages": {str: str}, "device": {"kind": str},
    "resolved_config": {
        "data": {
            **dict.fromkeys(("source", "split", "template", "path?", "titles?"), str),
            **dict.fromkeys(("core_user", "core_item", "history"), int),
        },
        "align": {"objective": str}, "pairs?": {"path?": str},
        "model": {"chat_template": bool, "path?": str, "architecture?": str, "adapter?": str},
    },
}  # fmt: skip
PREPARED = {"identity": str, "inputs": {"data.path?": str}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "\n".join(
        ["Writes a directory that other tools read. --format is", *(f"  {n:9}{f.help}" for n, f in FORMATS.items())]
    )
    parser.add_argument("--checkpoint", choices=tuple(MODELS), default="align", help="merged, adapter; default: align")
    parser.add_argument("--format", choices=tuple(FORMATS), default="merged", help="default: merged")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a directory that does not exist yet")


def main(config: ConfigDict | None, args: argparse.Namespace) -> None:
    if config is None:
        raise UserError("give the run to export: --workdir=DIR")
    chosen = FORMATS[args.format]
    stage = chosen.stage or args.checkpoint
    folder = args.workdir / stage
    if not (folder / runtime.MANIFEST).exists():
        raise UserError(f"{folder}: not complete; run `rosepo {stage} --workdir={args.workdir}`")
    runtime.say(f"{args.output}: {chosen.write(config, folder, args.output)}")


def merged(config: ConfigDict, folder: pathlib.Path, output: pathlib.Path) -> str:
    """The whole model, adapter folded in, a quantised base restored."""
    model = policy.load(config, folder, sharding.make_mesh(config.mesh))
    params = adapters.merge(model.params, model.lm.lora, model.lm.quantize)
    if distributed.is_primary():
        checkpoints_hf.write(
            output, model.lm.config, params, folder / "tokenizer", config.model.param_dtype,
            readme=card(folder.parent, folder.name), eos=model.encoder.eos,
        )  # fmt: skip
    return f"{sum(value.size for value in params.values()):,} parameters"


def adapter(config: ConfigDict, folder: pathlib.Path, output: pathlib.Path) -> str:
    """The adapter alone, for PEFT on top of the base that the run started from."""
    base = policy.describe(folder)["base"]
    model = policy.load(config, folder, sharding.make_mesh(config.mesh))
    if model.lm.lora is None:
        raise UserError("--format=adapter: the run tuned the whole model (model.tuning=full); use --format=merged")
    if "path" not in base:
        raise UserError("--format=adapter: the base was a new model, which nobody else has; use --format=merged")
    if distributed.is_primary():
        peft.write(
            output, model.lm.config, model.lm.lora, model.trainable,
            base=base["path"], revision=base["revision"], readme=card(folder.parent, folder.name),
        )  # fmt: skip
    return f"{sum(value.size for value in model.trainable.values()):,} parameters"


def rows(config: ConfigDict, prepared: pathlib.Path, output: pathlib.Path) -> str:
    """rows.jsonl, the test rows; windows.jsonl, and generate.jsonl where that protocol asks about fewer."""
    users, catalogue = load_names(prepared)

    def rows_of(protocol: str) -> Rows:
        return protocols.rows_of(config, prepared, protocol, len(users), len(catalogue))

    asked = {"rows": rows_of("candidates")}
    if len(store.source(prepared / "dataset", "windows")):
        asked["windows"] = rows_of("windows")
    if 0 < config.evaluate.max_generate < len(asked["rows"]):
        asked["generate"] = rows_of("generate")

    def fill(directory: pathlib.Path) -> None:
        for name, found in asked.items():
            files.write_jsonl(directory / f"{name}.jsonl", predictions.questions(found, users, catalogue))

    if distributed.is_primary():
        checkpoints_hf.new_directory(output, fill)
    return ", ".join(f"{len(found):,} in {name}.jsonl" for name, found in asked.items())


def recbole(config: ConfigDict, prepared: pathlib.Path, output: pathlib.Path) -> str:
    """The data set, called as its directory is; held-out rows are training rows."""
    name = predictions.plain_name(output.resolve().name, "--output")
    users, catalogue = load_names(prepared)
    data = {
        split: store.read(prepared / "dataset", split, users=len(users), items=len(catalogue))
        for split in ("train", "held_out", "validation", "test")
    }
    train = Rows(*(np.concatenate(both) for both in zip(*(vars(data[s]).values() for s in ("train", "held_out")))))
    splits = {"train": train, "valid": data["validation"], "test": data["test"]}
    if any((found.history_ExN[:, 0] < 0).any() for found in splits.values()):
        raise UserError("--format=recbole: its models cannot start from an empty history; set data.min_history=1")
    if distributed.is_primary():
        checkpoints_hf.new_directory(
            output, lambda directory: predictions.recbole(directory, name, splits, users, catalogue)
        )
    return ", ".join(f"{len(found):,} {split} rows" for split, found in splits.items())


def trec(config: ConfigDict, evaluated: pathlib.Path, output: pathlib.Path) -> str:
    """<protocol>.qrels, and <protocol>.<model>.run of every prediction file of `evaluate`."""
    prepared = evaluated.parent / "prepare"
    users, catalogue = load_names(prepared)
    found = {tuple(path.stem.split(".", 1)): path for path in sorted((evaluated / "predictions").glob("*.*.jsonl"))}
    asked = {
        protocol: protocols.rows_of(config, prepared, protocol, len(users), len(catalogue)) for protocol, _ in found
    }

    def fill(directory: pathlib.Path) -> None:
        for protocol, asked_rows in asked.items():
            _write_lines(directory / f"{protocol}.qrels", predictions.trec_qrels(asked_rows, catalogue))
        for (protocol, model), path in found.items():
            answers = predictions.read(path, asked[protocol], users, catalogue)
            lines = predictions.trec_run(asked[protocol], answers, catalogue, model)
            _write_lines(directory / f"{protocol}.{model}.run", lines)

    if distributed.is_primary():
        checkpoints_hf.new_directory(output, fill)
    return f"{len(found)} runs, {len(asked)} qrels"


@dataclasses.dataclass(frozen=True)
class Format:
    """write(config, folder of the stage, output) -> what was written; stage "": that of --checkpoint."""

    write: Callable[[ConfigDict, pathlib.Path, pathlib.Path], str]
    stage: str
    help: str


FORMATS = {
    "merged": Format(merged, "", "the whole model, for transformers"),
    "adapter": Format(adapter, "", "the LoRA adapter alone, for PEFT"),
    "trec": Format(trec, "evaluate", "the rankings of `evaluate` as TREC runs, with qrels"),
    "recbole": Format(recbole, "prepare", "the rows and items as a data set of RecBole, called as the directory is"),
    "rows": Format(rows, "prepare", "the rows that are asked about, for `rosepo evaluate --predictions`"),
}


def _write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def card(workdir: pathlib.Path, checkpoint: str) -> str:
    """The model card: prompt, data, protocol, metrics with intervals, settings, versions, as the run recorded them."""
    manifest, prepared = _manifest(workdir / checkpoint, MADE), _manifest(workdir / "prepare", PREPARED)
    settings = _without_folders(manifest["resolved_config"])
    data = settings["data"]
    data_hash = prepared["inputs"].get("data.path", "generated from the settings below")
    method = {
        "sft": "supervised fine-tuning on interaction histories",
        "align": f"supervised fine-tuning, then preference optimisation ({settings['align']['objective']})",
    }[checkpoint]
    return "\n".join(
        [
            *("---", "library_name: transformers", "pipeline_tag: text-generation"),
            *("tags:", "- recommendation", "- rosepo_jax", "---", ""),
            *(f"# Next-item recommender ({MODELS[checkpoint]})", ""),
            f"Trained by rosepo_jax: {method}. It continues this prompt, in which titles stand one a line,",
            *("with the title of the next item and the end-of-sequence token:", ""),
            *("```", Template.load(manifest["resolved_config"]["data"]["template"]).text.rstrip("\n"), "```", ""),
            *(["In one user turn of the chat template.", ""] if settings["model"]["chat_template"] else []),
            *("## Data", ""),
            f"- source: {data['source']}, hash {data_hash}",
            f"- prepared rows: {prepared['identity']}",
            f"- split: {data['split']}; k-core: users {data['core_user']}, items {data['core_item']};"
            f" history: {data['history']} items",
            *("", "## Results", ""),
            *_results(workdir, checkpoint, manifest["identity"]),
            *("## Settings", "", "```json", json.dumps(settings, indent=1, ensure_ascii=False), "```", ""),
            *("## Versions", ""),
            f"- rosepo_jax {manifest['code']}, Python {manifest['python']}, {manifest['device']['kind']}",
            "- " + ", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
            "",
        ]
    )


def _manifest(stage: pathlib.Path, form: forms.Form) -> dict:
    path = stage / runtime.MANIFEST
    return forms.check(files.read_json(path), form, path, f"run `rosepo {stage.name}` again")


def _results(workdir: pathlib.Path, checkpoint: str, identity: str) -> list[str]:
    """One table a protocol and the paired comparisons, if this very checkpoint has been evaluated."""
    recorded = workdir / "evaluate" / runtime.MANIFEST
    if not recorded.exists() or _manifest(recorded.parent, {"inputs": dict})["inputs"].get(checkpoint) != identity:
        return ["Not evaluated.", ""]
    results = report.read(workdir / "evaluate" / "results.json")
    model, lines = MODELS[checkpoint], []
    for name, protocol in results["protocols"].items():
        if model in protocol["models"]:
            lines += [f"Protocol `{name}`, {protocol.get('n', '?')} rows, hash {protocol['hash']}:", ""]
            lines += ["| metric | value | 95 % interval | n |", "|---|---|---|---|"]
            cells = {metric: cell for metric, cell in protocol["models"][model].items() if _is_number(cell)}
            lines += [*(_row(metric, cell) for metric, cell in cells.items()), ""]
    for c in results.get("comparisons", []):
        if model in (c["a"], c["b"]):
            lines.append(
                f"- {c['protocol']}, {c['metric']}: {c['a']} - {c['b']} = {_number(c['difference'])}"
                f" {_interval(c)}, p = {_number(c.get('p_holm', c.get('p')))} ({c.get('test')})"
            )
    return [*lines, ""]


def _row(metric: str, cell: Any) -> str:
    cell = cell if isinstance(cell, Mapping) else {"value": cell}
    return f"| {metric} | {_number(cell['value'])} | {_interval(cell)} | {cell.get('n', '')} |"


def _is_number(cell: Any) -> bool:
    """Whether a cell fits into a row of the card: curves and tables by group stand in the report."""
    value = cell["value"] if isinstance(cell, Mapping) and "value" in cell else cell
    return value is None or isinstance(value, int | float)


def _interval(cell: Mapping[str, Any]) -> str:
    return "[{}, {}]".format(*map(_number, cell["ci95"])) if cell.get("ci95") else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _without_folders(settings: dict) -> dict:
    """The settings with the names of the user's files, but not where these lie; a hub id is no folder."""

    def shown(name: str, value: Any) -> Any:
        is_folder = name in runtime.PATH_KEYS and not (name == "model.path" and hub.is_id(value))
        return pathlib.Path(value).name if is_folder else value

    return {
        section: {key: shown(f"{section}.{key}", value) for key, value in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in settings.items()
    }
