import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import AxisType

from rosepo_jax.errors import UserError
from rosepo_jax.models import attention, flash


def heads(B: int, P: int, H: int, K: int, E: int, dtype=np.float32) -> list[jax.Array]:
    """A query, a key, a value and a weight of each output."""
    draw = np.random.default_rng(P)
    return [jnp.asarray(draw.normal(size=(B, P, n, E)), dtype) for n in (H, K, K, H)]


def plain(query, key, value, *, scale, cap=0.0, window=None):
    """The formula, with all scores at once."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = scale * jnp.einsum("bphe,buhe->bhpu", query, key)
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    near = np.tril(np.ones(scores.shape[2:], bool))
    near = near if window is None else np.triu(near, 1 - window)
    return jnp.einsum("bhpu,buhe->bphe", jax.nn.softmax(jnp.where(near[None, None], scores, -jnp.inf), axis=-1), value)


def outputs_and_gradients(attend, query, key, value, weight):
    """What is computed, and its gradients through a weighted sum."""

    def loss(*inputs):
        mixed = attend(*inputs)
        return (mixed.astype(jnp.float32) * weight).sum(), mixed

    gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return [mixed, *gradients]


def assert_close(found, expected, tolerance=2e-6):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(jnp.abs(y).max()))


def test_blocks_of_queries_change_nothing():
    inputs = heads(B=2, P=70, H=4, K=2, E=8)
    how = {"scale": 0.6, "cap": 5.0, "window": 40}
    found = outputs_and_gradients(functools.partial(attention.causal, **how), *inputs)
    assert_close(found, outputs_and_gradients(functools.partial(plain, **how), *inputs))


def four_devices():
    axes = {"axis_types": (AxisType.Auto,) * 3, "devices": jax.devices()[:4]}
    return jax.make_mesh((1, 2, 2), ("replica", "fsdp", "tensor"), **axes)


def test_splash_equals_xla_on_a_mesh(monkeypatch):
    """Outputs and gradients: grouped queries, a soft cap, heads of 64, prompts that are no multiple of 128."""
    interpreted = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", interpreted)
    monkeypatch.setattr(flash, "BLOCK", 128)  # several blocks of queries and keys
    inputs = heads(B=2, P=136, H=4, K=2, E=64)
    attend = functools.partial(attention.causal, scale=0.4, cap=5.0)
    found = outputs_and_gradients(functools.partial(attend, implementation="splash", mesh=four_devices()), *inputs)
    assert_close(found, outputs_and_gradients(attend, *inputs))


def test_cudnn_is_asked_for_the_same_on_a_mesh_that_divides_neither_rows_nor_heads(monkeypatch):
    """What is asked of cuDNN, computed by jax's own reference of the same function."""
    ask = jax.nn.dot_product_attention
    by_xla = {"implementation": "xla"}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *heads, **how: ask(*heads, **how | by_xla))
    inputs = heads(B=1, P=7, H=6, K=3, E=16)
    attend = functools.partial(attention.causal, scale=0.4)
    found = outputs_and_gradients(functools.partial(attend, implementation="cudnn", mesh=four_devices()), *inputs)
    assert_close(found, outputs_and_gradients(attend, *inputs))


def test_what_a_kernel_does_not_know_is_left_to_xla():
    """A kernel would fail here: there is neither a GPU nor a TPU."""
    query, key, value, _ = heads(B=1, P=9, H=2, K=1, E=8)
    for kernel, how in {"splash": {"window": 3}, "cudnn": {"cap": 5.0}}.items():
        attend = functools.partial(attention.causal, query, key, value, scale=1.0, **how)
        np.testing.assert_array_equal(attend(implementation=kernel), attend())


LLAMA = {"dtype": "bfloat16", "head_dim": 128, "prompt_length": 512, "cap": 0.0, "sliding": False}


@pytest.mark.parametrize(
    ("platform", "differs", "expected"),
    [
        ("cpu", {}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float16"}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"cap": 50.0}, "xla"),
        ("gpu", {"sliding": True}, "xla"),
        ("gpu", {"head_dim": 100}, "xla"),
        ("gpu", {"head_dim": 256}, "xla"),
        ("gpu", {"prompt_length": 64}, "cudnn"),
        ("tpu", {}, "splash"),
        ("tpu", {"dtype": "float32", "cap": 50.0, "head_dim": 256}, "splash"),
        ("tpu", {"dtype": "float16"}, "xla"),
        ("tpu", {"sliding": True}, "xla"),
        ("tpu", {"prompt_length": 64}, "xla"),
    ],
)
def test_the_platform_chooses_the_kernel(platform, differs, expected):
    assert attention.choose("auto", platform, **LLAMA | differs) == expected
    assert attention.choose("xla", platform, **LLAMA | differs) == "xla"


def test_wide_heads_take_cudnn_on_hopper_alone(monkeypatch):
    for capability, expected in {"8.0": "xla", "9.0": "cudnn", "10.0": "xla"}.items():
        gpu = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda gpu=gpu: [gpu])
        assert attention.choose("auto", "gpu", **LLAMA | {"head_dim": 256}) == expected


@pytest.mark.parametrize(
    ("requested", "platform", "differs", "reason"),
    [
        ("flash", "gpu", {}, "choose one of auto, xla, cudnn, splash"),
        ("cudnn", "tpu", {}, "runs on gpu, and this is tpu"),
        ("splash", "cpu", {}, "runs on tpu, and this is cpu"),
        ("cudnn", "gpu", {"dtype": "float32"}, "computes in bfloat16 or float16, and model.dtype=float32"),
        ("cudnn", "gpu", {"cap": 50.0}, "knows no soft cap, and this model's attention has one of 50"),
        (
            "cudnn",
            "gpu",
            {"head_dim": 136},
            "takes heads of a multiple of 8 up to 128 numbers, and this model's have 136",
        ),
        ("splash", "tpu", {"sliding": True}, "knows no sliding window"),
    ],
)
def test_a_kernel_that_cannot_do_the_case_is_refused(requested, platform, differs, reason):
    with pytest.raises(UserError, match=f"^model.attention='{requested}'.*{reason}"):
        attention.choose(requested, platform, **LLAMA | differs)


def test_a_forced_kernel_is_taken():
    assert attention.choose("splash", "tpu", **LLAMA | {"prompt_length": 64}) == "splash"
    assert attention.choose("cudnn", "gpu", **LLAMA) == "cudnn"
