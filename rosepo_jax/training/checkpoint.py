"""Orbax checkpoints: the training state to resume from, and the parameters a stage hands on."""

import contextlib
import copy
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rosepo_jax import distributed, files
from rosepo_jax.errors import UserError

REDO = "remove the folder of that stage to redo it"


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Not asked here: whoever asks, counts, and the turns of a job's processes are counted by `distributed`."""
        return False


class Checkpoints:
    """Numbered training states with their metadata (JSON) below `directory`, the newest `keep` of them.

    With a state go checksums of its arrays, computed on the devices, and a hash of the metadata: what is read back is
    what was saved, or it is not used.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = directory
        self._manager = _Manager(
            directory.absolute(),
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Saves in the background; an earlier save that failed raises here."""
        self._manager.check_for_errors()
        sealed = _sealed(meta, checksums(state))  # a copy: written later, while the caller's goes on changing
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(sealed))
        saved = self._manager.save(step, args=items, force=True)
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved")

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """The newest whole state, laid out like `like` (arrays with shardings), and its metadata; None where no
        checkpoint is.

        Checkpoints that are damaged are named, passed over and removed.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        steps = {int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()}
        damaged: dict[int, str] = {}
        for step in sorted(steps | set(self._manager.all_steps()), reverse=True):
            state, meta, damage = self._read(step, like)
            (is_damaged,) = distributed.agreed([bool(damage)])
            if not is_damaged:
                self._remove(damaged, f"going on from checkpoint {step}")
                return state, meta
            damaged[step] = damage or "another process cannot read it"
        if damaged:
            what = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            raise UserError(f"{self.directory}: no checkpoint is whole ({what}); remove that folder to start again")
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict, str]:
        """State, metadata and what is wrong with them, in a word or two; "" for nothing."""
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        if step not in self._manager.all_steps():
            return None, {}, "not committed"
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        try:
            with _unheard():
                found = self._manager.restore(step, args=items)
            meta, sums = _unsealed(found["meta"])
            changed = [path for path, value in checksums(found["state"]).items() if sums.get(path) != value]
            return found["state"], meta, f"{changed[0]} is not what was saved" if changed else ""
        except Exception as error:  # whatever damage does to the libraries that read it
            return None, {}, _shown(error)

    def _remove(self, damaged: Mapping[int, str], then: str) -> None:
        for step, damage in damaged.items():
            if distributed.is_primary():
                print(f"{self.directory / str(step)}: damaged ({damage}); {then}", file=sys.stderr, flush=True)
                shutil.rmtree(self.directory / str(step))
        if damaged:
            distributed.barrier("damaged checkpoints removed")
            self._manager.reload()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(directory: pathlib.Path, params: Mapping[str, jax.Array]) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        sums = {"checksums": checksums(dict(params))}
        checkpointer.save(directory.absolute(), dict(params), force=True, custom_metadata=sums)


def remove_others(directory: pathlib.Path, names: Collection[str]) -> None:
    """Removes the folders of `directory` that have none of these names."""
    for path in directory.iterdir() if distributed.is_primary() else ():
        if path.name not in names:
            shutil.rmtree(path)


def hand_on(chosen: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `chosen` the folder `target` and removes what lies beside it; a call that was cut short can be repeated."""
    if distributed.is_primary() and chosen.parent.exists():
        if chosen.exists():
            shutil.rmtree(target, ignore_errors=True)
            chosen.rename(target)
        shutil.rmtree(chosen.parent)
    distributed.barrier("model handed on")


def load_params(directory: pathlib.Path, like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Parameters laid out like `like` (arrays or ShapeDtypeStructs with shardings).

    Raises:
        UserError: there are none, they have other shapes or dtypes, or they are not what was saved.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no model here")
    target = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in like.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        stored, sums = _whole(directory, lambda: _described(checkpointer.metadata(directory.absolute())))
        for path, x in target.items():
            found = stored.get(path)
            if found is None or tuple(found.shape) != tuple(x.shape) or found.dtype != x.dtype:
                have = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
                raise UserError(f"{directory}: {path} is {have}, expected {x.dtype}{list(x.shape)}")
        params = _whole(directory, lambda: checkpointer.restore(directory.absolute(), target))
    for path, found in checksums(params).items():
        if found != sums.get(path):
            raise UserError(f"{directory}: {path} is not what was saved; {REDO}")
    return params


def _described(metadata: Any) -> tuple[Mapping[str, Any], Mapping[str, int]]:
    if metadata.item_metadata is None:
        raise ValueError("nothing says what is in it")
    return dict(metadata.item_metadata.tree), dict(metadata.custom_metadata["checksums"])


def _whole(directory: pathlib.Path, read: Callable[[], Any]) -> Any:
    try:
        with _unheard():
            return read()
    except Exception as error:  # whatever damage does to the libraries that read it
        raise UserError(f"{directory}: is damaged ({_shown(error)}); {REDO}") from None


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Within, Orbax logs nothing: what is wrong is said once, in our words."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shown(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _sealed(meta: Mapping[str, Any], sums: Mapping[str, int]) -> dict[str, Any]:
    sealed = {"meta": copy.deepcopy(dict(meta)), "checksums": dict(sums)}
    return sealed | {"hash": files.hash_json(sealed)}


def _unsealed(sealed: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    said = sealed.pop("hash", None)
    if said != files.hash_json(sealed):
        raise ValueError("the metadata is not what was saved")
    return sealed["meta"], sealed["checksums"]


def checksums(tree: Any) -> dict[str, int]:
    """A number for each array of a tree, by its path; the same on any mesh."""
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
    return dict(zip(named, map(int, jax.device_get(_sums(list(named.values()))))))


@jax.jit
def _sums(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return list(map(_checksum, leaves))


def _checksum(x: jax.Array) -> jax.Array:
    """sum_i (2 i + 1) bits_i mod 2^32 over all places i: a change of any one element shows. Places are counted axis by
    axis, since a flat copy would gather what lies on many devices."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
