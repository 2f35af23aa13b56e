"""Host memory and speed of reading a Hugging Face directory into its shards.

python benchmarks/loading.py [--layers=4] [--repeats=3] [--record]

Writes random weights in the widths of Llama-3.2-1B (bfloat16, vocabulary 128,256, files of 500 MB) into a temporary
folder and reads them in a process of its own: as they are, cast to float32, quantised, and on four emulated devices.
On a CPU the shards lie in host memory too; what counts is the peak above them, in units of the largest tensor of the
files: at most 1.3.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import record

from rosepo_jax.__main__ import keep_freed_memory
from rosepo_jax.models import checkpoints_hf
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.training import sharding

AT_MOST = 1.3
WIDTHS = dict(vocabulary=128256, width=2048, heads=32, kv_heads=8, head_dim=64, mlp_width=8192, tie_embeddings=True)
VARIANTS = {  # name -> (parameter dtype, quantisation, devices)
    "bfloat16": ("bfloat16", "none", 1),
    "float32": ("float32", "none", 1),
    "int8": ("bfloat16", "int8", 1),
    "nf4": ("bfloat16", "nf4", 1),
    "bfloat16, 4 devices": ("bfloat16", "none", 4),
}


def make(folder: pathlib.Path, layers: int) -> None:
    """A directory with random weights of that many layers."""
    config = DecoderConfig(layers=layers, **WIDTHS)
    generator = np.random.default_rng(0)
    params = {
        path: generator.standard_normal(shape, np.float32).astype(jnp.bfloat16)
        for path, shape in checkpoints_hf.shapes(config).items()
    }
    checkpoints_hf.write(folder, config, params, None, "bfloat16", shard_bytes=500_000_000)


def status(name: str) -> int:
    """Bytes of a field of /proc/self/status (VmRSS, VmHWM)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def measure(folder: pathlib.Path, variant: str) -> dict[str, float | str]:
    """Reads the directory in this process."""
    dtype, quantized, devices = VARIANTS[variant]
    config = checkpoints_hf.read_config(folder)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(1, devices, 1), sharding.AXES)
    lm = LanguageModel(config, param_dtype=dtype, quantize=quantized)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    layout = sharding.shardings(mesh, shapes)
    jax.block_until_ready(jax.device_put(jnp.zeros(8), layout["norm/scale"]))
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    params = checkpoints_hf.read(folder, config, dtype, layout, quantized)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - started
    kept = sum(value.nbytes for value in params.values())
    largest = WIDTHS["vocabulary"] * WIDTHS["width"] * jnp.dtype(dtype).itemsize
    return {
        "variant": variant,
        "parameters GB": kept / 1e9,
        "seconds": seconds,
        "peak above them GB": (status("VmHWM") - before - kept) / 1e9,
        "in largest tensors": (status("VmHWM") - before - kept) / largest,
        "at most": AT_MOST,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        folder, variant = args.measure
        jax.config.update("jax_num_cpu_devices", VARIANTS[variant][2])
        keep_freed_memory()  # as the command line does
        print(json.dumps(measure(pathlib.Path(folder), variant)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        make(pathlib.Path(temporary) / "hf", args.layers)
        for variant in VARIANTS:
            for _ in range(args.repeats):
                command = [sys.executable, __file__, "--measure", f"{temporary}/hf", variant]
                found = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append(json.loads(found.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
    if args.record:
        record.append(f"python benchmarks/loading.py --layers={args.layers} --repeats={args.repeats}", rows)
    return int(any(row["in largest tensors"] > AT_MOST for row in rows))


if __name__ == "__main__":
    sys.exit(main())
