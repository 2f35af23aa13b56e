"""Configs from Python files and from the command line, checked against the keys and types of `config.default()`."""

import contextlib
import functools
import importlib.util
import math
import pathlib
import re
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rosepo_jax import config as defaults
from rosepo_jax import files, forms
from rosepo_jax.errors import UserError, nearest

# Names that users of TRL know: each sets the keys on the right, "" standing for the value given.
ALIASES = {
    "align.label_smoothing": {"align.smoothing.mode": "fixed", "align.smoothing.value": ""},
    "align.loss_type": {"align.objective": ""},
}
# In no name or pattern: NUL and other control characters, and bytes of the command line that are no UTF-8.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"align.beta": 0.1, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def load(spec: str | None, overrides: Iterable[tuple[str, Any]] = ()) -> ConfigDict:
    """The config of "path/NAME.py", "path/NAME.py:ARG" or a saved config.json, with the overrides applied in order.

    None stands for the defaults.
    """
    config = defaults.default()
    if spec is not None:
        path, argument = _split(spec)
        for key, value in flatten(_read(path, argument)).items():
            _set(config, key, value, f"{path}: ")
    for key, value in overrides:
        override(config, key, value)
    return config


def _read(path: pathlib.Path, argument: str) -> Mapping[str, Any] | ConfigDict:
    if path.suffix == ".json":
        return forms.check(files.read_json(path), dict, path, "give a config.json that a run wrote")
    module = _module(path)
    with _one_line(path):
        found = module.get_config(argument)
    if not isinstance(found, ConfigDict):
        raise UserError(f"{path}: get_config returned {type(found).__name__}; it must return a ConfigDict")
    return found


def get_sweep(spec: str) -> list[dict[str, Any]] | None:
    """What the config file's get_sweep() says, or runs.json beside a saved config: one dict of overrides a run.

    None when there is neither.
    """
    path, _ = _split(spec)
    if path.suffix == ".json":
        listed = path.with_name("runs.json")
        return _runs(listed) if listed.is_file() else None
    function = getattr(_module(path), "get_sweep", None) if path.suffix == ".py" else None
    if function is None:
        return None
    with _one_line(path):
        return [dict(run) for run in function()]


def _runs(path: pathlib.Path) -> list[dict[str, Any]]:
    runs = files.read_json(path)
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{path}: not a list of runs, each {{KEY: VALUE, ...}}")
    return runs


def _split(spec: str) -> tuple[pathlib.Path, str]:
    """ "configs/demo.py:smoke" -> (configs/demo.py, "smoke")."""
    path, separator, argument = spec.partition(".py:")
    return pathlib.Path(f"{path}.py" if separator else spec), argument


def override(config: ConfigDict, key: str, value: Any) -> None:
    """Sets `config.<key>` in place, reading text as the type of the key's default; aliases are resolved.

    Raises:
        UserError: the key does not exist (the nearest is named), or the value is not of the type of its default.
    """
    for name, text in ALIASES.get(key, {key: ""}).items():
        _set(config, name, text or value)


@functools.cache
def _known() -> dict[str, Any]:
    """Every key with its default, made once: loading a config looks up each of its keys here."""
    return flatten(defaults.default())


def _set(config: ConfigDict, key: str, value: Any, where: str = "") -> None:
    known = _known()
    if key not in known:
        if any(name.startswith(f"{key}.") for name in known):
            raise UserError(f"{where}config.{key} is a section; set one of its keys")
        raise UserError(f"{where}unknown config key {key}{nearest(key, [*known, *ALIASES])}")
    kind = type(known[key])
    try:
        typed = _typed(value, kind)
    except (ValueError, OverflowError):
        raise UserError(f"{where}config.{key}={value!r:.200} is not {_KINDS[kind]}") from None
    least, most = limits(key, kind)
    if kind in (int, float) and not least <= typed <= most:
        raise UserError(f"{where}config.{key}={typed}: must be {least:,} to {most:,}")
    with config.unlocked():
        config.update_from_flattened_dict({key: typed})


# Numbers beside which nothing works: whole numbers are counts, most of them of things of which there must be one.
_POSITIVE = re.compile(
    r"data\.(history|candidates|world\.(users|titles|genres|series|length|slate))"
    r"|model\.(vocabulary|width|layers|heads|kv_heads|mlp_width|prompt_length|response_length|lora\.rank)"
    r"|oracle\.(width|layers|heads)|pairs\.(negatives|beams|top)|evaluate\.(beams|top|neighbours|bootstrap)"
    r"|.*\.(batch_size|accumulate)|checkpoint\.keep|log\.every"
)
_SHARES = re.compile(r".*(_share|\.flip|dropout)|data\.world\.exposure")


def limits(key: str, kind: type) -> tuple[float, float]:
    """The least and the largest value of a number."""
    if kind is float:
        return (0, 1) if _SHARES.fullmatch(key) else (-1e100, 1e100)
    if key in ("seed", "data.seed"):
        return 0, 2**63 - 1
    return -1 if key.startswith("mesh.") else int(_POSITIVE.fullmatch(key) is not None), 2**31 - 1


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text of one line",
    tuple: "a list of words separated by commas",
}


def _typed(value: Any, kind: type) -> Any:
    """`value` as `kind`; text is parsed, and no other conversion loses anything. ValueError otherwise."""
    if isinstance(value, str):
        if _UNWRITABLE.search(value):
            return _fail()
        if kind is bool:
            return {"true": True, "false": False}[value.lower()] if value.lower() in ("true", "false") else _fail()
        if kind is tuple:
            return tuple(item.strip() for item in value.split(",") if item.strip())
        typed = kind(value)
        return typed if kind is not float or math.isfinite(typed) else _fail()
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(item if isinstance(item, str) else _fail() for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        return _fail()
    return value


def _fail() -> Any:
    raise ValueError


def _module(path: pathlib.Path) -> types.ModuleType:
    """Runs the user's config file."""
    if not path.is_file():
        siblings = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise UserError(f"{path}: no such config file{nearest(path.name, [p.name for p in siblings])}")
    specification = importlib.util.spec_from_file_location(f"rosepo_config_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise UserError(f"{path}: not a Python file; a config is a .py file with get_config(arg)")
    module = importlib.util.module_from_spec(specification)
    with _one_line(path):
        specification.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: has no get_config(arg)")
    return module


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Turns an error in the user's config file into one line that names the file and the row."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        rows = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        row = error.lineno if isinstance(error, SyntaxError) else rows[-1] if rows else None
        raise UserError(f"{path}: line {row}: {type(error).__name__}: {error}") from error
