"""The stage protocol: up to date, refusals, leftovers of a killed run, manifests. The stages here are small fakes."""

import json
import os
import signal
import subprocess
import sys
import types

import jax
import pytest

from rosepo_jax import config as defaults
from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.stages import runtime


def fake(name, inputs=(), keys=("seed",), resumable=False):
    """A stage that counts its runs and copies what it reads."""
    stage = types.SimpleNamespace(NAME=name, INPUTS=inputs, KEYS=keys, RESUMABLE=resumable, runs=0, crash=None)

    def run(config, folders, out):
        stage.runs += 1
        read = {verb: (folder / "artefact.json").read_text() for verb, folder in folders.items()}
        files.write_json(out / "artefact.json", {"seed": config.seed, "beta": config.align.beta, "read": read})
        if stage.crash:
            raise stage.crash
        return {"runs": stage.runs, "nan": float("nan")}

    stage.run = run
    return stage


@pytest.fixture
def stages(monkeypatch):
    found = {
        "prepare": fake("prepare", keys=("data", "seed")),
        "sft": fake("sft", ("prepare",), ("sft",)),
        "align": fake("align", ("prepare", "sft"), ("align.beta", "align.smoothing", "log.every"), resumable=True),
    }
    monkeypatch.setattr(runtime, "module", found.__getitem__)
    return found


@pytest.fixture
def config():
    return defaults.default()


def run_all(stages, config, workdir):
    return [runtime.execute(stage, config, workdir) for stage in stages.values()]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_runs_once_and_then_is_up_to_date(stages, config, tmp_path, capsys):
    run_all(stages, config, tmp_path)
    before = content(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" in ")[0] for line in said] == [f"{verb}: done" for verb in stages]
    run_all(stages, config, tmp_path)
    assert [stage.runs for stage in stages.values()] == [1, 1, 1]
    assert capsys.readouterr().out.splitlines() == [f"{verb}: up to date" for verb in stages]
    assert content(tmp_path) == before


def test_manifest_says_what_made_the_folder(stages, config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    config.align.beta = 0.3
    run_all(stages, config, tmp_path)
    text = (tmp_path / "align" / "manifest.json").read_text()
    manifest = json.loads(text, parse_constant=pytest.fail)
    assert "hf_very_secret" not in text
    assert set(manifest["config"]) == {
        *("align.beta", "log.every"),
        *(f"align.smoothing.{key}" for key in config.align.smoothing),
    }
    assert manifest["resolved_config"]["align"]["beta"] == 0.3
    assert manifest["inputs"] == {verb: runtime.identity(tmp_path / verb) for verb in ("prepare", "sft")}
    assert manifest["packages"]["jax"] == jax.__version__
    assert manifest["device"] == {"kind": "cpu", "backend": "cpu", "count": 8, "processes": 1}
    assert manifest["code"].startswith("0.1.0+")
    assert manifest["seeds"] == {"seed": 0}
    assert manifest["result"] == {"runs": 1, "nan": None}
    assert manifest["seconds"] >= 0
    assert not (tmp_path / "align" / "begun.json").exists()
    assert files.read_json(tmp_path / "config.json") == manifest["resolved_config"]


def test_identity_is_a_function_of_settings_and_inputs_only(stages, config, tmp_path):
    run_all(stages, config, tmp_path / "a")
    run_all(stages, config, tmp_path / "b")
    other = config.copy_and_resolve_references()
    other.sft.learning_rate = 0.5
    run_all(stages, other, tmp_path / "c")
    a, b, c = ([runtime.identity(tmp_path / run / verb) for verb in stages] for run in "abc")
    assert a == b
    assert [left == right for left, right in zip(a, c)] == [True, False, False]


def test_a_changed_key_is_refused_by_name_with_both_values(stages, config, tmp_path):
    run_all(stages, config, tmp_path)
    config.align.beta, config.align.smoothing.mode = 0.3, "fixed"
    before = content(tmp_path)
    with pytest.raises(UserError) as refused:
        runtime.execute(stages["align"], config, tmp_path)
    for part in (
        "align.beta=0.1",
        "align.beta=0.3",
        "mode='oracle'",
        "mode='fixed'",
        "--workdir",
        "remove that folder",
    ):
        assert part in str(refused.value)
    assert content(tmp_path) == before
    runtime.execute(stages["sft"], config, tmp_path)  # not one of its keys
    assert stages["sft"].runs == 1


def test_a_key_that_does_not_matter_to_the_stage_may_change(stages, config, tmp_path):
    run_all(stages, config, tmp_path)
    config.evaluate.beams = 7
    run_all(stages, config, tmp_path)
    assert [stage.runs for stage in stages.values()] == [1, 1, 1]


def test_a_setting_of_an_input_is_refused_too(stages, config, tmp_path):
    """align itself does not depend on data.history, but its input does."""
    run_all(stages, config, tmp_path)
    config.data.history = 3
    with pytest.raises(UserError, match=r"prepare: was made with data.history=10; now data.history=3"):
        runtime.execute(stages["align"], config, tmp_path)


def test_a_missing_input_names_the_verb_to_run(stages, config, tmp_path):
    with pytest.raises(UserError, match=r"align needs .*prepare: run `rosepo prepare --workdir=.*first"):
        runtime.execute(stages["align"], config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_input_that_was_made_anew_makes_the_stage_stale(stages, config, tmp_path):
    run_all(stages, config, tmp_path)
    for verb in ("prepare", "sft"):
        for path in (tmp_path / verb).iterdir():
            path.unlink()
        (tmp_path / verb).rmdir()
    config.seed = 1
    runtime.execute(stages["prepare"], config, tmp_path)
    runtime.execute(stages["sft"], config, tmp_path)
    with pytest.raises(UserError, match=r"align: is stale, prepare, sft changed since it was made"):
        runtime.execute(stages["align"], config, tmp_path)


def test_a_file_of_the_user_counts_by_its_content(stages, config, tmp_path):
    log, copy = tmp_path / "one" / "log.csv", tmp_path / "two" / "log.csv"
    for path in (log, copy):
        path.parent.mkdir()
        path.write_text("user,item\n")
    config.data.path = str(log)
    runtime.execute(stages["prepare"], config, tmp_path)
    config.data.path = str(copy)
    runtime.execute(stages["prepare"], config, tmp_path)  # the same content elsewhere
    assert stages["prepare"].runs == 1
    copy.write_text("user,item\n1,2\n")
    with pytest.raises(UserError, match=r"prepare: is stale, data.path changed"):
        runtime.execute(stages["prepare"], config, tmp_path)
    log.unlink()
    config.data.path = str(log)
    runtime.execute(stages["prepare"], config, tmp_path)  # prepared data outlive the log
    assert stages["prepare"].runs == 1


@pytest.mark.parametrize("error", [RuntimeError("boom"), UserError("row 3"), KeyboardInterrupt()])
def test_a_crash_leaves_nothing_half_written(stages, config, tmp_path, error):
    stage = stages["prepare"]
    stage.crash = error
    with pytest.raises(type(error)):
        runtime.execute(stage, config, tmp_path)
    assert not any(tmp_path.iterdir())
    stage.crash = None
    runtime.execute(stage, config, tmp_path)
    assert runtime.identity(tmp_path / "prepare")


def test_a_resumable_stage_goes_on_from_what_it_left(stages, config, tmp_path):
    runtime.execute(stages["prepare"], config, tmp_path)
    runtime.execute(stages["sft"], config, tmp_path)
    stage = stages["align"]
    stage.crash = RuntimeError("boom")
    with pytest.raises(RuntimeError):
        runtime.execute(stage, config, tmp_path)
    assert {p.name for p in (tmp_path / "align").iterdir()} == {"begun.json", "artefact.json"}
    changed = config.copy_and_resolve_references()
    changed.align.beta = 0.3
    with pytest.raises(UserError, match=r"align.beta=0.1; now align.beta=0.3"):
        runtime.execute(stage, changed, tmp_path)
    assert stage.runs == 1
    stage.crash = None
    found = []
    go_on = stage.run
    stage.run = lambda config, folders, out: found.extend(p.name for p in out.iterdir()) or go_on(config, folders, out)
    runtime.execute(stage, config, tmp_path)
    assert "artefact.json" in found
    assert runtime.identity(tmp_path / "align")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_mistake_in_a_resumable_stage_leaves_its_checkpoints_or_nothing(stages, config, tmp_path, checkpoint):
    def run(config, folders, out):
        (out / "checkpoints").mkdir()
        (out / "tokenizer.json").write_text("{}")
        if checkpoint:
            (out / "checkpoints" / "10").mkdir()
        raise UserError("align.length: not a length")

    runtime.execute(stages["prepare"], config, tmp_path)
    runtime.execute(stages["sft"], config, tmp_path)
    stages["align"].run = run
    with pytest.raises(UserError, match="not a length"):
        runtime.execute(stages["align"], config, tmp_path)
    assert (tmp_path / "align").exists() == checkpoint


def test_a_folder_that_is_not_ours_is_never_touched(stages, config, tmp_path):
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that rosepo did not make"):
        runtime.execute(stages["prepare"], config, tmp_path)
    assert (tmp_path / "prepare" / "thesis.txt").read_text() == "years of work"


def test_a_workdir_that_cannot_be_made(stages, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be made"):
        runtime.execute(stages["prepare"], config, tmp_path / "file")


def test_other_code_is_said(stages, config, tmp_path, monkeypatch, capsys):
    runtime.execute(stages["prepare"], config, tmp_path)
    made_by = runtime.code_version()
    capsys.readouterr()
    monkeypatch.setattr(runtime, "code_version", lambda: "9.9.9+new")
    runtime.execute(stages["prepare"], config, tmp_path)
    assert capsys.readouterr().out == f"prepare: up to date (made by other code: {made_by})\n"


KILLED = """
import os, signal, sys, types
from rosepo_jax import config, files
from rosepo_jax.stages import runtime

workdir, resumable, kill = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True"

def run(config, folders, out):
    print("found", sorted(p.name for p in out.iterdir()))
    (out / "deep").mkdir(exist_ok=True)
    files.write_text(out / "deep" / "half", "half of the work")
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}

stage = types.SimpleNamespace(NAME="prepare", INPUTS=(), KEYS=("seed",), RESUMABLE=resumable, run=run)
runtime.execute(stage, config.default(), workdir)
"""


@pytest.mark.parametrize("resumable", [False, True])
def test_sigkill_in_the_middle_and_then_again(tmp_path, resumable):
    def process(kill):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(resumable), str(kill)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    assert process(kill=True).returncode == -signal.SIGKILL
    assert runtime.identity(tmp_path / "prepare") is None
    again = process(kill=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == f"found {['begun.json', 'deep'] if resumable else ['begun.json']}"
    assert runtime.identity(tmp_path / "prepare")
    assert {p.name for p in (tmp_path / "prepare").iterdir()} == {"deep", "manifest.json"}
    assert process(kill=False).stdout == "prepare: up to date\n"
