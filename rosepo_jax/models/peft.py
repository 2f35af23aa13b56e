"""PEFT adapter directories in and out: adapter_config.json and adapter_model.safetensors.

`lora_A` is [rank, in] there and `lora_a` [in, rank] here, `lora_B` [out, rank] there and `lora_b` [rank, out] here.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Sharding

from rosepo_jax import files, forms
from rosepo_jax.errors import UserError
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models.checkpoints_hf import MODULES, Tensor, few
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.models.lora import LoRAConfig, is_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = {name: path for path, name in MODULES.items()}
_NAME = re.compile(r"model\.layers\.([0-9]{1,6})\.(.+)\.lora_([AB])\.weight")
# Everything else in adapter_config.json must be absent or empty: it would change what the adapter computes.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "init_lora_weights"}
_HARMLESS = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping",
    "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
_FORM = {
    "base_model_name_or_path?": (None, str), "revision?": (None, str), "r?": int, "lora_alpha?": float,
    "lora_dropout?": (None, float), "use_rslora?": (None, bool),
}  # fmt: skip
_AGAIN = "save the adapter again with PEFT"


def is_directory(directory: str | os.PathLike) -> bool:
    return (pathlib.Path(directory) / CONFIG).is_file()


def base_name(directory: str | os.PathLike) -> tuple[str, str]:
    """The base model that the adapter was trained on (a directory or hub id; "" = not said), and its revision."""
    path = pathlib.Path(directory) / CONFIG
    raw = forms.check(files.read_json(path), _FORM, path, _AGAIN)
    return raw.get("base_model_name_or_path") or "", raw.get("revision") or ""


def read_config(directory: str | os.PathLike) -> LoRAConfig:
    """Rank, alpha, dropout and scale from adapter_config.json; the targets from the tensors that are there."""
    path = pathlib.Path(directory) / CONFIG
    raw = forms.check(files.read_json(path), _FORM, path, _AGAIN)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type must be LORA")
    for key, value in raw.items():
        if key not in _READ | _HARMLESS and value not in (None, False, [], {}):
            raise UserError(f"{path}: {key} = {value!r} is not supported; only plain LoRA is")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias = {raw['bias']!r} is not supported, only none")
    if raw.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{path}: init_lora_weights = {raw['init_lora_weights']!r} changes the base model; "
            "convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if rank is None or rank < 1 or alpha is None:
        raise UserError(f"{path}: r and lora_alpha must be a positive integer and a number")
    modules = {_OURS[module] for _, module, _ in _tensors(pathlib.Path(directory))}
    targets = "|".join(sorted(modules))
    return LoRAConfig(rank, alpha, targets, raw.get("lora_dropout") or 0.0, bool(raw.get("use_rslora")))


def read(
    directory: str | os.PathLike, config: DecoderConfig, lora: LoRAConfig, layout: Mapping[str, Sharding] | None = None
) -> dict[str, jax.Array]:
    """The adapter's parameters by path, float32; every tensor is accounted for.

    Errors: UserError that names missing, unknown or misshapen tensors, or weights in a pickle format.
    """
    directory = pathlib.Path(directory)
    tensors = _tensors(directory)
    expected = {path: value.shape for path, value in _adapter_shapes(config, lora).items()}
    found = {f"blocks/{_OURS[module]}/lora_{half.lower()}" for _, module, half in tensors}
    if found != expected.keys():
        raise UserError(f"{directory}: tensors of {few(found ^ expected.keys())} are missing or belong to no target")
    params = {}
    for path, shape in expected.items():
        module, half = path.removeprefix("blocks/").rsplit("/lora_", 1)
        parts = [tensors.pop((layer, MODULES[module], half.upper()), None) for layer in range(config.layers)]
        for layer, tensor in enumerate(parts):
            if tensor is None:
                raise UserError(f"{directory}: {module} has no adapter in layer {layer}; all layers need one")
            if tensor.shape != shape[:0:-1] or tensor.dtype not in checkpoints_hf.DTYPES:
                raise UserError(
                    f"{directory}: lora_{half.upper()} of {module} is {tensor.dtype}{list(tensor.shape)}, expected "
                    f"floating-point numbers {list(shape[:0:-1])}"
                )
        whole = (slice(None), slice(None))
        stack = np.stack([tensor.load(whole, True, np.dtype(np.float32)) for tensor in parts if tensor])
        params[path] = jax.device_put(stack, layout[path] if layout else None)
    if tensors:
        layers = few({str(layer) for layer, *_ in tensors})
        raise UserError(f"{directory}: adapters of layers that the model has not: {layers}")
    return params


def write(
    directory: str | os.PathLike,
    config: DecoderConfig,
    lora: LoRAConfig,
    adapter: Mapping[str, Any],
    *,
    base: str,
    revision: str = "",
    readme: str = "",
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads on top of `base`: all of it, or nothing.

    Errors: UserError when `directory` exists and is not empty; ValueError when the parameters are not the adapter's.
    """
    expected = {path: value.shape for path, value in _adapter_shapes(config, lora).items()}
    if {path: tuple(value.shape) for path, value in adapter.items()} != expected:
        raise ValueError("parameters do not fit the adapter's configuration")
    tensors, modules = {}, set()
    for path, value in adapter.items():
        module, half = path.removeprefix("blocks/").rsplit("/lora_", 1)
        modules.add(MODULES[module].rpartition(".")[2])
        for layer, part in enumerate(np.asarray(value, np.float32)):
            name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_{half.upper()}.weight"
            tensors[name] = np.ascontiguousarray(part.T)

    def fill(temporary: pathlib.Path) -> None:
        safetensors.numpy.save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        settings = {
            "base_model_name_or_path": base or None,
            "revision": revision or None,
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": lora.rank,
            "lora_alpha": round(lora.alpha) if lora.alpha == round(lora.alpha) else lora.alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        }
        files.write_json(temporary / CONFIG, settings)
        if readme:
            files.write_text(temporary / "README.md", readme)

    checkpoints_hf.new_directory(directory, fill)


def _adapter_shapes(config: DecoderConfig, lora: LoRAConfig) -> dict[str, jax.ShapeDtypeStruct]:
    described = jax.eval_shape(LanguageModel(config, lora).init, jax.random.key(0))
    return {path: value for path, value in described.items() if is_adapter(path)}


def _tensors(directory: pathlib.Path) -> dict[tuple[int, str, str], Tensor]:
    """Tensors by (layer, module, A or B)."""
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        why = "weights in a pickle format are refused, since reading them runs code" if pickled.is_file() else "missing"
        raise UserError(f"{path}: {why}; save the adapter with save_pretrained(DIRECTORY, safe_serialization=True)")
    found = {}
    for name, tensor in checkpoints_hf.headers(path).items():
        match = _NAME.fullmatch(checkpoints_hf.text_model(name.removeprefix("base_model.model.")) or "")
        if match is None or match[2] not in _OURS:
            raise UserError(f"{path}: tensor {name} belongs to no linear map of the model's blocks")
        found[int(match[1]), match[2], match[3]] = tensor
    return found
