"""The embedded world, from nothing to a report on a laptop CPU in a few minutes.

    rosepo run --config=configs/demo.py --workdir=runs/demo

2,000 users, 300 titles, n = 2,000 test users, 1 + 19 candidates. Expect HR@1 near .18 (popularity), .30 (SFT), .34
(oracle, aligned); alignment beats SFT at p < 0.01. `:smoke` takes seconds. `:flipped` exchanges the chosen and a
rejected title of 30 % of the pairs; what smoothing makes of that is seen in the true-preference win rate of

    rosepo sweep --config=configs/demo.py:flipped --sweep=align.smoothing.mode=oracle,none,shuffled
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    c = config.default()
    c.data.source = "world"
    c.data.core_user = c.data.core_item = 3
    c.data.held_out_share = 0.3
    c.data.max_validation = 1000
    c.model.vocabulary = 768
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 64, 2, 4, 2, 192
    c.sft.batch_size, c.sft.learning_rate, c.sft.length, c.sft.weight_decay = 128, 2e-3, "800 steps", 0.1
    c.pairs.rows, c.pairs.negatives, c.pairs.strategy = "held_out", 8, "self_hard:0.3,uniform:0.7"
    c.align.batch_size, c.align.learning_rate, c.align.length, c.align.beta = 64, 2e-3, "500 steps", 0.5
    if arg == "flipped":
        c.pairs.flip = 0.3
        c.evaluate.protocols, c.evaluate.sft_more = ("candidates",), False
        arg = ""
    return config.variant(c, arg)


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
