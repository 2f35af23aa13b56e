"""Tiny checkpoints of every supported family, and what torch says about them."""

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
import transformers

from parity import weights
from parity.ours import Row

transformers.utils.logging.disable_progress_bar()

TEXTS = ["The Long Night\n", "A Summer of Rain\n", "Night Train to Lisbon\n", "Rain\n", "The Train\n"]
SMALLEST_VOCABULARY = 271  # bytes and three special tokens must fit
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

_GROUPED = dict(vocab_size=271, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, intermediate_size=36)
_SINGLE = dict(vocab_size=283, hidden_size=32, num_attention_heads=4, num_key_value_heads=1, intermediate_size=40)
_THREE = dict(vocab_size=271, hidden_size=24, num_attention_heads=3, num_key_value_heads=3, intermediate_size=52)


def _rope(theta: float, **scaling) -> dict:
    return {"rope_theta": theta, "rope_type": "default", **scaling}


TABLE: dict[str, dict] = {
    "llama-grouped": _GROUPED | dict(tie_word_embeddings=True, num_hidden_layers=2),
    "llama-llama3": _SINGLE | dict(head_dim=10, num_hidden_layers=3, rope_parameters=_rope(10000.0, **LLAMA3)),
    "llama-linear": _THREE | dict(rope_parameters=_rope(500.0, rope_type="linear", factor=3.0), rms_norm_eps=1e-3),
    "llama-biases": _GROUPED | dict(head_dim=8, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral-window": _GROUPED | dict(sliding_window=5, num_hidden_layers=3),
    "mistral-tied": _SINGLE | dict(sliding_window=7, head_dim=10, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "mistral-wide": _THREE | dict(sliding_window=33, rope_parameters=_rope(10000.0, **LLAMA3)),
    "mistral-full": _GROUPED | dict(sliding_window=None, rope_parameters=_rope(1e6)),
    "qwen2-full": _GROUPED | dict(
        use_sliding_window=False, sliding_window=5, max_window_layers=1, tie_word_embeddings=True,
    ),
    "qwen2-window": _SINGLE | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3),
    "qwen2-linear": _THREE | dict(rope_parameters=_rope(1e6, rope_type="linear", factor=2.0), rms_norm_eps=1e-3),
    "qwen3-tied": _GROUPED | dict(head_dim=10, tie_word_embeddings=True),
    "qwen3-biases": _SINGLE | dict(
        head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=2,
        num_hidden_layers=3,
    ),
    "qwen3-llama3": _THREE | dict(head_dim=12, rope_parameters=_rope(1e6, **LLAMA3), rms_norm_eps=1e-3),
    "gemma2-tied": _GROUPED | dict(
        head_dim=8, query_pre_attn_scalar=24, sliding_window=5, attn_logit_softcapping=4.0, final_logit_softcapping=5.0,
        num_hidden_layers=3,
    ),
    "gemma2-uncapped": _SINGLE | dict(
        head_dim=10, query_pre_attn_scalar=16, sliding_window=7, attn_logit_softcapping=None,
        final_logit_softcapping=None, tie_word_embeddings=False,
    ),
    "gemma2-types": _THREE | dict(
        head_dim=8, query_pre_attn_scalar=8, sliding_window=5, num_hidden_layers=3, rms_norm_eps=1e-3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma3-pattern": _GROUPED | dict(head_dim=8, query_pre_attn_scalar=24, sliding_window=5, num_hidden_layers=7),
    "gemma3-linear": _SINGLE | dict(
        head_dim=10, query_pre_attn_scalar=10, sliding_window=7, num_hidden_layers=3, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": _rope(1000.0, rope_type="linear", factor=8.0), "sliding_attention": _rope(300.0)
        },
    ),
    "gemma3-every-other": _THREE | dict(
        head_dim=8, query_pre_attn_scalar=16, sliding_window=5, sliding_window_pattern=2, num_hidden_layers=4,
        rms_norm_eps=1e-3,
    ),
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def config(name: str) -> transformers.PretrainedConfig:
    family = name.partition("-")[0]
    defaults = dict(num_hidden_layers=2, max_position_embeddings=256, attn_implementation="eager", pad_token_id=0)
    model_type = "gemma3_text" if family == "gemma3" else family
    return transformers.AutoConfig.for_model(model_type, **(defaults | TABLE[name]))


def make(
    directory: pathlib.Path, name: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> transformers.PreTrainedModel:
    """Writes the checkpoint, its parameters drawn by name, and returns the model that torch reads from it."""
    model = transformers.AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            drawn = weights.draw(parameter_name, tuple(parameter.shape), model.config.model_type, seed)
            parameter.copy_(torch.from_numpy(drawn))
    model.to(dtype).save_pretrained(directory)
    return read(directory, dtype)


def read(directory: pathlib.Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits(model, text: Sequence[int]) -> np.ndarray:
    """float32 logits [n, V] of one text, without padding."""
    return model(torch.tensor([list(text)]), use_cache=False).logits[0].float().numpy()


def logps(model, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> torch.Tensor:
    """Summed log-probabilities [R] of responses, each a sequence of its own; differentiable."""
    sums = []
    for response in responses:
        rows = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        sums.append(rows.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def continuation(model, prompt: Sequence[int], tokens: int) -> list[int]:
    """The argmax of the last logits, again and again, without a cache."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


def pairs(name: str, model) -> list[Row]:
    """Unequal lengths, chosen ones longer and shorter than the rejected.

    The chosen responses are the model's own text: losses are then near 2, and 1e-6 is more than float32's grain.
    """
    vocabulary, rows = TABLE[name]["vocab_size"], []
    for b, (prompt_length, chosen, rejected) in enumerate(((21, 6, 3), (9, 2, 7), (30, 4, 4), (1, 9, 5))):
        prompt = weights.ids(f"prompt {b}", prompt_length, vocabulary)
        chosen = continuation(model, prompt, chosen)
        rows.append(Row(prompt, chosen, weights.ids(f"rejected {b}", rejected, vocabulary)))
    return rows
