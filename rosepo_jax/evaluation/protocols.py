"""How models are asked: candidate lists, the whole catalogue, free text; and what their answers are worth.

`candidates`: exact log-probability of every title of the row's frozen list. `catalogue`: the best titles of the whole
catalogue, by trie-constrained beam search with a certificate; items of the prompt's history are no answers, for any
model.
`generate`: free greedy text; an answer counts when its normalised first line equals a catalogue title.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import files
from rosepo_jax.data.catalogue import Catalogue, normalise
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.pairs import Pairs
from rosepo_jax.data.rows import Rows
from rosepo_jax.decoding import rank
from rosepo_jax.evaluation import baselines, metrics
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.training.policy import Policy


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all models of one evaluation share."""

    config: ConfigDict
    catalogue: Catalogue
    titles: TitleTable
    rows: Rows
    prepared: pathlib.Path

    def hash(self, protocol: str) -> str:
        """Identity of a protocol: equal hashes are comparable numbers."""
        e = self.config.evaluate
        details: dict[str, Any] = {
            "protocol": protocol,
            "data": files.hash_tree(self.prepared / "dataset"),
            "top": e.top,
        }
        if protocol == "catalogue":
            details |= {"exclude": "history", "beams": e.beams}
        if protocol == "generate":
            details |= {"decoding": "greedy", "match": "normalised first line", "rows": e.max_generate}
        return files.hash_json(details)


@dataclasses.dataclass(frozen=True)
class Answers:
    """One model's answers: ranked items (-1: none), scores, and, where a protocol has them, more per row."""

    ranked_ExK: np.ndarray
    score_ExK: np.ndarray
    certified_E: np.ndarray | None = None
    full_score_ExC: np.ndarray | None = None  # candidates: scores in list order
    text: list[str] | None = None
    status: list[str] | None = None


Floors = Mapping[str, Any]  # name -> function (rows, items_ExC or None) -> scores


def floors(config: ConfigDict, catalogue: Catalogue, data: Mapping[str, Rows], oracle: pathlib.Path) -> Floors:
    """Popularity, co-occurrence (train split only) and the oracle, as scorers of candidates or of the catalogue."""
    history = np.concatenate([data[name].history_ExN for name in ("train", "held_out")])
    target = np.concatenate([data[name].target_E for name in ("train", "held_out")])
    counts = baselines.cooccurrence_counts(history, target, len(catalogue))
    scorer = Oracle.load(oracle)

    def popularity(rows, items_ExC):
        return baselines.popularity_scores(catalogue.count_I, items_ExC)

    def cooccurrence(rows, items_ExC):
        return baselines.cooccurrence_scores(counts, rows.history_ExN, items_ExC)

    def oracle_scores(rows, items_ExC):
        return scorer.scores(rows.history_ExN, items_ExC)

    return {"popularity": popularity, "cooccurrence": cooccurrence, "oracle": oracle_scores}


def candidates(setting: Setting, models: Mapping[str, Policy], floors: Floors) -> dict[str, Answers]:
    rows, size = setting.rows, setting.config.evaluate.batch_size
    scores = {name: score(rows, rows.candidates_ExC) for name, score in floors.items()}
    for name, model in models.items():
        scores[name] = rank.item_scores(
            model, model.params, setting.catalogue, setting.titles, rows, rows.candidates_ExC, size
        )
    return {name: _ranked(score, rows.candidates_ExC, setting.config.evaluate.top) for name, score in scores.items()}


def _ranked(score_ExC: np.ndarray, items_ExC: np.ndarray, top: int) -> Answers:
    ranked = metrics.ranking(score_ExC, items_ExC, top)
    descending = -np.sort(-score_ExC, axis=1)[:, :top]
    return Answers(ranked, descending, full_score_ExC=score_ExC)


def catalogue(setting: Setting, models: Mapping[str, Policy], floors: Floors) -> dict[str, Answers]:
    rows, e = setting.rows, setting.config.evaluate
    everything = np.broadcast_to(np.arange(len(setting.catalogue))[None], (len(rows), len(setting.catalogue)))
    own = rows.history_ExN
    answers = {}
    for name, score in floors.items():
        score_ExI = np.array(score(rows, everything), np.float64)
        row, slot = np.nonzero(own >= 0)
        score_ExI[row, own[row, slot]] = -np.inf
        found = _ranked(score_ExI, everything, e.top)
        answers[name] = dataclasses.replace(found, full_score_ExC=None, certified_E=np.ones(len(rows), bool))
    for name, model in models.items():
        if model.encoder.template.uses_candidates:
            continue  # such a prompt lists what may be answered; it cannot rank a catalogue
        top = rank.catalogue_top(
            model, model.params, setting.catalogue, setting.titles, rows,
            beams=e.beams, k=e.top, batch_size=e.batch_size, excluded_ExX=own,
        )  # fmt: skip
        answers[name] = Answers(top.items, top.scores, top.certified)
    return answers


def generate(setting: Setting, models: Mapping[str, Policy], floors: Floors) -> dict[str, Answers]:
    rows, e = setting.rows, setting.config.evaluate
    length = int(setting.titles.length_I.max())
    index = {normalise(title): item for item, title in reversed(list(enumerate(setting.catalogue.titles)))}
    answers = {}
    for name, model in models.items():
        texts = rank.greedy_texts(
            model, model.params, setting.catalogue, rows, batch_size=e.batch_size, max_tokens=length
        )
        item_E = np.array([index.get(normalise(text.split("\n")[0]), -1) for text, _ in texts])
        status = [_status(setting, e_, item, *text) for e_, (item, text) in enumerate(zip(item_E, texts))]
        answers[name] = Answers(
            item_E[:, None], np.zeros((len(rows), 1)), text=[text for text, _ in texts], status=status
        )
    return answers


def _status(setting: Setting, row: int, item: int, text: str, ended: bool) -> str:
    """What is wrong with a free answer, the first that applies; "candidate" is the valid one."""
    if not ended:
        return "truncated"
    if not text.strip():
        return "empty"
    if item < 0:
        return "not_in_catalogue"
    group_I = setting.catalogue.title_group_I
    history = setting.rows.history_ExN[row]
    if group_I[item] in group_I[history[history >= 0]]:
        return "history_copy"
    return "candidate" if group_I[item] in group_I[setting.rows.candidates_ExC[row]] else "not_a_candidate"


PROTOCOLS = {"candidates": candidates, "catalogue": catalogue, "generate": generate}


def summarise(setting: Setting, answers: Mapping[str, Answers], embedding_IxD: np.ndarray):
    """The object M of every model, and the metrics of every row: (model -> M, model -> metric -> values_E)."""
    rows, e = setting.rows, setting.config.evaluate
    group_I, count_I = setting.catalogue.title_group_I, setting.catalogue.count_I
    neighbours = metrics.semantic_neighbours(rows.history_ExN, embedding_IxD, e.neighbours)
    member_IxG = metrics.popularity_groups(count_I)
    cells, by_row = {}, {}
    for name, answer in answers.items():
        values = metrics.by_row(
            answer.ranked_ExK, rows.target_E, rows.history_ExN, rows.candidates_ExC, group_I, count_I, neighbours
        )
        if answer.status is not None:  # what may be answered freely: any title of the catalogue
            in_catalogue = (answer.ranked_ExK[:, 0] >= 0).astype(np.float64)
            values["valid_ratio"] = in_catalogue
            values["HR@1_of_valid"] = np.where(in_catalogue > 0, values["HR@1"], np.nan)
            for kind in ("truncated", "empty", "not_a_candidate"):
                values[kind] = np.array([status == kind for status in answer.status], np.float64)
        if answer.certified_E is not None:
            values["certified"] = answer.certified_E.astype(np.float64)
        cell = metrics.summary(values, rows.user_E, e.bootstrap, setting.config.seed)
        cell |= metrics.over_rows(
            answer.ranked_ExK, rows.history_ExN, rows.user_E, member_IxG, e.bootstrap, setting.config.seed
        )
        cell["HR@1_by_decile"] = metrics.by_decile(values["HR@1"], rows.target_E, count_I, rows.user_E, e.bootstrap)
        cells[name], by_row[name] = cell, values
    return cells, by_row


def predictions(setting: Setting, answer: Answers) -> Iterable[dict]:
    rows = setting.rows
    for e in range(len(rows)):
        ranked = answer.ranked_ExK[e]
        kept = ranked >= 0
        row = {
            "row": e,
            "user": int(rows.user_E[e]),
            "position": int(rows.position_E[e]),
            "target": int(rows.target_E[e]),
            "history": rows.history_ExN[e][rows.history_ExN[e] >= 0].tolist(),
            "ranked": ranked[kept].tolist(),
            "scores": [round(float(score), 5) for score in answer.score_ExK[e][kept]],
        }
        if answer.certified_E is not None:
            row["certified"] = bool(answer.certified_E[e])
        if answer.text is not None and answer.status is not None:
            row |= {"text": answer.text[e], "status": answer.status[e]}
        yield row


@dataclasses.dataclass(frozen=True)
class Truth:
    """The embedded world's true preferences, a measuring instrument that real logs do not have."""

    utility_UxI: np.ndarray

    @classmethod
    def load(cls, prepared: pathlib.Path) -> "Truth | None":
        path = prepared / "truth.npz"
        return cls(np.load(path, allow_pickle=False)["utility_UxI"]) if path.is_file() else None

    def figures(self, setting: Setting, answers: Mapping[str, Answers], pairs: Pairs) -> tuple[dict, dict]:
        """True-preference win rate and pair accuracy of every model, and epsilon against the true label flips.

        Returns the figures, and every model's win rates by row.

        A label is truly flipped when the user likes the first rejected item more than the chosen one.
        """
        rows, e = setting.rows, setting.config.evaluate
        utility_ExC = np.take_along_axis(self.utility_UxI[rows.user_E], rows.candidates_ExC, axis=1)
        models, wins = {}, {}
        for name, answer in answers.items():
            assert answer.full_score_ExC is not None
            wins[name] = metrics.true_win_rate(answer.ranked_ExK[:, 0], rows.candidates_ExC, utility_ExC)
            values = {
                "true_win_rate": wins[name],
                "true_pair_accuracy": metrics.true_pair_accuracy(answer.full_score_ExC, utility_ExC),
            }
            models[name] = metrics.summary(values, rows.user_E, e.bootstrap, setting.config.seed)
        figures: dict = {"models": models}
        if pairs.has_items and pairs.has_epsilon:
            utility_ExR = np.take_along_axis(self.utility_UxI[pairs.user_E], pairs.item_ExR, axis=1)
            quality = metrics.epsilon_quality(pairs.epsilon_ExK[:, 0], utility_ExR[:, 0] < utility_ExR[:, 1])
            figures |= {
                "epsilon_auc": quality["AUC"],
                "epsilon_brier": quality["Brier"],
                "epsilon_ece": quality["ECE"],
                "epsilon_mean": quality["mean"],
                "flip_share": quality["flipped"],
            }
        return figures, wins
