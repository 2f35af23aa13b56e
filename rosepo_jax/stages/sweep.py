"""Many runs of one config with other settings; what they share is computed once.

    <workdir>/sweep/<settings>/     a run: stages of its own, and links to those that it shares
    <workdir>/sweep/plans/<hash>/   the config and the runs of a sweep that other processes work on
    <workdir>/sweep/sweep.json      the table (its keys: evaluation/sweeps.summary); report.html shows it
    <workdir>/sweep/logs/, locks/   what workers print, what they hold

All kinds of running do one thing, `do`: a run of the plan, by its number, as far as it is not done yet.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from rosepo_jax import configuration, distributed, files
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import report, sweeps
from rosepo_jax.stages import plan, runners, runtime, search, submit
from rosepo_jax.stages.pool import Pool

FAILED = "failed.json"  # in a run's folder: why the last try came to nothing
UNFINISHED = "not finished"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs a config with many settings and prints a table, best first by validation HR@1."
    add = parser.add_argument
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="values of one config key; several --sweep are multiplied. KEY,KEY=V:W,V:W: keys that move together. "
        "KEY=uniform(A,B) or loguniform(A,B): drawn --trials times. Default: the config's get_sweep()",
    )
    add("--trials", type=_positive, metavar="N", help="draw N runs from --sweep, a list being a choice")
    add("--search", choices=("random", "optuna"), default="random", help="how --trials are drawn; optuna learns")
    add("--search-seed", type=int, default=0, metavar="S", help="of the draws")
    add(
        "--runner", default="sequential", metavar="R", help=f"{' | '.join(runners.KINDS)}; N: at most so many at a time"
    )
    add("--dry-run", action="store_true", help="print the runs, or what would be submitted, and do nothing")
    add("--only", type=_index, metavar="I", help="only run number I, from 0, and no table")
    add("--stages", default=",".join(plan.RUN_STAGES), metavar="V,V", help="of --only: these stages")
    add("--collect", action="store_true", help="only the table, from what is there")
    add(
        "--sbatch", action="append", default=[], metavar="OPTION", help="slurm: e.g. --sbatch=--gpus=1; repeat for more"
    )
    add("--image", default="", help="k8s: container image with rosepo")
    add("--claim", default="", metavar="NAME:PATH", help="k8s: volume claim that holds the workdir, and where it is")
    add("--gpus", type=_index, default=0, metavar="N", help="k8s: GPUs of a run")


def _positive(text: str) -> int:
    if (value := _index(text)) == 0:
        raise ValueError
    return value


def _index(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


_index.__name__ = _positive.__name__ = "number"  # argparse: invalid number value


def main(config: ConfigDict, args: argparse.Namespace) -> int:
    kind, limit = runners.parse(args.runner)
    if kind != "sequential" and args.distributed:
        raise UserError(f"--runner={args.runner} starts processes of its own: leave out --distributed")
    if kind != "sequential" or (args.collect and not args.distributed):
        jax.config.update("jax_platforms", "cpu")  # devices are for those who compute
    workdir, axes = args.workdir, plan.parse(config, args.sweep)
    if args.trials is not None and not axes:
        raise UserError("--trials draws from --sweep: give --sweep='align.beta=loguniform(0.01,1)'")
    if args.search == "optuna":
        if args.trials is None or kind in ("slurm", "k8s"):
            raise UserError(
                "--search=optuna needs --trials=N, and --runner=sequential or local:N: it learns as it goes"
            )
        folder = _folder(workdir, config, ["optuna", *args.sweep, args.search_seed])
        runs = search.runs(config, axes, args.trials, args.search_seed, folder, lambda run: outcome(run, workdir))
        swept = [key for axis in axes for key in axis.keys]

        def known() -> list[plan.Run]:
            return plan.planned(config, configuration.get_sweep(str(folder / "config.json")) or [])
    else:
        listed = plan.planned(config, _overrides(config, args, axes))
        folder = _folder(workdir, config, [run.settings for run in listed])
        runs, swept = iter(listed), plan.differing([run.settings for run in listed])

        def known() -> list[plan.Run]:
            return listed

    if args.only is not None:
        return _one(known(), args)
    if args.collect:
        return _collect(config, known(), workdir)
    if args.dry_run and kind in ("sequential", "local"):
        print("\n".join(f"{run.number}: {run.name}" for run in known()))
        return 0
    if args.search != "optuna" and kind != "sequential" and not args.dry_run:
        plan.save(folder, config, [run.settings for run in known()])
    shared = plan.shared_stages(swept) if swept else []
    if kind == "slurm":
        return _slurm(known(), shared, args, limit, folder)
    if kind == "k8s":
        return _kubernetes(known(), args, limit, folder)
    _work(runs, known, shared, workdir, folder, limit)
    return _collect(config, known(), workdir)


def _overrides(config: ConfigDict, args: argparse.Namespace, axes: Sequence[plan.Values | plan.Range]) -> list[dict]:
    if args.trials is not None:
        return plan.draws(axes, args.trials, args.search_seed)
    found = plan.product(axes) if axes else configuration.get_sweep(args.config)
    if not found:
        raise UserError(f"{args.config} has no get_sweep(); give --sweep=align.beta=0.1,0.3")
    return found


def _folder(workdir: pathlib.Path, config: ConfigDict, what: Any) -> pathlib.Path:
    """Of a plan; a function of what it says, so that a sweep which waits in a queue is not changed by the next one."""
    return workdir / "sweep" / "plans" / files.hash_json(runtime.plain([config.to_dict(), what]))


def _command(folder: pathlib.Path, workdir: pathlib.Path, python: str = sys.executable) -> list[str]:
    plan_ = f"--config={(folder / 'config.json').resolve()}"
    return [python, "-m", "rosepo_jax", "sweep", plan_, f"--workdir={workdir.resolve()}"]


# ---- one run ---------------------------------------------------------------------------------------------------------


def do(run: plan.Run, workdir: pathlib.Path, stages: Sequence[str] = plan.RUN_STAGES) -> None:
    """Does a run, or some of its stages, as far as that is not done yet; no two processes at the same one.

    Errors: those of its stages, after they have been written down for the table.
    """
    folder = run.folder(workdir)
    with Pool(workdir).claim(run.name, run.name):
        if distributed.is_primary():
            (folder / FAILED).unlink(missing_ok=True)
        try:
            for verb in stages:
                runtime.execute(runtime.module(verb), run.config, folder)
        except UserError as mistake:
            fail(run, workdir, str(mistake))
            raise
        except Exception as bug:
            fail(run, workdir, f"{type(bug).__name__}: {bug}")
            raise
        if distributed.is_primary() and not (folder / "config.json").exists():  # all of it is shared
            files.write_json(folder / "config.json", runtime.plain(run.config.to_dict()))


def fail(run: plan.Run, workdir: pathlib.Path, error: str) -> None:
    if distributed.is_primary():
        files.write_json(run.folder(workdir) / FAILED, {"error": error})


def problem(run: plan.Run, workdir: pathlib.Path) -> str | None:
    """Why a run has no figures; None when it has."""
    folder = run.folder(workdir)
    try:
        if runtime.is_complete(runtime.module("evaluate"), run.config, folder):
            return None
    except UserError as mistake:
        return str(mistake)
    return files.read_json(folder / FAILED)["error"] if (folder / FAILED).exists() else UNFINISHED


def _has(run: plan.Run, workdir: pathlib.Path, stages: Sequence[str]) -> bool:
    """Whether these stages of a run are complete."""
    try:
        return all(runtime.is_complete(runtime.module(verb), run.config, run.folder(workdir)) for verb in stages)
    except UserError:
        return False


def figures(run: plan.Run, workdir: pathlib.Path) -> dict[str, float | None]:
    folder = run.folder(workdir)
    align = files.read_json(folder / "align" / runtime.MANIFEST)["result"]
    return sweeps.figures(align, report.read(folder / "evaluate" / "results.json"))


def outcome(run: plan.Run, workdir: pathlib.Path) -> float | str | None:
    """What a search learns from a run: its validation figure, None while there is none, or why it failed."""
    error = problem(run, workdir)
    if error is None:
        return figures(run, workdir)["validation_hr1"]
    return None if error == UNFINISHED else error


def _one(runs: Sequence[plan.Run], args: argparse.Namespace) -> int:
    stages = args.stages.split(",")
    if args.only >= len(runs):
        raise UserError(f"--only={args.only}: there are {len(runs)} runs, numbered from 0")
    if unknown := [verb for verb in stages if verb not in plan.RUN_STAGES]:
        raise UserError(f"--stages={','.join(unknown)}: there are {', '.join(plan.RUN_STAGES)}")
    do(runs[args.only], args.workdir, stages)
    return 0


# ---- all of them -----------------------------------------------------------------------------------------------------


def _work(
    runs: Iterator[plan.Run],
    known: Callable[[], Sequence[plan.Run]],
    shared: Sequence[str],
    workdir: pathlib.Path,
    folder: pathlib.Path,
    workers: int,
) -> None:
    """Does the runs as they come, here or by workers; before that what they share, with the whole machine."""
    first = next(runs)
    if shared and not _has(first, workdir, shared):
        runtime.say(f"sweep: the same in all runs: {', '.join(shared)}")
        _run(iter([first]), workdir, folder, min(workers, 1), shared)
        error = problem(first, workdir)
        if distributed.agreed([error not in (None, UNFINISHED)])[0]:
            for run in known():
                if problem(run, workdir) == UNFINISHED:
                    fail(run, workdir, str(error))
            return
    _run(itertools.chain([first], runs), workdir, folder, workers)


def _run(
    runs: Iterator[plan.Run],
    workdir: pathlib.Path,
    folder: pathlib.Path,
    workers: int,
    stages: Sequence[str] = plan.RUN_STAGES,
) -> None:
    if not workers:
        return runners.sequential(runs, lambda run: do(run, workdir, stages))

    def words(run: plan.Run) -> list[str]:
        return [*_command(folder, workdir), f"--only={run.number}", f"--stages={','.join(stages)}"]

    def ended(run: plan.Run, status: int, log: pathlib.Path) -> None:
        if status and problem(run, workdir) == UNFINISHED:  # killed: it could not say so itself
            fail(run, workdir, f"ended with status {status}; see {log}")
        print(f"sweep: {run.name}: {f'failed: {problem(run, workdir)}' if status else 'done'}", flush=True)

    left = (run for run in runs if problem(run, workdir) is not None)
    return runners.local(left, words, workers, workdir / "sweep" / "logs", ended)


def _collect(config: ConfigDict, runs: Sequence[plan.Run], workdir: pathlib.Path) -> int:
    """Writes sweep.json and report.html and prints the table; 1 when a run has no figures."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        error = problem(run, workdir)
        measured = figures(run, workdir) if error is None else dict.fromkeys(sweeps.FIGURES)
        rows.append({"run": run.name, "settings": run.settings, "error": error, **measured})
    found = sweeps.summary(rows)
    page = workdir / "sweep" / "report.html"
    if distributed.is_primary():
        files.write_json(page.with_name("sweep.json"), found)
        files.write_text(page, sweeps.html(found, runtime.plain(config.to_dict())))
    runtime.say(f"{page}\n\n{sweeps.text(found)}")
    return 1 if any(row["error"] for row in rows) else 0


def _slurm(
    runs: Sequence[plan.Run], shared: Sequence[str], args: argparse.Namespace, limit: int, folder: pathlib.Path
) -> int:
    left = [run.number for run in runs if problem(run, args.workdir) is not None]
    if not left:
        raise UserError("every run is done; --collect makes the table")
    if _has(runs[left[0]], args.workdir, shared):
        shared = []
    logs = (args.workdir / "sweep" / "logs").resolve()
    if not args.dry_run:
        logs.mkdir(parents=True, exist_ok=True)
    submit.slurm(
        submit.slurm_jobs(_command(folder, args.workdir), left, shared, limit, logs), args.sbatch, args.dry_run
    )
    return 0


def _kubernetes(runs: Sequence[plan.Run], args: argparse.Namespace, limit: int, folder: pathlib.Path) -> int:
    command = _command(folder, args.workdir, "python")
    where = args.image, args.claim, args.gpus, args.workdir.resolve()
    submit.kubernetes(submit.job(command, len(runs), limit, folder.name[:8], *where), args.dry_run)
    return 0
