"""Wall time and peak memory of `rosepo prepare`, start-up included.

python benchmarks/prepare.py [--interactions=20000000] [--record]     a synthetic log; at most 90 s and 6 GB
python benchmarks/prepare.py --path=DIR [--record]                    MovieTweetings-100K; at most 15 s

One JSON line a figure; exit status 1 when one is above what it may be at most, on two cores. The limits of the
synthetic log are those of 20 million interactions. It is a Parquet table: Zipf popularity, 20 interactions a user on
average.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record

from rosepo_jax import seeds

AT_MOST = {"time": 15.0}  # of MovieTweetings-100K on two cores
AT_MOST_SYNTHETIC = {"time": 90.0, "peak memory": 6.0}
SYNTHETIC = 20_000_000  # interactions, at most, for which these hold
UNITS = {"time": "s", "processor time": "s", "peak memory": "GB"}
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
        process = subprocess.Popen([sys.executable, "-m", "rosepo_jax", *words], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"rosepo {' '.join(words)} failed")
    memory = used.ru_maxrss * 1024 / 1e9  # kilobytes on Linux
    return {"time": seconds, "processor time": used.ru_utime + used.ru_stime, "peak memory": memory}


def figures(data: str, found: Sequence[dict[str, float]], at_most: dict[str, float]) -> list[dict[str, Any]]:
    """A row a figure: the median of the repeats, the lowest and the highest, and what it may be at most."""
    rows = []
    for name, unit in UNITS.items():
        values = [repeat[name] for repeat in found]
        row = {"data": data, "figure": name, "unit": unit, **record.spread(values)}
        rows.append(row | ({"at most": at_most[name]} if name in at_most else {}))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--path", help="folder of MovieTweetings-100K")
    source.add_argument("--interactions", type=int, default=SYNTHETIC, help="of a synthetic log; default 20 million")
    parser.add_argument("--repeats", type=int, help="default: 3; of more than two million interactions 1")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    repeats = args.repeats or (3 if args.path or args.interactions <= 2_000_000 else 1)
    with tempfile.TemporaryDirectory() as folder:
        if args.path:
            data, overrides, at_most = "movietweetings-100k", [f"--config.data.path={args.path}"], AT_MOST
            config = REPOSITORY / "configs" / "movietweetings.py"
        else:
            data, overrides = f"synthetic {args.interactions:,}", synthetic(args.interactions, pathlib.Path(folder))
            at_most = AT_MOST_SYNTHETIC if args.interactions <= SYNTHETIC else {}
            config = REPOSITORY / "configs" / "demo.py"
        rows = figures(data, [measure(str(config), overrides) for _ in range(repeats)], at_most)
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.record:
        flag = "--path=DIR" if args.path else f"--interactions={args.interactions}"
        record.append(f"python benchmarks/prepare.py {flag} --repeats={repeats}", rows)
    return 1 if any(row["value"] > row.get("at most", np.inf) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
