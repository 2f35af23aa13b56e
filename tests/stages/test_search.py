"""Searches by Optuna: it learns from validation figures, goes on where it was, and is optional."""

import sys

import pytest

from rosepo_jax import config as defaults
from rosepo_jax import configuration, files
from rosepo_jax.errors import UserError
from rosepo_jax.stages import plan, search

pytest.importorskip("optuna")
FLAGS = ("align.beta=loguniform(0.01,1)", "align.smoothing.mode,pairs.negatives=oracle:1,none:2")


def figure(run):
    """Best at beta = 0.1 with the oracle."""
    penalty = 0.0 if run.settings["align.smoothing.mode"] == "oracle" else 0.2
    return 1 - abs(run.config.align.beta - 0.1) - penalty


class Study:
    """A search whose runs are not trained: `outcomes` holds what came of them."""

    def __init__(self, folder, seed=0, flags=FLAGS):
        self.config, self.folder, self.seed, self.outcomes = defaults.default(), folder, seed, {}
        self.axes = plan.parse(self.config, flags)

    def runs(self, trials):
        return search.runs(self.config, self.axes, trials, self.seed, self.folder, lambda r: self.outcomes.get(r.name))

    def finish(self, trials):
        names = []
        for run in self.runs(trials):
            names.append(run.name)
            self.outcomes.setdefault(run.name, figure(run))
        return names


def test_it_learns(tmp_path):
    study = Study(tmp_path)
    study.finish(30)
    asked = configuration.get_sweep(str(tmp_path / "config.json"))
    assert len(asked) == 30 and all(0.01 <= settings["align.beta"] <= 1 for settings in asked)
    late = asked[15:]
    assert sum(settings["align.smoothing.mode"] == "oracle" for settings in late) > 10
    assert all((s["align.smoothing.mode"] == "oracle") == (s["pairs.negatives"] == "1") for s in asked)
    blind = Study(tmp_path / "blind")
    for run in blind.runs(30):
        blind.outcomes[run.name] = 0.5
    unlearned = configuration.get_sweep(str(tmp_path / "blind" / "config.json"))[15:]

    def regret(settings):
        return sum(abs(s["align.beta"] - 0.1) for s in settings)

    assert regret(late) < regret(unlearned)


def test_a_search_that_is_killed_goes_on_with_the_same_questions(tmp_path):
    whole = Study(tmp_path / "whole").finish(14)
    killed = Study(tmp_path / "killed")
    for number, run in enumerate(killed.runs(14)):
        if number == 12:
            break  # asked for, not finished
        killed.outcomes[run.name] = figure(run)
    again = killed.finish(14)
    assert again == whole
    assert killed.finish(14) == whole and killed.finish(5) == whole[:5]
    assert killed.finish(16)[:14] == whole and len(files.read_json(tmp_path / "killed" / "runs.json")) == 16


def test_failed_and_unfinished_runs_count_but_teach_nothing(tmp_path):
    study = Study(tmp_path)
    runs = study.runs(14)
    for number in range(14):  # all at once, as with many workers
        run = next(runs)
        if number % 3:
            study.outcomes[run.name] = figure(run) if number % 3 == 1 else "unlucky"
    assert next(runs, None) is None and len(files.read_json(tmp_path / "runs.json")) == 14


def test_the_same_settings_are_one_run(tmp_path):
    study = Study(tmp_path, flags=["align.smoothing.mode=oracle,none"])
    assert len(study.finish(8)) == 2
    assert len(files.read_json(tmp_path / "runs.json")) == 8


def test_whole_numbers(tmp_path):
    study = Study(tmp_path, flags=["pairs.negatives=loguniform(1,8)", "align.smoothing.mode=oracle"])
    study.finish(6)
    assert all(type(settings["pairs.negatives"]) is int for settings in files.read_json(tmp_path / "runs.json"))


def test_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'rosepo-jax\[optuna\]'"):
        next(Study(tmp_path).runs(3))
    assert not any(tmp_path.iterdir())
