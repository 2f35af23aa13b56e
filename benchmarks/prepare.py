"""Wall time and peak memory of `rosepo prepare`, start-up included.

python benchmarks/prepare.py --path=DIR [--record]                  MovieTweetings-100K; at most 15 s
python benchmarks/prepare.py --interactions=1000000 [--record]      a synthetic log of that many interactions

One JSON line per repeat. The synthetic log is a Parquet table: Zipf popularity, 20 interactions a user on average.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record

from rosepo_jax import seeds

TARGET = 15.0  # seconds, MovieTweetings-100K on two cores
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def synthetic(interactions: int, folder: pathlib.Path) -> list[str]:
    """Writes a log and its titles into `folder`; returns the overrides that read it."""
    rng = seeds.generator("benchmark", "prepare", interactions)
    users, items = max(interactions // 20, 1), max(interactions // 200, 100)
    item_E = np.minimum((items ** rng.random(interactions)).astype(np.int64) - 1, items - 1)  # p(rank) ~ 1 / rank
    log = {"user": rng.integers(0, users, interactions), "item": item_E, "timestamp": np.arange(interactions)}
    titles = {"item": np.arange(items), "title": [f"Title {item}" for item in range(items)]}
    for name, table in (("log", log), ("titles", titles)):
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return [
        "--config.data.source=table",
        f"--config.data.path={folder / 'log.parquet'}",
        f"--config.data.titles={folder / 'titles.parquet'}",
    ]


def measure(config: str, overrides: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as workdir:
        words = ["prepare", f"--config={config}", f"--workdir={workdir}/run", *overrides]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rosepo_jax", *words], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # kilobytes on Linux
    return {"seconds": seconds, "peak MiB": peak}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--path", help="folder of MovieTweetings-100K")
    source.add_argument("--interactions", type=int, help="size of a synthetic log instead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.path:
            data, overrides = "movietweetings-100k", [f"--config.data.path={args.path}"]
            config = REPOSITORY / "configs" / "movietweetings.py"
        else:
            data, overrides = f"synthetic {args.interactions:,}", synthetic(args.interactions, pathlib.Path(folder))
            config = REPOSITORY / "configs" / "demo.py"
        for _ in range(args.repeats):
            rows.append({"data": data, **measure(str(config), overrides)})
            if args.path:
                rows[-1]["at most"] = TARGET
            print(json.dumps(rows[-1]), flush=True)
    if args.record:
        flag = "--path=DIR" if args.path else f"--interactions={args.interactions}"
        record.append(f"python benchmarks/prepare.py {flag} --repeats={args.repeats}", rows)
    median = float(np.median([row["seconds"] for row in rows]))
    return 1 if args.path and median > TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
