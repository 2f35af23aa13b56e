"""`rosepo sweep` over fake stages: order, sharing, failures, resuming, searches; the table and the page."""

import types

import pytest

from rosepo_jax import __main__ as cli
from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.stages import STAGES, plan, runtime

KEYS = {"prepare": ("data", "seed"), "oracle": ("oracle",), "sft": ("sft",), "align": ("align",)}
INPUTS = {"prepare": (), "align": ("sft", "pairs"), "evaluate": ("align",), "pairs": ("sft", "oracle")}

CONFIG = """
from rosepo_jax import config

def get_config(arg=""):
    return config.default()

def get_sweep():
    return [{"align.beta": beta} for beta in (0.1, 0.5)]
"""


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Fake stages; the list of (verb, beta) that really ran. Validation HR@1 is beta, and beta = 13 fails."""
    ran = []

    def fake(verb):
        def run(config, folders, out):
            ran.append((verb, config.align.beta))
            if verb == "align" and config.align.beta == 13:
                raise UserError("align.beta is unlucky")
            if verb == "evaluate":
                cells = {
                    "sft": {"HR@1": {"value": 0.25}},
                    "aligned": {"HR@1": {"value": 1 - config.align.beta}, "NDCG@5": {"value": 0.5}},
                }
                results = {"protocols": {"candidates": {"hash": "h", "models": cells}}}
                if config.data.source == "world":
                    results["truth"] = {"models": {"aligned": {"true_win_rate": 0.75}}}
                files.write_json(out / "results.json", results)
            return {"HR@1": config.align.beta}

        inputs = INPUTS.get(verb, ("prepare",))
        return types.SimpleNamespace(NAME=verb, INPUTS=inputs, KEYS=KEYS.get(verb, ()), RESUMABLE=False, run=run)

    stages = {verb: fake(verb) for verb in STAGES}
    monkeypatch.setattr(runtime, "module", stages.__getitem__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    return ran


def rosepo_sweep(*flags):
    return cli.main(["sweep", "--config=c.py", "--workdir=w", *flags])


def test_best_first_and_shared_stages_once(runs, tmp_path, capsys):
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5,0.3") == 0
    assert [verb for verb, _ in runs].count("prepare") == 1
    assert [verb for verb, _ in runs].count("sft") == 1
    assert [beta for verb, beta in runs if verb == "align"] == [0.1, 0.5, 0.3]
    assert "report" not in dict(runs)
    saved = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")
    assert "validation HR@1" in saved["chosen_by"]
    assert [row["settings"] for row in saved["runs"]] == [{"align.beta": beta} for beta in (0.5, 0.3, 0.1)]
    assert saved["runs"][0] == {
        "run": plan.run_id({"align.beta": 0.5}),
        "settings": {"align.beta": 0.5},
        "error": None,
        "validation_hr1": 0.5,
        "hr1": 0.5,
        "over_sft": 0.25,
        "ndcg5": 0.5,
        "true_win_rate": 0.75,
    }
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert "best first by validation HR@1" in lines[0]
    assert lines[1].split("  ")[0] == "align.beta"
    assert set(lines[2]) == {"-", " "}
    assert [line.split()[0] for line in lines[3:]] == ["0.5", "0.3", "0.1"]
    assert lines[3].split() == ["0.5", "0.5000", "0.5000", "+0.2500", "0.5000", "0.7500"]


def test_no_truth_no_column(runs, capsys):
    assert rosepo_sweep("--sweep=align.beta=0.1", "--config.data.source=movielens") == 0
    assert "true win rate" not in capsys.readouterr().out


def test_stages_of_the_workdir_itself_are_shared(runs):
    assert cli.main(["run", "--config=c.py", "--workdir=w"]) == 0
    runs.clear()
    assert rosepo_sweep() == 0  # get_sweep: beta = 0.1, which is the default, and 0.5
    assert runs == [("align", 0.5), ("evaluate", 0.5)]


def test_a_finished_sweep_costs_nothing_and_says_the_same(runs, capsys, tmp_path):
    rosepo_sweep()
    table = capsys.readouterr().out.splitlines()[-4:]
    saved = (tmp_path / "w" / "sweep" / "sweep.json").read_bytes()
    runs.clear()
    assert rosepo_sweep() == 0
    assert runs == []
    assert capsys.readouterr().out.splitlines()[-4:] == table
    assert (tmp_path / "w" / "sweep" / "sweep.json").read_bytes() == saved


def test_a_failing_run_is_in_the_table_and_in_the_status(runs, tmp_path, capsys):
    assert rosepo_sweep("--sweep=align.beta=13,0.1") == 1
    rows = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]
    assert [row["error"] for row in rows] == [None, "align.beta is unlucky"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("failed: align.beta is unlucky")


def test_all_runs_failing_still_makes_a_table(runs, capsys):
    assert rosepo_sweep("--sweep=align.beta=13") == 1
    assert "failed: align.beta is unlucky" in capsys.readouterr().out


def test_an_interrupted_sweep_goes_on(runs, monkeypatch):
    execute = runtime.execute

    def interrupted(stage, config, workdir):
        if stage.NAME == "align" and config.align.beta == 0.5:
            raise KeyboardInterrupt
        return execute(stage, config, workdir)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "execute", interrupted)
        assert rosepo_sweep() == 130
    runs.clear()
    assert rosepo_sweep() == 0
    assert runs == [("align", 0.5), ("evaluate", 0.5)]


def test_a_wrong_key_is_refused_before_anything_runs(runs, capsys):
    assert rosepo_sweep("--sweep=align.beta=0.1,x") == 2
    assert rosepo_sweep("--sweep=align.bta=0.1") == 2
    assert "did you mean align.beta" in capsys.readouterr().err
    assert runs == []


def test_the_page_and_the_best(runs, tmp_path, capsys):
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", "--sweep=align.smoothing.mode=oracle,none") == 0
    page = (tmp_path / "w" / "sweep" / "report.html").read_text("utf-8")
    assert page.count('aria-label="Heat map of') == 3 and "Best settings: align.beta" in page
    saved = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")
    assert saved["best"]["align.beta"] == 0.5
    assert "w/sweep/report.html" in capsys.readouterr().out
    assert [verb for verb, _ in runs].count("pairs") == 1 and [verb for verb, _ in runs].count("align") == 4


def test_keys_that_move_together_and_random_draws(runs, tmp_path):
    assert rosepo_sweep("--sweep=align.beta,seed=0.1:1,0.3:2") == 0
    assert [beta for verb, beta in runs if verb == "align"] == [0.1, 0.3]
    runs.clear()
    draw = ["--sweep=align.beta=loguniform(0.01,1)", "--trials=5"]
    assert rosepo_sweep(*draw) == 0
    betas = [row["settings"]["align.beta"] for row in files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]]
    assert len(betas) == 5 and betas == sorted(betas, reverse=True) and all(0.01 <= beta <= 1 for beta in betas)
    runs.clear()
    assert rosepo_sweep(*draw, "--trials=6") == 0  # the first five are the same draws
    assert [verb for verb, _ in runs] == ["align", "evaluate"]
    runs.clear()
    assert rosepo_sweep(*draw, "--search-seed=1") == 0
    assert len(runs) == 10


def test_one_run_and_then_the_table(runs, tmp_path, capsys):
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", "--only=1") == 0
    assert [beta for verb, beta in runs if verb == "align"] == [0.5]
    assert not (tmp_path / "w" / "sweep" / "sweep.json").exists()
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", "--collect") == 1
    rows = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]
    assert [(row["settings"]["align.beta"], row["error"]) for row in rows] == [(0.5, None), (0.1, "not finished")]
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", "--only=0", "--stages=prepare,oracle,sft") == 0
    assert [beta for verb, beta in runs if verb == "align"] == [0.5]
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", "--only=0") == 0
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5", "--collect") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only=2"], "--only=2: there are 2 runs"),
        (["--only=-1"], "--only: invalid number value"),
        (["--only=0;id"], "--only: invalid number value"),
        (["--only=0", "--stages=sft,report"], "--stages=report: there are prepare"),
        (["--trials=0"], "--trials: invalid number value"),
        (["--trials=3"], "--trials draws from --sweep"),
        (["--sweep=align.beta=uniform(0,1)"], "give --trials=N"),
        (["--runner=local"], "local:N"),
        (["--runner=local:0"], "local:N"),
        (["--runner=sequential:2"], "local:N"),
        (["--runner=ray"], "slurm"),
        (["--search=optuna", "--sweep=align.beta=0.1,0.2"], "needs --trials=N"),
        (["--search=optuna", "--sweep=align.beta=0.1,0.2", "--trials=2", "--runner=slurm"], "it learns as it goes"),
        (["--search=optuna", "--sweep=seed=0,1", "--trials=2"], "a seed is not chosen"),
        (["--runner=local:2", "--distributed"], "leave out --distributed"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(runs, tmp_path, capsys, monkeypatch, flags, message):
    from rosepo_jax import distributed

    monkeypatch.setattr(distributed, "start", lambda: None)
    assert rosepo_sweep(*flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert runs == [] and not (tmp_path / "w").exists()


def test_a_dry_run_lists_the_runs(runs, tmp_path, capsys):
    assert rosepo_sweep("--dry-run") == 0
    assert [line.split("-")[0] for line in capsys.readouterr().out.splitlines()] == ["0: beta=0.1", "1: beta=0.5"]
    assert runs == [] and not (tmp_path / "w").exists()


def test_what_all_runs_share_fails_once(runs, tmp_path, monkeypatch, capsys):
    def broken(config, folders, out):
        runs.append(("sft", "broken"))
        raise UserError("sft.length: not a length")

    sft = runtime.module("sft")
    monkeypatch.setattr(sft, "run", broken)
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5,0.3") == 1
    assert [verb for verb, _ in runs] == ["prepare", "oracle", "sft"]
    rows = files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]
    assert [row["error"] for row in rows] == ["sft.length: not a length"] * 3
    monkeypatch.setattr(sft, "run", lambda *_: {})
    assert rosepo_sweep("--sweep=align.beta=0.1,0.5,0.3") == 0  # tried again because the command was given again


def test_figures_of_other_settings_are_not_those_of_this_sweep(runs, tmp_path):
    assert rosepo_sweep() == 0
    assert rosepo_sweep("--config.sft.learning_rate=0.7") == 1
    errors = [row["error"] for row in files.read_json(tmp_path / "w" / "sweep" / "sweep.json")["runs"]]
    assert all("sft.learning_rate=0.001; now sft.learning_rate=0.7" in error for error in errors)


def test_a_run_that_shares_everything_has_a_config_for_later_commands(runs, tmp_path):
    assert cli.main(["run", "--config=c.py", "--workdir=w"]) == 0
    assert rosepo_sweep() == 0
    shared = tmp_path / "w" / "sweep" / plan.run_id({"align.beta": 0.1})
    assert files.read_json(shared / "config.json")["align"]["beta"] == 0.1
