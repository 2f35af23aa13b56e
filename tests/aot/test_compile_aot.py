"""The compiled text of real training and decoding programs, on accelerators that are not here.

Run where the compiler is, an environment of launch/compile_env.sh:

    .venv-compile-tpu/bin/python -m pytest tests/aot        .venv-compile-gpu/bin/python -m pytest tests/aot

The model is small but has what a large one has: bfloat16, adapters, recomputed layers, a head of its own, parameters
split over all devices. Sizes differ from each other, so that a shape says what an array is.
"""

import math

import jax
import pytest

from rosepo_jax import config as defaults
from rosepo_jax.errors import UserError
from rosepo_jax.stages import compile as stage
from rosepo_jax.training import hardware, hlo

D, H, K, F, V, L, P, T, R, B, W = 1024, 8, 1, 2816, 32768, 4, 768, 9, 2, 128, 16
KERNELS = {(D, D), (D, D * K // H), (D, F), (F, D), (D, V), (V, D)}
RANK = 16


def small():
    c = defaults.default()
    m = c.model
    m.width, m.layers, m.heads, m.kv_heads, m.mlp_width, m.vocabulary = D, L, H, K, F, V
    m.prompt_length, m.response_length, m.tie_embeddings, m.remat = P, T, False, "full"
    m.dtype = m.param_dtype = "bfloat16"
    m.tuning, m.lora.rank = "lora", RANK
    c.sft.batch_size = c.align.batch_size = B
    c.evaluate.batch_size, c.evaluate.beams, c.pairs.negatives = 16, W, R - 1
    return c


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("v5e:4x4", marks=pytest.mark.tpu_aot),
        pytest.param("h200:1x2x4", marks=pytest.mark.gpu_aot),
    ],
)
def texts(request):
    """(devices, {program: its text}) of a topology."""
    jax.config.update("jax_platforms", "cpu")
    try:
        target = hardware.target(request.param)
    except UserError as missing:
        pytest.skip(str(missing))
    c = small()
    mesh = hardware.mesh(c.mesh, target.devices)
    # The other tests ask for exact products, and no run does.
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        plans, _ = stage.plan(c, mesh, items=1000)
        return mesh.size, {name: stage.build(plans[name], target).as_text() for name in ("align", "search")}


def test_the_prompt_takes_the_flash_kernel_forward_and_backward(texts):
    devices, programs = texts
    align, search = (hlo.kernels(hlo.parse(programs[name])) for name in ("align", "search"))
    if devices == 16:
        forward, backward = "splash_mha_fwd", ("splash_mha_dq", "splash_mha_dkv")
    else:
        forward, backward = "cudnn$fmhaSoftmax", ("cudnn$fmhaSoftmaxBackward",)
    # The reference's pass, the policy's, and the policy's once more in the backward pass.
    assert sum(n for name, n in align.items() if name.startswith(forward) and "Backward" not in name) == 3
    assert all(sum(n for name, n in align.items() if name.startswith(kernel)) == 1 for kernel in backward)
    assert sum(search.values()) == 1


def test_no_scores_of_the_prompt_by_itself_exist(texts):
    """Neither whole nor in blocks of queries. Heads have 128 numbers, responses as many tokens x heads."""
    for text in texts[1].values():
        assert [
            shape for _, shape in hlo.arrays(text) if len(shape) > 2 and 128 < min(shape[-2:]) <= P >= shape[-1]
        ] == []


def test_no_logits_of_prompt_positions_exist(texts):
    """Vocabulary logits of one row are those of its response positions: R (T - 1) + 1, or a beam's; never P."""
    devices, programs = texts
    for name, text in programs.items():
        rows = (B if name == "align" else 16) // devices
        most = rows * (R * (T - 1) if name == "align" else W)
        for _, shape in hlo.arrays(text):
            if V in shape and shape[-2:] not in KERNELS and tuple(x for x in shape if x > 1) not in KERNELS:
                positions = math.prod(shape) // V
                assert P not in shape and (positions <= most or D % positions == 0), shape


def test_devices_exchange_kernels_gradients_and_tokens_but_no_activations(texts):
    """Each array that is exchanged is a kernel, or smaller than half of the hidden states of all rows of the batch."""
    for name, text in texts[1].items():
        rows, gathered = B if name == "align" else 16, 0
        for instruction in (i for part in hlo.parse(text).values() for i in part):
            kind = instruction.opcode.removesuffix("-done")
            for _, shape in hlo.arrays(instruction.shape) if kind in hlo.COLLECTIVES else ():
                if kind == "all-gather" and tuple(x for x in shape if x > 1) in KERNELS:
                    gathered += 1
                else:
                    assert math.prod(shape) < rows * P * D / 2, (name, kind, shape)
        assert gathered
