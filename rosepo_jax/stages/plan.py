"""The runs of a sweep: from `--sweep` flags or overrides to names, settings and configs; nothing is run here.

align.beta=0.1,0.3                                values; several flags are multiplied
align.beta,sft.learning_rate=0.1:1e-4,0.3:3e-4    keys that move together
align.beta=loguniform(0.01,1)                     a range to draw from, or uniform(0,1); whole numbers for whole keys
"""

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rosepo_jax import configuration, files, seeds
from rosepo_jax.errors import UserError
from rosepo_jax.stages import STAGES, runtime

RUN_STAGES = STAGES[:-1]  # a report of one run: rosepo report --workdir=<the run's folder>
RANGE = re.compile(r"(log)?uniform\(")
BOUNDS = re.compile(r"(log)?uniform\(([^,()]+),([^,()]+)\)")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep. `settings`: what is swept, typed as in the config."""

    number: int  # its place in the plan, from 0
    name: str
    settings: Mapping[str, Any]
    config: ConfigDict

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        return workdir / "sweep" / self.name


@dataclasses.dataclass(frozen=True)
class Values:
    """Values to take one of, each with one word a key."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, evenly or evenly in their logarithms."""

    keys: tuple[str]
    low: float
    high: float
    log: bool
    whole: bool

    def rounded(self, value: float) -> float:
        """As it stands in folder names and tables: whole, or with four digits; never outside."""
        return min(max(round(value) if self.whole else float(f"{value:.4g}"), self.low), self.high)


def planned(config: ConfigDict, overrides: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs of a config with each of the overrides; settings that are listed twice are one run."""
    runs: dict[str, Run] = {}
    before = configuration.flatten(config)
    for changes in overrides:
        changed = config.copy_and_resolve_references()
        for key, value in changes.items():
            configuration.override(changed, key, value)
        after = configuration.flatten(changed)
        swept = runtime.plain({key: after[key] for key in after if key in changes or after[key] != before[key]})
        name = run_id(swept)
        runs.setdefault(name, Run(len(runs), name, swept, changed))
    return list(runs.values())


def run_id(settings: Mapping[str, Any]) -> str:
    """A readable folder name that is a pure function of the settings, whatever their order."""
    words = (f"{key.rpartition('.')[2]}={value}" for key, value in sorted(settings.items()))
    readable = re.sub(r"[^\w.=+-]", "-", "_".join(words), flags=re.ASCII)[:80]
    return f"{readable}-{files.hash_json(settings)[:6]}"


def shared_stages(keys: Sequence[str]) -> list[str]:
    """The stages that come out the same whatever the values of `keys`."""
    shared: list[str] = []
    for verb in RUN_STAGES:
        stage = runtime.module(verb)
        if set(stage.INPUTS) <= set(shared) and not any(runtime.depends_on(stage, key) for key in keys):
            shared.append(verb)
    return shared


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of the settings."""
    keys = {key: None for row in rows for key in row}
    return [key for key in keys if len({files.hash_json(row.get(key)) for row in rows}) > 1]


def save(folder: pathlib.Path, config: ConfigDict, overrides: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes a config and its runs; returns the path of the config, which `rosepo sweep --config` takes."""
    files.write_json(folder / "runs.json", runtime.plain(overrides))
    files.write_json(folder / "config.json", runtime.plain(config.to_dict()))
    return folder / "config.json"


# ---- what --sweep says -----------------------------------------------------------------------------------------------


def parse(config: ConfigDict, flags: Sequence[str]) -> list[Values | Range]:
    """One axis a flag.

    Errors: UserError for a flag that cannot be read, and for a range of something that is no number.
    """
    return [_axis(config, flag) for flag in flags]


def _axis(config: ConfigDict, flag: str) -> Values | Range:
    name, separator, text = flag.partition("=")
    keys = tuple(name.split(","))
    if RANGE.match(text):
        return _range(config, flag, keys, text)
    words = text.split(",")
    if not separator or not all(keys) or not all(words):
        raise UserError(f"--sweep={flag}: write --sweep=KEY=V1,V2")
    values = tuple((word,) if len(keys) == 1 else tuple(word.split(":")) for word in words)
    if any(len(value) != len(keys) or not all(value) for value in values):
        raise UserError(f"--sweep={flag}: {len(keys)} keys need {len(keys)} words a value: --sweep=KEY,KEY=V:W,V:W")
    return Values(keys, values)


def _range(config: ConfigDict, flag: str, keys: tuple[str, ...], text: str) -> Range:
    found = BOUNDS.fullmatch(text)
    try:
        low, high = (float(found[group]) for group in (2, 3)) if found else (math.nan, math.nan)
    except ValueError:
        low, high = math.nan, math.nan
    log = text.startswith("log")
    if len(keys) != 1 or not -math.inf < low < high < math.inf or (log and low <= 0):
        raise UserError(f"--sweep={flag}: write KEY=uniform(LOW,HIGH), or loguniform with LOW above 0")
    whole = _is_whole(config, keys[0], flag)
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"--sweep={flag}: {keys[0]} is a whole number, and so are the bounds")
    return Range((keys[0],), int(low) if whole else low, int(high) if whole else high, log, whole)


def _is_whole(config: ConfigDict, key: str, flag: str) -> bool:
    scratch = config.copy_and_resolve_references()
    try:
        configuration.override(scratch, key, 0.5)
    except UserError:
        try:
            configuration.override(scratch, key, 1)
        except UserError as error:
            raise UserError(f"--sweep={flag}: {error}") from None
        return True
    return False


def product(axes: Sequence[Values | Range]) -> list[dict[str, str]]:
    """Every combination as overrides, the last key changing fastest."""
    choices = []
    for axis in axes:
        if isinstance(axis, Range):
            raise UserError(f"--sweep={axis.keys[0]}: a range is drawn from: give --trials=N")
        choices.append([dict(zip(axis.keys, value)) for value in axis.values])
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*choices)]


def draws(axes: Sequence[Values | Range], trials: int, seed: int) -> list[dict[str, Any]]:
    """`trials` independent draws from all axes; a draw is a function of (seed, its number, its key) alone."""
    found = []
    for trial in range(trials):
        drawn: dict[str, Any] = {}
        for axis in axes:
            share = float(seeds.uniform(seeds.key(seed, "sweep", *axis.keys), trial))
            drawn |= zip(axis.keys, _at(axis, share))
        found.append(drawn)
    return found


def _at(axis: Values | Range, share: float) -> tuple:
    """The value that lies at a share in [0, 1) of the axis."""
    if isinstance(axis, Values):
        return axis.values[int(share * len(axis.values))]
    margin = 0.5 if axis.whole else 0.0  # so that both ends are as likely as what is between
    low, high = axis.low - margin, axis.high + margin
    value = math.exp(math.log(low) + share * math.log(high / low)) if axis.log else low + share * (high - low)
    return (axis.rounded(value),)
