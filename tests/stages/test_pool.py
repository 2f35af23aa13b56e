"""Shared stages: linked when complete, gone on with when left, claimed by one process at a time. Fake stages."""

import os
import threading
import types

import pytest

from rosepo_jax import config as defaults
from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.stages import pool as pools
from rosepo_jax.stages import runtime


@pytest.fixture
def config():
    return defaults.default()


@pytest.fixture
def stages(monkeypatch):
    """prepare and sft, which keeps what it has when it crashes; `found[verb]`: what each start found in its folder."""
    made = {"prepare": fake("prepare", (), ("data", "seed")), "sft": fake("sft", ("prepare",), ("sft",))}
    monkeypatch.setattr(runtime, "module", made.__getitem__)
    return made


def fake(name, inputs, keys):
    stage = types.SimpleNamespace(NAME=name, INPUTS=inputs, KEYS=keys, RESUMABLE=name == "sft", crash=None, found=[])

    def run(config, folders, out):
        stage.found.append({path.name for path in out.iterdir()})
        for folder in folders.values():
            assert (folder / "artefact.json").exists()
        files.write_json(out / ("half.json" if stage.crash else "artefact.json"), {})
        if stage.crash:
            raise stage.crash
        return {}

    stage.run = run
    return stage


def run_both(stages, config, workdir, name):
    with pools.Pool(workdir).claim(name, name):
        for stage in stages.values():
            runtime.execute(stage, config, workdir / "sweep" / name)
    return workdir / "sweep" / name


def test_a_complete_stage_is_linked(stages, config, tmp_path, capsys):
    one, two = (run_both(stages, config, tmp_path, name) for name in ("one", "two"))
    assert [len(stage.found) for stage in stages.values()] == [1, 1]
    for verb in stages:
        assert (two / verb).is_symlink() and not os.path.isabs(os.readlink(two / verb))
        assert (two / verb).resolve() == (one / verb).resolve()
    config.seed = 1
    three = run_both(stages, config, tmp_path, "three")
    assert len(stages["prepare"].found) == 2 and not (three / "prepare").is_symlink()
    config.seed = 0
    one.rename(tmp_path / "gone")  # the shared folders have been removed
    run_both(stages, config, tmp_path, "two")
    assert [len(stage.found) for stage in stages.values()] == [3, 3]
    assert not (two / "prepare").is_symlink() and runtime.identity(two / "prepare")


def test_stages_of_the_workdir_itself_are_linked(stages, config, tmp_path):
    for stage in stages.values():
        runtime.execute(stage, config, tmp_path)
    one = run_both(stages, config, tmp_path, "one")
    assert (one / "sft").resolve() == (tmp_path / "sft").resolve() and len(stages["sft"].found) == 1


def test_what_a_killed_run_left_goes_on_in_another(stages, config, tmp_path):
    stages["sft"].crash = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        run_both(stages, config, tmp_path, "one")
    stages["sft"].crash = None
    two = run_both(stages, config, tmp_path, "two")
    assert stages["sft"].found == [{"begun.json"}, {"begun.json", "half.json"}]
    assert {path.name for path in (two / "sft").iterdir()} == {"half.json", "artefact.json", "manifest.json"}
    assert not (two / "sft").is_symlink() and not (tmp_path / "sweep" / "one" / "sft").exists()
    run_both(stages, config, tmp_path, "one")
    assert (tmp_path / "sweep" / "one" / "sft").resolve() == (two / "sft").resolve()


def test_a_beginning_of_what_another_run_completed_gives_way(stages, config, tmp_path):
    stages["sft"].crash = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        run_both(stages, config, tmp_path, "one")
    stages["sft"].crash = None
    hidden = (tmp_path / "sweep" / "one").rename(tmp_path / "hidden")
    two = run_both(stages, config, tmp_path, "two")
    one = hidden.rename(tmp_path / "sweep" / "one")
    run_both(stages, config, tmp_path, "one")
    assert (one / "sft").is_symlink() and (one / "sft").resolve() == (two / "sft").resolve()
    assert len(stages["sft"].found) == 2


def test_a_beginning_with_other_settings_is_refused_and_kept(stages, config, tmp_path):
    stages["sft"].crash = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        run_both(stages, config, tmp_path, "one")
    stages["sft"].crash = None
    config.sft.learning_rate = 0.5
    run_both(stages, config, tmp_path, "two")
    with pytest.raises(UserError, match=r"sft.learning_rate=0.001; now sft.learning_rate=0.5"):
        run_both(stages, config, tmp_path, "one")
    assert (tmp_path / "sweep" / "one" / "sft" / "half.json").exists()


def test_files_of_the_user_are_never_replaced_by_a_link(stages, config, tmp_path):
    run_both(stages, config, tmp_path, "one")
    (tmp_path / "sweep" / "two" / "sft").mkdir(parents=True)
    (tmp_path / "sweep" / "two" / "sft" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that rosepo did not make"):
        run_both(stages, config, tmp_path, "two")
    assert (tmp_path / "sweep" / "two" / "sft" / "thesis.txt").read_text() == "years of work"


def test_a_broken_manifest_elsewhere_is_no_ones_stage(stages, config, tmp_path):
    one = run_both(stages, config, tmp_path, "one")
    (one / "prepare" / "manifest.json").write_text("{")
    run_both(stages, config, tmp_path, "two")
    assert len(stages["prepare"].found) == 2


def test_a_claim_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pools, "POLL", 0.01)
    order, waiting = [], threading.Event()
    monkeypatch.setattr(pools, "print", lambda text, flush: (order.append(text), waiting.set()), raising=False)

    def second():
        with pools.Pool(tmp_path).claim("x", "sft"):
            order.append("second")

    thread = threading.Thread(target=second)
    with pools.Pool(tmp_path).claim("x", "sft"), pools.Pool(tmp_path).claim("y", "sft"):
        thread.start()
        assert waiting.wait(60)
        order.append("first done")
    thread.join(60)
    assert not list((tmp_path / "sweep" / "locks").iterdir())
    assert order == ["sft: another process is at it; waiting", "first done", "second"]


def at_once(stages, monkeypatch, work, names):
    """work(name) in a thread each, of which the first that comes to SFT goes on when all have been started. Threads
    stand for processes: locks are of open files, not of processes."""
    monkeypatch.setattr(pools, "POLL", 0.01)
    begun, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(pools, "print", lambda text, flush: waiting.set(), raising=False)
    run = stages["sft"].run

    def slow(*arguments):
        begun.set()
        assert waiting.wait(60)
        return run(*arguments)

    stages["sft"].run = slow
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert begun.is_set() and [len(stage.found) for stage in stages.values()] == [1, 1]


def test_two_at_once_make_one(stages, config, tmp_path, monkeypatch):
    at_once(stages, monkeypatch, lambda name: run_both(stages, config, tmp_path, name), ("one", "two"))
    assert sorted((tmp_path / "sweep" / name / "sft").is_symlink() for name in ("one", "two")) == [False, True]


def test_two_commands_at_one_workdir_take_turns(stages, config, tmp_path, monkeypatch, capsys):
    """Started twice by mistake, or by a queue that believes the first one dead."""

    def work(_):
        for stage in stages.values():
            runtime.execute(stage, config, tmp_path)

    at_once(stages, monkeypatch, work, ("one", "two"))
    assert capsys.readouterr().out.count("sft: up to date") == 1


def test_a_workdir_is_a_run_of_a_sweep_by_its_place(tmp_path):
    assert pools.Pool.around(tmp_path / "sweep" / "one") is None  # a folder that happens to have that name
    with pools.Pool(tmp_path).claim("one", "one"):
        pass
    assert pools.Pool.around(tmp_path / "sweep" / "one").workdir == tmp_path
    assert pools.Pool.around(tmp_path / "other" / "one") is None


def test_no_locks_on_this_file_system(stages, config, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(pools.fcntl, "flock", flock)
    with pytest.raises(UserError, match="no locks on this file system"), pools.Pool(tmp_path).claim("x", "sft"):
        pass
    runtime.execute(stages["prepare"], config, tmp_path)  # alone it needs none
    assert len(stages["prepare"].found) == 1


def test_a_file_that_its_last_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """Opened while another held it, locked after that one had removed it: a third would lock another file."""
    lock, removed = pools._lock, []

    def late(file):
        if not removed:
            removed.append((tmp_path / "lock").unlink())
        return lock(file)

    monkeypatch.setattr(pools, "_lock", late)
    with pools.held(tmp_path / "lock", "it"):
        assert (tmp_path / "lock").exists()
    assert not list(tmp_path.iterdir())
