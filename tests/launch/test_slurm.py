"""launch/slurm.sbatch: its directives, the srun that it runs, and what it does with an exit status."""

import re

import pytest
from stand_ins import HOSTILE, REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
COUNT, TIME = r"\d+", r"(\d+-)?\d{2}:\d{2}:\d{2}"
# Options of sbatch, from its manual, with what they take.
OPTIONS = {
    "job-name": r"\w+",
    "nodes": COUNT,
    "gpus-per-node": r"(\w+:)?\d+",
    "ntasks-per-node": COUNT,
    "cpus-per-task": COUNT,
    "mem": r"\d+[KMGT]?",
    "time": TIME,
    "signal": r"([RB]+:)?[A-Z0-9]+@\d+",
    "requeue": None,
    "open-mode": "append|truncate",
    "output": r"[\w%.-]+",
}


def test_directives_are_options_of_sbatch_and_come_before_everything_else():
    lines = SCRIPT.read_text().splitlines()
    directives = {}
    for line in lines:
        if line.startswith("#SBATCH"):
            name, _, value = re.fullmatch(r"#SBATCH --([a-z-]+)(=)?(\S*)", line).groups()
            assert name in OPTIONS, name
            assert (OPTIONS[name] is None) == (value == "") and re.fullmatch(OPTIONS[name] or "", value), line
            directives[name] = value
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])  # sbatch reads no further than the first command
    assert "requeue" in directives and directives["open-mode"] == "append"  # or a requeued job loses its log
    assert directives["signal"].startswith("TERM@")  # without B: the tasks are told, not this shell
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]


def test_dry_run(stand_ins, same_as_printed, as_expected):
    stand_ins.add("srun")
    stand_ins.add("scontrol")
    words = ("run", "--config=configs/llama3_8b.py", "--workdir=/shared/runs/llama", "--config.data.path=/a b")
    done = stand_ins.run("bash", SCRIPT, "--dry-run", *words, SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0 and not stand_ins.calls()
    as_expected("slurm.txt", done.stdout)
    assert stand_ins.run("bash", SCRIPT, *words, SLURM_CPUS_PER_TASK="8", SLURM_JOB_ID="7").returncode == 0
    same_as_printed(done.stdout)


def test_words_arrive_as_they_are(stand_ins, same_as_printed):
    stand_ins.add("srun")
    assert stand_ins.run("bash", SCRIPT, "run", *HOSTILE, SLURM_JOB_ID="7").returncode == 0
    (call,) = stand_ins.calls()
    assert call[call.index("rosepo") :] == ["rosepo", "run", *HOSTILE, "--distributed"]
    same_as_printed(stand_ins.run("bash", SCRIPT, "--dry-run", "run", *HOSTILE).stdout)


@pytest.fixture
def job(stand_ins, tmp_path):
    """Runs the script as SLURM does, in the folder that it was submitted from; returns (status, whether requeued)."""

    def run(status, restarts):
        stand_ins.forget()
        stand_ins.add("srun", f"sys.exit({status})")
        stand_ins.add("scontrol")
        environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
        done = stand_ins.run("bash", "-c", f"cd {tmp_path}; . {SCRIPT}", "-", "run", **environment)
        called = stand_ins.calls("scontrol")
        assert called in ([], [["scontrol", "requeue", "7"]])
        return done.returncode, bool(called)

    return run


def test_what_is_requeued(job, tmp_path):
    assert job(0, 0) == (0, False)
    assert job(2, 0) == (2, False)
    assert [job(75, restarts) for restarts in range(6)] == [(75, True)] * 6
    assert job(1, 6) == (1, True)  # preemptions before it do not count
    assert job(137, 7) == (137, True)
    assert job(75, 8) == (75, True)
    assert job(134, 9) == (134, True)
    assert job(1, 10) == (1, False)
    assert job(0, 10) == (0, False) and not list(tmp_path.glob("*.failures"))


def test_the_shell_dies_of_sigterm_so_that_scancel_is_not_undone(stand_ins):
    stand_ins.add("srun", "os.kill(os.getppid(), 15)\nsys.exit(75)")
    stand_ins.add("scontrol")
    assert stand_ins.run("bash", SCRIPT, "run", SLURM_JOB_ID="7").returncode == -15
    assert not stand_ins.calls("scontrol")


def test_mistakes(stand_ins):
    for words, environment in (((), {"SLURM_JOB_ID": "7"}), (("run",), {})):
        done = stand_ins.run("bash", SCRIPT, *words, **environment)
        assert done.returncode == 2 and done.stderr.startswith("usage:")


TASKS = """
start = next(i for i, word in enumerate(words) if not word.startswith("-"))
variables = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
tasks = [
    subprocess.Popen(words[start:], env={**os.environ, **variables, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(2)
]
sys.exit(max(task.wait() for task in tasks))  # as srun: the highest
"""


def test_real_processes_find_each_other_under_slurm(stand_ins, tmp_path):
    stand_ins.add("srun", TASKS)
    stand_ins.add("rosepo", 'os.execv(sys.executable, [sys.executable, "-m", "rosepo_jax", *words])')
    words = ("prepare", "--config=configs/demo.py:smoke", f"--workdir={tmp_path}/a run")
    job = str(10_000 + hash(tmp_path) % 4096)  # of which JAX makes the port
    done = stand_ins.run("bash", SCRIPT, *words, SLURM_JOB_ID=job, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "prepare" / "manifest.json").exists()
    assert len(stand_ins.calls("rosepo")) == 2 and done.stdout.count("prepare: done") == 1  # by the first process
