"""The benchmark of `prepare`, without running it: its log, its figures, and when it fails."""

import importlib.util
import json
import pathlib

import pyarrow.parquet as pq
import pytest

FILE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "prepare.py"
specification = importlib.util.spec_from_file_location("benchmark_prepare", FILE)
benchmark = importlib.util.module_from_spec(specification)
specification.loader.exec_module(benchmark)


@pytest.mark.parametrize(("seconds", "gigabytes", "status"), [(89.0, 5.9, 0), (91.0, 1.0, 1), (10.0, 6.1, 1)])
def test_a_synthetic_log_has_limits_of_time_and_memory(monkeypatch, capsys, seconds, gigabytes, status):
    logs = []

    def measure(config, overrides):
        paths = dict(word.removeprefix("--config.data.").split("=") for word in overrides)
        logs.append([pq.read_table(paths[name]).num_rows for name in ("path", "titles")])
        return {"time": seconds, "processor time": 2 * seconds, "peak memory": gigabytes}

    monkeypatch.setattr(benchmark, "measure", measure)
    assert benchmark.main(["--interactions=20000"]) == status
    assert logs == [[20_000, 100]] * 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {row["figure"]: (row["value"], row["unit"], row.get("at most")) for row in rows}
    assert found == {
        "time": (seconds, "s", 90.0),
        "processor time": (2 * seconds, "s", None),
        "peak memory": (gigabytes, "GB", 6.0),
    }
