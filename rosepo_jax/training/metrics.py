"""What a run says while it goes: metrics.jsonl, TensorBoard event files (without TensorFlow), progress."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TextIO

import jax

from rosepo_jax import distributed, files
from rosepo_jax.data import layouts
from rosepo_jax.training.goodput import Clock

Batch = Mapping[str, Any]

# What a clock or a device decides: keys of metrics.jsonl in which equal runs differ.
MEASURED = (
    *("prompts_per_second", "pairs_per_second", "tokens_per_second", "tokens_useful", "flops_per_second", "mfu"),
    *("input_stall", "memory/peak_bytes", "compile_seconds"),
)
PLAIN_SECONDS = 30.0  # where no terminal is watching, a line this often is enough to see that a run is alive


class MetricWriter:
    """Appends one line `{"step": ..., **values}` a call to `<directory>/metrics.jsonl`, and the same to TensorBoard.

    Every line is flushed, so a killed run loses none. Values that are not finite are written as null: JSON has no NaN.
    Processes other than the first write nothing.

    Args:
        directory: where metrics.jsonl and the event files go; made with the first row.
        tensorboard: whether to write event files too (through tensorboardX).
        resume_step: the last step of the checkpoint that training goes on from: rows after it, and a line that a kill
            left torn, are removed, atomically. -1 starts afresh. None keeps every row.
    """

    def __init__(self, directory: str | os.PathLike, tensorboard: bool, resume_step: int | None = None):
        self.directory = pathlib.Path(directory)
        self.tensorboard = tensorboard
        self.resume_step = resume_step
        self.file: TextIO | None = None
        self.events: Any = None
        path = self.directory / "metrics.jsonl"
        if distributed.is_primary() and path.exists():
            old = path.read_text("utf-8", errors="replace")
            kept = "".join(f"{line}\n" for line in old.splitlines() if _keep(line, resume_step))
            if kept != old:
                files.write_text(path, kept)

    def _open(self) -> TextIO:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.tensorboard:
            import tensorboardX  # slow to import, and not needed without event files

            # TensorBoard itself hides older events from purge_step on.
            purge = None if self.resume_step is None else self.resume_step + 1
            self.events = tensorboardX.SummaryWriter(str(self.directory), purge_step=purge, flush_secs=10)
        return open(self.directory / "metrics.jsonl", "a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row; values are numbers or arrays of one element."""
        if not distributed.is_primary():
            return
        if self.file is None:
            self.file = self._open()
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self.file.write(json.dumps({"step": int(step), **row}, allow_nan=False) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, number in numbers.items():
                self.events.add_scalar(name, number, int(step))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.events is not None:
            self.events.close()
        self.file = self.events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Throughput:
    """How fast updates go: over those counted since the last reading, all hosts together.

    Only time of updates and waiting for their batches counts: `clock`'s buckets step and data.

        prompts_per_second, pairs_per_second    rows, and rows times rejected responses
        tokens_per_second                       that are no padding
        tokens_useful                           their share of all tokens processed
        input_stall                             share of the time that the loop waited for batches
        flops_per_second                        by `flops`, of all tokens processed
        mfu                                     their share of `peak`

    Args:
        batch_size: prompts of an update, over all hosts; a host's part stands for all of it
        flops: FLOPs of an update, from this host's part of its batch; None: not known, and neither are those per second
        peak: FLOP/s of all devices together; None: not known, and neither is mfu
    """

    def __init__(
        self,
        clock: Clock,
        batch_size: int,
        flops: Callable[[Batch], float] | None = None,
        peak: float | None = None,
    ) -> None:
        self.clock, self.batch_size, self.flops, self.peak = clock, batch_size, flops, peak
        self._restart()

    def _restart(self) -> None:
        self._since = self.clock.seconds()
        self._prompts = self._pairs = 0
        self._processed = self._useful = self._flops = 0.0

    def count(self, batch: Batch) -> None:
        """Counts one update by its host's part of the batch."""
        B, R = batch["count_BxR"].shape
        scale = self.batch_size / B
        processed, useful = layouts.tokens(batch)
        self._prompts += self.batch_size
        self._pairs += self.batch_size * (R - 1)
        self._processed += processed * scale
        self._useful += useful * scale
        self._flops += self.flops(batch) * scale if self.flops else 0.0

    def read(self) -> dict[str, float]:
        now = self.clock.seconds()
        step, data = (now[bucket] - self._since[bucket] for bucket in ("step", "data"))
        seconds = max(step + data, 1e-9)
        rates = {
            "prompts_per_second": self._prompts / seconds,
            "tokens_per_second": self._useful / seconds,
            "tokens_useful": self._useful / max(self._processed, 1),
            "input_stall": data / seconds,
        }
        if self._pairs:
            rates["pairs_per_second"] = self._pairs / seconds
        if self.flops:
            rates["flops_per_second"] = self._flops / seconds
            if self.peak:
                rates["mfu"] = self._flops / seconds / self.peak
        self._restart()
        return rates


def peak_memory(programs: Iterable[jax.stages.Compiled]) -> dict[str, float]:
    """`memory/peak_bytes`: the most that a device of this host has held since the process began.

    Devices that do not say, as CPUs, get what the largest of `programs` needs: arguments, temporaries and output that
    takes no argument's place.
    """
    said = [stats.get("peak_bytes_in_use", 0) for device in jax.local_devices() if (stats := device.memory_stats())]
    needed = [
        m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        for program in programs
        if (m := program.memory_analysis()) is not None
    ]
    most = max(said, default=0) or max(needed, default=0)
    return {"memory/peak_bytes": float(most)} if most else {}


def _keep(line: str, resume_step: int | None) -> bool:
    try:
        step = json.loads(line)["step"]
    except (ValueError, RecursionError, KeyError, TypeError):  # half a line of a run that was killed, or damage
        return False
    return type(step) is int and (resume_step is None or step <= resume_step)


def progress(work: Iterable[Any] | int, name: str, total: int | None = None) -> Iterator[Any]:
    """Passes on the items of `work` (an int n stands for range(n)) and shows how far they are, with rate and time left.

    A bar on a terminal; elsewhere a plain line every half minute. Only the first process shows anything, on stderr, so
    that stdout stays readable by programs.
    """
    items = range(work) if isinstance(work, int) else work
    if total is None and isinstance(items, Sized):
        total = len(items)
    items = _alive(items)
    if not distributed.is_primary():
        yield from items
    elif sys.stderr.isatty():
        import tqdm  # only needed where there is a terminal

        yield from tqdm.tqdm(items, desc=name, total=total, leave=False, dynamic_ncols=True)
    else:
        yield from _plain_progress(items, name, total)


def _alive(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        distributed.alive()
        yield item


def _plain_progress(items: Iterable[Any], name: str, total: int | None) -> Iterator[Any]:
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= PLAIN_SECONDS:
            said, rate = now, done / (now - start)
            of = "" if total is None else f"/{total}"
            left = "" if total is None else f", {(total - done) / rate:.0f} s left"
            print(f"{name}: {done}{of}, {rate:.3g}/s{left}", file=sys.stderr, flush=True)
