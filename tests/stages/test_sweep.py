"""Sweeps over fake stages: order, sharing, failures, resuming; the table."""

import types

import pytest

from rosepo_jax import __main__ as cli
from rosepo_jax import config as defaults
from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.stages import STAGES, runtime, sweep

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
                results = {"protocols": {"candidates": {"models": cells}}}
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


def test_product_of_flags():
    assert sweep.product(["align.beta=0.1,0.3", "seed=0,1"]) == [
        {"align.beta": "0.1", "seed": "0"},
        {"align.beta": "0.1", "seed": "1"},
        {"align.beta": "0.3", "seed": "0"},
        {"align.beta": "0.3", "seed": "1"},
    ]
    for wrong in ("align.beta", "align.beta=", "align.beta=0.1,,0.3"):
        with pytest.raises(UserError, match="KEY=V1,V2"):
            sweep.product([wrong])


def test_run_ids_are_a_function_of_the_settings():
    one = sweep.run_id({"align.beta": 0.1, "data.path": "/a/b c"})
    assert one == sweep.run_id({"data.path": "/a/b c", "align.beta": 0.1})
    assert one.startswith("beta=0.1_path=-a-b-c-") and "/" not in one
    assert one != sweep.run_id({"align.beta": 0.1, "data.path": "/a/b-c"})
    assert sweep.run_id({"sft.learning_rate": 0.1}) != sweep.run_id({"align.learning_rate": 0.1})


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
        "run": sweep.run_id({"align.beta": 0.5}),
        "settings": {"align.beta": 0.5},
        "error": None,
        "validation_hr1": 0.5,
        "hr1": 0.5,
        "over_sft": 0.25,
        "ndcg5": 0.5,
        "true_win_rate": 0.75,
    }
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert "best first by validation HR@1" in lines[0]
    assert lines[1].split("  ")[0] == "align.beta"
    assert [line.split()[0] for line in lines[2:]] == ["0.5", "0.3", "0.1"]
    assert lines[2].split() == ["0.5", "0.5000", "0.5000", "+0.2500", "0.5000", "0.7500"]


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

    def interrupted(stage, config, workdir, pool=None):
        if stage.NAME == "align" and config.align.beta == 0.5:
            raise KeyboardInterrupt
        return execute(stage, config, workdir, pool)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "execute", interrupted)
        assert rosepo_sweep() == 130
    runs.clear()
    assert rosepo_sweep() == 0
    assert runs == [("align", 0.5), ("evaluate", 0.5)]


def test_settings_listed_twice_run_once_and_aliases_are_resolved(runs, tmp_path):
    rows = sweep.sweep(
        defaults.default(), [{"align.label_smoothing": 0.2}, {"align.label_smoothing": "0.2"}], tmp_path / "w"
    )
    assert [row["settings"] for row in rows] == [{"align.smoothing.mode": "fixed", "align.smoothing.value": 0.2}]


def test_a_wrong_key_is_refused_before_anything_runs(runs, capsys):
    assert rosepo_sweep("--sweep=align.beta=0.1,x") == 2
    assert rosepo_sweep("--sweep=align.bta=0.1") == 2
    assert "did you mean align.beta" in capsys.readouterr().err
    assert runs == []


def test_runs_that_differ_in_their_seed_alone_are_averaged():
    def row(beta, seed, hr1, error=None):
        figures = {"validation_hr1": hr1 - 0.1, "hr1": hr1, "over_sft": None, "ndcg5": None, "true_win_rate": None}
        return {"run": f"{beta}-{seed}", "settings": {"align.beta": beta, "seed": seed}, "error": error, **figures}

    rows = [row(0.1, 1, 0.30), row(0.1, 0, 0.34), row(0.5, 0, 0.50), row(0.5, 1, 0.54), row(0.5, 2, 0.0, "unlucky")]
    groups = sweep.over_seeds(rows)
    assert [(group["settings"], group["seeds"]) for group in groups] == [
        ({"align.beta": 0.5}, [0, 1]),
        ({"align.beta": 0.1}, [0, 1]),
    ]
    assert groups[1]["hr1"]["mean"] == pytest.approx(0.32) and groups[1]["hr1"]["sd"] == pytest.approx(0.02 * 2**0.5)
    assert groups[1]["hr1"]["values"] == {0: 0.34, 1: 0.30} and groups[0]["ndcg5"] is None
    assert sweep.seeds_table(groups).splitlines()[2].split() == [
        "0.5",
        "0",
        "1",
        "0.4200",
        "±",
        "0.0283",
        "0.5200",
        "±",
        "0.0283",
    ]
    assert sweep.over_seeds([{**rows[0], "settings": {"align.beta": 0.1}}]) == []
