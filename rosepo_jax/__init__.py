"""rosepo_jax: preference-aligned LLM recommenders in JAX/Flax.

Array names carry their shape as a suffix: B prompts in a batch, P prompt tokens, R responses of one prompt (index 0 =
chosen), T response tokens, D model width, H heads, K key-value heads, V vocabulary, L layers, N history items,
I catalogue items, C candidates, E rows of a data set, W beams. `logps_BxR` is a [B, R] array.
"""

__version__ = "0.1.0"
