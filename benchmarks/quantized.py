"""What an 8- or 4-bit base costs: error of log-probs and change of HR@1 on real rows, beside the memory saved.

python benchmarks/quantized.py --workdir=runs/NAME [--record]

Takes the SFT model of a finished run with full tuning, writes it as a Hugging Face directory, opens it with the kernels
of its blocks in each format, and scores the frozen candidates of all test rows. Large models have most of their
parameters in those kernels; what they would save is counted from their shapes.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record

from rosepo_jax import configuration
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.decoding import rank
from rosepo_jax.evaluation import metrics, significance
from rosepo_jax.models import checkpoints_hf, families, quantize
from rosepo_jax.models.decoder import LanguageModel
from rosepo_jax.training import policy, sharding

LARGE = ("llama3-8b", "qwen3-4b")


def candidate_scores(config, folder: pathlib.Path, how: str, catalogue, rows) -> tuple[np.ndarray, int]:
    """Log-probs [E, C] of the test candidates, and the bytes of the parameters."""
    config.model.quantize = how
    model = policy.open_model(config, folder, sharding.make_mesh(config.mesh))
    titles = TitleTable(model.encoder, catalogue.titles)
    scores_ExC = rank.item_scores(
        model, model.params, catalogue, titles, rows, rows.candidates_ExC, config.evaluate.batch_size
    )
    return scores_ExC, sum(value.nbytes for value in model.params.values())


def measure(workdir: pathlib.Path) -> list[dict]:
    config = configuration.load(str(workdir / "config.json"))
    catalogue = Catalogue.load(workdir / "prepare" / "catalogue.jsonl")
    rows = store.read(workdir / "prepare" / "dataset", "test")
    model = policy.load(config, workdir / "sft", sharding.make_mesh(config.mesh))
    found, hits = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "hf"
        checkpoints_hf.write(folder, model.lm.config, model.params, workdir / "sft" / "tokenizer")
        scored = {how: candidate_scores(config, folder, how, catalogue, rows) for how in quantize.FORMATS}
        exact_ExC, _ = scored["none"]
        for how, (scores_ExC, size) in scored.items():
            ranked_ExC = metrics.ranking(scores_ExC, rows.candidates_ExC)
            rank_E = metrics.target_rank(ranked_ExC, rows.target_E, catalogue.title_group_I)
            hits[how] = metrics.hit_ratio(rank_E, 1).astype(float)
            error_ExC = np.abs(scores_ExC - exact_ExC)
            change = significance.compare(hits[how], hits["none"], rows.user_E, 2000, 0)
            found.append(
                {
                    "model": workdir.name,
                    "format": how,
                    "n": len(rows),
                    "HR@1": float(hits[how].mean()),
                    "change": change["difference"],
                    "ci95": "" if how == "none" else "[{:+.4f}, {:+.4f}]".format(*change["ci95"]),
                    "mean |error| of a log-prob": float(error_ExC.mean()),
                    "spread of log-probs": float(exact_ExC.std()),
                    "bytes": size,
                }
            )
    return found


def sizes(name: str) -> list[dict]:
    """Bytes of a large model's parameters in bfloat16 and with a quantised base, from shapes alone."""
    config = families.architecture(name)
    found = []
    for how in quantize.FORMATS:
        lm = LanguageModel(config, param_dtype="bfloat16", quantize=how)
        shapes = jax.eval_shape(lm.init, jax.random.key(0)).values()
        found.append({"model": name, "format": how, "bytes": sum(v.size * v.dtype.itemsize for v in shapes)})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a finished run with model.tuning=full")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    rows = [*measure(args.workdir), *(row for name in LARGE for row in sizes(name))]
    for row in rows:
        row["of plain"] = row["bytes"] / next(r["bytes"] for r in rows if r["model"] == row["model"])
        print(json.dumps(row), flush=True)
    if args.record:
        record.append(f"python benchmarks/quantized.py --workdir=runs/{args.workdir.name}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
