"""Figures of torch and TRL (tests/parity/goldens.json), checked without torch on checkpoints made from names."""

import functools
import json
import pathlib

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from parity import goldens, ours, weights

from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.stages import sft

GOLDENS = json.loads(goldens.PATH.read_text("utf-8"))
CHECKPOINTS = {golden["name"]: golden for golden in GOLDENS["checkpoints"]}


def write(directory: pathlib.Path, golden: dict) -> pathlib.Path:
    """The Hugging Face directory that torch had."""
    model_type = golden["config"]["model_type"]
    tensors = {name: weights.draw(name, tuple(shape), model_type) for name, shape in golden["shapes"].items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(golden["config"]), "utf-8")
    return directory


@functools.partial(jax.jit, static_argnums=0)
def figures(lm, params, b):
    """(log-probabilities, logits after the prompts)."""
    prompt = b["prompt_BxP"], b["prompt_mask_BxP"]
    logps_BxR = response_logps(lm, params, *prompt, b["response_BxRxT"], b["response_mask_BxRxT"])
    return logps_BxR, lm.prefill(params, *prompt)[0]


def test_every_family_is_there():
    assert {golden["config"]["model_type"] for golden in CHECKPOINTS.values()} == {
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"
    }  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_log_probabilities_logits_and_greedy_text_of_torch(tmp_path, name):
    golden = CHECKPOINTS[name]
    lm, params = ours.load(write(tmp_path, golden))
    logps, logits = figures(lm, params, ours.batch(golden["prompts"], golden["responses"]))
    np.testing.assert_allclose(logps, golden["logps"], rtol=0, atol=1e-4)
    sample = logits[:, : len(golden["logits"][0])]
    np.testing.assert_allclose(sample, golden["logits"], rtol=0, atol=2e-5 * golden["largest_logit"])
    expected = golden["continuations"]
    assert ours.continuations(lm, params, golden["prompts"], len(expected[0])) == expected


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_losses_and_gradient_norms_of_trl(tmp_path, task):
    golden = GOLDENS["training"][task]
    lm, start = ours.load(write(tmp_path, CHECKPOINTS[golden["checkpoint"]]))
    batch = ours.preference_batch([ours.Row(**row) for row in golden["rows"]], rejected=task == "dpo")
    found = ours.updates(
        ours.preference_task(lm) if task == "dpo" else sft.task(lm),
        optax.sgd(golden["learning_rate"]), start, batch, len(golden["steps"]), start if task == "dpo" else None,
    )  # fmt: skip
    for update, (loss, grad_norm, margin) in zip(found, golden["steps"], strict=True):
        assert abs(update.loss - loss) <= 1e-6
        assert abs(update.grad_norm - grad_norm) <= 1e-5 * grad_norm
        assert abs(update.margin - margin) <= 1e-5
