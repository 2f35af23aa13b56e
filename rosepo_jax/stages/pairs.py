"""`pairs`: rejected items, chosen on purpose, and the oracle's smoothing factor of every pair."""

import pathlib

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import distributed, seeds
from rosepo_jax.data import examples, pairs, store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.pairs import Pairs
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.preference import rejected, smoothing
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.stages import runtime
from rosepo_jax.training import policy, sharding

NAME, INPUTS, RESUMABLE = "pairs", ("prepare", "oracle", "sft"), False
KEYS = ("seed", "data", "model", "pairs", "align.smoothing.temperature", "align.smoothing.cap", "evaluate.batch_size")


def run(config: ConfigDict, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> dict:
    if config.pairs.path:
        rows = pairs.import_rows(pathlib.Path(config.pairs.path))
        counters: dict = {"rows": len(rows), "kept": len(rows)}
    else:
        rows, counters = mine(config, inputs)
    if distributed.is_primary():
        pairs.write(out / "pairs.parquet", rows)
        pairs.write_trl(out / "trl.jsonl", rows)
    figures = counters | {"flipped": int(rows.flipped_E.sum())}
    if rows.has_epsilon:
        figures |= {"epsilon_mean": float(rows.epsilon_ExK.mean())}
        figures |= {"epsilon_at_cap": float((rows.epsilon_ExK >= config.align.smoothing.cap).mean())}
    runtime.say(f"pairs: {figures}")
    return figures


def mine(config: ConfigDict, inputs: dict[str, pathlib.Path]) -> tuple[Pairs, dict]:
    """Pairs from the training rows by the configured strategies."""
    p = config.pairs
    catalogue = Catalogue.load(inputs["prepare"] / "catalogue.jsonl")
    if p.rows not in ("train", "held_out"):
        raise UserError(f"pairs.rows={p.rows!r}: choose train or held_out")
    rows = store.read(inputs["prepare"] / "dataset", p.rows, items=len(catalogue))
    if not len(rows):
        hint = "; set data.held_out_share" if p.rows == "held_out" else ""
        raise UserError(f"pairs.rows={p.rows}: the split has no rows{hint}")
    if 0 < p.max_rows < len(rows):
        draw_E = seeds.uniform(seeds.key(config.seed, "pairs", "rows"), rows.user_E, rows.position_E)
        rows = rows.take(np.sort(np.argsort(draw_E, kind="stable")[: p.max_rows]))
    model = policy.load(config, inputs["sft"], sharding.make_mesh(config.mesh))
    titles = TitleTable(model.encoder, catalogue.titles)
    seen_indptr, seen_items = store.train_items(inputs["prepare"], len(catalogue))
    weights = rejected.mixture(p.strategy)
    in_prompt = model.encoder.template.uses_candidates
    pool = rejected.Pool(
        catalogue.title_group_I, catalogue.count_I, np.array([bool(t.strip()) for t in catalogue.titles]),
        seen_indptr, seen_items,
        rank.title_embeddings(model, titles) if "semantic" in weights else None,
    )  # fmt: skip
    ranked = None
    if "self_hard" in weights:
        ranked = ranked_items(config, model, catalogue, titles, rows, weights, in_prompt)
    drawn = rejected.sample(p, pool, rows, config.seed, ranked_ExM=ranked, candidates_in_prompt=in_prompt)
    if not drawn.kept_E.any():
        raise UserError(f"pairs: no row has {p.negatives} eligible rejected items ({drawn.counters})")
    rows = rows.take(np.flatnonzero(drawn.kept_E))
    strategy_ExK = drawn.strategy_ExK[drawn.kept_E]
    item_ExR = np.concatenate([rows.target_E[:, None], drawn.rejected_ExK[drawn.kept_E]], axis=1).astype(np.int32)
    flipped_E = rejected.flip(config.seed, rows.user_E, rows.position_E, p.flip)
    item_ExR[flipped_E, :2] = item_ExR[flipped_E, 1::-1]

    oracle = Oracle.load(inputs["oracle"])
    score_ExR = oracle.scores(rows.history_ExN, item_ExR)
    factor = smoothing.Smoothing("oracle", config.align.smoothing.temperature or oracle.tau, config.align.smoothing.cap)
    epsilon_ExK = np.asarray(smoothing.pair_epsilon(factor, jnp.asarray(score_ExR)))
    texts = examples.prompt_texts(model.encoder, catalogue, rows.history_ExN, rows.candidates_ExC)
    names = [[catalogue.titles[item] for item in row] for row in item_ExR]
    return Pairs(
        prompt=texts,
        chosen=[row[0] for row in names],
        rejected=[row[1:] for row in names],
        user_E=rows.user_E,
        position_E=rows.position_E,
        history_ExN=rows.history_ExN,
        item_ExR=item_ExR,
        oracle_score_ExR=score_ExR,
        epsilon_ExK=epsilon_ExK,
        strategy=[[rejected.STRATEGIES[code] for code in row] for row in strategy_ExK],
        flipped_E=flipped_E,
    ), drawn.counters


def ranked_items(config, model, catalogue, titles, rows, weights, in_prompt: bool) -> np.ndarray:
    """ranked_ExM: the SFT model's items for each row, best first; -1 in rows that need none."""
    p = config.pairs
    code = rejected.STRATEGIES.index("self_hard")
    needs = (rejected.strategies(weights, config.seed, rows.user_E, rows.position_E, p.negatives) == code).any(axis=1)
    index = np.flatnonzero(needs)
    some = rows.take(index)
    if in_prompt or p.pool == "candidates":
        score_ExC = rank.item_scores(
            model, model.params, catalogue, titles, some, some.candidates_ExC, config.evaluate.batch_size
        )
        ranked = np.take_along_axis(some.candidates_ExC, np.argsort(-score_ExC, axis=1, kind="stable"), axis=1)
    else:
        ranked = rank.catalogue_top(
            model, model.params, catalogue, titles, some, beams=p.beams, k=p.beams, batch_size=p.batch_size
        ).items
    out = np.full((len(rows), ranked.shape[1]), -1, np.int32)
    out[index] = ranked
    return out
