"""report: one page, one JSON file and one table for the terminal, made from what the other stages left."""

import pathlib

from ml_collections import ConfigDict

from rosepo_jax import distributed, files, forms
from rosepo_jax.data import pairs
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import page, report
from rosepo_jax.stages import STAGES, runtime
from rosepo_jax.training import goodput

NAME = "report"
INPUTS = ("evaluate",)  # whose identity covers every stage before it; their folders are read where they are there
KEYS = ()
RESUMABLE = False
PREDICTION = {"user": str, "position": int, "target": str, "history": [str], "ranked": [(None, str)]}
LOGGED = {"step": int, str: (None, bool, float, str)}  # of metrics.jsonl
MADE = {"device?": dict, "seconds?": (None, float), "packages?": {str: str}}  # of manifest.json


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    """Writes report.html and summary.json, prints what they say and returns it."""
    found = material(config, inputs["evaluate"].parent)
    text = report.text(found.results)
    if distributed.is_primary():
        write(found, out)
    runtime.say(f"{text}\n\n{out / 'report.html'}")
    return {"table": report.table(found.results), "verdicts": report.verdicts(found.results)}


def write(found: report.Material, out: pathlib.Path) -> None:
    files.write_text(out / "report.html", page.html(found))
    files.write_json(out / "summary.json", report.summary(found))


def material(config: ConfigDict, workdir: pathlib.Path) -> report.Material:
    """Reads what is below `workdir`: complete stages only, and all but `evaluate` may be missing."""
    stages = [verb for verb in STAGES if verb != NAME and (workdir / verb / runtime.MANIFEST).exists()]
    prepared = workdir / "prepare" if "prepare" in stages else None
    results = report.read(workdir / "evaluate" / "results.json")
    others = {
        str(path.relative_to(workdir)): report.read(path)
        for path in sorted((workdir / "others").glob("*/*.results.json"))
    }
    catalogue = Catalogue.load(prepared / "catalogue.jsonl") if prepared else None
    predictions = {
        protocol: {
            model: _predictions(path, catalogue)
            for model in ("sft", "aligned")
            if (path := workdir / "evaluate" / "predictions" / f"{protocol}.{model}.jsonl").exists()
        }
        for protocol in ("candidates", "catalogue")
    }
    return report.Material(
        results=report.with_others(results, others),
        predictions=predictions,
        catalogue=catalogue,
        statistics=_read_json(prepared / "statistics.json", dict) if prepared else {},
        metrics={
            verb: _read_jsonl(path, LOGGED)
            for verb in stages
            if verb in ("oracle", "sft", "align") and (path := workdir / verb / "metrics.jsonl").exists()
        },
        spent={
            folder.name: goodput.totals(lines)
            for folder in (workdir / "sft", workdir / "align", workdir / "evaluate" / "sft_more")
            if (lines := goodput.read(folder / goodput.FILE))
        },
        pairs=pairs.read_some(workdir / "pairs" / "pairs.parquet") if "pairs" in stages else {},
        manifests={verb: _read_json(workdir / verb / runtime.MANIFEST, MADE) for verb in stages},
        config=config.to_dict(),
    )


def _read_json(path: pathlib.Path, form: forms.Form) -> dict:
    return forms.check(files.read_json(path), form, path, f"run `rosepo {path.parent.name}` again")


def _read_jsonl(path: pathlib.Path, form: forms.Form) -> list[dict]:
    rows = files.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        forms.check(row, form, f"{path}: row {number}", "run the stage that wrote it again")
    return rows


def _predictions(path: pathlib.Path, catalogue: Catalogue | None) -> list[dict]:
    rows, known = _read_jsonl(path, PREDICTION), {None, *catalogue.ids} if catalogue else set()
    for number, row in enumerate(rows, 1):
        if known and not known.issuperset([row["target"], *row["history"], *row["ranked"]]):
            raise UserError(f"{path}: row {number} names an item that is not in the catalogue; evaluate again")
    return rows
