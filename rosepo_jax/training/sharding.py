"""Which mesh axis splits which parameter dimension: one table of rules, unmatched parameters are an error.

Mesh axes: `replica` copies everything, `fsdp` splits batches and parameters, `tensor` splits widths inside a layer.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rosepo_jax.errors import UserError

AXES = ("replica", "fsdp", "tensor")

# `kernel_scale` of a quantised kernel lies like the kernel; a bias like the kernel's outputs.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding", PartitionSpec("tensor", "fsdp")),
    (r"head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"blocks/.*/(query|key|value|gate|up)/kernel(_scale)?", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/.*/(query|key|value|gate|up)/bias", PartitionSpec(None, "tensor")),
    (r"blocks/.*/(output|down)/kernel(_scale)?", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/.*/(output|down)/bias", PartitionSpec(None, "fsdp")),
    (r"blocks/.*/(query|key|value|gate|up)/lora_a", PartitionSpec(None, "fsdp", None)),
    (r"blocks/.*/(query|key|value|gate|up)/lora_b", PartitionSpec(None, None, "tensor")),
    (r"blocks/.*/(output|down)/lora_a", PartitionSpec(None, "tensor", None)),
    (r"blocks/.*/(output|down)/lora_b", PartitionSpec(None, None, "fsdp")),
    (r"(.*[/_])?norm/scale", PartitionSpec()),
)


def make_mesh(config: ConfigDict) -> Mesh:
    """The device mesh of `config` (replica, fsdp, tensor); one of them may be -1: all devices that are left."""
    devices = jax.device_count()
    if config.devices not in (0, devices):
        raise UserError(
            f"mesh.devices={config.devices}, but there are {devices} devices: some hosts or chips are missing"
        )
    return jax.make_mesh(_sizes(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def planned_mesh(config: ConfigDict, devices: int) -> Mesh:
    """The mesh of `config` on `devices` devices that need not be here: it has sizes and no devices."""
    return cast(Mesh, AbstractMesh(_sizes(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def _sizes(config: ConfigDict, devices: int) -> tuple[int, ...]:
    sizes = [config.replica, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: sizes {sizes} must be positive, and at most one -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh: replica x fsdp x tensor = {' x '.join(map(str, sizes))}, but there are {devices} devices"
        )
    return tuple(sizes)


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The rule for `path`; a dimension that its mesh axis does not divide stays whole."""
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            fits = (
                axis if axis and size % mesh.shape[axis] == 0 else None
                for size, axis in zip(shape, (*spec, *(None,) * len(shape)))
            )
            return NamedSharding(mesh, PartitionSpec(*fits))
    raise ValueError(f"no sharding rule for parameter {path!r} {shape}")


def shardings(mesh: Mesh, params: Mapping[str, Any]) -> dict[str, NamedSharding]:
    return {path: parameter_sharding(mesh, path, value.shape) for path, value in params.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over replica and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))


def ways(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def shares(mesh: Mesh) -> list[int]:
    """Which of the parts that rows are split in lie on devices of this process, in rising order."""
    of_device = np.arange(ways(mesh)).reshape(*mesh.devices.shape[:2], 1)
    here = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
    return sorted(set(np.broadcast_to(of_device, mesh.devices.shape)[here].tolist()))


def check_batch(mesh: Mesh, name: str, batch_size: int, accumulate: int = 1) -> None:
    unit = ways(mesh) * accumulate
    if batch_size % unit:
        raise UserError(f"{name}={batch_size} must be a multiple of {unit} (replica x fsdp x accumulate)")


def to_device(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from this host's rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), dict(batch))


def place(mesh: Mesh, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Copies parameters into their shards; never an alias of the input, so that donating one keeps the other."""
    return {
        path: jax.device_put(value, parameter_sharding(mesh, path, value.shape), may_alias=False)
        for path, value in params.items()
    }


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
