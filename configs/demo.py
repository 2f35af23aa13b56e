"""The embedded world, from nothing to a report on a laptop CPU in a few minutes."""

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
    c.pairs.rows = "held_out"
    c.pairs.negatives = 4
    c.pairs.strategy = "self_hard:0.5,uniform:0.5"
    c.align.batch_size, c.align.learning_rate, c.align.length, c.align.beta = 64, 1e-3, "300 steps", 0.5
    return config.variant(c, arg)
