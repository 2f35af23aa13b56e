"""`rosepo` with stages that compute nothing, as a program: python fake_stages.py sweep --config=... --workdir=...

Every stage that really runs adds a line "VERB BETA PID" to the file ran. `align` keeps what it began, and then waits as
long as there is a file hold; with beta = 13 it fails, with beta = 14 it is killed.
"""

import os
import pathlib
import signal
import sys
import time
import types

KEYS = {"prepare": ("data", "seed"), "oracle": ("oracle",), "sft": ("sft",), "align": ("align",)}
INPUTS = {"prepare": (), "align": ("sft", "pairs"), "evaluate": ("align",), "pairs": ("sft", "oracle")}


def fake(verb):
    from rosepo_jax import files
    from rosepo_jax.errors import UserError

    def run(config, folders, out):
        with open("ran", "a") as ran:
            ran.write(f"{verb} {config.align.beta} {os.getpid()}\n")
        if verb == "align":
            (out / "checkpoint").touch()
            while pathlib.Path("hold").exists():
                time.sleep(0.02)
            if config.align.beta == 13:
                raise UserError("align.beta is unlucky")
            if config.align.beta == 14:
                os.kill(os.getpid(), signal.SIGKILL)
        if verb == "evaluate":
            cells = {"sft": {"HR@1": 0.25}, "aligned": {"HR@1": 1 - config.align.beta}}
            files.write_json(out / "results.json", {"protocols": {"candidates": {"hash": "h", "models": cells}}})
        return {"HR@1": config.align.beta, "threads": os.environ.get("NPROC")}

    inputs = INPUTS.get(verb, ("prepare",))
    resumable = verb == "align"
    return types.SimpleNamespace(NAME=verb, INPUTS=inputs, KEYS=KEYS.get(verb, ()), RESUMABLE=resumable, run=run)


def main():
    from rosepo_jax import __main__ as cli
    from rosepo_jax.stages import STAGES, runtime, sweep

    runtime.module = {verb: fake(verb) for verb in STAGES}.__getitem__
    command = sweep._command

    def this(*arguments):
        python, _, _, *words = command(*arguments)  # python -m rosepo_jax
        return [python, __file__, *words]

    sweep._command = this
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
