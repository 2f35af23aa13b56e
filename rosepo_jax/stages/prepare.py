"""prepare: raw log -> data set of rows with frozen candidates, catalogue, users, train items, statistics.

Artefacts: dataset/ (TFDS, array_record), catalogue.jsonl, users.json (raw ids), train_items.npz (indptr, items: the
train items of every user), statistics.json, and for the embedded world truth.npz (utility_UxI, flipped_UxI).
"""

import io
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import config as defaults
from rosepo_jax import distributed, files
from rosepo_jax.data import sequences, sources, store, world
from rosepo_jax.stages import runtime
from rosepo_jax.training.metrics import progress

NAME = "prepare"
INPUTS: tuple[str, ...] = ()
PROMPT_KEYS = ("template",)  # shapes prompts, not rows
KEYS = tuple(f"data.{key}" for key in defaults.default().data if key not in PROMPT_KEYS)
RESUMABLE = False


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict[str, Any]:
    """Builds the data set of `config.data` below `out`; returns the sizes that manifests show."""
    if not distributed.is_primary():
        return {}
    truth = world.generate(config.data.world, config.data.seed) if config.data.source == "world" else None
    prepared = sequences.build(  # named nowhere else, so that the log can be given up within
        truth.log if truth else sources.read(config.data, config.data.seed), config.data, config.data.seed
    )

    runtime.say(table(prepared.statistics))
    store.write(out / "dataset", prepared.rows, config.data.history, config.data.candidates, progress)
    prepared.catalogue.save(out / "catalogue.jsonl")
    files.write_json(out / "users.json", list(prepared.users))
    _save(out / "train_items.npz", indptr=prepared.train_items[0], items=prepared.train_items[1])
    if truth:
        kept = np.ix_(prepared.raw_user_U, prepared.raw_item_I)
        _save(out / "truth.npz", utility_UxI=truth.utility_UxI[kept], flipped_UxI=truth.flipped_UxI[kept])
    files.write_json(out / "statistics.json", prepared.statistics)
    return {key: prepared.statistics[key] for key in ("users", "items", "interactions", "rows")}


def table(statistics: dict[str, Any]) -> str:
    """The statistics as aligned lines."""
    s, leak, ready_made = statistics, statistics["candidate_leak"], statistics["candidates"]["ready_made"]
    lines = [
        ("users", f"{s['users']:,}"),
        ("items", f"{s['items']:,}"),
        ("interactions", f"{s['interactions']:,}, ordered {s['order']}"),
        ("items of a user", "min {min:,}, median {median:,.1f}, mean {mean:,.1f}, max {max:,}".format(**s["length"])),
        ("split", f"{s['split']['name']}: {s['split']['rule']}"),
        *((f"{name} rows", _split(s, name)) for name, n in s["rows"].items() if n),
        ("Gini of popularity", f"{s['gini']:.3f}"),
        ("duplicate titles", f"{s['duplicate_titles']:,} items"),
        ("titles inside others", f"{s['contained_titles']:,}"),
        ("tied timestamps", f"{s['tied_timestamps']:.1%} of interactions"),
        ("candidates", _candidates(s["candidates"], leak["slots"])),
        *([("ready-made rows", ", ".join(ready_made))] if ready_made else []),
        *((f"leak, {kind}", _probe(leak, kind)) for kind in ("negatives", "slot")),
        *((f"repaired {n:,}", name) for name, n in s["repairs"].items()),
        *((f"dropped {n:,}", name.replace("_", " ")) for name, n in s["dropped"].items() if name != "rows" and n),
    ]
    lines += [("known defect", sentence) for sentence in s["defects"]]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _split(s: dict[str, Any], name: str) -> str:
    left_out = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in s["dropped"]["rows"].get(name, {}).items() if n]
    return ", ".join([f"{s['rows'][name]:,}", f"cold targets {s['cold_start'][name]:.1%}", *left_out])


def _candidates(lists: dict[str, Any], slots: dict[str, int]) -> str:
    ratio = lists["popularity_ratio"]
    easy = "" if ratio is None else f", test targets {ratio:.1f} times as popular as the others"
    return f"{lists['size']}, {lists['sampling']}{easy}; a slot holds {slots['fewest']} to {slots['most']} of them"


def _probe(leak: dict[str, Any], kind: str) -> str:
    probes = {name: leak[name][kind] for name in ("train", "validation")}
    return ", ".join(f"from {name} {{HR@1:.3f}} (chance {{chance:.3f}})".format(**p) for name, p in probes.items())


def _save(path: pathlib.Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy types every keyword as its own allow_pickle
    files.write_bytes(path, buffer.getvalue())
