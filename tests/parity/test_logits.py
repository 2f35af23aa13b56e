"""Forward passes against torch in eager float32: logits, log-probabilities, greedy text, bfloat16."""

import json

import numpy as np
import pytest
import torch
import transformers

from parity import checkpoints, ours, weights
from rosepo_jax.__main__ import main
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.models import checkpoints_hf

LENGTHS = (60, 33, 18, 2)  # of texts; the windows of the table are shorter, and positions exceed llama3's 16
ALL = pytest.mark.parametrize("name", checkpoints.TABLE)


def texts(name):
    vocabulary = checkpoints.TABLE[name]["vocab_size"]
    return [weights.ids(f"text {length}", length, vocabulary) for length in LENGTHS]


def prompts_and_responses(name):
    vocabulary = checkpoints.TABLE[name]["vocab_size"]
    prompts = [weights.ids(f"prompt {length}", length, vocabulary) for length in (30, 21, 4, 1)]
    lengths = ((9, 1, 4), (2, 11, 5), (7, 3, 8), (6, 2, 1))
    return prompts, [[weights.ids(f"response {b} {n}", n, vocabulary) for n in row] for b, row in enumerate(lengths)]


@ALL
def test_logits_at_every_position(checkpoint, within, name):
    directory, model = checkpoint(name)
    lm, params = ours.load(directory)
    expected = [checkpoints.logits(model, text) for text in texts(name)]
    largest = max(np.abs(rows).max() for rows in expected)
    for kind, prompt_lengths in (
        ("logits after one token", [1] * len(LENGTHS)),
        ("logits after half", [n // 2 for n in LENGTHS]),
    ):
        found = ours.logits(lm, params, texts(name), prompt_lengths)
        errors = [np.abs(f - e[p - 1 :]).max() for f, e, p in zip(found, expected, prompt_lengths, strict=True)]
        within(kind, name, max(errors), 2e-5 * largest)


@ALL
def test_log_probabilities_of_unequal_responses(checkpoint, within, name):
    directory, model = checkpoint(name)
    prompts, responses = prompts_and_responses(name)
    with torch.no_grad():
        expected = np.stack([checkpoints.logps(model, p, r).numpy() for p, r in zip(prompts, responses, strict=True)])
    assert np.ptp(expected) > 20
    within(
        "log-probabilities", name, np.abs(ours.logps(*ours.load(directory), prompts, responses) - expected).max(), 1e-4
    )


@ALL
def test_greedy_text(checkpoint, name):
    """Each token is torch's argmax after those before it, so the whole text is torch's greedy text."""
    directory, model = checkpoint(name)
    prompts = prompts_and_responses(name)[0][:3]
    found = ours.continuations(*ours.load(directory), prompts, 64)
    expected = [checkpoints.logits(model, [*p, *text])[len(p) - 1 : -1].argmax(-1) for p, text in zip(prompts, found)]
    assert found == [row.tolist() for row in expected]
    assert len({token for row in found for token in row}) > 8


@ALL
def test_bfloat16_is_as_close_to_float32_as_torch(checkpoint, within, name):
    directory, model = checkpoint(name)
    truth = [checkpoints.logits(model, text) for text in texts(name)]
    half = checkpoints.read(directory, torch.bfloat16)
    found = ours.logits(*ours.load(directory, "bfloat16"), texts(name), [1] * len(LENGTHS))

    def error(rows):
        return np.mean(np.abs(np.concatenate(rows) - np.concatenate(truth)))

    theirs = error([checkpoints.logits(half, text) for text in texts(name)])
    assert theirs > 1e-3
    within("bfloat16", name, error(found), 1.5 * theirs)


@ALL
def test_configurations_in_the_spelling_of_transformers_4_are_the_same(checkpoint, tmp_path, name):
    """Most published directories are older than `rope_parameters` and `layer_types`."""
    directory, _ = checkpoint(name)
    raw = json.loads((directory / "config.json").read_text("utf-8"))
    rope = raw.pop("rope_parameters")
    if "full_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "layer_types" not in checkpoints.TABLE[name]:
        raw.pop("layer_types", None)
    if "_sliding_window_pattern" in raw:
        raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern")
    raw["torch_dtype"] = raw.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(raw), "utf-8")

    assert checkpoints_hf.read_config(tmp_path) == checkpoints_hf.read_config(directory)
    theirs = [transformers.AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path, directory)]
    for key in ("rope_parameters", "layer_types", "sliding_window"):
        assert theirs[0].get(key) == theirs[1].get(key)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_the_command_line_scores_texts(checkpoint, within, tmp_path, family):
    name = next(name for name in checkpoints.TABLE if name.startswith(family))
    directory, model = checkpoint(name)
    rows = [
        {"prompt": prompt, "response": response}
        for prompt in ("Night Train to Lisbon\nRain\n", "Rain\n", "A Summer of Rain\nThe <s> Train\nÖ\n")
        for response in ("Rain", "The Long Night", "A Summer in Lisbon")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ["score", f"--model={directory}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert main([*words, "--config.evaluate.batch_size=8"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]

    encoder = Encoder(directory, Template.load("titles"), 128, 32)
    for row, scored in zip(rows, found, strict=True):
        prompt, response = encoder.prompt_ids([row["prompt"]])[0], encoder.response_ids([row["response"]])[0]
        assert prompt[0] == 1 and response[-1] == 2 and {1, 2}.isdisjoint(prompt[1:] + response[:-1])
        assert (scored["prompt"], scored["response"], scored["tokens"]) == (*row.values(), len(response))
        with torch.no_grad():
            expected = float(checkpoints.logps(model, prompt, [response])[0])
        within("rosepo score", name, abs(scored["logp"] - expected), 1e-4)
