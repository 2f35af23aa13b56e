"""Memory of a run before it is loaded: published sizes, state to the byte, steps against the compiler."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rosepo_jax import config as defaults
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf, families
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.stages import sft
from rosepo_jax.training import loop, memory, optimizer, sharding
from rosepo_jax.training.step import init_state, train_step

LORA = LoRAConfig(rank=8, alpha=16.0, targets="attention/.*|mlp/.*")
SMALL = DecoderConfig(vocabulary=512, width=64, layers=4, heads=8, kv_heads=4, head_dim=8, mlp_width=192)


def real_mesh(*sizes):
    return jax.sharding.Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), sharding.AXES)


def mesh_config(*sizes):
    mesh = defaults.default().mesh
    mesh.replica, mesh.fsdp, mesh.tensor = sizes
    return mesh


def abstract(*sizes):
    return sharding.planned_mesh(mesh_config(*sizes), math.prod(sizes))


def run(batch_size=8, accumulate=1, prompt=64, response=8, negatives=1):
    c = defaults.default()
    c.model.prompt_length, c.model.response_length = prompt, response
    for section in (c.sft, c.align):
        section.batch_size, section.accumulate = batch_size, accumulate
    c.pairs.negatives, c.evaluate.batch_size = negatives, batch_size
    return c


# ---- Parameters and state: exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-70b", 70_553_706_496),
        ("qwen3-4b", 4_022_468_096),
        ("gemma3-4b", 3_880_263_168),  # of the 4,300,079,472 of the model with its image part
        ("mistral-7b", 7_248_023_552),
    ],
)
def test_the_shipped_architectures_have_the_published_sizes(name, parameters):
    architecture = families.architecture(name)
    assert sum(map(math.prod, checkpoints_hf.shapes(architecture).values())) == parameters
    frozen, trainable = memory.parameters(LanguageModel(architecture))
    assert not frozen and sum(x.size for x in trainable.values()) == parameters


KINDS = [
    LanguageModel(SMALL),
    LanguageModel(dataclasses.replace(SMALL, tie_embeddings=False, vocabulary=509), param_dtype="bfloat16"),
    LanguageModel(SMALL, LORA, param_dtype="bfloat16"),
    LanguageModel(SMALL, LORA, quantize="nf4"),
]


@pytest.mark.parametrize("lm", KINDS, ids=["full", "odd vocabulary", "adapters", "nf4"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_state_is_what_the_real_shards_hold(lm, sizes):
    mesh, c = real_mesh(*sizes), run()
    state, frozen = zeros(lm, mesh, c.align)
    held = {"base": frozen, "trainable": state.trainable, "optimizer": state.optimizer}
    counted = memory.stages(c, lm, abstract(*sizes))["align"]
    for name, arrays in held.items():
        assert getattr(counted, name) == sum(
            shard.data.nbytes
            for x in jax.tree.leaves(arrays)
            for shard in x.addressable_shards
            if shard.device == jax.devices()[0]
        ), name
    assert counted.reference == counted.trainable
    assert counted.state == counted.base + 2 * counted.trainable + counted.optimizer


def zeros(lm, mesh, settings):
    """(training state, frozen parameters) in their shards, without the time that a draw takes."""
    base, trainable = (
        {path: jnp.zeros(x.shape, x.dtype, device=sharding.parameter_sharding(mesh, path, x.shape)) for path, x in part}
        for part in map(dict.items, memory.parameters(lm))
    )
    transformation, _ = optimizer.make(settings, "align", 10, 10)
    initialise = functools.partial(init_state, transformation=transformation)
    layout = loop.state_sharding(mesh, jax.eval_shape(initialise, trainable))
    return jax.jit(initialise, out_shardings=layout)(trainable), base


# ---- Steps: an estimate ----------------------------------------------------------------------------------------------


def compiled_bytes(lm, stage, c):
    """What the compiler asks for: arguments and temporaries of the real step on one CPU device."""
    settings, R = (c.sft, 1) if stage == "sft" else (c.align, 1 + c.pairs.negatives)
    transformation, schedule = optimizer.make(settings, stage, 10, 10)
    base, trainable = memory.parameters(lm)
    state = jax.eval_shape(functools.partial(init_state, transformation=transformation), trainable)
    B, P, T = settings.batch_size, c.model.prompt_length, c.model.response_length
    shape = jax.ShapeDtypeStruct
    part = {
        "prompt_BxP": shape((B, P), jnp.int32), "prompt_mask_BxP": shape((B, P), jnp.bool),
        "response_BxRxT": shape((B, R, T), jnp.int32), "response_mask_BxRxT": shape((B, R, T), jnp.bool),
        "fed_BxQ": shape((B, R * (T - 1)), jnp.int32),
    }  # fmt: skip
    batch = {
        "parts": (part,), "count_BxR": shape((B, R), jnp.int32),
        "row_B": shape((B,), jnp.int32), "update_B": shape((B,), jnp.int32),
        "history_BxN": shape((B, 6), jnp.int32), "item_BxR": shape((B, R), jnp.int32),
        "epsilon_BxK": shape((B, R - 1), jnp.float32),
    }  # fmt: skip
    if stage == "sft":
        task, frozen, batch = sft.task(lm), base, {k: x for k, x in batch.items() if "BxN" not in k and "item" not in k}
        del batch["epsilon_BxK"]
    else:
        task, frozen = tiny.task(lm), {"base": base, "reference": trainable, "oracle": tiny.ORACLE_PARAMS}
    step = jax.jit(functools.partial(train_step, task, transformation, schedule, settings.accumulate), donate_argnums=0)
    fast = {"xla_backend_optimization_level": 0}  # compiles faster, into the same buffers
    found = step.lower(state, frozen, batch).compile(fast).memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


WIDE = dataclasses.replace(SMALL, vocabulary=16384)
STEPS = {
    "full": (LanguageModel(SMALL), "align", {}),
    "full, remat, micro-batches": (LanguageModel(WIDE, remat="full"), "align", dict(accumulate=4)),
    "adapters, R = 4": (LanguageModel(SMALL, LORA), "align", dict(negatives=3)),
    "adapters, remat": (LanguageModel(SMALL, LORA, remat="full"), "align", {}),
    "adapters, remat, written out": (LanguageModel(SMALL, LORA, remat="full", unrolled=True), "align", {}),
    "adapters, written out": (LanguageModel(SMALL, LORA, unrolled=True), "align", {}),
    "adapters, remat, vocabulary, R = 4": (LanguageModel(WIDE, LORA, remat="full"), "align", dict(negatives=3)),
    "sft, remat": (LanguageModel(SMALL, remat="full"), "sft", {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_estimate_is_close_to_what_the_compiler_asks_for(name):
    lm, stage, keys = STEPS[name]
    c = run(**keys)
    counted = memory.stages(c, lm, abstract(1, 1, 1))[stage]
    step = dataclasses.replace(counted, scoring=0)  # validation is another program
    assert 0.8 < step.total / compiled_bytes(lm, stage, c) < 1.2


def test_what_more_devices_micro_batches_and_formats_save():
    def align(lm, sizes=(1, 1, 1), **keys):
        return memory.stages(run(**keys), lm, abstract(*sizes))["align"]

    lm = LanguageModel(SMALL, LORA, remat="full", param_dtype="bfloat16")
    whole = align(lm)
    assert align(lm, (8, 1, 1)).state == whole.state
    for eighth in (align(lm, (8, 1, 1)), align(lm, accumulate=8)):
        assert eighth.kept == pytest.approx(whole.kept / 8, rel=0.01)  # tables of angles are no rows
    assert align(lm, (1, 1, 4)).kept == whole.kept  # states between blocks have the full width everywhere
    none = dataclasses.replace(lm, remat="none")
    assert 0.25 < align(none, (1, 1, 4)).kept / align(none).kept < 0.6
    assert align(dataclasses.replace(lm, quantize="int8")).base < 0.7 * whole.base
    assert align(dataclasses.replace(lm, quantize="nf4")).base < align(dataclasses.replace(lm, quantize="int8")).base


def test_a_cached_reference_is_not_counted():
    c = run()
    before = memory.stages(c, KINDS[0], abstract(1, 1, 1))["align"]
    c.align.reference = "cached"
    assert before.total - memory.stages(c, KINDS[0], abstract(1, 1, 1))["align"].total == before.trainable


def test_heads_that_do_not_divide_stay_whole():
    assert memory.share(LanguageModel(SMALL), 4).config.heads == 2
    assert memory.share(LanguageModel(SMALL), 8).config.kv_heads == 1
    assert memory.share(LanguageModel(SMALL), 3).config == dataclasses.replace(SMALL, mlp_width=64)


def test_batches_that_the_devices_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"sft\.batch_size=8 must be a multiple of 16"):
        memory.stages(run(accumulate=2), KINDS[0], abstract(1, 8, 1))
