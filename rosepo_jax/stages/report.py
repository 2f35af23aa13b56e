"""report: one page, one JSON file and one table for the terminal, made from what the other stages left."""

import pathlib

import pyarrow.parquet
from ml_collections import ConfigDict

from rosepo_jax import distributed, files
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.evaluation import page, report
from rosepo_jax.stages import STAGES, runtime
from rosepo_jax.training import goodput

NAME = "report"
INPUTS = ("evaluate",)  # whose identity covers every stage before it; their folders are read where they are there
KEYS = ()
RESUMABLE = False


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    """Writes report.html and summary.json, prints what they say and returns it."""
    found = material(config, inputs["evaluate"].parent)
    text = report.text(found.results)
    if distributed.is_primary():
        files.write_text(out / "report.html", page.html(found))
        files.write_json(out / "summary.json", report.summary(found))
    runtime.say(f"{text}\n\n{out / 'report.html'}")
    return {"table": report.table(found.results), "verdicts": report.verdicts(found.results)}


def material(config: ConfigDict, workdir: pathlib.Path) -> report.Material:
    """Reads what is below `workdir`: complete stages only, and all but `evaluate` may be missing."""
    stages = [verb for verb in STAGES if verb != NAME and (workdir / verb / runtime.MANIFEST).exists()]
    prepared = workdir / "prepare" if "prepare" in stages else None
    results = files.read_json(workdir / "evaluate" / "results.json")
    others = {
        str(path.relative_to(workdir)): files.read_json(path)
        for path in sorted((workdir / "others").glob("*/*.results.json"))
    }
    predictions = {
        protocol: {
            model: files.read_jsonl(path)
            for model in ("sft", "aligned")
            if (path := workdir / "evaluate" / "predictions" / f"{protocol}.{model}.jsonl").exists()
        }
        for protocol in ("candidates", "catalogue")
    }
    return report.Material(
        results=report.with_others(results, others),
        predictions=predictions,
        catalogue=Catalogue.load(prepared / "catalogue.jsonl") if prepared else None,
        statistics=files.read_json(prepared / "statistics.json") if prepared else {},
        metrics={
            verb: files.read_jsonl(path)
            for verb in stages
            if verb in ("oracle", "sft", "align") and (path := workdir / verb / "metrics.jsonl").exists()
        },
        spent={
            folder.name: goodput.totals(lines)
            for folder in (workdir / "sft", workdir / "align", workdir / "evaluate" / "sft_more")
            if (lines := goodput.read(folder / goodput.FILE))
        },
        pairs=_pairs(workdir / "pairs" / "pairs.parquet") if "pairs" in stages else {},
        manifests={verb: files.read_json(workdir / verb / runtime.MANIFEST) for verb in stages},
        config=config.to_dict(),
    )


def _pairs(path: pathlib.Path) -> dict[str, list]:
    """The columns the report shows; ready-made pairs may lack any of them."""
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [name for name in ("epsilon", "strategy", "flipped") if name in file.schema_arrow.names]
        return file.read(columns=columns).to_pydict()
