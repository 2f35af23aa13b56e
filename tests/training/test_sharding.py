"""Every parameter has one rule, and the numbers do not depend on the mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from rosepo_jax.errors import UserError
from rosepo_jax.models import lora
from rosepo_jax.models.decoder import LanguageModel
from rosepo_jax.models.lora import LoRAConfig
from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.training import sharding
from rosepo_jax.training.step import gradients

LORA = LoRAConfig(rank=2, alpha=4.0, targets="attention/.*|mlp/.*")


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return jax.sharding.Mesh(devices, sharding.AXES)


ALL = ("attention/query", "attention/key", "attention/value", "attention/output", "mlp/gate", "mlp/up", "mlp/down")


def shapes_of(adapter, tied, quantized="none"):
    config = dataclasses.replace(tiny.DECODER, tie_embeddings=tied, biases=ALL, query_key_norm=True, post_norms=True)
    return jax.eval_shape(LanguageModel(config, adapter, quantize=quantized).init, jax.random.key(0))


@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantized", ["none", "int8", "nf4"])
def test_every_parameter_matches_exactly_one_rule(adapter, tied, quantized):
    shapes = shapes_of(adapter, tied, quantized)
    assert any(path.endswith("/kernel_scale") for path in shapes) == (quantized != "none")
    assert ("head/kernel" in shapes) != tied and any(map(lora.is_adapter, shapes)) == bool(adapter)
    for path, value in shapes.items():
        specs = [spec for pattern, spec in sharding.RULES if re.fullmatch(pattern, path)]
        assert len(specs) == 1, path
        assert len(specs[0]) in (0, len(value.shape)), path


def test_every_rule_is_used_and_every_matrix_is_split():
    shapes = shapes_of(LORA, tied=False)
    for pattern, _ in sharding.RULES:
        assert any(re.fullmatch(pattern, path) for path in shapes), pattern
    for path, found in sharding.shardings(mesh_of(1, 2, 2), shapes).items():
        assert found.is_fully_replicated == ("norm" in path), path


@pytest.mark.parametrize("path", ["blocks/attention/gain", "head", "embedding/kernel", "blocks/moe/router/kernel"])
def test_an_unknown_parameter_is_an_error(path):
    with pytest.raises(ValueError, match=path):
        sharding.parameter_sharding(mesh_of(1, 1, 1), path, (2, 4, 4))


def test_dimensions_that_do_not_divide_stay_whole():
    mesh = mesh_of(1, 2, 4)
    assert sharding.parameter_sharding(mesh, "embedding", (37, 16)).spec == PartitionSpec(None, "fsdp")
    assert sharding.parameter_sharding(mesh, "embedding", (40, 16)).spec == PartitionSpec("tensor", "fsdp")
    assert sharding.parameter_sharding(mesh, "norm/scale", (16,)).spec == PartitionSpec(None)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 1, 2), (4, 1, 2)), ((1, 4, 2), (1, 4, 2))],
)
def test_make_mesh(sizes, expected):
    mesh = sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, sizes), devices=0)))
    assert tuple(mesh.shape.values()) == expected and mesh.axis_names == sharding.AXES


@pytest.mark.parametrize("sizes", [(1, 4, 1), (3, -1, 1), (-1, -1, 1), (0, -1, 1), (16, -1, 1), (-2, 8, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, sizes), devices=0)))


def test_missing_devices_are_noticed():
    assert sharding.make_mesh(ConfigDict(dict(replica=1, fsdp=-1, tensor=1, devices=8))).size == 8
    with pytest.raises(UserError, match=r"mesh\.devices=16, but there are 8"):
        sharding.make_mesh(ConfigDict(dict(replica=1, fsdp=-1, tensor=1, devices=16)))


@pytest.mark.parametrize(
    ("sizes", "expected"), [((1, -1, 1), (1, 32, 1)), ((-1, 1, 2), (16, 1, 2)), ((2, 4, 4), (2, 4, 4))]
)
def test_a_mesh_of_devices_that_are_not_here(sizes, expected):
    planned = sharding.planned_mesh(ConfigDict(dict(zip(sharding.AXES, sizes))), 32)
    assert tuple(planned.shape.values()) == expected
    with pytest.raises(UserError, match="there are 30 devices"):
        sharding.planned_mesh(ConfigDict(dict(zip(sharding.AXES, (4, -1, 1)))), 30)


@pytest.mark.parametrize("constrained", [True, False])
def test_rows_stay_on_their_devices(constrained):
    """The compiled program holds no activation of the whole batch; without the constraint it does."""
    mesh = mesh_of(1, 8, 1)
    lm = LanguageModel(tiny.DECODER, rows=sharding.batch_sharding(mesh) if constrained else None)
    B, P, R, T = 16, 13, 2, 6
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    params = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=found)
        for (path, x), found in zip(shapes.items(), sharding.shardings(mesh, shapes).values())
    }
    rows = sharding.batch_sharding(mesh)
    batch = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for shape, dtype in (((B, P), int), ((B, P), bool), ((B, R, T), int), ((B, R, T), bool))
    ]
    loss = jax.jit(jax.grad(lambda params, *batch: response_logps(lm, params, *batch).sum()))
    text = loss.lower(params, *batch).compile().as_text()
    S = P + R * (T - 1)
    assert re.search(rf"f32\[{B // 8},{S},", text)
    assert bool(re.search(rf"f32\[{B},{S},", text)) != constrained


def test_batch_sizes_are_checked():
    mesh = mesh_of(2, 2, 2)
    sharding.check_batch(mesh, "sft.batch_size", 16, 4)
    with pytest.raises(UserError, match=r"sft\.batch_size=12 must be a multiple of 16"):
        sharding.check_batch(mesh, "sft.batch_size", 12, 4)


def test_placed_parameters_are_copies_in_their_shards():
    mesh = mesh_of(1, 4, 2)
    params = sharding.place(mesh, {"embedding": np.arange(64.0, dtype=np.float32).reshape(8, 8)})
    copy = sharding.place(mesh, params)
    consume = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    expected = np.asarray(params["embedding"]).copy()
    consume(params)
    assert params["embedding"].is_deleted() and not copy["embedding"].is_deleted()
    np.testing.assert_array_equal(sharding.to_host(copy["embedding"]), expected)
    assert copy["embedding"].addressable_shards[0].data.shape == (4, 2)


def test_batches_are_split_over_replica_and_fsdp():
    batch = sharding.to_device(mesh_of(2, 2, 2), {"row_B": np.arange(8), "x_BxP": np.arange(24).reshape(8, 3)})
    assert {shard.data.shape for shard in batch["x_BxP"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(sharding.to_host(batch["row_B"]), np.arange(8))


def test_the_same_numbers_on_every_mesh():
    """Loss, gradient norm and gradient of the alignment task with adapters and accumulation, on 1 and on 8 devices."""
    lm = tiny.decoder(LORA)
    params = jax.jit(lm.init)(jax.random.key(0))
    reference = {path: x for path, x in params.items() if lora.is_adapter(path)}
    base = {path: x for path, x in params.items() if not lora.is_adapter(path)}
    trainable = tiny.moved(reference)
    found = {}
    for sizes, accumulate in (((1, 1, 1), 1), ((1, 8, 1), 1), ((1, 4, 2), 1), ((2, 2, 2), 2)):
        mesh = mesh_of(*sizes)
        frozen = {
            "base": sharding.place(mesh, base),
            "reference": sharding.place(mesh, reference),
            "oracle": jax.device_put(tiny.ORACLE_PARAMS, sharding.replicated(mesh)),
        }
        layout = sharding.shardings(mesh, trainable)
        run = jax.jit(
            functools.partial(gradients, tiny.task(lm, "rosepo", beta=1.0), accumulate=accumulate),
            out_shardings=(layout, None),
            compiler_options={"xla_backend_optimization_level": 0},  # compiles faster
        )
        batch = tiny.batch(parts=2 if sizes == (1, 4, 2) else 1)  # the same rows, in another layout
        gradient, metrics = run(sharding.place(mesh, trainable), frozen, sharding.to_device(mesh, batch))
        found[sizes] = {path: sharding.to_host(value) for path, value in gradient.items()}, metrics["loss"]
        assert {path: x.sharding for path, x in gradient.items()} == layout
    (expected, expected_loss), *others = found.values()

    def norm(gradient):
        return float(jnp.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in gradient.values())))

    for gradient, loss in others:
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        np.testing.assert_allclose(norm(gradient), norm(expected), rtol=1e-5)
        for path, value in expected.items():
            assert np.linalg.norm(gradient[path] - value) <= 1e-5 * norm(expected), path
