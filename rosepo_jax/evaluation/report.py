"""The report: what the results say, as a table for the terminal, as sentences, as JSON and as one HTML page.

Every number comes from `results.json`; a sentence claims a difference only where the paired test, Holm-corrected when
the correction is there, gives p < 0.05.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from rosepo_jax import config, configuration, seeds
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import plots

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
    "HR@1": ("candidates", "catalogue", "generate"),
    "NDCG@5": ("candidates", "catalogue"),
    "popularity_lift": ("catalogue", "candidates", "generate"),
    "semantic_error_rate": ("catalogue", "candidates", "generate"),
    "valid_ratio": ("generate",),
}
BIASES = ("popularity_lift", "semantic_error_rate", "MGU", "DGU", "gini", "coverage")
CURVES = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "epsilon/mean",
    "validation/HR@1",
    "grad_norm",
)
KINDS = {
    "gain": "aligned right, SFT wrong",
    "loss": "SFT right, aligned wrong",
    "both": "both right",
    "neither": "both wrong",
}


@dataclasses.dataclass(frozen=True)
class Material:
    """What a report is made of; only `results` is required."""

    results: dict  # evaluate/results.json
    predictions: Mapping[str, Mapping[str, list[dict]]] = dataclasses.field(default_factory=dict)  # [protocol][model]
    titles: Sequence[str] = ()  # by item index
    title_group_I: Sequence[int] | np.ndarray = ()  # items of one group have equal titles: each is a hit for the other
    users: Sequence[str] = ()  # raw ids by user index
    histories: Mapping[tuple[int, int], Sequence[int]] = dataclasses.field(default_factory=dict)  # (user, position)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, list[dict]] = dataclasses.field(default_factory=dict)  # rows of metrics.jsonl by stage
    pairs: Mapping[str, list] = dataclasses.field(default_factory=dict)  # columns epsilon, strategy, flipped
    manifests: Mapping[str, dict] = dataclasses.field(default_factory=dict)  # by stage
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Html(str):
    """Markup that is already safe; every other string is escaped on its way into the page."""


# ---- what the results say -------------------------------------------------------------------------------------------


def check(results: Mapping[str, Any]) -> None:
    """Refuses results without protocols, and protocols whose models were counted over different numbers of rows."""
    if not isinstance(results.get("protocols"), Mapping) or not results["protocols"]:
        raise UserError("results.json: no protocols; run `rosepo evaluate` again")
    for name, protocol in results["protocols"].items():
        cells = {model: _cell(results, name, model, "HR@1") for model in protocol["models"]}
        sizes = {model: cell["n"] for model, cell in cells.items() if "n" in cell}
        if len(set(sizes.values())) > 1:
            raise UserError(f"results.json: {name} counts its models over different rows (n: {sizes}); evaluate again")


def headline(results: Mapping[str, Any]) -> dict[str, str]:
    """The protocol each headline metric is taken from: one per metric, so that no column mixes protocols."""
    chosen: dict[str, str] = {}
    for metric, protocols in PLACES.items():
        for protocol in protocols:
            models = results["protocols"].get(protocol, {}).get("models", {})
            if any(_cell(results, protocol, model, metric) for model in models):
                chosen[metric] = protocol
                break
    return chosen


def table(results: Mapping[str, Any]) -> str:
    """The headline table and one line per comparison as plain text, for the terminal."""
    check(results)
    places = headline(results)
    header = ["", *(_words(metric) for metric in places), "n"]
    rows = []
    for model in _models(results):
        cells = {metric: _cell(results, protocol, model, metric) for metric, protocol in places.items()}
        sizes = [cell["n"] for cell in cells.values() if "n" in cell]
        rows.append([_name(model), *(_plain(cell) for cell in cells.values()), number(sizes[0] if sizes else None)])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += ["", f"95 % intervals in brackets. {_sources(results)}"]
    if results.get("comparisons"):
        lines += ["", *(comparison_line(comparison) for comparison in results["comparisons"])]
    return "\n".join(lines)


def comparison_line(comparison: Mapping[str, Any]) -> str:
    """`aligned - SFT, HR@1 (candidates): +0.031 [+0.012, +0.050], p = 0.002, p_holm = 0.004, paired permutation`."""
    parts = [signed(comparison["difference"])]
    if comparison.get("ci95"):
        parts[0] += " [{}, {}]".format(*map(signed, comparison["ci95"]))
    parts += [probability(comparison[key], key) for key in ("p", "p_holm") if comparison.get(key) is not None]
    parts += [comparison["test"]] if comparison.get("test") else []
    names = f"{_name(comparison['a'])} - {_name(comparison['b'])}"
    return f"{names}, {_words(comparison['metric'])} ({comparison['protocol']}): {', '.join(parts)}"


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """What the numbers allow to say of alignment: against SFT, the control, the floors and the oracle; its biases."""
    places = headline(results)
    if "HR@1" not in places:
        return ["No protocol reports HR@1, so nothing can be said about ranking."]
    if not _cell(results, places["HR@1"], "aligned", "HR@1"):
        return ["No aligned model was evaluated.", *_standing(results, places["HR@1"])]
    against_sft = _against(results, places["HR@1"], "sft", "SFT")
    against_more = _against(results, places["HR@1"], "sft_more", "the control (the same steps spent on more SFT)")
    sentences = [sentence for sentence, _ in (against_sft, against_more) if sentence]
    match against_sft[1], against_more[1]:
        case "win", "win":
            sentences.append("The gain is more than the additional steps of training give.")
        case "win", "tie":
            sentences.append("The gain over SFT is not shown to be more than the additional steps of training give.")
        case "win", "loss":
            sentences.append("The gain over SFT is less than the additional steps of training give.")
        case _, "":
            sentences.append("No control was evaluated, so the effect of additional steps of training is unknown.")
    sentences += _standing(results, places["HR@1"])
    for metric in ("popularity_lift", "semantic_error_rate"):
        if metric in places:
            sentences += _shift(results, places[metric], metric)
    return sentences


def _against(results: Mapping[str, Any], protocol: str, rival: str, name: str) -> tuple[str, str]:
    """The sentence on aligned against `rival`, and its outcome: win, tie, loss, untested, or "" without the rival."""
    ours, theirs = (_cell(results, protocol, model, "HR@1") for model in ("aligned", rival))
    if not theirs:
        return "", ""
    values = f"{number(ours['value'])} against {number(theirs['value'])}"
    comparison = _comparison(results, protocol, "HR@1", "aligned", rival)
    if _p(comparison) is None:
        difference = signed(ours["value"] - theirs["value"])
        return f"Aligned and {name} on HR@1: {values} ({difference}); no paired test was made.", "untested"
    evidence = f"{values}, {_evidence(comparison, ours.get('n'))}"
    if not _significant(comparison):
        return f"Alignment does not beat {name} significantly on HR@1: {evidence}.", "tie"
    if comparison["difference"] > 0:
        return f"Alignment beats {name} on HR@1: {evidence}.", "win"
    return f"Alignment is worse than {name} on HR@1: {evidence}.", "loss"


def _standing(results: Mapping[str, Any], protocol: str) -> list[str]:
    """Where SFT and the aligned model stand against the floors and the oracle."""
    sentences = []
    for rival in ("popularity", "cooccurrence", "oracle"):
        theirs = _cell(results, protocol, rival, "HR@1")
        clauses = []
        for model in ("sft", "aligned"):
            ours = _cell(results, protocol, model, "HR@1")
            if ours and theirs:
                comparison = _comparison(results, protocol, "HR@1", model, rival)
                difference = ours["value"] - theirs["value"]
                side = (
                    f"{number(abs(difference))} {'above' if difference > 0 else 'below'}"
                    if difference
                    else "level with"
                )
                verdict = "not tested"
                if _p(comparison) is not None:
                    verdict = _probabilities(comparison) + ("" if _significant(comparison) else ", not significant")
                clauses.append(f"{_name(model)} is {side} it at {number(ours['value'])} ({verdict})")
        if clauses:
            name = _name(rival)
            sentences.append(f"{name[0].upper()}{name[1:]} has HR@1 {number(theirs['value'])}: {'; '.join(clauses)}.")
    return sentences


def _shift(results: Mapping[str, Any], protocol: str, metric: str) -> list[str]:
    """How a bias moved from SFT to the aligned model."""
    ours, theirs = (_cell(results, protocol, model, metric) for model in ("aligned", "sft"))
    if not (ours and theirs):
        return []
    comparison = _comparison(results, protocol, metric, "aligned", "sft")
    values = f"from {number(theirs['value'])} to {number(ours['value'])}"
    name = _words(metric).capitalize()
    if _p(comparison) is None:
        return [f"{name} goes {values} ({protocol}); no paired test was made."]
    evidence = _evidence(comparison, ours.get("n"))
    if not _significant(comparison):
        return [f"{name} does not change significantly: {values} ({protocol}), {evidence}."]
    return [f"{name} {'rises' if comparison['difference'] > 0 else 'falls'} {values} ({protocol}), {evidence}."]


def summary(material: Material) -> dict:
    """The headline figures as JSON: per model and metric value, interval, n and protocol; comparisons; provenance."""
    results = material.results
    check(results)
    places = headline(results)
    return {
        "models": {
            model: {
                metric: {key: cell.get(key) for key in ("value", "ci95", "n")} | {"protocol": protocol}
                for metric, protocol in places.items()
                if (cell := _cell(results, protocol, model, metric))
            }
            for model in _models(results)
        },
        "comparisons": list(results.get("comparisons", ())),
        "verdicts": verdicts(results),
        "protocol_hashes": {name: protocol.get("hash") for name, protocol in results["protocols"].items()},
        "config_hash": material.manifests.get("evaluate", {}).get("resolved_config_hash"),
        "versions": _versions(material),
    }


def examples(
    sft: Iterable[Mapping[str, Any]],
    aligned: Iterable[Mapping[str, Any]],
    title_group_I: Sequence[int] | np.ndarray = (),
    each: int = 2,
) -> tuple[list[dict], dict[str, int]]:
    """Rows of both models side by side, `each` of every kind of `KINDS` chosen by hash, and the size of every kind."""
    others = {(row["user"], row["position"]): row for row in aligned}
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for row in sft:
        other = others.get((row["user"], row["position"]))
        if other is None:
            continue
        before, after = (
            bool(ranked) and _same(title_group_I, ranked[0], row["target"])
            for ranked in (row["ranked"], other["ranked"])
        )
        kind = ("both" if after else "loss") if before else ("gain" if after else "neither")
        found[kind].append({**row, "kind": kind, "sft": row["ranked"][:5], "aligned": other["ranked"][:5]})
    key = seeds.key("report", "examples")
    for rows in found.values():
        rows.sort(key=lambda row: float(seeds.uniform(key, row["user"], row["position"])))
    return [row for rows in found.values() for row in rows[:each]], {kind: len(rows) for kind, rows in found.items()}


# ---- numbers and names ----------------------------------------------------------------------------------------------


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


def _cell(results: Mapping[str, Any], protocol: str, model: str, metric: str) -> dict:
    """The metric's {"value", "ci95", "n", ...}, empty where it is absent or null."""
    cell = results["protocols"].get(protocol, {}).get("models", {}).get(model, {}).get(metric)
    cell = cell if isinstance(cell, Mapping) else {"value": cell}
    return dict(cell) if isinstance(cell.get("value"), int | float) else {}


def _models(results: Mapping[str, Any]) -> list[str]:
    present = {model: None for protocol in results["protocols"].values() for model in protocol["models"]}
    return [model for model in MODELS if model in present] + [model for model in present if model not in MODELS]


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


def _probabilities(comparison: Mapping[str, Any]) -> str:
    found = {name: comparison.get(key) for key, name in (("p", "p"), ("p_holm", "Holm-corrected p"))}
    return ", ".join(probability(value, name) for name, value in found.items() if value is not None)


def _evidence(comparison: Mapping[str, Any], n: int | None) -> str:
    bounds = "95 % interval {} to {}, ".format(*map(signed, comparison["ci95"])) if comparison.get("ci95") else ""
    size = "" if n is None else f", n = {number(n)}"
    return f"a difference of {signed(comparison['difference'])} ({bounds}{_probabilities(comparison)}{size})"


def _plain(cell: Mapping[str, Any]) -> str:
    if not cell:
        return "-"
    bounds = " [{}, {}]".format(*map(number, cell["ci95"])) if cell.get("ci95") else ""
    return f"{number(cell['value'])}{bounds}"


def _sources(results: Mapping[str, Any]) -> str:
    """Which column comes from which protocol, over how many rows."""
    columns: dict[str, list[str]] = {}
    for metric, protocol in headline(results).items():
        columns.setdefault(protocol, []).append(_words(metric))
    return "; ".join(
        f"{', '.join(metrics)}: {protocol}, n = {number(results['protocols'][protocol].get('n'))}"
        for protocol, metrics in columns.items()
    )


def _name(model: str) -> str:
    return MODELS.get(model, model)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _versions(material: Material) -> dict[str, str]:
    manifest = material.manifests.get("evaluate", {})
    own = {key: manifest[key] for key in ("code", "python") if key in manifest}
    return own | dict(manifest.get("packages", {}))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) rows."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(map(number, value)))]
    return [(prefix, f"{value:g}" if isinstance(value, float) else number(value))]


# ---- the page -------------------------------------------------------------------------------------------------------


def html(material: Material) -> str:
    """The whole report as one page: no scripts, no external resources, the same bytes for the same material."""
    check(material.results)
    data, manifest = material.config.get("data", {}), material.manifests.get("evaluate", {})
    facts = {
        "data": f"{data.get('source', '')} {data.get('path', '')}".strip(),
        "config": manifest.get("resolved_config_hash"),
    }
    facts["code"] = manifest.get("code")
    subtitle = " · ".join(f"{name}: {value}" for name, value in facts.items() if value)
    sections = [
        ("Result", _headline_section(material)),
        ("All metrics by protocol", _protocol_section(material)),
        ("True preferences", _truth_section(material)),
        ("Popularity of the true item", _decile_section(material)),
        ("Biases", _bias_section(material)),
        ("Examples", _example_section(material)),
        ("Learning curves", _curve_section(material)),
        ("Preference pairs", _pair_section(material)),
        ("Data", _facts_table(material.statistics)),
        ("How it was made", _provenance_section(material)),
    ]
    body = "".join(f"<section>\n<h2>{title}</h2>\n{content}</section>\n" for title, content in sections if content)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>rosepo_jax report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>rosepo_jax report</h1>\n<p>{escape(subtitle)}</p>\n{body}</main>\n</body>\n</html>\n"
    )


def _headline_section(material: Material) -> str:
    results = material.results
    places = headline(results)
    models = _models(results)
    rows = [[_name(model), *(_interval(_cell(results, places[m], model, m)) for m in places)] for model in models]
    cells: dict[str, dict[str, dict]] = {
        metric: {model: cell for model in models if (cell := _cell(results, places[metric], model, metric))}
        for metric in ("HR@1", "NDCG@5")
        if metric in places
    }
    comparisons = [
        [
            f"{_name(c['a'])} - {_name(c['b'])}",
            c["protocol"],
            _words(c["metric"]),
            _signed_interval(c),
            *(probability(c[key], "").strip("= ") if c.get(key) is not None else "-" for key in ("p", "p_holm")),
            c.get("test", ""),
        ]
        for c in results.get("comparisons", ())
    ]
    return (
        "<ul>"
        + "".join(f"<li>{escape(sentence)}</li>\n" for sentence in verdicts(results))
        + "</ul>\n"
        + _table(["model", *map(_words, places)], rows, f"95 % intervals in brackets. {_sources(results)}.")
        + (_figure(plots.intervals(cells, MODELS, "Headline metrics with 95 % intervals by model")) if cells else "")
        + _table(["models", "protocol", "metric", "difference", "p", "p, Holm", "test"], comparisons, "Paired tests")
    )


def _protocol_section(material: Material) -> str:
    parts = []
    for name, protocol in material.results["protocols"].items():
        models = [model for model in _models(material.results) if model in protocol["models"]]
        metrics = {metric: None for model in models for metric in protocol["models"][model]}
        cells = {metric: [_cell(material.results, name, model, metric) for model in models] for metric in metrics}
        rows = [
            [_words(metric), *(_interval(cell, protocol.get("n")) for cell in row)]
            for metric, row in cells.items()
            if any(row)
        ]
        facts = "; ".join(f"{_words(key)}: {text}" for key, text in _flat({**protocol, "models": {}}))
        parts.append(f"<h3>{escape(name)}</h3>\n{_table(['metric', *map(_name, models)], rows, facts)}")
    return "".join(parts)


def _truth_section(material: Material) -> str:
    truth = material.results.get("truth")
    if not truth:
        return ""
    scalars = [[_words(key), _interval(_as_cell(value))] for key, value in truth.items() if key != "models"]
    models = truth.get("models", {})
    metrics = list({metric: None for row in models.values() for metric in row})
    rows = [[_name(model), *(_interval(_as_cell(row.get(name))) for name in metrics)] for model, row in models.items()]
    return _table(["quantity", "value"], scalars, "ε against the true label noise of the embedded world") + _table(
        ["model", *map(_words, metrics)], rows, "Against the true preferences of the embedded world"
    )


def _decile_section(material: Material) -> str:
    for name, protocol in material.results["protocols"].items():
        series = {model: M["HR@1_by_decile"] for model, M in protocol["models"].items() if M.get("HR@1_by_decile")}
        if series:
            first = next(iter(series.values()))
            rows = [
                [_name(model), *(number(cell.get("value")) for cell in series[model])]
                for model in _models(material.results)
                if model in series
            ]
            rows.append(["n", *(number(cell.get("n")) for cell in first)])
            if any(cell.get("counts") for cell in first):
                counts = ("-".join(map(number, sorted(set(cell.get("counts") or ())))) for cell in first)
                rows.append(["train counts", *counts])
            return _figure(plots.deciles(series, MODELS, "HR@1 by popularity decile of the true item")) + _table(
                ["decile", *range(1, len(first) + 1)],
                rows,
                f"HR@1 ({name}) by train count of the true item, 1 = least popular",
            )
    return ""


def _bias_section(material: Material) -> str:
    results = material.results
    protocol = headline(results).get("popularity_lift", next(iter(results["protocols"])))
    shown = ("sft", "sft_more", "aligned")
    cells = {
        _words(metric): column
        for metric in BIASES
        if (column := {model: cell for model in shown if (cell := _cell(results, protocol, model, metric))})
    }
    if not cells:
        return ""
    return f"<p>Protocol: {escape(protocol)}. Bars carry 95 % intervals where there are any.</p>\n" + _figure(
        plots.bars(cells, MODELS, "Popularity and genre biases of SFT and the aligned model")
    )


def _example_section(material: Material) -> str:
    parts = []
    for protocol, models in material.predictions.items():
        if "sft" not in models or "aligned" not in models:
            continue
        rows, sizes = examples(models["sft"], models["aligned"], material.title_group_I)
        counts = "; ".join(f"{KINDS[kind]}: {number(size)}" for kind, size in sizes.items())
        body = [
            [
                KINDS[row["kind"]],
                _label(material.users, row["user"]),
                _list(material, material.histories.get((row["user"], row["position"]), ()), None),
                _label(material.titles, row["target"]),
                _list(material, row["sft"], row["target"]),
                _list(material, row["aligned"], row["target"]),
            ]
            for row in rows
        ]
        header = ["", "user", "history, oldest first", "true item", "SFT, top 5", "aligned, top 5"]
        caption = f"Users chosen by hash among all of a kind, not by hand. First place right or wrong: {counts}."
        parts.append(f"<h3>{escape(protocol)}</h3>\n{_table(header, body, caption, css='words')}")
    return "".join(parts)


def _curve_section(material: Material) -> str:
    parts = []
    for stage, rows in material.metrics.items():
        present = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
        wanted = [name for name in CURVES if name in present]
        wanted += sorted(name for name in present if name.startswith("validation/") and name not in wanted)
        if wanted:
            parts.append(
                f"<h3>{escape(stage)}</h3>\n{_figure(plots.curves(rows, wanted, f'Learning curves of {stage}'))}"
            )
    return "".join(parts)


def _pair_section(material: Material) -> str:
    """ε, strategies and flips of the stored pairs; the first rejected item is the one that a flip exchanges."""
    epsilon_rows = [[value for value in row or () if plots.finite(value)] for row in material.pairs.get("epsilon", ())]
    strategies = [name for row in material.pairs.get("strategy", ()) for name in row or ()]
    flipped_B = np.array(material.pairs.get("flipped", ()), bool)
    epsilons = np.array([value for row in epsilon_rows for value in row])
    facts: dict[str, Any] = {
        f"share of {name}": strategies.count(name) / len(strategies) for name in sorted(set(strategies))
    }
    picture = ""
    if flipped_B.any():
        facts["share of flipped labels"] = flipped_B.mean().item()
    if len(epsilons):
        facts |= {"mean ε": epsilons.mean().item(), "share of ε ≥ 0.5": (epsilons >= 0.5).mean().item()}
        samples = {"all pairs": epsilons}
        if flipped_B.any() and not flipped_B.all():
            first_B = np.array([row[0] for row in epsilon_rows])
            samples = {"true label": first_B[~flipped_B], "flipped label": first_B[flipped_B]}
        picture = _figure(plots.epsilons(samples, "Histogram of the smoothing factor"))
    return picture + _facts_table(facts)


def _provenance_section(material: Material) -> str:
    rows = []
    for stage, manifest in material.manifests.items():
        device = manifest.get("device") or {}
        machine = f"{device.get('count', '-')} × {device.get('kind', '-')}"
        seconds = "-" if manifest.get("seconds") is None else f"{manifest['seconds']:,.0f}"
        rows.append([stage, seconds, machine, *(manifest.get(key, "-") for key in ("config_hash", "identity", "code"))])
    defaults = configuration.flatten(config.default())
    settings = configuration.flatten(material.config)
    flags = "\n".join(_flag(key, value) for key, value in settings.items() if value != defaults.get(key))
    command = "rosepo run --config=WORKDIR/config.json --workdir=ANOTHER_WORKDIR"
    return (
        _table(["stage", "seconds", "device", "config hash", "identity", "code"], rows, "Stages", css="words")
        + f"<h3>Command that repeats it</h3>\n<pre>{command}</pre>\n"
        + (f"<h3>Settings other than the defaults</h3>\n<pre>{escape(flags)}</pre>\n" if flags else "")
        + _details("Versions", _facts_table(_versions(material)))
        + _details("Whole configuration", _facts_table(material.config))
    )


def _flag(key: str, value: Any) -> str:
    return shlex.quote(f"--config.{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}")


def _details(title: str, content: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n{content}</details>\n" if content else ""


def _as_cell(value: Any) -> dict:
    return dict(value) if isinstance(value, Mapping) else {"value": value}


def _interval(cell: Mapping[str, Any], n: int | None = None) -> Html:
    """A value, its interval, and its own n where that differs from the protocol's."""
    bounds = " <small>[{}, {}]</small>".format(*map(number, cell["ci95"])) if cell.get("ci95") else ""
    size = f" <small>n = {number(cell['n'])}</small>" if n is not None and cell.get("n", n) != n else ""
    return Html(f"{escape(number(cell.get('value')))}{bounds}{size}")


def _signed_interval(comparison: Mapping[str, Any]) -> Html:
    bounds = " <small>[{}, {}]</small>".format(*map(signed, comparison["ci95"])) if comparison.get("ci95") else ""
    return Html(f"{signed(comparison['difference'])}{bounds}")


def _same(title_group_I: Sequence[int] | np.ndarray, a: int, b: int) -> bool:
    return a == b or (min(a, b) >= 0 and max(a, b) < len(title_group_I) and title_group_I[a] == title_group_I[b])


def _label(names: Sequence[str], index: int) -> str:
    return names[index] if 0 <= index < len(names) else f"#{index}"


def _list(material: Material, items: Iterable[int], target: int | None) -> Html:
    rows = []
    for item in items:
        text = escape(_label(material.titles, item))
        hit = target is not None and _same(material.title_group_I, item, target)
        rows.append(f"<li><mark>✓ {text}</mark></li>" if hit else f"<li>{text}</li>")
    return Html(f"<ol>{''.join(rows)}</ol>" if rows else "-")


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = "", css: str = "numbers") -> str:
    """An HTML table whose first column names the row; strings are escaped, `Html` is not; nothing without rows."""
    if not rows:
        return ""

    def text(cell: Any) -> str:
        return cell if isinstance(cell, Html) else escape(str(cell))

    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    title = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
    return (
        f'<figure>\n{title}<div class="scroll"><table class="{css}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n</figure>\n"
    )


def _facts_table(facts: Any, caption: str = "") -> str:
    return _table(["", "value"], _flat(facts) if facts else [], caption, css="facts")


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>\n"


CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --paper: #fdfdfc; --soft: #5d6670; --line: #d9dcdf; --hit: #fbe3a6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6e9; --paper: #15181b; --soft: #9aa4ae; --line: #343a40; --hit: #5c4a12 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 5rem }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem }
h1 + p, figcaption, small { color: var(--soft) }
li { margin: .2rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
figcaption { padding-bottom: .4rem; font-size: .8125rem }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--soft); vertical-align: bottom }
tbody th { font-weight: 500; white-space: nowrap }
.numbers td { white-space: nowrap }
.facts td { overflow-wrap: anywhere }
.words th, .words td { white-space: normal; min-width: 6rem }
.words ol { margin: 0; padding-left: 1.2rem; font-size: .8125rem; line-height: 1.4 }
mark { background: var(--hit); color: inherit; padding: 0 .15rem; border-radius: 2px; font-weight: 600 }
figure { margin: 1rem 0 }
svg { width: 100%; height: auto; display: block; font-family: system-ui, sans-serif }
pre { overflow-x: auto; font-size: .8125rem; padding: .75rem; border: 1px solid var(--line); border-radius: 4px }
summary { cursor: pointer; margin: 1rem 0 }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --hit: #eee; color-scheme: light }
  body { font-size: 10.5pt }
  main { max-width: none; padding: 0 }
  .scroll { overflow: visible }
  figure, tr, h2, h3 { break-inside: avoid }
  h2, h3 { break-after: avoid }
  details::details-content { content-visibility: visible; display: block }
}
"""
