import dataclasses
import hashlib
import importlib.util
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.decoding.greedy import greedy
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf as hf
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.training import sharding

CONVERTER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "convert_llama2c.py"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TIED = DecoderConfig(vocabulary=11, width=8, layers=3, heads=4, kv_heads=2, head_dim=6, mlp_width=10, max_positions=128)
UNTIED = dataclasses.replace(
    TIED, tie_embeddings=False, rope_scaling=tuple(sorted(LLAMA3.items())), rope_theta=5e5, norm_epsilon=1e-6
)


def random_tensors(config, dtype, seed=0):
    """A checkpoint as Hugging Face stores it, written out by hand: [out, in], one tensor a layer."""
    g, c = np.random.default_rng(seed), config
    shapes = {"model.embed_tokens": (c.vocabulary, c.width), "model.norm": (c.width,)}
    for layer in range(c.layers):
        shapes |= {
            f"model.layers.{layer}.input_layernorm": (c.width,),
            f"model.layers.{layer}.self_attn.q_proj": (c.heads * c.head_dim, c.width),
            f"model.layers.{layer}.self_attn.k_proj": (c.kv_heads * c.head_dim, c.width),
            f"model.layers.{layer}.self_attn.v_proj": (c.kv_heads * c.head_dim, c.width),
            f"model.layers.{layer}.self_attn.o_proj": (c.width, c.heads * c.head_dim),
            f"model.layers.{layer}.post_attention_layernorm": (c.width,),
            f"model.layers.{layer}.mlp.gate_proj": (c.mlp_width, c.width),
            f"model.layers.{layer}.mlp.up_proj": (c.mlp_width, c.width),
            f"model.layers.{layer}.mlp.down_proj": (c.width, c.mlp_width),
        }
    if not c.tie_embeddings:
        shapes["lm_head"] = (c.vocabulary, c.width)
    return {f"{name}.weight": g.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def make_directory(path, config, tensors, **changes):
    path.mkdir()
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    } | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(raw))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def load_all(directory):
    return {
        name: value
        for file in sorted(directory.glob("*.safetensors"))
        for name, value in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 1500])
def test_round_trip_is_bitwise(tmp_path, config, dtype, shard_bytes):
    tensors = random_tensors(config, np.dtype(dtype))
    source = make_directory(tmp_path / "in", config, tensors)
    assert hf.read_config(source) == config
    params = hf.read(source, config, dtype)
    hf.write(tmp_path / "out", config, params, None, dtype, shard_bytes=shard_bytes)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 1 if shard_bytes == hf.SHARD_BYTES else len(shards) > 3
    written = load_all(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype and written[name].tobytes() == value.tobytes(), name
    assert hf.read_config(tmp_path / "out") == config
    again = hf.read(tmp_path / "out", config, dtype)
    assert all(np.array_equal(again[path], params[path]) for path in params)


def test_shards_keep_to_the_size_and_the_index_is_complete(tmp_path):
    params = hf.read(make_directory(tmp_path / "in", TIED, random_tensors(TIED, "float32")), TIED)
    hf.write(tmp_path / "out", TIED, params, None, shard_bytes=2000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = safetensors.numpy.load_file(file)
        size = sum(value.nbytes for value in tensors.values())
        assert size <= 2000
        total += size
        assert {index["weight_map"][name] for name in tensors} == {file.name}
    assert index["metadata"]["total_size"] == total == sum(value.nbytes for value in params.values())
    assert index["weight_map"].keys() == random_tensors(TIED, "float32").keys()


def test_layout_is_the_decoders(tmp_path):
    """Paths and shapes are those of LanguageModel.init, kernels are transposed, layers are in order."""
    for config in (TIED, UNTIED):
        model = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
        assert {path: value.shape for path, value in model.items()} == hf.shapes(config)
    tensors = random_tensors(UNTIED, "float32")
    params = hf.read(make_directory(tmp_path / "in", UNTIED, tensors), UNTIED)
    np.testing.assert_array_equal(
        params["blocks/attention/key/kernel"][2], tensors["model.layers.2.self_attn.k_proj.weight"].T
    )
    np.testing.assert_array_equal(params["blocks/mlp/down/kernel"][1], tensors["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(
        params["blocks/mlp_norm/scale"][0], tensors["model.layers.0.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["head/kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])


def test_param_dtype_is_rounded_as_numpy_rounds(tmp_path):
    tensors = random_tensors(TIED, "float32")
    params = hf.read(make_directory(tmp_path / "in", TIED, tensors), TIED, "bfloat16")
    assert {value.dtype for value in params.values()} == {np.dtype(ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_transformers_reads_the_config_we_write_and_we_read_its(tmp_path, config):
    params = hf.read(make_directory(tmp_path / "in", config, random_tensors(config, "float32")), config)
    hf.write(tmp_path / "out", config, params, None, "bfloat16")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.model_type == "llama" and theirs.architectures == ["LlamaForCausalLM"]
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    for key, value in config.rope_scaling or (("rope_type", "default"),):
        assert rope[key] == value
    assert theirs.tie_word_embeddings == config.tie_embeddings and theirs.head_dim == config.head_dim
    theirs.save_pretrained(tmp_path / "theirs")  # in the spelling of transformers 5: rope_parameters
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert hf.read_config(tmp_path / "theirs") == config


def test_defaults_of_the_llama_type(tmp_path):
    absent = dict.fromkeys(
        ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"], ...
    )
    path = make_directory(tmp_path / "in", TIED, None, max_position_embeddings=..., **absent)
    assert hf.read_config(path) == DecoderConfig(
        vocabulary=11, width=8, layers=3, heads=4, kv_heads=4, head_dim=2, mlp_width=10,
        norm_epsilon=1e-6, tie_embeddings=False, max_positions=2048,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor = '2'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"vocab_size": 11.5}, "vocab_size = 11.5"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"rms_norm_eps": float("inf")}, "Infinity is not a finite number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path, changes, message):
    path = make_directory(tmp_path / "in", TIED, None, **changes)
    with pytest.raises(UserError, match=message) as error:
        hf.read_config(path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_linear_scaling_in_the_older_spelling(tmp_path):
    path = make_directory(tmp_path / "in", TIED, None, rope_scaling={"type": "linear", "factor": 2})
    assert hf.read_config(path).rope_scaling == (("factor", 2.0), ("rope_type", "linear"))


def test_missing_directory_and_files(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        hf.read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        hf.read_config(tmp_path)
    with pytest.raises(UserError, match="neither model"):
        hf.read(make_directory(tmp_path / "in", TIED, None), TIED)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_a_hint(tmp_path, name):
    path = make_directory(tmp_path / "in", TIED, None)
    (path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="safe_serialization"):
        hf.read(path, TIED)
    with pytest.raises(UserError, match="pickle"):
        hf.read_config(path / name)


MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 4, 2), sharding.AXES)


@pytest.mark.parametrize("quantized", ["none", "int8", "nf4"])
def test_reading_into_shards_changes_no_bit(tmp_path, monkeypatch, quantized):
    """On eight devices, a few rows of a file at a time: the same numbers, laid out as asked for."""
    config = dataclasses.replace(UNTIED, vocabulary=12, width=8, heads=4, kv_heads=2, mlp_width=16)
    path = make_directory(tmp_path / "in", config, random_tensors(config, "float32"))
    whole = hf.read(path, config, "bfloat16", quantized=quantized)
    shapes = jax.eval_shape(LanguageModel(config, param_dtype="bfloat16", quantize=quantized).init, jax.random.key(0))
    layout = sharding.shardings(MESH, shapes)
    monkeypatch.setattr(hf, "_CHUNK", 70)
    split = hf.read(path, config, "bfloat16", layout, quantized)
    assert split.keys() == whole.keys() == shapes.keys()
    for name, value in split.items():
        assert value.sharding == layout[name] and value.dtype == shapes[name].dtype, name
        np.testing.assert_array_equal(sharding.to_host(value), sharding.to_host(whole[name]), err_msg=name)
    assert any(not value.is_fully_replicated for value in split.values())


def test_a_process_reads_the_rows_of_its_own_shards_only(tmp_path, monkeypatch):
    path = make_directory(tmp_path / "in", TIED, random_tensors(TIED, "float32"))
    [tensor] = [t for name, t in hf.headers(path / "model.safetensors").items() if name == "model.embed_tokens.weight"]
    read = []
    original = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda file, dtype, count: read.append(count) or original(file, dtype, count))
    part = tensor.load((slice(3, 5), slice(2, 8)), False, np.dtype(np.float32))
    assert sum(read) == 2 * TIED.width  # two whole rows of the file
    expected = random_tensors(TIED, "float32")["model.embed_tokens.weight"][3:5, 2:8]
    np.testing.assert_array_equal(part, expected)


def test_the_language_model_of_an_image_and_text_checkpoint(tmp_path):
    """Gemma 3 as the hub has it: prefixes, vision tensors beside it, sandwich norms, 1 + scale."""
    config = dataclasses.replace(
        TIED, family="gemma3_text", activation="gelu_tanh", post_norms=True, unit_offset=True, scale_embeddings=True,
        query_key_norm=True, query_scale=6**-0.5, window=4, sliding=(True, False, True), local_rope_theta=1e4,
        rope_theta=1e6,
    )  # fmt: skip
    params = LanguageModel(config).init(jax.random.key(0))
    hf.write(tmp_path / "text", config, params, None)
    plain = load_all(tmp_path / "text")
    assert "model.layers.0.pre_feedforward_layernorm.weight" in plain
    assert "model.layers.2.self_attn.q_norm.weight" in plain and hf.read_config(tmp_path / "text") == config
    vision = {"vision_tower.vision_model.post_layernorm.weight": np.ones(3, np.float32)}
    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        renamed = {name.replace("model.", prefix, 1): value for name, value in plain.items()}
        safetensors.numpy.save_file(renamed | vision, folder / "model.safetensors")
        text = json.loads((tmp_path / "text" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
        assert hf.read_config(folder) == config
        found = hf.read(folder, config)
        assert all(np.array_equal(found[path], value) for path, value in params.items())


def test_the_end_of_a_chat_turn_ends_generation(tmp_path):
    params = hf.read(make_directory(tmp_path / "in", TIED, random_tensors(TIED, "float32")), TIED)
    hf.write(tmp_path / "out", TIED, params, None, eos=7)
    settings_json = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings_json == {"do_sample": False, "eos_token_id": [7]}


def test_every_tensor_is_accounted_for(tmp_path):
    good = random_tensors(TIED, "float32")
    key, value = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    cases = {
        "missing": ({k: v for k, v in good.items() if k != key}, f"{key}: missing"),
        "extra": (good | {"model.layers.3.mlp.up_proj.weight": good[key]}, r"model\.layers\.3.*: unknown"),
        "bias": (good | {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}, "q_proj.bias: unknown"),
        "shape": (good | {value: good[value].T.copy()}, rf"{value} has shape \(8, 12\).*\(12, 8\)"),
        "dtype": (good | {key: good[key].astype(np.int8)}, "I8"),
        "head": (good | {"lm_head.weight": good["model.embed_tokens.weight"] + 1}, "lm_head.weight differs"),
    }
    for name, (tensors, message) in cases.items():
        path = make_directory(tmp_path / name, TIED, tensors)
        with pytest.raises(UserError, match=message):
            hf.read(path, TIED)
    with pytest.raises(UserError, match=r"lm_head\.weight: missing"):
        hf.read(make_directory(tmp_path / "untied", TIED, good), dataclasses.replace(TIED, tie_embeddings=False))
    # An equal copy of the tied head and the rotary tables of older checkpoints are harmless.
    extra = {"lm_head.weight": good["model.embed_tokens.weight"]} | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for layer in range(3)
    }
    params = hf.read(make_directory(tmp_path / "harmless", TIED, good | extra), TIED)
    assert params.keys() == hf.shapes(TIED).keys()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_one_line(tmp_path_factory, data):
    """A flipped or cut file is refused, or, where only values changed, read with the right shapes."""
    path = make_directory(tmp_path_factory.mktemp("damaged") / "in", TIED, random_tensors(TIED, "float32"))
    content = bytearray((path / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    (path / "model.safetensors").write_bytes(content)
    try:
        params = hf.read(path, TIED)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert {name: value.shape for name, value in params.items()} == hf.shapes(TIED)


@pytest.mark.parametrize("size", [0, 7, 8])
def test_short_files(tmp_path, size):
    path = make_directory(tmp_path / "in", TIED, None)
    (path / "model.safetensors").write_bytes(b"\x10" + bytes(size)[1:] if size else b"")
    with pytest.raises(UserError, match="damaged"):
        hf.read(path, TIED)


def test_bad_index(tmp_path):
    params = hf.read(make_directory(tmp_path / "in", TIED, random_tensors(TIED, "float32")), TIED)
    hf.write(tmp_path / "out", TIED, params, None, shard_bytes=2000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = sorted(set(raw["weight_map"].values()))[0]
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {"x": "../in/model.safetensors"}}))
    with pytest.raises(UserError, match="not a safetensors file of this directory"):
        hf.read(tmp_path / "out", TIED)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(UserError, match="weight_map"):
        hf.read(tmp_path / "out", TIED)
    index.write_text(json.dumps(raw))
    (tmp_path / "out" / first).unlink()
    with pytest.raises(UserError, match=f"{first}: no such file"):
        hf.read(tmp_path / "out", TIED)


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    params = hf.read(make_directory(tmp_path / "in", TIED, random_tensors(TIED, "float32")), TIED)
    with pytest.raises(ValueError, match="lora_a"):
        hf.write(tmp_path / "out", TIED, params | {"blocks/mlp/up/lora_a": params["embedding"]}, None)
    with pytest.raises(ValueError, match="embedding"):
        hf.write(tmp_path / "out", TIED, params | {"embedding": params["norm/scale"]}, None)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(hf.families, "config_json", fail)
        with pytest.raises(OSError, match="disk full"):
            hf.write(tmp_path / "out", TIED, params, None)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(UserError, match="not an empty directory"):
        hf.write(tmp_path / "in", TIED, params, None)
    hf.write(tmp_path / "out", TIED, params, None, readme="# Card\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# Card\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
    }  # fmt: skip


# A real checkpoint, with the golden values of its reference implementation.

GREEDY = [
    *[403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338],
    *[401, 396, 267, 337, 410, 408, 419, 292, 411, 322, 265, 282, 295, 433, 426, 385],
]
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One"


@pytest.fixture(scope="module")
def stories(real_data, tmp_path_factory):
    spec = importlib.util.spec_from_file_location("convert_llama2c", CONVERTER)
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    source = real_data / "ckpt-stories260k"
    output = tmp_path_factory.mktemp("stories") / "hf"
    converter.main(str(source / "stories260K.bin"), str(source / "tok512.bin"), str(output))
    return output


@pytest.mark.real_data
def test_real_checkpoint_gives_the_golden_logits(stories):
    config = hf.read_config(stories)
    model = LanguageModel(config)
    params = hf.read(stories, config)
    assert sum(value.size for value in params.values()) == 260_032
    prompt, mask = np.array([[1]], np.int32), np.ones((1, 1), bool)
    logits, _ = model.prefill(params, prompt, mask)
    top = np.argsort(-logits[0])[:5]
    assert top.tolist() == [403, 385, 410, 317, 407]
    np.testing.assert_allclose(logits[0][top], [17.02352, 15.40621, 13.10826, 12.76917, 12.41809], atol=1e-4)
    hidden = model.hidden(params, prompt, mask, np.array([[GREEDY]], np.int32))
    logps = jax.nn.log_softmax(model.logits(params, hidden)[0, 0])
    assert logps.argmax(-1).tolist() == GREEDY
    np.testing.assert_allclose(logps[np.arange(32), GREEDY].sum(), -5.658158, atol=1e-4)


@pytest.mark.real_data
def test_real_checkpoint_round_trip(stories, tmp_path):
    config = hf.read_config(stories)
    hf.write(tmp_path / "out", config, hf.read(stories, config), stories)
    for file in stories.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.real_data
def test_real_tokenizer(stories):
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    for text, ids in {
        "Once upon a time": [1, 403, 407, 261, 378],
        "Toy Story": [1, 274, 414, 422, 301, 413, 304, 422],
        "Café": [1, 410, 457, 412, 431, 485],
        TEXT: [1, *GREEDY],
    }.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    settings_json = json.loads((stories / "generation_config.json").read_text())
    assert settings_json == {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.real_data
def test_real_checkpoint_tells_its_story(stories):
    """256 greedy tokens after BOS: the text that its makers published, byte for byte."""
    config = hf.read_config(stories)
    prompt, mask = np.array([[1]], np.int32), np.ones((1, 1), bool)
    tokens, logp = greedy(LanguageModel(config), hf.read(stories, config), prompt, mask, max_tokens=256, eos=2)
    text = transformers.AutoTokenizer.from_pretrained(stories).decode(np.array(tokens[0]))
    assert len(text.encode()) == 565 and text.startswith(TEXT)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "30b2ffb07967932a88bfdf5e23b517a6f4cfcf7231db9e537360d3c12a4e4d10"
    np.testing.assert_allclose(logp[0], -117.080637, atol=1e-3)
