"""Qwen3 4B (arXiv 2505.09388, hf.co/Qwen/Qwen3-4B) on PatchRec's Goodreads rows.

    rosepo doctor --config=configs/qwen3_4b.py
    rosepo run --config=configs/qwen3_4b.py --workdir=runs/qwen3_4b --config.data.path=DIR

DIR is PatchRec's Goodreads folder. The model is fetched from its hub. Adapters on a bfloat16 base: 20 GiB of one
H100. `:full` trains all parameters: 118 GiB of one H200.
Words after a colon, separated by commas, change tuning, hardware and rows (`config.published_model`). Not run at this
size yet: there are no figures and no times, and the learning rates are reconstructed. `:smoke` runs a tiny new model
on the same rows and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    return config.published_model(arg, path="Qwen/Qwen3-4B", architecture="qwen3-4b", data="goodreads", full="h200-1")


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
