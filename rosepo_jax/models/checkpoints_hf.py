"""Hugging Face directories of llama type in and out: config.json and safetensors, one file or shards with an index.

Kernels are [in, out] here and [out, in] there; the layers are stacked on axis 0 here and separate tensors there.
Nothing else differs: both rotate the pairs (i, i + E/2) of a head, so that query and key need no permutation.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers

from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.models.decoder import DecoderConfig

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # unpickling runs code from the file
_FLOATS = {"F64", "F32", "F16", "BF16"}
_LAYER = {  # path below blocks/ -> name below model.layers.N.
    "attention_norm/scale": "input_layernorm",
    "attention/query/kernel": "self_attn.q_proj",
    "attention/key/kernel": "self_attn.k_proj",
    "attention/value/kernel": "self_attn.v_proj",
    "attention/output/kernel": "self_attn.o_proj",
    "mlp_norm/scale": "post_attention_layernorm",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/down/kernel": "mlp.down_proj",
}
_NEUTRAL: dict[str, Any] = {  # fields that must be absent, null or this: the decoder does not compute anything else
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
_ROPE: dict[str, tuple[str, ...]] = {  # scaling type -> its numbers
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    c = config
    query, key_value = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer = {
        "attention_norm/scale": (c.width,),
        "attention/query/kernel": (c.width, query),
        "attention/key/kernel": (c.width, key_value),
        "attention/value/kernel": (c.width, key_value),
        "attention/output/kernel": (query, c.width),
        "mlp_norm/scale": (c.width,),
        "mlp/gate/kernel": (c.width, c.mlp_width),
        "mlp/up/kernel": (c.width, c.mlp_width),
        "mlp/down/kernel": (c.mlp_width, c.width),
    }
    result: dict[str, tuple[int, ...]] = {"embedding": (c.vocabulary, c.width), "norm/scale": (c.width,)}
    result |= {f"blocks/{path}": (c.layers, *shape) for path, shape in layer.items()}
    return result if c.tie_embeddings else {**result, "head/kernel": (c.width, c.vocabulary)}


def read_config(directory: str | os.PathLike) -> DecoderConfig:
    """The decoder that config.json describes. UserError names the field that is missing or not supported.

    Rotary settings are taken from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).
    """
    directory = pathlib.Path(directory)
    if directory.suffix in _PICKLED:
        raise _pickled(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a local Hugging Face directory of llama type")
    path = directory / "config.json"
    raw = files.read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object")
    if raw.get("model_type", "llama") != "llama" or raw.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise UserError(
            f"{path}: model_type {raw.get('model_type')!r} with architectures {raw.get('architectures')!r} is not"
            " supported; use a model of type llama (LlamaForCausalLM)"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act = {raw['hidden_act']!r} is not supported, only silu")
    for key, neutral in _NEUTRAL.items():
        if raw.get(key) is not None and raw[key] != neutral:
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported, only {json.dumps(neutral)}")

    heads = _number(path, raw, "num_attention_heads", int)
    width = _number(path, raw, "hidden_size", int)
    kv_heads = _number(path, raw, "num_key_value_heads", int, heads)
    head_dim = _number(path, raw, "head_dim", int, width // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{path}: num_attention_heads {heads}, num_key_value_heads {kv_heads}, head_dim {head_dim} do not fit:"
            " the second must divide the first, the third be even"
        )
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_word_embeddings = {tied!r} is not true or false")
    theta, scaling = _rope(path, raw)
    return DecoderConfig(
        vocabulary=_number(path, raw, "vocab_size", int),
        width=width,
        layers=_number(path, raw, "num_hidden_layers", int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=_number(path, raw, "intermediate_size", int),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=_number(path, raw, "rms_norm_eps", float, 1e-6),
        tie_embeddings=tied,
        max_positions=_number(path, raw, "max_position_embeddings", int, 2048),
    )


def read(directory: str | os.PathLike, config: DecoderConfig, param_dtype: str = "float32") -> dict[str, np.ndarray]:
    """All parameters of a directory by path, cast to `param_dtype`; every tensor is accounted for.

    Errors: UserError that names missing, unknown or misshapen tensors, damaged files, or weights in a pickle format.
    """
    directory = pathlib.Path(directory)
    expected = {name: shape for _, names, shape in _tensors(config) for name in names}
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in _weight_files(directory):
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
            except safetensors.SafetensorError as error:
                raise UserError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                if name in tensors:
                    raise UserError(f"{file}: tensor {name} is in two files; remove the stale one")
                tensors[name] = handle
        known = {name for name in tensors if not _is_buffer(name)}
        if config.tie_embeddings:
            known.discard("lm_head.weight")
        for kind, differ in (("missing", expected.keys() - known), ("unknown", known - expected.keys())):
            if differ:
                raise UserError(
                    f"{directory}: {_few(differ)}: {kind}; config.json and the weights must describe the same model"
                )
        for name, shape in expected.items():
            view = tensors[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise UserError(
                    f"{directory}: {name} has shape {tuple(view.get_shape())}, but config.json asks for {shape}"
                )
            if view.get_dtype() not in _FLOATS:
                raise UserError(
                    f"{directory}: {name} has dtype {view.get_dtype()}; quantised weights are not supported"
                )
        if config.tie_embeddings and "lm_head.weight" in tensors:
            head = tensors["lm_head.weight"].get_tensor("lm_head.weight")
            embedding = tensors["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
            if not np.array_equal(head, embedding):
                raise UserError(
                    f"{directory}: lm_head.weight differs from model.embed_tokens.weight, but config.json says"
                    " tie_word_embeddings = true; set it to false"
                )
        params = {}
        target = shapes(config)
        for path, names, _ in _tensors(config):
            params[path] = np.empty(target[path], jnp.dtype(param_dtype))
            slots = params[path] if path.startswith("blocks/") else params[path][None]
            for slot, name in zip(slots, names):
                tensor = tensors[name].get_tensor(name)
                slot[...] = tensor.T if path.endswith("/kernel") else tensor
    return params


def write(
    directory: str | os.PathLike,
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer_directory: str | os.PathLike | None,
    dtype: str = "float32",
    *,
    readme: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that `transformers` loads as LlamaForCausalLM: all of it, or nothing.

    Adapters must be merged before. The generation settings are neutral: greedy, with the tokenizer's own ids.
    Errors: UserError when `directory` exists and is not empty; ValueError when the parameters are not the model's.
    """
    directory = pathlib.Path(directory)
    given, target = {path: tuple(value.shape) for path, value in params.items()}, shapes(config)
    if given != target:
        differ = {path for path in given.keys() | target.keys() if given.get(path) != target.get(path)}
        raise ValueError(f"parameters do not fit the configuration: {_few(differ)}")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; remove it or choose another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        ids = {}
        if tokenizer_directory is not None:
            for name in TOKENIZER_FILES:
                if (pathlib.Path(tokenizer_directory) / name).is_file():
                    shutil.copyfile(pathlib.Path(tokenizer_directory) / name, temporary / name)
            ids = _special_ids(temporary)
        _write_weights(temporary, config, params, jnp.dtype(dtype), shard_bytes)
        files.write_json(temporary / "config.json", _config_json(config, str(jnp.dtype(dtype)), ids))
        files.write_json(temporary / "generation_config.json", {"do_sample": False, **ids})
        if readme:
            files.write_text(temporary / "README.md", readme)
        temporary.chmod(0o755)  # a temporary directory is private, its files too
        for path in temporary.iterdir():
            path.chmod(0o644)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _tensors(config: DecoderConfig) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """(our path, its Hugging Face names, the shape of one of these) of every parameter."""
    result = []
    for path, shape in shapes(config).items():
        if path.startswith("blocks/"):
            name = _LAYER[path.removeprefix("blocks/")]
            names, shape = [f"model.layers.{layer}.{name}.weight" for layer in range(config.layers)], shape[1:]
        else:
            names = [{"embedding": "model.embed_tokens", "norm/scale": "model.norm"}.get(path, "lm_head") + ".weight"]
        result.append((path, names, shape[::-1] if path.endswith("/kernel") else shape))
    return result


def _is_buffer(name: str) -> bool:
    """Older checkpoints carry rotary tables, which follow from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


def _few(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def _pickled(path: pathlib.Path) -> UserError:
    return UserError(
        f"{path}: weights in a pickle format are refused, since reading them runs code; convert them where you trust"
        " them: model.save_pretrained(DIRECTORY, safe_serialization=True)"
    )


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / _INDEX
    if not index.is_file():
        if (directory / "model.safetensors").is_file():
            return [directory / "model.safetensors"]
        pickled = sorted(path for path in directory.glob("*") if path.suffix in _PICKLED)
        raise _pickled(pickled[0]) if pickled else UserError(f"{directory}: neither model.safetensors nor {_INDEX}")
    raw = files.read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map; fetch the file again")
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map names {name!r}, which is not a safetensors file of this directory")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: no such file, but {_INDEX} names it; fetch it again")
    return [directory / name for name in sorted(names)]


def _number(path: pathlib.Path, raw: Mapping, key: str, kind: type, default: Any = None) -> Any:
    value: Any = default if raw.get(key) is None else raw[key]
    if value is None:
        raise UserError(f"{path}: {key} is missing")
    right_type = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (right_type and 0 < value < math.inf):
        raise UserError(f"{path}: {key} = {value!r} is not a positive {'integer' if kind is int else 'number'}")
    return kind(value)


def _rope(path: pathlib.Path, raw: Mapping) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters or rope_scaling is not a JSON object")
    theta = _number(path, rope, "rope_theta", float, _number(path, raw, "rope_theta", float, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE:
        raise UserError(f"{path}: rope type {kind!r} is not supported, only {', '.join(_ROPE)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{path}: partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported, only 1")
    if kind == "default":
        return theta, None
    numbers = {key: _number(path, rope, key, int if key.startswith("original") else float) for key in _ROPE[kind]}
    return theta, tuple(sorted({"rope_type": kind, **numbers}.items()))


def _config_json(config: DecoderConfig, dtype: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ids.get("eos_token_id"),
        "pad_token_id": ids.get("pad_token_id"),
    }


def _special_ids(directory: pathlib.Path) -> dict[str, int]:
    """{"bos_token_id": …} of the special tokens that the tokenizer has."""
    if not (directory / "tokenizer.json").is_file() or not (directory / "tokenizer_config.json").is_file():
        return {}
    settings = files.read_json(directory / "tokenizer_config.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        number = None if token is None else tokenizer.token_to_id(token)
        if number is not None:
            ids[f"{key}_id"] = number
    return ids


@dataclasses.dataclass
class _Shard:
    items: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)  # (name, our path, layer)
    size: int = 0


def _write_weights(directory: pathlib.Path, config: DecoderConfig, params: Mapping, dtype, shard_bytes: int) -> None:
    shards = [_Shard()]
    for path, names, shape in _tensors(config):
        size = math.prod(shape) * dtype.itemsize
        for layer, name in enumerate(names):
            if shards[-1].items and shards[-1].size + size > shard_bytes:
                shards.append(_Shard())
            shards[-1].items.append((name, path, layer))
            shards[-1].size += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, path, layer in shard.items:
            value = np.asarray(params[path][layer] if path.startswith("blocks/") else params[path])
            tensors[name] = np.ascontiguousarray(value.T if path.endswith("/kernel") else value, dtype=dtype)
            weight_map[name] = file
        safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = {"total_size": sum(shard.size for shard in shards)}
        files.write_json(directory / _INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
