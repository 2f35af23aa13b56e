"""Where the time of a training stage goes, over all its starts: goodput is the share of updates that count."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from rosepo_jax import distributed, files, forms
from rosepo_jax.errors import UserError

FILE = "goodput.jsonl"
ONCE = ("init", "compile")  # every start pays for these; nothing of them is lost with updates
BUCKETS = (*ONCE, "data", "step", "checkpoint", "evaluation")
LINE = {"start": int, "update": int, **dict.fromkeys(BUCKETS, float)}
OFTEN = 1.0  # seconds between lines, so that a kill hides little


class Clock:
    """The seconds of this start, each in the one bucket that is open: `init` before any other."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(BUCKETS, 0.0)
        self._open = ["init"]
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def spent(self, bucket: str) -> Iterator[None]:
        """Time within belongs to `bucket`, and to no bucket around it."""
        self._turn()
        self._open.append(bucket)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def waiting(self, items: Iterator[Any]) -> Iterator[Any]:
        """Passes on items; until there is one, time is `data`."""
        while True:
            with self.spent("data"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """By bucket, up to now."""
        self._turn()
        return dict(self._seconds)

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


class Journal:
    """Appends lines `{"start": n, "update": k, bucket: seconds of this start so far, ...}` to goodput.jsonl.

    Nothing is ever taken out: what a kill made void, `totals` finds lost. Processes but the first write nothing.
    """

    def __init__(self, directory: pathlib.Path, clock: Clock):
        self.clock = clock
        self._last = -OFTEN
        self._file: TextIO | None = None
        if distributed.is_primary():
            path = directory / FILE
            old = read(path)
            self._start = 1 + old[-1]["start"] if old else 1
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):  # torn by a kill
                self._file.write("\n")

    def line(self, update: int, always: bool = False) -> None:
        """Says where the time went up to `update`, at most once a second, or `always`."""
        now = time.monotonic()
        if self._file is not None and (always or now - self._last >= OFTEN):
            self._last = now
            seconds = {bucket: round(value, 4) for bucket, value in self.clock.seconds().items()}
            self._file.write(json.dumps({"start": self._start, "update": update, **seconds}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where there is no file."""
    found = []
    for number, line in files.lines(path) if path.exists() else ():
        with contextlib.suppress(UserError):  # a kill tore it
            found.append(forms.check(files.parse_json(line, f"{path}: row {number}"), LINE, path, ""))
    return found


def totals(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by bucket over all starts, and `lost`: what a start spent after the update that the next began from.

    A start's first line names the update it begins from. `init` and `compile` are never lost, only paid again.
    """
    starts: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        starts.setdefault(line["start"], []).append(line)
    found = dict.fromkeys((*BUCKETS, "lost"), 0.0)
    order = [starts[number] for number in sorted(starts)]
    for this, following in zip(order, [*order[1:], None]):
        counted = this if following is None else [row for row in this if row["update"] <= following[0]["update"]]
        last, kept = this[-1], counted[-1] if counted else this[0]
        for bucket in BUCKETS:
            found[bucket] += last[bucket] if bucket in ONCE else kept[bucket]
            found["lost"] += 0.0 if bucket in ONCE else last[bucket] - kept[bucket]
    return found
