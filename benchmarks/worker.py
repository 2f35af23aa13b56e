"""A process of its own for each side of a comparison: allocator, threads and memory of one never touch the other's.

The parent asks one worker after the other, a JSON line each way, so that what is compared runs in turns on one machine.
Workers import this file in environments where nothing of ours is installed: standard library only.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

SETTLE = 0.5  # seconds


def settle() -> None:
    """Waits between turns: thread pools spin for a while after their work, and would take the next one's cores."""
    time.sleep(SETTLE)


def peer(name: str) -> str:
    """The python of an environment that `bash launch/peer_env.sh NAME` made in its usual place; "" if there is none."""
    python = pathlib.Path(__file__).parents[1] / f".venv-{name}" / "bin" / "python"
    return str(python) if python.exists() else ""


class Worker:
    """Starts `command`; `ask(...)` sends it one request and waits for the answer."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self.name = " ".join(map(str, command[:2]))
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env={**os.environ, **(env or {})}, **pipes)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, which is told below
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()}; what it said stands above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def requests() -> tuple[Iterator[dict[str, Any]], Callable[..., None]]:
    """The worker's side: (requests, answer). What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    return map(json.loads, sys.stdin), answer


class Clock:
    """Seconds since it was made: by the clock, and of processors."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self.started[0],
            "processor": time.process_time() - self.started[1],
        }


class Memory:
    """Resident memory from now on."""

    def __init__(self) -> None:
        self.highest = 0
        self.restart()
        self.before = _status("VmRSS")

    def restart(self) -> None:
        """The peak starts anew, and what is free but still held is given back; what was held at first stays."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
        self.highest = max(self.highest, _status("VmHWM"))
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> dict[str, int]:
        """Bytes. growth: the peak since, above what was held at first; process: the peak of the whole process."""
        return {"growth": _status("VmHWM") - self.before, "process": max(self.highest, _status("VmHWM"))}


def _status(name: str) -> int:
    """Bytes of a field of /proc/self/status (VmRSS, VmHWM)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
