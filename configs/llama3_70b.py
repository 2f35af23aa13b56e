"""Llama 3 70B Instruct (arXiv 2407.21783, hf.co/meta-llama/Meta-Llama-3-70B-Instruct) on LLaRA's MovieLens rows.

    rosepo doctor --config=configs/llama3_70b.py
    rosepo run --config=configs/llama3_70b.py --workdir=runs/llama3_70b --config.data.path=DIR

DIR is LLaRA's MovieLens folder. The model is fetched from its hub once its licence is accepted there. Adapters on a
bfloat16 base that the eight GPUs of a host hold together: 40 GiB of each H200. More hosts hold copies of it
(--config.mesh.devices=32: four hosts); TPUs split it over the whole slice (`:v5p-64`); a single GPU keeps it in 4 bits
(`:h100-1`, 57 GiB). `:full` trains all parameters: 52 GiB of each of 32 TPU v5p.
Words after a colon, separated by commas, change tuning, hardware and rows (`config.published_model`). Not run at this
size yet: there are no figures and no times, and the learning rates are reconstructed. `:smoke` runs a tiny new model
on the same rows and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    if not set(arg.split(",")) & {*config.MACHINES, "full", "smoke"}:
        arg = ",".join(filter(None, (arg, "h200-8")))
    c = config.published_model(
        arg, path="meta-llama/Meta-Llama-3-70B-Instruct", architecture="llama3-70b", data="movielens", full="v5p-64"
    )
    if c.mesh.devices == 1 and c.model.tuning == "lora":
        c.model.quantize = "nf4"
        c.sft.accumulate, c.align.accumulate = 2 * c.sft.accumulate, 2 * c.align.accumulate
    elif c.mesh.devices > 1:  # no device holds the base
        c.mesh.replica, c.mesh.fsdp = (-1, 8) if c.mesh.hardware.startswith("h") else (1, -1)
    return c


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
