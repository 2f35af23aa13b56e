"""Writes goldens.json: what torch and TRL say about some checkpoints of the table, for tests that run without torch.

    python tests/parity/goldens.py        in the environment of the extra `parity`

The weights are not in it: `weights.draw` makes them from the tensors' names.
"""

import json
import pathlib
import sys
import tempfile

PATH = pathlib.Path(__file__).with_suffix(".json")
CHECKPOINTS = (
    "llama-grouped", "llama-llama3", "mistral-window", "qwen2-window", "qwen3-biases", "gemma2-tied", "gemma3-pattern",
    "gemma3-linear",
)  # fmt: skip
PROMPTS, RESPONSES = (30, 7), ((9, 1, 4), (2, 11, 5))  # lengths
TOKENS, LOGITS = 16, 16
TRAINED, RATE, STEPS = "llama-grouped", 0.05, 2


def forward(name: str) -> dict:
    """Configuration, tensor shapes, and torch's float32 figures of one checkpoint."""
    from parity import checkpoints, weights

    with tempfile.TemporaryDirectory() as directory:
        model = checkpoints.make(pathlib.Path(directory), name)
        config = json.loads((pathlib.Path(directory) / "config.json").read_text("utf-8"))
    vocabulary = config["vocab_size"]
    prompts = [weights.ids(f"prompt {n}", n, vocabulary) for n in PROMPTS]
    responses = [[weights.ids(f"response {b} {n}", n, vocabulary) for n in row] for b, row in enumerate(RESPONSES)]
    last = [checkpoints.logits(model, prompt)[-1] for prompt in prompts]
    return {
        "name": name,
        "config": {key: value for key, value in config.items() if key != "transformers_version"},
        "shapes": {key: list(parameter.shape) for key, parameter in model.named_parameters()},
        "prompts": prompts,
        "responses": responses,
        "logps": [_rounded(checkpoints.logps(model, p, r).tolist()) for p, r in zip(prompts, responses, strict=True)],
        "logits": [_rounded(row[:LOGITS].tolist()) for row in last],
        "largest_logit": max(float(abs(row).max()) for row in last),
        "continuations": [checkpoints.continuation(model, prompt, TOKENS) for prompt in prompts],
    }


def training(task: str) -> dict:
    """Loss and gradient norm of TRL's first updates with SGD."""
    import dataclasses

    from parity import checkpoints, trainers
    from rosepo_jax.data.prompts import train_tokenizer

    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name) / "checkpoint"
        model = checkpoints.make(directory, TRAINED)
        train_tokenizer(checkpoints.TEXTS, checkpoints.SMALLEST_VOCABULARY - 4, directory)
        rows = checkpoints.pairs(TRAINED, model)
        steps = trainers.updates(
            task, directory, rows, pathlib.Path(name), optimizer="sgd", learning_rate=RATE, clip=1e9, steps=STEPS
        )
    return {
        "checkpoint": TRAINED,
        "learning_rate": RATE,
        "rows": [dataclasses.asdict(row) for row in rows],
        "steps": [_rounded([step.loss, step.grad_norm, step.margin]) for step in steps],
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.9g}") for value in values]  # as many digits as tell float32 values apart


def main() -> None:
    sys.path.insert(0, str(PATH.parents[1]))
    import torch

    torch.set_num_threads(1)
    goldens = {
        "checkpoints": [forward(name) for name in CHECKPOINTS],
        "training": {task: training(task) for task in ("sft", "dpo")},
    }
    PATH.write_text(json.dumps(goldens, separators=(",", ":")).replace('},{"name"', '},\n{"name"') + "\n", "utf-8")


if __name__ == "__main__":
    main()
