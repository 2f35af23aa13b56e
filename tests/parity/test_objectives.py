"""Smoothed and multi-negative objectives against torch autograd of their closed forms, and against TRL."""

import jax
import numpy as np
import optax
import pytest
import torch

from parity import checkpoints, ours, trainers, weights
from rosepo_jax.preference import objectives, smoothing
from rosepo_jax.preference.objectives import OBJECTIVES
from rosepo_jax.preference.smoothing import Smoothing

BETA, B, K = 0.1, 4, 3
EPSILON = np.array([[0.5, 0.02, 0.31], [0.1, 0.2, 0.3], [0.45, 0.5, 0.5], [0.0, 1e-3, 0.25]], np.float32)


def dpo(h, epsilon):
    """cDPO and RosePO: -(1 - eps) log sigma(h) - eps log sigma(-h)."""
    return -(1 - epsilon) * torch.sigmoid(h).log() - epsilon * torch.sigmoid(-h).log()


def sdpo(h, epsilon):
    """S-DPO as in its paper, smoothed: -log sigma(-log sum_d exp(-h_d)), eps of the opposite."""
    return dpo(-torch.exp(-h).sum(-1).log(), epsilon)


def row_epsilon(epsilon):
    """odds of a row = sum of the odds of its pairs."""
    odds = (epsilon / (1 - epsilon)).sum(-1)
    return odds / (1 + odds)


CASES = {  # name -> (objective, smoothing, closed form of the mean loss of margins h and pairwise eps)
    "sdpo": (OBJECTIVES["s-dpo"], Smoothing("none"), lambda h, e: sdpo(h, 0.0).mean()),
    "cdpo": (OBJECTIVES["cdpo"], Smoothing("fixed", value=0.2), lambda h, e: dpo(h, 0.2).mean()),
    "rosepo": (OBJECTIVES["rosepo"], Smoothing("oracle"), lambda h, e: dpo(h, e).mean()),
    "rosepo, lse": (
        objectives.Objective(aggregator="lse", smoothed=True), Smoothing("oracle"),
        lambda h, e: sdpo(h, row_epsilon(e)).mean(),
    ),
}  # fmt: skip
assert all(objective.beta == BETA for objective, _, _ in CASES.values())


def margins(logps, reference):
    ratio = logps - reference
    return BETA * (ratio[:, :1] - ratio[:, 1:])


@pytest.mark.parametrize("case", CASES)
def test_gradient_by_log_probabilities(within, case):
    objective, factor, closed_form = CASES[case]
    generator = np.random.Generator(np.random.Philox(key=1))
    logps, reference = generator.uniform(-60, -5, (2, B, K + 1)).astype(np.float32)

    def loss(logps):
        epsilon = smoothing.epsilon(factor, objective.aggregator, EPSILON, np.ones(B, bool), seed=0, step=0)
        counts = np.full((B, K + 1), 7)
        return objectives.preference_loss(objective, logps, reference, counts, epsilon, np.ones(B, bool))[0]

    value, gradient = jax.value_and_grad(loss)(logps)
    leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    expected = closed_form(margins(leaf, torch.tensor(reference, dtype=torch.float64)), torch.tensor(EPSILON).double())
    expected.backward()
    assert np.ptp(leaf.grad.numpy()) > 0.01
    within("objective loss", case, abs(value - expected.item()), 1e-6)
    within("objective gradient", case, np.abs(gradient - leaf.grad.numpy()).max(), 1e-7)


@pytest.mark.parametrize("case", CASES)
def test_one_update_of_a_llama(checkpoint, within, case):
    objective, factor, closed_form = CASES[case]
    name, rate = "llama-grouped", 0.2
    directory, _ = checkpoint(name)
    other, reference = checkpoint(name, seed=1)
    vocabulary = checkpoints.TABLE[name]["vocab_size"]
    prompts = [weights.ids(f"prompt {b}", n, vocabulary) for b, n in enumerate((12, 3, 7, 1))]
    lengths = ((4, 1, 6, 2), (2, 5, 3, 3), (7, 2, 1, 4), (1, 3, 2, 6))
    responses = [[weights.ids(f"response {b} {n}", n, vocabulary) for n in row] for b, row in enumerate(lengths)]

    model = checkpoints.read(directory)
    logps = torch.stack([checkpoints.logps(model, *pair) for pair in zip(prompts, responses, strict=True)])
    with torch.no_grad():
        start = torch.stack([checkpoints.logps(reference, *pair) for pair in zip(prompts, responses, strict=True)])
    expected = closed_form(margins(logps, start), torch.tensor(EPSILON))
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    torch.optim.SGD(model.parameters(), rate).step()

    lm, params = ours.load(directory)
    batch = ours.update_batch(ours.batch(prompts, responses), EPSILON)
    task, frozen_reference = ours.preference_task(lm, objective, factor), ours.load(other)[1]
    (update,) = ours.updates(task, optax.sgd(rate), params, batch, 1, frozen_reference)
    within("update loss", case, abs(update.loss - expected.item()), 1e-6)
    within("update gradient norm", case, abs(update.grad_norm - norm.item()), 1e-5 * norm.item())
    for path, value in trainers.to_ours(model, directory).items():
        within("update weights", case, np.abs(update.params[path] - value).max(), 1e-5)
        assert np.abs(value - params[path]).max() > 1e-3


def test_label_smoothing_of_trl_is_our_fixed_smoothing(checkpoint, within, tmp_path):
    name = "llama-grouped"
    directory, model = checkpoint(name)
    other, _ = checkpoint(name, seed=1)
    rows = checkpoints.pairs(name, model)
    theirs = trainers.updates(
        "dpo", directory, rows, tmp_path, optimizer="sgd", learning_rate=0.05, clip=1e9, steps=2, reference=other,
        label_smoothing=0.2,
    )  # fmt: skip
    lm, params = ours.load(directory)
    task = ours.preference_task(lm, "cdpo", Smoothing("fixed", value=0.2))
    found = ours.updates(task, optax.sgd(0.05), params, ours.preference_batch(rows), 2, ours.load(other)[1])
    assert abs(theirs[0].margin) > 0.1
    for expected, update in zip(theirs, found, strict=True):
        within("label smoothing loss", name, abs(update.loss - expected.loss), 1e-6)
        within("label smoothing margin", name, abs(update.margin - expected.margin), 1e-5)
        for path, value in expected.params.items():
            within("label smoothing weights", name, np.abs(update.params[path] - value).max(), 1e-5)
