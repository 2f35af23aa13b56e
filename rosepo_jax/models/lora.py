"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B, with B = 0 at the start."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    rank: int
    alpha: float
    targets: str  # regular expression over kernel paths inside a block, e.g. "attention/.*|mlp/.*"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.targets, path) is not None


def is_adapter(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def merge(params: Mapping[str, jax.Array], config: LoRAConfig) -> dict[str, jax.Array]:
    """Folds every adapter into its kernel: W + (alpha / rank) A B, computed in float32, stored in W's dtype."""
    merged = {path: value for path, value in params.items() if not is_adapter(path)}
    for path in params:
        if path.endswith("/lora_a"):
            stem = path.removesuffix("/lora_a")
            kernel = params[f"{stem}/kernel"]
            a, b = (params[f"{stem}/{name}"].astype(jnp.float32) for name in ("lora_a", "lora_b"))
            update = config.scale * jnp.matmul(a, b, precision="highest")
            merged[f"{stem}/kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return merged
