"""What is installed, which devices are seen, what is missing and how to get it. Imports nothing heavy at its top."""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
from typing import TYPE_CHECKING

import rosepo_jax
from rosepo_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from rosepo_jax.models.decoder import LanguageModel

GIB = 2**30
OPTIONAL = {"torch": "parity", "trl": "parity", "peft": "parity", "pytest": "dev"}
INSTALL = "pip install -r requirements.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints versions and devices and, with --config or --workdir, the memory that training needs on each device. "
        "Exit status 2 when something that is needed is missing, or the memory does not suffice."
    )


def main(config: "ConfigDict | None", args: argparse.Namespace) -> int:
    print(f"rosepo_jax {rosepo_jax.__version__}, Python {platform.python_version()}, {platform.platform()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    disk = shutil.disk_usage(".").free / GIB
    print(f"host: {os.cpu_count()} CPU cores, {memory:.1f} GiB memory, {disk:.1f} GiB free on this disk")
    problems = [] if sys.version_info >= (3, 11) else ["Python 3.11 or later is needed"]
    try:
        needed = requirements()
    except ModuleNotFoundError as error:
        needed = [(str(error.name), None, "", False)]
    for name, installed, wanted, fine in needed:
        print(f"  {name:<22} {installed or 'missing':<12} {'' if fine else f'<- needs {wanted or name}'}".rstrip())
        if not fine:
            problems.append(f"{name} {installed or 'is missing'}: {INSTALL}")
    for name, extra in OPTIONAL.items():
        print(f"  {name:<22} {version(name) or 'absent':<12} (optional: pip install 'rosepo-jax[{extra}]')")
    if reason := known_bad():
        problems.append(reason)
    else:
        problems += _devices(args.distributed)
    if config is not None and not problems:
        problems += _memory(config)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print("doctor: all is well" if not problems else f"doctor: {len(problems)} to mend")
    return 2 if problems else 0


def version(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def known_bad(jax: str | None = None, flax: str | None = None) -> str | None:
    """Why this pair of versions (default: the installed one) cannot work; None when nothing is known against it."""
    jax, flax = jax or version("jax"), flax or version("flax")
    if jax and flax and _numbers(jax) >= (0, 11, 1) and _numbers(flax) <= (0, 12, 8):
        return (
            f"jax {jax} with flax {flax} fails at import (jax.experimental.hijax lost MutableHiType): "
            f"install flax 0.12.9 or later, or jax below 0.11: {INSTALL}"
        )
    return None


def requirements() -> list[tuple[str, str | None, str, bool]]:
    """(name, installed version or None, wanted versions, whether that is fine) of everything that is needed here."""
    from packaging.requirements import Requirement

    declared = importlib.metadata.requires("rosepo-jax") or [] if version("rosepo-jax") else _requirements_file()
    found = []
    for wanted in map(Requirement, declared):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            installed = version(wanted.name)
            fine = installed is not None and wanted.specifier.contains(installed, prereleases=True)
            found.append((wanted.name, installed, str(wanted.specifier), fine))
    return found


def _requirements_file() -> list[str]:
    """The requirements of a checkout that was not installed."""
    path = pathlib.Path(rosepo_jax.__file__).parent.parent / "requirements.txt"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def _numbers(text: str) -> tuple[int, ...]:
    """ "0.12.8" -> (0, 12, 8); what is not a number ends it."""
    numbers = []
    for part in text.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _devices(joined: bool) -> list[str]:
    """Prints the devices that JAX sees, of all processes where this one is `joined`; returns what is wrong."""
    try:
        import jax

        if joined:
            _processes()
        devices = jax.devices()
    except UserError as error:
        return [str(error)]
    except Exception as error:  # whatever is broken in the installation, the user should read it here
        return [f"jax finds no device: {type(error).__name__}: {str(error).splitlines()[0]}"]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    memory = f", {limits[0] / GIB:.1f} GiB each" if limits[0] else ""
    print(f"devices: {len(devices)} x {devices[0].device_kind} ({jax.default_backend()}{memory})")
    if jax.default_backend() == "cpu" and pathlib.Path("/dev/nvidiactl").exists():
        return ["an NVIDIA GPU is here but jax uses the CPU: pip install 'rosepo-jax[gpu]'"]
    if jax.default_backend() == "cpu" and any(pathlib.Path("/dev").glob("accel[0-9]*")):
        return ["a TPU is here but jax uses the CPU: pip install 'rosepo-jax[tpu]'"]
    return []


def _processes() -> None:
    """Joins the other processes, and prints which answered; their devices exchange a number, so that a network that
    lets hosts talk but not accelerators is found here."""
    import jax
    from jax.experimental import multihost_utils

    from rosepo_jax import distributed

    distributed.start()
    hosts = distributed.gather("doctor", 0, f"{platform.node()} ({len(jax.local_devices())} devices)")
    said = multihost_utils.process_allgather(jax.process_index())
    if list(map(int, said)) != list(range(jax.process_count())):
        raise UserError(f"devices of {jax.process_count()} processes exchanged wrong numbers: {said}")
    print(f"processes: {len(hosts)}, this is {jax.process_index()}: {', '.join(hosts)}")


_ROWS = {
    "frozen parameters": "base",
    "trained parameters": "trainable",
    "reference": "reference",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "kept activations": "kept",
    "a block, or logits": "transient",
    "or: validation": "scoring",
    "total": "total",
}


def _memory(config: "ConfigDict") -> list[str]:
    """Prints what the stages that train need on one device; returns what does not fit."""
    import jax

    from rosepo_jax.training import memory, sharding

    mesh = sharding.planned_mesh(config.mesh, config.mesh.devices or jax.device_count())
    lm = planned_model(config)
    plain = dataclasses.replace(lm, quantize="none")  # which packs several parameters into an element
    frozen, trained = (sum(x.size for x in part.values()) for part in memory.parameters(plain))
    found = memory.stages(config, lm, mesh)
    name, limit = _limit(config.mesh.hardware, mesh.size)
    print(
        f"memory of one of {mesh.size} devices ({' x '.join(f'{size} {axis}' for axis, size in mesh.shape.items())}), "
        f"GiB, an estimate: {lm.config.family}, {frozen:,} parameters frozen, {trained:,} trained"
    )
    print(f"  {'':<22}" + "".join(f"{stage:>10}" for stage in found))
    for title, field in _ROWS.items():
        print(f"  {title:<22}" + "".join(f"{getattr(needed, field) / GIB:>10.2f}" for needed in found.values()))
    usable = memory.USABLE * limit
    over = {stage: needed.total - usable for stage, needed in found.items() if needed.total > usable}
    print(f"  {name}: {limit / GIB:.1f} GiB, {usable / GIB:.1f} to count on: {'does not fit' if over else 'fits'}")
    if not over and config.mesh.hardware in memory.GPUS:
        print("  (JAX takes 75 % of a GPU unless told otherwise: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)")
    return [
        f"{stage} lacks {lack / GIB:.1f} GiB on each device: more devices, more micro-batches ({stage}.accumulate), "
        "evaluate.batch_size, model.tuning=lora or model.quantize"
        for stage, lack in over.items()
    ]


def _limit(hardware: str, devices: int) -> tuple[str, float]:
    """(name, bytes) of a device's memory; emulated devices share that of the host."""
    import jax

    from rosepo_jax.training import memory

    if hardware:
        if hardware not in memory.HARDWARE:
            raise UserError(f"mesh.hardware={hardware!r}: unknown{nearest(hardware, memory.HARDWARE)}")
        return hardware, memory.HARDWARE[hardware]
    here = jax.devices()[0]
    limit = (here.memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return here.device_kind, limit or host / devices


def planned_model(config: "ConfigDict") -> "LanguageModel":
    """The model that SFT will start from: as its folder says, else as model.architecture says, else the preset."""
    from rosepo_jax.models import families
    from rosepo_jax.models.decoder import LanguageModel
    from rosepo_jax.training import policy

    m = config.model
    folder = pathlib.Path(m.path or "-")
    if (folder / "config.json").is_file():
        architecture = families.read_config(folder / "config.json")
    elif m.path and not m.architecture:
        raise UserError(
            f"model.path={m.path!r} is not here; model.architecture says what it is: a name or a config.json"
        )
    else:
        architecture = policy.new_architecture(m, m.vocabulary)
    lora = policy.new_adapter(m)
    return LanguageModel(architecture, lora, m.dtype, m.param_dtype, m.remat, m.quantize, logits_chunk=m.logits_chunk)
