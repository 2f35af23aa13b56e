"""MovieLens-100K as LLaRA split it (arXiv 2312.02445): 754 / 94 / 95 users, beside LLaRA's published table.

    rosepo run --config=configs/movielens_llara.py --workdir=runs/movielens_llara --config.data.path=DIR

DIR holds val.jsonl, test.jsonl, id2title.tsv and sessions_reconstructed.tsv: the published rows, and sequences rebuilt
from MovieLens-100K, whose order inside equal seconds is not the authors'. The published lists of 20 candidates are
stored nowhere; ours are drawn by the same rule. Two protocols stand side by side: LLaRA's rows, the last step of each
test user (n = 95: one hit is .0105, intervals are about +-.10), and all steps of these users (n = 7,666). Expect, over
five seeds of about five minutes on two CPU cores: HR@1 .35 and .38 (SFT), .36 and .39 (aligned, better at p = .0003
on all steps), .46 and .46 (oracle), .39 and .41 (co-occurrence). Chosen on validation. Seeds:

    rosepo sweep --config=configs/movielens_llara.py --config.data.path=DIR --sweep=seed=0,1,2,3,4
    rosepo report runs/movielens_llara/sweep/seed=*

`:listed` puts the candidates into the prompt and lets the model answer freely, LLaRA's protocol to the letter.
`:smoke` ends in seconds and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    return config.small_on_llara("movielens", arg)


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
