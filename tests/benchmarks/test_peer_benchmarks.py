"""The comparisons with TRL and RecBole, our side alone and tiny: every figure is there and says what it should."""

import json
import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import oracle
import peers


def figures(capsys):
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {(row["figure"], row.get("system", ""), row.get("unit", "")): row["value"] for row in rows}


def test_our_update_is_timed_measured_and_counted(capsys):
    peers.main(["--alone", "--shape=tiny", "--K=1", "--repeats=1", "--P=24", "--T=4"])
    found = figures(capsys)
    assert found["ours", "", "pairs/s"] > 0
    # What XLA plans for are arrays; the process has libraries too.
    assert 0 < found["memory by XLA's plan", "ours", "MiB"] < found["memory, whole process", "ours", "MiB"]
    assert found["ours", "", "of matrix products"] == pytest.approx(
        found["ours", "", "GFLOP/s"] / found["matrix products", "", "GFLOP/s"], rel=1e-6
    )
    assert 0.5 < found["ours: useful tokens", "", "share"] <= 1


def test_our_oracle_is_trained_and_ranks_the_whole_catalogue(capsys):
    assert oracle.main(["--alone", "--users=60", "--titles=60", "--epochs=2", "--batch=64"]) == 0
    found = figures(capsys)
    for system in ("last", "all"):
        assert found["epoch", system, "s"] > 0
        # Below the entropy of a uniform guess, so something was learnt.
        assert 0 < found["loss", system, "nats, epoch 2"] < math.log(60)
        assert any(0 < value < 1 for (figure, of, _), value in found.items() if figure == "HR@10" and of == system)
