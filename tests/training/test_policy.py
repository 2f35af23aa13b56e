"""Model folders: what `create` makes is what `load` finds, for full tuning and adapters, presets and directories."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rosepo_jax import config as defaults
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf, lora, peft
from rosepo_jax.preference.logprobs import response_logps
from rosepo_jax.training import checkpoint, policy, sharding

TITLES = ["Blue Harbour", "Blue Harbour 2", "The Long Night", "Nights of Rain"] * 5
MANY_TITLES = [f"{a} {b} {c}" for a in ["north", "south", "east", "west"] for b in ["sea", "land"] for c in range(40)]


def small(tuning="full", **keys):
    config = defaults.default()
    config.model.update(
        {"vocabulary": 300, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "tuning": tuning}
    )
    config.model.update(keys)
    return config


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1), sharding.AXES)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype and found[path].sharding == value.sharding, path
        np.testing.assert_array_equal(sharding.to_host(found[path]), sharding.to_host(value), err_msg=path)


@pytest.fixture(scope="module", params=["full", "lora"])
def made(request, mesh, tmp_path_factory):
    """(config, folder, policy) as a stage leaves it, with parameters that training has moved."""
    config, folder = small(request.param), tmp_path_factory.mktemp(request.param)
    new = policy.create(config, folder, mesh, TITLES)
    trained = {path: x + 0.01 for path, x in new.trainable.items()}
    checkpoint.save_params(folder / "model", trained)
    return config, folder, dataclasses.replace(new, trainable=trained)


def test_what_is_trained(made):
    config, _, new = made
    if config.model.tuning == "lora":
        assert all(map(lora.is_adapter, new.trainable)) and not any(map(lora.is_adapter, new.base))
        assert len(new.trainable) == 2 * 7
    else:
        assert not new.base and "embedding" in new.trainable
    assert new.params.keys() == jax.eval_shape(new.lm.init, jax.random.key(0)).keys()


def test_loading_gives_every_bit_back(made, mesh):
    config, folder, new = made
    found = policy.load(config, folder, mesh)
    assert found.lm == new.lm
    assert_same(found.trainable, new.trainable)
    assert_same(found.base, new.base)
    assert found.encoder.identity == new.encoder.identity


def test_handing_on_keeps_description_and_tokenizer(made, mesh, tmp_path):
    config, folder, new = made
    policy.hand_on(folder, tmp_path)
    checkpoint.save_params(tmp_path / "model", new.trainable)
    found = policy.open_model(config, tmp_path, mesh)
    assert_same(found.params, new.params)
    assert found.encoder.identity == new.encoder.identity


def test_a_hugging_face_directory_is_the_same_model(made, mesh, tmp_path):
    """Merged, written, opened as it is: the same log-probabilities."""
    config, folder, new = made
    params = lora.merge(new.params, new.lm.lora)
    checkpoints_hf.write(tmp_path / "hf", new.lm.config, params, folder / "tokenizer")
    found = policy.open_model(config, tmp_path / "hf", mesh)
    generator = np.random.default_rng(0)
    batch = (
        generator.integers(0, 300, (2, 6)).astype(np.int32), np.ones((2, 6), bool),
        generator.integers(0, 300, (2, 2, 3)).astype(np.int32), np.ones((2, 2, 3), bool),
    )  # fmt: skip
    logps = jax.jit(response_logps, static_argnums=0)
    np.testing.assert_allclose(
        logps(found.lm, found.params, *batch), logps(new.lm, new.params, *batch), rtol=1e-5, atol=1e-5
    )
    assert found.encoder.ids(TITLES) == new.encoder.ids(TITLES)


def test_the_base_of_a_hugging_face_directory_comes_back(mesh, tmp_path):
    """Fine-tuning of a directory with adapters stores the adapters alone; the base is read from the directory again."""
    first = policy.create(small(), tmp_path / "preset", mesh, TITLES)
    checkpoints_hf.write(tmp_path / "hf", first.lm.config, first.params, tmp_path / "preset" / "tokenizer")
    config = small("lora", path=str(tmp_path / "hf"))
    new = policy.create(config, tmp_path / "sft", mesh, [])
    assert_same(new.base, first.params)
    checkpoint.save_params(tmp_path / "sft" / "model", new.trainable)
    found = policy.load(config, tmp_path / "sft", mesh)
    assert_same(found.base, first.params)
    assert_same(found.trainable, new.trainable)


def test_the_start_depends_on_the_seed_alone(mesh, tmp_path):
    config, other = small(), small()
    other.seed = 1
    one = policy.create(config, tmp_path / "1", mesh, TITLES)
    other_mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), sharding.AXES)
    two = policy.create(config, tmp_path / "2", other_mesh, TITLES)
    for path, value in one.params.items():
        np.testing.assert_array_equal(sharding.to_host(value), sharding.to_host(two.params[path]), err_msg=path)
    three = policy.create(other, tmp_path / "3", mesh, TITLES)
    assert not np.array_equal(one.params["embedding"], three.params["embedding"])


def test_rope_scaling_survives_the_description(mesh, tmp_path):
    policy.create(small(), tmp_path, mesh, TITLES)
    description = json.loads((tmp_path / "model.json").read_text())
    description["decoder"]["rope_scaling"] = [["factor", 2.0], ["rope_type", "linear"]]
    (tmp_path / "model.json").write_text(json.dumps(description))
    new = policy.create(small(), tmp_path / "other", mesh, TITLES)
    checkpoint.save_params(tmp_path / "model", new.trainable)
    found = policy.load(small(), tmp_path, mesh)
    assert found.lm.config.rope_scaling == (("factor", 2.0), ("rope_type", "linear"))
    hash(found.lm)  # a static argument of jit


def test_mistakes_are_named(mesh, tmp_path):
    for config, message in (
        (small("qlora"), r"model\.tuning='qlora': choose full or lora"),
        (small(heads=3), "must divide evenly"),
        (small(kv_heads=3), "must divide evenly"),
        (small(quantize="int8"), "use model.tuning=lora"),
        (small("lora", quantize="int4"), "choose one of none, int8, nf4"),
        (small("lora", lora={"rank": 2, "alpha": 1.0, "targets": "mlp/(", "dropout": 0.0}), "matches some of"),
        (small(adapter="x"), "continued with model.tuning=lora"),
        (
            small("lora", lora={"rank": 2, "alpha": 1.0, "targets": "q_proj", "dropout": 0.0}),
            "matches some of attention/q",
        ),
        (small(path=str(tmp_path / "nowhere")), r"model\.path=.*nowhere.*not a Hugging Face model directory"),
    ):
        with pytest.raises(UserError, match=message):
            policy.create(config, tmp_path / "out", mesh, TITLES)
    with pytest.raises(UserError, match="neither a stage's model folder"):
        policy.open_model(small(), tmp_path, mesh)


def test_another_dtype_than_the_stored_one_is_refused(mesh, tmp_path):
    config = small()
    checkpoint.save_params(tmp_path / "model", policy.create(config, tmp_path, mesh, TITLES).trainable)
    config.model.param_dtype = "bfloat16"
    with pytest.raises(UserError, match=r"is float32.*expected bfloat16"):
        policy.load(config, tmp_path, mesh)


@pytest.fixture
def directory(mesh, tmp_path):
    """A Hugging Face directory, and the parameters in it."""
    first = policy.create(small(), tmp_path / "preset", mesh, TITLES)
    checkpoints_hf.write(tmp_path / "hf", first.lm.config, first.params, tmp_path / "preset" / "tokenizer")
    return tmp_path / "hf", first


def test_adapters_are_float32_on_a_bfloat16_base(mesh, directory, tmp_path):
    new = policy.create(small("lora", path=str(directory[0]), param_dtype="bfloat16"), tmp_path / "sft", mesh, [])
    assert {str(value.dtype) for value in new.base.values()} == {"bfloat16"}
    assert {str(value.dtype) for value in new.trainable.values()} == {"float32"}


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantised_base_is_the_directorys_rounded_to_its_format(how, mesh, directory, tmp_path):
    folder, first = directory
    config = small("lora", path=str(folder), quantize=how)
    new = policy.create(config, tmp_path / "sft", mesh, [])
    checkpoint.save_params(tmp_path / "sft" / "model", new.trainable)
    assert_same(policy.load(config, tmp_path / "sft", mesh).base, new.base)
    restored = lora.merge(new.params, new.lm.lora, how)
    for path, value in first.params.items():
        if path.startswith("blocks/") and path.endswith("/kernel"):
            assert new.base[path].dtype.itemsize == 1
            error = np.abs(sharding.to_host(restored[path]) - sharding.to_host(value))
            largest = np.abs(sharding.to_host(value)).max(axis=1, keepdims=True)  # of an output, over its inputs
            assert 0 < (error / largest).max() < (0.5 / 127 + 1e-6 if how == "int8" else 0.16), path
        else:
            np.testing.assert_array_equal(sharding.to_host(restored[path]), sharding.to_host(value))


def test_sft_goes_on_from_an_adapter_and_score_opens_one(mesh, directory, tmp_path):
    folder, _ = directory
    config = small("lora", path=str(folder))
    config.model.lora.update({"rank": 3, "alpha": 12.0, "targets": "attention/(query|value)", "rslora": True})
    made = policy.create(config, tmp_path / "sft", mesh, [])
    adapter = {path: x + 0.01 for path, x in made.trainable.items()}
    peft.write(tmp_path / "peft", made.lm.config, made.lm.lora, adapter, base=str(folder))
    again = policy.create(small("lora", path=str(folder), adapter=str(tmp_path / "peft")), tmp_path / "2", mesh, [])
    assert again.lm.lora.scale == made.lm.lora.scale == 12 / 3**0.5
    assert_same(again.trainable, adapter)
    opened = policy.open_model(small(), tmp_path / "peft", mesh)  # the adapter names its base
    assert_same(opened.params, again.params)


def test_a_new_model_of_a_named_architecture(mesh, tmp_path):
    architecture = {"model_type": "gemma2", "vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 3}
    architecture |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 24}
    (tmp_path / "shape.json").write_text(json.dumps(architecture))
    config = small(architecture=str(tmp_path / "shape.json"))
    new = policy.create(config, tmp_path / "sft", mesh, TITLES)
    assert new.lm.config.family == "gemma2" and new.lm.config.sliding == (True, False, True)
    checkpoint.save_params(tmp_path / "sft" / "model", new.trainable)
    assert policy.load(config, tmp_path / "sft", mesh).lm == new.lm
    with pytest.raises(UserError, match=r"model\.vocabulary=600: .*shape\.json has 320 tokens"):
        policy.create(small(architecture=config.model.architecture, vocabulary=600), tmp_path / "3", mesh, MANY_TITLES)
