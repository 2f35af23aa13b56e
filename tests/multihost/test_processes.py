"""Several real processes on this machine: they compute what one does, and stop together when one is told to."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from rosepo_jax.training.metrics import MEASURED

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launch" / "local_processes.py"
SMOKE = "--config=configs/demo.py:smoke"
TRAINED = ("sft", "align", "evaluate/sft_more")
OFTEN = ("--config.checkpoint.every=1 steps",)


@pytest.fixture(scope="session")
def environment():
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


@pytest.fixture(scope="session")
def launch(environment):
    """Starts N processes of M devices each."""

    def start(processes, devices, *words):
        command = [sys.executable, LAUNCHER, f"--processes={processes}", f"--devices={devices}", *words]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)

    return start


@pytest.fixture(scope="session")
def finished(launch, tmp_path_factory):
    """(processes, devices) -> the workdir of a whole run."""
    found = {}

    def run(processes, devices):
        if (processes, devices) not in found:
            workdir = tmp_path_factory.mktemp("run") / f"{processes}x{devices}"
            child = launch(processes, devices, "run", SMOKE, f"--workdir={workdir}")
            said, _ = child.communicate(timeout=600)
            assert child.returncode == 0, said
            found[processes, devices] = workdir
        return found[processes, devices]

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def curve(workdir, stage):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in lines(workdir / stage / "metrics.jsonl")]


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
def test_processes_and_devices_compute_what_one_does(finished, shape):
    alone, together = finished(1, 1), finished(*shape)
    for stage in TRAINED:
        ours, expected = curve(together, stage), curve(alone, stage)
        assert [row.keys() for row in ours] == [row.keys() for row in expected]
        for row, one in zip(ours, expected):
            assert row == pytest.approx(one, rel=1e-4, abs=1e-5), stage
    results, expected = (json.loads((w / "evaluate" / "results.json").read_text()) for w in (together, alone))
    for name, protocol in expected["protocols"].items():
        assert results["protocols"][name]["n"] == protocol["n"]
        for model, cell in protocol["models"].items():
            assert results["protocols"][name]["models"][model]["HR@1"] == cell["HR@1"], (name, model)


def test_two_processes_of_two_devices_are_one_of_four(finished):
    """What a device gets is the same, and so is the program: SFT comes out bit for bit."""
    for stage in ("sft", "evaluate/sft_more"):
        assert curve(finished(2, 2), stage) == curve(finished(1, 4), stage)


def wait_for(path, child, seconds=300):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def children_of(pid):
    return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_the_doctor_sees_all_processes(launch):
    child = launch(2, 2, "doctor")
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    for process in range(2):
        assert f"[{process}] processes: 2, this is {process}: " in said
        assert f"[{process}] devices: 4 x cpu" in said


@pytest.fixture(scope="session")
def stopped(launch, tmp_path_factory):
    """A run of 2 x 2 whose second process alone got SIGTERM during alignment: its workdir, update and output."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    child = launch(2, 2, "run", SMOKE, f"--workdir={workdir}", *OFTEN)
    wait_for(workdir / "align" / "checkpoints" / "2", child)
    os.kill(children_of(child.pid)[1], signal.SIGTERM)
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 75, said
    (number,) = {int(found) for found in re.findall(r"told to stop, and saved update (\d+) of", said)}
    return workdir, number, said


def test_a_notice_to_one_stops_all_at_one_update(stopped):
    workdir, number, said = stopped
    assert said.count("told to stop, and saved update") == 2, said
    assert (workdir / "align" / "checkpoints" / str(number)).is_dir()
    assert lines(workdir / "align" / "goodput.jsonl")[-1]["update"] == number


@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (4, 1)])
def test_any_number_of_processes_goes_on_from_there(launch, finished, stopped, tmp_path, shape):
    """As many come to the undisturbed run bit for bit; others feed devices other shares of the same rows."""
    before, number, _ = stopped
    workdir = shutil.copytree(before, tmp_path / "run", symlinks=True)
    child = launch(*shape, "run", SMOKE, f"--workdir={workdir}", *OFTEN)
    said, _ = child.communicate(timeout=600)
    assert child.returncode == 0, said
    begun = next(line["update"] for line in lines(workdir / "align" / "goodput.jsonl") if line["start"] == 2)
    assert begun == number
    whole = finished(2, 2)
    for stage in TRAINED:
        ours, expected = curve(workdir, stage), curve(whole, stage)
        if shape == (2, 2):
            assert ours == expected, stage
        for row, one in zip(ours, expected, strict=True):
            assert row == pytest.approx(one, rel=1e-4, abs=1e-5), stage
