"""Who is at what: one job at a time in a workdir; stages that several runs share are made once, by whoever is first."""

import contextlib
import fcntl
import functools
import os
import pathlib
import time
from collections.abc import Iterator
from typing import IO

from rosepo_jax import distributed, files, forms
from rosepo_jax.errors import UserError

MANIFEST, BEGUN = "manifest.json", "begun.json"  # of a stage's folder: once it is complete, from the moment work starts
LOCK = ".lock"  # of a workdir
POLL = 0.2  # seconds between two looks at a lock that another process holds


class Pool:
    """The stages of a workdir and of the runs below its sweep/."""

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = pathlib.Path(workdir)
        self.locks = self.workdir / "sweep" / "locks"

    @classmethod
    def around(cls, workdir: str | os.PathLike) -> "Pool | None":
        """The pool that a workdir belongs to, if it is a run of a sweep."""
        above = pathlib.Path(workdir).absolute().parent
        pool = cls(above.parent)
        return pool if above.name == "sweep" and pool.locks.is_dir() else None

    def find(self, identity: str) -> pathlib.Path | None:
        """The folder of the complete stage with this identity."""
        return self._folder(identity, f"*/{MANIFEST}", f"sweep/*/*/{MANIFEST}")

    def take_over(self, identity: str, out: pathlib.Path) -> None:
        """Moves what was begun of a stage in another run to `out`, if nothing is there; who has claimed the identity
        knows that nobody is at it any more."""
        absent = distributed.is_primary() and not out.exists()
        left = self._folder(identity, f"sweep/*/*/{BEGUN}") if absent else None
        if left is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            left.rename(out)
        distributed.barrier(f"{out.name} taken over")

    def claim(self, name: str, what: str) -> contextlib.AbstractContextManager[None]:
        """Within, no other job has the same name; `held` by a file of the pool.

        Errors: UserError where the file system has no locks.
        """
        self.locks.mkdir(parents=True, exist_ok=True)
        return held(self.locks / f"{name}.lock", what)

    def _folder(self, identity: str, *patterns: str) -> pathlib.Path | None:
        for path in (path for pattern in patterns for path in sorted(self.workdir.glob(pattern))):
            with contextlib.suppress(OSError, UserError):  # others move and remove folders meanwhile
                if _identity(path, path.stat().st_mtime_ns) == identity:
                    return path.parent.resolve()
        return None


@functools.lru_cache(maxsize=4096)
def _identity(path: pathlib.Path, _changed: int) -> str:
    return forms.check(files.read_json(path), {"identity": str}, path, "remove that folder to redo it")["identity"]


@contextlib.contextmanager
def held(path: pathlib.Path, what: str, needed: bool = True) -> Iterator[None]:
    """Within, no other job holds the same file; waits for it. The processes of one job hold it together.

    The locks are flock's: the kernel drops them when their holder dies, however it dies. Between hosts they hold where
    the shared file system has flock: NFS from version 4 on, Lustre mounted with `flock`; the lock of a host that is
    lost goes when the server gives up its lease.

    Args:
        needed: where there are no locks, to say so; else to go on without.
    """
    with contextlib.ExitStack() as stack:
        if distributed.is_primary():
            try:
                stack.enter_context(_locked(path, what))
                stack.callback(path.unlink, missing_ok=True)  # while it is held: who waits sees that it has gone
            except OSError as error:
                if needed:
                    raise UserError(
                        f"{path}: no locks on this file system ({error.strerror}); choose a --workdir on one that has"
                    ) from None
        distributed.barrier(f"{what} held")
        yield


def _locked(path: pathlib.Path, what: str) -> IO[str]:
    """The file at `path`, made, open and locked."""
    waiting = False
    while True:
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(open(path, "a"))
            if _lock(file) and _is_at(file, path):
                closing.pop_all()
                return file
        if not waiting:
            print(f"{what}: another process is at it; waiting", flush=True)
        waiting = True
        distributed.alive()
        time.sleep(POLL)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[str], path: pathlib.Path) -> bool:
    """Whether it is still the file at that path, and not one that its last holder removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
