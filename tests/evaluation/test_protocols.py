"""What a protocol measures depends on rows and model alone, not on how many rows, devices or hosts it is asked with."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import asked
import jax
import numpy as np
import pytest

from rosepo_jax.data import examples
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import protocols


@pytest.fixture(scope="module", autouse=True)
def two_widths():
    """Batches are padded to one of two widths, so that few programs are compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "WIDTHS", [48, 96])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    asked.make(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The figures with one device and 64 rows at a time."""
    return asked.figures(folder, asked.mesh_of(jax.devices()[:1]), 64)


def test_the_figures_say_something(alone):
    """Rows that fill no batch, other windows than candidates, hits and misses, proofs and none."""
    candidates, windows, catalogue = (alone[name]["model"] for name in ("candidates", "windows", "catalogue"))
    assert candidates["HR@1"]["n"] % 7 and candidates["HR@1"]["n"] % 8 and candidates != windows
    assert 0 < windows["HR@1"]["hits"] < windows["HR@1"]["n"]
    assert 0 < catalogue["certified"]["hits"] < catalogue["certified"]["n"]
    assert alone["catalogue"]["model"]["valid_ratio"]["value"] == 1.0
    assert alone["generate"].keys() == {"model"} and alone["catalogue"].keys() == {"model", "cooccurrence"}


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 1), (64, 2), (64, 8)])
def test_bit_for_bit_with_other_batches_and_devices(folder, alone, batch_size, devices):
    assert asked.figures(folder, asked.mesh_of(jax.devices()[:devices]), batch_size) == alone


def test_bit_for_bit_in_another_order_of_rows(folder, alone):
    def shuffled(rows):
        return rows.take(np.random.default_rng(1).permutation(len(rows)))

    assert asked.figures(folder, asked.mesh_of(jax.devices()[:1]), 64, shuffled) == alone


def test_bit_for_bit_with_two_processes(folder, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    start = [sys.executable, str(pathlib.Path(asked.__file__)), str(folder)]
    processes = [
        subprocess.Popen(
            [*start, str(number), "2", port], env=kept | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert json.loads(printed[0].splitlines()[-1]) == alone


def test_a_hash_names_rows_items_and_rules(folder):
    c = asked.settings()
    catalogue = asked.Catalogue.load(folder / "prepare" / "catalogue.jsonl")
    rows = protocols.rows_of(c, folder / "prepare", "candidates")

    def identity(protocol="candidates", rows=rows, **evaluate):
        changed = asked.settings()
        changed.evaluate.update(evaluate)
        return protocols.Setting(changed, catalogue, rows).hash(protocol)

    assert identity() == identity() == identity(beams=7, batch_size=3, budget=0)
    assert len({identity(name) for name in ("candidates", "catalogue", "generate")}) == 3
    assert identity("catalogue", top=7) != identity("catalogue")
    fewer = rows.take(np.arange(len(rows) - 1))
    swapped = rows.take(np.arange(len(rows)))
    swapped.candidates_ExC[0, :2] = swapped.candidates_ExC[0, 1::-1]
    assert len({identity(), identity(rows=fewer), identity(rows=swapped)}) == 3


def test_rows_of_a_protocol(folder):
    c = asked.settings()
    c.evaluate.max_generate = 5
    few, again = (protocols.rows_of(c, folder / "prepare", "generate") for _ in range(2))
    assert len(few) == 5
    np.testing.assert_array_equal(few.user_E, again.user_E)
    with pytest.raises(UserError, match="choose from candidates, windows, catalogue, generate"):
        protocols.rows_of(c, folder / "prepare", "ranking")
