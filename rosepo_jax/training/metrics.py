"""What a run says while it goes: metrics.jsonl, TensorBoard event files (without TensorFlow), progress."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TextIO

import jax
import numpy as np

from rosepo_jax import files

PLAIN_SECONDS = 30.0  # where no terminal is watching, a line this often is enough to see that a run is alive


def is_primary() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


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
        if is_primary() and path.exists():
            old = path.read_text("utf-8")
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
        if not is_primary():
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
    """Rates over the updates counted since the last reading; real tokens only, all hosts together."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._prompts = self._pairs = self._tokens = 0

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts one update by its host's part of the batch."""
        B, R, _ = batch["response_mask_BxRxT"].shape
        self._prompts += B
        self._pairs += B * (R - 1)
        self._tokens += int(batch["prompt_mask_BxP"].sum() + batch["response_mask_BxRxT"].sum())

    def pause(self, seconds: float) -> None:
        """Leaves out time that was not spent on updates."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        scale = jax.process_count() / max(time.perf_counter() - self._since, 1e-9)
        rates = {"prompts_per_second": self._prompts * scale, "tokens_per_second": self._tokens * scale}
        if self._pairs:
            rates["pairs_per_second"] = self._pairs * scale
        self._restart()
        return rates


def _keep(line: str, resume_step: int | None) -> bool:
    try:
        step = json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
    return resume_step is None or step <= resume_step


def progress(work: Iterable[Any] | int, name: str, total: int | None = None) -> Iterator[Any]:
    """Passes on the items of `work` (an int n stands for range(n)) and shows how far they are, with rate and time left.

    A bar on a terminal; elsewhere a plain line every half minute. Only the first process shows anything, on stderr, so
    that stdout stays readable by programs.
    """
    items = range(work) if isinstance(work, int) else work
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not is_primary():
        yield from items
    elif sys.stderr.isatty():
        import tqdm  # only needed where there is a terminal

        yield from tqdm.tqdm(items, desc=name, total=total, leave=False, dynamic_ncols=True)
    else:
        yield from _plain_progress(items, name, total)


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
