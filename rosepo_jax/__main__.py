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

  evaluate --predictions=FILE   another system's answers, under the same frozen protocol
  report RUN RUN ...            runs side by side, seeds together

Tools:
  recommend  top-k titles for a history or a user
  score      log-probability and token count of each response of a JSONL file
  export     a checkpoint as a Hugging Face directory; rows and rankings for other tools
  compile    the programs of a run, for TPUs and GPUs that are not here: memory, collectives, kernels
  doctor     versions, devices, what is missing and how to get it

`rosepo VERB --help` says more. Every config key, its default and its meaning: rosepo_jax/config.py.
As in TRL, --config.align.label_smoothing=0.1 is align.smoothing.mode=fixed and .value=0.1, and align.loss_type is
align.objective.
"""

import argparse
import ctypes
import errno
import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from rosepo_jax.errors import Preempted, UserError, nearest
from rosepo_jax.stages import STAGES

if TYPE_CHECKING:
    from ml_collections import ConfigDict

COMMANDS = ("run", "sweep")
TOOLS = ("recommend", "score", "export", "compile", "doctor")
# Take the config of the folder that they are given.
OF_A_RUN = ("recommend", "score", "export", "doctor", "predictions")
DEMO = "configs/demo.py"
# What the system refuses at some place of the user's: a name that is too long, no permission, no space left ...
NO_BUG = {
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP),
    *(errno.EISDIR, errno.ENOTDIR),
}
PREEMPTED = 75  # exit status after SIGTERM: EX_TEMPFAIL, the same command goes on
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
    try:
        status = _status(words[0], words[1:])
    except Exception:
        if not _is_joined():
            raise
        traceback.print_exc()
        status = 1
    if status not in (0, PREEMPTED) and _is_joined():
        # At a usual exit the others would be waited for, and they wait for this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_joined() -> bool:
    """Whether this is one of several processes."""
    distributed = sys.modules.get("rosepo_jax.distributed")
    return distributed is not None and distributed.is_joined()


def _status(verb: str, words: Sequence[str]) -> int:
    """Runs a verb; the exit status."""
    try:
        return _dispatch(verb, words)
    except UserError as error:
        print(f"rosepo {verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NO_BUG or error.filename is None:
            raise
        print(f"rosepo {verb}: {UserError(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "rosepo_jax":
            raise
        print(
            f"rosepo {verb}: the package {error.name} is missing; `rosepo doctor` says how to get it", file=sys.stderr
        )
        return 2
    except Preempted as error:
        print(f"rosepo {verb}: {error}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED
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
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes: JAX finds the others (launch/README.md)"
    )
    name = file_of(verb, words)
    command = None if name in STAGES else importlib.import_module(f"rosepo_jax.stages.{name}")
    if command is not None:
        command.add_arguments(parser)
    args = parser.parse_args(words)
    given = args.config or args.workdir or overrides
    if name == "compare" and given:
        raise UserError("a comparison takes the folders of runs alone: rosepo report RUN RUN ... [--output=DIR]")
    config = None if name in ("doctor", "compare") and not given else resolve(name, args, overrides)
    keep_freed_memory()
    if name != "doctor":  # which says what is missing, jax too
        from rosepo_jax import distributed  # imports jax, which --help and mistakes need not wait for

        if args.distributed:
            distributed.start()
        distributed.heed_sigterm()
    if command is not None:
        return command.main(config, args) or 0
    from rosepo_jax.stages import runtime

    runtime.execute(runtime.module(verb), config, args.workdir)
    return 0


def file_of(verb: str, words: Sequence[str]) -> str:
    """The file below stages/ that a command line means: two verbs do something else with others' files."""
    if verb == "evaluate" and any(word.partition("=")[0] == "--predictions" for word in words):
        return "predictions"
    if verb == "report" and words and not words[0].startswith("-"):
        return "compare"
    return verb


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of giving it back to the system.

    XLA's CPU client allocates every buffer anew each step. glibc maps and unmaps the large ones, so every step pays for
    fresh zeroed pages: a third of a training step of configs/movietweetings.py, measured on two cores.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)


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


def resolve(verb: str, args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> "ConfigDict":
    """The config that a command line means; completes args.config and args.workdir.

    A config that is given wins; then the one that the workdir was made with; then, to start from, the demo.
    """
    from rosepo_jax import configuration  # not before doctor had its chance to say that ml_collections is missing

    if verb == "score" and args.workdir is None and (args.model / "model.json").is_file():
        args.workdir = args.model.parent  # the folder of a stage: prompts are those of its run
    if args.config is not None:
        path, _, argument = args.config.partition(".py:")
        name = "-".join(filter(None, (pathlib.Path(path).stem, argument)))
        args.workdir = args.workdir or pathlib.Path("runs") / name
    elif args.workdir is not None and (args.workdir / "config.json").is_file():
        args.config = str(args.workdir / "config.json")
    elif verb == "score":
        return configuration.load(None, overrides)
    elif verb in OF_A_RUN and args.workdir is None:
        raise UserError("give the folder of a run: --workdir=DIR")
    elif verb in OF_A_RUN:
        raise UserError(f"{args.workdir}: no config.json there; run `rosepo run --workdir={args.workdir}` first")
    elif not pathlib.Path(DEMO).is_file():
        raise UserError(f"give --config=NAME.py (the default, {DEMO}, is not in this folder)")
    else:
        args.config, args.workdir = DEMO, args.workdir or pathlib.Path("runs") / pathlib.Path(DEMO).stem
    return configuration.load(args.config, overrides)


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
