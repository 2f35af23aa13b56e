"""Every protocol asked of one small random model, with any number of devices, hosts and rows at a time.

`python asked.py FOLDER PROCESS PROCESSES PORT` does it as one of several processes; the first prints the figures.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from rosepo_jax import config as defaults
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.evaluation import baselines, protocols, summary
from rosepo_jax.stages import prepare, runtime
from rosepo_jax.training import checkpoint, policy, sharding


def settings():
    c = defaults.default()
    c.data.world.update({"users": 50, "titles": 60, "series": 15, "length": 8})
    c.data.core_user, c.data.core_item, c.data.min_history, c.data.windows = 3, 2, 2, True
    c.data.split, c.data.test_share, c.data.history, c.data.max_test = "user_ratio", 0.6, 3, 23
    c.model.update({"vocabulary": 300, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 24})
    c.model.prompt_length, c.model.response_length = 512, 64
    c.evaluate.update({"beams": 6, "budget": 30, "top": 5, "bootstrap": 50, "probe_rows": 0})
    return c


def make(folder: pathlib.Path) -> None:
    """The data set, and a model with random weights that has opinions."""
    c = settings()
    prepared = runtime.execute(prepare, c, folder)
    titles = Catalogue.load(prepared / "catalogue.jsonl").titles
    mesh = mesh_of(jax.devices()[:1])
    new = policy.create(c, folder / "model", mesh, titles)
    sharper = {path: value * (3.0 if path == "embedding" else 1.0) for path, value in new.trainable.items()}
    checkpoint.save_params(folder / "model" / "model", sharper)


def mesh_of(devices) -> Mesh:
    return Mesh(np.array(devices).reshape(1, -1, 1), sharding.AXES)


def figures(folder: pathlib.Path, mesh: Mesh, batch_size: int, order=lambda rows: rows) -> dict:
    """protocol -> model -> cells, plain JSON; `order` may rearrange the rows."""
    c, prepared = settings(), folder / "prepare"
    c.evaluate.batch_size = batch_size
    catalogue = Catalogue.load(prepared / "catalogue.jsonl")
    model = policy.load(c, folder / "model", mesh)
    titles = TitleTable(model.encoder, catalogue.titles)
    embedding_IxD = np.random.default_rng(0).standard_normal((len(catalogue), 8))
    train = store.read(prepared / "dataset", "train")
    counts = baselines.cooccurrence_counts(train.history_ExN, train.target_E, len(catalogue))
    floors = {"cooccurrence": lambda rows, items: baselines.cooccurrence_scores(counts, rows.history_ExN, items)}
    found = {}
    for name, protocol in protocols.PROTOCOLS.items():
        rows = order(protocols.rows_of(c, prepared, name))
        answers = protocol.ask(protocols.Setting(c, catalogue, rows, titles), {"model": model}, floors)
        ground = summary.Ground(rows, catalogue, embedding_IxD, c.evaluate.neighbours, protocol.bound)
        found[name] = {
            model: summary.describe(answer, ground, c.evaluate.bootstrap, c.seed)[0]
            for model, answer in answers.items()
        }
    return json.loads(json.dumps(runtime.plain(found)))


def main(folder: str, process: str, processes: str, port: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    found = figures(pathlib.Path(folder), mesh_of(jax.devices()), 8)
    if process == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
