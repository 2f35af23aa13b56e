"""Devices that need not be here: how fast they are, and how they are named, described to the compiler and arranged.

A topology is one text:

    v5e:4x4  v5p:2x2x4  v6e:16x16    a TPU slice: chips along each axis of its torus
    2xv5e:8x16                       several slices of that shape, which the data-centre network joins
    h100:1x1x8  h200:1x4x8           slices x hosts x GPUs of a host
    cpu:8                            emulated devices of this host

Speeds are peaks of one device, bytes/s, as published:

    memory    its own memory
    link      one way, over all links at once: half of the "bidirectional" figure (ICI, NVLink)
    network   one way, its share of the network cards of its host (TPUs: between slices; GPUs: between hosts)

Sources: Cloud TPU documentation, system architecture of v5e (819 GB/s, ICI 400 GB/s, 2 x 100 Gb/s for 8 chips), v5p
(2765, 1200, 50 Gb/s a chip) and v6e (1638, 800, 4 x 200 Gb/s for 8 chips); NVIDIA data sheets of H100 SXM (3.35 TB/s,
NVLink 900 GB/s) and H200 SXM (4.8 TB/s, 900); DGX H100 and H200 user guides (a 400 Gb/s port for each GPU). FLOP/s are
in `flops.PEAKS`, the bytes of a device's memory in `memory.HARDWARE`.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from rosepo_jax.errors import UserError, nearest
from rosepo_jax.training import sharding
from rosepo_jax.training.hlo import Collective
from rosepo_jax.training.memory import HARDWARE


class Speed(NamedTuple):
    """Bytes/s of one device."""

    memory: float
    link: float
    network: float


SPEEDS = {
    "h100": Speed(3.35e12, 450e9, 50e9),
    "h200": Speed(4.8e12, 450e9, 50e9),
    "v5e": Speed(819e9, 200e9, 3.125e9),
    "v5p": Speed(2765e9, 600e9, 6.25e9),
    "v6e": Speed(1638e9, 400e9, 12.5e9),
}
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}  # as they call themselves
TPU_AXES = {"v5e": 2, "v5p": 3, "v6e": 2}

# Without a GPU nothing can be timed to choose between kernels, and Triton's default tiles fit not every product.
_WITHOUT_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_WITHOUT_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """What to compile for."""

    kind: str  # a name of SPEEDS, or cpu
    devices: Sequence[Any]
    options: Mapping[str, Any]  # of the compiler


def target(topology: str) -> Target:
    """The devices that `topology` names, in the notation above.

    Errors: UserError when the text is no topology, there is no such slice, or the compiler is not installed.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", topology)
    slices, kind, shape = found.groups() if found else ("", "", "")
    sizes = tuple(map(int, shape.split("x"))) if shape else ()
    axes = {**TPU_AXES, **dict.fromkeys(GPUS, 3), "cpu": 1}
    if found and kind not in axes:
        raise UserError(f"--topology={topology}: {kind} is unknown{nearest(kind, axes)} (known: {', '.join(axes)})")
    if not found or len(sizes) != axes[kind] or 0 in sizes or slices == "0" or (slices and kind not in TPU_AXES):
        raise UserError(
            f"--topology={topology}: write v5e:4x4 or v5p:2x2x4 (a TPU slice), 2xv5e:8x16 (two), h200:1x4x8 (slices x "
            "hosts x GPUs) or cpu:8"
        )
    if kind == "cpu":
        return Target(kind, _cpus(sizes[0]), {})
    if kind in TPU_AXES:
        _require("libtpu", "tpu")
        # libtpu would ask a metadata server for its machine, and be the only process with a TPU: there is none here.
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
        several = {"num_slices": int(slices)} if slices not in (None, "1") else {}
        described = _described(topology, topology_name=f"{kind}:{shape}", platform="tpu", **several)
        return Target(kind, described, {})
    _require("jax_plugins.xla_cuda13", "gpu")
    described = _described(topology, topology_name="", platform="cuda", topology=shape, target_config=_gpu(kind))
    return Target(kind, described, _WITHOUT_GPU)


def mesh(config: ConfigDict, devices: Sequence[Any]) -> Mesh:
    """The mesh of `config` on `devices`: neighbours of a torus stay neighbours, and `replica` alone leaves a slice.

    Errors: UserError where sizes do not multiply to the devices, or slices do not divide `replica`.
    """
    if config.devices not in (0, len(devices)):
        raise UserError(
            f"mesh.devices={config.devices}, but there are {len(devices)} devices: some hosts or chips are missing"
        )
    sizes = sharding.planned_mesh(config, len(devices)).axis_sizes
    slices = len({domain(device) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise UserError(f"mesh.replica={sizes[0]}: must be a multiple of the {slices} slices; fsdp stays inside one")
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inside = (sizes[0] // slices, *sizes[1:])
        placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(placed, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def domain(device: Any) -> int:
    """Which devices are joined by fast links: those of a TPU slice, the GPUs of a host."""
    return device.process_index if device.platform == "gpu" else getattr(device, "slice_index", None) or 0


def seconds(exchange: Collective, domain_N: np.ndarray, speed: Speed) -> float:
    """What a collective takes at least: each device sends and receives what a ring makes it.

    Formula:  factor (n - 1) / n bytes / link within a domain, n devices a group; factor 2 for an all-reduce, else 1.
              Where a group spans d domains with m of its devices each, also factor (d - 1) / d bytes / (m network):
              the cards of the m devices share the work. The slower of both counts. A permutation sends bytes once.
    """
    domains_GxN = domain_N[exchange.groups]
    n = exchange.groups.shape[1]
    d = max(len(set(group)) for group in domains_GxN.tolist())
    m = max(n // d, 1)
    if exchange.kind == "collective-permute":
        return exchange.times * exchange.bytes / (speed.link if d == 1 else speed.network)
    factor = exchange.times * exchange.bytes * (2 if exchange.kind == "all-reduce" else 1)
    return max(factor * (n - 1) / n / speed.link, factor * (d - 1) / d / (m * speed.network))


def _cpus(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # the devices are there already; then their number stays
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--topology=cpu:{count}: this process has {len(devices)} CPU devices")
    return devices[:count]


def _require(module: str, environment: str) -> None:
    try:
        missing = importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise UserError(
            f"{module} is not installed here: run `bash launch/compile_env.sh {environment}`, which makes an "
            "environment that compiles for such devices without having them"
        )


def _described(text: str, **description: Any) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(**description).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={text}: {str(error).splitlines()[0]}") from None


def _gpu(kind: str) -> str:
    """A Hopper GPU as XLA describes it to itself (a `GpuTargetConfigProto` in text form)."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(SPEEDS[kind].memory),
        "l2_cache_size": 50 << 20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": HARDWARE[kind],
        "shared_memory_per_block_optin": 232448,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 minor: 0 }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{GPUS[kind]}"'
    )
