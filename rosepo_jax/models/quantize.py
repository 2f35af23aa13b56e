"""Frozen kernels in 8 or 4 bits for LoRA (QLoRA, arXiv 2305.14314). qwix holds the number formats; here is the storage.

int8: one scale per output. nf4: 16 levels placed at the quantiles of a normal distribution, one scale per block of 64
inputs and output; two values a byte, since not every device packs 4-bit arrays by itself.
"""

import math

import jax
import jax.numpy as jnp
import qwix

from rosepo_jax.errors import UserError

FORMATS = ("none", "int8", "nf4")
_BLOCK = 64  # inputs that share a scale in nf4


def quantize(kernel_IxO: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
    """The stored values and their float32 scales of one kernel [inputs, outputs].

    Shapes:    int8: [I, O] int8 and [1, O]; nf4: [I/2, O] uint8 and [I/b, O], b = gcd(I, 64)
    Errors:    UserError for nf4 with an odd number of inputs.
    """
    kernel_IxO = kernel_IxO.astype(jnp.float32)
    if how == "int8":
        array = qwix.quantize(kernel_IxO, "int8", channelwise_axes=[1])
        return array.qvalue, array.scale
    inputs = kernel_IxO.shape[0]
    if inputs % 2:
        raise UserError(f"model.quantize=nf4 packs pairs of inputs, but a kernel has {inputs}; use int8")
    array = qwix.quantize(kernel_IxO, "nf4", channelwise_axes=[1], tiled_axes={0: math.gcd(inputs, _BLOCK)})
    codes = array.qvalue.astype(jnp.uint8)
    return codes[0::2] | (codes[1::2] << 4), array.scale


def dequantize(stored: jax.Array, scale: jax.Array, how: str) -> jax.Array:
    """The float32 kernel that `quantize` stored."""
    if how == "int8":
        return qwix.dequantize(qwix.QArray(stored, scale, qtype="int8"))
    codes = jnp.stack([stored & 0xF, stored >> 4], axis=1).reshape(-1, stored.shape[1])
    return qwix.dequantize(qwix.QArray(codes.astype(jnp.uint4), scale, qtype="nf4"))
