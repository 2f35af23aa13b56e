"""MovieTweetings-100K (MIT licence): from ratings.dat and movies.dat to an aligned recommender on two CPU cores.

    rosepo run --config=configs/movietweetings.py --workdir=runs/mt --config.data.path=DIR

Core 10/5: 2,290 users, 2,146 titles, n = 2,290 test users, leave-one-out, 1 + 19 uniform candidates. 30 % of the
training rows are held out of SFT; pairs are mined on them with the SFT model's own mistakes and uniform rejects,
K = 8, epsilon from the oracle. Expect, in about 5 minutes: HR@1 .39 (popularity), .46 (co-occurrence), .43 (SFT),
.45 (oracle, aligned); alignment beats SFT (p = .002) and, less clearly, the control that spends its steps on more
SFT. Chosen on validation. `pairs.strategy=popularity` lowers the popularity lift, `semantic` the semantic error rate.
`:smoke` ends in seconds and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    c = config.default()
    c.data.source = "movielens"
    c.data.path = "data/movietweetings-100k"
    c.data.core_user, c.data.core_item = 10, 5
    c.data.held_out_share = 0.3
    c.data.max_validation = 1000
    c.model.vocabulary = 16384  # BPE stops where every title is one token
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 128, 2, 4, 2, 384
    c.sft.batch_size, c.sft.learning_rate, c.sft.length, c.sft.weight_decay = 128, 1e-3, "1500 steps", 0.1
    c.sft.validate, c.sft.patience = "100 steps", 3
    c.pairs.rows, c.pairs.negatives, c.pairs.strategy = "held_out", 8, "self_hard:0.3,uniform:0.7"
    c.pairs.alpha, c.pairs.top = 1.3, 20  # pairs.strategy = popularity, semantic
    c.align.batch_size, c.align.learning_rate, c.align.length, c.align.beta = 64, 6e-4, "400 steps", 0.5
    return config.variant(c, arg)


def get_sweep() -> list[dict]:
    """beta times the kind of smoothing."""
    return [
        {"align.beta": beta, "align.smoothing.mode": mode}
        for beta in (0.2, 0.5, 1.0)
        for mode in ("oracle", "fixed", "none", "shuffled")
    ]
