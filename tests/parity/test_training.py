"""Updates of SFT and DPO against TRL: loss, gradient norm and every weight, over two steps."""

import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from parity import checkpoints, ours, trainers
from rosepo_jax.stages import sft
from rosepo_jax.training import optimizer

STEPS = 2
RATE = {"sgd": 0.05, "adamw_torch": 1e-4}
MOVES = {"sgd": 5e-4, "adamw_torch": 9e-5}  # what every tensor moves by at least, so that no wrong gradient passes


def transformation(kind, clip):
    if kind == "sgd":
        return optax.sgd(RATE[kind])
    settings = dict(clip=clip, schedule="constant", warmup="0 steps", weight_decay=0.0, learning_rate=RATE[kind])
    return optimizer.make(ConfigDict(settings | dict(batch_size=4)), "align", STEPS, rows=4)[0]


def both(task, checkpoint, tmp_path, name, kind):
    """(start, by TRL, by us)."""
    directory, model = checkpoint(name)
    clip, rows = 1e9 if kind == "sgd" else 1.0, checkpoints.pairs(name, model)
    theirs = trainers.updates(
        task, directory, rows, tmp_path, optimizer=kind, learning_rate=RATE[kind], clip=clip, steps=STEPS
    )
    lm, start = ours.load(directory)
    ours_task, reference = (ours.preference_task(lm), start) if task == "dpo" else (sft.task(lm), None)
    batch = ours.preference_batch(rows, rejected=task == "dpo")
    return start, theirs, ours.updates(ours_task, transformation(kind, clip), start, batch, STEPS, reference)


CASES = [
    *((task, "llama-grouped", kind) for task in ("sft", "dpo") for kind in RATE),
    *(("dpo", next(n for n in checkpoints.TABLE if n.startswith(f)), "sgd") for f in checkpoints.FAMILIES[1:]),
]


@pytest.mark.parametrize("task, name, kind", CASES)
def test_two_updates_equal_those_of_trl(checkpoint, within, tmp_path, task, name, kind):
    start, theirs, found = both(task, checkpoint, tmp_path, name, kind)
    assert len(theirs) == len(found) == STEPS
    before = start
    for step, (expected, update) in enumerate(zip(theirs, found)):
        within(f"{task} loss", name, abs(update.loss - expected.loss), 1e-6)
        within(f"{task} gradient norm", name, abs(update.grad_norm - expected.grad_norm), 1e-5 * expected.grad_norm)
        assert set(update.params) == set(expected.params) == set(start)
        errors = [np.abs(update.params[path] - value).ravel() for path, value in expected.params.items()]
        within(f"{task} weights, {kind}", name, np.concatenate(errors).max(), 1e-5)
        if kind == "adamw_torch":  # it divides gradients by their size, also the few that are nothing but rounding
            within(f"{task} 99.9 % of weights, {kind}", name, np.quantile(np.concatenate(errors), 0.999), 3e-7)
        for path, value in expected.params.items():
            assert np.abs(value - before[path]).max() > MOVES[kind], (step, path)
        before = expected.params
        if task == "dpo":
            within("dpo reward margin", name, abs(update.margin - expected.margin), 1e-5)
    if task == "dpo":
        assert theirs[0].margin == found[0].margin == 0.0
        assert abs(theirs[1].margin) > 1e-3
