"""MetricWriter, Throughput and progress."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosepo_jax import distributed
from rosepo_jax.training import metrics
from rosepo_jax.training.metrics import MetricWriter, Throughput, peak_memory, progress


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.scalars(1, {"loss": jnp.float32(0.5), "rewards/margins": np.float64(2)})
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5, "rewards/margins": 2.0}]
    writer.scalars(np.int64(2), {"loss": 0.25})
    assert rows(tmp_path)[1] == {"step": 2, "loss": 0.25}
    writer.close()


def test_nothing_is_made_before_the_first_row(tmp_path):
    MetricWriter(tmp_path / "out", tensorboard=True).close()
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.scalars(1, {"loss": math.nan, "grad_norm": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


@pytest.mark.parametrize(("resume_step", "kept"), [(None, [1, 2, 3]), (2, [1, 2]), (0, []), (-1, []), (9, [1, 2, 3])])
def test_resume_drops_rows_after_the_checkpoint_and_a_torn_line(tmp_path, resume_step, kept):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with MetricWriter(tmp_path, tensorboard=False, resume_step=resume_step) as writer:
        writer.scalars(7, {"loss": 0.0})
    assert [row["step"] for row in rows(tmp_path)] == [*kept, 7]
    assert [row["loss"] for row in rows(tmp_path)][:-1] == [1 / step for step in kept]


def test_resumed_rows_equal_those_of_a_straight_run(tmp_path):
    for name, parts in {"straight": [(0, 6)], "resumed": [(0, 5), (3, 6)]}.items():
        for start, stop in parts:
            with MetricWriter(tmp_path / name, tensorboard=False, resume_step=start) as writer:
                for step in range(start + 1, stop + 1):
                    writer.scalars(step, {"loss": 1 / step})
    straight, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "resumed"))
    assert straight == resumed


def test_event_files_hold_the_same_numbers(tmp_path):
    from tensorboardX.proto import event_pb2

    with MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.scalars(1, {"loss": 0.5, "rewards/chosen": -0.25})
        writer.scalars(2, {"loss": 0.125})
    [path] = tmp_path.glob("events.out.tfevents.*")
    content, found, offset = path.read_bytes(), [], 0
    while offset < len(content):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(content[offset : offset + 8], "little")
        event = event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        offset += length + 16
    assert found == [(1, "loss", 0.5), (1, "rewards/chosen", -0.25), (2, "loss", 0.125)]


def test_other_processes_write_and_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    monkeypatch.setattr(metrics, "PLAIN_SECONDS", 0.0)
    with MetricWriter(tmp_path / "out", tensorboard=True) as writer:
        writer.scalars(1, {"loss": 1.0})
    assert list(progress(3, "work")) == [0, 1, 2]
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def batch(rows=4):
    """Two parts: prompts of 5 of 6 tokens; three responses, of 2, 1 and 2 tokens, of which 2 of 3 fed ones are real."""
    rejected = np.array([[2, 1, 2]] * rows)
    part = {
        "prompt_BxP": np.zeros((rows // 2, 6)),
        "prompt_mask_BxP": np.arange(6)[None].repeat(rows // 2, 0) < 5,
        "fed_BxQ": np.array([[0, 2, 3]] * (rows // 2)),
    }
    return {"parts": (part, part), "count_BxR": rejected}


class By:
    """A clock whose seconds are set by hand."""

    def __init__(self):
        self.step = self.data = 0.0

    def seconds(self):
        return {"step": self.step, "data": self.data, "compile": 1000.0 * self.step}


def test_rates_count_useful_tokens_prompts_pairs_and_flops():
    clock = By()
    throughput = Throughput(clock, batch_size=4, flops=lambda batch: 1e6 * len(batch["parts"]), peak=8e6)
    throughput.count(batch())
    clock.step, clock.data = 1.5, 0.5
    assert throughput.read() == {
        "prompts_per_second": 2.0,
        "pairs_per_second": 4.0,
        "tokens_per_second": 14.0,
        "tokens_useful": 7 / 9,
        "input_stall": 0.25,
        "flops_per_second": 1e6,
        "mfu": 0.125,
    }
    throughput.count(batch())
    clock.step += 1.0
    found = throughput.read()
    assert found["input_stall"] == 0.0 and found["prompts_per_second"] == 4.0  # since the last reading only


def test_a_hosts_part_stands_for_the_whole_batch():
    """Two hosts of four prompts each, whether they hold other rows or share them."""
    clock = By()
    throughput = Throughput(clock, batch_size=8, flops=lambda batch: 1e6)
    throughput.count(batch())
    clock.step = 2.0
    found = throughput.read()
    assert found["prompts_per_second"] == 4.0 and found["tokens_per_second"] == 28.0
    assert found["flops_per_second"] == 1e6 and found["tokens_useful"] == 7 / 9


def test_what_is_not_known_is_not_claimed():
    throughput = Throughput(By(), batch_size=4)
    throughput.count(batch() | {"count_BxR": np.ones((4, 1))})
    assert not throughput.read().keys() & {"pairs_per_second", "flops_per_second", "mfu"}
    assert "mfu" not in Throughput(By(), batch_size=4, flops=lambda batch: 1.0).read()


def test_peak_memory_is_what_devices_say_else_what_programs_need(monkeypatch):
    program = jax.jit(lambda x: x @ x, donate_argnums=0).lower(jnp.zeros((64, 64))).compile()
    needed = peak_memory([program])["memory/peak_bytes"]
    assert 1 <= needed / (64 * 64 * 4) < 3  # the argument is taken over by the output where that can be
    assert peak_memory([]) == {}
    devices = [types.SimpleNamespace(memory_stats=lambda size=size: {"peak_bytes_in_use": size}) for size in (7, 9)]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)
    assert peak_memory([program]) == {"memory/peak_bytes": 9.0}


def test_progress_passes_items_on_and_says_a_plain_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))
    assert list(progress(list("abcdefg"), "reading")) == list("abcdefg")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["reading: 3/7, 0.1/s, 40 s left", "reading: 6/7, 0.1/s, 10 s left"]


def test_progress_without_a_known_total(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "PLAIN_SECONDS", 0.0)
    assert list(progress((i * i for i in range(3)), "squares")) == [0, 1, 4]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["squares: 1", "squares: 2", "squares: 3"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(5, "work")) == [0, 1, 2, 3, 4]
    assert "work" in capsys.readouterr().err
