"""The step benchmark at a tiny size: same numbers from all variants, less memory, no vocabulary over the prompt."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


step, record = load("step"), load("record")
B, P, R, T, V = 2, 40, 3, 5, 509
TINY = dataclasses.replace(
    step.DECODER, vocabulary=V, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24
)


@pytest.fixture(scope="module")
def problem():
    trainable, frozen = step.parameters(TINY)
    return step.variants(TINY), trainable, frozen, step.random_batch(V, B, P, R, T)


def test_all_variants_agree(problem):
    found = list(step.differences(*problem))
    assert len(found) == 4 and all(step.met(row) for row in found), found


def test_the_comparison_can_fail(problem):
    """A baseline that forgets a token is noticed."""
    logps, trainable, frozen, batch = problem
    broken = dict(logps)
    broken["responses"] = lambda params, batch: logps["responses"](
        params, batch | {"response_mask_BxRxT": batch["response_mask_BxRxT"].at[0, 0, 0].set(False)}
    )
    assert not all(step.met(row) for row in step.differences(broken, trainable, frozen, batch))


def test_log_probs_against_float64_sums(problem):
    """One response by itself, without padding, gives the log-prob it has in the batch."""
    logps, trainable, frozen, batch = problem
    together = np.asarray(logps["shared"]({**frozen["base"], **trainable}, batch))
    p = int(batch["prompt_mask_BxP"][1].sum())
    alone = {
        name: batch[name][1:2, ..., :p] if "prompt" in name else batch[name][1:2]
        for name in ("prompt_BxP", "prompt_mask_BxP", "response_BxRxT", "response_mask_BxRxT")
    }
    found = np.asarray(logps["shared"]({**frozen["base"], **trainable}, alone))
    np.testing.assert_allclose(found[0], together[1], rtol=1e-5)


def test_the_step_holds_no_vocabulary_over_the_prompt(problem):
    logps, trainable, frozen, batch = problem
    steps = {name: step.compile_step(variant, trainable, frozen, batch) for name, variant in logps.items()}

    def vocabulary_shapes(name):
        """Leading sizes of all arrays in the compiled program whose last axis is the vocabulary."""
        found = re.findall(rf"\[([\d,]*){V}\]", steps[name].text)
        return {int(np.prod([int(size) for size in shape.split(",") if size] or [1])) for shape in found}

    assert max(vocabulary_shapes("shared")) <= B * R * T
    assert max(vocabulary_shapes("everywhere")) >= B * R * P
    assert steps["shared"].temporary_bytes < steps["responses"].temporary_bytes < steps["everywhere"].temporary_bytes


def test_every_figure_is_there(problem, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(step, "DECODER", TINY)
    monkeypatch.setattr(step, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(step.record, "append", lambda command, rows: record.append(command, rows, tmp_path / "R.md"))
    step.main(["--R=2", "--P=24", "--T=4", "--B=2", "--repeats=2", "--record"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    targets = {row["figure"]: row["at least"] for row in rows if "at least" in row}
    assert targets == {"time": 2.0, "memory": 1.9}
    assert {row["figure"] for row in rows} >= {"time", "processor time", "memory", "relative difference of gradients"}
    for row in rows:
        assert row.get("low", row["value"]) <= row["value"] <= row.get("high", row["value"])
    text = (tmp_path / "R.md").read_text("utf-8")
    assert "`python benchmarks/step.py --R=2 " in text and jax.__version__ in text
    assert text.count("\n| 2 |") == len(rows)


def test_a_missed_target_is_a_failure():
    assert step.met({"value": 2.0, "at least": 2.0}) and not step.met({"value": 1.99, "at least": 2.0})
    assert step.met({"value": 1e-5, "at most": 1e-5}) and not step.met({"value": 2e-5, "at most": 1e-5})
    assert step.met({"value": 7.0})
