"""The loop with a linear model: restarts, what is kept, what is skipped, when it stops, how often it compiles."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from rosepo_jax import config as defaults
from rosepo_jax.errors import UserError
from rosepo_jax.training import checkpoint, goodput, loop, sharding
from rosepo_jax.training.metrics import MEASURED
from rosepo_jax.training.step import Task

STEPS, BATCH = 12, 8
START = np.zeros((4, 8), np.float32)
TRUTH = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def batch_of(step):
    """A pure function of the step, with ragged rows: a mask says which of its values are real."""
    generator = np.random.default_rng([7, step])
    x = generator.normal(size=(BATCH, 4)).astype(np.float32)
    mask = np.arange(8) < generator.integers(1, 9, (BATCH, 1))
    y = x @ TRUTH + 0.1 * generator.normal(size=(BATCH, 8)).astype(np.float32)
    ids = 1000 * step + np.arange(BATCH, dtype=np.int32)
    ones = np.ones((BATCH, 1), np.int32)
    counted = {"parts": ({"prompt_BxP": mask, "prompt_mask_BxP": mask, "fed_BxQ": ones},), "count_BxR": ones}
    return {"row_B": ids, "x": x, "y": y, "mask": mask, **counted}


def stream(*, start, stop):
    return map(batch_of, range(start, stop))


TRACES = []


def forward(trainable, frozen, batch):
    TRACES.append(1)
    return jnp.where(batch["mask"], batch["x"] @ trainable["embedding"] - batch["y"], 0.0)


def mean_square(error, constants, batch):
    loss = jnp.square(error).sum() / batch["mask"].sum()
    return loss, {"loss": loss}


TASK = Task(forward, lambda frozen, batch: frozen["zero"][: len(batch["x"])], mean_square)


def by_distance(trainable):
    """Higher is better, as HR@1 is."""
    return {"HR@1": -float(np.square(sharding.to_host(trainable["embedding"]) - TRUTH).mean())}


def train(
    out,
    *,
    stream=stream,
    validate=by_distance,
    interval="2 steps",
    log_every=1,
    task=TASK,
    first=lambda metrics: None,
    profile="",
    **keys,
):
    config = defaults.default()
    config.log.every, config.log.tensorboard, config.log.profile = log_every, False, profile
    config.log.peak_flops = 1e9
    config.checkpoint.every = "3 steps"
    config.sft.batch_size, config.sft.length = BATCH, f"{STEPS} steps"
    config.sft.learning_rate, config.sft.validate = 0.05, interval
    config.sft.update(keys)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1), sharding.AXES)
    return loop.train(
        name="sft", clock=goodput.Clock(), config=config, settings=config.sft, out=pathlib.Path(out), mesh=mesh,
        task=task, trainable=sharding.place(mesh, {"embedding": START}), frozen={"zero": jnp.zeros((BATCH,))},
        rows=100, stream=stream, validate=validate, first=first, work=lambda batch: 1e6,
    )  # fmt: skip


def rows(out):
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in lines(out)]


def lines(out):
    return list(map(json.loads, (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()))


def model(out):
    like = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return np.asarray(checkpoint.load_params(pathlib.Path(out) / "model", {"embedding": like})["embedding"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, train(out)


def test_it_learns_and_leaves_the_best_model(straight):
    out, best = straight
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == STEPS
    validations = {row["step"]: row["validation/HR@1"] for row in rows(out) if "validation/HR@1" in row}
    assert list(validations) == [0, 2, 4, 6, 8, 10, 12]
    assert best["HR@1"] > validations[0] + 0.1
    assert best == {"HR@1": max(validations.values()), "step": max(validations, key=validations.__getitem__)}
    assert by_distance({"embedding": jnp.asarray(model(out))})["HR@1"] == best["HR@1"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill", [1, 5, 6, 11])
def test_a_restart_changes_no_bit(tmp_path, straight, kill):
    def interrupted(*, start, stop):
        for step in range(start, stop):
            if step == kill:
                raise Killed
            yield batch_of(step)

    with pytest.raises(Killed):
        train(tmp_path, stream=interrupted)
    starts = []

    def observed(*, start, stop):
        starts.append(start)
        return stream(start=start, stop=stop)

    assert train(tmp_path, stream=observed) == straight[1]
    assert starts == [kill // 3 * 3], "goes on from the last checkpoint"
    assert rows(tmp_path) == rows(straight[0])
    np.testing.assert_array_equal(model(tmp_path), model(straight[0]))


def test_a_restart_with_accumulation_and_running_means_changes_no_bit(tmp_path):
    settings = {"accumulate": 2, "spike": 8.0}
    best = train(tmp_path / "straight", **settings)

    def interrupted(*, start, stop):
        yield from map(batch_of, range(start, 8))
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed", stream=interrupted, **settings)
    assert train(tmp_path / "killed", **settings) == best
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    np.testing.assert_array_equal(model(tmp_path / "killed"), model(tmp_path / "straight"))


def test_a_finished_run_trains_no_further(tmp_path, straight):
    train(tmp_path)
    assert train(tmp_path, stream=lambda *, start, stop: stream(start=start, stop=stop)) == straight[1]
    assert rows(tmp_path) == rows(straight[0])


def test_a_killed_process_resumes_bit_for_bit(tmp_path, straight):
    """SIGKILL while update 8 is fed: no handler runs, nothing is closed."""
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
import test_loop

def killed(*, start, stop):
    for step in range(start, stop):
        if step == 8:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        yield test_loop.batch_of(step)

test_loop.train({str(tmp_path)!r}, stream=killed)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert rows(tmp_path)[-1]["step"] < STEPS
    assert train(tmp_path) == straight[1]
    assert rows(tmp_path) == rows(straight[0])
    np.testing.assert_array_equal(model(tmp_path), model(straight[0]))


def test_the_best_validation_is_kept_and_patience_stops(tmp_path):
    """Validation says: better until update 4, then worse. Patience 2 stops at update 8; a restart trains no further."""
    seen = {}

    def validate(trainable):
        number = 2 * len(seen)
        seen[number] = sharding.to_host(trainable["embedding"]).copy()
        return {"HR@1": 1.0 - abs(number - 4) / 10}

    best = train(tmp_path, validate=validate, patience=2)
    assert list(seen) == [0, 2, 4, 6, 8] and best == {"HR@1": 1.0, "step": 4}
    np.testing.assert_array_equal(model(tmp_path), seen[4])
    assert not np.array_equal(seen[4], seen[8])
    before = rows(tmp_path)
    assert train(tmp_path, validate=validate, patience=2) == best
    assert len(seen) == 5 and rows(tmp_path) == before


def test_what_a_checkpoint_calls_kept_is_there_whatever_was_kept_after_it(tmp_path):
    """A run that dies after a better model was written, but no checkpoint; and where it goes on, nothing is better."""
    hits = {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.2, 8: 0.3, 10: 0.3, 12: 0.3}

    def by(figures):
        turns = iter(figures)
        return lambda trainable: {"HR@1": next(turns)}

    def interrupted(*, start, stop):
        for step in range(start, stop):
            if step == 5:
                raise Killed
            yield batch_of(step)

    expected = train(tmp_path / "straight", validate=by([*hits.values()][:2] + [0.2] * 5))
    with pytest.raises(Killed):
        train(tmp_path / "run", stream=interrupted, validate=by(hits.values()))
    assert {path.name for path in (tmp_path / "run" / "kept").iterdir()} == {"2", "4"}
    kept = train(tmp_path / "run", validate=by([0.2] * 5))
    assert kept == expected == {"HR@1": 0.5, "step": 2}
    np.testing.assert_array_equal(model(tmp_path / "run"), model(tmp_path / "straight"))


def test_no_more_is_kept_than_checkpoints_speak_of(tmp_path, monkeypatch):
    rising, seen = iter(range(100)), []
    save = checkpoint.save_params
    monkeypatch.setattr(
        checkpoint,
        "save_params",
        lambda path, params: (save(path, params), seen.append(len(list(path.parent.iterdir())))),
    )
    train(tmp_path, validate=lambda trainable: {"HR@1": float(next(rising))}, interval="1 steps")
    # Those of two checkpoints and of the one before them, the latest, and the new one.
    assert len(seen) == STEPS + 1 and max(seen) == 5
    assert not (tmp_path / "kept").exists()


def test_kept_parameters_that_are_gone_are_a_refusal(tmp_path):
    def interrupted(*, start, stop):
        yield from map(batch_of, range(start, 7))
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path, stream=interrupted)
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(UserError, match="kept/6: no such folder; remove the folder of that stage to redo it"):
        train(tmp_path)


def test_a_model_that_was_handed_on_is_not_that_of_an_earlier_checkpoint(tmp_path):
    """The last checkpoint is lost after the end of training: the one before it speaks of other parameters."""
    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    with pytest.raises(UserError, match=r"kept/\d+: no such folder"):
        train(tmp_path)


def test_the_first_of_equal_validations_is_kept(tmp_path):
    assert train(tmp_path, validate=lambda trainable: {"HR@1": 0.5})["step"] == 0
    np.testing.assert_array_equal(model(tmp_path), START)


def poisoned(*bad):
    def batches(*, start, stop):
        for step in range(start, stop):
            batch = batch_of(step)
            if step + 1 in bad:
                batch["y"][0] = np.nan
                batch["mask"][0] = True
            yield batch

    return batches


def test_skipped_updates_are_counted_in_their_rows(tmp_path):
    train(tmp_path, stream=poisoned(4, 7), max_bad_steps=2, log_every=5)
    skipped = [row["step"] for row in rows(tmp_path) if row.get("skipped")]
    assert skipped == [4, 7]
    assert [row["step"] for row in rows(tmp_path) if "learning_rate" in row] == [1, 4, 5, 7, 10, 12]
    assert np.isfinite(model(tmp_path)).all()


def test_too_many_skipped_updates_end_the_run_naming_rows(tmp_path):
    with pytest.raises(UserError, match=r"3 updates .*sft\.max_bad_steps=2; last at update 9, rows \[8000, 8001"):
        train(tmp_path, stream=poisoned(4, 7, 9), max_bad_steps=2)
    # The count survives a restart: the budget belongs to the run.
    with pytest.raises(UserError, match="3 updates"):
        train(tmp_path, stream=poisoned(4, 7, 9), max_bad_steps=2)


def test_what_is_skipped_is_said_with_its_rows(tmp_path, capsys):
    train(tmp_path, stream=poisoned(4), max_bad_steps=2)
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(said) == 1
    assert said[0].startswith("sft: update 4 skipped (loss nan, gradient nan); its rows 3000 3001 3002 ")


def test_the_journal_accounts_for_the_time_of_the_stage(tmp_path):
    train(tmp_path)
    lines = goodput.read(tmp_path / goodput.FILE)
    assert lines[0]["update"] == 0 and lines[-1]["update"] == STEPS
    found = goodput.totals(lines)
    assert all(found[bucket] > 0 for bucket in ("init", "compile", "data", "step", "checkpoint", "evaluation"))
    assert found["lost"] == 0


def test_the_first_metrics_are_shown_once(tmp_path):
    shown = []
    train(tmp_path, first=shown.append, length="3 steps")
    assert len(shown) == 1 and shown[0].keys() == {"loss", "grad_norm", "learning_rate"}


def test_no_updates_leave_the_start(tmp_path):
    assert train(tmp_path, length="0 steps") == {**by_distance({"embedding": jnp.asarray(START)}), "step": 0}
    np.testing.assert_array_equal(model(tmp_path), START)


def test_one_trace_and_one_compilation_for_all_updates(tmp_path, caplog):
    TRACES.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(tmp_path)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert len(TRACES) == 1
    assert sum("train_step" in message for message in compiled) == 1, compiled


def test_batches_that_do_not_divide_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"sft\.batch_size=8 must be a multiple of 6"):
        train(tmp_path, accumulate=3)
    assert not list(tmp_path.iterdir())


def test_the_last_parameters_are_handed_on_when_asked(tmp_path):
    worse = iter(range(0, -100, -1))  # validation falls all the time: the best would be the start
    kept = train(tmp_path, validate=lambda trainable: {"HR@1": float(next(worse))}, keep="last")
    assert kept["step"] == STEPS
    like = {"embedding": jax.device_put(START)}
    assert not np.array_equal(checkpoint.load_params(tmp_path / "model", like)["embedding"], START)
    with pytest.raises(UserError, match=r"sft\.keep"):
        train(tmp_path / "other", keep="first")


def test_every_line_says_how_fast_it_goes(straight):
    """But the first: its update waits for what is read ahead. What is compiled is said once."""
    first, *others = (row for row in lines(straight[0]) if "loss" in row)
    assert first.keys() & set(MEASURED) == {"compile_seconds", "memory/peak_bytes"}
    for row in others:
        # One response a row: there are no pairs.
        assert set(MEASURED) - row.keys() == {"compile_seconds", "pairs_per_second"}
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 2e9)  # of two devices
        assert 0 < row["tokens_useful"] < 1 and 0 <= row["input_stall"] <= 1
    state = 3 * START.nbytes  # parameters and two moments: whole rows on each of two devices
    assert all(row["memory/peak_bytes"] > state / 2 for row in (first, *others))


def test_the_next_batch_is_sent_while_an_update_runs(tmp_path, monkeypatch):
    """Update n is started, then the line of n - 1 is written, then batch n + 1 is fetched; n is not waited for."""
    seen = []
    write = loop.MetricWriter.scalars
    monkeypatch.setattr(
        loop.MetricWriter, "scalars", lambda self, n, row: ("loss" in row and seen.append(n)) or write(self, n, row)
    )

    def fetched(*, start, stop):
        for step in range(start, stop):
            seen.append(f"fetch {step + 1}")
            yield batch_of(step)

    train(tmp_path, stream=fetched, length="4 steps", interval="4 steps")
    # A checkpoint after update 3 waits for it.
    assert seen == ["fetch 1", "fetch 2", 1, "fetch 3", 2, 3, "fetch 4", 4]


def test_a_second_layout_is_compiled_once_and_its_time_is_no_updates(tmp_path, caplog):
    def two(*, start, stop):
        return (batch_of(step) | {"width": np.zeros((BATCH, 1 + step % 2))} for step in range(start, stop))

    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(tmp_path, stream=two, length="6 steps")
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert sum("train_step" in message for message in compiled) == 2, compiled
    # The second is compiled before update 2 is started, and the line of update 1 is written after that.
    assert [row["step"] for row in lines(tmp_path) if "compile_seconds" in row] == [1]


def test_chosen_updates_are_traced(tmp_path):
    train(tmp_path, length="4 steps", profile="steps:2-3")
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    content = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in content.planes for line in plane.lines for event in line.events]
    assert sorted(dict(event.stats)["step_num"] for event in events if event.name == "sft") == [2, 3]


@pytest.mark.parametrize("text", ["10-15", "steps:15-10", "steps:0-3", "steps:3", "steps:1-2 "])
def test_a_malformed_profile_is_refused_before_anything_is_written(tmp_path, text):
    with pytest.raises(UserError, match=r"log\.profile=.*steps:FIRST-LAST"):
        train(tmp_path, profile=text)
    assert not list(tmp_path.iterdir())
