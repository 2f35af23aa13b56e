"""What is saved comes back bit for bit, where it belongs; what does not fit is refused by name."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from rosepo_jax.errors import UserError
from rosepo_jax.training import checkpoint, loop, sharding
from rosepo_jax.training.step import init_state

PARAMS = {
    "embedding": jnp.arange(64.0).reshape(8, 8),
    "blocks/attention/query/kernel": jnp.arange(128, dtype=jnp.bfloat16).reshape(2, 8, 8) / 3,
    "blocks/attention/query/lora_a": jnp.full((2, 8, 1), 0.1),
    "norm/scale": jnp.ones(8),
}


def mesh_of(*sizes):
    return Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), sharding.AXES)


def like(mesh, params=PARAMS):
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.parameter_sharding(mesh, path, x.shape))
        for path, x in params.items()
    }


def test_flat_paths_dtypes_and_bits_survive_on_another_mesh(tmp_path):
    checkpoint.save_params(tmp_path / "model", sharding.place(mesh_of(1, 4, 2), PARAMS))
    for sizes in ((1, 1, 1), (2, 2, 2)):
        target = like(mesh_of(*sizes))
        found = checkpoint.load_params(tmp_path / "model", target)
        assert found.keys() == PARAMS.keys()
        for path, value in PARAMS.items():
            assert found[path].dtype == value.dtype and found[path].sharding == target[path].sharding
            np.testing.assert_array_equal(sharding.to_host(found[path]), value)


def test_saving_again_replaces(tmp_path):
    checkpoint.save_params(tmp_path / "model", PARAMS)
    checkpoint.save_params(tmp_path / "model", PARAMS | {"norm/scale": jnp.full(8, 5.0)})
    found = checkpoint.load_params(tmp_path / "model", like(mesh_of(1, 1, 1)))
    np.testing.assert_array_equal(found["norm/scale"], 5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("path", "expected", "message"),
    [
        ("embedding", jax.ShapeDtypeStruct((8, 8), jnp.bfloat16), r"embedding is float32\[8, 8\], expected bfloat16"),
        ("norm/scale", jax.ShapeDtypeStruct((9,), jnp.float32), r"norm/scale is float32\[8\], expected float32\[9\]"),
        ("head/kernel", jax.ShapeDtypeStruct((8, 8), jnp.float32), r"head/kernel is nothing, expected float32\[8, 8\]"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(tmp_path, path, expected, message):
    checkpoint.save_params(tmp_path / "model", PARAMS)
    with pytest.raises(UserError, match=message):
        checkpoint.load_params(tmp_path / "model", like(mesh_of(1, 1, 1)) | {path: expected})


def test_no_model_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no model here"):
        checkpoint.load_params(tmp_path / "model", like(mesh_of(1, 1, 1)))


def state_of(mesh):
    transformation = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    initialise = functools.partial(init_state, transformation=transformation)
    layout = loop.state_sharding(mesh, jax.eval_shape(initialise, PARAMS))
    return jax.jit(initialise, out_shardings=layout)(PARAMS)


def test_states_come_back_with_their_metadata_and_the_newest_are_kept(tmp_path):
    mesh = mesh_of(1, 4, 2)
    state = state_of(mesh)
    kept = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    assert kept.restore(state) is None
    meta = {"step": 0, "best": {"HR@1": 1 / 3, "step": 2}, "stale": 1, "bad": []}
    for step in (1, 2, 3):
        state = jax.tree.map(lambda x: (x + 1).astype(x.dtype), state)
        meta["step"] = step
        kept.save(step, state, meta)
        # Training goes on while the checkpoint is written.
        meta["step"] = 99
        meta["bad"].append([step])
    kept.close()
    again = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    found, facts = again.restore(state_of(mesh))
    again.close()
    assert facts == {"step": 3, "best": {"HR@1": 1 / 3, "step": 2}, "stale": 1, "bad": [[1], [2]]}
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state)):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(sharding.to_host(a), sharding.to_host(b))
    numbers = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert numbers == {"2", "3"}
    json.dumps(facts)


def test_optimiser_moments_lie_like_their_parameters():
    mesh = mesh_of(1, 4, 2)
    state = state_of(mesh)
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state.optimizer, name)
        for path, value in moments.items():
            assert value.sharding == sharding.parameter_sharding(mesh, path, value.shape), path
    assert state.step.sharding.is_fully_replicated and state.skipped.sharding.is_fully_replicated
