"""LastFM as LLaRA split it: 976 / 122 / 122 users, every step of a train user, the last step of the others.

    rosepo run --config=configs/lastfm.py --workdir=runs/lastfm --config.data.path=DIR

DIR holds sessions.tsv, val.jsonl, test.jsonl and id2name.txt of LLaRA's LastFM. The published lists of 20 candidates
are stored nowhere, so ours are drawn afresh: n = 122, one hit is .008, intervals are about +-.09, and figures compare
only loosely with published ones. Floors on such lists: popularity .06, co-occurrence .19. `:smoke` ends in seconds and
measures nothing. `:stories260k` starts from a real pretrained model, the smallest there is, instead of a new one:

    python benchmarks/convert_llama2c.py stories260K.bin tok512.bin data/stories260k
    rosepo run --config=configs/lastfm.py:stories260k --workdir=runs/stories --config.data.path=DIR
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    c = config.default()
    c.data.source = "llara"
    c.data.path = "data/llara-lastfm"
    c.data.split = "given"
    c.data.core_user = c.data.core_item = 1  # the published rows, all of them
    c.data.template = "music"
    c.model.vocabulary = 8192
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 128, 2, 4, 2, 384
    c.sft.batch_size, c.sft.length, c.sft.weight_decay = 128, "1000 steps", 0.1
    c.sft.validate = "100 steps"
    c.sft.patience = 3
    c.pairs.max_rows = 16000
    words = set(filter(None, arg.split(",")))
    if pretrained := "stories260k" in words:
        c.oracle.length = "4 epochs"
        c.sft.batch_size, c.sft.length, c.sft.learning_rate = 16, "400 steps", 3e-3
        c.pairs.max_rows = 1000
        c.align.batch_size, c.align.learning_rate = 16, 3e-4
    c = config.variant(c, ",".join(words - {"stories260k"}))
    if pretrained:  # 512 tokens and positions: names take many
        c.model.path, c.model.prompt_length, c.model.response_length = "data/stories260k", 448, 64
    return c


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
