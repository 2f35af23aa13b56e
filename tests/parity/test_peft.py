"""Adapters against PEFT: its directories in and out, on every family, log-probs through the command line."""

import json

import jax
import numpy as np
import peft as torch_peft
import pytest
import safetensors.numpy
import torch

from parity import checkpoints, ours, weights
from rosepo_jax.__main__ import main
from rosepo_jax.data.prompts import Encoder, Template
from rosepo_jax.models import checkpoints_hf, lora, peft
from rosepo_jax.models.decoder import LanguageModel
from rosepo_jax.models.lora import LoRAConfig

ONE_EACH = [next(name for name in checkpoints.TABLE if name.startswith(family)) for family in checkpoints.FAMILIES]
TARGETS = {"llama": "all-linear", "mistral": ["q_proj", "v_proj"], "qwen2": r".*self_attn\.(q|o)_proj"}


def adapted(name, checkpoint, directory):
    """A PEFT model on a checkpoint of the table, both factors drawn by name, saved into `directory`."""
    family = name.partition("-")[0]
    base_directory, _ = checkpoint(name)
    settings = torch_peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.25,
        use_rslora=family in ("qwen3", "gemma2"),
        target_modules=TARGETS.get(family, ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]),
        task_type="CAUSAL_LM",
    )
    model = torch_peft.get_peft_model(checkpoints.read(base_directory), settings).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                drawn = weights.draw(parameter_name, tuple(parameter.shape), "llama")
                parameter.copy_(torch.from_numpy(0.3 * drawn))
    model.save_pretrained(directory)
    return base_directory, model


def texts(name):
    vocabulary = checkpoints.TABLE[name]["vocab_size"]
    prompts = [weights.ids(f"prompt {length}", length, vocabulary) for length in (30, 4)]
    responses = [[weights.ids(f"response {b} {n}", n, vocabulary) for n in (9, 1, 4)] for b in range(2)]
    return prompts, responses


def torch_logps(model, prompts, responses):
    with torch.no_grad():
        return np.stack([checkpoints.logps(model, p, r).numpy() for p, r in zip(prompts, responses, strict=True)])


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_adapter_of_peft_in_and_out(checkpoint, within, tmp_path, name):
    base, model = adapted(name, checkpoint, tmp_path / "theirs")
    config = checkpoints_hf.read_config(base)
    settings = peft.read_config(tmp_path / "theirs")
    adapter = peft.read(tmp_path / "theirs", config, settings)
    params = {**checkpoints_hf.read(base, config), **adapter}
    lm = LanguageModel(config, settings)
    prompts, responses = texts(name)
    expected = torch_logps(model, prompts, responses)
    plain = ours.logps(*ours.load(base), prompts, responses)
    assert np.abs(plain - expected).max() > 0.5  # the adapter matters
    within("adapter log-probabilities", name, np.abs(ours.logps(lm, params, prompts, responses) - expected).max(), 1e-4)

    # Folded in, ours and theirs: the same logits.
    merged = LanguageModel(config), lora.merge(params, settings)
    lengths = [1] * len(prompts)
    on, off = ours.logits(lm, params, prompts, lengths), ours.logits(*merged, prompts, lengths)
    largest = max(np.abs(rows).max() for rows in on)
    within("merged adapter", name, max(np.abs(a - b).max() for a, b in zip(on, off, strict=True)), 1e-5 * largest)
    theirs = [checkpoints.logits(model.merge_and_unload(), text) for text in prompts]
    within("torch merged", name, max(np.abs(a - b).max() for a, b in zip(theirs, off, strict=True)), 2e-5 * largest)

    # Out again: the same bytes, and PEFT reads them as the same model.
    peft.write(tmp_path / "ours", config, settings, adapter, base=str(base))
    one, two = (safetensors.numpy.load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert one.keys() == two.keys() and len(one) >= 2 * config.layers
    assert all(one[key].dtype == two[key].dtype and one[key].tobytes() == two[key].tobytes() for key in one)
    again = torch_peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(torch_logps(again, prompts, responses), expected)


def test_an_adapter_we_made_is_loaded_by_peft(checkpoint, within, tmp_path):
    name = "qwen3-biases"
    base, _ = checkpoint(name)
    config = checkpoints_hf.read_config(base)
    settings = LoRAConfig(rank=3, alpha=7.5, targets="attention/(key|output)|mlp/.*", rslora=True)
    lm = LanguageModel(config, settings)
    params = {**lm.init(jax.random.key(0)), **checkpoints_hf.read(base, config)}
    params = {p: v + 0.1 if lora.is_adapter(p) else v for p, v in params.items()}
    adapter = {path: value for path, value in params.items() if lora.is_adapter(path)}
    peft.write(tmp_path / "ours", config, settings, adapter, base=str(base))
    theirs = torch_peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    prompts, responses = texts(name)
    error = np.abs(ours.logps(lm, params, prompts, responses) - torch_logps(theirs, prompts, responses)).max()
    within("our adapter in PEFT", name, error, 1e-4)


def test_the_command_line_scores_with_an_adapter(checkpoint, within, tmp_path):
    name = "llama-grouped"
    base, model = adapted(name, checkpoint, tmp_path / "peft")
    rows = [{"prompt": "Night Train to Lisbon\n", "response": text} for text in ("Rain", "The Long Night")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert main(["score", f"--model={tmp_path / 'peft'}", *files, "--config.evaluate.batch_size=8"]) == 0
    encoder = Encoder(base, Template.load("titles"), 128, 32)
    for row, line in zip(rows, (tmp_path / "out.jsonl").read_text("utf-8").splitlines(), strict=True):
        prompt, response = encoder.prompt_ids([row["prompt"]])[0], encoder.response_ids([row["response"]])[0]
        expected = torch_logps(model, [prompt], [[response]])[0, 0]
        within("rosepo score, adapter", name, abs(json.loads(line)["logp"] - expected), 1e-4)
