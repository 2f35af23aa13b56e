"""ShellCheck reads the scripts, and what dry runs print."""

import subprocess
import sys

import pytest
from stand_ins import HOSTILE, REPOSITORY

SCRIPTS = [*sorted((REPOSITORY / "launch").glob("*.s[hb]*")), REPOSITORY / ".ci" / "run"]


def check(*words, text=None):
    shellcheck = f"{sys.prefix}/bin/shellcheck"
    done = subprocess.run([shellcheck, *words], cwd=REPOSITORY, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script):
    check("--external-sources", str(script))


TPU = ("launch/tpu_pod.sh", "--dry-run", "--name=train", "--zone=z", "--type=v5p-64", "--nfs=10.0.0.2:/share")


@pytest.mark.parametrize("launcher", [TPU, ("launch/slurm.sbatch", "--dry-run"), ("launch/gpu_host.sh", "--dry-run")])
def test_what_is_printed(stand_ins, launcher):
    done = stand_ins.run("bash", *launcher, "run", "--workdir=/mnt/rosepo/a run", *HOSTILE)
    assert done.returncode == 0, done.stderr
    check("--shell=bash", "-", text=done.stdout)


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="SC2086"):
        check("--shell=bash", "-", text="rm $1\n")
