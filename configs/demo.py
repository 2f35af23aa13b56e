"""The embedded world, from nothing to a report on a laptop CPU in a few minutes."""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    c = config.default()
    c.data.source = "world"
    c.data.core_user = c.data.core_item = 3
    c.data.max_validation = 500
    c.model.vocabulary = 1024
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 64, 2, 4, 2, 192
    return config.variant(c, arg)
