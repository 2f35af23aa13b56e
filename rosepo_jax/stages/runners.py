"""Who works through the runs of a sweep here: this process, or several at a time. On a cluster: submit.py."""

import os
import pathlib
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rosepo_jax import distributed
from rosepo_jax.errors import UserError
from rosepo_jax.stages import plan, runtime

KINDS = ("sequential", "local:N", "slurm[:N]", "k8s[:N]")
POLL = 0.1  # seconds between two looks at the workers
GRACE = 120.0  # seconds that workers get to save what they have
MEMORY = 0.9  # of a GPU, for all workers on it


def parse(text: str) -> tuple[str, int]:
    """ "local:2" -> ("local", 2); 0 where no number is given."""
    kind, separator, number = text.partition(":")
    wrong = separator and not re.fullmatch(r"[1-9]\d{0,3}", number, re.ASCII)
    if wrong or kind not in [name.partition("[")[0].partition(":")[0] for name in KINDS]:
        raise UserError(f"--runner={text}: there are {', '.join(KINDS)}")
    if (kind == "local") != bool(separator) and kind in ("local", "sequential"):
        raise UserError(f"--runner={text}: write sequential, or local:N for N workers")
    return kind, int(number or 0)


def sequential(runs: Iterable[plan.Run], do: Callable[[plan.Run], None]) -> None:
    """One run after the other in this process; a run that fails is said, and the next one begins."""
    for run in runs:
        runtime.say(f"sweep: {run.name}")
        try:
            do(run)
        except UserError as mistake:
            runtime.say(f"sweep: {run.name}: failed: {mistake}")
        except Exception:  # one broken run must not cost the others
            traceback.print_exc()


def local(
    runs: Iterator[plan.Run],
    words: Callable[[plan.Run], Sequence[str]],
    workers: int,
    logs: pathlib.Path,
    ended: Callable[[plan.Run, int, pathlib.Path], None],
) -> None:
    """At most `workers` runs at a time, each a process of its own (`words`) with its share of the machine and a log.

    A run is taken from `runs` when a worker is free for it; `ended` hears its exit status. However this ends, so do the
    workers.
    """
    logs.mkdir(parents=True, exist_ok=True)
    working: dict[int, tuple[plan.Run, subprocess.Popen]] = {}
    try:
        while True:
            for slot in sorted(set(range(workers)) - set(working)):
                if (run := next(runs, None)) is None:
                    break
                log = logs / f"{run.name}.log"
                print(f"sweep: {run.name}: begun, log: {log}", flush=True)
                with distributed.deferred():  # a worker that is not in `working` would not be ended
                    working[slot] = run, _start(words(run), {**os.environ, **share(slot, workers)}, log)
            if not working:
                return
            time.sleep(POLL)
            for slot, (run, process) in list(working.items()):
                if process.poll() is not None:
                    del working[slot]
                    ended(run, process.returncode, logs / f"{run.name}.log")
    finally:
        _end([process for _, process in working.values()])


def _start(words: Sequence[str], environment: Mapping[str, str], log: pathlib.Path) -> subprocess.Popen:
    """Ctrl-C reaches every process of a terminal; workers leave it to this process, which tells them once."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with open(log, "ab") as output:
            return subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
    finally:
        signal.signal(signal.SIGINT, before)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Asks the workers to save and stop; kills them when they do not, or when this process is told a second time."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def share(slot: int, workers: int) -> dict[str, str]:
    """The environment that gives a worker its part of the processors and GPUs; what the user has set stays."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"NPROC": os.environ.get("NPROC", str(max(processors // workers, 1)))}  # threads of XLA's CPU client
    gpus = _gpus()
    if gpus and workers > 1:
        here = gpus[slot::workers] or [gpus[slot % len(gpus)]]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(here)
        if workers > len(gpus):
            found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY / -(-workers // len(gpus)):.3f}"
    return found


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    devices = pathlib.Path("/dev").glob("nvidia[0-9]*")
    return sorted((path.name.removeprefix("nvidia") for path in devices), key=int)
