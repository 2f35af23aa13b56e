"""Orbax checkpoints: the training state to resume from, and the parameters a stage hands on."""

import copy
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from rosepo_jax.errors import UserError


class Checkpoints:
    """Numbered training states with their metadata (JSON) below `directory`, the newest `keep` of them."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Saves in the background; an earlier save that failed raises here."""
        self._manager.check_for_errors()
        meta = copy.deepcopy(meta)  # written later, while the caller's goes on changing
        saved = self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)), force=True
        )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved")

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """The newest state, laid out like `like` (arrays with shardings), and its metadata; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        )
        return restored["state"], restored["meta"]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(directory: pathlib.Path, params: Mapping[str, jax.Array]) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), dict(params), force=True)


def load_params(directory: pathlib.Path, like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Parameters laid out like `like` (arrays or ShapeDtypeStructs with shardings); other dtypes are refused."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no model here")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(directory.absolute()).item_metadata.tree
        for path, target in like.items():
            found = stored.get(path)
            if found is None or tuple(found.shape) != tuple(target.shape) or found.dtype != target.dtype:
                have = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
                raise UserError(f"{directory}: {path} is {have}, expected {target.dtype}{list(target.shape)}")
        target = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in like.items()}
        return checkpointer.restore(directory.absolute(), target)
