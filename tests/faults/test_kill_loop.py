"""The check of kill_loop.py, with few kills: a run that is killed and started again is the undisturbed one."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("kill_loop.py")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_come_out_as_undisturbed_ones(processes):
    command = [sys.executable, SCRIPT, "--kills=8", f"--processes={processes}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "8 kills" in done.stdout
