"""SLURM arrays and Kubernetes jobs: what would be submitted, and that no word reaches a shell unquoted."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from rosepo_jax import __main__ as cli
from rosepo_jax.stages import submit

CONFIG = "from rosepo_jax import config\n\ndef get_config(arg=''):\n    return config.default()\n"
HOSTILE = "x; touch PWNED; $(touch PWNED) `touch PWNED` '\" $(JOB_COMPLETION_INDEX) %j {shared}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder whose name is hostile too."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    pathlib.Path("c.py").write_text(CONFIG)
    return folder


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """sbatch and kubectl as programs that write down their words and what they are given to read."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "kubectl"):
        (folder / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"path = {str(tmp_path / 'called.jsonl')!r}\n"
            "number = sum(1 for _ in open(path)) if os.path.exists(path) else 0\n"
            "open(path, 'a').write(json.dumps([sys.argv, sys.stdin.read()]) + '\\n')\n"
            f"print(f'{{100 + number}};cluster')\n"
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in (tmp_path / "called.jsonl").read_text().splitlines()]


def rosepo_sweep(*flags):
    return cli.main(["sweep", "--config=c.py", "--workdir=w", *flags])


HOSTILE_SWEEP = (f"--sweep=data.path={HOSTILE.replace(',', '')},../../up", "--sweep=align.beta=0.1,0.5")


def test_a_slurm_sweep_is_three_jobs(here, tools):
    extra = ["--sbatch=--gpus=1", "--sbatch=--comment=a b; {shared} $(touch PWNED)"]
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5,1", "--runner=slurm:2", *extra) == 0
    (shared, one), (runs, two), (table, three) = tools()
    for words in (shared, runs, table):
        assert words[1] == "--parsable" and words[-2:] == ["--gpus=1", "--comment=a b; {shared} $(touch PWNED)"]
        assert "--requeue" in words and "--signal=B:TERM@120" in words
    assert not any("--dependency" in word for word in shared)
    assert {"--array=0,1,2%2", "--dependency=afterok:100", "--kill-on-invalid-dep=yes"} <= set(runs)
    assert "--dependency=afterany:101" in table
    (plan,) = pathlib.Path("w/sweep/plans").iterdir()
    common = ["-m", "rosepo_jax", "sweep", f"--config={plan.resolve()}/config.json", f"--workdir={here / 'w'}"]
    assert shlex.split(one.splitlines()[-1])[2:] == [*common, "--only=0", "--stages=prepare,oracle,sft,pairs"]
    assert shlex.split(two.splitlines()[-1])[2:] == [*common, "--only=$SLURM_ARRAY_TASK_ID"]
    assert shlex.split(three.splitlines()[-1])[2:] == [*common, "--collect"]
    assert not list(here.rglob("PWNED")) and (here / "w" / "sweep" / "logs").is_dir()


def test_the_script_of_an_array_does_run_number_i(here, tools):
    """In a real shell, with a python that only says its words."""
    assert rosepo_sweep(*HOSTILE_SWEEP, "--runner=slurm") == 0
    script = next(script for words, script in tools() if any("--array" in word for word in words))
    echo = here / "python"
    echo.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:]]))\n")
    echo.chmod(0o755)
    command = script.replace(shlex.quote(sys.executable), shlex.quote(str(echo)))
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder, words = json.loads(done.stdout)
    assert folder == str(here) and words[-1] == "--only=3" and words[4] == f"--workdir={here / 'w'}"
    assert not list(here.rglob("PWNED"))
    assert "data.path" not in script and "up" not in script  # settings stand in the plan alone


def test_runs_that_are_done_are_not_submitted_again(here, tools, monkeypatch):
    from rosepo_jax.stages import sweep

    monkeypatch.setattr(sweep, "problem", lambda run, _: None if run.number == 1 else "not finished")
    assert rosepo_sweep("--sweep=seed=0,1,2", "--runner=slurm") == 0
    assert any("--array=0,2" in words for words, _ in tools())
    monkeypatch.setattr(sweep, "problem", lambda *_: None)
    assert rosepo_sweep("--sweep=seed=0,1,2", "--runner=slurm") == 2


@pytest.mark.parametrize("runner", ["slurm", "k8s"])
def test_a_dry_run_prints_and_writes_nothing(here, tools, capsys, runner):
    words = ["--image=r", f"--claim=v:{here}"] if runner == "k8s" else []
    assert rosepo_sweep(*HOSTILE_SWEEP, f"--runner={runner}", "--dry-run", *words) == 0
    printed = capsys.readouterr().out
    if runner == "k8s":
        assert json.loads(printed)["kind"] == "Job"
    else:
        assert printed.count("sbatch --parsable") == 2 and "afterany:<job id of runs>" in printed  # nothing is shared
    assert {path.name for path in here.iterdir()} == {"c.py"}
    with pytest.raises(FileNotFoundError):
        tools()


def test_a_kubernetes_sweep_is_an_indexed_job(here, tools):
    words = ["--image=registry/rosepo:1", f"--claim=work:{here.parent}", "--gpus=2"]
    assert rosepo_sweep(*HOSTILE_SWEEP, "--runner=k8s:3", *words) == 0
    ((called, text),) = tools()
    assert called[1:] == ["create", "-f", "-"]
    manifest = json.loads(text)
    spec = manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 3)
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75] and spec["backoffLimitPerIndex"] == 0
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "work"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2} and container["image"] == "registry/rosepo:1"
    assert container["volumeMounts"] == [{"name": "work", "mountPath": str(here.parent)}]
    expanded = [expand(word, {"JOB_COMPLETION_INDEX": "2"}) for word in container["command"]]
    assert expanded[:4] == ["python", "-m", "rosepo_jax", "sweep"] and expanded[-1] == "--only=2"
    assert expanded[5] == f"--workdir={here / 'w'}"  # in which $(JOB_COMPLETION_INDEX) stands to the letter
    assert "up" not in text.replace(str(here), "") or "data.path" not in text


def expand(word, variables):
    """As Kubernetes does it: $$ is a dollar, $(NAME) a variable where there is one."""
    found, at = "", 0
    while at < len(word):
        if word.startswith("$$", at):
            found, at = found + "$", at + 2
        elif word.startswith("$(", at) and (end := word.find(")", at)) > 0 and word[at + 2 : end] in variables:
            found, at = found + variables[word[at + 2 : end]], end + 1
        else:
            found, at = found + word[at], at + 1
    return found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runner=slurm"], "sbatch is not on this machine; --dry-run prints"),
        (["--runner=k8s"], "needs --image=IMAGE and --claim=NAME:/PATH"),
        (["--runner=k8s", "--image=r", "--claim=v"], "needs --image=IMAGE and --claim=NAME:/PATH"),
        (["--runner=k8s", "--image=r", "--claim=v:/elsewhere"], "is not below /elsewhere"),
    ],
)
def test_what_is_missing_is_said(here, monkeypatch, capsys, flags, message):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_what_sbatch_refuses_is_said(here, tmp_path, monkeypatch):
    from rosepo_jax.errors import UserError

    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'error: invalid\npartition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="sbatch: error: invalid partition"):
        submit.slurm({"runs": ([], "")}, [], False)
