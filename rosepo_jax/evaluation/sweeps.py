"""What the runs of a sweep say together: the table, means over seeds, a page with heat maps. Best first, by validation.

A row is a run: "run" (its folder), "settings", "error" (None, or why there are no figures) and the keys of FIGURES.
"""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rosepo_jax import files
from rosepo_jax.evaluation import page, plots, report, significance

CHOSEN_BY = "validation HR@1 of the aligned model, over the candidate lists"
FIGURES = {  # key in sweep.json -> heading and format in the table; test figures of the candidates protocol
    "validation_hr1": ("validation HR@1", ".4f"),
    "hr1": ("test HR@1", ".4f"),
    "over_sft": ("minus SFT", "+.4f"),
    "ndcg5": ("test NDCG@5", ".4f"),
    "true_win_rate": ("true win rate", ".4f"),
}
DRAWN = ("validation_hr1", "hr1", "true_win_rate")  # figures that get a plot
FULL = 0.5  # more than this share of a grid must have been run for it to be drawn as one

Row = Mapping[str, Any]


def figures(align: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a run from the summary of `align` and results.json; None where it does not measure one."""
    hr1, sft_hr1, ndcg5 = (
        report.cell(results, "candidates", model, metric).get("value")
        for model, metric in (("aligned", "HR@1"), ("sft", "HR@1"), ("aligned", "NDCG@5"))
    )
    truth = results.get("truth", {})
    true_win_rate = truth.get("models", {}).get("aligned", truth).get("true_win_rate")
    return {
        "validation_hr1": align.get("HR@1"),
        "hr1": hr1,
        "over_sft": None if hr1 is None or sft_hr1 is None else hr1 - sft_hr1,
        "ndcg5": ndcg5,
        "true_win_rate": report.as_cell(true_win_rate).get("value"),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What sweep.json holds:

    chosen_by   what "best" means, in words
    best        the settings that are best by validation, without the seed where seeds were swept; None: no run has any
    runs        the rows, best first, failed ones last
    over_seeds  `over_seeds` of the rows
    """
    ranked = sorted(rows, key=_rank)
    groups = over_seeds(ranked)
    best = (groups or ranked)[0] if ranked else None
    known = best is not None and best["validation_hr1"] is not None
    return {
        "chosen_by": CHOSEN_BY,
        "best": best["settings"] if best is not None and known else None,
        "runs": ranked,
        "over_seeds": groups,
    }


def _rank(row: Row) -> tuple:
    chosen_by = row["validation_hr1"]
    return row["error"] is not None, chosen_by is None, -(chosen_by or 0.0), row["run"]


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone, together and best first: their settings, seeds, and mean and sd of figures.

    Empty when no seed was swept.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["error"] is None and "seed" in row["settings"]:
            groups.setdefault(files.hash_json(_but_seed(row)), []).append(row)
    found = []
    for group in groups.values():
        measured = {}
        for name in FIGURES:
            values = {row["settings"]["seed"]: row[name] for row in group}
            known = None not in values.values()
            measured[name] = significance.over_seeds(values) if known else None
        seeds = sorted(row["settings"]["seed"] for row in group)
        found.append({"settings": _but_seed(group[0]), "seeds": seeds, **measured})
    return sorted(found, key=lambda row: -row["validation_hr1"]["mean"] if row["validation_hr1"] else 0.0)


def _but_seed(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row["settings"].items() if key != "seed"}


# ---- for the terminal ------------------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """`summary` as text: the runs, then the means over seeds."""
    rows, groups = found["runs"], found["over_seeds"]
    return table(rows) + (f"\n\n{seeds_table(groups)}" if groups else "")


def table(rows: Sequence[Row]) -> str:
    """The rows as text: settings, then the figures that some run has."""
    shown = _shown(rows)
    settings = _settings(rows)
    lines = [[*settings, *(FIGURES[name][0] for name in shown)]]
    for row in rows:
        lines.append([*(str(row["settings"].get(key, "")) for key in settings), *_numbers(row, shown)])
    failed = [f"{row['run']}: failed: {row['error']}" for row in rows if row["error"] is not None]
    return "\n".join([f"best first by {CHOSEN_BY}", *report.laid_out(lines), *failed])


def seeds_table(groups: Sequence[Row]) -> str:
    """`over_seeds` as text: settings, seeds, then mean ± standard deviation of the figures that some group has."""
    shown = _shown(groups)
    settings = _settings(groups)
    lines = [[*settings, "seeds", *(FIGURES[name][0] for name in shown)]]
    for row in groups:
        cells = [_mean_and_sd(row[name], FIGURES[name][1]) for name in shown]
        lines.append([*(str(row["settings"][key]) for key in settings), " ".join(map(str, row["seeds"])), *cells])
    return "\n".join(["mean ± standard deviation over seeds", *report.laid_out(lines)])


def _shown(rows: Sequence[Row]) -> list[str]:
    return [name for name in FIGURES if any(row[name] is not None for row in rows)]


def _settings(rows: Sequence[Row]) -> list[str]:
    return sorted({key for row in rows for key in row["settings"]})


def _numbers(row: Row, shown: Sequence[str]) -> list[str]:
    return ["-" if row[name] is None else format(row[name], FIGURES[name][1]) for name in shown]


def _mean_and_sd(figure: Mapping[str, Any] | None, format_: str) -> str:
    if figure is None:
        return "-"
    return format(figure["mean"], format_) + ("" if figure["sd"] is None else f" ± {figure['sd']:.4f}")


# ---- the page --------------------------------------------------------------------------------------------------------


def html(found: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """sweep.json as a page; `config`: what the runs have in common, where they do not differ."""
    rows, groups = found["runs"], found["over_seeds"]
    failed = [f"{row['run']}: {row['error']}" for row in rows if row["error"] is not None]
    flags = "\n".join(report.flags(report.Material(results={}, config=config)))
    sections = {
        "What the settings do": _plots(rows),
        "All runs": _runs_table(rows),
        "Over seeds": _seeds_table(groups),
        "Settings of all runs": f"<pre>{escape(flags)}</pre>\n" if flags else "",
    }
    facts = {"runs": len(rows), "failed": len(failed) or None, "source": config.get("data", {}).get("source")}
    lead = _best(found) + page.notice("Without figures", failed)
    return page.document(f"Sweep of {', '.join(_settings(rows)) or 'nothing'}", facts, lead, sections)


def _best(found: Mapping[str, Any]) -> str:
    if found["best"] is None:
        return "<p>No run has a validation figure.</p>\n"
    best = (found["over_seeds"] or found["runs"])[0]
    value = best["validation_hr1"]
    reached = _mean_and_sd(value, ".4f") if isinstance(value, Mapping) else format(value, ".4f")
    settings = [f"{key} = {value}" for key, value in found["best"].items()]
    said = [
        f"Best settings: {', '.join(settings) or 'those of the config'}.",
        f"Chosen by {found['chosen_by']}: {reached}. The best of many is flattered by its own choice; what the "
        "choice is worth, the test figures say, which had no part in it.",
    ]
    return page.listed(said)


def _runs_table(rows: Sequence[Row]) -> str:
    settings, shown = _settings(rows), _shown(rows)
    body = [
        [
            row["run"] if row["error"] is None else page.under(row["run"], "no figures"),
            *(str(row["settings"].get(key, "")) for key in settings),
            *(number.replace("-", "−") if number != "-" else number for number in _numbers(row, shown)),
        ]
        for row in rows
    ]
    header = ["run", *settings, *(FIGURES[name][0] for name in shown)]
    return page.table(header, body, f"Best first by {CHOSEN_BY}. Run: the folder below sweep/.")


def _seeds_table(groups: Sequence[Row]) -> str:
    settings, shown = _settings(groups), _shown(groups)
    body = [
        [
            ", ".join(f"{key} = {row['settings'][key]}" for key in settings) or "all",
            " ".join(map(str, row["seeds"])),
            *(_mean_and_sd(row[name], FIGURES[name][1]).replace("-", "−") for name in shown),
        ]
        for row in groups
    ]
    return page.table(["settings", "seeds", *(FIGURES[name][0] for name in shown)], body, "Mean ± standard deviation.")


def _plots(rows: Sequence[Row]) -> str:
    """A heat map a figure where two settings were swept, a line where it was one; for more, validation by each."""
    axes = axes_of(rows)
    drawn = [name for name in DRAWN if any(row[name] is not None for row in rows)]
    if not axes or not drawn:
        return ""
    if len(axes) == 1:
        ((key, place),) = axes.items()
        svg = "".join(plots.against(FIGURES[name][0], key, _points(rows, place, name), line=True) for name in drawn)
        return page.figure(svg, "A dot is a run; a line joins means.", "panels wide")
    if len(axes) == 2:
        (x, x_of), (y, y_of) = sorted(axes.items(), key=lambda axis: -len(set(axis[1].values())))
        cells: dict[tuple, list[Row]] = {}
        for row in rows:
            cells.setdefault((x_of[row["run"]], y_of[row["run"]]), []).append(row)
        if len(cells) > FULL * len(set(x_of.values())) * len(set(y_of.values())):
            svg = "".join(plots.heat_map(FIGURES[name][0], x, y, _means(cells, name)) for name in drawn)
            return page.figure(
                svg,
                "A panel has a scale of its own; its best is framed. Several runs of a cell: their mean.",
                "panels wide",
            )
    svg = "".join(plots.against(FIGURES["validation_hr1"][0], key, _points(rows, place, "validation_hr1"), line=False)
                  for key, place in axes.items())  # fmt: skip
    return page.figure(svg, "Every dot is a run; all other settings vary too.", "panels wide")


def axes_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """name -> the value of each run, of every setting that differs between runs; not the seed, whose runs are repeats.

    Settings of which each says what the other is are one axis, where values come more than once. A setting that a run
    leaves to the config is "as configured" there.
    """
    columns = {
        key: {row["run"]: row["settings"].get(key, "as configured") for row in rows}
        for key in _settings(rows)
        if key != "seed"
    }
    merged: list[tuple[list[str], list[tuple]]] = []  # keys, and their values for each row
    for key, column in columns.items():
        values = [_label(value) for value in column.values()]
        if len(set(values)) < 2:
            continue
        for keys, together in merged:
            if len(set(zip(together, values))) == len(set(together)) == len(set(values)) < len(rows):
                keys.append(key)
                together[:] = [(*left, right) for left, right in zip(together, values)]
                break
        else:
            merged.append(([key], [(value,) for value in values]))
    names = [row["run"] for row in rows]
    return {
        ", ".join(keys): dict(zip(names, (v[0] if len(v) == 1 else " : ".join(map(str, v)) for v in values)))
        for keys, values in merged
    }


def _label(value: Any) -> Any:
    """Something that can be told apart and sorted: a number as it is, everything else as text."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _points(rows: Sequence[Row], place: Mapping[str, Any], name: str) -> list[tuple[Any, float]]:
    return [(place[row["run"]], row[name]) for row in rows if row[name] is not None]


def _means(cells: Mapping[tuple, Sequence[Row]], name: str) -> dict[tuple, float | None]:
    known = {at: [row[name] for row in rows if row[name] is not None] for at, rows in cells.items()}
    return {at: statistics.fmean(values) if values else None for at, values in known.items()}
