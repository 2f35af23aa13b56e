"""launch/tpu_pod.sh and launch/tpu_worker.sh, with folders of this machine as the hosts of a slice."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from stand_ins import HOSTILE, REPOSITORY, SECRETS

WORKER = "rosepo_jax/launch/tpu_worker.sh"
OPTIONS = ("--name=train", "--zone=us-east5-a", "--type=v6e-16", "--job=j")
NFS = "--nfs=10.0.0.2:/share"
WORDS = ("run", "--config=configs/llama3_8b.py:v5e-16", "--workdir=/mnt/rosepo/a run")
PYTHON = """
if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin")
    os.symlink(sys.argv[0], words[2] + "/bin/python")
elif "find" in words:
    print(sys.argv[0])
"""
# Ends with the next of the statuses of its host; says what it was given in its environment.
ROSEPO = """
host = pathlib.Path(os.environ["HOME"])
number = len(list(host.parent.glob(f"{host.name}.run*")))
pathlib.Path(f"{host}.run{number}").write_text(json.dumps([words, dict(os.environ)]))
print("host", os.environ["HOST"], "says hello")
sys.exit(json.loads((host.parent / "statuses.json").read_text())[number])
"""


class Slice:
    """A zone without a slice, and a copy of the project, of which launches pack an archive."""

    def __init__(self, stand_ins, folder):
        self.stand_ins, self.folder, self.project = stand_ins, folder, folder / "project"
        stand_ins.environment["CLOUD"] = str(folder)
        for part in ("rosepo_jax", "configs", "launch"):
            shutil.copytree(REPOSITORY / part, self.project / part)
        for part in ("pyproject.toml", "requirements.txt", "README.md"):
            shutil.copy(REPOSITORY / part, self.project)
        cloud = str(pathlib.Path(__file__).parent / "cloud.py")
        stand_ins.add("gcloud", f"os.execv(sys.executable, [sys.executable, {cloud!r}, *words])")
        stand_ins.add("sudo")
        stand_ins.add("sleep")
        stand_ins.add("mountpoint", "sys.exit(1)")
        stand_ins.add("python3", PYTHON)
        stand_ins.add("rosepo", ROSEPO)
        self.set()

    def set(self, request=("",), node="READY", statuses=(0,), events=(), hosts=2, wait=1):
        names = [f"host{number}" for number in range(hosts)]
        state = {"request": list(request), "node": node, "events": list(events), "hosts": names, "wait": wait}
        (self.folder / "state.json").write_text(json.dumps(state))
        (self.folder / "statuses.json").write_text(json.dumps(statuses))
        for name in names:
            (self.folder / name).mkdir(exist_ok=True)

    def launch(self, *options, words=WORDS):
        return self.stand_ins.run("bash", self.project / "launch" / "tpu_pod.sh", *OPTIONS, *options, *words)

    def verbs(self):
        return [" ".join(call[3:5]) for call in self.stand_ins.calls("gcloud")]

    def runs(self, host):
        """What rosepo was called with on a host, and its environment."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"host{host}.run*"))]


@pytest.fixture
def tpus(stand_ins, tmp_path):
    return Slice(stand_ins, tmp_path / "cloud")


INSTALL = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
READY = ["queued-resources list", "tpu-vm describe"]
ASKED = ["queued-resources list", "queued-resources create", *READY]


def test_dry_run(tpus, as_expected, tmp_path):
    secrets = tmp_path / "secrets.env"
    secrets.write_text("HF_TOKEN=hf_sekrit\n")
    secrets.chmod(0o600)
    options = (NFS, "--create=--spot", f"--secrets={secrets}", "--delete")
    done = tpus.launch("--dry-run", *options)
    assert done.returncode == 0 and not tpus.stand_ins.calls(), done.stderr
    as_expected("tpu_pod.txt", done.stdout.replace(str(secrets), "secrets.env"))
    assert tpus.launch(*options).returncode == 0
    calls = tpus.stand_ins.calls("gcloud")
    tpus.stand_ins.forget()
    tpus.set(statuses=[0, 0])
    assert tpus.stand_ins.run("bash", "-euc", f"cd {tpus.project}\n{done.stdout}").returncode == 0
    assert tpus.stand_ins.calls("gcloud") == calls


def test_from_nothing_to_the_end(tpus):
    tpus.set(wait=3)
    done = tpus.launch(NFS, "--delete")
    assert done.returncode == 0, done.stderr
    assert tpus.verbs() == [
        *("queued-resources list", "queued-resources create"),
        *("queued-resources list", "queued-resources list", *READY),
        *(*INSTALL, "tpu-vm ssh", "queued-resources delete"),
    ]
    assert "host 0 says hello" in done.stdout and "host 1 says hello" in done.stdout
    for host in (0, 1):
        home = tpus.folder / f"host{host}"
        assert (home / "rosepo_jax" / "rosepo_jax" / "__main__.py").exists()
        assert (home / "rosepo_jax" / "configs" / "llama3_8b.py").exists()
        assert not list(home.rglob("__pycache__"))
        ((words, environment),) = tpus.runs(host)
        assert words == [*WORDS, "--distributed"] and environment["JAX_PLATFORMS"] == "tpu,cpu"
    installed = [call[3:] for call in tpus.stand_ins.calls("python") if "install" in call]
    assert [call[-1] for call in installed] == [".[tpu]"] * 2
    mounted = [call for call in tpus.stand_ins.calls("sudo") if "mount" in call]
    assert mounted == [["sudo", "mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share", "/mnt/rosepo"]] * 2


def test_words_arrive_as_they_are(tpus):
    done = tpus.launch(words=(*WORDS, *HOSTILE))
    assert done.returncode == 0, done.stderr
    for host in (0, 1):
        ((words, _),) = tpus.runs(host)
        assert words == [*WORDS, *HOSTILE, "--distributed"]
        assert not (tpus.folder / f"host{host}" / "rosepo_jax" / "hit").exists()


def test_secrets_reach_the_hosts_by_file_alone(tpus, tmp_path):
    secrets = tmp_path / "secrets.env"
    secrets.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    assert tpus.launch(f"--secrets={secrets}").returncode == 0
    for host in (0, 1):
        ((_, environment),) = tpus.runs(host)
        assert SECRETS.items() <= environment.items()
        assert (tpus.folder / f"host{host}" / ".rosepo.env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("statuses", "runs"), [([0], 1), ([2], 1), ([75, 75, 75, 75, 0], 5), ([1, 134, 75, 137, 1], 5)]
)
def test_what_is_started_again(tpus, statuses, runs):
    tpus.set(statuses=statuses)
    done = tpus.launch()
    assert done.returncode == statuses[-1], done.stderr
    assert len(tpus.runs(0)) == len(tpus.runs(1)) == runs
    assert tpus.verbs() == [*ASKED, *INSTALL, "tpu-vm ssh", *(runs - 1) * [*READY, *INSTALL, "tpu-vm ssh"]]
    assert "train is still there, and costs" in done.stderr


def test_a_slice_that_is_taken_away_is_asked_for_again_and_no_failure(tpus):
    gone = {"request": ["SUSPENDING", "SUSPENDED"], "node": "PREEMPTED"}
    tpus.set(statuses=[143, 143, 0], events=[gone] * 2)
    done = tpus.launch("--restarts=1", "--create=--spot")
    assert done.returncode == 0, done.stderr
    created = [call for call in tpus.stand_ins.calls("gcloud") if "create" in call]
    assert len(created) == 3 and all("--spot" in call for call in created)
    assert tpus.verbs().count("queued-resources delete") == 2


def test_a_slice_that_is_there_is_used_and_a_lost_node_is_noticed(tpus):
    tpus.set(request=["ACTIVE"], node="PREEMPTED")
    assert tpus.launch().returncode == 0
    assert tpus.verbs()[:3] == [*READY, "queued-resources delete"]
    tpus.stand_ins.forget()
    tpus.set(request=["ACTIVE"], statuses=[0, 0])
    assert tpus.launch("--job=k").returncode == 0
    assert tpus.verbs() == [*READY, *INSTALL, "tpu-vm ssh"]


def test_a_request_that_fails_ends_it(tpus):
    tpus.set(request=["FAILED"])
    done = tpus.launch()
    assert done.returncode == 1 and "request for train failed" in done.stderr


def test_delete_also_after_a_mistake(tpus):
    tpus.set(statuses=[2])
    assert tpus.launch("--delete").returncode == 2
    assert tpus.verbs()[-1] == "queued-resources delete"


@pytest.mark.parametrize(
    ("options", "words", "said"),
    [
        (("--type=tpu7x-8",), WORDS, "launch/gke.py"),
        (("--name=A b",), WORDS, "--name=A b"),
        (("--zone=",), WORDS, "--zone"),
        (("--spot",), WORDS, "no such option"),
        (("--secrets=/no/such",), WORDS, "no such file"),
        (("--job=;",), WORDS, "--job=;"),
        (("--restarts=x",), WORDS, "--restarts=x"),
        ((), (), "--workdir"),
        ((), ("run", "--workdir=runs/x"), "--workdir"),
    ],
)
def test_mistakes(tpus, options, words, said):
    done = tpus.launch(*options, words=words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not tpus.stand_ins.calls()


# ---- One host --------------------------------------------------------------------------------------------------------


class Host:
    """The worker's script in a folder of its own, with a rosepo that runs until it is told to stop or to end."""

    def __init__(self, stand_ins, home):
        self.stand_ins, self.home, self.started = stand_ins, home, []
        (home / "rosepo_jax" / "launch").mkdir(parents=True)
        for name in ("tpu_worker.sh", "environment.sh"):
            (home / "rosepo_jax" / "launch" / name).write_bytes((REPOSITORY / "launch" / name).read_bytes())
        stand_ins.add("rosepo", f"""
import signal, time
def stop(*_): print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("begun", words[0], flush=True)
while not os.path.exists({str(home / "end")!r}): time.sleep(0.02)
print("ended", words[0])
""")  # fmt: skip

    def start(self, *words):
        command = ["bash", WORKER, *words]
        environment = {**self.stand_ins.environment, "HOME": str(self.home)}
        self.started.append(
            subprocess.Popen(command, cwd=self.home, env=environment, stdout=subprocess.PIPE, text=True)
        )
        return self.started[-1]

    def end(self):
        """Leaves nothing running, whatever a test found."""
        for child in self.started:
            child.kill()
        for path in self.home.glob("rosepo_jobs/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)

    def wait_for(self, attempt, text):
        log, deadline = self.home / "rosepo_jobs" / attempt / "log", time.monotonic() + 60
        while not log.exists() or text not in log.read_text():
            assert time.monotonic() < deadline, text
            time.sleep(0.02)


@pytest.fixture
def host(stand_ins, tmp_path):
    host = Host(stand_ins, tmp_path / "host")
    yield host
    host.end()


def test_a_broken_connection_stops_nothing_and_the_same_attempt_goes_on_showing_the_log(host):
    first = host.start("run", "a", "one")
    host.wait_for("a", "begun one")
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = host.start("run", "a", "one")
    assert again.stdout.readline() == "begun one\n"
    (host.home / "end").touch()
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and said == "ended one\n"
    assert host.start("run", "a", "one").wait(60) == 0  # also when it is over
    assert len(host.stand_ins.calls("rosepo")) == 1


def test_another_attempt_lets_the_one_before_save_and_end(host):
    first = host.start("run", "a", "one")
    host.wait_for("a", "begun one")
    second = host.start("run", "b", "two")
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75 and said == "begun one\nsaved\n"
    host.wait_for("b", "begun two")
    (host.home / "end").touch()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and said == "begun two\nended two\n"


def test_stop(host):
    assert host.start("stop").wait(60) == 0  # nothing runs
    run = host.start("run", "a", "one")
    host.wait_for("a", "begun one")
    assert host.start("stop").wait(60) == 0
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 75 and said == "begun one\nsaved\n"


def test_a_host_that_was_started_anew_meanwhile(host):
    run = host.start("run", "a", "one")
    host.wait_for("a", "begun one")
    os.killpg(int((host.home / "rosepo_jobs" / "a" / "pid").read_text()), signal.SIGKILL)
    assert run.wait(60) == 137
    assert host.start("run", "a", "one").wait(60) == 137
