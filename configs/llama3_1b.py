"""Llama 3.2 1B Instruct (hf.co/meta-llama/Llama-3.2-1B-Instruct) on LLaRA's MovieLens rows: the small one to try.

    rosepo doctor --config=configs/llama3_1b.py
    rosepo run --config=configs/llama3_1b.py --workdir=runs/llama3_1b --config.data.path=DIR

DIR is LLaRA's MovieLens folder. The model is fetched from its hub once its licence is accepted there. Adapters on a
bfloat16 base: 7 GiB of one H100. `:full` trains all parameters: 37 GiB of it.
Words after a colon, separated by commas, change tuning, hardware and rows (`config.published_model`). Not run at this
size yet: there are no figures and no times, and the learning rates are reconstructed. `:smoke` runs a tiny new model
on the same rows and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    return config.published_model(
        arg, path="meta-llama/Llama-3.2-1B-Instruct", architecture="llama3.2-1b", data="movielens", full="h100-1"
    )


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
