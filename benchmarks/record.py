"""What a benchmark measured as rows of figures, and in RESULTS.md: command, date, machine, one table row a figure."""

import datetime
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"


def machine() -> str:
    """Processor, cores, backend and version of JAX."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores; jax {jax.__version__} on {jax.devices()[0].device_kind}"


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The median of repeats and their range."""
    return {"value": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def append(command: str, rows: Sequence[Mapping[str, Any]], path: pathlib.Path = RESULTS) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"\n## {datetime.date.today().isoformat()}\n", f"`{command}`\n", f"{machine()}\n"]
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in names)} |" for row in rows]
    if not path.exists():
        path.write_text("# What was measured, on what, with which command\n", "utf-8")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
