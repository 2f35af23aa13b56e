"""config.json in and out: what transformers means by a config is what we read, for every family."""

import json

import pytest
import transformers

from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf, families
from rosepo_jax.models.decoder import DecoderConfig

SHAPE = dict(vocab_size=97, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=36)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama_defaults": transformers.LlamaConfig(),
    "mistral": transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=7, head_dim=10),
    "mistral_full": transformers.MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=None),
    "mistral_defaults": transformers.MistralConfig(),
    "qwen2": transformers.Qwen2Config(**SHAPE, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2_window": transformers.Qwen2Config(
        **SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=3
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8, attention_bias=True),
    "qwen3_defaults": transformers.Qwen3Config(),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=17, sliding_window=5
    ),
    "gemma2_uncapped": transformers.Gemma2Config(
        **SHAPE, attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False
    ),
    "gemma2_defaults": transformers.Gemma2Config(),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"full_attention": GLOBAL, "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}},
    ),
    "gemma3_pattern": transformers.Gemma3TextConfig(**SHAPE, num_key_value_heads=2, sliding_window_pattern=2),
    "gemma3_defaults": transformers.Gemma3TextConfig(),
}  # fmt: skip


def read(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return families.read_config(folder / "config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_through_transformers(name, tmp_path):
    """Theirs to ours, written by us, read by transformers, saved again: the same decoder every time."""
    theirs = CONFIGS[name]
    theirs.save_pretrained(tmp_path)
    ours = families.read_config(tmp_path / "config.json")
    written = families.config_json(ours, "float32", {})
    assert read(tmp_path, written) == ours
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    again.save_pretrained(tmp_path)
    assert families.read_config(tmp_path / "config.json") == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_what_transformers_resolves(name, tmp_path):
    theirs = CONFIGS[name]
    theirs.save_pretrained(tmp_path)
    ours = families.read_config(tmp_path / "config.json")
    assert ours.family == theirs.model_type
    expected = {
        "vocabulary": theirs.vocab_size,
        "width": theirs.hidden_size,
        "layers": theirs.num_hidden_layers,
        "heads": theirs.num_attention_heads,
        "kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "mlp_width": theirs.intermediate_size,
        "norm_epsilon": theirs.rms_norm_eps,
        "tie_embeddings": theirs.tie_word_embeddings,
        "max_positions": theirs.max_position_embeddings,
        "attention_cap": getattr(theirs, "attn_logit_softcapping", None) or 0.0,
        "logit_cap": getattr(theirs, "final_logit_softcapping", None) or 0.0,
    }
    assert {key: getattr(ours, key) for key in expected} == expected
    types = getattr(theirs, "layer_types", None)
    if theirs.model_type == "mistral":
        types = ["sliding_attention" if theirs.sliding_window else "full_attention"] * theirs.num_hidden_layers
    slides = tuple(kind == "sliding_attention" for kind in types or ())
    assert ours.sliding == (slides if any(slides) else ())
    assert ours.window == (theirs.sliding_window if any(slides) else 0)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.local_rope_theta == rope.get("sliding_attention", {}).get("rope_theta")
    kind = rope.get("full_attention", rope)["rope_type"]
    assert dict(ours.rope_scaling or (("rope_type", "default"),))["rope_type"] == kind


def test_what_a_family_always_does():
    """The columns of the table, spelt out once more by hand."""
    gemma = {"activation": "gelu_tanh", "post_norms": True, "unit_offset": True, "scale_embeddings": True}
    plain = {"activation": "silu", "post_norms": False, "unit_offset": False, "scale_embeddings": False}
    qkv = ("attention/query", "attention/key", "attention/value")
    for family, expected in {
        "llama": plain | {"query_key_norm": False, "biases": ()},
        "mistral": plain | {"query_key_norm": False, "biases": ()},
        "qwen2": plain | {"query_key_norm": False, "biases": qkv},
        "qwen3": plain | {"query_key_norm": True, "biases": ()},
        "gemma2": gemma | {"query_key_norm": False, "biases": ()},
        "gemma3_text": gemma | {"query_key_norm": True, "biases": ()},
    }.items():
        assert families.FAMILIES.keys() >= {family}
        ours = decoder_of({"model_type": family})
        assert {key: getattr(ours, key) for key in expected} == expected, family


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def decoder_of(raw) -> DecoderConfig:
    import pathlib

    return read(pathlib.Path("."), raw)


def test_spelling_of_the_hub_before_transformers_5(tmp_path):
    """Gemma 3 on the hub: an image-and-text model whose text part names only what differs from the defaults."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    ours = read(tmp_path, raw | {"vision_config": {"hidden_size": 1152}, "mm_tokens_per_image": 256})
    assert ours.rope_theta == 1e6 and ours.local_rope_theta == 1e4 and ours.rope_scaling is not None
    assert ours.sliding == tuple((layer + 1) % 6 != 0 for layer in range(34)) and ours.window == 1024
    assert (ours.heads, ours.kv_heads, ours.head_dim, ours.vocabulary) == (8, 4, 256, 262208)
    assert ours.query_scale == 256**-0.5


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "phi3"}, "model_type 'phi3'.*llama.*gemma3_text"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"]}, "SequenceClassification"),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32, "sliding_window": 4},
            "layer_types must be",
        ),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "sliding"),
        ({"model_type": "mistral", "residual_multiplier": 0.2}, "residual_multiplier = 0.2 is not known"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "activation 'gelu'"),
    ],
)
def test_what_is_not_supported_is_named(raw, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, raw)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_harmless_fields_are_passed_over(tmp_path):
    raw = {"model_type": "llama", "use_cache": True, "transformers_version": "4.40.0", "new_flag": False, "extra": None}
    assert read(tmp_path, raw) == read(tmp_path, {"model_type": "llama"})


def test_smollm_as_the_hub_has_it(tmp_path):
    extra = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {}}}
    assert read(tmp_path, {"model_type": "llama"} | extra) == read(tmp_path, {"model_type": "llama"})


def test_names_of_an_image_and_text_model():
    names = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight": None,
        "model.multi_modal_projector.mm_input_projection_weight": None,
    }
    assert {name: checkpoints_hf.text_model(name) for name in names} == names
