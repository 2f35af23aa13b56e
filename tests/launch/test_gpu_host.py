"""launch/gpu_host.sh: what it looks at first, what it starts again, and that signals reach the run."""

import json
import os
import signal
import subprocess
import time

import pytest
from stand_ins import HOSTILE, REPOSITORY

SCRIPT = REPOSITORY / "launch" / "gpu_host.sh"


@pytest.fixture
def host(stand_ins):
    """A host whose runs end with these statuses, one after the other."""

    def make(*statuses, body=""):
        stand_ins.add("nvidia-smi")
        count = f"sum(json.loads(line)[:2] == argv[:2] for line in open({str(stand_ins.record)!r}))"
        stand_ins.add("rosepo", f'{body}\nif words != ["doctor"]: sys.exit({list(statuses)!r}[{count} - 1])')
        return stand_ins

    return make


def test_dry_run(host, same_as_printed, as_expected):
    stand_ins = host(0)
    words = ("run", "--config=configs/llama3_8b.py:full,h100-8", "--workdir=runs/a b")
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    done = stand_ins.run("bash", SCRIPT, "--dry-run", *words, **environment)
    assert done.returncode == 0 and not stand_ins.calls()
    as_expected("gpu_host.txt", done.stdout)
    assert stand_ins.run("bash", SCRIPT, *words, **environment).returncode == 0
    same_as_printed(done.stdout)


def test_words_and_environment_arrive_as_they_are(host, tmp_path):
    body = f'if words != ["doctor"]: open({str(tmp_path / "saw")!r}, "w").write(json.dumps(dict(os.environ)))'
    stand_ins = host(0, body=body)
    assert stand_ins.run("bash", SCRIPT, "run", *HOSTILE, CUDA_VISIBLE_DEVICES="3").returncode == 0
    assert stand_ins.calls("rosepo")[-1] == ["rosepo", "run", *HOSTILE]
    saw = json.loads((tmp_path / "saw").read_text())
    assert saw["CUDA_VISIBLE_DEVICES"] == "3" and saw["JAX_PLATFORMS"] == "cuda,cpu"
    assert saw["HF_TOKEN"] == stand_ins.environment["HF_TOKEN"]


@pytest.mark.parametrize(
    ("statuses", "runs"),
    [([0], 1), ([2], 1), ([1], 1), ([130], 1), ([75, 75, 75, 75, 75, 0], 6), ([137, 75, 134, 139, 137], 5)],
)
def test_what_is_started_again(host, statuses, runs):
    stand_ins = host(*statuses)
    done = stand_ins.run("bash", SCRIPT, "run")
    assert done.returncode == statuses[-1], done.stderr
    assert len(stand_ins.calls("rosepo")) == 1 + runs


def test_restarts_are_counted(host):
    stand_ins = host(137, 137, 0)
    assert stand_ins.run("bash", SCRIPT, "--restarts=1", "run").returncode == 137
    assert len(stand_ins.calls("rosepo")) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_and_nothing_is_started_again(host, tmp_path, number):
    ready = tmp_path / "ready"
    body = f"""
import signal, time
if words != ["doctor"]:
    def stop(*_): print("saved", flush=True); time.sleep(1); sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    open({str(ready)!r}, "w").close()
    time.sleep(120)
"""
    stand_ins = host(0, body=body)
    pipes = dict(stdout=subprocess.PIPE, text=True, start_new_session=True)
    # Whoever runs the tests in the background may have left SIGINT ignored, and no shell can undo that.
    words = stand_ins.words(["env", "--default-signal=INT", "bash", SCRIPT, "run"])
    child = subprocess.Popen(words, env=stand_ins.environment, **pipes)
    while not ready.exists():
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(number)
    try:
        said, _ = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    assert child.returncode == 75 and "saved" in said
    assert len(stand_ins.calls("rosepo")) == 2


def test_nothing_runs_where_no_gpu_can_be_used(stand_ins):
    stand_ins.add("nvidia-smi", 'sys.exit("no devices were found")')
    stand_ins.add("rosepo")
    assert stand_ins.run("bash", SCRIPT, "run").returncode == 2
    stand_ins.add("nvidia-smi")
    stand_ins.add("rosepo", "sys.exit(2)")
    assert stand_ins.run("bash", SCRIPT, "run").returncode == 2
    assert stand_ins.calls("rosepo") == [["rosepo", "doctor"]]


@pytest.mark.parametrize("words", [(), ("--restarts=many", "run"), ("--gpus=2", "run")])
def test_mistakes(stand_ins, words):
    done = stand_ins.run("bash", SCRIPT, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not stand_ins.calls()


def test_a_real_run(stand_ins, tmp_path):
    stand_ins.add("nvidia-smi")
    stand_ins.add("rosepo", 'os.execv(sys.executable, [sys.executable, "-m", "rosepo_jax", *words])')
    words = ("prepare", "--config=configs/demo.py:smoke", f"--workdir={tmp_path}/a run")
    done = stand_ins.run("bash", SCRIPT, *words, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "a run" / "prepare" / "manifest.json").exists()
