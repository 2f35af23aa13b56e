"""What the results say: a table for the terminal, sentences, JSON. `page` makes the HTML page of it.

Every number comes from `results.json`; a sentence claims a difference only where the paired test, Holm-corrected when
the correction is there, gives p < 0.05.
"""

import dataclasses
import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rosepo_jax import config, configuration, files, forms, seeds
from rosepo_jax.data.catalogue import Catalogue
from rosepo_jax.errors import UserError

LEVEL = 0.05
MODELS = {
    "popularity": "popularity",
    "cooccurrence": "co-occurrence",
    "oracle": "oracle",
    "sft": "SFT",
    "sft_more": "SFT more",
    "aligned": "aligned",
}
PLACES = {  # headline metric -> the protocols it is taken from, the first one that has it
    "HR@1": ("candidates", "windows", "catalogue", "generate"),
    "NDCG@5": ("candidates", "windows", "catalogue"),
    "popularity_lift": ("catalogue", "candidates", "windows", "generate"),
    "semantic_error_rate": ("catalogue", "candidates", "windows", "generate"),
    "valid_ratio": ("generate",),
}
GROUPS = {  # what a metric says, where its name does not; formulas: metrics.py
    "Ranking": {
        "HR@1": "the first answer is the true item",
        "HR@5": "the true item is among the first 5",
        "HR@10": "the true item is among the first 10",
        "NDCG@5": "1 / log2(1 + place), 0 beyond place 5",
        "NDCG@10": "1 / log2(1 + place), 0 beyond place 10",
        "MRR": "mean of 1 / place, 0 when not listed",
        "HR@1_cold": "HR@1 where the true item never occurs in training",
    },
    "Validity and format": {
        "valid_ratio": "the first answer is one of those to choose from",
        "HR@1_of_valid": "hits over valid answers, as some papers count",
        "candidate_ratio": "the first answer is one of the row's candidates",
        "not_a_candidate": "a title, but none of the candidates",
        "hallucination": "no title of the catalogue, of the answers that are neither empty nor cut off",
        "not_in_catalogue": "answers that are no title of the catalogue",
        "history_copy": "answers that stand in the history",
        "duplicate": "answers that stand in the same list before",
        "ambiguous": "the answered title belongs to several items",
        "truncated": "the answer was cut off",
        "empty": "no answer",
        "substring_valid_ratio": "exactly one candidate's title stands in the text, as in LLaRA",
        "substring_HR@1": "and it is the true one, over all rows",
        "substring_HR@1_of_valid": "and it is the true one, over the valid rows",
    },
    "Popularity and groups": {
        "popularity_lift": "log train count of the top 5 minus that of the true item (nats)",
        "ARP": "mean train count of the top 5",
        "APLT": "share of the top 5 outside the most popular fifth of the catalogue",
        "gini": "of the top 5: 0 all items equally often, 1 always the same",
        "coverage": "share of the catalogue that stands in some top 5",
        "MGU": "fifths by popularity: mean gap between their shares of lists and of histories",
        "DGU": "fifths by popularity: largest minus smallest gap",
        "MGU_genre": "genres: mean gap between their shares of lists and of histories",
        "DGU_genre": "genres: largest minus smallest gap",
    },
    "Semantics and novelty": {
        "semantic_error_rate": "wrong first answers that only look like the history",
        "semantic_error_rate_random": "what a random answer would get",
        "diversity": "1 − cosine between the titles of the top 5",
        "novelty": "self-information of the top 5 (bits)",
    },
    "Calibration": {
        "ECE": "gap between the probability of the first answer and how often it is right",
        "certified": "lists proved equal to scoring every title",
    },
}
SPEED = {  # key of metrics.jsonl -> its column, and what one of its unit is
    "prompts_per_second": ("prompts/s", 1),
    "pairs_per_second": ("pairs/s", 1),
    "tokens_per_second": ("tokens/s", 1),
    "tokens_useful": ("useful tokens", 1),
    "flops_per_second": ("TFLOP/s", 1e12),
    "mfu": ("MFU", 1),
    "input_stall": ("input stall", 1),
    "memory/peak_bytes": ("peak memory, GiB", 2**30),
    "compile_seconds": ("compilation, s", 1),
}
KINDS = {
    "gain": "aligned right, SFT wrong",
    "loss": "SFT right, aligned wrong",
    "both": "both right",
    "neither": "both wrong",
}
OUTCOMES = {  # of verdicts
    "shown": f"The tests show (p < {LEVEL:g}, Holm-corrected)",
    "not shown": "The tests do not show",
    "not tested": "Measured, not tested",
}


# What results.json must look like. A cell is a metric with its interval; lists and objects without a value are passed
# over where a cell is wanted.
_BOUNDS = (None, [float, 2])
_CELL = (None, float, list, {"value?": (None, float), "ci95?": _BOUNDS, "n?": (None, int)})
_CLASS = {"value": (None, float), "ci95?": _BOUNDS, "n?": (None, int), "counts?": (None, [int])}
_COMPARISON = {
    "protocol": str, "metric": str, "a": str, "b": str, "difference": float, "ci95?": _BOUNDS, "n?": (None, int),
    "test?": (None, str), **dict.fromkeys(("p?", "p_holm?", "q_bh?", "p_mcnemar?", "detectable?"), (None, float)),
}  # fmt: skip
_FOREIGN = {"HR@1": _CELL, "HR@1_own": _CELL, "popularity?": _CELL, "n": int}
_ORDER = {"HR@1": [float], "changed": _CELL, "slot_share": [float], "n": int}
_PUBLISHED_ROW = {"model": str, "source?": str, "HR@1?": _CELL, "valid_ratio?": _CELL}
RESULTS = {
    "protocols": {
        str: {
            "hash": str,
            "n?": int,
            "semantic_space?": (None, str),
            "candidates?": int,
            "titles?": int,
            "sampling?": str,
            "models": {
                str: {
                    "HR@1_by_decile?": [_CLASS | {"decile": int}],
                    "HR@1_by_history?": [_CLASS | {"history": [int, 2]}],
                    str: _CELL,
                }
            },
        }
    },
    "comparisons?": [_COMPARISON],
    "probes?": {str: {"foreign_history?": _FOREIGN, "order?": _ORDER}},
    "truth?": {"models?": {str: {str: _CELL}}, str: _CELL},
    "oracle?": {str: (None, float)},
    "published?": (None, {"title": str, "n": (None, int), "how?": str, "defects?": [str], "rows": [_PUBLISHED_ROW]}),
    "defects?": [str],
    "notes?": [str],
}


@dataclasses.dataclass(frozen=True)
class Material:
    """What a report is made of; only `results` is required."""

    results: dict  # evaluate/results.json, possibly `with_others`
    predictions: Mapping[str, Mapping[str, list[dict]]] = dataclasses.field(default_factory=dict)  # [protocol][model]
    catalogue: Catalogue | None = None  # of the raw ids in the predictions
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, list[dict]] = dataclasses.field(default_factory=dict)  # rows of metrics.jsonl by stage
    spent: Mapping[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # `goodput.totals` by stage
    pairs: Mapping[str, list] = dataclasses.field(default_factory=dict)  # columns epsilon, strategy, flipped
    manifests: Mapping[str, dict] = dataclasses.field(default_factory=dict)  # by stage
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# ---- the results -----------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> dict:
    """A results.json, of `evaluate` or of another system. UserError names the place that is not as it must be."""
    return forms.check(files.read_json(path), RESULTS, path, "evaluate again")


def check(results: Mapping[str, Any]) -> None:
    """Refuses results without protocols, and protocols whose models were counted over different rows or classes."""
    if not isinstance(results.get("protocols"), Mapping) or not results["protocols"]:
        raise UserError("results.json: no protocols; run `rosepo evaluate` again")
    for name, protocol in results["protocols"].items():
        cells = {model: cell(results, name, model, "HR@1") for model in protocol["models"]}
        sizes = {model: found["n"] for model, found in cells.items() if found.get("n") is not None}
        if len(set(sizes.values())) > 1:
            raise UserError(f"results.json: {name} counts its models over different rows (n: {sizes}); evaluate again")
        for metric in ("HR@1_by_decile", "HR@1_by_history"):
            if len({len(model[metric]) for model in protocol["models"].values() if model.get(metric)}) > 1:
                raise UserError(f"results.json: {name} has {metric} of different classes; evaluate again")


def with_others(results: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict:
    """`results` and, as further models of the same protocols, what other systems got: `others[where from]`.

    A row joins a protocol only if its hash is equal: the same rows, candidates and rules. What is left out, and why,
    stands in "notes".
    """
    protocols = {name: {**found, "models": dict(found["models"])} for name, found in results["protocols"].items()}
    comparisons, notes = list(results.get("comparisons", ())), []
    for source, other in others.items():
        for name, theirs in other["protocols"].items():
            ours = protocols.get(name)
            here, there = (ours or {}).get("hash"), theirs["hash"]
            for model, metrics in theirs["models"].items():
                if ours is None:
                    reason = "this run did not evaluate that protocol"
                elif here != there:
                    reason = f"its protocol has the hash {there}, this run's {here}: other rows, candidates or rules"
                elif model in ours["models"]:
                    reason = "another model has that name"
                else:
                    ours["models"][model] = metrics
                    continue
                notes.append(f"{model} ({source}) is left out of {name}: {reason}.")
            if ours is not None and here == there:
                comparisons += [row for row in other.get("comparisons", ()) if row["protocol"] == name]
    return {**results, "protocols": protocols, "comparisons": comparisons, "notes": notes}


def cell(results: Mapping[str, Any], protocol: str, model: str, metric: str) -> dict:
    """The metric's {"value", "ci95", "n", ...}, empty where it is absent or null."""
    return as_cell(results["protocols"].get(protocol, {}).get("models", {}).get(model, {}).get(metric))


def as_cell(value: Any) -> dict:
    """A cell from a cell or a number; empty when there is no number in it."""
    found = value if isinstance(value, Mapping) else {"value": value}
    return dict(found) if isinstance(found.get("value"), int | float) else {}


def models(results: Mapping[str, Any]) -> list[str]:
    """All models of all protocols: the floors first, systems of others last."""
    present = {model: None for protocol in results["protocols"].values() for model in protocol["models"]}
    return [model for model in MODELS if model in present] + [model for model in present if model not in MODELS]


def headline(results: Mapping[str, Any]) -> dict[str, str]:
    """The protocol each headline metric is taken from: one per metric, so that no column mixes protocols."""
    chosen: dict[str, str] = {}
    for metric, protocols in PLACES.items():
        for protocol in protocols:
            if any(cell(results, protocol, model, metric) for model in models(results)):
                chosen[metric] = protocol
                break
    return chosen


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """The metrics by group of `GROUPS`, in its order; those it does not know come last."""
    present = list(metrics)
    found = {group: [metric for metric in known if metric in present] for group, known in GROUPS.items()}
    known = {metric for group in GROUPS.values() for metric in group}
    found["Other"] = [metric for metric in present if metric not in known]
    return {group: row for group, row in found.items() if row}


def published_rows(results: Mapping[str, Any]) -> list[tuple[str, str, dict, dict]]:
    """This run's figures for a place beside published ones: (model, how it was asked, HR@1, valid ratio).

    Free answers are scored by the literature's substring rule here, and here only.
    """
    rows: list[tuple[str, str, dict, dict]] = []
    for protocol in ("candidates", "windows"):
        for model in models(results):
            if found := cell(results, protocol, model, "HR@1"):
                rows.append((name(model), f"{protocol}: every title scored", found, {}))
    for model in models(results):
        if found := cell(results, "generate", model, "substring_HR@1"):
            valid = cell(results, "generate", model, "substring_valid_ratio")
            rows.append((name(model), "generate: free answer, substring rule", found, valid))
    return rows


def detectable(results: Mapping[str, Any]) -> str:
    """How small a true difference these rows can show: of the headline metrics, aligned against SFT if that was tested.

    Empty where no comparison says it.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for metric, protocol in headline(results).items():
        rows = [
            row
            for row in results.get("comparisons", ())
            if (row["protocol"], row["metric"]) == (protocol, metric) and row.get("detectable") is not None
        ]
        if rows:
            row = min(rows, key=lambda row: {row["a"], row["b"]} != {"aligned", "sft"})
            pair, n = f"{name(row['a'])} and {name(row['b'])}", row.get("n", results["protocols"][protocol].get("n"))
            found.setdefault((number(n), pair), []).append(f"{number(row['detectable'])} in {words(metric)}")
    return " ".join(
        f"With n = {n} rows a true difference between {pair} of {_or(parts)} is found in 4 of 5 such experiments; a "
        "smaller one is missed more often."
        for (n, pair), parts in found.items()
    )


def _or(parts: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


# ---- text ------------------------------------------------------------------------------------------------------------


def text(results: Mapping[str, Any]) -> str:
    """What is printed: known defects, the headline table, paired tests, verdicts, published figures, what was left out.

    Errors: UserError for results without protocols, and for models of one protocol counted over different rows.
    """
    check(results)
    parts = [_listed("Known defects of these data:", results.get("defects", ())), table(results)]
    parts += ["\n".join(map(comparison_line, results.get("comparisons", ())))]
    parts += [_listed(f"{OUTCOMES[outcome]}:", sentences) for outcome, sentences in verdicts(results).items()]
    parts += [_published(results), _listed("Left out:", results.get("notes", ()))]
    return "\n\n".join(part for part in parts if part)


def table(results: Mapping[str, Any]) -> str:
    """The headline table as plain text, and what its columns rest on."""
    places = headline(results)
    header = ["", *(words(metric) for metric in places), "n"]
    rows = []
    for model in models(results):
        cells = {metric: cell(results, protocol, model, metric) for metric, protocol in places.items()}
        sizes = [found["n"] for found in cells.values() if "n" in found]
        rows.append([name(model), *map(interval, cells.values()), number(sizes[0] if sizes else None)])
    lines = [*laid_out([header, *rows]), "", f"95 % intervals in brackets. {_sources(results)}"]
    return "\n".join([*lines, *filter(None, [detectable(results)])])


def comparison_line(comparison: Mapping[str, Any]) -> str:
    """`aligned - SFT, HR@1 (candidates): +0.031 [+0.012, +0.050], p = 0.002, p_holm = 0.004, paired permutation`."""
    parts = [interval({**comparison, "value": comparison["difference"]}, signed)]
    parts += [probability(comparison[key], key) for key in ("p", "p_holm", "q_bh") if comparison.get(key) is not None]
    parts += [comparison["test"]] if comparison.get("test") else []
    names = f"{name(comparison['a'])} - {name(comparison['b'])}"
    return f"{names}, {words(comparison['metric'])} ({comparison['protocol']}): {', '.join(parts)}"


def laid_out(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table whose first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _listed(title: str, sentences: Iterable[str]) -> str:
    lines = [f"- {sentence}" for sentence in sentences]
    return "\n".join([title, *lines]) if lines else ""


def _published(results: Mapping[str, Any]) -> str:
    printed = results.get("published")
    if not printed:
        return ""
    rows = [["", "HR@1", "valid ratio", "n", "source, or how it was asked"]]
    for row in printed["rows"]:
        hits, valid = as_cell(row.get("HR@1")), as_cell(row.get("valid_ratio"))
        rows.append([row["model"], interval(hits), interval(valid), number(hits.get("n")), row.get("source", "")])
    for model, how, hits, valid in published_rows(results):
        rows.append([f"here: {model}", interval(hits), interval(valid), number(hits.get("n")), how])
    lines = laid_out(rows)
    lines.insert(2 + len(printed["rows"]), lines[1])
    title = f"Published, {printed['title']}, n = {number(printed['n'])}, and here: other lists, other sizes of models."
    return "\n".join([title, printed.get("how", ""), *lines, *(f"- {defect}" for defect in printed.get("defects", ()))])


def _sources(results: Mapping[str, Any]) -> str:
    """Which column comes from which protocol, over how many rows."""
    columns: dict[str, list[str]] = {}
    for metric, protocol in headline(results).items():
        columns.setdefault(protocol, []).append(words(metric))
    return "; ".join(
        f"{', '.join(metrics)}: {protocol}, n = {number(results['protocols'][protocol].get('n'))}"
        for protocol, metrics in columns.items()
    )


# ---- verdicts --------------------------------------------------------------------------------------------------------


def verdicts(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the numbers allow to say of alignment, by `OUTCOMES`: against SFT, the control, floors and oracle; biases;
    what the probes found."""
    places = headline(results)
    found: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    if "HR@1" not in places:
        found["not tested"].append("No protocol reports HR@1, so nothing can be said about ranking.")
        return found
    protocol = places["HR@1"]
    if cell(results, protocol, "aligned", "HR@1"):
        _gain(found, results, protocol)
    else:
        found["not tested"].append("No aligned model was evaluated.")
    _standing(found, results, protocol)
    for metric in ("popularity_lift", "semantic_error_rate"):
        if metric in places:
            _shift(found, results, places[metric], metric)
    found["not tested"] += _probes(results)
    return {outcome: sentences for outcome, sentences in found.items() if sentences}


def _gain(found: dict[str, list[str]], results: Mapping[str, Any], protocol: str) -> None:
    """Aligned against SFT and against the control, and what both together say."""
    outcomes = []
    for rival, label in (("sft", "SFT"), ("sft_more", "the control (the same steps spent on more SFT)")):
        ours, theirs = (cell(results, protocol, model, "HR@1") for model in ("aligned", rival))
        if not theirs:
            outcomes.append("")
            continue
        values = f"{number(ours['value'])} against {number(theirs['value'])}"
        comparison = _comparison(results, protocol, "HR@1", "aligned", rival)
        if _p(comparison) is None:
            difference = signed(ours["value"] - theirs["value"])
            found["not tested"].append(f"Aligned and {label} on HR@1: {values} ({difference}).")
            outcomes.append("untested")
        elif not _significant(comparison):
            found["not shown"].append(f"That alignment beats {label} on HR@1: {values}, {_evidence(comparison)}.")
            outcomes.append("tie")
        else:
            win = comparison["difference"] > 0
            verb = "beats" if win else "is worse than"
            found["shown"].append(f"Alignment {verb} {label} on HR@1: {values}, {_evidence(comparison)}.")
            outcomes.append("win" if win else "loss")
    match outcomes:
        case ["win", "win"]:
            found["shown"].append("The gain is more than the additional steps of training give.")
        case ["win", "tie"]:
            found["not shown"].append("That the gain over SFT is more than the additional steps of training give.")
        case ["win", "loss"]:
            found["shown"].append("The gain over SFT is less than the additional steps of training give.")
        case [_, ""]:
            found["not tested"].append("Without a control, the effect of additional steps of training is unknown.")


def _standing(found: dict[str, list[str]], results: Mapping[str, Any], protocol: str) -> None:
    """Where the model, SFT where there is no aligned one, stands against the floors and the oracle."""
    model = next((m for m in ("aligned", "sft") if cell(results, protocol, m, "HR@1")), "")
    ours = cell(results, protocol, model, "HR@1")
    untested = []
    for rival in ("popularity", "cooccurrence", "oracle"):
        theirs = cell(results, protocol, rival, "HR@1")
        if not (ours and theirs):
            continue
        comparison = _comparison(results, protocol, "HR@1", model, rival)
        values = f"{number(ours['value'])} against {number(theirs['value'])}"
        if _p(comparison) is None:
            untested.append(f"{name(rival)} {number(theirs['value'])}")
        elif _significant(comparison):
            side = "above" if comparison["difference"] > 0 else "below"
            sentence = f"{_first(name(model))} is {side} {name(rival)} on HR@1: {values}, {_evidence(comparison)}."
            found["shown"].append(sentence)
        else:
            sentence = f"That {name(model)} and {name(rival)} differ on HR@1: {values}, {_evidence(comparison)}."
            found["not shown"].append(sentence)
    if untested:
        found["not tested"].append(f"HR@1: {name(model)} {number(ours['value'])}, {', '.join(untested)}.")


def _shift(found: dict[str, list[str]], results: Mapping[str, Any], protocol: str, metric: str) -> None:
    """How a bias moved from SFT to the aligned model."""
    ours, theirs = (cell(results, protocol, model, metric) for model in ("aligned", "sft"))
    if not (ours and theirs):
        return
    comparison = _comparison(results, protocol, metric, "aligned", "sft")
    values = f"from {number(theirs['value'])} to {number(ours['value'])} ({protocol})"
    if _p(comparison) is None:
        found["not tested"].append(f"{_first(words(metric))} goes {values}.")
    elif _significant(comparison):
        verb = "rises" if comparison["difference"] > 0 else "falls"
        found["shown"].append(f"{_first(words(metric))} {verb} {values}, {_evidence(comparison)}.")
    else:
        found["not shown"].append(f"That {words(metric)} changes: {values}, {_evidence(comparison)}.")


def _probes(results: Mapping[str, Any]) -> list[str]:
    """A sentence a probe."""
    foreign, orders, sizes = [], [], {}
    for model, probes in results.get("probes", {}).items():
        if found := probes.get("foreign_history"):
            strange, own = interval(as_cell(found["HR@1"])), interval(as_cell(found["HR@1_own"]))
            foreign.append(f"{name(model)} {strange} instead of {own}")
            floor = f"; popularity {interval(as_cell(found['popularity']))}" if found.get("popularity") else ""
            sizes["foreign"] = f"{floor} (n = {number(found['n'])})."
        if found := probes.get("order"):
            orders.append(f"{name(model)} {interval(as_cell(found['changed']))}")
            sizes["order"] = f" (n = {number(found['n'])})."
    return [
        *([f"HR@1 with the history of another user: {', '.join(foreign)}{sizes['foreign']}"] if foreign else []),
        *(
            [f"Share of first answers that change with the order of the list: {', '.join(orders)}{sizes['order']}"]
            if orders
            else []
        ),
    ]


def _comparison(results: Mapping[str, Any], protocol: str, metric: str, a: str, b: str) -> dict:
    """The comparison a - b, turned round if it is stored as b - a; empty when it was not made."""
    for comparison in results.get("comparisons", ()):
        if (comparison["protocol"], comparison["metric"]) == (protocol, metric):
            if (comparison["a"], comparison["b"]) == (a, b):
                return dict(comparison)
            if (comparison["a"], comparison["b"]) == (b, a):
                ci95 = [-bound for bound in reversed(comparison.get("ci95") or ())]
                return {**comparison, "a": a, "b": b, "difference": -comparison["difference"], "ci95": ci95}
    return {}


def _p(comparison: Mapping[str, Any]) -> float | None:
    return comparison.get("p") if comparison.get("p_holm") is None else comparison["p_holm"]


def _significant(comparison: Mapping[str, Any]) -> bool:
    p = _p(comparison)
    return p is not None and p < LEVEL


def _evidence(comparison: Mapping[str, Any]) -> str:
    """`+0.041 [+0.022, +0.060], p = 0.0002, Holm-corrected p = 0.0008, n = 2,290`."""
    parts = [interval({**comparison, "value": comparison["difference"]}, signed)]
    for key, label in (("p", "p"), ("p_holm", "Holm-corrected p")):
        if comparison.get(key) is not None:
            parts.append(probability(comparison[key], label))
    return ", ".join([*parts, f"n = {number(comparison['n'])}"] if comparison.get("n") is not None else parts)


# ---- JSON, examples, provenance --------------------------------------------------------------------------------------


def summary(material: Material) -> dict:
    """The headline figures as JSON: per model and metric value, interval, n and protocol; comparisons; provenance."""
    results = material.results
    check(results)
    places = headline(results)
    return {
        "models": {
            model: {
                metric: {key: found.get(key) for key in ("value", "ci95", "n")} | {"protocol": protocol}
                for metric, protocol in places.items()
                if (found := cell(results, protocol, model, metric))
            }
            for model in models(results)
        },
        "comparisons": list(results.get("comparisons", ())),
        "verdicts": verdicts(results),
        "defects": list(results.get("defects", ())),
        "left_out": list(results.get("notes", ())),
        "training": {stage: figures for stage, rows in material.metrics.items() if (figures := speed(rows))},
        "seconds": {stage: dict(seconds) for stage, seconds in material.spent.items()},
        "protocol_hashes": {protocol: found.get("hash") for protocol, found in results["protocols"].items()},
        "config_hash": material.manifests.get("evaluate", {}).get("resolved_config_hash"),
        "versions": versions(material),
    }


def speed(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How fast a stage trained, from its metrics.jsonl: the median line of rates and shares, the mean input stall, the
    most memory, all compilation. Empty for a stage that says nothing of it."""
    found: dict[str, list[float]] = {metric: [] for metric in SPEED}
    for row in rows:
        for metric, values in found.items():
            if isinstance(row.get(metric), int | float):
                values.append(row[metric])
    combine: dict[str, Callable[..., float]] = {
        "input_stall": statistics.fmean,
        "memory/peak_bytes": max,
        "compile_seconds": sum,
    }
    return {metric: combine.get(metric, statistics.median)(values) for metric, values in found.items() if values}


def examples(
    sft: Iterable[Mapping[str, Any]], aligned: Iterable[Mapping[str, Any]], catalogue: Catalogue, each: int = 2
) -> tuple[list[dict], dict[str, int]]:
    """Rows of both models side by side, `each` of every kind of `KINDS` chosen by hash, and the size of every kind.

    Both are rows of prediction files, in raw ids; a row has "kind", and the five first answers as "sft" and "aligned".
    """
    others = {(row["user"], row["position"]): row for row in aligned}
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for row in sft:
        other = others.get((row["user"], row["position"]))
        if other is None:
            continue
        before, after = (
            bool(ranked) and is_hit(catalogue, ranked[0], row["target"]) for ranked in (row["ranked"], other["ranked"])
        )
        kind = ("both" if after else "loss") if before else ("gain" if after else "neither")
        found[kind].append({**row, "kind": kind, "sft": row["ranked"][:5], "aligned": other["ranked"][:5]})
    for rows in found.values():
        rows.sort(key=lambda row: seeds.key("report", "examples", row["user"], row["position"]))
    return [row for rows in found.values() for row in rows[:each]], {kind: len(rows) for kind, rows in found.items()}


def is_hit(catalogue: Catalogue, answer: str | None, target: str) -> bool:
    """Whether an answer, None for one that is no item, has the target's title."""
    group_I = catalogue.title_group_I
    return answer is not None and bool(group_I[catalogue.index_of_id(answer)] == group_I[catalogue.index_of_id(target)])


def flags(material: Material) -> list[str]:
    """The settings other than the defaults, as words of a command line."""
    defaults, settings = configuration.flatten(config.default()), configuration.flatten(material.config)
    changed = {key: value for key, value in settings.items() if value != defaults.get(key)}
    written = {k: ",".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in changed.items()}
    return [shlex.quote(f"--config.{key}={value}") for key, value in written.items()]


def settings(material: Material) -> list[tuple[str, str]]:
    """The whole configuration, (dotted key, text)."""
    return flat(material.config)


def versions(material: Material) -> dict[str, str]:
    """Of the code, Python and packages that evaluated."""
    manifest = material.manifests.get("evaluate", {})
    own = {key: manifest[key] for key in ("code", "python") if key in manifest}
    return own | dict(manifest.get("packages", {}))


# ---- numbers and names -----------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Three decimals (one from 100 on), whole numbers with thousands separators, `-` where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "-" if value is None or isinstance(value, float) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def probability(value: float, name: str = "p") -> str:
    return f"{name} < 0.0001" if value < 1e-4 else f"{name} = {value:.3g}"


def interval(cell: Mapping[str, Any], form=number) -> str:
    """`0.448 [0.428, 0.468]`; `-` for an empty cell."""
    if cell.get("value") is None:
        return "-"
    bounds = " [{}, {}]".format(*map(form, cell["ci95"])) if cell.get("ci95") else ""
    return f"{form(cell['value'])}{bounds}"


def name(model: str) -> str:
    return MODELS.get(model, model)


def words(metric: str) -> str:
    return metric.replace("_", " ")


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) rows."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(map(number, value)))]
    return [(prefix, f"{value:g}" if isinstance(value, float) else number(value))]


def _first(sentence: str) -> str:
    """With a capital at its start; `capitalize` would lower the rest."""
    return sentence[:1].upper() + sentence[1:]
