"""What is saved comes back bit for bit, where it belongs; what does not fit is refused by name."""

import contextlib
import functools
import json
import pathlib
import shutil

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


def test_handing_on_can_be_cut_short_anywhere_and_repeated(tmp_path, monkeypatch):
    """Whichever removal or renaming is the last that happens."""

    class Cut(Exception):
        pass

    for cut in range(4):
        kept, target = tmp_path / str(cut) / "kept", tmp_path / str(cut) / "model"
        for place, scale in ((kept / "1", 1.0), (kept / "2", 2.0), (target, 3.0)):
            checkpoint.save_params(place, PARAMS | {"norm/scale": jnp.full(8, scale)})
        turns = iter(range(10))

        def until(function, turns=turns, cut=cut):
            def call(*arguments, **keys):
                if next(turns) == cut:
                    raise Cut
                return function(*arguments, **keys)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(Cut):
            patch.setattr(checkpoint.shutil, "rmtree", until(shutil.rmtree))
            patch.setattr(pathlib.Path, "rename", until(pathlib.Path.rename))
            checkpoint.hand_on(kept / "2", target)
        assert cut == 3 or next(turns) == cut + 1
        checkpoint.hand_on(kept / "2", target)
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        assert checkpoint.load_params(target, like(mesh_of(1, 1, 1)))["norm/scale"][0] == 2.0


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


# ---- Damage ----------------------------------------------------------------------------------------------------------


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


DAMAGES = {"cut": half, "emptied": lambda path: path.write_bytes(b""), "zeroed": zeroed, "flipped": flipped}
DAMAGES["removed"] = lambda path: path.unlink()


def damaged(whole, part=""):
    """Copies of a folder, each with one file of its `part` damaged in one way: (copy, file and damage)."""
    copy = whole.with_name("broken")
    for file in sorted(p.relative_to(whole) for p in (whole / part).rglob("*") if p.is_file()):
        for name, damage in DAMAGES.items():
            shutil.copytree(whole, copy)
            damage(copy / file)
            yield copy, (file, name)
            shutil.rmtree(copy)


def saved(directory, mesh):
    """Checkpoints 1 and 2; their states."""
    states, kept = {}, checkpoint.Checkpoints(directory, keep=2)
    for step in (1, 2):
        states[step] = jax.tree.map(lambda x, step=step: (x + step).astype(x.dtype), state_of(mesh))
        kept.save(step, states[step], {"step": step})
    kept.close()
    return states


def restored(directory, mesh):
    kept = checkpoint.Checkpoints(directory, keep=2)
    try:
        return kept.restore(state_of(mesh))
    finally:
        kept.close()


def equal(a, b):
    return all(np.array_equal(sharding.to_host(x), sharding.to_host(y)) for x, y in zip(*map(jax.tree.leaves, (a, b))))


def test_whatever_is_damaged_a_whole_state_comes_back_or_the_one_before_with_a_word(tmp_path, capsys):
    """Every file of the newest checkpoint, damaged in five ways: its own state bit for bit, where the file does not
    matter, or the state before it and a line that says what is wrong; never anything else."""
    mesh = mesh_of(1, 2, 1)
    states = saved(tmp_path / "whole", mesh)
    noticed = 0
    for broken, how in damaged(tmp_path / "whole", "2"):
        found, meta = restored(broken, mesh)
        said = capsys.readouterr().err
        assert equal(found, states[meta["step"]]), how
        assert (meta["step"] == 1) == (f"{broken / '2'}: damaged (" in said), (how, said)
        assert meta["step"] == 2 or not (broken / "2").exists()
        noticed += meta["step"] == 1
    assert noticed >= 20


@pytest.mark.parametrize("part", ["state", "meta"])
def test_a_missing_part_is_damage(tmp_path, capsys, part):
    mesh = mesh_of(1, 2, 1)
    states = saved(tmp_path / "c", mesh)
    shutil.rmtree(tmp_path / "c" / "2" / part)
    found, meta = restored(tmp_path / "c", mesh)
    assert meta == {"step": 1} and equal(found, states[1]) and "2: damaged (" in capsys.readouterr().err


def test_a_state_of_other_shapes_is_damage(tmp_path, capsys):
    mesh = mesh_of(1, 2, 1)
    states = saved(tmp_path / "c", mesh)
    other = checkpoint.Checkpoints(tmp_path / "other", keep=1)
    other.save(2, jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, states[2]), {"step": 2})
    other.close()
    shutil.rmtree(tmp_path / "c" / "2")
    shutil.copytree(tmp_path / "other" / "2", tmp_path / "c" / "2")
    found, meta = restored(tmp_path / "c", mesh)
    assert meta == {"step": 1} and equal(found, states[1]) and "2: damaged (" in capsys.readouterr().err


def test_an_exchanged_element_is_damage(tmp_path, capsys, monkeypatch):
    """What every library reads without a complaint, but is not what was saved."""
    mesh = mesh_of(1, 2, 1)
    states = saved(tmp_path / "c", mesh)
    read = checkpoint.ocp.CheckpointManager.restore

    def exchanged(self, step, **keys):
        found = read(self, step, **keys)
        if step == 2:
            table = found["state"].trainable["embedding"]
            found["state"].trainable["embedding"] = table.at[0, 0].set(table[0, 1]).at[0, 1].set(table[0, 0])
        return found

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", exchanged)
    found, meta = restored(tmp_path / "c", mesh)
    said = capsys.readouterr().err
    assert meta == {"step": 1} and equal(found, states[1])
    assert "embedding" in said and "is not what was saved" in said


def test_a_damaged_model_is_refused_or_whole(tmp_path, caplog):
    """What a stage hands on has no one before it: every file, damaged in five ways, makes no other model."""
    mesh = mesh_of(1, 2, 1)
    params = sharding.place(mesh, PARAMS)
    checkpoint.save_params(tmp_path / "whole", params)
    refused = 0
    for broken, how in damaged(tmp_path / "whole"):
        try:
            assert equal(checkpoint.load_params(broken, like(mesh)), params), how
        except UserError as error:
            assert str(error).startswith(f"{broken}: "), how
            refused += 1
    assert refused >= 10
    assert not caplog.records  # the libraries' own words would stand beside ours


def test_an_exchanged_model_is_refused(tmp_path):
    """Files that are whole, of another model of the same shapes."""
    checkpoint.save_params(tmp_path / "one", PARAMS)
    checkpoint.save_params(tmp_path / "other", PARAMS | {"norm/scale": jnp.full(8, 2.0)})
    shutil.copy(tmp_path / "one" / "_CHECKPOINT_METADATA", tmp_path / "other")
    with pytest.raises(UserError, match="norm/scale is not what was saved"):
        checkpoint.load_params(tmp_path / "other", like(mesh_of(1, 1, 1)))


def test_nothing_whole_is_a_refusal(tmp_path):
    mesh = mesh_of(1, 2, 1)
    saved(tmp_path / "c", mesh)
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / "c" / step / "state")
    with pytest.raises(UserError, match=r"no checkpoint is whole \(2: .*; 1: .*\); remove that folder"):
        restored(tmp_path / "c", mesh)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1", "2"}, "nothing is thrown away"


def test_checksums_are_the_same_on_any_mesh_and_see_every_change():
    values = {"a": jnp.arange(64.0).reshape(8, 8), "b": jnp.arange(16, dtype=jnp.bfloat16), "n": jnp.int32(7)}
    expected = checkpoint.checksums(values)
    split = jax.device_put(values["a"], jax.sharding.NamedSharding(mesh_of(1, 4, 2), jax.P("fsdp", "tensor")))
    assert checkpoint.checksums(values | {"a": split}) == expected
    for changed in (values["a"].at[3, 5].add(1e-5), values["a"].T, values["a"].at[7, 7].set(-63.0)):
        other = checkpoint.checksums(values | {"a": changed})
        assert [path for path in expected if other[path] != expected[path]] == ["a"]
