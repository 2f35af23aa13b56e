"""Workers on this machine: shared stages once, whatever is killed when; who ends whom; shares of the machine."""

import collections
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rosepo_jax import config as defaults
from rosepo_jax import files
from rosepo_jax.errors import Preempted, UserError
from rosepo_jax.stages import plan, runners

FAKE = pathlib.Path(__file__).with_name("fake_stages.py")
CONFIG = "from rosepo_jax import config\n\ndef get_config(arg=''):\n    return config.default()\n"
LIMIT = 120.0  # seconds that something takes at most


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- the whole command, in processes of its own ----------------------------------------------------------------------


@pytest.fixture
def rosepo(tmp_path, monkeypatch):
    """Starts `rosepo sweep FLAGS` of fake stages in a process group of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"} | {"JAX_PLATFORMS": "cpu"}

    def start(*flags):
        words = [sys.executable, str(FAKE), "sweep", "--config=c.py", "--workdir=w", "--runner=local:2", *flags]
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    return start


def ran(tmp_path):
    """(verb, beta, pid) of every stage that really ran."""
    lines = (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
    return [tuple(line.split()) for line in lines]


def aligning(tmp_path):
    return [row for row in ran(tmp_path) if row[0] == "align"]


def test_stopped_and_killed_in_the_middle_and_then_to_the_end(rosepo, tmp_path):
    flags = ["--sweep=align.beta=0.1,0.5,0.3"]
    (tmp_path / "hold").touch()
    first = rosepo(*flags)
    until(lambda: len(aligning(tmp_path)) == 2)
    os.kill(first.pid, signal.SIGTERM)  # the first process alone: it ends its workers
    output, _ = first.communicate(timeout=LIMIT)
    assert first.returncode == 75, output
    assert "the same command goes on from there" in output
    assert not any(is_alive(pid) for *_, pid in aligning(tmp_path))

    second = rosepo(*flags)
    until(lambda: len(aligning(tmp_path)) == 4)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate(timeout=LIMIT)
    until(lambda: not any(is_alive(pid) for *_, pid in aligning(tmp_path)))
    assert not (tmp_path / "w" / "sweep" / "sweep.json").exists()

    (tmp_path / "hold").unlink()
    third = rosepo(*flags)
    output, _ = third.communicate(timeout=LIMIT)
    assert third.returncode == 0, output
    rows = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]
    assert [(row["settings"], row["validation_hr1"], row["error"]) for row in rows] == [
        ({"align.beta": beta}, beta, None) for beta in (0.5, 0.3, 0.1)
    ]
    counts = collections.Counter(verb for verb, *_ in ran(tmp_path))
    assert counts == {"prepare": 1, "oracle": 1, "sft": 1, "pairs": 1, "align": 7, "evaluate": 3}
    assert collections.Counter(beta for _, beta, _ in aligning(tmp_path)) == {"0.1": 3, "0.5": 3, "0.3": 1}
    runs = [tmp_path / "w" / "sweep" / row["run"] for row in rows]
    for verb in ("prepare", "oracle", "sft", "pairs"):
        assert sorted((run / verb).is_symlink() for run in runs) == [False, True, True]
        assert len({files.read_json(run / verb / "manifest.json")["started"] for run in runs}) == 1
    threads = {files.read_json(run / "align" / "manifest.json")["result"]["threads"] for run in runs}
    assert threads == {str(max(len(os.sched_getaffinity(0)) // 2, 1))}
    assert {path.stem for path in (tmp_path / "w" / "sweep" / "logs").iterdir()} == {run.name for run in runs}


def test_a_run_that_fails_and_one_that_is_killed_are_in_the_table(rosepo, tmp_path):
    process = rosepo("--sweep=align.beta=13,14,0.1")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, output
    rows = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]
    found = {row["settings"]["align.beta"]: row["error"] for row in rows}
    assert found[0.1] is None and found[13] == "align.beta is unlucky"
    log = tmp_path / "w" / "sweep" / "logs" / f"{plan.run_id({'align.beta': 14.0})}.log"
    assert found[14] == f"ended with status -9; see {log.relative_to(tmp_path)}" and log.exists()
    assert len(aligning(tmp_path)) == 3  # nothing is tried again by itself


# ---- workers ---------------------------------------------------------------------------------------------------------


def planned(count):
    return plan.planned(defaults.default(), [{"seed": number} for number in range(count)])


def run_local(runs, program, tmp_path, workers=2):
    ended = []
    words = [sys.executable, "-c", program]
    runners.local(
        iter(runs),
        lambda run: [*words, str(run.number)],
        workers,
        tmp_path / "logs",
        lambda r, s, _: ended.append((r.number, s)),
    )
    return ended


def test_runs_are_started_as_workers_are_free_and_logged(tmp_path):
    program = "import sys; print('run', sys.argv[1]); sys.exit(int(sys.argv[1]) % 2)"
    runs = planned(5)
    ended = run_local(runs, program, tmp_path)
    assert sorted(ended) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert (tmp_path / "logs" / f"{runs[3].name}.log").read_text() == "run 3\n"
    run_local(runs[3:4], program, tmp_path)
    assert (tmp_path / "logs" / f"{runs[3].name}.log").read_text() == "run 3\n" * 2


STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("{told}" + sys.argv[1]).touch() or {then})
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
pathlib.Path("{begun}" + sys.argv[1]).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Preempted, ValueError])
def test_however_it_ends_so_do_the_workers(tmp_path, error):
    told, begun = tmp_path / "told", tmp_path / "begun"
    program = STUBBORN.format(told=told, begun=begun, then="sys.exit(0)")

    def runs():
        yield from planned(2)
        until(lambda: len(list(tmp_path.glob("begun*"))) == 2)
        raise error

    with pytest.raises(error):
        run_local(runs(), program, tmp_path, workers=3)
    assert {path.name for path in tmp_path.glob("told*")} == {"told0", "told1"}


def test_workers_that_do_not_stop_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "GRACE", 0.5)
    begun = tmp_path / "begun"
    program = STUBBORN.format(told=tmp_path / "told", begun=begun, then="None") + "time.sleep(600)\n"

    def runs():
        yield from planned(1)
        until(lambda: list(tmp_path.glob("begun*")))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_local(runs(), program, tmp_path)
    assert (tmp_path / "told0").exists()


def test_shares_of_the_machine(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runners.share(0, 4) == {"NPROC": "4"} and runners.share(0, 32) == {"NPROC": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert runners.share(0, 1) == {"NPROC": "16"}
    assert [runners.share(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,6", "5,7"]
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in runners.share(0, 4)
    assert runners.share(5, 8)["CUDA_VISIBLE_DEVICES"] == "5"
    assert runners.share(5, 8)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
    monkeypatch.setenv("NPROC", "3")
    assert runners.share(0, 4)["NPROC"] == "3"


def test_runner_flags():
    assert [runners.parse(text) for text in ("sequential", "local:3", "slurm", "slurm:8", "k8s")] == [
        ("sequential", 0),
        ("local", 3),
        ("slurm", 0),
        ("slurm", 8),
        ("k8s", 0),
    ]
    for wrong in (
        "",
        "local",
        "local:",
        "local:0",
        "local:-1",
        "local:two",
        "local:２",
        "sequential:1",
        "slurm:",
        "k8s:x",
    ):
        with pytest.raises(UserError, match="--runner="):
            runners.parse(wrong)
