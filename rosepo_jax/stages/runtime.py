"""How a stage is run: manifests, "up to date", refusal of changed settings, leftovers of a killed run.

A stage is a module `rosepo_jax.stages.<verb>` with

    NAME: str                 the verb, and the folder below the workdir
    INPUTS: tuple[str, ...]   the verbs whose folders it reads
    KEYS: tuple[str, ...]     the config sections or dotted keys that determine its result
    RESUMABLE: bool           whether `run` goes on from what a killed run left in `out`
    run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict    a small JSON summary

A stage folder holds begun.json from the moment work starts, and manifest.json, written last, once it is complete.
`<workdir>/config.json` is the config of the last stage that was run, for later commands without --config.
"""

import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import math
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import rosepo_jax
from rosepo_jax import configuration, distributed, files, forms
from rosepo_jax.errors import UserError
from rosepo_jax.stages.pool import BEGUN, LOCK, MANIFEST, Pool, held
from rosepo_jax.training import programs

# Config values that name files of the user: what counts is their content, not where they lie.
PATH_KEYS = (
    *("data.path", "data.titles", "data.template", "pairs.path"),
    *("model.path", "model.architecture", "model.adapter"),
)

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "tensorflow-datasets"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "qwix", "ml_collections", "numpy", "scipy"),
)

WANTED = {"identity": str, "config": dict, "inputs": dict, "code": str}  # of both, as they are read


def say(text: str) -> None:
    """Prints a line, on the first process only."""
    if distributed.is_primary():
        print(text, flush=True)


def module(verb: str) -> Any:
    """The stage of a verb."""
    return importlib.import_module(f"rosepo_jax.stages.{verb}")


def execute(stage: Any, config: ConfigDict, workdir: str | os.PathLike) -> pathlib.Path:
    """Runs a stage unless its folder is up to date, and returns that folder. Other jobs at the same workdir wait.

    The runs of a sweep share their stages: one that is complete in another run is linked into `workdir` instead of
    being run again, one that was begun there and left goes on here, and no two jobs are at the same one.

    Raises:
        UserError: an input is missing or was made with other settings, or what lies in the folder was.
    """
    programs.keep(config)
    out = pathlib.Path(workdir) / stage.NAME
    pool = Pool.around(workdir)
    wanted = _wanted(stage, config, workdir)
    _make_folder(out.parent)
    with contextlib.ExitStack() as alone:
        alone.enter_context(held(out.parent / LOCK, stage.NAME, needed=False))
        if pool is not None:
            alone.enter_context(pool.claim(wanted["identity"], stage.NAME))
        if out.is_symlink() and not (out / MANIFEST).exists() and distributed.is_primary():
            out.unlink()  # a shared stage that was removed; or what would lead out of the workdir
        recorded = _read(out / MANIFEST)
        shared = pool.find(wanted["identity"]) if pool is not None and recorded is None else None
        if shared is not None and out.exists() and (_read(out / BEGUN) or {}).get("identity") != wanted["identity"]:
            shared = None  # what lies there is not a beginning of the same
        if pool is not None:
            distributed.barrier(f"{stage.NAME} looked up")  # all decide alike, before the first process changes it
        if recorded is not None:
            _refuse_changes(out, recorded, wanted)
            same_code = recorded["code"] == wanted["code"]
            say(f"{stage.NAME}: up to date" + ("" if same_code else f" (made by other code: {recorded['code']})"))
        elif shared is not None:
            if distributed.is_primary():
                _link(out, shared)
            say(f"{stage.NAME}: shared with {shared}")
        else:
            if pool is not None:
                pool.take_over(wanted["identity"], out)
            _run(stage, config, workdir, out, wanted)
        distributed.barrier(f"{stage.NAME} done")
    return out


def _link(out: pathlib.Path, shared: pathlib.Path) -> None:
    if out.exists():
        _remove(out)
    out.symlink_to(os.path.relpath(shared, out.parent.resolve()), target_is_directory=True)


def identity(out: str | os.PathLike) -> str | None:
    """The identity recorded in a complete stage folder; None when it is not complete."""
    manifest = _read(pathlib.Path(out) / MANIFEST, {"identity": str})
    return None if manifest is None else manifest["identity"]


def is_complete(stage: Any, config: ConfigDict, workdir: str | os.PathLike) -> bool:
    """Whether the stage is complete and so are its inputs.

    Errors: UserError when one of them was made with other settings than these.
    """
    out = pathlib.Path(workdir) / stage.NAME
    recorded = _read(out / MANIFEST)
    if recorded is None:
        return False
    _refuse_changes(out, recorded, _wanted(stage, config, workdir))
    return True


def depends_on(stage: Any, key: str) -> bool:
    """Whether a config key is one of those that determine the stage's own work."""
    return any(key == name or key.startswith(f"{name}.") for name in stage.KEYS)


def _run(stage: Any, config: ConfigDict, workdir: str | os.PathLike, out: pathlib.Path, wanted: dict) -> None:
    begun = _read(out / BEGUN)
    others = begun is None and out.exists() and any(out.iterdir())
    distributed.barrier(f"{stage.NAME} looked at")  # from here on the first process changes the folder
    if others:
        raise UserError(f"{out}: holds files that rosepo did not make; choose another --workdir or remove that folder")
    if begun is not None and stage.RESUMABLE:
        _refuse_changes(out, begun, wanted)
        if begun["code"] != wanted["code"]:
            say(f"{stage.NAME}: goes on from a run of other code ({begun['code']})")
    if distributed.is_primary():
        _make_folder(out)
        if begun is None or not stage.RESUMABLE:
            _empty(out)
        files.write_json(out / BEGUN, wanted)
    distributed.barrier(f"{stage.NAME} begun")
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    try:
        result = stage.run(config, {verb: pathlib.Path(workdir) / verb for verb in stage.INPUTS}, out)
    except BaseException as error:
        if distributed.is_primary() and not (stage.RESUMABLE and _worth_keeping(out, error)):
            _remove(out)
        raise
    distributed.barrier(f"{stage.NAME} run")
    if distributed.is_primary():
        manifest = {
            "stage": stage.NAME,
            **wanted,
            "resolved_config": plain(config.to_dict()),
            "resolved_config_hash": files.hash_json(plain(config.to_dict())),
            "packages": _packages(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": {
                "kind": jax.devices()[0].device_kind,
                "backend": jax.default_backend(),
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
            "seeds": {"seed": config.seed},
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "result": plain(result or {}),
        }
        files.write_json(pathlib.Path(workdir) / "config.json", manifest["resolved_config"])
        files.write_json(out / MANIFEST, manifest)
        (out / BEGUN).unlink()
    say(f"{stage.NAME}: done in {time.monotonic() - clock:.0f} s")


def _wanted(stage: Any, config: ConfigDict, workdir: str | os.PathLike) -> dict:
    """What determines the result of a stage: its settings, its inputs and the code; and their hash, its identity."""
    settings, inputs = {}, {}
    for key, value in configuration.flatten(config).items():
        if depends_on(stage, key):
            if key in PATH_KEYS and value and pathlib.Path(value).exists():
                inputs[key] = _fingerprint(value)
            else:
                settings[key] = plain(value)
    for verb in stage.INPUTS:
        inputs[verb] = _input_identity(stage, verb, config, workdir)
    wanted = {"config": settings, "config_hash": files.hash_json(settings), "inputs": inputs, "code": code_version()}
    return {"identity": files.hash_json(wanted), **wanted}


def _input_identity(stage: Any, verb: str, config: ConfigDict, workdir: str | os.PathLike) -> str:
    folder = pathlib.Path(workdir) / verb
    recorded = _read(folder / MANIFEST)
    if recorded is None:
        raise UserError(f"{stage.NAME} needs {folder}: run `rosepo {verb} --workdir={workdir}` (or `rosepo run`) first")
    _refuse_changes(folder, recorded, _wanted(module(verb), config, workdir))
    return recorded["identity"]


def _refuse_changes(out: pathlib.Path, recorded: dict, wanted: dict) -> None:
    """Refuses a folder that was made with other settings or from other inputs than are wanted now."""
    remedy = "choose another --workdir, or remove that folder to redo it"
    old, new = recorded["config"], wanted["config"]
    # A path is a setting while nothing lies there, and an input once something does: never compare across the two.
    gone = set(recorded["inputs"]) & set(new) | set(old) & set(wanted["inputs"])
    changed = [key for key in sorted(old.keys() | new.keys()) if key not in gone and old.get(key) != new.get(key)]
    if changed:
        was = ", ".join(f"{key}={_shown(old, key)}" for key in changed)
        now = ", ".join(f"{key}={_shown(new, key)}" for key in changed)
        raise UserError(f"{out}: was made with {was}; now {now}: {remedy}")
    stale = [
        name for name, value in wanted["inputs"].items() if name not in gone and recorded["inputs"].get(name) != value
    ]
    if stale:
        raise UserError(f"{out}: is stale, {', '.join(stale)} changed since it was made: {remedy}")


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "(absent)"


def _read(path: pathlib.Path, form: forms.Form = WANTED) -> dict | None:
    if not path.exists():
        return None
    return forms.check(files.read_json(path), form, path, "remove that folder to redo it")


def _make_folder(path: pathlib.Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); choose another --workdir") from None


def _worth_keeping(out: pathlib.Path, error: BaseException) -> bool:
    """Whether a stage can go on from what is there. After a user's mistake that is a checkpoint, or nothing: the next
    try will have other settings."""
    if isinstance(error, UserError):
        return any(out.glob("**/checkpoints/*"))
    return any(path.name != BEGUN for path in out.iterdir())


def _empty(out: pathlib.Path) -> None:
    """Removes what a stage wrote, but not begun.json, which says that the folder is ours."""
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != BEGUN:
            path.unlink()


def _remove(out: pathlib.Path) -> None:
    """Removes a stage's folder; begun.json last, so that it stays ours if this is cut short."""
    _empty(out)
    (out / BEGUN).unlink(missing_ok=True)
    out.rmdir()


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers of numpy as Python's, tuples as lists, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, pathlib.Path) else value


def _fingerprint(path: str) -> str:
    """Hash of a file or folder; computed again only when a name, size or time of change differs."""
    root = pathlib.Path(path)
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return _hash_tree(path, tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found))


@functools.lru_cache(maxsize=64)
def _hash_tree(path: str, _state: tuple) -> str:
    return files.hash_tree(path)


@functools.cache
def code_version() -> str:
    """Version of the package and the hash of its sources, e.g. "0.1.0+3f2a9c0d1e5b6a78"."""
    root = pathlib.Path(rosepo_jax.__file__).parent
    sources = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".txt"))
    content = [(str(path.relative_to(root)), path.read_text("utf-8")) for path in sources]
    return f"{rosepo_jax.__version__}+{files.hash_json(content)}"


def _packages() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "missing"
    return installed
