"""Runs side by side: which of them answer the same question, what their seeds say together, tests between them.

Runs whose settings are equal but for the seed are one group: its figures are means over seeds, with every seed's value.
"""

import collections
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from rosepo_jax import files
from rosepo_jax.errors import UserError
from rosepo_jax.evaluation import metrics, page, plots, report, significance

TESTED = {  # protocol -> metrics that are tested between groups
    "candidates": ("HR@1", "NDCG@5"),
    "windows": ("HR@1",),
    "catalogue": ("HR@5",),
    "generate": ("HR@1",),
}
ROW = {"HR@1": (metrics.hit_ratio, 1), "HR@5": (metrics.hit_ratio, 5), "NDCG@5": (metrics.ndcg, 5)}  # of rank_E
BETWEEN = ("aligned", "sft")  # models that are tested between groups, and against each other within one
SAME = "the same in all runs"
TRAINED = ("aligned", "sft", "sft_more")
SEEDED = (*TRAINED, "oracle")  # the others are the same whatever the seed, but for the resampling of intervals
SEMANTIC = ("semantic_error_rate", "semantic_error_rate_random", "diversity")  # measured in the SFT model's own space

Row = tuple[int, str, int, str]  # of a prediction file: row, user, position, target


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluated run. `settings`: its resolved config, flat, without the seed.

    `rank[protocol, model]`: the place of the true item in every row of a prediction file, inf where it is not listed.
    """

    name: str
    seed: int
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    rank: Mapping[tuple[str, str], Mapping[Row, float]] = dataclasses.field(default_factory=dict)

    def has(self, protocol: str) -> bool:
        return protocol in self.results["protocols"]


def compare(runs: Sequence[Run], protocols: Sequence[str] = ()) -> dict:
    """Everything that comparison.json says of at least two runs; `protocols`: only these, default all.

    Errors: UserError when runs have one protocol with different hashes, and for a protocol that no run has.
    """
    present = list({name: None for run in runs for name in run.results["protocols"]})
    if unknown := [name for name in protocols if name not in present]:
        raise UserError(f"--protocols={','.join(unknown)}: no run has it; there are {', '.join(present)}")
    shown = [name for name in present if name in protocols or not protocols]
    for name in shown:
        refuse_different(runs, name)
    differing = [
        key
        for key in {key: None for run in runs for key in run.settings}
        if len({files.hash_json(run.settings.get(key)) for run in runs}) > 1
    ]
    groups = grouped(runs)
    labels = labelled(groups, differing)
    notes = [f"{run.name} has no {name} protocol." for name in shown for run in runs if not run.has(name)]
    by_label = dict(zip(labels, groups, strict=True))
    spaces, remarks = semantic_spaces(by_label, shown)
    found = {
        "protocols": {name: _protocol(runs, name) for name in shown},
        "settings": differing,
        "groups": [
            {
                "label": label,
                "runs": [run.name for run in group],
                "seeds": [run.seed for run in group],
                "settings": {key: group[0].settings.get(key) for key in differing},
                "protocols": {name: _figures(group, name, spaces[name]) for name in shown},
            }
            for label, group in zip(labels, groups, strict=True)
        ],
    }
    for entry, group in zip(found["groups"], groups, strict=True):
        _add_intervals(entry["protocols"], group, shown)
    comparisons, untested = tests(by_label, shown)
    printed = runs[0].results.get("published")
    alike = all(run.results.get("published") == printed for run in runs)
    return found | {
        "comparisons": comparisons,
        "untested": untested,
        "notes": [*notes, *remarks],
        "published": printed if alike else None,
    }


def refuse_different(runs: Sequence[Run], protocol: str) -> None:
    """Refuses runs whose figures of one protocol would share a column and do not answer the same question."""
    by_hash: dict[str, list[str]] = {}
    for run in runs:
        if run.has(protocol):
            by_hash.setdefault(run.results["protocols"][protocol]["hash"], []).append(run.name)
    if len(by_hash) > 1:
        sides = "; ".join(f"{hash} in {', '.join(names)}" for hash, names in by_hash.items())
        raise UserError(
            f"{protocol}: the runs answer different questions (other rows, candidates, items or rules), protocol hash "
            f"{sides}: evaluate them on the same data, or compare others with --protocols=..."
        )


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together; a seed that comes twice starts another group."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        identity, turn = files.hash_json(run.settings), 0
        while any(other.seed == run.seed for other in groups.get((identity, turn), ())):
            turn += 1
        groups.setdefault((identity, turn), []).append(run)
    return list(groups.values())


def labelled(groups: Sequence[Sequence[Run]], differing: Sequence[str]) -> list[str]:
    """The settings that differ, as short as they are clear; names of folders where they say nothing."""
    last = [key.rpartition(".")[2] for key in differing]
    short = {key: word if last.count(word) == 1 else key for key, word in zip(differing, last)}
    if len(groups) == 1:
        return [f"{len(groups[0])} seeds"]
    labels = [", ".join(f"{short[key]}={_shown(group[0].settings.get(key))}" for key in differing) for group in groups]
    return [
        label if label and labels.count(label) == 1 else ", ".join(filter(None, [label, *(run.name for run in group)]))
        for label, group in zip(labels, groups, strict=True)
    ]


Space = tuple[str, ...]  # whose title vectors the runs of a group are measured with, in the order of their seeds


def semantic_spaces(
    groups: Mapping[str, Sequence[Run]], protocols: Sequence[str]
) -> tuple[dict[str, Space | None], list[str]]:
    """The spaces in which semantic metrics of a protocol are compared, those of most groups; why others show none.

    Every seed is measured with the title vectors of its own SFT model. None where no two of several groups agree.
    """
    spaces: dict[str, Space | None] = {}
    outside: dict[str, list[str]] = {}
    for protocol in protocols:
        used = {
            label: _space(group, protocol) for label, group in groups.items() if any(r.has(protocol) for r in group)
        }
        (space, times), *_ = [*collections.Counter(filter(None, used.values())).most_common(1), (None, 0)]
        spaces[protocol] = space if times > 1 or len(used) == 1 else None
        if others := [label for label, its in used.items() if its is None or its != spaces[protocol]]:
            outside.setdefault(", ".join(others), []).append(protocol)
    remarks = [
        f"Semantic metrics ({', '.join(map(report.words, SEMANTIC))}) are not compared for {names} "
        f"({', '.join(where)}): they rest on the title vectors of the SFT model, another one there or not recorded."
        for names, where in outside.items()
    ]
    return spaces, remarks


def _space(group: Sequence[Run], protocol: str) -> Space | None:
    having = sorted((run for run in group if run.has(protocol)), key=lambda run: run.seed)
    used = [run.results["protocols"][protocol].get("semantic_space") for run in having]
    return None if None in used else tuple(used[:1] if len(set(used)) == 1 else used)


def _protocol(runs: Sequence[Run], name: str) -> dict:
    found = next(run.results["protocols"][name] for run in runs if run.has(name))
    return {key: value for key, value in found.items() if key not in ("models", "semantic_space")}


def _figures(group: Sequence[Run], protocol: str, space: Space | None) -> dict[str, dict[str, dict]]:
    """[model][metric] of a group: the cell of its only run, else {"value": mean, "sd", "values": {seed: value}, "n"}.

    Where no seed changes a figure that depends on none, its cell stays as it is.
    """
    having = [run for run in group if run.has(protocol)]
    same_space = space is not None and space == _space(group, protocol)
    named = (run.results["protocols"][protocol]["models"].items() for run in having)
    found: dict[str, dict[str, dict]] = {}
    for model, metric in dict.fromkeys((model, metric) for rows in named for model, row in rows for metric in row):
        cells = {run.seed: report.cell(run.results, protocol, model, metric) for run in having}
        if any(cells.values()) and (same_space or metric not in SEMANTIC):
            found.setdefault(model, {})[metric] = _together([(s, c) for s, c in cells.items() if c], model in SEEDED)
    return found


def _together(cells: Sequence[tuple[int, dict]], seeded: bool) -> dict:
    values = {seed: cell["value"] for seed, cell in cells}
    first = cells[0][1]
    if len(values) == 1 or (not seeded and len(set(values.values())) == 1):
        return first
    over = significance.over_seeds(values)
    return {"value": over["mean"], "sd": over["sd"], "values": over["values"], "n": first.get("n")}


def _add_intervals(protocols: Mapping[str, Any], group: Sequence[Run], shown: Sequence[str]) -> None:
    """Gives means over seeds the interval over users, where prediction files tell the rows: every row its mean."""
    for protocol in shown:
        for metric in TESTED.get(protocol, ()):
            for model in BETWEEN:
                cell = protocols[protocol].get(model, {}).get(metric, {})
                ranks = [run.rank.get((protocol, model)) for run in group]
                if cell.get("values") and all(ranks):
                    values = _by_row(ranks, metric, protocol, group)
                    users = np.array([user for _, user, *_ in values])
                    resamples = _resamples({"": group})
                    cell["ci95"] = list(significance.mean_interval(np.array([*values.values()]), users, resamples))


# ---- tests between groups --------------------------------------------------------------------------------------------


def tests(groups: Mapping[str, Sequence[Run]], protocols: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Paired tests between the groups' models and within them, with adjustment over all; and what was not tested.

    Of a group with several seeds, a row's value is its mean over the seeds: interval and p speak of other users, with
    these trained models; how much another seed would change is what sd says. Models that answered every row alike are
    not tested.
    Errors: UserError when prediction files of one protocol hold different rows.
    """
    found: list[dict] = []
    alike: collections.Counter = collections.Counter()
    for protocol in protocols:
        for metric in TESTED.get(protocol, ()):
            values = {}
            for label, group in groups.items():
                for model in BETWEEN:
                    ranks = [run.rank.get((protocol, model)) for run in group]
                    if all(ranks):
                        values[label, model] = _by_row(ranks, metric, protocol, group)
            for a, b in _pairs(list(groups)):
                if a in values and b in values:
                    test = _test(values[a], values[b], protocol, _resamples(groups))
                    if test is None:
                        alike[f"{metric} ({protocol})"] += 1
                    else:
                        found.append({"protocol": protocol, "metric": metric, "a": _who(a), "b": _who(b)} | test)
    significance.add_adjusted(found)
    return found, [
        f"{metric}: {count} of the pairs of models agree in every row, so there is nothing to test."
        for metric, count in alike.items()
    ]


def _pairs(labels: Sequence[str]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Of every model, each later group against each earlier one; then aligned against SFT within each group."""
    between = [
        ((late, model), (early, model))
        for model in BETWEEN
        for place, early in enumerate(labels)
        for late in labels[place + 1 :]
    ]
    return [*between, *(((label, "aligned"), (label, "sft")) for label in labels)]


def _by_row(ranks: Sequence[Any], metric: str, protocol: str, group: Sequence[Run]) -> dict[Row, float]:
    """row -> mean over the runs of the metric."""
    rows = list(ranks[0])
    for rank, run in zip(ranks, group, strict=True):
        if rank.keys() != ranks[0].keys():
            raise UserError(_different_rows(protocol, run.name, group[0].name))
    function, k = ROW[metric]
    value_RxE = [function(np.array([rank[row] for row in rows]), k) for rank in ranks]
    return dict(zip(rows, np.mean(value_RxE, axis=0).tolist()))


def _test(a: Mapping[Row, float], b: Mapping[Row, float], protocol: str, resamples: int) -> dict | None:
    if a.keys() != b.keys():
        raise UserError(_different_rows(protocol, "one run", "another"))
    if a == b:
        return None
    user_E = np.unique([row[1] for row in a], return_inverse=True)[1]
    a_E, b_E = (np.array([values[row] for row in a]) for values in (a, b))
    return significance.compare(a_E, b_E, user_E, resamples, 0)


def _different_rows(protocol: str, one: str, other: str) -> str:
    return f"{protocol}: the prediction files of {one} and {other} hold different rows; evaluate again"


def _resamples(groups: Mapping[str, Sequence[Run]]) -> int:
    return next(iter(groups.values()))[0].settings.get("evaluate.bootstrap", 2000)


def _who(key: tuple[str, str]) -> str:
    label, model = key
    return f"{report.name(model)} [{label}]"


# ---- text and page ---------------------------------------------------------------------------------------------------


def columns(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(protocol, metric) of the columns of the chief table: the headline of a report, windows and the catalogue."""
    together = _any(found)
    chosen = [(protocol, metric) for metric, protocol in report.headline(together).items()]
    more = [
        (protocol, metric)
        for protocol, metric in (("windows", "HR@1"), ("catalogue", "HR@5"))
        if any(report.cell(together, protocol, model, metric) for model in report.models(together))
    ]
    return list(dict.fromkeys([*chosen, *more]))


def lines(found: Mapping[str, Any]) -> dict[str, list[tuple[str, list[dict]]]]:
    """model -> (label, cells of `columns`) of every group; one line for all where none says anything else.

    What the runs trained comes first, then what they stand beside: the same questions make the same floors.
    """
    places = columns(found)
    models = report.models(_any(found))
    rows = {}
    for model in [*(m for m in TRAINED if m in models), *(m for m in models if m not in TRAINED)]:
        row = [
            (group["label"], [group["protocols"][p].get(model, {}).get(metric, {}) for p, metric in places])
            for group in found["groups"]
        ]
        by_place = [list(cells) for cells in zip(*(cells for _, cells in row))]
        said = _figure
        if model not in SEEDED:  # a run without the protocol could say nothing else; one with other vectors could
            said = _value
            by_place = [
                [] if metric in SEMANTIC and not all(cells) else [cell for cell in cells if cell]
                for (_, metric), cells in zip(places, by_place, strict=True)
            ]
        alike = all(len(set(map(said, cells))) < 2 for cells in by_place)
        rows[model] = [(SAME, [next(iter(cells), {}) for cells in by_place])] if alike and len(row) > 1 else row
    return rows


def _any(found: Mapping[str, Any]) -> dict:
    """As a results.json that has every protocol, model and metric that some group has."""
    protocols: dict[str, dict] = {name: {"models": {}} for name in found["protocols"]}
    for group in found["groups"]:
        for name, models in group["protocols"].items():
            for model, row in models.items():
                protocols[name]["models"].setdefault(model, {}).update(row)
    return {"protocols": protocols}


def text(found: Mapping[str, Any]) -> str:
    """The chief table, every seed's value of its first column, the tests on that column, and the notes."""
    places = columns(found)
    if not places:
        return "\n".join(found["notes"])
    rows = [["", *(f"{report.words(metric)} ({protocol})" for protocol, metric in places)]]
    seeds = []
    for model, row in lines(found).items():
        for label, cells in row:
            rows.append([f"{report.name(model)} [{label}]", *map(_figure, cells)])
            if cells[0].get("values"):
                values = ", ".join(f"{seed}: {report.number(value)}" for seed, value in cells[0]["values"].items())
                seeds.append(f"{report.name(model)} [{label}], {places[0][1]} by seed: {values}")
    shown = [row for row in found["comparisons"] if (row["protocol"], row["metric"]) == places[0]]
    rest = len(found["comparisons"]) - len(shown)
    parts = [
        "\n".join(report.laid_out(rows)),
        "In brackets: 95 % intervals over users. ±: standard deviation over seeds.",
        "\n".join(seeds),
        "\n".join(map(report.comparison_line, shown)),
        f"{rest} more tests, of other metrics, in the page; p_holm and q_bh adjust over all of them." if rest else "",
        "\n".join([*found["notes"], *found["untested"]]),
    ]
    return "\n\n".join(part for part in parts if part)


def html(found: Mapping[str, Any]) -> str:
    """The comparison as one page."""
    groups, places = found["groups"], columns(found)
    bodies: dict[str, list[list[str]]] = {}
    for model, row in lines(found).items():
        for label, cells in row:
            title, first = (label, report.name(model)) if label == SAME else (report.name(model), label)
            shown = [
                _cell(cell, found["protocols"][place].get("n")) for cell, (place, _) in zip(cells, places, strict=True)
            ]
            bodies.setdefault(title, []).append([first, *shown])
    header = ["settings that differ", *(page.under(report.words(metric), protocol) for protocol, metric in places)]
    caption = "In brackets: 95 % intervals over users. ±: standard deviation over seeds, whose values are further down."
    facts = {"runs": sum(len(group["runs"]) for group in groups), "groups": len(groups)}
    lead = (
        page.asked(found["protocols"], "Every run")
        + page.notice("Not compared", found["notes"])
        + page.table(header, bodies, caption)
        + _plot(found)
    )
    runs = [
        [group["label"], run, seed, *(_shown(group["settings"][key]) for key in found["settings"])]
        for group in groups
        for run, seed in zip(group["runs"], group["seeds"], strict=True)
    ]
    sections = {
        "Paired tests": page.comparisons(found["comparisons"], _about(groups)) + page.listed(found["untested"]),
        "Beside published figures": _published(found),
        "All metrics": "".join(_metrics(found, name) for name in found["protocols"]),
        "Runs": page.table(["group", "run", "seed", *found["settings"]], runs, css="facts"),
        "Protocols": page.table(
            ["protocol", "hash", "n"],
            [[name, row["hash"], report.number(row["n"])] for name, row in found["protocols"].items()],
            "Runs stand in one table only where this hash is the same for all of them.",
            css="facts",
        ),
    }
    return page.document("Runs compared", facts, lead, sections)


def _about(groups: Sequence[Mapping[str, Any]]) -> str:
    seeds = (
        " Of several seeds a row's value is the mean: the intervals speak of other users, not of other seeds."
        if any(len(group["seeds"]) > 1 for group in groups)
        else ""
    )
    return (
        "Same rows, same users. Holm and Benjamini-Hochberg adjust over all tests of this table. Detectable: the true "
        f"difference that is found in 4 of 5 such experiments.{seeds}"
    )


def _plot(found: Mapping[str, Any]) -> str:
    """HR@1 and NDCG@5 of the aligned models and of SFT: intervals of single runs, dots of seeds."""
    panels: dict[str, dict[str, dict]] = {}
    colours, labels = {}, {}
    for place, (protocol, metric) in enumerate(columns(found)):
        if metric not in ("HR@1", "NDCG@5"):
            continue
        column = panels.setdefault(f"{metric} ({protocol})", {})
        for model, row in lines(found).items():
            for label, cells in row if model in BETWEEN else ():
                key = f"{report.name(model)} [{label}]"
                if cells[place]:
                    column[key] = {**cells[place], "values": list(cells[place].get("values", {}).values())}
                    colours[key] = plots.COLOURS[model]
                    labels[key] = textwrap.fill(f"{report.name(model)}, {label}", 32)
    svg = plots.intervals(panels, labels, "Dots, one a model and group of runs", colours)
    return page.figure(
        svg, "Bars: 95 % intervals over users. Small dots: single seeds, large dots: their means.", "panels wide"
    )


def _published(found: Mapping[str, Any]) -> str:
    """The published table that all runs stand beside, if there is one, and every group's figures."""
    ours = {}
    for group in found["groups"]:
        results = {"protocols": {name: {"models": models} for name, models in group["protocols"].items()}}
        ours[group["label"]] = [
            [model, _cell(hits, hits["n"]), _cell(valid, valid["n"]) if valid else "-", report.number(hits["n"]), how]
            for model, how, hits, valid in report.published_rows(results)
        ]
    return page.published(found["published"], ours) if found["published"] else ""


def _metrics(found: Mapping[str, Any], protocol: str) -> str:
    """All metrics of the aligned models, a column a group."""
    having = [group for group in found["groups"] if group["protocols"][protocol].get("aligned")]
    found_by_group = [group["protocols"][protocol]["aligned"] for group in having]
    n = found["protocols"][protocol]["n"]
    bodies = {
        title: [
            [report.words(metric), *(_cell(column.get(metric, {}), n, with_seeds=True) for column in found_by_group)]
            for metric in row
        ]
        for title, row in report.grouped(
            dict.fromkeys(metric for column in found_by_group for metric in column)
        ).items()
    }
    table = page.table(["aligned", *(group["label"] for group in having)], bodies)
    return f"<h3>{escape(protocol)}</h3>\n{table}" if table else ""


def _cell(cell: Mapping[str, Any], n: int, with_seeds: bool = False) -> str:
    """As in the page of a run; of several seeds mean, standard deviation, the interval if there is one, every value."""
    if not cell.get("values"):
        return page.figures(cell, n)
    bounds = "<small>[{}, {}]</small> ".format(*map(report.number, cell["ci95"])) if cell.get("ci95") else ""
    seeds = f"<small>{' · '.join(map(report.number, cell['values'].values()))}</small>" if with_seeds else ""
    return page.Html(f"{_mean(cell)} {bounds}{seeds}{page.own_n(cell, n)}".replace("-", "−"))


def _figure(cell: Mapping[str, Any]) -> str:
    if not cell.get("values"):
        return report.interval(cell)
    return _mean(cell) + (" [{}, {}]".format(*map(report.number, cell["ci95"])) if cell.get("ci95") else "")


def _value(cell: Mapping[str, Any]) -> str:
    return report.number(cell["value"])


def _mean(cell: Mapping[str, Any]) -> str:
    return report.number(cell["value"]) + ("" if cell["sd"] is None else f" ± {report.number(cell['sd'])}")


def _shown(value: Any) -> str:
    return "-" if value is None else ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
