"""PEFT directories: bitwise there and back, every tensor and setting accounted for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rosepo_jax.errors import UserError
from rosepo_jax.models import lora, peft
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig

CONFIG = DecoderConfig(vocabulary=29, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=24)
LORA = LoRAConfig(rank=3, alpha=7.5, targets="attention/(query|output)|mlp/down", dropout=0.1, rslora=True)


def adapter(config=LORA):
    shapes = jax.eval_shape(LanguageModel(CONFIG, config).init, jax.random.key(0))
    generator = np.random.default_rng(0)
    return {p: jnp.asarray(generator.normal(size=s.shape), s.dtype) for p, s in shapes.items() if lora.is_adapter(p)}


@pytest.fixture
def folder(tmp_path):
    peft.write(tmp_path / "out", CONFIG, LORA, adapter(), base="owner/model", revision="abc", readme="# Card\n")
    return tmp_path / "out"


def settings(folder, **changes):
    raw = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return raw


def tensors(folder, change):
    stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    change(stored)
    safetensors.numpy.save_file(stored, folder / "adapter_model.safetensors")


def test_there_and_back_is_bitwise(folder):
    found = peft.read_config(folder)
    assert found == dataclasses.replace(LORA, targets="attention/output|attention/query|mlp/down")
    assert found.scale == LORA.scale == 7.5 / 3**0.5
    assert peft.base_name(folder) == ("owner/model", "abc") and peft.is_directory(folder)
    params = peft.read(folder, CONFIG, found)
    for path, value in adapter().items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    assert params.keys() == adapter().keys()


def test_tensors_are_named_and_laid_out_as_peft_does(folder):
    stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 3
    prefix = "base_model.model.model.layers.1"
    ours = adapter()
    np.testing.assert_array_equal(
        stored[f"{prefix}.self_attn.q_proj.lora_A.weight"], ours["blocks/attention/query/lora_a"][1].T
    )
    np.testing.assert_array_equal(stored[f"{prefix}.mlp.down_proj.lora_B.weight"], ours["blocks/mlp/down/lora_b"][1].T)
    raw = settings(folder)
    assert raw["target_modules"] == ["down_proj", "o_proj", "q_proj"] and raw["lora_alpha"] == 7.5 and raw["r"] == 3
    assert raw["lora_dropout"] == 0.1 and raw["use_rslora"] is True and raw["bias"] == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa.*changes the base"),
        ({"r": 0}, "r and lora_alpha"),
    ],
)
def test_settings_that_change_the_computation_are_refused(folder, changes, message):
    settings(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        peft.read_config(folder)
    assert "adapter_config.json" in str(error.value) and "\n" not in str(error.value)


def test_every_tensor_is_accounted_for(folder):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    original = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    found = peft.read_config(folder)
    for change, message in (
        (lambda t: t.pop(name), "attention/query has no adapter in layer 1"),
        (lambda t: [t.pop(n) for n in list(t) if "q_proj.lora_B" in n], "attention/query/lora_b"),
        (
            lambda t: t.update({name: np.zeros((2, 16), np.float32)}),
            r"lora_A of attention/query is F32\[2, 16\], expected .* \[3, 16\]",
        ),
        (lambda t: t.update({name: np.zeros((3, 16), np.int32)}), r"lora_A of attention/query is I32\[3, 16\]"),
        (lambda t: t.update({name.replace("layers.1", "layers.2"): np.zeros((3, 16), np.float32)}), "has not: 2"),
        (lambda t: t.update({name.replace("q_proj", "v_proj"): np.zeros((3, 16), np.float32)}), "attention/value"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 16), np.float32)}), "lm_head"),
    ):
        safetensors.numpy.save_file(original, folder / "adapter_model.safetensors")
        tensors(folder, change)
        with pytest.raises(UserError, match=message):
            peft.read(folder, CONFIG, found)


def test_pickles_and_missing_weights(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        peft.read_config(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="missing"):
        peft.read_config(folder)


def test_writing_checks_what_it_is_given(folder, tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        peft.write(tmp_path / "x", CONFIG, LORA, {**adapter(), "blocks/mlp/up/lora_a": jnp.ones((2, 16, 3))}, base="")
    with pytest.raises(UserError, match="not an empty directory"):
        peft.write(folder, CONFIG, LORA, adapter(), base="")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
