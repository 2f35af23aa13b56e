"""Compiled programs that outlive the process: the next run of the same shapes starts at once."""

import os
import pathlib
import platform
import warnings

import jax
from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.errors import UserError


def keep(config: ConfigDict) -> None:
    """Keeps compiled programs in the folder `log.compilation_cache` and takes them from there. With "auto", what
    JAX_COMPILATION_CACHE_DIR says comes first.

    Programs for CPUs run only where the instructions are that they were compiled for, so machines have folders of their
    own below it. What cannot be read there, such as a program that was being written as a run was killed, is compiled.

    Errors: UserError when the folder cannot be made; with "auto" there is none then.
    """
    folder = config.log.compilation_cache
    automatic = folder == "auto"
    if not folder or (automatic and (jax.process_count() > 1 or jax.config.values["jax_compilation_cache_dir"])):
        return
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rosepo_jax" if automatic else folder
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    try:
        path = pathlib.Path(cache).expanduser() / files.hash_json([platform.machine(), flags])
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if automatic:
            return
        raise UserError(f"log.compilation_cache={folder!r}: cannot be made ({error})") from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
