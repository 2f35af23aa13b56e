"""MovieTweetings-100K."""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    c = config.default()
    c.data.source = "movielens"
    c.data.path = "data/movietweetings-100k"
    c.data.core_user, c.data.core_item = 10, 5
    c.data.held_out_share = 0.3
    c.data.max_validation = 1000
    c.model.vocabulary = 16384
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 128, 2, 4, 2, 384
    c.sft.batch_size, c.sft.learning_rate, c.sft.length, c.sft.weight_decay = 128, 1e-3, "1500 steps", 0.1
    c.sft.validate = "100 steps"
    c.sft.patience = 3
    return config.variant(c, arg)


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
