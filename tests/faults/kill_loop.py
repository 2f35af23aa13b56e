"""Kills a run again and again, starts it again each time with the same command, and compares what comes out.

    python tests/faults/kill_loop.py --kills=50 [--processes=2] [--config=configs/demo.py:smoke] [--seed=0]

Two undisturbed runs come first: they must be equal, and the second, whose programs are compiled, says how long a run
takes. Then SIGKILL falls upon `rosepo run`, or all of `--processes` at once, at a random instant of every start, until
so many kills have hit; the last start runs to its end. A run that ends before is compared too, and another begun.
results.json, the parameters of every model and the curves (but for what clocks decide) must be the same bit for bit.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from rosepo_jax.training.metrics import MEASURED  # noqa: E402

LIMIT = 600.0  # seconds for one start


def command(processes: int, words: Sequence[str]) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "rosepo_jax", *words]
    return [sys.executable, str(REPOSITORY / "launch" / "local_processes.py"), f"--processes={processes}", *words]


def start(words: Sequence[str], cache: pathlib.Path) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be killed at once."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache)} | environment | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def outcome(workdir: pathlib.Path) -> dict[str, object]:
    """What must not depend on kills: results, parameters, curves."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    found: dict[str, object] = {"results": json.loads((workdir / "evaluate" / "results.json").read_text())}
    for folder in ("sft", "align", "evaluate/sft_more"):
        with ocp.StandardCheckpointer() as checkpointer:
            path = (workdir / folder / "model").absolute()
            stored = checkpointer.metadata(path).item_metadata.tree
            target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in stored.items()}
            params = checkpointer.restore(path, target)
        found[f"{folder}: parameters"] = {
            path: hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for path, value in params.items()
        }
        rows = map(json.loads, (workdir / folder / "metrics.jsonl").read_text().splitlines())
        found[f"{folder}: curve"] = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    return found


def stage_of(workdir: pathlib.Path) -> str:
    """Which stage a kill has hit."""
    begun = sorted(path.parent.name for path in workdir.glob("*/begun.json"))
    return " ".join(begun) or "between stages"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--config", default="configs/demo.py:smoke")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)

        def words(name: str) -> list[str]:
            settings = [f"--config={args.config}", f"--workdir={folder / name}", "--config.checkpoint.every=2 steps"]
            return command(args.processes, ["run", *settings])

        def undisturbed(name: str) -> tuple[float, dict[str, object]]:
            began = time.monotonic()
            child = start(words(name), folder / "cache")
            said, _ = child.communicate(timeout=LIMIT)
            if child.returncode:
                raise SystemExit(said)
            return time.monotonic() - began, outcome(folder / name)

        _, expected = undisturbed("first")
        taken, again = undisturbed("second")
        compare(expected, again)
        print(f"undisturbed: {taken:.0f} s", flush=True)
        hits, starts, whole = 0, 0, 0
        while not whole or hits < args.kills:
            child, starts = start(words("killed"), folder / "cache"), starts + 1
            try:
                # Half a run: most starts come to be killed, and each comes further than the one before.
                said, _ = child.communicate(timeout=draw.uniform(0.0, taken / 2) if hits < args.kills else LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                hits += 1
                print(f"kill {hits}: {stage_of(folder / 'killed')}", flush=True)
                continue
            if child.returncode:
                raise SystemExit(f"status {child.returncode} after {hits} kills:\n{said}")
            compare(expected, outcome(folder / "killed"))
            shutil.rmtree(folder / "killed")
            whole += 1
    print(f"{hits} kills, {starts} starts, {whole} whole runs: bit for bit the undisturbed one")
    return 0


def compare(expected: dict[str, object], found: dict[str, object]) -> None:
    if different := [name for name in expected if expected[name] != found[name]]:
        raise SystemExit(f"not the undisturbed run: {', '.join(different)}")


if __name__ == "__main__":
    sys.exit(main())
