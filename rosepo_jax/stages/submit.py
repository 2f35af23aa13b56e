"""Sweeps on clusters: a SLURM job array and an Indexed Job of Kubernetes, one task a run.

Tasks share the workdir through a file system that all nodes have, at the same path, with locks (pool.py). No setting
of a run stands in a script or manifest: tasks read the saved plan, by the number of their run.
"""

import json
import os
import pathlib
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from rosepo_jax.errors import UserError

PREEMPTED = 75  # exit status: the same command goes on
NOTICE = 120  # seconds between the notice and the end


# ---- SLURM -----------------------------------------------------------------------------------------------------------


def slurm_jobs(
    command: Sequence[str], left: Sequence[int], shared: Sequence[str], limit: int, logs: pathlib.Path
) -> dict[str, tuple[list[str], str]]:
    """name -> the options of sbatch and the script: what all runs share (if anything), the array, and the table.

    `command` is followed by --only or --collect; `left`: the runs to do. "{NAME}" in an option: the id of that job.
    """
    jobs = {}
    if shared:
        jobs["shared"] = _slurm_job("shared", [*command, f"--only={left[0]}", f"--stages={','.join(shared)}"], [], logs)
    after = ["--dependency=afterok:{shared}", "--kill-on-invalid-dep=yes"] if shared else []
    array = f"--array={','.join(map(str, left))}" + (f"%{limit}" if limit else "")
    jobs["runs"] = _slurm_job("runs", command, [array, *after], logs, ' --only="$SLURM_ARRAY_TASK_ID"')
    jobs["table"] = _slurm_job("table", [*command, "--collect"], ["--dependency=afterany:{runs}"], logs)
    return jobs


def _slurm_job(
    name: str, command: Sequence[str], options: Sequence[str], logs: pathlib.Path, more: str = ""
) -> tuple[list[str], str]:
    pattern = str(logs).replace("%", "%%") + ("/slurm-%A_%a.log" if more else "/slurm-%j.log")
    common = [f"--job-name=rosepo-sweep-{name}", f"--output={pattern}", "--requeue", f"--signal=B:TERM@{NOTICE}"]
    # exec: the signal that comes before the end reaches the run itself.
    script = f"#!/bin/bash\ncd -- {shlex.quote(os.getcwd())} || exit 2\nexec {shlex.join(command)}{more}\n"
    return [*common, *options], script


def slurm(jobs: Mapping[str, tuple[list[str], str]], extra: Sequence[str], dry_run: bool) -> None:
    """Submits the jobs, or prints what would be; `extra`: options of sbatch for all of them."""
    ids: dict[str, str] = {}
    for name, (options, script) in jobs.items():
        known = {name: f"<job id of {name}>" for name in jobs} if dry_run else ids
        options = [word.format(**known) if word.startswith("--dependency=") else word for word in options]
        words = ["sbatch", "--parsable", *options, *extra]
        if dry_run:
            print(f"# {name}\n{shlex.join(words)} <<'END'\n{script}END\n", flush=True)
            continue
        ids[name] = _call(words, script).partition(";")[0]
        print(f"sweep: {name}: job {ids[name]}", flush=True)


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


def job(
    command: Sequence[str], runs: int, limit: int, name: str, image: str, claim: str, gpus: int, workdir: pathlib.Path
) -> dict[str, Any]:
    """The manifest of an Indexed Job: run number JOB_COMPLETION_INDEX in every pod, on a volume that all of them mount.

    `claim`: "NAME:PATH", the volume claim and where it is mounted, above the workdir. A pod that was told to stop or
    whose node went is started again; a run that failed is not.
    """
    volume, separator, mount = claim.partition(":")
    if not image or not volume or not separator or not mount.startswith("/"):
        raise UserError("--runner=k8s needs --image=IMAGE and --claim=NAME:/PATH, the volume that holds the workdir")
    if not workdir.is_relative_to(mount):
        raise UserError(f"--claim={claim}: {workdir} is not below {mount}; the volume is mounted where it is here")
    words = [word.replace("$", "$$") for word in command]  # Kubernetes expands $(NAME)
    container = {
        "name": "rosepo",
        "image": image,
        "command": [*words, "--only=$(JOB_COMPLETION_INDEX)"],
        "workingDir": os.getcwd(),
        "volumeMounts": [{"name": "work", "mountPath": mount}],
        **({"resources": {"limits": {"nvidia.com/gpu": gpus}}} if gpus else {}),
    }
    rules = [
        {"action": "Ignore", "onExitCodes": {"containerName": "rosepo", "operator": "In", "values": [PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": f"rosepo-sweep-{name}-"},
        "spec": {
            "completionMode": "Indexed",
            "completions": runs,
            "parallelism": min(limit or runs, runs),
            "backoffLimitPerIndex": 0,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": NOTICE,
                    "containers": [container],
                    "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": volume}}],
                }
            },
        },
    }


def kubernetes(manifest: Mapping[str, Any], dry_run: bool) -> None:
    """Creates the job, or prints its manifest."""
    text = json.dumps(manifest, indent=1)
    print(text if dry_run else _call(["kubectl", "create", "-f", "-"], text), flush=True)


def _call(words: Sequence[str], stdin: str) -> str:
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not on this machine; --dry-run prints what would be submitted") from None
    if done.returncode:
        raise UserError(f"{words[0]}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout.strip()
