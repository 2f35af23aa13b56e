"""Goodput: every second in one bucket, and what kills made void found in the journal."""

import json

import pytest

from rosepo_jax.training import goodput
from rosepo_jax.training.goodput import BUCKETS, Clock, Journal


@pytest.fixture
def now(monkeypatch):
    """A clock that moves by hand."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_every_second_is_in_the_innermost_bucket(now):
    clock = Clock()
    now[0] += 5

    def slow():
        now[0] += 1
        yield "batch"
        now[0] += 2

    with clock.spent("step"):
        for _ in clock.waiting(slow()):
            now[0] += 3
            with clock.spent("checkpoint"):
                now[0] += 4
            with pytest.raises(KeyError), clock.spent("evaluation"):
                now[0] += 6
                raise KeyError
    found = clock.seconds()
    assert found == {"init": 5, "compile": 0, "data": 3, "step": 3, "checkpoint": 4, "evaluation": 6}
    assert sum(found.values()) == now[0]


def line(start, update, **seconds):
    return dict.fromkeys(BUCKETS, 0.0) | seconds | {"start": start, "update": update}


def test_an_undisturbed_stage_loses_nothing():
    found = goodput.totals([line(1, 0, init=2.0), line(1, 5, init=2.0, step=7.0, data=1.0)])
    assert found["step"] == 7.0 and found["init"] == 2.0 and found["data"] == 1.0 and found["lost"] == 0.0


def test_what_a_start_did_after_the_next_ones_checkpoint_is_lost():
    """Killed at update 9 with a checkpoint of update 5; then, with none that is newer, at once; then done."""
    found = goodput.totals(
        [
            line(1, 0, init=2.0),
            line(1, 5, init=2.0, compile=1.0, step=5.0, evaluation=1.0),
            line(1, 9, init=2.0, compile=3.0, step=9.0, evaluation=2.5),
            line(2, 5, init=4.0),
            line(2, 7, init=4.0, step=2.0),
            line(3, 5, init=3.0),
            line(3, 10, init=3.0, step=5.0),
        ]
    )
    assert found["step"] == 5.0 + 5.0 and found["evaluation"] == 1.0
    assert found["lost"] == 4.0 + 1.5 + 2.0
    assert found["init"] == 9.0 and found["compile"] == 3.0  # paid again, not lost


def test_a_run_that_begins_anew_has_lost_all_updates():
    """Every checkpoint was gone."""
    found = goodput.totals([line(1, 0, init=1.0), line(1, 4, init=1.0, step=4.0), line(2, 0, init=1.0)])
    assert found["step"] == 0.0 and found["lost"] == 4.0


def test_the_journal_goes_on_after_a_kill_and_says_a_line_a_second(now, tmp_path):
    clock = Clock()
    journal = Journal(tmp_path, clock)
    journal.line(0, always=True)
    for step in range(1, 31):
        now[0] += 0.125
        journal.line(step)
    journal.line(31, always=True)
    steps = [row["update"] for row in goodput.read(tmp_path / goodput.FILE)]
    assert steps == [0, 8, 16, 24, 31]
    with open(tmp_path / goodput.FILE, "a") as file:
        file.write(json.dumps(line(1, 40))[:30])
    again = Journal(tmp_path, Clock())
    again.line(24, always=True)
    again.close()
    assert [(row["start"], row["update"]) for row in goodput.read(tmp_path / goodput.FILE)][-2:] == [(1, 31), (2, 24)]
