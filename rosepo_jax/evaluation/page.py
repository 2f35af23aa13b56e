"""The report as one HTML page: no scripts, no external resources, the same bytes for the same material.

`html` makes the page of a run; `document`, `table` and the other parts also make that of a comparison.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from rosepo_jax.evaluation import plots, report
from rosepo_jax.evaluation.report import Material, as_cell, cell, flat, name, number, probability, signed, words

ROLES = {
    "popularity": "most frequent in training",
    "cooccurrence": "seen with the history in training",
    "oracle": "SASRec, the preference oracle",
    "sft": "fine-tuned, the reference",
    "sft_more": "control: alignment's steps as more SFT",
    "aligned": "after preference optimisation",
}
ASKED = {
    "candidates": "every title of the row's frozen list is scored",
    "windows": "every title of the row's frozen list is scored, at every step of the test users",
    "catalogue": "the best titles of the whole catalogue; none of the history",
    "generate": "free greedy text; its first line must equal a title",
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
CLASSES = {  # metric -> what its classes are
    "HR@1_by_decile": "decile of the true item's train count, 1 = least popular",
    "HR@1_by_history": "history items in the prompt",
}
ORACLE = {
    "tau": "temperature τ, fitted on validation",
    "ECE": "ECE of P(true item liked more than another candidate), with τ",
    "ECE_at_tau_1": "the same with τ = 1",
    "pairs": "pairs of test rows",
}
TESTS = (
    "Same rows, same users. Holm and Benjamini-Hochberg adjust over all tests of this run, those of another system "
    "over its own. Detectable: the true difference that is found in 4 of 5 such experiments."
)
NUMERIC = re.compile(r"[+−-]?\d|< \d")


class Html(str):
    """Markup that is already safe; every other string is escaped on its way into the page."""


# ---- the page of a run -----------------------------------------------------------------------------------------------


def html(material: Material) -> str:
    """The whole report.

    Errors: UserError for results without protocols, and for models of one protocol counted over different rows.
    """
    results = material.results
    report.check(results)
    data, manifest = material.config.get("data", {}), material.manifests.get("evaluate", {})
    source = str(data.get("path") or "").rstrip("/").rpartition("/")[2] or data.get("source", "")
    facts = {
        "source": data.get("source"),
        "seed": material.config.get("seed"),
        "evaluated": str(manifest.get("started", ""))[:10],
        "code": manifest.get("code"),
    }
    sections = {
        "Paired tests": comparisons(results.get("comparisons", ()), TESTS),
        "Beside published figures": _published(results),
        "All metrics": _protocols(results),
        "True preferences": _truth(results),
        "Which rows are hit": _classes(results),
        "Does it read its prompt?": _probes(results),
        "Biases": _biases(results),
        "Calibration": _calibration(results),
        "Examples": _examples(material),
        "Learning curves": _curves(material),
        "Speed and memory": _speed(material),
        "Preference pairs": _pairs(material),
        "Data": _data(material),
        "How it was made": _provenance(material),
    }
    lead = (
        notice("Known defects of these data", results.get("defects", ()))
        + asked(results["protocols"], "Every model")
        + notice("Left out", results.get("notes", ()))
        + _headline(results)
        + _verdicts(results)
        + _plot(results)
    )
    return document(f"Recommendations on {source}" if source else "Recommendations", facts, lead, sections)


def _headline(results: Mapping[str, Any]) -> str:
    places = report.headline(results)
    sizes = {metric: results["protocols"][protocol].get("n") for metric, protocol in places.items()}
    rows = [
        [
            _model(model),
            *(figures(cell(results, place, model, metric), sizes[metric]) for metric, place in places.items()),
        ]
        for model in report.models(results)
    ]
    rows.append(["rows (n)", *map(number, sizes.values())])
    header = ["model", *(under(words(metric), place) for metric, place in places.items())]
    caption = "In brackets: 95 % intervals. Below a metric: the protocol it is measured by. "
    return table(header, rows, caption + report.detectable(results))


def asked(protocols: Mapping[str, Mapping[str, Any]], who: str) -> str:
    """What `who` was asked, and of how many rows: a line a protocol."""
    lines = []
    for protocol, found in protocols.items():
        size = found.get("candidates") or found.get("titles")
        drawn = f", drawn {found['sampling']}" if found.get("sampling") else ""
        question = ASKED.get(protocol, "") + (f" ({number(size)} titles{drawn})" if size else "")
        lines.append(
            f"<li><b>{escape(protocol)}</b>, {prose('n = ' + number(found.get('n')))}: {escape(question)}</li>\n"
        )
    return f"<p>{escape(who)} answers the same rows.</p>\n<ul>\n{''.join(lines)}</ul>\n"


def _verdicts(results: Mapping[str, Any]) -> str:
    blocks = "".join(
        f"<div>\n<h3>{escape(report.OUTCOMES[outcome])}</h3>\n{listed(sentences)}</div>\n"
        for outcome, sentences in report.verdicts(results).items()
    )
    return f'<h2 id="verdicts">What may be said</h2>\n<div class="verdicts">\n{blocks}</div>\n'


def _plot(results: Mapping[str, Any]) -> str:
    places = report.headline(results)
    panels: dict[str, dict[str, dict]] = {
        metric: {m: found for m in report.models(results) if (found := cell(results, places[metric], m, metric))}
        for metric in ("HR@1", "NDCG@5")
        if metric in places
    }
    svg = plots.intervals(panels, report.MODELS, "Dots with 95 % intervals, one a model")
    protocols = ", ".join(dict.fromkeys(places[metric] for metric in panels))
    return figure(svg, f"Dots with 95 % intervals; protocol {protocols}.", "panels wide")


def _published(results: Mapping[str, Any]) -> str:
    printed = results.get("published")
    ours = [
        [model, figures(hits), figures(valid), number(hits.get("n")), how]
        for model, how, hits, valid in report.published_rows(results)
    ]
    return published(printed, {"This run": ours}) if printed else ""


def published(printed: Mapping[str, Any], ours: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A published table as printed, then `ours`: title -> rows of model, HR@1, valid ratio, n and how it was asked."""
    theirs = [
        [row["model"], figures(hits := as_cell(row.get("HR@1"))), figures(as_cell(row.get("valid_ratio"))),
         number(hits.get("n")), row.get("source", "")]
        for row in printed["rows"]
    ]  # fmt: skip
    bodies = {f"{printed['title']}, as printed (n = {number(printed['n'])})": theirs, **ours}
    caption = "Not one experiment: other candidate lists, other sizes of models. No brackets: no share of n rows."
    return (
        f"<p>{escape(printed.get('how', ''))}</p>\n"
        + table(["model", "HR@1", "valid ratio", "n", "source, or how it was asked"], bodies, caption)
        + notice("Known defects of the published figures", printed.get("defects", ()))
    )


def _protocols(results: Mapping[str, Any]) -> str:
    """A table a protocol, its metrics by group."""
    explained = {metric: text for group in report.GROUPS.values() for metric, text in group.items()}
    parts = []
    for protocol, found in results["protocols"].items():
        present = [model for model in report.models(results) if model in found["models"]]
        cells = {
            metric: row
            for metric in {metric: None for model in present for metric in found["models"][model]}
            if any(row := [cell(results, protocol, model, metric) for model in present])
        }
        bodies = {
            group: [
                [under(words(metric), explained.get(metric, "")), *(figures(c, found.get("n")) for c in cells[metric])]
                for metric in metrics
            ]
            for group, metrics in report.grouped(cells).items()
        }
        facts = " · ".join(f"{words(key)} {text}" for key, text in flat({**found, "models": {}}))
        question = f" <small>{escape(ASKED[protocol])}</small>" if protocol in ASKED else ""
        parts.append(f"<h3>{escape(protocol)}{question}</h3>\n{table(['metric', *map(name, present)], bodies, facts)}")
    return "".join(parts)


def _truth(results: Mapping[str, Any]) -> str:
    truth = results.get("truth")
    if not truth:
        return ""
    scalars = [[words(key), figures(as_cell(value))] for key, value in truth.items() if key != "models"]
    found = truth.get("models", {})
    metrics = list({metric: None for row in found.values() for metric in row})
    rows = [[name(model), *(figures(as_cell(row.get(metric))) for metric in metrics)] for model, row in found.items()]
    return table(["model", *map(words, metrics)], rows, "Against the true preferences of the embedded world.") + table(
        ["quantity", "value"], scalars, "ε against the true label noise of the embedded world."
    )


def _classes(results: Mapping[str, Any]) -> str:
    """HR@1 by popularity of the true item and by length of the history, of the first protocol that has it."""
    parts = []
    for metric, meaning in CLASSES.items():
        for protocol, found in results["protocols"].items():
            series = {
                model: found["models"][model][metric]
                for model in report.models(results)
                if found["models"].get(model, {}).get(metric)
            }
            if series:
                parts.append(_by_class(series, metric, meaning, protocol))
                break
    return "".join(parts)


def _by_class(series: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, meaning: str, protocol: str) -> str:
    bins = list(zip(*series.values(), strict=True))
    ticks = [str(row[0]["decile"]) if "decile" in row[0] else _span(row[0]["history"]) for row in bins]
    rows = [
        [tick, number(row[0].get("n")), _span(row[0].get("counts") or ()) or "-", *(figures(as_cell(c)) for c in row)]
        for tick, row in zip(ticks, bins, strict=True)
    ]
    if len(rows) < 2:
        return ""  # one class is the whole table of metrics again
    title = "HR@1 by popularity of the true item" if metric == "HR@1_by_decile" else "HR@1 by length of the history"
    return (
        f"<h3>{title} <small>{escape(protocol)}</small></h3>\n"
        + figure(plots.by_class(series, ticks, report.MODELS, title, meaning))
        + table(["class", "n", "train counts", *map(name, series)], rows, f"Class: {meaning}.")
    )


def _span(ends: Iterable[int]) -> str:
    return "–".join(map(number, sorted(set(ends))))


def _probes(results: Mapping[str, Any]) -> str:
    foreign, orders, shares = [], [], {}
    for model, probes in results.get("probes", {}).items():
        if found := probes.get("foreign_history"):
            cells = (as_cell(found.get(key)) for key in ("HR@1_own", "HR@1", "popularity"))
            foreign.append([name(model), *map(figures, cells), number(found["n"])])
        if found := probes.get("order"):
            rates = " · ".join(map(number, found["HR@1"]))
            orders.append([name(model), rates, figures(as_cell(found["changed"])), number(found["n"])])
            shares[model] = found["slot_share"]
    return (
        table(
            ["model", "own history", "another user's history", "popularity", "n"],
            foreign,
            "HR@1. A model that ranks by the history falls to about the popularity floor with another user's; one that "
            "stays above it gets its hits elsewhere.",
        )
        + table(
            ["model", "HR@1 in each order", "first answer changes", "n"],
            orders,
            "The same candidates in the prompt, in several orders: a model that reads them gives the same answer.",
        )
        + figure(
            plots.slots(shares, report.MODELS, "Share of first answers by slot of the shown list"),
            "Share of first answers by slot, over all orders; dashed: where place does not matter.",
        )
    )


def _biases(results: Mapping[str, Any]) -> str:
    protocol = report.headline(results).get("popularity_lift", next(iter(results["protocols"])))
    panels = {
        words(metric): column
        for metric in BIASES
        if (column := {m: c for m in ("sft", "sft_more", "aligned") if (c := cell(results, protocol, m, metric))})
    }
    svg = plots.intervals(panels, report.MODELS, "Biases of SFT, its control and the aligned model")
    return figure(svg, f"Protocol {protocol}; 95 % intervals where there are any.", "panels wide")


def _calibration(results: Mapping[str, Any]) -> str:
    """The oracle's, since epsilon is one of its probabilities; the models' ECE."""
    oracle = results.get("oracle", {})
    protocols = [p for p in results["protocols"] if any(cell(results, p, m, "ECE") for m in report.models(results))]
    rows = [
        [name(model), *(figures(cell(results, p, model, "ECE"), results["protocols"][p].get("n")) for p in protocols)]
        for model in report.models(results)
        if any(cell(results, protocol, model, "ECE") for protocol in protocols)
    ]
    caption = "Of the probability that a model gives its first answer: mean gap to the share that is right, over bins."
    facts = [[ORACLE.get(key, key), number(value)] for key, value in oracle.items()]
    return table(["oracle", "value"], facts) + table(["ECE", *protocols], rows, caption)


def _examples(material: Material) -> str:
    parts, catalogue = [], material.catalogue
    for protocol, models in material.predictions.items():
        if "sft" not in models or "aligned" not in models or catalogue is None:
            continue
        rows, sizes = report.examples(models["sft"], models["aligned"], catalogue)
        counts = "; ".join(f"{report.KINDS[kind]}: {number(size)}" for kind, size in sizes.items())
        body = [
            [
                Html(f"{escape(row['user'])} <small>{escape(report.KINDS[row['kind']])}</small>"),
                _titles(material, row["history"]),
                catalogue.titles[catalogue.index_of_id(row["target"])],
                _titles(material, row["sft"], row["target"]),
                _titles(material, row["aligned"], row["target"]),
            ]
            for row in rows
        ]
        header = ["user", "history, oldest first", "true item", "SFT, top 5", "aligned, top 5"]
        users = ", ".join(row["user"] for row in rows)
        parts.append(
            f"<h3>{escape(protocol)}</h3>\n"
            f"<p>Rows by first answer: {counts}. Shown are users {escape(users)}: of every kind the first two by the "
            "hash of user and position, none by hand.</p>\n" + table(header, body, css="words")
        )
    return "".join(parts)


def _titles(material: Material, ids: Iterable[str | None], target: str | None = None) -> Html:
    catalogue, rows = material.catalogue, []
    assert catalogue is not None
    for id in ids:
        title = "(no item)" if id is None else escape(catalogue.titles[catalogue.index_of_id(id)])
        hit = target is not None and report.is_hit(catalogue, id, target)
        rows.append(f"<li><mark>✓ {title}</mark></li>" if hit else f"<li>{title}</li>")
    return Html(f"<ol>{''.join(rows)}</ol>" if rows else "-")


def _curves(material: Material) -> str:
    parts = []
    for stage, rows in material.metrics.items():
        present = {metric for row in rows for metric, value in row.items() if isinstance(value, int | float)}
        wanted = [metric for metric in CURVES if metric in present]
        wanted += sorted(metric for metric in present if metric.startswith("validation/") and metric not in wanted)
        if wanted:
            svg = plots.curves(rows, wanted, f"Learning curves of {stage}")
            parts.append(f"<h3>{escape(stage)}</h3>\n{figure(svg)}")
    return "".join(parts)


def _speed(material: Material) -> str:
    rows = []
    for stage, lines in material.metrics.items():
        if found := report.speed(lines):
            scaled = (found[metric] / unit if metric in found else None for metric, (_, unit) in report.SPEED.items())
            rows.append([stage, *map(number, scaled)])
    caption = (
        "Median of the log lines; input stall, the share of the time that updates waited for batches: mean. tokens/s: "
        "without padding; useful: their share of all that are processed. MFU: model FLOPs of all tokens processed over "
        "the peak of the devices. Memory: of one device; of CPUs what the program needs."
    )
    rates = table(["stage", *(column for column, _ in report.SPEED.values())], rows, caption)
    return rates + _goodput(material)


def _goodput(material: Material) -> str:
    rows = [
        [stage, number(total), *(f"{value / total:.1%}" for value in seconds.values())]
        for stage, seconds in material.spent.items()
        if (total := sum(seconds.values()))
    ]
    caption = (
        "Where the time went, over all starts of a stage. Goodput is the share of `step`: updates that count. init: "
        "until the first update; data: waiting for batches; evaluation: on validation rows; lost: updates, with what "
        "was done between them, that a start had made since the checkpoint from which the next one went on."
    )
    buckets = next(iter(material.spent.values()), {})
    return table(["stage", "seconds", *buckets], rows, caption)


def _pairs(material: Material) -> str:
    """ε, strategies and flips of the stored pairs; the first rejected item is the one that a flip exchanges."""
    epsilon_rows = [[value for value in row or () if plots.finite(value)] for row in material.pairs.get("epsilon", ())]
    strategies = [strategy for row in material.pairs.get("strategy", ()) for strategy in row or ()]
    flipped_B = np.array(material.pairs.get("flipped", ()), bool)
    epsilons = np.array([value for row in epsilon_rows for value in row])
    facts: dict[str, Any] = {
        f"share of {strategy}": strategies.count(strategy) / len(strategies) for strategy in sorted(set(strategies))
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
        picture = figure(plots.epsilons(samples, "Histogram of the smoothing factor"))
    return picture + facts_table(facts)


def _data(material: Material) -> str:
    statistics = material.statistics
    chief = ("users", "items", "interactions", "rows", "length", "candidates", "repairs", "dropped")
    facts = {key: statistics[key] for key in chief if statistics.get(key)}
    rest = {key: value for key, value in statistics.items() if key not in facts and key != "defects"}
    return facts_table(facts) + details("Everything that was measured", facts_table(rest))


def _provenance(material: Material) -> str:
    rows = []
    for stage, manifest in material.manifests.items():
        device = manifest.get("device") or {}
        machine = f"{device.get('count', '-')} × {device.get('kind', '-')}"
        seconds = "-" if manifest.get("seconds") is None else f"{manifest['seconds']:,.0f}"
        rows.append([stage, seconds, machine, *(manifest.get(key, "-") for key in ("config_hash", "identity", "code"))])
    hashes = {f"protocol {protocol}": found.get("hash") for protocol, found in material.results["protocols"].items()}
    flags = "\n".join(report.flags(material))
    return (
        table(["stage", "seconds", "device", "config hash", "identity", "code"], rows, css="facts")
        + facts_table(hashes, "Numbers of one protocol compare only where its hash is the same.")
        + "<h3>Command that repeats it</h3>\n"
        "<pre>rosepo run --config=WORKDIR/config.json --workdir=ANOTHER_WORKDIR</pre>\n"
        + (f"<h3>Settings other than the defaults</h3>\n<pre>{escape(flags)}</pre>\n" if flags else "")
        + details("Versions", facts_table(report.versions(material)))
        + details("Whole configuration", table(["", "value"], report.settings(material), css="facts"))
    )


# ---- parts of a page -------------------------------------------------------------------------------------------------


def document(title: str, facts: Mapping[str, Any], lead: str, sections: Mapping[str, str]) -> str:
    """A page: title, a line of facts, contents, what matters first, and the sections that are not empty."""
    shown = {f"s{place}": (heading, content) for place, (heading, content) in enumerate(sections.items()) if content}
    contents = "".join(f'<li><a href="#{id}">{escape(heading)}</a></li>' for id, (heading, _) in shown.items())
    body = "".join(
        f'<section>\n<h2 id="{id}">{escape(heading)}</h2>\n{content}</section>\n'
        for id, (heading, content) in shown.items()
    )
    said = {key: str(value) for key, value in facts.items() if value not in (None, "")}
    line = "".join(f"<span>{escape(key)} <b>{escape(value)}</b></span> " for key, value in said.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="facts-line">{line}</p>\n'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n</header>\n{lead}{body}</main>\n</body>\n</html>\n'
    )


def table(
    header: Sequence[Any],
    rows: Sequence[Sequence[Any]] | Mapping[str, Sequence[Sequence[Any]]],
    caption: str = "",
    css: str = "plain",
) -> str:
    """A table whose first column names the row, in one body or in several with a title; nothing without rows.

    Columns that say nothing ("-" throughout) are left out, numbers stand right. Strings are escaped, `Html` is not.
    """
    bodies = rows if isinstance(rows, Mapping) else {"": rows}
    everything = [row for body in bodies.values() for row in body]
    if not everything:
        return ""
    said = {c: [str(row[c]) for row in everything if row[c] not in ("-", "")] for c in range(1, len(header))}
    kept = [0, *(c for c, words in said.items() if words)]
    kind = {c: ' class="n"' if all(map(NUMERIC.match, said[c])) else "" for c in kept[1:]}
    head = "".join(f'<th scope="col"{kind.get(c, "")}>{_text(header[c])}</th>' for c in kept)
    body = ""
    for title, lines in bodies.items():
        if title and lines:
            body += f'<tbody>\n<tr><th scope="rowgroup" colspan="{len(kept)}">{_text(title)}</th></tr>\n'
        elif lines:
            body += "<tbody>\n"
        for row in lines:
            cells = "".join(f"<td{kind[c]}>{_text(row[c])}</td>" for c in kept[1:])
            body += f'<tr><th scope="row">{_text(row[0])}</th>{cells}</tr>\n'
        body += "</tbody>\n" if lines else ""
    below = f"<figcaption>{prose(caption)}</figcaption>\n" if caption else ""
    return (
        '<figure>\n<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f'<table class="{css}">\n'
        f"<thead><tr>{head}</tr></thead>\n{body}</table></div>\n{below}</figure>\n"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def comparisons(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """The table of paired tests; the name of the test stands below it where there is only one."""
    tests = list(dict.fromkeys(row["test"] for row in rows if row.get("test")))
    body = [
        [
            f"{name(row['a'])} − {name(row['b'])}",
            under(words(row["metric"]), row["protocol"]),
            figures({**row, "value": row["difference"]}, form=signed),
            *(_chance(row.get(key)) for key in ("p", "p_holm", "q_bh", "p_mcnemar")),
            number(row.get("n")),
            number(row.get("detectable")),
            row.get("test", "-") if len(tests) > 1 else "-",
        ]
        for row in rows
    ]
    header = ["models", "metric", "difference", "p", "p, Holm", "q, BH", "p, McNemar", "n", "detectable", "test"]
    only = f"p: {tests[0]} test. " if len(tests) == 1 else ""
    return table(header, body, only + caption)


def facts_table(facts: Any, caption: str = "") -> str:
    return table(["", "value"], flat(facts) if facts else [], caption, css="facts")


def figure(svg: str, caption: str = "", css: str = "panels") -> str:
    """The panels of a plot in as many columns as fit, fewer of "panels wide"; nothing without a plot."""
    below = f"<figcaption>{prose(caption)}</figcaption>\n" if caption else ""
    return f'<figure>\n<div class="{css}">{svg}</div>\n{below}</figure>\n' if svg else ""


def notice(title: str, sentences: Iterable[str]) -> str:
    """Something that must not be missed."""
    content = listed(sentences)
    return f'<aside class="notice">\n<p><b>{escape(title)}</b></p>\n{content}</aside>\n' if content else ""


def listed(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{prose(sentence)}</li>\n" for sentence in sentences)
    return f"<ul>\n{items}</ul>\n" if items else ""


def prose(sentence: str) -> str:
    """Escaped, and no line ends inside `p = 0.02` or `[0.1, 0.2]`."""
    joined = re.sub(r" [=<] |(?<=\d), (?=[+-]?[\d.]+\])", lambda match: match[0].replace(" ", "\u00a0"), sentence)
    return escape(joined)


def details(title: str, content: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n{content}</details>\n" if content else ""


def figures(cell: Mapping[str, Any], n: int | None = None, form=number) -> str:
    """A value, its interval below it, and its own n where that differs from the protocol's."""
    if cell.get("value") is None:
        return "-"
    bounds = "[{}, {}]".format(*map(form, cell["ci95"])) if cell.get("ci95") else ""
    small = f" <small>{escape(bounds)}</small>" if bounds else ""
    return Html(f"{escape(form(cell['value']))}{small}{own_n(cell, n)}".replace("-", "−"))


def own_n(cell: Mapping[str, Any], n: int | None) -> str:
    return f" <small>n = {escape(number(cell['n']))}</small>" if n is not None and cell.get("n", n) != n else ""


def under(text: str, small: str) -> Html:
    return Html(f"{escape(text)} <small>{escape(small)}</small>" if small else escape(text))


def _model(model: str) -> Html:
    return under(name(model), ROLES.get(model, "another system"))


def _chance(p: float | None) -> str:
    return "-" if p is None else probability(p, "").strip("= ")


CSS = """
:root {
  color-scheme: light dark; --ink: #1c2127; --paper: #fcfcfb; --soft: #59626c; --line: #d8dce0; --faint: #f2f3f3;
  --hit: #fbe3a6; --warn: #b7791f; --link: #1f5fae
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e2e5e9; --paper: #15181c; --soft: #9ca6b0; --line: #343b42; --faint: #1d2126;
    --hit: #5c4a12; --warn: #d9a13f; --link: #82b4f0
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem }
p, ul { max-width: 46rem }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3.25rem 0 .9rem }
section > h2 { padding-top: 1.1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; line-height: 1.4; margin: 2rem 0 .5rem }
h3 small { font-weight: 400 }
small, figcaption, .note, .facts-line { color: var(--soft) }
small { font-size: .8125em }
.note { font-size: .875rem; margin: .4rem 0 }
.facts-line { margin: .4rem 0 0; font-size: .875rem; max-width: none; overflow-wrap: anywhere }
.facts-line span { margin-right: 1.25rem }
.facts-line b { font-weight: 500; color: var(--ink) }
a { color: var(--link); text-underline-offset: .15em }
nav ul { list-style: none; padding: 0; margin: 1.1rem 0 0; max-width: none; font-size: .875rem }
nav li { display: inline-block; margin: 0 1.1rem .3rem 0 }
ul { padding-left: 1.15rem; margin: .4rem 0 }
li { margin: .25rem 0 }
.notice { border-left: 3px solid var(--warn); padding: .1rem 0 .1rem 1rem; margin: 1.5rem 0; font-size: .9375rem }
.notice p { margin: 0 }
.verdicts { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
.verdicts h3 { margin-top: .5rem }
.verdicts ul { font-size: .9375rem }
figure { margin: 1.25rem 0 }
figcaption { margin-top: .5rem; font-size: .8125rem; max-width: 46rem; overflow-wrap: anywhere }
.panels { display: grid; gap: 1.25rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)) }
.panels:has(> svg:only-child) { display: block }
svg { width: 100%; height: auto; display: block; font-family: system-ui, sans-serif }
.scroll { overflow-x: auto }
.scroll:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums }
th, td { padding: .4rem 0 .4rem 1.4rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th:first-child { padding-left: 0; min-width: 6rem }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--soft); vertical-align: bottom }
tbody th { font-weight: 500 }
tbody tr:last-child > * { border-bottom-color: var(--soft) }
th[scope=rowgroup] { padding-top: 1.3rem; font-weight: 600; border-bottom-color: var(--soft) }
th small { display: block; font-weight: 400; max-width: 17rem }
td small { display: block }
.n { text-align: right; white-space: nowrap }
.facts td { overflow-wrap: anywhere; min-width: 3.5rem }
.words td { min-width: 9rem; overflow-wrap: anywhere }
.words ol { margin: 0; padding-left: 1.2rem; font-size: .8125rem }
.words li { margin: 0 0 .15rem }
mark { background: var(--hit); color: inherit; padding: 0 .15rem; border-radius: 2px; font-weight: 600 }
pre { overflow-x: auto; font-size: .8125rem; padding: .75rem; background: var(--faint); border-radius: 4px }
summary { cursor: pointer; margin: 1rem 0 }
@page { size: A4; margin: 16mm 14mm }
@media print {
  :root {
    --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --faint: #fff; --hit: #eee; --warn: #777; --link: #000;
    color-scheme: light
  }
  body { font-size: 9.5pt; line-height: 1.4 }
  main { max-width: none; padding: 0 }
  nav, details { display: none }
  h1 { font-size: 17pt }
  h2 { font-size: 12.5pt; margin-top: 1.6rem }
  h3 { font-size: 10.5pt; margin-top: 1.1rem }
  table, .words ol { font-size: 7.5pt }
  th, td { padding: .22rem 0 .22rem .7rem }
  figcaption, .note { font-size: 8pt }
  .scroll { overflow: visible }
  .verdicts { display: block }
  .verdicts ul, .notice { font-size: inherit }
  .panels { gap: .75rem 1rem; grid-template-columns: repeat(auto-fill, minmax(7.5cm, 1fr)) }
  svg, tr, h2, h3, li, .notice { break-inside: avoid }
  h2, h3, thead, tr:has(> [scope=rowgroup]) { break-after: avoid }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
}
"""
