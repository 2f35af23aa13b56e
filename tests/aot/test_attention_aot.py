"""Programs for accelerators that are not here take the fused kernels: on every device of a mesh, in scanned layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rosepo_jax.errors import UserError
from rosepo_jax.models import attention
from rosepo_jax.training import hardware, hlo, sharding

LAYERS, B, P, H, E = 3, 4, 520, 8, 64  # P is no multiple of 128


def text_of(monkeypatch: pytest.MonkeyPatch, topology: str, implementation: str) -> str:
    """A training step over attention layers that keep nothing for the backward pass, compiled."""
    jax.config.update("jax_platforms", "cpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is used, so another compilation may go on beside
    try:
        target = hardware.target(topology)
    except UserError as missing:
        pytest.skip(str(missing))
    mesh = Mesh(np.array(target.devices).reshape(1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)

    def layer(x_BxPxHxE, scale_H):
        query = x_BxPxHxE * scale_H[None, None, :, None]
        key = query[:, :, ::2]
        how = {"scale": E**-0.5, "implementation": implementation, "mesh": mesh}
        return x_BxPxHxE + attention.causal(query, key, key, **how), None

    def loss(scale_LxH, x_BxPxHxE):
        kept = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        return jnp.square(jax.lax.scan(kept, x_BxPxHxE, scale_LxH)[0].astype(jnp.float32)).sum()

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    described = array((LAYERS, H), None, "tensor"), array((B, P, H, E), ("replica", "fsdp"), None, "tensor")
    with jax.default_matmul_precision("default"):  # Mosaic multiplies no bfloat16 at the tests' highest precision
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*described)
    return lowered.compile(compiler_options=dict(target.options)).as_text()


def assert_flash(text: str, kernels: dict[str, int]) -> None:
    program = hlo.parse(text)
    assert hlo.kernels(program) == kernels
    # Each device works on its own rows and heads: nothing but sums of gradients is exchanged.
    assert {exchange.kind for exchange in hlo.collectives(program)} <= {"all-reduce"}
    # No scores [.., P, P], whole, of a block of queries or padded; 128 lanes are the statistics of splash.
    wide = [shape for _, shape in hlo.arrays(text) if len(shape) > 2 and min(shape[-2:]) > 128]
    assert not wide, wide


@pytest.mark.gpu_aot
def test_the_gpu_program_takes_cudnn_forward_again_and_backward(monkeypatch):
    assert_flash(text_of(monkeypatch, "h200:1x1x4", "cudnn"), {"cudnn$fmhaSoftmax": 2, "cudnn$fmhaSoftmaxBackward": 1})


@pytest.mark.tpu_aot
def test_the_tpu_program_takes_splash_forward_again_and_backward(monkeypatch):
    names = {"splash_mha_fwd_residuals": 2, "splash_mha_dq_no_residuals": 1, "splash_mha_dkv_no_residuals": 1}
    assert_flash(text_of(monkeypatch, "v5e:2x2", "splash"), names)
