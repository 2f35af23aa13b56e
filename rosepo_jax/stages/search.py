"""Settings chosen one after the other by Optuna, an optional package, for the best validation figure.

What was asked for is runs.json, how it came out stands in the runs' folders, and a study is made from both for every
question. So there is no other state: whatever is killed, the same command goes on.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rosepo_jax import configuration, seeds
from rosepo_jax.errors import UserError
from rosepo_jax.stages import plan

Outcome = Callable[[plan.Run], "float | str | None"]  # figure; None while the run is not finished; why it failed


def runs(
    config: ConfigDict,
    axes: Sequence[plan.Values | plan.Range],
    trials: int,
    seed: int,
    folder: pathlib.Path,
    outcome: Outcome,
) -> Iterator[plan.Run]:
    """The runs of a search: first those of `folder`, then new ones until there are `trials`, each asked for when it is
    taken. A question is a function of (seed, its number, what is known by then)."""
    refuse(axes)
    asked = (configuration.get_sweep(str(folder / "config.json")) or [])[:trials]
    yield from plan.planned(config, asked)
    while len(asked) < trials:
        known = plan.planned(config, asked)
        asked.append(_ask(axes, seeds.key(seed, "search", len(asked)), _history(config, asked, outcome)))
        plan.save(folder, config, asked)
        new = plan.planned(config, asked)
        if len(new) > len(known):
            yield new[-1]


def refuse(axes: Sequence[plan.Values | plan.Range]) -> None:
    """Errors: UserError without Optuna, and for a search among seeds."""
    if any("seed" in axis.keys for axis in axes):
        raise UserError(
            "--search=optuna: a seed is not chosen by its figure; sweep seeds afterwards, with --sweep=seed=0,1"
        )
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("--search=optuna needs Optuna: pip install 'rosepo-jax[optuna]'") from None


def _history(
    config: ConfigDict, asked: Sequence[Mapping[str, Any]], outcome: Outcome
) -> list[tuple[Mapping[str, Any], float | str | None]]:
    return [(settings, outcome(plan.planned(config, [settings])[0])) for settings in asked]


def _ask(
    axes: Sequence[plan.Values | plan.Range], seed: int, history: Sequence[tuple[Mapping[str, Any], float | str | None]]
) -> dict[str, Any]:
    """The next settings to try, after `history`."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {",".join(axis.keys): _distribution(axis) for axis in axes}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
    for settings, figure in history:
        value = figure if isinstance(figure, float) else None
        state = "RUNNING" if figure is None else "FAIL" if value is None else "COMPLETE"
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=value,
                params={",".join(axis.keys): _parameter(axis, settings) for axis in axes},
                distributions=space,
            )
        )
    found = study.ask(space).params
    settings = {}
    for axis in axes:
        value = found[",".join(axis.keys)]
        words = axis.values[value] if isinstance(axis, plan.Values) else (axis.rounded(value),)
        settings |= zip(axis.keys, words)
    return settings


def _distribution(axis: plan.Values | plan.Range) -> Any:
    from optuna import distributions

    if isinstance(axis, plan.Values):
        return distributions.CategoricalDistribution(range(len(axis.values)))
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _parameter(axis: plan.Values | plan.Range, settings: Mapping[str, Any]) -> Any:
    if isinstance(axis, plan.Values):
        return axis.values.index(tuple(settings[key] for key in axis.keys))
    return settings[axis.keys[0]]
