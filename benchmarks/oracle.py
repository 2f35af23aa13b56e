"""An epoch of the preference oracle (SASRec) beside RecBole's, on the same rows, and what either has learnt.

python benchmarks/oracle.py [--users=4000] [--titles=2000] [--epochs=15] [--recbole-python=PATH] [--record]

Rows come from the embedded world: windows of N items and the item that follows, a row for every step, which are
RecBole's augmented rows too. Width, layers, heads, dropout, batch, learning rate, Adam's constants and the loss, a
softmax over the catalogue, are the same; RecBole puts its norms behind the blocks, ours stand before them.

    last  the loss is that of the last position of a row, as RecBole's
    all   of every position of a row, as oracle.positions is by default

RecBole needs numpy 1: `bash launch/peer_env.sh recbole` makes an environment, .venv-recbole, whose python runs in a
process of its own; epochs take turns. One JSON line per figure: seconds of an epoch (without the first, in which ours
is compiled), ratios within a turn; HR@10 and NDCG@10 of the target among the whole catalogue, on the same test rows, by
the parameters of the best validation NDCG@10, with the paired difference and its 95 % interval; seconds of training
until validation NDCG@10 is RecBole's best.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record
from worker import Clock, Worker, peer, settle

from rosepo_jax import config as defaults
from rosepo_jax.__main__ import keep_freed_memory
from rosepo_jax.data import sequences, world
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation import metrics, predictions
from rosepo_jax.models import sasrec
from rosepo_jax.stages import oracle

SCRIPT = pathlib.Path(__file__).parent / "peer" / "recbole_sasrec.py"
AT_LEAST = 5.0  # RecBole's epoch over ours, positions = last
WIDTH, LAYERS, HEADS, DROPOUT, RATE, SEED = 64, 2, 2, 0.2, 1e-3, 0
SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # RecBole's name -> ours


def make_data(users: int, titles: int) -> sequences.Prepared:
    c = defaults.default().data
    c.core_user = c.core_item = 3
    c.world.users, c.world.titles, c.world.series = users, titles, max(titles // 5, c.world.genres)
    return sequences.build(world.generate(c.world, SEED).log, c, SEED)


class Ours:
    """Trains an epoch at a time."""

    def __init__(self, data: sequences.Prepared, positions: str, batch: int):
        self.data, self.batch, self.epochs = data, batch, 0
        self.train = data.rows["train"]
        self.config = sasrec.SASRecConfig(
            len(data.catalogue), self.train.history_ExN.shape[1], WIDTH, LAYERS, HEADS, DROPOUT
        )
        transformation = optax.adam(RATE)
        params = sasrec.init(self.config, jax.random.key(SEED))
        self.state = params, transformation.init(params)
        self.scan = oracle.epoch_function(self.config, transformation, "ce", positions)
        self.rows = jnp.asarray(self.train.history_ExN), jnp.asarray(self.train.target_E)

    def epoch(self) -> dict[str, float]:
        clock = Clock()
        self.epochs += 1
        order = jnp.asarray(oracle.batch_order(SEED, self.epochs, len(self.train), self.batch))
        self.state, loss = self.scan(self.state, *self.rows, order, jax.random.key(self.epochs))
        loss = float(loss)
        return {**clock.stop(), "loss": loss}

    def ranks(self) -> dict[str, list[int]]:
        return {name: self._ranks(self.data.rows[split]) for name, split in SPLITS.items() if name != "train"}

    def _ranks(self, rows: Rows) -> list[int]:
        found: list[int] = []
        for start in range(0, len(rows), 512):
            part = rows.take(slice(start, start + 512))
            score_BxI = np.asarray(_scores(self.config, self.state[0], part.history_ExN))
            target_Bx1 = np.take_along_axis(score_BxI, part.target_E[:, None], axis=1)
            found += (1 + (score_BxI > target_Bx1).sum(axis=1)).tolist()
        return found


_scores = jax.jit(sasrec.scores, static_argnums=0)


class RecBole:
    """The same by RecBole, in a process of its own."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def epoch(self) -> dict[str, float]:
        return self.worker.ask(do="epoch")

    def ranks(self) -> dict[str, list[int]]:
        return self.worker.ask(do="ranks")


def write_recbole(data: sequences.Prepared, folder: pathlib.Path, batch: int) -> pathlib.Path:
    """The data set in RecBole's files, and the settings of its worker, whose path is returned."""
    (folder / "world").mkdir()
    rows = {name: data.rows[split] for name, split in SPLITS.items()}
    predictions.recbole(folder / "world", "world", rows, data.users, data.catalogue)
    settings = dict(data=str(folder), name="world", width=WIDTH, layers=LAYERS, heads=HEADS, dropout=DROPOUT)
    settings |= dict(batch=batch, learning_rate=RATE, seed=SEED)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "settings.json"


def measure(systems: dict[str, Any], epochs: int) -> Iterator[dict[str, Any]]:
    """Figures of systems with `epoch()` and `ranks()`, by name; those of the others are held against RecBole's."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    valid: dict[str, list[float]] = {name: [] for name in systems}
    test: dict[str, np.ndarray] = {}
    for _ in range(epochs):
        for name, system in systems.items():
            settle()
            taken[name].append(system.epoch())
            found = system.ranks()
            valid[name].append(float(metrics.ndcg(np.array(found["valid"]), 10).mean()))
            if valid[name][-1] == max(valid[name]):
                test[name] = np.array(found["test"])
    seconds = {name: np.array([epoch["seconds"] for epoch in epochs]) for name, epochs in taken.items()}
    for name in systems:
        yield {"figure": "epoch", "system": name, "unit": "s", **record.spread(seconds[name][1:])}
    for name in [name for name in systems if name != "recbole"] if "recbole" in systems else []:
        row = {"figure": "epoch", "system": name, "against": "recbole", "unit": "x"}
        row |= record.spread(seconds["recbole"][1:] / seconds[name][1:])
        yield row | ({"at least": AT_LEAST} if name == "last" else {})
    for name in systems:
        best = int(np.argmax(valid[name]))
        yield {"figure": "loss", "system": name, "unit": f"nats, epoch {epochs}", "value": taken[name][-1]["loss"]}
        for figure, of in (("HR@10", metrics.hit_ratio), ("NDCG@10", metrics.ndcg)):
            value_E = of(test[name], 10)
            yield {"figure": figure, "system": name, "unit": f"epoch {best + 1}", "value": float(value_E.mean())}
            if name != "recbole" and "recbole" in systems:
                difference_E = value_E - of(test["recbole"], 10)
                yield {"figure": figure, "system": name, "against": "recbole", "unit": "more", **interval(difference_E)}
    for name in systems if "recbole" in systems else []:
        reached = np.flatnonzero(np.array(valid[name]) >= max(valid["recbole"]))
        if len(reached):
            value = float(np.median(seconds[name][1:]) * (reached[0] + 1))
            unit = f"s, {reached[0] + 1} epochs"
            yield {"figure": "until RecBole's best", "system": name, "unit": unit, "value": value}


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and its 95 % interval."""
    mean, error = float(values.mean()), 1.96 * float(values.std() / len(values) ** 0.5)
    return {"value": mean, "low": mean - error, "high": mean + error}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recbole-python", default=peer("recbole"), help="of an environment with RecBole; default .venv-recbole's"
    )
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--titles", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--alone", action="store_true", help="without RecBole")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    if not args.alone and not args.recbole_python:
        parser.error("there is no RecBole here: run `bash launch/peer_env.sh recbole`, or add --alone")
    keep_freed_memory()  # as the command line does
    data, rows = make_data(args.users, args.titles), []
    sizes = {split: len(found) for split, found in data.rows.items()}
    print(json.dumps({"figure": "rows", "unit": f"{len(data.catalogue)} items", "value": sizes["train"], **sizes}))
    with tempfile.TemporaryDirectory() as temporary:
        systems: dict[str, Any] = {positions: Ours(data, positions, args.batch) for positions in ("last", "all")}
        theirs = None
        if not args.alone:
            settings = write_recbole(data, pathlib.Path(temporary), args.batch)
            theirs = Worker([args.recbole_python, "-W", "ignore", str(SCRIPT), str(settings)])
            systems = {"recbole": RecBole(theirs), **systems}
        for row in measure(systems, args.epochs):
            rows.append(row)
            print(json.dumps(row), flush=True)
        if theirs is not None:
            theirs.close()
    if args.record:
        given = sys.argv[1:] if argv is None else argv
        words = [word for word in given if not word.startswith("--recbole-python")]
        record.append(" ".join(["python benchmarks/oracle.py", *words]), rows)
    return 0 if all(row["value"] >= row.get("at least", row["value"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
