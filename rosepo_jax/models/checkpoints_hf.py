"""Hugging Face directories in and out: config.json and safetensors, one file or shards with an index.

Kernels are [in, out] here and [out, in] there; the layers are stacked on axis 0 here and separate tensors there.
Nothing else differs: both rotate the pairs (i, i + E/2) of a head, so that query and key need no permutation.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.models import families, quantize
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel

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
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_CHUNK = 8 << 20  # bytes of a file that are held at a time
_LAYER = {  # module below blocks/ -> name below model.layers.N.
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
MODULES = {path: name for path, name in _LAYER.items() if "norm" not in path}  # the linear maps
_SANDWICH = {  # the same name means another norm where norms also stand behind attention and MLP
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_TOP = {"embedding": "model.embed_tokens.weight", "norm/scale": "model.norm.weight", "head/kernel": "lm_head.weight"}


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    described = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    return {path: value.shape for path, value in described.items()}


def read_config(directory: str | os.PathLike) -> DecoderConfig:
    """The decoder that the directory's config.json describes (see `families.read_config`)."""
    directory = pathlib.Path(directory)
    if directory.suffix in _PICKLED:
        raise _pickled(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a local Hugging Face directory")
    return families.read_config(directory / "config.json")


def read(
    directory: str | os.PathLike,
    config: DecoderConfig,
    param_dtype: str = "float32",
    layout: Mapping[str, Sharding] | None = None,
    quantized: str = "none",
) -> dict[str, jax.Array]:
    """All parameters of a directory by path, cast to `param_dtype`; every tensor is accounted for.

    Each is read by byte range straight into its shards, one tensor of the files at a time: the host never holds more
    than the largest part of one tensor beside the shards. `layout` gives the sharding of each path (default: the first
    device). `quantized` keeps the kernels of the blocks in that format of `quantize.py`.

    Errors: UserError that names missing, unknown or misshapen tensors, damaged files, or weights in a pickle format.
    """
    directory = pathlib.Path(directory)
    tensors = _account(directory, config)
    here = SingleDeviceSharding(jax.devices()[0])
    dtype = jnp.dtype(param_dtype)
    params: dict[str, jax.Array] = {}
    for path, names, shape in names_and_shapes(config):
        sharding = layout[path] if layout else here
        flip = path.endswith("/kernel")
        if not path.startswith("blocks/"):
            params[path] = _place(tensors[names[0]], shape, sharding, flip, dtype)
            continue
        for layer, name in enumerate(names):
            value = _place(tensors[name], shape, _without_layers(sharding), flip, dtype)
            if flip and quantized != "none":
                kept = dict(zip((path, f"{path}_scale"), _quantize(quantized)(value)))
            else:
                kept = {path: value}
            for where, part in kept.items():
                if layer == 0:
                    target = layout[where] if layout else here
                    params[where] = jnp.zeros((config.layers, *part.shape), part.dtype, device=target)
                params[where] = _put_layer(params[where].sharding)(params[where], part, layer)
    return params


def write(
    directory: str | os.PathLike,
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer_directory: str | os.PathLike | None,
    dtype: str = "float32",
    *,
    readme: str = "",
    eos: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that `transformers` loads as the family's causal language model: all of it, or nothing.

    Adapters must be merged before. The generation settings are neutral: greedy, with the tokenizer's own ids; `eos` is
    the token that ends a response where that is another one (the end of a chat turn).
    Errors: UserError when `directory` exists and is not empty; ValueError when the parameters are not the model's.
    """
    given, target = {path: tuple(value.shape) for path, value in params.items()}, shapes(config)
    if given != target:
        differ = {path for path in given.keys() | target.keys() if given.get(path) != target.get(path)}
        raise ValueError(f"parameters do not fit the configuration: {few(differ)}")

    def fill(temporary: pathlib.Path) -> None:
        ids: dict[str, Any] = {}
        if tokenizer_directory is not None:
            for name in TOKENIZER_FILES:
                if (pathlib.Path(tokenizer_directory) / name).is_file():
                    shutil.copyfile(pathlib.Path(tokenizer_directory) / name, temporary / name)
            ids = _special_ids(temporary)
        _write_weights(temporary, config, params, jnp.dtype(dtype), shard_bytes)
        files.write_json(temporary / "config.json", families.config_json(config, str(jnp.dtype(dtype)), ids))
        if eos is not None and eos != ids.get("eos_token_id"):
            ids["eos_token_id"] = [eos, *([ids["eos_token_id"]] if "eos_token_id" in ids else [])]
        files.write_json(temporary / "generation_config.json", {"do_sample": False, **ids})
        if readme:
            files.write_text(temporary / "README.md", readme)

    new_directory(directory, fill)


def new_directory(directory: str | os.PathLike, fill) -> None:
    """Makes a directory by `fill(temporary directory)`: all of it, or nothing."""
    directory = pathlib.Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; remove it or choose another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # a temporary directory is private, its files too
        for path in temporary.iterdir():
            path.chmod(0o644)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def names_and_shapes(config: DecoderConfig) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """(our path, its Hugging Face names, the shape of one of these in our layout) of every parameter."""
    modules = _LAYER | (_SANDWICH if config.post_norms else {})
    result = []
    for path, shape in shapes(config).items():
        if path.startswith("blocks/"):
            module, _, kind = path.removeprefix("blocks/").rpartition("/")
            suffix = f"{modules[module]}.{'bias' if kind == 'bias' else 'weight'}"
            result.append((path, [f"model.layers.{layer}.{suffix}" for layer in range(config.layers)], shape[1:]))
        else:
            result.append((path, [_TOP[path]], shape))
    return result


def few(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


# ---- Reading --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file."""

    file: pathlib.Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def load(self, index: tuple[slice, ...], flip: bool, dtype: np.dtype) -> np.ndarray:
        """The part `index` of the tensor (of its transpose where `flip`), read a few MiB at a time."""
        stored = np.dtype(DTYPES[self.dtype])
        ranges = [range(*part.indices(size)) for part, size in zip(index[::-1] if flip else index, self.shape)]
        shape = [len(part) for part in ranges]
        out = _aligned(tuple(shape[::-1] if flip else shape), dtype)
        view, rows = (out.T if flip else out), ranges[0]
        columns = tuple(slice(part.start, part.stop) for part in ranges[1:])
        row_bytes = math.prod(self.shape[1:]) * stored.itemsize
        step = max(1, _CHUNK // row_bytes)
        with open(self.file, "rb", buffering=0) as file:
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                file.seek(self.offset + start * row_bytes)
                block = np.fromfile(file, stored, (stop - start) * row_bytes // stored.itemsize)
                if block.nbytes != (stop - start) * row_bytes:
                    raise UserError(f"{self.file}: damaged: it ends too early; fetch it again")
                block = block.reshape(stop - start, *self.shape[1:])
                view[start - rows.start : stop - rows.start] = block[(slice(None), *columns)]
        return out


def headers(file: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; the library checks sizes, offsets and overlaps before anything is read."""
    try:
        with files.open_file(file) as stream:
            with safetensors.safe_open(file, framework="np") as handle:
                handle.keys()
            size = int.from_bytes(stream.read(8), "little")
            raw = json.loads(stream.read(size), object_pairs_hook=_once)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None
    return {
        name: Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in raw.items()
        if name != "__metadata__"
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands twice the library may have checked one entry, and Python would take the other."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _account(directory: pathlib.Path, config: DecoderConfig) -> dict[str, Tensor]:
    """The tensors of the model by name, each of them present once, with its shape and a float dtype; no others."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        for stored, tensor in headers(file).items():
            name = text_model(stored) if config.family == "gemma3_text" else stored
            if name is None or name.endswith("rotary_emb.inv_freq"):  # tables that follow from the configuration
                continue
            if name in tensors:
                raise UserError(f"{file}: tensor {name} is in two files; remove the stale one")
            tensors[name] = tensor
    expected = {
        name: shape[::-1] if path.endswith("/kernel") else shape
        for path, names, shape in names_and_shapes(config)
        for name in names
    }
    head = tensors.pop("lm_head.weight", None) if config.tie_embeddings else None
    for kind, differ in (("missing", expected.keys() - tensors), ("unknown", tensors.keys() - expected)):
        if differ:
            raise UserError(
                f"{directory}: {few(differ)}: {kind}; config.json and the weights must describe the same model"
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{directory}: {name} has shape {tensors[name].shape}, but config.json asks for {shape}")
        if tensors[name].dtype not in DTYPES:
            raise UserError(f"{directory}: {name} has dtype {tensors[name].dtype}; quantised weights are not supported")
    if head is not None and not _equal(head, tensors[_TOP["embedding"]]):
        raise UserError(
            f"{directory}: lm_head.weight differs from model.embed_tokens.weight, but config.json says"
            " tie_word_embeddings = true; set it to false"
        )
    return tensors


def text_model(name: str) -> str | None:
    """The name in the language model alone, for a tensor of an image-and-text model; None for the image part."""
    name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return None if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name) else name


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = max(1, _CHUNK // (4 * math.prod(a.shape[1:])))
    blocks = [(slice(start, start + rows), slice(None)) for start in range(0, a.shape[0], rows)]
    dtype = np.dtype(DTYPES[a.dtype])
    return all(np.array_equal(a.load(block, False, dtype), b.load(block, False, dtype)) for block in blocks)


def _place(tensor: Tensor, shape: tuple[int, ...], sharding: Sharding, flip: bool, dtype) -> jax.Array:
    """One tensor of a file in its shards; a process reads the parts of its own devices only."""
    return jax.make_array_from_callback(shape, sharding, lambda index: tensor.load(index, flip, dtype))  # type: ignore[arg-type]


def _without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


@functools.cache
def _put_layer(sharding: Sharding):
    def put(stack, value, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _quantize(how: str):
    return jax.jit(lambda kernel: quantize.quantize(kernel, how))


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array at an address that jax can take over on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


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


# ---- Writing --------------------------------------------------------------------------------------------------------


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
    for path, names, shape in names_and_shapes(config):
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
