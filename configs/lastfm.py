"""LastFM as LLaRA split it (arXiv 2312.02445): 976 / 122 / 122 users, beside LLaRA's published table.

    rosepo run --config=configs/lastfm.py --workdir=runs/lastfm --config.data.path=DIR

DIR holds sessions.tsv, val.jsonl, test.jsonl and id2name.txt of LLaRA's LastFM. The published lists of 20 candidates
are stored nowhere; ours are drawn by the same rule. Two protocols stand side by side: LLaRA's rows, the last step of
each test user (n = 122: one hit is .008, intervals are about +-.09), and all steps of these users (n = 2,495). Seeds:

    rosepo sweep --config=configs/lastfm.py --config.data.path=DIR --sweep=seed=0,1,2,3,4
    rosepo report runs/lastfm/sweep/seed=*

`:listed` puts the candidates into the prompt and lets the model answer freely, LLaRA's protocol to the letter.
`:smoke` ends in seconds and measures nothing. `:stories260k` starts from a real pretrained model, the smallest:

    python benchmarks/convert_llama2c.py stories260K.bin tok512.bin data/stories260k
    rosepo run --config=configs/lastfm.py:stories260k --workdir=runs/stories --config.data.path=DIR
"""

from ml_collections import ConfigDict

from rosepo_jax import config


def get_config(arg: str = "") -> ConfigDict:
    words = set(filter(None, arg.split(",")))
    c = config.small_on_llara("lastfm", ",".join(words - {"stories260k"}))
    if "stories260k" in words:  # 512 tokens and positions: names take many
        c.model.path, c.model.prompt_length, c.model.response_length = "data/stories260k", 448, 64
        c.data.template, c.data.held_out_share, c.data.windows = "music", 0.0, False
        c.evaluate.protocols = config.default().evaluate.protocols
        c.pairs.rows, c.pairs.negatives, c.pairs.strategy = "train", 1, "self_hard"
    if "stories260k" in words and "smoke" not in words:
        c.oracle.length = "4 epochs"
        c.sft.batch_size, c.sft.length, c.sft.learning_rate = 16, "400 steps", 3e-3
        c.pairs.max_rows = 1000
        c.align.batch_size, c.align.length, c.align.learning_rate = 16, "1 epochs", 3e-4
    return c


def get_sweep() -> list[dict]:
    return config.beta_by_smoothing()
