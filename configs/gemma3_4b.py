"""Gemma 3 4B (arXiv 2503.19786, hf.co/google/gemma-3-4b-it), its text part, on LLaRA's MovieLens rows.

    rosepo doctor --config=configs/gemma3_4b.py
    rosepo run --config=configs/gemma3_4b.py --workdir=runs/gemma3_4b --config.data.path=DIR

DIR is LLaRA's MovieLens folder. The model is fetched from its hub once its licence is accepted there. Adapters on a
bfloat16 base: 15 GiB of one H100. `:full` trains all parameters: 111 GiB of one H200.
Words after a colon, separated by commas, change tuning, hardware and rows (`config.published_model`). Not run at this
size yet: there are no figures and no times, and the learning rates are reconstructed. `:smoke` runs a tiny new model
on the same rows and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    return config.published_model(
        arg, path="google/gemma-3-4b-it", architecture="gemma3-4b", data="movielens", full="h200-1"
    )


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
