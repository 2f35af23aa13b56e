"""Comparisons with TRL and RecBole, our side alone, and growth with sizes: tiny, every figure there and plausible."""

import dataclasses
import json
import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import oracle
import peers
import scaling


def figures(capsys):
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {(row["figure"], row.get("system", ""), row.get("unit", "")): row["value"] for row in rows if "value" in row}


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


def test_sizes_grow_and_so_do_tokens_and_memory(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "SHAPE", dataclasses.replace(peers.SHAPES["tiny"](), layers=1))
    small = dict(vocabulary=512, width=64, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=16)
    monkeypatch.setattr(scaling.decode, "DECODER", dataclasses.replace(scaling.decode.DECODER, **small))
    monkeypatch.setattr(scaling, "SIZES", {"P": (64, 192), "titles": (30, 60)})
    scaling.main(["--axes=P,titles", "--repeats=1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(row["axis"], row["size"], row["figure"]): row["value"] for row in rows}
    assert found["P", 192, "tokens"] > found["P", 64, "tokens"] > 8 * 32  # a prompt has half of P at least
    growth = math.log(found["P", 192, "tokens"] / found["P", 64, "tokens"]) / math.log(3)
    assert found["P", "64-192", "growth: tokens"] == pytest.approx(growth)
    assert 0.5 < growth < 1  # response tokens do not grow
    assert found["titles", 60, "search"] > 0 and found["titles", 60, "trie"] > found["titles", 30, "trie"]
