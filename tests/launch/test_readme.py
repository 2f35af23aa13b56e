"""The command lines of launch/README.md, as dry runs."""

import re

import pytest
from stand_ins import REPOSITORY

TEXT = (REPOSITORY / "launch" / "README.md").read_text("utf-8").replace("\\\n", " ")
LINES = re.findall(r"^(?:[A-Z_]+=\S+ )?(?:bash|python|sbatch) .*launch/.* run .*$", TEXT, re.MULTILINE)


def test_there_is_one_of_every_launcher():
    launchers = {re.search(r"launch/(\w+)", line)[1] for line in LINES}
    assert launchers == {"tpu_pod", "gke", "slurm", "gpu_host", "local_processes"}


@pytest.mark.parametrize("line", LINES)
def test_command_lines(stand_ins, line):
    line = re.sub(r"sbatch .*?(?=launch/)", "bash ", line).replace(" --dry-run", "").replace("…", "")
    line = re.sub(r"(launch/\S+)", r"\1 --dry-run", line, count=1)
    done = stand_ins.run("bash", "-c", line)
    assert done.returncode == 0 and "--workdir=" in done.stdout, done.stderr
