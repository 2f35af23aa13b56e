"""How an update, the search of a catalogue and `rosepo prepare` grow with their sizes.

python benchmarks/scaling.py [--axes=P,R,T,B,titles,interactions] [--repeats=5] [--record]

P, R, T, B     one DPO update (peer/ours_dpo.py: LoRA, float32, reference in the step) as one size grows: prompt tokens,
               responses of a prompt (R - 1 of them rejected), response tokens, prompts. Seconds; processed tokens,
               padding included; memory by XLA's plan.
titles         beam search of the top 10 by 20 beams (decode.py) in catalogues of that many titles: users a second,
               the trie's bytes, seconds to build it.
interactions   `rosepo prepare` of a synthetic log (prepare.py): seconds, peak memory.

One JSON line per figure: the median of the repeats and their range. `growth` is the exponent between the two largest
sizes, 1 where a figure grows in proportion.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import decode
import peers
import record
from peer import ours_dpo

from rosepo_jax.__main__ import keep_freed_memory
from rosepo_jax.decoding.trie import compile_trie

SHAPE = dataclasses.replace(peers.STORIES, vocabulary=8192, layers=2)
BASE = {"P": 128, "R": 4, "T": 8, "B": 8}
SIZES = {
    "P": (64, 128, 256, 512),
    "R": (2, 4, 8, 16, 32),
    "T": (4, 8, 16, 32),
    "B": (4, 8, 16, 32),
    "titles": (1_000, 10_000, 100_000),
    "interactions": (100_000, 1_000_000, 5_000_000),
}
Figures = dict[tuple[str, str], dict[str, float]]  # by name and unit


def update(folder: pathlib.Path, P: int, R: int, T: int, B: int, repeats: int) -> Figures:
    settings = dict(
        model=str(folder / "model"), adapter=str(folder / "adapter"), T=T, dtype="float32", remat=False,
        rows=peers.make_rows(SHAPE.vocabulary, B, P, T, R - 1), beta=0.1, learning_rate=1e-4, clip=1.0,
    )  # fmt: skip
    ours = ours_dpo.Ours(settings)
    ours.do_step()
    return {
        ("update", "s"): record.spread([ours.do_step()["seconds"] for _ in range(repeats)]),
        ("tokens", ""): {"value": ours.do_work()["processed"]},
        ("memory by XLA's plan", "MiB"): {"value": ours.do_memory()["planned"] / 2**20},
    }


def search(titles: int, repeats: int) -> Figures:
    problem = decode.make_problem(decode.DECODER, users=16, P=128, items=titles, T=8, candidates=20)
    started = time.perf_counter()
    trie = compile_trie(problem.titles, decode.EOS)
    built = time.perf_counter() - started
    ours = decode.Ours(problem, beams=20, k=10, budget=2000)
    ours.catalogue()
    return {
        ("search", "users/s"): record.spread([16 / decode.seconds(ours.catalogue) for _ in range(repeats)]),
        ("trie", "MiB"): {"value": sum(np.asarray(x).nbytes for x in jax.tree.leaves(trie)) / 2**20},
        ("building the trie", "s"): {"value": built},
    }


def preparation(interactions: int) -> Figures:
    """By prepare.py: the peak memory of a process begins with that of its parent, and this one is large."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("prepare.py")), f"--interactions={interactions}"]
    lines = subprocess.run([*command, "--repeats=1"], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    rows = {row["figure"]: row for row in map(json.loads, lines)}
    if not rows:
        raise SystemExit("prepare.py failed; what it said stands above")
    return {(name, rows[name]["unit"]): {"value": rows[name]["value"]} for name in ("time", "peak memory")}


def measure(axis: str, sizes: Sequence[int], at: Callable[[int], Figures]) -> Iterator[dict[str, Any]]:
    """The figures at all sizes, and how each grows."""
    found = []
    for size in sizes:
        found.append(at(size))
        for (figure, unit), values in found[-1].items():
            yield {"axis": axis, "size": size, "figure": figure, "unit": unit, **values}
    for (figure, unit), largest in found[-1].items() if len(sizes) > 1 else []:
        ratio = largest["value"] / found[-2][figure, unit]["value"]
        exponent = math.log(ratio) / math.log(sizes[-1] / sizes[-2])
        yield {"axis": axis, "size": f"{sizes[-2]}-{sizes[-1]}", "figure": f"growth: {figure}", "value": exponent}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(SIZES), help="which sizes grow")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    axes = args.axes.split(",")
    if unknown := [axis for axis in axes if axis not in SIZES]:
        parser.error(f"--axes={args.axes}: {unknown[0]} is none of {', '.join(SIZES)}")
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()  # as the command line does
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        peers.make_model(SHAPE, "float32", folder / "model")
        peers.make_adapter(SHAPE, folder / "model", folder / "adapter")

        def at(axis: str, size: int) -> Figures:
            if axis == "titles":
                return search(size, args.repeats)
            if axis == "interactions":
                return preparation(size)
            return update(folder, **(BASE | {axis: size}), repeats=args.repeats)

        for axis in axes:
            for row in measure(axis, SIZES[axis], functools.partial(at, axis)):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.record:
        given = sys.argv[1:] if argv is None else argv
        record.append(" ".join(["python benchmarks/scaling.py", *given]), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
