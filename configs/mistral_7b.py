"""Mistral 7B Instruct v0.3 (arXiv 2310.06825, hf.co/mistralai/Mistral-7B-Instruct-v0.3) on LLaRA's Steam rows.

    rosepo doctor --config=configs/mistral_7b.py
    rosepo run --config=configs/mistral_7b.py --workdir=runs/mistral_7b --config.data.path=DIR

DIR is LLaRA's Steam folder, with as many train rows as it holds. The model is fetched from its hub once its terms
are accepted there. Adapters on a bfloat16 base: 25 GiB of one H100. `:full`: 28 GiB on each of eight H100s.
Words after a colon, separated by commas, change tuning, hardware and rows (`config.published_model`). Not run at this
size yet: there are no figures and no times, and the learning rates are reconstructed. `:smoke` runs a tiny new model
on the same rows and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    return config.published_model(
        arg, path="mistralai/Mistral-7B-Instruct-v0.3", architecture="mistral-7b", data="steam", full="h100-8"
    )


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
