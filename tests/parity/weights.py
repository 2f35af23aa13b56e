"""Weights and ids that depend on nothing but names and shapes: any library, or none, makes the same checkpoint."""

import hashlib

import numpy as np


def draw(name: str, shape: tuple[int, ...], model_type: str, seed: int = 0) -> np.ndarray:
    """float32 values of a tensor with its Hugging Face name, from a Philox stream of its own.

    Norms multiply by 0.5 to 1.5 (Gemma: 1 to 2, of which it keeps the part above 1), biases lie in [-0.5, 0.5],
    matrices are uniform around 0 with standard deviation 1.5 / sqrt(columns): logits spread over a few units, and
    nothing can be left out unseen. Gemma scales its embeddings up; halving them keeps tied models from repeating one
    token.
    """
    gemma = model_type.startswith("gemma")
    unit = _generator(f"{seed} {name}").random(shape, dtype=np.float32)
    if len(shape) == 2:
        scale = 1.5 * (12 / shape[1]) ** 0.5 * (0.5 if gemma and "embed" in name else 1.0)
        return (unit - np.float32(0.5)) * np.float32(scale)
    if name.endswith(".bias"):
        return unit - np.float32(0.5)
    return unit if gemma else unit + np.float32(0.5)


def ids(name: str, length: int, vocabulary: int) -> list[int]:
    """Token ids from 3 on: the first three are padding, BOS and EOS of the tests' tokenizers."""
    return _generator(f"ids {name}").integers(3, vocabulary, length).tolist()


def _generator(name: str) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
