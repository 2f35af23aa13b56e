"""Runs a loader on hostile files and watches it: how long, which errors, which files, programs and sockets."""

import contextlib
import dataclasses
import faulthandler
import gc
import os
import pathlib
import signal
import sys
import unittest.mock
from collections.abc import Callable

import hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosepo_jax.errors import UserError

DEFAULT = 50  # cases a loader; ROSEPO_FUZZ gives another number
_HARD = 120  # seconds by the clock, after which the process ends: for code that no signal interrupts


@dataclasses.dataclass(frozen=True)
class Loader:
    """`make` writes valid files into a folder; `call` reads them, told which one is damaged.

    damaged: patterns of the files that are. share: of the number of cases, for slow loaders. seconds: of computing that
    a case may take, so that a busy machine fails none.
    """

    name: str
    make: Callable[[pathlib.Path], object]
    call: Callable[[pathlib.Path, pathlib.Path], object]
    damaged: tuple[str, ...]
    share: float = 1.0
    seconds: float = 5.0

    def files(self, folder: pathlib.Path) -> list[pathlib.Path]:
        return sorted({path for pattern in self.damaged for path in folder.glob(pattern) if path.is_file()})


# Where something is wrong, beside files: keys of a config, and what stands for several files.
_PLACES = ("config", "data.", "--sweep", "results.json", "chat template", "prediction files of")


class Hang(BaseException):
    """No handler of errors may swallow it."""


def survives(loader: Loader, folder: pathlib.Path, cases: int) -> None:
    """Reads the valid files, then `cases` times ones of which one is hostile."""
    paths = loader.files(folder)
    assert paths, loader.damaged
    valid = {path: path.read_bytes() for path in paths}
    strategies = {path: hostile.content(path, content) for path, content in valid.items()}
    for path in paths:
        loader.call(folder, path)  # what is imported or cached the first time, is so now; valid files are read
    before = listing(folder.parent)
    open_files = len(os.listdir("/proc/self/fd"))

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=cases <= DEFAULT, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(paths).flatmap(lambda path: st.tuples(st.just(path), strategies[path])))
    def case(drawn):
        path, content = drawn
        path.write_bytes(content)
        try:
            once(loader, folder, path)
        finally:
            path.write_bytes(valid[path])
        assert listing(folder.parent) == before

    with unittest.mock.patch("os.fsync"):  # nothing of this has to survive a power cut
        case()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= open_files + 5


def once(loader: Loader, folder: pathlib.Path, path: pathlib.Path) -> None:
    """One case: the loader returns, or raises UserError with one line that says where; nothing else happens."""
    with watched(folder) as events, deadline(loader.seconds):
        try:
            loader.call(folder, path)
        except UserError as error:
            message = str(error)
            assert message.splitlines() == [message], message
            assert any(place in message for place in (str(folder), path.name, *_PLACES)), message
    assert not events, events


@contextlib.contextmanager
def deadline(seconds: float):
    def hang(*_):
        raise Hang(f"more than {seconds} s")

    faulthandler.register(signal.SIGALRM, chain=True)  # shows where it hangs, then the signal ends the process
    signal.setitimer(signal.ITIMER_REAL, _HARD)
    previous = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        signal.setitimer(signal.ITIMER_REAL, 0)


def listing(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder))


# ---- what a loader does beside reading ------------------------------------------------------------------------------

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FILES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
_NEVER = {
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class"),
}
_state: dict = {"folder": None, "events": []}


@contextlib.contextmanager
def watched(folder: pathlib.Path):
    """The list of what should not have happened, which fills while the block runs."""
    events: list[str] = []
    _state.update(folder=str(folder), events=events)
    try:
        yield events
    finally:
        _state["folder"] = None


def _audit(event: str, arguments: tuple) -> None:
    folder = _state["folder"]
    if folder is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or (isinstance(flags, int) and flags & _WRITES)
        if writes and isinstance(path, str | bytes) and _is_outside(path, folder):
            _state["events"].append(f"open {path!r} {mode} {flags}")
    elif event in _FILES:
        for path in arguments:
            if isinstance(path, str | bytes) and _is_outside(path, folder):
                _state["events"].append(f"{event} {path!r}")
    elif event in _NEVER:
        _state["events"].append(f"{event} {arguments!r}"[:300])


def _is_outside(path: str | bytes, folder: str) -> bool:
    real = os.path.realpath(os.fsdecode(path))
    inside = os.path.realpath(folder)
    return not (real == inside or real.startswith(inside + os.sep) or "__pycache__" in real or real == os.devnull)


sys.addaudithook(_audit)
