"""Several processes of one job: how they find each other, agree, wait, and are told to stop. One alone needs no other.

What only the host knows is agreed on through the coordination service and not by devices: any thread may ask, whatever
the devices are doing meanwhile.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the coordination service has no public interface
from jax.experimental import multihost_utils

from rosepo_jax.errors import Preempted, UserError

WAIT = 1800.0  # seconds: the longest that nothing at all happens, or that an answer takes
STAGE = 24 * 3600.0  # seconds: the longest that processes wait for what one of them does alone
LEAD = 64  # no process gets this many numbers ahead of another in `gather`

_calls = itertools.count(1)  # of the main thread
_turns = itertools.count(1)  # a count of its own: the turn in which all stop is named in advance
_watched = 0.0
_told, _deferred = False, False


def start() -> None:
    """Joins the other processes of the job; before anything touches a device.

    JAX finds them by itself on TPU pods, in Kubernetes, and under SLURM and Open MPI; elsewhere it is told by
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Errors: UserError when there is nothing to join. When not all have come within five minutes, JAX aborts the process
    (status 134).
    """
    number, count = (os.environ.get(name) for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count), process_id=None if number is None else int(number)
        )
    except (ValueError, TypeError) as error:
        what = " ".join(str(error).split())
        raise UserError(
            f"--distributed: cannot join the other processes ({what}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID, or leave out --distributed"
        ) from None
    if not jax.config.values["jax_enable_preemption_service"]:
        raise UserError("--distributed needs JAX's preemption service: unset JAX_ENABLE_PREEMPTION_SERVICE")


def is_joined() -> bool:
    """Whether this process is one of several."""
    return _client() is not None


def is_primary() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


def gather(topic: str, number: int, value: Any) -> list[Any]:
    """The JSON values of all processes, in their order.

    Every process gives one for each number of a topic, in rising order, though not all at the same time.
    """
    if jax.process_count() == 1:
        return [value]
    client, me = _client(), jax.process_index()
    client.key_value_set(f"rosepo/{topic}/{number}/{me}", json.dumps(value))
    everybody = [
        json.loads(client.blocking_key_value_get(f"rosepo/{topic}/{number}/{process}", int(WAIT * 1000)))
        for process in range(jax.process_count())
    ]
    # Whoever has come this far has read what is so old.
    client.key_value_delete(f"rosepo/{topic}/{number - LEAD}/{me}")
    return everybody


def maximum(topic: str, number: int, values: Sequence[int]) -> list[int]:
    """The largest of each value over all processes; as `gather`."""
    return [max(column) for column in zip(*gather(topic, number, list(values)))]


def agreed(values: Sequence[int]) -> list[int]:
    """`maximum` for the main thread, which asks the same in the same order in every process."""
    alive()
    return maximum("agreed", next(_calls), values)


def barrier(name: str) -> None:
    """Waits until every process is here, `STAGE` seconds at most; in the main thread. Who waits is not silent: one that
    hangs ends itself, one that died is noticed by JAX."""
    if jax.process_count() > 1:
        faulthandler.cancel_dump_traceback_later()
        _client().wait_at_barrier(f"rosepo/{name}/{next(_calls)}", int(STAGE * 1000))
        _watch()


def _client() -> Any:
    return jax_distributed.global_state.client


# ---- Signs of life ---------------------------------------------------------------------------------------------------


def alive() -> None:
    """Says that something has happened. In a job of several processes silence means that one of them hangs: after
    `WAIT` seconds the stacks of all threads go to stderr, and the process ends with status 1."""
    if jax.process_count() > 1 and time.monotonic() > _watched + 1:  # a watch is a thread of its own
        _watch()


def _watch() -> None:
    global _watched
    _watched = time.monotonic()
    faulthandler.dump_traceback_later(WAIT, exit=True)


# ---- Preemption ------------------------------------------------------------------------------------------------------


def heed_sigterm() -> None:
    """SIGTERM, the notice before preemption, raises Preempted, at once or where `deferred` says so.

    In a job of several processes JAX has a handler of its own, which tells all of them.
    """
    if not is_joined():
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: object) -> None:
    global _told
    _told = True
    if not _deferred:
        raise Preempted("told to stop")


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, a notice waits until `told_to_stop` is asked, or for the end."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _told:
        raise Preempted("told to stop")


def told_to_stop() -> bool:
    """Whether to save and stop now. All processes ask equally often, and all hear yes in the same turn."""
    turn = next(_turns)
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(turn)
    return _told
