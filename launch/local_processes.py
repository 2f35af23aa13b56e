#!/usr/bin/env python3
"""Several processes on this machine as if they were hosts: N processes of M CPU devices each, for tests and teaching.

    python launch/local_processes.py --processes=4 --devices=2 run --config=configs/demo.py --workdir=runs/demo

Starts `rosepo run ... --distributed` N times; every line that a process writes begins with its number. When one ends
with a mistake the others are stopped. SIGTERM and SIGINT are passed on to all. With --restarts=K a job that was
preempted (status 75) or killed is started again, K times at most. --dry-run prints what would be started, and the
environment that is added. The exit status is that of the first process that did not end well, else 0.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

PREEMPTED = 75
GRACE = 30.0  # seconds that the others get to end by themselves


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(process: int, processes: int, devices: int, port: int | str) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }


def pass_on(child: subprocess.Popen, process: int) -> threading.Thread:
    """Copies what a child writes, line by line, with its number."""

    def copy() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(f"[{process}] {line}")
            sys.stdout.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def job(command: Sequence[str], processes: int, devices: int) -> int:
    """Runs all processes to their end; the first status that is not 0, else 0."""
    port = free_port()
    children = [
        subprocess.Popen(
            command, env={**os.environ, **environment(process, processes, devices, port)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )
        for process in range(processes)
    ]  # fmt: skip
    threads = [pass_on(child, process) for process, child in enumerate(children)]

    def tell(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    status, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        if not status:
            status = next((child.returncode for child in children if child.poll() not in (None, 0)), 0)
            deadline = time.monotonic() + GRACE if status else deadline
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    status = status or next((child.returncode for child in children if child.returncode), 0)
    for thread in threads:
        thread.join()
    for number, handler in before.items():
        signal.signal(number, handler)
    return 128 - status if status < 0 else status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("--restarts", type=int, default=0, help="how often a job that was preempted or killed goes on")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and do nothing")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB ...", help="of rosepo, with its arguments")
    args = parser.parse_args(argv)
    if not args.words or args.processes < 1 or args.devices < 1:
        parser.error("give at least one process and device, and a verb: run --config=configs/demo.py")
    command = [sys.executable, "-m", "rosepo_jax", *args.words, "--distributed"]
    if args.dry_run:
        for process in range(args.processes):
            added = environment(process, args.processes, args.devices, "PORT")
            words = [f"{name}={value}" for name, value in added.items()]
            print(" ".join([*words, shlex.join(["python", *command[1:]])]))
        return 0
    for left in range(args.restarts, -1, -1):
        status = job(command, args.processes, args.devices)
        if left == 0 or not (status == PREEMPTED or status > 128):
            break
        print(f"status {status}: starting again, {left} left", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
