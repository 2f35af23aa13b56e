"""rosepo VERB --config=configs/NAME.py[:ARG] --workdir=DIR [--config.align.beta=0.3 ...]

The stages, in order (each is skipped when it is up to date):
  prepare    read the log: sequences, splits, frozen candidate lists, catalogue, statistics
  oracle     train the preference oracle (SASRec) and fit its temperature
  sft        supervised fine-tuning: the reference model of everything after it
  pairs      mine (prompt, chosen, rejected...) with the SFT model's mistakes and other strategies
  align      preference optimisation with smoothed labels
  evaluate   SFT, aligned and the floors side by side on the same users
  report     report.html and summary.json

  run        all of the above
  sweep      many runs, a table, best first; shared stages are computed once

Tools:
  recommend  top-k titles for a history or a user
  score      log-probability and token count of each response of a JSONL file
  export     a checkpoint as a Hugging Face directory
  doctor     versions, devices, what is missing and how to get it

`rosepo VERB --help` says more. Every config key, its default and its meaning: rosepo_jax/config.py.
As in TRL, --config.align.label_smoothing=0.1 is align.smoothing.mode=fixed and .value=0.1, and align.loss_type is
align.objective.
"""

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from rosepo_jax.errors import UserError, nearest
from rosepo_jax.stages import STAGES

COMMANDS = ("run", "sweep")
TOOLS = ("recommend", "score", "export", "doctor")
DEMO = "configs/demo.py"
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    verb = words[0]
    try:
        return _dispatch(verb, words[1:])
    except UserError as error:
        print(f"rosepo {verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "rosepo_jax":
            raise
        print(
            f"rosepo {verb}: the package {error.name} is missing; `rosepo doctor` says how to get it", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"rosepo {verb}: interrupted", file=sys.stderr)
        return 130


def _dispatch(verb: str, words: Sequence[str]) -> int:
    verbs = (*STAGES, *COMMANDS, *TOOLS)
    if verb not in verbs:
        raise UserError(f"no such verb{nearest(verb, verbs)} (rosepo --help lists all)")
    quiet()
    if verb != "doctor":
        refuse_known_bad()
    words, overrides = split_overrides(words)
    parser = _Parser(prog=f"rosepo {verb}", allow_abbrev=False, epilog="--config.KEY=VALUE overrides one config key.")
    parser.add_argument("--config", help=f"NAME.py[:ARG]; default: the config in the workdir, else {DEMO}")
    parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/<name of the config>")
    command = None if verb in STAGES else importlib.import_module(f"rosepo_jax.stages.{verb}")
    if command is not None:
        command.add_arguments(parser)
    args = parser.parse_args(words)
    config = None
    if verb not in TOOLS or args.config or args.workdir or overrides:
        args.config, args.workdir = locate(args.config, args.workdir, verb in TOOLS)
        from rosepo_jax import configuration  # not before doctor had its chance to say that ml_collections is missing

        config = configuration.load(args.config, overrides)
    if command is not None:
        return command.main(config, args) or 0
    from rosepo_jax.stages import runtime  # imports jax, which --help and mistakes need not wait for

    runtime.execute(runtime.module(verb), config, args.workdir)
    return 0


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments: (the others, [(KEY, VALUE), ...])."""
    others, overrides = [], []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--config."):
            others.append(word)
            continue
        key, separator, value = word.removeprefix("--config.").partition("=")
        if not separator:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
        overrides.append((key, value))
    return others, overrides


def locate(config: str | None, workdir: pathlib.Path | None, finished: bool) -> tuple[str, pathlib.Path]:
    """Which config and which workdir a command line means; `finished`: the verb needs a workdir that has been filled.

    A config that is given wins; then the one that the workdir was made with; then, to start from, the demo.
    """
    if config is not None:
        path, _, argument = config.partition(".py:")
        return config, workdir or pathlib.Path("runs") / "-".join(filter(None, (pathlib.Path(path).stem, argument)))
    if workdir is not None and (workdir / "config.json").is_file():
        return str(workdir / "config.json"), workdir
    if workdir is not None and finished:
        raise UserError(
            f"{workdir}: holds no config.json; run `rosepo run --workdir={workdir}` first, or give --config"
        )
    if not pathlib.Path(DEMO).is_file():
        raise UserError(f"give --config=NAME.py (the default, {DEMO}, is not in this folder)")
    return DEMO, workdir or pathlib.Path("runs") / pathlib.Path(DEMO).stem


def quiet() -> None:
    """Silences notices of libraries about frameworks that are absent on purpose; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def refuse_known_bad() -> None:
    """Versions that fail at import get their reason here, instead of a traceback from inside a library."""
    from rosepo_jax.stages import doctor

    if reason := doctor.known_bad():
        raise UserError(reason)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments" in message:
            word = message.rpartition(": ")[2].split("=")[0].split()[0]
            message += nearest(word, self._option_string_actions)
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(main())
