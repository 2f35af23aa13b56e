"""Plots as inline SVG: no fixed ink, so they read on light and dark paper; the same bytes every time.

Every function returns its panels one after the other, each an <svg> of its own: a page lays them out in as many columns
as fit, and none shrinks below a readable size.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

INK = "#010203"  # a stand-in that becomes the page's text colour
COLOURS = {"sft": "#3b82d6", "sft_more": "#8b7fd0", "aligned": "#e0702f", "oracle": "#2f9e77"}
OTHER = "#8a8f98"
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.prop_cycle": "cycler('color', ['3b82d6', 'e0702f', '2f9e77', '8b7fd0'])",
}
PANELS = (  # the learning curves that share axes; every other name gets its own panel
    ("rewards/chosen", "rewards/rejected"),
    ("logps/chosen", "logps/rejected"),
)
FIRST = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen")
UNITS = {
    "loss": "nats",
    "rewards/margins": "reward margin (nats)",
    "rewards/accuracies": "share of pairs",
    "rewards/chosen": "reward (nats)",
    "logps/chosen": "summed log-prob. (nats)",
    "grad_norm": "global norm",
    "epsilon/mean": "mean ε",
}
SHOWS = {
    "HR@1": "share of rows",
    "NDCG@5": "mean over rows",
    "popularity lift": "nats",
    "semantic error rate": "share of rows",
    "MGU": "gap of shares",
    "DGU": "gap of shares",
    "gini": "0: all alike, 1: always the same item",
    "coverage": "share of the catalogue",
}
NARROW, WIDE = 3.4, 5.2  # inches
ROW = 0.24  # inches a row of dots takes

Cells = Mapping[str, Mapping[str, Any]]


def finite(value: Any) -> bool:
    """Whether there is a number to draw."""
    return isinstance(value, int | float) and math.isfinite(value)


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str], description: str) -> str:
    """Learning curves, one panel per name (or per pair of names that belong together), over update steps."""
    groups = [tuple(name for name in panel if name in names) for panel in PANELS]
    grouped = {name for group in groups for name in group}
    groups = [group for group in groups if group] + [(name,) for name in names if name not in grouped]
    groups.sort(key=lambda group: FIRST.index(group[0]) if group[0] in FIRST else len(FIRST))

    def paint(group, axis):
        for name in group:
            points = [(row["step"], row[name]) for row in rows if finite(row.get(name))]
            marker = "o" if len(points) <= 30 else None
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=2.5, linewidth=1.1, label=name)
        axis.set(title=", ".join(group), xlabel="update step", ylabel=UNITS.get(group[0], group[0].split("/")[-1]))
        if len(group) > 1:
            axis.legend()

    return "".join(_draw(f"{description}: {', '.join(g)}", functools.partial(paint, g)) for g in groups)


def intervals(
    panels: Mapping[str, Cells], labels: Mapping[str, str], description: str, colours: Mapping[str, str] | None = None
) -> str:
    """One panel a metric of `panels[metric][row]`, one dot with its 95 % interval a row.

    A cell with "values" is a mean: its values are drawn as small dots beside it. `colours`: of rows that are no models.
    """
    places = {row: place for place, row in enumerate({row: None for column in panels.values() for row in column})}

    def paint(metric, column, axis):
        for row, cell in column.items():
            colour = _colour(row, colours)
            for value in cell.get("values", ()):
                axis.plot(value, places[row], ".", color=colour, markersize=4, alpha=0.7)
            axis.errorbar(cell["value"], places[row], xerr=_errors(cell), fmt="o", markersize=5, color=colour)
        axis.set_yticks(list(places.values()), [labels.get(row, row) for row in places])
        axis.set(title=metric, xlabel=SHOWS.get(metric.partition(" (")[0], metric), ylim=(len(places) - 0.5, -0.5))
        axis.grid(False, axis="y")

    return "".join(
        _draw(f"{description}: {metric}", functools.partial(paint, metric, column), WIDE, 1 + ROW * len(places))
        for metric, column in panels.items()
        if column
    )


def by_class(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    ticks: Sequence[str],
    labels: Mapping[str, str],
    title: str,
    xlabel: str,
) -> str:
    """HR@1 over classes of rows, one line a model; intervals of SFT and the aligned model, which are compared."""

    def paint(axis):
        for model, row in series.items():
            points = [(place, cell["value"]) for place, cell in enumerate(row) if finite(cell.get("value"))]
            if not points:
                continue
            style = "-" if model in COLOURS else (":" if model == "popularity" else "--")
            axis.plot(
                *zip(*points, strict=True), ls=style, marker="o", markersize=3, linewidth=1.2, color=_colour(model),
                label=labels.get(model, model),
            )  # fmt: skip
            for place, cell in enumerate(row):
                if model in ("sft", "aligned") and finite(cell.get("value")):
                    axis.errorbar(place, cell["value"], _errors(cell), color=_colour(model), linewidth=0.8)
        axis.set(ylabel="HR@1 (share of rows)", xlabel=xlabel)
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_ylim(bottom=0)
        axis.margins(x=0.04)
        axis.figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    return _draw(title, paint, WIDE, 3.3)


def epsilons(samples: Mapping[str, np.ndarray], description: str) -> str:
    """Histograms of the smoothing factors `samples[label]`, each as shares of its own sample."""
    edges = np.linspace(0.0, max(0.5, *(values.max() for values in samples.values())), 31)

    def paint(axis):
        for (label, values), colour in zip(samples.items(), (COLOURS["sft"], COLOURS["aligned"]), strict=False):
            weights = np.full(len(values), 1 / len(values))
            label = f"{label} (n = {len(values):,})"
            axis.hist(values, edges, weights=weights, color=colour, alpha=0.6, label=label)
        axis.set(title="Smoothing factor of the stored pairs", xlabel="ε", ylabel="share of pairs")
        axis.legend()

    return _draw(description, paint, WIDE, 2.6)


def slots(shares: Mapping[str, Sequence[float]], labels: Mapping[str, str], description: str) -> str:
    """How often the first answer stood in each slot of the shown list, a panel a model; dashed: all alike."""

    def paint(model, share, axis):
        axis.bar(range(1, len(share) + 1), share, width=0.7, color=_colour(model))
        axis.axhline(1 / len(share), color=INK, linewidth=0.8, ls="--")
        axis.set(title=labels.get(model, model), xlabel="slot of the shown list", ylabel="share of first answers")
        axis.grid(False, axis="x")

    return "".join(
        _draw(f"{description}: {labels.get(model, model)}", functools.partial(paint, model, share))
        for model, share in shares.items()
    )


def _colour(row: str, colours: Mapping[str, str] | None = None) -> str:
    return (colours or COLOURS).get(row, OTHER)


def _errors(cell: Mapping[str, Any]) -> list[list[float]] | None:
    if not cell.get("ci95"):
        return None
    low, high = cell["ci95"]
    return [[max(cell["value"] - low, 0.0)], [max(high - cell["value"], 0.0)]]


def _draw(description: str, paint: Callable[[Any], None], width: float = NARROW, height: float = 2.2) -> str:
    import matplotlib.style  # heavy, and only reports need it
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": description}]):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        paint(axis)
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), description)


def _inline(svg: str, description: str) -> str:
    """The <svg> element alone, fit for a place inside HTML: named, scalable, without prologue and unused ids."""
    svg = svg[svg.index("<svg") :]
    width = re.search(r'width="([\d.]+)pt"', svg)[1]  # type: ignore[index]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\s+id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(
        r"<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>",
        lambda match: (
            f'<svg viewBox={match[1]} role="img" aria-label="{escape(description)}" style="max-width:{width}pt">'
        ),
        svg,
        count=1,
    )
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    return svg.replace(INK, "currentColor")
