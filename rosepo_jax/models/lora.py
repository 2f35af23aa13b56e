"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + scale (x A) B, with B = 0 at the start."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rosepo_jax.models import quantize


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    rank: int
    alpha: float
    targets: str  # regular expression over kernel paths inside a block, e.g. "attention/.*|mlp/.*"
    dropout: float = 0.0  # of the adapter's input, where a key is given
    rslora: bool = False  # rank-stabilised scale (arXiv 2312.03732)

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.targets, path) is not None


def is_adapter(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def merge(params: Mapping[str, jax.Array], config: LoRAConfig | None, quantized: str = "none") -> dict[str, jax.Array]:
    """Plain parameters: every adapter folded into its kernel, W + scale A B, computed in float32, stored in W's dtype.

    Quantised kernels are restored first (float32): the result computes what the quantised model with its adapter does.
    """
    merged = {p: value for p, value in params.items() if not is_adapter(p) and not p.endswith("/kernel_scale")}
    for path in merged:
        stem = path.removesuffix("/kernel")
        kernel = params[path]
        if f"{stem}/kernel_scale" in params:
            restore = jax.vmap(lambda stored, scale: quantize.dequantize(stored, scale, quantized))
            merged[path] = kernel = restore(kernel, params[f"{stem}/kernel_scale"])
        if config is not None and f"{stem}/lora_a" in params:
            a, b = (params[f"{stem}/{name}"].astype(jnp.float32) for name in ("lora_a", "lora_b"))
            update = config.scale * jnp.matmul(a, b, precision="highest")
            merged[path] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return merged
