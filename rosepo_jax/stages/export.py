"""rosepo export: a checkpoint as a Hugging Face directory, adapters merged, or its adapter for PEFT; a model card."""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.data.prompts import Template
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf, hub, peft
from rosepo_jax.models import lora as adapters
from rosepo_jax.stages import runtime
from rosepo_jax.training import policy, sharding
from rosepo_jax.training.metrics import is_primary
from rosepo_jax.training.policy import Policy

MODELS = {"align": "aligned", "sft": "sft"}  # stage -> the name of its model in results.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a checkpoint as a directory that transformers or PEFT loads, with a model card."
    parser.add_argument("--checkpoint", choices=tuple(MODELS), default="align", help="default: align")
    parser.add_argument(
        "--format", choices=("merged", "adapter"), default="merged", help="whole model, or the LoRA adapter for PEFT"
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a directory that does not exist yet")


def main(config: ConfigDict | None, args: argparse.Namespace) -> None:
    if config is None:
        raise UserError("give the run to export: --workdir=DIR")
    manifest_path = args.workdir / args.checkpoint / runtime.MANIFEST
    if not manifest_path.exists():
        raise UserError(
            f"{manifest_path.parent}: no complete checkpoint; run `rosepo {args.checkpoint} --workdir={args.workdir}`"
        )
    folder = args.workdir / args.checkpoint
    model = policy.load(config, folder, sharding.make_mesh(config.mesh))
    readme = card(args.workdir, args.checkpoint)
    write = export_adapter if args.format == "adapter" else export_merged
    count = write(config, model, folder, args.output, readme)
    runtime.say(f"{args.output}: {count:,} parameters")


def export_merged(config: ConfigDict, model: Policy, folder: pathlib.Path, output: pathlib.Path, readme: str) -> int:
    """The whole model, adapter folded in, a quantised base restored; returns its number of parameters."""
    params = adapters.merge(model.params, model.lm.lora, model.lm.quantize)
    if is_primary():
        checkpoints_hf.write(
            output, model.lm.config, params, folder / "tokenizer", config.model.param_dtype,
            readme=readme, eos=model.encoder.eos,
        )  # fmt: skip
    return sum(value.size for value in params.values())


def export_adapter(config: ConfigDict, model: Policy, folder: pathlib.Path, output: pathlib.Path, readme: str) -> int:
    """The adapter alone, for PEFT on top of the base that the run started from."""
    base = policy.describe(folder)["base"]
    if model.lm.lora is None:
        raise UserError("--format=adapter: the run tuned the whole model (model.tuning=full); use --format=merged")
    if "path" not in base:
        raise UserError("--format=adapter: the base was a new model, which nobody else has; use --format=merged")
    if is_primary():
        path, revision = base["path"], base["revision"]
        peft.write(output, model.lm.config, model.lm.lora, model.trainable, base=path, revision=revision, readme=readme)
    return sum(value.size for value in model.trainable.values())


def card(workdir: pathlib.Path, checkpoint: str) -> str:
    """The model card: prompt, data, protocol, metrics with intervals, settings, versions, as the run recorded them."""
    manifest = files.read_json(workdir / checkpoint / runtime.MANIFEST)
    prepared = files.read_json(workdir / "prepare" / runtime.MANIFEST)
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


def _results(workdir: pathlib.Path, checkpoint: str, identity: str) -> list[str]:
    """One table a protocol and the paired comparisons, if this very checkpoint has been evaluated."""
    recorded = workdir / "evaluate" / runtime.MANIFEST
    if not recorded.exists() or files.read_json(recorded)["inputs"].get(checkpoint) != identity:
        return ["Not evaluated.", ""]
    results = files.read_json(workdir / "evaluate" / "results.json")
    model, lines = MODELS[checkpoint], []
    for name, protocol in results["protocols"].items():
        if model in protocol["models"]:
            lines += [f"Protocol `{name}`, {protocol['n']} rows, hash {protocol['hash']}:", ""]
            lines += ["| metric | value | 95 % interval | n |", "|---|---|---|---|"]
            cells = {metric: cell for metric, cell in protocol["models"][model].items() if _is_number(cell)}
            lines += [*(_row(metric, cell) for metric, cell in cells.items()), ""]
    for c in results.get("comparisons", []):
        if model in (c["a"], c["b"]):
            lines.append(
                f"- {c['protocol']}, {c['metric']}: {c['a']} - {c['b']} = {_number(c['difference'])}"
                f" {_interval(c)}, p = {_number(c.get('p_holm', c['p']))} ({c['test']})"
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
