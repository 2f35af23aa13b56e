"""Stand-ins for gcloud, srun and others: programs on PATH that record their arguments and do what a test says."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SECRETS = {"HF_TOKEN": "hf_sekrit", "WANDB_API_KEY": "wandb-sekrit"}
# What a user may write and a shell would read otherwise; a Kubernetes variable; text beyond ASCII; two lines; nothing.
HOSTILE = ["--config.data.path=a b  c", "$(touch hit)", "`touch hit`;", "'", '"', "\\ $HOME", "$(HF_HOME) $$(HF_HOME)"]
HOSTILE += ["*", "é ~ & | > hit", "two\nlines", "", "-", "--dry-run"]

PROGRAM = """#!{python} -IS
import json, os, pathlib, subprocess, sys
name, *words = argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open({record!r}, "a") as record:
    record.write(json.dumps(argv) + "\\n")
{body}
"""


class StandIns:
    """Programs in a folder that comes first on PATH, and what they were called with."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.record = folder / "bin", folder / "record.jsonl"
        self.folder.mkdir()
        # Launchers prefer the environment of the folder that they lie in: here it must have none.
        self.checkout = folder / "checkout"
        shutil.copytree(REPOSITORY / "launch", self.checkout / "launch")
        for name in ("rosepo_jax", "configs", "pyproject.toml", "requirements.txt", "README.md"):
            (self.checkout / name).symlink_to(REPOSITORY / name)
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "PYTHONPATH") if key in os.environ}
        path = {"PATH": f"{self.folder}:{kept['PATH']}", "HOME": str(folder)}
        self.environment = {**kept, **path, **SECRETS, "PYTHONPATH": str(REPOSITORY)}

    def add(self, name: str, body: str = "") -> None:
        program = self.folder / name
        program.write_text(PROGRAM.format(python=sys.executable, record=str(self.record), body=body))
        program.chmod(0o755)

    def run(self, *command, **environment) -> subprocess.CompletedProcess:
        """Runs a launcher, as a copy; afterwards no secret stands in what it said and was recorded."""
        done = subprocess.run(
            self.words(command), cwd=self.checkout, env={**self.environment, **environment},
            capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        told = done.stdout + done.stderr + "".join(map(str, self.calls()))
        assert not [name for name, value in SECRETS.items() if value in told]
        return done

    def words(self, command) -> list[str]:
        """A command line, with the copies of launchers in their place."""
        launch, copies = str(REPOSITORY / "launch"), str(self.checkout / "launch")
        return [str(word).replace(launch, copies) for word in command]

    def calls(self, *names: str) -> list[list[str]]:
        """What was called, in order: all, or the programs of these names."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [argv for argv in map(json.loads, lines) if not names or argv[0] in names]

    def forget(self) -> None:
        self.record.unlink(missing_ok=True)
