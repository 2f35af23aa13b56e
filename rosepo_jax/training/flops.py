"""Floating-point operations of an update by formula, and how many a device can do in a second at most.

A multiply-add counts 2. Of a forward pass

    dense      = 2 n tokens            n: weights of the linear maps of all layers, without embedding and head
    attention  = 4 H E attended        attended: (query, key) pairs inside the mask, added up over the layers
    head       = 2 D V scored          scored: positions whose vocabulary logits exist
    adapters   = 2 r tokens            r: weights of the low-rank adapters; 0 without

and of an update, where a backward pass costs one product for the gradient of its input, and another for the gradient of
a weight unless that is frozen (attention has two inputs and no weight)

    all parameters   3 (dense + attention + head) + reference
    adapters alone   2 (dense + head) + 3 (attention + adapters) + reference

    reference        a forward pass of the frozen reference inside the step, adapters included; 0 where its log-probs
                     are cached, and in SFT

What is left out: element-wise work (norms, rotations, softmax, optimiser, the weights' restoring from 4 or 8 bits) and
the oracle, below 1 % of any model of use; and what is computed twice to save memory, which is no progress.

Everything that is processed counts, padding too (`tokens_useful` says how much that is): of each row of a part the P
prompt tokens and the Q response tokens that are fed, and logits at 1 + Q positions, since the first tokens of its
responses share one row of logits and their last tokens are never fed.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig

# FLOP/s in bfloat16, without sparsity, of a TPU core or a GPU, by jax's device_kind.
# TPUs: Cloud TPU documentation, "System architecture", peak compute per chip, here by its TensorCores.
# GPUs: NVIDIA's data sheets of A100, H100, H200 and B200 (half of what they print with sparsity).
PEAKS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12 / 2,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12 / 2,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Work(NamedTuple):
    """What a forward pass processes."""

    tokens: float
    attended: float  # (query, key) pairs, added up over the layers
    scored: float


class Forward(NamedTuple):
    """FLOPs of a forward pass."""

    dense: float
    attention: float
    head: float
    adapters: float


def peak(device: Any) -> float | None:
    """FLOP/s of a device as jax lists it: a chip, or one of its cores where they are listed apart. None: not known."""
    one = PEAKS.get(device.device_kind)
    return one and one * (device.num_cores if device.platform == "tpu" else 1)


def weights(config: DecoderConfig, lora: LoRAConfig | None) -> tuple[int, int]:
    """Weights of the linear maps of all layers, and of the adapters beside them."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    maps = {
        "attention/query": (c.width, queries),
        "attention/key": (c.width, keys),
        "attention/value": (c.width, keys),
        "attention/output": (queries, c.width),
        "mlp/gate": (c.width, c.mlp_width),
        "mlp/up": (c.width, c.mlp_width),
        "mlp/down": (c.mlp_width, c.width),
    }
    low_rank = sum(lora.rank * (i + o) for path, (i, o) in maps.items() if lora.matches(path)) if lora else 0
    return c.layers * sum(i * o for i, o in maps.values()), c.layers * low_rank


def work(config: DecoderConfig, parts: Iterable[Mapping[str, Any]]) -> Work:
    """What the parts of a batch (arrays, or shapes alone) have to process.

    Pairs are those of prompts as wide as their part, whose Q fed tokens belong to its R responses in equal shares. (Of
    responses of unequal lengths there are a few more, next to the pairs with the prompt.)
    """
    windows = [config.window if slides else None for slides in config.sliding or (False,) * config.layers]
    tokens = attended = scored = 0.0
    for part in parts:
        (B, P), Q, R = part["prompt_BxP"].shape, part["fed_BxQ"].shape[1], part["response_BxRxT"].shape[1]
        tokens += B * (P + Q)
        attended += B * sum(_seen(0, P, window) + R * _seen(P, Q / R, window) for window in windows)
        scored += B * (1 + Q)
    return Work(tokens, attended, scored)


def forward(config: DecoderConfig, lora: LoRAConfig | None, work: Work) -> Forward:
    """FLOPs of a forward pass by its terms."""
    dense, adapters = weights(config, lora)
    return Forward(
        2.0 * dense * work.tokens,
        4.0 * config.heads * config.head_dim * work.attended,
        2.0 * config.width * config.vocabulary * work.scored,
        2.0 * adapters * work.tokens,
    )


def update(config: DecoderConfig, lora: LoRAConfig | None, work: Work, *, reference: bool) -> float:
    """FLOPs of a training step; `reference`: the frozen reference runs inside it."""
    f = forward(config, lora, work)
    frozen = f.dense + f.head if lora else 0.0  # whose weights have no gradient
    return 3 * sum(f) - frozen + reference * sum(f)


def of_batch(lm: LanguageModel, batch: Mapping[str, Any], *, reference: bool) -> float:
    """FLOPs of a training step of `lm` on this batch."""
    return update(lm.config, lm.lora, work(lm.config, batch["parts"]), reference=reference)


def _seen(before: int, n: float, window: int | None) -> float:
    """Keys that n queries in a row see, the first with `before` keys before its own; at most `window` each."""
    growing = n if window is None else min(max(window - before, 0), n)
    return growing * before + growing * (growing + 1) / 2 + (n - growing) * (window or 0)
