"""Llama 3 8B Instruct (arXiv 2407.21783, hf.co/meta-llama/Meta-Llama-3-8B-Instruct) on LLaRA's MovieLens rows.

    rosepo doctor --config=configs/llama3_8b.py
    rosepo run --config=configs/llama3_8b.py --workdir=runs/llama3_8b --config.data.path=DIR

DIR is LLaRA's MovieLens folder. The model is fetched from its hub once its licence is accepted there. Adapters on a
bfloat16 base: 23 GiB of one H100. `:full` trains all parameters: 29 GiB on each of eight H100s.
Words after a colon, separated by commas, change tuning, hardware and rows (`config.published_model`). Not run at this
size yet: there are no figures and no times, and the learning rates are reconstructed. `:smoke` runs a tiny new model
on the same rows and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    return config.published_model(
        arg, path="meta-llama/Meta-Llama-3-8B-Instruct", architecture="llama3-8b", data="movielens", full="h100-8"
    )


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
