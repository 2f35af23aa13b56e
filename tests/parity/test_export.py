"""Directories we write: every tensor bit for bit, and the same model in transformers."""

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from parity import checkpoints, weights
from rosepo_jax.models import checkpoints_hf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_all(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


ONE_EACH = [next(name for name in checkpoints.TABLE if name.startswith(family)) for family in checkpoints.FAMILIES]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in checkpoints.TABLE), *((name, "bfloat16") for name in ONE_EACH)]
)
def test_there_and_back_is_bitwise_and_the_same_model(tmp_path, tokenizer, name, dtype):
    model = checkpoints.make(tmp_path / "theirs", name, DTYPES[dtype])
    config = checkpoints_hf.read_config(tmp_path / "theirs")
    params = checkpoints_hf.read(tmp_path / "theirs", config, dtype)
    checkpoints_hf.write(tmp_path / "ours", config, params, tokenizer, dtype, shard_bytes=20_000)
    theirs, ours = load_all(tmp_path / "theirs"), load_all(tmp_path / "ours")
    if config.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    assert theirs.keys() == ours.keys() and len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].tobytes() == value.tobytes(), key

    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=DTYPES[dtype], attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(again) is type(model)
    text = weights.ids("text", 40, config.vocabulary)
    np.testing.assert_array_equal(checkpoints.logits(again.eval(), text), checkpoints.logits(model, text))
    assert again.generation_config.do_sample is False and again.generation_config.eos_token_id == 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").eos_token_id == 2
