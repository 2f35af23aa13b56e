"""How models are asked: candidate lists, the whole catalogue, free text.

`candidates`: exact log-probability of every title of the row's frozen list. `windows`: the same for every step of the
test users. `catalogue`: the best titles of the whole catalogue, by trie-constrained beam search with a certificate, and
best-first search where that fails; items of the prompt's history are no answers, for any model.
`generate`: free greedy text; an answer counts when its normalised first line equals a title.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rosepo_jax import files, seeds
from rosepo_jax.data import store
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.data.examples import TitleTable
from rosepo_jax.data.pairs import Pairs
from rosepo_jax.data.rows import Rows
from rosepo_jax.decoding import rank
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import baselines, matching, metrics, summary
from rosepo_jax.evaluation.answers import NO_ANSWER, Answers
from rosepo_jax.preference.oracle import Oracle
from rosepo_jax.training.policy import Policy


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all models of one protocol share. `titles`: ids of the titles by the models' tokenizer."""

    config: ConfigDict
    catalogue: Catalogue
    rows: Rows
    titles: TitleTable | None = None

    def hash(self, protocol: str) -> str:
        """Identity of a protocol: equal hashes are comparable numbers.

        It covers the rows with their candidates, the items with their titles, groups and train counts, and the rules of
        the protocol; not how a model found its answers.
        """
        e, c = self.config.evaluate, self.catalogue
        rules: dict[str, Any] = {"protocol": "candidates" if protocol == "windows" else protocol}
        if protocol == "catalogue":
            rules |= {"exclude": "history", "top": e.top}
        if protocol == "generate":
            rules |= {"match": "normalised first line"}
        rows = [
            hashlib.sha256(np.ascontiguousarray(column).tobytes()).hexdigest() for column in vars(self.rows).values()
        ]
        return files.hash_json([rules, rows, c.ids, c.titles, c.groups, c.count_I.tolist()])

    def facts(self, protocol: str) -> dict[str, Any]:
        """What a reader wants to know of a protocol, JSON-ready."""
        e, d = self.config.evaluate, self.config.data
        if protocol == "generate":
            return {"decoding": "greedy", "match": "normalised first line"}
        if protocol == "catalogue":
            names_I = np.bincount(self.catalogue.title_group_I)
            shared = int(names_I[names_I > 1].sum())
            return {"titles": len(self.catalogue), "sharing_a_title": shared, "beams": e.beams, "budget": e.budget}
        return {"candidates": d.candidates, "sampling": d.candidate_sampling, "never_listed": d.candidate_exclude}


def rows_of(
    config: ConfigDict, prepared: pathlib.Path, protocol: str, users: int | None = None, items: int | None = None
) -> Rows:
    """The test rows that a protocol asks about; of `generate` at most evaluate.max_generate, chosen by hash.

    Errors: UserError for an unknown protocol, when its split has no rows, and as `store.source` says.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"evaluate.protocols: unknown {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    split = PROTOCOLS[protocol].split
    rows = store.read(prepared / "dataset", split, users=users, items=items)
    if not len(rows):
        hint = "set data.windows=True" if split == "windows" else "lower data.min_history or data.core_user"
        raise UserError(f"evaluate: the {split} split has no rows; {hint}")
    limit = config.evaluate.max_generate
    if protocol != "generate" or not 0 < limit < len(rows):
        return rows
    luck_E = seeds.uniform(seeds.key(config.data.seed, "generate"), rows.user_E, rows.position_E)
    return rows.take(np.sort(np.argsort(luck_E, kind="stable")[:limit]))


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
    rows, items_ExC = setting.rows, setting.rows.candidates_ExC
    scores = {name: score(rows, items_ExC) for name, score in floors.items()}
    for name, model in models.items():
        scores[name] = candidate_scores(setting, model, rows)
    return {name: _ranked(score, items_ExC) for name, score in scores.items()}


def candidate_scores(setting: Setting, model: Policy, rows: Rows) -> np.ndarray:
    """log pi(title | prompt) of every candidate, [E, C]."""
    assert setting.titles is not None
    size = setting.config.evaluate.batch_size
    return rank.item_scores(model, model.params, setting.catalogue, setting.titles, rows, rows.candidates_ExC, size)


def _ranked(score_ExC: np.ndarray, items_ExC: np.ndarray, top: int | None = None) -> Answers:
    ranked = metrics.ranking(score_ExC, items_ExC, top)
    descending = -np.sort(-score_ExC, axis=1)[:, :top]
    return Answers(ranked, descending, full_score_ExC=score_ExC)


def catalogue(setting: Setting, models: Mapping[str, Policy], floors: Floors) -> dict[str, Answers]:
    rows, e = setting.rows, setting.config.evaluate
    assert setting.titles is not None
    everything = np.broadcast_to(np.arange(len(setting.catalogue))[None], (len(rows), len(setting.catalogue)))
    own = rows.history_ExN
    answers = {}
    for name, score in floors.items():
        score_ExI = np.array(score(rows, everything), np.float64)
        row, slot = np.nonzero(own >= 0)
        score_ExI[row, own[row, slot]] = -np.inf
        found = _ranked(score_ExI, everything, e.top)
        ranked_ExK = np.where(np.isneginf(found.score_ExK), NO_ANSWER, found.ranked_ExK)
        answers[name] = Answers(ranked_ExK, found.score_ExK, certified_E=np.ones(len(rows), bool))
    for name, model in models.items():
        if model.encoder.template.uses_candidates:
            continue  # such a prompt lists what may be answered; it cannot rank a catalogue
        top = rank.catalogue_top(
            model, model.params, setting.catalogue, setting.titles, rows,
            beams=e.beams, k=e.top, batch_size=e.batch_size, excluded_ExX=own, budget=e.budget,
        )  # fmt: skip
        answers[name] = Answers(np.where(top.items < 0, NO_ANSWER, top.items), top.scores, top.certified)
    return answers


def generate(setting: Setting, models: Mapping[str, Policy], floors: Floors) -> dict[str, Answers]:
    rows, e = setting.rows, setting.config.evaluate
    assert setting.titles is not None
    length = int(setting.titles.length_I.max())
    answers = {}
    for name, model in models.items():
        texts, ended = zip(
            *rank.greedy_texts(model, model.params, setting.catalogue, rows, batch_size=e.batch_size, max_tokens=length)
        )
        answers[name] = matching.read(texts, ended, setting.catalogue, rows)
    return answers


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The split whose rows are asked about, and how: (setting, models, floors) -> the answers of each.

    bound: whether an answer has to be one of the row's candidates.
    """

    split: str
    bound: bool
    ask: Callable[[Setting, Mapping[str, Policy], Floors], dict[str, Answers]]


PROTOCOLS = {
    "candidates": Protocol("test", True, candidates),
    "windows": Protocol("windows", True, candidates),
    "catalogue": Protocol("test", False, catalogue),
    "generate": Protocol("test", False, generate),
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """The embedded world's true preferences, a measuring instrument that real logs do not have."""

    utility_UxI: np.ndarray

    @classmethod
    def load(cls, prepared: pathlib.Path) -> "Truth | None":
        path = prepared / "truth.npz"
        if not path.is_file():
            return None
        (utility_UxI,) = files.read_npz(path, "utility_UxI")
        if utility_UxI.ndim != 2 or utility_UxI.dtype.kind != "f":
            raise UserError(f"{path}: not a table of numbers; run `rosepo prepare` again")
        return cls(utility_UxI)

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
            models[name] = summary.cells(values, rows.user_E, e.bootstrap, setting.config.seed)
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
