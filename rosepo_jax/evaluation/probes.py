"""Does a model read what it is given? Other users' histories must cost it its hits; the order of a list should not."""

from collections.abc import Mapping

import numpy as np

from rosepo_jax import seeds
from rosepo_jax.data.rows import Rows
from rosepo_jax.evaluation import baselines, metrics, summary
from rosepo_jax.evaluation.protocols import Setting, candidate_scores
from rosepo_jax.training.policy import Policy

TURNS = 4  # orders in which every list is shown


def run(setting: Setting, models: Mapping[str, Policy]) -> dict[str, dict]:
    """The probes of every model on evaluate.probe_rows test rows (0: none), one a user, chosen by hash, JSON-ready."""
    limit = setting.config.evaluate.probe_rows
    if not limit:
        return {}
    rows = one_a_user(setting.rows, limit, setting.config.data.seed)
    found = {}
    for name, model in models.items():
        found[name] = {"foreign_history": foreign_history(setting, model, rows)} if len(rows) > 1 else {}
        if model.encoder.template.uses_candidates:
            found[name]["order"] = order(setting, model, rows)
    return found


def one_a_user(rows: Rows, limit: int, seed: int) -> Rows:
    """At most `limit` rows of as many users, chosen by hash."""
    luck_E = seeds.uniform(seeds.key(seed, "probes"), rows.user_E, rows.position_E)
    by_luck = rows.take(np.argsort(luck_E, kind="stable"))
    first = np.sort(np.unique(by_luck.user_E, return_index=True)[1])
    return by_luck.take(first[:limit])


def foreign_history(setting: Setting, model: Policy, rows: Rows) -> dict:
    """HR@1 with the history of the next user instead of the row's own, beside its own and beside popularity.

    A model that ranks by history falls to about the popularity floor; one that stays above it gets its hits elsewhere.
    """
    swapped = Rows(
        rows.user_E, rows.position_E, np.roll(rows.history_ExN, 1, axis=0), rows.target_E, rows.candidates_ExC
    )
    popularity = baselines.popularity_scores(setting.catalogue.count_I, rows.candidates_ExC)
    return {
        "HR@1": _hit_ratio(setting, rows, candidate_scores(setting, model, swapped)),
        "HR@1_own": _hit_ratio(setting, rows, candidate_scores(setting, model, rows)),
        "popularity": _hit_ratio(setting, rows, popularity),
        "n": len(rows),
    }


def order(setting: Setting, model: Policy, rows: Rows) -> dict:
    """The same lists shown in TURNS orders, each a rotation, so that every candidate stands in as many places.

    `HR@1`: of each order; `changed`: share of rows whose first item is not the same in all of them; `slot_share`: how
    often the first item stood in each slot, over all orders; 1 / C each when place does not matter.
    """
    size = rows.candidates_ExC.shape[1]
    tops, slots, rates = [], np.zeros(size), []
    for turn in range(TURNS):
        lists_ExC = np.roll(rows.candidates_ExC, turn * size // TURNS, axis=1)
        shown = Rows(rows.user_E, rows.position_E, rows.history_ExN, rows.target_E, lists_ExC)
        score_ExC = candidate_scores(setting, model, shown)
        top_E = metrics.ranking(score_ExC, lists_ExC, 1)[:, 0]
        tops.append(top_E)
        slots += np.bincount((lists_ExC == top_E[:, None]).argmax(1), minlength=size)
        rates.append(_hit_ratio(setting, shown, score_ExC)["value"])
    changed_E = (np.stack(tops) != tops[0]).any(0).astype(np.float64)
    e = setting.config.evaluate
    return {
        "HR@1": rates,
        "changed": summary.cell(changed_E, rows.user_E, e.bootstrap, setting.config.seed),
        "slot_share": (slots / slots.sum()).tolist(),
        "n": len(rows),
    }


def _hit_ratio(setting: Setting, rows: Rows, score_ExC: np.ndarray) -> dict:
    ranked_Ex1 = metrics.ranking(score_ExC, rows.candidates_ExC, 1)
    hit_E = metrics.hit_ratio(metrics.target_rank(ranked_Ex1, rows.target_E, setting.catalogue.title_group_I), 1)
    return summary.cell(hit_E, rows.user_E, setting.config.evaluate.bootstrap, setting.config.seed)
