"""Stages that several runs share: each is made once, by whoever comes first of any number of processes."""

import contextlib
import fcntl
import functools
import os
import pathlib
import time
from collections.abc import Iterator

from rosepo_jax import distributed, files, forms
from rosepo_jax.errors import UserError

MANIFEST, BEGUN = "manifest.json", "begun.json"  # of a stage's folder: once it is complete, from the moment work starts
POLL = 0.2  # seconds between two looks at a lock that another process holds


class Pool:
    """The stages of a workdir and of the runs below its sweep/.

    Locks are flock's, on files below sweep/locks: the kernel drops them when their holder dies, however it dies.
    Between hosts they hold where the shared file system has flock: NFS from version 4 on, Lustre mounted with `flock`;
    the lock of a host that is lost goes when the server gives up its lease.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = pathlib.Path(workdir)

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

    @contextlib.contextmanager
    def claim(self, name: str, what: str) -> Iterator[None]:
        """Within, no other process has the same name; waits for it. Processes of one job claim together."""
        with contextlib.ExitStack() as stack:
            if distributed.is_primary():
                stack.enter_context(_locked(self.workdir / "sweep" / "locks" / f"{name}.lock", what))
            distributed.barrier(f"{what} claimed")
            yield

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
def _locked(path: pathlib.Path, what: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    print(f"{what}: another process is at it; waiting", flush=True)
                waiting = True
                distributed.alive()
                time.sleep(POLL)
            except OSError as error:
                raise UserError(
                    f"{path}: no locks on this file system ({error.strerror}); choose a --workdir on one that has"
                ) from None
        yield
