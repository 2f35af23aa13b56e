"""MovieLens ml-latest-small: ratings of at least 4, the movies prompt, a small model from nothing.

    rosepo run --config=configs/movielens_small.py --workdir=runs/ml --config.data.path=DIR

DIR holds ratings.csv and movies.csv (https://grouplens.org/datasets/movielens/latest/, 1 MB). 600 users are few: expect
intervals of about +-.04 on HR@1, SFT between the popularity floor and co-occurrence, and gains of alignment within
the noise of one seed. 23 % of the ratings share their second with another of the same user; ties keep the file's order.
`:smoke` ends in seconds and measures nothing.
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    c = config.default()
    c.data.source = "movielens"
    c.data.path = "data/ml-latest-small"
    c.data.min_rating = 4.0
    c.data.template = "movies"
    c.data.max_validation = 500
    c.model.vocabulary = 8192
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 128, 2, 4, 2, 384
    c.model.prompt_length = 192
    c.sft.batch_size, c.sft.length, c.sft.weight_decay = 128, "1000 steps", 0.1
    c.sft.validate = "100 steps"
    c.sft.patience = 3
    return config.variant(c, arg)


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
