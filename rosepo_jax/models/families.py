"""Model families by the `model_type` of a Hugging Face config.json: what each one is, in and out.

A field that config.json leaves out has the default that transformers gives it (transformers writes only what differs).
A field that is not known here is refused unless it is empty: it might change the computation.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rosepo_jax import files, forms
from rosepo_jax.errors import UserError
from rosepo_jax.models.decoder import MOST_LAYERS, DecoderConfig

_QKV = ("attention/query", "attention/key", "attention/value")
_ATTENTION = (*_QKV, "attention/output")
_MLP = ("mlp/gate", "mlp/up", "mlp/down")


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table: its class in transformers, the fields of config.json it defaults, what it always does."""

    architecture: str
    defaults: Mapping[str, Any]
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of DecoderConfig
    slides: Callable[[int, Mapping], bool] = lambda layer, raw: False  # where layer_types is absent
    attention_bias: bool = False  # query, key and value always have one


def _late_layers(layer: int, raw: Mapping) -> bool:
    return bool(raw["use_sliding_window"]) and layer >= raw["max_window_layers"]


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
_GEMMA = {"post_norms": True, "unit_offset": True, "scale_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _LLAMA),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA
        | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"sliding_window": 4096},
        slides=lambda layer, raw: True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, slides=_late_layers, attention_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, {"query_key_norm": True}, slides=_late_layers),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA2, _GEMMA, slides=lambda layer, raw: layer % 2 == 0),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA3,
        _GEMMA | {"query_key_norm": True},
        slides=lambda layer, raw: (layer + 1) % raw["sliding_window_pattern"] != 0,
    ),
}

# Fields that must be absent, null or this: the decoder does not compute anything else.
_NEUTRAL: dict[str, Any] = {
    "attention_dropout": 0, "partial_rotary_factor": 1, "quantization_config": None, "pretraining_tp": 1,
    "use_bidirectional_attention": False, "is_encoder_decoder": False, "add_cross_attention": False,
}  # fmt: skip
_READ = {
    *_LLAMA, *_QWEN, *_GEMMA3, *_NEUTRAL, "model_type", "architectures", "num_key_value_heads", "head_dim",
    "attention_bias", "mlp_bias", "rope_scaling", "rope_parameters", "layer_types", "hidden_act", "hidden_activation",
}  # fmt: skip
_HARMLESS = {  # names, training and generation settings: nothing a forward pass reads
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "min_length",
    "model_name", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE: dict[str, tuple[str, ...]] = {  # scaling type -> its numbers
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """The decoder that a config.json describes. UserError names the architecture or field that is not supported."""
    path = pathlib.Path(path)
    raw = forms.check(files.read_json(path), dict, path, "give a config.json of transformers")
    if raw.get("model_type") == "gemma3" and isinstance(raw.get("text_config"), dict):
        raw = {"model_type": "gemma3_text", **raw["text_config"]}  # the language model of an image-and-text model
    family = str(raw.get("model_type", "llama"))
    if family not in FAMILIES or raw.get("architectures") not in (None, [FAMILIES[family].architecture]):
        known = ", ".join(f"{name} ({row.architecture})" for name, row in FAMILIES.items())
        raise UserError(
            f"{path}: model_type {raw.get('model_type')!r} with architectures {raw.get('architectures')!r} is not"
            f" supported; these are: {known}"
        )
    row = FAMILIES[family]
    for key, value in raw.items():
        if key not in _READ | _HARMLESS and not key.startswith("_") and value not in (None, False, [], {}):
            raise UserError(f"{path}: field {key} = {value!r} is not known; remove it if it does not change the model")
    for key, neutral in _NEUTRAL.items():
        if raw.get(key) is not None and raw[key] != neutral:
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported, only {json.dumps(neutral)}")
    given = raw
    raw = {**row.defaults, **raw}

    activation = str(raw.get("hidden_activation") or raw.get("hidden_act"))
    if activation not in _ACTIVATIONS:
        raise UserError(f"{path}: activation {activation!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    heads, width = (_number(path, raw, key, int) for key in ("num_attention_heads", "hidden_size"))
    layers = _number(path, raw, "num_hidden_layers", int)
    kv_heads = _number(path, raw, "num_key_value_heads", int, heads)
    head_dim = _number(path, raw, "head_dim", int, width // heads)
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise UserError(
            f"{path}: num_attention_heads {heads}, num_key_value_heads {kv_heads}, head_dim {head_dim} do not fit:"
            " the second must divide the first, the third be even"
        )
    biases = _ATTENTION if _flag(path, raw, "attention_bias") else _QKV if row.attention_bias else ()
    theta, scaling, local_theta = _rope(path, raw, given)
    sliding = _sliding(path, raw, row, layers)
    fields = dict(
        vocabulary=_number(path, raw, "vocab_size", int),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=_number(path, raw, "intermediate_size", int),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=_number(path, raw, "rms_norm_eps", float),
        tie_embeddings=_flag(path, raw, "tie_word_embeddings"),
        max_positions=_number(path, raw, "max_position_embeddings", int),
        family=family,
        activation=_ACTIVATIONS[activation],
        biases=biases + (_MLP if _flag(path, raw, "mlp_bias") else ()),
        query_scale=_number(path, raw, "query_pre_attn_scalar", float) ** -0.5 if family.startswith("gemma") else None,
        attention_cap=_number(path, raw, "attn_logit_softcapping", float, 0.0),
        logit_cap=_number(path, raw, "final_logit_softcapping", float, 0.0),
        window=_number(path, raw, "sliding_window", int) if any(sliding) else 0,
        sliding=sliding if any(sliding) else (),
        local_rope_theta=local_theta if any(sliding) else None,
        **row.always,
    )
    try:
        return DecoderConfig(**fields)
    except UserError as error:  # sizes beyond any model
        raise UserError(f"{path}: {error}") from None


def refuse_unknown(config: DecoderConfig) -> None:
    """UserError for a family, an activation or a scaling of positions that there is not."""
    scaling = dict(config.rope_scaling or ())
    kind = scaling.get("rope_type", "default")
    known = isinstance(kind, str) and kind in _ROPE
    if config.family not in FAMILIES or config.activation not in _ACTIVATIONS.values() or not known:
        raise UserError(f"family {config.family!r}, activation {config.activation!r} or {scaling} is not known")
    if any(type(scaling.get(key)) not in (int, float) for key in _ROPE[kind]):
        raise UserError(f"rope_scaling {scaling} lacks a number")


def architecture(name: str) -> DecoderConfig:
    """The decoder of a file in `architectures` by its name, or of a config.json by its path."""
    shipped = pathlib.Path(__file__).parent / "architectures" / f"{name}.json"
    if not shipped.is_file() and not pathlib.Path(name).is_file():
        known = ", ".join(sorted(path.stem for path in shipped.parent.glob("*.json")))
        raise UserError(f"model.architecture={name!r}: choose one of {known}, or give the path of a config.json")
    return read_config(shipped if shipped.is_file() else name)


def config_json(config: DecoderConfig, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5 both read."""
    c = config
    fields: dict[str, Any] = {
        "architectures": [FAMILIES[c.family].architecture],
        "model_type": c.family,
        "vocab_size": c.vocabulary,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling is None else dict(c.rope_scaling),
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": dtype,
        **{key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if c.family != "qwen2":  # its query, key and value always have one, its output never
        fields["attention_bias"] = "attention/output" in c.biases
    if c.family == "llama":
        fields["mlp_bias"] = _MLP[0] in c.biases
    if c.family == "mistral":
        fields["sliding_window"] = c.window or None
    if c.family.startswith("qwen"):
        first = c.sliding.index(True) if c.sliding else c.layers
        fields |= {"use_sliding_window": bool(c.sliding), "max_window_layers": first}
        fields |= {"sliding_window": c.window or None, "layer_types": _layer_types(c)}
    if c.family.startswith("gemma"):
        fields |= {
            "hidden_activation": "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation,
            "query_pre_attn_scalar": _whole((c.query_scale or c.head_dim**-0.5) ** -2),
            "attn_logit_softcapping": c.attention_cap or None,
            "final_logit_softcapping": c.logit_cap or None,
            "sliding_window": c.window or FAMILIES[c.family].defaults["sliding_window"],
            "layer_types": _layer_types(c),
        }
    else:
        fields["hidden_act"] = "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation
    if c.family == "gemma3_text":
        fields["rope_local_base_freq"] = c.local_rope_theta or FAMILIES[c.family].defaults["rope_local_base_freq"]
    return fields


def _layer_types(config: DecoderConfig) -> list[str]:
    flags = config.sliding or (False,) * config.layers
    return ["sliding_attention" if slides else "full_attention" for slides in flags]


def _whole(value: float) -> float | int:
    """A number whose fourth power of a root has lost its last bits."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _number(path: pathlib.Path, raw: Mapping, key: str, kind: type, default: Any = None) -> Any:
    value: Any = default if raw.get(key) is None else raw[key]
    if value is None:
        raise UserError(f"{path}: {key} is missing")
    if forms.misfit(value, kind) or not (value > 0 or raw.get(key) is None):
        raise UserError(f"{path}: {key} = {value!r} is not a positive {'integer' if kind is int else 'number'}")
    return kind(value)


def _flag(path: pathlib.Path, raw: Mapping, key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} = {value!r} is not true or false")
    return value


def _sliding(path: pathlib.Path, raw: Mapping, row: Family, layers: int) -> tuple[bool, ...]:
    """Which layers see a window only."""
    if layers > MOST_LAYERS:
        raise UserError(f"{path}: num_hidden_layers = {layers}: no model has more than {MOST_LAYERS:,}")
    if raw.get("sliding_window") is None:
        return (False,) * layers
    types = raw.get("layer_types")
    if types is None:
        for key in ("max_window_layers", "sliding_window_pattern"):
            if key in raw and key in row.defaults and not (key == "max_window_layers" and raw[key] == 0):
                _number(path, raw, key, int)
        return tuple(row.slides(layer, raw) for layer in range(layers))
    if forms.misfit(types, [str, layers]) or set(types) - {"sliding_attention", "full_attention"}:
        raise UserError(f"{path}: layer_types must be {layers} times sliding_attention or full_attention")
    return tuple(kind == "sliding_attention" for kind in types)


def _rope(path: pathlib.Path, raw: Mapping, given: Mapping):
    """(base, scaling, base of sliding layers or None): from `rope_parameters` (transformers 5, where families with two
    bases nest them by layer type), or from `rope_theta`, `rope_local_base_freq` and `rope_scaling` (before).
    """
    rope = given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is not a JSON object")
    local_theta = _number(path, raw, "rope_local_base_freq", float) if "rope_local_base_freq" in raw else None
    if "full_attention" in rope or "sliding_attention" in rope:
        local = rope.get("sliding_attention") or {}
        if not isinstance(local, dict):
            raise UserError(f"{path}: rope_parameters.sliding_attention is not a JSON object")
        if local.get("rope_type", "default") != "default":
            raise UserError(f"{path}: rope type {local['rope_type']!r} in sliding layers is not supported")
        local_theta = _number(path, local, "rope_theta", float, local_theta)
        rope = rope.get("full_attention") or {}
        if not isinstance(rope, dict):
            raise UserError(f"{path}: rope_parameters.full_attention is not a JSON object")
    scaling = rope or given.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: rope_scaling is not a JSON object")
    theta = _number(path, rope, "rope_theta", float, _number(path, raw, "rope_theta", float))
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in _ROPE:
        raise UserError(f"{path}: rope type {kind!r} is not supported, only {', '.join(_ROPE)}")
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{path}: partial_rotary_factor = {scaling['partial_rotary_factor']!r} is not supported, only 1"
        )
    if kind == "default":
        return theta, None, local_theta
    numbers = {key: _number(path, scaling, key, int if key.startswith("original") else float) for key in _ROPE[kind]}
    return theta, tuple(sorted({"rope_type": kind, **numbers}.items())), local_theta
