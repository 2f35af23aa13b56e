"""Fused causal attention: scores never leave the chip, forward or backward. cuDNN on NVIDIA GPUs, splash on TPUs.

Only whole calls are used. Parts are never merged through their log-sum-exp, whose gradient cuDNN drops.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

LANES = 128  # splash works on multiples of as many tokens
BLOCK = 512  # most queries and keys that splash holds at a time


def causal(
    query_BxPxHxE: jax.Array,
    key_BxPxKxE: jax.Array,
    value_BxPxKxE: jax.Array,
    *,
    scale: float,
    cap: float,
    implementation: str,
    mesh: Mesh | AbstractMesh | None,
) -> jax.Array:
    """`attention.causal` by one kernel call per device. Takes what `unfit` does not object to, and any P.

    The compiler cannot split a kernel, so with a mesh every device calls it on its own rows and heads. Rows that
    (replica, fsdp) or key-value heads that (tensor) do not divide stay together, computed by each device of that axis.
    """

    def kernel(*heads: jax.Array) -> jax.Array:
        if implementation == "splash":
            return _splash(*heads, scale=scale, cap=cap)
        return jax.nn.dot_product_attention(*heads, scale=scale, is_causal=True, implementation="cudnn")

    if mesh is not None:
        B, _, K, _ = key_BxPxKxE.shape
        rows = ("replica", "fsdp") if B % (mesh.shape["replica"] * mesh.shape["fsdp"]) == 0 else None
        spec = PartitionSpec(rows, None, "tensor" if K % mesh.shape["tensor"] == 0 else None)
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return kernel(query_BxPxHxE, key_BxPxKxE, value_BxPxKxE)


def _splash(query_BxPxHxE: jax.Array, key_BxPxKxE: jax.Array, value_BxPxKxE: jax.Array, *, scale: float, cap: float):
    """Padding stands behind the prompt, so that no real query sees it, and is cut off again."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    P, H = query_BxPxHxE.shape[1:3]
    tokens = -(-P // LANES) * LANES
    block = max(size for size in range(LANES, BLOCK + 1, LANES) if tokens % size == 0)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * H),
        block_sizes=splash.BlockSizes(
            block, block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        attn_logits_soft_cap=cap or None,
    )

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, tokens - P), (0, 0), (0, 0))).swapaxes(1, 2)

    query_BxPxHxE = query_BxPxHxE * jnp.asarray(scale, query_BxPxHxE.dtype)  # the kernel has no scale of its own
    mixed = jax.vmap(kernel)(heads_first(query_BxPxHxE), heads_first(key_BxPxKxE), heads_first(value_BxPxKxE))
    return mixed.swapaxes(1, 2)[:, :P]


def unfit(implementation: str, platform: str, *, dtype: str, head_dim: int, cap: float, sliding: bool) -> str:
    """Why a kernel cannot do the case; "" if it can."""
    home, dtypes = {
        "cudnn": ("gpu", ("bfloat16", "float16")),
        "splash": ("tpu", ("bfloat16", "float32")),
    }[implementation]
    if platform != home:
        return f"runs on {home}, and this is {platform}"
    if dtype not in dtypes:
        return f"computes in {' or '.join(dtypes)}, and model.dtype={dtype}"
    if sliding:
        return "knows no sliding window, and this model's is narrower than the prompts"
    if implementation == "cudnn":
        if cap:
            return f"knows no soft cap, and this model's attention has one of {cap:g}"
        if head_dim % 8 or head_dim > _cudnn_head_dim():
            return f"takes heads of a multiple of 8 up to {_cudnn_head_dim()} numbers, and this model's have {head_dim}"
    return ""


def _cudnn_head_dim() -> int:
    """The widest head with a gradient: 256 on Hopper only. jax looks at the GPU of this process, so we do too."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return 256 if capability.startswith("9.") else 128
